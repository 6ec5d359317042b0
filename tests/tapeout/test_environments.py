"""Worker environments: made once, taken up where they stopped, and never whole before they are."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from commands import process

from tapeout import environments, own_wheel
from tapeout.environments import ENVIRONMENTS, Environment
from tapeout.errors import MissingToolchain, TapeoutError

TAPEOUT = Path(sys.executable).with_name("tapeout")


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPEOUT_ENVIRONMENTS", str(tmp_path / "environments"))


def write_wheel(path: Path) -> None:
    """A package of one line, so that pip needs no registry."""
    files = {
        "tapeout_sample.py": b"VALUE = 7\n",
        "tapeout_sample-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tapeout-sample\nVersion: 1.0\n",
        "tapeout_sample-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in files.items()
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(
            "tapeout_sample-1.0.dist-info/RECORD", record + "tapeout_sample-1.0.dist-info/RECORD,,\n"
        )


@pytest.mark.slow
def test_an_interrupted_one_goes_on(tmp_path: Path) -> None:
    wheel = tmp_path / "tapeout_sample-1.0-py3-none-any.whl"
    probe = "import json, tapeout_sample; print(json.dumps({'value': tapeout_sample.VALUE}))"
    sample = Environment("sample", "tests", (str(wheel),), probe)
    with pytest.raises(
        MissingToolchain, match=r"'sample' \(tests\) is not on this machine: tapeout env create sample"
    ):
        _ = sample.facts
    with pytest.raises(
        MissingToolchain,
        match=r"'sample' could not be made in .* goes on where it stopped: tapeout env create sample",
    ):
        environments.create(sample)
    python = sample.directory / "bin" / "python"
    assert python.exists()
    assert not sample.installed
    began = python.lstat().st_ctime_ns
    write_wheel(wheel)
    said: list[str] = []
    place = environments.create(sample, said.append)
    assert sample.installed
    assert sample.facts["versions"] == {"value": 7}
    assert python.lstat().st_ctime_ns == began  # not made anew
    assert any("tapeout-sample" in line for line in said)
    wheel.unlink()
    assert environments.create(sample) == place  # whole: pip is not asked
    assert sample.size_bytes > 1_000_000
    # Other requirements are another environment; a probe that fails leaves one that is not whole.
    assert Environment("sample", "tests", ("other",), probe).directory != place
    (place / "tapeout.json").unlink()
    write_wheel(wheel)
    broken = Environment("sample", "tests", sample.requirements, "import no_such_module")
    with pytest.raises(MissingToolchain, match="No module named 'no_such_module'"):
        environments.create(broken)
    assert not broken.installed


def test_every_environment_is_pinned() -> None:
    assert ENVIRONMENTS
    for name, environment in ENVIRONMENTS.items():
        assert environment.name == name
        assert all("==" in requirement for requirement in environment.requirements), name
        assert environment.purpose


def test_unknown_names() -> None:
    with pytest.raises(TapeoutError, match="'optimun' is not a worker environment; did you mean 'optimum'"):
        environments.get("optimun")


@pytest.mark.slow
def test_the_command_line_lists_them(tmp_path: Path) -> None:
    def tapeout(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TAPEOUT, *arguments], capture_output=True, text=True, timeout=60, check=False, env=os.environ
        )

    listed = json.loads(tapeout("env", "list", "--json").stdout)
    assert [each["name"] for each in listed] == list(ENVIRONMENTS)
    assert not any(each["installed"] for each in listed)
    assert "tapeout env create optimum" in tapeout("env", "list").stderr
    done = tapeout("env", "create", "nothing")
    assert done.returncode == 2
    assert "'nothing' is not a worker environment" in done.stderr
    (tmp_path / "environments").mkdir()
    place = ENVIRONMENTS["optimum"].directory
    place.mkdir()
    (place / "tapeout.json").write_text("{}")
    assert "installed" in tapeout("env", "list").stderr


@pytest.mark.slow
def test_another_environment_gets_this_very_tapeout(tmp_path: Path) -> None:
    """By a wheel alone: no index, no sources."""
    place = tmp_path / "other"
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    wheel = own_wheel.requirement(tmp_path)
    install = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *wheel]
    subprocess.run(install, check=True, cwd=tmp_path, timeout=120)
    probe = (
        "import importlib.metadata, json, tapeout; from tapeout.own_wheel import digest\n"
        "print(json.dumps([tapeout.__file__, importlib.metadata.version('tapeout'), digest()]))"
    )
    done = subprocess.run([python, "-P", "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    file, version, digest = json.loads(done.stdout)
    assert Path(file).is_relative_to(place)
    assert version == distribution("tapeout").version
    assert digest == own_wheel.digest()
    assert (place / "bin" / "tapeout").exists()


@pytest.fixture
def stand_in() -> Environment:
    """An environment 'apple' whose Python says what it was called with."""
    apple = ENVIRONMENTS["apple"]
    (apple.directory / "bin").mkdir(parents=True)
    python = apple.directory / "bin" / "python"
    python.write_text('#!/bin/sh\necho "within $TAPEOUT_WITHIN: $*; $PYTHONPATH"\nexit 7\n')
    python.chmod(0o755)
    (apple.directory / "tapeout.json").write_text(json.dumps({"tapeout": own_wheel.digest()}))
    return apple


def test_a_command_goes_on_where_its_library_works(tmp_path: Path, stand_in: Environment) -> None:
    (tmp_path / "coremltools.py").write_text("raise AttributeError('numpy 9 is not borne')\n")
    words = ("export", "apple", "arithmetic", "--scheme", "int4-g32")
    done = process(*words, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 7
    script = stand_in.directory / "bin" / "tapeout"
    assert done.stdout == f"within apple: -P {script} {' '.join(words)}; \n"
    assert "cannot be imported here (AttributeError: numpy 9 is not borne): going on in" in done.stderr


def test_who_goes_nowhere_else(monkeypatch: pytest.MonkeyPatch, stand_in: Environment) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    found = environments.worker_of("apple")
    assert found is not None
    assert found[0] == stand_in
    assert environments.worker_of("cpu") is environments.worker_of("optimum") is None
    with monkeypatch.context() as context:  # what runs there already
        context.setenv("TAPEOUT_WITHIN", "apple")
        assert environments.worker_of("apple") is None
    (stand_in.directory / "tapeout.json").write_text(json.dumps({"tapeout": "an older one"}))
    assert not stand_in.installed
    assert environments.worker_of("apple") is None
    from tapeout.exporters.coreml.program import library

    with pytest.raises(
        MissingToolchain, match=r"pip install 'tapeout\[apple\]', or tapeout env create apple"
    ):
        library()


@pytest.mark.slow
def test_what_runs_after_pip_is_part_of_an_environment(tmp_path: Path) -> None:
    wheel = tmp_path / "tapeout_sample-1.0-py3-none-any.whl"
    write_wheel(wheel)
    probe = "import json, pathlib, sysconfig; print(json.dumps({'joined': (pathlib.Path(sysconfig.get_path('platlib')) / 'joined').exists()}))"
    after = "import pathlib, sysconfig; (pathlib.Path(sysconfig.get_path('platlib')) / 'joined').touch()"
    plain = Environment("sample", "tests", (str(wheel),), probe)
    joined = Environment("sample", "tests", (str(wheel),), probe, after=after)
    assert plain.directory != joined.directory
    environments.create(joined)
    assert joined.facts["versions"] == {"joined": True}
    failing = Environment(
        "sample", "tests", (str(wheel),), probe, after="raise SystemExit('no compiler was found')"
    )
    with pytest.raises(MissingToolchain, match=r"no compiler was found .* tapeout env create sample"):
        environments.create(failing)
    assert not failing.installed
