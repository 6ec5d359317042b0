"""What a stranger may write into a package: nothing of it is believed, followed, or ends in a traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import tapeout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tapeout.describe import describe
from tapeout.errors import PackageError, TapeoutError
from tapeout.files import canonical_json
from tapeout.manifest import MAX_JSON_BYTES, check_distinct, read_json, safe_path, walk
from tapeout.pack import Package, _root
from tapeout.replay import revalidate
from tapeout.verify import verify

DIGEST = "0" * 64


@pytest.fixture
def copied(bare: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bare, tmp_path / "package"))


def edited(package: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The package with another manifest, whose root digest is right again."""
    path = package / "tapeout.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["root_sha256"] = _root(manifest)
    path.write_text(canonical_json(manifest))
    return package


def refused(package: Path, *words: str) -> None:
    """One paragraph, from everything that opens a package."""
    for run in (Package.open, verify, describe, revalidate):
        with pytest.raises(PackageError) as told:
            run(package)  # type: ignore[operator]
        said = str(told.value)
        assert "\n" not in said
        assert len(said) < 1000, said
        assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("../../etc/passwd", "leaves its folder"),
        ("artifact/../../secret", "leaves its folder"),
        ("artifact/..", "leaves its folder"),
        ("./README.md", "leaves its folder"),
        ("artifact//model", "an empty part"),
        ("artifact/", "an empty part"),
        ("/etc/passwd", "is absolute"),
        ("C:/Windows/win.ini", "is absolute"),
        ("c:evil", "is absolute"),
        ("..\\..\\evil", "holds a backslash"),
        ("artifact/a\x00b", "do not show"),
        ("artifact/a\nb", "do not show"),
        ("artifact/\u202egpj.exe", "do not show"),
        ("artifact/\u200bmodel", "do not show"),
        ("", "has 0 characters"),
        ("a/" * 600 + "b", "characters"),
        ("a" * 300, "more than 255 bytes"),
        ("artifact/e\u0301.bin", "composed form"),
    ],
)
def test_paths_that_do_not_stay_inside(copied: Path, path: str, why: str) -> None:
    edited(copied, lambda manifest: manifest["files"].update({path: {"sha256": DIGEST, "size": 0}}))
    refused(copied, why)
    edited(copied, lambda manifest: (manifest["files"].pop(path), manifest["artifact"].update(files=[path])))
    if path != "":
        refused(copied)


@given(st.text(max_size=40))
def test_a_path_that_is_safe_stays_inside(path: str) -> None:
    try:
        safe_path(path)
    except ValueError:
        return
    assert os.path.normpath(f"/package/{path}") == f"/package/{path}"
    assert "\\" not in path
    assert path.isprintable() or not path.isascii()


@pytest.mark.parametrize(
    "paths",
    [
        ("artifact/model", "artifact/Model"),
        ("STRASSE", "straße"),
        ("a/b", "a"),
        ("a", "A/b"),
        ("\u212b", "\u00e5"),  # the sign of the angstrom and the letter
    ],
)
def test_two_paths_that_are_one_file(paths: tuple[str, str]) -> None:
    check_distinct(["x", "y/z", "y/w"])
    with pytest.raises(ValueError, match=r"one file on some systems|lies below a file"):
        check_distinct(paths)


@pytest.mark.parametrize("name", ["TapeOut.json", "MODEL.sig", "device_report.json", "readme.MD"])
def test_names_that_are_taken(copied: Path, name: str) -> None:
    edited(copied, lambda manifest: manifest["beside"].update({name: {"sha256": DIGEST, "size": 0}}))
    refused(copied, "one file on some systems")


def link_out(package: Path) -> str:
    (package / "artifact" / "more").symlink_to("/etc/passwd")
    return "a symbolic link at 'artifact/more'"


def link_in_place(package: Path) -> str:
    (package / "README.md").unlink()
    (package / "README.md").symlink_to("/etc/passwd")
    return "a symbolic link at 'README.md'"


def link_a_folder(package: Path) -> str:
    shutil.rmtree(package / "tokenizer")
    (package / "tokenizer").symlink_to(package.parent)
    return "a symbolic link at 'tokenizer'"


def link_the_manifest(package: Path) -> str:
    (package / "tapeout.json").rename(package.parent / "elsewhere.json")
    (package / "tapeout.json").symlink_to(package.parent / "elsewhere.json")
    return "a symbolic link"


def pipe(package: Path) -> str:
    os.mkfifo(package / "artifact" / "pipe")
    return "a pipe, a socket or a device at 'artifact/pipe'"


def pipe_for_a_manifest(package: Path) -> str:
    (package / "tapeout.json").unlink()
    os.mkfifo(package / "tapeout.json")
    return "is not an ordinary file"


def plug(package: Path) -> str:
    here = Path.cwd()
    os.chdir(package)  # the address of a socket may have a hundred bytes
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("plug")
    os.chdir(here)
    return "a pipe, a socket or a device at 'plug'"


def folder_for_a_manifest(package: Path) -> str:
    (package / "tapeout.json").unlink()
    (package / "tapeout.json").mkdir()
    return "is not an ordinary file"


@pytest.mark.parametrize(
    "harm",
    [
        link_out,
        link_in_place,
        link_a_folder,
        link_the_manifest,
        pipe,
        pipe_for_a_manifest,
        plug,
        folder_for_a_manifest,
    ],
)
def test_nothing_but_ordinary_files(copied: Path, harm: Callable[[Path], str]) -> None:
    refused(copied, harm(copied))


def test_a_link_to_a_package_is_one(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(copied)
    assert verify(tmp_path / "latest").damage == ()


@pytest.mark.parametrize("size", [-1, 10**30, 2**53, 1.5, "12", None, True, [1]], ids=repr)
def test_sizes_that_are_none(copied: Path, size: Any) -> None:
    edited(copied, lambda manifest: manifest["beside"]["report.json"].update(size=size))
    refused(copied, "beside.report.json.size")


def test_a_file_that_is_larger_than_it_says_is_not_read(copied: Path) -> None:
    with (copied / "golden.safetensors").open("r+b") as file:
        file.truncate(2**40)  # sparse: reading it would take an hour
    assert any(
        "golden.safetensors has 1099511627776 bytes instead of" in each for each in verify(copied).damage
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"format_version": 1, "format_version": 1}', "the key 'format_version' stands twice"),
        ('{"format_version": NaN}', "NaN is no number of JSON"),
        ("[" * 1_000_000, "nested too deep"),
        ('{"a":' * 1_000_000, "nested too deep"),
        ('{"format_version": ' + "9" * 10_000 + "}", "not JSON that can be trusted"),
        ('{"format_version": "\\ud800"}', "not JSON that can be trusted"),
        ('{"format_version": 1e400}', "no format_version"),
        ('{"format_version": true}', "no format_version"),
        ('{"format_version": 10000000000000000000000}', "upgrade it"),
        ('{"format_version": 0}', "format_version is 0"),
        ('"text"', "no format_version"),
        ("\x00", "not JSON that can be trusted"),
    ],
)
def test_documents_that_are_none(copied: Path, text: str, why: str) -> None:
    (copied / "tapeout.json").write_text(text)
    refused(copied, why)


def test_a_document_beyond_all_bounds_is_not_read(copied: Path) -> None:
    with (copied / "tapeout.json").open("r+b") as file:
        file.truncate(2**40)
    refused(copied, "has 1099511627776 bytes", str(MAX_JSON_BYTES))


def test_bytes_that_are_no_text(copied: Path) -> None:
    (copied / "tapeout.json").write_bytes(b'{"format_version": "\xff"}')
    refused(copied, "not JSON that can be trusted")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m["target"]["options"].update(shell="rm"), "target null has no option 'shell'"),
        (
            lambda m: m["target"]["options"].update(threads="many"),
            "option 'threads' of target null is 'many'",
        ),
        (lambda m: m["target"].update(name="../evil"), "'../evil' is not an installed target"),
    ],
)
def test_options_that_are_none_of_the_target(copied: Path, change: Callable[[Any], object], why: str) -> None:
    edited(copied, change)
    with pytest.raises(TapeoutError, match=why):
        Package.open(copied).target()
    (golden,) = [gate for gate in revalidate(copied).gates if gate.name == "golden"]
    assert golden.status == "failed"
    assert re.search(why, golden.reason)


@pytest.mark.parametrize("key", ["codes_sha256", "model", "recipe", "needs", "generation", "passed"])
def test_keys_that_are_missing(copied: Path, key: str) -> None:
    manifest = json.loads((copied / "tapeout.json").read_text())
    del manifest[key]
    (copied / "tapeout.json").write_text(canonical_json(manifest))
    refused(copied, f"it lacks {key}")


def test_names_do_not_steer_the_terminal(copied: Path) -> None:
    """Neither markup, which rich would obey or stumble over, nor a terminal's own commands."""
    hostile = "[/x][red]\x1b]0;owned\x07\x1b[2J\u202e"
    edited(copied, lambda manifest: manifest["artifact"].update(notes=[hostile]))
    edited(copied, lambda manifest: manifest["artifact"]["containers"].update({"[/x]": hostile}))
    done = tapeout("inspect", copied, status=0)
    assert "\x1b" not in done.stderr
    assert "\u202e" not in done.stderr
    assert "[/x]" in done.stderr
    done = tapeout("verify", copied, status=2)  # its bill was not changed with it
    assert "\x1b" not in done.stderr
    edited(copied, lambda manifest: manifest["model"].update(name="a\x1b[2J"))
    refused(copied, "control characters")


def test_a_package_of_before_opens_and_verifies(bare: Path, copied: Path) -> None:
    """Format version 1 once had no licences, no provenance, and no names of distributions."""

    def older(manifest: dict[str, Any]) -> None:
        for part in ("files", "beside"):
            for path in [p for p in manifest[part] if p.startswith("licences/") or p == "provenance.json"]:
                del manifest[part][path]
        del manifest["needs"]["distributions"]

    shutil.rmtree(copied / "licences")
    (copied / "provenance.json").unlink()
    (copied / "sbom.cdx.json").unlink()
    edited(copied, lambda manifest: (older(manifest), manifest["beside"].pop("sbom.cdx.json")))
    found = verify(copied)
    assert found.damage == ()
    assert (found.bill, found.provenance[:4]) == ("none", "none")
    assert Package.open(copied).artifact.files == Package.open(bare).artifact.files


def test_a_bill_and_a_provenance_of_another_package(copied: Path) -> None:
    edited(copied, lambda manifest: manifest["needs"].update(memory_bytes=1))
    assert set(verify(copied).damage) == {
        f"sbom.cdx.json is of another package: its root digest is {json.loads((copied / 'sbom.cdx.json').read_text())['metadata']['component']['hashes'][0]['content'][:16]}…",
        "provenance.json has another subjects than the manifest",
    }


def test_walking_follows_nothing(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/c", "a", ".hidden"):
        (tmp_path / name).write_text("")
    assert sorted(walk(tmp_path)) == [".hidden", "a", "b/c"]
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    with pytest.raises(PackageError, match="a symbolic link at 'b/loop'"):
        list(walk(tmp_path))


def test_reading_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError):
        read_json(path)
    path.write_text('{"ä": [1, 2.5, null, true, "\\u00e4"]}')
    assert read_json(path) == {"ä": [1, 2.5, None, True, "ä"]}


def in_words(run: Callable[[], object]) -> None:
    """It works, or it is refused in a paragraph; any other exception is a defect."""
    said = ""
    try:
        run()
    except TapeoutError as error:
        said = str(error)
    assert "\n" not in said


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=8), each, max_size=3),
    max_leaves=6,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value in a document."""
    keys: Any = (
        value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    return [at, *(place for key in keys for place in places(value[key], (*at, key)))]


@st.composite
def mutations(draw: st.DrawFn, document: Any) -> Any:
    """A document of which one to three values are another, gone, or doubled under another name."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        if not document:
            break
        key = draw(st.sampled_from(sorted(document)))  # evenly over what it says, not over its hundred files
        place = (key, *draw(st.sampled_from(places(document[key]))))
        parent = document
        for key in place[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["other", "gone", "renamed"]))
        if how == "other":
            parent[place[-1]] = draw(JUNK)
        elif how == "gone":
            del parent[place[-1]]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=8) | st.just("../x"))] = parent.pop(place[-1])
    return document


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_stands_in_a_manifest_it_is_refused_in_words(bare: Path, data: st.DataObject) -> None:
    """The package is read in place under another manifest; what is written there is written by nobody."""
    manifest = json.loads((bare / "tapeout.json").read_text())
    changed = data.draw(mutations(manifest))
    before = {path: path.stat().st_mtime_ns for path in bare.parent.rglob("*")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tapeout.manifest.read_json",
            lambda path: changed if path.name == "tapeout.json" else read_json(path),
        )
        runs: list[Callable[[], object]] = [
            lambda: verify(bare),
            lambda: describe(bare),
            lambda: Package.open(bare).target(),
            lambda: (
                Package.open(bare).artifact,
                Package.open(bare).generation,
                Package.open(bare).provenance,
            ),
        ]
        for run in runs:
            in_words(run)
    assert {path: path.stat().st_mtime_ns for path in bare.parent.rglob("*")} == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["sbom.cdx.json", "provenance.json", "report.json"]))
def test_whatever_stands_in_what_vouches_for_it(bare: Path, name: str, data: st.DataObject) -> None:
    changed = data.draw(mutations(json.loads((bare / name).read_text())))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("bill", "attestation", "validate.report"):
            patch.setattr(
                f"tapeout.{module}.read_json", lambda path: changed if path.name == name else read_json(path)
            )
        verify(bare)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_validating_a_stranger_s_package_ends_in_words(bare: Path, here: type, data: st.DataObject) -> None:
    """What passes as a manifest goes on to the runtime."""
    pytest.importorskip("transformers")
    document = json.loads((bare / "tapeout.json").read_text())
    kept = {key: document.pop(key) for key in ("files", "beside", "format_version")}
    changed = data.draw(mutations(document)) | kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tapeout.manifest.read_json",
            lambda path: changed if path.name == "tapeout.json" else read_json(path),
        )
        patch.setattr("tapeout.validate.worker.borrow", here)
        patch.setattr("tapeout.replay.measured", lambda *_: {})  # takes seconds, and nothing of a manifest
        in_words(lambda: revalidate(bare))
