"""Sentence encoders: what sentence-transformers' files beside a checkpoint say is done to its hidden states.

``modules.json`` lists modules in order: a Transformer, a Pooling (``1_Pooling/config.json``), and maybe a Normalize.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tapeout.errors import ModelError
from tapeout.models.encoder import EncoderConfig

_POOLINGS: dict[str, Literal["cls", "mean"]] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
}


def applied(config: EncoderConfig, directory: Path) -> EncoderConfig:
    """The same with the output ``sentence_embedding``, where ``modules.json`` makes one; otherwise as it is.

    Raises:
        ModelError: a module, a way of pooling or a setting that is not handled.
    """
    path = directory / "modules.json"
    if not path.exists():
        return config
    if config.output == "logits":
        raise ModelError(f"{path} makes a sentence encoder of a classifier, which is not handled.")
    kinds = [(str(entry["type"]).rpartition(".")[2], str(entry.get("path", ""))) for entry in _read(path)]
    expected = ["Transformer", "Pooling", "Normalize"]
    found = [kind for kind, _ in kinds]
    if found not in (expected[:2], expected):
        raise ModelError(
            f"{path} lists the modules {', '.join(found)}; what is handled: Transformer, Pooling and maybe Normalize."
        )
    settings = directory / "sentence_bert_config.json"
    own = dict(_read(settings)) if settings.exists() else {}
    if own.pop("do_lower_case", False):
        raise ModelError(
            f"{settings} has do_lower_case, which is not handled: the tokenizer itself must do it."
        )
    longest = own.pop("max_seq_length", None) or config.max_position_embeddings
    return replace(
        config,
        output="sentence_embedding",
        pooling=_pooling(directory / kinds[1][1] / "config.json", config.hidden_size),
        normalize="Normalize" in found,
        max_position_embeddings=min(int(longest), config.max_position_embeddings),
    )


def _pooling(path: Path, hidden: int) -> Literal["cls", "mean"]:
    """``cls`` or ``mean``."""
    raw = dict(_read(path))
    if (width := raw.get("word_embedding_dimension", raw.get("embedding_dimension", hidden))) != hidden:
        raise ModelError(f"{path} pools vectors of {width}, where the model's have {hidden} elements.")
    modes = sorted(name for name, value in raw.items() if name.startswith("pooling_mode") and value is True)
    if isinstance(raw.get("pooling_mode"), str):  # newer files name it
        modes = [
            f"pooling_mode_{raw['pooling_mode']}_{'token' if raw['pooling_mode'] == 'cls' else 'tokens'}"
        ]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ModelError(
            f"{path} pools by {', '.join(modes) or 'nothing'}; handled: {' or '.join(_POOLINGS)} alone."
        )
    if raw.get("include_prompt") is False:
        raise ModelError(f"{path} leaves the prompt's tokens out of the pooling, which is not handled.")
    return _POOLINGS[modes[0]]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from error
