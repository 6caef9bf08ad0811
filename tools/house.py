"""How the house reads, in figures, and the ratchet that keeps it so: a figure may fall, it may not rise.

    python tools/house.py [NOTEBOOK ...]   the figures of each notebook, and of all
    python tools/house.py --check          fail if a figure in tests/house.json has risen
    python tools/house.py --write          write the figures down
"""
import argparse
import ast
import json
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RATCHET = ROOT / "tests/house.json"
WIDTH, CELL, LONGEST_CELL = 110, 40, 45
EXPORT = re.compile(r"^#\|\s*exporti?\b", re.M)
SKIPPED = re.compile(r"^#\|\s*(cuda|net|slow)", re.M)


@dataclass
class Figures:
    "Counts of one notebook, or of all."
    lines: int = 0  # of code
    long_lines: int = 0  # over 110 columns, constants marked noqa: E501 apart
    exported: int = 0  # cells that export a definition
    over_40: int = 0  # of these, over 40 lines
    over_45: int = 0
    without_look: int = 0  # exported definitions with neither a look nor a proof before the next
    code_cells: int = 0
    shown: int = 0  # code cells with an output
    names: list[str] = field(default_factory=list)  # public

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(**{k: v + getattr(other, k) for k, v in asdict(self).items()})


def code_of(cell: dict) -> str: return "".join(cell["source"])


def is_long(line: str) -> bool: return len(line) > WIDTH and "noqa: E501" not in line


def body(source: str) -> list[str]:
    "The lines of a cell without directives."
    return [line for line in source.strip().splitlines() if not line.startswith("#|")]


def definitions(source: str) -> list[str]:
    "The public names that an exported cell defines."
    out = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): out.append(node.name)
        elif isinstance(node, ast.Assign): out += [t.id for t in node.targets if isinstance(t, ast.Name)]
    return [name for name in out if not name.startswith("_")]


def measure(path: Path) -> Figures:
    "The figures of a notebook."
    out, waiting = Figures(), False  # waiting: an exported definition is not shown yet
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code" or not code_of(cell).strip(): continue
        source = code_of(cell)
        out.code_cells += 1
        out.shown += bool(cell["outputs"])
        out.lines += len(source.splitlines())
        out.long_lines += sum(map(is_long, source.splitlines()))
        if (
            EXPORT.search(source)
            and "eval: false" not in source
            and re.search(r"^(def|class|@|async def) ?", source, re.M)
        ):
            out.without_look += waiting
            waiting = True
            out.exported += 1
            out.over_40 += len(body(source)) > CELL
            out.over_45 += len(body(source)) > LONGEST_CELL
            out.names += definitions(source)
        elif not (EXPORT.search(source) or source.startswith("#| default_exp") or "#| hide" in source):
            waiting = False
    out.without_look += waiting
    return out


def notebooks() -> list[Path]:
    found = (p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    return sorted(found, key=lambda p: p.name)


def long_test_lines() -> dict[str, int]:
    "Lines over 110 columns of each test file."
    files = sorted((ROOT / "tests").glob("*.py"))
    return {f"tests/{p.name}": sum(map(is_long, p.read_text(encoding="utf-8").splitlines())) for p in files}


def twice(all_names: list[str]) -> list[str]:
    "Public names that stand in more than one room."
    return sorted(name for name, n in Counter(all_names).items() if n > 1 and name != "main")


def ratchet() -> dict[str, dict[str, int]]:
    "The figures that may not rise, by notebook and test file; what is zero is left out."
    kept = ("long_lines", "over_40", "over_45", "without_look")
    out = {}
    for path in notebooks():
        figures = asdict(measure(path))
        out[str(path.relative_to(ROOT))] = {k: figures[k] for k in kept if figures[k]}
    out |= {name: {"long_lines": n} for name, n in long_test_lines().items()}
    return {
        name: {k: v for k, v in counts.items() if v} for name, counts in out.items() if any(counts.values())
    }


def risen(before: dict, now: dict) -> list[str]:
    "What is more than it was."
    return [
        f"{name}: {key} is {value}, and was {before.get(name, {}).get(key, 0)}"
        for name, counts in now.items() for key, value in counts.items()
        if value > before.get(name, {}).get(key, 0)
    ]


def show(paths: list[Path]) -> None:
    "A line for each notebook, then all of them."
    total = Figures()
    print(f"{'':34} {'lines':>6} {'>110':>5} {'cells':>6} {'>40':>4} {'>45':>4} {'no look':>8} {'shown':>6}")
    for path in paths:
        found = measure(path)
        total += found
        row(str(path.relative_to(ROOT / "nbs")) if ROOT / "nbs" in path.parents else path.name, found)
    row("all", total)
    tests = long_test_lines()
    lines = sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in tests)
    share = (total.long_lines + sum(tests.values())) / (total.lines + lines)
    print(f"tests: {sum(tests.values())} of {lines:,} lines over {WIDTH}; with the notebooks {share:.2%}")
    print("names in two rooms:", ", ".join(twice(total.names)) or "none")


def row(name: str, f: Figures) -> None:
    share = f"{f.shown / max(1, f.code_cells):.0%}"
    lines = f"{f.lines:6} {f.long_lines:5} {f.exported:6} {f.over_40:4} {f.over_45:4}"
    counts = f"{lines} {f.without_look:8} {share:>6}"
    print(f"{name:34} {counts}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.write: RATCHET.write_text(json.dumps(ratchet(), indent=1) + "\n")
    elif options.check:
        worse = risen(json.loads(RATCHET.read_text()), ratchet())
        if worse: sys.exit("\n".join([*worse, "shorten it, or show it: CONTRIBUTING.md says how"]))
    else: show([p.resolve() for p in options.notebooks] or notebooks())


if __name__ == "__main__": main()
