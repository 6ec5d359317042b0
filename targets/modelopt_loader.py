"""ModelOpt's unified checkpoints on transformers: what TensorRT-LLM's and vLLM's loaders make of the files, in float32 on a CPU.

Written from what those loaders read (``tensorrt_llm/_torch/modules/linear.py``, vLLM's ``quantization/modelopt.py``) and from
ModelOpt's ``export/quant_utils.py``, not from our writer, of which it uses nothing: what the writer gets wrong shows here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from tapeout.errors import PackageError
from tapeout.exporters import huggingface
from tapeout.models.decoder import ConfigReader
from tapeout.models.families import family
from tapeout.quantize import QuantTensor
from tapeout.quantize.scheme import E2M1, E4M3, E4M3_ONE
from tapeout.quantize.tensor import ScaleCodes, pack
from tapeout.targets import served
from tapeout.validate import primitives, reference
from tapeout.validate.session import Session

if TYPE_CHECKING:
    import torch

    Inputs = Callable[[torch.Tensor], torch.Tensor]

_ALGOS = (
    "W8A16",
    "W8A8_SQ_PER_CHANNEL",
    "W4A16_AWQ",
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "W4A16_NVFP4",
    "NVFP4",
)
_FLOAT4 = ("W4A16_NVFP4", "NVFP4")
_CALIBRATED = ("W8A8_SQ_PER_CHANNEL", "FP8", "NVFP4")  # whose inputs have one step a matrix
_ROUNDING = (*_CALIBRATED, "FP8_PER_CHANNEL_PER_TOKEN")
# TensorRT-LLM loads these as one matrix and asks them for no pre_quant_scale; of any other it is read whatever the file has.
_JOINED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
_E4M3_MAX = 448.0


class Reader:
    """Reads the weights of a directory.

    Args:
        said: ``quantization_config``.
        tensors: of the files by name, torch tensors.
    """

    def __init__(self, said: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        self._said, self._tensors = said, tensors
        self._layers: Mapping[str, Any] | None = None
        if said.get("quant_algo") == "MIXED_PRECISION":
            self._layers = said.get("quantized_layers")
            if not self._layers:
                raise PackageError("quant_algo MIXED_PRECISION comes without quantized_layers.")

    def algo(self, base: str) -> str | None:
        """What the statement says of a module; None: its weight is a float."""
        if self._layers is not None:
            said: str | None = self._layers.get(base, {}).get("quant_algo")
        elif any(fnmatchcase(base, pattern) for pattern in self._said.get("ignore", ())):
            return None
        else:
            said = self._said.get("quant_algo")
        if said is not None and said not in _ALGOS:
            raise PackageError(f"{base} is said to be {said}; what is read: {', '.join(_ALGOS)}.")
        return said

    def _part(self, base: str, suffix: str, dtype: str, *shape: int) -> Any:
        """A tensor that must be there, of that type and shape."""
        name = f"{base}.{suffix}"
        if name not in self._tensors:
            raise PackageError(f"{name} is missing: a loader of {self.algo(base)} asks for it.")
        tensor = self._tensors[name]
        if str(tensor.dtype) != f"torch.{dtype}" or tuple(tensor.shape) != shape:
            raise PackageError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} where torch.{dtype} {list(shape)} is expected."
            )
        return tensor

    def _weight(self, base: str) -> tuple[str, Any] | None:
        """The algorithm and the stored weight; None: it is a float. What the files hold must be what they say."""
        name = f"{base}.weight"
        if name not in self._tensors:
            return None
        weight = self._tensors[name]
        algo = self.algo(base) if weight.dim() == 2 else None
        if (weight.itemsize == 1) != (algo is not None):
            raise PackageError(
                f"{name} is {weight.dtype}, and the statement says of it {algo or 'that it is excluded'}."
            )
        return None if algo is None else (algo, weight)

    def _pre_scale(self, algo: str, base: str, into: int) -> Any:
        """What inputs are multiplied by first, float32 [in]; None: nothing."""
        needed = algo == "W4A16_AWQ" and not any(base.rpartition(".")[2] in names for names in _JOINED[:2])
        if not needed and f"{base}.pre_quant_scale" not in self._tensors:
            return None
        return self._part(base, "pre_quant_scale", "float16", into).float()

    def _group(self, base: str, into: int) -> int:
        entry = self._said if self._layers is None else self._layers[base]
        group = entry.get("group_size")
        if not isinstance(group, int) or into % group:
            raise PackageError(f"{base} has rows of {into} and the group_size {group}.")
        return group

    def _levels(self, algo: str, base: str, weight: Any) -> Any:
        """What the stored bits are before their scales, float32 [out, in]."""
        import torch

        if algo in ("W8A16", "W8A8_SQ_PER_CHANNEL", "FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
            out, into = weight.shape
            kind = "float8_e4m3fn" if algo.startswith("FP8") else "int8"
            return self._part(base, "weight", kind, out, into).float()
        rows, columns = weight.shape
        low, high = (
            (half & 15).to(torch.int32)
            for half in (self._part(base, "weight", "uint8", rows, columns), weight >> 4)
        )
        if algo == "W4A16_AWQ":  # two rows a byte
            both = torch.stack((low, high), 1).reshape(2 * rows, columns)
            return (((both + 8) & 15) - 8).float()
        both = torch.stack((low, high), 2).reshape(rows, 2 * columns)
        exponent, half_step = (both >> 1) & 3, (both & 1) / 2
        size = torch.where(
            exponent == 0, half_step, (1 + half_step) * torch.exp2((exponent - 1).clamp(min=0).float())
        )
        return torch.where(both >= 8, -size, size)

    def _scale(self, algo: str, base: str, out: int, into: int) -> Any:
        """The scale of each group, float32 [out, groups]."""
        if algo == "W4A16_AWQ":
            return self._part(base, "weight_scale", "float32", out, into // self._group(base, into))
        if algo in _FLOAT4:
            whole = self._alike(base, "weight_scale_2")
            group = self._group(base, into)
            return self._part(base, "weight_scale", "float8_e4m3fn", out, into // group).float() * whole
        if algo == "FP8":
            return self._alike(base, "weight_scale").expand(out, 1)
        return self._part(base, "weight_scale", "float32", out)[:, None]

    def _alike(self, base: str, suffix: str) -> Any:
        """The one scale of a matrix, float32 []; what is loaded with others as one must have the same as they.

        Of several a server takes the largest: of weights it then rounds the codes once more, or leaves them wrong.
        """
        found = self._part(base, suffix, "float32")
        place, _, last = base.rpartition(".")
        for together in (each for each in _JOINED if last in each):
            for other in (f"{place}.{name}" for name in together):
                if f"{other}.weight" in self._tensors and not bool(
                    found == self._part(other, suffix, "float32")
                ):
                    raise PackageError(
                        f"{base}.{suffix} is {found.item():.9g} and that of {other} {self._tensors[f'{other}.{suffix}'].item():.9g}: "
                        "servers load them as one matrix, under the larger."
                    )
        return found

    def weight(self, base: str) -> npt.NDArray[np.float32] | None:
        """The weight that a loader multiplies with, float32 [out, in]; None: it is a float.

        A pre_quant_scale is in it where inputs are not rounded afterwards.
        """
        found = self._weight(base)
        if found is None:
            return None
        algo, stored = found
        weight = self._levels(algo, base, stored)
        out, into = weight.shape
        scale = self._scale(algo, base, out, into)
        weight *= scale.repeat_interleave(into // scale.shape[1], 1)
        pre_scale = self._pre_scale(algo, base, into)
        if pre_scale is not None and algo not in _ROUNDING:
            weight *= pre_scale
        done: npt.NDArray[np.float32] = weight.numpy()
        return done

    def inputs(self, base: str) -> Inputs | None:
        """What is done to the inputs of a module before it multiplies; None: nothing."""
        found = self._weight(base)
        if found is None or found[0] not in _ROUNDING:
            return None
        algo, stored = found
        pre_scale = self._pre_scale(algo, base, stored.shape[1])
        if algo == "FP8_PER_CHANNEL_PER_TOKEN":
            return _scaled(_float8_a_token, pre_scale)
        how = {"W8A8_SQ_PER_CHANNEL": _int8, "FP8": _float8, "NVFP4": _float4}[algo]
        step = self._alike(base, "input_scale").item()
        if not 0 < step < float("inf"):
            raise PackageError(f"{base}.input_scale is {step}; a step is more than 0.")
        return _scaled(partial(how, step=step), pre_scale)

    def codes(self, base: str) -> QuantTensor | None:
        """The codes of a module's weight as a store has them; None: it is a float."""
        found = self._weight(base)
        if found is None:
            return None
        algo, stored = found
        step, kept = None, None
        if algo in _CALIBRATED:
            step = np.float32(self._part(base, "input_scale", "float32").item())
        if algo in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
            bits, codebook = 8, E4M3
            codes = self._bytes(stored)
        elif algo in _FLOAT4:
            bits, codebook, pairs = 4, E2M1, self._bytes(stored)
            codes = np.stack((pairs & 15, pairs >> 4), 2).reshape(len(pairs), -1)
        elif algo == "W4A16_AWQ":
            bits, pairs = 4, self._bytes(stored)
            codes = np.stack((pairs & 15, pairs >> 4), 1).reshape(-1, pairs.shape[1]) ^ np.uint8(8)
            codebook = np.arange(-8, 8, dtype=np.float32)
        else:
            bits, codebook = 8, np.arange(-128, 128, dtype=np.float32)
            codes = self._bytes(stored) ^ np.uint8(128)
        out, into = codes.shape
        scale = self._scale(algo, base, out, into).numpy()
        if algo in _FLOAT4:
            block = np.array([self._tensors[f"{base}.weight_scale_2"].item()], np.float32)
            kept = ScaleCodes(self._bytes(self._tensors[f"{base}.weight_scale"]), E4M3, block, scale.size)
        elif algo == "FP8":
            ones = np.full((out, 1), E4M3_ONE, np.uint8)
            kept = ScaleCodes(ones, E4M3, scale[:1, 0].copy(), scale.size)
        elif np.array_equal(half := scale.astype(np.float16), scale):
            scale = half
        pre_scale = self._pre_scale(algo, base, into)
        if pre_scale is not None and bool((pre_scale != 1).any()):
            raise PackageError(
                f"{base}.pre_quant_scale is not 1, which no store of codes has beside a weight."
            )
        return QuantTensor(
            packed=pack(np.ascontiguousarray(codes), bits),
            bits=bits,
            in_features=into,
            scale=scale,
            group=into // scale.shape[1],
            codebook=codebook,
            scale_codes=kept,
            input_scale=step,
        )

    @staticmethod
    def _bytes(tensor: Any) -> npt.NDArray[np.uint8]:
        import torch

        raw: npt.NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
        return raw


def _scaled(how: Inputs, pre_scale: torch.Tensor | None) -> Inputs:
    """The same of inputs that are multiplied first."""
    return how if pre_scale is None else lambda x: how(x * pre_scale)


def _int8(x: torch.Tensor, step: float) -> torch.Tensor:
    """By the one step of the file."""
    return (x / step).round().clip(-128, 127) * step


def _float8(x: torch.Tensor, step: float) -> torch.Tensor:
    """By the one step of the file, to nearest even."""
    import torch

    return (x / step).clip(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float() * step


def _float4(x: torch.Tensor, step: float) -> torch.Tensor:
    """16 by their own float8 in steps of the file's, to the nearest of the eight sizes; halfway goes to the even code."""
    import torch

    parts = x.reshape(*x.shape[:-1], -1, 16)
    largest = parts.abs().amax(-1, keepdim=True)
    own = (largest / (6.0 * step)).clip(max=_E4M3_MAX).to(torch.float8_e4m3fn).float() * step
    sizes = torch.tensor(E2M1[:8], device=x.device)
    middles = (sizes[1:] + sizes[:-1]) / 2
    scaled = torch.where(own > 0, parts / own, 0.0)
    below = torch.bucketize(scaled.abs(), middles)  # a middle itself counts to the lower
    codes = below + ((below % 2 == 1) & (scaled.abs() == middles[below.clip(max=6)]))
    return (sizes[codes].copysign(scaled) * own).reshape(x.shape)


def _float8_a_token(x: torch.Tensor) -> torch.Tensor:
    """Each token by its own step, the largest magnitude / 448 and no less than 1 / (448 · 512), to nearest even."""
    import torch

    own = x.abs().amax(-1, keepdim=True).div(_E4M3_MAX).clamp(min=1 / (_E4M3_MAX * 512))
    return (x / own).clip(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float() * own


def open_session(
    directory: str, inputs: bool = True, threads: int | None = None, device: Literal["cpu"] | None = None
) -> Session:
    """Load a directory; called in a worker process.

    Where torch sees a GPU, onto it: by TensorRT-LLM or vLLM if one is installed, else by transformers with kernels of ours, which keep
    no cache in float8. Elsewhere in float32 on the CPU.

    Args:
        directory: with config.json, hf_quant_config.json, safetensors files and the tokenizer.
        inputs: whether inputs, and keys and values, are rounded where the directory says so.
        threads: of torch; None: its own choice.
        device: ``cpu``: there, whatever else is here.

    Raises:
        MissingToolchain: transformers is absent. PackageError: the files are not what they say.
    """
    path = Path(directory)
    said = _statement(path)
    if device is None and not said.get("kv_cache_scheme"):
        reference.prepare(threads)
        if there := served.on_gpu(path, ("tensorrt_llm", "vllm")):
            return there

    def prepare(network: Any) -> None:
        if inputs and said:
            _round_inputs(network, path, said)
        if inputs and said.get("kv_cache_scheme"):
            reference.round_cache(network, "kv-fp8")

    session = reference.open_weights(
        path, huggingface.read_weights(path, Reader), threads=threads, then=prepare
    )
    session.facts = replace(session.facts, emulated=True)
    return session


def _round_inputs(network: Any, path: Path, said: Mapping[str, Any]) -> None:
    """Let linear layers do to their inputs what a loader's kernels do."""
    import torch

    with ExitStack() as stack:
        tensors = huggingface.Tensors(path, stack)
        reader = Reader(said, tensors)
        bases = (name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
        rounded = {base: how for base in bases if (how := reader.inputs(base))}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and (how := rounded.pop(name, None)):
            module.register_forward_pre_hook(lambda _, args, f=how: (f(args[0]), *args[1:]))
    if rounded:
        raise PackageError(f"transformers has no linear layers {', '.join(sorted(rounded)[:3])}.")


def _statement(path: Path) -> dict[str, Any]:
    """``quantization_config``, which must say what ``hf_quant_config.json`` says; nothing: all weights are floats."""
    try:
        inline: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8")).get(
            "quantization_config", {}
        )
        beside = path / "hf_quant_config.json"
        if not inline and not beside.exists():
            return {}
        apart = json.loads(beside.read_text(encoding="utf-8"))["quantization"]
    except (OSError, ValueError, KeyError) as error:
        raise PackageError(f"{path} does not say how it is quantized: {error!r}.") from error
    cache = inline.get("kv_cache_scheme")
    same = {
        "quant_algo": inline.get("quant_algo"),
        "exclude_modules": inline.get("ignore"),
        "kv_cache_quant_algo": "FP8"
        if cache and (cache["type"], cache["num_bits"]) == ("float", 8)
        else None,
        "quantized_layers": inline.get("quantized_layers"),
        "group_size": inline.get("group_size"),
    }
    if differs := [key for key, value in same.items() if apart.get(key) != value]:
        raise PackageError(
            f"{path / 'config.json'} and hf_quant_config.json differ in {', '.join(differs)}: servers read one or the other."
        )
    return inline


def open_traced(directory: str) -> primitives.Primitives:
    """What the files mean in our graph, each primitive's value in sight; called in a worker process."""
    path = Path(directory)
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config = family(raw["model_type"]).config(ConfigReader(raw))
    weights: dict[str, npt.NDArray[np.float32]] = dict(huggingface.read_weights(path, Reader))
    return primitives.open_weights(config, lambda name: weights[name], path)
