"""Write a notebook as percent-format text, to be edited and turned back by txt2nb.py; outputs stay behind.

    python tools/nb2txt.py notebook.ipynb [out.txt]
"""
import json
import sys
from pathlib import Path


def to_txt(nb: dict) -> str:
    "Each cell behind a line `# %% [md] its-id` or `# %% its-id`."
    out = []
    for cell in nb["cells"]:
        kind = {"markdown": "[md] ", "raw": "[raw] "}.get(cell["cell_type"], "")
        out.append(f"# %% {kind}{cell['id']}\n{''.join(cell['source']).rstrip()}\n")
    return "\n".join(out)


if __name__ == "__main__":
    text = to_txt(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    if len(sys.argv) > 2: Path(sys.argv[2]).write_text(text, encoding="utf-8")
    else: print(text)
