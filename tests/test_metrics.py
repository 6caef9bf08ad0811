"""The services that take a run's records, each for real: TensorBoard files, W&B offline, an MLflow store
on disk, a server that is silent."""
import socket
import subprocess
import sys
import time

import pytest

from mistral_nb.core.config import ConfigError
from mistral_nb.core.settings import load_args
from mistral_nb.core.settings import save_args
from mistral_nb.demo import demo_settings
from mistral_nb.train import tracking
from mistral_nb.train.metrics import answer_rows
from mistral_nb.train.metrics import read_samples_log
from mistral_nb.train.run_dir import run_marker
from mistral_nb.train.loop import Trainer
from mistral_nb.train.tracking import MLFlow


@pytest.fixture
def settings(demo, tmp_path):
    return lambda **kw: demo_settings(
        demo, tmp_path / "run", max_steps=2, seq_len=64, log_freq=1, eval_freq=1, no_ckpt=True, **kw
    )


def test_tensorboard(settings, tmp_path):
    "Scalars can be read back from the event file"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    records = Trainer(settings(tensorboard=True)).fit().records
    events = EventAccumulator(str(tmp_path / "run/tb")).Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx([r.loss for r in records])
    assert [e.step for e in events.Scalars("eval/perplexity")] == [1, 2]


def test_wandb_offline(settings, tmp_path, monkeypatch):
    "Offline mode writes a run to disk and needs no key; a key never reaches args.yaml"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 300.0)  # its program starts slowly on a busy machine
    Trainer(settings(wandb=dict(project="demo", offline=True, run_name="first"))).fit()
    found = list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(found) == 1
    patience = time.monotonic() + 60  # wandb's own program may write the last block after `finish` is back
    while b"train/loss" not in found[0].read_bytes() and time.monotonic() < patience: time.sleep(0.1)
    assert b"train/loss" in found[0].read_bytes()
    assert "x" * 40 not in (tmp_path / "run/args.yaml").read_text()


def test_wandb_without_a_key(tmp_path, shell_env):
    "Online without a key is an error that names the environment variable, not a prompt"
    env = {k: v for k, v in shell_env.items() if not k.startswith("WANDB")} | {
        "NETRC": str(tmp_path / "none"), "HOME": str(tmp_path),
    }
    code = "from mistral_nb.train.tracking import Wandb; Wandb('run', 'demo', {})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "set the environment variable WANDB_API_KEY" in done.stderr


def test_key_in_config_is_dropped(tmp_path):
    "A key in a YAML file is warned about and goes nowhere"
    with pytest.warns(UserWarning, match="WANDB_API_KEY"):
        args = load_args(
            dict(
                model_id_or_path="m", run_dir="r", data=dict(instruct_data="d"),
                wandb=dict(project="p", key="secret-key"),
            )
        )
    save_args(args, tmp_path / "args.yaml")
    assert "secret-key" not in (tmp_path / "args.yaml").read_text() + repr(args)


def test_mlflow_store(settings, tmp_path):
    "Metrics and settings stand in a local store"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    records = Trainer(settings(mlflow=dict(tracking_uri=uri, experiment_name="demo"))).fit().records
    client = MLFlow(uri, "demo", {}).client
    runs = client.search_runs(
        [client.get_experiment_by_name("demo").experiment_id], filter_string="attributes.status = 'FINISHED'"
    )
    assert len(runs) == 1 and runs[0].data.params["lora.rank"] == "32"
    history = client.get_metric_history(runs[0].info.run_id, "train.loss")
    assert [m.value for m in sorted(history, key=lambda m: m.step)] == pytest.approx(
        [r.loss for r in records]
    )


@pytest.fixture
def silent(monkeypatch):
    "A server that takes connections and never says a word"
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server: yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_silent_server(settings, silent):
    "Training waits a bounded time, says one sentence, and goes on"
    began = time.monotonic()
    with pytest.warns(UserWarning, match="did not answer within 1 s; training goes on without it"):
        history = Trainer(settings(mlflow=dict(tracking_uri=silent))).fit()
    assert len(history.records) == 2 and time.monotonic() - began < 30


def test_silent_server_stops(settings, silent, tmp_path):
    "on_tracking_error: stop refuses to start, and leaves nothing that counts as a run"
    with pytest.raises(ConfigError, match="did not answer within 1 s"):
        Trainer(settings(mlflow=dict(tracking_uri=silent), on_tracking_error="stop")).fit()
    assert run_marker(tmp_path / "run") is None
    assert len(Trainer(settings()).fit().records) == 2


def test_server_that_falls(settings, tmp_path, monkeypatch):
    "In the middle of a run: saved and ended, with the reason"
    class Falls:
        def log(self, record): raise OSError("connection reset")
        def close(self): pass
    monkeypatch.setattr("mistral_nb.train.tracking.MLFlow", lambda *args: Falls())
    def slow(self, record, log=tracking.Service.log):
        log(self, record)
        time.sleep(0.2)
    monkeypatch.setattr(tracking.Service, "log", slow)
    run = Trainer(settings(mlflow=dict(tracking_uri="http://host"), on_tracking_error="stop"), max_steps=8)
    with pytest.raises(KeyboardInterrupt, match="connection reset"): run.fit()


def test_answers_while_training(small_demo, tmp_path):
    "Before the first step and at each evaluation; a run that goes on repeats none, and losses do not change"
    asked = dict(sample_prompts=["What <b>opens</b>?", ""], sample_tokens=4, no_eval=True, eval_freq=2)
    how = dict(max_steps=5, seq_len=128, ckpt_freq=1, lora=dict(rank=4, dropout=0.1), device="cpu")
    plain = [r.loss for r in Trainer(demo_settings(small_demo, tmp_path / "plain", **how)).steps()]
    settings = demo_settings(small_demo, tmp_path / "asked", **how, **asked)
    first = Trainer(settings)
    losses = [next(r for r in first.steps()).loss]  # closed after one step, as if killed
    losses += [r.loss for r in Trainer(settings, resume=True).steps()]
    assert losses == plain
    found = read_samples_log(tmp_path / "asked")
    assert [r.step for r in found] == [0, 2, 4, 5]
    assert all(r.questions == ("What <b>opens</b>?", "") and len(r.answers) == 2 for r in found)
    assert [row[:2] for row in answer_rows(found)] == list(zip(found[0].questions, found[0].answers))
