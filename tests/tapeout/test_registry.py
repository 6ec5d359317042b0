"""Packages to a real registry and back: nothing twice, nothing half, nothing outside, and other clients read them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from commands import tapeout
from packages import names, packed, same
from registries import Cutting, Running

from tapeout import registry
from tapeout.errors import OutputError, PackageError, RegistryError
from tapeout.generated import write_model
from tapeout.modelpack import ARTIFACT_TYPE, CONFIG_TYPE, FILEPATH, compose, layers_of, read
from tapeout.oci import MANIFEST_TYPE, Reference, Repository, session, sha256
from tapeout.pack import MANIFEST, Package
from tapeout.registry import pull, push

DATA = Path(__file__).parent / "data"
RAW = "application/vnd.cncf.model.weight.v1.raw"


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Package]:
    """One model for two targets."""
    pytest.importorskip("gguf")
    work = tmp_path_factory.mktemp("packages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPEOUT_CACHE", str(work / "cache"))
        model = write_model(work / "small", dtype="F32")
        return {name: packed(model, name, work / name) for name in ("null", "cpu")}


def named(running: Running | Cutting, tail: str = ":v1") -> Reference:
    return Reference.parse(f"{running.host}/team/small{tail}")


def test_two_targets_of_a_model_share_blobs(
    running: Running, packages: Mapping[str, Package], tmp_path: Path
) -> None:
    first = push(packages["cpu"].directory, named(running, ":cpu"))
    second = push(packages["null"].directory, named(running, ":null"))
    blobs = [set(layers_of(packages[name]).values()) for name in ("cpu", "null")]
    shared = blobs[0] & blobs[1]
    assert len(shared) >= 3  # golden values, tokenizer, generation defaults
    assert (first.present, second.present) == (0, len(shared))
    assert first.root_sha256 == packages["cpu"].manifest["root_sha256"]
    # Everything once: the layers of both, and of each a config and a manifest.
    kept = running.blobs()
    assert kept.items() >= {(blob.digest, blob.size) for blob in blobs[0] | blobs[1]}
    assert len(kept) == len(blobs[0] | blobs[1]) + 4
    config = compose(packages["null"])[1]
    assert second.sent_bytes == sum(blob.size for blob in blobs[1] - shared) + len(config)
    for name, pushed in (("cpu", first), ("null", second)):
        pulled = pull(named(running, f":{name}"), tmp_path / name)
        assert pulled.reference == pushed.reference
        assert same(tmp_path / name, packages[name].directory)
        assert Package.open(tmp_path / name).damage() == []
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_what_is_there_does_not_travel(running: Running, packages: Mapping[str, Package]) -> None:
    directory = packages["null"].directory
    first = push(directory, named(running))
    again = push(directory, named(running, ":v2"))
    assert again.reference == first.reference
    assert (again.sent_bytes, again.present) == (0, again.blobs)
    elsewhere = Reference.parse(f"{running.host}/other/repository")
    moved = push(directory, elsewhere, mount_from="team/small")
    assert (moved.sent_bytes, moved.mounted) == (0, moved.blobs)


def test_a_digest_pins(running: Running, packages: Mapping[str, Package], tmp_path: Path) -> None:
    digest = push(packages["null"].directory, named(running)).reference.partition("@")[2]
    push(packages["cpu"].directory, named(running))  # the tag moves on
    pinned = named(running, f"@{digest}")
    assert pull(pinned, tmp_path / "out").root_sha256 == packages["null"].manifest["root_sha256"]
    assert push(packages["null"].directory, pinned).reference == str(pinned)
    with pytest.raises(RegistryError, match=f"{digest} was asked for"):
        push(packages["cpu"].directory, pinned)


def test_the_command_line(running: Running, packages: Mapping[str, Package], tmp_path: Path) -> None:
    where, out = str(named(running)), tmp_path / "out"
    done = tapeout("push", packages["null"].directory, where, "--json", status=0)
    pushed = json.loads(done.stdout)
    assert pushed["reference"] in done.stderr
    done = tapeout("pull", where, "--out", out, status=0)
    assert pushed["reference"] in done.stderr
    assert pushed["root_sha256"] in done.stderr
    assert "exists; give --force" in tapeout("pull", where, "--out", out, status=2).stderr
    done = tapeout("pull", pushed["reference"], "--out", out, "--force", "--json", status=0)
    assert json.loads(done.stdout)["reference"] == pushed["reference"]
    assert "names no registry" in tapeout("pull", "small", "--out", out, status=2).stderr
    assert "does not exist" in tapeout("pull", where + "x", "--out", tmp_path / "x", status=2).stderr
    assert not (tmp_path / "x").exists()


def test_drops_in_the_middle(running: Running, packages: Mapping[str, Package], tmp_path: Path) -> None:
    way, directory = Cutting(running.port), packages["null"].directory
    way.cuts = {"up": [20_000, 30_000, 9_000], "down": [9_000, 2_000]}
    pushed = push(directory, named(way))
    way.cuts["down"] = [20_000, 30_000, 9_000, 25_000]
    assert pull(named(way), tmp_path / "out").reference == pushed.reference
    assert way.cuts == {"up": [], "down": []}
    assert same(tmp_path / "out", directory)


def test_a_pull_that_was_given_up_goes_on(
    running: Running, packages: Mapping[str, Package], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way, out = Cutting(running.port), tmp_path / "out"
    push(packages["null"].directory, named(running))
    way.cuts["down"] = [60_000]
    monkeypatch.setattr(session, "_FAILURES", 1)
    with pytest.raises(RegistryError, match="the same command goes on"):
        pull(named(way), out)
    assert not out.exists()
    assert ".out.pull" in names(tmp_path)
    pulled = pull(named(way), out)
    assert pulled.present > 0
    assert pulled.sent_bytes < pulled.size_bytes
    assert same(out, packages["null"].directory)
    assert ".out.pull" not in names(tmp_path)


def test_a_damaged_package_is_not_sent(
    running: Running, packages: Mapping[str, Package], tmp_path: Path
) -> None:
    copied = shutil.copytree(packages["null"].directory, tmp_path / "copied")
    (copied / "README.md").write_text("other")
    with pytest.raises(PackageError, match=r"is not sent: README\.md "):
        push(copied, named(running))
    assert running.blobs() == {}


def artifact(running: Running, layers: list[dict[str, Any]], *blobs: bytes, **fields: Any) -> Reference:
    """Put an artifact of any kind into the registry, as an attacker can."""
    with Repository(named(running), push=True) as where:
        for blob in (b"{}", *blobs):
            with (running.root.parent / "blob").open("w+b") as file:
                file.write(blob)
                where.upload(sha256(blob), len(blob), file, lambda _: None)
        config = {"mediaType": CONFIG_TYPE, "digest": sha256(b"{}"), "size": 2}
        kinds = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": ARTIFACT_TYPE}
        where.put_manifest(json.dumps({**kinds, "config": config, "layers": layers, **fields}).encode())
    return named(running)


def layer(path: Any, blob: bytes = b"{}", **fields: Any) -> dict[str, Any]:
    described = {"mediaType": RAW, "digest": sha256(blob), "size": len(blob)}
    return {**described, "annotations": {FILEPATH: path}, **fields}


HOSTILE = {
    "up": ([layer("../escaped")], "no file inside"),
    "inner": ([layer("artifact/../../escaped")], "no file inside"),
    "absolute": ([layer("/tmp/escaped")], "no file inside"),
    "backslash": ([layer("..\\escaped")], "no file inside"),
    "drive": ([layer("C:escaped")], "no file inside"),
    "dot": ([layer("./README.md")], "no file inside"),
    "empty": ([layer("")], "layer without a name"),
    "control": ([layer("a\x1b[31m")], "no file inside"),
    "long": ([layer("a" * 300)], "no file inside"),
    "twice": ([layer("a"), layer("a")], "'a' and 'a' are one file"),
    "case": ([layer("a/README"), layer("A/readme")], "are one file"),
    "folder": ([layer("a"), layer("a/b")], "'a/b' lies below a file"),
    "number": ([layer(7)], "layer without a name"),
    "tar": ([layer("a", mediaType=RAW.replace("raw", "tar"))], "a package's files are raw"),
    "digest": ([layer("a", digest="sha256:../../etc/passwd")], "has the digest"),
    "negative": ([layer("a", size=-1)], "has the size -1"),
    "text": ([layer("a", size="2")], "has the size '2'"),
    "huge": ([layer("a", size=1 << 64)], "has the size 18446744073709551616"),
    "manifest": ([layer(MANIFEST, size=1 << 40)], "would have 1099511627776 bytes"),
    "none": ([layer("a")], "a model without tapeout.json"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_layers(packages: Mapping[str, Package], case: str) -> None:
    layers, message = HOSTILE[case]
    manifest = {"artifactType": ARTIFACT_TYPE, "config": {}, "layers": [*layers]}
    with pytest.raises(PackageError) as raised:
        read(json.dumps(manifest).encode(), "r.example/a:v1")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"{", "no readable manifest"),
        (b"[]", "no readable manifest"),
        (b"[" * 100_000, "no readable manifest"),
        (b'{"artifactType": "application/vnd.cncf.model.manifest.v1+json"}', "no readable manifest"),
        (b'{"config": {"mediaType": "application/vnd.oci.image.config.v1+json"}}', "is no model but"),
        (
            json.dumps({"mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []}).encode(),
            "is an index",
        ),
    ],
)
def test_manifests_that_are_none(manifest: bytes, message: str) -> None:
    with pytest.raises(PackageError, match=message):
        read(manifest, "r.example/a:v1")


def test_nothing_is_written_outside(
    running: Running, packages: Mapping[str, Package], tmp_path: Path
) -> None:
    """By hand, end to end: what a hostile artifact leaves is nothing, inside and outside."""
    work = tmp_path / "work"
    work.mkdir()
    package = packages["null"]
    content = (package.directory / MANIFEST).read_bytes()
    good = [
        {**layer(path), "digest": blob.digest, "size": blob.size} for path, blob in layers_of(package).items()
    ]
    push(package.directory, named(running))
    digest = package.files()["README.md"]
    other = [each for each in good if each["annotations"][FILEPATH] != "README.md"]
    attacks: list[tuple[list[dict[str, Any]], tuple[bytes, ...], str]] = [
        ([*good, layer("../escaped")], (), "no file inside"),
        ([*good, layer("more")], (), "has 'more', which its tapeout.json does not name"),
        (other, (), r"has no README\.md"),
        ([*other, layer("README.md")], (), r"other bytes of README\.md"),
        ([*other, {**layer("README.md"), "digest": f"sha256:{digest}", "size": 3}], (), "other bytes of"),
        ([layer(MANIFEST, b"[]")], (b"[]",), "cannot be read as a manifest"),
        ([layer(MANIFEST, b"{}")], (), "cannot be read as a manifest"),
        (
            [layer(MANIFEST, content[:-3] + b",}")],
            (content[:-3] + b",}",),
            "cannot be read as a manifest|is not JSON",
        ),
    ]
    for layers, blobs, message in attacks:
        reference = artifact(running, layers, *blobs)
        with pytest.raises(PackageError, match=message):
            pull(reference, work / "out")
        assert names(work) == set()
        assert "escaped" not in names(tmp_path)


def test_absurd_sizes_are_refused_before_they_are_fetched(
    running: Running, packages: Mapping[str, Package], tmp_path: Path
) -> None:
    package, size = packages["null"], 1 << 52
    manifest = json.loads((package.directory / MANIFEST).read_text())
    manifest["files"]["README.md"]["size"] = size
    content = json.dumps(manifest).encode()
    layers = [
        {**layer(path), "digest": blob.digest, "size": blob.size} for path, blob in layers_of(package).items()
    ]
    changed = {MANIFEST: layer(MANIFEST, content)}
    for each in layers:
        if each["annotations"][FILEPATH] == "README.md":
            each["size"] = size
    layers = [changed.get(each["annotations"][FILEPATH], each) for each in layers]
    push(package.directory, named(running))
    with pytest.raises(OutputError, match=r"bytes free, and 4503\d+ would have to be written"):
        pull(artifact(running, layers, content), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tiny file system, which takes root")
def test_a_full_disk(
    running: Running, packages: Mapping[str, Package], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, reference = tmp_path / "disk", named(running)
    disk.mkdir()
    push(packages["null"].directory, reference)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(OutputError, match="bytes free, and"):
            pull(reference, disk / "out")
        monkeypatch.setattr(registry, "_check_room", lambda *_: None)  # as when others write there meanwhile
        done = tapeout("pull", str(reference), "--out", disk / "out", status=2)
        assert f"are kept in {disk / '.out.pull'}" in done.stderr
        assert names(disk) == {".out.pull"}
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert pull(reference, disk / "out").present > 0
        assert names(disk) == {"out"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_artifact_is_what_the_specification_says(packages: Mapping[str, Package]) -> None:
    schema = json.loads((DATA / "modelpack-config-schema.json").read_text())
    for name, package in packages.items():
        manifest, config = (json.loads(each) for each in compose(package))
        jsonschema.validate(config, schema, format_checker=jsonschema.FormatChecker())
        assert manifest["config"]["mediaType"] == CONFIG_TYPE
        assert config["modelfs"]["diffIds"] == [each["digest"] for each in manifest["layers"]]
        assert config["descriptor"]["title"] == f"small int4-g32 for {name}"
        assert config["config"]["format"] == {"null": "safetensors", "cpu": "gguf"}[name]
        assert config["config"]["quantization"] == "int4-g32"
        kinds = {
            each["annotations"][FILEPATH]: each["mediaType"].removeprefix("application/vnd.cncf.model.")
            for each in manifest["layers"]
        }
        assert kinds["README.md"] == kinds["report.html"] == kinds["sbom.cdx.json"] == "doc.v1.raw"
        assert kinds[MANIFEST] == kinds["tokenizer/tokenizer.json"] == "weight.config.v1.raw"
        assert kinds["golden.safetensors"] == "dataset.v1.raw"
        assert "weight.v1.raw" in kinds.values()
        assert compose(package) == compose(Package.open(package.directory))


def test_oras_pulls_it(running: Running, packages: Mapping[str, Package], tmp_path: Path) -> None:
    """The client of another project, which validates the manifest against its own schema and goes by titles."""
    client = pytest.importorskip("oras.client", reason="no oras (pip install oras)")
    schemas = pytest.importorskip("oras.schemas")
    push(packages["cpu"].directory, named(running))
    theirs = client.OrasClient(insecure=True)
    found = theirs.get_manifest(str(named(running)), validation_schema=schemas.manifest)
    assert found["artifactType"] == ARTIFACT_TYPE
    theirs.pull(target=str(named(running)), outdir=str(tmp_path / "out"))
    assert same(tmp_path / "out", packages["cpu"].directory)


@pytest.mark.skipif(not shutil.which("skopeo"), reason="no skopeo (Debian: apt-get install skopeo)")
def test_skopeo_copies_it(running: Running, packages: Mapping[str, Package], tmp_path: Path) -> None:
    """A copy between repositories by a container tool keeps the digest, and is pulled from there."""
    pushed = push(packages["null"].directory, named(running))
    copy = Reference.parse(f"{running.host}/mirror/small:v1")
    command = ["skopeo", "copy", "--src-tls-verify=false", "--dest-tls-verify=false"]
    subprocess.run(
        [*command, f"docker://{named(running)}", f"docker://{copy}"], check=True, capture_output=True
    )
    pulled = pull(copy, tmp_path / "out")
    assert pulled.reference == pushed.reference.replace("team/small", "mirror/small")
