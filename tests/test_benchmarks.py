"Each benchmark runs at its tiny size, so that it runs when somebody needs it."
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
COMMANDS = {
    "step.py": ["--tiny", "--moe", "--steps", "1"], "tokens.py": ["--tiny"], "quant.py": ["--tiny"],
    "load.py": ["--tiny", "--kinds", "none", "nf4"],
    "scale.py": ["--tiny", "--kinds", "none", "--processes", "1", "2"],
    "generate.py": ["--tiny"], "pane.py": ["--tiny"],
    "export.py": ["--tiny", "--layers", "1", "--cases", "peft", "hf"],
    "gpu.py": ["--tiny", "--steps", "1", "--storages", "none", "nf4", "--parts", "experts"],
}


def test_every_benchmark_is_here():
    "A new benchmark is run here, too"
    assert set(COMMANDS) == {p.name for p in FOLDER.glob("*.py") if "argparse" in p.read_text()}


SLOW = [pytest.param(name, marks=pytest.mark.slow if name != "load.py" else ()) for name in COMMANDS]


@pytest.mark.parametrize("name", SLOW)
def test_benchmark(name):
    "It ends well and prints a table"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), *COMMANDS[name]], capture_output=True, text=True,
        timeout=300, env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "───" in done.stdout and "Error" not in done.stdout, done.stdout
