"""A Hub that stands on this machine: enough of one to push to, and to load from."""
import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".gguf")


def sha1(data: bytes) -> str: return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(BaseHTTPRequestHandler):
    "Enough of a Hub for create_repo, upload_folder and snapshot_download"
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def send(self, code: int, body=b"", **headers) -> None:
        if isinstance(body, dict | list): body = json.dumps(body).encode()
        self.send_response(code)
        facts = dict(Content_Length=len(body), Content_Type="application/json") | headers
        for key, value in facts.items(): self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        out = b""
        while size := int(self.rfile.readline(), 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def refuse(self, code: int, kind: str) -> None: self.send(code, {"error": kind}, X_Error_Code=kind)

    def serve(self) -> None:
        data, state = self.body(), self.server.state
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml": return self.send(200, {"errors": [], "warnings": []})
        if path.startswith("/blobs/"):
            state["blobs"][path[7:]] = data
            return self.send(200, {})
        if "Bearer" not in str(self.headers): return self.refuse(401, "RepoNotFound")
        if path == "/api/repos/create":
            asked = json.loads(data)
            state["private"] = asked.get("private") or asked.get("visibility") == "private"
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            return self.send(200, {"url": f"http://{self.headers['Host']}/{repo}", "id": repo})
        found = re.match(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?(/.*)?$", path)
        self.of_repo(found[1], found[2] or "", data)

    def of_repo(self, repo: str, rest: str, data: bytes) -> None:
        files, blobs = self.server.state["files"], self.server.state["blobs"]
        host = f"http://{self.headers['Host']}"
        if repo.startswith("gated/"): return self.refuse(403, "GatedRepo")
        if rest.startswith("/preupload/"):
            kinds = {f["path"]: f["path"].endswith(LARGE) for f in json.loads(data)["files"]}
            modes = [
                dict(path=p, uploadMode="lfs" if large else "regular", shouldIgnore=False)
                for p, large in kinds.items()
            ]
            return self.send(200, {"files": modes})
        if rest == "/info/lfs/objects/batch":
            asked = json.loads(data)["objects"]
            objects = [o | {"actions": {"upload": {"href": f"{host}/blobs/{o['oid']}"}}} for o in asked]
            return self.send(200, {"transfer": "basic", "objects": objects})
        if rest.startswith("/commit/"):
            for line in map(json.loads, data.decode().splitlines()):
                v = line["value"]
                if line["key"] == "file": files[v["path"]] = base64.b64decode(v["content"])
                if line["key"] == "lfsFile": files[v["path"]] = blobs[v["oid"]]
            return self.send(200, {"commitUrl": f"{host}/{repo}/commit/1", "commitOid": "c" * 40})
        if rest.startswith("/resolve/"):
            name = rest.split("/", 3)[3]
            if name not in files: return self.refuse(404, "EntryNotFound")
            facts = dict(ETag=f'"{sha1(files[name])}"', X_Repo_Commit="c" * 40)
            return self.send(200, files[name], **facts)
        if rest.startswith("/tree/"):
            tree = [dict(type="file", path=n, size=len(b), oid=sha1(b)) for n, b in files.items()]
            return self.send(200, tree)
        self.send(200, dict(id=repo, sha="c" * 40, siblings=[dict(rfilename=n) for n in files]))

    do_GET = do_POST = do_PUT = do_HEAD = serve


@contextmanager
def running_hub():
    "A server, with what it was given in `state`"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.state = dict(files={}, blobs={}, private=None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def python(code: str, hub, env: dict, tmp_path, token: str = "x") -> subprocess.CompletedProcess:
    "Python code in a process whose Hub is the one here"
    own = dict(
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HOME=str(tmp_path / "hf"),
        HF_HUB_DISABLE_XET="1", HF_TOKEN=token,
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env | own, capture_output=True, text=True, timeout=120)
