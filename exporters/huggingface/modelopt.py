"""ModelOpt's unified checkpoint (TensorRT-LLM, vLLM, SGLang), by what it calls a ``quant_algo``:

    W8A16                      weight I8 [out, in]         weight_scale F32 [out]
    W8A8_SQ_PER_CHANNEL        the same                    input_scale F32 []
    W4A16_AWQ                  weight U8 [out / 2, in]     weight_scale F32 [out, in / group]   low nibble: the even row, two's complement
                               pre_quant_scale F16 [in] where a loader asks for it: ones, since ours is folded before
    FP8_PER_CHANNEL_PER_TOKEN  weight F8_E4M3 [out, in]    weight_scale F32 [out]
    FP8                        weight F8_E4M3 [out, in]    weight_scale F32 [], input_scale F32 []
    W4A16_NVFP4                weight U8 [out, in / 2]     weight_scale F8_E4M3 [out, in / 16], weight_scale_2 F32 []
                               low nibble: the even column
    NVFP4                      the same                    input_scale F32 []

``hf_quant_config.json`` and ``quantization_config`` say the same in two ways (ModelOpt's ``convert_hf_config``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from tapeout.errors import SchemeError
from tapeout.exporters import Carry, Exact, Refused
from tapeout.exporters.huggingface.parts import under_one
from tapeout.exporters.nibbles import rows_together
from tapeout.exporters.streamed import Part, held
from tapeout.models.decoder import FUSED
from tapeout.quantize import QuantTensor, Scheme

NAME = "modelopt"
FLOATS_ALIKE = False
LIBRARY = "modelopt"
FLOATS = ("kv_b_proj",)  # TensorRT-LLM cuts it by heads, which it does to floats alone
CACHES = ("fp8",)
CONFIG = "hf_quant_config.json"

SUFFIXES = (
    "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "k_scale", "v_scale",
)  # fmt: skip

# Loaders look for this name; the version is that of the library whose layout this is.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
# A matrix that TensorRT-LLM puts together with others takes no pre_quant_scale; any other must have one.
_TOGETHER = {name for names in FUSED[:2] for name in names}
_OF_EXPERTS = ("W8A16", "W4A16_NVFP4")
_UNDER_ONE = ("FP8", "NVFP4", "W4A16_NVFP4")  # which have one scale a tensor
_ROUNDED = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W8A8_SQ_PER_CHANNEL")  # whose inputs are, too


def carries(scheme: Scheme) -> Carry:
    """What TensorRT-LLM has a kernel for; of it vLLM takes the 8-bit and 4-bit floats, SGLang those with calibrated inputs."""
    if scheme.kind == "none":
        return Exact("float")
    if scheme.activations == "e4m3-static":
        return Exact("FP8")
    if scheme.levels == "e4m3" and scheme.group is None and scheme.activations is None:
        return Exact("FP8_PER_CHANNEL_PER_TOKEN")
    if scheme.levels == "e2m1" and scheme.scales == "e4m3":
        return Exact("NVFP4" if scheme.activations else "W4A16_NVFP4")
    if scheme.levels == "e2m1":
        return Refused(
            "TensorRT-LLM takes MXFP4 with inputs that it rounds by the largest of a whole batch, which is not written.",
            "nvfp4",
        )
    if scheme.kind == "codebook":
        return Refused(
            "NVIDIA's kernels have no such codebook: its weights would be unpacked in memory.", "int4-g64"
        )
    if scheme.kind == "asymmetric":
        return Refused("the format's kernels have no zero points.", _nearest(scheme))
    if scheme.scales not in ("float16", "float32") or scheme.kind == "affine":
        return Refused("the format has one float a group, no super-blocks.", _nearest(scheme))
    if scheme.bits == 4 and scheme.group not in (64, 128):
        return Refused("TensorRT-LLM's 4-bit kernels take groups of 64 and 128.", _nearest(scheme))
    if scheme.bits == 8 and scheme.group is not None:
        return Refused("the format has one scale a row of 8-bit integers.", "int8")
    if scheme.activations == "int8":
        return Refused("the format has one calibrated step for the inputs of such a matrix.", "w8a8-static")
    if scheme.bits not in (4, 8):
        return Refused("the format has integers of 4 and 8 bits.", _nearest(scheme))
    return Exact(
        "W4A16_AWQ" if scheme.bits == 4 else "W8A8_SQ_PER_CHANNEL" if scheme.activations else "W8A16"
    )


def _nearest(scheme: Scheme) -> str:
    return "int8" if scheme.bits > 4 else f"int4-g{scheme.group if scheme.group in (64, 128) else 64}"


def why_no_mixture(packed: Mapping[str, Scheme]) -> str | None:
    """Why a mixture of experts is not loaded with these tensors as codes; None: it is."""
    for name, scheme in packed.items():
        if ".experts." in name and _algo(scheme) not in _OF_EXPERTS:
            return (
                f"experts as {scheme} ({_algo(scheme)}), for which no loader of the format modelopt has a kernel. "
                "What fits: int8, nvfp4."
            )
    return None


def fused(tensor: QuantTensor, scheme: Scheme) -> str:
    """What must be the same of matrices that loaders put together."""
    return under_one(tensor, scheme) if _algo(scheme) in _UNDER_ONE else str(scheme)


def rounds_scales(schemes: Collection[Scheme]) -> bool:
    """Whether loaders bring scales to the model's type."""
    return any(scheme.kind == "symmetric" for scheme in schemes)


def parts(base: str, tensor: QuantTensor, scheme: Scheme) -> dict[str, Part]:
    """The tensors that stand for the weight of module ``base``."""
    out, into = tensor.shape
    found: dict[str, Part] = {}
    if tensor.input_scale is not None:
        found["input_scale"] = held(np.array(tensor.input_scale, np.float32))
    if scheme.levels == "e2m1":
        kept = tensor.scale_codes
        assert kept is not None
        codes = np.ascontiguousarray(kept.codes)
        if (codes & 0x80).any():
            raise SchemeError(
                f"{base} has a negative scale, which NVFP4's kernels do not read. What fits: int4-g64."
            )
        found["weight_scale"] = held(codes, "F8_E4M3")
        found["weight_scale_2"] = held(np.asarray(kept.block, np.float32).reshape(()))
        found["weight"] = Part("U8", (out, into // 2), lambda rows: tensor.packed[rows], out)
        return {f"{base}.{suffix}": part for suffix, part in found.items()}
    scale = np.ascontiguousarray(tensor.scale, np.float32)
    if scheme.levels == "e4m3":
        found["weight_scale"] = held(scale[0, 0].reshape(()) if scheme.activations else scale.reshape(out))
        found["weight"] = Part("F8_E4M3", (out, into), lambda rows: tensor.packed[rows], out)
    elif scheme.bits == 8:
        found["weight_scale"] = held(scale.reshape(out))
        found["weight"] = Part("I8", (out, into), lambda rows: tensor.packed[rows] ^ np.uint8(0x80), out)
    else:
        if out % 2:
            raise SchemeError(
                f"{base} has {out} rows, of which W4A16_AWQ packs two into a byte. What fits: int8."
            )
        found["weight_scale"] = held(scale)
        if base.rpartition(".")[2] not in _TOGETHER:
            found["pre_quant_scale"] = held(np.ones(into, np.float16))
        found["weight"] = Part(
            "U8",
            (out // 2, into),
            lambda rows: rows_together(tensor.packed[_twice(rows, out)]),
            out // 2,
        )
    return {f"{base}.{suffix}": part for suffix, part in found.items()}


def _twice(rows: slice, out: int) -> slice:
    """The rows of which these are pairs."""
    start, stop, _ = rows.indices(out // 2)
    return slice(2 * start, 2 * stop)


def cache_parts(base: str) -> dict[str, Part]:
    """Steps of a float8 cache: 1, as ModelOpt recommends it, since a float's range needs no calibration."""
    last = base.rpartition(".")[2]
    if last not in ("k_proj", "v_proj"):
        return {}
    return {f"{base}.{last[0]}_scale": held(np.array(1, np.float32))}


def _algo(scheme: Scheme) -> str:
    answer = carries(scheme)
    assert isinstance(answer, Exact)
    return answer.container


def _entry(scheme: Scheme) -> dict[str, Any]:
    """What is said of a matrix."""
    found: dict[str, Any] = {"quant_algo": _algo(scheme)}
    if scheme.group:
        found["group_size"] = scheme.group
    if found["quant_algo"] == "W4A16_AWQ":
        found |= {"has_zero_point": False, "pre_quant_scale": True}
    return found


def statement(
    schemes: Mapping[str, Scheme], floats: Sequence[str], kv_cache: str | None = None
) -> dict[str, Any]:
    """``quantization_config``.

    Args:
        schemes: of the modules whose weights are codes.
        floats: other modules that have a matrix.
        kv_cache: ``fp8``, or None: as the model has it.
    """
    entries = {module: _entry(scheme) for module, scheme in schemes.items()}
    kinds: dict[str, tuple[Scheme, list[str]]] = {}
    for module, scheme in schemes.items():
        kinds.setdefault(str(_entry(scheme)), (scheme, []))[1].append(module)
    said: dict[str, Any] = {
        "ignore": sorted({*floats, "model.embed_tokens"}),
        "producer": dict(_PRODUCER),
        "quant_method": NAME,
    }
    if kv_cache:
        said["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    if len(kinds) == 1:
        said |= next(iter(entries.values()))
    else:
        said |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": entries}
    if len(kinds) > 1 or not rounds_scales(schemes.values()):  # ModelOpt says it of those
        said["config_groups"] = {
            f"group_{index}": _group(scheme, modules if len(kinds) > 1 else ["Linear"])
            for index, (scheme, modules) in enumerate(kinds.values())
        }
    return said


def _group(scheme: Scheme, targets: Sequence[str]) -> dict[str, Any]:
    floats = scheme.kind == "codebook"
    width: dict[str, Any] = {
        "dynamic": False, "num_bits": scheme.bits, "type": "float" if floats else "int"
    }  # fmt: skip
    if scheme.group:
        width["group_size"] = scheme.group
    group: dict[str, Any] = {"targets": sorted(targets), "weights": dict(width)}
    if _algo(scheme) in _ROUNDED:
        group["input_activations"] = dict(width)
        if not scheme.group and _algo(scheme) != "FP8":
            group["weights"]["strategy"] = "channel"
    return group


def files(said: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``hf_quant_config.json``, the older way to say ``quantization_config``, which TensorRT-LLM reads first."""
    inner = {
        key: said[key]
        for key in (
            "quant_algo",
            "group_size",
            "has_zero_point",
            "pre_quant_scale",
            "quantized_layers",
        )
        if key in said
    }
    inner["kv_cache_quant_algo"] = "FP8" if "kv_cache_scheme" in said else None
    inner["exclude_modules"] = said["ignore"]
    return {CONFIG: {"producer": said["producer"], "quantization": inner}}
