"""Run notebooks in a kernel and keep their real outputs.

    python tools/outputs.py [NOTEBOOK ...]      all of nbs/ and tutorials/ without arguments
"""
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
SKIP = "skip-execution"
SKIPPED = re.compile(r"^#\|\s*(cuda|slow|net|eval:\s*false)", re.M)


def neutral(value):
    "An output without the folder in which it was made"
    if isinstance(value, str): return value.replace(str(ROOT), "/home/you/mistral_nb")
    if isinstance(value, dict): return type(value)({k: neutral(v) for k, v in value.items()})
    return [neutral(v) for v in value] if isinstance(value, list) else value


def run(path: Path) -> None:
    "Execute `path` in place; cells that tests skip are skipped here too."
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code" and SKIPPED.search(cell.source):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), SKIP]
    client = NotebookClient(
        nb, timeout=900, coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    for cell in nb.cells:
        tags = [tag for tag in cell.metadata.pop("tags", []) if tag != SKIP]
        if tags: cell.metadata["tags"] = tags
        if cell.cell_type == "code":
            cell.outputs = [
                neutral(o) for o in cell.outputs if o.get("name") != "stderr"
            ]  # chatter of libraries
    nb.metadata.pop("widgets", None)
    nbformat.write(nb, path)


def main() -> None:
    os.environ["IN_TEST"] = "1"
    paths = [Path(a).resolve() for a in sys.argv[1:]] or sorted(
        p
        for d in ("nbs", "tutorials")
        for p in (ROOT / d).rglob("*.ipynb")
        if ".ipynb_checkpoints" not in p.parts
    )
    for path in paths:
        print(path.relative_to(ROOT), flush=True)
        run(path)


if __name__ == "__main__": main()
