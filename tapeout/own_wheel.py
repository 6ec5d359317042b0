"""This very tapeout as a wheel, made of what is installed, so that another environment runs the same one without any index."""

from __future__ import annotations

import hashlib
import json
import zipfile
from importlib.metadata import Distribution, PackagePath, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

__all__ = ["digest", "is_editable", "requirement"]

_OF_THE_INSTALLER = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json")


def is_editable() -> bool:
    """Whether this is an editable install, whose files nobody has a digest of."""
    return _sources(distribution("tapeout")) is not None


def digest() -> str:
    """SHA-256 over its files' names and digests; of an editable install, over where its sources stand."""
    found = distribution("tapeout")
    if source := _sources(found):
        words = str(source)
    else:
        words = "\n".join(sorted(f"{each} {each.hash.value if each.hash else ''}" for each in _files(found)))
    return hashlib.sha256(words.encode()).hexdigest()


def requirement(scratch: Path) -> tuple[str, ...]:
    """What pip is to install: a wheel that is written to ``scratch``, or an editable install's sources, editable again."""
    found = distribution("tapeout")
    if source := _sources(found):
        return ("--editable", str(source))
    wheel = scratch / f"tapeout-{found.version}-py3-none-any.whl"
    record = []
    with zipfile.ZipFile(wheel, "w") as archive:
        for each in _files(found):
            archive.writestr(str(each), each.read_binary())
            # https://packaging.python.org/specifications/recording-installed-packages: name, digest, bytes
            record.append(
                f"{each},{each.hash.mode}={each.hash.value},{each.size}" if each.hash else f"{each},,"
            )
            if each.name == "METADATA":
                own = each.parent / "RECORD"
        archive.writestr(str(own), "\n".join([*record, f"{own},,", ""]))
    return (str(wheel),)


def _files(found: Distribution) -> list[PackagePath]:
    """Its files but for scripts, which an installer makes anew, compiled ones, and what the installer has noted."""
    return [
        each
        for each in found.files or ()
        if ".." not in each.parts and each.suffix != ".pyc" and each.name not in _OF_THE_INSTALLER
    ]


def _sources(found: Distribution) -> Path | None:
    """Where an editable install's sources stand; None: it is an ordinary one."""
    said = json.loads(found.read_text("direct_url.json") or "{}")
    editable = said.get("dir_info", {}).get("editable")
    return Path(url2pathname(urlsplit(said["url"]).path)) if editable else None
