"""Generation on any session: the same sampling on every device, as transformers defines it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tapeout.errors import TapeoutError
from tapeout.models import Generation
from tapeout.validate.session import Logits, Session

__all__ = ["Said", "answer", "distribution", "generate", "penalised", "say"]


@dataclass(frozen=True)
class Said:
    """What a tokenizer and a model say of the corpus and of the tasks.

    Attributes:
        ids: of each hostile string.
        texts: what those ids are as text.
        answers: generated for each task.
    """

    ids: list[list[int]]
    texts: list[str]
    answers: list[str]


def say(session: Session, strings: Sequence[str], prompts: Sequence[str], generation: Generation) -> Said:
    """Ask a session for its tokens of strings, their text, and its answers to prompts."""
    ids = [session.tokenize(text) for text in strings]
    answers = [answer(session, prompt, generation) for prompt in prompts]
    return Said(ids, [session.detokenize(each) for each in ids], answers)


def answer(session: Session, prompt: str, generation: Generation) -> str:
    """What a session generates after a prompt, without the stop token and outer spaces."""
    ids = list(generate(session, session.tokenize(prompt), generation))
    if ids and ids[-1] in generation.stop_token_ids:
        ids.pop()
    return session.detokenize(ids).strip()


def generate(
    session: Session,
    ids: Sequence[int],
    generation: Generation | None = None,
    rng: np.random.Generator | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow ``ids``, until a stop token (which is the last one yielded) or ``max_new_tokens``.

    The session is reset first. It ends early where the session's context ends.

    Args:
        session: a model, its cache about to be used.
        ids: the prompt, at least one token.
        generation: temperature 0 is greedy; None: greedy, 256 tokens, no stop token.
        rng: where samples are drawn from; not used when greedy.

    Raises:
        TapeoutError: an empty prompt, or one that fills the context.
    """
    generation = generation or Generation()
    rng = rng or np.random.default_rng()
    seen = list(ids)
    room = session.facts.context - len(seen)
    if not seen:
        raise TapeoutError("there is nothing to continue: the prompt has no token.")
    if room < 1:
        raise TapeoutError(
            f"the prompt has {len(seen)} tokens; the context of {session.facts.context} leaves no room."
        )
    session.reset()
    # A long prompt's logits, of every token, would be larger than the model.
    logits = getattr(session, "append", session.prefill)(seen)[-1]
    most = min(generation.max_new_tokens, room)
    for new in range(1, most + 1):
        token = _next(logits, seen, generation, rng)
        yield token
        if token in generation.stop_token_ids or new == most:
            return
        seen.append(token)
        logits = session.decode(token)


def _next(logits: Logits, seen: Sequence[int], generation: Generation, rng: np.random.Generator) -> int:
    if generation.temperature == 0:
        return int(penalised(logits, seen, generation.repetition_penalty).argmax())
    probabilities = distribution(logits, seen, generation)
    return int(rng.choice(len(probabilities), p=probabilities))


def penalised(logits: Logits, seen: Sequence[int], penalty: float) -> Logits:
    """Apply the repetition penalty (CTRL, arXiv:1909.05858) to the tokens seen; float32 [vocab] to the same, new."""
    if penalty == 1.0:
        return logits
    logits = logits.copy()
    at = np.unique(np.asarray(seen))
    logits[at] = np.where(logits[at] < 0, logits[at] * np.float32(penalty), logits[at] / np.float32(penalty))
    return logits


def distribution(logits: Logits, seen: Sequence[int], generation: Generation) -> npt.NDArray[np.float64]:
    """Probabilities that the next token is drawn from, float64 [vocab], summing to 1.

    In transformers' order: repetition penalty, temperature, the ``top_k`` largest (ties with the last of them stay), then
    the fewest of those whose probabilities reach ``top_p``.
    """
    scores = (
        penalised(logits, seen, generation.repetition_penalty).astype(np.float64) / generation.temperature
    )
    if 0 < generation.top_k < len(scores):
        scores[scores < np.partition(scores, -generation.top_k)[-generation.top_k]] = -np.inf
    probabilities: npt.NDArray[np.float64] = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    if generation.top_p < 1.0:
        order = np.argsort(probabilities, kind="stable")  # ascending
        # A token goes when it and all that are less likely hold no more than what top_p leaves out; one always stays.
        gone = np.cumsum(probabilities[order]) <= 1.0 - generation.top_p
        probabilities[order[:-1][gone[:-1]]] = 0.0
        probabilities /= probabilities.sum()
    return probabilities
