"""Every kind of adapter beside peft's, and whole runs of every variant of the settings: resumed, loaded,
switched off, merged, cut into pieces."""
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import pack_fp8
from mistral_nb.core.settings import load_args
from mistral_nb.data.batches import eval_batches
from mistral_nb.demo import make_data, make_model
from mistral_nb.infer.chat import load_tuned
from mistral_nb.model.args import ModelArgs, MoeArgs, QueryScaling, YarnArgs
from mistral_nb.model.lora import (
    adapter_off, adapter_state, lora_layers, add_adapters, add_adapters_like, init_pissa,
    load_adapter_state, merged_state, subtract_from_base,
)
from mistral_nb.model.layouts import unpermute
from mistral_nb.model.weights import load_model, save_model
from mistral_nb.train.checkpoint import trainable_params
from mistral_nb.train.loop import Trainer, effective_scaling
from mistral_nb.train.optim import adamw, set_lr
from mistral_nb.train.step import mean_loss

HF = dict(
    vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, sliding_window=None, max_position_embeddings=128,
    attn_implementation="eager",
)
PROJECTIONS = dict(
    wq="q_proj", wk="k_proj", wv="v_proj", wo="o_proj", w1="gate_proj", w2="down_proj", w3="up_proj"
)
KINDS = {  # settings of lora, and what peft calls them
    "lora": ({}, {}),
    "dora": (dict(dora=True), dict(use_dora=True)),
    "rslora": (dict(rslora=True), dict(use_rslora=True)),
    "pissa": (dict(init="pissa"), dict(init_lora_weights="pissa")),
    "attention": (dict(targets=["wq", "wv"]), {}),
    "feed_forward": (dict(targets=["w1", "w2", "w3"]), {}),
    "dora_rslora_some": (
        dict(dora=True, rslora=True, targets=["wk", "w2"]), dict(use_dora=True, use_rslora=True),
    ),
}
RANK, SCALING = 4, 1.5
CLOSE = dict(rtol=1e-4, atol=1e-5)


pytestmark = pytest.mark.usefixtures("one_thread")


def close(mine: torch.Tensor, theirs: torch.Tensor, **kw) -> None:
    torch.testing.assert_close(mine.detach(), theirs.detach(), **CLOSE | kw)


def generator(seed: int) -> torch.Generator: return torch.Generator().manual_seed(seed)


def ordered(name: str, t: torch.Tensor) -> torch.Tensor:
    "A tensor of an adapted layer, with the rows of a query or key projection in Mistral's order"
    if not any(f".{w}." in name for w in ("wq", "wk")) or "lora_A" in name: return t
    return unpermute(t, 16) if t.dim() == 2 else unpermute(t[:, None], 16)[:, 0]


def their_name(name: str) -> str:
    "peft's name of an adapter's tensor"
    for mine, theirs in PROJECTIONS.items(): name = name.replace(f".{mine}.", f".{theirs}.")
    name = (
        name.replace("attention", "self_attn")
        .replace("feed_forward", "mlp")
        .replace("lora_magnitude", "lora_magnitude_vector.weight")
    )
    return "base_model.model.model." + name.replace(".weight", ".default.weight")


@torch.no_grad()
def base_models(folder: Path):
    "A random Mistral of transformers, and the package's from the folder that it was saved in"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**HF)).float()
    g = generator(1)
    for p in theirs.parameters():
        p.normal_(float(p.dim() == 1), 0.3 if p.dim() == 1 else 1.2 * p.shape[-1] ** -0.5, generator=g)
    theirs.save_pretrained(folder)
    return theirs, load_model(folder)


@torch.no_grad()
def same_adapter(kind: str, folder: Path):
    "peft's model and the package's with the same random adapter of a kind"
    peft = pytest.importorskip("peft")
    (theirs, mine), (settings, options) = base_models(folder), KINDS[kind]
    args = load_args(
        model_id_or_path="m", run_dir="r", data=dict(instruct_data="d"),
        lora=dict(rank=RANK, scaling=SCALING, **settings),
    )
    add_adapters(mine, RANK, effective_scaling(args), targets=args.lora.targets, dora=args.lora.dora)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=int(RANK * SCALING),
        target_modules=[PROJECTIONS[t] for t in args.lora.targets], task_type="CAUSAL_LM", **options,
    )
    theirs = peft.get_peft_model(theirs, config)
    there, g = dict(theirs.named_parameters()), generator(2)
    for n, layer in lora_layers(mine).items():
        if kind == "pissa":
            subtract_from_base(
                layer, there[their_name(f"{n}.lora_A.weight")],
                ordered(f"{n}.lora_B", there[their_name(f"{n}.lora_B.weight")]),
            )
        for part, p in layer.named_parameters():
            if not part.startswith("lora_"): continue
            t = there[their_name(f"{n}.{part}")]
            if p.dim() == 1: t *= 1 + 0.2 * torch.randn(t.shape, generator=g)
            else: t += 0.3 * p.shape[1] ** -0.5 * torch.randn(t.shape, generator=g)
            p.copy_(ordered(f"{n}.{part}", t))
    return theirs, mine


def ids(n: int = 40) -> torch.Tensor: return torch.randint(3, 200, (n,), generator=generator(n))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_gradients(kind, tmp_path):
    "Logits and the gradient of every adapted tensor are peft's, one layer recomputed or none."
    theirs, mine = same_adapter(kind, tmp_path)
    x = ids()
    want = theirs(x[None]).logits[0]
    F.cross_entropy(want[:-1], x[1:]).backward()
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    assert {their_name(n) for n in trainable_params(mine)} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    for mine.recompute in (0, 1):
        mine.zero_grad()
        got = mine(x, [len(x)])
        close(got, want)
        F.cross_entropy(got[:-1], x[1:]).backward()
        for n, p in trainable_params(mine).items():
            assert p.grad.abs().max() > 1e-4, n
            close(p.grad, ordered(n, grads[their_name(n)]))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_peft_merged(kind, tmp_path):
    """Merged weights are peft's, a file read into a new model gives the same logits, and switched off the
    base is left."""
    theirs, mine = same_adapter(kind, tmp_path / "base")
    x, base = ids(), load_model(tmp_path / "base")
    tuned, state = mine(x, [len(x)]), adapter_state(mine)
    with adapter_off(mine): close(mine(x, [len(x)]), base(x, [len(x)]))
    assert (tuned - base(x, [len(x)])).abs().max() > 0.1
    again = add_adapters_like(load_model(tmp_path / "base"), state)
    load_adapter_state(again, state)
    close(again(x, [len(x)]), tuned)
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name, want in load_model(tmp_path / "merged").named_parameters():
        close(merged_state(mine)[name], want)


@torch.no_grad()
@pytest.mark.parametrize("rank, exact", [(4, False), (8, True)])
def test_pissa_start(rank, exact, tmp_path):
    """What goes into the adapter and what stays are peft's, or nearly as much where directions are
    searched for, and the model is still the base."""
    peft = pytest.importorskip("peft")
    theirs, mine = base_models(tmp_path)
    x, before = ids(), mine(ids(), [40])
    theirs = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=rank, lora_alpha=int(rank * SCALING), target_modules=list(PROJECTIONS.values()),
            init_lora_weights="pissa",
        ),
    )
    init_pissa(add_adapters(mine, rank, SCALING), 0)
    there = dict(theirs.named_parameters())
    for n, layer in lora_layers(mine).items():
        a, b = (there[their_name(f"{n}.lora_{k}.weight")] for k in "AB")
        best = SCALING * b @ a
        assert 0.995 * best.norm() < layer.delta().norm() < 1.0001 * best.norm()
        if not exact: continue
        close(layer.delta(), ordered(f"{n}.base", best), rtol=1e-4, atol=1e-5)
        close(
            layer.base.weight,
            ordered(
                f"{n}.base", there[their_name(f"{n}.lora_A.weight").replace("lora_A.default", "base_layer")]
            ),
            rtol=1e-4,
            atol=1e-5,
        )
    close(mine(x, [len(x)]), before, rtol=1e-4, atol=1e-4)
    close(mine(x, [len(x)]), theirs(x[None]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_lora_plus(ratio, tmp_path):
    "Three steps leave the weights that peft's optimizer leaves."
    from peft.optimizers import create_loraplus_optimizer
    theirs, mine = same_adapter("lora", tmp_path)
    lr, decay, x = 1e-3, 0.1, ids()
    before = {n: p.detach().clone() for n, p in trainable_params(mine).items()}
    opt = adamw(trainable_params(mine), lr, decay, ratio)
    set_lr(opt, lr)
    other = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay,
        betas=(0.9, 0.95), eps=1e-8,
    )
    for _ in range(3):
        for model, o, logits in (
            (mine, opt, lambda: mine(x, [len(x)])), (theirs, other, lambda: theirs(x[None]).logits[0]),
        ):
            o.zero_grad()
            F.cross_entropy(logits()[:-1], x[1:]).backward()
            o.step()
    there = dict(theirs.named_parameters())
    moved = {
        k: max(
            (p - before[n]).abs().max().item() for n, p in trainable_params(mine).items() if f"lora_{k}" in n
        )
        for k in "AB"
    }
    assert ratio / 2 < moved["B"] / moved["A"] < ratio * 2
    for n, p in trainable_params(mine).items():
        close(p, ordered(n, there[their_name(n)]), rtol=1e-4, atol=lr * ratio * 0.01)


SHAPE = ModelArgs(
    dim=64, n_layers=2, head_dim=16, hidden_dim=128, n_heads=4, n_kv_heads=2, norm_eps=1e-5,
    vocab_size=32768, rope_theta=1e6,
)
NEW = dict(  # windows of each layer, stretched positions, longer queries, as in Ministral
    sliding_window=(None, 24), yarn=YarnArgs(4.0, 32), llama_4_scaling=QueryScaling(32, 0.2),
)
ALSO = ["norms", "embeddings", "output"]
SMALL = 0.0275  # GiB, too small for a whole batch
RUNS = {  # changes to the settings
    "plain": {},
    "nf4": dict(quantize="nf4"),
    "int8": dict(quantize="int8"),
    "fp8": dict(quantize="fp8"),
    "all_recomputed": dict(checkpoint=True),
    "one_recomputed": dict(checkpoint=1),
    "none_recomputed": dict(checkpoint=False),
    "dora": dict(lora=dict(dora=True)),
    "pissa": dict(lora=dict(init="pissa")),
    "lora_plus": dict(lora=dict(lr_ratio=4)),
    "rslora": dict(lora=dict(rslora=True)),
    "also": dict(lora=dict(also_train=ALSO)),
    "also_dora": dict(lora=dict(also_train=["norms"], dora=True)),
    "some": dict(lora=dict(targets=["wq", "wv"])),
    "dropout": dict(lora=dict(dropout=0.1), checkpoint=1),
    "dora_dropout": dict(lora=dict(dropout=0.1, dora=True), checkpoint=1),
    "float16": dict(dtype="float16"),
    "float16_also": dict(dtype="float16", lora=dict(also_train=ALSO)),
    "bfloat16_pissa": dict(dtype="bfloat16", lora=dict(init="pissa")),
    "nf4_dora": dict(quantize="nf4", lora=dict(dora=True)),
    "fp8_also": dict(quantize="fp8", lora=dict(also_train=ALSO)),
    "pieces": dict(memory_gib=SMALL),
    "pieces_dropout": dict(memory_gib=SMALL, lora=dict(dropout=0.1), checkpoint=1),
    "tied": {},
    "tied_rslora_dora": dict(lora=dict(rslora=True, dora=True)),
    "tied_also": dict(lora=dict(also_train=ALSO)),
    "moe_dropout": dict(lora=dict(dropout=0.1), checkpoint=1),
    "moe_dora": dict(lora=dict(dora=True)),
    "moe_nf4_some": dict(quantize="nf4", lora=dict(targets=["wo", "w2"])),
    "moe_pissa": dict(lora=dict(init="pissa")),
    "new": {},
    "new_nf4": dict(quantize="nf4", checkpoint=1),
    "packed8": {},
    "packed8_nf4": dict(quantize="nf4"),
    "packed8_pieces": dict(memory_gib=SMALL),
    "stored16": {},
    "stored16_pissa": dict(lora=dict(init="pissa")),
    "stored16_also": dict(lora=dict(also_train=ALSO, dora=True)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "Models, tied and not, and data"
    folder = tmp_path_factory.mktemp("variants")
    for name, change in dict(
        model={}, tied=dict(tied_embeddings=True),
        moe=dict(moe=MoeArgs(num_experts=4, num_experts_per_tok=2)), stored16={}, new=NEW, packed8={},
    ).items():
        make_model(folder / name, 0, replace(SHAPE, **change))
    pack_fp8(folder / "packed8")
    save_model(load_model(folder / "stored16", torch.bfloat16).state_dict(), SHAPE, folder / "stored16")
    make_data(folder / "data")
    return folder


def trainer(folder: Path, run: str, name: str, **values) -> Trainer:
    "The run of a variant, in the folder `run`"
    changes = RUNS[name] | values
    lora = dict(rank=4, **changes.pop("lora", {}))
    models = ("tied", "moe", "stored16", "new", "packed8")
    model = folder / next((m for m in models if name.startswith(m)), "model")
    data = dict(instruct_data=str(folder / "data/train.jsonl"), cache=str(folder / "cache"))
    return Trainer(
        dict(
            model_id_or_path=str(model), run_dir=str(folder / run), data=data, lora=lora,
            optim=dict(lr=5e-3, weight_decay=0.0), seq_len=96, batch_size=1, max_steps=4, ckpt_freq=2,
            device="cpu",
        )
        | changes
    )


@dataclass
class Done:
    "A run that ended."
    name: str
    folder: Path
    trainer: Trainer
    losses: list[float]


@pytest.fixture(scope="module", params=RUNS)
def done(request, folder) -> Done:
    "Four steps without a stop"
    t = trainer(folder, f"{request.param}-whole", request.param)
    return Done(request.param, folder, t, [r.loss for r in t.steps()])


def content(file: Path) -> tuple[dict, bytes]:
    "Header and bytes of a safetensors file; the library writes the header's notes in any order"
    raw = file.read_bytes()
    n = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:n]), raw[n:]


def files(run: Path) -> dict[str, tuple[dict, bytes]]:
    "Weights and optimizer in the last checkpoint"
    return {p.name: content(p) for p in (run / "checkpoints/checkpoint_000004").rglob("*.safetensors")}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    was = model.training
    out = model.eval()(ids(), [25, 15])
    model.train(was)
    return out


def test_run(done):
    """The losses are numbers, that of all rows falls, the setting had its effect, and every line of the
    log is JSON."""
    t = done.trainer
    assert len(done.losses) == 4 and all(map(math.isfinite, done.losses)), done.losses
    rows = list(eval_batches(t.data, t.args.seq_len))
    with torch.no_grad():
        with adapter_off(t.model): before = mean_loss(t.model, rows)
        after = mean_loss(t.model, rows)
    assert after[1] == before[1] > 0 and after[0] < before[0] - 0.01, (before, after)
    assert (t.plan.limit is not None) == ("pieces" in done.name), t.plan
    assert t.model.recompute == {
        "all_recomputed": 2, "one_recomputed": 1, "dropout": 1, "dora_dropout": 1, "pieces_dropout": 1,
        "moe_dropout": 1,
    }.get(done.name, t.plan.recompute)
    assert all(p.dtype == torch.float32 for p in trainable_params(t.model).values()) and all(
        p.grad is not None for p in trainable_params(t.model).values()
    )
    def strict(word):
        return pytest.fail(f"{word} is no JSON")
    for line in (done.folder / f"{done.name}-whole/metrics.train.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=strict)


def test_resume(done):
    """Two steps, a stop, a new trainer and two steps give the losses and the files of four steps, to the
    last bit."""
    run = f"{done.name}-cut"
    first = trainer(done.folder, run, done.name)
    losses = [r.loss for r, _ in zip(first.steps(), range(2))]
    second = trainer(done.folder, run, done.name, resume=True)
    assert second.step == 2
    losses += [r.loss for r in second.steps()]
    assert losses == done.losses
    whole, cut = files(done.folder / f"{done.name}-whole"), files(done.folder / run)
    assert (
        "lora.safetensors" in cut
        and ("trained.safetensors" in cut) == ("also" in done.name)
        and whole.keys() == cut.keys()
    )
    for name in whole: assert whole[name] == cut[name], name


def test_load_tuned(done):
    """A checkpoint on its base gives the logits of the trainer's model, and both without the adapter those
    of the base."""
    t = done.trainer
    base, kind, dtype = t.args.model_id_or_path, t.args.quantize, t.model.dtype
    tuned = load_tuned(base, t.history.checkpoint, dtype, quantize=kind)
    want, plain = logits(t.model), logits(load_model(base, dtype, quantize=kind))
    assert (logits(tuned) - want).norm() < (
        5e-3
        if "stored16" in done.name
        else 0.15
        if dtype == torch.bfloat16
        else 0.05
        if dtype == torch.float16
        else 1e-4
    ) * (want - plain).norm()
    near = (
        dict(rtol=0, atol=0.02)
        if "stored16" in done.name
        else dict(rtol=1e-4, atol=1e-4)
        if dtype == torch.float32
        else dict(rtol=0.05, atol=0.1 if dtype == torch.bfloat16 else 0.02)
    )
    close(logits(tuned), want, **near)
    assert (want - plain).abs().max() > 0.1
    for model in (tuned, t.model):
        with adapter_off(model):
            close(logits(model), plain, **near if "pissa" in done.name else dict(rtol=0, atol=0))
    assert logits(t.model).equal(want)


def test_merged(done):
    "A merged folder is a model with the logits of the trainer's; only rounding inputs to fp8 is not in it."
    t = trainer(done.folder, f"{done.name}-merged", done.name, save_adapters=False, ckpt_freq=0)
    losses = [r.loss for r in t.steps()]
    assert losses == done.losses
    merged = load_model(t.history.checkpoint / "consolidated", t.model.dtype)
    got, want = logits(merged), logits(t.model)
    rough = t.model.dtype != torch.float32 or t.args.quantize == "fp8" or "stored16" in done.name
    assert (got - want).norm() < (0.06 if rough else 2e-5) * want.norm()


def test_all_weights_tied(folder):
    "A full training of a tied model ends with a folder that loads as it."
    t = trainer(folder, "tied-full", "tied", max_steps=1, lora=dict(enable=False), save_adapters=False)
    t.fit()
    merged = load_model(t.history.checkpoint / "consolidated")
    assert merged.output.weight is merged.tok_embeddings.weight
    close(logits(merged), logits(t.model))


def test_other_checkpoint_setting(folder):
    "A resumed run recomputes what its new setting says, also where `1` is changed to `true`."
    first = trainer(folder, "recompute", "plain", checkpoint=1)
    for _ in zip(first.steps(), range(2)): pass
    assert [
        trainer(folder, "recompute", "plain", checkpoint=c, resume=True).model.recompute
        for c in (1, True, False)
    ] == [1, 2, 0]


@pytest.mark.parametrize("average", ["tokens", "microbatches"])
@pytest.mark.parametrize("name", ["plain", "nf4", "dora", "also", "tied_also"])
def test_cuts(name, average, folder):
    "Cutting batches into pieces and recomputing layers leave the losses and gradient norms as they are."
    seen = {}
    for how, values in {
        "whole": dict(checkpoint=False), "pieces": dict(memory_gib=SMALL), "all": dict(checkpoint=True),
        "both": dict(memory_gib=SMALL, checkpoint=True),
    }.items():
        t = trainer(
            folder, f"{name}-{average}-{how}", name, max_steps=3, no_ckpt=True, num_microbatches=2,
            loss_average=average, **values,
        )
        pieces = []
        t.model.layers[0].register_forward_pre_hook(lambda module, inputs: pieces.append(len(inputs[0])))
        seen[how] = [(r.loss, r.grad_norm) for r in t.steps()]
        assert (max(pieces) < 80) == (how in ("pieces", "both")) and t.model.recompute == (
            2 if how in ("all", "both") else t.plan.recompute
        ), pieces
    for how, found in seen.items():
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in seen["whole"]], rel=1e-5), (
            how
        )
        assert [norm for _, norm in found] == pytest.approx([norm for _, norm in seen["whole"]], rel=1e-3), (
            how
        )
