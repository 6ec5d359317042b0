"""The canonical codes of one tensor: the one meaning that every target lowers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout import Late

kernels = Late("tapeout.quantize.kernels")

DOUBLE_BLOCK = 256  # scales that share a second-level scale in double quantization (QLoRA, section 3)


def pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Pack codes [rows, in] into bytes [rows, ceil(in * bits / 8)], along ``in``, lowest bits first.

    4 bits: the low nibble is the even element. 8 bits: the codes themselves.
    """
    if bits == 8:
        return codes
    if codes.shape[1] % 8 == 0 and bits != 4:
        packed = np.empty((len(codes), codes.shape[1] * bits // 8), np.uint8)
        kernels.gather_bits(np.ascontiguousarray(codes).reshape(-1), bits, packed.reshape(-1))
        return packed
    if bits == 4 and codes.shape[1] % 2 == 0:
        packed = np.empty((len(codes), codes.shape[1] // 2), np.uint8)
        kernels.pack_nibbles(np.ascontiguousarray(codes).reshape(-1), packed.reshape(-1))
        return packed
    each = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")
    return np.packbits(each.reshape(len(codes), -1), axis=1, bitorder="little")


def unpack(packed: npt.NDArray[np.uint8], bits: int, in_features: int) -> npt.NDArray[np.uint8]:
    """Undo ``pack``: bytes [rows, n] to codes [rows, in_features]."""
    if bits == 8:
        return packed
    if bits == 4 and in_features % 2 == 0:
        pairs = packed.astype("<u2")
        spread: npt.NDArray[np.uint16] = ((pairs | (pairs << 4)) & 0x0F0F).astype("<u2", copy=False)
        return spread.view(np.uint8)
    if in_features % 8 == 0:
        codes = np.empty((len(packed), in_features), np.uint8)
        kernels.spread_bits(np.ascontiguousarray(packed).reshape(-1), bits, codes.reshape(-1))
        return codes
    flat = np.unpackbits(packed, axis=1, count=in_features * bits, bitorder="little")
    return np.packbits(flat.reshape(len(packed), in_features, bits), axis=2, bitorder="little")[:, :, 0]


@dataclass(frozen=True)
class ScaleCodes:
    """Scales that are themselves codes: ``codebook[codes] * block + offset``, computed in float32.

    Attributes:
        codes: uint8 [out, in / group].
        codebook: float32 [256].
        block: float32 or float16, one for every ``per_block`` scales in row-major order.
        per_block: scales under one element of ``block``.
        offset: a float32 value, the mean that double quantization takes off before.
    """

    codes: npt.NDArray[np.uint8]
    codebook: npt.NDArray[np.float32]
    block: npt.NDArray[np.float32] | npt.NDArray[np.float16]
    per_block: int
    offset: float = 0.0

    def values(self) -> npt.NDArray[np.float32]:
        """The scales that these parts mean, float32 [out, in / group]."""
        flat = self.codebook[self.codes.reshape(-1)]
        block = self.block.reshape(-1).astype(np.float32)
        flat *= block if block.size == 1 else np.repeat(block, self.per_block)[: flat.size]
        if self.offset:
            flat += np.float32(self.offset)
        return flat.reshape(self.codes.shape)

    def rows(self, index: slice | npt.NDArray[Any]) -> ScaleCodes | None:
        """The same of some rows; None where a block runs across rows."""
        out, groups = self.codes.shape
        if self.block.size == 1:
            return replace(self, codes=self.codes[index])
        if groups % self.per_block:
            return None
        return replace(self, codes=self.codes[index], block=self.block.reshape(out, -1)[index])


@dataclass(frozen=True)
class QuantTensor:
    """Canonical codes: the weight *is* ``(codebook[codes] - zero_point) * scale - minimum``, computed in float32.

    Attributes:
        packed: uint8 [out, ceil(in * bits / 8)], see ``pack``; possibly a read-only map of the store.
        bits: bits of a code.
        in_features: length of a row.
        scale: float16 [out, in / group] by definition; float32 only where ``scale_codes`` says what it is made of.
        group: weights along ``in`` that share a scale; divides ``in_features``.
        codebook: float32 [2**bits].
        zero_point: uint8 [out, in / group], or None for zero.
        scale_codes: the parts of a scale that is itself quantized.
        minimum: the parts of what is taken off after scaling (affine schemes), or None for nothing.
        input_scale: float32 scalar, the calibrated scale of inputs (``w8a8-static``, ``fp8-static``, ``nvfp4-w4a4``), or None.
    """

    packed: npt.NDArray[np.uint8]
    bits: int
    in_features: int
    scale: npt.NDArray[np.float16] | npt.NDArray[np.float32]
    group: int
    codebook: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.uint8] | None = None
    scale_codes: ScaleCodes | None = None
    minimum: ScaleCodes | None = None
    input_scale: np.float32 | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return len(self.packed), self.in_features

    def codes(self) -> npt.NDArray[np.uint8]:
        """Unpacked codes, uint8 [out, in]."""
        return unpack(np.asarray(self.packed), self.bits, self.in_features)

    def rows(self, index: slice | npt.NDArray[Any]) -> QuantTensor:
        """The tensor of some rows only, in the order of ``index``; the packed bytes are not copied for a slice.

        Where the parts of a scale run across rows (double quantization), only the scale that they mean is kept.
        """
        return replace(
            self,
            packed=self.packed[index],
            scale=self.scale[index],
            zero_point=None if self.zero_point is None else self.zero_point[index],
            scale_codes=None if self.scale_codes is None else self.scale_codes.rows(index),
            minimum=None if self.minimum is None else self.minimum.rows(index),
        )

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The weight that the codes are, float32 [out, in]."""
        out, into = self.shape
        weight = self.codebook[self.codes()].reshape(out, into // self.group, self.group)
        if self.zero_point is not None:
            weight -= self.zero_point[:, :, None]
        weight *= self.scale.astype(np.float32, copy=False)[:, :, None]
        if self.minimum is not None:
            weight -= self.minimum.values()[:, :, None]
        return weight.reshape(out, into)
