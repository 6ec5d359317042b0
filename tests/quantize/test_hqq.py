"""Half-quadratic rounding: never worse than rtn in any error, as good as the package it comes from, the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tapeout.quantize import SCHEMES, Scheme, lattice
from tapeout.quantize.hqq import P, round_hqq
from tapeout.quantize.lattice import NotFinite, ScaleOverflow
from tapeout.quantize.rtn import Rounded, round_to_nearest
from tapeout.quantize.scheme import SUPER

Floats = npt.NDArray[np.float32]
QUANTIZING = [scheme for scheme in SCHEMES.values() if scheme.kind != "none"]
GOLDEN = Path(__file__).parent / "golden"
MODEL = Path(__file__).parents[2].parent / "shared" / "models" / "stdlib-llama-6m"


def normal(rows: int, into: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, into)).astype(np.float32) * np.float32(0.02)


def student(rows: int, into: int, seed: int = 0) -> Floats:
    """Heavy tails (4 degrees of freedom), and off centre."""
    return (np.random.default_rng(seed).standard_t(4, (rows, into)) * 0.02 + 0.005).astype(np.float32)


def both(weight: Floats, scheme: Scheme, importance: Floats | None = None) -> tuple[Rounded, Rounded]:
    whole = lattice.tensor_scale(float(np.abs(weight).max(initial=0)), scheme)
    return (
        round_to_nearest(weight, scheme, importance, tensor_scale=whole),
        round_hqq(weight, scheme, importance, tensor_scale=whole),
    )


def errors(
    weight: Floats, scheme: Scheme, rounded: Rounded, power: float, importance: Floats | None = None
) -> npt.NDArray[np.float64]:
    """Σ|error|^power of what has one grid: a group, or a super-block."""
    off = np.abs(lattice.dequantize(rounded.codes, scheme, rounded.grid).astype(np.float64) - weight) ** power
    unit = SUPER if scheme.scales == "super" else scheme.group or weight.shape[1]
    return (off if importance is None else off * importance).reshape(len(weight), -1, unit).sum(axis=2)


def assert_never_worse(weight: Floats, scheme: Scheme, importance: Floats | None = None) -> None:
    plain, ours = both(weight, scheme, importance)
    unit = SUPER if scheme.scales == "super" else scheme.group or weight.shape[1]
    for power in (P, 2):
        # Sums of float32 in sixteen lanes, each term rounded a few times: (unit / 16 + 16 + 8) * 2^-24 on either side.
        slack = 1 + 2 * (unit / 16 + 24) * 2.0**-24
        least = errors(weight, scheme, plain, power, importance)
        assert (errors(weight, scheme, ours, power, importance) <= least * slack + 1e-44).all()
    largest = [
        (
            np.abs(lattice.dequantize(r.codes, scheme, r.grid) - weight) ** 2
            * (1 if importance is None else importance)
        )
        .reshape(len(weight), -1, unit)
        .max(axis=2)
        for r in (plain, ours)
    ]
    assert (largest[1] <= largest[0] * (1 + 2.0**-20) + 1e-44).all()


@pytest.mark.parametrize("make", [normal, student])
@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_no_group_is_worse_than_by_rtn(scheme: Scheme, make: Any) -> None:
    assert_never_worse(make(32, 512), scheme)


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_no_group_is_worse_by_importance(scheme: Scheme) -> None:
    importance = np.exp(np.random.default_rng(1).standard_normal(512)).astype(np.float32)
    importance /= importance.mean()
    assert_never_worse(student(32, 512), scheme, importance)


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
@settings(max_examples=25, deadline=None)  # the first call may compile
@given(weight=hnp.arrays(np.float32, (2, 256), elements=st.floats(-1000, 1000, width=32)))
def test_no_group_is_worse_whatever_the_weights(scheme: Scheme, weight: Floats) -> None:
    weight[np.abs(weight) < 1e-12] = 0  # squares of less are subnormal, and say nothing
    assert_never_worse(weight, scheme)


@pytest.mark.parametrize(
    ("name", "gaussian", "heavy"),
    # What is left of the l_p error of rtn, at p = 0.7 as HQQ has it; measured on 512 x 1024 weights, and rounded up. Little
    # is gained, since no group's largest error may grow: without that rule int4-g128 has 0.981 and 0.965, and a worse model.
    [
        ("int4-g32", 0.9975, 0.9995),
        ("int4-g64", 0.999, 0.9998),
        ("int4-g128", 0.9997, 1),
        ("int4-g64-asym", 0.999, 0.9995),
        ("int3-g64", 0.9999, 1),
        ("int2-g64", 1, 1),
        ("nf4", 0.9975, 0.999),
        ("nf4-dq", 0.985, 0.99),
        ("int8-g32", 0.9925, 0.996),
        ("q4_k", 0.9997, 0.9997),
    ],
)
def test_it_is_better_than_rtn(name: str, gaussian: float, heavy: float) -> None:
    scheme = SCHEMES[name]
    for weight, most in ((normal(256, 1024), gaussian), (student(256, 1024), heavy)):
        plain, ours = (errors(weight, scheme, rounded, 0.7).sum() for rounded in both(weight, scheme))
        assert ours < most * plain


def test_it_is_as_good_as_the_package_with_integer_zero_points() -> None:
    golden = load_file(GOLDEN / "hqq_int4.safetensors")  # scripts/fixtures/hqq_int4.py
    weight, scheme = golden["weight"].astype(np.float32), SCHEMES["int4-g64-asym"]

    def theirs(name: str) -> npt.NDArray[np.float64]:
        codes, scale, zero = (golden[f"{name}.{part}"] for part in ("codes", "scale", "zero"))
        back = (codes.reshape(64, -1, 64) - zero[..., None]) * scale[..., None].astype(np.float64)
        return (np.abs(back - weight.reshape(64, -1, 64)) ** 0.7).sum(axis=2)

    ours = errors(weight, scheme, round_hqq(weight, scheme), 0.7)
    for half in (slice(0, 32), slice(32, 64)):  # normal weights, heavy tails
        assert ours[half].sum() <= theirs("integer")[half].sum()
        # Zero points in float32 are a finer lattice, at 12 bits more a group.
        assert ours[half].sum() <= 1.03 * theirs("float")[half].sum()


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_rows_may_be_cut_anywhere_and_come_out_the_same(scheme: Scheme) -> None:
    weight = student(13, 512)
    weight[5] = 0
    weight[9, 256:] = 1e-8
    importance = np.random.default_rng(1).random(512).astype(np.float32)
    whole = lattice.tensor_scale(float(np.abs(weight).max()), scheme)
    together = round_hqq(weight, scheme, importance, tensor_scale=whole)
    again = round_hqq(np.asfortranarray(weight), scheme, importance, tensor_scale=whole)
    np.testing.assert_array_equal(together.codes, again.codes)
    clamped = 0
    for cut in (slice(0, 1), slice(1, 8), slice(8, 13)):
        part = round_hqq(weight[cut], scheme, importance, tensor_scale=whole)
        np.testing.assert_array_equal(together.codes[cut], part.codes)
        assert part.grid.parts.keys() == together.grid.parts.keys()
        for name, values in part.grid.parts.items():
            assert values.dtype == together.grid.parts[name].dtype
            np.testing.assert_array_equal(together.grid.parts[name][cut], values)
        clamped += part.grid.clamped
    assert together.grid.clamped == clamped


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_its_parts_are_what_the_store_keeps(scheme: Scheme) -> None:
    """The grid that was merged from several iterates is still the one that its parts mean, and every code the nearest."""
    weight = student(16, 512)
    plain, ours = both(weight, scheme)
    np.testing.assert_array_equal(ours.codes, lattice.nearest(weight, scheme, ours.grid))
    parts = lattice.packed_parts(ours.codes, scheme, ours.grid)
    assert {name: (part.dtype, part.shape) for name, part in parts.items()} == {
        name: (part.dtype, part.shape)
        for name, part in lattice.packed_parts(plain.codes, scheme, plain.grid).items()
    }
    if scheme.scales == "double":
        np.testing.assert_array_equal(ours.grid.parts["scale"], ours.grid.scale)
        return
    once: dict[str, Any] = {"input_scale": np.ones(1, np.float32)}
    if scheme.scales == "e4m3":
        once["scale_block"] = np.array([lattice.tensor_scale(float(np.abs(weight).max()), scheme)])
    tensor = lattice.assemble({**parts, **once}, scheme, 512)
    np.testing.assert_array_equal(tensor.dequantize(), lattice.dequantize(ours.codes, scheme, ours.grid))
    if scheme.scales == "float16":
        assert (np.abs(ours.grid.parts["scale"]) >= np.float16(2.0**-14)).all()


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_zeros_are_exact_and_damaged_weights_refused(scheme: Scheme) -> None:
    weight = normal(4, 256)
    weight[1] = 0
    plain, ours = both(weight, scheme)
    assert (lattice.dequantize(ours.codes, scheme, ours.grid)[1] == 0).all()
    assert ours.grid.clamped == plain.grid.clamped
    weight[2, 3] = np.nan
    with pytest.raises(NotFinite):
        round_hqq(weight, scheme, tensor_scale=np.float32(1))


@pytest.mark.parametrize("scheme", [s for s in QUANTIZING if s.scales in ("float16", "super")], ids=str)
def test_scales_at_the_end_of_float16(scheme: Scheme) -> None:
    """What rtn can hold it can hold, and what rtn refuses it refuses; one row does not decide for the others."""
    weight = normal(8, 256)
    weight /= np.abs(weight).max(axis=1, keepdims=True)
    largest, beyond = 2.0**10, 2.0**60
    while beyond / largest > 1.001:  # as large as rtn can hold
        middle = (largest * beyond) ** 0.5
        try:
            round_to_nearest(weight * np.float32(middle), scheme)
            largest = middle
        except ScaleOverflow:
            beyond = middle
    near = weight * np.float32(largest)
    ours = round_hqq(near, scheme)
    for row in range(len(near)):
        np.testing.assert_array_equal(round_hqq(near[row : row + 1], scheme).codes, ours.codes[row : row + 1])
    with pytest.raises(ScaleOverflow):
        round_hqq(weight * np.float32(beyond), scheme)


@pytest.mark.parametrize("name", ["int8", "int4-g64", "int4-g64-asym", "int3-g64", "nf4", "mxfp4", "q4_k"])
def test_a_trained_model_is_rounded_better(name: str) -> None:
    if not MODEL.exists():
        pytest.skip(f"no {MODEL.name} beside the repository")
    scheme = SCHEMES[name]
    tensors = load_file(MODEL / "model.safetensors")
    for layer in ("layers.0.self_attn.q_proj", "layers.3.mlp.down_proj", "layers.5.mlp.up_proj"):
        weight = tensors[f"model.{layer}.weight"].astype(np.float32)
        plain, ours = both(weight, scheme)
        for power in (0.7, 2.0):
            # Strictly for the sum; equal where there is next to nothing to choose (powers of two).
            assert errors(weight, scheme, ours, power).sum() <= errors(weight, scheme, plain, power).sum()
