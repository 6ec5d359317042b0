"""What each rank holds, by TensorRT-LLM's names (``tensorrt_llm/models/*/convert.py``, releases 1.0 to 1.2).

Tensor parallel: columns (qkv, fc, gate) are cut along ``out``, heads by heads and q, k and v each by itself; rows (dense, proj)
along ``in``; embedding and head along the vocabulary. Where there are fewer key heads than ranks, ranks share one. Pipeline
parallel: a stage has a run of layers, which are counted from 0 again, the first one the embedding, the last one norm and head.
Rank ``stage * tensor_parallel + r``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tapeout.errors import ModelError
from tapeout.models import DecoderConfig, Model
from tapeout.models.decoder import Moe
from tapeout.models.graph import EMBEDDING, HEAD, NORM


@dataclass(frozen=True)
class Mapping:
    """How a model is cut.

    Attributes:
        tensor, pipeline: ranks that share a layer, and stages one after another.
    """

    tensor: int = 1
    pipeline: int = 1

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return self.tensor * self.pipeline


@dataclass(frozen=True)
class Block:
    """Rows (of a vector: elements) and columns of a tensor of the model, by its Hugging Face name."""

    name: str
    rows: slice = field(default_factory=lambda: slice(None))
    cols: slice = field(default_factory=lambda: slice(None))


@dataclass(frozen=True)
class Place:
    """What a rank has under a name.

    Attributes:
        name: of a ``column`` or a ``row`` (linears, by how they are cut): the module; of others the tensor.
        blocks: of each expert (one, where there are none) those that stand one under another.
        kind: ``router`` is always float32.
        stacked: the experts are an axis of the tensor.
        offset: is added to the values (gemma's norms).
    """

    name: str
    blocks: tuple[tuple[Block, ...], ...]
    kind: Literal["column", "row", "table", "router", "vector"]
    stacked: bool = False
    offset: float = 0.0


def places(model: Model, mapping: Mapping, rank: int) -> list[Place]:
    """Everything that a rank has, in the order of the model.

    Raises:
        ModelError: the model has a tensor that has no place.
    """
    c = model.decoder
    stage, r = divmod(rank, mapping.tensor)
    count = c.num_layers // mapping.pipeline
    first = stage * count
    found: list[Place] = []
    vocab = _share(c.vocab_size, mapping.tensor, r)
    if stage == 0:
        found.append(_one("transformer.vocab_embedding.weight", Block(EMBEDDING, vocab), "table"))
    for index in range(first, first + count):
        found += _layer(c, index, f"transformer.layers.{index - first}", mapping.tensor, r)
    if stage == mapping.pipeline - 1:
        found.append(_norm(c, "transformer.ln_f.weight", NORM))
        head = EMBEDDING if c.tie_word_embeddings else HEAD
        found.append(_one("lm_head.weight", Block(head, vocab), "table"))
    return found


def check_complete(model: Model, mapping: Mapping) -> None:
    """ModelError when a tensor of the model is in no rank."""
    held = {
        block.name
        for rank in range(mapping.world)
        for place in places(model, mapping, rank)
        for blocks in place.blocks
        for block in blocks
    }
    if left := sorted(model.specs.keys() - held):
        raise ModelError(
            f"{model.name} has {', '.join(left[:3])}, which TensorRT-LLM's checkpoint of {model.decoder.family} has no name for."
        )


def _share(total: int, parts: int, index: int) -> slice:
    width = total // parts
    return slice(index * width, (index + 1) * width)


def _one(name: str, block: Block, kind: Literal["table", "router", "vector"]) -> Place:
    return Place(name, ((block,),), kind)


def _norm(c: DecoderConfig, name: str, source: str) -> Place:
    return Place(name, ((Block(source),),), "vector", offset=c.norm_offset)


def _layer(c: DecoderConfig, index: int, to: str, tensor: int, r: int) -> Iterator[Place]:
    at = f"model.layers.{index}"
    yield _norm(c, f"{to}.input_layernorm.weight", f"{at}.input_layernorm.weight")
    yield from _attention(c, f"{at}.self_attn", f"{to}.attention", tensor, r)
    yield _norm(c, f"{to}.post_layernorm.weight", f"{at}.post_attention_layernorm.weight")
    if c.sandwich_norms:
        for which in ("pre_feedforward", "post_feedforward"):
            yield _norm(c, f"{to}.{which}_layernorm.weight", f"{at}.{which}_layernorm.weight")
    if moe := c.routed(index):
        yield from _experts(moe, index, f"{to}.mlp", tensor, r)
        return
    rows = _share(c.intermediate_size, tensor, r)
    mlp = f"{at}.mlp"
    if c.fused:  # one tensor, the activated half last: the order of TensorRT-LLM's swiglu
        both = f"{mlp}.gate_up_proj"
        up = slice(c.intermediate_size + rows.start, c.intermediate_size + rows.stop)
        yield from _linear(f"{to}.mlp.fc", [(both, up), (both, rows)], c.mlp_bias)
    else:
        yield from _linear(f"{to}.mlp.fc", [(f"{mlp}.gate_proj", rows)], c.mlp_bias)
        yield from _linear(f"{to}.mlp.gate", [(f"{mlp}.up_proj", rows)], c.mlp_bias)
    yield from _across(f"{to}.mlp.proj", f"{mlp}.down_proj", rows, c.mlp_bias)


def _attention(c: DecoderConfig, at: str, to: str, tensor: int, r: int) -> Iterator[Place]:
    query = _share(c.num_heads * c.head_dim, tensor, r)
    if c.num_kv_heads >= tensor:
        key = _share(c.num_kv_heads * c.head_dim, tensor, r)
    else:
        head = r * c.num_kv_heads // tensor
        key = slice(head * c.head_dim, (head + 1) * c.head_dim)
    if c.fused:
        parts, begin = [], 0
        for rows, heads in ((query, c.num_heads), (key, c.num_kv_heads), (key, c.num_kv_heads)):
            parts.append((f"{at}.qkv_proj", slice(begin + rows.start, begin + rows.stop)))
            begin += heads * c.head_dim
    else:
        parts = [(f"{at}.q_proj", query), (f"{at}.k_proj", key), (f"{at}.v_proj", key)]
    yield from _linear(f"{to}.qkv", parts, c.qkv_bias)
    if c.qk_norm:
        for which in "qk":
            yield _norm(c, f"{to}.{which}_layernorm.weight", f"{at}.{which}_norm.weight")
    yield from _across(f"{to}.dense", f"{at}.o_proj", query, c.out_bias)


def _experts(moe: Moe, index: int, to: str, tensor: int, r: int) -> Iterator[Place]:
    at = f"model.layers.{index}"
    yield _one(f"{to}.router.weight", Block(f"{at}.{moe.router}.weight"), "router")
    share = _share(moe.intermediate_size, tensor, r)
    weights = [moe.weights(index, expert) for expert in range(moe.experts)]
    fc = tuple((Block(up, share), Block(gate, share)) for gate, up, _ in weights)
    proj = tuple((Block(down, cols=share),) for _, _, down in weights)
    yield Place(f"{to}.fc", fc, "column", stacked=True)
    yield Place(f"{to}.proj", proj, "row", stacked=True)
    if moe.shared_size:
        rows, shared = _share(moe.shared_size, tensor, r), f"{at}.{moe.shared}"
        parts = [(f"{shared}.up_proj", rows), (f"{shared}.gate_proj", rows)]
        yield from _linear(f"{to}.shared_expert.fc", parts, bias=False)
        yield from _across(f"{to}.shared_expert.proj", f"{shared}.down_proj", rows, bias=False)
    if moe.shared_gate:
        yield _one(f"{to}.shared_expert_gate.weight", Block(f"{at}.{moe.shared}_gate.weight"), "vector")


def _linear(name: str, parts: list[tuple[str, slice]], bias: bool) -> Iterator[Place]:
    """Rows of some modules, one under another."""
    yield Place(name, (tuple(Block(f"{module}.weight", rows) for module, rows in parts),), "column")
    if bias:
        blocks = tuple(Block(f"{module}.bias", rows) for module, rows in parts)
        yield Place(f"{name}.bias", (blocks,), "vector")


def _across(name: str, module: str, cols: slice, bias: bool) -> Iterator[Place]:
    """Columns of a module; its bias, which is added after the sum over ranks, is in all of them."""
    yield Place(name, ((Block(f"{module}.weight", cols=cols),),), "row")
    if bias:
        yield _one(f"{name}.bias", Block(f"{module}.bias"), "vector")
