"""compressed-tensors (llm-compressor, vLLM), by format:

    pack-quantized        weight_packed int32 [out, in * bits / 32], lowest bits first, code + 2**(bits - 1)
                          weight_zero_point int32 [out * bits / 32, groups], packed along ``out``; weight_shape int64 [2]
    int-quantized         weight I8 [out, in]; weight_zero_point I8 [out, groups]
    float-quantized       weight F8_E4M3 [out, in]
    nvfp4-pack-quantized  weight_packed U8 [out, in / 2], weight_scale F8_E4M3, weight_global_scale F32 (which divides); where inputs are
                          E2M1 too input_global_scale F32 (which divides)
    mxfp4-pack-quantized  weight_packed U8 [out, in / 2], weight_scale U8 (E8M0)

``naive-quantized`` is one of the middle two. weight_scale [out, groups], [out, 1] or [1]. The weight is
(code - zero_point) * scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from tapeout.errors import ModelError
from tapeout.quantize.foreign.layer import (
    Bytes,
    Floats,
    Imported,
    Layer,
    Reader,
    e4m3,
    integers,
    nvfp4,
    unpack_words,
    word_count,
    words_as_packed,
)
from tapeout.quantize.scheme import E4M3, SCHEMES, Scheme

_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
_SUFFIXES = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
)


def read(statement: Mapping[str, Any]) -> Reader:
    """Check what the checkpoint says of itself."""
    form, groups = str(statement.get("format")), statement.get("config_groups") or {}
    sparse = (statement.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense":
        raise ModelError(f"the checkpoint is stored sparse ({sparse}), which is not read.")
    if form not in (*_FORMATS, "mixed-precision"):
        raise ModelError(
            f"the compressed-tensors checkpoint has the format '{form}'; those read are {', '.join(_FORMATS)}."
        )
    if (status := statement.get("quantization_status", "compressed")) != "compressed":
        raise ModelError(
            f"the compressed-tensors checkpoint is '{status}', so its weights are not codes yet; 'compressed' is read."
        )
    notes = []
    for group in groups.values():
        own = group.get("format") or form
        if own not in _FORMATS:
            raise ModelError(
                f"the compressed-tensors checkpoint has a group of format '{own}', which is not read."
            )
        if own == "nvfp4-pack-quantized":
            notes.append(
                "scales are multiplied by 1 / weight_global_scale, as vLLM does; compressed-tensors divides by it, which is apart "
                "by a unit in the last place of float32 at most"
            )
        inputs = group.get("input_activations")
        if inputs and not _inputs(group):
            said = f"{inputs.get('type', 'int')}{inputs.get('num_bits', 8)}"
            notes.append(
                f"the checkpoint means inputs in {said} ({inputs.get('strategy')}); here they stay float"
            )
    if statement.get("kv_cache_scheme"):
        notes.append("the cache's quantization is left behind: keys and values stay float")
    left = (".k_scale", ".v_scale", ".q_scale", ".output_scale", ".k_zero_point", ".v_zero_point")
    return Reader(partial(_layer, form, groups), _SUFFIXES, left, tuple(dict.fromkeys(notes)))


def _inputs(group: Mapping[str, Any]) -> Scheme | None:
    """What is done to the inputs, as a scheme that says the same of such weights; None: nothing, or nothing known."""
    inputs, weights = group.get("input_activations") or {}, group.get("weights") or {}
    if inputs.get("type") == "float":
        how = tuple(inputs.get(key) for key in ("num_bits", "strategy", "dynamic", "group_size"))
        if how[:3] == (8, "tensor", False) and weights.get("strategy") == "tensor":
            return SCHEMES["fp8-static"]
        local = how == (4, "tensor_group", "local", 16) and weights.get("type") == "float"
        return SCHEMES["nvfp4-w4a4"] if local and weights.get("strategy") == "tensor_group" else None
    if inputs.get("type", "int") != "int" or inputs.get("num_bits") != 8 or not inputs.get("symmetric", True):
        return None
    if inputs.get("dynamic") is True and inputs.get("strategy") == "token":
        return SCHEMES["w8a8"]
    return (
        SCHEMES["w8a8-static"] if inputs.get("strategy") == "tensor" and not inputs.get("dynamic") else None
    )


def _layer(form: str, groups: Mapping[str, Any], layer: Layer) -> Imported | None:
    if layer.get("weight_scale") is None:
        return None
    group = _group_of(layer, groups)
    own, weights = group.get("format") or form, group.get("weights") or {}
    if layer.get("weight_g_idx") is not None:
        g_idx = layer.source("weight_g_idx", ("I32", "I64")).bits()
        if not (g_idx == -1).all() and (np.diff(g_idx) < 0).any():
            raise layer.refuse(
                "it was quantized with actorder = group, so its groups (weight_g_idx) are not columns side by side; "
                "with actorder = weight (or none) it could"
            )
    if own == "mxfp4-pack-quantized":
        return _mxfp4(layer)
    if own == "nvfp4-pack-quantized":
        return _nvfp4(layer, group)
    bits = int(weights.get("num_bits", 8))
    if weights.get("strategy") == "block":
        raise layer.refuse(
            f"it is scaled in blocks of {weights.get('block_structure')}; a canonical group lies in a row"
        )
    if layer.get("weight_packed") is not None:
        return _packed(layer, bits, group)
    return _plain(layer, group)


def _group_of(layer: Layer, groups: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config group of a layer: the one that names it, or its class."""
    named, of_class = [], []
    for group in groups.values():
        for target in group.get("targets") or ["Linear"]:
            if target in ("Linear", "Embedding"):
                of_class.append(group)
            elif (target.startswith("re:") and re.match(target[3:], layer.base)) or target == layer.base:
                named.append(group)
    found: list[Mapping[str, Any]] = named or of_class
    if not found:
        raise layer.refuse("no config group of config.json names it")
    if len(found) > 1 and any(other != found[0] for other in found):
        raise layer.refuse("several config groups of config.json name it")
    return found[0]


def _scale(layer: Layer, group: Mapping[str, Any]) -> Floats:
    """float32 [out, groups]; a scale of the whole tensor is repeated."""
    out, into = layer.shape
    size = (group.get("weights") or {}).get("group_size")
    count = -(-into // size) if size and size > 0 else 1
    scale = layer.floats("weight_scale", *({(out, count)} if count > 1 else {(out, 1), (out,), (1,), ()}))
    if into % count or (size and size > 0 and into % size):
        raise layer.refuse(f"its last group is shorter: group_size {size} does not divide in_features {into}")
    return np.ascontiguousarray(np.broadcast_to(scale.reshape(-1, count), (out, count)))


def _packed(layer: Layer, bits: int, group: Mapping[str, Any]) -> Imported:
    out, into = layer.shape
    shape = layer.source("weight_shape", ("I64", "I32"), (2,)).bits()
    if tuple(int(n) for n in shape) != layer.shape:
        raise layer.refuse(
            f"its weight_shape says {shape.tolist()} where config.json says {list(layer.shape)}"
        )
    scale = _scale(layer, group)
    # Before 0.13 words of 3, 5, 6 or 7 bits had gaps; then the width is another, and the shape does not fit.
    words = layer.source("weight_packed", ("I32",), (out, word_count(into, bits)))
    zero_point = None
    if layer.get("weight_zero_point") is not None:
        zeros = layer.source("weight_zero_point", ("I32",), (word_count(out, bits), scale.shape[1]))
        zero_point = np.ascontiguousarray(unpack_words(zeros.bits().T, out, bits).T)
    elif not (group.get("weights") or {}).get("symmetric", True):
        raise layer.refuse("its scheme is asymmetric, and weight_zero_point is missing")
    return integers(layer, bits, scale, zero_point, lambda: words_as_packed(words.bits(), into, bits))


def _plain(layer: Layer, group: Mapping[str, Any]) -> Imported:
    out, into = layer.shape
    weight = layer.source("weight", ("I8", "F8_E4M3"), (out, into))
    if weight.dtype == "F8_E4M3":
        scale = layer.floats("weight_scale", (out, 1), (out,), (1,), (1, 1), ())
        step = layer.floats("input_scale", (1,), ()) if _inputs(group) else None
        return e4m3(layer, scale, weight.bits, step)
    bits = int((group.get("weights") or {}).get("num_bits", 8))
    if bits != 8:
        raise layer.refuse(f"its {bits} bits are kept in bytes; 8 are read from bytes")
    scale, zero_point = _scale(layer, group), None
    if layer.get("weight_zero_point") is not None:
        zeros = layer.source("weight_zero_point", ("I8",)).bits().reshape(-1, scale.shape[1])
        zero_point = np.ascontiguousarray(np.broadcast_to(zeros.view(np.uint8) ^ np.uint8(0x80), scale.shape))
    inputs, extra = _inputs(group), {}
    if inputs and inputs.activations == "int8-static":
        extra = {"input_scale": layer.floats("input_scale", (1,), ()).reshape(1)}
    return integers(
        layer, 8, scale, zero_point, lambda: weight.bits().view(np.uint8) ^ np.uint8(0x80), inputs, extra
    )


def _mxfp4(layer: Layer) -> Imported:
    out, into = layer.shape
    weight = layer.source("weight_packed", ("U8",), (out, into // 2))
    parts = {"scale_codes": layer.source("weight_scale", ("U8",), (out, into // 32)).bits()}
    return Imported(SCHEMES["mxfp4"], weight.bits, parts)


def _nvfp4(layer: Layer, group: Mapping[str, Any]) -> Imported:
    out, into = layer.shape
    weight = layer.source("weight_packed", ("U8",), (out, into // 2))
    codes = layer.source("weight_scale", ("F8_E4M3",), (out, into // 16)).bits()
    divisor = layer.floats("weight_global_scale", (1,), ())
    parts = {"scale_codes": codes, "scale_block": _factor(codes, divisor.reshape(1))}
    step = None
    if _inputs(group):
        step = np.float32(1) / layer.floats("input_global_scale", (1,), ())
    return nvfp4(weight.bits, parts, layer, step)


def _factor(codes: Bytes, divisor: Floats) -> Floats:
    """The float32 [1] that gives by multiplication what dividing by the global scale gives; else one over it, see ``read``."""
    scales = E4M3[np.unique(codes)]
    wanted, factor = scales / divisor, np.float32(1) / divisor
    for candidate in (factor, np.nextafter(factor, np.float32(0)), np.nextafter(factor, np.float32(np.inf))):
        if np.array_equal(scales * candidate, wanted):
            return candidate
    return factor
