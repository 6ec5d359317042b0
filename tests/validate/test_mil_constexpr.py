"""Weights from codes, in every container that coremltools writes: against its own decompression, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.errors import PackageError
from tapeout.validate import mil
from tapeout.validate.mil import program as mil_program
from tapeout.validate.mil.blobs import Blobs, unpack

Save = Callable[..., Path]
RNG = np.random.default_rng(11)


def _codes(dtype: str, *shape: int) -> Any:
    """Codes in coremltools' own dtype; every one of them, and no two rows alike."""
    from coremltools.converters.mil.mil.types import type_mapping

    bits = int(dtype.removeprefix("uint").removeprefix("int"))
    low = 0 if dtype.startswith("u") else -(1 << (bits - 1))
    codes = RNG.integers(low, low + (1 << bits), shape)
    codes.flat[: 1 << bits] = (np.arange(1 << bits) + low)[: codes.size]
    return codes.astype(type_mapping.string_to_nptype(dtype))


def _scales(*shape: int, kind: Any = np.float16) -> Any:
    return (RNG.random(shape) * 0.1 + 0.01).astype(kind)


def _shift_scale(
    mb: Any,
    dtype: str,
    shape: tuple[int, ...],
    blocks: tuple[int, ...],
    offset: str = "",
    kind: Any = np.float16,
) -> Any:
    more = {"offset": _codes(offset, *blocks)} if offset else {}
    return mb.constexpr_blockwise_shift_scale(
        data=_codes(dtype, *shape), scale=_scales(*blocks, kind=kind), **more
    )


def _lut(
    mb: Any,
    dtype: str,
    shape: tuple[int, ...],
    blocks: tuple[int, ...],
    vector: int = 1,
    axis: int | None = None,
) -> Any:
    more = {} if axis is None else {"vector_axis": axis}
    table = RNG.standard_normal((*blocks, 1 << int(dtype[4:]), vector)).astype(np.float16)
    return mb.constexpr_lut_to_dense(indices=_codes(dtype, *shape), lut=table, **more)


def _nf4(mb: Any) -> Any:
    return mb.constexpr_blockwise_shift_scale(data=_lut(mb, "uint4", (6, 64), (1, 1)), scale=_scales(6, 2))


def _coded_table(mb: Any) -> Any:
    table = mb.constexpr_lut_to_dense(indices=_codes("uint4", 6, 64), lut=_codes("int8", 1, 1, 16, 1))
    return mb.constexpr_blockwise_shift_scale(data=table, scale=_scales(6, 1))


def _sparse(mb: Any) -> Any:
    mask = _codes("uint1", 5, 12)
    return mb.constexpr_sparse_to_dense(nonzero_data=_scales(np.count_nonzero(mask)), mask=mask)


def _sparse_lut(mb: Any) -> Any:
    mask = _codes("uint1", 5, 12)
    mask, data = mb.constexpr_lut_to_sparse(
        indices_mask=mask,
        indices_nonzero_data=_codes("uint2", np.count_nonzero(mask)),
        lut=RNG.standard_normal((1, 1, 4, 2)).astype(np.float16),
        vector_axis=0,
    )
    return mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask)


def _sparse_scaled(mb: Any) -> Any:
    mask = _codes("uint1", 5, 12)
    mask, data = mb.constexpr_sparse_blockwise_shift_scale(
        data_mask=mask, nonzero_data=_codes("int8", np.count_nonzero(mask)), scale=_scales(5, 3)
    )
    return mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask)


IOS18: dict[str, Callable[[Any], Any]] = {
    "int4-tensor": lambda mb: _shift_scale(mb, "int4", (5, 64), (1, 1)),
    "int4-channel": lambda mb: _shift_scale(mb, "int4", (5, 64), (5, 1)),
    "int4-group": lambda mb: _shift_scale(mb, "int4", (5, 64), (5, 2)),
    "int4-odd": lambda mb: _shift_scale(mb, "int4", (5, 9), (5, 3)),
    "uint4-asymmetric": lambda mb: _shift_scale(mb, "uint4", (5, 64), (5, 2), "uint4"),
    "int8-channel": lambda mb: _shift_scale(mb, "int8", (7, 48), (7, 1)),
    "int8-blocks": lambda mb: _shift_scale(mb, "int8", (6, 48), (2, 3), "int8"),
    "uint8-group": lambda mb: _shift_scale(mb, "uint8", (7, 48), (7, 3), "uint8"),
    "int4-conv": lambda mb: _shift_scale(mb, "int4", (6, 8, 1, 3), (6, 2, 1, 1)),
    "int8-fp32": lambda mb: _shift_scale(mb, "int8", (7, 48), (7, 1), kind=np.float32),
    **{f"uint{bits}-lut": lambda mb, bits=bits: _lut(mb, f"uint{bits}", (6, 44), (1, 1)) for bits in (1, 2, 3, 4, 6, 8)},
    "uint3-lut-tail": lambda mb: _lut(mb, "uint3", (3, 7), (1, 1)),
    "uint4-lut-groups": lambda mb: _lut(mb, "uint4", (6, 44), (2, 4)),
    "uint2-lut-vector-0": lambda mb: _lut(mb, "uint2", (6, 10), (1, 2), 3, 0),
    "uint2-lut-vector-1": lambda mb: _lut(mb, "uint2", (6, 10), (2, 1), 2, -1),
    "nf4": _nf4,
    "int8-table": _coded_table,
    "sparse": _sparse,
    "sparse-lut": _sparse_lut,
    "sparse-int8": _sparse_scaled,
}  # fmt: skip


def _packed(codes: Any, bits: int) -> Any:
    return np.packbits(
        np.unpackbits(codes[:, None], axis=1, bitorder="little", count=bits).ravel(), bitorder="little"
    )


IOS17: dict[str, Callable[[Any], Any]] = {
    "affine": lambda mb: mb.constexpr_affine_dequantize(
        quantized_data=_codes("uint8", 6, 20), zero_point=_codes("uint8", 20), scale=_scales(20), axis=1
    ),
    "affine-scalar": lambda mb: mb.constexpr_affine_dequantize(
        quantized_data=_codes("int8", 6, 20), zero_point=np.int8(-3), scale=np.float16(0.05), axis=0
    ),
    "lut": lambda mb: mb.constexpr_lut_to_dense(
        indices=_packed(_codes("uint8", 21) % 64, 6), lut=RNG.standard_normal(64).astype(np.float16), shape=np.uint32([3, 7])
    ),
    "sparse": lambda mb: mb.constexpr_sparse_to_dense(
        nonzero_data=_scales(10), mask=_packed(np.uint8([1, 0, 1, 1, 0] * 3 + [1]), 1), shape=np.uint32([2, 8])
    ),
    "cast": lambda mb: mb.constexpr_cast(source_val=_scales(4, 6), output_dtype="fp32"),
}  # fmt: skip


def _weight(save: Save, make: Callable[[Any], Any], opset: str) -> tuple[Path, Any]:
    from coremltools.converters.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil import types

    made: list[Any] = []

    def body(idle: Any) -> Any:
        weight = make(mb)
        made.append(weight.op.materialized_val_inference())
        return mb.identity(x=weight, name="weight"), mb.identity(x=idle, name="idle")

    return save(body, {"x": mb.TensorSpec((1,), types.fp32)}, opset), made[0]


@pytest.mark.parametrize(
    ("opset", "name"), [("iOS18", name) for name in IOS18] + [("iOS17", name) for name in IOS17]
)
def test_weights_are_what_coremltools_makes_of_them(save: Save, opset: str, name: str) -> None:
    path, expected = _weight(save, (IOS18 if opset == "iOS18" else IOS17)[name], opset)
    program = mil.load(path)
    idle = {"x": np.zeros(1, np.float32)}
    half = mil.Machine(program, "float16").run(None, idle)["weight"]
    double = mil.Machine(program, "float64").run(None, idle)["weight"]
    assert half.dtype == expected.dtype
    np.testing.assert_array_equal(half, expected)
    np.testing.assert_array_equal(double.astype(half.dtype), half)


def test_float64_keeps_the_product_of_code_and_scale(save: Save) -> None:
    """A product of 8 and 11 bits, which float16 cannot hold."""
    path, rounded = _weight(save, IOS18["int8-channel"], "iOS18")
    program = mil.load(path)
    codes, scale = (
        program.value(constant)
        for parameter in ("data", "scale")
        for operation in program.functions["main"].operations
        if operation.op == "constexpr_blockwise_shift_scale"
        for constant in operation.inputs[parameter]
        if isinstance(constant, mil.Constant)
    )
    assert isinstance(codes, np.ndarray)
    assert isinstance(scale, np.ndarray)
    found = mil.Machine(program).run(None, {"x": np.zeros(1, np.float32)})["weight"]
    np.testing.assert_array_equal(found, codes.astype(np.float64) * scale.astype(np.float64))
    assert np.any(found != rounded)


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_a_weight_is_computed_once_if_it_fits_the_budget(
    save: Save, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    path, _ = _weight(save, IOS18["int4-group"], "iOS18")
    reads: list[int] = []
    read = Blobs.read
    monkeypatch.setattr(mil_program.Blobs, "read", lambda *args: reads.append(args[1]) or read(*args))
    machine = mil.Machine(mil.load(path), budget=budget)
    runs = [machine.run(None, {"x": np.zeros(1, np.float32)})["weight"] for _ in range(3)]
    np.testing.assert_array_equal(runs[0], runs[2])
    assert len(reads) == (6 if budget == 0 else 2)  # codes and scales


@pytest.mark.parametrize("dtype", ["uint1", "uint2", "uint3", "uint4", "uint6", "int4"])
@pytest.mark.parametrize("shape", [(3, 7), (2, 64), (1, 5)])
def test_codes_are_unpacked_as_coremltools_packs_them(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    from coremltools.libmilstoragepython import _BlobStorageReader, _BlobStorageWriter

    codes = _codes(dtype, *shape).ravel()
    path = tmp_path / "weight.bin"
    writer = _BlobStorageWriter(str(path))
    first = writer.write_float_data(np.float32([1.5, 2.5]))
    offset = getattr(writer, f"write_{dtype}_data")(codes)
    del writer
    found = Blobs(path).read(offset, dtype, prod(shape))
    np.testing.assert_array_equal(found, codes.astype(np.int8))
    np.testing.assert_array_equal(
        found, getattr(_BlobStorageReader(str(path)), f"read_{dtype}_data")(offset).astype(np.int8)
    )
    np.testing.assert_array_equal(Blobs(path).read(first, "fp32", 2), [1.5, 2.5])


def test_golden_bytes_of_three_bits() -> None:
    """0, 1, 2 … 7: each code's lowest bit first, across bytes."""
    np.testing.assert_array_equal(
        unpack(np.frombuffer(bytes.fromhex("88c6fa"), np.uint8), "uint3", 8), np.arange(8)
    )
    np.testing.assert_array_equal(
        unpack(np.frombuffer(bytes.fromhex("f810"), np.uint8), "int4", 3), [-8, -1, 0]
    )


@pytest.fixture
def blobs(tmp_path: Path) -> tuple[Path, int]:
    """A file of two blobs, and where the second one's record is."""
    from coremltools.libmilstoragepython import _BlobStorageWriter

    path = tmp_path / "weight.bin"
    writer = _BlobStorageWriter(str(path))
    writer.write_int8_data(np.arange(5, dtype=np.int8))
    offset = int(writer.write_int4_data(_codes("int4", 70)))
    del writer
    return path, offset


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (0, b"\0\0\0\0", "no record is there"),
        (4, b"\x04", "holds int8, the program expects int4"),
        (4, b"\x10", "holds type 16, the program expects int4"),
        (8, b"\x22", "has 34 bytes with 0 bits of padding, 70 of int4 are 35 with 0"),
        (24, b"\x04", "has 35 bytes with 4 bits of padding"),
        (17, b"\x50", r"the file has \d+; it was cut or altered"),
    ],
)
def test_an_altered_record_stops(blobs: tuple[Path, int], at: int, value: bytes, says: str) -> None:
    path, offset = blobs
    data = bytearray(path.read_bytes())
    data[offset + at : offset + at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(PackageError, match=says):
        Blobs(path).read(offset, "int4", 70)


def test_a_cut_file_stops(blobs: tuple[Path, int]) -> None:
    path, offset = blobs
    whole = path.read_bytes()
    path.write_bytes(whole[: offset + 64 + 20])
    with pytest.raises(PackageError, match="it was cut or altered"):
        Blobs(path).read(offset, "int4", 70)
    path.write_bytes(whole[: offset + 20])
    with pytest.raises(PackageError, match="a record lies at a multiple of 64"):
        Blobs(path).read(offset, "int4", 70)
    path.write_bytes(whole[:40])
    with pytest.raises(PackageError, match="no header of a weight file"):
        Blobs(path)
    path.write_bytes(b"")
    with pytest.raises(PackageError, match="cannot be read"):
        Blobs(path)
    with pytest.raises(PackageError, match="no blob holds fp64; known: fp16, "):
        path.write_bytes(whole)
        Blobs(path).read(offset, "fp64", 70)
