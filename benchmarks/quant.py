"""Loss curves of packed bases: the demo model trained on one file with its matrices in 32, 8 and 4 bits,
everything else equal."""
import argparse
import json
import random
import tempfile
from pathlib import Path

KINDS = ("none", "int8", "fp8", "nf4")
WANTED = 0.02
NAMES = (
    "Ada Bo Cy Dot Eve Flo Gus Hal Ida Joe Kim Lou Max Ned Ola Pam Quinn Ray Sue Tom Una Vic Wes Xan Yul Zoe"
).split()
PLACES = (
    "Bergen Cork Delft Evora Faro Genoa Hobart Izmir Jaffa Kotor "
    "Lagos Malmo Nice Oslo Porto Quito Riga Split Turin Vaasa"
).split()
GOODS = (
    "apples bread cloth dates eggs figs grain honey iron jam "
    "kelp lamps maps nails oats pears quilts rope salt tea"
).split()


def rows(n: int, seed: int) -> list[dict]:
    """Questions on shipments whose answers follow from the question in part, and are random in part: the
    loss settles above zero."""
    rng, out = random.Random(seed), []
    for _ in range(n):
        who, place, goods, count = (
            rng.choice(NAMES), rng.choice(PLACES), rng.choice(GOODS), rng.randint(2, 99),
        )
        asked = rng.choice(
            (
                f"What did {who} send to {place}?", f"Tell me about the shipment of {who} to {place}.",
                f"{who}, {place}: what was it?",
            )
        )
        told = f"{who} sent {count} crates of {goods} to {place}, and {rng.choice(NAMES)} signed for them."
        out.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]})
    return out


def curve(folder: Path, kind: str, steps: int) -> list[float]:
    "Eval losses of a run, ten of them."
    from mistral_nb.train.loop import Trainer
    trainer = Trainer(
        model_id_or_path=str(folder / "model"),
        run_dir=str(folder / kind),
        seq_len=512,
        max_steps=steps,
        quantize=kind,
        no_ckpt=True,
        no_eval=False,
        eval_freq=max(1, steps // 10),
        data=dict(
            instruct_data=str(folder / "train.jsonl"), eval_instruct_data=str(folder / "eval.jsonl"),
            cache="none",
        ),
        lora=dict(rank=16),
        optim=dict(lr=4e-3),
        device="cpu",
    )
    return [r.eval.loss for r in trainer.steps() if r.eval]


def main() -> int:
    "Measure, print, and return 1 if a final loss is more than 2 % off."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tiny", action="store_true", help="a quick smoke run; its losses are not judged")
    options = parser.parse_args()
    from mistral_nb.core.display import Table
    from mistral_nb.demo import make_model
    steps, sizes = (4, (50, 4)) if options.tiny else (options.steps, (2000, 100))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        for file, n, seed in zip(("train.jsonl", "eval.jsonl"), sizes, (1, 2)):
            (folder / file).write_text("".join(json.dumps(r) + "\n" for r in rows(n, seed)))
        curves = {kind: curve(folder, kind, steps) for kind in KINDS}
    apart = {kind: c[-1] / curves["none"][-1] - 1 for kind, c in curves.items()}
    print(
        Table(
            [
                "base",
                *(f"step {steps * (i + 1) // len(curves['none'])}" for i in range(len(curves["none"]))),
                "last, against none",
            ],
            [[kind, *(round(x, 3) for x in c), f"{apart[kind]:+.2%}"] for kind, c in curves.items()],
        )
    )
    return int(not options.tiny and any(abs(x) > WANTED for x in apart.values()))


if __name__ == "__main__": raise SystemExit(main())
