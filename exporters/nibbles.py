"""Canonical nibbles as NVIDIA's 4-bit kernels have them, two rows in a byte: the one packer of directories that is more than a view."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout import Late

_kernels = Late("tapeout.exporters.kernels")


def rows_together(packed: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Nibbles of two columns a byte, the code plus 8, as two rows a byte, the even one low, two's complement: [2 n, in / 2] to [n, in]."""
    together = np.empty((len(packed) // 2, packed.shape[1]), "<u2")
    _kernels.rows_together(np.ascontiguousarray(packed), together)
    return together.view(np.uint8)
