"""The data and training tests on the lowest or the newest versions of the direct requirements.

They run in an environment of their own.

    python tools/versions.py lowest|newest [--keep FOLDER] [--torch 2.7.0]
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = [
    "nbdev>=2.4.14,<3", "execnb<0.2", "fastcore<2", "ghapi<3", "fastgit<0.2", "ipykernel", "nbclient",
    "pytest",
]
TESTS = [
    "test_data", "test_cases", "test_check", "test_parity", "test_config", "test_train", "test_ranks",
    "test_cli",
]


def requirements() -> list[str]:
    "The direct requirements in settings.ini"
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]["requirements"].split()


def lowest(requirement: str) -> str:
    "`name==version` of the lower bound of a requirement"
    name, bound = re.fullmatch(r"([\w.-]+)(?:\[[^]]*\])?>=([\d.]+).*", requirement).groups()
    return f"{name}=={bound}"


def pip(python: Path, *words: str) -> None:
    "Install, free of the constraints that this machine's pip may have"
    env = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    subprocess.run([python, "-m", "pip", "install", "-q", *words], check=True, cwd=ROOT, env=env)


def main() -> int:
    "Install and test; the exit code of the tests"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=("lowest", "newest"))
    parser.add_argument("--keep", type=Path, help="an environment to make, or to use again")
    parser.add_argument("--torch", help="another release of PyTorch than the lowest or newest")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        home = options.keep or Path(d) / "venv"
        python = home / "bin/python"
        if not python.exists(): venv.create(home, with_pip=True)
        exact = [lowest(r) for r in requirements()] if options.which == "lowest" else []
        if options.torch:
            exact = [e for e in exact if not e.startswith("torch=")] + [f"torch=={options.torch}"]
        (Path(d) / "exact.txt").write_text("\n".join(exact))
        eager = ["--upgrade-strategy", "eager"] if options.which == "newest" else []
        pip(python, "-U", *eager, "-c", f"{d}/exact.txt", "-e", str(ROOT), *TOOLS)
        names = [re.split(r"[\[>]", r)[0] for r in requirements()]
        shown = (
            "import importlib.metadata as m, sys; "
            "print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ')"
        )
        subprocess.run([python, "-c", shown, *names], check=True)
        files = [f"tests/{t}.py" for t in TESTS if (ROOT / f"tests/{t}.py").exists()]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{home}/bin:{os.environ['PATH']}"}
        return subprocess.run([python, "-m", "pytest", "-q", *files], cwd=ROOT, env=env).returncode


if __name__ == "__main__": sys.exit(main())
