"""The block types, byte for byte, and that a packer with a seeded fault does not pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tapeout.exporters.gguf import blocks
from tapeout.quantize import SCHEMES, QuantTensor
from tapeout.quantize.tensor import pack

BLOCKS = {
    "int4-g32": blocks.Q4_0,
    "int4-g64": blocks.Q4_0,
    "int4-g128": blocks.Q4_0,
    "int4-g32-asym": blocks.Q5_0,
    "int4-g64-asym": blocks.Q5_0,
    "int4-g128-asym": blocks.Q5_0,
    "int8": blocks.Q8_0,
    "nf4": blocks.NF4_AS_Q8_0,
}
TYPES = {18: "Q4_0", 22: "Q5_0", 34: "Q8_0"}


def tensor_of(
    scheme: str, codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None = None
) -> QuantTensor:
    bits, into = SCHEMES[scheme].bits, codes.shape[1]
    return QuantTensor(
        packed=pack(codes.astype(np.uint8), bits),
        bits=bits,
        in_features=into,
        scale=scale.astype(np.float16),
        group=SCHEMES[scheme].group or into,
        codebook=SCHEMES[scheme].codebook(),
        zero_point=None if zero_point is None else zero_point.astype(np.uint8),
    )


# Two rows, so that a transposition shows; codes 0 … 15 each twice (of 8 bits: steps of 3), which is neither symmetric
# nor periodic; scales -0.75 (float16 ba00) and 2.5 (4100); zero points 3 and 12.
CODES = np.stack([np.arange(32) // 2, 15 - (np.arange(32) ** 2 // 64)])
SCALE = np.array([[-0.75], [2.5]])
ZERO = np.array([[3], [12]])


def golden_tensor(scheme: str) -> QuantTensor:
    codes = CODES * 3 + 100 if SCHEMES[scheme].bits == 8 else CODES
    return tensor_of(scheme, codes, SCALE, ZERO if SCHEMES[scheme].kind == "asymmetric" else None)


# Written by hand from the layouts in ggml-common.h; the Q4_0 rows are also what gguf-py quantizes these weights to, below.
GOLDEN = {
    "int4-g32": [
        "00ba 80809191a2a2b3b3c4c4d5d5e6e6f7f7",
        "0041 bfbfafaf9f9f8f7f6e6e5e4e3d2d1c0c",
    ],
    "int4-g32-asym": [
        "00ba c0ffffff 5d5d6e6e7f7f80809191a2a2b3b3c4c4",
        "0041 ffff0000 f3f3e3e3d3d3c3b3a2a2928271615040",
    ],
    "int8": [
        "00ba e4e4e7e7eaeaededf0f0f3f3f6f6f9f9fcfcffff0202050508080b0b0e0e1111",
        "0041 11111111111111110e0e0e0e0b0b080805050202fffffcf9f6f6f3f0edeae7e4",
    ],
    "nf4": [
        "3b9e 8585aaaabfbfcfcfdddde9e9f5f500000a0a14141e1e2a2a3636454559597b7b",
        "3125 7b7b7b7b7b7b7b7b59595959454536362a2a1e1e14140a00f5f5e9ddcfbfaa85",
    ],
}


def golden(scheme: str) -> np.ndarray:
    return np.stack([np.frombuffer(bytes.fromhex(row), np.uint8) for row in GOLDEN[scheme]])


def same(one: QuantTensor, other: QuantTensor) -> bool:
    return np.array_equal(one.codes(), other.codes()) and np.array_equal(one.scale, other.scale)


@pytest.mark.parametrize("scheme", GOLDEN)
def test_golden_bytes(scheme: str) -> None:
    assert BLOCKS[scheme].pack(golden_tensor(scheme)).tolist() == golden(scheme).tolist()


@pytest.mark.parametrize("scheme", GOLDEN)
def test_golden_bytes_are_read_back(scheme: str) -> None:
    assert same(BLOCKS[scheme].unpack(golden(scheme), golden_tensor(scheme)), golden_tensor(scheme))


def test_the_format_owners_quantizer_makes_the_same_q4_0() -> None:
    from gguf import GGMLQuantizationType, quants

    weight = golden_tensor("int4-g32").dequantize()
    assert quants.quantize(weight, GGMLQuantizationType.Q4_0).tolist() == golden("int4-g32").tolist()


def swap_nibbles(scheme: str, tensor: QuantTensor) -> np.ndarray:
    packed = BLOCKS[scheme].pack(tensor).copy()
    codes = packed.reshape(len(packed), -1, BLOCKS[scheme].size)[:, :, -16:]
    codes[:] = codes >> 4 | codes << 4
    return packed


def shift_zero_point(scheme: str, tensor: QuantTensor) -> np.ndarray:
    if tensor.zero_point is not None:
        return BLOCKS[scheme].pack(replace(tensor, zero_point=tensor.zero_point - 1))
    codes = tensor.codes() + np.uint8(1) & np.uint8(2**tensor.bits - 1)
    return BLOCKS[scheme].pack(replace(tensor, packed=pack(codes, tensor.bits)))


def transpose(scheme: str, tensor: QuantTensor) -> np.ndarray:
    codes = np.ascontiguousarray(tensor.codes().T).reshape(tensor.shape)
    return BLOCKS[scheme].pack(replace(tensor, packed=pack(codes, tensor.bits)))


@pytest.mark.parametrize("mutation", [swap_nibbles, shift_zero_point, transpose])
@pytest.mark.parametrize("scheme", GOLDEN)
def test_a_seeded_fault_is_caught_by_the_golden_bytes_and_by_the_codes(scheme: str, mutation) -> None:
    tensor = golden_tensor(scheme)
    packed = mutation(scheme, tensor)
    assert packed.tolist() != golden(scheme).tolist()
    assert not same(BLOCKS[scheme].unpack(packed, tensor), tensor)


@st.composite
def tensors(draw: st.DrawFn, scheme: str) -> QuantTensor:
    group = SCHEMES[scheme].group or 32
    rows, into = draw(st.integers(1, 5)), group * draw(st.integers(1, 3))
    bits = SCHEMES[scheme].bits
    groups = (rows, into // group if SCHEMES[scheme].group else 1)
    codes = draw(hnp.arrays(np.uint8, (rows, into), elements=st.integers(0, 2**bits - 1)))
    floats = st.floats(2**-6, 2.0**10, width=16)  # of both signs; small enough for NF4's division
    scale = draw(hnp.arrays(np.float16, groups, elements=floats | floats.map(lambda x: -x)))
    zero = draw(hnp.arrays(np.uint8, groups, elements=st.integers(0, 15)))
    return tensor_of(scheme, codes, scale, zero if SCHEMES[scheme].kind == "asymmetric" else None)


@pytest.mark.parametrize("scheme", BLOCKS)
def test_any_codes_come_back_and_mean_the_same_to_the_format_owner(scheme: str) -> None:
    from gguf import GGMLQuantizationType, quants

    @given(tensors(scheme))
    def check(tensor: QuantTensor) -> None:
        block = BLOCKS[scheme]
        packed = block.pack(tensor)
        assert packed.shape == (tensor.shape[0], tensor.in_features // 32 * block.size)
        assert same(block.unpack(packed, tensor), tensor)
        weight = quants.dequantize(packed, GGMLQuantizationType[TYPES[block.size]])
        if scheme == "nf4":  # an integer is at most 0.003 beside its level, and d is rounded to 11 bits
            limit = np.repeat(np.abs(tensor.scale.astype(np.float32)), tensor.group, axis=1) * (
                0.003 + 2**-11
            )
            assert (np.abs(weight - tensor.dequantize()) <= limit).all()
        else:
            assert np.array_equal(weight, tensor.dequantize())

    check()


def big(scheme: str) -> QuantTensor:
    random = np.random.default_rng(0)
    codes = random.integers(0, 2 ** SCHEMES[scheme].bits, (3, 256))
    groups = (3, 256 // (SCHEMES[scheme].group or 256))
    zero = random.integers(0, 16, groups) if SCHEMES[scheme].kind == "asymmetric" else None
    return tensor_of(scheme, codes, random.uniform(0.5, 2, groups), zero)


@pytest.mark.parametrize("scheme", BLOCKS)
def test_what_no_code_stands_for_equals_nothing(scheme: str) -> None:
    """Any byte of a file changed: the codes or the scales that come back differ, and nothing is raised."""
    tensor, block = big(scheme), BLOCKS[scheme]
    packed = block.pack(tensor)
    for at in range(2 * block.size):
        for flip in (1, 16, 128):
            damaged = packed.copy()
            damaged[1, at] ^= flip
            assert not same(block.unpack(damaged, tensor), tensor), (at, flip)


def test_scales_of_a_group_that_do_not_agree_are_no_scale() -> None:
    tensor = big("int4-g64")
    packed = blocks.Q4_0.pack(tensor)
    packed[2, 18] ^= 1  # the second block of the first group
    found = blocks.Q4_0.unpack(packed, tensor)
    assert np.isnan(found.scale[2, 0])
    assert np.array_equal(np.delete(found.scale.reshape(-1), 8), np.delete(tensor.scale.reshape(-1), 8))


def test_a_code_that_nf4_does_not_have_has_no_value() -> None:
    tensor = big("nf4")
    packed = blocks.NF4_AS_Q8_0.pack(tensor)
    packed[0, 2] = 1  # no level of NF4 is 1 / 123.25
    found = blocks.NF4_AS_Q8_0.unpack(packed, tensor)
    assert found.codes()[0, 0] == 255
    assert np.isnan(found.dequantize()[0, 0])


def test_nf4s_added_error_is_what_a_simulation_gives() -> None:
    from tapeout.exporters.gguf.layout import nf4_added_error

    unit = np.random.default_rng(0).standard_normal((20000, 64), np.float32)
    unit /= np.abs(unit).max(axis=1, keepdims=True)
    codebook = SCHEMES["nf4"].codebook()
    codes = np.searchsorted((codebook[1:] + codebook[:-1]) / 2, unit)
    added = (blocks.NF4_INTEGERS / blocks.NF4_STEP)[codes] - codebook[codes]
    simulated = np.sqrt((added**2).mean() / (codebook[codes] ** 2).mean())
    # 1.3 million weights: the mean square is known to 0.2 %; the scale's rounding adds 0.1 %.
    assert nf4_added_error() == pytest.approx(simulated, rel=5e-3)
