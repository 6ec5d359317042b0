"""Which ``pre`` names the way that a byte-level tokenizer cuts text into words before it merges.

llama.cpp has the regexes compiled in, under names (``llm_tokenizer_bpe`` in ``src/llama-vocab.cpp``); a wrong name
mis-tokenizes without a word, so the name follows from the regexes of tokenizer.json and an unknown one is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tapeout.errors import ModelError
from tapeout.models.pretokenizers import GPT2, LLAMA3, NAMES, QWEN2

__all__ = ["GPT2", "LLAMA3", "NAMES", "QWEN2", "notes_of", "pre_of"]


def pre_of(pre_tokenizer: Mapping[str, Any] | None, ignore_merges: bool) -> str:
    """Return llama.cpp's name of a byte-level pre-tokenizer.

    Raises:
        ModelError: it does something else than cutting by regexes, or llama.cpp has no such regexes.
    """
    regexes = tuple(_regexes(pre_tokenizer))
    try:
        return NAMES[regexes, ignore_merges]
    except KeyError:
        shown = " then ".join(repr(regex) for regex in regexes) or "no regex"
        raise ModelError(
            f"tokenizer.json cuts text by {shown} with ignore_merges = {ignore_merges}, which is none of the "
            f"pre-tokenizers known to llama.cpp: {', '.join(sorted(NAMES.values()))}."
        ) from None


def notes_of(pre: str) -> list[str]:
    """Where llama.cpp's regexes are not the original ones."""
    if pre not in ("tekken", "gpt-4o"):
        return []
    return [
        f"llama.cpp's '{pre}' cuts words at combining marks (Hindi, Thai), which the model's own tokenizer does not"
    ]


def _regexes(step: Mapping[str, Any] | None) -> Iterator[str]:
    """The regexes that a pre-tokenizer applies, one after the other."""
    kind = step and step["type"]
    if step is None:
        return
    if kind == "Sequence":
        for part in step["pretokenizers"]:
            yield from _regexes(part)
    elif kind == "ByteLevel" and not step["add_prefix_space"]:
        if step["use_regex"]:
            yield GPT2
    elif kind == "Digits":
        yield r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    elif kind == "Split" and step["behavior"] in ("Isolated", "Removed") and "Regex" in step["pattern"]:
        # "Removed" and inverted keeps what matches and drops what is between, and these regexes leave nothing between.
        if (step["behavior"] == "Removed") != step["invert"]:
            raise ModelError(f"tokenizer.json has a pre-tokenizer that llama.cpp does not: {dict(step)}.")
        yield step["pattern"]["Regex"]
    else:
        raise ModelError(f"tokenizer.json has a pre-tokenizer that llama.cpp does not: {dict(step)}.")
