"""A rank that raises, hangs or dies; a stop from elsewhere; restarts; two nodes: every job ends soon, says
why, and leaves nothing behind."""
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from conftest import ended
from conftest import needs_proc
from conftest import steps_done
from conftest import train_command
from mistral_nb.notebook.processes import process_tree
from mistral_nb.train.run_dir import checkpoints
from mistral_nb.train.run_dir import find_damage
from mistral_nb.train.metrics import read_records

pytestmark = needs_proc
SETTINGS = dict(
    max_steps=6, seq_len=128, batch_size=1, log_freq=1, ckpt_freq=2, no_eval=True,
    lora=dict(rank=8, dropout=0.2),
)
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]


def start(command, env) -> subprocess.Popen:
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(child: subprocess.Popen, seconds: float = 120) -> str:
    "What a job said until its end"
    members = process_tree(child.pid)
    said, _ = child.communicate(timeout=seconds)
    assert ended(members)
    return said


def broken(config, kind: str, env, *options: str, step: int = 4) -> subprocess.Popen:
    return start(
        [
            *LAUNCHER, "--standalone", *options, str(ROOT / "tests/faults.py"), kind, str(step),
            str(config), "timeout_minutes=0.1",
        ],
        env,
    )


def losses(config) -> list[float]:
    return [r["loss"] for r in read_records(config.with_suffix("") / "metrics.train.jsonl")]


def wait_for_steps(config, child, n: int) -> None:
    until = time.time() + 120
    while steps_done(config.with_suffix("")) < n and time.time() < until and child.poll() is None:
        time.sleep(0.02)


@pytest.mark.parametrize("kind, placement, words", [
    ("raises", "shard", ["IndexError: list index out of range", "in step"]),
    ("memory", "replicate", ["[rank 1] error: step 4: CUDA out of memory", "planned were"]),
    ("hangs", "replicate", ["rank 1 has done nothing for", "time.sleep"]),
    pytest.param("hangs", "shard", ["rank 1 has done nothing for", "time.sleep"], marks=pytest.mark.slow),
    ("hangs natively", "replicate", ["Timeout (0:00:07", "in fullmatch"]),
])
def test_one_rank_fails(write_config, shell_env, kind, placement, words):
    "The job ends by itself, with the place in that rank; the checkpoint before it is good"
    config = write_config("fails", **SETTINGS, placement=placement)
    child = broken(config, kind, shell_env)
    wait_for_steps(config, child, 2)
    said = finish(child)
    assert child.returncode != 0 and all(w in said for w in words), said
    assert "rank 0 has done nothing" not in said
    assert not find_damage(checkpoints(config.with_suffix(""))[-1])


def test_restarts(write_config, shell_env):
    "With elastic restarts a rank's death costs the steps since the last checkpoint, and changes nothing"
    whole, cut = write_config("whole", **SETTINGS), write_config("cut", **SETTINGS)
    assert subprocess.run(train_command(whole, ranks=2), env=shell_env, capture_output=True).returncode == 0
    child = broken(cut, "dies", shell_env, "--max-restarts=1")
    said = finish(child)
    assert child.returncode == 0, said
    assert "going on after 2" in said and losses(cut) == losses(whole) and len(losses(cut)) == 6


def test_stop_file(write_config, shell_env):
    "A file stops a job of two ranks after it saved; the job has succeeded, and can go on"
    config = write_config("stops", **SETTINGS | dict(max_steps=2000))
    run_dir = config.with_suffix("")
    child = start(train_command(config, ranks=2), shell_env)
    wait_for_steps(config, child, 2)
    (run_dir / "STOP").touch()
    said = finish(child)
    assert child.returncode == 0 and "Stopped by the file STOP after step" in said, said
    done = steps_done(run_dir)
    assert checkpoints(run_dir)[-1].name == f"checkpoint_{done:06}" and not (run_dir / "STOP").exists()
    refused = subprocess.run(
        train_command(config, "--resume", f"optim.lr={1e-3}", ranks=2), env=shell_env,
        capture_output=True, text=True,
    )
    assert (
        refused.returncode == 1
        and "optim.lr: is 0.001" in refused.stderr
        and "in the run to resume" in refused.stderr
    ), refused.stderr
    again = start(train_command(config, "--resume", ranks=2), shell_env)
    wait_for_steps(config, again, done + 2)
    again.send_signal(signal.SIGINT)
    assert f"going on after {done}" in finish(again)


def test_torchrun_is_killed(write_config, shell_env):
    "Without torchrun its ranks save and end, too"
    config = write_config("orphans", **SETTINGS | dict(max_steps=2000))
    child = start(train_command(config, ranks=2), shell_env)
    wait_for_steps(config, child, 2)
    members = process_tree(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert ended(members, 30)
    child.communicate(timeout=10)
    assert (
        checkpoints(config.with_suffix(""))[-1].name == f"checkpoint_{steps_done(config.with_suffix('')):06}"
    )


def test_sigterm_in_time(write_config, shell_env):
    "A preempted job saves and is gone within seconds"
    config = write_config("preempted", **SETTINGS | dict(max_steps=2000), placement="shard")
    child = start(train_command(config, ranks=2), shell_env)
    wait_for_steps(config, child, 2)
    began = time.time()
    child.send_signal(signal.SIGTERM)
    finish(child, 30)
    assert (
        time.time() - began < 20
        and checkpoints(config.with_suffix(""))[-1].name
        == f"checkpoint_{steps_done(config.with_suffix('')):06}"
    )


def nodes(
    n: int, *command: str, env: dict, per_node: int = 2, least: int | None = None, restarts: int = 0
) -> list[subprocess.Popen]:
    "As many agents of torchrun, which meet at a port of this machine"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = [
        f"--nnodes={least or n}:{n}", f"--nproc-per-node={per_node}", f"--max-restarts={restarts}",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=job",
        "--rdzv-conf=last_call_timeout=10",
    ]
    return [start([sys.executable, "-m", "torch.distributed.run", *options, *command], env) for _ in range(n)]


@pytest.mark.parametrize("placement", ["replicate", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_two_nodes(write_config, shell_env, placement):
    "Two agents of torchrun that meet at a port are one job; their number may be a range"
    still = SETTINGS | dict(lora=dict(rank=8))
    one, two = (
        write_config("one", **still | dict(batch_size=4)),
        write_config("two", **still, placement=placement),
    )
    assert subprocess.run(train_command(one), env=shell_env, capture_output=True).returncode == 0
    agents = nodes(
        2, "-m", "mistral_nb.train", str(two), env=shell_env, least=1 if placement == "replicate" else 2
    )
    said = [finish(n) for n in agents]
    assert [n.returncode for n in agents] == [0, 0], said
    assert losses(two) == pytest.approx(losses(one), rel=2e-5) and sum("done: " in s for s in said) == 1


@pytest.mark.slow
def test_restart_on_two_nodes(write_config, shell_env):
    """When a rank dies on one node, those of the other go back to the checkpoint with it, although their
    torchrun counts no restart"""
    whole, cut = write_config("whole", **SETTINGS), write_config("cut", **SETTINGS)
    assert subprocess.run(train_command(whole, ranks=2), env=shell_env, capture_output=True).returncode == 0
    agents = nodes(
        2, str(ROOT / "tests/faults.py"), "dies", "4", str(cut), "timeout_minutes=1", env=shell_env,
        per_node=1, restarts=1,
    )
    said = [finish(n) for n in agents]
    assert [n.returncode for n in agents] == [0, 0], said
    assert losses(cut) == losses(whole) and any("going on after 2" in s for s in said)
