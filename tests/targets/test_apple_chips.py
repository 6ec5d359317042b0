"""The estimate of tokens a second: that it is the published figure where there is one, and what the card says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tapeout.models import load
from tapeout.quantize import quantize
from tapeout.targets import apple_chips
from tapeout.targets.apple import Apple


def test_the_anchor_is_its_own_estimate() -> None:
    # By hand: 6.979e9 weights in layers and 0.525e9 in the head, 4.5 bits each, are 4.221e9 bytes; 33 of them a second are 139.3 GB/s of 400.
    assert pytest.approx(4.2214e9, rel=1e-4) == apple_chips.ANCHOR_BYTES
    assert pytest.approx(0.3483, abs=1e-4) == apple_chips.CORE_ML
    least, most = apple_chips.tokens_per_s(round(apple_chips.ANCHOR_BYTES), 400)
    assert least == pytest.approx(33)
    assert most == pytest.approx(0.7 * 400 / 4.2214, rel=1e-4)


def test_a_row_a_chip() -> None:
    lines = apple_chips.table(1_000_000_000).splitlines()
    assert lines[0] == "| tokens/s | base | Pro | Max | Ultra |"
    assert lines[2] == "| M1 | 24 … 48 | 70 … 140 | 139 … 280 | 279 … 560 |"
    assert lines[5].startswith("| M4 |")
    assert lines[5].endswith("| – |")
    assert all(len(row) == len(apple_chips.TIERS) for row in apple_chips.CHIPS.values())


def test_a_small_model_has_no_estimate() -> None:
    assert apple_chips.table(apple_chips.LEAST - 1) == ""
    assert apple_chips.table(apple_chips.LEAST) != ""


def test_the_card_has_the_table_of_its_own_bytes(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    apple = Apple(sequence_length=64)
    artifact = apple.export(quantize(load("arithmetic"), "int4-g32"), tmp_path)
    assert "What to expect" not in apple.card(artifact)
    card = apple.card(replace(artifact, bytes_per_token=4_450_000_000))
    assert "a token reads 4.45 GB of weights" in card
    assert card.endswith(apple_chips.table(4_450_000_000))


def test_the_card_of_a_cut_model_calls_its_packages_in_turn(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    apple = Apple(sequence_length=64, chunks=3)
    card = apple.card(apple.export(quantize(load("arithmetic"), "int4-g32"), tmp_path))
    assert "compile artifact/model_1_of_3.mlpackage" in card
    assert "cut into 3 packages" in card
    assert 'output.featureValue(for: "nextHiddenStates")' in card
