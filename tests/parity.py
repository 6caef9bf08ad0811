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
from mistral_nb.model.lora import merged_state
from mistral_nb.model.transformer import Transformer
from mistral_nb.export.vocab import extend_tables
from mistral_nb.model.weights import load_model
from mistral_nb.model.weights import read_tensors
from mistral_nb.model.weights import save_tensors
from mistral_nb.train.checkpoint import trainable_params
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
