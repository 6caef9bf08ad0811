"The package behind the plain interface of the parity cases: numbers in, numbers out."
from pathlib import Path
from typing import Iterator

import numpy as np
import torch

from mistral_nb.core.config import LoraArgs
from mistral_nb.data.batches import eval_batches
from mistral_nb.data.batches import sources
from mistral_nb.data.batches import tokenize_source
from mistral_nb.data.batches import train_batches
from mistral_nb.data.schema import SampleError
from mistral_nb.data.schema import parse_chat
from mistral_nb.data.schema import parse_line
from mistral_nb.data.schema import parse_row
from mistral_nb.data.schema import prefixes
from mistral_nb.data.schema import to_row
from mistral_nb.data.tokens import encode as encode_sample
from mistral_nb.data.tokens import load_tokenizer

TOKENIZERS: dict = {}


def tokenizer(version: str):
    return TOKENIZERS.setdefault(version, load_tokenizer(version))


def kind_of(row: dict) -> str:
    return "instruct" if {"messages", "interactions"} & row.keys() else "pretrain"


def encode(row: dict, version: str) -> tuple[list[int], list[bool]]:
    "Ids and mask of one row"
    sample = encode_sample(parse_row(row, kind_of(row)), tokenizer(version))
    return sample.tokens.tolist(), sample.mask.tolist()


def chunks(row: dict) -> list[dict]:
    "The extra samples of a tool conversation, in order"
    return [to_row(s) for s in prefixes(parse_chat(row))] if kind_of(row) == "instruct" else []


def batches(*, instruct_data="", data="", eval_instruct_data="", shuffle=False, instruct_shuffle=True, chunk=True,
            version, seq_len, batch_size, rank, world_size, seed, is_eval) -> Iterator[tuple]:
    "`(x, y, mask, seqlens)` in mistral-finetune's order"
    tok = tokenizer(version)
    if is_eval:
        found = [tokenize_source(s, tok) for s in sources("", eval_instruct_data)]
        out = eval_batches(found, seq_len, batch_size, "mistral", rank, world_size)
    else:
        found = [tokenize_source(s, tok, chunk) for s in sources(data, instruct_data)]
        out = train_batches(found, seq_len, batch_size, "mistral", seed, rank, world_size, instruct_shuffle, shuffle)
    for b in out: yield b.x, b.y, b.mask, list(b.seqlens)


def verdict(line: str, version: str, kind="instruct") -> tuple[bool, str]:
    "Would training accept this raw line, and if not, why"
    try: encode_sample(parse_line(line, kind, version="v3"), tokenizer(version))
    except SampleError as e: return False, str(e)
    return True, ""
