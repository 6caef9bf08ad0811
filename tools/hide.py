"""Cells that begin with `#| hide` are folded in Jupyter and VS Code, and tagged for programs that make pages.

    python tools/hide.py            set it in all notebooks
    python tools/hide.py --check    fail if a notebook lacks it
"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = re.compile(r"#\|\s*hide\b")
FOLDED = {"jupyter": {"source_hidden": True}, "tags": ["hide-cell"]}


def notebooks() -> list[Path]:
    found = [p for folder in ("nbs", "tutorials") for p in (ROOT / folder).rglob("*.ipynb")]
    return sorted(p for p in found if ".ipynb_checkpoints" not in p.parts)


def folded(notebook: dict) -> dict:
    "The same with the metadata of each cell as its first line says."
    for cell in notebook["cells"]:
        hide = cell["cell_type"] == "code" and HIDDEN.match("".join(cell["source"]))
        cell["metadata"] = FOLDED if hide else {}
    return notebook


def main() -> None:
    for path in notebooks():
        text = path.read_text(encoding="utf-8")
        new = json.dumps(folded(json.loads(text)), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if new == text: continue
        if "--check" in sys.argv: sys.exit(f"{path.relative_to(ROOT)}: run python tools/hide.py")
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__": main()
