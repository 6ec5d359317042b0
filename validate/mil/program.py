"""A saved ``.mlpackage`` as plain Python: functions, states, operations, and where their constants lie."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import MissingToolchain, PackageError, TapeoutError, nearest
from tapeout.validate.mil.blobs import BITS, Blobs, unpack

__all__ = ["NUMPY", "Constant", "Function", "Input", "Operation", "Program", "Type", "load"]

Array = npt.NDArray[Any]

# MIL's words, and what their values are kept in; codes of less than a byte have one each.
NUMPY: dict[str, type[np.generic]] = {
    "bool": np.bool_,
    "fp16": np.float16,
    "fp32": np.float32,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int4": np.int8,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint1": np.uint8,
    "uint2": np.uint8,
    "uint3": np.uint8,
    "uint4": np.uint8,
    "uint6": np.uint8,
}
_OPSETS = ("CoreML7", "CoreML8", "CoreML9")  # iOS 17, 18, 26
_MOST_RANK = 5  # "Core ML only supports tensors with rank <= 5"


@dataclass(frozen=True)
class Type:
    """Of a value.

    Attributes:
        dtype: in MIL's words: ``fp16``, ``int32``, ``string``.
        shape: [rank], None where the size is known only when it runs.
    """

    dtype: str
    shape: tuple[int | None, ...]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of that shape is of this type."""
        return len(shape) == len(self.shape) and all(
            own is None or own == size for own, size in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join('?' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class Input:
    """What a function takes.

    Attributes:
        dtype: in MIL's words.
        ranges: least and most size of each axis; None: no upper bound.
        shapes: if any, the only ones.
    """

    dtype: str
    ranges: tuple[tuple[int, int | None], ...]
    shapes: tuple[tuple[int, ...], ...] = ()

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of that shape may be given."""
        if self.shapes:
            return shape in self.shapes
        return len(shape) == len(self.ranges) and all(
            least <= size and (most is None or size <= most)
            for (least, most), size in zip(self.ranges, shape, strict=True)
        )

    def __str__(self) -> str:
        if self.shapes:
            return f"{self.dtype} {' or '.join(str(list(shape)) for shape in self.shapes)}"
        axes = (
            str(least) if least == most else f"{least} … {'∞' if most is None else most}"
            for least, most in self.ranges
        )
        return f"{self.dtype} [{', '.join(axes)}]"


@dataclass(frozen=True)
class Constant:
    """A value that the program holds.

    Attributes:
        here: the value, if it stands in the program: an array or a string.
        file, offset: else where in the package it lies.
    """

    type: Type
    here: Array | str | None = None
    file: Path | None = None
    offset: int = 0


@dataclass(frozen=True)
class Operation:
    """One step.

    Attributes:
        name: of its first output, else its own.
        inputs: for each parameter the names of values, or constants; a tuple has several.
        outputs: name and type of each.
    """

    op: str
    name: str
    inputs: Mapping[str, tuple[str | Constant, ...]]
    outputs: tuple[tuple[str, Type], ...]


@dataclass(frozen=True)
class Function:
    """An entry point.

    Attributes:
        states: what it reads and writes between calls.
        outputs: name and type of each, as the program says it.
        operations: in the order in which they run.
    """

    name: str
    inputs: Mapping[str, Input]
    states: Mapping[str, Type]
    outputs: Mapping[str, Type]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Program:
    """A package.

    Attributes:
        default: the function that runs when none is named.
        author, licence, description, metadata: what its maker said; ``metadata`` are the free fields.
        features: the maker's words for each input, output and state.
    """

    functions: Mapping[str, Function]
    default: str
    author: str = ""
    licence: str = ""
    description: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, str] = field(default_factory=dict)
    _files: dict[Path, Blobs] = field(default_factory=dict, repr=False, compare=False)

    def function(self, name: str) -> Function:
        """The function of that name.

        Raises:
            TapeoutError: there is none.
        """
        if name not in self.functions:
            raise TapeoutError(f"the package has no function '{name}'{nearest(name, self.functions)}.")
        return self.functions[name]

    def value(self, constant: Constant) -> Array | str:
        """A constant's array, of its type's shape, as it is stored; a view of the mapped file where that holds it.

        Raises:
            PackageError: the weight file does not hold it.
        """
        if constant.here is not None:
            return constant.here
        assert constant.file is not None
        if constant.file not in self._files:
            self._files[constant.file] = Blobs(constant.file)
        shape = _fixed(constant.type)
        blobs = self._files[constant.file]
        return blobs.read(constant.offset, constant.type.dtype, prod(shape)).reshape(shape)


def load(path: str | Path) -> Program:
    """Read a saved ML Program.

    Raises:
        PackageError: a file is missing or damaged, or it holds what this interpreter does not know.
        MissingToolchain: coremltools is not installed.
    """
    directory = Path(path)
    model_path = _model(directory)
    messages = _messages("Model_pb2")
    model = messages.Model()
    try:
        model.ParseFromString(model_path.read_bytes())
    except Exception as error:  # protobuf's
        raise PackageError(f"{model_path} is not a Core ML model: {error}.") from error
    if model.WhichOneof("Type") != "mlProgram":
        raise PackageError(f"{model_path} is a {model.WhichOneof('Type')}, not an mlProgram.")
    reader = _Reader(model_path)
    described = model.description
    own = {each.name: each for each in described.functions} or {"main": described}
    if missing := sorted(set(own) ^ set(model.mlProgram.functions)):
        raise PackageError(
            f"{model_path}: functions {', '.join(missing)} are either described or defined, not both."
        )
    functions = {
        name: reader.function(name, model.mlProgram.functions[name], each) for name, each in own.items()
    }
    default = described.defaultFunctionName or next(iter(own))
    if default not in functions:
        raise PackageError(
            f"{model_path}: the default function '{default}' is not defined{nearest(default, functions)}."
        )
    _same_states(model_path, functions)
    metadata = described.metadata
    return Program(
        functions,
        default,
        metadata.author,
        metadata.license,
        metadata.shortDescription,
        dict(metadata.userDefined),
        {
            feature.name: feature.shortDescription
            for each in own.values()
            for feature in (*each.input, *each.output, *each.state)
        },
    )


def _model(directory: Path) -> Path:
    """Where a package's manifest says that the model lies."""
    manifest = directory / "Manifest.json"
    try:
        listed = json.loads(manifest.read_text("utf-8"))
        path = directory / "Data" / str(listed["itemInfoEntries"][listed["rootModelIdentifier"]]["path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackageError(f"{manifest} names no model ({type(error).__name__}: {error}).") from error
    if not path.is_file():
        raise PackageError(f"{path} is missing; {manifest} names it.")
    return path


def _messages(name: str) -> ModuleType:
    """The messages that coremltools generates; MissingToolchain where it is absent."""
    try:
        return import_module(f"coremltools.proto.{name}") if "coremltools" in sys.modules else _alone(name)
    except Exception as error:  # of versions of numpy or torch that it does not bear: any kind
        raise MissingToolchain(
            f"Core ML packages are read with coremltools ({type(error).__name__}: {error}): pip install 'tapeout[apple]', or tapeout env "
            "create apple, an environment with the versions that it was tested with."
        ) from error


@cache
def _alone(name: str) -> ModuleType:
    """Messages without the rest of coremltools, which imports torch and takes seconds; who asks for the rest later gets it."""
    found = find_spec("coremltools")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("No module named 'coremltools'")
    bare = ModuleType("coremltools")
    bare.__path__ = list(found.submodule_search_locations)
    sys.modules["coremltools"] = bare
    try:
        return import_module(f"coremltools.proto.{name}")
    finally:
        for each in [key for key in sys.modules if key.partition(".")[0] == "coremltools"]:
            del sys.modules[each]


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._names = {value: name for name, value in _messages("MIL_pb2").DataType.items()}

    def function(self, name: str, spec: Any, described: Any) -> Function:
        where = f"{self._path}, function '{name}'"
        if spec.opset not in _OPSETS or spec.opset not in spec.block_specializations:
            raise PackageError(f"{where}: is of opset {spec.opset}; known: {', '.join(_OPSETS)}.")
        block = spec.block_specializations[spec.opset]
        operations = tuple(self._operation(where, each) for each in block.operations)
        known = {value: type_ for each in operations for value, type_ in each.outputs}
        inputs, states = {}, {}
        for each in spec.inputs:
            if each.type.WhichOneof("type") == "stateType":
                states[each.name] = self._type(
                    f"{where}, state '{each.name}'", each.type.stateType.wrappedType
                )
            else:
                inputs[each.name] = known[each.name] = self._type(f"{where}, input '{each.name}'", each.type)
        if set(states) != (found := {each.name for each in described.state}):
            raise PackageError(f"{where}: has states {sorted(states)}, and {sorted(found)} are described.")
        if set(inputs) != (found := {each.name for each in described.input}):
            raise PackageError(f"{where}: takes {sorted(inputs)}, and {sorted(found)} are described.")
        if missing := [output for output in block.outputs if output not in known]:
            raise PackageError(f"{where}: gives {missing[0]}, which nothing makes.")
        if set(block.outputs) != (found := {each.name for each in described.output}):
            raise PackageError(f"{where}: gives {sorted(block.outputs)}, and {sorted(found)} are described.")
        taken = {each.name: self._input(where, each, inputs[each.name]) for each in described.input}
        return Function(name, taken, states, {output: known[output] for output in block.outputs}, operations)

    def _operation(self, where: str, spec: Any) -> Operation:
        name = spec.outputs[0].name if spec.outputs else self._text(spec.attributes["name"])
        where = f"{where}, '{name}' ({spec.type})"
        if spec.blocks:
            raise PackageError(
                f"{where}: has blocks of its own (loops, conditions); no op with them is known."
            )
        outputs = tuple(
            (each.name, self._type(f"{where}, '{each.name}'", each.type)) for each in spec.outputs
        )
        for output, type_ in outputs:
            if len(type_.shape) > _MOST_RANK and not spec.type.startswith("const"):
                raise PackageError(
                    f"{where}: '{output}' has rank {len(type_.shape)}; Core ML knows at most {_MOST_RANK}."
                )
        inputs: dict[str, tuple[str | Constant, ...]] = {
            parameter: tuple(
                each.name if each.WhichOneof("binding") == "name" else self._constant(where, each.value)
                for each in argument.arguments
            )
            for parameter, argument in spec.inputs.items()
        }
        for parameter, value in spec.attributes.items():
            if parameter != "name":
                inputs[parameter] = (self._constant(where, value),)
        return Operation(spec.type, name, inputs, outputs)

    def _type(self, where: str, spec: Any) -> Type:
        if (kind := spec.WhichOneof("type")) != "tensorType":
            raise PackageError(f"{where}: is a {kind}; only tensors are known.")
        dtype = self._dtype(where, spec.tensorType.dataType)
        sizes = tuple(
            int(each.constant.size) if each.WhichOneof("dimension") == "constant" else None
            for each in spec.tensorType.dimensions
        )
        if any(
            each.WhichOneof("dimension") == "unknown" and each.unknown.variadic
            for each in spec.tensorType.dimensions
        ):
            raise PackageError(f"{where}: has any number of axes; only a fixed rank is known.")
        return Type(dtype, sizes)

    def _dtype(self, where: str, number: int) -> str:
        name = str(self._names.get(number, f"type {number}")).lower()
        dtype = {"float16": "fp16", "float32": "fp32"}.get(name, name)
        if dtype != "string" and dtype not in NUMPY:
            raise PackageError(f"{where}: is of {name}; known: {', '.join(sorted(NUMPY))}.")
        return dtype

    def _constant(self, where: str, spec: Any) -> Constant:
        type_ = self._type(where, spec.type)
        shape = _fixed(type_)
        if spec.WhichOneof("value") == "blobFileValue":
            file = spec.blobFileValue.fileName
            path = self._path.parent / file.removeprefix("@model_path/")
            if not file.startswith("@model_path/") or ".." in Path(file).parts:
                raise PackageError(f"{where}: its value lies in '{file}', which is not in the package.")
            return Constant(type_, file=path, offset=int(spec.blobFileValue.offset))
        if spec.immediateValue.WhichOneof("value") != "tensor":
            raise PackageError(
                f"{where}: is a {spec.immediateValue.WhichOneof('value')}; only tensors are known."
            )
        tensor = spec.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        if type_.dtype == "string":
            return Constant(type_, self._text(spec))
        values: Array
        if kind == "bytes":
            raw = np.frombuffer(tensor.bytes.values, np.uint8)
            if type_.dtype in BITS:
                values = unpack(raw, type_.dtype, prod(shape))
            else:
                values = raw.view(np.dtype(NUMPY[type_.dtype]).newbyteorder("<"))
        elif kind in ("floats", "ints", "bools"):
            values = np.array(getattr(tensor, kind).values).astype(NUMPY[type_.dtype])
        else:
            raise PackageError(
                f"{where}: its value is written as {kind}; known: bytes, floats, ints, bools, strings."
            )
        if values.size != prod(shape):
            raise PackageError(f"{where}: has {values.size} values for {type_}.")
        return Constant(type_, values.reshape(shape))

    @staticmethod
    def _text(spec: Any) -> str:
        values = spec.immediateValue.tensor.strings.values
        return str(values[0]) if values else ""

    def _input(self, where: str, feature: Any, type_: Type) -> Input:
        where = f"{where}, input '{feature.name}'"
        if (kind := feature.type.WhichOneof("Type")) != "multiArrayType":
            raise PackageError(f"{where}: is a {kind}; only multi-arrays are known.")
        array = feature.type.multiArrayType
        names = {"FLOAT32": "fp32", "FLOAT16": "fp16", "INT32": "int32", "INT8": "int8"}
        dtype = names.get(array.ArrayDataType.Name(array.dataType), "another type")
        shape = tuple(int(size) for size in array.shape)
        shapes: tuple[tuple[int, ...], ...] = ()
        ranges: tuple[tuple[int, int | None], ...] = tuple((size, size) for size in shape)
        flexible = array.WhichOneof("ShapeFlexibility")
        if flexible == "enumeratedShapes":
            shapes = tuple(tuple(int(size) for size in each.shape) for each in array.enumeratedShapes.shapes)
        elif flexible == "shapeRange":
            ranges = tuple(
                (int(each.lowerBound), None if each.upperBound < 0 else int(each.upperBound))
                for each in array.shapeRange.sizeRanges
            )
        found = Input(dtype, ranges, shapes)
        if feature.type.isOptional:
            raise PackageError(f"{where}: may be left out; inputs with defaults are not known.")
        if dtype != type_.dtype or len(shape) != len(type_.shape) or not type_.fits(_widest(found, type_)):
            raise PackageError(f"{where}: is described as {found}, the function takes {type_}.")
        return found


def _widest(found: Input, type_: Type) -> tuple[int, ...]:
    """The described sizes where they are fixed, and something that no size is where the function wants a fixed one and they are not."""
    if found.shapes:
        columns = [set(column) for column in zip(*found.shapes, strict=True)]
        return tuple(next(iter(each)) if len(each) == 1 else -1 for each in columns)
    return tuple(least if least == most else -1 for least, most in found.ranges)


def _fixed(type_: Type) -> tuple[int, ...]:
    if None in type_.shape:
        raise PackageError(f"a constant is of type {type_}; its size must be known.")
    return tuple(size for size in type_.shape if size is not None)


def _same_states(path: Path, functions: Mapping[str, Function]) -> None:
    """Functions share states by name, so one name has one type."""
    seen: dict[str, tuple[str, Type]] = {}
    for function in functions.values():
        for name, type_ in function.states.items():
            first, own = seen.setdefault(name, (function.name, type_))
            if own != type_:
                raise PackageError(
                    f"{path}: state '{name}' is {own} in '{first}' and {type_} in '{function.name}'."
                )
            if type_.dtype not in ("fp16", "fp32") or None in type_.shape:
                raise PackageError(
                    f"{path}: state '{name}' is {type_}; only floats of a fixed shape are known."
                )
