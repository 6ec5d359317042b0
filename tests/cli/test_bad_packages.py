"""Packages of both formats that are not what they were, and prompts that do not fit: words, and the exit status."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import tapeout

from tapeout.generated import write_model

pytest.importorskip("onnxruntime")
pytest.importorskip("llama_cpp")
Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]
RECIPE = 'scheme = "int4-g32"\ntokens = 40\nlimits = {kl = 1e3, top1 = 0.0, perplexity = 1e3}\n'
FORMATS = ("gguf", "onnx")


def said(*arguments: str | Path, status: int = 2) -> str:
    """What a command says that stops, in one paragraph."""
    done = tapeout(*arguments)
    lines = [line for line in done.stderr.splitlines() if line.startswith("tapeout:")]
    assert done.returncode == status, done.stderr
    assert len(lines) == 1, done.stderr
    return lines[0]


def make(work: Path) -> None:
    """A model and its packages, one a format."""
    model = write_model(work / "model", config={"head_dim": 16, "max_position_embeddings": 64}, dtype="F32")
    (work / "recipe.toml").write_text(RECIPE)
    for kind in FORMATS:
        options = ("--format", kind, "--threads", "1", "--recipe", work / "recipe.toml", "--out", work / kind)
        assert tapeout("export", "cpu", model, *options).returncode == 0


@pytest.fixture
def packages(once: Once) -> Path:
    place, _ = once("bad-packages", make)
    return place


@pytest.fixture
def copied(packages: Path, tmp_path: Path) -> Path:
    """The ONNX package, to be damaged."""
    return Path(shutil.copytree(packages / "onnx", tmp_path / "package"))


@pytest.mark.parametrize("kind", FORMATS)
def test_prompts_that_do_not_fit(packages: Path, kind: str) -> None:
    long = said("run", packages / kind, "--prompt", "a" * 100)
    assert "the prompt has 100 tokens; the context of 64 leaves no room" in long
    assert "there is nothing to continue: the prompt has no token" in said(
        "run", packages / kind, "--prompt", ""
    )
    full = tapeout("run", packages / kind, "--prompt", "a" * 63, "--max-new-tokens", "9", "--json")
    assert full.returncode == 0
    assert len(json.loads(full.stdout)["token_ids"]) <= 1  # there was room for one


def missing(package: Path) -> None:
    (package / "artifact" / "model.onnx.data").unlink()


def short(package: Path) -> None:
    data = package / "artifact" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-3000])


def too_large(package: Path) -> None:
    with (package / "artifact" / "model.onnx").open("r+b") as opened:
        opened.truncate(2**31 + 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "run", "gate"),
    [
        (missing, "artifact/model.onnx.data is missing", "integrity"),
        (short, r"artifact/model.onnx.data has \d+ bytes instead of \d+", "integrity"),
        (too_large, "artifact/model.onnx has 2147483653 bytes instead of", "integrity"),
    ],
)
def test_files_that_are_missing_short_or_too_large(
    packages: Path, copied: Path, damage: Callable[[Path], None], run: str, gate: str
) -> None:
    """What runs it says so before the runtime does; what validates it fails the gate."""
    import re

    damage(copied)
    for verb in (("run", copied, "--prompt", "ab"), ("bench", copied)):
        assert re.search(run, said(*verb)), verb
    done = tapeout("validate", copied, "--json")
    assert done.returncode == 1
    gates = {each["name"]: each["status"] for each in json.loads(done.stdout)["gates"]}
    assert gates[gate] == "failed"
    assert "passed" not in gates.values()


def test_a_graph_beyond_protobuf_is_named(copied: Path) -> None:
    too_large(copied)
    words = said("inspect", copied / "artifact" / "model.onnx")
    assert "has 2.15 GB; a graph may have 2 GiB: its weights belong into external data" in words


def swapped(package: Path, other: Path) -> None:
    """The data file of another model of the same shapes."""
    shutil.copyfile(other / "artifact" / "model.onnx.data", package / "artifact" / "model.onnx.data")


def one_byte(package: Path, at: int) -> None:
    path = package / "artifact" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def gates_of(package: Path, model: Path) -> dict[str, dict[str, Any]]:
    done = tapeout("validate", package, "--model", model, "--json")
    assert done.returncode == 1
    return {each["name"]: each for each in json.loads(done.stdout)["gates"]}


@pytest.mark.slow
def test_data_of_another_model(packages: Path, copied: Path, tmp_path: Path) -> None:
    """It loads and runs, and every gate that looks at the weights says no."""
    other = write_model(
        tmp_path / "other", config={"head_dim": 16, "max_position_embeddings": 64}, dtype="F32", seed=1
    )
    options = ("--format", "onnx", "--threads", "1", "--recipe", packages / "recipe.toml")
    assert tapeout("export", "cpu", other, *options, "--out", tmp_path / "second").returncode == 0
    swapped(copied, tmp_path / "second")
    assert "artifact/model.onnx.data differs from its digest" in said("verify", copied)
    gates = gates_of(copied, packages / "model")
    failed = {name for name, each in gates.items() if each["status"] == "failed"}
    assert failed >= {"integrity", "codes", "lowering/weights", "lowering/runtime"}
    # Without the model its golden logits are compared.
    bare = tapeout("validate", copied, "--json")
    assert bare.returncode == 1
    assert {each["name"]: each["status"] for each in json.loads(bare.stdout)["gates"]}["golden"] == "failed"


def test_one_byte_of_the_graph(packages: Path, copied: Path) -> None:
    """Somewhere in the middle: whatever it was, the integrity gate says so, and nothing crashes."""
    size = (copied / "artifact" / "model.onnx").stat().st_size
    one_byte(copied, size // 2)
    assert "artifact/model.onnx differs from its digest" in said("verify", copied)
    assert gates_of(copied, packages / "model")["integrity"]["status"] == "failed"
