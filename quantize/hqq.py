"""Half-Quadratic Quantization: scales and zero points that leave a small l_p error, p < 1; needs no calibration data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs, 2023). Two steps take turns: the
residual is shrunk to its sparse part, and the grid is fitted to the weight without that part. What is ours:

- Residuals are measured in steps of their group's scale, so that the shrinkage means the same in every model. On raw weights,
  most of them far below 1, HQQ's beta lets next to nothing through.
- The scale moves, and zero points are integers: canonical codes have no others, and most schemes have none.
- Of its iterates a group keeps the one of the least l_p error of which neither the squared nor the largest error is above that of
  ``rtn``. So none of the three is, whatever the weights. Without the last, many small errors were bought with a few large ones:
  on a trained model the squared error fell by 2 % and the divergence rose by 4 to 5 % (``benchmarks/rounding_spread.py``).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout import Late
from tapeout.quantize import lattice
from tapeout.quantize.lattice import Floats, Grid
from tapeout.quantize.rtn import Rounded
from tapeout.quantize.scheme import SUPER, Scheme

kernels = Late("tapeout.quantize.kernels")

# HQQ takes 0.7. A power made of square roots is the same on every machine: IEEE 754 says how they are rounded.
P = 11 / 16
# HQQ goes 20 times from a beta of 10; the smaller one gets as far in half of them.
_BETA, _KAPPA, _ITERATIONS = np.float32(5), np.float32(1.01), 10
_SEARCHES = 6  # iterations where a grid is not a formula but a search, each as long as rtn
_LANES = 16
_ZERO, _TINY = np.float32(0), np.float32(1e-30)
_LARGEST = np.float32(65504)  # of float16


def round_hqq(
    weight: Floats,
    scheme: Scheme,
    importance: Floats | None = None,
    *,
    tensor_scale: np.float32 | None = None,
) -> Rounded:
    """Round rows of a weight [rows, in]; see ``lattice.fit`` for the arguments and what it raises."""
    weight = np.ascontiguousarray(weight)
    grid = best = lattice.fit(weight, scheme, importance, tensor_scale=tensor_scale)
    if scheme.scales in ("e8m0", "e4m3"):  # rtn tried all scales near: another has a larger squared error
        return Rounded(lattice.nearest(weight, scheme, grid), grid)
    h = np.ones(weight.shape[1], np.float32) if importance is None else lattice.positive(importance)
    searched = scheme.scales == "super"
    target = np.empty_like(weight) if searched else np.empty((0, 0), np.float32)
    sums = least = squared = largest = np.empty(0, np.float32)
    beta = _BETA
    for iteration in range(1 + (_SEARCHES if searched else _ITERATIONS)):
        if iteration:
            grid = (
                _searched(target, weight, scheme, importance)
                if searched
                else _closed_form(sums, scheme, grid)
            )
        codes = lattice.nearest(weight, scheme, grid)
        sums = _measure(weight, codes, scheme, grid, h, beta, target)
        beta *= _KAPPA
        error, square = _by_unit(sums[:2], scheme, np.add)
        (most,) = _by_unit(sums[7:], scheme, np.maximum)
        if iteration == 0:
            least, squared, largest = error, square, most
        else:
            better = (error < least) & (square <= squared) & (most <= largest)
            least = np.where(better, error, least)
            best = _merged(better, grid, best)
    return Rounded(lattice.nearest(weight, scheme, best), best)


def _measure(
    weight: Floats,
    codes: npt.NDArray[np.uint8],
    scheme: Scheme,
    grid: Grid,
    h: Floats,
    beta: np.float32,
    target: Floats,
) -> Floats:
    """What ``_sums_of_groups`` gives of each group, float32 [8, rows, groups]; ``target`` [rows, in] is filled unless it is empty."""
    rows, into = weight.shape
    n = scheme.group or into
    nothing = np.zeros(1, np.float32)
    zero = nothing if grid.zero_point is None else grid.zero_point.reshape(-1).astype(np.float32)
    minimum = nothing if grid.minimum is None else grid.minimum.reshape(-1)
    sums = np.empty((8, rows, into // n), np.float32)
    _sums()(
        weight.reshape(-1),
        codes.reshape(-1),
        scheme.codebook(),
        h,
        n,
        grid.scale.reshape(-1),
        zero,
        minimum,
        beta,
        sums.reshape(8, -1),
        target.reshape(-1),
    )
    return sums


def _sums_of_groups(
    w: Floats,
    codes: npt.NDArray[np.uint8],
    codebook: Floats,
    h: Floats,
    n: int,
    scale: Floats,
    zero: Floats,
    minimum: Floats,
    beta: np.float32,
    sums: Floats,
    target: Floats,
) -> None:
    """By group: Σh|r|^p, Σhr², Σhvt, Σhv², Σht, Σhv, Σh and max hr², with v the value of a code before its scale and r the residual.

    t (``target``) is the weight less ``shrink(r) = sign(r) relu(|r| - |r|^(p-1) / beta)``, r there in steps of the scale.
    A sum is sixteen partial ones, as the other kernels have sixteen lanes: one order on every machine.
    """
    into, whole = h.size, n // _LANES * _LANES
    v, t = np.empty(n, np.float32), np.empty(n, np.float32)
    powers, squares = np.empty(n, np.float32), np.empty(n, np.float32)
    partial = np.empty((7, _LANES), np.float32)
    for g in range(scale.size):
        at, s = g * n, scale[g]
        z, m = zero[g if zero.size > 1 else 0], minimum[g if minimum.size > 1 else 0]
        root = np.sqrt(np.sqrt(abs(s)))
        cut = abs(s) * root * np.sqrt(np.sqrt(root)) / beta  # |s|^(2 - p) / beta
        x, hg = w[at : at + n], h[at % into : at % into + n]
        for i in range(n):
            v[i] = codebook[codes[at + i]] - z
        for i in range(n):
            r = x[i] - (v[i] * s - m)
            size = abs(r)
            half = np.sqrt(size)
            eighth = np.sqrt(np.sqrt(half))
            power = half * eighth * np.sqrt(eighth)
            t[i] = x[i] - np.copysign(max(size - cut * power / max(size, _TINY), _ZERO), r)
            powers[i] = hg[i] * power
            squares[i] = hg[i] * (r * r)
        if target.size:
            target[at : at + n] = t
        partial[:] = 0
        for first in range(0, whole, _LANES):
            for lane in range(_LANES):
                i = first + lane
                hv = hg[i] * v[i]
                partial[0, lane] += powers[i]
                partial[1, lane] += squares[i]
                partial[2, lane] += hv * t[i]
                partial[3, lane] += hv * v[i]
                partial[4, lane] += hg[i] * t[i]
                partial[5, lane] += hv
                partial[6, lane] += hg[i]
        for i in range(whole, n):
            hv = hg[i] * v[i]
            partial[0, 0] += powers[i]
            partial[1, 0] += squares[i]
            partial[2, 0] += hv * t[i]
            partial[3, 0] += hv * v[i]
            partial[4, 0] += hg[i] * t[i]
            partial[5, 0] += hv
            partial[6, 0] += hg[i]
        for k in range(7):
            total = _ZERO
            for lane in range(_LANES):
                total += partial[k, lane]
            sums[k, g] = total
        sums[7, g] = squares.max()


@cache
def _sums() -> Any:
    return kernels.compiled(_sums_of_groups)


def _by_unit(errors: Floats, scheme: Scheme, joined: np.ufunc) -> Floats:
    """Errors by group, [kinds, rows, groups], joined over what has one grid: a super-block, or the group itself."""
    if scheme.scales != "super":
        return errors
    each: Floats = errors.reshape(*errors.shape[:2], -1, SUPER // (scheme.group or SUPER))
    whole: Floats = joined.reduce(each, axis=-1)
    return whole


def _closed_form(sums: Floats, scheme: Scheme, grid: Grid) -> Grid:
    """The scale, and before it the zero point, that fit the target best with the codes as they are."""
    vt, vv = sums[2], sums[3]
    zero = None
    if grid.zero_point is not None:
        # HQQ's mean of code - t / s, as an integer; the sums are then those of v + moved.
        old = grid.zero_point.astype(np.float32)
        wanted = np.rint(old + (sums[5] - sums[4] / grid.scale) / sums[6])
        zero = np.clip(wanted, 0, 2**scheme.bits - 1)
        moved = old - zero
        vt = vt + moved * sums[4]
        vv = vv + moved * (2 * sums[5] + moved * sums[6])
    scale = np.divide(vt, vv, out=np.zeros_like(vt), where=vv > 0)
    usable = (scale != 0) & (np.abs(scale) <= _LARGEST)
    if scheme.kind != "symmetric":
        usable &= scale > 0
    scale = np.where(usable, scale, grid.scale)
    if scheme.scales == "double":
        return Grid(scale, parts={"scale": scale})
    if grid.zero_point is None or zero is None:
        return lattice.with_float16(scale)
    return lattice.with_float16(scale, np.where(usable, zero, grid.zero_point).astype(np.uint8))


def _searched(target: Floats, weight: Floats, scheme: Scheme, importance: Floats | None) -> Grid:
    """The grid that ``lattice.fit`` finds for the target; rows of which it does not fit are fitted as they are."""
    try:
        return lattice.fit(target, scheme, importance)
    except lattice.ScaleOverflow:
        for row in range(len(target)):
            try:
                lattice.fit(target[row : row + 1], scheme, importance)
            except lattice.ScaleOverflow:
                target[row] = weight[row]
        return lattice.fit(target, scheme, importance)


def _merged(better: npt.NDArray[np.bool_], new: Grid, old: Grid) -> Grid:
    """``new`` in the units where it is better [rows, units], ``old`` elsewhere."""

    def pick(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.where(np.repeat(better, a.shape[1] // better.shape[1], axis=1), a, b)

    return replace(
        old,
        scale=pick(new.scale, old.scale),
        minimum=None if new.minimum is None or old.minimum is None else pick(new.minimum, old.minimum),
        zero_point=None
        if new.zero_point is None or old.zero_point is None
        else pick(new.zero_point, old.zero_point),
        parts={name: pick(part, old.parts[name]) for name, part in new.parts.items()},
    )
