"""Packages without their gates: what is sent, patched and signed is the same, and takes a second to make."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tapeout import load, quantize
from tapeout.build import target
from tapeout.files import canonical_json, file_sha256
from tapeout.pack import Package, _root, pack
from tapeout.recipe import Recipe
from tapeout.validate import GateResult, Report


def packed(model: Path, name: str, out: Path, scheme: str = "int4-g32", **options: str) -> Package:
    """The package of a model for a target, with golden values that depend on the model alone."""
    quant, kind = quantize(load(str(model)), scheme), target(name, **options)
    (out / "artifact").mkdir(parents=True)
    artifact = kind.export(quant, out / "artifact")
    logits = (
        np.random.default_rng(int(quant.source_sha256[:8], 16)).standard_normal((2, 300)).astype(np.float32)
    )
    report = Report(
        model=quant.model.name,
        target=name,
        scheme=scheme,
        gates=(GateResult("codes", "passed", "tensors that differ from the store", 0, 0),),
        golden=(((1, 2, 3), logits[0]), ((4, 5), logits[1])),
    )
    return pack(artifact, report, quant, kind, Recipe().kept(quant))


def same(one: Path, other: Path) -> bool:
    """Whether two directories hold the same files with the same bytes."""
    files = [sorted(p.relative_to(top) for p in top.rglob("*") if p.is_file()) for top in (one, other)]
    return files[0] == files[1] and not any(filecmp.cmpfiles(one, other, files[0], shallow=False)[1:])


def names(directory: Path) -> set[str]:
    """What a directory holds, hidden names too."""
    return {path.name for path in directory.iterdir()}


def rewritten(package: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and make its digests right again, as somebody would who means harm."""
    path = package / "tapeout.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    for part in ("files", "beside"):
        for name in [name for name in manifest[part] if not (package / name).exists()]:
            del manifest[part][name]
        for name, entry in manifest[part].items():
            file = package / name
            entry.update(sha256=file_sha256(file), size=file.stat().st_size)
    manifest["root_sha256"] = _root(manifest)
    path.write_text(canonical_json(manifest))
