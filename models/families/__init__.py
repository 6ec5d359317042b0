"""One file per family: the file's name is Hugging Face's ``model_type``, its ``FAMILY`` what tapeout knows of it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tapeout.errors import ModelError, nearest
from tapeout.models.decoder import ConfigReader, DecoderConfig, TensorSpec
from tapeout.models.encoder import EncoderConfig
from tapeout.models.seq2seq import Seq2SeqConfig

C = TypeVar("C", DecoderConfig, EncoderConfig, Seq2SeqConfig)


@dataclass(frozen=True)
class Family(Generic[C]):
    """What a family file gives.

    Attributes:
        config: reads the fields of ``config.json`` into a DecoderConfig, an EncoderConfig or a Seq2SeqConfig; raises ModelError or KeyError.
        tensors: every tensor that a checkpoint of this config holds, by its Hugging Face name, in file order.
        optional: whether a tensor that is not expected may be there all the same (rotary buffers, tied heads).
    """

    config: Callable[[ConfigReader], C]
    tensors: Callable[[C], Mapping[str, TensorSpec]]
    optional: Callable[[C, str], bool] = lambda config, name: False


def known() -> list[str]:
    """Names of the families, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def family(model_type: str) -> Family[Any]:
    """Return the family of a ``model_type``; ModelError names the known ones."""
    if model_type not in known():
        raise ModelError(
            f"model_type '{model_type}' is not a family that tapeout knows{nearest(model_type, known())}."
        )
    found: Family[Any] = importlib.import_module(f"tapeout.models.families.{model_type}").FAMILY
    return found
