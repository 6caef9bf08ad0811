"A demo folder for the tests that run whole programs."
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from mistral_nb.core.settings import load_args
from mistral_nb.core.config import to_dict
from mistral_nb.demo import demo_settings
from mistral_nb.demo import make_demo

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    "A model folder with data, made once"
    return make_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def write_config(demo, tmp_path):
    "Writes a YAML file of demo settings with changes on top; returns its path"
    def write(name: str = "config", **changes) -> Path:
        settings = demo_settings(demo, tmp_path / name, **changes)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(to_dict(load_args(settings))))
        return path
    return write


@pytest.fixture(scope="session")
def shell_env() -> dict[str, str]:
    "The environment of a child: this package, one thread, nothing of torchrun or a test runner"
    drop = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "IN_TEST")
    return {k: v for k, v in os.environ.items() if k not in drop} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def train_command(config: Path, *overrides: str, ranks: int = 0) -> list[str]:
    "The shell command of a run, under torchrun if `ranks`"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return [sys.executable, *launcher, "-m", "mistral_nb.train", str(config), *overrides]


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of a run in /proc")


def steps_done(run_dir: Path) -> int:
    file = run_dir / "metrics.train.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def ended(pids: list[int], seconds: float = 30) -> bool:
    "Whether none of some processes lives, soon"
    until = time.time() + seconds
    while (living := any(Path(f"/proc/{p}").exists() for p in pids)) and time.time() < until: time.sleep(0.1)
    return not living


@pytest.fixture(scope="module")
def one_thread():
    "On matrices this small, threads would mostly wait for each other"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
