"""Write a package: the program as one small file, the weights beside it, rows by rows at places known before."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError, PackageError, SchemeError
from tapeout.exporters import Artifact
from tapeout.exporters.coreml.blob import bits_of
from tapeout.exporters.coreml.blocks import Opset
from tapeout.exporters.coreml.emitter import HIDDEN, NEXT, DecoderOps, nbytes, state_shapes
from tapeout.exporters.coreml.encoder import EncoderMilOps
from tapeout.exporters.coreml.program import (
    MANIFEST,
    PACKAGE,
    SPEC,
    WEIGHTS,
    Blob,
    Graph,
    library,
    manifest,
    quiet,
)
from tapeout.exporters.steps import by_rows
from tapeout.files import writing
from tapeout.models import DecoderConfig, EncoderConfig, Role
from tapeout.models.checkpoint import to_float32
from tapeout.models.encoder import EncoderOps, encoder
from tapeout.models.graph import embed, head, layer
from tapeout.quantize import Progress, Quantized, QuantTensor
from tapeout.quantize.store import write_at

STATES = 4 << 30
"""Bytes of caches that are written without being asked for less: what a phone or a small laptop has to give."""

_KEY = "co.tapeout."
_ROWS = 8  # in work together: whatever the bits of a number, so many rows are whole bytes


@dataclass(frozen=True)
class Options:
    """What a package is made for.

    Attributes:
        sequence_length: most tokens of a sequence, for which caches are static. Default, and the most: the model's own.
        batch_size: sequences of a call.
        prefill_chunk: most tokens of a call of ``prefill``.
        opset: of the program: ios18, or ios26, which holds more schemes. Default: the older one that holds the model's.
        layers: write the first layers only.
        chunks: packages that the layers of a decoder are cut into, as many in each; every one is called in turn.
    """

    sequence_length: int | None = None
    batch_size: int = 1
    prefill_chunk: int = 256
    opset: Opset | None = None
    layers: int | None = None
    chunks: int = 1

    def __post_init__(self) -> None:
        """ModelError for a number that is none."""
        for name in ("sequence_length", "batch_size", "prefill_chunk", "chunks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ModelError(f"{name} = {value}: at least 1 is needed.")


def write(
    quant: Quantized,
    directory: Path,
    options: Options | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write ``model.mlpackage``, or a package a chunk, and the tokenizer's files into a directory.

    Streams: a few rows a thread in memory, whatever the model's size. The bytes do not depend on ``threads``.

    Args:
        quant: the canonical codes.
        directory: made when absent.
        options: what the package is made for.
        threads: default: as many as this process has cores.
        progress: told how many bytes are written.

    Raises:
        ModelError: the model is not expressible, its caches are too large, or it has no tokenizer.json.
        SchemeError: a tensor's scheme is not carried, or a value of it is beyond float16.
        OutputError: the directory cannot be written.
        MissingToolchain: coremltools is absent.
    """
    library()
    options = resolved(quant, options or Options())
    files = side_files(quant)
    graphs = []
    _written.clear()
    with writing(directory):
        for part, name in enumerate(packages(options)):
            graph, spec = build(quant, options, part)
            _write_package(directory / name, graph, spec, threads, progress)
            graphs.append(graph)
            _written[part] = quant, options_of(spec), graph, spec
        for file in files:
            shutil.copyfile(file, directory / file.name)
    names = [f"{package}/{name}" for package in packages(options) for name in (MANIFEST, SPEC, WEIGHTS)]
    assert options.sequence_length
    return Artifact(
        format="coreml",
        directory=directory,
        files=(*names, *(file.name for file in files)),
        context=options.sequence_length,
        bytes_per_token=sum(_bytes_per_token(graph) for graph in graphs),
        containers={name: kind for graph in graphs for name, kind in graph.containers.items()},
        notes=tuple(dict.fromkeys(note for graph in graphs for note in graph.notes)),
    )


def packages(options: Options) -> list[str]:
    """Names of the packages, in the order in which they are called."""
    if options.chunks == 1:
        return [PACKAGE]
    return [f"model_{part + 1}_of_{options.chunks}.mlpackage" for part in range(options.chunks)]


def packages_in(directory: Path) -> list[Path]:
    """The packages of an artifact, in the order in which they are called; PackageError: one is absent."""
    first = next(iter(sorted(directory.glob("model_1_of_*.mlpackage"))), None)
    count = int(first.stem.rpartition("_")[2]) if first else 1
    found = [directory / name for name in packages(Options(chunks=count))]
    for path in found:
        if not path.is_dir():
            raise PackageError(f"{path} is absent; there is nothing to load.")
    return found


def _write_package(
    package: Path, graph: Graph, spec: Any, threads: int | None, progress: Progress | None
) -> None:
    data = spec.SerializeToString(deterministic=True)
    (package / WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    (package / SPEC).write_bytes(data)
    (package / MANIFEST).write_text(manifest(hashlib.sha256(data).hexdigest()), encoding="utf-8")
    with (package / WEIGHTS).open("wb") as opened:
        os.ftruncate(opened.fileno(), graph.layout.end)
        if not graph.quant.hollow:
            write_blobs(graph, opened.fileno(), threads, progress)


def resolved(quant: Quantized, options: Options) -> Options:
    """The same with its defaults filled in; ModelError for what a model has not, and for caches that are too large."""
    config = quant.model.config
    if not isinstance(config, DecoderConfig | EncoderConfig):
        raise ModelError(f"{quant.model.name} is {quant.model.kind}, for which no Core ML program is built.")
    count = config.num_layers if options.layers is None else options.layers
    if not 1 <= count <= config.num_layers:
        raise ModelError(f"layers = {count}: {quant.model.name} has 1 … {config.num_layers}.")
    if count % options.chunks or (options.chunks > 1 and not isinstance(config, DecoderConfig)):
        fits = (
            [str(n) for n in range(1, count + 1) if count % n == 0]
            if isinstance(config, DecoderConfig)
            else ["1"]
        )
        raise ModelError(
            f"chunks = {options.chunks} does not divide the {count} layers of {quant.model.name} ({quant.model.kind}); fits: {', '.join(fits)}."
        )
    most = config.max_position_embeddings
    context = options.sequence_length or most
    if context > most:
        raise ModelError(f"sequence_length = {context}: {quant.model.name} was made for {most} tokens.")
    options = replace(
        options,
        sequence_length=context,
        layers=count,
        prefill_chunk=min(options.prefill_chunk, context),
    )
    if isinstance(config, DecoderConfig):
        _check_states(config, options)
    return options


def _check_states(config: DecoderConfig, options: Options) -> None:
    """ModelError for caches that are too large."""
    assert options.sequence_length
    size = partial(cache_bytes, config, batch=options.batch_size, layers=options.layers)
    if (found := size(options.sequence_length)) <= STATES:
        return
    fits = 1 << options.sequence_length.bit_length()
    while fits > 1 and size(fits) > STATES:
        fits //= 2
    raise ModelError(
        f"a context of {options.sequence_length} tokens takes {found / 1e9:.1f} GB of float16 caches, which a Core ML program has "
        f"whole from the start; at most {STATES / 1e9:.1f} GB are written. What fits: sequence_length {fits}."
    )


def cache_bytes(config: DecoderConfig, context: int, batch: int = 1, layers: int | None = None) -> int:
    """Bytes of the caches of a decoder's first layers, float16; None: of all."""
    return nbytes(state_shapes(config, context, batch, range(layers or config.num_layers))[0])


_written: dict[int, tuple[Quantized, Options, Graph, Any]] = {}
"""Of the last artifact, by part, from what its program was made, and the program: its reader needs not make it again."""


def expected(quant: Quantized, options: Options, part: int) -> tuple[Graph, Any]:
    """What ``build`` gives: of these very codes if they were the last ones that were written, else built anew."""
    of, how, graph, spec = _written.get(part, (None, None, None, None))
    if of is quant and how == options and graph is not None:
        return graph, spec
    return build(quant, options, part)


def build(quant: Quantized, options: Options, part: int = 0) -> tuple[Graph, Any]:
    """The graph of a chunk, and its specification; ``options`` as ``resolved`` gives them."""
    graph = Graph(quant, options.opset)
    if isinstance(quant.model.config, EncoderConfig):
        _encoder_function(graph, quant.model.config, options)
    else:
        _decoder_functions(graph, options, part)
    if graph.newest == "ios26":
        graph.note(
            "the program is of opset ios26: it needs iOS 26 or macOS 26, and nobody has run one of its lookups under scales"
        )
    spec = graph.finish(
        _facts(quant, options, graph, part),
        author="tapeout",
        license=quant.model.licence or "",
        shortDescription=f"{quant.model.name}, {quant.model.kind}, weights {quant.scheme}",
    )
    return graph, spec


def _facts(quant: Quantized, options: Options, graph: Graph, part: int) -> dict[str, str]:
    facts = {
        "scheme": quant.scheme.name,
        "rounding": quant.rounding,
        "source_sha256": quant.source_sha256,
        "codes_sha256": quant.digest,
        "context": options.sequence_length,
        "batch": options.batch_size,
        "layers": options.layers,
        "opset": graph.newest,
    }
    config = quant.model.config
    if isinstance(config, DecoderConfig | EncoderConfig):
        facts["vocab_size"] = config.vocab_size
    if isinstance(config, EncoderConfig):
        facts["output"] = config.output
    if isinstance(config, DecoderConfig):
        facts["chunk"] = options.prefill_chunk
        facts |= {"chunks": options.chunks, "part": part}
        if config.sliding_window:
            facts["window"] = config.sliding_window
    return {_KEY + key: str(value) for key, value in facts.items()}


def options_of(spec: Any) -> Options:
    """The options that a package was written with."""
    said = {key.removeprefix(_KEY): value for key, value in spec.description.metadata.userDefined.items()}
    return Options(
        int(said["context"]), int(said["batch"]), int(said.get("chunk", 1)), said["opset"], int(said["layers"]),
        int(said.get("chunks", 1)),
    )  # fmt: skip


def _decoder_functions(graph: Graph, options: Options, part: int) -> None:
    ct = library()
    config = graph.quant.model.decoder
    context, batch = options.sequence_length, options.batch_size
    assert context
    assert options.layers
    each = options.layers // options.chunks
    layers = range(part * each, (part + 1) * each)
    last = part == options.chunks - 1
    states, places = state_shapes(config, context, batch, layers)
    for name, longest in (("prefill", options.prefill_chunk), ("decode", 1)):
        with quiet():
            tokens = ct.RangeDim(1, longest, default=longest) if longest > 1 else 1
            total = ct.RangeDim(1, context, default=longest)
            given = (
                ct.TensorType(HIDDEN, (batch, tokens, config.hidden_size), np.float32)
                if part
                else ct.TensorType("inputIds", (batch, tokens), np.int32)
            )
            mask = ct.TensorType("fullAttentionMask", (batch, 1, tokens, total), np.float16)

        def body(inputs: Any, one: bool = longest == 1) -> Sequence[Any]:
            ops = DecoderOps(graph, batch, context=context, places=places, one=one)
            x = ops.begin(inputs)
            if not part:
                x = embed(ops, config, x)
            for index in layers:
                x = layer(ops, config, index, x)
            return [ops.logits(head(ops, config, x)) if last else ops.hidden(x)]

        graph.function(name, {given.name: given, "fullAttentionMask": mask}, states, body, _DESCRIPTIONS)


def _encoder_function(graph: Graph, config: EncoderConfig, options: Options) -> None:
    ct = library()
    context, batch, layers = options.sequence_length, options.batch_size, options.layers
    assert context
    with quiet():
        tokens = ct.RangeDim(1, context, default=context)
        inputs = {
            name: ct.TensorType(name, (batch, tokens), np.int32) for name in ("inputIds", "attentionMask")
        }

    def body(given: Any) -> Sequence[Any]:
        ops = EncoderMilOps(graph, batch, context=context)
        x = encoder(cast("EncoderOps[Any]", ops), config, ops.begin(given), layers)
        return [ops.output(x, config.output)]

    graph.function("main", inputs, {}, body, _DESCRIPTIONS | _ENCODER_DESCRIPTIONS)


_ENCODER_DESCRIPTIONS = {
    "inputIds": "Token ids [batch, tokens].",
    "attentionMask": "1 for tokens, 0 for padding [batch, tokens].",
    "logits": "Scores of the classes [batch, classes].",
    "embeddings": "One vector a text [batch, hidden].",
    "hiddenStates": "The last layer's output [batch, tokens, hidden].",
}

_DESCRIPTIONS = {
    "inputIds": "Token ids of this call [batch, tokens]: up to a chunk of a prompt for prefill, one for decode.",
    "fullAttentionMask": "Added to the scores [batch, 1, tokens, total]; total counts this call's tokens and all before them. The program "
    "itself hides what comes later and what a window leaves out: zeros will do; very low values hide padding.",
    "logits": "Scores of the next token [batch, tokens, vocabulary].",
    HIDDEN: "What the package before this one gives [batch, tokens, hidden].",
    NEXT: "For the package behind this one [batch, tokens, hidden].",
    "keyCache": "Keys of the layers that look at all tokens [layers, batch, heads, context, width].",
    "valueCache": "Values of the layers that look at all tokens [layers, batch, heads, context, width].",
    "keyCacheWindow": "Keys of the layers with a window [layers, batch, heads, window, width]: position p in slot p mod window.",
    "valueCacheWindow": "Values of the layers with a window [layers, batch, heads, window, width]: position p in slot p mod window.",
    "latentCache": "Latents of keys and values, and turned keys [layers, batch, 1, context, width].",
}


def side_files(quant: Quantized) -> list[Path]:
    """The tokenizer's files; ModelError where there is none that Swift's tokenizers read."""
    files = quant.model.tokenizer_files()
    if not any(file.name == "tokenizer.json" for file in files):
        raise ModelError(f"{quant.model.directory} has no tokenizer.json, which an app tokenizes with.")
    return files


def _bytes_per_token(graph: Graph) -> int:
    """Bytes that a token reads: every tensor whole, but one row of a table that is only looked up; and all experts."""
    config, total = graph.quant.model.config, 0.0
    for blob in graph.blobs.values():
        if blob.place is None or not blob.sources:
            continue
        share = 1.0
        spec = graph.quant.model.specs[blob.sources[0]]
        if spec.role in (Role.EMBEDDING, Role.POSITION) and not getattr(config, "tie_word_embeddings", False):
            share = 1 / spec.shape[0]
        total += blob.place.nbytes * share
    return round(total)


def write_blobs(graph: Graph, handle: int, threads: int | None, progress: Progress | None) -> None:
    """Write a blob file whole into an open one of its length."""
    together: dict[tuple[Any, ...], list[Blob]] = {}
    _write_bytes(handle, graph.layout.header(), 0)
    for blob in graph.blobs.values():
        if blob.place is None:
            continue
        _write_bytes(handle, blob.place.header(), blob.place.record)
        if blob.values is not None:
            write_at(handle, blob.values, blob.place.data)
        else:
            rows = None if blob.rows is None else blob.rows.tobytes()
            together.setdefault((blob.sources, rows), []).append(blob)
    done = 0
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        for blobs in together.values():
            for turn, source in enumerate(blobs[0].sources):
                _write_tensor(graph.quant, source, turn, blobs, handle, pool)
            done += sum(blob.place.nbytes for blob in blobs if blob.place)
            if progress:
                progress("export", done, graph.layout.end)
    if progress:
        progress("export", graph.layout.end, graph.layout.end)


def _write_bytes(handle: int, data: bytes, offset: int) -> None:
    write_at(handle, np.frombuffer(data, np.uint8), offset)


def _write_tensor(
    quant: Quantized, source: str, turn: int, blobs: Sequence[Blob], handle: int, pool: Executor
) -> None:
    """Pack one tensor, a few rows a task, to its places in an open file: the ``turn``-th of its blobs."""
    tensor, rows = quant[source], blobs[0].rows
    shape = quant.model.specs[source].shape
    count = shape[0] if rows is None else len(rows)
    width = int(np.prod(shape[1:]))

    def write_rows(units: slice) -> None:
        taken = slice(units.start * _ROWS, min(units.stop * _ROWS, count))
        parts = _parts(tensor, taken if rows is None else rows[taken], blobs[0], source)
        for blob in blobs:
            assert blob.place
            each = math.prod(blob.shape) // len(blob.sources) // count * bits_of(blob.kind)
            offset, left = divmod((turn * count + taken.start) * each, 8)
            if left:
                raise SchemeError(
                    f"{source} does not end at a byte, where the next of its experts should begin; what fits: int8."
                )
            write_at(handle, parts[blob.part], blob.place.data + offset)

    by_rows(write_rows, -(-count // _ROWS), width * _ROWS, pool)


def _parts(tensor: Any, rows: Any, blob: Blob, source: str) -> dict[str, npt.NDArray[Any]]:
    """The parts of some rows."""
    if isinstance(tensor, QuantTensor):
        taken = tensor.rows(rows)
        if blob.container is None:
            return {"weight": taken.dequantize()}
        try:
            return dict(blob.container.pack(taken))
        except SchemeError as error:
            raise SchemeError(f"{source}: {error}. What fits: none.") from None
    values = to_float32(tensor.bits()[rows], tensor.dtype)
    return {"weight": values if blob.kind == "float32" else as_half(values, source)}


def as_half(values: npt.NDArray[np.float32], source: str) -> npt.NDArray[np.float16]:
    """Rounded to float16; SchemeError names a weight beyond its range."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        found = values[~np.isfinite(half)][0]
        raise SchemeError(
            f"{source} holds {found:g}, beyond float16 (65504), which Core ML computes with. What fits: int8, whose scales may be."
        )
    return half
