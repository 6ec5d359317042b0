"""Tensors of codes, as tests of containers make them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tapeout.quantize import SCHEMES, QuantTensor, lattice
from tapeout.quantize.tensor import pack


def tensor_of(scheme: str, codes: np.ndarray, **parts: Any) -> QuantTensor:
    """A tensor of these codes [out, in] and these parts (see ``lattice.layout``), as a store has it."""
    kinds = {"U8": np.uint8, "F16": np.float16, "F32": np.float32}
    layout = lattice.layout(SCHEMES[scheme], *codes.shape)
    found = {
        name: np.asarray(part, kinds[layout[name][0]]).reshape(layout[name][1])
        for name, part in parts.items()
    }
    packed = pack(codes.astype(np.uint8), SCHEMES[scheme].bits)
    return lattice.assemble({"codes": packed, **found}, SCHEMES[scheme], codes.shape[1])
