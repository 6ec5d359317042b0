"""Round to nearest: each weight takes the closest code under the grid that fits its group best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tapeout.quantize import lattice
from tapeout.quantize.lattice import Floats, Grid
from tapeout.quantize.scheme import Scheme


@dataclass(frozen=True)
class Rounded:
    """Codes of some rows, uint8 [rows, in], and the grid that they were chosen under."""

    codes: npt.NDArray[np.uint8]
    grid: Grid


def round_to_nearest(
    weight: Floats,
    scheme: Scheme,
    importance: Floats | None = None,
    *,
    tensor_scale: np.float32 | None = None,
) -> Rounded:
    """Round rows of a weight [rows, in]; see ``lattice.fit`` for the arguments and what it raises."""
    grid = lattice.fit(weight, scheme, importance, tensor_scale=tensor_scale)
    return Rounded(lattice.nearest(weight, scheme, grid), grid)
