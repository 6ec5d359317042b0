"""ModelOpt's "unified" Hugging Face checkpoints (TensorRT-LLM, vLLM). What a weight is follows from its tensors.

FP8         weight F8_E4M3 [out, in]    weight_scale F32 [] or [out]    input_scale F32 [] beside the first
INT8        weight I8 [out, in]         weight_scale F32 [out]     input_scale F32 [] of SmoothQuant
W4A16_AWQ   weight U8 [out / 2, in]     weight_scale F32 [out, groups]     low nibble: the even row, two's complement
NVFP4       weight U8 [out, in / 2]     weight_scale F8_E4M3 [out, in / 16], weight_scale_2 F32 []   low nibble: the even column
            input_scale F32 [] where inputs are E2M1 too
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tapeout.errors import ModelError
from tapeout.models import SourceTensor
from tapeout.models.checkpoint import FLOATS
from tapeout.quantize.foreign.layer import Bytes, Floats, Imported, Layer, Reader, e4m3, integers, nvfp4
from tapeout.quantize.scheme import SCHEMES
from tapeout.quantize.tensor import pack

_SUFFIXES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
_ALGOS = (
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "W8A16",
    "INT8_WO",
    "INT4_AWQ",
    "W4A16_AWQ",
    "NVFP4",
    "NVFP4_AWQ",
    "W4A16_NVFP4",
    "W8A8_SQ_PER_CHANNEL",
    "MIXED_PRECISION",
)


def read(statement: Mapping[str, Any]) -> Reader:
    """Check what the checkpoint says of itself: ``hf_quant_config.json``, or the same in config.json."""
    inner = statement.get("quantization") or statement
    algo = inner.get("quant_algo")
    each = [said.get("quant_algo") for said in (inner.get("quantized_layers") or {}).values()]
    if unknown := [one for one in (algo, *each) if one not in _ALGOS]:
        raise ModelError(
            f"the ModelOpt checkpoint has the quant_algo {unknown[0]}; those read are {', '.join(sorted(_ALGOS))}."
        )
    notes = []
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":
        notes.append("ModelOpt means inputs in float8; here they stay float")
    elif algo in ("FP8", "NVFP4", "NVFP4_AWQ"):
        width = "float8" if algo == "FP8" else "float4"
        notes.append(f"ModelOpt means inputs in {width}; they stay float where it has no input_scale")
    elif algo == "W8A8_SQ_PER_CHANNEL":
        notes.append(
            "ModelOpt means int8 inputs; they stay float where the weights' scales are not exact in float16"
        )
    cache = inner.get("kv_cache_quant_algo") or inner.get("kv_cache_scheme")
    if cache:
        notes.append(f"the cache's quantization ({cache}) is left behind: keys and values stay float")
    return Reader(_layer, _SUFFIXES, (".k_scale", ".v_scale", ".output_scale"), tuple(notes))


def _layer(layer: Layer) -> Imported | None:
    weight = layer.get("weight")
    if weight is None or weight.dtype in FLOATS:
        return None
    out, into = layer.shape
    if layer.get("pre_quant_scale") is not None and (layer.floats("pre_quant_scale", (into,)) != 1).any():
        raise layer.refuse(
            "its inputs are multiplied by pre_quant_scale first, which is no part of a weight; only ones are carried"
        )
    if weight.dtype == "F8_E4M3":
        layer.source("weight", ("F8_E4M3",), (out, into))
        scale = layer.floats("weight_scale", (), (1,), (out,), (out, 1))
        return e4m3(layer, scale, weight.bits, _input_scale(layer))
    if weight.dtype == "I8":
        layer.source("weight", ("I8",), (out, into))
        scale = layer.floats("weight_scale", (out,), (out, 1)).reshape(out, 1)
        inputs, step = None, {}
        if (found := _input_scale(layer)) is not None:
            inputs, step = SCHEMES["w8a8-static"], {"input_scale": found}
        return integers(
            layer, 8, scale, None, lambda: weight.bits().view(np.uint8) ^ np.uint8(0x80), inputs, step
        )
    if layer.get("weight_scale_2") is not None:
        return _nvfp4(layer)
    return _int4(layer)


def _nvfp4(layer: Layer) -> Imported:
    out, into = layer.shape
    weight = layer.source("weight", ("U8",), (out, into // 2))
    parts = {
        "scale_codes": layer.source("weight_scale", ("F8_E4M3",), (out, into // 16)).bits(),
        "scale_block": layer.floats("weight_scale_2", (), (1,)).reshape(1),
    }
    return nvfp4(weight.bits, parts, layer, _input_scale(layer))


def _input_scale(layer: Layer) -> Floats | None:
    """The step of its inputs, float32 [1]; None: they stay float."""
    return None if layer.get("input_scale") is None else layer.floats("input_scale", (), (1,)).reshape(1)


def _int4(layer: Layer) -> Imported:
    out, into = layer.shape
    weight = layer.source("weight", ("U8",), (out // 2, into))
    scale = layer.source("weight_scale", FLOATS)
    if len(scale.shape) != 2 or scale.shape[0] != out or into % scale.shape[1]:
        raise layer.refuse(f"its weight_scale is {list(scale.shape)} where [{out}, groups] is expected")
    return integers(layer, 4, scale.float32(), None, lambda: _rows_apart(weight))


def _rows_apart(weight: SourceTensor) -> Bytes:
    pairs = weight.bits()
    codes = np.stack((pairs & np.uint8(0x0F), pairs >> np.uint8(4)), axis=1).reshape(-1, pairs.shape[1])
    return pack(codes ^ np.uint8(8), 4)
