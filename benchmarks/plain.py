"""Two honest baselines: a plain loop over mistral-common that tokenizes conversations, and a packer of
Python lists as in mistral-finetune."""
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from mistral_common.protocol.instruct.messages import (
    AssistantMessage, FinetuningAssistantMessage, SystemMessage, ToolMessage, UserMessage,
)
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall
from mistral_common.protocol.instruct.validator import MistralRequestValidator, ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

TokenLists = tuple[list[int], list[bool]]  # ids and loss mask of a sample
Message = UserMessage | FinetuningAssistantMessage | ToolMessage

# ---- tokenizing


def load(version: str) -> tuple[InstructTokenizerBase, MistralRequestValidator]:
    """Encoder and fine-tuning validator of `v3` or `v3-tekken`, the versions that put the system prompt
    into the last user message."""
    if version not in ("v3", "v3-tekken"): raise ValueError(f"no plain loop for {version!r}")
    encoder = MistralTokenizer.v3(is_tekken=version == "v3-tekken").instruct_tokenizer
    return encoder, get_validator(TokenizerVersion.v3, mode=ValidationMode.finetuning)


def build_message(entry: dict) -> Message | SystemMessage:
    "The message object of one entry."
    role, content = entry["role"], entry.get("content")
    if role == "user": return UserMessage(content=content)
    if role == "system": return SystemMessage(content=content)
    if role == "tool":
        return ToolMessage(content=content, tool_call_id=entry["tool_call_id"], name=entry.get("name"))
    if role != "assistant": raise ValueError(f"unknown role {role!r}")
    calls = entry.get("tool_calls")
    if calls is not None:
        calls = [ToolCall(id=c["id"], function=FunctionCall(**c["function"])) for c in calls]
    return FinetuningAssistantMessage(content=content, tool_calls=calls, weight=entry.get("weight"))


def build_row(row: dict) -> tuple[list[Message], str | None, list[Tool] | None]:
    "Messages, system prompt and tools of a row."
    messages = [build_message(e) for e in row["messages"]]
    system = [m.content for m in messages if isinstance(m, SystemMessage)]
    if len(system) > 1: raise ValueError("more than one system message")
    keys = ("name", "description", "parameters")
    tools = [Tool(function=Function(**{k: t["function"][k] for k in keys})) for t in row.get("tools") or []]
    return (
        [m for m in messages if not isinstance(m, SystemMessage)], system[0] if system else None,
        tools or None,
    )


def without_ids(message: AssistantMessage) -> AssistantMessage:
    "The message with calls that have no id, so that no random id is trained."
    if not message.tool_calls: return message
    return message.model_copy(
        update={"tool_calls": [ToolCall(function=c.function) for c in message.tool_calls]}
    )


def encode(
    encoder: InstructTokenizerBase, messages: list[Message], system: str | None, tools: list[Tool] | None
) -> TokenLists:
    "Ids and mask: assistant messages are trained, with tools the last one only."
    users = [i for i, m in enumerate(messages) if isinstance(m, UserMessage)] or [-1]
    tokens, mask = encoder.start(), [False]
    for i, message in enumerate(messages):
        trained, last = False, i == len(messages) - 1
        if isinstance(message, UserMessage):
            ids, _, _ = encoder.encode_user_message(
                message, tools, i == users[-1], i == users[0], system_prompt=system
            )
        elif isinstance(message, ToolMessage): ids, _, _ = encoder.encode_tool_message(message, i < users[-1])
        else:
            ids = encoder.encode_assistant_message(without_ids(message) if last else message, i < users[-1])
            trained = message.weight != 0 and (last or not tools)
        tokens.extend(ids)
        mask.extend([trained] * len(ids))
    return tokens, mask


def beginnings(messages: list[Message]) -> Iterator[list[Message]]:
    "The messages up to each assistant message that is not the last one, longest first."
    ends = [i for i, m in enumerate(messages) if isinstance(m, AssistantMessage)]
    for i in reversed(ends[:-1]): yield messages[: i + 1]


def samples(
    path: str | Path, encoder: InstructTokenizerBase, validator: MistralRequestValidator, chunk: bool
) -> Iterator[TokenLists]:
    "Every sample of a file, by an encoder and a validator that are loaded already."
    with open(path, encoding="utf-8") as f:
        for line in f:
            messages, system, tools = build_row(json.loads(line))
            for part in [messages, *(beginnings(messages) if chunk and tools else [])]:
                validator._validate_tools(
                    tools or []
                )  # each beginning is a sample, validated and encoded by itself
                validator.validate_messages(part)
                yield encode(encoder, part, system, tools)


def plain_loop(path: str | Path, version: str, chunk: bool) -> Iterator[TokenLists]:
    """Every sample of a file of conversations; with `chunk`, each conversation with tools is followed by
    its shorter beginnings."""
    return samples(path, *load(version), chunk)

# ---- packing

PackedRow = tuple[
    np.ndarray, np.ndarray, np.ndarray, list[int]
]  # x and y (int64), mask (bool), sizes of the samples


def flat(parts: list[list], dtype: type) -> np.ndarray:
    "Lists joined element by element."
    return np.array([element for part in parts for element in part], dtype=dtype)


def python_list_packer(samples: Iterable[TokenLists], seq_len: int) -> Iterator[PackedRow]:
    """Full rows of `seq_len` positions in the order of the samples, which are cut at the end of a row;
    pieces that train nothing are left out."""
    xs, ys, masks, sizes, missing = [], [], [], [], seq_len
    for tokens, mask in samples:
        x, y, mask, at = tokens[:-1], tokens[1:], mask[1:], 0
        while at < len(x):
            piece, part = x[at : at + missing], mask[at : at + missing]
            size = len(piece)
            if any(part):
                xs.append(piece)
                ys.append(y[at : at + missing])
                masks.append(part)
                sizes.append(size)
                missing -= size
            at += size
            if not missing:
                yield flat(xs, np.int64), flat(ys, np.int64), flat(masks, bool), sizes
                xs, ys, masks, sizes, missing = [], [], [], [], seq_len
