"""What the formats share: the tensors that stand for a weight, as the files have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.quantize.tensor import QuantTensor

Array = npt.NDArray[Any]

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1}
"""Bytes of an element, by safetensors' name of its type."""

_TYPES = {"float16": "F16", "float32": "F32", "int32": "I32", "int64": "I64", "int8": "I8", "uint8": "U8"}

ADDED_ERROR = 2**-11 / 3**0.5 / 1.5
"""Of rounding to float16: uniform within half a step of 2^-10, of significands that are 1.5 on average."""


@dataclass(frozen=True)
class Part:
    """A tensor of the files.

    Attributes:
        dtype: safetensors' name of its type.
        shape: of the tensor.
        rows: gives some of its rows.
        height: rows that ``rows`` counts, each of as many bytes; 1: it gives the whole.
    """

    dtype: str
    shape: tuple[int, ...]
    rows: Callable[[slice], Array]
    height: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * WIDTHS[self.dtype]


def beside(base: str, suffixes: Iterable[str]) -> tuple[str, ...]:
    """Names of the tensors that may stand for the weight of module ``base``, by the suffixes of a format."""
    return tuple(f"{base}.{suffix}" for suffix in suffixes)


def held(array: Array, dtype: str | None = None) -> Part:
    """A small tensor that is in memory (or mapped)."""
    return Part(dtype or _TYPES[array.dtype.name], array.shape, lambda rows: np.ascontiguousarray(array))


def halves(tensor: QuantTensor) -> Part:
    """The weight that the codes are, rounded to float16 [out, in]."""
    return Part(
        "F16",
        tensor.shape,
        lambda rows: tensor.rows(rows).dequantize().astype(np.float16),
        len(tensor.packed),
    )
