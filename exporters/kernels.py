"""Inner loops that directories share, compiled by numba."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(nogil=True, cache=True, error_model="numpy")
def rows_together(packed, out):  # type: ignore[no-untyped-def]
    """Packed uint8 [2 n, w]; out uint16 [n, w], the bytes of two columns, the even one low."""
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            even = np.uint16(packed[2 * row, column] ^ 0x88)
            odd = np.uint16(packed[2 * row + 1, column] ^ 0x88)
            low = (even & 0x0F) | ((odd & 0x0F) << 4)
            out[row, column] = np.uint16(low | ((even >> 4) | (odd & 0xF0)) << 8)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def look_up(table, index, out):  # type: ignore[no-untyped-def]
    """What a table, uint16 [65536], has at each index, uint16 [n]."""
    for i in range(index.size):
        out[i] = table[index[i]]
