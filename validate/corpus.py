"""Texts: hostile strings for tokenizers, and what quality is measured on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache

# Pieces that tokenizers are known to get wrong, by kind.
_WORDS = {
    "latin": [
        "the",
        "quick",
        "brown",
        "fox",
        "naïve",
        "café",
        "Straße",
        "señor",
        "Ångström",
        "coöperate",
        "façade",
        "don't",
        "I'LL",
        "we'Ve",
        "o'clock",
        "rock-n-roll",
    ],
    "chinese": [
        "你好",
        "世界",
        "中文",
        "测试",
        "我想在",
        "自然语言处理",
        "量化",
        "模型",
        "北京",
        "2024年",
        "龍",
        "臺灣",
        "。",
        "，「」",
    ],
    "japanese": ["こんにちは", "カタカナ", "漢字", "です", "ー", "ｶﾅ", "東京", "々", "〜"],
    "korean": ["안녕하세요", "세계", "한국어", "ㅋㅋㅋ", "각"],
    "rtl": ["مرحبا", "بالعالم", "שלום", "עולם", "١٢٣", "ﷺ", "\u200fabc"],
    "indic": ["नमस्ते", "दुनिया", "தமிழ்", "తెలుగు", "ক্ষ", "ไทยแลนด์", "កាន់តែ"],
    "cyrillic": ["Привет", "мир", "ёлка", "Ґанок", "нещо"],
    "emoji": [
        "😀",
        "👨‍👩‍👧‍👦",
        "👩🏽‍💻",
        "🏳️‍🌈",
        "🇩🇪🇫🇷",
        "❤️",
        "☎︎",
        "1️⃣",
        "🫠",
        "🦙🦙",
        "\U0001f9d1\u200d\U0001f680",
    ],
    "code": [
        "def f(x):\n\treturn x**2",
        "for (int i=0;i<n;++i) {",
        "SELECT * FROM t WHERE a='b';",
        '<div class="a">&nbsp;</div>',
        "x = {'a': [1, 2.5e-3, None]}",
        "#include <stdio.h>\r\n",
        "λx.x → ∀y∃z",
        "C:\\dir\\file.txt",
        "user@example.invalid",
        "a&&b||!c",
        "0xDEADBEEF",
        "$(( 1+1 ))",
        "```python\nprint()\n```",
    ],
    "numbers": [
        "0",
        "7",
        "42",
        "123",
        "1234",
        "1234567",
        "3.14159",
        "1,000,000",
        "1e10",
        "-5",
        "½",
        "²",
        "Ⅻ",
        "٣٤",
        "12*3=",
    ],
    "marks": [
        "e\u0301",
        "a\u0308\u0323",
        "\u0301",
        "Z\u0351\u036b\u0343",
        "ﬁ",
        "ﾊﾟ",
        "\u1e9b\u0323",
        "\ufeff",
        "\u00ad",
    ],
    "controls": [
        "\x01",
        "\x07",
        "\x1b[0m",
        "\x7f",
        "\x85",
        "\u2028",
        "\u2029",
        "\u200b",
        "\u2060",
        "\u202e",
        "\ufffd",
    ],
    "punctuation": [
        "...",
        "!!!",
        "?!",
        "——",
        "''",
        '""',
        "“”",
        "(((",
        "]]",
        "=====",
        "~~~",
        "¿¡",
        "…",
        "@#$%^&*",
        "'s",
        "'RE",
    ],
}
_SPACES = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\n\n",
    " \n ",
    "\t\t",
    "\u00a0",
    "\u3000",
    "\u2003",
    "\v",
    "\f",
    "\r",
]


@cache
def hostile(special_tokens: tuple[str, ...] = (), count: int = 2400, seed: int = 0) -> tuple[str, ...]:
    """Distinct strings, at least ``count``, the same each time.

    Scripts and their mixtures, emoji with joiners, code, whitespace runs, numbers, control and combining characters, the
    tokenizer's special tokens in every position, long words, and what is left of UTF-8 that was cut in the middle. NUL and
    lone surrogates are left out: the one ends a C string, the other is no Unicode text and cannot be encoded.
    """
    found = dict.fromkeys(_fixed(special_tokens))
    pick = random.Random(seed)
    kinds = list(_WORDS)
    while len(found) < count:
        kind = pick.choice(kinds)
        mixed = [kind] if pick.random() < 0.5 else [kind, pick.choice(kinds), pick.choice(kinds)]
        parts: list[str] = []
        for _ in range(pick.randint(2, 12)):
            if special_tokens and pick.random() < 0.08:
                parts.append(pick.choice(special_tokens))
            parts.append(pick.choice(_WORDS[pick.choice(mixed)]))
            parts.append(pick.choice(_SPACES) * pick.choice((1, 1, 1, 2, 7)) if pick.random() < 0.7 else "")
        text = "".join(parts)
        if pick.random() < 0.15:  # cut in the middle of a character, as a stream of bytes may be
            data = text.encode()
            text = data[: pick.randint(1, len(data))].decode("utf-8", "replace")
        found[text] = None
    return tuple(found)


def _fixed(special_tokens: Sequence[str]) -> Iterator[str]:
    yield ""
    for words in _WORDS.values():
        yield from words
        yield " ".join(words)
        yield "".join(words)
        yield from (f" {word}" for word in words)
    for space in _SPACES:
        for length in (1, 2, 3, 4, 8, 17, 64):
            yield space * length
            yield f"a{space * length}b"
        yield f"{space}x"
        yield f"x{space}"
    for token in special_tokens:
        yield from (
            token,
            f" {token}",
            f"{token} ",
            f"a{token}b",
            f"{token}{token}",
            f"\n{token}\n",
            token[:-1],
            token[1:],
        )
    yield "a" * 1000
    yield "ab" * 500 + " " + "字" * 300
    yield "1" * 333
    yield bytes(range(1, 256)).decode("latin-1")
    yield bytes(range(128, 256)).decode("utf-8", "replace")
