"""Worker environments: tools whose pins conflict with ours, each in a Python environment of its own.

Those of a target hold this same tapeout as well: where the target's library cannot be imported, the whole command line runs there.

An environment counts as there when its ``tapeout.json`` says that the probe ran with these very requirements; the file is written
last, so that what was interrupted is taken up again and never looks whole.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import platformdirs

from tapeout import own_wheel
from tapeout.errors import MissingToolchain, TapeoutError, nearest
from tapeout.files import canonical_json, lock, writing

__all__ = ["ENVIRONMENTS", "Environment", "create", "get", "python", "run_there", "worker_of"]

_MARK = "tapeout.json"
_WITHIN = "TAPEOUT_WITHIN"  # names the worker environment that a command line runs in
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Environment:
    """An environment that can be made.

    Attributes:
        purpose: what it is for, half a sentence.
        requirements: as pip takes them, pinned.
        probe: Python that must run in it; what it prints is kept as the versions.
        library: of the target of this name: where it cannot be imported, commands run in the environment, which holds this tapeout, too.
        after: Python that runs in it once the requirements are there, each time that it is made or taken up.
    """

    name: str
    purpose: str
    requirements: tuple[str, ...]
    probe: str
    library: str | None = None
    after: str = ""

    @property
    def directory(self) -> Path:
        """Where it stands: another place for other requirements or another Python."""
        version = ".".join(map(str, sys.version_info[:2]))
        key = hashlib.sha256(
            "\n".join([version, *self.requirements, *filter(None, [self.after])]).encode()
        ).hexdigest()[:12]
        return home() / f"{self.name}-{key}"

    @property
    def installed(self) -> bool:
        """Whether it is whole, and the tapeout in it, if any, this one."""
        try:
            said = json.loads((self.directory / _MARK).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        same: bool = said.get("tapeout") == self._own
        return same

    @property
    def _own(self) -> str | None:
        return own_wheel.digest() if self.library else None

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its probe said; MissingToolchain when it is not there."""
        try:
            found: Mapping[str, Any] = json.loads((self.directory / _MARK).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise MissingToolchain(
                f"the worker environment '{self.name}' ({self.purpose}) is not on this machine: {self.command}"
            ) from None
        return found

    @property
    def command(self) -> str:
        """What makes it."""
        return f"tapeout env create {self.name}"

    @property
    def size_bytes(self) -> int:
        """What its files take."""
        return sum(path.lstat().st_size for path in self.directory.rglob("*") if not path.is_dir())


def _versions(*packages: str) -> str:
    return (
        "import json, importlib.metadata as m; "
        f"print(json.dumps({{name: m.version(name) for name in {list(packages)!r}}}))"
    )


# TensorRT's bindings load TensorRT's libraries from their own folder: TensorRT-RTX's and its parser stand there by those names, and for
# the plugins, of which there are none, a library with the one function that the bindings take the address of.
_JOIN_RTX = """\
import pathlib, shutil, subprocess, sys, sysconfig
site = pathlib.Path(sysconfig.get_path("platlib"))
bindings, rtx = site / "tensorrt_bindings", "onnxruntime_ep_nv_tensorrt_rtx"
for name, library in (("libnvinfer.so.11", "libtensorrt_rtx.so.1.7.1"), ("libnvonnxparser.so.11", "libtensorrt_onnxparser_rtx.so.1.7.1")):
    (bindings / name).unlink(missing_ok=True)
    (bindings / name).symlink_to(f"../{rtx}/{library}")
compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
if not compiler:
    sys.exit("no C compiler was found, and a function of three lines is compiled: apt-get install gcc")
source = "int initLibNvInferPlugins(void *logger, const char *space) { return 1; }"
command = [compiler, "-shared", "-fPIC", "-xc", "-", "-o", str(bindings / "libnvinfer_plugin.so.11")]
subprocess.run(command, input=source.encode(), check=True)
"""

ENVIRONMENTS: dict[str, Environment] = {
    each.name: each
    for each in (
        Environment(
            "optimum",
            "ONNX graphs of Hugging Face families that tapeout has no file for",
            (
                "optimum==2.1.0",
                "optimum-onnx==0.1.0",
                "transformers==4.57.6",
                "torch==2.13.0",
                "onnx==1.23.2",
                "onnxruntime==1.32.0",
                "numpy==2.4.6",
            ),
            "import optimum.exporters.onnx; " + _versions("optimum-onnx", "transformers", "torch"),
        ),
        # coremltools 9.0 names torch 2.7.0 as the newest that it was tested with; its conversions break from numpy 2.4 on.
        Environment(
            "apple",
            "the target apple, where coremltools is absent or does not bear the versions of numpy and torch",
            ("coremltools==9.0", "torch==2.7.0", "numpy==2.3.5", "transformers==5.23.0"),
            "import coremltools, tapeout.cli; " + _versions("tapeout", "coremltools", "torch", "numpy"),
            library="coremltools",
        ),
        Environment(
            "tensorrt-rtx",
            "TensorRT engines built without a GPU, by TensorRT-RTX 1.7.1 (a mix that NVIDIA does not support)",
            ("onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0", "tensorrt-cu13-bindings==11.4.0.106"),
            "import tensorrt_bindings as trt; assert trt.Builder(trt.Logger()); "
            + _versions("onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt-cu13-bindings"),
            after=_JOIN_RTX,
        ),
    )
}
"""By name."""


def home() -> Path:
    """Where environments stand: ``$TAPEOUT_ENVIRONMENTS``, or below the user's data directory."""
    given = os.environ.get("TAPEOUT_ENVIRONMENTS")
    return Path(given) if given else platformdirs.user_data_path("tapeout") / "environments"


def get(name: str) -> Environment:
    """The environment of that name; TapeoutError names the known ones."""
    if name not in ENVIRONMENTS:
        raise TapeoutError(f"'{name}' is not a worker environment{nearest(name, ENVIRONMENTS)}.")
    return ENVIRONMENTS[name]


def python(name: str) -> Path:
    """The interpreter of a whole environment; MissingToolchain says how to make it."""
    found = get(name)
    _ = found.facts
    return _interpreter(found.directory)


def create(environment: Environment, say: Callable[[str], None] = _logger.info) -> Path:
    """Make an environment, or go on making it, or find it whole.

    Args:
        environment: which.
        say: told what pip says, line by line.

    Raises:
        MissingToolchain: pip cannot install it; with pip's last lines. OutputError: the place cannot be written.
    """
    place = environment.directory
    with lock(place, wait=True), writing(place):
        if environment.installed:
            return place
        if not _runs(place):
            venv.create(place, with_pip=True, clear=True)
        with tempfile.TemporaryDirectory() as scratch:
            own = own_wheel.requirement(Path(scratch)) if environment.library else ()
            install = ("-m", "pip", "install")
            _run(environment, say, *install, *environment.requirements, *own)
            if own:  # another one of the same version may stand there
                _run(environment, say, *install, "--force-reinstall", "--no-deps", *own)
        if environment.after:
            _run(environment, say, "-c", environment.after)
        versions = json.loads(_run(environment, say, "-P", "-c", environment.probe)[-1])
        partial = place / f".{_MARK}.partial"
        facts = {
            "name": environment.name,
            "requirements": environment.requirements,
            "versions": versions,
            "tapeout": environment._own,
        }
        partial.write_text(canonical_json(facts), encoding="utf-8")
        partial.rename(place / _MARK)
    return place


def worker_of(target: str) -> tuple[Environment, str] | None:
    """The environment that commands of a target run in here, and why; None: they run in this one.

    That is so where the target's library can be imported, and where there is no such environment: then whoever needs the library says so.
    """
    environment = ENVIRONMENTS.get(target)
    if environment is None or environment.library is None or os.environ.get(_WITHIN) == target:
        return None
    if not environment.installed:  # the import takes a second, which only those pay who may go elsewhere
        return None
    log = logging.getLogger(environment.library)
    level = log.level
    log.setLevel(logging.ERROR)  # its remarks on versions
    try:
        importlib.import_module(environment.library)
    except Exception as error:  # of versions that it does not bear: any kind
        return environment, f"{environment.library} cannot be imported here ({type(error).__name__}: {error})"
    finally:
        log.setLevel(level)
    return None


def run_there(environment: Environment, arguments: Sequence[str], module: str | None = None) -> NoReturn:
    """Go on as the same command line, or as a module, in an environment that holds tapeout: this process becomes that one."""
    interpreter = str(_interpreter(environment.directory))
    what = ["-m", module] if module else [str(environment.directory / "bin" / "tapeout")]
    command = [interpreter, "-P", *what, *arguments]
    os.execve(interpreter, command, _variables() | {_WITHIN: environment.name})


def _variables() -> dict[str, str]:
    """This process's, without what points its Python elsewhere: that must not point another one there."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def _interpreter(place: Path) -> Path:
    return place / "bin" / "python"


def _runs(place: Path) -> bool:
    """Whether an interrupted environment has got as far as a pip that runs."""
    if not _interpreter(place).exists():
        return False
    done = subprocess.run([_interpreter(place), "-m", "pip", "--version"], capture_output=True, check=False)
    return done.returncode == 0


def _run(environment: Environment, say: Callable[[str], None], *arguments: str) -> list[str]:
    """Run the environment's Python; its output, by lines."""
    lines: list[str] = []
    with subprocess.Popen(
        [_interpreter(environment.directory), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=_variables(),
    ) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line.rstrip())
            say(lines[-1])
    if process.returncode:
        raise MissingToolchain(
            f"the worker environment '{environment.name}' could not be made in {environment.directory}: "
            f"{' / '.join(lines[-5:])} The same command goes on where it stopped: {environment.command}"
        )
    return lines
