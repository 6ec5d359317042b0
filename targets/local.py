"""What targets share that run on the CPU of a machine or of a phone: GGUF on llama.cpp, or ONNX on ONNX Runtime."""

# Annotations are values here: those of a subclass's fields are looked up in the module of that class.
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from tapeout.errors import TapeoutError, nearest
from tapeout.exporters import Artifact, Carry, gguf, onnx
from tapeout.exporters.onnx.genai import CONFIG as GENAI
from tapeout.models import DecoderConfig, EncoderConfig, Role
from tapeout.models.module import SAMPLES
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Memory, Progress, check_counts, graph_width, llama_cpp, onnxruntime
from tapeout.targets.held import held_bits
from tapeout.validate.session import Arithmetic, KvCache, Lowering, SessionSpec

_LLAMA_CPP = "tapeout.targets.llama_cpp:open_session"
_ONNX_RUNTIME = "tapeout.targets.onnxruntime:open_session"
_TRACED = "tapeout.targets.onnxruntime_trace:open_traced"

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
class Local:
    """A CPU and the two runtimes for it; a target is a name, a summary and its own defaults.

    Attributes:
        format: What is written, and so the runtime: gguf for llama.cpp, onnx for ONNX Runtime.
        threads: Threads of the runtime. Default: as many as this process has cores.
        context: Longest context to run with, in tokens. Default: the model's own.
        prefill_chunk: Tokens of a prompt that are computed at once: more are faster, fewer take less memory.
        sliding_window: Of gguf: carry a sliding window exactly (by an architecture that only recent llama.cpp builds know), or
            clamp the context to the window (which any build runs).
        max_shard_size: Of gguf: split the file into shards of at most this size (500M, 2G).
        kv_cache: Of gguf: what keys and values are kept in: half floats (the default), or codes of 8 or 4 bits, 32 to a scale.
    """

    format: Literal["gguf", "onnx"] = "gguf"
    threads: int | None = None
    context: int | None = None
    prefill_chunk: int = 512
    sliding_window: Literal["carry", "clamp"] = "carry"
    max_shard_size: str | None = None
    kv_cache: Literal["kv-f16", "kv-int8", "kv-int4"] | None = None

    name: ClassVar[str]
    summary: ClassVar[str]

    def __post_init__(self) -> None:
        """TapeoutError for a cache that there is none of, a number that is none, and flags of another format."""
        check_counts(self, "threads", "context", "prefill_chunk")
        if self.kv_cache is not None and self.kv_cache not in _CACHE_TYPES:
            raise TapeoutError(
                f"'{self.kv_cache}' is not a cache of target {self.name}{nearest(self.kv_cache, _CACHE_TYPES)}."
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

    @property
    def checks(self) -> tuple[str, ...]:
        """Of the script that checks a package on the device, and of llama.cpp's program besides."""
        return ("onnx.py",) if self.format == "onnx" else ("gguf.py", "check.cpp")

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Its distribution."""
        return self._road.runtimes

    def carries(self, scheme: Scheme) -> Carry:
        """As the format's containers carry it."""
        return onnx.carries(scheme) if self.format == "onnx" else gguf.carries(scheme)

    def kv_caches(self, head_dim: int | None = None) -> tuple[KvCache, ...]:
        """Codes stand in blocks of 32 along a head."""
        whole = head_dim is None or head_dim % _CACHE_BLOCK == 0
        return tuple(kind for kind in self._road.caches if whole or kind not in ("kv-int8", "kv-int4"))

    def memory(self, config: DecoderConfig, context: int) -> Memory:
        """Keys and values as the runtime keeps them, and the activations of a chunk."""
        return self._road.memory(self, config, context)

    def loaded(self, quant: Quantized, size: int) -> tuple[int, int]:
        """Matrices anew in the order that kernels like; see ``targets.loaded``."""
        return self._road.loaded(self, quant, size)

    def read(self, quant: Quantized, count: float) -> float:
        """Of gguf what the file has; of onnx more, see ``targets.read``."""
        return self._road.read(self, quant, count)

    def scratch_bytes(self, quant: Quantized) -> int:
        """Of gguf a twin in float32, of which the gate ``lowering`` is made."""
        weights = sum(math.prod(spec.shape) for spec in quant.model.specs.values())
        return 0 if self.format == "onnx" else 4 * weights

    def missing(self) -> str | None:
        """Whether the format's library and runtime are here."""
        absent = [name for name in self._road.packages if importlib.util.find_spec(name) is None]
        extra = "onnx" if self.format == "onnx" else "cpu"
        return f"{', '.join(absent)} is not installed: pip install 'tapeout[{extra}]'." if absent else None

    def export(self, quant: Quantized, out: Path, progress: Progress | None = None) -> Artifact:
        """Write the format's files."""
        artifact = self._road.write(self, quant, out, progress)
        return replace(artifact, context=min(self.context or artifact.context, artifact.context))

    @property
    def session_threads(self) -> int | None:
        """Threads of a session on this machine."""
        return self.threads

    def session(self, artifact: Artifact) -> SessionSpec:
        """The files as they are deployed: the runtime's defaults, but for the cache that was chosen."""
        return self._road.deployed(self, artifact)

    def batched(self, artifact: Artifact, sequences: int, context: int) -> SessionSpec:
        """The same with room for several sequences of ``context`` tokens each: a BatchedSession."""
        spec = self.session(artifact)
        return replace(spec, arguments={**spec.arguments, "sequences": sequences, "context": context})

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

    def traced(self, artifact: Artifact, scratch: Path) -> SessionSpec:
        """The files' own numbers: as float32 to llama.cpp, under a graph that leaves inputs alone to ONNX Runtime."""
        return self._road.traced(self, artifact, scratch)

    def card(self, artifact: Artifact) -> str:
        """How to run it with the runtime's own tools."""
        last = "tapeout bench ." if SAMPLES in artifact.files else "tapeout run . --prompt TEXT"
        return f"```\n{self._road.commands(self, artifact)}\n{last}\n```"

    def flags(self, artifact: Artifact) -> str:
        """What llama.cpp's programs are given for the file as it is deployed."""
        flags = f"-m artifact/{artifact.files[0]} -c {artifact.context}"
        if self.cache != "kv-f16":
            kind = _CACHE_TYPES[self.cache]
            flags += f" -fa on -ctk {kind} -ctv {kind}"
        return flags

    @property
    def _road(self) -> "type[_Gguf] | type[_Onnx]":
        return _Onnx if self.format == "onnx" else _Gguf


class _Gguf:
    """GGUF on llama.cpp."""

    arithmetic: ClassVar[Arithmetic] = "ggml"
    needs = "llama.cpp, or llama-cpp-python 0.3.36 or newer"
    runtimes = ("llama-cpp-python",)
    packages = ("llama_cpp", "gguf")
    caches: ClassVar[tuple[KvCache, ...]] = tuple(_CACHE_TYPES)

    @staticmethod
    def bound(quant: Quantized) -> tuple[str, float]:
        config = quant.model.config
        assert isinstance(config, DecoderConfig | EncoderConfig)  # what GGUF is written of
        if config.hidden_act == "gelu":
            return _ERF_DERIVATION, 4 * 2**-11 * math.sqrt(3 * config.num_layers)
        if config.hidden_act.startswith("gelu"):
            return _GELU_DERIVATION, 4 * 2**-11 * math.sqrt(2 * config.num_layers)
        return _FLOAT32_DERIVATION, _WEIGHTS_LIMIT

    @staticmethod
    def runtime(device: Local) -> str:
        return _GGML_DERIVATION + (
            "" if device.cache == "kv-f16" else _CACHE_DERIVATION.format(_CACHE_TYPES[device.cache])
        )

    @staticmethod
    def write(device: Local, quant: Quantized, out: Path, progress: Progress | None) -> Artifact:
        size = parse_size(device.max_shard_size) if device.max_shard_size else None
        return gguf.write(
            quant, out, max_shard_bytes=size, sliding_window=device.sliding_window, progress=progress
        )

    @staticmethod
    def memory(device: Local, config: DecoderConfig, context: int) -> Memory:
        """Of work: an element of 2 bytes of the mask for every cell and token, and logits of every token or a layer's values."""
        chunk = min(device.prefill_chunk, context)  # llama.cpp takes no larger batch than its context
        width = config.num_kv_heads * (config.head_dim + config.value_dim)
        layers = [(config.window(layer), width) for layer in range(config.num_layers)]
        cache = llama_cpp.cache_bytes(layers, context, device.prefill_chunk, device.cache)
        kinds = len({window for window, _ in layers})
        return Memory(cache, chunk * (2 * kinds * context + 4 * max(config.vocab_size, graph_width(config))))

    @staticmethod
    def loaded(device: Local, quant: Quantized, size: int) -> tuple[int, int]:
        """What llama.cpp packs anew on this machine's kind of CPU, and the file but for a table of which single rows are read."""
        kept, table = 0.0, 0.0
        for name, weights, width in _matrices(quant):
            scheme = quant.schemes[name]
            if _looked_up(quant, name):
                bits = held_bits(device, scheme, width) or 8 * quant.model.checkpoint[name].nbytes / weights
                table += weights * bits / 8
            elif (block := gguf.block_of(scheme)) and width % block.weights == 0:
                stacked = ".experts." in name
                kept += weights * llama_cpp.repacked_bytes(block.kind, block.size / block.weights, stacked)
        return int(kept), int(size - table)

    @staticmethod
    def read(device: Local, quant: Quantized, count: float) -> float:
        return count

    @staticmethod
    def open(device: Local, artifact: Artifact, **settings: Any) -> SessionSpec:
        given = {
            "model": str(artifact.directory / artifact.files[0]),
            "context": artifact.context,
            "threads": device.session_threads,
            "batch": device.prefill_chunk,
            "ubatch": device.prefill_chunk,
        }
        return SessionSpec(_LLAMA_CPP, given | settings, environment=_huge_pages())

    @classmethod
    def deployed(cls, device: Local, artifact: Artifact) -> SessionSpec:
        return cls.open(device, artifact, kv_cache=device.cache)

    @classmethod
    def exact(cls, device: Local, artifact: Artifact, quant: Quantized, scratch: Path) -> SessionSpec:
        """A twin that is float32 everywhere, so that nothing is left but the lowered numbers."""
        twin = gguf.write(quant, scratch / "twin", sliding_window=device.sliding_window, as_float32=True)
        return cls.open(
            device, replace(twin, context=artifact.context), kv_cache="kv-f32", flash_attention=False
        )

    @classmethod
    def traced(cls, device: Local, artifact: Artifact, scratch: Path) -> SessionSpec:
        """The shipped file itself, widened."""
        files = [artifact.directory / name for name in artifact.files]
        twin = replace(
            artifact, directory=scratch, files=(gguf.widened(files, scratch / "widened.gguf").name,)
        )
        return cls.open(device, twin, kv_cache="kv-f32", flash_attention=False, traced=True)

    @staticmethod
    def commands(device: Local, artifact: Artifact) -> str:
        flags = device.flags(artifact)
        if (
            "embeddings.word_embeddings.weight" in artifact.containers
        ):  # the one arch of encoders that it writes
            return f"llama-embedding {flags} -p TEXT"
        return f"llama-cli {flags}\nllama-server {flags}"


@dataclass(frozen=True)
class _Multiplied:
    """Bytes of a matrix that every token is multiplied with: in the file, kept by the runtime, sums among those, and a float32 made anew."""

    held: float
    kept: float
    sums: float = 0
    twin: float = 0


class _Onnx:
    """ONNX on ONNX Runtime."""

    arithmetic: ClassVar[Arithmetic] = "mlas"
    needs = "onnxruntime 1.32 or newer"
    runtimes = ("onnxruntime",)
    packages = ("onnxruntime", "onnx")
    caches: ClassVar[tuple[KvCache, ...]] = ("kv-f32",)

    @staticmethod
    def bound(quant: Quantized) -> tuple[str, float]:
        return _LEVEL_DERIVATION, _WEIGHTS_LIMIT

    @staticmethod
    def runtime(device: Local) -> str:
        return _MLAS_DERIVATION

    @staticmethod
    def write(device: Local, quant: Quantized, out: Path, progress: Progress | None) -> Artifact:
        return onnx.write(quant, out, context=device.context, progress=progress)

    @staticmethod
    def memory(device: Local, config: DecoderConfig, context: int) -> Memory:
        """Of work: twice what is alive, since the arena grows by doubling; scores only where a soft cap keeps the kernel from tiling."""
        chunk, (heads, width) = device.prefill_chunk, onnx.cache_shape(config)
        width *= heads * (1 if config.mla else 2)  # of latents the values are the keys
        layers = [(config.window(layer), width) for layer in range(config.num_layers)]
        scores = 2 * config.num_heads * context if config.attention_softcap else 0
        work = 2 * 4 * chunk * (graph_width(config) + scores)
        return Memory(onnxruntime.cache_bytes(layers, context), work)

    @staticmethod
    def loaded(device: Local, quant: Quantized, size: int) -> tuple[int, int]:
        """Codes with their scales and a sum a block; floats, and float8, as float32; NF4's twin. Of the mapped data scales stay."""
        found = list(_Onnx._multiplied(device, quant))
        # For the largest twin the arena doubles.
        twin = 2 * max((each.twin for each in found), default=0)
        return int(sum(each.kept for each in found) + twin), int(sum(each.sums for each in found))

    @staticmethod
    def read(device: Local, quant: Quantized, count: float) -> float:
        """What is kept; and of NF4 the float32 of each weight, which its kernel writes and reads again for every product."""
        found = list(_Onnx._multiplied(device, quant))
        held = sum(each.held for each in found)
        return count * sum(each.kept + 2 * each.twin for each in found) / held if held else count

    @staticmethod
    def _multiplied(device: Local, quant: Quantized) -> Iterator[_Multiplied]:
        for name, weights, width in _matrices(quant):
            if _looked_up(quant, name):
                continue
            scheme = quant.schemes[name]
            bits = held_bits(device, scheme, width)
            held = quant.model.checkpoint[name].nbytes if bits is None else weights * bits / 8
            if bits is None or scheme.levels == "e4m3":
                yield _Multiplied(held, 4 * weights)
            elif scheme.levels == "nf4":
                yield _Multiplied(held, held, twin=4 * weights)
            else:
                sums = 4 * weights / (onnx.block_of(scheme, width) or width)
                yield _Multiplied(held, held + sums, sums)

    @staticmethod
    def open(device: Local, artifact: Artifact, graph: Path | None = None) -> SessionSpec:
        arguments = {
            "directory": str(artifact.directory),
            "context": artifact.context,
            "graph": str(graph) if graph else None,
            "threads": device.session_threads,
            "chunk": device.prefill_chunk,
        }
        return SessionSpec(_ONNX_RUNTIME, arguments, environment=_huge_pages())

    @classmethod
    def deployed(cls, device: Local, artifact: Artifact) -> SessionSpec:
        return cls.open(device, artifact)

    @classmethod
    def exact(cls, device: Local, artifact: Artifact, quant: Quantized, scratch: Path) -> SessionSpec:
        """Another graph over the very data file that ships; of two graphs, with the data once more."""
        if len(_graphs(artifact)) > 1:
            twin = onnx.write(quant, scratch / "twin", exact=True, context=artifact.context)
            return cls.open(device, twin)
        graph = scratch / "exact.onnx"
        graph.write_bytes(onnx.exact_graph(quant, artifact.context))
        return cls.open(device, artifact, graph)

    @staticmethod
    def traced(device: Local, artifact: Artifact, scratch: Path) -> SessionSpec:
        """The shipped graph over the shipped data."""
        arguments = {
            "directory": str(artifact.directory),
            "context": artifact.context,
            "threads": device.session_threads,
        }
        return SessionSpec(_TRACED, arguments)

    @staticmethod
    def commands(device: Local, artifact: Artifact) -> str:
        if SAMPLES in artifact.files:
            lines: tuple[str, ...] = (
                "import onnxruntime",
                "from safetensors.numpy import load_file",
                'session = onnxruntime.InferenceSession("artifact/model.onnx")  # pip install onnxruntime safetensors',
                f'given = {{k[2:]: v for k, v in load_file("artifact/{SAMPLES}").items() if k.startswith("0.")}}',
                "print(session.run(None, given))",
            )
            return "python - <<END\n" + "\n".join(lines) + "\nEND"
        if GENAI not in artifact.files:
            opened = "; ".join(
                f'print(rt.InferenceSession("artifact/{name}").get_inputs())' for name in _graphs(artifact)
            )
            return f"python -c 'import onnxruntime as rt; {opened}'  # pip install onnxruntime: what it takes"
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


def _matrices(quant: Quantized) -> Iterator[tuple[str, int, int]]:
    """Name, weights and row length of every matrix that codes may hold."""
    for name, spec in quant.model.specs.items():
        if spec.role.is_matrix:
            yield name, math.prod(spec.shape), spec.shape[-1]


def _looked_up(quant: Quantized, name: str) -> bool:
    """Whether of a matrix single rows are read, and it is no head."""
    tied = getattr(quant.model.config, "tie_word_embeddings", False)
    return quant.model.specs[name].role is Role.EMBEDDING and not tied


def _graphs(artifact: Artifact) -> list[str]:
    return [name for name in artifact.files if name.endswith(".onnx")]


def parse_size(text: str) -> int:
    """Bytes of a size such as ``500M`` or ``2G`` (powers of 1000, as llama.cpp's split tool counts)."""
    found = re.fullmatch(r"(\d+)([MG])", text.strip().upper())
    if not found or not int(found[1]):
        raise TapeoutError(f"'{text}' is not a size; write 500M or 2G.")
    return int(found[1]) * {"M": 10**6, "G": 10**9}[found[2]]


def _huge_pages() -> dict[str, str]:
    """What makes glibc ask Linux for huge pages, which weights in the heap are read 6 to 12 % faster from; a user's own tunables stay."""
    return {} if "GLIBC_TUNABLES" in os.environ else {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
