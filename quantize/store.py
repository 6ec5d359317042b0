"""The store: one directory of canonical codes, named by what they were made from.

    quantization.json              format_version, source digest, recipe, per tensor: scheme, digest, clamped groups
    tensors/NAME.safetensors       codes U8 [out, packed], scale F16 [out, groups] and, where the scheme has them,
                                   zero_point U8 [out, groups]; for double quantization scale_codes U8 [out, groups],
                                   scale_block F32 [blocks], scale_offset F32 [1], scale_codebook F32 [256] for scale

A tensor's file gets its name when it is whole, so a run that was killed goes on after the last whole tensor.
"""

from __future__ import annotations

import json
import os
import struct
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError
from tapeout.files import file_sha256
from tapeout.models import SourceTensor
from tapeout.models.checkpoint import read_header, to_float32
from tapeout.quantize import double_quant, rtn
from tapeout.quantize.scheme import Scheme
from tapeout.quantize.tensor import DoubleQuant, QuantTensor, pack

FORMAT_VERSION = 1

_TASK_WEIGHTS = 1 << 22  # weights that one task of the pool rounds
_STEP_WEIGHTS = 1 << 18  # weights in work at a time: a few float32 arrays of this size fit a core's cache


@dataclass(frozen=True)
class Written:
    """A tensor's entry in ``quantization.json``."""

    scheme: str
    sha256: str
    clamped_groups: int


def tensor_path(store: Path, name: str) -> Path:
    """The file of tensor ``name``."""
    return store / "tensors" / f"{name}.safetensors"


def write_tensor(store: Path, source: SourceTensor, scheme: Scheme, pool: Executor) -> Written:
    """Round one tensor into its file, streamed by rows; does nothing when the file is there.

    Raises:
        ModelError: a weight is NaN or infinite.
        rtn.ScaleOverflow: a scale does not fit float16.
    """
    path = tensor_path(store, source.name)
    if not path.exists():
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                _round_into(file.fileno(), source, scheme, pool)
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    _, metadata = read_header(path)
    return Written(metadata["scheme"], file_sha256(path), int(metadata["clamped_groups"]))


def _round_into(handle: int, source: SourceTensor, scheme: Scheme, pool: Executor) -> None:
    out, into = source.shape
    groups = into // (scheme.group or into)
    layout: dict[str, tuple[str, tuple[int, ...]]] = {"codes": ("U8", (out, (into * scheme.bits + 7) // 8))}
    if scheme.double_quant:
        scales = np.empty((out, groups), np.float32)
        layout |= double_quant.layout(out, groups)
    else:
        layout["scale"] = ("F16", (out, groups))
    if scheme.kind == "asymmetric":
        layout["zero_point"] = ("U8", (out, groups))
    _, at = _lay_out(layout, scheme, 0)
    bits = source.bits()

    def round_rows(first: int) -> int:
        clamped = 0
        step = max(1, _STEP_WEIGHTS // into)
        end = min(out, first + max(1, _TASK_WEIGHTS // into))
        for row in range(first, end, step):
            rows = slice(row, min(row + step, end))
            rounded = rtn.round_to_nearest(to_float32(bits[rows], source.dtype), scheme)
            clamped += rounded.clamped
            parts: dict[str, npt.NDArray[Any] | None] = {
                "codes": pack(rounded.codes, scheme.bits),
                "zero_point": rounded.zero_point,
            }
            if scheme.double_quant:
                scales[rows] = rounded.scale
            else:
                parts["scale"] = rounded.scale
            for part, values in parts.items():
                if values is not None:
                    write_at(handle, values, at[part] + row * values.shape[1] * values.itemsize)
        return clamped

    try:
        clamped = sum(pool.map(round_rows, range(0, out, max(1, _TASK_WEIGHTS // into))))
    except rtn.NotFinite:
        raise not_finite(source) from None
    if scheme.double_quant:
        for part, array in double_quant.quantize_scales(scales).items():
            write_at(handle, array, at[part])
    # Last, and of the same length as at first: a file without its header is no safetensors file.
    header, _ = _lay_out(layout, scheme, clamped)
    write_at(handle, np.frombuffer(header, np.uint8), 0)


def _lay_out(
    layout: dict[str, tuple[str, tuple[int, ...]]], scheme: Scheme, clamped: int
) -> tuple[bytes, dict[str, int]]:
    """The safetensors header of a tensor's file, and where in the file each part begins."""
    widths = {"U8": 1, "F16": 2, "F32": 4}
    header: dict[str, object] = {"__metadata__": {"scheme": scheme.name, "clamped_groups": f"{clamped:016d}"}}
    begin, offsets = 0, {}
    # Wide parts first: the format wants each part aligned to its own type.
    for part, (dtype, shape) in sorted(layout.items(), key=lambda item: -widths[item[1][0]]):
        end = begin + int(np.prod(shape)) * widths[dtype]
        header[part] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        offsets[part], begin = begin, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, {
        part: 8 + len(text) + offset for part, offset in offsets.items()
    }


def write_at(handle: int, array: npt.NDArray[np.generic], offset: int) -> None:
    """Write an array's bytes at ``offset`` of an open file, whole."""
    left = np.ascontiguousarray(array).data.cast("B")
    while left:
        count = os.pwrite(handle, left, offset)
        left, offset = left[count:], offset + count


def read_tensor(store: Path, name: str, scheme: Scheme, in_features: int) -> QuantTensor:
    """Map a tensor's file."""
    header, _ = read_header(tensor_path(store, name))
    parts = {part: tensor.bits() for part, tensor in header.items()}
    double = None
    if scheme.double_quant:
        double = DoubleQuant(
            parts["scale_codes"],
            parts["scale_block"],
            np.float32(parts["scale_offset"][0]),
            parts["scale_codebook"],
        )
    return QuantTensor(
        packed=parts["codes"],
        bits=scheme.bits,
        in_features=in_features,
        scale=double.scales() if double else parts["scale"],
        group=scheme.group or in_features,
        codebook=scheme.codebook(),
        zero_point=parts.get("zero_point"),
        double=double,
    )


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
    bits = source.bits()
    step = max(1, _TASK_WEIGHTS * len(bits) // max(1, bits.size))

    def finite(first: int) -> bool:
        return bool(np.isfinite(to_float32(bits[first : first + step], source.dtype)).all())

    if not all(pool.map(finite, range(0, len(bits), step))):
        raise not_finite(source)
