"""The page that explains an error: every one that is named exists, and travels in the package."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import tapeout
from sessions import RECORD

from tapeout import errors, pages
from tapeout.errors import GateFailed, MissingToolchain, ModelError, SchemeError, TapeoutError
from tapeout.quantize import Scheme
from tapeout.targets import get
from tapeout.validate.worker import _described

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TapeoutError)]


def named() -> Iterator[str]:
    """Each page that a call names, anywhere in the sources: ``page="…"``."""
    for folder in ("tapeout", "models", "quantize", "exporters", "validate", "targets"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    for each in node.keywords:
                        if each.arg == "page" and isinstance(each.value, ast.Constant) and each.value.value:
                            yield each.value.value


def test_every_page_that_is_named_exists() -> None:
    known = set(pages.names())
    assert {kind.page for kind in KINDS} <= known
    assert set(pages._SUBJECTS.values()) <= known
    found = list(named())
    assert found
    assert set(found) <= known


def test_every_subject_is_a_module() -> None:
    assert [name for name in pages._SUBJECTS if importlib.util.find_spec(name) is None] == []


def test_pages_are_those_of_the_repository() -> None:
    docs = ROOT / "docs"
    shipped = [
        each for pattern in ("*.md", "decisions/*.md", "tutorials/*.md") for each in docs.glob(pattern)
    ]
    assert pages.names() == sorted(each.relative_to(docs).with_suffix("").as_posix() for each in shipped)
    for each in shipped:
        name = each.relative_to(docs).with_suffix("").as_posix()
        assert pages.read(name) == each.read_text(encoding="utf-8")
        assert pages.title(name)


def caught(raises: object, *arguments: object, **keywords: object) -> TapeoutError:
    with pytest.raises(TapeoutError) as found:
        raises(*arguments, **keywords)  # type: ignore[operator]
    return found.value


def test_which_page_explains() -> None:
    scheme = caught(Scheme.parse, "int4-g33")
    assert type(scheme) is SchemeError
    assert pages.explaining(scheme) == "quantization"  # its kind's
    assert pages.explaining(caught(get, "cpuu")) == "targets"  # of tapeout.targets
    assert pages.explaining(caught(get("nvidia"), context=0)) in {"nvidia", "targets"}
    assert pages.explaining(TapeoutError("never raised")) == "errors"

    def given() -> None:
        raise ModelError("…", page="long-context")

    assert pages.explaining(caught(given)) == "long-context"
    # What is missing is doctor's, whoever found it.
    code: dict[str, object] = {"__name__": "tapeout.exporters.trtllm.anything", "errors": errors}
    exec("def lacks(): raise errors.MissingToolchain('…')\ndef odd(): raise errors.ModelError('…')", code)
    assert pages.explaining(caught(code["lacks"])) == "doctor"
    assert pages.explaining(caught(code["odd"])) == "nvidia-trtllm"


def test_a_page_comes_from_a_worker_too() -> None:
    def given() -> None:
        raise ModelError("…", page="onnx")

    assert _described(caught(given))["error"]["page"] == "onnx"
    assert _described(ValueError("…"))["error"]["page"] is None


def test_the_command_line_names_it() -> None:
    said = tapeout("inspect", "no/such/thing/at/all", status=2).stderr.splitlines()
    assert said[0].startswith("tapeout: ")
    assert said[-1] == f"see: tapeout docs {ModelError.page}"
    assert tapeout("verify", status=2).stderr.splitlines()[-1] == "see: tapeout docs errors"
    assert tapeout("verify", "nowhere", status=2).stderr.splitlines()[-1] == "see: tapeout docs package"


def test_links_on_a_terminal_are_names_of_pages() -> None:
    text = pages.for_terminal("tutorials/edge-engineer")
    assert "On the device (`device-reports`)" in text  # ../device-reports.md
    assert "export engineer (`tutorials/export-engineer`)" in text
    assert ".md)" not in text
    assert "`gates`" in pages.for_terminal("errors")
    for name in pages.names():
        assert "](" not in pages.for_terminal(name).replace("](http", "").replace("](#", "").replace(
            "](diff.svg", ""
        ).replace("](curve.svg", ""), name


def test_docs() -> None:
    listed = tapeout("docs", status=0)
    assert all(name in listed.stderr for name in ("gates", "errors", MissingToolchain.page, GateFailed.page))
    done = tapeout("docs", "gates", status=0)
    assert done.stdout == (ROOT / "docs" / "gates.md").read_text(encoding="utf-8")
    assert done.stderr == ""
    shown, status = RECORD["run"]("tapeout docs errors", ROOT, RECORD["environment"](ROOT))
    assert status == 0
    assert "Exit status" in shown
    assert max(map(len, shown.splitlines())) <= RECORD["WIDTH"], "it is set for the terminal"
    lost = tapeout("docs", "gate", status=2)
    assert "there is no page 'gate'; did you mean 'gates'?" in lost.stderr


@pytest.mark.parametrize("name", ["../pyproject", "/etc/hostname", "gates.md", ""])
def test_nothing_else_is_read(name: str) -> None:
    with pytest.raises(TapeoutError, match="there is no page"):
        pages.read(name)
