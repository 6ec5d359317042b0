"""Sessions on a GPU, NVIDIA's or AMD's: transformers' network, its linear layers on codes as the files hold them.

Decoding replays a graph of one token (``torch.cuda.graph``, which is HIP's on ROCm) over keys and values at fixed places; where a
model's own code asks the host in mid-pass (routed experts, RoPE that looks at the length), token by token without a graph.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from tapeout.errors import ModelError, TapeoutError
from tapeout.exporters.huggingface import Tensors, compressed_tensors, modelopt
from tapeout.models import DecoderConfig
from tapeout.models.decoder import ConfigReader
from tapeout.models.families import family
from tapeout.quantize import QuantTensor
from tapeout.quantize.scheme import E2M1, E4M3
from tapeout.targets import gpu_kernels, modelopt_loader
from tapeout.validate import device_peaks, pretrained, reference
from tapeout.validate.device_peaks import copy_bandwidth
from tapeout.validate.given import check_ids
from tapeout.validate.rounding import round_e4m3_static, round_nvfp4
from tapeout.validate.session import Facts, Logits

_CHUNK = 2048  # tokens of a prompt at once
_FIRST = 256  # places of a cache that has just begun; it doubles
# Families whose masks transformers takes by the kind of layer.
_BY_KIND = ("gemma2", "gemma3_text", "qwen2", "qwen2_moe", "qwen3")


@dataclass(frozen=True)
class Weight:
    """A weight of a linear layer as a device multiplies with it; see ``gpu_kernels.Codes``."""

    packed: torch.Tensor
    bits: int
    scale: torch.Tensor
    levels: torch.Tensor
    zero: torch.Tensor | None = None
    inputs: Callable[[torch.Tensor], torch.Tensor] | None = None


def open_session(path: Path) -> GpuSession:
    """Load a directory of compressed-tensors, bitsandbytes or ModelOpt, or of floats, onto the first GPU.

    Raises:
        ModelError: a weight is missing. PackageError: a file is truncated.
    """
    with ExitStack() as stack:
        tensors = Tensors(path, stack)
        said = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return load(path, weights(said.get("quantization_config") or {}, tensors))


def load(
    path: Path,
    found: Iterator[tuple[str, Weight | torch.Tensor]],
    device: str = "cuda",
    dtype: torch.dtype | None = None,
) -> GpuSession:
    """The architecture that ``path/config.json`` names, with these weights by their Hugging Face names.

    Args:
        path: of the directory.
        found: weights on any device.
        device: of torch.
        dtype: of what is no code; None: bfloat16 where the config says so, else float16.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    begin = perf_counter()
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    ours = family(raw["model_type"]).config(ConfigReader(raw))
    dtype = dtype or (torch.bfloat16 if config.dtype == torch.bfloat16 else torch.float16)
    # transformers leaves soft caps out of the fused kernels.
    how = "eager" if ours.attention_softcap else "sdpa"
    with init_empty_weights(include_buffers=False):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=how)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    _fill(network, found, device, dtype)
    network.tie_weights()
    if missing := sorted(name for name, each in network.named_parameters() if each.is_meta):
        raise ModelError(f"{path} holds no {', '.join(missing[:3])}.")
    for module in network.modules():
        if hasattr(module, "variance_epsilon"):  # Llama's norm and its like, as one kernel in place of eight
            module.forward = partial(_norm, module)
    for module in network.modules():  # what is not in the files: RoPE's frequencies
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    took = torch.cuda.memory_allocated() - before if device == "cuda" else 0
    import transformers

    told = Facts(
        runtime=f"transformers {transformers.__version__}, torch {torch.__version__}, kernels on codes by triton",
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        load_s=perf_counter() - begin,
        resident_bytes=took,
        context=ours.max_position_embeddings,
        bandwidth=copy_bandwidth(device) if device == "cuda" else None,
    )
    return GpuSession(path, network.eval(), ours, told, device, dtype)


def _fill(
    network: Any, found: Iterator[tuple[str, Weight | torch.Tensor]], device: str, dtype: torch.dtype
) -> None:
    """Put weights in their places: codes as a layer of their own, floats as they are, experts into their stack."""
    tensors = reference.tensors_of(network)
    for name, weight in found:
        base, _, _ = name.rpartition(".")
        place = reference.place_of(tensors, name)
        if place is None:
            continue
        stacked, part = place
        if isinstance(weight, Weight):
            layer = _layer(weight, device)
            if part is None:
                owner, _, last = base.rpartition(".")
                replaced = network.get_submodule(base)
                layer.bias = replaced.bias
                setattr(network.get_submodule(owner), last, layer)
                continue
            weight = layer.widen(dtype)
        value = weight.to(device, dtype)
        if part is None:
            _set(network, stacked, value)
            continue
        if stacked.is_meta:
            _set(network, stacked, torch.empty(stacked.shape, dtype=dtype, device=device))
            tensors = reference.tensors_of(network)
            stacked, part = cast(Any, reference.place_of(tensors, name))
        stacked.data[part] = value


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _set(network: Any, old: torch.Tensor, value: torch.Tensor) -> None:
    """Put a parameter on a device in the place of one that has no values."""
    for module in network.modules():
        for name, each in (*module._parameters.items(), *module._buffers.items()):
            if each is old:
                fresh = (
                    torch.nn.Parameter(value, requires_grad=False) if name in module._parameters else value
                )
                setattr(module, name, fresh)


def _layer(weight: Weight, device: str) -> gpu_kernels.Codes:
    zero = None if weight.zero is None else weight.zero.to(device)
    return gpu_kernels.Codes(
        weight.packed.to(device),
        weight.bits,
        weight.scale.to(device),
        weight.levels.to(device),
        zero,
        inputs=weight.inputs,
    )


def weights(
    said: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, Weight | torch.Tensor]]:
    """The weights of a directory by name: codes where it has them, floats as they stand.

    Args:
        said: ``quantization_config``; empty: all are floats.
        tensors: of the files.
    """
    method = str(said.get("quant_method", ""))
    beside = {*compressed_tensors.SUFFIXES, *modelopt.SUFFIXES}
    reader = modelopt_loader.Reader(said, tensors)
    for name in tensors:
        base, _, last = name.rpartition(".")
        packed = method == "compressed-tensors" and f"{base}.weight_scale" in tensors
        if packed and last in ("weight_packed", "weight"):
            yield f"{base}.weight", _compressed(said, base, tensors)
        elif method == "modelopt" and last == "weight" and (codes := reader.codes(base)) is not None:
            yield name, replace(of(codes), inputs=reader.inputs(base))
        elif f"{name}.quant_map" in tensors:
            yield name, _nf4(name, tensors)
        elif last not in beside and ".weight." not in name:
            yield name, tensors[name]


def of(tensor: QuantTensor) -> Weight:
    """Canonical codes as a device multiplies with them; affine ones have no kernel.

    Raises:
        TapeoutError: codes of other widths than 4 and 8 bits, or with a minimum.
    """
    if tensor.bits not in (4, 8) or tensor.minimum is not None:
        raise TapeoutError("the kernels take codes of 4 and 8 bits without a minimum.")
    return Weight(
        torch.from_numpy(np.array(tensor.packed)),
        tensor.bits,
        torch.from_numpy(np.array(tensor.scale)),
        torch.from_numpy(tensor.codebook.astype(np.float32)),
        None if tensor.zero_point is None else torch.from_numpy(np.array(tensor.zero_point)),
    )


def _compressed(said: Mapping[str, Any], base: str, tensors: Mapping[str, torch.Tensor]) -> Weight:
    """compressed-tensors: words whose lowest bits are the first code, counted from ``-2**(bits - 1)``; or bytes, or nibbles of floats."""
    groups = list(said["config_groups"].values())
    group = next((each for each in groups if base in each["targets"]), groups[0])
    how, inputs = group["weights"], group["input_activations"]
    bits = int(how["num_bits"])
    scale = tensors[f"{base}.weight_scale"]
    rounding: Callable[[torch.Tensor], torch.Tensor] | None = None
    if how["type"] == "float":
        return _floats(base, tensors, bits)
    if inputs is not None:
        step = None if inputs["dynamic"] else float(tensors[f"{base}.input_scale"])
        rounding = partial(_int8, step=step)
    lowest = -(2.0 ** (bits - 1))
    if f"{base}.weight_packed" not in tensors:
        packed = tensors[f"{base}.weight"].view(torch.uint8) ^ 0x80
    else:
        into = int(tensors[f"{base}.weight_shape"][1])
        packed = tensors[f"{base}.weight_packed"].contiguous().view(torch.uint8)[:, : into * bits // 8]
    zero = None
    if not how["symmetric"]:
        words = tensors[f"{base}.weight_zero_point"].T.contiguous().view(torch.uint8)
        if bits == 4:
            words = torch.stack((words & 0xF, words >> 4), -1).reshape(len(words), -1)
        zero, lowest = words[:, : len(scale)].T.contiguous(), 0.0
    return Weight(packed, bits, scale, torch.arange(2.0**bits) + lowest, zero, rounding)


def _floats(base: str, tensors: Mapping[str, torch.Tensor], bits: int) -> Weight:
    """E4M3 under a scale a row or one a tensor, or E2M1 under E4M3 under what divides them; and how inputs are rounded."""
    rounding: Callable[[torch.Tensor], torch.Tensor] | None = None
    scale = tensors[f"{base}.weight_scale"]
    if bits == 4:
        if (whole := tensors.get(f"{base}.input_global_scale")) is not None:
            rounding = partial(round_nvfp4, scale=np.float32(1 / whole.item()))
        scale = scale.float() / tensors[f"{base}.weight_global_scale"]
        packed = tensors[f"{base}.weight_packed"]
        return Weight(packed, bits, scale, torch.from_numpy(E2M1), inputs=rounding)
    packed = tensors[f"{base}.weight"].view(torch.uint8)
    if scale.dim() == 1:
        scale = scale.reshape(1, 1).expand(len(packed), 1)
    if (step := tensors.get(f"{base}.input_scale")) is not None:
        rounding = partial(round_e4m3_static, scale=np.float32(step.item()))
    return Weight(packed, bits, scale, torch.from_numpy(E4M3), inputs=rounding)


def _int8(x: torch.Tensor, step: float | None) -> torch.Tensor:
    """By one step, or each row by its own."""
    size: Any = step or x.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 127
    return torch.round(x / size).clamp(-128, 127) * size


def _nf4(name: str, tensors: Mapping[str, torch.Tensor]) -> Weight:
    """bitsandbytes: nibbles, the high one first, in blocks along the rows; scales that may be codes themselves."""
    state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    out, into = state["shape"]
    packed = tensors[name].reshape(out, into // 2)
    scale = tensors[f"{name}.absmax"]
    if "nested_blocksize" in state:
        outer = tensors[f"{name}.nested_absmax"].repeat_interleave(state["nested_blocksize"])
        scale = (
            tensors[f"{name}.nested_quant_map"][scale.int()] * outer[: len(scale)] + state["nested_offset"]
        )
    return Weight(
        (packed << 4) | (packed >> 4), 4, scale.reshape(out, -1).float(), tensors[f"{name}.quant_map"]
    )


def _cache_kind() -> Any:
    """Keys and values at fixed places, written where ``place`` says; transformers' kind, made where it is imported."""
    from transformers.cache_utils import Cache

    class Fixed(Cache):
        def __init__(self) -> None:
            super().__init__(layers=[])
            self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            self.size, self.shown = 0, 0
            self.place: torch.Tensor | None = None

        def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> Any:
            if layer not in self.kept:
                self.kept[layer] = tuple(
                    each.new_zeros((*each.shape[:2], self.size, each.shape[3])) for each in (key, value)
                )
            keys, values = self.kept[layer]
            keys.index_copy_(2, cast(torch.Tensor, self.place), key)
            values.index_copy_(2, cast(torch.Tensor, self.place), value)
            return keys[:, :, : self.shown], values[:, :, : self.shown]

        def grow(self, size: int) -> None:
            for layer, pair in self.kept.items():
                wider = tuple(each.new_zeros((*each.shape[:2], size, each.shape[3])) for each in pair)
                for old, new in zip(pair, wider, strict=True):
                    new[:, :, : self.size] = old
                self.kept[layer] = wider
            self.size = size

        def get_seq_length(self, *_: Any, **__: Any) -> int:
            return 0

    return Fixed


class GpuSession(pretrained.Words):
    """A Session on a GPU; see ``load``."""

    facts: Facts

    def __init__(
        self,
        directory: Path,
        network: Any,
        config: DecoderConfig,
        facts: Facts,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        self.facts = facts
        self.words, self._network, self._config = directory, network, config
        self._device, self._dtype = device, dtype
        self._cache = _cache_kind()()
        self._length = 0
        self._graph: Any = None
        self._token = torch.zeros((1, 1), dtype=torch.long, device=device)
        self._place = torch.zeros(1, dtype=torch.long, device=device)
        self._logits: Any = None
        self.graphs = device == "cuda"

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append tokens to the sequence at once; return float32 [tokens, vocab], the logits after each."""
        return np.concatenate(list(self._chunks(ids, keep=0)))

    def append(self, ids: Sequence[int]) -> Logits:
        """``prefill`` for those who want the last token's logits only, float32 [1, vocab]."""
        *_, last = self._chunks(ids, keep=1)
        return cast(Logits, last)

    @torch.inference_mode()
    def decode(self, token: int) -> Logits:
        """Append one token; return float32 [vocab]."""
        self._room([token])
        self._token.fill_(token)
        self._place.fill_(self._length)
        if self.graphs and self._graph is None:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._logits = self._step()
        self._length += 1
        return cast(Logits, self._logits[0, -1].float().cpu().numpy())

    def reset(self) -> None:
        """Begin a new sequence."""
        self._length = 0

    def roof(self) -> dict[str, Any]:
        """What the device multiplies in the session's type, and in float32; see ``device_peaks.roof``."""
        return device_peaks.roof(self._device, (str(self._dtype).removeprefix("torch."), "float32"), _CHUNK)

    def close(self) -> None:
        """Free the model."""
        self._network = self._cache = self._graph = self._logits = None

    @torch.inference_mode()
    def _chunks(self, ids: Sequence[int], keep: int) -> Iterator[npt.NDArray[np.float32]]:
        self._room(ids)
        for at in range(0, len(ids), _CHUNK):
            chunk = torch.tensor([list(ids[at : at + _CHUNK])], device=self._device)
            place = torch.arange(self._length, self._length + chunk.shape[1], device=self._device)
            self._cache.shown = self._length = self._length + chunk.shape[1]
            yield self._forward(chunk, place, keep)[0].float().cpu().numpy()

    def _room(self, ids: Sequence[int]) -> None:
        """Make places for more tokens."""
        length = self._length + len(ids)
        if length > self.facts.context:
            raise TapeoutError(f"{length} tokens do not fit the context of {self.facts.context}.")
        check_ids(ids, self._config.vocab_size)
        if length > self._cache.size:
            size = max(_FIRST, 1 << (length - 1).bit_length())
            self._cache.grow(min(size, self.facts.context))
            self._graph = None  # it writes to the old places

    def _step(self) -> torch.Tensor:
        """One token at the place that a tensor names, looking at every place there is."""
        self._cache.shown = self._cache.size
        return self._forward(self._token, self._place, 1)

    def _forward(self, ids: torch.Tensor, place: torch.Tensor, keep: int) -> torch.Tensor:
        self._cache.place = place
        out = self._network(
            input_ids=ids,
            position_ids=place[None],
            attention_mask=self._mask(place),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return cast(torch.Tensor, out.logits)

    def _mask(self, place: torch.Tensor) -> Any:
        """What each token sees, added to its scores, [1, 1, tokens, places]; by kind of layer where transformers asks for that."""
        key = torch.arange(self._cache.shown, device=self._device)[None]
        never = torch.finfo(self._dtype).min
        masks: dict[str, torch.Tensor] = {}
        for layer in range(self._config.num_layers):
            window = self._config.window(layer)
            kind = "sliding_attention" if window else "full_attention"
            if kind not in masks:
                hidden = key > place[:, None]
                if window:
                    hidden |= key <= place[:, None] - window
                mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
                masks[kind] = mask.masked_fill_(hidden, never)[None, None]
        if self._config.family in _BY_KIND:
            return masks
        assert len(masks) == 1, "layers of two kinds in a family whose masks transformers takes as one"
        return next(iter(masks.values()))

    def _capture(self) -> None:
        """Record a token's kernels; a model that cannot be recorded runs without."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(2):  # kernels are compiled and workspaces made before
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self._step()
        except RuntimeError:
            torch.cuda.synchronize()
            self.graphs = False
            return
        self._graph = graph
