"""Where a package comes from: an in-toto statement with SLSA's provenance of the build, and what is checked of one.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md and https://slsa.dev/spec/v1.0/provenance. There is no time, host
or user in it: SLSA leaves those open, and with them two builds of one thing would not be the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tapeout import own_wheel
from tapeout.manifest import read_json
from tapeout.software import Software, python

PROVENANCE = "provenance.json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "pkg:pypi/tapeout#export/v1"
"""docs/package.md says what stands in a provenance of this type."""


def statement(manifest: Mapping[str, Any], libraries: Iterable[Software]) -> dict[str, Any]:
    """The provenance of a package.

    Its subjects are the package, by its root digest, and every file that this digest covers. What was measured (the report, golden
    logits) is none of them, so that the same inputs and the same libraries give the same provenance.

    Args:
        manifest: ``tapeout.json`` as far as the root digest covers it, with that digest.
        libraries: what tapeout made it with.
    """
    model, recipe = manifest["model"], manifest["recipe"]
    texts = {"calibration text": (recipe["calibration"] or {}).get("text"), "evaluation text": recipe["text"]}
    return {
        "_type": STATEMENT,
        "subject": _subjects(manifest),
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "model": {key: model[key] for key in ("name", "family", "licence", "source_sha256")},
                    "recipe": {
                        **recipe,
                        "scheme": manifest["scheme"],
                        "rounding": manifest["rounding"],
                        "tensors": manifest["schemes"],
                    },
                    "target": manifest["target"],
                },
                "internalParameters": {},
                "resolvedDependencies": [
                    {
                        "name": model["name"],
                        "digest": {"sha256": model["source_sha256"]},
                        "annotations": {"of": "the model's tensors: their names, types, shapes and bytes"},
                    },
                    *({"name": name, "digest": {"sha256": sha}} for name, sha in texts.items() if sha),
                    _tapeout(manifest["tapeout"]),
                    *({"name": each.name, "uri": each.purl.to_string()} for each in libraries),
                ],
            },
            "runDetails": {
                "builder": {
                    "id": f"pkg:pypi/tapeout@{manifest['tapeout']}",
                    "version": {"tapeout": manifest["tapeout"], "python": python()},
                },
                "byproducts": [{"name": "canonical codes", "digest": {"sha256": manifest["codes_sha256"]}}],
            },
        },
    }


def _subjects(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    package = f"{manifest['model']['name']}-{manifest['scheme']}-{manifest['target']['name']}"
    return [
        {"name": package, "digest": {"sha256": manifest["root_sha256"]}},
        *(
            {"name": path, "digest": {"sha256": entry["sha256"]}}
            for path, entry in sorted(manifest["files"].items())
        ),
    ]


def _tapeout(version: str) -> dict[str, Any]:
    found = {"name": "tapeout", "uri": f"pkg:pypi/tapeout@{version}"}
    if own_wheel.is_editable():
        return {**found, "annotations": {"of": "an editable install, which has no digest"}}
    return {
        **found,
        "digest": {"sha256": own_wheel.digest()},
        "annotations": {"of": "the names and digests of its installed files"},
    }


def check(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Hold a package's provenance against its manifest: what is wrong with it, a sentence each.

    Raises:
        FileNotFoundError: there is none. PackageError: it is not JSON that can be trusted.
    """
    document = read_json(path)
    try:
        build = document["predicate"]["buildDefinition"]
        told = {
            "type": document["_type"],
            "predicate's type": document["predicateType"],
            "build's type": build["buildType"],
            "subjects": document["subject"],
            "model": build["externalParameters"]["model"]["source_sha256"],
            "target": build["externalParameters"]["target"],
        }
    except (KeyError, TypeError) as error:
        return [f"{path.name} is no provenance of a package: {error!r}"]
    wanted = {
        "type": STATEMENT,
        "predicate's type": PREDICATE,
        "build's type": BUILD_TYPE,
        "subjects": _subjects(manifest),
        "model": manifest["model"]["source_sha256"],
        "target": manifest["target"],
    }
    return [
        f"{path.name} has another {what} than the manifest" for what in wanted if told[what] != wanted[what]
    ]
