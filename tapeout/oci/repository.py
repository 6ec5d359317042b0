"""One repository of a registry: its manifests and blobs, there and back."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal
from urllib.parse import urljoin, urlsplit

import httpx2

from tapeout.errors import PackageError, RegistryError
from tapeout.oci.reference import Reference, check_repository
from tapeout.oci.session import AgainError, Patience, Reply, Session, whole

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
_READ_BYTES = 1 << 20
_CHUNK_BYTES = 8 << 20
_MOST_CHUNK_BYTES = 1 << 30  # it is held in memory
_OCTETS = {"Content-Type": "application/octet-stream"}

Sent = Literal["present", "mounted", "sent"]
Moved = Callable[[int], None]


@dataclass
class _Upload:
    """An upload that has begun: where its next byte goes."""

    url: str
    offset: int
    chunk: int


class Repository:
    """The repository that a reference names. Threads may share it.

    Args:
        reference: host, repository, and the tag or digest of its manifest.
        push: whether it is written to.
        mount_from: another repository of the registry whose blobs need not be sent.
    """

    def __init__(self, reference: Reference, *, push: bool = False, mount_from: str | None = None) -> None:
        self._reference, self._mount_from = reference, mount_from
        scopes = [f"repository:{reference.repository}:{'pull,push' if push else 'pull'}"]
        if mount_from:
            check_repository(mount_from)
            scopes.append(f"repository:{mount_from}:pull")
        self._session = Session(reference, scopes)

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def stop(self) -> None:
        """Let transfers of other threads end, with a RegistryError, at their next chunk."""
        self._session.stop.set()

    def manifest(self) -> tuple[bytes, str]:
        """The manifest that the reference names, and its digest.

        Raises:
            RegistryError: there is none, it is larger than 4 MiB, or other bytes came than the digest says.
        """
        wanted = self._reference.digest or self._reference.tag
        kinds = {"Accept": f"{MANIFEST_TYPE}, {INDEX_TYPE}, */*"}
        reply = self._session.patiently("GET", self._path(f"manifests/{wanted}"), kinds)
        if reply.status == 404:
            raise RegistryError(f"{self._reference} does not exist: {reply.why()}.")
        self._session.expect(reply, 200, f"give {self._reference}")
        digest = sha256(reply.body)
        said = self._reference.digest or reply.headers.get("docker-content-digest", digest)
        if said != digest:
            raise RegistryError(
                f"{self._reference} gave a manifest whose digest is {digest} instead of {said}."
            )
        return reply.body, digest

    def put_manifest(self, manifest: bytes) -> str:
        """Put a manifest under the reference's tag, or under its digest where there is none; gives the digest."""
        digest = sha256(manifest)
        path = self._path(f"manifests/{self._reference.tag or digest}")
        reply = self._session.patiently("PUT", path, {"Content-Type": MANIFEST_TYPE}, manifest)
        self._session.expect(reply, 201, f"take the manifest of {self._reference}")
        return digest

    def has(self, digest: str) -> bool:
        """Whether the repository has a blob."""
        reply = self._session.patiently("HEAD", self._path(f"blobs/{digest}"))
        if reply.status != 404:
            self._session.expect(reply, 200, f"say whether it has {digest}")
        return reply.status == 200

    def upload(self, digest: str, size: int, file: IO[bytes], moved: Moved) -> Sent:
        """Bring a blob there: nothing travels where the repository has it, or another one that it may be mounted from.

        ``moved`` is told the bytes that the registry has, which can become less when it forgets an upload.
        """
        patience = Patience(f"the upload of {digest} to {self._reference.host}", self._session.stop)
        upload: _Upload | None = None
        while True:
            try:
                if upload:
                    upload = self._go_on(upload, size)
                if not upload:
                    if self.has(digest):
                        moved(size)
                        return "present"
                    upload = self._begin(digest)
                    if not upload:
                        moved(size)
                        return "mounted"
                self._send_rest(upload, digest, size, file, moved)
            except AgainError as error:
                patience.failed(error, upload.offset if upload else -1)
            else:
                return "sent"

    def download(self, digest: str, size: int, path: Path, moved: Moved) -> int:
        """Write a blob to ``path``; what came of it before stands in ``path.partial``, and is gone on with. Gives the bytes that came now.

        Raises:
            RegistryError: the registry has no such blob, or gives other bytes or more of them.
        """
        partial = path.with_name(path.name + ".partial")
        resumed, came = True, 0
        while resumed:  # what a former run had left may have been damaged: then once more from the start
            with partial.open("a+b") as file:
                resumed = file.tell() > 0
                found, received = self._receive(digest, size, file, moved)
            came += received
            if found == digest:
                partial.replace(path)
                return came
            partial.unlink()
        raise RegistryError(f"{self._reference.host} gave other bytes than those of {digest}: {found}.")

    def _receive(self, digest: str, size: int, file: IO[bytes], moved: Moved) -> tuple[str, int]:
        """Write what is missing of a blob behind what there is; gives the digest of the whole, and the bytes that came."""
        patience = Patience(f"the download of {digest} from {self._reference.host}", self._session.stop)
        if file.tell() > size:
            file.truncate(0)
        file.seek(0)
        at, hashed = 0, hashlib.sha256()
        while block := file.read(_READ_BYTES):
            hashed.update(block)
            at += len(block)
        moved(at)
        came = 0
        while at < size:
            ranged = {"Range": f"bytes={at}-{size - 1}"} if at else {}
            try:
                with self._session.open("GET", self._path(f"blobs/{digest}"), ranged) as response:
                    if not self._continues(response, digest, at) and at:  # it knows no ranges
                        file.truncate(0)
                        at, hashed = 0, hashlib.sha256()
                    for block in response.iter_raw():
                        self._end_if_stopped(digest)
                        if at + len(block) > size:
                            raise RegistryError(
                                f"{self._reference.host} gives more than the {size} bytes of {digest}."
                            )
                        file.write(block)
                        hashed.update(block)
                        at += len(block)
                        came += len(block)
                        moved(at)
                if at < size:
                    raise AgainError(f"the connection ended after {at} of {size} bytes")
            except AgainError as error:
                patience.failed(error, at)
        return f"sha256:{hashed.hexdigest()}", came

    def _continues(self, response: httpx2.Response, digest: str, at: int) -> bool:
        """Whether the response begins at byte ``at``, not at the first."""
        if response.status_code == 206:
            found = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
            if found and int(found[1]) == at:
                return True
            raise RegistryError(f"{self._reference.host} gave another range of {digest} than was asked for.")
        if response.status_code != 200:
            self._session.expect(whole(response), 200, f"give {digest}")
        return False

    def _end_if_stopped(self, digest: str) -> None:
        if self._session.stop.is_set():
            raise RegistryError(f"the transfer of {digest} was stopped.")

    def _begin(self, digest: str) -> _Upload | None:
        """Begin an upload; None when the blob was mounted from another repository instead."""
        mount = f"?mount={digest}&from={self._mount_from}" if self._mount_from else ""
        reply = self._session.patiently("POST", self._path(f"blobs/uploads/{mount}"), content=b"")
        if reply.status == 201:
            return None
        self._session.expect(reply, 202, f"take an upload to {self._reference.repository}")
        least = reply.headers.get("oci-chunk-min-length", "")
        chunk = max(_CHUNK_BYTES, min(int(least), _MOST_CHUNK_BYTES) if least.isdecimal() else 0)
        return _Upload(self._location(reply), 0, chunk)

    def _go_on(self, upload: _Upload, size: int) -> _Upload | None:
        """Ask where a broken upload stands; None when the registry has forgotten it."""
        reply = self._session.once("GET", upload.url)
        at = _received(reply.headers)
        if reply.status != 204 or at is None or at > size:
            return None
        return _Upload(self._location(reply, upload.url), at, upload.chunk)

    def _send_rest(self, upload: _Upload, digest: str, size: int, file: IO[bytes], moved: Moved) -> None:
        """Send what the registry lacks. ``upload`` tells at any time how far it got."""
        body = b""
        if size <= upload.chunk and not upload.offset:  # all in the request that ends it
            body = self._read(file, 0, size, digest)
        while len(body) < size and upload.offset < size:
            self._end_if_stopped(digest)
            chunk = self._read(file, upload.offset, min(upload.chunk, size - upload.offset), digest)
            last = upload.offset + len(chunk) - 1
            ranged = {**_OCTETS, "Content-Range": f"{upload.offset}-{last}"}
            reply = self._session.once("PATCH", upload.url, ranged, chunk)
            if reply.status in (404, 416):  # it has lost the thread: ask where it stands
                raise AgainError(reply.why())
            self._session.expect(reply, 202, f"take a chunk of {digest}")
            upload.offset = min(_received(reply.headers) or last + 1, size)
            upload.url = self._location(reply, upload.url)
            moved(upload.offset)
        mark = "&" if urlsplit(upload.url).query else "?"
        reply = self._session.once("PUT", f"{upload.url}{mark}digest={digest}", _OCTETS, body)
        if reply.status in (404, 416):
            raise AgainError(reply.why())
        self._session.expect(reply, 201, f"take {digest}")
        moved(size)

    def _read(self, file: IO[bytes], at: int, count: int, digest: str) -> bytes:
        file.seek(at)
        block = file.read(count)
        if len(block) < count:
            raise PackageError(f"the file of {digest} became shorter while it was sent.")
        return block

    def _location(self, reply: Reply, otherwise: str = "") -> str:
        """Where an upload goes on; other hosts are fine, as long as nobody on the way can read it."""
        url = urljoin(reply.url, reply.headers.get("location", otherwise))
        if self._session.base.startswith("https:") and not url.startswith("https:"):
            raise RegistryError(f"{self._reference.host} would have an upload go in the clear to {url!r}.")
        return url

    def _path(self, rest: str) -> str:
        return f"{self._session.base}/v2/{self._reference.repository}/{rest}"


def _received(headers: Mapping[str, str]) -> int | None:
    """The bytes that an upload has, by its header ``Range: 0-LAST``; None where it does not say.

    The spec has no way to say none; registries say ``0-0`` then, as they do of one byte.
    """
    found = re.fullmatch(r"(?:bytes=)?0-(\d+)", headers.get("range", ""))
    last = int(found[1]) if found else None
    return last + 1 if last else last


def sha256(content: bytes) -> str:
    """The digest of a blob, as registries write it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
