"""Added tokens that take the spaces beside them: GGUF has no field for it, llama.cpp reads it from names.

Known to it are Phi-3 (every added token but ``<unk>``, ``<s>`` and ``<|endoftext|>`` takes the spaces after it, when
``general.name`` has ``phi3``), a ``<mask>`` that takes the spaces before it (RoBERTa; under a pre-tokenizer's name), and a
``[MASK]`` that does (``modern-bert`` in the name). Source: "Handle per token attributes" in ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from tapeout.errors import ModelError

Strips = Literal["phi3", "<mask>", "[MASK]"] | None

# What llama.cpp looks for in the lower-cased name, and what it must not find there otherwise.
_NAMES = {"phi3": r"phi-?3", "[MASK]": "modern-bert"}
# Texts that llama.cpp takes for control tokens wherever they stand in a vocabulary ("auto-detect special tokens by text").
_TAKEN = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "[PAD]",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
        "<|file_sep|>",
        "<|channel|>",
        "<|message|>",
        "<|start|>",
        "<|constrain|>",
    ]
)
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


def notes_of(added: Sequence[str], ordinary: Collection[str]) -> list[str]:
    """Where llama.cpp finds other tokens in a text, before it is cut into words.

    Args:
        added: texts of the tokens that are looked for first.
        ordinary: texts of the other tokens.
    """
    notes = []
    if taken := sorted(_TAKEN.intersection(ordinary)):
        notes.append(
            f"llama.cpp takes {', '.join(taken)} for control tokens, of which the tokenizer makes ordinary ones"
        )
    begins: dict[str, list[str]] = {}
    for token in added:
        for length in range(1, len(token)):
            begins.setdefault(token[:length], []).append(token)
    overlaps = [
        (first, later)
        for first in added
        for cut in range(1, len(first))
        for later in begins.get(first[cut:], ())
        # Runs of one character are cut alike: the longest one first is also the leftmost.
        if len(later.encode()) > len(first.encode()) and len({*first, *later}) > 1
    ]
    if overlaps:
        first, later = overlaps[0]
        notes.append(
            f"where the added tokens {first!r} and {later!r} overlap in a text, Hugging Face takes the first, llama.cpp the longer"
        )
    return notes


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
