"""A target with no device: for tests, and as the worked example of ``docs/add-a-target.md``.

Its artifact is ``exporters/plain.py``'s; its runtime puts what the files hold into transformers and runs that.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError
from tapeout.exporters import Artifact, Carry, plain
from tapeout.models import DecoderConfig
from tapeout.models.decoder import ConfigReader
from tapeout.models.families import family
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Memory, Progress, graph_width
from tapeout.validate import primitives
from tapeout.validate.reference import Reference, open_weights
from tapeout.validate.session import Arithmetic, KvCache, Lowering, SessionSpec

_FACTORY = "tapeout.targets.null:open_session"
_TRACED = "tapeout.targets.null:open_traced"


@dataclass(frozen=True)
class Null:
    """No device at all.

    Attributes:
        threads: Threads of the runtime. Default: torch's own choice.
    """

    threads: int | None = None

    name: ClassVar[str] = "null"
    arithmetic: ClassVar[Arithmetic] = "float32"
    cache: ClassVar[KvCache] = "kv-f32"
    summary: ClassVar[str] = "No device: canonical codes in safetensors, run by transformers."
    needs: ClassVar[str] = "transformers and torch"
    runtimes: ClassVar[tuple[str, ...]] = ("transformers",)

    def carries(self, scheme: Scheme) -> Carry:
        """Everything that has canonical codes."""
        return plain.carries(scheme)

    def kv_caches(self, head_dim: int | None = None) -> tuple[KvCache, ...]:
        """Floats."""
        return ("kv-f32",)

    def memory(self, config: DecoderConfig, context: int) -> Memory:
        """Keys and values of every head; a whole prompt is computed at once, scores among it."""
        width = config.num_kv_heads * (config.head_dim + config.value_dim)
        tokens = sum(min(context, config.window(layer) or context) for layer in range(config.num_layers))
        scores = 2 * config.num_heads * context + graph_width(config) + config.vocab_size
        return Memory(4 * width * tokens, 4 * context * scores)

    def missing(self) -> str | None:
        """Whether torch and transformers are here."""
        absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} is not installed: pip install 'tapeout[reference]'." if absent else None

    def export(self, quant: Quantized, out: Path, progress: Progress | None = None) -> Artifact:
        """Write one file a tensor; ModelError for what is no decoder."""
        if not isinstance(quant.model.config, DecoderConfig):
            raise ModelError(
                f"{quant.model.name} is {quant.model.kind}, which target null does not run: use target cpu with --format onnx."
            )
        _ = quant.model.decoder  # ModelError of what is no decoder of a family that has a file
        artifact = plain.write(quant, out)
        if progress:
            progress("export", 1, 1)
        return artifact

    def session(self, artifact: Artifact) -> SessionSpec:
        """What the files hold, in float32."""
        return SessionSpec(_FACTORY, {"directory": str(artifact.directory), "threads": self.threads})

    def read_codes(
        self, artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """Through the safetensors library."""
        return plain.read_codes(artifact, quant)

    def lowerings(self, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        """Float32 on both sides, by the same library: nothing but the weights can differ."""
        why = "The same operations in float32 on the same machine: rounding of sums alone, far below 1e-4 of the logits' spread."
        return [
            Lowering("weights", self.session(artifact), "max", why, 1e-4),
            Lowering("runtime", self.session(artifact), "kl", why),
        ]

    def traced(self, artifact: Artifact, scratch: Path) -> SessionSpec:
        """What the files hold, in our own graph."""
        return SessionSpec(_TRACED, {"directory": str(artifact.directory)})

    def card(self, artifact: Artifact) -> str:
        """The one command that runs it."""
        return "```\ntapeout run . --prompt TEXT\n```"


def open_session(directory: str, threads: int | None = None) -> Reference:
    """Run what the files of ``directory`` hold on transformers; called in a worker process."""
    return open_weights(Path(directory), plain.read_weights(Path(directory)), threads=threads)


def open_traced(directory: str) -> primitives.Primitives:
    """The same in our graph, each primitive's value in sight; called in a worker process."""
    raw = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    config = family(raw["model_type"]).config(ConfigReader(raw))
    weights = dict(plain.read_weights(Path(directory)))
    return primitives.open_weights(config, lambda name: weights[name], Path(directory))
