"""What a model computes, and what bounds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tapeout.models import load
from tapeout.validate import roofline as module
from tapeout.validate.roofline import operations, peaks, roofline


def test_operations_of_the_embedded_model() -> None:
    # hidden 64, ffn 128, 3 layers, 8 heads of 8 over 4, a vocabulary that is head too, a window of 20.
    found, config = operations(load("arithmetic")), load("arithmetic").config
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
    assert found == {
        "weights": 2 * (3 * layer + 64 * config.vocab_size),
        "attention": [{"window": 20, "per_position": 3 * 4 * 64}],
    }


def test_of_routed_experts_a_token_takes_some(make_model: Callable[..., Path]) -> None:
    model = load(str(make_model("mixtral")))
    config, found = model.config, operations(model)
    assert found is not None
    c = config
    assert c.moe is not None
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    routed = c.moe.top_k * 3 * c.hidden_size * c.moe.intermediate_size + c.moe.experts * c.hidden_size
    assert found["weights"] == 2 * (c.num_layers * (attention + routed) + c.hidden_size * c.vocab_size)


def test_an_encoder_has_none() -> None:
    assert operations(load("topics_v1")) is None


def test_points_lie_under_the_roof_as_by_hand() -> None:
    known = {
        "weights": 1000,
        "attention": [{"window": None, "per_position": 2}, {"window": 4, "per_position": 1}],
    }
    best = [
        {"type": "float32", "operations_per_s": 1e4, "measured_with": "a"},
        {"type": "int8", "operations_per_s": 1e5, "measured_with": "b"},
    ]
    row = {"context": 10, "cache_bytes": 40, "prefill_s": 0.2, "token_s": 0.1}
    found = roofline(known, 500, 1e4, best, [row], chunk=4)
    assert found["ridge"] == 10
    prefill, decode = found["points"]
    # Pairs without a window: 1 + 2 + … + 10; with one of 4: 1 + 2 + 3 + 7 × 4.
    assert prefill["operations"] == 10 * 1000 + 2 * 55 + 34
    assert (
        prefill["bytes"] == 3 * 500 + 40 * 2
    )  # three chunks; the cache written once, and half of it read by two more
    assert prefill["bound"] == "memory"  # 10144 / 1e5 s against 1580 / 1e4 s
    assert prefill["fraction"] == pytest.approx(0.158 / 0.2)
    assert decode["operations"] == 1000 + 2 * 10 + 4
    assert decode["intensity"] == pytest.approx(1024 / 540)
    assert decode["bytes_per_s"] == pytest.approx(5400)
    assert decode["fraction"] == pytest.approx(0.54)
    (whole, _) = roofline(known, 500, 1e4, best, [row])["points"]
    assert whole["bound"] == "compute"  # in one chunk it has 540 bytes to read


def test_peaks_say_what_they_were_measured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SIDE", 64)
    pytest.importorskip("onnxruntime")
    found = peaks(1)
    assert [each["type"] for each in found] == ["float32", "int8"]
    assert all(each["operations_per_s"] > 0 for each in found)

    def absent(_: int | None) -> None:
        raise ImportError

    for name, said in (("_onnxruntime", "torch's _int_mm"), ("_torch", None)):
        monkeypatch.setattr(module, name, absent)
        told = [each["measured_with"] for each in peaks(1)]
        assert told == ["numpy's BLAS", *([said] if said else [])]
