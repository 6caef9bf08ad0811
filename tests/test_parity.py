"""Parity with mistral-finetune, to the recorded numbers.

Tokens, masks, packing, verdicts, logits, gradients, training.

The cases in `tests/data/parity` travel with the repository; a larger set beside it is used if there is one.
"""
import hashlib
import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import parity
from mistral_nb.core.paths import jsonl_files
from mistral_nb.data.sources import TokenizedSource
from mistral_nb.data.convert import convert
from mistral_nb.train.optim import beta1_at
from mistral_nb.train.optim import lr_at
from mistral_nb.train.preference import PairSums
from mistral_nb.train.preference import pair_losses
from mistral_nb.train.preference import Preference

HERE = Path(__file__).parent
ROOTS = (HERE.parents[1] / "shared/parity", HERE / "data/parity")
ROOT = next(p for p in (ROOTS[1:] if os.environ.get("PARITY") == "small" else ROOTS) if p.is_dir())
DATA, EXPECTED, DENSE = ROOT / "data", ROOT / "expected", ROOT / "expected/dense"
VERSION = {"v3": "v3", "tekken": "v3-tekken"}
needs_model = pytest.mark.skipif(
    not DENSE.is_dir(), reason="the recorded model is not part of the repository"
)


def lines(path: Path) -> list[str]: return path.read_bytes().decode("utf-8").split("\n")


def rows(name: str) -> list[dict]: return [json.loads(l) for l in lines(DATA / f"{name}.jsonl") if l]


def arrays(path: Path) -> dict:
    "All arrays of a file, each unpacked once"
    with np.load(path) as f: return dict(f)


def recorded(file: str):
    "`(tokens, mask)` of each sample, and the raw arrays"
    e = arrays(EXPECTED / file)
    return [
        (e["tokens"][a:b].tolist(), e["masks"][a:b].astype(bool).tolist())
        for a, b in zip(e["offsets"], e["offsets"][1:])
    ], e


@pytest.mark.parametrize("version", VERSION)
@pytest.mark.parametrize("name", ["pretrain", "instruct", "fncall"])
def test_encode(name, version):
    found, _ = recorded(f"encode.{name}.{version}.npz")
    assert len(found) >= 20
    for row, want in zip(rows(name), found): assert parity.encode(row, VERSION[version]) == want


def plain_ids(row: dict) -> str:
    "The JSON of a row with its random call ids numbered in order of appearance"
    text, seen = json.dumps(row), {}
    for made in re.findall(r'"(?:id|tool_call_id)": "([a-zA-Z0-9]{9})"', text):
        seen.setdefault(made, f"ID{len(seen) + 1:07d}")
    return re.sub(r'("(?:id|tool_call_id)": ")([a-zA-Z0-9]{9})"', lambda m: f'{m[1]}{seen[m[2]]}"', text)


@pytest.mark.parametrize(
    "name, kind",
    [("ultrachat_like", "ultrachat"), ("openai_legacy", "ultrachat"), ("glaive_like", "glaive")],
)
def test_convert(name, kind):
    "The rows that mistral-finetune's scripts keep, to the byte, and the lines that they skip"
    want = json.loads((EXPECTED / "reformat.json").read_text())[f"{name}.jsonl"]
    found, refused = parity.convert(str(DATA / f"{name}.jsonl"), kind)
    assert (refused, len(found)) == (want["skipped_lines_0based"], want["kept"])
    first = [json.loads(l) for l in lines(EXPECTED / f"reformatted.{name}.first_half.jsonl") if l]
    assert [plain_ids(r) for r in found[: len(first)]] == [plain_ids(r) for r in first]
    assert [hashlib.sha256(plain_ids(r).encode()).hexdigest() for r in found[: len(first)]] == want[
        "sha256_first_half"
    ]


def test_convert_broken():
    "Where the script stops with a traceback, the line is refused"
    want = json.loads((EXPECTED / "reformat.json").read_text())["glaive_bad.jsonl(per line)"]
    assert parity.convert(str(DATA / "glaive_bad.jsonl"), "glaive")[1] == [
        w["line"] - 1 for w in want if w["outcome"] != "kept"
    ]


@pytest.mark.parametrize(
    "name, least", [("ultrachat_like", 0.94), ("openai_legacy", 1.0), ("glaive_like", 0.93)]
)
def test_convert_saves(name, least):
    "The converter keeps more rows than the scripts, accounts for all, and training accepts each"
    done = convert(DATA / f"{name}.jsonl")
    assert (
        done.kept + len(done.refused) == len(rows(name))
        and done.kept / len(rows(name)) >= least
        and all(r["reason"] for r in done.refused)
    )
    assert done.kept > json.loads((EXPECTED / "reformat.json").read_text())[f"{name}.jsonl"]["kept"]
    for row in done.rows: assert parity.verdict(json.dumps(row), "v3") == (True, "")


@pytest.mark.parametrize("version", VERSION)
@pytest.mark.parametrize("name", ["instruct", "fncall"])
def test_chunks(name, version):
    found, e = recorded(f"chunks.{name}.{version}.npz")
    all_rows = rows(name)
    ours = ((line, c) for line, row in enumerate(all_rows) for c in parity.chunks(row))
    assert found
    for (line, chunk), owner, want in zip(ours, e["owner_line"], found):
        assert line == owner
        assert parity.encode(chunk, VERSION[version]) == want


@pytest.fixture(scope="module", autouse=True)
def tokenize_once():
    "The cases read the same few files again and again"
    original, kept = parity.tokenize_source, {}

    def once(source, tokenizer, chunk=False):
        key = (source.path, source.kind, tokenizer.vocab_size, chunk)
        if key not in kept: kept[key] = original(source, tokenizer, chunk).files
        return TokenizedSource(source, kept[key])
    parity.tokenize_source = once
    yield
    parity.tokenize_source = original


I, F, P = (str(DATA / f"{n}.jsonl") for n in ("instruct", "fncall", "pretrain"))
MIXES = {
    "instruct": dict(instruct_data=I), "mix_i3_p1": dict(instruct_data=f"{I}:3", data=f"{P}:1"),
    "fncall": dict(instruct_data=F), "pretrain": dict(data=P),
    "pretrain_shuffle": dict(data=P, shuffle=True),
    "instruct_noshuffle": dict(instruct_data=I, instruct_shuffle=False, chunk=False),
    "fncall_nochunk": dict(instruct_data=F, chunk=False),
    "mix_i2_f1_p05_shuf": dict(instruct_data=f"{I}:2,{F}:1", data=f"{P}:.5", shuffle=True),
    "eval": dict(eval_instruct_data=f"{I},{F}"), "eval_fncall": dict(eval_instruct_data=F),
}
CASES = [p.name for p in sorted(EXPECTED.glob("batches.*.npz")) if "dir_source" not in p.name]


def same_batches(e, key: str, **kw) -> None:
    s, b, w, r, seed = re.search(r"s(\d+)\.b(\d+)\.w(\d+)\.r(\d+)\.seed(\w+)$", key).groups()
    found = parity.batches(
        seq_len=int(s), batch_size=int(b), world_size=int(w), rank=int(r),
        seed=0 if seed == "None" else int(seed), **kw,
    )
    ends = np.cumsum([0, *e[f"{key}.n_sizes"]])
    want = list(
        zip(
            e[f"{key}.x"], e[f"{key}.y"], e[f"{key}.mask"],
            [e[f"{key}.sizes"][a:z].tolist() for a, z in zip(ends, ends[1:])],
        )
    )
    ours = list(itertools.islice(found, 20))
    assert len(ours) == len(want) > 0
    for (x, y, mask, sizes), (wx, wy, wmask, wsizes) in zip(ours, want):
        assert (
            np.array_equal(x, wx)
            and np.array_equal(y, wy)
            and np.array_equal(mask, wmask)
            and sizes == wsizes
        )


@pytest.mark.parametrize("file", CASES)
def test_batches(file):
    _, name, version, _ = file.split(".")
    e = arrays(EXPECTED / file)
    for key in sorted({k.rsplit(".", 1)[0] for k in e}):
        same_batches(e, key, version=VERSION[version], is_eval=name.startswith("eval"), **MIXES[name])


def test_batches_of_a_folder(tmp_path):
    """The reference read the files in the order of its file system; ours sorts, so they get names in that
    order"""
    e = arrays(EXPECTED / "batches.dir_source.npz")
    for i, name in enumerate(e["file_order"]):
        shutil.copy(DATA / "dir_source" / Path(str(name)).name, tmp_path / f"{i}.jsonl")
    assert [p.name for p in jsonl_files(DATA / "dir_source")] == ["a.jsonl", "b.jsonl"]
    for key in sorted({k.rsplit(".", 1)[0] for k in e if k != "file_order"}):
        same_batches(e, key, version=VERSION[key.split(".")[0]], is_eval=False, instruct_data=str(tmp_path))


@pytest.mark.parametrize("file, kind", [("bad.jsonl", "instruct"), ("pretrain_bad.jsonl", "pretrain")])
def test_verdicts(file, kind):
    """What the reference refuses, by a report or by a crash, is refused here with a reason; what it trains
    on is accepted"""
    cases = json.loads((EXPECTED / "verdicts.odd_lines.json").read_text())[file]
    raw = lines(DATA / file)
    for case in cases:
        for version in VERSION:
            ok, why = parity.verdict(raw[case["line"] - 1], VERSION[version], kind)
            assert ok == (case[f"loader_{version}"] == "ok"), (case["line"], case.get("label"), why)
            assert bool(why) != ok
        if "v3_tokens" in case:
            ids, mask = parity.encode(json.loads(raw[case["line"] - 1]), "v3")
            assert (ids, "".join("01"[m] for m in mask)) == (case["v3_tokens"], case["v3_mask"])


@lru_cache(maxsize=None)
def facts(): return json.loads((EXPECTED / "model.json").read_text())


@needs_model
@pytest.mark.parametrize("file, adapter", [("forward.npz", True), ("forward_base.npz", False)])
def test_logits(file, adapter):
    f, e = arrays(DENSE / "forward.npz"), arrays(DENSE / file)
    logits = parity.forward(
        DENSE, DENSE / "lora.safetensors" if adapter else None, f["x"], f["sizes"], 8, 2.0
    )
    assert logits.dtype == torch.float32
    assert np.abs(logits.numpy()[e["logit_positions"]] - e["logits"]).max() < 5e-5


@needs_model
@pytest.mark.parametrize("masked", [True, False])
def test_gradients(masked):
    f = arrays(DENSE / "forward.npz")
    loss, grads = parity.loss_and_grads(
        DENSE, DENSE / "lora.safetensors", f["x"], f["y"], f["mask"] if masked else None, f["sizes"], 8, 2.0
    )
    want = load_file(DENSE / f"grads_{'masked' if masked else 'unmasked'}.safetensors")
    assert abs(loss - float(f["loss_masked" if masked else "loss_unmasked"])) < 5e-6
    assert grads.keys() == want.keys()
    for name, g in grads.items(): assert (g - want[name]).abs().max() < 1e-4 * want[name].abs().max(), name


def train_case(name, **kw):
    log, e = facts()["dense"]["steps"][name], arrays(EXPECTED / "train_batches.npz")
    ends = np.cumsum([0, *e["n_sizes"]])
    every = [
        (e["x"][i], e["y"][i], None if e["mask_is_none"][i] else e["mask"][i], e["sizes"][a:z])
        for i, (a, z) in enumerate(zip(ends, ends[1:]))
    ]
    return log, parity.train(
        DENSE, DENSE / "lora.safetensors", itertools.cycle(every), steps=log["steps"],
        micro=log["num_microbatches"], lr=1e-3, pct_start=log["pct_start"], weight_decay=0.1,
        max_norm=1.0, rank=8, scaling=2.0, dtype="float32", **kw,
    )


@needs_model
@pytest.mark.parametrize(
    "name, file", [("A", "lora_after_A.safetensors"), ("C_micro2", "lora_after_C_micro2.safetensors")]
)
def test_training(name, file):
    log, (losses, adapter) = train_case(name)
    assert len(losses) == len(log["log"])
    for ours, theirs in zip(losses, log["log"]): assert abs(ours - theirs["loss"]) < 5e-6
    want = load_file(DENSE / file)
    for key, t in adapter.items(): assert (t - want[key]).abs().max() < 2e-5, key


@needs_model
def test_tokens_weigh_the_same():
    "By default an uneven pair of micro-batches is averaged over tokens, not over means"
    log, (losses, _) = train_case("C_micro2", average="tokens")
    _, (means, _) = train_case("C_micro2")
    assert max(abs(a - b) for a, b in zip(losses, means)) > 1e-3


@needs_model
def test_schedule():
    for name, want in facts()["schedule"].items():
        total, pct = (
            int(re.search(r"max_steps=(\d+)", name)[1]), float(re.search(r"pct_start=([\d.]+)", name)[1]),
        )
        ours = [[lr_at(s, total, 1e-3, pct), beta1_at(s, total, pct)] for s in range(total)]
        if isinstance(want, str) or total == 1:
            assert ours[0] == [1e-3, 0.85]  # there: a division by zero, or a single step at lr/250000
        else: assert np.abs(np.array(ours) - np.array(want)).max() < 1e-9, name


@needs_model
def test_merge():
    want = load_file(DENSE / "merged_lora_f32_base_f32.safetensors")
    ours = parity.merge(DENSE, DENSE / "lora.safetensors", 2.0, "float32")
    for name, t in want.items(): assert (ours[name] - t).abs().max() < 1e-6, name


@needs_model
def test_extend_vocabulary(tmp_path):
    want = json.loads((EXPECTED / "extend.json").read_text())["f32"]
    ours = parity.extend(EXPECTED / "original_vocab32000_f32.safetensors", tmp_path / "out", 1234)
    for name in ("tok_embeddings.weight", "output.weight"):
        new = ours[name][3:771].double()
        assert abs(float(new.sum()) - want[name]["rows_3_771_random"]["sum"]) < 1e-3
        assert abs(float(ours[name].double().abs().sum()) - want["tensors"][name]["abs_sum"]) < 1e-2


PREFERENCE = ROOT / "preference"
CASES = json.loads((PREFERENCE / "model_losses.json").read_text())
LOSS_NAMES = [name for name, case in CASES.items() if isinstance(case, dict) and "loss" in case]


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_preference_losses(name):
    "Losses and gradients of TRL, transformers and PEFT, on pairs packed into one row"
    loss, norm = parity.preference_case(PREFERENCE, name)
    assert loss == pytest.approx(CASES[name]["loss"], rel=2e-5)
    assert norm == pytest.approx(CASES[name]["grad_norm"], rel=2e-4)


def test_log_probabilities_of_answers():
    "As transformers computes them, one sequence at a time with all logits"
    pairs = json.loads((PREFERENCE / "data.json").read_text())["pairs"]
    sums, want = parity.pair_sums(parity.preference_model(PREFERENCE), pairs), CASES["log_probs_plain"]
    names = dict(chosen="policy_chosen", rejected="policy_rejected", ref_rejected="ref_rejected")
    for ours, theirs in names.items():
        np.testing.assert_allclose(getattr(sums, ours).tolist(), want[theirs], atol=3e-5)
    assert sums.n_chosen.tolist() == CASES["log_probs"]["n_chosen"]


def number_cases() -> list[tuple[str, dict, PairSums]]:
    "Losses of numbers alone, extreme ones among them, that the package has"
    found = json.loads((PREFERENCE / "numbers.json").read_text())
    names = ("policy_chosen", "policy_rejected", "n_chosen", "n_rejected", "ref_chosen", "ref_rejected")
    sums = PairSums(*(torch.tensor(found[name], dtype=torch.float64) for name in names))
    return [(name, case, sums) for name, case in found["losses"].items() if name in NUMBER_LOSSES]


NUMBER_LOSSES = {
    "dpo": Preference("dpo"), "dpo_beta_0.5": Preference("dpo", 0.5), "cdpo_0.1": Preference("dpo", 0.1, 0.1),
    "cdpo_0.3": Preference("dpo", 0.1, 0.3), "dpo_robust_0.1": Preference("robust", 0.3, 0.1),
    "dpo_ipo": Preference("ipo", 0.1), "dpo_sigmoid_norm": Preference("norm", 2.0),
    "simpo": Preference("simpo", 2.0, gamma=1.0), "simpo_instruct": Preference("simpo", 2.5, 0.1, 0.25),
}


def test_preference_losses_of_numbers():
    "Value and derivatives, also at margins of 800"
    cases = number_cases()
    assert len(cases) == len(NUMBER_LOSSES)
    for name, case, sums in cases:
        policy = [t.clone().requires_grad_() for t in (sums.chosen, sums.rejected)]
        mine = pair_losses(replace(sums, chosen=policy[0], rejected=policy[1]), NUMBER_LOSSES[name])
        np.testing.assert_allclose(mine.tolist(), case["each"], rtol=1e-9, atol=1e-12, err_msg=name)
        mine.mean().backward()
        for t, key in zip(policy, ("d_chosen", "d_rejected")):
            np.testing.assert_allclose(t.grad.tolist(), case[key], rtol=1e-9, atol=1e-12, err_msg=name)
