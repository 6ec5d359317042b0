"""Several sequences at once on ONNX Runtime: one token of each is a batch, a prompt is computed by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import RuntimeCrash, TapeoutError
from tapeout.validate.given import check_ids
from tapeout.validate.session import Facts, Logits

__all__ = ["OnnxBatched"]


class OnnxBatched:
    """A BatchedSession on onnxruntime, of graphs whose attention is GroupQueryAttention over caches of whole sequences.

    The caches of a layer are one array [sequences, heads, context, width], past and present at once. The operator takes a batch with
    one new token a row, and a prompt of one row alone: so a step is one run for all that go on, and one for each that begins. A row
    that has nothing to do gets a token behind its last one, which the next real one replaces.
    """

    def __init__(self, facts: Facts, session: Any, chunk: int, sequences: int) -> None:
        self.facts, self.sequences = facts, sequences
        self.vocab_size = int(session.get_outputs()[0].shape[2])
        self._session, self._chunk = session, chunk
        self._lengths = np.zeros(sequences, np.int64)
        self._mask = np.ones(facts.context, np.int64)
        self._together = session.io_binding()
        self._alone = [session.io_binding() for _ in range(sequences)]
        self._caches = []
        for each in session.get_inputs():
            if not each.name.startswith("past_"):
                continue
            _, heads, length, width = each.shape
            if isinstance(length, str) and length.startswith("window_"):
                raise TapeoutError(
                    "a cache of a sliding window drops the rows of all sequences of a batch at once, so that this graph takes one."
                )
            cache = np.zeros((sequences, heads, facts.context, width), np.float32)
            self._caches.append(cache)
            for binding, part in [(self._together, cache), *zip(self._alone, cache[:, None], strict=True)]:
                binding.bind_input(each.name, "cpu", 0, np.float32, part.shape, part.ctypes.data)
                present = each.name.replace("past_key_values", "present")
                binding.bind_output(present, "cpu", 0, np.float32, part.shape, part.ctypes.data)

    def step(self, given: Sequence[tuple[int, Sequence[int]]]) -> Logits:
        """Append tokens to sequences; see BatchedSession."""
        for sequence, ids in given:
            check_ids(ids, self.vocab_size)
            if (length := int(self._lengths[sequence]) + len(ids)) > self.facts.context:
                raise TapeoutError(f"{length} tokens do not fit the context of {self.facts.context}.")
        found = np.empty((len(given), self.vocab_size), np.float32)
        going_on = [at for at, (_, ids) in enumerate(given) if len(ids) == 1]
        if going_on:
            rows, tokens = [given[at][0] for at in going_on], np.zeros((self.sequences, 1), np.int64)
            tokens[rows, 0] = [given[at][1][0] for at in going_on]
            lengths = np.minimum(self._lengths + 1, self.facts.context)
            mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
            found[going_on] = self._run(self._together, tokens, mask)[rows]
            self._lengths[rows] += 1
        for at, (sequence, ids) in enumerate(given):
            for begin in range(0, len(ids) if len(ids) > 1 else 0, self._chunk):
                part = np.array([ids[begin : begin + self._chunk]], np.int64)
                self._lengths[sequence] += part.shape[1]
                mask = self._mask[None, : self._lengths[sequence]]
                found[at] = self._run(self._alone[sequence], part, mask)[0]
        return found

    def forget(self, sequence: int) -> None:
        """Empty the cache of one sequence: what is in it is not looked at."""
        self._lengths[sequence] = 0

    def close(self) -> None:
        """Free the model; may be called twice."""
        self._session = self._together = None
        self._alone, self._caches = [], []

    def _run(self, binding: Any, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> Logits:
        """One step of ids [rows, tokens]; the logits of each row's last token, [rows, vocab]."""
        first, logits = np.array([ids.shape[1] - 1]), np.empty((len(ids), 1, self.vocab_size), np.float32)
        for name, array in (("input_ids", ids), ("attention_mask", mask), ("first_logits", first)):
            binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # its own tree, rooted in Exception
            raise RuntimeCrash(
                f"onnxruntime cannot run a batch of {list(ids.shape)} tokens: {error}"
            ) from error
        return logits[:, 0]
