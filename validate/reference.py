"""The reference: transformers in float32, with the model's own weights or with the dequantized codes of a store.

Attention is transformers' ``eager``: the formula as the family's file states it. The fused kernels leave parts out where
they have no room for them (soft caps), and sum in an order that depends on the machine.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, cast, get_args
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import psutil

from tapeout.errors import MissingToolchain, ModelError, TapeoutError, nearest
from tapeout.exporters import gguf, onnx
from tapeout.models import EncoderConfig, Model, Seq2SeqConfig, TracedConfig, load
from tapeout.quantize import Quantized, QuantTensor, open_store
from tapeout.validate import encoders, modules, seq2seq
from tapeout.validate.session import Facts, Logits

if TYPE_CHECKING:
    import torch

    Round = Callable[[torch.Tensor], torch.Tensor]

__all__ = [
    "Reference",
    "open_session",
    "open_weights",
    "round_int8",
    "round_mlas",
    "round_q4_0",
    "round_q8_0",
    "round_q8_k",
    "tokenizer",
]

Arithmetic = Literal["float32", "float64", "ggml", "mlas", "scheme"]

# Tokens of one forward pass: bounds eager attention's scores at heads × 512 × context floats.
_CHUNK = 512


class Reference:
    """A Session on transformers; see ``open_session``."""

    facts: Facts

    def __init__(self, directory: Path, network: Any, facts: Facts) -> None:
        self.facts = facts
        self._directory = directory
        self._network = network
        self._vocab_size = int(network.config.vocab_size)
        self._tokenizer: Any = None
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

    def reset(self) -> None:
        """Begin a new sequence with an empty cache."""
        from transformers import DynamicCache

        # With the configuration, layers with a sliding window keep no more than the window.
        self._cache = DynamicCache(config=self._network.config)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``; special tokens in it are recognised, none are added."""
        return list(self._load_tokenizer().encode(text, add_special_tokens=False))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens kept; bytes that are not UTF-8 become U+FFFD."""
        tokenizer = self._load_tokenizer()
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def twin(self) -> Reference:
        """Another sequence on the same network."""
        return Reference(self._directory, self._network, self.facts)

    def substitute(self, name: str, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Put a weight in the place of tensor ``name``, and return what stood there; a tied head follows its embedding."""
        import torch

        place = _place(_tensors(self._network), name)
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
        vocab = self._vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < vocab:
            raise TapeoutError(
                f"token ids from {min(ids)} to {max(ids)} are not all in the vocabulary of {vocab}."
            )
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

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = tokenizer(self._directory)
        return self._tokenizer


def tokenizer(directory: Path) -> Any:
    """A model's tokenizer, as its tokenizer.json stands; ModelError when there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # transformers 5 rebuilds Llama's, Gemma's, T5's and BERT's from their vocabulary and drops the file's own normalizer.
    as_written = (Path(directory) / "tokenizer.json").exists()
    kind = PreTrainedTokenizerFast if as_written else AutoTokenizer
    try:
        return kind.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # what it raises depends on which of its files is missing
        raise ModelError(f"transformers finds no tokenizer in {directory}: {error}") from error


def open_session(
    model: str,
    store: str | None = None,
    arithmetic: Arithmetic = "float32",
    layers: int | None = None,
    threads: int | None = None,
    kv_cache: Literal["kv-int8", "kv-int4"] | None = None,
) -> Reference | encoders.EncoderReference | modules.ModuleReference | seq2seq.Seq2SeqReference:
    """Load the reference of a model.

    Args:
        model: what ``tapeout.models.load`` takes.
        store: directory of its canonical codes; every quantized tensor is then what the codes say. None: the weights as
            the checkpoint has them.
        arithmetic: ``float64``: the same numbers in twice the precision. ``ggml``: the inputs of quantized matmuls (head
            included) are rounded as ``round_q8_0`` and ``round_q8_k`` do; ``mlas``: as ``round_mlas`` does. ``scheme``: the inputs
            of those whose scheme says so (``w8a8``, ``w8a8-static``) are rounded as ``round_int8`` does, whatever a device makes of
            them.
        layers: only that many of the first layers, then the final norm and the head.
        threads: of torch; None: its own choice.
        kv_cache: round keys, values and queries as llama.cpp does for its caches q8_0 and q4_0, see ``as_cached``; None: leave
            them.

    Raises:
        MissingToolchain: torch or transformers is not installed.
        ModelError: transformers does not find every weight. TapeoutError: an argument that fits nothing.
    """
    _prepare(threads)
    if arithmetic not in get_args(Arithmetic):
        raise TapeoutError(
            f"the reference has no arithmetic '{arithmetic}'; it has {', '.join(get_args(Arithmetic))}."
        )
    if kv_cache is not None and kv_cache not in _CACHES:
        raise TapeoutError(f"the reference has no cache '{kv_cache}'{nearest(kv_cache, _CACHES)}.")
    source = load(model)
    depth = source.config.num_layers
    if layers is not None and not 1 <= layers <= depth:
        raise TapeoutError(f"{source.name} has {depth} layers; it cannot be cut to {layers}.")
    quant = open_store(Path(store), source) if store is not None else None
    if source.quantization is not None and quant is None:
        raise ModelError(f"{source.name} has no floats of its own: its reference needs a store.")
    if arithmetic in _ROUNDED and quant is None:
        raise TapeoutError(f"arithmetic {arithmetic} is that of quantized weights: it needs a store.")
    before, begin = psutil.Process().memory_info().rss, perf_counter()
    if isinstance(source.config, TracedConfig) and source.config.is_module:
        run = modules.program(source, quant, _ROUNDED.get(arithmetic), double=arithmetic == "float64")
        return modules.ModuleReference(source, run, _facts(before, begin, 0))
    networks = {EncoderConfig: encoders.network, Seq2SeqConfig: seq2seq.network}
    network = networks.get(type(source.config), _network)(source, layers)
    if quant is not None:
        _dequantize(network, quant, cut=layers is not None)
    if arithmetic == "float64":
        network.double()
        _turn_in_float64(network)
    if quant is not None and arithmetic in _ROUNDED:
        _round_inputs(network, quant, _ROUNDED[arithmetic])
    if kv_cache is not None:
        _round_cache(network, kv_cache, neighbours=gguf.turns_neighbours(source.decoder))
    facts = _facts(before, begin, source.config.max_position_embeddings)
    words = cache(partial(tokenizer, source.directory))
    if isinstance(source.config, EncoderConfig):
        return encoders.EncoderReference(source, network, facts, words)
    if isinstance(source.config, Seq2SeqConfig):
        return seq2seq.Seq2SeqReference(source, network, facts, words)
    return Reference(source.directory, network, facts)


def open_weights(
    directory: Path,
    weights: Iterable[tuple[str, npt.NDArray[np.float32]]],
    *,
    threads: int | None = None,
) -> Reference:
    """Load the architecture that ``directory/config.json`` names with weights by their Hugging Face names.

    Raises:
        MissingToolchain: torch or transformers is not installed. ModelError: a weight is missing.
    """
    _prepare(threads)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    before, begin = psutil.Process().memory_info().rss, perf_counter()
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    network = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tensors = _tensors(network)
    left = {name: tensor.numel() for name, tensor in tensors.items()}
    names = {id(tensor): name for name, tensor in tensors.items()}
    for name, weight in weights:
        if place := _place(tensors, name):
            left[names[id(place[0])]] -= weight.size
            _put(place, weight)
    if missing := [name for name, count in left.items() if count]:
        raise ModelError(f"{directory} holds no {', '.join(sorted(missing)[:3])}.")
    return Reference(directory, network, _facts(before, begin, int(config.max_position_embeddings)))


def _prepare(threads: int | None) -> None:
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


def _facts(before: int, begin: float, context: int) -> Facts:
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
    network, found = AutoModelForCausalLM.from_pretrained(
        source.directory,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    if made_up := sorted(map(str, {*found["missing_keys"], *found["mismatched_keys"]})):
        raise ModelError(f"transformers does not find {', '.join(made_up[:3])} in {source.directory}.")
    if isinstance(source.config, TracedConfig):
        setattr(network, _OTHER_NAMES, _other_names(network, source))
    return network.eval()


def _dequantize(network: Any, quant: Quantized, *, cut: bool) -> None:
    """Put the values of the canonical codes in the place of the weights; a tied head follows its embedding."""
    tensors = _tensors(network)
    same = _same(quant)
    for name, scheme in quant.schemes.items():
        if scheme.kind == "none" and name not in quant.folded and quant.model.quantization is None:
            continue
        place = _place(tensors, name)
        if place is None and not cut:
            raise ModelError(
                f"transformers has no parameter {name} to put the codes of {quant.model.name} into."
            )
        if place is not None:
            weight = quant.float32(name)
            stored = np.ascontiguousarray(weight.T) if quant.model.checkpoint[name].turned else weight
            for other in (place, *(_place(tensors, each) for each in same.get(name, ()))):
                if other is not None:
                    _put(other, stored)


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


def _tensors(network: Any) -> dict[str, Any]:
    """All that a checkpoint holds, by transformers' names."""
    saved = network.state_dict().keys()
    buffers = {name: buffer for name, buffer in network.named_buffers() if name in saved}
    found = dict(network.named_parameters()) | buffers
    return found | {name: found[own] for name, own in getattr(network, _OTHER_NAMES, {}).items()}


_OTHER_NAMES = "_tapeout_other_names"


def _other_names(network: Any, source: Model) -> dict[str, str]:
    """Transformers' names for tensors of a family that has no file here, where it has others than the checkpoint: by their values."""
    import torch

    tensors = _tensors(network)
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


def _place(tensors: Mapping[str, Any], name: str) -> _Place | None:
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
    import torch

    def widened(forward: Callable[..., Any]) -> Callable[..., Any]:
        def turn(*args: Any, **keywords: Any) -> Any:
            with patch.object(torch.Tensor, "float", torch.Tensor.double):
                return forward(*args, **keywords)

        return turn

    for module in network.modules():
        if any("inv_freq" in name for name, _ in module.named_buffers(recurse=False)):
            module.forward = widened(module.forward)


def _round_inputs(network: Any, quant: Quantized, how: Callable[[Quantized, str], Round | None]) -> None:
    """Round the input of every linear layer for whose weight ``how`` gives a rounding."""
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, whose weight is [in, out]

    tensors = _tensors(network)
    rounds: dict[tuple[int, Any], Round | None] = {}
    for name in quant.schemes:
        if place := _place(tensors, name):
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


def _as_ggml(quant: Quantized, name: str) -> Round | None:
    """Every quantized weight whose rows llama.cpp can hold in blocks."""
    scheme = quant.schemes[name]
    if scheme.kind == "none" or quant.model.specs[name].shape[-1] % 32:
        return None
    return round_q8_k if scheme.scales == "super" else round_q8_0


def _as_mlas(quant: Quantized, name: str) -> Round | None:
    """Every quantized weight whose container is one whose kernels round; as the scheme says where it says how."""
    spec = quant.model.specs[name]
    scheme = onnx.as_held(quant.schemes[name], spec.role)
    if scheme.activations:
        return _as_the_scheme_says(quant, name)
    block = None if scheme.kind == "none" else onnx.input_block(scheme, spec.shape[-1])
    return None if block is None else partial(round_mlas, block=block)


def _as_the_scheme_says(quant: Quantized, name: str) -> Round | None:
    if quant.schemes[name].activations is None:
        return None
    tensor = quant[name]
    assert isinstance(tensor, QuantTensor)  # a tensor that could not take its scheme has none
    return partial(round_int8, scale=tensor.input_scale)


_ROUNDED: Mapping[str, Callable[[Quantized, str], Round | None]] = {
    "ggml": _as_ggml,
    "mlas": _as_mlas,
    "scheme": _as_the_scheme_says,
}


def round_int8(x: torch.Tensor, scale: np.float32 | None = None) -> torch.Tensor:
    """What ``w8a8`` and ``w8a8-static`` make of a matmul's input: float32 [..., in].

    ``clamp(round(x / scale), -128, 127) * scale``, ties to even: ONNX QuantizeLinear with a zero point of 0. Without a calibrated
    ``scale`` each token has its own, amax / 127, as vLLM and TensorRT-LLM choose it; a token of zeros stays zero.
    """
    import torch

    step = (
        x.abs().amax(-1, keepdim=True) / 127.0 if scale is None else torch.full_like(x[..., :1], float(scale))
    )
    codes = torch.where(step > 0, torch.round(x / step), 0.0).clamp(-128, 127)
    return codes * step


def round_mlas(x: torch.Tensor, block: int) -> torch.Tensor:
    """What MLAS makes of the input of a MatMulNBits at accuracy_level 4: float32 [..., in], ``in`` % ``block`` == 0.

    Blocks as long as the weights' own: codes = round(x · (127 / amax)), ties to even, under the float32 scale amax / 127
    (``QuantizeARow_CompInt8`` of onnxruntime's ``sqnbitgemm_kernel_*``).
    """
    import torch

    blocks = x.unflatten(-1, (-1, block))
    amax = blocks.abs().amax(-1, keepdim=True)
    # Tensor by tensor: torch makes a scalar over a tensor a product with the reciprocal, which is rounded twice.
    inverse = torch.where(amax > 0, torch.full_like(amax, 127.0) / amax, 0.0)
    return (torch.round(blocks * inverse) * (amax / 127.0)).flatten(-2)


def round_q8_0(x: torch.Tensor) -> torch.Tensor:
    """What ggml's kernels of Q4_0, Q5_0, Q8_0, MXFP4 and NVFP4 make of a matmul's input: float32 [..., in], ``in`` % 32 == 0.

    Blocks of 32 along ``in``: codes = round(x · (127 / amax)), ties to even (ggml's x86 and ARM kernels), with the scale
    amax / 127 kept as float16. The codes are chosen under the scale before that rounding.
    """
    import torch

    blocks = x.unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True)
    # Tensor by tensor: torch makes a scalar over a tensor a product with the reciprocal, which is rounded twice.
    inverse = torch.where(amax > 0, torch.full_like(amax, 127.0) / amax, 0.0)
    scale = (amax / 127.0).to(torch.float16).to(torch.float32)
    return (torch.round(blocks * inverse) * scale).flatten(-2)


def round_q8_k(x: torch.Tensor) -> torch.Tensor:
    """What ggml's kernels of the K types make of a matmul's input (``quantize_row_q8_K``): float32 [..., in], ``in`` % 256 == 0.

    Blocks of 256 along ``in``: the element of largest magnitude, with its sign, becomes -127; the scale stays float32.
    """
    import torch

    blocks = x.unflatten(-1, (-1, 256))
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(extreme != 0, torch.full_like(extreme, -127.0) / extreme, 0.0)
    scale = torch.where(extreme != 0, torch.ones_like(inverse) / inverse, 0.0)
    return (torch.round(blocks * inverse) * scale).flatten(-2)


def round_q4_0(x: torch.Tensor) -> torch.Tensor:
    """What ggml stores of a row as Q4_0 (``quantize_row_q4_0_ref``): float32 [..., in], ``in`` % 32 == 0.

    Blocks of 32 along ``in``: the first element of largest magnitude, with its sign, becomes -8; codes -8 … 7, halves up; the
    scale is kept as float16. The codes are chosen under the scale before that rounding.
    """
    import torch

    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8.0
    inverse = torch.where(scale != 0, torch.ones_like(scale) / scale, 0.0)
    codes = torch.floor(blocks * inverse + 8.5).clamp(max=15) - 8
    return (codes * scale.to(torch.float16).to(torch.float32)).flatten(-2)


_CACHES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"kv-int8": round_q8_0, "kv-int4": round_q4_0}


def as_cached(
    x: torch.Tensor,
    rounded: Callable[[torch.Tensor], torch.Tensor],
    *,
    rotary: bool,
    neighbours: bool = True,
) -> torch.Tensor:
    """Round float32 heads [..., head_dim] in the basis in which llama.cpp's cache holds them.

    Elements that RoPE turns together stand side by side there (``rotary``: keys and queries), if ``neighbours``: the arch has
    llama.cpp's "norm" RoPE; with its "neox" they stand as in the checkpoint. Heads of a multiple of 64 elements are turned by a Walsh-Hadamard matrix before they are
    rounded, which spreads outliers: values 64 elements at a time, keys and queries as many as a power of two divides
    (``llama_kv_cache::build_input_k_rot``).
    """
    width, apart = x.shape[-1], rotary and neighbours
    if apart:
        x = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    if width % 64:
        x = rounded(x)
    else:
        turn = _hadamard(width & -width if rotary else 64)
        x = _turned(rounded(_turned(x, turn)), turn)  # it is its own inverse
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if apart else x


def _hadamard(size: int) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard matrix in Sylvester's order, float32 [size, size]; ``size`` is a power of two."""
    import torch

    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / size**0.5


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    return (x.unflatten(-1, (-1, len(turn))) @ turn).flatten(-2)


def _round_cache(network: Any, kv_cache: str, *, neighbours: bool) -> None:
    """Let attention see what a rounded cache gives back.

    A query is rounded to Q8_0 whatever the cache holds: llama.cpp's dot products of both kinds take that.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    stored = _CACHES[kv_cache]

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        query, key = (
            as_cached(x, rounded, rotary=True, neighbours=neighbours)
            for x, rounded in ((query, round_q8_0), (key, stored))
        )
        return eager(module, query, key, as_cached(value, stored, rotary=False), mask, **settings)

    AttentionInterface.register(kv_cache, attend)
    AttentionMaskInterface.register(kv_cache, eager_mask)
    network.set_attn_implementation(kv_cache)
