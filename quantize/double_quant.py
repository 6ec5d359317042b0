"""Double quantization: the float32 scales of NF4 become 8-bit codes over blocks of 256 (QLoRA, section 3).

The 256 levels are bitsandbytes' dynamic map: a sign, a run of zeros that is the decimal exponent, and the rest as a
linear fraction (8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 1.3).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tapeout.quantize.tensor import SCALES_PER_BLOCK


def dynamic_map() -> npt.NDArray[np.float32]:
    """The 256 signed levels, ascending, float32 [256]; exponents 10^-6 … 10^0, one exact 0 and one exact 1."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1.0, 2**exponent + 1, dtype=np.float32).astype(np.float64)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        levels += [*means, *-means]
    return np.sort(np.array(levels, np.float32))


def layout(out: int, groups: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The parts of the quantized scales in a store: dtype and shape."""
    return {
        "scale_codes": ("U8", (out, groups)),
        "scale_block": ("F32", (-(-out * groups // SCALES_PER_BLOCK),)),
        "scale_offset": ("F32", (1,)),
        "scale_codebook": ("F32", (256,)),
    }


def quantize_scales(scale: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.generic]]:
    """Quantize scales [out, groups] into the parts of ``layout``."""
    codebook = dynamic_map()
    offset = np.float32(scale.mean(dtype=np.float64))
    flat = scale.reshape(-1) - offset
    padded = np.zeros(-(-flat.size // SCALES_PER_BLOCK) * SCALES_PER_BLOCK, np.float32)
    padded[: flat.size] = flat
    blocks = padded.reshape(-1, SCALES_PER_BLOCK)
    block_scale = np.abs(blocks).max(axis=1)
    unit = blocks / np.where(block_scale == 0, np.float32(1), block_scale)[:, None]
    between = (codebook[1:] + codebook[:-1]) / np.float32(2)
    codes = np.searchsorted(between, unit.reshape(-1)[: flat.size], side="left").astype(np.uint8)
    return {
        "scale_codes": codes.reshape(scale.shape),
        "scale_block": block_scale,
        "scale_offset": np.array([offset], np.float32),
        "scale_codebook": codebook,
    }
