"""Rotary positions: how far each pair of a head's elements turns at a position, for every scaling that is known.

Computed in float64 and rounded once. Hugging Face multiplies in float32, where an angle at position 200,000 is off by up to
0.01 radians.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError, nearest

Floats64 = npt.NDArray[np.float64]

# By Hugging Face's rope_type: the fields that it must have, and those that it may have.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("original_max_position_embeddings",),
        ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("original_max_position_embeddings", "short_factor", "long_factor"),
        ("factor", "attention_factor"),
    ),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
}


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Attributes:
        theta: base of the frequencies.
        kind: Hugging Face's ``rope_type``.
        parameters: its scaling fields, with what they leave to a default filled in:
            ``linear``: factor. ``dynamic``: factor, max_position_embeddings. ``llama3``: factor, low_freq_factor,
            high_freq_factor, original_max_position_embeddings. ``yarn``: factor, beta_fast, beta_slow, truncate,
            original_max_position_embeddings, attention_factor, and mscale_all_dim (0: none). ``longrope``: short_factor
            and long_factor ([dim / 2] each), original_max_position_embeddings, attention_factor.
        dim: how many of a head's elements turn, from the first; even.
        interleaved: element 2 i turns with 2 i + 1; otherwise i with i + dim / 2.
    """

    theta: float
    kind: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dim: int = 0
    interleaved: bool = False


def scaling(kind: str, given: Mapping[str, Any], *, context: int, dim: int) -> dict[str, Any]:
    """``Rope.parameters`` of Hugging Face's scaling fields.

    Args:
        kind: ``rope_type``.
        given: the other fields; None counts as absent.
        context: ``max_position_embeddings``.
        dim: as in Rope.

    Raises:
        ModelError: an unknown type; a field that is missing, not handled, or of the wrong length.
    """
    if kind not in _FIELDS:
        raise ModelError(f"rope_type '{kind}' is not handled{nearest(kind, _FIELDS)}.")
    p = {name: value for name, value in given.items() if value is not None}
    if kind in ("yarn", "longrope", "llama3"):
        p.setdefault("original_max_position_embeddings", context)
    required, optional = _FIELDS[kind]
    found = [f"lacks {name}" for name in required if name not in p]
    found += [f"has {name}, which is not handled" for name in sorted(p.keys() - {*required, *optional})]
    if found:
        raise ModelError(f"RoPE scaling of type '{kind}' {'; '.join(found)}.")
    if kind == "dynamic":
        p["max_position_embeddings"] = context
    if kind in ("yarn", "longrope"):
        trained = float(p["original_max_position_embeddings"])
        p.setdefault("factor", context / trained)
        p.setdefault("attention_factor", _attention_factor(kind, p, trained))
    if kind == "yarn":
        p = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale_all_dim": 0} | p
        p.pop("mscale", None)  # it is in the attention factor
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            p[name] = tuple(float(value) for value in p[name])
            if len(p[name]) != dim // 2:
                raise ModelError(
                    f"RoPE scaling has {len(p[name])} values of {name} for the {dim // 2} pairs of a head."
                )
    return p


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's correction of attention's temperature for a context stretched by ``factor``."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _attention_factor(kind: str, p: Mapping[str, Any], trained: float) -> float:
    factor = float(p["factor"])
    if kind == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(factor, p["mscale"]) / mscale(factor, p["mscale_all_dim"])
    return mscale(factor)


def inverse_frequencies(rope: Rope, length: int = 0) -> Floats64:
    """Radians a position of each rotary pair, float64 [dim / 2] (transformers, ``modeling_rope_utils``).

    Args:
        rope: the positions.
        length: tokens of the whole sequence, those in the cache included. It matters to ``dynamic`` beyond the context that
            the model was made for, and to ``longrope``, whose long factors hold from the first token beyond the length that
            it was trained on.
    """
    p, dim = rope.parameters, rope.dim
    exponent = np.arange(0, dim, 2) / dim
    frequency = 1.0 / rope.theta**exponent
    if rope.kind == "linear":
        frequency = frequency / float(p["factor"])
    elif rope.kind == "dynamic":
        context, factor = int(p["max_position_embeddings"]), float(p["factor"])
        stretch = factor * max(length, context) / context - (factor - 1)
        frequency = 1.0 / (rope.theta * stretch ** (dim / (dim - 2))) ** exponent
    elif rope.kind == "llama3":
        turns = float(p["original_max_position_embeddings"]) * frequency / (2 * math.pi)
        low, high = float(p["low_freq_factor"]), float(p["high_freq_factor"])
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = frequency * ((1 - smooth) / float(p["factor"]) + smooth)
    elif rope.kind == "yarn":
        kept = 1 - _yarn_ramp(rope)
        frequency = frequency / float(p["factor"]) * (1 - kept) + frequency * kept
    elif rope.kind == "longrope":
        long = length > int(p["original_max_position_embeddings"])
        frequency = frequency / np.array(p["long_factor" if long else "short_factor"])
    return np.asarray(frequency, np.float64)


def _yarn_ramp(rope: Rope) -> Floats64:
    """0 for pairs that turn ``beta_fast`` times or more in the trained context, 1 for ``beta_slow`` times or fewer."""
    p = rope.parameters

    def pair_of(turns: float) -> float:
        trained = float(p["original_max_position_embeddings"])
        return rope.dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(float(p["beta_fast"])), pair_of(float(p["beta_slow"]))
    if p["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # as transformers does
    return np.clip((np.arange(rope.dim // 2) - low) / (high - low), 0.0, 1.0)


def attention_factor(rope: Rope) -> float:
    """What cosine and sine are multiplied by (``yarn`` and ``longrope``; 1 otherwise)."""
    return float(rope.parameters.get("attention_factor", 1.0))


def divisors(rope: Rope, length: int = 0) -> Floats64:
    """What the plain frequencies theta^(-2 i / dim) are divided by, float64 [dim / 2]: how GGUF holds a scaling."""
    return inverse_frequencies(Rope(rope.theta, dim=rope.dim)) / inverse_frequencies(rope, length)


def cos_sin(
    rope: Rope, positions: npt.NDArray[np.integer[Any]], length: int = 0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosine and sine of every pair at ``positions`` [tokens], times the attention factor: float32 [tokens, dim / 2] each.

    ``length`` as in ``inverse_frequencies``. A pair (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    turns = np.outer(positions, inverse_frequencies(rope, length))
    factor = attention_factor(rope)
    return (np.cos(turns) * factor).astype(np.float32), (np.sin(turns) * factor).astype(np.float32)
