"""Write a directory as Hugging Face has it: shards at places known before, rows by rows, and the small files beside them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from tapeout.errors import ModelError, SchemeError
from tapeout.exporters import Artifact, Carry, Exact
from tapeout.exporters.huggingface import bitsandbytes, compressed_tensors, modelopt
from tapeout.exporters.huggingface.parts import beside
from tapeout.exporters.streamed import File, Part, check_half, floats, halves, lay_out
from tapeout.exporters.streamed import write as write_file
from tapeout.files import writing
from tapeout.models import DecoderConfig, Role, SourceTensor
from tapeout.models.checkpoint import FLOATS
from tapeout.models.decoder import joined
from tapeout.quantize import Progress, Quantized, QuantTensor, Scheme

Format = Literal["compressed-tensors", "bitsandbytes", "modelopt"]

FORMATS: dict[str, ModuleType] = {
    module.NAME: module for module in (compressed_tensors, bitsandbytes, modelopt)
}

INDEX = "model.safetensors.index.json"

# vLLM refuses to run these in float16, in which their activations overflow.
_IN_BFLOAT16 = ("gemma2", "gemma3_text")


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
    kv_cache: Literal["fp8"] | None = None,
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
        kv_cache: what servers shall keep keys and values in; None: what the model computes in. Of modelopt.
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
    packed = {name: quant.schemes[name] for name in quant if _packed(quant, name, packing)}
    if config.moe and (why := packing.why_no_mixture(packed)):
        raise ModelError(f"{quant.model.name} has routed experts, {why}")
    if packing.FLOATS_ALIKE and config.family in _IN_BFLOAT16:
        raise ModelError(
            f"{quant.model.name} ({config.family}) is not run in float16, which the format {form} is written in. "
            "What fits: compressed-tensors."
        )
    _check_fused(quant, packing)
    parts, of, containers = _parts(quant, packing, kv_cache)
    shards = _shards(parts, max_shard_bytes)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        total, done = sum(part.nbytes for part in parts.values()), 0
        with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
            for shard in shards:
                for written in write_file(
                    directory,
                    shard,
                    lambda name: _made(quant, of[name], packing, kv_cache)[name],
                    pool,
                    hollow=quant.hollow,
                ):
                    done += written
                    if progress:
                        progress("export", done, total)
        if len(shards) > 1:
            (directory / INDEX).write_text(_index(shards, total), encoding="utf-8")
        said = _config(quant, packing, kv_cache)
        beside_it = packing.files(said["quantization_config"]) if "quantization_config" in said else {}
        for name, content in {"config.json": said, **beside_it}.items():
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (directory / name).write_text(text, encoding="utf-8")
        tokenizer = quant.model.tokenizer_files()
        for found in tokenizer:
            shutil.copyfile(found, directory / found.name)
    return Artifact(
        format=form,
        directory=directory,
        files=(
            "config.json",
            *beside_it,
            *(shard.name for shard in shards),
            *((INDEX,) if len(shards) > 1 else ()),
            *(found.name for found in tokenizer),
        ),
        context=config.max_position_embeddings,
        bytes_per_token=_bytes_per_token(quant, packing, parts),
        containers=containers,
        notes=_notes(quant, packing, containers, said),
    )


def _packed(quant: Quantized, name: str, packing: ModuleType) -> bool:
    """Whether a tensor is codes in the files."""
    scheme = quant.schemes[name]
    if scheme.kind == "none" or quant.model.specs[name].role is not Role.LINEAR:
        return False
    if name.removesuffix(".weight").endswith(packing.FLOATS):
        return False
    return isinstance(packing.carries(scheme), Exact)


def _parts(
    quant: Quantized, packing: ModuleType, kv_cache: str | None
) -> tuple[dict[str, Part], dict[str, str], dict[str, str]]:
    """The tensors of the files by name, in the checkpoint's order; which tensor of the model each is of; and the container of that.

    They are known by their types and shapes here, and made once more when they are written: a map of a tensor's codes that
    stays open keeps the pages that were read of it.
    """
    parts: dict[str, Part] = {}
    of: dict[str, str] = {}
    containers: dict[str, str] = {}
    halved = packing.FLOATS_ALIKE and any(_packed(quant, name, packing) for name in quant)
    for name in quant:
        tensor, packed = quant[name], _packed(quant, name, packing)
        if (isinstance(tensor, QuantTensor) and not packed) or (
            halved and isinstance(tensor, SourceTensor) and tensor.dtype != "F16"
        ):
            check_half(name, tensor)
        for each, part in _made(quant, name, packing, kv_cache).items():
            parts[each], of[each] = replace(part, rows=_unmade), name
        coded = packed and isinstance(tensor, QuantTensor)
        containers[name] = packing.carries(quant.schemes[name]).container if coded else parts[name].dtype
    return parts, of, containers


def _made(quant: Quantized, name: str, packing: ModuleType, kv_cache: str | None) -> dict[str, Part]:
    """The tensors of the files that stand for a tensor of the model."""
    tensor, base = quant[name], name.removesuffix(".weight")
    made: dict[str, Part] = packing.cache_parts(base) if kv_cache else {}
    if isinstance(tensor, QuantTensor):
        packed = _packed(quant, name, packing)
        return made | (packing.parts(base, tensor, quant.schemes[name]) if packed else {name: halves(tensor)})
    halved = packing.FLOATS_ALIKE and any(_packed(quant, each, packing) for each in quant)
    return made | {
        name: floats(tensor, "F16" if halved else tensor.dtype if tensor.dtype in FLOATS else "F32")
    }


def _unmade(rows: slice) -> Any:
    raise AssertionError("a tensor is made again before it is written")


def _check_fused(quant: Quantized, packing: ModuleType) -> None:
    """SchemeError for matrices of different schemes that loaders put together into one."""
    linear = [name for name in quant if quant.model.specs[name].role is Role.LINEAR]
    how: dict[str, str] = {}
    for group in joined(linear).values():
        for name in group:
            if name not in how:
                tensor = quant[name]
                packed = isinstance(tensor, QuantTensor) and _packed(quant, name, packing)
                how[name] = packing.fused(tensor, quant.schemes[name]) if packed else "float"
        if len({how[name] for name in group}) > 1:
            base = group[0].removesuffix(".weight").rpartition(".")[0]
            each = ", ".join(
                f"{name.removesuffix('.weight').removeprefix(base + '.')}: {how[name]}" for name in group
            )
            one = "one scheme for them"
            if len({quant.schemes[name] for name in group}) == 1:
                one = "the original model, whose matrices are rounded together"
            raise SchemeError(f"{base} has {each}, which servers load as one matrix. What fits: {one}.")


def _shards(parts: Mapping[str, Part], most: int) -> list[File]:
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
        lay_out(name, {each: parts[each] for each in share})
        for name, share in zip(names, shares, strict=True)
    ]


def _index(shards: Sequence[File], total: int) -> str:
    where = {name: shard.name for shard in shards for name in shard.places}
    found = {"metadata": {"total_size": total}, "weight_map": where}
    return json.dumps(found, indent=2, sort_keys=True) + "\n"


def _config(quant: Quantized, packing: ModuleType, kv_cache: str | None) -> dict[str, Any]:
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
    if config["model_type"] not in _IN_BFLOAT16 and packing.rounds_scales(modules.values()):
        config.pop("torch_dtype", None)
        config["dtype"] = "float16"
    asked = {"kv_cache": kv_cache} if kv_cache else {}
    config["quantization_config"] = packing.statement(modules, floats, **asked)
    return config


def _notes(
    quant: Quantized, packing: ModuleType, containers: Mapping[str, str], said: Mapping[str, Any]
) -> tuple[str, ...]:
    found = []
    if rounded := [
        name for name, scheme in quant.schemes.items() if scheme.kind != "none" and containers[name] == "F16"
    ]:
        more = f" and {len(rounded) - 2} more" if len(rounded) > 2 else ""
        found.append(
            f"{', '.join(rounded[:2])}{more} are the values of their codes in float16 (adds 0.02 % relative error): "
            "the loaders of this format take them as floats. With the scheme none they are the checkpoint's own, at the same size"
        )
    packed = [scheme for name, scheme in quant.schemes.items() if _packed(quant, name, packing)]
    if packed and packing.rounds_scales(packed):
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
