"""Limits of speed and memory: which figure they look at, and what becomes of it."""

from __future__ import annotations

from typing import Any

import pytest

from tapeout.errors import RecipeError
from tapeout.quantize import Scheme
from tapeout.recipe import Recipe
from tapeout.validate import GateResult, Limits, require
from tapeout.validate.speed_gates import parse_bytes, speed_gates

ROW = {"context": 128, "first_token_s": 0.2, "decode_tokens_per_s": 20.0, "samples": 96}
SHORT = {"resident_bytes": 100, "peak_resident_bytes": 150, "contexts": [{**ROW, "first_token_s": 9.0}, ROW]}
PERCENTILES = {"samples": 400, "effective": 400, "p50": {"value": 0.1}, "p99": {"value": 0.4}}
STREAM = {"samples": 400, "prompt_tokens": 128, "tokens_per_s": 15.0, "first_token": PERCENTILES}
ALL = {"min_tokens_per_s": 18.0, "max_ttft_ms": 300.0, "max_memory": "140B"}


def verdicts(figures: dict[str, Any], **limits: Any) -> dict[str, tuple[str, float | None]]:
    return {gate.name: (gate.status, gate.value) for gate in speed_gates(figures, **limits)}


def test_nothing_is_demanded_where_nothing_was_given() -> None:
    assert speed_gates(SHORT) == []
    assert verdicts(SHORT, max_ttft_ms=1.0) == {"throughput/first-token": ("failed", 200.0)}


def test_each_limit_has_its_figure() -> None:
    assert verdicts(SHORT, **ALL) == {
        "throughput/tokens-per-s": ("passed", 20.0),
        "throughput/first-token": ("passed", 200.0),
        "throughput/memory": ("failed", 150.0),
    }
    assert verdicts(SHORT, min_tokens_per_s=20.0, max_ttft_ms=200.0, max_memory="150B") == {
        "throughput/tokens-per-s": ("passed", 20.0),
        "throughput/first-token": ("passed", 200.0),
        "throughput/memory": ("passed", 150.0),
    }
    told = verdicts({**SHORT, "scenarios": {"single-stream": STREAM}}, **ALL)
    assert told["throughput/tokens-per-s"] == ("failed", 15.0)
    assert told["throughput/first-token"] == ("failed", 400.0)  # the highest percentile that was asked for


def test_what_was_not_measured_is_skipped_and_never_passed() -> None:
    for gate in speed_gates({}, **ALL, absent="nothing of it runs here."):
        assert (gate.status, gate.value, gate.reason) == ("skipped", None, "nothing of it runs here.")
    module = {"resident_bytes": 1, "runs": [{"run_p50_s": 1.0}]}
    assert verdicts(module, **ALL) == {
        "throughput/tokens-per-s": ("skipped", None),
        "throughput/first-token": ("skipped", None),
        "throughput/memory": ("passed", 1.0),
    }
    encoder = {
        "resident_bytes": 1,
        "encodings": [{"batch": 8, "context": 16, "samples": 20, "tokens_per_s": 9.0}],
    }
    assert verdicts(encoder, min_tokens_per_s=10.0) == {"throughput/tokens-per-s": ("failed", 9.0)}


def test_required_and_skipped_has_failed() -> None:
    (gate,) = require(speed_gates({}, max_ttft_ms=1.0), frozenset({"throughput"}))
    assert gate.status == "failed"
    absent, *_ = require([], frozenset({"throughput"}))
    assert (
        absent.reason
        == "required, but nothing was demanded: give --min-tokens-per-s, --max-ttft-ms or --max-memory."
    )


def test_twice_as_fast_as_demanded_takes_half_of_the_limit() -> None:
    for value, used in ((40.0, 0.5), (20.0, 1.0), (10.0, 2.0), (0.0, None)):
        assert GateResult("throughput/tokens-per-s", "passed", "tokens a second", value, 20.0).used == used


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2GB", 2 * 10**9),
        ("500M", 5 * 10**8),
        ("1.5GiB", 3 * 2**29),
        ("4 kB", 4000),
        ("4KiB", 4096),
        ("7", 7),
        ("1TB", 10**12),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-2GB", "2 bytes", "0", "2XB", "1e9", "0.1B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match=r"is not a size of memory. What fits: 500MB, 2GB, 1.5GiB"):
        parse_bytes(text)


def test_recipes_have_the_same_limits() -> None:
    recipe = Recipe.of({"limits": {"min_tokens_per_s": 5, "max_memory": "2GB"}})
    assert recipe.limits.speed == {"min_tokens_per_s": 5, "max_memory": "2GB"}
    assert recipe.demanding(max_ttft_ms=9.0, max_memory=None, min_tokens_per_s=6.0).limits.speed == {
        "min_tokens_per_s": 6.0,
        "max_ttft_ms": 9.0,
        "max_memory": "2GB",
    }
    assert Limits(max_ttft_ms=3.0).for_scheme(Scheme.parse("int8")).speed == {"max_ttft_ms": 3.0}
    assert Recipe.of({"limits": {"kl": 1.0}}).limits.speed == {}
    for wrong in ({"max_memory": "much"}, {"min_tokens_per_s": 0}, {"max_ttft_ms": -1}):
        with pytest.raises(RecipeError):
            Recipe.of({"limits": wrong})
