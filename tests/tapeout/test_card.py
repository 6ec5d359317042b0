"""The card: what a model says of itself is shown in it as the text that it is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tapeout import target
from tapeout.card import card, plain
from tapeout.errors import ModelError
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.pack import Package, pack
from tapeout.quantize import quantize
from tapeout.recipe import Recipe
from tapeout.validate import GateResult, Report

MARKDOWN = MarkdownIt("gfm-like", {"html": True, "linkify": False}).disable("linkify")
HOSTILE = "<script>alert(1)</script>[x](javascript:alert(1))|`$(id)`&lt;b&gt; https://evil.example @admin"


class Tags(HTMLParser):
    """Names of the tags of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(max_size=60) | st.text(alphabet="<>[]()`*_#|!&~-+=\\:/@\n\r\t 1.aw", max_size=60))
def test_a_value_is_the_text_that_it_is(value: str) -> None:
    """Whatever it holds, as a paragraph and in a cell of a table it becomes one line of text and no element."""
    shown = plain(value)
    assert "\n" not in shown
    page = Tags(MARKDOWN.render(f"{shown}\n"))
    assert page.tags <= {"p"}
    row = Tags(MARKDOWN.render(f"| a | b |\n|---|---|\n| licence | {shown} |\n"))
    assert row.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    words = "".join("" if not c.isprintable() or c.isspace() else c for c in value)
    assert re.sub(r"\s", "", page.text) == words


def test_a_model_that_means_harm(tmp_path: Path) -> None:
    """Name, licence and notes: no tag, no link and no line of theirs is in the card, and its commands are one command."""
    model = write_model(tmp_path / "evil$(touch owned);`id` <b>\n# Title", dtype="F32")
    (model / "README.md").write_text(f"---\nlicense: {HOSTILE.replace(' ', '')}\n---\n")
    quant = quantize(load(model), "int8", out=tmp_path / "codes")
    assert quant.model.name == "evil-touch-owned-id-b-Title"
    (tmp_path / "out" / "artifact").mkdir(parents=True)
    device = target("null")
    artifact = replace(
        device.export(quant, tmp_path / "out" / "artifact"), notes=(f"{HOSTILE}\n\n# A heading",)
    )
    golden = (((1, 2), np.zeros(272, np.float32)),)
    gates = (GateResult("codes", "passed", "tensors", 0.0, 0.0, HOSTILE),)
    report = Report(quant.model.name, "null", "int8", gates, notes=(HOSTILE,), golden=golden)
    package = pack(artifact, report, quant, device, Recipe.of({}).kept(quant))
    _, front, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    licence, tags = front.splitlines()
    assert json.loads(licence.removeprefix("license: ")) == package.manifest["model"]["licence"]
    assert tags == "tags: [tapeout, plain, int8]"
    harmless(body)
    html = (tmp_path / "out" / "report.html").read_text()
    assert "alert(1)" in html
    assert "<script>alert" not in html
    assert Package.open(tmp_path / "out").damage() == []


def harmless(body: str) -> None:
    """Nothing that is followed, run or fetched, and one title."""
    page = Tags(MARKDOWN.render(body))
    assert not page.tags & {"script", "a", "b", "img"}
    assert len(re.findall("^# ", body, re.MULTILINE)) == 1


def test_labels_and_licences_of_others(bare: Path) -> None:
    """What an encoder calls its classes, and everything else that is a string in a manifest."""
    facts = json.loads((bare / "tapeout.json").read_text())
    facts["model"] |= {"name": HOSTILE, "family": HOSTILE, "licence": HOSTILE, "output": "logits"}
    facts["model"]["labels"] = ["fine", f"{HOSTILE}\n\n# a heading"]
    facts["needs"]["runtime"] = facts["generation"]["top_k"] = f"{HOSTILE}\n# a heading"
    artifact = Package.open(bare).artifact
    for graph in ("built", "optimum"):
        text = card(artifact, {**facts, "graph": graph}, "run it", ["licences/model/LICENSE"], [HOSTILE])
        harmless(text.split("---\n", 2)[2])
        assert "fine, \\<script\\>" in text


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        ("Mistral-7B-v0.1", "Mistral-7B-v0.1"),
        ("模型", "模型"),
        ("a b\nc", "a-b-c"),
        ("--help", "help"),
        ("...", "model"),
        ("x" * 250, "x" * 180),
        ("$(id)", "id"),
    ],
)
def test_names_of_models_can_be_names_of_files(tmp_path: Path, given_name: str, name: str) -> None:
    directory = write_model(tmp_path / "model", dtype="F32")
    assert load(directory.rename(tmp_path / given_name)).name == name


def test_generation_settings_are_numbers(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", dtype="F32")
    (directory / "generation_config.json").write_text('{"eos_token_id": ["<script>"]}')
    with pytest.raises(ModelError, match=r"generation_config\.json has a value of the wrong type"):
        _ = load(directory).generation


def test_a_licence_that_is_none(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", dtype="F32")
    with (directory / "LICENSE").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ModelError, match="as a licence; what fits"):
        load(directory).licence_files()
