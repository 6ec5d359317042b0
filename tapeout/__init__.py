"""tapeout: quantize a model once, lower those exact codes to every device, and prove it.

The Python API is the five calls of the pipeline:

>>> model = load("arithmetic")                              # doctest: +SKIP
>>> quant = quantize(model, Scheme.parse("int4-g32"))       # doctest: +SKIP
>>> artifact = target("cpu").export(quant, out)             # doctest: +SKIP
>>> report = validate(artifact, model, quant, cpu)          # doctest: +SKIP
>>> package = pack(artifact, report)                        # doctest: +SKIP
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tapeout.build import export, pack, validate
    from tapeout.errors import TapeoutError
    from tapeout.models import Model, load, load_module
    from tapeout.quantize import Quantized, Scheme, quantize
    from tapeout.targets import target

__version__ = "0.1.0"

_HOME = {
    "load": "tapeout.models",
    "load_module": "tapeout.models",
    "Model": "tapeout.models",
    "quantize": "tapeout.quantize",
    "Quantized": "tapeout.quantize",
    "Scheme": "tapeout.quantize",
    "target": "tapeout.targets",
    "validate": "tapeout.build",
    "pack": "tapeout.build",
    "export": "tapeout.build",
    "TapeoutError": "tapeout.errors",
}

__all__ = [
    "Model",
    "Quantized",
    "Scheme",
    "TapeoutError",
    "__version__",
    "export",
    "load",
    "load_module",
    "pack",
    "quantize",
    "target",
    "validate",
]


class CalledByItsName(ModuleType):
    """A subpackage that is named like its main call: ``tapeout.quantize(…)`` is ``tapeout.quantize.quantize(…)``.

    Python binds a subpackage in its parent when it is first imported, over whatever ``__getattr__`` would give.
    """

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **keywords)


class Late:
    """A module that is imported when something of it is first asked for, by whichever thread."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        import importlib

        return getattr(importlib.import_module(self._name), name)


def __getattr__(name: str) -> Any:
    """Import each name when it is first asked for: ``import tapeout`` costs nothing."""
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tapeout' has no attribute {name!r}")
