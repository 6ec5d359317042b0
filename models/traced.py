"""A model whose graph others made: torch.export of a plain module, or optimum for a family that has no file here.

The graph is kept as ONNX (``graph.onnx``) whose weights are inputs under the checkpoint's names, in the checkpoint's orientation:
nothing can fold them into something else, and an exporter puts codes in their place. ``graph.json`` says what each is used for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tapeout.errors import MissingToolchain, ModelError, PackageError
from tapeout.files import canonical_json
from tapeout.models.checkpoint import Checkpoint
from tapeout.models.decoder import Role, TensorSpec

__all__ = [
    "GRAPH",
    "Road",
    "Tensor",
    "TracedConfig",
    "Use",
    "chain",
    "libraries",
    "read",
    "specs",
    "tidy",
    "uses",
    "write",
]

GRAPH, FACTS = "graph.onnx", "graph.json"
FORMAT_VERSION = 1

Road = Literal["torch.export", "optimum"]

_MOVES = frozenset(
    {"Reshape", "Cast", "Identity", "Flatten", "Squeeze", "Unsqueeze"}
)  # of ids on their way to a table
_POSITIONS = "position_ids"
_LOGITS = "logits"


@dataclass(frozen=True)
class Tensor:
    """A weight that the graph takes.

    Attributes:
        role: what all its uses together make it.
        turned: the checkpoint has it as [in, out].
        multiplied: of a table that is looked up, whether it is a matmul's factor too.
    """

    role: Role
    turned: bool = False
    multiplied: bool = False


@dataclass(frozen=True)
class TracedConfig:
    """What is known of a model whose graph others made; of a plain module hardly more than the graph.

    Attributes:
        family: ``model_type``; of a module its class.
        road: who made the graph.
        maker: names and versions of the tools.
        directory: of ``graph.onnx``.
        tensors: of every weight that the graph takes, by the checkpoint's name.
        same: weights that the checkpoint has under two names, the one that is left out → the one that is kept.
        folded: floats of the checkpoint that the graph has as constants of its own, or not at all.
        max_position_embeddings: longest context, in tokens; 0 of a module.
        cache_values: numbers that the cache keeps of a token.
        scales: of a module, the deviation of each output on its samples: what differences are measured in.
    """

    family: str
    road: Road
    maker: str
    directory: Path
    tensors: Mapping[str, Tensor]
    same: Mapping[str, str]
    folded: tuple[str, ...]
    max_position_embeddings: int = 0
    vocab_size: int = 0
    hidden_size: int = 0
    num_layers: int = 0
    num_heads: int = 0
    cache_values: int = 0
    eos_token_id: int | tuple[int, ...] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    scales: tuple[float, ...] = ()

    @property
    def graph(self) -> Path:
        """The ONNX file."""
        return self.directory / GRAPH

    @property
    def is_module(self) -> bool:
        """Whether it takes arrays and gives arrays, and knows no tokens."""
        return self.road == "torch.export"

    @property
    def sliding_window(self) -> None:
        """None that is known: the graph does what it does."""

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether a table that is looked up is multiplied with too."""
        return any(each.multiplied for each in self.tensors.values())


def libraries() -> tuple[Any, Any]:
    """onnx_ir and onnxscript's optimizer; MissingToolchain says how to get them."""
    try:
        import onnx_ir
        import onnxscript.optimizer
    except ImportError as error:
        raise MissingToolchain(
            f"graphs that others made need onnx_ir and onnxscript ({error}): pip install 'tapeout[onnx]'."
        ) from None
    return onnx_ir, onnxscript.optimizer


@dataclass
class Tidied:
    """What ``tidy`` gives: the model, and the fields of TracedConfig that follow from it."""

    model: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    folded: tuple[str, ...] = ()


def tidy(
    model: Any, shapes: Mapping[str, tuple[int, ...]], values: Callable[[str], npt.NDArray[np.float32]]
) -> Tidied:
    """Make inputs of a graph's weights, simplify what is left, and find out what each weight is used for.

    A weight is recognised by its values, bit for bit, so that it does not matter how the maker calls it or whether it has turned it.

    Args:
        model: an ``onnx_ir.Model`` with its weights; it is changed.
        shapes: of the checkpoint's tensors, by name. values: gives one as float32 [shape].

    Raises:
        MissingToolchain: onnx_ir or onnxscript is not installed.
    """
    ir, optimizer = libraries()
    from onnx_ir.passes import common

    common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    found = Tidied(model)
    matched = _matched(model.graph, shapes, values, found)
    _as_inputs(ir, model.graph, matched)
    common.IdentityEliminationPass()(model)
    optimizer.optimize_ir(model, inline=False)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    for value in model.graph.inputs:
        if value.name in shapes:
            found.tensors[value.name] = _tensor(value)
    found.folded = tuple(name for name in shapes if name not in found.tensors and name not in found.same)
    for name in [name for name, kept in found.same.items() if kept not in found.tensors]:
        del found.same[name]
    return found


_Matched = list[tuple[Any, str, bool]]
"""Initializers, each with the tensor that it holds, and whether it holds it turned."""


def _matched(
    graph: Any,
    shapes: Mapping[str, tuple[int, ...]],
    values: Callable[[str], npt.NDArray[np.float32]],
    found: Tidied,
) -> _Matched:
    floats = {
        name: value
        for name, value in graph.initializers.items()
        if value.const_value is not None
        and value.const_value.dtype.name == "FLOAT"
        and value.const_value.size
    }
    held: dict[tuple[int, ...], dict[bytes, list[str]]] = {}
    for name, value in floats.items():
        array = value.const_value.numpy()
        held.setdefault(tuple(array.shape), {}).setdefault(_digest(array), []).append(name)
    matched: _Matched = []
    taken: set[str] = set()
    first: dict[tuple[tuple[int, ...], bytes], str] = {}
    for name, shape in shapes.items():
        candidates = {*held.get(shape, {}), *held.get(shape[::-1], {})}
        if not candidates:
            continue
        array = values(name)
        digest = _digest(array)
        if (kept := first.setdefault((shape, digest), name)) != name:
            found.same[name] = kept
        one = [(held.get(shape, {}).get(digest, ()), False)]
        if len(shape) == 2:
            one.append((held.get(shape[::-1], {}).get(_digest(array.T), ()), True))
        for names, turned in one:
            for each in names:
                # Of small ones the name decides: a vector of ones is no proof.
                if each not in taken and (len(shape) > 1 or _called(each, name, kept)):
                    taken.add(each)
                    matched.append((floats[each], kept, turned))
    return matched


def _called(initializer: str, *names: str) -> bool:
    """Whether an initializer has one of these names, a model's prefix left out or not."""
    return initializer in names or initializer.partition(".")[2] in names


def _as_inputs(ir: Any, graph: Any, matched: _Matched) -> None:
    """Replace each initializer by an input of the tensor's name, turned where it holds the tensor turned."""
    inputs: dict[str, Any] = {}
    turned: dict[str, Any] = {}
    for value, _, _ in matched:
        del graph.initializers[value.name]
        value.name = None
    for value, name, is_turned in matched:
        if name not in inputs:
            shape = value.shape[::-1] if is_turned else value.shape
            inputs[name] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
            graph.inputs.append(inputs[name])
        new = inputs[name]
        if is_turned:
            if name not in turned:
                attributes = [ir.AttrInt64s("perm", [1, 0])]
                node = ir.Node("", "Transpose", [new], attributes, name=f"{name}.turned")
                node.outputs[0].name = f"{name}.turned"
                graph.insert_before(graph[0], node)
                turned[name] = node.outputs[0]
            new = turned[name]
        ir.convenience.replace_all_uses_with(value, new, replace_graph_outputs=True)


@dataclass(frozen=True)
class Use:
    """One use of a weight.

    Attributes:
        kind: ``matmul`` (second factor of a MatMul or Gemm), ``gather`` (rows looked up), ``other``.
        turned: whether it is the weight turned.
    """

    kind: Literal["matmul", "gather", "other"]
    turned: bool
    node: Any = None


def uses(value: Any, *, turned: bool = False) -> Iterator[Use]:
    """Every use of a weight, through nodes that only turn or rename it."""
    if value.is_graph_output():
        yield Use("other", turned)
    value_graph = value.graph
    for node, index in value.uses():
        if node.graph is not value_graph:  # of a branch or a loop, where nothing is put
            yield Use("other", turned, node)
        elif chain(node.domain, node.op_type, _attributes(node)) and index == 0:
            yield from uses(node.outputs[0], turned=turned ^ (node.op_type == "Transpose"))
        elif node.domain == "" and node.op_type == "MatMul" and index == 1:
            yield Use("matmul", turned, node)
        elif node.domain == "" and node.op_type == "Gemm" and index == 1 and plain_gemm(_attributes(node)):
            yield Use("matmul", turned ^ bool(_attributes(node).get("transB", 0)), node)
        elif (
            node.domain == ""
            and node.op_type == "Gather"
            and index == 0
            and not _attributes(node).get("axis", 0)
        ):
            yield Use("gather", turned, node)
        else:
            yield Use("other", turned, node)


def chain(domain: str, op: str, attributes: Mapping[str, Any]) -> bool:
    """Whether a node only hands a matrix on, or turns it."""
    if domain:
        return False
    return op == "Identity" or (op == "Transpose" and list(attributes.get("perm", [1, 0])) == [1, 0])


def plain_gemm(attributes: Mapping[str, Any]) -> bool:
    """Whether a Gemm is a product and a sum, and nothing more."""
    return (
        attributes.get("alpha", 1.0) == 1.0
        and attributes.get("beta", 1.0) == 1.0
        and not attributes.get("transA", 0)
    )


def _attributes(node: Any) -> dict[str, Any]:
    return {
        name: each.value
        for name, each in node.attributes.items()
        if each.type.name in ("INT", "INTS", "FLOAT")
    }


def _tensor(value: Any) -> Tensor:
    """What a weight is: a matrix only where each of its uses is one that codes can serve."""
    found = list(uses(value))
    kinds = {use.kind for use in found}
    if len(value.shape) != 2 or not found or "other" in kinds:
        return Tensor(Role.OTHER)
    if any(use.kind == "gather" and use.turned for use in found):
        return Tensor(Role.OTHER)
    # A second factor is [in, out]: where the graph takes it unturned, the checkpoint has it so.
    stored = {not use.turned for use in found if use.kind == "matmul"}
    if kinds == {"gather"}:
        return Tensor(Role.EMBEDDING if all(_looks_up_ids(use.node) for use in found) else Role.POSITION)
    if len(stored) != 1 or ("gather" in kinds and stored != {False}):
        return Tensor(Role.OTHER)
    if "gather" in kinds:
        return Tensor(Role.EMBEDDING, multiplied=True)
    role = Role.HEAD if any(_gives_logits(use.node) for use in found) else Role.LINEAR
    return Tensor(role, stored.pop())


def _looks_up_ids(gather: Any) -> bool:
    """Whether a table's rows are chosen by what the model is given, and not by a token's place."""
    value = gather.inputs[1]
    while (node := value.producer()) is not None and node.op_type in _MOVES:
        value = node.inputs[0]
    return bool(value.is_graph_input()) and value.name != _POSITIONS


def _gives_logits(product: Any) -> bool:
    value = product.outputs[0]
    while (
        not value.is_graph_output()
        and len(value.uses()) == 1
        and value.uses()[0][0].op_type in (*_MOVES, "Add")
    ):
        value = value.uses()[0][0].outputs[0]
    return bool(value.is_graph_output()) and value.name == _LOGITS


def _digest(array: npt.NDArray[np.generic]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()


def write(directory: Path, tidied: Tidied, config: TracedConfig) -> None:
    """Write ``graph.onnx`` and, last, ``graph.json``."""
    ir, _ = libraries()
    proto = ir.serde.serialize_model(tidied.model)
    (directory / GRAPH).write_bytes(proto.SerializeToString(deterministic=True))
    facts = asdict(config) | {"format_version": FORMAT_VERSION}
    del facts["directory"]
    (directory / FACTS).write_text(canonical_json(facts), encoding="utf-8")


def read(directory: Path) -> TracedConfig:
    """Read ``graph.json``; PackageError when it is none, or of another version."""
    path = directory / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.pop("format_version") != FORMAT_VERSION:
            raise PackageError(f"{path} is of another version of tapeout: delete {directory} and run again.")
        facts["tensors"] = {
            name: Tensor(**each | {"role": Role(each["role"])}) for name, each in facts["tensors"].items()
        }
        facts |= {name: tuple(facts[name]) for name in ("folded", "scales")}
        if isinstance(facts["eos_token_id"], list):
            facts["eos_token_id"] = tuple(facts["eos_token_id"])
        return TracedConfig(directory=directory, **facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackageError(f"{path} cannot be read: {error!r}. Delete {directory} and run again.") from error


def specs(config: TracedConfig, checkpoint: Checkpoint) -> tuple[dict[str, TensorSpec], Checkpoint]:
    """Role and shape of every weight that the graph takes, in the checkpoint's order, and the checkpoint with matrices as [out, in].

    Raises:
        ModelError: the checkpoint lacks one.
    """
    if missing := sorted(config.tensors.keys() - checkpoint.keys()):
        raise ModelError(
            f"{checkpoint.directory} lacks {', '.join(missing[:3])}, which the graph in {config.directory} takes: delete that directory "
            "and run again."
        )
    tensors = dict(checkpoint)
    for name, each in config.tensors.items():
        if each.turned:
            tensors[name] = replace(tensors[name], shape=tensors[name].shape[::-1], turned=True)
    found = {
        name: TensorSpec(config.tensors[name].role, tensor.shape)
        for name, tensor in tensors.items()
        if name in config.tensors
    }
    return found, Checkpoint(checkpoint.directory, tensors)
