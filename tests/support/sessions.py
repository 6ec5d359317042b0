"""Sessions that stand in pages: their commands are run again, and what they print must be what the page says."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from commands import tapeout

from tapeout import installed

ROOT = Path(__file__).resolve().parent.parent.parent
RECORD: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "record.py"))
# A command of tapeout's, where its outputs go, and what it is piped into.
_TAPEOUT = re.compile(r"tapeout (.*?)((?: 2?> \S+| 2>&1)*)( \| .*)?")


def replay(page: Path, place: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Run a page's commands in ``place``; of each the command, the words that the page has below it, and those that it printed now.

    tapeout's run in this process, whose workers stay; of what they print figures and digests count as one word each, since they are
    another machine's. Of anything else, and of what a model says, every word counts. ``tapeout doctor`` imports nothing here: that has
    tests of its own, and takes seconds.
    """
    status = 0
    given = RECORD["environment"](place / "cache")
    for step in RECORD["steps"](page.read_text(encoding="utf-8")):
        if not (found := _TAPEOUT.fullmatch(step.command)):
            printed, status = RECORD["run"](step.command, place, given, status)
            yield step.command, step.printed.split(), printed.split()
            continue
        arguments, redirected, piped = found.groups()
        with patch.object(installed, "broken_imports", return_value={}):
            done = tapeout(*shlex.split(arguments), cwd=place, COLUMNS=str(RECORD["WIDTH"]))
        out, err, status = done.stdout, done.stderr, done.returncode
        for stream, file in re.findall(r"(2?)> (\S+)", redirected):
            (place / file).write_text(err if stream else out, encoding="utf-8")
            out, err = (out, "") if stream else ("", err)
        if piped:
            told = err + out if "2>&1" in redirected else out
            command = piped.removeprefix(" | ")
            out = subprocess.run(
                ["bash", "-c", command], input=told, capture_output=True, text=True, check=True
            ).stdout
            err, status = "" if "2>&1" in redirected else err, 0
        if arguments.startswith("run"):
            yield step.command, step.printed.split(), (err + out).split()
        else:
            yield step.command, _words(step.printed), _words(err + out)


def _words(printed: str) -> list[str]:
    text = re.sub(r"[─-╿]", " ", printed)
    text = re.sub(r"\b[0-9a-f]{16,64}\b", "#", text)
    return re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "#", text).split()
