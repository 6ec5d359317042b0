"""Schemes: what the user types to say how weights become codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tapeout.errors import SchemeError, nearest

# The 16 quantiles of a normal distribution, scaled to [-1, 1] with an exact zero: QLoRA (arXiv:2305.14314), appendix E.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)

# E2M1, by its four bits: sign, two of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3). Code 8 is -0.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

# llama.cpp's (``kvalues_iq4nl`` in ggml-common.h).
IQ4_NL = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
    np.float32,
)


def _e4m3() -> npt.NDArray[np.float32]:
    """E4M3 by its eight bits (OCP 8-bit Floating Point 1.0, section 5.1): bias 7, no infinity, 0x7F and 0xFF are NaN."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, (bits & 7).astype(np.float64)
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    value[(bits & 127) == 127] = np.nan
    return np.where(bits & 128, -value, value).astype(np.float32)


E4M3 = _e4m3()
E4M3_ONE = 0x38  # the code of 1

# A tensor's codes of 16 levels, and of 256.
LEVELS: dict[str, npt.NDArray[np.float32]] = {"nf4": NF4, "e2m1": E2M1, "e4m3": E4M3, "iq4_nl": IQ4_NL}

SUPER = 256  # weights of a super-block

# What the largest input of a calibration text becomes, in steps of the scale: the largest integer, E4M3, or E2M1 under the largest E4M3.
_INPUT_RANGES = {"int8-static": 127, "e4m3-static": 448, "e2m1-static": 6 * 448}


@dataclass(frozen=True)
class Scheme:
    """How the weights of a matrix become codes.

    Attributes:
        name: what the user types.
        bits: bits of a code.
        group: weights along ``in`` that share a scale; None: a whole row (per channel).
        kind: what a code is before its scale: ``symmetric`` (code - 2**(bits - 1)), ``asymmetric`` (code - zero_point, an
            integer a group), ``codebook`` (``levels[code]``), ``affine`` (the code, with a minimum taken off after scaling),
            ``none``.
        levels: of a codebook: a name in LEVELS.
        scales: how a group's scale is kept: ``float16``; ``double`` (NF4's scales quantized once more as QLoRA does, blocks of
            256 scales); ``e8m0`` (a power of two); ``e4m3`` (under one float32 a tensor); ``super`` (integers under one float16
            a super-block of 256 weights); ``float32`` (of checkpoints that others have quantized so; nothing is rounded to it).
        scale_bits: bits of an integer scale under a super-block.
        activations: what the runtime shall do to the inputs: ``int8`` (per token), ``int8-static`` and ``e4m3-static`` (under one
            calibrated scale a tensor), ``e2m1-static`` (16 under an E4M3 scale under such a one), None: leave them.
    """

    name: str
    bits: int = 0
    group: int | None = None
    kind: Literal["none", "symmetric", "asymmetric", "codebook", "affine"] = "none"
    levels: str = ""
    scales: Literal["float16", "float32", "double", "e8m0", "e4m3", "super"] = "float16"
    scale_bits: int = 16
    activations: Literal["int8", "int8-static", "e4m3-static", "e2m1-static"] | None = None

    @property
    def calibrated(self) -> bool:
        """Whether inputs are rounded under a scale that calibration finds."""
        return self.activations in _INPUT_RANGES

    def input_scale(self, largest: np.float32) -> np.float32:
        """The scale of inputs whose largest magnitude on the calibration text is given; of a scheme that is ``calibrated``."""
        assert self.activations is not None
        if self.activations != "int8-static" and not largest:
            return np.float32(1)  # as of weights that are all zero
        scale = np.float32(largest) / np.float32(_INPUT_RANGES[self.activations])
        return reciprocal(scale) if self.activations == "e2m1-static" else scale

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Return the scheme of that name; SchemeError suggests the nearest."""
        try:
            return SCHEMES[text]
        except KeyError:
            raise SchemeError(f"'{text}' is not a scheme{nearest(text, SCHEMES)}.") from None

    def __str__(self) -> str:
        return self.name

    def codebook(self) -> npt.NDArray[np.float32]:
        """The value of each code before its scale, float32 [2**bits]; for asymmetric ones before the zero point too."""
        if self.kind == "codebook":
            return LEVELS[self.levels]
        levels = np.arange(2**self.bits, dtype=np.float32)
        return levels - np.float32(2 ** (self.bits - 1)) if self.kind == "symmetric" else levels

    def scale_codebook(self) -> npt.NDArray[np.float32] | None:
        """The value of each code of a scale that is itself quantized, float32 [256]; None for a float16 scale.

        ``super``: signed integers for symmetric codes (stored with an offset of 2**(scale_bits - 1)), else unsigned ones.
        """
        if self.scales == "double":
            return dynamic_map()
        if self.scales == "e8m0":
            return np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)
        if self.scales == "e4m3":
            return E4M3
        if self.scales == "super":
            offset = 2 ** (self.scale_bits - 1) if self.kind == "symmetric" else 0
            return np.arange(256, dtype=np.float32) - np.float32(offset)
        return None

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise SchemeError when the group (or the super-block) does not divide the rows of tensor ``name`` [out, in]."""
        unit = SUPER if self.scales == "super" else self.group
        if unit and shape[-1] % unit:
            fits = [str(g) for g in (16, 32, 64, 128, 256) if shape[-1] % g == 0]
            what = "super-block" if self.scales == "super" else "group"
            raise SchemeError(
                f"{what} {unit} of scheme {self.name} does not divide in_features {shape[-1]} of {name}; "
                f"fits: {', '.join(fits) or 'int8 (per channel) or none'}."
            )

    def bits_per_weight(self, in_features: int) -> float:
        """Bits that a weight takes in a row of ``in_features``, its share of scale, minimum and zero point counted.

        What a tensor has once (the offset of double quantization, the float32 of e4m3 scales) is not. It is what a packed file
        takes; the store spends a whole byte on a zero point and on a sub-scale.
        """
        if self.kind == "none":
            raise SchemeError("scheme none has the checkpoint's own width.")
        group = self.group or in_features
        kept = 2 if self.kind == "affine" else 1  # a scale; and a minimum
        scale = {
            "float16": 16.0 * kept,
            "float32": 32.0,
            "double": 8 + 32 / 256,
            "e8m0": 8.0,
            "e4m3": 8.0 if self.group else 0.0,  # rows of float8 codes have none of their own
        }.get(self.scales, kept * (self.scale_bits + 16 * group / SUPER))
        return self.bits + (scale + (self.bits if self.kind == "asymmetric" else 0)) / group


def reciprocal(scale: np.float32) -> np.float32:
    """The float32 next to ``scale`` that is one over another: formats that divide by a scale hold it exactly."""
    return np.float32(1) / (np.float32(1) / scale)


def dynamic_map() -> npt.NDArray[np.float32]:
    """Bitsandbytes' 256 signed levels, ascending, float32 [256]; exponents 10^-6 … 10^0, one exact 0 and one exact 1.

    A sign, a run of zeros that is the decimal exponent, and the rest as a linear fraction (8-bit Optimizers via Block-wise
    Quantization, arXiv:2110.02861, section 1.3).
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent
        # In float32, as torch.linspace does it: from both ends to the middle, product and sum rounded together.
        step = float((np.float32(1) - np.float32(0.1)) / np.float32(count))
        up = float(np.float32(0.1)) + step * np.arange(count + 1)
        down = 1.0 - step * np.arange(count, -1, -1)
        edges = np.where(np.arange(count + 1) < (count + 1) / 2, up, down).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        levels += [*means, *-means]
    return np.sort(np.array(levels, np.float32))


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("none"),
        Scheme("int8", 8, None, "symmetric"),
        *(Scheme(f"int8-g{g}", 8, g, "symmetric") for g in (32, 128)),
        Scheme("w8a8", 8, None, "symmetric", activations="int8"),
        Scheme("w8a8-static", 8, None, "symmetric", activations="int8-static"),
        *(Scheme(f"int4-g{g}", 4, g, "symmetric") for g in (32, 64, 128)),
        *(Scheme(f"int4-g{g}-asym", 4, g, "asymmetric") for g in (32, 64, 128)),
        *(Scheme(f"int3-g{g}", 3, g, "symmetric") for g in (64, 128)),
        Scheme("int2-g64", 2, 64, "symmetric"),
        Scheme("nf4", 4, 64, "codebook", "nf4"),
        Scheme("nf4-dq", 4, 64, "codebook", "nf4", "double"),
        Scheme("fp8", 8, None, "codebook", "e4m3"),
        Scheme("fp8-static", 8, None, "codebook", "e4m3", "e4m3", activations="e4m3-static"),
        Scheme("mxfp4", 4, 32, "codebook", "e2m1", "e8m0"),
        Scheme("nvfp4", 4, 16, "codebook", "e2m1", "e4m3"),
        Scheme("nvfp4-w4a4", 4, 16, "codebook", "e2m1", "e4m3", activations="e2m1-static"),
        Scheme("q6_k", 6, 16, "symmetric", "", "super", 8),
        Scheme("q5_k", 5, 32, "affine", "", "super", 6),
        Scheme("q4_k", 4, 32, "affine", "", "super", 6),
        Scheme("q3_k", 3, 16, "symmetric", "", "super", 6),
        Scheme("q2_k", 2, 16, "affine", "", "super", 4),
    )
}
