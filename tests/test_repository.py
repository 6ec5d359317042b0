"""The repository itself: what the wheel holds, and what no file may say."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = re.compile(r"\.git|\.venv|build|dist|\..+_cache|\.hypothesis|__pycache__|.+\.egg-info")
# Spelt in parts, so that this file passes its own tests.
BESIDE = "../" + "shared"
REGISTRY = re.compile(
    r"pypi\.(?:org|python)|python"
    r"hosted\.org|download\.py"
    r"torch|registry\.npm|deb\.debian\.org|--(?:extra-)?index"
    r"-url"
)


def texts() -> Iterator[tuple[str, str]]:
    """Path and text of every text file that belongs to the repository."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not NOT_OURS.fullmatch(name)]
        for path in (Path(folder, name) for name in names):
            content = path.read_bytes()
            if b"\0" not in content:
                yield path.relative_to(ROOT).as_posix(), content.decode()


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel built from a copy: setuptools writes into the folder that it builds."""
    scratch = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, scratch / "tree", ignore=lambda _, names: set(filter(NOT_OURS.fullmatch, names)))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        scratch,
        scratch / "tree",
    ]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
def test_wheel_holds_tapeout_only(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tapeout"}
    assert not [
        name
        for name in wheel_names
        if re.search(r"__pycache__|(^|/)(tests?|test_[^/]*|conftest\.py)(/|$)", name)
    ]


@pytest.mark.slow
def test_wheel_holds_every_source(wheel_names: list[str]) -> None:
    folders = {
        "tapeout": "",
        **{name: f"{name}/" for name in ("models", "quantize", "exporters", "validate", "targets")},
    }
    sources = {
        f"tapeout/{inside}{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in folders.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources <= set(wheel_names)


def test_nothing_depends_on_files_beside_the_repository() -> None:
    # A test may look there for more to test, if it skips where there is nothing.
    found = {path: text for path, text in texts() if BESIDE in text}
    assert [path for path, text in found.items() if not (path.startswith("tests/") and "skip" in text)] == []


def test_no_registry_is_named() -> None:
    """Where packages come from is the choice of whoever installs."""
    assert [path for path, text in texts() if REGISTRY.search(text)] == []


def test_changelog_is_open_for_the_next_release() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_five_calls_can_be_imported_in_any_order() -> None:
    names = ["load", "quantize", "target", "validate", "pack", "export", "Scheme"]
    for order in (names, names[::-1]):
        code = f"from tapeout import {', '.join(order)}\nassert all(map(callable, [{', '.join(order)}]))"
        code += "\nimport tapeout\nassert callable(tapeout.quantize) and tapeout.quantize.SCHEMES and tapeout.validate.GATES"
        code += "\nassert quantize(load('count'), 'int8', out=__import__('pathlib').Path('codes')).digest"
        with tempfile.TemporaryDirectory() as place:
            subprocess.run([sys.executable, "-P", "-c", code], cwd=place, check=True, timeout=120)
