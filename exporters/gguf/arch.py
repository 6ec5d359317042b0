"""Which of llama.cpp's archs computes a model, and what none of them does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tapeout.errors import ModelError
from tapeout.models import DecoderConfig, EncoderConfig
from tapeout.models.rope import attention_factor, mscale

_GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Arch:
    """What an arch's graph computes beside what all do: RMSNorm, gated MLP, grouped-query attention.

    Attributes:
        tensors: member of ``gguf.MODEL_ARCH`` whose names the tensors get.
        act: the activation.
        interleaved: RoPE turns element 2 i of a head with 2 i + 1.
        ropes: scalings that it carries; ``dynamic`` is ``default`` within the context that a file states.
        windows: layers with a sliding window, of any pattern, and a RoPE of their own.
        has: attributes of DecoderConfig, and of its Moe, that it computes when they are true (or a number).
        wants: attributes that it computes always.
    """

    tensors: str
    act: str = "silu"
    interleaved: bool = False
    ropes: tuple[str, ...] = ("default", "dynamic", "linear", "yarn")
    windows: bool = False
    has: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()


_LLAMA = ("qkv_bias", "out_bias", "mlp_bias")
_GEMMA = ("norm_offset", "scaled")
_PLAIN = ("default", "dynamic", "linear")
_TIED = ("tie_word_embeddings",)
ARCHS = {
    "llama": Arch(
        "LLAMA",
        interleaved=True,
        ropes=(*_PLAIN, "yarn", "longrope", "llama3"),
        has=(*_LLAMA, "moe"),
        wants=("renormalize",),
    ),
    "gemma": Arch("GEMMA", _GELU, ropes=_PLAIN, wants=(*_GEMMA, *_TIED)),
    "gemma2": Arch(
        "GEMMA2",
        _GELU,
        ropes=_PLAIN,
        windows=True,
        wants=(*_GEMMA, *_TIED, "sandwich_norms", "attention_softcap", "logit_softcap"),
    ),
    "gemma3": Arch(
        "GEMMA3",
        _GELU,
        ropes=_PLAIN,
        windows=True,
        has=("logit_softcap",),
        wants=(*_GEMMA, "sandwich_norms", "qk_norm"),
    ),
    "phi3": Arch("PHI3", ropes=("default", "longrope"), wants=("fused",)),
    "qwen2": Arch("QWEN2", has=("qkv_bias",)),
    "qwen3": Arch("QWEN3", wants=("qk_norm",)),
    "qwen2moe": Arch("QWEN2MOE", has=("qkv_bias",), wants=("moe", "shared_size", "shared_gate")),
    "qwen3moe": Arch("QWEN3MOE", wants=("moe", "qk_norm", "renormalize")),
    "deepseek2": Arch(
        "DEEPSEEK2",
        interleaved=True,
        has=("renormalize", "correction_bias", "sigmoid", "grouped", "scaled_experts"),
        wants=("moe", "mla", "shared_size"),
    ),
}
"""By the name that a file states. llama.cpp has more; these are those of families that are known here."""

_BY_FAMILY = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}

# What a config may have, as the words above, and as its field says it to a user.
_FACTS: dict[str, Callable[[DecoderConfig], Any]] = {
    "qkv_bias": lambda c: c.qkv_bias,
    "out_bias": lambda c: c.out_bias,
    "mlp_bias": lambda c: c.mlp_bias,
    "fused": lambda c: c.fused,
    "qk_norm": lambda c: c.qk_norm,
    "sandwich_norms": lambda c: c.sandwich_norms,
    "norm_offset": lambda c: c.norm_offset,
    "scaled": lambda c: c.embedding_scale != 1.0,
    "attention_softcap": lambda c: c.attention_softcap,
    "logit_softcap": lambda c: c.logit_softcap,
    "mla": lambda c: bool(c.mla),
    "moe": lambda c: bool(c.moe),
    "renormalize": lambda c: bool(c.moe and c.moe.renormalize),
    "correction_bias": lambda c: bool(c.moe and c.moe.correction_bias),
    "sigmoid": lambda c: bool(c.moe and c.moe.scoring == "sigmoid"),
    "grouped": lambda c: bool(c.moe and c.moe.groups > 1),
    "scaled_experts": lambda c: bool(c.moe and c.moe.scale != 1.0),
    "shared_size": lambda c: bool(c.moe and c.moe.shared_size),
    "shared_gate": lambda c: bool(c.moe and c.moe.shared_gate),
}
_OF_EXPERTS = ("renormalize", "shared_size", "shared_gate")


def choose(config: DecoderConfig, sliding_window: str, layers: int) -> tuple[str, int, list[str]]:
    """Arch, longest context, notes of a model cut to ``layers``.

    A window that matters goes into an arch that has it (granite_swa for what is otherwise a llama), or limits the context.

    Raises:
        ModelError: what the arch does not compute.
    """
    name = _BY_FAMILY[config.family]
    check(config, name, layers)
    window, context, notes = config.sliding_window, config.max_position_embeddings, []
    if config.rope.kind == "longrope":
        trained = int(config.rope.parameters["original_max_position_embeddings"])
        if trained < context:
            if trained % 256:
                raise ModelError(
                    f"original_max_position_embeddings = {trained} with longrope is not expressible in GGUF: llama.cpp rounds a context up "
                    f"to a multiple of 256, and beyond {trained} tokens it takes the long factors for all of them."
                )
            notes.append(
                f"the context is clamped from {context} to {trained} tokens: llama.cpp chooses between LongRoPE's factors once, by "
                "the context that it is given, and not when the text grows past it"
            )
            context = trained
    if window is None or window >= context or ARCHS[name].windows:
        return name, context, notes
    if sliding_window == "clamp":
        note = f"arch {name} has no sliding window: the context is clamped from {context} to the window of {window} tokens"
        return name, window, [*notes, note]
    if name != "llama" or config.moe or config.window_layers or config.rope.kind not in (*_PLAIN, "llama3"):
        raise ModelError(
            f"sliding_window = {window} of a {config.family} model is not expressible in GGUF arch '{name}'; what fits: "
            f"sliding_window='clamp', which makes a file with a context of {window}."
        )
    note = (
        f"the sliding window of {window} tokens is carried by arch granite_swa (scales 1, sinks that weigh 0): needs a "
        "llama.cpp that knows this arch (llama-cpp-python 0.3.36 does); sliding_window='clamp' makes a file for any, with a "
        f"context of {window}"
    )
    return "granite_swa", context, [*notes, note]


def choose_encoder(config: EncoderConfig) -> list[str]:
    """Notes of an encoder, which llama.cpp's arch ``bert`` computes for its embeddings.

    Raises:
        ModelError: what the arch does not compute.
    """
    unfit: dict[str, Any] = {}
    if config.family != "bert":
        unfit["model_type"] = config.family
    if config.output == "logits":
        unfit["a head of classes"] = len(config.labels)
    if not config.hidden_act.startswith("gelu"):
        unfit["hidden_act"] = config.hidden_act
    if unfit:
        fields = ", ".join(f"{field} = {value}" for field, value in unfit.items())
        raise ModelError(f"{fields} is not expressible in GGUF arch 'bert'. What fits: format onnx.")
    notes = []
    if config.normalize:
        notes.append(
            "llama.cpp's library gives embeddings as they are pooled; its tools and tapeout divide them by their length, as the model does"
        )
    if config.type_rows > 1:
        notes.append("llama.cpp gives every token type 0")
    return notes


def turns_neighbours(config: DecoderConfig) -> bool:
    """Whether the RoPE of a model's arch turns element 2 i of a head with 2 i + 1."""
    return ARCHS[_BY_FAMILY[config.family]].interleaved


def check(config: DecoderConfig, name: str, layers: int) -> None:
    """Stop at what an arch does not compute."""
    arch, c = ARCHS[name], config
    unfit: dict[str, Any] = {}
    if c.hidden_act != arch.act:
        unfit["hidden_act"] = c.hidden_act
    rope = c.rope
    if rope.kind not in arch.ropes:
        unfit["rope_type"] = rope.kind
    if rope.kind == "yarn":  # llama.cpp reads these of two archs only, and uses its defaults in all others
        fixed = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
        unfit |= {key: rope.parameters[key] for key, value in fixed.items() if rope.parameters[key] != value}
    if c.local_rope and (c.local_rope.kind != "default" or c.local_rope.dim != rope.dim):
        unfit["rope_type of layers with a window"] = c.local_rope.kind
    if c.head_dim % 2:
        unfit["head_dim"] = c.head_dim
    for fact, of in _FACTS.items():
        if of(c) and fact not in (*arch.has, *arch.wants):
            unfit[fact] = of(c)
        if not of(c) and fact in arch.wants and (c.moe or fact not in _OF_EXPERTS):
            unfit[fact] = of(c)
    scale = _attention_scale(c, name, layers)
    if not math.isclose(c.attention_scale, scale, rel_tol=1e-6):
        unfit["the scale of attention's scores"] = f"1 / sqrt({c.attention_scale**-2:g})"
    if "tie_word_embeddings" in arch.wants and not c.tie_word_embeddings:
        unfit["tie_word_embeddings"] = False
    if name == "phi3" and c.num_heads * c.head_dim != c.hidden_size:
        unfit["head_dim"] = c.head_dim
    if c.moe:
        dense = c.moe.layers.index(True) if True in c.moe.layers else c.num_layers
        if not all(c.moe.layers[dense:]) or (dense and name != "deepseek2"):
            unfit["layers with experts"] = [i for i, routed in enumerate(c.moe.layers) if routed]
        if c.moe.groups > 1 and c.moe.group_score != "top2":
            unfit["topk_method"] = "group_limited_greedy"
    if c.mla and not rope.interleaved:
        unfit["rope_interleave"] = False
    if c.mla and c.mla.eps != c.rms_norm_eps:  # one epsilon for all norms; the latents' is fixed
        unfit["rms_norm_eps"] = c.rms_norm_eps
    if unfit:
        fields = ", ".join(f"{field} = {value}" for field, value in unfit.items())
        # ONNX Runtime's attention takes heads of a multiple of 8, and builds the graph by the config.
        fits = "" if c.mla or c.head_dim % 8 else "; what fits: --format onnx"
        raise ModelError(f"{fields} is not expressible in GGUF arch '{name}'{fits}.")


def _attention_scale(c: DecoderConfig, name: str, layers: int) -> float:
    """What the arch multiplies scores by; it knows two of Gemma's sizes by how many layers they have."""
    if (name, layers) in (("gemma2", 46), ("gemma3", 62)):
        return float((c.hidden_size // c.num_heads) ** -0.5)
    if name == "deepseek2" and c.rope.kind == "yarn":
        p = c.rope.parameters
        # Without mscale_all_dim, or with another mscale beside it, llama.cpp and transformers part.
        if not p["mscale_all_dim"] or not math.isclose(attention_factor(c.rope), 1.0):
            return math.nan
        return float(c.head_dim**-0.5 * mscale(p["factor"], p["mscale_all_dim"]) ** 2)
    return float(c.head_dim**-0.5)
