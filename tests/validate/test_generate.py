from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapeout.errors import TapeoutError
from tapeout.models import Generation
from tapeout.validate import reference
from tapeout.validate.generate import distribution, generate
from tapeout.validate.session import Facts, Logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_what_transformers_generates(make_model: Any, penalty: float) -> None:
    directory: Path = make_model("llama", num_hidden_layers=1, eos_token_id=None)
    session = reference.open_session(str(directory))
    prompt = [5, 6, 7, 5]
    wanted = Generation(repetition_penalty=penalty, max_new_tokens=24)
    expected = session._network.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        repetition_penalty=penalty,
        max_new_tokens=24,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    assert list(generate(session, prompt, wanted)) == expected
    stop = expected[7]
    stopped = list(generate(session, prompt, replace(wanted, stop_token_ids=(stop,))))
    assert stopped == expected[: expected.index(stop) + 1]
    session.close()


@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 40, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    penalty=st.sampled_from([1.0, 1.2, 0.8]),
)
def test_distribution_is_that_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 4, 50).astype(np.float32)
    seen = random.integers(0, 50, 12).tolist()
    wanted = Generation(temperature, top_p, top_k, penalty)
    process = transformers.LogitsProcessorList()
    if penalty != 1.0:
        process.append(transformers.RepetitionPenaltyLogitsProcessor(penalty))
    process.append(transformers.TemperatureLogitsWarper(temperature))
    if top_k:
        process.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1.0:
        process.append(transformers.TopPLogitsWarper(top_p))
    scores = torch.from_numpy(logits.copy())[None].double()
    expected = torch.softmax(process(torch.tensor([seen]), scores)[0], -1).numpy()
    found = distribution(logits, seen, wanted)
    # They divide by the penalty in double here and we in float32: 2^-24 relative of a score up to about 60.
    assert np.array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, atol=2e-5)


class Fixed:
    """The same logits after every token."""

    def __init__(self, logits: Sequence[float], context: int = 8) -> None:
        self.facts = Facts("fixed", "none", 0.0, 0, context)
        self.logits = np.array(logits, np.float32)
        self.length = 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        self.length += len(ids)
        assert self.length <= self.facts.context
        return np.tile(self.logits, (len(ids), 1))

    def decode(self, token: int) -> Logits:
        return np.asarray(self.prefill([token])[0])

    def reset(self) -> None:
        self.length = 0

    def tokenize(self, text: str) -> list[int]:
        return []

    def detokenize(self, ids: Sequence[int]) -> str:
        return ""

    def close(self) -> None:
        pass


def test_samples_follow_the_distribution_and_the_seed() -> None:
    session = Fixed(np.log([0.7, 0.2, 0.1]).tolist(), context=4001)
    wanted = Generation(temperature=1.0, max_new_tokens=4000)
    drawn = list(generate(session, [0], wanted, np.random.default_rng(1)))
    # 4000 draws: five standard deviations of a frequency are at most 5 * sqrt(0.25 / 4000) = 0.04.
    assert np.bincount(drawn) / 4000 == pytest.approx([0.7, 0.2, 0.1], abs=0.04)
    assert drawn == list(generate(session, [0], wanted, np.random.default_rng(1)))
    assert drawn != list(generate(session, [0], wanted, np.random.default_rng(2)))


def test_ends_of_the_context() -> None:
    session = Fixed([0, 1], context=8)
    assert len(list(generate(session, [0] * 5, Generation(max_new_tokens=100)))) == 3
    with pytest.raises(TapeoutError, match="leaves no room"):
        next(generate(session, [0] * 8))
    with pytest.raises(TapeoutError, match="no token"):
        next(generate(session, []))
