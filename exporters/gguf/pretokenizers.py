"""Which ``pre`` names the way that a byte-level tokenizer cuts text into words before it merges.

llama.cpp has the regexes compiled in, under names (``llm_tokenizer_bpe`` in ``src/llama-vocab.cpp``); a wrong name
mis-tokenizes without a word, so the name follows from the regexes of tokenizer.json and an unknown one is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tapeout.errors import ModelError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"

# By the regexes in order and ``ignore_merges`` (a word that is a token stays whole), which llama.cpp ties to the name.
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((QWEN2,), False): "qwen2",
    ((rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
      r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",), False): "qwen35",
    ((r"\p{N}", GPT2), False): "smollm",
    ((rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHED}",), True): "tekken",
    ((rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASHED}",), False): "gpt-4o",
    ((r"\p{N}{1,3}", _CJK, _DEEPSEEK), False): "deepseek-v3",
    (("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"), False): "deepseek-coder",
}  # fmt: skip


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
