"""Several sequences at once on llama.cpp: its batches hold tokens of any of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tapeout.errors import RuntimeCrash, TapeoutError
from tapeout.targets.llama_cpp import LlamaCpp, computed, library, log_tail
from tapeout.validate.given import check_ids
from tapeout.validate.session import Facts, Logits

__all__ = ["LlamaCppBatched"]


class LlamaCppBatched(LlamaCpp):
    """A BatchedSession on llama.cpp; as a Session it is its sequence 0."""

    def __init__(self, facts: Facts, model: int, context: int, batch_size: int, sequences: int) -> None:
        super().__init__(facts, model, context, batch_size)
        self.sequences, self.vocab_size = sequences, self._vocab_size
        self._lengths = [0] * sequences

    def step(self, given: Sequence[tuple[int, Sequence[int]]]) -> Logits:
        """Append tokens to sequences; see BatchedSession."""
        tokens: list[int] = []
        owners: list[int] = []
        places: list[int] = []
        ends = np.cumsum([len(ids) for _, ids in given]) - 1
        for sequence, ids in given:
            check_ids(ids, self._vocab_size)
            if (length := self._lengths[sequence] + len(ids)) > self.facts.context:
                raise TapeoutError(f"{length} tokens do not fit the context of {self.facts.context}.")
        for sequence, ids in given:
            begin = self._lengths[sequence]
            tokens += ids
            owners += [sequence] * len(ids)
            places += range(begin, begin + len(ids))
            self._lengths[sequence] += len(ids)
        wanted = np.zeros(len(tokens), np.int8)
        wanted[ends] = 1
        rows = []
        for at in range(0, len(tokens), self._batch_size):
            part = slice(at, at + self._batch_size)
            rows.append(self._together(tokens[part], places[part], owners[part], wanted[part]))
        return np.concatenate(rows)

    def forget(self, sequence: int) -> None:
        """Empty the cache of one sequence."""
        llama = library()
        llama.llama_memory_seq_rm(llama.llama_get_memory(self._context), sequence, -1, -1)
        self._lengths[sequence] = 0

    def reset(self) -> None:
        """Empty all of them; the next tokens of ``prefill`` and ``decode`` are sequence 0's."""
        super().reset()
        self._lengths = [0] * self.sequences
        for place in range(self._batch_size):
            self._batch.seq_id[place][0] = 0

    def _together(
        self,
        tokens: list[int],
        places: list[int],
        owners: list[int],
        wanted: np.ndarray[tuple[int], np.dtype[np.int8]],
    ) -> Logits:
        """Run one batch; the logits of the tokens that are ``wanted``, float32 [wanted, vocab]."""
        llama, batch, count = library(), self._batch, len(tokens)
        batch.n_tokens = count
        self._token[:count], self._position[:count], self._output[:count] = tokens, places, wanted
        for place, owner in enumerate(owners):
            batch.seq_id[place][0] = owner
        if status := computed(llama.llama_decode, self._context, batch):
            raise RuntimeCrash(
                f"llama_decode gave {status} for {count} tokens of {len(set(owners))} sequences.{log_tail()}"
            )
        outputs = int(wanted.sum())
        if not outputs:
            return np.empty((0, self._vocab_size), np.float32)
        return np.ctypeslib.as_array(
            llama.llama_get_logits(self._context), (outputs, self._vocab_size)
        ).copy()
