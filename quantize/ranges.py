"""Static ranges of an encoder's inputs: the largest that the linear layers are given on a calibration text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError, SchemeError
from tapeout.models import EncoderConfig, Model
from tapeout.models.encoder import encoder
from tapeout.models.torch_encoder import TorchEncoderOps
from tapeout.quantize.scheme import Scheme

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int, int], None]


def input_scales(
    model: Model,
    tokens: npt.NDArray[np.int32],
    wanted: Mapping[str, Scheme],
    pool: Executor,
    progress: Progress | None = None,
) -> dict[str, np.float32]:
    """The scale of the inputs of each tensor: by its scheme, for the largest magnitude that it is given.

    The model runs in float32 with its own weights, one sequence a core, and is in memory whole.

    Args:
        tokens: int32 [sequences, length], see ``Calibration.tokens``.
        wanted: tensors by name whose scheme says so.
        progress: told how many sequences are done.

    Raises:
        SchemeError: a tensor multiplies nothing. ModelError: its inputs are NaN or infinite, or all zero.
    """
    import torch

    config = model.config
    assert isinstance(config, EncoderConfig)

    @cache
    def weights(name: str) -> torch.Tensor:
        return torch.from_numpy(model.checkpoint[name].float32())

    def run(ids: npt.NDArray[np.int32]) -> dict[str, float]:
        ops = _Watching(weights)
        with torch.inference_mode():
            encoder(ops, config, torch.from_numpy(ids.astype(np.int64))[None])
        return ops.largest

    found: dict[str, np.float32] = {}
    for done, largest in enumerate(pool.map(run, tokens), 1):
        for name, value in largest.items():
            # This order keeps a NaN, whichever of the two it is.
            found[name] = np.maximum(found.get(name, np.float32(0)), np.float32(value))
        if progress:
            progress("calibrate", done, len(tokens))
    for name in wanted:
        if name not in found:
            raise SchemeError(
                f"the scheme of {name} needs the range of its inputs, and it has none: give it int8."
            )
        if not 0 < found[name] < np.inf:
            raise ModelError(
                f"the inputs of {name.removesuffix('.weight')} are at most {found[name]} on the calibration text: no scale fits."
            )
    return {name: scheme.input_scale(found[name]) for name, scheme in wanted.items()}


@dataclass
class _Watching(TorchEncoderOps):
    """Notes the largest input of each weight."""

    largest: dict[str, float] = field(default_factory=dict)

    def linear(self, name: str, x: torch.Tensor, weight: str, bias: str | None) -> torch.Tensor:
        self.largest[weight] = float(x.abs().max())
        return super().linear(name, x, weight, bias)
