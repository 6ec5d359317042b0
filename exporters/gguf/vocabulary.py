"""What the ``tokenizer.*`` keys of a GGUF file say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from tapeout.exporters.gguf.added import Strips, in_name


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
        model: ``gpt2``, ``llama``, ``bert`` or ``t5``.
        pre: how text is cut into words, for ``gpt2``.
        special: token ids by llama.cpp's name: bos, eos, eot, eom, unknown, padding, seperator (its spelling), mask.
        notes: where llama.cpp is known to give other ids.
        limits: the classes of strings (``models.text_limits``) that it is known to cut otherwise.
        strips: which tokens take the spaces beside them.
        flags: what else the model's kind asks for, by key below ``tokenizer.ggml.``.
        charsmap: sentencepiece's table of what becomes what, for ``t5``.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[Type]
    scores: list[float] | None
    merges: list[str] | None
    special: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None
    notes: Sequence[str] = ()
    limits: Sequence[str] = ()
    strips: Strips = None
    flags: Mapping[str, bool] = field(default_factory=dict)
    charsmap: bytes | None = None

    def named(self, name: str) -> str:
        """The ``general.name`` of the file: llama.cpp reads from it which tokens take the spaces beside them."""
        return in_name(name, self.strips)

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
        for key, value in self.flags.items():
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        if self.charsmap:
            writer.add_precompiled_charsmap(self.charsmap)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)
