"""Operations that turn stored codes into a weight: ``constexpr_*``, as coremltools defines them for iOS 16 and iOS 18.

Codes and zero points come as integers, scales and tables as floats of the machine's precision. A code (at most 9 bits after its
zero point is taken off) times a float16 scale or table entry (11 bits) is exact in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.validate.mil.blobs import unpack
from tapeout.validate.mil.registry import Registry

__all__ = ["CONSTEXPR"]

Array = npt.NDArray[Any]

CONSTEXPR = Registry()
_constexpr = CONSTEXPR.add


def _blocks(x: Array, shape: tuple[int, ...]) -> Array:
    """Repeat each element of x [n, m, …] over its block of ``shape``."""
    for axis, (few, many) in enumerate(zip(x.shape, shape, strict=True)):
        if many % few:
            raise ValueError(f"{few} blocks do not divide {many} elements of axis {axis}")
        x = np.repeat(x, many // few, axis) if many != few else x
    return x


def _along(x: Array, rank: int, axis: int) -> Array:
    """A scalar, or a vector [n] along ``axis`` of ``rank``."""
    return x if x.ndim == 0 else x.reshape([-1 if each == axis % rank else 1 for each in range(rank)])


@_constexpr("constexpr_blockwise_shift_scale")
def _blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """``scale * (data - offset)``; scale and offset have one element for each block of data, which has their rank.

    A scale for each element or each channel broadcasts; one for each block is repeated along one axis, not over the weight.
    """
    codes = data.astype(scale.dtype)
    grouped = [
        axis for axis, (few, many) in enumerate(zip(scale.shape, data.shape, strict=True)) if 1 < few < many
    ]
    if len(grouped) == 1 and not data.shape[grouped[0]] % scale.shape[grouped[0]]:
        (axis,) = grouped
        apart = [*data.shape[:axis], scale.shape[axis], -1, *data.shape[axis + 1 :]]
        codes, scale = codes.reshape(apart), np.expand_dims(scale, axis + 1)
        offset = None if offset is None else np.expand_dims(offset, axis + 1)
    elif grouped:
        scale = _blocks(scale, data.shape)
        offset = None if offset is None else _blocks(offset, data.shape)
    if offset is not None:
        codes -= offset.astype(scale.dtype)
    codes *= scale
    return codes.reshape(data.shape)


@_constexpr("constexpr_lut_to_dense")
def _lut_to_dense(
    indices: Array, lut: Array, vector_axis: Array | None = None, shape: Array | None = None
) -> Array:
    """``lut[indices]``: one table [..., palettes, vector] for each block of indices (iOS 18), or one for all, and packed indices (iOS 16)."""
    if shape is not None:
        sizes = [int(size) for size in shape]
        count, bits = int(np.prod(sizes)), int(lut.size).bit_length() - 1
        codes = indices if bits == 8 else unpack(indices, f"uint{bits}", count)
        return lut[codes].reshape(sizes)
    palettes, vector = lut.shape[-2:]
    if lut[..., 0, 0].size == 1:
        found = lut.reshape(palettes, vector)[indices]
    else:
        where = [
            np.arange(many) // (many // few) for few, many in zip(lut.shape[:-2], indices.shape, strict=True)
        ]
        found = lut[(*np.ix_(*where), indices)]
    if vector == 1:
        return found[..., 0]
    if vector_axis is None:
        raise ValueError(f"a table of vectors of {vector} needs vector_axis")
    axis = int(vector_axis) % indices.ndim
    sizes = list(indices.shape)
    sizes[axis] *= vector
    return np.moveaxis(found, -1, axis + 1).reshape(sizes)


@_constexpr("constexpr_sparse_to_dense")
def _sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """Data [n] where the mask of uint1 is 1, zeros elsewhere; iOS 16 packs the mask and says its shape."""
    if shape is not None:
        sizes = [int(size) for size in shape]
        mask = unpack(mask, "uint1", int(np.prod(sizes))).reshape(sizes)
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


@_constexpr("constexpr_lut_to_sparse")
def _lut_to_sparse(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Array | None = None
) -> tuple[Array, Array]:
    """A table's entries for the indices where the mask is 1: the mask, widened by the length of the table's vectors, and the data [n]."""
    dense = _lut_to_dense(_sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    if lut.shape[-1] > 1 and vector_axis is not None:
        indices_mask = np.repeat(indices_mask, lut.shape[-1], int(vector_axis))
    return indices_mask, dense[indices_mask != 0]


@_constexpr("constexpr_sparse_blockwise_shift_scale")
def _sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    """As ``constexpr_blockwise_shift_scale``, of the data [n] where the mask is 1."""
    dense = _blockwise_shift_scale(_sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


@_constexpr("constexpr_affine_dequantize")
def _affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Any:
    """``scale * (quantized_data - zero_point)``; both are scalars, or vectors along ``axis``."""
    rank, kind = quantized_data.ndim, scale.dtype
    shift = _along(zero_point, rank, int(axis)).astype(kind)
    return _along(scale, rank, int(axis)) * (quantized_data.astype(kind) - shift)


@_constexpr("constexpr_cast")
def _cast(source_val: Array, output_dtype: str) -> Array:
    """A stored float16 as float32."""
    if output_dtype != "fp32":
        raise ValueError(f"casts to {output_dtype}; known: fp32")
    return source_val
