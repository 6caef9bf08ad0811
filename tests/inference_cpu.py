"""mistral-inference on a CPU: the program itself, over a stand-in for what it uses of xformers."""
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch


class Mask:
    "Which keys a query sees, for sequences behind each other, as the masks of xformers say it"
    window, causal, bottom_right = None, False, False

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, kv_padding=None):
        self = cls()
        self.queries, self.padding = list(q_seqlen), kv_padding
        self.keys = self.queries if kv_seqlen is None else [int(n) for n in kv_seqlen]
        return self

    def make_local_attention(self, window):
        self.window = window
        return self

    def make_local_attention_from_bottomright(self, window):
        self.causal = self.bottom_right = True
        return self.make_local_attention(window)

    def dense(self) -> torch.Tensor:
        "True where a query (row) sees a key (column)"
        blocks = []
        for q, k in zip(self.queries, self.keys):
            row, column = torch.arange(q)[:, None], torch.arange(self.padding or k)[None]
            if self.bottom_right: row = row + k - q
            seen = (column <= row) & (column < k) if self.causal else (column < k).expand(q, -1)
            blocks.append(seen & (row - column < self.window) if self.window else seen)
        return torch.block_diag(*blocks)


class CausalMask(Mask): causal = True


class PaddedMask(Mask): causal = bottom_right = True


def attention(q, k, v, bias):
    "Attention by PyTorch; what a fresh cache holds by chance, no number maybe, is not even multiplied with 0"
    seen = bias.dense()
    used = seen.any(0)[:, None, None]
    q, k, v = (t.transpose(1, 2) for t in (q, torch.where(used, k, 0), torch.where(used, v, 0)))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2)


@contextmanager
def mistral_inference_on_cpu():
    "Inside this block the package can be imported; the test is skipped where it is not installed"
    made = {name: ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha")}
    masks = made["xformers.ops.fmha.attn_bias"] = ModuleType("xformers.ops.fmha.attn_bias")
    masks.AttentionBias = masks.BlockDiagonalMask = Mask
    masks.BlockDiagonalCausalMask = CausalMask
    masks.BlockDiagonalCausalWithOffsetPaddedKeysMask = PaddedMask
    made["xformers.ops.fmha"].memory_efficient_attention = attention
    with pytest.MonkeyPatch.context() as patch:
        for name, module in made.items(): patch.setitem(sys.modules, name, module)
        yield pytest.importorskip("mistral_inference")
    for name in [n for n in sys.modules if n.split(".")[0] == "mistral_inference"]: del sys.modules[name]
