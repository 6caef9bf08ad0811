"""Fresh text for benchmarks: prose, code, chats, tool conversations; hardly five words in a row come twice.

Words follow Zipf's law over English function words, the words that Mistral's vocabulary holds, in
the order of their frequency, and invented ones, and some are made on the spot: as in real prose,
about four bytes make a token, and neither a cache of words nor one of sentences does better here
than on real data. Everything is a function of its random generator alone."""
import base64
import json
import random
import string
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Callable

import mistral_common

LEXICON = 60_000  # words behind the function words: those of the vocabulary first, then invented ones
NEW, UNICODE, NUMBER = (
    0.03, 0.02, 0.015,
)  # share of running words that are brand-new, not plain English, or numbers

FUNCTION = list(
    dict.fromkeys(
        """the of and to in a is that for it as was with be by on not he his but at are this have from or had
    an they which one you were her all she there would their we him been has when who will more no
    if out so said what up its about into than them can only other new some could time these two may
    then do first any my now such like our over man me even most made after also did many before
    must through back years where much your way well down should because each just those people how
    too little state good very make world still own see men work long get here between both life
    being under never day same another know while last might us great old year off come since
    against go came right used take three states himself few house use during without again place
    around however home small found thought went say part once general high upon school every until
    almost always began often together important since four side feet second enough took head above
    kind page need far began idea story whether several why let night watch seem really hard near
    start plan example answer question please thank yes""".split()
    )
)

SYLLABLES = """al am an ar as at ba bel ber bi bo bra cal can car cen cha che cli co col com con cor cro da
    de del den der di dis do dra el em en er es ex fa fer fi fin flo for fra ga gan ger gi
    gra har hel ho il im in ins jan ju ka ken la lan le lem len li lin lo lu ma man mar me
    mel men mer mi min mis mo mon mor mu na ne ner ni no nor o ob or pa pan par pe pen per
    pi pla po por pre pri pro qua ra ran re ren res ri ro ru sa san sca se sen ser si sil so
    sol spe sta ster stra su sub ta tal tan te tel tem ten ter ti tin to tor tra tran tri tu
    tur u ul un va val ven ver vi vo wa wel wi win""".split()
ENDINGS = """ck d l ld m n nd ne nt p r rd re rk rm rt s se sh st t te th ve x s s ed ed er es ing ing ing ion
    tion al ly ly ist ity ment ness able ous ic ive ation y y e o a""".split()
ACCENTS = str.maketrans("aeiouncs", "áèïôüñçš")
CYRILLIC = "абвгдежзиклмнопрстуфхцчшыюя"
ENDS = "..........??!:"

# ---- words


def made_up(rng: random.Random, syllables: int) -> str:
    "A pronounceable word."
    r = rng.random
    parts = [SYLLABLES[int(r() * len(SYLLABLES))] for _ in range(syllables)]
    return "".join(parts) + ENDINGS[int(r() * len(ENDINGS))]


def vocabulary() -> list[str]:
    "The words of three letters and more that are a token of Mistral's tekken, most frequent first."
    entries = json.loads((Path(mistral_common.__file__).parent / "data/tekken_240718.json").read_text())[
        "vocab"
    ]
    found = (base64.b64decode(e["token_bytes"]) for e in entries)
    return [
        b[1:].decode()
        for b in found
        if len(b) > 3 and b[:1] == b" " and b[1:].isalpha() and b[1:].islower() and b.isascii()
    ]


@lru_cache(maxsize=None)
def lexicon() -> tuple[list[str], list[float], frozenset[str]]:
    """All words by rank, the running sum of their frequencies `1/rank`, and the words as a set; frequent
    words are the short ones."""
    rng, words = random.Random(0), dict.fromkeys([*FUNCTION, *vocabulary()])
    while len(words) < len(FUNCTION) + LEXICON:
        words[
            made_up(
                rng,
                1 + (len(words) > 1_500 * (1 + rng.random())) + (len(words) > 40_000 * (1 + rng.random())),
            )
        ] = None
    return list(words), list(accumulate(1 / r for r in range(1, len(words) + 1))), frozenset(words)


@lru_cache(maxsize=None)
def content_words() -> tuple[list[str], list[float]]:
    "The invented words alone, for names in code and tools."
    words, cum, _ = lexicon()
    return words[len(FUNCTION):], [c - cum[len(FUNCTION) - 1] for c in cum[len(FUNCTION):]]


def new_word(rng: random.Random) -> str:
    "A word that is in no lexicon."
    known = lexicon()[2]
    while (word := made_up(rng, 2 + (rng.random() < 0.5))) in known: pass
    return word


def number(rng: random.Random) -> str:
    "A number as people write it."
    n = rng.randrange(10 ** rng.randint(1, 6))
    return rng.choice((str(n), f"{n:,}", f"{n / 100:.2f}", f"{n % 100}%", str(1900 + n % 130), f"${n}"))


def foreign(rng: random.Random) -> str:
    "A word with accents, in Chinese or Cyrillic letters, or an emoji."
    kind = rng.random()
    if kind < 0.55: return made_up(rng, 2).translate(ACCENTS)
    if kind < 0.70:
        return "".join(chr(0x4E00 + int(0x2000 * rng.random() ** 2)) for _ in range(rng.randint(1, 4)))
    if kind < 0.90: return "".join(rng.choices(CYRILLIC, k=rng.randint(3, 9)))
    return chr(0x1F600 + rng.randrange(80))


def sprinkle(
    rng: random.Random, words: list[str], share: float, make: Callable[[random.Random], str]
) -> None:
    "Replace about `share` of the words by made ones."
    n, extra = divmod(len(words) * share, 1)
    for _ in range(int(n) + (rng.random() < extra)): words[int(rng.random() * len(words))] = make(rng)

# ---- prose


def sentence(rng: random.Random, words: list[str]) -> str:
    "The words as one sentence, with commas and now and then quotes or brackets."
    for i in {int(rng.random() * (len(words) - 1)) for _ in range(len(words) // 9)}: words[i] += ","
    if len(words) > 6 and rng.random() < 0.08:
        at = rng.randrange(1, len(words) - 3)
        mark = rng.choice(('""', "()", "**", "``"))
        words[at], words[at + 2] = mark[0] + words[at], words[at + 2] + mark[1]
    words[0] = words[0][:1].upper() + words[0][1:]
    return " ".join(words) + ENDS[int(rng.random() * len(ENDS))]


def prose(rng: random.Random, words: int) -> str:
    "Sentences of `words` words together, in paragraphs and now and then a list."
    known, cum, _ = lexicon()
    drawn = rng.choices(known, cum_weights=cum, k=max(1, words))
    drawn = [w for w, before in zip(drawn, ["", *drawn]) if w != before]
    for share, make in ((NEW, new_word), (UNICODE, foreign), (NUMBER, number)):
        sprinkle(rng, drawn, share, make)
    out, at, left, bullet = [], 0, rng.randint(2, 7), ""
    while at < len(drawn):
        size = 3 + int(rng.random() * 12 + rng.random() * 12)
        out.append(bullet + sentence(rng, drawn[at : at + size]))
        at, left = at + size, left - 1
        out.append("\n" if bullet and left else "\n\n" if not left else " ")
        if not left: left, bullet = rng.randint(2, 7), "- " if rng.random() < 0.15 else ""
    return "".join(out[:-1])

# ---- code


def word(rng: random.Random) -> str:
    "A word for a name."
    words, cum = content_words()
    return rng.choices(words, cum_weights=cum)[0]


def name(rng: random.Random, camel: bool = False) -> str:
    "A fresh identifier of one to three words."
    words, cum = content_words()
    parts = rng.choices(words, cum_weights=cum, k=1 + int(rng.random() * 3))
    if rng.random() < 0.1: parts.append(str(rng.randrange(100)))
    return parts[0] + "".join(p.capitalize() for p in parts[1:]) if camel else "_".join(parts)


def value(rng: random.Random, names: list[str]) -> str:
    "An expression that Python and JavaScript could share."
    a, b = rng.choices(names, k=2)
    kind = int(rng.random() * 9)
    if kind == 0: return str(rng.randrange(10 ** rng.randint(1, 5)))
    if kind == 1: return f'"{prose(rng, rng.randint(1, 5))[:-1]}"'
    if kind == 2: return f"{a}({b}, {rng.randrange(100)})"
    if kind == 3: return f"{a}.{b}[{rng.randrange(20)}]"
    if kind == 4: return f"({a} {rng.choice('+-*/%')} {b}) * {rng.random():.3f}"
    if kind == 5: return f'{{"{a}": {b}, "{word(rng)}": {rng.randrange(1000)}}}'
    if kind == 6: return f"[{', '.join(str(rng.randrange(1000)) for _ in range(rng.randint(2, 6)))}]"
    if kind == 7: return f"{a}.{b}({word(rng)}={rng.randrange(64)})"
    return a


def python_line(rng: random.Random, names: list[str]) -> tuple[str, int]:
    "A line of Python and how the next one is indented against it."
    a, b, kind = *rng.choices(names, k=2), int(rng.random() * 14)
    if kind == 0:
        return (
            f"def {a}({b}: {rng.choice(('int', 'str', 'list[float]', 'dict'))}, "
            f"{word(rng)}={rng.randrange(10)}):",
            1,
        )
    if kind == 1: return f"if {a} {rng.choice(('==', '<', 'not in', 'is not', '>='))} {value(rng, names)}:", 1
    if kind == 2: return f"for {a} in range({rng.randrange(1000)}):", 1
    if kind == 3: return f"with open({b}) as {a}:", 1
    if kind == 4: return f"return {value(rng, names)}", -1
    if kind == 5: return f"# {prose(rng, rng.randint(4, 12))}", 0
    if kind == 6: return f"from {a} import {b}", 0
    if kind == 7: return f"{a} = [{b} for {b} in {value(rng, names)} if {b} > {rng.randrange(50)}]", 0
    return f"{a} {rng.choice(('=', '=', '=', '+='))} {value(rng, names)}", -(kind == 13)


def script_line(rng: random.Random, names: list[str]) -> tuple[str, int]:
    "A line of JavaScript and how the next one is indented against it."
    a, b, kind = *rng.choices(names, k=2), int(rng.random() * 14)
    if kind == 0: return f"function {a}({b}, {word(rng)}) {{", 1
    if kind == 1: return f"if ({a} {rng.choice(('===', '<', '!==', '>='))} {value(rng, names)}) {{", 1
    if kind == 2: return f"for (let {a} = 0; {a} < {b}.length; {a}++) {{", 1
    if kind == 3: return f"{b}.forEach(({a}) => {a}.{word(rng)}({value(rng, names)}));", 0
    if kind == 4: return f"return {value(rng, names)};", -1
    if kind == 5: return f"// {prose(rng, rng.randint(4, 12))}", 0
    if kind == 6: return f"import {{ {a} }} from './{b}.js';", 0
    if kind == 7: return f"await {a}(`${{{b}}} {prose(rng, 3)}`);", 0
    return f"{rng.choice(('const ', 'let ', ''))}{a} = {value(rng, names)};", -(kind > 11)


def code(rng: random.Random, lines: int, script: bool = False) -> str:
    "Lines of Python, or of JavaScript if `script`, over names that no other code uses."
    names, out, depth = [name(rng, script or rng.random() < 0.15) for _ in range(4 + lines // 4)], [], 0
    for _ in range(lines):
        line, step = (script_line if script else python_line)(rng, names)
        out.append("    " * depth + line)
        if step < 0 and depth and script: out.append("    " * (depth - 1) + "}")
        depth = min(5, max(0, depth + step))
    if script: out += ["    " * d + "}" for d in reversed(range(depth))]
    return "\n".join(out)

# ---- chats


def length(rng: random.Random, median: float, sigma: float, most: int) -> int:
    "A lognormal length, at least 1."
    return min(most, max(1, round(rng.lognormvariate(0, sigma) * median)))


def answer(rng: random.Random) -> str:
    "Prose, with fenced code in every fourth answer."
    text = prose(rng, length(rng, 35, 1.0, 1500))
    if rng.random() >= 0.25: return text
    script = rng.random() < 0.4
    block = f"```{'javascript' if script else 'python'}\n{code(rng, length(rng, 7, 0.7, 120), script)}\n```"
    return f"{text}\n\n{block}" + (
        f"\n\n{prose(rng, length(rng, 20, 0.6, 200))}" if rng.random() < 0.6 else ""
    )


def chat(rng: random.Random) -> dict:
    "A conversation of one to six turns, three in ten with a system message."
    messages = (
        [{"role": "system", "content": prose(rng, length(rng, 20, 0.7, 300))}] if rng.random() < 0.3 else []
    )
    for _ in range(rng.choices(range(1, 7), weights=(34, 24, 16, 12, 8, 6))[0]):
        messages += [
            {"role": "user", "content": prose(rng, length(rng, 12, 0.9, 800))},
            {"role": "assistant", "content": answer(rng)},
        ]
    return {"messages": messages}

def short_chat(rng: random.Random) -> dict:
    "One question and one answer of about a dozen words each, for files of very many rows."
    return {
        "messages": [
            {"role": "user", "content": prose(rng, rng.randint(5, 15))},
            {"role": "assistant", "content": prose(rng, rng.randint(5, 20))},
        ]
    }

# ---- tools


def schema(rng: random.Random) -> dict:
    "A JSON schema of one property."
    kind = rng.choice(("string", "string", "integer", "number", "boolean", "array"))
    out: dict = {"type": kind, "description": prose(rng, rng.randint(4, 14))}
    if kind == "array": out["items"] = {"type": "string"}
    if kind == "string" and rng.random() < 0.25: out["enum"] = [word(rng) for _ in range(rng.randint(2, 4))]
    return out


def tool(rng: random.Random) -> dict:
    "A function with two to five parameters."
    properties = {name(rng): schema(rng) for _ in range(rng.randint(2, 5))}
    parameters = {
        "type": "object", "properties": properties,
        "required": list(properties)[: rng.randint(1, len(properties))],
    }
    camel = rng.random() < 0.3
    return {
        "type": "function",
        "function": {
            "name": name(rng, camel)[:64], "description": prose(rng, rng.randint(8, 25)),
            "parameters": parameters,
        },
    }


def datum(rng: random.Random, kind: str) -> object:
    "A value of a JSON type."
    if kind == "integer": return rng.randrange(10 ** rng.randint(1, 6))
    if kind == "number": return round(rng.random() * 10 ** rng.randint(0, 4), 3)
    if kind == "boolean": return rng.random() < 0.5
    if kind == "array": return [word(rng) for _ in range(rng.randint(1, 3))]
    return prose(rng, rng.randint(1, 6))[:-1]


def arguments(rng: random.Random, function: dict) -> str:
    "JSON text of a call that fits the function's schema."
    wanted = {
        k: p
        for k, p in function["parameters"]["properties"].items()
        if k in function["parameters"]["required"] or rng.random() < 0.5
    }
    return json.dumps(
        {k: rng.choice(p["enum"]) if "enum" in p else datum(rng, p["type"]) for k, p in wanted.items()},
        ensure_ascii=False,
    )


def result(rng: random.Random) -> str:
    "JSON text of what a tool gives back: an object, now and then with a list of objects."
    kinds = {
        name(rng): rng.choice(("string", "string", "integer", "number", "boolean"))
        for _ in range(rng.randint(2, 5))
    }
    def item(): return {k: datum(rng, kind) for k, kind in kinds.items()}
    out = (
        {"results": [item() for _ in range(rng.randint(2, 4))], "total": rng.randrange(100)}
        if rng.random() < 0.25
        else item()
    )
    return json.dumps(out, ensure_ascii=False)


def tool_round(rng: random.Random, functions: list[dict]) -> list[dict]:
    "A question, a call (rarely two), results, and an answer."
    calls, results = [], []
    for _ in range(1 + (rng.random() < 0.12)):
        function, id = rng.choice(functions), "".join(rng.choices(string.ascii_letters + string.digits, k=9))
        calls.append(
            {
                "id": id, "type": "function",
                "function": {"name": function["name"], "arguments": arguments(rng, function)},
            }
        )
        results.append({"role": "tool", "name": function["name"], "tool_call_id": id, "content": result(rng)})
    question = {"role": "user", "content": prose(rng, length(rng, 14, 0.6, 150))}
    call, said = (
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "assistant", "content": prose(rng, length(rng, 28, 0.6, 300))},
    )
    return [question, call, *results, said]


def tool_chat(rng: random.Random) -> dict:
    "A conversation of four to eight rounds with two to six tools."
    tools = [tool(rng) for _ in range(rng.randint(2, 6))]
    functions = [t["function"] for t in tools]
    return {
        "messages": [m for _ in range(rng.randint(4, 8)) for m in tool_round(rng, functions)],
        "tools": tools,
    }

# ---- files


def write_lines(path: str | Path, make: Callable[[random.Random], dict], n: int, seed: int) -> None:
    "Write `n` rows as JSON lines; row `i` depends on `seed` and `i` only."
    with open(path, "w", encoding="utf-8") as f:
        for i in range(n):
            f.write(json.dumps(make(random.Random((seed << 32) + i)), ensure_ascii=False) + "\n")
