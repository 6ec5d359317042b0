"""Write a model: the graph as one small file, the weights beside it, rows by rows at offsets known before."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError
from tapeout.exporters import Artifact
from tapeout.exporters.onnx import genai
from tapeout.exporters.onnx.blocks import Floats, Linear
from tapeout.exporters.onnx.contrib import ContribOps
from tapeout.exporters.onnx.emitter import Value
from tapeout.exporters.onnx.encoder import EncoderContribOps
from tapeout.exporters.onnx.graph import DATA, FLOATS, OPSET, Graph, Piece
from tapeout.exporters.onnx.migraphx import OPSET as MIGRAPHX_OPSET
from tapeout.exporters.onnx.migraphx import MiGraphXOps
from tapeout.exporters.onnx.placed import place
from tapeout.exporters.onnx.seq2seq import ENCODER, Seq2SeqContribOps
from tapeout.exporters.onnx.standard import StandardOps
from tapeout.exporters.onnx.tensorrt import TensorRtOps
from tapeout.exporters.steps import by_rows
from tapeout.files import writing
from tapeout.models import DecoderConfig, EncoderConfig, Role, Seq2SeqConfig, TracedConfig
from tapeout.models.checkpoint import to_float32
from tapeout.models.encoder import EncoderOps, encoder
from tapeout.models.graph import EMBEDDING, decoder
from tapeout.models.module import SAMPLES
from tapeout.models.seq2seq import Seq2SeqOps, decode, encode
from tapeout.quantize import Progress, Quantized, QuantTensor
from tapeout.quantize.store import write_at

MODEL = "model.onnx"

Dialect = Literal["onnxruntime", "standard", "tensorrt", "migraphx"]
_OPS: dict[Dialect, type[ContribOps | StandardOps]] = {
    "onnxruntime": ContribOps,
    "standard": StandardOps,
    "tensorrt": TensorRtOps,
    "migraphx": MiGraphXOps,
}


def write(
    quant: Quantized,
    directory: Path,
    *,
    layers: int | None = None,
    exact: bool = False,
    dialect: Dialect = "onnxruntime",
    context: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write ``model.onnx``, ``model.onnx.data``, ``genai_config.json`` and the tokenizer's files into a directory.

    Streams: a few rows a thread in memory, whatever the model's size. The bytes do not depend on ``threads``.

    Args:
        quant: the canonical codes.
        directory: made when absent.
        layers: write the first decoder layers only.
        exact: as ``exact_graph``.
        dialect: ``onnxruntime``: its own operators. ``standard``: ONNX's alone (opset 23), for other runtimes. ``tensorrt`` and
            ``migraphx``: what these compile, in float16.
        context: most tokens of a sequence, for which the file has positions; default, and the most: the model's own.
        threads: default: as many as this process has cores.
        progress: told how many bytes are written.

    Raises:
        ModelError: the model is not expressible, or has no tokenizer.json. SchemeError: a tensor's scheme is not carried.
        OutputError: the directory cannot be written.
        MissingToolchain: the onnx library is absent.
    """
    graph, size = build(quant, layers=layers, exact=exact, dialect=dialect, context=context)
    files = side_files(quant)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for name, each in {MODEL: graph, **graph.others}.items():
            (directory / name).write_bytes(_model(each, quant))
        context = _context(quant, context)
        plays = isinstance(quant.model.config, DecoderConfig) and dialect in ("onnxruntime", "standard")
        generates = [genai.CONFIG] if plays else []
        for name in generates:
            (directory / name).write_text(genai.config(quant.model, context), encoding="utf-8")
        for file in files:
            shutil.copyfile(file, directory / file.name)
        with (directory / DATA).open("wb") as opened:
            os.ftruncate(opened.fileno(), size)
            if not quant.hollow:
                _write_data(graph, opened.fileno(), size, threads, progress)
    return Artifact(
        format="onnx",
        directory=directory,
        files=(MODEL, *graph.others, DATA, *generates, *(file.name for file in files)),
        context=context,
        bytes_per_token=_bytes_per_token(graph),
        containers=dict(graph.containers),
        notes=(*graph.notes, *_notes(quant, dialect)),
    )


def exact_graph(quant: Quantized, context: int | None = None, dialect: Dialect = "onnxruntime") -> bytes:
    """The graph of the same weights, in the same data file, that leaves the inputs of quantized matmuls as they are.

    Of dialects of float16 it is float32 everywhere.
    """
    return _model(build(quant, exact=True, context=context, dialect=dialect)[0], quant)


def _context(quant: Quantized, wanted: int | None) -> int:
    own = quant.model.config.max_position_embeddings
    return min(wanted or own, own)


def build(
    quant: Quantized,
    *,
    layers: int | None = None,
    exact: bool = False,
    dialect: Dialect = "onnxruntime",
    context: int | None = None,
) -> tuple[Graph, int]:
    """The graph, and how long its data file is, in bytes."""
    config = quant.model.config
    if isinstance(config, TracedConfig):
        if dialect != "onnxruntime" or layers is not None:
            what = (
                "written in ONNX Runtime's operators only"
                if dialect != "onnxruntime"
                else "not cut to fewer layers"
            )
            raise ModelError(f"the graph of {quant.model.name} was made by {config.road}: it is {what}.")
        graph = place(quant, exact=exact)
        return graph, graph.finish()
    count = config.num_layers if layers is None else layers
    if not 1 <= count <= config.num_layers:
        raise ModelError(f"layers = {count}: {quant.model.name} has 1 … {config.num_layers}.")
    graph = Graph(quant, opset=MIGRAPHX_OPSET if dialect == "migraphx" else OPSET)
    if dialect != "onnxruntime" and not isinstance(config, DecoderConfig):
        raise ModelError(
            f"{quant.model.name} is {quant.model.kind}, which is written in ONNX Runtime's operators only."
        )
    if isinstance(config, EncoderConfig):
        encoding = EncoderContribOps(graph, config.max_position_embeddings, exact)
        encoding.output(encoder(cast("EncoderOps[Value]", encoding), config, encoding.ids(), count), config)
        return graph, graph.finish()
    if isinstance(config, Seq2SeqConfig):
        stacks = Seq2SeqContribOps(graph, config.max_position_embeddings, exact, stack="decoder")
        source = replace(stacks, graph=graph.other(ENCODER), stack="encoder")
        encode(cast("Seq2SeqOps[Value]", source), config, source.ids(), count)
        stacks.logits(decode(cast("Seq2SeqOps[Value]", stacks), config, stacks.ids(), count))
        return graph, graph.finish()
    ops = _OPS[dialect](graph, _context(quant, context), exact)
    ops.logits(decoder(ops, quant.model.decoder, ops.ids(), count))
    return graph, graph.finish()


def side_files(quant: Quantized) -> list[Path]:
    """What the artifact takes along: a module's samples, or the tokenizer; ModelError where its runtime would find none."""
    config = quant.model.config
    if isinstance(config, TracedConfig) and config.is_module:
        return [quant.model.directory / SAMPLES]
    files = quant.model.tokenizer_files()
    if not any(file.name == "tokenizer.json" for file in files):
        raise ModelError(
            f"{quant.model.directory} has no tokenizer.json, which an ONNX package tokenizes with."
        )
    _check_ids(quant.model.directory / "tokenizer.json", quant.model.config.vocab_size)
    return files


def _check_ids(tokenizer: Path, size: int) -> None:
    """ModelError for tokens that the model has no row for; added ones (of pictures, say) may be for a larger model."""
    try:
        vocab = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
        ids = vocab if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}
        beyond = [f"{text!r} = {index}" for text, index in ids.items() if index >= size]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{tokenizer} is no tokenizer with a vocabulary: {error!r}.") from error
    if beyond:
        raise ModelError(
            f"tokenizer.json has ids beyond vocab_size {size} of config.json: {', '.join(beyond[:3])}."
        )


def _model(graph: Graph, quant: Quantized) -> bytes:
    facts = {
        "tapeout.scheme": quant.scheme.name,
        "tapeout.rounding": quant.rounding,
        "tapeout.source_sha256": quant.source_sha256,
        "tapeout.codes_sha256": quant.digest,
        "tapeout.graph": quant.model.graph,
    }
    config = quant.model.config
    if isinstance(config, EncoderConfig):
        facts |= {"tapeout.output": config.output, "tapeout.vocab_size": str(config.vocab_size)}
    elif isinstance(config, DecoderConfig) and config.mla:
        facts["tapeout.latent_cache"] = "values are the keys"
    elif isinstance(config, Seq2SeqConfig):
        facts["tapeout.start"] = str(config.decoder_start_token_id)
    return graph.model(facts)


def _notes(quant: Quantized, dialect: Dialect) -> Iterator[str]:
    """What a user has to know of the schemes, each once."""
    for scheme in sorted(set(quant.schemes.values()), key=str):
        if dialect in ("tensorrt", "migraphx"):
            if scheme.bits in (2, 3):
                yield f"the codes of {scheme} are held in 4 bits"
            continue
        if scheme.levels == "nf4":
            yield f"onnxruntime multiplies {scheme} exactly, but about as slowly as float32"
        if scheme.levels == "e4m3":
            yield f"onnxruntime widens {scheme} to float32 when it loads the model"
        if scheme.activations:
            yield (
                f"on x86 CPUs without VNNI, sums of {scheme}'s int8 products overflow unless the session is opened with "
                "session.x64quantprecision = 1, as tapeout opens it"
            )
        if scheme.bits == 3:
            yield f"the codes of {scheme} are held in 4 bits"


def _bytes_per_token(graph: Graph) -> int:
    """Bytes that a token reads: every tensor whole, but one row of a table that is only looked up, and the experts it takes."""
    config, total = graph.quant.model.config, 0.0
    for each in graph.initializers.values():
        for piece in each.pieces:
            share = 1.0
            if isinstance(config, TracedConfig):
                spec = graph.quant.model.specs[piece.sources[0]]
                looked_up = spec.role is Role.EMBEDDING and not config.tie_word_embeddings
                share = 1 / spec.shape[0] if looked_up or spec.role is Role.POSITION else 1.0
            elif not isinstance(config, DecoderConfig):
                spec = graph.quant.model.specs[piece.sources[0]]
                looked_up = spec.role in (Role.EMBEDDING, Role.POSITION)
                share = 1 / spec.shape[0] if looked_up and not config.tie_word_embeddings else 1.0
                # The source is read once, whatever the length of the target.
                share = (
                    0.0
                    if piece.sources[0].startswith("encoder.") and isinstance(config, Seq2SeqConfig)
                    else share
                )
            elif piece.sources[0] == EMBEDDING and not config.tie_word_embeddings:
                share = 1 / config.vocab_size
            elif config.moe and any(
                f".{config.moe.expert.split('{}')[0].lstrip('.')}" in source for source in piece.sources
            ):
                share = config.moe.top_k / config.moe.experts
            total += piece.nbytes * share
    return round(total)


def _write_data(graph: Graph, handle: int, size: int, threads: int | None, progress: Progress | None) -> None:
    together: dict[tuple[str, ...], list[Piece]] = {}
    for each in graph.initializers.values():
        if each.values is not None:
            write_at(handle, each.values, each.offset)
        for piece in each.pieces:
            together.setdefault(piece.sources, []).append(piece)
    done = 0
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        for sources, pieces in together.items():
            _write_pieces(graph.quant, sources, pieces, handle, pool)
            done += sum(piece.nbytes for piece in pieces)
            if progress:
                progress("export", done, size)
    if progress:
        progress("export", size, size)


def _write_pieces(
    quant: Quantized, sources: Sequence[str], pieces: Sequence[Piece], handle: int, pool: Executor
) -> None:
    """Pack tensors whose rows take turns, a few rows a task, to their places in an open file."""
    tensors = [quant[source] for source in sources]
    shape = quant.model.specs[sources[0]].shape
    rows, width = shape[0], int(np.prod(shape[1:]))
    if isinstance(pieces[0].container, Linear | Floats):  # columns become rows: a tensor at a time
        (tensor,) = tensors
        parts = _parts(tensor, slice(None), pieces[0])
        for piece in pieces:
            write_at(handle, parts[piece.part], piece.offset)
        return

    def write_rows(taken: slice) -> None:
        parts = [_parts(tensor, taken, pieces[0]) for tensor in tensors]
        for piece in pieces:
            each = [part[piece.part].reshape(taken.stop - taken.start, -1) for part in parts]
            write_at(handle, np.stack(each, axis=1), piece.offset + taken.start * (piece.nbytes // rows))

    by_rows(write_rows, rows, width, pool)


def _parts(tensor: object, rows: slice, piece: Piece) -> dict[str, npt.NDArray[np.generic]]:
    """The parts of some rows."""
    if isinstance(tensor, QuantTensor):
        taken = tensor.rows(rows)
        return piece.container.pack(taken) if piece.container else {"weight": taken.dequantize()}
    bits = tensor.bits()[rows]  # type: ignore[attr-defined]
    dtype: str = tensor.dtype  # type: ignore[attr-defined]
    return {"weight": bits if FLOATS[dtype] == piece.kind else to_float32(bits, dtype)}
