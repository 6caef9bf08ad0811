"""Several processes on this machine: memory of each while it loads a divided model, bytes that a step
sends beside the theory, and how long training waits for a checkpoint."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Event, Thread

from load import forget, make

from mistral_nb.core.display import Table

TRAIN = dict(
    dim=512, n_layers=4, head_dim=64, hidden_dim=1408, n_heads=8, n_kv_heads=2, norm_eps=1e-5,
    vocab_size=32768,
)

WORK = 300  # MiB in which rows are read and packed, whatever the number of processes


def memory() -> tuple[int, int]:
    "Bytes of this process: its own, and those of mapped files that it has touched."
    lines = Path("/proc/self/status").read_text().splitlines()
    return tuple(
        sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))
        for kind in ("RssAnon", "RssFile")
    )


def load(folder: Path, kind: str) -> dict:
    "Peak of this rank's memory above its start while it loads its rows, and what it holds then."
    from mistral_nb.model.quant import local_rows
    from mistral_nb.model.weights import load_model
    from mistral_nb.train import dist
    import torch.distributed.fsdp  # noqa: F401  before memory is counted
    ranks = dist.join_group()
    place = dist.fsdp_placer("cpu", lambda name, p: p.dim() < 2)
    start, peak, done = memory(), [0, 0], Event()

    def watch() -> None:
        while not done.wait(0.005): peak[:] = map(max, peak, memory())
    thread = Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    model = load_model(folder, quantize=kind, place=place)
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    out = dist.all_gather_object(
        dict(
            held=sum(local_rows(p.detach()).nbytes for p in model.parameters()), own=peak[0] - start[0],
            mapped=peak[1] - start[1], seconds=seconds,
        )
    )
    dist.leave_group()
    return out if ranks.main else []


def counting(found: dict[str, int]):
    """A context in which the bytes of every collective of this process are added up by kind, as long as
    all rows of it."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    where = {
        "_allgather_base_": 0, "_reduce_scatter_base_": 1, "allreduce_": 0,
    }  # which argument has all rows

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.__name__.partition(".")[0]
            if func.namespace == "c10d" and name in where:
                some = args[where[name]]
                found[name] = found.get(name, 0) + sum(
                    t.nbytes
                    for t in (some if isinstance(some, (list, tuple)) else [some])
                    if isinstance(t, torch.Tensor)
                )
            return func(*args, **(kwargs or {}))
    return Counting()


def theory(job, pieces: int) -> dict[str, int]:
    """Bytes of one step: the adapter's gradients once; for each piece of a divided model every layer and
    both tables, forward and backward (PyTorch fetches the embedding for the backward pass too, which
    does not need it)."""
    from mistral_nb.model.args import linear_shapes
    from mistral_nb.train.memory import n_trained
    a = job.model
    rows = sum(n * i * o for n, i, o in linear_shapes(a).values()) + 2 * a.vocab_size * a.dim
    return {"allreduce_": 4 * n_trained(job)} | (
        {"_allgather_base_": pieces * 2 * rows * job.size} if job.shares > 1 else {}
    )


def steps(folder: Path, placement: str, rank: int) -> dict:
    "Bytes of a step by kind, and how long training waits for a checkpoint that is written meanwhile."
    from mistral_nb.demo import demo_settings
    from mistral_nb.train import dist, loop
    from mistral_nb.train.loop import Trainer
    settings = demo_settings(
        folder, folder / f"{placement}.{os.environ['WORLD_SIZE']}", max_steps=100, seq_len=512,
        device="cpu", placement=placement, lora=dict(rank=rank), no_eval=True,
    )
    t = Trainer(settings)
    counted: dict[str, int] = {}
    with counting(counted): t.one_step()
    t.one_step()
    waits, whole = [], []
    for _ in range(3):
        began = time.perf_counter()
        loop.begin_save(t.run)
        waits.append(time.perf_counter() - began)
        t.run.writer.join()
        whole.append(time.perf_counter() - began)
        t.one_step()
    files = (
        sum(f.stat().st_size for f in t.run.writer.newest.rglob("*") if f.is_file())
        if t.run.writer.newest
        else 0
    )
    out = dict(counted=counted, theory=theory(t.plan.job, 1), waits=min(waits), whole=min(whole), bytes=files)
    dist.leave_group()
    return out if t.ranks.main else {}


def launched(n: int, *what: str) -> dict | list:
    "What rank 0 of `n` processes found"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", __file__,
        "--rank", *what,
    ]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
    )
    if done.returncode: raise SystemExit(f"{what} failed on {n} processes")
    return json.loads(done.stdout.rpartition("found ")[2])


def mib(n: float) -> float: return round(n / 2**20, 1)


def measure_loading(options: argparse.Namespace, folder: Path) -> bool:
    "Print what loading takes on each number of processes; whether memory falls as theory says."
    ok, rows = True, []
    size = make(folder, 2 if options.tiny else options.layers, options.tiny)
    for kind in options.kinds:
        for n in options.processes:
            forget(folder)
            ranks = launched(n, "load", str(folder), kind)
            worst = {k: max(r[k] for r in ranks) for k in ranks[0]}
            sizes = (mib(worst[k]) for k in ("held", "own", "mapped"))
            rows.append([kind, n, *sizes, round(worst["seconds"], 1)])
        first, last = rows[-len(options.processes)], rows[-1]  # kind, processes, held, own
        ok &= options.tiny or last[2] < 1.01 * first[2] * first[1] / last[1] and last[3] < last[2] + WORK
    head = ["matrices", "processes", "held MiB", "own peak MiB", "of the file MiB", "seconds"]
    print(Table(head, rows, title=f"loading {size / 1e9:.2f} GB of bf16 weights, the largest of all ranks"))
    return ok


def measure_steps(options: argparse.Namespace, work: Path) -> bool:
    "Print the bytes that processes exchange in a step; whether they are those of theory."
    ok, rows = True, []
    prepare(work, options.tiny)
    for n in options.processes[1:]:
        for placement in ("replicate", "shard"):
            r = launched(n, "steps", str(work), placement, "8" if options.tiny else str(options.adapter))
            for kind, wanted in r["theory"].items():
                counted = r["counted"].get(kind, 0)
                ratio = counted / wanted
                rows.append([f"{placement} on {n}", kind, mib(counted), mib(wanted), round(ratio, 4)])
                ok &= 0.999 < ratio < 1.001
    head = ["placement", "collective", "MiB in a step", "theory", "ratio"]
    print("\n", Table(head, rows, title="bytes that are put together or added up in a step"), sep="")
    print(
        f"\na checkpoint of {r['bytes'] / 2**20:,.0f} MiB: training waits {r['waits']:.2f} s, "
        f"it is on the disk after {r['whole']:.2f} s "
        f"({r['bytes'] / 2**30 / r['waits']:.1f} GiB copied per second of waiting)"
    )
    return ok


def parse() -> argparse.Namespace:
    "The options."
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--layers", type=int, default=8, help="of a 7B shape that is loaded: 8 take 4 GB on disk")
    add("--processes", type=int, nargs="*", default=[1, 2, 4])
    add("--kinds", nargs="*", default=["none", "nf4"])
    add("--adapter", type=int, default=256, help="rank of the adapter whose checkpoint is written")
    add("--folder", default=None, help="where to make the model; a temporary folder by default")
    add("--tiny", action="store_true", help="a quick smoke run")
    add("--rank", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def one_rank(what: str, folder: str, *more: str) -> None:
    "Be one of the processes that `launched` starts."
    found = load(Path(folder), *more) if what == "load" else steps(Path(folder), more[0], int(more[1]))
    if found: print("found", json.dumps(found))
    from mistral_nb.train import faults
    faults.exit_process(0)


def main() -> None:
    "Measure and print the tables."
    options = parse()
    if options.rank: one_rank(*options.rank)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        ok = measure_loading(options, Path(name) / "model")
        ok &= measure_steps(options, Path(name) / "run")
    if not ok: raise SystemExit("missed: memory falls as 1 / processes, bytes are what theory says")


def prepare(folder: Path, tiny: bool) -> None:
    "A model to train, and data"
    from mistral_nb.demo import make_data, make_model
    from mistral_nb.model.args import ModelArgs
    small = dict(dim=64, head_dim=16, hidden_dim=128, n_heads=4, n_layers=2) if tiny else {}
    make_model(folder / "model", 0, ModelArgs(**(TRAIN | small)))
    make_data(folder / "data")


if __name__ == "__main__": main()
