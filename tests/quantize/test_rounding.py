"""Codes: their packing, their meaning, and that each is the nearest there is."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapeout.errors import SchemeError
from tapeout.quantize import SCHEMES, Scheme
from tapeout.quantize.rtn import NotFinite, Rounded, ScaleOverflow, round_to_nearest
from tapeout.quantize.scheme import NF4
from tapeout.quantize.tensor import QuantTensor, pack, unpack

Floats = npt.NDArray[np.float32]
QUANTIZING = [scheme for scheme in SCHEMES.values() if scheme.kind != "none"]


def normal(rows: int, into: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, into)).astype(np.float32) * np.float32(0.02)


def tensor(rounded: Rounded, scheme: Scheme) -> QuantTensor:
    into = rounded.codes.shape[1]
    return QuantTensor(
        pack(rounded.codes, scheme.bits),
        scheme.bits,
        into,
        rounded.scale,
        scheme.group or into,
        scheme.codebook(),
        rounded.zero_point,
    )


@given(
    bits=st.sampled_from([2, 3, 4, 5, 8]),
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
    assert (
        pack(codes & np.uint8(7), 3).tobytes().hex() == "d18e03"
    )  # 1 | 2 << 3 | 3 << 6 | 7 << 9 | 0 << 12 | 7 << 15


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_every_code_is_the_nearest(scheme: Scheme) -> None:
    """Second implementation: try every code of the codebook under the scale that was chosen."""
    weight = normal(8, 256)
    rounded = round_to_nearest(weight, scheme)
    group = scheme.group or 256
    values = scheme.codebook().astype(np.float64)[None, None, :]
    if rounded.zero_point is not None:
        values = values - rounded.zero_point[:, :, None]
    values = values * rounded.scale.astype(np.float64)[:, :, None]
    distance = np.abs(weight.reshape(8, -1, group, 1).astype(np.float64) - values[:, :, None, :])
    chosen = np.take_along_axis(distance, rounded.codes.reshape(8, -1, group, 1).astype(np.int64), axis=3)[
        ..., 0
    ]
    # Ties, and the float32 division of a weight that lies between two codes within 2^-23 of their distance.
    slack = np.abs(rounded.scale.astype(np.float64))[:, :, None] * 2.0**-20
    assert (chosen <= distance.min(axis=3) + slack).all()


@pytest.mark.parametrize(
    ("name", "least", "most"),
    # Relative error of normal weights: 8.6 % for 4 bits in groups of 32 with the signed extreme on -8 (amax / 7: 9.7 %).
    [("int4-g32", 0.083, 0.089), ("int8", 0.004, 0.012), ("int4-g32-asym", 0.07, 0.085), ("nf4", 0.085, 0.1)],
)
def test_error_is_what_the_scheme_promises(name: str, least: float, most: float) -> None:
    scheme = Scheme.parse(name)
    weight = normal(64, 4096)
    error = tensor(round_to_nearest(weight, scheme), scheme).dequantize() - weight
    assert least < np.linalg.norm(error) / np.linalg.norm(weight) < most


@given(
    weight=hnp.arrays(np.float32, (3, 64), elements=st.floats(-1000, 1000, width=32)),
    name=st.sampled_from(QUANTIZING),
)
def test_the_error_of_a_weight_is_at_most_half_a_step(weight: Floats, name: Scheme) -> None:
    if name.group == 128:
        return
    rounded = round_to_nearest(weight, name)
    back = tensor(rounded, name).dequantize()
    step = np.abs(rounded.scale.astype(np.float64))
    # Half of the widest gap of the codebook; the asymmetric zero point adds half a step; one more half where the signed
    # extreme's opposite is cut off at +7, and what the scale loses in float16 (2^-11 of the largest code).
    widest = {"symmetric": 0.5, "asymmetric": 1.0, "nf4": np.diff(NF4).max() / 2}[name.kind]
    cut = 0.5 if name.kind == "symmetric" and name.bits == 4 else 0.0
    bound = np.repeat(step * (widest + cut + 2**name.bits * 2.0**-10), name.group or 64, axis=1)
    assert (np.abs(back - weight) <= bound + 1e-12).all()


def test_the_signed_extreme_takes_minus_eight() -> None:
    weight = np.zeros((2, 32), np.float32)
    weight[0, 3], weight[1, 3] = -4.0, 4.0
    rounded = round_to_nearest(weight, Scheme.parse("int4-g32"))
    assert rounded.codes[:, 3].tolist() == [0, 0]  # -8 + 8
    assert rounded.scale[:, 0].tolist() == [0.5, -0.5]


def test_int8_never_uses_minus_128() -> None:
    weight = normal(16, 512)
    assert round_to_nearest(weight, Scheme.parse("int8")).codes.min() == 1  # -127 + 128


def test_a_group_of_zeros_is_exact_and_a_tiny_one_is_counted() -> None:
    weight = np.zeros((2, 64), np.float32)
    weight[1, :32] = 1e-7
    for scheme in QUANTIZING:
        if scheme.group == 128 or scheme.double_quant:
            continue
        rounded = round_to_nearest(weight, scheme)
        back = tensor(rounded, scheme).dequantize()
        assert (back[0] == 0).all()
        assert rounded.clamped == 1  # the row, or the group, that holds 1e-7
        assert np.isfinite(rounded.scale).all()
        assert (np.abs(rounded.scale) >= 2.0**-14).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_a_weight_that_is_not_finite_is_refused(scheme: Scheme, bad: float) -> None:
    weight = normal(2, 128)
    weight[1, 77] = bad
    with pytest.raises(NotFinite):
        round_to_nearest(weight, scheme)


def test_a_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(ScaleOverflow):
        round_to_nearest(normal(1, 32) * np.float32(1e9), Scheme.parse("int4-g32"))


def test_unknown_scheme_suggests_the_nearest() -> None:
    with pytest.raises(SchemeError, match=r"'int4-g23' is not a scheme; did you mean 'int4-g32'"):
        Scheme.parse("int4-g23")


def test_a_group_that_does_not_divide_names_what_fits() -> None:
    with pytest.raises(
        SchemeError,
        match=r"group 128 of scheme int4-g128 does not divide in_features 96 of w; fits: 16, 32\.",
    ):
        Scheme.parse("int4-g128").check("w", (4, 96))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int8", 8 + 16 / 4096),
        ("int4-g32", 4.5),
        ("int4-g128-asym", 4 + 20 / 128),
        ("nf4", 4.25),
        ("nf4-dq", 4.127),
    ],
)
def test_bits_per_weight(name: str, bits: float) -> None:
    assert Scheme.parse(name).bits_per_weight(4096) == pytest.approx(bits, abs=3e-4)  # 4.127: the QLoRA paper
