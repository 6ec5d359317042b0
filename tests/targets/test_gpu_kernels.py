"""The kernels for GPUs, in Triton's interpreter, against what the codes are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensors import tensor_of

from tapeout.quantize import SCHEMES, QuantTensor

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

SHAPES = {"int4-g32": 32, "int4-g128-asym": 128, "int8": None, "int8-g32": 32, "nf4": 64, "fp8": None}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, its kernels interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from tapeout.targets import gpu_kernels

    return gpu_kernels


def random(scheme: str, out: int, into: int) -> QuantTensor:
    rng = np.random.default_rng(7)
    kind, group = SCHEMES[scheme], SHAPES[scheme] or into
    codes = rng.integers(0, 2**kind.bits, (out, into))
    if scheme == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 0  # not a number
    parts = {"scale": rng.uniform(0.01, 0.03, (out, into // group))}
    if kind.kind == "asymmetric":
        parts["zero_point"] = rng.integers(0, 2**kind.bits, (out, into // group))
    return tensor_of(scheme, codes, **parts)


def on_device(kernels: Any, tensor: QuantTensor, **more: Any) -> Any:
    zero = None if tensor.zero_point is None else torch.from_numpy(tensor.zero_point)
    return kernels.Codes(
        torch.from_numpy(tensor.packed),
        tensor.bits,
        torch.from_numpy(tensor.scale),
        torch.from_numpy(tensor.codebook),
        zero,
        **more,
    )


@pytest.mark.parametrize("scheme", SHAPES)
def test_weights_are_what_the_codes_are(kernels: Any, scheme: str) -> None:
    tensor = random(scheme, 5, 640)
    assert torch.equal(on_device(kernels, tensor).widen(torch.float32), torch.from_numpy(tensor.dequantize()))


@pytest.mark.parametrize("scheme", SHAPES)
@pytest.mark.parametrize(("out", "into", "rows"), [(8, 512, 1), (5, 640, 2)], ids=["whole", "odd"])
def test_products_are_those_of_the_weights(kernels: Any, scheme: str, out: int, into: int, rows: int) -> None:
    tensor = random(scheme, out, into)
    x = torch.from_numpy(np.random.default_rng(8).standard_normal((rows, into)).astype(np.float32))
    exact = x.double() @ torch.from_numpy(tensor.dequantize()).double().T
    # Each product and each of K sums is off by at most 2^-24 of the sum of sizes.
    bound = into * 2**-24 * (x.abs().double() @ torch.from_numpy(tensor.dequantize()).abs().double().T)
    assert ((on_device(kernels, tensor).times(x) - exact).abs() <= bound).all()


def test_inputs_are_changed_before(kernels: Any) -> None:
    tensor = random("int8", 16, 64)
    x = torch.linspace(-3, 3, 64)[None]
    layer = on_device(kernels, tensor, inputs=lambda x: torch.round(x / 0.05) * 0.05, bias=torch.ones(16))
    weight = torch.from_numpy(tensor.dequantize())
    exact = (torch.round(x / 0.05) * 0.05) @ weight.T + 1
    torch.testing.assert_close(layer(x), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_kernels_compile_for_chips_that_are_not_here(tmp_path: Path) -> None:
    chips = ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201", "80", "90"]
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("gpu_ahead.py"), *chips],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[:3] for line in done.stdout.splitlines()] == [
        [chip, kernel, "True"] for chip in chips for kernel in ("_times", "_widen")
    ]
