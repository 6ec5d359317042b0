"""A Hugging Face tokenizer in llama.cpp's words: tokens, their types, merges or scores, and what is added around a text.

Four kinds are carried. *Byte-level BPE* (GPT-2, Llama 3, Qwen, DeepSeek, RoBERTa) becomes model ``gpt2`` with the merges as
they are. *SentencePiece-like BPE* (Llama 2, Mistral v0.1, Phi-3, Gemma) becomes model ``llama``, which has scores in place of
merges (``spm``). *WordPiece* (BERT) becomes model ``bert`` (``wordpiece``), *unigram* (T5) model ``t5`` (``unigram``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tapeout.errors import ModelError
from tapeout.exporters.gguf import unigram, wordpiece
from tapeout.exporters.gguf.added import notes_of as finding_notes
from tapeout.exporters.gguf.added import strips_of
from tapeout.exporters.gguf.around import around
from tapeout.exporters.gguf.pretokenizers import notes_of, pre_of
from tapeout.exporters.gguf.spm import BYTES, MERGES, SPACE, has_lines_apart, scores_of, spaces, steps_of
from tapeout.exporters.gguf.vocabulary import Type, Vocabulary
from tapeout.models import Model
from tapeout.models.text_limits import LIMITS

__all__ = ["Type", "Vocabulary", "read"]

# llama.cpp's names of special tokens (one is misspelt there) and tokenizer_config.json's.
_SPECIAL = {
    "bos": "bos",
    "eos": "eos",
    "unknown": "unk",
    "padding": "pad",
    "seperator": "sep",
    "mask": "mask",
}
_UNUSED_SCORE = -10000.0  # so that no text is made of them


def read(model: Model) -> Vocabulary:
    """Read a model's tokenizer.json and tokenizer_config.json.

    Raises:
        ModelError: the tokenizer is absent, or does what llama.cpp does not.
    """
    raw = _load(model)
    kind, vocab = _kind(raw["model"])
    added = {token["id"]: token for token in raw["added_tokens"]}
    special = _special(model, vocab, added)
    before, after = around(raw["post_processor"], model.tokenizer_config, special)
    texts = _texts(model, vocab, added)
    carry = {"gpt2": _byte_level, "llama": _sentencepiece, "bert": _wordpiece, "t5": _unigram}[kind]
    carried = carry(raw, _Read(vocab, added, texts, special, before, after))
    for name, token in special.items():
        if carried.types[token] is Type.NORMAL:
            carried.types[token] = Type.CONTROL
        if name == "unknown" and kind in ("llama", "t5"):
            carried.types[token] = Type.UNKNOWN
    if kind != "bert":
        for side, ids, name in (("before", before, "bos"), ("after", after, "eos")):
            if ids not in ([], [special.get(name)]):
                raise ModelError(
                    f"tokenizer.json puts the tokens {ids} {side} a text; llama.cpp puts {name} ({special.get(name)}) or none."
                )
    once: set[str] = set()
    for text in carried.tokens:
        if text in once:
            raise ModelError(f"tokenizer.json gives two ids to {text!r}; llama.cpp wants every token once.")
        once.add(text)
    ordinary = {t for t, kind in zip(carried.tokens, carried.types, strict=True) if kind is Type.NORMAL}
    found = finding_notes([token["content"] for token in added.values()], ordinary)
    reasons = [f"{LIMITS[name].reason} (the tokenizer gate counts them apart)" for name in carried.limits]
    return replace(
        carried,
        special=special,
        add_bos=bool(before),
        add_eos=bool(after),
        chat_template=model.chat_template,
        notes=(*carried.notes, *found, *reasons),
    )


@dataclass(frozen=True)
class _Read:
    """What is common to the kinds: text and id, the added tokens by id, every id's text (None: no token), special ids."""

    vocab: Mapping[str, int]
    added: Mapping[int, Mapping[str, Any]]
    texts: list[str | None]
    special: dict[str, int]
    before: list[int]
    after: list[int]

    def tokens(self) -> tuple[list[str], list[Type]]:
        """Text and type of every id; ids that the tokenizer does not have are ``[PAD123]``, unused."""
        known = {text for text in self.texts if text and text.startswith("[PAD")}
        tokens = []
        for index, text in enumerate(self.texts):
            filler = f"[PAD{index}]"
            tokens.append((filler + "_" if filler in known else filler) if text is None else text)
        types = [Type.UNUSED if text is None else Type.NORMAL for text in self.texts]
        for index, token in self.added.items():
            types[index] = Type.CONTROL if token["special"] else Type.USER_DEFINED
        return tokens, types


def _load(model: Model) -> dict[str, Any]:
    """tokenizer.json as the tokenizers library writes it after reading: one form, whatever version wrote the file."""
    from tokenizers import Tokenizer

    path = model.directory / "tokenizer.json"
    if not path.exists():
        raise ModelError(
            f'{path} is absent; GGUF holds the tokenizer. Make it once: python -c "from transformers import AutoTokenizer '
            f"as T; T.from_pretrained('{model.directory}').save_pretrained('{model.directory}')\""
        )
    try:
        whole = Tokenizer.from_file(str(path))
        own = json.loads(path.read_text(encoding="utf-8"))
        model_type = own["model"].get("type")
        if model_type == "BPE":
            # Its vocabulary stays as the file has it: Gemma's has two texts for the id of the tab, the library writes one.
            flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
            added = [
                {"id": index, **{flag: getattr(token, flag) for flag in flags}}
                for index, token in whole.get_added_tokens_decoder().items()
            ]
            empty = own["model"] | {"vocab": {}, "merges": []}
            whole = Tokenizer.from_str(json.dumps(own | {"model": empty, "added_tokens": []}))
        raw: dict[str, Any] = json.loads(whole.to_str())
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(
            f"{path} is not a tokenizer that Hugging Face's tokenizers can read: {error}."
        ) from error
    if model_type == "BPE":
        raw["added_tokens"] = added
        raw["model"]["vocab"] = own["model"]["vocab"]
        raw["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in own["model"]["merges"]]
    for token in raw["added_tokens"]:
        if token["single_word"]:
            raise ModelError(
                f"{path} has single_word for the added token {token['content']!r}, which GGUF cannot say."
            )
    return raw


def _kind(model: Mapping[str, Any]) -> tuple[str, Mapping[str, int]]:
    """llama.cpp's name of the kind, and the vocabulary."""
    if model["type"] == "Unigram":
        return "t5", {piece: index for index, (piece, _) in enumerate(model["vocab"])}
    if model["type"] == "WordPiece":
        return "bert", model["vocab"]
    if model["type"] != "BPE":
        raise ModelError(
            f"tokenizer.json is a {model['type']} tokenizer; tapeout writes BPE, WordPiece and Unigram ones to GGUF."
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[key]:
            raise ModelError(f"tokenizer.json has {key} = {model[key]!r}, which llama.cpp does not know.")
    return "llama" if model["byte_fallback"] else "gpt2", model["vocab"]


def _texts(
    model: Model, vocab: Mapping[str, int], added: Mapping[int, Mapping[str, Any]]
) -> list[str | None]:
    """The text of every id of the model, None where the tokenizer has none."""
    size = model.config.vocab_size
    texts: dict[int, str] = {}
    for text, index in [*vocab.items(), *((t["content"], index) for index, t in added.items())]:
        other = texts.setdefault(index, text)
        if other != text:
            # Gemma gives the tab and its byte one id: llama.cpp comes to it by the byte.
            byte = next((t for t in (other, text) if t in BYTES), None)
            if byte is None or bytes([int(byte[3:5], 16)]) not in (other.encode(), text.encode()):
                raise ModelError(f"tokenizer.json gives the id {index} to {other!r} and to {text!r}.")
            texts[index] = byte
    if beyond := [f"{texts[i]!r} = {i}" for i in sorted(texts) if i >= size]:
        raise ModelError(
            f"tokenizer.json has ids beyond vocab_size {size} of config.json: {', '.join(beyond[:3])}."
        )
    return [texts.get(index) for index in range(size)]


# --- the kinds ------------------------------------------------------------------------------------------------------


def _byte_level(raw: Mapping[str, Any], read: _Read) -> Vocabulary:
    bpe, strips = raw["model"], strips_of(list(read.added.values()))
    pre = pre_of(raw["pre_tokenizer"], bpe["ignore_merges"])
    if pre == "deepseek-llm" and (
        double := next(
            (t for t in read.vocab if re.search("[0-9]{2}", t) and read.vocab[t] not in read.added), None
        )
    ):
        raise ModelError(
            f"tokenizer.json cuts digits apart but has the token {double!r}: llama.cpp's '{pre}' cuts only around numbers."
        )
    lost = _byte_notes(read.vocab)
    notes = notes_of(pre) + lost
    limits = _normalizer_limits(raw["normalizer"]) + (["wide-space"] if strips else [])
    limits += ["lost-byte"] if lost and bpe["merges"] else []
    limits += ["space-beyond-ascii"] if pre == "deepseek-llm" else []
    if pre == "gpt-2" and raw["post_processor"] and raw["post_processor"]["type"] == "RobertaProcessing":
        pre = "roberta-bpe"
    if strips == "<mask>":
        if pre not in ("gpt-2", "roberta-bpe"):
            raise ModelError(
                f"tokenizer.json has lstrip for '<mask>', which llama.cpp knows with GPT-2's words only, not with '{pre}'."
            )
        pre = "jina-v2-code"  # the same words as gpt-2's, and the <mask>
    tokens, types = read.tokens()
    merges = [" ".join(pair) for pair in bpe["merges"]]
    return Vocabulary("gpt2", pre, tokens, types, None, merges, notes=notes, limits=limits, strips=strips)


def _sentencepiece(raw: Mapping[str, Any], read: _Read) -> Vocabulary:
    prefix, notes = spaces(raw, read.vocab)
    strips = strips_of(list(read.added.values()))
    tokens, types = read.tokens()
    limits: list[str] = []
    apart = set()  # taken out of the text before anything is joined
    late = []
    for index, token in read.added.items():
        text, normalized = token["content"], token["normalized"] and raw["normalizer"]
        if types[index] is Type.USER_DEFINED and SPACE in text:
            if normalized:  # found in the text with its spaces
                tokens[index] = text.replace(SPACE, " ")
            elif text in read.vocab:  # never found in a text, but joined: Gemma's runs of spaces
                types[index] = Type.NORMAL
                limits = ["escaped-space"]
                continue
        apart.add(text)
        if normalized:
            late.append(text)
    for byte in BYTES & read.vocab.keys():
        if types[read.vocab[byte]] is Type.NORMAL:
            types[read.vocab[byte]] = Type.BYTE
    if late:
        notes = [
            *notes,
            f"Hugging Face looks for {', '.join(late)} in the normalized text, llama.cpp in the text itself",
        ]
    merges = [tuple(pair) for pair in raw["model"]["merges"]]
    limits += ["wide-space"] if strips else []
    try:
        scores = scores_of(read.vocab, merges, apart)
    except ModelError as error:
        if prefix or not has_lines_apart(read.vocab):
            raise
        note = f"{str(error).removesuffix('.')}: the merges are carried by the pre-tokenizer '{MERGES}', needs a llama.cpp that knows it"
        return Vocabulary(
            "gpt2", MERGES, tokens, types, None, [" ".join(pair) for pair in merges],
            notes=[*notes, note], limits=limits, strips=strips,
        )  # fmt: skip
    return Vocabulary(
        "llama", "default", tokens, types, [scores.get(token, 0.0) for token in tokens], None,
        add_space_prefix=prefix, notes=notes, limits=limits, strips=strips,
    )  # fmt: skip


def _wordpiece(raw: Mapping[str, Any], read: _Read) -> Vocabulary:
    flags, limits = wordpiece.normalizer(raw)
    if len(read.before) != 1 or len(read.after) != 1:
        raise ModelError(
            f"tokenizer.json puts the tokens {read.before} before and {read.after} after a text; with WordPiece llama.cpp puts one each."
        )
    read.special.update(
        {
            "bos": read.before[0],
            "seperator": read.after[0],
            "unknown": read.vocab[raw["model"]["unk_token"]],
        }
    )
    tokens, types = read.tokens()
    aside = {*read.added, *read.special.values()}
    tokens = [
        token if types[index] is Type.UNUSED or index in aside else wordpiece.phantom(token)
        for index, token in enumerate(tokens)
    ]
    keys = {f"normalizer.{key}": value for key, value in flags.items()}
    return Vocabulary(
        "bert", "default", tokens, types, None, None, limits=limits, flags={**keys, "add_sep_token": True}
    )


def _unigram(raw: Mapping[str, Any], read: _Read) -> Vocabulary:
    table = unigram.charsmap(raw)
    read.special["unknown"] = raw["model"]["unk_id"]
    tokens, types = read.tokens()
    scores = dict(raw["model"]["vocab"])
    ordinary = [
        scores[token]
        for token, kind in zip(tokens, types, strict=True)
        if token in scores and kind is Type.NORMAL
    ]
    if min(ordinary) > min(scores.values()):
        raise ModelError(
            "tokenizer.json has its least likely piece among the added tokens, which llama.cpp does not count."
        )
    return Vocabulary(
        "t5", "default", tokens, types,
        [_UNUSED_SCORE if kind is Type.UNUSED else scores.get(token, 0.0) for token, kind in zip(tokens, types, strict=True)],
        None, add_space_prefix=True, limits=["cluster", "next-line"], flags={"remove_extra_whitespaces": True}, charsmap=table,
    )  # fmt: skip


def _byte_notes(vocab: Mapping[str, int]) -> list[str]:
    """A byte without a token vanishes in both, but before merging here and after it in llama.cpp."""
    from tokenizers.pre_tokenizers import ByteLevel

    missing = set(ByteLevel.alphabet()) - vocab.keys()
    return (
        [f"the vocabulary lacks {len(missing)} of the 256 bytes: text that has them loses them"]
        if missing
        else []
    )


def _normalizer_limits(normalizer: Mapping[str, Any] | None) -> list[str]:
    kinds = [step["type"] for step in steps_of(normalizer)]
    if unknown := [kind for kind in kinds if kind != "NFC"]:
        raise ModelError(
            f"tokenizer.json has the normalizer {unknown[0]}, which llama.cpp does not apply to byte-level BPE."
        )
    return ["not-nfc"] if kinds else []


def _special(
    model: Model, vocab: Mapping[str, int], added: Mapping[int, Mapping[str, Any]]
) -> dict[str, int]:
    """Ids by llama.cpp's name; a second and third end of generation are eot and eom."""
    ids = dict(vocab) | {token["content"]: index for index, token in added.items()}
    config = model.config
    eos = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    fallback = {
        "bos": config.bos_token_id,
        "eos": eos[0] if eos else None,
        "padding": config.pad_token_id,
    }
    found: dict[str, int] = {}
    for name, field_name in _SPECIAL.items():
        token = model.tokenizer_config.get(f"{field_name}_token")
        text = token["content"] if isinstance(token, dict) else token
        index = ids.get(text) if text is not None else fallback.get(name)
        if index is not None and 0 <= index < config.vocab_size:
            found[name] = index
    stops = [i for i in (*eos, *model.generation.stop_token_ids) if i is not None and i != found.get("eos")]
    found |= dict(zip(("eot", "eom"), dict.fromkeys(stops), strict=False))
    return found
