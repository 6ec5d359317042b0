"""``weight.bin`` of a Core ML package: mapped, each blob checked when it is read.

The file (MILBlob's ``StorageFormat.hpp``, version 2) is a header of 64 bytes (uint32 number of blobs, uint32 version, zeros), then
blobs. What a program points to is a blob's record of 64 bytes: uint32 sentinel 0xDEADBEEF, uint32 type, uint64 bytes of data,
uint64 where in the file they begin, uint64 bits of padding in the last byte, zeros. All is little endian, and records and data
begin at multiples of 64. Codes of less than a byte lie one after another, the lowest bits first, across bytes.
"""

from __future__ import annotations

from pathlib import Path
from struct import unpack_from
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import PackageError

__all__ = ["BITS", "Blobs", "unpack"]

Array = npt.NDArray[Any]

_SENTINEL = 0xDEADBEEF
_VERSION = 2
_ALIGNMENT = 64
_TYPES = {
    "fp16": 1,
    "fp32": 2,
    "uint8": 3,
    "int8": 4,
    "int16": 6,
    "uint16": 7,
    "int4": 8,
    "uint1": 9,
    "uint2": 10,
    "uint4": 11,
    "uint3": 12,
    "uint6": 13,
    "int32": 14,
    "uint32": 15,
}
BITS = {"uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "int4": 4, "uint6": 6}
_WHOLE: dict[str, npt.DTypeLike] = {
    "fp16": "<f2",
    "fp32": "<f4",
    "uint8": "u1",
    "int8": "i1",
    "int16": "<i2",
    "uint16": "<u2",
    "int32": "<i4",
    "uint32": "<u4",
}


class Blobs:
    """One weight file, read where it is asked.

    Raises:
        PackageError: the file is missing, or is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            mapped: Any = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:  # numpy maps no empty file
            raise PackageError(f"{path} cannot be read: {error}.") from error
        self._bytes = mapped
        version = unpack_from("<I", self._bytes, 4)[0] if len(self._bytes) >= _ALIGNMENT else None
        if version != _VERSION:
            raise PackageError(
                f"{path} has no header of a weight file of version {_VERSION}: found version {version}, {len(self._bytes)} bytes."
            )

    def read(self, offset: int, dtype: str, count: int) -> Array:
        """``count`` numbers [count] of the blob whose record is at byte ``offset``: a view of the file, or unpacked uint8 or int8 codes.

        Raises:
            PackageError: the record is none, is of another type or size, or ends beyond the file.
        """
        if dtype not in _TYPES:
            raise PackageError(f"{self._path}: no blob holds {dtype}; known: {', '.join(sorted(_TYPES))}.")
        where = f"{self._path}, blob at byte {offset}"
        if offset % _ALIGNMENT or offset < _ALIGNMENT or offset + _ALIGNMENT > len(self._bytes):
            raise PackageError(
                f"{where}: a record lies at a multiple of 64 in the file's {len(self._bytes)} bytes; it was cut or altered."
            )
        sentinel, kind, size, begin, padding = unpack_from("<IIQQQ", self._bytes, offset)
        if sentinel != _SENTINEL:
            raise PackageError(
                f"{where}: no record is there (0x{sentinel:08X} instead of 0x{_SENTINEL:08X})."
            )
        if kind != _TYPES[dtype]:
            names = {number: name for name, number in _TYPES.items()}
            raise PackageError(
                f"{where}: holds {names.get(kind, f'type {kind}')}, the program expects {dtype}."
            )
        bits = count * (BITS.get(dtype) or 8 * np.dtype(_WHOLE[dtype]).itemsize)
        if (size, padding) != (-(-bits // 8), -bits % 8):
            raise PackageError(
                f"{where}: has {size} bytes with {padding} bits of padding, {count} of {dtype} are {-(-bits // 8)} with {-bits % 8}."
            )
        if begin % _ALIGNMENT or begin + size > len(self._bytes):
            raise PackageError(
                f"{where}: its data are bytes {begin} … {begin + size}, the file has {len(self._bytes)}; it was cut or altered."
            )
        data = self._bytes[begin : begin + size]
        return unpack(data, dtype, count) if dtype in BITS else data.view(_WHOLE[dtype])


def unpack(data: Array, dtype: str, count: int) -> Array:
    """Codes of less than a byte, each in its own: uint8 [bytes] -> uint8 or int8 [count]."""
    bits = BITS[dtype]
    if bits == 4:
        codes = np.stack([data & 15, data >> 4], axis=-1).ravel()[:count]
    else:
        single = np.unpackbits(data, bitorder="little")[: count * bits].reshape(count, bits)
        codes = np.packbits(single, axis=-1, bitorder="little").ravel()
    return ((codes ^ 8).view(np.int8) - np.int8(8)) if dtype == "int4" else codes
