"""A package checked on a device that ssh reaches: copied there, its ``check.py`` run, the report brought back.

The system's own ``ssh`` is used, with the user's configuration, keys and known hosts, and asks for nothing. The device needs python3 alone:
``data/ssh_device.py`` is sent along, and takes over one connection what it says that it lacks, file by file and from where an earlier copy
stopped. Nothing that the user or the package says is a word of a shell: it travels as JSON. What the device says is not trusted.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import IO, Any

from tapeout.device_report import DeviceReport
from tapeout.errors import MissingToolchain, PackageError, RuntimeCrash, TapeoutError
from tapeout.files import file_sha256
from tapeout.pack import MANIFEST, Package

__all__ = ["Address", "checked"]

Progress = Callable[[str, int, int], None]

_ADDRESS = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][\w.-]*)@)?(?P<host>[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+(?:%\w+)?\])"
    r"(?::(?P<port>\d{1,5}))?(?P<directory>/[^\x00-\x1f\x7f]*)?"
)
_OPTIONS = (
    *("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ClearAllForwardings=yes"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"),
)
_MARK = b"tapeout-device "
_NOISE = 100  # lines of a login shell's own words before the first answer
_LINE, _REPORT, _BLOCK = 1 << 20, 4 << 20, 1 << 20
_WAIT_S = 3600  # for an answer: digests of a large package on a slow card, or all of check.py


@dataclass(frozen=True)
class Address:
    """Where a device is, and where the package goes on it.

    Attributes:
        directory: absolute, or below the user's home when it begins with ``~``; None: a directory of the package's own in its cache.
    """

    host: str
    user: str | None = None
    port: int | None = None
    directory: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``ssh://[user@]host[:port][/directory]``; ``/~/directory`` is below the home. TapeoutError for anything else."""
        found = _ADDRESS.fullmatch(text)
        if not found or not 0 < int(found["port"] or 22) < 65536:
            raise TapeoutError(
                f"'{text}' is not the address of a device: write ssh://[user@]host[:port][/directory], without a password."
            )
        directory = found["directory"] if (found["directory"] or "/").strip("/") else None
        if directory and directory.startswith("/~/"):
            directory = directory[1:]
        port = int(found["port"]) if found["port"] else None
        return cls(found["host"].strip("[]"), found["user"], port, directory)

    @property
    def command(self) -> list[str]:
        """``ssh`` and its options, up to what is run there."""
        words = ["ssh", *_OPTIONS]
        words += ["-p", str(self.port)] if self.port else []
        words += ["-l", self.user] if self.user else []
        return [*words, "--", self.host]


def checked(package: Package, address: Address, progress: Progress | None = None) -> DeviceReport:
    """Copy a package to a device, run its ``check.py`` there, and read the report.

    Args:
        package: a whole one.
        address: of the device.
        progress: called with (``copy``, bytes, bytes).

    Raises:
        MissingToolchain: no ssh here; the device does not answer, lets nobody in, lost the connection, is full, or lacks python3 or the runtime.
        PackageError: the package has no ``check.py``, is not whole, or the report is none, cut short, or of another package.
        RuntimeCrash: the script died or did not end. TapeoutError: the directory is not for packages.
    """
    told = _files(package)
    directory = address.directory or f"~/.cache/tapeout/check/{package.manifest['root_sha256'][:16]}"
    with _connected(address) as device:
        device.tell({"directory": directory, "files": told, "timeout": _WAIT_S})
        found = device.answer("need", "free")
        need = _needed(found, told, address)
        _send(package, told, need, device, progress)
        device.answer("copied")
        found = device.answer("status", "said", "size")
        data = device.bytes_of(found["size"])
    return _report(package, address, found, data)


def _files(package: Package) -> list[tuple[str, int, str]]:
    """Name, size and digest of every file, the manifest first: a directory with it is one of a package."""
    manifest = package.manifest
    every = {**manifest["files"], **manifest["beside"]}
    if "check.py" not in every:
        raise PackageError(
            f"{package.directory} has no check.py: it was made before packages took one along. Export it again."
        )
    if wrong := package.cut_short():
        raise PackageError(f"{package.directory} is not what its manifest says: {'; '.join(wrong)}.")
    path = package.directory / MANIFEST
    first = (MANIFEST, path.stat().st_size, file_sha256(path))
    return [first, *((name, entry["size"], entry["sha256"]) for name, entry in sorted(every.items()))]


def _needed(found: Any, told: list[tuple[str, int, str]], address: Address) -> list[tuple[int, int]]:
    """Numbers of files, and how many of their bytes are there, as far as that can be."""
    try:
        need = [(int(number), int(have)) for number, have in found["need"]]
        good = all(0 <= number < len(told) and 0 <= have <= told[number][1] for number, have in need)
        numbers = [number for number, _ in need]
        free = int(found["free"])
    except (TypeError, ValueError, OverflowError) as error:
        raise PackageError(f"{address.host} asks for what there is not: {error}.") from None
    if not good or len(set(numbers)) != len(numbers):
        raise PackageError(f"{address.host} asks for files that the package does not have.")
    missing = sum(told[number][1] - have for number, have in need)
    if missing > free:
        raise MissingToolchain(
            f"{address.host} has {free / 1e6:.1f} MB free, and {missing / 1e6:.1f} MB of the package are still to be copied: make room, or "
            "name a directory on another disk, ssh://host/directory."
        )
    return need


def _send(
    package: Package,
    told: list[tuple[str, int, str]],
    need: list[tuple[int, int]],
    device: _Device,
    progress: Progress | None,
) -> None:
    """The bytes that were asked for."""
    total, sent = sum(told[number][1] - have for number, have in need), 0
    for number, have in need:
        name, size, _ = told[number]
        with (package.directory / name).open("rb") as file:
            file.seek(have)
            left = size - have
            while left:
                block = file.read(min(_BLOCK, left))
                if not block:
                    raise PackageError(f"{package.directory / name} became shorter while it was copied.")
                device.write(block)
                left, sent = left - len(block), sent + len(block)
                if progress:
                    progress("copy", sent, total)


def _report(package: Package, address: Address, found: Any, data: bytes) -> DeviceReport:
    """The report, by what the script ended with."""
    status, words = found["status"], _words(found["said"])
    if status == 3:
        raise MissingToolchain(
            f"{address.host} cannot run the package: {words} (by {_words(found.get('python'))}; a virtual environment .venv in "
            f"{_words(found.get('directory'))}, or beside it, is used when there is one)"
        )
    if status == 2:
        raise PackageError(f"check.py on {address.host} stopped: {words}")
    if status not in (0, 1):
        raise RuntimeCrash(f"check.py on {address.host} ended with {_words(status)}: {words}")
    if not data:
        raise PackageError(f"check.py on {address.host} ended and left no device_report.json: {words}")
    return DeviceReport.parse(data, f"the device_report.json of {address.host}", package)


class _Device:
    """A connection to the device's side."""

    def __init__(self, process: subprocess.Popen[bytes], address: Address, log: IO[bytes]) -> None:
        assert process.stdin
        assert process.stdout
        self._process, self._address, self._log = process, address, log
        self._stdin, self._stdout = process.stdin, process.stdout
        self._late = False

    def tell(self, value: Any) -> None:
        """A line."""
        self.write(json.dumps(value).encode() + b"\n")

    def write(self, data: bytes) -> None:
        """Bytes; a connection that is gone says why when it is asked."""
        try:
            self._stdin.write(data)
            self._stdin.flush()
        except BrokenPipeError:
            self.answer()
            raise self._gone() from None

    def answer(self, *keys: str) -> Any:
        """The next answer, which has these keys; what the device's side complains of is raised."""
        for _ in range(_NOISE):
            line = self._awaited(lambda: self._stdout.readline(_LINE))
            if not line:
                raise self._gone()
            if line.startswith(_MARK):
                break
        try:
            found = json.loads(line[len(_MARK) :]) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and "error" in found:
            status = found.get("status")
            kind = RuntimeCrash if status == 1 else MissingToolchain if status == 3 else PackageError
            raise kind(f"{self._address.host}: {_words(found['error'])}")
        if not isinstance(found, dict) or any(key not in found for key in keys):
            raise PackageError(
                f"{self._address.host} answers {_words(line.decode(errors='replace'))[:200]!r}, which says nothing."
            )
        return found

    def bytes_of(self, size: Any) -> bytes:
        """That many bytes."""
        if not isinstance(size, int) or not 0 <= size <= _REPORT:
            raise PackageError(
                f"the device_report.json of {self._address.host} has {size} bytes; what fits: up to {_REPORT}."
            )
        data: bytes = self._awaited(lambda: self._stdout.read(size))
        return data

    def _awaited(self, read: Callable[[], bytes]) -> bytes:
        """What a read gives; a device that says nothing for an hour is left."""

        def leave() -> None:
            self._late = True
            self._process.kill()

        timer = threading.Timer(_WAIT_S + 60, leave)
        timer.start()
        try:
            return read()
        finally:
            timer.cancel()

    def _gone(self) -> TapeoutError:
        """Why there is no answer, by how ssh ended."""
        host, status = self._address.host, self._process.wait()
        self._log.seek(0)
        lines = [
            line
            for line in _words(self._log.read().decode(errors="replace"), lines=True).splitlines()
            if line.strip()
        ]
        said = f" ssh says: {lines[-1].strip()}" if lines else ""
        if self._late:
            return MissingToolchain(f"{host} did not answer for {_WAIT_S + 60} s.")
        if status == 127:
            return MissingToolchain(
                f"{host} has no python3: install it (Debian: apt-get install python3), or check the package there with check.cpp, where it has one."
            )
        if status == 255:
            again = (
                " The same command goes on where it stopped."
                if re.search("closed|reset|broken|timeout|lost", said, re.I)
                else ""
            )
            return MissingToolchain(f"{host} cannot be reached, or the connection ended.{said}{again}")
        return MissingToolchain(
            f"{host} ended the connection with {status}.{said} The same command goes on where it stopped."
        )


@contextmanager
def _connected(address: Address) -> Iterator[_Device]:
    """The device's side, running; it ends with the block."""
    side = (files("tapeout") / "data" / "ssh_device.py").read_bytes()
    # Letters, digits and signs that no shell takes for its own, whatever shell it is.
    code = f"import base64;exec(base64.b64decode('{base64.b64encode(side).decode()}'))"
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                [*address.command, f'python3 -c "{code}"'],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        except FileNotFoundError:
            raise MissingToolchain(
                "there is no ssh here, which reaches the device: install OpenSSH's client (Debian: apt-get install openssh-client)."
            ) from None
        try:
            yield _Device(process, address, log)
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    with suppress(BrokenPipeError):
                        stream.close()


def _words(said: Any, *, lines: bool = False) -> str:
    """What a device says as one line that a terminal can show: of its last words the line that begins with ``check:``, if one does."""
    text = re.sub(r"[^\S\n]+|[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", str(said))
    if lines:
        return text
    told = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line.removeprefix("check: ") for line in told if line.startswith("check: ")]
    return (own or told or ["nothing"])[-1][:600]
