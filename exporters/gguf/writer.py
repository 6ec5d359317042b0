"""Write a file: ``gguf`` writes the header, our packers the tensors, rows by rows at offsets known before."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError
from tapeout.exporters import Artifact
from tapeout.exporters.gguf import metadata, tokenizer
from tapeout.exporters.gguf.layout import FLOATS, Entry, Index, Layout, lay_out, library
from tapeout.exporters.steps import by_rows
from tapeout.files import writing
from tapeout.models import EncoderConfig, SourceTensor
from tapeout.models.checkpoint import to_float32
from tapeout.quantize import Progress, Quantized, QuantTensor
from tapeout.quantize.store import write_at


def write(
    quant: Quantized,
    directory: Path,
    *,
    name: str | None = None,
    max_shard_bytes: int | None = None,
    sliding_window: Literal["carry", "clamp"] = "carry",
    as_float32: bool = False,
    layers: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write ``NAME-TYPE.gguf``, or its shards ``NAME-TYPE-00001-of-0000N.gguf``, into a directory.

    Streams: a few rows a thread in memory, whatever the model's size. The bytes do not depend on ``threads``.

    Args:
        quant: the canonical codes.
        directory: made when absent.
        name: default: the model's.
        max_shard_bytes: begin a new shard before tensors go beyond this; None: one file.
        sliding_window: what becomes of a window shorter than the model's context: ``carry`` it (arch granite_swa),
            or ``clamp`` the context to it (arch llama, which knows no window).
        as_float32: write the weights that the codes are as F32, for a runtime's arithmetic apart from its types.
        layers: write the first decoder layers only.
        threads: default: as many as this process has cores.
        progress: told how many bytes are written.

    Raises:
        ModelError: the model or its tokenizer is not expressible. SchemeError: a tensor's scheme is not carried.
        OutputError: the directory cannot be written.
        MissingToolchain: the gguf library is absent.
    """
    layout = lay_out(quant, sliding_window=sliding_window, as_float32=as_float32, layers=layers)
    vocabulary = tokenizer.read(quant.model)
    name = name or quant.model.name
    if "/" in name or not name.strip("."):
        raise ModelError(f"'{name}' cannot be the name of a file.")
    path = directory / f"{name}-{metadata.largest_kind(layout)}.gguf"
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        header = library().GGUFWriter(path, layout.arch, split_max_size=max_shard_bytes or 0)
        metadata.add_model(header, quant, layout, vocabulary.named(name))
        vocabulary.add_to(header)
        for entry in layout.entries:
            kind = library().GGMLQuantizationType[entry.kind]
            header.add_tensor_info(
                entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, raw_dtype=kind
            )
        files = _write_headers(header)
        total, done = sum(entry.nbytes for entry in layout.entries), 0
        with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
            for file in files:
                with file.path.open("r+b") as opened:
                    os.ftruncate(opened.fileno(), file.size)
                    if quant.hollow:
                        continue
                    for entry in (e for e in layout.entries if e.name in file.offsets):
                        _write_entry(quant, entry, opened.fileno(), file.offsets[entry.name], pool)
                        done += entry.nbytes
                        if progress:
                            progress("export", done, total)
    return Artifact(
        format="gguf",
        directory=directory,
        files=tuple(file.path.name for file in files),
        context=layout.context,
        bytes_per_token=_bytes_per_token(quant, layout),
        containers={source: entry.kind for entry in layout.entries for source in entry.parts},
        notes=(*layout.notes, *_short_rows(layout), *vocabulary.notes),
        tokenizer_limits=tuple(vocabulary.limits),
    )


def _short_rows(layout: Layout) -> list[str]:
    """What to know of codes in rows of a single block."""
    if not any(entry.block and entry.shape[-1] == 32 for entry in layout.entries):
        return []
    return [
        "some rows are of 32 weights: llama.cpp built for a CPU with AMX computes them wrongly (0.3.36) unless it is told --no-repack"
    ]


def _bytes_per_token(quant: Quantized, layout: Layout) -> int:
    """Bytes that a token reads: every tensor whole, but of the experts those that it is routed to, and one row of an embedding
    table that is not the head as well.
    """
    config = quant.model.config
    if isinstance(config, EncoderConfig):
        tables = ("token_embd.weight", "position_embd.weight", "token_types.weight")
        return sum(e.nbytes // e.shape[0] if e.name in tables else e.nbytes for e in layout.entries)
    config, total = quant.model.decoder, 0
    for entry in layout.entries:
        share = entry.nbytes
        if entry.name == "token_embd.weight" and not config.tie_word_embeddings:
            share //= entry.shape[0]
        if entry.members and config.moe:
            share = share * config.moe.top_k // config.moe.experts
        total += share
    return total


@dataclass(frozen=True)
class _File:
    """A file whose header is written: where its tensors go, and how long it will be, in bytes."""

    path: Path
    offsets: Mapping[str, int]
    size: int


def _write_headers(header: Any) -> list[_File]:
    """Let a ``gguf.GGUFWriter`` write all that comes before the tensors of each of its files."""
    header.write_header_to_file()
    header.write_kv_data_to_file()
    header.write_ti_data_to_file()
    files = []
    for file, tensors in zip(header.fout, header.tensors, strict=True):
        at, offsets = header.ggml_pad(file.tell(), header.data_alignment), {}
        for name, info in tensors.items():
            offsets[name] = at
            at += header.ggml_pad(info.nbytes, header.data_alignment)
        files.append(_File(Path(file.name), offsets, at))
    header.close()
    return files


def _write_entry(quant: Quantized, entry: Entry, handle: int, offset: int, pool: Executor) -> None:
    """Pack a tensor, a few rows a task, to its place in an open file."""
    if entry.source is None:
        assert entry.values is not None
        write_at(handle, entry.values, offset)
        return
    each = entry.nbytes // len(entry.parts)
    for i, source in enumerate(entry.parts):
        _write_tensor(quant[source], entry, handle, offset + i * each, each, pool)


def _write_tensor(
    tensor: QuantTensor | SourceTensor, entry: Entry, handle: int, offset: int, nbytes: int, pool: Executor
) -> None:
    order = entry.order()
    out, width = tensor.shape[0], math.prod(tensor.shape[1:])

    def write_rows(rows: slice) -> None:
        index = rows if order is None else order[rows]
        write_at(handle, _pack(tensor, index, entry), offset + rows.start * (nbytes // out))

    by_rows(write_rows, out, width, pool)


def _pack(tensor: QuantTensor | SourceTensor, index: slice | Index, entry: Entry) -> npt.NDArray[np.generic]:
    """The bytes of some rows."""
    if isinstance(tensor, QuantTensor):
        rows = tensor.rows(index)
        return (
            entry.block.pack(rows)
            if entry.block
            else rows.dequantize().astype(FLOATS[entry.kind], copy=False)
        )
    bits = tensor.bits()[index]
    if entry.offset:
        return to_float32(bits, tensor.dtype) + np.float32(entry.offset)
    return bits if entry.kind == tensor.dtype else to_float32(bits, tensor.dtype)
