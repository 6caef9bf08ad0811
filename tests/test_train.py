"Whole runs from a shell: alone, under torchrun with one and several ranks, stopped by signals, resumed."
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from conftest import train_command, written_config
from mistral_nb.demo import demo_settings
from mistral_nb.model.weights import load_model
from mistral_nb.model.weights import save_model
from mistral_nb.train.loop import Trainer
from mistral_nb.train.run_dir import checkpoints
from mistral_nb.train.metrics import read_records

FAST = dict(max_steps=6, seq_len=128, eval_freq=3)


def run(command, env, ok=0):
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == ok, done.stdout + done.stderr
    return done


def losses(config) -> list[float]:
    return [r["loss"] for r in read_records(config.with_suffix("") / "metrics.train.jsonl")]


def adapter(config):
    return load_file(checkpoints(config.with_suffix(""))[-1] / "consolidated/lora.safetensors")


def test_shell_and_torchrun_agree(write_demo_config, shell_env):
    "The plain command and torchrun with one process write the same numbers and the same adapter"
    alone, launched = (
        write_demo_config("alone", **FAST, log_freq=1), write_demo_config("launched", **FAST, log_freq=1),
    )
    done = run(train_command(alone), shell_env)
    assert "19,138,816" in done.stdout and "done: " in done.stdout
    run(train_command(launched, ranks=1), shell_env)
    assert len(losses(alone)) == 6 and losses(alone) == losses(launched)
    a, b = adapter(alone), adapter(launched)
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    folder = checkpoints(alone.with_suffix(""))[-1]
    assert sorted(p.name for p in (folder / "consolidated").iterdir()) == [
        "lora.safetensors", "params.json", "tokenizer.model.v3",
    ]
    assert [r["step"] for r in read_records(alone.with_suffix("") / "metrics.eval.jsonl")] == [3, 6]


def test_ranks_share_one_batch(write_config, shell_env):
    "Two ranks with a row each give the losses of one process with two rows, and so do two micro-batches"
    one = write_config("one", **FAST, batch_size=2, log_freq=1)
    two = write_config("two", **FAST, batch_size=1, log_freq=1)
    micro = write_config("micro", **FAST, batch_size=1, num_microbatches=2, log_freq=1)
    for config, ranks in ((one, 0), (two, 2), (micro, 0)): run(train_command(config, ranks=ranks), shell_env)
    assert len(losses(one)) == 6
    for other in (two, micro): assert losses(other) == pytest.approx(losses(one), rel=2e-5)
    evals = [[r["loss"] for r in read_records(c.with_suffix("") / "metrics.eval.jsonl")] for c in (one, two)]
    assert evals[0] == pytest.approx(evals[1], rel=2e-5)
    assert {
        r["tokens"] for c in (one, two) for r in read_records(c.with_suffix("") / "metrics.eval.jsonl")
    } == {136}


def test_mistral_packing_on_two_ranks(write_config, shell_env):
    "Each rank reads its own lines"
    config = write_config("mistral", **FAST, packing="mistral", log_freq=1)
    run(train_command(config, ranks=2), shell_env)
    assert len(losses(config)) == 6


def start_and_wait_for(step: int, config, env, **kw):
    "A run that has logged `step` steps"
    child = subprocess.Popen(
        train_command(config, **kw), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )
    file, until = config.with_suffix("") / "metrics.train.jsonl", time.time() + 120
    while (
        time.time() < until
        and child.poll() is None
        and not (file.exists() and len(file.read_text().split("\n")) > step)
    ):
        time.sleep(0.02)
    assert child.poll() is None, child.communicate()
    return child


LONG = dict(max_steps=25, seq_len=128, log_freq=1, no_eval=True)


@pytest.fixture(scope="module")
def whole(small_demo, tmp_path_factory, shell_env):
    "A run that was never stopped"
    config = written_config(small_demo, tmp_path_factory.mktemp("whole"), "whole", **LONG)
    run(train_command(config), shell_env)
    return config


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_resume_continues(write_config, shell_env, whole, number, code):
    """A signal ends the run on a step's edge with a checkpoint; resuming gives the losses of one that was
    never stopped"""
    cut = write_config("cut", **LONG)
    child = start_and_wait_for(3, cut, shell_env)
    os.kill(child.pid, number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert f"Stopped by {number.name} after step" in err and "resume=true" in err and "Traceback" not in err
    stopped = json.loads((checkpoints(cut.with_suffix(""))[-1] / "training/state.json").read_text())["step"]
    assert 3 <= stopped < 25
    assert "already holds a run" in run(train_command(cut), shell_env, ok=1).stderr
    run(train_command(cut, "resume=true"), shell_env)
    assert losses(cut) == losses(whole)
    a, b = adapter(cut), adapter(whole)
    assert all(a[k].equal(b[k]) for k in b)


def test_second_interrupt_is_now(write_config, shell_env):
    "Two SIGINTs in a row end a run without waiting for the step"
    child = start_and_wait_for(
        1, write_config("now", max_steps=500, seq_len=2048, log_freq=1, no_eval=True), shell_env
    )
    for _ in range(2):
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.05)
    child.communicate(timeout=30)
    assert child.returncode in (130, -signal.SIGINT)  # at once, while it was still starting: Python's own


def test_bad_input_stops_before_any_step(write_config, shell_env, tmp_path):
    "A bad row ends the run with file and line, and leaves no folder behind"
    (tmp_path / "bad.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        '{"messages": 3}\n'
    )
    config = write_config("bad", **FAST)
    done = run(train_command(config, f"data.instruct_data={tmp_path}/bad.jsonl"), shell_env, ok=1)
    assert "bad.jsonl, line 2, messages: 3 is not a list" in done.stderr and "Traceback" not in done.stderr
    assert not config.with_suffix("").exists()
    done = run(train_command(config, "seqlen=3"), shell_env, ok=1)
    assert "seqlen: there is no such setting (did you mean seq_len?)" in done.stderr


def test_too_few_rows_for_the_ranks(write_config, shell_env, tmp_path):
    "A source without a row for every rank is an error at start"
    (tmp_path / "one.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    done = subprocess.run(
        train_command(write_config("few", **FAST), f"data.instruct_data={tmp_path}/one.jsonl", ranks=2),
        env=shell_env, capture_output=True, text=True, timeout=120,
    )
    assert done.returncode != 0 and "one.jsonl has 1 rows for 2 ranks" in done.stderr


def test_merged_checkpoint(write_demo_config, shell_env):
    "save_adapters: false writes a model that loads as one"
    config = write_demo_config("merged", **FAST, save_adapters=False)
    run(train_command(config), shell_env)
    folder = checkpoints(config.with_suffix(""))[-1] / "consolidated"
    assert sorted(p.name for p in folder.iterdir()) == [
        "consolidated.safetensors", "params.json", "tokenizer.model.v3",
    ]
    assert load_model(folder).args.dim == 256


def test_learns(write_demo_config, shell_env):
    "The demo's settings bring the loss on held-out wordings under a tenth"
    config = write_demo_config("learns", log_freq=1)
    run(train_command(config), shell_env)
    evals = [r["loss"] for r in read_records(config.with_suffix("") / "metrics.eval.jsonl")]
    assert losses(config)[0] > 10 and evals[-1] < 0.1 * losses(config)[0]


def test_resume_on_two_ranks(write_config, shell_env):
    "With dropout, each rank goes on with its own random numbers; another number of rows in a step is refused"
    config = write_config(
        "ranks", **FAST | dict(eval_freq=0), log_freq=1, ckpt_freq=3, num_ckpt_keep=None,
        lora=dict(rank=8, dropout=0.3),
    )
    run(train_command(config, ranks=2), shell_env)
    whole = losses(config)
    shutil.rmtree(checkpoints(config.with_suffix(""))[-1])
    said = run(train_command(config, "resume=true"), shell_env, ok=1).stderr
    assert "num_microbatches: a step of 1 processes would have 1 rows, and had 2 (set it to 2)" in said
    run(train_command(config, "resume=true", ranks=2), shell_env)
    assert losses(config) == whole and len(whole) == 6


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_resume_on_another_number_of_ranks(write_config, shell_env, before, after):
    """Two ranks, or one with two micro-batches: a run that changes in the middle goes on with the same
    rows, within rounding"""
    config = write_config(
        "changing", **FAST | dict(eval_freq=0), log_freq=1, ckpt_freq=3, num_ckpt_keep=None, lora=dict(rank=8)
    )
    def many(ranks):
        return train_command(
            config, "resume=true", f"num_microbatches={2 // ranks}", ranks=ranks if ranks > 1 else 0
        )
    run(many(before), shell_env)
    whole, weights = losses(config), adapter(config)
    shutil.rmtree(checkpoints(config.with_suffix(""))[-1])
    run(many(after), shell_env)
    assert (
        losses(config) == pytest.approx(whole, rel=2e-5)
        and losses(config)[:3] == whole[:3]
        and len(whole) == 6
    )
    for name, t in adapter(config).items(): torch.testing.assert_close(t, weights[name], rtol=1e-3, atol=1e-5)


def test_adapter_has_the_type_of_the_base_file(demo, tmp_path):
    """A bf16 model trained in float32 on a CPU still gets a bf16 adapter file: mistral-inference wants one
    type"""
    model = load_model(demo / "model", torch.bfloat16)
    save_model(model.state_dict(), model.args, tmp_path / "model")
    shutil.copy(demo / "model/tokenizer.model.v3", tmp_path / "model")
    trainer = Trainer(
        demo_settings(
            demo, tmp_path / "run", model_id_or_path=str(tmp_path / "model"), max_steps=1, seq_len=64
        )
    )
    folder = trainer.fit().checkpoint
    assert trainer.model.norm.weight.dtype == torch.float32
    assert {t.dtype for t in load_file(folder / "consolidated/lora.safetensors").values()} == {torch.bfloat16}
    assert {
        t.dtype for n, t in load_file(folder / "training/state.safetensors").items() if n.startswith("param")
    } == {torch.float32}


def test_out_of_memory_says_what_to_do(demo, tmp_path, monkeypatch):
    "What was planned, how it is cut, and settings that take less (a GPU's own error cannot be had here)"
    trainer = Trainer(demo_settings(demo, tmp_path / "run", max_steps=2, seq_len=256))

    def full(*args):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
        )
    monkeypatch.setattr("mistral_nb.train.loop.train_step", full)
    with pytest.raises(torch.OutOfMemoryError) as e: trainer.fit()
    said = str(e.value)
    assert (
        said.startswith("step 1: CUDA out of memory; planned were ")
        and "256 tokens at once" in said
        and "what may help: memory_gib: " in said
        and "optimizer" in said
    )
