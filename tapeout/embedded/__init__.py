"""The models that ship inside the package: small, trained by the scripts beside them, and good at one thing."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from tapeout.errors import ModelError, nearest

NAMES = ("arithmetic", "count", "formula", "text2sql", "topics_v1", "topics_v2")
"""The last two are encoders."""


def path(name: str) -> Path:
    """Return the directory of an embedded model; ModelError names the embedded ones when there is none so called."""
    if name not in NAMES:
        raise ModelError(f"'{name}' is not an embedded model{nearest(name, NAMES)}.")
    return Path(str(importlib.resources.files(__name__).joinpath(name)))
