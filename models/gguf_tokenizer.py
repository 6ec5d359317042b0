"""The tokenizer of a GGUF file as Hugging Face's files: byte-level BPE (model ``gpt2``) and SentencePiece-like BPE (``llama``).

The header has a vocabulary with types, merges or scores, and the name of a pre-tokenizer. What it lacks (normalizers, how
added tokens strip spaces) is what llama.cpp does, so the rebuilt tokenizer is the one that the file's owner has run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tapeout.errors import ModelError
from tapeout.models.pretokenizers import NAMES

# llama_token_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5

_SPACE = "▁"  # what sentencepiece writes for a space
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
_ADDS_BOS = ("llama-bpe", "tekken")  # pre-tokenizers that llama.cpp puts bos before unless the file says no


def files(file: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into a model's directory by file name: JSON values, text, or a path to copy from.

    Where the tokenizer is of another kind, a ``tokenizer.json`` that stands beside the file is taken.

    Raises:
        ModelError: the tokenizer cannot be rebuilt and none stands beside the file.
    """

    def value(name: str, default: Any = None) -> Any:
        return fields[f"tokenizer.{name}"].contents() if f"tokenizer.{name}" in fields else default

    kind, pre = value("ggml.model"), value("ggml.pre", "default")
    tokens, types = value("ggml.tokens") or [], value("ggml.token_type") or []
    special = {
        name: tokens[index]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (index := value(f"ggml.{key}_token_id")) is not None and index < len(tokens)
    }
    stops = [value(f"ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    found: dict[str, Any] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": text for name, text in special.items()},
        },
        "generation_config.json": {"eos_token_id": list(dict.fromkeys(i for i in stops if i is not None))},
    }
    if template := value("chat_template"):
        found["chat_template.jinja"] = template
    regexes = {name: key for key, name in NAMES.items()}.get(_ALIASES.get(pre, pre))
    beside = file.with_name("tokenizer.json")
    if kind == "llama" and len(types) == len(tokens):
        scores = value("ggml.scores")
        raw = _sentencepiece(tokens, types, scores, special, value("ggml.add_space_prefix", True))
        before = value("ggml.add_bos_token", True)
    elif kind == "gpt2" and regexes and len(types) == len(tokens):
        raw = _byte_level(tokens, types, value("ggml.merges"), *regexes)
        before = value("ggml.add_bos_token", _ALIASES.get(pre, pre) in _ADDS_BOS)
    elif beside.exists():
        return found | {"tokenizer.json": beside}
    else:
        raise ModelError(
            f"{file} has a tokenizer '{kind}' with the pre-tokenizer '{pre}', from which no tokenizer.json can be rebuilt "
            f"(known: llama; gpt2 with {', '.join(sorted(NAMES.values()))}). Put the model's own tokenizer.json beside it: "
            f"{beside}"
        )
    ids = {text: index for index, text in enumerate(tokens)}
    before = [special["bos"]] if before and "bos" in special else []
    after = [special["eos"]] if value("ggml.add_eos_token", False) and "eos" in special else []
    if before or after:
        raw["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                *({"SpecialToken": {"id": text, "type_id": 0}} for text in before),
                {"Sequence": {"id": "A", "type_id": 0}},
                *({"SpecialToken": {"id": text, "type_id": 0}} for text in after),
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in [*before, *after]
            },
        }
    return found | {"tokenizer.json": raw}


def _byte_level(
    tokens: list[str], types: list[int], merges: list[str], regexes: tuple[str, ...], ignore_merges: bool
) -> dict[str, Any]:
    known = {text for text, kind in zip(tokens, types, strict=True) if kind != _UNUSED}
    # A merge that nothing leads to is what a writer puts where there are none.
    pairs = [pair for merge in merges or [] if set(pair := merge.split(" ")) <= known]
    cuts = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in regexes
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        **_around(tokens, types),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, level]},
        "decoder": level | {"use_regex": True},
        "model": _bpe(tokens, types, pairs) | {"ignore_merges": ignore_merges},
    }


def _sentencepiece(
    tokens: list[str], types: list[int], scores: list[float], special: Mapping[str, str], prefix: bool
) -> dict[str, Any]:
    ids = {text: index for index, text in enumerate(tokens)}
    aside = {text for text, kind in zip(tokens, types, strict=True) if kind in (_UNKNOWN, _CONTROL, _UNUSED)}
    merges: list[tuple[float, list[str]]] = []
    for text, score in zip(tokens, scores, strict=True):
        if text in aside:
            continue
        # llama.cpp joins whatever two tokens give a token, those of the highest score first.
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        pairs = [pair for pair in pairs if all(part in ids and part not in aside for part in pair)]
        merges += [
            (score, list(pair)) for pair in sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        ]
    merges.sort(key=lambda merge: -merge[0])
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        **_around(tokens, types),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": _SPACE}] if prefix else []), spaces],
        },
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(tokens, types, [pair for _, pair in merges])
        | {"unk_token": special.get("unk"), "byte_fallback": True, "fuse_unk": True},
    }


def _around(tokens: list[str], types: list[int]) -> dict[str, Any]:
    """What every tokenizer.json has, and the tokens that are looked for in the text as it comes."""
    added = [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": None,
    }


def _bpe(tokens: list[str], types: list[int], merges: list[list[str]]) -> dict[str, Any]:
    # A converter fills ids that the tokenizer does not have with [PAD123].
    vocab = {
        text: index
        for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != _UNUSED or text != f"[PAD{index}]"
    }
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }
