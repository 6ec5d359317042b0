"""The script that checks a package on a Mac, run as a process of its own.

macOS is played by a ``sitecustomize``, Core ML by a small ``coremltools`` whose models run the interpreter in float16.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from tapeout.device_report import DeviceReport
from tapeout.exporters import coreml
from tapeout.exporters.coreml import program
from tapeout.files import canonical_json
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.pack import Package, pack
from tapeout.quantize import quantize
from tapeout.recipe import Recipe
from tapeout.targets.apple import Apple
from tapeout.targets.null import Null
from tapeout.validate import GateResult, Report, mil

pytestmark = pytest.mark.slow
pytest.importorskip("coremltools")

Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]
COREMLTOOLS = Path(__file__).parents[1] / "support" / "mac" / "coremltools"
CONTEXT, CHUNK, WINDOW = 64, 8, 24
DECODER_GATES = ["load", "golden-prefill", "golden-decode", "golden-handover", "prefill-decode"]

MACOS = """
import platform, sys
platform.system = lambda: "Darwin"
platform.mac_ver = lambda: ("15.1", ("", "", ""), "arm64")
"""
BARE = "sys.path = [path for path in sys.path if 'site-packages' not in path]\n"
SYSCTL = """#!/bin/sh
case "$2" in hw.model) echo Mac14,6;; hw.memsize) echo 68719476736;; machdep.cpu.brand_string) echo Apple M2 Max;; *) exit 1;; esac
"""


@dataclass(frozen=True)
class Stand(Null):
    """As much of a target as ``pack`` asks."""

    name: ClassVar[str] = "apple"
    checks: ClassVar[tuple[str, ...]] = Apple.checks


def make_package(out: Path, model_type: str, spoil: float = 0.0, chunks: int = 1, **config: Any) -> Package:
    """A package as the target makes it, with golden logits from the program in float64; ``spoil`` is added to one of them."""
    model = load(
        write_model(out / "model", model_type, config | {"max_position_embeddings": CONTEXT}, dtype="F32")
    )
    quant = quantize(model, "int4-g32")
    options = coreml.Options(prefill_chunk=CHUNK, chunks=chunks)
    artifact = coreml.write(quant, out / "package" / "artifact", options)
    machines = [
        mil.Machine(mil.load(path), exact_states=True) for path in coreml.packages_in(artifact.directory)
    ]
    golden = []
    for ids in ([7, 200, 31, 4, 99, 5, 18, 250, 3, 3, 61], [12, 77, 140, 9, 200], [44]):
        inputs = {"inputIds": np.int32([ids])}
        if model_type == "bert":
            row = machines[0].run("main", inputs | {"attentionMask": np.ones((1, len(ids)), np.int32)})
        else:
            states = [machine.new_state() for machine in machines]
            for at, token in enumerate(ids):
                name, value = "inputIds", np.int32([[token]])
                mask = np.zeros((1, 1, 1, at + 1), np.float16)
                for machine, state in zip(machines, states, strict=True):
                    row = machine.run("decode", {name: value, "fullAttentionMask": mask}, state)
                    name, (value,) = "hiddenStates", row.values()
        (values,) = row.values()
        golden.append((tuple(ids), values.reshape(-1, values.shape[-1])[0].astype(np.float32)))
    golden[1][1][3] += spoil
    gate = GateResult("lowering/runtime", "passed", "mean KL, nats", 1e-6, 5e-5, "as in the report")
    report = Report(model.name, "apple", "int4-g32", (gate,), golden=tuple(golden))
    return pack(artifact, report, quant, Stand(), Recipe().kept(quant))


@pytest.fixture(scope="module")
def decoder(once: Once) -> Path:
    place, _ = once("mac-decoder", lambda out: make_package(out, "mistral", sliding_window=WINDOW))
    return place / "package"


@pytest.fixture
def copied(decoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(decoder, tmp_path / "copied"))


def verify(
    package: Path, work: Path, *arguments: str | Path, macos: str = MACOS, fault: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the package's own script on a Mac that is none."""
    stage = work / "stage"
    stage.mkdir(exist_ok=True)
    (stage / "sitecustomize.py").write_text(macos)
    if BARE not in macos:
        shutil.copytree(COREMLTOOLS, stage / "coremltools", dirs_exist_ok=True)
    else:
        shutil.rmtree(stage / "coremltools", ignore_errors=True)
    (stage / "sysctl").write_text(SYSCTL)
    (stage / "sysctl").chmod(0o755)
    environment = os.environ | {
        "PYTHONPATH": str(stage),
        "PATH": f"{stage}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "FAULT": fault,
    }
    command = [sys.executable, package / "check.py", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def gates(report: DeviceReport, unit: str) -> dict[str, str]:
    return {gate.name: gate.status for gate in report.units[unit].gates}


def reasons(report: DeviceReport, unit: str) -> dict[str, str]:
    return {gate.name: gate.reason for gate in report.units[unit].gates}


@pytest.fixture(scope="module")
def ran(once: Once, decoder: Path) -> tuple[subprocess.CompletedProcess[str], DeviceReport]:
    """One run in which nothing goes wrong."""

    def run(place: Path) -> Any:
        return verify(decoder, place, "--units", "CPU_ONLY", "cpu-and-gpu", "--out", place / "told.json")

    place, done = once("mac-ran", run)
    return done, DeviceReport.read(place / "told.json", Package.open(decoder))


def test_a_whole_package_passes_on_every_unit(
    ran: tuple[subprocess.CompletedProcess[str], DeviceReport],
) -> None:
    done, report = ran
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(report.units) == ["cpu-and-gpu", "cpu-only", "files"]
    for unit in ("cpu-and-gpu", "cpu-only"):
        assert gates(report, unit) == dict.fromkeys(DECODER_GATES, "passed")
    assert (report.device.chip, report.device.system) == ("Apple M2 Max", "macOS 15.1")
    assert (report.device.machine, report.device.memory_bytes) == ("Mac14,6", 64 << 30)
    assert report.runtime == "coremltools 9.0"


def test_what_is_compared_is_not_the_same_twice(
    ran: tuple[subprocess.CompletedProcess[str], DeviceReport],
) -> None:
    _, report = ran
    found = {gate.name: gate for gate in report.units["cpu-only"].gates}
    for name in DECODER_GATES[1:]:
        value, limit = found[name].value, found[name].limit
        assert value is not None
        assert limit is not None
        # Float16 against float64, or in another order, is off by something, and by far less than the floor of the limit.
        assert 0 < value < 1e-4, name
        assert limit == (4e-3 if name == "prefill-decode" else 2e-3), name
    assert f"last 32 of {WINDOW + 32} tokens, prefill in chunks of {CHUNK}" in found["prefill-decode"].reason
    assert f"past the window of {WINDOW}" in found["prefill-decode"].reason
    assert "3 prompts" in found["golden-prefill"].reason
    assert "2 prompts" in found["golden-handover"].reason  # one has one token


def test_speed_is_told_for_each_unit(ran: tuple[subprocess.CompletedProcess[str], DeviceReport]) -> None:
    done, report = ran
    for name, unit in report.units.items():
        if name == "files":
            continue
        assert unit.throughput
        # The usual 16, and instead of 128 and 512 what leaves half of the context to new tokens.
        assert [row.context for row in unit.throughput.contexts] == [16, 32]
        for row in unit.throughput.contexts:
            assert row.samples == 3 * min(32, CONTEXT - row.context)
            assert 0 < row.token_p50_s <= row.token_p90_s <= row.token_p99_s
            assert row.decode_tokens_per_s == pytest.approx(1 / row.token_p50_s)
            assert row.first_token_s == pytest.approx(
                row.context / row.prefill_tokens_per_s + row.token_p50_s
            )
    assert re.search(
        r"cpu-only +context +32: prefill [\d.]+ tokens/s, decode [\d.]+ tokens/s \(.* ms\), load", done.stdout
    )


def test_the_report_becomes_part_of_the_packages(
    decoder: Path, ran: tuple[subprocess.CompletedProcess[str], DeviceReport], tmp_path: Path
) -> None:
    merged = ran[1].merged(Report.read(decoder / "report.json"))
    assert merged.passed
    assert [gate.name for gate in merged.gates][:2] == ["lowering/runtime", "device/cpu-and-gpu/load"]
    merged.write(tmp_path)
    assert Report.read(tmp_path / "report.json").to_json() == json.loads(
        (tmp_path / "report.json").read_text()
    )


def test_each_unit_answers_for_itself(decoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "told.json"
    done = verify(
        decoder,
        tmp_path,
        "--units",
        "cpu-and-ne",
        "cpu-only",
        "--out",
        out,
        "--contexts",
        "5",
        fault="load CPU_AND_NE",
    )
    assert done.returncode == 1
    report = DeviceReport.read(out, Package.open(decoder))
    assert gates(report, "cpu-and-ne") == {"load": "failed"}
    assert "it does not load and run: RuntimeWarning" in reasons(report, "cpu-and-ne")["load"]
    assert reasons(report, "cpu-and-ne")["load"].endswith("message was: no plan")
    assert gates(report, "cpu-only") == dict.fromkeys(DECODER_GATES, "passed")
    speed = report.units["cpu-only"].throughput
    assert speed
    assert [row.context for row in speed.contexts] == [5]
    assert report.units["cpu-and-ne"].throughput is None


@pytest.mark.parametrize(
    ("fault", "failed", "words"),
    [
        ("abort", {"process"}, "the process ended by SIGABRT while loading"),
        ("owner", {"golden-handover"}, "decode does not go on with a state that prefill made: the state is"),
        ("fresh", {"golden-handover"}, "prefill, then decode, 2 prompts"),
        ("noise", set(DECODER_GATES[1:4]), "top-1 equal on"),
        ("nan", set(DECODER_GATES[1:]), "the device gives NaN or infinite values"),
    ],
)
def test_what_goes_wrong_on_a_unit(
    decoder: Path, tmp_path: Path, fault: str, failed: set[str], words: str
) -> None:
    out = tmp_path / "told.json"
    arguments = ("--units", "all", "--contexts", "4", "--out", out)
    done = verify(decoder, tmp_path, *arguments, fault=f"{fault} ALL")
    assert done.returncode == 1, done.stdout
    report = DeviceReport.read(out, Package.open(decoder))
    found = {name for name, status in gates(report, "all").items() if status == "failed"}
    # Noise is another one on each road, too.
    assert failed == found - {"prefill-decode"} if fault == "noise" else failed == found
    assert any(words in reason for reason in reasons(report, "all").values()), reasons(report, "all")
    if fault == "owner":  # and the speed is measured all the same
        speed = report.units["all"].throughput
        assert speed
        assert [row.context for row in speed.contexts] == [4]
        assert gates(report, "all")["golden-decode"] == "passed"


def test_a_model_that_was_cut(tmp_path: Path) -> None:
    """Every package in turn, each with its own state, past the window."""
    cut = {"num_hidden_layers": 3, "sliding_window": WINDOW}
    package = make_package(tmp_path, "mistral", chunks=3, **cut).directory
    done = verify(package, tmp_path, "--units", "cpu-only", "--contexts", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    report = DeviceReport.read(package / "device_report.json", Package.open(package))
    assert gates(report, "cpu-only") == dict.fromkeys(DECODER_GATES, "passed")
    for gate in report.units["cpu-only"].gates[1:]:
        assert gate.value is not None
        assert 0 < gate.value < 1e-4
    assert f"past the window of {WINDOW}" in reasons(report, "cpu-only")["prefill-decode"]
    shutil.rmtree(package / "artifact" / "model_2_of_3.mlpackage")
    said = verify(package, tmp_path)
    assert said.returncode == 1
    assert "artifact/model_2_of_3.mlpackage/Manifest.json is missing" in said.stdout


def test_a_wrong_golden_logit(tmp_path: Path) -> None:
    package = make_package(tmp_path, "llama", spoil=9.0, num_hidden_layers=1).directory
    done = verify(package, tmp_path, "--units", "cpu-only", "--contexts", "4")
    assert done.returncode == 1
    report = DeviceReport.read(package / "device_report.json", Package.open(package))
    assert gates(report, "cpu-only") == {
        "load": "passed",
        **dict.fromkeys(DECODER_GATES[1:4], "failed"),
        "prefill-decode": "passed",
    }
    assert re.search(r"cpu-only +golden-prefill +failed +[\d.]+ +0.002", done.stdout)
    assert "FAILED: " in done.stdout
    assert Package.open(package).damage() == []  # its own report beside it is no damage


def test_an_encoder(tmp_path: Path) -> None:
    package = make_package(tmp_path, "bert", num_hidden_layers=1).directory
    done = verify(package, tmp_path, "--units", "all")
    assert done.returncode == 0, done.stdout + done.stderr
    report = DeviceReport.read(package / "device_report.json", Package.open(package))
    (load_, golden) = report.units["all"].gates
    assert (load_.name, golden.name, golden.metric) == ("load", "golden", "mean of 1 - cosine")
    assert golden.value is not None
    assert 0 < abs(golden.value) < 1e-4
    speed = report.units["all"].throughput
    assert speed
    assert [(row.batch, row.context, row.samples) for row in speed.encodings] == [(1, 16, 20), (1, 64, 20)]
    assert "1 × 16 tokens" in done.stdout


def stopped(done: subprocess.CompletedProcess[str], status: int) -> str:
    """What the script says that stops."""
    assert done.returncode == status, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("check: ")
    return line


def flip(package: Path) -> None:
    path = package / "artifact" / program.PACKAGE / program.WEIGHTS
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(package: Path, **fields: Any) -> None:
    path = package / "tapeout.json"
    path.write_text(canonical_json(json.loads(path.read_text()) | fields))


def test_a_package_that_is_not_whole(copied: Path, tmp_path: Path) -> None:
    flip(copied)
    done = verify(copied, tmp_path)
    assert done.returncode == 1
    weights = "artifact/model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert f"{weights} differs from its digest. Nothing was run." in done.stdout
    report = DeviceReport.read(copied / "device_report.json", Package.open(copied))
    assert list(report.units) == ["files"]
    edit(copied, artifact={"format": "gguf"})
    assert "holds an artifact of format gguf" in stopped(verify(copied, tmp_path), 2)


def test_where_nothing_can_run(copied: Path, tmp_path: Path) -> None:
    linux = verify(copied, tmp_path, macos="")
    assert "Core ML runs on macOS only, and this is" in stopped(linux, 3)
    assert "Its files were checked, nothing was run" in linux.stderr
    digest = Package.open(copied).manifest["root_sha256"]
    assert f"files are as tapeout.json says, root digest {digest}" in linux.stdout
    bare = verify(copied, tmp_path, macos=MACOS + BARE)
    assert "coremltools and numpy cannot be imported by" in stopped(bare, 3)
    assert "pip install coremltools numpy" in bare.stderr
    assert not (copied / "device_report.json").exists()
    flip(copied)
    assert "differs from its digest" in verify(copied, tmp_path, macos="").stdout


def test_what_cannot_be_asked_for(copied: Path, tmp_path: Path) -> None:
    done = verify(copied, tmp_path, "--units", "gpu")
    assert done.returncode == 2
    assert "'gpu' is not one of all, cpu-and-gpu, cpu-and-ne, cpu-only" in done.stderr
