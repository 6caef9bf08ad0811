"""Runs that are killed without warning, again and again, at any moment: none loses more than the steps
since its last checkpoint."""
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import ended
from conftest import needs_proc
from conftest import steps_done
from conftest import train_command
from mistral_nb.notebook.processes import process_tree
from mistral_nb.train.run_dir import checkpoints
from mistral_nb.train.run_dir import find_damage
from mistral_nb.train.metrics import read_records

KILLS = {ranks: int(os.environ.get("KILLS", n)) for ranks, n in ((0, 2), (2, 1))}  # by ranks; nightly 30
SETTINGS = dict(
    max_steps=12, seq_len=128, batch_size=1, log_freq=1, ckpt_freq=1, no_eval=True, num_ckpt_keep=2,
    lora=dict(rank=8, dropout=0.2),
)


def started(config, env, ranks: int) -> subprocess.Popen:
    return subprocess.Popen(
        train_command(config, "resume=true", ranks=ranks), env=env, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )


def kill_at_random(child: subprocess.Popen, run_dir: Path, rng: random.Random) -> bool:
    """SIGKILL for the whole family shortly after the next step, somewhere in a step or a checkpoint; False
    if the run had ended by then"""
    before, until = steps_done(run_dir), time.time() + 120
    while child.poll() is None and steps_done(run_dir) in (0, before) and time.time() < until:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.3))
    if child.poll() is not None: return False
    members = process_tree(child.pid)
    for pid in members:
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass
    child.communicate(timeout=60)
    return True


@needs_proc
@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_again_and_again(write_config, shell_env, ranks):
    "Losses and adapter of a run that was killed many times are those of one that was not, to the last bit"
    rng, kills = random.Random(ranks), 0
    steps = KILLS[ranks] + 24  # enough for a fast machine not to be through before the last kill
    whole, cut = (write_config(name, **SETTINGS | dict(max_steps=steps)) for name in ("whole", "cut"))
    assert started(whole, shell_env, ranks).wait(timeout=300) == 0
    run_dir = cut.with_suffix("")
    for _ in range(KILLS[ranks]):
        kills += kill_at_random(started(cut, shell_env, ranks), run_dir, rng)
        if steps_done(run_dir) >= steps: break
    assert kills >= min(3, KILLS[ranks])
    last = started(cut, shell_env, ranks)
    _, said = last.communicate(timeout=300)
    assert last.returncode == 0, said
    losses = [
        [r["loss"] for r in read_records(c.with_suffix("") / "metrics.train.jsonl")] for c in (whole, cut)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == steps
    folders = [checkpoints(c.with_suffix(""))[-1] for c in (whole, cut)]
    a, b = (load_file(f / "consolidated/lora.safetensors") for f in folders)
    assert all(a[k].equal(b[k]) for k in a) and not any(map(find_damage, checkpoints(run_dir)))
    assert not list((run_dir / "checkpoints").glob("*.part"))


@needs_proc
def test_one_rank_killed(write_config, shell_env):
    "When one of two ranks dies, the job ends soon, says so, and leaves no process behind; it can be resumed"
    config = write_config("one", **SETTINGS | dict(max_steps=2000))
    child = started(config, shell_env, 2)
    until = time.time() + 120
    while steps_done(config.with_suffix("")) < 2 and time.time() < until: time.sleep(0.02)
    members = process_tree(child.pid)
    ranks = [
        p
        for p in members
        if b"mistral_nb.train" in Path(f"/proc/{p}/cmdline").read_bytes()
        and b"torch.distributed.run" not in Path(f"/proc/{p}/cmdline").read_bytes()
    ]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, said = child.communicate(timeout=90)
    assert child.returncode != 0 and "SIGKILL" in said
    assert ended(members)
    assert not find_damage(checkpoints(config.with_suffix(""))[-1])


def test_no_room_for_a_checkpoint(write_config, shell_env):
    """Files may not grow: training goes on, says so each time and at its end; earlier checkpoints stay,
    nothing half-written does, and it can be resumed"""
    config = write_config("full", **SETTINGS | dict(ckpt_freq=3))
    run_dir = config.with_suffix("")
    subprocess.run(
        train_command(config, "max_steps=12", "resume=true"), env=shell_env, check=True, capture_output=True
    )
    whole = [r["loss"] for r in read_records(run_dir / "metrics.train.jsonl")]
    for folder in checkpoints(run_dir)[1:]: shutil.rmtree(folder)
    kept = checkpoints(run_dir)
    def limit(): return resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = subprocess.run(
        train_command(config, "resume=true"), env=shell_env, capture_output=True, text=True,
        preexec_fn=limit, timeout=120,
    )
    assert (
        done.returncode == 1
        and "error: the checkpoint after step 12 could not be written" in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr
    assert (
        checkpoints(run_dir) == kept
        and not find_damage(kept[0])
        and [p.name for p in (run_dir / "checkpoints").iterdir()] == [kept[0].name]
    )
    subprocess.run(train_command(config, "resume=true"), env=shell_env, check=True, capture_output=True)
    assert [r["loss"] for r in read_records(run_dir / "metrics.train.jsonl")] == whole
    assert checkpoints(run_dir)[-1].name == "checkpoint_000012"
