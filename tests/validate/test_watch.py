"""A watch sees the memory of its process and of those below it, stage by stage, and keeps few points of a long run."""

from __future__ import annotations

import mmap
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapeout.validate import watch
from tapeout.validate.watch import Watch

SIZE = 64 << 20  # of what is allocated, in bytes: far above what a test's own objects take
CHILD = f"import time; held = bytearray(b'x') * {SIZE}; print('there', flush=True); time.sleep(20)"


def test_stages_have_their_seconds_and_their_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    # Readings of a process with many workers take long, and would rest longer than this test.
    monkeypatch.setattr(watch, "_REST", 1.0)
    with Watch() as seen:
        with seen.stage("small"):
            time.sleep(0.02)
        with seen.stage("large"), mmap.mmap(-1, SIZE) as held:  # pages that nobody had before
            held.write(bytes(SIZE))
            time.sleep(25 * watch._LEAST_S)
        with seen, seen.stage("after"):  # what enters it again does not end it
            time.sleep(0.02)
        with seen.stage("last"):
            pass
    found = seen.findings()
    small, large, after, last = found["stages"]
    assert [stage["name"] for stage in found["stages"]] == ["small", "large", "after", "last"]
    # What else the process holds may shrink meanwhile, by less than that.
    assert large["peak_bytes"] - small["peak_bytes"] > SIZE // 2
    assert large["peak_bytes"] - after["peak_bytes"] > SIZE // 2
    assert large["seconds"] >= 3 * watch._LEAST_S
    assert small["begin_s"] + small["seconds"] <= large["begin_s"]
    assert last["peak_bytes"] > 0
    points = found["memory"]["points"]
    assert [second for second, _ in points] == sorted(second for second, _ in points)
    assert found["memory"]["peak_bytes"] == max(count for _, count in points) >= large["peak_bytes"]


def test_workers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_FAMILY_S", 0.0)
    with Watch() as seen:
        with seen.stage("alone"):
            pass
        worker = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
        try:
            assert worker.stdout
            worker.stdout.readline()
            with seen.stage("with it"):
                pass
        finally:
            worker.kill()
            worker.communicate()
        with seen.stage("gone"):  # a process that is listed and has ended is no error
            pass
    alone, together, gone = (stage["peak_bytes"] for stage in seen.findings()["stages"])
    assert together - alone > SIZE * 3 // 4
    assert together - gone > SIZE * 3 // 4


def test_a_watch_that_nobody_entered_keeps_seconds() -> None:
    seen = Watch()
    with pytest.raises(ZeroDivisionError), seen.stage("failed"):
        _ = 1 / 0
    assert seen.findings() == {
        "stages": [{"name": "failed", "seconds": seen.findings()["stages"][0]["seconds"]}]
    }


def test_reading_costs_a_hundredth_of_a_core_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_FAMILY_S", 0.0)  # the dearest way
    spent: list[float] = []
    read = Watch._read

    def timed(self: Watch) -> None:
        begin = time.thread_time()
        read(self)
        spent.append(time.thread_time() - begin)

    monkeypatch.setattr(Watch, "_read", timed)
    begin = time.perf_counter()
    with Watch():
        time.sleep(1.0)
    assert len(spent) > 1
    # After each but the last it rested a hundred times as long as that took, of which no more was computing.
    assert sum(spent[:-1]) <= (time.perf_counter() - begin) / 100


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=3000), st.integers(1, 300))
def test_thinning_keeps_the_peak(counts: list[int], most: int) -> None:
    points = [(float(at), count) for at, count in enumerate(counts)]
    kept = watch._thinned(points, most)
    assert 1 <= len(kept) <= most
    assert max(count for _, count in kept) == max(counts)
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
