"""What the formats share: how the tensors that stand for a weight are named."""

from __future__ import annotations

from collections.abc import Iterable


def beside(base: str, suffixes: Iterable[str]) -> tuple[str, ...]:
    """Names of the tensors that may stand for the weight of module ``base``, by the suffixes of a format."""
    return tuple(f"{base}.{suffix}" for suffix in suffixes)
