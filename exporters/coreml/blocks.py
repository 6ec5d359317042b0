"""How canonical codes lie in a Core ML package: for each scheme a chain of ``constexpr`` operators, their parts, both directions.

``constexpr_blockwise_shift_scale`` is ``scale · (data - offset)``, with scale and offset of blocks; ``constexpr_lut_to_dense`` looks
indices up in a table. An inverse needs a tensor of the same scheme for what the file does not say (bits, codebook); what it cannot
express as a canonical code comes back so that it equals nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tapeout.errors import SchemeError
from tapeout.exporters import Carry, Exact, Refused, Rounded
from tapeout.exporters.coreml.blob import bits_of
from tapeout.quantize import QuantTensor, Scheme
from tapeout.quantize.scheme import LEVELS, SUPER
from tapeout.quantize.tensor import pack

Bytes = npt.NDArray[np.uint8]
Parts = dict[str, npt.NDArray[Any]]
Opset = Literal["ios18", "ios26"]

FLOAT = "F16"
"""The container of a matrix that stays float."""

# Of rounding to float16, relative, root-mean-square: the error is uniform in ± 2^-11 of a binade [1, 2), whose mean square is 7/3.
HALF = 2.0**-11 / math.sqrt(3) / math.sqrt(7 / 3)
_LEAST = 2.0**-14  # the smallest normal float16


@dataclass(frozen=True)
class Shift:
    """Integers under a float16 scale a block: ``constexpr_blockwise_shift_scale``.

    Attributes:
        bits: of a code in the file: 4 or 8.
        zero_point: codes are unsigned, and each block has an offset; otherwise they are signed and have none.

    Parts: ``codes`` (u)int4 or (u)int8 [out, in]; ``scale`` float16 [out, in / group]; ``offset`` as the codes, float16 where a zero
    point is beyond them.
    """

    bits: int
    zero_point: bool = False
    wide: bool = False  # a zero point is beyond the codes

    @property
    def kind(self) -> str:
        """What the carry table and a package's manifest call it."""
        return f"{self.codes} blockwise{', float16 offsets' if self.wide else ''}"

    @property
    def codes(self) -> str:
        """MIL's type of the codes."""
        return f"{'u' if self.zero_point else ''}int{self.bits}"

    @property
    def opset(self) -> Opset:
        """The oldest that has it."""
        return "ios18"

    def parts(self, out: int, groups: int, into: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each part."""
        found = {"codes": (self.codes, (out, into)), "scale": ("float16", (out, groups))}
        if self.zero_point:
            found["offset"] = ("float16" if self.wide else self.codes, (out, groups))
        return found  # type: ignore[return-value]

    def pack(self, tensor: QuantTensor) -> Parts:
        """The parts of rows of a tensor, as their bytes lie in the file."""
        found: Parts = {"codes": self._packed(tensor), "scale": scales(tensor)}
        if self.zero_point:
            assert tensor.zero_point is not None
            points = np.asarray(tensor.zero_point)
            found["offset"] = points.astype(np.float16) if self.wide else in_a_row(points, self.codes)
        return found

    def _packed(self, tensor: QuantTensor) -> Bytes:
        whole = tensor.in_features * tensor.bits % 8 == 0
        if tensor.bits == self.bits and whole:
            # A signed code is the unsigned one with its highest bit turned.
            flip = 0 if self.zero_point else {4: 0x88, 8: 0x80}[self.bits]
            packed = np.asarray(tensor.packed)
            return packed ^ np.uint8(flip) if flip else packed
        signed = 0 if self.zero_point else 2 ** (tensor.bits - 1)
        return in_a_row(tensor.codes() - np.uint8(signed), self.codes)

    def unpack(self, parts: Mapping[str, npt.NDArray[Any]], like: QuantTensor) -> QuantTensor:
        """Undo ``pack``; the parts are as coremltools reads them, an integer a byte."""
        signed = 0 if self.zero_point else 2 ** (like.bits - 1)
        codes = (parts["codes"].astype(np.int16) + signed).astype(
            np.uint8
        )  # one below zero is beyond the bits
        found = replace(like, scale=as_scale(parts["scale"], like), scale_codes=None)
        if self.zero_point:
            points = parts["offset"].reshape(like.scale.shape)
            found = replace(found, zero_point=points.astype(np.uint8))
        return with_codes(found, codes.reshape(like.shape))


@dataclass(frozen=True)
class Lut:
    """Indices into a table, then a scale a block: ``constexpr_lut_to_dense`` and ``constexpr_blockwise_shift_scale``.

    Attributes:
        bits: of an index: 1, 2, 3, 4, 6 or 8.
        levels: of the codebook (``LEVELS``), in float16; empty: the signed integers of so many bits, in int8.
        nested: weights under a float16 scale of scales, which are int8 then; None: scales are float16.

    Parts: ``codes`` uint1 … uint8 [out, in]; ``table`` int8 or float16 [1, 1, 2**bits, 1]; ``scale`` float16 [out, in / group]. Nested:
    ``scale_codes`` int8 [out, in / group] and ``scale_block`` float16 [out, in / nested] instead, whose product the scale is.
    """

    bits: int
    levels: str = ""
    nested: int | None = None

    @property
    def kind(self) -> str:
        """What the carry table and a package's manifest call it."""
        return f"{self.codes} lookup, blockwise{' twice' if self.nested else ''}"

    @property
    def codes(self) -> str:
        """MIL's type of the indices."""
        return f"uint{self.bits}"

    @property
    def opset(self) -> Opset:
        """The oldest that has it; before, coremltools puts the operators in another order, in which blocks of rows are not expressible."""
        return "ios26"

    def table(self) -> npt.NDArray[Any]:
        """The table [2**bits]."""
        if self.levels:
            levels: npt.NDArray[Any] = LEVELS[self.levels].astype(np.float16)
            return levels
        integers: npt.NDArray[Any] = np.arange(2**self.bits, dtype=np.int8) - np.int8(2 ** (self.bits - 1))
        return integers

    def parts(self, out: int, groups: int, into: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each part; the table's apart."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {"codes": (self.codes, (out, into))}
        if self.nested:
            found["scale_codes"] = ("int8", (out, groups))
            found["scale_block"] = ("float16", (out, into // self.nested))
        else:
            found["scale"] = ("float16", (out, groups))
        return found

    def pack(self, tensor: QuantTensor) -> Parts:
        """The parts of rows of a tensor, as their bytes lie in the file."""
        whole = tensor.in_features * tensor.bits % 8 == 0 and tensor.bits == self.bits
        found: Parts = {"codes": np.asarray(tensor.packed) if whole else in_a_row(tensor.codes(), self.codes)}
        if not self.nested:
            found["scale"] = scales(tensor)
            return found
        assert tensor.scale_codes is not None
        found["scale_codes"] = tensor.scale_codes.codebook[tensor.scale_codes.codes].astype(np.int8)
        found["scale_block"] = np.asarray(tensor.scale_codes.block)
        return found

    def unpack(self, parts: Mapping[str, npt.NDArray[Any]], like: QuantTensor) -> QuantTensor:
        """Undo ``pack``; the table comes along, and a codebook that is not its float16 is what the table says."""
        codebook = parts["table"].reshape(-1).astype(np.float32)
        if np.array_equal(parts["table"].reshape(-1).view(np.uint8), self.table().view(np.uint8)):
            codebook = like.codebook
        found = replace(like, codebook=codebook)
        if self.nested:
            assert like.scale_codes is not None
            lowest = int(like.scale_codes.codebook[0])
            codes = (parts["scale_codes"].astype(np.int16) - lowest).astype(np.uint8)
            block = parts["scale_block"].reshape(np.shape(like.scale_codes.block))
            scale_codes = replace(
                like.scale_codes, codes=codes.reshape(like.scale_codes.codes.shape), block=block
            )
            found = replace(found, scale_codes=scale_codes, scale=scale_codes.values())
        else:
            found = replace(found, scale=as_scale(parts["scale"], like), scale_codes=None)
        return with_codes(found, parts["codes"].reshape(like.shape).astype(np.uint8))


Container = Shift | Lut


def container_of(scheme: Scheme, opset: Opset | None = None) -> Container | None:
    """The container of a scheme; None: there is none at all.

    Of those that hold it, the smallest that the opset has; for None, the one that the oldest opset has.
    """
    if scheme.activations or scheme.kind in ("none", "affine") or scheme.scales == "e4m3":
        return None
    if scheme.kind == "asymmetric":
        return Shift(4 if scheme.bits <= 4 else 8, zero_point=True)
    if scheme.kind == "codebook":
        return Lut(scheme.bits, scheme.levels)
    if scheme.scales == "super":
        return Lut(_index(scheme.bits), nested=SUPER)
    if opset == "ios26" and scheme.bits not in (4, 8):
        return Lut(_index(scheme.bits))
    return Shift(4 if scheme.bits <= 4 else 8)


def _index(bits: int) -> int:
    """The narrowest index that holds codes of ``bits`` bits."""
    return next(width for width in (1, 2, 3, 4, 6, 8) if width >= bits)


def carries(scheme: Scheme, opset: Opset | None = None) -> Carry:
    """How a Core ML package holds a scheme.

    Args:
        scheme: of a matrix.
        opset: the newest that may be used; None: whichever the scheme needs.
    """
    if scheme.kind == "none":
        return Rounded(FLOAT, HALF)
    if scheme.activations:
        nearest = "int8" if scheme.bits == 8 else "int4-g32"
        return Refused("Core ML multiplies these weights with float16 inputs alone.", nearest)
    container = container_of(scheme, opset)
    if container is None:
        if scheme.kind == "affine":
            return Refused(
                "constexpr_blockwise_shift_scale has no minimum beside the scale.", "int4-g32-asym"
            )
        return Refused("scales under a float32 of the tensor do not fit float16.", "int4-g32")
    if opset == "ios18" and container.opset == "ios26":
        return Refused(f"{container.kind} needs opset ios26.", "int4-g32")
    width = bits_of(container.codes)
    group = scheme.group
    each = (
        (16 + (width if isinstance(container, Shift) and container.zero_point else 0)) / group if group else 0
    )
    if isinstance(container, Lut) and container.nested:
        assert group
        each = 8 / group + 16 / container.nested
    name = container.kind if width == scheme.bits else f"{container.kind}, at {width} bits"
    errors = []
    if isinstance(container, Lut) and container.levels:
        levels = LEVELS[container.levels]
        levels = levels[np.isfinite(levels)].astype(np.float64)
        # Codes of a codebook are about equally frequent.
        errors.append(math.sqrt(np.mean((levels.astype(np.float16) - levels) ** 2) / np.mean(levels**2)))
    if scheme.scales in ("double", "float32"):
        errors.append(HALF)
    if any(errors):
        return Rounded(name, math.hypot(*errors))
    return Exact(name, width + each)


def scales(tensor: QuantTensor) -> npt.NDArray[Any]:
    """Scales in float16; SchemeError where one does not fit: a power of two must fit exactly, any other be normal."""
    scale = np.asarray(tensor.scale)
    if scale.dtype == np.float16:
        return scale
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    exact = half.astype(np.float32) == scale
    fits = exact | (np.isfinite(half) & (np.abs(half) >= np.float16(_LEAST)))
    if not fits.all():
        raise SchemeError(f"a scale of {scale[~fits][0]:g} does not fit float16")
    return half


def as_scale(found: npt.NDArray[Any], like: QuantTensor) -> npt.NDArray[Any]:
    """Scales [out, groups] as read; where they are the float16 of wider ones, those."""
    scale = np.ascontiguousarray(found).reshape(like.scale.shape)
    if like.scale.dtype == np.float16:
        return scale
    same = scale.view(np.uint16) == like.scale.astype(np.float16).view(np.uint16)
    return np.where(same, like.scale, np.float32(np.nan))


def in_a_row(values: npt.NDArray[Any], kind: str) -> Bytes:
    """Integers of a type as their bytes lie in the file: without gaps, whatever the rows."""
    bits = bits_of(kind)
    flat = np.ascontiguousarray(values).astype(np.uint8).reshape(1, -1)
    return pack(flat & np.uint8(2**bits - 1), bits).reshape(-1)


def with_codes(like: QuantTensor, codes: Bytes) -> QuantTensor:
    """``like`` with these codes [out, in]; with one beyond its bits, a tensor of 8 bits that has no value for it."""
    if codes.max(initial=0) < len(like.codebook):
        return replace(like, packed=pack(codes, like.bits))
    codebook = np.full(256, np.nan, np.float32)
    codebook[: len(like.codebook)] = like.codebook
    return replace(like, packed=codes, bits=8, codebook=codebook)
