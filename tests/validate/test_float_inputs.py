"""Inputs in narrow floats: our rounding, and the loader's own, against ModelOpt's and compressed-tensors'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.quantize import SCHEMES, lattice
from tapeout.targets.modelopt_loader import _float4, _float8
from tapeout.validate.rounding import as_e2m1, round_e4m3_static, round_nvfp4

torch = pytest.importorskip("torch")
load_file = pytest.importorskip("safetensors.torch").load_file

# ModelOpt 0.47's: scripts/fixtures/make_modelopt_rounding.py.
GOLDEN = Path(__file__).parents[1] / "exporters" / "data" / "modelopt" / "rounding.safetensors"
STEP = 2.0**-6


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = load_file(GOLDEN)
    return found


def test_inputs_are_rounded_as_modelopt_rounds_them(golden: dict[str, Any]) -> None:
    x, step = golden["inputs"], np.float32(STEP)
    assert torch.equal(round_nvfp4(x, step), golden["inputs_float4"])
    assert torch.equal(_float4(x, STEP), golden["inputs_float4"])
    assert torch.equal(round_e4m3_static(x, step), golden["inputs_float8"])
    assert torch.equal(_float8(x, STEP), golden["inputs_float8"])


def test_fp8_weights_are_modelopts(golden: dict[str, Any]) -> None:
    """Its scale and its codes, bit for bit."""
    weight, scheme = golden["weight"].numpy(), SCHEMES["fp8-static"]
    whole = lattice.tensor_scale(float(np.abs(weight).max()), scheme)
    assert whole == golden["weight_scale"].numpy()[0]
    codes = lattice.nearest(weight, scheme, lattice.fit(weight, scheme, tensor_scale=whole))
    np.testing.assert_array_equal(codes, golden["weight_codes"].numpy())


@pytest.mark.parametrize("step", [0.0123, 3.7e-3, 1 / 3, 0.5])
def test_inputs_are_rounded_as_compressed_tensors_rounds_them(golden: dict[str, Any], step: float) -> None:
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    preset = pytest.importorskip("compressed_tensors.quantization").preset_name_to_scheme
    scales = pytest.importorskip("compressed_tensors.quantization.utils").compute_dynamic_scales_and_zp
    x = golden["inputs"]
    float8 = preset("FP8", ["Linear"]).input_activations
    wanted = forward.fake_quantize(x, torch.tensor([step]), None, float8)
    assert torch.equal(round_e4m3_static(x, np.float32(step)), wanted)
    float4 = preset("NVFP4", ["Linear"]).input_activations
    divisor = 1 / torch.tensor([step])
    torch.compiler.set_stance("force_eager")  # it would compile with a C++ compiler
    try:
        scale, zero = scales(x, float4, None, divisor)
        wanted = forward.fake_quantize(x, scale, zero, float4, divisor)
    finally:
        torch.compiler.set_stance("default")
    held = np.float32(1) / np.float32(divisor.item())
    assert torch.equal(round_nvfp4(x, held), wanted)
    # The loader divides in another order: a product is off by two roundings of float32, and a code by one where it lies halfway.
    ours = _float4(x, float(held))
    assert (~torch.isclose(ours, wanted, rtol=2.0**-22, atol=0)).float().mean() < 1e-3


def test_every_float4_is_the_nearest() -> None:
    x = torch.linspace(-7, 7, 2801)
    levels = np.sort(np.unique(SCHEMES["nvfp4"].codebook()))
    distance = np.abs(x.numpy()[:, None] - levels[None])
    rounded = as_e2m1(x).numpy()
    assert set(rounded.tolist()) <= set(levels.tolist())
    np.testing.assert_array_equal(np.abs(x.numpy() - rounded), distance.min(1))
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert as_e2m1(halves).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert as_e2m1(-halves).tolist() == [0, -1, -1, -2, -2, -4, -4]


def test_a_block_of_zeros_and_one_too_small_stay_zero() -> None:
    x = torch.zeros(1, 32)
    x[0, 16:] = 1e-9
    for rounded in (round_nvfp4(x, np.float32(1)), _float4(x, 1.0)):
        assert torch.equal(rounded, torch.zeros(1, 32))
