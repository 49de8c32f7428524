"""The documentation's site has a page for each document, and its Python reference an entry for each public name."""

import re
from pathlib import Path

from tests import public_api

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OF_ROOT = {"index.md", "changelog.md", "contributing.md"}  # README.md, CHANGELOG.md and CONTRIBUTING.md


def in_nav():
    """The pages that the navigation names, in its order."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    return re.findall(r"([\w/-]+\.md)$", nav, re.MULTILINE)


def test_the_navigation_names_each_document_once():
    assert sorted(in_nav()) == sorted(OF_ROOT | {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")})


def reference():
    """Returns the names whose docstrings the Python reference has, and those that it mentions in full."""
    entries, mentions = [], []
    for page in (DOCS / "reference").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        found = re.findall(r"^::: (\S+)(?:\n    options:\n      heading: (\S+))?", text, re.MULTILINE)
        entries += [heading or name for name, heading in found]
        mentions += re.findall(r"`(bt_fast\.[\w.]+)`", text)
    return entries, mentions


def test_the_python_reference_has_each_public_name_once():
    public = {name for name, _ in public_api.public_objects()}
    entries, mentions = reference()
    assert not public - {*entries, *mentions}
    assert not set(entries) - public
    assert len(entries) == len(set(entries))


def test_the_python_reference_takes_the_schemas_of_the_operations_from_the_snapshot():
    assert "<!-- the schemas of tests/public_api.txt -->" in (DOCS / "reference" / "ops.md").read_text()
