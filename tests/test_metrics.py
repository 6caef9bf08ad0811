"The services that take a run's records, each for real: TensorBoard files, W&B offline, an MLflow store on disk."
import subprocess
import sys

import pytest

from mistral_nb.core.config import load_args
from mistral_nb.core.config import save_args
from mistral_nb.train.loop import Trainer
from mistral_nb.train.metrics import MLFlow


@pytest.fixture
def settings(demo, tmp_path):
    from mistral_nb.demo import demo_settings
    return lambda **kw: demo_settings(demo, tmp_path / "run", max_steps=2, seq_len=64, log_freq=1, eval_freq=1, no_ckpt=True, **kw)


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
    Trainer(settings(wandb=dict(project="demo", offline=True, run_name="first"))).fit()
    found = list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(found) == 1 and b"train/loss" in found[0].read_bytes()
    assert "x" * 40 not in (tmp_path / "run/args.yaml").read_text()


def test_wandb_without_a_key(tmp_path, shell_env):
    "Online without a key is an error that names the environment variable, not a prompt"
    env = {k: v for k, v in shell_env.items() if not k.startswith("WANDB")} | {"NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)}
    code = "from mistral_nb.train.metrics import Wandb; Wandb('run', 'demo', {})"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "set the environment variable WANDB_API_KEY" in done.stderr


def test_key_in_config_is_dropped(tmp_path):
    "A key in a YAML file is warned about and goes nowhere"
    with pytest.warns(UserWarning, match="WANDB_API_KEY"):
        args = load_args(dict(model_id_or_path="m", run_dir="r", data=dict(instruct_data="d"), wandb=dict(project="p", key="secret-key")))
    save_args(args, tmp_path / "args.yaml")
    assert "secret-key" not in (tmp_path / "args.yaml").read_text() + repr(args)


def test_mlflow_store(settings, tmp_path):
    "Metrics and settings stand in a local store"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    records = Trainer(settings(mlflow=dict(tracking_uri=uri, experiment_name="demo"))).fit().records
    client = MLFlow(uri, "demo", {}).client
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id], filter_string="attributes.status = 'FINISHED'")
    assert len(runs) == 1 and runs[0].data.params["lora.rank"] == "32"
    history = client.get_metric_history(runs[0].info.run_id, "train.loss")
    assert [m.value for m in sorted(history, key=lambda m: m.step)] == pytest.approx([r.loss for r in records])
