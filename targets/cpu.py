"""CPUs: through GGUF on llama.cpp, or ONNX on ONNX Runtime."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from tapeout.errors import TapeoutError
from tapeout.exporters import Artifact, Carry, gguf, onnx
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Progress
from tapeout.validate.session import Arithmetic, Lowering, SessionSpec

_LLAMA_CPP = "tapeout.targets.llama_cpp:open_session"
_ONNX_RUNTIME = "tapeout.targets.onnxruntime:open_session"

_WEIGHTS_LIMIT = 1e-4
_FLOAT32_DERIVATION = (
    "The same codes as float32, cache and all: sums of K products taken in another order differ by about sqrt(K) 2^-24 of their "
    "size, below 1e-5 for K = 16384; ten times that for the layers they pass through."
)
# Of Gemma's activation, on llama.cpp.
_GELU_LIMIT = 3e-3
_GELU_DERIVATION = f"{_FLOAT32_DERIVATION} GELU comes from a table of float16: off by 2^-11 of itself, and its input too, in each layer."
_LEVEL_DERIVATION = (
    "The shipped data under a graph of accuracy_level 0, which leaves inputs alone: sums of K products taken in another order differ by "
    "about sqrt(K) 2^-24 of their size, below 1e-5 for K = 16384; ten times that for the layers they pass through."
)
_GGML_DERIVATION = (
    "llama.cpp rounds the inputs of quantized matmuls to int8 in blocks of 32 (K types: 256). The reference with that same rounding predicts what "
    "it costs; the device may lose twice that, and 5e-5 nats for its float types."
)
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
    """

    format: Literal["gguf", "onnx"] = "gguf"
    threads: int | None = None
    context: int | None = None
    sliding_window: Literal["carry", "clamp"] = "carry"
    max_shard_size: str | None = None

    name: ClassVar[str] = "cpu"
    summary: ClassVar[str] = "Intel, AMD and Arm CPUs, through GGUF on llama.cpp or ONNX on ONNX Runtime."

    def __post_init__(self) -> None:
        """TapeoutError for flags of another format."""
        if self.format == "onnx" and (self.max_shard_size or self.sliding_window != "carry"):
            raise TapeoutError(
                "--max-shard-size and --sliding-window are of the format gguf; onnx has neither."
            )

    @property
    def arithmetic(self) -> Arithmetic:
        """What the format's runtime does to the inputs of quantized matmuls."""
        return self._road.arithmetic

    @property
    def needs(self) -> str:
        """The format's runtime."""
        return self._road.needs

    def carries(self, scheme: Scheme) -> Carry:
        """As the format's containers carry it."""
        return onnx.carries(scheme) if self.format == "onnx" else gguf.carries(scheme)

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
        """The files as they are deployed, with the runtime's defaults."""
        return self._road.open(self, artifact)

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
            Lowering("runtime", road.open(self, artifact), "kl", road.runtime),
        ]

    def truncated(self, artifact: Artifact, quant: Quantized, layers: int, scratch: Path) -> SessionSpec:
        """The first layers, without the runtime's rounding of inputs."""
        return self._road.exact(self, artifact, quant, scratch, layers)

    def card(self, artifact: Artifact) -> str:
        """How to run it with the runtime's own tools."""
        return f"```\n{self._road.commands(artifact)}\ntapeout run . --prompt TEXT\n```"

    @property
    def _road(self) -> type[_Gguf] | type[_Onnx]:
        return _Onnx if self.format == "onnx" else _Gguf


class _Gguf:
    """GGUF on llama.cpp."""

    arithmetic: ClassVar[Arithmetic] = "ggml"
    needs = "llama.cpp, or llama-cpp-python 0.3.36 or newer"
    packages = ("llama_cpp", "gguf")
    runtime = _GGML_DERIVATION

    @staticmethod
    def bound(quant: Quantized) -> tuple[str, float]:
        if quant.model.config.hidden_act.startswith("gelu"):
            return _GELU_DERIVATION, _GELU_LIMIT
        return _FLOAT32_DERIVATION, _WEIGHTS_LIMIT

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
    def exact(
        cls, cpu: Cpu, artifact: Artifact, quant: Quantized, scratch: Path, layers: int | None = None
    ) -> SessionSpec:
        """A twin that is float32 everywhere, so that nothing is left but the lowered numbers."""
        out = scratch if layers else scratch / "twin"
        twin = gguf.write(quant, out, sliding_window=cpu.sliding_window, as_float32=True, layers=layers)
        return cls.open(cpu, replace(twin, context=artifact.context), kv="f32", flash_attention=False)

    @staticmethod
    def commands(artifact: Artifact) -> str:
        file = f"artifact/{artifact.files[0]}"
        return f"llama-cli -m {file} -c {artifact.context}\nllama-server -m {file} -c {artifact.context}"


class _Onnx:
    """ONNX on ONNX Runtime."""

    arithmetic: ClassVar[Arithmetic] = "mlas"
    needs = "onnxruntime 1.32 or newer"
    packages = ("onnxruntime", "onnx")
    runtime = _MLAS_DERIVATION

    @staticmethod
    def bound(quant: Quantized) -> tuple[str, float]:
        return _LEVEL_DERIVATION, _WEIGHTS_LIMIT

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
    def exact(
        cls, cpu: Cpu, artifact: Artifact, quant: Quantized, scratch: Path, layers: int | None = None
    ) -> SessionSpec:
        """Another graph over the very data file that ships."""
        graph = scratch / "exact.onnx"
        if layers:
            twin = onnx.write(quant, scratch, layers=layers, exact=True)
            return cls.open(cpu, replace(twin, context=artifact.context))
        graph.write_bytes(onnx.exact_graph(quant))
        return cls.open(cpu, artifact, graph)

    @staticmethod
    def commands(artifact: Artifact) -> str:
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
