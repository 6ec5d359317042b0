"""Sessions on a Core ML package: what the apple target runs its packages with.

On a Mac it is Core ML itself, through coremltools. Anywhere else it is the interpreter of ``tapeout.validate.mil``, which reads the
saved files alone: what they mean in float64, or as a device would compute it in float16.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import psutil

from tapeout.errors import MissingToolchain, PackageError, RuntimeCrash, TapeoutError
from tapeout.exporters.coreml import PACKAGE
from tapeout.validate import mil
from tapeout.validate.encoders import check_batch
from tapeout.validate.primitives import save
from tapeout.validate.session import Facts, Logits, Shown

__all__ = ["CoremlDecoder", "CoremlEncoder", "TracedCoreml", "native", "open_session", "open_traced"]

Arrays = Mapping[str, npt.NDArray[Any]]
_UNITS = {"all": "ALL", "cpu-and-gpu": "CPU_AND_GPU", "cpu-and-ne": "CPU_AND_NE", "cpu-only": "CPU_ONLY"}


def native() -> bool:
    """Whether this machine has Core ML."""
    return platform.system() == "Darwin"


class Engine(Protocol):
    """What runs the functions of a package over one state."""

    def run(self, function: str, inputs: Arrays) -> npt.NDArray[Any]:
        """The function's one output."""

    def reset(self) -> None:
        """All states zero."""


class Interpreted:
    """The interpreter; a value that float16 cannot hold is a crash with its name."""

    def __init__(self, program: mil.Program, precision: mil.Precision) -> None:
        self._machine = mil.Machine(program, precision, exact_states=precision == "float64")
        self._state = self._machine.new_state()

    def run(self, function: str, inputs: Arrays) -> npt.NDArray[Any]:
        """As Engine says; RuntimeCrash names a value beyond float16's range."""
        (out,) = self._machine.run(function, inputs, self._state).values()
        for name, peak in self._machine.overflows(1.0).items():
            raise RuntimeCrash(
                f"{name.replace('__', '.')} reaches {peak:.0f}, which float16 (up to {mil.LARGEST:.0f}) cannot hold: on a device it is infinite."
            )
        return out

    def reset(self) -> None:
        """All states zero."""
        self._state = self._machine.new_state()


class Native:
    """Core ML on a Mac."""

    def __init__(self, path: Path, functions: Sequence[str], units: str) -> None:
        import coremltools

        unit = getattr(coremltools.ComputeUnit, _UNITS[units])
        several = len(functions) > 1
        try:
            self._models = {
                name: coremltools.models.MLModel(
                    str(path), compute_units=unit, function_name=name if several else None
                )
                for name in functions
            }
        except Exception as error:  # Core ML's, in its own words
            raise RuntimeCrash(f"Core ML refuses {path}: {error}") from error
        self._stateful = several
        self.reset()

    def run(self, function: str, inputs: Arrays) -> npt.NDArray[Any]:
        """As Engine says."""
        given = (dict(inputs), self._state) if self._stateful else (dict(inputs),)
        try:
            (out,) = self._models[function].predict(*given).values()
        except Exception as error:  # Core ML's, in its own words
            raise RuntimeCrash(f"Core ML cannot run {function}: {error}") from error
        return cast("npt.NDArray[Any]", out)

    def reset(self) -> None:
        """One state for all functions: they are one program's."""
        first = next(iter(self._models.values()))
        self._state = first.make_state() if self._stateful else None


class _Worded:
    """A tokenizer beside a package."""

    facts: Facts

    def __init__(self, facts: Facts, tokenizer: Any, vocab_size: int, around: bool) -> None:
        self.facts, self._tokenizer, self._vocab_size, self._around = facts, tokenizer, vocab_size, around
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``; special tokens in it are recognised, and of an encoder those around it are added."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TapeoutError(f"the text cannot be tokenized, since it is not Unicode: {error}.") from error
        return list(self._tokenizer.encode(text, add_special_tokens=self._around).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens kept."""
        self._check(ids)
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _check(self, ids: Sequence[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self._vocab_size:
            found = f"token ids from {min(ids)} to {max(ids)}"
            raise TapeoutError(f"{found} are not all in the vocabulary of {self._vocab_size}.")


class CoremlDecoder(_Worded):
    """A Session on a decoder's package; see ``open_session``."""

    def __init__(self, facts: Facts, engine: Engine, tokenizer: Any, said: Mapping[str, int]) -> None:
        super().__init__(facts, tokenizer, said["vocab_size"], around=False)
        self._engine: Engine | None = engine
        self._batch, self._chunk = said["batch"], said["chunk"]
        self._length = 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append tokens to the sequence, chunk by chunk; return float32 [tokens, vocab], the logits after each."""
        self._room(ids)
        parts = [self._step("prefill", ids[at : at + self._chunk]) for at in range(0, len(ids), self._chunk)]
        return np.concatenate(parts) if parts else np.empty((0, self._vocab_size), np.float32)

    def append(self, ids: Sequence[int]) -> Logits:
        """``prefill`` for those who want the last token's logits only, float32 [1, vocab]."""
        self._room(ids)
        for at in range(0, len(ids), self._chunk):
            last = self._step("prefill", ids[at : at + self._chunk])[-1:]
        return last

    def decode(self, token: int) -> Logits:
        """Append one token by the other function, over the same state; return float32 [vocab]."""
        self._room([token])
        return cast(Logits, self._step("decode", [token])[0])

    def reset(self) -> None:
        """Begin a new sequence."""
        assert self._engine
        self._engine.reset()
        self._length = 0

    def close(self) -> None:
        """Free the model; may be called twice."""
        self._engine = None

    def _room(self, ids: Sequence[int]) -> None:
        self._check(ids)
        if self._length + len(ids) > self.facts.context:
            raise TapeoutError(
                f"{self._length + len(ids)} tokens do not fit the context of {self.facts.context}."
            )

    def _step(self, function: str, ids: Sequence[int]) -> Logits:
        """A call with the same tokens in every row of the batch, and a mask of zeros: the program hides what comes later."""
        assert self._engine
        count, total = len(ids), self._length + len(ids)
        inputs = {
            "inputIds": np.tile(np.array(ids, np.int32), (self._batch, 1)),
            "causalMask": np.zeros((self._batch, 1, count, total), np.float16),
        }
        out = self._engine.run(function, inputs)
        self._length = total
        return out[0].astype(np.float32)


class CoremlEncoder(_Worded):
    """An EncoderSession on an encoder's package; see ``open_session``."""

    def __init__(self, facts: Facts, engine: Engine, tokenizer: Any, said: Mapping[str, int]) -> None:
        super().__init__(facts, tokenizer, said["vocab_size"], around=True)
        self._engine: Engine | None = engine
        self._batch = said["batch"]

    def encode(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]) -> Logits:
        """What the model gives of a batch; see EncoderSession. The package's own batch is static: rows go through it in turn."""
        assert self._engine
        rows, seen = check_batch(ids, mask, self._vocab_size, self.facts.context)
        found = []
        for at in range(0, len(rows), self._batch):
            part = np.arange(at, at + self._batch).clip(
                max=len(rows) - 1
            )  # the last row again, where there are too few
            inputs = {"inputIds": rows[part].astype(np.int32), "attentionMask": seen[part].astype(np.int32)}
            found.append(self._engine.run("main", inputs).astype(np.float32))
        return np.concatenate(found)[: len(rows)]

    def close(self) -> None:
        """Free the model; may be called twice."""
        self._engine = None


def open_session(
    directory: str, precision: mil.Precision = "float16", units: str | None = None
) -> CoremlDecoder | CoremlEncoder:
    """Load ``model.mlpackage``.

    Args:
        directory: where it stands, with ``tokenizer.json``.
        precision: of the interpreter: float16 as on a device, or float64 for what the files mean, states and all.
        units: compute units of Core ML, which runs the package then; None: the interpreter does.

    Raises:
        MissingToolchain: coremltools is not installed, or Core ML is asked for where there is none. PackageError: no such file, or
            one that is damaged. RuntimeCrash: Core ML refuses the package.
    """
    begin, before = perf_counter(), psutil.Process().memory_info().rss
    program, said, tokenizer = _loaded(directory)
    encodes = "main" in program.functions
    engine: Engine
    if units is None:
        engine, runtime = Interpreted(program, precision), f"interpreter of MIL, {precision}"
        device = "cpu, checked by the interpreter; not run on Apple hardware"
    elif native():
        engine = Native(Path(directory) / PACKAGE, tuple(program.functions), units)
        runtime, device = f"Core ML, macOS {platform.mac_ver()[0]}", f"{platform.machine()}, {units}"
    else:
        raise MissingToolchain(
            "Core ML is on macOS only: run artifact/mac_verify.py of the package on a Mac."
        )
    facts = Facts(runtime, device, 0.0, 0, said["context"], emulated=units is None)
    kind = CoremlEncoder if encodes else CoremlDecoder
    session = kind(facts, engine, tokenizer, said)
    resident = max(0, psutil.Process().memory_info().rss - before)
    session.facts = Facts(
        runtime, device, perf_counter() - begin, resident, said["context"], emulated=facts.emulated
    )
    return session


def _loaded(directory: str) -> tuple[mil.Program, dict[str, int], Any]:
    """The program, what its metadata says in numbers, and the tokenizer beside it."""
    from tokenizers import Tokenizer

    words = Path(directory) / "tokenizer.json"
    if not words.is_file():
        raise PackageError(f"{words} is absent; there is nothing to tokenize with.")
    program = mil.load(Path(directory) / PACKAGE)
    keys = ("context", "batch", "chunk", "vocab_size")
    said = {key: program.metadata.get(f"co.tapeout.{key}", "0") for key in keys}
    if not all(value.isdecimal() for value in said.values()) or said["context"] == "0":
        raise PackageError(f"{Path(directory) / PACKAGE} does not say what it was made for: {said}.")
    return program, {key: int(value) for key, value in said.items()}, Tokenizer.from_file(str(words))


_PARTS = ("embedding", "layers.", "norm", "head", "logits", "pooled", "dense", "sentence_embedding", "last_hidden_state")  # fmt: skip
"""What the graph's own names begin with."""
_HIDDEN = -5e8  # half of what is added to a score that is not looked at


class TracedCoreml(_Worded):
    """A TracedSession on the interpreter in float64; see ``open_traced``."""

    def __init__(self, facts: Facts, program: mil.Program, tokenizer: Any, said: Mapping[str, int]) -> None:
        encodes = "main" in program.functions
        super().__init__(facts, tokenizer, said["vocab_size"], around=encodes)
        self._machine = mil.Machine(program, "float64", exact_states=True)
        self._function = program.functions["main" if encodes else "prefill"]
        self._batch, self._most = said["batch"], facts.context if encodes else said["chunk"]
        self._operators = {
            name: operation.op
            for operation in self._function.operations
            for name, kind in operation.outputs
            if kind.dtype in ("fp16", "fp32") and name.replace("__", ".").startswith(_PARTS)
        }

    def trace(self, ids: Sequence[int], out: str) -> dict[str, Shown]:
        """As TracedSession says."""
        tokens = len(ids)
        if not 1 <= tokens <= self._most:
            raise TapeoutError(f"{tokens} tokens do not fit the {self._most} of one call of the package.")
        rows = np.tile(np.array(ids, np.int32), (self._batch, 1))
        inputs: dict[str, npt.NDArray[Any]] = {"inputIds": rows}
        state = None
        if self._function.name == "main":
            inputs["attentionMask"] = np.ones_like(rows)
        else:
            inputs["causalMask"] = np.zeros((self._batch, 1, tokens, tokens), np.float16)
            state = self._machine.new_state()
        values = self._machine.run(self._function.name, inputs, state, show=list(self._operators))
        found: dict[str, Shown] = {}
        for name, operator in self._operators.items():
            value, stable = values[name], name.replace("__", ".")
            array = value[0] if value.ndim > 2 else value
            if stable.endswith(".scores"):
                array = array[..., -tokens:].reshape(-1, tokens, tokens)
                array = np.where(array < _HIDDEN, np.nan, array)
            elif stable.endswith(".rope"):
                array = array.reshape(tokens, -1)
            whole = (array.ndim > 1 and array.shape[0] in (1, tokens)) or stable.endswith(".scores")
            if whole and save(out, stable, array):
                found[stable] = Shown(operator)
        return found

    def close(self) -> None:
        """Free the model; may be called twice."""


def open_traced(directory: str) -> TracedCoreml:
    """Load ``model.mlpackage`` with every named value in sight; errors as of ``open_session``."""
    begin = perf_counter()
    program, said, tokenizer = _loaded(directory)
    facts = Facts(
        "interpreter of MIL, float64", "cpu", perf_counter() - begin, 0, said["context"], emulated=True
    )
    return TracedCoreml(facts, program, tokenizer, said)
