"""Checkpoints that somebody else has quantized, into canonical codes: carried bit for bit or refused by name, never rounded.

One file a format. It says whether a weight of the model is quantized, reads its scheme, and turns its packing into ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy.typing as npt

from tapeout.errors import ModelError, nearest
from tapeout.models import Model
from tapeout.models.checkpoint import FLOATS
from tapeout.quantize import store
from tapeout.quantize.foreign import awq, bitsandbytes, compressed_tensors, gguf, gptq, modelopt
from tapeout.quantize.foreign.layer import Layer, Reader
from tapeout.quantize.foreign.schemes import scheme_of
from tapeout.quantize.scheme import SCHEMES, Scheme

__all__ = ["Foreign", "read", "scheme_of"]

_FORMATS: dict[str, ModuleType] = {
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
    "gguf": gguf,
    "gptq": gptq,
    "modelopt": modelopt,
}


@dataclass(frozen=True)
class Foreign:
    """What a quantized checkpoint carries.

    Attributes:
        method: its ``quant_method``.
        schemes: of every tensor of the model; ``none`` for those that are floats in ``model.checkpoint``.
        notes: what the checkpoint says that weights do not hold, and that is left behind.
    """

    model: Model
    method: str
    schemes: Mapping[str, Scheme]
    notes: tuple[str, ...]
    reader: Reader

    def parts(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """The parts of a quantized tensor that ``lattice.layout`` names, for ``store.write_parts``."""
        found = self.reader.layer(_layer(self.model, name))
        assert found is not None, f"{name} is a float"
        return {"codes": found.packed(), **found.parts}

    def write(
        self, directory: Path, pool: Executor, progress: Callable[[str, int, int], None] | None = None
    ) -> store.Findings:
        """Write every quantized tensor into a store, and check that the floats are finite.

        Raises:
            ModelError: a float is NaN or infinite.
        """
        found = store.Findings(notes=list(self.notes))
        total, done = sum(math.prod(spec.shape) for spec in self.model.specs.values()), 0
        for name, scheme in self.schemes.items():
            if scheme.kind == "none":
                store.check_finite(self.model.checkpoint[name], pool)
            elif store.tensor_path(directory, name).exists():
                found.tensors[name] = store.written(directory, name)
            else:
                found.tensors[name] = store.write_parts(directory, name, self.parts(name), scheme)
            done += math.prod(self.model.specs[name].shape)
            if progress:
                progress("quantize", done, total)
        return found

    @property
    def scheme(self) -> Scheme:
        """The scheme that most weights have, embeddings and head apart where there is another."""
        weights: dict[Scheme, int] = {}
        for name, scheme in self.schemes.items():
            spec = self.model.specs[name]
            if scheme.kind != "none":
                count = spec.shape[0] * spec.shape[1] if spec.role == "linear" else 1
                weights[scheme] = weights.get(scheme, 0) + count
        return max(weights, key=lambda scheme: weights[scheme], default=SCHEMES["none"])


def read(model: Model) -> Foreign:
    """Find how each tensor of a quantized checkpoint is kept; scales and zero points are read, codes are not.

    Raises:
        ModelError: an unknown format, a tensor that is missing, unexpected or of another shape, or what canonical codes
            cannot say.
    """
    statement = model.quantization
    if statement is None:
        raise ModelError(f"{model.name} is not quantized.")
    method = statement["quant_method"]
    if method not in _FORMATS:
        raise ModelError(
            f"{model.directory} is quantized by the method '{method}', which is not read{nearest(method, _FORMATS)}."
        )
    reader: Reader = _FORMATS[method].read(statement)
    schemes: dict[str, Scheme] = {}
    known: set[str] = set()
    wrong: list[str] = []
    for name, spec in model.specs.items():
        layer = _layer(model, name)
        imported = reader.layer(layer) if len(spec.shape) == 2 else None
        source = model.checkpoint.get(name)
        known.add(name)
        if imported is not None:
            known.update(f"{layer.base}.{suffix}" for suffix in reader.suffixes)
            schemes[name] = imported.scheme
        elif source is None:
            wrong.append(f"missing: {name}")
        elif source.dtype not in FLOATS:
            wrong.append(f"{name} is {source.dtype}, of which {method} says nothing")
        elif source.shape != spec.shape:
            wrong.append(f"{name} is {list(source.shape)} where config.json says {list(spec.shape)}")
        else:
            schemes[name] = SCHEMES["none"]
    for name in sorted(model.checkpoint.keys() - known):
        if not (name.endswith(reader.left_behind) or _means_nothing(model, name)):
            wrong.append(f"unexpected: {name}")
    if wrong:
        more = f" … and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ModelError(
            f"the tensors in {model.checkpoint.directory} do not fit a model of {method}: {'; '.join(wrong[:5])}{more}."
        )
    notes = list(reader.notes)
    if beside := sorted(name for name in model.checkpoint if name.endswith(reader.left_behind)):
        notes.append(
            f"{beside[0]} and {len(beside) - 1} like it are left behind: they are not of the weights"
        )
    return Foreign(model, method, schemes, tuple(notes), reader)


def _layer(model: Model, name: str) -> Layer:
    return Layer(model.checkpoint, name, model.specs[name].shape)


def _means_nothing(model: Model, name: str) -> bool:
    """Whether a tensor that is not expected changes nothing: a rotary table, a tied head, a bias of zeros (AutoGPTQ's)."""
    if name.endswith(".rotary_emb.inv_freq") or (
        name.startswith("lm_head.") and model.config.tie_word_embeddings
    ):
        return True
    source = model.checkpoint[name]
    return name.endswith(".bias") and source.dtype in FLOATS and not source.float32().any()
