"""Tables of cells that are too many for every run of ``make test``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest


def thinned(cells: Iterable[Any], alike: Callable[[Any], Hashable] = lambda cell: None) -> list[Any]:
    """Parameters in the same order: of those that are alike one stays, far from the one of the group before, and the others are slow."""
    cells = list(cells)
    groups: dict[Hashable, list[int]] = {}
    for place, cell in enumerate(cells):
        groups.setdefault(alike(cell), []).append(place)
    kept = {places[31 * turn % len(places)] for turn, places in enumerate(groups.values())}
    return [
        pytest.param(
            *(cell if isinstance(cell, tuple) else (cell,)), marks=() if place in kept else pytest.mark.slow
        )
        for place, cell in enumerate(cells)
    ]
