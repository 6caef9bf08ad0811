"One step at real size on a device that is not there: counted peak against the plan's formula."
import fake
import numpy as np
import torch

fake.install()
from mistral_nb.data.pack import Batch  # noqa: E402
from mistral_nb.model import lora, quant  # noqa: E402
from mistral_nb.model.args import ModelArgs  # noqa: E402
from mistral_nb.model.transformer import Transformer  # noqa: E402
from mistral_nb.train.memory import StepShape, step_memory  # noqa: E402
from mistral_nb.train.step import batch_loss  # noqa: E402

B7 = ModelArgs(
    dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, norm_eps=1e-5,
    vocab_size=32768, rope_theta=1e6,
)
NEMO = ModelArgs(
    dim=5120, n_layers=40, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, norm_eps=1e-5,
    vocab_size=131072, rope_theta=1e6,
)
CASES = [  # name, shape, storage, rank, tokens, layers recomputed
    ("7B", B7, "none", 64, 8192, 0), ("7B", B7, "none", 64, 32768, 0), ("7B", B7, "none", 16, 32768, 32),
    ("7B", B7, "nf4", 16, 4096, 0), ("7B", B7, "fp8", 64, 8192, 0), ("7B", B7, "int8", 64, 8192, 16),
    ("Nemo", NEMO, "none", 64, 8192, 0), ("Nemo", NEMO, "nf4", 16, 16384, 40),
]


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, device="cuda", dtype=dtype)


def matrix(kind: str, rows: int, columns: int) -> quant.Linear:
    "A packed matrix of this shape"
    if kind != "nf4": return quant.quantize_linear(on_gpu(rows, columns), kind, torch.bfloat16)
    codes = on_gpu(rows, columns // 2, dtype=torch.uint8)
    scale = on_gpu(rows, columns // quant.NF4_BLOCK, dtype=torch.float32)
    return quant.NF4Linear(codes, scale, (rows, columns), torch.bfloat16)


def frozen_model(shape: ModelArgs, kind: str) -> Transformer:
    "A model on the device, its matrices stored in `kind`"
    with torch.device("meta"): model = Transformer(shape)
    for name, p in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        if kind != "none" and isinstance(model.get_submodule(parent), quant.Linear):
            holder, _, child = parent.rpartition(".")
            setattr(model.get_submodule(holder), child, matrix(kind, *p.shape))
            continue
        frozen = torch.nn.Parameter(on_gpu(*p.shape), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, frozen)
    return model


def move_adapters(model: Transformer) -> None:
    "What is not on the device yet goes there"
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is None or p.device.type == "cuda": continue
            there = on_gpu(*p.shape, dtype=p.dtype)
            module._parameters[name] = torch.nn.Parameter(there, requires_grad=p.requires_grad)


def counted(shape: ModelArgs, kind: str, rank: int, tokens: int, recompute: int) -> int:
    "The peak of a step in bytes, as it is counted"
    with fake.gpu() as ledger:
        model = frozen_model(shape, kind)
        lora.add_adapters(model, rank, 2.0, 0.0, lora.TARGETS, False)
        move_adapters(model)
        model.train()
        model.recompute = recompute
        trained = [p for p in model.parameters() if p.requires_grad]
        moments = [on_gpu(*p.shape, dtype=torch.float32) for p in trained + trained]
        ledger.mark()
        ids = np.zeros(tokens, np.int64)
        batch = Batch(ids, ids, np.ones(tokens, bool), (1024,) * (tokens // 1024))
        batch_loss(model, batch).backward()
        assert len(moments) == 2 * len(trained)
        return ledger.peak


def main() -> None:
    worst = 0.0
    for name, shape, kind, rank, tokens, recompute in CASES:
        peak = counted(shape, kind, rank, tokens, recompute)
        planned = step_memory(StepShape(shape, 2, rank, quantize=kind), tokens, recompute).total
        off = planned / peak - 1
        worst = max(worst, abs(off))
        what = f"{name:5} {kind:5} rank {rank:3} {tokens:6,} tokens, {recompute:2} recomputed"
        print(
            f"{what}: counted {peak / fake.GIB:6.2f} GiB, planned {planned / fake.GIB:6.2f}, {off:+.1%}",
            flush=True,
        )
    print(f"largest difference {worst:.1%}")


if __name__ == "__main__": main()
