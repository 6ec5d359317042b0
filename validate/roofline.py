"""The roofline (Williams, Waterman and Patterson, CACM 52, 2009): what bounds prefill and decode on this machine, and how near they come.

A step can be no faster than its arithmetic at the machine's peak, nor than its bytes at the machine's bandwidth. Operations over bytes, the
intensity, says which of the two it is; where both take equally long is the ridge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from tapeout.models import DecoderConfig, Model, Role

__all__ = ["operations", "peaks", "roofline"]

_SIDE, _PASSES = 1024, 5


def operations(model: Model) -> dict[str, Any] | None:
    """What a decoder computes for a token; None: of another kind of model, or one whose graph others made, that is not known.

    Returns:
        weights: operations with weights, 2 for each weight of a matmul that a token takes (routed experts: their share), the head's too.
        attention: by sliding window (``window``; None: none) ``per_position``, operations for each token that is attended to.
    """
    config = model.config
    if not isinstance(config, DecoderConfig) or model.graph != "built":
        return None
    total = 0.0
    for name, spec in model.specs.items():
        share = 1.0
        if config.moe and f".{config.moe.expert.partition('{')[0]}" in name:
            share = config.moe.top_k / config.moe.experts
        if spec.role in (Role.LINEAR, Role.HEAD, Role.ROUTER) or (
            spec.role is Role.EMBEDDING and config.tie_word_embeddings
        ):
            total += 2 * share * math.prod(spec.shape)
    windows: dict[int | None, int] = {}
    for layer in range(config.num_layers):
        window = config.window(layer)
        each = 2 * config.num_heads * (config.head_dim + config.value_dim)
        windows[window] = windows.get(window, 0) + each
    return {
        "weights": int(total),
        "attention": [{"window": window, "per_position": each} for window, each in windows.items()],
    }


def peaks(threads: int | None = None) -> list[dict[str, Any]]:
    """What this machine's cores multiply and add a second: ``type``, ``operations_per_s`` (the best of five), and ``measured_with``.

    Square matrices of 1024 that stay in the caches, in float32 by numpy's BLAS and in int8 by what is installed: ONNX Runtime or torch.
    """
    floats = np.random.default_rng(0).standard_normal((_SIDE, _SIDE)).astype(np.float32)
    found = [_best("float32", "numpy's BLAS", lambda: np.matmul(floats, floats))]
    for name, make in (("ONNX Runtime's MatMulInteger", _onnxruntime), ("torch's _int_mm", _torch)):
        try:
            found.append(_best("int8", name, make(threads)))
            break
        except (ImportError, AttributeError, RuntimeError):  # not installed, or has no such kernel here
            continue
    return found


def _best(kind: str, by: str, multiply: Callable[[], object]) -> dict[str, Any]:
    best = math.inf
    for _ in range(_PASSES + 1):  # the first one warms up
        begin = perf_counter()
        multiply()
        best = min(best, perf_counter() - begin)
    return {"type": kind, "operations_per_s": 2 * _SIDE**3 / best, "measured_with": by}


def _onnxruntime(threads: int | None) -> Callable[[], object]:
    import onnx
    import onnxruntime

    info, kinds = onnx.helper.make_tensor_value_info, onnx.TensorProto
    shape = [_SIDE, _SIDE]
    weights = np.random.default_rng(0).integers(-127, 128, shape, np.int8)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "peak",
        [info("x", kinds.UINT8, shape)],
        [info("y", kinds.INT32, shape)],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    given = {"x": np.random.default_rng(1).integers(0, 256, shape, np.uint8)}
    return lambda: session.run(None, given)


def _torch(_: int | None) -> Callable[[], object]:
    import torch

    values = torch.randint(-127, 128, (_SIDE, _SIDE), dtype=torch.int8)
    return lambda: torch._int_mm(values, values)


def roofline(
    known: Mapping[str, Any],
    weight_bytes: int,
    bandwidth: float,
    best: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    chunk: int = 512,
) -> dict[str, Any]:
    """Place what was measured under the roof.

    Args:
        known: what ``operations`` gives.
        weight_bytes: of weights that a token reads.
        bandwidth: bytes a second that were measured.
        best: what ``peaks`` gives; the highest of them is the roof, since runtimes multiply in either type.
        rows: ``context``, ``prefill_s``, ``token_s`` (both medians, in seconds), ``cache_bytes`` of a full context (0: not known).
        chunk: tokens of a prompt that are computed at once: weights are read once for each.

    Returns:
        bandwidth_bytes_per_s, peaks, ridge (operations a byte), and ``points``: phase, context, operations, bytes, intensity,
        operations_per_s, bytes_per_s, bound (``memory`` or ``compute``), fraction (of what the bound allows).
    """
    top = max(float(each["operations_per_s"]) for each in best)
    points = []
    for row in rows:
        context, cache = int(row["context"]), int(row["cache_bytes"])
        prompt = context * known["weights"] + sum(
            each["per_position"] * _pairs(context, each["window"]) for each in known["attention"]
        )
        token = known["weights"] + sum(
            each["per_position"] * min(context, each["window"] or context) for each in known["attention"]
        )
        # A prompt's cache is read once for each chunk, half of it on average, and written once.
        chunks = math.ceil(context / chunk)
        moved = chunks * weight_bytes + int(cache * (1 + (chunks - 1) / 2))
        for phase, work, size, taken in (
            ("prefill", prompt, moved, row["prefill_s"]),
            ("decode", token, weight_bytes + cache, row["token_s"]),
        ):
            at_peak, at_bandwidth = work / top, size / bandwidth
            points.append(
                {
                    "phase": phase,
                    "context": context,
                    "operations": work,
                    "bytes": size,
                    "intensity": work / size,
                    "operations_per_s": work / taken,
                    "bytes_per_s": size / taken,
                    "bound": "compute" if at_peak > at_bandwidth else "memory",
                    "fraction": max(at_peak, at_bandwidth) / taken,
                }
            )
    return {
        "bandwidth_bytes_per_s": bandwidth,
        "peaks": [dict(each) for each in best],
        "ridge": top / bandwidth,
        "points": points,
    }


def _pairs(tokens: int, window: int | None) -> int:
    """Tokens that those of a prompt attend to, together: each to itself and what is before it, as far as a window goes."""
    full = min(tokens, window or tokens)
    return full * (full + 1) // 2 + (tokens - full) * full
