"""Write a directory as Hugging Face has it: shards at places known before, rows by rows, and the small files beside them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from tapeout.errors import ModelError, SchemeError
from tapeout.exporters import Artifact, Carry, Exact
from tapeout.exporters.huggingface import bitsandbytes, compressed_tensors
from tapeout.exporters.huggingface.parts import WIDTHS, Part, beside, halves
from tapeout.exporters.steps import by_rows
from tapeout.files import writing
from tapeout.models import DecoderConfig, Role, SourceTensor
from tapeout.models.checkpoint import FLOATS
from tapeout.quantize import Progress, Quantized, QuantTensor, Scheme
from tapeout.quantize.store import write_at

Format = Literal["compressed-tensors", "bitsandbytes"]

FORMATS: dict[str, ModuleType] = {module.NAME: module for module in (compressed_tensors, bitsandbytes)}

INDEX = "model.safetensors.index.json"

# vLLM refuses to run these in float16, in which their activations overflow.
_IN_BFLOAT16 = ("gemma2", "gemma3_text")
# What vLLM multiplies as one matrix: all of it is of one scheme.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


@dataclass(frozen=True)
class _Shard:
    """A safetensors file: its tensors in their order, and where each one's bytes begin."""

    name: str
    header: bytes
    places: Mapping[str, int]


def carries(form: Format, scheme: Scheme) -> Carry:
    """What holds codes of a scheme in that format."""
    found: Carry = FORMATS[form].carries(scheme)
    return found


def write(
    quant: Quantized,
    directory: Path,
    form: Format,
    *,
    max_shard_bytes: int = 5 * 10**9,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write ``model.safetensors`` or its shards, their index, ``config.json`` and the tokenizer's files into a directory.

    Streams: a few rows a thread in memory, whatever the model's size. The bytes do not depend on ``threads``.

    Matrices of decoder layers are codes where the format holds their scheme; embeddings and heads, which no loader of these
    formats takes as codes, are the values of their codes in float16.

    Args:
        quant: the canonical codes.
        directory: made when absent.
        form: how codes are packed.
        max_shard_bytes: begin a new shard before tensors go beyond this.
        threads: default: as many as this process has cores.
        progress: told how many bytes are written.

    Raises:
        ModelError: the model is no decoder, or the format's loader does not take it.
        SchemeError: tensors that are loaded as one have different schemes, or a value is beyond float16.
        OutputError: the directory cannot be written.
    """
    config = quant.model.config
    if not isinstance(config, DecoderConfig):
        raise ModelError(
            f"{quant.model.name} is {quant.model.kind}; the format {form} is written of decoders. What fits: target cpu."
        )
    packing = FORMATS[form]
    if config.moe and not packing.EXPERTS and any(_packed(quant, name, packing) for name in quant):
        raise ModelError(
            f"{quant.model.name} has routed experts, which transformers does not load from the format {form}. "
            f"What fits: compressed-tensors."
        )
    if packing.FLOATS_ALIKE and config.family in _IN_BFLOAT16:
        raise ModelError(
            f"{quant.model.name} ({config.family}) is not run in float16, which the format {form} is written in. "
            "What fits: compressed-tensors."
        )
    _check_fused(quant, packing)
    parts, containers = _parts(quant, packing)
    shards = _shards(parts, max_shard_bytes)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        total, done = sum(part.nbytes for part in parts.values()), 0
        with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
            for shard in shards:
                with (directory / shard.name).open("wb") as file:
                    write_at(file.fileno(), np.frombuffer(shard.header, np.uint8), 0)
                    os.ftruncate(
                        file.fileno(), max(at + parts[name].nbytes for name, at in shard.places.items())
                    )
                    for name, at in () if quant.hollow else shard.places.items():
                        _write_part(file.fileno(), parts[name], at, pool)
                        done += parts[name].nbytes
                        if progress:
                            progress("export", done, total)
        if len(shards) > 1:
            (directory / INDEX).write_text(_index(shards, total), encoding="utf-8")
        said = _config(quant, packing)
        (directory / "config.json").write_text(
            json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        tokenizer = quant.model.tokenizer_files()
        for found in tokenizer:
            shutil.copyfile(found, directory / found.name)
    return Artifact(
        format=form,
        directory=directory,
        files=(
            "config.json",
            *(shard.name for shard in shards),
            *((INDEX,) if len(shards) > 1 else ()),
            *(found.name for found in tokenizer),
        ),
        context=config.max_position_embeddings,
        bytes_per_token=_bytes_per_token(quant, packing, parts),
        containers=containers,
        notes=_notes(quant, containers, said),
    )


def _packed(quant: Quantized, name: str, packing: ModuleType) -> bool:
    """Whether a tensor is codes in the files."""
    scheme = quant.schemes[name]
    if scheme.kind == "none" or quant.model.specs[name].role is not Role.LINEAR:
        return False
    return isinstance(packing.carries(scheme), Exact)


def _parts(quant: Quantized, packing: ModuleType) -> tuple[dict[str, Part], dict[str, str]]:
    """The tensors of the files by name, in the checkpoint's order, and the container of each tensor of the model."""
    parts: dict[str, Part] = {}
    containers: dict[str, str] = {}
    alike = packing.FLOATS_ALIKE and any(_packed(quant, name, packing) for name in quant)
    for name in quant:
        tensor, scheme = quant[name], quant.schemes[name]
        if isinstance(tensor, QuantTensor) and _packed(quant, name, packing):
            parts |= packing.parts(name.removesuffix(".weight"), tensor, scheme)
            containers[name] = packing.carries(scheme).container
            continue
        if isinstance(tensor, QuantTensor):
            largest = float(np.abs(tensor.codebook).max() * np.abs(tensor.scale.astype(np.float32)).max())
            _check_half(name, largest)
            parts[name] = halves(tensor)
        elif alike and tensor.dtype != "F16":
            _check_half(name, float(np.abs(tensor.float32()).max(initial=0)))
            parts[name] = _float(tensor, "F16")
        else:
            parts[name] = _float(tensor, tensor.dtype if tensor.dtype in FLOATS else "F32")
        containers[name] = parts[name].dtype
    return parts, containers


def _float(tensor: SourceTensor, dtype: str) -> Part:
    """A float tensor as its bits, or in another type."""

    def rows(which: slice) -> Any:
        if dtype == tensor.dtype:
            return tensor.read(which)
        return tensor.float32(which).astype(np.float16 if dtype == "F16" else np.float32)

    return Part(dtype, tensor.shape, rows, tensor.shape[0] if len(tensor.shape) > 1 else 1)


def _check_half(name: str, largest: float) -> None:
    if largest > np.finfo(np.float16).max:
        raise SchemeError(
            f"{name} has values up to {largest:.3g}, beyond the float16 that the file has it in. What fits: target cpu."
        )


def _check_fused(quant: Quantized, packing: ModuleType) -> None:
    """SchemeError for matrices of different schemes that loaders put together into one."""
    together: dict[tuple[str, int], dict[str, str]] = {}
    for name in quant:
        base, _, last = name.removesuffix(".weight").rpartition(".")
        for index, fused in enumerate(_FUSED):
            if last in fused and quant.model.specs[name].role is Role.LINEAR:
                how = str(quant.schemes[name]) if _packed(quant, name, packing) else "float"
                together.setdefault((base, index), {})[last] = how
    for (base, _), found in together.items():
        if len(set(found.values())) > 1:
            each = ", ".join(f"{name}: {how}" for name, how in found.items())
            raise SchemeError(
                f"{base} has {each}, which vLLM loads as one matrix. What fits: one scheme for them."
            )


def _shards(parts: Mapping[str, Part], most: int) -> list[_Shard]:
    """Files of at most that many bytes of tensors, in the checkpoint's order."""
    shares: list[list[str]] = [[]]
    filled = 0
    for name, part in parts.items():
        if shares[-1] and filled + part.nbytes > most:
            shares.append([])
            filled = 0
        shares[-1].append(name)
        filled += part.nbytes
    count = len(shares)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    return [
        _lay_out(name, {each: parts[each] for each in share})
        for name, share in zip(names, shares, strict=True)
    ]


def _lay_out(name: str, parts: Mapping[str, Part]) -> _Shard:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at, places = 0, {}
    # Wide types first: the format wants each tensor aligned to its own type.
    for each, part in sorted(parts.items(), key=lambda item: -WIDTHS[item[1].dtype]):
        header[each] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [at, at + part.nbytes]}
        places[each], at = at, at + part.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return _Shard(
        name, struct.pack("<Q", len(text)) + text, {each: begin + at for each, at in places.items()}
    )


def _write_part(handle: int, part: Part, at: int, pool: Executor) -> None:
    if part.height == 1 or not part.nbytes:
        write_at(handle, part.rows(slice(None)), at)
        return
    width = part.nbytes // part.height

    def put(rows: slice) -> None:
        write_at(handle, part.rows(rows), at + rows.start * width)

    by_rows(put, part.height, width, pool)


def _index(shards: Sequence[_Shard], total: int) -> str:
    where = {name: shard.name for shard in shards for name in shard.places}
    found = {"metadata": {"total_size": total}, "weight_map": where}
    return json.dumps(found, indent=2, sort_keys=True) + "\n"


def _config(quant: Quantized, packing: ModuleType) -> dict[str, Any]:
    """``config.json``: the model's, with the type that scales are exact in, and what is said of quantization."""
    config = dict(quant.model.raw_config)
    modules = {
        name.removesuffix(".weight"): quant.schemes[name] for name in quant if _packed(quant, name, packing)
    }
    if not modules:
        if any(scheme.kind != "none" for scheme in quant.schemes.values()):
            config.pop("torch_dtype", None)
            config["dtype"] = "float16"
        return config
    matrices = (Role.LINEAR, Role.HEAD, Role.ROUTER)
    floats = [
        base
        for name, spec in quant.model.specs.items()
        if spec.role in matrices
        and len(spec.shape) == 2
        and (base := name.removesuffix(".weight")) not in modules
    ]
    if "lm_head" not in floats:  # a tied one is a module all the same
        floats.append("lm_head")
    if config["model_type"] not in _IN_BFLOAT16:
        config.pop("torch_dtype", None)
        config["dtype"] = "float16"
    config["quantization_config"] = packing.statement(modules, floats)
    return config


def _notes(quant: Quantized, containers: Mapping[str, str], said: Mapping[str, Any]) -> tuple[str, ...]:
    found = []
    if rounded := [
        name for name, scheme in quant.schemes.items() if scheme.kind != "none" and containers[name] == "F16"
    ]:
        more = f" and {len(rounded) - 2} more" if len(rounded) > 2 else ""
        found.append(
            f"{', '.join(rounded[:2])}{more} are the values of their codes in float16 (adds 0.02 % relative error): "
            "the loaders of this format take them as floats. With the scheme none they are the checkpoint's own, at the same size"
        )
    if "quantization_config" in said:
        if said["model_type"] in _IN_BFLOAT16:
            found.append(
                "scales are float16, and this family is served in bfloat16, to which a server rounds them (adds 0.1 % relative error)"
            )
        elif (
            before := quant.model.raw_config.get("dtype") or quant.model.raw_config.get("torch_dtype")
        ) != "float16":
            found.append(
                f"config.json says dtype float16 (the model's said {before}): scales are float16, and a server that runs in bfloat16 "
                "rounds them (adds 0.1 % relative error)"
            )
    return tuple(found)


def _bytes_per_token(quant: Quantized, packing: ModuleType, parts: Mapping[str, Part]) -> int:
    """Bytes that a token reads: of routed experts those that it takes, and one row of a table that is not the head as well."""
    config, total = quant.model.decoder, 0.0
    for name, spec in quant.model.specs.items():
        base = name.removesuffix(".weight")
        own = {name, *beside(base, packing.SUFFIXES)}
        share = 1.0
        if spec.role is Role.EMBEDDING and not config.tie_word_embeddings:
            share = 1 / spec.shape[0]
        elif config.moe and ".experts." in name:
            share = config.moe.top_k / config.moe.experts
        total += share * sum(parts[each].nbytes for each in own if each in parts)
    return round(total)
