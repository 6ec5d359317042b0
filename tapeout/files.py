"""Writing so that nothing half-written ever stands under its final name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import platformdirs

from tapeout.errors import OutputError


def cache_directory() -> Path:
    """Where stores are kept: ``$TAPEOUT_CACHE``, or the user's cache directory."""
    return Path(os.environ.get("TAPEOUT_CACHE") or platformdirs.user_cache_path("tapeout"))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write below ``path`` into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full: free some space or give another --out",
            errno.EDQUOT: "the disk quota is used up: free some space or give another --out",
            errno.EFBIG: "a file would be larger than this process may write (see `ulimit -f`)",
            errno.EACCES: "it is not writable by this user",
            errno.EPERM: "it is not writable by this user",
            errno.EROFS: "the file system is read-only",
            errno.ENOTDIR: "a part of the path is a file",
            errno.EEXIST: "a part of the path is a file",  # what mkdir says of it
        }
        if error.errno not in reasons:
            raise
        raise OutputError(
            f"could not write {path}: {reasons[error.errno]}. Nothing was left behind there."
        ) from error


@contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold ``path``'s lock file among processes; without ``wait``, OutputError when another one holds it."""
    import fcntl

    name = path.with_name(f".{path.name}.lock")
    while True:
        with writing(path):
            name.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            raise OutputError(
                f"another tapeout process is writing {path}; wait for it, or give another --out."
            ) from None
        if _same(name, handle):
            break
        os.close(handle)  # whoever held it has removed it: others lock a newer one by that name
    try:
        yield
    finally:
        # Removed while still held, so that only a process that never had the lock can find the name gone.
        name.unlink(missing_ok=True)
        os.close(handle)


def _same(path: Path, handle: int) -> bool:
    """Whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


@contextmanager
def new_directory(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary sibling to fill; it takes the place of ``path`` when whole, and is removed on any failure.

    Raises:
        OutputError: ``path`` exists and not ``force``, another process writes it, or it cannot be written.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not force:
        raise OutputError(f"{path} exists; give --force to replace it, or another --out.")
    if path.exists() and not _ours(path):
        raise OutputError(
            f"{path} exists and is not a tapeout output; --force replaces only what tapeout wrote."
        )
    partial = path.with_name(f".{path.name}.partial")
    with lock(path, wait=False), writing(path):
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
        try:
            yield partial
            _replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[IO[bytes]]:
    """Give a temporary sibling to write; it takes the place of ``path`` when whole, and is removed on any failure.

    Raises:
        OutputError: ``path`` exists and not ``force``, or is no file, or another process writes it, or it cannot be written.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir() or (path.exists() and not force):
        raise OutputError(
            f"{path} exists; give {'' if path.is_dir() else '--force to replace it, or '}another --out."
        )
    partial = path.with_name(f".{path.name}.partial")
    with lock(path, wait=False), writing(path):
        try:
            with partial.open("wb") as file:
                yield file
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_whole(path: Path, text: str) -> None:
    """Write a text to a temporary sibling that takes the place of ``path`` when whole: readers see the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _ours(path: Path) -> bool:
    """Whether a directory is empty or holds what tapeout writes: --force must never delete somebody's work."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    return not names or bool(names & {"tapeout.json", "quantization.json"})


def _replace(partial: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Digest of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and a newline at the end: the same value gives the same bytes."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
