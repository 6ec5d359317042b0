"""The formats ``compressed-tensors`` and ``bitsandbytes``: directories that transformers and vLLM load."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from tapeout.exporters import Artifact, Carry, huggingface
from tapeout.models import DecoderConfig
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Memory, Progress, serving
from tapeout.targets.huggingface import why_not_loaded
from tapeout.targets.local import parse_size
from tapeout.validate.session import Arithmetic, KvCache, Lowering, SessionSpec

if TYPE_CHECKING:
    from tapeout.targets.rocm import Rocm

_OPEN = "tapeout.targets.huggingface:open_session"
_TRACED = "tapeout.targets.huggingface:open_traced"

_CHECKED = "checked on transformers in float32 on a CPU; not run on AMD hardware, nor by vLLM"
_WEIGHTS_DERIVATION = (
    "The same operations in float32 by the same library, on weights that the format's own library unpacks; embeddings and head of "
    "the reference in float16, as the files have them: rounding of sums alone, far below 1e-4 of the logits' spread."
)
_RUNTIME_DERIVATION = (
    "The directory as transformers runs it on a CPU in float32. Inputs are rounded to int8 where the scheme says so, by the library's "
    "own step; nothing else is rounded but embeddings and head, to float16: 2^-12 of themselves, an eighth of bfloat16's, which the "
    "floor of 5e-5 nats is made for."
)


class CompressedTensors:
    """See ``roads.Road``."""

    form: ClassVar[huggingface.Format] = "compressed-tensors"
    default_scheme: ClassVar[str] = "int4-g32"
    arithmetic: ClassVar[Arithmetic] = "scheme"
    cache: ClassVar[KvCache] = "kv-f16"
    needs: ClassVar[str] = "ROCm, with vLLM or transformers"
    runtimes: ClassVar[tuple[str, ...]] = ("vllm", "transformers")
    flags: ClassVar[tuple[str, ...]] = ("max_shard_size",)
    checks: ClassVar[tuple[str, ...]] = ("served.py", "transformers.py", "compressed_tensors.py")

    @classmethod
    def carries(cls, scheme: Scheme) -> Carry:
        """As the format holds it, and its loaders take it."""
        return huggingface.carries(cls.form, scheme)

    @classmethod
    def missing(cls) -> str | None:
        """Whether the format's library and transformers are here."""
        library = cls.form.replace("-", "_")
        absent = [
            name for name in ("torch", "transformers", library) if importlib.util.find_spec(name) is None
        ]
        return f"{', '.join(absent)} is not installed: pip install 'tapeout[rocm]'." if absent else None

    @classmethod
    def memory(cls, device: Rocm, config: DecoderConfig, context: int) -> Memory:
        """Keys and values of every token in half floats, and a chunk's work."""
        return serving.memory(config, context, 16)

    @classmethod
    def export(cls, device: Rocm, quant: Quantized, out: Path, progress: Progress | None) -> Artifact:
        """Write the directory."""
        size = parse_size(device.max_shard_size)
        artifact = huggingface.write(quant, out, cls.form, max_shard_bytes=size, progress=progress)
        why = why_not_loaded(out)
        unseen = f"{why}: its weights were unpacked by {cls.form} and put into transformers" if why else None
        rounded = any(scheme.activations for scheme in quant.schemes.values())
        if unseen and rounded:
            unseen += ", and the rounding of inputs was not run"
        return replace(artifact, notes=(*artifact.notes, *([unseen] if unseen else []), _CHECKED))

    @classmethod
    def session(cls, device: Rocm, artifact: Artifact) -> SessionSpec:
        """The directory on transformers, on a CPU; on a GPU where there is one."""
        return SessionSpec(_OPEN, {"directory": str(artifact.directory)}, environment=serving.QUIET)

    @classmethod
    def read_codes(
        cls, artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """Through safetensors, and unpacked by the format's library."""
        return huggingface.read_codes(artifact, quant)

    @classmethod
    def lowerings(cls, device: Rocm, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        """The directory with inputs left alone on a CPU, and as it is deployed."""
        deployed = cls.session(device, artifact)
        rounded = any(scheme.activations for scheme in quant.schemes.values())
        exact = replace(deployed, arguments={**deployed.arguments, "inputs": not rounded, "device": "cpu"})
        values = serving.float_values(artifact, quant)
        return [
            Lowering("weights", exact, "max", _WEIGHTS_DERIVATION, 1e-4, values=values),
            Lowering("runtime", deployed, "kl", _RUNTIME_DERIVATION),
        ]

    @classmethod
    def traced(cls, device: Rocm, artifact: Artifact, scratch: Path) -> SessionSpec:
        """What the files mean, in our own graph."""
        return SessionSpec(_TRACED, {"directory": str(artifact.directory)}, environment=serving.QUIET)

    @classmethod
    def card(cls, device: Rocm, artifact: Artifact) -> str:
        """How to serve it."""
        how = serving.Served.of(artifact)
        ways = [
            serving.server("vLLM", how),
            cls._transformers(how),
            serving.unit(how, "vLLM"),
            serving.container(how, "vLLM", rocm=True),
        ]
        return "\n\n".join([*ways, f"This package was {_CHECKED}."])

    @classmethod
    def _transformers(cls, how: serving.Served) -> str:
        return serving.transformers(how, f"transformers accelerate {cls.form}")


class Bitsandbytes(CompressedTensors):
    """See ``roads.Road``; of transformers alone."""

    form: ClassVar[huggingface.Format] = "bitsandbytes"
    default_scheme: ClassVar[str] = "nf4"
    checks: ClassVar[tuple[str, ...]] = ("transformers.py",)

    @classmethod
    def card(cls, device: Rocm, artifact: Artifact) -> str:
        """How to run it."""
        return f"{cls._transformers(serving.Served.of(artifact))}\n\nThis package was {_CHECKED}."
