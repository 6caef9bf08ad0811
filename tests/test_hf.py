"""The package beside Hugging Face transformers and peft on the same small random weights, in float32, to
the rounding at `TOLERANCE`."""
import shutil
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
import mistral_common
import numpy as np
import torch

from mistral_nb.data.pack import pack_samples
from mistral_nb.data.schema import parse_row
from mistral_nb.data.certify import certify
from mistral_nb.data.tokens import load_tokenizer, TokenSample
from mistral_nb.infer.generate import generate
from mistral_nb.model.lora import lora_layers, add_adapters, load_adapter_state, merged_state
from mistral_nb.model.layouts import unpermute
from mistral_nb.model.weights import load_model, read_tensors, save_model, weight_files
from mistral_nb.train.checkpoint import trainable_params
from mistral_nb.train.step import batch_loss

SHAPE = dict(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=None, sliding_window=None, max_position_embeddings=512,
    attn_implementation="eager",
)
ROPE = dict(rope_type="default", rope_theta=1e6)
ALL = dict(head_dim=24, sliding_window=8, rope_parameters=ROPE, tie_word_embeddings=True)
MOE = dict(num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=2)
CASES = {  # changes to SHAPE
    "dense": {},
    "head_dim": dict(head_dim=24),
    "tied": dict(tie_word_embeddings=True),
    "theta": dict(rope_parameters=ROPE),
    "window": dict(sliding_window=8),
    "all": ALL,
    "mixtral": MOE,
    "mixtral_all": MOE | ALL,
}
TOLERANCE = dict(
    logits=(1e-5, 2e-5), loss=(1e-6, 0.0), grads=(1e-5, 3e-6), merged=(1e-6, 5e-7)
)  # relative, absolute
RANK, SCALING = 4, 1.5
ADAPTED = ["dense", "all", "mixtral", "mixtral_all"]
ATTENTION = dict(wq="q_proj", wk="k_proj", wv="v_proj", wo="o_proj")
FEED_FORWARD = dict(w1="gate_proj", w2="down_proj", w3="up_proj")


pytestmark = pytest.mark.usefixtures("one_thread")


def close(mine: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(
        mine.detach(), theirs.detach(), rtol=TOLERANCE[what][0], atol=TOLERANCE[what][1]
    )


def ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def pair(case: str, folder, **save):
    """A Hugging Face model with weights that make every part of it matter, and the package's from the
    folder it was saved in"""
    kind = "Mixtral" if case.startswith("mixtral") else "Mistral"
    theirs = (
        getattr(transformers, f"{kind}ForCausalLM")(
            getattr(transformers, f"{kind}Config")(**SHAPE | CASES[case])
        )
        .float()
        .eval()
    )
    g = torch.Generator().manual_seed(1)
    for p in theirs.parameters():
        p.normal_(float(p.dim() == 1), 0.3 if p.dim() == 1 else 1.2 * p.shape[-1] ** -0.5, generator=g)
    theirs.save_pretrained(folder, **save)
    return theirs, load_model(folder)


@torch.no_grad()
def their_logits(theirs, tokens: list[int]) -> torch.Tensor: return theirs(torch.tensor([tokens])).logits[0]


@torch.no_grad()
def same_logits(theirs, mine, lengths=(40,)) -> None:
    "A packed row of documents beside each document alone"
    docs = [ids(n, seed) for seed, n in enumerate(lengths)]
    packed = mine(torch.tensor(sum(docs, [])), lengths).split(list(lengths))
    for got, doc in zip(packed, docs): close(got, their_logits(theirs, doc), "logits")


@pytest.mark.parametrize("case", CASES)
def test_logits(case, tmp_path):
    """A folder written by save_pretrained gives the logits of the model that wrote it, and a sliding
    window matters to them."""
    theirs, mine = pair(case, tmp_path)
    assert (mine.args.head_dim, mine.args.rope_theta) == (
        theirs.model.layers[0].self_attn.head_dim, theirs.config.rope_parameters["rope_theta"],
    )
    same_logits(theirs, mine)
    if mine.args.sliding_window:
        theirs.config.sliding_window = None
        assert (their_logits(theirs, ids(40))[8:] - mine(torch.tensor(ids(40)), [40])[8:]).abs().max() > 0.1


@pytest.mark.parametrize("case, save, name", [
    ("mixtral", {}, "block_sparse_moe.experts.3.w1.weight"),
    ("mixtral", dict(save_original_format=False), "mlp.experts.gate_up_proj"),
    ("dense", dict(max_shard_size="100KB"), "mlp.up_proj.weight"),
])
def test_layouts(case, save, name, tmp_path):
    "Experts saved one by one, experts saved fused, and weights split over several files are all read."
    theirs, mine = pair(case, tmp_path, **save)
    files = weight_files(tmp_path)
    assert f"model.layers.1.{name}" in dict(read_tensors(files)) and (len(files) > 1) == (
        "max_shard_size" in save
    )
    same_logits(theirs, mine)


@pytest.mark.parametrize("case", CASES)
def test_packed(case, tmp_path):
    "Each document of a packed row has the logits it has alone."
    same_logits(*pair(case, tmp_path), lengths=(13, 1, 30, 8, 9))


def their_name(name: str, experts: bool) -> str:
    "The name in an adapter file of peft, experts one by one as transformers 4 had them"
    name = name.replace("feed_forward", "block_sparse_moe" if experts else "mlp")
    for a, b in (ATTENTION | ({} if experts else FEED_FORWARD)).items():
        name = name.replace(f".{a}.", f".{b}.")
    return "base_model.model.model." + name.replace("attention", "self_attn")


def reorder(name: str, t: torch.Tensor, head_dim: int) -> torch.Tensor:
    "An adapter tensor of Hugging Face in Mistral's order of rows"
    return unpermute(t, head_dim) if ("wq.lora_B" in name or "wk.lora_B" in name) else t


def with_adapter(case: str, folder):
    "Both models with the same random adapter on all seven projections, the second matrix not zero"
    peft = pytest.importorskip("peft")
    theirs, mine = pair(case, folder)
    add_adapters(mine, RANK, SCALING)
    g = torch.Generator().manual_seed(2)
    state = {
        n: torch.randn(p.shape, generator=g) * 0.3 * p.shape[1] ** -0.5
        for n, p in trainable_params(mine).items()
    }
    load_adapter_state(
        mine, {n: reorder(n, t, mine.args.head_dim) for n, t in state.items()}, file_scaling=SCALING
    )
    experts = mine.args.moe is not None  # which peft still calls by their old names
    targets = [*ATTENTION.values(), *(FEED_FORWARD if experts else FEED_FORWARD.values())]
    theirs = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=RANK, lora_alpha=int(RANK * SCALING), target_modules=targets, task_type="CAUSAL_LM"
        ),
    )
    assert not peft.set_peft_model_state_dict(
        theirs, {their_name(n, experts): t for n, t in state.items()}
    ).unexpected_keys
    return theirs, mine


def their_grads(theirs, mine) -> dict[str, torch.Tensor]:
    """Gradients of peft's adapter under the package's names; peft fuses experts, with w1 and w3 as blocks
    of one adapter of twice the rank"""
    out, found, experts = {}, dict(theirs.named_parameters()), mine.args.moe and mine.args.moe.num_experts
    for name in trainable_params(mine):
        at, (*_, e, w, half, _) = their_name(name, False).removesuffix("weight"), name.split(".")
        if ".experts." in name:
            at = f"{at.split('experts')[0]}experts.{'' if w == 'w2' else 'base_layer.'}{half}."
        g = found[f"{at}default.weight"].grad
        if ".experts." in name:
            g = (
                g.unflatten(0, (experts, -1))[int(e)]
                if half == "lora_A"
                else g.unflatten(1, (-1, experts))[..., int(e)]
            )
            for dim in range(0 if w == "w2" else 1 + (half == "lora_B")): g = g.chunk(2, dim)[w == "w3"]
        out[name] = reorder(name, g, mine.args.head_dim)
    return out


@pytest.mark.parametrize("case", ADAPTED)
def test_lora_gradients(case, tmp_path):
    """The mean loss over the trained tokens of a packed, padded row and every gradient of the adapter are
    those of peft on padded documents."""
    theirs, mine = with_adapter(case, tmp_path)
    docs = [
        TokenSample(np.array(ids(n, n), dtype=np.int32), np.random.RandomState(n).rand(n) < 0.6)
        for n in (31, 12, 20)
    ]
    batch = pack_samples([docs], 64)
    assert batch.padding == 4 and 0 < batch.trained < 60 and any(d.mask[0] for d in docs)
    loss = batch_loss(mine, batch) / batch.trained
    loss.backward()
    rows = [torch.tensor(d.tokens, dtype=torch.long) for d in docs]
    labels = [t.where(torch.tensor(d.mask), -100) for t, d in zip(rows, docs)]
    def pad(parts, value):
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)
    their_loss = theirs(
        input_ids=pad(rows, 0), attention_mask=pad([torch.ones_like(r) for r in rows], 0),
        labels=pad(labels, -100),
    ).loss
    their_loss.backward()
    close(loss, their_loss, "loss")
    grads = their_grads(theirs, mine)
    assert len(grads) == 2 * mine.args.n_layers * (
        4 + 3 * (mine.args.moe.num_experts if mine.args.moe else 1)
    )
    for name, p in trainable_params(mine).items():
        assert p.grad.abs().max() > 1e-4, name
        close(p.grad, grads[name], "grads")


@pytest.mark.parametrize("case", ADAPTED)
def test_merged_state(case, tmp_path):
    """The merged weights are those that peft's merge_and_unload leaves, and only adapted ones differ from
    the base."""
    theirs, mine = with_adapter(case, tmp_path / "base")
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    got, want, base = (
        merged_state(mine),
        *(dict(load_model(tmp_path / d).named_parameters()) for d in ("merged", "base")),
    )
    assert got.keys() | {"output.weight"} == want.keys() | {"output.weight"}  # tied or not
    for name, w in want.items():
        close(got[name], w, "merged")
        assert torch.equal(got[name], base[name]) != (name.removesuffix(".weight") in lora_layers(mine)), name


@pytest.mark.parametrize("case", ADAPTED)
def test_merged_folder(case, tmp_path):
    """The merged weights, written by save_model and read again, give the logits of peft's model before
    merging."""
    theirs, mine = with_adapter(case, tmp_path / "base")
    save_model(merged_state(mine), mine.args, tmp_path / "merged")
    same_logits(theirs, load_model(tmp_path / "merged"))


@pytest.mark.parametrize("case", ADAPTED)
def test_generate(case, tmp_path):
    """Greedy generation with the cache, prompts of several lengths at once, writes the ids that
    model.generate writes for each alone."""
    theirs, mine = pair(case, tmp_path)
    prompts = [ids(n, n) for n in (5, 1, 23)]
    got = generate(mine, prompts, max_tokens=30)
    stop = got[0][12]
    for stop_id, answers in ((None, got), (stop, generate(mine, prompts, stop=stop, max_tokens=30))):
        for prompt, answer in zip(prompts, answers):
            theirs.generation_config.eos_token_id = stop_id
            full = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=0
            )[0, len(prompt) :].tolist()
            assert answer == [t for t in full if t != stop_id] and (stop_id or len(set(answer)) > 5)
    assert got[0].index(stop) == len(answers[0]) < 30


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def hf_tokenizer(folder, template: str) -> None:
    """A v3 tokenizer file, and beside it a fast tokenizer of transformers with the same pieces and a chat
    template"""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast
    file = Path(mistral_common.__file__).parent / "data/mistral_instruct_tokenizer_240323.model.v3"
    shutil.copy(file, folder / "tokenizer.model.v3")
    model = load_tokenizer(folder).base._model
    known = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    ranked = sorted(
        (p for p, i in known.items() if len(p) > 1 and model.get_score(i) < 0),
        key=lambda p: -model.get_score(known[p]),
    )
    merges = [(p[:k], p[k:]) for p in ranked for k in range(1, len(p)) if p[:k] in known and p[k:] in known]
    fast = Tokenizer(models.BPE(known, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.ByteFallback()
    fast.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in ("<s>", "</s>", "[INST]", "[/INST]")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", chat_template=template
    ).save_pretrained(folder)


@pytest.mark.parametrize("template, same", [
    (TEMPLATE, True),
    (TEMPLATE.replace("[/INST]", " [/INST]"), False),
    (TEMPLATE.replace("{% for", "{{ raise_exception('no') }}{% for"), False),
])
def test_certify_template(tmp_path, template, same):
    """The ids that we train on against the chat template in the model's folder: equal, or the first
    difference is pointed at"""
    hf_tokenizer(tmp_path, template)
    sample = parse_row(
        {
            "messages": [
                {"role": "user", "content": "What is the tide?"},
                {"role": "assistant", "content": "High."}, {"role": "user", "content": "Now?"},
                {"role": "assistant", "content": "Low."},
            ]
        }
    )
    found = certify(sample, load_tokenizer(tmp_path)).checks
    assert [c.same for c in found] == [True, True, same] and found[-1].what == "chat template", found
    if not same: assert found[-1].theirs


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty(penalty, tmp_path):
    "The ids that transformers writes with the same penalty"
    theirs, mine = pair("dense", tmp_path)
    prompt = ids(9)
    theirs.generation_config.eos_token_id = None
    how = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, repetition_penalty=penalty)
    want = theirs.generate(torch.tensor([prompt]), **how)[0, 9:].tolist()
    assert generate(mine, [prompt], max_tokens=20, repetition_penalty=penalty)[0] == want
