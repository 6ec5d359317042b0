"""weight.bin, the blob storage of Core ML (``MILBlob/Blob/StorageFormat.hpp`` of coremltools), laid out before a byte is written.

A file begins with 64 bytes: uint32 how many blobs, uint32 version 2, zeros. Each blob is a record of 64 bytes at a multiple of
64 (uint32 0xDEADBEEF, uint32 type, uint64 bytes of data, uint64 where the data begins, uint64 unused bits of its last byte,
zeros), and its data right behind. A program names a blob by where its record begins. Numbers are little-endian; integers of less
than a byte lie in a row without gaps, lowest bits first, whatever the shape.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import PackageError

ALIGNMENT = 64
_SENTINEL, _VERSION = 0xDEADBEEF, 2

# The format's number of each type, by MIL's name of it.
TYPES = {
    "float16": 1, "float32": 2, "uint8": 3, "int8": 4, "int16": 6, "uint16": 7, "int4": 8, "uint1": 9, "uint2": 10, "uint4": 11,
    "uint3": 12, "uint6": 13, "int32": 14, "uint32": 15,
}  # fmt: skip


def bits_of(kind: str) -> int:
    """Bits of a number of a type."""
    return int("".join(filter(str.isdigit, kind)))


@dataclass(frozen=True)
class Place:
    """Where a blob lies.

    Attributes:
        kind: MIL's name of its type.
        count: how many numbers there are.
        record: where its record begins, which is what a program names.
    """

    kind: str
    count: int
    record: int

    @property
    def data(self) -> int:
        """Where its numbers begin."""
        return self.record + ALIGNMENT

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return -(-self.count * bits_of(self.kind) // 8)

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.data + self.nbytes

    def header(self) -> bytes:
        """The record."""
        unused = self.nbytes * 8 - self.count * bits_of(self.kind)
        record = struct.pack("<IIQQQ", _SENTINEL, TYPES[self.kind], self.nbytes, self.data, unused)
        return record.ljust(ALIGNMENT, b"\0")


class Layout:
    """Gives blobs their places, one behind the other."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.end = ALIGNMENT

    def place(self, kind: str, shape: tuple[int, ...]) -> Place:
        """The next place."""
        found = Place(kind, math.prod(shape), self.end + -self.end % ALIGNMENT)
        self.places.append(found)
        self.end = found.end
        return found

    def header(self) -> bytes:
        """The first 64 bytes of the file."""
        return struct.pack("<II", len(self.places), _VERSION).ljust(ALIGNMENT, b"\0")


class Blobs:
    """A file's blobs, read by coremltools' own reader."""

    def __init__(self, path: Path) -> None:
        from coremltools.libmilstoragepython import _BlobStorageReader

        self.path = path
        try:
            self._size = path.stat().st_size
            self._reader = _BlobStorageReader(str(path))
        except (OSError, RuntimeError) as error:
            raise PackageError(f"{path} cannot be read: {error}.") from error

    def read(self, kind: str, record: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """A blob's numbers, an integer a byte or more; PackageError names what is wrong with it."""
        expected = Place(kind, math.prod(shape), record)
        if expected.end > self._size:
            raise PackageError(
                f"{self.path} has {self._size} bytes where {expected.end} are expected: it is cut off."
            )
        what = {"float16": "fp16", "float32": "float"}.get(kind, kind)
        try:
            values: npt.NDArray[Any] = getattr(self._reader, f"read_{what}_data")(record)
        except RuntimeError as error:
            raise PackageError(f"{self.path} has no {kind} at byte {record}: {error}.") from error
        if kind == "float16":
            values = values.view(np.float16)
        if values.size != expected.count:
            raise PackageError(
                f"{self.path} has {values.size} {kind} at byte {record}, where {expected.count} are expected."
            )
        return values.reshape(shape)
