"""Codes in a graph that others made: its nodes as they are, but for the products and lookups whose weights have codes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from tapeout.errors import PackageError
from tapeout.exporters.onnx.contrib import ContribOps
from tapeout.exporters.onnx.emitter import Value
from tapeout.exporters.onnx.graph import Graph, library
from tapeout.models import Role, TracedConfig
from tapeout.models.traced import chain
from tapeout.quantize import Quantized

_SOME = 5  # names in a note


class Placed(ContribOps):
    """onnxruntime's operators for a matrix's uses, whatever its container."""

    def linear(self, name: str, x: Value, weight: str, bias: str | None) -> str:
        """Written at once: the nodes around it are others'."""
        return self._use(super().linear(name, x, weight, bias))

    def _wanted(self, name: str, x: Value) -> str:
        return self._use(x)


def place(quant: Quantized, *, exact: bool) -> Graph:
    """The graph; ``exact``: as in ``writer.exact_graph``.

    Raises:
        PackageError: the graph that was kept is no ONNX.
    """
    onnx = library()
    config = quant.model.config
    assert isinstance(config, TracedConfig)
    try:
        source = onnx.load(config.graph)
    except Exception as error:  # protobuf's own, which are no tree
        raise PackageError(
            f"{config.graph} cannot be read: {error}. Delete {config.directory} and run again."
        ) from error
    opset = next(each.version for each in source.opset_import if each.domain in ("", "ai.onnx"))
    graph = Graph(quant, name=quant.model.name, opset=opset)
    ops = Placed(graph, config.max_position_embeddings, exact)
    weights = {name for name, spec in quant.model.specs.items() if spec.role.is_matrix}
    graph.inputs += [value for value in source.graph.input if value.name not in quant.model.specs]
    graph.outputs += source.graph.output
    for proto in source.graph.initializer:
        graph.array(proto.name, onnx.numpy_helper.to_array(proto))
    origin = {name: name for name in weights}
    for node in source.graph.node:
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        if node.input and node.input[0] in origin and chain(node.domain, node.op_type, attributes):
            origin[node.output[0]] = origin[node.input[0]]
            continue
        _put(ops, node, origin)
    for name, spec in quant.model.specs.items():
        if spec.role not in (Role.LINEAR, Role.HEAD, Role.EMBEDDING):
            graph.vector(name)
    for text in _notes(quant, config):
        graph.note(text)
    return graph


def _put(ops: Placed, node: Any, origin: dict[str, str]) -> None:
    """A node, or what takes its place."""
    out = node.output[0] if node.output else ""
    if node.domain == "" and node.op_type == "Gather" and node.input[0] in origin:
        ops.embedding(out, node.input[1], origin[node.input[0]], 1.0)
    elif node.domain == "" and node.op_type == "MatMul" and node.input[1] in origin:
        ops.linear(out, node.input[0], origin[node.input[1]], None)
    elif node.domain == "" and node.op_type == "Gemm" and node.input[1] in origin:
        product = f"{out}.product" if len(node.input) > 2 else out
        ops.linear(product, node.input[0], origin[node.input[1]], None)
        if len(node.input) > 2:  # not the kernel's own bias: it may be one that is shared, or computed
            ops.graph.node("Add", [product, node.input[2]], out)
    else:
        ops.graph.nodes.append(node)


def _notes(quant: Quantized, config: TracedConfig) -> Iterator[str]:
    yield f"the graph was made by {config.road} ({config.maker}); the codes were put in the place of its weights"
    floats = {
        name: math.prod(spec.shape)
        for name, spec in quant.model.specs.items()
        if spec.role is Role.OTHER and len(spec.shape) > 1
    }
    if floats:
        share = sum(floats.values()) / sum(math.prod(spec.shape) for spec in quant.model.specs.values())
        yield f"{_some(floats)} stay float ({share:.0%} of the weights): the graph does not multiply with them as a linear layer does"
    if config.folded:
        yield f"{config.road} has made constants of {_some(config.folded)}, or has left them out; they are not read back"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SOME} more" if len(listed) > _SOME else ""
    return ", ".join(listed[:_SOME]) + more
