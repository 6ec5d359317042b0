"""What the formats share whose graph is typed for a compiler: how it is run and checked on a CPU, and what its caches take."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tapeout.exporters import Artifact, onnx
from tapeout.models import DecoderConfig
from tapeout.quantize import Quantized
from tapeout.validate.session import Lowering, SessionSpec

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
    width = config.num_kv_heads * (config.head_dim + config.value_dim)
    if config.mla:
        width = config.mla.kv_rank + config.mla.rope_dim
    return 2 * width * config.num_layers * context


def opened(artifact: Artifact, chunk: int, **settings: str) -> SessionSpec:
    """The graph on onnxruntime."""
    given = {"directory": str(artifact.directory), "context": artifact.context, "chunk": chunk}
    return SessionSpec(_OPEN, given | settings)


def traced(artifact: Artifact) -> SessionSpec:
    """The graph on onnxruntime, every named value in sight."""
    return SessionSpec(_TRACED, {"directory": str(artifact.directory), "context": artifact.context})


def lowerings(
    artifact: Artifact,
    quant: Quantized,
    scratch: Path,
    deployed: SessionSpec,
    dialect: onnx.Dialect,
    chunk: int,
) -> list[Lowering]:
    """The shipped data under the same graph in float32, with the peaks of what is float16 in the other; and the graph as it is deployed."""
    graph = scratch / "exact.onnx"
    graph.write_bytes(onnx.exact_graph(quant, artifact.context, dialect))
    shipped = str(artifact.directory / "model.onnx")
    exact = opened(artifact, chunk, graph=str(graph), peaks=shipped)
    return [
        Lowering("weights", exact, "max", _WEIGHTS_DERIVATION, 1e-4, peaks=True),
        Lowering("runtime", deployed, "kl", _RUNTIME_DERIVATION),
    ]
