"""NVIDIA's format onnx-trt as packages: gates, engines, what a missing or a dying builder leaves; and engines by TensorRT-RTX where it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tapeout import environments
from tapeout.environments import ENVIRONMENTS
from tapeout.errors import MissingToolchain, PackageError, RuntimeCrash, TapeoutError
from tapeout.exporters import onnx
from tapeout.models import load
from tapeout.quantize import Quantized, quantize
from tapeout.targets import tensorrt_engine as engines
from tapeout.targets.nvidia import Nvidia

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

RTX = ENVIRONMENTS["tensorrt-rtx"]
built = pytest.mark.skipif(not RTX.installed, reason=RTX.command)


@pytest.fixture
def quant(make_model: Callable[..., Path]) -> Quantized:
    return quantize(load(make_model("llama", hidden_size=128, head_dim=16)), "int4-g32")


@pytest.fixture
def no_toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPEOUT_ENVIRONMENTS", str(tmp_path / "nowhere"))


def trt(**flags: object) -> Nvidia:
    return Nvidia(format="onnx-trt", **flags)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_toolchain")
def test_without_a_toolchain_the_graph_is_written(quant: Quantized, tmp_path: Path) -> None:
    artifact = trt(engine="auto").export(quant, tmp_path / "out")
    (note,) = [note for note in artifact.notes if note.startswith("skipped")]
    assert "tensorrt is not installed" in note
    assert "tapeout env create tensorrt-rtx" in note
    assert {"model.onnx", "engine.json", "build_engine.py"} <= set(artifact.files)
    assert not (tmp_path / "out" / "model.plan").exists()
    for engine, command in (
        ("tensorrt", "pip install tensorrt"),
        ("tensorrt-rtx", "tapeout env create tensorrt-rtx"),
    ):
        with pytest.raises(MissingToolchain, match=command) as failure:
            trt(engine=engine).export(quant, tmp_path / engine)
        assert failure.value.status == 3
        assert not (tmp_path / engine).exists()


def test_profiles_have_the_flags_shapes(quant: Quantized, tmp_path: Path) -> None:
    device = trt(engine="none", max_batch=3, prefill_chunk=32, context=64, workspace="2G", builder_level=1)
    artifact = device.export(quant, tmp_path / "out")
    assert artifact.context == 64
    said = json.loads((tmp_path / "out" / "engine.json").read_text())
    assert (said["workspace_bytes"], said["builder_level"]) == (2 * 10**9, 1)
    prefill, decode = (profile["shapes"] for profile in said["profiles"])
    assert prefill["input_ids"] == [[1, 1], [1, 32], [3, 32]]
    assert decode["input_ids"] == [[1, 1], [1, 1], [3, 1]]
    assert prefill["logits_at"] == [[1], [1], [32]]
    heads = quant.model.decoder.num_kv_heads
    assert decode["past_key_values.0.key"] == [[1, heads, 0, 16], [1, heads, 32, 16], [3, heads, 63, 16]]
    assert decode["attention_mask"] == [[1, 1], [1, 33], [3, 64]]
    assert set(prefill) == {each.name for each in onnx.inputs(tmp_path / "out")}


def test_bad_flags_are_named() -> None:
    with pytest.raises(TapeoutError, match="--builder-level is 9; what fits: 0 … 5"):
        trt(builder_level=9)
    with pytest.raises(TapeoutError, match="'lots' is not a size"):
        trt(workspace="lots")
    with pytest.raises(TapeoutError, match="--max-batch is 0"):
        trt(max_batch=0)


@pytest.mark.parametrize(
    ("script", "how"),
    [
        ("import sys; print('one\\ntwo', file=sys.stderr); sys.exit(3)", "failed: one / two"),
        ("import os; os.abort()", "died of signal 6: it said nothing"),
        (
            "import sys, time; print('still here', file=sys.stderr, flush=True); time.sleep(60)",
            "did not end within",
        ),
    ],
)
def test_a_builder_that_dies_is_a_finding(quant: Quantized, tmp_path: Path, script: str, how: str) -> None:
    out = tmp_path / "out"
    trt(engine="none").export(quant, out)
    (out / "build_engine.py").write_text(script)
    with pytest.raises(RuntimeCrash, match=how) as failure:
        engines.build(engines.Builder("a builder", sys.executable), out, timeout_s=1.5)
    assert "--engine none" in str(failure.value)
    assert "build_engine.py" in str(failure.value)
    assert not list(out.glob("model.plan*"))


def plan_of(directory: Path, *, turned: bool, joined: int) -> None:
    """A plan that holds the codes behind other bytes, each row ``joined`` widths behind the one before."""
    rng = np.random.default_rng(0)
    content = [rng.integers(0, 256, 1000, np.uint8)]
    for codes in engines._codes(directory).values():
        rows, width = codes.shape(turned=turned)
        wide = rng.integers(0, 256, (rows, width * joined), np.uint8)
        wide[:, :width] = codes.rows(0, rows, turned=turned)
        content.append(wide.reshape(-1))
    (directory / "model.plan").write_bytes(np.concatenate(content).tobytes())


@pytest.mark.parametrize(("turned", "joined"), [(False, 1), (True, 1), (False, 3), (True, 2)])
def test_codes_are_found_however_they_lie(
    quant: Quantized, tmp_path: Path, turned: bool, joined: int
) -> None:
    trt(engine="none").export(quant, tmp_path)
    plan_of(tmp_path, turned=turned, joined=joined)
    found, matrices = engines.places(tmp_path)
    assert len(found) == matrices == len([1 for scheme in quant.schemes.values() if scheme.bits])
    assert {place.turned for place in found.values()} == {turned}
    # A nibble of one matrix is another: of that one alone nothing is found.
    plan = tmp_path / "model.plan"
    content = bytearray(plan.read_bytes())
    name, place = next(iter(found.items()))
    content[place.at + place.stride] ^= 0x10
    plan.write_bytes(content)
    assert set(found) - set(engines.places(tmp_path)[0]) == {name}


@built
def test_an_engine_without_a_gpu(quant: Quantized, tmp_path: Path) -> None:
    device = trt(engine="tensorrt-rtx", timing_cache=str(tmp_path / "timing"), builder_level=0)
    artifact = device.export(quant, tmp_path / "out")
    matrices = len([1 for scheme in quant.schemes.values() if scheme.bits])
    (note,) = [note for note in artifact.notes if "model.plan" in note]
    assert f"the codes of {matrices} of {matrices} matrices stand in it byte for byte" in note
    assert {"model.plan", "model.plan.json"} <= set(artifact.files)
    assert (tmp_path / "timing").stat().st_size > 0
    names = [name for name, _ in device.read_codes(artifact, quant)]
    assert set(names) == set(quant)
    # An engine that was changed is not.
    plan, found = (
        tmp_path / "out" / "model.plan",
        json.loads((tmp_path / "out" / "model.plan.json").read_text()),
    )
    content, place = bytearray(plan.read_bytes()), next(iter(found["codes"].values()))
    content[place["at"]] ^= 1
    plan.write_bytes(content)
    with pytest.raises(PackageError, match="does not hold the codes of"):
        list(device.read_codes(artifact, quant))


@built
def test_what_the_parser_refuses_is_said(quant: Quantized, tmp_path: Path) -> None:
    trt(engine="none").export(quant, tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    who = engines.Builder("TensorRT-RTX", str(environments.python("tensorrt-rtx")))
    with pytest.raises(RuntimeCrash, match="the parser refuses"):
        engines.build(who, tmp_path)


@pytest.mark.device
def test_an_engine_of_tensorrt_runs(quant: Quantized, tmp_path: Path) -> None:
    """On a machine with a GPU and TensorRT: the engine, prefill and decode, is the graph on onnxruntime."""
    reason = engines._tensorrt()
    if reason:
        pytest.skip(reason)
    device = trt(engine="tensorrt")
    artifact = device.export(quant, tmp_path / "out")
    spec = device.session(artifact)
    assert spec.factory == "tapeout.targets.tensorrt_run:open_session"
    engine = spec.imported()(**spec.arguments)
    from tapeout.targets.onnxruntime_typed import open_session

    graph = open_session(**spec.arguments)
    ids = [(i * 37 + 11) % 256 for i in range(40)]
    expected = graph.prefill(ids)
    logits = np.concatenate([engine.prefill(ids[:30]), [engine.decode(token) for token in ids[30:]]])
    # Each is off by the roundings of three dozen values, by 2^-11 / sqrt(3) of them; the largest logit by four deviations.
    assert np.abs(logits - expected).max() / expected.std() < 4 * 2.0**-11 / 3**0.5 * 72**0.5
