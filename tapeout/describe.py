"""What is in a model, a store, an artifact or a package, and what each target carries."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tapeout import targets
from tapeout.errors import PackageError
from tapeout.exporters import Carry, Exact, Rounded, gguf, onnx
from tapeout.models import EncoderConfig, Seq2SeqConfig, TracedConfig, load
from tapeout.pack import MANIFEST, Package
from tapeout.quantize import SCHEMES
from tapeout.validate.page import counts, risk
from tapeout.validate.report import Report
from tapeout.validate.session import KV_BITS


def describe(path: Path) -> dict[str, Any]:
    """Return the facts of what stands at ``path``; PackageError when it is nothing that tapeout knows."""
    if (path / MANIFEST).exists():
        return _package(path)
    if (path / "quantization.json").exists():
        return _store(path)
    if path.suffix == ".gguf":
        return {"kind": "artifact"} | gguf.describe(path)
    if path.suffix == ".onnx":
        return {"kind": "artifact"} | onnx.describe(path)
    if path.suffix == ".json" and path.is_file():
        return {"kind": "report"} | _said(Report.read(path))
    if path.is_dir() or not path.exists():
        return _model(path)
    raise PackageError(
        f"{path} is neither a model, a store, a package, a report.json nor a .gguf or .onnx file."
    )


def _package(path: Path) -> dict[str, Any]:
    manifest = Package.open(path).manifest
    return {
        "kind": "package",
        "model": manifest["model"]["name"],
        "family": manifest["model"]["family"],
        "scheme": manifest["scheme"],
        "rounding": manifest["rounding"],
        "graph": Package.open(path).graph,
        "target": manifest["target"]["name"],
        "format": manifest["artifact"]["format"],
        "containers": dict(Counter(manifest["artifact"]["containers"].values())),
        "context": manifest["artifact"]["context"],
        "bytes": sum(entry["size"] for entry in manifest["files"].values()),
        "passed": manifest["passed"],
        "report": _reported(Package.open(path)),
        "root_sha256": manifest["root_sha256"],
    }


def _reported(package: Package) -> str:
    """Its gates in short, or why nobody should go by its report; PackageError where that is of a newer format."""
    if not (package.directory / "report.json").exists():
        return "missing"
    Report.read(package.directory / "report.json")
    try:
        return str(_said(package.report())["gates"])
    except PackageError:
        return "not the one that the package was made with: tapeout verify says what else has changed"


def _said(report: Report) -> dict[str, Any]:
    """The facts of a report."""
    count = ", ".join(f"{number} {status}" for status, number in counts(report).items())
    return {
        "model": report.model,
        "scheme": report.scheme,
        "target": report.target,
        "passed": report.passed,
        "gates": count,
        "look_first": risk(report),
        "bytes": report.provenance.get("artifact_bytes"),
        "root_sha256": report.provenance.get("root_sha256"),
    }


def _store(path: Path) -> dict[str, Any]:
    try:
        index = json.loads((path / "quantization.json").read_text(encoding="utf-8"))
        return {
            "kind": "store",
            "scheme": index["scheme"],
            "rounding": index["rounding"],
            "tensors": dict(Counter(index["schemes"].values())),
            "fallbacks": index["fallbacks"],
            "clamped_groups": sum(entry["clamped_groups"] for entry in index["tensors"].values()),
            "bytes": sum(file.stat().st_size for file in (path / "tensors").glob("*.safetensors")),
            "source_sha256": index["source_sha256"],
            "tapeout": index["tapeout"],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise PackageError(f"{path / 'quantization.json'} is not a store's index: {error!r}.") from error


def _model(path: Path) -> dict[str, Any]:
    model = load(path if path.exists() else str(path))
    config = model.config
    heads: dict[str, Any]
    if isinstance(config, EncoderConfig):
        rope = config.rope
        heads = {"heads": config.num_heads, "output": config.output, "pooling": config.pooling}
        heads |= {"labels": config.labels} if config.labels else {}
    elif isinstance(config, TracedConfig):
        rope = None
        heads = {"graph": config.road, "maker": config.maker}
    elif isinstance(config, Seq2SeqConfig):
        rope = None
        heads = {
            "heads": f"{config.num_heads}, {config.head_dim} wide",
            "decoder_layers": config.decoder_layers,
        }
    else:
        rope = config.rope
        heads = {"heads": f"{config.num_heads} / {config.num_kv_heads} key-value, {config.head_dim} wide"}
    return {
        "kind": "model",
        "name": model.name,
        "family": config.family,
        "parameters": sum(math.prod(spec.shape) for spec in model.specs.values()),
        "quantization": (model.quantization or {}).get("quant_method"),
        "dtypes": dict(Counter(tensor.dtype for tensor in model.checkpoint.values())),
        "layers": config.num_layers or None,
        "hidden_size": config.hidden_size or None,
        **heads,
        "vocabulary": config.vocab_size or None,
        "context": config.max_position_embeddings or None,
        "sliding_window": config.sliding_window,
        "rope": {"type": rope.kind, "theta": rope.theta, **rope.parameters} if rope else None,
        "tied_head": config.tie_word_embeddings,
        "licence": model.licence,
        "tokenizer_files": [file.name for file in model.tokenizer_files()],
    }


def carry_table() -> dict[str, Any]:
    """The table of targets (a column for each format), schemes and caches, generated from what each says that it carries."""
    kinds = {way: kind for name in targets.names() for way, kind in targets.variants(name).items()}
    return {
        "targets": {
            name: {"summary": kind.summary, "missing": kind.missing()} for name, kind in kinds.items()
        },
        "schemes": {
            scheme.name: {name: _cell(kind.carries(scheme)) for name, kind in kinds.items()}
            for scheme in SCHEMES.values()
        },
        "kv_caches": {
            cache: {name: "yes" if cache in kind.kv_caches() else "no" for name, kind in kinds.items()}
            for cache in KV_BITS
        },
    }


def alike(table: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The columns of ``carry_table``: targets that carry everything alike share one."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in table["targets"]:
        column = tuple(cells[name] for part in ("schemes", "kv_caches") for cells in table[part].values())
        found.setdefault(column, []).append(name)
    return [tuple(names) for names in found.values()]


def _cell(carry: Carry) -> str:
    if isinstance(carry, Exact):
        return f"exact ({carry.container})"
    if isinstance(carry, Rounded):
        return f"rounded ({carry.container}, +{carry.added_error:.2%})"
    return f"no: {carry.reason}"
