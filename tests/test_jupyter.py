"The live pane in JupyterLab and a real browser: it grows, its buttons steer, a saved notebook stays whole."
import base64
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable
from urllib.request import Request, urlopen

import nbclient
import nbformat
import pytest
from conftest import steps_done

from mistral_nb.notebook.processes import process_tree, send_signal
from mistral_nb.train.run_dir import checkpoints
from mistral_nb.train.stop import process_id

CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDED = dict(jupyterlab=find_spec("jupyterlab"), playwright=find_spec("playwright"), chromium=CHROME)
MISSING = [name for name, found in NEEDED.items() if not found]

HTML, WIDGET = "text/html", "application/vnd.jupyter.widget-view+json"
WIDGETS = {WIDGET, "application/vnd.jupyter.widget-state+json"}
SESSION = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session"  # of the open notebook
PICTURE = 'src="data:image/svg+xml;base64,'
BUTTONS = ["Stop", "Pause", "Checkpoint"]
START = """
from mistral_nb import launch, Trainer
from mistral_nb.demo import demo_settings
settings = demo_settings({demo!r}, {run!r}, max_steps={steps}, seq_len=512, no_eval=True, log_freq=1)
"""
FIT, NEXT = "trainer = Trainer(settings)\nhistory = trainer.fit()", "print(len(history.records))"
LAUNCH = "job = launch(settings, nproc_per_node=1)\njob"
OTHER = "import os, time\nwhile not os.path.exists({file!r}): time.sleep(0.1)"

# What a cell shows: its prompt, its text, the buttons that can be seen, and its pictures
LOOK = """i => {
    const node = jupyterapp.shell.currentWidget.content.widgets[i].node
    const seen = kind => [...node.querySelectorAll(kind)].filter(e => e.offsetParent)
    const text = kind => seen(kind).map(e => e.innerText.trim())
    return {
        prompt: text('.jp-InputPrompt').join(), text: text('.jp-OutputArea-output').join('\\n'),
        pictures: seen('img[src^="data:image/svg+xml"]').map(e => e.src),
        buttons: text('button.jupyter-button'),
    }
}"""
# How a pane stands on its page: what is wider than its place, and how its text stands out
PLACE = """i => {
    const area = jupyterapp.shell.currentWidget.content.widgets[i].node.querySelector('.jp-OutputArea')
    const box = area.getBoundingClientRect(), parts = [area, ...area.querySelectorAll('*')]
    const right = Math.min(box.right, innerWidth) + 1
    const wide = parts.filter(e => e.offsetParent && e.getBoundingClientRect().right > right)
    const scrolls = parts.filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1)
    const picture = area.querySelector('img[alt="loss over steps"]'), pane = picture.parentElement
    const rgba = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n }
    const clear = e => rgba(getComputedStyle(e).backgroundColor)[3] < 1
    let back = pane
    while (back.parentElement && clear(back)) back = back.parentElement
    const linear = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4
    const light = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2])
    const colours = [getComputedStyle(pane).color, getComputedStyle(back).backgroundColor].map(rgba)
    const [low, high] = colours.map(light).sort((a, b) => a - b)
    const name = e => `${e.tagName} ${e.className}`
    return {
        width: picture.getBoundingClientRect().width, wide: wide.map(name), scrolls: scrolls.map(name),
        contrast: (high + .05) / (low + .05), theme: light(colours[1]) < .5 ? 'Dark' : 'Light',
        ready: colours[1][3] === 1 && !document.getElementById('jupyterlab-splash'), inner: innerWidth,
    }
}"""


def wait(found: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    "The first value of `found` that is true; fails if none comes"
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)
    return value


@dataclass
class Seen:
    "What a cell shows"
    prompt: str
    text: str
    pictures: list[str] = field(repr=False)
    buttons: list[str]

    @property
    def busy(self) -> bool: return "*" in self.prompt

    @property
    def step(self) -> int:
        found = re.search(r"step ([\d,]+) of", self.text)
        return int(found[1].replace(",", "")) if found else -1

    @property
    def phase(self) -> str:
        found = re.search(r"\b(starting|training|paused|finished|stopped|failed)\b", self.text)
        return found[0] if found else ""

    @property
    def points(self) -> int:
        "Of the curve of losses"
        if not self.pictures: return 0
        drawn = base64.b64decode(self.pictures[0].partition(",")[2]).decode()
        return len(re.search(r'<polyline fill="none" points="([^"]*)"', drawn)[1].split())


class Notebook:
    "A notebook that is open in a browser."

    def __init__(self, lab: "Lab", page: Any, file: Path):
        self.lab, self.page, self.file = lab, page, file
        page.goto(f"{lab.url}/doc/tree/{file.name}?token={lab.token}&reset")
        self.wait_ready()

    def wait_ready(self) -> None:
        "Until its cells are there, and a kernel"
        self.page.wait_for_function(f"() => {SESSION}?.kernel?.info", timeout=60_000)

    def command(self, name: str, **options: Any) -> None:
        "Run a command of JupyterLab's, and do not wait for it to end"
        script = "([name, options]) => { jupyterapp.commands.execute(name, options) }"
        self.page.evaluate(script, [name, options])

    def run(self, cell: int) -> None:
        self.page.evaluate("i => { jupyterapp.shell.currentWidget.content.activeCellIndex = i }", cell)
        self.command("notebook:run-cell")

    def look(self, cell: int) -> Seen: return Seen(**self.page.evaluate(LOOK, cell))

    def wait_for(self, cell: int, found: Callable[[Seen], Any], what: str, seconds: float = 60) -> Seen:
        "What a cell shows when `found` is true of it"
        seen = []

        def is_so() -> Any:
            seen[:] = [self.look(cell)]
            return found(seen[0])

        try: wait(is_so, what, seconds)
        except AssertionError as error: raise AssertionError(f"{error}; seen: {seen}") from None
        return seen[0]

    def wait_done(self, cell: int, seconds: float = 60) -> Seen:
        return self.wait_for(cell, lambda s: s.prompt.strip("[]: ").isdigit(), "the cell to end", seconds)

    def grows(self, cell: int, by: int = 5) -> Seen:
        "The pane when it is some steps, and points, further than now"
        was = self.wait_for(cell, lambda s: s.points > 1, "a curve")
        def grown(s: Seen) -> bool: return s.step >= was.step + by and s.points >= was.points + by
        return self.wait_for(cell, grown, f"step {was.step + by}")

    def click(self, cell: int, name: str) -> None:
        place = self.page.locator(".jp-Notebook .jp-Cell").nth(cell)
        place.get_by_role("button", name=name, exact=True).click()

    def save(self) -> dict:
        "Save it; what stands in the file"
        self.page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
        return json.loads(self.file.read_text())

    def picture(self, name: str) -> None:
        folder = Path(os.environ.get("PICTURES") or self.file.parent)
        self.page.screenshot(path=str(folder / f"{name}.png"))

    def place(self, cell: int, theme: str, width: int) -> dict:
        "How a pane stands on the page, as soon as theme and width are these and it fits, or after a while"
        self.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        self.page.set_viewport_size(dict(width=width, height=900))
        until = time.monotonic() + 30
        while (found := self.page.evaluate(PLACE, cell)) and time.monotonic() < until:
            shown = found["ready"] and (found["theme"], found["inner"]) == (theme, width)
            if shown and found["width"] and not found["wide"] and not found["scrolls"]: break
            self.page.wait_for_timeout(100)
        return found

    def check_place(self, cell: int, name: str) -> None:
        "In a wide and a narrow window, light and dark: the pane keeps to its place, and can be read"
        for theme in ("Dark", "Light"):
            for width in (700, 1280):
                found = self.place(cell, theme, width)
                self.picture(f"{name}-{theme.lower()}-{width}")
                assert found["wide"] == [] and found["scrolls"] == [] and found["width"] > 350, found
                assert found["theme"] == theme and found["contrast"] > 7, found


@dataclass
class Lab:
    "A server of JupyterLab's, and a browser."
    folder: Path
    url: str
    token: str
    browser: Any

    def write(self, name: str, *cells: str) -> Path: return write_notebook(self.folder / name, *cells)

    def open(self, file: Path) -> Notebook:
        "Open it, in a page of its own"
        context = self.browser.new_context(viewport=dict(width=1280, height=900))
        return Notebook(self, context.new_page(), file)

    def close(self, notebook: Notebook) -> None:
        "Close the page, and end its kernel"
        kernel = notebook.page.evaluate(f"() => {SESSION}.kernel.id")
        notebook.page.context.close()
        headers = {"Authorization": f"token {self.token}"}
        urlopen(Request(f"{self.url}/api/kernels/{kernel}", headers=headers, method="DELETE"), timeout=60)


def write_notebook(file: Path, *cells: str) -> Path:
    "A new notebook of cells with code"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
    nb.metadata.kernelspec = dict(display_name="python3", language="python", name="python3")
    nbformat.write(nb, file)
    return file


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(process: subprocess.Popen, url: str) -> bool:
    "Whether a server that was started is ready"
    assert process.poll() is None, "JupyterLab has ended"
    try: return urlopen(url, timeout=5).status == 200
    except OSError: return False


def end(process: subprocess.Popen) -> None:
    "End a server and all that came from it"
    members = process_tree(process.pid)
    process.send_signal(signal.SIGTERM)  # it ends its kernels
    try: process.wait(20)
    except subprocess.TimeoutExpired: pass
    send_signal(members, signal.SIGKILL)
    process.wait()
    wait(lambda: not any(map(process_id, members)), "the end of all that JupyterLab started")


@pytest.fixture(scope="module")
def lab(tmp_path_factory, shell_env):
    "A server on loopback with folders of its own, so that no setting of the user's counts, and a browser"
    if MISSING: pytest.skip(f"not installed: {', '.join(MISSING)}")
    from playwright.sync_api import sync_playwright
    folder, port, token = tmp_path_factory.mktemp("lab"), free_port(), secrets.token_hex(16)
    (folder / "notebooks").mkdir()
    own = {f"JUPYTER_{n}_DIR": str(folder / n.lower()) for n in ("CONFIG", "DATA", "RUNTIME")}
    env = shell_env | own | {"JUPYTER_PREFER_ENV_PATH": "1", "IPYTHONDIR": str(folder / "ipython")}
    settings = folder / "config/lab/user-settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    quiet = dict(fetchNews="false", checkForUpdates=False)  # no question, and nothing asked of the network
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
        "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder / 'notebooks'}",
    ]
    url = f"http://127.0.0.1:{port}"
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
    try:
        wait(lambda: answers(server, f"{url}/api/status?token={token}"), "JupyterLab to start", 90)
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=CHROME, args=["--no-sandbox"])
            yield Lab(folder / "notebooks", url, token, browser)
            browser.close()
    finally: end(server)


def check_static(nb: dict, cell: int, size: int) -> None:
    "A notebook's file holds one pane as a plain picture, and no widget"
    outputs = [o for c in nb["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert not WIDGETS & {kind for o in outputs for kind in o.get("data", {})}
    assert "widgets" not in nb["metadata"] and size < 60_000
    (pane,) = [o for o in nb["cells"][cell]["outputs"] if HTML in o.get("data", {})]
    assert PICTURE in "".join(pane["data"][HTML])
    assert not any("error" in o["output_type"] for o in outputs)


def check_opened(lab: Lab, file: Path, cell: int) -> None:
    "Opened again without the kernel it ran in, and by somebody who does not trust it, it shows the pane"
    foreign = json.loads(file.read_text())
    foreign["cells"].append(dict(nbformat.v4.new_markdown_cell("changed, so its signature is gone")))
    other = file.with_name(f"foreign-{file.name}")
    other.write_text(json.dumps(foreign))
    for path in (file, other):
        notebook = lab.open(path)
        seen = notebook.wait_for(cell, lambda s: s.pictures, "the saved pane")
        assert seen.phase == "stopped" and seen.step > 0 and seen.buttons == []
        text = notebook.page.inner_text("body")
        assert "Error displaying widget" not in text and "model not found" not in text
        notebook.check_place(cell, path.stem)
        lab.close(notebook)


def steer(notebook: Notebook, run: Path) -> None:
    "A checkpoint, a pause, and on again, by the buttons of the cell that trains"
    notebook.click(1, "Checkpoint")
    saved = wait(lambda: checkpoints(run), "a checkpoint")
    notebook.wait_for(1, lambda s: f"saved {saved[0].name}" in s.text, "the checkpoint's name")
    notebook.click(1, "Pause")
    notebook.wait_for(1, lambda s: s.phase == "paused" and "Go on" in s.buttons, "the pause")
    notebook.page.wait_for_timeout(1000)  # the step that was at work, by far
    done = steps_done(run)
    notebook.check_place(1, "paused")
    assert steps_done(run) == done and notebook.look(1).phase == "paused"
    notebook.click(1, "Go on")
    notebook.wait_for(1, lambda s: s.phase == "training" and s.step >= done + 3, "more steps")


def test_a_cell_that_trains(lab, small_demo, tmp_path):
    "The pane grows, all four buttons work while the cell is busy, and the next cell has the history"
    run = tmp_path / "run"
    start = START.format(demo=str(small_demo), run=str(run), steps=5000)
    notebook = lab.open(lab.write("fit.ipynb", start, FIT, NEXT))
    notebook.command("notebook:run-all-cells")
    assert notebook.grows(1).busy and notebook.look(1).buttons == BUTTONS
    steer(notebook, run)
    notebook.click(1, "Stop")
    seen = notebook.wait_done(1)
    assert seen.phase == "stopped" and "trainer.fit(resume=True)" in seen.text and seen.buttons == []
    seen = notebook.wait_done(2)
    assert int(seen.text) == steps_done(run) < 5000 and not (run / "PAUSE").exists()
    check_static(notebook.save(), 1, notebook.file.stat().st_size)
    lab.close(notebook)
    check_opened(lab, notebook.file, 1)


def while_another_cell_runs(notebook: Notebook) -> None:
    "The pane goes on, and is heard"
    notebook.run(2)
    notebook.wait_for(2, lambda s: s.busy, "the other cell")
    notebook.grows(1)
    notebook.click(1, "Pause")
    notebook.wait_for(1, lambda s: s.phase == "paused" and "Go on" in s.buttons, "the pause")
    notebook.check_place(1, "job")
    notebook.click(1, "Go on")
    notebook.click(1, "Checkpoint")
    notebook.wait_for(1, lambda s: "saved checkpoint_" in s.text, "the checkpoint")
    assert notebook.look(2).busy


def load_again(notebook: Notebook) -> None:
    "The pane, which a page has from the notebook's file, lives on"
    notebook.save()
    notebook.page.reload()
    notebook.wait_ready()
    assert notebook.grows(1).buttons == BUTTONS


def test_a_job(lab, small_demo, tmp_path):
    "The kernel is free, the pane goes on while another cell runs and after a reload, and its buttons work"
    run, file = tmp_path / "run", tmp_path / "free"
    start = START.format(demo=str(small_demo), run=str(run), steps=5000)
    notebook = lab.open(lab.write("job.ipynb", start, LAUNCH, OTHER.format(file=str(file)), "job"))
    for cell in (0, 1): notebook.run(cell)
    notebook.wait_done(1)
    notebook.grows(1)
    while_another_cell_runs(notebook)
    file.touch()
    notebook.wait_done(2)
    load_again(notebook)
    notebook.run(3)
    notebook.grows(3)
    notebook.click(1, "Stop")
    for cell in (1, 3):
        seen = notebook.wait_for(cell, lambda s: s.phase == "stopped" and not s.buttons, "the stop")
        assert "launch(…, resume=True)" in seen.text and seen.points > 1
    notebook.picture("job-stopped")
    assert checkpoints(run) and steps_done(run) < 5000
    nb = notebook.save()  # the first pane is a widget for ever: the page that knew its name is gone
    check_static(nb | dict(cells=nb["cells"][3:]), 0, notebook.file.stat().st_size)
    lab.close(notebook)


TALK = "trainer = Trainer(settings)\nled = talk(trainer, max_tokens=6, file={file!r})\nled"
LONG = "led.box.w.most.value = 3000"


def ask(notebook: Notebook, cell: int, text: str) -> None:
    "Write into the box, and click"
    notebook.page.fill('textarea[placeholder="ask something"]', text)
    notebook.click(cell, "Ask")


def test_a_conversation(lab, small_demo, tmp_path):
    "Both sides answer, Stop is heard, a row goes into a file, and Close leaves plain output"
    file = tmp_path / "more.jsonl"
    start = START.format(demo=str(small_demo), run=str(tmp_path / "run"), steps=5)
    start = start.replace("launch, Trainer", "talk, Trainer")
    notebook = lab.open(lab.write("talk.ipynb", start, TALK.format(file=str(file)), LONG))
    for cell in (0, 1): notebook.run(cell)
    notebook.wait_for(1, lambda s: "Ask" in s.buttons, "the box")
    ask(notebook, 1, "Do <b>you</b> have a cat?")
    seen = notebook.wait_for(1, lambda s: s.text.count("…") == 2, "both answers")
    assert "Do <b>you</b> have a cat?" in seen.text and "base" in seen.text and "tuned" in seen.text
    notebook.page.get_by_text("as training data").click()
    notebook.picture("talk")
    notebook.click(1, "Add to training data")
    notebook.wait_for(1, lambda s: "more.jsonl:1" in s.text, "the row's place")
    (row,) = map(json.loads, file.read_text().splitlines())
    assert row["messages"][0]["content"] == "Do <b>you</b> have a cat?" and len(row["messages"]) == 2
    notebook.run(2)
    notebook.wait_done(2)
    ask(notebook, 1, "And a dog?")
    notebook.wait_for(1, lambda s: s.text.count("…") == 3, "the beginning of a long answer")
    notebook.click(1, "Stop")
    notebook.click(1, "Close")
    seen = notebook.wait_for(1, lambda s: not s.buttons, "plain output")
    assert "And a dog?" in seen.text
    nb = notebook.save()
    assert not WIDGETS & {kind for c in nb["cells"] for o in c["outputs"] for kind in o.get("data", {})}
    assert "And a dog?" in "".join(nb["cells"][1]["outputs"][0]["data"][HTML])
    lab.close(notebook)


def test_without_a_page(small_demo, tmp_path, shell_env):
    "The same notebook, run by a program: one plain picture, which says the end, and no widget"
    start = START.format(demo=str(small_demo), run=str(tmp_path / "run"), steps=20)
    file = write_notebook(tmp_path / "run.ipynb", start, FIT, NEXT)
    nb = nbformat.read(file, as_version=4)
    env = {k: v for k, v in shell_env.items() if k != "JPY_SESSION_NAME"}
    nbclient.NotebookClient(nb, timeout=120).execute(env=env)
    nbformat.write(nb, file)
    check_static(nb, 1, file.stat().st_size)
    (shown,), (printed,) = (nb.cells[i].outputs for i in (1, 2))
    assert "finished, step 20 of 20" in shown.data["text/plain"] and printed.text == "20\n"
