"""What llama and the families built like it share: field names and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tapeout.errors import ModelError
from tapeout.models.decoder import ConfigReader, DecoderConfig, Role, Rope, TensorSpec

# Fields that describe training, file handling or defaults of generate(), and never the function computed.
_NOT_COMPUTED = (
    "architectures",
    "model_type",
    "attention_dropout",
    "initializer_range",
    "use_cache",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "_name_or_path",
    "auto_map",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "problem_type",
)

_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(fields: ConfigReader) -> Rope:
    """Read RoPE from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4)."""
    new: dict[str, Any] = dict(fields.take("rope_parameters", {}))
    old: dict[str, Any] = dict(fields.take("rope_scaling", {}))
    theta = float(fields.take("rope_theta", new.pop("rope_theta", 10000.0)))
    new.pop("rope_theta", None)
    parameters = new or old
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    if kind not in _ROPE_FIELDS:
        raise ModelError(f"rope_type '{kind}' is not handled; known: {', '.join(_ROPE_FIELDS)}.")
    wanted = _ROPE_FIELDS[kind]
    missing = [name for name in wanted if parameters.get(name) is None]
    unknown = sorted(name for name in parameters if name not in wanted and parameters[name] is not None)
    if missing or unknown:
        found = [f"lacks {name}" for name in missing] + [
            f"has {name}, which is not handled" for name in unknown
        ]
        raise ModelError(f"RoPE scaling of type '{kind}' {'; '.join(found)}.")
    return Rope(theta, kind, {name: parameters[name] for name in wanted})


def read_config(fields: ConfigReader, family: str, *, sliding_window: int | None = None) -> DecoderConfig:
    """Read the fields that every llama-like ``config.json`` has."""
    fields.ignore(*_NOT_COMPUTED)
    heads = int(fields.take("num_attention_heads"))
    hidden = int(fields.take("hidden_size"))
    eos = fields.take("eos_token_id", None)
    act = fields.take("hidden_act", "silu")
    if act != "silu":
        raise ModelError(f"hidden_act '{act}' is not what a {family} model computes; expected 'silu'.")
    tied = bool(fields.take("tie_word_embeddings", False))
    return DecoderConfig(
        family=family,
        vocab_size=int(fields.take("vocab_size")),
        hidden_size=hidden,
        intermediate_size=int(fields.take("intermediate_size")),
        num_layers=int(fields.take("num_hidden_layers")),
        num_heads=heads,
        num_kv_heads=int(fields.take("num_key_value_heads", heads)),
        head_dim=int(fields.take("head_dim", hidden // heads)),
        max_position_embeddings=int(fields.take("max_position_embeddings")),
        rms_norm_eps=float(fields.take("rms_norm_eps", 1e-6)),
        rope=read_rope(fields),
        hidden_act=act,
        sliding_window=sliding_window,
        tie_word_embeddings=tied,
        attention_bias=bool(fields.take("attention_bias", False)),
        mlp_bias=bool(fields.take("mlp_bias", False)),
        bos_token_id=fields.take("bos_token_id", None),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=fields.take("pad_token_id", None),
    )


def tensors(config: DecoderConfig) -> Mapping[str, TensorSpec]:
    """Every tensor of a llama-like checkpoint."""
    hidden, ffn, q, kv = (
        config.hidden_size,
        config.intermediate_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    found = {"model.embed_tokens.weight": TensorSpec(Role.EMBEDDING, (config.vocab_size, hidden))}

    def linear(name: str, out: int, into: int, bias: bool) -> None:
        found[f"{name}.weight"] = TensorSpec(Role.LINEAR, (out, into))
        if bias:
            found[f"{name}.bias"] = TensorSpec(Role.BIAS, (out,))

    for layer in range(config.num_layers):
        at = f"model.layers.{layer}"
        found[f"{at}.input_layernorm.weight"] = TensorSpec(Role.NORM, (hidden,))
        linear(f"{at}.self_attn.q_proj", q, hidden, config.attention_bias)
        linear(f"{at}.self_attn.k_proj", kv, hidden, config.attention_bias)
        linear(f"{at}.self_attn.v_proj", kv, hidden, config.attention_bias)
        linear(f"{at}.self_attn.o_proj", hidden, q, config.attention_bias)
        found[f"{at}.post_attention_layernorm.weight"] = TensorSpec(Role.NORM, (hidden,))
        linear(f"{at}.mlp.gate_proj", ffn, hidden, config.mlp_bias)
        linear(f"{at}.mlp.up_proj", ffn, hidden, config.mlp_bias)
        linear(f"{at}.mlp.down_proj", hidden, ffn, config.mlp_bias)
    found["model.norm.weight"] = TensorSpec(Role.NORM, (hidden,))
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = TensorSpec(Role.HEAD, (config.vocab_size, hidden))
    return found


def optional(name: str) -> bool:
    """Old checkpoints carry the rotary table, and tied ones sometimes their head once more."""
    return name.endswith(".rotary_emb.inv_freq") or name == "lm_head.weight"
