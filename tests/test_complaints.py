"""What users of such exports have complained about elsewhere, one test for each complaint."""
import json
import re

import pytest

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
import torch
from safetensors.torch import load_file, save_file

from mistral_nb.data.tokens import load_tokenizer
from mistral_nb.export import exports
from mistral_nb.export.certificate import CertificateError, chat_ids, CHATS, greedy_ids, live_logits
from mistral_nb.export.exports import export_model, export_tuned
from mistral_nb.export.gguf_file import read_gguf
from mistral_nb.export.hf import write_hf, write_mistral
from mistral_nb.export.tuned import Tuned
from mistral_nb.infer.chat import load_tuned
from mistral_nb.model.args import ModelArgs, ModelError
from mistral_nb.model.weights import init_model
from mistral_nb.train.checkpoint import consolidated_files, write_files
from test_export import DOCS, load_theirs, same, SHAPES, their_logits, tuned_model, with_peft

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = dict(enable=True, rank=4, dropout=0.0, scaling=1.5)


def base_of(tuned: Tuned) -> Tuned:
    "The model as it was before training"
    return Tuned(init_model(tuned.args, seed=3), tuned.tokenizer, dtype=torch.float32)


def saved_run(folder, quantize: str = "none", kind: str = "plain"):
    "A base in a folder, and a checkpoint that was trained on it as it is packed; both paths"
    args, name = ModelArgs(64, 2, 16, 128, 4, 2, 1e-5, 32768), "v3"
    write_mistral(folder / "base", Tuned(init_model(args, seed=3), load_tokenizer(name), dtype=torch.float32))
    SHAPES["saved"] = args, name
    try: state = tuned_model("saved", kind)
    finally: del SHAPES["saved"]
    write_files(folder / "at", consolidated_files(state.model, args, torch.float32, SETTINGS))
    file = folder / "at/lora.safetensors"
    note = {"lora_scaling": "1.5", "file_scaling": "2.0", "lora_rank": "4"}
    if quantize != "none": save_file(load_file(file), file, note | {"base": quantize})
    return folder / "base", folder / "at"


@pytest.fixture
def room(tmp_path):
    (tmp_path / "base").mkdir()
    return tmp_path


def test_merged_folder_without_the_adapter(tmp_path, monkeypatch):
    "A merged folder held the base alone, and nothing said so: here it is an error, and leaves no folder"
    tuned = tuned_model("dense v3")

    def write_base(folder, tuned, *options): return write_hf(folder, base_of(tuned), *options)

    monkeypatch.setattr(exports, "write_hf", write_base)
    with pytest.raises(CertificateError, match="differs by .* from the model in memory"):
        export_tuned(tuned, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_merged_acts_untrained(tmp_path):
    "Merged and packed models answered as if untrained: ours answer as tuned, which is not as the base does"
    tuned = tuned_model("dense v3")
    ids = [chat_ids(tuned.tokenizer, m) for m in CHATS]
    want = greedy_ids(tuned.model, ids, 6)
    assert want != greedy_ids(base_of(tuned).model, ids, 6)
    theirs = load_theirs(export_tuned(tuned, "hf", tmp_path / "hf", "f32").folder)
    for prompt, answer in zip(ids, want):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert out[0].tolist() == answer[: out.shape[1]]
    again = load_tuned(export_tuned(tuned, "mistral", tmp_path / "mistral", "f32").folder)
    assert greedy_ids(again, ids, 6) == want  # llama.cpp's answers: test_gguf.py


@pytest.mark.parametrize("quantize", ["nf4", "int8", "fp8"])
def test_merging_changes_answers(quantize, room):
    "Merging into another base than was trained on changes answers: the base is said, measured, and a choice"
    base, at = saved_run(room, quantize)
    trained_on = load_tuned(base, at, quantize=quantize)
    made = export_model(at, "hf", room / "packed", model=base, kind="f32")
    same(their_logits(load_theirs(made.folder)), live_logits(trained_on, DOCS), 1e-3)
    said = [n for n in made.certificate.notes if f"the one trained on, in {quantize}" in n]
    assert re.search(r"[1-9]\d*\.\d% from its 16-bit weights|0\.[1-9]% from", said[0])
    made = export_model(at, "hf", room / "stored", model=base, kind="f32", original=True)
    same(their_logits(load_theirs(made.folder)), live_logits(load_tuned(base, at), DOCS))
    assert not [n for n in made.certificate.notes if "trained on" in n]


@pytest.mark.parametrize("kind", ["norms", "tables"])
def test_whole_weights_beside_an_adapter(kind, tmp_path):
    "Programs refuse an adapter with an output matrix or norms: said before, with the way that works"
    tuned = tuned_model("dense v3", kind)
    with pytest.raises(ModelError, match="another kind merges both"):
        export_tuned(tuned, "gguf", tmp_path / "lora", "lora")
    made = export_tuned(tuned, "hf", tmp_path / "hf", "f32")
    same(their_logits(load_theirs(made.folder)), live_logits(tuned.model, DOCS))
    adapter = export_tuned(tuned, "peft", tmp_path / "peft").folder
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"]


def test_scaling_ignored(tmp_path):
    "A scaling by the root of the rank was read as one by the rank: it stands in lora_alpha, and in no flag"
    tuned = tuned_model("dense v3", "rslora")
    theirs = with_peft(tuned, tmp_path)
    same(their_logits(theirs), live_logits(tuned.model, DOCS), 5e-5)
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert said["use_rslora"] is False and not said.get("alpha_pattern") and not said.get("rank_pattern")
    b = load_file(tmp_path / "adapter/adapter_model.safetensors")
    layer = tuned.model.layers[0].attention.wv
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora"
    file = b[f"{name}_B.weight"] @ b[f"{name}_A.weight"] * said["lora_alpha"] / said["r"]
    torch.testing.assert_close(file, layer.delta())


def test_adapter_file_loaded_as_model(tmp_path):
    "An adapter in GGUF was loaded as a model: it is named otherwise, and its line says --lora"
    pytest.importorskip("gguf")
    tuned = tuned_model("dense v3")
    alone, whole = (export_tuned(tuned, "gguf", tmp_path / k, k) for k in ("lora", "f32"))
    (adapter,), (model,) = (list(e.folder.glob("*.gguf")) for e in (alone, whole))
    assert adapter.name.endswith("-lora.gguf") and "lora" not in model.name
    assert f"--lora {adapter}" in alone.lines[0][1] and "--lora" not in whole.lines[0][1]
    assert read_gguf(adapter).fields["general.type"] == "adapter"
    assert read_gguf(model).fields["llama.context_length"] == tuned.context


def test_tokenizer_missing_in_merged_folder(tmp_path):
    "A server that wants Mistral's own tokenizer did not find it in a merged folder: it is in both layouts"
    for shape in ("dense v3", "dense tekken"):
        tuned = tuned_model(shape)
        for format in ("hf", "mistral"):
            folder = export_tuned(tuned, format, tmp_path / f"{shape}-{format}").folder
            there = load_tokenizer(folder)
            assert [chat_ids(there, m) for m in CHATS] == [chat_ids(tuned.tokenizer, m) for m in CHATS]


@pytest.mark.parametrize("shape", ["dense v3", "dense tekken"])
def test_template_missing(shape, tmp_path):
    "A merged model was served without a chat template: it is there, also for tools"
    tuned = tuned_model(shape)
    write_hf(tmp_path, tuned)
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path)
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}]
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}
    chat = [
        {"role": "user", "content": "Call f."}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f", "content": "{\"out\": 2}", "tool_call_id": "abcdefghi"},
    ]
    asked = ChatCompletionRequest(messages=chat, tools=tools)
    want = tuned.tokenizer.mistral.encode_chat_completion(asked).tokens
    assert tok.apply_chat_template(chat, tools=tools, return_dict=False) == want


def test_adapter_given_as_model(room):
    "A server was given an adapter as if it were a model: it names its base, and its line does too"
    base, at = saved_run(room)
    made = export_model(at, "peft", room / "peft", model=base)
    said = json.loads((made.folder / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(base)
    line = dict(made.lines)["vLLM"]
    assert line.startswith(f"vllm serve {base} ") and f"--lora-modules t={made.folder}" in line
    assert line in (made.folder / "README.md").read_text()


def test_warning_about_the_regex(tmp_path, caplog):
    "Tokenizers of right folders were said to have a wrong pattern: config.json says who wrote it"
    write_hf(tmp_path, tuned_model("dense tekken"))
    transformers.utils.logging.enable_propagation()
    try: transformers.AutoTokenizer.from_pretrained(tmp_path)
    finally: transformers.utils.logging.disable_propagation()
    assert "regex" not in caplog.text
    assert int(json.loads((tmp_path / "config.json").read_text())["transformers_version"][0]) >= 5
