"""What a report shows beside the verdicts, taken from what the gates have computed anyway: plain values for ``report.json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.validate.divergence import Divergence
from tapeout.validate.metrics import log_softmax
from tapeout.validate.session import Logits

__all__ = ["comparison", "differing_answers", "differing_strings", "distances", "error_by_layer"]

_EDGES = 10.0 ** np.arange(-10, 2)
"""Edges of the histogram of KL in nats, and of other distances: a bin a factor of ten, [edges]; what is outside counts with the nearest bin."""
_WORST = 5  # tokens that are shown with both models' answers
_ANSWERS = 3  # the likeliest, of each
_EXAMPLES = 8  # tasks and strings that are shown
_LETTERS = 80  # of the text before a token


def comparison(
    kls: npt.NDArray[np.float64],
    reference: Sequence[Logits],
    other: Sequence[Logits],
    *,
    names: tuple[str, str],
    before: Callable[[int, int], str],
    called: Callable[[int], str],
) -> dict[str, Any]:
    """How KL is spread over tokens, and the tokens on which it is largest.

    Args:
        kls: KL(reference ‖ other) in nats of every row of the sequences, one after another, float64 [tokens].
        reference: logits [tokens, vocab] of each sequence. other: the same of the other model.
        names: what both are.
        before: the text that row ``j`` of sequence ``i`` follows.
        called: the text of an entry of the vocabulary, or the name of a class.
    """
    ends = np.cumsum([len(rows) for rows in reference])
    worst = []
    for flat in np.argsort(-kls, kind="stable")[:_WORST].tolist():
        sequence = int(np.searchsorted(ends, flat, "right"))
        row = flat - int(ends[sequence]) + len(reference[sequence])
        worst.append(
            {
                "sequence": sequence,
                "token": row,
                "before": before(sequence, row)[-_LETTERS:],
                "kl": float(kls[flat]),
                "reference": _likeliest(reference[sequence][row], called),
                "other": _likeliest(other[sequence][row], called),
            }
        )
    return {"reference": names[0], "other": names[1], "tokens": len(kls), **_spread(kls), "worst": worst}


def distances(
    rows: npt.NDArray[np.float64],
    reference: Sequence[Logits],
    *,
    names: tuple[str, str],
    measure: str,
    of: str,
    called: Callable[[int], str],
    answers: Callable[[int], tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """The same of outputs that are no probabilities: how a distance is spread over texts or samples, and the farthest of them.

    Args:
        rows: the distance of every row of the sequences, float64 [rows]; that of a sequence is their mean.
        reference: rows [rows, width] of each sequence.
        names: what both are. measure: what the distance is, with its unit. of: what a sequence is.
        called: what sequence ``i`` is. answers: what both models make of it.
    """
    ends = np.cumsum([len(each) for each in reference])[:-1]
    values = np.array([each.mean() for each in np.split(rows, ends)])
    worst = []
    for at in np.argsort(-values, kind="stable")[:_WORST].tolist():
        told = {"what": called(at)[:_LETTERS], "value": float(values[at])}
        if answers:
            told["reference"], told["other"] = (answer[:_LETTERS] for answer in answers(at))
        worst.append(told)
    told_of = {"reference": names[0], "other": names[1], "measure": measure, "of": of, "count": len(values)}
    return {**told_of, **_spread(values), "worst": worst}


def _spread(values: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Mean, quantiles and a histogram of distances."""
    counts, _ = np.histogram(np.clip(values, _EDGES[0], _EDGES[-1]), _EDGES)
    p50, p90, p99 = (float(np.quantile(values, q)) for q in (0.5, 0.9, 0.99))
    found = {"mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99, "max": float(values.max())}
    return found | {"edges": _EDGES.tolist(), "counts": counts.tolist()}


def _likeliest(logits: npt.NDArray[np.float32], called: Callable[[int], str]) -> list[dict[str, Any]]:
    """The likeliest entries of a row [vocab] with their probabilities, the first one first."""
    p = np.exp(log_softmax(logits[None].astype(np.float64))[0])
    order = np.argsort(-p, kind="stable")[:_ANSWERS]
    return [{"id": int(at), "text": called(int(at)), "p": float(p[at])} for at in order]


def differing_answers(
    tasks: Sequence[tuple[str, str]], before: Sequence[str], after: Sequence[str]
) -> dict[str, Any]:
    """How many tasks the original and the device answer as they should, and those that the two answer otherwise.

    Args:
        tasks: (prompt, answer). before: what the original answers. after: what the device does.
    """
    differing = [
        {"prompt": prompt, "wanted": wanted, "reference": one, "other": two}
        for (prompt, wanted), one, two in zip(tasks, before, after, strict=True)
        if one != two
    ]
    wanted = [answer.strip() for _, answer in tasks]
    return {
        "tasks": len(tasks),
        "reference_right": sum(a == b for a, b in zip(before, wanted, strict=True)),
        "other_right": sum(a == b for a, b in zip(after, wanted, strict=True)),
        "differing": len(differing),
        "examples": differing[:_EXAMPLES],
    }


def differing_strings(
    strings: Sequence[str],
    source: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
    which: Sequence[int],
) -> dict[str, Any]:
    """Strings of the hostile corpus that the artifact's tokenizer cuts otherwise, or makes other text of.

    Args:
        strings: the corpus. source: the source's ids of each. found: the artifact's.
        which: indices of those that differ.
    """
    return {
        "strings": len(strings),
        "differing": len(which),
        "examples": [
            {
                "text": strings[at][:_LETTERS],
                "source": list(source[at][:12]),
                "artifact": list(found[at][:12]),
            }
            for at in which[:_EXAMPLES]
        ],
    }


def error_by_layer(found: Divergence) -> dict[str, Any]:
    """Where a walk along the graph found that error builds up; None stands for a number where the other has none."""
    return {
        "tokens": found.tokens,
        "finding": found.words(),
        "first": found.first.name if found.first else None,
        "layers": [
            {
                "layer": layer,
                "grown": _finite(grown),
                "own": None if own is None else _finite(own),
                "limit": worst.limit,
                "parts": worst.parts,
                "where": worst.name,
                "op": worst.op,
            }
            for layer, (grown, own, worst) in found.layers().items()
        ],
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
