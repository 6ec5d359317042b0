"""A report shows its package among what was measured of the same model on the same tokens, and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tapeout.exporters import Artifact
from tapeout.files import cache_directory
from tapeout.generated import write_model
from tapeout.models import Model, load
from tapeout.positions import placed
from tapeout.quantize import SCHEMES, Quantized, quantize
from tapeout.targets.null import Null
from tapeout.validate.page import page
from tapeout.validate.report import GateResult, Report

TEXT, OTHER = "a" * 64, "b" * 64  # digests of what was evaluated
Place = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_model(tmp_path_factory.mktemp("positions") / "tiny", "llama", {}, dtype="F32"))


@pytest.fixture
def place(model: Model, tmp_path: Path) -> Place:
    """``place(scheme, loss, size)`` exports and gives ``findings.alternatives`` of the report."""

    def export(
        scheme: str, loss: float | None, size: int = 1000, evaluated: str = TEXT, **how: Any
    ) -> dict[str, Any]:
        quant = quantize(model, scheme, **how)
        return dict(reported(quant, tmp_path, loss, size, evaluated).findings.get("alternatives", {}))

    return export


def reported(quant: Quantized, work: Path, loss: float | None, size: int, evaluated: str = TEXT) -> Report:
    directory = work / "artifact"
    directory.mkdir(exist_ok=True)
    (directory / "file").write_bytes(bytes(size))
    artifact = Artifact("plain", directory, ("file",), 256, 0, {}, ())
    gate = GateResult("quality/kl", "passed", "mean KL, nats", loss, 0.1)
    findings = {"evaluated": {"sequences": 1, "tokens": 9, "sha256": evaluated}}
    return placed(
        Report("tiny", "null", quant.scheme.name, (gate,), findings=findings), artifact, quant, Null()
    )


def shown(found: dict[str, Any]) -> list[tuple[str, int, float, bool]]:
    return [(row["scheme"], row["bytes"], row["loss"], row["this"]) for row in found["rows"]]


def test_by_size_and_the_package_is_marked(place: Place) -> None:
    assert shown(place("int8", 0.001, 2000)) == [("int8", 2000, 0.001, True)]
    found = place("int4-g32", 0.05, 1000)
    assert found["measure"] == "mean KL, nats"
    assert shown(found) == [("int4-g32", 1000, 0.05, True), ("int8", 2000, 0.001, False)]
    # The same choice again takes its own place, and another rounding or another mix of schemes is another choice.
    assert len(place("int4-g32", 0.04, 1000)["rows"]) == 2
    assert len(place("int4-g32", 0.03, 1000, rounding="hqq")["rows"]) == 3
    mixed = place("int4-g32", 0.02, 1100, overrides={"model.layers.0.mlp.*": "int8"})["rows"]
    assert [row["mixed"] for row in mixed if row["this"]] == [True]
    assert [row["mixed"] for row in mixed if not row["this"]] == [False] * 3


def test_only_what_can_be_compared(place: Place, tmp_path: Path) -> None:
    place("int8", 0.001)
    assert len(place("int4-g32", 0.05, evaluated=OTHER)["rows"]) == 1  # other tokens
    assert place("nf4", None) == {}
    assert place("nf4", math.nan) == {}
    other = load(write_model(tmp_path / "other", "llama", {}, dtype="F32", seed=9))
    assert (
        len(reported(quantize(other, "int8"), tmp_path, 0.1, 10).findings["alternatives"]["rows"]) == 1
    )  # other weights


def test_what_is_no_record_is_passed_over(place: Place) -> None:
    place("int8", 0.001)
    (record,) = (cache_directory() / "positions").glob("*/*.json")
    raw = json.loads(record.read_text())
    for name, text in {
        "cut": record.read_text()[:40],
        "list": "[]",
        "newer": json.dumps(raw | {"format_version": 2}),
        "words": json.dumps(raw | {"bytes": "many"}),
        "lacks": json.dumps({key: value for key, value in raw.items() if key != "loss"}),
    }.items():
        record.with_name(f"{name}.json").write_text(text)
    record.with_name("good.json").write_text(json.dumps(raw | {"scheme": "nf4"}))
    assert [row["scheme"] for row in place("int4-g32", 0.05)["rows"]] == ["int8", "nf4", "int4-g32"]


def test_a_file_in_the_way_loses_no_export(place: Place) -> None:
    cache_directory().mkdir(parents=True, exist_ok=True)
    (cache_directory() / "positions").write_text("")
    assert len(place("int8", 0.001)["rows"]) == 1


def test_schemes_that_were_not_measured_have_their_bits(place: Place, model: Model) -> None:
    found = {each["scheme"]: each["bits"] for each in place("int8", 0.001)["unmeasured"]}
    assert "int8" not in found
    assert "none" not in found
    # Of matrices: all but embedding and head, which take int8, as the scheme says.
    matrices = {name: spec for name, spec in model.specs.items() if spec.role.is_matrix}
    bits = {
        name: (
            SCHEMES["int8"] if "embed" in name or "lm_head" in name else SCHEMES["int4-g32"]
        ).bits_per_weight(spec.shape[1])
        * math.prod(spec.shape)
        for name, spec in matrices.items()
    }
    count = sum(math.prod(spec.shape) for spec in matrices.values())
    assert found["int4-g32"] == pytest.approx(sum(bits.values()) / count, abs=5e-4)
    assert list(found.values()) == sorted(found.values())


def test_a_long_list_is_cut_but_for_this_target(place: Place) -> None:
    place("int8", 0.001)
    (record,) = (cache_directory() / "positions").glob("*/*.json")
    raw = json.loads(record.read_text())
    for at in range(60):
        record.with_name(f"x{at}.json").write_text(json.dumps(raw | {"target": "other", "bytes": at}))
    rows = place("int4-g32", 0.05, 500)["rows"]
    assert len(rows) == 40
    assert {row["scheme"] for row in rows if row["target"] == "null"} == {"int8", "int4-g32"}


def test_the_page_says_which_lose_to_another(model: Model, tmp_path: Path) -> None:
    for scheme, loss, size in (("int8", 0.001, 2000), ("nf4", 0.06, 1500), ("int4-g64", 0.0, 1800)):
        reported(quantize(model, scheme), tmp_path, loss, size)
    report = reported(quantize(model, "int4-g32"), tmp_path, 0.05, 1000)
    text = page(report)
    table = text[text.index('<table class="sort" id="alternatives">') :]
    rows = table[: table.index("</table>")].split("<tr>")[2:]
    told = {row.split('<th scope="row">')[1].split("<")[0]: row for row in rows}
    assert list(told) == ["int4-g32", "nf4", "int8", "int4-g64"]  # what has no loss at all is in no chart
    beaten = {name for name, row in told.items() if "another is no larger and loses less" in row}
    assert beaten == {"nf4", "int8"}
    assert "this package" in told["int4-g32"]
    hostile = replace(
        report, findings={**report.findings, "alternatives": {**report.findings["alternatives"]}}
    )
    hostile.findings["alternatives"]["rows"][0]["format"] = "<script>alert(1)</script>"
    assert "<script>alert(1)" not in page(hostile)
