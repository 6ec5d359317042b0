"""What int8 inputs cost shows in the quality gate, and so does what SmoothQuant saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from tapeout.generated import write_model
from tapeout.models import load
from tapeout.quantize import Calibration, quantize
from tapeout.targets.null import Null
from tapeout.validate import Limits, gates
from tapeout.validate.evidence import Evidence

pytest.importorskip("transformers")

OUTLIERS, TIMES = [5, 17, 40], 50.0


def with_outliers(directory: Path) -> Path:
    """A model some of whose normed channels are TIMES as large as the rest, and the columns that read them as much smaller.

    The function is that of the model without; trained networks look like that (SmoothQuant, section 3).
    """
    path = write_model(directory, "llama", dtype="F32") / "model.safetensors"
    tensors = load_file(path)
    for name, values in tensors.items():
        if name.endswith("layernorm.weight"):
            values[OUTLIERS] *= TIMES
        elif name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            values[:, OUTLIERS] /= TIMES
    save_file(tensors, path, {"format": "pt"})
    return directory


@pytest.mark.slow
def test_smoothquant_shows_in_the_quality_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Any
) -> None:
    monkeypatch.setattr("tapeout.validate.worker.open_session", here)
    monkeypatch.setattr(
        "tapeout.validate.corpus.hostile", lambda _: []
    )  # no tokenizer is asked anything here
    model = load(with_outliers(tmp_path / "outliers"))
    kl = {}
    for scheme in ("int8", "w8a8", "w8a8-static"):
        for rounding in ("rtn", "smoothquant"):
            place = tmp_path / scheme / rounding
            (place / "artifact").mkdir(parents=True)
            data = None if rounding == "rtn" and scheme != "w8a8-static" else Calibration(None, 8, 128)
            quant = quantize(model, scheme, rounding=rounding, calibration=data, out=place / "codes")
            artifact = Null().export(quant, place / "artifact")
            evidence = Evidence(artifact, model, quant, Null(), place, tokens=200)
            found = gates.quality(evidence, Limits())
            evidence.close()
            assert found[0].name == "quality/kl"
            kl[scheme, rounding] = found[0].value or 0.0
    # Inputs cost at all; one step for all tokens more than one for each; and smoothed ones cost a small part.
    assert kl["int8", "rtn"] < 0.25 * kl["w8a8", "rtn"]
    assert kl["w8a8", "rtn"] < 0.5 * kl["w8a8-static", "rtn"]
    assert kl["w8a8", "smoothquant"] < 0.1 * kl["w8a8", "rtn"]
    assert kl["w8a8-static", "smoothquant"] < 0.1 * kl["w8a8-static", "rtn"]
