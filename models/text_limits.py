"""Classes of strings that a runtime's own tokenizer is known to cut otherwise than Hugging Face's.

An exporter names the classes that its format cannot carry, the tokenizer gate counts their strings apart. A class must be
narrow: what it excuses is never ordinary text of a model that needs it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

Predicate = Callable[[str, Sequence[str], str], bool]


@dataclass(frozen=True)
class Limit:
    """A class of strings.

    Attributes:
        reason: what both sides do with them.
        holds: whether a text is one of them, given the tokenizer's added tokens and what its ids become again in Hugging Face.
    """

    reason: str
    holds: Predicate


# Unicode's White_Space without what C's isspace knows.
_WIDE_SPACE = "\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def _wide_space_beside(text: str, added: Sequence[str], _: str) -> bool:
    if not re.search(f"[{_WIDE_SPACE}]", text):
        return False
    tokens = "|".join(map(re.escape, added))
    return bool(re.search(rf"(?:{tokens})\s*[{_WIDE_SPACE}]|[{_WIDE_SPACE}]\s*(?:{tokens})", text))


@lru_cache(4096)
def _unknown_to_bert(character: str) -> bool:
    """A character of today's Unicode that the tables of Hugging Face's BertNormalizer take for unassigned, and drop."""
    from tokenizers.normalizers import BertNormalizer

    if character.isascii() or unicodedata.category(character)[0] in "CZ":
        return False
    cleaning = BertNormalizer(
        clean_text=True, handle_chinese_chars=False, strip_accents=False, lowercase=False
    )
    return character != "\ufffd" and not cleaning.normalize_str(character)


def _has(*categories: str) -> Predicate:
    return lambda text, *_: any(unicodedata.category(c).startswith(categories) for c in text)


LIMITS = {
    "lost-byte": Limit(
        "characters that the vocabulary lacks: Hugging Face merges across them, llama.cpp does not",
        lambda text, _, back: text != back,
    ),
    "not-nfc": Limit(
        "text that is not NFC: Hugging Face normalizes it, llama.cpp does not",
        lambda text, *_: not unicodedata.is_normalized("NFC", text),
    ),
    "wide-space": Limit(
        "spaces other than ASCII's beside a token that strips them: llama.cpp leaves them",
        _wide_space_beside,
    ),
    "space-beyond-ascii": Limit(
        "spaces other than ASCII's: llama.cpp's own regexes do not know them for this pre-tokenizer",
        lambda text, *_: bool(re.search(f"[{_WIDE_SPACE}]", text)),
    ),
    "escaped-space": Limit(
        "the character ▁ itself: Hugging Face looks for added tokens of it, llama.cpp takes it for a space",
        lambda text, *_: "▁" in text,
    ),
    "long-word": Limit(
        "words of more than 100 characters: unknown to Hugging Face, cut into pieces by llama.cpp",
        lambda text, *_: any(len(word) > 100 for word in text.split()),
    ),
    "control-space": Limit(
        "the spaces among the control characters: Hugging Face removes them, llama.cpp cuts there",
        lambda text, *_: any(c in text for c in "\v\f\x85"),
    ),
    "new-character": Limit(
        "characters newer than the Unicode tables of Hugging Face's BertNormalizer, which drops them",
        lambda text, *_: any(_unknown_to_bert(c) for c in text),
    ),
    "hangul": Limit(
        "Korean syllables without accents: Hugging Face takes them apart, llama.cpp keeps the first part",
        lambda text, *_: any("\uac00" <= c <= "\ud7a3" for c in text),
    ),
    "spacing-mark": Limit(
        "spacing and enclosing marks: llama.cpp takes them for accents and strips them",
        _has("Mc", "Me"),
    ),
    "next-line": Limit(
        "U+0085, which sentencepiece's charsmap leaves: Hugging Face cuts there, llama.cpp does not",
        lambda text, *_: "\x85" in text,
    ),
    "cluster": Limit(
        "characters with marks or joiners: Hugging Face's charsmap maps the cluster and may lose the marks",
        lambda text, *_: any(
            unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf") or c in "\uff9e\uff9f" for c in text
        ),
    ),
}  # fmt: skip
