"""A GGUF file's own numbers as float32: what a runtime makes of them without the rounding that comes with their types."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tapeout.errors import PackageError
from tapeout.exporters.gguf.layout import library
from tapeout.files import writing
from tapeout.models import gguf_header


def widened(files: Sequence[Path], out: Path) -> Path:
    """Write the twin of a file, any tool's, or of its shards, with every tensor as F32; one tensor in memory at a time.

    Raises:
        PackageError: a file is not whole, or holds a type that the gguf library does not read.
    """
    gguf = library()
    try:
        readers = [gguf_header.read(path) for path in files]
    except Exception as error:  # what a damaged file raises depends on where it is cut
        raise PackageError(f"{files[0]} cannot be read: {error}.") from error
    fields = readers[0].fields
    with writing(out):
        writer = gguf.GGUFWriter(out, fields["general.architecture"].contents())
        for name, entry in fields.items():
            # The first says so already; what tells shards and types apart is no more.
            if not name.startswith(("GGUF.", "split.")) and name not in _OWN:
                kind, *inner = entry.types
                writer.add_key_value(name, entry.contents(), kind, inner[-1] if inner else None)
        named = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        # A scale of all of a tensor (NVFP4) is read beside that type only.
        scales = {
            name: scale.data
            for name, tensor in named.items()
            if tensor.tensor_type.name == "NVFP4" and (scale := named.get(_scale(name))) is not None
        }
        tensors = [tensor for name, tensor in named.items() if name not in {_scale(each) for each in scales}]
        for tensor in tensors:
            shape = tuple(reversed(tensor.shape.tolist()))
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * tensor.n_elements)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_float32(tensor) * scales.get(tensor.name, np.float32(1)))
        writer.close()
    return out


_OWN = ("general.architecture", "general.file_type", "general.quantization_version")


def _scale(name: str) -> str:
    return f"{name.removesuffix('weight')}scale"


def _float32(tensor: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    try:
        values = library().dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise PackageError(f"{tensor.name} is {tensor.tensor_type.name}: {error}.") from error
    shape = tuple(reversed(tensor.shape.tolist()))
    return np.ascontiguousarray(values, np.float32).reshape(shape)
