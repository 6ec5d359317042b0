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
from tapeout.exporters.iree.blocks import container
from tapeout.exporters.iree.writer import ARCHIVE, FACTS, MLIR, Options, build, facts
from tapeout.models.checkpoint import to_float32
from tapeout.quantize import Quantized, QuantTensor, Scheme

Floats = npt.NDArray[np.float32]
_TYPES = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype("<u2"), "i8": np.dtype("u1")}
_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


def facts_of(directory: Path) -> dict[str, Any]:
    """What ``writer.facts`` says of a module; PackageError where it is not said."""
    try:
        said: dict[str, Any] = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        numbers = {key: int(said[key]) for key in ("context", "chunk", "vocab_size")}
        return said | numbers | {"parameters": dict(said["parameters"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackageError(
            f"{directory / FACTS} does not say what the module was made for: {error}."
        ) from error


def read_codes(artifact: Artifact, quant: Quantized) -> Iterator[tuple[str, QuantTensor | Floats]]:
    """Yield every tensor of ``quant`` that the archive holds, one in memory at a time, by its Hugging Face name.

    Codes come back as a QuantTensor, floats as float32 [shape].

    Raises:
        PackageError: a file is cut off or no archive, or the module or a table of it is not the one that the model has.
        MissingToolchain: IREE's runtime is absent.
    """
    directory = artifact.directory
    said = facts_of(directory)
    options = Options(said["context"], said["chunk"])
    text, parameters = build(quant, options)
    try:
        found = (directory / MLIR).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PackageError(f"{directory / MLIR} cannot be read: {error}.") from error
    if found != text:
        pairs = zip(found.split("\n"), text.split("\n"), strict=False)
        line = next((at for at, (one, other) in enumerate(pairs, 1) if one != other), "the last")
        raise PackageError(f"{directory / MLIR} is not the module of this model: line {line} is another.")
    if said != json.loads(json.dumps(facts(quant, options, parameters))):
        raise PackageError(
            f"{directory / FACTS} says something else of the module than the model's config gives."
        )
    entries = _entries(directory, said["parameters"])
    for name, each in parameters.items():
        if each.values is not None and entries[name].tobytes() != np.ascontiguousarray(each.values).tobytes():
            raise PackageError(
                f"{directory / ARCHIVE}: {name} holds other values than the model's config gives."
            )
    yield from _tensors(entries, said["parameters"])


def read_weights(directory: Path) -> Iterator[tuple[str, Floats]]:
    """The weights that an archive means, float32, by name; errors as of ``read_codes``."""
    said = facts_of(directory)["parameters"]
    for name, found in _tensors(_entries(directory, said), said):
        yield name, found.dequantize() if isinstance(found, QuantTensor) else found


def _entries(directory: Path, parameters: Mapping[str, Any]) -> dict[str, npt.NDArray[np.uint8]]:
    entries = read(directory / ARCHIVE)
    if entries.keys() != parameters.keys():
        differing = sorted(entries.keys() ^ parameters.keys())
        raise PackageError(
            f"{directory / ARCHIVE} lacks parameters or has others: {', '.join(differing[:3])}."
        )
    return entries


def _tensors(
    entries: Mapping[str, npt.NDArray[np.uint8]], parameters: Mapping[str, Any]
) -> Iterator[tuple[str, QuantTensor | Floats]]:
    """The tensors of the parameters, those of several that stand together one by one."""
    together: dict[tuple[str, ...], dict[str, str]] = {}
    for name, each in parameters.items():
        if each["sources"]:
            together.setdefault(tuple(each["sources"]), {})[each["part"]] = name
    for sources, names in together.items():
        for turn, source in enumerate(sources):
            parts = {
                part: entries[name].reshape(len(sources), -1)[turn].view(_TYPES[parameters[name]["element"]])
                for part, name in names.items()
                if part != "codes"
            }
            if "weight" in names:
                said = parameters[names["weight"]]
                shape = said["shape"][1:] if len(sources) > 1 else said["shape"]
                yield source, to_float32(parts["weight"], _DTYPES[said["element"]]).reshape(shape)
                continue
            said = parameters[names["codes"]]
            scheme, out = Scheme(**said["scheme"]), said["shape"][-3]
            codes = entries[names["codes"]].reshape(len(sources), -1)[turn].reshape(out, -1)
            packed = container(scheme).unpacked(codes, scheme.bits)
            scale = parts["scale"].reshape(out, -1)
            zero_point = parts.get("zero_point")
            yield (
                source,
                QuantTensor(
                    packed=packed,
                    bits=scheme.bits,
                    in_features=packed.shape[1] * 8 // scheme.bits,
                    scale=scale,
                    group=packed.shape[1] * 8 // scheme.bits // scale.shape[1],
                    codebook=scheme.codebook(),
                    zero_point=None if zero_point is None else zero_point.reshape(out, -1),
                ),
            )
