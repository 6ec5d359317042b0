"""Writing: whole or not at all, one process at a time, and a refusal of the system in words."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import platformdirs
import pytest

from tapeout.errors import OutputError
from tapeout.files import cache_directory, canonical_json, file_sha256, lock, new_directory, writing


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def fill(directory: Path, text: str = "new") -> None:
    (directory / "tapeout.json").write_text(text)


def test_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPEOUT_CACHE", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine"
    assert not (tmp_path / "mine").exists()
    users = Path(platformdirs.user_cache_path("tapeout"))
    monkeypatch.setenv("TAPEOUT_CACHE", "")
    assert cache_directory() == users
    monkeypatch.delenv("TAPEOUT_CACHE")
    assert cache_directory() == users


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EACCES, "not writable by this user"),
        (errno.EPERM, "not writable by this user"),
        (errno.EROFS, "read-only"),
        (errno.ENOTDIR, "a part of the path is a file"),
    ],
)
def test_a_refusal_says_what_to_do(tmp_path: Path, number: int, message: str) -> None:
    with (
        pytest.raises(OutputError, match=f"could not write .*/out: .*{message}") as raised,
        writing(tmp_path / "out"),
    ):
        raise OSError(number, os.strerror(number))
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.status == 2


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ValueError("no")])
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, writing(tmp_path):
        raise error
    assert raised.value is error


def test_new_directory_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_directory(out) as partial:
        fill(partial)
        assert partial.parent == out.parent  # on the same file system, so that it can be renamed
        assert not out.exists()
    assert names(out) == ["tapeout.json"]
    assert names(out.parent) == ["out"]
    assert out.stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_new_directory_of_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with new_directory(Path("out")) as partial:
        os.chdir(tmp_path / "elsewhere")  # whoever fills it may go where he likes
        fill(partial)
    assert names(tmp_path) == ["elsewhere", "out"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_left_and_nothing_is_lost_on_a_failure(
    tmp_path: Path, error: BaseException, force: bool
) -> None:
    out = tmp_path / "out"
    if force:
        out.mkdir()
        fill(out, "old")
    with pytest.raises(type(error)), new_directory(out, force=force) as partial:
        fill(partial)
        raise error
    assert names(tmp_path) == (["out"] if force else [])
    assert not force or (out / "tapeout.json").read_text() == "old"


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk is full"), new_directory(tmp_path / "out") as partial:
        fill(partial)
        raise OSError(errno.ENOSPC, "full")
    assert names(tmp_path) == []


def test_what_stands_there_is_kept_without_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError, match="out exists; give --force to replace it"), new_directory(out):
        pytest.fail("it must not be filled")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("marker", ["tapeout.json", "quantization.json", None])
def test_force_replaces_what_is_ours_whole(tmp_path: Path, marker: str | None) -> None:
    out = tmp_path / "out"
    (out / "old").mkdir(parents=True)
    if marker:
        (out / marker).write_text("old")
    else:
        (out / "old").rmdir()
    with new_directory(out, force=True) as partial:
        fill(partial)
        assert names(out) != ["tapeout.json"] or (out / "tapeout.json").read_text() == "old"
    assert names(out) == ["tapeout.json"]
    assert (out / "tapeout.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_force_keeps_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for path in (tmp_path / "work", tmp_path / "file"):
        with pytest.raises(OutputError, match="is not a tapeout output"), new_directory(path, force=True):
            pytest.fail("it must not be filled")
    assert (tmp_path / "work" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "keep"


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    for name in (".out.partial", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rest").write_text("")
    (tmp_path / ".out.lock").write_text("")
    with new_directory(tmp_path / "out") as partial:
        assert names(partial) == []
        fill(partial)
    assert names(tmp_path) == ["out"]


def test_the_old_one_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    rename = Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EROFS, "read-only")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="read-only"), new_directory(out, force=True) as partial:
        fill(partial)
    assert names(tmp_path) == ["out"]
    assert (out / "tapeout.json").read_text() == "old"


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with lock(path, wait=False):
        assert names(path.parent) == [".out.lock"]
        with (
            pytest.raises(OutputError, match=r"another tapeout process is writing .*out; wait for it"),
            lock(path, wait=False),
        ):
            pytest.fail("two hold it")
        with lock(path.with_name("other"), wait=False):
            assert names(path.parent) == [".other.lock", ".out.lock"]
    assert names(path.parent) == []
    with lock(path, wait=False):
        assert names(path.parent) == [".out.lock"]


def test_a_lock_is_held_among_processes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tapeout.files import lock\n"
        "with lock(Path(sys.argv[1]), wait=False): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="another tapeout process"), new_directory(tmp_path / "out"):
            pytest.fail("two hold it")
        child.kill()  # the system gives the lock back, whatever became of the file
        child.wait()
    with new_directory(tmp_path / "out") as partial:
        fill(partial)
    assert names(tmp_path) == ["out"]


def test_who_waits_gets_the_lock_after_the_other(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with lock(tmp_path / "out", wait=True):
            order.append("second")

    with lock(tmp_path / "out", wait=True):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_who_waited_for_a_lock_that_is_gone_does_not_hold_it_beside_a_newer_one(tmp_path: Path) -> None:
    """Whoever held it removes its file: the next comes by a new file of that name, and one who waits still has the old one open."""
    name, order = tmp_path / ".out.lock", []

    def waits() -> None:
        with lock(tmp_path / "out", wait=True):
            order.append("waited")

    with name.open("w") as old:
        fcntl.flock(old, fcntl.LOCK_EX)
        thread = threading.Thread(target=waits)
        thread.start()
        thread.join(0.2)
        name.unlink()
        newer = name.open("w")
        fcntl.flock(newer, fcntl.LOCK_EX)
    thread.join(0.2)
    assert thread.is_alive()
    order.append("newer")
    newer.close()
    thread.join(10)
    assert order == ["newer", "waited"]


def test_a_lock_is_given_back_on_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), lock(tmp_path / "out", wait=False):
        raise ValueError("no")
    assert names(tmp_path) == []


def test_digest_and_canonical_json(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(7)))
    assert file_sha256(tmp_path / "file") == hashlib.sha256(bytes(range(7))).hexdigest()
    assert canonical_json({"b": ["é", 1.5], "a": None}) == '{\n "a": null,\n "b": [\n  "é",\n  1.5\n ]\n}\n'
    assert canonical_json({"b": 1, "a": 2}) == canonical_json({"a": 2, "b": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))
