"""Read a model back with the format owner's library: what the ``codes`` gate compares with the store."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import PackageError
from tapeout.exporters import Artifact
from tapeout.exporters.onnx.graph import BITS, Graph, Initializer, Piece, check_size, library
from tapeout.exporters.onnx.writer import MODEL, Dialect, build
from tapeout.models.checkpoint import to_float32
from tapeout.quantize import Quantized, QuantTensor

Array = npt.NDArray[Any]


def read_codes(
    artifact: Artifact, quant: Quantized, *, dialect: Dialect = "onnxruntime"
) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
    """Yield every tensor of ``quant`` that the files hold, those of one initializer in memory at a time, by its Hugging Face name.

    Codes come back as a QuantTensor; what the file holds as floats, as float32 [shape]. Bits and codebook, which no part
    says, are taken from ``quant``. Where the file does not agree with it, what comes back equals nothing.

    Raises:
        PackageError: a file is truncated or no ONNX model, or an initializer is missing, too many, or of another type or shape.
    """
    path = artifact.directory / MODEL
    graph, _ = build(quant, dialect=dialect, context=artifact.context)
    graphs = {path: graph, **{artifact.directory / name: each for name, each in graph.others.items()}}
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for file, one in graphs.items():
        held = {proto.name: proto for proto in _open(file).graph.initializer}
        wrong += _wrong_constants(one, held)
        for name in sorted(held.keys() - one.constants.keys()):
            if name not in graph.initializers:
                wrong.append(f"{name} is unexpected")
            elif name in found and found[name] != held[name]:
                wrong.append(f"{name} is another in {file.name}")
            found[name] = held[name]
    wrong += [
        text for each in graph.initializers.values() if (text := _difference(each, found.get(each.name)))
    ]
    if wrong:
        more = f" … and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise PackageError(f"{path}: {'; '.join(wrong[:5])}{more}.")
    together: dict[tuple[str, ...], list[tuple[Initializer, Piece]]] = {}
    for each in graph.initializers.values():
        if each.values is not None and not np.array_equal(
            _load(found[each.name], artifact.directory), each.values, equal_nan=True
        ):
            raise PackageError(f"{path}: {each.name} holds other values than the model's config gives.")
        for piece in each.pieces:
            together.setdefault(piece.sources, []).append((each, piece))
    views = {each.name: each for each in graph.initializers.values() if each.view_of}
    for name, each in views.items():
        mine, base = _place(found[name]), _place(found[str(each.view_of)])
        if mine != (base[0], base[1] + each.at, each.nbytes):
            raise PackageError(f"{path}: {name} is not the bytes of {each.view_of}.")
    for sources, pieces in together.items():
        parts = {
            piece.part: _rows(found[each.name], each, piece, artifact.directory) for each, piece in pieces
        }
        for turn, source in enumerate(sources):
            yield (
                source,
                _tensor(source, {part: rows[:, turn] for part, rows in parts.items()}, pieces[0][1], quant),
            )


def inputs(directory: Path) -> list[Any]:
    """The inputs of the model in a directory, as onnx has them."""
    return list(_open(directory / MODEL).graph.input)


def places(path: Path) -> dict[str, tuple[str, int, int]]:
    """File, offset and length of every initializer that lies beside the model, by its name.

    Raises:
        PackageError: the file is no ONNX model.
    """
    return {each.name: _place(each) for each in _open(path).graph.initializer if each.external_data}


def describe(path: Path) -> dict[str, Any]:
    """The facts of one model, any tool's: its operators, its initializers by type, and their bytes.

    Raises:
        PackageError: the file is no ONNX model.
    """
    model = _open(path)
    kind = library().TensorProto.DataType.Name
    beside = {_place(each)[0] for each in model.graph.initializer if each.external_data}
    return {
        "format": "onnx",
        "producer": model.producer_name,
        "opsets": {each.domain or "ai.onnx": each.version for each in model.opset_import},
        "nodes": len(model.graph.node),
        "operators": dict(Counter(node.op_type for node in model.graph.node)),
        "inputs": [each.name for each in model.graph.input],
        "outputs": [each.name for each in model.graph.output],
        "initializers": dict(Counter(kind(each.data_type) for each in model.graph.initializer)),
        "bytes": path.stat().st_size
        + sum((path.parent / name).stat().st_size for name in beside if (path.parent / name).exists()),
        "metadata": {each.key: each.value for each in model.metadata_props},
    }


def _open(path: Path) -> Any:
    onnx = library()
    try:
        check_size(path)
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error}.") from error
    except Exception as error:  # protobuf's own, which are no tree
        raise PackageError(
            f"{path} is not an ONNX model: {error}. It was cut off or changed; write it again."
        ) from error
    if not model.graph.node:
        raise PackageError(
            f"{path} is not an ONNX model: it has no graph. It was cut off or changed; write it again."
        )
    return model


def _wrong_constants(graph: Graph, held: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the constants that stand in a graph itself."""
    for name, values in graph.constants.items():
        found = library().numpy_helper.to_array(held[name]) if name in held else None
        if found is None or found.dtype != values.dtype or not np.array_equal(found, values):
            yield f"{name} is {'missing' if found is None else 'another constant'}"


def _difference(expected: Initializer, proto: Any | None) -> str | None:
    """What is wrong with an initializer, if anything, its bytes apart."""
    if proto is None:
        return f"{expected.name} is missing"
    kind = library().TensorProto.DataType.Name(proto.data_type)
    if (kind, tuple(proto.dims)) != (expected.kind, expected.shape):
        return f"{expected.name} is {kind} {list(proto.dims)} where {expected.kind} {list(expected.shape)} is expected"
    return None


def _place(proto: Any) -> tuple[str, int, int]:
    """File, offset and length of an external initializer."""
    said = {entry.key: entry.value for entry in proto.external_data}
    return said.get("location", ""), int(said.get("offset", 0)), int(said.get("length", 0))


def _load(proto: Any, directory: Path) -> Array:
    """An initializer's values, by onnx's own reader."""
    onnx = library()
    loaded = onnx.TensorProto()
    loaded.CopyFrom(proto)
    try:
        onnx.external_data_helper.load_external_data_for_tensor(loaded, str(directory))
        values: Array = onnx.numpy_helper.to_array(loaded)
    except (
        Exception
    ) as error:  # a file that is missing, short, or outside of the directory: each raises another
        raise PackageError(f"{proto.name} cannot be read from {directory}: {error}.") from error
    return values


def _rows(proto: Any, initializer: Initializer, piece: Piece, directory: Path) -> Array:
    """What a piece holds, [rows, sources, …] in its own type."""
    flat = _load(proto, directory).reshape(-1)
    begin = (piece.offset - initializer.offset) * 8 // BITS[piece.kind]
    count = len(piece.sources) * math.prod(piece.shape)
    rows = piece.shape[0] if len(piece.shape) > 1 else 1
    return flat[begin : begin + count].reshape(rows, len(piece.sources), -1)


def _tensor(
    source: str, parts: dict[str, Array], piece: Piece, quant: Quantized
) -> QuantTensor | npt.NDArray[np.float32]:
    shape = quant.model.specs[source].shape
    if piece.container:
        like = quant[source]
        assert isinstance(like, QuantTensor)
        return piece.container.unpack(
            {part: np.ascontiguousarray(rows) for part, rows in parts.items()}, like
        )
    values = parts["weight"].reshape(shape)
    if piece.kind == "FLOAT":
        return values.astype(np.float32, copy=False)
    return (
        to_float32(np.ascontiguousarray(values).view(np.uint16), "BF16")
        if piece.kind == "BFLOAT16"
        else values.astype(np.float32)
    )
