"""The header of a GGUF file by the format owner's reader, with the arrays read at once.

``gguf.GGUFReader`` makes several mapped views for every string of a vocabulary: 14 s for 152 000 tokens and their merges.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

Parts = tuple[int, list[Any], list[int], list[Any]]

if TYPE_CHECKING:
    import gguf


def read(path: Path) -> gguf.GGUFReader:
    """Open a file; what is in it is as ``gguf.GGUFReader`` says it."""
    import gguf

    string, array = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY

    owners: Callable[..., Parts] = gguf.GGUFReader._get_field_parts

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Parts:
            if raw_type != array or self.byte_order == "S":
                return owners(self, orig_offs, raw_type)
            data = self.data.view(np.ndarray)
            kind, length = struct.unpack_from("<IQ", data, orig_offs)
            kind, at = gguf.GGUFValueType(kind), orig_offs + 12
            parts: list[Any] = [data[orig_offs:][:4].view("<u4"), data[orig_offs + 4 :][:8].view("<u8")]
            if kind == string:
                view, unpack = memoryview(data), struct.Struct("<Q").unpack_from
                for _ in range(length):
                    end = at + 8 + unpack(view, at)[0]
                    if end > len(data):
                        raise ValueError(f"a string ends at byte {end} of {len(data)}")
                    parts += (data[at : at + 8].view("<u8"), data[at + 8 : end])
                    at = end
                indices = list(range(3, 3 + 2 * length, 2))
            elif kind == array:
                return owners(self, orig_offs, raw_type)
            else:
                dtype = np.dtype(self.gguf_scalar_to_np[kind])
                end = at + dtype.itemsize * length
                if end > len(data):
                    raise ValueError(f"an array ends at byte {end} of {len(data)}")
                parts += list(data[at:end].view(dtype).reshape(-1, 1))
                indices, at = list(range(2, 2 + length)), end
            return at - orig_offs, parts, indices, [array, *([kind] if length else [])]

    return Reader(path)
