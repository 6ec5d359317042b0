"""When tasks are begun: after what they need, within jobs and memory, and what becomes of the others when one fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import pytest

from tapeout.matrix import schedule as scheduling
from tapeout.matrix.schedule import Room, schedule
from tapeout.matrix.tasks import Outcome, Status, Task, Told

GB = 1_000_000_000


def task(name: str, memory: float = 1, *needs: str, alone: bool = False) -> Task:
    return Task(
        name,
        "cell",
        "m",
        {},
        f"inputs of {name}",
        "c",
        "",
        memory_bytes=int(memory * GB),
        needs=needs,
        alone=alone,
    )


class Recorder:
    """An executor that sleeps, and writes down what ran beside what and how much memory all were predicted to take."""

    def __init__(self, statuses: Mapping[str, Status] | None = None, seconds: float = 0.03) -> None:
        self.statuses, self.seconds = statuses or {}, seconds
        self.began: list[str] = []
        self.beside: list[set[str]] = []
        self.most = 0
        self._running: dict[str, Task] = {}
        self._guard = threading.Lock()
        self._stop = threading.Event()

    def __call__(self, task: Task, told: Told) -> Outcome:
        with self._guard:
            self.began.append(task.name)
            self._running[task.name] = task
            self.beside.append(set(self._running))
            self.most = max(self.most, sum(each.memory_bytes for each in self._running.values()))
        told("quantize", 1, 2)
        stopped = self._stop.wait(self.seconds)
        with self._guard:
            del self._running[task.name]
        status: Status = "not run" if stopped else self.statuses.get(task.name, "passed")
        return Outcome(task.name, status, "" if status == "passed" else f"{task.name} did not.", task.inputs)

    def used(self) -> Mapping[str, int]:
        return {}

    def stop(self) -> None:
        self._stop.set()


class Silent:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.finished: list[str] = []
        self.waits: set[str] = set()

    def known(self, outcome: Outcome, stands: bool) -> None: ...
    def began(self, task: Task) -> None: ...

    def stage(self, task: Task, stage: str, done: int, total: int) -> None:
        self.stages.append(f"{task.name} {stage} {done}/{total}")

    def ended(self, task: Task, outcome: Outcome) -> None:
        self.finished.append(task.name)

    def tick(self, used: Mapping[str, int], waits: str) -> None:
        self.waits.add(waits)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_LOOK_S", 0.01)


def test_codes_come_before_the_cells_that_need_them_and_once() -> None:
    recorder, watcher = Recorder(), Silent()
    tasks = [task("codes"), task("a", 1, "codes"), task("b", 1, "codes")]
    found = schedule(tasks, recorder, watcher, jobs=4)
    assert recorder.began[0] == "codes"
    assert recorder.beside[0] == {"codes"}
    assert sorted(recorder.began) == ["a", "b", "codes"]
    assert {outcome.status for outcome in found.values()} == {"passed"}
    assert sorted(watcher.stages) == ["a quantize 1/2", "b quantize 1/2", "codes quantize 1/2"]
    assert sorted(watcher.finished) == ["a", "b", "codes"]


def test_no_more_at_once_than_jobs_and_than_memory_holds() -> None:
    tasks = [task(str(index), 1 + index % 3) for index in range(12)]
    by_jobs, by_memory = Recorder(), Recorder()
    schedule(tasks, by_jobs, Silent(), jobs=3)
    assert max(map(len, by_jobs.beside)) == 3
    schedule(tasks, by_memory, Silent(), jobs=8, room=Room(4 * GB, given=True))
    assert by_memory.most <= 4 * GB
    assert max(map(len, by_memory.beside)) > 1
    assert sorted(by_memory.began) == sorted(each.name for each in tasks)


def test_a_task_that_no_memory_here_would_hold_is_refused_by_name() -> None:
    recorder = Recorder()
    found = schedule([task("huge", 9), task("small")], recorder, Silent(), room=Room(4 * GB, given=True))
    assert recorder.began == ["small"]
    assert found["huge"].status == "refused"
    assert found["huge"].reason == "it is predicted to take 9.0 GB of memory, and --memory gives 4.0 GB."
    assert found["huge"].inputs == "inputs of huge"


def test_memory_that_a_running_task_may_still_take_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"available": 5 * GB, "total": 8 * GB}
    monkeypatch.setattr(scheduling.psutil, "virtual_memory", lambda: type("Memory", (), free))
    monkeypatch.setattr(scheduling, "_group_left", lambda: None)
    room, running = Room(8 * GB), task("running", 4)
    assert room.fits(task("next", 1), [running], {})
    assert not room.fits(task("next", 2), [running], {})
    # Of 4 GB it holds 3 by now, which are no longer available: 1 more is to come.
    free["available"] = 2 * GB
    assert room.fits(task("next", 1), [running], {"running": 3 * GB})
    assert not room.fits(task("next", 1.5), [running], {"running": 3 * GB})
    monkeypatch.setattr(scheduling, "_group_left", lambda: GB // 2)
    assert not room.fits(task("next", 1), [], {})


def test_memory_that_others_never_leave_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_PATIENCE_S", 0.05)
    watcher = Silent()
    room = Room(4 * GB)
    monkeypatch.setattr(Room, "fits", lambda *_: False)
    found = schedule([task("a", 2)], Recorder(), watcher, room=room)
    assert found["a"].status == "error"
    assert "which other processes did not leave" in found["a"].reason
    assert "waiting for 2.0 GB of memory that other processes hold" in watcher.waits


@pytest.mark.parametrize("status", ["refused", "skipped", "error"])
def test_a_cell_whose_codes_were_not_made_says_why(status: Status) -> None:
    recorder = Recorder({"codes": status})
    found = schedule([task("codes"), task("a", 1, "codes"), task("b")], recorder, Silent())
    assert recorder.began == ["codes", "b"]
    assert (found["a"].status, found["a"].reason, found["a"].inputs) == (
        status,
        "its codes: codes did not.",
        "inputs of a",
    )


def test_the_others_go_on_unless_the_first_that_fails_is_to_stop_them() -> None:
    tasks = [task("a"), task("bad"), task("c"), task("d")]
    going, stopping = Recorder({"bad": "failed"}), Recorder({"bad": "failed"})
    found = schedule(tasks, going, Silent())
    assert [found[name].status for name in ("a", "bad", "c", "d")] == ["passed", "failed", "passed", "passed"]
    found = schedule(tasks, stopping, Silent(), fail_fast=True)
    assert stopping.began == ["a", "bad"]
    assert [found[name].status for name in ("a", "bad", "c", "d")] == [
        "passed",
        "failed",
        "not run",
        "not run",
    ]
    assert found["d"].reason == "bad did not pass, and --fail-fast stops at the first."


def test_what_runs_beside_the_first_that_fails_is_stopped() -> None:
    class Uneven(Recorder):
        def __call__(self, task: Task, told: Told) -> Outcome:
            if task.name == "bad":
                while "slow" not in self.began:
                    time.sleep(0.001)
                return Outcome("bad", "error", "it broke.")
            return super().__call__(task, told)

    found = schedule([task("slow"), task("bad")], Uneven(seconds=60), Silent(), jobs=2, fail_fast=True)
    assert {name: outcome.status for name, outcome in found.items()} == {"slow": "not run", "bad": "error"}


def test_nothing_runs_beside_what_is_to_be_alone() -> None:
    recorder = Recorder()
    schedule(
        [task("a"), task("one", alone=True), task("b"), task("two", alone=True)], recorder, Silent(), jobs=4
    )
    assert {"a", "b"} in recorder.beside or {"b", "a"} in recorder.beside
    assert all(len(beside) == 1 for beside in recorder.beside if beside & {"one", "two"})


def test_outcomes_are_kept_as_they_come_even_if_the_run_is_stopped() -> None:
    kept: list[str] = []

    def keep(task: Task, outcome: Outcome) -> None:
        kept.append(task.name)
        if task.name == "b":
            raise KeyboardInterrupt

    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt):
        schedule([task("a"), task("b"), task("c")], recorder, Silent(), keep=keep)
    assert kept == ["a", "b"]
    assert "c" not in recorder.began


@pytest.mark.parametrize(
    ("files", "limit", "left"),
    [
        ({}, None, None),
        ({"memory.max": "max", "memory.current": "5"}, None, None),
        (
            {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 1\ninactive_file 300\n"},
            1000,
            400,
        ),
        ({"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "400"}, 1000, 600),
        ({"memory/memory.limit_in_bytes": str((1 << 63) - 4096)}, None, None),
    ],
)
def test_what_a_control_group_leaves(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    limit: int | None,
    left: int | None,
) -> None:
    root = tmp_path_factory.mktemp("group")
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(scheduling, "_GROUP", root)
    assert scheduling._group_limit() == limit
    assert scheduling._group_left() == left


def test_a_task_is_json_and_back() -> None:
    one = replace(task("a", 2, "codes"), recipe={"scheme": "int8"}, options={"format": "onnx"})
    outcome = Outcome("a", "passed", figures={"speed": {"value": 1.5}}, notes=("one",))
    assert Outcome.of(outcome.to_json()) == outcome
    assert one.needs == ("codes",)
