"""CPUs, through GGUF and llama.cpp."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from tapeout.errors import TapeoutError
from tapeout.exporters import Artifact, Carry, gguf
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Progress
from tapeout.validate.session import Lowering, SessionSpec

_FACTORY = "tapeout.targets.llama_cpp:open_session"

_WEIGHTS_LIMIT = 1e-4
_WEIGHTS_DERIVATION = (
    "The same codes as float32, cache and all: sums of K products taken in another order differ by about sqrt(K) 2^-24 of their "
    "size, below 1e-5 for K = 16384; ten times that for the layers they pass through."
)
_GELU_DERIVATION = (
    f"{_WEIGHTS_DERIVATION} GELU comes from a table of float16: its input and its output are off by up to 2^-11 of themselves, in each of "
    "L layers, so logits by 2^-11 sqrt(2 L) of their deviation, and the largest of thousands by four times that."
)
_RUNTIME_DERIVATION = (
    "llama.cpp rounds the inputs of quantized matmuls to int8 in blocks of 32 (K types: 256). The reference with that same rounding predicts what "
    "it costs; the device may lose twice that, and 5e-5 nats for its float types."
)


@dataclass(frozen=True)
class Cpu:
    """Intel, AMD and Arm CPUs.

    Attributes:
        format: What the runtime loads.
        threads: Threads of the runtime. Default: as many as this process has cores.
        context: Longest context to run with, in tokens. Default: the model's own.
        sliding_window: Carry a sliding window exactly (by an architecture that only recent llama.cpp builds know), or
            clamp the context to the window (which any build runs).
        max_shard_size: Split the file into shards of at most this size (500M, 2G).
    """

    format: Literal["gguf"] = "gguf"
    threads: int | None = None
    context: int | None = None
    sliding_window: Literal["carry", "clamp"] = "carry"
    max_shard_size: str | None = None

    name: ClassVar[str] = "cpu"
    arithmetic: ClassVar[Literal["float32", "ggml"]] = "ggml"
    summary: ClassVar[str] = "Intel, AMD and Arm CPUs, through GGUF on llama.cpp."
    needs: ClassVar[str] = "llama.cpp, or llama-cpp-python 0.3.36 or newer"

    @classmethod
    def carries(cls, scheme: Scheme) -> Carry:
        """As GGUF's block types carry it."""
        return gguf.carries(scheme)

    @classmethod
    def missing(cls) -> str | None:
        """Whether llama-cpp-python and gguf are here."""
        absent = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} is not installed: pip install 'tapeout[cpu]'." if absent else None

    def export(self, quant: Quantized, out: Path, progress: Progress | None = None) -> Artifact:
        """Write one GGUF file, or its shards."""
        size = parse_size(self.max_shard_size) if self.max_shard_size else None
        artifact = gguf.write(
            quant, out, max_shard_bytes=size, sliding_window=self.sliding_window, progress=progress
        )
        return replace(artifact, context=min(self.context or artifact.context, artifact.context))

    def session(self, artifact: Artifact) -> SessionSpec:
        """The file as it is deployed: float16 cache, llama.cpp's defaults."""
        return self._open(artifact)

    def read_codes(
        self, artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """Through gguf.GGUFReader."""
        return gguf.read_codes(artifact, quant)

    def lowerings(self, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        """The same codes as a float32 twin, and the shipped file with the runtime's int8 activations explained."""
        twin = gguf.write(quant, scratch / "twin", sliding_window=self.sliding_window, as_float32=True)
        derivation, limit, config = _WEIGHTS_DERIVATION, _WEIGHTS_LIMIT, quant.model.config
        if config.hidden_act.startswith("gelu"):
            derivation, limit = _GELU_DERIVATION, 4 * 2**-11 * math.sqrt(2 * config.num_layers)
        return [
            Lowering("weights", self._exact(twin, artifact), "max", derivation, limit),
            Lowering("runtime", self._open(artifact), "kl", _RUNTIME_DERIVATION),
        ]

    def truncated(self, artifact: Artifact, quant: Quantized, layers: int, scratch: Path) -> SessionSpec:
        """A float32 twin of the first layers."""
        twin = gguf.write(quant, scratch, sliding_window=self.sliding_window, as_float32=True, layers=layers)
        return self._exact(twin, artifact)

    def card(self, artifact: Artifact) -> str:
        """Commands of llama.cpp's own tools."""
        file = f"artifact/{artifact.files[0]}"
        return (
            f"```\nllama-cli -m {file} -c {artifact.context}\n"
            f"llama-server -m {file} -c {artifact.context}\n"
            "tapeout run . --prompt TEXT\n```"
        )

    def _open(self, artifact: Artifact, **settings: Any) -> SessionSpec:
        given = {
            "model": str(artifact.directory / artifact.files[0]),
            "context": artifact.context,
            "threads": self.threads,
        }
        return SessionSpec(_FACTORY, given | settings)

    def _exact(self, twin: Artifact, artifact: Artifact) -> SessionSpec:
        """Float32 everywhere, so that nothing is left but the lowered numbers."""
        return self._open(replace(twin, context=artifact.context), kv="f32", flash_attention=False)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``500M`` or ``2G`` (powers of 1000, as llama.cpp's split tool counts)."""
    found = re.fullmatch(r"(\d+)([MG])", text.strip().upper())
    if not found or not int(found[1]):
        raise TapeoutError(f"'{text}' is not a size; write 500M or 2G.")
    return int(found[1]) * {"M": 10**6, "G": 10**9}[found[2]]
