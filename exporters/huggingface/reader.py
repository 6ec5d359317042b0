"""Read a directory back with the format owner's library: what the ``codes`` gate compares with the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import MissingToolchain, PackageError
from tapeout.exporters import Artifact
from tapeout.exporters.huggingface.parts import beside
from tapeout.exporters.huggingface.writer import FORMATS, INDEX
from tapeout.quantize import Quantized, QuantTensor

Floats = npt.NDArray[np.float32]
Kind = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
"""Makes what reads weights back, of ``quantization_config`` and the tensors by name."""


class Tensors(Mapping[str, Any]):
    """The tensors of a directory's safetensors files by name, as torch tensors; read when they are asked for.

    Raises:
        PackageError: a file is truncated or absent.
    """

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        names = ["model.safetensors"]
        self._where: dict[str, Any] = {}
        try:
            if (directory / INDEX).exists():
                said = json.loads((directory / INDEX).read_text(encoding="utf-8"))
                names = sorted(set(said["weight_map"].values()))
            for name in names:
                opened = stack.enter_context(safe_open(directory / name, "pt"))
                self._where |= dict.fromkeys(opened.keys(), opened)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise PackageError(f"{directory} cannot be read: {error}.") from error

    def __getitem__(self, name: str) -> Any:
        return self._where[name].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def read_codes(
    artifact: Artifact, quant: Quantized, kind: Kind | None = None
) -> Iterator[tuple[str, QuantTensor | Floats]]:
    """Yield every tensor that the files hold, one in memory at a time, by its Hugging Face name.

    Codes come back as a QuantTensor, unpacked by the library; what the files hold as floats, as float32 [shape].

    ``kind``: what reads a format whose library is not one that can stand beside us; None: the format's own ``Reader``.

    Raises:
        PackageError: a file is truncated, or no such file.
        MissingToolchain: the format's library is absent.
    """
    with ExitStack() as stack:
        tensors = Tensors(artifact.directory, stack)
        reader, suffixes = _reader(artifact.directory, tensors, kind)
        left = set(tensors)
        for name in quant:
            base = name.removesuffix(".weight")
            left -= {name, *beside(base, suffixes)}
            if reader is not None and (codes := reader.codes(base)) is not None:
                yield name, codes
            elif name in tensors:
                yield name, tensors[name].float().numpy()
        for name in sorted(left):
            yield name, tensors[name].float().numpy()


def read_weights(directory: Path, kind: Kind | None = None) -> Iterator[tuple[str, Floats]]:
    """The weights that the files mean, float32, by name, dequantized by the format's library (or by ``kind``, see ``read_codes``).

    Raises:
        PackageError: a file is truncated, or no such file.
        MissingToolchain: the format's library is absent.
    """
    with ExitStack() as stack:
        tensors = Tensors(directory, stack)
        reader, suffixes = _reader(directory, tensors, kind)
        read: set[str] = set()
        for name in tensors:
            base = name.removesuffix("_packed").removesuffix(".weight")
            if name in read or not name.endswith((".weight", ".weight_packed")):
                continue
            found = reader.weight(base) if reader is not None else None
            if found is not None:
                read |= {f"{base}.weight", *beside(base, suffixes)}
            yield f"{base}.weight", tensors[name].float().numpy() if found is None else found
        for name in tensors:
            if name not in read and not name.endswith((".weight", ".weight_packed")):
                yield name, tensors[name].float().numpy()


def _reader(directory: Path, tensors: Tensors, kind: Kind | None) -> tuple[Any, tuple[str, ...]]:
    """What reads the codes of a directory, by its ``quantization_config``, and the suffixes of their tensors; None: all are floats."""
    try:
        said = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError) as error:
        raise PackageError(f"{directory / 'config.json'} cannot be read: {error}.") from error
    if said is None:
        return None, ()
    packing = FORMATS.get(str(said.get("quant_method")))
    if packing is None:
        raise PackageError(
            f"{directory / 'config.json'} names the method {said.get('quant_method')}, which is none of these."
        )
    try:
        return (kind or packing.Reader)(said, tensors), packing.SUFFIXES
    except ImportError as error:
        raise MissingToolchain(
            f"reading the format needs {packing.LIBRARY} ({error}): pip install 'tapeout[rocm]'"
        ) from error
    except ValueError as error:
        raise PackageError(f"{directory / 'config.json'}: {error}.") from error
