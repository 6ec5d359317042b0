"""Packages without their gates, and the scripts in them that check them, run where there is no tapeout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tapeout.build import target
from tapeout.generated import write_model
from tapeout.models import EncoderConfig, Model, TracedConfig, load
from tapeout.models.module import SAMPLES
from tapeout.pack import Package, pack
from tapeout.quantize import quantize
from tapeout.recipe import Recipe
from tapeout.validate import Report, reference
from tapeout.validate.modules import Samples

WINDOW = 24
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "max_position_embeddings": 64}
PROMPTS = ((7, 200, 31, 4, 99, 5, 18, 250, 3, 3, 61), (12, 77, 140, 9, 200), (44,))

# What a script imports is looked for as everywhere, but these are not found.
ABSENT = """
import importlib.abc, os, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in os.environ["ABSENT"].split():
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def packed(
    out: Path,
    model: Model | Path,
    kind: str,
    scheme: str,
    *,
    prompts: Any = PROMPTS,
    spoil: float = 0.0,
    **flags: Any,
) -> Package:
    """A package of a model, its golden logits those of the reference with the same codes.

    ``spoil`` is added to one of them, before the digests are taken.
    """
    model = model if isinstance(model, Model) else load(model)
    quant = quantize(model, scheme, out=out.with_name(f"{out.name}-codes"))
    device = target(kind, **flags)
    (out / "artifact").mkdir(parents=True)
    artifact = device.export(quant, out / "artifact")
    known: Any = reference.open_session(str(model.directory), str(quant.directory))
    report = Report(model.name, device.name, quant.scheme.name, ())
    if isinstance(model.config, TracedConfig):
        samples = Samples(load_file(model.directory / SAMPLES))
        arrays = {
            f"inputs.{n}.{name}": np.asarray(each)
            for n in range(len(samples))
            for name, each in samples[n].items()
        }
        arrays |= {f"outputs.{n}.0": known.infer(n, 0) + spoil * (n == 0) for n in range(len(samples))}
        report = replace(report, golden_arrays=arrays)
    else:
        golden = []
        for ids in prompts:
            if isinstance(model.config, EncoderConfig):
                row = known.encode([list(ids)], [[1] * len(ids)]).reshape(-1, model.config.width)[0]
            else:
                known.reset()
                row = known.prefill(list(ids))[-1]
            golden.append((tuple(ids), np.array(row, np.float32)))
        golden[-1][1][3] += spoil
        report = replace(report, golden=tuple(golden))
    return pack(artifact, report, quant, device, Recipe().kept(quant))


def decoder(out: Path, kind: str, scheme: str = "int4-g32", **flags: Any) -> Package:
    """The package of a small decoder with a sliding window."""
    model = write_model(out / "model", "mistral", TINY | {"sliding_window": WINDOW}, dtype="F32")
    return packed(out / "package", model, kind, scheme, **flags)


def kept_llama_cpp(pattern: str) -> Iterator[Path]:
    """What ``scripts/llama_cpp.py`` keeps under names like that."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (home / "tapeout" / "llama-cpp").glob(pattern)


def check(
    package: Path,
    work: Path,
    *arguments: str | Path,
    absent: Sequence[str] = (),
    script: Sequence[str | Path] = (),
) -> subprocess.CompletedProcess[str]:
    """Run ``check.py`` of a package, or another command; tapeout cannot be imported, nor what is ``absent``."""
    stage = work / "stage"
    stage.mkdir(exist_ok=True)
    (stage / "sitecustomize.py").write_text(ABSENT)
    environment = os.environ | {
        "PYTHONPATH": str(stage),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "ABSENT": " ".join(("tapeout", *absent)),
    }
    command = [*(script or (sys.executable, package / "check.py")), *arguments]
    done = subprocess.run(
        command, cwd=package, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done
