"""What is new in one package over another, in one file: changed tensors travel, the rest is copied from the old package.

The format, version 1, little-endian (docs/delta.md has all of it):

========== ======================================================================================================
8 bytes    ``TAPEDLTA``
4          the version of the format
8          bytes of the header
…          one zlib stream: the header, JSON, and behind it the bytes of all pieces ``new`` and ``xor`` in their order
last 32    SHA-256 of everything before
========== ======================================================================================================
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tapeout.delta_plan import Planner
from tapeout.errors import OutputError, PackageError
from tapeout.files import canonical_json, new_directory, new_file
from tapeout.manifest import check_paths
from tapeout.modelpack import layers_of
from tapeout.pack import Package

MAGIC = b"TAPEDLTA"
FORMAT_VERSION = 1
_HEAD = struct.Struct("<8sIQ")
_SUM_BYTES = 32
_MOST_HEADER_BYTES = 256 << 20
_STEP = 1 << 20

Progress = Callable[[str, int, int], None]
Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Piece = tuple[Literal["copy", "xor"], Count, Count, Count] | tuple[Literal["new"], Count]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Source(_Strict):
    """A file of the old package that is copied from."""

    path: str
    sha256: Digest
    size: Count


class _File(_Strict):
    """A file of the new package: ``(copy or xor, source, offset, bytes)`` and ``(new, bytes)`` one after another."""

    path: str
    sha256: Digest
    size: Count
    pieces: list[Piece]


class _Header(_Strict):
    old_root_sha256: Digest
    new_root_sha256: Digest
    sources: list[_Source]
    files: list[_File]

    def check(self, what: str) -> None:
        """PackageError when its parts do not fit one another, or a path lies outside of a package."""
        check_paths([file.path for file in self.files], what)
        check_paths([source.path for source in self.sources], what)
        for file in self.files:
            if sum(piece[-1] for piece in file.pieces) != file.size:
                raise PackageError(f"{what} has pieces for {file.path!r} that are not its {file.size} bytes.")
            for piece in file.pieces:
                if piece[0] != "new" and (
                    piece[1] >= len(self.sources) or piece[2] + piece[3] > self.sources[piece[1]].size
                ):
                    raise PackageError(f"{what} copies bytes for {file.path!r} that no old file has.")


@dataclass(frozen=True)
class Made:
    """What a delta is made of.

    Attributes:
        size_bytes: of the delta; ``package_bytes`` of the new package.
        carried_bytes: that are not copied, before they are packed.
        changed: tensors that travel, as ``file: tensor``; of ``tensors`` in all.
    """

    old_root_sha256: str
    new_root_sha256: str
    size_bytes: int
    package_bytes: int
    carried_bytes: int
    tensors: int
    changed: tuple[str, ...]


def make(
    old: Path, new: Path, out: Path, *, force: bool = False, progress: Progress = lambda *_: None
) -> Made:
    """Write to the file ``out`` what package ``new`` has over package ``old``. The same packages give the same bytes.

    Raises:
        PackageError: one of them is damaged.
        OutputError: ``out`` exists, or cannot be written.
    """
    before, after = _whole(old), _whole(new)
    sources, files = layers_of(before), layers_of(after)
    plan = Planner(old, sources, new, files)
    pieces = {}
    total = sum(blob.size for blob in files.values())
    for path, blob in files.items():
        pieces[path] = plan.pieces(path, blob)
        progress("compare", sum(files[each].size for each in pieces), total)
    header = _Header(
        old_root_sha256=before.manifest["root_sha256"],
        new_root_sha256=after.manifest["root_sha256"],
        sources=[
            _Source(path=path, sha256=sources[path].digest.removeprefix("sha256:"), size=sources[path].size)
            for path in plan.sources
        ],
        files=[
            _File(path=path, sha256=blob.digest.removeprefix("sha256:"), size=blob.size, pieces=pieces[path])
            for path, blob in files.items()
        ],
    )
    carried = sum(piece[-1] for file in header.files for piece in file.pieces if piece[0] != "copy")
    with new_file(out, force=force) as file:
        _write(file, header, old, new, lambda done: progress("delta", done, carried))
    return Made(
        header.old_root_sha256,
        header.new_root_sha256,
        out.stat().st_size,
        total,
        carried,
        plan.tensors,
        tuple(plan.changed),
    )


def apply(
    old: Path, delta: Path, out: Path, *, force: bool = False, progress: Progress = lambda *_: None
) -> Package:
    """Make the new package of the old one and a delta. Both are checked before anything is written, and the new one after.

    Raises:
        PackageError: the delta is cut short or was changed, is of another old package, or that one is damaged.
        OutputError: ``out`` exists, or cannot be written.
    """
    _check_sum(delta)
    with delta.open("rb") as file:
        stream = _Stream(file, delta)
        header = _read_header(stream, delta)
        package = _whole(old)
        if package.manifest["root_sha256"] != header.old_root_sha256:
            raise PackageError(
                f"{delta} is for the package with root digest {header.old_root_sha256}; "
                f"{old} has {package.manifest['root_sha256']}."
            )
        known = layers_of(package)
        for source in header.sources:
            if source.path not in known or known[source.path].digest != f"sha256:{source.sha256}":
                raise PackageError(
                    f"{delta} was made with another {source.path} than {old} has, though the root digests are the same: "
                    "reports differ from run to run. Take the package as it was delivered."
                )
        total = sum(each.size for each in header.files)
        with new_directory(out, force=force) as partial:
            if (free := shutil.disk_usage(partial).free) < total:
                raise OutputError(f"{out} would have {total} bytes, and its disk has {free} free.")
            sources = [_map(old / source.path, source.size) for source in header.sources]
            done = 0
            for each in header.files:
                _build(partial / each.path, each, sources, stream, delta)
                done += each.size
                progress("patch", done, total)
            stream.end()
            made = Package.open(partial)
            damage = made.damage()
            if made.manifest["root_sha256"] != header.new_root_sha256:
                damage.append(f"its root digest is {made.manifest['root_sha256']}")
            if damage:
                raise PackageError(f"{delta} gives no whole package: {'; '.join(damage[:5])}.")
    return Package.open(out)


def _whole(directory: Path) -> Package:
    package = Package.open(directory)
    if damage := package.damage():
        raise PackageError(f"{directory} is not whole: {'; '.join(damage[:5])}.")
    return package


def _map(path: Path, size: int) -> npt.NDArray[np.uint8]:
    return np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)


def _write(file: IO[bytes], header: _Header, old: Path, new: Path, progress: Callable[[int], None]) -> None:
    described = canonical_json(header.model_dump()).encode()
    hashed, packed = hashlib.sha256(), zlib.compressobj(6)

    def put(block: bytes) -> None:
        hashed.update(block)
        file.write(block)

    put(_HEAD.pack(MAGIC, FORMAT_VERSION, len(described)))
    put(packed.compress(described))
    done, sources = 0, [_map(old / source.path, source.size) for source in header.sources]
    for each in header.files:
        values, at = _map(new / each.path, each.size), 0
        for piece in each.pieces:
            if piece[0] != "copy":
                for begin in range(at, at + piece[-1], _STEP):
                    block = values[begin : min(begin + _STEP, at + piece[-1])]
                    if piece[0] == "xor":
                        first = piece[2] + begin - at
                        block = block ^ sources[piece[1]][first : first + len(block)]
                    put(packed.compress(block.tobytes()))
                    done += len(block)
                    progress(done)
            at += piece[-1]
    put(packed.flush())
    file.write(hashed.digest())


def _build(
    path: Path, file: _File, sources: list[npt.NDArray[np.uint8]], stream: _Stream, delta: Path
) -> None:
    """Write one file of the new package and compare it with its digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hashed = hashlib.sha256()
    with path.open("wb") as out:
        for piece in file.pieces:
            for begin in range(0, piece[-1], _STEP):
                count = min(_STEP, piece[-1] - begin)
                block = np.frombuffer(stream.read(count), np.uint8) if piece[0] != "copy" else np.uint8(0)
                if piece[0] != "new":
                    first = piece[2] + begin
                    block = block ^ sources[piece[1]][first : first + count]
                content = np.ascontiguousarray(block).data
                hashed.update(content)
                out.write(content)
    if hashed.hexdigest() != file.sha256:
        raise PackageError(f"{delta} gives a {file.path!r} with another digest than it says.")


class _Stream:
    """What a delta has packed, a part at a time."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path, self._unpacker = file, path, zlib.decompressobj()
        _, _, self.header_bytes = _HEAD.unpack(file.read(_HEAD.size))
        self._left = os.fstat(file.fileno()).st_size - _HEAD.size - _SUM_BYTES
        self._ahead = b""

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes, and never more than that in memory."""
        parts, missing = [], count
        while missing:
            if self._unpacker.eof or not (self._ahead or self._left):
                raise PackageError(f"{self._path} ends {missing} bytes too early.")
            parts.append(self._next(missing))
            missing -= len(parts[-1])
        return b"".join(parts)

    def end(self) -> None:
        """PackageError unless this was all."""
        rest = b""
        while not rest and not self._unpacker.eof and (self._ahead or self._left):
            rest = self._next(1)
        if rest or self._left or self._unpacker.unused_data:
            raise PackageError(f"{self._path} has more bytes than its header tells of.")

    def _next(self, most: int) -> bytes:
        try:
            part = self._unpacker.decompress(self._ahead or self._more(), most)
        except zlib.error as error:
            raise PackageError(f"{self._path} cannot be unpacked: {error}.") from error
        self._ahead = self._unpacker.unconsumed_tail
        return part

    def _more(self) -> bytes:
        block = self._file.read(min(_STEP, self._left))
        self._left -= len(block)
        return block


def _check_sum(delta: Path) -> None:
    """PackageError when the file is no delta, of a newer format, or not as it was written."""
    hashed, size = hashlib.sha256(), delta.stat().st_size if delta.is_file() else 0
    if size < _HEAD.size + _SUM_BYTES:
        raise PackageError(
            f"{delta} is no delta: {'it has ' + str(size) + ' bytes' if size else 'no such file'}."
        )
    with delta.open("rb") as file:
        magic, version, _ = _HEAD.unpack(file.read(_HEAD.size))
        if magic != MAGIC:
            raise PackageError(f"{delta} is no delta: it begins with {magic!r} instead of {MAGIC!r}.")
        if version > FORMAT_VERSION:
            raise PackageError(
                f"{delta} has format_version {version}; this tapeout reads up to {FORMAT_VERSION}: upgrade it."
            )
        file.seek(0)
        for block in _blocks(file, size - _SUM_BYTES):
            hashed.update(block)
        if file.read() != hashed.digest():
            raise PackageError(f"{delta} was cut short or changed: its checksum is of other bytes.")


def _blocks(file: IO[bytes], count: int) -> Iterator[bytes]:
    while count and (block := file.read(min(_STEP, count))):
        count -= len(block)
        yield block


def _read_header(stream: _Stream, delta: Path) -> _Header:
    if stream.header_bytes > _MOST_HEADER_BYTES:
        raise PackageError(f"{delta} says that its header has {stream.header_bytes} bytes.")
    try:
        header = _Header.model_validate_json(stream.read(stream.header_bytes))
    except ValidationError as error:
        first = error.errors()[0]
        raise PackageError(f"{delta} has no readable header: {first['loc']}: {first['msg']}.") from error
    header.check(str(delta))
    return header
