"""Runs at their edges: extended, shortened, damaged, vanished; files that others can read, and equal bytes
of equal runs."""
import hashlib
import json
import os
import shutil
import stat
import warnings
from pathlib import Path

import pytest
import torch

from mistral_nb.core.config import ConfigError
from mistral_nb.data.cache import container_cores, available_cores
from mistral_nb.demo import demo_settings
from mistral_nb.train.loop import Trainer
from mistral_nb.train.plan import use_threads

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(demo, tmp_path):
    return lambda name="run", **kw: demo_settings(
        demo, tmp_path / name,
        **(dict(max_steps=4, seq_len=64, ckpt_freq=2, log_freq=1, no_eval=True, threads=1) | kw),
    )


def test_fewer_steps_than_done(settings):
    Trainer(settings()).fit()
    with pytest.raises(ConfigError, match="max_steps: is 3, and 4 steps are done"):
        Trainer(settings(), max_steps=3, resume=True)
    assert not Trainer(settings(), resume=True).fit().records  # as many: there is nothing to do


def test_extended(settings):
    "The jump of the learning rate is said, and a lower peak keeps it low"
    Trainer(settings()).fit()
    with pytest.warns(
        UserWarning, match=r"max_steps is 40, and was 4: the learning rate goes on at .* optim.lr="
    ) as said:
        longer = Trainer(settings(), max_steps=40, resume=True)
    low = (
        next(str(w.message) for w in said if "optim.lr=" in str(w.message))
        .split("optim.lr=")[1]
        .split(",")[0]
    )
    jump = next(iter(longer.steps())).lr
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lower = Trainer(settings(), f"optim.lr={low}", max_steps=40, resume=True)
        assert next(iter(lower.steps())).lr == pytest.approx(jump / 10, rel=0.1)


def test_damaged_files_are_passed_over(settings):
    "Sums that are no sums, metrics that are no records"
    run = Path(settings()["run_dir"]) if isinstance(settings(), dict) else Path(settings().run_dir)
    Trainer(settings()).fit()
    (run / "checkpoints/checkpoint_000004/training/sha256.json").write_text("[1]")
    with open(run / "metrics.train.jsonl", "a") as f: f.write('[1]\n{"loss": 3}\nnull\n')
    with pytest.warns(UserWarning) as said: again = Trainer(settings(), resume=True)
    assert again.step == 2 and any(
        "checkpoint_000004 is passed over: training/sha256.json is missing or damaged" in str(w.message)
        for w in said
    )
    with pytest.warns(UserWarning, match="is no record"): again.fit()
    assert [json.loads(line)["step"] for line in (run / "metrics.train.jsonl").read_text().splitlines()] == [
        1, 2, 3, 4,
    ]


def test_run_dir_that_vanishes(settings):
    "Said, made again, and the run goes on"
    trainer = Trainer(settings())
    with pytest.warns(UserWarning, match="has vanished: it is made again"):
        for step in trainer.steps():
            if step.step == 1: shutil.rmtree(trainer.args.run_dir)
    run = Path(trainer.args.run_dir)
    assert [json.loads(line)["step"] for line in (run / "metrics.train.jsonl").read_text().splitlines()] == [
        1, 2, 3, 4,
    ]
    assert (run / "checkpoints/checkpoint_000004/consolidated/lora.safetensors").exists() and (
        run / "args.yaml"
    ).exists()


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_modes(settings, umask):
    "A server under another user can read what the umask lets it"
    before = os.umask(umask)
    try: trainer = Trainer(settings())
    finally: os.umask(before)
    before = os.umask(umask)
    try: trainer.fit()
    finally: os.umask(before)
    files = [p for p in Path(trainer.args.run_dir).rglob("*") if p.is_file() and p.name != ".lock"]
    assert len(files) > 6 and {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o666 & ~umask}


def test_model_folder_that_vanishes(demo, tmp_path):
    "A checkpoint needs nothing of it any more"
    model = tmp_path / "model"
    shutil.copytree(demo / "model", model)
    trainer = Trainer(
        demo_settings(demo, tmp_path / "run", max_steps=2, seq_len=64, no_eval=True),
        model_id_or_path=str(model),
    )
    tokenizer = trainer.tokenizer.file.read_bytes()
    shutil.rmtree(model)
    folder = trainer.fit().checkpoint / "consolidated"
    assert (folder / trainer.tokenizer.file.name).read_bytes() == tokenizer


def test_equal_runs_are_equal_bytes(settings):
    "Every file of a checkpoint but the settings, which name the folder"
    def sums(name: str) -> dict[str, str]:
        folder = Trainer(settings(name)).fit().checkpoint
        files = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("state.json", "sha256.json")]
        return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    found = [sums(f"run{i}") for i in range(4)]
    assert len(found[0]) >= 4 and all(f == found[0] for f in found)


def test_threads(settings, tmp_path, monkeypatch):
    """The container's share and the binding of the process say how many; a setting and the environment say
    otherwise"""
    for name, text, share in (
        ("two", "200000 100000", 2), ("half", "50000 100000", 0.5), ("none", "max 100000", float("inf")),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpu.max").write_text(text)
        assert container_cores(tmp_path / name) == share
    (tmp_path / "v1/cpu").mkdir(parents=True)
    for name, value in (("quota", -1), ("period", 100000)):
        (tmp_path / f"v1/cpu/cpu.cfs_{name}_us").write_text(str(value))
    assert (
        container_cores(tmp_path / "v1") == float("inf")
        and container_cores(tmp_path / "nowhere") == float("inf")
        and 1 <= available_cores() <= os.cpu_count()
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("mistral_nb.train.plan.available_cores", lambda: 1)
    torch.set_num_threads(2)
    assert (
        use_threads(None, "cpu") == 1 == torch.get_num_threads()
        and use_threads(2, "cpu") == 2
        and use_threads(None, "cuda") is None
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    assert use_threads(None, "cpu") == 2
    torch.set_num_threads(1)
    assert "threads" in str(Trainer(settings()))
    resumed = Trainer(settings(threads=1)).fit() and Trainer(settings(threads=None), resume=True)
    assert resumed.args.threads == 1
