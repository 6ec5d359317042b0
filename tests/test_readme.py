"""The README is run: its commands, its Python, and the parts that are generated."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import tapeout
from sessions import ROOT, replay

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(heading: str) -> list[tuple[str, str]]:
    """Language and text of every fenced block of a section."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^```(\w*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("newcomer")


@pytest.fixture
def _cache_for_all(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPEOUT_CACHE", str(place / "cache"))


def commands() -> list[str]:
    lines = [
        line
        for language, text in blocks("One command per target")
        if not language
        for line in text.splitlines()
    ]
    return [line.split("#")[0].strip() for line in lines if line.strip()]


@pytest.mark.slow
@pytest.mark.usefixtures("_cache_for_all")
def test_every_command_works_in_the_order_that_it_stands_in(place: Path) -> None:
    for command, shown, printed in replay(ROOT / "README.md", place):
        assert printed == shown, f"{command}\nrun scripts/record.py README.md and read what changed"
    verbs = []
    for command in commands():
        words = shlex.split(command)
        assert words[0] == "tapeout", command
        verbs.append(words[1])
        done = tapeout(*words[1:], cwd=place)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert set(verbs) >= {"export", "validate", "bench", "diff", "plan", "compare", "inspect"}


@pytest.mark.slow
@pytest.mark.usefixtures("_cache_for_all")
def test_the_python_works(place: Path) -> None:
    (code,) = [text for language, text in blocks("One command per target") if language == "python"]
    subprocess.run([sys.executable, "-P", "-c", code], cwd=place, check=True, timeout=300)
    assert (place / "build" / "package" / "tapeout.json").exists()


def test_the_generated_parts_are_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "readme.py"))
    assert f"<!-- figures -->\n{script['figures']()}\n<!-- /figures -->" in README, "run scripts/readme.py"
    page = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    assert f"<!-- carry -->\n{script['carry']()}\n<!-- /carry -->" in page, "run scripts/readme.py"
    guide = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    assert f"<!-- curve -->\n{script['curve']()}\n<!-- /curve -->" in guide, "run scripts/readme.py"
    apple = (ROOT / "docs" / "apple.md").read_text(encoding="utf-8")
    for name in ("containers", "chips"):
        assert f"<!-- {name} -->\n{script[name]()}\n<!-- /{name} -->" in apple, "run scripts/readme.py"


def test_links_lead_somewhere() -> None:
    targets = {target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target}
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_make_targets_that_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"demo", "test"} <= named
    assert [name for name in named if f"\n{name}:" not in makefile] == []
