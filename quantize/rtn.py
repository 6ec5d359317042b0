"""Round to nearest: each weight takes the closest code under the grid that fits its group best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout import Late
from tapeout.models.checkpoint import to_float32
from tapeout.quantize import lattice
from tapeout.quantize.lattice import Floats, Grid
from tapeout.quantize.scheme import Scheme

_nibbles = Late("tapeout.quantize.nibbles")
_MOST = 128  # weights of a group: a longer one is summed in another order (``kernels.LONG``)


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


def in_one_pass(scheme: Scheme) -> bool:
    """Whether ``packed_rows`` makes codes of a scheme."""
    group = scheme.group or 0
    return scheme.kind == "symmetric" and scheme.bits == 4 and 0 < group <= _MOST and group % 8 == 0


def packed_rows(
    bits: npt.NDArray[Any], dtype: str, scheme: Scheme
) -> tuple[dict[str, npt.NDArray[Any]], int] | None:
    """What a store keeps of rows [rows, in] as the checkpoint has them, and how many scales were raised.

    The same as of ``round_to_nearest``, in a third of its time: nothing is in memory between a weight and its code. None: a weight is not
    finite, or a scale beyond float16, which ``round_to_nearest`` says.

    Args:
        bits: C-contiguous; of BF16 uint16.
        dtype: safetensors' name of their type.
        scheme: one that is made ``in_one_pass``.
    """
    rows, into = bits.shape
    narrow, group = dtype == "BF16", scheme.group or into
    words = (bits if narrow else to_float32(bits, dtype)).reshape(-1).view(np.uint64)
    codes, scale = np.empty((rows, into // 2), np.uint8), np.empty((rows, into // group), np.float16)
    flat = codes.reshape(-1).view(np.uint32), scale.reshape(-1).view(np.uint16)
    clamped, sound = _nibbles.round_words(words, narrow, group, lattice.FAST, *flat)
    return ({"codes": codes, "scale": scale}, clamped) if sound else None
