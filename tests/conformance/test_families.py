"""Every cell of docs/families.md: what it says was carried passes the gates again, and what was refused is refused for that reason."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from thinned import thinned

pytest.importorskip("llama_cpp")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
# As a module that workers are not started from.
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "families.py"))
WRITTEN = SCRIPT["written"]((ROOT / "docs" / "families.md").read_text(encoding="utf-8"))
CELLS = SCRIPT["CELLS"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("codes")


def test_the_table_has_every_cell() -> None:
    assert len(set(CELLS)) == len(CELLS)
    assert set(WRITTEN) == set(CELLS), "run scripts/families.py"


@pytest.mark.parametrize(
    ("row", "form", "scheme"),
    thinned(CELLS, alike=lambda cell: cell[1]),
    ids=["-".join(cell).replace(", ", "-") for cell in CELLS],
)
def test_cell(row: str, form: str, scheme: str, tmp_path: Path, shared: Path) -> None:
    said = SCRIPT["cell"](row, form, scheme, tmp_path, shared)
    assert "**" not in said, said
    refused = "refused: "
    if said.startswith(refused) or WRITTEN[row, form, scheme].startswith(refused):
        assert said == WRITTEN[row, form, scheme], "run scripts/families.py"
