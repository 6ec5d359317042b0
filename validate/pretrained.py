"""What every reference on transformers does to a model's directory: weights that are really there, and its tokenizer as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tapeout.errors import ModelError


def load(kind: Any, directory: Path, config: Any, unseen: tuple[str, ...] = ()) -> Any:
    """The network in float32 with eager attention, for evaluation.

    Args:
        kind: a class of transformers that has ``from_pretrained``.
        directory: of the model.
        config: transformers' configuration of it.
        unseen: beginnings of names that may be absent, since nothing looks at what they compute.

    Raises:
        ModelError: transformers would make up a weight.
    """
    network, found = loaded(kind, directory, config)
    names = map(str, {*found["missing_keys"], *found["mismatched_keys"]})
    if made_up := sorted(name for name in names if not name.startswith(unseen)):
        raise ModelError(f"transformers does not find {', '.join(made_up[:3])} in {directory}.")
    return network.eval()


def loaded(kind: Any, directory: Path, config: Any) -> tuple[Any, dict[str, Any]]:
    """The same before it was looked at: the network, and what transformers says of its loading."""
    import torch

    found: tuple[Any, dict[str, Any]] = kind.from_pretrained(
        directory,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    return found


class Words:
    """What a session answers with the tokenizer of a directory, which is read when it is first asked for.

    Attributes:
        words: the directory.
    """

    words: Path

    @cached_property
    def _tokenizer(self) -> Any:
        return tokenizer(self.words)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``; special tokens in it are recognised, none are added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens kept; bytes that are not UTF-8 become U+FFFD."""
        return text_of(self._tokenizer, ids)


def tokenizer(directory: Path) -> Any:
    """A model's tokenizer, as its tokenizer.json stands; ModelError when there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # transformers 5 rebuilds Llama's, Gemma's, T5's and BERT's from their vocabulary and drops the file's own normalizer.
    as_written = (Path(directory) / "tokenizer.json").exists()
    kind = PreTrainedTokenizerFast if as_written else AutoTokenizer
    try:
        return kind.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # what it raises depends on which of its files is missing
        raise ModelError(f"transformers finds no tokenizer in {directory}: {error}") from error


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens kept; bytes that are not UTF-8 become U+FFFD."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
