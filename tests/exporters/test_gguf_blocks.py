"""The block types, byte for byte, and that a packer with a seeded fault does not pass."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tensors import tensor_of

from tapeout.exporters.gguf import blocks
from tapeout.exporters.gguf.layout import block_of
from tapeout.quantize import SCHEMES, QuantTensor, lattice
from tapeout.quantize.tensor import pack

BLOCKS = {name: block for name, scheme in SCHEMES.items() if (block := block_of(scheme))}


# Two rows, so that a transposition shows; codes 0 … 15 each twice or more (of 8 bits: steps of 3), which is neither symmetric
# nor periodic; scales -0.75 (float16 ba00) and 2.5 (4100); zero points 3 and 12.
CODES = np.stack([np.arange(32) // 2, 15 - (np.arange(32) ** 2 // 64)])
WIDE = np.stack([np.arange(64) // 4, 15 - (np.arange(64) ** 2 // 256)])
SUPER = np.stack([np.arange(256) ** 2 // 61, 3 * np.arange(256) + np.arange(256) ** 2 // 97])
SCALE = [-0.75, 2.5]


def golden_tensor(scheme: str) -> QuantTensor:
    s = SCHEMES[scheme]
    if s.scales == "super":
        j, mask = np.arange(256 // s.group), 2**s.scale_bits - 1
        scales = {"scale_codes": np.stack([j * j + 3 * j + 1, 5 * j + 2]) & mask, "scale_block": SCALE}
        if s.kind == "affine":
            scales["scale_block"] = [0.75, 2.5]
            scales |= {
                "minimum_codes": np.stack([7 * j + 1, j * j // 2 + 3]) & mask,
                "minimum_block": [1.25, 0.3125],
            }
        return tensor_of(scheme, SUPER & 2**s.bits - 1, **scales)
    if s.scales == "e8m0":
        return tensor_of(scheme, WIDE, scale_codes=[126, 130, 120, 1])
    if s.scales == "e4m3":
        codes = [0x38, 0x41, 0x07, 0x7E, 0x01, 0x2C, 0x55, 0x30]
        return tensor_of(scheme, WIDE, scale_codes=codes, scale_block=[0.0123])
    if s.bits < 4:
        return tensor_of(scheme, WIDE >> (4 - s.bits), scale=SCALE)
    codes = CODES * 3 + 100 if s.bits == 8 else CODES if s.group == 32 else WIDE
    zero = {"zero_point": [3, 12]} if s.kind == "asymmetric" else {}
    return tensor_of(scheme, codes, scale=SCALE, **zero)


# Written by hand or element by element from the layouts in ggml-common.h; the format owner's library reads the weights from
# them, below, and where it has a quantizer without a search it writes the same.
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
        "3b9e 85858585aaaaaaaabfbfbfbfcfcfcfcfdddddddde9e9e9e9f5f5f5f500000000"
        "3b9e 0a0a0a0a141414141e1e1e1e2a2a2a2a3636363645454545595959597b7b7b7b",
        "3125 7b7b7b7b7b7b7b7b7b7b7b7b7b7b7b7b59595959595959454545454536363636"
        "3125 2a2a2a2a1e1e1e1e1414140a0a0a0000f5f5f5e9e9e9ddddcfcfbfbfaaaa8585",
    ],
    "int3-g64": [
        "00ba6464646464646464757575757575757500baa8a8a8a8a8a8a8a8b9b9b9b9b9b9b9b9",
        "0041bbbbbbbbbbbbbbababababababababab004179797969696969695858585848484747",
    ],
    "int2-g64": [
        "00ba7676767676767676767676767676767600ba98989898989898989898989898989898",
        "004199999999999999999999999999999999004178787878787878786868686868686767",
    ],
    "mxfp4": [
        "7e4040404051515151626262627373737382c8c8c8c8d9d9d9d9eaeaeaeafbfbfbfb",
        "78efefefefefefefdfdfdfdfdfcfcfcfcf016b6b6b5b5a5a4a4a3939292818180707",
    ],
    "nvfp4": [
        "3841077e20202020313131316464646475757575a8a8a8a8b9b9b9b9ececececfdfdfdfd",
        "012c5530ffffffffffffffffdedededececececd9b9b9b8b8a8a7a7a3636262515150404",
    ],
    "q6_k": [
        "30507090b0e00020417191c1e212336384b4e505366797c8e91a4b7bacdd0e3f70a1d2043576a7d81a4b8cbeff216294d517"
        "588acc0e4f81c3054789cb0d4f81cc2085f95dc1269aff63c83ca1057aef53c82d92077be055ca3fb4299e0479fe63d85ec3"
        "48be33a92e94199f148a00860b81078d03890f850b81078d13991f964444448484849494d4d4d4d4d42828282868687878b8"
        "b8bcbccccccccc0c1c10d8e9292d7d7e8282c2d717276878bcbccdc111126666a7bbfbcf0c1c5061a1a581858b939da9b7c7"
        "d9ed031b35516f8f00ba",
        "a0e32679bc0f4285d81b6fa2f5488cdf1265b90c4093e63a7dc11468bc0f53a6fa4e91e5398dd02478cc1074c71b6fc3176b"
        "bf1367cb1064c81c70c4298dd135c83ea4198ff56bd046bc22981e83f96fe55bc137bd23a910860c72f86ee56bd157ce44ca"
        "31b73eb42aa127ae24ab12981f951c931a90179e25ab22a920a73eb5e8283c3c7c4c41818191d5d6d626262a7b7b7b8f8c8c"
        "c0d0d011252565757ababa8acfdf13106065b5b9caca1e1f5363a0b4f5c9091e5e6fa3b3f4f40809595e82878c91969ba0a5"
        "aaafb4b9bec3c8cd0041",
    ],
    "q5_k": [
        "003a003d4185cb1341888fd6dd49b727ca9a1a32f2e206068efe7e3e8ec06060b098584caca43456d6ba2a6aca9216340010"
        "204050607080a1b1c1e1f2122343547485a5c6e7f718395a7b9bbcddfe1f73a5d7093b7ea0d2144789bcfe216396d81b5e80"
        "c306498cce014487ca0d40833c80e5398de1369aef4398fc41a50a6fb3187dd2379bf055ba1f74d93e94f96e6cd258cf45bc"
        "32a92f961c931a80078e058c028900870e850c830b821990179f",
        "0041003542478c9103034547b6fb50b54800b6f65e4a89b171558f8e6e72d2900d6dfd931262e8bc1c55e3e30b1fdce4a0e3"
        "16599cdf024588cb0f4275b8fc3f72b5f93c70b3064a8dc104489cdf1356fa4e92e73b80d4287dc1167acf1468cd1166bb10"
        "64c91e63c71c71c62b80d53a78ee44a91f75eb40a61c72e84eb3298ff55bc137ad0379e056bc22980e75eb515cc34ac138bf"
        "36bd24ab22a921a81f961e951c931b921a9128a027af26ae36bd",
    ],
    "q4_k": [
        "003a003d4185cb1341888fd6dd49b7270010204050607080a1b1c1e1f2122343547485a5c6e7f718395a7b9bbcddfe1f73a5"
        "d7093b7ea0d2144789bcfe216396d81b5e80c306498cce014487ca0d40833c80e5398de1369aef4398fc41a50a6fb3187dd2"
        "379bf055ba1f74d93e94f96e6cd258cf45bc32a92f961c931a80078e058c028900870e850c830b821990179f",
        "0041003542478c9103034547b6fb50b5a0e316599cdf024588cb0f4275b8fc3f72b5f93c70b3064a8dc104489cdf1356fa4e"
        "92e73b80d4287dc1167acf1468cd1166bb1064c91e63c71c71c62b80d53a78ee44a91f75eb40a61c72e84eb3298ff55bc137"
        "ad0379e056bc22980e75eb515cc34ac138bf36bd24ab22a921a81f961e951c931b921a9128a027af26ae36bd",
    ],
    "q3_k": [
        "d884bcc2d26e1208746c42362e1048764b433d211b476b744c123e2419176b71f0947810f4e88c60493d11c9ee96bb63447c"
        "6109322b1f042d160f372c150e378c60493d11c9ee96bb63447c6109322b1f042d160f372c150e373c255e447d7a91d53bb3"
        "5d19f7f7d4688c1100ba",
        "e8beb18e11736c635c1a252a3f044b5d726d62111e08252a3d16494e51736c63e82b66b5f4074281d01363e23d4c8c1f5ead"
        "fd4c8c1f62b23141d020b40757e64c3a2019c7fdebd08ab4ae98928f79636d57417f79636d58868cbab4a2adebd5a2f74c91"
        "e63b80d5e42438390041",
    ],
    "q2_k": [
        "1185fb63dd49b727990d73eb55c13faff0947810f4e88c60493d11c9ee96bb63447c6109322b1f042d160f372c150e378c60"
        "493d11c9ee96bb63447c6109322b1f042d160f372c150e373c255e447d7a003a003d",
        "32375c71b6fb50b53abf54f9be73583de82b66b5f4074281d01363e23d4c8c1f5eadfd4c8c1f62b23141d020b40757e64c3a"
        "2019c7fdebd08ab4ae98928f79636d57417f79636d58868cbab4a2adebd500410035",
    ],
}

# Where a block's codes lie, for those of 4 bits or less that share bytes.
CODES_AT = {
    "Q4_0": slice(2, 18),
    "Q5_0": slice(6, 22),
    "Q8_0": slice(2, 34),
    "MXFP4": slice(1, 17),
    "NVFP4": slice(4, 36),
    "Q6_K": slice(0, 128),
    "Q5_K": slice(48, 176),
    "Q4_K": slice(16, 144),
    "Q3_K": slice(32, 96),
    "Q2_K": slice(16, 80),
}


def golden(scheme: str) -> np.ndarray:
    return np.stack([np.frombuffer(bytes.fromhex(row), np.uint8) for row in GOLDEN[scheme]])


def same(one: QuantTensor, other: QuantTensor) -> bool:
    """Codes, scales and minimums, and the parts that these are made of."""

    def parts(tensor: QuantTensor) -> list[np.ndarray]:
        scales = [part for part in (tensor.scale_codes, tensor.minimum) if part is not None]
        return [tensor.codes(), tensor.scale, *(a for s in scales for a in (s.codes, s.block))]

    return all(np.array_equal(a, b) for a, b in zip(parts(one), parts(other), strict=True))


def owners_weight(scheme: str, packed: np.ndarray, tensor: QuantTensor) -> np.ndarray:
    """What the format owner's library reads; the tensor's scale of NVFP4 is no part of its blocks."""
    from gguf import GGMLQuantizationType, quants

    weight = quants.dequantize(packed, GGMLQuantizationType[BLOCKS[scheme].kind])
    return weight * tensor.scale_codes.block if scheme.startswith("nvfp4") else weight


def limit_of(scheme: str, tensor: QuantTensor) -> np.ndarray:
    """How far the format owner's weight may be from ours: nothing, for the schemes that are carried exactly."""
    if scheme.startswith("nf4"):  # an integer is at most 0.003 beside its level, and d is rounded to 11 bits
        return np.repeat(np.abs(tensor.scale.astype(np.float32)), tensor.group, axis=1) * (0.003 + 2**-11)
    # We multiply the two scales first, and round (2^-24) twice; ggml multiplies by the tensor's scale last, and rounds once.
    return 2**-22 * np.abs(tensor.dequantize()) * scheme.startswith("nvfp4")


@pytest.mark.parametrize("scheme", GOLDEN)
def test_golden_bytes(scheme: str) -> None:
    assert BLOCKS[scheme].pack(golden_tensor(scheme)).tolist() == golden(scheme).tolist()


@pytest.mark.parametrize("scheme", GOLDEN)
def test_golden_bytes_are_read_back(scheme: str) -> None:
    tensor = golden_tensor(scheme)
    # All of it may come from the file alone, but for the zero point, and NF4's scale.
    wiped = replace(tensor, packed=tensor.packed * 0)
    if tensor.scale_codes is not None:
        wiped = replace(wiped, scale_codes=replace(tensor.scale_codes, codes=tensor.scale_codes.codes * 0))
    if tensor.minimum is not None:
        wiped = replace(wiped, minimum=replace(tensor.minimum, codes=tensor.minimum.codes * 0))
    assert same(BLOCKS[scheme].unpack(golden(scheme), wiped), tensor)


@pytest.mark.parametrize("scheme", GOLDEN)
def test_the_format_owner_reads_the_golden_bytes(scheme: str) -> None:
    tensor = golden_tensor(scheme)
    weight = owners_weight(scheme, golden(scheme), tensor)
    assert (np.abs(weight - tensor.dequantize()) <= limit_of(scheme, tensor)).all()


def test_the_format_owners_quantizer_makes_the_same_q4_0() -> None:
    from gguf import GGMLQuantizationType, quants

    weight = golden_tensor("int4-g32").dequantize()
    assert quants.quantize(weight, GGMLQuantizationType.Q4_0).tolist() == golden("int4-g32").tolist()


@pytest.mark.parametrize(
    "scheme", ["int4-g32", "int8-g32", "mxfp4", "nvfp4", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k"]
)
def test_what_llama_cpp_quantizes_goes_through_our_codes(scheme: str, ggml) -> None:
    """Bytes that ggml makes of normal weights: read, packed again, the same; and the weights are those that ggml reads."""
    block = BLOCKS[scheme]
    packed = ggml.quantize(np.random.default_rng(0).standard_normal((6, 512), np.float32), block.kind)
    like = big(scheme, 6, 512)
    if scheme == "nvfp4":  # what ggml makes is multiplied with nothing
        like = replace(like, scale_codes=replace(like.scale_codes, block=np.ones(1, np.float32)))
    tensor = block.unpack(packed, like)
    assert block.pack(tensor).tolist() == packed.tolist()
    assert np.array_equal(ggml.dequantize(packed, block.kind), tensor.dequantize())


def swap_nibbles(scheme: str, tensor: QuantTensor) -> np.ndarray:
    block = BLOCKS[scheme]
    packed = block.pack(tensor).copy()
    codes = packed.reshape(len(packed), -1, block.size)[:, :, CODES_AT[block.kind]]
    codes[:] = codes >> 4 | codes << 4
    return packed


def shift_zero_point(scheme: str, tensor: QuantTensor) -> np.ndarray:
    if tensor.zero_point is not None:
        return BLOCKS[scheme].pack(replace(tensor, zero_point=tensor.zero_point - 1))
    if tensor.minimum is not None:
        mask = np.uint8(2 ** SCHEMES[scheme].scale_bits - 1)
        minimum = replace(tensor.minimum, codes=tensor.minimum.codes + np.uint8(1) & mask)
        return BLOCKS[scheme].pack(replace(tensor, minimum=minimum))
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
    s = SCHEMES[scheme]
    unit = math.lcm(s.group or 1, BLOCKS[scheme].weights)
    rows, into = draw(st.integers(1, 5)), unit * draw(st.integers(1, 3))
    floats = st.floats(2**-6, 2.0**10, width=16)  # of both signs; small enough for NF4's division
    signed = floats | floats.map(lambda x: -x)
    highest = {"super": 2**s.scale_bits - 1, "e8m0": 252, "e4m3": 126}.get(s.scales, 255)
    kinds = {
        "codes": st.integers(0, 2**s.bits - 1),
        "zero_point": st.integers(0, 15),
        "scale_codes": st.integers(0, highest),
        "minimum_codes": st.integers(0, highest),
    }
    parts = {}
    for name, (dtype, shape) in lattice.layout(s, rows, into).items():
        kind = {"U8": np.uint8, "F16": np.float16, "F32": np.float32}[dtype]
        shape = (rows, into) if name == "codes" else shape
        parts[name] = draw(hnp.arrays(kind, shape, elements=kinds.get(name, signed)))
    return tensor_of(scheme, **parts)


@pytest.mark.parametrize("scheme", BLOCKS)
def test_any_codes_come_back_and_mean_the_same_to_the_format_owner(scheme: str) -> None:
    @settings(deadline=None)
    @given(tensors(scheme))
    def check(tensor: QuantTensor) -> None:
        block = BLOCKS[scheme]
        packed = block.pack(tensor)
        assert packed.shape == (tensor.shape[0], tensor.in_features // block.weights * block.size)
        assert same(block.unpack(packed, tensor), tensor)
        if scheme == "nf4-dq":  # any parts give any scale here, a float16 one or not
            return
        weight = owners_weight(scheme, packed, tensor)
        assert (np.abs(weight - tensor.dequantize()) <= limit_of(scheme, tensor)).all()

    check()


def big(scheme: str, rows: int = 3, into: int = 256) -> QuantTensor:
    """Random codes and parts; scales that are neither zero nor NaN."""
    s, random = SCHEMES[scheme], np.random.default_rng(0)
    highest = {"super": 2**s.scale_bits, "e8m0": 150, "e4m3": 127}.get(s.scales, 256)
    parts = {}
    for name, (dtype, shape) in lattice.layout(s, rows, into).items():
        if name == "codes":
            parts[name] = random.integers(0, 2**s.bits, (rows, into))
        elif dtype == "U8":
            parts[name] = random.integers(1, 16 if name == "zero_point" else highest, shape)
        else:
            parts[name] = random.uniform(0.5, 2, shape)
    return tensor_of(scheme, **parts)


@pytest.mark.parametrize("scheme", BLOCKS)
def test_what_no_code_stands_for_equals_nothing(scheme: str) -> None:
    """Any byte of a file changed: the codes or the scales that come back differ, and nothing is raised."""
    tensor, block = big(scheme), BLOCKS[scheme]
    packed = block.pack(tensor)
    for at in range(min(2 * block.size, packed.shape[1])):
        for flip in (1, 16, 128):
            damaged = packed.copy()
            damaged[1, at] ^= flip
            assert not same(block.unpack(damaged, tensor), tensor), (at, flip)


@pytest.mark.parametrize("scheme", ["q6_k", "q4_k", "q2_k", "mxfp4"])
def test_damage_that_makes_no_number_raises_no_warning(scheme: str) -> None:
    tensor, block = big(scheme), BLOCKS[scheme]
    packed = block.pack(tensor)
    for pattern in ([0x00, 0x7C], [0xFF, 0x7D], [0xFF, 0xFF]):  # infinity, NaN that signals and that does not
        damaged = np.resize(np.array(pattern, np.uint8), packed.shape)
        assert not same(block.unpack(damaged, tensor), tensor)


def test_scales_of_a_group_that_do_not_agree_are_no_scale() -> None:
    tensor = big("int4-g64")
    packed = blocks.Q4_0.pack(tensor)
    packed[2, 18] ^= 1  # the second block of the first group
    found = blocks.Q4_0.unpack(packed, tensor)
    assert np.isnan(found.scale[2, 0])
    assert np.array_equal(np.delete(found.scale.reshape(-1), 8), np.delete(tensor.scale.reshape(-1), 8))


@pytest.mark.parametrize("scheme", ["int3-g64", "int2-g64"])
def test_a_code_beyond_the_schemes_bits_has_no_value(scheme: str) -> None:
    tensor = big(scheme)
    for nibble in (0, 15):  # below its lowest code, and above its highest
        packed = blocks.NARROW_AS_Q4_0.pack(tensor)
        packed[0, 2] = packed[0, 2] & 0xF0 | nibble
        found = blocks.NARROW_AS_Q4_0.unpack(packed, tensor)
        assert found.codes()[0, 0] >= 2**tensor.bits
        assert np.isnan(found.dequantize()[0, 0])


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
