"""A table of operations: each is a function whose parameters are the operation's own, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import Parameter, signature
from typing import Any

__all__ = ["Registry"]


class Registry(dict[str, Callable[..., Any]]):
    """Operations by their MIL name."""

    def add(self, *names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A decorator that enters a function under ``names``."""

        def entered(kernel: Callable[..., Any]) -> Callable[..., Any]:
            self.update(dict.fromkeys(names, kernel))
            return kernel

        return entered

    def wrong(self, op: str, given: Iterable[str]) -> str:
        """What is wrong with the parameters that an operation is given; empty: nothing."""
        known = signature(self[op]).parameters
        given = set(given)
        if unknown := sorted(given - set(known)):
            return f"has a parameter '{unknown[0]}' that is not known (known: {', '.join(known)})"
        needed = {name for name, each in known.items() if each.default is Parameter.empty}
        if missing := sorted(needed - given):
            return f"lacks its parameter '{missing[0]}'"
        return ""
