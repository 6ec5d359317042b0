"""Schemes that only a foreign checkpoint has: bits, groups and scales that no rounding of ours makes, under names that say them."""

from __future__ import annotations

import re
from dataclasses import replace

from tapeout.errors import SchemeError, nearest
from tapeout.quantize.scheme import SCHEMES, Scheme

# float8 under one float32 a tensor: every row's scale is the float8 1.
FP8_TENSOR = Scheme("fp8-tensor", 8, None, "codebook", "e4m3", "e4m3")


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
    if name == FP8_TENSOR.name:
        return FP8_TENSOR
    if integers := re.fullmatch(r"int([2-8])-g([1-9]\d*)(-asym)?", name):
        bits, group, asymmetric = integers.groups()
        return Scheme(name, int(bits), int(group), "asymmetric" if asymmetric else "symmetric")
    raise SchemeError(f"'{name}' is not a scheme{nearest(name, SCHEMES)}.")
