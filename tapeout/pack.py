"""A package: the artifact and everything that an edge engineer needs to run it and to trust it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tapeout import CalledByItsName, __version__, targets
from tapeout.attestation import PROVENANCE, statement
from tapeout.card import card
from tapeout.errors import PackageError
from tapeout.exporters import Artifact
from tapeout.files import canonical_json, file_sha256
from tapeout.manifest import BESIDE, DEVICE_REPORT, FORMAT_VERSION, MANIFEST, walk
from tapeout.manifest import read as read_manifest
from tapeout.models import DecoderConfig, EncoderConfig, Generation, Model, Seq2SeqConfig, TracedConfig
from tapeout.models.module import SAMPLES
from tapeout.quantize import Quantized
from tapeout.software import Software, libraries, software
from tapeout.targets import Memory, Target, checks
from tapeout.validate.modules import Samples
from tapeout.validate.report import Report
from tapeout.validate.session import KV_BITS

__all__ = ["DEVICE_REPORT", "FORMAT_VERSION", "MANIFEST", "Package", "pack"]

# Measured, or dependent on the machine: these carry digests of their own and are not part of the root digest.
_UNROOTED = ("root_sha256", "beside", "passed")


@dataclass(frozen=True)
class Package:
    """A package on disk.

    Attributes:
        manifest: ``tapeout.json``: format_version, root_sha256, model, scheme, target, artifact, files, needs, beside.
    """

    directory: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, directory: Path) -> Package:
        """Read a package's manifest, and look at every name in its directory; no other file is opened.

        Raises:
            PackageError: there is none, it is of a newer format, or it is not one that can be trusted: see ``manifest.read``.
        """
        return cls(directory, read_manifest(directory))

    @property
    def passed(self) -> bool:
        """Whether all gates passed when it was made."""
        return bool(self.manifest["passed"])

    @property
    def encoder_output(self) -> str | None:
        """``last_hidden_state``, ``sentence_embedding`` or ``logits`` of an encoder; None: the model is a decoder."""
        output: str | None = self.manifest["model"].get("output")
        return output

    @property
    def graph(self) -> str:
        """Which road its graph took: ``built``, ``torch.export`` (a plain module) or ``optimum``."""
        return str(self.manifest.get("graph", "built"))

    @property
    def is_module(self) -> bool:
        """Whether it takes arrays and gives arrays, and knows no tokens."""
        return self.graph == "torch.export"

    @property
    def samples(self) -> int:
        """How many inputs a module's artifact has for its gates."""
        return len(Samples(self.arrays(f"artifact/{SAMPLES}")))

    @property
    def artifact(self) -> Artifact:
        """The artifact as its exporter described it."""
        raw = dict(self.manifest["artifact"])
        return Artifact(
            raw["format"],
            self.directory / "artifact",
            tuple(raw["files"]),
            raw["context"],
            raw["bytes_per_token"],
            raw["containers"],
            tuple(raw["notes"]),
            tuple(raw.get("tokenizer_limits", ())),
        )

    @property
    def operations(self) -> Mapping[str, Any] | None:
        """What a token takes to compute, see ``validate.roofline.operations``; None: its report does not say."""
        try:
            found: Mapping[str, Any] | None = Report.read(self.directory / "report.json").throughput.get(
                "operations_per_token"
            )
        except PackageError:
            return None
        return found

    @property
    def generation(self) -> Generation:
        """The package's generation defaults."""
        raw = dict(self.manifest["generation"])
        known = {field.name: raw[field.name] for field in fields(Generation)}
        return Generation(**known | {"stop_token_ids": tuple(raw["stop_token_ids"])})

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of its chat template; PackageError when it is no text."""
        path = self.directory / "tokenizer" / "chat_template.jinja"
        try:
            return path.read_text(encoding="utf-8") if path.exists() else None
        except UnicodeDecodeError as error:
            raise PackageError(f"{path} is not UTF-8: {error}.") from error

    @property
    def tokenizer_config(self) -> Mapping[str, Any]:
        """The package's ``tokenizer_config.json``, or nothing; PackageError when it is no JSON object."""
        path = self.directory / "tokenizer" / "tokenizer_config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (ValueError, RecursionError) as error:
            raise PackageError(f"{path} is not JSON: {error}.") from error
        if not isinstance(config, dict):
            raise PackageError(f"{path} holds no JSON object.")
        return config

    def arrays(self, path: str) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a safetensors file of the package; PackageError when it is none."""
        try:
            return load_file(self.directory / path)
        except (OSError, SafetensorError) as error:
            raise PackageError(f"{self.directory / path} cannot be read: {error}.") from error

    @property
    def provenance(self) -> dict[str, Any]:
        """What its report says of it: digests of what it was made from and of, versions, sizes in bytes."""
        manifest = self.manifest
        sizes = {path: entry["size"] for path, entry in manifest["files"].items()}
        return {
            "tapeout": manifest["tapeout"],
            "root_sha256": manifest["root_sha256"],
            "source_sha256": manifest["model"]["source_sha256"],
            "codes_sha256": manifest["codes_sha256"],
            "calibration_sha256": manifest["calibration_sha256"],
            "family": manifest["model"]["family"],
            "licence": manifest["model"]["licence"],
            "rounding": manifest["rounding"],
            "format": manifest["artifact"]["format"],
            "runtime": manifest["needs"]["runtime"],
            "context": manifest["artifact"]["context"],
            "artifact_bytes": sum(size for path, size in sizes.items() if path.startswith("artifact/")),
            "memory_bytes": manifest["needs"]["memory_bytes"],
            "key_value_cache_bytes": manifest["needs"]["key_value_cache_bytes"],
        }

    def target(self) -> Target:
        """The target that it was made for, with the options that it was made with; TapeoutError for options that are none of it."""
        return targets.restored(self.manifest["target"]["name"], self.manifest["target"]["options"])

    def report(self) -> Report:
        """The report that it was made with.

        Raises:
            PackageError: there is none, it is of a newer format, or not the one whose digest the manifest has.
        """
        path = self.directory / "report.json"
        promised = self.manifest["beside"].get(path.name)
        found = Report.read(path)
        if promised is None or file_sha256(path) != promised["sha256"]:
            raise PackageError(
                f"{path} is not the report that the package was made with: its digest is not in {MANIFEST}. "
                "tapeout verify says what else has changed; tapeout validate --report writes a new report beside it."
            )
        return found

    def _repr_html_(self) -> str:
        """What a notebook shows: its report, or why that is none to go by."""
        from tapeout.validate.page import fragment

        try:
            return fragment(self.report(), f"{self.directory}, root digest {self.manifest['root_sha256']}")
        except PackageError as error:
            return str(Markup("<p>{}</p>").format(str(error)))

    def files(self) -> dict[str, str]:
        """Every file with its SHA-256, those beside the root digest too."""
        every = {**self.manifest["files"], **self.manifest["beside"]}
        return {path: entry["sha256"] for path, entry in every.items()}

    def cut_short(self) -> list[str]:
        """Files of the artifact that are missing or of another length, one sentence each: seen without reading them."""
        found = []
        for path, entry in self.manifest["files"].items():
            file = self.directory / path
            if not file.is_file():
                found.append(f"{path} is missing")
            elif (size := file.stat().st_size) != entry["size"]:
                found.append(f"{path} has {size} bytes instead of {entry['size']}")
        return found

    def damage(self) -> list[str]:
        """What is not as the manifest says, one sentence each; empty for a whole package.

        Raises:
            PackageError: a link or a device came into its directory.
        """
        every = {**self.manifest["files"], **self.manifest["beside"]}
        present = set(walk(self.directory))
        found = []
        for path, entry in every.items():
            file = self.directory / path
            if path not in present:
                found.append(f"{path} is missing")
            elif (size := file.stat().st_size) != entry["size"]:
                found.append(f"{path} has {size} bytes instead of {entry['size']}")
            elif file_sha256(file) != entry["sha256"]:
                found.append(f"{path} differs from its digest")
        found += [
            f"{path.encode('utf-8', 'backslashreplace').decode()} is not part of it"
            for path in sorted(present - every.keys() - {MANIFEST, *BESIDE})
        ]
        if _root(self.manifest) != self.manifest["root_sha256"]:
            found.append(f"{MANIFEST} differs from its root digest")
        if (report := self.directory / "report.json").exists():
            try:
                if Report.read(report).passed != self.passed:
                    found.append(
                        f"{MANIFEST} says passed = {json.dumps(self.passed)}, and report.json does not"
                    )
            except PackageError as error:
                found.append(str(error).removesuffix("."))
        return found


def pack(
    artifact: Artifact, report: Report, quant: Quantized, target: Target, recipe: Mapping[str, Any]
) -> Package:
    """Make the directory around ``artifact`` (its ``artifact/`` already stands there) a whole package.

    ``recipe`` is what ``Recipe.kept`` gives: with it the package's gates can be run again by who does not have the file.
    The same inputs give the same root digest: no clock, host name or absolute path is in what it covers, nor which versions of
    libraries are installed here. Those are in the bill of materials and in the provenance, beside it.

    Raises:
        PackageError: what the model or the target call their files or themselves does not fit a package.
    """
    from tapeout.bill import BILL, bill  # CycloneDX's library, which opening a package needs not

    directory, model = artifact.directory.parent, quant.model
    (directory / "tokenizer").mkdir()
    for file in model.tokenizer_files():
        shutil.copyfile(file, directory / "tokenizer" / file.name)
    if model.chat_template:
        (directory / "tokenizer" / "chat_template.jinja").write_text(model.chat_template, encoding="utf-8")
    for name, text in checks.files_of(target).items():
        (directory / name).write_text(text, encoding="utf-8")
    texts = _copied(directory / "licences", model)
    facts = {**_facts(artifact, quant, target), "recipe": recipe}
    runtimes = [software(name) for name in facts["needs"]["distributions"]]
    told = card(
        artifact,
        facts,
        target.card(artifact),
        texts,
        [each.name for each in runtimes],
        tuple(checks.files_of(target)),
    )
    (directory / "README.md").write_text(told, encoding="utf-8")
    manifest = {**facts, "files": _digests(directory)}
    manifest["root_sha256"] = _root(manifest)
    _copy_runtimes(directory / "licences" / "runtime", runtimes)
    report = replace(report, provenance=Package(directory, manifest).provenance)
    report.write(directory)
    used = libraries(each.name for each in runtimes)
    (directory / BILL).write_text(bill(manifest, model, report, runtimes, used), encoding="utf-8")
    (directory / PROVENANCE).write_text(canonical_json(statement(manifest, used)), encoding="utf-8")
    if report.golden or report.golden_arrays:
        _write_golden(directory / "golden.safetensors", report)
    manifest["beside"] = {
        path: entry for path, entry in _digests(directory).items() if path not in manifest["files"]
    }
    manifest["passed"] = report.passed
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes 0600, and a package is for others
    (directory / MANIFEST).write_text(canonical_json(manifest), encoding="utf-8")
    read_manifest(directory)  # what is written can be opened
    return Package(directory, manifest)


def _copied(directory: Path, model: Model) -> list[str]:
    """Copy the texts of the model's licence and of tapeout's; their paths in the package."""
    texts = {f"model/{file.name}": file for file in model.licence_files()}
    texts |= {f"tapeout/{name}": file for name, file in software("tapeout").texts.items()}
    for path, file in texts.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, directory / path)
    return [f"{directory.name}/{path}" for path in texts]


def _copy_runtimes(directory: Path, runtimes: Iterable[Software]) -> None:
    """Copy the texts of the licences of the runtimes that are installed here."""
    for each in runtimes:
        for name, file in each.texts.items():
            (directory / each.name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, directory / each.name / name)


def _facts(artifact: Artifact, quant: Quantized, target: Target) -> dict[str, Any]:
    config = quant.model.config
    size = sum((artifact.directory / file).stat().st_size for file in artifact.files)
    memory, bits = Memory(0, 0), KV_BITS[target.cache]
    if isinstance(config, TracedConfig):
        memory = Memory(int(config.cache_values * artifact.context * bits / 8), 0)
    if isinstance(config, Seq2SeqConfig):  # of source and target
        values = 2 * config.decoder_layers * config.num_heads * config.head_dim * 2 * artifact.context
        memory = Memory(int(values * bits / 8), 0)
    if isinstance(config, DecoderConfig):
        memory = target.memory(config, artifact.context)
    return {
        "format_version": FORMAT_VERSION,
        "tapeout": __version__,
        "model": {
            "name": quant.model.name,
            "family": config.family,
            "licence": quant.model.licence,
            "source_sha256": quant.source_sha256,
            **_encodes(quant.model),
        },
        "graph": quant.model.graph,
        "scheme": quant.scheme.name,
        "rounding": quant.rounding,
        "calibration_sha256": quant.calibration_sha256,
        "schemes": {
            name.removesuffix(".weight"): scheme.name
            for name, scheme in quant.schemes.items()
            if quant.model.specs[name].role.is_matrix and name not in quant.fallbacks
        },
        "codes_sha256": quant.digest,
        "target": {"name": target.name, "options": targets.options(target)},
        "artifact": {
            "format": artifact.format,
            "files": artifact.files,
            "context": artifact.context,
            "bytes_per_token": artifact.bytes_per_token,
            "containers": artifact.containers,
            "notes": artifact.notes,
            **({"tokenizer_limits": artifact.tokenizer_limits} if artifact.tokenizer_limits else {}),
        },
        "generation": asdict(quant.model.generation),
        "needs": {
            "runtime": target.needs,
            "distributions": targets.runtimes(target),
            "memory_bytes": size + memory.cache + memory.work,
            "key_value_cache_bytes": memory.cache,
            "work_bytes": memory.work,
        },
    }


def _encodes(model: Model) -> dict[str, Any]:
    """What a manifest says of an encoder, besides what it says of every model."""
    config = model.config
    if not isinstance(config, EncoderConfig):
        return {}
    return {"output": config.output, "labels": config.labels}


def _digests(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(directory).as_posix(): {"sha256": file_sha256(path), "size": path.stat().st_size}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _root(manifest: Mapping[str, Any]) -> str:
    covered = {key: value for key, value in manifest.items() if key not in _UNROOTED}
    return hashlib.sha256(canonical_json(covered).encode()).hexdigest()


def _write_golden(path: Path, report: Report) -> None:
    """Prompts ``tokens.N`` int32 [tokens] and the float32 [vocab] ``logits.N`` that must follow each; of a module its arrays."""
    arrays: dict[str, np.ndarray[Any, Any]] = dict(report.golden_arrays)
    for index, (ids, logits) in enumerate(report.golden):
        arrays[f"tokens.{index}"] = np.array(ids, np.int32)
        arrays[f"logits.{index}"] = logits
    save_file(arrays, path)


sys.modules[__name__].__class__ = CalledByItsName
