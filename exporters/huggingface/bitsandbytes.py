"""bitsandbytes NF4, as transformers saves and loads it: nibbles, the high one first, and blocks of 64 in row-major order.

weight U8 [out * in / 2, 1]   weight.absmax F32 [blocks]   weight.quant_map F32 [16]
weight.quant_state.bitsandbytes__nf4 U8 [n], JSON
double quantization: weight.absmax U8 [blocks], weight.nested_absmax F32 [blocks / 256], weight.nested_quant_map F32 [256]
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import PackageError
from tapeout.exporters import Carry, Exact, Refused, Rounded
from tapeout.exporters.huggingface.parts import ADDED_ERROR, Array, Part, held
from tapeout.quantize import QuantTensor, Scheme
from tapeout.quantize.scheme import NF4, dynamic_map
from tapeout.quantize.tensor import DOUBLE_BLOCK, ScaleCodes, pack

NAME = "bitsandbytes"
FLOATS_ALIKE = (
    True  # transformers leaves floats beside such weights in the file's types, and does not run a mixture
)
LIBRARY = "bitsandbytes"
FLOATS = ()

_STATE = "weight.quant_state.bitsandbytes__nf4"
SUFFIXES = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", _STATE)


def carries(scheme: Scheme) -> Carry:
    """NF4, and bytes as floats: embeddings and heads take them beside it."""
    if scheme.kind == "none":
        return Exact("float")
    if scheme.levels == "nf4" and scheme.group == 64:
        return Exact("nf4 double" if scheme.scales == "double" else "nf4")
    if scheme.kind == "symmetric" and scheme.bits == 8 and scheme.activations is None:
        return Rounded("F16", ADDED_ERROR)
    return Refused("of bitsandbytes' own codes NF4 in blocks of 64 is written.", "nf4")


def why_no_mixture(packed: Mapping[str, Scheme]) -> str | None:
    """Why a mixture of experts is not loaded; transformers keeps experts as one tensor a layer, which bitsandbytes leaves alone."""
    return (
        f"which transformers does not load from the format {NAME}. What fits: compressed-tensors."
        if packed
        else None
    )


def fused(tensor: QuantTensor, scheme: Scheme) -> str:
    """What must be the same of matrices that loaders put together."""
    return str(scheme)


def rounds_scales(schemes: Collection[Scheme]) -> bool:
    """Whether loaders bring scales to the model's type."""
    return True


def files(said: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Nothing beside ``config.json``."""
    return {}


def parts(base: str, tensor: QuantTensor, scheme: Scheme) -> dict[str, Part]:
    """The tensors that stand for the weight of module ``base``."""
    out, into = tensor.shape
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float16",
        "shape": [out, into],
    }
    found = {"weight.quant_map": held(NF4)}
    if tensor.scale_codes is not None:
        kept = tensor.scale_codes
        state |= {
            "nested_blocksize": DOUBLE_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(np.float32(kept.offset)),
        }
        found["weight.absmax"] = held(np.ascontiguousarray(kept.codes).reshape(-1))
        found["weight.nested_absmax"] = held(np.ascontiguousarray(kept.block, np.float32).reshape(-1))
        found["weight.nested_quant_map"] = held(dynamic_map())
    else:
        found["weight.absmax"] = held(tensor.scale.astype(np.float32).reshape(-1))
    found[_STATE] = held(np.frombuffer(json.dumps(state).encode(), np.uint8))
    found["weight"] = Part("U8", (out * into // 2, 1), lambda rows: _swapped(tensor.packed[rows]), out)
    return {f"{base}.{suffix}": part for suffix, part in found.items()}


def _swapped(packed: npt.NDArray[np.uint8]) -> Array:
    """Nibbles changed over."""
    return (packed << np.uint8(4)) | (packed >> np.uint8(4))


def statement(schemes: Mapping[str, Scheme], floats: Sequence[str]) -> dict[str, Any]:
    """``quantization_config``.

    Args:
        schemes: of the modules whose weights are codes.
        floats: other modules that have a matrix.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(scheme.scales == "double" for scheme in schemes.values()),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(floats),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": NAME,
    }


class Reader:
    """Reads weights back by the library's own unpacking.

    Args:
        said: ``quantization_config``.
        tensors: of the files by name, torch tensors.
    """

    def __init__(self, said: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def _state(self, base: str) -> Any:
        """The library's state of a weight, whose results are float32; None: it is a float."""
        import torch
        from bitsandbytes.functional import QuantState

        names = (f"{base}.{suffix}" for suffix in SUFFIXES)
        found = {name: self._tensors[name] for name in names if name in self._tensors}
        if not found:
            return None
        try:
            state = QuantState.from_dict(found, device=torch.device("cpu"))
        except (KeyError, ValueError) as error:
            raise PackageError(f"{base} is no weight of bitsandbytes: {error}.") from error
        state.dtype = torch.float32
        return state

    def codes(self, base: str) -> QuantTensor | None:
        """The codes of a module's weight; None: it is a float."""
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = self._state(base)
        if state is None:
            return None
        out, into = state.shape
        groups = (out, into // state.blocksize)
        ones = torch.ones(out * into // state.blocksize)
        plain = QuantState(
            absmax=ones,
            shape=state.shape,
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=torch.float32,
        )
        levels = dequantize_4bit(self._tensors[f"{base}.weight"], plain).numpy().reshape(out, into)
        codebook = state.code.numpy()
        codes = np.searchsorted(codebook, levels).astype(np.uint8)
        if not np.array_equal(codebook[codes], levels):
            raise PackageError(f"{base}: the library makes other levels of its codes than its quant_map has.")
        kept, scale = None, state.absmax.numpy().reshape(groups)
        if state.nested:
            inner = state.state2
            kept = ScaleCodes(
                scale, inner.code.numpy(), inner.absmax.numpy(), inner.blocksize, float(state.offset)
            )
            scale = kept.values()
        elif np.array_equal(half := scale.astype(np.float16), scale):
            scale = half
        return QuantTensor(pack(codes, 4), 4, into, scale, state.blocksize, codebook, scale_codes=kept)

    def weight(self, base: str) -> npt.NDArray[np.float32] | None:
        """The weight of a module as the library dequantizes it, in float32; None: it is a float."""
        from bitsandbytes.functional import dequantize_4bit

        state = self._state(base)
        if state is None:
            return None
        found = dequantize_4bit(self._tensors[f"{base}.weight"], state)
        weight: npt.NDArray[np.float32] = found.reshape(state.shape).numpy()
        return weight
