"A run in a real Jupyter kernel: a live pane, the interrupt button, and the next cell that goes on."
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager

START = """
from mistral_nb import Trainer
from mistral_nb.demo import demo_settings
settings = demo_settings({demo!r}, {run!r}, max_steps=30, seq_len=128, no_eval=True, log_freq=1)
"""
FIT = "trainer = Trainer(settings); history = trainer.fit()"
RESUME = "print(len(history.records)); history = trainer.fit(resume=True); print(len(history.records))"
HTML, WIDGET = "text/html", "application/vnd.jupyter.widget-view+json"


def execute(client, code: str, during=None, shown: dict | None = None) -> tuple[str, str, list[str]]:
    "`(status, what was printed or shown, traceback)` of a cell; its displays by their ids go into `shown`"
    request, text, trace, shown = client.execute(code), [], [], {} if shown is None else shown
    if during: during()
    while True:
        message = client.get_iopub_msg(timeout=180)
        if message["parent_header"].get("msg_id") != request: continue
        kind, content = message["msg_type"], message["content"]
        if kind == "stream": text.append(content["text"])
        elif kind == "execute_result": text.append(content["data"]["text/plain"])
        elif kind in ("display_data", "update_display_data"):
            shown.setdefault(content["transient"].get("display_id", len(shown)), []).append(content["data"])
        elif kind == "error": trace = content["traceback"]
        elif kind == "status" and content["execution_state"] == "idle":
            return ("error" if trace else "ok"), "".join(text), trace


def check_shown(shown: dict, with_buttons: bool) -> None:
    "One pane, drawn again in place, that says how to go on; and nothing is left of buttons"
    panes = [said for said in shown.values() if any(HTML in data for data in said)]
    assert len(panes) == 1 and len(panes[0]) > 2
    last = panes[0][-1]
    assert "stopped by SIGINT after step" in last["text/plain"]
    assert "trainer.fit(resume=True)" in last["text/plain"] and "<img" in last[HTML]
    buttons = [said for said in shown.values() if any(WIDGET in data for data in said)]
    assert [list(said[-1]) for said in buttons] == [["text/plain"]] * with_buttons  # nothing is left of them


@pytest.fixture(scope="module", params=["installed", "6.31.0"])
def ipykernel(request, tmp_path_factory) -> tuple[str, int]:
    "A folder that holds an ipykernel, empty for the one that is installed, and its major version"
    if request.param == "installed":
        import ipykernel
        return "", ipykernel.version_info[0]
    folder = str(tmp_path_factory.mktemp("ipykernel"))
    install = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", folder]
    done = subprocess.run([*install, f"ipykernel=={request.param}"], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"ipykernel {request.param} cannot be had: {done.stderr[-200:]}")
    return folder, int(request.param.partition(".")[0])


def test_interrupt_and_resume(demo, tmp_path, shell_env, ipykernel):
    "The pane says how to go on instead of a traceback; resuming does the remaining steps only"
    folder, major = ipykernel
    manager, run = KernelManager(kernel_name="python3"), tmp_path / "run"
    path = os.pathsep.join(filter(None, [folder, shell_env.get("PYTHONPATH")]))
    manager.start_kernel(env=shell_env | {"JPY_SESSION_NAME": "first.ipynb", "PYTHONPATH": path})
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        version = "import ipykernel; print(ipykernel.version_info[0])"
        assert execute(client, version)[1] == f"{major}\n"
        assert execute(client, START.format(demo=str(demo), run=str(run)))[0] == "ok"
        metrics = run / "metrics.train.jsonl"

        def press_stop():
            until = time.time() + 120
            while time.time() < until and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
                time.sleep(0.02)
            manager.interrupt_kernel()

        shown: dict = {}
        status, _, trace = execute(client, FIT, press_stop, shown)
        assert status == "ok", trace
        check_shown(shown, with_buttons=major >= 7)  # an older one hears no click while a cell runs
        done = int(sorted(Path(run / "checkpoints").iterdir())[-1].name.removeprefix("checkpoint_"))
        assert 3 <= done < 30
        status, text, trace = execute(client, RESUME)
        assert status == "ok" and text == f"{done}\n30\n", (text, trace)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
