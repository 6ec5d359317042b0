"""The blocks of GGUF: 32 weights along ``in`` under one scale (NVFP4: 64 under four), one packer and its inverse a type.

Layouts: ggml's ``ggml-common.h`` (block_q4_0, block_q5_0, block_q8_0, block_mxfp4, block_nvfp4). A canonical group longer than
32 repeats its scale. The super-blocks of 256 weights stand in ``k_blocks``.

What an inverse cannot express as a canonical code comes back so that it equals nothing, since a damaged file is for the
``codes`` gate to name: a scale as NaN, a code as one beyond the scheme's bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tapeout import Late
from tapeout.quantize import QuantTensor
from tapeout.quantize.scheme import NF4
from tapeout.quantize.tensor import ScaleCodes, pack

kernels = Late("tapeout.exporters.gguf.kernels")

Bytes = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.float16] | npt.NDArray[np.float32]

# NF4 has no type of its own. Of all steps that fit 127, this one brings 16 integers nearest to the codebook.
NF4_STEP = np.float32(123.25)
NF4_INTEGERS = np.rint(NF4_STEP * NF4).astype(np.int8)


@dataclass(frozen=True)
class Block:
    """A block type: how many bytes hold how many weights, and the two directions.

    Attributes:
        kind: GGUF's name (``Q4_0``).
        weights: of a block.
        size: its bytes.
        pack: rows of a tensor to bytes, uint8 [rows, in / weights * size].
        unpack: such bytes, and the tensor that they should hold (for what a file does not say), to a tensor.
    """

    kind: str
    weights: int
    size: int
    pack: Callable[[QuantTensor], Bytes]
    unpack: Callable[[Bytes, QuantTensor], QuantTensor]

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes in a file."""
        return 8 * self.size / self.weights


def _pack_q4_0(tensor: QuantTensor) -> Bytes:
    """18 bytes: float16 d; 16 bytes of which byte j holds element j low and element j + 16 high. Value: (nibble - 8) d."""
    rows, into = tensor.shape
    out = np.empty((rows, into // 32 * 9), np.uint16)
    # Copies, since numba compiles anew for each kind of array: these are writable and aligned, a map is neither.
    words = np.array(tensor.packed).view(np.uint64)
    kernels.pack_q4_0(words.reshape(-1), _bits(tensor.scale), out.reshape(-1))
    return out.view(np.uint8)


def _unpack_q4_0(blocks: Bytes, like: QuantTensor) -> QuantTensor:
    d, parts = _split(blocks, 18)
    return replace(like, packed=pack(elements(parts[:, :, 2:], 4, 16), 4), scale=_scales(d, like))


def _pack_narrow(tensor: QuantTensor) -> Bytes:
    """Q4_0 that holds codes of 2 or 3 bits: the same values in the middle of its range."""
    codes = tensor.codes() + np.uint8(8 - 2 ** (tensor.bits - 1))
    return _join(tensor.scale, "V16", planes(codes, 4, 16))


def _unpack_narrow(blocks: Bytes, like: QuantTensor) -> QuantTensor:
    d, parts = _split(blocks, 18)
    # In uint8 a code below zero wraps to one beyond the scheme's bits.
    codes = elements(parts[:, :, 2:], 4, 16) - np.uint8(8 - 2 ** (like.bits - 1))
    return _with_codes(like, codes, _scales(d, like))


def _pack_q5_0(tensor: QuantTensor) -> Bytes:
    """22 bytes: float16 d; uint32 whose bit j is the fifth bit of element j; 16 bytes of low nibbles as in Q4_0.

    Value: (q - 16) d, so an integer zero point goes into q = code - zero_point + 16, which is 1 … 31.
    """
    assert tensor.zero_point is not None
    rows, into = tensor.shape
    shift = (np.uint8(16) - tensor.zero_point)[:, :, None]
    q = (tensor.codes().reshape(rows, -1, tensor.group) + shift).reshape(rows, into)
    qs = np.empty((rows, into // 32, 20), np.uint8)
    qs[:, :, :4] = np.packbits(q >> 4, axis=1, bitorder="little").reshape(rows, -1, 4)
    qs[:, :, 4:] = planes(q, 4, 16).reshape(rows, -1, 16)
    return _join(tensor.scale, "V20", qs)


def _unpack_q5_0(blocks: Bytes, like: QuantTensor) -> QuantTensor:
    assert like.zero_point is not None
    d, parts = _split(blocks, 22)
    rows, into = like.shape
    fifth = np.unpackbits(np.ascontiguousarray(parts[:, :, 2:6]).reshape(rows, -1), axis=1, bitorder="little")
    q = (elements(parts[:, :, 6:], 4, 16) | (fifth << 4)).reshape(rows, -1, like.group)
    # In uint8 a code below zero wraps to one beyond 15.
    codes = q - (np.uint8(16) - like.zero_point)[:, :, None]
    return _with_codes(like, codes.reshape(rows, into), _scales(d, like))


def _pack_q8_0(tensor: QuantTensor) -> Bytes:
    """34 bytes: float16 d; 32 int8. Value: q d."""
    rows, into = tensor.shape
    out = np.empty((rows, into // 32 * 17), np.uint16)
    kernels.pack_q8_0(
        np.array(tensor.packed).view(np.uint16).reshape(-1), _bits(tensor.scale), out.reshape(-1)
    )
    return out.view(np.uint8)


def _unpack_q8_0(blocks: Bytes, like: QuantTensor) -> QuantTensor:
    d, parts = _split(blocks, 34)
    codes = (parts[:, :, 2:] ^ np.uint8(0x80)).reshape(like.shape)
    return replace(like, packed=codes, scale=_scales(d, like))


def _pack_nf4(tensor: QuantTensor) -> Bytes:
    """Q8_0 that holds NF4: q = round(123.25 codebook[code]), d = float16(scale / 123.25)."""
    pairs = NF4_INTEGERS.view(np.uint8).astype("<u2")
    # By a packed byte: its even and its odd element.
    both = (pairs[None, :] | (pairs[:, None] << 8)).reshape(-1)
    return _join(nf4_scale(tensor), "V32", np.take(both, tensor.packed))


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


def _pack_mxfp4(tensor: QuantTensor) -> Bytes:
    """17 bytes: E8M0 scale; 16 bytes of E2M1 codes, byte j holding element j low and element j + 16 high.

    ggml knows the same 16 codes by twice their value, under half the scale.
    """
    assert tensor.scale_codes is not None
    parts = planes(tensor.codes(), 4, 16).reshape(*tensor.scale_codes.codes.shape, 16)
    return np.concatenate((tensor.scale_codes.codes[:, :, None], parts), axis=2).reshape(len(parts), -1)


def _unpack_mxfp4(blocks: Bytes, like: QuantTensor) -> QuantTensor:
    assert like.scale_codes is not None
    parts = blocks.reshape(len(blocks), -1, 17)
    codes = elements(parts[:, :, 1:], 4, 16)
    return with_parts(like, codes, replace(like.scale_codes, codes=parts[:, :, 0]))


def _pack_nvfp4(tensor: QuantTensor) -> Bytes:
    """36 bytes: four E4M3 scales, of 16 elements each; four times 8 bytes of E2M1 codes, byte j holding element j low, j + 8 high.

    The float32 that a tensor's scales are multiplied with stands in another tensor (``layout.Entry.scale_of``).
    """
    assert tensor.scale_codes is not None
    scales = tensor.scale_codes.codes.reshape(len(tensor.packed), -1, 4)
    assert scales.max(initial=0) < 0x7F, "ggml drops a scale's sign, and NaN is zero there"
    parts = planes(tensor.codes(), 4, 8).reshape(len(scales), -1, 32)
    return np.concatenate((scales, parts), axis=2).reshape(len(parts), -1)


def _unpack_nvfp4(blocks: Bytes, like: QuantTensor) -> QuantTensor:
    assert like.scale_codes is not None
    parts = blocks.reshape(len(blocks), -1, 36)
    scales = parts[:, :, :4].reshape(len(blocks), -1)
    return with_parts(like, elements(parts[:, :, 4:], 4, 8), replace(like.scale_codes, codes=scales))


Q4_0 = Block("Q4_0", 32, 18, _pack_q4_0, _unpack_q4_0)
Q5_0 = Block("Q5_0", 32, 22, _pack_q5_0, _unpack_q5_0)
Q8_0 = Block("Q8_0", 32, 34, _pack_q8_0, _unpack_q8_0)
MXFP4 = Block("MXFP4", 32, 17, _pack_mxfp4, _unpack_mxfp4)
NVFP4 = Block("NVFP4", 64, 36, _pack_nvfp4, _unpack_nvfp4)
NARROW_AS_Q4_0 = Block("Q4_0", 32, 18, _pack_narrow, _unpack_narrow)
NF4_AS_Q8_0 = Block("Q8_0", 32, 34, _pack_nf4, _unpack_nf4)


def planes(codes: Bytes, bits: int, run: int) -> Bytes:
    """The low ``bits`` of codes, uint8 [rows, in], laid over one another run by run, uint8 [rows, in * bits / 8].

    Of 8 / bits runs of ``run`` codes that follow one another, run k goes into bits ``k * bits`` and up of ``run`` bytes.
    """
    width = min(run, 8)  # codes that one word moves at a time
    words = codes.view(f"<u{width}").reshape(len(codes), -1, 8 // bits, run // width)
    word = words.dtype.type
    mask = word(int.from_bytes(bytes([2**bits - 1] * width), "little"))
    out = words[:, :, 0] & mask
    for k in range(1, 8 // bits):
        out |= (words[:, :, k] & mask) << word(k * bits)
    packed: Bytes = out.view(np.uint8).reshape(len(codes), -1)
    return packed


def elements(packed: Bytes, bits: int, run: int) -> Bytes:
    """Undo ``planes``: uint8 [rows, …] to uint8 [rows, in]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, run) >> shifts & np.uint8(2**bits - 1)
    return runs.reshape(len(packed), -1)


def with_parts(
    like: QuantTensor, codes: Bytes, scales: ScaleCodes, minimum: ScaleCodes | None = None
) -> QuantTensor:
    """``like`` with these codes [rows, in], and with scales and minimums of these parts."""
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged d may be infinite, or a NaN that signals
        scale = scales.values()
    return replace(like, packed=pack(codes, like.bits), scale=scale, scale_codes=scales, minimum=minimum)


def _bits(scale: Scales) -> npt.NDArray[np.uint16]:
    """The scales' bits, uint16 [groups]."""
    assert scale.dtype == np.float16, "a wider scale would be rounded without a word"
    return np.array(scale).view(np.uint16).reshape(-1)


def _join(scale: Scales, kind: str, parts: npt.NDArray[np.generic]) -> Bytes:
    """Put d before the bytes of each block; ``kind`` is a void type, since one copy of 16 bytes beats 16 of one."""
    rows, groups = scale.shape
    q = np.ascontiguousarray(parts).reshape(-1).view(kind).reshape(rows, -1)
    blocks = np.empty(q.shape, np.dtype([("d", "<u2"), ("q", kind)]))
    blocks["d"] = np.repeat(_bits(scale).reshape(rows, groups), q.shape[1] // groups, axis=1)
    blocks["q"] = q
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
    """``like`` with these codes; with one beyond its bits, a tensor of 8 bits that has no value for it."""
    if codes.max(initial=0) < len(like.codebook):
        return replace(like, packed=pack(codes, like.bits), scale=scale)
    codebook = np.full(256, np.nan, np.float32)
    codebook[: len(like.codebook)] = like.codebook
    return replace(like, packed=codes, bits=8, codebook=codebook, scale=scale)
