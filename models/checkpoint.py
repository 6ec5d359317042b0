"""Hugging Face checkpoints: safetensors shards, read row by row or mapped, never copied whole.

A safetensors file is 8 bytes (little-endian length of the header), a JSON header that gives each tensor's dtype, shape
and byte range, and the bytes. The library validates the header (overlaps, ranges, truncation); the bytes are mapped here.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError

# numpy has no bfloat16: its bits travel as uint16. Nor has it float8.
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype("u1"),
}
FLOATS = ("F32", "F16", "BF16")
_PIECE = 1 << 20  # bytes read at a time: they stay in a core's cache
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class SourceTensor:
    """Where a tensor lies in a file.

    Attributes:
        dtype: safetensors' name of a type, or GGUF's of a block type (``Q4_0``).
        shape: of the tensor, whatever its blocks.
        offset, nbytes: in bytes.
        heads: rotary heads whose rows GGUF interleaves, put back here; 0: rows stay.
        turned: the file has a matrix as [in, out]; ``shape`` and what is read are [out, in].
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    heads: int = 0
    turned: bool = False

    def bits(self) -> npt.NDArray[Any]:
        """Map the tensor: [shape] of its own type (BF16 and F8_E4M3: their bits); of blocks the bytes, uint8 [rows, bytes]."""
        kind = _DTYPES.get(self.dtype, np.dtype("u1"))
        shape = self.shape if self.dtype in _DTYPES else (self.shape[0], self.nbytes // self.shape[0])
        if self.nbytes == 0:
            return np.zeros(shape, kind)
        # A mapping per tensor, so that dropping the array gives its pages back.
        mapped = np.memmap(
            os.fspath(self.file), kind, "r", self.offset, shape[::-1] if self.turned else shape
        )
        if self.turned:
            return mapped.T
        if not self.heads:
            return mapped
        # The rows of a head: element i beside i + dim / 2 in the file, as two halves in Hugging Face's order.
        order = np.arange(shape[0]).reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)
        return np.ascontiguousarray(mapped[order])

    def float32(self, rows: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Return rows of the tensor as float32 [rows, ...] (exact: every source dtype fits)."""
        return to_float32(self.read(rows), self.dtype)

    def read(self, rows: slice = slice(None)) -> npt.NDArray[Any]:
        """Return rows of ``bits`` in memory of their own."""
        if not self.shape:
            return np.array(self.bits())
        first, last, _ = rows.indices(self.shape[0])
        for _, found in self.pieces(first, last, max(1, last - first)):
            return found
        return self.bits()[:0]

    def pieces(self, first: int, last: int, step: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Yield rows ``first`` … ``last`` of ``bits`` by ``step``: the first's number and the rows, in a buffer used again.

        What is looked at once is read faster than its pages are mapped.
        """
        if self.heads or self.turned or self.dtype not in _DTYPES:
            bits = self.bits()
            for at in range(first, last, step):
                yield at, np.array(bits[at : min(at + step, last)], order="C")
            return
        width = self.nbytes // max(1, self.shape[0])
        with self.file.open("rb", 0) as file:
            file.seek(self.offset + first * width)
            buffer = np.empty((min(step, max(0, last - first)), *self.shape[1:]), _DTYPES[self.dtype])
            for at in range(first, last, step):
                found = buffer[: last - at]
                self._fill(file, found.reshape(-1).view(np.uint8).data)
                yield at, found

    def sha256(self) -> str:
        """Digest of the tensor's bytes."""
        digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
        with self.file.open("rb", 0) as file:
            file.seek(self.offset)
            for at in range(0, self.nbytes, _PIECE):
                part = piece[: min(_PIECE, self.nbytes - at)]
                self._fill(file, part)
                digest.update(part)
        return digest.hexdigest()

    def _fill(self, file: FileIO, buffer: memoryview) -> None:
        while buffer:  # a system call reads no more than 2 GB
            if not (count := file.readinto(buffer)):
                raise ModelError(f"{self.file} ended while {self.name} was read: it was changed.")
            buffer = buffer[count:]


def to_float32(bits: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Widen F32, F16 or BF16 (given as its bits) to a new float32 array of the same shape."""
    if dtype != "BF16":
        return np.array(bits, np.float32)
    wide = bits.astype(np.uint32)
    np.left_shift(wide, 16, out=wide)
    return wide.view(np.float32)


def largest(bits: npt.NDArray[Any], dtype: str) -> float:
    """The largest magnitude of F32, F16 or BF16 (given as its bits), 0 of none; infinite or NaN when one of them is.

    Without its sign a float's bits are an integer that grows with it, and infinity and NaN are the largest.
    """
    whole = bits.view(f"u{bits.itemsize}")
    top = np.max(whole & whole.dtype.type((1 << 8 * bits.itemsize - 1) - 1), initial=0)
    return float(to_float32(np.array([top], whole.dtype).view(bits.dtype), dtype)[0])


class Checkpoint(Mapping[str, SourceTensor]):
    """The tensors of a model directory by name, in the order of the files.

    Args:
        directory: what holds the safetensors files.
        tensors: the tensors, when they lie in another kind of file.
        ignored: tensors of any type that nobody will ask for (row numbers of old encoders).
        quantized: whether types that are no weights' (integers, float8) may be there.

    Raises:
        ModelError: no weights, pickled weights only, a truncated or inconsistent file, a missing shard.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, SourceTensor] | None = None,
        *,
        quantized: bool = False,
        ignored: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.directory = directory
        self._tensors: dict[str, SourceTensor] = dict(tensors or {})
        self._sha256 = ""
        promised = _promised(directory) if tensors is None else {}
        for shard, names in promised.items():
            found, _ = read_header(directory / shard)
            for tensor in found.values():
                if tensor.dtype not in FLOATS and not quantized and not ignored(tensor.name):
                    raise ModelError(
                        f"{tensor.name} in {tensor.file} is {tensor.dtype}; expected one of {', '.join(FLOATS)}."
                    )
            missing = sorted(names - found.keys())
            if missing:
                raise ModelError(f"{directory / shard} lacks {_some(missing)}, which {_INDEX} says it holds.")
            twice = sorted(found.keys() & self._tensors.keys())
            if twice:
                raise ModelError(
                    f"{_some(twice)} is in {shard} and in {self._tensors[twice[0]].file.name}: one expected."
                )
            self._tensors |= found

    def __getitem__(self, name: str) -> SourceTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def sha256(self, pool: Executor) -> str:
        """Digest of all tensors: of the lines ``name dtype shape digest`` sorted by name, whatever the sharding.

        Reads every byte, once: it is kept.
        """
        if self._sha256:
            return self._sha256
        names = sorted(self)
        digests = pool.map(lambda name: self[name].sha256(), names)
        lines = (
            f"{n} {self[n].dtype} {list(self[n].shape)} {d}\n" for n, d in zip(names, digests, strict=True)
        )
        self._sha256 = hashlib.sha256("".join(lines).encode()).hexdigest()
        return self._sha256


def has_weights(directory: Path) -> bool:
    """Whether a directory holds safetensors files, or says that it does."""
    return any((directory / name).exists() for name in (_INDEX, _SINGLE))


def _promised(directory: Path) -> dict[str, set[str]]:
    """Shard file names, in order, with the tensor names that the index promises for each (none without an index)."""
    index = directory / _INDEX
    if index.exists():
        try:
            weight_map = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{index} is not an index of safetensors shards: {error!r}.") from error
        shards: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            shards.setdefault(str(shard), set()).add(name)
        for shard in shards:
            if not (directory / shard).exists():
                raise ModelError(
                    f"{index} names the shard {shard} ({len(shards[shard])} tensors), which is missing."
                )
        return dict(sorted(shards.items()))
    if (directory / _SINGLE).exists():
        return {_SINGLE: set()}
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    if pickled:
        raise ModelError(
            f"{directory} holds pickled weights ({_some(pickled)}), which can run code when loaded, and no safetensors. "
            f'Convert it once: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').save_pretrained('{directory}-safetensors')\""
        )
    raise ModelError(f"{directory} holds no weights: expected {_SINGLE}, or {_INDEX} and its shards.")


def read_header(path: Path) -> tuple[dict[str, SourceTensor], dict[str, str]]:
    """Read a safetensors file's header: its tensors in the order of the file, and its metadata.

    Raises:
        ModelError: the library does not find it sound (truncated, overlapping, out of range), or a dtype is unknown.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        size = f"{path.stat().st_size} bytes" if path.exists() else "absent"
        raise ModelError(
            f"{path} ({size}) is not a whole safetensors file: {error}. Fetch the file again."
        ) from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in _DTYPES:
            raise ModelError(f"{name} in {path} is {entry['dtype']}; expected one of {', '.join(_DTYPES)}.")
        begin, end = entry["data_offsets"]
        tensors[name] = SourceTensor(
            name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + begin, end - begin
        )
    return tensors, metadata


def _some(names: list[str], most: int = 3) -> str:
    """Name the first few of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
