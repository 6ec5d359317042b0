"""What a matrix file says of CI systems, and what holds where it says nothing: labels of runners, what is installed on them.

[ci]
install = 'python -m pip install -c constraints.txt ".[$EXTRAS]"'   # default: this version from the package index
python = "3.12"

[runners]                       # by target, or by what cells call it; "codes" and "index" are the other jobs
cpu = "ubuntu-24.04"
nvidia = ["self-hosted", "gpu", "nvidia"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from tapeout import __version__
from tapeout.matrix.machines import MACHINES

Runners = Mapping[str, str | list[str]]

SYSTEMS: Final = ("github", "gitlab", "buildkite")
OTHER_JOBS: Final = ("codes", "index")
"""Jobs that are no cell's, as ``[runners]`` names them."""

_EXTRAS: Final = {
    "apple": "reference,apple",
    "cpu": "cpu",
    "cpu onnx": "onnx",
    "mobile": "cpu",
    "mobile onnx": "onnx",
    "nvidia": "nvidia",
    "rocm": "rocm,onnx",
}
"""Extras of tapeout that a target's gates need, by target, or target and format; any other one needs the reference alone."""


class Ci(BaseModel):
    """The table ``[ci]``.

    Attributes:
        install: lines of bash that bring the command ``tapeout``; ``$EXTRAS`` holds the extras that the job needs.
        python: the version that is set up. timeout_minutes: of each job.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    install: str = f'python -m pip install "tapeout[$EXTRAS]=={__version__}"'
    python: str = "3.11"
    timeout_minutes: int = Field(default=120, gt=0)


def extras(kind: str, options: Mapping[str, object]) -> str:
    """The extras of tapeout that make and prove packages for a target with these options."""
    return _EXTRAS.get(f"{kind} {options.get('format')}", _EXTRAS.get(kind, "reference"))


def runner(system: str, said: Runners, *names: str) -> tuple[str, ...]:
    """Labels of the runner of a job: by the first of its ``names`` that the matrix file or else the table of machines has.

    Buildkite's are rules, of which a bare word is a queue.
    """
    defaults: Mapping[str, Sequence[str]] = {target: each[system] for target, each in MACHINES.items()}
    labels = next(
        (table[name] for table in (said, defaults) for name in names if name in table), defaults[""]
    )
    every = (labels,) if isinstance(labels, str) else tuple(labels)
    return tuple(f"queue={label}" if system == "buildkite" and "=" not in label else label for label in every)
