"""Rotary positions of every scaling: transformers' frequencies, and angles that hold at position 200,000."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tapeout.errors import ModelError
from tapeout.models.rope import Rope, attention_factor, cos_sin, divisors, inverse_frequencies, scaling

DIM, CONTEXT = 16, 512
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 64},
    "yarn-ratio": {
        "original_max_position_embeddings": 64,
        "truncate": False,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    "yarn-mscale": {
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "longrope": {
        "original_max_position_embeddings": 64,
        "short_factor": [1 + 0.1 * i for i in range(DIM // 2)],
        "long_factor": [1 + 1.5 * i for i in range(DIM // 2)],
    },
    "longrope-factors": {
        "original_max_position_embeddings": 64,
        "factor": 6.0,
        "attention_factor": 1.25,
        "short_factor": [1.0] * (DIM // 2),
        "long_factor": [2.0] * (DIM // 2),
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def rope(name: str, theta: float = 1e4) -> Rope:
    kind = name.split("-")[0]
    return Rope(theta, kind, scaling(kind, SCALINGS[name], context=CONTEXT, dim=DIM), dim=DIM)


def radians(name: str, pair: int, length: int, theta: float = 1e4) -> float:
    """A pair's radians a position, one by one and by wavelength, as the papers put it."""
    p, plain = SCALINGS[name], theta ** (-2 * pair / DIM)
    kind = name.split("-")[0]
    if kind == "linear":
        return plain / float(p["factor"])
    if kind == "dynamic":  # NTK-aware: the base grows by s^(d / (d - 2))
        grown = 1.0 if length <= CONTEXT else p["factor"] * length / CONTEXT - (p["factor"] - 1)
        return float((theta * grown ** (DIM / (DIM - 2))) ** (-2 * pair / DIM))
    trained = p.get("original_max_position_embeddings", CONTEXT)
    wavelength = 2 * math.pi / plain
    if kind == "longrope":
        return plain / float(p["long_factor" if length > trained else "short_factor"][pair])
    if kind == "llama3":
        if wavelength < trained / p["high_freq_factor"]:
            return plain
        if wavelength > trained / p["low_freq_factor"]:
            return plain / float(p["factor"])
        share = (trained / wavelength - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])
        return float((1 - share) * plain / p["factor"] + share * plain)
    if kind == "yarn":
        factor = p.get("factor", CONTEXT / trained)

        def edge(turns: float) -> float:  # the pair that turns so often in the trained context
            return DIM / 2 * math.log(trained / (2 * math.pi * turns)) / math.log(theta)

        low, high = edge(p.get("beta_fast", 32)), edge(p.get("beta_slow", 1))
        if p.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        ramp = min(1.0, max(0.0, (pair - max(low, 0)) / (min(high, DIM - 1) - max(low, 0))))
        return float(plain * (1 - ramp) + plain / factor * ramp)
    return plain


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [1, 64, 65, 200_001])
def test_angles_hold_at_any_position(name: str, length: int, theta: float) -> None:
    it = rope(name, theta)
    expected = [radians(name, pair, length, theta) for pair in range(DIM // 2)]
    # A few roundings of 2^-53 each; the exponential of the logarithm of 5e5 has 13 of them.
    assert inverse_frequencies(it, length) == pytest.approx(expected, rel=1e-14)
    cos, sin = cos_sin(it, np.array([length - 1]), length)
    angles = [(length - 1) * each for each in expected]
    factor = attention_factor(it)
    # Angles of up to 200,000 radians, right to 1e-14 of themselves, and values rounded to float32 once.
    assert cos[0] == pytest.approx([factor * math.cos(a) for a in angles], abs=2e-9 + factor * 2**-24)
    assert sin[0] == pytest.approx([factor * math.sin(a) for a in angles], abs=2e-9 + factor * 2**-24)
    assert cos.dtype == np.float32


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [1, 64, 65, 4096])
def test_frequencies_are_those_of_transformers(name: str, length: int) -> None:
    transformers = pytest.importorskip("transformers")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    kind = name.split("-")[0]
    if kind == "default":
        pytest.skip("every model of transformers has its own")
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": None, **SCALINGS[name]},
    )
    expected, factor = functions[kind](config, "cpu", seq_len=length)
    # float32 all through, a power among it.
    assert inverse_frequencies(rope(name), length) == pytest.approx(expected.numpy(), rel=2e-6)
    assert attention_factor(rope(name)) == pytest.approx(factor, rel=1e-12)


def test_divisors_undo_the_scaling() -> None:
    it = rope("llama3")
    assert inverse_frequencies(it) * divisors(it) == pytest.approx(1e4 ** (-np.arange(0, DIM, 2) / DIM))
    assert divisors(it)[[0, -1]] == pytest.approx([1.0, 8.0])


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (
            "yarnn",
            {},
            r"rope_type 'yarnn' is not handled; did you mean 'yarn'\? \(known: default, dynamic, linear",
        ),
        ("linear", {}, "type 'linear' lacks factor"),
        ("linear", {"factor": 2.0, "beta": 1}, "has beta, which is not handled"),
        ("longrope", {"short_factor": [1.0]}, "lacks long_factor"),
        (
            "longrope",
            {"short_factor": [1.0] * 8, "long_factor": [1.0] * 7},
            "has 7 values of long_factor for the 8 pairs",
        ),
    ],
)
def test_a_scaling_that_is_none(kind: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        scaling(kind, given, context=CONTEXT, dim=DIM)
