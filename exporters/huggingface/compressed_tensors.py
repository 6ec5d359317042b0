"""compressed-tensors (llm-compressor, vLLM, transformers), by what it calls a format:

    pack-quantized   weight_packed I32 [out, in * bits / 32], lowest bits first, code + 2**(bits - 1); weight_shape I64 [2]
                     weight_zero_point I32 [out * bits / 32, groups], packed along ``out`` in the same way
    int-quantized    weight I8 [out, in]; its inputs are rounded to 8 bits too: input_scale F32 [1] where their step is fixed
    float-quantized  weight F8_E4M3 [out, in]; of one scale a tensor weight_scale F32 [1] and input_scale F32 [1]
    nvfp4-pack-quantized
                     weight_packed U8 [out, in / 2], low nibble: the even column; weight_scale F8_E4M3 [out, in / 16];
                     weight_global_scale F32 [1], which divides; and so does input_global_scale F32 [1] where inputs are E2M1 too

weight_scale [out, groups], of a row [out, 1]. The weight is (code - zero_point) * scale.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import SchemeError
from tapeout.exporters import Carry, Exact, Refused
from tapeout.exporters.huggingface.parts import under_one
from tapeout.exporters.streamed import Part, held
from tapeout.quantize import QuantTensor, Scheme
from tapeout.quantize.scheme import E2M1, E4M3, E4M3_ONE
from tapeout.quantize.tensor import ScaleCodes, pack

NAME = "compressed-tensors"
FLOATS_ALIKE = False  # loaders bring every float to one type
LIBRARY = "compressed_tensors"
FLOATS = ()

_VERSION = "0.20.0"  # of the library whose layout this is
SUFFIXES = (
    "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "input_scale", "weight_global_scale", "input_global_scale",
)  # fmt: skip
_FLOAT4 = "nvfp4-pack-quantized"


def carries(scheme: Scheme) -> Carry:
    """Integers of 4 and 8 bits, float8 and NVFP4: what vLLM loads of the format."""
    if scheme.kind == "none":
        return Exact("float")
    if scheme.levels == "e2m1" and scheme.scales == "e4m3":
        return Exact(_FLOAT4)
    if scheme.levels == "e2m1":
        return Refused("of compressed-tensors' 4-bit floats NVFP4 is written.", "nvfp4")
    if scheme.activations == "e4m3-static":
        return Exact("float-quantized")
    if scheme.levels == "e4m3" and scheme.group is None and scheme.scales in ("float16", "float32"):
        return Exact("float-quantized")
    if scheme.kind == "codebook":
        return Refused("compressed-tensors has no such codebook.", _nearest(scheme))
    if scheme.scales not in ("float16", "float32") or scheme.kind == "affine":
        return Refused("compressed-tensors has one float a group, no super-blocks.", _nearest(scheme))
    if scheme.bits not in (4, 8):
        return Refused("vLLM's kernels of this format take 4 and 8 bits.", _nearest(scheme))
    return Exact("int-quantized" if scheme.activations else "pack-quantized")


def _nearest(scheme: Scheme) -> str:
    return "int8" if scheme.bits > 4 else f"int4-g{scheme.group if scheme.group in (32, 64, 128) else 32}"


def why_no_mixture(packed: Mapping[str, Scheme]) -> str | None:
    """None: loaders take experts one by one, under the checkpoint's names."""
    return None


def fused(tensor: QuantTensor, scheme: Scheme) -> str:
    """What must be the same of matrices that loaders put together."""
    return under_one(tensor, scheme)


def rounds_scales(schemes: Collection[Scheme]) -> bool:
    """Whether loaders bring scales to the model's type."""
    return any(scheme.scales != "e4m3" for scheme in schemes)


def files(said: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Nothing beside ``config.json``."""
    return {}


def parts(base: str, tensor: QuantTensor, scheme: Scheme) -> dict[str, Part]:
    """The tensors that stand for the weight of module ``base``."""
    out, into = tensor.shape
    if scheme.levels == "e2m1":
        return {f"{base}.{suffix}": part for suffix, part in _float4(base, tensor).items()}
    found = {"weight_scale": held(tensor.scale)}
    if scheme.activations == "e4m3-static":
        found["weight_scale"] = held(np.ascontiguousarray(tensor.scale[:1, 0], np.float32))
        found["input_scale"] = held(np.array([tensor.input_scale], np.float32))
    if scheme.levels == "e4m3":
        found["weight"] = Part("F8_E4M3", (out, into), lambda rows: tensor.packed[rows], out)
    elif scheme.activations:
        found["weight"] = Part("I8", (out, into), lambda rows: tensor.packed[rows] ^ np.uint8(0x80), out)
        if tensor.input_scale is not None:
            found["input_scale"] = held(np.array([tensor.input_scale], np.float32))
    else:
        words = -(-into * tensor.bits // 32)
        found["weight_packed"] = Part("I32", (out, words), lambda rows: _words(tensor.packed[rows]), out)
        found["weight_shape"] = held(np.array([out, into], np.int64))
        if tensor.zero_point is not None:
            along = pack(np.ascontiguousarray(tensor.zero_point.T), tensor.bits)
            found["weight_zero_point"] = held(np.ascontiguousarray(_words(along).T))
    return {f"{base}.{suffix}": part for suffix, part in found.items()}


def _float4(base: str, tensor: QuantTensor) -> dict[str, Part]:
    kept, (out, into) = tensor.scale_codes, tensor.shape
    assert kept is not None
    found = {
        "weight_packed": Part("U8", (out, into // 2), lambda rows: tensor.packed[rows], out),
        "weight_scale": held(np.ascontiguousarray(kept.codes), "F8_E4M3"),
        "weight_global_scale": held(_divisor(base, np.float32(kept.block[0]))),
    }
    if tensor.input_scale is not None:
        found["input_global_scale"] = held(_divisor(base, tensor.input_scale))
    return found


def _divisor(base: str, scale: np.float32) -> npt.NDArray[np.float32]:
    """The float32 [1] that one is divided by to ``scale``, as loaders do."""
    near = down = up = np.float32(1) / scale
    for _ in range(2):
        for each in (near, down, up):
            if np.float32(1) / each == scale:
                return np.array([each], np.float32)
        down, up = np.nextafter(down, np.float32(0)), np.nextafter(up, np.float32(np.inf))
    raise SchemeError(
        f"{base} has codes under {float(scale):.9g}, by which this format divides, and that is one over no float32. "
        "What fits: the original model, or target nvidia."
    )


def _words(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Rows of bytes as rows of words, the last filled with zeros."""
    short = -packed.shape[1] % 4
    filled = np.pad(packed, ((0, 0), (0, short))) if short else np.ascontiguousarray(packed)
    return filled.view("<i4")


def statement(schemes: Mapping[str, Scheme], floats: Sequence[str]) -> dict[str, Any]:
    """``quantization_config``: a group for each scheme; modules by their names where there are several.

    Args:
        schemes: of the modules whose weights are codes.
        floats: other modules that have a matrix.
    """
    by_scheme: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(module)
    groups, formats = {}, []
    for index, (scheme, modules) in enumerate(by_scheme.items()):
        answer = carries(scheme)
        assert isinstance(answer, Exact)
        formats.append(answer.container)
        groups[f"group_{index}"] = {
            "format": answer.container,
            "input_activations": _inputs(scheme),
            "output_activations": None,
            "targets": ["Linear"] if len(by_scheme) == 1 else modules,
            "weights": _weights(scheme),
        }
    return {
        "config_groups": groups,
        "format": formats[0] if len(set(formats)) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": list(floats),
        "kv_cache_scheme": None,
        "quant_method": NAME,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": _VERSION,
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    strategy = "group" if scheme.group else "channel"
    if scheme.scales == "e4m3":
        strategy = "tensor_group" if scheme.group else "tensor"
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": scheme.group,
        "num_bits": scheme.bits,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": strategy,
        **_types(scheme),
        "symmetric": scheme.kind != "asymmetric",
        "type": "float" if scheme.kind == "codebook" else "int",
    }


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.activations is None:
        return None
    fixed, float4 = scheme.calibrated, scheme.levels == "e2m1"
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": "local" if float4 else not fixed,
        "group_size": scheme.group,
        "num_bits": scheme.bits,
        "observer": "static_minmax" if float4 else "minmax" if fixed else None,
        "observer_kwargs": {},
        "strategy": "tensor_group" if float4 else "tensor" if fixed else "token",
        **_types(scheme),
        "symmetric": True,
        "type": "float" if scheme.kind == "codebook" else "int",
    }


def _types(scheme: Scheme) -> dict[str, Any]:
    """What scales of groups are kept as, where it is not the model's type."""
    if scheme.levels != "e2m1":
        return {}
    return {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}


class Reader:
    """Reads weights back by the library's own unpacking.

    Args:
        said: ``quantization_config``.
        tensors: of the files by name, torch tensors.
    """

    def __init__(self, said: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        from compressed_tensors.quantization import QuantizationConfig

        self._config = QuantizationConfig.model_validate(dict(said))
        self._tensors = tensors

    def _scheme(self, base: str) -> Any:
        """The library's scheme of a module."""
        groups = list(self._config.config_groups.values())
        return next((group for group in groups if base in group.targets), groups[0])

    def _state(self, base: str) -> dict[str, Any]:
        names = ("weight", *SUFFIXES)
        return {name: self._tensors[f"{base}.{name}"] for name in names if f"{base}.{name}" in self._tensors}

    def codes(self, base: str) -> QuantTensor | None:
        """The codes of a module's weight; None: it is a float."""
        import torch
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        state = self._state(base)
        if "weight_scale" not in state:
            return None
        if "weight_global_scale" in state:
            return self._float4(state)
        args, scale = self._scheme(base).weights, state["weight_scale"].numpy()
        bits, zero_point, codebook = int(args.num_bits), None, None
        middle = 2 ** (bits - 1)
        if "weight_packed" in state:
            shape = torch.Size(state["weight_shape"].tolist())
            codes = unpack_from_int32(state["weight_packed"], bits, shape).numpy().view(np.uint8)
            codes = (codes + np.uint8(middle)) & np.uint8(2**bits - 1)
            if not args.symmetric:
                shape = torch.Size((shape[0], scale.shape[1]))
                zeros = unpack_from_int32(state["weight_zero_point"], bits, shape, packed_dim=0)
                zero_point = np.ascontiguousarray(zeros.numpy()).view(np.uint8) + np.uint8(middle)
                zero_point &= np.uint8(2**bits - 1)
        elif args.type == "float":
            codes, codebook = state["weight"].view(torch.uint8).numpy(), E4M3
        else:
            codes = state["weight"].numpy().view(np.uint8) ^ np.uint8(0x80)
        if codebook is None:
            codebook = np.arange(2**bits, dtype=np.float32) - np.float32(middle if args.symmetric else 0)
        kept, step = None, state.get("input_scale")
        if args.strategy == "tensor":
            kept = ScaleCodes(np.full((len(codes), 1), E4M3_ONE, np.uint8), E4M3, scale, len(codes))
            scale = kept.values()
        return QuantTensor(
            packed=pack(np.ascontiguousarray(codes), bits),
            bits=bits,
            in_features=codes.shape[1],
            scale=scale,
            group=codes.shape[1] // scale.shape[1],
            codebook=codebook,
            zero_point=zero_point,
            scale_codes=kept,
            input_scale=None if step is None else step.numpy().reshape(())[()],
        )

    @staticmethod
    def _float4_values(state: Mapping[str, Any]) -> Any:
        """What the library unpacks of NVFP4, in float32 and not in its bfloat16."""
        import torch
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

        out, pairs = state["weight_packed"].shape
        return unpack_fp4_from_uint8(state["weight_packed"], out, 2 * pairs, torch.float32)

    def _float4_weight(self, state: Mapping[str, Any], args: Any) -> npt.NDArray[np.float32]:
        """The library's dequantization of NVFP4, in float32."""
        import torch
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        found: npt.NDArray[np.float32] = dequantize(
            self._float4_values(state),
            state["weight_scale"].float(),
            args=args,
            dtype=torch.float32,
            global_scale=state["weight_global_scale"],
        ).numpy()
        return found

    def _float4(self, state: Mapping[str, Any]) -> QuantTensor:
        """Codes of NVFP4, by the values that the library unpacks."""
        import torch

        values = self._float4_values(state).numpy()
        codes = np.searchsorted(E2M1[:8], np.abs(values)).astype(np.uint8)
        codes |= np.signbit(values).astype(np.uint8) << 3
        scales = state["weight_scale"].view(torch.uint8).numpy()
        one = np.float32(1)
        kept = ScaleCodes(scales, E4M3, one / state["weight_global_scale"].numpy(), scales.size)
        step = state.get("input_global_scale")
        return QuantTensor(
            packed=pack(codes, 4),
            bits=4,
            in_features=values.shape[1],
            scale=kept.values(),
            group=values.shape[1] // scales.shape[1],
            codebook=E2M1,
            scale_codes=kept,
            input_scale=None if step is None else one / step.numpy().reshape(())[()],
        )

    def weight(self, base: str) -> npt.NDArray[np.float32] | None:
        """The weight of a module as the library decompresses it, in float32; None: it is a float."""
        from compressed_tensors.compressors import BaseCompressor

        state = self._state(base)
        if "weight_scale" not in state:
            return None
        scheme = self._scheme(base)
        if "weight_global_scale" in state:
            return self._float4_weight(state, scheme.weights)
        compressor = BaseCompressor.get_value_from_registry(scheme.format or self._config.format)
        # The library computes in the scale's own type.
        state["weight_scale"] = state["weight_scale"].float()
        found: npt.NDArray[np.float32] = compressor.decompress(state, scheme)["weight"].float().numpy()
        return found
