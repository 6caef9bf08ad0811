"""What notebooks show of a hostile data set, loaded by a real browser: nothing of it runs, and the page
stays usable."""
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from mistral_nb.core.settings import DataArgs
from mistral_nb.core.settings import TrainArgs
from mistral_nb.core.display import Table
from mistral_nb.core.display import reveal_hidden
from mistral_nb.data.sources import Source
from mistral_nb.data.batches import eval_batches
from mistral_nb.data.sources import tokenize_source
from mistral_nb.data.check import check
from mistral_nb.data.convert import convert
from mistral_nb.data.rows import write_rows
from mistral_nb.data.tokens import load_tokenizer
from mistral_nb.data.view import KIND_STYLES
from mistral_nb.data.view import show

CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROME is None, reason="no chromium, chromium-browser or google-chrome is installed"
)

MARKUP = [  # must be shown to the letter
    "<script>hack(1)</script>",
    "<ScRiPt src=/leak.js></sCrIpT>",
    "<img src=/leak.png onerror=hack(2)>",
    "<body onload=hack(3)>",
    '" onmouseover="hack(4)" x="',
    "' onfocus='hack(5)' autofocus='",
    '"><b onclick=hack(6)>',
    "<a href=javascript:hack(7)>go</a>",
    "<iframe src=javascript:top.hack(8)></iframe>",
    "<iframe srcdoc='<script>top.hack(9)</script>'></iframe>",
    "<svg onload=hack(10)>",
    "<svg><animate onbegin=hack(11) attributeName=x>",
    "</style><style>*{background:url(/leak.css)}</style>",
    "</div></td></table></span>",
    "<!-- comment --><!--",
    "--><script>hack(12)</script>",
    "]]><![CDATA[",
    "&lt;script&gt;hack(13)&lt;/script&gt;",
    "&#60;img src=/leak&#62; &amp; &nbsp;",
    "${hack(14)} `${hack(15)}`",
    "{{hack(16)}} <%= hack(17) %>",
    "<textarea><plaintext><noscript>",
    "<meta http-equiv=refresh content=0;url=/leak>",
    "<base href=//leak.invalid>",
    "<link rel=stylesheet href=/leak.css>",
    "<form action=/leak><input onfocus=hack(18) autofocus>",
    "<object data=/leak></object><embed src=/leak>",
    "<details open ontoggle=hack(19)>",
    "<math><mtext></mtext><mglyph><style><img src onerror=hack(20)>",
    "$x^2$ $$y$$ \\(a\\) \\[b\\] \\begin{equation}",
    "[click](javascript:hack(21)) **bold** # title",
]
HIDDEN = [
    "\u202edlrow\u202c", "\u2066isolate\u2069", "zero\u200bwidth\u200djoin\ufeff",
    "nul\x00bell\x07esc\x1b[31m\x7f\x85", "\u2028line\u2029", "tab\there\rback\u200f",
]
MARKS = ["\u0301e\u0301\u0323\u0489" + "\u0300" * 60, "ﷺ" * 20, "👩‍👩‍👧🏳️‍🌈", "العربية עברית", "W" * 3000]
EVIL, LONE = "\n".join(MARKUP + HIDDEN + MARKS), "half \ud800 and \udfff"
BAD = MARKUP[2] + MARKUP[4]
ALLOWED = {"DIV", "SPAN", "TABLE", "TBODY", "TR", "TD", "TH", "B", "I", "IMG"}
WIDTHS, THEMES = (320, 1280), {"light": ("#ffffff", "rgba(0,0,0,.87)"), "dark": ("#111111", "#ffffff")}
PAGES = (
    "row-v3", "row-v3-tekken", "blob-v3", "blob-v3-tekken", "lines", "batch", "gallery", "report",
    "report-run", "findings", "converted", "table",
)


def user(text, **more):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text, **more}]}


def tool_row(name="get", id="abcdefghi", text="fine"):
    "A conversation with a call"
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps({text: text})}}
    schema = {"type": "object", "properties": {text: {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": name, "description": text, "parameters": schema}}]
    asked, answer = user(text)["messages"]
    return {
        "messages": [
            asked, dict(role="assistant", content="", tool_calls=[call]),
            dict(role="tool", content=text, tool_call_id=id), answer,
        ],
        "tools": tools,
    }


def bad_lines():
    "Lines of JSON that training refuses, most of them quoting something hostile"
    def said(role, content): return {"messages": [{"role": role, "content": content}]}
    call = {"id": BAD, "function": {"name": BAD, "arguments": {BAD: 1}}}
    rows = [
        said(BAD, "x"), {BAD: 1}, {"messages": BAD}, [BAD], tool_row(name=BAD), tool_row(id=BAD),
        said("user", {BAD: BAD}), user("x", weight=BAD),
    ]
    rows += [
        user("x", tool_calls=BAD), user("x", tool_calls=[call]),
        *({**user("x"), key: {BAD: 1}} for key in ("tools", "only_last", "system_prompt")),
    ]
    rows += [
        {"conversations": [{"from": "human", "value": t}, {"from": "gpt", "value": t}]} for t in MARKUP
    ]  # can be repaired
    rows += [
        {"instruction": BAD, "output": LONE}, {"prompt": BAD, "completion": ""}, {"W" * 5000: "W" * 5000},
    ]
    return [json.dumps(r).encode() for r in rows] + [
        f"{BAD}\n{MARKUP[0]}".encode(), f"{user(MARKUP[0])},".encode(), b'{"text": "\xff<script>"}', b"",
    ]


def write_files(folder):
    "A folder of files with hostile names, whose short path reads as a script; returns the folder"
    inner = folder / "data" / "<script>hack(30)<"
    inner.mkdir(parents=True)
    good = b"".join(
        json.dumps(r).encode() + b"\n" for r in (user(EVIL), tool_row(text=BAD), user(EVIL), user("short"))
    )
    (inner / "script>.jsonl").write_bytes(b"\n".join(bad_lines()) + b"\n" + good)
    (inner / "\" onmouseover='hack(31)' \u202e\n<img src=x onerror=hack(32)>.jsonl").write_bytes(good)
    return folder / "data"


def batch_of(folder, tokenizer):
    "A packed batch of several hostile samples, with padding"
    write_rows([user(EVIL + f"\n{k}") for k in range(3)] + [user("short")], folder / "pack.jsonl")
    return next(eval_batches([tokenize_source(Source(folder / "pack.jsonl"), tokenizer)], 2 ** 15))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "What is shown, by the name of its page"
    folder, v3, tekken = tmp_path_factory.mktemp("web"), load_tokenizer("v3"), load_tokenizer("v3-tekken")
    files, blob = write_files(folder), "<Aa1\"'&" * (200_000 // 7)
    args = TrainArgs(DataArgs(instruct_data=str(files), cache="none"), "v3")
    rows = [json.loads(line) for line in bad_lines()[:-4]] + [user(EVIL)]
    shown = {
        "row-v3": show(user(EVIL), v3, limit=10**5),
        "row-v3-tekken": show(user(EVIL + LONE), tekken, limit=10**5),
    }
    shown |= {
        "blob-v3": show(user(blob), v3), "blob-v3-tekken": show(user(blob), tekken),
        "lines": show(user("\n" * 3000), v3),
    }
    batch = batch_of(folder, v3)
    shown |= {
        "batch": show(batch, v3, limit=10**6), "gallery": show(args, n=100),
        "report": check(files, workers=1), "report-run": check(args, workers=1),
    }
    shown["findings"] = shown["report"].findings_table("no-data", n=1000)
    named = [{**user("x"), text: 1} for text in MARKUP]  # notes name the columns that are left out
    shown["converted"] = convert([r for r in rows if isinstance(r, dict)] + named, format="openai")
    shown["table"] = Table([BAD, EVIL], [(EVIL, 1), (BAD, 2.5), ("W" * 5000, None)], title=EVIL)
    return SimpleNamespace(shown=shown, batch=batch, html={k: v._repr_html_() for k, v in shown.items()})


CHECKS = """
const linear = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4
const lum = c => { const [r, g, b] = c.map(linear); return .2126 * r + .7152 * g + .0722 * b }
const rgba = t => { const p = t.match(/[\\d.]+/g).map(Number); return p.length < 4 ? [...p, 1] : p }
const over = (top, a, low) => low.map((v, i) => top[i] * a + v * (1 - a))
function contrast(el, win) {  // of the text of el, all backgrounds and opacities up to the body
    const text = rgba(win.getComputedStyle(el).color), chain = []
    const page = rgba(win.getComputedStyle(win.document.body).backgroundColor).slice(0, 3)
    for (let e = el; e !== win.document.body; e = e.parentElement) chain.unshift(win.getComputedStyle(e))
    const paint = (styles, under, ink) => {
        if (!styles.length) return ink ? over(text, text[3], under) : under
        const [s, ...rest] = styles, back = rgba(s.backgroundColor)
        return over(paint(rest, over(back, back[3], under), ink), +s.opacity, under)
    }
    const [a, b] = [lum(paint(chain, page, true)), lum(paint(chain, page, false))]
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
}
async function look(name, width, theme) {
    const made = Object.assign(document.createElement('iframe'), {width, height: 600})
    const frame = document.body.appendChild(made)
    const begin = performance.now()
    await new Promise(done => { frame.onload = done; frame.src = `/page/${name}/${theme}` })
    const win = frame.contentWindow, doc = win.document, out = doc.getElementById('out')
    const found = {scroll: doc.documentElement.scrollWidth, inner: win.innerWidth}
    Object.assign(found, {ms: performance.now() - begin, height: out.offsetHeight})
    const all = [...out.querySelectorAll('*')]
    for (const e of all.slice(0, 3000)) for (const kind of ['mouseover', 'click', 'focus'])
        e.dispatchEvent(new win.Event(kind, {bubbles: false}))
    found.names = [...new Set(all.map(e => e.tagName))]
    found.attributes = [...new Set(all.flatMap(e => e.getAttributeNames()))]
    found.sources = [...new Set(all.flatMap(e => e.getAttribute('src') || []))].map(s => s.slice(0, 22))
    found.styles = [...new Set(all.flatMap(e => e.getAttribute('style') || []))]
    found.outside = [...doc.body.children].map(e => e.tagName + e.id)
    found.comments = doc.createTreeWalker(doc, NodeFilter.SHOW_COMMENT).nextNode() !== null
    found.resources = win.performance.getEntriesByType('resource').map(e => e.name)
    found.text = out.textContent
    const texts = doc.createTreeWalker(out, NodeFilter.SHOW_TEXT)
    const ignored = node => node.parentElement.closest('.mathjax_ignore')
    for (found.typeset = ''; texts.nextNode();)
        if (!ignored(texts.currentNode)) found.typeset += texts.currentNode.data
    const raw = await (await fetch('/raw/' + name)).text(), box = doc.createElement('div')
    box.id = 'out'
    box.innerHTML = raw
    found.same = box.isEqualNode(out)
    const ink = win.getComputedStyle(doc.body).color
    found.inherits = all.filter(e => e.textContent).every(e => win.getComputedStyle(e).color === ink)
    found.kinds = {}, found.contrast = {}
    for (const [kind, style] of Object.entries(STYLE)) {
        const runs = all.filter(e => e.getAttribute('style') === style)
        found.kinds[kind] = runs.reduce((n, e) => n + e.querySelectorAll(':scope > span[title]').length, 0)
        if (runs.length) found.contrast[kind] = contrast(runs[0].firstElementChild || runs[0], win)
    }
    await new Promise(done => setTimeout(done, 20))  // error events of images and the like
    found.hacked = top.hacked.splice(0)
    frame.remove()
    return found
}
async function widths() {  // of table cells
    const box = document.body.appendChild(document.createElement('div'))
    box.innerHTML = await (await fetch('/raw/chars')).text()
    const range = document.createRange()
    const width = td => { range.selectNodeContents(td); return range.getBoundingClientRect().width }
    return [...box.querySelectorAll('td')].map(width)
}
async function main() {
    const out = {}
    for (const name of NAMES) for (const theme of THEMES) for (const width of WIDTHS) {
        try { out[`${name} ${theme} ${width}`] = await look(name, width, theme) }
        catch (e) { out[`${name} ${theme} ${width}`] = {error: String(e), hacked: top.hacked.splice(0)} }
    }
    out.widths = await widths()
    await fetch('/result', {method: 'POST', body: JSON.stringify(out)})
}
main()
"""


def page(html, theme):
    "A document around what is shown; without any protection, on purpose"
    back, ink = THEMES[theme]
    dialogs = "for (const k of ['alert', 'confirm', 'prompt', 'open', 'print']) window[k] = () => hack(k)"
    head = f"<meta charset=utf-8><script>window.hack = n => top.hacked.push(n); {dialogs}</script>"
    style = f"body{{margin:8px;background:{back};color:{ink};font-family:sans-serif;font-size:14px}}"
    return f'<!doctype html>{head}<style>{style}</style><body><div id="out">{html}</div></body>'


def driver(names):
    "The document that loads all others in frames and reports"
    facts = "".join(
        f"const {k} = {json.dumps(v)};"
        for k, v in dict(STYLE=KIND_STYLES, NAMES=names, THEMES=list(THEMES), WIDTHS=WIDTHS).items()
    )
    hack = "window.hacked = []; window.hack = n => hacked.push(n);"
    return f"<!doctype html><meta charset=utf-8><body><script>{hack}{facts}{CHECKS}</script></body>"


def browse(html, seconds=60):
    "`(what the pages are like, requests that no page of ours made)` of documents by name"
    asked, result, done = [], [], threading.Event()
    chars = Table(["x"], [("||",), *((f"|{chr(c)}|",) for c in UNSEEN)])._repr_html_()

    class Handler(BaseHTTPRequestHandler):
        "Serves the pages and notes all that is asked for"
        def do_GET(self):
            parts = self.path.split("/")[1:]
            known = {
                "": lambda: driver(list(html)), "page": lambda: page(html[parts[1]], parts[2]),
                "raw": lambda: {**html, "chars": chars}[parts[1]],
            }
            if parts[0] not in known and parts[0] != "favicon.ico": asked.append(self.path)
            self.answer(known[parts[0]]() if parts[0] in known else "")

        def do_POST(self):
            result.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer("")
            done.set()

        def answer(self, text):
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args): pass

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--hide-scrollbars",
        ]
        command = [
            CHROME, *flags, f"--user-data-dir={profile}", "--window-size=1400,900",
            f"http://127.0.0.1:{server.server_port}/",
        ]
        chrome = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try: assert done.wait(seconds), f"no answer from {CHROME} in {seconds} s"
        finally:
            os.killpg(chrome.pid, signal.SIGKILL)
            chrome.wait()
            server.shutdown()
            time.sleep(0.2)  # its children are still writing into the profile
    return json.loads(result[0]), asked


UNSEEN = [
    *range(0x20), 0x7F, 0x85, 0xAD, 0x34F, 0x61C, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810),
    *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0x3164,
]
UNSEEN += [
    *range(0xFE00, 0xFE0E), 0xFEFF, 0xFFA0, *range(0xFFF0, 0xFFFC), 0x1BCA0, *range(0x1D173, 0x1D17B),
    0xE0001, *range(0xE0020, 0xE0080), 0xE0100, 0xE01EF,
]
VIEWS = [(n, t, w) for n in PAGES for t in THEMES for w in WIDTHS]


@pytest.fixture(scope="module")
def seen(made):
    "What the browser makes of all pages, loaded once"
    found, asked = browse(made.html)
    return SimpleNamespace(
        asked=asked, at=lambda name, theme="light", width=1280: found[f"{name} {theme} {width}"],
        widths=found["widths"],
    )


def test_the_test_sees():
    "The same payloads without escaping run, ask for files and make elements: the checks find them"
    grey = f'<div style="{KIND_STYLES["prompt"]}"><span title="x" style="color:#888">t</span></div>'
    found, asked = browse({"raw": "".join(MARKUP[:12]), "wide": "W" * 3000, "grey": grey})
    raw = found["raw light 1280"]
    assert {1, 2, 10} <= set(raw["hacked"]) and {"/leak.js", "/leak.png"} <= set(asked)
    assert {"SCRIPT", "IMG", "A"} <= set(raw["names"]) and "onerror" in raw["attributes"]
    assert found["wide light 320"]["scroll"] > 400
    assert found["grey light 320"]["contrast"]["prompt"] < 3 and not found["grey light 320"]["inherits"]


@pytest.mark.parametrize("name,theme,width", VIEWS)
def test_nothing_runs(seen, name, theme, width):
    "No payload has an effect, and there are only the elements and attributes that we write"
    found = seen.at(name, theme, width)
    assert "error" not in found, found
    assert found["hacked"] == [] and found["resources"] == [] and not found["comments"]
    assert set(found["names"]) <= ALLOWED and found["outside"] == ["DIVout"]
    assert set(found["attributes"]) <= {"style", "title", "class", "src", "alt"}
    assert set(found["sources"]) <= {"data:image/png;base64,"} and (
        "IMG" in found["names"]
    ) == name.startswith("report")
    assert not any(
        bad in s.lower() for s in found["styles"] for bad in ("url(", "expression", "position", "import")
    )
    assert found["same"], "innerHTML reads it otherwise than a document"


def test_no_request(seen):
    "The browser asks for nothing that a data set names"
    assert seen.asked == []


@pytest.mark.parametrize("name", ["row-v3", "row-v3-tekken", "batch", "table", "gallery"])
def test_text_to_the_letter(seen, name):
    "Markup is read as it stands in the data, also what looks like an escape"
    text = seen.at(name)["text"]
    assert [m for m in MARKUP if m not in text] == []


def test_hidden_characters(seen, made):
    "Direction marks, control characters and halves of characters are spelled out"
    for name in ("row-v3", "row-v3-tekken", "batch", "table", "gallery", "report", "converted"):
        assert [
            c for c in seen.at(name)["text"] if c not in "\n\t" and reveal_hidden("x" + c) != "x" + c
        ] == [], name
    for mark in ("⟨U+202E⟩", "⟨U+2066⟩", "⟨U+200B⟩", "⟨U+0000⟩", "⟨U+001B⟩"):
        assert mark in seen.at("table")["text"]


@pytest.mark.parametrize("name", ["row-v3", "row-v3-tekken"])
def test_characters_of_several_tokens(seen, name):
    "A character that is several tokens can be read, or its number if it would not show"
    assert [t for t in ("👩", "🌈", "ﷺ", "⟨U+202E⟩") if t not in seen.at(name)["text"]] == []


@pytest.mark.parametrize("name", PAGES)
def test_no_formulas(seen, name):
    "MathJax is told to leave alone all that comes from a data set"
    assert "hack(" not in seen.at(name)["typeset"]


def test_formula_in_file_name(tmp_path):
    "A report shows itself whatever its file is called"
    write_rows([user("x")], tmp_path / "a$\\frac{$.jsonl")
    assert "\\frac" in check(tmp_path / "a$\\frac{$.jsonl", workers=1)._repr_html_()


def test_names_and_findings(seen, made):
    "File names, roles, keys and repairs quote the data set"
    for name in ("gallery", "report", "report-run", "findings"):
        assert "<script>hack(30)</script>.jsonl" in seen.at(name)["text"]
    assert (
        "hack(32)" in seen.at("report")["text"]
        and "the role is '<img src=/leak.png onerror" in seen.at("gallery")["text"]
    )
    assert "onmouseover" in seen.at("converted")["text"] and "<script>hack(1)" in seen.at("converted")["text"]
    repairs = [(f.before, f.after) for f in made.shown["report"].findings if f.before and f.code == "no-data"]
    assert sum("hack(" in b and "hack(" in a for b, a in repairs) > 5
    assert all(reveal_hidden(t) in seen.at("findings")["text"] for pair in repairs for t in pair)


def test_unseen_characters(seen):
    "No character between two letters goes unseen in a table"
    bare, *taken = seen.widths
    assert len(taken) == len(UNSEEN) and [f"U+{c:04X}" for c, w in zip(UNSEEN, taken) if w <= bare] == []


def test_trained_elements(seen, made):
    "As many tokens look trained as the mask says"
    kinds = seen.at("batch")["kinds"]
    assert made.batch.mask.sum() > 100 and len(made.batch.seqlens) > 3 and made.batch.padding
    assert kinds["trained"] + kinds["stop"] == made.batch.mask.sum() and kinds["padding"] == 0
    assert kinds == {k: made.shown["batch"].kinds.count(k) if k != "padding" else 0 for k in KIND_STYLES}


@pytest.mark.parametrize("name,theme,width", [v for v in VIEWS if v[1] == "light"])
def test_fits_the_window(seen, name, theme, width):
    "The page is not wider than the window; tables scroll in their own box"
    found = seen.at(name, theme, width)
    assert found["scroll"] <= found["inner"] + 2, f"{found['scroll']} px in a window of {found['inner']}"


@pytest.mark.parametrize("name", ["row-v3", "blob-v3", "blob-v3-tekken", "lines", "batch"])
def test_scrolls(seen, name):
    "A view takes no more than a screen, however much there is to show"
    assert seen.at(name)["height"] < 500 and seen.at(name, width=320)["height"] < 600


@pytest.mark.parametrize("name", PAGES)
def test_quick(seen, made, name):
    "Loading and layout take less than five seconds; pages are small"
    assert max(seen.at(n, t, w)["ms"] for n, t, w in VIEWS if n == name) < 5000
    if name.startswith(("blob", "lines")): assert len(made.html[name]) < 1_000_000


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", ["row-v3", "row-v3-tekken", "batch"])
def test_contrast(seen, name, theme):
    "Text takes the page's colour and stays legible on the backgrounds of all kinds but padding"
    found = seen.at(name, theme)
    assert found["inherits"] and not any(
        "color:" in s.replace("background-color:", "") for s in found["styles"]
    )
    assert {k: c for k, c in found["contrast"].items() if c < 4.5 and k != "padding"} == {}
