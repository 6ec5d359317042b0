"""The card of a package, its README.md. What it says of a model is the model's own words, so they are shown and never obeyed."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2

from tapeout.exporters import Artifact

__all__ = ["card", "plain"]

# What begins markup within a line of GitHub's Markdown, or an HTML tag, an entity, a cell of a table.
_MARKUP = re.compile(r"([\\`*\[\]<>|&~$])")
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def card(
    artifact: Artifact,
    facts: Mapping[str, Any],
    how: str,
    licences: Sequence[str],
    runtimes: Sequence[str],
    checks: Sequence[str] = (),
) -> str:
    """Write the card.

    Args:
        facts: the manifest as far as it is known.
        how: how to run it, in the target's Markdown.
        licences: paths in the package of the model's texts, then of tapeout's.
        runtimes: any of these distributions runs it.
        checks: the package's own scripts that check it on a device.
    """
    model = [path for path in licences if path.startswith("licences/model/")]
    return _template().render(
        facts=facts,
        how=how,
        notes=artifact.notes,
        model_texts=model,
        own_texts=[path for path in licences if path not in model],
        runtimes=runtimes,
        checks=checks,
    )


def plain(value: object) -> str:
    r"""A value in a line of Markdown as the text that it is: no markup, no HTML, no link, no second line, nothing that does not show.

    Example:
        >>> plain("<b>[x](y)\\n# z")
        '\\\\<b\\\\>\\\\[x\\\\](y) # z'
    """
    shown = "".join(" " if c.isspace() else c for c in str(value))
    shown = "".join(c for c in shown if unicodedata.category(c) not in _HIDDEN)
    shown = _MARKUP.sub(r"\\\1", " ".join(shown.split()))
    shown = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\_", shown)  # within a word it is itself
    shown = re.sub(r"^([#+=-])", r"\\\1", shown)
    shown = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", shown)  # a list
    # Addresses become links by themselves, and names of people are told of it.
    shown = re.sub(r"(?i)(https?|ftp|mailto|xmpp):", r"\1&#58;", shown)
    return re.sub(r"(?i)\bwww\.", "www&#46;", shown).replace("@", "&#64;")


def _scalar(value: str) -> str:
    """A string in YAML: as it stands where it is a word, else in JSON's quotes, which are YAML's."""
    return value if re.fullmatch(r"[A-Za-z][\w.+-]*", value, re.ASCII) else json.dumps(value)


@cache
def _template() -> jinja2.Template:
    """The template of ``README.md``, compiled once."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tapeout"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"plain": plain, "scalar": _scalar}
    return environment.get_template("card.md.j2")
