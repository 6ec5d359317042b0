"""A graph in the making: nodes, and initializers whose bytes stand in one data file, by the tensors that they are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import MissingToolchain, PackageError, SchemeError
from tapeout.exporters import Refused
from tapeout.exporters.onnx.blocks import Container, NBits, as_held, carries, container_of
from tapeout.models import SourceTensor
from tapeout.quantize import Quantized, QuantTensor

DATA = "model.onnx.data"
DOMAIN = "com.microsoft"
OPSET = 23

_INLINE = 256  # bytes of a constant that stands in the graph itself
_PAGE, _LINE = (
    4096,
    64,
)  # what large and small tensors are aligned to in the data file, so that they can be mapped
_LARGE = 1 << 20
_MOST = 2**31  # bytes of a protobuf message

FLOATS = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16"}
BITS = {
    "FLOAT": 32,
    "FLOAT16": 16,
    "BFLOAT16": 16,
    "FLOAT8E4M3FN": 8,
    "UINT8": 8,
    "INT8": 8,
    "UINT4": 4,
    "INT4": 4,
    "FLOAT4E2M1": 4,
    "BOOL": 8,
    "INT32": 32,
    "INT64": 64,
    "DOUBLE": 64,
}


def library() -> ModuleType:
    """The format owner's library; MissingToolchain says how to get it."""
    try:
        import onnx
    except ImportError:
        raise MissingToolchain("ONNX files need the onnx library: pip install 'tapeout[onnx]'.") from None
    found: ModuleType = onnx
    return found


def check_size(path: Path) -> None:
    """PackageError for a graph that is too large for protobuf, before it is read."""
    if (size := path.stat().st_size) >= _MOST:
        raise PackageError(
            f"{path} has {size / 1e9:.2f} GB; a graph may have 2 GiB: its weights belong into external data, as tapeout writes them."
        )


@dataclass(frozen=True)
class Piece:
    """A run of the data file: a part of one tensor, or of several whose rows take turns.

    Attributes:
        sources: Hugging Face names of tensors of one shape.
        part: of their container (``codes``), or ``weight`` of floats.
        container: of all of them; None: ``kind`` is a float type.
        kind: ONNX type of the bytes.
        offset: in the data file; known when the graph is finished.
        shape: of the part of one tensor.
    """

    sources: tuple[str, ...]
    part: str
    container: Container | None
    kind: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the run."""
        return -(-len(self.sources) * math.prod(self.shape) * BITS[self.kind] // 8)


@dataclass
class Initializer:
    """A named constant: pieces one behind the other, or ``values``.

    Attributes:
        view_of: the initializer whose bytes these are too, in another shape.
        at: where in those bytes it begins.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pieces: list[Piece] = field(default_factory=list)
    values: npt.NDArray[Any] | None = None
    view_of: str | None = None
    at: int = 0
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the constant."""
        return -(-math.prod(self.shape) * BITS[self.kind] // 8)


@dataclass
class Graph:
    """Nodes and initializers of a model whose weights are ``quant``'s.

    Attributes:
        containers: of each tensor that was asked for, by its Hugging Face name.
        others: graphs over the same initializers, by the files that they stand in.
        notes: what a user has to know.
        name: of the whole.
        opset: of the standard operators.
        names: of the nodes.
    """

    quant: Quantized
    nodes: list[Any] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    initializers: dict[str, Initializer] = field(default_factory=dict)
    constants: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    containers: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    name: str = "decoder"
    opset: int = OPSET
    others: dict[str, Graph] = field(default_factory=dict)
    shares: bool = False  # initializers with another: it then holds those alone that its nodes use

    def other(self, file: str) -> Graph:
        """Begin another graph, whose initializers are these too."""
        self.shares = True
        self.others[file] = Graph(
            self.quant,
            initializers=self.initializers,
            containers=self.containers,
            notes=self.notes,
            opset=self.opset,
            shares=True,
        )
        return self.others[file]

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        outputs: Sequence[str] = (),
        *,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node; its outputs are ``name`` or what is given; return the first."""
        out = list(outputs) or [name]
        self.names.add(name)
        self.nodes.append(
            library().helper.make_node(op, list(inputs), out, name=name, domain=domain, **attributes)
        )
        return out[0]

    def constant(self, name: str, values: npt.NDArray[Any]) -> str:
        """A small constant, in the graph itself; the same name means the same values."""
        self.constants[name] = values
        return name

    def table(self, name: str, values: npt.NDArray[np.float32]) -> str:
        """A large constant that is no weight of the model, float32."""
        return self.array(name, values)

    def array(self, name: str, values: npt.NDArray[Any]) -> str:
        """A constant of any type that is no weight of the model; a large one stands in the data file."""
        kind = library().helper.np_dtype_to_tensor_dtype(values.dtype)
        kind = library().TensorProto.DataType.Name(kind)
        if values.nbytes <= _INLINE or kind not in BITS:
            return self.constant(name, values)
        self.initializers[name] = Initializer(name, kind, values.shape, values=values)
        return name

    def vector(self, source: str) -> str:
        """A tensor that the graph takes as float32, whatever the checkpoint has."""
        if source not in self.initializers:
            self._float(source, "FLOAT")
        return source

    def vectors(self, name: str, sources: Sequence[str]) -> str:
        """Tensors of one axis, one behind the other, as float32."""
        pieces = []
        for source in sources:
            pieces.append(Piece((source,), "weight", None, "FLOAT", self.quant.model.specs[source].shape))
            self.containers[source] = "F32"
        shape = (sum(piece.shape[0] for piece in pieces),)
        self.initializers[name] = Initializer(name, "FLOAT", shape, pieces)
        return name

    def floats(self, source: str) -> str:
        """A float matrix [out, in] in the checkpoint's own type."""
        if source not in self.initializers:
            tensor = self.quant[source]
            kind = FLOATS[tensor.dtype] if isinstance(tensor, SourceTensor) else "FLOAT"
            self._float(source, kind)
        return source

    def is_float32(self, source: str) -> bool:
        """Whether ``floats`` of this tensor gives float32."""
        return self.initializers[source].kind == "FLOAT"

    def _float(self, source: str, kind: str) -> None:
        shape = tuple(self.quant.model.specs[source].shape)
        piece = Piece((source,), "weight", None, kind, shape)
        self.initializers[source] = Initializer(source, kind, shape, [piece])
        self.containers[source] = {v: k for k, v in FLOATS.items()}[kind]

    def container(self, source: str) -> Container | None:
        """The container of a tensor; None: it is float here, with a note if that is not its scheme."""
        spec = self.quant.model.specs[source]
        scheme, shape = as_held(self.quant.schemes[source], spec.role), spec.shape
        if scheme.kind == "none":
            return None
        carry = carries(scheme)
        if isinstance(carry, Refused):
            raise SchemeError(f"{source} is {scheme}: {carry.reason} What fits: {carry.nearest}.")
        found = container_of(scheme, shape[-1])
        if found is None:
            self.note(f"{source} is float32: no block of {scheme} divides its rows of {shape[-1]} weights")
        if isinstance(found, NBits) and found.zero_point:
            tensor = self.quant[source]
            assert isinstance(tensor, QuantTensor)
            assert tensor.zero_point is not None
            if tensor.zero_point.max(initial=0) >= 2**found.bits:  # GPTQ has zero points one beyond the codes
                found = NBits(8, found.block, zero_point=True)
        return found

    def note(self, text: str) -> None:
        """Tell the user something, once."""
        if text not in self.notes:
            self.notes.append(text)

    def part(
        self,
        name: str,
        part: str,
        container: Container,
        groups: Sequence[Sequence[str]],
        shape: tuple[int, ...],
    ) -> str:
        """One part of tensors: those of a group take turns by rows, groups follow one another; in this shape as a whole."""
        if name not in self.initializers:
            pieces = []
            for group in groups:
                out, into = self.quant.model.specs[group[0]].shape
                kind, each = container.shapes(out, into)[part]
                pieces.append(Piece(tuple(group), part, container, kind, each))
                for source in group:
                    self.containers[source] = container.kind
            self.initializers[name] = Initializer(name, pieces[0].kind, shape, pieces)
        return name

    def view(self, name: str, of: str, shape: tuple[int, ...], at: int = 0, kind: str | None = None) -> str:
        """The bytes of an initializer, or some of them, under another name and in another shape, or as another type."""
        base = self.initializers[of]
        if shape == base.shape and kind in (None, base.kind):
            return of
        if name not in self.initializers:
            self.initializers[name] = Initializer(name, kind or base.kind, shape, view_of=of, at=at)
        return name

    def rename(self, value: str, name: str) -> str:
        """Give a value that a node has made another name; return it."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for at, each in enumerate(names):
                    if each == value:
                        names[at] = name
        return name

    def finish(self) -> int:
        """Drop what no output needs, and give every initializer its place in the data file; return the file's length in bytes."""
        self._prune()
        end = 0
        for each in self.initializers.values():
            if each.view_of:
                continue
            end += -end % (_PAGE if each.nbytes >= _LARGE else _LINE)
            each.offset = end
            pieces = []
            for piece in each.pieces:
                pieces.append(Piece(**{**piece.__dict__, "offset": end}))
                end += piece.nbytes
            each.pieces = pieces
            end = each.offset + each.nbytes
        for each in self.initializers.values():
            if each.view_of:
                each.offset = self.initializers[each.view_of].offset + each.at
        return end

    def _prune(self) -> None:
        wanted = {value.name for value in (*self.outputs, *self.inputs)}
        kept = []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                kept.append(node)
                wanted |= _taken(node)
        self.nodes = kept[::-1]
        self.constants = {name: values for name, values in self.constants.items() if name in wanted}
        for each in self.others.values():
            each._prune()
            wanted |= {name for node in each.nodes for name in node.input}
        if self.others or not self.shares:  # the one that others share with
            unused = [
                name
                for name, each in self.initializers.items()
                if each.values is not None and name not in wanted
            ]
            for name in unused:
                del self.initializers[name]

    def model(self, metadata: Mapping[str, str]) -> bytes:
        """The model's bytes: the same graph gives the same; ``finish`` comes first."""
        onnx = library()
        helper = onnx.helper
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs)
        for name, values in self.constants.items():
            graph.initializer.append(onnx.numpy_helper.from_array(values, name))
        used = {name for node in self.nodes for name in node.input}
        for each in self.initializers.values():
            if self.shares and each.name not in used:
                continue
            proto = graph.initializer.add(name=each.name, dims=each.shape)
            proto.data_type = onnx.TensorProto.DataType.Value(each.kind)
            proto.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", DATA), ("offset", each.offset), ("length", each.nbytes)):
                proto.external_data.add(key=key, value=str(value))
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [
            helper.make_opsetid(each, 1) for each in sorted({node.domain for node in self.nodes} - {""})
        ]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="tapeout", ir_version=10)
        helper.set_model_props(model, dict(metadata))
        data: bytes = model.SerializeToString(deterministic=True)
        return data


def _taken(node: Any) -> set[str]:
    """Names that a node takes, in its branches and loops too."""
    found = set(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for each in graph.node:
                found |= _taken(each)
            found |= {value.name for value in graph.output}
    return found
