"""The format ``modelopt`` of target ``nvidia``: the unified Hugging Face checkpoint of TensorRT-LLM, vLLM and SGLang."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from tapeout.errors import SchemeError
from tapeout.exporters import Artifact, Carry, huggingface
from tapeout.models import DecoderConfig
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Memory, Progress, serving
from tapeout.targets.local import parse_size
from tapeout.targets.modelopt_loader import Reader
from tapeout.validate.session import KV_BITS, Arithmetic, KvCache, Lowering, SessionSpec

if TYPE_CHECKING:
    from tapeout.targets.nvidia import Nvidia

_OPEN = "tapeout.targets.modelopt_loader:open_session"
_TRACED = "tapeout.targets.modelopt_loader:open_traced"

_CHECKED = (
    "read by a loader of our own and run on transformers in float32 on a CPU, inputs rounded as the servers' kernels round them; "
    "not run on NVIDIA hardware, nor by a server"
)
_WEIGHTS_DERIVATION = (
    "The same operations in float32 by the same library, on weights that a second reader of the format unpacks; embeddings and head of "
    "the reference in float16, as the files have them: rounding of sums alone, far below 1e-4 of the logits' spread."
)
_RUNTIME_DERIVATION = (
    "Inputs are rounded as the format says: to int8 and float8 by one step a matrix, to float8 by one a token, to float4 by one for 16; "
    "keys and values to float8 where the files say so. The reference with that same rounding predicts what it costs; the device may "
    "lose twice that, and 5e-5 nats."
)
# What loads each kind of matrix, by the servers' own sources of 2026: TensorRT-LLM's linear.py, vLLM's and SGLang's modelopt files.
_LOADED_BY = {
    "W8A16": ("TensorRT-LLM",),
    "W4A16_AWQ": ("TensorRT-LLM",),
    "W8A8_SQ_PER_CHANNEL": (),
    "FP8_PER_CHANNEL_PER_TOKEN": ("TensorRT-LLM", "vLLM"),
    "FP8": ("TensorRT-LLM", "vLLM", "SGLang"),
    "W4A16_NVFP4": ("TensorRT-LLM", "vLLM"),
    "NVFP4": ("TensorRT-LLM", "vLLM", "SGLang"),
    "float": ("TensorRT-LLM", "vLLM", "SGLang"),
}


class ModelOpt:
    """See ``nvidia.Road``."""

    default_scheme: ClassVar[str] = "int4-g128"
    arithmetic: ClassVar[Arithmetic] = "modelopt"
    cache: ClassVar[KvCache] = "kv-f16"
    needs: ClassVar[str] = "an NVIDIA GPU, with TensorRT-LLM, vLLM or SGLang"
    runtimes: ClassVar[tuple[str, ...]] = ("tensorrt-llm", "vllm", "sglang")
    flags: ClassVar[tuple[str, ...]] = ("max_shard_size", "kv_cache")
    checks: ClassVar[tuple[str, ...]] = ("served.py",)

    @staticmethod
    def carries(scheme: Scheme) -> Carry:
        """As the format holds it, and its loaders take it."""
        return huggingface.carries("modelopt", scheme)

    @staticmethod
    def missing() -> str | None:
        """Whether what runs the check is here."""
        absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} is not installed: pip install 'tapeout[nvidia]'." if absent else None

    @staticmethod
    def memory(device: Nvidia, config: DecoderConfig, context: int) -> Memory:
        """Keys and values of every token, and a chunk's work."""
        return serving.memory(config, context, KV_BITS[device.cache])

    @staticmethod
    def export(device: Nvidia, quant: Quantized, out: Path, progress: Progress | None) -> Artifact:
        """Write the directory.

        Raises:
            SchemeError: a float8 cache of a model that has no codes, of which no file says how it is quantized.
        """
        rounded = device.cache == "kv-fp8"
        if rounded and all(scheme.kind == "none" for scheme in quant.schemes.values()):
            raise SchemeError(
                f"{quant.model.name} is not quantized, and vLLM reads kv_cache_quant_algo beside a quant_algo alone. "
                "What fits: --kv-cache-dtype fp8 of the server."
            )
        artifact = huggingface.write(
            quant,
            out,
            "modelopt",
            max_shard_bytes=parse_size(device.max_shard_size),
            kv_cache="fp8" if rounded else None,
            progress=progress,
        )
        return replace(artifact, notes=(*artifact.notes, *_notes(artifact), _CHECKED))

    @staticmethod
    def session(device: Nvidia, artifact: Artifact) -> SessionSpec:
        """The directory on transformers, on a CPU."""
        return SessionSpec(_OPEN, {"directory": str(artifact.directory)}, environment=serving.QUIET)

    @staticmethod
    def read_codes(
        artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """Through safetensors, by a reader that shares nothing with the writer."""
        return huggingface.read_codes(artifact, quant, Reader)

    @staticmethod
    def lowerings(device: Nvidia, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        """The directory with inputs left alone, and as it is deployed."""
        deployed = ModelOpt.session(device, artifact)
        exact = replace(deployed, arguments={**deployed.arguments, "inputs": False, "device": "cpu"})
        values = serving.float_values(artifact, quant)
        return [
            Lowering("weights", exact, "max", _WEIGHTS_DERIVATION, 1e-4, values=values),
            Lowering("runtime", deployed, "kl", _RUNTIME_DERIVATION),
        ]

    @staticmethod
    def traced(device: Nvidia, artifact: Artifact, scratch: Path) -> SessionSpec:
        """What the files mean, in our own graph."""
        return SessionSpec(_TRACED, {"directory": str(artifact.directory)}, environment=serving.QUIET)

    @staticmethod
    def card(device: Nvidia, artifact: Artifact) -> str:
        """How to serve it."""
        loaders = _loaders(artifact)
        how = serving.Served.of(artifact, kv_cache=device.kv_cache)
        ways = [serving.server(name, how) for name in loaders]
        if not loaders:
            ways = [
                "No server loads these matrices as one package: TensorRT-LLM's PyTorch backend, vLLM and SGLang have no kernel for "
                f"{', '.join(_algos(artifact))} of this format. For integers with inputs of int8 on NVIDIA GPUs, vLLM loads what "
                "`tapeout export rocm --scheme w8a8` writes."
            ]
        else:
            ways += [serving.unit(how, loaders[0]), serving.container(how, loaders[0])]
        return "\n\n".join([*ways, f"This package was {_CHECKED}."])


def _algos(artifact: Artifact) -> list[str]:
    """What its matrices are, sorted."""
    return sorted({kind for kind in artifact.containers.values() if kind in _LOADED_BY and kind != "float"})


def _loaders(artifact: Artifact) -> tuple[str, ...]:
    """Servers that load all of them. vLLM's and SGLang's mixtures are of 8-bit and 4-bit floats a tensor: not ours."""
    algos = _algos(artifact)
    found = [name for name in _LOADED_BY["float"] if all(name in _LOADED_BY[algo] for algo in algos)]
    return tuple(name for name in found if len(algos) < 2 or name == "TensorRT-LLM")


def _notes(artifact: Artifact) -> list[str]:
    algos = _algos(artifact)
    if not algos:
        return []
    loaders = _loaders(artifact)
    whom = f"is loaded by {', '.join(loaders)}" if loaders else "is loaded by no server that we know of"
    return [f"{', '.join(algos)} {whom} (from the sources of TensorRT-LLM, vLLM and SGLang)"]
