"""Targets whose ``format`` is a choice among roads: each road is a class in a file of its own, and answers for the target."""

# Annotations are values here: fields of a subclass are a target's flags.
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from tapeout.errors import TapeoutError
from tapeout.exporters import Artifact, Carry
from tapeout.models import DecoderConfig
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Memory, Progress
from tapeout.validate.session import Arithmetic, KvCache, Lowering, SessionSpec


class Road(Protocol):
    """What one format answers; ``device`` is the target, which holds the flags. The methods are those of ``Target``.

    Attributes:
        default_scheme: what a model is quantized as where nobody says.
        cache: what keys and values are kept in where nobody says.
        flags: the target's fields, besides ``format``, that the format knows; others are refused.
        checks: see ``tapeout.targets.checks``.
    """

    default_scheme: ClassVar[str]
    arithmetic: ClassVar[Arithmetic]
    cache: ClassVar[KvCache]
    needs: ClassVar[str]
    runtimes: ClassVar[tuple[str, ...]]
    flags: ClassVar[tuple[str, ...]]
    checks: ClassVar[tuple[str, ...]]

    @classmethod
    def carries(cls, scheme: Scheme) -> Carry: ...

    @classmethod
    def missing(cls) -> str | None: ...

    @classmethod
    def memory(cls, device: Any, config: DecoderConfig, context: int) -> Memory: ...

    @classmethod
    def export(cls, device: Any, quant: Quantized, out: Path, progress: Progress | None) -> Artifact: ...

    @classmethod
    def session(cls, device: Any, artifact: Artifact) -> SessionSpec: ...

    @classmethod
    def read_codes(
        cls, artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]: ...

    @classmethod
    def lowerings(
        cls, device: Any, artifact: Artifact, quant: Quantized, scratch: Path
    ) -> list[Lowering]: ...

    @classmethod
    def traced(cls, device: Any, artifact: Artifact, scratch: Path) -> SessionSpec | None: ...

    @classmethod
    def card(cls, device: Any, artifact: Artifact) -> str: ...


class Roads:
    """A target that asks the road of its format; a subclass is a frozen dataclass of flags, ``format`` among them.

    Attributes:
        roads: by what ``format`` may be.
    """

    roads: ClassVar[Mapping[str, type[Road]]]
    format: str

    def check_flags(self) -> None:
        """TapeoutError for a flag that is given, though the format does not know it."""
        for field in fields(self):  # type: ignore[arg-type]
            flag, given = field.name, getattr(self, field.name)
            if flag != "format" and flag not in self._road.flags and given != field.default:
                known = [name for name, road in self.roads.items() if flag in road.flags]
                raise TapeoutError(
                    f"--{flag.replace('_', '-')} is not of the format {self.format}. It is of: {', '.join(known)}."
                )

    @property
    def _road(self) -> type[Road]:
        return self.roads[self.format]

    @property
    def known_flags(self) -> tuple[str, ...]:
        """The fields that the chosen format knows."""
        return self._road.flags

    @property
    def default_scheme(self) -> str:
        """What a model is quantized as where nobody says."""
        return self._road.default_scheme

    @property
    def arithmetic(self) -> Arithmetic:
        """What the runtime does to the inputs of quantized matmuls."""
        return self._road.arithmetic

    @property
    def cache(self) -> KvCache:
        """What keys and values are kept in."""
        return self._road.cache

    @property
    def needs(self) -> str:
        """The format's runtime."""
        return self._road.needs

    @property
    def checks(self) -> tuple[str, ...]:
        """Of the script that checks a package on the device."""
        return self._road.checks

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Its distributions."""
        return self._road.runtimes

    def carries(self, scheme: Scheme) -> Carry:
        """As the format holds it, and its loaders take it."""
        return self._road.carries(scheme)

    def kv_caches(self, head_dim: int | None = None) -> tuple[KvCache, ...]:
        """The format's own."""
        return (self.cache,)

    def memory(self, config: DecoderConfig, context: int) -> Memory:
        """As the runtime keeps keys and values, and a chunk's activations."""
        return self._road.memory(self, config, context)

    def missing(self) -> str | None:
        """Whether what checks the format is here."""
        return self._road.missing()

    def export(self, quant: Quantized, out: Path, progress: Progress | None = None) -> Artifact:
        """Write the format's files."""
        return self._road.export(self, quant, out, progress)

    def session(self, artifact: Artifact) -> SessionSpec:
        """The files on what runs them here."""
        return self._road.session(self, artifact)

    def read_codes(
        self, artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """From the files."""
        return self._road.read_codes(artifact, quant)

    def lowerings(self, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        """The same numbers without the runtime's rounding, and as they are deployed."""
        return self._road.lowerings(self, artifact, quant, scratch)

    def traced(self, artifact: Artifact, scratch: Path) -> SessionSpec | None:
        """What the files mean, in our own graph or theirs."""
        return self._road.traced(self, artifact, scratch)

    def card(self, artifact: Artifact) -> str:
        """How to serve it."""
        return self._road.card(self, artifact)
