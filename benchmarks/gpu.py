"""LoRA steps at real sizes on a CUDA GPU: speed, memory against the plan, kernels, peers, parts of a step.

Weights and documents are random; nothing is written.

Every case is a process of its own with a time limit, which prints one line of JSON; a case that runs out of
memory or time is shown as such and the next one begins."""
import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np

from mistral_nb.core.display import Table
from mistral_nb.model.args import ModelArgs, MoeArgs, flops_per_token

RANK, SCALING, LR, DECAY, MAX_NORM, EPS = 64, 2.0, 1e-4, 0.1, 1.0, 1e-5
STORAGES, TOKENS = ("none", "fp8", "nf4"), (32768, 16384, 8192)
PACKAGES = (
    "mistral-nb torch triton transformers peft liger-kernel flash-attn bitsandbytes cut-cross-entropy".split()
)
PREDICTED = {
    ("mistral", "none", 32768): "17,000-20,000", ("mistral", "fp8", 32768): "22,000-25,000",
}  # on one H200, written down before it was measured
ENV = dict(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
)


@dataclass(frozen=True)
class Shape:
    "A model, and the cases that are measured where none are asked for."
    args: ModelArgs
    storages: tuple[str, ...] = STORAGES
    tokens: tuple[int, ...] = TOKENS
    mean: float = 1200.0  # tokens in a document
    rank: int = RANK


SHAPES = {
    "mistral": Shape(ModelArgs(4096, 32, 128, 14336, 32, 8, EPS, 32768, 1e6)),
    "nemo": Shape(ModelArgs(5120, 40, 128, 14336, 32, 8, EPS, 131072, 1e6), tokens=(32768,)),
    "mixtral": Shape(
        ModelArgs(4096, 32, 128, 14336, 32, 8, EPS, 32768, 1e6, MoeArgs(8, 2)), ("fp8", "nf4"), (8192,)
    ),
    "tiny": Shape(ModelArgs(128, 2, 32, 256, 4, 2, EPS, 512, 1e6), tokens=(512,), mean=60.0, rank=8),
    "tiny-moe": Shape(
        ModelArgs(128, 2, 32, 256, 4, 2, EPS, 512, 1e6, MoeArgs(4, 2)), tokens=(512,), mean=60.0, rank=8
    ),
}
CHILDREN: dict[str, Callable[..., dict]] = {}
PARTS: dict[str, tuple[str, list[str], Callable[[bool], Iterator[list]]]] = {}


def child(run: Callable[..., dict]) -> Callable[..., dict]:
    "Work that `ask` gives to a process of its own, by its name."
    CHILDREN[run.__name__] = run
    return run


def part(title: str, *header: str) -> Callable:
    "A micro benchmark that yields the rows of a table; its argument says whether to be quick."
    def note(run: Callable[[bool], Iterator[list]]) -> Callable:
        PARTS[run.__name__] = title, list(header), run
        return run
    return note


# what a case runs on

def device() -> str:
    "Where children compute."
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_here():
    "Type of frozen weights and activations here: bf16, fp16 on a GPU without it, float32 on a CPU."
    import torch
    from mistral_nb.train.plan import choose_dtype
    return choose_dtype("auto", device(), True, torch.bfloat16)


def sync() -> None:
    "Wait for the device."
    import torch
    if torch.cuda.is_available(): torch.cuda.synchronize()


def seconds(run: Callable[[], Any]) -> float:
    "Wall seconds of one call, with all that it started on the device."
    sync()
    began = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - began


def usual(run: Callable[[], Any], budget: float = 0.5) -> float:
    "Median seconds of a call after warm-up: about `budget` seconds of calls, 3 to 50 of them."
    run()
    few = max(seconds(run), 1e-6)
    return median(seconds(run) for _ in range(int(min(50, max(3, budget / few)))))


def forget_peak() -> float:
    "Start to watch for a new peak; returns GiB in use now."
    import torch
    if not torch.cuda.is_available(): return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30


def peak() -> dict[str, float]:
    "Peak GiB: of tensors, and what the allocator held for them."
    import torch
    from mistral_nb.train.metrics import peak_memory_gib
    held = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0
    return dict(peak=peak_memory_gib(device()), held=held)


# a batch, a model

def lengths(tokens: int, mean: float) -> tuple[int, ...]:
    """Exponential lengths that sum to `tokens`, none below 16: evenly spaced quantiles in random order, so
    that few documents are spread as many are."""
    many = max(1, round(tokens / mean))
    raw = -np.log1p(-(np.arange(many) + 0.5) / many)
    out = np.maximum(16, raw / raw.sum() * tokens).astype(int)
    out[-1] += tokens - out.sum()  # the longest takes what rounding left
    return tuple(np.random.RandomState(0).permutation(out).tolist())


def make_batch(tokens: int, vocab: int, mean: float):
    "One packed row of random ids; the second half of each document is trained."
    from mistral_nb.data.pack import Batch
    rng, seqlens = np.random.RandomState(1), lengths(tokens, mean)
    mask = np.concatenate([np.arange(n) >= n // 2 for n in seqlens])
    x, y = rng.randint(3, vocab, (2, tokens)).astype(np.int64)
    return Batch(x, y, mask, seqlens)


def mean_context(seqlens: tuple[int, ...]) -> float:
    "Positions that a token attends to, itself included."
    return sum(n * (n + 1) / 2 for n in seqlens) / sum(seqlens)


def work(args: ModelArgs, rank: int, batch) -> float:
    "Useful operations of a step; recomputing and padding are none."
    return flops_per_token(args, rank, mean_context(batch.seqlens), batch.trained / len(batch.x)) * len(
        batch.x
    )


def random_model(args: ModelArgs, storage: str, dtype, rank: int):
    """A frozen model with an adapter, made on the device matrix by matrix; experts that are not packed
    stand behind each other."""
    import torch
    from mistral_nb.model import lora
    from mistral_nb.model.quant import Linear, quantize_linear
    from mistral_nb.model.transformer import Transformer
    from mistral_nb.model.weights import ExpertStacks
    here = torch.device(device())
    torch.manual_seed(0)
    with torch.device("meta"): model = Transformer(args)
    matrices = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Linear)}
    stacks = ExpertStacks(args) if args.moe and storage == "none" else None
    for name, p in list(model.named_parameters()):
        w = torch.ones(p.shape, dtype=dtype, device=here)
        if p.dim() == 2: w.normal_(std=1.0 if name == "tok_embeddings.weight" else p.shape[1] ** -0.5)
        if stacks and ".experts." in name: w = stacks.put(name, w, here)
        owner, _, leaf = name.rpartition(".")
        parent, _, last = owner.rpartition(".")
        if name in matrices: setattr(model.get_submodule(parent), last, quantize_linear(w, storage, dtype))
        else: setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(w))
    lora.add_adapters(model, rank, SCALING)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.zeros_(layer.lora_B.weight)  # A was drawn on the device
    return model.train()


# children: the machine, a step, a peer's step, a part

def matmul_ceiling(tiny: bool) -> float:
    "Operations per second of large square products in the training type, sustained for about a second."
    import torch
    best = 0.0
    for n in (256,) if tiny else (8192, 16384):
        a, b = (torch.randn(n, n, device=device(), dtype=dtype_here()) for _ in range(2))
        out = torch.empty_like(a)
        def run(times): return [torch.mm(a, b, out=out) for _ in range(times)]
        run(3)
        times = max(3, int((0.05 if tiny else 1.0) / max(seconds(partial(run, 3)) / 3, 1e-6)))
        best = max(best, 2 * n**3 * times / seconds(partial(run, times)))
    return best


@child
def machine(tiny: bool) -> dict:
    "What the measurements run on."
    import torch
    if not torch.cuda.is_available():
        return dict(cuda=False) | (
            dict(ceiling=matmul_ceiling(tiny), dtype=str(dtype_here())) if tiny else {}
        )
    gpu = torch.cuda.get_device_properties(0)
    try:
        driver = subprocess.run(
            [
                "nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm",
                "--format=csv,noheader", "--id=0",
            ],
            capture_output=True,
            text=True,
            timeout=20,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired): driver = ""
    what = (
        f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}, "
        f"driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
    )
    return dict(cuda=True, name=what, ceiling=matmul_ceiling(tiny), dtype=str(dtype_here()))


def measured(step: Callable[[], float], steps: int, profile: bool) -> dict:
    "A first step, a warm-up, then `steps` timed ones; `profile` runs another."
    losses: list[float] = []
    def once(): return losses.append(step())
    first, _ = seconds(once), seconds(once)
    out = dict(first=first, seconds=median(seconds(once) for _ in range(steps)), loss=losses[0])
    return out | peak() | (dict(kernels=kernels(once)) if profile else {})


def kernels(run: Callable[[], Any], top: int = 25) -> list[list]:
    "`[name, milliseconds, share, calls]` of the kernels that take most of a call."
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile
    cuda = device() == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        run()
        sync()
    def clock(e):
        return (
            getattr(e, "self_device_time_total", getattr(e, "self_cuda_time_total", 0))
            if cuda
            else e.self_cpu_time_total
        )
    events = [
        e
        for e in found.key_averages()
        if not (cuda and e.device_type == DeviceType.CPU)
        and not getattr(e, "is_user_annotation", False)
        and not e.key.startswith("Optimizer.")
    ]
    total = sum(map(clock, events)) or 1
    return [
        [e.key, clock(e) / 1e3, clock(e) / total, e.count]
        for e in sorted(events, key=clock, reverse=True)[:top]
    ]


@child
def step(model: str, storage: str, tokens: int, steps: int, profile: bool, memory_gib: float | None) -> dict:
    "This package's step, cut and recomputed as its plan for the free memory says."
    import torch
    from mistral_nb.core.settings import LoraArgs, TrainArgs
    from mistral_nb.train import checkpoint, loop, optim
    from mistral_nb.train.plan import free_memory, make_plan
    shape, dtype = SHAPES[model], dtype_here()
    batch = make_batch(tokens, shape.args.vocab_size, shape.mean)
    settings = TrainArgs(lora=LoraArgs(rank=shape.rank, scaling=SCALING), seq_len=tokens, quantize=storage)
    torch.zeros(1, device=device())  # the free memory is that beside CUDA's own
    free, name = free_memory(device())
    plan = make_plan(
        settings, shape.args, dtype, int(memory_gib * 2**30) if memory_gib else free, name, max(batch.seqlens)
    )
    out = dict(
        micro=plan.micro, recompute=plan.recompute, planned=plan.memory.total / 2**30,
        work=work(shape.args, shape.rank, batch),
    )
    if not plan.fits: return out | dict(error="does not fit")
    net = random_model(shape.args, storage, dtype, shape.rank)
    net.recompute = plan.recompute
    optimizer = optim.adamw(checkpoint.trainable_params(net), LR, DECAY)
    scaler = torch.amp.GradScaler(device()) if dtype == torch.float16 else None
    forget_peak()
    return out | measured(
        lambda: loop.train_step(net, [batch], optimizer, MAX_NORM, "tokens", scaler, plan.limit)[0],
        steps, profile,
    )


def hf_model(args: ModelArgs, dtype, rank: int, recompute: bool, liger: bool):
    "The same shape in transformers and peft, made on the device, with flash attention if that is there."
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, MistralConfig
    from transformers.utils import is_flash_attn_2_available
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_mistral
        apply_liger_kernel_to_mistral()
    config = MistralConfig(
        vocab_size=args.vocab_size, hidden_size=args.dim, num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads, head_dim=args.head_dim,
        intermediate_size=args.hidden_dim, rms_norm_eps=args.norm_eps, max_position_embeddings=131072,
        sliding_window=None, tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before, flash = torch.get_default_dtype(), device() == "cuda" and is_flash_attn_2_available()
    torch.set_default_dtype(dtype)
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="flash_attention_2" if flash else "sdpa"
        )
    torch.set_default_dtype(before)
    assert model.dtype == dtype, f"the peer's weights are {model.dtype}"
    if recompute: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=int(rank * SCALING), lora_dropout=0.0, target_modules=targets)
    ).train(), flash


def rows_of(batch, way: str, flash: bool) -> Iterator[tuple[dict, int]]:
    """`(inputs, trained tokens)` of the batch: one packed row, or micro-batches of documents padded to the
    longest, of about as many positions."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    x, y, mask = (torch.from_numpy(t).to(device()) for t in (batch.x, batch.y, batch.mask))
    labels = y.masked_fill(~mask, -100)
    if way == "packed":
        at = torch.cat([torch.arange(n) for n in batch.seqlens]).to(device())[None]
        more = {}
        if flash:
            borders = torch.tensor([0, *batch.seqlens], device=device()).cumsum(0, dtype=torch.int32)
            more = dict(
                cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=max(batch.seqlens),
                max_length_k=max(batch.seqlens),
            )
        yield (
            dict(input_ids=x[None], position_ids=at, labels=labels[None], shift_labels=labels[None], **more),
            batch.trained,
        )
        return
    size = list(batch.seqlens)
    each, group = list(zip(x.split(size), labels.split(size))), max(1, len(x) // max(size))
    for i in range(0, len(each), group):
        ids, wanted = zip(*each[i : i + group])
        known = pad_sequence([torch.ones_like(t) for t in ids], batch_first=True)
        wanted = pad_sequence(wanted, batch_first=True, padding_value=-100)
        yield (
            dict(
                input_ids=pad_sequence(ids, batch_first=True), attention_mask=known, labels=wanted,
                shift_labels=wanted,
            ),
            int((wanted >= 0).sum()),
        )


@child
def peer(model: str, way: str, recompute: bool, liger: bool, tokens: int, steps: int) -> dict:
    "Hugging Face's step: 16-bit base, float32 adapter under autocast, the same optimizer and clipping."
    import torch
    from mistral_nb.train import optim
    shape, dtype = SHAPES[model], dtype_here()
    batch = make_batch(tokens, shape.args.vocab_size, shape.mean)
    net, flash = hf_model(shape.args, dtype, shape.rank, recompute, liger)
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer, scaler = (
        optim.adamw(params, LR, DECAY), torch.amp.GradScaler(device(), enabled=dtype == torch.float16),
    )
    cast = torch.autocast(device(), dtype) if dtype != torch.float32 else nullcontext()
    rows = list(rows_of(batch, way, flash))

    def once() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for inputs, trained in rows:
            if not trained: continue
            with cast: loss = net(**inputs, use_cache=False).loss * (trained / batch.trained)
            scaler.scale(loss).backward()
            total = total + loss.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        return total.item()

    forget_peak()
    return dict(
        flash=flash, positions=sum(r["input_ids"].numel() for r, _ in rows),
        work=work(shape.args, shape.rank, batch),
    ) | measured(once, steps, False)


@child
def small(name: str, tiny: bool) -> dict:
    "The rows of a micro benchmark."
    return dict(rows=list(PARTS[name][2](tiny)))


# parts

def tried(run: Callable[[], list], blanks: int) -> list:
    "The cells that `run` gives, or why there are none."
    try: return run()
    except Exception as e:
        return [failure(e)] + ["-"] * (blanks - 1)


def noise(*size: int, grad: bool = False):
    "Random numbers in the training type."
    import torch
    return torch.randn(*size, device=device(), dtype=dtype_here()).requires_grad_(grad)


def tera(operations: float, run: Callable[[], Any]) -> float:
    "TFLOP/s of a call."
    return operations / usual(run) / 1e12


@part(
    "attention, 32 query and 8 key heads of 128",
    "documents", "way", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s ", "apart from loop",
)
def attention(tiny: bool) -> Iterator[list]:
    "Both ways, at many documents and at one; gradients against the loop's."
    import torch
    from mistral_nb.model.attention import BlockIndex, block_attention, packed_attention, varlen_attention
    tokens, heads, kv, width = (256, 4, 2, 32) if tiny else (32768, 32, 8, 128)
    for seqlens in (lengths(tokens, 60 if tiny else 1200), (tokens,)):
        q, k, v = (noise(tokens, n, width, grad=True) for n in (heads, kv, kv))
        up, blocks, work, seen = (
            noise(tokens, heads, width), BlockIndex.of(seqlens, device()),
            sum(2 * n * (n + 1) for n in seqlens) * heads * width, [],
        )
        ways = (
            dict(loop=block_attention, varlen=varlen_attention)
            if device() == "cuda"
            else dict(loop=block_attention, op=packed_attention)
        )
        for name, way in ways.items():
            def cells() -> list:
                with torch.no_grad(): ahead = usual(lambda: way(q, k, v, blocks))
                y = way(q, k, v, blocks)
                def back(): return torch.autograd.grad(y, (q, k, v), up, retain_graph=True)
                behind = usual(back)
                seen.append([y.detach(), *back()])
                apart = max(
                    ((a - b).float().norm() / b.float().norm()).item() for a, b in zip(seen[-1], seen[0])
                )
                return [
                    ahead * 1e3, work / ahead / 1e12, behind * 1e3, 2.5 * work / behind / 1e12,
                    f"{apart:.1e}",
                ]
            yield [f"{len(seqlens)} in {tokens:,}", name, *tried(cells, 5)]


@part(
    "products, TFLOP/s; fp8 with rounding of the other factor, and with that done before; nf4 with unpacking",
    "matrix", "in", "out", "tokens", "16 bit", "back", "fp8", "fp8, rounded before", "fp8 back", "nf4",
    "nf4 back",
)
def products(tiny: bool) -> Iterator[list]:
    "The matrices of a block in each storage, forward and back, and the output matrix."
    import torch
    from mistral_nb.model.quant import quantize_linear
    tokens = 64 if tiny else 8192
    sizes = (
        dict(wq=(128, 128), w1=(128, 256))
        if tiny
        else {
            "wq, wo": (4096, 4096), "wk, wv": (4096, 1024), "w1, w3": (4096, 14336), "w2": (14336, 4096),
            "w1, w3 of 12B": (5120, 14336),
        }
    )
    for name, (i, o) in sizes.items():
        x, dy, w, work = noise(tokens, i), noise(tokens, o), noise(o, i), 2 * tokens * i * o

        def cells() -> list:
            out = []
            for kind in ("none", "fp8", "nf4"):
                linear = quantize_linear(w, kind, w.dtype)
                out.append(tera(work, lambda: linear.matmul(x)))
                if kind == "fp8":
                    ready = linear.quantize_input(x)
                    out.append(tera(work, lambda: linear.matmul(x, ready)))
                out.append(tera(work, lambda: linear.matmul_transposed(dy)))
            return out
        with torch.no_grad(): row = tried(cells, 7)
        yield [name, i, o, tokens, *row]


@part(
    "loss of 32,768 positions, half of them trained, dim 5120, vocabulary 131,072, "
    "with the gradient of the input",
    "way", "ms", "extra peak GiB", "loss",
)
def loss(tiny: bool) -> Iterator[list]:
    "Ours, plain, and other packages' where they are."
    import torch
    import torch.nn.functional as F
    from mistral_nb.train.loss import loss_sum
    tokens, dim, vocab = (64, 128, 512) if tiny else (32768, 5120, 131072)
    h, w, t = (
        noise(tokens, dim, grad=True), noise(vocab, dim) * dim**-0.5,
        torch.randint(vocab, (tokens,), device=device()),
    )
    mask = torch.arange(tokens, device=device()) % 2 == 0
    labels = t.masked_fill(~mask, -100)

    def liger():
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        found = LigerFusedLinearCrossEntropyFunction.apply(h, w, labels)
        return found[0] if isinstance(found, tuple) else found

    def cut():
        from cut_cross_entropy import linear_cross_entropy
        return linear_cross_entropy(h, w, labels)
    ways = {
        "loss_sum": lambda: loss_sum(h, w, t, mask) / mask.sum(),
        "plain, trained positions": lambda: F.cross_entropy((h[mask] @ w.t()).float(), t[mask]),
        "plain, all positions": lambda: F.cross_entropy((h @ w.t()).float(), labels),
    }
    if find_spec("liger_kernel"): ways["Liger"] = liger
    if find_spec("cut_cross_entropy"): ways["cut_cross_entropy"] = cut
    for name, way in ways.items():
        def cells() -> list:
            run, before = lambda: torch.autograd.grad(way(), h), forget_peak()
            took = usual(run, 1.0)
            return [took * 1e3, peak()["peak"] - before if device() == "cuda" else "-", f"{way().item():.5f}"]
        yield [name, *tried(cells, 3)]


@part(
    "experts: one matrix of each of 8, 16 bit, rank 64, forward, gradient of the rows and of the adapter",
    "matrix", "rows", "way", "ms", "TFLOP/s", "extra peak GiB", "apart from loop",
)
def experts(tiny: bool) -> Iterator[list]:
    "One product for all experts against one after the other, rows spread evenly and unevenly."
    import torch
    from mistral_nb.model.fused import LoraSpec
    from mistral_nb.model.moe import GroupedExperts, LoopedExperts
    from mistral_nb.model.quant import Linear
    n, rank, rows, sizes = (
        (4, 8, 128, dict(w1=(128, 256)))
        if tiny
        else (8, RANK, 32768, dict(w1=(4096, 14336), w2=(14336, 4096)))
    )
    for (name, (i, o)), even in [(s, e) for s in sizes.items() for e in (True, False)]:
        weights = noise(n, o, i) * i**-0.5
        parts = [LoraSpec(Linear(i, o, torch.nn.Parameter(w, requires_grad=False)), SCALING) for w in weights]
        pairs = [t.float() for _ in range(n) for t in (noise(rank, i) * i**-0.5, noise(o, rank) * 0.01)]
        counts = [rows // n] * n if even else [rows // 2, *[rows // 2 // (n - 1)] * (n - 2)]
        ends = torch.tensor([*counts, rows - sum(counts)][:n], device=device()).cumsum(0, dtype=torch.int32)
        x, dy, seen = noise(rows, i), noise(rows, o), []
        work = rows * (4 * i * o + 6 * rank * (i + o))
        for way in ("loop", "grouped"):
            def cells() -> list:
                make = (
                    (lambda: LoopedExperts(parts, ends))
                    if way == "loop"
                    else (lambda: GroupedExperts(parts, ends, weights))
                )

                def run() -> list:
                    product = make()
                    y, low = product.forward(x, pairs)
                    up = product.up(dy, pairs)
                    return [
                        y, product.input_back(dy, up, pairs),
                        *product.adapter_back(dy, up, x, low, pairs),
                    ]
                seen.append([t[:4096].cpu() for t in run()])
                apart, before = (
                    max(
                        ((a - b).float().norm() / b.float().norm()).item() for a, b in zip(seen[-1], seen[0])
                    ),
                    forget_peak(),
                )
                took = usual(run)
                return [
                    took * 1e3, work / took / 1e12,
                    peak()["peak"] - before if device() == "cuda" else "-", f"{apart:.1e}",
                ]
            with torch.no_grad(): row = tried(cells, 4)
            yield [f"{name}, {'even' if even else 'half to one'}", rows, way, *row]


@part(
    "elementwise pieces, GB/s of what must be read and written",
    "piece", "size", "plain", "compiled", "x", "ms compiled",
)
def pieces(tiny: bool) -> Iterator[list]:
    "The functions between the products, as written and compiled."
    import torch
    from mistral_nb.model import fused
    from mistral_nb.model.attention import rope_table
    from mistral_nb.model.quant import fp8_rows
    tokens, dim, hidden, heads, width = (64, 128, 256, 4, 32) if tiny else (32768, 4096, 14336, 32, 128)
    x, dy, w, q = noise(tokens, dim), noise(tokens, dim), noise(dim), noise(tokens, heads, width)
    g, u, dh = (noise(tokens, hidden) for _ in range(3))
    r = fused.rms_norm(x, w, EPS)[1]
    table = rope_table(torch.arange(tokens, device=device()) % 1200, width, 1e6)
    calls = [
        (fused.rms_norm, (x, w, EPS)), (fused.rms_norm_recompute, (x, w, r)),
        (fused.rms_norm_backward, (dy, x, w, r)), (fused.fused_rope, (q, *table)), (fused.swiglu, (g, u)),
        (fused.swiglu_backward, (dh, g, u)), (fp8_rows, (x,)),
    ]
    def size(ts): return sum(t.numel() * t.element_size() for t in ts if isinstance(t, torch.Tensor))
    for made, args in calls:
        if not isinstance(made, fused.compiled):
            made = fused.compiled(made)  # the package runs it as written: what it could be

        def cells() -> list:
            out = made.plain(*args)
            moved = size(args) + size(out if isinstance(out, tuple) else (out,))
            plain, fast = usual(lambda: made.plain(*args)), usual(lambda: made(*args))
            return [
                moved / plain / 1e9, moved / fast / 1e9 if made.usable else "cannot be compiled",
                plain / fast, fast * 1e3,
            ]
        with torch.no_grad(): row = tried(cells, 4)
        yield [made.__name__, " x ".join(map(str, args[0].shape)), *row]


# the parent

def failure(e: BaseException) -> str:
    "What went wrong, in a few words."
    if type(e).__name__ == "OutOfMemoryError" or any(w in str(e) for w in ("out of memory", "ALLOC_FAILED")):
        return "out of memory"
    return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"[:200]


@contextmanager
def told(notes: list[str]) -> Iterator[None]:
    "Inside this block warnings that something runs slower are collected."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    notes += sorted({str(w.message) for w in found if "slower" in str(w.message)})


def run_child(name: str, given: dict) -> dict:
    "The work of a child process; what went wrong comes back as `error`."
    notes: list[str] = []
    try:
        with told(notes): out = CHILDREN[name](**given)
    except Exception as e:
        if "out of memory" != (why := failure(e)): traceback.print_exc()
        out = dict(error=why)
    return out | dict(notes=notes)


def ask(name: str, limit: float, /, **given) -> dict:
    "What a process of its own answers, within `limit` seconds."
    command = [sys.executable, os.path.abspath(__file__), "--child", name, json.dumps(given)]
    with subprocess.Popen(
        command, env=ENV | os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as run:
        try: printed, said = run.communicate(timeout=limit)
        except subprocess.TimeoutExpired: return dict(error=f"not done in {limit:.0f} s")
        finally:
            if run.returncode is None:
                os.killpg(run.pid, signal.SIGKILL)  # with the compiler's helpers, which hold the pipes open
    try: out = json.loads(printed.splitlines()[-1])
    except (IndexError, ValueError):
        out = dict(error=f"ended with {run.returncode}: {(said.strip().splitlines() or [''])[-1]}"[:200])
    if "error" in out and out["error"] not in ("out of memory", "does not fit"):
        print(said[-2000:], file=sys.stderr)
    return out


class Clock:
    "Gives each case what is left of the minutes of its mode, at most `limit` seconds, and says how it went."

    def __init__(self, minutes: float, limit: float):
        self.end, self.limit, self.began = time.monotonic() + 60 * minutes, limit, time.monotonic()

    def ask(self, what: str, name: str, /, **given) -> dict:
        "`ask`, unless no time is left"
        left = self.end - time.monotonic()
        out = (
            ask(name, min(self.limit, left), **given)
            if left > 15
            else dict(error="not run: no time left (--minutes)")
        )
        said = (
            f"{given['tokens'] / out['seconds']:,.0f} tokens/s"
            if "seconds" in out
            else out.get("error", "done")
        )
        print(f"[{time.monotonic() - self.began:4.0f} s] {what}: {said}", file=sys.stderr, flush=True)
        return out


def speeds(out: dict, tokens: int, ceiling: float) -> list:
    "Seconds of the first and a later step, tokens per second, share of the ceiling."
    if "seconds" not in out: return ["-"] * 4
    return [
        round(out["first"], 1), f"{out['seconds']:.3f}", f"{tokens / out['seconds']:,.0f}",
        f"{out['work'] / out['seconds'] / ceiling:.3f}",
    ]


def memories(out: dict, *names: str) -> list[str]:
    "GiB, as far as they are known."
    return [f"{out[n]:.2f}" if out.get(n) else "-" for n in names]


def cases(options: argparse.Namespace, models: list[str]) -> list[tuple[str, str, int]]:
    "Model, storage and tokens; every model's first number of tokens comes first."
    tokens = {m: options.tokens or SHAPES[m].tokens for m in models}
    turns = range(max(map(len, tokens.values())))
    return [
        (m, storage, tokens[m][i])
        for i in turns
        for m in models
        if i < len(tokens[m])
        for storage in options.storages or SHAPES[m].storages
    ]


def steps(options: argparse.Namespace, facts: dict, models: list[str]) -> dict[tuple, dict]:
    "Measure this package's steps and print their table."
    clock, found = Clock(options.minutes, options.limit), {}
    for case in cases(options, models):
        given = dict(zip(("model", "storage", "tokens"), case))
        found[case] = clock.ask(
            " ".join(map(str, case)), "step", **given, steps=options.steps, profile=options.profile,
            memory_gib=options.memory_gib,
        )
    head = (
        "model,storage,tokens,micro,recomputed,first s,s/step,tokens/s,MFU,"
        "peak GiB,held GiB,planned GiB,loss,predicted tokens/s,remark"
    ).split(
        ","
    )
    rows = []
    for (m, storage, t), out in found.items():
        micro, layers = (
            out.get("micro", "-"),
            f"{out['recompute']} of {SHAPES[m].args.n_layers}" if "recompute" in out else "-",
        )
        rows.append(
            [
                m, storage, t, micro, layers, *speeds(out, t, facts["ceiling"]),
                *memories(out, "peak", "held", "planned"), f"{out['loss']:.4f}" if "loss" in out else "-",
                PREDICTED.get((m, storage, t), ""), out.get("error", ""),
            ]
        )
    print(
        Table(
            head, rows,
            title="this package; the first step compiles, later cases find that done; "
            "predictions are for one H200",
            width=100,
        )
    )
    for case, out in found.items():
        if "kernels" in out:
            print(
                "\n"
                + str(
                    Table(
                        ["kernel", "ms", "share", "calls"],
                        [[k, round(ms, 2), f"{share:.1%}", n] for k, ms, share, n in out["kernels"]],
                        title="one step: " + " ".join(map(str, case)), width=110,
                    )
                )
            )
    return found


def peers(options: argparse.Namespace, facts: dict, models: list[str], ours: dict[tuple, dict]) -> list[dict]:
    "Measure Hugging Face's steps and print their table."
    if missing := [n for n in ("transformers", "peft") if not find_spec(n)]:
        return (
            print(f"\nno peers: {' and '.join(missing)} not installed (pip install transformers peft)") or []
        )
    dense = [m for m in models if not SHAPES[m].args.moe][: None if options.models else 1]
    ways = [("packed", True, False), ("packed", False, False), ("padded", True, False)] + [
        ("packed", True, True), ("packed", False, True),
    ] * bool(find_spec("liger_kernel"))
    clock, rows, found = Clock(options.minutes, options.limit), [], []
    for m, t in [
        (m, t) for m in dense for t in options.tokens or (SHAPES[m].tokens if options.tiny else (8192, 32768))
    ]:
        losses = []
        for way, recompute, liger in ways:
            name = f"{way}{', checkpointing' * recompute}{', Liger' * liger}"
            out = clock.ask(
                f"peer {m} {t} {name}", "peer", model=m, way=way, recompute=recompute, liger=liger,
                tokens=t, steps=options.steps,
            )
            us = ours.get((m, "none", t), {}).get("seconds")
            times = f"{out['seconds'] / us:.2f}" if us and "seconds" in out else "-"
            rows.append(
                [
                    m, t, name, {True: "flash", False: "sdpa"}.get(out.get("flash"), "-"),
                    out.get("positions", "-"), *speeds(out, t, facts["ceiling"]), times,
                    *memories(out, "peak", "held"), f"{out['loss']:.4f}" if "loss" in out else "-",
                    out.get("error", ""),
                ]
            )
            found.append(out)
            losses += [out["loss"]] if "loss" in out else []
        if losses and max(losses) - min(losses) > 0.02:
            rows[-1][-1] += (
                f" the first losses of {m} at {t} differ: not all peers keep packed documents apart"
            )
    head = (
        "model,tokens,way,attention,positions,first s,s/step,tokens/s,MFU,ours x faster,"
        "peak GiB,held GiB,loss,remark"
    ).split(
        ","
    )
    print(
        "\n"
        + str(
            Table(
                head, rows,
                title="transformers + peft, 16-bit base; padding is not counted as tokens; "
                "ours x faster: against storage none",
                width=100,
            )
        )
    )
    return found


def parts(options: argparse.Namespace) -> list[dict]:
    "Run the micro benchmarks and print a table of each."
    clock, found = Clock(options.minutes, options.limit), []
    for name in options.parts or PARTS:
        title, head, _ = PARTS[name]
        found.append(out := clock.ask(f"part {name}", "small", name=name, tiny=options.tiny))
        title += " (tiny sizes)" * options.tiny
        print(
            "\n"
            + (
                str(
                    Table(
                        head,
                        [[round(c, 3) if isinstance(c, float) else c for c in r] for r in out["rows"]],
                        title=title,
                    )
                )
                if "rows" in out
                else f"{title}: {out['error']}"
            ),
            flush=True,
        )
    return found


def versions() -> str:
    "The packages that matter, and Python."
    found = []
    for name in PACKAGES:
        try: found.append(f"{name} {version(name)}")
        except PackageNotFoundError: pass
    return ", ".join([f"Python {platform.python_version()}", *found])


def parse() -> argparse.Namespace:
    "The options."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=SHAPES,
        help="default: mistral, nemo, mixtral; with --tiny: tiny, tiny-moe",
    )
    parser.add_argument(
        "--storages", nargs="+", choices=(*STORAGES, "int8"), help="default: all, for mixtral fp8 and nf4"
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int,
        help="of a step; default: 8192, 16384 and 32768, for nemo the last, for mixtral the first",
    )
    parser.add_argument(
        "--steps", type=int, default=3,
        help="timed steps of each case; 0 leaves this package's and peers' steps out",
    )
    parser.add_argument("--memory-gib", type=float, help="plan with this much memory, not with what is free")
    parser.add_argument(
        "--profile", action="store_true", help="also the 25 kernels that take most of a step, for each case"
    )
    parser.add_argument(
        "--peers", action="store_true",
        help="also transformers + peft on the same shapes, and with Liger if installed",
    )
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, metavar="PART",
        help=f"also micro benchmarks, of {', '.join(PARTS)}; default: all",
    )
    parser.add_argument(
        "--minutes", type=float, default=7.5,
        help="for steps, for peers and for parts each; cases that would begin later are not run",
    )
    parser.add_argument("--limit", type=float, default=180, help="seconds of one case")
    parser.add_argument("--tiny", action="store_true", help="a quick smoke run, also without a GPU")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    "Measure and print the tables; 2 without a GPU, 1 if a case failed otherwise than by memory or time."
    options = parse()
    if options.child: return print(json.dumps(run_child(options.child[0], json.loads(options.child[1])))) or 0
    facts = ask("machine", 120, tiny=options.tiny)
    if not facts.get("cuda") and not (options.tiny and "ceiling" in facts):
        print(
            facts.get("error")
            or "no CUDA GPU is visible to PyTorch: nothing is measured; --tiny runs all code on a CPU",
            file=sys.stderr,
        )
        return 2
    print(f"{date.today()}, {facts.get('name', 'CPU, tiny shapes: the numbers mean nothing')}\n{versions()}")
    models = options.models or (["tiny", "tiny-moe"] if options.tiny else ["mistral", "nemo", "mixtral"])
    size = SHAPES[models[0]]
    print(
        f"{facts['dtype'].removeprefix('torch.')}; square products sustain {facts['ceiling'] / 1e12:,.4g} "
        f"TFLOP/s, which is MFU 1; LoRA rank {size.rank} on all matrices, documents of {size.mean:.0f} "
        f"tokens on average, half of them trained; median of {options.steps} steps\n",
        flush=True,
    )
    found = []
    if options.steps:
        ours = steps(options, facts, models)
        found += ours.values()
        if options.peers: found += peers(options, facts, models, ours)
    if options.parts is not None: found += parts(options)
    for note in sorted({n for out in found for n in out.get("notes", [])}): print(f"\nnote: {note}")
    return int(
        any(
            "error" in out
            and not out["error"].startswith(("out of memory", "does not fit", "not done", "not run"))
            for out in found
        )
    )


if __name__ == "__main__": sys.exit(main())
