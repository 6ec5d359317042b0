"""Schemes that only a foreign checkpoint has: bits, groups and scales that no rounding of ours makes, under names that say them."""

from __future__ import annotations

import re
from dataclasses import replace

from tapeout.errors import SchemeError, nearest
from tapeout.quantize.scheme import SCHEMES, Scheme

# float8 under one float32 a tensor: every row's scale is the float8 1.
FP8_TENSOR = Scheme("fp8-tensor", 8, None, "codebook", "e4m3", "e4m3")

Q4_1 = Scheme("q4_1", 4, 32, "affine")
Q5_1 = Scheme("q5_1", 5, 32, "affine")
IQ4_NL = Scheme("iq4_nl", 4, 32, "codebook", "iq4_nl")
_FOREIGN = {scheme.name: scheme for scheme in (FP8_TENSOR, Q4_1, Q5_1, IQ4_NL)}

_FLOAT32 = "-f32"


def with_float32_scales(scheme: Scheme) -> Scheme:
    """The same scheme where scales are float32."""
    return replace(scheme, name=scheme.name + _FLOAT32, scales="float32")


def named(scheme: Scheme) -> Scheme:
    """The known scheme that is the same, else this one under a name that ``scheme_of`` reads."""
    for known in SCHEMES.values():
        if replace(known, name="") == replace(scheme, name=""):
            return known
    return replace(scheme, name=f"int{scheme.bits}-g{scheme.group}{'-asym' * (scheme.kind == 'asymmetric')}")


def scheme_of(name: str) -> Scheme:
    """The scheme of that name, a foreign one too; SchemeError suggests the nearest."""
    if name in SCHEMES:
        return SCHEMES[name]
    if name in _FOREIGN:
        return _FOREIGN[name]
    if name.endswith(_FLOAT32) and (plain := scheme_of(name.removesuffix(_FLOAT32))).scales == "float16":
        return with_float32_scales(plain)
    if integers := re.fullmatch(r"int([2-8])-g([1-9]\d*)(-asym)?", name):
        bits, group, asymmetric = integers.groups()
        return Scheme(name, int(bits), int(group), "asymmetric" if asymmetric else "symmetric")
    raise SchemeError(f"'{name}' is not a scheme{nearest(name, SCHEMES)}.")
