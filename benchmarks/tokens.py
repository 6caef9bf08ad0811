"""The data path on fresh text: reading, checking, tokenizing and packing.

Beside it: a plain loop over mistral-common, and a packer of Python lists.

Every measurement is a process of its own on the same files, so that its peak memory is its own; the
tokenizer is loaded before the clock starts."""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Callable

from mistral_nb.core.display import Table
from mistral_nb.data.cache import available_cores

WAYS: dict[str, Callable[..., dict]] = {}


def way(run: Callable) -> Callable:
    "A measurement that `measure` starts by its name."
    WAYS[run.__name__] = run
    return run


def timed(run: Callable[[], Any]) -> tuple[Any, dict]:
    "The result of `run`, with its wall and CPU seconds (of helpers too, as far as they have ended)."
    wall, cpu = time.perf_counter(), time.process_time()
    out = run()
    return out, dict(seconds=time.perf_counter() - wall, cpu=time.process_time() - cpu)


@way
def plain(file: str, tokenizer: str, chunk: bool, **_) -> dict:
    "One process, mistral-common's validator, then its encoder, row after row."
    import plain as baseline
    encoder, validator = baseline.load(tokenizer)
    (n, tokens), took = timed(
        lambda: map(
            sum, zip(*((1, len(ids)) for ids, _ in baseline.samples(file, encoder, validator, chunk)))
        )
    )
    return took | dict(samples=n, tokens=tokens)


@way
def cold(file: str, tokenizer: str, chunk: bool, cache: str, workers: int) -> dict:
    "Ours, into an empty cache."
    from mistral_nb.data.cache import tokenize_file
    from mistral_nb.data.tokens import load_tokenizer
    tok = load_tokenizer(tokenizer)
    found, took = timed(lambda: tokenize_file(file, tok, chunk=chunk, cache=cache, workers=workers))
    return took | dict(samples=len(found), tokens=int(found.length.sum(dtype="int64")))


@way
def cached(**options) -> dict:
    "The same call when the cache is there: open, and copy every sample's ids and mask out of it."
    from mistral_nb.data.cache import tokenize_file
    from mistral_nb.data.tokens import load_tokenizer
    tok = load_tokenizer(options["tokenizer"])
    found, opened = timed(
        lambda: tokenize_file(options["file"], tok, chunk=options["chunk"], cache=options["cache"])
    )
    lengths = found.length.tolist()
    taken, took = timed(
        lambda: sum(
            len(tokens[at : at + n].copy()) + len(why[at : at + n].copy())
            for (tokens, why, at), n in zip(found.places(range(len(found))), lengths)
        )
    )
    return took | dict(
        samples=len(found), tokens=int(found.length.sum(dtype="int64")), opened=opened["seconds"], taken=taken
    )


@way
def packing(file: str, tokenizer: str, chunk: bool, cache: str, seq_len: int, kind: str) -> dict:
    """Positions of rows per CPU second, over three epochs: `lists`, `plan` (who shares a row) or `batches`
    (the rows as arrays)."""
    import plain as baseline
    from mistral_nb.data.batches import train_batches
    from mistral_nb.data.sources import Source, TokenizedSource
    from mistral_nb.data.cache import tokenize_file
    from mistral_nb.data.tokens import load_tokenizer
    found = tokenize_file(file, load_tokenizer(tokenizer), chunk=chunk, cache=cache)
    if kind == "lists":
        samples = [
            (s.tokens.tolist(), s.mask.tolist()) for s in map(found.sample, range(min(len(found), 4000)))
        ]
        rows, took = timed(lambda: sum(1 for _ in baseline.python_list_packer(samples, seq_len)))
        return took | dict(positions=rows * seq_len, fill=1.0)
    batches = train_batches([TokenizedSource(Source(Path(file)), [found])], seq_len)
    wanted = int(3 * found.length.sum(dtype="int64") / seq_len)
    rows, took = timed(
        lambda: sum(
            1
            for _ in (
                islice(batches, wanted) if kind == "batches" else (batches.plan() for _ in range(wanted))
            )
        )
    )
    return took | dict(positions=rows * seq_len, fill=batches.counts.fill)


def memory() -> dict[str, float]:
    "Peak of this process in MiB: of all pages, and now of its own ones, without those of mapped files."
    own = (
        [
            line.split()
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("RssAnon")
        ]
        if Path("/proc/self/status").exists()
        else [["", 0]]
    )
    return dict(
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, own=int(own[0][1]) / 1024,
        helpers=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    )


def measure(name: str, **options) -> dict:
    "Run a way in a process of its own."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    out = subprocess.run(
        [sys.executable, __file__, "--way", name, json.dumps(options)], capture_output=True, text=True,
        env=env,
    )
    if out.returncode: raise RuntimeError(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


def speed(folder: Path, files: dict[str, tuple[Path, int, bool]]) -> Table:
    "Plain loop, ours cold with 1 to all cores, ours from the cache."
    rows = []
    for what, (file, n, chunk) in files.items():
        for tokenizer in ("v3", "v3-tekken"):
            common, cases = (
                dict(file=str(file), tokenizer=tokenizer, chunk=chunk),
                {"plain loop": measure("plain", file=str(file), tokenizer=tokenizer, chunk=chunk)},
            )
            for workers in sorted({1, 2, available_cores(), available_cores() // 2} - {0}):
                cases[f"ours, cold, {workers} process{'es' * (workers > 1)}"] = measure(
                    "cold", **common, cache=str(folder / f"cache{workers}"), workers=workers
                )
            cases["ours, from cache"] = measure("cached", **common, cache=str(folder / "cache1"))
            base = cases["plain loop"]
            for name, r in cases.items():
                assert (r["samples"], r["tokens"]) == (base["samples"], base["tokens"]), (name, r, base)
                rows.append(
                    [
                        f"{what}, {tokenizer}", name, round(r["seconds"], 2), int(n / r["seconds"]),
                        int(r["tokens"] / r["seconds"]), round(base["seconds"] / r["seconds"], 1),
                        round(r["peak"]), f"{1000 * r['opened']:.0f} ms" if "opened" in r else "",
                    ]
                )
    return Table(["file", "way", "seconds", "rows/s", "tokens/s", "x plain", "peak MiB", "to open"], rows)


def pack(folder: Path, file: Path, n: int, chunk: bool) -> Table:
    "Packing per CPU second."
    rows = []
    for seq_len in (8192, 32768):
        found = {
            kind: measure(
                "packing", file=str(file), tokenizer="v3", chunk=chunk, cache=str(folder / "cache1"),
                seq_len=seq_len, kind=kind,
            )
            for kind in ("lists", "plan", "batches")
        }
        rate = {kind: r["positions"] / r["cpu"] for kind, r in found.items()}
        names = dict(
            lists="packer of Python lists, rows as arrays", plan="best_fit, who shares a row",
            batches="best_fit, rows as arrays",
        )
        rows += [
            [seq_len, names[k], int(rate[k]), round(rate[k] / rate["lists"], 1), f"{found[k]['fill']:.2%}"]
            for k in found
        ]
    return Table(["seq_len", "way", "positions/CPU s", "x lists", "fill"], rows)


def sizes(folder: Path, counts: list[int]) -> Table:
    "Peak memory against the number of rows, short chats."
    import corpus
    rows = []
    for n in counts:
        file = folder / f"short{n}.jsonl"
        corpus.write_lines(file, corpus.short_chat, n, 3)
        made = measure(
            "cold", file=str(file), tokenizer="v3-tekken", chunk=False, cache=str(folder / "cache"),
            workers=available_cores(),
        )
        read = measure(
            "cached", file=str(file), tokenizer="v3-tekken", chunk=False, cache=str(folder / "cache")
        )
        rows.append(
            [
                n, round(file.stat().st_size / 1e6), made["tokens"], round(made["seconds"], 1),
                round(made["peak"]), round(read["opened"], 2), round(read["own"]),
            ]
        )
        file.unlink()
    return Table(
        ["rows", "MB of JSON", "tokens", "s cold", "peak MiB cold", "s to open", "own MiB when read"], rows
    )


def main() -> None:
    "Measure and print the tables."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=20_000, help="rows of the file of chats")
    parser.add_argument("--calls", type=int, default=2_000, help="rows of the file of tool conversations")
    parser.add_argument(
        "--rows", type=int, nargs="*", default=[100_000, 1_000_000], help="row counts of the memory table"
    )
    parser.add_argument("--tiny", action="store_true", help="a quick smoke run")
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        import pandas  # noqa: F401  pyarrow imports it at its first array; imports are not timed
        name, given = options.way
        print(json.dumps(WAYS[name](**json.loads(given)) | memory()))
        return
    import corpus
    chats, calls, rows = (
        (200, 40, [500, 2000]) if options.tiny else (options.chats, options.calls, options.rows)
    )
    print(
        f"mistral-common {version('mistral-common')}, {available_cores()} cores, {chats:,} chats, "
        f"{calls:,} tool conversations with all their beginnings\n"
    )
    with tempfile.TemporaryDirectory() as d:
        folder, files = Path(d), {}
        for what, make, n, chunk in (
            ("chats", corpus.chat, chats, False), ("tools", corpus.tool_chat, calls, True),
        ):
            files[what] = (folder / f"{what}.jsonl", n, chunk)
            corpus.write_lines(files[what][0], make, n, 1)
        print(f"{speed(folder, files)}\n\n{pack(folder, *files['chats'])}\n\n{sizes(folder, rows)}")


if __name__ == "__main__": main()
