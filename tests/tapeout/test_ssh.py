"""Devices that ssh reaches: a real sshd, in a network namespace of its own where this machine lets one be made, else on the loopback."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import pytest
from checked import ABSENT, decoder
from commands import tapeout

from tapeout.errors import MissingToolchain, PackageError, RuntimeCrash, TapeoutError
from tapeout.files import canonical_json
from tapeout.pack import Package
from tapeout.ssh import Address, checked

pytestmark = pytest.mark.slow
pytest.importorskip("llama_cpp")
pytest.importorskip("transformers")

Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
SIDE = files("tapeout") / "data" / "ssh_device.py"
SHELL = "#!/bin/sh\n"


@dataclass(frozen=True)
class Host:
    """A device: its daemon, where it is, and what ssh is started by to get there."""

    work: Path
    address: str
    daemon: psutil.Process

    @property
    def home(self) -> Path:
        return self.work / "home"

    def at(self, directory: str | Path = "") -> str:
        return f"ssh://{getpass.getuser()}@{self.address}:2222{directory}"


def ran(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def namespace() -> Iterator[tuple[list[str], str]]:
    """What begins a command there, and its address."""
    name = f"tapeout{os.getpid()}"
    outside, inside = f"to{os.getpid() % 65536}a", f"to{os.getpid() % 65536}b"
    if (
        os.geteuid()
        or not shutil.which("ip")
        or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode
    ):
        yield [], "127.0.0.1"
        return
    try:
        third = os.getpid() % 250  # of 198.18.0.0/15, which is for measurements between networks
        ran("ip", "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name)
        ran("ip", "addr", "add", f"198.18.{third}.1/30", "dev", outside)
        ran("ip", "link", "set", outside, "up")
        ran("ip", "-n", name, "addr", "add", f"198.18.{third}.2/30", "dev", inside)
        for each in (inside, "lo"):
            ran("ip", "-n", name, "link", "set", each, "up")
        yield ["ip", "netns", "exec", name], f"198.18.{third}.2"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[list[str], str]]:
    if not SSHD or not shutil.which("ssh") or not shutil.which("ssh-keygen"):
        pytest.skip("needs sshd, ssh and ssh-keygen (Debian: apt-get install openssh-server openssh-client)")
    with namespace() as found:
        yield found


@contextlib.contextmanager
def device(work: Path, network: tuple[list[str], str]) -> Iterator[Host]:
    """Start a daemon with keys of its own, and put an ``ssh`` with a configuration of its own first on PATH."""
    begin, address = network
    (work / "home").mkdir(parents=True)
    for name in ("host", "user", "other"):
        ran("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", work / name)
    lines = [
        "Port 2222", f"ListenAddress {address}", f"HostKey {work}/host", f"AuthorizedKeysFile {work}/user.pub", "StrictModes no",
        "PidFile none", "UsePAM no", "PasswordAuthentication no", "PermitRootLogin prohibit-password",
        f"SetEnv HOME={work}/home",
    ]  # fmt: skip
    (work / "sshd_config").write_text("\n".join(lines) + "\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    daemon = psutil.Popen([*begin, SSHD, "-D", "-E", str(work / "log"), "-f", str(work / "sshd_config")])
    host_key = (work / "host.pub").read_text()
    (work / "known").write_text(f"[{address}]:2222 {host_key}")
    user(work, "user")
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection((address, 2222), timeout=1):
                break
            assert daemon.poll() is None, (work / "log").read_text()
            time.sleep(0.1)
        yield Host(work, address, daemon)
    finally:
        for child in daemon.children(recursive=True):
            child.kill()
        daemon.kill()
        daemon.wait()


def user(work: Path, key: str) -> None:
    """The ssh that tests call: the system's, with that key."""
    (work / "bin").mkdir(exist_ok=True)
    config = f"UserKnownHostsFile {work}/known\nGlobalKnownHostsFile none\nIdentityFile {work}/{key}\nIdentitiesOnly yes\nStrictHostKeyChecking yes\n"
    (work / "ssh_config").write_text(config)
    script = work / "bin" / "ssh"
    script.write_text(f'{SHELL}exec {shutil.which("ssh", path=os.defpath)} -F {work}/ssh_config "$@"\n')
    script.chmod(0o755)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, network: tuple[list[str], str]) -> Iterator[Host]:
    with device(tmp_path_factory.mktemp("device") / "work", network) as found:
        yield found


@pytest.fixture
def host(shared: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    user(shared.work, "user")
    monkeypatch.setenv("PATH", f"{shared.work}/bin:{os.environ['PATH']}")
    return shared


@pytest.fixture(autouse=True)
def _no_workers(monkeypatch: pytest.MonkeyPatch, here: Any) -> None:
    monkeypatch.setattr("tapeout.validate.worker.borrow", here)


@pytest.fixture(scope="module")
def gguf(once: Once) -> Path:
    return once("checked-gguf", lambda out: decoder(out, "cpu").directory)[1]


@pytest.fixture
def package(gguf: Path) -> Package:
    return Package.open(gguf)


def python(directory: Path, lines: str) -> None:
    """The python3 of a virtual environment in the device's directory."""
    script = directory / ".venv" / "bin" / "python3"
    script.parent.mkdir(parents=True)
    script.write_text(SHELL + lines)
    script.chmod(0o755)


def runtime(directory: Path) -> None:
    """One with the runtime, and without tapeout."""
    stage = directory / ".venv" / "stage"
    stage.mkdir(parents=True)
    (stage / "sitecustomize.py").write_text(ABSENT)
    settings = f"ABSENT=tapeout PYTHONPATH={stage} PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1"
    script = f'{settings} exec {sys.executable} "$@"\n'
    python(directory, script)


def answering(directory: Path, report: str | bytes, status: int = 0) -> None:
    """One that writes that report, whatever it is told to run."""
    directory.mkdir(parents=True, exist_ok=True)
    data = report if isinstance(report, bytes) else report.encode()
    (directory.parent / f"{directory.name}.answer").write_bytes(data)
    python(directory, f'cp "{directory.parent}/{directory.name}.answer" "$4"; exit {status}\n')


def copies(package: Package, address: str) -> tuple[Any, list[int]]:
    """The report, and bytes that were to be copied each time that it was told."""
    told: list[int] = []
    return checked(package, Address.parse(address), lambda stage, done, total: told.append(total)), told


def test_it_is_copied_checked_and_merged(package: Package, host: Host, tmp_path: Path) -> None:
    """Into the default place; what is there already is not copied again, and what differs is."""
    below = host.home / ".cache" / "tapeout" / "check"
    runtime(below)  # beside all packages
    place = below / package.manifest["root_sha256"][:16]
    arguments = ("validate", package.directory, "--on", host.at(), "--report", tmp_path / "out", "--json")
    report = json.loads(tapeout(*arguments, status=0).stdout)
    gates = {gate["name"]: gate["status"] for gate in report["gates"] if gate["name"].startswith("device/")}
    assert set(gates.values()) == {"passed"}
    assert {"device/files/integrity", "device/cpu/golden-decode"} <= gates.keys()
    assert report["device"]["units"]["cpu"]["contexts"]
    whole = {name: (place / name).read_bytes() for name in package.files()}
    assert whole == {name: (package.directory / name).read_bytes() for name in whole}
    assert not list(place.rglob("*.part"))
    weights = next(name for name in whole if name.endswith(".gguf"))
    (place / weights).write_bytes(b"x" + whole[weights][1:])
    (place / "README.md").unlink()
    half = whole["README.md"][: len(whole["README.md"]) // 2]
    (place / "README.md.part").write_bytes(half)
    _, told = copies(package, host.at())
    assert set(told) == {len(whole[weights]) + len(whole["README.md"]) - len(half)}
    assert (place / "README.md").read_bytes() == whole["README.md"]
    assert copies(package, host.at())[1] == []


def test_a_connection_that_is_lost(package: Package, host: Host, tmp_path: Path) -> None:
    """In the middle of a copy: the next one goes on from there."""
    place, told = tmp_path / "place", []

    def lose(stage: str, done: int, total: int) -> None:
        told.append(total)
        if len(told) == 5:
            for _ in range(300):  # what is on its way must have arrived
                if (place / "tapeout.json").exists():
                    break
                time.sleep(0.1)
            for child in host.daemon.children(recursive=True):
                child.kill()

    with pytest.raises(
        MissingToolchain, match=r"cannot be reached, or the connection ended.*goes on where it stopped"
    ):
        checked(package, Address.parse(host.at(place)), lose)
    assert (place / "tapeout.json").exists()
    assert not (place / "device_report.json").exists()
    answering(place, "{")
    with pytest.raises(PackageError, match="is not a device report"):
        copies(package, host.at(place))
    assert {(place / name).is_file() for name in package.files()} == {True}


def test_devices_that_cannot_be_reached(package: Package, host: Host) -> None:
    done = tapeout("validate", package.directory, "--on", f"ssh://{host.address}:1", status=3)
    assert f"tapeout: {host.address} cannot be reached" in done.stderr
    assert "Connection refused" in done.stderr
    user(host.work, "other")
    done = tapeout("validate", package.directory, "--on", host.at(), status=3)
    assert "Permission denied (publickey" in done.stderr
    user(host.work, "user")
    (host.work / "known").rename(host.work / "known.away")
    done = tapeout("validate", package.directory, "--on", host.at(), status=3)
    (host.work / "known.away").rename(host.work / "known")
    assert "Host key verification failed" in done.stderr
    done = tapeout("validate", package.directory, "--on", host.at(), status=3, PATH="/none")
    assert "there is no ssh here" in done.stderr


def test_what_a_device_lacks(package: Package, host: Host, tmp_path: Path) -> None:
    if not subprocess.run(
        ["python3", "-c", "import llama_cpp"], env={"PATH": os.defpath}, capture_output=True
    ).returncode:
        pytest.skip("this system's own python3 has llama-cpp-python")
    done = tapeout("validate", package.directory, "--on", host.at(tmp_path / "place"), status=3)
    assert "cannot be imported by /usr/" in done.stderr
    assert "pip install llama-cpp-python" in done.stderr
    assert f"a virtual environment .venv in {tmp_path / 'place'}, or beside it" in done.stderr


def test_a_device_without_python(package: Package, host: Host, tmp_path: Path) -> None:
    """A shell finds nothing on a PATH that leads nowhere."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "ssh"
    # The words of what runs there come last.
    script.write_text(
        f"""{SHELL}for last; do :; done; i=$(($# - 1)); n=0
for each; do n=$((n + 1)); [ $n -le $i ] && set -- "$@" "$each"; shift; done
exec {host.work}/bin/ssh "$@" "PATH=/none; $last"
"""
    )
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
        done = tapeout("validate", package.directory, "--on", host.at(), status=3)
    assert "has no python3: install it" in done.stderr
    assert "check.cpp" in done.stderr


def test_a_full_disk(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says so before anything is copied, and one that no more can be written to."""
    pretend(
        tmp_path / "bin",
        """echo 'tapeout-device {"need": [[0, 0]], "free": 10}'; cat >/dev/null""",
        monkeypatch,
    )
    with pytest.raises(MissingToolchain, match=r"somewhere has 0\.0 MB free, and 0\.0 MB .* make room"):
        checked(package, Address.parse("ssh://somewhere"))
    told = {
        "directory": str(tmp_path / "place"),
        "files": [["tapeout.json", 1 << 20, "0" * 64]],
        "timeout": 1,
    }
    given = json.dumps(told).encode() + b"\n" + bytes(1 << 20)
    # No file may be larger than 64 blocks of 512 or 1024 bytes: the kernel refuses it as it refuses one that the disk has no room for.
    command = ["sh", "-c", 'ulimit -f 64; exec "$@"', "sh", sys.executable, str(SIDE)]
    side = subprocess.run(command, input=given, capture_output=True, check=True)
    last = json.loads(side.stdout.splitlines()[-1].removeprefix(b"tapeout-device "))
    assert last["status"] == 3
    assert "File too large" in last["error"]
    assert 0 < (tmp_path / "place" / "tapeout.json.part").stat().st_size <= 1 << 16


def pretend(directory: Path, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ssh that greets, and answers for the device."""
    directory.mkdir()
    (directory / "ssh").write_text(f"{SHELL}echo Welcome; head -n 1 >/dev/null; {answer}\n")
    (directory / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def told(package: Package, **fields: Any) -> dict[str, Any]:
    """A report that a device might give."""
    gate = {
        "name": "golden-decode",
        "status": "passed",
        "metric": "nats",
        "value": 1e-4,
        "limit": 2e-3,
        "reason": "why",
    }
    rates = {
        "context": 16,
        "first_token_s": 1.0,
        "prefill_tokens_per_s": 20.0,
        "decode_tokens_per_s": 10.0,
        "samples": 96,
    }
    times = {f"token_p{q}_s": 0.1 for q in (50, 90, 99)}
    speed = {
        "load_s": 1.0,
        "first_run_s": 1.0,
        "peak_resident_bytes": 1,
        "contexts": [rates | times | fields.pop("speed", {})],
    }
    unit = {"gates": [gate | fields.pop("gate", {})], "throughput": speed}
    device = {"machine": "a", "system": "b", "chip": "c", "memory_bytes": 1} | fields.pop("device", {})
    return {
        "format_version": 1, "root_sha256": package.manifest["root_sha256"], "device": device, "runtime": "r", "units": {"cpu": unit}
    } | fields  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda p: json.dumps(told(p))[:300], "is not a device report: Expecting ',' delimiter"),
        (lambda p: "", "left no device_report.json"),
        (lambda p: b"\xff\xfe", "is not a device report: 'utf-8' codec"),
        (lambda p: "[" * 100_000, "is not a device report: maximum recursion depth"),
        (lambda p: "x" * (5 << 20), "bytes; what fits: up to"),
        (lambda p: json.dumps(told(p, root_sha256="0" * 64)), "is of another package"),
        (lambda p: json.dumps(told(p, speed={"decode_tokens_per_s": 1e300})), "decode_tokens_per_s: Input should be less than"),
        (lambda p: json.dumps(told(p, speed={"token_p50_s": -1.0})), "token_p50_s: Input should be greater than"),
        (lambda p: json.dumps(told(p, speed={"samples": float("nan")})), "samples: "),
        (lambda p: json.dumps(told(p, gate={"value": 5.0})), "it says passed, and 5 is above its limit of 0.002"),
        (lambda p: json.dumps(told(p, gate={"reason": "\x1b[2J"})), "reason: String should match"),
        (lambda p: json.dumps(told(p, device={"chip": "c" * 5000})), "chip: String should have at most"),
        (lambda p: json.dumps(told(p, units={"../x": told(p)["units"]["cpu"]})), "units"),
    ],
    ids=["half", "none", "bytes", "deep", "huge", "other", "fast", "negative", "nan", "above", "escape", "long", "name"],
)  # fmt: skip
def test_reports_that_are_not_merged(
    package: Package, host: Host, tmp_path: Path, answer: Callable[[Package], Any], words: str
) -> None:
    answering(tmp_path / "place", answer(package))
    # The package stands there already, but for what is small: what is tested is the answer.
    shutil.copytree(package.directory, tmp_path / "place", dirs_exist_ok=True)
    done = tapeout(
        "validate",
        package.directory,
        "--on",
        host.at(tmp_path / "place"),
        "--report",
        tmp_path / "out",
        status=2,
    )
    line, page = done.stderr.splitlines()
    assert page.startswith("see: tapeout docs ")
    assert words in line
    assert host.address in line
    assert not (tmp_path / "out").exists()


def test_a_script_that_dies(package: Package, host: Host, tmp_path: Path) -> None:
    shutil.copytree(package.directory, tmp_path / "place")
    python(tmp_path / "place", 'echo "illegal instruction"; kill -9 $$\n')
    with pytest.raises(RuntimeCrash, match=r"ended with -9: illegal instruction"):
        checked(package, Address.parse(host.at(tmp_path / "place")))


def test_a_gate_that_fails_there(package: Package, host: Host, tmp_path: Path) -> None:
    """It is merged, and fails the report."""
    shutil.copytree(package.directory, tmp_path / "place")
    failed = told(package, gate={"status": "failed", "value": 3.0})
    answering(tmp_path / "place", json.dumps(failed), status=1)
    report = checked(package, Address.parse(host.at(tmp_path / "place")))
    assert [gate.status for gate in report.gates] == ["failed"]


@pytest.mark.parametrize(
    "answer", ['echo "tapeout-device {"', "echo 'tapeout-device []'", """echo 'tapeout-device {"need": [[99, 0]], "free": 1}'""", "exit 9"]
)  # fmt: skip
def test_devices_that_answer_something_else(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    """What is asked for is looked at, too."""
    pretend(tmp_path / "bin", answer, monkeypatch)
    with pytest.raises(TapeoutError, match=r"which says nothing|does not have|ended the connection with 9"):
        checked(package, Address.parse("ssh://somewhere"))


@pytest.mark.parametrize("name", ["$(touch made)", "a'b\"c;touch made", "-x", "é ü"])
def test_directories_are_no_words_of_a_shell(package: Package, host: Host, tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    answering(place, json.dumps(told(package)))
    shutil.copytree(package.directory, place, dirs_exist_ok=True)
    (place / "README.md").unlink()
    python_ = place / ".venv" / "bin" / "python3"
    python_.write_text(f"""{SHELL}cat > "$4" <<'END'\n{json.dumps(told(package))}\nEND\n""")
    report, sent = copies(package, host.at(place))
    assert report.runtime == "r"
    assert set(sent) == {(package.directory / "README.md").stat().st_size}
    assert not list(host.home.rglob("made"))


def test_a_directory_of_something_else(package: Package, host: Host, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(PackageError, match="is not empty and holds no package: name another directory"):
        checked(package, Address.parse(host.at(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]


def test_packages_that_are_not_sent(package: Package, host: Host, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package.directory, tmp_path / "copy"))
    (copy / "README.md").write_text("x")
    with pytest.raises(PackageError, match=r"README.md has 1 bytes instead of"):
        checked(Package.open(copy), Address.parse(host.at(tmp_path / "place")))
    size = (package.directory / "README.md").stat().st_size
    (copy / "README.md").write_text("x" * size)
    with pytest.raises(PackageError, match=r"README.md did not arrive with the digest of the manifest"):
        checked(Package.open(copy), Address.parse(host.at(tmp_path / "place")))
    manifest = json.loads((copy / "tapeout.json").read_text())
    (tmp_path / "else").write_text("else")
    manifest["beside"]["../else"] = {"size": 4, "sha256": "0" * 64}
    (copy / "README.md").write_bytes((package.directory / "README.md").read_bytes())
    (copy / "tapeout.json").write_text(canonical_json(manifest))
    with pytest.raises(PackageError, match=r"the path '../else' leaves its folder"):
        checked(Package.open(copy), Address.parse(host.at(tmp_path / "place")))
    del manifest["beside"]["../else"], manifest["files"]["check.py"]
    (copy / "tapeout.json").write_text(canonical_json(manifest))
    with pytest.raises(PackageError, match=r"has no check.py: it was made before"):
        checked(Package.open(copy), Address.parse(host.at(tmp_path / "place")))


def test_addresses() -> None:
    assert Address.parse("ssh://pi") == Address("pi")
    assert Address.parse("ssh://me@pi.local:2222/srv/model") == Address("pi.local", "me", 2222, "/srv/model")
    assert Address.parse("ssh://pi/~/model").directory == "~/model"
    assert Address.parse("ssh://pi/").directory is None
    assert Address.parse("ssh://[fe80::1%eth0]:22").host == "fe80::1%eth0"
    assert Address.parse("ssh://me@pi").command[-4:] == ["-l", "me", "--", "pi"]


@pytest.mark.parametrize(
    "text",
    ["pi", "ssh://", "http://pi", "ssh://-oProxyCommand=touch made", "ssh://-l@pi", "ssh://a b", "ssh://a;b", "ssh://$(x)", "ssh://pi:0",
     "ssh://pi:99999", "ssh://me:secret@pi", "ssh://pi/a\nb", "ssh://pi:2x", "ssh://@pi"],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(TapeoutError, match="is not the address of a device: write ssh://"):
        Address.parse(text)


def test_both_ways_at_once(package: Package) -> None:
    done = tapeout("validate", package.directory, "--on", "ssh://pi", "--device-report", "x.json", status=2)
    assert "leave one of them out" in done.stderr
