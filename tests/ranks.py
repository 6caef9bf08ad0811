"""What each process of `test_ranks.py` does: every variant of a run, one after the other, and rank 0
writes down what came of it."""
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from mistral_nb.model.quant import local_rows
from mistral_nb.train import dist, faults
from mistral_nb.train.loop import Trainer

ALSO = ["norms", "embeddings", "output"]
FULL = dict(lora=dict(enable=False), optim=dict(lr=1e-3), save_adapters=False)
DIVIDED = {  # placement: shard
    "dense": {},
    "moe": {},
    "tied": {},
    "full": FULL,
    "moe_full": FULL,
    "tied_full": FULL,
    "nf4": dict(quantize="nf4"),
    "int8": dict(quantize="int8"),
    "fp8": dict(quantize="fp8"),
    "moe_nf4": dict(quantize="nf4"),
    "dora": dict(lora=dict(dora=True)),
    "pissa": dict(lora=dict(init="pissa")),
    "also": dict(lora=dict(also_train=ALSO)),
    "tied_also": dict(lora=dict(also_train=["embeddings"])),
    "tied_output": dict(lora=dict(also_train=["output"])),
    "fp8_dora": dict(quantize="fp8", lora=dict(dora=True)),
    "fp8_merged": dict(quantize="fp8", save_adapters=False),
    "recompute": dict(checkpoint=1),
    "merged": dict(save_adapters=False),
    "full_recompute": FULL | dict(checkpoint=True),
    "hf": {},
    "new": {},
    "packed8": {},
}
COPIED = {"copied": {}, "moe_copied": {}, "full_copied": FULL}
PIECES = {"pieces": 40, "moe_pieces": 40}  # most tokens at once
GOES_ON = ["dense", "full", "pissa"]
ROWS = 4  # of a step, whatever the number of ranks


def trainer(root: Path, name: str, ranks: int, **values) -> Trainer:
    "The run of a variant"
    changes = (DIVIDED | COPIED).get(name, {}) | values
    lora = dict(rank=4, **changes.pop("lora", {}))
    model = root / next((m for m in ("tied", "moe", "hf", "new", "packed8") if name.startswith(m)), "model")
    settings = dict(
        model_id_or_path=str(model),
        data=dict(instruct_data=str(root / "data/train.jsonl"), eval_instruct_data=str(root / "few.jsonl")),
        run_dir=str(root / f"{name}.{ranks}"), seq_len=128, batch_size=1, num_microbatches=ROWS // ranks,
        max_steps=3, eval_freq=3, no_eval=False, device="cpu",
        placement="replicate" if name in COPIED or ranks == 1 else "shard", lora=lora,
    )
    made = Trainer(settings | changes)
    if name in PIECES: made.run.plan = replace(made.plan, micro=PIECES[name])
    return made


def held(model: torch.nn.Module) -> int:
    "Bytes of the weights that this process holds"
    return sum(local_rows(p.detach()).nbytes for p in model.parameters())


def numbers(t: Trainer) -> dict:
    "Losses, gradient norms and evaluation of a run, and what each rank holds"
    records = list(t.steps())
    return dict(
        loss=[r.loss for r in records], norm=[r.grad_norm for r in records], eval=records[-1].eval.loss,
        held=dist.all_gather_object(held(t.model)), divided=dist.is_fsdp(t.model),
    )


def goes_on(root: Path, name: str) -> Trainer:
    "The run of one process, resumed by two that divide the model"
    copy = root / f"{name}.1to2"
    if dist.join_group().main: shutil.copytree(root / f"{name}.1", copy)
    dist.barrier()
    return trainer(root, name, 2, run_dir=str(copy), resume=True, max_steps=5)


def main(root: Path, names: list[str]) -> None:
    ranks, out = int(os.environ["WORLD_SIZE"]), {}
    if nodes := os.environ.get("NODES"): os.environ["LOCAL_WORLD_SIZE"] = str(ranks // int(nodes))
    for name in names:
        out[name] = numbers(
            trainer(
                root, name, ranks,
                **(dict(placement="hybrid", run_dir=str(root / f"{name}.hybrid")) if nodes else {}),
            )
        )
    if ranks == 2 and set(GOES_ON) <= set(names):
        out |= {f"{name} goes on": numbers(goes_on(root, name)) for name in GOES_ON}
    if dist.join_group().main:
        (root / f"{ranks}{'.hybrid' if nodes else ''}.json").write_text(json.dumps(out))
    dist.leave_group()
    faults.exit_process(0)


if __name__ == "__main__": main(Path(sys.argv[1]), sys.argv[2:])
