"""SentencePiece-like BPE (Llama 2, Mistral v0.1) as llama.cpp's model ``llama``, which has scores in place of merges.

Hugging Face joins the adjacent pair of lowest merge rank, llama.cpp the adjacent pair whose joined token has the highest
score, both the leftmost first. These are the same when (a) all merges that give one token stand together in rank, so that
the token's score can be minus that place, and (b) every pair of pieces that a token falls into is among the merges, since
llama.cpp joins whatever gives a token. Vocabularies made by sentencepiece are so. Others keep their merges, under llama.cpp's
pre-tokenizer ``sarvam-moe``, when no space goes before the text, and are refused when one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tapeout.errors import ModelError

SPACE = "▁"  # what sentencepiece writes for a space
# llama.cpp's pre-tokenizer for merges of such tokens as they are, without a space before the text (model ``gpt2``).
MERGES = "sarvam-moe"
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def steps_of(normalizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The normalizers that are applied, in order."""
    if normalizer is None:
        return []
    return list(normalizer["normalizers"]) if normalizer["type"] == "Sequence" else [normalizer]


def spaces(raw: Mapping[str, Any], vocab: Mapping[str, int]) -> tuple[bool, list[str]]:
    """Whether a space goes before the text, and where llama.cpp does it otherwise.

    Known are: the normalizers Prepend and Replace (with Gemma's Split), and the pre-tokenizer Metaspace.
    """
    normalizer, pre = raw["normalizer"], raw["pre_tokenizer"]
    steps = steps_of(normalizer)
    if pre and pre["type"] == "Split" and pre["pattern"] == {"String": " "} and steps:
        pre = None  # Gemma: no space is left to cut at
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if pre is None and steps in ([prepend, replace], [replace]):
        return prepend in steps, []
    if not steps and pre and pre["type"] == "Metaspace" and pre["replacement"] == SPACE:
        scheme = pre["prepend_scheme"]
        if pre["split"] and any(SPACE in token[1:] for token in vocab):
            raise ModelError(
                "tokenizer.json splits words at spaces (Metaspace) and has tokens with a space inside."
            )
        notes: dict[str, list[str]] = {
            "never": [],
            "always": [
                "where a text, or what follows a special token in it, begins with a space, llama.cpp puts one more before "
                "it and Hugging Face does not"
            ],
            "first": [
                "llama.cpp puts a space before every text and after every special token; Hugging Face before the whole text "
                "only, when it does not begin with one"
            ],
        }
        return scheme != "never", notes[scheme]
    raise ModelError(
        f"tokenizer.json normalizes by {normalizer} and {pre}, which llama.cpp's SentencePiece tokens do not."
    )


def has_lines_apart(vocab: Mapping[str, int]) -> bool:
    """Whether no token has a line end and something else: the pre-tokenizer ``MERGES`` cuts there. And all bytes."""
    return vocab.keys() >= BYTES and not any("\n" in token and token.strip("\n") for token in vocab)


def scores_of(vocab: Mapping[str, int], merges: list[tuple[str, ...]], special: set[str]) -> dict[str, float]:
    """Scores that make llama.cpp join what the merges join, see above."""
    if missing := sorted(BYTES - vocab.keys()):
        raise ModelError(
            f"tokenizer.json has byte_fallback without a token for {len(missing)} bytes, such as {missing[0]}."
        )
    scores: dict[str, float] = {}
    last = None
    for left, right in merges:
        token = left + right
        if token != last and token in scores:
            raise ModelError(
                f"the merges of tokenizer.json that give {token!r} are apart in rank: no score stands for them."
            )
        last = token
        scores.setdefault(token, -float(len(scores)))
    known = set(merges)
    for token in (token for token in vocab if token not in special and token not in BYTES):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            # An added token is taken out of the text before anything is joined.
            if (left, right) not in known and all(
                p not in special and (len(p) == 1 or p in vocab) for p in (left, right)
            ):
                raise ModelError(
                    f"tokenizer.json has the token {token!r} but no merge of {left!r} and {right!r}, which llama.cpp would join."
                )
    return scores
