"""What goes out, loaded by the programs that it is for: transformers and peft, on small random models."""
import json
import os
from dataclasses import replace

import pytest

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
import torch
from safetensors.torch import load_file

from mistral_nb.data.tokens import load_tokenizer
from mistral_nb.export.certificate import chat_ids, CHATS, greedy_ids, live_logits, read_logits
from mistral_nb.export.exports import export_tuned
from mistral_nb.export.hf import write_hf, write_peft
from mistral_nb.export.rounding import PackedReader
from mistral_nb.export.tuned import Tuned
from mistral_nb.infer.chat import load_tuned, read_adapter
from mistral_nb.model.args import ModelArgs, ModelError, MoeArgs, QueryScaling, YarnArgs
from mistral_nb.model.lora import add_adapters, add_adapters_like, init_lora, init_pissa
from mistral_nb.model.lora import load_adapter_state, lora_layers, set_whole, TARGETS, train_whole_weights
from mistral_nb.model.weights import init_model
from mistral_nb.train.checkpoint import consolidated_files, write_files

pytestmark = pytest.mark.usefixtures("one_thread")

V3 = ModelArgs(32, 2, 8, 48, 4, 2, 1e-5, 32768, rope_theta=1e6)
YARN = YarnArgs(8.0, 16, 4.0, 1.0, 1.2079441541679836)
SHAPES = {
    "dense v3": (V3, "v3"),
    "dense tekken": (replace(V3, vocab_size=131072), "v3-tekken"),
    "Mixtral": (replace(V3, moe=MoeArgs(4, 2)), "v3"),
    "tied": (replace(V3, tied_embeddings=True), "v3"),
    "window": (replace(V3, sliding_window=6), "v3"),
    "windows": (replace(V3, sliding_window=(None, 6)), "v3"),
    "YaRN": (replace(V3, yarn=YARN), "v3"),
    "Ministral 3": (replace(V3, yarn=YARN, llama_4_scaling=QueryScaling(16, 0.3)), "v3"),
}
KINDS = ("plain", "rslora", "dora", "pissa", "norms", "tables")
PARTS = {
    "all": TARGETS, "attention": TARGETS[:4], "qv": ("wq", "wv"), "w2": ("w2",), "w1": ("w1",),
    "w13": ("w1", "w3"), "w12": ("w1", "w2"),
}
NIGHT = bool(os.environ.get("NIGHTLY"))  # all of the matrix, see `make nightly`


def tuned_model(shape: str, kind: str = "plain", parts: str = "all", dtype=torch.float32) -> Tuned:
    "A model whose adapter changes what it says"
    args, name = SHAPES[shape]
    model = init_model(args, seed=3).to(dtype)
    scaling = 1.5 * (4**0.5 if kind == "rslora" else 1.0)
    add_adapters(model, 4, scaling, targets=PARTS[parts], dora=kind == "dora")
    init_lora(model, 1)
    if kind == "pissa": init_pissa(model, 0)
    g = torch.Generator().manual_seed(5)
    also = {"norms": ["norms"], "tables": ["embeddings", "output"]}.get(kind, [])
    if also: train_whole_weights(model, also)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            b = layer.lora_B.weight
            b.add_(torch.randn(b.shape, generator=g) * 0.2)
            if kind == "dora":
                m = layer.lora_magnitude
                m.mul_(1 + 0.3 * torch.rand(m.shape, generator=g))
        for p in (model.get_parameter(n) for n in getattr(model, "base_values", {})):
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return Tuned(model.eval(), load_tokenizer(name), dtype=dtype)


DOCS = [[1, 5, 900, 17, 4, 88, 3000, 12, 9, 10, 11, 77, 300, 2, 8, 40, 41, 50, 60, 70], [1, 12, 44]]


@torch.no_grad()
def their_logits(model) -> list[torch.Tensor]:
    return [model(torch.tensor([doc])).logits[0].float() for doc in DOCS]


def same(got: list[torch.Tensor], want: list[torch.Tensor], most: float = 2e-5) -> None:
    for a, b in zip(got, want): assert (a - b).abs().max() <= most * b.abs().max()


def chats(n: int) -> list[dict]:
    "Rows to calibrate with"
    said = [("user", "Say {}."), ("assistant", "{}!")]
    return [{"messages": [{"role": r, "content": t.format(i)} for r, t in said]} for i in range(n)]


def load_theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_hf_folder(shape, tmp_path, caplog):
    "Transformers has the logits, the answers, the ids of chats, and says nothing about the tokenizer"
    tuned = tuned_model(shape)
    write_hf(tmp_path, tuned)
    theirs = load_theirs(tmp_path)
    same(their_logits(theirs), live_logits(tuned.model, DOCS))
    transformers.utils.logging.enable_propagation()
    try: tok = transformers.AutoTokenizer.from_pretrained(tmp_path)
    finally: transformers.utils.logging.disable_propagation()
    assert "regex" not in caplog.text
    for messages in CHATS:
        want = chat_ids(tuned.tokenizer, messages)
        got = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert got == want
        out = theirs.generate(torch.tensor([want]), max_new_tokens=6, do_sample=False)
        assert out[0].tolist() == greedy_ids(tuned.model, [want], out.shape[1] - len(want))[0]
    assert tok("Hi").input_ids == tuned.tokenizer.encode_text("Hi", bos=True)
    assert tok.decode(tok("naïve — 東京").input_ids, skip_special_tokens=True).strip() == "naïve — 東京"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["dense v3", "Mixtral", "tied"])
def test_merged(shape, kind, tmp_path):
    "Every kind of adapter is merged into a folder that does the same"
    tuned = tuned_model(shape, kind)
    write_hf(tmp_path, tuned)
    same(their_logits(load_theirs(tmp_path)), live_logits(tuned.model, DOCS))


def with_peft(tuned: Tuned, folder):
    "Their base model, and on it their adapter, from folders"
    base = Tuned(init_model(tuned.args, seed=3), tuned.tokenizer, dtype=torch.float32)
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    write_hf(folder / "base", base)
    write_peft(folder / "adapter", tuned, str(folder / "base"))
    return peft.PeftModel.from_pretrained(load_theirs(folder / "base"), folder / "adapter").eval()


REFUSED = [("Mixtral", "dora", parts) for parts in PARTS if parts[0] == "w" or parts == "all"]
REFUSED += [("tied", "tables", parts) for parts in PARTS]


def chosen(cases: dict, few: tuple) -> tuple: return tuple(cases) if NIGHT else few


@pytest.mark.parametrize("parts", chosen(PARTS, ("all", "w1")))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", chosen(SHAPES, ("dense v3", "Mixtral", "tied")))
def test_peft_folder(shape, kind, parts, tmp_path):
    "PEFT finds every tensor, and has the logits"
    tuned = tuned_model(shape, kind, parts)
    if (shape, kind, parts) in REFUSED:
        with pytest.raises(ModelError, match="adapter merged in, to 'hf'"): write_peft(tmp_path, tuned)
        return
    theirs = with_peft(tuned, tmp_path)
    same(their_logits(theirs), live_logits(tuned.model, DOCS), 5e-5)
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(tmp_path / "base") and not said["use_rslora"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["dense v3", "Mixtral", "windows"])
def test_peft_comes_back(shape, kind, tmp_path):
    "What was written for PEFT is read again as the same adapter"
    tuned = tuned_model(shape, kind, "attention")
    write_peft(tmp_path, tuned)
    again = init_model(tuned.args, seed=3)
    state, whole = read_adapter(tmp_path, tuned.args)
    load_adapter_state(add_adapters_like(again, state), state)
    set_whole(again, whole)
    same(live_logits(again, DOCS), live_logits(tuned.model, DOCS))


@pytest.mark.parametrize("change", [dict(use_rslora=True), dict(alpha_pattern={"q_proj": 3}),
                                    dict(rank_pattern={"v_proj": 2}), dict(use_dora=True), {}])
def test_peft_of_others(change, tmp_path):
    "An adapter that PEFT has made and saved itself has its logits here"
    args = SHAPES["dense v3"][0]
    base = Tuned(init_model(args, seed=3), load_tokenizer("v3"), dtype=torch.float32)
    write_hf(tmp_path, base)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], **change)
    theirs = peft.get_peft_model(load_theirs(tmp_path), config).eval()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad: p.add_(torch.rand(p.shape, generator=g) * 0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    mine = load_tuned(tmp_path, tmp_path / "adapter")
    same(live_logits(mine, DOCS), their_logits(theirs), 5e-5)


@pytest.mark.parametrize("shape", ["dense", "tied"])
@pytest.mark.parametrize("kind", ["w4a16", "fp8"])
def test_compressed(kind, shape, tmp_path):
    "Packed matrices are the same to transformers and compressed-tensors"
    pytest.importorskip("compressed_tensors")
    args = ModelArgs(64, 2, 16, 96, 4, 2, 1e-5, 32768, tied_embeddings=shape == "tied")
    tuned = Tuned(init_model(args, seed=3), load_tokenizer("v3"), dtype=torch.float32)
    rows = chats(12)
    made = export_tuned(tuned, "gptq" if kind == "w4a16" else "fp8", tmp_path / "out", kind, rows=rows)
    theirs = load_theirs(made.folder)
    reader = PackedReader(made.folder, args)
    mine = read_logits(reader, args, DOCS)
    reader.close()
    for a, b in zip(their_logits(theirs), mine):  # fp8 rounds its inputs too
        assert (a - b).abs().max() < (0.05 if kind == "w4a16" else 0.25) * b.abs().max()


@pytest.mark.parametrize("format", ["gptq", "awq", "fp8"])
@pytest.mark.parametrize("shape", ["dense", "mixture"])
def test_packed(format, shape, tmp_path):
    "Packed exports are certified, and say what they lose on rows held out"
    args = ModelArgs(64, 2, 16, 96, 4, 2, 1e-5, 32768, moe=MoeArgs(4, 2) if shape == "mixture" else None)
    model = add_adapters(init_model(args, seed=3), 4, 2.0)
    init_lora(model, 0)
    rows = chats(20)
    tuned = Tuned(model.eval(), load_tokenizer("v3"), dtype=torch.float32)
    made = export_tuned(tuned, format, tmp_path / "out", rows=rows)
    assert made.certificate.chats == len(CHATS) and "vllm serve" in made.lines[0][1]
    assert (made.folder / "certificate.json").exists()
    assert (format == "fp8") != any("held out" in note for note in made.certificate.notes)


@pytest.mark.parametrize("kind", ["plain", "dora", "tables"])
def test_merged_checkpoint(kind, tmp_path):
    "A run with save_adapters: false writes the weights that an export writes, to the bit"
    tuned = tuned_model("dense v3", kind, dtype=torch.bfloat16)
    settings = dict(enable=True, rank=4, dropout=0.0, scaling=1.5)
    write_files(tmp_path / "run", consolidated_files(tuned.model, V3, torch.bfloat16, settings, False))
    made = export_tuned(tuned, "mistral", tmp_path / "out", "bf16")
    folders = tmp_path / "run", made.folder
    one, other = (load_file(folder / "consolidated.safetensors") for folder in folders)
    assert one.keys() == other.keys()
    for name, t in one.items(): assert torch.equal(t, other[name]), name
