"""NVIDIA GPUs: what TensorRT-LLM, vLLM, SGLang and TensorRT load."""

# Annotations are values here: the fields are the target's flags.
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tapeout.errors import TapeoutError, nearest
from tapeout.exporters import Artifact, Carry
from tapeout.models import DecoderConfig
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Memory, Progress
from tapeout.targets.local import parse_size
from tapeout.targets.modelopt import ModelOpt
from tapeout.validate.session import Arithmetic, KvCache, Lowering, SessionSpec


class Road(Protocol):
    """What one format answers for the target; ``device`` holds the flags. The methods are those of ``Target``.

    Attributes:
        default_scheme: what a model is quantized as where nobody says.
        flags: the target's fields, besides ``format``, that the format knows; others are refused.
    """

    default_scheme: ClassVar[str]
    arithmetic: ClassVar[Arithmetic]
    cache: ClassVar[KvCache]
    needs: ClassVar[str]
    flags: ClassVar[tuple[str, ...]]

    @staticmethod
    def carries(scheme: Scheme) -> Carry: ...

    @staticmethod
    def missing() -> str | None: ...

    @staticmethod
    def memory(device: "Nvidia", config: DecoderConfig, context: int) -> Memory: ...

    @staticmethod
    def export(device: "Nvidia", quant: Quantized, out: Path, progress: Progress | None) -> Artifact: ...

    @staticmethod
    def session(device: "Nvidia", artifact: Artifact) -> SessionSpec: ...

    @staticmethod
    def read_codes(
        artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]: ...

    @staticmethod
    def lowerings(
        device: "Nvidia", artifact: Artifact, quant: Quantized, scratch: Path
    ) -> list[Lowering]: ...

    @staticmethod
    def traced(device: "Nvidia", artifact: Artifact, scratch: Path) -> SessionSpec: ...

    @staticmethod
    def card(device: "Nvidia", artifact: Artifact) -> str: ...


_ROADS: dict[str, type[Road]] = {"modelopt": ModelOpt}
_CACHES: tuple[KvCache, ...] = ("kv-f16", "kv-fp8")


@dataclass(frozen=True)
class Nvidia:
    """NVIDIA GPUs.

    Attributes:
        format: What is written: modelopt, the directory that TensorRT-LLM, vLLM and SGLang load.
        max_shard_size: Of modelopt: split the weights into files of at most this size (500M, 2G).
        kv_cache: Of modelopt: what servers keep keys and values in: half floats (the default), or float8.
    """

    format: Literal["modelopt"] = "modelopt"
    max_shard_size: str = "5G"
    kv_cache: Literal["kv-f16", "kv-fp8"] | None = None

    name: ClassVar[str] = "nvidia"
    summary: ClassVar[str] = "NVIDIA GPUs, through TensorRT-LLM, vLLM, SGLang or TensorRT."

    def __post_init__(self) -> None:
        """TapeoutError for a flag of another format, and a size that is none."""
        for flag, field in type(self).__dataclass_fields__.items():
            if flag != "format" and flag not in self._road.flags and getattr(self, flag) != field.default:
                raise TapeoutError(
                    f"--{flag.replace('_', '-')} is not of the format {self.format}. "
                    f"It is of: {', '.join(name for name, road in _ROADS.items() if flag in road.flags)}."
                )
        parse_size(self.max_shard_size)
        if self.kv_cache is not None and self.kv_cache not in _CACHES:
            raise TapeoutError(
                f"'{self.kv_cache}' is not a cache of target {self.name}{nearest(self.kv_cache, _CACHES)}."
            )

    @property
    def _road(self) -> type[Road]:
        return _ROADS[self.format]

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
        return self.kv_cache or self._road.cache

    @property
    def needs(self) -> str:
        """The format's runtime."""
        return self._road.needs

    def carries(self, scheme: Scheme) -> Carry:
        """As the format holds it, and its loaders take it."""
        return self._road.carries(scheme)

    def kv_caches(self, head_dim: int | None = None) -> tuple[KvCache, ...]:
        """The format's own, or a choice where it knows the flag."""
        return _CACHES if "kv_cache" in self._road.flags else (self._road.cache,)

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

    def traced(self, artifact: Artifact, scratch: Path) -> SessionSpec:
        """What the files mean, in our own graph or theirs."""
        return self._road.traced(self, artifact, scratch)

    def card(self, artifact: Artifact) -> str:
        """How to serve it."""
        return self._road.card(self, artifact)
