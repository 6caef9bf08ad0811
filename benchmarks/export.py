"""Exports of a 7B shape with an adapter: seconds, bytes, and memory above the model, for each format.

Weights are random. Seconds are measured at two depths, since all that an export does is in proportion to the
layers but for the tables; what 32 layers need is the line through both. `--layers 32` measures it."""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Event, Thread

sys.path.insert(0, str(Path(__file__).parent))
from load import make, own_memory

CASES = {
    "peft": ("peft", None), "hf": ("hf", None), "mistral": ("mistral", None), "gguf f16": ("gguf", "f16"),
    "gguf q8_0": ("gguf", "q8_0"), "gguf q4_k": ("gguf", "q4_k"), "gguf lora": ("gguf", "lora"),
    "fp8": ("fp8", None), "gptq": ("gptq", None), "awq": ("awq", None),
}
ROWS = 10  # to calibrate with; more rows cost as forward passes do


def make_tuned(folder: Path, layers: int, tiny: bool) -> None:
    "A base with the v3 tokenizer, and an adapter of rank 16 on all its matrices"
    import torch
    from mistral_nb.data.tokens import load_tokenizer
    from mistral_nb.model.args import load_model_args
    from mistral_nb.model.lora import add_adapters
    from mistral_nb.model.transformer import Transformer
    from safetensors.torch import save_file
    make(folder / "base", layers, tiny)
    shutil.copy(load_tokenizer("v3").base.file_path, folder / "base/tokenizer.model.v3")
    with torch.device("meta"): model = add_adapters(Transformer(load_model_args(folder / "base")), 16, 2.0)
    parts = {n: p.shape for n, p in model.named_parameters() if ".lora_" in n}
    state = {n: torch.randn(shape) * 0.01 for n, shape in parts.items()}
    (folder / "adapter").mkdir()
    note = {"lora_scaling": "2.0", "file_scaling": "2.0", "lora_rank": "16"}
    save_file(state, folder / "adapter/lora.safetensors", note)


def one(folder: Path, name: str) -> dict:
    "Seconds to load and to export, bytes written, and the process's own memory above its start"
    from mistral_nb.export.exports import export_tuned
    from mistral_nb.export.tuned import open_tuned
    format, kind = CASES[name]
    talk = [("user", "Say {0} again and again, and then stop."), ("assistant", "{0}! " * 20)]
    rows = [{"messages": [{"role": r, "content": t.format(i)} for r, t in talk]} for i in range(ROWS)]
    options = dict(rows=rows) if format in ("gptq", "awq") else {}
    began = time.perf_counter()
    tuned = open_tuned(folder / "adapter", folder / "base")
    loaded, start, peak, done = time.perf_counter(), own_memory(), [0], Event()

    def watch() -> None:
        while not done.wait(0.02): peak[0] = max(peak[0], own_memory())
    thread = Thread(target=watch)
    thread.start()
    made = export_tuned(tuned, format, folder / "out", kind, **options)
    seconds = time.perf_counter() - loaded
    done.set()
    thread.join()
    size = sum(f.stat().st_size for f in made.folder.iterdir())
    shutil.rmtree(made.folder)
    return dict(load=loaded - began, seconds=seconds, peak=peak[0] - start, size=size)


def measure(names: list[str], layers: int, tiny: bool, place: str | None) -> dict[str, dict]:
    "Each export in a process of its own"
    out = {}
    with tempfile.TemporaryDirectory(dir=place) as d:
        make_tuned(Path(d), layers, tiny)
        for name in names:
            command = [sys.executable, __file__, "--one", d, name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            out[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{layers} layers, {name}: {out[name]['seconds']:.1f} s", file=sys.stderr, flush=True)
    return out


def main() -> None:
    "Measure and print the table"
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3], help="depths to measure")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--folder", default=None, help="where to write; a temporary folder by default")
    parser.add_argument("--tiny", action="store_true", help="a quick smoke run")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one: return print(json.dumps(one(Path(options.one[0]), options.one[1])))
    from mistral_nb.core.display import Table
    depths = sorted(set(options.layers))
    found = [measure(options.cases, n, options.tiny, options.folder) for n in depths]

    def at_32(name: str, key: str) -> float:
        first, last = found[0][name][key], found[-1][name][key]
        if len(depths) == 1: return last
        return last + (32 - depths[-1]) * (last - first) / (depths[-1] - depths[0])

    rows = [
        [name, *(round(f[name]["seconds"], 1) for f in found), round(at_32(name, "seconds")),
         round(at_32(name, "size") / 1e9, 2), round(found[-1][name]["peak"] / 2**30, 2)]
        for name in options.cases
    ]
    deep = [f"s, {n} layers" for n in depths]
    of_32 = "32 layers" if len(depths) > 1 else "the same"
    head = ["export", *deep, f"s, {of_32}", f"GB, {of_32}", "GiB above the model"]
    print(Table(head, rows, title="writing, reading back and certifying, on a CPU", width=100))


if __name__ == "__main__": main()
