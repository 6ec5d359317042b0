"""Tensors that are rounded in other processes: the same bytes, and the same errors."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tapeout.errors import ModelError
from tapeout.models import load
from tapeout.quantize import Calibration, Quantized, quantize

MakeModel = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def far() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


def files(quant: Quantized) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in quant.directory.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "rounding"),
    [
        ("int8", "rtn"),
        ("int4-g32", "hqq"),
        ("nf4-dq", "rtn"),
        ("nvfp4", "rtn"),  # q, k and v under one scale
        ("int4-g32", "gptq"),
        ("nvfp4", "gptq"),
        ("int4-g32", "awq"),
        ("w8a8-static", "smoothquant"),
    ],
)
def test_same_bytes_wherever_a_tensor_is_rounded(
    make_model: MakeModel, tmp_path: Path, far: ProcessPoolExecutor, scheme: str, rounding: str
) -> None:
    pytest.importorskip("transformers")
    model = load(make_model(num_hidden_layers=2))
    sees = Calibration(None, 4, 32) if rounding not in ("rtn", "hqq") else None
    here = quantize(model, scheme, rounding=rounding, calibration=sees, out=tmp_path / "here")
    there = quantize(model, scheme, rounding=rounding, calibration=sees, out=tmp_path / "there", far=far)
    assert files(here) == files(there)
    assert here.digest == there.digest


class Noting(Executor):
    """Another executor, of which it is known what it was given."""

    def __init__(self, far: Executor) -> None:
        self.far, self.given = far, list[str]()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **keywords: Any) -> Future[Any]:
        self.given.append(fn.__name__)
        return self.far.submit(fn, *args, **keywords)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "rounding"), [("int4-g32", "gptq"), ("int4-g32", "awq"), ("w8a8-static", "rtn")]
)
def test_experts_are_rounded_elsewhere_alike_also_one_that_no_token_reaches(
    make_model: MakeModel, tmp_path: Path, far: ProcessPoolExecutor, scheme: str, rounding: str
) -> None:
    pytest.importorskip("transformers")
    directory = make_model("mixtral", num_hidden_layers=1, dtype="F32")
    weights = load_file(directory / "model.safetensors")
    router = weights["model.layers.0.block_sparse_moe.gate.weight"]
    router[[0, 3]] = router[1]  # one score for three: two at most are chosen, and never the last
    weights["model.layers.0.block_sparse_moe.experts.1.w3.weight"][3, 4] = (
        1e7  # its tensor stays float, where nothing takes it up
    )
    save_file(weights, directory / "model.safetensors")
    model, sees, noting = load(directory), Calibration(None, 4, 32), Noting(far)
    here = quantize(model, scheme, rounding=rounding, calibration=sees, out=tmp_path / "here")
    there = quantize(model, scheme, rounding=rounding, calibration=sees, out=tmp_path / "there", far=noting)
    assert noting.given.count("_expert_elsewhere") == 4
    assert files(here) == files(there)
    assert here.digest == there.digest
    assert any("rounded without data" in note for note in there.notes)
    large = (
        [] if rounding == "awq" else ["1.w3.weight"]
    )  # AWQ divides that row by what it multiplies a column of w2 with
    assert [name.rpartition("experts.")[2] for name in there.fallbacks] == large


def test_errors_come_back_as_they_are(
    make_model: MakeModel, tmp_path: Path, far: ProcessPoolExecutor
) -> None:
    directory = make_model(num_hidden_layers=1, dtype="F32")
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights[Q_PROJ][1, 2] = np.nan
    save_file(weights, path)
    with pytest.raises(ModelError, match=r"q_proj.* holds nan at \[1, 2\]"):
        quantize(load(directory), "int4-g32", out=tmp_path / "codes", far=far)
    assert not (tmp_path / "codes").exists()
    weights[Q_PROJ][1, 2] = 1e9
    save_file(weights, path)
    assert Q_PROJ in quantize(load(directory), "int4-g32", out=tmp_path / "codes", far=far).fallbacks


def test_a_machine_that_does_not_see_the_checkpoint_is_named(
    make_model: MakeModel, tmp_path: Path, far: ProcessPoolExecutor
) -> None:
    directory = make_model(num_hidden_layers=1)
    model = load(directory)
    quantize(model, "int8", out=tmp_path / "read")  # its digest is known from now on
    (directory / "model.safetensors").rename(directory / "moved")
    with pytest.raises(ModelError, match=r"has no .*model\.safetensors: machines that round tensors"):
        quantize(model, "int4-g32", out=tmp_path / "codes", far=far)
