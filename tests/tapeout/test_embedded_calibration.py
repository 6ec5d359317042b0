"""The embedded models calibrate on their own text, and still know what they were made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.models import load
from tapeout.quantize import Calibration, quantize
from tapeout.targets.null import Null
from tapeout.validate import Limits, gates
from tapeout.validate.evidence import Evidence

pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rounding"), [("arithmetic", "gptq"), ("count", "awq")])
def test_tasks_survive_calibrated_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Any, name: str, rounding: str
) -> None:
    monkeypatch.setattr("tapeout.validate.worker.open_session", here)
    monkeypatch.setattr("tapeout.validate.corpus.hostile", lambda _: [])
    model = load(name)
    quant = quantize(model, "int4-g32", rounding=rounding)
    (tmp_path / "artifact").mkdir()
    evidence = Evidence(Null().export(quant, tmp_path / "artifact"), model, quant, Null(), tmp_path)
    found = [*gates.task(evidence, Limits()), *gates.quality(evidence, Limits())]
    evidence.close()
    assert {gate.name: gate.status for gate in found} == dict.fromkeys(
        ("task", "quality/kl", "quality/top1", "quality/perplexity"), "passed"
    )


@pytest.mark.parametrize("name", ["arithmetic", "count", "formula", "text2sql"])
def test_the_default_text_is_the_models_own(name: str) -> None:
    model = load(name)
    own = model.directory / "calibration.txt"
    assert np.array_equal(Calibration().tokens(model), Calibration(own).tokens(model))
    assert Calibration().tokens(model).shape[0] > 30
