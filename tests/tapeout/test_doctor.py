"""What doctor says of machines that lack something: distributions on ``sys.path`` that are made here, with metadata as pip writes it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import pytest
from commands import process, tapeout
from packaging.specifiers import SpecifierSet

from tapeout import doctor, installed, targets
from tapeout.doctor import Finding, diagnose
from tapeout.errors import TapeoutError

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """``make("numpy", "1.26.4", requires=["x<2"], files={"numpy/__init__.py": ""})`` puts a distribution before all others."""

    def write(
        name: str,
        version: str,
        *,
        requires: list[str] | None = None,
        files: Mapping[str, str] | None = None,
        where: str = "fake",
    ) -> Path:
        site = tmp_path / where
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text(
            "\n".join([*lines, *(f"Requires-Dist: {each}" for each in requires or ())])
        )
        record = [f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]
        for path, text in (files or {}).items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
            record.append(f"{path},,")
        (info / "RECORD").write_text("\n".join(record))
        monkeypatch.syspath_prepend(str(site))
        return site

    return write


@pytest.fixture
def _without_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is imported has tests of its own, and torch takes seconds."""
    monkeypatch.setattr(installed, "broken_imports", lambda names: {})


def of(findings: tuple[Finding, ...], area: str, name: str) -> list[Finding]:
    return [each for each in findings if (each.area, each.name) == (area, name)]


def test_wanted_is_what_the_metadata_says() -> None:
    wanted = installed.wanted()
    assert wanted["numpy"].extras == ("",)
    assert {"cpu", "onnx", "nvidia", "rocm", "reference"} <= set(
        wanted["torch"].extras
    )  # through tapeout[reference]
    assert wanted["onnxruntime"].extras == ("onnx", "nvidia")  # nvidia asks for tapeout[onnx]
    assert installed.fits("1.32.0", wanted["onnxruntime"].range)
    assert not installed.fits("1.31.9", wanted["onnxruntime"].range)
    assert "tapeout" not in wanted
    text = "\n".join(metadata.requires("tapeout") or ())
    assert all(each.name.lower() in text.lower().replace("_", "-") for each in wanted.values())


@pytest.mark.parametrize(
    ("found", "fits"),
    [("2.13.0+cpu", True), ("2.14.0rc1", True), ("3.0", False), ("2.10.9", False), ("unknown", False)],
)
def test_versions_that_fit(found: str, fits: bool) -> None:
    assert installed.fits(found, SpecifierSet(">=2.11,<3")) is fits


@pytest.mark.usefixtures("_without_imports")
def test_a_machine_where_all_is_well() -> None:
    found = diagnose("null")
    assert found.works == {"null": True}
    assert found.healthy
    assert {each.state for each in found.findings if each.area in ("python", "package", "target")} == {"ok"}
    (numpy,) = of(found.findings, "package", "numpy")
    assert numpy.found == metadata.version("numpy")
    assert {each.name for each in found.findings if each.area == "machine"} == {
        "system",
        "memory",
        "GPU",
        "cache",
    }


@pytest.mark.usefixtures("_without_imports")
def test_a_version_out_of_range(make: Make) -> None:
    make("gguf", "0.10.0")
    found = diagnose()
    ranged, copied = of(found.findings, "package", "gguf")
    assert (ranged.state, ranged.found, ranged.mend) == ("conflict", "0.10.0", "pip install 'gguf<1,>=0.19'")
    assert "2 copies: 0.10.0 in" in copied.found
    assert not found.works["cpu"]
    assert not found.works["mobile"]
    assert found.works["nvidia"], "gguf is no matter of NVIDIA's"
    assert found.healthy, "another target works"
    (cpu,) = of(found.findings, "target", "cpu")
    assert cpu.state == "conflict"
    assert "gguf" in cpu.found


def test_two_copies(make: Make) -> None:
    one, other = make("orphan", "2.0", where="a"), make("orphan", "1.0", where="b")
    assert installed.copies("orphan") == [("1.0", other), ("2.0", one)]
    sys.path.insert(0, str(one))  # a folder that stands there twice holds no second copy
    assert len(installed.copies("orphan")) == 2
    assert len(installed.copies("numpy")) == 1


@pytest.mark.usefixtures("_without_imports")
def test_two_distributions_of_one_module(make: Make) -> None:
    make("onnxruntime-gpu", "1.32.0", files={"onnxruntime/__init__.py": "", "onnxruntime_gpu/notes.txt": ""})
    assert installed.rivals(["onnxruntime"]) == {"onnxruntime": ["onnxruntime", "onnxruntime-gpu"]}
    found = diagnose("cpu --format onnx")
    (clash,) = [each for each in of(found.findings, "package", "onnxruntime") if each.state == "conflict"]
    wanted = installed.wanted()["onnxruntime"].requirement
    assert clash.mend == f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install '{wanted}'"
    assert not found.healthy


def test_parts_of_one_namespace_are_no_rivals(make: Make) -> None:
    make("one-half", "1", files={"shared/one/__init__.py": ""}, where="a")
    make("other-half", "1", files={"shared/other/__init__.py": ""}, where="b")
    assert installed.rivals(["one-half", "other-half"]) == {}
    assert installed.modules("one-half") == ["shared.one"]


@pytest.mark.usefixtures("_without_imports")
def test_a_package_that_wants_another_numpy(make: Make) -> None:
    make("ray", "2.60.0", requires=["numpy<2", "numpy>99; extra == 'never'"])
    found = diagnose()
    clash = next(each for each in of(found.findings, "package", "ray") if " wants numpy" in each.found)
    assert clash.found == f"ray 2.60.0 wants numpy<2; {metadata.version('numpy')} is here"
    assert not clash.breaks
    assert found.works["null"]


def test_what_cannot_be_imported(make: Make) -> None:
    make("whole", "1", files={"whole/__init__.py": "print('hello')"}, where="a")
    make("torn", "1", files={"torn/__init__.py": "import whole, no_such_module"}, where="b")
    make("deadly", "1", files={"deadly/__init__.py": "import os; os.abort()"}, where="c")
    make("quits", "1", files={"quits/__init__.py": "import os; os._exit(7)"}, where="d")
    old = "raise ImportError('numpy.core.multiarray failed to import')"
    make("old-abi", "1", files={"old_abi/__init__.py": old}, where="e")
    # Fails beside another one only, as libraries that register the same name do: it is not at fault.
    shy = "import sys\nassert 'whole' not in sys.modules"
    make("shy", "1", files={"shy/__init__.py": shy}, where="f")
    assert installed.broken_imports(["whole", "torn", "deadly", "quits", "old-abi", "shy"]) == {
        "torn": "it cannot be imported (ModuleNotFoundError: No module named 'no_such_module')",
        "deadly": "importing it ends the process (SIGABRT)",
        "quits": "importing it ends the process (exit status 7)",
        "old-abi": "it was compiled for another ABI of numpy (ImportError: numpy.core.multiarray failed to import)",
    }


@pytest.mark.slow
def test_an_import_that_does_not_end(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    make("endless", "1", files={"endless/__init__.py": "import time; time.sleep(60)"})
    monkeypatch.setattr(installed, "_PATIENCE_S", 1.0)
    assert installed.broken_imports(["endless"]) == {"endless": "importing it takes more than 1 s"}


@pytest.mark.usefixtures("_without_imports")
def test_torch_for_cuda_without_a_driver(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("NVIDIA's driver is on this machine")
    version = metadata.version("torch")
    text = "from typing import Optional\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
    make("torch", version, files={"torch/version.py": text})
    monkeypatch.setenv("PATH", str(tmp_path))
    (clash,) = [
        each for each in of(diagnose("null").findings, "package", "torch") if "CUDA 13.0" in each.found
    ]
    assert not clash.breaks, "torch computes on the CPU all the same"

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB, 580.95'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    findings = diagnose("null").findings
    assert not [each for each in of(findings, "package", "torch") if "CUDA" in each.found]
    assert of(findings, "machine", "GPU")[0].found == "NVIDIA H100 80GB HBM3, 81559 MiB, 580.95"


@pytest.mark.usefixtures("_without_imports")
def test_a_runtime_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # Python's own word for: it cannot be imported
    found = diagnose("cpu")
    (cpu,) = of(found.findings, "target", "cpu")
    assert (cpu.state, cpu.found) == ("missing", targets.get("cpu")().missing())
    assert cpu.mend == "pip install 'tapeout[cpu]'"
    assert not found.healthy


@pytest.mark.usefixtures("_without_imports")
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    monkeypatch.setenv("TAPEOUT_CACHE", str(tmp_path / "no"))
    found = diagnose("null")
    assert "TAPEOUT_CACHE" in of(found.findings, "machine", "cache")[0].mend
    assert not found.healthy


def test_the_store_is_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPEOUT_CACHE", str(tmp_path))
    (tmp_path / "store" / "a").mkdir(parents=True)
    with (tmp_path / "store" / "a" / "x.safetensors").open("wb") as file:
        file.truncate(2_500_000_000)
    assert "stores of 2.5 GB in" in doctor._cache().found


def test_tools_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("trtllm-build", "clang"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {each.name: each for each in doctor._tools("nvidia")}
    assert set(found) == {"gcc", "cmake", "trtllm-build", "trtexec"}
    assert found["trtllm-build"].found == str(tmp_path / "trtllm-build")
    assert found["gcc"].found == str(tmp_path / "clang")
    assert found["trtexec"].state == "missing"
    assert found["trtexec"].mend


def test_each_way_has_an_extra_that_exists() -> None:
    extras = {way: doctor._extra(way) for name in targets.names() for way in targets.variants(name)}
    assert set(extras.values()) <= set(installed.extras())
    assert extras["cpu"] == "cpu"
    assert extras["cpu --format onnx"] == "onnx"
    assert extras["null"] == "reference"
    assert {way.split()[0] for way, extra in extras.items() if extra == "reference"} == {"null"}


def test_an_unknown_target() -> None:
    with pytest.raises(TapeoutError, match=r"'cpuu' is not an installed target; did you mean 'cpu'\?"):
        diagnose("cpuu")


@pytest.mark.slow
def test_the_command(make: Make) -> None:
    """In processes of their own, with real imports: exit status, one document, and the commands that mend."""
    done = process("doctor", "--target", "null", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert said["works"] == {"null": True}
    assert said["format_version"] == 1
    assert said["not_probed"]

    site = make("transformers", "4.0.0", files={"transformers/__init__.py": "raise RuntimeError('no')"})
    done = process("doctor", "--target", "null", env={"PYTHONPATH": str(site), "COLUMNS": "200"})
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert "transformers: pip install 'transformers<6,>=5.20'" in done.stderr
    assert "it cannot be imported (RuntimeError: no)" in done.stderr
    assert "works here: none" in done.stderr


@pytest.mark.usefixtures("_without_imports")
def test_what_people_see() -> None:
    done = tapeout("doctor", COLUMNS="100", status=0)
    assert "works here: apple, cpu" in done.stderr
    assert "not looked at: the network" in done.stderr
    assert max(map(len, done.stderr.split("works here")[0].split("optional")[0].splitlines())) <= 100
