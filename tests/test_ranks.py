"""The same numbers from one process and from several, whether each has the model or all divide it: every
kind of weight, adapter and checkpoint."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ranks as worker
from conftest import ROOT, pack_fp8
from mistral_nb.demo import make_data, make_model
from mistral_nb.model.args import ModelArgs, MoeArgs, QueryScaling, YarnArgs
from mistral_nb.model.weights import load_model, save_tensors
from mistral_nb.train.run_dir import checkpoints
from mistral_nb.train.dist import FSDP_SINCE

SHAPE = ModelArgs(
    dim=64, n_layers=2, head_dim=16, hidden_dim=128, n_heads=4, n_kv_heads=2, norm_eps=1e-5, vocab_size=32768
)
NAMES = [*worker.DIVIDED, *worker.COPIED, *worker.PIECES]
IS_OLD = tuple(map(int, torch.__version__.split(".")[:2])) < FSDP_SINCE
HYBRID = ["dense", "full", "moe_nf4"]
SAVED = [
    "dense", "moe", "dora", "pissa", "also", "merged", "full", "full_recompute", "nf4", "hf",
    "fp8_merged",
]
ON_FOUR = [*SAVED, *worker.COPIED, "moe_pieces"]  # the other variants run on four ranks at night


def to_hf(folder: Path, out: Path) -> None:
    "A model folder in Hugging Face's layout"
    d, state = SHAPE.head_dim, load_model(folder).state_dict()
    names = {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "tok_embeddings": "model.embed_tokens",
        "output": "lm_head",
    }
    theirs = {}
    for name, w in state.items():
        if ".wq." in name or ".wk." in name:
            w = w.view(-1, d // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
        new = "model.norm.weight" if name == "norm.weight" else name.replace("layers.", "model.layers.")
        for mine, their in names.items():
            new = new.replace(mine, their) if mine != "output" or name.startswith("output") else new
        theirs[new] = w
    out.mkdir()
    save_tensors(theirs, out / "model.safetensors")
    for file in folder.iterdir():
        if file.suffix != ".safetensors": (out / file.name).write_bytes(file.read_bytes())


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    "Models and data"
    root = tmp_path_factory.mktemp("ranks")
    for name, change in dict(
        model={}, tied=dict(tied_embeddings=True),
        moe=dict(moe=MoeArgs(num_experts=4, num_experts_per_tok=2)), packed8={},
        new=dict(sliding_window=(None, 24), yarn=YarnArgs(4.0, 32), llama_4_scaling=QueryScaling(32, 0.2)),
    ).items():
        make_model(root / name, 0, replace(SHAPE, **change))
    pack_fp8(root / "packed8")
    to_hf(root / "model", root / "hf")
    make_data(root / "data")
    (root / "few.jsonl").write_text(
        (root / "data/eval.jsonl").read_text().split("\n")[0] + "\n"
    )  # fewer rows than ranks
    return root


def on_four(items: list) -> list[str]:
    "The variants that some test wants on four ranks"
    wanted = {
        i.callspec.params["name"]
        for i in items
        if getattr(i, "callspec", None) and i.callspec.params.get("ranks") == 4
    }
    return [name for name in NAMES if name in wanted | set(SAVED)]


@pytest.fixture(scope="module")
def found(root, shell_env, request) -> dict:
    "What came of all variants on 1, 2 and 4 ranks, and of some on two times two"
    def launch(n: int, names: list[str], **env) -> dict:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}",
            str(ROOT / "tests/ranks.py"), str(root), *names,
        ]
        done = subprocess.run(command, env=shell_env | env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return json.loads((root / f"{n}{'.hybrid' if env else ''}.json").read_text())
    if IS_OLD: return {n: launch(n, list(worker.COPIED)) for n in (1, 2, 4)}
    return {
        1: launch(1, NAMES), 2: launch(2, NAMES), 4: launch(4, on_four(request.session.items)),
        "hybrid": launch(4, HYBRID, NODES="2"),
    }


@pytest.fixture(autouse=True)
def left_out(request) -> None:
    "Skips what this PyTorch cannot divide"
    name = request.node.callspec.params["name"] if hasattr(request.node, "callspec") else None
    if IS_OLD and name and name not in worker.COPIED: pytest.skip("this PyTorch cannot divide a model")


@pytest.mark.skipif(not IS_OLD, reason="this PyTorch divides models")
def test_old_torch_says_so(root, shell_env):
    "A PyTorch that cannot divide a model names the version that can"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tests/ranks.py"), str(root), "dense"]
    done = subprocess.run(command, env=shell_env, capture_output=True, text=True)
    assert done.returncode and "cannot divide a model among processes (use 2.12 or a later one" in done.stderr


@pytest.mark.parametrize("ranks, name", [
    *((2, name) for name in NAMES),
    *(pytest.param(4, name, marks=() if name in ON_FOUR else pytest.mark.slow) for name in NAMES),
])
def test_same_numbers(found, name, ranks):
    "Losses, gradient norms and evaluation do not depend on the number of ranks"
    one, many = found[1][name], found[ranks][name]
    assert (
        one["loss"] == pytest.approx(many["loss"], rel=1e-5)
        and one["norm"] == pytest.approx(many["norm"], rel=1e-4)
        and one["eval"] == pytest.approx(many["eval"], rel=1e-5)
    )
    assert (
        min(one["norm"]) > 0 and len(set(one["loss"])) == 3 and many["divided"] == (name not in worker.COPIED)
    )


@pytest.mark.parametrize("name", HYBRID)
def test_same_numbers_hybrid(found, name):
    "Nor on the model being divided within each of two nodes"
    one, many = found[2][name], found["hybrid"][name]
    assert (
        one["loss"] == pytest.approx(many["loss"], rel=1e-5)
        and one["norm"] == pytest.approx(many["norm"], rel=1e-4)
        and many["held"] == one["held"] * 2
    )


@pytest.mark.parametrize("name", ["dense", "moe", "nf4", "full"])
def test_weights_are_divided(found, name):
    "Each of n ranks holds an n-th of the matrices"
    whole = found[1][name]["held"][0]
    for n in (2, 4):
        for held in found[n][name]["held"]:
            assert held == pytest.approx(whole / n, rel=0.12 if name != "full" else 1e-9)


@pytest.mark.parametrize("name", SAVED)
def test_same_checkpoint(root, found, name):
    "What is saved is whole, and the same"
    folders = [checkpoints(root / f"{name}.{n}")[-1] for n in (1, 2, 4)]
    for file in sorted(p.relative_to(folders[0]) for p in folders[0].rglob("*.safetensors")):
        one, *many = (load_file(f / file) for f in folders)
        for other in many:
            assert {k for k in one if not k.startswith("rng.")} == {
                k for k in other if not k.startswith("rng.")
            }
            for k, t in one.items():
                if not k.startswith("rng."):
                    assert (t - other[k]).abs().max() <= 1e-3 * t.abs().max() + 1e-6, (file, k)


@pytest.mark.parametrize("name", worker.GOES_ON)
def test_goes_on_elsewhere(root, found, name):
    """One process goes on with the run of two that divided the model, and two with that of one, as one
    would have done"""
    def one(ranks: int) -> list[float]:
        return [
            r.loss
            for r in worker.trainer(
                root, name, 1, run_dir=str(root / f"{name}.{ranks}"), resume=True, max_steps=5
            ).steps()
        ]
    alone = one(1)
    assert (
        len(alone) == 2
        and one(2) == pytest.approx(alone, rel=1e-5)
        and found[2][f"{name} goes on"]["loss"] == pytest.approx(alone, rel=1e-5)
    )
