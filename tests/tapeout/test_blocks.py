"""Bytes of an old file in a new one: what is found is right, does not overlap, and is most of what is there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapeout import blocks
from tapeout.blocks import BLOCK, Blocks

Bytes = npt.NDArray[np.uint8]
OLD = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)


def found(old: Bytes, new: Bytes, begin: int = 0, end: int | None = None) -> int:
    """How many bytes of ``new`` are found in ``old``; each of them is compared."""
    at, total = begin, 0
    for match in Blocks(old).matches(new, begin, len(new) if end is None else end):
        assert match.begin >= at
        assert match.size > 0
        at = match.begin + match.size
        assert at <= (len(new) if end is None else end)
        assert np.array_equal(new[match.begin : at], old[match.source : match.source + match.size])
        total += match.size
    return total


@pytest.mark.parametrize("inserted", [1, 63, 64, 1000])
def test_what_moved_is_found(inserted: int) -> None:
    more = np.zeros(inserted, np.uint8)
    assert found(OLD, np.concatenate([more, OLD])) >= len(OLD)
    assert found(OLD, OLD[inserted:]) == len(OLD) - inserted
    middle = np.concatenate([OLD[:5000], more, OLD[5000:70_000], OLD[80_000:]])
    # At each of the two seams what is left of a block may go unseen.
    assert found(OLD, middle) > len(OLD) - 10_000 - 2 * 2 * BLOCK


def test_what_is_elsewhere_is_found() -> None:
    swapped = np.concatenate([OLD[50_000:], OLD[:50_000]])
    assert found(OLD, swapped) == len(OLD)
    assert found(OLD, swapped, 1000, 2000) == 1000


def test_what_is_new_is_not_found() -> None:
    new = np.random.default_rng(1).integers(0, 256, 100_000, np.uint8)
    assert found(OLD, new) == 0
    assert found(OLD, OLD[: BLOCK - 1]) == 0
    assert found(OLD[: BLOCK - 1], OLD) == 0
    assert found(np.zeros(0, np.uint8), OLD) == 0


def test_larger_files_have_larger_blocks() -> None:
    """Of a file of 100 MB a block has 128 bytes; windows meet inside of blocks."""
    large = np.tile(OLD, 8)[: 3 * blocks._WINDOW + 77] ^ np.arange(3 * blocks._WINDOW + 77).astype(np.uint8)
    search = Blocks(large)
    search._size = 128
    matched = list(search.matches(np.concatenate([OLD[:5], large]), 0, len(large) + 5))
    assert sum(match.size for match in matched) == len(large)
    assert [Blocks(np.broadcast_to(np.uint8(0), 1 << n))._size for n in (10, 26, 27, 30, 40)] == [
        64,
        128,
        256,
        2048,
        4096,
    ]


def test_blocks_that_repeat() -> None:
    """Padding has one hash at every position, and must neither be lost nor take a step a byte."""
    zeros = np.zeros(300_000, np.uint8)
    assert found(zeros[:1000], zeros) >= 1000
    assert found(np.concatenate([OLD, zeros]), np.concatenate([zeros, OLD])) >= len(OLD)


def test_another_block_with_the_same_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the bytes themselves decides."""
    monkeypatch.setattr(blocks, "_mixed", lambda hashes: hashes & np.uint64(3))
    assert found(OLD[:1024], np.concatenate([OLD[7:600], OLD[300:400]])) >= 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 300), st.binary(max_size=80)), max_size=6),
    st.integers(70, 4000),
)
def test_any_edit(edits: list[tuple[int, int, bytes]], length: int) -> None:
    """Bytes cut out and put in anywhere: at most two blocks an edit, and what was put in, are not found."""
    old = OLD[:length]
    new, changed = old.tobytes(), 0
    for at, cut, put in edits:
        new = new[:at] + put + new[at + cut :]
        changed += len(put) + 2 * 2 * BLOCK
    assert found(old, np.frombuffer(new, np.uint8)) >= len(new) - changed - BLOCK
