"""The reference of plain modules: the program that torch.export made of one, run by torch on the model's samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError, TapeoutError
from tapeout.models import Model
from tapeout.models.module import PROGRAM, SAMPLES
from tapeout.quantize import Quantized
from tapeout.validate.session import Facts, Logits

__all__ = ["ModuleReference", "Samples", "program", "rows"]

Round = Callable[[Any], Any]


class Samples:
    """The inputs that a module's directory, or its package, holds: ``N.NAME`` in ``samples.safetensors``."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._by_number: dict[int, dict[str, Any]] = {}
        for key, value in arrays.items():
            number, _, name = key.partition(".")
            self._by_number.setdefault(int(number), {})[name] = value

    def __len__(self) -> int:
        return len(self._by_number)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Inputs by name; TapeoutError when there is no such sample."""
        if number not in self._by_number:
            raise TapeoutError(f"there is no sample {number}; the model has 0 … {len(self) - 1}.")
        return self._by_number[number]


def rows(output: npt.NDArray[Any]) -> Logits:
    """An output of any shape as float32 [rows, width], its last axis kept."""
    return np.asarray(output, np.float32).reshape(-1, output.shape[-1] if output.ndim else 1)


class ModuleReference:
    """A ModuleSession on torch."""

    def __init__(self, source: Model, run: Callable[..., Any], facts: Facts) -> None:
        from safetensors.torch import load_file

        self.facts = facts
        self._run, self._samples = run, Samples(load_file(source.directory / SAMPLES))
        self._last: tuple[int, list[Logits]] = (-1, [])

    def infer(self, sample: int, output: int) -> Logits:
        """What the module gives of a sample; see ModuleSession."""
        import torch
        from torch.utils import _pytree as pytree

        if self._last[0] != sample:
            with torch.inference_mode():
                found = pytree.tree_leaves(self._run(self._samples[sample]))
            self._last = sample, [rows(each.float().numpy()) for each in found]
        return self._last[1][output]

    def close(self) -> None:
        """Free the program."""
        self._run = lambda given: []


def program(
    source: Model,
    quant: Quantized | None,
    how: Callable[[Quantized, str], Round | None] | None,
    *,
    double: bool,
) -> Callable[[Mapping[str, Any]], Any]:
    """The module as a function of its inputs by name.

    Args:
        source: the model.
        quant: whose codes are the weights; None: the module's own.
        how: gives of each quantized weight what rounds the inputs of its matmuls; None: nothing is rounded.
        double: every float is float64, weights and results.

    Raises:
        ModelError: the program that was kept cannot be read, or lacks a weight.
    """
    import torch

    try:
        loaded = torch.export.load(source.directory / PROGRAM)
    except Exception as error:  # of zip, pickle and torch's own
        raise ModelError(
            f"{source.directory / PROGRAM} cannot be read: {error}. Delete {source.directory} and run again."
        ) from error
    network = loaded.module(check_guards=False)
    names = list(loaded.graph_signature.user_inputs)
    rounds: dict[int, Round] = {}
    if quant is not None:
        _dequantize(network, quant, how, rounds)
    step = _Steps(torch, network, rounds, double=double)

    def run(given: Mapping[str, Any]) -> Any:
        return step(*(given[name] for name in names))

    return run


def _dequantize(
    network: Any,
    quant: Quantized,
    how: Callable[[Quantized, str], Round | None] | None,
    rounds: dict[int, Round],
) -> None:
    import torch

    config = quant.model.config
    state = {**dict(network.named_buffers()), **dict(network.named_parameters(remove_duplicate=False))}
    others: dict[str, list[str]] = {}
    for name, kept in config.same.items():  # type: ignore[union-attr]
        others.setdefault(kept, []).append(name)
    for name, scheme in quant.schemes.items():
        if scheme.kind == "none":
            continue
        weight = quant.float32(name)
        tensor = torch.from_numpy(
            np.ascontiguousarray(weight.T) if quant.model.checkpoint[name].turned else weight
        )
        for each in (name, *others.get(name, ())):
            if each not in state:
                raise ModelError(f"the program of {quant.model.name} has no parameter {each}.")
            state[each].data = tensor
        if how and (rounded := how(quant, name)):
            rounds[tensor.untyped_storage().data_ptr()] = rounded


class _Steps:
    """Runs a program node by node, where something is done to what the nodes take or give."""

    def __init__(self, torch: Any, network: Any, rounds: Mapping[int, Round], *, double: bool) -> None:
        self._network = network
        self._interpreter: Any = None
        if not rounds and not double:
            return
        ops = torch.ops.aten
        factors = {ops.linear.default: 0, ops.matmul.default: 0, ops.mm.default: 0, ops.addmm.default: 1}

        class Interpreter(torch.fx.Interpreter):  # type: ignore[misc]
            def run_node(self, node: Any) -> Any:
                found = super().run_node(node)
                if double and isinstance(found, torch.Tensor) and found.dtype == torch.float32:
                    return found.double()
                return found

            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                at = factors.get(target)
                if at is not None and (rounded := rounds.get(args[at + 1].untyped_storage().data_ptr())):
                    args = (*args[:at], rounded(args[at]), *args[at + 1 :])
                return super().call_function(target, args, kwargs)

        self._interpreter = Interpreter(network)
        # The order of the program's own inputs, whether the module takes them by place or by name.
        self._interpreter.garbage_collect_values = True

    def __call__(self, *given: Any) -> Any:
        if self._interpreter is None:
            spec = self._network._in_spec
            order = list(spec.child(1).context) if spec.child(1).num_children else []
            if order:
                return self._network(**dict(zip(order, given, strict=True)))
            return self._network(*given)
        return self._interpreter.run(*given, enable_io_processing=False)
