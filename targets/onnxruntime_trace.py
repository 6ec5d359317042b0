"""What onnxruntime computes on its way, by the graph's own names: every named value becomes an output of the graph, in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from tapeout.errors import MissingToolchain, PackageError, TapeoutError
from tapeout.exporters.onnx import check_size
from tapeout.models.graph import inside
from tapeout.targets.onnxruntime import load_graph, ran, tokenizer_of
from tapeout.validate.given import encoded
from tapeout.validate.primitives import save
from tapeout.validate.session import Facts, Shown

__all__ = ["TracedOnnx", "open_traced"]


class TracedOnnx:
    """A TracedSession on onnxruntime; see ``open_traced``."""

    facts: Facts
    rounding = 0.0  # of the graph's own narrower type, relative

    def __init__(self, facts: Facts, session: Any, tokenizer: Any, operators: Mapping[str, str]) -> None:
        self.facts = facts
        self._session, self._tokenizer, self._operators = session, tokenizer, operators
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._encodes = "tapeout.output" in session.get_modelmeta().custom_metadata_map

    def trace(self, ids: Sequence[int], out: str) -> dict[str, Shown]:
        """As TracedSession says."""
        tokens = len(ids)
        if not 1 <= tokens <= self.facts.context:
            raise TapeoutError(f"{tokens} tokens do not fit the context of {self.facts.context}.")
        names = list(self._operators)
        values = ran(self._session, names, self._feed(ids))
        found: dict[str, Shown] = {}
        for name, value in zip(names, values, strict=True):
            stable = _stable(name, self._operators[name])
            if value.dtype not in (np.float32, np.float16) or stable in found:
                continue
            value = value.astype(np.float32, copy=False)
            array = value[0] if value.ndim > 2 and len(value) == 1 else value
            if name.startswith("present."):  # [heads, tokens, width]
                array = array.transpose(1, 0, 2).reshape(tokens, -1)
            if name.endswith(_SCORES):
                array = np.where(array == 0, np.nan, array)  # nothing is written where the mask is
            if save(out, stable, array):
                found[stable] = Shown(self._operators[name], self.rounding)
        return found

    def _feed(self, ids: Sequence[int]) -> dict[str, Any]:
        feed: dict[str, Any] = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
        }
        for each in self._session.get_inputs():
            if each.name.startswith("past_"):
                feed[each.name] = np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
        return feed

    def tokenize(self, text: str) -> list[int]:
        """Token ids as the deployed session gives them."""
        encoded(text)
        return list(self._tokenizer.encode(text, add_special_tokens=self._encodes).ids)

    def close(self) -> None:
        """Free the model; may be called twice."""
        self._session = None


_SCORES = ".scores"
_PARTS = ("embedding", "layers.", "norm", "head", "logits", "pooled", "dense", "sentence_embedding", "last_hidden_state")  # fmt: skip
"""What the graph's own names begin with; everything else is made of constants, or of places."""


def _stable(name: str, operator: str) -> str:
    """The graph's own name of a value of the file."""
    if name.startswith("present."):
        return inside(f"layers.{name.split('.')[1]}.attention.context", "rope")
    attention = name.partition(".context")[0] + ".context"
    if name.endswith(_SCORES):
        return inside(attention, "scores")
    made = operator in ("RotaryEmbedding", "Reshape")  # by a node of its own, or written out
    if name == f"{attention}.k.turned" or (made and name == f"{attention}.k"):
        return inside(attention, "rope")
    return name


def named_values(model: Any) -> list[str]:
    """Values of a graph that have a name of ours, in the order of their making."""
    return [name for node in model.graph.node for name in node.output if name.startswith(_PARTS)]


def _observed(model: Any) -> dict[str, str]:
    """Make every named value of a graph one of its outputs; return their names in order with the operator that makes each.

    Matmuls are told to leave their inputs alone, and windows to drop nothing: one sequence is run at once.
    """
    import onnx

    operators: dict[str, str] = {}
    _cut_heads(model.graph)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("accuracy_level", "sliding_window_cache"):
                attribute.i = 0
        if node.op_type == "GroupQueryAttention":
            operators[node.output[1]] = node.op_type  # keys as they are cached
            node.output.append(f"{node.output[0]}{_SCORES}")
            node.attribute.append(onnx.helper.make_attribute("qk_output", 1))
        for name in reversed(node.output):  # a skip-norm gives its sum last
            if name.startswith(_PARTS):
                operators[name] = node.op_type
    given = {each.name for each in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in operators if name not in given)
    return operators


def _cut_heads(graph: Any) -> None:
    """Queries, keys and values that attention takes as one value: cut before it, to be seen by their names."""
    import onnx

    widths = {
        each.name: each.type.tensor_type.shape.dim[3].dim_value
        for each in graph.input
        if each.name.startswith("past_")
    }
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type == "GroupQueryAttention" and not node.input[1]:
            said = {each.name: each.i for each in node.attribute}
            at = node.output[0].removesuffix("context")
            heads = np.array([said["num_heads"], *[said["kv_num_heads"]] * 2], np.int64)
            graph.initializer.append(
                onnx.numpy_helper.from_array(heads * widths[node.input[3]], f"{at}qkv.sizes")
            )
            names = [f"{at}{part}" for part in "qkv"]
            graph.node.append(
                onnx.helper.make_node("Split", [node.input[0], f"{at}qkv.sizes"], names, axis=-1)
            )
            node.input[:3] = names
        graph.node.append(node)


def observed(model: Path, change: Callable[[Any], None] = lambda _: None) -> tuple[bytes, dict[str, str]]:
    """A file's graph with every named value in sight, and these values' names in order with the operator that makes each.

    Args:
        model: the file.
        change: what makes its graph one that onnxruntime runs.

    Raises:
        MissingToolchain: onnx is not installed. PackageError: no such file, or no ONNX model.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingToolchain(f"onnx cannot be loaded ({error}): pip install 'tapeout[onnx]'") from error
    if not model.is_file():
        raise PackageError(f"{model} is absent; onnxruntime has nothing to load.")
    check_size(model)
    try:
        graph = onnx.load(model, load_external_data=False)
    except Exception as error:  # protobuf's
        raise PackageError(f"{model} is not an ONNX model: {error}.") from error
    change(graph.graph)
    operators = _observed(graph)
    return graph.SerializeToString(), operators


def open_traced(directory: str, context: int, threads: int | None = None) -> TracedOnnx:
    """Load ``model.onnx`` with every named value in sight, and without the rounding of inputs; the file stays as it is.

    Raises:
        MissingToolchain: onnxruntime or onnx is not installed. PackageError: no such file, or no ONNX model.
        RuntimeCrash: onnxruntime refuses the model; in its own words.
    """
    model = Path(directory) / "model.onnx"
    graph, operators = observed(model)
    begin = perf_counter()
    session, version, device = load_graph(directory, model, graph, threads)
    facts = Facts(version, device, perf_counter() - begin, 0, context)
    return TracedOnnx(facts, session, tokenizer_of(directory), operators)
