"""DistilBERT: BERT without token types, under names of its own."""

from __future__ import annotations

from tapeout.models.decoder import ConfigReader
from tapeout.models.encoder import EncoderConfig, Names
from tapeout.models.families import Family, _encoders

NAMES = Names(
    words="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    types="",
    embedding_norm="embeddings.LayerNorm",
    layer="transformer.layer.{}",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    mlp_norm="output_layer_norm",
)
_CALLED = {
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}


def _config(fields: ConfigReader) -> EncoderConfig:
    # sinusoidal_pos_embds only says how the table was first filled: the checkpoint has it.
    fields.ignore("dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds")
    # transformers' norms of this family have this eps, whatever the file says.
    config = _encoders.read_config(fields, "distilbert", NAMES, fields_named=_CALLED, eps=1e-12)
    return _encoders.with_head(
        config,
        fields,
        "DistilBert",
        "distilbert",
        dense="pre_classifier",
        act="relu",
        classifier="classifier",
    )


FAMILY = Family(_config, _encoders.tensors, _encoders.optional)
