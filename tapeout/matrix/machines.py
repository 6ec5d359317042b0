"""Which machine has a target's device: one table, by target, of what each CI system and Ray call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

MACHINES: Final[Mapping[str, Mapping[str, Sequence[str]]]] = {
    "apple": {
        "github": ("macos-15",),
        "gitlab": ("saas-macos-medium-m1",),
        "buildkite": ("queue=macos",),
        "ray": ("macos",),
    },
    "nvidia": {
        "github": ("self-hosted", "gpu", "nvidia"),
        "gitlab": ("saas-linux-medium-amd64-gpu-standard",),
        "buildkite": ("queue=nvidia",),
        "ray": ("nvidia", "GPU"),
    },
    "rocm": {
        "github": ("self-hosted", "gpu", "rocm"),
        "gitlab": ("gpu", "rocm"),
        "buildkite": ("queue=rocm",),
        "ray": ("amd", "GPU"),
    },
    "": {
        "github": ("ubuntu-24.04",),
        "gitlab": (),
        "buildkite": ("queue=default",),
        "ray": (),
    },
}
"""Labels by target, "" being any other. A CI system's runner has all of them. Of Ray's resources one is asked for, the first that the cluster has:
a name of one's own (``ray start --resources '{"macos": 1}'``), or Ray's GPU."""

LABELS: Final[Mapping[str, Sequence[str]]] = {target: each["ray"] for target, each in MACHINES.items()}
"""Ray's, by target."""
