"""The package: what is in it, that the same inputs give the same one anywhere, and that damage shows."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tapeout import __version__, cli
from tapeout.build import export, target
from tapeout.errors import PackageError
from tapeout.files import canonical_json
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.pack import Package
from tapeout.quantize import quantize
from tapeout.recipe import Recipe
from tapeout.validate import GateResult, Options, Report

MEASURED = {"golden.safetensors", "report.html", "report.json", "report.md", "report.xml", "sbom.cdx.json"}
BESIDE = MEASURED | {"licences/runtime/transformers/LICENSE", "provenance.json"}
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
LOOSE = Recipe.of({"tokens": 40, "limits": {"kl": 1e3, "top1": 0.0, "perplexity": 1e3}})


@dataclass(frozen=True)
class Made:
    """A package, its report, and the model that it was made from."""

    package: Package
    report: Report
    model: Path

    @property
    def root(self) -> Path:
        return self.package.directory


def write(directory: Path) -> Path:
    """A small model with everything that a package takes along: chat template, licence, a sliding window."""
    model = write_model(directory, "mistral", {"sliding_window": 100}, dtype="F32")
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (model / "LICENSE").write_text("Do as you like.")
    (model / "NOTICE.txt").write_text("Made by a test.")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, here: Any) -> Made:
    """One export whose gates all ran, for the ``null`` target."""
    pytest.importorskip("transformers")
    work = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPEOUT_CACHE", str(work / "cache"))
        patch.setattr("tapeout.validate.worker.borrow", here)
        patch.setattr("tapeout.validate.evidence.borrow", here)
        model = write(work / "small")
        package, report = export(target("null"), model, work / "out", LOOSE)
    return Made(package, report, model)


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.root, tmp_path / "copied"))


@contextmanager
def verdict(status: str) -> Iterator[None]:
    """Exports in this block are not validated: one gate has this status."""

    def judged(artifact: Any, model: Any, quant: Any, device: Any, options: Options) -> Report:
        gate = GateResult("codes", status, "tensors", 1.0, 0.0, "as the test says")  # type: ignore[arg-type]
        golden = (((1, 2), np.arange(272, dtype=np.float32)),)
        return Report(model.name, device.name, quant.scheme.name, (gate,), notes=("a note",), golden=golden)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tapeout.build.validate", judged)
        yield


def contents(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def test_layout(made: Made) -> None:
    files = contents(made.root).keys()
    top = {name for name in BESIDE if "/" not in name}
    assert {name for name in files if "/" not in name} == {"tapeout.json", "README.md", "check.py"} | top
    assert {name.split("/")[0] for name in files if "/" in name} == {"artifact", "licences", "tokenizer"}
    assert {name for name in files if name.startswith("tokenizer/")} == {
        "tokenizer/chat_template.jinja",
        "tokenizer/generation_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }
    listed = {f"artifact/{file}" for file in made.package.artifact.files}
    assert {name for name in files if name.startswith("artifact/")} == listed
    assert (made.root / "tokenizer" / "chat_template.jinja").read_text() == TEMPLATE


def test_the_tokenizer_is_the_models(made: Made) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (made.root / "tokenizer" / name).read_bytes() == (made.model / name).read_bytes()
    opened = Package.open(made.root)
    assert opened.chat_template == TEMPLATE
    assert opened.tokenizer_config["eos_token"] == "<eos>"
    assert opened.generation == load(made.model).generation
    assert opened.generation.stop_token_ids == (256,)


def test_the_manifest_has_the_digest_and_size_of_every_file(made: Made) -> None:
    manifest = json.loads((made.root / "tapeout.json").read_text())
    found = contents(made.root)
    assert (made.root / "tapeout.json").read_text() == canonical_json(manifest)
    del found["tapeout.json"]
    entries = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in found.items()
    }
    assert manifest["files"] | manifest["beside"] == entries
    assert manifest["beside"].keys() == BESIDE


def test_facts_of_the_manifest(made: Made) -> None:
    manifest = Package.open(made.root).manifest
    quant = quantize(load(made.model), "int8")
    assert manifest["format_version"] == 1
    assert manifest["tapeout"] == __version__
    assert manifest["passed"] is True
    assert manifest["model"] == {
        "name": "small",
        "family": "mistral",
        "licence": "apache-2.0",
        "source_sha256": quant.source_sha256,
    }
    assert (manifest["scheme"], manifest["rounding"]) == ("int8", "rtn")
    assert manifest["codes_sha256"] == quant.digest
    assert manifest["target"] == {"name": "null", "options": {}}
    assert manifest["schemes"]["model.layers.1.mlp.down_proj"] == "int8"
    assert "model.norm" not in manifest["schemes"]
    needs = manifest["needs"]
    assert needs["runtime"] == "transformers and torch"
    # float32 keys and values: 2 layers, 4 heads of 8, a window of 100 tokens.
    assert needs["key_value_cache_bytes"] == 4 * 2 * 2 * 4 * 8 * 100
    weights = sum(path.stat().st_size for path in (made.root / "artifact").iterdir())
    assert needs["memory_bytes"] == weights + needs["key_value_cache_bytes"] + needs["work_bytes"]
    assert needs["work_bytes"] > 4 * 256 * (
        272 + 2 * 8 * 256
    )  # logits and scores of a whole prompt, at least


def test_opened_again_it_is_the_same(made: Made) -> None:
    opened = Package.open(made.root)
    assert canonical_json(opened.manifest) == canonical_json(made.package.manifest)
    assert opened.artifact == made.package.artifact
    assert opened.artifact.directory == made.root / "artifact"
    assert opened.target() == target("null")
    assert opened.passed


def test_options_of_the_target_come_back(made: Made, tmp_path: Path) -> None:
    with verdict("passed"):
        package, _ = export(target("null", threads=3), made.model, tmp_path / "out")
    assert Package.open(package.directory).target() == target("null", threads=3)


def test_the_root_digest_is_that_of_what_it_covers(made: Made) -> None:
    manifest = dict(made.package.manifest)
    root = manifest.pop("root_sha256")
    covered = {key: value for key, value in manifest.items() if key not in ("beside", "passed")}
    assert root == hashlib.sha256(canonical_json(covered).encode()).hexdigest()
    assert not BESIDE & covered["files"].keys()
    assert {"README.md", "tokenizer/tokenizer.json", "artifact/config.json"} <= covered["files"].keys()


@pytest.mark.parametrize(("name", "options"), [("null", {"threads": 1}), ("cpu", {})])
def test_the_same_inputs_give_the_same_bytes_anywhere(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "cpu":
        pytest.importorskip("gguf")
    roots, packages = set(), []
    for place in ("one", "deeper/two"):
        work = tmp_path / place
        work.mkdir(parents=True)
        monkeypatch.chdir(work)
        monkeypatch.setenv("TAPEOUT_CACHE", str(work / "cache"))
        write(work / "model")
        with verdict("passed"):
            package, _ = export(target(name, **options), "model", Path(f"{work.name}-out"), LOOSE)
        roots.add(package.manifest["root_sha256"])
        packages.append(contents(work / f"{work.name}-out"))
    assert len(roots) == 1
    assert packages[0] == packages[1]
    assert packages[0].keys() >= MEASURED | {"provenance.json"}


def test_what_was_measured_does_not_change_the_root_digest(made: Made, tmp_path: Path) -> None:
    with verdict("failed"):
        package, _ = export(target("null"), made.model, tmp_path / "out", LOOSE)
    assert package.manifest["root_sha256"] == made.package.manifest["root_sha256"]
    mine, theirs = contents(made.root), contents(package.directory)
    assert {name for name in mine if mine[name] != theirs[name]} == MEASURED | {"tapeout.json"}


@pytest.mark.parametrize(
    ("recipe", "options"),
    [({"scheme": "int4-g32"}, {}), ({"tensors": {"lm_head": "none"}}, {}), ({}, {"threads": 2})],
)
def test_what_was_asked_for_changes_the_root_digest(
    made: Made, tmp_path: Path, recipe: dict[str, Any], options: dict[str, Any]
) -> None:
    with verdict("passed"):
        package, _ = export(target("null", **options), made.model, tmp_path / "out", Recipe.of(recipe))
    assert package.manifest["root_sha256"] != made.package.manifest["root_sha256"]


def test_nothing_inside_tells_where_or_when_it_was_made(made: Made) -> None:
    paths = {str(made.model.parent), "/tmp/", "/home/", str(Path.cwd()), sys.prefix}
    # A host's name may be two letters, which any codes hold.
    host = re.compile(rf"\b{re.escape(socket.gethostname())}\b".encode())
    clock = re.compile(rb"20\d\d-[01]\d-[0-3]\d[T ][0-2]\d:|timestamp")
    for name, data in contents(made.root).items():
        found = [path for path in paths if path.encode() in data]
        assert not found, f"{name} holds {found}"
        assert not clock.search(data), f"{name} holds a time"
        assert name.endswith(".safetensors") or not host.search(data), f"{name} holds the host's name"


def test_files_can_be_read_by_others(made: Made) -> None:
    modes = {
        path.relative_to(made.root): path.stat().st_mode & 0o777
        for path in made.root.rglob("*")
        if path.is_file()
    }
    assert {path: oct(mode) for path, mode in modes.items() if mode != 0o644} == {}
    assert all(path.stat().st_mode & 0o555 == 0o555 for path in (made.root, made.root / "artifact"))


def test_golden_logits_are_those_of_the_dequantized_weights(made: Made) -> None:
    from tapeout.validate import reference

    golden = load_file(made.root / "golden.safetensors")
    count = len(golden) // 2
    assert golden.keys() == {f"{part}.{n}" for part in ("tokens", "logits") for n in range(count)}
    assert count >= 1
    quant = quantize(load(made.model), "int8")
    stores = (str(quant.directory), None)
    dequantized, original = (reference.open_session(str(made.model), store=s, threads=1) for s in stores)
    for n in range(count):
        tokens, logits = golden[f"tokens.{n}"], golden[f"logits.{n}"]
        assert (tokens.dtype, logits.dtype, logits.shape) == (np.int32, np.float32, (272,))
        found = []
        for session in (dequantized, original):
            session.reset()
            found.append(session.prefill(tokens.tolist())[-1])
        # They come out of a longer prefill: float32 sums in another order differ by about 2^-24 of logits below 16.
        np.testing.assert_allclose(logits, found[0], atol=1e-5)
        assert np.abs(logits - found[1]).max() > 1e-3


def test_the_card_says_how_to_run_it(made: Made) -> None:
    card = (made.root / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert front.splitlines() == ["license: apache-2.0", "tags: [tapeout, plain, int8]"]
    assert body.startswith("# small · int8 · null\n")
    assert "| needs | transformers and torch |" in body
    assert target("null").card(made.package.artifact) in body
    assert "| context | 256 tokens |" in body
    assert "| stop_token_ids | 256 |" in body
    assert "{{" not in body
    assert "{%" not in body


def test_the_card_of_a_device_names_its_file_and_notes(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with verdict("passed"):
        package, _ = export(target("cpu", sliding_window="clamp"), made.model, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    (file,) = (tmp_path / "out" / "artifact").iterdir()
    assert f"llama-cli -m artifact/{file.name} -c {package.artifact.context}\n" in card
    assert "| needs | llama.cpp" in card
    assert package.artifact.notes
    assert f"## Notes\n\n- {package.artifact.notes[0]}\n" in card


def change_a_byte(root: Path) -> str:
    path = root / "artifact" / "lm_head.weight.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return "artifact/lm_head.weight.safetensors differs from its digest"


def remove_a_file(root: Path) -> str:
    (root / "tokenizer" / "tokenizer.json").unlink()
    return "tokenizer/tokenizer.json is missing"


def add_a_file(root: Path) -> str:
    (root / "artifact" / "more.bin").write_text("")
    return "artifact/more.bin is not part of it"


def remove_what_was_measured(root: Path) -> str:
    (root / "golden.safetensors").unlink()
    return "golden.safetensors is missing"


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> str:
    path = root / "tapeout.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(canonical_json(manifest))
    return "tapeout.json differs from its root digest"


def change_a_fact(root: Path) -> str:
    return edit(root, lambda manifest: manifest["needs"].update(memory_bytes=1))


def change_a_licence(root: Path) -> str:
    return edit(root, lambda manifest: manifest["model"].update(licence="mit"))


def change_a_size(root: Path) -> str:
    size = (root / "report.md").stat().st_size
    edit(root, lambda manifest: manifest["beside"]["report.md"].update(size=1))
    return f"report.md has {size} bytes instead of 1"


def forget_a_file(root: Path) -> str:
    edit(root, lambda manifest: manifest["beside"].pop("report.json"))
    return "report.json is not part of it"


def claim_to_have_passed(root: Path) -> str:
    edit(root, lambda manifest: manifest.update(passed=not manifest["passed"]))
    return "tapeout.json says passed: false, report.json says true"


@pytest.mark.parametrize(
    "damage",
    [
        change_a_byte,
        remove_a_file,
        add_a_file,
        remove_what_was_measured,
        change_a_fact,
        change_a_licence,
        change_a_size,
        forget_a_file,
    ],
)
def test_damage_is_found_and_named(made: Made, copied: Path, damage: Callable[[Path], str]) -> None:
    assert Package.open(copied).damage() == []
    expected = damage(copied)
    assert Package.open(copied).damage() == [expected]
    assert made.package.damage() == []


def test_a_forged_verdict_is_found(copied: Path) -> None:
    claim_to_have_passed(copied)
    assert Package.open(copied).damage() != []


def test_a_changed_file_and_its_digest_do_not_go_together(copied: Path) -> None:
    (copied / "README.md").write_text("other")
    digest = hashlib.sha256(b"other").hexdigest()
    edit(copied, lambda manifest: manifest["files"]["README.md"].update(sha256=digest, size=5))
    assert Package.open(copied).damage() == ["tapeout.json differs from its root digest"]


def test_damage_is_told_all_at_once(copied: Path) -> None:
    expected = {damage(copied) for damage in (change_a_byte, remove_a_file, add_a_file, change_a_fact)}
    assert set(Package.open(copied).damage()) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a package: it has no tapeout.json"),
        ("[]", "cannot be read as a manifest"),
        ("{}", "cannot be read as a manifest: it has no format_version"),
        ("{", "is not JSON that can be trusted"),
        ('{"format_version": 2}', "has format_version 2; this tapeout reads up to 1: upgrade it"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "tapeout.json").write_text(text)
    with pytest.raises(PackageError, match=message):
        Package.open(tmp_path)


def test_a_package_whose_gates_failed_is_written_all_the_same(made: Made, tmp_path: Path) -> None:
    with verdict("failed"):
        package, report = export(target("null"), made.model, tmp_path / "out", LOOSE)
    assert not report.passed
    assert not package.passed
    assert json.loads((tmp_path / "out" / "tapeout.json").read_text())["passed"] is False
    assert json.loads((tmp_path / "out" / "report.json").read_text())["passed"] is False
    assert Package.open(tmp_path / "out").damage() == []


@pytest.mark.filterwarnings("ignore:Cyclopts application invoked")  # it is: sys.argv is what is tested
def test_its_command_ends_with_status_1(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    arguments = ["export", "null", str(made.model), "--out", str(tmp_path / "out"), "--json"]
    monkeypatch.setattr("sys.argv", ["tapeout", *arguments])
    with verdict("failed"), pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
    assert Package.open(tmp_path / "out").passed is False


def test_without_golden_logits_there_is_no_file(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tapeout.build.validate", lambda *_: replace(made.report, golden=()))
    export(target("null"), made.model, tmp_path / "out", LOOSE)
    assert not (tmp_path / "out" / "golden.safetensors").exists()
    assert Package.open(tmp_path / "out").damage() == []
