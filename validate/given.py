"""What every session checks of what it is given, in the same words."""

from __future__ import annotations

from collections.abc import Sequence

from tapeout.errors import TapeoutError


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """TapeoutError for token ids that are not all in the vocabulary; none at all are."""
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise TapeoutError(
            f"token ids from {min(ids)} to {max(ids)} are not all in the vocabulary of {vocab_size}."
        )


def encoded(text: str) -> bytes:
    """A text in UTF-8; TapeoutError for one that no tokenizer takes."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TapeoutError(f"the text cannot be tokenized, since it is not Unicode: {error}.") from error
