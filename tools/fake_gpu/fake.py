"""A GPU that is not there: FakeTensors on `cuda` carry shapes, types and storage, and compute nothing.

`install()` first, then run code inside `gpu()`.
"""
import gc
import itertools
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30


def always(value):
    "A function of its own, for each name anew: torch.compile looks for functions by what they are"
    return lambda *args, **kw: value


NOTHING = (
    "_lazy_init synchronize empty_cache set_device manual_seed manual_seed_all reset_peak_memory_stats "
    "set_rng_state"
)
ZERO = "current_device memory_reserved memory_allocated max_memory_allocated"


def install(capability=(9, 0), free=78 * GIB) -> None:
    "Answers for what is asked of torch.cuda, and PyTorch functions that look at a real device replaced."
    properties = SimpleNamespace(
        major=capability[0], minor=capability[1], multi_processor_count=132, total_memory=free, name="fake",
    )
    answers = {name: always(None) for name in NOTHING.split()} | {name: always(0) for name in ZERO.split()}
    answers |= dict(
        is_available=always(True), device_count=always(1), get_device_capability=always(capability),
        get_device_name=always("fake"), get_device_properties=always(properties),
        mem_get_info=always((free, free)), is_bf16_supported=always(capability >= (8, 0)),
        get_rng_state=lambda device=None: torch.zeros(16, dtype=torch.uint8),
    )
    for name, answer in answers.items(): setattr(torch.cuda, name, answer)
    F.scaled_dot_product_attention = _sdpa
    torch.Tensor.bincount = lambda self, weights=None, minlength=0: self.new_zeros(minlength)
    _project(capability)


def _sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    "Types and shapes of attention; its kernels ask a real device"
    assert q.dtype == k.dtype == v.dtype and q.shape[-1] == k.shape[-1]
    if q.shape[1] != k.shape[1]:
        assert enable_gqa
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2)
    if attn_mask is None: return scores.softmax(-1) @ v
    is_bool = attn_mask.dtype == torch.bool
    scores = scores.masked_fill(~attn_mask, float("-inf")) if is_bool else scores + attn_mask
    return scores.softmax(-1) @ v


class Borders:
    "The borders of blocks, known on the host."
    def __init__(self, values): self.values = values
    def tolist(self): return list(self.values)


def _project(capability) -> None:
    "The places of this project where a value is read on the host; each line says what it stands for."
    import mistral_nb.train.plan as plan
    from mistral_nb.model import attention, fused, moe, weights
    for module in (attention, fused, moe):
        for thing in vars(module).values():
            if isinstance(thing, attention.compile_on_gpu): thing.usable = False  # runs as written
    attention.has_varlen = plan.has_varlen = lambda device: capability >= (8, 0)
    attention.BlockIndex.of = staticmethod(_block_index)
    fused.int = lambda x: 7  # seeds of dropout
    moe.sort_by_expert, moe.stretches = _equal_experts(moe.sort_by_expert)
    weights.safe_open = _real_files(weights.safe_open)


def _block_index(seqlens, device="cpu"):
    "Borders of blocks on the device, and on the host"
    from mistral_nb.model.attention import BlockIndex
    if isinstance(seqlens, BlockIndex): return seqlens
    borders = [0, *itertools.accumulate(seqlens)]
    on_device = torch.empty(len(borders), dtype=torch.int32, device=device)
    return BlockIndex(tuple(seqlens), Borders(borders), on_device)


def _equal_experts(real):
    "Every expert gets equally many rows"
    rows = [0]

    def sort_by_expert(chosen, experts):
        rows[0] = chosen.numel()
        return real(chosen, experts)

    def stretches(ends):
        at = [rows[0] * i // len(ends) for i in range(len(ends) + 1)]
        return [slice(a, b) for a, b in zip(at, at[1:])]

    return sort_by_expert, stretches


def _real_files(opened):
    "Files are read as they are"
    class Open:
        def __init__(self, *args): self.file = opened(*args)
        def __exit__(self, *error): return self.file.__exit__(*error)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __getattr__(self, name):
            value = getattr(self.file, name)
            if name != "get_tensor": return value

            def get(key):
                with unset_fake_temporarily(): return value(key)
            return get
    return Open


class Ledger(TorchDispatchMode):
    "Live and peak bytes on the device; a value that is read on the host is 1."

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f is torch.ops.aten._local_scalar_dense.default and _is_fake_cuda(args[0]):
            return 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 1
        out = f(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.device.type == "cuda": self._add(t.untyped_storage())
        return out

    def _add(self, storage) -> None:
        if storage._cdata in self.known: return
        self.known[storage._cdata] = n = storage.nbytes()
        self.live += n
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key) -> None: self.live -= self.known.pop(key, 0)

    def mark(self) -> int:
        "Peak from here on; returns what is live"
        gc.collect()
        self.peak = self.live
        return self.live


def _is_fake_cuda(t) -> bool:
    return getattr(getattr(t, "fake_device", None), "type", "") == "cuda"


@contextmanager
def gpu():
    "Inside, tensors on `cuda` are fake; yields the ledger"
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger: yield ledger
