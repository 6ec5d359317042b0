"""Canonical codes in, files out. An exporter knows a file format and no runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Exact:
    """The container holds the codes, scales and zero points bit for bit.

    Attributes:
        bits: that a weight takes in it; None: as the scheme says.
    """

    container: str
    bits: float | None = None


@dataclass(frozen=True)
class Rounded:
    """The codes survive bit for bit, the values they stand for are rounded.

    Attributes:
        container: the type that holds them.
        added_error: relative root-mean-square error added to a weight.
    """

    container: str
    added_error: float


@dataclass(frozen=True)
class Refused:
    """The format has nothing that holds the scheme; ``reason`` says why and ``nearest`` what would fit."""

    reason: str
    nearest: str


Carry = Exact | Rounded | Refused


@dataclass(frozen=True)
class Artifact:
    """The files that a runtime loads.

    Attributes:
        format: the exporter's name (``gguf``, ``onnx``).
        directory: where they stand.
        files: their names in ``directory``, the one that is opened first.
        bytes_per_token: bytes of weights that decoding one token reads (of the embedding table one row).
        context: longest context that the artifact may be run with, in tokens.
        containers: which type of the format holds each tensor, by the tensor's Hugging Face name.
        notes: what a user has to know: a fallback, a clamp, an error added. Shown in the report.
        tokenizer_limits: classes of strings (``models.text_limits``) that the runtime is known to cut otherwise.
    """

    format: str
    directory: Path
    files: tuple[str, ...]
    context: int
    bytes_per_token: int
    containers: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tokenizer_limits: tuple[str, ...] = ()
