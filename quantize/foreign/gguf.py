"""GGUF's block types (ggml's ``ggml-common.h``): each keeps its scales and codes in blocks of 32 weights, or of 256.

Every unpacker takes blocks, uint8 [out, blocks, bytes], and its docstring is the byte layout. Where the bytes of a row's
nibbles are named, the low nibbles come first, then the high ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.models import SourceTensor
from tapeout.models.checkpoint import FLOATS
from tapeout.quantize.foreign.layer import Bytes, Imported, Layer, Reader
from tapeout.quantize.foreign.schemes import IQ4_NL, Q4_1, Q5_1, named
from tapeout.quantize.scheme import SCHEMES, Scheme
from tapeout.quantize.tensor import pack

Parts = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class _Kind:
    """A block type.

    Attributes:
        size: bytes of a block.
        codes: blocks to codes, in any shape that runs like [out, in].
        parts: blocks to the other parts.
    """

    scheme: Scheme
    size: int
    codes: Callable[[Bytes], Bytes]
    parts: Callable[[Bytes], Parts]


def read(statement: Mapping[str, Any]) -> Reader:
    """Nothing is said of the whole file: each tensor has its type."""
    return Reader(_layer, ())


def _layer(layer: Layer) -> Imported | None:
    source = layer.get("weight")
    if source is None or source.dtype in FLOATS:
        return None
    kind = _KINDS.get(source.dtype)
    if kind is None:
        raise layer.refuse(f"its type is {source.dtype}; those carried are {', '.join(_KINDS)}")
    kind.scheme.check(layer.name, layer.shape)
    parts = kind.parts(_blocks(source, kind.size))
    for name, part in parts.items():
        if part.dtype == np.float16 and not np.isfinite(part).all():
            raise layer.refuse(f"its {name} holds {part[~np.isfinite(part)].flat[0]}: the file is damaged")
    return Imported(kind.scheme, partial(_packed, source, kind), parts)


def _packed(source: SourceTensor, kind: _Kind) -> Bytes:
    return pack(kind.codes(_blocks(source, kind.size)).reshape(source.shape), kind.scheme.bits)


def _blocks(source: SourceTensor, size: int) -> Bytes:
    return source.bits().reshape(source.shape[0], -1, size)


def _float16(blocks: Bytes, at: int) -> npt.NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, :, at : at + 2]).view("<f2")[:, :, 0]


def _fields(data: Bytes, run: int, bits: int) -> Bytes:
    """Fields of ``bits`` in runs of ``run`` bytes: the lowest field of every byte of a run, then the next: [out, blocks, n]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = data.reshape(*data.shape[:2], -1, 1, run)
    return ((runs >> shifts) & np.uint8(2**bits - 1)).reshape(*data.shape[:2], -1)


def _d(blocks: Bytes) -> Parts:
    return {"scale": _float16(blocks, 0)}


def _q4_0(blocks: Bytes) -> Bytes:
    """float16 d; 16 bytes of nibbles. Value: (nibble - 8) d."""
    return _fields(blocks[:, :, 2:], 16, 4)


def _q4_1(blocks: Bytes) -> Bytes:
    """float16 d, m; 16 bytes of nibbles. Value: q d + m."""
    return _fields(blocks[:, :, 4:], 16, 4)


def _q5_1(blocks: Bytes) -> Bytes:
    """float16 d, m; uint32 of fifth bits; 16 bytes of nibbles. Value: q d + m."""
    fifth = np.unpackbits(blocks[:, :, 4:8], axis=2, bitorder="little")
    return _fields(blocks[:, :, 8:], 16, 4) | (fifth << np.uint8(4))


def _d_and_m(blocks: Bytes) -> Parts:
    return {"scale": _float16(blocks, 0), "minimum": -_float16(blocks, 2)}


def _q5_0(blocks: Bytes) -> Bytes:
    """float16 d; uint32 of fifth bits; 16 bytes of nibbles. Value: (q - 16) d."""
    fifth = np.unpackbits(blocks[:, :, 2:6], axis=2, bitorder="little")
    return _fields(blocks[:, :, 6:], 16, 4) | (fifth << np.uint8(4))


def _q8_0(blocks: Bytes) -> Bytes:
    """float16 d; 32 int8. Value: q d."""
    return blocks[:, :, 2:] ^ np.uint8(0x80)


def _mxfp4(blocks: Bytes) -> Bytes:
    """E8M0 exponent; 16 bytes of nibbles, which are E2M1."""
    return _fields(blocks[:, :, 1:], 16, 4)


def _q2_k(blocks: Bytes) -> Bytes:
    """16 bytes: scale low, minimum high; 64 bytes of 2 bits; float16 d, dmin."""
    return _fields(blocks[:, :, 16:80], 32, 2)


def _q2_k_parts(blocks: Bytes) -> Parts:
    pairs = blocks[:, :, :16]
    return _affine(pairs & np.uint8(0x0F), pairs >> np.uint8(4), blocks, 80)


def _q3_k(blocks: Bytes) -> Bytes:
    """32 bytes of third bits; 64 bytes of 2 bits; 12 bytes of scales; float16 d. Value: (q - 4) (scale - 32) d."""
    return _fields(blocks[:, :, 32:96], 32, 2) | (_fields(blocks[:, :, :32], 32, 1) << np.uint8(2))


def _q3_k_parts(blocks: Bytes) -> Parts:
    """Scales of 6 bits: 8 bytes of low nibbles; 4 bytes of the two high bits."""
    low, high = _fields(blocks[:, :, 96:104], 8, 4), _fields(blocks[:, :, 104:108], 4, 2)
    return _super(low | (high << np.uint8(4)), blocks, 108)


def _q4_k(blocks: Bytes) -> Bytes:
    """float16 d, dmin; 12 bytes of scales and minimums; 128 bytes of nibbles. Value: q scale d - minimum dmin."""
    return _fields(blocks[:, :, 16:], 32, 4)


def _q5_k(blocks: Bytes) -> Bytes:
    """float16 d, dmin; 12 bytes of scales and minimums; 32 bytes of fifth bits; 128 bytes of nibbles."""
    return _fields(blocks[:, :, 48:], 32, 4) | (_fields(blocks[:, :, 16:48], 32, 1) << np.uint8(4))


def _q45_k_parts(blocks: Bytes) -> Parts:
    """12 bytes: 4 scales and 4 minimums whose two high bits are those of the later four; 4 bytes of the later ones' nibbles."""
    first, second, third = (blocks[:, :, at : at + 4] for at in (4, 8, 12))
    low, two = np.uint8(0x3F), np.uint8(0x30)
    scale = (first & low, (third & np.uint8(0x0F)) | ((first >> np.uint8(2)) & two))
    minimum = (second & low, (third >> np.uint8(4)) | ((second >> np.uint8(2)) & two))
    return _affine(np.concatenate(scale, axis=2), np.concatenate(minimum, axis=2), blocks, 0)


def _q6_k(blocks: Bytes) -> Bytes:
    """128 bytes of low nibbles; 64 bytes of two high bits; 16 int8 scales; float16 d. Value: (q - 32) scale d."""
    return _fields(blocks[:, :, :128], 64, 4) | (_fields(blocks[:, :, 128:192], 32, 2) << np.uint8(4))


def _q6_k_parts(blocks: Bytes) -> Parts:
    return _super(blocks[:, :, 192:208] ^ np.uint8(0x80), blocks, 208)


def _super(scales: Bytes, blocks: Bytes, at: int) -> Parts:
    """Scales of groups, uint8 [out, blocks, n], and the float16 above them at that byte."""
    return {
        "scale_codes": np.ascontiguousarray(scales).reshape(len(blocks), -1),
        "scale_block": _float16(blocks, at),
    }


def _affine(scales: Bytes, minimums: Bytes, blocks: Bytes, at: int) -> Parts:
    return {
        **_super(scales, blocks, at),
        "minimum_codes": np.ascontiguousarray(minimums).reshape(len(blocks), -1),
        "minimum_block": _float16(blocks, at + 2),
    }


def _e8m0(blocks: Bytes) -> Parts:
    return {"scale_codes": np.ascontiguousarray(blocks[:, :, 0])}


_KINDS = {
    "Q4_0": _Kind(SCHEMES["int4-g32"], 18, _q4_0, _d),
    "Q4_1": _Kind(Q4_1, 20, _q4_1, _d_and_m),
    "Q5_1": _Kind(Q5_1, 24, _q5_1, _d_and_m),
    "IQ4_NL": _Kind(IQ4_NL, 18, _q4_0, _d),
    "Q5_0": _Kind(named(Scheme("", 5, 32, "symmetric")), 22, _q5_0, _d),
    "Q8_0": _Kind(SCHEMES["int8-g32"], 34, _q8_0, _d),
    "MXFP4": _Kind(SCHEMES["mxfp4"], 17, _mxfp4, _e8m0),
    "Q2_K": _Kind(SCHEMES["q2_k"], 84, _q2_k, _q2_k_parts),
    "Q3_K": _Kind(SCHEMES["q3_k"], 110, _q3_k, _q3_k_parts),
    "Q4_K": _Kind(SCHEMES["q4_k"], 144, _q4_k, _q45_k_parts),
    "Q5_K": _Kind(SCHEMES["q5_k"], 176, _q5_k, _q45_k_parts),
    "Q6_K": _Kind(SCHEMES["q6_k"], 210, _q6_k, _q6_k_parts),
}
