"""RoBERTa: BERT whose positions count the tokens that are no padding, and whose classifier has a linear of its own."""

from __future__ import annotations

from dataclasses import replace

from tapeout.errors import ModelError
from tapeout.models.decoder import ConfigReader
from tapeout.models.encoder import EncoderConfig
from tapeout.models.families import Family, _encoders


def _config(fields: ConfigReader) -> EncoderConfig:
    config = _encoders.read_config(
        fields, "roberta", _encoders.BERT, type_rows=int(fields.take("type_vocab_size", 2))
    )
    padding = 1 if config.pad_token_id is None else config.pad_token_id
    longest = config.position_rows - padding - 1
    if longest < 1:
        raise ModelError(
            f"max_position_embeddings = {config.position_rows} leaves no position behind pad_token_id = {padding}."
        )
    config = replace(config, position_padding=padding, pad_token_id=padding, max_position_embeddings=longest)
    return _encoders.with_head(
        config, fields, "Roberta", "roberta",
        dense="classifier.dense", act="tanh", classifier="classifier.out_proj",
    )  # fmt: skip


FAMILY = Family(_config, _encoders.tensors, _encoders.optional)
