"""What of a new package is copied from an old one: whole files, then tensors by name or bytes, then blocks."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from tapeout import spans
from tapeout.blocks import Blocks
from tapeout.modelpack import Blob
from tapeout.spans import Span

_SAMPLE = 1 << 18  # bytes of a tensor that tell whether its difference packs better than itself

Bytes = npt.NDArray[np.uint8]
Piece = tuple[Literal["copy", "xor"], int, int, int] | tuple[Literal["new"], int]


class Planner:
    """The pieces of each file of the new package.

    Attributes:
        sources: files of the old package that are copied from, in the order of their numbers.
        tensors: how many the new package has, as far as its formats are known; ``changed`` names those that travel.
    """

    def __init__(self, old: Path, had: Mapping[str, Blob], new: Path, has: Mapping[str, Blob]) -> None:
        self._old, self._had, self._new, self._has = old, had, new, has
        self._by_digest = {blob: path for path, blob in had.items()}
        self._was = spans.find(old, had)
        self._is = spans.find(new, has)
        self._named = {(each.path, each.name): each for file in self._was.values() for each in file}
        self._digests: dict[int, dict[bytes, Span]] = {}  # by size
        self._maps: dict[Path, Bytes] = {}
        self._searched = "", Blocks(np.zeros(0, np.uint8))
        self.sources: list[str] = []
        self.tensors = sum(map(len, self._is.values()))
        self.changed: list[str] = []

    def pieces(self, path: str, blob: Blob) -> list[Piece]:
        """The pieces that make a file of the new package."""
        made: list[Piece] = []
        if (same := self._by_digest.get(blob)) is not None:
            self._copy(made, same, 0, blob.size)
            return made
        at = 0
        for span in self._is[path]:
            self._between(made, path, at, span.offset)
            self._tensor(made, span)
            at = span.end
        self._between(made, path, at, blob.size)
        return made

    def _tensor(self, made: list[Piece], span: Span) -> None:
        values, was = self._values(self._new, span), self._named.get((span.path, span.name))
        if same := self._same_bytes(values, was):
            self._copy(made, same.path, same.offset, same.size)
            return
        self.changed.append(f"{span.path}: {span.name}")
        if was and was.size == span.size and self._is_near(self._values(self._old, was), values):
            made.append(("xor", self._source(was.path), was.offset, span.size))
        else:
            self._add_new(made, span.size)

    def _same_bytes(self, values: Bytes, was: Span | None) -> Span | None:
        """An old tensor with these bytes, ``was`` first: one may have got another name, as where a layer was taken out."""
        if was and was.size == len(values) and np.array_equal(self._values(self._old, was), values):
            return was
        if len(values) not in self._digests:
            self._digests[len(values)] = {
                hashlib.sha256(self._values(self._old, each).data).digest(): each
                for each in self._named.values()
                if each.size == len(values)
            }
        return self._digests[len(values)].get(hashlib.sha256(values.data).digest())

    def _is_near(self, before: Bytes, values: Bytes) -> bool:
        """Whether the difference of two tensors packs better than the new one, by a sample from the middle."""
        begin = max((len(values) - _SAMPLE) // 2, 0)
        sample = values[begin : begin + _SAMPLE]
        difference = sample ^ before[begin : begin + _SAMPLE]
        return len(zlib.compress(difference.data, 1)) < len(zlib.compress(sample.data, 1))

    def _between(self, made: list[Piece], path: str, begin: int, end: int) -> None:
        """Bytes that are no tensor's: most often the padding between two, or the header."""
        if begin == end:
            return
        new = self._mapped(self._new / path)
        if made and made[-1][0] == "copy":
            _, source, offset, size = made[-1]
            follows = self._mapped(self._old / self.sources[source])[offset + size :][: end - begin]
            if np.array_equal(follows, new[begin:end]):
                self._copy(made, self.sources[source], offset + size, end - begin)
                return
        at = begin
        if path in self._had:
            if path != self._searched[0]:
                was = self._was[path]  # where tensors are known, what is none of them stands before the first
                rest = was[0].offset if was else self._had[path].size
                self._searched = path, Blocks(self._mapped(self._old / path)[:rest])
            for match in self._searched[1].matches(new, begin, end):
                self._add_new(made, match.begin - at)
                self._copy(made, path, match.source, match.size)
                at = match.begin + match.size
        self._add_new(made, end - at)

    def _copy(self, made: list[Piece], path: str, offset: int, size: int) -> None:
        number = self._source(path)
        if made and made[-1][0] == "copy" and made[-1][1] == number and sum(made[-1][2:]) == offset:
            made[-1] = ("copy", number, made[-1][2], made[-1][3] + size)
        elif size:
            made.append(("copy", number, offset, size))

    def _add_new(self, made: list[Piece], size: int) -> None:
        if made and made[-1][0] == "new":
            made[-1] = ("new", made[-1][1] + size)
        elif size:
            made.append(("new", size))

    def _source(self, path: str) -> int:
        if path not in self.sources:
            self.sources.append(path)
        return self.sources.index(path)

    def _values(self, directory: Path, span: Span) -> Bytes:
        return self._mapped(directory / span.path)[span.offset : span.end]

    def _mapped(self, path: Path) -> Bytes:
        """A file's bytes, not read before they are looked at."""
        if path not in self._maps:
            empty = not path.stat().st_size
            self._maps[path] = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, "r")
        return self._maps[path]
