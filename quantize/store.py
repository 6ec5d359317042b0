"""The store: one directory of canonical codes, named by what they were made from.

    quantization.json              format_version, source digest, recipe, per tensor: scheme, digest, clamped groups
    tensors/NAME.safetensors       codes U8 [out, packed], scale F16 [out, groups] or, where scales are codes themselves,
                                   scale_codes U8 [out, groups] under scale_block; and what else ``lattice.layout`` names

A tensor's file gets its name when it is whole, so a run that was killed goes on after the last whole tensor.
"""

from __future__ import annotations

import json
import math
import os
import platform
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError
from tapeout.files import file_sha256
from tapeout.models import SourceTensor, checkpoint
from tapeout.models.checkpoint import read_header, to_float32
from tapeout.quantize import lattice, rtn
from tapeout.quantize.scheme import Scheme
from tapeout.quantize.tensor import QuantTensor

FORMAT_VERSION = 2

_WIDTHS = {"U8": 1, "F16": 2, "F32": 4}  # bytes of an element

Round = Callable[..., rtn.Rounded]
"""``rtn.round_to_nearest``, or what takes its arguments."""

_TASK_WEIGHTS = (
    1 << 21
)  # weights that one task of the pool rounds: few enough that no core waits long for the last one
_STEP_WEIGHTS = 1 << 20  # weights in work at a time: enough that the kernels, not Python, take the time


@dataclass(frozen=True)
class Written:
    """A tensor's entry in ``quantization.json``."""

    scheme: str
    sha256: str
    clamped_groups: int


@dataclass
class Findings:
    """What rounding a model did.

    Attributes:
        tensors: the store's entries. fallbacks: tensors that could not take their scheme, with the reason.
        notes: what a user has to know: dampings raised, dead channels, tensors rounded without data.
    """

    tensors: dict[str, Written] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Take over what was found of other tensors."""
        self.tensors |= other.tensors
        self.fallbacks |= other.fallbacks
        self.notes += other.notes


class Checkpoints(Protocol):
    """Keeps what calibration has done so far where other machines find it: one that dies leaves its layers to the next."""

    def fetch_layers(self, directory: Path, layers: int) -> None:
        """Put what is kept of this store there, if it is more than so many layers."""

    def keep_layers(self, directory: Path, layers: int, files: Sequence[Path]) -> None:
        """Keep so many layers, which these files are."""


def tensor_path(store: Path, name: str) -> Path:
    """The file of tensor ``name``."""
    return store / "tensors" / f"{name}.safetensors"


def write_tensor(
    store: Path,
    source: SourceTensor,
    scheme: Scheme,
    pool: Executor,
    simple: Round = rtn.round_to_nearest,
    input_scale: np.float32 | None = None,
    most: float | None = None,
    far: Executor | None = None,
) -> None:
    """Round one tensor into its file, streamed by rows, by ``simple``; does nothing when the file is there.

    ``input_scale``: the calibrated one, of a scheme that wants it. ``most``: the magnitude that a scale of the whole tensor is made for;
    None: its own largest. ``far``: who rounds it, in another process that sees the checkpoint; its file comes back whole.

    Raises:
        ModelError: a weight is NaN or infinite.
        lattice.ScaleOverflow: a scale does not fit float16.
    """
    path = tensor_path(store, source.name)
    if not path.exists():
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                if far is None:
                    _round_into(file.fileno(), source, scheme, pool, simple, input_scale, most)
                else:
                    file.write(far.submit(_elsewhere, source, scheme, simple, input_scale, most).result())
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _elsewhere(
    source: SourceTensor, scheme: Scheme, simple: Round, input_scale: np.float32 | None, most: float | None
) -> bytes:
    """The bytes of a tensor's file, made in a process that may be on another machine."""
    check_seen(source)
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        tensor_path(Path(place), source.name).parent.mkdir()
        write_tensor(Path(place), source, scheme, pool, simple, input_scale, most)
        return tensor_path(Path(place), source.name).read_bytes()


def check_seen(source: SourceTensor) -> None:
    """ModelError where this machine does not see a tensor's file."""
    if not source.file.exists():
        raise ModelError(
            f"{platform.node()} has no {source.file}: machines that round tensors read the checkpoint at the same path. "
            "What fits: a directory that all of them see."
        )


def _round_into(
    handle: int,
    source: SourceTensor,
    scheme: Scheme,
    pool: Executor,
    simple: Round,
    input_scale: np.float32 | None,
    most: float | None,
) -> None:
    out, into = source.shape
    layout = lattice.layout(scheme, out, into)
    _, at = _lay_out(layout, scheme, 0)
    if scheme.calibrated:
        write_at(handle, np.array([input_scale], np.float32), at["input_scale"])
    task = max(1, _TASK_WEIGHTS // into)
    whole, scales = None, np.empty((0, 0), np.float32)
    if scheme.scales == "e4m3":
        whole = lattice.tensor_scale(largest(source, pool) if most is None else most, scheme)
        if whole is not None and not np.isfinite(whole):
            raise not_finite(source)
        write_at(handle, np.array([whole], np.float32), at["scale_block"])
    elif scheme.scales == "double":
        scales = np.empty((out, into // (scheme.group or into)), np.float32)
    at_once = simple is rtn.round_to_nearest and rtn.in_one_pass(scheme)

    def put(parts: Mapping[str, npt.NDArray[Any]], row: int) -> None:
        for part, values in parts.items():
            write_at(handle, values, at[part] + row * values.shape[1] * values.itemsize)

    def round_rows(first: int) -> int:
        clamped = 0
        step = max(1, _STEP_WEIGHTS // into)
        end = min(out, first + task)
        for row, bits in source.pieces(first, end, step):
            if at_once and (found := rtn.packed_rows(bits, source.dtype, scheme)):
                parts, raised = found
                clamped += raised
                put(parts, row)
                continue
            rows = slice(row, row + len(bits))
            rounded = simple(to_float32(bits, source.dtype), scheme, tensor_scale=whole)
            clamped += rounded.grid.clamped
            if scheme.scales == "double":
                scales[rows] = rounded.grid.scale
                rounded = rtn.Rounded(rounded.codes, replace(rounded.grid, parts={}))
            put(lattice.packed_parts(rounded.codes, scheme, rounded.grid), row)
        return clamped

    try:
        clamped = sum(pool.map(round_rows, range(0, out, task)))
    except lattice.NotFinite:
        raise not_finite(source) from None
    if scheme.scales == "double":
        for part, array in lattice.quantize_scales(scales).items():
            write_at(handle, array, at[part])
    # Last, and of the same length as at first: a file without its header is no safetensors file.
    header, _ = _lay_out(layout, scheme, clamped)
    write_at(handle, np.frombuffer(header, np.uint8), 0)


def largest(source: SourceTensor, pool: Executor) -> float:
    """The largest magnitude of a tensor [out, in]."""
    out, into = source.shape
    task = max(1, _TASK_WEIGHTS // into)
    found = pool.map(
        lambda row: checkpoint.largest(source.read(slice(row, row + task)), source.dtype), range(0, out, task)
    )
    return float(np.max(list(found)))  # which keeps a NaN


def write_parts(
    store: Path, name: str, parts: Mapping[str, npt.NDArray[Any]], scheme: Scheme, clamped: int = 0
) -> Written:
    """Write the parts of a tensor that are in memory whole (``lattice.layout`` names them), or a float tensor's ``weight``."""
    kinds = {np.dtype(np.uint8): "U8", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
    header, at = _lay_out({part: (kinds[a.dtype], a.shape) for part, a in parts.items()}, scheme, clamped)
    path = tensor_path(store, name)
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            for part, array in parts.items():
                write_at(file.fileno(), array, at[part])
            write_at(file.fileno(), np.frombuffer(header, np.uint8), 0)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return written(store, name)


def written(store: Path, name: str) -> Written:
    """The entry of a tensor whose file is whole."""
    path = tensor_path(store, name)
    _, metadata = read_header(path)
    return Written(metadata["scheme"], file_sha256(path), int(metadata["clamped_groups"]))


def _lay_out(
    layout: Mapping[str, tuple[str, tuple[int, ...]]], scheme: Scheme, clamped: int
) -> tuple[bytes, dict[str, int]]:
    """The safetensors header of a tensor's file, and where in the file each part begins."""
    header: dict[str, object] = {"__metadata__": {"scheme": scheme.name, "clamped_groups": f"{clamped:016d}"}}
    begin, offsets = 0, {}
    # Wide parts first: the format wants each part aligned to its own type.
    for part, (dtype, shape) in sorted(layout.items(), key=lambda item: (-_WIDTHS[item[1][0]], item[0])):
        end = begin + int(np.prod(shape)) * _WIDTHS[dtype]
        header[part] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        offsets[part], begin = begin, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, {
        part: 8 + len(text) + offset for part, offset in offsets.items()
    }


def tensor_bytes(scheme: Scheme, out: int, into: int) -> int:
    """Bytes of the file of a tensor [out, in], before it is written."""
    parts = lattice.layout(scheme, out, into)
    header, _ = _lay_out(parts, scheme, 0)
    return len(header) + sum(math.prod(shape) * _WIDTHS[dtype] for dtype, shape in parts.values())


def write_at(handle: int, array: npt.NDArray[np.generic], offset: int) -> None:
    """Write an array's bytes at ``offset`` of an open file, whole."""
    left = np.ascontiguousarray(array).data.cast("B")
    while left:
        count = os.pwrite(handle, left, offset)
        left, offset = left[count:], offset + count


def read_tensor(store: Path, name: str, scheme: Scheme, in_features: int) -> QuantTensor:
    """Map a tensor's file."""
    path = tensor_path(store, name)
    found = path.stat() if path.exists() else None  # its reader says what is absent
    header = _header(path, found and (found.st_ino, found.st_mtime_ns))
    return lattice.assemble({part: tensor.bits() for part, tensor in header.items()}, scheme, in_features)


@lru_cache(1 << 10)
def _header(path: Path, which: tuple[int, int] | None) -> Mapping[str, SourceTensor]:
    """The header of a file, which exporters ask for more than once."""
    return read_header(path)[0]


def not_finite(source: SourceTensor) -> ModelError:
    """The error that names the first weight that is NaN or infinite."""
    flat = source.float32().reshape(-1)
    at = int(np.flatnonzero(~np.isfinite(flat))[0])
    index = [int(i) for i in np.unravel_index(at, source.shape)]
    return ModelError(
        f"{source.name} in {source.file} holds {flat[at]} at {index}: every weight must be finite. "
        "The checkpoint is damaged, or was saved from a diverged run."
    )


def check_finite(source: SourceTensor, pool: Executor) -> None:
    """Raise ModelError when a weight of a tensor that stays float is NaN or infinite."""
    count = source.shape[0] if source.shape else 1
    step = max(1, _TASK_WEIGHTS * count // max(1, math.prod(source.shape)))

    def finite(first: int) -> bool:
        return math.isfinite(checkpoint.largest(source.read(slice(first, first + step)), source.dtype))

    if not all(pool.map(finite, range(0, count, step))):
        raise not_finite(source)
