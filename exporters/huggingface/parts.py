"""What the formats share: how the tensors that stand for a weight are named."""

from __future__ import annotations

from collections.abc import Iterable

from tapeout.quantize import QuantTensor, Scheme


def beside(base: str, suffixes: Iterable[str]) -> tuple[str, ...]:
    """Names of the tensors that may stand for the weight of module ``base``, by the suffixes of a format."""
    return tuple(f"{base}.{suffix}" for suffix in suffixes)


def under_one(tensor: QuantTensor, scheme: Scheme) -> str:
    """What must be the same of matrices that servers put together: the scheme, the one scale over all others, and that of inputs.

    Of several scales servers take the largest, and round codes once more.
    """
    found = str(scheme)
    if scheme.scales == "e4m3" and tensor.scale_codes is not None:
        found += f" under {float(tensor.scale_codes.block[0]):.9g}"
        if tensor.input_scale is not None:
            found += f" with inputs under {float(tensor.input_scale):.9g}"
    return found
