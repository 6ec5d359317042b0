"""The reference: transformers in float32, with the model's own weights or with the dequantized codes of a store.

Attention is transformers' ``eager``: the formula as the family's file states it. The fused kernels leave parts out where
they have no room for them (soft caps), and sum in an order that depends on the machine.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import psutil

from tapeout.errors import MissingToolchain, ModelError, TapeoutError, nearest
from tapeout.exporters import gguf
from tapeout.models import EncoderConfig, Model, Seq2SeqConfig, TracedConfig, load
from tapeout.quantize import Quantized, QuantTensor, open_store
from tapeout.validate import by_layer, encoders, modules, pretrained, seq2seq
from tapeout.validate.given import check_ids
from tapeout.validate.rounding import CACHES, ROUNDED, as_cached, round_q8_0
from tapeout.validate.session import Facts, Logits, Shown

if TYPE_CHECKING:
    import torch

    from tapeout.validate.rounding import Round

__all__ = ["Reference", "open_session", "open_weights", "place_of", "tensors_of"]

Arithmetic = Literal["float32", "float64", "ggml", "mlas", "scheme", "modelopt"]

# Tokens of one forward pass: bounds eager attention's scores at heads × 512 × context floats.
_CHUNK = 512


class Reference(pretrained.Words):
    """A Session on transformers; see ``open_session``."""

    facts: Facts

    def __init__(self, directory: Path, network: Any, facts: Facts) -> None:
        self.facts = facts
        self.words = directory
        self._network = network
        self._vocab_size = int(network.config.vocab_size)
        self.reset()

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append tokens to the sequence at once; return float32 [tokens, vocab], the logits after each."""
        logits = np.empty((len(ids), self._vocab_size), np.float32)
        for at, chunk in self._chunks(ids):
            logits[at : at + len(chunk)] = self._forward(chunk)
        return logits

    def append(self, ids: Sequence[int]) -> Logits:
        """``prefill`` for those who want the last token's logits only, float32 [1, vocab]."""
        last = np.empty((0, self._vocab_size), np.float32)
        for _, chunk in self._chunks(ids):
            last = self._forward(chunk, keep=1)
        return last

    def decode(self, token: int) -> Logits:
        """Append one token; return float32 [vocab]."""
        return cast(Logits, self.prefill([token])[0])

    def trace(self, ids: Sequence[int], out: str) -> dict[str, Shown]:
        """Write what each layer gives of one sequence, and the logits, to ``out``/NAME.npy; see ``by_layer``."""
        self.reset()
        with by_layer.kept(self._network) as found:
            logits = self.prefill(ids)
        self.reset()
        return by_layer.write(found, logits, "logits", out)

    def reset(self) -> None:
        """Begin a new sequence with an empty cache."""
        from transformers import DynamicCache

        # With the configuration, layers with a sliding window keep no more than the window.
        self._cache = DynamicCache(config=self._network.config)

    def twin(self) -> Reference:
        """Another sequence on the same network."""
        return Reference(self.words, self._network, self.facts)

    def substitute(self, name: str, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Put a weight in the place of tensor ``name``, and return what stood there; a tied head follows its embedding."""
        import torch

        place = place_of(tensors_of(self._network), name)
        if place is None:
            raise ModelError(f"transformers has no parameter {name}.")
        tensor, part = place
        if part is None:
            before = tensor.data.numpy()
            tensor.data = torch.from_numpy(weight)
        else:
            before = tensor.data[part].numpy().copy()
            tensor.data[part] = torch.from_numpy(weight)
        return cast("npt.NDArray[np.float32]", before)

    def close(self) -> None:
        """Free the model."""
        self._network = self._cache = None

    def _chunks(self, ids: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
        length = self._cache.get_seq_length() + len(ids)
        if length > self.facts.context:
            raise TapeoutError(f"{length} tokens do not fit the context of {self.facts.context}.")
        check_ids(ids, self._vocab_size)
        for at in range(0, len(ids), _CHUNK):
            yield at, ids[at : at + _CHUNK]

    def _forward(self, ids: Sequence[int], keep: int = 0) -> Logits:
        import torch

        with torch.inference_mode():
            out = self._network(
                input_ids=torch.tensor([list(ids)]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        return cast(Logits, out.logits[0].float().numpy())


def open_session(
    model: str,
    store: str | None = None,
    arithmetic: Arithmetic = "float32",
    layers: int | None = None,
    threads: int | None = None,
    kv_cache: Literal["kv-fp8", "kv-int8", "kv-int4"] | None = None,
    halves: Sequence[str] = (),
    values: Sequence[str] = (),
) -> Reference | encoders.EncoderReference | modules.ModuleReference | seq2seq.Seq2SeqReference:
    """Load the reference of a model.

    Args:
        model: what ``tapeout.models.load`` takes.
        store: directory of its canonical codes; every quantized tensor is then what the codes say. None: the weights as
            the checkpoint has them.
        arithmetic: ``float64``: the same numbers in twice the precision. ``ggml``: the inputs of quantized matmuls (head
            included) are rounded as ``round_q8_0`` and ``round_q8_k`` of ``rounding`` do; ``mlas``: as ``round_mlas`` does. ``scheme``: the inputs
            of those whose scheme says so (``w8a8``, ``w8a8-static``) are rounded as ``round_int8`` does, whatever a device makes of
            them. ``modelopt``: as kernels for ModelOpt's checkpoints do, see ``rounding``.
        layers: only that many of the first layers, then the final norm and the head.
        threads: of torch; None: its own choice.
        kv_cache: round keys, values and queries as llama.cpp does for its caches q8_0 and q4_0, see ``as_cached``, or keys and
            values to float8; None: leave them.
        halves: tensors by their Hugging Face names that are as a file has them whose widest float is float16, see ``_narrow``.
        values: tensors of codes that a file has as their values in float16.

    Raises:
        MissingToolchain: torch or transformers is not installed.
        ModelError: transformers does not find every weight. TapeoutError: an argument that fits nothing.
    """
    prepare(threads)
    if arithmetic not in get_args(Arithmetic):
        raise TapeoutError(
            f"the reference has no arithmetic '{arithmetic}'; it has {', '.join(get_args(Arithmetic))}."
        )
    if kv_cache is not None and kv_cache not in CACHES:
        raise TapeoutError(f"the reference has no cache '{kv_cache}'{nearest(kv_cache, CACHES)}.")
    source = load(model)
    depth = source.config.num_layers
    if layers is not None and not 1 <= layers <= depth:
        raise TapeoutError(f"{source.name} has {depth} layers; it cannot be cut to {layers}.")
    quant = open_store(Path(store), source) if store is not None else None
    if source.quantization is not None and quant is None:
        raise ModelError(f"{source.name} has no floats of its own: its reference needs a store.")
    if arithmetic in ROUNDED and quant is None:
        raise TapeoutError(f"arithmetic {arithmetic} is that of quantized weights: it needs a store.")
    before, begin = psutil.Process().memory_info().rss, perf_counter()
    if isinstance(source.config, TracedConfig) and source.config.is_module:
        run = modules.program(source, quant, ROUNDED.get(arithmetic), double=arithmetic == "float64")
        return modules.ModuleReference(source, run, facts(before, begin, 0))
    networks = {EncoderConfig: encoders.network, Seq2SeqConfig: seq2seq.network}
    network = networks.get(type(source.config), _network)(source, layers)
    if quant is not None:
        _dequantize(network, quant, cut=layers is not None)
    _narrow(network, quant, halves)
    _narrow(network, None, values)
    if arithmetic == "float64":
        network.double()
        _turn_in_float64(network)
    if quant is not None and arithmetic in ROUNDED:
        _round_inputs(network, quant, ROUNDED[arithmetic])
    if kv_cache is not None:
        neighbours = kv_cache != "kv-fp8" and gguf.turns_neighbours(source.decoder)
        round_cache(network, kv_cache, neighbours=neighbours)
    told = facts(before, begin, source.config.max_position_embeddings)
    words = cache(partial(pretrained.tokenizer, source.directory))
    if isinstance(source.config, EncoderConfig):
        return encoders.EncoderReference(source, network, told, words)
    if isinstance(source.config, Seq2SeqConfig):
        return seq2seq.Seq2SeqReference(source, network, told, words)
    return Reference(source.directory, network, told)


def open_weights(
    directory: Path,
    weights: Iterable[tuple[str, npt.NDArray[np.float32]]],
    *,
    threads: int | None = None,
    then: Callable[[Any], None] | None = None,
) -> Reference:
    """Load the architecture that ``directory/config.json`` names with weights by their Hugging Face names.

    ``then`` is called with the network that has them, before it is run.

    Raises:
        MissingToolchain: torch or transformers is not installed. ModelError: a weight is missing.
    """
    prepare(threads)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    before, begin = psutil.Process().memory_info().rss, perf_counter()
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    network = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tensors = tensors_of(network)
    left = {name: tensor.numel() for name, tensor in tensors.items()}
    names = {id(tensor): name for name, tensor in tensors.items()}
    for name, weight in weights:
        if place := place_of(tensors, name):
            left[names[id(place[0])]] -= weight.size
            _put(place, weight)
    if missing := [name for name, count in left.items() if count]:
        raise ModelError(f"{directory} holds no {', '.join(sorted(missing)[:3])}.")
    if then:
        then(network)
    return Reference(directory, network, facts(before, begin, int(config.max_position_embeddings)))


def prepare(threads: int | None) -> None:
    """Import the libraries, silent and offline; MissingToolchain names the extra that brings them."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is first imported
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingToolchain(
            f"the reference needs torch and transformers ({error}): pip install 'tapeout[reference]'"
        ) from error
    if threads:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def facts(before: int, begin: float, context: int) -> Facts:
    import torch
    import transformers

    return Facts(
        runtime=f"transformers {transformers.__version__}, torch {torch.__version__}",
        device=f"cpu, {torch.get_num_threads()} threads",
        load_s=perf_counter() - begin,
        resident_bytes=max(0, psutil.Process().memory_info().rss - before),
        context=context,
    )


def _cut(config: Any, layers: int | None) -> Any:
    """A configuration cut to its first layers."""
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def _network(source: Model, layers: int | None) -> Any:
    """The model as transformers loads it, float32, tensor by tensor; ModelError when it would make up a weight."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _cut(AutoConfig.from_pretrained(source.directory, local_files_only=True), layers)
    if source.quantization is not None:  # its weights are codes: they come from the store
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    network = pretrained.load(AutoModelForCausalLM, source.directory, config)
    if isinstance(source.config, TracedConfig):
        setattr(network, _OTHER_NAMES, _other_names(network, source))
    return network


def _dequantize(network: Any, quant: Quantized, *, cut: bool) -> None:
    """Put the values of the canonical codes in the place of the weights; a tied head follows its embedding."""
    tensors = tensors_of(network)
    same = _same(quant)
    for name, scheme in quant.schemes.items():
        if scheme.kind == "none" and name not in quant.folded and quant.model.quantization is None:
            continue
        place = place_of(tensors, name)
        if place is None and not cut:
            raise ModelError(
                f"transformers has no parameter {name} to put the codes of {quant.model.name} into."
            )
        if place is not None:
            weight = quant.float32(name)
            stored = np.ascontiguousarray(weight.T) if quant.model.checkpoint[name].turned else weight
            for other in (place, *(place_of(tensors, each) for each in same.get(name, ()))):
                if other is not None:
                    _put(other, stored)


def _narrow(network: Any, quant: Quantized | None, names: Iterable[str]) -> None:
    """Let tensors be what is left of them in a file whose widest float is float16: of codes, the codebook and the scales."""
    tensors = tensors_of(network)
    for name in names:
        place = place_of(tensors, name)
        if place is None:
            continue
        tensor, part = place
        weight = quant[name] if quant is not None else None
        if isinstance(weight, QuantTensor):
            codebook, scale = (
                np.asarray(each).astype(np.float16).astype(np.float32)
                for each in (weight.codebook, weight.scale)
            )
            _put(place, replace(weight, codebook=codebook, scale=scale).dequantize())
        else:
            kept = tensor.data if part is None else tensor.data[part]
            kept.copy_(kept.half())


def _same(quant: Quantized) -> dict[str, list[str]]:
    """Other names under which the checkpoint has a weight that the graph takes once."""
    found: dict[str, list[str]] = {}
    if isinstance(quant.model.config, TracedConfig):
        for name, kept in quant.model.config.same.items():
            found.setdefault(kept, []).append(name)
    return found


_Place = tuple[Any, tuple[Any, ...] | None]
"""A tensor of the network, and which part of it a tensor of the checkpoint is; None: all of it."""

# transformers stacks experts: gate and up [experts, 2 * intermediate, hidden], down [experts, hidden, intermediate].
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(?:(gate_proj|w1)|(up_proj|w3)|(?:down_proj|w2))\.weight")


def tensors_of(network: Any) -> dict[str, Any]:
    """All that a checkpoint holds, by transformers' names."""
    saved = network.state_dict().keys()
    buffers = {name: buffer for name, buffer in network.named_buffers() if name in saved}
    found = dict(network.named_parameters()) | buffers
    return found | {name: found[own] for name, own in getattr(network, _OTHER_NAMES, {}).items()}


_OTHER_NAMES = "_tapeout_other_names"


def _other_names(network: Any, source: Model) -> dict[str, str]:
    """Transformers' names for tensors of a family that has no file here, where it has others than the checkpoint: by their values."""
    import torch

    tensors = tensors_of(network)
    found: dict[str, str] = {}
    for name in source.specs:
        if name not in tensors:
            weight = torch.from_numpy(source.checkpoint[name].float32())
            weight = weight.T if source.checkpoint[name].turned else weight
            same = (
                own
                for own, tensor in tensors.items()
                if tensor.shape == weight.shape and torch.equal(tensor, weight)
            )
            if own := next(same, None):
                found[name] = own
    return found


def place_of(tensors: Mapping[str, Any], name: str) -> _Place | None:
    """Where transformers keeps a tensor of the checkpoint (``conversion_mapping``); None: nowhere."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    if name in tensors:
        return tensors[name], None
    expert = _EXPERT.fullmatch(name)
    stacked = expert and tensors.get(
        f"{expert[1]}.{'gate_up_proj' if expert[3] or expert[4] else 'down_proj'}"
    )
    if not expert or stacked is None:
        return None
    if not (expert[3] or expert[4]):
        return stacked, (int(expert[2]),)
    half = stacked.shape[1] // 2
    return stacked, (int(expert[2]), slice(half) if expert[3] else slice(half, None))


def _put(place: _Place, weight: npt.NDArray[np.float32]) -> None:
    """Put a weight in its place; one that fills it is taken over, not copied, and the old one is freed."""
    import torch

    tensor, part = place
    if part is None:
        tensor.data = torch.from_numpy(weight)
    else:
        tensor.data[part] = torch.from_numpy(weight)


def _turn_in_float64(network: Any) -> None:
    """Let RoPE multiply in float64 too.

    transformers casts positions and frequencies to float32 whatever the network's type, and an angle of p radians is then
    off by up to 2^-24 p: on long sequences the largest part of what float32 costs.
    """
    from unittest.mock import patch

    import torch

    def widened(forward: Callable[..., Any]) -> Callable[..., Any]:
        def turn(*args: Any, **keywords: Any) -> Any:
            with patch.object(torch.Tensor, "float", torch.Tensor.double):
                return forward(*args, **keywords)

        return turn

    for module in network.modules():
        if any("inv_freq" in name for name, _ in module.named_buffers(recurse=False)):
            module.forward = widened(module.forward)
    network.config._experts_implementation = "eager"  # torch's grouped matmul has no float64


def _round_inputs(network: Any, quant: Quantized, how: Callable[[Quantized, str], Round | None]) -> None:
    """Round the input of every linear layer for whose weight ``how`` gives a rounding."""
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, whose weight is [in, out]

    tensors = tensors_of(network)
    rounds: dict[tuple[int, Any], Round | None] = {}
    for name in quant.schemes:
        if place := place_of(tensors, name):
            tensor, part = place
            rounds[id(tensor), None if part is None else part[0]] = how(quant, name)
    for module in network.modules():
        # By identity, so that a tied head is found; an embedding is a lookup and rounds nothing.
        if isinstance(module, torch.nn.Linear | Conv1D) and (
            rounded := rounds.get((id(module.weight), None))
        ):
            module.register_forward_pre_hook(lambda _, args, f=rounded: (f(args[0]), *args[1:]))
        if getattr(module, "gate_up_proj", None) is not None and hasattr(module, "num_experts"):
            module.forward = _rounded_experts(module, rounds)


def _rounded_experts(module: Any, rounds: Mapping[tuple[int, Any], Round | None]) -> Any:
    """The experts' forward pass with the inputs of both their matmuls rounded."""
    import torch

    def linear(x: torch.Tensor, stacked: torch.Tensor, expert: int) -> torch.Tensor:
        rounded = rounds.get((id(stacked), expert))
        return torch.nn.functional.linear(rounded(x) if rounded else x, stacked[expert])

    def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = linear(hidden[tokens], module.gate_up_proj, expert).chunk(2, -1)
            given = linear(module.act_fn(gate) * up, module.down_proj, expert)
            out.index_add_(0, tokens, given * weights[tokens, place, None])
        return out

    return forward


def round_cache(network: Any, kv_cache: str, *, neighbours: bool = False) -> None:
    """Let attention see what a rounded cache gives back.

    Of integers a query is rounded to Q8_0 whatever the cache holds: llama.cpp's dot products of both kinds take that. float8 keys
    and values are rounded as they are, under a step of 1.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def integers(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        query, key = (
            as_cached(x, rounded, rotary=True, neighbours=neighbours)
            for x, rounded in ((query, round_q8_0), (key, CACHES[kv_cache]))
        )
        return query, key, as_cached(value, CACHES[kv_cache], rotary=False)

    def floats(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        return query, CACHES[kv_cache](key), CACHES[kv_cache](value)

    cached = floats if kv_cache == "kv-fp8" else integers

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, *cached(query, key, value), mask, **settings)

    AttentionInterface.register(kv_cache, attend)
    AttentionMaskInterface.register(kv_cache, eager_mask)
    network.set_attn_implementation(kv_cache)
