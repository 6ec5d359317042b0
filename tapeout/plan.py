"""What fits where, before any work: for each target and scheme the files' size, and on each device memory, speed and what would fit instead.

No weight is read. Sizes are not estimated: the target's own exporter lays its files out from shapes, into sparse files whose lengths
are counted. Memory is what the target's ``memory`` says, and speed an estimate: the bytes that a token reads over the device's bandwidth.
"""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from tapeout import targets
from tapeout.devices import Device
from tapeout.errors import TapeoutError
from tapeout.exporters import Artifact, Refused
from tapeout.generated import SMALL, write_config
from tapeout.models import DecoderConfig, EncoderConfig, Model, Role, load
from tapeout.quantize import SCHEMES, Scheme
from tapeout.quantize.hollow import Hollow, quantized, store_bytes, with_directory
from tapeout.targets import Memory, Target
from tapeout.targets.held import held_bits
from tapeout.validate import ENCODER_GATES, GATES

CONTEXT = 4096
"""Tokens that are planned for where nobody says how many: these, or as many as the model was made for."""

SOURCE_BYTES_PER_S = 0.45e9
"""Checkpoint bytes that quantize and export take a second by rounding to nearest, on 2 cores and a disk: 13.5 GB to GGUF in 32 s
(benchmarks/results/cpu_7b.txt), 2.2 GB in 4.2 s (gguf_export.txt)."""

SUPER_BYTES_PER_S = 0.08e9
"""The same for the schemes of super-blocks (q4_k …), whose scales are searched for (benchmarks/results/rtn.txt)."""

LEAST = 100_000_000
"""Bytes per token below which it is calls, and not memory, that take the time: no speed is estimated."""

_SPARSE = 0.5  # of a file's bytes: more on the disk, and the exporter wrote its tensors


@dataclass(frozen=True)
class Fit:
    """A target's files on a device.

    Attributes:
        weights, cache, work: bytes on each card: the files or what the runtime makes of them, keys and values of all sequences at the
            full context, activations.
        resident: bytes of the process, the mapped files counted, which the system may take back where the runtime made a copy.
        room: bytes that a runtime may take of each card.
        fits: whether weights, cache and work do.
        instead: what would, where they do not.
        tokens_per_s: an estimate, least and most, of all sequences together at the full context; None: there is none.
        reaches, besides_s, source: the fractions of the bandwidth that were assumed for it, seconds of a step besides, for layers
            and the products of attention (0: none were assumed), and where they come from.
    """

    device: str
    summary: str
    cards: int
    weights: int
    cache: int
    work: int
    resident: int
    room: int
    fits: bool
    instead: str | None
    tokens_per_s: tuple[float, float] | None
    reaches: tuple[float, float]
    besides_s: float
    source: str


@dataclass(frozen=True)
class Row:
    """A target, a format of it, and a scheme.

    Attributes:
        cannot: why nothing can be told; the figures are 0 then.
        artifact_bytes: of the files that the runtime loads. bytes_per_token: that decoding a token reads.
        disk_bytes: store and package; scratch_bytes: what the gates take beside them meanwhile.
        export_s: of quantize and export, an estimate; gates are not in it.
        gates: why each cannot run here; None: it can.
        missing: the command that installs what the target's checks need here.
        assumed: what was not given and stands in.
    """

    target: str
    scheme: str
    cannot: str | None = None
    format: str = ""
    artifact_bytes: int = 0
    bytes_per_token: int = 0
    disk_bytes: int = 0
    scratch_bytes: int = 0
    export_s: float = 0.0
    gates: tuple[tuple[str, str | None], ...] = ()
    missing: str | None = None
    assumed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fits: tuple[Fit, ...] = ()


@dataclass(frozen=True)
class Planned:
    """A model's rows."""

    model: str
    family: str
    parameters: int
    context: int
    batch: int
    rows: tuple[Row, ...]
    unserved: tuple[str, ...]
    """Devices that no planned target makes files for."""

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        found = asdict(self)
        for row in found["rows"]:
            row["gates"] = dict(row["gates"])
        return found


def plan(
    source: str | Path | Model,
    devices: Sequence[Device],
    names: Sequence[str] | None = None,
    schemes: Sequence[str] | None = None,
    *,
    context: int | None = None,
    batch: int = 1,
) -> Planned:
    """Say what a model takes on each device, without reading a weight.

    Args:
        source: a model, or what ``load`` takes; a directory with ``config.json`` alone will do.
        devices: rows of the device table.
        names: targets; None: all that are installed, but those that have none of the devices.
        schemes: None: each target's default.
        context: tokens of a sequence; None: 4096, or the model's own where that is less.
        batch: sequences at once.

    Raises:
        TapeoutError: an unknown target or scheme, a context that the model was not made for.
    """
    model = source if isinstance(source, Model) else load(source, weights=False)
    most = model.config.max_position_embeddings or CONTEXT
    context = context or min(CONTEXT, most)
    if not 1 <= context <= most or batch < 1:
        raise TapeoutError(
            f"--context {context} and --batch {batch}: {model.name} was made for 1 … {most} tokens, and a batch is 1 or more."
        )
    for name in schemes or ():
        Scheme.parse(name)
    if names is None:
        served = {target for device in devices for target in device.targets}
        names = [name for name in targets.names() if name in served]
    rows = []
    for name in names:
        for way, kind in targets.variants(name).items():
            usual = None if model.quantization else targets.default_scheme(kind)
            wanted: Sequence[str | None] = schemes or [usual]
            rows += [_row(model, way, kind, each, devices, context, batch) for each in wanted]
    told = {row.target.split()[0] for row in rows}
    unserved = tuple(each.name for each in devices if not told & set(each.targets))
    parameters = sum(math.prod(spec.shape) for spec in model.specs.values())
    return Planned(model.name, model.config.family, parameters, context, batch, tuple(rows), unserved)


def _row(
    model: Model,
    way: str,
    kind: Target,
    scheme: str | None,
    devices: Sequence[Device],
    context: int,
    batch: int,
) -> Row:
    said = scheme or "its own"
    try:
        if isinstance(carry := kind.carries(SCHEMES[scheme]) if scheme else None, Refused):
            return Row(way, said, f"{carry.reason} What fits: {carry.nearest}.")
        if why := _writes(way):
            return Row(way, said, why)
        quant = quantized(model, scheme)
        target = targets.at(kind, context, batch)
        with tempfile.TemporaryDirectory(prefix="tapeout-plan-") as scratch:
            quant, assumed = _with_tokenizer(quant, Path(scratch) / "model")
            out = Path(scratch) / "artifact"
            out.mkdir()
            artifact = target.export(quant, out)
            size = sum((out / name).stat().st_size for name in artifact.files)
    except TapeoutError as error:
        return Row(way, said, str(error))
    memory = _memory(target, model, context, batch)
    if memory is None:
        assumed += ("of what is no decoder, activations are not known: memory is that of the weights",)
    slow = any(each.scales == "super" for each in quant.schemes.values())
    checkpoint = sum(tensor.nbytes for tensor in quant.model.checkpoint.values())
    return Row(
        target=way,
        scheme=str(quant.scheme),
        format=artifact.format,
        artifact_bytes=size,
        bytes_per_token=artifact.bytes_per_token,
        disk_bytes=store_bytes(quant) + size,
        scratch_bytes=targets.scratch_bytes(target, quant),
        export_s=checkpoint / (SUPER_BYTES_PER_S if slow else SOURCE_BYTES_PER_S),
        gates=tuple(_gates(target, quant, bool(assumed))),
        missing=target.missing(),
        assumed=assumed,
        notes=artifact.notes,
        fits=tuple(
            _fit(target, quant, artifact, size, memory or Memory(0, 0), device, devices, context, batch)
            for device in devices
            if target.name in device.targets
        ),
    )


def _memory(target: Target, model: Model, context: int, batch: int) -> Memory | None:
    """Of all sequences: a target that has no option for a batch keeps keys and values of each, and computes one chunk at a time."""
    if not isinstance(model.config, DecoderConfig):
        return None
    found = target.memory(model.config, context)
    return found if hasattr(target, "batch_size") else Memory(found.cache * batch, found.work)


def _fit(
    target: Target,
    quant: Hollow,
    artifact: Artifact,
    size: int,
    memory: Memory,
    device: Device,
    devices: Sequence[Device],
    context: int,
    batch: int,
) -> Fit:
    kept, mapped = targets.loaded(target, quant, size)
    weights = max(size, kept)
    needed = _on_a_card(quant, weights, memory, device)
    reaches, source = device.fraction(artifact.format)
    layers = getattr(quant.model.config, "num_layers", 0)
    besides = device.besides_s(batch * _products(quant, context), layers, artifact.format)
    read = targets.read(target, quant, _read_bytes(target, quant, artifact, batch)) + memory.cache
    speed = None
    if artifact.bytes_per_token >= LEAST:
        least, most = (batch / (read / (share * device.bandwidth) + besides) for share in reaches)
        speed = (least, most)
    fits = sum(needed) <= device.room
    return Fit(
        device=device.name,
        summary=device.summary,
        cards=device.cards,
        weights=needed[0],
        cache=needed[1],
        work=needed[2],
        resident=(kept + mapped) // device.cards + needed[1] + needed[2],
        room=device.room,
        fits=fits,
        instead=None if fits else _instead(target, quant, weights, memory, device, devices),
        tokens_per_s=speed if fits else None,
        reaches=reaches,
        besides_s=besides,
        source=source,
    )


def _on_a_card(quant: Hollow, weights: int, memory: Memory, device: Device) -> tuple[int, int, int]:
    """Bytes of weights, keys and values, and work on each card: no head is cut, a latent cache is whole on every card, and so is work."""
    config = quant.model.config
    parts = device.cards
    if isinstance(config, DecoderConfig):
        parts = 1 if config.mla else min(parts, config.num_kv_heads)
    return weights // device.cards, memory.cache // parts, memory.work


def _instead(
    target: Target,
    quant: Hollow,
    weights: int,
    memory: Memory,
    device: Device,
    devices: Sequence[Device],
) -> str:
    """What would fit where this does not: the largest smaller scheme, experts elsewhere, more cards of the table."""
    found = []
    smaller = [
        (saved, name)
        for name, scheme in SCHEMES.items()
        if (saved := _saved(target, quant, scheme)) > 0
        and sum(_on_a_card(quant, weights - saved, memory, device)) <= device.room
    ]
    if smaller:
        saved, name = min(smaller)
        found.append(f"scheme {name} (about {(weights - saved) / 1e9:.1f} GB of weights)")
    experts = _expert_bytes(target, quant)
    if experts and sum(_on_a_card(quant, weights - experts, memory, device)) <= device.room:
        found.append(f"routed experts offloaded to main memory ({experts / 1e9:.1f} GB)")
    more = [
        other
        for other in devices
        if target.name in other.targets
        and other.cards > device.cards
        and sum(_on_a_card(quant, weights, memory, other)) <= other.room
    ]
    if more:
        least = min(more, key=lambda other: other.cards)
        what = "experts and layers sharded" if experts else "sharded"
        found.append(f"{what} over {least.cards} cards ({least.name})")
    if found:
        return "; ".join(found)
    saved, name = max((_saved(target, quant, scheme), name) for name, scheme in SCHEMES.items())
    for less, scheme in ((0, str(quant.scheme)), (max(saved, 0), name)):
        rest = device.room - (weights - less) // device.cards - memory.work
        if memory.cache and rest > 0:
            share = min(1.0, rest * device.cards / memory.cache)
            return f"{share:.0%} of the context or the batch, as {scheme}"
    return "nothing: a smaller model, or a device with more memory"


def _linear(quant: Hollow) -> Iterator[tuple[str, int, int]]:
    """Name, weights and row length of every linear layer's matrix, experts' among them."""
    for name, spec in quant.model.specs.items():
        if spec.role is Role.LINEAR:
            yield name, math.prod(spec.shape), spec.shape[-1]


def _bits(target: Target, quant: Hollow, name: str, width: int) -> float:
    """Bits that a weight of a linear layer takes in the files."""
    held = held_bits(target, quant.schemes[name], width)
    tensor = quant.model.checkpoint[name]
    return held or 8 * tensor.nbytes / math.prod(tensor.shape)


def _saved(target: Target, quant: Hollow, scheme: Scheme) -> int:
    """Bytes that the linear layers would take less as another scheme; 0: it does not fit them."""
    bits = 0.0
    for name, count, width in _linear(quant):
        other = held_bits(target, scheme, width)
        if other is None or (scheme.group and width % scheme.group):
            return 0
        bits += count * (_bits(target, quant, name, width) - other)
    return int(bits / 8)


def _expert_bytes(target: Target, quant: Hollow) -> int:
    """Bytes of routed experts in the files."""
    config = quant.model.config
    if not isinstance(config, DecoderConfig) or not config.moe:
        return 0
    names = {
        name
        for layer in range(config.num_layers)
        if (moe := config.routed(layer))
        for expert in range(moe.experts)
        for name in moe.weights(layer, expert)
    }
    return int(
        sum(n * _bits(target, quant, name, width) / 8 for name, n, width in _linear(quant) if name in names)
    )


def _products(quant: Hollow, context: int) -> float:
    """Products of a token's attention at the end of a context: of every head's query with keys, and of its weights with values."""
    config = quant.model.config
    if not isinstance(config, DecoderConfig):
        return 0.0
    width = config.head_dim + config.value_dim
    if config.mla:
        width = 2 * config.mla.kv_rank + config.mla.rope_dim
    tokens = sum(min(context, config.window(layer) or context) for layer in range(config.num_layers))
    return float(config.num_heads * width * tokens)


def _read_bytes(target: Target, quant: Hollow, artifact: Artifact, batch: int) -> float:
    """Bytes of weights that a step of the whole batch reads: each once, of routed experts those that some sequence is sent to.

    Experts are taken as equally likely: of E, with k a token, ``1 - (1 - k/E)^batch`` are read.
    """
    config = quant.model.config
    if batch == 1 or not isinstance(config, DecoderConfig) or not config.moe:
        return artifact.bytes_per_token
    share = config.moe.top_k / config.moe.experts
    more = 1 - (1 - share) ** batch - share
    return artifact.bytes_per_token + more * _expert_bytes(target, quant)


def _gates(target: Target, quant: Hollow, no_tokenizer: bool) -> Iterator[tuple[str, str | None]]:
    """Each gate of the model's kind, and why it cannot run here."""
    model = quant.model
    names = ENCODER_GATES if isinstance(model.config, EncoderConfig) else GATES
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    reference = f"{', '.join(absent)} is not installed: pip install 'tapeout[reference]'." if absent else None
    floats = 4 * sum(math.prod(spec.shape) for spec in model.specs.values())
    here = psutil.virtual_memory().total
    if not reference and floats > here:
        reference = (
            f"the reference in float32 takes {floats / 1e9:.1f} GB, and this machine has {here / 1e9:.1f} GB."
        )
    for name in names:
        why = None
        if name in ("lowering", "decode", "padding", "task"):
            why = target.missing() or reference
        elif name == "codes":
            why = target.missing()
        elif name == "quality":
            why = "the model came quantized: there is no original." if model.quantization else reference
        elif name == "tokenizer":
            why = "there is no tokenizer beside config.json." if no_tokenizer else target.missing()
        if name == "task" and not (model.directory / "tasks.jsonl").exists():
            why = "the model has no tasks.jsonl with prompts and answers."
        yield name, why


def _with_tokenizer(quant: Hollow, directory: Path) -> tuple[Hollow, tuple[str, ...]]:
    """The same with a tokenizer that stands in where a decoder has none: as many tokens, and no merges."""
    model = quant.model
    if model.tokenizer_files() or not isinstance(model.config, DecoderConfig):
        return quant, ()
    directory.mkdir()
    _write_tokenizer(directory, model.config.vocab_size)
    note = "there is no tokenizer beside config.json: one of as many tokens stands in, a few megabytes smaller than a true one"
    return with_directory(quant, directory), (note,)


def _write_tokenizer(directory: Path, size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"Ġ{index:06}" for index in range(len(alphabet), size))][:size]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")


def lays_out(target: Target) -> bool:
    """Whether a target's exporter lays its files out from shapes alone, so that they are sparse."""
    ways = targets.variants(target.name)
    same = (way for way, kind in ways.items() if getattr(kind, "format", "") == getattr(target, "format", ""))
    return _writes(next(same, target.name)) is None


@cache
def _writes(way: str) -> str | None:
    """Why a target's files cannot be laid out: its exporter writes tensors that have no values. Found on a small model; None: they can."""
    kind = targets.variants(way.split()[0])[way]
    fields = SMALL | {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 512}
    with tempfile.TemporaryDirectory(prefix="tapeout-plan-") as scratch:
        directory, out = write_config(Path(scratch) / "model", "llama", fields), Path(scratch) / "artifact"
        out.mkdir()
        _write_tokenizer(directory, fields["vocab_size"])
        model = load(directory, weights=False)
        artifact = kind.export(quantized(model, targets.default_scheme(kind)), out)
        largest = max((out / name for name in artifact.files), key=lambda path: path.stat().st_size).stat()
    if largest.st_blocks * 512 > _SPARSE * largest.st_size:
        return "its exporter cannot lay files out without weights, so that nothing is told before the export."
    return None
