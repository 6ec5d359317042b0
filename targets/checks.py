"""What a package takes along that checks it on a device: ``check.py``, and for some formats a program besides.

``check.py`` is one file, put together here of ``data/check/common.py`` and the parts of the format's runtime, so that who gets it needs nothing
else and reads it from top to bottom. Which parts those are a target says of itself, in ``checks``.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from tapeout.targets import Target

__all__ = ["SCRIPT", "files_of", "place", "script"]

SCRIPT = "check.py"
_COMMON, _PLACE = "common.py", "RUNTIME = Runtime()  # a format's part has its own\n"
_NOTHING = "pip install tapeout"  # of formats that no other runtime runs


def files_of(target: Target) -> dict[str, str]:
    """Files for the root of a package of this target, by name: the same text for the same target.

    The target's ``checks`` names files of ``data/check``: parts of ``check.py`` in their order, and whole programs (``check.cpp``). Without it
    the script compares the files alone.
    """
    names: tuple[str, ...] = getattr(target, "checks", ())
    parts = tuple(name for name in names if name.endswith(".py"))
    return {SCRIPT: script(parts)} | {name: _read(name) for name in names if name not in parts}


@cache
def script(parts: tuple[str, ...]) -> str:
    """``check.py`` with these parts: docstring, all imports, the common text with the parts in the place that it has for them."""
    common = _read(_COMMON)
    imports, body = _parted(common)
    before, after = body.split(_PLACE)
    texts = []
    for name in parts:
        more, text = _parted(_read(name))
        imports |= more
        texts.append(text)
    last = [line for line in texts[-1].splitlines() if line.startswith("RUNTIME")] if texts else [_PLACE]
    # Of several parts the last one's runtime is the script's.
    own = "\n\n".join(
        "\n".join(line for line in text.splitlines() if not line.startswith("RUNTIME")) for text in texts
    )
    said = ast.get_docstring(ast.parse(common), clean=False) or ""
    ordered = sorted(imports, key=lambda line: (line.startswith("from"), line))
    head = '#!/usr/bin/env python3\n"""' + said.replace("{install}", _install(parts)) + '"""\n'
    return "\n".join(
        [
            head,
            "from __future__ import annotations\n",
            *ordered,
            before.rstrip(),
            "\n",
            own.strip(),
            "\n",
            *last,
            after,
        ]
    )


def _install(parts: tuple[str, ...]) -> str:
    """The command that installs the last part's runtime, as its class says."""
    if not parts:
        return _NOTHING
    for node in ast.walk(ast.parse(_read(parts[-1]))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "install":
            return str(ast.literal_eval(node.value))
    raise AssertionError(
        f"{parts[-1]} has no install"
    )  # a mistake of ours, which the tests of every part would show


def _parted(text: str) -> tuple[set[str], str]:
    """The imports of a file that others keep, and what comes behind them."""
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    head = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    kept = set()
    for node in head:
        module = getattr(node, "module", None) or node.names[0].name
        # numpy is where the common text has it: files can be compared without it.
        if module.split(".")[0] not in ("tapeout", "__future__", "numpy"):
            kept.add(ast.unparse(node))
    return kept, "".join(lines[head[-1].end_lineno :])


def place(name: str) -> Traversable:
    """Where a part, or a whole program, stands in this installation."""
    return files("tapeout.targets") / "data" / "check" / name


def _read(name: str) -> str:
    return place(name).read_text(encoding="utf-8")
