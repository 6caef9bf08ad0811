"Tokens of files: the exact ids for any string, several processes on one cache, a killed writer, flat memory."
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import mistral_common
import numpy as np
import pytest

from mistral_nb.data.batches import Mixer
from mistral_nb.data.sources import placed_lengths
from mistral_nb.data.sources import Source
from mistral_nb.data.sources import tokenize_source
from mistral_nb.data.batches import train_batches
from mistral_nb.data.cache import cache_table
from mistral_nb.data.cache import tokenize_file
from mistral_nb.data.encoder import text_encoder
from mistral_nb.data.pack import PackCounts
from mistral_nb.data.pack import Packer
from mistral_nb.data.schema import parse_line
from mistral_nb.data.schema import parse_row
from mistral_nb.data.schema import read_lines
from mistral_nb.data.tokens import encode
from mistral_nb.data.tokens import encode_with_prefixes
from mistral_nb.data.tokens import load_tokenizer

WORDS = (
    "the tide comes in twice a day and the moon pulls it along the coast where boats wait for water".split()
)
TOKENIZE = """
import sys, time
from mistral_nb.data import cache
from mistral_nb.data.tokens import load_tokenizer
made, original = [], cache._tokenized
def counted(*a):
    made.append(1)
    print("begins", flush=True)
    yield from original(*a)
cache._tokenized = counted
found = cache.tokenize_file(sys.argv[1], load_tokenizer("v3"), cache=sys.argv[2], workers=int(sys.argv[3]))
print("end", len(made), len(found), int(found.length.sum()), int(found.trained.sum()), flush=True)
"""


CONTROL = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
    "[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] "
    "[/SYSTEM_PROMPT] [TOOL_CONTENT] [CALL_ID] [ARGS] [THINK] [/THINK] [MODEL_SETTINGS] [/MODEL_SETTINGS]"
).split()


def newer_tokenizer(path: Path, version: str):
    """A tokenizer of a version that is not bundled: the first entries of the bundled vocabulary with that
    version's control tokens"""
    spec = json.loads((Path(mistral_common.__file__).parent / "data/tekken_240718.json").read_text())
    spec["special_tokens"] = [dict(rank=i, token_str=n, is_control=True) for i, n in enumerate(CONTROL)]
    spec["config"] |= dict(
        version=version, default_num_special_tokens=100, default_vocab_size=2100, num_vocab_tokens=2000
    )
    spec["vocab"] = spec["vocab"][:2000]
    if version == "v15":
        spec["model_settings_builder"] = {
            "reasoning_effort": {
                "type": "enum", "values": ["none", "high"], "accepts_none": True, "default": "none",
            }
        }
    path.write_text(json.dumps(spec))
    return load_tokenizer(path)


@pytest.mark.parametrize("version", ["v3", "v7", "v11", "v13", "v15"])
def test_rows_of_every_version(tmp_path, version):
    """Plain chats, joined messages, weights and tools: a file's samples are those of the strict path,
    reasons and turns included"""
    tokenizer = (
        load_tokenizer(version)
        if version in ("v3", "v7")
        else newer_tokenizer(tmp_path / "tekken.json", version)
    )
    rng, texts = random.Random(2), list(strings(3000, 2))
    def said():
        return next(
            t
            for t in iter(lambda: rng.choice(texts), None)
            if t.strip() and not any("\ud800" <= c <= "\udfff" for c in t)
        )
    rows = []
    for _ in range(150):
        turns = [
            m
            for _ in range(rng.randint(1, 4))
            for m in ({"role": "user", "content": said()}, {"role": "assistant", "content": said()})
        ]
        if rng.random() < 0.3: turns.insert(0, {"role": "system", "content": said()})
        if rng.random() < 0.2: turns.insert(-2, {"role": "user", "content": said()})
        if rng.random() < 0.2: turns[-1]["weight"] = rng.choice([0, 1])
        rows.append({"messages": turns})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = tokenize_file(file, tokenizer, chunk=True)
    strict = [
        s for row in rows for s in encode_with_prefixes(parse_row(row, version=tokenizer.version), tokenizer)
    ]
    assert [found.sample(i) for i in range(len(found))] == strict
    for i, s in enumerate(strict):
        assert (found.sample(i).why.tolist(), found.turns(i)) == (s.why.tolist(), s.turns)


def chats(path: Path, n: int, words: int = 30, seed: int = 0) -> Path:
    "A file of `n` short conversations"
    rng = random.Random(seed)
    def text(): return " ".join(rng.choices(WORDS, k=words)) + str(rng.randrange(10**6))
    with open(path, "w") as f:
        for _ in range(n):
            f.write(
                json.dumps(
                    {
                        "messages": [
                            {"role": "user", "content": text()}, {"role": "assistant", "content": text()},
                        ]
                    }
                )
                + "\n"
            )
    return path


def start(code: str, env: dict, *args) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=env,
    )


ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    " ",
    "  ",
    "\n",
    "\t\r",
    ".,;:!?'\"-_()[]{}<>/\\|@#$%^&*+=~`",
    "éèàüöäßñçøåæœłőžščřěůđ",
    "абвгдежзийклмнопрстуфхцчшщъыьэюя",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "中文字日本語かなカナ한국어",
    "עבריתعربيไทยहिन्दी",
    "🙂🚢👩‍🔬🏳️‍🌈",
    "\u00a0\u2003\u200b\u200d\u2028\u202e\ufeff\u0301",
    "▁",
    "\x00\x07\x1b\x7f",
    "∑√∞≈→←½²①ﬁ",
]
PIECES = [
    "[INST]", "[/INST]", "[REFERENCE_DOC_19]", "<s>", "</s>", "<0x0A>", "<unk>", "the", " of", "ing",
    "'ll", "   ", "\n\n", "\r\n", "```python\n", "    return ", "https://", "1,234.56", "don't", "\ud83d",
]


def strings(n: int, seed: int):
    "Texts of all kinds: words, code, scripts, noise, now and then half a character"
    rng = random.Random(seed)
    for _ in range(n):
        few = rng.sample(ALPHABETS, rng.randint(1, 4)) + [" "]
        pieces = PIECES if rng.random() < 0.5 else PIECES[:-1]
        yield "".join(
            rng.choice(pieces) if rng.random() < 0.15 else rng.choice(rng.choice(few))
            for _ in range(rng.choice((1, 3, 8, 20, 60)))
        )


@pytest.mark.parametrize("version", ["v1", "v3", "v3-tekken", "v7"])
def test_fuzz(version):
    "Fifty thousand strings: the same ids as mistral-common's, or the same refusal"
    tokenizer = load_tokenizer(version)
    fast, refused = text_encoder(tokenizer), 0
    for text in strings(50_000, 1):
        try: want = tokenizer.base.encode(text, bos=False, eos=False)
        except Exception:
            refused += 1
            with pytest.raises(Exception): fast(text)
            continue
        assert np.frombuffer(fast(text), np.int32).tolist() == want, repr(text)
    assert refused < 15_000


def test_processes_share(tmp_path, shell_env):
    "Three processes want the same file at once: one tokenizes it, the others wait and map its file"
    file = chats(tmp_path / "a.jsonl", 4000)
    runs = [start(TOKENIZE, shell_env, file, tmp_path / "cache", 1) for _ in range(3)]
    ends = [r.communicate(timeout=120)[0].split("\n")[-2] for r in runs]
    assert sorted(e.split()[1] for e in ends) == ["0", "0", "1"]
    assert len({tuple(e.split()[2:]) for e in ends}) == 1 and ends[0].split()[2] == "4000"
    assert len(cache_table(tmp_path / "cache").rows) == 1


def test_script_without_guard(tmp_path, shell_env):
    "Helpers do not run the caller's script again"
    file, script = chats(tmp_path / "a.jsonl", 3000), tmp_path / "script.py"
    script.write_text(TOKENIZE)
    out = subprocess.run(
        [sys.executable, script, file, tmp_path / "cache", "2"], capture_output=True, text=True,
        env=shell_env, timeout=120,
    )
    assert out.stdout.count("begins") == 1 and "end 1 3000" in out.stdout, out.stderr


def helpers_of(mark: str) -> list[int]:
    "Processes whose environment holds `mark`"
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            found += (
                [int(p.name)]
                if mark.encode() in (p / "environ").read_bytes()
                and "Z" not in (p / "stat").read_text().rsplit(")", 1)[1].split()[:1]
                else []
            )
        except OSError: continue
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_writer(tmp_path, shell_env, workers):
    "The writer is killed in the middle: the process that waited makes the cache, and no helper stays behind"
    file, mark = chats(tmp_path / "a.jsonl", 30_000), f"mark-{os.getpid()}-{workers}"
    first = start(TOKENIZE, shell_env | {"MARK": mark}, file, tmp_path / "cache", workers)
    assert first.stdout.readline() == "begins\n"
    second = start(TOKENIZE, shell_env, file, tmp_path / "cache", 1)
    until = time.time() + 60
    while time.time() < until and not any(
        p.stat().st_size > 100_000 for p in (tmp_path / "cache").glob("*.part")
    ):
        time.sleep(0.01)
    assert not list((tmp_path / "cache").glob("*.arrow"))
    first.send_signal(signal.SIGKILL)
    first.wait()
    out = second.communicate(timeout=120)[0].split("\n")
    assert out[0] == "begins" and out[1].split()[:3] == ["end", "1", "30000"]
    until = time.time() + 30
    while time.time() < until and helpers_of(mark): time.sleep(0.2)
    assert not helpers_of(mark)
    found, tokenizer = (
        tokenize_file(file, load_tokenizer("v3"), cache=tmp_path / "cache"), load_tokenizer("v3"),
    )
    for i, (n, line) in enumerate(read_lines(file)):
        if n % 1000 == 0: assert found.sample(i) == encode(parse_line(line), tokenizer)


def test_stale(tmp_path):
    "A file that changes gets new tokens, also within the same second and at the same size"
    tokenizer, file = load_tokenizer("v3"), tmp_path / "a.jsonl"
    for word in ("tide", "moon", "boat", "tide"):
        file.write_text(
            json.dumps(
                {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": word}]}
            )
            + "\n"
        )
        assert tokenizer.decode(
            tokenize_file(file, tokenizer, cache=tmp_path / "cache").sample(0).tokens.tolist()
        ).endswith(word)
    assert len(cache_table(tmp_path / "cache").rows) == 3


PEAK = """
import resource, sys
from mistral_nb.data.cache import tokenize_file
from mistral_nb.data.batches import train_batches
from mistral_nb.data.tokens import load_tokenizer
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = tokenize_file(sys.argv[1], load_tokenizer("v3"), cache=sys.argv[2], workers=1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, len(found))
"""


def test_flat_memory(tmp_path, shell_env):
    "Eight times as many rows take hardly more memory: some numbers a row, no text and no ids"
    peak = []
    for n in (5_000, 40_000):
        out = subprocess.run(
            [sys.executable, "-c", PEAK, chats(tmp_path / f"{n}.jsonl", n), tmp_path / "cache"],
            capture_output=True, text=True, env=shell_env, timeout=300,
        )
        mib, rows = out.stdout.split()
        assert int(rows) == n, out.stderr
        peak.append(float(mib))
    assert peak[1] < peak[0] + 40, peak


def test_tools_and_ranks(tmp_path):
    "Helpers and one process give the same samples of tool conversations; eight ranks see one order of rows"
    tool = {
        "type": "function",
        "function": {
            "name": "tide", "description": "Height",
            "parameters": {"type": "object", "properties": {"hour": {"type": "integer"}}},
        },
    }
    def row(i):
        call = {"id": f"call{i % 7:05d}", "function": {"name": "tide", "arguments": json.dumps({"hour": i})}}
        turn = [
            {"role": "user", "content": f"Tide at {i}?"}, {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": str(i), "tool_call_id": call["id"]},
            {"role": "assistant", "content": f"{i} cm " * (i % 40) + "."},
        ]
        return {"tools": [tool], "messages": turn * (1 + i % 3)}
    file = tmp_path / "tools.jsonl"
    file.write_text("".join(json.dumps(row(i)) + "\n" for i in range(400)))
    tokenizer = load_tokenizer("v3-tekken")
    one, two = (tokenize_file(file, tokenizer, chunk=True, workers=w) for w in (1, 2))
    strict = [s for _, line in read_lines(file) for s in encode_with_prefixes(parse_line(line), tokenizer)]
    assert [one.sample(i) for i in range(len(one))] == [two.sample(i) for i in range(len(two))] == strict
    data = [tokenize_source(Source(file), tokenizer, chunk=True)]
    whole = train_batches(data, 512, 1, seed=3)
    ranks = [train_batches(data, 512, 1, seed=3, rank=r, world_size=8) for r in range(8)]
    for _ in range(5):
        for r in ranks: assert np.array_equal(next(r).x, next(whole).x)


def test_shares():
    """Random sources, weights and policies: each source's share of what is placed is its weight, within 2
    points"""
    class Source:
        def __init__(self, rng):
            n = int(rng.integers(30, 400))
            self.length = np.clip(rng.lognormal(rng.uniform(3, 7), rng.uniform(0.2, 1.5), n), 3, 6000).astype(
                np.int32
            )
            untrained = rng.random(n) < rng.choice([0, 0.3, 0.9])
            self.begin = np.where(
                untrained, self.length,
                np.minimum((self.length * rng.random(n) ** 0.2).astype(int), self.length - 1),
            )
            self.begin[0] = 1
            self.trained, self.turns = self.length - np.maximum(self.begin, 1), lambda i: ()
        def __len__(self): return len(self.length)
        def places(self, numbers):
            return [(None, (np.arange(self.length[i]) >= self.begin[i]).astype(np.uint8), 0) for i in numbers]

    for seed in range(12):
        rng = np.random.default_rng(seed)
        found = [Source(rng) for _ in range(int(rng.integers(2, 5)))]
        weights = rng.uniform(0.2, 5, len(found))
        policy = ["split", "drop", "truncate_left"][seed % 3]
        data = [SimpleNamespace(samples=s) for s in found]
        order = Mixer(
            [placed_lengths(d, 1024, policy) for d in data], weights.tolist(), [True] * len(found), seed
        )
        both = SimpleNamespace(
            length=np.concatenate([s.length for s in found]),
            trained=np.concatenate([s.trained for s in found]), turns=lambda i: (),
        )
        ends = np.cumsum([len(s) for s in found])
        def owner(i): return int(np.searchsorted(ends, i, "right"))
        both.places = lambda numbers: [
            found[owner(i)].places([i - (ends[owner(i)] - len(found[owner(i)]))])[0] for i in numbers
        ]
        placed = np.zeros(len(found))
        for row in islice(Packer(order, both, 1024, policy=policy), 1000):
            for i, first, end, _ in row: placed[owner(i)] += end - first
        assert np.abs(placed / placed.sum() - weights / weights.sum()).max() < 0.02, (
            seed, policy, placed / placed.sum(), weights / weights.sum(),
        )


def test_full_rows():
    """Rows are at least 99 % full at 8192 positions and 99.5 % at 32768, endlessly, and the same for the
    same seed"""
    class Lengths:
        def __init__(self, length): self.length, self.trained, self.turns = length, length // 2, lambda i: ()
    for middle, spread in ((500, 0.9), (1500, 0.7), (120, 1.2)):
        data = Lengths(
            np.clip(np.random.RandomState(0).lognormal(np.log(middle), spread, 20_000), 8, 8000).astype(
                np.int32
            )
        )
        for seq_len, least in ((8192, 0.99), (32768, 0.995)):
            counts, runs = PackCounts(), []
            for _ in range(2):
                counts = PackCounts()
                rows = Packer(Mixer([data.length], [1.0], [True], 5), data, seq_len, counts, seed=5)
                runs.append([next(rows) for _ in range(600)])
            assert counts.fill >= least, (middle, seq_len, counts.fill)
            assert runs[0] == runs[1]
            assert max(sum(e - f for _, f, e, _ in row) for row in runs[0]) <= seq_len
