"""Models of no family that has a file here, as packages: every gate that such a model can have, and who made the graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from safetensors.numpy import load_file

import tapeout
from tapeout import environments, replay
from tapeout.bench import bench
from tapeout.errors import MissingToolchain, ModelError, TapeoutError
from tapeout.models import Checkpoint, load, optimum
from tapeout.pack import Package
from tapeout.quantize import quantize
from tapeout.recipe import Recipe
from tapeout.targets.cpu import Cpu
from tapeout.validate import Options, Report, validate

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")
pytestmark = pytest.mark.slow  # of torch.onnx and optimum, that make the graphs

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "exporters" / "data" / "optimum"
TARGET = Cpu(format="onnx", threads=1)
LOOSE = {"limits": {"kl": 1e3, "top1": 0.0, "perplexity": 1e3}}  # the models are random


def status(report: Report) -> dict[str, str]:
    return {gate.name: gate.status for gate in report.gates}


def assert_schema(report: Report) -> None:
    schema = json.loads((ROOT / "validate" / "data" / "report.schema.json").read_text())
    jsonschema.validate(report.to_json(), schema)


@pytest.fixture(scope="module")
def module_package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Package, Report]]:
    out = tmp_path_factory.mktemp("module") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPEOUT_CACHE", str(out.parent / "cache"))
        recipe = Recipe.of({"scheme": "int4-g32"})
        yield tapeout.export(TARGET, f"{ROOT}/examples/block_sparse.py:make", out, recipe)


def test_a_module_is_proven(module_package: tuple[Package, Report]) -> None:
    package, report = module_package
    assert report.passed
    assert status(report) == {
        "integrity": "passed", "codes": "passed", "lowering/weights": "passed", "lowering/runtime": "passed", "quality/error": "passed",
        "decode": "skipped", "tokenizer": "skipped", "task": "skipped",
    }  # fmt: skip
    found = {gate.name: gate for gate in report.gates}
    assert all(found[name].reason.startswith("a plain module") for name in ("decode", "tokenizer", "task"))
    # MLAS rounds inputs, and the reference that rounds them alike says by how much.
    assert 1e-6 < (found["lowering/runtime"].value or 0) < (found["lowering/runtime"].limit or 0) < 1e-3
    assert 1e-4 < (found["quality/error"].value or 0) < 0.2
    assert report.graph == package.graph == package.manifest["graph"] == "torch.export"
    assert "made by **torch.export**" in (package.directory / "README.md").read_text()
    assert "The graph was made by torch.export." in (package.directory / "report.html").read_text()
    assert report.throughput["runs"][0]["samples"] == 20
    layers = report.findings["layers"]
    assert layers["samples"] == 3
    assert all(1e-4 < each["error"] < 1 for each in layers["layers"])
    assert "on 3 samples; a layer is" in (package.directory / "report.html").read_text()
    assert_schema(report)
    assert package.damage() == []
    golden = load_file(package.directory / "golden.safetensors")
    assert {name: value.shape for name, value in golden.items()} == {
        "inputs.0.states": (1, 40, 128), "inputs.0.weights": (1, 40), "outputs.0.0": (40, 128), "outputs.0.1": (1, 128),
    }  # fmt: skip


def test_a_modules_package_on_another_machine(module_package: tuple[Package, Report], tmp_path: Path) -> None:
    """Without its model the golden outputs are compared; damage shows in them."""
    package, _ = module_package
    found = status(replay.revalidate(package.directory))
    assert found["golden"] == "passed"
    assert found["quality"] == "skipped"
    assert bench(package.directory).figures["runs"]
    with pytest.raises(TapeoutError, match="is measured on its own samples"):
        bench(package.directory, (16,))
    with pytest.raises(TapeoutError, match="holds a plain module, which takes arrays and no prompt"):
        list(replay.generate(package, "x"))
    damaged = tmp_path / "damaged"
    shutil.copytree(package.directory, damaged)
    data = damaged / "artifact" / "model.onnx.data"
    data.write_bytes(
        bytes(byte ^ 0x11 if at % 97 == 0 else byte for at, byte in enumerate(data.read_bytes()))
    )
    found = status(replay.revalidate(damaged))
    assert (found["integrity"], found["golden"]) == ("failed", "failed")


def test_a_module_again_with_its_code(module_package: tuple[Package, Report]) -> None:
    package, _ = module_package
    report = replay.revalidate(package.directory, f"{ROOT}/examples/block_sparse.py:make")
    assert report.passed
    assert status(report)["codes"] == "passed"
    with pytest.raises(ModelError, match="is not the model that"):
        replay.revalidate(package.directory, f"{ROOT}/examples/sliding_window.py:make")


def test_wrong_weights_of_a_module_are_found(tmp_path: Path) -> None:
    """Codes in another orientation: the file is whole, reads back, and computes something else."""
    model = load(f"{ROOT}/examples/block_sparse.py:make")
    quant = quantize(model, "int8")
    name = "blocks.0.out"
    wrong = quantize(
        replace(model, checkpoint=_unturned(model.checkpoint, name)), "int8", out=tmp_path / "codes"
    )
    artifact = TARGET.export(replace(wrong, model=model), tmp_path / "artifact")
    report = validate(artifact, model, quant, TARGET, Options(throughput=False))
    found = {gate.name: gate for gate in report.gates}
    assert found["codes"].status == "failed"
    assert name in found["codes"].reason
    assert found["lowering/weights"].status == "failed"
    assert "has no names in common with ours" in found["lowering/weights"].reason


def _unturned(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The checkpoint read as if a square matrix were stored as torch.nn.Linear stores it."""
    return Checkpoint(checkpoint.directory, {**checkpoint, name: replace(checkpoint[name], turned=False)})


def unknown(directory: Path, name: str) -> Path:
    """A kept model, with the graph that optimum made of it in the cache."""
    shutil.copytree(FIXTURES / name / "model", directory)
    checkpoint = Checkpoint(directory)
    optimum.read_export(
        FIXTURES / name / "export",
        optimum.place_of(directory, checkpoint),
        name,
        "optimum-onnx 0.1.0",
        checkpoint,
    )
    return directory


def test_a_family_of_optimums_is_proven(tmp_path: Path) -> None:
    model = unknown(tmp_path / "model", "gpt2")
    recipe = Recipe.of({"scheme": "int4-g32", "tokens": 192} | LOOSE)
    package, report = tapeout.export(TARGET, model, tmp_path / "out", recipe)
    assert report.passed, status(report)
    ran = {name for name, verdict in status(report).items() if verdict == "passed"}
    assert ran >= {
        "integrity", "codes", "lowering/weights", "lowering/runtime", "decode", "decode/batches-of-7", "quality/kl", "tokenizer",
    }  # fmt: skip
    assert report.graph == package.manifest["graph"] == "optimum"
    assert "made by **optimum**" in (package.directory / "README.md").read_text()
    assert_schema(report)
    # Two layers of two heads of 16 elements, 96 tokens, float32.
    assert package.manifest["needs"]["key_value_cache_bytes"] == 2 * 2 * 2 * 16 * 96 * 4
    assert status(replay.revalidate(package.directory))["golden"] == "passed"
    ids = [token for token, _ in replay.generate(package, "abc", max_new_tokens=4)]
    assert len(ids) == 4


def test_no_worker_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPEOUT_ENVIRONMENTS", str(tmp_path / "none"))
    shutil.copytree(FIXTURES / "opt" / "model", tmp_path / "model")
    with pytest.raises(
        MissingToolchain,
        match=r"'opt' is no family that tapeout has a file for\..*: tapeout env create optimum",
    ):
        load(tmp_path / "model")


@pytest.mark.skipif(
    not environments.get("optimum").installed,
    reason="the worker environment is not here: tapeout env create optimum",
)
def test_optimum_itself(tmp_path: Path) -> None:
    """Made now: a rotary model with an untied head, which transformers 5 calls otherwise than the checkpoint."""
    import runpy

    write = runpy.run_path(str(ROOT / "scripts" / "fixtures" / "make_optimum.py"))["write_unknown"]
    model = write(tmp_path / "model", "gpt_neox")
    recipe = Recipe.of({"scheme": "int8", "tokens": 192} | LOOSE)
    _, report = tapeout.export(TARGET, model, tmp_path / "out", recipe)
    assert report.passed, [f"{gate.name}: {gate.reason}" for gate in report.gates if gate.status == "failed"]
    assert load(model).config.folded == ()  # type: ignore[union-attr]


@pytest.mark.skipif(
    not environments.get("optimum").installed,
    reason="the worker environment is not here: tapeout env create optimum",
)
def test_what_optimum_does_not_export_is_said_in_its_words(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(FIXTURES / "opt" / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "bart"}))
    with pytest.raises(
        ModelError,
        match=r"'bart' is no family .* could not be made by optimum: .+size mismatch",
    ):
        load(model)
