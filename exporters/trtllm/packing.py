"""What stands for the codes of a linear, by TensorRT-LLM's name of an algorithm (``tensorrt_llm/quantization``, releases 1.0 to 1.2):

    W8A16       weight I8 [in, out], per_channel_scale F16 [out]
    W4A16_AWQ   weight I8 [out / 2, in], two rows in a byte, the even one low, each code - 8 in two's complement;
                weights_scaling_factor F16 [out, in / group]; prequant_scaling_factor [in] of the model's type, which inputs are multiplied by;
                zero F16 [in / group, out] with zero points: (8 - zero_point) * scale, added to (code - 8) * scale
    W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN
                weight I8 [out, in], per_channel_scale F32 [1, out]; of a row also smoother F32 [1, in], which inputs are divided by
    W8A8_SQ_PER_CHANNEL
                weight I8 [out, in], weights_scaling_factor F32 [out], activation_scaling_factor F32 [1],
                prequant_scaling_factor F16 [in]

Experts have one more axis in front. What ``trtllm-build`` does to these at load is its own: it turns and interleaves the 4-bit codes
of W4A16_AWQ for the GPU it runs on. Of W8A16 it takes bytes as they are, so they must be in the order of the kernel that config.json asks
for: here TensorRT's own, in plain order, on any GPU (``disable_weight_only_quant_plugin``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tapeout.exporters import Carry, Exact, Refused, Rounded
from tapeout.exporters.nibbles import rows_together
from tapeout.exporters.streamed import ADDED_ERROR, Array, Part, held
from tapeout.quantize import SCHEMES, QuantTensor, Scheme
from tapeout.quantize.tensor import pack

GROUPS = (64, 128)
PLAIN, AWQ = "W8A16", "W4A16_AWQ"
PER_TOKEN, STATIC = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "W8A8_SQ_PER_CHANNEL"


def carries(scheme: Scheme) -> Carry:
    """What a rank checkpoint holds without a byte that depends on the GPU."""
    if scheme.kind == "none":
        return Exact("float")
    if scheme.activations in ("e4m3-static", "e2m1-static"):
        return Refused(
            "TensorRT-LLM's FP8 and NVFP4 are not written as rank checkpoints: its PyTorch backend loads them of the format modelopt.",
            "w8a8-static" if scheme.bits == 8 else "int4-g64",
        )
    if scheme.levels == "e4m3" and scheme.scales in ("float16", "float32"):
        return Refused(
            "TensorRT-LLM's FP8 rounds inputs to 8 bits too, which this scheme does not say.", "int8"
        )
    if scheme.kind in ("codebook", "affine") or scheme.scales not in ("float16", "float32"):
        return Refused(
            "TensorRT-LLM multiplies integer codes with one float a group, no other levels and no super-blocks.",
            "int8" if scheme.bits > 4 else "int4-g64",
        )
    if scheme.bits == 8 and scheme.group:
        return Refused("groups of 8-bit codes have kernels of one GPU generation's order of bytes.", "int8")
    if scheme.activations:
        return Exact(PER_TOKEN if scheme.activations == "int8" else STATIC)
    if scheme.scales == "float32":
        return Refused(
            "its scales are in the model's type, and float32 ones would be rounded.",
            "int8" if scheme.bits > 4 else "int4-g64",
        )
    if scheme.bits == 8:
        return Exact(PLAIN)
    if scheme.bits != 4 or scheme.group not in GROUPS:
        near = f"int4-g{128 if scheme.group == 128 else 64}"
        return Refused(
            "its groupwise kernels take 4 bits in groups of 64 or 128.",
            f"{near}-asym" if scheme.kind == "asymmetric" else near,
        )
    # The zero term is rounded to float16, up to 8 steps of a group whose weights reach over 16.
    return Rounded(AWQ, ADDED_ERROR) if scheme.kind == "asymmetric" else Exact(AWQ)


def parts(blocks: Sequence[QuantTensor], algorithm: str, *, row: bool, dtype: str = "F16") -> dict[str, Part]:
    """The tensors that stand for blocks [out_i, in] one under another, by their suffix; ``row``: of a row linear; ``dtype``: the model's."""
    into = blocks[0].in_features
    out = sum(len(block.packed) for block in blocks)
    scale = np.concatenate([block.scale for block in blocks])
    if algorithm == PLAIN:
        return {
            "weight": Part("I8", (into, out), lambda rows: _turned(blocks, rows), into),
            "per_channel_scale": held(scale[:, 0]),
        }
    if algorithm == AWQ:
        found = {
            "weight": under([_nibbles(block) for block in blocks]),
            "weights_scaling_factor": held(scale),
            "prequant_scaling_factor": _ones(into, dtype),
        }
        if blocks[0].zero_point is not None:
            steps = np.float32(8) - np.concatenate([np.asarray(block.zero_point) for block in blocks])
            found["zero"] = held(np.ascontiguousarray((steps * scale).astype(np.float16).T))
        return found
    weight = under([_bytes(block) for block in blocks])
    wide = scale[:, 0].astype(np.float32)
    if algorithm == PER_TOKEN:
        found = {"weight": weight, "per_channel_scale": held(wide[None])}
        return found | ({"smoother": held(np.ones((1, into), np.float32))} if row else {})
    return {
        "weight": weight,
        "weights_scaling_factor": held(wide),
        "activation_scaling_factor": held(np.array([blocks[0].input_scale], np.float32)),
        "prequant_scaling_factor": _ones(into, dtype),
    }


def _ones(count: int, dtype: str) -> Part:
    return (
        held(np.full(count, 0x3F80, np.uint16), dtype)
        if dtype == "BF16"
        else held(np.ones(count, np.float16))
    )


def under(found: Sequence[Part]) -> Part:
    """Parts of one width one under another, along their first axis."""
    if len(found) == 1:
        return found[0]
    shape = (sum(part.shape[0] for part in found), *found[0].shape[1:])
    return Part(found[0].dtype, shape, _run(found, [part.shape[0] for part in found]), shape[0])


def stacked(found: Sequence[Part]) -> Part:
    """Parts of one shape behind one another, on a new first axis."""
    heights = [part.height for part in found]
    shape = (len(found), *found[0].shape)
    if heights[0] == 1:
        whole = np.stack([part.rows(slice(None)) for part in found])
        return held(whole, found[0].dtype)
    return Part(found[0].dtype, shape, _run(found, heights), sum(heights))


def _run(found: Sequence[Part], heights: Sequence[int]) -> Callable[[slice], Array]:
    """Rows that are counted through all parts."""
    ends = np.cumsum(heights)

    def rows(which: slice) -> Array:
        first, last, _ = which.indices(int(ends[-1]))
        pieces = []
        for part, end, height in zip(found, ends, heights, strict=True):
            begin = int(end) - height
            low, high = max(first, begin), min(last, int(end))
            if low < high:
                pieces.append(part.rows(slice(low - begin, high - begin)))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    return rows


def _turned(blocks: Sequence[QuantTensor], rows: slice) -> Array:
    """Some columns of bytes as rows."""
    return np.concatenate([block.packed[:, rows].T for block in blocks], axis=1) ^ np.uint8(0x80)


def _bytes(block: QuantTensor) -> Part:
    return Part("I8", block.shape, lambda rows: block.packed[rows] ^ np.uint8(0x80), len(block.packed))


def _nibbles(block: QuantTensor) -> Part:
    """Pairs of rows in bytes."""
    out, into = block.shape

    def rows(which: slice) -> Array:
        first, last, _ = which.indices(out // 2)
        return rows_together(block.packed[2 * first : 2 * last])

    return Part("I8", (out // 2, into), rows, out // 2)


def unpacked(get: Callable[[str], Array], algorithm: str, group: int, zeros: bool) -> QuantTensor:
    """The codes [out, in] that a rank has under a module; ``get`` gives its tensors by their suffix."""
    weight = get("weight").view(np.uint8)
    if algorithm == AWQ:
        both = weight ^ np.uint8(0x88)
        codes = np.empty((2 * len(both), both.shape[1]), np.uint8)
        codes[::2], codes[1::2] = both & 15, both >> 4
        scale, zero, scheme = get("weights_scaling_factor"), None, SCHEMES["int4-g64"]
        if zeros:
            scheme = SCHEMES["int4-g64-asym"]
            with np.errstate(divide="ignore", invalid="ignore"):
                steps = np.nan_to_num(np.rint(get("zero").T.astype(np.float32) / scale.astype(np.float32)))
            zero = (8 - steps).clip(0, 255).astype(np.uint8)
        return QuantTensor(pack(codes, 4), 4, codes.shape[1], scale, group, scheme.codebook(), zero)
    codes = np.ascontiguousarray(weight.T if algorithm == PLAIN else weight) ^ np.uint8(0x80)
    scale = get("weights_scaling_factor" if algorithm == STATIC else "per_channel_scale").reshape(-1, 1)
    step = np.float32(get("activation_scaling_factor")[0]) if algorithm == STATIC else None
    codebook, into = SCHEMES["int8"].codebook(), codes.shape[1]
    return QuantTensor(codes, 8, into, scale, into, codebook, input_scale=step)


def cut(tensor: QuantTensor, rows: slice, cols: slice) -> QuantTensor:
    """A block of a tensor of codes; ``cols`` begins and ends with whole groups, or the group is a row."""
    found = tensor.rows(rows)
    first, last, _ = cols.indices(tensor.in_features)
    if (first, last) == (0, tensor.in_features):
        return found
    per_row = tensor.bits == 8  # other groups may be as long as a share of a row
    groups = slice(None) if per_row else slice(first // tensor.group, last // tensor.group)
    return replace(
        found,
        packed=found.packed[:, first * tensor.bits // 8 : last * tensor.bits // 8],
        in_features=last - first,
        scale=found.scale[:, groups],
        group=last - first if per_row else tensor.group,
        zero_point=None if found.zero_point is None else found.zero_point[:, groups],
    )
