"""AMD GPUs under ROCm: directories that vLLM and transformers load."""

# Annotations are values here: the fields are the target's flags.
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from tapeout.exporters import Artifact, Carry, huggingface
from tapeout.models import DecoderConfig
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Memory, Progress, serving
from tapeout.targets.huggingface import why_not_loaded
from tapeout.targets.local import parse_size
from tapeout.validate.session import Arithmetic, KvCache, Lowering, SessionSpec

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


@dataclass(frozen=True)
class Rocm:
    """AMD GPUs with vLLM or transformers on ROCm.

    Attributes:
        format: How codes are packed: compressed-tensors, which vLLM and transformers load, or bitsandbytes (NF4).
        max_shard_size: Split the weights into files of at most this size (500M, 2G).
    """

    format: Literal["compressed-tensors", "bitsandbytes"] = "compressed-tensors"
    max_shard_size: str = "5G"

    name: ClassVar[str] = "rocm"
    summary: ClassVar[str] = "AMD GPUs, through a directory that vLLM and transformers load."
    arithmetic: ClassVar[Arithmetic] = "scheme"
    cache: ClassVar[KvCache] = "kv-f16"
    needs: ClassVar[str] = "ROCm, with vLLM or transformers"

    def __post_init__(self) -> None:
        """TapeoutError for a size that is none."""
        parse_size(self.max_shard_size)

    @property
    def default_scheme(self) -> str:
        """What a model is quantized as where nobody says."""
        return "nf4" if self.format == "bitsandbytes" else "int4-g32"

    def carries(self, scheme: Scheme) -> Carry:
        """As the format holds it, and its loaders take it."""
        return huggingface.carries(self.format, scheme)

    def kv_caches(self, head_dim: int | None = None) -> tuple[KvCache, ...]:
        """Half floats."""
        return ("kv-f16",)

    def memory(self, config: DecoderConfig, context: int) -> Memory:
        """Keys and values of every token in half floats, and a chunk's work."""
        return serving.memory(config, context, 16)

    def missing(self) -> str | None:
        """Whether the format's library and transformers are here."""
        library = self.format.replace("-", "_")
        absent = [
            name for name in ("torch", "transformers", library) if importlib.util.find_spec(name) is None
        ]
        return f"{', '.join(absent)} is not installed: pip install 'tapeout[rocm]'." if absent else None

    def export(self, quant: Quantized, out: Path, progress: Progress | None = None) -> Artifact:
        """Write the directory."""
        size = parse_size(self.max_shard_size)
        artifact = huggingface.write(quant, out, self.format, max_shard_bytes=size, progress=progress)
        why = why_not_loaded(out)
        unseen = (
            f"{why}: its weights were unpacked by {self.format} and put into transformers" if why else None
        )
        rounded = any(scheme.activations for scheme in quant.schemes.values())
        if unseen and rounded:
            unseen += ", and the rounding of inputs was not run"
        return replace(artifact, notes=(*artifact.notes, *([unseen] if unseen else []), _CHECKED))

    def session(self, artifact: Artifact) -> SessionSpec:
        """The directory on transformers, on a CPU."""
        return SessionSpec(_OPEN, {"directory": str(artifact.directory)}, environment=serving.QUIET)

    def read_codes(
        self, artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """Through safetensors, and unpacked by the format's library."""
        return huggingface.read_codes(artifact, quant)

    def lowerings(self, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        """The directory with inputs left alone, and as it is deployed."""
        values = serving.float_values(artifact, quant)
        deployed = self.session(artifact)
        rounded = any(scheme.activations for scheme in quant.schemes.values())
        exact = replace(deployed, arguments={**deployed.arguments, "inputs": not rounded, "device": "cpu"})
        return [
            Lowering("weights", exact, "max", _WEIGHTS_DERIVATION, 1e-4, values=values),
            Lowering("runtime", deployed, "kl", _RUNTIME_DERIVATION),
        ]

    def traced(self, artifact: Artifact, scratch: Path) -> SessionSpec:
        """What the files mean, in our own graph."""
        return SessionSpec(_TRACED, {"directory": str(artifact.directory)}, environment=serving.QUIET)

    def card(self, artifact: Artifact) -> str:
        """How to serve it."""
        how = serving.Served.of(artifact)
        packages = f"transformers accelerate {self.format}"
        ways = [serving.transformers(how, packages)]
        if self.format != "bitsandbytes":
            ways = [
                serving.server("vLLM", how),
                *ways,
                serving.unit(how, "vLLM"),
                serving.container(how, "vLLM", rocm=True),
            ]
        return "\n\n".join([*ways, f"This package was {_CHECKED}."])
