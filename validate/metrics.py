"""Distances between two models' logits, over whole arrays, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tapeout.errors import NotFinite, RuntimeCrash
from tapeout.validate.session import Logits

_STEP_VALUES = 1 << 22  # logits in work at a time: their float64 copies stay below a few hundred megabytes


@dataclass
class Distance:
    """How far logits lie from a reference's, added up over sequences.

    Attributes:
        tokens: compared so far.
        kl_sum: of KL(reference ‖ other) over tokens, in nats.
        worst_kl: the largest of a token.
        agree: tokens whose likeliest next token is the same; a tie in the other model counts as agreement.
        worst: largest absolute difference of logits.
        cosine_sum: of 1 - the cosine of the angle between both rows, over rows.
    """

    tokens: int = 0
    kl_sum: float = 0.0
    worst_kl: float = 0.0
    agree: int = 0
    worst: float = 0.0
    cosine_sum: float = 0.0
    _kls: list[npt.NDArray[np.float64]] = field(default_factory=list)
    _angles: list[npt.NDArray[np.float64]] = field(default_factory=list)
    _errors: list[npt.NDArray[np.float64]] = field(default_factory=list)
    _squared_error: float = 0.0
    _sum: float = 0.0
    _squares: float = 0.0
    _values: int = 0

    @classmethod
    def between(cls, references: Iterable[Logits], others: Iterable[Logits]) -> Distance:
        """Sequences of logits against as many others; see ``add`` for what it raises."""
        distance = cls()
        for reference, other in zip(references, others, strict=True):
            distance.add(reference, other)
        return distance

    def add(self, reference: Logits, other: Logits, who: str = "the device") -> None:
        """Add logits [tokens, vocab] of both.

        Raises:
            RuntimeCrash: shapes differ, or a logit is NaN or infinite; the first token with one is named.
        """
        if reference.shape != other.shape:
            raise RuntimeCrash(
                f"{who} gives logits {list(other.shape)} where the reference gives {list(reference.shape)}."
            )
        for rows in _steps(reference):
            mine, theirs = reference[rows].astype(np.float64), other[rows].astype(np.float64)
            bad = ~np.isfinite(theirs).all(axis=1)
            if bad.any():
                raise NotFinite(
                    f"{who} gives NaN or infinite logits after token {rows.start + int(np.argmax(bad))}."
                )
            kl = kl_divergence(mine, theirs)
            self._kls.append(kl)
            self.kl_sum += float(kl.sum())
            self.worst_kl = max(self.worst_kl, float(kl.max(initial=0.0)))
            chosen = np.take_along_axis(theirs, mine.argmax(axis=1)[:, None], axis=1)[:, 0]
            self.agree += int((chosen == theirs.max(axis=1)).sum())
            self.worst = max(self.worst, float(np.abs(mine - theirs).max(initial=0.0)))
            lengths = np.linalg.norm(mine, axis=1) * np.linalg.norm(theirs, axis=1)
            cosines = (mine * theirs).sum(axis=1) / np.maximum(lengths, 1e-30)
            self.cosine_sum += float((1 - cosines).sum())
            self._angles.append(1 - cosines)
            squares = ((mine - theirs) ** 2).sum(axis=1)
            self._errors.append(squares / max(1, mine.shape[1]))
            self._squared_error += float(squares.sum())
            self._sum += float(mine.sum())
            self._squares += float((mine**2).sum())
            self._values += mine.size
            self.tokens += len(mine)

    @property
    def kl(self) -> float:
        """Mean KL a token, in nats."""
        return self.kl_sum / max(1, self.tokens)

    @property
    def kls(self) -> npt.NDArray[np.float64]:
        """KL of each token in nats, in the order that they were added: float64 [tokens]."""
        return np.concatenate(self._kls) if self._kls else np.zeros(0)

    @property
    def angles(self) -> npt.NDArray[np.float64]:
        """1 - the cosine of the angle between both, of each row: float64 [rows], never below zero."""
        return np.maximum(np.concatenate(self._angles), 0.0) if self._angles else np.zeros(0)

    @property
    def errors(self) -> npt.NDArray[np.float64]:
        """Mean squared difference of each row, in units of the variance of the reference's values: float64 [rows]."""
        return np.concatenate(self._errors) / max(1e-30, self._deviation**2) if self._errors else np.zeros(0)

    @property
    def typical_kl(self) -> float:
        """KL of the median token, in nats."""
        return float(np.median(self.kls)) if self.tokens else 0.0

    @property
    def top1(self) -> float:
        """Share of tokens whose likeliest next token is the same."""
        return self.agree / max(1, self.tokens)

    @property
    def cosine(self) -> float:
        """Mean over rows of 1 - the cosine of the angle between both."""
        return self.cosine_sum / max(1, self.tokens)

    @property
    def error(self) -> float:
        """Mean squared difference, in units of the variance of the reference's values."""
        return self._squared_error / max(1, self._values) / max(1e-30, self._deviation**2)

    @property
    def max(self) -> float:
        """Largest absolute difference, in units of the standard deviation of the reference's logits."""
        return self.worst / max(1e-30, self._deviation)

    @property
    def _deviation(self) -> float:
        mean = self._sum / max(1, self._values)
        return float(np.sqrt(max(0.0, self._squares / max(1, self._values) - mean**2)))


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log-probabilities of float64 logits [tokens, vocab]."""
    shifted: npt.NDArray[np.float64] = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def kl_divergence(
    reference: npt.NDArray[np.float64], other: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """KL(reference ‖ other) of each token, in nats: float64 logits [tokens, vocab] to [tokens], never below zero."""
    p, q = log_softmax(reference), log_softmax(other)
    kl: npt.NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
    return np.maximum(kl, 0.0, out=kl)


def negative_log_likelihood(logits: Logits, ids: npt.NDArray[np.int64]) -> float:
    """Sum over tokens of -log p(next token), in nats: logits [tokens, vocab] and the sequence [tokens] they follow."""
    total = 0.0
    for rows in _steps(logits[:-1]):
        p = log_softmax(logits[:-1][rows].astype(np.float64))
        total -= float(np.take_along_axis(p, ids[1:][rows, None], axis=1).sum())
    return total


def _steps(logits: Logits) -> Iterator[slice]:
    step = max(1, _STEP_VALUES // max(1, logits.shape[1]))
    for first in range(0, len(logits), step):
        yield slice(first, min(first + step, len(logits)))
