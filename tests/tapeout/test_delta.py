"""Deltas: only changed tensors travel, the result is the new package to the byte, and nothing else is ever written."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import tapeout
from packages import names, packed, same
from safetensors.numpy import load_file, save_file

from tapeout import delta
from tapeout.delta import Made, apply, make
from tapeout.errors import OutputError, PackageError
from tapeout.generated import write_model
from tapeout.pack import Package

HEAD = struct.Struct("<8sIQ")
LAYER = "model.layers.1."


@dataclass(frozen=True)
class Versions:
    """Two versions of a model for a target, and the delta between them."""

    old: Package
    new: Package
    delta: Path
    made: Made


def tuned(model: Path, out: Path) -> Path:
    """A model with one layer changed, as a fine-tune of one layer leaves it."""
    shutil.copytree(model, out)
    (weights,) = out.glob("*.safetensors")
    tensors, random = load_file(weights), np.random.default_rng(1)
    for name, values in tensors.items():
        if LAYER in name and values.ndim == 2:
            tensors[name] = values + 0.02 * values.std() * random.standard_normal(values.shape).astype("f4")
    save_file(tensors, weights, {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Versions]:
    pytest.importorskip("gguf")
    pytest.importorskip("onnx")
    work = tmp_path_factory.mktemp("versions")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPEOUT_CACHE", str(work / "cache"))
        model = write_model(work / "small", config={"num_hidden_layers": 4}, dtype="F32")
        changed = tuned(model, work / "tuned" / "small")
        for name, options in {"null": {}, "cpu": {}, "onnx": {"format": "onnx"}}.items():
            kind = "cpu" if options else name
            old = packed(model, kind, work / name / "old", **options)
            new = packed(changed, kind, work / name / "new", **options)
            file = work / name / "delta"
            found[name] = Versions(old, new, file, make(old.directory, new.directory, file))
    return found


@pytest.fixture
def null(versions: Mapping[str, Versions]) -> Versions:
    return versions["null"]


@pytest.mark.parametrize("name", ["null", "cpu", "onnx"])
def test_only_changed_tensors_travel(versions: Mapping[str, Versions], tmp_path: Path, name: str) -> None:
    each = versions[name]
    made, old, new = each.made, each.old.directory, each.new.directory
    patched = apply(old, each.delta, tmp_path / "out")
    assert patched.manifest["root_sha256"] == each.new.manifest["root_sha256"] == made.new_root_sha256
    assert same(tmp_path / "out", new)
    assert made.old_root_sha256 == each.old.manifest["root_sha256"]
    # What changed is of the one layer, or what the package must give with it.
    of_layer = [file for file in made.changed if LAYER in file or "blk.1." in file or "layers.1" in file]
    assert {file.split(": ")[0] for file in set(made.changed) - set(of_layer)} == {"golden.safetensors"}
    assert len(of_layer) >= 7
    assert made.tensors > 4 * len(of_layer) - 8
    # A quarter of the layers' bytes; reports and the manifest are text and pack well.
    weights = sum(entry["size"] for path, entry in each.new.manifest["files"].items() if "artifact" in path)
    assert made.size_bytes == each.delta.stat().st_size < 0.4 * weights
    with pytest.raises(OutputError, match="exists"):
        make(old, new, each.delta)
    make(old, new, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == each.delta.read_bytes()


def test_the_command_line(null: Versions, tmp_path: Path) -> None:
    old, new, file, out = null.old.directory, null.new.directory, tmp_path / "v.delta", tmp_path / "out"
    done = tapeout("delta", old, new, "--out", file, "--json", status=0)
    told = json.loads(done.stdout)
    assert told["size_bytes"] == file.stat().st_size
    assert f"of {told['tensors']} tensors travel" in done.stderr
    assert "exists; give --force" in tapeout("delta", old, new, "--out", file, status=2).stderr
    done = tapeout("patch", old, file, "--out", out, "--json", status=0)
    assert json.loads(done.stdout)["root_sha256"] == told["new_root_sha256"]
    assert tapeout("verify", out).returncode == 0
    assert "exists; give --force" in tapeout("patch", old, file, "--out", out, status=2).stderr
    assert "is no delta: no such file" in tapeout("patch", old, "none", "--out", out, status=2).stderr


def test_of_another_package(versions: Mapping[str, Versions], tmp_path: Path) -> None:
    null, other = versions["null"], versions["cpu"].old
    with pytest.raises(PackageError) as raised:
        apply(other.directory, null.delta, tmp_path / "out")
    assert null.old.manifest["root_sha256"] in str(raised.value)
    assert other.manifest["root_sha256"] in str(raised.value)
    assert names(tmp_path) == set()


def test_damaged_packages(null: Versions, tmp_path: Path) -> None:
    damaged = shutil.copytree(null.old.directory, tmp_path / "damaged")
    (damaged / "README.md").write_text("other")
    for work in (
        lambda: apply(damaged, null.delta, tmp_path / "out"),
        lambda: make(damaged, null.new.directory, tmp_path / "out"),
        lambda: make(null.new.directory, damaged, tmp_path / "out"),
    ):
        with pytest.raises(PackageError, match=r"is not whole: README\.md "):
            work()
    assert names(tmp_path) == {"damaged"}


def test_the_same_root_with_another_report(null: Versions, tmp_path: Path) -> None:
    """Reports hold what was measured, so that two runs have one root digest and other bytes beside it."""
    other = shutil.copytree(null.old.directory, tmp_path / "other")
    (other / "report.md").write_text("other")
    manifest = json.loads((other / "tapeout.json").read_text())
    manifest["beside"]["report.md"] = {"sha256": hashlib.sha256(b"other").hexdigest(), "size": 5}
    (other / "tapeout.json").write_text(json.dumps(manifest))
    with pytest.raises(
        PackageError, match=r"with another \S+ than .* has, though the root digests are the same"
    ):
        apply(other, null.delta, tmp_path / "out")


def test_truncated_anywhere(null: Versions, tmp_path: Path) -> None:
    whole = null.delta.read_bytes()
    for length in (0, 1, 19, 20, 51, 52, 60, len(whole) // 2, len(whole) - 33, len(whole) - 1):
        cut = tmp_path / "cut"
        cut.write_bytes(whole[:length])
        with pytest.raises(PackageError, match=r"is no delta|was cut short"):
            apply(null.old.directory, cut, tmp_path / "out")
        assert names(tmp_path) == {"cut"}


def test_a_changed_byte_anywhere(null: Versions, tmp_path: Path) -> None:
    whole = bytearray(null.delta.read_bytes())
    for at in [*range(24), *range(24, len(whole), len(whole) // 40), len(whole) - 1]:
        whole[at] ^= 4
        (tmp_path / "changed").write_bytes(whole)
        with pytest.raises(PackageError, match=r"is no delta|format_version|was cut short or changed"):
            apply(null.old.directory, tmp_path / "changed", tmp_path / "out")
        whole[at] ^= 4
    assert names(tmp_path) == {"changed"}


def edited(delta: Path, out: Path, edit: Callable[[dict[str, Any], bytes], bytes]) -> Path:
    """A delta by somebody who knows the format: any header, any bytes behind it, and a checksum that fits."""
    raw = delta.read_bytes()
    magic, version, length = HEAD.unpack_from(raw)
    content = zlib.decompress(raw[HEAD.size : -32])
    header = json.loads(content[:length])
    rest = edit(header, content[length:])
    written = json.dumps(header).encode()
    body = HEAD.pack(magic, version, len(written)) + zlib.compress(written + rest)
    out.write_bytes(body + hashlib.sha256(body).digest())
    return out


def _set(**fields: Any) -> Callable[[dict[str, Any], bytes], bytes]:
    def edit(header: dict[str, Any], rest: bytes) -> bytes:
        header["files"][0] |= fields
        return rest

    return edit


def _source(path: str) -> Callable[[dict[str, Any], bytes], bytes]:
    def edit(header: dict[str, Any], rest: bytes) -> bytes:
        header["sources"][0]["path"] = path
        return rest

    return edit


def _root(header: dict[str, Any], rest: bytes) -> bytes:
    header["new_root_sha256"] = "0" * 64
    return rest


def _bomb(header: dict[str, Any], rest: bytes) -> bytes:
    header["files"][0] |= {"size": 1 << 60, "pieces": [["new", 1 << 60]]}
    return rest


EDITS: dict[str, tuple[Callable[[dict[str, Any], bytes], bytes], str]] = {
    "bytes": (lambda _, rest: bytes([rest[0] ^ 1]) + rest[1:], "with another digest than it says"),
    "fewer": (lambda _, rest: rest[:-1], "bytes too early"),
    "more": (lambda _, rest: rest + b"!", "more bytes than its header tells of"),
    "path": (_set(path="../escaped"), "no file inside"),
    "absolute": (_set(path="/tmp/escaped"), "no file inside"),
    "twice": (_set(path="tapeout.json"), "are one file"),
    "size": (_set(size=7), "pieces for .* that are not its 7 bytes"),
    "negative": (_set(size=-7), "greater than or equal to 0"),
    "digest": (_set(sha256="0" * 64), "with another digest than it says"),
    "kind": (_set(pieces=[["run", 7]]), "no readable header"),
    "source": (_set(size=1, pieces=[["copy", 99, 0, 1]]), "bytes .* that no old file has"),
    "range": (_set(size=1, pieces=[["copy", 0, 1 << 40, 1]]), "bytes .* that no old file has"),
    "unknown": (_set(mode=0o777), "no readable header"),
    "outside": (_source("../../etc/passwd"), "no file inside"),
    "absent": (_source("etc/passwd"), "was made with another etc/passwd"),
    "root": (_root, "gives no whole package: its root digest is"),
    "bomb": (_bomb, "11529215046\\d+ bytes, and its disk has"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_by_hand(null: Versions, tmp_path: Path, name: str) -> None:
    edit, message = EDITS[name]
    changed = edited(null.delta, tmp_path / "edited", edit)
    with pytest.raises((PackageError, OutputError), match=message):
        apply(null.old.directory, changed, tmp_path / "out")
    assert names(tmp_path) == {"edited"}


def test_edited_by_nobody(null: Versions, tmp_path: Path) -> None:
    """The editor of the test above changes nothing by itself."""
    changed = edited(null.delta, tmp_path / "edited", lambda _, rest: rest)
    assert same(apply(null.old.directory, changed, tmp_path / "out").directory, null.new.directory)


@pytest.mark.parametrize("step", [3, 7, 64, 4093])
def test_whatever_is_read_at_once(
    null: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The packed bytes end anywhere in what is read at once, within their own checksum too."""
    monkeypatch.setattr(delta, "_STEP", step)
    assert same(apply(null.old.directory, null.delta, tmp_path / "out").directory, null.new.directory)
    make(null.old.directory, null.new.directory, tmp_path / "delta")
    assert same(apply(null.old.directory, tmp_path / "delta", tmp_path / "2").directory, null.new.directory)


def test_a_header_that_is_no_json(null: Versions, tmp_path: Path) -> None:
    for content, length, message in (
        (b"{", 1, "no readable header"),
        (b"[" * 50_000, 50_000, "no readable header"),
        (b"{}", 1 << 40, "its header has 1099511627776 bytes"),
        (b"{}", 100, "ends 98 bytes too early"),
    ):
        body = HEAD.pack(b"TAPEDLTA", 1, length) + zlib.compress(content)
        (tmp_path / "delta").write_bytes(body + hashlib.sha256(body).digest())
        with pytest.raises(PackageError, match=message):
            apply(null.old.directory, tmp_path / "delta", tmp_path / "out")
    body = HEAD.pack(b"TAPEDLTA", 1, 2) + b"no zlib stream"
    (tmp_path / "delta").write_bytes(body + hashlib.sha256(body).digest())
    with pytest.raises(PackageError, match="cannot be unpacked"):
        apply(null.old.directory, tmp_path / "delta", tmp_path / "out")


def test_a_newer_format(null: Versions, tmp_path: Path) -> None:
    raw = bytearray(null.delta.read_bytes())
    raw[8] = 2
    (tmp_path / "newer").write_bytes(raw)
    with pytest.raises(PackageError, match="format_version 2; this tapeout reads up to 1"):
        apply(null.old.directory, tmp_path / "newer", tmp_path / "out")


def test_a_layer_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers behind one that was pruned get other names and places: none of their weights travels."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("TAPEOUT_CACHE", str(tmp_path / "cache"))
    model = write_model(tmp_path / "small", config={"num_hidden_layers": 4}, dtype="F32")
    pruned = shutil.copytree(model, tmp_path / "pruned" / "small")
    (weights,) = pruned.glob("*.safetensors")
    kept = {}
    for name, values in load_file(weights).items():
        number = int(name.split(".")[2]) if ".layers." in name else 0
        if number != 1:
            kept[name.replace(f".{number}.", f".{number - 1}.", 1) if number > 1 else name] = values
    save_file(kept, weights, {"format": "pt"})
    config = json.loads((pruned / "config.json").read_text())
    (pruned / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    old, new = packed(model, "cpu", tmp_path / "old"), packed(pruned, "cpu", tmp_path / "new")
    made = make(old.directory, new.directory, tmp_path / "delta")
    assert {name.split(": ")[0] for name in made.changed} == {"golden.safetensors"}
    assert same(apply(old.directory, tmp_path / "delta", tmp_path / "out").directory, new.directory)
