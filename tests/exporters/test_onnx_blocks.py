"""The containers, byte for byte, what onnxruntime reads from them, and that a packer with a seeded fault does not pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import tensor_of

from tapeout.exporters import Exact, Refused
from tapeout.exporters.onnx import blocks
from tapeout.exporters.onnx.blocks import Bnb4, Linear, NBits, container_of
from tapeout.quantize import SCHEMES, QuantTensor, lattice

Parts = dict[str, np.ndarray]
CARRIED = [
    name
    for name, scheme in SCHEMES.items()
    if scheme.bits and not isinstance(blocks.carries(scheme), Refused)
]


def random_tensor(scheme: str, rows: int = 3, into: int = 256, seed: int = 0) -> QuantTensor:
    """Random codes and parts; scales that are neither zero nor NaN."""
    s, random = SCHEMES[scheme], np.random.default_rng(seed)
    parts = {}
    for name, (dtype, shape) in lattice.layout(s, rows, into).items():
        if name == "codes":
            highest = (
                127 if s.levels == "e4m3" else 2**s.bits
            )  # what is above is negative, 127 and 255 no number
            parts[name] = random.integers(0, highest, (rows, into))
        elif dtype == "U8":
            parts[name] = random.integers(1, 16 if name == "zero_point" else 2 ** min(s.scale_bits, 8), shape)
        else:
            parts[name] = random.uniform(0.5, 2, shape)
    return tensor_of(scheme, **parts)


def container(scheme: str, into: int = 256) -> blocks.Container:
    found = container_of(SCHEMES[scheme], into)
    assert found is not None
    return found


# Two rows, so that a transposition shows; neighbours differ, so that an exchange of nibbles does; neither symmetric nor periodic.
CODES = np.stack([np.arange(64) * 5 // 22, 15 - (np.arange(64) ** 2 // 270)])
SCALE = [-0.75, 0.5, 2.5, 1]  # 000040bf 0000003f 00002040 0000803f as float32, lowest byte first

# Written out from ContribOperators.md (MatMulNBits, MatMulBnb4) and the values of CODES: 0 0 0 0 0 1 1 1 1 2 … and 15 … 15 14 ….
GOLDEN = {
    # The even element in the low nibble: the third byte holds 0 and 1.
    "int4-g32": {
        "codes": "00001011212222333344445555656676777788889999aaaababbcbccccddddee"
        "ffffffffffffffffefeeeeeeddddcdccbcbbabaa9a9988787766554534332211",
        "scales": "000040bf0000003f000020400000803f",
    },
    # Two blocks of a row share a byte, the first in the low nibble.
    "int4-g32-asym": {
        "codes": "00001011212222333344445555656676777788889999aaaababbcbccccddddee"
        "ffffffffffffffffefeeeeeeddddcdccbcbbabaa9a9988787766554534332211",
        "scales": "000040bf0000003f000020400000803f",
        "zero_points": "c3f0",
    },
    # Four elements a byte, the first lowest.
    "int2-g64": {
        "codes": "000000005055555555aaaaaaaafeffffffffffffffffffffabaaaa6a55550100",
        "scales": "000040bf00002040",
    },
    # As 4 bits, 4 higher: -4 … 3 lie in the middle of -8 … 7.
    "int3-g64": {
        "codes": "4444444454555555556666666676777777778888888899999999a9aaaaaaaabb"
        "bbbbbbbbbbbbbbbbbbbbbbbbaaaaaaaa9a999999898888787777666656555544",
        "scales": "000040bf00002040",
    },
    "int8": {
        "codes": "6464646464676767676a6a6a6a6a6d6d6d6d7070707073737373737676767679797979797c7c7c7c7f7f7f7f828282828285"
        "85858588888888888b8b8b8b8e8e"
        "91919191919191919191919191919191918e8e8e8e8e8e8e8b8b8b8b8b8888888885858585828282827f7f7f7c7c7c797979"
        "767673737370706d6d6d6a6a6767",
        "scales": "000040bf00002040",
    },
    # The even element in the high nibble: the third byte holds 0 and 1 the other way round.
    "nf4": {
        "codes": "00000111122222333344445555566667777788889999aaaaabbbbcccccddddee"
        "fffffffffffffffffeeeeeeedddddccccbbbbaaaa99988877766555443332211",
        "scales": "000040bf00002040",
    },
}


@pytest.mark.parametrize("scheme", GOLDEN)
def test_bytes(scheme: str) -> None:
    s = SCHEMES[scheme]
    codes = {2: CODES >> 2, 3: CODES >> 1, 8: CODES * 3 + 100}.get(s.bits, CODES)
    zero = {"zero_point": [3, 12, 0, 15]} if s.kind == "asymmetric" else {}
    tensor = tensor_of(scheme, codes, scale=SCALE if s.group == 32 else SCALE[::2], **zero)
    parts = container(scheme, 64).pack(tensor)
    assert {part: array.tobytes().hex() for part, array in parts.items()} == GOLDEN[scheme]


def test_a_long_row_repeats_its_scale() -> None:
    tensor = random_tensor("int8", into=256)
    how = container("int8")
    assert how == NBits(8, 128)
    assert np.array_equal(how.pack(tensor)["scales"], np.repeat(tensor.scale, 2, axis=1).astype(np.float32))
    damaged = how.pack(tensor)
    damaged["scales"][1, 1] += 1  # type: ignore[operator]
    assert np.isnan(how.unpack(damaged, tensor).scale[1, 0])


def test_a_scale_beyond_float16_is_no_scale() -> None:
    tensor, how = random_tensor("int4-g32"), container("int4-g32")
    for value in (1e6, np.nextafter(np.float32(tensor.scale[0, 0]), np.float32(9))):
        damaged = how.pack(tensor)
        damaged["scales"][0, 0] = value
        assert np.isnan(how.unpack(damaged, tensor).scale[0, 0])


@pytest.mark.parametrize("nibble", [3, 12])
def test_a_code_beyond_the_schemes_bits_has_no_value(nibble: int) -> None:
    tensor, how = random_tensor("int3-g64"), container("int3-g64")
    damaged = how.pack(tensor)
    damaged["codes"][0, 0] = damaged["codes"][0, 0] & 0xF0 | nibble  # type: ignore[operator, call-overload]
    found = how.unpack(damaged, tensor)
    assert np.isnan(found.dequantize()[0, 0])


def test_what_is_not_carried_says_what_is() -> None:
    for name, scheme in SCHEMES.items():
        carry = blocks.carries(scheme)
        if isinstance(carry, Refused):
            assert name in {"mxfp4", "nvfp4", "nvfp4-w4a4", "fp8-static", "q5_k", "q4_k", "q2_k"}
            assert not isinstance(blocks.carries(SCHEMES[carry.nearest]), Refused)
    assert blocks.carries(SCHEMES["w8a8"]) == Exact("INT8, inputs too, their scale a token")
    assert blocks.carries(SCHEMES["q6_k"]) == Exact("MatMulNBits 8-bit, at 10 bits", 10.0)
    assert blocks.carries(SCHEMES["int4-g32-asym"]) == Exact("MatMulNBits 4-bit asymmetric", 5.125)


def oracle(parts: Parts, how: blocks.Container, out: int, into: int) -> np.ndarray:
    """The weights that onnxruntime sees, float32 [out, in]: what it makes of the unit vectors, whose sums have one term."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    helper = onnx.helper
    names = list(parts)
    arrays = dict(parts)
    if isinstance(how, NBits):
        arrays["codes"] = arrays["codes"].reshape(how.blocks(out, into))
        fields = {"bits": how.bits, "block_size": how.block, "accuracy_level": 0}
        nodes = [
            helper.make_node(
                "MatMulNBits", ["x", *names], ["y"], domain="com.microsoft", N=out, K=into, **fields
            )
        ]
    elif isinstance(how, Bnb4):
        arrays = {name: array.reshape(-1) for name, array in arrays.items()}
        fields = {"block_size": 64, "quant_type": 1, "transB": 1}
        nodes = [
            helper.make_node(
                "MatMulBnb4", ["x", *names], ["y"], domain="com.microsoft", N=out, K=into, **fields
            )
        ]
    else:
        nodes = [
            helper.make_node("Cast", ["codes"], ["levels"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["levels", "scales"], ["w"]),
            helper.make_node(
                "FusedMatMul",
                ["x", "w"],
                ["y"],
                domain="com.microsoft",
                transB=int(not isinstance(how, Linear)),
            ),
        ]
    held = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items() if name != "codes"]
    kind, shape = how.shapes(out, into)["codes"]
    shape = how.blocks(out, into) if isinstance(how, NBits) else shape
    raw = np.ascontiguousarray(arrays["codes"]).tobytes()
    held.append(
        onnx.TensorProto(
            name="codes", data_type=onnx.TensorProto.DataType.Value(kind), dims=shape, raw_data=raw
        )
    )
    info = onnx.helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "one", [info("x", 1, ["m", into])], [info("y", 1, ["m", out])], held)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    y: np.ndarray = session.run(None, {"x": np.eye(into, dtype=np.float32)})[0]
    return y.T


def close(weight: np.ndarray, tensor: QuantTensor) -> bool:
    """Equal but for the place of a rounding: kernels may fold the zero point into the sum, 15 scales of 2^-24 each at most."""
    limit = 2.0**-20 * 16 * np.repeat(np.abs(tensor.scale.astype(np.float32)), tensor.group, axis=1)
    return bool(
        (
            np.abs(weight - tensor.dequantize())
            <= limit * np.abs(tensor.codebook[np.isfinite(tensor.codebook)]).max()
        ).all()
    )


@pytest.mark.parametrize("scheme", CARRIED)
def test_onnxruntime_reads_the_weights(scheme: str) -> None:
    tensor, how = random_tensor(scheme), container(scheme)
    parts = how.pack(tensor)
    for part, (_, shape) in how.shapes(*tensor.shape).items():
        assert parts[part].size == np.prod(shape), part
    assert close(oracle(parts, how, *tensor.shape), tensor)


def swap_nibbles(parts: Parts) -> Parts:
    codes = np.asarray(parts["codes"]).view(np.uint8)
    return parts | {"codes": codes << 4 | codes >> 4}


def shift_the_zero_point(parts: Parts) -> Parts:
    if "zero_points" in parts:
        return parts | {"zero_points": parts["zero_points"] + np.uint8(1)}
    return parts | {"codes": np.asarray(parts["codes"]).view(np.uint8) + np.uint8(1)}


def transpose(parts: Parts) -> Parts:
    codes = np.asarray(parts["codes"]).view(np.uint8)
    codes = codes.reshape(256, -1) if len(codes) == 1 else codes  # of Linear, which gives them in one row
    return parts | {"codes": np.ascontiguousarray(codes.T).reshape(codes.shape)}


@pytest.mark.parametrize("fault", [swap_nibbles, shift_the_zero_point, transpose])
@pytest.mark.parametrize("scheme", CARRIED)
def test_a_seeded_fault_is_seen(scheme: str, fault: Callable[[Parts], Parts]) -> None:
    tensor, how = random_tensor(scheme), container(scheme)
    assert not close(oracle(fault(dict(how.pack(tensor))), how, *tensor.shape), tensor)
    assert not same(how.unpack(fault(dict(how.pack(tensor))), tensor), tensor)


def same(found: QuantTensor, tensor: QuantTensor) -> bool:
    """Bits alike, NaN like nothing."""
    pairs = [(found.codes(), tensor.codes()), (found.scale, tensor.scale)]
    if tensor.zero_point is not None:
        assert found.zero_point is not None
        pairs.append((found.zero_point, tensor.zero_point))
    alike = all(a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
    return alike and found.bits == tensor.bits


@pytest.mark.parametrize("scheme", CARRIED)
def test_any_codes_come_back(scheme: str) -> None:
    s = SCHEMES[scheme]

    # Whole arrays from a seed: drawn element by element they take seconds.
    @settings(max_examples=20)
    @given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([256, 512]))
    def check(seed: int, rows: int, into: int) -> None:
        random, parts = np.random.default_rng(seed), {}
        for name, (dtype, shape) in lattice.layout(s, rows, into).items():
            if name == "codes":
                parts[name] = random.integers(0, 2**s.bits, (rows, into))
            elif dtype == "U8":
                parts[name] = random.integers(0, 2**s.bits if name == "zero_point" else 256, shape)
            else:
                parts[name] = random.standard_normal(shape) * 2.0 ** random.integers(-12, 6, shape)
        tensor, how = tensor_of(scheme, **parts), container(scheme, into)
        assert same(how.unpack(how.pack(tensor), tensor), tensor)

    check()
