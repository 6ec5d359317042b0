"""The page of a matrix in a real browser: nothing is asked for, cells are found and sorted, and no screen is too small."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tapeout.matrix.baseline import compare
from tapeout.matrix.cells import Cell
from tapeout.matrix.file import Margins
from tapeout.matrix.result import Result
from tapeout.matrix.tasks import Outcome, Status

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WHY = "<script>alert(1)</script> & a | pipe\x1b[31m"


def result(
    statuses: tuple[Status, ...] = ("passed", "failed", "refused", "skipped", "error", "not run"),
) -> Result:
    cells = []
    for index, status in enumerate(statuses):
        cell = Cell("models/one", "int8", "rtn", f"target-{index}", "cpu")
        figures = {
            "artifact_bytes": 1000 * (9 - index),
            "gates": {"passed": 3, "failed": 0, "skipped": 1},
            "skipped": ["task"],
        }
        reason = "" if status == "passed" else WHY
        cells.append(
            (
                cell,
                Outcome(cell.name, status, reason, figures=figures if status in ("passed", "failed") else {}),
            )
        )
    small = Outcome(cells[0][1].name, "passed", figures={"artifact_bytes": 10})
    changes = compare({small.name: small}, {small.name: cells[0][1]}, Margins())
    return Result(
        "all <kinds>", tuple(cells), frozenset(outcome.name for _, outcome in cells), tuple(changes)
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: make test installs it with apt-get where it runs as root on Debian")
    if not sys.platform.startswith("linux"):
        pytest.skip("Chromium is driven on Linux")
    api = pytest.importorskip("playwright.sync_api")
    out = tmp_path_factory.mktemp("index")
    result().write(out)
    asked, said = [], []
    with api.sync_playwright() as driver:
        # A container's root has no sandbox; the page is our own.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = chromium.new_page()
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.goto((out / "index.html").as_uri())
        yield opened
        chromium.close()
    assert len(asked) == 1
    assert said == []


def shown(page: Any) -> list[str]:
    return [
        row.get_attribute("data-status")
        for row in page.query_selector_all("#cells tbody tr")
        if row.is_visible()
    ]


@pytest.mark.parametrize("width", [390, 1280])
def test_no_sideways_scroll(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_cells_are_chosen_by_outcome_and_words(page: Any) -> None:
    assert shown(page) == ["passed", "failed", "refused", "skipped", "error", "not run"]
    page.uncheck("input[value=refused]")
    assert shown(page) == ["passed", "failed", "skipped", "error", "not run"]
    page.fill("input[name=words]", "ONE target-1")
    assert shown(page) == ["failed"]
    assert page.inner_text("#shown") == "1 of 6"
    page.fill("input[name=words]", "")
    page.check("input[value=refused]")
    assert page.inner_text("#shown") == "6 of 6"


def test_cells_are_sorted_by_size(page: Any) -> None:
    page.click("#cells th:nth-child(3) button")
    assert shown(page)[:2] == ["failed", "passed"]
    page.click("#cells th:nth-child(3) button")
    assert shown(page)[:2] == ["passed", "failed"]


def test_every_form_holds_what_was_said_and_runs_none_of_it(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    result().write(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "all &lt;kinds&gt;" in page
    cases = list(ElementTree.parse(tmp_path / "index.xml").getroot().iter("testcase"))
    found = [next((child.tag for child in case if child.tag != "system-out"), "passed") for case in cases]
    assert found == [
        "passed",
        "failure",
        "skipped",
        "skipped",
        "error",
        "error",
        "failure",
    ]  # the last one: its size grew
    text = (tmp_path / "index.md").read_text()
    assert text.startswith(
        "❌ **FAILED** `all <kinds>`: 6 cells: 1 failed, 1 error, 1 not run, 1 skipped, 1 refused, 1 passed"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.html",
        "index.md",
        "index.xml",
        "matrix.json",
    ]


def test_a_comment_has_room_for_what_is_written(tmp_path: Path) -> None:
    cells = tuple(
        (cell := Cell(f"model{index}", "int8", "rtn", "cpu", "cpu"), Outcome(cell.name, "failed", "x" * 400))
        for index in range(400)
    )
    text = Result("many", cells, frozenset()).markdown()
    assert len(text) < 65_536  # what GitHub takes
    assert text.endswith("… index.html has the rest.\n")
