"Demo folders for the tests that run whole programs, and the order in which files are run."
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mistral_nb.core.config import to_dict
from mistral_nb.core.settings import load_args
from mistral_nb.demo import demo_settings, make_data, make_demo, make_model
from mistral_nb.model.args import ModelArgs

ROOT = Path(__file__).resolve().parents[1]
SMALL = ModelArgs(
    dim=64, n_layers=2, head_dim=16, hidden_dim=128, n_heads=4, n_kv_heads=2, norm_eps=1e-5, vocab_size=32768,
    rope_theta=1e6,
)
LONGEST = (
    "test_ranks test_faults test_launch test_kills test_train test_jupyter test_check test_cli "
    "test_benchmarks test_variants"
).split()


def pytest_collection_modifyitems(items: list) -> None:
    "Files that take long come first, so that no process is left with one at the end"
    def place(item) -> int:
        return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
    items.sort(key=place)


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    "A model folder with data, made once"
    return make_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory) -> Path:
    "The same with a model that takes a tenth of the time, for tests that are about processes"
    folder = tmp_path_factory.mktemp("small_demo")
    make_model(folder / "model", shape=SMALL)
    make_data(folder / "data")
    return folder


def written_config(demo: Path, folder: Path, name: str, **changes) -> Path:
    "A YAML file of demo settings with changes on top"
    settings = demo_settings(demo, folder / name, **changes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(to_dict(load_args(settings))))
    return path


@pytest.fixture
def write_config(small_demo, tmp_path):
    "Writes a YAML file of settings for the small model; returns its path"
    return lambda name="config", **changes: written_config(small_demo, tmp_path, name, **changes)


@pytest.fixture
def write_demo_config(demo, tmp_path):
    "The same for the demo's model"
    return lambda name="config", **changes: written_config(demo, tmp_path, name, **changes)


@pytest.fixture(scope="session")
def shell_env() -> dict[str, str]:
    "The environment of a child: this package, one thread, nothing of torchrun or a test runner"
    drop = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "IN_TEST")
    kept = {k: v for k, v in os.environ.items() if k not in drop and not k.startswith("PYTEST_XDIST")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def train_command(config: Path, *overrides: str, ranks: int = 0) -> list[str]:
    "The shell command of a run, under torchrun if `ranks`"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return [sys.executable, *launcher, "-m", "mistral_nb.train", str(config), *overrides]


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds the processes of a run in /proc",
)


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


def pack_fp8(folder: Path) -> None:
    "Pack the matrices of a model folder as Mistral publishes fp8: e4m3 codes, and one scale for each matrix"
    file, params = folder / "consolidated.safetensors", folder / "params.json"
    state = load_file(file)
    for name in [n for n in state if re.search(r"\.w[1-3kovq]\.weight$", n)]:
        stem, scale = name.removesuffix("weight"), state[name].abs().max().float() / 448
        state |= {name: (state[name] / scale).to(torch.float8_e4m3fn), f"{stem}qscale_weight": scale}
        state[f"{stem}qscale_act"] = torch.tensor(0.1)
    save_file(state, file)
    packing = dict(quantization=dict(qformat_weight="fp8_e4m3", qscheme_act="TENSOR"))
    params.write_text(json.dumps(json.loads(params.read_text()) | packing))
