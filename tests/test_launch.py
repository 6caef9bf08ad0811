"""Jobs that a kernel starts: stopped, killed, broken, followed by another process, left alone by their
kernel; and several nodes under Slurm."""
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager

from conftest import ROOT
from conftest import ended
from conftest import needs_proc
from conftest import steps_done
from mistral_nb.demo import demo_settings
from mistral_nb.notebook.failure import JobFailedError
from mistral_nb.notebook.job import attach
from mistral_nb.notebook.job import view_of
from mistral_nb.notebook.failure import diagnose
from mistral_nb.notebook.processes import process_tree
from mistral_nb.notebook.processes import send_signal
from mistral_nb.notebook.launch import launch
from mistral_nb.train.run_dir import checkpoints
from mistral_nb.train.run_dir import find_damage
from mistral_nb.train.loop import Trainer
from mistral_nb.train.stop import stop_file
from test_kernel import execute

pytestmark = needs_proc
LONG = dict(
    max_steps=3000, seq_len=128, batch_size=1, log_freq=1, no_eval=True, ckpt_freq=5, device="cpu",
    lora=dict(rank=8),
)


@pytest.fixture(autouse=True)
def environment(monkeypatch, shell_env):
    "Jobs get what the shell's runs get"
    for name, value in shell_env.items(): monkeypatch.setenv(name, value)


@pytest.fixture
def settings(demo, tmp_path):
    return lambda run="run", **changes: demo_settings(demo, tmp_path / run, **LONG | changes)


def job_pids(run) -> list[int]: return process_tree(run.pid)


def wait_for(condition, seconds: float = 120) -> None:
    until = time.time() + seconds
    while not condition() and time.time() < until: time.sleep(0.05)
    assert condition()


def test_stop_and_go_on(settings):
    "A stopped job has saved its last step; the same settings with resume give what one run would have given"
    short = dict(max_steps=14, ckpt_freq=0)
    whole = launch(settings("whole", **short), nproc_per_node=2).wait()
    run = launch(settings(**short), nproc_per_node=2)
    for record in run:
        if record.step == 3: break
    pids = job_pids(run)
    assert run.stop().state == "stopped" and ended(pids) and not stop_file(run.run_dir).exists()
    done = run.last.step
    assert (
        3 <= done < 14
        and run.checkpoint.name == f"checkpoint_{done:06}"
        and run.result.name == "lora.safetensors"
    )
    again = launch(settings(**short), resume=True, nproc_per_node=2)
    history = again.wait()
    assert again.state == "finished" and [r.loss for r in history.records] == [r.loss for r in whole.records]
    assert f"going on after {done}" in again.logs(0, None)


def test_pause_and_save(settings):
    "Two processes wait after the same step, save when asked, also while they wait, and go on"
    run = launch(settings(ckpt_freq=0), nproc_per_node=2)
    said = set()

    def has_begun() -> bool:
        said.add(view_of(run).detail)
        return steps_done(run.run_dir) > 2

    wait_for(has_begun)
    assert "starting 2 processes" in said and any("first step" in text for text in said), said
    run.pause()
    time.sleep(1)  # the step that was at work
    done = steps_done(run.run_dir)
    run.save_soon()
    wait_for(lambda: checkpoints(run.run_dir))
    assert checkpoints(run.run_dir)[0].name == f"checkpoint_{done:06}" and run.alive
    assert steps_done(run.run_dir) == done and view_of(run).phase == "paused"
    run.go_on()
    wait_for(lambda: steps_done(run.run_dir) > done + 2)
    assert run.stop().state == "stopped" and not find_damage(checkpoints(run.run_dir)[0])


def test_kill(settings):
    "Nothing is left, not even a job that somebody waits for; what was saved before is good"
    run = launch(settings(), nproc_per_node=2)
    wait_for(lambda: len(checkpoints(run.run_dir)) > 0)
    pids = job_pids(run)
    assert len(pids) >= 4  # the shell, torchrun, two ranks
    run.kill()
    assert (
        ended(pids)
        and (run.state, attach(run.run_dir).state) == ("stopped", "stopped")
        and not find_damage(run.checkpoint)
    )


def test_only_one_writer(settings):
    """A second job or trainer in the same folder is refused while the first one runs, even if the first
    one has lost its shell"""
    run = launch(settings(ckpt_freq=0), nproc_per_node=1)
    pids = []
    try:
        with pytest.raises(ValueError, match="a job is already running"):
            launch(settings(), nproc_per_node=1, resume=True)
        wait_for(lambda: steps_done(run.run_dir) > 2)
        with pytest.raises(ValueError, match="a run is going on in"):
            next(Trainer(settings(), resume=True).steps())
        pids = process_tree(run.pid)
        os.kill(run.pid, signal.SIGKILL)
        assert run.state == "running"
        with pytest.raises(ValueError, match="a job is already running"):
            launch(settings(), nproc_per_node=1, resume=True)
        run.stop()
        assert ended(pids) and run.state == "stopped"
    finally:
        if not ended(pids, 0): send_signal(pids, signal.SIGKILL)


def test_folder_is_gone(settings, tmp_path, monkeypatch):
    "The kernel may move elsewhere; without its folder a job can still be killed"
    monkeypatch.chdir(tmp_path)
    run = launch(settings() | dict(run_dir="my run's"), nproc_per_node=1)
    monkeypatch.chdir("/")
    wait_for(lambda: run.last is not None)
    pids = process_tree(run.pid)
    shutil.rmtree(run.run_dir, ignore_errors=True)
    shutil.rmtree(run.run_dir, ignore_errors=True)
    if not run.run_dir.exists():
        with pytest.raises(JobFailedError, match="is gone, so the job cannot be asked"): run.stop()
    run.kill()
    assert ended(pids)


def test_preempted(settings):
    "A job that is told to end from outside has stopped, not failed, and its adapter can be taken"
    run = launch(settings(), nproc_per_node=2)
    wait_for(lambda: steps_done(run.run_dir) > 2)
    pids = process_tree(run.pid)
    os.kill(run.pid, signal.SIGTERM)
    wait_for(lambda: not run.alive, 60)
    assert ended(pids) and run.state == "stopped" and run.result.exists()


def test_newest_is_damaged(settings):
    "A job goes on from the newest checkpoint that is whole, and its records from there"
    run = launch(settings(max_steps=10), nproc_per_node=1)
    whole = [r.loss for r in run.wait().records]
    (run.checkpoint / "training/state.json").write_text("{")
    with pytest.warns(UserWarning, match="checkpoint_000010 is passed over"):
        again = launch(settings(max_steps=10), nproc_per_node=1, resume=True)
    assert (
        [r.step for r in again][:5] == [1, 2, 3, 4, 5]
        and again.state == "finished"
        and not find_damage(again.checkpoint)
    )
    assert [r.loss for r in again] == whole and "going on after 5" in again.logs(0, None)


def test_refused_before_it_starts(settings):
    "What can be known beforehand is said beforehand, and nothing is lost"
    launch(settings(max_steps=4), nproc_per_node=1).wait()
    for changes, words in (
        (dict(lora=dict(rank=4)), "lora.rank: is 4, and 8 in the run to resume"),
        (dict(batch_size=2), "batch_size: is 2, and 1 in the run to resume"),
    ):
        with pytest.raises(ValueError, match=words):
            launch(settings(max_steps=4) | changes, nproc_per_node=1, resume=True)
    assert attach(settings()["run_dir"]).state == "finished"
    for wrong in (dict(nnodes=0), dict(max_restarts=-1), dict(nproc_per_node=-1)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: .* is less than"):
            launch(settings("other"), **wrong)


def test_rank_is_killed(settings):
    "The error names the rank and the signal, although torchrun may name another"
    run = launch(settings(), nproc_per_node=2)
    wait_for(lambda: steps_done(run.run_dir) > 6)
    pids = job_pids(run)
    ranks = [
        p
        for p in pids
        if b"mistral_nb.train" in Path(f"/proc/{p}/cmdline").read_bytes()
        and b"LOCAL_RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes()
        and b"torch.distributed.run" not in Path(f"/proc/{p}/cmdline").read_bytes()
    ]
    os.kill(ranks[0], signal.SIGKILL)
    with pytest.raises(JobFailedError, match="rank 1: SIGKILL.*\n.*memory ran out") as found: run.wait()
    assert (
        ended(pids)
        and run.state == "failed"
        and "launch(..., resume=True) goes on from checkpoint_" in str(found.value)
    )
    assert found.value._render_traceback_() == [f"JobFailedError: {found.value}"]


def test_bad_row(settings, tmp_path, demo):
    "What a rank says of its input is what the cell says"
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        (demo / "data/train.jsonl").read_text() + '{"messages": [{"role": "robot", "content": "hi"}]}\n'
    )
    run = launch(settings(data=dict(instruct_data=str(bad))), nproc_per_node=2)
    with pytest.raises(
        JobFailedError,
        match=r"before its first record: rank \d: .*bad.jsonl, line 25, messages\[0\].role: "
        r"the role is 'robot'",
    ):
        run.wait()


def test_rank_raises(settings, tmp_path, shell_env):
    "The place in the user's own code is found"
    folder = tmp_path / "launch"
    folder.mkdir()
    config = folder / "config.yaml"
    from mistral_nb.core.settings import load_args, save_args
    save_args(load_args(settings(max_steps=6)), config)
    with open(folder / "torchrun.log", "wb") as log:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            f"--log-dir={folder / 'logs'}", "--redirects=3", str(ROOT / "tests/faults.py"), "raises", "2",
            str(config),
        ]
        assert subprocess.run(command, env=shell_env, stdout=log, stderr=log).returncode == 1
    found = diagnose(folder)
    assert (
        (found.rank, found.error) == (1, "IndexError: list index out of range")
        and "tests/faults.py:" in found.where
        and "IndexError" in found.traceback
    ), found


class Kernel:
    "A Jupyter kernel, for a test"

    def __init__(self, env): self.manager, self.env = KernelManager(kernel_name="python3"), env

    def __enter__(self):
        self.manager.start_kernel(env=self.env)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        return self

    def run(self, code: str, during=None): return execute(self.client, code, during)

    def __exit__(self, *exc):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


START = (
    "from mistral_nb import launch\nrun = launch({settings!r}, nproc_per_node=2, detach={detach})\n"
    "print(run.job['process'])"
)


def test_interrupt_in_a_kernel(settings, shell_env):
    "■ ends the job after a step, saved; the next cell has its records"
    with Kernel(shell_env) as kernel:
        status, said, trace = kernel.run(START.format(settings=settings(), detach=False))
        assert status == "ok", trace
        pids = process_tree(int(said.partition(":")[0]))
        run_dir = Path(settings()["run_dir"])

        def press():
            wait_for(lambda: steps_done(run_dir) > 2)
            pids.extend(process_tree(pids[0]))
            kernel.manager.interrupt_kernel()
        status, said, trace = kernel.run("history = run.wait()", press)
        assert status == "ok" and said.startswith("SIGINT: the job stops after this step"), (said, trace)
        kept = kernel.run("print(history.records[-1].step, run.state)")[1]
        assert kept == f"{steps_done(run_dir)} stopped\n"
        assert ended(pids) and checkpoints(run_dir)[-1].name == f"checkpoint_{steps_done(run_dir):06}"
        assert kernel.run("print(run.state)")[1] == "stopped\n"


@pytest.mark.parametrize("detach", [False, True])
def test_kernel_dies(settings, shell_env, detach):
    "The job saves and ends, or goes on if it was let go; another process finds it either way"
    with Kernel(shell_env) as kernel:
        status, said, trace = kernel.run(
            START.format(settings=settings(max_steps=40 if detach else 3000), detach=detach)
        )
        assert status == "ok", trace
        pids, run_dir = process_tree(int(said.partition(":")[0])), Path(settings()["run_dir"])
        wait_for(lambda: steps_done(run_dir) > 2)
        pids = process_tree(pids[0])
        kernel.manager.shutdown_kernel(now=True)
    run = attach(run_dir)
    if detach: assert run.wait().records[-1].step == 40 and run.state == "finished"
    else:
        assert (
            ended(pids, 30)
            and run.state == "stopped"
            and "the end of the kernel that started it" in run.logs(0)
        )
    assert ended(pids, 30) and run.checkpoint.name == f"checkpoint_{steps_done(run_dir):06}"


FAKES = {  # a cluster of two nodes on this machine
    "sbatch": 'script=$1; SLURM_JOB_NODELIST=two setsid bash "$script" > "$script.log" 2>&1 & '
    "echo Submitted batch job 7",
    "scontrol": "echo 127.0.0.1",
    "srun": '"$@" & "$@" & trap "kill %1 %2" TERM; wait %1 && wait %2',
}


def test_slurm(settings, tmp_path, monkeypatch):
    "The script for sbatch, run by programs that play Slurm: two agents, one job"
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in FAKES.items():
        (bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin / name).chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    alone = launch(settings("alone", max_steps=6, batch_size=2), nproc_per_node=1).wait()
    nodes = launch(settings(max_steps=6), nnodes=2, nproc_per_node=1)
    assert nodes.submit(partition="gpu") == "Submitted batch job 7"
    run = attach(tmp_path / "run")
    assert [r.loss for r in run] == pytest.approx([r.loss for r in alone.records], rel=2e-5)
    wait_for(lambda: run.code is not None, 30)
    assert run.code == 0 and run.state == "finished" and run.result.exists()
