"""Round to nearest: each weight takes the closest code under the scale that its group's extremes give.

Whole arrays, a few rows at a time so that every step stays in the cache. The scale is rounded to float16 first and the
codes are chosen under the rounded one. Nothing here depends on how the rows are cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.quantize.scheme import NF4, Scheme

Floats = npt.NDArray[np.float32]

_SMALLEST = np.float16(2.0**-14)  # the smallest normal float16
_LARGEST = np.float32(65504.0)  # the largest
_INFINITY = np.uint32(0xFF000000)  # the key of infinity; NaNs lie above
_NF4_BETWEEN = (NF4[1:] + NF4[:-1]) / np.float32(2)


class NotFinite(ValueError):
    """A weight is NaN or infinite."""


class ScaleOverflow(ValueError):
    """A group's scale does not fit float16."""


@dataclass(frozen=True)
class Rounded:
    """What rounding some rows gives.

    Attributes:
        codes: uint8 [rows, in].
        scale: float16 [rows, groups]; float32 for a scheme with double quantization, whose scales are quantized later.
        zero_point: uint8 [rows, groups], for asymmetric schemes.
        clamped: groups whose scale would be zero or subnormal in float16 and was raised to the smallest normal.
    """

    codes: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float16] | Floats
    zero_point: npt.NDArray[np.uint8] | None
    clamped: int


def round_to_nearest(weight: Floats, scheme: Scheme) -> Rounded:
    """Round rows of a weight [rows, in]; the group of ``scheme`` divides ``in``.

    Raises:
        NotFinite: a weight is NaN or infinite.
        ScaleOverflow: a scale is beyond float16.
    """
    rows, into = weight.shape
    grouped = weight.reshape(rows, -1, scheme.group or into)
    if scheme.kind == "asymmetric":
        low, high = _extremes(grouped)
        scale, clamped = _float16((high - low) / np.float32(2**scheme.bits - 1))
        wide = scale.astype(np.float32)
        zero = np.clip(np.rint(-low / wide), 0, 2**scheme.bits - 1)
        codes = _nearest_integer(grouped, wide, zero, scheme.bits)
        return Rounded(codes.reshape(rows, into), scale, zero.astype(np.uint8), clamped)
    extreme = _signed_extreme(grouped)
    if scheme.kind == "nf4":
        if scheme.double_quant:  # codes are chosen before the scales are quantized, as bitsandbytes does
            wide = np.abs(extreme)
            codes = _nearest_nf4(grouped, np.where(wide == 0, np.float32(1), wide))
            return Rounded(codes.reshape(rows, into), wide, None, 0)
        scale, clamped = _float16(np.abs(extreme))
        codes = _nearest_nf4(grouped, scale.astype(np.float32))
        return Rounded(codes.reshape(rows, into), scale, None, clamped)
    middle = 2 ** (scheme.bits - 1)
    # 4 bits: the extreme takes the lone code -8, whatever its sign (8.6 % relative error against 9.7 % for amax / 7).
    # 8 bits: ±127, since not every integer kernel takes -128, and there is little to gain.
    largest, taken = (extreme, -middle) if scheme.bits < 8 else (np.abs(extreme), middle - 1)
    scale, clamped = _float16(np.divide(largest, taken, dtype=np.float32))
    codes = _nearest_integer(grouped, scale.astype(np.float32), np.float32(middle), scheme.bits)
    return Rounded(codes.reshape(rows, into), scale, None, clamped)


def _signed_extreme(grouped: Floats) -> Floats:
    """The value of largest magnitude in each group, [rows, groups, group] to [rows, groups]; on a tie the negative one.

    Rotating the bits of a float32 left by one puts its magnitude above its sign: one integer maximum finds both.
    """
    bits = grouped.view(np.uint32)
    turned = bits << 1
    turned |= bits >> 31
    key = _fold(turned, np.maximum)
    if key.size and key.max() >= _INFINITY:
        raise NotFinite
    return ((key >> 1) | (key << 31)).view(np.float32)


def _extremes(grouped: Floats) -> tuple[Floats, Floats]:
    """Smallest and largest value of each group, with zero between them, [rows, groups]."""
    low = np.minimum(_fold(grouped, np.minimum), np.float32(0))
    high = np.maximum(_fold(grouped, np.maximum), np.float32(0))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise NotFinite
    return low, high


def _fold(grouped: npt.NDArray[Any], ufunc: np.ufunc) -> npt.NDArray[Any]:
    """Reduce the last axis, neighbour with neighbour while it is even: over short rows numpy's own reduction is slow."""
    rows, groups, left = grouped.shape
    flat = grouped.reshape(-1)
    while left % 2 == 0:
        flat = ufunc(flat[0::2], flat[1::2])
        left //= 2
    folded = flat.reshape(rows, groups, left)
    return folded[..., 0] if left == 1 else ufunc.reduce(folded, axis=-1)


def _float16(scale: Floats) -> tuple[npt.NDArray[np.float16], int]:
    """Round scales to float16, raising those below its normal range to the smallest normal.

    Returns the scales and how many non-zero ones were raised (a group of zeros is exact under any scale).
    """
    if scale.size and np.abs(scale).max() > _LARGEST:
        raise ScaleOverflow
    rounded = scale.astype(np.float16)
    small = np.abs(rounded) < _SMALLEST
    clamped = int(np.count_nonzero(small & (scale != 0)))
    if small.any():
        rounded = np.where(small, np.copysign(_SMALLEST, rounded), rounded)
    return rounded, clamped


def _nearest_integer(
    grouped: Floats, scale: Floats, zero: Floats | np.float32, bits: int
) -> npt.NDArray[np.uint8]:
    """``round(weight / scale) + zero``, ties to even, clipped to the codes."""
    steps = grouped / scale[:, :, None]
    np.rint(steps, out=steps)
    steps += zero[:, :, None] if isinstance(zero, np.ndarray) else zero
    np.clip(steps, 0, 2**bits - 1, out=steps)
    return steps.astype(np.uint8)


def _nearest_nf4(grouped: Floats, scale: Floats) -> npt.NDArray[np.uint8]:
    """The NF4 code nearest to ``weight / scale``: how many midpoints between codes lie below it."""
    unit = grouped / scale[:, :, None]
    codes = np.zeros(unit.shape, np.uint8)
    for between in _NF4_BETWEEN:
        codes += unit > between
    return codes
