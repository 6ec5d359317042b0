"""Scenarios on sessions whose times are given: what is dropped, told, refused and stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from tapeout.errors import MemoryShort, RuntimeCrash, TapeoutError
from tapeout.validate import scenarios
from tapeout.validate.measuring import Asked, Place
from tapeout.validate.memory_watch import room_for, watched
from tapeout.validate.scenarios import run
from tapeout.validate.session import SessionSpec
from tapeout.validate.timing import Timing
from tapeout.validate.worker import open_session

MB = 10**6


class Given:
    """A worker's session whose requests take what they are said to take, one after another."""

    pid = os.getpid()

    def __init__(self, request_s: Iterator[float]) -> None:
        self._request_s = request_s
        self.lengths: list[int] = []

    def time(self, prompt: int, new: int, repeats: int, warm: bool = True) -> Timing:
        self.lengths += [prompt] * repeats
        took = [next(self._request_s) for _ in range(repeats)]
        return Timing(tuple(each / 2 for each in took), tuple((each / 2 / new,) * new for each in took))

    def time_arrivals(self, arrive_s: Sequence[float], prompt: int, new: int) -> list[tuple[float, float]]:
        whole = [next(self._request_s) for _ in arrive_s]
        return [(at + each / 2, at + each) for at, each in zip(arrive_s, whole, strict=True)]

    def cache_bytes(self, tokens: int) -> int | None:
        return None

    def stop(self, reason: str) -> None:
        raise AssertionError(reason)


def place(request_s: Sequence[float] | Iterator[float], **more: Any) -> tuple[Place, list[SessionSpec]]:
    """Where those times are measured, and the sessions that were opened."""
    session, opened = Given(iter(request_s)), list[SessionSpec]()

    @contextmanager
    def opening(spec: SessionSpec) -> Iterator[Any]:
        opened.append(spec)
        if refusal := spec.arguments.get("refuses"):
            raise refusal
        yield session

    given = {
        "batched": None,
        "context": 256,
        "full": 256,
        "cores": 4,
        "cache_bytes": lambda tokens: 10 * tokens,
    }
    spec = SessionSpec("tapeout.targets.toy:open_session", {"threads": None})
    return Place(spec, opening, **{**given, **more}), opened


def endless(seed: int = 0, size: float = 0.1) -> Iterator[float]:
    rng = np.random.default_rng(seed)
    while True:
        yield 0.01 * float(rng.lognormal(0, size))


@pytest.fixture
def quiet(tmp_path: Path) -> Path:
    """A machine that tells nothing of itself."""
    return tmp_path


def one(asked: Asked, where: Place) -> dict[str, Any]:
    found: dict[str, Any] = run(where, replace(asked, scenarios=("single-stream",)))["scenarios"]
    return found["single-stream"]


def test_as_many_samples_as_the_percentiles_need(quiet: Path) -> None:
    where, _ = place(endless())
    found = one(Asked(root=quiet), where)
    assert found["samples"] >= 368
    assert found["warm_up"] <= 20
    for key in ("first_token", "token", "request"):
        assert found[key]["p99"]["low"] < found[key]["p99"]["value"]
    assert found["request"]["p50"]["value"] == pytest.approx(0.01, rel=0.05)
    assert found["first_token"]["p50"]["value"] == pytest.approx(0.005, rel=0.05)
    assert found["token"]["p50"]["value"] == pytest.approx(0.005 / 15, rel=0.05)  # 15 follow the first
    assert found["tokens_per_s"] == pytest.approx(16 / 0.01, rel=0.05)
    assert found["notes"] == []
    assert found["joules_per_token"] is None
    assert "no intel-rapl" in found["energy"]
    assert set(one(Asked(percentiles=(90,), root=quiet), where)["token"]) == {"samples", "effective", "p90"}


def test_a_warm_up_is_left_out(quiet: Path) -> None:
    rng = np.random.default_rng(1)
    slow = list(0.01 * rng.lognormal(0, 0.05, 30) * np.linspace(5, 2, 30))
    found = one(Asked(root=quiet), place(chain(slow, endless(2)))[0])
    assert 30 <= found["warm_up"] <= 50
    assert found["samples"] >= 368
    assert found["request"]["p99"]["value"] < 0.02


def test_a_machine_that_throttles_in_the_middle_is_told(quiet: Path) -> None:
    rng = np.random.default_rng(3)
    cool = 0.01 * rng.lognormal(0, 0.05, 200)
    hot = 0.015 * rng.lognormal(0, 0.05, 800)
    (note,) = one(Asked(root=quiet, samples=400), place([*cool, *hot])[0])["notes"]
    assert "a request took 5" in note  # 50 % longer, off by less than the noise
    assert "longer" in note
    assert "the machine throttles, or others take its time" in note
    at = int(note.split("from request ")[1].split(" ")[0])
    assert abs(at - 201) <= 5


def test_a_run_that_never_settles_is_told(quiet: Path) -> None:
    falling = (0.01 * (1 + 3 * 0.99**at) for at in range(10_000))
    notes = one(Asked(percentiles=(50,), root=quiet), place(falling)[0])["notes"]
    assert any("never came to a steady state" in note for note in notes)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"samples": 100}, r"100 samples are too few: p50 needs 6, p90 needs 36, p99 needs 368"),
        ({"samples": 35, "percentiles": (90,)}, "35 samples are too few: p90 needs 36"),
        ({"percentiles": (0,)}, "p0 is not a percentile. What fits: 1 to 99"),
        ({"percentiles": (100,)}, "p100 is not a percentile"),
        ({"percentiles": ()}, "no percentile was asked for"),
        ({"seconds": 0.0}, "0.0 seconds are no time"),
        ({"seconds": float("nan")}, "nan seconds are no time"),
        ({"scenarios": ("online",)}, "'online' is not a scenario. What fits: single-stream, offline"),
        (
            {"scenarios": ("server",), "loads": (0.5, 1.2)},
            "a load of 1.2 cannot be measured: .* What fits: above 0, at most 1",
        ),
        ({"scenarios": ("server",), "loads": (float("nan"),)}, "a load of nan cannot"),
        ({"scenarios": ("offline",), "loads": (0.5,)}, "loads are of the scenario server"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(given: dict[str, Any], told: str) -> None:
    with pytest.raises(TapeoutError, match=told):
        Asked(**given)


def test_seconds_that_are_too_few_are_refused_early_with_what_would_do(
    quiet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def requests() -> Iterator[float]:
        while True:
            now[0] += 0.5
            yield 0.5

    monkeypatch.setattr(scenarios, "perf_counter", lambda: now[0])
    with pytest.raises(
        TapeoutError,
        match=r"30 seconds are too few for single-stream: .* about 60 requests .*p99 needs 368.* --seconds 276, or",
    ):
        one(
            Asked(seconds=30.0, root=quiet), place(requests())[0]
        )  # half a second of each, and half as much for safety
    assert now[0] < 5
    now[0] = 0.0
    # Nearly enough is tried; what comes of it decides.
    with pytest.raises(TapeoutError, match=r"17 seconds are too few .* about 35 requests .*p90 needs 36"):
        one(Asked(percentiles=(90,), seconds=17.0, root=quiet), place(requests())[0])
    assert now[0] == 17.5  # two requests at a time by then
    now[0] = 0.0
    assert one(Asked(percentiles=(90,), seconds=30.0, root=quiet), place(requests())[0])["samples"] == 61


def test_offline_is_one_after_another_without_batches(quiet: Path) -> None:
    where, opened = place(endless())
    found = run(where, Asked(("offline", "server"), root=quiet))
    assert found["skipped"] == [
        {
            "what": "offline/batches",
            "reason": "the session of toy takes one sequence at a time; requests ran one after another",
        },
        {"what": "server", "reason": "the session of toy takes one sequence at a time"},
    ]
    offline = found["scenarios"]["offline"]
    assert offline["sequences"] == 1
    assert offline["requests_per_s"] == pytest.approx(100, rel=0.1)
    low, high = offline["tokens_per_s_interval"]
    assert low < offline["tokens_per_s"] < high
    assert len(opened) == 1


def batched(sequences: int, context: int) -> SessionSpec:
    return SessionSpec("toy:open", {"sequences": sequences, "context": context})


def test_a_server_gets_shares_of_the_offline_rate(quiet: Path) -> None:
    where, opened = place(endless(), batched=batched)
    told = run(where, Asked(("server",), percentiles=(50, 90), root=quiet))
    found, rows = told["scenarios"], told["server_sweep"]
    assert {tuple(spec.arguments.items()) for spec in opened} == {(("sequences", 8), ("context", 144))}
    # A wave of eight takes as long as its slowest.
    assert found["offline"]["requests_per_s"] == pytest.approx(8 / 0.0115, rel=0.1)
    assert [row["load"] for row in rows] == [0.3, 0.5, 0.7, 0.9]
    for row in rows:
        assert row["arrivals_per_s"] == pytest.approx(row["load"] * found["offline"]["requests_per_s"])
        assert row["request"]["p50"]["value"] == pytest.approx(0.01, rel=0.1)
        assert row["samples"] >= 36
    assert found["server"] is rows[2]
    assert "server_limit" not in told
    few = Asked(("server",), percentiles=(90,), seconds=0.01, root=quiet)
    with pytest.raises(
        TapeoutError, match=r"0.01 seconds are too few for server: about 2 .* 0.3.*p90 needs 36.*--load"
    ):
        run(where, few)


def test_the_largest_load_that_keeps_a_limit_is_named(quiet: Path) -> None:
    """First tokens that take twice as long at each load; 5 ms is the median at the first."""
    slower: list[float] = []

    class Slower(Given):
        def time_arrivals(
            self, arrive_s: Sequence[float], prompt: int, new: int
        ) -> list[tuple[float, float]]:
            done = super().time_arrivals(arrive_s, prompt, new)
            if len(done) == 8:  # a wave of offline
                return done
            if (rate := len(arrive_s) / arrive_s[-1]) > 1.2 * max(slower, default=0.0):
                slower.append(rate)
            late = 0.005 * (2 ** (len(slower) - 1) - 1)
            return [(first + late, last + late) for first, last in done]

    @contextmanager
    def opening(_: SessionSpec) -> Iterator[Any]:
        yield Slower(endless(size=0.01))

    def limit(most_ms: float) -> dict[str, Any]:
        slower.clear()
        where = replace(place(endless(), batched=batched)[0], opened=opening)
        loads = (0.1, 0.3, 0.8)
        asked = Asked(
            ("server",), percentiles=(50,), samples=300, loads=loads, max_ttft_ms=most_ms, root=quiet
        )
        found: dict[str, Any] = run(where, asked)["server_limit"]
        return found

    found = limit(12)
    assert (found["max_ttft_ms"], found["percentile"], found["load"]) == (12, "p50", 0.3)
    assert found["arrivals_per_s"] == pytest.approx(0.3 * 8 / 0.01, rel=0.1)
    assert limit(4)["load"] is limit(4)["arrivals_per_s"] is None
    assert limit(100)["load"] == 0.8


def test_a_graph_that_takes_no_batch_says_so(quiet: Path) -> None:
    refusal = TapeoutError("this graph takes one.")
    where, _ = place(endless(), batched=lambda *_: SessionSpec("toy:open", {"refuses": refusal}))
    assert run(where, Asked(("server",), root=quiet))["skipped"] == [
        {"what": "server", "reason": "this graph takes one"}
    ]
    crash = RuntimeCrash("it died")
    where, _ = place(endless(), batched=lambda *_: SessionSpec("toy:open", {"refuses": crash}))
    with pytest.raises(RuntimeCrash):
        run(where, Asked(("server",), root=quiet))


def test_the_context_is_swept_as_far_as_it_goes(quiet: Path) -> None:
    where, _ = place(endless(), context=1000, full=3000)
    found = run(where, Asked(("context-sweep",), root=quiet))
    rows = found["context_sweep"]
    assert [row["context"] for row in rows] == [128, 512, 968]
    assert [row["cache_bytes"] for row in rows] == [1280, 5120, 9680]
    assert rows[0]["token_low_s"] < rows[0]["token_p50_s"] < rows[0]["token_high_s"]
    assert {each["what"]: each["reason"] for each in found["skipped"]} == {
        "context-sweep/2048": "of the package's 3000 tokens the memory at hand has room for 1000",
        "context-sweep/8192": "the package's context is 3000 tokens",
        "context-sweep/32768": "the package's context is 3000 tokens",
    }
    (row,) = run(where, Asked(("context-sweep",), contexts=(7,), root=quiet))["context_sweep"]
    assert row["context"] == 7


def grouped(root: Path, left: int) -> Path:
    """A control group that leaves so many bytes."""
    for name, content in (
        ("proc/self/cgroup", "0::/"),
        ("sys/fs/cgroup/memory.max", "1000000000000"),
        ("sys/fs/cgroup/memory.current", str(10**12 - left)),
        ("sys/fs/cgroup/memory.stat", "anon 1"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        temporary = root / f"{name}.new"
        temporary.write_text(content)
        temporary.replace(root / name)
    return root


def test_a_context_without_room_is_skipped_by_name(tmp_path: Path) -> None:
    root = grouped(tmp_path, 300 * MB)
    where, _ = place(
        endless(), context=600, full=600, cache_bytes=lambda tokens: MB * tokens if tokens > 200 else 9
    )
    found = run(where, Asked(("context-sweep",), contexts=(128, 512), root=root))
    assert [row["context"] for row in found["context_sweep"]] == [128]
    (skipped,) = found["skipped"]
    assert skipped["what"] == "context-sweep/512"
    assert skipped["reason"].startswith("it takes 0.512 GB more, and 0.0")
    assert room_for(10, root) is None


def test_a_worker_is_stopped_before_the_memory_is_gone(tmp_path: Path) -> None:
    """A real worker in a call that takes ten minutes, while something else fills the memory."""
    root, pid = grouped(tmp_path / "root", 10**9), tmp_path / "pid"
    began = Event()
    with open_session(
        SessionSpec("worker_sessions:Slow", {"pid_file": str(pid)}, environment=PATH)
    ) as session:
        stop = session.stop

        def stopping(reason: str) -> None:
            began.set()
            stop(reason)

        session.stop = stopping  # type: ignore[method-assign]
        with pytest.raises(MemoryShort, match=r"^decoding was stopped: 10 MB of memory were left") as told:  # noqa: SIM117
            with watched(session, "decoding", root):
                grouped(root, 10 * MB)
                session.decode(1)
        assert told.value.status == 3
        assert began.is_set()
        assert session.ended


PATH = {"PYTHONPATH": str(Path(__file__).parent)}


def test_a_crash_stays_one_while_there_is_memory(tmp_path: Path) -> None:
    def crash() -> None:
        raise RuntimeCrash("it died")

    with pytest.raises(RuntimeCrash), watched(Given(endless()), "x", grouped(tmp_path, 10**10)):  # type: ignore[arg-type]
        crash()


def test_a_sweep_that_is_stopped_keeps_what_it_has(tmp_path: Path) -> None:
    root = grouped(tmp_path, 10**10)

    class Filling(Given):
        stopped = Event()

        def time(self, prompt: int, new: int, repeats: int, warm: bool = True) -> Timing:
            if prompt > 300:
                grouped(root, 10 * MB)
                assert self.stopped.wait(60)
                raise TapeoutError("killed")
            return super().time(prompt, new, repeats, warm)

        def stop(self, reason: str) -> None:
            self.stopped.set()

    @contextmanager
    def opening(_: SessionSpec) -> Iterator[Any]:
        yield Filling(endless())

    where = replace(place(endless(), context=9000, full=9000)[0], opened=opening)
    found = run(where, Asked(("context-sweep",), root=root))
    assert [row["context"] for row in found["context_sweep"]] == [128]
    assert [each["what"] for each in found["skipped"]] == [
        "context-sweep/32768", "context-sweep/512", "context-sweep/2048", "context-sweep/8192", "context-sweep/8968"
    ]  # fmt: skip


def test_threads_are_swept_up_to_the_cores(quiet: Path) -> None:
    where, opened = place(endless(), cores=6)
    rows = run(where, Asked(("thread-sweep",), root=quiet))["thread_sweep"]
    assert [row["threads"] for row in rows] == [1, 2, 4, 6]
    assert [spec.arguments["threads"] for spec in opened] == [1, 2, 4, 6]
    without = replace(where, spec=SessionSpec("tapeout.targets.toy:open_session", {}))
    assert run(without, Asked(("thread-sweep",), root=quiet))["skipped"] == [
        {"what": "thread-sweep", "reason": "the session of toy takes no number of threads"}
    ]


def test_energy_is_by_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone = tmp_path / "sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "max_energy_range_uj").write_text("1000000000000")
    spent = iter(range(0, 10**12, 48_000_000))
    read: Callable[[Path], Any] = scenarios.State.read

    def reading(root: Path) -> Any:
        (zone / "energy_uj").write_text(str(next(spent)))
        return read(root)

    (zone / "energy_uj").write_text("0")
    monkeypatch.setattr(scenarios.State, "read", reading)
    progress: list[int] = []
    where, _ = place(endless(), progress=lambda stage, done, total: progress.append(done))
    found = one(Asked(percentiles=(50,), root=tmp_path), where)
    requests = found["samples"] + found["warm_up"]
    looks = len(progress) + 1  # before each call, and at the end
    assert found["joules_per_token"] == pytest.approx(48 * looks / (16 * requests))
    assert found["energy"].startswith("RAPL")
