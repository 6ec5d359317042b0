"""Shared storage: what was put there comes back whole, what is damaged is taken away and said, and one that is full is done without."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from buckets import Buckets

from tapeout.errors import MissingToolchain
from tapeout.exporters import Artifact
from tapeout.files import file_sha256
from tapeout.matrix.shared import Storage
from tapeout.models import load
from tapeout.pack import Package, pack
from tapeout.quantize import Calibration, Quantized, quantize
from tapeout.recipe import Recipe
from tapeout.targets.null import Null
from tapeout.validate.report import GateResult, Report

MakeModel = Callable[..., Path]


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://shared/{uuid.uuid4().hex}"
    return (tmp_path / "shared").as_uri() if request.param == "file" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def package(make_model: MakeModel, tmp_path: Path) -> Path:
    """A package whose gates nobody ran."""
    quant, out = quantize(load(make_model()), "int8"), tmp_path / "made"
    (out / "artifact").mkdir(parents=True)
    artifact: Artifact = Null().export(quant, out / "artifact")
    report = Report("tiny", "null", "int8", (GateResult("codes", "passed"),))
    pack(artifact, report, quant, Null(), Recipe().kept(quant))
    return out


def every(storage: Storage) -> list[str]:
    storage._files.invalidate_cache()  # s3fs remembers what it listed
    return sorted(path.rpartition("/")[2] for path in storage._files.find(storage._root))


def spoil(storage: Storage, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change the file of the storage that ends so."""
    (path,) = [each for each in storage._files.find(storage._root) if each.endswith(name)]
    storage._files.pipe_file(path, change(storage._files.cat_file(path)))


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_package_comes_back_byte_for_byte(url: str, package: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    storage = Storage(url, notes)
    assert not storage.has_package("key")
    assert not storage.fetch_package("key", tmp_path / "back")
    storage.push_package("key", package)
    assert storage.has_package("key")
    assert storage.fetch_package("key", tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(package)
    assert notes == [f"taken from {url}."]
    blobs = {file_sha256(path) for path in package.rglob("*") if path.is_file()}
    assert every(storage) == sorted([*blobs, "key.json"])


def test_what_two_packages_have_alike_is_there_once(url: str, package: Path) -> None:
    storage = Storage(url, [])
    storage.push_package("one", package)
    before = every(storage)
    storage.push_package("other", package)
    assert every(storage) == sorted([*before, "other.json"])


def test_codes_come_back_into_the_cache_of_another_machine(
    url: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, notes = load(make_model()), list[str]()
    quant, storage = quantize(model, "int8"), Storage(url, notes)
    storage.push_store("key", quant.directory)
    whole = bytes_of(quant.directory)
    assert storage.fetch_store("key")
    assert notes == []  # they are here
    monkeypatch.setenv("TAPEOUT_CACHE", str(tmp_path / "elsewhere"))
    assert storage.fetch_store("key")
    assert notes == [f"codes taken from {url}."]
    monkeypatch.setattr("tapeout.quantize._fill", None)  # nothing is to be rounded
    found = quantize(model, "int8")
    assert found.directory.is_relative_to(tmp_path / "elsewhere")
    assert bytes_of(found.directory) == whole


@pytest.mark.parametrize(
    "what", ["a blob", "a cut blob", "no blob", "the list", "no list", "another list", "another path"]
)
def test_what_is_damaged_is_said_taken_away_and_put_there_anew(
    url: str, package: Path, tmp_path: Path, what: str
) -> None:
    notes: list[str] = []
    storage = Storage(url, notes)
    storage.push_package("key", package)
    blob = file_sha256(next((package / "artifact").iterdir()))
    if what == "a blob":
        spoil(storage, blob, lambda data: bytes([data[0] ^ 1]) + data[1:])
    elif what == "a cut blob":
        spoil(storage, blob, lambda data: data[:-1])
    elif what == "no blob":
        storage._files.rm_file(storage._blob(blob))
    elif what == "the list":
        spoil(storage, "key.json", lambda data: data.replace(b'"size": ', b'"size": 1', 1))
    elif what == "no list":
        spoil(storage, "key.json", lambda data: data[:40])
    elif what == "another list":
        spoil(storage, "key.json", lambda data: b"[]")
    else:
        spoil(storage, "key.json", lambda data: outside(data))
    assert not storage.fetch_package("key", tmp_path / "back")
    assert len(notes) == 1
    assert notes[0].startswith(f"{url} has a damaged entry (")
    assert notes[0].endswith("): it was taken away, and is made again.")
    assert not (tmp_path / "back").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if "back" in path.name) == []
    assert not (tmp_path / "escaped").exists()
    storage.push_package("key", package)
    assert storage.fetch_package("key", tmp_path / "back")
    assert Package.open(tmp_path / "back").damage() == []


def outside(data: bytes) -> bytes:
    """An entry of somebody who would write elsewhere, whose digest is right."""
    from tapeout.matrix.shared import _signed

    entry: dict[str, Any] = json.loads(data)
    del entry["sha256"]
    _path, told = entry["files"].popitem()
    return json.dumps(_signed({**entry, "files": {**entry["files"], "../escaped": told}})).encode()


def test_codes_that_would_go_elsewhere_are_damage(url: str, make_model: MakeModel) -> None:
    from tapeout.matrix.shared import _signed

    notes: list[str] = []
    storage = Storage(url, notes)
    storage.push_store("key", quantize(load(make_model()), "int8").directory)
    entry = json.loads(storage._files.cat_file(storage._entry("stores", "key")))
    del entry["sha256"]
    storage._files.pipe_file(
        storage._entry("stores", "key"), json.dumps(_signed({**entry, "name": "../out"})).encode()
    )
    assert not storage.fetch_store("key")
    assert "it is to be called '../out'" in notes[0]


class Killed(Exception):
    """A machine dies here."""


def gone_after_two(stage: str, done: int, total: int) -> None:
    if (stage, done) == ("calibrate", 2):
        raise Killed


def calibrated(model: Path, cache: Path, storage: Storage | None, **keywords: Any) -> Quantized:
    os.environ["TAPEOUT_CACHE"] = str(cache)
    sees = Calibration(None, 4, 32)
    return quantize(
        load(model), "int4-g32", rounding="gptq", calibration=sees, checkpoints=storage, **keywords
    )


@pytest.mark.slow
def test_a_layer_that_a_machine_has_calibrated_is_gone_on_from_by_another(
    url: str,
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("TAPEOUT_CACHE", "")  # put back at the end
    model, notes = make_model(num_hidden_layers=3), list[str]()
    whole = calibrated(model, tmp_path / "alone", None)
    with pytest.raises(Killed):
        calibrated(model, tmp_path / "one", Storage(url, notes), progress=gone_after_two)
    for damaged in (None, "tensors/model.layers.0.mlp.up_proj.weight.safetensors", ".calibration/done.json"):
        storage = Storage(url, notes)
        kept = storage._known("layers", whole.directory.name)
        assert kept is not None
        if damaged:
            spoil(storage, kept["files"][damaged]["sha256"], lambda data: data[:-1] + b"?")
        notes.clear()
        caplog.clear()
        other = calibrated(model, tmp_path / f"other {damaged and damaged[:4]}", storage)
        assert bytes_of(other.directory) == bytes_of(whole.directory)
        went_on = f"went on after layer {kept['layers']}, which {url} had."
        assert (went_on in caplog.text) == (damaged is None)
        assert any("has a damaged entry" in note for note in notes) == bool(damaged)
    storage.forget_layers(whole.directory)
    codes = {
        entry["sha256"]
        for entry in json.loads((whole.directory / "quantization.json").read_text())["tensors"].values()
    }
    assert set(every(storage)) <= codes  # nothing but blobs that the codes have, too
    storage.forget_layers(whole.directory)  # of which there are none


def test_no_storage_has_nothing_and_keeps_nothing(package: Path, tmp_path: Path) -> None:
    storage = Storage(None, [])
    storage.push_package("key", package)
    assert not storage.has_package("key")
    assert not storage.fetch_package("key", tmp_path / "back")
    assert not storage.fetch_store("key")


def test_a_storage_that_cannot_be_opened_is_said_and_done_without() -> None:
    notes: list[str] = []
    assert not Storage.at("nosuch://bucket", notes).has_package("key")
    assert notes == [
        "--cache nosuch://bucket cannot be opened: Protocol not known: nosuch. Went on without it."
    ]


def test_a_protocol_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(url: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", absent)
    with pytest.raises(MissingToolchain, match="Install s3fs to access S3: pip install what it names"):
        Storage("s3://bucket", [])


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few kilobytes."""
    place = tmp_path / "full"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root and mount")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_storage_is_said_and_leaves_nothing_half_written(
    full: Path, package: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    (package / "artifact" / "large").write_bytes(np.random.default_rng(0).bytes(1 << 16))
    storage = Storage(str(full), notes)
    storage._push("packages", "key", "made", {"large": package / "artifact" / "large"})
    assert notes == [f"{full} could not take this: No space left on device. Went on without it."]
    assert [path for path in full.rglob("*") if path.is_file()] == []
    assert not storage.has_package("key")


def test_a_bucket_that_is_not_there_is_said_and_not_made(s3: Buckets, package: Path) -> None:
    notes: list[str] = []
    Storage("s3://sahred/tapeout", notes).push_package("key", package)
    assert notes == [
        "s3://sahred/tapeout could not take this: The specified bucket does not exist. Went on without it."
    ]
    assert b"sahred" not in s3.ask("GET", "/")


def test_a_bucket_that_one_may_not_use(s3: Buckets, package: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    storage = Storage("s3://shared/denied", notes)
    s3.close_to_strangers(True)
    try:
        assert not storage.has_package("key")
        assert not storage.fetch_package("key", tmp_path / "back")
        storage.push_package("key", package)
    finally:
        s3.close_to_strangers(False)
    what = "s3://shared/denied could not"
    why = "access was denied (Forbidden): the credentials must be allowed to list, read and write there. Went on without it."
    assert notes == [f"{what} be read: {why}", f"{what} be read: {why}", f"{what} take this: {why}"]
    storage.push_package("key", package)
    assert storage.has_package("key")


class Full(BaseHTTPRequestHandler):
    """A bucket that has nothing and takes nothing, as Ceph says it of one whose quota is used up."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def say(self, status: int, told: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def do_HEAD(self) -> None:
        self.say(404)

    def do_GET(self) -> None:
        self.say(200, b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>")

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.say(
            403, b"<Error><Code>QuotaExceeded</Code><Message>the bucket has no room left</Message></Error>"
        )


def test_a_bucket_that_is_full(s3: Buckets, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Full) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        place = {"endpoint_url": f"http://127.0.0.1:{server.server_port}"}
        monkeypatch.setitem(fsspec.config.conf, "s3", place)
        Storage("s3://shared/full", notes).push_package("key", package)
        server.shutdown()
    (said,) = notes
    assert said.startswith("s3://shared/full could not take this: ")
    assert "the bucket has no room left" in said
    assert said.endswith(". Went on without it.")
