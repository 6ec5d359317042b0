"""The bill of materials of a package: a CycloneDX 1.6 ML-BOM, and what is checked of one."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.exception import MissingOptionalDependencyException
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType, Pedigree
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion

from tapeout.files import canonical_json
from tapeout.manifest import read_json
from tapeout.models import EncoderConfig, Model, Seq2SeqConfig, TracedConfig
from tapeout.software import Software
from tapeout.validate.report import Report

BILL = "sbom.cdx.json"


def bill(
    manifest: Mapping[str, Any],
    model: Model,
    report: Report,
    runtimes: Sequence[Software],
    libraries: Iterable[Software],
) -> str:
    """Write the bill of a package, as JSON.

    Its subject is the lowered model, with a model card: architecture, datasets by digest, what the gates measured. Its components are
    the package's files, the model that it was made from (an ancestor), the texts that its making looked at, and the runtimes.

    Args:
        manifest: ``tapeout.json`` as far as the root digest covers it, with that digest.
        model: that it was made from. report: whose gates are its figures.
        runtimes: any one of these runs the package.
        libraries: that tapeout made it with.
    """
    facts = manifest["model"]
    source = _component("source", facts["name"], ComponentType.MACHINE_LEARNING_MODEL, facts["source_sha256"])
    source.licenses.update(_licences(facts["licence"]))
    source.properties.add(
        Property(name="tapeout:digest", value="of the tensors' names, types, shapes and bytes")
    )
    root = _component(
        "model",
        f"{facts['name']}-{manifest['scheme']}-{manifest['target']['name']}",
        ComponentType.MACHINE_LEARNING_MODEL,
        manifest["root_sha256"],
    )
    root.version = manifest["root_sha256"][:16]
    root.licenses.update(_licences(facts["licence"]))
    root.pedigree = Pedigree(
        ancestors=[
            _component(
                "ancestor", facts["name"], ComponentType.MACHINE_LEARNING_MODEL, facts["source_sha256"]
            )
        ],
        notes=f"quantized as {manifest['scheme']} ({manifest['rounding']}), codes {manifest['codes_sha256']}",
    )
    root.properties.update(
        Property(name=f"tapeout:{key}", value=str(value))
        for key, value in {
            "source_sha256": facts["source_sha256"],
            "codes_sha256": manifest["codes_sha256"],
            "scheme": manifest["scheme"],
            "rounding": manifest["rounding"],
            "graph": manifest["graph"],
            "runtime": manifest["needs"]["runtime"],
        }.items()
    )
    files = [
        _component(f"file:{path}", path, ComponentType.FILE, entry["sha256"])
        for path, entry in manifest["files"].items()
    ]
    texts = [_component(f"data:{n}", n, ComponentType.DATA, digest) for n, digest in _texts(manifest).items()]
    needed = [_runtime(each, alone=len(runtimes) == 1) for each in runtimes]
    # The library stamps a random serial and the clock; a package's bytes must not depend on either.
    bom = Bom(
        components=[*files, source, *texts, *needed],
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, manifest["root_sha256"]),
    )
    bom.metadata.timestamp = cast(Any, None)
    bom.metadata.component = root
    tools = [
        _software(
            "tapeout", Software("tapeout", manifest["tapeout"], "Apache-2.0"), ComponentType.APPLICATION
        )
    ]
    tools += [_software(f"tool:{each.name}", each, ComponentType.LIBRARY) for each in libraries]
    bom.metadata.tools.components.update(tools)
    bom.register_dependency(root, [*files, source, *needed])
    bom.register_dependency(source, texts)
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    # The library has no model cards yet; the schema that its validator holds the bill to has them.
    document["metadata"]["component"]["modelCard"] = _model_card(manifest, model, report, texts)
    return canonical_json(document)


def _component(ref: str, name: str, kind: ComponentType, sha256: str) -> Component:
    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=sha256)]
    return Component(name=name, type=kind, bom_ref=ref, hashes=hashes)


def _software(ref: str, found: Software, kind: ComponentType) -> Component:
    part = Component(name=found.name, type=kind, bom_ref=ref, version=found.version, purl=found.purl)
    part.licenses.update(_licences(found.licence))
    return part


def _runtime(found: Software, *, alone: bool) -> Component:
    part = _software(f"runtime:{found.name}", found, ComponentType.LIBRARY)
    part.scope = ComponentScope.REQUIRED if alone else ComponentScope.OPTIONAL
    texts = ", ".join(f"licences/runtime/{found.name}/{name}" for name in found.texts)
    absent = "its distribution has none" if found.version else "not installed where the package was made"
    part.properties.add(Property(name="tapeout:carried", value="no: the device has it"))
    part.properties.add(Property(name="tapeout:licence_text", value=texts or absent))
    return part


def _licences(named: str | None) -> list[License]:
    """An SPDX id or expression where it is one, whatever its letters' case; else the name as it stands."""
    return [LicenseFactory().make_from_string(named)] if named else []


def _texts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Texts that the making of a package looked at, as far as its recipe knows their digests."""
    recipe = manifest["recipe"]
    found = {"calibration text": (recipe["calibration"] or {}).get("text"), "evaluation text": recipe["text"]}
    return {name: digest for name, digest in found.items() if digest}


def _model_card(
    manifest: Mapping[str, Any], model: Model, report: Report, texts: Sequence[Component]
) -> dict[str, Any]:
    """https://cyclonedx.org/docs/1.6/json/#components_items_modelCard."""
    card: dict[str, Any] = {
        "modelParameters": {
            **_kind(model),
            "modelArchitecture": manifest["model"]["family"],
            **({"datasets": [{"ref": text.bom_ref.value} for text in texts]} if texts else {}),
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [
                {"type": f"{gate.name}: {gate.metric}", "value": repr(gate.value)}
                for gate in report.gates
                if gate.value is not None
            ]
        },
    }
    if notes := [*manifest["artifact"]["notes"]]:
        card["considerations"] = {"technicalLimitations": notes}
    return card


def _kind(model: Model) -> dict[str, Any]:
    """How such a model learns, and what it does; nothing of a plain module, of which nobody knows."""
    config = model.config
    if isinstance(config, TracedConfig) and config.road == "torch.export":
        return {}
    task, approach, given = "text-generation", "self-supervised", "string"
    if isinstance(config, Seq2SeqConfig):
        task = "text2text-generation"
    if isinstance(config, EncoderConfig):
        task = {"logits": "text-classification", "sentence_embedding": "sentence-similarity"}.get(
            config.output, "feature-extraction"
        )
        approach = "supervised" if config.output == "logits" else approach
        given = "label" if config.output == "logits" else "vector of float32"
    return {
        "approach": {"type": approach},
        "task": task,
        "architectureFamily": "transformer",
        "inputs": [{"format": "string"}],
        "outputs": [{"format": given}],
    }


def check(path: Path, manifest: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """Hold a package's bill against its manifest and against CycloneDX's schema.

    Returns:
        What is wrong with it, a sentence each; and why it was not held against the schema, where it was not.

    Raises:
        FileNotFoundError: there is none. PackageError: it is not JSON that can be trusted.
    """
    document = read_json(path)
    try:
        subject = document["metadata"]["component"]
        hashed = {
            (str(part["name"]), _sha256(part)) for part in document["components"] if part["type"] == "file"
        }
        root = _sha256(subject)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        return [f"{path.name} is no bill of a package: {error!r}"], None
    wanted = {(name, entry["sha256"]) for name, entry in manifest["files"].items()}
    wrong = [
        f"{path.name} and the manifest do not agree about {name}"
        for name in sorted({name for name, _ in hashed ^ wanted})
    ]
    if root != manifest["root_sha256"]:
        wrong.append(f"{path.name} is of another package: its root digest is {root[:16]}…")
    said, skipped = _against_schema(document)
    return [*wrong, *([f"{path.name} is not CycloneDX 1.6: {said}"] if said else [])], skipped


def _sha256(part: Mapping[str, Any]) -> str:
    return str(next((each["content"] for each in part["hashes"] if each["alg"] == "SHA-256"), None))


def _against_schema(document: Any) -> tuple[str | None, str | None]:
    """What the schema has against a bill, and why it was not asked."""
    from cyclonedx.validation.json import JsonStrictValidator

    try:
        error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document))
    except MissingOptionalDependencyException:
        return None, "the schema's validator is not installed: pip install 'tapeout[sign]'"
    except RecursionError:
        return "it is nested too deep", None
    return (None if error is None else str(error.data.message)[:200]), None
