"""What goes out, in programs that are seldom installed beside this one: mistral-inference, and MLX."""
import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
import torch

from mistral_nb.export.certificate import chat_ids, CHATS, greedy_ids, live_logits
from mistral_nb.export.exports import export_tuned
from mistral_nb.export.hf import write_hf, write_mistral
from mistral_nb.export.tuned import Tuned
from mistral_nb.model.weights import init_model
from mistral_nb.train.checkpoint import consolidated_files, write_files
from inference_cpu import mistral_inference_on_cpu
from test_export import SHAPES, tuned_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def mistral_inference():
    with mistral_inference_on_cpu() as package: yield package


def same_answers(theirs, tuned: Tuned) -> None:
    "Its greedy answers, and the log-probabilities of the questions"
    from mistral_inference.generate import generate
    for messages in CHATS:
        ids = chat_ids(tuned.tokenizer, messages)
        (answer,), (likely,) = generate([ids], theirs, max_tokens=6, temperature=0.0)
        assert answer == greedy_ids(tuned.model, [ids], 6)[0][len(ids):]
        mine = live_logits(tuned.model, [ids])[0].log_softmax(-1)
        apart = [abs(p - mine[at, ids[at + 1]].item()) for at, p in enumerate(likely[: len(ids) - 1])]
        assert max(apart) < 2e-5


OLDER = ("dense v3", "dense tekken", "Mixtral", "window", "windows")


@pytest.mark.parametrize("shape", OLDER)
def test_mistral_inference(shape, mistral_inference, tmp_path):
    "A merged folder in Mistral's layout, in the program that the layout is for"
    from mistral_inference.transformer import Transformer
    tuned = tuned_model(shape)
    made = export_tuned(tuned, "mistral", tmp_path / "out", "f32")
    assert dict(made.lines)["mistral-inference"] == f"mistral-chat {tmp_path / 'out'} --instruct"
    same_answers(Transformer.from_folder(made.folder, device="cpu", dtype=torch.float32), tuned)


@pytest.mark.parametrize("shape", ["dense v3", "dense tekken"])
def test_mistral_inference_adapter(shape, mistral_inference, tmp_path):
    "A checkpoint as it is saved, on its base"
    from mistral_inference.transformer import Transformer
    tuned = tuned_model(shape)
    (tmp_path / "base").mkdir()
    base = Tuned(init_model(tuned.args, seed=3), tuned.tokenizer, dtype=torch.float32)
    write_mistral(tmp_path / "base", base)
    settings = dict(enable=True, rank=4, dropout=0.0, scaling=1.5)
    write_files(tmp_path / "at", consolidated_files(tuned.model, tuned.args, torch.float32, settings))
    theirs = Transformer.from_folder(tmp_path / "base", device="cpu", dtype=torch.float32)
    theirs.load_lora(tmp_path / "at/lora.safetensors")
    same_answers(theirs, tuned)


def test_mistral_inference_tied(tmp_path):
    "It has no tied model, no stretched positions, no long queries: its line is not given"
    for shape in set(SHAPES) - set(OLDER):
        lines = export_tuned(tuned_model(shape), "mistral", tmp_path / shape).lines
        assert [program for program, _ in lines] == ["vLLM"]


IN_MLX = ("dense v3", "dense tekken", "Mixtral", "tied", "Ministral 3")


@pytest.mark.parametrize("shape", IN_MLX)
def test_mlx(shape, tmp_path):
    "A folder in Hugging Face's layout has the same logits, ids and answers in MLX"
    mx = pytest.importorskip("mlx.core")
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    tuned = tuned_model(shape)
    write_hf(tmp_path, tuned)
    theirs, tok = load(str(tmp_path))
    for messages in CHATS:
        ids = chat_ids(tuned.tokenizer, messages)
        assert list(tok.apply_chat_template(messages, add_generation_prompt=True)) == ids
        got = torch.tensor(theirs(mx.array([ids]))[0].tolist()).log_softmax(-1)
        want = live_logits(tuned.model, [ids])[0].log_softmax(-1)
        assert (got - want).abs().max() < 5e-5
        answer = [int(token) for token, _ in generate_step(mx.array(ids), theirs, max_tokens=6)]
        assert answer == greedy_ids(tuned.model, [ids], 6)[0][len(ids):]


def test_mlx_line(tmp_path):
    "The line that an export prints answers; a shape that MLX computes otherwise has none, or says how far"
    pytest.importorskip("mlx_lm")
    made = export_tuned(tuned_model("dense v3"), "hf", tmp_path / "out", "f32")
    line = dict(made.lines)["MLX"].split()
    assert line[0] == "mlx_lm.chat"
    run = [sys.executable, "-m", "mlx_lm", "chat", *line[1:], "--max-tokens", "3"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(run, input="Hi\nq\n", capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-500:]
    assert "3 tokens" in done.stdout
    for shape in set(SHAPES) - set(IN_MLX) - {"window"}:
        assert "MLX" not in dict(export_tuned(tuned_model(shape), "hf", tmp_path / shape, "f32").lines)
    said = dict(export_tuned(tuned_model("window"), "hf", tmp_path / "window", "f32").lines)["MLX"]
    assert said.endswith("# right up to 6 tokens: MLX has no windows")
