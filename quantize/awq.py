"""Scales of input channels that make a weight easier to round, and are taken off again where the inputs come from.

AWQ (Lin et al., arXiv:2306.00978): channels with large activations are scaled up before rounding, by a power of their mean
magnitude that a grid search finds. SmoothQuant (Xiao et al., arXiv:2211.10438): activations' outliers move into the weights, so
that both fit int8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tapeout.quantize import rtn
from tapeout.quantize.lattice import Floats, ScaleOverflow, dequantize, tensor_scale
from tapeout.quantize.scheme import Scheme

_STEPS = 20  # of the power, from 0 to 1 (the paper's section 3.2)
_SMOOTH = 0.5  # how much of the outliers moves into the weights (SmoothQuant, section 4)


@dataclass(frozen=True)
class Inputs:
    """What calibration knows of the inputs of some linear layers.

    Attributes:
        square: mean of x², float32 [in]. mean, largest: of its magnitude, float32 [in].
        sample: some of the inputs, float32 [rows, in].
    """

    square: Floats
    mean: Floats
    largest: Floats
    sample: Floats

    def scaled(self, scale: Floats) -> Inputs:
        """The same of ``x / scale``."""
        return Inputs(self.square / scale**2, self.mean / scale, self.largest / scale, self.sample / scale)


def awq_scale(
    weights: Sequence[Floats], schemes: Sequence[Scheme], inputs: Inputs, heads: tuple[int, int] | None = None
) -> Floats:
    """The scale of input channels, float32 [in], that leaves the least error of the layers' outputs on the sample.

    Args:
        weights: float32 [out, in] each, of all that read these inputs. schemes: of each; one at least has codes.
        heads: (key-value heads, query heads to each): channels of queries that share a value head take one scale.
    """
    mean = np.maximum(inputs.mean, np.float32(1e-8))
    if heads:
        mean = np.broadcast_to(
            (each := mean.reshape(*heads, -1)).mean(axis=1, keepdims=True), each.shape
        ).reshape(-1)
    best, least = np.ones_like(mean), np.inf
    for step in range(_STEPS):
        scale = mean ** np.float32(step / _STEPS)
        scale /= np.sqrt(scale.max() * scale.min())
        if not np.isfinite(scale).all() or scale.min() <= 0:
            continue
        error = sum(
            _error(weight, scheme, scale, inputs)
            for weight, scheme in zip(weights, schemes, strict=True)
            if scheme.kind != "none"
        )
        if error < least:
            best, least = scale, error
    return best


def smooth_scale(weights: Sequence[Floats], inputs: Inputs) -> Floats:
    """SmoothQuant's scale of input channels, float32 [in]: ``max|x|^½ / max|w|^½``."""
    of_weights = np.maximum.reduce([np.abs(weight).max(axis=0) for weight in weights])
    scale = np.maximum(inputs.largest, 1e-5) ** _SMOOTH / np.maximum(of_weights, 1e-5) ** (1 - _SMOOTH)
    return np.asarray(scale, np.float32)


def _error(weight: Floats, scheme: Scheme, scale: Floats, inputs: Inputs) -> float:
    whole = np.float32(1)
    scaled = weight * scale
    if scheme.scales == "e4m3":
        whole = tensor_scale(float(np.abs(scaled).max()), scheme) or whole
    try:
        rounded = rtn.round_to_nearest(scaled, scheme, inputs.square / scale**2, tensor_scale=whole)
    except ScaleOverflow:
        return 0.0  # the tensor will stay float
    off = dequantize(rounded.codes, scheme, rounded.grid)
    off /= scale
    off -= weight
    return float(np.square(inputs.sample @ off.T, dtype=np.float64).sum())
