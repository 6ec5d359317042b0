"""What both versions of our efficient encoder share; ``tapeout.models.efficient`` defines them in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tapeout.errors import ModelError
from tapeout.models.decoder import ConfigReader
from tapeout.models.encoder import EncoderConfig, Names
from tapeout.models.families import _encoders, _shared

NAMES = Names(
    words="words",
    positions="positions",
    types="",
    embedding_norm="",
    layer="layers.{}",
    query="attention.query",
    key="attention.key",
    value="attention.value",
    out="attention.out",
    attention_norm="attention_norm",
    up="mlp.up",
    down="mlp.down",
    mlp_norm="mlp_norm",
    final_norm="norm",
    classifier="classifier",
)


def config_of(version: int) -> Callable[[ConfigReader], EncoderConfig]:
    """The reader of a version's ``config.json``."""

    def read(fields: ConfigReader) -> EncoderConfig:
        config = _encoders.read_config(
            fields,
            f"efficient_encoder_v{version}",
            NAMES,
            pre_norm=True,
            pooling="mean",
            output="logits",
            labels=_encoders.read_labels(fields),
        )
        if version == 1:
            return config
        rope = _shared.read_rope(fields, config.head_dim, config.max_position_embeddings)
        if rope.kind != "default":
            raise ModelError(
                f"rope_type '{rope.kind}' of an efficient encoder is not handled; known: default."
            )
        return replace(config, position_rows=0, rope=rope)

    return read
