"The elementwise pieces compiled by Inductor: the same numbers, and one kernel for packs of any length."
import shutil

import pytest
import torch

from mistral_nb.model import fused
from mistral_nb.model.attention import rope_table
from mistral_nb.model.quant import Int8Linear, NF4Linear, fp8_rows, nf4_levels, unpack_int8, unpack_nf4

LENGTHS = (7, 40, 33, 128, 1000)


def rows(T: int, *shape: int) -> torch.Tensor: return torch.randn(T, *shape)


def packed(kind: type, T: int) -> tuple[torch.Tensor, ...]: return kind.pack(torch.randn(T, 128))


PIECES = {
    "norm": (fused.rms_norm, lambda T: (rows(T, 64), torch.randn(64), 1e-5)),
    "norm_again": (fused.rms_norm_recompute, lambda T: (rows(T, 64), torch.randn(64), rows(T, 1).abs())),
    "norm_back": (
        fused.rms_norm_backward, lambda T: (rows(T, 64), rows(T, 64), torch.randn(64), rows(T, 1).abs()),
    ),
    "turn": (fused.fused_rope, lambda T: (rows(T, 4, 16), *rope_table(torch.arange(T), 16, 1e4))),
    "gate": (fused.swiglu, lambda T: (rows(T, 64), rows(T, 64))),
    "gate_back": (fused.swiglu_backward, lambda T: (rows(T, 64), rows(T, 64), rows(T, 64))),
    "fp8_rows": (fp8_rows, lambda T: (rows(T, 64),)),
    "fp8_rows_scaled": (fp8_rows, lambda T: (rows(T, 64), torch.rand(1, 64))),
    "unpack_nf4": (
        unpack_nf4, lambda T: (*packed(NF4Linear, T), nf4_levels(torch.device("cpu"))[1], torch.float32),
    ),
    "unpack_int8": (unpack_int8, lambda T: (*packed(Int8Linear, T), torch.float32)),
}


FIRST = ("norm_back", "gate_back", "unpack_nf4")  # one of each kind; the others are slow
NAMES = [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in PIECES]


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler on a CPU")
@pytest.mark.parametrize("name", NAMES)
def test_compiled_piece(name):
    "Compiled equals plain, and after the second length nothing is compiled any more"
    torch._dynamo.reset()
    torch.manual_seed(0)
    piece, make = PIECES[name]
    counters, graphs = torch._dynamo.utils.counters["stats"], []
    with torch.no_grad():
        for T in LENGTHS:
            args = make(T)
            for mine, plain in zip(
                *(
                    out if isinstance(out, tuple) else (out,)
                    for out in (piece.run_fast(*args), piece.plain(*args))
                )
            ):
                torch.testing.assert_close(
                    mine.float(), plain.float(), rtol=1e-4 if mine.dtype.itemsize > 1 else 0.13, atol=1e-5
                )  # e4m3 may round to the neighbour
            graphs.append(counters["unique_graphs"])
    assert graphs[1:] == [graphs[1]] * (len(LENGTHS) - 1), graphs


def test_no_compiler_is_no_error(monkeypatch):
    "A piece that cannot be compiled runs as written, and says so once"
    piece = fused.compile_on_gpu(lambda x: x + 1)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)

    def fail(*args): raise torch._dynamo.exc.TorchRuntimeError("no compiler")
    monkeypatch.setattr(piece, "run_fast", fail)
    with pytest.warns(UserWarning, match="cannot be compiled and runs slower"):
        assert piece(torch.ones(2)).tolist() == [2, 2]
    assert not piece.usable and piece(torch.ones(2)).tolist() == [2, 2]
