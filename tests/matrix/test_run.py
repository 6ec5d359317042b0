"""Matrices as a user starts them: killed and gone on with, found standing, shared, damaged, refused; and their pages."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, cast
from xml.etree import ElementTree

import pytest
from commands import PROGRAM, Done, tapeout

from tapeout.pack import Package

Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]

FILE = """
tokens = 64
[matrix]
models = ["count"]
schemes = ["int8", "int4-g32"]
targets = ["null", "nvidia"]
"""
"""Four cells, of which ``nvidia`` refuses one."""
NULLS = ["count.int8.rtn.null", "count.int4-g32.rtn.null"]
MADE = [NULLS[0], "count.int8.rtn.nvidia", NULLS[1]]


def environment(work: Path) -> dict[str, str]:
    return {"TAPEOUT_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def digests(out: Path) -> dict[str, str]:
    return {
        path.parent.name: Package.open(path.parent).manifest["root_sha256"]
        for path in sorted(out.glob("*/tapeout.json"))
    }


def started(work: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [str(PROGRAM), "matrix", "small.toml", "--out", "out", *arguments]
    return subprocess.Popen(
        command, cwd=work, env=os.environ | environment(work), stderr=subprocess.PIPE, text=True
    )


def run(work: Path, *arguments: str | Path, **keywords: Any) -> Done:
    return tapeout(
        "matrix", "small.toml", "--out", "out", *arguments, cwd=work, **environment(work), **keywords
    )


@pytest.fixture(scope="module")
def whole(once: Once) -> Path:
    """An output that was made without a disturbance; what was said is in ``said.txt``."""

    def make(work: Path) -> None:
        (work / "small.toml").write_text(FILE)
        (work / "said.txt").write_text(run(work, status=0).stderr)

    return once("matrix", make)[0]


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """The same, to be changed; file times are kept."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.slow
def test_every_cell_is_made_or_refused_by_name(whole: Path) -> None:
    said = (whole / "said.txt").read_text()
    assert "PASSED  4 cells: – 1 refused, ✓ 3 passed" in said
    assert "refused  count.int4-g32.rtn.nvidia  target nvidia cannot carry int4-g32" in said
    assert said.count("passed   codes count") == 2
    assert sorted(digests(whole / "out")) == sorted(MADE)
    told = json.loads((whole / "out" / "matrix.json").read_text())
    assert [cell["name"] for cell in told["cells"]] == [*MADE, "count.int4-g32.rtn.nvidia"]
    one, other, _, refused = told["cells"]
    assert one["codes_sha256"] == other["codes_sha256"]  # quantized once, for both targets
    assert one["root_sha256"] == digests(whole / "out")[NULLS[0]]
    assert one["peak_bytes"] > 50_000_000  # torch alone takes more
    assert one["figures"]["quality"]["metric"] == "mean KL, nats"
    assert refused["root_sha256"] is None
    assert {path.stem for path in (whole / "out" / "cells").iterdir()} == {
        cell["name"] for cell in told["cells"]
    }
    assert all((whole / "out" / "logs" / f"{name}.log").exists() for name in MADE)


@pytest.mark.slow
def test_what_stands_is_not_made_again(copied: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in (copied / "out").glob("*/tapeout.json")}
    done = run(copied, status=0)
    assert done.stderr.count("as it stands") == 4
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.slow
def test_junit_has_a_test_a_cell(whole: Path) -> None:
    suite = ElementTree.parse(whole / "out" / "index.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "0", "1")
    skipped = {case.get("name"): case.find("skipped") for case in suite if case.find("skipped") is not None}
    assert list(skipped) == ["count.int4-g32.rtn.nvidia"]


@pytest.mark.slow
def test_markdown_has_the_grid(whole: Path) -> None:
    text = (whole / "out" / "index.md").read_text()
    assert text.startswith("✅ **PASSED** `small`: 4 cells: 1 refused, 3 passed\n")
    assert "| `count int8 rtn` | ✅ | ✅ |\n| `count int4-g32 rtn` | ✅ | ➖ |" in text


@pytest.mark.slow
def test_what_would_be_done_is_listed(copied: Path) -> None:
    shutil.rmtree(copied / "out" / NULLS[0])
    done = run(copied, "--list", "--json", status=0)
    rows = {row["cell"]: row for row in json.loads(done.stdout)}
    assert {name: row["do"] for name, row in rows.items()} == {
        NULLS[0]: "make", "count.int8.rtn.nvidia": "stands", NULLS[1]: "stands", "count.int4-g32.rtn.nvidia": "refuse",
    }  # fmt: skip
    assert rows[NULLS[0]]["memory_bytes"] > 1e9
    package = sum(
        path.stat().st_size for path in (copied / "out" / "count.int8.rtn.nvidia" / "artifact").iterdir()
    )
    assert rows["count.int8.rtn.nvidia"]["disk_bytes"] == package
    assert not (copied / "out" / NULLS[0]).exists()


@pytest.mark.slow
def test_the_prediction_of_memory_is_not_below_what_was_held(whole: Path) -> None:
    told = {cell["name"]: cell for cell in json.loads((whole / "out" / "matrix.json").read_text())["cells"]}
    rows = {row["cell"]: row for row in json.loads(run(whole, "--list", "--json", status=0).stdout)}
    for name in MADE:
        assert told[name]["peak_bytes"] < rows[name]["memory_bytes"]


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    begun = time.monotonic()
    while not happened():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() - begun < 120
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_that_was_killed_at_any_point_goes_on_to_the_same_digests(whole: Path, tmp_path: Path) -> None:
    """Killed while codes are made, while a cell is, and between two; each time the same command goes on."""
    (tmp_path / "small.toml").write_text(FILE.replace(', "nvidia"', ""))
    out = tmp_path / "out"
    for happened in (
        lambda: (out / "logs").exists(),
        lambda: (out / f".{NULLS[0]}.partial" / "artifact").exists(),
        lambda: (out / NULLS[0]).exists(),
    ):
        with started(tmp_path) as process:
            wait_for(happened, process)
            process.kill()
    done = run(tmp_path, status=0)  # waits for processes that the one before left
    assert "PASSED  2 cells: ✓ 2 passed" in done.stderr
    expected = digests(whole / "out")
    assert digests(out) == {name: expected[name] for name in NULLS}
    assert [path.name for path in out.iterdir() if path.name.endswith((".partial", ".old"))] == []


def test_one_that_is_stopped_stops_its_processes_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(FILE)
    with started(tmp_path) as process:
        wait_for(lambda: (tmp_path / "out" / f".{NULLS[0]}.partial" / "artifact").exists(), process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert (
        "stopped by SIGINT; nothing half-written was left. The same command goes on where it stopped." in said
    )
    assert "Traceback" not in said
    assert [path.name for path in (tmp_path / "out").glob(".count*")] == []


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("what", ["a file", "the manifest", "the outcome", "the inputs"])
def test_a_cell_that_is_not_whole_is_to_be_made_again(copied: Path, what: str) -> None:
    package, known = copied / "out" / NULLS[1], copied / "out" / "cells" / f"{NULLS[1]}.json"
    if what == "a file":
        (package / "README.md").write_text("edited")
    elif what == "the manifest":
        (package / "tapeout.json").write_text((package / "tapeout.json").read_text()[:-9])
    elif what == "the outcome":
        known.write_text(known.read_text()[:-9])
    else:
        (copied / "small.toml").write_text(FILE.replace("64", "65"))
    rows = json.loads(run(copied, "--list", "--json", "--only", "*.null", status=0).stdout)
    other = "make" if what == "the inputs" else "stands"
    assert {row["cell"]: row["do"] for row in rows} == {NULLS[0]: other, NULLS[1]: "make"}


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("where", ["a directory", "a bucket"])
def test_finished_work_is_taken_from_shared_storage(
    copied: Path, where: str, request: pytest.FixtureRequest
) -> None:
    expected = digests(copied / "out")
    shared = str(copied / "shared")
    if where == "a bucket":
        request.getfixturevalue("s3")
        shared = "s3://shared/work"
    from tapeout.matrix.shared import Storage

    for name in MADE:  # as a run with --cache puts them there
        known = json.loads((copied / "out" / "cells" / f"{name}.json").read_text())
        Storage(shared, []).push_package(known["inputs"], copied / "out" / name)
    shutil.rmtree(copied / "out")
    shutil.rmtree(copied / "cache")
    done = run(copied, "--cache", shared, "--jobs", "2", status=0)
    assert done.stderr.count(f"taken from {shared}.") == 3
    assert "codes count" not in done.stderr
    assert digests(copied / "out") == expected
    assert not (copied / "cache" / "store").exists()
    told = json.loads((copied / "out" / "matrix.json").read_text())
    assert all(not cell["figures"].get("speed", {"alone": False})["alone"] for cell in told["cells"])


@pytest.mark.slow
def test_a_baseline_from_which_nothing_changed_passes_and_one_that_was_better_fails(copied: Path) -> None:
    before = copied / "before.json"
    raw = json.loads((copied / "out" / "matrix.json").read_text())
    for cell in raw["cells"]:
        cell["figures"].pop("speed", None)
    before.write_text(json.dumps(raw))
    done = run(copied, "--baseline", before, status=0)
    assert "none of 6 figures is worse than the baseline allows" in done.stderr
    raw["cells"][0]["figures"]["artifact_bytes"] //= 2
    before.write_text(json.dumps(raw))
    done = run(copied, "--baseline", before, status=1)
    assert "FAILED  4 cells" in done.stderr
    assert f"{NULLS[0]} │ size" in done.stderr
    assert "1%" in done.stderr


def speed_of(out: Path, name: str) -> dict[str, Any]:
    told = json.loads((out / "matrix.json").read_text())["cells"]
    (figures,) = [cell["figures"] for cell in told if cell["name"] == name]
    speed: dict[str, Any] = figures["speed"]
    return speed


@pytest.mark.slow
def test_speeds_are_measured_and_held_against_a_baseline(copied: Path) -> None:
    """Every measurement is real. What decides is no clock: the baseline's figures are a million times those of this machine, or a millionth."""
    name, out, before = NULLS[0], copied / "out", copied / "before.json"
    done = run(copied, "--only", name, "--speed", status=0)
    assert f"passed   speed {name}" in done.stderr
    assert (out / "logs" / f"{name}.speed.log").exists()
    speed = speed_of(out, name)
    assert speed["alone"]
    assert len(speed["samples"]) == 4  # of the export, and three alone
    assert min(speed["samples"]) > 0
    assert speed["value"] == median(speed["samples"])

    def baseline(factor: float, **fields: Any) -> None:
        raw = json.loads((out / "matrix.json").read_text())
        for cell in raw["cells"]:
            if cell["name"] == name:
                samples = [speed["value"] * factor] * 4  # without a spread, which would be granted
                cell["figures"] |= fields
                cell["figures"]["speed"] |= {"samples": samples, "value": samples[0]}
        before.write_text(json.dumps(raw))

    def changes() -> list[dict[str, Any]]:
        found = json.loads((out / "matrix.json").read_text())["changes"]
        return [change for change in found if change["what"] == "speed"]

    # Slower than a baseline by far: measured three times more before it is said, and then said with both figures.
    (copied / "small.toml").write_text(FILE + "[margins]\ntokens_per_s = 0.9\n")
    baseline(1e6)
    done = run(copied, "--only", name, "--baseline", before, status=1)
    assert f"passed   speed {name}" in done.stderr
    assert "FAILED" in done.stderr
    assert "│ speed " in done.stderr
    (change,) = changes()
    assert change["worse"]
    assert change["reason"] == "best of 7 against the median of 3, which spread over 0%"
    assert change["now"] == max(speed_of(out, name)["samples"])
    assert change["before"] == pytest.approx(1e6 * speed["value"])
    # Faster than it: nothing to measure again.
    baseline(1e-6)
    done = run(copied, "--only", name, "--baseline", before, status=0)
    assert "passed   speed" not in done.stderr
    assert len(speed_of(out, name)["samples"]) == 7
    assert [change["worse"] for change in changes()] == [False]
    # Another machine's says nothing.
    baseline(1e6, processor="another")
    run(copied, "--only", name, "--baseline", before, status=0)
    assert "not compared: the baseline is of another" in changes()[0]["reason"]


@pytest.mark.slow
def test_a_speed_that_was_measured_beside_others_does_not_count(copied: Path) -> None:
    """As with --jobs 2: it is measured again, alone, and the figure from before is left out, however fast it was."""
    name, out, before = NULLS[1], copied / "out", copied / "before.json"
    before.write_text((out / "matrix.json").read_text())
    known = out / "cells" / f"{name}.json"
    outcome = json.loads(known.read_text())
    fast = outcome["figures"]["speed"]["value"] * 1e6
    outcome["figures"]["speed"] = {"value": fast, "unit": "tokens/s", "alone": False}
    known.write_text(json.dumps(outcome))
    raw = json.loads(before.read_text())
    for cell in raw["cells"]:
        if cell["name"] == name:
            cell["figures"]["speed"] |= {"value": fast / 2, "samples": [fast / 2]}
    before.write_text(json.dumps(raw))
    done = run(copied, "--only", name, "--baseline", before, status=1)
    assert f"passed   speed {name}" in done.stderr
    speed = speed_of(out, name)
    assert len(speed["samples"]) == 3
    assert max(speed["samples"]) < fast / 2


@pytest.mark.slow
def test_what_others_made_is_collected_and_what_nobody_ran_fails(copied: Path) -> None:
    shutil.rmtree(copied / "cache")
    done = run(copied, "--collect", status=0)
    assert "PASSED  4 cells" in done.stderr
    (copied / "out" / "cells" / f"{MADE[1]}.json").unlink()
    done = run(copied, "--collect", status=1)
    assert f"not run {MADE[1]}: nobody ran it." in done.stderr
    assert "FAILED  4 cells: … 1 not run, – 1 refused, ✓ 2 passed" in done.stderr


@pytest.mark.slow
def test_a_cell_that_fails_is_told_and_the_others_go_on(copied: Path) -> None:
    """Limits that no quantization keeps; the cells are others then, and made again."""
    (copied / "small.toml").write_text(FILE + "[limits]\nkl = 0.0\n")
    done = run(copied, "--only", NULLS[1], status=1)
    assert f"failed   {NULLS[1]}" in done.stderr
    assert "quality/kl failed" in done.stderr
    assert (copied / "out" / NULLS[1] / "report.html").exists()
    text = (copied / "out" / "index.md").read_text()
    assert f"- ❌ `{NULLS[1]}` failed: quality/kl failed" in text
    assert "✅" in text  # the other cells, as the run before left them


def test_a_task_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(FILE)
    done = run(tmp_path, "--memory", "700M", status=0)
    assert "it is predicted to take 1.2 GB of memory, and --memory gives 0.7 GB." in done.stderr
    assert "PASSED  4 cells: – 4 refused" in done.stderr
    assert digests(tmp_path / "out") == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FILE.replace("count", "cuont"), "no model at 'cuont'"),
        (FILE.replace("schemes", "shcemes"), "did you mean 'schemes'?"),
        (FILE + '[[exclude]]\nmodel = "*"\n', "the matrix has no cell"),
    ],
)
def test_a_wrong_file_leaves_nothing(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "small.toml").write_text(text)
    assert message in run(tmp_path, status=2).stderr
    assert not (tmp_path / "out").exists()


def test_a_storage_that_nothing_here_can_open_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(FILE)
    done = run(tmp_path, "--cache", "s4://bucket", status=2)
    assert "--cache s4://bucket cannot be opened: Protocol not known: s4." in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(FILE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of it")
    assert "exists and is no output of a matrix; give another --out" in run(tmp_path, status=2).stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_two_runs_do_not_write_one_output(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr("tapeout.matrix._LEASE_S", 0.1)
    with (copied / "out" / ".matrix.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another tapeout process has been writing" in run(copied, status=2).stderr


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_told_before_any_work(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = cast(Any, shutil.disk_usage(copied))._replace(free=1000)
    shutil.rmtree(copied / "out" / NULLS[0])
    monkeypatch.setattr("tapeout.matrix.shutil.disk_usage", lambda path: usage)
    assert "has 0.0 GB free, and 1 cells take 0.0 GB" in run(copied, status=2).stderr
    assert not (copied / "out" / NULLS[0]).exists()
