"""What a plan says, against what runs here and against the measurements that are kept: benchmarks/results/plan.txt."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from thinned import thinned

from tapeout import targets
from tapeout.generated import LLAMA_1B, LLAMA_7B, write_config, write_model
from tapeout.models import load
from tapeout.plan_check import LIMITS, files_bytes, filled, planned
from tapeout.quantize import quantize
from tapeout.targets.local import Local
from tapeout.validate.throughput import machine
from tapeout.validate.worker import open_session

Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "plan.txt"
SHAPES = {"1b": LLAMA_1B, "7b": LLAMA_7B}
# Sessions of other targets are emulated here, or on a GPU, which has a memory of its own.
HERE = [
    way for name in targets.names() for way, kind in targets.variants(name).items() if isinstance(kind, Local)
]
# 144 million weights: files and caches weigh ten times what else a process grows by.
FIELDS = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 7, "num_attention_heads": 16,
    "num_key_value_heads": 8, "max_position_embeddings": 256,
}  # fmt: skip
SCHEME, CONTEXT = "int8", 256


def kept() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Shape, row and machine of every measurement that tells the bandwidth that it was made at."""
    told = [
        json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines() if line.startswith("{")
    ]
    return [
        (each["shape"], row, each["machine"])
        for each in told
        for row in each["rows"]
        if "bandwidth_bytes_per_s" in row
    ]


def test_measurements_are_kept_of_both_formats_and_both_sizes() -> None:
    found = {(shape, row["target"]) for shape, row, _ in kept()}
    assert found >= {(shape, target) for shape in SHAPES for target in ("cpu", "cpu --format onnx")}
    assert len({row["context"] for shape, row, _ in kept() if shape == "1b"}) >= 2


@pytest.mark.parametrize(
    ("shape", "row", "here"),
    kept(),
    ids=[f"{shape}-{row['target']}-{row['scheme']}-{row['context']}" for shape, row, _ in kept()],
)
def test_a_plan_is_near_to_what_was_measured(
    shape: str, row: dict[str, Any], here: dict[str, Any], tmp_path: Path
) -> None:
    """As plan reckons today, from the shape and from the bandwidth and the machine of that day."""
    config = write_config(tmp_path / shape, "llama", SHAPES[shape])
    told = planned(config, row["target"], row["scheme"], row["context"], row["bandwidth_bytes_per_s"], here)
    # The tokenizer that stands in beside a config is larger than the benchmark's own, which has few tokens.
    for key, value in row["measured"].items():
        assert told[key] == pytest.approx(value, rel=LIMITS[key]), key


@pytest.fixture(scope="module")
def made(once: Once) -> Path:
    """``model``, and its codes in the store."""

    def make(work: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TAPEOUT_CACHE", str(work / "cache"))
            quantize(load(write_model(work / "model", "llama", FIELDS)), SCHEME)

    return once("plan-check", make)[0]


@pytest.mark.parametrize("way", thinned(HERE, alike=lambda way: "onnx" in way))
def test_what_runs_here(way: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Size and memory within their limits; no speed, which other work on the machine changes."""
    kind = targets.at(targets.variants(way.split()[0])[way], CONTEXT)
    if why := kind.missing():
        pytest.skip(why)
    monkeypatch.setenv("TAPEOUT_CACHE", str(made / "cache"))
    quant = quantize(load(made / "model"), SCHEME)
    target = replace(kind, threads=1)  # type: ignore[type-var]  # a worker of xdist has one core
    artifact = target.export(quant, tmp_path)
    with open_session(target.session(artifact)) as session:
        memory, _ = filled(session, CONTEXT, 1)
    told = planned(quant.model, way, SCHEME, CONTEXT, 1e10, machine() | {"cores": 1})
    assert files_bytes(artifact) > 100e6
    assert told["size"] == pytest.approx(files_bytes(artifact), rel=LIMITS["size"])
    assert told["memory"] == pytest.approx(memory, rel=LIMITS["memory"])
