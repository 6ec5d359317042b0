"""Emitted pipelines and our action, run: each job's lines by bash in a bare folder, with nothing but what its system brings there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pipelines as ci
import pytest
import yaml
from runners import BIN, Ran, System

from tapeout.matrix.pipelines import pipeline
from tapeout.pack import Package

ROOT = Path(__file__).resolve().parents[2]
CELL = "count.int8.rtn.null"
FILE = """
tokens = 64
[matrix]
models = ["count"]
schemes = ["int8"]
targets = ["null"]
[ci]
install = 'command -v tapeout; echo "extras $EXTRAS"'
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "m.toml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def proven(ran: Ran) -> None:
    """The index job's folder has the page, JUnit and a whole package."""
    packages = ran.folder / "packages"
    assert ran.status == 0, ran.said
    assert Package.open(packages / CELL).damage() == []
    junit = ElementTree.parse(packages / "index.xml")
    assert junit.find(".//testcase") is not None
    assert [junit.find(f".//{bad}") for bad in ("failure", "error")] == [None, None]
    assert (packages / "index.md").read_text().startswith("✅ **PASSED** `m`: 1 cells: 1 passed")


@pytest.fixture(scope="module")
def github(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Every job of GitHub's pipeline, the index twice: before there is any cell, and at the end."""
    work = tmp_path_factory.mktemp("github")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        Path("m.toml").write_text(FILE)
        codes, cell, index = ci.jobs("github", pipeline(Path("m.toml"), "github"))
    system = System(work / "system", {"m.toml": FILE})

    def run(job: ci.Job) -> Ran:
        row = {f"matrix.{key}": value for key, value in job.raw["row"].items()}
        return system.github(job.raw["steps"], row, job.env)

    ran = {"codes": run(codes), "early": run(index)}
    shutil.rmtree(system.artifacts / "matrix-index")
    return {**ran, "cell": run(cell), "index": run(index)}


@pytest.mark.slow
def test_github(github: dict[str, Ran]) -> None:
    assert github["codes"].status == 0, github["codes"].said
    system = github["codes"].folder.parents[1]
    (kept,) = (system / "caches").iterdir()
    assert kept.name.startswith("tapeout-")
    assert [path.parent.name for path in kept.rglob("*.json")] == ["stores"]
    assert github["early"].status == 1  # and the summary says which cell is missing
    assert f"`{CELL}` not run" in (github["early"].folder.parent / "summary").read_text()
    made = github["cell"]
    assert made.status == 0, made.said
    assert "extras reference" in made.said
    assert "codes taken from .tapeout." in made.said
    proven(github["index"])
    summary = github["index"].folder.parent / "summary"
    assert summary.read_text() == (github["index"].folder / "packages" / "index.md").read_text()
    files = {path.name for path in (system / "artifacts" / "matrix-index").iterdir()}
    assert files == {"index.html", "index.md", "index.xml"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gitlab", "buildkite"])
def test_gitlab_and_buildkite(repository: Path, github: dict[str, Ran], name: str) -> None:
    """Their caches have what an earlier pipeline made: the cell's package is there, and is not made again."""
    codes, cell, index = ci.jobs(name, pipeline(Path("m.toml"), name))
    system = System(repository / name, {"m.toml": FILE})
    for job in (codes, cell):
        ran = system.plain(job, github["cell"].folder / ".tapeout")
        assert ran.status == 0, ran.said
    assert "taken from .tapeout." in ran.said
    last = system.plain(index)
    proven(last)
    if name == "buildkite":
        assert (last.folder / "annotation").read_text() == (last.folder / "packages" / "index.md").read_text()
    # A cell that nothing came of, as when its machine was lost.
    for path in system.artifacts.iterdir():
        path.rename(repository / path.name)
    (system.artifacts / "cell-none.tar").write_bytes(bytes(10240))  # an archive of nothing
    lost = system.plain(index)
    assert lost.status == 1
    assert "nobody ran it" in (lost.folder / "packages" / "index.md").read_text()


def test_our_action_is_sound(tmp_path: Path) -> None:
    path = ROOT / ".github/actions/tapeout-export/action.yml"
    subprocess.run([BIN / "check-jsonschema", "--builtin-schema", "vendor.github-actions", path], check=True)
    steps = yaml.safe_load(path.read_text())["runs"]["steps"]
    for number, step in enumerate(steps):
        assert "${{" not in step.get("run", "")  # inputs are variables, never a part of a script
        assert "run" in step or re.fullmatch("actions/[a-z-]+@[0-9a-f]{40}", step["uses"])
        (tmp_path / f"{number}.sh").write_text(step.get("run", ""))
    subprocess.run([BIN / "shellcheck", "--shell", "bash", *tmp_path.glob("*.sh")], check=True)


@pytest.mark.slow
def test_our_action(repository: Path) -> None:
    action = yaml.safe_load((ROOT / ".github/actions/tapeout-export/action.yml").read_text())
    inputs = {key: value.get("default") for key, value in action["inputs"].items()}
    inputs |= {"target": "null", "model": "count", "install": "command -v tapeout", "out": "a b"}
    recipe = "tokens = 64\n"
    system = System(
        repository / "action", {"it's mine.toml": recipe, "none.toml": recipe + "limits = {kl = 0.0}\n"}
    )

    def run(**given: str) -> Ran:
        context = {f"inputs.{key}": value for key, value in {**inputs, **given}.items()}
        return system.github(action["runs"]["steps"], context, {})

    ran = run(scheme="int4-g32", args="--recipe \"it's mine.toml\" --require='lowering'")
    assert ran.status == 0, ran.said
    package = Package.open(ran.folder / "a b")
    outputs = {key: ci.resolve(each["value"], ran.outputs) for key, each in action["outputs"].items()}
    assert outputs == {"passed": "true", "package": "a b", "root-digest": package.manifest["root_sha256"]}
    assert package.manifest["scheme"] == "int4-g32"
    assert Package.open(system.artifacts / "package").damage() == []
    assert [path.name[:14] for path in system.caches.iterdir()] == ["tapeout-export"]
    (stored,) = system.caches.glob("*/store/*/quantization.json")
    assert json.loads(stored.read_text())["scheme"] == "int4-g32"
    # A gate that fails: the package is kept all the same, and the job is red.
    (system.artifacts / "package").rename(repository / "passed")
    failed = run(scheme="int4-g32", args="--recipe none.toml")
    assert failed.status == 1
    assert failed.outputs["steps.export.outputs.passed"] == "false"
    assert not Package.open(system.artifacts / "package").passed
    # What is no input of ours: the command's own words, and no package.
    refused = run(scheme="int4-g23", artifact="other")
    assert refused.status == 2
    assert "did you mean 'int4-g32'" in refused.said
    assert "steps.export.outputs.package" not in refused.outputs
