"""Rows damaged on purpose: `check` must see each damage, lose no row, and agree with training and with
mistral-common."""
import json
import random
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.protocol.instruct.validator import get_validator
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_nb.data.examine import KEPT
from mistral_nb.data.examine import MAX_KEPT_FINDINGS
from mistral_nb.data.examine import REJECTED
from mistral_nb.data.examine import REPAIRED
from mistral_nb.data.check import CheckReport
from mistral_nb.data.check import check
from mistral_nb.data.schema import SampleError
from mistral_nb.data.schema import Location
from mistral_nb.data.schema import parse_line
from mistral_nb.data.tokens import Tokenizer
from mistral_nb.data.certify import certify
from mistral_nb.data.tokens import encode
from mistral_nb.data.tokens import load_tokenizer

VERSIONS = ("v3", "v3-tekken")
Rng = random.Random
Damage = Callable[[dict, Rng], Any]  # a row, or the bytes of its line

# ---- good rows

PARTS = "ka lo mi ren tu sho pel dra ün é bas cor vi 猫 nim os".split()


def words(rng: Rng, least: int = 9, most: int = 24) -> str:
    "A sentence that no other row has"
    return " ".join(
        "".join(rng.choices(PARTS, k=rng.randint(1, 3))) for _ in range(rng.randint(least, most))
    ) + rng.choice(".?!")


def turn(rng: Rng) -> list[dict]:
    return [{"role": "user", "content": words(rng)}, {"role": "assistant", "content": words(rng)}]


def plain_row(rng: Rng) -> dict: return {"messages": turn(rng)}


def long_row(rng: Rng) -> dict:
    "Several turns under a system prompt, the first answer perhaps without weight"
    messages = [m for _ in range(rng.randint(2, 4)) for m in turn(rng)]
    if rng.random() < 0.5: messages[1]["weight"] = rng.randint(0, 1)
    if rng.random() < 0.3: return {"system_prompt": words(rng), "messages": messages}
    return {"messages": [{"role": "system", "content": words(rng)}, *messages]}


def old_row(rng: Rng) -> dict:
    "The older keys"
    return {
        "interactions": [
            {"is_user": m["role"] == "user", "text": m["content"]}
            for _ in range(rng.randint(1, 3))
            for m in turn(rng)
        ]
    }


def new_call(rng: Rng, name: str) -> dict:
    "A call with a random id and arguments"
    made = "".join(rng.choices("abcdefghijkXYZ0123456789", k=9))
    return {
        "id": made,
        "type": "function",
        "function": {
            "name": name, "arguments": json.dumps({"place": words(rng, 1, 3), "n": rng.randint(0, 99)}),
        },
    }


def tool_row(rng: Rng) -> dict:
    "One or two rounds of calls and results"
    schema = {
        "type": "object", "properties": {"place": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["place"],
    }
    tools = [
        {
            "type": "function",
            "function": {"name": f"get_{n}", "description": words(rng), "parameters": schema},
        }
        for n in ("air", "sea")
    ]
    messages = []
    for _ in range(rng.randint(1, 2)):
        calls = [new_call(rng, t["function"]["name"]) for t in tools[: rng.randint(1, 2)]]
        results = [
            {"role": "tool", "content": json.dumps({"n": rng.random()}), "tool_call_id": c["id"]}
            for c in calls
        ]
        messages += [
            turn(rng)[0], {"role": "assistant", "content": "", "tool_calls": calls}, *results,
            turn(rng)[1],
        ]
    return {"messages": messages, "tools": tools}


GOOD = dict(plain=plain_row, long=long_row, old=old_row, tool=tool_row)

# ---- damages

DROP = object()


def changed(entry: dict, changes: dict) -> dict:
    return {k: v for k, v in {**entry, **changes}.items() if v is not DROP}


def place(messages: list[dict], role: str) -> int:
    return next(i for i, m in enumerate(messages) if m["role"] == role)


def row_with(**changes: Any) -> Damage: return lambda row, rng: changed(row, changes)


def message(role: str, /, **changes: Any) -> Damage:
    "The first message of a role changed"
    def damage(row: dict, rng: Rng) -> dict:
        i = place(row["messages"], role)
        row["messages"][i] = changed(row["messages"][i], changes)
        return row
    return damage


def last(**changes: Any) -> Damage:
    return lambda row, rng: {
        **row, "messages": [*row["messages"][:-1], changed(row["messages"][-1], changes)],
    }


def added(role: str, text: str) -> Damage:
    "Some text behind that of the first message of a role"
    return lambda row, rng: message(
        role, content=next(m["content"] for m in row["messages"] if m["role"] == role) + text
    )(row, rng)


def listed(make: Callable[[list[dict], Rng], list]) -> Damage:
    return lambda row, rng: {**row, "messages": make(row["messages"], rng)}


def call(**changes: Any) -> Damage:
    "The first call changed"
    def damage(row: dict, rng: Rng) -> dict:
        calls = row["messages"][1]["tool_calls"]
        calls[0] = changed(calls[0], changes)
        return row
    return damage


def function(**changes: Any) -> Damage:
    return lambda row, rng: call(function=changed(row["messages"][1]["tool_calls"][0]["function"], changes))(
        row, rng
    )


def tool(**changes: Any) -> Damage:
    return lambda row, rng: {**row, "tools": [changed(row["tools"][0], changes), *row["tools"][1:]]}


def described(**changes: Any) -> Damage:
    return lambda row, rng: tool(function=changed(row["tools"][0]["function"], changes))(row, rng)


def line_of(row: Any) -> bytes:
    "A row as a line; halves of characters as escapes"
    try: return json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError: return json.dumps(row).encode()


def line(make: Callable[[bytes, Rng], bytes]) -> Damage: return lambda row, rng: make(line_of(row), rng)


def nested(depth: int, value: Any = 1) -> Any:
    "Lists within lists"
    for _ in range(depth): value = [value]
    return value


def deep_schema(depth: int) -> dict:
    return {"type": "object", "properties": {"a": deep_schema(depth - 1)}} if depth else {"type": "string"}


def cut(text: bytes, rng: Rng) -> bytes: return text[: rng.randint(1, len(text) - 2)]


def inserted(what: bytes) -> Damage:
    "Bytes in the middle of the first text"
    return line(lambda b, rng: b.replace(b'"content": "', b'"content": "' + what, 1))


def repr_with(**more: Any) -> Damage: return lambda row, rng: repr({**row, **more}).encode()


def human(messages: list[dict]) -> list[dict]:
    return [{**m, "role": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"])} for m in messages]


def sharegpt(row: dict, rng: Rng) -> dict:
    return {"conversations": [{"from": m["role"], "value": m["content"]} for m in human(row["messages"])]}


def without_results(row: dict, rng: Rng) -> dict:
    return {**row, "messages": [m for m in row["messages"] if m["role"] != "tool"]}


def results_first(row: dict, rng: Rng) -> dict:
    "The first call behind its results"
    made = row["messages"].pop(1)
    row["messages"].insert(place(row["messages"], "tool") + 1, made)
    return row


def double_id(row: dict, rng: Rng) -> dict:
    "A second round with the ids of the first"
    asked, made, *rest = [deepcopy(m) for m in row["messages"][: 3 + len(row["messages"][1]["tool_calls"])]]
    return {**row, "messages": [*row["messages"], asked, made, *rest]}


def ask_again(messages: list[dict], rng: Rng) -> list[dict]: return [*messages, turn(rng)[0]]


DAMAGES: dict[str, tuple[str, Damage]] = {  # name: (kind of row, damage)
    # keys and types of the row
    "no messages": ("plain", row_with(messages=DROP, id="7")),
    "messages null": ("plain", row_with(messages=None)),
    "messages empty": ("plain", row_with(messages=[])),
    "messages text": ("plain", row_with(messages="hello")),
    "messages object": ("plain", lambda row, rng: {"messages": dict(enumerate(row["messages"]))}),
    "both lists": ("plain", lambda row, rng: {**row, "interactions": old_row(rng)["interactions"]}),
    "both lists equal": ("plain", lambda row, rng: {**row, "interactions": row["messages"]}),
    "system prompt number": ("plain", row_with(system_prompt=5)),
    "system prompt null": ("plain", row_with(system_prompt=None)),
    "two system prompts": (
        "long",
        lambda row, rng: {
            **row, "system_prompt": "Be kind.",
            "messages": [{"role": "system", "content": "Be brief."}, *row["messages"]],
        },
    ),
    "system in the middle": (
        "plain", listed(lambda m, rng: [m[0], {"role": "system", "content": "Be brief."}, *m[1:]]),
    ),
    "only_last text": ("long", row_with(only_last="perhaps")),
    "only_last true": ("long", row_with(only_last=True)),
    "unknown keys": ("tool", row_with(id=7, meta={"a": [None, True, 1.5]}, source="web")),
    "unknown key in a message": ("plain", message("user", name="Ada", date=None)),
    "nan": ("plain", row_with(score=float("nan"), top=float("inf"))),
    "huge int": ("plain", row_with(n=int("9" * 4000))),
    "huger int": ("plain", line(lambda b, rng: b[:-1] + b', "n": ' + b"9" * 5000 + b"}")),
    "nested harmless": ("plain", row_with(x=nested(200))),
    "nested deep": (
        "plain", line(lambda b, rng: b[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ),
    "nested and bad": ("plain", lambda row, rng: {"messages": human(row["messages"]), "x": nested(600)}),
    "content nested": ("plain", message("user", content=nested(600))),
    # messages
    "message null": ("plain", listed(lambda m, rng: [None, *m])),
    "message text": ("plain", listed(lambda m, rng: [m[0]["content"], *m[1:]])),
    "no role": ("plain", message("user", role=DROP)),
    "role null": ("plain", message("assistant", role=None)),
    "role list": ("plain", message("user", role=["user"])),
    "role number": ("plain", message("user", role=1)),
    "role of case": ("plain", message("user", role="User")),
    "role critic": ("plain", message("user", role="critic")),
    "role human": ("long", lambda row, rng: {**row, "messages": human(row["messages"])}),
    "no content": ("plain", message("user", content=DROP)),
    "content null": ("plain", message("assistant", content=None)),
    "content number": ("plain", message("user", content=42)),
    "content object": ("plain", message("assistant", content={"text": "yes"})),
    "content and text": ("plain", message("user", text="or this?")),
    "content chunks": ("plain", message("user", content=[{"type": "text", "text": "What is it?"}])),
    "content chunks of the answer": ("plain", last(content=[{"type": "text", "text": "A cat."}])),
    "content no chunks": ("plain", message("user", content=[])),
    "image": (
        "plain",
        message("user", content=[{"type": "image_url", "image_url": "https://example.com/cat.png"}]),
    ),
    "thinking": (
        "plain",
        last(
            content=[
                {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
                {"type": "text", "text": "A cat."},
            ]
        ),
    ),
    "question empty": ("plain", message("user", content="")),
    "question blank": ("plain", message("user", content=" \n\t")),
    "answer empty": ("plain", last(content="")),
    "answer blank": ("plain", last(content="  \n")),
    "is_user text": (
        "old", lambda row, rng: {"interactions": [{**m, "is_user": "yes"} for m in row["interactions"]]},
    ),
    "is_user missing": (
        "old", lambda row, rng: {"interactions": [{"text": m["text"]} for m in row["interactions"]]},
    ),
    "text null": (
        "old", lambda row, rng: {"interactions": [{**m, "text": None} for m in row["interactions"]]},
    ),
    "prefix": ("long", message("assistant", prefix=True)),
    # order
    "question last": ("long", listed(ask_again)),
    "answer twice": ("plain", listed(lambda m, rng: [*m, turn(rng)[1]])),
    "answer first": ("long", listed(lambda m, rng: [turn(rng)[1], *m])),
    "answers only": ("plain", listed(lambda m, rng: [m[1], m[1]])),
    "answer alone": ("plain", listed(lambda m, rng: m[1:])),
    "question alone": ("plain", listed(lambda m, rng: m[:1])),
    "question twice": ("plain", listed(lambda m, rng: [m[0], *m])),
    # weights
    "weight half": ("plain", last(weight=0.5)),
    "weight negative": ("plain", last(weight=-1)),
    "weight text": ("plain", last(weight="high")),
    "weight number as text": ("plain", last(weight="1")),
    "weight true": ("plain", last(weight=True)),
    "weight nan": ("plain", last(weight=float("nan"))),
    "weight list": ("plain", last(weight=[1])),
    "weights all 0": (
        "long", listed(lambda m, rng: [{**x, "weight": 0} if x["role"] == "assistant" else x for x in m]),
    ),
    # calls and results
    "id twice": ("tool", double_id),
    "id unmatched": ("tool", message("tool", tool_call_id="zzzzzzzz9")),
    "id short": ("tool", message("tool", tool_call_id="z9")),
    "id null": ("tool", message("tool", tool_call_id=None)),
    "id missing": ("tool", message("tool", tool_call_id=DROP)),
    "id number": ("tool", message("tool", tool_call_id=123456789)),
    "id list": ("tool", message("tool", tool_call_id=["abcdefgh1"])),
    "id object": ("tool", message("tool", tool_call_id={"a": 1})),
    "call id long": ("tool", call(id="call_" + "a" * 24)),
    "call id missing": ("tool", call(id=DROP)),
    "call id number": ("tool", call(id=7)),
    "call id list": ("tool", call(id=["a"])),
    "call id null text": ("tool", call(id="null")),
    "call without function": ("tool", call(function=DROP)),
    "call null": ("tool", message("assistant", tool_calls=[None])),
    "call of another type": ("tool", call(type="plugin")),
    "calls object": (
        "tool",
        lambda row, rng: message("assistant", tool_calls=row["messages"][1]["tool_calls"][0])(row, rng),
    ),
    "calls empty": ("tool", message("assistant", tool_calls=[])),
    "calls and text": ("tool", message("assistant", content="I shall look.")),
    "calls of the user": (
        "tool", lambda row, rng: message("user", tool_calls=row["messages"][1]["tool_calls"])(row, rng),
    ),
    "no results": ("tool", without_results),
    "results first": ("tool", results_first),
    "result too many": ("tool", listed(lambda m, rng: [*m[:3], m[2], *m[3:]])),
    "result content null": ("tool", message("tool", content=None)),
    "result content object": ("tool", message("tool", content={"n": 1})),
    "result name": ("tool", message("tool", name="get air!")),
    "result huge int": ("tool", message("tool", content="9" * 5000)),
    "arguments object": ("tool", function(arguments={"place": "x"})),
    "arguments list": ("tool", function(arguments=["x"])),
    "arguments text of a list": ("tool", function(arguments="[1, 2]")),
    "arguments broken": ("tool", function(arguments='{"place": "x"')),
    "arguments in Python": ("tool", function(arguments="{'place': 'x'}")),
    "arguments null": ("tool", function(arguments=None)),
    "arguments missing": ("tool", function(arguments=DROP)),
    "arguments surrogate": ("tool", function(arguments='{"place": "\\ud83d"}')),
    "arguments deep": ("tool", function(arguments="[" * 50_000)),
    "call name bad": ("tool", function(name="get air!")),
    "call name missing": ("tool", function(name=DROP)),
    "call name null": ("tool", function(name=None)),
    "call undeclared": ("tool", function(name="get_fire")),
    # tools
    "tools twice": ("tool", lambda row, rng: {**row, "available_tools": row["tools"]}),
    "tools missing": ("tool", row_with(tools=DROP)),
    "tools object": ("tool", lambda row, rng: {**row, "tools": row["tools"][0]}),
    "tools text": ("tool", lambda row, rng: {**row, "tools": json.dumps(row["tools"])}),
    "tools empty object": ("plain", row_with(tools={})),
    "tools empty text": ("plain", row_with(tools="")),
    "tools false": ("plain", row_with(tools=False)),
    "tools empty list": ("plain", row_with(tools=[])),
    "tools unused": ("tool", lambda row, rng: {**row, "messages": turn(rng)}),
    "tool null": ("tool", row_with(tools=[None])),
    "tool not wrapped": ("tool", lambda row, rng: {**row, "tools": [t["function"] for t in row["tools"]]}),
    "tool without parameters": ("tool", described(parameters=DROP)),
    "tool without name": ("tool", described(name=DROP)),
    "tool without description": ("tool", described(description=DROP)),
    "tool description number": ("tool", described(description=3)),
    "tool name bad": ("tool", described(name="get air!")),
    "tool name number": ("tool", described(name=3)),
    "tool schema bad": ("tool", described(parameters={"type": "objekt"})),
    "tool schema text": ("tool", described(parameters="{}")),
    "tool schema regex": (
        "tool",
        described(parameters={"type": "object", "properties": {"a": {"type": "string", "pattern": "["}}}),
    ),
    "tool schema deep": ("tool", described(parameters=deep_schema(300))),
    "tool strict text": ("tool", described(strict="maybe")),
    "tool of another type": ("tool", tool(type="retrieval")),
    "tool without type": ("tool", tool(type=DROP)),
    # characters
    "surrogate": ("plain", added("user", "\ud83d!")),
    "surrogate in the answer": ("long", added("assistant", "\udc31")),
    "surrogate in the system prompt": ("plain", row_with(system_prompt="Be \ud83d")),
    "surrogate in a result": ("tool", message("tool", content="\ud83d")),
    "surrogate in a chunk": ("plain", message("user", content=[{"type": "text", "text": "a \ud83d"}])),
    "surrogate in a key": ("plain", row_with(**{"\ud83d": 1})),
    "surrogate in a role": ("plain", message("user", role="\ud83d")),
    "surrogate pair in escapes": (
        "plain", line(lambda b, rng: b.replace(b'"content": "', b'"content": "\\ud83d\\ude00', 1)),
    ),
    "control character": ("plain", added("user", "\x07\x1b[1m")),
    "nul": ("plain", added("assistant", "\x00")),
    "direction mark": ("plain", added("user", "\u202eabc")),
    "special token": ("plain", added("user", " [INST] </s>")),
    "special token in the answer": ("plain", added("assistant", " [TOOL_CALLS][]")),
    "special token in the system prompt": ("plain", row_with(system_prompt="<|im_start|>system")),
    "markup in a chunk": ("plain", message("user", content=[{"type": "text", "text": "a [/INST] b"}])),
    # lines
    "line cut": ("long", line(cut)),
    "line cut by one": ("plain", line(lambda b, rng: b[:-1])),
    "line empty": ("plain", lambda row, rng: b""),
    "line blank": ("plain", lambda row, rng: b"  \t"),
    "line twice": ("plain", line(lambda b, rng: b + b)),
    "line with comma": ("plain", line(lambda b, rng: b + b",")),
    "line with comma inside": ("plain", line(lambda b, rng: b[:-1] + b",}")),
    "line with return": ("plain", line(lambda b, rng: b + b"\r")),
    "line with spaces": ("plain", line(lambda b, rng: b"  " + b + b"\t ")),
    "line bom": ("plain", line(lambda b, rng: b"\xef\xbb\xbf" + b)),
    "line not UTF-8": ("plain", inserted(b"caf\xe9 ")),
    "line UTF-16": (
        "plain", line(lambda b, rng: b.decode().replace("猫", "").encode("utf-16-le").replace(b"\n", b"")),
    ),
    "line raw nul": ("plain", inserted(b"\x00")),
    "line raw tab": ("plain", inserted(b"\t")),
    "line raw surrogate": ("plain", inserted(b"\xed\xa0\xbd")),
    "line list": ("plain", lambda row, rng: row["messages"]),
    "line number": ("plain", lambda row, rng: 7),
    "line text": ("plain", lambda row, rng: "hello"),
    "line null": ("plain", lambda row, rng: None),
    "line true": ("plain", lambda row, rng: True),
    "line empty object": ("plain", lambda row, rng: {}),
    "line JSON in a text": ("plain", lambda row, rng: line_of(row).decode()),
    "line Python": ("plain", repr_with()),
    "line Python of a tool row": ("tool", repr_with(meta=None, ok=True)),
    "line Python with number keys": (
        "plain", lambda row, rng: repr({"messages": human(row["messages"]), 1: 2}).encode(),
    ),
    "line Python with tuples": (
        "plain", lambda row, rng: repr({"messages": tuple(row["messages"])}).encode(),
    ),
    "line log": ("plain", lambda row, rng: b"Traceback (most recent call last):"),
    # other formats
    "sharegpt": ("long", sharegpt),
    "alpaca": ("plain", lambda row, rng: {"instruction": words(rng), "input": "", "output": words(rng)}),
    "pair": ("plain", lambda row, rng: {"prompt": words(rng), "completion": words(rng)}),
    "plain text": ("plain", lambda row, rng: {"text": words(rng)}),
    "openai functions": (
        "tool",
        lambda row, rng: {
            **changed(row, dict(tools=DROP)), "functions": [t["function"] for t in row["tools"]],
        },
    ),
    "function_call": (
        "plain",
        lambda row, rng: {
            "messages": [
                *row["messages"][:1],
                {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                {"role": "function", "name": "f", "content": "1"}, row["messages"][1],
            ]
        },
    ),
}

SEEN = {  # damages that training lives with: what must be said of them, unless there is an error
    "question empty": "blank",
    "question blank": "blank",
    "answer blank": "blank",
    "weights all 0": "no-trained",
    "answer twice": "alternation",
    "answer first": "alternation",
    "question twice": "alternation",
    "answers only": "serving",
    "id twice": "call-id",
    "id unmatched": "call-id",
    "arguments text of a list": "no-object",
    "arguments broken": "no-object",
    "arguments in Python": "no-object",
    "arguments surrogate": "lone-surrogate",
    "call undeclared": "undeclared-call",
    "tools unused": "unused-tools",
    "tools missing": "undeclared-call",
    "surrogate": "lone-surrogate",
    "surrogate in the answer": "lone-surrogate",
    "surrogate in the system prompt": "lone-surrogate",
    "surrogate in a result": "lone-surrogate",
    "surrogate in a chunk": "lone-surrogate",
    "control character": "control-character",
    "nul": "control-character",
    "direction mark": "control-character",
    "special token": "special-text",
    "special token in the answer": "special-text",
    "special token in the system prompt": "special-text",
    "markup in a chunk": "special-text",
}

# ---- what others say


def strict(text: bytes, file: str, n: int, tokenizer: Tokenizer) -> bool:
    "Whether training takes a line"
    try: return bool(encode(parse_line(text, "instruct", Location(file, n), tokenizer.version), tokenizer))
    except SampleError: return False


@lru_cache(maxsize=None)
def tokenizer_of(version: str) -> Tokenizer: return load_tokenizer(version)


@lru_cache(maxsize=None)
def server(version: str) -> MistralTokenizer: return MistralTokenizer.v3(is_tekken=version == "v3-tekken")


def served(text: bytes, version: str) -> bool:
    "Whether mistral-common, serving, takes what stands before a line's last answer"
    try:
        row = json.loads(text.decode())
        entries = [
            {
                "role": "user" if m.get("is_user") else "assistant", **m,
                "content": m.get("content", m.get("text")),
            }
            for m in (row["messages"] if "messages" in row else row["interactions"])
        ]
        end = max(i for i, m in enumerate(entries) if m["role"] == "assistant")
        system = (
            [{"role": "system", "content": row["system_prompt"]}]
            if row.get("system_prompt") is not None
            else []
        )
        asked = {
            "model": "m", "messages": system + entries[:end],
            "tools": row["tools"] if "tools" in row else row.get("available_tools"),
        }
        request = ChatCompletionRequest.model_validate(asked, extra="ignore")
        get_validator(TokenizerVersion.v3, mode=ValidationMode.serving).validate_request(request)
        return bool(server(version).encode_chat_completion(request).tokens)
    except Exception: return False  # whatever it is, a server would answer with an error

# ---- files


def damaged_line(name: str, rng: Rng) -> bytes:
    "A good row with a damage"
    kind, damage = DAMAGES[name]
    found = damage(GOOD[kind](rng), rng)
    out = found if isinstance(found, bytes) else line_of(found)
    assert b"\n" not in out
    return out


def write_lines(path: Path, names: list[str | None], seed: int) -> Path:
    "A file with a line a name, a good one for None"
    rng = Rng(seed)
    path.write_bytes(
        b"".join(
            (damaged_line(n, rng) if n else line_of(rng.choice(list(GOOD.values()))(rng))) + b"\n"
            for n in names
        )
    )
    return path


def by_line(report: CheckReport) -> dict[int, set[str]]:
    "Codes of each line; every finding is of this file"
    assert {f.file for f in report.findings} <= {str(report.files[0].file)} and max(
        report.counts.values(), default=0
    ) <= MAX_KEPT_FINDINGS
    out: dict[int, set[str]] = {}
    for f in report.findings: out.setdefault(f.line, set()).add(f"{f.level}:{f.code}")
    return out


def served_alike(line: bytes, tokenizer) -> bool:
    "Whether certify has nothing to say; v3 trains a system prompt's first answer without it"
    return certify(parse_line(line, version=tokenizer.version), tokenizer).ok


def problems(path: Path, names: list[str | None], report: CheckReport, version: str) -> dict[str, str]:
    "What `check` got wrong: a damage, and how"
    tokenizer, codes, state, out = tokenizer_of(version), by_line(report), report.files[0].state, {}
    lines = path.read_bytes().split(b"\n")[:-1]
    assert (
        len(lines)
        == len(names)
        == len(state)
        == sum(report.files[0].rows(s) for s in (KEPT, REPAIRED, REJECTED))
    )
    for n, (text, name) in enumerate(zip(lines, names), 1):
        text, found = text.removeprefix(b"\xef\xbb\xbf") if n == 1 else text, codes.get(n, set())
        kept, error, taken = (
            state[n - 1] == KEPT, any(c.startswith("error:") for c in found),
            strict(text, str(path), n, tokenizer),
        )
        wrong = []
        if taken != kept or taken == error:
            wrong.append(
                f"training {'takes' if taken else 'refuses'} it, state {state[n - 1]}, {sorted(found)}"
            )
        if name and not found and not served(text, version):
            wrong.append("a server would refuse it, and nothing is said")
        if name in SEEN and kept and f"warning:{SEEN[name]}" not in found:
            wrong.append(f"no {SEEN[name]}, only {sorted(found)}")
        told = found - {"warning:serving"} if not name and not served_alike(text, tokenizer) else found
        if not name and (told or not kept): wrong.append(f"a good row: {sorted(found)}")
        if wrong: out.setdefault(str(name), f"line {n}: {'; '.join(wrong)}: {text[:300]!r}")
    return out


def check_corrected(path: Path, report: CheckReport, version: str) -> None:
    "Corrected and rejected files add up to the original, which stays; the corrected one is good"
    before, state = path.read_bytes(), report.files[0].state
    corrected, rejected = path.with_name(path.name + ".corrected"), path.with_name(path.name + ".rejected")
    report.write_corrected()
    assert path.read_bytes() == before
    if not (state != KEPT).any():
        assert not corrected.exists() and not rejected.exists()
        return
    lines, out = before.split(b"\n")[:-1], corrected.read_bytes().split(b"\n")[:-1]
    gone = [json.loads(t) for t in rejected.read_bytes().splitlines()] if rejected.exists() else []
    assert len(out) + len(gone) == len(lines) and [g["line"] for g in gone] == [
        n for n, s in enumerate(state, 1) if s == REJECTED
    ]
    codes = by_line(report)
    for g in gone: assert g["reason"].split(":")[0] in {c.split(":")[1] for c in codes[g["line"]]}
    left = [(t, s) for t, s in zip(lines, state) if s != REJECTED]
    def strip(t): return t.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\r")
    assert all(strip(old) == new for (old, s), new in zip(left, out) if s == KEPT)
    if not out: return
    again = check(corrected, tokenizer_of(version), workers=1)
    assert (
        not [str(f) for f in again.findings if f.level == "error"]
        and again.ok
        and len(again.files[0].state) == len(out)
    )

# ---- tests


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_alone(tmp_path, name):
    "Each damage in a small file of its own, between good rows"
    for version in VERSIONS:
        names = [None, name, name]
        path = write_lines(tmp_path / f"{version}.jsonl", names, seed=3)
        report = check(path, tokenizer_of(version), workers=1)
        assert not problems(path, names, report, version)
        check_corrected(path, report, version)
        assert str(report)


@pytest.mark.parametrize("kind", GOOD)
def test_good_rows(tmp_path, kind):
    "Of an undamaged row nothing is said"
    rng = Rng(5)
    path = tmp_path / "good.jsonl"
    path.write_bytes(b"".join(line_of(GOOD[kind](rng)) + b"\n" for _ in range(50)))
    for version in VERSIONS:
        report = check(path, tokenizer_of(version), workers=1)
        lines = path.read_bytes().splitlines()
        differing = {n for n, line in enumerate(lines, 1) if not served_alike(line, tokenizer_of(version))}
        assert report.ok and {(f.code, f.line) for f in report.findings} == {
            ("serving", n) for n in differing
        }
        assert all(served(t, version) for t in path.read_bytes().splitlines())


@pytest.fixture(scope="module", params=[600, pytest.param(5000, marks=pytest.mark.slow)])
def many(tmp_path_factory, request) -> tuple[Path, list[str | None]]:
    "A file of which a random third is damaged, and the damages"
    rng, known, rows = Rng(11), list(DAMAGES), request.param
    places = rng.sample(range(rows), rows // 3)
    names: list[str | None] = [None] * rows
    for k, at in enumerate(places): names[at] = known[k % len(known)]
    return write_lines(tmp_path_factory.mktemp("many") / "rows.jsonl", names, seed=13), names


@pytest.mark.parametrize("version", VERSIONS)
def test_many(many, version):
    "Every line of a large file: state, findings, corrected files; the same from two processes"
    path, names = many
    report = check(path, tokenizer_of(version), workers=1)
    assert not problems(path, names, report, version)
    both = check(path, tokenizer_of(version), workers=2)
    assert (
        both.findings == report.findings
        and both.counts == report.counts
        and (both.files[0].state == report.files[0].state).all()
    )
    check_corrected(path, report, version)


def test_damages_do_damage():
    "There are enough of them, and each changes its row"
    assert len(DAMAGES) >= 40 and set(SEEN) <= set(DAMAGES)
    for name, (kind, _) in DAMAGES.items(): assert damaged_line(name, Rng(1)) != line_of(GOOD[kind](Rng(1)))


ASK, REPLY = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}


def asked(*ids: str, **more: Any) -> dict:
    return {
        "role": "assistant",
        "tool_calls": [
            {"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in ids
        ],
        **more,
    }


def result(id: str, text: str) -> dict: return {"role": "tool", "tool_call_id": id, "content": text}


REPAIRS: dict[
    str, tuple[Any, Callable[[dict], bool]]
] = {  # a bad row; what must be true of it once it is repaired
    "two conversations": (
        {
            "messages": [ASK, REPLY],
            "interactions": [{"is_user": True, "text": "Who?"}, {"is_user": False, "text": "Me."}],
        },
        lambda r: False,
    ),
    "two tool lists": (
        lambda rng: {**tool_row(rng), "available_tools": tool_row(rng)["tools"]}, lambda r: False,
    ),
    "two texts": ({"messages": [{**ASK, "text": "Who?"}, REPLY]}, lambda r: False),
    "system prompt in parts": (
        {
            "messages": [{**ASK, "role": "human"}, REPLY],
            "system_prompt": [{"type": "text", "text": "In French."}],
        },
        lambda r: "In French." in json.dumps(r),
    ),
    "old system prompt": (
        {
            "interactions": [{"is_user": 1, "text": "a"}, {"is_user": 0, "text": "b"}],
            "system_prompt": "In French.",
        },
        lambda r: "In French." in json.dumps(r),
    ),
    "only_last": (
        {"messages": [{**ASK, "role": "human"}, REPLY, ASK, REPLY], "only_last": 1},
        lambda r: bool(r.get("only_last")),
    ),
    "weight of text and call": (
        {"messages": [ASK, asked("aaaaaaaa1", content="Hm.", weight=0), result("aaaaaaaa1", "1"), REPLY]},
        lambda r: all(m.get("weight") == 0 for m in r["messages"][1:3]),
    ),
    "results in another order": (
        {
            "messages": [
                ASK, asked("aaaaaaaa1", "aaaaaaaa2"), result("aaaaaaaa2", "two"), result("x", "one"),
                REPLY,
            ]
        },
        lambda r: (
            {"aaaaaaaa2": "two"}.items()
            <= {m.get("tool_call_id"): m.get("content") for m in r["messages"]}.items()
        ),
    ),
    "one byte": (
        b'{"messages": [{"role": "user", "content": "\xe9 \xe7\x8c\xab \xc3\xbc"}, '
        b'{"role": "assistant", "content": "A cat."}]}',
        lambda r: "猫 ü" in r["messages"][0]["content"],
    ),
}


@pytest.mark.parametrize("name", REPAIRS)
def test_repair_is_safe(tmp_path, name):
    "A repaired row still says all that was said; else the row is rejected"
    row, holds = REPAIRS[name]
    path = tmp_path / "row.jsonl"
    row = row(Rng(1)) if callable(row) else row
    path.write_bytes((row if isinstance(row, bytes) else line_of(row)) + b"\n")
    report = check(path, tokenizer_of("v3"), workers=1)
    report.write_corrected()
    assert report.files[0].state[0] == REJECTED or holds(
        json.loads(path.with_name("row.jsonl.corrected").read_bytes())
    )


def test_also_of_nested_rows(tmp_path):
    "Mending characters stands what checking stands"
    path = tmp_path / "row.jsonl"
    path.write_bytes(line_of({"messages": [{**ASK, "content": "a\x07"}, REPLY], "x": nested(600)}) + b"\n")
    report = check(path, tokenizer_of("v3"), workers=1)
    assert report.files[0].state[0] == KEPT
    report.write_corrected(["control-character"])
    assert b"\\u0007" not in path.with_name("row.jsonl.corrected").read_bytes()
