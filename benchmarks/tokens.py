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
WORDS = """the of and a to in is it you that was for on are with as his they at be this from have or by one had not but what all were when we
there can an your which their said if do will each about how up out them then she many some so these would other into has more her two like him
see time could no make than first been its who now people my made over did down only way find use may water long little very after words called
just where most know get through back much before go good new write our used me man too any day same right look think also around another came
come work three word must because does part even place well such here take why things help put years different away again off went old number
great tell men say small every found still between name should home big give air line set own under read last never us left end along while might
next sound below saw something thought both few those always looked show large often together asked house world going want school important until
form food keep children feet land side without boy once animals life enough took sometimes four head above kind began almost live page got earth
need far hand high year mother light parts country father let night following picture being study second eyes soon times story boys since white
days ever paper hard near sentence better best across during today others however sure means knew try told young miles sun ways thing whole hear
example heard several change answer room sea against top turned learn point city play toward five using himself usually money seen car morning
gradient optimizer tokenizer adapter checkpoint attention embedding function return parameter configuration asynchronous infrastructure
approximately notwithstanding electromagnetic photosynthesis bureaucratic misunderstanding entrepreneurship
café naïve Zürich jalapeño Łódź São señor œuvre größer 東京 日本語 北京 한국어 привет москва γειά δοκιμή שלום مرحبا नमस्ते ∑ √2 → € 🚢 🙂 👩‍🔬""".split()
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
    fields = {f"{name}_{k}": dict(type=t, description=f"The {k} of the {name}") for k, t in (("place", "string"), ("count", "integer"), ("day", "string"))}
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
    return [s for n, row in enumerate(rows, 1) for s in make(parse_line(row, "instruct", Where("chats.jsonl", n), tokenizer.version), tokenizer)]


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


def measure(cases: dict[str, Callable], repeat: int) -> tuple[dict[str, float], dict]:
    "Median CPU seconds of each case, the cases in turn after one warm-up each, and what the cases gave."
    given, seconds = {name: run() for name, run in cases.items()}, {name: [] for name in cases}
    for i in range(repeat):
        for name in list(cases)[:: 1 if i % 2 else -1]:
            began = time.process_time()
            cases[name]()
            seconds[name].append(time.process_time() - began)
    return {name: median(s) for name, s in seconds.items()}, given


def main() -> None:
    "Measure and print two tables."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a quick smoke run")
    options = parser.parse_args()
    n, repeat = (40, 1) if options.tiny else (options.chats, options.repeat)
    chats, calls = lines(chat, n, 1), lines(tool_chat, max(1, n // 5), 2)
    texts = [m["content"] for row in chats for m in json.loads(row)["messages"]]
    cases = {}
    for v in VERSIONS:
        tokenizer = load_tokenizer(v)
        cases[f"{v}, json + schema + tokens"] = lambda t=tokenizer: read(chats, t, one)
        cases[f"{v}, encoder alone"] = lambda t=tokenizer: raw(texts, t)
        cases[f"{v}, function calls, chunks"] = lambda t=tokenizer: read(calls, t, encode_all)
    print(f"mistral-common {version('mistral-common')}; {len(set(chats)):,} different chats of {sum(map(len, chats)):,} bytes and "
          f"{len(set(calls)):,} function-call rows of {sum(map(len, calls)):,} bytes; one thread, median of {repeat}\n")
    cost, given = measure(cases, repeat)
    rows = []
    for name in cases:
        count, ceiling = sum(map(len, given[name])), f"{name.split(',')[0]}, encoder alone"
        share = f"{cost[ceiling] / cost[name]:.2f}" if name.endswith("tokens") else ""
        rows.append([name, len(calls if "calls" in name else chats), len(given[name]), count, f"{cost[name]:.2f}", int(count / cost[name]), share])
    print(Table(["tokenize", "lines", "samples", "tokens", "CPU s", "tokens/CPU s", "speed to encoder alone"], rows))
    samples = ready([len(s) for s in given["v3, json + schema + tokens"]], 10 * n)
    total = sum(map(len, samples))
    cases = {f"{p}, {length} positions": lambda p=p, length=length: pack(samples, p, length) for length in (4096, 32768) for p in PACKERS}
    cost, given = measure(cases, repeat)
    rows = [[k, len(samples), total, c.rows, f"{cost[k]:.3f}", int(total / cost[k]), f"{c.fill:.2%}", c.cut, c.dropped] for k, c in given.items()]
    print()
    print(Table(["pack", "samples", "tokens", "rows", "CPU s", "tokens/CPU s", "fill", "cut", "dropped"], rows))


if __name__ == "__main__": main()
