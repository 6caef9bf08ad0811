"""Small files in layouts of public data sets: each is read, or refused with the reason that helps; nothing
disappears without a word."""
import gzip
import json
import random
import shutil
import time
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mistral_nb import cli
from mistral_nb.core.paths import folder_notes, jsonl_files, why_not_jsonl
from mistral_nb.data.check import check
from mistral_nb.data.convert import convert
from mistral_nb.data.formats import UnknownFormatError, guess_format
from mistral_nb.data.rows import read_rows, write_rows
from mistral_nb.data.schema import SampleError, parse_row
from mistral_nb.data.certify import certify
from mistral_nb.data.tokens import encode_with_prefixes, load_tokenizer

CASES = Path(__file__).parent / "cases"
VERSIONS = ("v2", "v3", "v3-tekken", "v7")

# file: rows kept, rows refused, words that must stand in the notes or reasons
EXPECTED = {
    # a column or key that carries meaning
    "kto_llamafactory.json": (1, 1, ["marked as not wanted: label is false", "column label"]),
    "loss_false.jsonl": (1, 0, []),
    "loss_false_alone.jsonl": (1, 0, []),
    "train_false.jsonl": (1, 0, []),
    "row_weight.jsonl": (2, 0, []),
    "weight_null.jsonl": (3, 1, ["weight of a message is neither 0 nor 1: 0.5", "null", "from a text"]),
    "label_text.csv": (2, 0, ["column label left out", "column without a name"]),
    "summarise.jsonl": (1, 0, ["column summary left out"]),
    "text_target.jsonl": (1, 0, ["column target left out"]),
    "code_docstring.jsonl": (1, 0, ["column docstring left out"]),
    "content_title_label.jsonl": (1, 0, ["column label left out", "column url left out"]),
    "rank_responses.jsonl": (2, 0, ["column rating left out"]),
    "label_column.jsonl": (1, 0, ["column score left out", "column flag left out"]),
    "oasst_messages.jsonl": (0, 3, ["one message of a conversation", "parent_id"]),
    "one_message_per_row.csv": (0, 4, ["conversation_id"]),
    "chatml_text.jsonl": (1, 0, ["ChatML"]),
    "alpaca_text.jsonl": (1, 0, ["Alpaca"]),
    "llama3_text.jsonl": (1, 0, ["Llama 3"]),
    "instruction_input_response.jsonl": (1, 0, []),
    "instruction_prompt_completion.jsonl": (1, 0, []),
    "names.jsonl": (1, 0, ["name of a message left out"]),
    "mcq.jsonl": (1, 0, ["options written below the question", "answer_idx"]),
    "author_content.jsonl": (1, 0, ["column context left out"]),
    "capital.jsonl": (1, 0, ["column Complex_CoT left out"]),
    # the same rows by other ways
    "parquet_folder": (2, 0, ["null place of a call's arguments left out"]),
    "struct_args.parquet": (2, 0, ["nulls of a tool's schema"]),
    "struct_args_only.parquet": (2, 0, ["null place"]),
    "struct_args_only.jsonl": (2, 0, ["null place"]),
    "struct_args_to_json.jsonl": (2, 0, ["null place"]),
    "two_docs.txt": (1, 0, ["one document"]),
    "jsonl_in.txt": (2, 0, ["JSON in a text file"]),
    # reading
    "array_one_line.jsonl": (2, 0, []),
    "bare_list.jsonl": (2, 0, []),
    "pretty.jsonl": (2, 0, []),
    "trailing_comma.jsonl": (2, 0, []),
    "cr_only.jsonl": (2, 0, []),
    "python_lines.jsonl": (1, 0, []),
    "two_on_a_line.jsonl": (2, 0, []),
    "utf16.jsonl": (2, 0, []),
    "bom_crlf.jsonl": (2, 0, []),
    "utf16.csv": (2, 1, ["the answer is empty"]),
    "bom_crlf.csv": (2, 1, ["the answer is empty"]),
    "latin1.csv": (1, 2, ["not UTF-8"]),
    "semicolon.csv": (2, 1, ["parted by semicolons"]),
    "tabs.csv": (1, 0, ["parted by tabs"]),
    "spaces_header.csv": (1, 0, ["spaces around the cells"]),
    "stray_quote.csv": (1, 4, ["a quote opens in this row and is never closed", "line 3"]),
    "inches.csv": (2, 1, ["a quote stands inside the cell"]),
    "backslash.csv": (1, 1, ["a quote stands inside the cell"]),
    "crlf_cell.csv": (1, 0, []),
    "index.csv": (1, 0, ["column without a name"]),
    "empty_answer.csv": (1, 1, ["the answer is empty"]),
    "nul.csv": (1, 0, ["characters that nobody sees"]),
    "history.csv": (1, 0, []),
    "dup_keys.jsonl": (1, 0, ["content stands twice"]),
    "comments.jsonl": (1, 1, ["not JSON at character 1"]),
    "escaped_nl.jsonl": (1, 2, ["Invalid control character"]),
    "nan.jsonl": (1, 1, ["score", "no answer to train on"]),
    "columns.json": (2, 0, ["by columns"]),
    "lists.json": (2, 0, ["by columns"]),
    "server_rows.json": (1, 0, ["row_idx", "truncated_cells", "features"]),
    "dataset_key.json": (2, 0, []),
    # known elsewhere
    "think_mistral.jsonl": (1, 0, []),
    "think_mistral_api.jsonl": (1, 0, []),
    "think_text.jsonl": (1, 0, ["a thought made a thinking part"]),
    "reasoning_content.jsonl": (1, 0, ["a thought made a thinking part"]),
    "refusal.jsonl": (1, 0, ["a refusal taken as the answer"]),
    "parts_text.jsonl": (1, 0, []),
    "parts_two_texts.jsonl": (1, 0, []),
    "parts_null_keys.jsonl": (1, 0, ["image_url of a text part left out: null"]),
    "content_dict.jsonl": (1, 0, ["written as JSON"]),
    "content_number.jsonl": (1, 0, ["a number as content"]),
    "numbers_answer.jsonl": (2, 0, ["a number as answer"]),
    "tool_result_list.jsonl": (1, 0, ["written as JSON"]),
    "tool_result_parts.jsonl": (1, 0, []),
    "tool_result_empty.jsonl": (1, 0, []),
    "tool_calls_json_string.jsonl": (1, 0, []),
    "tools_list_of_strings.jsonl": (1, 0, []),
    "tool_params_string.jsonl": (1, 0, []),
    "tools_json_string.jsonl": (1, 0, []),
    "sharegpt_call_dict.jsonl": (1, 0, ["written as JSON"]),
    "function_call_null.jsonl": (1, 0, ["audio", "refusal"]),
    "roles_swift.jsonl": (1, 0, []),
    "tools_in_system.jsonl": (2, 0, []),
    "types_dict_str.jsonl": (1, 0, ["the type dict", "the type str"]),
    "toolace.jsonl": (1, 0, ["calls read from the text", "tools taken from the system prompt"]),
    "only_assistant.jsonl": (0, 1, ["no message of a user"]),
    "conversations_role_content.jsonl": (1, 0, []),
    "chat_column.jsonl": (1, 0, []),
    "from_content.jsonl": (1, 0, []),
    "human_assistant.jsonl": (1, 0, []),
    "messages_role_missing.jsonl": (1, 0, []),
    "struct_of_lists.jsonl": (1, 0, []),
    "struct_of_lists_sharegpt.jsonl": (1, 0, []),
    "system_user_assistant.jsonl": (1, 0, []),
    "arguments_dict.jsonl": (1, 0, ["null hour"]),
    "developer.jsonl": (1, 0, ["parallel_tool_calls", "tool_choice"]),
    "final_call_only.jsonl": (1, 0, []),
    "multi_tool_turns.jsonl": (2, 0, []),
    "parallel.jsonl": (1, 0, []),
    "same_role.jsonl": (1, 0, []),
    "user_after_tool.jsonl": (1, 0, []),
    "content_and_call.jsonl": (1, 0, ["made two messages"]),
    "special_texts.jsonl": (13, 0, ["Gemma", "Llama 3", "DeepSeek", "placeholder", "<image>"]),
    "placeholder.jsonl": (1, 0, ["placeholder"]),
    "prompt_empty.jsonl": (0, 1, ["the question is empty"]),
    "text_with_null.jsonl": (1, 2, ["the text is empty", "meta"]),
    "tool_name_dots.jsonl": (0, 1, ["Function name was sea.get tide"]),
    "role_caps.jsonl": (0, 1, ["the role of a message is not known", "Chatbot"]),
    "anthropic.jsonl": (1, 0, ["made two messages"]),
    "gemini.jsonl": (1, 0, []),
    "openai_batch.jsonl": (1, 0, ["model of a request", "column custom_id"]),
    "oasst_tree.jsonl": (1, 0, ["a conversation for each way", "rank of a message"]),
    "glaive_v2.jsonl": (1, 0, []),
    "patient_doctor.jsonl": (1, 0, ["column Description"]),
    "lima.jsonl": (1, 0, ["texts in turn", "column source"]),
    "list_of_texts.jsonl": (1, 0, ["texts in turn", "column id"]),
    "xtuner_conversation.jsonl": (1, 0, []),
    "input_output_lists.jsonl": (1, 0, []),
    "instances.jsonl": (1, 0, []),
    "squad.json": (1, 0, ["column title"]),
    "squad_hf.jsonl": (1, 0, []),
    "fim.jsonl": (0, 1, ["a text with a gap"]),
    # preference pairs, whole or not at all
    "openai_pref.jsonl": (0, 1, ["preference pair"]),
    "dpo_trl.jsonl": (0, 1, ["preference pair"]),
    "dpo_hh.jsonl": (0, 1, ["preference pair"]),
    "dpo_openai.jsonl": (0, 1, ["preference pair"]),
    "dpo_alpaca_list.json": (0, 1, ["preference pair"]),
}
UNKNOWN = {  # of no format that is known: what the error says
    "latin1.jsonl": "line 1: the text is not UTF-8",
    "no_header.csv": "the first line looks like data",
    "source_target.jsonl": "(source and target?)",
    "intents.json": "intents",
    "translation.jsonl": "translation",
}


def test_every_file_is_expected():
    assert {p.name for p in CASES.iterdir()} == {*EXPECTED, *UNKNOWN}


@pytest.mark.parametrize("name", EXPECTED)
def test_case(name):
    "Rows in are rows kept and rows refused; training takes what is kept; the words that matter are said"
    kept, refused, words = EXPECTED[name]
    done = convert(CASES / name)
    said = "\n".join([*done.notes, *(r["reason"] for r in done.refused)])
    assert (done.kept, len(done.refused)) == (kept, refused), said
    assert sum(done.reasons.values()) == refused
    assert not [w for w in words if w not in said], said
    for row in done.rows: parse_row(row, done.kind, version="v13")


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name):
    with pytest.raises(UnknownFormatError) as error: convert(CASES / name)
    assert UNKNOWN[name] in str(error.value)


def rows_of(name: str, **kw) -> list[dict]: return convert(CASES / name, **kw).rows
def contents(row: dict) -> list: return [m.get("content", "call") for m in row["messages"]]


def test_weights():
    "loss, train and weight of a message, and of a row"
    weights = {
        name: [[m.get("weight") for m in r["messages"] if m["role"] == "assistant"] for r in rows_of(name)]
        for name in (
            "loss_false.jsonl", "loss_false_alone.jsonl", "train_false.jsonl", "row_weight.jsonl",
            "weight_null.jsonl",
        )
    }
    assert weights == {
        "loss_false.jsonl": [[0, 1]], "loss_false_alone.jsonl": [[0, None]],
        "train_false.jsonl": [[0, 1]], "row_weight.jsonl": [[0], [1]],
        "weight_null.jsonl": [[None], [0], [1]],
    }


def test_all_parts_of_a_question():
    assert (
        contents(rows_of("instruction_input_response.jsonl")[0])[0]
        == "Translate to French.\n\nThe boat is red."
    )
    assert (
        contents(rows_of("instruction_prompt_completion.jsonl")[0])[0]
        == "Answer as a lawyer would.\n\nMay I moor here?"
    )
    assert contents(rows_of("mcq.jsonl")[0])[0] == "Which is a fish?\n\nA. cod\nB. oak"
    assert contents(rows_of("history.csv")[0]) == [
        "How deep at six?", "Nine metres.", "And at noon?", "Two metres.",
    ]


def test_markup_is_parsed():
    assert contents(rows_of("chatml_text.jsonl")[0]) == ["Brief.", "How deep?", "Nine metres."]
    for name in ("alpaca_text.jsonl", "llama3_text.jsonl"):
        assert contents(rows_of(name)[0]) == ["How deep?", "Nine metres."]


def test_thoughts():
    "A thought is a part from v13 on; before, it is left out, or stays the words that it was"
    parts = [{"type": "thinking", "thinking": "The chart says nine."}, {"type": "text", "text": "Nine."}]
    for name in (
        "think_mistral.jsonl", "think_mistral_api.jsonl", "think_text.jsonl", "reasoning_content.jsonl",
    ):
        assert contents(rows_of(name)[0])[-1] == parts
    assert contents(rows_of("reasoning_content.jsonl", version="v3")[0])[-1] == "Nine."
    assert "left out" in "".join(convert(CASES / "reasoning_content.jsonl", version="v3").notes)
    assert contents(rows_of("think_text.jsonl", version="v7")[0])[-1].startswith("<think>")
    assert contents(rows_of("refusal.jsonl")[0])[-1] == "I will not help with that."


# the same rows, whichever way they come

NULLS = {
    "value": {"type": ["string", "null"]}, "note": {"type": "string", "nullable": True},
    "hour": {"type": "integer"},
}


def tool_row(name: str, arguments: dict, properties: dict, required: list) -> dict:
    tool = {
        "name": name, "description": name,
        "parameters": {"type": "object", "properties": properties, "required": required},
    }
    call = {"id": "abc123XYZ", "type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Now?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "abc123XYZ"},
        {"role": "assistant", "content": "Four."},
    ]
    return {"messages": messages, "tools": [{"type": "function", "function": tool}]}


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    "Rows of two tools, as files and objects of every kind"
    folder = tmp_path_factory.mktemp("ways")
    rows = [
        tool_row("tide", {"port": "Brest", "value": None}, {"port": {"type": "string"}, **NULLS}, ["value"]),
        tool_row("wind", {"place": "Lorient"}, {"place": {"type": "string"}}, []),
    ]
    frame = pd.DataFrame(rows)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "rows.parquet")
    shutil.copy(folder / "rows.parquet", folder / "ROWS.PARQUET")
    (folder / "alone").mkdir()
    shutil.copy(folder / "rows.parquet", folder / "alone")
    write_rows(table.to_pylist(), folder / "to_json.jsonl")
    frame.to_json(folder / "frame.json", orient="records")
    frame.assign(messages=frame.messages.map(json.dumps), tools=frame.tools.map(json.dumps)).to_csv(
        folder / "rows.csv", index=False
    )
    frame.to_csv(folder / "python.csv", index=False)
    files = {p.name: p for p in folder.iterdir()}
    return rows, files | {
        "list": rows, "DataFrame": frame, "Table": table, "to_pylist": table.to_pylist(),
        "to_pandas": table.to_pandas(),
    }


def test_one_result(ways):
    rows, sources = ways
    want = convert(rows)
    assert [json.loads(r["messages"][1]["tool_calls"][0]["function"]["arguments"]) for r in want.rows] == [
        {"port": "Brest", "value": None}, {"place": "Lorient"},
    ]
    assert want.rows[1]["tools"][0]["function"]["parameters"]["properties"] == {"place": {"type": "string"}}
    for name, source in sources.items():
        found = convert(source)
        assert (found.rows, found.refused) == (want.rows, []), name


def test_nulls_of_structs():
    for name in ("struct_args.parquet", "struct_args_to_json.jsonl", "parquet_folder"):
        calls = [r["messages"][1]["tool_calls"][0]["function"]["arguments"] for r in rows_of(name)]
        assert [json.loads(c) for c in calls] == [{"port": "Brest"}, {"place": "Lorient"}], name
    assert rows_of("parquet_folder") == rows_of("struct_args.parquet")


def test_random_rows_come_alike(tmp_path):
    "Rows with random columns, as jsonl, a list, a DataFrame and Arrow"
    rng = random.Random(1)
    for n in range(20):
        keys = rng.sample(["source", "score", "flag", "meta", "lang"], 3)
        rows = [
            {"question": f"q{i}", "answer": f"a{i}", **{k: rng.choice([0, 1, None]) for k in keys}}
            for i in range(5)
        ]
        write_rows(rows, tmp_path / f"{n}.jsonl")
        results = [
            convert(s)
            for s in (rows, tmp_path / f"{n}.jsonl", pd.DataFrame(rows), pa.Table.from_pylist(rows))
        ]
        assert all((r.rows, r.notes) == (results[0].rows, results[0].notes) for r in results)
        assert all(any(f"column {k} left out" in note for note in results[0].notes) for k in keys)


# what trains is what a server sends

@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "name",
    [
        "tool_result_empty.jsonl", "tool_result_parts.jsonl", "parts_two_texts.jsonl", "parts_text.jsonl",
        "content_and_call.jsonl", "parallel.jsonl", "same_role.jsonl",
    ],
)
def test_served(name, version):
    "Converted rows give a server's ids wherever `check` does not say otherwise, and the other way round"
    tokenizer = load_tokenizer(version)
    for row in rows_of(name):
        sample = parse_row(row, version=tokenizer.version)
        same = certify(sample, tokenizer).ok
        assert same == (check([row], tokenizer).counts["serving"] == 0), certify(sample, tokenizer)
        if name.startswith(("tool_result", "parts")) or version == "v7": assert same


def test_raw_parts(tmp_path):
    "As they stand, without a conversion: joined as that version joins them, a system prompt too"
    for name, text in (
        ("parts_two_texts.jsonl", "Summarise this:\n\nThe quay is closed."),
        ("parts_text.jsonl", "How \n\ndeep?"),
    ):
        row = json.loads((CASES / name).read_text())
        for version in ("v2", "v3", "v7"):
            tokenizer = load_tokenizer(version)
            sample = parse_row(row, version=version)
            ids = encode_with_prefixes(sample, tokenizer)[0].tokens.tolist()
            assert text in tokenizer.decode(ids) and certify(sample, tokenizer).ok


def test_beginnings():
    "No beginning ends where the tokenizer goes on with the same answer, whichever way the row was written"
    raw = json.loads((CASES / "content_and_call.jsonl").read_text())
    tokenizer = load_tokenizer("v7")
    whole = rows_of("content_and_call.jsonl", version="v7")[0]
    assert whole["messages"][1]["content"] == "One moment." and "tool_calls" in whole["messages"][1]
    for row in (raw, whole, rows_of("content_and_call.jsonl")[0]):
        samples = encode_with_prefixes(parse_row(row, version="v7"), tokenizer)
        trained = [tokenizer.decode(s.tokens[s.mask].tolist(), special=True) for s in samples]
        assert (
            len(trained) == 2
            and trained[0].strip("▁") == "Four.</s>"
            and trained[1].startswith("▁One▁moment.[TOOL_CALLS]")
        )
    only_last = {"only_last": True, "messages": [*rows_of("same_role.jsonl")[0]["messages"]]}
    assert (
        len(encode_with_prefixes(parse_row(only_last), tokenizer)) == 1
        and len(encode_with_prefixes(parse_row(only_last), load_tokenizer("v3"))) == 2
    )


# folders, files, leftovers

def test_folder(tmp_path):
    row = (
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
        + "\n"
    )
    for name in (
        "train.jsonl", "test.jsonl", "more.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl",
        ".hidden.jsonl", "README.md", "a.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(row)
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(row.encode() * 1000)[:60])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    done = convert(tmp_path)
    said = "\n".join(done.notes)
    assert all(name in said for name in ("train-checkpoint.jsonl", "README.md", "test.jsonl", "a.png")), said
    assert {Path(r["file"]).name for r in done.refused} == {"bad.jsonl.gz", "bad.parquet"} and done.kept >= 2
    assert [p.name for p in jsonl_files(tmp_path)] == [
        "more.jsonl", "test.jsonl", "train.jsonl",
    ]  # of a training: all of that name
    assert any("bad.parquet" in n and "test.jsonl" in n for n in [" ".join(folder_notes(tmp_path))])
    assert "bad.parquet" in str(check(tmp_path))


def test_deep_rows(tmp_path):
    """Rows nested 300, 1,000 and 100,000 deep are named, in a conversion, a check and a training; the rest
    goes on"""
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    deep = [f'{{"messages": {"[" * n}{"]" * n}, "x": 1}}' for n in (300, 1000, 100_000)]
    file = tmp_path / "deep.jsonl"
    file.write_text("\n".join([good, *deep, good]) + "\n")
    done = convert(file)
    assert (done.kept, [r["line"] for r in done.refused]) == (2, [2, 3, 4]) and all(
        "nested" in r["reason"] for r in done.refused
    )
    report = check(file)
    assert sorted(f.line for f in report.findings if f.level == "error") == [2, 3, 4]
    schema = json.loads('{"items": ' * 300 + "{}" + "}" * 300)
    tools = {
        "tools": [{"type": "function", "function": {"name": "f", "description": "", "parameters": schema}}]
    }
    assert "nested" in convert([json.loads(good), {**json.loads(good), **tools}]).refused[0]["reason"]
    with pytest.raises(SampleError): parse_row(json.loads(deep[0]))


@pytest.mark.parametrize(
    "name",
    ["label_text.csv", "columns.json", "two_docs.txt", "struct_args.parquet", "capital.jsonl"],
)
def test_what_to_type(name, capsys):
    "check, on files that are no JSON lines, or hold other rows, gives the line that converts them"
    if name in ("capital.jsonl", "columns.json"):  # lines of JSON, of other rows
        assert "mistral-nb convert" in check(CASES / name).findings[0].problem
        return
    assert "mistral-nb convert" in why_not_jsonl(CASES / name)
    assert cli.main(["check", str(CASES / name)]) == 1
    assert f"mistral-nb convert {CASES / name}" in capsys.readouterr().err


def test_refused_beside(tmp_path, capsys):
    """OUT.refused is ours or it stays, goes when nothing is refused, and a conversion that keeps nothing
    leaves no OUT"""
    out, beside = tmp_path / "out.jsonl", tmp_path / "out.jsonl.refused"
    beside.write_text("my notes\n")
    assert cli.main(["convert", str(CASES / "kto_llamafactory.json"), str(out)]) == 1
    assert (
        beside.read_text() == "my notes\n"
        and not out.exists()
        and "holds no refused rows" in capsys.readouterr().err
    )
    beside.unlink()
    assert cli.main(["convert", str(CASES / "kto_llamafactory.json"), str(out)]) == 0
    assert json.loads(beside.read_text())["reason"] == "marked as not wanted: label is false"
    assert (
        cli.main(["convert", str(CASES / "pretty.jsonl"), str(out), "--overwrite"]) == 0
        and not beside.exists()
    )
    assert cli.main(["convert", str(CASES / "dpo_trl.jsonl"), str(out), "--overwrite"]) == 1
    assert beside.exists() and not out.exists() and "no row could be converted" in capsys.readouterr().out


def test_reasons_quote_nobody():
    "Refusals are counted by what is wrong; the counts add up, however many reasons there are"
    rows = [{"messages": [{"role": f"secret{i}", "content": "x"}]} for i in range(50)]
    done = convert(rows, "openai")
    assert done.reasons == {"the role of a message is not known": 50} and "secret" not in str(done)
    many = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], f"k{i}": 1}
        for i in range(60)
    ]
    counted = convert(many).table().rows
    assert sum(n for what, n in counted if "note" in what) == 60


# check

def test_check_findings():
    "Rows that were passed over without a word"
    kto = json.loads((CASES / "kto_llamafactory.json").read_text())
    assert any("label" in f.problem for f in check(kto).findings if f.code == "ignored")
    assert any(
        "weight" in f.problem for f in check(CASES / "row_weight.jsonl").findings if f.code == "ignored"
    )
    assert any("content stands twice" in f.problem for f in check(CASES / "dup_keys.jsonl").findings)
    special = check(CASES / "special_texts.jsonl")
    assert {f.line for f in special.findings if f.code == "special-text"} == set(range(1, 14))
    assert (
        check(
            [
                {
                    "messages": [
                        {"role": "user", "content": "Dear {{name}}"},
                        {"role": "assistant", "content": "Hm"},
                    ]
                }
            ]
        ).counts["special-text"]
        == 1
    )


def test_check_counts_beginnings():
    "A file and a run count the same tokens of tool conversations"
    report = check(CASES / "content_and_call.jsonl", "v7")
    row = parse_row(json.loads((CASES / "content_and_call.jsonl").read_text()), version="v7")
    assert sum(d.tokens for d in report.data()) == sum(
        len(s) for s in encode_with_prefixes(row, load_tokenizer("v7"))
    )


def test_empty_is_not_full(tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    assert "% full" not in str(check(tmp_path / "none.jsonl")) and "Nothing to train on" in str(
        check(tmp_path / "none.jsonl")
    )


def test_refused_as_by_the_reference():
    "tools that are 0, content that is an empty list"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in (
        {"messages": messages, "tools": 0}, {"messages": [{"role": "user", "content": []}, messages[1]]},
        {"messages": [messages[0], {"role": "assistant", "content": []}]},
    ):
        with pytest.raises(SampleError): encode_with_prefixes(parse_row(row), load_tokenizer("v3"))


def test_guess_says_one_document():
    assert "one document" in str(guess_format(CASES / "two_docs.txt"))
    assert [r for _, r in read_rows(CASES / "two_docs.txt")] == [
        {"text": "First document on one line.\nSecond document on one line.\n"}
    ]


# more of the same kinds, found by trying

QA = {"question": "How deep?", "answer": "Nine."}
FILES = {  # name, bytes: rows kept, rows refused, words
    "latin1.json": ('[{"question":"é","answer":"b"}]'.encode("latin-1"), 0, 1, ["not UTF-8"]),
    "header.csv": ("question,r\u00e9ponse,answer\na,b,c\n".encode("latin-1"), 0, 1, ["not UTF-8"]),
    "utf16 without a mark.jsonl": (
        json.dumps(QA).encode("utf-16-le"), 0, 1, ["UTF-16 without a byte order mark"],
    ),
    "rows with a role.json": (
        b'[{"conversation_id":1,"role":"user","content":"a"},{"conversation_id":1,"role":"assistant","content":"b"}]',
        0, 2, ["one message of a conversation"],
    ),
    "rows with an author.json": (
        b'[{"author":"Ann","instruction":"q","output":"a"},{"author":"Bob","instruction":"q","output":"a"}]',
        2, 0, ["column author"],
    ),
    "split.json": (
        b'{"columns":["question","answer"],"index":["x","y"],"data":[["a","b"],["c","d"]]}', 2, 0,
        ["by columns", "column index"],
    ),
    "index.json": (
        b'{"0":{"question":"a","answer":"b"},"1":{"question":"c","answer":"d"}}', 2, 0, ["by columns"],
    ),
    "comma and null.jsonl": (b'{"question":"a","answer":"b","x":null,}\n', 1, 0, ["column x left out: null"]),
    "twice in Python.jsonl": (
        b"{'question': 'a', 'answer': 'b', 'answer': 'c'}\n", 1, 0, ["answer stands twice"],
    ),
    "twice in a cell.jsonl": (
        json.dumps(
            {"messages": '[{"role":"user","content":"a"},{"role":"assistant","content":"b","content":"c"}]'}
        ).encode(),
        1,
        0,
        ["content stands twice"],
    ),
    "a list in text.txt": (json.dumps([QA, QA], indent=1).encode(), 2, 0, ["JSON in a text file"]),
    "excel.csv": (b"sep=;\nquestion;answer\na;b\n", 1, 0, ["parted by semicolons"]),
    "spaces.csv": (b'question, answer\n"Where?", "There, that is."\n', 1, 0, ["spaces"]),
    "a brace too few.jsonl": (
        b'{"question":"a","x":{"answer":"b"}\n'
        + json.dumps(QA).encode()
        + b"\n"
        + json.dumps(QA).encode()
        + b"\n",
        2,
        1,
        ["not JSON"],
    ),
    "a comma too few.jsonl": (
        b"[\n" + json.dumps(QA).encode() + b"\n" + json.dumps(QA).encode() + b"\n]\n", 2, 0, [],
    ),
    "empty lists.jsonl": (b"[]\n" + json.dumps(QA).encode() + b"\n[[]]\n", 1, 2, ["an empty list"]),
    "escaped quotes, cut.jsonl": (
        b'{"text": "' + b'\\"' * 40_000 + b"\n" + json.dumps(QA).encode() + b"\n", 1, 1, ["not JSON"],
    ),
    "many on a line.jsonl": (json.dumps(QA).encode() * 20_000, 20_000, 0, []),
}
ROWS = {  # a row: kept, the contents or words
    "a user's name": (dict(QA, user="u_1"), True, "column user left out"),
    "twelve options": (dict(QA, options=[f"o{i}" for i in range(12)]), True, "L. o11"),
    "the number of an option": (
        {"question": "Port?", "choices": ["Bern", "Brest"], "answer": 1}, True, "written as its letter",
    ),
    "CAMEL": (
        {"role_1": "a", "topic;": "b", "message_1": "c", "message_2": "d", "instruction": "q", "output": "a"},
        True, "column message_1",
    ),
    "incorrect_answer": (dict(QA, incorrect_answer="b"), False, "preference pair"),
    "generations": ({"instruction": "p", "generations": ["a", "b"], "output": "a"}, False, "preference pair"),
    "ChatML under content": (
        {"content": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>"}, True,
        "read from ChatML",
    ),
    "a play": (
        {"text": "User: admin\nSystem: up\nAssistant: manager\nHost: a"}, True,
        "Human and Assistant markup kept",
    ),
    "words between": (
        {"text": "<|im_start|>user\nHi<|im_end|>\nStray.\n<|im_start|>assistant\nHo<|im_end|>"}, False,
        "words between its messages",
    ),
    "guanaco": ({"text": "### Human: Hi### Assistant: Hello"}, True, "read from Human and Assistant"),
    "ReAct": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "Thought: x\nAction: f"},
                {"role": "function", "content": "1"}, {"role": "assistant", "content": "b"},
            ]
        },
        False,
        "the calls stand in the text",
    ),
    "others' settings": (
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "settings": {"temperature": 1},
        },
        True,
        "column settings",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_more_files(name, tmp_path):
    data, kept, refused, words = FILES[name]
    (tmp_path / name).write_bytes(data)
    began = time.process_time()
    try: done = convert(tmp_path / name)
    except UnknownFormatError as e: found = (0, refused, str(e))
    else:
        found = (done.kept, len(done.refused), "\n".join([*done.notes, *(r["reason"] for r in done.refused)]))
    assert found[:2] == (kept, refused) and not [w for w in words if w not in found[2]], found
    assert time.process_time() - began < 10


@pytest.mark.parametrize("name", ROWS)
def test_more_rows(name):
    row, kept, word = ROWS[name]
    done = convert([row])
    assert (done.kept == 1) == kept and word in json.dumps(
        [done.notes, done.rows, [r["reason"] for r in done.refused]], ensure_ascii=False
    )


def test_more_tables():
    "Bytes, named indexes, whole numbers beside an empty cell"
    table = pa.table({"question": [b"Where?", b"\xff"], "answer": ["There.", "Here."]})
    done = convert(table)
    assert contents(done.rows[0])[0] == "Where?" and "no UTF-8" in done.refused[0]["reason"]
    frame = pd.DataFrame([dict(QA, context="The quay.")]).set_index("context")
    assert contents(convert(frame).rows[0])[0] == "The quay.\n\nHow deep?"
    numbers = pd.DataFrame({"question": ["2+2?", "?"], "answer": [4, None]})
    assert contents(convert(numbers).rows[0])[1] == "4"


def test_out_in_its_own_source(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(QA) + "\n")
    with pytest.raises(ValueError, match="would be read as data the next time"):
        convert(tmp_path, to=tmp_path / "out.jsonl")


def test_eval_files_are_left_out(tmp_path):
    for name in ("chats.jsonl", "test.jsonl", "validationset.jsonl", "hold-out.jsonl"):
        (tmp_path / name).write_text(json.dumps(QA) + "\n")
    done = convert(tmp_path)
    assert done.kept == 1 and sum("not for training" in n for n in done.notes) == 1


def test_schemas_of_other_programs():
    "References, alternatives and other names of types"
    schema = {
        "type": "OBJECT",
        "properties": {
            "w": {"$ref": "#/$defs/W"},
            "p": {"type": "List[str]"},
            "q": {"type": "STRING", "required": True},
        },
        "$defs": {"W": {"type": ["string", "null"]}},
    }
    row = tool_row("f", {"w": None, "q": None}, {}, [])
    row["tools"][0]["function"]["parameters"] = schema
    done = convert([row])
    assert json.loads(done.rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"w": None}
    assert done.rows[0]["tools"][0]["function"]["parameters"]["type"] == "object"


def test_results_by_name():
    calls = [{"function": {"name": n, "arguments": {}}} for n in ("fa", "fb")]
    messages = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "name": "fb", "content": "RB"}, {"role": "tool", "name": "fa", "content": "RA"},
        {"role": "assistant", "content": "b"},
    ]
    made = convert([{"messages": messages}]).rows[0]["messages"]
    ids = {c["function"]["name"]: c["id"] for c in made[1]["tool_calls"]}
    assert {m["tool_call_id"]: m["content"] for m in made[2:4]} == {ids["fa"]: "RA", ids["fb"]: "RB"}
