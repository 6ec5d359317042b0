"""The device's side of `tapeout validate --on`: takes a package, checks it, gives the report back.

Runs under the device's own python3 with nothing but the standard library; any python3 reads it, to say that it is too old. Answers are lines of
JSON behind MARK on stdout; what is told on stdin is a line of JSON and then the bytes that were asked for. A file that came in part goes on
where it stopped: NAME.part stands until it is whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

MARK = b"tapeout-device "
MANIFEST, SCRIPT, REPORT = "tapeout.json", "check.py", "device_report.json"
BLOCK = 1 << 20
SAID = 4000  # characters of what the script says that are told
MOST = 4 << 20  # bytes of a report


class Stop(Exception):
    """Ends with one sentence and an exit status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def answer(**fields: Any) -> None:
    """Tell a line."""
    sys.stdout.buffer.write(MARK + json.dumps(fields).encode() + b"\n")
    sys.stdout.buffer.flush()


def digest_of(path: Path, size: int) -> Any:
    """SHA-256 of a file's first ``size`` bytes: the object, which can go on."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size:
            block = file.read(min(BLOCK, size))
            if not block:
                break
            digest.update(block)
            size -= len(block)
    return digest


def place_of(root: Path, name: str) -> Path:
    """Where a file of the package goes."""
    path = root / name
    inside, parent = root.resolve(), Path(os.path.normpath(str(path))).parent.resolve()
    if Path(name).is_absolute() or not (parent == inside or inside in parent.parents):
        raise Stop(2, f"{name!r} leads out of the package.")
    return path


def part_of(path: Path) -> Path:
    """Where a file stands until it is whole."""
    return path.with_name(path.name + ".part")


def size_of(path: Path) -> int:
    """Bytes of a file; of what is none, or a link, -1."""
    return path.stat().st_size if path.is_file() and not path.is_symlink() else -1


def wanted(root: Path, files: Any) -> Any:
    """Of each file that is not there as it should be its number, and how many of its bytes are there."""
    found = []
    for number, (name, size, sha256) in enumerate(files):
        path = place_of(root, name)
        if size_of(path) != size or digest_of(path, size).hexdigest() != sha256:
            have = size_of(part_of(path))
            found.append([number, have if 0 < have <= size else 0])
    return found


def receive(path: Path, size: int, have: int, sha256: str, name: str) -> None:
    """The bytes of a file from ``have`` on; it is there when it is whole, and has its digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    if not have:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
    digest, left = digest_of(part, have) if have else hashlib.sha256(), size - have
    with part.open("ab") as file:
        while left:
            block = sys.stdin.buffer.read(min(BLOCK, left))
            if not block:
                raise Stop(3, f"the connection ended while {name} was copied.")
            file.write(block)
            digest.update(block)
            left -= len(block)
    if digest.hexdigest() != sha256:
        part.unlink()
        again = "tapeout verify looks at it, and the same command copies it again."
        raise Stop(2, f"{name} did not arrive with the digest of the manifest: {again}")
    part.replace(path)


def python_of(root: Path) -> str:
    """A virtual environment in the directory or beside it, or the python3 that runs this."""
    for place in (root, root.parent):
        python = place / ".venv" / "bin" / "python3"
        if python.exists():
            return str(python)
    return sys.executable


def check(root: Path, report: Path, timeout: int) -> Any:
    """Run the package's script; its status and its last words."""
    process = subprocess.Popen(
        [python_of(root), str(root / SCRIPT), str(root), "--out", str(report)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise Stop(1, f"{SCRIPT} did not end within {timeout} s, and was stopped.") from None
    return process.returncode, said.decode("utf-8", "replace")[-SAID:]


def serve() -> None:
    """Take what is told, and answer."""
    if sys.version_info < (3, 9):  # noqa: UP036 - what this is about
        raise Stop(
            3, f"its python3 is {'.'.join(map(str, sys.version_info[:2]))}; {SCRIPT} needs 3.9 or newer."
        )
    told = json.loads(sys.stdin.buffer.readline().decode())
    root = Path(os.path.normpath(str(Path(told["directory"]).expanduser().absolute())))
    ours = root / MANIFEST
    if root.is_dir() and any(root.iterdir()) and not ours.exists() and not part_of(ours).exists():
        raise Stop(2, f"{root} is not empty and holds no package: name another directory.")
    root.mkdir(parents=True, exist_ok=True)
    need = wanted(root, told["files"])
    answer(need=need, free=shutil.disk_usage(str(root)).free)
    for number, have in need:
        name, size, sha256 = told["files"][number]
        receive(place_of(root, name), size, have, sha256, name)
    answer(copied=len(need))
    report = root / REPORT
    with contextlib.suppress(FileNotFoundError):
        report.unlink()
    status, said = check(root, report, told["timeout"])
    data = b""
    if size_of(report) >= 0:
        with report.open("rb") as file:
            data = file.read(MOST + 1)
    answer(status=status, said=said, size=len(data), python=python_of(root), directory=str(root))
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def main() -> None:
    """What goes wrong is told in one line."""
    try:
        serve()
    except Stop as stop:
        answer(error=str(stop), status=stop.status)
    except OSError as error:
        answer(error=f"{error.filename or 'a file'}: {error.strerror}.", status=3)


main()
