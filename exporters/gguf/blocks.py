"""The blocks of GGUF: 32 weights along ``in`` under one float16 scale, one packer and its inverse a type.

Layouts: ggml's ``ggml-common.h`` (block_q4_0, block_q5_0, block_q8_0). A canonical group longer than 32 repeats its scale.

What an inverse cannot express as a canonical code comes back so that it equals nothing, since a damaged file is for the
``codes`` gate to name: a scale as NaN, a code as one beyond the scheme's bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tapeout.quantize import QuantTensor
from tapeout.quantize.scheme import NF4
from tapeout.quantize.tensor import pack

Bytes = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.float16] | npt.NDArray[np.float32]

WEIGHTS = 32  # of a block

# NF4 has no type of its own. Of all steps that fit 127, this one brings 16 integers nearest to the codebook.
NF4_STEP = np.float32(123.25)
NF4_INTEGERS = np.rint(NF4_STEP * NF4).astype(np.int8)

_LOW = np.uint16(0x0F0F)
_SHIFT = np.uint64(4)


@dataclass(frozen=True)
class Block:
    """A block type: how many bytes hold 32 weights, and the two directions.

    Attributes:
        pack: rows of a tensor to bytes, uint8 [rows, in / 32 * size].
        unpack: such bytes, and the tensor that they should hold (for what a file does not say), to a tensor.
    """

    size: int
    pack: Callable[[QuantTensor], Bytes]
    unpack: Callable[[Bytes, QuantTensor], QuantTensor]


def _pack_q4_0(tensor: QuantTensor) -> Bytes:
    """18 bytes: float16 d; 16 bytes of which byte j holds element j low and element j + 16 high. Value: (nibble - 8) d."""
    return _join(tensor.scale, "V16", _halves(_nibbles(tensor.packed)).view("V16"))


def _unpack_q4_0(blocks: Bytes, like: QuantTensor) -> QuantTensor:
    d, parts = _split(blocks, 18)
    return replace(like, packed=pack(_elements(parts[:, :, 2:]), 4), scale=_scales(d, like), double=None)


def _pack_q5_0(tensor: QuantTensor) -> Bytes:
    """22 bytes: float16 d; uint32 whose bit j is the fifth bit of element j; 16 bytes of low nibbles as in Q4_0.

    Value: (q - 16) d, so an integer zero point goes into q = code - zero_point + 16, which is 1 … 31.
    """
    assert tensor.zero_point is not None
    rows, into = tensor.shape
    shift = (np.uint8(16) - tensor.zero_point)[:, :, None]
    q = _nibbles(tensor.packed).view(np.uint8).reshape(rows, -1, tensor.group) + shift
    fifth = np.packbits(q.reshape(rows, into) >> 4, axis=1, bitorder="little")
    q &= 0x0F
    qs = np.empty((rows, into // WEIGHTS, 20), np.uint8)
    qs[:, :, :4] = fifth.reshape(rows, -1, 4)
    qs[:, :, 4:] = _halves(q.reshape(rows, into)).view(np.uint8).reshape(rows, -1, 16)
    return _join(tensor.scale, "V20", qs.view("V20"))


def _unpack_q5_0(blocks: Bytes, like: QuantTensor) -> QuantTensor:
    assert like.zero_point is not None
    d, parts = _split(blocks, 22)
    rows, into = like.shape
    fifth = np.unpackbits(np.ascontiguousarray(parts[:, :, 2:6]).reshape(rows, -1), axis=1, bitorder="little")
    q = (_elements(parts[:, :, 6:]) | (fifth << 4)).reshape(rows, -1, like.group)
    # In uint8 a code below zero wraps to one beyond 15.
    codes = (
        (q - (np.uint8(16) - like.zero_point)[:, :, None]).astype(np.uint8, copy=False).reshape(rows, into)
    )
    return _with_codes(like, codes, _scales(d, like))


def _pack_q8_0(tensor: QuantTensor) -> Bytes:
    """34 bytes: float16 d; 32 int8. Value: q d."""
    return _join(tensor.scale, "V32", (tensor.packed ^ np.uint8(0x80)).view("V32"))


def _unpack_q8_0(blocks: Bytes, like: QuantTensor) -> QuantTensor:
    d, parts = _split(blocks, 34)
    codes = (parts[:, :, 2:] ^ np.uint8(0x80)).reshape(like.shape)
    return replace(like, packed=codes, scale=_scales(d, like), double=None)


def _pack_nf4(tensor: QuantTensor) -> Bytes:
    """Q8_0 that holds NF4: q = round(123.25 codebook[code]), d = float16(scale / 123.25)."""
    pairs = NF4_INTEGERS.view(np.uint8).astype("<u2")
    both = (pairs[None, :] | (pairs[:, None] << 8)).reshape(
        -1
    )  # by a packed byte: its even and its odd element
    return _join(nf4_scale(tensor), "V32", np.take(both, tensor.packed).view("V32"))


def _unpack_nf4(blocks: Bytes, like: QuantTensor) -> QuantTensor:
    d, parts = _split(blocks, 34)
    code_of = np.full(256, 255, np.uint8)
    code_of[NF4_INTEGERS.view(np.uint8)] = np.arange(16)
    codes = code_of[parts[:, :, 2:]].reshape(like.shape)
    # d is rounded, so it names its scale only by being what that scale rounds to.
    same = _scales(d, like).view(np.uint16) == nf4_scale(like).view(np.uint16)
    scale: Scales = np.where(same, like.scale, like.scale.dtype.type(np.nan))
    return _with_codes(like, codes, scale)


def nf4_scale(tensor: QuantTensor) -> npt.NDArray[np.float16]:
    """The scale of the integers that stand for NF4, float16 [out, in / group]."""
    return (tensor.scale.astype(np.float32) / NF4_STEP).astype(np.float16)


Q4_0 = Block(18, _pack_q4_0, _unpack_q4_0)
Q5_0 = Block(22, _pack_q5_0, _unpack_q5_0)
Q8_0 = Block(34, _pack_q8_0, _unpack_q8_0)
NF4_AS_Q8_0 = Block(34, _pack_nf4, _unpack_nf4)


def _nibbles(packed: Bytes) -> npt.NDArray[np.uint16]:
    """Canonical nibbles (low: even element) [rows, in / 2] to a byte an element, as uint16 [rows, in / 2]."""
    pairs = packed.astype("<u2")
    pairs |= pairs << 4
    pairs &= _LOW
    return pairs


def _halves(elements: npt.NDArray[np.generic]) -> npt.NDArray[np.uint64]:
    """Elements below 16, a byte each, [rows, in] bytes, to uint64 [rows, in / 32, 2]: 16 bytes, element j + 16 high in j."""
    words = elements.view("<u8").reshape(len(elements), -1, 4)
    both = words[:, :, 2:] << _SHIFT
    both |= words[:, :, :2]
    return both


def _elements(halves: Bytes) -> Bytes:
    """Undo ``_halves``: uint8 [rows, in / 32, 16] to uint8 [rows, in]."""
    return np.concatenate((halves & 0x0F, halves >> 4), axis=2).reshape(len(halves), -1)


def _join(scale: Scales, kind: str, parts: npt.NDArray[np.void]) -> Bytes:
    """Put d before the bytes of each block; ``kind`` is a void type, since one copy of 16 bytes beats 16 of one."""
    assert scale.dtype == np.float16, "a wider scale would be rounded without a word"
    rows = len(scale)
    parts = parts.reshape(rows, -1)
    blocks = np.empty(parts.shape, np.dtype([("d", "<f2"), ("q", kind)]))
    blocks["d"] = np.repeat(scale, parts.shape[1] // scale.shape[1], axis=1)
    blocks["q"] = parts
    return blocks.view(np.uint8)


def _split(blocks: Bytes, size: int) -> tuple[npt.NDArray[np.float16], Bytes]:
    """The scales of blocks, float16 [rows, blocks], and the blocks themselves, uint8 [rows, blocks, size]."""
    parts = np.ascontiguousarray(blocks).reshape(len(blocks), -1, size)
    return np.ascontiguousarray(parts[:, :, :2]).view("<f2")[:, :, 0], parts


def _scales(d: npt.NDArray[np.float16], like: QuantTensor) -> npt.NDArray[np.float16]:
    """One scale a group, [rows, blocks] to [rows, groups]; NaN where the blocks of a group do not agree."""
    bits = d.view(np.uint16).reshape(*like.scale.shape, -1)
    same = (bits == bits[:, :, :1]).all(axis=2)
    return np.where(same, bits[:, :, 0].view(np.float16), np.float16(np.nan))


def _with_codes(like: QuantTensor, codes: Bytes, scale: Scales) -> QuantTensor:
    """``like`` with these codes of 4 bits; with a code beyond 15, a tensor of 8 bits that has no value for it."""
    if codes.max(initial=0) < 16:
        return replace(like, packed=pack(codes, 4), scale=scale)
    codebook = np.full(256, np.nan, np.float32)
    codebook[:16] = like.codebook
    return replace(like, packed=codes, bits=8, codebook=codebook, scale=scale)
