from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tapeout.errors import MissingToolchain, ModelError, RuntimeCrash
from tapeout.validate.session import Facts, SessionSpec
from tapeout.validate.worker import WorkerSession, borrow, borrowed, open_session

HERE = str(Path(__file__).parent)
PATH = {"PYTHONPATH": os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))}
Open = Callable[..., WorkerSession]


@pytest.fixture
def start() -> Iterator[Open]:
    opened: list[WorkerSession] = []

    def session(name: str, **arguments: Any) -> WorkerSession:
        opened.append(open_session(SessionSpec(f"worker_sessions:{name}", arguments, environment=PATH)))
        return opened[-1]

    yield session
    for one in opened:
        one.close()


def pid(session: WorkerSession) -> int:
    return session._process.pid


def test_calls_cross_exactly(start: Open) -> None:
    session = start("Echo", context=50)
    assert session.facts == Facts("echo 1", "none", 0.5, 123, 50)
    logits = session.prefill([3, 4])
    odd = np.array([np.inf, -np.inf, np.nan, -0.0, 1e-45, 1 / 3], np.float32)
    expected = np.array([[3001, *odd], [4002, *odd]], np.float32)
    assert logits.dtype == np.float32
    assert logits.tobytes() == expected.tobytes()
    assert session.decode(5).shape == (7,)
    session.reset()
    assert session.decode(6)[0] == 6001
    assert session.prefill([]).shape == (0, 7)
    assert session.tokenize("é\0漢") == list("é\0漢".encode())
    assert session.detokenize(list("é\0漢".encode())) == "é\0漢"


def test_a_worker_that_is_used_again_reads_relative_paths_as_its_caller_does(
    start: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start("Where")
    assert session.detokenize([]) == str(Path.cwd())
    session.release()
    monkeypatch.chdir(tmp_path)
    session.open({})
    assert session.detokenize([]) == str(tmp_path)


def test_a_worker_outlives_an_error_about_what_it_was_given_but_no_crash() -> None:
    spec = SessionSpec("worker_sessions:Echo", {"context": 51}, environment=PATH)
    with pytest.raises(ModelError), borrowed(spec) as session:
        number = pid(session)
        raise ModelError("a bad model")
    with pytest.raises(RuntimeCrash), borrowed(spec) as session:
        assert pid(session) == number
        raise RuntimeCrash("a bad runtime")
    with borrowed(spec) as session:
        assert pid(session) != number
    borrow(spec).close()


def test_large_arrays_cross(start: Open) -> None:
    logits = start("Echo").prefill(range(50_000))
    expected = (np.arange(50_000) * 1000 + np.arange(1, 50_001)).astype(np.float32)
    assert np.array_equal(logits[:, 0], expected)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_death_by_signal_is_named(start: Open, number: signal.Signals) -> None:
    session = start("Broken")
    with pytest.raises(RuntimeCrash) as crash:
        session.decode(int(number))
    message = str(crash.value)
    assert f"was killed by {number.name}" in message
    assert "in decode" in message
    assert "the runtime's last words" in message
    assert "a word on stdout" in message
    assert ("out of memory" in message) == (number == signal.SIGKILL)
    with pytest.raises(RuntimeCrash, match="after the worker had ended"):
        session.decode(0)


def test_errors_come_back_as_what_they_were(start: Open) -> None:
    session = start("Broken")
    with pytest.raises(MissingToolchain) as missing:
        session.decode(-1)
    assert str(missing.value) == "install the thing"
    assert "worker_sessions.py" in missing.value.__notes__[0]
    with pytest.raises(RuntimeCrash, match=r"^worker_sessions:Broken raised ValueError in decode: not th"):
        session.decode(0)
    assert session.tokenize("a") == [97]  # it lives on


def test_failures_to_open(start: Open) -> None:
    with pytest.raises(MissingToolchain, match="needs the Python package 'surely_not_installed'"):
        start("needs_a_package")
    with pytest.raises(RuntimeCrash, match="was killed by SIGSEGV in open"):
        start("dies_at_once")
    with pytest.raises(RuntimeCrash, match=r"exited with status 1 in open\.(?s:.*)enough"):
        start("exits")
    with pytest.raises(RuntimeCrash, match="TypeError"):
        start("Echo", unknown=1)
    with pytest.raises(MissingToolchain, match="/no/such/python cannot be started"):
        open_session(SessionSpec("worker_sessions:Echo", python="/no/such/python"))


def test_python_without_tapeout_is_a_missing_toolchain(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # no site-packages
    python.chmod(0o755)
    with pytest.raises(MissingToolchain, match="-m pip install"):
        open_session(SessionSpec("worker_sessions:Echo", python=str(python)))


def test_close_reaps(start: Open) -> None:
    session = start("Echo")
    with session:
        assert psutil.pid_exists(pid(session))
    assert not psutil.pid_exists(pid(session))
    session.close()


def test_close_in_the_middle_of_a_call_does_not_wait(start: Open, tmp_path: Path) -> None:
    session = start("Slow", pid_file=str(tmp_path / "pid"))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        session.decode(1)
    begin = time.perf_counter()
    session.close()
    assert time.perf_counter() - begin < 5
    assert not psutil.pid_exists(pid(session))


def test_worker_dies_with_its_parent(tmp_path: Path) -> None:
    """Even in the middle of a native call, and when nobody could clean up."""
    pid_file = tmp_path / "pid"
    script = f"""
        from tapeout.validate.session import SessionSpec
        from tapeout.validate.worker import open_session
        open_session(SessionSpec("worker_sessions:Slow", {{"pid_file": {str(pid_file)!r}}})).decode(1)
        """
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(script)], env={**os.environ, **PATH}
    )
    wait_until(lambda: pid_file.exists() and pid_file.read_text() != "")
    worker = int(pid_file.read_text())
    time.sleep(0.2)
    assert psutil.pid_exists(worker)
    parent.kill()
    parent.wait()
    wait_until(
        lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE
    )


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError


def test_time_is_measured_in_the_worker(start: Open) -> None:
    timing = start("Echo").time(prompt_tokens=10, new_tokens=4, repeats=3, chunk=4)
    assert len(timing.prefill_s) == len(timing.decode_s) == 3
    assert {len(tokens) for tokens in timing.decode_s} == {4}
    assert 0 < max(timing.prefill_s) < 0.1
