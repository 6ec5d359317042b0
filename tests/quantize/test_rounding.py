"""Codes: their packing, their meaning, and that each is the nearest there is."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tapeout.errors import SchemeError
from tapeout.quantize import SCHEMES, Scheme, lattice
from tapeout.quantize.lattice import NotFinite, ScaleOverflow
from tapeout.quantize.rtn import Rounded, round_to_nearest
from tapeout.quantize.tensor import pack, unpack

Floats = npt.NDArray[np.float32]
QUANTIZING = [scheme for scheme in SCHEMES.values() if scheme.kind != "none"]


def normal(rows: int, into: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, into)).astype(np.float32) * np.float32(0.02)


def rtn(weight: Floats, scheme: Scheme) -> Rounded:
    whole = lattice.tensor_scale(float(np.abs(weight).max(initial=0)), scheme)
    return round_to_nearest(weight, scheme, tensor_scale=whole)


def back(rounded: Rounded, scheme: Scheme) -> Floats:
    return lattice.dequantize(rounded.codes, scheme, rounded.grid)


def values(scheme: Scheme, rounded: Rounded) -> npt.NDArray[np.float64]:
    """What each code would be in each group, [rows, groups, levels]; NaN for E4M3's two codes that are no numbers."""
    grid = rounded.grid
    levels = np.broadcast_to(scheme.codebook().astype(np.float64), (*grid.scale.shape, 2**scheme.bits))
    if grid.zero_point is not None:
        levels = levels - grid.zero_point[:, :, None]
    levels = levels * grid.scale.astype(np.float64)[:, :, None]
    return levels if grid.minimum is None else levels - grid.minimum.astype(np.float64)[:, :, None]


@settings(deadline=None)  # the first call may compile
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    codes=hnp.arrays(
        np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 70)), elements=st.integers(0, 255)
    ),
)
def test_unpack_undoes_pack(bits: int, codes: npt.NDArray[np.uint8]) -> None:
    codes = codes & np.uint8(2**bits - 1)
    packed = pack(codes, bits)
    assert packed.shape == (len(codes), -(-codes.shape[1] * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits, codes.shape[1]), codes)


def test_packing_is_lowest_bits_first() -> None:
    # By hand: 4 bits put the even element low; 3 bits run on across bytes.
    codes = np.array([[1, 2, 3, 15, 0, 7]], np.uint8)
    assert pack(codes, 4).tobytes().hex() == "21f370"
    # 1 | 2 << 3 | 3 << 6 | 7 << 9 | 0 << 12 | 7 << 15
    assert pack(codes & np.uint8(7), 3).tobytes().hex() == "d18e03"
    # 1 | 2 << 6 | 3 << 12 | 15 << 18 | 0 << 24 | 7 << 30
    assert pack(codes, 6).tobytes().hex() == "81303cc001"


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_every_code_is_the_nearest(scheme: Scheme) -> None:
    """Second implementation: try every code under the grid that was chosen."""
    weight = normal(8, 256)
    rounded = rtn(weight, scheme)
    group = scheme.group or 256
    distance = np.abs(
        weight.reshape(8, -1, group, 1).astype(np.float64) - values(scheme, rounded)[:, :, None, :]
    )
    took = rounded.codes.reshape(8, -1, group, 1).astype(np.int64)
    chosen = np.take_along_axis(distance, took, axis=3)[..., 0]
    # Ties in float32: w + minimum, the reciprocal of the scale, their product and a codebook's midpoint are each rounded by
    # 2^-24 of a quotient u, which moves u across a midpoint by 4 * 2^-24 |u|: twice that in distances, in weights scale * u.
    taken = (
        0
        if rounded.grid.minimum is None
        else np.repeat(rounded.grid.minimum, group, axis=1).reshape(chosen.shape)
    )
    slack = 2.0**-21 * np.abs(weight.reshape(chosen.shape) + taken)
    assert (chosen <= np.nanmin(distance, axis=3) + slack).all()


@pytest.mark.parametrize(
    ("name", "most"),
    # Relative error of normal weights: a uniform grid of step d leaves d / √12, and the search for a scale does not lose to it.
    # Root mean squares over groups, by simulation: largest magnitude of 4096 normals 3.836, of 32 2.389; their range 4.194.
    [
        ("int8", 3.836 / 127 / 12**0.5),
        ("int8-g32", 2.389 / 127 / 12**0.5),
        ("int4-g32", 0.086),  # measured with the signed extreme on -8; amax / 7 leaves 9.7 %
        ("int4-g32-asym", 4.194 / 15 / 12**0.5),
        ("nf4", 0.0922),  # NF4 with absmax in blocks of 64: what bitsandbytes leaves
        ("nf4-dq", 0.0922),
        ("q4_k", 4.194 / 15 / 12**0.5),
        ("q5_k", 4.194 / 31 / 12**0.5),
    ],
)
def test_error_is_what_the_scheme_promises(name: str, most: float) -> None:
    scheme = Scheme.parse(name)
    weight = normal(64, 4096)
    error = back(rtn(weight, scheme), scheme) - weight
    # Shannon: no code of R bits a weight comes nearer to normal weights than 2^-R.
    least = 2.0 ** -scheme.bits_per_weight(4096)
    assert least < np.linalg.norm(error) / np.linalg.norm(weight) < most


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
@settings(deadline=None)
@example(weight=np.full((2, 256), 2.0**-126, np.float32))  # a tensor's float32 scale would be subnormal
@example(weight=np.full((2, 256), 3.4e-39, np.float32))  # a group's is
@example(weight=np.full((2, 256), 2.0**-149, np.float32))  # or infinite
@given(weight=hnp.arrays(np.float32, (2, 256), elements=st.floats(-1000, 1000, width=32)))
def test_the_error_of_a_weight_is_at_most_half_a_step_or_it_is_cut_off(
    scheme: Scheme, weight: Floats
) -> None:
    rounded = rtn(weight, scheme)
    error = np.abs(back(rounded, scheme).astype(np.float64) - weight)
    each = np.sort(values(scheme, rounded), axis=2)  # NaN last
    half = np.nanmax(np.diff(each, axis=2), axis=2) / 2
    ends = np.nanmin(each, axis=2), np.nanmax(each, axis=2)
    if scheme.name in ("int8", "int8-g32", "int8-g128", "w8a8", "w8a8-static"):  # -128 is not used
        ends = (
            np.maximum(ends[0], -127 * np.abs(rounded.grid.scale)),
            np.minimum(ends[1], 127 * np.abs(rounded.grid.scale)),
        )
    group = scheme.group or 256
    half, low, high = (np.repeat(part, group, axis=1) for part in (half, *ends))
    bound = np.maximum(half, np.maximum(low - weight, weight - high))
    # float32: the slack of the test above, and a product and a difference rounded in dequantizing, 2^-24 each of what they give.
    slack = 2.0**-21 * (np.abs(weight) + (np.abs(low) if rounded.grid.minimum is not None else 0)) + 1e-44
    assert (error <= bound + slack).all()


def test_the_signed_extreme_takes_minus_eight() -> None:
    weight = np.zeros((2, 32), np.float32)
    weight[0, 3], weight[1, 3] = -4.0, 4.0
    rounded = rtn(weight, Scheme.parse("int4-g32"))
    assert rounded.codes[:, 3].tolist() == [0, 0]  # -8 + 8
    assert rounded.grid.scale[:, 0].tolist() == [0.5, -0.5]


@pytest.mark.parametrize("name", ["int8", "int8-g32", "int8-g128", "w8a8", "w8a8-static"])
def test_int8_never_uses_minus_128(name: str) -> None:
    weight = normal(16, 512)
    weight[:, ::32] *= -8  # long tails: the least squares scale leaves the extremes out of reach
    assert rtn(weight, Scheme.parse(name)).codes.min() >= 1  # -127 + 128


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_a_group_of_zeros_is_exact_and_a_tiny_one_is_counted(scheme: Scheme) -> None:
    weight = np.zeros((2, 256), np.float32)
    weight[1, :16] = 1e-7
    rounded = rtn(weight, scheme)
    assert (back(rounded, scheme)[0] == 0).all()
    assert np.isfinite(rounded.grid.scale).all()
    assert (np.abs(back(rounded, scheme) - weight) <= 1e-7).all()
    if scheme.scales == "float16":
        assert rounded.grid.clamped == 1  # the row, or the group, that holds 1e-7
        assert (np.abs(rounded.grid.scale) >= 2.0**-14).all()
        np.testing.assert_array_equal(rounded.grid.scale, rounded.grid.parts["scale"])
    else:
        assert rounded.grid.clamped == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 77, 255])
@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_a_weight_that_is_not_finite_is_refused(scheme: Scheme, column: int, bad: float) -> None:
    weight = normal(40, 256)
    whole = lattice.tensor_scale(float(np.abs(weight).max()), scheme)
    weight[17, column] = bad
    with pytest.raises(NotFinite):
        round_to_nearest(weight, scheme, tensor_scale=whole)


@pytest.mark.parametrize("scheme", [s for s in QUANTIZING if s.scales in ("float16", "super")], ids=str)
def test_a_scale_beyond_float16_is_refused(scheme: Scheme) -> None:
    with pytest.raises(ScaleOverflow):
        rtn(normal(1, 256) * np.float32(1e12), scheme)


@pytest.mark.parametrize("scheme", [s for s in QUANTIZING if s.scales not in ("float16", "super")], ids=str)
def test_other_scales_reach_further(scheme: Scheme) -> None:
    weight = normal(4, 256)
    small, large = (rtn(weight * np.float32(factor), scheme) for factor in (1, 2**40))
    np.testing.assert_array_equal(small.codes, large.codes)
    np.testing.assert_array_equal(small.grid.scale * np.float32(2**40), large.grid.scale)


def test_unknown_scheme_suggests_the_nearest() -> None:
    with pytest.raises(SchemeError, match=r"'int4-g23' is not a scheme; did you mean 'int4-g32'"):
        Scheme.parse("int4-g23")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "int4-g128",
            r"group 128 of scheme int4-g128 does not divide in_features 96 of w; fits: 16, 32\.",
        ),
        ("q4_k", r"super-block 256 of scheme q4_k does not divide in_features 96 of w; fits: 16, 32\."),
    ],
)
def test_a_group_that_does_not_divide_names_what_fits(name: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Scheme.parse(name).check("w", (4, 96))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int8", 8 + 16 / 4096),
        ("int8-g32", 8.5),
        ("int4-g32", 4.5),
        ("int4-g128-asym", 4 + 20 / 128),
        ("int3-g64", 3.25),
        ("int2-g64", 2.25),
        ("nf4", 4.25),
        ("nf4-dq", 4.127),  # the QLoRA paper
        ("mxfp4", 4.25),  # OCP Microscaling Formats 1.0, table 1: 4 bits, 8 a block of 32
        ("nvfp4", 4.5),
        (
            "q6_k",
            6.5625,
        ),  # ggml's block_q6_K and the like: 210, 176, 144, 110 and 84 bytes a super-block of 256
        ("q5_k", 5.5),
        ("q4_k", 4.5),
        ("q3_k", 3.4375),
        ("q2_k", 2.625),
    ],
)
def test_bits_per_weight(name: str, bits: float) -> None:
    # 4.127 is given with three decimals.
    assert Scheme.parse(name).bits_per_weight(4096) == pytest.approx(
        bits, abs=5e-4 if name == "nf4-dq" else 0
    )
