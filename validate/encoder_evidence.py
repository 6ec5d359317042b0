"""What the gates look at where the model is an encoder: whole texts in padded batches; there is no cache and no next token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np

from tapeout.errors import RuntimeCrash
from tapeout.models import EncoderConfig
from tapeout.validate.encoders import padded
from tapeout.validate.findings import comparison, distances
from tapeout.validate.generate import Said
from tapeout.validate.metrics import Distance
from tapeout.validate.session import EncoderSession, Logits
from tapeout.validate.uncached_evidence import UncachedEvidence
from tapeout.validate.worker import WorkerSession

_BATCH = 8
_LONGEST = 128  # tokens of a text
_FEWEST = 16  # characters of a text that is more than a heading


class EncoderEvidence(UncachedEvidence):
    """Evidence whose sequences are texts with the tokens around them, and whose rows are states, embeddings or class logits."""

    @property
    def config(self) -> EncoderConfig:
        """The model's."""
        return cast(EncoderConfig, self.model.config)

    def golden(self, ids: Sequence[int], rows: Logits) -> tuple[tuple[int, ...], Logits]:
        """A text, and its first row."""
        return tuple(ids), rows[0].copy()

    @property
    def of_different_lengths(self) -> list[list[int]]:
        """A batch of the first sequences, each cut to another length, the first to one token."""
        first = self.sequences[:_BATCH]
        if not first:
            raise RuntimeCrash(
                "the evaluation text gives no sequence with this tokenizer: give a longer one."
            )
        return [ids[: max(1, len(ids) * at // max(1, len(first) - 1))] for at, ids in enumerate(first)]

    def compare(
        self, gate: str, distance: Distance, reference: Sequence[Logits], other: Sequence[Logits], *names: str
    ) -> None:
        """A text has one row of class logits, and the classes have names. KL means nothing of states and embeddings: theirs is the angle."""
        one, two = names
        if self.config.output == "logits":
            self.findings.setdefault("comparisons", {})[gate] = comparison(
                distance.kls,
                reference,
                other,
                names=(one, two),
                before=lambda sequence, _: self.text_of(self.sequences[sequence]),
                called=lambda entry: str(self.config.labels[entry]),
            )
            return
        embeds = self.config.output == "sentence_embedding" and len(reference) > 1
        self.findings.setdefault("distances", {})[gate] = distances(
            distance.angles,
            reference,
            names=(one, two),
            measure="1 - cosine",
            of="texts",
            called=lambda sequence: self.text_of(self.sequences[sequence]),
            answers=self._nearest(reference, other) if embeds else None,
        )

    def _nearest(
        self, reference: Sequence[Logits], other: Sequence[Logits]
    ) -> Callable[[int], tuple[str, str]]:
        """Which other text lies nearest to a text by the embeddings of each of two models: what a search would find."""
        found = []
        for rows in (reference, other):
            units = np.concatenate(rows).astype(np.float64)
            units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-30)
            near = units @ units.T
            np.fill_diagonal(near, -np.inf)
            found.append(near.argmax(axis=1))
        one, two = found
        return lambda at: (self.text_of(self.sequences[one[at]]), self.text_of(self.sequences[two[at]]))

    def encode(self, session: EncoderSession, sequences: Sequence[Sequence[int]]) -> list[Logits]:
        """Rows of each sequence, [tokens, hidden] or [1, width], from one padded batch."""
        ids, mask = padded(sequences, self.config.pad_token_id)
        out = session.encode(ids.tolist(), mask.tolist())
        if self.config.output == "last_hidden_state":
            return [rows[: len(each)] for rows, each in zip(out, sequences, strict=True)]
        return [row[None] for row in out]

    def _answers(self, session: Any, sequences: Sequence[Sequence[int]]) -> Iterator[Logits]:
        """In padded batches."""
        for first in range(0, len(sequences), _BATCH):
            yield from self.encode(session, sequences[first : first + _BATCH])

    def say(self, session: WorkerSession, tasks: str) -> Said:
        """Ask a session for its tokens of the corpus, their text, and the class of each task's text."""
        said = session.say(self.strings, [], self.model.generation)
        asked = self._tokenized(session, [prompt for prompt, _ in self.tasks])
        for first in range(0, len(asked), _BATCH):
            rows = self.encode(session, asked[first : first + _BATCH])
            said.answers.extend(self.config.labels[int(row[0].argmax())] for row in rows)
            self._tell(tasks, len(said.answers), len(asked))
        return said

    @cached_property
    def tasks(self) -> list[tuple[str, str]]:
        """The model's own (text, class) pairs; an encoder without classes has none."""
        return super().tasks if self.config.output == "logits" else []

    def _tokenized(self, session: WorkerSession, texts: list[str]) -> list[list[int]]:
        """As many tokens of each text as are evaluated, the last one kept: it ends the text."""
        most = min(_LONGEST, self.artifact.context, session.facts.context)
        found = session.say(texts, [], self.model.generation).ids
        return [ids if len(ids) <= most else [*ids[: most - 1], ids[-1]] for ids in found]

    def _sequences(self, session: Any) -> list[list[int]]:
        if self.tasks and self.text is None:
            texts = [prompt for prompt, _ in self.tasks]
        else:
            texts = [line.strip() for line in self._text().splitlines() if len(line.strip()) >= _FEWEST]
        kept: list[list[int]] = []
        total = 0
        for ids in self._tokenized(session, texts):
            total += len(ids)
            if total > self.tokens and kept:
                break
            kept.append(ids)
        return kept
