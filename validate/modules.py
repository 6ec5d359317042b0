"""The reference of plain modules: the program that torch.export made of one, run by torch on the model's samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError, TapeoutError
from tapeout.models import Model
from tapeout.models.module import PROGRAM, SAMPLES
from tapeout.quantize import Quantized
from tapeout.validate import by_layer
from tapeout.validate.session import Facts, Logits, Shown

__all__ = ["ModuleReference", "Program", "Samples", "program", "rows"]

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

    def __init__(self, source: Model, run: Program, facts: Facts) -> None:
        from safetensors.torch import load_file

        self.facts = facts
        self._run: Callable[..., Any] = run
        self._program, self._samples = run, Samples(load_file(source.directory / SAMPLES))
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

    def trace(self, ids: Sequence[int], out: str) -> dict[str, Shown]:
        """Write what each layer gives of the sample ``ids[0]``, and its first output, to ``out``/NAME.npy; see ``by_layer``."""
        import torch

        (sample,) = ids
        with torch.inference_mode():
            found, output = self._program.layers(self._samples[sample])
        return by_layer.write(
            {name: [value] for name, value in found.items()}, output.float().numpy(), "first output", out
        )

    def close(self) -> None:
        """Free the program."""
        self._run = lambda given: []
        del self._program


def program(
    source: Model,
    quant: Quantized | None,
    how: Callable[[Quantized, str], Round | None] | None,
    *,
    double: bool,
) -> Program:
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
    rounds: dict[int, Round] = {}
    if quant is not None:
        _dequantize(network, quant, how, rounds)
    return Program(network, list(loaded.graph_signature.user_inputs), rounds, double=double)


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


class Program:
    """A module as a function of its inputs by name; run node by node where something is done to what the nodes take or give."""

    def __init__(
        self, network: Any, names: Sequence[str], rounds: Mapping[int, Round], *, double: bool
    ) -> None:
        self._network, self._names, self._rounds, self._double = network, names, rounds, double

    def __call__(self, given: Mapping[str, Any]) -> Any:
        """What the module gives."""
        values = [given[name] for name in self._names]
        if self._rounds or self._double:
            return self._stepped({}).run(*values, enable_io_processing=False)
        spec = self._network._in_spec
        order = list(spec.child(1).context) if spec.child(1).num_children else []
        if order:
            return self._network(**dict(zip(order, values, strict=True)))
        return self._network(*values)

    def layers(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """What each layer gives, by name in the order of their making, and the module's first output; all tensors."""
        from torch.utils import _pytree as pytree

        found: dict[str, Any] = {}
        values = [given[name] for name in self._names]
        output = self._stepped(found).run(*values, enable_io_processing=False)
        return found, pytree.tree_leaves(output)[0]

    def _stepped(self, kept: dict[str, Any]) -> Any:
        """An interpreter that rounds and widens as it was told, and keeps what layers give in ``kept``."""
        import torch

        ops = torch.ops.aten
        factors = {ops.linear.default: 0, ops.matmul.default: 0, ops.mm.default: 0, ops.addmm.default: 1}
        rounds, double, gives = self._rounds, self._double, _layers(self._network.graph)

        class Interpreter(torch.fx.Interpreter):  # type: ignore[misc]
            def run_node(self, node: Any) -> Any:
                found = super().run_node(node)
                if double and isinstance(found, torch.Tensor) and found.dtype == torch.float32:
                    found = found.double()
                if (
                    node in gives
                    and isinstance(found, torch.Tensor)
                    and found.is_floating_point()
                    and found.ndim
                ):
                    kept.pop(gives[node], None)  # the last one is what it gives
                    kept[gives[node]] = found
                return found

            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                at = factors.get(target)
                if at is not None and (rounded := rounds.get(args[at + 1].untyped_storage().data_ptr())):
                    args = (*args[:at], rounded(args[at]), *args[at + 1 :])
                return super().call_function(target, args, kwargs)

        # The order of the program's own inputs, whether the module takes them by place or by name.
        return Interpreter(self._network)


def _layers(graph: Any) -> dict[Any, str]:
    """The nodes whose values a layer gives to others, by the layer's name.

    A layer is the outermost element of a list of modules that a node belongs to, or else the innermost module, and has parameters of its
    own somewhere; every call of one counts apart. What the outermost module itself does with a parameter is called after that.
    """
    belongs: dict[Any, str] = {}
    weights: dict[Any, str] = {}  # parameters, and what is made of them alone
    for node in graph.nodes:
        given = node.all_input_nodes
        if node.op == "get_attr":
            weights[node] = str(node.target)
        elif given and all(each in weights for each in given):
            weights[node] = weights[given[0]]
        elif (name := _layer(node)) or (
            name := next((weights[each] for each in given if each in weights), "")
        ):
            belongs[node] = name
    learned = {belongs[user] for node in weights for user in node.users if user in belongs}
    return {
        node: name
        for node, name in belongs.items()
        if name in learned and any(belongs.get(user) != name for user in node.users)
    }


def _layer(node: Any) -> str:
    """The layer that a node belongs to, with the number of its call from the second on; empty: the outermost module itself."""
    stack = [(key, path) for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items() if path]
    if not stack:
        return ""
    key, path = next((each for each in stack if each[1].rpartition(".")[2].isdigit()), stack[-1])
    call = key.rpartition("@")[2] if "@" in key else ""
    return f"{path} (call {int(call) + 1})" if call.isdigit() else str(path)
