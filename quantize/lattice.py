"""Lattices: the scales (and minimums) of a scheme for given weights, and the codes that are nearest under them.

Every rounding goes through these two steps: ``fit`` chooses a Grid by least squares, weighted by the columns' importance, and
``nearest`` rounds to it. Nothing depends on how the rows are cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout import Late
from tapeout.quantize.scheme import E4M3, E4M3_ONE, LEVELS, SUPER, Scheme, dynamic_map, reciprocal
from tapeout.quantize.tensor import DOUBLE_BLOCK, QuantTensor, ScaleCodes, pack

Floats = npt.NDArray[np.float32]

kernels = Late("tapeout.quantize.kernels")

_SMALLEST = np.float16(2.0**-14)  # the smallest normal float16
_LARGEST = np.float32(65504.0)  # the largest
_INFINITY = np.uint32(0xFF000000)  # the key of infinity; NaNs lie above

# How much of a group's range the codes span: below 1 they reach beyond its extreme, above 1 they clip it. The plain grid comes
# first, so that it stays where others are as good.
FAST = np.array([1.0, 1.08], np.float32)  # without data: within 1 % of what _FINE reaches
_FINE = np.array([1.0, 0.8, 0.84, 0.88, 0.92, 0.96, 1.04, 1.08, 1.14, 1.22], np.float32)
_WIDE = np.array([1.0, 0.95, 1.08, 1.17, 1.27, 1.4, 1.6], np.float32)  # 2 and 3 bits: clipping pays
_BINS = 64
_BYTE = np.array([1.0], np.float32)  # 8 bits: the least squares scale of the plain codes
_AFFINE = np.array([1.0, 0.82, 0.88, 0.94, 0.97, 1.03, 1.07, 1.12, 1.18], np.float32)
_SUB = np.array([1.0, 0.7, 0.78, 0.84, 0.9, 0.95, 1.05, 1.12], np.float32)


class NotFinite(ValueError):
    """A weight is NaN or infinite."""


class ScaleOverflow(ValueError):
    """A group's scale does not fit float16."""


@dataclass(frozen=True)
class Grid:
    """The scales of some rows.

    Attributes:
        scale: float32 [rows, groups], what a code is multiplied with.
        minimum: float32 [rows, groups], taken off after scaling; None: nothing.
        zero_point: uint8 [rows, groups], for asymmetric schemes.
        parts: what a store keeps of scale, minimum and zero point, by name, row by row.
        clamped: groups whose scale would be zero or subnormal in float16 and was raised to the smallest normal.
    """

    scale: Floats
    minimum: Floats | None = None
    zero_point: npt.NDArray[np.uint8] | None = None
    parts: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    clamped: int = 0

    def rows(self, index: slice) -> Grid:
        """The grid of some rows."""
        return Grid(
            self.scale[index],
            None if self.minimum is None else self.minimum[index],
            None if self.zero_point is None else self.zero_point[index],
            {name: part[index] for name, part in self.parts.items()},
        )


def warm() -> None:
    """Import numba with what it needs to run a kernel: a third of a second that need not be waited for later."""
    kernels.pack_nibbles(np.zeros(2, np.uint8), np.empty(1, np.uint8))


def fit(
    weight: Floats,
    scheme: Scheme,
    importance: Floats | None = None,
    *,
    tensor_scale: np.float32 | None = None,
) -> Grid:
    """Choose the grid of rows [rows, in] by least squares.

    Args:
        weight: float32; the group of ``scheme`` divides ``in``.
        importance: of the columns, float32 [in], ≥ 0; None: all alike.
        tensor_scale: of schemes with e4m3 scales, see ``tensor_scale``.

    Raises:
        NotFinite: a weight is NaN or infinite.
        ScaleOverflow: a scale is beyond float16.
    """
    rows, into = weight.shape
    n = scheme.group or into
    w = np.ascontiguousarray(weight).reshape(-1)
    if scheme.scales == "super":
        alike = np.ones(into, np.float32)
        return _fit_super(w, alike if importance is None else positive(importance), scheme, rows)
    h = np.ones(1, np.float32) if importance is None else positive(importance)
    fine = FAST if importance is None else _FINE
    shape = (rows, into // n)
    if scheme.kind == "symmetric":
        scale = np.empty(shape, np.float32)
        # Up to 4 bits the extreme takes the lone lowest code, whatever its sign (8.6 % relative error against 9.7 % for amax / 7).
        # 8 bits: ±127, since not every integer kernel takes -128, and there is little to gain.
        signed, middle = scheme.bits < 8, np.float32(2 ** (scheme.bits - 1))
        low, factors = (-middle, fine if scheme.bits == 4 else _WIDE) if signed else (1 - middle, _BYTE)
        _check(kernels.fit_symmetric(w, h, n, low, middle - 1, signed, factors, scale.reshape(-1)), w)
        return with_float16(scale)
    if scheme.kind == "asymmetric":
        scale, zero = np.empty(shape, np.float32), np.empty(shape, np.float32)
        high = np.float32(2**scheme.bits - 1)
        _check(kernels.fit_asymmetric(w, h, n, high, fine, scale.reshape(-1), zero.reshape(-1)), w)
        return with_float16(scale, zero.astype(np.uint8))
    return _fit_levels(w, h, n, scheme, shape, tensor_scale)


def nearest(weight: Floats, scheme: Scheme, grid: Grid) -> npt.NDArray[np.uint8]:
    """The codes of rows [rows, in] that are nearest under a grid, uint8 [rows, in]."""
    rows, into = weight.shape
    n = scheme.group or into
    codes = np.empty((rows, into), np.uint8)
    w, scale = np.ascontiguousarray(weight).reshape(-1), grid.scale.reshape(-1)
    if scheme.levels == "e4m3":
        kernels.round_e4m3(w, n, scale, codes.reshape(-1))
        return codes
    if scheme.kind == "codebook":
        table = _table(scheme.levels)
        kernels.round_levels(w, n, scale, *table.bins, codes.reshape(-1))
        return table.order[codes]
    nothing = np.zeros(1, np.float32)
    minimum = nothing if grid.minimum is None else grid.minimum.reshape(-1)
    zero, low = nothing, np.float32(0)
    if scheme.kind == "symmetric":
        zero = np.array([2 ** (scheme.bits - 1)], np.float32)
        low = np.float32(scheme.bits == 8)
    elif grid.zero_point is not None:
        zero = grid.zero_point.reshape(-1).astype(np.float32)
    high = np.float32(2**scheme.bits - 1)
    kernels.round_integer(w, n, scale, minimum, zero, low, high, codes.reshape(-1))
    return codes


def join(grids: Sequence[Grid]) -> Grid:
    """The grid of rows that were fitted in pieces."""

    def together(parts: Sequence[Any]) -> Any:
        return None if parts[0] is None else np.concatenate(parts)

    return Grid(
        together([grid.scale for grid in grids]),
        together([grid.minimum for grid in grids]),
        together([grid.zero_point for grid in grids]),
        {name: together([grid.parts[name] for grid in grids]) for name in grids[0].parts},
        sum(grid.clamped for grid in grids),
    )


def dequantize(codes: npt.NDArray[np.uint8], scheme: Scheme, grid: Grid) -> Floats:
    """The weights that codes [rows, in] are under a grid, float32 [rows, in]."""
    rows, into = codes.shape
    values = scheme.codebook()[codes].reshape(rows, -1, scheme.group or into)
    if grid.zero_point is not None:
        values -= grid.zero_point[:, :, None]
    values *= grid.scale[:, :, None]
    if grid.minimum is not None:
        values -= grid.minimum[:, :, None]
    return values.reshape(rows, into)


def searched(scheme: Scheme, grid: Grid) -> tuple[Any, ...]:
    """What ``kernels.Lattice`` holds of a scheme and the grid of some rows."""
    nothing = np.zeros_like(grid.scale)
    minimum = nothing if grid.minimum is None else grid.minimum
    if scheme.kind == "codebook":
        kind = 2 if scheme.levels == "e4m3" else 1
        table = _table("e2m1" if kind == 2 else scheme.levels)
        levels = E4M3 if kind == 2 else table.levels
        ends = np.float32(0), np.float32(0)
        return kind, grid.scale, nothing, nothing, *ends, *table.bins, levels, table.order
    zero, low = nothing, np.float32(0)
    if scheme.kind == "symmetric":
        zero, low = np.full_like(grid.scale, 2 ** (scheme.bits - 1)), np.float32(scheme.bits == 8)
    elif grid.zero_point is not None:
        zero = grid.zero_point.astype(np.float32)
    table = _table("nf4")
    high = np.float32(2**scheme.bits - 1)
    return 0, grid.scale, minimum, zero, low, high, *table.bins, table.levels, table.order


def tensor_scale(largest: float, scheme: Scheme) -> np.float32 | None:
    """The float32 scale of a whole tensor whose largest magnitude is given; None for schemes that have none.

    NVFP4 divides by the largest value of a group's scale times that of a code, 448 · 6 (NVIDIA, ModelOpt's ``NVFP4QTensor``); float8
    codes, whose rows have the scale 1 under it, by 448. It is no less than what keeps the smallest scale of a group, 2^-9 of it, a
    normal number: subnormal ones have too few bits. NVFP4's is one over a float32, since compressed-tensors divides by it.
    """
    if scheme.scales != "e4m3":
        return None
    if not largest:
        return np.float32(1)
    codes = 1 if scheme.levels == "e4m3" else 6
    scale = max(np.float32(largest) / np.float32(448 * codes), np.float32(2.0**-117))
    return scale if scheme.levels == "e4m3" else reciprocal(scale)


def layout(scheme: Scheme, out: int, into: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The parts of a tensor [out, in] in a store: dtype and shape by name."""
    groups = into // (scheme.group or into)
    parts: dict[str, tuple[str, tuple[int, ...]]] = {"codes": ("U8", (out, (into * scheme.bits + 7) // 8))}
    wide = {"float16": "F16", "float32": "F32"}.get(scheme.scales)
    if wide:
        parts["scale"] = (wide, (out, groups))
    else:
        parts["scale_codes"] = ("U8", (out, groups))
    if scheme.scales == "double":
        parts |= {"scale_block": ("F32", (-(-out * groups // DOUBLE_BLOCK),)), "scale_offset": ("F32", (1,))}
    if scheme.scales == "e4m3":
        parts["scale_block"] = ("F32", (1,))
    if scheme.scales == "super":
        parts["scale_block"] = ("F16", (out, into // SUPER))
    if scheme.kind == "affine" and scheme.scales == "float16":
        parts["minimum"] = ("F16", (out, groups))
    elif scheme.kind == "affine":
        parts |= {"minimum_codes": ("U8", (out, groups)), "minimum_block": ("F16", (out, into // SUPER))}
    if scheme.kind == "asymmetric":
        parts["zero_point"] = ("U8", (out, groups))
    if scheme.calibrated:
        parts["input_scale"] = ("F32", (1,))
    return parts


def assemble(parts: Mapping[str, npt.NDArray[Any]], scheme: Scheme, in_features: int) -> QuantTensor:
    """A tensor from the parts that ``layout`` names."""
    group = scheme.group or in_features
    codebook = scheme.scale_codebook()
    scale_codes = minimum = None
    if codebook is not None:
        per = {"double": DOUBLE_BLOCK, "super": SUPER // group}.get(scheme.scales, 1)
        block = parts.get("scale_block", np.ones(1, np.float32))
        offset = float(parts["scale_offset"][0]) if "scale_offset" in parts else 0.0
        scale_codes = ScaleCodes(parts["scale_codes"], codebook, block, per, offset)
        if scheme.kind == "affine":
            minimum = ScaleCodes(parts["minimum_codes"], codebook, parts["minimum_block"], per)
    elif scheme.kind == "affine":  # plain numbers: codes that are all 1 under a block of one each
        ones = np.ones(parts["minimum"].shape, np.uint8)
        minimum = ScaleCodes(ones, np.ones(256, np.float32), parts["minimum"], 1)
    return QuantTensor(
        packed=parts["codes"],
        bits=scheme.bits,
        in_features=in_features,
        scale=parts["scale"] if scale_codes is None else scale_codes.values(),
        group=group,
        codebook=scheme.codebook(),
        zero_point=parts.get("zero_point"),
        scale_codes=scale_codes,
        minimum=minimum,
        input_scale=np.float32(parts["input_scale"][0]) if "input_scale" in parts else None,
    )


def quantize_scales(scale: Floats) -> dict[str, npt.NDArray[Any]]:
    """Double quantization of the scales of a whole tensor [out, groups]: 8-bit codes over blocks of 256 (QLoRA, section 3)."""
    codebook = dynamic_map()
    offset = np.float32(scale.mean(dtype=np.float64))
    flat = scale.reshape(-1) - offset
    padded = np.zeros(-(-flat.size // DOUBLE_BLOCK) * DOUBLE_BLOCK, np.float32)
    padded[: flat.size] = flat
    blocks = padded.reshape(-1, DOUBLE_BLOCK)
    block_scale = np.abs(blocks).max(axis=1)
    # As bitsandbytes has it: times the reciprocal. Below 1e-38, where that may be infinite, it leaves codes that are not the nearest.
    unit = blocks * (np.float32(1) / np.maximum(block_scale, np.float32(1e-38)))[:, None]
    tiny = (block_scale < np.float32(1e-38)) & (block_scale > 0)
    unit[tiny] = blocks[tiny] / block_scale[tiny, None]
    between = (codebook[1:] + codebook[:-1]) / np.float32(2)
    codes = np.searchsorted(between, unit.reshape(-1)[: flat.size], side="left").astype(np.uint8)
    return {
        "scale_codes": codes.reshape(scale.shape),
        "scale_block": block_scale,
        "scale_offset": np.array([offset], np.float32),
    }


def packed_parts(codes: npt.NDArray[np.uint8], scheme: Scheme, grid: Grid) -> dict[str, npt.NDArray[Any]]:
    """What a store keeps of some rows."""
    return {"codes": pack(codes, scheme.bits), **grid.parts}


def _fit_levels(
    w: Floats, h: Floats, n: int, scheme: Scheme, shape: tuple[int, int], whole: np.float32 | None
) -> Grid:
    """The grid of a codebook: its scale is the best of a few candidates near the group's largest magnitude."""
    largest = np.abs(_signed_extreme(w.reshape(*shape, n)))
    if (
        scheme.scales == "double"
    ):  # byte-equal to bitsandbytes, which searches nothing, and quantizes the scales afterwards
        return Grid(largest, parts={"scale": largest})
    if whole is not None and scheme.levels == "e4m3":
        ones = np.full(shape, E4M3_ONE, np.uint8)
        return Grid(np.full(shape, whole), parts={"scale_codes": ones})
    if scheme.levels == "e4m3":  # as fine at any scale
        return with_float16(np.asarray(largest / np.float32(448), np.float32))
    table = _table(scheme.levels)
    if scheme.scales == "float16":
        candidates, *_ = _to_float16(largest[..., None] * np.array([0.82, 0.88, 0.93, 0.97, 1.0], np.float32))
        codes = None
    elif scheme.scales == "e8m0":
        # OCP Microscaling Formats 1.0, section 6.3: the exponent of the largest magnitude less that of 6; and its neighbours.
        _, exponent = np.frexp(largest)
        codes = np.clip(exponent[..., None].astype(np.int64) - 3 + 127 + np.arange(-1, 2), 1, 254)
        candidates = _codebook(scheme)[codes]
    else:
        assert whole is not None
        wanted = largest / np.float32(6) / whole
        base = np.searchsorted(_E4M3_BETWEEN, wanted, side="left")
        codes = np.clip(base[..., None] + np.arange(-3, 3), 1, 126)
        candidates = E4M3[codes] * whole
    chosen = np.zeros(largest.size, np.int64)
    flat = np.ascontiguousarray(candidates.reshape(largest.size, -1), np.float32)
    _check(kernels.choose_scale(w, h, n, *table.bins, table.levels, flat, chosen), w)
    scale = np.take_along_axis(flat, chosen[:, None], 1).reshape(shape)
    if codes is None:
        tiny = (largest != 0) & (largest < np.float32(_SMALLEST))
        return replace(with_float16(scale), clamped=int(np.count_nonzero(tiny)))
    kept = np.take_along_axis(codes.reshape(largest.size, -1), chosen[:, None], 1).reshape(shape)
    return Grid(scale, parts={"scale_codes": kept.astype(np.uint8)})


def _fit_super(w: Floats, h: Floats, scheme: Scheme, rows: int) -> Grid:
    """Super-blocks: each group's own scale (and minimum), rounded to integers under a float16 d, then refined under it."""
    n, groups = scheme.group or 0, w.size // (scheme.group or 1)
    per = SUPER // n
    scale, minimum = np.empty(groups, np.float32), np.zeros(groups, np.float32)
    if scheme.kind == "symmetric":
        middle = np.float32(2 ** (scheme.bits - 1))
        factors = _SUB if scheme.bits < 5 else _FINE
        _check(kernels.fit_symmetric(w, h, n, -middle, middle - 1, True, factors, scale), w)
        low = -np.float32(2 ** (scheme.scale_bits - 1))
        extreme = _signed_extreme(scale.reshape(1, -1, per))[0]
        d, codes = _under(extreme / low, scale, per, low, -low - 1)
        for _ in range(2):
            new = np.empty_like(d)
            kernels.refine_symmetric(w, h, n, -middle, middle - 1, d, per, codes, low, -low - 1, new)
            d = _finite16(new)
        kernels.refine_symmetric(w, h, n, -middle, middle - 1, d, per, codes, low, -low - 1, new)
        parts = {"scale_codes": codes - low, "scale_block": d}
        minimums = None
    else:
        high, most = np.float32(2**scheme.bits - 1), np.float32(2**scheme.scale_bits - 1)
        _check(kernels.fit_affine(w, h, n, high, _AFFINE, scale, minimum), w)
        d, codes = _under(scale.reshape(-1, per).max(axis=1) / most, scale, per, np.float32(0), most)
        dmin, minimums = _under(
            minimum.reshape(-1, per).max(axis=1) / most, minimum, per, np.float32(0), most
        )
        for last in (False, False, True):
            new, new_min = np.empty_like(d), np.empty_like(dmin)
            kernels.refine_affine(w, h, n, high, d, dmin, per, codes, minimums, most, new, new_min)
            if not last:
                d, dmin = _finite16(new), _finite16(new_min)
        parts = {
            "scale_codes": codes,
            "scale_block": d,
            "minimum_codes": minimums,
            "minimum_block": dmin,
        }
    stored = {
        name: part.reshape(rows, -1).astype(np.float16 if name.endswith("block") else np.uint8)
        for name, part in parts.items()
    }
    taken = None if minimums is None else (minimums * np.repeat(dmin, per)).reshape(rows, -1)
    return Grid((codes * np.repeat(d, per)).reshape(rows, -1), taken, parts=stored)


def _under(d: Floats, scale: Floats, per: int, low: np.float32, high: np.float32) -> tuple[Floats, Floats]:
    """D as float16 holds it, and the integers [groups] that stand for ``scale`` under it."""
    d = _finite16(d)
    wide = np.repeat(d, per)
    return d, np.clip(np.rint(np.divide(scale, wide, out=np.zeros_like(scale), where=wide != 0)), low, high)


def _finite16(values: Floats) -> Floats:
    """Rounded to float16, subnormals kept: the integers under a d are chosen under the rounded one."""
    if values.size and np.abs(values).max() > _LARGEST:
        raise ScaleOverflow
    return values.astype(np.float16).astype(np.float32)


def positive(importance: Floats) -> Floats:
    """Importance with a mean of 1 and none below a millionth of it: a column that no data reached still has a nearest code."""
    h = importance.astype(np.float64)
    mean = h.mean()
    return np.ascontiguousarray(np.maximum(h / (mean or 1.0), 1e-6), np.float32)


def _check(finite: bool, w: Floats) -> None:
    if not finite:
        raise NotFinite if not np.isfinite(w).all() else ScaleOverflow


def _signed_extreme(grouped: Floats) -> Floats:
    """The value of largest magnitude in each group, [rows, groups, n] to [rows, groups]; on a tie the negative one.

    Rotating the bits of a float32 left by one puts its magnitude above its sign: one integer maximum finds both.
    """
    bits = grouped.view(np.uint32)
    key = np.maximum.reduce((bits << 1) | (bits >> 31), axis=-1)
    if key.size and key.max() >= _INFINITY:
        raise NotFinite
    found: Floats = ((key >> 1) | (key << 31)).view(np.float32)
    return found


def _to_float16(scale: Floats) -> tuple[Floats, npt.NDArray[np.float16], int]:
    """Scales as float16 holds them, in both types, those below its normal range raised to the smallest normal; and how many.

    A group of zeros is exact under any scale, and is not counted.
    """
    scale = np.ascontiguousarray(scale)
    held, half = np.empty(scale.shape, np.float32), np.empty(scale.shape, np.float16)
    bits = [array.reshape(-1).view(f"u{array.itemsize}") for array in (scale, held, half)]
    clamped, fits = kernels.round_scales(*bits)
    if not fits:
        raise ScaleOverflow
    return held, half, clamped


def with_float16(scale: Floats, zero_point: npt.NDArray[np.uint8] | None = None) -> Grid:
    """A grid of float16 scales."""
    held, half, clamped = _to_float16(scale)
    parts: dict[str, npt.NDArray[Any]] = {"scale": half}
    if zero_point is not None:
        parts["zero_point"] = zero_point
    return Grid(held, None, zero_point, parts, clamped)


@dataclass(frozen=True)
class _Table:
    """How a codebook is searched: its levels in ascending order, each once, the code of each, and ``kernels._level``'s bins."""

    levels: Floats
    order: npt.NDArray[np.uint8]
    bins: tuple[np.float32, npt.NDArray[np.uint8], Floats]


@cache
def _table(levels: str) -> _Table:
    values, first = np.unique(LEVELS[levels], return_index=True)
    between = (values[1:] + values[:-1]) / np.float32(2)
    reach = np.float32(1) / np.abs(values).max()
    edge = np.full(_BINS, np.inf, np.float32)
    at = ((between * reach + np.float32(1)) * np.float32(_BINS // 2)).astype(int)
    assert len(set(at)) == len(at), "a bin holds two midpoints"
    edge[at] = between
    base = np.searchsorted(at, np.arange(_BINS), side="left").astype(np.uint8)
    return _Table(values, first.astype(np.uint8), (reach, base, edge))


@cache
def _codebook(scheme: Scheme) -> Floats:
    found = scheme.scale_codebook()
    assert found is not None
    return found


_E4M3_BETWEEN = (E4M3[1:127] + E4M3[:126]) / np.float32(2)
