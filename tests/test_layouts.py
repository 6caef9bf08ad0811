"""Layouts of data, a row or two of each: the messages that they must become, worked out by hand; what is
converted passes `check` and is what a server sends; the same by every way in; what has no one meaning is
refused with the way out."""

import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mistral_nb import cli
from mistral_nb.data.certify import certify
from mistral_nb.data.check import check
from mistral_nb.data.convert import convert
from mistral_nb.data.formats import FORMATS, UnknownFormatError, guess_format
from mistral_nb.data.schema import parse_row
from mistral_nb.data.tokens import load_tokenizer


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


TOOL = {
    "name": "get_wind",
    "description": "Wind at a port",
    "parameters": {"type": "object", "properties": {"port": {"type": "string"}}},
}
WRAPPED = {"type": "function", "function": TOOL}
DICT_TOOL = {
    "name": "get_wind",
    "description": "Wind at a port",
    "parameters": {"type": "dict", "properties": {"port": {"type": "str"}}},
}
CALL = {"name": "get_wind", "arguments": {"port": "Vannes"}}
ARGUMENTS = json.dumps(CALL["arguments"])
ASKED = "Is the pier dry?"
SAID = "It is dry."
ONE = [("user", ASKED), ("assistant", SAID)]
TWO = [*ONE, ("user", "Since when?"), ("assistant", "Since noon.")]
BRIEF = ("system", "Answer briefly.")
CALLED = [("user", "Wind?"), ("call", ARGUMENTS), ("tool", '{"knots": 9}'), ("assistant", "Nine knots.")]
ONLY_CALL = [("user", "Wind?"), ("call", ARGUMENTS)]
REQUEST = {"model": "m", "messages": [user(ASKED)]}
RESPONSE = {"status_code": 200, "body": {"choices": [{"index": 0, "message": answer(SAID)}]}}


def tagged(tag):
    return f"<{tag}>\n{json.dumps(CALL)}\n</{tag}>"


def shared(*texts):
    return [{"from": w, "value": t} for w, t in zip(["human", "gpt"] * len(texts), texts)]


def chat(*texts):
    return [f(t) for f, t in zip([user, answer] * len(texts), texts)]


def parts(role, **part):
    return {"role": role, "parts": [part]}


def tool_talk(prompt, call, result):
    "A conversation with a call in its text"
    said = [("system", prompt)] if prompt else []
    said += [("user", "Wind?"), ("assistant", call), ("tool", result), ("assistant", "Nine knots.")]
    return [{"from": who, "value": text} for who, text in said]


TEXTS = [text for _, text in TWO]
LAYOUTS = {  # a row, its format, its messages
    "role and content under conversations": ({"conversations": chat(*TEXTS)}, "openai", TWO),
    "under chat": ({"chat": chat(*TEXTS)}, "openai", TWO),
    "under a name of one's own": ({"harbour_log": chat(*TEXTS), "day": 3}, "openai", TWO),
    "from and value under a name of one's own": ({"log": shared(*TEXTS)}, "sharegpt", TWO),
    "from and content": (
        {"conversations": [{"from": "human", "content": ASKED}, {"from": "gpt", "content": SAID}]},
        "sharegpt",
        ONE,
    ),
    "capitals": (
        {"Conversations": [{"From": "Human", "Value": ASKED}, {"From": "GPT", "Value": SAID}]},
        "sharegpt",
        ONE,
    ),
    "author": (
        {"messages": [{"author": "user", "content": ASKED}, {"author": "bot", "content": SAID}]},
        "openai",
        ONE,
    ),
    "speaker and utterance": (
        {"dialogue": [{"speaker": "user", "utterance": ASKED}, {"speaker": "assistant", "utterance": SAID}]},
        "openai",
        ONE,
    ),
    "sender and message": (
        {"dialog": [{"sender": "human", "message": ASKED}, {"sender": "ai", "message": SAID}]},
        "openai",
        ONE,
    ),
    "LangChain": (
        {"messages": [{"type": "human", "content": ASKED}, {"type": "ai", "data": {"content": SAID}}]},
        "openai",
        ONE,
    ),
    "system apart": ({"system": BRIEF[1], "conversations": chat(ASKED, SAID)}, "openai", [BRIEF, *ONE]),
    "human and assistant": ({"human": ASKED, "assistant": SAID}, "pairs", ONE),
    "patient and doctor": ({"Patient": ASKED, "Doctor": SAID, "note": "n"}, "speakers", ONE),
    "customer and agent": ({"customer": ASKED, "agent": SAID, "ticket": 4}, "speakers", ONE),
    "q and a": ({"Q": ASKED, "A": SAID}, "speakers", ONE),
    "lists of two speakers": ({"user": TEXTS[::2], "assistant": TEXTS[1::2]}, "speakers", TWO),
    "texts in turn": ({"conversations": TEXTS, "source": "own"}, "turns", TWO),
    "texts in turn under data": ({"id": "7", "data": TEXTS}, "turns", TWO),
    "texts with labels": ({"conversation": [f"Human: {ASKED}", f"AI: {SAID}"]}, "turns", ONE),
    "pairs in turn": ({"conversation": [TEXTS[:2], TEXTS[2:]]}, "turns", TWO),
    "roles and texts": ({"conversation": [["user", ASKED], ["assistant", SAID]]}, "turns", ONE),
    "input and output in turn": (
        {
            "conversation": [
                {"system": BRIEF[1], "input": ASKED, "output": SAID},
                {"input": TEXTS[2], "output": TEXTS[3]},
            ]
        },
        "turns",
        [BRIEF, *TWO],
    ),
    "human and assistant in turn": ({"conversation": [{"human": ASKED, "assistant": SAID}]}, "turns", ONE),
    "a struct of lists": (
        {"messages": {"role": ["user", "assistant"], "content": [ASKED, SAID]}},
        "openai",
        ONE,
    ),
    "columns of lists": ({"role": ["user", "assistant"], "content": [ASKED, SAID]}, "lists", ONE),
    "input list and output": ({"input": [user(ASKED)], "output": SAID}, "prompt-completion", ONE),
    "input and output lists": (
        {"input": chat(*TEXTS[:3]), "output": [answer(TEXTS[3])]},
        "prompt-completion",
        TWO,
    ),
    "prompt and completion lists": (
        {"prompt": [user(ASKED)], "completion": [answer(SAID)]},
        "prompt-completion",
        ONE,
    ),
    "a prompt list with a system prompt": (
        {"prompt": [{"role": "system", "content": BRIEF[1]}, user(ASKED)], "completion": SAID},
        "prompt-completion",
        [BRIEF, *ONE],
    ),
    "prompt and completion texts": ({"prompt": ASKED, "completion": SAID}, "pairs", ONE),
    "a prompt text and a completion list": (
        {"prompt": ASKED, "completion": [answer(SAID)]},
        "prompt-completion",
        ONE,
    ),
    "messages and a response": ({"messages": [user(ASKED)], "response": SAID}, "prompt-completion", ONE),
    "history of pairs": ({"query": TEXTS[2], "response": TEXTS[3], "history": [TEXTS[:2]]}, "pairs", TWO),
    "history of messages": (
        {"instruction": TEXTS[2], "output": TEXTS[3], "history": chat(*TEXTS[:2])},
        "alpaca",
        TWO,
    ),
    "a batch with its response": ({"custom_id": "a", "body": REQUEST, "response": RESPONSE}, "batch", ONE),
    "a batch with the answer inside": (
        {"custom_id": "a", "body": {"messages": chat(ASKED, SAID)}},
        "batch",
        ONE,
    ),
    "a log of requests": ({"request": REQUEST, "response": RESPONSE["body"]}, "batch", ONE),
    "Anthropic's batch": (
        {
            "custom_id": "a",
            "params": {"system": BRIEF[1], "messages": [user(ASKED)]},
            "result": {
                "type": "succeeded",
                "message": {"role": "assistant", "content": [{"type": "text", "text": SAID}]},
            },
        },
        "batch",
        [BRIEF, *ONE],
    ),
    "Gemini": (
        {
            "systemInstruction": {"parts": [{"text": BRIEF[1]}]},
            "contents": [parts("user", text=ASKED), parts("model", text=SAID)],
        },
        "gemini",
        [BRIEF, *ONE],
    ),
    "Gemini in snakes, without roles": (
        {
            "system_instruction": BRIEF[1],
            "contents": [{"parts": [{"text": ASKED}]}, parts("model", text=SAID)],
        },
        "gemini",
        [BRIEF, *ONE],
    ),
    "Gemini's calls": (
        {
            "contents": [
                parts("user", text="Wind?"),
                parts("model", functionCall={"name": "get_wind", "args": CALL["arguments"]}),
                parts("user", functionResponse={"name": "get_wind", "response": {"knots": 9}}),
                parts("model", text="Nine knots."),
            ],
            "tools": [{"functionDeclarations": [TOOL]}],
        },
        "gemini",
        CALLED,
    ),
    "Anthropic's calls": (
        {
            "messages": [
                user("Wind?"),
                {
                    "role": "assistant",
                    "content": [
                        {"type": "tool_use", "id": "toolu_9", "name": "get_wind", "input": CALL["arguments"]}
                    ],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "toolu_9", "content": '{"knots": 9}'}],
                },
                answer("Nine knots."),
            ],
            "tools": [
                {"name": "get_wind", "description": "Wind at a port", "input_schema": TOOL["parameters"]}
            ],
        },
        "openai",
        CALLED,
    ),
    "Hermes": (
        {
            "conversations": tool_talk(
                f"<tools>{json.dumps(WRAPPED)}</tools>",
                tagged("tool_call"),
                '<tool_response>\n{"knots": 9}\n</tool_response>',
            )
        },
        "sharegpt",
        CALLED,
    ),
    "Hermes with tools apart": (
        {"tools": json.dumps([TOOL]), "conversations": tool_talk("", tagged("tool_call"), '{"knots": 9}')},
        "sharegpt",
        CALLED,
    ),
    "ToolACE": (
        {
            "system": f"Here are your functions:\n{json.dumps([DICT_TOOL])}\nPut calls as [func(a=1)].",
            "conversations": tool_talk("", "[get_wind(port='Vannes')]", '{"knots": 9}'),
        },
        "sharegpt",
        CALLED,
    ),
    "Glaive's second edition": (
        {
            "system": f"SYSTEM: {BRIEF[1][:-1]}. -\n{json.dumps(TOOL, indent=1)}\n",
            "chat": """USER: Wind?\n\n\nASSISTANT: <functioncall> """
            """{"name": "get_wind", "arguments": '{"port": "Vannes"}'} <|endoftext|>\n\n\n"""
            """FUNCTION RESPONSE: {"knots": 9}\n\n\nASSISTANT: Nine knots. <|endoftext|>\n""",
        },
        "glaive-v2",
        [BRIEF, *CALLED],
    ),
    "Glaive's second edition without functions": (
        {"system": f"SYSTEM: {BRIEF[1]}", "chat": f"USER: {ASKED}\n\n\nASSISTANT: {SAID} <|endoftext|>"},
        "glaive-v2",
        [BRIEF, *ONE],
    ),
    "xLAM": (
        {
            "id": 1,
            "query": "Wind?",
            "answers": json.dumps([CALL]),
            "tools": json.dumps(
                [TOOL | {"parameters": {"port": {"type": "str, optional", "description": "p"}}}]
            ),
        },
        "calls",
        ONLY_CALL,
    ),
    "xLAM as objects": ({"query": "Wind?", "answers": [CALL], "tools": [DICT_TOOL]}, "calls", ONLY_CALL),
    "SQuAD": (
        {
            "context": "The pier is dry.",
            "question": ASKED,
            "answers": {"text": ["dry"], "answer_start": [12]},
        },
        "answers",
        [("user", f"The pier is dry.\n\n{ASKED}"), ("assistant", "dry")],
    ),
    "a list with one answer": ({"question": ASKED, "answers": [SAID]}, "answers", ONE),
}
MODES = ("rows", "frame", "parquet", "json", "json cells")
TREE = {
    "message_tree_id": "t",
    "prompt": {
        "role": "prompter",
        "text": ASKED,
        "replies": [
            {"role": "assistant", "text": "Hm.", "rank": 1, "replies": []},
            {
                "role": "assistant",
                "text": SAID,
                "rank": 0,
                "replies": [
                    {
                        "role": "prompter",
                        "text": TEXTS[2],
                        "replies": [{"role": "assistant", "text": TEXTS[3], "rank": None, "replies": []}],
                    }
                ],
            },
        ],
    },
}


def turns(row):
    "(role, text) of each message, and the arguments of each call"
    out = []
    for m in row["messages"]:
        if m.get("content"):
            out.append((m["role"], m["content"]))
        out += [("call", c["function"]["arguments"]) for c in m.get("tool_calls", [])]
    return out


def source(row, mode, folder):
    "A row by another way in; None where that way cannot hold it"
    if mode == "rows":
        return [row]
    if mode == "frame":
        return pd.DataFrame([row])
    path = folder / f"rows.{'parquet' if mode == 'parquet' else 'csv' if mode == 'json cells' else 'json'}"
    if mode == "parquet":
        try:
            pq.write_table(pa.Table.from_pylist([row]), path)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            return None  # lists of both texts and objects, say
    elif mode == "json":
        path.write_text(json.dumps([row]))
    else:
        cells = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()}
        pd.DataFrame([cells]).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name, tmp_path):
    "Recognised, converted to these messages, by every way in; kept by check, and what a server sends"
    row, format, want = LAYOUTS[name]
    for mode in MODES:
        if mode == "json cells" and name == "lists of two speakers":
            continue  # these are texts of a pair
        found = source(row, mode, tmp_path)
        if found is None:
            continue
        done = convert(found)
        assert (done.format, done.kept, [r["reason"] for r in done.refused]) == (format, 1, []), mode
        assert turns(done.rows[0]) == want, mode
        has_tools = any(who == "call" for who, _ in want)
        assert [t["function"]["name"] for t in done.rows[0].get("tools", [])] == ["get_wind"] * has_tools, (
            mode
        )
    if has_tools:
        assert done.rows[0]["tools"][0]["function"]["parameters"]["properties"]["port"]["type"] == "string"
    for version in ("v3", "v7", "v3-tekken"):
        tokenizer = load_tokenizer(version)
        converted = convert([row], version=version).rows
        report = check(converted, tokenizer)
        assert not [f for f in report.findings if f.level == "error"], report
        sample = parse_row(converted[0], version=tokenizer.version)
        assert certify(sample, tokenizer).ok or report.counts["serving"], certify(sample, tokenizer)


def test_columns_are_named():
    "Each column of each layout is used, or in a note"
    for name, (row, _, _) in LAYOUTS.items():
        done = convert([row | {"harbour": "x"}])
        assert done.kept == 1 and "column harbour left out" in done.notes, name


def test_tree():
    "A conversation for each way to a last answer, by rank; what two ways share is trained once"
    done = convert([TREE])
    assert [turns(r) for r in done.rows] == [TWO, [ONE[0], ("assistant", "Hm.")]]
    assert any("a conversation for each way" in note for note in done.notes)
    reply = TREE["prompt"]["replies"][1]
    other = {
        "role": "prompter",
        "text": "Why?",
        "replies": [{"role": "assistant", "text": "Wind.", "replies": []}],
    }
    both = {**reply, "replies": [*reply["replies"], other]}
    rows = convert([{"prompt": {**TREE["prompt"], "replies": [both]}}]).rows
    assert [[m.get("weight") for m in r["messages"]] for r in rows] == [[None] * 4, [None, 0, None, None]]
    assert check(rows).counts["weights"] == 0 or not [f for f in check(rows).findings if f.level == "error"]
    assert (
        convert([{"prompt": {**TREE["prompt"], "replies": []}}])
        .refused[0]["reason"]
        .endswith("no answer in it")
    )


def test_several_in_one(tmp_path):
    "Instances of an instruction, questions about passages: a row for each"
    seed = {
        "instruction": "Name it.",
        "instances": [{"input": "a port", "output": "Vannes."}, {"input": "", "output": "A."}],
    }
    assert [turns(r) for r in convert([seed]).rows] == [
        [("user", "Name it.\n\na port"), ("assistant", "Vannes.")],
        [("user", "Name it."), ("assistant", "A.")],
    ]
    passage = {
        "context": "Dry.",
        "qas": [{"question": q, "id": q, "answers": [{"text": "d", "answer_start": 0}]} for q in "ab"],
    }
    (tmp_path / "squad.json").write_text(
        json.dumps({"version": "2", "data": [{"title": "T", "paragraphs": [passage]}]})
    )
    done = convert(tmp_path / "squad.json")
    assert [turns(r)[0] for r in done.rows] == [("user", f"Dry.\n\n{q}") for q in "ab"]


REFUSED = {  # a row, what is said of it
    "preference": (
        {"prompt": [user("a")], "chosen": [answer("b")], "rejected": [answer("c")]},
        "preference pair",
    ),
    "ranked": ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}, "preference pair"),
    "ranked answers": (
        {"prompt": "a", "answers": [{"answer": "b", "rank": 1}, {"answer": "c", "rank": 2}]},
        "preference pair",
    ),
    "two conversations judged": (
        {"conversation_a": chat("a", "b"), "conversation_b": chat("a", "c"), "winner": "model_a"},
        "preference pair",
    ),
    "KTO": ({"prompt": [user("a")], "completion": [answer("b")], "label": False}, "label is false"),
    "a request": ({"custom_id": "a", "body": REQUEST}, "join its response by custom_id"),
    "a response": ({"custom_id": "a", "response": RESPONSE}, "join both by custom_id"),
    "no calls": ({"query": "a", "answers": "[]", "tools": [TOOL]}, "the list of calls is empty"),
    "different answers": ({"question": "a", "answers": ["b", "c"]}, "2 different answers"),
    "no span": ({"question": "a", "answers": {"text": [], "answer_start": []}}, "the answer is empty"),
    "a picture": (
        {"contents": [parts("user", inlineData={"data": "x"}), parts("model", text="b")]},
        "only text",
    ),
    "one message": ({"role": "user", "text": "a", "parent_id": None}, "one message of a conversation"),
    "anyOf": (
        {"messages": chat("a", "b"), "tools": [TOOL | {"parameters": {"anyOf": 3}}]},
        "anyOf of a tool's schema is not a list",
    ),
    "a pattern": (
        {
            "messages": chat("a", "b"),
            "tools": [TOOL | {"parameters": {"type": "object", "patternProperties": {"(": {}}}}],
        },
        "is no pattern",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    row, word = REFUSED[name]
    done = convert([row])
    assert done.kept == 0 and word in done.refused[0]["reason"], done.refused


UNKNOWN = {  # a row, the way out that is named
    "source and target": ({"source": "a", "target": "b"}, "(source and target?)"),
    "translation": ({"translation": {"en": "a", "fr": "b"}}, "(translation.en and translation.fr?)"),
    "two conversations": (
        {"before": chat("a", "b"), "after": chat("c", "d")},
        "before and after hold conversations",
    ),
    "lists of texts": (
        {"tag": "hello", "patterns": ["Hi"], "responses": ["Ho"]},
        "of no format that is known",
    ),
    "tags": ({"tags": ["a", "b"], "n": 1}, "of no format that is known"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name):
    row, word = UNKNOWN[name]
    with pytest.raises(UnknownFormatError) as error:
        convert([row])
    assert word in str(error.value)


def test_named_columns(tmp_path, capsys):
    "Two columns by name, in Python and on the command line; mistakes show the columns"
    rows = [{"Query": ASKED, "Reply": SAID, "n": 1}, {"Query": ASKED, "Reply": None, "n": 2}]
    for given in (rows, pd.DataFrame(rows)):
        done = convert(given, question="Query", answer="Reply")
        assert turns(done.rows[0]) == ONE and done.refused[0]["reason"] == "the answer is empty"
        assert "column n left out" in done.notes
    done = convert(
        [{"translation": {"en": "a", "fr": "b", "de": "c"}}],
        question="translation.en",
        answer="translation.fr",
    )
    assert (
        turns(done.rows[0]) == [("user", "a"), ("assistant", "b")]
        and "de of column translation left out" in done.notes
    )
    with pytest.raises(ValueError, match="there is no column 'Question': the columns are Query, Reply, n"):
        convert(rows, question="Question", answer="Reply")
    file, out = tmp_path / "rows.csv", tmp_path / "out.jsonl"
    pd.DataFrame(rows).to_csv(file, index=False)
    assert cli.main(["convert", str(file), str(out), "--question", "Query", "--answer", "Reply"]) == 0
    assert turns(json.loads(out.read_text())) == ONE
    assert (
        cli.main(["convert", str(file), str(out), "--overwrite", "--question", "Q", "--answer", "Reply"]) != 0
    )
    assert "the columns are Query, Reply, n" in capsys.readouterr().err


def test_lines(tmp_path, capsys):
    "A text file is one document, or one a line if asked; the guess says which"
    (tmp_path / "a.txt").write_text("Boats.\n\nPiers.\n")
    assert "one document, not a document a line (lines=True or --lines" in str(
        guess_format(tmp_path / "a.txt")
    )
    assert "read as a document a line" in str(guess_format(tmp_path / "a.txt", lines=True))
    assert convert(tmp_path / "a.txt", lines=True).rows == [{"text": "Boats."}, {"text": "Piers."}]
    assert cli.main(["convert", str(tmp_path / "a.txt"), str(tmp_path / "o.jsonl"), "--lines"]) == 0
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 2


def test_versions():
    for version in ("q", "v", "3.5"):
        with pytest.raises(ValueError, match="there is no version"):
            convert([{"question": "a", "answer": "b"}], version=version)
    assert convert([{"question": "a", "answer": "b"}], version="v3-tekken").kept == 1


def test_special_before_general():
    "No row that a layout was made for is taken by the one for plain text, or by two that read it differently"
    for name, (row, format, want) in LAYOUTS.items():
        small = {k.lower(): v for k, v in row.items()}
        for other in FORMATS.values():
            if not other.fits(small) or other.name in (format, "text"):
                continue
            done = convert([row], other.name)
            assert (
                not done.kept
                or turns(done.rows[0]) == want
                or list(FORMATS).index(format) < list(FORMATS).index(other.name)
            ), name
