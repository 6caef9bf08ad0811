"""Exports for vLLM, each in a folder, with the answers of the model in memory in `case.json` beside it."""
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import test_export as small
from mistral_nb.export.certificate import chat_ids, CHATS, live_logits, read_logits
from mistral_nb.export.exports import export_tuned
from mistral_nb.export.rounding import PackedReader
from mistral_nb.export.tuned import Tuned
from mistral_nb.model.weights import init_model

LIKE_REAL = dict(dim=256, head_dim=64, hidden_dim=512)  # what vLLM's kernels take at least
CASES = [
    *(("hf", shape, "f32") for shape in small.SHAPES),
    *(("mistral", shape, "f32") for shape in small.SHAPES if shape != "Mixtral"),
    *(("peft", shape, None) for shape in ("dense v3", "dense tekken", "tied", "window")),
    *((format, "dense v3", None) for format in ("gptq", "awq", "fp8")), ("gptq", "dense v3", "w4a16"),
    # of mixtures only whole ones: vLLM has no product for experts with an adapter, or packed, on a CPU
]


def written(place: Path, tuned: Tuned, format: str, kind: str | None) -> dict:
    "The export, and how vLLM is to load it"
    rows = dict(rows=small.chats(20)) if format in ("gptq", "awq") else {}
    if format == "peft":
        base = Tuned(init_model(tuned.args, seed=3), tuned.tokenizer, dtype=torch.float32)
        tuned.base = export_tuned(base, "hf", place / "base", "f32").folder
    made = export_tuned(tuned, format, place / "out", kind, **rows)
    return {"folder": str(made.folder), "base": str(tuned.base or ""), "line": dict(made.lines)["vLLM"]}


def packed_logits(folder: Path, tuned: Tuned, docs: list[list[int]]) -> list[torch.Tensor]:
    "What the packed weights say, unpacked by this package"
    reader = PackedReader(folder, tuned.args)
    try: return read_logits(reader, tuned.args, docs)
    finally: reader.close()


def greedy(logits: Callable, ids: list[list[int]], n: int = 6) -> list[list[int]]:
    "The likeliest next tokens"
    out = [list(doc) for doc in ids]
    for _ in range(n):
        for doc, found in zip(out, logits(out)): doc.append(int(found[-1].argmax()))
    return [doc[len(q):] for q, doc in zip(ids, out)]


def main(out: Path) -> None:
    "Write all cases"
    small.SHAPES = {name: (replace(args, **LIKE_REAL), v) for name, (args, v) in small.SHAPES.items()}
    for format, shape, kind in CASES:
        tuned = small.tuned_model(shape)
        place = out / f"{format} {kind or ''} {shape}".replace("  ", " ").replace(" ", "-")
        place.mkdir(parents=True)
        said = written(place, tuned, format, kind)
        ids = [chat_ids(tuned.tokenizer, messages) for messages in CHATS]
        logits = partial(packed_logits, Path(said["folder"]), tuned)
        if format in ("hf", "mistral", "peft"): logits = partial(live_logits, tuned.model)
        lasts = [found.log_softmax(-1) for found in logits(ids)]
        likely = [[row[i].item() for row, i in zip(found, doc[1:])] for found, doc in zip(lasts, ids)]
        answers = greedy(logits, ids)
        said |= {"format": format, "chats": CHATS, "ids": ids, "likely": likely, "answers": answers}
        (place / "case.json").write_text(json.dumps(said))
        print(place.name, flush=True)


if __name__ == "__main__": main(Path(sys.argv[1]))
