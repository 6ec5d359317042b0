"""CPUs: through GGUF on llama.cpp, or ONNX on ONNX Runtime."""

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

from tapeout.errors import TapeoutError, nearest
from tapeout.exporters import Artifact, Carry, gguf, onnx
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Progress
from tapeout.validate.session import Arithmetic, KvCache, Lowering, SessionSpec

_LLAMA_CPP = "tapeout.targets.llama_cpp:open_session"
_ONNX_RUNTIME = "tapeout.targets.onnxruntime:open_session"

_WEIGHTS_LIMIT = 1e-4
_FLOAT32_DERIVATION = (
    "The same codes as float32, cache and all: sums of K products taken in another order differ by about sqrt(K) 2^-24 of their "
    "size, below 1e-5 for K = 16384; ten times that for the layers they pass through."
)
_GELU_DERIVATION = (
    f"{_FLOAT32_DERIVATION} GELU comes from a table of float16: its input and its output are off by up to 2^-11 of themselves, in each of "
    "L layers, so logits by 2^-11 sqrt(2 L) of their deviation, and the largest of thousands by four times that."
)
_ERF_DERIVATION = f"{_GELU_DERIVATION} The table's GELU is the approximation by tanh, off by up to 2^-11 from the one by erf: sqrt(3 L) in place of sqrt(2 L)."
_LEVEL_DERIVATION = (
    "The shipped data under a graph of accuracy_level 0, which leaves inputs alone: sums of K products taken in another order differ by "
    "about sqrt(K) 2^-24 of their size, below 1e-5 for K = 16384; ten times that for the layers they pass through."
)
_GGML_DERIVATION = (
    "llama.cpp rounds the inputs of quantized matmuls to int8 in blocks of 32 (K types: 256). The reference with that same rounding predicts what "
    "it costs; the device may lose twice that, and 5e-5 nats for its float types."
)
_CACHE_DERIVATION = " The reference's own cache is rounded too ({}, and queries to int8): what is left is the inputs' rounding, and the codes it changes."
_CACHE_BLOCK = 32  # elements of a head that share a scale, in q8_0 and q4_0
_CACHE_TYPES: dict[KvCache, str] = {"kv-f16": "f16", "kv-int8": "q8_0", "kv-int4": "q4_0"}
_MLAS_DERIVATION = (
    "ONNX Runtime rounds the inputs of quantized matmuls to int8 in the weights' own blocks. The reference with that same rounding "
    "predicts what it costs; the device may lose twice that, and 5e-5 nats for its approximations."
)


@dataclass(frozen=True)
class Cpu:
    """Intel, AMD and Arm CPUs.

    Attributes:
        format: What is written, and so the runtime: gguf for llama.cpp, onnx for ONNX Runtime.
        threads: Threads of the runtime. Default: as many as this process has cores.
        context: Longest context to run with, in tokens. Default: the model's own.
        sliding_window: Of gguf: carry a sliding window exactly (by an architecture that only recent llama.cpp builds know), or
            clamp the context to the window (which any build runs).
        max_shard_size: Of gguf: split the file into shards of at most this size (500M, 2G).
        kv_cache: Of gguf: what keys and values are kept in: half floats (the default), or codes of 8 or 4 bits, 32 to a scale.
    """

    format: Literal["gguf", "onnx"] = "gguf"
    threads: int | None = None
    context: int | None = None
    sliding_window: Literal["carry", "clamp"] = "carry"
    max_shard_size: str | None = None
    kv_cache: Literal["kv-f16", "kv-int8", "kv-int4"] | None = None

    name: ClassVar[str] = "cpu"
    summary: ClassVar[str] = "Intel, AMD and Arm CPUs, through GGUF on llama.cpp or ONNX on ONNX Runtime."

    def __post_init__(self) -> None:
        """TapeoutError for a cache that there is none of, and for flags of another format."""
        if self.kv_cache is not None and self.kv_cache not in _CACHE_TYPES:
            raise TapeoutError(
                f"'{self.kv_cache}' is not a cache of target cpu{nearest(self.kv_cache, _CACHE_TYPES)}."
            )
        if self.format == "onnx" and (self.max_shard_size or self.sliding_window != "carry" or self.kv_cache):
            raise TapeoutError(
                "--max-shard-size, --sliding-window and --kv-cache are of the format gguf; onnx has none of them."
            )

    @property
    def arithmetic(self) -> Arithmetic:
        """What the format's runtime does to the inputs of quantized matmuls."""
        return self._road.arithmetic

    @property
    def cache(self) -> KvCache:
        """What was chosen, or the format's own."""
        return self.kv_cache or self._road.caches[0]

    @property
    def needs(self) -> str:
        """The format's runtime."""
        return self._road.needs

    def carries(self, scheme: Scheme) -> Carry:
        """As the format's containers carry it."""
        return onnx.carries(scheme) if self.format == "onnx" else gguf.carries(scheme)

    def kv_caches(self, head_dim: int | None = None) -> tuple[KvCache, ...]:
        """Codes stand in blocks of 32 along a head."""
        whole = head_dim is None or head_dim % _CACHE_BLOCK == 0
        return tuple(kind for kind in self._road.caches if whole or kind not in ("kv-int8", "kv-int4"))

    def missing(self) -> str | None:
        """Whether the format's library and runtime are here."""
        absent = [name for name in self._road.packages if importlib.util.find_spec(name) is None]
        extra = "onnx" if self.format == "onnx" else "cpu"
        return f"{', '.join(absent)} is not installed: pip install 'tapeout[{extra}]'." if absent else None

    def export(self, quant: Quantized, out: Path, progress: Progress | None = None) -> Artifact:
        """Write the format's files."""
        artifact = self._road.write(self, quant, out, progress)
        return replace(artifact, context=min(self.context or artifact.context, artifact.context))

    def session(self, artifact: Artifact) -> SessionSpec:
        """The files as they are deployed: the runtime's defaults, but for the cache that was chosen."""
        return self._road.deployed(self, artifact)

    def read_codes(
        self, artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """Through the format owner's library: gguf or onnx."""
        return onnx.read_codes(artifact, quant) if self.format == "onnx" else gguf.read_codes(artifact, quant)

    def lowerings(self, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        """The same codes without the runtime's rounding of inputs, and the shipped files with that rounding explained."""
        road = self._road
        derivation, limit = road.bound(quant)
        return [
            Lowering("weights", road.exact(self, artifact, quant, scratch), "max", derivation, limit),
            Lowering("runtime", road.deployed(self, artifact), "kl", road.runtime(self)),
        ]

    def truncated(self, artifact: Artifact, quant: Quantized, layers: int, scratch: Path) -> SessionSpec:
        """The first layers, without the runtime's rounding of inputs."""
        return self._road.exact(self, artifact, quant, scratch, layers)

    def card(self, artifact: Artifact) -> str:
        """How to run it with the runtime's own tools."""
        return f"```\n{self._road.commands(self, artifact)}\ntapeout run . --prompt TEXT\n```"

    @property
    def _road(self) -> type[_Gguf] | type[_Onnx]:
        return _Onnx if self.format == "onnx" else _Gguf


class _Gguf:
    """GGUF on llama.cpp."""

    arithmetic: ClassVar[Arithmetic] = "ggml"
    needs = "llama.cpp, or llama-cpp-python 0.3.36 or newer"
    packages = ("llama_cpp", "gguf")
    caches: ClassVar[tuple[KvCache, ...]] = tuple(_CACHE_TYPES)

    @staticmethod
    def bound(quant: Quantized) -> tuple[str, float]:
        config = quant.model.config
        if config.hidden_act == "gelu":
            return _ERF_DERIVATION, 4 * 2**-11 * math.sqrt(3 * config.num_layers)
        if config.hidden_act.startswith("gelu"):
            return _GELU_DERIVATION, 4 * 2**-11 * math.sqrt(2 * config.num_layers)
        return _FLOAT32_DERIVATION, _WEIGHTS_LIMIT

    @staticmethod
    def runtime(cpu: Cpu) -> str:
        return _GGML_DERIVATION + (
            "" if cpu.cache == "kv-f16" else _CACHE_DERIVATION.format(_CACHE_TYPES[cpu.cache])
        )

    @staticmethod
    def write(cpu: Cpu, quant: Quantized, out: Path, progress: Progress | None) -> Artifact:
        size = parse_size(cpu.max_shard_size) if cpu.max_shard_size else None
        return gguf.write(
            quant, out, max_shard_bytes=size, sliding_window=cpu.sliding_window, progress=progress
        )

    @staticmethod
    def open(cpu: Cpu, artifact: Artifact, **settings: Any) -> SessionSpec:
        given = {
            "model": str(artifact.directory / artifact.files[0]),
            "context": artifact.context,
            "threads": cpu.threads,
        }
        return SessionSpec(_LLAMA_CPP, given | settings)

    @classmethod
    def deployed(cls, cpu: Cpu, artifact: Artifact) -> SessionSpec:
        return cls.open(cpu, artifact, kv_cache=cpu.cache)

    @classmethod
    def exact(
        cls, cpu: Cpu, artifact: Artifact, quant: Quantized, scratch: Path, layers: int | None = None
    ) -> SessionSpec:
        """A twin that is float32 everywhere, so that nothing is left but the lowered numbers."""
        out = scratch if layers else scratch / "twin"
        twin = gguf.write(quant, out, sliding_window=cpu.sliding_window, as_float32=True, layers=layers)
        return cls.open(
            cpu, replace(twin, context=artifact.context), kv_cache="kv-f32", flash_attention=False
        )

    @staticmethod
    def commands(cpu: Cpu, artifact: Artifact) -> str:
        flags = f"-m artifact/{artifact.files[0]} -c {artifact.context}"
        if cpu.cache != "kv-f16":
            kind = _CACHE_TYPES[cpu.cache]
            flags += f" -fa on -ctk {kind} -ctv {kind}"
        if (
            "embeddings.word_embeddings.weight" in artifact.containers
        ):  # the one arch of encoders that it writes
            return f"llama-embedding {flags} -p TEXT"
        return f"llama-cli {flags}\nllama-server {flags}"


class _Onnx:
    """ONNX on ONNX Runtime."""

    arithmetic: ClassVar[Arithmetic] = "mlas"
    needs = "onnxruntime 1.32 or newer"
    packages = ("onnxruntime", "onnx")
    caches: ClassVar[tuple[KvCache, ...]] = ("kv-f32",)

    @staticmethod
    def bound(quant: Quantized) -> tuple[str, float]:
        return _LEVEL_DERIVATION, _WEIGHTS_LIMIT

    @staticmethod
    def runtime(cpu: Cpu) -> str:
        return _MLAS_DERIVATION

    @staticmethod
    def write(cpu: Cpu, quant: Quantized, out: Path, progress: Progress | None) -> Artifact:
        return onnx.write(quant, out, progress=progress)

    @staticmethod
    def open(cpu: Cpu, artifact: Artifact, graph: Path | None = None) -> SessionSpec:
        arguments = {
            "directory": str(artifact.directory),
            "context": artifact.context,
            "graph": str(graph) if graph else None,
            "threads": cpu.threads,
        }
        return SessionSpec(_ONNX_RUNTIME, arguments)

    @classmethod
    def deployed(cls, cpu: Cpu, artifact: Artifact) -> SessionSpec:
        return cls.open(cpu, artifact)

    @classmethod
    def exact(
        cls, cpu: Cpu, artifact: Artifact, quant: Quantized, scratch: Path, layers: int | None = None
    ) -> SessionSpec:
        """Another graph over the very data file that ships; of two graphs, with the data once more."""
        graph = scratch / "exact.onnx"
        if layers or len([name for name in artifact.files if name.endswith(".onnx")]) > 1:
            twin = onnx.write(quant, scratch if layers else scratch / "twin", layers=layers, exact=True)
            return cls.open(cpu, replace(twin, context=artifact.context))
        graph.write_bytes(onnx.exact_graph(quant))
        return cls.open(cpu, artifact, graph)

    @staticmethod
    def commands(cpu: Cpu, artifact: Artifact) -> str:
        graphs = [name for name in artifact.files if name.endswith(".onnx")]
        if "genai_config.json" not in artifact.files:
            opened = "; ".join(
                f'print(rt.InferenceSession("artifact/{name}").get_inputs())' for name in graphs
            )
            return f"python -c 'import onnxruntime as rt; {opened}'  # what it takes"
        lines = (
            "import onnxruntime_genai as og",
            'model = og.Model("artifact")  # pip install onnxruntime-genai',
            "words = og.Tokenizer(model)",
            "generator = og.Generator(model, og.GeneratorParams(model))",
            'generator.append_tokens(words.encode("TEXT"))',
            "while not generator.is_done():",
            "    generator.generate_next_token()",
            "print(words.decode(generator.get_sequence(0)))",
        )
        return "python - <<END\n" + "\n".join(lines) + "\nEND"


def parse_size(text: str) -> int:
    """Bytes of a size such as ``500M`` or ``2G`` (powers of 1000, as llama.cpp's split tool counts)."""
    found = re.fullmatch(r"(\d+)([MG])", text.strip().upper())
    if not found or not int(found[1]):
        raise TapeoutError(f"'{text}' is not a size; write 500M or 2G.")
    return int(found[1]) * {"M": 10**6, "G": 10**9}[found[2]]
