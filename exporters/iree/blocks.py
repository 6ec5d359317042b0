"""What of a tensor's codes stands in the archive: parameters with IREE's own element types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.exporters import Carry, Exact, Refused
from tapeout.quantize import QuantTensor, Scheme
from tapeout.quantize.tensor import pack, unpack

Array = npt.NDArray[Any]

FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
"""Element types of what is no code, by safetensors' name of the checkpoint's."""

_WIDTHS = {"f32": 32, "f16": 16, "bf16": 16, "i8": 8, "i4": 4}


def bits_of(kind: str) -> int:
    """Bits of an element; i4 lies packed in pairs, the lower half of a byte first."""
    return _WIDTHS[kind]


@dataclass(frozen=True)
class Container:
    """How codes of a kind are held.

    Attributes:
        kind: of ``scheme.kind``: a ``symmetric`` code is a signed integer, the others are the unsigned codes themselves.
        element: type of a code, i4 or i8; codes of 3 and 2 bits take 4, those of 6 and 5 bits 8.
        scale: type of a scale: float32 where the scale is itself made of codes, of which the file has the value.
    """

    kind: str
    element: str
    scale: str

    def codes(self, tensor: QuantTensor) -> npt.NDArray[np.uint8]:
        """Codes [rows, in] as bytes [rows, in · bits / 8]."""
        codes = tensor.codes()
        if self.kind == "symmetric":
            codes = codes - np.uint8(1 << (tensor.bits - 1))
        return pack(codes & np.uint8(15), 4) if self.element == "i4" else codes

    def unpacked(self, data: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
        """Undo ``codes``: bytes to what the store's ``packed`` is, for codes of that many bits."""
        codes = unpack(data, bits_of(self.element), data.shape[1] * 8 // bits_of(self.element))
        if self.kind == "symmetric":
            codes = codes + np.uint8(1 << (bits - 1))
            codes &= np.uint8(15 if self.element == "i4" else 255)
        return pack(codes, bits)


def container(scheme: Scheme) -> Container:
    """What holds codes of a scheme; see ``carries``."""
    return Container(
        scheme.kind,
        "i4" if scheme.bits <= 4 else "i8",
        "f16" if scheme.scales == "float16" else "f32",
    )


def carries(scheme: Scheme) -> Carry:
    """Everything whose weights are an integer or a table's value, less an integer zero point, times a scale."""
    if scheme.kind == "none":
        return Exact("float")
    if scheme.activations:
        weights = {"e4m3-static": "fp8", "e2m1-static": "nvfp4"}
        return Refused("inputs of matmuls stay floats here.", weights.get(scheme.activations, "int8"))
    if scheme.kind == "affine":
        return Refused("the module has no minimum beside the scale.", "int4-g32-asym")
    held = container(scheme)
    zero = 8 if scheme.kind == "asymmetric" else 0
    each = (bits_of(held.scale) + zero) / scheme.group if scheme.group else 0.0
    return Exact(held.element, bits_of(held.element) + each)


PARTS: Mapping[str, Callable[[QuantTensor], Array | None]] = {
    "scale": lambda tensor: tensor.scale,
    "zero_point": lambda tensor: tensor.zero_point,
}
"""What stands beside the codes, row by row."""
