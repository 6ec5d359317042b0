"""Write the ranks, rows by rows, their config.json, and the tokenizer's files in a directory of their own."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tapeout.errors import ModelError, SchemeError
from tapeout.exporters import Artifact, Refused
from tapeout.exporters.streamed import Array, Part, check_half, lay_out, to_half
from tapeout.exporters.streamed import write as write_file
from tapeout.exporters.trtllm import config, packing
from tapeout.exporters.trtllm.layout import Block, Mapping, Place, check_complete, places
from tapeout.files import writing
from tapeout.models import DecoderConfig, Role
from tapeout.models.checkpoint import to_float32
from tapeout.quantize import Progress, Quantized, QuantTensor

WORDS = "tokenizer"
"""Directory of the tokenizer's files and of the model's own config.json, which would stand in the way of the checkpoint's."""

_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write(
    quant: Quantized,
    directory: Path,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write ``config.json``, ``rank{r}.safetensors`` and the tokenizer's files into a directory.

    Streams: a few rows a thread in memory, whatever the model's size. The bytes do not depend on ``threads``.

    Linears are codes; embedding and head, which the kernels take as floats, are the values of their codes in float16, and so are norms
    and biases. Without codes everything is in the checkpoint's own type.

    Args:
        quant: the canonical codes.
        directory: made when absent.
        tensor_parallel, pipeline_parallel: ranks that share a layer, and stages.
        threads: default: as many as this process has cores.
        progress: told how many bytes are written.

    Raises:
        ModelError: TensorRT-LLM has no such model, or computes it otherwise.
        SchemeError: linears of different schemes, or a value beyond float16.
        TapeoutError: a size that does not divide what it cuts.
        OutputError: the directory cannot be written.
    """
    model = quant.model
    if not isinstance(model.config, DecoderConfig):
        raise ModelError(
            f"{model.name} is {model.kind}; the format trtllm is written of decoders. What fits: target cpu."
        )
    mapping = Mapping(tensor_parallel, pipeline_parallel)
    config.check_model(model)
    config.check_mapping(model, mapping)
    algorithm, group = _algorithm(quant)
    config.check_scheme(quant, algorithm)
    if algorithm is not None:
        config.check_widths(model, mapping, algorithm, group)
    check_complete(model, mapping)
    dtype = _dtype(quant)
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        made = _Maker(quant, algorithm, dtype, pool)
        ranks = [made.rank(mapping, rank) for rank in range(mapping.world)]
    sizes = [{name: part for name, (part, _) in parts.items()} for parts in ranks]
    left = sorted(made.left)
    if left and mapping.pipeline > 1:
        raise SchemeError(
            f"{left[0]} stays float beside codes, which config.json says by names that each stage has. What fits: "
            "--pipeline-parallel 1, or one scheme for all linears."
        )
    said = config.config(quant, mapping, _TYPES[dtype], algorithm, group, left)
    names = [f"rank{rank}.safetensors" for rank in range(mapping.world)]
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        total, done = sum(part.nbytes for parts in sizes for part in parts.values()), 0
        with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
            for name, parts, sized in zip(names, ranks, sizes, strict=True):

                def part_of(each: str, parts: dict[str, tuple[Part, Place]] = parts) -> Part:
                    return made.parts(parts[each][1])[each]

                for written in write_file(
                    directory, lay_out(name, sized), part_of, pool, hollow=quant.hollow
                ):
                    done += written
                    if progress:
                        progress("export", done, total)
        _write_json(directory / "config.json", said)
        (directory / WORDS).mkdir(exist_ok=True)
        _write_json(directory / WORDS / "config.json", dict(model.raw_config))
        tokenizer = model.tokenizer_files()
        for found in tokenizer:
            shutil.copyfile(found, directory / WORDS / found.name)
    return Artifact(
        format="trtllm",
        directory=directory,
        files=("config.json", *names, *(f"{WORDS}/{name}" for name in ("config.json", *(f.name for f in tokenizer)))),
        context=model.config.max_position_embeddings,
        bytes_per_token=made.bytes_per_token(sizes),
        containers=made.containers,
        notes=_notes(quant, made, algorithm, said),
    )  # fmt: skip


def _write_json(path: Path, said: dict[str, Any]) -> None:
    path.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _linears(quant: Quantized) -> list[str]:
    return [name for name, spec in quant.model.specs.items() if spec.role is Role.LINEAR]


def _algorithm(quant: Quantized) -> tuple[str | None, int]:
    """The one algorithm of all linears that are codes, and the group; None: all are floats."""
    schemes = {str(s): s for name in _linears(quant) if (s := quant.schemes[name]).kind != "none"}
    if len(schemes) > 1:
        raise SchemeError(
            f"linears are {', '.join(schemes)}: a rank checkpoint has one algorithm. What fits: one scheme for all linears, or none for some."
        )
    for scheme in schemes.values():
        carry = packing.carries(scheme)
        if isinstance(carry, Refused):
            raise SchemeError(
                f"a rank checkpoint does not hold {scheme}: {carry.reason} What fits: {carry.nearest}."
            )
        return carry.container, scheme.group or 0
    return None, 0


def _dtype(quant: Quantized) -> str:
    """The type of all floats: float16 beside codes, whose scales are exact in it, if the family bears it; or the checkpoint's widest."""
    if any(scheme.kind != "none" for scheme in quant.schemes.values()):
        return "BF16" if quant.model.decoder.family in config.IN_BFLOAT16 else "F16"
    found = {getattr(quant[name], "dtype", "F32") for name in quant}
    return found.pop() if len(found) == 1 and found <= set(_TYPES) else "F32"


class _Maker:
    """Makes the tensors of a rank from those of the model.

    Attributes:
        containers: what holds each tensor of the model.
        left: linears that stay float beside codes.
    """

    def __init__(self, quant: Quantized, algorithm: str | None, dtype: str, pool: Executor) -> None:
        self.containers: dict[str, str] = {}
        self.left: set[str] = set()
        self._quant, self._algorithm, self._dtype, self._pool = quant, algorithm, dtype, pool

    def rank(self, mapping: Mapping, rank: int) -> dict[str, tuple[Part, Place]]:
        """The tensors of a rank by name, in the order of the model: what each measures, and the place that makes it when its turn comes."""
        return {
            name: (replace(part, rows=_unmade), place)
            for place in places(self._quant.model, mapping, rank)
            for name, part in self.parts(place).items()
        }

    def parts(self, place: Place) -> dict[str, Part]:
        """The tensors of one place by name."""
        if place.kind not in ("column", "row"):
            dtype = "F32" if place.kind == "router" else self._dtype
            found = {
                place.name: packing.under(
                    [self._floats(block, dtype, place.offset) for block in place.blocks[0]]
                )
            }
            if self._algorithm == packing.PER_TOKEN and place.name.endswith(
                (".input_layernorm.weight", ".post_layernorm.weight")
            ):  # read, and multiplied with nothing
                scale = place.name.removesuffix("weight") + "scale_to_int"
                found[scale] = Part("F32", (1,), lambda rows: np.ones(1, np.float32))
            return found
        each = [self._linear(blocks, place) for blocks in place.blocks]
        return {
            f"{place.name}.{suffix}": packing.stacked([other[suffix] for other in each])
            if place.stacked
            else part
            for suffix, part in each[0].items()
        }

    def _linear(self, blocks: tuple[Block, ...], place: Place) -> dict[str, Part]:
        """What stands for blocks of one linear, or of one expert's."""
        kinds = {self._quant.schemes[block.name].kind == "none" for block in blocks}
        if len(kinds) > 1:
            raise SchemeError(
                f"{' and '.join(block.name for block in blocks)} are one linear in TensorRT-LLM, and only some are codes. "
                "What fits: one scheme for them."
            )
        if kinds == {True} or self._algorithm is None:
            if self._algorithm is not None:
                if place.stacked:
                    raise SchemeError(
                        f"{blocks[0].name} is float among experts of codes. What fits: one scheme for them."
                    )
                self.left.add(place.name)
            return {"weight": packing.under([self._floats(block, self._dtype) for block in blocks])}
        found, steps = [], set()
        for block in blocks:
            tensor = self._quant[block.name]
            assert isinstance(tensor, QuantTensor)
            steps.add(tensor.input_scale)
            self.containers[block.name] = self._algorithm
            found.append(packing.cut(tensor, block.rows, block.cols))
        if len(steps) > 1:
            raise SchemeError(
                f"{', '.join(block.name for block in blocks)} read the same inputs, and their calibrated steps differ: {steps}. "
                "What fits: w8a8."
            )
        return packing.parts(found, self._algorithm, row=place.kind == "row", dtype=self._dtype)

    def _floats(self, block: Block, dtype: str, offset: float = 0.0) -> Part:
        """A block of floats, or of the values of codes, in a type."""
        tensor = self._quant[block.name]
        own = getattr(tensor, "dtype", "")
        if dtype == "F16" and own != "F16" and block.name not in self.containers:
            check_half(block.name, tensor, self._pool)
        self.containers[block.name] = dtype
        shape = self._quant.model.specs[block.name].shape
        first, last, _ = block.rows.indices(shape[0])
        width = len(range(*block.cols.indices(shape[1]))) if len(shape) > 1 else 0

        def rows(which: slice) -> Array:
            low, high, _ = which.indices(last - first)
            at = slice(first + low, first + high)
            if isinstance(tensor, QuantTensor):
                values = tensor.rows(at).dequantize()
            elif own == dtype and not offset:
                bits = tensor.read(at)
                return bits[:, block.cols] if width else bits
            elif (own, dtype, offset) == ("BF16", "F16", 0):
                found = to_half(tensor.read(at))
                return found[:, block.cols] if width else found
            else:
                values = tensor.float32(at)
            values = values[:, block.cols] if width else values
            return as_bits(values + np.float32(offset) if offset else values, dtype)

        height = last - first
        return Part(dtype, (height, width) if width else (height,), rows, height)

    def bytes_per_token(self, ranks: list[dict[str, Part]]) -> int:
        """Bytes that a token reads in all ranks: of routed experts those that it takes, and one row of the embedding."""
        c, total = self._quant.model.decoder, 0.0
        for parts in ranks:
            for name, part in parts.items():
                share = 1.0
                if name == "transformer.vocab_embedding.weight":
                    share = 1 / part.shape[0]
                elif c.moe and ".mlp." in name and len(part.shape) == 3:
                    share = c.moe.top_k / c.moe.experts
                total += share * part.nbytes
        return round(total)


def _unmade(rows: slice) -> Array:
    raise AssertionError("a part that only says its size")


def as_bits(values: Array, dtype: str) -> Array:
    """Float32 values in a type; bfloat16 as its bits, rounded to the nearest, ties to even."""
    if dtype != "BF16":
        return values.astype(np.float16 if dtype == "F16" else np.float32)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def values_of(array: Array, dtype: str) -> Array:
    """Float32 values of what ``as_bits`` gives."""
    return to_float32(array, dtype)


def _notes(quant: Quantized, made: _Maker, algorithm: str | None, said: dict[str, Any]) -> tuple[str, ...]:
    found = []
    coded = [
        name
        for name, scheme in quant.schemes.items()
        if scheme.kind != "none" and made.containers.get(name) == "F16"
    ]
    if coded:
        more = f" and {len(coded) - 2} more" if len(coded) > 2 else ""
        found.append(
            f"{', '.join(coded[:2])}{more} are the values of their codes in float16 (adds 0.02 % relative error): the kernels take them "
            "as floats. With the scheme none they are the checkpoint's own, at the same size"
        )
    if algorithm == packing.PLAIN:
        found.append(
            "W8A16 codes are in plain order and run by TensorRT's own kernels (disable_weight_only_quant_plugin): those of the plugin's "
            "order are made by NVIDIA's converter for the GPU that it runs on"
        )
    if algorithm is not None and said["dtype"] == "bfloat16":
        found.append(
            "scales are float16, and this family is run in bfloat16, to which trtllm-build rounds them (adds 0.1 % relative error)"
        )
    if said["quantization"].get("has_zero_point"):
        found.append("zero points are float16 products with the scale (adds up to 0.02 % relative error)")
    if made.left:
        found.append(f"{len(made.left)} linears stay float, by exclude_modules")
    if "runtime_defaults" in said:
        window = quant.model.decoder.sliding_window
        found.append(
            f"the sliding window of {window} tokens is the runtime's: config.json has it as runtime_defaults.max_attention_window, which "
            "TensorRT-LLM's executor takes unless it is told another"
        )
    if quant.model.decoder.norm_offset:
        found.append("norms are held as 1 + w in the model's type, as TensorRT-LLM multiplies with them")
    return tuple(found)
