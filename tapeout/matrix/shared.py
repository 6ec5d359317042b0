"""Finished work in a storage that several machines share: a directory, or whatever fsspec opens (``s3://…``).

    blobs/SHA256              a file's bytes, under their digest: what two entries have alike is there once
    packages/INPUTS.json      files of a package with digest and size, by the digest of all that it was made from
    stores/INPUTS.json        the same of canonical codes
    layers/STORE.json         the same of codes in the making: the layers that calibration has done, until the codes are whole

An entry is written after its blobs, so that one that is there is whole; what is fetched is compared with its digests. What is not as it should be
is taken away, said, and made again. A storage that is full or out of reach costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tapeout.errors import MissingToolchain, PackageError, TapeoutError
from tapeout.files import cache_directory, canonical_json, file_sha256, lock, new_directory
from tapeout.pack import DEVICE_REPORT, Package

FORMAT_VERSION = 1
LOG = logging.getLogger(__name__)
_BETWEEN = ".calibration/"  # what calibration alone has, and replaces with every layer
_FIRST_LAST = ("quantization.json", "tapeout.json", ".calibration/done.json")
"""Indexes of directories: one that is there means that the rest is."""
_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "adl", "az"})
"""Protocols of stores of objects, which have no folders."""


class _Damaged(Exception):
    """An entry or a blob is not what its digest says."""


class Storage:
    """A shared storage; or none, which has nothing and keeps nothing.

    Args:
        url: a directory, or ``PROTOCOL://…``; None: there is none.
        notes: takes what a user has to know.

    Raises:
        MissingToolchain: fsspec has no package for the protocol here. TapeoutError: the address means nothing.
    """

    def __init__(self, url: str | None, notes: list[str]) -> None:
        self._url, self._notes = url, notes
        self._files: Any = None
        self._kept_at = self._keeping_s = 0.0
        if url is None:
            return
        try:
            import fsspec

            self._files, self._root = fsspec.url_to_fs(url)
        except ImportError as error:
            raise MissingToolchain(
                f"--cache {url}: {error}: pip install what it names, or 'tapeout[shared]' for directories."
            ) from error
        except (ValueError, OSError) as error:
            raise TapeoutError(f"--cache {url} cannot be opened: {error}.") from error

    @classmethod
    def at(cls, url: str | None, notes: list[str]) -> Storage:
        """The storage at an address, or none where it cannot be opened: that is said, and the work is done without."""
        try:
            return cls(url, notes)
        except TapeoutError as error:
            notes.append(f"{error} Went on without it.")
            return cls(None, notes)

    def has_package(self, key: str) -> bool:
        """Whether there is an entry; its blobs are looked at when it is fetched."""
        if self._files is None:
            return False
        try:
            return bool(self._files.exists(self._entry("packages", key)))
        except Exception as error:  # of whichever client: any kind
            self._notes.append(self._unreachable("be read", error))
            return False

    def fetch_package(self, key: str, out: Path) -> bool:
        """Put a package at ``out``, if the storage has it whole."""

        def put(entry: Mapping[str, Any]) -> None:
            with new_directory(out, force=True) as partial:
                self._get(entry, partial)
                if damage := Package.open(partial).damage():
                    raise _Damaged(f"the package is not whole: {'; '.join(damage[:3])}")
            self._notes.append(f"taken from {self._url}.")

        return self._fetch("packages", key, put)

    def fetch_store(self, key: str) -> bool:
        """Put codes into this machine's cache, if the storage has them whole and the cache has not."""

        def put(entry: Mapping[str, Any]) -> None:
            name = entry["name"]
            if name != PurePosixPath(name).name or name.startswith("."):
                raise _Damaged(f"it is to be called {name!r}")
            directory = cache_directory() / "store" / name
            with lock(directory, wait=True):
                if (directory / "quantization.json").exists():
                    return
                partial = directory.with_name(f".{name}.fetched")
                shutil.rmtree(partial, ignore_errors=True)
                try:
                    self._get(entry, partial)
                    shutil.rmtree(directory, ignore_errors=True)
                    partial.rename(directory)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
            self._notes.append(f"codes taken from {self._url}.")

        return self._fetch("stores", key, put)

    def fetch_layers(self, directory: Path, layers: int) -> None:
        """Put layers of codes in the making into their store, if there are more than so many; see ``quantize``'s ``checkpoints``."""

        def put(entry: Mapping[str, Any]) -> None:
            if entry["layers"] > layers:
                partial = directory.with_name(f".{directory.name}.fetched")
                shutil.rmtree(partial, ignore_errors=True)
                try:
                    for path in self._get(entry, partial):
                        (partial / path).replace(directory / path)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
                LOG.warning("went on after layer %d, which %s had.", entry["layers"], self._url)

        self._fetch("layers", directory.name, put)

    def keep_layers(self, directory: Path, layers: int, files: Sequence[Path]) -> None:
        """Share layers of codes in the making, unless that took more than a tenth of the time so far."""
        began = time.monotonic()
        if began - self._kept_at < 10 * self._keeping_s:
            return
        told = {path.relative_to(directory).as_posix(): path for path in files}
        self._push("layers", directory.name, directory.name, told, layers=layers)
        self._kept_at = time.monotonic()
        self._keeping_s = self._kept_at - began

    def forget_layers(self, directory: Path) -> None:
        """Take away layers of codes that are whole now, but for what the codes have of them."""
        if self._files is not None and (entry := self._known("layers", directory.name)):
            self._remove(self._entry("layers", directory.name))
            self._remove_blobs(entry, {})

    def push_package(self, key: str, directory: Path) -> None:
        """Share a package."""
        files = {path: directory / path for path in (*Package.open(directory).files(), "tapeout.json")}
        files.pop(DEVICE_REPORT, None)
        self._push("packages", key, directory.name, files)

    def push_store(self, key: str, directory: Path) -> None:
        """Share codes."""
        files = {
            path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()
        }
        self._push(
            "stores",
            key,
            directory.name,
            {name: path for name, path in files.items() if not name.endswith(".partial")},
        )

    def _push(
        self, kind: str, key: str, name: str, files: Mapping[str, Path], layers: int | None = None
    ) -> None:
        """Share files under an entry, unless it is there; one of ``layers`` takes the place of the one before."""
        if self._files is None:
            return
        try:
            if layers is None and self._files.exists(self._entry(kind, key)):
                return
            before = self._known(kind, key) if layers else None
            told: dict[str, dict[str, Any]] = {
                path: there
                for path, there in (before or {"files": {}})["files"].items()
                if path in files and not path.startswith(_BETWEEN)
            }
            for path, file in files.items():
                if path not in told:
                    told[path] = {"sha256": file_sha256(file), "size": file.stat().st_size}
                    self._put(file, self._blob(told[path]["sha256"]), told[path]["size"])
            entry = {"format_version": FORMAT_VERSION, "kind": kind, "name": name, "files": told}
            text = canonical_json(_signed(entry | ({"layers": layers} if layers else {})))
            self._write(text.encode(), self._entry(kind, key))
            if before:
                self._remove_blobs(before, told)
        except Exception as error:  # of whichever client: any kind
            self._notes.append(self._unreachable("take this", error))

    def _fetch(self, kind: str, key: str, put: Callable[[Mapping[str, Any]], None]) -> bool:
        """Read an entry and let its files be put where they belong; what turns out to be damaged is taken away and said."""
        if self._files is None:
            return False
        path, entry = self._entry(kind, key), None
        try:
            if (entry := self._read(path)) is None:
                return False
            put(entry)
            return True
        except (_Damaged, PackageError) as error:
            self._notes.append(
                f"{self._url} has a damaged entry ({error}): it was taken away, and is made again."
            )
            self._remove(path)
            self._remove_blobs(entry or {"files": {}}, {})
        except TapeoutError:  # of this machine's disk, not of the storage
            raise
        except Exception as error:  # of whichever client: any kind
            self._notes.append(self._unreachable("be read", error))
        return False

    def _known(self, kind: str, key: str) -> dict[str, Any] | None:
        """An entry that is to be replaced or taken away; one that cannot be read is none."""
        try:
            return self._read(self._entry(kind, key))
        except Exception:  # damaged, or of whichever client
            return None

    def _remove_blobs(self, entry: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
        """Take away what calibration alone had: activations between layers, large, and of no use any more."""
        for path, told in entry["files"].items():
            if path.startswith(_BETWEEN) and kept.get(path) != told:
                self._remove(self._blob(told["sha256"]))

    def _read(self, path: str) -> dict[str, Any] | None:
        try:
            text = self._files.cat_file(path)
        except FileNotFoundError:
            return None
        try:
            entry: dict[str, Any] = json.loads(text)
            if _signed({key: value for key, value in entry.items() if key != "sha256"}) != entry:
                raise _Damaged("its list of files differs from its digest")
            if entry["format_version"] > FORMAT_VERSION:
                return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _Damaged(f"its list of files cannot be read: {error!r}") from error
        return entry

    def _get(self, entry: Mapping[str, Any], directory: Path) -> list[str]:
        """Fetch an entry's files, each compared with its digest; their paths, indexes last."""
        paths = sorted(entry["files"], key=lambda path: path in _FIRST_LAST)
        for path in paths:
            told = entry["files"][path]
            parts = PurePosixPath(path)
            if parts.is_absolute() or ".." in parts.parts:
                raise _Damaged(f"it has a file {path!r}")
            file, blob = directory / path, self._blob(told["sha256"])
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._files.get_file(blob, str(file))
            except FileNotFoundError:
                raise _Damaged(f"{path} is missing") from None
            if file.stat().st_size != told["size"] or file_sha256(file) != told["sha256"]:
                self._remove(blob)
                raise _Damaged(f"{path} differs from its digest")
        return paths

    def _put(self, file: Path, blob: str, size: int) -> None:
        """Share a file, unless its bytes are there; one that was cut short is written again."""
        if self._files.exists(blob) and self._files.size(blob) == size:
            return
        self._whole(blob, lambda place: self._files.put_file(str(file), place))

    def _write(self, content: bytes, path: str) -> None:
        self._whole(path, lambda place: self._files.pipe_file(place, content))

    def _whole(self, path: str, write: Any) -> None:
        """Write under another name first, where writing is not whole or not at all of itself."""
        protocols = _protocols(self._files)
        if not _BUCKETS.intersection(protocols):  # there it would make a bucket of a name that was misspelt
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        if "file" not in protocols:  # stores of objects show one when it is whole
            write(path)
            return
        partial = f"{path}.{uuid.uuid4().hex[:8]}.partial"
        try:
            write(partial)
            self._files.mv(partial, path)
        except BaseException:
            self._remove(partial)
            raise

    def _remove(self, path: str) -> None:
        try:
            self._files.rm_file(path)
        except Exception:  # it is gone, or the storage is: then nobody finds it either
            return

    def _unreachable(self, what: str, error: Exception) -> str:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        if isinstance(error, PermissionError):
            said = error.strerror or error
            reason = (
                f"access was denied ({said}): the credentials must be allowed to list, read and write there"
            )
        elif isinstance(error, FileNotFoundError):
            reason = error.strerror or str(error).rstrip(".")
        return f"{self._url} could not {what}: {reason}. Went on without it."

    def _entry(self, kind: str, key: str) -> str:
        return f"{self._root}/{kind}/{key}.json"

    def _blob(self, digest: str) -> str:
        return f"{self._root}/blobs/{digest[:2]}/{digest}"


def _protocols(files: Any) -> Sequence[str]:
    return (files.protocol,) if isinstance(files.protocol, str) else files.protocol


def _signed(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with the digest of what it says."""
    return {**entry, "sha256": hashlib.sha256(canonical_json(entry).encode()).hexdigest()}
