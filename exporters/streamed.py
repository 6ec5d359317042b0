"""safetensors files whose tensors stand at places known before, so that their rows can be written as they are made.

A file is 8 bytes (little-endian length of the header), a JSON header that gives each tensor's dtype, shape and byte range, and
the bytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout import Late
from tapeout.errors import SchemeError
from tapeout.exporters.steps import by_rows, steps
from tapeout.models import SourceTensor
from tapeout.models.checkpoint import largest, to_float32
from tapeout.quantize.store import write_at
from tapeout.quantize.tensor import QuantTensor

Array = npt.NDArray[Any]

_kernels = Late("tapeout.exporters.kernels")

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1}
"""Bytes of an element, by safetensors' name of its type."""

_TYPES = {"float16": "F16", "float32": "F32", "int32": "I32", "int64": "I64", "int8": "I8", "uint8": "U8"}

ADDED_ERROR = 2**-11 / 3**0.5 / 1.5
"""Of rounding to float16: uniform within half a step of 2^-10, of significands that are 1.5 on average."""


@dataclass(frozen=True)
class Part:
    """A tensor of the files.

    Attributes:
        dtype: safetensors' name of its type.
        shape: of the tensor.
        rows: gives some of its rows.
        height: rows that ``rows`` counts, each of as many bytes; 1: it gives the whole.
    """

    dtype: str
    shape: tuple[int, ...]
    rows: Callable[[slice], Array]
    height: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * WIDTHS[self.dtype]


def held(array: Array, dtype: str | None = None) -> Part:
    """A small tensor that is in memory (or mapped)."""
    return Part(dtype or _TYPES[array.dtype.name], array.shape, lambda rows: np.ascontiguousarray(array))


def halves(tensor: QuantTensor) -> Part:
    """The weight that the codes are, rounded to float16 [out, in]."""
    return Part(
        "F16",
        tensor.shape,
        lambda rows: tensor.rows(rows).dequantize().astype(np.float16),
        len(tensor.packed),
    )


def floats(tensor: SourceTensor, dtype: str) -> Part:
    """A float tensor as its bits, or in another type."""

    def rows(which: slice) -> Any:
        if dtype == tensor.dtype:
            return tensor.read(which)
        if (tensor.dtype, dtype) == ("BF16", "F16"):
            return to_half(tensor.read(which))
        return tensor.float32(which).astype(np.float16 if dtype == "F16" else np.float32)

    return Part(dtype, tensor.shape, rows, tensor.shape[0] if len(tensor.shape) > 1 else 1)


def to_half(bits: Array) -> Array:
    """Bits of bfloat16, uint16 [any shape], as float16: each of the 65,536 is what numpy makes of it, which takes numpy a while by itself."""
    found = np.empty(bits.shape, np.float16)
    _kernels.look_up(_halves(), np.ascontiguousarray(bits).reshape(-1), found.reshape(-1).view(np.uint16))
    return found


@cache
def _halves() -> Array:
    with np.errstate(over="ignore"):  # check_half has refused what is beyond
        return to_float32(np.arange(1 << 16, dtype=np.uint16), "BF16").astype(np.float16).view(np.uint16)


def check_half(name: str, tensor: QuantTensor | SourceTensor, pool: Executor | None = None) -> None:
    """SchemeError when a tensor, or a weight that its codes can be, is beyond float16; a large one is read by a pool."""
    if isinstance(tensor, QuantTensor):
        most = float(np.abs(tensor.codebook).max() * np.abs(tensor.scale.astype(np.float32)).max())
    else:
        rows = tensor.shape[0] if tensor.shape else 1
        pieces = steps(rows, math.prod(tensor.shape[1:]))
        each = pool.map if pool else map
        most = max(each(lambda piece: largest(tensor.read(piece), tensor.dtype), pieces), default=0.0)
    if most > np.finfo(np.float16).max:
        raise SchemeError(
            f"{name} has values up to {most:.3g}, beyond the float16 that the file has it in. What fits: target cpu."
        )


@dataclass(frozen=True)
class File:
    """A file: the bytes before its tensors, where each one's bytes begin, in the order in which they are written, and its length."""

    name: str
    header: bytes
    places: Mapping[str, int]
    nbytes: int


def lay_out(name: str, parts: Mapping[str, Part]) -> File:
    """Give every tensor of a file its place."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at, places = 0, {}
    # Wide types first: the format wants each tensor aligned to its own type.
    for each, part in sorted(parts.items(), key=lambda item: -WIDTHS[item[1].dtype]):
        header[each] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [at, at + part.nbytes]}
        places[each], at = at, at + part.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    header_bytes = struct.pack("<Q", len(text)) + text
    return File(name, header_bytes, {each: begin + at for each, at in places.items()}, begin + at)


def write(
    directory: Path, file: File, part_of: Callable[[str], Part], pool: Executor, *, hollow: bool = False
) -> Iterator[int]:
    """Write a file, tensor by tensor, each asked for when its turn comes; yields the bytes of each. Hollow: its length alone."""
    # Two at a time, so that no core waits for the end of one: the work itself is done by the pool. A file takes one write at a time:
    # a thread that waits for this lock leaves its core to others, which in the kernel it would not.
    lock = Lock()
    with (directory / file.name).open("wb") as opened, ThreadPoolExecutor(2) as feeders:
        write_at(opened.fileno(), np.frombuffer(file.header, np.uint8), 0)
        os.ftruncate(opened.fileno(), file.nbytes)

        def put(name: str) -> int:
            part = part_of(name)
            _write_part(opened.fileno(), part, file.places[name], pool, lock)
            return part.nbytes

        yield from () if hollow else feeders.map(put, file.places)


def _write_part(handle: int, part: Part, at: int, pool: Executor, lock: Lock) -> None:
    width = part.nbytes // max(1, part.height)

    def put(rows: slice) -> None:
        made = np.ascontiguousarray(part.rows(rows))
        with lock:
            write_at(handle, made, at + (rows.start or 0) * width)

    if part.height == 1 or not part.nbytes:
        put(slice(None))
    else:
        by_rows(put, part.height, width, pool)
