"""CPUs, through GGUF and llama.cpp."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from tapeout.errors import TapeoutError, nearest
from tapeout.exporters import Artifact, Carry, gguf
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Progress
from tapeout.validate.session import KvCache, Lowering, SessionSpec

_FACTORY = "tapeout.targets.llama_cpp:open_session"

_WEIGHTS_LIMIT = 1e-4
_WEIGHTS_DERIVATION = (
    "The same codes as float32, cache and all: sums of K products taken in another order differ by about sqrt(K) 2^-24 of their "
    "size, below 1e-5 for K = 16384; ten times that for the layers they pass through."
)
_RUNTIME_DERIVATION = (
    "llama.cpp rounds the inputs of quantized matmuls to int8 in blocks of 32 (K types: 256). The reference with that same rounding predicts what "
    "it costs; the device may lose twice that, and 5e-5 nats for its float types."
)
_CACHE_DERIVATION = " The reference's own cache is rounded too ({}, and queries to int8): what is left is the inputs' rounding, and the codes it changes."
_CACHE_BLOCK = 32  # elements of a head that share a scale, in q8_0 and q4_0
_CACHE_TYPES: dict[KvCache, str] = {"kv-f16": "f16", "kv-int8": "q8_0", "kv-int4": "q4_0"}


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
        kv_cache: What keys and values are kept in: half floats, or codes of 8 or 4 bits, 32 to a scale.
    """

    format: Literal["gguf"] = "gguf"
    threads: int | None = None
    context: int | None = None
    sliding_window: Literal["carry", "clamp"] = "carry"
    max_shard_size: str | None = None
    kv_cache: Literal["kv-f16", "kv-int8", "kv-int4"] = "kv-f16"

    name: ClassVar[str] = "cpu"
    arithmetic: ClassVar[Literal["float32", "ggml"]] = "ggml"
    summary: ClassVar[str] = "Intel, AMD and Arm CPUs, through GGUF on llama.cpp."
    needs: ClassVar[str] = "llama.cpp, or llama-cpp-python 0.3.36 or newer"

    def __post_init__(self) -> None:
        """TapeoutError for a cache that llama.cpp does not have."""
        if self.kv_cache not in _CACHE_TYPES:
            raise TapeoutError(
                f"'{self.kv_cache}' is not a cache of target cpu{nearest(self.kv_cache, _CACHE_TYPES)}."
            )

    @classmethod
    def carries(cls, scheme: Scheme) -> Carry:
        """As GGUF's block types carry it."""
        return gguf.carries(scheme)

    @classmethod
    def kv_caches(cls, head_dim: int | None = None) -> tuple[KvCache, ...]:
        """Codes stand in blocks of 32 along a head."""
        whole = head_dim is None or head_dim % _CACHE_BLOCK == 0
        return tuple(kind for kind in _CACHE_TYPES if whole or kind == "kv-f16")

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
        """The file as it is deployed: llama.cpp's defaults, but for the cache that was chosen."""
        return self._open(artifact, kv_cache=self.kv_cache)

    def read_codes(
        self, artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """Through gguf.GGUFReader."""
        return gguf.read_codes(artifact, quant)

    def lowerings(self, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        """The same codes as a float32 twin, and the shipped file with the runtime's int8 activations explained."""
        twin = gguf.write(quant, scratch / "twin", sliding_window=self.sliding_window, as_float32=True)
        kind = "" if self.kv_cache == "kv-f16" else _CACHE_DERIVATION.format(_CACHE_TYPES[self.kv_cache])
        return [
            Lowering("weights", self._exact(twin, artifact), "max", _WEIGHTS_DERIVATION, _WEIGHTS_LIMIT),
            Lowering("runtime", self.session(artifact), "kl", _RUNTIME_DERIVATION + kind),
        ]

    def truncated(self, artifact: Artifact, quant: Quantized, layers: int, scratch: Path) -> SessionSpec:
        """A float32 twin of the first layers."""
        twin = gguf.write(quant, scratch, sliding_window=self.sliding_window, as_float32=True, layers=layers)
        return self._exact(twin, artifact)

    def card(self, artifact: Artifact) -> str:
        """Commands of llama.cpp's own tools."""
        flags = f"-m artifact/{artifact.files[0]} -c {artifact.context}"
        if self.kv_cache != "kv-f16":
            kind = _CACHE_TYPES[self.kv_cache]
            flags += f" -fa on -ctk {kind} -ctv {kind}"
        return f"```\nllama-cli {flags}\nllama-server {flags}\ntapeout run . --prompt TEXT\n```"

    def _open(self, artifact: Artifact, **settings: Any) -> SessionSpec:
        given = {
            "model": str(artifact.directory / artifact.files[0]),
            "context": artifact.context,
            "threads": self.threads,
        }
        return SessionSpec(_FACTORY, given | settings)

    def _exact(self, twin: Artifact, artifact: Artifact) -> SessionSpec:
        """Float32 everywhere, so that nothing is left but the lowered numbers."""
        return self._open(replace(twin, context=artifact.context), kv_cache="kv-f32", flash_attention=False)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``500M`` or ``2G`` (powers of 1000, as llama.cpp's split tool counts)."""
    found = re.fullmatch(r"(\d+)([MG])", text.strip().upper())
    if not found or not int(found[1]):
        raise TapeoutError(f"'{text}' is not a size; write 500M or 2G.")
    return int(found[1]) * {"M": 10**6, "G": 10**9}[found[2]]
