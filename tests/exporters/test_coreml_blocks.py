"""The blob file and the containers, byte for byte, what coremltools reads from them, and that a packer with a seeded fault does not pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensors import tensor_of

from tapeout.errors import MissingToolchain, PackageError, SchemeError
from tapeout.exporters import Exact, Refused, Rounded
from tapeout.exporters.coreml import blocks
from tapeout.exporters.coreml.blob import Blobs, Layout, Place, bits_of
from tapeout.exporters.coreml.blocks import Container, Lut, Shift, container_of
from tapeout.exporters.coreml.program import chain, library, quiet
from tapeout.quantize import SCHEMES, QuantTensor, lattice

try:
    library()
except MissingToolchain:
    pytest.skip("coremltools is not installed", allow_module_level=True)

Parts = dict[str, np.ndarray]
CARRIED = [
    name
    for name, scheme in SCHEMES.items()
    if scheme.bits and not isinstance(blocks.carries(scheme), Refused)
]
HOW = [(name, "") for name in CARRIED] + [("int3-g64", "ios26"), ("int2-g64", "ios26")]


def random_tensor(scheme: str, rows: int = 3, into: int = 256, seed: int = 0) -> QuantTensor:
    """Random codes and parts; scales that float16 holds."""
    s, random = SCHEMES[scheme], np.random.default_rng(seed)
    parts = {}
    for name, (dtype, shape) in lattice.layout(s, rows, into).items():
        if name == "codes":
            highest = 126 if s.levels == "e4m3" else 2**s.bits  # 127 and 255 are no numbers
            parts[name] = random.integers(0, highest, (rows, into))
        elif dtype == "U8" and s.scales == "e8m0":
            parts[name] = random.integers(127 - 14, 127 + 8, shape)
        elif dtype == "U8":
            parts[name] = random.integers(1, 16 if name == "zero_point" else 2 ** min(s.scale_bits, 8), shape)
        else:
            parts[name] = random.uniform(0.5, 2, shape)
    return tensor_of(scheme, **parts)


def how_of(scheme: str, opset: str = "") -> Container:
    found = container_of(SCHEMES[scheme], opset or None)  # type: ignore[arg-type]
    assert found is not None
    return found


VALUES = {
    "float16": np.array([1.5, -2, 65504, 6e-8], np.float16),
    "float32": np.array([1.5, -2, 3e38], np.float32),
    "int8": np.array([-128, 5, 127], np.int8),
    "uint8": np.array([0, 5, 255], np.uint8),
    "int4": np.array([-8, 7, 0, -1, 3], np.int8),
    "uint4": np.array([0, 15, 2, 9, 4], np.uint8),
    "uint1": np.array([1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1], np.uint8),
    "uint2": np.array([3, 0, 2, 1, 1], np.uint8),
    "uint3": np.array([7, 0, 2, 5, 1, 6, 3, 4, 5], np.uint8),
    "uint6": np.array([63, 0, 17, 42, 1], np.uint8),
    "int32": np.array([-(2**31), 5], np.int32),
}


def written(path: Path, parts: list[tuple[str, tuple[int, ...], np.ndarray]]) -> list[Place]:
    """Our file of these blobs: type, shape and bytes of each."""
    layout, places = Layout(), []
    data = bytearray()
    for kind, shape, values in parts:
        place = layout.place(kind, shape)
        assert np.asarray(values).nbytes == place.nbytes
        data = data.ljust(place.record, b"\0") + place.header() + np.asarray(values).tobytes()
        places.append(place)
    data[:64] = layout.header()
    path.write_bytes(data)
    return places


def raw(kind: str, values: np.ndarray) -> np.ndarray:
    return values if bits_of(kind) >= 8 else blocks.in_a_row(values, kind)


def test_a_blob_file_is_the_one_that_coremltools_writes(tmp_path: Path) -> None:
    from coremltools.converters.mil.mil import types
    from coremltools.libmilstoragepython import _BlobStorageReader, _BlobStorageWriter

    writer, offsets = _BlobStorageWriter(str(tmp_path / "theirs")), []
    for kind, values in VALUES.items():
        what = {"float16": "fp16", "float32": "float"}.get(kind, kind)
        if kind == "float16":
            values = values.view(np.uint16)
        elif bits_of(kind) < 8:
            values = values.astype(types.string_to_nptype(kind))
        offsets.append(getattr(writer, f"write_{what}_data")(values))
    del writer
    places = written(tmp_path / "ours", [(kind, v.shape, raw(kind, v)) for kind, v in VALUES.items()])
    assert [place.record for place in places] == offsets
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert _BlobStorageReader(str(tmp_path / "ours")).read_int32_data(offsets[-1]).tolist() == [-(2**31), 5]
    blobs = Blobs(tmp_path / "ours")
    for place, (kind, values) in zip(places, VALUES.items(), strict=True):
        assert np.array_equal(blobs.read(kind, place.record, values.shape), values), kind


def test_a_blob_by_hand(tmp_path: Path) -> None:
    """From ``StorageFormat.hpp``: 2 of 64 bytes, five int4 -8 7 0 -1 3 in 3 bytes, of which 4 bits are unused."""
    written(tmp_path / "one", [("int4", (5,), raw("int4", VALUES["int4"]))])
    expected = "01000000 02000000".replace(" ", "").ljust(128, "0")
    expected += "efbeadde 08000000 0300000000000000 8000000000000000 0400000000000000".replace(" ", "").ljust(
        128, "0"
    )
    assert (tmp_path / "one").read_bytes().hex() == expected + "78f003"


def test_a_damaged_blob_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (place,) = written(path, [("int8", (64,), np.arange(64, dtype=np.int8))])
    with pytest.raises(PackageError, match="has no float16 at byte 64"):
        Blobs(path).read("float16", place.record, (32,))
    with pytest.raises(PackageError, match="64 int8 at byte 64, where 63 are expected"):
        Blobs(path).read("int8", place.record, (63,))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PackageError, match="has 191 bytes where 192 are expected: it is cut off"):
        Blobs(path).read("int8", place.record, (64,))
    with pytest.raises(PackageError, match="cannot be read"):
        Blobs(tmp_path / "none")


# Two rows, so that a transposition shows; neighbours differ, so that an exchange of nibbles does; neither symmetric nor periodic.
CODES = np.stack([np.arange(64) * 5 // 22, 15 - (np.arange(64) ** 2 // 270)])
SCALE = [-0.75, 0.5, 2.5, 1]  # 00ba 0038 0041 003c as float16, lowest byte first

# Written by coremltools' blob writer from the values of CODES, and looked through by hand: 0 0 0 0 0 1 1 1 1 2 … and 15 … 15 14 ….
GOLDEN = {
    # The even element in the low nibble, 8 less in two's complement: 0 is 8, 1 is 9, and 8 is 0.
    ("int4-g32", ""): {
        "codes": "88889899a9aaaabbbbccccddddedeefeffff0000111122223233434444555566"
        "7777777777777777676666665555454434332322121100f0ffeeddcdbcbbaa99",
        "scale": "00ba00380041003c",
    },
    # Two blocks of a row share a byte, the first in the low nibble.
    ("int4-g32-asym", ""): {
        "codes": "00001011212222333344445555656676777788889999aaaababbcbccccddddee"
        "ffffffffffffffffefeeeeeeddddcdccbcbbabaa9a9988787766554534332211",
        "scale": "00ba00380041003c",
        "offset": "c3f0",
    },
    # Four elements a byte, the first lowest.
    ("int2-g64", "ios26"): {
        "codes": "000000005055555555aaaaaaaafeffffffffffffffffffffabaaaa6a55550100",
        "scale": "00ba0041",
    },
    # As 4 bits: -4 … 3.
    ("int3-g64", ""): {
        "codes": "ccccccccdcddddddddeeeeeeeefeffffffff0000000011111111212222222233"
        "3333333333333333333333332222222212111111010000f0ffffeeeededdddcc",
        "scale": "00ba0041",
    },
    ("nf4", ""): {
        "codes": "00001011212222333344445555656676777788889999aaaababbcbccccddddee"
        "ffffffffffffffffefeeeeeeddddcdccbcbbabaa9a9988787766554534332211",
        "scale": "00ba0041",
    },
}


@pytest.mark.parametrize(("scheme", "opset"), GOLDEN)
def test_bytes(scheme: str, opset: str) -> None:
    s = SCHEMES[scheme]
    codes = {2: CODES >> 2, 3: CODES >> 1}.get(s.bits, CODES)
    zero = {"zero_point": [3, 12, 0, 15]} if s.kind == "asymmetric" else {}
    tensor = tensor_of(scheme, codes, scale=SCALE if s.group == 32 else SCALE[::2], **zero)
    parts = how_of(scheme, opset).pack(tensor)
    assert {part: array.tobytes().hex() for part, array in parts.items()} == GOLDEN[scheme, opset]


def as_read(how: Container, parts: Parts, shape: tuple[int, int], groups: int, path: Path) -> Parts:
    """The parts as coremltools' reader gives them, of a file that holds these bytes."""
    kinds = how.parts(shape[0], groups, shape[1])
    places = written(path, [(kinds[part][0], kinds[part][1], values) for part, values in parts.items()])
    blobs = Blobs(path)
    found = {
        part: blobs.read(place.kind, place.record, kinds[part][1])
        for place, part in zip(places, parts, strict=True)
    }
    if isinstance(how, Lut):
        found["table"] = how.table().reshape(1, 1, -1, 1)
    return found


def oracle(how: Container, parts: Parts, shape: tuple[int, int], groups: int, path: Path) -> np.ndarray:
    """The weights that coremltools' own inference makes of the operators, [out, in]: float16 arithmetic."""
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder, Function, types

    found, kinds = as_read(how, parts, shape, groups, path), how.parts(shape[0], groups, shape[1])
    with quiet(), Function({"x": Builder.placeholder((1,))}, opset_version=ct.target.iOS18):
        variables = {}
        for part, values in found.items():
            kind = kinds[part][0] if part in kinds else str(values.dtype)
            dtype = types.nptype_from_builtin(types.string_to_builtin(kind.replace("float", "fp")))
            variables[part] = Builder.const(val=np.ascontiguousarray(values).astype(dtype))
        weight: np.ndarray = chain(how, variables, "w").op.materialized_val_inference()
    return weight.astype(np.float32)


def close(weight: np.ndarray, tensor: QuantTensor) -> bool:
    """Equal but for float16: of the table, of a nested scale, and of the product, half a unit in the last place each."""
    wanted = tensor.dequantize()
    return bool((np.abs(weight - wanted) <= 3 * 2.0**-11 * np.abs(wanted) + 2.0**-25).all())


@pytest.mark.parametrize(("scheme", "opset"), HOW)
def test_coremltools_reads_the_weights(scheme: str, opset: str, tmp_path: Path) -> None:
    tensor, how = random_tensor(scheme), how_of(scheme, opset)
    assert close(oracle(how, how.pack(tensor), tensor.shape, tensor.scale.shape[1], tmp_path / "w"), tensor)


def swap_nibbles(parts: Parts) -> Parts:
    codes = np.asarray(parts["codes"]).view(np.uint8)
    return parts | {"codes": codes << 4 | codes >> 4}


def shift_the_zero_point(parts: Parts) -> Parts:
    if "offset" in parts:
        return parts | {"offset": parts["offset"] + np.uint8(1)}
    return parts | {"codes": np.asarray(parts["codes"]).view(np.uint8) + np.uint8(1)}


def transpose(parts: Parts) -> Parts:
    codes = np.asarray(parts["codes"]).view(np.uint8).reshape(3, -1)
    return parts | {"codes": np.ascontiguousarray(codes.T).reshape(codes.shape)}


@pytest.mark.parametrize("fault", [swap_nibbles, shift_the_zero_point, transpose])
@pytest.mark.parametrize(("scheme", "opset"), HOW)
def test_a_seeded_fault_is_seen(
    scheme: str, opset: str, fault: Callable[[Parts], Parts], tmp_path: Path
) -> None:
    tensor, how = random_tensor(scheme), how_of(scheme, opset)
    parts, groups = fault(dict(how.pack(tensor))), tensor.scale.shape[1]
    assert not close(oracle(how, parts, tensor.shape, groups, tmp_path / "w"), tensor)
    assert not same(how.unpack(as_read(how, parts, tensor.shape, groups, tmp_path / "w"), tensor), tensor)


def same(found: QuantTensor, tensor: QuantTensor) -> bool:
    """Bits alike, NaN like nothing."""
    pairs = [(found.codes(), tensor.codes()), (found.scale, tensor.scale)]
    if not np.isnan(tensor.codebook).any():
        pairs.append((found.codebook, tensor.codebook))
    if tensor.zero_point is not None:
        assert found.zero_point is not None
        pairs.append((found.zero_point, tensor.zero_point))
    alike = all(a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
    return alike and found.bits == tensor.bits


@pytest.mark.parametrize(("scheme", "opset"), HOW)
def test_any_codes_come_back(scheme: str, opset: str, tmp_path: Path) -> None:
    s = SCHEMES[scheme]

    # Whole arrays from a seed: drawn element by element they take seconds.
    @settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([256, 512]))
    def check(seed: int, rows: int, into: int) -> None:
        random, parts = np.random.default_rng(seed), {}
        for name, (dtype, shape) in lattice.layout(s, rows, into).items():
            if name == "codes":
                parts[name] = random.integers(0, 2**s.bits, (rows, into))
            elif dtype == "U8" and s.scales == "e8m0":
                parts[name] = random.integers(127 - 24, 127 + 16, shape)
            elif dtype == "U8":
                parts[name] = random.integers(0, 2**s.bits if name == "zero_point" else 256, shape)
            elif s.scales == "double":
                parts[name] = random.uniform(0.5, 2, shape)
            else:
                parts[name] = random.standard_normal(shape) * 2.0 ** random.integers(-12, 6, shape)
        tensor, how = tensor_of(scheme, **parts), how_of(scheme, opset)
        try:
            packed = how.pack(tensor)
        except SchemeError:
            return  # a scale of double quantization that float16 has not
        read = as_read(how, packed, tensor.shape, tensor.scale.shape[1], tmp_path / "w")
        assert same(how.unpack(read, tensor), tensor)

    check()


def test_zero_points_beyond_the_codes() -> None:
    tensor = tensor_of("int4-g32-asym", CODES, scale=SCALE, zero_point=[16, 0, 3, 15])
    how = Shift(4, zero_point=True, wide=True)
    parts = how.pack(tensor)
    assert parts["offset"].tolist() == [[16, 0], [3, 15]]
    assert parts["offset"].dtype == np.float16


def test_scales_that_float16_has_not() -> None:
    good = random_tensor("mxfp4")
    for code in (127 - 25, 127 + 16):
        parts = {"scale_codes": np.full(good.scale.shape, code)}
        with pytest.raises(SchemeError, match="does not fit float16"):
            how_of("mxfp4").pack(tensor_of("mxfp4", good.codes(), **parts))
    tensor = random_tensor("nf4-dq")
    for wrong in (np.float32(1e-6), np.float32(1e6)):
        scale = tensor.scale.copy()
        scale[1, 2] = wrong
        with pytest.raises(SchemeError, match=re.escape(f"a scale of {wrong:g} does not fit float16")):
            blocks.scales(QuantTensor(tensor.packed, 4, 256, scale, 64, tensor.codebook))
    held = blocks.scales(tensor)
    assert np.isnan(blocks.as_scale(np.nextafter(held, np.float16(9)), tensor)).all()


@pytest.mark.parametrize("nibble", [3, 12])
def test_a_code_beyond_the_schemes_bits_has_no_value(nibble: int, tmp_path: Path) -> None:
    tensor, how = random_tensor("int3-g64"), how_of("int3-g64")
    damaged = dict(how.pack(tensor))
    damaged["codes"][0] = damaged["codes"][0] & 0xF0 | nibble ^ 8
    read = as_read(how, damaged, tensor.shape, tensor.scale.shape[1], tmp_path / "w")
    assert np.isnan(how.unpack(read, tensor).dequantize()[0, 0])


def test_what_is_not_carried_says_what_is() -> None:
    refused = {
        opset: {name for name, s in SCHEMES.items() if isinstance(blocks.carries(s, opset), Refused)}
        for opset in (None, "ios18", "ios26")
    }
    assert (
        refused[None]
        == refused["ios26"]
        == {"w8a8", "w8a8-static", "fp8-static", "nvfp4", "nvfp4-w4a4", "q5_k", "q4_k", "q2_k"}
    )
    assert refused["ios18"] - refused[None] == {"nf4", "nf4-dq", "fp8", "mxfp4", "q6_k", "q3_k"}
    for opset, names in refused.items():
        for name in names:
            carry = blocks.carries(SCHEMES[name], opset)
            assert isinstance(carry, Refused)
            assert not isinstance(blocks.carries(SCHEMES[carry.nearest], opset), Refused)
    assert blocks.carries(SCHEMES["int4-g32"]) == Exact("int4 blockwise", 4.5)
    assert blocks.carries(SCHEMES["int4-g32-asym"]) == Exact("uint4 blockwise", 4.625)
    assert blocks.carries(SCHEMES["int3-g64"]) == Exact("int4 blockwise, at 4 bits", 4.25)
    assert blocks.carries(SCHEMES["int3-g64"], "ios26") == Exact("uint3 lookup, blockwise", 3.25)
    assert blocks.carries(SCHEMES["q6_k"]) == Exact("uint6 lookup, blockwise twice", 6 + 8 / 16 + 16 / 256)


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
def test_the_error_that_is_told(scheme: str, tmp_path: Path) -> None:
    """Within a tenth: 20 000 weights have a deviation of well below that."""
    carry = blocks.carries(SCHEMES[scheme])
    assert isinstance(carry, Rounded)
    tensor, how = random_tensor(scheme, rows=80), how_of(scheme)
    levels = how.table().astype(np.float64)[tensor.codes()]
    wanted = tensor.codebook.astype(np.float64)[tensor.codes()]
    scale = np.repeat(tensor.scale.astype(np.float64), 64, axis=1)
    held = np.repeat(blocks.scales(tensor).astype(np.float64), 64, axis=1)
    error = np.sqrt(np.mean((levels * held - wanted * scale) ** 2) / np.mean((wanted * scale) ** 2))
    assert error == pytest.approx(carry.added_error, rel=0.1)
