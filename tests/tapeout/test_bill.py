"""The bill of materials and the provenance, each held against its owner's library."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from tapeout import own_wheel, target, targets
from tapeout.attestation import statement
from tapeout.bill import bill, check
from tapeout.files import canonical_json
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.pack import pack
from tapeout.quantize import Calibration, quantize
from tapeout.recipe import Recipe
from tapeout.software import Software, libraries, software
from tapeout.validate import GateResult, Report

VALIDATOR = JsonStrictValidator(SchemaVersion.V1_6)


@pytest.fixture(scope="module")
def manifest(bare: Path) -> Any:
    return json.loads((bare / "tapeout.json").read_text())


@pytest.fixture(scope="module")
def written(bare: Path) -> Any:
    return json.loads((bare / "sbom.cdx.json").read_text())


def test_the_bill_is_valid_and_complete(bare: Path, manifest: Any, written: Any) -> None:
    text = (bare / "sbom.cdx.json").read_text()
    assert text == canonical_json(written)
    assert VALIDATOR.validate_str(text) is None
    # The validator does find what is wrong, in a model card too.
    assert VALIDATOR.validate_str(text.replace('"file"', '"fail"')) is not None
    assert VALIDATOR.validate_str(text.replace('"modelArchitecture"', '"architecture"')) is not None
    files = {
        each["name"]: each["hashes"][0]["content"] for each in written["components"] if each["type"] == "file"
    }
    assert files == {name: entry["sha256"] for name, entry in manifest["files"].items()}
    root = written["metadata"]["component"]
    assert (root["type"], root["name"]) == ("machine-learning-model", "small-int8-null")
    assert root["hashes"] == [{"alg": "SHA-256", "content": manifest["root_sha256"]}]
    assert root["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    properties = {each["name"]: each["value"] for each in root["properties"]}
    assert properties["tapeout:codes_sha256"] == manifest["codes_sha256"]
    assert properties["tapeout:runtime"] == "transformers and torch"
    depends = {each["ref"]: set(each.get("dependsOn", ())) for each in written["dependencies"]}
    assert depends["model"] == {f"file:{name}" for name in files} | {"source", "runtime:transformers"}


def test_the_model_card(written: Any) -> None:
    card = written["metadata"]["component"]["modelCard"]
    parameters = card["modelParameters"]
    assert parameters["modelArchitecture"] == "mistral"
    assert parameters["architectureFamily"] == "transformer"
    assert (parameters["task"], parameters["approach"]) == ("text-generation", {"type": "self-supervised"})
    measured = {each["type"]: each["value"] for each in card["quantitativeAnalysis"]["performanceMetrics"]}
    assert measured == {
        "codes: tensors that differ from the store": "0.0",
        "quality/kl: mean KL, nats": "0.0125",
    }


def test_where_the_model_comes_from(manifest: Any, written: Any) -> None:
    (source,) = [each for each in written["components"] if each["type"] == "machine-learning-model"]
    (ancestor,) = written["metadata"]["component"]["pedigree"]["ancestors"]
    digest = [{"alg": "SHA-256", "content": manifest["model"]["source_sha256"]}]
    assert source["hashes"] == ancestor["hashes"] == digest
    assert source["name"] == ancestor["name"] == "small"


def test_runtime_and_tools(written: Any, bare: Path) -> None:
    (runtime,) = [each for each in written["components"] if each["type"] == "library"]
    found = PackageURL.from_string(runtime["purl"])
    assert (found.type, found.name, found.version) == ("pypi", "transformers", version("transformers"))
    told = {each["name"]: each["value"] for each in runtime["properties"]}
    assert (bare / told["tapeout:licence_text"]).read_text().startswith("Copyright 2018")
    tools = {each["name"]: each.get("version") for each in written["metadata"]["tools"]["components"]}
    assert tools["numpy"] == version("numpy")
    assert tools.keys() >= {"tapeout", "torch", "transformers", "safetensors", "tokenizers"}
    assert "pytest" not in tools


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("mit", {"license": {"id": "MIT"}}),
        ("cc-by-nc-4.0", {"license": {"id": "CC-BY-NC-4.0"}}),
        ("Apache-2.0 OR MIT", {"expression": "Apache-2.0 OR MIT"}),
        ("llama3.1", {"license": {"name": "llama3.1"}}),
        ("<script>", {"license": {"name": "<script>"}}),
    ],
)
def test_licences_are_spdx_where_they_are(manifest: Any, bare: Path, named: str, found: Any) -> None:
    model = load(bare.parent / "small")
    said = {**manifest, "model": {**manifest["model"], "licence": named}}
    text = bill(said, model, Report("small", "null", "int8", ()), [Software("not-here")], [])
    assert VALIDATOR.validate_str(text) is None
    assert json.loads(text)["metadata"]["component"]["licenses"] == [found]
    (runtime,) = [each for each in json.loads(text)["components"] if each["type"] == "library"]
    assert runtime["purl"] == "pkg:pypi/not-here"
    told = {each["name"]: each["value"] for each in runtime["properties"]}
    assert told["tapeout:licence_text"] == "not installed where the package was made"


def test_texts_that_were_looked_at_are_named_by_digest(tmp_path: Path) -> None:
    """A calibrated package: its text is a dataset of the model card, and a dependency of the build."""
    model = write_model(tmp_path / "model", dtype="F32")
    calibration = Calibration(sequences=2, length=16)
    recipe = Recipe.of({"rounding": "gptq", "calibration": {"sequences": 2, "length": 16}})
    quant = quantize(load(model), "int8", rounding="gptq", calibration=calibration, out=tmp_path / "codes")
    (tmp_path / "out" / "artifact").mkdir(parents=True)
    artifact = target("null").export(quant, tmp_path / "out" / "artifact")
    golden = (((1, 2), np.zeros(272, np.float32)),)
    gates = (GateResult("codes", "passed", "tensors", 0.0, 0.0, "made up"),)
    report = Report("model", "null", "int8", gates, golden=golden)
    package = pack(artifact, report, quant, target("null"), recipe.kept(quant))
    digest = package.manifest["recipe"]["calibration"]["text"]
    assert re.fullmatch("[0-9a-f]{64}", digest)
    text = (tmp_path / "out" / "sbom.cdx.json").read_text()
    assert VALIDATOR.validate_str(text) is None
    found = json.loads(text)
    (data,) = [each for each in found["components"] if each["type"] == "data"]
    assert data["hashes"] == [{"alg": "SHA-256", "content": digest}]
    parameters = found["metadata"]["component"]["modelCard"]["modelParameters"]
    assert parameters["datasets"] == [{"ref": data["bom-ref"]}]
    made = json.loads((tmp_path / "out" / "provenance.json").read_text())
    dependencies = made["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert {"name": "calibration text", "digest": {"sha256": digest}} in dependencies


def test_a_bill_is_held_against_its_manifest(bare: Path, manifest: Any, written: Any, tmp_path: Path) -> None:
    path = tmp_path / "sbom.cdx.json"
    path.write_text(json.dumps(written))
    assert check(path, manifest) == ([], None)
    file = next(each for each in written["components"] if each["type"] == "file")
    forged = json.loads(json.dumps(written).replace(file["hashes"][0]["content"], "f" * 64))
    path.write_text(json.dumps(forged))
    assert check(path, manifest) == (
        [f"sbom.cdx.json and the manifest do not agree about {file['name']}"],
        None,
    )
    doubled = {
        **written,
        "components": [
            *written["components"],
            {**file, "bom-ref": "x", "hashes": [{"alg": "SHA-256", "content": "f" * 64}]},
        ],
    }
    path.write_text(json.dumps(doubled))
    assert check(path, manifest)[0] == [f"sbom.cdx.json and the manifest do not agree about {file['name']}"]
    path.write_text(json.dumps({**written, "specVersion": "1.6", "bomFormat": "Other"}))
    ((said,), _) = check(path, manifest)
    assert said.startswith("sbom.cdx.json is not CycloneDX 1.6: ")


def test_without_the_validator_it_is_said(bare: Path, manifest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from cyclonedx.exception import MissingOptionalDependencyException

    def absent(*_: object) -> None:
        raise MissingOptionalDependencyException

    monkeypatch.setattr(JsonStrictValidator, "validate_str", absent)
    wrong, skipped = check(bare / "sbom.cdx.json", manifest)
    assert wrong == []
    assert skipped is not None
    assert "pip install 'tapeout[sign]'" in skipped


def test_the_provenance_is_what_in_toto_and_slsa_say(bare: Path, manifest: Any) -> None:
    """Read by their own messages, which take no field that they do not know."""
    pytest.importorskip("in_toto_attestation")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    document = json.loads((bare / "provenance.json").read_text())
    Statement.copy_from_pb(json_format.ParseDict(document, statement_pb2.Statement())).validate()
    read = json_format.ParseDict(document["predicate"], Provenance())
    definition = read.build_definition
    assert definition.build_type == "pkg:pypi/tapeout#export/v1"
    assert read.run_details.builder.id == f"pkg:pypi/tapeout@{manifest['tapeout']}"
    assert not read.run_details.HasField("metadata")  # no clock
    subjects = {each["name"]: each["digest"]["sha256"] for each in document["subject"]}
    assert subjects.pop("small-int8-null") == manifest["root_sha256"]
    assert subjects == {name: entry["sha256"] for name, entry in manifest["files"].items()}
    dependencies = {each.name: each for each in definition.resolved_dependencies}
    assert dependencies["small"].digest["sha256"] == manifest["model"]["source_sha256"]
    assert dependencies["numpy"].uri == f"pkg:pypi/numpy@{version('numpy')}"
    if not own_wheel.is_editable():
        assert dependencies["tapeout"].digest["sha256"] == own_wheel.digest()
    parameters = json_format.MessageToDict(definition.external_parameters)
    assert parameters["target"] == {"name": "null", "options": {"threads": 1.0}}
    assert parameters["recipe"]["scheme"] == "int8"


def test_the_same_inputs_give_the_same_provenance(bare: Path, manifest: Any) -> None:
    covered = {key: value for key, value in manifest.items() if key not in ("beside", "passed")}
    again = canonical_json(statement(covered, libraries(["transformers"])))
    assert again == (bare / "provenance.json").read_text()


def test_licences_are_carried_along_and_told(bare: Path, manifest: Any) -> None:
    assert (bare / "licences" / "model" / "LICENSE").read_text() == "Do as you like."
    assert (bare / "licences" / "model" / "NOTICE").read_text() == "Made by a test."
    assert "Apache License" in (bare / "licences" / "tapeout" / "LICENSE").read_text()
    assert {f"licences/model/{name}" for name in ("LICENSE", "NOTICE")} <= manifest["files"].keys()
    # Which runtime is installed here is none of the inputs.
    assert "licences/runtime/transformers/LICENSE" in manifest["beside"]
    card = (bare / "README.md").read_text()
    assert "its texts are `licences/model/LICENSE`, `licences/model/NOTICE`." in card
    assert "`licences/runtime/` has the licences of transformers" in card


def test_software_that_is_installed_and_that_is_not() -> None:
    assert software("not-a-distribution") == Software("not-a-distribution")
    found = software("Jinja2")
    assert (found.name, found.version) == ("jinja2", version("jinja2"))
    assert [each for each in found.texts if each.startswith("LICENSE")]
    assert {each.name for each in libraries([])} >= {"numpy", "pydantic"}
    assert "gguf" in {each.name for each in libraries(iter(["llama_cpp_python"]))}
    assert "gguf" not in {each.name for each in libraries([])}


@pytest.mark.parametrize("name", targets.names())
def test_every_target_names_its_runtimes(name: str) -> None:
    for kind in targets.variants(name).values():
        assert targets.runtimes(kind), f"{kind} names no distribution that runs it"
    assert replace(Software("a"), version="1+cpu").purl.to_string() == "pkg:pypi/a@1%2Bcpu"
