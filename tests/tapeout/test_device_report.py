"""What a device found, in the report of any target's package."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from commands import tapeout
from rich.console import Console

from tapeout.build import export, target
from tapeout.device_report import DeviceReport
from tapeout.errors import PackageError
from tapeout.generated import write_model
from tapeout.pack import Package
from tapeout.recipe import Recipe
from tapeout.validate import Report
from tapeout.validate.report import device_table

pytest.importorskip("transformers")

LOOSE = Recipe.of({"tokens": 40, "limits": {"kl": 1e3, "top1": 0.0, "perplexity": 1e3}})
NOT_RUN = "checked by the interpreter; not run on Apple hardware"


@pytest.fixture(autouse=True)
def _no_workers(monkeypatch: pytest.MonkeyPatch, here: Any) -> None:
    monkeypatch.setattr("tapeout.validate.worker.borrow", here)
    monkeypatch.setattr("tapeout.validate.evidence.borrow", here)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, here: Any) -> Package:
    """A package of a target that knows nothing of devices' reports."""
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPEOUT_CACHE", str(work / "cache"))
        patch.setattr("tapeout.validate.worker.borrow", here)
        patch.setattr("tapeout.validate.evidence.borrow", here)
        model = write_model(work / "small", "llama", {"num_hidden_layers": 1}, dtype="F32")
        made, report = export(target("null"), model, work / "package", LOOSE)
    assert report.passed
    return made


def gate(name: str, status: str = "passed", **fields: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {"metric": "mean KL, nats", "value": 2e-4, "limit": 2e-3, "reason": "why"}
    return {"name": name, "status": status, **usual, **fields}


def found(package: Package, **fields: Any) -> dict[str, Any]:
    """A device report with a decoder's unit and an encoder's."""
    times = {"token_p50_s": 0.02, "token_p90_s": 0.025, "token_p99_s": 0.03, "samples": 96}
    rates = {"prefill_tokens_per_s": 812.5, "decode_tokens_per_s": 50.0, "first_token_s": 0.04}
    run = {"run_p50_s": 0.008, "run_p90_s": 0.009, "run_p99_s": 0.01, "samples": 20}
    beside = {"load_s": 1.5, "first_run_s": 0.25}
    units = {
        "gpu": {
            "gates": [gate("load"), gate("golden-decode")],
            "throughput": {
                **beside, "peak_resident_bytes": 321_000_000, "contexts": [{"context": 128, **times, **rates}]
            },
        },
        "ne-2": {
            "gates": [gate("golden", "skipped", value=None, limit=None, metric="", reason="no prompts")],
            "throughput": {
                **beside,
                "peak_resident_bytes": None,
                "encodings": [{"batch": 4, "context": 16, **run, "sequences_per_s": 500.0, "tokens_per_s": 8000.0}],
            },
        },
    }  # fmt: skip
    return {
        "format_version": 1,
        "root_sha256": package.manifest["root_sha256"],
        "device": {
            "machine": "Mac14,6",
            "system": "macOS 15.1",
            "chip": "Apple M2 Max",
            "memory_bytes": 64 << 30,
        },
        "runtime": "coremltools 9.0",
        "units": units,
        **fields,
    }


def written(path: Path, raw: Any) -> Path:
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return path


def test_gates_and_speed_stand_in_every_form(package: Package, tmp_path: Path) -> None:
    told = written(tmp_path / "told.json", found(package))
    arguments = ("validate", package.directory, "--device-report", told)
    done = tapeout(*arguments, "--report", tmp_path / "out", "--json", status=0)
    report = json.loads(done.stdout)
    jsonschema.validate(
        report, json.loads((files("tapeout.validate") / "data/report.schema.json").read_text())
    )
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    gates = {each["name"]: each for each in report["gates"]}
    assert gates["device/gpu/golden-decode"] == gate("device/gpu/golden-decode")
    assert gates["device/ne-2/golden"]["status"] == "skipped"
    assert gates["golden"]["status"] == "passed"  # those of this machine are there as before
    assert report["throughput"]["contexts"]
    assert report["device"]["chip"] == "Apple M2 Max"
    assert report["device"]["units"]["gpu"]["contexts"][0]["decode_tokens_per_s"] == 50.0
    assert report["notes"][-1] == "run on Apple M2 Max, macOS 15.1 (gpu): device_report.json"
    page = (tmp_path / "out" / "report.html").read_text()
    for words in (
        "On the device",
        "device/gpu/golden-decode",
        "coremltools 9.0 on Apple M2 Max (Mac14,6)",
        "4 × 16",
    ):
        assert words in page
    assert re.search(r'<td>gpu</td><td class="n">1.5</td>\s*<td class="n">321</td>', page)
    suite = ElementTree.parse(tmp_path / "out" / "report.xml").getroot()
    assert {"device/gpu/load", "device/ne-2/golden"} <= {
        str(case.get("name")) for case in suite.iter("testcase")
    }
    assert Report.read(tmp_path / "out" / "report.json").to_json() == report
    console = Console(width=200)
    with console.capture() as capture:
        console.print(device_table(report["device"]))
    for words in (
        "20.00 / 25.00 / 30.00 ms",
        "812.5 tokens/s",
        "50.0 tokens/s",
        "321 MB",
        "4 × 16",
        "8000 tokens/s",
    ):
        assert words in capture.get()
    assert "coremltools 9.0 on Apple M2 Max, macOS 15.1" in done.stderr


def test_a_gate_that_failed_on_the_device_fails_the_report(package: Package, tmp_path: Path) -> None:
    raw = found(package)
    raw["units"]["gpu"]["gates"].append(gate("golden-prefill", "failed", value=0.5))
    told = written(tmp_path / "told.json", raw)
    done = tapeout("validate", package.directory, "--device-report", told, "--json", status=1)
    assert json.loads(done.stdout)["passed"] is False
    tapeout("validate", package.directory, status=0)  # without it, the package is as good as before


def test_the_model_does_not_change_what_the_device_found(package: Package, tmp_path: Path) -> None:
    told = written(tmp_path / "told.json", found(package))
    model = package.directory.parent / "small"
    done = tapeout(
        "validate", package.directory, "--model", model, "--device-report", told, "--json", status=0
    )
    gates = {each["name"]: each["status"] for each in json.loads(done.stdout)["gates"]}
    assert gates["codes"] == gates["device/gpu/load"] == "passed"


def test_what_was_emulated_and_then_ran_is_not_said_to_be_emulated(package: Package, tmp_path: Path) -> None:
    report = replace(Report.read(package.directory / "report.json"), notes=("one", NOT_RUN))
    raw = found(package)
    merged = DeviceReport.read(written(tmp_path / "ran.json", raw), package).merged(report)
    assert merged.notes == ("one", "run on Apple M2 Max, macOS 15.1 (gpu): device_report.json")
    for each in raw["units"].values():
        each["gates"] = [gate("load", "failed", reason="no plan")]
    nowhere = DeviceReport.read(written(tmp_path / "nowhere.json", raw), package).merged(report)
    assert nowhere.notes == (
        "one",
        NOT_RUN,
        "nothing of it ran on Apple M2 Max, macOS 15.1: device_report.json",
    )


def of_another(raw: dict[str, Any]) -> Any:
    return raw | {"root_sha256": "0" * 64}


def edited(raw: dict[str, Any]) -> Any:
    raw["units"]["gpu"]["gates"][0] |= {"value": None}
    return raw


def unexplained(raw: dict[str, Any]) -> Any:
    raw["units"]["gpu"]["gates"][0] |= {"status": "failed", "reason": ""}
    return raw


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (of_another, r"is of another package: it was made of the root digest 0000000000000000…, .* has [0-9a-f]{16}…"),
        (lambda raw: raw | {"format_version": 2}, "has format_version 2; this tapeout reads up to 1: upgrade it"),
        (lambda raw: raw | {"format_version": 0}, r"is not a whole device report: format_version: "),
        (lambda raw: json.dumps(raw)[:300], "is not a device report: Expecting"),
        (lambda raw: [], "is not a device report: it is no JSON object"),
        (lambda raw: raw | {"units": {}}, "is not a whole device report: units: "),
        (lambda raw: raw | {"units": {"a/b": raw["units"]["gpu"]}}, r"is not a whole device report: units\.a/b"),
        (lambda raw: raw | {"more": 1}, "is not a whole device report: more: Extra inputs"),
        (edited, r"units\.gpu\.gates\.0: Value error, a gate that passed has a value and a limit"),
        (unexplained, r"units\.gpu\.gates\.0: Value error, a gate that did not pass says why"),
    ],
)  # fmt: skip
def test_reports_that_are_refused(
    package: Package, tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], words: str
) -> None:
    told = written(tmp_path / "told.json", spoil(found(package)))
    with pytest.raises(PackageError, match=words):
        DeviceReport.read(told, package)
    done = tapeout("validate", package.directory, "--device-report", told, status=2)
    line, page = done.stderr.splitlines()
    assert page.startswith("see: tapeout docs ")
    assert line.startswith(f"tapeout: {told} ")


def test_a_report_that_is_not_there(package: Package, tmp_path: Path) -> None:
    done = tapeout("validate", package.directory, "--device-report", tmp_path / "none.json", status=2)
    assert "none.json cannot be read: No such file or directory." in done.stderr
