"""Read a file back with the format owner's library: what the ``codes`` gate compares with the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import PackageError
from tapeout.exporters import Artifact
from tapeout.exporters.gguf.layout import Entry, Layout, lay_out, library
from tapeout.models.checkpoint import to_float32
from tapeout.quantize import Quantized, QuantTensor

_SHOWN = 64  # values of an array that ``describe`` shows


def read_codes(
    artifact: Artifact, quant: Quantized
) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
    """Yield every tensor of ``quant`` that the files hold, one in memory at a time, by its Hugging Face name.

    Codes come back as a QuantTensor; what the file holds as floats (vectors, fallbacks to F16), as float32 [shape].
    What a block does not say is taken from ``quant``: the zero point (Q5_0 holds ``code - zero_point``), and the scale
    that an NF4 block's d was rounded from. Where the file does not agree with it, what comes back equals nothing.

    Raises:
        PackageError: a file is truncated or no GGUF, or a tensor is missing, too many, or of another type or shape.
    """
    readers = [_open(artifact.directory / name) for name in artifact.files]
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    layout = _layout(readers[0], artifact.directory / artifact.files[0], quant)
    wrong = [found for entry in layout.entries if (found := _difference(entry, tensors.get(entry.name)))]
    wrong += [
        f"{name} is unexpected" for name in sorted(tensors.keys() - {entry.name for entry in layout.entries})
    ]
    if wrong:
        more = f" … and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise PackageError(f"{artifact.directory / artifact.files[0]}: {'; '.join(wrong[:5])}{more}.")
    scales = {entry.scale_of: tensors[entry.name].data for entry in layout.entries if entry.scale_of}
    for entry in layout.entries:
        for i, source in enumerate(entry.parts):
            data = tensors[entry.name].data
            yield source, _read(entry, source, data[i] if entry.members else data, quant, scales.get(source))


def describe(path: Path) -> dict[str, Any]:
    """The facts of one file, any tool's: its header's numbers, how many tensors of each type it holds, and their bytes.

    Raises:
        PackageError: the file is truncated or no GGUF.
    """
    reader = _open(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    # Vocabularies and merges are told by their length.
    values = {name: field.contents() for name, field in fields.items() if len(field.data) <= _SHOWN}
    lengths = {name: f"{len(field.data)} entries" for name, field in fields.items() if name not in values}
    return {
        "format": "gguf",
        "arch": values.get("general.architecture"),
        "tensors": dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
        "bytes": path.stat().st_size,
        "metadata": {name: values.get(name, lengths.get(name)) for name in sorted(fields)},
    }


def _open(path: Path) -> Any:
    try:
        return library().GGUFReader(path)
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error}.") from error
    # What a damaged file raises depends on where it is cut: numpy's errors, KeyError, …
    except Exception as error:
        raise PackageError(
            f"{path} ({path.stat().st_size} bytes) is not a whole GGUF file: {error}. It was cut off or changed; write it again."
        ) from error


def _layout(reader: Any, path: Path, quant: Quantized) -> Layout:
    """What the file should hold, by what its header says that it is."""
    arch = reader.get_field("general.architecture")
    count = arch and reader.get_field(f"{arch.contents()}.block_count")
    if not count:
        raise PackageError(
            f"{path} lacks general.architecture or block_count: it is no model, or not the first shard."
        )
    return lay_out(
        quant,
        sliding_window="carry" if arch.contents() == "granite_swa" else "clamp",
        as_float32=all(tensor.tensor_type.name == "F32" for tensor in reader.tensors),
        layers=count.contents(),
    )


def _difference(entry: Entry, tensor: Any | None) -> str | None:
    """What is wrong with a tensor of the file, if anything, its codes apart."""
    if tensor is None:
        return f"{entry.name} is missing"
    shape = tuple(reversed(tensor.shape.tolist()))
    if (tensor.tensor_type.name, shape) != (entry.kind, entry.shape):
        return f"{entry.name} is {tensor.tensor_type.name} {list(shape)} where {entry.kind} {list(entry.shape)} is expected"
    # A tensor's scale comes back with the tensor.
    if entry.values is not None and not entry.scale_of and not np.array_equal(tensor.data, entry.values):
        return f"{entry.name} holds other values than the model's config gives"
    return None


def _read(
    entry: Entry, source: str, data: npt.NDArray[Any], quant: Quantized, scale: npt.NDArray[np.float32] | None
) -> QuantTensor | npt.NDArray[np.float32]:
    order = entry.order()
    if order is not None:
        rows = np.empty_like(data)
        rows[order] = data
        data = rows
    if entry.block:
        like = quant[source]
        assert isinstance(like, QuantTensor)
        if scale is not None and like.scale_codes is not None:
            like = replace(like, scale_codes=replace(like.scale_codes, block=scale))
        return entry.block.unpack(data, like)
    bits = data.view(np.uint16) if entry.kind == "BF16" else data
    values = to_float32(bits, entry.kind)
    if entry.offset:
        # Adding has rounded, so taking off again does not give the same: it is the same if adding gives this.
        own = quant.float32(source)
        return (
            own
            if np.array_equal(own + np.float32(entry.offset), values)
            else values - np.float32(entry.offset)
        )
    return values
