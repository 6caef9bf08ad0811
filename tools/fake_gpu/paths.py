"Two steps of every variant on a device that is not there, through the public interface."
import json
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any, Callable

import fake
import torch
from safetensors.torch import load_file, save_file

fake.install(tuple(map(int, os.environ.get("CAP", "9.0").split("."))))
from mistral_nb import Trainer, load_model  # noqa: E402
from mistral_nb.demo import make_data, make_model  # noqa: E402
from mistral_nb.infer.generate import stream_tokens  # noqa: E402
from mistral_nb.model.args import ModelArgs, MoeArgs, QueryScaling, YarnArgs  # noqa: E402
from mistral_nb.model.weights import init_model, save_model  # noqa: E402

SHAPE = dict(
    dim=256, n_layers=2, head_dim=64, hidden_dim=512, n_heads=4, n_kv_heads=2, norm_eps=1e-5,
    vocab_size=32768, rope_theta=1e6,
)
DENSE = {  # name: changes of the settings
    "plain": {}, "dropout": dict(lora=dict(dropout=0.1)),
    "nf4": dict(quantize="nf4"), "int8": dict(quantize="int8"), "fp8": dict(quantize="fp8"),
    "float16": dict(dtype="float16"), "float32": dict(dtype="float32"),
    "dora": dict(lora=dict(dora=True)), "rslora": dict(lora=dict(rslora=True)),
    "pissa": dict(lora=dict(init="pissa")),
    "also": dict(lora=dict(also_train=["norms", "embeddings", "output"])),
    "full": dict(lora=dict(enable=False), save_adapters=False),
    "recomputed": dict(checkpoint=True), "pieces": dict(memory_gib=0.2),
    "mistral packing": dict(packing="mistral"), "microbatches": dict(num_microbatches=2, batch_size=2),
}
MOE = {
    "moe": {}, "moe nf4": dict(quantize="nf4"), "moe fp8": dict(quantize="fp8"),
    "moe float16": dict(dtype="float16"),
}
PROMPTS = [[1, 5, 6], [1, 7, 8, 9, 10]]


def folder(home: Path, name: str, **changes: Any) -> str:
    "A model folder of a small shape"
    args = ModelArgs(**SHAPE | changes)
    save_model(init_model(args, dtype=torch.bfloat16).state_dict(), args, home / name)
    shutil.copy(next((home / "base").glob("tokenizer*")), home / name)
    return str(home / name)


def pack_fp8(folder: Path) -> None:
    "Pack a folder's matrices as fp8 files are published"
    state = load_file(folder / "consolidated.safetensors")
    for name in [n for n in state if ".attention.w" in n or ".feed_forward.w" in n]:
        scale = state[name].abs().max().float() / 448
        packed = (state[name] / scale).to(torch.float8_e4m3fn)
        state |= {name: packed, f"{name.removesuffix('weight')}qscale_weight": scale}
    save_file(state, folder / "consolidated.safetensors")
    params = json.loads((folder / "params.json").read_text())
    packing = dict(quantization=dict(qformat_weight="fp8_e4m3"))
    (folder / "params.json").write_text(json.dumps(params | packing))


def works(label: str, work: Callable[[], Any]) -> bool:
    "Whether something runs; says what it gave, or where it failed"
    try:
        with fake.gpu(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print("ok  ", label, work(), flush=True)
    except Exception as e:
        frames = [f for f in traceback.extract_tb(e.__traceback__) if "mistral_nb" in f.filename]
        place = [f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in frames][-1:]
        print("FAIL", label, type(e).__name__, str(e)[:300].replace("\n", " "), place, flush=True)
        return False
    return True


def trains(home: Path, label: str, model: str, changes: dict) -> bool:
    "Two steps and an evaluation"
    data = {
        f"{kind}instruct_data": str(home / f"data/{name}.jsonl")
        for kind, name in (("", "train"), ("eval_", "eval"))
    }
    settings = dict(
        model_id_or_path=model, run_dir=str(home / label.replace(" ", "_")), data=data, seq_len=256,
        max_steps=2, no_eval=False, lora=dict(rank=8), optim=dict(lr=1e-3), device="cuda", no_ckpt=True,
    )
    for key, value in changes.items():
        settings[key] = settings[key] | value if isinstance(value, dict) else value

    def work() -> torch.dtype:
        trainer = Trainer(settings)
        for _ in range(2): trainer.one_step()
        trainer.evaluate()
        return trainer.model.dtype
    return works(label, work)


def generates(label: str, model: str, **how: Any) -> bool:
    "A few tokens for two prompts"
    def work() -> int:
        return len(list(stream_tokens(load_model(model, None, "cuda", **how), PROMPTS, max_tokens=4)))
    return works(f"generate {label}", work)


def main() -> int:
    home = Path(tempfile.mkdtemp())
    make_model(home / "base")
    make_data(home / "data")
    dense, window = folder(home, "dense"), folder(home, "window", sliding_window=16)
    layered = folder(
        home, "layered", sliding_window=(None, 16), yarn=YarnArgs(4.0, 32),
        llama_4_scaling=QueryScaling(32, 0.2),
    )
    moe = folder(home, "moe", moe=MoeArgs(4, 2))
    packed = folder(home, "packed")
    pack_fp8(Path(packed))
    done = [trains(home, label, dense, changes) for label, changes in DENSE.items()]
    done.append(trains(home, "window", window, {}))
    for kind in ("none", "nf4"): done.append(trains(home, f"layers {kind}", layered, dict(quantize=kind)))
    for kind in ("none", "fp8", "nf4"):
        done.append(trains(home, f"fp8 files {kind}", packed, dict(quantize=kind)))
    done += [trains(home, label, moe, changes) for label, changes in MOE.items()]
    done += [generates("plain", dense), generates("moe", moe), generates("window", window)]
    done += [generates("layers with windows", layered), generates("fp8 files", packed)]
    done += [generates(kind, dense, quantize=kind) for kind in ("nf4", "fp8")]
    failed = done.count(False)
    print(f"{failed} failed")
    return int(bool(failed))


if __name__ == "__main__": sys.exit(main())
