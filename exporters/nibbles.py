"""Canonical nibbles as NVIDIA's 4-bit kernels have them, two rows in a byte: the one packer of directories that is more than a view."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt


def rows_together(packed: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Nibbles of two columns a byte, the code plus 8, as two rows a byte, the even one low, two's complement: [2 n, in / 2] to [n, in]."""
    together = np.empty((len(packed) // 2, packed.shape[1]), "<u2")
    _rows_together(np.ascontiguousarray(packed), together)
    return together.view(np.uint8)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _rows_together(packed, out):  # type: ignore[no-untyped-def]
    """Packed uint8 [2 n, w]; out uint16 [n, w], the bytes of two columns, the even one low."""
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            even = np.uint16(packed[2 * row, column] ^ 0x88)
            odd = np.uint16(packed[2 * row + 1, column] ^ 0x88)
            low = (even & 0x0F) | ((odd & 0x0F) << 4)
            out[row, column] = np.uint16(low | ((even >> 4) | (odd & 0xF0)) << 8)
