"""Every registered target, whoever wrote it, passes the conformance suite."""

from __future__ import annotations

from pathlib import Path

import pytest
from thinned import thinned

from tapeout import targets
from tapeout.conformance import Case, cases, check

# mobile carries what cpu carries, by the same code, in minutes: of mobile the scheme that is its own.
# In the order of their codes: what the reference says of them is asked once.
CASES = sorted(
    (
        case
        for name in targets.names()
        for case in cases(name)
        if name != "mobile" or case.scheme == "int4-g32"
    ),
    key=lambda case: (case.model, case.scheme),
)


def test_there_are_targets() -> None:
    assert {"cpu", "mobile", "null"} <= set(targets.names())


@pytest.mark.parametrize(
    "case", thinned(CASES, alike=lambda case: case.target.split()[0]), ids=map(str, CASES)
)
def test_target(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)
