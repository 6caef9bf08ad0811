"""Settings of every odd kind: accepted and shown as taken, or refused in one sentence that names the
field; never a traceback, never a hang."""
import datetime
import math
import time
import warnings
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from mistral_nb import cli
from mistral_nb.core.config import ConfigError, parse_yaml
from mistral_nb.core.paths import folder_notes
from mistral_nb.core.settings import check_overlap, check_paths, load_args, non_defaults, TrainArgs

ODD = [
    None, True, False, 0, -1, 1, 3, 10**7, 10**30, 10**4400, 1.5, -0.5, 1e-300, 1e300, math.nan, math.inf,
    -math.inf, "", " ", "abc", "4", "1e-4", "24GB", "8k", "5%", "true", "none", "auto", "~", "~nobody/x",
    "$NOPE/x", "a:b:2", "a,b", "a:", ":2", "a:nan", "a:-1", "\x1b[31mred", "\u202ereversed", "\x00",
    "x" * 100_000, "é/ü 漢", [], [1], ["wq"], [["wq"]], [None], {}, {"a": 1}, {1: 2},
    datetime.date(2024, 1, 2), Path("a/b"), b"bytes", (1, 2), {1, 2}, 1 + 2j,
]  # noqa: E501
DEEP: list = []
for _ in range(500): DEEP = [DEEP]
MINIMAL = dict(model_id_or_path="m", run_dir="r", data=dict(instruct_data="d.jsonl"))


def keys(cls: type = TrainArgs, prefix: str = "") -> list[str]:
    "Every setting by its dotted name"
    out = []
    for f in fields(cls):
        out += keys(f.type, f"{prefix}{f.name}.") if is_dataclass(f.type) else [prefix + f.name]
    return out


def with_value(name: str, value) -> dict:
    out = {k: dict(v) if isinstance(v, dict) else v for k, v in MINIMAL.items()}
    node, (*blocks, key) = out, name.split(".")
    for block in blocks: node = node.setdefault(block, {})
    node[key] = value
    return out


@pytest.mark.parametrize("name", [*keys(), *sorted({k.rpartition(".")[0] for k in keys() if "." in k})])
def test_odd_value(name, monkeypatch):
    monkeypatch.delenv("NOPE", raising=False)
    for value in [*ODD, DEEP]:
        began = time.monotonic()
        try: args = load_args(with_value(name, value))
        except ConfigError as e:
            said = str(e)
            assert name.split(".")[0] in said or name.split(".")[-1] in said or isinstance(value, dict), said
            assert len(said) < 1000 and "\n" not in said
        else:
            taken = dict((n, v) for n, v, _ in non_defaults(args))
            default = TrainArgs()
            for part in name.split("."): default = getattr(default, part)
            assert is_dataclass(default) or name in taken or taken_as(args, name) == default
            str(args), args._repr_html_()
        assert time.monotonic() - began < 1


def taken_as(args, name: str):
    for part in name.split("."): args = getattr(args, part)
    return args


TEXTS = {
    "a key twice": (
        "seq_len: 8\nlora: {rank: 4}\nseq_len: 16\n", "seq_len stands twice, on line 1 and line 3",
    ),
    "a key twice in a block": ("lora:\n  rank: 4\n  rank: 8\n", "rank stands twice, on line 2 and line 3"),
    "a number of 5000 digits": ("seed: " + "9" * 5000 + "\n", "is not YAML"),
    "a date that is none": ("run_dir: 2024-13-45\n", "is not YAML"),
    "a date": ("run_dir: 2024-01-02\n", 'write run_dir: "2024-01-02", in quotes'),
    "base 60": ("run_dir: 12:30:45\n", "in quotes"),
    "an alias of itself": ("lora: &a\n  rank: *a\n", "lora.rank"),
    "aliases of aliases": (
        "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10) if i else '1'}]\n" for i in range(9)),
        "there is no such setting",
    ),
    "python": ("run_dir: !!python/object/apply:os.system [ls]\n", "is not YAML"),
    "tabs": ("lora:\n\trank: 4\n", "is not YAML: line 2"),
    "a list": ("- a\n- b\n", "has no `key: value` lines"),
    "two documents": ("a: 1\n---\nb: 2\n", "is not YAML"),
    "a complex key": ("? [a]\n: b\n", "is not YAML"),
    "an unknown key": ("learning_rate: 1\n", "there is no such setting"),
    "deep": ("a: " + "[" * 3000 + "\n", "is not YAML"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_odd_yaml(name, tmp_path, capsys):
    "In a file, as a shell user meets it"
    text, said = TEXTS[name]
    file = tmp_path / "config.yaml"
    file.write_text(text)
    began = time.monotonic()
    assert cli.main(["train", str(file)]) == 1
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and len(err) < 2000 and time.monotonic() - began < 10


def test_merged_blocks():
    "Anchors and merges are YAML's own, and stay"
    assert parse_yaml("a: &a {x: 1}\nb:\n  <<: *a\n  y: 2\n", "t") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


def test_paths_are_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELF", str(tmp_path / "shelf"))
    (tmp_path / "shelf").mkdir()
    (tmp_path / "m").mkdir()
    (tmp_path / "shelf/a.jsonl").write_text("{}\n")
    args = check_paths(
        load_args(
            dict(
                model_id_or_path="~/m", run_dir="$SHELF/run",
                data=dict(instruct_data="${SHELF}/a.jsonl:2", cache="~/cache"),
            )
        )
    )
    assert (args.model_id_or_path, args.run_dir, args.data.cache) == (
        f"{tmp_path}/m", f"{tmp_path}/shelf/run", f"{tmp_path}/cache",
    )


def test_paths_with_colons_and_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:2", "b,c.jsonl"): (tmp_path / name).write_text("{}\n")
    with pytest.raises(ConfigError, match="a:2 is a path with a colon"):
        load_args(with_value("data.instruct_data", "a:2"))
    (tmp_path / "m").mkdir()
    with pytest.raises(ConfigError, match="is one path with a comma"):
        check_paths(load_args(with_value("data.instruct_data", "b,c.jsonl")))


def test_overlap(tmp_path):
    "A file and its folder are one source twice; evaluation rows that are trained are said"
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="its rows would count twice"):
        check_overlap(load_args(with_value("data.instruct_data", f"{tmp_path}/d,{tmp_path}/d/a.jsonl:2")))
    both = load_args(
        with_value("data.instruct_data", f"{tmp_path}/d"),
        data=dict(eval_instruct_data=f"{tmp_path}/d/a.jsonl"),
    )
    with pytest.warns(UserWarning, match="is trained on too"): check_overlap(both)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_overlap(load_args(with_value("data.instruct_data", f"{tmp_path}/d")))


def test_secrets_in_addresses():
    for uri in (
        "https://me:pw@host/",
        "https://host/?token=abc",
        "http://host/x?a=1&api_key=abc",
        "https://host/#secret=1",
    ):
        with pytest.raises(ConfigError, match="mlflow.tracking_uri: holds a password"):
            load_args(with_value("mlflow.tracking_uri", uri))
    assert load_args(with_value("mlflow.tracking_uri", "https://host/?team=sea")).mlflow.tracking_uri


def test_held_out_files_of_a_folder_are_named(tmp_path):
    "Whatever a file for evaluation is called, a training that reads it says so"
    for name in ("train", "testset", "held-out", "contest"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    (note,) = folder_notes(tmp_path)
    assert "held-out.jsonl, testset.jsonl are read for training" in note
