"""A Hugging Face tokenizer in llama.cpp's words: tokens, their types, merges or scores, and what is added around a text.

Two kinds are carried. *Byte-level BPE* (GPT-2, Llama 3, Qwen) becomes model ``gpt2`` with the merges as they are.
*SentencePiece-like BPE* (Llama 2, Mistral v0.1) becomes model ``llama``, which has scores in place of merges (``spm``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tapeout.errors import ModelError
from tapeout.exporters.gguf.pretokenizers import notes_of, pre_of
from tapeout.exporters.gguf.spm import BYTES, SPACE, scores_of, spaces, steps_of
from tapeout.models import Model


class Type(IntEnum):
    """``llama_token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """What the ``tokenizer.*`` keys of a file hold.

    Attributes:
        model: ``gpt2`` or ``llama``.
        pre: how text is cut into words, for ``gpt2``.
        special: token ids by llama.cpp's name: bos, eos, eot, eom, unknown, padding.
        notes: where llama.cpp is known to give other ids.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[Type]
    scores: list[float] | None
    merges: list[str] | None
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None
    notes: tuple[str, ...]

    def add_to(self, writer: Any) -> None:
        """Add the keys to a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types([int(kind) for kind in self.types])
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            # llama.cpp wants the key, gguf writes no empty array: a merge that nothing leads to.
            writer.add_token_merges(self.merges or ["[none] [none]"])
        for name, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read(model: Model) -> Vocabulary:
    """Read a model's tokenizer.json and tokenizer_config.json.

    Raises:
        ModelError: the tokenizer is absent, or does what llama.cpp does not.
    """
    raw = _load(model)
    bpe = raw["model"]
    if bpe["type"] != "BPE":
        raise ModelError(f"tokenizer.json is a {bpe['type']} tokenizer; tapeout writes BPE ones to GGUF.")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if bpe[field]:
            raise ModelError(f"tokenizer.json has {field} = {bpe[field]!r}, which llama.cpp does not know.")
    added = {token["id"]: token for token in raw["added_tokens"]}
    special = _special(model, bpe["vocab"], added)
    kind = "llama" if bpe["byte_fallback"] else "gpt2"
    tokens, types = _tokens(model, bpe["vocab"], added, kind)
    for name, token in special.items():
        if types[token] is Type.NORMAL:
            types[token] = Type.CONTROL
        if name == "unknown" and kind == "llama":
            types[token] = Type.UNKNOWN
    merges = [tuple(pair) for pair in bpe["merges"]]
    scores, space, pre = None, False, "default"
    if kind == "llama":
        space, notes = spaces(raw, bpe["vocab"])
        by_token = scores_of(bpe["vocab"], merges, {token["content"] for token in added.values()})
        scores = [by_token.get(token, 0.0) for token in tokens]
        if late := [
            token["content"] for token in added.values() if token["normalized"] and raw["normalizer"]
        ]:
            notes.append(
                f"Hugging Face looks for {', '.join(late)} in the normalized text, llama.cpp in the text itself"
            )
    else:
        pre = pre_of(raw["pre_tokenizer"], bpe["ignore_merges"])
        notes = _normalizer_notes(raw["normalizer"]) + notes_of(pre) + _byte_notes(bpe["vocab"])
    add_bos, add_eos = _added_around(model, raw["post_processor"], special)
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=None if kind == "llama" else [" ".join(pair) for pair in merges],
        special=special,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=space,
        chat_template=model.chat_template,
        notes=tuple(notes),
    )


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
        raw: dict[str, Any] = json.loads(Tokenizer.from_file(str(path)).to_str())
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(
            f"{path} is not a tokenizer that Hugging Face's tokenizers can read: {error}."
        ) from error
    for token in raw["added_tokens"]:
        if flags := [flag for flag in ("single_word", "lstrip", "rstrip") if token[flag]]:
            raise ModelError(
                f"{path} has {flags[0]} for the added token {token['content']!r}, which GGUF cannot say."
            )
    return raw


def _tokens(
    model: Model, vocab: Mapping[str, int], added: Mapping[int, Mapping[str, Any]], kind: str
) -> tuple[list[str], list[Type]]:
    """Text and type of every id of the model; ids that the tokenizer does not have are ``[PAD123]``, unused."""
    size = model.config.vocab_size
    texts: dict[int, str] = {}
    for text, index in [*vocab.items(), *((t["content"], index) for index, t in added.items())]:
        if texts.setdefault(index, text) != text:
            raise ModelError(f"tokenizer.json gives the id {index} to {texts[index]!r} and to {text!r}.")
    if beyond := [f"{texts[i]!r} = {i}" for i in sorted(texts) if i >= size]:
        raise ModelError(
            f"tokenizer.json has ids beyond vocab_size {size} of config.json: {', '.join(beyond[:3])}."
        )
    tokens, types = [], []
    for index in range(size):
        text = texts.get(index, f"[PAD{index}]")
        if index not in texts:
            types.append(Type.UNUSED)
        elif index in added:
            types.append(Type.CONTROL if added[index]["special"] else Type.USER_DEFINED)
            # llama.cpp looks for these in the text as it comes, with its spaces.
            text = text if added[index]["special"] or kind == "gpt2" else text.replace(SPACE, " ")
        else:
            types.append(Type.BYTE if kind == "llama" and text in BYTES else Type.NORMAL)
        tokens.append(text)
    if len(set(tokens)) < size:
        twice = next(t for i, t in enumerate(tokens) if t in tokens[:i])
        raise ModelError(f"tokenizer.json gives two ids to {twice!r}; llama.cpp wants every token once.")
    return tokens, types


# --- byte-level BPE -------------------------------------------------------------------------------------------------


def _byte_notes(vocab: Mapping[str, int]) -> list[str]:
    """A byte without a token vanishes in both, but before merging here and after it in llama.cpp: the gate decides."""
    from tokenizers.pre_tokenizers import ByteLevel

    missing = set(ByteLevel.alphabet()) - vocab.keys()
    return (
        [f"the vocabulary lacks {len(missing)} of the 256 bytes: text that has them loses them"]
        if missing
        else []
    )


def _normalizer_notes(normalizer: Mapping[str, Any] | None) -> list[str]:
    kinds = [step["type"] for step in steps_of(normalizer)]
    if unknown := [kind for kind in kinds if kind != "NFC"]:
        raise ModelError(
            f"tokenizer.json has the normalizer {unknown[0]}, which llama.cpp does not apply to byte-level BPE."
        )
    return ["llama.cpp does not normalize text to NFC: text that is not gets other tokens"] if kinds else []


# --- special tokens -------------------------------------------------------------------------------------------------


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
        "unknown": None,
    }
    found: dict[str, int] = {}
    for name, field in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = model.tokenizer_config.get(f"{field}_token")
        text = token["content"] if isinstance(token, dict) else token
        index = ids.get(text) if text is not None else fallback[name]
        if index is not None and 0 <= index < config.vocab_size:
            found[name] = index
    stops = [i for i in (*eos, *model.generation.stop_token_ids) if i is not None and i != found.get("eos")]
    found |= dict(zip(("eot", "eom"), dict.fromkeys(stops), strict=False))
    return found


def _added_around(
    model: Model, post: Mapping[str, Any] | None, special: Mapping[str, int]
) -> tuple[bool, bool]:
    """Whether bos goes before and eos after a text: from the post-processor, unless tokenizer_config.json says so."""
    before, after = _template(post)
    config = model.tokenizer_config
    if (
        "add_bos_token" in config or "add_eos_token" in config
    ):  # transformers makes a new post-processor of them
        before = [special["bos"]] if config.get("add_bos_token") and "bos" in special else []
        after = [special["eos"]] if config.get("add_eos_token") and "eos" in special else []
    for side, ids, name in (("before", before, "bos"), ("after", after, "eos")):
        if ids not in ([], [special.get(name)]):
            raise ModelError(
                f"tokenizer.json puts the tokens {ids} {side} a text; llama.cpp puts {name} ({special.get(name)}) or none."
            )
    return bool(before), bool(after)


def _template(post: Mapping[str, Any] | None) -> tuple[list[int], list[int]]:
    """Ids that a post-processor puts before and after a text."""
    if post is None or post["type"] == "ByteLevel":
        return [], []
    if post["type"] == "Sequence":
        parts = [_template(part) for part in post["processors"]]
        return [i for before, _ in parts for i in before], [i for _, after in parts for i in after]
    if post["type"] != "TemplateProcessing":
        raise ModelError(
            f"tokenizer.json has the post-processor {post['type']}, which llama.cpp does not know."
        )
    sides: tuple[list[int], list[int]] = ([], [])
    seen_text = False
    for piece in post["single"]:
        if "Sequence" in piece:
            seen_text = True
        else:
            sides[seen_text].extend(post["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return sides
