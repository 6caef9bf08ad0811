"""Released models by their files: each has the logits of transformers or is refused by its name.

Newer families are in test_family.py."""
import json
import shutil
import time
import warnings
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
import mistral_common
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mistral_nb.cli import main
from mistral_nb.infer.chat import load_tuned
from mistral_nb.model import keys
from mistral_nb.model.args import ModelArgs, ModelError, from_hf, load_model_args
from mistral_nb.model.lora import GUARD_TENSOR, merged_state
from mistral_nb.model.weights import init_model, load_model, save_model
from mistral_nb.train.loop import Trainer
from mistral_nb.train.plan import plan

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = dict(dim=64, n_layers=2, head_dim=16, hidden_dim=96, n_heads=4, n_kv_heads=2, norm_eps=1e-5,
           vocab_size=120)
HF = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4,
          num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=120, hidden_act="silu",
          tie_word_embeddings=False)
MOE = dict(num_experts=4, num_experts_per_tok=2)
HF_MOE = dict(num_local_experts=4, num_experts_per_tok=2)
SAVED = dict(  # what folders of Mistral's models and their derivatives hold besides
    _name_or_path="some/model", architectures=["MistralForCausalLM"], attention_dropout=0.0,
    bos_token_id=1, eos_token_id=2, pad_token_id=None, initializer_range=0.02, max_position_embeddings=32768,
    torch_dtype="bfloat16", transformers_version="4.42.0", use_cache=True,
)


# the models that can be trained

BIG = dict(rope_theta=1e6)
NOTHING = dict(  # what newer models list, where they have none of it
    model_type="transformer", yarn=None, llama_4_scaling=None, vision_encoder=None, quantization=None,
    multimodal={}, q_lora_rank=None, kv_lora_rank=None, tied_embeddings=False, causal=True, lora=None,
    dtype="bfloat16", max_position_embeddings=4096,
)
LOADS = {  # keys of params.json on top of OWN, and what a config of transformers says of the same
    "7B v0.1": (dict(sliding_window=8), dict(rope_theta=1e4, sliding_window=8)),
    "7B v0.2 and v0.3, Mathstral, Codestral 22B": (BIG, BIG),
    "Mixtral 8x7B, first release": (dict(moe=MOE), BIG | HF_MOE),
    "Mixtral 8x22B": (BIG | dict(moe=MOE), BIG | HF_MOE),
    "Nemo 12B": (BIG | dict(head_dim=24, max_seq_len=1024000), BIG | dict(head_dim=24)),
    "Small 3 (2501), Devstral 2507, Magistral 2507": (
        dict(rope_theta=1e8, head_dim=8, max_seq_len=32768), dict(rope_theta=1e8, head_dim=8)),
    "keys that say that nothing is new": (BIG | NOTHING, BIG),
    "one window, said for each layer": (dict(_sliding_window=[8, 8]), dict(rope_theta=1e4, sliding_window=8)),
    "tied": (BIG | dict(tied_embeddings=True), BIG | dict(tie_word_embeddings=True)),
}
FULL = BIG | dict(sliding_window=None)
MIXTURE = dict(model_type="mixtral") | HF_MOE
NESTED = dict(rope_type="default", rope_theta=1e6)
CONFIGS = {  # keys of config.json on top of HF and SAVED; "-key" takes one out
    "7B v0.1": dict(sliding_window=8, rope_theta=10000.0),
    "7B v0.3": FULL,
    "zephyr, OpenHermes (32002 tokens)": dict(sliding_window=8, rope_theta=1e4, vocab_size=122),
    "MistralLite": BIG | dict(sliding_window=12),
    "Nous-Hermes-Mixtral": FULL | MIXTURE | dict(output_router_logits=False, router_aux_loss_coef=0.02),
    "Mixtral without rope_theta": MIXTURE | dict(router_jitter_noise=0.0),
    "Mixtral with a window": BIG | MIXTURE | dict(sliding_window=8),
    "no rope_theta": dict(sliding_window=None),
    "no window said": BIG,
    "no num_key_value_heads": {"sliding_window": None, "num_attention_heads": 16, "-num_key_value_heads": 1},
    "rope_parameters": dict(sliding_window=None, rope_parameters=NESTED),
    "rope_parameters go first": dict(sliding_window=None, rope_theta=1e4, rope_parameters=NESTED),
    "rope_scaling goes before them": FULL | dict(
        rope_scaling=dict(type="default"), rope_parameters=dict(rope_theta=1e4)),
    "a stretch by 1": FULL | dict(rope_scaling=dict(type="linear", factor=1.0)),
    "layer_types that say the same": BIG | dict(sliding_window=8, layer_types=["sliding_attention"] * 2),
    "biases that are not": FULL | dict(attention_bias=False, mlp_bias=False, unsloth_version="2025.1"),
    "swish": FULL | dict(hidden_act="swish", head_dim=24),
    "tied": FULL | dict(tie_word_embeddings=True),
}


def ids(n: int) -> list[int]:
    return torch.randint(3, 120, (n,), generator=torch.Generator().manual_seed(0)).tolist()


@torch.no_grad()
def theirs(config) -> torch.nn.Module:
    "A model of transformers with weights that make every part of it matter"
    kind = "Mixtral" if config.model_type == "mixtral" else "Mistral"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.dim() == 1: p.normal_(1.0, 0.3, generator=g)
        else: p.normal_(0.0, 1.2 * p.shape[-1] ** -0.5, generator=g)
    return model


@torch.no_grad()
def same_logits(mine, model, n: int = 40) -> None:
    want = model(torch.tensor([ids(n)])).logits[0]
    assert (mine(torch.tensor(ids(n)), [n]) - want).abs().max() <= 1e-5 * want.abs().max()


def write(folder: Path, name: str, values) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("name", LOADS)
def test_params(name, tmp_path):
    "A params.json as a release has it, beside transformers with the settings that the release has there."
    own, hf = LOADS[name]
    kind = transformers.MixtralConfig if "num_local_experts" in hf else transformers.MistralConfig
    values = HF | dict(sliding_window=None, head_dim=16, attn_implementation="eager") | hf
    theta = dict(rope_type="default", rope_theta=values.pop("rope_theta"))
    config = kind(**values, rope_parameters=theta)
    model = theirs(config)
    model.save_pretrained(tmp_path / "hf")
    between = load_model(tmp_path / "hf")
    save_model(between.state_dict(), between.args, tmp_path / "own")
    write(tmp_path / "own", "params.json", OWN | own)
    same_logits(load_model(tmp_path / "own"), model)


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name, tmp_path):
    "A config.json, edited in all the ways that are known, as transformers reads it."
    change = CONFIGS[name]
    config = dict(model_type="mistral") | HF | SAVED | {k: v for k, v in change.items() if k[0] != "-"}
    for k in change: config.pop(k[1:] if k.startswith("-") else "", None)
    write(tmp_path, "config.json", config)
    read = transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation="eager")
    model = theirs(read)
    model.save_pretrained(tmp_path)
    write(tmp_path, "config.json", config)
    mine = load_model(tmp_path)
    assert mine.args.sliding_window == read.sliding_window
    assert mine.args.rope_theta == read.rope_parameters["rope_theta"]
    assert mine.args.n_kv_heads == read.num_key_value_heads
    same_logits(mine, model)


@pytest.mark.parametrize("kind", ["Mistral", "Mixtral"])
def test_whole_config(kind):
    "Every key that this transformers knows for these models, defaults too, is read or known to be harmless."
    config = getattr(transformers, f"{kind}Config")()
    for values in (config.to_dict(), config.to_diff_dict()):
        saved = json.loads(json.dumps(values | {"model_type": kind.lower()}))
        assert from_hf(saved).sliding_window == config.sliding_window


# the models that cannot be trained yet

MLA = dict(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16)
STRETCH = dict(beta=32.0, alpha=1.0, factor=16.0, original_max_position_embeddings=16384, apply_scale=False)
YARN = dict(yarn=STRETCH)
SCALED = dict(llama_4_scaling=dict(original_max_position_embeddings=16384, beta=0.1))
EYES = dict(vision_encoder=dict(hidden_size=32, num_channels=3, image_size=64, patch_size=16))
WHISPER = dict(encoder_args=dict(dim=8), downsample_args=dict(downsample_factor=4))
EARS = dict(multimodal=dict(whisper_model_args=WHISPER))
FP8 = dict(quantization=dict(qformat_weight="fp8_e4m3", qscheme_act="TENSOR"))
SHARED = dict(moe=MOE | dict(num_shared_experts=1, first_k_dense_replace=1, expert_hidden_dim=8))
MAMBA = dict(dim=64, n_layers=2, vocab_size=120, n_groups=8, rms_norm=True, residual_in_fp32=True,
             fused_add_norm=True, pad_vocab_size_multiple=1, tie_embeddings=False)
PARAMS = {  # params.json, and words of the refusal
    "Voxtral": (OWN | EARS, "Voxtral"),
    "Large 3": (OWN | MLA | YARN | SCALED | SHARED, "Large 3"),
    "Large 3 without YaRN": (OWN | MLA, "Large 3"),
    "Large 3 by its experts": (OWN | SHARED, "Large 3"),
    "Small 4": (OWN | MLA | SCALED, "Small 4"),
    "Codestral Mamba": (MAMBA | dict(model_type="mamba"), "Codestral Mamba"),
    "Codestral Mamba without its type": (MAMBA, "Codestral Mamba"),
    "Codestral Mamba by its type": (OWN | dict(model_type="mamba"), "Codestral Mamba"),
    "another packing": (OWN | dict(quantization=dict(qformat_weight="int4")), "quantization"),
    "an activation": (OWN | dict(activation="gelu"), "activation"),
    "biases": (OWN | dict(use_biases=True), "use_biases"),
    "an encoder": (OWN | dict(n_encoder_layers=2), "n_encoder_layers"),
    "rope_scaling": (OWN | dict(rope_scaling=dict(type="linear", factor=2)), "rope_scaling"),
    "both directions": (OWN | dict(causal=False), "causal"),
    "something new": (OWN | dict(qk_norm=True), "qk_norm"),
    "something new in moe": (OWN | dict(moe=MOE | dict(top_k_groups=2)), "moe.top_k_groups"),
}


def whole(name: str, **change) -> dict:
    "The config.json that this transformers writes for a kind of model"
    config = getattr(transformers, f"{name}Config", None)
    if config is None: pytest.skip(f"this transformers has no {name}")
    return config(**change).to_dict() | {"model_type": config.model_type}


MISTRAL = dict(model_type="mistral", sliding_window=None) | HF | SAVED
LAYERS = ["full_attention", "sliding_attention"]
KINDS = {  # kinds of models with configs of their own
    "Voxtral": lambda: whole("Voxtral"),
    "Small 4": lambda: whole("Mistral4"),
    "Large 3 and Small 4": lambda: whole("Mistral3", text_config=whole("Mistral4")),
    "Codestral Mamba": lambda: whole("Mamba2"),
    'model_type "llama"': lambda: whole("Llama"),
}
CHANGES = {  # of a plain config
    "layer_types": dict(sliding_window=None, layer_types=LAYERS),
    "sliding_window": dict(sliding_window=[None, 8]),
    "hidden_act": dict(hidden_act="gelu"),
    "quantization_config": dict(quantization_config=dict(quant_method="awq")),
    "quantization_config ": dict(quantization_config=dict(quant_method="bitsandbytes", load_in_8bit=True)),
    "rope_scaling": dict(rope_scaling=dict(rope_type="dynamic", factor=4.0)),
    "rope_parameters": dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e6)),
    "partial_rotary_factor": dict(partial_rotary_factor=0.5),
    "attention_bias": dict(attention_bias=True),
    "mlp_bias": dict(mlp_bias=True),
    "is_causal": dict(is_causal=False),
    "text_config": dict(text_config=dict(hidden_size=8)),
    "num_local_experts": HF_MOE,
    "final_logit_softcapping": dict(final_logit_softcapping=30.0),
}


def refused(folder: Path, file: str, values: dict) -> str:
    "What is said of a folder with nothing but this file"
    write(folder, file, json.loads(json.dumps(values)))
    with pytest.raises(ModelError) as e: load_model(folder)
    assert str(folder / file) in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("name", PARAMS)
def test_params_refused(name, tmp_path):
    "A model that would compute something else is refused by its name or the key's, before its weights."
    values, words = PARAMS[name]
    said = refused(tmp_path, "params.json", values)
    assert words in said
    if words[0].isupper(): assert "cannot be trained" in said and said.endswith("can")  # and what can be


@pytest.mark.parametrize("name", KINDS)
def test_kinds_refused(name, tmp_path):
    "The config.json that transformers itself writes for another kind of model."
    said = refused(tmp_path, "config.json", KINDS[name]())
    assert name in said and ("llama" in name or "cannot be trained" in said and said.endswith("can"))


@pytest.mark.parametrize("name", CHANGES)
def test_changes_refused(name, tmp_path):
    "A key of a plain config.json that changes what the model computes is named."
    assert name.strip() in refused(tmp_path, "config.json", MISTRAL | CHANGES[name])


# wrong values

WRONG = [  # 56 kinds
    True, False, "", " ", "x", "32", "1e-5", "true", "null", "NaN", "ein", "0x10", "1,000", "∞", "\x00",
    [], [[]], [1], [1, 2], ["8"], [None, 1], [True], [{}], [0], [-8], {}, {"a": 1}, {"value": 8}, {"dim": {}},
    -1, -8, -(10**9), -(10**400), 0, 10**19, 10**30, 10**400, 2**63, 2**64 + 1,
    -0.0, 0.0, 0.5, 1.5, 31.9, -1.5, -1e-5, 1e-300, 5e-324, 1e9, 1e16, 1e30, 3e38, 1e308,
    float("nan"), float("inf"), -float("inf"),
]
FINE = dict(rope_theta=[1.5, 31.9, 1e9], sliding_window=[[], [1]], tied_embeddings=[True, False])  # of these
FINE_THERE = {"params.json": [[1, 2], [None, 1]], "config.json": []}  # windows of each layer
NEEDED = {k.name for k in keys.SHAPE_KEYS if k.needed}


OWN_PATHS = {k.name: ("moe", k.name) if k.name in keys.MOE_KEYS else (k.name,) for k in keys.SHAPE_KEYS}
GOOD = {  # for each file, good values, and the path of each key by our name
    "params.json": (OWN | dict(moe=MOE, rope_theta=1e6), OWN_PATHS),
    "config.json": (MISTRAL | MIXTURE | BIG, {k.name: (k.hf,) for k in keys.SHAPE_KEYS}),
}


def changed(values: dict, path: tuple[str, ...], *value) -> dict:
    "A copy with another value at a path, or without the key"
    out = json.loads(json.dumps(values))
    block = out if len(path) == 1 else out[path[0]]
    block.pop(path[-1], None)
    if value: block[path[-1]] = value[0]
    return out


def said_of(folder: Path, file: str, values: dict) -> str:
    "What is wrong with values, by a ModelError that names the file; empty if nothing is"
    write(folder, file, values)
    try: load_model_args(folder)
    except ModelError as e:
        assert str(folder / file) in str(e) and len(str(e)) < 400 + len(str(folder))
        return str(e)
    return ""


@pytest.mark.parametrize("file", GOOD)
def test_wrong_values(file, tmp_path):
    "Whatever stands under a key that is read: a ModelError that names it, or a value that it may have."
    (good, paths), began, n = GOOD[file], time.perf_counter(), 0
    assert len(WRONG) == 56 and not said_of(tmp_path, file, good)
    for name, path in paths.items():
        needed = name in NEEDED and path[-1] != "num_key_value_heads"  # which transformers can do without
        for value in [(v,) for v in WRONG] + [(None,), ()] * needed:
            said, n = said_of(tmp_path, file, changed(good, path, *value)), n + 1
            right = FINE.get(name, []) + FINE_THERE[file] * (name == "sliding_window")
            fine = value and json.dumps(value[0]) in map(json.dumps, right)
            assert not said if fine else path[-1] in said, (name, value)
    assert n >= 13 * 56 + 2 * 8 and time.perf_counter() - began < 20


BLOCKS = {
    "params.json": "moe sliding_window _sliding_window rope_scaling quantization model_type yarn causal "
    "llama_4_scaling vision_encoder",
    "config.json": "rope_parameters rope_scaling quantization_config layer_types model_type text_config",
}


@pytest.mark.parametrize("file", BLOCKS)
def test_wrong_blocks(file, tmp_path):
    "The same for what is no number: a ModelError or nothing, never another exception."
    good = GOOD[file][0]
    for key in BLOCKS[file].split():
        for value in WRONG: said_of(tmp_path, file, good | {key: value})
    for key in ("rope_theta", "rope_type", "type", "factor", "other") if file == "config.json" else ():
        for value in WRONG:
            said = said_of(tmp_path, file, good | {"rope_parameters": {key: value}})
            assert not said or "rope_parameters" in said


RELATIONS = {  # values that are fine alone
    "n_kv_heads n_heads": dict(n_kv_heads=3),
    "n_heads dim head_dim": dict(n_heads=6, n_kv_heads=2, head_dim=None),
    "head_dim": dict(head_dim=15),
    "num_experts_per_tok num_experts": dict(moe=dict(num_experts=2, num_experts_per_tok=3)),
}


@pytest.mark.parametrize("names", RELATIONS)
def test_relations(names, tmp_path):
    said = said_of(tmp_path, "params.json", OWN | RELATIONS[names])
    assert said and all(n in said for n in names.split())


UNREADABLE = {
    "a list": b"[1]", "a text": b'"dim"', "a number": b"3", "null": b"null", "nothing": b"",
    "half": b'{"dim": 4',
    "UTF-16": '{"dim": 4}'.encode("utf-16"), "bytes": bytes(range(128, 256)), "brackets": b"[" * 200_000,
    "digits": b'{"dim": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("file", ["params.json", "config.json"])
def test_unreadable(file, tmp_path):
    "A file that holds no object is said as that; so is the other one renamed, and a folder of its name."
    for content in UNREADABLE.values():
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ModelError, match=file): load_model_args(tmp_path)
    mine, other = (OWN, MISTRAL) if file == "params.json" else (MISTRAL, OWN)
    assert "rename it to" in said_of(tmp_path, file, other)
    (tmp_path / file).write_text("\ufeff" + json.dumps(mine), encoding="utf-8")  # as some editors save
    assert load_model_args(tmp_path).dim == 64
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
    with pytest.raises(ModelError, match=f"{file} cannot be read"): load_model_args(tmp_path)


# folders

def small(folder: Path, **change) -> ModelArgs:
    args = ModelArgs(**OWN | dict(rope_theta=1e6) | change)
    save_model(init_model(args, 1).state_dict(), args, folder)
    return args


def part(i: int, n: int) -> str: return f"consolidated-{i:05}-of-{n:05}.safetensors"


def put(folder: Path, name: str, tensor: torch.Tensor) -> None:
    file = folder / part(1, 1)
    save_file(load_file(file) | {name: tensor}, file)


def only_index(folder: Path) -> None:
    (folder / part(1, 1)).unlink()
    write(folder, "model.safetensors.index.json", {"weight_map": {"a": "model-00007-of-00009.safetensors"}})


def two_halves(folder: Path) -> None:
    shutil.copy(folder / part(1, 1), folder / "consolidated.01.safetensors")
    (folder / part(1, 1)).rename(folder / "consolidated.00.safetensors")


W, NAN = "layers.0.attention.wq.weight", torch.full((64, 64), torch.nan)
FOLDERS = {  # words of the error, and what is done to a folder of one part
    "beside parts of the same weights": lambda d: shutil.copy(d / part(1, 1), d / "consolidated.safetensors"),
    "lacks consolidated-00001-of-00003.safetensors": lambda d: (d / part(1, 1)).rename(d / part(2, 3)),
    "model-00007-of-00009.safetensors, which is not there": only_index,
    "save_pretrained": lambda d: (d / part(1, 1)).rename(d / "pytorch_model.bin"),
    "tensor parallelism": two_halves,
    f"{W} holds NaN or infinity": lambda d: put(d, W, NAN),
    "norm.weight holds NaN or infinity": lambda d: put(d, "norm.weight", torch.full((64,), torch.inf)),
    "output.weight is stored in int64": lambda d: put(d, "output.weight", torch.ones(120, 64).long()),
    f"{W} is stored in complex64": lambda d: put(d, W, torch.ones(64, 64, dtype=torch.complex64)),
    f"{W} is stored in float8_e4m3fn": lambda d: put(d, W, torch.ones(64, 64).to(torch.float8_e4m3fn)),
    "wq.weight has scales beside it": lambda d: put(d, "layers.0.attention.wq.qscale_weight", torch.ones(1)),
}


@pytest.mark.parametrize("words", FOLDERS)
def test_folders(words, tmp_path):
    "What is wrong with the weights of a folder is said by its file or its tensor."
    small(tmp_path)
    (tmp_path / "consolidated.safetensors").rename(tmp_path / part(1, 1))
    put(tmp_path, "rope.freqs", torch.ones(8))  # which repeats what is known, and is passed over
    load_model(tmp_path)
    FOLDERS[words](tmp_path)
    with pytest.raises(ModelError) as e: load_model(tmp_path)
    assert words in str(e.value)


def test_a_billion_layers(tmp_path):
    began = time.perf_counter()
    for n in (1e9, 10**9): assert "n_layers" in refused(tmp_path, "params.json", OWN | dict(n_layers=n))
    assert time.perf_counter() - began < 1


# runs

@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    "A tiny model with a tokenizer, and one chat"
    folder = tmp_path_factory.mktemp("home")
    small(folder / "model", vocab_size=32768, n_layers=1, dim=16, hidden_dim=16)
    tokenizer = Path(mistral_common.__file__).parent / "data/mistral_instruct_tokenizer_240323.model.v3"
    shutil.copy(tokenizer, folder / "model/tokenizer.model.v3")
    row = {"messages": [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "High."}]}
    (folder / "chats.jsonl").write_text((json.dumps(row) + "\n") * 4)
    return folder


def settings(home: Path, run: Path, **change) -> dict:
    base = dict(model_id_or_path=str(home / "model"), run_dir=str(run), seq_len=16, max_steps=1)
    data = dict(instruct_data=str(home / "chats.jsonl"), cache="none")
    return base | dict(data=data, optim=dict(lr=0.01)) | change


def test_architecture_first(home, tmp_path, capsys):
    "A model that cannot be trained is named before its weights are missed, also by both commands."
    write(tmp_path / "four", "params.json", OWN | MLA)
    args = settings(home, tmp_path / "run", model_id_or_path=str(tmp_path / "four"))
    for call in (Trainer, plan):
        for more in ({}, dict(resume=True)):
            with pytest.raises(ModelError, match="Small 4"): call(args, **more)
    write(tmp_path, "run.yaml", args)
    for command in ("train", "plan"):
        assert main([command, str(tmp_path / "run.yaml")]) == 1
        assert "Small 4" in capsys.readouterr().err


def peer_takes(state: dict[str, torch.Tensor], dtype: torch.dtype) -> bool:
    "What mistral-inference asserts of an adapter: one type, the model's, and a word in each name"
    return {t.dtype for t in state.values()} == {dtype} and all("lora" in name for name in state)


ALSO = dict(also_train=["norms", "output"])
ADAPTERS = {"plain": {}, "dora": dict(dora=True), "also": ALSO, "both": dict(dora=True) | ALSO}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_only_here(kind, home, tmp_path):
    "What others would load by half is announced, marked, refused by them, and read by us, marked or not."
    said, x = "only mistral_nb loads such an adapter", torch.tensor(ids(20))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        lora = dict(rank=2) | ADAPTERS[kind]
        trainer = Trainer(settings(home, tmp_path / "run", lora=lora, dtype="float32", device="cpu"))
    assert sum(said in str(w.message) for w in seen) == (kind != "plain")
    folder = trainer.fit().checkpoint / "consolidated"
    state, params = load_file(folder / "lora.safetensors"), json.loads((folder / "params.json").read_text())
    with safe_open(folder / "lora.safetensors", "pt") as f: note = f.metadata()
    assert [said in text.get("only", "") for text in (note, params["lora"])] == [kind != "plain"] * 2
    assert peer_takes(state, torch.float32) == (kind == "plain")
    want = trainer.model.eval()(x, [20])
    tuned = load_tuned(home / "model", folder)
    got = tuned(x, [20])
    save_model(merged_state(tuned), tuned.args, tmp_path / "merged")  # as README says
    for found in (got, load_model(tmp_path / "merged")(x, [20])):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    if kind == "plain": return
    assert {n for n in state if "lora" not in n} == {GUARD_TENSOR}
    state.pop(GUARD_TENSOR)
    save_file(state, folder / "lora.safetensors")  # as it was written before
    assert load_tuned(home / "model", folder)(x, [20]).equal(got)


def test_merged_says_nothing(home, tmp_path):
    "A run that writes the merged model, or nothing, has no adapter to warn of."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Trainer(settings(home, tmp_path / "a", lora=dict(rank=2, dora=True), save_adapters=False))
        Trainer(settings(home, tmp_path / "b", lora=dict(rank=2, dora=True), no_ckpt=True))
    assert not [w for w in seen if "only mistral_nb" in str(w.message)]
