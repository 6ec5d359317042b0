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


@dataclass(frozen=True)
class Scheme:
    """How the weights of a matrix become codes.

    Attributes:
        name: what the user types.
        bits: bits of a code; 0 for ``none``, whose weights stay as the checkpoint has them.
        group: weights along ``in`` that share a scale; None: the whole row (per channel).
        kind: ``symmetric`` (codebook: the integers around zero), ``asymmetric`` (integer zero point per group),
            ``nf4`` (codebook NF4), ``none``.
        double_quant: the scales are quantized once more, as QLoRA does (blocks of 256 scales).
    """

    name: str
    bits: int = 0
    group: int | None = None
    kind: Literal["none", "symmetric", "asymmetric", "nf4"] = "none"
    double_quant: bool = False

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
        if self.kind == "nf4":
            return NF4
        levels = np.arange(2**self.bits, dtype=np.float32)
        return levels if self.kind == "asymmetric" else levels - np.float32(2 ** (self.bits - 1))

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise SchemeError when the group does not divide the rows of tensor ``name`` [out, in]."""
        if self.group and shape[-1] % self.group:
            fits = [str(g) for g in (16, 32, 64, 128, 256) if shape[-1] % g == 0]
            raise SchemeError(
                f"group {self.group} of scheme {self.name} does not divide in_features {shape[-1]} of {name}; "
                f"fits: {', '.join(fits) or 'int8 (per channel) or none'}."
            )

    def bits_per_weight(self, in_features: int) -> float:
        """Bits that a weight takes in a row of ``in_features``, its share of scale and zero point counted."""
        if self.kind == "none":
            raise SchemeError("scheme none has the checkpoint's own width.")
        group = self.group or in_features
        scale = 8 + 32 / 256 if self.double_quant else 16
        return self.bits + (scale + (self.bits if self.kind == "asymmetric" else 0)) / group


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("none"),
        Scheme("int8", 8, None, "symmetric"),
        *(Scheme(f"int4-g{g}", 4, g, "symmetric") for g in (32, 64, 128)),
        *(Scheme(f"int4-g{g}-asym", 4, g, "asymmetric") for g in (32, 64, 128)),
        Scheme("nf4", 4, 64, "nf4"),
        Scheme("nf4-dq", 4, 64, "nf4", double_quant=True),
    )
}
