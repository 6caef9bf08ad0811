"""The documentation site from notebooks, tutorials and README, without running any of them.

    python tools/docs.py            write _docs/src, build _docs/html with sphinx, check every link
    python tools/docs.py --check    the same in a temporary folder; says only what is wrong
"""
import argparse
import ast
import html
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from configparser import ConfigParser
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_docs"
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+:?)\s*(.*)$")
METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3"},
    "language_info": {"name": "python", "pygments_lexer": "python3"},
}
FINETUNE = set(  # the settings of mistral-finetune; all others are ours
    "data.data data.shuffle data.instruct_data data.eval_instruct_data data.instruct.shuffle "
    "data.instruct.dynamic_chunk_fn_call model_id_or_path run_dir lora.enable lora.rank lora.dropout "
    "lora.scaling optim.lr optim.weight_decay optim.pct_start seed seq_len batch_size "
    "num_microbatches max_norm max_steps log_freq eval_freq no_eval ckpt_freq no_ckpt num_ckpt_keep "
    "save_adapters checkpoint world_size wandb.project wandb.offline wandb.run_name "
    "mlflow.tracking_uri mlflow.experiment_name".split()
)


def settings() -> dict[str, str]:
    "What settings.ini says; the repository's address is one of it."
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(ini["DEFAULT"])


# -- notebooks


@dataclass
class Room:
    "A notebook of the library."
    path: Path

    def __post_init__(self):
        self.cells = json.loads(self.path.read_text(encoding="utf-8"))["cells"]
        title = source(self.cells[0])
        self.module = title.splitlines()[0].removeprefix("# ").replace("\\", "").strip()
        self.sentence = re.search(r"^> (.*)$", title, re.M)[1]
        self.page = str(self.path.relative_to(ROOT / "nbs").with_suffix(""))


def source(cell: dict) -> str: return "".join(cell["source"])


def directives(text: str) -> tuple[set[str], str]:
    "The names of the leading `#|` lines, and the code below them."
    lines, found = text.splitlines(), set()
    while lines and (m := DIRECTIVE.match(lines[0])):
        found.add(m[1].rstrip(":"))
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def is_imports(code: str) -> bool:
    body = ast.parse(code).body
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom, ast.Try)) for n in body)


def markdown(text: str) -> dict: return {"cell_type": "markdown", "metadata": {}, "source": text}


def prose(text: str) -> str:
    "Links as they hold on the site: headings are in lower case there, and the tutorials a folder nearer."
    text = re.sub(r"\]\(#([^)]+)\)", lambda m: f"](#{m[1].lower()})", text)
    return re.sub(r"\]\(\.\./((?:\.\./)*tutorials/)", r"](\1", text)


def anchor(name: str) -> str: return f'<span id="{html.escape(name)}"></span>'


def published(room: Room) -> dict:
    "The notebook as a page: no hidden cells, an anchor for each, behind exported ones what they define."
    cells = []
    for cell in room.cells:
        if cell["cell_type"] != "code":
            cells.append(markdown(prose(source(cell))))
            continue
        found, code = directives(source(cell))
        if {"hide", "default_exp"} & found or not code: continue
        exported = bool({"export", "exporti"} & found)
        tags = ["hide-input"] if exported and is_imports(code) else []
        cells.append(markdown(anchor(cell["id"])))
        cells.append(cell | {"metadata": {"tags": tags}, "source": code})
        blocks = [block(d) for d in definitions(code)] if exported else []
        if blocks: cells.append(markdown("\n\n".join(blocks)))
    return {
        "cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5,
    }


# -- what a cell defines


@dataclass
class Definition:
    "A public function or class, as its source says it."
    name: str
    signature: str
    doc: str
    rows: list[tuple[str, str, str, str]]  # name, type, default, comment


def comments(code: str) -> dict[int, str]:
    "The comment at the end of each line."
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def definitions(code: str) -> list[Definition]:
    "The public functions and classes of a cell."
    notes, out = comments(code), []
    for node in ast.parse(code).body:
        if getattr(node, "name", "_").startswith("_"): continue
        if isinstance(node, ast.FunctionDef):
            out.append(Definition(node.name, signature(node), doc_of(node), arguments(node, notes)))
        elif isinstance(node, ast.ClassDef):
            init = next(
                (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None
            )
            rows = arguments(init, notes)[1:] if init else fields(node, notes)
            out.append(Definition(node.name, f"class {node.name}", doc_of(node), rows + methods(node)))
    return out


def doc_of(node: ast.AST) -> str: return (ast.get_docstring(node) or "").strip()


def signature(node: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def arguments(node: ast.FunctionDef, notes: dict[int, str]) -> list[tuple[str, str, str, str]]:
    "Name, type, default and comment of each argument."
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    pairs = [*zip(plain, defaults)] + ([(a.vararg, None)] if a.vararg else [])
    pairs += [*zip(a.kwonlyargs, a.kw_defaults)] + ([(a.kwarg, None)] if a.kwarg else [])
    multiline = node.args.args and len({x.lineno for x, _ in pairs}) > 1
    return [
        (x.arg, shown(x.annotation), shown(default), notes.get(x.lineno, "") if multiline else "")
        for x, default in pairs
    ]


def fields(node: ast.ClassDef, notes: dict[int, str]) -> list[tuple[str, str, str, str]]:
    "The fields of a dataclass."
    found = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    return [(n.target.id, shown(n.annotation), shown(n.value), notes.get(n.end_lineno, "")) for n in found]


def methods(node: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    "The public methods with a docstring."
    found = [n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
    return [(f"{n.name}()", "", "", doc_of(n).split("\n")[0]) for n in found if doc_of(n)]


def shown(node: ast.AST | None) -> str: return ast.unparse(node) if node else ""


def table(header: list[str], rows: list[tuple]) -> str:
    "A markdown table; its cells are escaped."
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    lines += [" | ".join(cell(c) for c in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def cell(text: str) -> str: return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def code_cell(text: str) -> str: return f"`{text}`" if text else ""


def block(d: Definition, more: str = "") -> str:
    "A definition as markdown: signature, docstring, its arguments where they say more than their names."
    out = [f"```python\n{d.signature}\n```", d.doc + more]
    told = [row for row in d.rows if row[3]]
    if told:
        rows = [(code_cell(n), code_cell(t), code_cell(v), c) for n, t, v, c in told]
        out.append(table(["", "type", "default", ""], rows))
    return "\n\n".join(out)


# -- pages


def reference(room: Room) -> str:
    "All public definitions of a room, each with a link to the cell that shows it."
    out = [f"# {room.module.replace('__', chr(92) + '_' + chr(92) + '_')}", room.sentence]
    for c in room.cells:
        if c["cell_type"] != "code": continue
        found, code = directives(source(c))
        if not {"export", "exporti"} & found or is_imports(code): continue
        link = f' <a href="../{room.page}.html#{c["id"]}">shown here</a>'
        out += [f"## {d.name}\n\n{block(d, link)}" for d in definitions(code)]
    return "\n\n".join(out) + "\n"


def settings_page() -> str:
    "The settings of a run, from the dataclasses of core.settings."
    room = Room(ROOT / "nbs/core/04_settings.ipynb")
    classes: dict[str, list] = {}
    for c in room.cells:
        found, code = directives(source(c))
        if c["cell_type"] != "code" or "export" not in found: continue
        for node in ast.parse(code).body:
            if isinstance(node, ast.ClassDef): classes[node.name] = fields(node, comments(code))

    def rows(name: str, prefix: str = "") -> list[tuple]:
        out = []
        for key, kind, default, note in classes[name]:
            if kind in classes: out += rows(kind, f"{prefix}{key}.")
            else: out.append((f"{prefix}{key}", default, note))
        return out
    told = [
        (code_cell(k), code_cell(v), n, "mistral-finetune" if k in FINETUNE else "ours")
        for k, v, n in rows("TrainArgs")
    ]
    head = "# Settings\n\nAll keys of a config.yaml. Those of mistral-finetune mean what they mean there.\n\n"
    return head + table(["key", "default", "", "from"], told) + "\n"


def codes_page() -> str:
    "The findings of a check, from data.lint."
    tables = {}
    for c in Room(ROOT / "nbs/data/31_lint.ipynb").cells:
        found, code = directives(source(c))
        if c["cell_type"] != "code" or "export" not in found: continue
        for node in ast.parse(code).body:
            if isinstance(node, ast.Assign) and node.targets[0].id in ("ERRORS", "WARNINGS"):
                tables[node.targets[0].id] = ast.literal_eval(node.value)
    rows = [(code_cell(c), level, meaning) for name, level in (("ERRORS", "error"), ("WARNINGS", "warning"))
            for c, meaning in tables[name].items()]
    return (
        "# Codes of findings\n\nWhat `check` says of rows.\n\n"
        + table(["code", "level", "meaning"], rows)
        + "\n"
    )


def cli_page() -> str:
    "`--help` of the program and each of its commands."
    sys.path.insert(0, str(ROOT))
    from mistral_nb.cli import COMMANDS, parser
    out = ["# mistral-nb", f"```text\n{parser().format_help()}```"]
    for name, (_, options, text) in COMMANDS.items():
        p = argparse.ArgumentParser(prog=f"mistral-nb {name}")
        options(p)
        out += [f"## {name}", f"{text[0].upper()}{text[1:]}.", f"```text\n{p.format_help()}```"]
    return "\n\n".join(out) + "\n"


def start_page(readme: str) -> str:
    "README, with links that hold within the site."
    return relink(readme.split("-->", 1)[-1].strip(), "")


def relink(text: str, up: str) -> str:
    "Links of README to files of the repository, as pages of the site, or at its address."
    address = settings()["git_url"]

    def site(match: re.Match) -> str:
        target = match[1]
        if target.startswith("nbs/"): return f"]({up}{target.removeprefix('nbs/')})"
        if target.startswith("tutorials/"): return f"]({up}{target})"
        if target.endswith(".png"): return f"]({up}{Path(target).name})"
        pages = {"CHANGELOG.md": "changelog.md", "benchmarks/RESULTS.md": "benchmarks.md"}
        if target in pages: return f"]({up}{pages[target]})"
        return match[0] if "://" in target else f"]({address}/blob/{settings()['branch']}/{target})"
    return re.sub(r"\]\(([^)#\s]+)\)", site, text)


def section(readme: str, title: str) -> str:
    "A section of README as a page."
    body = readme.split(f"## {title}", 1)[1].split("\n## ", 1)[0]
    return f"# {title}\n{relink(body, '')}"


def toctree(caption: str, pages: list[str], depth: int = 1) -> str:
    lines = [f":caption: {caption}", f":maxdepth: {depth}", ":hidden:", "", *pages]
    return "```{toctree}\n" + "\n".join(lines) + "\n```\n"


def write(out: Path, name: str, text: str) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text(text, encoding="utf-8")


def fill(out: Path) -> None:
    "Write all pages, conf.py and llms.txt."
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = [Room(p) for p in sorted((ROOT / "nbs").rglob("[0-9]*_*.ipynb"), key=lambda p: p.name)]
    rooms = [r for r in rooms if ".ipynb_checkpoints" not in r.path.parts]
    tutorials = sorted((ROOT / "tutorials").glob("*.ipynb"))
    for room in rooms:
        write(out, f"{room.page}.ipynb", json.dumps(published(room)))
        write(out, f"reference/{room.module}.md", reference(room))
    for path in tutorials:
        nb = json.loads(path.read_text(encoding="utf-8").replace("../nbs/", "../"))
        write(out, f"tutorials/{path.name}", json.dumps(nb | {"metadata": METADATA}))
    for path in (ROOT / "docs/conf.py", ROOT / "settings.ini"): write(out, path.name, path.read_text())
    for path in (ROOT / "docs").glob("*.png"): shutil.copy(path, out)
    walks = (ROOT / "docs/how_it_works.md").read_text()
    write(out, "how_it_works.md", walks.replace("](../nbs/", "]("))  # on the site it stands beside the rooms
    write(out, "from_finetune.md", section(readme, "What is different from mistral-finetune"))
    write(out, "settings.md", settings_page())
    write(out, "codes.md", codes_page())
    write(out, "cli.md", cli_page())
    write(out, "benchmarks.md", plain_page(ROOT / "benchmarks/RESULTS.md"))
    write(out, "changelog.md", plain_page(ROOT / "CHANGELOG.md"))
    trees = [
        toctree(
            "Start",
            [f"tutorials/{p.stem}" for p in tutorials] + ["from_finetune", "settings", "codes", "cli"],
        ),
        toctree("How it works", ["how_it_works", *(r.page for r in rooms)]),
        toctree("Reference", [f"reference/{r.module}" for r in rooms]),
        toctree("More", ["benchmarks", "changelog"]),
    ]
    write(out, "index.md", start_page(readme) + "\n\n" + "\n".join(trees))
    write_llms(out, readme, rooms, tutorials)


def plain_page(path: Path) -> str:
    "A markdown file of the repository; links to other files of it lead to its address."
    return relink(path.read_text(encoding="utf-8"), "")


def write_llms(out: Path, readme: str, rooms: list[Room], tutorials: list[Path]) -> None:
    "llms.txt: each page with one sentence; llms-full.txt: README, tutorials, all signatures."
    host = settings()["doc_host"] + settings()["doc_baseurl"]
    intro = readme.split("# mistral_nb", 1)[1].strip().split("\n\n")[0]
    lines = [f"# mistral_nb\n\n> {intro}\n\n## Rooms\n"]
    lines += [f"- [{r.module}]({host}/{r.page}.html): {r.sentence}" for r in rooms]
    write(out, "llms.txt", "\n".join(lines) + "\n")
    parts = [readme]
    for path in tutorials:
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            parts.append(source(c) if c["cell_type"] == "markdown" else f"```python\n{source(c)}\n```")
    parts += [reference(r) for r in rooms]
    write(out, "llms-full.txt", re.sub(r' <a href="[^"]*">shown here</a>', "", "\n\n".join(parts)))


# -- the built site


class Page(HTMLParser):
    "The ids and links of a page."

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        for name, value in attrs:
            if name == "id": self.ids.add(value)
            if name == "href" and tag == "a" and value: self.links.append(value)


def dead_links(site: Path) -> list[str]:
    "Links within the site that lead to no page, or to no place on one."
    pages = {p.resolve(): Page(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}
    out = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages.get(target)
            lost = parts.fragment and known and unquote(parts.fragment) not in known.ids
            if not target.exists() or lost: out.append(f"{path.relative_to(site.resolve())}: {link}")
    return out


def build(out: Path) -> list[str]:
    "Fill, build and check the site in a folder; returns what is wrong."
    src, site = out / "src", out / "html"
    fill(src)
    command = [sys.executable, "-m", "sphinx", "-q", "-j", "2", "-b", "html", str(src), str(site)]
    done = subprocess.run(command, capture_output=True, text=True)
    wrong = [line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line]
    if done.returncode: return wrong or done.stderr.splitlines()[-20:]
    for name in ("llms.txt", "llms-full.txt"): (site / name).write_bytes((src / name).read_bytes())
    return wrong + dead_links(site)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        with tempfile.TemporaryDirectory(dir=ROOT) as folder: wrong = build(Path(folder))
    else:
        wrong = build(SITE)
        print(f"{SITE / 'html/index.html'}: {sum(1 for _ in (SITE / 'html').rglob('*.html'))} pages")
    if wrong: sys.exit("\n".join(wrong))


if __name__ == "__main__": main()
