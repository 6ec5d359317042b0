"""bitsandbytes NF4: nibbles, high one first, and a float32 ``absmax`` a block of 64; or codes of it under double quantization.

weight U8 [n / 2, 1]   weight.absmax F32 [blocks] or U8   weight.quant_map F32 [16]
weight.nested_absmax F32 [blocks / 256]   weight.nested_quant_map F32 [256]   weight.quant_state.bitsandbytes__nf4 JSON
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from tapeout.errors import ModelError
from tapeout.models import SourceTensor
from tapeout.quantize.foreign.layer import Bytes, Imported, Layer, Reader, with_scale
from tapeout.quantize.scheme import NF4, SCHEMES, dynamic_map
from tapeout.quantize.tensor import DOUBLE_BLOCK, ScaleCodes

_STATE = "weight.quant_state.bitsandbytes__"
_SUFFIXES = (
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    f"{_STATE}nf4",
)


def read(statement: Mapping[str, Any]) -> Reader:
    """Check what the checkpoint says of itself."""
    if statement.get("load_in_8bit"):
        raise ModelError(
            "the bitsandbytes checkpoint is of LLM.int8(), which divides by 127 after it multiplies and keeps outlier columns "
            "apart; of bitsandbytes NF4 is read. Quantize the original model with --scheme int8."
        )
    kind = statement.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise ModelError(f"the bitsandbytes checkpoint has the codebook '{kind}'; nf4 is read.")
    return Reader(_layer, _SUFFIXES)


def _layer(layer: Layer) -> Imported | None:
    if layer.get(f"{_STATE}nf4") is None:
        if layer.get(f"{_STATE}fp4") is not None:
            raise layer.refuse("its codebook is fp4; nf4 is read")
        return None
    out, into = layer.shape
    raw = layer.source(f"{_STATE}nf4", ("U8",)).bits().tobytes()
    try:
        state = json.loads(raw)
    except ValueError as error:
        raise layer.refuse(f"its quant_state is no JSON ({error})") from error
    block, shape = state.get("blocksize"), tuple(state.get("shape") or ())
    if shape != layer.shape:
        raise layer.refuse(f"its quant_state says {list(shape)} where config.json says {list(layer.shape)}")
    if block != 64 or into % block:
        raise layer.refuse(
            f"blocks of {block} weights run through the whole tensor; carried are blocks of 64 that divide in_features, which is "
            f"{into}"
        )
    if not np.array_equal(layer.floats("weight.quant_map", (16,)), NF4):
        raise layer.refuse("its quant_map is not NF4's codebook")
    weight = layer.get("weight")
    if weight is None or weight.nbytes != out * into // 2:
        found = "missing" if weight is None else f"{weight.nbytes} bytes"
        raise layer.refuse(f"its weight is {found} where {out * into // 2} bytes are expected")
    scales, groups = (out, into // block), out * into // block
    if "nested_offset" not in state:
        absmax = layer.source("weight.absmax", ("F32",), (groups,)).float32()
        scheme, kept = with_scale(layer, SCHEMES["nf4"], absmax.reshape(scales))
        return Imported(scheme, lambda: _packed(weight, out), {"scale": kept})
    if state.get("nested_blocksize") != DOUBLE_BLOCK:
        raise layer.refuse(
            f"its scales were quantized in blocks of {state.get('nested_blocksize')}; {DOUBLE_BLOCK} are carried"
        )
    levels = layer.floats("weight.nested_quant_map", (256,))
    parts = {
        "scale_codes": layer.source("weight.absmax", ("U8",), (groups,)).bits().reshape(scales),
        "scale_block": layer.floats("weight.nested_absmax", (-(-groups // DOUBLE_BLOCK),)),
        "scale_offset": np.array([state["nested_offset"]], np.float32),
    }
    if not np.array_equal(levels, dynamic_map()):  # another version's: then the scales that it means
        means = ScaleCodes(
            parts["scale_codes"], levels, parts["scale_block"], DOUBLE_BLOCK, state["nested_offset"]
        )
        scheme, kept = with_scale(layer, SCHEMES["nf4"], means.values())
        return Imported(scheme, lambda: _packed(weight, out), {"scale": kept})
    return Imported(SCHEMES["nf4-dq"], lambda: _packed(weight, out), parts)


def _packed(weight: SourceTensor, out: int) -> Bytes:
    """The nibbles with the even element low. The bytes may be kept as another type (``bnb_4bit_quant_storage``)."""
    pairs = np.ascontiguousarray(weight.bits()).reshape(-1).view(np.uint8).reshape(out, -1)
    return (pairs << np.uint8(4)) | (pairs >> np.uint8(4))
