"""What a cell will take, before any work: memory, disk, and whether its target refuses it. No weight is read."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tapeout import targets
from tapeout.errors import MissingToolchain, TapeoutError
from tapeout.models import DecoderConfig, Model
from tapeout.plan import lays_out
from tapeout.quantize import SCHEMES
from tapeout.quantize.hollow import quantized, store_bytes
from tapeout.recipe import Recipe
from tapeout.targets import Memory, Target, check_cache, check_carries

BASE = 1_200_000_000
"""Bytes that no file's length explains: of an export three processes, its own and two workers, which import torch, transformers and a runtime,
with what a small model takes in each. Measured: see docs/matrix-runs.md."""

_CODES_BASE = 600_000_000  # of one process, which imports numpy and, to calibrate, torch
_GROWTH = 1.5  # of the reference's float32 weights: transformers' copies while it loads, logits


@dataclass(frozen=True)
class Forecast:
    """What is known of a cell before it is made.

    Attributes:
        memory_bytes: most that its processes may hold at once.
        disk_bytes: of its package, to the byte but for reports; where its exporter cannot tell, of its codes. store_bytes: of the codes.
        refused: why its target cannot carry it. skipped: what is not installed.
    """

    memory_bytes: int
    disk_bytes: int = 0
    store_bytes: int = 0
    refused: str | None = None
    skipped: str | None = None


def calibrates(recipe: Recipe) -> bool:
    """Whether making the codes runs the model on a calibration text."""
    schemes = [SCHEMES[each] for each in (recipe.scheme, *recipe.tensors.values()) if each in SCHEMES]
    static = any(scheme.calibrated for scheme in schemes)
    return recipe.calibration is not None or recipe.rounding not in ("rtn", "hqq") or static


def codes_memory(model: Model, recipe: Recipe) -> int:
    """Most bytes that making the codes takes: rounding streams; what calibrates holds a layer in float32, with its Hessians."""
    sizes = [4 * math.prod(spec.shape) for spec in model.specs.values()]
    if not calibrates(recipe):
        return _CODES_BASE
    layers = max(1, getattr(model.config, "num_layers", 1))
    return 2 * _CODES_BASE + 4 * sum(sizes) // layers + max(sizes)


def forecast(model: Model, device: Target, recipe: Recipe) -> Forecast:
    """Lay a cell's files out from shapes, and say what making and proving them takes.

    Args:
        recipe: with the target's default scheme, where the cell says none.
    """
    try:
        check_cache(device, model)
        quant = quantized(model, recipe.scheme_given, recipe.rounding, recipe.tensors)
        check_carries(device, set(quant.schemes.values()))
        codes = size = store_bytes(quant)
        scratch = targets.scratch_bytes(device, quant)
        if lays_out(device):
            with tempfile.TemporaryDirectory(prefix="tapeout-plan-") as place:
                artifact = device.export(quant, Path(place))
                size = sum((Path(place) / name).stat().st_size for name in artifact.files)
    except MissingToolchain as error:
        return Forecast(0, skipped=str(error))
    except TapeoutError as error:
        return Forecast(0, refused=str(error))
    floats = 4 * sum(math.prod(spec.shape) for spec in model.specs.values())
    config, memory = model.config, Memory(0, 0)
    if isinstance(config, DecoderConfig):
        memory = device.memory(config, min(config.max_position_embeddings or 4096, 4096))
    kept, _ = targets.loaded(device, quant, size)
    return Forecast(
        BASE + int(_GROWTH * floats) + max(kept, size) + memory.cache + memory.work, size + scratch, codes
    )
