"""The canonical codes of one tensor: the one meaning that every target lowers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SCALES_PER_BLOCK = 256  # scales that share a second-level scale (QLoRA, section 3)


def pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Pack codes [rows, in] into bytes [rows, ceil(in * bits / 8)], along ``in``, lowest bits first.

    4 bits: the low nibble is the even element. 8 bits: the codes themselves.
    """
    if bits == 8:
        return codes
    if bits == 4 and codes.shape[1] % 2 == 0:
        pairs = np.ascontiguousarray(codes).view("<u2")
        joined = pairs >> 4
        joined |= pairs
        return joined.astype(np.uint8)  # keeps the low byte
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
    flat = np.unpackbits(packed, axis=1, count=in_features * bits, bitorder="little")
    return np.packbits(flat.reshape(len(packed), in_features, bits), axis=2, bitorder="little")[:, :, 0]


@dataclass(frozen=True)
class DoubleQuant:
    """The parts of scales that are quantized once more: ``codebook[codes] * block_scale + offset``.

    Attributes:
        codes: uint8 [out, in / group], an index into ``codebook`` for each scale.
        block_scale: float32 [ceil(out * in / group / 256)], for blocks of 256 scales in row-major order.
        offset: float32 scalar, the mean that was taken off before.
        codebook: float32 [256].
    """

    codes: npt.NDArray[np.uint8]
    block_scale: npt.NDArray[np.float32]
    offset: np.float32
    codebook: npt.NDArray[np.float32]

    def scales(self) -> npt.NDArray[np.float32]:
        """The scales that these parts mean, float32 [out, in / group]."""
        flat = self.codebook[self.codes.reshape(-1)]
        flat = flat * np.repeat(self.block_scale, SCALES_PER_BLOCK)[: flat.size] + self.offset
        return flat.reshape(self.codes.shape)


@dataclass(frozen=True)
class QuantTensor:
    """Canonical codes: the weight *is* ``(codebook[codes] - zero_point) * scale``, computed in float32.

    Attributes:
        packed: uint8 [out, ceil(in * bits / 8)], see ``pack``; possibly a read-only map of the store.
        bits: bits of a code.
        in_features: length of a row.
        scale: float16 [out, in / group] by definition; float32 only where ``double`` says what it is made of.
        group: weights along ``in`` that share a scale; divides ``in_features``.
        codebook: float32 [2**bits].
        zero_point: uint8 [out, in / group], or None for zero.
        double: the parts of a doubly quantized scale.
    """

    packed: npt.NDArray[np.uint8]
    bits: int
    in_features: int
    scale: npt.NDArray[np.float16] | npt.NDArray[np.float32]
    group: int
    codebook: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.uint8] | None = None
    double: DoubleQuant | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return len(self.packed), self.in_features

    def codes(self) -> npt.NDArray[np.uint8]:
        """Unpacked codes, uint8 [out, in]."""
        return unpack(np.asarray(self.packed), self.bits, self.in_features)

    def rows(self, index: slice | npt.NDArray[Any]) -> QuantTensor:
        """The tensor of some rows only, in the order of ``index``; the packed bytes are not copied for a slice."""
        zero_point = None if self.zero_point is None else self.zero_point[index]
        # The parts of a doubly quantized scale run across rows; the scale they mean is what a row keeps.
        return QuantTensor(
            self.packed[index],
            self.bits,
            self.in_features,
            self.scale[index],
            self.group,
            self.codebook,
            zero_point,
        )

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The weight that the codes are, float32 [out, in]."""
        out, into = self.shape
        weight = self.codebook[self.codes()].reshape(out, into // self.group, self.group)
        if self.zero_point is not None:
            weight -= self.zero_point[:, :, None]
        weight *= self.scale.astype(np.float32)[:, :, None]
        return weight.reshape(out, into)
