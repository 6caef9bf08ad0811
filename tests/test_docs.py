"The documentation site is built from notebooks without running them, and its links lead somewhere."
import importlib.util
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import docs  # noqa: E402

needs_sphinx = pytest.mark.skipif(
    not importlib.util.find_spec("myst_nb"), reason="the extra docs is not installed"
)


@needs_sphinx
def test_site(tmp_path):
    "Every page is made, no link is dead, llms.txt names each room"
    assert docs.build(tmp_path) == []
    pages = {p.relative_to(tmp_path / "html").as_posix() for p in (tmp_path / "html").rglob("*.html")}
    assert {
        "index.html", "settings.html", "codes.html", "cli.html", "train/75_loop.html",
        "reference/train.loop.html",
    } <= pages
    loop = (tmp_path / "html/train/75_loop.html").read_text()
    assert 'id="one-step"' in loop and "test-imports" not in loop and "default_exp" not in loop
    assert "/reference" not in (tmp_path / "html/llms.txt").read_text()
    assert "- [train.loop](https://" in (tmp_path / "html/llms.txt").read_text()


def test_dead_links_are_found(tmp_path):
    "A link to no page, and one to no place on a page"
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here">x</a><a href="b.html#there">x</a><a href="c.html">x</a>'
    )
    (tmp_path / "b.html").write_text('<p id="here"></p><a href="https://example.com/none">x</a>')
    assert sorted(docs.dead_links(tmp_path)) == ["a.html: b.html#there", "a.html: c.html"]


def test_definitions_from_source():
    "Signature, docstring and comments of arguments, without running anything"
    code = (
        'def f(\n    a: int,  # the first\n    *rest: str,  # more | of them\n) -> int:\n'
        '    "Does it."\n    return undefined(a)'
    )
    (found,) = docs.definitions(code)
    assert (found.signature, found.doc) == ("f(a: int, *rest: str) -> int", "Does it.")
    assert found.rows == [("a", "int", "", "the first"), ("rest", "str", "", "more | of them")]
    assert "more \\| of them" in docs.block(found)
    assert docs.definitions("def _private(): pass\nx = 1") == []


def test_every_setting_has_a_place():
    "The page of settings has each key once, and says which are mistral-finetune's"
    from mistral_nb.core.config import flatten, to_dict
    from mistral_nb.core.settings import TrainArgs
    page = docs.settings_page()
    keys = flatten(to_dict(TrainArgs()))
    assert all(page.count(f"| `{key}` |") == 1 for key in keys) and page.count("\n| `") == len(keys)
    assert docs.FINETUNE <= set(keys)


def test_address_is_one_setting(monkeypatch):
    "A fork changes settings.ini: install lines, badges and links follow"
    import readme
    monkeypatch.setattr(
        readme,
        "settings",
        lambda: (
            docs.settings()
            | dict(
                user="me", repo="mine", branch="dev", git_url="https://github.com/me/mine",
                doc_host="https://me.io", doc_baseurl="/mine",
            )
        ),
    )
    files = [ROOT / "nbs/index.ipynb", *sorted((ROOT / "tutorials").glob("*.ipynb"))]
    for file in files:
        text = readme.with_address(file.read_text())
        assert (
            "github/example/" not in text
            and "github.com/example" not in text
            and "example.github.io" not in text
        )
        assert "github.com/me/mine" in text
