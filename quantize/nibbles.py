"""The inner loop of ``rtn.packed_rows``, compiled by numba: symmetric 4-bit codes in one pass over a checkpoint's own bits."""

from __future__ import annotations

import numba
import numpy as np

from tapeout.quantize.kernels import LANES, SMALLEST, compiled, inlined, integer, round_scales

_F, _U = np.float32, np.uint32
_HIGH = np.uint32(0xFFFF0000)


@inlined
def _gather(words, narrow, n, first, lanes, turned, bits):  # type: ignore[no-untyped-def]
    """Groups side by side, bits of float32 [n, LANES]: four of bfloat16 in a word, or two of float32; zeros where there are fewer."""
    per = n // 4 if narrow else n // 2
    if lanes < LANES:
        turned[:] = 0
    for lane in range(lanes):
        group = words[(first + lane) * per : (first + lane + 1) * per]
        for i in range(per):
            turned[i, lane] = group[i]
    if narrow:
        for i in range(per):
            for lane in range(LANES):
                low, high = _U(turned[i, lane]), _U(turned[i, lane] >> np.uint64(32))
                bits[4 * i, lane] = low << _U(16)
                bits[4 * i + 1, lane] = low & _HIGH
                bits[4 * i + 2, lane] = high << _U(16)
                bits[4 * i + 3, lane] = high & _HIGH
    else:
        for i in range(per):
            for lane in range(LANES):
                bits[2 * i, lane] = _U(turned[i, lane])
                bits[2 * i + 1, lane] = _U(turned[i, lane] >> np.uint64(32))


@inlined
def _nibble(x, inverse):  # type: ignore[no-untyped-def]
    """The code in the last bits of a word: adding 1.5 * 2^23 rounds, and 8 is where codes begin."""
    return _F(min(max(x * inverse, _F(-8)), _F(7)) + _F(12582912 + 8)).view(np.uint32) & _U(15)


@compiled
def round_words(words, narrow, n, factors, codes, scale):  # type: ignore[no-untyped-def]
    """``fit_symmetric`` of codes -8 … 7, ``round_scales`` and ``round_integer``, 64 groups at a time.

    Several weights of a group are looked at in each inner loop, one after the other: sums are taken in the order of ``fit_symmetric``.

    words: uint64, see ``_gather``; codes: uint32, eight each; scale: the bits of float16, uint16 [groups]. Returns how many scales were
    raised to the smallest normal, and whether all weights were finite and their scales no larger than float16's largest.
    """
    turned = np.empty((n // 2, LANES), np.uint64)
    bits = np.empty((n, LANES), np.uint32)
    x = bits.view(np.float32)
    word = np.empty(LANES, np.uint32)
    least = np.empty(LANES, np.float32)
    most = np.empty(LANES, np.float32)
    unit = np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    a = np.empty(LANES, np.float32)
    b = np.empty(LANES, np.float32)
    gain = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    held = best.view(np.uint32)
    clamped, finite = 0, True
    for first in range(0, scale.size, LANES):
        lanes = min(LANES, scale.size - first)
        _gather(words, narrow, n, first, lanes, turned, bits)
        least[:] = 0
        most[:] = 0
        for i in range(0, n, 4):
            for lane in range(LANES):
                low, high = least[lane], most[lane]
                for j in numba.literal_unroll((0, 1, 2, 3)):
                    low = x[i + j, lane] if x[i + j, lane] < low else low
                    high = x[i + j, lane] if x[i + j, lane] > high else high
                least[lane], most[lane] = low, high
        for lane in range(LANES):
            size = max(most[lane], -least[lane], SMALLEST)
            unit[lane] = (_F(8) if most[lane] > -least[lane] else _F(-8)) / -size
            gain[lane] = -1
            best[lane] = 0
        for k in range(factors.size):
            for lane in range(LANES):
                a[lane] = 0
                b[lane] = 0
                inverse[lane] = unit[lane] * factors[k]
            for i in range(0, n, 4):
                for lane in range(LANES):
                    xq, qq = a[lane], b[lane]
                    for j in numba.literal_unroll((0, 1, 2, 3)):
                        q = integer(x[i + j, lane] * inverse[lane], _F(-8), _F(7))
                        xq += x[i + j, lane] * q
                        qq += q * q
                    a[lane], b[lane] = xq, qq
            for lane in range(LANES):
                reached = a[lane] * a[lane] / b[lane]
                better = reached > gain[lane]
                best[lane] = a[lane] / b[lane] if better else best[lane]
                gain[lane] = reached if better else gain[lane]
        for lane in range(lanes):
            finite &= bool(np.isfinite(a[lane]))
        raised, fits = round_scales(held[:lanes], held[:lanes], scale[first : first + lanes])
        clamped += raised
        finite &= fits
        for lane in range(LANES):
            inverse[lane] = _F(1) / best[lane]
        for i in range(0, n, 8):
            for lane in range(LANES):
                both = _U(0)
                for j in numba.literal_unroll((0, 1, 2, 3, 4, 5, 6, 7)):
                    both |= _nibble(x[i + j, lane], inverse[lane]) << _U(4 * j)
                word[lane] = both
            for lane in range(lanes):
                codes[((first + lane) * n + i) // 8] = word[lane]
    return clamped, finite
