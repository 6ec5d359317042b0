"""The inner loops of rounding, compiled by numba: groups of weights to scales, and weights to codes.

A group is ``n`` consecutive weights; ``w`` holds groups one after the other, float32 [groups * n], and ``h`` the importance of
each column, float32 [in], which repeats every ``in`` weights, or [1] where all are alike. 64 groups stand side by side in the inner loops, so that
each sum is taken in one order on every machine: the codes do not depend on the width of its vectors. No fastmath for the same
reason.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

LANES = 64  # several vectors: each waits for its last sum, and the others work meanwhile
LONG = 256  # weights of a group from which on it is faster by itself
_F = np.float32
_ONE, _TWO = np.float32(1), np.float32(2)
# What weights are divided by is no less: the reciprocal of a subnormal number is infinite.
SMALLEST = np.float32(1e-30)
# Under a codebook a smaller scale divides, as the reciprocal of one from 2.9e-39 down is infinite; others' reciprocal multiplies.
_SMALL = np.float32(1e-38)
# Adding and taking off 1.5 * 2^23 rounds a float32 below 2^22 to the nearest integer, ties to even.
_ROUND = np.float32(12582912.0)

compiled = numba.njit(nogil=True, cache=True, error_model="numpy")
inlined = numba.njit(nogil=True, inline="always", error_model="numpy")


@inlined
def integer(x, low, high):  # type: ignore[no-untyped-def]
    return (min(max(x, low), high) + _ROUND) - _ROUND


@inlined
def _level(u, reach, base, edge):  # type: ignore[no-untyped-def]
    """The index of the nearest level: ``edge.size`` bins over ±1 / reach, each with at most one midpoint between levels.

    ``base`` [bins]: levels below a bin's midpoint less one; ``edge`` [bins]: that midpoint, or infinity.
    """
    at = int(min(max((u * reach + _ONE) * (edge.size // 2), _F(0)), _F(edge.size - 1)))
    return base[at] + np.uint8(u > edge[at])


@inlined
def _unit(x, s, inverse):  # type: ignore[no-untyped-def]
    """``x / s`` in units of a codebook's scale, by its reciprocal as bitsandbytes has it; 0 under a scale of 0."""
    return x * inverse if abs(s) >= _SMALL or s == 0 else x / s


@inlined
def _gather(w, h, n, first, lanes, x, hx):  # type: ignore[no-untyped-def]
    """Groups side by side, x and hx [n, lanes]; zeros where there are fewer. One importance: hx stays as it is."""
    into = h.size
    if lanes < LANES:
        x[:] = 0
        hx[:] = 0
    for lane in range(lanes):
        at = (first + lane) * n
        for i in range(n):
            x[i, lane] = w[at + i]
        if into > 1:
            column = at % into
            for i in range(n):
                hx[i, lane] = h[column + i]
        elif lanes < LANES:
            hx[:, lane] = 1


@inlined
def _together(sums):  # type: ignore[no-untyped-def]
    """Put into each lane's sum the sum of all, taken in one order."""
    for half in (32, 16, 8, 4, 2, 1):
        for lane in range(half):
            sums[lane] += sums[lane + half]
    sums[:] = sums[0]


@compiled
def fit_symmetric(w, h, n, low, high, signed, factors, scale):  # type: ignore[no-untyped-def]
    """Scales of codes ``low`` … ``high`` without an offset, float32 [groups]: least squares over a grid of clipping factors.

    For each factor the codes are rounded under ``extreme / low / factor`` (``signed``: of the weight of largest magnitude,
    with its sign, else ``amax / high / factor``), and the best scale for these codes has a closed form, Σhwq / Σhq².
    A long group fills the lanes by itself.

    Returns whether every weight was finite; what the scales are when not is of no use.
    """
    groups = w.size // n
    alone = n >= LONG and n % LANES == 0
    rows, width = (n // LANES, 1) if alone else (n, LANES)
    x = np.empty((rows, LANES), np.float32)
    hx = np.ones((rows, LANES), np.float32)
    least = np.empty(LANES, np.float32)
    most = np.empty(LANES, np.float32)
    unit = np.empty(LANES, np.float32)
    a = np.empty(LANES, np.float32)
    b = np.empty(LANES, np.float32)
    gain = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    finite = True
    for first in range(0, groups, width):
        lanes = min(width, groups - first)
        if alone:
            x.reshape(-1)[:] = w[first * n : (first + 1) * n]
            if h.size > 1:
                column = first * n % h.size
                hx.reshape(-1)[:] = h[column : column + n]
        else:
            _gather(w, h, n, first, lanes, x, hx)
        for lane in range(LANES):
            least[lane] = 0
            most[lane] = 0
            gain[lane] = -1
            best[lane] = 0
        for i in range(rows):
            for lane in range(LANES):
                least[lane] = x[i, lane] if x[i, lane] < least[lane] else least[lane]
                most[lane] = x[i, lane] if x[i, lane] > most[lane] else most[lane]
        if alone:
            least[:] = least.min()
            most[:] = most.max()
        for lane in range(LANES):
            size = max(most[lane], -least[lane], SMALLEST)
            unit[lane] = (-low if most[lane] > -least[lane] else low) / -size if signed else high / size
        for k in range(factors.size):
            for lane in range(LANES):
                a[lane] = 0
                b[lane] = 0
            for i in range(rows):
                for lane in range(LANES):
                    q = integer(x[i, lane] * (unit[lane] * factors[k]), low, high)
                    hq = hx[i, lane] * q
                    a[lane] += x[i, lane] * hq
                    b[lane] += q * hq
            if alone:
                _together(a)
                _together(b)
            for lane in range(LANES):
                reached = a[lane] * a[lane] / b[lane]
                better = reached > gain[lane]
                best[lane] = a[lane] / b[lane] if better else best[lane]
                gain[lane] = reached if better else gain[lane]
        for lane in range(lanes):
            scale[first + lane] = best[lane]
            finite &= bool(np.isfinite(a[lane]))
    return finite


@compiled
def fit_asymmetric(w, h, n, high, factors, scale, zero):  # type: ignore[no-untyped-def]
    """Scales and integer zero points of codes 0 … ``high``, float32 [groups] each: least squares over a grid.

    Each factor shrinks the range between the extremes (zero among them); its zero point is the nearest integer, below and above.
    """
    groups = w.size // n
    x = np.empty((n, LANES), np.float32)
    hx = np.ones((n, LANES), np.float32)
    least = np.empty(LANES, np.float32)
    most = np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    z = np.empty(LANES, np.float32)
    a = np.empty(LANES, np.float32)
    b = np.empty(LANES, np.float32)
    gain = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    best_z = np.empty(LANES, np.float32)
    finite = True
    for first in range(0, groups, LANES):
        lanes = min(LANES, groups - first)
        _gather(w, h, n, first, lanes, x, hx)
        for lane in range(LANES):
            least[lane] = 0
            most[lane] = 0
            gain[lane] = -1
            best[lane] = 0
            best_z[lane] = 0
        for i in range(n):
            for lane in range(LANES):
                least[lane] = x[i, lane] if x[i, lane] < least[lane] else least[lane]
                most[lane] = x[i, lane] if x[i, lane] > most[lane] else most[lane]
        for k in range(factors.size):
            for side in range(2):
                for lane in range(LANES):
                    unit = high / max(most[lane] - least[lane], SMALLEST)
                    inverse[lane] = unit * factors[k]
                    exact = -least[lane] * unit
                    z[lane] = min(max(np.floor(exact) + side, _F(0)), high)
                    a[lane] = 0
                    b[lane] = 0
                for i in range(n):
                    for lane in range(LANES):
                        q = integer(x[i, lane] * inverse[lane], -z[lane], high - z[lane])
                        hq = hx[i, lane] * q
                        a[lane] += x[i, lane] * hq
                        b[lane] += q * hq
                for lane in range(LANES):
                    reached = a[lane] * a[lane] / b[lane]
                    better = (reached > gain[lane]) & (a[lane] > 0)
                    best[lane] = a[lane] / b[lane] if better else best[lane]
                    best_z[lane] = z[lane] if better else best_z[lane]
                    gain[lane] = reached if better else gain[lane]
        for lane in range(lanes):
            scale[first + lane] = best[lane]
            zero[first + lane] = best_z[lane]
            finite &= bool(np.isfinite(a[lane]))
    return finite


@compiled
def fit_affine(w, h, n, high, factors, scale, minimum):  # type: ignore[no-untyped-def]
    """Scale and minimum (both ≥ 0) of weights ``scale * q - minimum``, q = 0 … ``high``: least squares over a grid."""
    groups = w.size // n
    x = np.empty((n, LANES), np.float32)
    hx = np.ones((n, LANES), np.float32)
    least = np.empty(LANES, np.float32)
    most = np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    sums = np.empty((6, LANES), np.float32)  # of h, hx, hq, hqq, hxq, hxx
    error = np.empty(LANES, np.float32)
    finite = True
    for first in range(0, groups, LANES):
        lanes = min(LANES, groups - first)
        _gather(w, h, n, first, lanes, x, hx)
        for lane in range(LANES):
            least[lane] = 0
            most[lane] = 0
            error[lane] = np.inf
            sums[0, lane] = 0
            sums[1, lane] = 0
            sums[5, lane] = 0
        for i in range(n):
            for lane in range(LANES):
                least[lane] = x[i, lane] if x[i, lane] < least[lane] else least[lane]
                most[lane] = x[i, lane] if x[i, lane] > most[lane] else most[lane]
                sums[0, lane] += hx[i, lane]
                sums[1, lane] += hx[i, lane] * x[i, lane]
                sums[5, lane] += hx[i, lane] * x[i, lane] * x[i, lane]
        for lane in range(lanes):
            scale[first + lane] = 0
            minimum[first + lane] = 0
            finite &= bool(np.isfinite(sums[1, lane]))
        for k in range(factors.size):
            for lane in range(LANES):
                inverse[lane] = high / max(most[lane] - least[lane], SMALLEST) * factors[k]
                sums[2, lane] = 0
                sums[3, lane] = 0
                sums[4, lane] = 0
            for i in range(n):
                for lane in range(LANES):
                    q = integer((x[i, lane] - least[lane]) * inverse[lane], _F(0), high)
                    hq = hx[i, lane] * q
                    sums[2, lane] += hq
                    sums[3, lane] += q * hq
                    sums[4, lane] += x[i, lane] * hq
            for lane in range(lanes):
                h0, h1, q1, q2, xq, xx = (
                    sums[0, lane],
                    sums[1, lane],
                    sums[2, lane],
                    sums[3, lane],
                    sums[4, lane],
                    sums[5, lane],
                )
                determinant = h0 * q2 - q1 * q1
                s, m = _F(0), _F(0)
                if determinant > 0:
                    s = (h0 * xq - h1 * q1) / determinant
                    m = (q1 * xq - q2 * h1) / determinant
                if m <= 0 or s <= 0:
                    m = _F(0)
                    s = xq / q2 if q2 > 0 else _F(0)
                # Σh(x - sq + m)², multiplied out
                e = xx - _TWO * s * xq + _TWO * m * h1 + s * s * q2 - _TWO * s * m * q1 + m * m * h0
                if s >= 0 and e < error[lane]:
                    error[lane] = e
                    scale[first + lane] = s
                    minimum[first + lane] = m
    return finite


@compiled
def choose_scale(w, h, n, reach, base, edge, levels, candidates, chosen):  # type: ignore[no-untyped-def]
    """Which of a few scales leaves the least squared error, by actually rounding under each.

    ``levels`` ascend; ``reach``, ``base`` and ``edge`` find them, see ``_level``; candidates float32 [groups, k]; chosen int64
    [groups].
    """
    groups, count = candidates.shape
    x = np.empty((n, LANES), np.float32)
    hx = np.ones((n, LANES), np.float32)
    inverse = np.empty(LANES, np.float32)
    s = np.empty(LANES, np.float32)
    error = np.empty(LANES, np.float32)
    least = np.empty(LANES, np.float32)
    finite = True
    for first in range(0, groups, LANES):
        lanes = min(LANES, groups - first)
        _gather(w, h, n, first, lanes, x, hx)
        least[:] = np.inf
        for k in range(count):
            for lane in range(LANES):
                s[lane] = candidates[min(first + lane, groups - 1), k]
                inverse[lane] = _ONE / max(s[lane], _SMALL)
                error[lane] = 0
            for i in range(n):
                for lane in range(LANES):
                    u = x[i, lane] * inverse[lane]
                    d = x[i, lane] - levels[_level(u, reach, base, edge)] * s[lane]
                    error[lane] += hx[i, lane] * d * d
            for lane in range(lanes):
                if error[lane] < least[lane]:
                    least[lane] = error[lane]
                    chosen[first + lane] = k
        for lane in range(lanes):
            finite &= bool(np.isfinite(error[lane]))
    return finite


@inlined
def _error_symmetric(w, h, at, column, n, s, low, high):  # type: ignore[no-untyped-def]
    inverse = _ONE / s if s != 0 else _F(0)
    error = _F(0)
    for i in range(n):
        x = w[at + i]
        d = x - s * integer(x * inverse, low, high)
        error += h[column + i] * d * d
    return error


@inlined
def _error_affine(w, h, at, column, n, s, m, high):  # type: ignore[no-untyped-def]
    inverse = _ONE / s if s != 0 else _F(0)
    error = _F(0)
    for i in range(n):
        x = w[at + i] + m
        d = x - s * integer(x * inverse, _F(0), high)
        error += h[column + i] * d * d
    return error


@compiled
def refine_symmetric(w, h, n, low, high, d, per, codes, scale_low, scale_high, new_d):  # type: ignore[no-untyped-def]
    """Sub-scale codes under a super-block's d: each takes its best neighbour by rounding under it; then d's least squares.

    ``codes`` float32 [groups], in place; d float32 [groups / per]; new_d the d that fits the codes best, float32 [groups / per].
    """
    into = h.size
    for block in range(d.size):
        a, b = _F(0), _F(0)
        for g in range(block * per, (block + 1) * per):
            at = g * n
            column = at % into
            here = codes[g]
            least = _error_symmetric(w, h, at, column, n, d[block] * here, low, high)
            for step in (_F(-1), _F(1)):
                c = codes[g] + step
                if scale_low <= c <= scale_high:
                    e = _error_symmetric(w, h, at, column, n, d[block] * c, low, high)
                    if e < least:
                        least, here = e, c
            codes[g] = here
            s = d[block] * here
            inverse = _ONE / s if s != 0 else _F(0)
            for i in range(n):
                q = here * integer(w[at + i] * inverse, low, high)
                a += h[column + i] * q * w[at + i]
                b += h[column + i] * q * q
        new_d[block] = a / b if b > 0 else d[block]


@compiled
def refine_affine(w, h, n, high, d, dmin, per, codes, minimums, most, new_d, new_dmin):  # type: ignore[no-untyped-def]
    """Sub-scale and sub-minimum codes 0 … ``most`` under a super-block's d and dmin; then both's least squares."""
    into = h.size
    for block in range(d.size):
        qq, mm, qm, xq, xm = _F(0), _F(0), _F(0), _F(0), _F(0)
        for g in range(block * per, (block + 1) * per):
            at = g * n
            column = at % into
            here, here_m = codes[g], minimums[g]
            least = _F(np.inf)
            for step in (_F(0), _F(-1), _F(1)):
                for step_m in (_F(0), _F(-1), _F(1)):
                    c, m = codes[g] + step, minimums[g] + step_m
                    if 0 <= c <= most and 0 <= m <= most:
                        e = _error_affine(w, h, at, column, n, d[block] * c, dmin[block] * m, high)
                        if e < least:
                            least, here, here_m = e, c, m
            codes[g], minimums[g] = here, here_m
            s, m = d[block] * here, dmin[block] * here_m
            inverse = _ONE / s if s != 0 else _F(0)
            for i in range(n):
                x = w[at + i]
                q = here * integer((x + m) * inverse, _F(0), high)
                weight = h[column + i]
                qq += weight * q * q
                mm += weight * here_m * here_m
                qm += weight * q * here_m
                xq += weight * x * q
                xm += weight * x * here_m
        # x ≈ d q - dmin m
        determinant = qq * mm - qm * qm
        new_d[block], new_dmin[block] = d[block], dmin[block]
        if determinant > _F(1e-6) * qq * mm:
            a = (xq * mm - qm * xm) / determinant
            b = (qm * xq - qq * xm) / determinant
            if a > 0 and b >= 0:
                new_d[block], new_dmin[block] = a, b
        elif qq > 0 and mm == 0 and xq > 0:
            new_d[block] = xq / qq


@compiled
def round_integer(w, n, scale, minimum, zero, low, high, codes):  # type: ignore[no-untyped-def]
    """Codes ``round((w + minimum) / scale) + zero`` within ``low`` … ``high``, uint8; all three float32 [groups] or [1]."""
    groups = w.size // n
    rounded = np.empty(n, np.float32)
    bits = rounded.view(np.uint32)
    for g in range(groups):
        s = scale[g]
        inverse = _ONE / s if s != 0 else _F(0)
        m = minimum[g if minimum.size > 1 else 0]
        z = zero[g if zero.size > 1 else 0]
        for i in range(n):
            q = integer((w[g * n + i] + m) * inverse, low - z, high - z)
            rounded[i] = q + z + _ROUND
        for i in range(n):
            codes[g * n + i] = np.uint8(bits[i])  # the low byte of an integer that stands in the last bits


@compiled
def round_scales(bits, held, half):  # type: ignore[no-untyped-def]
    """float32 scales as float16 holds them: bits uint32 to the bits of the float32 and the float16, ties to even.

    What is below 2^-14, the smallest normal, becomes that. Returns how many did that were not zero, and whether all others fit.
    """
    clamped, largest = 0, np.uint32(0)
    for i in range(bits.size):
        sign, size = bits[i] & np.uint32(0x80000000), bits[i] & np.uint32(0x7FFFFFFF)
        small = size < np.uint32(0x38800000)
        clamped += small & (size > 0)
        largest = max(largest, size)
        near = (size + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
        near = np.uint32(0x38800000) if small else near
        held[i] = sign | near
        half[i] = np.uint16((sign >> np.uint32(16)) | ((near - np.uint32(0x38000000)) >> np.uint32(13)))
    return clamped, largest <= np.uint32(0x477FE000)  # 65504


@compiled
def round_levels(w, n, scale, reach, base, edge, codes):  # type: ignore[no-untyped-def]
    """The index of the level of a codebook that is nearest to ``w / scale``, uint8."""
    groups = w.size // n
    for g in range(groups):
        s = scale[g]
        inverse = _ONE / max(s, _SMALL)
        for i in range(g * n, (g + 1) * n):
            codes[i] = _level(_unit(w[i], s, inverse), reach, base, edge)


@compiled
def round_e4m3(w, n, scale, codes):  # type: ignore[no-untyped-def]
    """The E4M3 byte nearest to ``w / scale``, ties to even, never beyond ±448."""
    one = np.empty(1, np.float32)
    bits = one.view(np.uint32)
    for g in range(w.size // n):
        s = scale[g]
        for i in range(g * n, (g + 1) * n):
            u = w[i] / s if s != 0 else _F(0)
            sign = np.uint8(128) if u < 0 else np.uint8(0)
            u = min(abs(u), _F(448))
            if u < _F(0.015625):  # subnormal: multiples of 2^-9
                code = np.uint8(np.rint(u * _F(512)))
            else:
                one[0] = u
                b = bits[0]
                b += np.uint32(0x7FFFF) + ((b >> np.uint32(20)) & np.uint32(1))
                code = np.uint8(
                    (b >> np.uint32(20)) - np.uint32(960)
                )  # the exponent's bias, 127 - 7, eightfold
            codes[i] = code | sign


@compiled
def pack_nibbles(codes, packed):  # type: ignore[no-untyped-def]
    """Codes below 16, uint8 [n], to uint8 [n / 2]: the even element low."""
    for i in range(packed.size):
        packed[i] = codes[2 * i] | (codes[2 * i + 1] << np.uint8(4))


class Lattice(NamedTuple):
    """What ``round_block`` rounds under; see ``lattice.searched``.

    Attributes:
        kind: 0 integers, 1 levels of a codebook, 2 E4M3.
        scale: float32 [rows, groups]. minimum, zero: float32 [rows, groups].
        low, high: of the codes.
        reach, base, edge, levels, order: see ``_level``; ``order`` the code of each level.
    """

    kind: int
    scale: Any
    minimum: Any
    zero: Any
    low: Any
    high: Any
    reach: Any
    base: Any
    edge: Any
    levels: Any
    order: Any


@compiled
def round_block(  # type: ignore[no-untyped-def]
    w, u, group, kind, scale, minimum, zero, low, high, reach, base, edge, levels, order, codes, error
):
    """GPTQ's inner loop: round columns one by one, each one's error over u's diagonal taken off those that follow.

    w float32 [rows, width], destroyed; u float32 [width, width], upper triangular; group int64 [width]; codes uint8
    [rows, width]; error float32 [rows, ≥ width], for the columns beyond the block.
    """
    rows, width = w.shape
    one = np.empty(1, np.float32)
    byte = np.empty(1, np.uint8)
    for r in range(rows):
        for j in range(width):
            g = group[j]
            s = scale[r, g]
            inverse = _ONE / s if s != 0 else _F(0)
            x = w[r, j]
            if kind == 0:
                z = zero[r, g]
                q = integer((x + minimum[r, g]) * inverse, low - z, high - z)
                codes[r, j] = np.uint8(q + z)
                value = q * s - minimum[r, g]
            elif kind == 1:
                level = _level(_unit(x, s, inverse), reach, base, edge)
                codes[r, j] = order[level]
                value = levels[level] * s
            else:
                one[0] = x
                round_e4m3(one, 1, scale[r, g : g + 1], byte)
                codes[r, j] = byte[0]
                value = levels[byte[0]] * s
            e = (x - value) / u[j, j]
            error[r, j] = e
            for k in range(j + 1, width):
                w[r, k] -= e * u[j, k]


@compiled
def spread_bits(packed, bits, codes):  # type: ignore[no-untyped-def]
    """Codes packed lowest bits first, uint8 [n * bits / 8], to a byte each, uint8 [n]; n is a multiple of 8."""
    mask, step = np.uint64((1 << bits) - 1), np.uint64(bits)
    for i in range(codes.size // 8):
        word = np.uint64(0)
        for j in range(bits):
            word |= np.uint64(packed[i * bits + j]) << np.uint64(8 * j)
        for j in range(8):
            codes[8 * i + j] = np.uint8((word >> (np.uint64(j) * step)) & mask)


@compiled
def gather_bits(codes, bits, packed):  # type: ignore[no-untyped-def]
    """Undo ``spread_bits``."""
    step = np.uint64(bits)
    for i in range(codes.size // 8):
        word = np.uint64(0)
        for j in range(8):
            word |= np.uint64(codes[8 * i + j]) << (np.uint64(j) * step)
        for j in range(bits):
            packed[i * bits + j] = np.uint8(word >> np.uint64(8 * j))
