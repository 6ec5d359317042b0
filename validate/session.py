"""What validation asks of a running model, and of the target that opened it. Knows no device."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tapeout.exporters import Artifact, Carry
from tapeout.quantize import Quantized, QuantTensor, Scheme

Logits = npt.NDArray[np.float32]

KvCache = Literal["kv-f32", "kv-f16", "kv-fp8", "kv-int8", "kv-int4"]
KV_BITS: Mapping[KvCache, float] = {
    "kv-f32": 32.0, "kv-f16": 16.0, "kv-fp8": 8.0, "kv-int8": 8.5, "kv-int4": 4.5
}  # fmt: skip
"""What a runtime keeps keys and values in, with the bits of one: 32 integer codes share a float16 scale; float8 is E4M3, its step 1."""
Arithmetic = Literal["float32", "ggml", "mlas", "scheme", "modelopt"]
"""What a runtime does to the inputs of quantized matmuls: ``float32`` leaves them, ``ggml`` rounds them to int8 in blocks of 32,
or of 256 where weights lie in super-blocks, ``mlas`` (ONNX Runtime) in the blocks of the weights in the file, ``scheme`` to int8 where a scheme says so and nowhere else, ``modelopt`` where a scheme says so, and to float8 where weights are."""


@dataclass(frozen=True)
class Facts:
    """What a session says of itself.

    Attributes:
        runtime: name and version (``llama.cpp 0.3.36``).
        device: what it runs on (``cpu, 2 threads``).
        load_s: seconds from the call to a loaded model.
        resident_bytes: memory of the process that the model added, in bytes.
        context: most tokens that a sequence may have.
        emulated: no device of the target runs it: its numbers are the target's, its speed and memory are not.
        bandwidth: bytes a second of the device's own memory, where that is not the machine's.
    """

    runtime: str
    device: str
    load_s: float
    resident_bytes: int
    context: int
    emulated: bool = False
    bandwidth: float | None = None


class Session(Protocol):
    """A model loaded on a runtime: one sequence at a time, with its cache."""

    facts: Facts

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append tokens to the sequence at once; return float32 [tokens, vocab], the logits after each."""

    def decode(self, token: int) -> Logits:
        """Append one token by the runtime's token-by-token road; return float32 [vocab]."""

    def reset(self) -> None:
        """Begin a new sequence with an empty cache."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text`` by the artifact's own tokenizer; special tokens in the text are recognised, none added."""

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids by the artifact's own tokenizer, special tokens kept."""

    def close(self) -> None:
        """Free the model."""


class BatchedSession(Protocol):
    """A model loaded on a runtime with room for several sequences, which are computed together.

    Attributes:
        sequences: how many, numbered from 0. vocab_size: of the logits.
    """

    facts: Facts
    sequences: int
    vocab_size: int

    def step(self, given: Sequence[tuple[int, Sequence[int]]]) -> Logits:
        """Append tokens to sequences, pairs of number and ids; return float32 [len(given), vocab], the logits after the last of each."""

    def forget(self, sequence: int) -> None:
        """Empty the cache of one sequence."""

    def close(self) -> None:
        """Free the model."""


class EncoderSession(Protocol):
    """An encoder loaded on a runtime."""

    facts: Facts

    def encode(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]) -> Logits:
        """What the model gives of a batch, float32: [batch, tokens, hidden], or [batch, width] of embeddings and class logits.

        Args:
            ids: [batch, tokens].
            mask: [batch, tokens]: 1, or 0 at padding; what comes out there means nothing.
        """

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text`` by the artifact's own tokenizer as the model takes them, with the tokens that belong around it."""

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids by the artifact's own tokenizer, special tokens kept."""

    def close(self) -> None:
        """Free the model."""


class Shown(NamedTuple):
    """A value that a model made on its way.

    Attributes:
        op: what made it, in the words of who shows it: a primitive of the graph, an operator of the runtime.
        rounding: relative; what the runtime's own narrower type adds there (a table of float16); 0: it computes in float32.
        reads: names of the values that it was made from, where they are known.
    """

    op: str
    rounding: float = 0.0
    reads: tuple[str, ...] = ()


class TracedSession(Protocol):
    """A model loaded so that what it makes on its way can be seen."""

    facts: Facts

    def trace(self, ids: Sequence[int], out: str) -> dict[str, Shown]:
        """Run one sequence, and write each value that has a name in the graph to ``out``/NAME.npy, in the order of their making.

        Float32 [tokens, width], elements in the order that the checkpoint has them in; scores [heads, tokens, tokens], NaN where
        the mask is.
        """

    def tokenize(self, text: str) -> list[int]:
        """As of a Session."""

    def close(self) -> None:
        """Free the model."""


class ModuleSession(Protocol):
    """A plain module loaded on a runtime, with the samples that it is run on."""

    facts: Facts

    def infer(self, sample: int, output: int) -> Logits:
        """What the module gives of a sample at an output, float32 [rows, width]: all axes but the last one behind one another."""

    def close(self) -> None:
        """Free the module."""


@dataclass(frozen=True)
class SessionSpec:
    """How a worker process opens a session: data only, so that it can cross to another Python environment.

    Attributes:
        factory: ``module:function`` that takes ``arguments`` and returns a Session.
        arguments: keyword arguments; JSON values only.
        python: the interpreter to run it with; None: this one.
        environment: variables to add.
    """

    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    python: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def imported(self) -> Callable[..., Any]:
        """The factory itself, in this process."""
        module, _, function = self.factory.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found

    @property
    def process(self) -> tuple[object, ...]:
        """What a process must share to open another session of this kind."""
        return self.factory, self.python, tuple(sorted(self.environment.items()))

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Lowering:
    """One way to hold a device's logits against the reference that runs the dequantized weights.

    Attributes:
        check: what it isolates: ``weights`` (nothing but the lowered numbers) or ``runtime`` (the shipped file as deployed).
        session: the artifact, or a twin of it, opened so that only this is tested.
        metric: ``max`` (largest absolute difference of logits in units of their standard deviation) or ``kl`` (mean, nats).
        limit: the bound of ``weights``; that of ``runtime`` follows from the device's ``arithmetic``.
        derivation: where the bound comes from, in one or two sentences.
        halves: tensors whose floats the files hold as float16, weights or what codes mean, in whatever type they came: those of the
            reference are rounded to it too.
        values: tensors of codes that the files hold as their values in float16: those of the reference are rounded to it too.
        peaks: the session has a method ``peaks()`` that gives, for each value that the device holds as float16, the largest magnitude
            so far, by its name; it does not round them itself. The gate ``lowering/range`` looks at them.
    """

    check: Literal["weights", "runtime"]
    session: SessionSpec
    metric: Literal["max", "kl"]
    derivation: str
    limit: float = 0.0
    halves: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    peaks: bool = False


class Device(Protocol):
    """The part of a target that validation uses.

    Attributes:
        arithmetic: what the runtime does to the inputs of quantized matmuls.
        cache: what the deployed session keeps keys and values in.
    """

    name: ClassVar[str]

    @property
    def arithmetic(self) -> Arithmetic:
        """See ``Arithmetic``."""

    @property
    def cache(self) -> KvCache:
        """An option of the target, or its one kind."""

    def carries(self, scheme: Scheme) -> Carry:
        """Whether the artifact can hold codes of ``scheme``, and in what."""

    def session(self, artifact: Artifact) -> SessionSpec:
        """The artifact as it is deployed."""

    def read_codes(
        self, artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """Every tensor as the files hold it, by its Hugging Face name, read by the format owner's library."""

    def lowerings(self, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        """The lowering checks of this runtime; twins of the artifact may be written to ``scratch``."""

    def traced(self, artifact: Artifact, scratch: Path) -> SessionSpec | None:
        """The artifact's own numbers opened as a TracedSession that leaves the inputs of quantized matmuls alone; None: it can't be.

        From the files alone, so that what went wrong in them shows; twins of them may be written to ``scratch``.
        """
