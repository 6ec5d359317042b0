"""The road through torch.export: a plain ``torch.nn.Module`` that no family knows becomes a directory that ``load`` takes.

config.json            model_type torch.export, name, inputs
model.safetensors      parameters and buffers, float32
graph.onnx, graph.json see ``traced``
program.pt2            the exported program, which the reference runs
samples.safetensors    example inputs ``N.NAME``: those that were given, others drawn from them, and of other lengths
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import re
import shutil
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tapeout.errors import MissingToolchain, ModelError, nearest
from tapeout.files import cache_directory, canonical_json, file_sha256, lock, writing
from tapeout.models import traced

if TYPE_CHECKING:
    import torch

__all__ = ["MODEL_TYPE", "PROGRAM", "SAMPLES", "from_factory", "is_factory", "prepare"]

MODEL_TYPE = "torch.export"
PROGRAM, SAMPLES, WEIGHTS, CONFIG = "program.pt2", "samples.safetensors", "model.safetensors", "config.json"

_DRAWN = 5  # samples of the given shape, drawn from the values of those that were given
# Program and module run the same float32 operations, in another order where torch.export takes one apart: sums of K products
# differ by about sqrt(K) 2^-24 of their size, below 1e-5 for K = 16384; ten times that for the layers they pass through.
_CLOSE = 1e-4
_FACTORY = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)")


Sample = dict[str, Any]
"""Inputs by name."""


def is_factory(source: str) -> bool:
    """Whether a model is named as ``file.py:factory``."""
    return bool(_FACTORY.fullmatch(source))


def from_factory(source: str) -> Path:
    """Call ``file.py:factory``, which gives (module, example inputs) or (module, example inputs, dynamic shapes); see ``prepare``.

    Raises:
        ModelError: no such file or function, or it gives something else.
    """
    found = _FACTORY.fullmatch(source)
    assert found
    path, name = Path(found["file"]), found["name"]
    if not path.is_file():
        raise ModelError(f"{path} is not a file; a module is named as file.py:factory.")
    spec = importlib.util.spec_from_file_location(f"tapeout_module_{path.stem}", path)
    assert spec
    assert spec.loader
    code = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = code  # as import does: dataclasses look there
    try:
        spec.loader.exec_module(code)
    except Exception as error:  # it is somebody's code: anything may come
        raise ModelError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
    factory = getattr(code, name, None)
    if not callable(factory):
        known = [
            each for each, value in vars(code).items() if callable(value) and value.__module__ == spec.name
        ]
        raise ModelError(f"{path} has no function '{name}'{nearest(name, known)}.")
    made = factory()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise ModelError(
            f"{source} gave {_kind(made)}; expected (module, example inputs) or (module, example inputs, dynamic shapes)."
        )
    return prepare(*made, name=path.stem)


def prepare(
    module: torch.nn.Module,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    dynamic_shapes: Any = None,
    *,
    name: str | None = None,
) -> Path:
    """Export a module, hold the program against the module, and keep both in the cache; see ``tapeout.load_module``."""
    torch = _torch()
    _check(module, example_inputs)
    args = () if isinstance(example_inputs, Mapping) else tuple(example_inputs)
    keywords = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    name = name or type(module).__name__
    with _quiet():
        try:
            program = torch.export.export(module, args, keywords, dynamic_shapes=dynamic_shapes, strict=False)
        except Exception as error:  # of torch's several trees, and what the module itself raises
            raise ModelError(f"{name} cannot be exported: {_reason(error)}") from error
        names = list(program.graph_signature.user_inputs)
        given = {each: keywords[each] for each in names} if keywords else dict(zip(names, args, strict=True))
        samples = _samples(program, given)
        scales = _agreed(name, program, module, samples, by_name=bool(keywords))
        return _write(name, type(module).__name__, program, samples, scales, dynamic_shapes)


def _check(module: Any, example_inputs: Any) -> None:
    import torch

    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"a torch.nn.Module is expected, found {_kind(module)}.")
    name = type(module).__name__
    if module.training:
        raise ModelError(
            f"{name} is in training mode, where dropout and norms compute something else: call .eval() first."
        )
    given = list(example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs)
    if wrong := [each for each in given if not isinstance(each, torch.Tensor)]:
        raise ModelError(f"the example inputs of {name} must be tensors; found {_kind(wrong[0])}.")
    if not given:
        raise ModelError(
            f"{name} has no example inputs: give a tuple of tensors, or a dict of them by argument."
        )
    floats = [*module.named_parameters(), *module.named_buffers()]
    for at, tensor in floats:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ModelError(
                f"{at} of {name} is {tensor.dtype}; codes are chosen from float32: call .float() on the module first."
            )
        if tensor.device.type != "cpu":
            raise ModelError(f"{at} of {name} is on {tensor.device}: call .cpu() on the module first.")


def _samples(program: Any, given: Mapping[str, Any]) -> list[Sample]:
    """The given inputs; two of other lengths where those are free; and some of the same shape, drawn from the given values."""
    import torch

    draw = torch.Generator().manual_seed(0)
    sizes = _sizes(program)
    lengths: dict[Any, int] = {}
    for name, tensor in given.items():
        for size, length in zip(sizes[name], tensor.shape, strict=True):
            lengths |= _solved(size, int(length))

    def drawn(now: Mapping[Any, int]) -> Sample:
        found = {}
        for name, tensor in given.items():
            shape = [int(_expression(size).subs(now)) for size in sizes[name]]
            at = torch.randint(0, tensor.numel(), shape, generator=draw)
            found[name] = tensor.reshape(-1)[at]
        return found

    def scaled(numerator: int, denominator: int) -> dict[Any, int]:
        found = {}
        for symbol, length in lengths.items():
            allowed = program.range_constraints[symbol]
            low, high = int(allowed.lower), 2 * length
            high = high if allowed.upper > high else int(allowed.upper)
            found[symbol] = min(max(length * numerator // denominator, low), high)
        return found

    found = [dict(given)]
    if lengths:
        found += [drawn(scaled(1, 2)), drawn(scaled(3, 2))]
    return found + [drawn(lengths) for _ in range(_DRAWN)]


def _sizes(program: Any) -> dict[str, Any]:
    """The shape of each input, free sizes as torch's symbols."""
    names = program.graph_signature.user_inputs
    return {node.name: node.meta["val"].shape for node in program.graph.nodes if node.name in names}


def _expression(size: Any) -> Any:
    import sympy

    return size.node.expr if hasattr(size, "node") else sympy.Integer(size)


def _solved(size: Any, length: int) -> dict[Any, int]:
    """What the one symbol of a size is where the size is ``length``; nothing for a fixed one."""
    import sympy

    expression = _expression(size)
    return {symbol: int(sympy.solve(expression - length, symbol)[0]) for symbol in expression.free_symbols}


def _agreed(
    name: str, program: Any, module: Any, samples: Sequence[Sample], *, by_name: bool
) -> tuple[float, ...]:
    """The deviation of each output over the samples; ModelError where the program gives something else than the module."""
    import torch
    from torch.utils import _pytree as pytree

    run, found = program.module(), []

    def call(function: Any, sample: Sample) -> list[Any]:
        given = {key: value.clone() for key, value in sample.items()}
        leaves: list[Any] = pytree.tree_leaves(function(**given) if by_name else function(*given.values()))
        return leaves

    for sample in samples:
        shapes = ", ".join(str(list(each.shape)) for each in sample.values())
        with torch.no_grad():
            try:
                theirs, mine = call(module, sample), call(run, sample)
            except Exception as error:  # it is somebody's code: anything may come
                raise ModelError(
                    f"{name} cannot be run on inputs {shapes}, which its dynamic shapes allow: {_reason(error)}"
                ) from error
        if wrong := [
            each for each in theirs if not isinstance(each, torch.Tensor) or not each.is_floating_point()
        ]:
            raise ModelError(f"{name} must give float tensors; found {_kind(wrong[0])}.")
        for at, (a, b) in enumerate(zip(theirs, mine, strict=True)):
            if not bool(torch.isfinite(a).all()):
                raise ModelError(f"output {at} of {name} is NaN or infinite on inputs {shapes}.")
            if a.shape != b.shape or float((a - b).abs().max()) > _CLOSE * max(float(a.std()), 1e-30):
                raise ModelError(
                    f"torch.export makes another function of {name}: output {at} differs on inputs {shapes}. Something in it was "
                    "decided when it was traced; torch.cond, or a branch less, keeps it exportable."
                )
        found.append([each.reshape(-1) for each in theirs])
    return tuple(float(torch.cat(each).std()) or 1.0 for each in zip(*found, strict=True))


def _write(
    name: str,
    kind: str,
    program: Any,
    samples: Sequence[Sample],
    scales: tuple[float, ...],
    dynamic_shapes: Any,
) -> Path:
    import torch
    from safetensors.torch import save_file

    outputs = ["output"] if len(scales) == 1 else [f"output_{at}" for at in range(len(scales))]
    try:
        onnx_program = torch.onnx.export(
            program, dynamo=True, optimize=False, verbose=False, output_names=outputs
        )
    except Exception as error:  # torch's own tree
        raise ModelError(f"{name} has no ONNX form: {_reason(error)}") from error
    state = {
        each: tensor.detach().contiguous().clone()
        for each, tensor in program.state_dict.items()
        if tensor.dtype == torch.float32
    }
    tidied = traced.tidy(
        onnx_program.model,
        {each: tuple(tensor.shape) for each, tensor in state.items()},
        lambda each: state[each].numpy(),
    )
    if not any(each.role.is_matrix for each in tidied.tensors.values()):
        raise ModelError(
            f"{name} has no linear weight: none of its {len(state)} float tensors is the second factor of a matmul or a table that is "
            "looked up, and there is nothing to quantize."
        )
    _name_axes(program, tidied.model, dynamic_shapes)
    root = cache_directory() / "module"
    partial = root / f".{name}.partial"
    with lock(root / name, wait=True), writing(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(state, partial / WEIGHTS)
        save_file(
            {
                f"{n}.{key}": value.contiguous()
                for n, each in enumerate(samples)
                for key, value in each.items()
            },
            partial / SAMPLES,
        )
        config = traced.TracedConfig(
            family=kind,
            road="torch.export",
            maker=f"torch {torch.__version__}, onnxscript {importlib.metadata.version('onnxscript')}",
            directory=partial,
            tensors=tidied.tensors,
            same=tidied.same,
            folded=tidied.folded,
            scales=scales,
        )
        traced.write(partial, tidied, config)
        torch.export.save(program, partial / PROGRAM)
        facts = {
            "model_type": MODEL_TYPE,
            "name": name,
            "inputs": list(samples[0]),
            "samples": len(samples),
        }
        (partial / CONFIG).write_text(canonical_json(facts), encoding="utf-8")
        # Not the program: it holds the paths of the code that it came from.
        digests = [file_sha256(partial / file) for file in (WEIGHTS, traced.GRAPH, traced.FACTS, SAMPLES)]
        key = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]
        place = root / f"{name}-{key}"
        if place.exists():
            shutil.rmtree(partial)
        else:
            partial.rename(place)
    return place


def _name_axes(program: Any, model: Any, dynamic_shapes: Any) -> None:
    """Call free axes what the user calls them, where torch has made up a symbol."""
    ir, _ = traced.libraries()
    sizes = _sizes(program)
    given = dynamic_shapes or ()
    by_name = given if isinstance(given, Mapping) else dict(zip(sizes, given, strict=False))
    called = {
        str(_expression(sizes[name][at])): axis.__name__
        for name, axes in by_name.items()
        for at, axis in dict(axes if isinstance(axes, Mapping) else enumerate(axes or ())).items()
        if getattr(axis, "__name__", None)
    }
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None:
            value.shape = ir.Shape(
                [called.get(str(getattr(size, "value", size)), size) for size in value.shape]
            )


def _reason(error: Exception) -> str:
    """The first thing that torch says, and which line of the module it was at, in one paragraph."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    theirs = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(libraries)
    ]
    at = f" At {theirs[-1].filename}:{theirs[-1].lineno}: {theirs[-1].line}" if theirs else ""
    return f"{first.rstrip('.')}.{at}"


def _kind(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    return f"{dtype} {type(value).__name__}" if dtype is not None else type(value).__name__


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingToolchain(f"a module needs torch ({error}): pip install 'tapeout[onnx]'.") from error
    traced.libraries()
    return torch


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporters tell of packages that nobody asked for, and print graphs beside an error that says the same."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
