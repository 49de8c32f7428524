"""Links the first mention of each class and loss on a page to its entry in the Python reference."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.pages import Page

REFERENCE = Path(__file__).parents[1] / "reference"
ELSEWHERE = ("reference/", "repository/", "command-reference.md")
# no name in a block of code, in a heading or in the text of another link
CODE_OR_NAME = re.compile(r"(?sm)(```.*?```|^#.*?$|\[[^\]]*\]\([^)]*\))|`(([A-Z]\w+|\w+_loss)(\([^`]*\))?)`")


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Replace the first `Name` or `Name(...)` in a page's text by a link, if the reference has bt_fast.Name."""
    if page.file.src_uri.startswith(ELSEWHERE):
        return markdown
    text = "\n".join(path.read_text(encoding="utf-8") for path in REFERENCE.glob("*.md"))
    left = set(re.findall(r"^::: bt_fast\.(\w+)$", text, re.MULTILINE))

    def linked(match: re.Match[str]) -> str:
        name = match[3]
        if name not in left:
            return match[0]
        left.remove(name)
        return f"[`{match[2]}`][bt_fast.{name}]"

    return CODE_OR_NAME.sub(linked, markdown)
