"""The pre-commit hook ``tapeout-verify``: no commit holds a package that does not verify or whose gates did not pass.

What is looked at is the commit's content, taken from git's index, not what lies in the working tree: a package whose weights
are ignored by git is whole on this disk and broken for everyone else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from tapeout.errors import PackageError, TapeoutError
from tapeout.files import writing
from tapeout.pack import MANIFEST, Package

_POINTER = b"version https://git-lfs.github.com/spec/v1\n"
"""How the file starts that Git LFS leaves in place of a large one (its specification, docs/spec.md)."""


def main() -> None:
    """Check the packages that the given files belong to, those that the commit takes files away from too.

    Exit status 0: all verify and passed; 1: one does not, a paragraph on stderr for each; 2: this is no git repository.
    """
    try:
        refused = list(refusals(sys.argv[1:]))
    except TapeoutError as error:
        sys.stderr.write(f"tapeout: {error}\n")
        sys.exit(error.status)
    for why in refused:
        sys.stderr.write(f"tapeout: {why}\n")
    sys.exit(1 if refused else 0)


def refusals(paths: Iterable[str]) -> Iterator[str]:
    """Why the commit must not be made, a paragraph a package; ``paths`` are relative to the working directory, as pre-commit gives them."""
    top = Path(_git("rev-parse", "--show-toplevel").strip())
    given = {_inside(top, path) for path in paths}
    removed = set(_names("diff", "--cached", "--no-renames", "--diff-filter=D", "--name-only", "-z", cwd=top))
    tracked = set(_names("ls-files", "--cached", "--full-name", "-z", cwd=top))
    packages = {PurePosixPath(name).parent for name in tracked if PurePosixPath(name).name == MANIFEST}
    gone = {PurePosixPath(name).parent for name in removed if PurePosixPath(name).name == MANIFEST}
    for package in sorted(packages):
        if any(package in PurePosixPath(path).parents for path in given | removed):
            yield from _refusal(top, package, sorted(_within(package, tracked)))
    for package in sorted(gone):
        if left := sorted(_within(package, tracked)):
            yield (
                f"{package} loses its {MANIFEST} by this commit and keeps {len(left)} files, the first of them {left[0]}: "
                f"git rm -r --cached '{package}' takes the rest away, git restore --staged brings the manifest back."
            )


def _refusal(top: Path, package: PurePosixPath, tracked: list[str]) -> Iterator[str]:
    """Why one package is refused, if it is; ``tracked`` are its files in the index."""
    # Beside the objects, for room: a package may be larger than /tmp.
    home = Path(_git("rev-parse", "--absolute-git-dir", cwd=top).strip())
    with writing(home), tempfile.TemporaryDirectory(prefix="tapeout-", dir=home) as scratch:
        # A package may be the whole repository, which has git's own files beside it.
        names = [name for name in tracked if not PurePosixPath(name).name.startswith((".git", ".pre-commit"))]
        _git("checkout-index", f"--prefix={scratch}/", "-z", "--stdin", cwd=top, given="\0".join(names))
        copy = Path(scratch, package)
        try:
            opened = Package.open(copy)
        except PackageError as error:
            yield str(error).replace(f"{copy}", str(package))
            return
        if pointers := [path for path in opened.files() if _is_pointer(copy / path)]:
            yield (
                f"{package} holds pointers of Git LFS in place of {', '.join(pointers[:3])}"
                f"{f' and {len(pointers) - 3} more' if len(pointers) > 3 else ''}: what they stand for cannot be verified here. "
                "git lfs install && git lfs pull brings it; then commit again."
            )
        elif damage := _left_out(opened, top / package) or opened.damage():
            more = f"; and {len(damage) - 5} more" if len(damage) > 5 else ""
            yield (
                f"{package} as it would be committed is not what its manifest says: {'; '.join(damage[:5])}{more}. "
                "git add all of its files, or export it again."
            )
        elif not opened.passed:
            yield (
                f"{package} is whole, but its gates did not pass ({_failed(copy) or 'none of them ran'}): {package / 'report.html'} "
                "says why. A package that failed is for debugging and is not committed."
            )


def _within(directory: PurePosixPath, names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if directory in PurePosixPath(name).parents)


def _left_out(package: Package, here: Path) -> list[str]:
    """Files that are whole on this disk and no part of the commit, one sentence each."""
    return [
        f"{path} is on this disk and not in the commit (ignored by git, or not added)"
        for path in package.files()
        if not (package.directory / path).exists() and (here / path).exists()
    ]


def _failed(directory: Path) -> str:
    """The gates that failed, by what the report says."""
    gates = json.loads((directory / "report.json").read_text(encoding="utf-8"))["gates"]
    return ", ".join(gate["name"] for gate in gates if gate["status"] == "failed")


def _is_pointer(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > 1024:
        return False
    return path.read_bytes().startswith(_POINTER)


def _inside(top: Path, path: str) -> str:
    """A path as git's index has it."""
    return Path(os.path.relpath(Path.cwd().resolve() / path, top.resolve())).as_posix()


def _names(*arguments: str, cwd: Path) -> list[str]:
    return [name for name in _git(*arguments, cwd=cwd).split("\0") if name]


def _git(*arguments: str, cwd: Path | None = None, given: str | None = None) -> str:
    """What git prints; PackageError with its own words where it refuses."""
    command = ["git", *arguments]
    try:
        # Names are bytes to git: what is no UTF-8 comes back as it went.
        done = subprocess.run(
            command,
            cwd=cwd,
            input=given,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            check=True,
        )
    except FileNotFoundError:
        raise PackageError("the hook tapeout-verify needs git, which is not installed here.") from None
    except subprocess.CalledProcessError as error:
        raise PackageError(f"git {arguments[0]} refused: {error.stderr.strip()}.") from error
    return done.stdout
