"""Loading a model from disk: seconds beside a bare read of the same files, and the memory of the process,
for each storage of the matrices."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Event, Thread

KINDS = ("none", "int8", "fp8", "nf4")
SHAPE = dict(
    dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, norm_eps=1e-5,
    vocab_size=32768, rope_theta=1e6,
)
TINY = dict(dim=128, head_dim=32, hidden_dim=256, n_heads=4, n_kv_heads=2)


def make(folder: Path, layers: int, tiny: bool) -> int:
    "Random bf16 weights in one file for each layer, written one at a time; returns their bytes."
    import torch
    from safetensors.torch import save_file
    from mistral_nb.model.args import ModelArgs, to_params
    from mistral_nb.model.transformer import Transformer
    args = ModelArgs(**(SHAPE | dict(n_layers=layers) | (TINY if tiny else {})))
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(to_params(args)))
    with torch.device("meta"): shapes = {n: p.shape for n, p in Transformer(args).named_parameters()}
    pool = (
        torch.randn(1 << 24).mul_(0.02).bfloat16()
    )  # one stretch of noise, repeated: only its size matters here
    def group(name): return name.split(".")[1] if name.startswith("layers.") else "rest"
    for i, key in enumerate(sorted({group(n) for n in shapes})):
        def fill(s): return pool.repeat(-(-s.numel() // len(pool)))[: s.numel()].view(s)
        save_file(
            {n: fill(s) for n, s in shapes.items() if group(n) == key},
            folder / f"consolidated.{i:02}.safetensors",
        )
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    "Drop the files from the system's cache, where it lets us."
    for file in folder.glob("*.safetensors"):
        with open(file, "rb+") as f:
            os.fsync(f.fileno())
            if hasattr(os, "posix_fadvise"): os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bare(folder: Path) -> float:
    "Seconds to read the files and do nothing with them."
    began, buffer = time.perf_counter(), bytearray(1 << 24)
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as f:
            while f.readinto(buffer): pass
    return time.perf_counter() - began


def own_memory() -> int:
    "Bytes of this process that are not a mapped file's."
    return sum(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    )


def load(folder: Path, kind: str, device: str) -> dict:
    "Seconds, peak of the process's own memory above its start, and bytes of the model."
    import torch
    from mistral_nb.model.weights import load_model
    if device != "cpu": torch.zeros(1, device=device)
    start, peak, done = own_memory(), [0], Event()

    def watch() -> None:
        while not done.wait(0.01): peak[0] = max(peak[0], own_memory())
    thread = Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    model = load_model(folder, device=device, quantize=kind)
    if device == "cpu" and kind == "none":
        sum(
            p.view(torch.uint8).flatten()[::4096].sum() for p in model.parameters()
        )  # touch every page of the file
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    return dict(
        seconds=seconds, peak=peak[0] - start,
        model=sum(p.numel() * p.element_size() for p in model.parameters()),
    )


def main() -> None:
    "Measure and print the table."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32, help="of a 7B shape; 32 need 15 GB on disk")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--folder", default=None, help="where to make the model; a temporary folder by default"
    )
    parser.add_argument("--tiny", action="store_true", help="a quick smoke run")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one: return print(json.dumps(load(Path(options.one[0]), options.one[1], options.device)))
    from mistral_nb.core.display import Table
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name) / "model"
        size = make(folder, 2 if options.tiny else options.layers, options.tiny)
        forget(folder)
        rows = [["bare read", round(bare(folder), 1), "", "", ""]]
        rows[0][2] = round(size / 1e9 / max(rows[0][1], 1e-3), 2)
        for kind in options.kinds:
            forget(folder)
            command = [sys.executable, __file__, "--one", str(folder), kind, "--device", options.device]
            r = json.loads(
                subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            )
            rows.append(
                [
                    f"{kind} on {options.device}", round(r["seconds"], 1),
                    round(size / 1e9 / r["seconds"], 2), round(r["model"] / 2**30, 2),
                    round(r["peak"] / 2**30, 2),
                ]
            )
        print(
            Table(
                ["way", "seconds", "GB/s of the file", "model GiB", "own peak GiB"], rows,
                title=f"{size / 1e9:.1f} GB of bf16 weights",
            )
        )


if __name__ == "__main__": main()
