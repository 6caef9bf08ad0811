"""What reaches a terminal: text of data, logs and names cannot steer it, and output never fails for its
encoding."""
import json
import os
import socket
import subprocess
import sys
import time
import tracemalloc

import pytest

from mistral_nb import cli
from mistral_nb.data.check import check
from mistral_nb.notebook.failure import diagnose, Failure, JobFailedError
from mistral_nb.notebook.job import Job

ORDERS = "\x1b]0;owned\x07\x1b[2J\x1b[31m\u202etxet\u2066\x00\x9b1m\r"
STEERS = [c for c in ORDERS if ord(c) < 32 or ord(c) in range(0x7F, 0xA0) or ord(c) > 0x2000]


@pytest.fixture
def job(tmp_path):
    "The folder of a job that has ended, as launch leaves it"
    ranks = tmp_path / "launch/logs/1/attempt_0/0"
    ranks.mkdir(parents=True)
    (tmp_path / "launch/job.json").write_text(
        json.dumps(dict(process=None, host=socket.gethostname(), max_steps=4, nproc_per_node=1, nnodes=1))
    )
    (tmp_path / "launch/exit").write_text("1")
    return Job(tmp_path), ranks


def steered(text: str) -> list[str]: return [c for c in STEERS if c in text]


def test_findings(tmp_path, capsys):
    "check --findings, and the line that names a file"
    file = tmp_path / f"evil{ORDERS.replace(chr(0), '')}.jsonl"
    row = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        f"key{ORDERS}": 1,
    }
    file.write_text(
        json.dumps(row) + "\n" + json.dumps({"messages": [{"role": ORDERS, "content": "x"}]}) + "\n"
    )
    cli.main(["check", str(file), "--findings"])
    cli.main(["show", str(tmp_path / f"none{ORDERS.replace(chr(0), '')}")])
    printed = capsys.readouterr()
    assert "key" in printed.out and not steered(printed.out + printed.err)
    assert not any(steered(str(f)) for f in check(file).findings)


def test_logs_and_failures(job):
    run, ranks = job
    (ranks / "stdout.log").write_text(f"one\n  5%|#    |\r 10%|##   |\rdone{ORDERS}two\n")
    (ranks / "stderr.log").write_text(f"ValueError: {ORDERS}bad\n")
    assert not steered(run.logs()) and "one" in run.logs() and "5%" not in run.logs()
    with pytest.raises(JobFailedError) as error: run.result
    assert not steered(str(error.value)) and "bad" in str(error.value)
    assert isinstance(diagnose(run.folder), Failure)


def test_logs_of_half_a_gigabyte(job):
    "Ten lines of it, in less than a tenth of a second"
    run, ranks = job
    with open(ranks / "stdout.log", "wb") as f:
        f.truncate(500 << 20)
        f.seek(0, os.SEEK_END)
        f.write(b"\n" + b"".join(b"line %d\n" % i for i in range(20)))
    (ranks / "stderr.log").touch()
    tracemalloc.start()
    began = time.perf_counter()
    found = run.logs(lines=10)
    took, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.split("\n") == [f"line {i}" for i in range(10, 20)] and took < 0.1 and peak < 8 << 20


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_other_encodings(encoding, tmp_path, shell_env):
    "A stream that is not UTF-8 gets what it can show"
    file = tmp_path / "a.jsonl"
    file.write_text(
        json.dumps(
            {"messages": [{"role": "user", "content": "漢 😀"}, {"role": "assistant", "content": "ü"}]},
            ensure_ascii=False,
        )
        + "\n"
    )
    for command in (["check", str(file)], ["show", str(file)], ["check", str(tmp_path / "漢.jsonl")]):
        done = subprocess.run(
            [sys.executable, "-m", "mistral_nb", *command],
            env={**shell_env, "PYTHONIOENCODING": encoding}, capture_output=True, timeout=60,
        )
        assert b"Traceback" not in done.stderr + done.stdout and b"codec" not in done.stderr
        assert done.returncode == (0 if command[1] == str(file) else 1)


def test_fifo(tmp_path, capsys):
    "A pipe can be read once, and nobody may write to it: it is refused, not waited for"
    os.mkfifo(tmp_path / "a.jsonl")
    for command in (
        ["check", str(tmp_path / "a.jsonl")],
        ["convert", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
        ["train", str(tmp_path / "a.jsonl")],
    ):
        began = time.monotonic()
        assert cli.main(command) == 1 and time.monotonic() - began < 5
        assert "is no file that can be read" in capsys.readouterr().err
