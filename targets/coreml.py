"""Sessions on a Core ML package: what the apple target runs its packages with.

On a Mac it is Core ML itself, through coremltools. Anywhere else it is the interpreter of ``tapeout.validate.mil``, which reads the
saved files alone: what they mean in float64, or as a device would compute it in float16.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import psutil

from tapeout.errors import MissingToolchain, PackageError, RuntimeCrash, TapeoutError
from tapeout.exporters import coreml
from tapeout.validate import mil
from tapeout.validate.encoders import check_batch
from tapeout.validate.given import check_ids, encoded
from tapeout.validate.primitives import save
from tapeout.validate.session import Facts, Logits, Shown

__all__ = ["CoremlDecoder", "CoremlEncoder", "TracedCoreml", "native", "open_session", "open_traced"]

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
_UNITS = {"all": "ALL", "cpu-and-gpu": "CPU_AND_GPU", "cpu-and-ne": "CPU_AND_NE", "cpu-only": "CPU_ONLY"}
_INPUTS = ("inputIds", "attentionMask", "fullAttentionMask", "hiddenStates")


def native() -> bool:
    """Whether this machine has Core ML."""
    return platform.system() == "Darwin"


class Engine(Protocol):
    """What runs the functions of a package over one state."""

    def run(self, function: str, inputs: Arrays) -> Array:
        """The function's one output."""

    def reset(self) -> None:
        """All states zero."""


class Interpreted:
    """The interpreter; in float16, a value that float16 cannot hold is a crash with its name."""

    def __init__(self, programs: Sequence[mil.Program], precision: mil.Precision) -> None:
        self._exact = precision == "float64"
        self._machines = [mil.Machine(program, precision, exact_states=self._exact) for program in programs]
        self.reset()

    def run(self, function: str, inputs: Arrays) -> Array:
        """As Engine says; RuntimeCrash names a value beyond float16's range, which is none in float64."""
        return _in_turn(
            inputs,
            [
                (
                    list(machine.program.functions[function].inputs),
                    partial(self._call, machine, state, function),
                )
                for machine, state in zip(self._machines, self._states, strict=True)
            ],
        )

    def _call(self, machine: mil.Machine, state: mil.State, function: str, inputs: Arrays) -> Array:
        (out,) = machine.run(function, inputs, state).values()
        for name, peak in ({} if self._exact else machine.overflows()).items():
            raise RuntimeCrash(
                f"{name.replace('__', '.')} reaches {peak:.0f}, which float16 (up to {mil.LARGEST:.0f}) cannot hold: on a device it is infinite."
            )
        return out

    def peaks(self) -> dict[str, float]:
        """The largest magnitude so far of each float16 value, before it is rounded, by the graph's name or the operator's own."""
        found: dict[str, float] = {}
        for machine in self._machines:
            for name, peak in machine.overflows(0.0).items():
                stable = name.replace("__", ".")
                found[stable] = max(peak, found.get(stable, 0.0))
        return found

    def reset(self) -> None:
        """All states zero."""
        self._states = [machine.new_state() for machine in self._machines]


class Native:
    """Core ML on a Mac."""

    def __init__(self, paths: Sequence[Path], programs: Sequence[mil.Program], units: str) -> None:
        import coremltools

        unit = getattr(coremltools.ComputeUnit, _UNITS[units])
        self._programs = programs
        self._parts = []
        for path, program in zip(paths, programs, strict=True):
            several = len(program.functions) > 1
            try:
                with warnings.catch_warnings():
                    # coremltools only warns when Core ML refuses a model, and fails at the first call in other words.
                    warnings.filterwarnings("error", message="You will not be able to run predict")
                    self._parts.append(
                        {
                            name: coremltools.models.MLModel(
                                str(path), compute_units=unit, function_name=name if several else None
                            )
                            for name in program.functions
                        }
                    )
            except Exception as error:  # Core ML's, in its own words
                raise RuntimeCrash(f"Core ML refuses {path}: {error}") from error
        self.reset()

    def run(self, function: str, inputs: Arrays) -> Array:
        """As Engine says."""
        return _in_turn(
            inputs,
            [
                (
                    list(program.functions[function].inputs),
                    partial(self._call, part[function], state, function),
                )
                for program, part, state in zip(self._programs, self._parts, self._states, strict=True)
            ],
        )

    def _call(self, model: Any, state: Any, function: str, inputs: Arrays) -> Array:
        try:
            (out,) = model.predict(dict(inputs), *([] if state is None else [state])).values()
        except Exception as error:  # Core ML's, in its own words
            raise RuntimeCrash(f"Core ML cannot run {function}: {error}") from error
        return cast(Array, out)

    def reset(self) -> None:
        """One state for all functions of a package: they are one program's."""
        self._states = [
            next(iter(part.values())).make_state() if len(part) > 1 else None for part in self._parts
        ]


def _in_turn(inputs: Arrays, parts: Iterable[tuple[Sequence[str], Callable[[Arrays], Array]]]) -> Array:
    """Call a model's packages one after the other: what one gives is the next one's hidden states."""
    given = dict(inputs)
    for names, call in parts:
        given["hiddenStates"] = call({name: given[name] for name in names})
    return given["hiddenStates"]


class _Worded:
    """A tokenizer beside a package."""

    facts: Facts

    def __init__(self, facts: Facts, tokenizer: Any, vocab_size: int, around: bool) -> None:
        self.facts, self._tokenizer, self._vocab_size, self._around = facts, tokenizer, vocab_size, around
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``; special tokens in it are recognised, and of an encoder those around it are added."""
        encoded(text)
        return list(self._tokenizer.encode(text, add_special_tokens=self._around).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens kept."""
        check_ids(ids, self._vocab_size)
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


class _Running(_Worded):
    """An engine, and a tokenizer beside it."""

    _around = False

    def __init__(self, facts: Facts, engine: Engine, tokenizer: Any, said: Mapping[str, int]) -> None:
        super().__init__(facts, tokenizer, said["vocab_size"], self._around)
        self._engine: Engine | None = engine
        self._batch, self._chunk = said["batch"], said["chunk"]
        self._length = 0

    def peaks(self) -> dict[str, float]:
        """As ``Lowering`` says, of the interpreter."""
        assert isinstance(self._engine, Interpreted)
        return self._engine.peaks()

    def close(self) -> None:
        """Free the model; may be called twice."""
        self._engine = None


class CoremlDecoder(_Running):
    """A Session on a decoder's package; see ``open_session``."""

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append tokens to the sequence, chunk by chunk; return float32 [tokens, vocab], the logits after each."""
        self._room(ids)
        parts = [self._step("prefill", ids[at : at + self._chunk]) for at in range(0, len(ids), self._chunk)]
        return np.concatenate(parts) if parts else np.empty((0, self._vocab_size), np.float32)

    def append(self, ids: Sequence[int]) -> Logits:
        """``prefill`` for those who want the last token's logits only, float32 [1, vocab]."""
        self._room(ids)
        if not ids:
            raise TapeoutError("no token is appended, and so there is no last one; what fits: one or more.")
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

    def _room(self, ids: Sequence[int]) -> None:
        check_ids(ids, self._vocab_size)
        if self._length + len(ids) > self.facts.context:
            raise TapeoutError(
                f"{self._length + len(ids)} tokens do not fit the context of {self.facts.context}."
            )

    def _step(self, function: str, ids: Sequence[int]) -> Logits:
        """A call with the same tokens in every row of the batch, and a mask of zeros: the program hides what comes later."""
        assert self._engine
        count, total = len(ids), self._length + len(ids)
        inputs: Arrays = {
            "inputIds": np.tile(np.array(ids, np.int32), (self._batch, 1)),
            "fullAttentionMask": np.zeros((self._batch, 1, count, total), np.float16),
        }
        out = self._engine.run(function, inputs)
        self._length = total
        return cast(Logits, out[0].astype(np.float32))


class CoremlEncoder(_Running):
    """An EncoderSession on an encoder's package; see ``open_session``."""

    _around = True

    def encode(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]) -> Logits:
        """What the model gives of a batch; see EncoderSession. The package's own batch is static: rows go through it in turn."""
        assert self._engine
        rows, seen = check_batch(ids, mask, self._vocab_size, self.facts.context)
        found = []
        for at in range(0, len(rows), self._batch):
            part = np.arange(at, at + self._batch).clip(
                max=len(rows) - 1
            )  # the last row again, where there are too few
            inputs: Arrays = {
                "inputIds": rows[part].astype(np.int32),
                "attentionMask": seen[part].astype(np.int32),
            }
            found.append(self._engine.run("main", inputs).astype(np.float32))
        return np.concatenate(found)[: len(rows)]


def open_session(
    directory: str, precision: mil.Precision = "float16", units: str | None = None
) -> CoremlDecoder | CoremlEncoder:
    """Load ``model.mlpackage``, or the packages that a model was cut into.

    Args:
        directory: where they stand, with ``tokenizer.json``.
        precision: of the interpreter: float16 as on a device, or float64 for what the files mean, states and all.
        units: compute units of Core ML, which runs the package then; None: the interpreter does.

    Raises:
        MissingToolchain: coremltools is not installed, or Core ML is asked for where there is none. PackageError: no such file, or
            one that is damaged. RuntimeCrash: Core ML refuses the package.
    """
    begin, before = perf_counter(), psutil.Process().memory_info().rss
    paths, programs, said, tokenizer = _loaded(directory)
    engine: Engine
    if units is None:
        engine, runtime = Interpreted(programs, precision), f"interpreter of MIL, {precision}"
        device = "cpu, checked by the interpreter; not run on Apple hardware"
    elif native():
        engine = Native(paths, programs, units)
        runtime, device = f"Core ML, macOS {platform.mac_ver()[0]}", f"{platform.machine()}, {units}"
    else:
        raise MissingToolchain("Core ML is on macOS only: run check.py of the package on a Mac.")
    resident = max(0, psutil.Process().memory_info().rss - before)
    facts = Facts(runtime, device, perf_counter() - begin, resident, said["context"], emulated=units is None)
    kind = CoremlEncoder if "main" in programs[0].functions else CoremlDecoder
    return kind(facts, engine, tokenizer, said)


def _loaded(directory: str) -> tuple[list[Path], list[mil.Program], dict[str, int], Any]:
    """The packages in turn, their programs, what the first one's metadata says in numbers, and the tokenizer beside them."""
    from tokenizers import Tokenizer

    words = Path(directory) / "tokenizer.json"
    if not words.is_file():
        raise PackageError(f"{words} is absent; there is nothing to tokenize with.")
    paths = coreml.packages_in(Path(directory))
    programs = [mil.load(path) for path in paths]
    for path, program in zip(paths, programs, strict=True):
        for name, function in program.functions.items():
            if other := sorted(set(function.inputs) - set(_INPUTS)):
                raise PackageError(
                    f"{path} wants {', '.join(other)} in {name}; what tapeout gives is {', '.join(_INPUTS)}. A package from before the mask "
                    "causalMask was named fullAttentionMask must be exported again: tapeout export apple."
                )
    keys = ("context", "batch", "chunk", "vocab_size")
    said = {key: programs[0].metadata.get(f"co.tapeout.{key}", "0") for key in keys}
    if not all(value.isdecimal() for value in said.values()) or said["context"] == "0":
        raise PackageError(f"{paths[0]} does not say what it was made for: {said}.")
    return paths, programs, {key: int(value) for key, value in said.items()}, Tokenizer.from_file(str(words))


_PARTS = ("embedding", "layers.", "norm", "head", "logits", "pooled", "dense", "sentence_embedding", "last_hidden_state")  # fmt: skip
"""What the graph's own names begin with."""
_HIDDEN = -5e8  # half of what is added to a score that is not looked at


class TracedCoreml(_Worded):
    """A TracedSession on the interpreter in float64; see ``open_traced``."""

    def __init__(
        self, facts: Facts, programs: Sequence[mil.Program], tokenizer: Any, said: Mapping[str, int]
    ) -> None:
        self._name = "main" if "main" in programs[0].functions else "prefill"
        super().__init__(facts, tokenizer, said["vocab_size"], around=self._name == "main")
        self._machines = [mil.Machine(program, "float64", exact_states=True) for program in programs]
        self._batch = said["batch"]

    def trace(self, ids: Sequence[int], out: str) -> dict[str, Shown]:
        """As TracedSession says."""
        tokens = len(ids)
        if not 1 <= tokens <= self.facts.context:
            raise TapeoutError(
                f"{tokens} tokens do not fit the {self.facts.context} of one call of the package."
            )
        rows = np.tile(np.array(ids, np.int32), (self._batch, 1))
        given: dict[str, Array] = {
            "inputIds": rows,
            "attentionMask": np.ones_like(rows),
            "fullAttentionMask": np.zeros((self._batch, 1, tokens, tokens), np.float16),
        }
        found: dict[str, Shown] = {}
        for machine in self._machines:
            function = machine.program.functions[self._name]
            operators = _named(function)
            inputs = {name: given[name] for name in function.inputs}
            values = machine.run(self._name, inputs, machine.new_state(), show=list(operators))
            given["hiddenStates"] = next(iter(values.values()))
            for name, operator in operators.items():
                stable = name.replace("__", ".")
                array = _rows_of(values[name], stable, tokens)
                if array is not None and save(out, stable, array):
                    found[stable] = Shown(operator)
        return found

    def close(self) -> None:
        """Free the model; may be called twice."""
        self._machines = []


def _named(function: mil.Function) -> dict[str, str]:
    """The values that have a name of the graph, and what makes each."""
    return {
        name: operation.op
        for operation in function.operations
        for name, kind in operation.outputs
        if kind.dtype in ("fp16", "fp32") and name.replace("__", ".").startswith(_PARTS)
    }


def _rows_of(value: Array, name: str, tokens: int) -> Array | None:
    """The first sequence of the batch, [tokens, width] or scores [heads, tokens, tokens]; None: a constant of another shape."""
    array = value[0] if value.ndim > 2 else value
    if name.endswith(".scores"):
        array = array[..., -tokens:].reshape(-1, tokens, tokens)
        return np.where(array < _HIDDEN, np.nan, array)
    if name.endswith(".rope"):
        return array.reshape(tokens, -1)
    return array if array.ndim > 1 and array.shape[0] in (1, tokens) else None


def open_traced(directory: str) -> TracedCoreml:
    """Load the packages with every named value in sight; errors as of ``open_session``. Its context is one call of the package."""
    begin = perf_counter()
    _, programs, said, tokenizer = _loaded(directory)
    most = said["context"] if "main" in programs[0].functions else said["chunk"]
    facts = Facts("interpreter of MIL, float64", "cpu", perf_counter() - begin, 0, most, emulated=True)
    return TracedCoreml(facts, programs, tokenizer, said)
