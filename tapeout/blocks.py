"""Bytes of an old file in a new one, wherever they moved to: rsync's algorithm with whole arrays (Tridgell, 1999, chapter 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Hashes = npt.NDArray[np.uint64]

BLOCK = 64  # bytes, of files up to 64 MiB; a match costs a delta some ten
_LARGEST = 4096  # of files from 4 GiB on, so that a table has at most a few million blocks
_WINDOW = 1 << 18  # bytes of the new file looked at at once: the hashes of that many positions take 2 MB
_FACTOR = 0x9E3779B97F4A7C15 | 1  # odd, so that it has an inverse among the integers modulo 2⁶⁴
_FILTER_BITS = 22


@dataclass(frozen=True)
class Match:
    """``size`` bytes at ``begin`` of the new file that stand at ``source`` of the old one."""

    begin: int
    size: int
    source: int


class Blocks:
    """The blocks of an old file, uint8 [bytes], to be found again."""

    def __init__(self, old: Bytes) -> None:
        self._old = old
        self._size = min(max(BLOCK, 1 << (len(old) >> 20).bit_length()), _LARGEST)

    def matches(self, new: Bytes, begin: int, end: int) -> Iterator[Match]:
        """What of ``new[begin:end]``, uint8 [bytes], the old file has, from left to right and without overlaps.

        What is shorter than a block is not looked for.
        """
        at = begin
        for first, last in _same_place(self._old, new, begin, end):
            yield from self._moved(new, at, first)
            yield Match(first, last - first, first)
            at = last
        yield from self._moved(new, at, end)

    def _moved(self, new: Bytes, begin: int, end: int) -> Iterator[Match]:
        """Blocks of the old file at any place of ``new[begin:end]``, made as long as they can be."""
        if end - begin < self._size or len(self._old) < self._size:
            return
        old = self._old
        at = begin
        for first in range(begin, end - self._size + 1, _WINDOW):
            if at >= first + _WINDOW:
                continue
            window = new[first : min(first + _WINDOW + self._size - 1, end)]
            positions, blocks = self._table.find(_rolling(window, self._size))
            positions += first
            while (index := int(np.searchsorted(positions, at))) < len(positions):
                left, source = int(positions[index]), int(blocks[index]) * self._size
                right, other = left + self._size, source + self._size
                if not np.array_equal(new[left:right], old[source:other]):  # another block with the same hash
                    positions, blocks = np.delete(positions, index), np.delete(blocks, index)
                    continue
                back = _common(new[at:left][::-1], old[:source][::-1])
                ahead = _common(new[right:end], old[other:])
                yield Match(left - back, right + ahead - left + back, source - back)
                at = right + ahead

    @cached_property
    def _table(self) -> _Table:
        count = len(self._old) // self._size
        hashes = np.empty(count, np.uint64)
        step = _WINDOW // self._size
        inverse = _powers()[1][: self._size]
        for first in range(0, count, step):
            part = self._old[first * self._size : min(first + step, count) * self._size].reshape(
                -1, self._size
            )
            hashes[first : first + step] = (part * inverse).sum(axis=1, dtype=np.uint64)
        unique, blocks = np.unique(_mixed(hashes), return_index=True)
        known = np.zeros(1 << _FILTER_BITS, np.bool_)
        known[unique >> np.uint64(64 - _FILTER_BITS)] = True
        return _Table(unique, blocks, known)


def _same_place(old: Bytes, new: Bytes, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of whole blocks that are where they were."""
    count = (min(end, len(old)) - begin) // BLOCK
    run: tuple[int, int] | None = None
    for first in range(0, max(count, 0), _WINDOW // BLOCK):
        blocks = min(_WINDOW // BLOCK, count - first)
        part = slice(begin + first * BLOCK, begin + (first + blocks) * BLOCK)
        same = (old[part] == new[part]).reshape(blocks, BLOCK).all(axis=1)
        edges = np.flatnonzero(np.diff(same, prepend=False, append=False)).reshape(-1, 2)
        for left, right in edges * BLOCK + part.start:
            if run and run[1] == left:
                run = run[0], int(right)
                continue
            if run:
                yield run
            run = int(left), int(right)
    if run:
        yield run


def _common(first: Bytes, second: Bytes) -> int:
    """How many bytes two arrays have in common from their beginning."""
    most, at, step = min(len(first), len(second)), 0, 256
    while at < most:
        differ = np.flatnonzero(first[at : min(at + step, most)] != second[at : min(at + step, most)])
        if len(differ):
            return at + int(differ[0])
        at, step = at + step, min(step * 4, _WINDOW)
    return most


@dataclass(frozen=True)
class _Table:
    """Hashes of a file's blocks, sorted, which block each is, and a filter by the hashes' first bits."""

    hashes: Hashes
    blocks: npt.NDArray[np.int64]
    filter: npt.NDArray[np.bool_]

    def find(self, hashes: Hashes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Positions of hashes that blocks have, and those blocks."""
        likely = np.flatnonzero(self.filter[hashes >> np.uint64(64 - _FILTER_BITS)])
        index = np.searchsorted(self.hashes, hashes[likely]).clip(max=len(self.hashes) - 1)
        hit = self.hashes[index] == hashes[likely]
        return likely[hit], self.blocks[index[hit]]


def _rolling(window: Bytes, size: int) -> Hashes:
    """The hash of the block at every position: Σ byte·f⁻ʲ over a block, from sums over all that stands before it."""
    powers, inverse = _powers()
    sums = np.zeros(len(window) + 1, np.uint64)
    np.cumsum(window * inverse[: len(window)], out=sums[1:])
    return _mixed((sums[size:] - sums[:-size]) * powers[: len(window) - size + 1])


def _mixed(hashes: Hashes) -> Hashes:
    """Spread what the low bytes say to the high bits, which the filter goes by."""
    hashes = (hashes ^ (hashes >> np.uint64(31))) * np.uint64(_FACTOR)
    return hashes ^ (hashes >> np.uint64(29))


@cache
def _powers() -> tuple[Hashes, Hashes]:
    """fⁱ and f⁻ⁱ modulo 2⁶⁴, as many as a window and a block need."""
    count = _WINDOW + _LARGEST
    powers, inverse = np.full((2, count), 1, np.uint64)
    powers[1:], inverse[1:] = _FACTOR, pow(_FACTOR, -1, 1 << 64)
    return np.multiply.accumulate(powers), np.multiply.accumulate(inverse)
