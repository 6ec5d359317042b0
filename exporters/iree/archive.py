"""IREE's parameter archive (``.irpa``): a table of names, and the bytes of each parameter at a multiple of 64.

Layout, little endian (iree/schemas/parameter_archive.h, version 0.0): a header of 88 bytes, at 96 one entry of 76 bytes for each
parameter, each at a multiple of 16, then the names, then at a multiple of 64 the data. Places of names count from the begin of the names,
places of data from that of the data.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import MissingToolchain, PackageError

_MAGIC, _DATA = b"IRPA", 2
_HEADER = struct.Struct("<4sHHQQQ Q QQ QQ QQ")
_ENTRY = struct.Struct("<QIQ QQ QQ Q QQ")
_ENTRY_ALIGNMENT, _ALIGNMENT = 16, 64


def _up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


@dataclass(frozen=True)
class Layout:
    """Where everything of an archive stands.

    Attributes:
        header: all bytes before the data.
        places: where each parameter's bytes begin in the file.
        end: bytes of the file.
    """

    header: bytes
    places: Mapping[str, int]
    end: int


def lay_out(sizes: Mapping[str, int]) -> Layout:
    """The layout of an archive of parameters of these sizes in bytes, in their order."""
    stride = _up(_ENTRY.size, _ENTRY_ALIGNMENT)
    entries_at = _up(_HEADER.size, _ENTRY_ALIGNMENT)
    entries_size = stride * (len(sizes) - 1) + _ENTRY.size if sizes else 0
    names = "".join(sizes).encode()
    names_at = entries_at + entries_size
    data_at = _up(names_at + len(names), _ALIGNMENT)
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = _up(end, _ALIGNMENT)
        end = offsets[name] + size
    header = bytearray(data_at)
    _HEADER.pack_into(
        header, 0, _MAGIC, 0, 0, _HEADER.size, 0, 0, len(sizes),
        entries_at, entries_size, names_at, len(names), data_at, end,
    )  # fmt: skip
    name_at = 0
    for index, (name, size) in enumerate(sizes.items()):
        length = len(name.encode())
        _ENTRY.pack_into(
            header, entries_at + index * stride,
            _ENTRY.size, _DATA, 0, name_at, length, 0, 0, _ALIGNMENT, offsets[name], size,
        )  # fmt: skip
        name_at += length
    header[names_at : names_at + len(names)] = names
    return Layout(bytes(header), {name: data_at + at for name, at in offsets.items()}, data_at + end)


def runtime() -> Any:
    """``iree.runtime``; MissingToolchain where it is not installed."""
    try:
        import iree.runtime
    except ImportError as error:
        raise MissingToolchain(
            f"parameter archives are read by IREE's runtime ({error}): pip install 'tapeout[rocm]'"
        ) from error
    return iree.runtime


def read(path: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """The parameters of an archive as IREE's runtime finds them: their bytes, mapped.

    Raises:
        PackageError: the file is absent, cut off, or no archive. MissingToolchain: the runtime is absent.
    """
    library = runtime()
    index = library.ParameterIndex()
    try:
        index.load(str(path))
        return {
            name: library.parameter_index_entry_as_numpy_flat_ndarray(entry) for name, entry in index.items()
        }
    except Exception as error:  # the binding's own
        raise PackageError(
            f"{path} cannot be read: {error}. It was cut off or changed; write it again."
        ) from error
