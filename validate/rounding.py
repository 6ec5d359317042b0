"""How runtimes round what they compute with: the inputs of quantized matmuls, and keys and values in a cache of codes.

Each is written from its runtime's own source and held to its output bit for bit; the reference applies them to predict what the
runtime's arithmetic costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from tapeout.exporters import onnx
from tapeout.models import Role
from tapeout.quantize import Quantized, QuantTensor

if TYPE_CHECKING:
    import torch

    Round = Callable[[torch.Tensor], torch.Tensor]

__all__ = [
    "CACHES",
    "ROUNDED",
    "as_cached",
    "as_e2m1",
    "as_e4m3",
    "round_e4m3",
    "round_e4m3_static",
    "round_int8",
    "round_mlas",
    "round_nvfp4",
    "round_q4_0",
    "round_q8_0",
    "round_q8_k",
]


def _as_ggml(quant: Quantized, name: str) -> Round | None:
    """Every quantized weight whose rows llama.cpp can hold in blocks."""
    scheme = quant.schemes[name]
    if scheme.kind == "none" or quant.model.specs[name].shape[-1] % 32:
        return None
    return round_q8_k if scheme.scales == "super" else round_q8_0


def _as_mlas(quant: Quantized, name: str) -> Round | None:
    """Every quantized weight whose container is one whose kernels round; as the scheme says where it says how."""
    spec = quant.model.specs[name]
    scheme = onnx.as_held(quant.schemes[name], spec.role)
    if scheme.activations:
        return _as_the_scheme_says(quant, name)
    block = None if scheme.kind == "none" else onnx.input_block(scheme, spec.shape[-1])
    return None if block is None else partial(round_mlas, block=block)


def _as_the_scheme_says(quant: Quantized, name: str) -> Round | None:
    how = quant.schemes[name].activations
    if how is None:
        return None
    tensor = quant[name]
    assert isinstance(tensor, QuantTensor)  # a tensor that could not take its scheme has none
    if how in ("int8", "int8-static"):
        return partial(round_int8, scale=tensor.input_scale)
    assert tensor.input_scale is not None
    return partial(round_e4m3_static if how == "e4m3-static" else round_nvfp4, scale=tensor.input_scale)


def _as_modelopt(quant: Quantized, name: str) -> Round | None:
    """What a scheme says, and float8 beside weights of float8; only linear layers are codes in those checkpoints."""
    scheme = quant.schemes[name]
    if quant.model.specs[name].role is not Role.LINEAR:
        return None
    if scheme.levels == "e4m3" and scheme.activations is None:
        return round_e4m3
    return _as_the_scheme_says(quant, name)


ROUNDED: Mapping[str, Callable[[Quantized, str], Round | None]] = {
    "ggml": _as_ggml,
    "mlas": _as_mlas,
    "scheme": _as_the_scheme_says,
    "modelopt": _as_modelopt,
}


def round_int8(x: torch.Tensor, scale: np.float32 | None = None) -> torch.Tensor:
    """What ``w8a8`` and ``w8a8-static`` make of a matmul's input: float32 [..., in].

    ``clamp(round(x / scale), -128, 127) * scale``, ties to even: ONNX QuantizeLinear with a zero point of 0. Without a calibrated
    ``scale`` each token has its own, amax / 127, as vLLM and TensorRT-LLM choose it; a token of zeros stays zero.
    """
    import torch

    step = (
        x.abs().amax(-1, keepdim=True) / 127.0 if scale is None else torch.full_like(x[..., :1], float(scale))
    )
    codes = torch.where(step > 0, torch.round(x / step), 0.0).clamp(-128, 127)
    return codes * step


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """What kernels of FP8 weights with a scale a row make of a matmul's input: float32 [..., in], each token under its own step.

    The step is amax / 448, and at least 1 / (448 · 512) (TensorRT-LLM's ``quantize_e4m3_activation``, vLLM's
    ``dynamic_per_token_scaled_fp8_quant``); the nearest E4M3, ties to even.
    """
    step = (x.abs().amax(-1, keepdim=True) / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    return as_e4m3(x / step) * step


def round_e4m3_static(x: torch.Tensor, scale: np.float32) -> torch.Tensor:
    """What ``fp8-static`` makes of a matmul's input: float32 [..., in], the nearest E4M3 under the one calibrated ``scale``.

    vLLM's ``static_scaled_fp8_quant``, TensorRT-LLM's ``static_quantize_e4m3_per_tensor``, ONNX QuantizeLinear; they may multiply by
    one over the scale.
    """
    return as_e4m3(x / float(scale)) * float(scale)


def round_nvfp4(x: torch.Tensor, scale: np.float32) -> torch.Tensor:
    """What ``nvfp4-w4a4`` makes of a matmul's input: float32 [..., in], ``in`` % 16 == 0.

    Blocks of 16 along ``in``, each under its own E4M3, amax / 6 in steps of the calibrated ``scale``; the nearest E2M1, ties to even
    (compressed-tensors' fake quantization, and TensorRT-LLM's and vLLM's ``scaled_fp4_quant`` but for approximate reciprocals).
    A block whose E4M3 is 0 becomes zeros.
    """
    import torch

    blocks = x.unflatten(-1, (-1, 16))
    one_over = torch.ones((), device=x.device) / float(scale)
    step = as_e4m3(one_over * (blocks.abs().amax(-1, keepdim=True) / 6.0)) / one_over
    return (torch.where(step > 0, as_e2m1(blocks / step), 0.0) * step).flatten(-2)


def as_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 of each float32, ties to even, those beyond it at its end."""
    import torch

    size = x.abs().clamp(max=6.0)
    # Levels are 0.5 apart up to 2, then 1, and 2 from 4 on.
    apart = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return torch.copysign(torch.round(size / apart) * apart, x)


def as_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest E4M3 of each float32, those beyond it at its end."""
    import torch

    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(torch.float32)


def round_mlas(x: torch.Tensor, block: int) -> torch.Tensor:
    """What MLAS makes of the input of a MatMulNBits at accuracy_level 4: float32 [..., in], ``in`` % ``block`` == 0.

    Blocks as long as the weights' own: codes = round(x · (127 / amax)), ties to even, under the float32 scale amax / 127
    (``QuantizeARow_CompInt8`` of onnxruntime's ``sqnbitgemm_kernel_*``).
    """
    import torch

    blocks = x.unflatten(-1, (-1, block))
    amax = blocks.abs().amax(-1, keepdim=True)
    # Tensor by tensor: torch makes a scalar over a tensor a product with the reciprocal, which is rounded twice.
    inverse = torch.where(amax > 0, torch.full_like(amax, 127.0) / amax, 0.0)
    return (torch.round(blocks * inverse) * (amax / 127.0)).flatten(-2)


def round_q8_0(x: torch.Tensor) -> torch.Tensor:
    """What ggml's kernels of Q4_0, Q5_0, Q8_0, MXFP4 and NVFP4 make of a matmul's input: float32 [..., in], ``in`` % 32 == 0.

    Blocks of 32 along ``in``: codes = round(x · (127 / amax)), ties to even (ggml's x86 and ARM kernels), with the scale
    amax / 127 kept as float16. The codes are chosen under the scale before that rounding.
    """
    import torch

    blocks = x.unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True)
    # Tensor by tensor: torch makes a scalar over a tensor a product with the reciprocal, which is rounded twice.
    inverse = torch.where(amax > 0, torch.full_like(amax, 127.0) / amax, 0.0)
    scale = (amax / 127.0).to(torch.float16).to(torch.float32)
    return (torch.round(blocks * inverse) * scale).flatten(-2)


def round_q8_k(x: torch.Tensor) -> torch.Tensor:
    """What ggml's kernels of the K types make of a matmul's input (``quantize_row_q8_K``): float32 [..., in], ``in`` % 256 == 0.

    Blocks of 256 along ``in``: the element of largest magnitude, with its sign, becomes -127; the scale stays float32.
    """
    import torch

    blocks = x.unflatten(-1, (-1, 256))
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(extreme != 0, torch.full_like(extreme, -127.0) / extreme, 0.0)
    scale = torch.where(extreme != 0, torch.ones_like(inverse) / inverse, 0.0)
    return (torch.round(blocks * inverse) * scale).flatten(-2)


def round_q4_0(x: torch.Tensor) -> torch.Tensor:
    """What ggml stores of a row as Q4_0 (``quantize_row_q4_0_ref``): float32 [..., in], ``in`` % 32 == 0.

    Blocks of 32 along ``in``: the first element of largest magnitude, with its sign, becomes -8; codes -8 … 7, halves up; the
    scale is kept as float16. The codes are chosen under the scale before that rounding.
    """
    import torch

    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8.0
    inverse = torch.where(scale != 0, torch.ones_like(scale) / scale, 0.0)
    codes = torch.floor(blocks * inverse + 8.5).clamp(max=15) - 8
    return (codes * scale.to(torch.float16).to(torch.float32)).flatten(-2)


CACHES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "kv-fp8": as_e4m3, "kv-int8": round_q8_0, "kv-int4": round_q4_0
}  # fmt: skip


def as_cached(
    x: torch.Tensor,
    rounded: Callable[[torch.Tensor], torch.Tensor],
    *,
    rotary: bool,
    neighbours: bool = True,
) -> torch.Tensor:
    """Round float32 heads [..., head_dim] in the basis in which llama.cpp's cache holds them.

    Elements that RoPE turns together stand side by side there (``rotary``: keys and queries), if ``neighbours``: the arch has
    llama.cpp's "norm" RoPE; with its "neox" they stand as in the checkpoint. Heads of a multiple of 64 elements are turned by a Walsh-Hadamard matrix before they are
    rounded, which spreads outliers: values 64 elements at a time, keys and queries as many as a power of two divides
    (``llama_kv_cache::build_input_k_rot``).
    """
    width, apart = x.shape[-1], rotary and neighbours
    if apart:
        x = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    if width % 64:
        x = rounded(x)
    else:
        turn = _hadamard(width & -width if rotary else 64)
        x = _turned(rounded(_turned(x, turn)), turn)  # it is its own inverse
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if apart else x


def _hadamard(size: int) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard matrix in Sylvester's order, float32 [size, size]; ``size`` is a power of two."""
    import torch

    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / size**0.5


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    return (x.unflatten(-1, (-1, len(turn))) @ turn).flatten(-2)
