"""How long a session takes, measured in its own process."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import numpy as np

from tapeout.validate.session import EncoderSession, ModuleSession, Session

__all__ = ["Timing", "measure", "measure_encoding", "measure_inference"]


@dataclass(frozen=True)
class Timing:
    """Seconds that a session took, measured beside it.

    Attributes:
        prefill_s: for the whole prompt, one for each repeat.
        decode_s: for each token after it, [repeats][new_tokens].
    """

    prefill_s: tuple[float, ...]
    decode_s: tuple[tuple[float, ...], ...]


def measure(
    session: Session,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    chunk: int | None = None,
    warm: bool = True,
) -> Timing:
    """Time a session on random tokens; one repeat more comes first and does not count, unless ``warm`` is False.

    The prompt goes through ``session.append(ids)`` where there is such a method: it leaves out the logits that nobody who
    generates asks for, all but the last.

    Args:
        session: is reset before each repeat.
        prompt_tokens: length of the prompt.
        new_tokens: tokens decoded one by one after it.
        repeats: how often.
        chunk: most tokens given to the session at once; None: all.
        warm: False: the first repeat counts too; the caller looks for the warm-up itself.
    """
    append = getattr(session, "append", session.prefill)
    session.reset()
    vocab = session.prefill([0]).shape[1]
    ids = np.random.default_rng(0).integers(0, vocab, prompt_tokens + new_tokens).tolist()
    prompt, new = ids[:prompt_tokens], ids[prompt_tokens:]
    step = chunk or prompt_tokens

    def once() -> tuple[float, tuple[float, ...]]:
        session.reset()
        begin = perf_counter()
        for at in range(0, prompt_tokens, step):
            append(prompt[at : at + step])
        times = [perf_counter()]
        for token in new:
            session.decode(token)
            times.append(perf_counter())
        return times[0] - begin, tuple(after - before for before, after in pairwise(times))

    if warm:
        once()
    rounds = [once() for _ in range(repeats)]
    return Timing(tuple(prefill for prefill, _ in rounds), tuple(decode for _, decode in rounds))


def measure_encoding(session: EncoderSession, batch: int, tokens: int, repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` runs of an encoder on ``batch`` sequences of ``tokens`` tokens; one more comes first.

    The ids are 0 … 9, which every vocabulary has: no arithmetic depends on which.
    """
    ids = np.random.default_rng(0).integers(0, 10, (batch, tokens)).tolist()
    mask = [[1] * tokens] * batch
    session.encode(ids, mask)
    times = []
    for _ in range(repeats):
        begin = perf_counter()
        session.encode(ids, mask)
        times.append(perf_counter() - begin)
    return times


def measure_inference(session: ModuleSession, samples: int, repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` runs of a module on its first sample; one more comes first.

    A session keeps what it gave of the last sample, so another one is run in between, untimed; with one sample there is none.
    """
    session.infer(0, 0)
    times = []
    for _ in range(repeats):
        session.infer(samples - 1, 0)
        begin = perf_counter()
        session.infer(0, 0)
        times.append(perf_counter() - begin)
    return times
