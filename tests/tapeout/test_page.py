"""The pages of reports in a real browser: nothing is asked for, tables sort, charts are drawn, and both themes can be read on any screen."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from commands import tapeout
from speed import measured
from thinned import thinned

from tapeout.build import export, target
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.pack import Package
from tapeout.recipe import Recipe
from tapeout.validate.page import comparison_markdown, comparison_page, markdown, page
from tapeout.validate.report import GateResult, Report

Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
# The model is random: what its quantization loses says nothing.
LOOSE = Recipe.of({"tokens": 40, "limits": {"kl": 1e3, "top1": 0.0, "perplexity": 1e3}})
FAILED = GateResult(
    "lowering/runtime", "failed", "mean KL, nats", 0.4, 1e-4, "The first | primitive\nthat parts is <b>."
)
SKIPPED = GateResult("task", "skipped", reason="the model has no tasks.jsonl with prompts and answers.")
SCREENS = {"phone": (390, 844), "desktop": (1280, 900)}
THEMES = ("light", "dark")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Every visible piece of text with the ratio of its colour to what stands behind it (WCAG 2.2, 1.4.3), and what AA asks of its size.
CONTRAST = """() => {
  const parse = text => { const m = text.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m.length > 3 ? m[3] : 1]; };
  const light = ([r, g, b]) => { const f = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b); };
  const behind = element => { for (let at = element; at; at = at.parentElement) {
    const found = parse(getComputedStyle(at).backgroundColor); if (found[3] === 1) return found;
    if (found[3] > 0) throw Error("half transparent"); } throw Error("no background"); };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.textContent.trim() || element.closest("script, title") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), drawn = element.closest("svg");
    const dot = drawn && element.previousElementSibling?.tagName === "circle" && element.classList.contains("in");
    const ink = parse(drawn ? style.fill : style.color);
    const paper = dot ? parse(getComputedStyle(element.previousElementSibling).fill) : behind(element);
    const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    found.push({ text: node.textContent.trim().slice(0, 40), ratio: (a + 0.05) / (b + 0.05), least: large ? 3 : 4.5 });
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: make test installs it with apt-get where it runs as root on Debian")
    if not sys.platform.startswith("linux"):
        pytest.skip("Chromium is driven on Linux")
    api = pytest.importorskip("playwright.sync_api")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with api.sync_playwright() as driver:
        # A container's root has no sandbox; the page is our own.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def made(once: Once, here: Any) -> tuple[Path, dict[str, Any]]:
    """Packages of two targets and of an encoder, each proven on its runtime, once for all of xdist's workers."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("onnxruntime")

    def make(work: Path) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TAPEOUT_CACHE", str(work / "cache"))
            patch.setattr("tapeout.validate.worker.borrow", here)
            patch.setattr("tapeout.validate.evidence.borrow", here)
            llama = write_model(work / "llama", "llama", {}, dtype="F32")
            bert = write_model(work / "bert", "bert", {}, dtype="F32")
            told = {}
            for name, kind, model in (
                ("gguf", target("cpu", threads=1), llama),
                ("onnx", target("cpu", threads=1, format="onnx"), llama),
                ("classes", target("cpu", threads=1, format="onnx"), "topics_v1"),
                ("states", target("cpu", threads=1, format="onnx"), bert),
            ):
                loose = LOOSE if model is llama else LOOSE.model_copy(update={"tokens": 400})
                recipe = Recipe.of({"tokens": 400}) if model == "topics_v1" else loose
                _, report = export(kind, model, work / name, recipe)
                told[name] = report.to_json()
            return told

    return once("pages", make)


@pytest.fixture(scope="module")
def reports(made: tuple[Path, dict[str, Any]]) -> dict[str, Report]:
    """Those of the packages, one as it would be with gates that did not pass, and one of which nothing is known."""
    found = {name: Report.read(made[0] / name / "report.json") for name in made[1]}
    whole = found["gguf"]
    layer = {"layer": "layers.0", "grown": 2e-7, "own": None, "limit": 1e-4, "parts": False}
    layer |= {"where": "layers.0.out", "op": "add"}
    layers = [layer, {**layer, "layer": "layers.1", "grown": 0.4, "parts": True}]
    layers.append({**layer, "layer": "lm_head", "grown": None})
    divergence = {"tokens": 7, "finding": "It parts there.", "first": "layers.1.out", "layers": layers}
    lost = {"prompt": "1+1=", "wanted": "2", "reference": "2", "other": "<script>alert(3)</script>"}
    tasks = {"tasks": 9, "reference_right": 9, "other_right": 8, "differing": 1, "examples": [lost]}
    string = {"text": "\u202eab\u0000", "source": [1, 2], "artifact": [3]}
    tokenizer = {"strings": 2400, "differing": 1, "examples": [string]}
    found["failed"] = replace(
        whole,
        gates=(
            *(gate for gate in whole.gates if gate.name not in ("lowering/runtime", "task")),
            FAILED,
            SKIPPED,
        ),
        findings={
            **whole.findings,
            "divergence": divergence,
            "tasks": tasks,
            "tokenizer": tokenizer,
            "not_finite": [
                {"gate": "decode", "finding": "the device gives NaN or infinite logits after token 3."}
            ],
        },
    )
    found["bench"] = replace(whole, throughput=measured(whole.throughput))
    found["bare"] = Report("m" * 60, "null", "int8", (SKIPPED, FAILED))
    return found


@pytest.fixture(scope="module")
def pages(reports: dict[str, Report], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    texts = {name: page(report) for name, report in reports.items()}
    texts["compare"] = comparison_page({name: report for name, report in reports.items() if name != "bare"})
    for name, text in texts.items():
        (place / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: place / f"{name}.html" for name in texts}


@pytest.mark.parametrize(
    "name", thinned(["gguf", "onnx", "classes", "states", "failed", "bench", "bare", "compare"])
)
def test_page(browser: Any, pages: dict[str, Path], name: str) -> None:
    for theme in THEMES:
        for screen, (width, height) in SCREENS.items():
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
            tab = context.new_page()
            asked: list[str] = []
            said: list[str] = []
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.on("console", lambda message, said=said: said.append(message.text))
            tab.on("pageerror", lambda error, said=said: said.append(str(error)))
            tab.goto(pages[name].as_uri())
            tab.screenshot(path=SCREENSHOTS / f"{name}-{screen}-{theme}.png", full_page=True)
            assert asked == [pages[name].as_uri()]
            assert said == []
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{screen} scrolls sideways"
            found = tab.evaluate(CONTRAST)
            assert len(found) > 20
            assert [each for each in found if each["ratio"] < each["least"]] == [], theme
            context.close()


def test_charts_are_drawn(browser: Any, pages: dict[str, Path]) -> None:
    tab = browser.new_page()
    for name, least in (
        ("gguf", 9),
        ("onnx", 10),
        ("failed", 10),
        ("classes", 6),
        ("states", 7),
        ("bench", 15),
        ("compare", 2),
    ):
        tab.goto(pages[name].as_uri())
        charts = tab.evaluate(
            "[...document.querySelectorAll('svg.chart')].map(s => ({said: s.ariaLabel, width: s.getBoundingClientRect().width,"
            " marks: [...s.querySelectorAll('.bar, .point, .curve')].filter(e => e.getBoundingClientRect().width > 0).length}))"
        )
        assert len(charts) >= least, name
        assert all(chart["said"] and chart["width"] > 100 and chart["marks"] for chart in charts), charts
    tab.close()


def test_tables_sort_by_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    tab = browser.new_page()
    tab.goto(pages["gguf"].as_uri())
    head = tab.locator("#gates th", has_text="measured")
    column = "[...document.querySelectorAll('#gates tbody tr')].map(row => row.cells[2].dataset.sort)"
    before = tab.evaluate(column)
    head.locator("button").focus()
    tab.keyboard.press("Enter")
    up = tab.evaluate(column)
    assert head.get_attribute("aria-sort") == "ascending"
    assert up == sorted(before, key=lambda text: (text == "", float(text or 0))) != before
    tab.keyboard.press("Enter")
    down = [float(text) for text in tab.evaluate(column) if text]
    assert head.get_attribute("aria-sort") == "descending"
    assert down == sorted(down, reverse=True)
    tab.close()


def test_it_prints(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    tab = browser.new_page(color_scheme="dark")
    tab.emulate_media(media="print")
    tab.goto(pages["gguf"].as_uri())
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    tab.pdf(path=SCREENSHOTS / "gguf.pdf")
    assert (SCREENSHOTS / "gguf.pdf").read_bytes().startswith(b"%PDF")
    tab.close()


def test_the_same_report_gives_the_same_page(
    reports: dict[str, Report], made: tuple[Path, dict[str, Any]]
) -> None:
    for name, raw in made[1].items():
        assert (made[0] / name / "report.html").read_text(encoding="utf-8") == page(reports[name])
        assert reports[name].to_json() == json.loads((made[0] / name / "report.json").read_text()) == raw


def test_reports_are_as_the_schema_says(reports: dict[str, Report]) -> None:
    schema = json.loads((files("tapeout.validate") / "data" / "report.schema.json").read_text())
    check = jsonschema.Draft202012Validator(schema)
    check.check_schema(schema)
    for name, report in reports.items():
        assert [error.message for error in check.iter_errors(report.to_json())] == [], name
    raw = reports["gguf"].to_json()
    found = raw["findings"]
    quality = found["comparisons"]["quality/kl"]
    places, states = found["alternatives"], reports["states"].findings["distances"]["quality/cosine"]
    for broken in (
        raw | {"findings": found | {"memory": {"points": [[1]], "peak_bytes": 1}}},
        raw | {"findings": found | {"layers": {"tokens": 0, "layers": []}}},
        raw | {"findings": found | {"evaluated": {"sequences": 1, "tokens": 1, "sha256": "1"}}},
        raw | {"findings": found | {"alternatives": places | {"rows": []}}},
        raw | {"findings": found | {"distances": {"quality/cosine": states | {"worst": [{}]}}}},
        raw | {"speed": 1},
        raw | {"provenance": raw["provenance"] | {"root_sha256": "1"}},
        raw | {"findings": found | {"stages": [{"name": "codes"}]}},
        raw | {"findings": found | {"comparisons": {"quality/kl": quality | {"counts": [-1]}}}},
    ):
        assert list(check.iter_errors(broken)), broken.keys()


def test_findings_are_those_of_the_gates(reports: dict[str, Report]) -> None:
    for name in ("gguf", "onnx", "classes"):
        report = reports[name]
        gates = {gate.name: gate for gate in report.gates}
        for gate, each in report.findings["comparisons"].items():
            if gates[gate].metric == "mean KL, nats":
                assert each["mean"] == pytest.approx(gates[gate].value, rel=1e-9)
            assert sum(each["counts"]) == each["tokens"] > 0
            assert [row["kl"] for row in each["worst"]] == sorted(
                (row["kl"] for row in each["worst"]), reverse=True
            )
            assert each["worst"][0]["kl"] == each["max"]
            for row in each["worst"]:
                assert 0 < sum(answer["p"] for answer in row["reference"]) <= 1 + 1e-12
        stages = [stage["name"] for stage in report.findings["stages"]]
        assert stages[:4] == ["quantize", "export", "codes", "lowering"]
        assert len(set(stages)) == len(stages)
    assert set(reports["gguf"].findings["comparisons"]) == {"quality/kl", "lowering/runtime"}
    for each in reports["states"].findings["distances"].values():
        assert (
            sum(each["counts"]) == each["count"] == reports["states"].findings["evaluated"]["sequences"] > 1
        )
        assert each["worst"][0]["value"] == each["max"] == max(row["value"] for row in each["worst"])
        assert each["worst"][0]["what"].startswith("[CLS]")
    assert "comparisons" not in reports["states"].findings
    names = set(load("topics_v1").config.labels)  # type: ignore[union-attr]
    worst = reports["classes"].findings["comparisons"]["quality/kl"]["worst"]
    assert {answer["text"] for row in worst for answer in row["reference"]} <= names
    tasks = reports["classes"].findings["tasks"]
    assert {gate.name: gate.value for gate in reports["classes"].gates}["task"] == tasks[
        "other_right"
    ] / tasks["tasks"]


def test_error_by_layer_memory_and_place(reports: dict[str, Report]) -> None:
    for name, depth, last in (("gguf", 2, "logits"), ("classes", 4, "output"), ("states", 2, "output")):
        found = reports[name].findings
        layers = found["layers"]["layers"]
        assert [row["layer"] for row in layers] == ["embedding", *(f"layers.{k}" for k in range(depth)), last]
        assert all(0 < row["error"] < 1 for row in layers)
        stages, memory = found["stages"], found["memory"]
        assert [stage["begin_s"] for stage in stages] == sorted(stage["begin_s"] for stage in stages)
        assert memory["peak_bytes"] == max(count for _, count in memory["points"])
        assert all(0 < stage["peak_bytes"] <= memory["peak_bytes"] for stage in stages)
        assert len(memory["points"]) <= 200
        (own,) = (row for row in found["alternatives"]["rows"] if row["this"])
        assert own["bytes"] == reports[name].provenance["artifact_bytes"]
        gate = next(gate for gate in reports[name].gates if gate.name.startswith("quality/"))
        assert (own["loss"], found["alternatives"]["measure"]) == (gate.value, gate.metric)
    # The second export of a model has the first one's record beside its own: the same codes, and so the same loss.
    rows = {row["format"]: row for row in reports["onnx"].findings["alternatives"]["rows"]}
    assert rows["gguf"]["loss"] == rows["onnx"]["loss"]
    assert not rows["gguf"]["this"]
    assert len(reports["gguf"].findings["alternatives"]["rows"]) == 1


@pytest.mark.parametrize("dark", [False, True])
def test_a_notebook_shows_it(
    browser: Any, reports: dict[str, Report], made: tuple[Path, dict[str, Any]], tmp_path: Path, dark: bool
) -> None:
    """As JupyterLab does: put into an element of a page that has a style of its own, in the theme that it has."""
    hostile = replace(reports["failed"], model="<img src=x onerror=alert(1)>", notes=("</div>",))
    whole, edited = Package.open(made[0] / "gguf"), Package.open(made[0] / "onnx")
    shutil.copytree(edited.directory, tmp_path / "edited")
    edited = replace(edited, directory=tmp_path / "edited")
    (edited.directory / "report.json").write_text("{}")
    shown = [hostile._repr_html_(), reports["bare"]._repr_html_(), whole._repr_html_(), edited._repr_html_()]
    ink, paper = ("#ddd", "#111111") if dark else ("#222", "#ffffff")
    style = f"body {{ background: {paper}; color: {ink} }} p {{ color: {ink} }} td {{ color: red }}"
    cells = "".join(f'<div class="jp-RenderedHTMLCommon">{text}</div>' for text in shown)
    path = tmp_path / "notebook.html"
    outer = '<p id="outside"><b class="failed">outside</b></p>'
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><title>notebook</title><style>{style}</style>{outer}{cells}',
        encoding="utf-8",
    )
    context = browser.new_context(viewport={"width": 700, "height": 900}, color_scheme="light")
    tab = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    tab.goto(path.as_uri())
    tab.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    tab.screenshot(path=SCREENSHOTS / f"notebook-{'dark' if dark else 'light'}.png", full_page=True)
    assert asked == [path.as_uri()]
    assert said == []
    assert tab.evaluate("document.querySelectorAll('img, script').length") == 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= 700
    found = tab.evaluate(CONTRAST)
    assert len(found) > 40
    assert [each for each in found if each["ratio"] < each["least"]] == []
    # Nothing of it is styled that is not in it.
    assert (
        tab.evaluate("getComputedStyle(document.querySelector('#outside b')).backgroundColor")
        == "rgba(0, 0, 0, 0)"
    )
    texts = tab.locator(".tapeout-report").all_inner_texts()
    assert "FAILED <img src=x onerror=alert(1)> → int8 → cpu" in texts[0]
    assert whole.manifest["root_sha256"] in texts[2]
    assert "PASSED" in texts[2]
    assert len(texts) == 3
    assert "is not a report" in tab.locator("body").inner_text()
    context.close()


def test_junit_tells_each_gate(reports: dict[str, Report], tmp_path: Path) -> None:
    loud = GateResult("codes", "failed", reason="it said \x1b[31mno\x1b[0m \ufffe & <left>")
    report = replace(reports["failed"], gates=(*reports["failed"].gates, loud))
    report.write(tmp_path)
    root = ElementTree.parse(tmp_path / "report.xml").getroot()
    (suite,) = root
    count = {"tests": str(len(report.gates)), "failures": "2", "skipped": "1", "errors": "0"}
    for element in (root, suite):
        assert {key: element.get(key) for key in count} == count
    cases = {case.get("name"): case for case in suite}
    skipped, failed = cases["task"].find("skipped"), cases["lowering/runtime"].find("failure")
    assert skipped is not None
    assert skipped.get("message") == SKIPPED.reason
    assert failed is not None
    assert failed.get("message") == FAILED.reason
    assert failed.text == f"mean KL, nats 0.4 (limit 0.0001). {FAILED.reason}"
    said = cases["codes"].find("failure")
    assert said is not None
    assert said.get("message") == "it said \ufffd[31mno\ufffd[0m \ufffd & <left>"
    assert cases["integrity"].find("system-out") is not None


def test_a_gate_without_a_figure_can_be_written(tmp_path: Path) -> None:
    gate = GateResult(
        "lowering/range", "failed", "share", float("nan"), 0.5, "it comes to nan, which is no figure."
    )
    Report("tiny", "apple", "int8", (gate,)).write(tmp_path)
    raw = json.loads((tmp_path / "report.json").read_text())
    assert raw["gates"][0]["value"] is None
    # A later version may say more of a gate: that is left out.
    raw["gates"][0]["unit"] = "1"
    (tmp_path / "report.json").write_text(json.dumps(raw))
    assert Report.read(tmp_path / "report.json").gates == (replace(gate, value=None),)


def test_the_layers_of_a_deep_model_fit(browser: Any, reports: dict[str, Report], tmp_path: Path) -> None:
    layers = [{"layer": "embedding", "error": 0.001}]
    layers += [{"layer": f"layers.{k}", "error": 0.01 + 0.02 * (k > 40) - 1e-4 * k} for k in range(80)]
    deep = {"tokens": 64, "layers": [*layers, {"layer": "logits", "error": 0.02}]}
    for name, changed, said in (
        ("deep", deep, "It grows most in layers.41: from 0.60% to 2.59%."),
        (
            "broken",
            {**deep, "layers": [*layers[:3], {"layer": "layers.2", "error": None}]},
            "layers.2 is the first that has NaN",
        ),
    ):
        path = tmp_path / f"{name}.html"
        report = replace(reports["gguf"], findings={**reports["gguf"].findings, "layers": changed})
        path.write_text(page(report), encoding="utf-8")
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        tab.goto(path.as_uri())
        assert said in tab.locator("main").inner_text()
        chart = tab.locator('svg[aria-label="difference from the original after each layer"]')
        assert chart.bounding_box()["height"] < 250
        assert chart.locator(".bar").count() == len(changed["layers"])  # type: ignore[arg-type]
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        chart.screenshot(path=SCREENSHOTS / f"layers-{name}.png")
        tab.close()


def test_markdown_fits_a_comment(reports: dict[str, Report]) -> None:
    text = markdown(reports["failed"])
    assert len(text) < 8000  # GitHub takes 65,536
    lines = text.splitlines()
    assert lines[0].startswith("❌ **FAILED** `llama` → `int8` → `cpu`: ")
    assert "Look first: lowering/runtime failed" in text
    rows = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}  # no reason breaks the table
    assert rows[2].startswith("| `lowering/runtime` | **failed** | 0.4 | 0.0001 |")
    assert rows[3].startswith("| `task` | skipped |")
    assert markdown(reports["gguf"]).startswith("✅ **PASSED**")


def test_nothing_that_a_model_says_is_a_tag(reports: dict[str, Report]) -> None:
    tag = "<img src=x onerror=alert(1)>"
    gate = GateResult("codes", "failed", "share", 0.5, 0.1, tag)
    whole = reports["failed"]
    layers = {"tokens": 1, "layers": [{"layer": tag, "error": 0.1}, {"layer": "output", "error": 0.2}]}
    tasks = {
        **whole.findings["tasks"],
        "examples": [dict.fromkeys(("prompt", "wanted", "reference", "other"), tag)],
    }
    states = reports["states"].findings["distances"]
    farthest = {"what": tag, "value": 1.0, "reference": tag, "other": tag}
    found = {
        **whole.findings,
        "layers": layers,
        "tasks": tasks,
        "distances": {gate: {**each, "worst": [farthest]} for gate, each in states.items()},
        "tokenizer": {
            "strings": 1,
            "differing": 1,
            "examples": [{"text": tag, "source": [1], "artifact": [2]}],
        },
        "stages": [{"name": tag, "seconds": 1.0, "begin_s": 0.0, "peak_bytes": 1}],
    }
    hostile = replace(
        whole, model=f"`{tag}\n# head", gates=(*whole.gates, gate), notes=(tag,), findings=found
    )
    for text in (page(hostile), hostile._repr_html_(), comparison_page({tag: hostile, "two": whole})):
        assert "<img" not in text
        assert "&lt;img" in text
    lines = markdown(hostile).splitlines()
    assert lines[0].startswith(f"❌ **FAILED** `'{tag} # head` → ")
    assert not any("<img" in line for line in lines[1:])
    assert "<img" not in comparison_markdown({tag: hostile, "two": whole})


@pytest.mark.parametrize(
    ("gate", "used"),
    [
        (GateResult("a", "passed", "", 0.02, 0.1), 0.2),
        (GateResult("a", "failed", "", 0.3, 0.1), 3.0),
        (GateResult("a", "passed", "", 0.9, 0.8), 0.5),  # at least
        (GateResult("a", "failed", "", 0.6, 0.8), 2.0),
        (GateResult("a", "passed", "perplexity / original's", 1.04, 1.08), 0.5),
        (GateResult("a", "passed", "perplexity / original's", 0.99, 1.08), 0.0),
        (GateResult("a", "passed", "", 0.0, 0.0), None),
        (GateResult("a", "failed", "", float("nan"), 0.1), None),
        (GateResult("a", "skipped"), None),
    ],
)
def test_share_of_a_limit(gate: GateResult, used: float | None) -> None:
    assert gate.used == (None if used is None else pytest.approx(used))


def test_compare_on_the_command_line(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    one, other = made[0] / "gguf", made[0] / "onnx"
    done = tapeout("compare", one, other, "--html", tmp_path / "deep" / "both.html", status=0)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert rows[0] == ["", "gguf", "onnx"]
    assert ["verdict", "passed", "passed"] in rows
    (codes,) = (row for row in rows if row[0].startswith("codes"))
    assert codes[1] == codes[2] == made[1]["gguf"]["provenance"]["codes_sha256"][:16]
    assert "same canonical codes" in (tmp_path / "deep" / "both.html").read_text()
    found = json.loads(tapeout("compare", one, other, "--json", status=0).stdout)
    assert found["packages"] == ["gguf", "onnx"]
    assert len(found["rows"]) == len(rows) - 2


def test_what_cannot_be_compared(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(made[0] / "gguf", tmp_path / "copied"))
    assert "two packages or more, found 1" in tapeout("compare", copied, status=2).stderr
    raw = json.loads((copied / "report.json").read_text())
    (copied / "report.json").write_text(json.dumps(raw | {"scheme": "int4-g32"}))
    assert (
        "is not the report that the package was made with"
        in tapeout("compare", copied, made[0] / "gguf", status=2).stderr
    )
    (copied / "report.json").write_text(json.dumps(raw | {"format_version": 2}))
    assert "upgrade it" in tapeout("compare", copied, made[0] / "gguf", status=2).stderr
