"""MLIR as text, in IREE's input dialects: parameters, the caches, and functions made of ``linalg.generic`` over them.

What a value is computed from is said as in einsum: one letter a dimension, and those that the result has not are summed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

SCOPE = "model"
"""Of the parameters, by which a runtime is told where to find them."""


@dataclass(frozen=True)
class Value:
    """A tensor in a function: its name there, its shape, and the type of its elements."""

    name: str
    shape: tuple[int, ...]
    kind: str = "f32"

    @property
    def type(self) -> str:
        """As MLIR writes it."""
        return tensor_type(self.shape, self.kind)


def tensor_type(shape: Sequence[int], kind: str) -> str:
    """``tensor<2x3xf32>``."""
    return f"tensor<{''.join(f'{size}x' for size in shape)}{kind}>"


def literal(value: float) -> str:
    """A float32 as its bits, which no printer rounds."""
    return f"0x{int(np.float32(value).view(np.uint32)):08X}"


@dataclass
class Module:
    """A module in the making.

    Attributes:
        parameters: of each named parameter its shape and element type.
        caches: of each cache its shape, float32.
        functions: texts.
    """

    parameters: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    caches: dict[str, tuple[int, ...]] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The whole module."""
        lines = [
            f'util.global private @"{name}" = #flow.parameter.named<"{SCOPE}"::"{name}"> : {tensor_type(*each)}'
            for name, each in self.parameters.items()
        ]
        # IREE 3.13 sees no store of what is updated in place: caches that are private, or begin alike, become one buffer.
        # What they begin with does not matter, since nobody looks at rows before they are written.
        lines += [
            f'util.global public mutable @"{name}" = dense<{at}.0> : {tensor_type(shape, "f32")}'
            for at, (name, shape) in enumerate(self.caches.items())
        ]
        return "module @decoder {\n" + "\n".join([*lines, *self.functions]) + "\n}\n"


class Function:
    """One function in the making; its arguments are tensors or scalars by their own names."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self._lines: list[str] = []
        self._loaded: dict[str, Value] = {}
        self._count = 0

    def finish(self, name: str, arguments: Mapping[str, str], result: Value) -> None:
        """Add the function to the module; ``arguments``: their types by name."""
        given = ", ".join(f"%{each}: {kind}" for each, kind in arguments.items())
        body = "\n".join(f"  {line}" for line in [*self._lines, f"return {result.name} : {result.type}"])
        self.module.functions.append(f"func.func @{name}({given}) -> {result.type} {{\n{body}\n}}")

    def note(self, text: str) -> None:
        """A comment: the graph's own name of what follows."""
        self._lines.append(f"// {text}")

    def let(self, expression: str, shape: Sequence[int], kind: str = "f32") -> Value:
        """A tensor by the operation that makes it, without its result."""
        return Value(self.scalar(expression), tuple(shape), kind)

    def scalar(self, expression: str) -> str:
        """The name of what an operation makes."""
        self._count += 1
        self._lines.append(f"%v{self._count} = {expression}")
        return f"%v{self._count}"

    def parameter(self, name: str, shape: Sequence[int], kind: str) -> Value:
        """A named parameter, declared where it is not yet."""
        self.module.parameters[name] = tuple(shape), kind
        return self._load(name, Value("", tuple(shape), kind))

    def _load(self, name: str, like: Value) -> Value:
        if name not in self._loaded:
            self._loaded[name] = self.let(f'util.global.load @"{name}" : {like.type}', like.shape, like.kind)
        return self._loaded[name]

    def cached(self, name: str, rows: int, new: Value, at: str) -> Value:
        """A cache [rows, …] with ``new`` [tokens, …] written into it at row ``at``, an index."""
        like = Value("", (rows, *new.shape[1:]))
        self.module.caches[name] = like.shape
        old = self._load(name, like)
        rest = len(new.shape) - 1
        where = f"[{', '.join([at, *['0'] * rest])}] [{', '.join(map(str, new.shape))}] [{', '.join(['1'] * len(new.shape))}]"
        whole = self.let(
            f"tensor.insert_slice {new.name} into {old.name}{where} : {new.type} into {old.type}", like.shape
        )
        self._lines.append(f'util.global.store {whole.name}, @"{name}" : {whole.type}')
        self._loaded[name] = whole
        return whole

    def rows(self, x: Value, at: str, count: int) -> Value:
        """``count`` rows from row ``at``, an index."""
        rest = x.shape[1:]
        where = (
            f"[{', '.join([at, *['0'] * len(rest)])}] [{', '.join(map(str, (count, *rest)))}] "
            f"[{', '.join(['1'] * len(x.shape))}]"
        )
        result = Value("", (count, *rest), x.kind)
        return self.let(
            f"tensor.extract_slice {x.name}{where} : {x.type} to {result.type}", result.shape, x.kind
        )

    def cut(self, x: Value, axis: int, begin: int, size: int) -> Value:
        """A part of an axis."""
        begins, sizes = [0] * len(x.shape), list(x.shape)
        begins[axis], sizes[axis] = begin, size
        where = f"{begins} {sizes} {[1] * len(sizes)}"
        return self.let(
            f"tensor.extract_slice {x.name}{where} : {x.type} to {tensor_type(sizes, x.kind)}", sizes, x.kind
        )

    def halves(self, x: Value, kind: str) -> Value:
        """The same memory, each byte as two elements of 4 bits, the lower one first."""
        result = Value("", (*x.shape[:-1], 2 * x.shape[-1]), kind)
        return self.let(f"iree_tensor_ext.bitcast {x.name} : {x.type} -> {result.type}", result.shape, kind)

    def joined(self, parts: Sequence[Value]) -> Value:
        """Tensors behind one another along their last axis."""
        first, at = parts[0], 0
        shape = (*first.shape[:-1], sum(part.shape[-1] for part in parts))
        whole = self.let(f"tensor.empty() : {tensor_type(shape, first.kind)}", shape, first.kind)
        for part in parts:
            begins = [0] * (len(shape) - 1) + [at]
            where = f"{begins} {list(part.shape)} {[1] * len(shape)}"
            whole = self.let(
                f"tensor.insert_slice {part.name} into {whole.name}{where} : {part.type} into {whole.type}",
                shape,
                first.kind,
            )
            at += part.shape[-1]
        return whole

    def shaped(self, x: Value, shape: Sequence[int]) -> Value:
        """The same elements in another shape, whose axes are groups of the old ones or the other way round."""
        if tuple(shape) == x.shape:
            return x
        assert math.prod(shape) == math.prod(x.shape), (x.shape, shape)
        result = Value("", tuple(shape), x.kind)
        if len(shape) > len(x.shape):
            groups = _groups(x.shape, shape)
            return self.let(
                f"tensor.expand_shape {x.name} {groups} output_shape {list(shape)} : {x.type} into {result.type}",
                shape,
                x.kind,
            )
        groups = _groups(shape, x.shape)
        return self.let(
            f"tensor.collapse_shape {x.name} {groups} : {x.type} into {result.type}", shape, x.kind
        )

    def constant(self, value: float) -> str:
        """A float32 scalar."""
        return self.scalar(f"arith.constant {literal(value)} : f32")

    def generic(
        self,
        spec: str,
        inputs: Sequence[Value],
        sizes: Mapping[str, int],
        body: str,
        *,
        kind: str = "f32",
        initial: float | int | None = None,
    ) -> Value:
        """One ``linalg.generic``.

        Args:
            spec: as in einsum: ``mgk,ngk->mn``. The result's letters stand in the order of the loops, then those summed over.
            inputs: as many as ``spec`` has before the arrow.
            sizes: of letters that no input has.
            body: operations, of which the last one is ``yield``; inputs are ``%a``, ``%b`` …, what is summed up so far ``%out``.
                Other values of the function may be named.
            kind: of the result.
            initial: what a sum begins with; None: nothing is summed up.
        """
        left, right = spec.replace(" ", "").split("->")
        operands = left.split(",") if left else []
        found = dict(sizes)
        for letters, value in zip(operands, inputs, strict=True):
            assert len(letters) == len(value.shape), (spec, letters, value)
            for letter, size in zip(letters, value.shape, strict=True):
                assert found.setdefault(letter, size) == size, (spec, letter, size, found)
        summed = [letter for letter in dict.fromkeys(left.replace(",", "")) if letter not in right]
        loops = [*right, *summed]
        shape = tuple(found[letter] for letter in right)
        maps = ", ".join(
            f"affine_map<({', '.join(loops)}) -> ({', '.join(letters)})>" for letters in [*operands, right]
        )
        kinds = ", ".join(['"parallel"'] * len(right) + ['"reduction"'] * len(summed))
        result = Value("", shape, kind)
        out = self.scalar(f"tensor.empty() : {result.type}")
        if initial is not None:
            start = self.scalar(
                f"arith.constant {literal(initial) if kind == 'f32' else int(initial)} : {kind}"
            )
            out = self.scalar(
                f"linalg.fill ins({start} : {kind}) outs({out} : {result.type}) -> {result.type}"
            )
        given = ", ".join(
            [f"%{chr(97 + at)}: {value.kind}" for at, value in enumerate(inputs)] + [f"%out: {kind}"]
        )
        ins = (
            f"ins({', '.join(value.name for value in inputs)} : {', '.join(value.type for value in inputs)}) "
            if inputs
            else ""
        )
        lines = [line.strip() for line in body.strip().split("\n")]
        assert lines[-1].startswith("yield "), body
        lines[-1] = f"linalg.{lines[-1]} : {kind}"
        text = "\n".join(f"    {line}" for line in lines)
        return self.let(
            f"linalg.generic {{indexing_maps = [{maps}], iterator_types = [{kinds}]}} {ins}"
            f"outs({out} : {result.type}) {{\n  ^bb0({given}):\n{text}\n  }} -> {result.type}",
            shape,
            kind,
        )


def _groups(coarse: Sequence[int], fine: Sequence[int]) -> list[list[int]]:
    """Which axes of ``fine`` each axis of ``coarse`` is made of."""
    found: list[list[int]] = []
    at = 0
    for size in coarse:
        group, product = [at], fine[at]
        at += 1
        while product < size:
            group.append(at)
            product *= fine[at]
            at += 1
        assert product == size, (coarse, fine)
        found.append(group)
    while at < len(fine):  # trailing ones
        assert fine[at] == 1, (coarse, fine)
        found[-1].append(at)
        at += 1
    return found
