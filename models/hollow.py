"""Tensors that have a name, a type and a shape, and no bytes: what a plan is made from before there are weights, or without reading them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError
from tapeout.models.checkpoint import FLOATS, Checkpoint, SourceTensor
from tapeout.models.decoder import TensorSpec

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class HollowTensor(SourceTensor):
    """A float tensor of zeros that take no memory; there is no file behind it."""

    def bits(self) -> npt.NDArray[Any]:
        """Zeros [shape] of its own type (BF16: their bits)."""
        return np.broadcast_to(np.zeros((), _TYPES[self.dtype]), self.shape)

    def pieces(self, first: int, last: int, step: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Rows ``first`` … ``last`` of ``bits`` by ``step``, with the first's number."""
        for at in range(first, last, step):
            yield at, np.array(self.bits()[at : min(at + step, last)])

    def sha256(self) -> str:
        """ModelError: there is nothing to take a digest of."""
        raise ModelError(f"{self.name} has a shape and no weights: it can be planned with, not quantized.")


def checkpoint(
    directory: Path,
    specs: Mapping[str, TensorSpec],
    dtype: str,
    known: Mapping[str, SourceTensor] | None = None,
) -> Checkpoint:
    """The tensors of ``specs`` without bytes; of the type that ``known`` has of each where it is a float, else ``dtype``."""
    found = {}
    for name, spec in specs.items():
        own = known[name].dtype if known and name in known and known[name].dtype in FLOATS else dtype
        size = math.prod(spec.shape) * _TYPES[own].itemsize
        found[name] = HollowTensor(name, own, tuple(spec.shape), directory / "config.json", 0, size)
    return Checkpoint(directory, found)


def dtype_of(config: Mapping[str, Any]) -> str:
    """The type that ``config.json`` says its weights have, by safetensors' name; float32 where it says none, as transformers has it."""
    said = config.get("dtype") or config.get("torch_dtype") or "float32"
    if said not in _NAMES:
        raise ModelError(f"config.json says dtype {said}; expected one of {', '.join(_NAMES)}.")
    return _NAMES[said]
