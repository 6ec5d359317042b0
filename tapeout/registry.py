"""Packages to registries and back: whole or not at all, and nothing twice."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tapeout import modelpack, signing
from tapeout.errors import OutputError, PackageError, RegistryError
from tapeout.files import new_directory
from tapeout.manifest import SIGNATURE
from tapeout.modelpack import Blob
from tapeout.oci import Reference, Repository, sha256
from tapeout.pack import MANIFEST, Package
from tapeout.signing import Trust

_THREADS = 4
Progress = Callable[[str, int, int], None]
Moved = Callable[[int], None]
Done = TypeVar("Done")


@dataclass(frozen=True)
class Shipped:
    """What became of a push or a pull.

    Attributes:
        reference: digest-pinned.
        root_sha256: the package's root digest.
        files: of the package; ``size_bytes`` of them all.
        blobs: what they are in the registry, config included: files with the same bytes are one.
        present: blobs that were there already; ``mounted`` came from another repository of the registry.
        sent_bytes: that travelled, of the others.
    """

    reference: str
    root_sha256: str
    files: int
    size_bytes: int
    blobs: int
    present: int
    mounted: int
    sent_bytes: int


def push(
    directory: Path,
    reference: Reference,
    *,
    mount_from: str | None = None,
    progress: Progress = lambda *_: None,
) -> Shipped:
    """Bring a package into a registry; blobs that are there do not travel.

    Args:
        directory: a whole package.
        reference: where to; a digest in it must be the one that comes out.
        mount_from: another repository of the registry, which may take blobs from there.
        progress: told stage, bytes so far, and all bytes.

    Raises:
        PackageError: the package is damaged.
        RegistryError: the registry cannot be reached or refuses.
    """
    package = Package.open(directory)
    if damage := package.damage():
        raise PackageError(f"{directory} is not whole, so it is not sent: {'; '.join(damage[:5])}.")
    layers = modelpack.layers_of(package)
    manifest, config = modelpack.compose(package)
    if reference.digest not in (None, sha256(manifest)):
        raise RegistryError(
            f"{directory} would be {sha256(manifest)}, and {reference.digest} was asked for: that is another package."
        )
    files = {blob: directory / path for path, blob in layers.items()}
    config_blob = Blob(sha256(config), len(config))
    with Repository(reference, push=True, mount_from=mount_from) as repository:

        def send(blob: Blob, moved: Moved) -> str:
            with io.BytesIO(config) if blob == config_blob else files[blob].open("rb") as file:
                return repository.upload(blob.digest, blob.size, file, moved)

        became = _each([config_blob, *files], send, repository, progress, "push")
        digest = repository.put_manifest(manifest)
    return Shipped(
        reference=reference.pinned(digest),
        root_sha256=package.manifest["root_sha256"],
        files=len(layers),
        size_bytes=sum(blob.size for blob in layers.values()),
        blobs=len(became),
        present=sum(how == "present" for how in became.values()),
        mounted=sum(how == "mounted" for how in became.values()),
        sent_bytes=sum(blob.size for blob, how in became.items() if how == "sent"),
    )


def pull(
    reference: Reference,
    out: Path,
    *,
    trust: Trust | None = None,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> Shipped:
    """Fetch a package. What came of it before a drop or a stop stays in ``.NAME.pull`` beside ``out``, and is gone on with.

    Args:
        trust: whom its signature must be of; None: a signature is not looked at.

    Raises:
        OutputError: ``out`` exists, or the disk is full, or would be.
        PackageError: what is there is no package, or has files that its manifest does not name, or that lie outside of it, or its
            signature is not as it must be.
        RegistryError: the registry cannot be reached, or gives other bytes than the digests say.
        TapeoutError: what is trusted cannot be read. MissingToolchain: model-signing is not installed, or there is no network for it.
    """
    out = Path(os.path.abspath(out))
    store = out.with_name(f".{out.name}.pull")
    with new_directory(out, force=force) as whole, Repository(reference) as repository, _kept(store):
        raw, digest = repository.manifest()
        layers = modelpack.read(raw, str(reference))
        store.mkdir(exist_ok=True)
        _check_room([layers[MANIFEST]], store)

        def fetch(blob: Blob, moved: Moved) -> int | None:
            path = store / blob.digest.removeprefix("sha256:")
            if path.is_file() and path.stat().st_size == blob.size:
                moved(blob.size)
                return None
            return repository.download(blob.digest, blob.size, path, moved)

        became = _each([layers[MANIFEST]], fetch, repository, progress, "manifest")
        _place({MANIFEST: layers[MANIFEST]}, store, whole)
        package = Package.open(whole)
        _compare(package, layers, reference)
        if trust and trust.given and SIGNATURE not in layers:
            raise PackageError(f"{reference} is not signed: it has no {SIGNATURE}.")
        blobs = set(layers.values())
        _check_room(layers.values(), store)
        became = _each(blobs, fetch, repository, progress, "pull") | became
        _place(layers, store, whole)
        if damage := package.damage():
            raise PackageError(f"{reference} is not what its {MANIFEST} says: {'; '.join(damage[:5])}.")
        if trust and trust.given:
            signing.check(whole, trust, called=str(reference))
    shutil.rmtree(store)
    return Shipped(
        reference=reference.pinned(digest),
        root_sha256=package.manifest["root_sha256"],
        files=len(layers),
        size_bytes=sum(blob.size for blob in layers.values()),
        blobs=len(blobs),
        present=sum(came is None for came in became.values()),
        mounted=0,
        sent_bytes=sum(came or 0 for came in became.values()),
    )


def _each(
    blobs: Iterable[Blob],
    work: Callable[[Blob, Moved], Done],
    repository: Repository,
    progress: Progress,
    stage: str,
) -> dict[Blob, Done]:
    """Do ``work`` of each blob, several at a time, the largest first; the first failure ends all."""
    ordered = sorted(set(blobs), key=lambda blob: (-blob.size, blob.digest))
    total, done, lock = sum(blob.size for blob in ordered), dict.fromkeys(ordered, 0), threading.Lock()

    def one(blob: Blob) -> Done:
        def moved(at: int) -> None:
            with lock:
                done[blob] = at
                progress(stage, sum(done.values()), total)

        return work(blob, moved)

    with ThreadPoolExecutor(_THREADS, "tapeout-transfer") as pool:
        futures = {blob: pool.submit(one, blob) for blob in ordered}
        try:
            for future in wait(futures.values(), return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            repository.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {blob: future.result() for blob, future in futures.items()}


def _compare(package: Package, layers: Mapping[str, Blob], reference: Reference) -> None:
    """Refuse an artifact whose layers are not the files that the package's manifest names."""
    named = modelpack.layers_of(package)
    for path, blob in named.items():
        if layers.get(path) != blob:
            what = "other bytes of" if path in layers else "no"
            raise PackageError(f"{reference} has {what} {path}, which its {MANIFEST} names.")
    if more := sorted(layers.keys() - named.keys() - {SIGNATURE}):
        raise PackageError(f"{reference} has {more[0]!r}, which its {MANIFEST} does not name.")


def _check_room(blobs: Iterable[Blob], store: Path) -> None:
    """OutputError when the disk has no room for what is still to come."""
    had = sum(path.stat().st_size for path in store.iterdir())
    need, free = sum(blob.size for blob in blobs) - had, shutil.disk_usage(store).free
    if need > free:
        raise OutputError(f"{store.parent} has {free} bytes free, and {need} would have to be written there.")


def _place(layers: Mapping[str, Blob], store: Path, directory: Path) -> None:
    """Give files their names. The store keeps them until the package is whole; no two of the package are one on the disk."""
    linked = set()
    for path, blob in layers.items():
        file = directory / path
        if file.exists():
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        source = store / blob.digest.removeprefix("sha256:")
        if blob not in linked:
            linked.add(blob)
            with contextlib.suppress(OSError):  # a file system without links
                os.link(source, file)
                continue
        shutil.copyfile(source, file)


@contextmanager
def _kept(store: Path) -> Iterator[None]:
    """Say where the bytes of an unfinished pull are when the disk is full, and keep none that are no good."""
    try:
        yield
    except PackageError:
        shutil.rmtree(store, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        have = sum(path.stat().st_size for path in store.iterdir()) if store.is_dir() else 0
        raise OutputError(
            f"the disk is full: {have} bytes that came are kept in {store}. Free some space, and the same command goes on; "
            "or remove that directory."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            store.rmdir()  # only when it is empty
