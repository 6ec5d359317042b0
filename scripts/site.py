"""A hook of mkdocs: the reference of the command line, made from the command line, and marks on wide tables for the style sheet."""

from __future__ import annotations

import re
from typing import Any

_PLACE = "<!-- commands -->"
_WIDE = 7  # columns: fewer fit a page


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put every verb with its flags in its place."""
    if _PLACE not in markdown:
        return markdown
    from cyclopts.docs.markdown import generate_markdown_docs

    from tapeout.cli import registered

    told = generate_markdown_docs(registered(), max_heading_level=3, no_root_title=True, generate_toc=False)
    return markdown.replace(_PLACE, told)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Mark the tables that are wider than a page, which then gets the room of the table of contents."""

    def mark(found: re.Match[str]) -> str:
        wide = found[0].split("</thead>")[0].count("<th") > _WIDE
        if not wide:
            return found[0]
        page.meta["hide"] = ["toc"]
        return found[0].replace("<table>", "<table data-wide>", 1)

    return re.sub(r"<table>.*?</table>", mark, html, flags=re.DOTALL)
