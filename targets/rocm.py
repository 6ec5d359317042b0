"""AMD GPUs under ROCm: directories that vLLM and transformers load."""

# Annotations are values here: the fields are the target's flags.
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt

from tapeout.exporters import Artifact, Carry, huggingface
from tapeout.models import DecoderConfig
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Memory, Progress, Target, check_flags, serving
from tapeout.targets.huggingface import why_not_loaded
from tapeout.targets.iree import Iree
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

# The formats that know a flag.
_FLAGS = {
    "max_shard_size": ("compressed-tensors", "bitsandbytes"),
    **dict.fromkeys(("arch", "context", "prefill_chunk"), ("iree",)),
}


@dataclass(frozen=True)
class Rocm:
    """AMD GPUs with vLLM or transformers on ROCm.

    Attributes:
        format: How codes are packed: compressed-tensors, which vLLM and transformers load; bitsandbytes (NF4); or iree, a module that is
            compiled ahead of time.
        max_shard_size: Of directories: split the weights into files of at most this size (500M, 2G).
        arch: Of iree: the chip that the module is compiled for (gfx90a, gfx942, gfx950, gfx1100, gfx1201).
        context: Of iree: most tokens of a sequence, for which the caches are laid out. Default: the model's own, 4096 at most.
        prefill_chunk: Of iree: tokens of a prompt that one call takes.
    """

    format: Literal["compressed-tensors", "bitsandbytes", "iree"] = "compressed-tensors"
    max_shard_size: str = "5G"
    arch: str = "gfx942"
    context: int | None = None
    prefill_chunk: int = 128

    name: ClassVar[str] = "rocm"
    summary: ClassVar[str] = (
        "AMD GPUs, through a directory that vLLM and transformers load, or a compiled module."
    )

    def __post_init__(self) -> None:
        """TapeoutError for a size that is none, a chip that is not known, or a flag of another format."""
        check_flags(self, _FLAGS)
        parse_size(self.max_shard_size)
        _ = self._compiled

    @property
    def _compiled(self) -> Target | None:
        """The formats that are no directories for the loaders of Hugging Face's."""
        return Iree(self.arch, self.context, self.prefill_chunk) if self.format == "iree" else None

    @property
    def _directory(self) -> huggingface.Format:
        return cast(huggingface.Format, self.format)

    @property
    def arithmetic(self) -> Arithmetic:
        """What the runtime does to the inputs of quantized matmuls."""
        return self._compiled.arithmetic if self._compiled else "scheme"

    @property
    def cache(self) -> KvCache:
        """What keys and values are kept in."""
        return self._compiled.cache if self._compiled else "kv-f16"

    @property
    def needs(self) -> str:
        """The format's runtime."""
        return self._compiled.needs if self._compiled else "ROCm, with vLLM or transformers"

    @property
    def default_scheme(self) -> str:
        """What a model is quantized as where nobody says."""
        return "nf4" if self.format == "bitsandbytes" else "int4-g32"

    def carries(self, scheme: Scheme) -> Carry:
        """As the format holds it, and its loaders take it."""
        if self._compiled:
            return self._compiled.carries(scheme)
        return huggingface.carries(self._directory, scheme)

    def kv_caches(self, head_dim: int | None = None) -> tuple[KvCache, ...]:
        """Half floats."""
        if self._compiled:
            return self._compiled.kv_caches(head_dim)
        return ("kv-f16",)

    def memory(self, config: DecoderConfig, context: int) -> Memory:
        """Keys and values of every token in half floats, and a chunk's work."""
        if self._compiled:
            return self._compiled.memory(config, context)
        return serving.memory(config, context, 16)

    def missing(self) -> str | None:
        """Whether the format's library and transformers are here."""
        if self._compiled:
            return self._compiled.missing()
        library = self.format.replace("-", "_")
        absent = [
            name for name in ("torch", "transformers", library) if importlib.util.find_spec(name) is None
        ]
        return f"{', '.join(absent)} is not installed: pip install 'tapeout[rocm]'." if absent else None

    def export(self, quant: Quantized, out: Path, progress: Progress | None = None) -> Artifact:
        """Write the directory."""
        if self._compiled:
            return self._compiled.export(quant, out, progress)
        size = parse_size(self.max_shard_size)
        artifact = huggingface.write(quant, out, self._directory, max_shard_bytes=size, progress=progress)
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
        if self._compiled:
            return self._compiled.session(artifact)
        return SessionSpec(_OPEN, {"directory": str(artifact.directory)}, environment=serving.QUIET)

    def read_codes(
        self, artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """Through safetensors, and unpacked by the format's library."""
        if self._compiled:
            return self._compiled.read_codes(artifact, quant)
        return huggingface.read_codes(artifact, quant)

    def lowerings(self, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        """The directory with inputs left alone, and as it is deployed."""
        if self._compiled:
            return self._compiled.lowerings(artifact, quant, scratch)
        values = serving.float_values(artifact, quant)
        deployed = self.session(artifact)
        rounded = any(scheme.activations for scheme in quant.schemes.values())
        exact = replace(deployed, arguments={**deployed.arguments, "inputs": not rounded, "device": "cpu"})
        return [
            Lowering("weights", exact, "max", _WEIGHTS_DERIVATION, 1e-4, values=values),
            Lowering("runtime", deployed, "kl", _RUNTIME_DERIVATION),
        ]

    def traced(self, artifact: Artifact, scratch: Path) -> SessionSpec | None:
        """What the files mean, in our own graph."""
        if self._compiled:
            return self._compiled.traced(artifact, scratch)
        return SessionSpec(_TRACED, {"directory": str(artifact.directory)}, environment=serving.QUIET)

    def card(self, artifact: Artifact) -> str:
        """How to serve it."""
        if self._compiled:
            return self._compiled.card(artifact)
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
