"""What the formats share whose graph is typed for a compiler: how it is run and checked on a CPU, and what its caches take."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tapeout.exporters import Artifact, onnx
from tapeout.models import DecoderConfig
from tapeout.quantize import Quantized, QuantTensor
from tapeout.validate.session import Arithmetic, KvCache, Lowering, SessionSpec

_OPEN = "tapeout.targets.onnxruntime_typed:open_session"
_TRACED = "tapeout.targets.onnxruntime_typed:open_traced"

_WEIGHTS_DERIVATION = (
    "The shipped data under the same graph in float32: sums of K products taken in another order differ by about sqrt(K) 2^-24 of their "
    "size, below 1e-5 for K = 16384; ten times that for the layers they pass through."
)
_RUNTIME_DERIVATION = (
    "Matmuls, their inputs, and keys and values are float16: off by 2^-12 of themselves where they are rounded, an eighth of "
    "bfloat16's, which the floor of 5e-5 nats is made for. Hidden states, norms and softmax are float32."
)


def missing(extra: str) -> str | None:
    """What checks ONNX and is not here."""
    absent = [name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} is not installed: pip install 'tapeout[{extra}]'." if absent else None


def cache_bytes(config: DecoderConfig, context: int) -> int:
    """Bytes of the keys and values of a full context in float16; a window drops nothing, and latents are kept once."""
    return 2 * config.cache_width * config.num_layers * context


class TypedGraph:
    """What roads answer alike whose format is such a graph; see ``roads.Road``.

    Attributes:
        dialect: of the exporter.
    """

    dialect: ClassVar[onnx.Dialect]
    arithmetic: ClassVar[Arithmetic] = "scheme"
    cache: ClassVar[KvCache] = "kv-f16"

    @classmethod
    def session(cls, device: Any, artifact: Artifact) -> SessionSpec:
        """The graph on onnxruntime."""
        return _opened(artifact, device.prefill_chunk)

    @classmethod
    def read_codes(
        cls, artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """From the graph by onnx."""
        return onnx.read_codes(artifact, quant, dialect=cls.dialect)

    @classmethod
    def lowerings(cls, device: Any, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        """The shipped data under the same graph in float32, with the peaks of what is float16 in the other; and the graph as it is deployed."""
        graph = scratch / "exact.onnx"
        graph.write_bytes(onnx.exact_graph(quant, artifact.context, cls.dialect))
        shipped = str(artifact.directory / "model.onnx")
        exact = _opened(artifact, device.prefill_chunk, graph=str(graph), peaks=shipped)
        return [
            Lowering("weights", exact, "max", _WEIGHTS_DERIVATION, 1e-4, peaks=True),
            Lowering("runtime", cls.session(device, artifact), "kl", _RUNTIME_DERIVATION),
        ]

    @classmethod
    def traced(cls, device: Any, artifact: Artifact, scratch: Path) -> SessionSpec:
        """The graph on onnxruntime, every named value in sight."""
        return SessionSpec(_TRACED, {"directory": str(artifact.directory), "context": artifact.context})


def _opened(artifact: Artifact, chunk: int, **settings: str) -> SessionSpec:
    given = {"directory": str(artifact.directory), "context": artifact.context, "chunk": chunk}
    return SessionSpec(_OPEN, given | settings)
