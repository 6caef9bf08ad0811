"""What the live pane costs: seconds to draw it, its size, and the processor's time of training with it beside
training without it, in turns in a real kernel."""
import argparse
import json
import math
import os
import sys
import tempfile
import time
from statistics import median

from jupyter_client.manager import KernelManager

from mistral_nb.core.display import Table
from mistral_nb.train.metrics import EvalLog, StepLog
from mistral_nb.core.pane import pane_html, View

LONGEST = 20_000  # steps
TRAIN = """
import json, logging, sys, tempfile, time, warnings
from pathlib import Path
import torch
from mistral_nb.demo import demo_settings, make_data, make_model
from mistral_nb.notebook.live import LiveTrainer
from mistral_nb.train import loop
torch.set_num_threads(1)
folder = Path({folder!r})
make_model(folder / "model"), make_data(folder / "data")
how = dict(max_steps={steps}, seq_len={seq_len}, no_eval=True, no_ckpt=True)
settings = demo_settings(folder, folder / "run", **how)
def seconds(kind, i):
    trainer = kind(settings, run_dir=str(folder / f"run{{i}}"))
    began = time.perf_counter(), time.process_time()
    if kind is LiveTrainer: trainer.fit()
    else:
        for _ in trainer.steps(): pass
    return time.perf_counter() - began[0], time.process_time() - began[1]
seconds(LiveTrainer, "warm")
found = [(seconds(loop.Trainer, 2 * i), seconds(LiveTrainer, 2 * i + 1)) for i in range({rounds})]
print("FOUND", json.dumps(found))
"""


def long_view(steps: int) -> View:
    "A run of so many steps, with an evaluation at each hundredth of it"
    view = View("runs/long", steps)
    for i in range(1, steps + 1):
        loss = 0.4 + 2 * math.exp(-9 * i / steps) * (1 + 0.1 * math.sin(7 * i))
        held = EvalLog(i, loss, math.exp(loss), 500, 0.1) if i % max(1, steps // 100) == 0 else None
        view.add(StepLog(i, steps, loss, 1e-4, 0.7, 8192, 4000, 0.05, 1e5, 9.0, 13.5, 80.0, i / 50, held))
    return view


def drawn(steps: int) -> list:
    "Milliseconds to draw it, and kB"
    view, times = long_view(steps), []
    for _ in range(20):
        began = time.perf_counter()
        html = pane_html(view)
        times.append(time.perf_counter() - began)
    return [steps, round(1e3 * median(times), 2), round(len(html.encode()) / 1e3, 1)]


def trained(steps: int, seq_len: int, rounds: int) -> list:
    "Without and with the pane, in turns, in a kernel of its own: seconds, and those of the processor"
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=os.environ | {"JPY_SESSION_NAME": "benchmark.ipynb"})
    client = manager.client()
    client.start_channels()
    said = ""
    try:
        client.wait_for_ready(timeout=60)
        with tempfile.TemporaryDirectory() as folder:
            code = TRAIN.format(folder=folder, steps=steps, seq_len=seq_len, rounds=rounds)
            request = client.execute(code)
            while True:
                message = client.get_iopub_msg(timeout=600)
                kind, content = message["msg_type"], message["content"]
                if message["parent_header"].get("msg_id") != request: continue
                if kind == "stream": said += content["text"]
                if kind == "error": sys.exit("\n".join(content["traceback"]))
                if kind == "status" and content["execution_state"] == "idle": break
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return json.loads(said.partition("FOUND ")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="few steps, to see that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    lengths = (100, 1000) if options.tiny else (100, 1000, LONGEST)
    rows = [drawn(steps) for steps in lengths]
    print(Table(["steps", "ms to draw", "kB"], rows))
    steps, rounds = (5, 1) if options.tiny else (200, options.rounds)
    found = trained(steps, 64, rounds)
    shares = [with_pane[1] / without[1] - 1 for without, with_pane in found]
    heads = ["steps a second", "processor, s", "with the pane, s", "more"]
    rate = steps / median(without[0] for without, _ in found)
    spent = [round(median(pair[i][1] for pair in found), 2) for i in (0, 1)]
    print(Table(heads, [(round(rate, 1), *spent, f"{median(shares):.1%}")]))
    if not options.tiny and (median(shares) > 0.03 or rows[1][1] > 5): sys.exit(1)


if __name__ == "__main__": main()
