"""The tokenizer of a GGUF file as Hugging Face's files.

Byte-level BPE (model ``gpt2``), SentencePiece-like BPE (``llama``, or ``gpt2`` with merges over plain text), WordPiece
(``bert``) and unigram (``t5``).

The header has a vocabulary with types, merges or scores, and the name of a pre-tokenizer. What it lacks (normalizers, how
added tokens strip spaces) is what llama.cpp does, so the rebuilt tokenizer is the one that the file's owner has run.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tapeout.errors import ModelError
from tapeout.models.pretokenizers import NAMES

# llama_token_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5

_SPACE = "▁"  # what sentencepiece writes for a space
_ALIASES = {
    other: name
    for name, others in {
        "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        "gpt-2": (
            "phi-2",
            "roberta-bpe",
            "jina-v1-en",
            "jina-v2-code",
            "jina-v2-de",
            "jina-v2-es",
            "modern-bert",
        ),
        "qwen2": ("deepseek-r1-qwen", "megrez"),
        "deepseek-v3": ("hunyuan-dense", "joyai-llm"),
    }.items()
    for other in others
}
_PLAIN_MERGES = "sarvam-moe"  # merges over plain text with ▁ for a space, unknown characters as bytes
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_ADDS_BOS = ("llama-bpe", "tekken")  # pre-tokenizers that llama.cpp puts bos before unless the file says no


_SPECIAL = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask",
}  # fmt: skip
_DEFAULTS = {  # what llama.cpp takes where a file is silent
    "bert": {"bos": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103},
    "t5": {"eos": 1, "unk": 2, "pad": 0},
}


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
    defaults = _DEFAULTS.get(kind, {})
    special = {
        name: tokens[index]
        for name, key in _SPECIAL.items()
        if (index := value(f"ggml.{key}_token_id", defaults.get(name))) is not None and index < len(tokens)
    }
    if kind == "bert" and "bos" in special:
        special["cls"] = special.pop("bos")
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
    name = _ALIASES.get(pre, pre)
    regexes = {name: key for key, name in NAMES.items()}.get(name)
    beside = file.with_name("tokenizer.json")
    prefix = value("ggml.add_space_prefix", kind in ("llama", "t5"))
    add_bos, add_eos = kind in ("llama", "bert") or name in _ADDS_BOS, kind == "t5"
    raw: dict[str, Any] | None = None
    if len(types) != len(tokens) or not tokens:
        pass
    elif kind == "llama":
        raw = _sentencepiece(tokens, types, value("ggml.scores"), special, prefix)
    elif kind == "gpt2" and regexes:
        raw = _byte_level(tokens, types, value("ggml.merges"), *regexes)
    elif kind == "gpt2" and pre == _PLAIN_MERGES:
        merges = [merge.split(" ") for merge in value("ggml.merges")]
        raw = _plain(tokens, types, merges, special, prefix=False)
    elif kind == "bert":
        raw = _wordpiece(tokens, types, special, value)
    elif kind == "t5" and prefix and value("ggml.remove_extra_whitespaces", False):
        raw = _unigram(tokens, types, value("ggml.scores"), special, value("ggml.precompiled_charsmap"))
    if raw is None:
        if beside.exists():
            return found | {"tokenizer.json": beside}
        raise ModelError(
            f"{file} has a tokenizer '{kind}' with the pre-tokenizer '{pre}', from which no tokenizer.json can be rebuilt "
            f"(known: llama; bert; t5; gpt2 with {', '.join(sorted(NAMES.values()))}). Put the model's own tokenizer.json beside "
            f"it: {beside}"
        )
    model_name = fields["general.name"].contents() if "general.name" in fields else ""
    _strip(raw["added_tokens"], pre, model_name.lower())
    ids = {text: index for index, text in enumerate(tokens)}
    bos, eos = ("cls", "sep") if kind == "bert" else ("bos", "eos")
    before = [special[bos]] if bos in special and value("ggml.add_bos_token", add_bos) else []
    after = (
        [special[eos]] if eos in special and (value("ggml.add_eos_token", add_eos) or kind == "bert") else []
    )
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


def _strip(added: list[dict[str, Any]], pre: str, name: str) -> None:
    """Set which tokens take the spaces beside them, as llama.cpp does by the names of pre-tokenizer and model."""
    if pre in ("jina-v2-code", "jina-v2-de", "jina-v2-es"):
        left, right = {"<mask>"}, set()
    elif "phi-3" in name or "phi3" in name:
        left, right = set(), {token["content"] for token in added} - {"<unk>", "<s>", "<|endoftext|>"}
    else:
        left, right = {"[MASK]"} if "modern-bert" in name else set(), set()
    for token in added:
        token["lstrip"], token["rstrip"] = token["content"] in left, token["content"] in right


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
    known = {text: text not in aside for text in tokens} | _characters_of_bytes(tokens)
    merges: list[tuple[float, list[str]]] = []
    for text, score in zip(tokens, scores, strict=True):
        if text in aside:
            continue
        # llama.cpp joins whatever two tokens give a token, those of the highest score first.
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        pairs = [pair for pair in pairs if known.get(pair[0]) and known.get(pair[1])]
        pairs.sort(key=lambda pair: (ids.get(pair[0], -1), ids.get(pair[1], -1)))
        merges += [(score, list(pair)) for pair in pairs]
    merges.sort(key=lambda merge: -merge[0])
    return _plain(tokens, types, [pair for _, pair in merges], special, prefix)


def _characters_of_bytes(tokens: list[str]) -> dict[str, bool]:
    """ASCII characters that have a byte's token alone and are joined all the same: Gemma's tab, by its runs of tabs."""
    known = set(tokens)
    inside = {c for token in tokens if not token.isprintable() for c in token if c.isascii()}
    return {c: True for c in inside - known if f"<0x{ord(c):02X}>" in known}


def _plain(
    tokens: list[str], types: list[int], merges: list[list[str]], special: Mapping[str, str], prefix: bool
) -> dict[str, Any]:
    """Merges over the text itself, with ▁ for a space."""
    model = _bpe(tokens, types, merges) | {
        "unk_token": special.get("unk"),
        "byte_fallback": True,
        "fuse_unk": True,
    }
    for character in _characters_of_bytes(tokens):
        model["vocab"][character] = model["vocab"][f"<0x{ord(character):02X}>"]
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
        "model": model,
    }


def _wordpiece(
    tokens: list[str], types: list[int], special: Mapping[str, str], value: Callable[..., Any]
) -> dict[str, Any]:
    """Tokens that begin with ▁ begin a word, the others go on with one."""
    vocab = {}
    for index, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            vocab[text] = index
        elif kind != _UNUSED or not text.startswith(f"[PAD{index}]"):
            vocab[text[1:] if text.startswith(_SPACE) else f"##{text}"] = index
    lowercase = value("ggml.normalizer.lowercase", True)
    return {
        **_around(tokens, types),
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": value("ggml.normalizer.strip_accents", lowercase),
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        "model": {
            "type": "WordPiece",
            "unk_token": special["unk"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }


def _unigram(
    tokens: list[str], types: list[int], scores: list[float], special: Mapping[str, str], charsmap: Any
) -> dict[str, Any]:
    ordinary = [score for score, kind in zip(scores, types, strict=True) if kind not in (_UNUSED, _CONTROL)]
    # A filler's score would be the least, from which the score of the unknown follows.
    least = min(ordinary)
    metaspace = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "always", "split": True}
    table = charsmap and {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(bytes(charsmap)).decode(),
    }
    return {
        **_around(tokens, types),
        "normalizer": table or None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": tokens.index(special["unk"]),
            "vocab": [[text, max(score, least)] for text, score in zip(tokens, scores, strict=True)],
            "byte_fallback": False,
        },
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
        if kind != _UNUSED or not text.startswith(f"[PAD{index}]")
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
