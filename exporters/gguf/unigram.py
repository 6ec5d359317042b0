"""SentencePiece unigram (T5, XLM-RoBERTa) as llama.cpp's model ``t5``: pieces with log probabilities, and a charsmap.

Hugging Face cuts at spaces first and looks for the likeliest pieces of each word, llama.cpp of the whole text. These are the
same when no piece has a space after its beginning. Both add a space before the text, and make one of many.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from tapeout.errors import ModelError
from tapeout.exporters.gguf.spm import SPACE, steps_of


def charsmap(raw: Mapping[str, Any]) -> bytes | None:
    """Return sentencepiece's table of what becomes what, if there is one.

    Raises:
        ModelError: the tokenizer does what llama.cpp does not.
    """
    model = raw["model"]
    if model["byte_fallback"]:
        raise ModelError("tokenizer.json has byte_fallback, which llama.cpp's unigram does not know.")
    pieces = [piece for piece, _ in model["vocab"]]
    if inside := next((piece for piece in pieces if SPACE in piece[1:]), None):
        raise ModelError(
            f"tokenizer.json has the piece {inside!r}, with a space inside: llama.cpp would join words by it."
        )
    if SPACE not in pieces or model["unk_id"] is None:
        raise ModelError(f"tokenizer.json has no {SPACE if SPACE not in pieces else 'unknown'!r} piece.")
    cuts = raw["pre_tokenizer"]
    parts = cuts["pretokenizers"] if cuts and cuts["type"] == "Sequence" else [cuts]
    kinds = [part and part["type"] for part in parts]
    last = parts[-1]
    if (
        kinds not in (["WhitespaceSplit", "Metaspace"], ["Metaspace"])
        or last["replacement"] != SPACE
        or last["prepend_scheme"] != "always"
        or not last["split"]
    ):
        raise ModelError(
            f"tokenizer.json cuts unigram text by {cuts}, llama.cpp at spaces, with one before the text."
        )
    table, merges_spaces = None, kinds[0] == "WhitespaceSplit"
    for step in steps_of(raw["normalizer"]):
        if step["type"] == "Precompiled" and table is None:
            table = base64.b64decode(step["precompiled_charsmap"])
        elif step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"}:
            merges_spaces = merges_spaces or step["content"] in (" ", SPACE)
        elif step["type"] != "Strip":  # llama.cpp drops spaces at both ends
            raise ModelError(f"tokenizer.json normalizes unigram text by {dict(step)}, llama.cpp does not.")
    if table is None and kinds[0] == "WhitespaceSplit":
        raise ModelError(
            "tokenizer.json has no charsmap and cuts at line ends, llama.cpp without one at spaces alone."
        )
    if not merges_spaces:
        raise ModelError("tokenizer.json keeps runs of spaces, which tapeout does not write for unigram.")
    return table
