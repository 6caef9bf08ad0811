"The package behind the plain interface of the parity cases: numbers in, numbers out."
import itertools
import json
from functools import lru_cache
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from safetensors.torch import load_file

from mistral_nb.data.batches import Batch
from mistral_nb.data.batches import eval_batches
from mistral_nb.data.sources import parse_run_sources
from mistral_nb.data.sources import tokenize_source
from mistral_nb.data.batches import train_batches
from mistral_nb.data.convert import finetune_reformat
from mistral_nb.data.schema import SampleError
from mistral_nb.data.schema import parse_chat
from mistral_nb.data.schema import parse_line
from mistral_nb.data.schema import parse_row
from mistral_nb.data.schema import conversation_prefixes
from mistral_nb.data.schema import to_row
from mistral_nb.data.tokens import as_finetune
from mistral_nb.data.tokens import encode as encode_sample
from mistral_nb.data.tokens import load_tokenizer
from mistral_nb.model.lora import add_adapters
from mistral_nb.model.lora import init_lora
from mistral_nb.model.lora import load_adapter_state
from mistral_nb.model.lora import adapter_off
from mistral_nb.model.lora import merged_state
from mistral_nb.model.layouts import mistral_name
from mistral_nb.model.layouts import unpermute
from mistral_nb.model.transformer import Transformer
from mistral_nb.export.vocab import extend_tables
from mistral_nb.model.weights import load_model
from mistral_nb.model.weights import read_tensors
from mistral_nb.model.weights import save_tensors
from mistral_nb.train.checkpoint import trainable_params
from mistral_nb.train.loss import log_sums
from mistral_nb.train.preference import kto_losses
from mistral_nb.train.preference import PairSums
from mistral_nb.train.preference import pair_losses
from mistral_nb.train.preference import Preference
from mistral_nb.train.step import batch_loss
from mistral_nb.train.step import train_step
from mistral_nb.train.optim import adamw
from mistral_nb.train.optim import beta1_at
from mistral_nb.train.optim import lr_at
from mistral_nb.train.optim import set_lr

@lru_cache(maxsize=None)
def tokenizer(where: str):
    "A tokenizer that encodes messages as they stand, as the reference does"
    return as_finetune(load_tokenizer(where))


def kind_of(row: dict) -> str:
    return "instruct" if {"messages", "interactions"} & row.keys() else "pretrain"


def encode(row: dict, version: str) -> tuple[list[int], list[bool]]:
    "Ids and mask of one row"
    sample = encode_sample(parse_row(row, kind_of(row)), tokenizer(version))
    return sample.tokens.tolist(), sample.mask.tolist()


def chunks(row: dict) -> list[dict]:
    "The extra samples of a tool conversation, in order"
    return [to_row(s) for s in conversation_prefixes(parse_chat(row))] if kind_of(row) == "instruct" else []


def batches(
    *, instruct_data="", data="", eval_instruct_data="", shuffle=False, instruct_shuffle=True, chunk=True,
    version, seq_len, batch_size, rank, world_size, seed, is_eval,
) -> Iterator[tuple]:
    "`(x, y, mask, seqlens)` in mistral-finetune's order"
    tok = tokenizer(version)
    if is_eval:
        found = [tokenize_source(s, tok) for s in parse_run_sources("", eval_instruct_data)]
        out = eval_batches(found, seq_len, batch_size, "mistral", rank, world_size)
    else:
        found = [tokenize_source(s, tok, chunk) for s in parse_run_sources(data, instruct_data)]
        out = train_batches(
            found, seq_len, batch_size, "mistral", seed, rank, world_size, instruct_shuffle, shuffle
        )
    for b in out: yield b.x, b.y, b.mask, list(b.seqlens)


def verdict(line: str, version: str, kind="instruct") -> tuple[bool, str]:
    "Would training accept this raw line, and if not, why"
    try: encode_sample(parse_line(line, kind, version="v3"), tokenizer(version))
    except SampleError as e: return False, str(e)
    return True, ""


def convert(path: str, kind: str) -> tuple[list[dict], list[int]]:
    "Rows that mistral-finetune's script writes, and the 0-based lines that it skips or breaks at"
    kept, refused, count = [], [], itertools.count(1)
    for n, line in enumerate(Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")):
        try: row = finetune_reformat(json.loads(line), kind, lambda: f"ID{next(count):07d}")
        except ValueError: row = None
        if row is None: refused.append(n)
        else: kept.append(row)
    return kept, refused


def model_with(folder, lora_file, rank, scaling, dtype=None) -> Transformer:
    """The model of `folder`, with the adapter of `lora_file` if there is one; its tensors are right at
    `scaling`"""
    model = load_model(folder, dtype)
    if rank:
        add_adapters(model, rank, scaling)
        init_lora(model, 0)
    if lora_file: load_adapter_state(model, load_file(lora_file), file_scaling=scaling)
    return model


def as_batch(x, y, mask, seqlens) -> Batch:
    def flat(a, dtype): return np.asarray(a).reshape(-1).astype(dtype)
    return Batch(
        flat(x, np.int64), flat(y, np.int64), flat(mask if mask is not None else np.ones_like(y), bool),
        tuple(int(n) for n in seqlens),
    )


def forward(folder, lora_file, x, seqlens, rank, scaling) -> torch.Tensor:
    "Float32 logits of a packed row; without `lora_file` those of the base model"
    model = model_with(folder, lora_file, rank if lora_file else 0, scaling)
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(x)).reshape(-1).long(), [int(n) for n in seqlens])


def loss_and_grads(
    folder, lora_file, x, y, mask, seqlens, rank, scaling
) -> tuple[float, dict[str, torch.Tensor]]:
    "Mean loss over the trained tokens and the gradient of each adapter tensor"
    model = model_with(folder, lora_file, rank, scaling)
    batch = as_batch(x, y, mask, seqlens)
    loss = batch_loss(model, batch) / batch.trained
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainable_params(model).items()}


def train(
    folder, lora_file, batches, *, steps, micro, lr, pct_start, weight_decay, max_norm, rank, scaling,
    dtype, average="microbatches", cycle_momentum=True,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of `steps` optimizer steps and the adapter after them, averaged and scheduled as
    mistral-finetune does"""
    model = model_with(folder, lora_file, rank, scaling, getattr(torch, str(dtype).removeprefix("torch.")))
    optimizer, losses, rows = adamw(trainable_params(model).values(), lr, weight_decay), [], iter(batches)
    for step in range(steps):
        set_lr(
            optimizer, lr_at(step, steps, lr, pct_start),
            beta1_at(step, steps, pct_start) if cycle_momentum else 0.9,
        )
        losses.append(
            train_step(model, [as_batch(*next(rows)) for _ in range(micro)], optimizer, max_norm, average)[0]
        )
    return losses, {n: p.detach() for n, p in trainable_params(model).items()}


def merge(folder, lora_file, scaling, dtype) -> dict[str, torch.Tensor]:
    "All weights with the adapter added"
    rank = next(t.shape[0] for n, t in load_file(lora_file).items() if "lora_A" in n)
    return merged_state(
        model_with(folder, lora_file, rank, scaling), getattr(torch, str(dtype).removeprefix("torch."))
    )


def extend(checkpoint_file, out_dir, seed) -> dict[str, torch.Tensor]:
    "Weights of a 32000-token model with 32768 tokens"
    state = extend_tables(dict(read_tensors([Path(checkpoint_file)])), seed)
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    save_tensors(state, Path(out_dir) / "consolidated.safetensors")
    return state


# -- preference losses

SIDES = ("chosen", "rejected")


def preference_model(folder: Path, b_times: float = 1.0) -> Transformer:
    "The model of `folder` with its adapter, whose names and rows are Hugging Face's"
    matrices, model = np.load(folder / "adapter.npz"), load_model(folder / "model")
    state = {}
    for name in matrices.files:
        stem, side = name.rsplit(".", 1)
        mine, t = mistral_name(f"{stem}.weight").removesuffix(".weight"), torch.from_numpy(matrices[name])
        if side == "lora_B":
            t = t * b_times
            if mine.endswith((".wq", ".wk")): t = unpermute(t, model.args.head_dim)
        state[f"{mine}.{side}.weight"] = t
    rank = min(next(t.shape for n, t in state.items() if "lora_A" in n))
    add_adapters(model, rank, 2.0)
    load_adapter_state(model, state, file_scaling=2.0)
    return model


def sums_of(
    model: Transformer, answers: list[tuple[list[int], list[int]]], whole: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of answers, each `(prompt, answer)`, and their numbers of tokens: all in one packed
    row; with `whole` those of the prompt's tokens, too"""
    ids = [prompt + answer for prompt, answer in answers]
    x, y = ([t for row in ids for t in part(row)] for part in (lambda r: r[:-1], lambda r: r[1:]))
    first = [1 if whole else len(prompt) for prompt, _ in answers]
    owner = [i for i, row in enumerate(ids) for _ in range(first[i], len(row))]
    starts = np.cumsum([0] + [len(row) - 1 for row in ids])
    at = [starts[i] + j - 1 for i, row in enumerate(ids) for j in range(first[i], len(row))]
    at, owner, y = (torch.tensor(v) for v in (at, owner, y))
    seqlens = [len(row) - 1 for row in ids]

    def summed(hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return log_sums(hidden, output, y[at], at, owner, len(ids))

    return model(torch.tensor(x), seqlens, summed), torch.bincount(owner, minlength=len(ids)).float()


def by_reference(model: Transformer, answers: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    "The same sums by the model without its adapter"
    with torch.no_grad(), adapter_off(model): return sums_of(model, answers)[0]


def pair_sums(model: Transformer, pairs: list[dict], reference: bool = True) -> PairSums:
    "The sums of all pairs, which stand side by side in one row"
    answers = [(pair["prompt_ids"], pair[f"{side}_ids"]) for pair in pairs for side in SIDES]
    sums, counts = sums_of(model, answers)
    ref = by_reference(model, answers) if reference else sums.detach()
    return PairSums(sums[::2], sums[1::2], counts[::2], counts[1::2], ref[::2], ref[1::2])


def other_pair_losses(sums: PairSums, kind: str, beta: float) -> torch.Tensor:
    "What is no setting of the package, from the same sums"
    chosen, rejected = sums.gains
    if kind == "hinge": return torch.relu(1 - beta * sums.margin)
    if kind == "apo_zero": return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    assert kind == "apo_down", kind
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * sums.margin)


PACKAGE_NAMES = {"sigmoid": "dpo", "robust": "robust", "ipo": "ipo", "sigmoid_norm": "norm"}


def dpo_loss(sums: PairSums, settings: dict) -> torch.Tensor:
    "Losses with a reference, and what is added to them"
    kinds, total = settings["loss_type"], 0.0
    for kind, share in zip(kinds, settings.get("loss_weights") or [1.0] * len(kinds)):
        if kind == "sft": each = -sums.chosen.sum() / sums.n_chosen.sum()
        elif kind in PACKAGE_NAMES:
            smoothing = settings.get("label_smoothing", 0.0) if kind == "robust" else 0.0
            how = Preference(PACKAGE_NAMES[kind], settings["beta"], smoothing)
            each = pair_losses(sums, how).mean()
        else: each = other_pair_losses(sums, kind, settings["beta"]).mean()
        total = total + share * each
    return total


def cpo_loss(sums: PairSums, settings: dict) -> torch.Tensor:
    "Losses without a reference: of means with a margin, or of sums"
    smoothing, alpha = settings.get("label_smoothing", 0.0), settings.get("cpo_alpha", 0.0)
    if settings["loss_type"] == "simpo":
        each = pair_losses(sums, Preference("simpo", settings["beta"], smoothing, settings["simpo_gamma"]))
    else:
        none = torch.zeros_like(sums.chosen)
        bare = PairSums(sums.chosen, sums.rejected, sums.n_chosen, sums.n_rejected, none, none)
        each = pair_losses(bare, Preference("dpo", settings["beta"], smoothing))
    return each.mean() - alpha * sums.chosen.sum() / sums.n_chosen.sum()


def kto_loss(model: Transformer, rows: list[dict], settings: dict) -> torch.Tensor:
    "Answers without a partner"
    answers = [(row["prompt_ids"], row["completion_ids"]) for row in rows]
    gains = sums_of(model, answers)[0] - by_reference(model, answers)
    others = [(row["prompt_ids"], row["KL_completion_ids"]) for row in rows]
    other_gains = None
    if settings.get("loss_type", "kto") == "kto":
        with torch.no_grad(): other_gains = sums_of(model, others)[0] - by_reference(model, others)
    weights = settings.get("desirable_weight", 1.0), settings.get("undesirable_weight", 1.0)
    labels = torch.tensor([row["label"] for row in rows])
    return kto_losses(gains, labels, other_gains, settings["beta"], weights).mean()


def preference_case(folder: str | Path, name: str) -> tuple[float, float]:
    "`(loss, gradient norm over all LoRA matrices)` of a case in `model_losses.json`"
    folder = Path(folder)
    case = json.loads((folder / "model_losses.json").read_text())[name]
    data, settings = json.loads((folder / "data.json").read_text()), case["settings"]
    model = preference_model(folder, case.get("lora_B_times") or 1.0)
    family = name.partition("_")[0]
    if family == "kto": loss = kto_loss(model, data["single"], settings)
    else:
        sums = pair_sums(model, data["pairs"], reference=family == "dpo")
        if family == "dpo": loss = dpo_loss(sums, settings)
        elif family == "orpo":
            answers = [(pair["prompt_ids"], pair["chosen_ids"]) for pair in data["pairs"]]
            said, count = sums_of(model, answers, whole=name != "orpo_answer")
            odds = pair_losses(sums, Preference("orpo", settings["beta"])).mean()
            loss = odds - said.sum() / count.sum()
        else: loss = cpo_loss(sums, settings)
    loss.backward()
    grads = [p.grad for n, p in trainable_params(model).items() if "lora_" in n]
    return loss.item(), torch.sqrt(sum(g.double().square().sum() for g in grads)).item()
