"""Sessions on ONNX Runtime's CPU provider for graphs whose cache is handed in and out: those that TensorRT and MIGraphX compile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from tapeout.errors import PackageError, RuntimeCrash
from tapeout.exporters.onnx import check_size
from tapeout.quantize.scheme import E2M1
from tapeout.targets.onnxruntime import OnnxGrown, load_graph, tokenizer_of
from tapeout.targets.onnxruntime_trace import TracedOnnx, named_values, observed
from tapeout.validate.divergence import HALF
from tapeout.validate.session import Facts, Logits

__all__ = ["OnnxTyped", "open_session", "open_traced"]

_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
}  # fmt: skip
_PEAK = ".peak"
# Products of what onnxruntime fuses to MatMulNBits are taken with inputs as they are.
_SETTINGS = {"session.qdq_matmulnbits_accuracy_level": "1"}


class OnnxTyped(OnnxGrown):
    """A Session on onnxruntime; see ``open_session``. The cache grows by what a step gives, or stays as large as the graph says."""

    def __init__(self, facts: Facts, session: Any, tokenizer: Any, chunk: int) -> None:
        self._peaks: dict[str, float] = {}
        super().__init__(facts, session, tokenizer, chunk)

    def reset(self) -> None:
        """Begin a new sequence with an empty cache."""
        self._length, self._past = 0, empty_cache(self._given.values())

    def peaks(self) -> dict[str, float]:
        """The largest magnitude so far of each value that the device holds as float16, by its name."""
        return dict(self._peaks)

    def _run(self, ids: Sequence[int], logits: Logits) -> None:
        count = len(ids)
        feed = inputs_of(self._given, ids, self._length, len(logits)) | self._past
        try:
            found = dict(zip(self._names, self._session.run(None, feed), strict=True))
        except Exception as error:  # its own tree, rooted in Exception
            raise RuntimeCrash(
                f"onnxruntime cannot run {count} tokens at position {self._length}: {error}"
            ) from error
        logits[:] = found.pop("logits")[0]
        for name in [name for name in found if name.endswith(_PEAK)]:
            stable, peak = name.removesuffix(_PEAK), float(found.pop(name))
            self._peaks[stable] = max(peak, self._peaks.get(stable, 0.0))
        self._past = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        self._length += count


def empty_cache(given: Any) -> dict[str, npt.NDArray[Any]]:
    """Zeros for the past of every layer: of no tokens where a graph's cache grows, of its context where it does not."""
    return {
        each.name: np.zeros(
            (1, each.shape[1], each.shape[2] if isinstance(each.shape[2], int) else 0, each.shape[3]),
            _TYPES[each.type],
        )
        for each in given
        if each.name.startswith("past_")
    }


def inputs_of(given: Any, ids: Sequence[int], past: int, wanted: int) -> dict[str, npt.NDArray[np.int64]]:
    """What a step of one sequence is given beside its cache.

    Args:
        given: the graph's inputs by name.
        ids: the new tokens.
        past: how many came before.
        wanted: of how many of the last tokens logits are wanted; at least one row is computed.
    """
    count = len(ids)
    total, places = past + count, np.arange(past, past + count)
    room = given["attention_mask"].shape[1]
    mask = np.zeros((1, room if isinstance(room, int) else total), np.int64)
    mask[:, :total] = 1
    found = {
        "input_ids": np.array([list(ids)], np.int64),
        "position_ids": places[None],
        "attention_mask": mask,
        "cache_position": places,
        "logits_at": np.arange(count - wanted, count),
    }
    return {name: value for name, value in found.items() if name in given}


def open_session(
    directory: str,
    context: int,
    graph: str | None = None,
    peaks: str | None = None,
    threads: int | None = None,
    chunk: int = 512,
) -> OnnxTyped:
    """Load ``model.onnx`` and its data on the CPU, which computes float16 as float32 where it has no kernels for it.

    Args:
        directory: where they stand, with ``tokenizer.json``.
        context: most tokens of a sequence; no more than the graph was made for.
        graph: path of another graph over the same data; None: ``model.onnx``.
        peaks: path of a graph whose float16 values are looked at in this one, which has them in float32; None: of none.
        threads: None: as many as this process has cores.
        chunk: most tokens of a prompt that are computed at once.

    Raises:
        MissingToolchain: onnxruntime is not installed. PackageError: no such file, or no ONNX model.
        RuntimeCrash: onnxruntime refuses the model; in its own words.
    """
    model = Path(graph) if graph else Path(directory) / "model.onnx"
    if not model.is_file():
        raise PackageError(f"{model} is absent; onnxruntime has nothing to load.")
    check_size(model)
    tokenizer = tokenizer_of(directory)
    before, begin = psutil.Process().memory_info().rss, perf_counter()
    content = _runnable(model, Path(peaks) if peaks else None)
    loaded, version, device = load_graph(directory, model, content, threads, _SETTINGS)
    load_s = perf_counter() - begin
    facts = Facts(version, device, load_s, 0, context, emulated=True)
    session = OnnxTyped(facts, loaded, tokenizer, chunk)
    session.decode(0)
    session.reset()
    session._peaks = {}
    resident = max(0, psutil.Process().memory_info().rss - before)
    session.facts = replace(facts, resident_bytes=resident)
    return session


def _runnable(path: Path, shipped: Path | None) -> bytes:
    """A graph as onnxruntime runs it on a CPU, and with the peaks of what the shipped one has in float16."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's
        raise PackageError(f"{path} is not an ONNX model: {error}.") from error
    if shipped:
        _add_peaks(model, shipped)
    _replace_e2m1(model.graph)
    content: bytes = model.SerializeToString()
    return content


def _add_peaks(model: Any, shipped: Path) -> None:
    import onnx

    typed = onnx.shape_inference.infer_shapes(onnx.load(shipped, load_external_data=False))
    values = (*typed.graph.value_info, *typed.graph.output)
    half = {each.name for each in values if each.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    half |= {name.removesuffix(".float16") for name in half}
    nodes = []
    for name in named_values(model):
        if name in half:
            absolute, peak = f"{name}.abs", f"{name}{_PEAK}"
            nodes.append(onnx.helper.make_node("Abs", [name], [absolute]))
            nodes.append(onnx.helper.make_node("ReduceMax", [absolute], [peak], keepdims=0))
            model.graph.output.append(onnx.helper.make_tensor_value_info(peak, onnx.TensorProto.FLOAT, []))
    model.graph.node.extend(nodes)


def _replace_e2m1(graph: Any) -> None:
    """E2M1, of which onnxruntime has no kernels: the same bytes as integers choose the levels."""
    import onnx

    make, kinds = onnx.helper.make_node, onnx.TensorProto
    narrow = {each.name: each for each in graph.initializer if each.data_type == kinds.FLOAT4E2M1}
    if not narrow:
        return
    nodes, constants = list(graph.node), {each.name: each for each in graph.initializer}
    del graph.node[:]
    for node in nodes:
        if node.op_type != "DequantizeLinear" or node.input[0] not in narrow:
            graph.node.append(node)
            continue
        name, codes = node.output[0], narrow[node.input[0]]
        codes.data_type = kinds.UINT4
        axis, block = (
            next(each.i for each in node.attribute if each.name == key) for key in ("axis", "block_size")
        )
        shape = list(codes.dims)
        blocks = [*shape[:axis], shape[axis] // block, block, *shape[axis + 1 :]]
        given = {
            "levels": E2M1,
            "whole": np.array(shape),
            "blocks": np.array(blocks),
            "axes": np.array([axis + 1]),
        }
        for part, values in given.items():
            if f"e2m1.{name}.{part}" not in constants:
                graph.initializer.append(onnx.numpy_helper.from_array(values, f"e2m1.{name}.{part}"))

        def at(part: str, name: str = name) -> str:
            return f"e2m1.{name}.{part}"

        graph.node.extend(
            [
                make("Cast", [codes.name], [at("index")], to=kinds.INT32),
                make("Gather", [at("levels"), at("index")], [at("gathered")]),
                make("CastLike", [at("gathered"), node.input[1]], [at("typed")]),
                make("Reshape", [at("typed"), at("blocks")], [at("blocked")]),
                make("Unsqueeze", [node.input[1], at("axes")], [at("scales")]),
                make("Mul", [at("blocked"), at("scales")], [at("scaled")]),
                make("Reshape", [at("scaled"), at("whole")], [name]),
            ]
        )


class TracedTyped(TracedOnnx):
    """A TracedSession on onnxruntime; see ``open_traced``."""

    rounding = HALF

    def _feed(self, ids: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
        given = {each.name: each for each in self._session.get_inputs()}
        return inputs_of(given, ids, 0, len(ids)) | empty_cache(given.values())


def open_traced(directory: str, context: int, threads: int | None = None) -> TracedTyped:
    """Load ``model.onnx`` with every named value in sight; the file stays as it is.

    Raises:
        MissingToolchain: onnxruntime or onnx is not installed. PackageError: no such file, or no ONNX model.
        RuntimeCrash: onnxruntime refuses the model; in its own words.
    """
    model = Path(directory) / "model.onnx"
    graph, operators = observed(model, _replace_e2m1)
    begin = perf_counter()
    session, version, device = load_graph(directory, model, graph, threads, _SETTINGS)
    facts = Facts(version, device, perf_counter() - begin, 0, context, emulated=True)
    return TracedTyped(facts, session, tokenizer_of(directory), operators)
