"""The packers of the types that whole models are made of, compiled by numba: canonical bytes straight to blocks."""

from __future__ import annotations

import numba
import numpy as np

compiled = numba.njit(nogil=True, cache=True, error_model="numpy")
inlined = numba.njit(nogil=True, inline="always", error_model="numpy")

_LOW = np.uint64(0x0F0F0F0F0F0F0F0F)  # the low nibble of each byte
_U4, _U8, _U16, _U32, _U48 = (np.uint64(n) for n in (4, 8, 16, 32, 48))
_BYTES = np.uint64(0x00FF00FF00FF00FF)
_PAIRS = np.uint64(0x0000FFFF0000FFFF)
_FOUR = np.uint64(0x00000000FFFFFFFF)


@inlined
def _apart(word):  # type: ignore[no-untyped-def]
    """The four low bytes of a word, each into the low byte of a uint16."""
    word = (word | (word << _U16)) & _PAIRS
    return (word | (word << _U8)) & _BYTES


@compiled
def pack_q4_0(words, d, out):  # type: ignore[no-untyped-def]
    """Canonical nibbles (low: even element), uint64 [blocks * 2], to Q4_0, uint16 [blocks * 9].

    d: the bits of the scales, uint16 [groups]; a group is a whole number of blocks.
    """
    per = words.size // (2 * d.size)
    for block in range(words.size // 2):
        first, second = words[2 * block], words[2 * block + 1]  # elements 0 … 15, and 16 … 31
        even = (first & _LOW) | ((second & _LOW) << _U4)
        odd = ((first >> _U4) & _LOW) | (second & ~_LOW)
        at = 9 * block
        out[at] = d[block // per]
        for half in range(2):
            word = _apart(even & _FOUR) | (_apart(odd & _FOUR) << _U8)
            out[at + 1 + 4 * half] = np.uint16(word)
            out[at + 2 + 4 * half] = np.uint16(word >> _U16)
            out[at + 3 + 4 * half] = np.uint16(word >> _U32)
            out[at + 4 + 4 * half] = np.uint16(word >> _U48)
            even >>= _U32
            odd >>= _U32


@compiled
def pack_q8_0(pairs, d, out):  # type: ignore[no-untyped-def]
    """Canonical bytes (code + 128), two by two, uint16 [blocks * 16], to Q8_0, uint16 [blocks * 17]; d as for ``pack_q4_0``."""
    per = pairs.size // (16 * d.size)
    for block in range(pairs.size // 16):
        out[17 * block] = d[block // per]
        for i in range(16):
            out[17 * block + 1 + i] = pairs[16 * block + i] ^ np.uint16(0x8080)
