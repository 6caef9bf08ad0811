"A run in a real Jupyter kernel: the interrupt button ends it on a step's edge, and the next cell goes on."
import time
from pathlib import Path

from jupyter_client.manager import KernelManager

START = """
from mistral_nb import Trainer
from mistral_nb.demo import demo_settings
settings = demo_settings({demo!r}, {run!r}, max_steps=30, seq_len=128, no_eval=True, log_freq=1)
"""
FIT = "Trainer(settings).fit()"
RESUME = (
    "history = Trainer(settings | dict(resume=True)).fit(); "
    "print('steps', [r.step for r in history.records][-1], len(history.records))"
)


def execute(client, code: str, during=None) -> tuple[str, str, list[str]]:
    "`(status, what was printed or shown, traceback)` of a cell"
    request, text, trace = client.execute(code), [], []
    if during: during()
    while True:
        message = client.get_iopub_msg(timeout=180)
        if message["parent_header"].get("msg_id") != request: continue
        kind, content = message["msg_type"], message["content"]
        if kind == "stream": text.append(content["text"])
        elif kind == "execute_result": text.append(content["data"]["text/plain"])
        elif kind == "error": trace = content["traceback"]
        elif kind == "status" and content["execution_state"] == "idle":
            return ("error" if trace else "ok"), "".join(text), trace


def test_interrupt_and_resume(demo, tmp_path, shell_env):
    "One readable line instead of a traceback; resuming does the remaining steps only"
    manager, run = KernelManager(kernel_name="python3"), tmp_path / "run"
    manager.start_kernel(env=shell_env)
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        assert execute(client, START.format(demo=str(demo), run=str(run)))[0] == "ok"
        metrics = run / "metrics.train.jsonl"

        def press_stop():
            until = time.time() + 120
            while time.time() < until and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
                time.sleep(0.02)
            manager.interrupt_kernel()

        status, _, trace = execute(client, FIT, press_stop)
        assert (
            status == "error" and len(trace) == 1 and trace[0].startswith("Stopped by SIGINT after step")
        ), trace
        done = int(sorted(Path(run / "checkpoints").iterdir())[-1].name.removeprefix("checkpoint_"))
        assert 3 <= done < 30
        status, text, trace = execute(client, RESUME)
        assert status == "ok" and f"steps 30 {30 - done}" in text, (text, trace)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
