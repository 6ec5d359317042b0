"""T5: relative positions, scores that are not scaled, a head that is the embedding (scaled) or, from v1.1 on, its own."""

from __future__ import annotations

from collections.abc import Mapping

from tapeout.errors import ModelError, nearest
from tapeout.models.decoder import ACTIVATIONS, ConfigReader, Role, TensorSpec
from tapeout.models.families import Family, _shared
from tapeout.models.seq2seq import EMBEDDING, HEAD, Seq2SeqConfig

_NOT_COMPUTED = (
    "dropout_rate",
    "classifier_dropout",
    "initializer_factor",
    "is_encoder_decoder",
    "n_positions",  # of what it was trained with; relative positions have no end
    "task_specific_params",
    "output_past",
    "is_decoder",
)


def _config(fields: ConfigReader) -> Seq2SeqConfig:
    fields.ignore(*_shared.NOT_COMPUTED, *_NOT_COMPUTED)
    known = "T5ForConditionalGeneration"
    given = (fields.raw.get("architectures") or [known])[0]
    if given != known:
        raise ModelError(f"the architecture {given} is not handled{nearest(str(given), [known])}.")

    def count(name: str, default: int | None = None) -> int:
        value = fields.take(name, default) if default is not None else fields.take(name)
        return _shared.positive(name, value)

    gate, _, act = str(fields.take("feed_forward_proj", "relu")).rpartition("-")
    gated = bool(fields.take("is_gated_act", gate == "gated"))
    # "gated-gelu" has always meant the approximation.
    act = str(fields.take("dense_act_fn", "gelu_new" if gated and act == "gelu" else act))
    act = "gelu_pytorch_tanh" if act == "gelu_new" else act
    fits = ACTIVATIONS if gated else (*ACTIVATIONS, "relu")
    if gate not in ("", "gated") or act not in fits:
        raise ModelError(
            f"feed_forward_proj with {'a gate and ' if gated else ''}the activation '{act}' is not handled{nearest(act, fits)}."
        )
    tied = bool(fields.take("tie_word_embeddings", True))
    layers, hidden = count("num_layers"), count("d_model")
    buckets, distance = (
        count("relative_attention_num_buckets", 32),
        count("relative_attention_max_distance", 128),
    )
    if buckets % 4 or distance <= buckets // 2:
        raise ModelError(
            f"relative_attention_num_buckets = {buckets} with relative_attention_max_distance = {distance} is not handled: a multiple "
            "of 4, and more than half of it."
        )
    # Files that transformers 5 writes say it apart; before, it went with the tied head.
    scaled = bool(fields.take("scale_decoder_outputs", tied))
    pad = int(fields.take("pad_token_id", 0))
    eos = fields.take("eos_token_id", 1)
    return Seq2SeqConfig(
        family="t5",
        vocab_size=count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=count("d_ff"),
        num_heads=count("num_heads"),
        head_dim=count("d_kv"),
        encoder_layers=layers,
        decoder_layers=count("num_decoder_layers", layers),
        rms_norm_eps=float(fields.take("layer_norm_epsilon", 1e-6)),
        hidden_act=act,
        gated=gated,
        buckets=buckets,
        max_distance=distance,
        tie_word_embeddings=tied,
        logit_scale=hidden**-0.5 if scaled else 1.0,
        decoder_start_token_id=int(fields.take("decoder_start_token_id", pad)),
        max_position_embeddings=int(fields.raw.get("n_positions") or 512),
        bos_token_id=fields.take("bos_token_id", None),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=pad,
    )


def _tensors(c: Seq2SeqConfig) -> Mapping[str, TensorSpec]:
    found = {EMBEDDING: TensorSpec(Role.EMBEDDING, (c.vocab_size, c.hidden_size))}
    wide, hidden = c.num_heads * c.head_dim, c.hidden_size

    def linear(name: str, out: int, into: int) -> None:
        found[f"{name}.weight"] = TensorSpec(Role.LINEAR, (out, into))

    def norm(name: str) -> None:
        found[f"{name}.weight"] = TensorSpec(Role.NORM, (hidden,))

    def attention(at: str, kind: str) -> None:
        for part in "qkv":
            linear(f"{at}.{kind}.{part}", wide, hidden)
        linear(f"{at}.{kind}.o", hidden, wide)

    for stack, layers in (("encoder", c.encoder_layers), ("decoder", c.decoder_layers)):
        for index in range(layers):
            at = f"{stack}.block.{index}.layer"
            attention(f"{at}.0", "SelfAttention")
            if index == 0:
                found[f"{at}.0.SelfAttention.relative_attention_bias.weight"] = TensorSpec(
                    Role.POSITION, (c.buckets, c.num_heads)
                )
            norm(f"{at}.0.layer_norm")
            if stack == "decoder":
                attention(f"{at}.1", "EncDecAttention")
                norm(f"{at}.1.layer_norm")
            last = f"{at}.{1 if stack == 'encoder' else 2}"
            for module in ("wi_0", "wi_1") if c.gated else ("wi",):
                linear(f"{last}.DenseReluDense.{module}", c.intermediate_size, hidden)
            linear(f"{last}.DenseReluDense.wo", hidden, c.intermediate_size)
            norm(f"{last}.layer_norm")
        norm(f"{stack}.final_layer_norm")
    if not c.tie_word_embeddings:
        found[HEAD] = TensorSpec(Role.HEAD, (c.vocab_size, hidden))
    return found


def _optional(c: Seq2SeqConfig, name: str) -> bool:
    """Old checkpoints carry the shared table once more for each stack, and a bias of cross attention that nothing reads."""
    return name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight") or name.endswith(
        "EncDecAttention.relative_attention_bias.weight"
    )


FAMILY = Family(_config, _tensors, _optional)
