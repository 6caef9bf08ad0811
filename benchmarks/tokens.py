"""Tokens per CPU second of the data path on generated chats: reading, tokenizing and packing."""
import argparse
import json
import random
import time
from importlib.metadata import version
from statistics import median
from typing import Callable

import numpy as np
from mistral_nb.core.html import Table
from mistral_nb.data.pack import PACKERS, PackCounts
from mistral_nb.data.schema import Where, parse_line
from mistral_nb.data.tokens import TokenSample, Tokenizer, encode, encode_all, load_tokenizer

VERSIONS = ("v3", "v3-tekken")
WORDS = """the of and a to in is it you that was for on are with as his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would other into
has more her two like him see time could no make than first been its who now people my made over did down only way find use
may water long little very after words called just where most know get through back much before go good new write our used me
man too any day same right look think also around another came come work three word must because does part even place well
such here take why things help put years different away again off went old number great tell men say small every found still
between name should home big give air line set own under read last never us left end along while might next sound below saw
something thought both few those always looked show large often together asked house world going want school important until
form food keep children feet land side without boy once animals life enough took sometimes four head above kind began almost
live page got earth need far hand high year mother light parts country father let night following picture being study second
eyes soon times story boys since white days ever paper hard near sentence better best across during today others however sure
means knew try told young miles sun ways thing whole hear example heard several change answer room sea against top turned
learn point city play toward five using himself usually money seen car morning gradient optimizer tokenizer adapter
checkpoint attention embedding function return parameter configuration asynchronous infrastructure approximately
notwithstanding electromagnetic photosynthesis bureaucratic misunderstanding entrepreneurship café naïve Zürich jalapeño Łódź
São señor œuvre größer 東京 日本語 北京 한국어 привет москва γειά δοκιμή שלום مرحبا नमस्ते ∑ √2 → € 🚢 🙂 👩‍🔬""".split()
NAMES = "tide weather route booking invoice stock search translate convert schedule recipe ticket".split()


def text(rng: random.Random, words: int) -> str:
    "Sentences of about `words` words, with numbers and paragraphs here and there."
    out, upper = [], True
    for _ in range(words):
        word = str(rng.randrange(10 ** rng.randint(1, 6))) if rng.random() < 0.02 else WORDS[int(len(WORDS) * rng.random() ** 1.5)]
        out.append(word.capitalize() if upper else word)
        end = rng.random()
        upper = end < 0.08
        out.append(rng.choice(".?!") + ("\n\n" if end < 0.01 else " ") if upper else ", " if end < 0.14 else " ")
    return "".join(out).strip(" ,\n") + "."


def length(rng: random.Random, middle: int) -> int:
    "A length that is often near `middle` and sometimes far above it."
    return int(min(20 * middle, max(3, rng.lognormvariate(0, 0.9) * middle)))


def chat(rng: random.Random) -> dict:
    "One to six questions with answers, some after a system prompt."
    turns = [(role, text(rng, length(rng, n))) for _ in range(rng.randint(1, 6)) for role, n in (("user", 30), ("assistant", 110))]
    messages = [dict(role=role, content=said) for role, said in turns]
    return dict(messages=[dict(role="system", content=text(rng, 25))] * (rng.random() < 0.3) + messages)


def tool(name: str) -> dict:
    "A function with three parameters."
    types = dict(place="string", count="integer", day="string")
    fields = {f"{name}_{k}": dict(type=t, description=f"The {k} of the {name}") for k, t in types.items()}
    parameters = dict(type="object", properties=fields, required=list(fields)[:1])
    return dict(type="function", function=dict(name=name, description=f"Look up the {name} for a place and a day", parameters=parameters))


def tool_chat(rng: random.Random) -> dict:
    "Two to five rounds of question, call, result and answer, with one to four tools."
    names, messages = rng.sample(NAMES, rng.randint(1, 4)), []
    for _ in range(rng.randint(2, 5)):
        call_id, name = "".join(rng.choices("abcdefghijkXYZ0123456789", k=9)), rng.choice(names)
        arguments = json.dumps({f"{name}_place": text(rng, 2), f"{name}_count": rng.randrange(1000)}, ensure_ascii=False)
        messages += [
            dict(role="user", content=text(rng, length(rng, 15))),
            dict(role="assistant", tool_calls=[dict(id=call_id, type="function", function=dict(name=name, arguments=arguments))]),
            dict(role="tool", content=json.dumps({name: text(rng, 6)}, ensure_ascii=False), tool_call_id=call_id),
            dict(role="assistant", content=text(rng, length(rng, 40))),
        ]
    return dict(tools=[tool(n) for n in names], messages=messages)


def lines(make: Callable, n: int, seed: int) -> list[bytes]:
    "`n` different rows as lines of JSON."
    rng = random.Random(seed)
    return [json.dumps(make(rng), ensure_ascii=False).encode() for _ in range(n)]


def read(rows: list[bytes], tokenizer: Tokenizer, make: Callable) -> list[TokenSample]:
    "Lines to token samples, as training reads them; `make` gives the samples of one conversation."
    parsed = (parse_line(row, "instruct", Where("chats.jsonl", n), tokenizer.version) for n, row in enumerate(rows, 1))
    return [s for sample in parsed for s in make(sample, tokenizer)]


def one(sample, tokenizer: Tokenizer) -> list[TokenSample]:
    "A conversation as one sample."
    return [encode(sample, tokenizer)]


def raw(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    "The texts alone through the encoder."
    return [tokenizer.encode_text(t) for t in texts]


def pack(samples: list[TokenSample], packing: str, seq_len: int) -> PackCounts:
    "All rows of the samples, once."
    counts = PackCounts()
    for _ in PACKERS[packing](samples, seq_len, finite=True, counts=counts): pass
    return counts


def ready(lengths: list[int], n: int, seed: int = 0) -> list[TokenSample]:
    "`n` samples with lengths drawn from `lengths`; the first third of each is not trained."
    rng = np.random.RandomState(seed)
    return [TokenSample(rng.randint(3, 32768, k).astype(np.int32), np.arange(k) >= k // 3) for k in rng.choice(lengths, n)]


def measure(cases: dict[str, Callable], batches: list) -> tuple[dict, dict]:
    "CPU seconds and result of each case on each batch, the cases in turn; the first batch is a warm-up and not counted."
    seconds, given = {name: [] for name in cases}, {name: [] for name in cases}
    for i, batch in enumerate(batches):
        for name in list(cases)[:: 1 if i % 2 else -1]:
            began = time.process_time()
            result = cases[name](batch)
            if i: seconds[name].append(time.process_time() - began), given[name].append(result)
    return seconds, given


def tokenizing(n: int, repeat: int) -> tuple[Table, list[int]]:
    "Rates of reading and tokenizing, every batch of other chats, and the lengths of the samples."
    chats, calls = ([lines(make, k, seed) for seed in range(repeat + 1)] for make, k in ((chat, n), (tool_chat, max(1, n // 5))))
    texts = [[m["content"] for row in rows for m in json.loads(row)["messages"]] for rows in chats]
    cases = {}
    for v in VERSIONS:
        tokenizer = load_tokenizer(v)
        cases[f"{v}, json + schema + tokens"] = lambda i, t=tokenizer: [len(s) for s in read(chats[i], t, one)]
        cases[f"{v}, encoder alone"] = lambda i, t=tokenizer: [len(ids) for ids in raw(texts[i], t)]
        cases[f"{v}, function calls, chunks"] = lambda i, t=tokenizer: [len(s) for s in read(calls[i], t, encode_all)]
    seconds, given = measure(cases, range(repeat + 1))
    rates = {name: [sum(g) / s for g, s in zip(given[name], seconds[name])] for name in cases}
    rows = []
    for name, rate in rates.items():
        ceiling, used = rates[f"{name.split(',')[0]}, encoder alone"], calls if "calls" in name else chats
        share = f"{median(a / b for a, b in zip(rate, ceiling)):.2f}" if name.endswith("tokens") else ""
        total, size = sum(map(sum, given[name])), sum(len(b) for b in used[1:])
        rows.append([name, size, sum(map(len, given[name])), total, round(sum(seconds[name]), 2), int(median(rate)), share])
    lengths = [k for g in given["v3, json + schema + tokens"] for k in g]
    return Table(["tokenize", "lines", "samples", "tokens", "CPU s", "tokens/CPU s", "of encoder alone"], rows), lengths


def packing(samples: list[TokenSample], repeat: int) -> Table:
    "Rates and fill of both packers at two lengths."
    total = sum(map(len, samples))
    cases = {f"{p}, {size} positions": lambda _, p=p, size=size: pack(samples, p, size) for size in (4096, 32768) for p in PACKERS}
    seconds, given = measure(cases, range(repeat + 1))
    rows = []
    for name, (c, *_) in given.items():
        cost = median(seconds[name])
        rows.append([name, len(samples), total, c.rows, round(cost, 3), int(total / cost), f"{c.fill:.2%}", c.cut, c.dropped])
    return Table(["pack", "samples", "tokens", "rows", "CPU s", "tokens/CPU s", "fill", "samples cut", "tokens dropped"], rows)


def main() -> None:
    "Measure and print two tables."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=2000, help="chats of one repetition; every repetition has others")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions after a warm-up")
    parser.add_argument("--tiny", action="store_true", help="a quick smoke run")
    options = parser.parse_args()
    n, repeat = (40, 1) if options.tiny else (options.chats, options.repeat)
    print(f"mistral-common {version('mistral-common')}; {repeat} repetitions, each of {n:,} other chats; rates are their medians\n")
    table, lengths = tokenizing(n, repeat)
    print(f"{table}\n\n{packing(ready(lengths, 10 * n), repeat)}")


if __name__ == "__main__": main()
