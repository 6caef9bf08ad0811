"""Models by their names, from a Hub and a server of tar files that stand on this machine."""
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import SMALL

from mistral_nb.demo import make_model

REPO = "someone/small-model"


def sha1(data: bytes) -> str: return hashlib.sha1(data).hexdigest()


class Hub(BaseHTTPRequestHandler):
    "Enough of a Hub for model_info and snapshot_download"
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def send(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for key, value in (dict(Content_Length=str(len(body))) | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def refuse(self, code: int, kind: str) -> None:
        self.send(code, b"{}", X_Error_Code=kind, X_Error_Message=kind, Content_Type="application/json")

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        state = self.server.state
        state["asked"].append((self.command, path, self.headers["Range"]))
        found = re.match(r"/(?:api/models/)?([\w.-]+/[\w.-]+)(?:/(.*))?$", path)
        repo, rest = found.groups() if found else ("", "")
        known = "Bearer" in str(self.headers)
        if repo.startswith("gated/"): return self.refuse(403 if known else 401, "GatedRepo")
        if repo != REPO: return self.refuse(401, "RepoNotFound")
        files = state["files"]
        if path.startswith("/api/models/"):
            tree = [dict(type="file", path=n, size=len(b), oid=sha1(b)) for n, b in files.items()]
            siblings = [dict(rfilename=n, size=len(b)) for n, b in files.items()]
            info = dict(id=repo, sha="c" * 40, siblings=siblings)
            body = tree if rest and rest.startswith("tree") else info
            return self.send(200, json.dumps(body).encode(), Content_Type="application/json")
        name = re.sub(r"^resolve/[^/]+/", "", rest)
        if name not in files: return self.refuse(404, "EntryNotFound")
        self.send_file(files[name])

    def send_file(self, data: bytes) -> None:
        state = self.server.state
        begin = int((self.headers["Range"] or "bytes=0-")[6:].split("-")[0] or 0)
        facts = dict(ETag=f'"{sha1(data)}"', X_Repo_Commit="c" * 40, Accept_Ranges="bytes")
        if self.command == "HEAD": return self.send(200, b"", **facts | dict(Content_Length=str(len(data))))
        part = data[begin:]
        if state["cut"] and len(part) > 12_000_000:  # behind the first piece that a client writes
            state["cut"] -= 1
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part[:12_000_000])
            self.connection.close()
            return
        self.send(206 if begin else 200, part, **facts)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    "What a repository holds: a small model twice, and what nobody needs"
    folder = tmp_path_factory.mktemp("hub") / "model"
    make_model(folder, 0, SMALL)
    found = {p.name: p.read_bytes() for p in folder.iterdir()}
    return found | {"README.md": b"words", "model.safetensors": b"the same again", "big.gguf": bytes(100)}


@pytest.fixture
def hub(files):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.state = dict(files=files, asked=[], cut=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def run(code: str, hub, home: Path, **env: str) -> subprocess.CompletedProcess:
    "Python with a Hub of its own: its address is read when the library is imported"
    address = f"http://127.0.0.1:{hub.server_port}"
    env = os.environ | dict(
        HF_ENDPOINT=address, HF_HOME=str(home), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1",
        MISTRAL_NB_MODELS=str(home / "models"),
    ) | env
    env.pop("HF_HUB_OFFLINE", None) if "HF_HUB_OFFLINE" not in env else None
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


GET = f"from mistral_nb import download; print(download({REPO!r}))"


def test_download(hub, tmp_path):
    "Only what is needed is fetched; a second call asks nobody; the folder loads"
    done = run(GET, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert "params.json" in os.listdir(folder) and "consolidated.safetensors" in os.listdir(folder)
    assert not {"README.md", "model.safetensors", "big.gguf"} & set(os.listdir(folder))
    assert "GB, to" in done.stderr  # how much, and where
    n = len(hub.state["asked"])
    again = run(GET, hub, tmp_path, HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout and len(hub.state["asked"]) == n
    use = f"from mistral_nb import load_model, load_tokenizer; from mistral_nb.core.hub import find_model; " \
          f"f = find_model({REPO!r}, fetch=True); print(load_model(f).args.dim, load_tokenizer(f).version)"
    used = run(use, hub, tmp_path)
    assert used.stdout.split() == ["64", "v3"], used.stderr


def test_into_a_folder(hub, tmp_path):
    code = f"from mistral_nb import download; print(download({REPO!r}, {str(tmp_path / 'here')!r}))"
    done = run(code, hub, tmp_path)
    assert (tmp_path / "here/params.json").is_file(), done.stderr


def test_two_at_once(hub, files, tmp_path):
    "Two processes that want the same model fetch its weights once"
    both = [threading.Thread(target=lambda: run(GET, hub, tmp_path)) for _ in range(2)]
    for t in both: t.start()
    for t in both: t.join()
    weights = ("GET", f"/{REPO}/resolve/{'c' * 40}/consolidated.safetensors")
    assert [asked[:2] for asked in hub.state["asked"]].count(weights) == 1


def test_cut(hub, tmp_path):
    "A connection that breaks is taken up again, by itself or by the next call"
    hub.state["cut"] = 1
    done = run(GET, hub, tmp_path)
    if done.returncode: done = run(GET, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert any(span for _, _, span in hub.state["asked"] if span and not span.startswith("bytes=0-"))


@pytest.mark.parametrize("name, env, words", [
    ("gated/model", {}, "accept its licence at https://huggingface.co/gated/model, then log in"),
    ("gated/model", dict(HF_TOKEN="hf_secretsecret"), "accept its licence"),
    ("someone/else", {}, "is not on the Hub, or is private"),
    (REPO, dict(HF_ENDPOINT="http://127.0.0.1:9"), "cannot be"),
    (REPO, dict(HF_HUB_OFFLINE="1"), "the Hub cannot be reached"),
    ("ministral", {}, "near names are Ministral"),
])
def test_refusals(hub, tmp_path, name, env, words):
    "Each says what to do, and no token is in it"
    done = run(f"from mistral_nb import download; download({name!r})", hub, tmp_path, **env)
    assert done.returncode == 1 and words in done.stderr.splitlines()[-1], done.stderr[-800:]
    assert "HubError" in done.stderr and "hf_secret" not in done.stderr + done.stdout


def test_full_disk(hub, tmp_path):
    code = "import shutil; shutil.disk_usage = lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000); " + GET
    done = run(code, hub, tmp_path)
    assert "0.0 GB are free: give another folder" in done.stderr.splitlines()[-1]


def test_program(hub, tmp_path):
    "The command prints the folder; a name stands where a folder does"
    code = f"from mistral_nb.cli import main; import sys; sys.exit(main(['download', {REPO!r}]))"
    done = run(code, hub, tmp_path)
    assert done.returncode == 0 and Path(done.stdout.strip()).is_dir(), done.stderr
    ask = "from mistral_nb.cli import main; import sys; " \
          f"sys.exit(main(['complete', {REPO!r}, 'Hello', '--max-tokens', '2']))"
    done = run(ask, hub, tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("Hello"), done.stderr
