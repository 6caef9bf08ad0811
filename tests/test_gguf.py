"""What goes out as GGUF, loaded by llama.cpp: its answers, its likelihoods, its tokens, its own packing."""
import ctypes
import glob
import json
import urllib.request
from dataclasses import replace

import numpy as np
import pytest

xllamacpp = pytest.importorskip("xllamacpp")
gguf = pytest.importorskip("gguf")
import torch

from mistral_nb.export.certificate import chat_ids, CHATS, greedy_ids, live_logits
from mistral_nb.export.exports import export_tuned
from mistral_nb.export.gguf_file import quantize_rows
from mistral_nb.export.tuned import Tuned
from mistral_nb.model.args import ModelError
from mistral_nb.model.weights import init_model
from test_export import KINDS, SHAPES, tuned_model

pytestmark = pytest.mark.usefixtures("one_thread")

LONGER = {"window": 60, "windows": (None, 60)}  # llama.cpp has no windows: its texts end there
TEXTS = [
    "Hi", " Do  it ", "  two\n\n lines\t", "naïve — 東京 🎉👩", "x = 1;\nfor i in y:\n    z(i)\n",
    "3.14 1234567", "a" * 90, "don't I'LL", 
    "\r\n\r\n", "مرحبا", "ﷺ ½ Ⅷ", "{\"a\": [1, 2]}", "\u200b z", "<b>bold</b>",
    "e = mc²",
]


class LlamaCpp:
    "A server of llama.cpp in this process"

    def __init__(self, file, adapter=None):
        p = xllamacpp.CommonParams()
        p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.verbosity, p.port = str(file), 128, 1, False, -1, 0
        p.cpuparams.n_threads = 1
        p.use_jinja = True
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        if adapter: p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = xllamacpp.Server(p)

    def post(self, path: str, **body):
        url, kind = self.server.listening_address + path, {"Content-Type": "application/json"}
        asked = urllib.request.Request(url, json.dumps(body).encode(), kind)
        with urllib.request.urlopen(asked, timeout=60) as answer: return json.loads(answer.read())

    def tokens(self, text: str, marks: bool = False) -> list[int]:
        own = {"add_special": marks and not text.startswith("<s>"), "parse_special": marks}
        return self.post("/tokenize", content=text, **own)["tokens"]

    def chat_ids(self, messages: list) -> list[int]:
        return self.tokens(self.post("/apply-template", messages=messages)["prompt"], marks=True)

    def answer(self, ids: list[int], n: int = 6) -> tuple[list[int], dict[int, float]]:
        "The likeliest next tokens, and likelihoods of the first"
        found = self.post(
            "/completion", prompt=ids, n_predict=n, temperature=0, n_probs=3, return_tokens=True,
            cache_prompt=False,
        )
        first = found["completion_probabilities"][0]["top_logprobs"]
        return found["tokens"], {q["id"]: q["logprob"] for q in first}


def changed(shape: str, kind: str = "plain") -> Tuned:
    "A model whose windows are long enough for the questions"
    if shape not in LONGER: return tuned_model(shape, kind)
    args, tokenizer = SHAPES[shape]
    SHAPES["longer"] = replace(args, sliding_window=LONGER[shape]), tokenizer
    try: return tuned_model("longer", kind)
    finally: del SHAPES["longer"]


def same_answers(llama: LlamaCpp, tuned: Tuned, most: float) -> None:
    for messages in CHATS:
        ids = chat_ids(tuned.tokenizer, messages)
        assert llama.chat_ids(messages) == ids
        tokens, likely = llama.answer(ids)
        assert tokens == greedy_ids(tuned.model, [ids], 6)[0][len(ids):]
        mine = live_logits(tuned.model, [ids])[0][-1].log_softmax(-1)
        assert max(abs(mine[i].item() - p) for i, p in likely.items()) < most


@pytest.mark.parametrize("shape", SHAPES)
def test_model(shape, tmp_path):
    "llama.cpp answers as the model in memory, from float32"
    tuned = changed(shape)
    made = export_tuned(tuned, "gguf", tmp_path / "out", "f32")
    llama = LlamaCpp(next(made.folder.glob("*.gguf")))
    same_answers(llama, tuned, 5e-3)
    for text in TEXTS: assert llama.tokens(text) == tuned.tokenizer.encode_text(text), text
    assert made.certificate.chats == len(CHATS)


def test_long_queries_alone(tmp_path):
    "Long queries without stretched positions, and rows without tokens"
    args = replace(SHAPES["Ministral 3"][0], yarn=None, vocab_size=32800)
    SHAPES["alone"] = args, "v3"
    try: tuned = tuned_model("alone")
    finally: del SHAPES["alone"]
    made = export_tuned(tuned, "gguf", tmp_path / "out", "f32")
    same_answers(LlamaCpp(next(made.folder.glob("*.gguf"))), tuned, 5e-3)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q4_k", "q4_0"])
def test_kinds(kind, tmp_path):
    "Every kind loads, and its likelihoods are near"
    tuned = tuned_model("dense v3")
    made = export_tuned(tuned, "gguf", tmp_path / "out", kind)
    ids = chat_ids(tuned.tokenizer, CHATS[0])
    _, likely = LlamaCpp(next(made.folder.glob("*.gguf"))).answer(ids)
    mine = live_logits(tuned.model, [ids])[0][-1].log_softmax(-1)
    apart = max(abs(mine[i].item() - p) for i, p in likely.items())
    assert apart < made.certificate.logprob_allowed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["dense v3", "Mixtral"])
def test_adapter(shape, kind, tmp_path):
    "The adapter alone on the base in another file; or it is refused, with the way out"
    tuned = tuned_model(shape, kind)
    if kind in ("dora", "norms", "tables"):
        with pytest.raises(ModelError, match="merge"): export_tuned(tuned, "gguf", tmp_path / "a", "lora")
        return
    made = export_tuned(tuned, "gguf", tmp_path / "a", "lora")
    base = Tuned(init_model(tuned.args, seed=3), tuned.tokenizer, dtype=torch.float32)
    export_tuned(base, "gguf", tmp_path / "b", "f32")
    file = next((tmp_path / "b").glob("*.gguf"))
    assert "--lora" in made.lines[0][1]
    same_answers(LlamaCpp(file, next((tmp_path / "a").glob("*-lora.gguf"))), tuned, 5e-3)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"])
def test_packing(kind):
    "The bytes of llama.cpp's own packing"
    lib = ctypes.CDLL(glob.glob(f"{xllamacpp.__path__[0]}/*.so")[0])
    pack, sizes = lib.ggml_quantize_chunk, (ctypes.c_int64,) * 3
    pack.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p]
    pack.restype = ctypes.c_size_t
    w = torch.randn(200, 1024, generator=torch.Generator().manual_seed(3)).numpy()
    w[5, :256], w[6, :32], w[7, 3], w[8] = 0, 0.5, 90, w[8] * 1e-6
    mine, number = quantize_rows(torch.from_numpy(w), kind), gguf.GGMLQuantizationType[kind.upper()]
    theirs = np.zeros_like(mine)
    pack(int(number), w.ctypes.data, theirs.ctypes.data, 0, *w.shape, None)
    assert (mine == theirs).all()
