"""The script in each package that checks it on the device, run as a process of its own that has no tapeout."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checked import WINDOW, check, decoder, kept_llama_cpp, packed
from commands import tapeout
from thinned import thinned

import tapeout as api
from tapeout import targets
from tapeout.device_report import DeviceGate, DeviceReport
from tapeout.files import canonical_json
from tapeout.generated import write_model
from tapeout.pack import Package
from tapeout.targets import checks

pytest.importorskip("transformers")

Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]
Found = dict[str, float | None]

DECODER_GATES = {"load", "golden-prefill", "golden-decode", "golden-handover", "prefill-decode"}
NO_NATIVE = "check.cpp needs a C++ compiler and llama.cpp's headers: python scripts/llama_cpp.py"
WEIGHTS = "artifact/model-Q4_0.gguf"


@pytest.fixture(scope="module")
def gguf(once: Once) -> Path:
    pytest.importorskip("llama_cpp")
    return once("checked-gguf", lambda out: decoder(out, "cpu").directory)[1]


@pytest.fixture(scope="module")
def told(once: Once, gguf: Path) -> Path:
    """What ``check.py`` says of it."""

    def run(place: Path) -> Path:
        done = check(gguf, place, "--out", place / "told.json")
        assert done.returncode == 0, done.stdout + done.stderr
        return place / "told.json"

    return once("checked-gguf-told", run)[1]


@pytest.fixture
def copied(gguf: Path, tmp_path: Path) -> Path:
    return Path(
        shutil.copytree(gguf, tmp_path / "copied", ignore=shutil.ignore_patterns("device_report.json"))
    )


def passed(package: Package, work: Path, told: Path | None = None) -> tuple[DeviceReport, Found]:
    """What the script found, which must be that all is well."""
    if told is None:
        done = check(package.directory, work)
        assert done.returncode == 0, done.stdout + done.stderr
    unit, report = "cpu", DeviceReport.read(told or package.directory / "device_report.json", package)
    assert list(report.units) == [unit, "files"]
    assert {gate.status for each in report.units.values() for gate in each.gates} == {"passed"}
    speed = report.units[unit].throughput
    assert speed
    assert 0 < speed.load_s < 100
    assert speed.peak_resident_bytes
    return report, {gate.name: gate.value for gate in report.units[unit].gates}


def small(found: Found, most: float, *names: str) -> None:
    """A device is off by something that is far below the limit: what was compared is not the same twice."""
    for name in names:
        value = found[name]
        assert value is not None
        assert 0 < value < most, (name, value)


def test_gguf(gguf: Path, told: Path, tmp_path: Path) -> None:
    report, found = passed(Package.open(gguf), tmp_path, told)
    assert found.keys() == DECODER_GATES
    small(found, 1e-3, "golden-prefill", "golden-decode", "golden-handover")
    assert report.runtime.startswith("llama.cpp in llama-cpp-python ")
    rows = report.units["cpu"].throughput
    assert rows
    # The usual 16, and instead of 128 and 512 what leaves half of the context to new tokens.
    assert [(row.context, row.samples) for row in rows.contexts] == [(16, 96), (32, 96)]
    (reason,) = [gate.reason for gate in report.units["cpu"].gates if gate.name == "prefill-decode"]
    assert f"past the window of {WINDOW}" in reason


@pytest.mark.parametrize(
    ("flags", "module", "most"),
    thinned(
        [
            ({"kind": "cpu", "format": "onnx"}, "onnxruntime", 1e-3),
            ({"kind": "nvidia", "format": "onnx-trt"}, "onnxruntime", 1e-3),
            ({"kind": "rocm", "format": "migraphx"}, "onnxruntime", 1e-3),
            ({"kind": "rocm", "format": "iree"}, "iree.compiler", 1e-6),
            ({"kind": "rocm", "format": "compressed-tensors"}, "compressed_tensors", 1e-3),
            ({"kind": "rocm", "format": "bitsandbytes", "scheme": "nf4"}, "bitsandbytes", 1e-3),
        ]
    ),
    ids=lambda value: value.get("format") if isinstance(value, dict) else None,
)
def test_decoders(
    flags: dict[str, Any], module: str, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(module)
    # What is compiled for a GPU is not what is run here, and takes seconds.
    monkeypatch.setattr("tapeout.targets.iree_compiler.missing", lambda: "not wanted")
    _, found = passed(decoder(tmp_path, **flags), tmp_path)
    assert found.keys() == DECODER_GATES
    small(found, most, "golden-prefill", "golden-decode", "golden-handover")


def test_encoders(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("llama_cpp")
    model = write_model(tmp_path / "model", "bert", {"num_hidden_layers": 1}, dtype="F32")
    for name in ("gguf", "onnx"):
        package = packed(tmp_path / name, model, "cpu", "int8", format=name)
        report, found = passed(package, tmp_path)
        assert found.keys() == {"load", "golden"}
        small(found, 1e-3, "golden")
        speed = report.units["cpu"].throughput
        assert speed
        assert [(row.batch, row.samples) for row in speed.encodings] == [(1, 20), (1, 20)]


def test_an_encoder_decoder(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = write_model(tmp_path / "model", "t5", {"num_layers": 1, "num_decoder_layers": 1}, dtype="F32")
    report, found = passed(packed(tmp_path / "t5", model, "cpu", "int8", format="onnx"), tmp_path)
    assert found.keys() == {"load", "golden"}
    small(found, 1e-3, "golden")
    speed = report.units["cpu"].throughput
    assert speed
    assert [row.samples for row in speed.contexts] == [96, 96, 96]


def test_a_module(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch = pytest.importorskip("torch")
    layer = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 16)).eval()
    model = api.load_module(layer, (torch.randn(4, 64),))
    report, found = passed(packed(tmp_path / "good", model, "cpu", "int8", format="onnx"), tmp_path)
    assert found.keys() == {"load", "golden"}
    small(found, 1e-3, "golden")
    assert "ms (median of 20)" in report.units["cpu"].gates[1].reason
    spoiled = packed(tmp_path / "bad", model, "cpu", "int8", format="onnx", spoil=9.0)
    assert check(spoiled.directory, tmp_path).returncode == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"kind": "null", "scheme": "int8"}, "No runtime but tapeout itself runs this format: tapeout validate."),
        ({"kind": "nvidia", "scheme": "int8"}, "None of tensorrt_llm, vllm can be imported: pip install tensorrt-llm"),
        ({"kind": "nvidia", "scheme": "int8", "format": "trtllm"}, "There is no engine yet: README.md has the command"),
        ({"kind": "rocm", "scheme": "int4-g32-asym"}, "transformers does not load zero points"),
    ],
    ids=["null", "modelopt", "trtllm", "zero-points"],
)  # fmt: skip
def test_what_cannot_run_here(flags: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Its files are compared all the same."""
    package = decoder(tmp_path, **flags).directory
    done = check(package, tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert f"check: {words}" in done.stderr
    assert "files are as tapeout.json says, root digest" in done.stdout
    assert not (package / "device_report.json").exists()
    (package / "README.md").write_text("x")
    assert check(package, tmp_path).returncode == 1


def test_a_runtime_that_is_not_there(gguf: Path, tmp_path: Path) -> None:
    done = check(gguf, tmp_path, "--out", tmp_path / "told.json", absent=("llama_cpp", "numpy"))
    assert done.returncode == 3, done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("check: llama_cpp and numpy cannot be imported by ")
    assert line.endswith(": pip install llama-cpp-python")
    assert not (tmp_path / "told.json").exists()


@pytest.fixture(scope="module")
def native(once: Once) -> Path | None:
    """``check.cpp`` for this machine, against the llama.cpp that llama-cpp-python has; None: it cannot be built here."""
    llama_cpp = pytest.importorskip("llama_cpp")
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    library = Path(llama_cpp.__file__).parent / "lib"
    headers = next(kept_llama_cpp(f"headers-{llama_cpp.__version__}"), None)
    if not compiler or not headers:
        return None
    source = Path(str(checks.place("check.cpp")))

    def build(out: Path) -> Path:
        command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", source, "-o", out / "check"]
        command += [
            f"-I{headers}",
            f"-L{library}",
            f"-Wl,-rpath,{library}",
            "-lllama",
            "-lggml",
            "-lggml-base",
        ]
        subprocess.run(command, check=True, capture_output=True)
        return out / "check"

    return once("checked-native", build)[1]


@pytest.fixture(params=["check.py", "check.cpp"])
def checker(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Runs either check of a package."""
    script: tuple[Any, ...] = ()
    if request.param == "check.cpp":
        built = request.getfixturevalue("native")
        if built is None:
            pytest.skip(NO_NATIVE)
        script = (built,)
    return lambda package, *arguments: check(package, tmp_path, *arguments, script=script)


@pytest.mark.slow
def test_the_program_finds_the_same(gguf: Path, told: Path, native: Path | None, tmp_path: Path) -> None:
    if native is None:
        pytest.skip(NO_NATIVE)
    done = check(gguf, tmp_path, "--out", tmp_path / "other.json", script=(native,))
    assert done.returncode == 0, done.stdout + done.stderr
    report = DeviceReport.read(tmp_path / "other.json", Package.open(gguf))
    known = DeviceReport.read(told, Package.open(gguf))
    found, expected = (
        {gate.name: gate.value for gate in each.units["cpu"].gates} for each in (report, known)
    )
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert report.device == known.device
    speed = report.units["cpu"].throughput
    assert speed
    assert [row.context for row in speed.contexts] == [16, 32]


def test_a_wrong_golden_logit(checker: Any, tmp_path: Path) -> None:
    package = decoder(tmp_path, "cpu", spoil=9.0)
    done = checker(package.directory)
    assert done.returncode == 1, done.stdout + done.stderr
    report = DeviceReport.read(package.directory / "device_report.json", package)
    failed = {gate.name for gate in report.units["cpu"].gates if gate.status == "failed"}
    # The one that is wrong is a single token, which has no half.
    assert failed == {"golden-prefill", "golden-decode"}
    assert "FAILED: " in done.stdout


def changed(package: Path, name: str, at: int) -> None:
    data = bytearray((package / name).read_bytes())
    data[at] ^= 1
    (package / name).write_bytes(data)


def edited(package: Path, **fields: Any) -> None:
    path = package / "tapeout.json"
    path.write_text(canonical_json(json.loads(path.read_text()) | fields))


def misled(package: Path, name: str) -> None:
    """The manifest names a file elsewhere, with its right digest."""
    manifest = json.loads((package / "tapeout.json").read_text())
    (package.parent / "else").write_bytes((package / "README.md").read_bytes())
    edited(package, beside=manifest["beside"] | {name.format(package.parent): manifest["files"]["README.md"]})


def linked(package: Path) -> None:
    """The same by a link in a file's place."""
    (package / "README.md").rename(package.parent / "else")
    (package / "README.md").symlink_to(package.parent / "else")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: changed(p, WEIGHTS, -1), f"{WEIGHTS} differs from its digest"),
        (lambda p: changed(p, "golden.safetensors", -1), "golden.safetensors differs from its digest"),
        (lambda p: (p / WEIGHTS).write_bytes(b"GGUF"), f"{WEIGHTS} has 4 bytes instead of"),
        (lambda p: (p / "golden.safetensors").unlink(), "golden.safetensors is missing"),
        (lambda p: edited(p, scheme="int8"), "tapeout.json differs from its root digest"),
        (lambda p: misled(p, "../else"), "'../else' leads out of the package"),
        (lambda p: misled(p, "{}/else"), "/else' leads out of the package"),
        (linked, "'README.md' leads out of the package"),
    ],
    ids=["weight", "golden", "cut", "missing", "manifest", "parent", "absolute", "link"],
)  # fmt: skip
def test_a_package_that_is_not_whole(
    copied: Path, checker: Any, damage: Callable[[Path], Any], words: str
) -> None:
    damage(copied)
    done = checker(copied)
    assert done.returncode == 1, done.stdout + done.stderr
    assert words in done.stdout
    assert "Nothing was run." in done.stdout
    # Of a package that leads out of its folder tapeout opens nothing, so that nothing is merged either.
    units = json.loads((copied / "device_report.json").read_text())["units"]
    (gate,) = units["files"]["gates"]
    assert (gate["name"], gate["status"], list(units)) == ("integrity", "failed", ["files"])
    assert words in gate["reason"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: edited(p, format_version=2), "newer format|has format_version 2; this script reads up to 1"),
        (lambda p: edited(p, artifact={"format": "onnx"}), "holds an artifact of format onnx"),
        (lambda p: edited(p, files=[]), "cannot be read as a manifest"),
        (lambda p: (p / "tapeout.json").write_text('{"format_'), "cannot be read as a manifest"),
        (lambda p: (p / "tapeout.json").write_text("[" * 100_000), "cannot be read as a manifest"),
        (lambda p: (p / "tapeout.json").unlink(), "is not a package: it has no tapeout.json"),
    ],
    ids=["newer", "onnx", "no-files", "half", "deep", "none"],
)  # fmt: skip
def test_what_is_no_package(copied: Path, checker: Any, damage: Callable[[Path], Any], words: str) -> None:
    damage(copied)
    done = checker(copied)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("check: ")
    assert any(each in line for each in words.split("|"))
    assert not (copied / "device_report.json").exists()


def test_a_report_that_cannot_be_written(gguf: Path, checker: Any, tmp_path: Path) -> None:
    done = checker(gguf, "--out", tmp_path / "none" / "told.json")
    assert done.returncode == 2
    assert "told.json cannot be written" in done.stderr


def test_it_becomes_part_of_the_packages_report(copied: Path, told: Path, tmp_path: Path) -> None:
    gguf, out = copied, tmp_path / "out"
    shutil.copy(told, copied / "device_report.json")
    assert tapeout("verify", gguf, status=0)  # a device's report beside it is no damage
    done = tapeout("validate", gguf, "--device-report", told, "--report", out, "--json", status=0)
    report = json.loads(done.stdout)
    gates = {gate["name"]: gate["status"] for gate in report["gates"]}
    assert {name for name in gates if name.startswith("device/cpu/")} == {
        f"device/cpu/{name}" for name in DECODER_GATES
    }
    assert gates["device/files/integrity"] == "passed"
    assert report["device"]["units"]["cpu"]["contexts"]


def test_a_runtimes_words_fit_into_a_report() -> None:
    """Colours of a terminal, line breaks, and pages of them; what a report refuses of others."""
    script: dict[str, Any] = {"__name__": "check"}
    exec(checks.script(()), script)
    told = script["failure"]("load", "\x1b[31merror\r\n\x9b" + "at 0x7f\n" * 1000)
    gate = DeviceGate.model_validate(told)
    assert gate.reason.startswith(" [31merror   at 0x7f at")


def test_the_script_is_covered_by_the_root_digest(gguf: Path, tmp_path: Path) -> None:
    package = Package.open(gguf)
    assert {"check.py", "check.cpp"} <= package.manifest["files"].keys()
    assert (gguf / "check.py").read_text() == checks.script(("gguf.py",))
    assert "python3 check.py" in (gguf / "README.md").read_text()
    assert decoder(tmp_path, "cpu").manifest["files"] == package.manifest["files"]


def parts() -> set[tuple[str, ...]]:
    """Of every target and format."""
    found = {
        tuple(name for name in getattr(each, "checks", ()) if name.endswith(".py"))
        for name in targets.names()
        for each in targets.variants(name).values()
    }
    assert len(found) == 11
    return found


@pytest.mark.parametrize("names", sorted(parts()), ids=lambda names: names[-1] if names else "nothing")
def test_it_is_python_3_9_and_alone(names: tuple[str, ...]) -> None:
    text = checks.script(names)
    tree = ast.parse(text, feature_version=(3, 9))
    imported = {
        (alias.name if isinstance(node, ast.Import) else str(node.module)).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    runtimes = {
        "bitsandbytes",
        "coremltools",
        "iree",
        "llama_cpp",
        "numpy",
        "onnxruntime",
        "tensorrt",
        "tensorrt_llm",
        "torch",
    }
    assert imported - runtimes - {"transformers", "vllm"} <= sys.stdlib_module_names
    at_the_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names_ = {
        alias.name.split(".")[0]
        for node in at_the_top
        for alias in node.names
        if isinstance(node, ast.Import)
    }
    assert names_ <= sys.stdlib_module_names
    # Nothing is said of it twice, and nothing is left of what joins the parts.
    defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert len(defined) == len(set(defined))
    assert "check.common" not in text
    assert sum(line.startswith("RUNTIME") for line in text.splitlines()) == 1
    assert "{install}" not in text
