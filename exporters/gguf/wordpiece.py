"""WordPiece (BERT) as llama.cpp's model ``bert``: tokens begin with the space that Hugging Face leaves out.

``hello`` becomes ``▁hello`` and ``##ing`` becomes ``ing`` (the converter's "phantom space"). llama.cpp always cleans the
text and cuts at punctuation and around Chinese characters; lower casing and accents are keys of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tapeout.errors import ModelError
from tapeout.exporters.gguf.spm import SPACE

CONTINUES = "##"


def phantom(token: str) -> str:
    """A token of the vocabulary in llama.cpp's form."""
    continues = token.startswith(CONTINUES) and token != CONTINUES
    return token.removeprefix(CONTINUES) if continues else SPACE + token


def normalizer(raw: Mapping[str, Any]) -> tuple[dict[str, bool], list[str]]:
    """The keys of the normalizer, and the classes of strings that llama.cpp cuts otherwise (``text_limits``).

    Raises:
        ModelError: the tokenizer does what llama.cpp does not.
    """
    steps, cuts, model = raw["normalizer"], raw["pre_tokenizer"], raw["model"]
    if not steps or steps["type"] != "BertNormalizer":
        raise ModelError(
            f"tokenizer.json normalizes WordPiece by {steps and steps['type']}, which llama.cpp does not."
        )
    for field in ("clean_text", "handle_chinese_chars"):
        if not steps[field]:
            raise ModelError(f"tokenizer.json has {field} = {steps[field]}, which llama.cpp always does.")
    if not cuts or cuts["type"] != "BertPreTokenizer":
        raise ModelError(
            f"tokenizer.json cuts words by {cuts and cuts['type']}; llama.cpp's WordPiece by BertPreTokenizer."
        )
    if model["continuing_subword_prefix"] != CONTINUES:
        raise ModelError(
            f"tokenizer.json begins what continues a word by {model['continuing_subword_prefix']!r}, not by {CONTINUES!r}."
        )
    if model["max_input_chars_per_word"] != 100:
        raise ModelError(
            f"tokenizer.json has max_input_chars_per_word = {model['max_input_chars_per_word']}; llama.cpp knows no such limit, "
            "and 100 is what is told apart by the tokenizer gate."
        )
    if CONTINUES + SPACE in model["vocab"]:
        raise ModelError(
            f"tokenizer.json has the token {CONTINUES + SPACE!r}, which llama.cpp would find before every word."
        )
    lowercase = bool(steps["lowercase"])
    strips = lowercase if steps["strip_accents"] is None else bool(steps["strip_accents"])
    limits = ["long-word", "control-space", "new-character"]
    return {"lowercase": lowercase, "strip_accents": strips}, limits + (
        ["hangul", "spacing-mark"] if strips else []
    )
