"""Mistral's newer models, as transformers builds them: layers with windows of their own, stretched positions,
text parts of models with images, files in fp8. Small random weights, each family in both layouts."""
import json
import re
from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
import torch
from safetensors.torch import load_file, save_file

from mistral_nb.data.pack import pack_samples
from mistral_nb.data.tokens import TokenSample
from mistral_nb.infer.generate import generate
from mistral_nb.model.args import ModelError, load_model_args
from mistral_nb.model.layouts import mistral_name, unpermute, vision_bytes
from mistral_nb.model.lora import add_adapters, init_lora, lora_layers, merged_state
from mistral_nb.model.weights import file_dtype, load_model, save_model, storage_of, weight_files
from mistral_nb.model.quant import quantize_linear
from mistral_nb.train.checkpoint import trainable_params
from mistral_nb.train.optim import adamw
from mistral_nb.train.step import batch_loss

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = dict(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=24, rms_norm_eps=1e-5, max_position_embeddings=4096,
    tie_word_embeddings=False,
)
EYES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32,
    patch_size=8, head_dim=16,
)
YARN = dict(
    rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=16, beta_fast=4.0,
    beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.3,
)
FULL, SLIDING = "full_attention", "sliding_attention"
OWN = dict(  # what params.json of the same shape says
    dim=64, hidden_dim=96, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=24, norm_eps=1e-5, vocab_size=300,
    rope_theta=1e4,
)
OWN_YARN = dict(
    yarn=dict(factor=8, original_max_position_embeddings=16, beta=4, alpha=1, apply_scale=False),
    llama_4_scaling=dict(original_max_position_embeddings=16, beta=0.3),
)
OWN_EYES = dict(
    vision_encoder=dict(hidden_size=32, image_size=32, patch_size=8, mm_projector_id="patch_merge")
)


def config(kind: str, **change):
    "A config of transformers, skipped where this release has none of the kind"
    found = getattr(transformers, f"{kind}Config", None)
    if found is None: pytest.skip(f"this transformers has no {kind}")
    return found(**TEXT | dict(sliding_window=None) | change)


def with_eyes(kind: str, text):
    sees = transformers.PixtralVisionConfig(**EYES)
    tied = text.tie_word_embeddings
    more = dict(vision_feature_layer=-1, image_seq_length=1) if kind == "Llava" else {}
    found = getattr(transformers, f"{kind}Config")
    return found(text_config=text, vision_config=sees, tie_word_embeddings=tied, image_token_index=7, **more)


def ministral_3(**change): return config("Ministral3", rope_parameters=YARN | change)


WINDOWS = [FULL, SLIDING, SLIDING, SLIDING]
THETA = dict(rope_type="default", rope_theta=1e4)
FAMILIES = {  # config of transformers; what params.json says besides
    "Ministral 8B": (
        lambda: config("Ministral", sliding_window=6, layer_types=WINDOWS, rope_parameters=THETA),
        dict(_sliding_window=[None, 6, 6, 6])),
    "Small 3.1 and 3.2, Magistral 2509": (
        lambda: with_eyes("Mistral3", config("Mistral", rope_parameters=THETA)), OWN_EYES),
    "Pixtral": (lambda: with_eyes("Llava", config("Mistral", rope_parameters=THETA)), OWN_EYES),
    "Ministral 3": (lambda: with_eyes("Mistral3", ministral_3()), OWN_EYES | OWN_YARN),
    "Ministral 3 3B": (
        lambda: with_eyes("Mistral3", config("Ministral3", rope_parameters=YARN, tie_word_embeddings=True)),
        OWN_EYES | OWN_YARN | dict(tied_embeddings=True)),
    "Devstral 2": (
        lambda: ministral_3(llama_4_scaling_beta=0), OWN_YARN | dict(llama_4_scaling=dict(beta=0))),
    "YaRN with its scale": (
        lambda: ministral_3(mscale=None, mscale_all_dim=None),
        OWN_YARN | dict(yarn=dict(factor=8.0, original_max_position_embeddings=16, beta=4.0, alpha=1.0))),
    "YaRN in a plain Mistral": (
        lambda: config("Mistral", rope_parameters={k: v for k, v in YARN.items() if k[:5] != "llama"}),
        {k: v for k, v in OWN_YARN.items() if k == "yarn"}),
}


def ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(8, 300, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def their_model(name: str):
    "A model of transformers with weights that make every part of it matter"
    made = FAMILIES[name][0]()
    made._attn_implementation = "eager"
    if hasattr(made, "text_config"): made.text_config._attn_implementation = "eager"
    known = dict(
        mistral="MistralForCausalLM", ministral="MinistralForCausalLM", ministral3="Ministral3ForCausalLM",
        mistral3="Mistral3ForConditionalGeneration", llava="LlavaForConditionalGeneration",
    )
    model = getattr(transformers, known[made.model_type])(made).float().eval()
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.normal_(float(p.dim() == 1), 0.3 if p.dim() == 1 else 1.2 * p.shape[-1] ** -0.5, generator=g)
    return model


@torch.no_grad()
def their_logits(model, tokens: list[int]) -> torch.Tensor: return model(torch.tensor([tokens])).logits[0]


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


@torch.no_grad()
def same_logits(mine, model, lengths=(40, 1, 23), most: float = 1e-5) -> None:
    docs = [ids(n, seed) for seed, n in enumerate(lengths)]
    packed = mine(torch.tensor(sum(docs, [])), lengths).split(list(lengths))
    for got, doc in zip(packed, docs): assert off(got, their_logits(model, doc)) <= most


def in_own_layout(name: str, home: Path, out: Path, pack: bool = False) -> Path:
    "A folder of transformers as Mistral publishes such a model: its names, its params.json, what sees images"
    args, state = load_model_args(home), load_model(home).state_dict()
    if args.tied_embeddings: state.pop("output.weight")
    if pack: state = packed_fp8(state)
    if "vision_encoder" in FAMILIES[name][1]:
        state |= {f"{part}.weight": torch.full((2, 2), torch.nan) for part in (
            "vision_encoder.patch_conv", "vision_language_adapter.w_in", "patch_merger.merging_layer")}
    out.mkdir()
    save_file({k: v.contiguous() for k, v in state.items()}, out / "consolidated.safetensors")
    params = OWN | FAMILIES[name][1] | (FP8 if pack else {})
    (out / "params.json").write_text(json.dumps(params))
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name, tmp_path):
    "A folder of transformers, the same as Mistral lays it out, and that saved here again: the same logits"
    model = their_model(name)
    model.save_pretrained(tmp_path / "hf")
    mine = load_model(tmp_path / "hf")
    same_logits(mine, model)
    own = load_model(in_own_layout(name, tmp_path / "hf", tmp_path / "own"))
    same_logits(own, model)
    assert own.args == mine.args and own.args.vision == ("vision_encoder" in FAMILIES[name][1])
    save_model(own.state_dict(), own.args, tmp_path / "again")
    assert "vision" not in (tmp_path / "again/params.json").read_text()
    same_logits(load_model(tmp_path / "again"), model)
    tensors, size = vision_bytes(weight_files(tmp_path / "own"))
    assert (tensors, size) == ((3, 48) if own.args.vision else (0, 0))


@pytest.mark.parametrize("name", [n for n, (_, own) in FAMILIES.items() if "vision_encoder" in own])
def test_both_prefixes(name, tmp_path):
    "The text part of a model with images has had one prefix and another; a file may have either"
    model = their_model(name)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    assert any(n.startswith("language_model.model.") for n in state)  # as transformers writes them
    newer = {n.replace("language_model.model.", "model.language_model."): t for n, t in state.items()}
    newer = {n.replace("language_model.lm_head", "lm_head"): t for n, t in newer.items()}
    newer = {re.sub(r"^(vision_tower|multi_modal)", r"model.\1", n): t for n, t in newer.items()}
    assert not newer.keys() & {n for n in state if "language_model" in n or "vision" in n}
    save_file(newer, file)
    same_logits(load_model(tmp_path), model)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy(name, tmp_path):
    "The cache writes the ids that no cache writes, past windows and the length of pretraining"
    model = their_model(name)
    model.save_pretrained(tmp_path)
    mine, prompts = load_model(tmp_path), [ids(n, n) for n in (5, 1, 23)]
    for prompt, answer in zip(prompts, generate(mine, prompts, max_tokens=24)):
        seen = list(prompt)
        for t in answer:
            assert their_logits(model, seen)[-1].argmax().item() == t
            seen.append(t)


def samples() -> list[TokenSample]:
    "Three documents of which some tokens are trained"
    return [
        TokenSample(np.array(ids(n, n), dtype=np.int32), np.random.RandomState(n).rand(n) < 0.6)
        for n in (31, 12, 20)
    ]


def their_loss(model, docs: list[TokenSample]) -> torch.Tensor:
    "The loss of the trained tokens, each document by itself"
    total = torch.zeros(())
    for doc in docs:
        tokens = torch.tensor(doc.tokens, dtype=torch.long)
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        total = total + each[torch.tensor(doc.mask[1:])].sum()
    return total


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_gradients(name, tmp_path):
    "By the chain rule from the gradients of transformers' whole matrices: dA = s B' dW, dB = s dW A'"
    model = their_model(name)
    model.save_pretrained(tmp_path)
    mine = add_adapters(load_model(tmp_path), 4, 1.5)
    g = torch.Generator().manual_seed(2)
    for p in trainable_params(mine).values():
        p.data = torch.randn(p.shape, generator=g) * 0.3 * p.shape[1] ** -0.5
    merged, d = merged_state(mine), mine.args.head_dim
    theirs = {mistral_name(n): p for n, p in model.named_parameters()}
    turned = {n for n in merged if re.search(r"attention\.w[qk]\.", n)}
    for n, p in theirs.items():
        if n not in merged or n == "output.weight" and mine.args.tied_embeddings: continue
        w = merged[n]
        p.data = w.view(-1, d // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape) if n in turned else w
    docs = samples()
    batch = pack_samples([docs], 64)
    loss = batch_loss(mine, batch)
    loss.backward()
    want = their_loss(model, docs)
    want.backward()
    assert off(loss.detach(), want.detach()) < 1e-5
    for at, layer in lora_layers(mine).items():
        dw = theirs[f"{at}.weight"].grad
        if f"{at}.weight" in turned: dw = unpermute(dw, d)
        a, b = layer.lora_A.weight, layer.lora_B.weight
        assert off(a.grad, 1.5 * b.detach().T @ dw) < 1e-5 and off(b.grad, 1.5 * dw @ a.detach().T) < 1e-5, at


@pytest.mark.parametrize("name", FAMILIES)
def test_three_steps(name, tmp_path):
    "The losses of three steps are those of peft on transformers, with the same first adapter and rate"
    peft = pytest.importorskip("peft")
    model = their_model(name)
    model.save_pretrained(tmp_path)
    mine = add_adapters(load_model(tmp_path), 4, 1.5)
    init_lora(mine, 0)
    parts = r"(?!.*(vision|projector)).*\.((q|k|v|o|gate|up|down)_proj)"
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=parts))
    first = {f"{at}.lora_A": layer.lora_A.weight.detach() for at, layer in lora_layers(mine).items()}
    for n, p in theirs.named_parameters():
        if not p.requires_grad: continue
        at = mistral_name(n.removeprefix("base_model.model.").replace(".default.weight", ""))
        p.data = first[at].clone() if at in first else torch.zeros_like(p)
    docs = samples()
    batch = pack_samples([docs], 64)
    count = sum(int(doc.mask[1:].sum()) for doc in docs)
    ours = adamw(trainable_params(mine), 1e-2, 0.0)
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], 1e-2, (0.9, 0.95),
                              weight_decay=0.0)
    losses = []
    for _ in range(3):
        pair = batch_loss(mine, batch) / count, their_loss(theirs, docs) / count
        for optimizer, loss in zip((ours, other), pair):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(tuple(loss.item() for loss in pair))
    for got, want in losses: assert got == pytest.approx(want, rel=2e-5)
    assert losses[2][0] < losses[0][0]


# files in fp8

FP8 = dict(quantization=dict(qformat_weight="fp8_e4m3", qscheme_act="TENSOR"))
MATRIX = re.compile(r"(attention|feed_forward)\.w\w\.weight$|_proj\.weight$")


def packed_fp8(state: dict, scale_name: str = "qscale_weight", act_name: str = "qscale_act") -> dict:
    "Matrices of the blocks with one scale each, and that of their inputs"
    out = {}
    for name, w in state.items():
        if not MATRIX.search(name) or "vision" in name:
            out[name] = w
            continue
        scale, stem = w.abs().max() / 448, name.removesuffix("weight")
        out |= {name: (w / scale).to(torch.float8_e4m3fn), stem + scale_name: scale}
        out[stem + act_name] = torch.tensor(0.1)
    return out


def unpacked(state: dict, scale_name: str) -> dict:
    "What such files say, by the definition"
    beside = (scale_name, "qscale_act", "activation_scale")
    return {
        n: w.float() * state[n.removesuffix("weight") + scale_name] if w.dtype == torch.float8_e4m3fn else w
        for n, w in state.items() if not n.endswith(beside)
    }


def fp8_folder(name: str, layout: str, home: Path) -> tuple[Path, str]:
    "A family in fp8, as it is published, and what scales are called there"
    their_model(name).save_pretrained(home / "hf")
    if layout == "own":
        return in_own_layout(name, home / "hf", home / "own", pack=True), "qscale_weight"
    folder, scale = home / "hf", "weight_scale_inv"
    state = packed_fp8(load_file(folder / "model.safetensors"), scale, "activation_scale")
    save_file(state, folder / "model.safetensors")
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] = dict(quant_method="fp8", activation_scheme="static")
    (folder / "config.json").write_text(json.dumps(said))
    return folder, scale


def in_16_bits(folder: Path, scale: str, out: Path):
    "The same folder unpacked, by the definition"
    file = weight_files(folder)[0]
    out.mkdir()
    save_file(unpacked(load_file(file), scale), out / file.name)
    for shape in ("params.json", "config.json"):
        if not (folder / shape).exists(): continue
        values = json.loads((folder / shape).read_text())
        values = {k: v for k, v in values.items() if not k.startswith("quant")}
        (out / shape).write_text(json.dumps(values))
    return load_model(out)


@pytest.mark.parametrize("name", ["Ministral 3", "Devstral 2", "Ministral 8B"])
@pytest.mark.parametrize("layout", ["own", "hf"])
def test_fp8_files(name, layout, tmp_path):
    "Kept as fp8 with their scales, they have the logits of the same matrices unpacked, and merge to them"
    folder, scale = fp8_folder(name, layout, tmp_path)
    mine, whole = load_model(folder), in_16_bits(folder, scale, tmp_path / "plain")
    assert storage_of(folder) == "fp8_weight_only" and file_dtype(folder) == torch.float32
    assert mine.layers[0].attention.wq.codes.dtype == torch.float8_e4m3fn
    x = torch.tensor(ids(40))
    with torch.no_grad(): assert off(mine(x, [40]), whole(x, [40])) < 1e-5
    init_lora(add_adapters(mine, 2, 2.0), 0)
    merged = merged_state(mine)
    for name, w in whole.state_dict().items(): torch.testing.assert_close(merged[name], w)


@pytest.mark.parametrize("kind", ["fp8", "int8", "fp8_weight_only"])
def test_fp8_packed_otherwise(kind, tmp_path):
    "Asked for another storage, each matrix is packed as if it had been unpacked; fp8 keeps its codes"
    folder, scale = fp8_folder("Ministral 3", "own", tmp_path)
    whole, mine = in_16_bits(folder, scale, tmp_path / "plain"), load_model(folder, quantize=kind)
    assert storage_of(folder, kind) == kind
    got, w = mine.layers[1].feed_forward.w2, whole.layers[1].feed_forward.w2.weight
    assert got.kind == kind
    if kind == "int8": assert got.codes.equal(quantize_linear(w, kind).codes)
    else: torch.testing.assert_close(got.dequantize(), w.detach())


def test_fp8_blocks(tmp_path):
    "Scales for blocks of 128 by 128: the matrix is unpacked, one at a time"
    change = dict(hidden_size=160, intermediate_size=200, num_hidden_layers=1)
    model = transformers.MistralForCausalLM(config("Mistral", rope_parameters=THETA, **change)).float()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    name = "model.layers.0.mlp.up_proj"
    scale = torch.rand(2, 2) + 0.5
    codes = torch.randn(200, 160).to(torch.float8_e4m3fn)
    save_file(state | {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}, file)
    said = json.loads((tmp_path / "config.json").read_text())
    said["quantization_config"] = dict(quant_method="fp8", weight_block_size=[128, 128])
    (tmp_path / "config.json").write_text(json.dumps(said))
    mine = load_model(tmp_path)
    want = codes.float() * scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :160]
    assert mine.layers[0].feed_forward.w3.weight.equal(want) and storage_of(tmp_path) == "none"


def test_no_byte_of_images(tmp_path):
    "What sees images may lie in a file that ends before it: nothing there is read"
    model = their_model("Pixtral")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    order = sorted(state, key=lambda n: ("vision" in n or "projector" in n, n))
    save_file({n: state[n] for n in order}, file)
    assert load_model(tmp_path).args.vision
    bad = {n: torch.full_like(t, torch.nan) if "vision" in n else t for n, t in state.items()}
    save_file(bad, file)
    same_logits(load_model(tmp_path), model)


def test_tied_by_the_weights(tmp_path):
    "Older folders of models with images do not say whether the output is the embedding: their weights do"
    for name, tied in (("Ministral 3", False), ("Ministral 3 3B", True)):
        model = their_model(name)
        model.save_pretrained(tmp_path / name)
        said = json.loads((tmp_path / name / "config.json").read_text())
        said.pop("tie_word_embeddings", None)
        said["text_config"].pop("tie_word_embeddings", None)
        (tmp_path / name / "config.json").write_text(json.dumps(said))
        assert load_model_args(tmp_path / name).tied_embeddings == tied
        same_logits(load_model(tmp_path / name), model)


@pytest.mark.parametrize("packed", [dict(quant_method="awq"), dict(quant_method="compressed-tensors")])
def test_other_packings(packed, tmp_path):
    config("Mistral").save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text()) | dict(quantization_config=packed)
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match="weights packed so cannot be read"): load_model_args(tmp_path)
