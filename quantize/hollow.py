"""Codes that have shapes and no values: what an exporter lays its files out from, before anything is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tapeout.models import Model, SourceTensor, hollow
from tapeout.quantize import Quantized, QuantTensor, lattice, planned, store

_DTYPES: dict[str, npt.DTypeLike] = {"U8": np.uint8, "F16": np.float16, "F32": np.float32}
_DIGEST = "0" * 64  # as long as a true one, which files hold


@dataclass(frozen=True)
class Hollow(Quantized):
    """See ``hollow``."""

    def __getitem__(self, name: str) -> QuantTensor | SourceTensor:
        """The tensor as the store would have it, every number 1 and one in memory."""
        scheme, shape = self.schemes[name], self.model.specs[name].shape
        if scheme.kind == "none":
            return self.model.checkpoint[name]
        parts = {
            part: np.broadcast_to(np.ones((), _DTYPES[dtype]), size)
            for part, (dtype, size) in lattice.layout(scheme, *shape).items()
        }
        return lattice.assemble(parts, scheme, shape[1])


def quantized(
    model: Model, scheme: str | None = None, rounding: str = "rtn", overrides: Mapping[str, str] | None = None
) -> Hollow:
    """What ``quantize`` would give, as far as a file's layout goes: schemes and shapes. No weight is read.

    Args:
        model: what ``load`` gives, with weights or without.
        scheme, rounding, overrides: as of ``quantize``, which raises what this raises of them.
    """
    plan = planned(model, scheme, rounding, overrides or {})
    dtype = "F16" if model.quantization else "F32"  # of tensors that the checkpoint does not have as floats
    empty = hollow.checkpoint(model.directory, model.specs, dtype, model.checkpoint)
    return Hollow(
        model=replace(model, checkpoint=empty),
        scheme=plan.scheme,
        rounding=plan.rounding,
        directory=Path(),
        schemes=plan.schemes,
        fallbacks={},
        clamped={},
        folded=frozenset(),
        notes=(),
        source_sha256=_DIGEST,
        calibration_sha256=None,
        device=None,
        digest=_DIGEST,
        hollow=True,
    )


def store_bytes(quant: Quantized) -> int:
    """Bytes of the store's tensors; its index is a few kilobytes more."""
    return sum(
        store.tensor_bytes(scheme, *quant.model.specs[name].shape)
        for name, scheme in quant.schemes.items()
        if scheme.kind != "none"
    )


def with_directory(quant: Hollow, directory: Path) -> Hollow:
    """The same of a model whose tokenizer and other small files lie elsewhere."""
    return replace(quant, model=replace(quant.model, directory=directory))
