"""Which tensors a file holds, in which type and order, and which of their rows move."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import MissingToolchain, ModelError, SchemeError
from tapeout.exporters import Carry, Exact, Refused, Rounded
from tapeout.exporters.gguf import blocks, k_blocks
from tapeout.exporters.gguf.arch import ARCHS, choose, choose_encoder
from tapeout.models import DecoderConfig, EncoderConfig, Role, SourceTensor
from tapeout.models.rope import divisors
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.quantize.scheme import NF4

Index = npt.NDArray[np.intp]

# BF16 is copied as its bits.
FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}

_NONE = "the checkpoint's own"
# By what a code is before its scale, its bits, and how its scale is kept.
_BLOCKS = {
    ("symmetric", 8, "float16"): blocks.Q8_0,
    ("symmetric", 4, "float16"): blocks.Q4_0,
    ("symmetric", 3, "float16"): blocks.NARROW_AS_Q4_0,
    ("symmetric", 2, "float16"): blocks.NARROW_AS_Q4_0,
    ("asymmetric", 4, "float16"): blocks.Q5_0,
    ("nf4", 4, "float16"): blocks.NF4_AS_Q8_0,
    ("nf4", 4, "double"): blocks.NF4_AS_Q8_0,
    ("e2m1", 4, "e8m0"): blocks.MXFP4,
    ("e2m1", 4, "e4m3"): blocks.NVFP4,
    ("symmetric", 6, "super"): k_blocks.Q6_K,
    ("affine", 5, "super"): k_blocks.Q5_K,
    ("affine", 4, "super"): k_blocks.Q4_K,
    ("symmetric", 3, "super"): k_blocks.Q3_K,
    ("affine", 2, "super"): k_blocks.Q2_K,
}

# exp(sink - maximum) is exactly 0 in float32 for any maximum above -1e29, and -inf would make NaN of a masked row.
_NO_SINK = np.float32(-1e30)


def library() -> ModuleType:
    """The format owner's library; MissingToolchain says how to get it."""
    try:
        import gguf
    except ImportError:
        raise MissingToolchain("GGUF files need the gguf library: pip install 'tapeout[cpu]'.") from None
    found: ModuleType = gguf
    return found


def carries(scheme: Scheme) -> Carry:
    """How GGUF holds a scheme: exactly, but for NF4, whose codebook becomes integers, and FP8, for which it has no type."""
    if scheme.kind == "none":
        return Exact(_NONE)
    block = block_of(scheme)
    if block is None:
        reason = (
            "GGUF has no 8-bit float type." if scheme.levels == "e4m3" else f"GGUF has no type for {scheme}."
        )
        return Refused(reason, "int8")
    if scheme.levels == "nf4":
        return Rounded(block.kind, nf4_added_error())
    if block is blocks.NARROW_AS_Q4_0:
        return Exact(f"{block.kind}, at {block.bits_per_weight:g} bits")
    if scheme.calibrated:
        return Exact(f"{block.kind}, the inputs' static scale unused")
    return Exact(block.kind + (", inputs 32 to a scale" if scheme.activations else ""))


def block_of(scheme: Scheme) -> blocks.Block | None:
    """The block type of a scheme that has codes; None: there is none that holds them."""
    return _BLOCKS.get((scheme.levels or scheme.kind, scheme.bits, scheme.scales))


def _note(scheme: Scheme, block: blocks.Block) -> str | None:
    """What the user of a scheme has to know of its block type, where that is not the scheme's own."""
    if block is blocks.NARROW_AS_Q4_0:
        return f"the codes of {scheme} are held as {block.kind}: exactly, at {block.bits_per_weight:g} bits a weight"
    if scheme.activations:
        unused = "; the calibrated scales of the inputs are not in the file" if scheme.calibrated else ""
        return f"llama.cpp rounds the inputs of {scheme} to int8 by itself, with a scale for every 32 values{unused}"
    return None


@cache
def nf4_added_error() -> float:
    """Relative root-mean-square error that integers and a float16 scale add to an NF4 weight.

    NF4 assumes normal weights in blocks of 64, divided by the largest magnitude m of their block (QLoRA, section 3 and
    appendix E). Given m the other 63 are normal within ±m, so a code's probability is that of its interval, averaged
    over m. The scale's own rounding adds a relative error uniform in half an ulp: 2^-11 / sqrt(3), times
    sqrt(3 / (8 ln 2)) for a mantissa that is spread evenly over the logarithm.
    """
    cdf = np.vectorize(lambda x: math.erf(x / math.sqrt(2)))  # of the magnitude
    m = np.linspace(0.5, 6.5, 1201)
    density = np.gradient(cdf(m) ** 64, m)
    edges = np.concatenate(([-1.0], (NF4[1:].astype(float) + NF4[:-1]) / 2, [1.0]))
    below = np.sign(edges) * cdf(np.abs(edges) * m[:, None]) / cdf(m)[:, None]
    probability = np.diff(below, axis=1).T @ density / density.sum() / 2 * 63 / 64
    probability[[0, -1]] += 1 / 128  # the largest itself is a code ±1
    rounded = blocks.NF4_INTEGERS / float(blocks.NF4_STEP)
    added = probability @ (rounded - NF4) ** 2 / (probability @ NF4.astype(float) ** 2)
    of_scale = 2.0**-22 / 3 * 3 / (8 * math.log(2))
    return math.sqrt(added + of_scale)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name: in the file.
        source: the tensor's Hugging Face name; None for what llama.cpp wants besides, which ``values`` holds.
        kind: GGUF type (``Q4_0``).
        block: how rows of codes become bytes; None for float types.
        heads: rotary heads whose rows are interleaved; 0: rows stay.
        members: the experts whose tensors are stacked here, ``source`` the first; shape [experts, out, in].
        offset: is added to the checkpoint's values (norms).
        scale_of: for what all scales of another tensor (its Hugging Face name) are multiplied with: NVFP4's float32.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    kind: str
    block: blocks.Block | None = None
    heads: int = 0
    values: npt.NDArray[np.float32] | None = None
    scale_of: str | None = None
    members: tuple[str, ...] = ()
    offset: float = 0.0

    @property
    def parts(self) -> tuple[str, ...]:
        """The checkpoint's tensors that this one holds, one after the other."""
        return self.members or ((self.source,) if self.source else ())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        weights = math.prod(self.shape)
        if self.block:
            return weights // self.block.weights * self.block.size
        return weights * FLOATS[self.kind].itemsize

    def order(self) -> Index | None:
        """For each row of the file the row of the checkpoint, [out]; None when they are the same.

        Hugging Face rotates element i of a head with i + dim / 2, llama.cpp's "norm" RoPE 2 i with 2 i + 1.
        """
        if not self.heads:
            return None
        return np.arange(self.shape[0]).reshape(self.heads, 2, -1).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class Layout:
    """A file's tensors in order, the arch that they are for, the context it may be run with, and what a user has to know."""

    arch: str
    context: int
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    layers: int


def lay_out(quant: Quantized, *, sliding_window: str, as_float32: bool, layers: int | None) -> Layout:
    """Decide arch, types and order.

    Raises:
        ModelError: a field of the model's config that its arch does not express, or nvfp4 where llama.cpp drops half of it.
        SchemeError: a tensor's scheme that GGUF does not carry.
    """
    config = quant.model.config
    if isinstance(config, EncoderConfig):
        return _encoder(quant, config, as_float32=as_float32, layers=layers)
    if not isinstance(config, DecoderConfig):
        raise ModelError(
            f"{quant.model.name} is {quant.model.kind}, which is not expressible in our GGUF: use --format onnx."
        )
    count = config.num_layers if layers is None else layers
    if not 1 <= count <= config.num_layers:
        raise ModelError(f"layers = {count}: {quant.model.name} has 1 … {config.num_layers}.")
    arch, context, notes = choose(config, sliding_window, count)
    known = ARCHS["llama" if arch == "granite_swa" else arch]
    names = library().get_tensor_name_map(library().MODEL_ARCH[known.tensors], config.num_layers)
    entries = _rope_tables(config)
    experts = _experts(config)
    for source, spec in quant.model.specs.items():
        layer = int(source.split(".")[2]) if source.startswith("model.layers.") else -1
        if layer >= count or (source in experts and experts[source][0] != source):
            continue
        # Experts are one tensor, in the place of the first.
        members = experts.get(source, ())
        kinds = [("F32", None, None)] if as_float32 else [_kind(quant, name) for name in members or (source,)]
        kind, block, note = kinds[0]
        if any(other[0] != kind for other in kinds):
            raise SchemeError(
                f"{source} and the other experts of its layer, which GGUF holds in one tensor, would be "
                f"{', '.join(sorted({other[0] for other in kinds}))}: give all of them one scheme."
            )
        if note and note not in notes:
            notes.append(note)
        heads = 0
        if known.interleaved and not config.mla:
            heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(source.split(".")[-2], 0)
        offset = config.norm_offset if spec.role is Role.NORM else 0.0
        shape = (len(members), *spec.shape) if members else spec.shape
        name = _name(names, source, bool(members))
        entries.append(Entry(name, source, shape, kind, block, heads, members=members, offset=offset))
        if block is blocks.NVFP4:
            if arch not in ("llama", "granite_swa") or members:
                raise ModelError(
                    f"{source} cannot be nvfp4 in GGUF arch '{arch}': it is proven of dense llamas. What fits: mxfp4."
                )
            entries.append(_tensor_scale(quant, entries[-1], arch))
        if arch == "granite_swa" and source.endswith("self_attn.o_proj.weight"):
            sinks = np.full(config.num_heads, _NO_SINK)
            entries.append(Entry(f"blk.{layer}.attn_sinks.weight", None, sinks.shape, "F32", values=sinks))
    return Layout(arch, context, tuple(entries), tuple(notes), count)


def _encoder(quant: Quantized, config: EncoderConfig, *, as_float32: bool, layers: int | None) -> Layout:
    """Of an encoder, in its checkpoint's order."""
    notes = choose_encoder(config)
    count = config.num_layers if layers is None else layers
    if not 1 <= count <= config.num_layers:
        raise ModelError(f"layers = {count}: {quant.model.name} has 1 … {config.num_layers}.")
    names = library().get_tensor_name_map(library().MODEL_ARCH.BERT, config.num_layers)
    left_out = tuple(f"{config.names.layer.format(index)}." for index in range(count, config.num_layers))
    entries = []
    for source, spec in quant.model.specs.items():
        if source.startswith(left_out):
            continue
        kind, block, note = ("F32", None, None) if as_float32 else _kind(quant, source)
        if note and note not in notes:
            notes.append(note)
        if block is blocks.NVFP4:
            raise ModelError(
                f"{source} cannot be nvfp4 in GGUF arch 'bert': it is proven of dense llamas. What fits: mxfp4."
            )
        entries.append(Entry(_name(names, source, False), source, spec.shape, kind, block))
    return Layout("bert", config.max_position_embeddings, tuple(entries), tuple(notes), count)


def _rope_tables(config: DecoderConfig) -> list[Entry]:
    """Tables of factors that no number in the header says."""
    rope, tables = config.rope, {}
    if rope.kind == "llama3":
        tables = {"rope_freqs": divisors(rope)}
    if rope.kind == "longrope":
        trained = int(rope.parameters["original_max_position_embeddings"])
        tables = {
            "rope_factors_long": divisors(rope, trained + 1),
            "rope_factors_short": divisors(rope, trained),
        }
    return [
        Entry(f"{name}.weight", None, table.shape, "F32", values=table.astype(np.float32))
        for name, table in tables.items()
    ]


def _experts(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """For each expert's tensor, those of all experts that are stacked with it, in order."""
    found: dict[str, tuple[str, ...]] = {}
    for layer in range(config.num_layers):
        if moe := config.routed(layer):
            for part in zip(*(moe.weights(layer, e) for e in range(moe.experts)), strict=True):
                found |= dict.fromkeys(part, part)
    return found


def _name(names: Any, source: str, stacked: bool) -> str:
    """A tensor's name in the file."""
    if source.endswith(".e_score_correction_bias"):
        return f"{names.get_name(source.removesuffix('_bias'))}.bias"
    if stacked:
        source = re.sub(r"(experts)\.\d+\.", r"\1.", source)
    name = names.get_name(source, try_suffixes=(".weight", ".bias"))
    assert name is not None, source
    return str(name)


def _tensor_scale(quant: Quantized, of: Entry, arch: str) -> Entry:
    """The float32 that llama.cpp multiplies what comes out of an NVFP4 matrix with; ModelError where it does not."""
    assert of.source is not None
    tensor = quant[of.source]
    assert isinstance(tensor, QuantTensor)
    assert tensor.scale_codes is not None
    forgets = "a lookup" if of.name == "token_embd.weight" else None
    if arch == "granite_swa" and ".ffn_" in of.name:
        forgets = "the feed-forward network of arch granite_swa, which carries the sliding window,"
    if forgets:
        raise ModelError(
            f"{of.source} cannot be nvfp4 in GGUF: {forgets} leaves out the scale of the tensor. What fits: mxfp4."
        )
    scale = tensor.scale_codes.block.reshape(1).astype(np.float32)
    name = of.name.removesuffix("weight") + "scale"
    return Entry(name, None, scale.shape, "F32", values=scale, scale_of=of.source)


def _kind(quant: Quantized, name: str) -> tuple[str, blocks.Block | None, str | None]:
    """GGUF type and block of a tensor, and a note where a user has to know of it."""
    scheme, spec = quant.schemes[name], quant.model.specs[name]
    if scheme.kind == "none":
        source = quant[name]
        assert isinstance(source, SourceTensor)
        # llama.cpp multiplies vectors in float32 only.
        return (source.dtype if spec.role.is_matrix else "F32"), None, None
    block = block_of(scheme)
    if block is None:
        carry = carries(scheme)
        assert isinstance(carry, Refused)
        raise SchemeError(f"{name} is {scheme}: {carry.reason} What fits: {carry.nearest}.")
    why = None
    if spec.shape[-1] % block.weights:
        why = f"its rows of {spec.shape[-1]} weights are no whole blocks of {block.weights}"
    elif block is blocks.NF4_AS_Q8_0:
        tensor = quant[name]
        assert isinstance(tensor, QuantTensor)
        least = np.abs(blocks.nf4_scale(tensor)).min(initial=np.inf)
        if least < np.finfo(np.float16).smallest_normal:
            why = f"a scale of {scheme}, divided by {blocks.NF4_STEP}, is subnormal in float16"
    if why:
        return "F16", None, f"{name} is F16: {why}"
    return block.kind, block, _note(scheme, block)
