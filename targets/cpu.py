"""CPUs, through GGUF and llama.cpp."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from tapeout.exporters import Artifact, Carry, gguf
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Progress, llama_cpp
from tapeout.validate.session import Lowering, SessionSpec

_FACTORY = "tapeout.targets.llama_cpp:open_session"


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
        return gguf.write(
            quant, out, max_shard_bytes=size, sliding_window=self.sliding_window, progress=progress
        )

    def session(self, artifact: Artifact) -> SessionSpec:
        """The file as it is deployed: float16 cache, llama.cpp's defaults."""
        return self._open(artifact)

    def read_codes(
        self, artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """Through gguf.GGUFReader."""
        return gguf.read_codes(artifact, quant)
