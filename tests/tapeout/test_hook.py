"""The pre-commit hook: what it refuses is what would be broken in a clone, by what git would commit."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tapeout.build import export, target
from tapeout.generated import write_model
from tapeout.hook import main, refusals
from tapeout.validate import GateResult, Options, Report

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]


def make(work: Path) -> None:
    """Two packages of one model, ``good`` and ``bad`` by their verdict; no runtime is started for it."""
    model = write_model(work / "model", dtype="F32")
    for name, status in (("good", "passed"), ("bad", "failed")):

        def judged(
            artifact: Any, model: Any, quant: Any, device: Any, options: Options, status: Any = status
        ) -> Report:
            gates = (
                GateResult("codes", "passed", "tensors"),
                GateResult("quality/kl", status, "nats", 1.0, 0.1),
            )
            return Report(model.name, device.name, quant.scheme.name, gates)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tapeout.build.validate", judged)
            export(target("null"), model, work / name)


@pytest.fixture
def packages(once: Once) -> Path:
    place, _ = once("hook-packages", make)
    return place


def git(*arguments: str, status: int = 0) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def repository(tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one commit that holds the good package as ``edge/a b``; the working directory of the test."""
    for key in [key for key in os.environ if key.startswith("GIT_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "a")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "a@example.org")
    place = tmp_path / "repository"
    shutil.copytree(packages / "good", place / "edge" / "a b")
    monkeypatch.chdir(place)
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "a package")
    return place


def staged() -> list[str]:
    """What pre-commit gives to a hook, and what the hook says of it."""
    names = git("diff", "--cached", "--name-only", "--diff-filter=ACMRTUXB", "-z").split("\0")
    return list(refusals([name for name in names if name]))


def weights(package: Path) -> Path:
    """The largest file of a package's artifact."""
    return max((package / "artifact").iterdir(), key=lambda path: path.stat().st_size)


@pytest.mark.slow
def test_pre_commit_lets_no_broken_package_through(
    repository: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest of this repository, run by pre-commit itself in a commit; only its way of installing is another."""
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    hook |= {"language": "system", "entry": str(BIN / hook["entry"])}
    (repository / ".pre-commit-config.yaml").write_text(
        yaml.safe_dump({"repos": [{"repo": "local", "hooks": [hook]}]})
    )
    monkeypatch.setenv("PRE_COMMIT_HOME", str(repository / ".git" / "pre-commit"))
    subprocess.run([BIN / "pre-commit", "install"], check=True, capture_output=True)
    git("add", ".pre-commit-config.yaml")
    assert "Passed" in git("commit", "-m", "no package is touched")
    shutil.copytree(packages / "good", repository / "new")
    git("add", "new")
    assert "Passed" in git("commit", "-m", "a whole package")
    with weights(repository / "new").open("r+b") as file:
        file.write(b"\0other")
    git("add", "new")
    said = git("commit", "-m", "a broken one", status=1)
    assert (
        f"new as it would be committed is not what its manifest says: artifact/{weights(repository / 'new').name} differs"
        in said
    )
    git("reset", "-q", "--hard")
    git("rm", "-q", f"new/artifact/{weights(repository / 'new').name}")
    assert "is missing" in git("commit", "-m", "only a deletion, which pre-commit gives to no hook", status=1)
    git("reset", "-q", "--hard")
    subprocess.run([BIN / "pre-commit", "run", "--all-files"], check=True, capture_output=True)
    assert (
        subprocess.run(
            [BIN / "pre-commit", "validate-manifest", ROOT / ".pre-commit-hooks.yaml"], check=False
        ).returncode
        == 0
    )


def test_gates_that_failed(repository: Path, packages: Path) -> None:
    shutil.copytree(packages / "bad", repository / "bad")
    git("add", "bad")
    (said,) = staged()
    assert said.startswith("bad is whole, but its gates did not pass (quality/kl): bad/report.html says why.")


def test_a_part_of_a_package(repository: Path, packages: Path) -> None:
    shutil.copytree(packages / "good", repository / "new")
    git("add", "new/tapeout.json", "new/README.md")
    (said,) = staged()
    assert "is on this disk and not in the commit" in said
    git("add", "new")
    assert staged() == []


def test_weights_that_git_ignores(repository: Path, packages: Path) -> None:
    shutil.copytree(packages / "good", repository / "new")
    name = weights(repository / "new").name
    (repository / ".gitignore").write_text(f"{name}\n")
    git("add", "-A")
    (said,) = staged()
    assert f"artifact/{name} is on this disk and not in the commit (ignored by git, or not added)" in said
    git("add", "-f", "new")
    assert staged() == []


def test_what_is_committed_counts_and_not_the_working_tree(repository: Path) -> None:
    (repository / "edge" / "a b" / "README.md").write_text("another card\n")
    (repository / "other.txt").write_text("x\n")
    git("add", "other.txt")
    assert staged() == []
    git("add", "-A")
    (said,) = staged()
    assert said.startswith("edge/a b as it would be committed")
    assert re.search(r"README\.md has 13 bytes instead of \d+", said)


def test_a_file_too_many_and_a_manifest_that_is_none(repository: Path) -> None:
    (repository / "edge" / "a b" / "notes.txt").write_text("mine\n")
    git("add", "-A")
    (said,) = staged()
    assert "notes.txt is not part of it" in said
    (repository / "edge" / "a b" / "tapeout.json").write_text("{}\n")
    git("add", "-A")
    (said,) = staged()
    assert said.startswith("edge/a b/tapeout.json cannot be read as a manifest")
    assert "tapeout-" not in said


def test_taking_a_package_away(repository: Path) -> None:
    git("rm", "-q", "edge/a b/tapeout.json")
    (said,) = staged()
    assert said.startswith("edge/a b loses its tapeout.json by this commit and keeps ")
    git("rm", "-rq", "edge")
    assert staged() == []


def test_a_pointer_of_git_lfs_in_place_of_weights(repository: Path) -> None:
    file = weights(repository / "edge" / "a b")
    content = file.read_bytes()
    oid = hashlib.sha256(content).hexdigest()
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n")
    git("add", "-A")
    (said,) = staged()
    assert said.startswith(f"edge/a b holds pointers of Git LFS in place of artifact/{file.name}: ")
    assert "git lfs pull" in said


def test_the_whole_repository_is_a_package(
    tmp_path: Path, packages: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(shutil.copytree(packages / "good", tmp_path / "whole"))
    (place / ".gitattributes").write_text("* -text\n")
    monkeypatch.chdir(place)
    git("init", "-q")
    git("add", "-A")
    assert staged() == []
    (place / "golden.txt").write_text("")
    git("add", "-A")
    assert "golden.txt is not part of it" in staged()[0]


def test_from_a_folder_below_and_the_exit_status(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def status(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["tapeout-verify", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    monkeypatch.chdir(repository / "edge")
    assert status("a b/README.md") == 0
    (repository / "edge" / "a b" / "README.md").write_text("another card\n")
    git("add", "-A")
    assert status("a b/README.md") == 1
    assert "tapeout: edge/a b as it would be committed" in capsys.readouterr().err
    monkeypatch.chdir(repository.parent)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(repository.parent.parent))
    assert status() == 2
    assert "not a git repository" in capsys.readouterr().err
