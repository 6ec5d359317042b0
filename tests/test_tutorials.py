"""The tutorials are run: each command, in the order that it stands in, and what it prints is what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from sessions import RECORD, ROOT, replay

from tapeout import cli

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_works_as_it_is_written(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAPEOUT_CACHE", str(tmp_path / "cache"))
    ran = 0
    for command, shown, printed in replay(page, tmp_path):
        assert printed == shown, (
            f"{command}\nrun scripts/record.py {page.relative_to(ROOT)} and read what changed"
        )
        ran += 1
    assert ran > 5


def test_there_is_one_for_each_user() -> None:
    assert {page.stem for page in TUTORIALS} == {"export-engineer", "ci-engineer", "edge-engineer"}


def test_the_pipeline_calls_commands_that_exist() -> None:
    """The workflow is YAML, and each of its commands is one that the command line takes; its runners are not here."""
    page = (ROOT / "docs" / "tutorials" / "ci-engineer.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (job,) = yaml.safe_load(text)["jobs"].values()
    commands = [step["run"] for step in job["steps"] if step.get("run", "").startswith("tapeout")]
    assert len(commands) == 2
    for command in commands:
        cli.registered().parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)


def test_what_a_terminal_shows() -> None:
    screen = RECORD["screen"]
    bar = "\x1b[?25lexport ━━━\r\n\x1b[1A\x1b[2K\r\x1b[?25h"
    assert screen(f"{bar}\x1b[31mdone\x1b[0m  \r\n") == "done"
    assert screen("12%\r100%\r\nnext") == "100%\nnext"
    assert screen("abcdef\rxy\x1b[K") == "xy"
    assert screen("one\r\n\r\n\x1b[2Atwo") == "two"


def test_a_session_is_read_by_its_prompts() -> None:
    text = "```console\n$ a 'b'\nsaid\n\nmore\n$ cat <<X\n> in\n> X\nin\n```\n\n```\n$ no session\n```\n```console\n$ last\n```\n"
    steps = RECORD["steps"](text)
    assert [(step.command, step.printed) for step in steps] == [
        ("a 'b'", "said\n\nmore"),
        ("cat <<X\nin\nX", "in"),
        ("last", ""),
    ]
