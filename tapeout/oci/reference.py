"""What names an artifact in a registry."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from tapeout.errors import RegistryError

_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*")
_MOST_REPOSITORY = 255
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Reference:
    """``host[:port]/repository[:tag][@sha256:…]``; without tag and digest the tag is ``latest``, as everywhere."""

    host: str
    repository: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference; RegistryError says which part is wrong."""
        rest, at, digest = text.partition("@")
        host, slash, path = rest.partition("/")
        repository, colon, tag = path.partition(":")
        example = "; a reference is host/repository:tag, such as ghcr.io/team/model:v1"
        if not slash or not ("." in host or ":" in host or host == "localhost"):
            raise RegistryError(f"{text!r} names no registry{example}.")
        if not _HOST.fullmatch(host):
            raise RegistryError(f"{host!r} in {text!r} is no host of a registry{example}.")
        check_repository(repository)
        if colon and not _TAG.fullmatch(tag):
            raise RegistryError(
                f"{tag!r} in {text!r} is no tag: letters, digits, and _ . - after the first, 128 at most."
            )
        if at and not DIGEST.fullmatch(digest):
            raise RegistryError(f"{digest!r} in {text!r} is no digest: sha256: and 64 hex digits.")
        return cls(host, repository, tag or (None if digest else "latest"), digest or None)

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine, by its name or number."""
        host = self.host
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return name == "localhost" or name.endswith(".localhost")

    def pinned(self, digest: str) -> str:
        """The reference that names these bytes and no others."""
        return f"{self.host}/{self.repository}@{digest}"

    def __str__(self) -> str:
        tag, digest = f":{self.tag}" if self.tag else "", f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"


def check_repository(name: str) -> None:
    """RegistryError unless ``name`` can be a repository's."""
    if not _REPOSITORY.fullmatch(name) or len(name) > _MOST_REPOSITORY:
        raise RegistryError(
            f"{name!r} is no repository: small letters and digits, with . _ - between them and / between parts, such as team/model."
        )
