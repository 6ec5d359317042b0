"""Read an archive back with IREE's own library: what the ``codes`` gate compares with the store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import PackageError
from tapeout.exporters import Artifact
from tapeout.exporters.iree.archive import read
from tapeout.exporters.iree.emitter import Parameter
from tapeout.exporters.iree.writer import ARCHIVE, FACTS, MLIR, Options, build
from tapeout.models.checkpoint import to_float32
from tapeout.quantize import Quantized, QuantTensor

Floats = npt.NDArray[np.float32]
_TYPES = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype("<u2"), "i8": np.dtype("u1")}
_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


def facts_of(directory: Path) -> dict[str, int]:
    """``context``, ``chunk`` and ``vocab_size`` of a module; PackageError where they are not said."""
    try:
        said = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        return {key: int(said[key]) for key in ("context", "chunk", "vocab_size")}
    except (OSError, ValueError, KeyError) as error:
        raise PackageError(f"{directory / FACTS} does not say what the module was made for: {error}.") from error


def read_codes(artifact: Artifact, quant: Quantized) -> Iterator[tuple[str, QuantTensor | Floats]]:
    """Yield every tensor of ``quant`` that the archive holds, one in memory at a time, by its Hugging Face name.

    Codes come back as a QuantTensor, floats as float32 [shape]. Bits and codebook, which no part says, are taken from ``quant``.
    Where the file does not agree with it, what comes back equals nothing.

    Raises:
        PackageError: a file is cut off or no archive, or the module or a table of it is not the one that the model has.
        MissingToolchain: IREE's runtime is absent.
    """
    directory = artifact.directory
    facts = facts_of(directory)
    text, parameters = build(quant, Options(facts["context"], facts["chunk"]))
    try:
        found = (directory / MLIR).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PackageError(f"{directory / MLIR} cannot be read: {error}.") from error
    if found != text:
        pairs = zip(found.split("\n"), text.split("\n"), strict=False)
        line = next((at for at, (one, other) in enumerate(pairs, 1) if one != other), "the last")
        raise PackageError(f"{directory / MLIR} is not the module of this model: line {line} is another.")
    path = directory / ARCHIVE
    entries = read(path)
    if entries.keys() != parameters.keys():
        differing = sorted(entries.keys() ^ parameters.keys())
        raise PackageError(f"{path} lacks parameters or has others: {', '.join(differing[:3])}.")
    together: dict[tuple[str, ...], dict[str, str]] = {}
    for name, each in parameters.items():
        if each.values is not None:
            if entries[name].tobytes() != np.ascontiguousarray(each.values).tobytes():
                raise PackageError(f"{path}: {name} holds other values than the model's config gives.")
        else:
            together.setdefault(each.sources, {})[each.part] = name
    for sources, parts in together.items():
        for turn, source in enumerate(sources):
            mine = {}
            for part, name in parts.items():
                piece = entries[name].reshape(len(sources), -1)[turn]
                mine[part] = piece
            yield source, _tensor(source, mine, parts, parameters, quant)


def _tensor(
    source: str,
    mine: Mapping[str, npt.NDArray[np.uint8]],
    names: Mapping[str, str],
    parameters: Mapping[str, Parameter],
    quant: Quantized,
) -> QuantTensor | Floats:
    like = quant[source]
    if "weight" in mine:
        element = parameters[names["weight"]].element
        bits = mine["weight"].view(_TYPES[element])
        return to_float32(bits, _DTYPES[element]).reshape(quant.model.specs[source].shape)
    assert isinstance(like, QuantTensor)
    held = parameters[names["codes"]].container
    assert held
    out = like.shape[0]
    beside: dict[str, Any] = {
        part: values.view(_TYPES[parameters[names[part]].element]).reshape(out, -1)
        for part, values in mine.items()
        if part != "codes"
    }
    return QuantTensor(
        packed=held.unpacked(mine["codes"].reshape(out, -1), like),
        bits=like.bits,
        in_features=like.in_features,
        scale=beside["scale"],
        group=like.in_features // beside["scale"].shape[1],
        codebook=like.codebook,
        zero_point=beside.get("zero_point"),
    )
