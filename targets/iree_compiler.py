"""IREE's compiler: a module's text to what a chip runs, once for each text, and kept."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sysconfig
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tapeout.errors import MissingToolchain, RuntimeCrash
from tapeout.files import cache_directory, lock, writing

CHIPS = {
    "gfx90a": "MI210, MI250",
    "gfx942": "MI300, MI325",
    "gfx950": "MI350, MI355",
    "gfx1100": "RX 7900, W7900",
    "gfx1201": "RX 9070, R9700",
}
"""Chips that modules are compiled for, with the cards that have them."""

HOST = "host"
"""The machine itself: the twin that is run where no chip is."""

_PACKAGE, _LINES, _TIMEOUT_S = "iree-base-compiler", 8, 3600.0
# Codes stay codes: without these the compiler would unpack parameters when it sees that nothing else reads them.
_COMMON = ("--iree-opt-const-eval=false", "--iree-opt-const-expr-hoisting=false")
_logger = logging.getLogger(__name__)


def missing() -> str | None:
    """None where the compiler is installed; otherwise what installs it."""
    if _command().exists():
        return None
    return f"{_PACKAGE} is not installed: pip install 'tapeout[rocm]'."


def flags(chip: str) -> tuple[str, ...]:
    """Of ``iree-compile`` for one of CHIPS, or HOST."""
    if chip == HOST:
        return (
            *_COMMON,
            "--iree-hal-target-device=local",
            "--iree-hal-local-target-device-backends=llvm-cpu",
            "--iree-llvmcpu-target-cpu=host",
        )
    return *_COMMON, "--iree-hal-target-device=hip", f"--iree-rocm-target={chip}"


def compiled(module: Path, chip: str, *, timeout_s: float = _TIMEOUT_S) -> Path:
    """What the compiler makes of a module's text for a chip, in the cache; a text that was compiled before is not again.

    Args:
        module: MLIR.
        chip: one of CHIPS, or HOST.
        timeout_s: seconds that the compiler may take.

    Raises:
        MissingToolchain: it is not installed. RuntimeCrash: it refuses the module, dies, or takes longer; with its last lines and the
            command that does it again. OutputError: the cache cannot be written.
    """
    if why := missing():
        raise MissingToolchain(why)
    text, given = module.read_bytes(), flags(chip)
    key = hashlib.sha256(
        "\n".join([version_of(), *given, _machine() if chip == HOST else ""]).encode() + text
    )
    place = cache_directory() / "iree" / key.hexdigest()[:32]
    out = place.with_suffix(".vmfb")
    with lock(place, wait=True), writing(place):
        if out.exists():
            return out
        source, partial = place.with_suffix(".mlir"), place.with_suffix(".partial")
        source.write_bytes(text)
        # By its name alone, which is made of the text: the module that is compiled keeps it.
        command = [str(_command()), source.name, "-o", partial.name, *given]
        _logger.info("compiling %s for %s", module.name, chip)
        _run(command, place.parent, chip, timeout_s)
        partial.rename(out)
        source.unlink()
    return out


def _run(command: list[str], place: Path, chip: str, timeout_s: float) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=place,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout_s,
        )
        said, how = done.stderr, f"ended with {done.returncode}"
        if not done.returncode:
            return
    except subprocess.TimeoutExpired as error:
        kept = error.stderr or b""
        said = kept.decode(errors="replace") if isinstance(kept, bytes) else kept
        how = f"was stopped after {timeout_s:.0f} s"
    lines = [line[:300] for line in said.splitlines() if "error" in line or "Assertion" in line]
    lines = lines or [line[:300] for line in said.splitlines() if line.strip()]
    last = " / ".join(lines[-_LINES:]) or "nothing"
    again = f"cd {shlex.quote(str(place))} && {shlex.join(command)}"
    raise RuntimeCrash(f"iree-compile {how} for {chip}: {last}. To do it again: {again}")


def _command() -> Path:
    return Path(sysconfig.get_path("scripts")) / "iree-compile"


@cache
def version_of() -> str:
    """The compiler's package and version."""
    try:
        return f"{_PACKAGE} {version(_PACKAGE)}"
    except PackageNotFoundError:
        return _PACKAGE


@cache
def _machine() -> str:
    """What the compiler's ``host`` depends on."""
    info = Path("/proc/cpuinfo")
    said = info.read_text(encoding="utf-8") if info.exists() else os.environ.get("PROCESSOR_IDENTIFIER", "")
    features = next((line for line in said.splitlines() if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {features}"
