"""GGUF's check.cpp on 64-bit Arm: built by Debian's cross compiler against a static llama.cpp, and run under qemu."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from checked import check, kept_llama_cpp, packed

from tapeout.device_report import DeviceReport
from tapeout.models import load
from tapeout.targets import checks

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("transformers")

COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
PROMPTS = ((3, 9, 12, 6, 15, 4, 3), (3, 7, 12, 4, 2, 15, 5, 7), (5,))
LIBRARIES = ("llama", "ggml", "ggml-cpu", "ggml-base")


@pytest.mark.slow
def test_the_arithmetic_package_on_arm(tmp_path: Path) -> None:
    if absent := [name for name in (COMPILER, QEMU) if not shutil.which(name)]:
        pytest.skip(
            f"no {', '.join(absent)} (Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static)"
        )
    built = next(kept_llama_cpp(f"aarch64-{llama_cpp.__version__}-*"), None)
    if built is None:
        pytest.skip("no llama.cpp for aarch64: make test-aarch64 builds it, which takes minutes once")
    package = packed(tmp_path / "package", load("arithmetic"), "cpu", "int4-g32", prompts=PROMPTS)
    program = tmp_path / "check"
    command = [
        COMPILER,
        "-std=c++17",
        "-O1",
        "-static",
        str(checks.place("check.cpp")),
        "-o",
        program,
        f"-I{built}",
    ]
    command += [built / f"lib{name}.a" for name in LIBRARIES]
    subprocess.run([*command, "-lpthread", "-ldl", "-lm"], check=True, capture_output=True)
    assert program.read_bytes()[18:20] == b"\xb7\x00"  # EM_AARCH64 in the ELF header
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # threads that wait for one another are slow under qemu
    try:
        done = check(package.directory, tmp_path, script=(QEMU, program))
    finally:
        os.sched_setaffinity(0, cores)
    assert done.returncode == 0, done.stdout + done.stderr
    report = DeviceReport.read(package.directory / "device_report.json", package)
    assert "NEON = 1" in report.runtime
    gates = {gate.name: gate for each in report.units.values() for gate in each.gates}
    assert {gate.status for gate in gates.values()} == {"passed"}
    for name in ("golden-prefill", "golden-decode"):
        value = gates[name].value
        assert value is not None
        assert 0 < value < 1e-3
    assert report.device.machine
    data = bytearray((package.directory / "artifact" / package.artifact.files[0]).read_bytes())
    data[-1] ^= 1
    (package.directory / "artifact" / package.artifact.files[0]).write_bytes(data)
    again = check(package.directory, tmp_path, script=(QEMU, program))
    assert again.returncode == 1
    assert f"{package.artifact.files[0]} differs from its digest" in again.stdout
