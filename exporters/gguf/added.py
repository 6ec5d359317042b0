"""Added tokens that take the spaces beside them: GGUF has no field for it, llama.cpp reads it from names.

Known to it are Phi-3 (every added token but ``<unk>``, ``<s>`` and ``<|endoftext|>`` takes the spaces after it, when
``general.name`` has ``phi3``), a ``<mask>`` that takes the spaces before it (RoBERTa; under a pre-tokenizer's name), and a
``[MASK]`` that does (``modern-bert`` in the name). Source: "Handle per token attributes" in ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tapeout.errors import ModelError

Strips = Literal["phi3", "<mask>", "[MASK]"] | None

# What llama.cpp looks for in the lower-cased name, and what it must not find there otherwise.
_NAMES = {"phi3": r"phi-?3", "[MASK]": "modern-bert"}
_KEEP = ("<unk>", "<s>", "<|endoftext|>")


def strips_of(added: Sequence[Mapping[str, Any]]) -> Strips:
    """Which of llama.cpp's habits the added tokens need.

    Raises:
        ModelError: it has none that fits.
    """
    contents = {token["content"] for token in added}
    left = {token["content"] for token in added if token["lstrip"]}
    right = {token["content"] for token in added if token["rstrip"]}
    if not left and not right:
        return None
    if left == {"<mask>"} and not right:
        return "<mask>"
    if left == {"[MASK]"} and not right:
        return "[MASK]"
    if not left and right == contents.difference(_KEEP) and "</s>" in contents:
        return "phi3"
    flag, tokens = ("lstrip", left) if left else ("rstrip", right)
    raise ModelError(
        f"tokenizer.json has {flag} for {', '.join(map(repr, sorted(tokens)[:3]))}, which GGUF cannot say: llama.cpp knows it of "
        "'<mask>' or '[MASK]' alone (lstrip), and of all tokens but '<unk>', '<s>' and '<|endoftext|>' (rstrip, Phi-3)."
    )


def in_name(name: str, strips: Strips) -> str:
    """A model's name that says to llama.cpp what the tokens do, and nothing else."""
    for kind, pattern in _NAMES.items():
        there = re.search(pattern, name, re.IGNORECASE)
        if kind == strips and not there:
            name += " (phi3)" if kind == "phi3" else " (modern-bert)"
        elif kind != strips and there:
            name = re.sub(
                pattern, lambda found: re.sub("-|(?=3)", " ", found[0], count=1), name, flags=re.IGNORECASE
            )
    return name
