"""What the families of encoders share: field names, heads, and tensors, which follow from the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tapeout.errors import ModelError, nearest
from tapeout.models.decoder import ConfigReader, Role, TensorSpec
from tapeout.models.encoder import ENCODER_ACTIVATIONS, EncoderConfig, Names
from tapeout.models.families import _shared

# Of training, or of how one file or class of transformers hands results on; never of the function computed.
_NOT_COMPUTED = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "gradient_checkpointing",
    "tie_word_embeddings",  # of a masked language model's head, which none of these has
    "pruned_heads",
    "finetuning_task",
    "torchscript",
    "num_labels",
    "directionality",
    # Google's first checkpoints carry the size of a pooler that no code of transformers looks at.
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
)


BERT = Names(
    words="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    types="embeddings.token_type_embeddings",
    embedding_norm="embeddings.LayerNorm",
    layer="encoder.layer.{}",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    mlp_norm="output.LayerNorm",
)
"""Of BERT and of those that kept its names; behind a prefix in a class with a head."""


def read_config(
    fields: ConfigReader,
    family: str,
    names: Names,
    *,
    fields_named: Mapping[str, str] | None = None,
    eps: float | None = None,
    **own: Any,
) -> EncoderConfig:
    """Read the fields that every encoder's ``config.json`` has.

    Args:
        fields: of the config.
        family: ``model_type``.
        names: of its modules, the prefix of a class with a head left out.
        fields_named: what the family calls a field, where it is not BERT's name for it.
        eps: of all norms; None: the file says it.
        own: fields of EncoderConfig that are this family's; they win.

    Raises:
        ModelError: what does not fit together, or a value that is not known.
    """
    fields.ignore(*_shared.NOT_COMPUTED, *_NOT_COMPUTED)
    called = fields_named or {}

    def count(name: str) -> int:
        name = called.get(name, name)
        return _shared.positive(name, fields.take(name))

    kind = str(fields.take("position_embedding_type", "absolute"))
    if kind != "absolute":
        raise ModelError(
            f"position_embedding_type = '{kind}' of a {family} model is not handled; known: absolute."
        )
    act = str(fields.take(called.get("hidden_act", "hidden_act"), "gelu"))
    act = "gelu_pytorch_tanh" if act == "gelu_new" else act  # the same formula by two names
    if act not in ENCODER_ACTIVATIONS:
        raise ModelError(f"the activation '{act}' is not handled{nearest(act, ENCODER_ACTIVATIONS)}.")
    hidden, heads = count("hidden_size"), count("num_attention_heads")
    if hidden % heads:
        raise ModelError(f"hidden_size = {hidden} is no multiple of num_attention_heads = {heads}.")
    rows = count("max_position_embeddings")
    eos = fields.take("eos_token_id", None)
    common: dict[str, Any] = {
        "vocab_size": count("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": count("intermediate_size"),
        "num_layers": count("num_hidden_layers"),
        "num_heads": heads,
        "max_position_embeddings": rows,
        "position_rows": rows,
        "layer_norm_eps": float(fields.take("layer_norm_eps", 1e-12)) if eps is None else eps,
        "names": names,
        "output": "last_hidden_state",
        "hidden_act": act,
        "bos_token_id": fields.take("bos_token_id", None),
        "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
        "pad_token_id": fields.take("pad_token_id", None),
    }
    return EncoderConfig(family=family, **(common | own))


def with_head(
    config: EncoderConfig,
    fields: ConfigReader,
    base: str,
    prefix: str,
    *,
    dense: str,
    act: str,
    classifier: str,
) -> EncoderConfig:
    """The same, with the names and the head of the class that ``architectures`` names.

    Args:
        config: of the model without a head.
        fields: of the config; ``architectures``, ``id2label`` and ``num_labels`` are looked at.
        base: ``Bert``: of ``BertModel`` and ``BertForSequenceClassification``.
        prefix: of the modules in a class with a head (``bert``).
        dense, act, classifier: the head's modules, and the activation between them.
    """
    known = [f"{base}Model", f"{base}ForSequenceClassification"]
    given = fields.raw.get("architectures") or known[:1]
    if given[0] not in known:
        raise ModelError(f"the architecture {given[0]} is not handled{nearest(str(given[0]), known)}.")
    if given[0] == known[0]:
        return config
    names = {
        name: f"{prefix}.{module}"
        for name in ("words", "positions", "types", "embedding_norm", "layer")
        if (module := getattr(config.names, name))
    }
    return replace(
        config,
        names=replace(config.names, **names, dense=dense, classifier=classifier),
        output="logits",
        dense_act=act,
        labels=read_labels(fields),
    )


def read_labels(fields: ConfigReader) -> tuple[str, ...]:
    """Names of the classes, by ``id2label`` or as transformers makes them up."""
    named = fields.raw.get("id2label")
    count = int(fields.raw.get("num_labels") or 2)
    if not named:
        return tuple(f"LABEL_{index}" for index in range(count))
    labels = {int(index): str(label) for index, label in named.items()}
    if sorted(labels) != list(range(len(labels))):
        raise ModelError(
            f"id2label names the classes {sorted(labels)}, where 0 … {len(labels) - 1} are expected."
        )
    return tuple(labels[index] for index in range(len(labels)))


def tensors(config: EncoderConfig) -> Mapping[str, TensorSpec]:
    """Every tensor of a checkpoint, by its name on the Hub."""
    c, n, hidden = config, config.names, config.hidden_size
    found = {f"{n.words}.weight": TensorSpec(Role.EMBEDDING, (c.vocab_size, hidden))}

    def norm(module: str) -> None:
        for part, role in (("weight", Role.NORM), ("bias", Role.BIAS)):
            found[f"{module}.{part}"] = TensorSpec(role, (hidden,))

    def linear(module: str, out: int, into: int, role: Role = Role.LINEAR) -> None:
        found[f"{module}.weight"] = TensorSpec(role, (out, into))
        found[f"{module}.bias"] = TensorSpec(Role.BIAS, (out,))

    if c.position_rows:
        found[f"{n.positions}.weight"] = TensorSpec(Role.POSITION, (c.position_rows, hidden))
    if c.type_rows:
        found[f"{n.types}.weight"] = TensorSpec(Role.POSITION, (c.type_rows, hidden))
    if n.embedding_norm:
        norm(n.embedding_norm)
    for index in range(c.num_layers):
        at = f"{n.layer.format(index)}."
        for module in (n.query, n.key, n.value, n.out):
            linear(at + module, hidden, hidden)
        norm(at + n.attention_norm)
        linear(at + n.up, c.intermediate_size, hidden)
        linear(at + n.down, hidden, c.intermediate_size)
        norm(at + n.mlp_norm)
    if n.final_norm:
        norm(n.final_norm)
    if c.output == "logits":
        if n.dense:
            linear(n.dense, hidden, hidden)
        linear(n.classifier, len(c.labels), hidden, Role.HEAD)
    return found


def optional(config: EncoderConfig, name: str) -> bool:
    """Old checkpoints carry the row numbers; a model without a head has a pooler that its output is not made from."""
    return name.endswith("embeddings.position_ids") or (
        config.output != "logits" and name.startswith("pooler.dense.")
    )
