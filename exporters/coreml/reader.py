"""Read a package back with the format owner's library: what the ``codes`` gate compares with the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import PackageError
from tapeout.exporters import Artifact
from tapeout.exporters.coreml.blob import Blobs
from tapeout.exporters.coreml.program import WEIGHTS, Blob, library, quiet
from tapeout.exporters.coreml.writer import Options, expected, options_of, packages
from tapeout.quantize import Quantized, QuantTensor

Array = npt.NDArray[Any]


def read_codes(
    artifact: Artifact, quant: Quantized
) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
    """Yield every tensor of ``quant`` that the package holds, those of one constant in memory at a time, by its Hugging Face name.

    Codes come back as a QuantTensor; what the file holds as floats, as float32 [shape], a matrix of scheme none rounded to float16.
    Bits and codebook, which no part says, are taken from ``quant``. Where the file does not agree with it, what comes back equals
    nothing.

    Raises:
        PackageError: a file is truncated or no Core ML program, or the program is not the one that the model has.
    """
    first = artifact.directory / artifact.files[0].split("/")[0]
    try:
        options = options_of(open_spec(first))
    except (KeyError, ValueError) as error:
        raise PackageError(f"{first} was not written by tapeout: its metadata lacks {error}.") from error
    for part, name in enumerate(packages(options)):
        yield from _read_package(artifact.directory / name, quant, options, part)


def _read_package(
    path: Path, quant: Quantized, options: Options, part: int
) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
    spec = open_spec(path)
    graph, wanted = expected(quant, options, part)
    spec.description.metadata.CopyFrom(wanted.description.metadata)  # no part of what is computed
    if spec != wanted:
        raise PackageError(f"{path}: {_difference(spec, wanted)}.")
    blobs = Blobs(path / WEIGHTS)
    for blob in graph.blobs.values():
        if blob.place and blob.values is not None and _read(blobs, blob).tobytes() != blob.values.tobytes():
            raise PackageError(f"{path}: {blob.name} holds other values than the model's config gives.")
    together: dict[tuple[str, ...], list[Blob]] = {}
    for blob in graph.blobs.values():
        if blob.place and blob.sources:
            together.setdefault(blob.sources, []).append(blob)
    tables = {
        name.removesuffix("_table"): blob for name, blob in graph.blobs.items() if name.endswith("_table")
    }
    for sources, parts in together.items():
        found = {
            kind: _rows(blobs, [b for b in parts if b.part == kind], quant)
            for kind in {b.part for b in parts}
        }
        name = parts[0].name.removesuffix(f"_{parts[0].part}")
        for turn, source in enumerate(sources):
            taken = {kind: values[turn] for kind, values in found.items()}
            if name in tables:
                taken["table"] = _read(blobs, tables[name])
            elif parts[0].container and hasattr(parts[0].container, "table"):
                taken["table"] = parts[0].container.table()
            yield source, _tensor(source, taken, parts[0], quant)


def _read(blobs: Blobs, blob: Blob) -> Array:
    assert blob.place
    return blobs.read(blob.kind, blob.place.record, blob.shape)


def _rows(blobs: Blobs, pieces: list[Blob], quant: Quantized) -> list[Array]:
    """One part of the tensors of a blob, or of a tensor whose rows lie in several: [rows, …] each."""
    sources = pieces[0].sources
    count = quant.model.specs[sources[0]].shape[0]
    if pieces[0].rows is None:
        return list(_read(blobs, pieces[0]).reshape(len(sources), count, -1))
    found: Array | None = None
    for piece in pieces:
        assert piece.rows is not None
        values = _read(blobs, piece).reshape(len(piece.rows), -1)
        if found is None:
            found = np.empty((count, values.shape[1]), values.dtype)
        found[piece.rows] = values
    assert found is not None
    return [found]


def _tensor(
    source: str, parts: dict[str, Array], blob: Blob, quant: Quantized
) -> QuantTensor | npt.NDArray[np.float32]:
    if blob.container:
        like = quant[source]
        assert isinstance(like, QuantTensor)
        return blob.container.unpack(parts, like)
    return parts["weight"].reshape(quant.model.specs[source].shape).astype(np.float32)


def _difference(found: Any, expected: Any) -> str:
    """What differs first between two specifications."""
    theirs, mine = found.mlProgram.functions, expected.mlProgram.functions
    if sorted(theirs) != sorted(mine):
        return (
            f"it has the functions {', '.join(sorted(theirs))} where {', '.join(sorted(mine))} are expected"
        )
    for name in sorted(mine):
        if list(theirs[name].block_specializations) != list(mine[name].block_specializations):
            return f"function {name} is of another opset"
        for opset in mine[name].block_specializations:
            have, want = (each[name].block_specializations[opset].operations for each in (theirs, mine))
            for one, other in zip(have, want, strict=False):
                if one != other:
                    what = other.outputs[0].name if other.outputs else other.type
                    return f"{what} of function {name} is another operator, or reads or is something else"
            if len(have) != len(want):
                return f"function {name} has {len(have)} operators where {len(want)} are expected"
    return "its description is another"


def open_spec(path: Path) -> Any:
    """A package's specification; PackageError when there is none."""
    ct = library()
    try:
        with quiet():
            spec = ct.utils.load_spec(str(path))
    except Exception as error:  # coremltools' C++ raises RuntimeError, protobuf its own
        raise PackageError(
            f"{path} is not a Core ML package: {error}. It was cut off or changed; write it again."
        ) from error
    if not spec.HasField("mlProgram"):
        raise PackageError(f"{path} holds no ML program. It was cut off or changed; write it again.")
    return spec


def describe(path: Path) -> dict[str, Any]:
    """The facts of one package, any tool's: its functions, operators, inputs and states, and its bytes.

    Raises:
        PackageError: the directory is no Core ML package of an ML program.
    """
    spec = open_spec(path)
    said, functions = spec.description, spec.mlProgram.functions
    blocks = {name: each.block_specializations[each.opset] for name, each in functions.items()}
    described = {each.name: each for each in said.functions} or {"main": said}
    return {
        "format": "coreml",
        "specification": spec.specificationVersion,
        "opsets": sorted({each.opset for each in functions.values()}),
        "functions": {name: len(block.operations) for name, block in sorted(blocks.items())},
        "operators": dict(
            sorted(Counter(op.type for block in blocks.values() for op in block.operations).items())
        ),
        "inputs": {name: [x.name for x in each.input] for name, each in sorted(described.items())},
        "outputs": {name: [x.name for x in each.output] for name, each in sorted(described.items())},
        "states": {name: [x.name for x in each.state] for name, each in sorted(described.items())},
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "metadata": dict(said.metadata.userDefined),
    }
