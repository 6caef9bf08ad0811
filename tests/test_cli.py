"The program, as a newcomer types it."
import io
import re
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import train_command
from mistral_nb.cli import main


@pytest.fixture(scope="module")
def session(tmp_path_factory, shell_env):
    "A demo, once: its folder and what it printed"
    folder = tmp_path_factory.mktemp("cli") / "demo_run"
    return folder, program(shell_env, "demo", "--folder", str(folder)).stdout


def program(env, *argv, stdin="", ok=0):
    "The program in a process of its own"
    command = [sys.executable, "-m", "mistral_nb", *argv]
    done = subprocess.run(command, env=env, input=stdin, capture_output=True, text=True, timeout=300)
    assert done.returncode == ok, done.stdout + done.stderr
    return done


@pytest.fixture
def here(monkeypatch):
    "The program in this process, which has imported everything already"
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # the program sets its own

    def run(*argv, stdin="", ok=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            try: code = main(list(argv))
            except SystemExit as stop: code = stop.code
        assert code == ok, out.getvalue() + err.getvalue()
        return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())
    return run


def test_demo_learns(session):
    """In under 60 seconds: eval loss under a tenth, at least 8 of 10 held-out questions right after and
    none before"""
    _, said = session
    seconds, before, after = map(
        float, re.search(r"trained \d+ steps in ([\d.]+) s, eval loss ([\d.]+) -> ([\d.]+)", said).groups()
    )
    wrong, total, right, _ = map(
        int, re.search(r"answered: (\d+) of (\d+) before, (\d+) of (\d+) after", said).groups()
    )
    assert after < before / 10 and wrong == 0 and total >= 10 and right >= 0.8 * total
    assert "⟦ It is a harbour cat named Pim.</s>⟧" in said
    assert seconds < 60 * 4  # a loaded machine is not a failure; the usual time stands in the tutorial


def test_demo_twice(session, shell_env):
    "A second demo in the same folder trains again beside the first"
    folder, _ = session
    program(shell_env, "demo", "--folder", str(folder), "--steps", "2")
    assert (folder / "run").is_dir() and (folder / "run-2").is_dir()


def test_generate_and_chat(session, shell_env, here):
    "The adapter that the demo wrote answers; without it the model does not"
    folder, _ = session
    adapter = ["--adapter", str(folder / "run/checkpoints/checkpoint_000040"), "--max-tokens", "24"]
    assert (
        "It is a harbour cat named Pim."
        in program(shell_env, "generate", str(folder / "model"), "Do you have a cat?", *adapter).stdout
    )
    assert (
        "Pim" not in here("generate", str(folder / "model"), "Do you have a cat?", "--max-tokens", "8").stdout
    )
    asked = "What about dogs?\nDo you have a cat?\n"
    both = here("generate", str(folder / "model"), *adapter, "--compare", stdin=asked).stdout
    assert "Dogs get a free biscuit." in both and "base" in both
    talk = program(
        shell_env, "chat", str(folder / "model"), *adapter,
        stdin="Do you have a cat?\n/base Do you have a cat?\n\n",
    ).stdout
    assert talk.count("Pim") == 1


def test_complete(session, here):
    "Texts go on, from arguments and line by line; the gap between two is filled"
    folder, _ = session
    short = ["--max-tokens", "3"]
    said = here("complete", str(folder / "model"), "The cat", "A dog", *short).stdout
    assert [line[:5] for line in said.splitlines() if line[:5] in ("The c", "A dog")] == ["The c", "A dog"]
    assert here("complete", str(folder / "model"), *short, stdin="The cat\n\n").stdout.startswith("The cat")
    assert here("complete", str(folder / "model"), "def f(", "--suffix", "return", *short).stdout.strip()


def test_models(here):
    "The table, narrowed, for a GPU that is not here"
    said = here("models", "7B", "v0.3", "--gpu", "24", "--fits").stdout
    assert "7B-Instruct-v0.3" in said and "LoRA, QLoRA" in said and "Nemo" not in said


def test_show(demo, here):
    "Tokens and mask of a line; every format of the demo can be shown"
    train = str(demo / "data/train.jsonl")
    said = here("show", train, "--tokenizer", str(demo / "model"), "--line", "4").stdout
    assert "line 4" in said and "saltwater" in said and "⟦" in said
    for file in sorted((demo / "data/formats").glob("*.jsonl")):
        here("show", str(file), "--kind", "pretrain" if file.stem in ("text", "content") else "instruct")


def test_mistakes_are_explained(demo, shell_env, here, write_config):
    "Wrong folders, files and settings are sentences on stderr, not tracebacks"
    for argv, said in [
        (("generate", str(demo / "data"), "Hi"), "has no params.json"),
        (("generate", str(demo / "model"), "Hi", "--adapter", "nowhere"), "there is no adapter at nowhere"),
        (("complete", str(demo / "model"), "Hi", "--suffix", "x", "--system", "y"), "--system"),
        (("complete", str(demo / "model"), "a", "b", "--suffix", "x"), "--suffix: give one text"),
        (("extend-vocab", str(demo / "model"), "out"), "only a model with 32,000 is extended"),
        (("download", "ministral"), "near names are Ministral"),
        (("models", "--gpu", "H10"), "there is no GPU 'H10' here"),
        (("show", "no.jsonl"), "No such file"),
        (("show", str(demo / "data/train.jsonl"), "--tokenizer", "v4"), "there is no tokenizer 'v4'"),
        (("train", "no.yaml"), "no.yaml: cannot be read"),
        (
            ("train", str(write_config("x")), "lora.rnk=4"),
            "lora.rnk: there is no such setting (did you mean rank?)",
        ),
    ]:
        done = here(*argv, ok=1)
        assert said in done.stderr and "Traceback" not in done.stderr, done.stderr
    done = program(shell_env, "train", "no.yaml", ok=1)
    assert "no.yaml: cannot be read" in done.stderr and "Traceback" not in done.stderr
    assert "usage: mistral-nb" in here("teach", ok=2).stderr


def test_commands_agree(shell_env, here):
    "`mistral-nb train --help` and the module's help say the same of overrides and of resuming"
    a = here("train", "--help").stdout
    b = subprocess.run([*train_command("--help")], env=shell_env, capture_output=True, text=True).stdout
    assert all("--resume" in said and "key=value" in said for said in (a, b))


def test_check(demo, write_config, tmp_path):
    """A config is checked as training would read it; bad rows make the exit code 1, and their corrected
    file makes it 0"""
    good = write_config("good")
    assert main(["check", str(good), f"data.cache={tmp_path}/cache"]) == 0
    rows = (demo / "data/train.jsonl").read_bytes()
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(rows.replace(b'"role": "user"', b'"role": "human"', 2) + b"{\n")
    assert main(["check", str(good), f"data.instruct_data={bad}", "--create-corrected", "--findings"]) == 1
    assert bad.read_bytes().count(b"human") == 2
    assert main(["check", str(good), f"data.instruct_data={bad}.corrected"]) == 0
    assert Path(f"{bad}.corrected").read_bytes().count(b"\n") == rows.count(b"\n")
    assert main(["check", str(good), f"data.instruct_data={bad}", f"model_id_or_path={tmp_path}/none"]) == 1


def test_plan(session, here):
    "A run against this machine, and one that does not fit"
    folder, _ = session
    config = folder / "plan.yaml"
    config.write_text(
        f"model_id_or_path: {folder}/model\nrun_dir: {folder}/planned\n"
        f"data:\n  instruct_data: {folder}/data/train.jsonl\n"
    )
    assert "tokens at once, nothing recomputed" in here("plan", str(config)).stdout
    small = here("plan", str(config), "memory_gib=0.2", "device=cpu", ok=1).stdout
    assert "does not fit" in small and "free on CPU" in small
    assert not (folder / "planned").exists()
