"""A program in the making: functions over constants whose bytes stand in one blob file, by the tensors that they are made of.

coremltools' Builder writes the operators and infers their types. It is given placeholders for the weights, which take no memory;
where the blobs of the true ones will lie is written into the program, and their bytes are streamed there afterwards. No pass runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import MissingToolchain, SchemeError
from tapeout.exporters import Refused
from tapeout.exporters.coreml.blob import TYPES, Layout, Place
from tapeout.exporters.coreml.blocks import FLOAT, Container, Lut, Opset, Shift, carries, container_of
from tapeout.models import Role
from tapeout.quantize import Quantized, QuantTensor

PACKAGE = "model.mlpackage"
SPEC = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
MANIFEST = "Manifest.json"
_IN_PROGRAM = "@model_path/weights/weight.bin"
_INLINE = 10  # numbers of a constant that stands in the program itself; as coremltools has it

Var = Any
"""A value of coremltools' Builder."""


def library() -> ModuleType:
    """The format owner's library; MissingToolchain says how to get it."""
    try:
        with quiet():
            import coremltools
    except Exception as error:  # of versions of numpy or torch that it does not bear: any kind
        raise MissingToolchain(
            f"Core ML packages need coremltools ({type(error).__name__}: {error}): pip install 'tapeout[apple]', or tapeout env create "
            "apple, an environment with the versions that it was tested with."
        ) from error
    found: ModuleType = coremltools
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what coremltools says of a torch that it does not know, and of what only a Mac has."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def mil_name(name: str) -> str:
    """The name of a value or a tensor in a program: an identifier, with two underscores for a dot."""
    return re.sub(r"\W", "_", name.replace(".", "__"))


@dataclass
class Blob:
    """A constant of the blob file: a part of tensors that lie one behind the other, or ``values``.

    Attributes:
        sources: Hugging Face names of tensors of one shape.
        part: of their container (``codes``), or ``weight`` of floats.
        container: of all of them; None: ``kind`` is a float type.
        kind: MIL's name of its type.
        shape: of all of it.
        rows: which rows of a tensor it holds; None: all.
        place: in the file, from when the program is finished.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    part: str = ""
    container: Container | None = None
    rows: npt.NDArray[np.int64] | None = None
    values: npt.NDArray[Any] | None = None
    place: Place | None = None


@dataclass
class Graph:
    """Functions of a model whose weights are ``quant``'s.

    Attributes:
        opset: the newest that may be used; None: as new as the schemes need.
        blobs: by the name of the constant.
        containers: of each tensor that was asked for, by its Hugging Face name.
        notes: what a user has to know.
    """

    quant: Quantized
    opset: Opset | None = None
    blobs: dict[str, Blob] = field(default_factory=dict)
    containers: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _functions: dict[str, Any] = field(default_factory=dict)
    _descriptions: dict[str, str] = field(default_factory=dict)
    _made: dict[str, Var] = field(default_factory=dict)  # constants of the function in the making
    _shared: dict[str, str] = field(default_factory=dict)  # of anonymous constants, by their bytes
    layout: Layout = field(default_factory=Layout)

    @property
    def newest(self) -> Opset:
        """The opset that the program is of."""
        if self.opset:
            return self.opset
        held = (container_of(scheme) for scheme in set(self.quant.schemes.values()))
        return "ios26" if any(each and each.opset == "ios26" for each in held) else "ios18"

    def function(
        self,
        name: str,
        inputs: Mapping[str, Any],
        states: Mapping[str, tuple[int, ...]],
        body: Callable[[Mapping[str, Var]], Sequence[Var]],
        descriptions: Mapping[str, str],
    ) -> None:
        """Write a function.

        Args:
            name: of it; the first is the default one.
            inputs: coremltools' ``TensorType`` of each.
            states: shape of each, float16.
            body: writes the operators, given inputs and states by name; gives the outputs.
            descriptions: of inputs, states and outputs.
        """
        ct = library()
        from coremltools.converters.mil.mil import Builder, Function, types

        if not self._functions:
            Builder.name_count.clear()  # names are numbered over all of a process's programs
        self._made = {}
        given = {
            key: Builder.placeholder(_symbols(each), _dtype(each, types)) for key, each in inputs.items()
        }
        given |= {
            key: Builder.state_tensor_placeholder(shape, dtype=types.fp16) for key, shape in states.items()
        }
        opset = {"ios18": ct.target.iOS18, "ios26": ct.target.iOS26}[self.newest]
        with quiet(), Function(given, opset_version=opset) as made:
            made.set_outputs(list(body(made.inputs)))
        names = Counter(var.name for op in made.operations for var in op.outputs)
        assert max(names.values()) == 1, names.most_common(3)
        made.input_types = list(inputs.values())
        self._functions[name] = made
        self._descriptions |= descriptions

    def constant(self, values: Any, name: str) -> Var:
        """A constant that is no weight; the same name means the same values."""
        from coremltools.converters.mil.mil import Builder

        if name not in self._made:
            array = np.asarray(values)
            if array.size >= _INLINE and str(array.dtype) in TYPES:
                self.blobs.setdefault(name, Blob(name, str(array.dtype), array.shape, values=array))
            self._made[name] = Builder.const(val=array, name=name)
        return self._made[name]

    def vector(self, source: str) -> Var:
        """A tensor that the graph takes as float32, whatever the checkpoint has."""
        self.containers[source] = "F32"
        return self._placeholder(
            Blob(
                mil_name(source), "float32", tuple(self.quant.model.specs[source].shape), (source,), "weight"
            )
        )

    def matrix(
        self,
        sources: Sequence[str],
        shape: tuple[int, ...] | None = None,
        rows: npt.NDArray[np.int64] | None = None,
        suffix: str = "",
    ) -> Var:
        """Matrices [out, in] as float16: one, or several of one shape and scheme as [tensors, out, in].

        Args:
            sources: Hugging Face names.
            shape: of the whole, where it is another; the last axis is ``in``.
            rows: those of a single matrix that are meant; None: all.
            suffix: tells parts of a matrix apart.
        """
        first = self.quant.model.specs[sources[0]]
        if first.role is Role.ROUTER:
            return self.vector(sources[0])
        out, into = first.shape
        shape = shape or ((out, into) if len(sources) == 1 else (len(sources), out, into))
        name = mil_name(sources[0] + suffix if len(sources) == 1 else f"{sources[0]}.and_{len(sources) - 1}")
        if name in self._made:
            return self._made[name]
        schemes, one = self.quant.schemes, sources[0]
        other = next((source for source in sources if schemes[source] != schemes[one]), None)
        if other:
            raise SchemeError(
                f"{one} is {schemes[one]} and {other} is {schemes[other]}: experts of a layer are one tensor, which has one scheme."
            )
        container = self._container(sources[0])
        kind = container.kind if container else FLOAT
        self.containers |= dict.fromkeys(sources, kind)
        if container is None:
            return self._placeholder(Blob(name, "float16", shape, tuple(sources), "weight", rows=rows))
        self._made[name] = self._dequantized(name, container, tuple(sources), shape, rows)
        return self._made[name]

    def _container(self, source: str) -> Container | None:
        scheme = self.quant.schemes[source]
        if scheme.kind == "none":
            return None
        carry = carries(scheme, self.opset)
        if isinstance(carry, Refused):
            raise SchemeError(f"{source} is {scheme}: {carry.reason} What fits: {carry.nearest}.")
        container = container_of(scheme, self.newest)
        assert container
        if isinstance(container, Shift) and container.zero_point:
            tensor = self.quant[source]
            assert isinstance(tensor, QuantTensor)
            assert tensor.zero_point is not None
            if (
                tensor.zero_point.max(initial=0) >= 2**container.bits
            ):  # GPTQ has zero points one beyond the codes
                container = Shift(container.bits, zero_point=True, wide=True)
        return container

    def _dequantized(
        self,
        name: str,
        container: Container,
        sources: tuple[str, ...],
        shape: tuple[int, ...],
        rows: npt.NDArray[np.int64] | None,
    ) -> Var:
        """The chain of operators that makes float16 of codes."""
        tensor = self.quant[sources[0]]
        assert isinstance(tensor, QuantTensor)
        out, into = tensor.shape
        parts = {}
        for part, (kind, (_, width)) in container.parts(out, into // tensor.group, into).items():
            blob = Blob(f"{name}_{part}", kind, (*shape[:-1], width), sources, part, container, rows)
            parts[part] = self._placeholder(blob)
        if isinstance(container, Lut):
            table = container.table().reshape(*[1] * len(shape), -1, 1)
            parts["table"] = self.constant(table, f"{name}_table")
        return chain(container, parts, name)

    def _placeholder(self, blob: Blob) -> Var:
        """A constant of a blob's type and shape, all of it one number."""
        from coremltools.converters.mil.mil import Builder, types

        if blob.name not in self._made:
            dtype = types.nptype_from_builtin(types.string_to_builtin(_short(blob.kind)))
            self.blobs.setdefault(blob.name, blob)
            nothing = np.broadcast_to(np.zeros((), dtype), blob.shape)
            self._made[blob.name] = Builder.const(val=nothing, name=blob.name)
        return self._made[blob.name]

    def note(self, text: str) -> None:
        """Tell the user something, once."""
        if text not in self.notes:
            self.notes.append(text)

    def finish(self, metadata: Mapping[str, str], **about: str) -> Any:
        """The specification, with every blob's place; the same program gives the same.

        Args:
            metadata: facts by key.
            about: ``author``, ``license``, ``shortDescription``.
        """
        ct = library()
        from coremltools.converters.mil.backend.mil.load import CoreMLProtoExporter
        from coremltools.converters.mil.mil import Program

        version = {"ios18": ct.target.iOS18, "ios26": ct.target.iOS26}[self.newest].value
        program = Program()
        with quiet():
            for name, function in self._functions.items():
                program.add_function(name, function)
            program.default_function_name = next(iter(self._functions))
            program.export_as_multifunction = len(self._functions) > 1
            program._check_early_error_out_for_invalid_program()
            self.layout = Layout()
            translated = _translator(self)(program, "", version).export()
            spec = CoreMLProtoExporter(
                program, translated, "", "", None, "mlprogram", "milinternal", version
            ).export(version)
        said = spec.description
        for each in (said, *said.functions):
            for feature in (*each.input, *each.output, *each.state):
                feature.shortDescription = self._descriptions[feature.name]
        for key, value in about.items():
            setattr(said.metadata, key, value)
        for key, value in metadata.items():
            said.metadata.userDefined[key] = value
        self._functions, self._made = {}, {}  # the operators are large, and in the specification now
        return spec

    def place(self, name: str, values: npt.NDArray[Any]) -> Place | None:
        """Where the constant of that name lies in the blob file; None: it stands in the program itself."""
        blob = self.blobs.get(name)
        if blob is None:
            if values.size < _INLINE or str(values.dtype) not in TYPES:
                return None
            # What the Builder fills in, such as the zeros of a bias: once, however often.
            key = hashlib.sha256(f"{values.dtype} {values.shape}".encode() + values.tobytes()).hexdigest()
            blob = self.blobs.setdefault(
                self._shared.setdefault(key, name), Blob(name, str(values.dtype), values.shape, values=values)
            )
        if blob.place is None:
            blob.place = self.layout.place(blob.kind, blob.shape)
        return blob.place


def chain(container: Container, parts: Mapping[str, Var], name: str) -> Var:
    """The operators that make float16 of a container's parts, its table among them."""
    from coremltools.converters.mil.mil import Builder

    if isinstance(container, Shift):
        return Builder.constexpr_blockwise_shift_scale(
            data=parts["codes"], scale=parts["scale"], offset=parts.get("offset"), name=name
        )
    dense = Builder.constexpr_lut_to_dense(indices=parts["codes"], lut=parts["table"], name=f"{name}_levels")
    scale = parts.get("scale")
    if scale is None:
        scale = Builder.constexpr_blockwise_shift_scale(
            data=parts["scale_codes"], scale=parts["scale_block"], name=f"{name}_scale"
        )
    return Builder.constexpr_blockwise_shift_scale(data=dense, scale=scale, name=name)


def _translator(graph: Graph) -> type:
    """A translator of programs, which asks ``graph`` where blobs lie instead of writing them."""
    from coremltools.converters.mil.backend.mil.helper import (
        create_file_value_tensor,
        create_immediate_value,
        types_to_proto_primitive,
    )
    from coremltools.converters.mil.backend.mil.load import MILProtoExporter

    class Translator(MILProtoExporter):  # type: ignore[misc]
        def get_milproto_value(self, var: Var) -> Any:
            place = None
            if isinstance(var.val, np.ndarray):
                place = graph.place(var.op.name, var.val)
            if place is None:
                return create_immediate_value(var)
            primitive = types_to_proto_primitive(var.sym_type.get_primitive())
            return create_file_value_tensor(_IN_PROGRAM, place.record, var.val.shape, primitive)

    return Translator


def _symbols(each: Any) -> tuple[Any, ...]:
    """Shape of an input with a symbol for each flexible dimension."""
    return tuple(each.shape.symbolic_shape)


def _dtype(each: Any, types: Any) -> Any:
    return each.dtype if each.dtype is not None else types.fp32


def _short(kind: str) -> str:
    return kind.replace("float", "fp")


def manifest(digest: str) -> str:
    """Manifest.json of a package, whose identifiers follow from the digest of its program."""
    model, weights = (
        str(uuid.uuid5(uuid.NAMESPACE_OID, f"{digest} {part}")).upper() for part in ("model", "weights")
    )
    author = "com.apple.CoreML"
    entries = {
        model: {
            "author": author,
            "description": "CoreML Model Specification",
            "name": "model.mlmodel",
            "path": f"{author}/model.mlmodel",
        },
        weights: {
            "author": author,
            "description": "CoreML Model Weights",
            "name": "weights",
            "path": f"{author}/weights",
        },
    }
    said = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": model}
    return json.dumps(said, indent=4, sort_keys=True) + "\n"
