"""BERT: post-norm, learned positions, token types; as it is, or with the pooled head of a classifier."""

from __future__ import annotations

from tapeout.models.decoder import ConfigReader
from tapeout.models.encoder import EncoderConfig
from tapeout.models.families import Family, _encoders


def _config(fields: ConfigReader) -> EncoderConfig:
    config = _encoders.read_config(
        fields, "bert", _encoders.BERT, type_rows=int(fields.take("type_vocab_size", 2))
    )
    return _encoders.with_head(
        config, fields, "Bert", "bert", dense="bert.pooler.dense", act="tanh", classifier="classifier"
    )


FAMILY = Family(_config, _encoders.tensors, _encoders.optional)
