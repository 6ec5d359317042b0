"""Runs a loaded program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tapeout.errors import PackageError, TapeoutError, nearest
from tapeout.validate.mil.constexpr import CONSTEXPR
from tapeout.validate.mil.ops import MOVES, OPS, TUPLES
from tapeout.validate.mil.program import NUMPY, Constant, Function, Operation, Program, Type

__all__ = ["LARGEST", "Machine", "Precision", "State"]

Array = npt.NDArray[Any]
Precision = Literal["float64", "float16"]
State = dict[str, Array]

LARGEST = 65504.0  # of float16
_FLOATS = ("fp16", "fp32")


@dataclass(frozen=True)
class _Step:
    """An operation.

    Attributes:
        last: the values that nothing reads after it.
        moves: its floats are some that it reads, of the same type: rounded already.
    """

    operation: Operation
    last: tuple[str, ...]
    moves: bool


@dataclass(frozen=True)
class _Plan:
    """A function made ready.

    Attributes:
        constants: the operations that need no input, by each of their outputs.
        steps: the others.
        types: of every value.
    """

    function: Function
    constants: Mapping[str, Operation]
    steps: tuple[_Step, ...]
    types: Mapping[str, Type]


class Machine:
    """Runs the functions of a program in numpy.

    ``float64``: every float is a float64, whatever its type; the values are what the program means. ``float16``: an operation's
    result is rounded to its type, float16 or float32, once; inside it float32 is computed with, and sums of products are
    float32 (BLAS), as hardware with wide accumulators does it.

    Args:
        program: what ``load`` gave.
        exact_states: in float64, states keep what is written instead of rounding it to their type.
        budget: bytes of weights that are kept when they have been computed; beyond them a weight is computed at each use.

    Attributes:
        peaks: for each float value that was computed, not only moved, its largest finite magnitude so far, before it is rounded.

    Raises:
        PackageError: an operation or a parameter of one is not known.
    """

    def __init__(
        self,
        program: Program,
        precision: Precision = "float64",
        *,
        exact_states: bool = False,
        budget: int = 2 << 30,
    ) -> None:
        self.program, self.precision = program, precision
        self.peaks: dict[str, float] = {}
        self._exact, self._budget = exact_states, budget
        self._float = np.float64 if precision == "float64" else np.float32
        self._weights: dict[object, tuple[Array | str, ...]] = {}
        self._held = 0
        self._plans = {name: _plan(function) for name, function in program.functions.items()}

    def new_state(self) -> State:
        """Zeros for every state of every function; ``run`` replaces its arrays and never writes into one, so a copy is ``dict(state)``."""
        return {
            name: np.zeros([size or 0 for size in type_.shape], self._float)
            for function in self.program.functions.values()
            for name, type_ in function.states.items()
        }

    def run(
        self,
        function: str | None,
        inputs: Mapping[str, npt.ArrayLike],
        state: State | None = None,
        show: Sequence[str] = (),
    ) -> dict[str, Array]:
        """Run one function.

        Args:
            function: its name; None: the default one.
            inputs: an array of the declared type for each; in float64 any float array serves for floats.
            state: what ``new_state`` gave; changed.
            show: names of values that are returned too.

        Returns:
            Outputs, and what is shown, by name: integers and bools of their type, floats of their type in float16 and as float64
            in float64.

        Raises:
            TapeoutError: an input, a state, a function or a shown value is not what the program has.
            PackageError: an operation cannot do what it is told, or gives something else than its type says.
        """
        plan = self._plans[self.program.function(function or self.program.default).name]
        if unknown := [name for name in show if name not in plan.types]:
            raise TapeoutError(
                f"function '{plan.function.name}' has no value '{unknown[0]}'{nearest(unknown[0], plan.types)}."
            )
        values: dict[str, Array] = self._inputs(plan.function, inputs)
        held = self._state(plan.function, state)
        kept = {*show, *plan.function.outputs}
        found = {name: values[name] for name in kept & set(values)}
        with np.errstate(all="ignore"):
            for step in plan.steps:
                made = self._do(plan, step, values, held)
                values.update(made)
                found.update({name: value for name, value in made.items() if name in kept})
                for name in step.last:
                    values.pop(name, None)
            for name in kept - set(found):
                found[name] = self._array(plan, name, values)
        return {name: self._given(found[name], plan.types[name]) for name in [*plan.function.outputs, *show]}

    def overflows(self, share: float = 1.0) -> dict[str, float]:
        """The float16 values whose peak is above ``share`` of what float16 holds, the largest first."""
        halves = {
            name
            for plan in self._plans.values()
            for name, type_ in plan.types.items()
            if type_.dtype == "fp16"
        }
        found = {name: peak for name, peak in self.peaks.items() if name in halves and peak > share * LARGEST}
        return dict(sorted(found.items(), key=lambda each: -each[1]))

    def _inputs(self, function: Function, inputs: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
        for name in inputs:
            if name not in function.inputs:
                raise TapeoutError(
                    f"function '{function.name}' takes no '{name}'{nearest(name, function.inputs)}."
                )
        values = {}
        for name, declared in function.inputs.items():
            if name not in inputs:
                raise TapeoutError(f"function '{function.name}' lacks its input '{name}', {declared}.")
            value = np.asarray(inputs[name])
            float_too = self.precision == "float64" and declared.dtype in _FLOATS and value.dtype.kind == "f"
            if not (value.dtype == NUMPY[declared.dtype] or float_too) or not declared.fits(value.shape):
                raise TapeoutError(
                    f"input '{name}' of function '{function.name}' is {declared}; found {value.dtype} {list(value.shape)}."
                )
            values[name] = value.astype(self._float) if declared.dtype in _FLOATS else value
        return values

    def _state(self, function: Function, state: State | None) -> State:
        if function.states and state is None:
            raise TapeoutError(
                f"function '{function.name}' needs a state: {', '.join(function.states)} (new_state())."
            )
        for name, type_ in function.states.items():
            assert state is not None
            if name not in state or not type_.fits(state[name].shape):
                found = list(state[name].shape) if name in state else "none"
                raise TapeoutError(f"state '{name}' of function '{function.name}' is {type_}; found {found}.")
        return {} if state is None else state

    def _given(self, value: Array, type_: Type) -> Array:
        dtype = self._float if self.precision == "float64" and type_.dtype in _FLOATS else NUMPY[type_.dtype]
        return value.astype(dtype)

    def _do(self, plan: _Plan, step: _Step, values: Mapping[str, Array], state: State) -> dict[str, Array]:
        """The outputs of one step."""
        operation = step.operation
        if operation.op == "read_state":
            return {operation.outputs[0][0]: state[_state_of(operation)]}
        if operation.op == "write_state":
            name = _state_of(operation)
            state[name] = self._written(plan, operation, self._array(plan, _value_of(operation), values))
            return {}
        arguments = {
            parameter: self._argument(plan, parameter, bound, values)
            for parameter, bound in operation.inputs.items()
        }
        made = self._call(plan.function, operation, arguments)
        if step.moves:
            return {name: value for (name, _), value in zip(operation.outputs, made, strict=True)}
        self._note(operation, made)
        return {
            name: self._typed(value, type_.dtype)
            for (name, type_), value in zip(operation.outputs, made, strict=True)
        }

    def _written(self, plan: _Plan, operation: Operation, value: Array) -> Array:
        type_ = plan.function.states[_state_of(operation)]
        if not type_.fits(value.shape):
            raise PackageError(
                f"{_where(plan.function, operation)}: writes {list(value.shape)} to state '{_state_of(operation)}', {type_}."
            )
        half = self.precision == "float16"
        if (self._exact and not half) or (half and plan.types[_value_of(operation)].dtype == type_.dtype):
            return value
        return value.astype(NUMPY[type_.dtype]).astype(self._float)

    def _argument(
        self, plan: _Plan, parameter: str, bound: Sequence[str | Constant], values: Mapping[str, Array]
    ) -> Any:
        found = [
            self._array(plan, each, values) if isinstance(each, str) else self._stored(each) for each in bound
        ]
        return found if parameter in TUPLES else found[0]

    def _array(self, plan: _Plan, name: str, values: Mapping[str, Array]) -> Any:
        """A value that a step has made, or a constant."""
        if name in values:
            return values[name]
        operation = plan.constants[name]
        outputs = [output for output, _ in operation.outputs]
        return self._constant(plan, operation)[outputs.index(name)]

    def _stored(self, constant: Constant) -> Array | str:
        value = self.program.value(constant)
        return value if isinstance(value, str) else self._typed(value, constant.type.dtype)

    def _constant(self, plan: _Plan, operation: Operation) -> tuple[Any, ...]:
        """The outputs of an operation without inputs, computed once if they fit the budget."""
        key = self._key(plan, operation)
        if key in self._weights:
            return self._weights[key]
        if operation.op == "const":
            value = operation.inputs["val"][0]
            assert isinstance(value, Constant)
            made: tuple[Any, ...] = (self._stored(value),)
        else:
            arguments = {
                parameter: self._argument(plan, parameter, bound, {})
                for parameter, bound in operation.inputs.items()
            }
            made = tuple(
                self._typed(value, type_.dtype)
                for value, (_, type_) in zip(
                    self._call(plan.function, operation, arguments), operation.outputs, strict=True
                )
            )
        size = sum(each.nbytes for each in made if not isinstance(each, str))
        if self._held + size <= self._budget:
            self._weights[key], self._held = made, self._held + size
        return made

    def _key(self, plan: _Plan, operation: Operation) -> object:
        """One for what is the same weight in two functions: what is read of which blobs."""
        parts: list[object] = [operation.op]
        for parameter, bound in sorted(operation.inputs.items()):
            for each in bound:
                if isinstance(each, str):
                    parts.append((parameter, self._key(plan, plan.constants[each])))
                elif each.file is None:
                    parts.append((parameter, id(each)))
                else:
                    parts.append((parameter, each.file, each.offset, each.type))
        return tuple(parts)

    def _call(
        self, function: Function, operation: Operation, arguments: Mapping[str, Any]
    ) -> tuple[Array, ...]:
        """What the operation gives, held against its types."""
        kernel = (CONSTEXPR if operation.op in CONSTEXPR else OPS)[operation.op]
        try:
            result = kernel(**arguments)
        except (ValueError, IndexError, TypeError) as error:
            raise PackageError(f"{_where(function, operation)}: {error}.") from error
        made = tuple(np.asarray(each) for each in (result if isinstance(result, tuple) else (result,)))
        if len(made) != len(operation.outputs):
            raise PackageError(
                f"{_where(function, operation)}: gives {len(made)} values for {len(operation.outputs)}."
            )
        for (name, type_), value in zip(operation.outputs, made, strict=True):
            if not type_.fits(value.shape) or not _same_kind(value, type_.dtype):
                raise PackageError(
                    f"{_where(function, operation)}: '{name}' is declared {type_}, found {value.dtype} {list(value.shape)}."
                )
        return made

    def _note(self, operation: Operation, made: Iterable[Array]) -> None:
        for (name, type_), value in zip(operation.outputs, made, strict=True):
            if type_.dtype in _FLOATS and value.size:
                peak = max(float(value.max()), -float(value.min()))
                if not np.isfinite(peak):
                    peak = float(np.max(np.abs(value), where=np.isfinite(value), initial=0.0))
                self.peaks[name] = max(peak, self.peaks.get(name, 0.0))

    def _typed(self, value: Array, dtype: str) -> Array:
        """Rounded to its type, in what the machine computes with."""
        if dtype not in _FLOATS:
            return value.astype(NUMPY[dtype], copy=False)
        if self.precision == "float16" and dtype == "fp16" and value.dtype != np.float16:
            value = value.astype(np.float16)
        return value.astype(self._float, copy=False)


def _same_kind(value: Array, dtype: str) -> bool:
    """Whether a result is a float, a bool or an integer, as its type says."""
    wanted = "f" if dtype in _FLOATS else "b" if dtype == "bool" else "iu"
    return value.dtype.kind in wanted


def _where(function: Function, operation: Operation) -> str:
    return f"function '{function.name}', '{operation.name}' ({operation.op})"


def _state_of(operation: Operation) -> str:
    (name,) = operation.inputs["input"]
    assert isinstance(name, str)
    return name


def _value_of(operation: Operation) -> str:
    (name,) = operation.inputs["data"]
    assert isinstance(name, str)
    return name


def _plan(function: Function) -> _Plan:
    """Sort a function's operations into constants and steps, and find where each value is read last."""
    constants: dict[str, Operation] = {}
    steps: list[Operation] = []
    types: dict[str, Type] = {}
    known = set(function.inputs)
    for operation in function.operations:
        where = _where(function, operation)
        fault = _fault(operation)
        if fault:
            raise PackageError(f"{where}: {fault}.")
        read = [each for bound in operation.inputs.values() for each in bound if isinstance(each, str)]
        if operation.op in ("read_state", "write_state"):
            if (state := _state_of(operation)) not in function.states:
                raise PackageError(f"{where}: '{state}' is no state of the function.")
            read.remove(state)
        if missing := [name for name in read if name not in known]:
            raise PackageError(f"{where}: reads '{missing[0]}', which nothing has made.")
        for name, type_ in operation.outputs:
            if name in known:
                raise PackageError(f"{where}: makes '{name}' a second time.")
            known.add(name)
            types[name] = type_
        if operation.op in CONSTEXPR or operation.op == "const":
            if any(name not in constants for name in read):
                raise PackageError(f"{where}: reads what is not constant.")
            constants.update(dict.fromkeys((name for name, _ in operation.outputs), operation))
        else:
            steps.append(operation)
    last: dict[str, int] = {}
    for index, operation in enumerate(steps):
        for bound in operation.inputs.values():
            last.update({each: index for each in bound if isinstance(each, str)})
        last.update({name: index for name, _ in operation.outputs if name not in last})
    dead: list[list[str]] = [[] for _ in steps]
    for name, index in last.items():
        dead[index].append(name)
    types |= {
        name: Type(each.dtype, tuple(None for _ in (each.shapes[0] if each.shapes else each.ranges)))
        for name, each in function.inputs.items()
    }
    ready = tuple(
        _Step(each, tuple(names), _moves(each, types)) for each, names in zip(steps, dead, strict=True)
    )
    return _Plan(function, constants, ready, types)


def _moves(operation: Operation, types: Mapping[str, Type]) -> bool:
    read = {
        (each.type if isinstance(each, Constant) else types[each]).dtype
        for bound in operation.inputs.values()
        for each in bound
        if isinstance(each, Constant) or each in types  # a state is in none
    }
    made = {type_.dtype for _, type_ in operation.outputs}
    return operation.op in MOVES and read & set(_FLOATS) == made


def _fault(operation: Operation) -> str:
    """Why an operation cannot run; empty: it can."""
    if operation.op in ("const", "read_state", "write_state"):
        wants = {"const": {"val"}, "read_state": {"input"}, "write_state": {"input", "data"}}[operation.op]
        return (
            ""
            if set(operation.inputs) == wants
            else f"has parameters {sorted(operation.inputs)}, not {sorted(wants)}"
        )
    if operation.op in CONSTEXPR:
        return CONSTEXPR.wrong(operation.op, operation.inputs)
    if operation.op in OPS:
        return OPS.wrong(operation.op, operation.inputs)
    if operation.op == "coreml_update_state":
        return "is an op of coremltools' builder, which is saved as write_state and read_state"
    return f"the interpreter does not know this op{nearest(operation.op, [*OPS, *CONSTEXPR])}"
