"""The super-blocks of GGUF: 256 weights along ``in`` whose scales (and minimums) are integers under one float16 (each).

Layouts: ggml's ``ggml-common.h`` (block_q2_K … block_q6_K); ``planes`` says how codes share bytes. Value: d scale q, less
dmin minimum where a type has minimums. Every bit of such a block is one of a code, so an inverse needs nothing but the bytes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tapeout.exporters.gguf.blocks import Block, Bytes, elements, planes, with_parts
from tapeout.quantize import QuantTensor
from tapeout.quantize.scheme import SUPER
from tapeout.quantize.tensor import ScaleCodes

_TWO, _FOUR, _SIX = np.uint8(2), np.uint8(4), np.uint8(6)
_LOW = np.uint8(15)


def _pack_q2_k(tensor: QuantTensor) -> Bytes:
    """84 bytes: 16 scales, low nibbles, with 16 minimums, high nibbles; 64 of codes, four runs of 32; float16 d and dmin."""
    scales, d = _of(tensor.scale_codes)
    minimums, dmin = _of(tensor.minimum)
    return _join(tensor, scales | minimums << _FOUR, planes(_codes(tensor), 2, 32), d, dmin)


def _unpack_q2_k(blocks: Bytes, like: QuantTensor) -> QuantTensor:
    scales, qs, d, dmin = _split(blocks, 16, 64, 2, 2)
    return _with(like, elements(qs, 2, 32), scales & _LOW, d, scales >> _FOUR, dmin)


def _pack_q3_k(tensor: QuantTensor) -> Bytes:
    """110 bytes: 32 of the codes' third bits, eight runs of 32; 64 of their low two bits, four runs of 32; 16 scales; float16 d.

    Value: d (scale - 32) (code - 4). Scales: 8 bytes of low nibbles, two runs of 8; 4 of the high two bits, four runs of 4.
    """
    scales, d = _of(tensor.scale_codes)
    q = _codes(tensor)
    packed = planes(scales, 4, 8), planes(scales >> _FOUR, 2, 4)
    return _join(tensor, planes(q >> _TWO, 1, 32), planes(q, 2, 32), *packed, d)


def _unpack_q3_k(blocks: Bytes, like: QuantTensor) -> QuantTensor:
    third, qs, low, high, d = _split(blocks, 32, 64, 8, 4, 2)
    scales = elements(low, 4, 8) | elements(high, 2, 4) << _FOUR
    return _with(like, elements(qs, 2, 32) | elements(third, 1, 32) << _TWO, scales, d)


def _pack_q4_k(tensor: QuantTensor) -> Bytes:
    """144 bytes: float16 d and dmin; 12 of scales and minimums; 128 of codes, two runs of 32."""
    return _join(tensor, *_heads(tensor), planes(_codes(tensor), 4, 32))


def _unpack_q4_k(blocks: Bytes, like: QuantTensor) -> QuantTensor:
    d, dmin, scales, qs = _split(blocks, 2, 2, 12, 128)
    six = _six(scales)
    return _with(like, elements(qs, 4, 32), six[:, :8], d, six[:, 8:], dmin)


def _pack_q5_k(tensor: QuantTensor) -> Bytes:
    """176 bytes: float16 d and dmin; 12 of scales and minimums; 32 of the codes' fifth bits, eight runs of 32; 128 as in Q4_K."""
    q = _codes(tensor)
    return _join(tensor, *_heads(tensor), planes(q >> _FOUR, 1, 32), planes(q, 4, 32))


def _unpack_q5_k(blocks: Bytes, like: QuantTensor) -> QuantTensor:
    d, dmin, scales, fifth, qs = _split(blocks, 2, 2, 12, 32, 128)
    six = _six(scales)
    q = elements(qs, 4, 32) | elements(fifth, 1, 32) << _FOUR
    return _with(like, q, six[:, :8], d, six[:, 8:], dmin)


def _pack_q6_k(tensor: QuantTensor) -> Bytes:
    """210 bytes: 128 of low nibbles, two runs of 64; 64 of high two bits, four runs of 32; 16 int8 scales; float16 d.

    Value: d scale (code - 32).
    """
    scales, d = _of(tensor.scale_codes)
    q = _codes(tensor)
    return _join(tensor, planes(q, 4, 64), planes(q >> _FOUR, 2, 32), scales ^ np.uint8(0x80), d)


def _unpack_q6_k(blocks: Bytes, like: QuantTensor) -> QuantTensor:
    low, high, scales, d = _split(blocks, 128, 64, 16, 2)
    return _with(like, elements(low, 4, 64) | elements(high, 2, 32) << _FOUR, scales ^ np.uint8(0x80), d)


Q2_K = Block("Q2_K", SUPER, 84, _pack_q2_k, _unpack_q2_k)
Q3_K = Block("Q3_K", SUPER, 110, _pack_q3_k, _unpack_q3_k)
Q4_K = Block("Q4_K", SUPER, 144, _pack_q4_k, _unpack_q4_k)
Q5_K = Block("Q5_K", SUPER, 176, _pack_q5_k, _unpack_q5_k)
Q6_K = Block("Q6_K", SUPER, 210, _pack_q6_k, _unpack_q6_k)


def _heads(tensor: QuantTensor) -> tuple[Bytes, Bytes, Bytes]:
    """What Q4_K and Q5_K begin with: d, dmin, and 8 scales s and 8 minimums m of 6 bits in 12 bytes.

    Bytes 0 … 3: the low six bits s0 … s3, above them the high two of s4 … s7; 4 … 7: the same of m; 8 … 11: the low four
    of s4 … s7, above them those of m4 … m7.
    """
    s, d = _of(tensor.scale_codes)
    m, dmin = _of(tensor.minimum)
    head = (
        s[:, :4] | s[:, 4:] >> _FOUR << _SIX,
        m[:, :4] | m[:, 4:] >> _FOUR << _SIX,
        s[:, 4:] & 15 | m[:, 4:] << _FOUR,
    )
    return d, dmin, np.concatenate(head, axis=1)


def _six(packed: Bytes) -> Bytes:
    """The scales and minimums of such 12 bytes, uint8 [blocks, 12] to uint8 [blocks, 16]."""
    s, m, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return np.concatenate(
        (s & 63, low & 15 | s >> _SIX << _FOUR, m & 63, low >> _FOUR | m >> _SIX << _FOUR), axis=1
    )


def _codes(tensor: QuantTensor) -> Bytes:
    """Codes by super-block, uint8 [blocks, 256]."""
    return tensor.codes().reshape(-1, SUPER)


def _of(scales: ScaleCodes | None) -> tuple[Bytes, Bytes]:
    """Scales by super-block: their codes, uint8 [blocks, scales], and the bytes of d, uint8 [blocks, 2]."""
    assert scales is not None
    assert scales.block.dtype == np.float16
    d = np.ascontiguousarray(scales.block).reshape(-1, 1).view(np.uint8)
    return np.ascontiguousarray(scales.codes).reshape(len(d), -1), d


def _join(tensor: QuantTensor, *parts: Bytes) -> Bytes:
    """The parts of each super-block [blocks, …] one behind the other, uint8 [rows, …]."""
    return np.concatenate(parts, axis=1).reshape(len(tensor.packed), -1)


def _split(blocks: Bytes, *sizes: int) -> list[Bytes]:
    """Undo ``_join``: parts of these sizes, uint8 [blocks, size] each."""
    return np.split(blocks.reshape(-1, sum(sizes)), np.cumsum(sizes)[:-1], axis=1)


def _with(
    like: QuantTensor,
    codes: Bytes,
    scales: Bytes,
    d: Bytes,
    minimums: Bytes | None = None,
    dmin: Bytes | None = None,
) -> QuantTensor:
    minimum = None if minimums is None or dmin is None else _parts(like.minimum, minimums, dmin)
    return with_parts(like, codes.reshape(like.shape), _parts(like.scale_codes, scales, d), minimum)


def _parts(like: ScaleCodes | None, codes: Bytes, d: Bytes) -> ScaleCodes:
    assert like is not None
    block = np.ascontiguousarray(d).view("<f2").reshape(like.block.shape)
    return replace(like, codes=codes.reshape(like.codes.shape), block=block)
