"""A package as a CNCF ModelPack artifact: https://github.com/modelpack/model-spec/blob/main/docs/spec.md.

Every file is a layer of its own, raw: a registry keeps each once, whatever number of packages have it, and nothing is unpacked.
The same package gives the same manifest, so its digest too: no clock and no owner of a file is in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from cyclonedx.spdx import fixup_id

from tapeout.errors import PackageError
from tapeout.files import canonical_json, file_sha256
from tapeout.manifest import SIGNATURE, check_paths
from tapeout.oci import DIGEST, INDEX_TYPE, MANIFEST_TYPE, sha256
from tapeout.pack import MANIFEST, Package

ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
FILEPATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"  # what clients that know no models name a file by
_MOST_BYTES = (1 << 63) - 1
_MOST_MANIFEST_BYTES = 64 << 20  # of tapeout.json, which is read into memory

# What a layer holds by its file's name or suffix; anything else is weights.
_KINDS = {
    "dataset": {"golden.safetensors"},
    "doc": {"report.json", "sbom.cdx.json", ".html", ".md", ".pdf", ".png", ".svg", ".txt", ".xml"},
    "code": {".c", ".cpp", ".h", ".kt", ".py", ".service", ".sh", ".swift"},
    "weight.config": {".jinja", ".json", ".model", ".sig", ".toml", ".yaml", ".yml"},
}


@dataclass(frozen=True)
class Blob:
    """What a registry keeps of a file: its digest, ``sha256:…``, and its size in bytes."""

    digest: str
    size: int


def layers_of(package: Package) -> dict[str, Blob]:
    """Path and blob of every file that travels: what the manifest names, itself, and its signature."""
    entries = {**package.manifest["files"], **package.manifest["beside"]}
    found = {path: Blob(f"sha256:{entry['sha256']}", entry["size"]) for path, entry in entries.items()}
    for name in (MANIFEST, SIGNATURE):
        if (file := package.directory / name).is_file():
            found[name] = Blob(f"sha256:{file_sha256(file)}", file.stat().st_size)
    return dict(sorted(found.items()))


def compose(package: Package) -> tuple[bytes, bytes]:
    """The manifest of a package, and the config that it names."""
    layers = layers_of(package)
    config = canonical_json(_config(package.manifest, layers.values())).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": sha256(config), "size": len(config)},
        "layers": [
            {
                "mediaType": f"application/vnd.cncf.model.{_kind(path)}.v1.raw",
                "digest": blob.digest,
                "size": blob.size,
                "annotations": {FILEPATH: path, TITLE: path},
            }
            for path, blob in layers.items()
        ],
    }
    return canonical_json(manifest).encode(), config


def read(manifest: bytes, what: str) -> dict[str, Blob]:
    """Path and blob of every layer of a manifest that anybody may have written.

    Raises:
        PackageError: it is no ModelPack artifact of raw files, or names a path that is none inside of a package.
    """
    try:
        parsed = json.loads(manifest)
        kind = parsed.get("mediaType", MANIFEST_TYPE)
        if kind == INDEX_TYPE:
            found = ", ".join(each["digest"] for each in parsed["manifests"][:5])
            raise PackageError(f"{what} is an index of several artifacts: name one by its digest ({found}).")
        artifact = parsed.get("artifactType") or parsed["config"]["mediaType"]
        if artifact not in (ARTIFACT_TYPE, CONFIG_TYPE):
            raise PackageError(f"{what} is no model but {artifact!r}; a package is {ARTIFACT_TYPE}.")
        layers = [_layer(each, what) for each in parsed["layers"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PackageError(f"{what} has no readable manifest: {error!r}.") from error
    check_paths([path for path, _ in layers], what)
    if MANIFEST not in dict(layers):
        raise PackageError(
            f"{what} is a model without {MANIFEST}: no tapeout package. modctl fetches any model."
        )
    return dict(layers)


def _layer(layer: Mapping[str, Any], what: str) -> tuple[str, Blob]:
    notes, digest, size = layer.get("annotations") or {}, layer["digest"], layer["size"]
    path = notes.get(FILEPATH) or notes.get(TITLE)
    if not isinstance(path, str):
        raise PackageError(f"{what} has a layer without a name ({FILEPATH}).")
    if not str(layer["mediaType"]).endswith(".raw"):
        raise PackageError(f"{path!r} of {what} is {layer['mediaType']!r}; a package's files are raw.")
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise PackageError(
            f"{path!r} of {what} has the digest {digest!r}; sha256 and 64 hex digits are known."
        )
    if type(size) is not int or not 0 <= size <= _MOST_BYTES:
        raise PackageError(f"{path!r} of {what} has the size {size!r}.")
    if path == MANIFEST and size > _MOST_MANIFEST_BYTES:
        raise PackageError(
            f"{MANIFEST} of {what} would have {size} bytes; {_MOST_MANIFEST_BYTES} are the most."
        )
    return path, Blob(digest, size)


def _kind(path: str) -> str:
    name = PurePosixPath(path)
    if path == MANIFEST:
        return "weight.config"
    return next((kind for kind, known in _KINDS.items() if {name.name, name.suffix} & known), "weight")


def _config(facts: Mapping[str, Any], layers: Iterable[Blob]) -> dict[str, Any]:
    """The model's facts in the spec's words (docs/config.md there); what a package does not know is not said."""
    model, scheme = facts["model"], facts["scheme"]
    described = {
        "name": model["name"],
        "family": model["family"],
        "title": f"{model['name']} {scheme} for {facts['target']['name']}",
        "version": facts["root_sha256"],
    }
    if licence := model["licence"]:
        described["licenses"] = [fixup_id(licence) or "LicenseRef-" + re.sub(r"[^A-Za-z0-9.-]", "-", licence)]
    files = facts["artifact"]["files"]
    safetensors = any(file.endswith(".safetensors") for file in files)
    technical = {"format": "safetensors" if safetensors else facts["artifact"]["format"]}
    if scheme != "none":
        technical["quantization"] = scheme
    if scheme.startswith("w8a8"):  # of other schemes the device's kernels choose what they compute in
        technical["precision"] = "int8"
    if facts.get("graph", "built") != "torch.export":
        outputs = ["other"] if model.get("labels") else ["embedding"] if model.get("output") else ["text"]
        technical |= {
            "architecture": "transformer",
            "capabilities": {"inputTypes": ["text"], "outputTypes": outputs},
        }
    return {
        "descriptor": described,
        "config": technical,
        "modelfs": {"type": "layers", "diffIds": [blob.digest for blob in layers]},
    }
