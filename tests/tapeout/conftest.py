"""What the tests of packages share: sessions that run in this process."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tapeout.models import Generation
from tapeout.validate.generate import Said, say
from tapeout.validate.session import SessionSpec
from tapeout.validate.timing import Timing, measure, measure_encoding


class Here:
    """A worker's session in this process: a worker takes seconds to load torch."""

    ended = False

    def __init__(self, spec: SessionSpec) -> None:
        self._factory = spec.imported()
        self.open(spec.arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, arguments: Mapping[str, Any]) -> None:
        one = {"threads": 1} if "threads" in inspect.signature(self._factory).parameters else {}
        self._session = self._factory(**{**arguments, **one})

    def release(self) -> None:
        self._session.close()

    def say(self, strings: Sequence[str], prompts: Sequence[str], generation: Generation) -> Said:
        return say(self._session, strings, prompts, generation)

    def time(self, prompt_tokens: int, new_tokens: int, repeats: int, warm: bool = True) -> Timing:
        return measure(self._session, prompt_tokens, new_tokens, repeats, warm=warm)

    def cache_bytes(self, tokens: int) -> int | None:
        known = getattr(self._session, "cache_bytes", None)
        return known(tokens) if known else None

    def time_encoding(self, batch: int, tokens: int, repeats: int) -> list[float]:
        return measure_encoding(self._session, batch, tokens, repeats)


@pytest.fixture(scope="session")
def here() -> type[Here]:
    """Takes the place of ``open_session``."""
    return Here
