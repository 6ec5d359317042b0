"""Write a module and its parameters: ``model.mlir`` for IREE's compiler, ``model.irpa`` with the codes."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from tapeout.errors import ModelError
from tapeout.exporters import Artifact
from tapeout.exporters.iree.archive import lay_out
from tapeout.exporters.iree.blocks import PARTS, bits_of, carries
from tapeout.exporters.iree.emitter import IreeOps, Parameter, Weights
from tapeout.exporters.iree.mlir import Module
from tapeout.exporters.steps import by_rows
from tapeout.files import canonical_json, writing
from tapeout.models import DecoderConfig, Role
from tapeout.models.graph import Ops, decoder
from tapeout.quantize import Progress, Quantized, QuantTensor
from tapeout.quantize.store import write_at

MLIR, ARCHIVE, FACTS, CONFIG = "model.mlir", "model.irpa", "model.json", "config.json"

DEFAULT_CONTEXT = 4096
"""Tokens for which caches are laid out where nobody asks for more: they are whole from the start, and every step looks at all rows."""

_ROWS = 8  # in work together: whatever the bits of a code, so many rows are whole bytes


@dataclass(frozen=True)
class Options:
    """What a module is made for.

    Attributes:
        context: most tokens of a sequence. Default: the model's own, but DEFAULT_CONTEXT at most.
        chunk: tokens of a call of ``prefill``.
    """

    context: int | None = None
    chunk: int = 128


def resolved(quant: Quantized, options: Options) -> Options:
    """The same with its defaults filled in; ModelError for what a model has not."""
    config = quant.model.config
    if not isinstance(config, DecoderConfig):
        raise ModelError(
            f"{quant.model.name} is {quant.model.kind}; modules for IREE are written of decoders. What fits: target cpu."
        )
    most = config.max_position_embeddings
    context = options.context or min(most, DEFAULT_CONTEXT)
    if context > most:
        raise ModelError(f"context = {context}: {quant.model.name} was made for {most} tokens.")
    return Options(context, min(options.chunk, context))


def build(quant: Quantized, options: Options) -> tuple[str, dict[str, Parameter]]:
    """The module's text, and its parameters by name; ``options`` as ``resolved`` gives them."""
    config = quant.model.decoder
    assert options.context
    weights, module = Weights(quant, options.context, options.chunk), Module()
    for name, tokens, last in (
        ("prefill", options.chunk, False),
        ("append", options.chunk, True),
        ("decode", 1, True),
    ):
        ops = IreeOps(weights, module, tokens, last=last)
        ops.finish(name, decoder(cast("Ops[Any]", ops), config, ops.begin()))
    return module.text(), weights.parameters


def facts(quant: Quantized, options: Options, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    """What the module was made for, and what each parameter is: of which tensors, which part, in which scheme."""
    said = {
        name: {
            "sources": each.sources,
            "part": each.part,
            "shape": each.shape,
            "element": each.element,
            "scheme": asdict(quant.schemes[each.sources[0]]) if each.part == "codes" else None,
        }
        for name, each in parameters.items()
    }
    numbers = {
        "context": options.context,
        "chunk": options.chunk,
        "vocab_size": quant.model.decoder.vocab_size,
    }
    return numbers | {"parameters": said}


def write(
    quant: Quantized,
    directory: Path,
    options: Options | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write ``model.mlir``, ``model.irpa``, what they were made for, and the tokenizer's files into a directory.

    Streams: a few rows a thread in memory, whatever the model's size. The bytes do not depend on ``threads``.

    Args:
        quant: the canonical codes.
        directory: made when absent.
        options: what the module is made for.
        threads: default: as many as this process has cores.
        progress: told how many bytes are written.

    Raises:
        ModelError: the model is no decoder, or its experts have several schemes.
        OutputError: the directory cannot be written.
    """
    options = resolved(quant, options or Options())
    assert options.context
    text, parameters = build(quant, options)
    sizes = {name: _nbytes(each) for name, each in parameters.items()}
    layout = lay_out(sizes)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MLIR).write_text(text, encoding="utf-8")
        (directory / FACTS).write_text(canonical_json(facts(quant, options, parameters)), encoding="utf-8")
        config = json.dumps(dict(quant.model.raw_config), indent=2, sort_keys=True) + "\n"
        (directory / CONFIG).write_text(config, encoding="utf-8")
        with (directory / ARCHIVE).open("wb") as file:
            os.ftruncate(file.fileno(), layout.end)
            write_at(file.fileno(), np.frombuffer(layout.header, np.uint8), 0)
            _write_parameters(quant, parameters, layout.places, file.fileno(), threads, progress)
        tokenizer = quant.model.tokenizer_files()
        for found in tokenizer:
            shutil.copyfile(found, directory / found.name)
    return Artifact(
        format="iree",
        directory=directory,
        files=(MLIR, ARCHIVE, FACTS, CONFIG, *(found.name for found in tokenizer)),
        context=options.context,
        bytes_per_token=_bytes_per_token(quant, parameters, sizes),
        containers=_containers(quant),
        notes=(
            ()
            if options.context == quant.model.decoder.max_position_embeddings
            else (
                f"caches are laid out for {options.context} tokens of the model's "
                f"{quant.model.decoder.max_position_embeddings}; --context asks for others",
            )
        ),
    )


def _nbytes(parameter: Parameter) -> int:
    bits = math.prod(parameter.shape) * bits_of(parameter.element)
    if bits % 8:
        raise ModelError(
            f"{parameter.sources[0]} has {math.prod(parameter.shape)} codes of {bits_of(parameter.element)} bits, which are no whole "
            "bytes. What fits: int8."
        )
    return bits // 8


def _containers(quant: Quantized) -> dict[str, str]:
    found = {}
    for name, scheme in quant.schemes.items():
        tensor = quant[name]
        if isinstance(tensor, QuantTensor):
            carry = carries(scheme)
            found[name] = str(getattr(carry, "container", scheme))
        else:
            found[name] = tensor.dtype if tensor.dtype in ("F32", "F16", "BF16") else "F32"
    return found


def _write_parameters(
    quant: Quantized,
    parameters: Mapping[str, Parameter],
    places: Mapping[str, int],
    handle: int,
    threads: int | None,
    progress: Progress | None,
) -> None:
    total, done = sum(map(_nbytes, parameters.values())), 0
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        for name, each in parameters.items():
            size = _nbytes(each)
            if each.values is not None:
                write_at(handle, np.ascontiguousarray(each.values), places[name])
            else:
                apiece = size // len(each.sources)
                for turn, source in enumerate(each.sources):
                    _write_tensor(quant[source], each, handle, places[name] + turn * apiece, apiece, pool)
            done += size
            if progress:
                progress("export", done, total)


def _write_tensor(
    tensor: Any, parameter: Parameter, handle: int, place: int, size: int, pool: Executor
) -> None:
    """One tensor's part, a few rows a task."""
    if not isinstance(tensor, QuantTensor):
        as_it_is = tensor.dtype in ("F32", "F16", "BF16")
        count = tensor.shape[0]

        def put(rows: slice) -> None:
            values = tensor.read(rows) if as_it_is else tensor.float32(rows)
            write_at(handle, np.ascontiguousarray(values), place + rows.start * (size // count))

        by_rows(put, count, max(1, math.prod(tensor.shape[1:])), pool)
        return
    if parameter.part in PARTS:
        values = PARTS[parameter.part](tensor)
        assert values is not None
        write_at(handle, np.ascontiguousarray(values), place)
        return
    held, count = parameter.container, tensor.shape[0]
    assert held

    def put_codes(units: slice) -> None:
        rows = slice(units.start * _ROWS, min(units.stop * _ROWS, count))
        write_at(handle, held.codes(tensor.rows(rows)), place + rows.start * size // count)

    by_rows(put_codes, -(-count // _ROWS), tensor.in_features * _ROWS, pool)


def _bytes_per_token(quant: Quantized, parameters: Mapping[str, Parameter], sizes: Mapping[str, int]) -> int:
    """Bytes that a token reads: of routed experts those that it takes, and one row of a table that is not the head as well."""
    config, total = quant.model.decoder, 0.0
    for name, each in parameters.items():
        if not each.sources:
            continue
        share, spec = 1.0, quant.model.specs[each.sources[0]]
        if spec.role is Role.EMBEDDING and not config.tie_word_embeddings:
            share = 1 / spec.shape[0]
        elif config.moe and len(each.sources) > 1:
            share = config.moe.top_k / config.moe.experts
        total += share * sizes[name]
    return round(total)
