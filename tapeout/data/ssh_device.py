"""The device's side of `tapeout validate --on`: takes a package, checks it, gives the report back.

Runs under the device's own python3 with nothing but the standard library. Answers are lines of JSON behind MARK on stdout; what is told on stdin
is a line of JSON and then the bytes that were asked for. A file that came in part goes on where it stopped: NAME.part stands until it is whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

MARK = b"tapeout-device "
PART = ".part"
BLOCK = 1 << 20
SAID = 4000  # characters of what the script says that are told
MOST = 4 << 20  # bytes of a report


class Stop(Exception):
    """Ends with one sentence and an exit status."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def answer(**fields):
    """Tell a line."""
    sys.stdout.buffer.write(MARK + json.dumps(fields).encode() + b"\n")
    sys.stdout.buffer.flush()


def digest_of(path, most=None):
    """SHA-256 of a file's first bytes, or of all: the object, which can go on."""
    digest, left = hashlib.sha256(), os.path.getsize(path) if most is None else most
    with open(path, "rb") as file:
        while left > 0:
            block = file.read(min(BLOCK, left))
            if not block:
                break
            digest.update(block)
            left -= len(block)
    return digest


def place_of(root, name):
    """Where a file of the package goes."""
    path = os.path.normpath(os.path.join(root, name))
    inside = os.path.realpath(root) + os.sep
    if os.path.isabs(name) or not (os.path.realpath(os.path.dirname(path)) + os.sep).startswith(inside):
        raise Stop(2, "%r leads out of the package." % name)
    return path


def wanted(root, files):
    """Of each file that is not there as it should be its number and how many of its bytes are."""
    found = []
    for number, (name, size, sha256) in enumerate(files):
        path = place_of(root, name)
        if (
            os.path.isfile(path)
            and not os.path.islink(path)
            and os.path.getsize(path) == size
            and digest_of(path).hexdigest() == sha256
        ):
            continue
        part = path + PART
        have = os.path.getsize(part) if os.path.isfile(part) and not os.path.islink(part) else 0
        found.append([number, have if have <= size else 0])
    return found


def receive(path, size, have, sha256, name):
    """The bytes of a file from ``have`` on; it is there when it is whole, and has its digest."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = path + PART
    with contextlib.suppress(FileNotFoundError):
        if os.path.islink(part):
            os.unlink(part)
    digest = digest_of(part, have) if have else hashlib.sha256()
    with open(part, "r+b" if have else "wb") as file:
        file.truncate(have)
        file.seek(have)
        left = size - have
        while left:
            block = sys.stdin.buffer.read(min(BLOCK, left))
            if not block:
                raise Stop(3, "the connection ended while %s was copied." % name)
            file.write(block)
            digest.update(block)
            left -= len(block)
    if digest.hexdigest() != sha256:
        os.unlink(part)
        raise Stop(
            2,
            "%s did not arrive with the digest of the manifest: tapeout verify looks at it, and the same command copies it again."
            % name,
        )
    os.replace(part, path)


def python_of(root):
    """A virtual environment in the directory or beside it, or the python3 that runs this."""
    for place in (root, os.path.dirname(root)):
        python = os.path.join(place, ".venv", "bin", "python3")
        if os.path.exists(python):
            return python
    return sys.executable


def check(root, report, timeout):
    """Run the package's script; its status and its last words."""
    command = [python_of(root), os.path.join(root, "check.py"), root, "--out", report]
    process = subprocess.Popen(
        command,
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
        raise Stop(1, "check.py did not end within %d s, and was stopped." % timeout) from None
    return process.returncode, said.decode("utf-8", "replace")[-SAID:]


def serve():
    """Take what is told, and answer."""
    if sys.version_info < (3, 9):
        raise Stop(3, "its python3 is %d.%d; check.py needs 3.9 or newer." % sys.version_info[:2])
    told = json.loads(sys.stdin.buffer.readline())
    root = os.path.abspath(os.path.expanduser(told["directory"]))
    if os.path.isdir(root) and os.listdir(root) and not os.path.exists(os.path.join(root, "tapeout.json")):
        if not os.path.exists(os.path.join(root, "tapeout.json" + PART)):
            raise Stop(2, "%s is not empty and holds no package: name another directory." % root)
    os.makedirs(root, exist_ok=True)
    need = wanted(root, told["files"])
    answer(need=need, free=shutil.disk_usage(root).free)
    for number, have in need:
        name, size, sha256 = told["files"][number]
        receive(place_of(root, name), size, have, sha256, name)
    answer(copied=len(need))
    report = os.path.join(root, "device_report.json")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(report)
    status, said = check(root, report, told["timeout"])
    data = b""
    if os.path.exists(report):
        with open(report, "rb") as file:
            data = file.read(MOST + 1)
    answer(status=status, said=said, size=len(data), python=python_of(root), directory=root)
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def main():
    """What goes wrong is told in one line."""
    try:
        serve()
    except Stop as stop:
        answer(error=str(stop), status=stop.status)
    except OSError as error:
        answer(error="%s: %s." % (error.filename or "its disk", error.strerror), status=3)


main()
