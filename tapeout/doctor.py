"""What of tapeout works on this machine: what is installed, what is missing or conflicts, and the command that mends it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.specifiers import SpecifierSet

from tapeout import installed, targets
from tapeout.environments import ENVIRONMENTS
from tapeout.errors import TapeoutError, nearest
from tapeout.files import cache_directory
from tapeout.installed import Wanted

__all__ = ["Diagnosis", "Finding", "diagnose"]

State = Literal["ok", "missing", "conflict"]

# Extras whose packages no target runs on: they are not imported, and only a conflict of theirs is told to people.
_BESIDE = {"dev", "report", "ray"}
# What is looked for on the PATH: for which target (empty: any), what for, and what brings it. No export needs one.
_TOOLS = {
    "gcc": (
        "",
        "compiles llama-cpp-python where pip has no wheel of it, triton's kernels on a GPU, and a part of the environment tensorrt-rtx",
        "apt-get install gcc",
    ),
    "cmake": ("", "builds llama-cpp-python; pip brings one of its own for that", "apt-get install cmake"),
    "iree-compile": ("rocm", "compiles for AMD GPUs: rocm --format iree", "pip install 'tapeout[rocm]'"),
    "trtllm-build": (
        "nvidia",
        "builds engines: nvidia --format trtllm",
        "pip install 'tensorrt-llm==1.2.*'  # on the machine with the GPU",
    ),
    "trtexec": (
        "nvidia",
        "builds engines by hand: nvidia --format onnx-trt",
        "none by pip: it comes with NVIDIA's TensorRT archive and container",
    ),
    "xcrun": (
        "apple",
        "finds coremlcompiler, which compiles Core ML packages for apps; on macOS only",
        "xcode-select --install",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: python, package, target, environment, tool or machine.
        state: ``missing``: some extra or way has it that need not be wanted here.
        found: what is here.
        wanted: what fits, or what it is for.
        extras: that want it; the empty name stands for tapeout itself.
        mend: the command that mends it; empty where there is nothing to mend.
        breaks: whether targets that want it cannot be relied on.
    """

    area: str
    name: str
    state: State
    found: str
    wanted: str = ""
    extras: tuple[str, ...] = ()
    mend: str = ""
    breaks: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was looked at, and which targets work here.

    Attributes:
        findings: in the order that they are shown in.
        works: by target and way of it (``cpu --format onnx``), whether it can be exported and proven here.
        asked: the target that was asked for; None: any.
    """

    findings: tuple[Finding, ...]
    works: Mapping[str, bool]
    asked: str | None = None

    @property
    def healthy(self) -> bool:
        """Whether the target that was asked for works; without one, whether any does."""
        return self.works[self.asked] if self.asked else any(self.works.values())

    def to_json(self) -> dict[str, Any]:
        """As one JSON document."""
        return {
            "format_version": 1,
            "healthy": self.healthy,
            "target": self.asked,
            "works": dict(self.works),
            "findings": [asdict(each) for each in self.findings],
            "not_probed": ["the network", "Hugging Face's hub and its login"],
        }


def diagnose(target: str | None = None) -> Diagnosis:
    """Look at Python, packages, targets, worker environments, tools and the machine; nothing is changed and no network is asked.

    Args:
        target: look at what this one wants only: its name, or one way of it (``cpu --format onnx``).

    Raises:
        TapeoutError: there is no such target.
    """
    ways = {way: kind for name in targets.names() for way, kind in targets.variants(name).items()}
    if target is not None and target not in ways:
        raise TapeoutError(f"'{target}' is not an installed target{nearest(target, ways)}.", page="targets")
    asked = {way: kind for way, kind in ways.items() if target in (None, way)}
    extras = {way: _extra(way) for way in asked}
    wanted = {
        name: each
        for name, each in installed.wanted().items()
        if target is None or set(each.extras) & {"", *extras.values()}
    }
    gpus = _nvidia_smi()
    python, machine = _python(), tuple(_machine(gpus))
    driver = bool(gpus) or Path("/proc/driver/nvidia/version").exists()
    packages = [*_versions(wanted), *_conflicts(wanted, driver)]
    broken = [each for each in (*packages, *machine, python) if each.breaks]
    works, found = {}, []
    for way, kind in asked.items():
        elsewhere = ENVIRONMENTS.get(kind.name)
        lacks = kind.missing()
        wrong = [
            each.name for each in broken if set(each.extras) & {"", extras[way]} and each.state == "conflict"
        ]
        if elsewhere and elsewhere.library and elsewhere.installed and (lacks or wrong):
            works[way], said = True, f"works, in the worker environment {elsewhere.name}"
        else:
            works[way] = not lacks and not wrong
            said = lacks or (f"conflicts: {', '.join(wrong)}" if wrong else "works")
        state: State = "ok" if works[way] else "missing" if lacks else "conflict"
        mend = f"pip install 'tapeout[{extras[way]}]'" if lacks and not works[way] else ""
        found.append(Finding("target", way, state, said, kind.needs, (extras[way],), mend, not works[way]))
    return Diagnosis(
        (python, *packages, *found, *_environments(target), *_tools(target), *machine), works, target
    )


def _extra(way: str) -> str:
    """The extra that brings what a way of a target runs on: the one named like its format, or like the target; else what all share."""
    name, _, form = way.partition(" --format ")
    known = installed.extras()
    return next((each for each in (form, name) if each in known), "reference")


def _python() -> Finding:
    found, wanted = platform.python_version(), metadata.metadata("tapeout")["Requires-Python"]
    good = installed.fits(found, SpecifierSet(wanted))
    mend = "" if good else f"install Python {wanted}, make an environment with it and install tapeout there"
    return Finding(
        "python", sys.executable, "ok" if good else "conflict", found, wanted, ("",), mend, not good
    )


def _versions(wanted: Mapping[str, Wanted]) -> Iterator[Finding]:
    """A finding for each distribution: its version against the range that tapeout's metadata gives."""
    for name, each in sorted(wanted.items()):
        found = installed.version(name)
        if found is None:
            extra = each.extras[0]
            mend = f"pip install 'tapeout[{extra}]'" if extra else f"pip install '{each.requirement}'"
            yield Finding("package", name, "missing", "", str(each.range), each.extras, mend)
        elif not installed.fits(found, each.range):
            mend = f"pip install '{each.requirement}'"
            yield Finding("package", name, "conflict", found, str(each.range), each.extras, mend, True)
        else:
            yield Finding("package", name, "ok", found, str(each.range), each.extras)


def _conflicts(wanted: Mapping[str, Wanted], driver: bool) -> Iterator[Finding]:
    """What versions alone do not tell: copies, rivals for a module, others' ranges, what cannot be imported, CUDA without a driver."""
    here = {name: each for name, each in wanted.items() if installed.version(name) is not None}
    for name in sorted({*here, "tapeout"}):
        if len(found := installed.copies(name)) > 1:
            said = ", ".join(f"{version} in {place}" for version, place in found)
            mend = " && ".join(
                [f"pip uninstall -y {name}"] * len(found) + [f"pip install '{_requirement(here, name)}'"]
            )
            yield _conflict(here, name, f"{len(found)} copies: {said}; Python takes the first", "one", mend)
    for module, owners in sorted(installed.rivals(here).items()):
        kept = next(name for name in owners if name in here)
        mend = f"pip uninstall -y {' '.join(owners)} && pip install '{here[kept].requirement}'"
        said = f"{' and '.join(owners)} both bring the module {module}: the one installed last has overwritten the other"
        yield _conflict(here, kept, said, f"one of {' and '.join(owners)}", mend)
    for name, each, version in installed.unmet(sorted(here)):
        said = f"{name} {installed.version(name)} wants {each.name}{each.specifier}; {version} is here"
        mend = f"pip install --upgrade {name} '{each.name}{each.specifier}'"
        # A pin that is narrower than need be is common: what does not bear it is found by importing.
        yield Finding(
            "package", name, "conflict", said, f"{each.name}{each.specifier}", here[name].extras, mend
        )
    run = sorted(name for name, each in here.items() if not _BESIDE.issuperset(each.extras))
    for name, said in installed.broken_imports(run).items():
        mend = f"pip install --force-reinstall '{here[name].requirement}' '{_requirement(here, 'numpy')}'"
        yield _conflict(here, name, said, "that it can be imported", mend)
    if "torch" in here and (cuda := _cuda_of_torch()) and not driver:
        said = f"torch is built for CUDA {cuda}, and there is no NVIDIA driver: it computes on the CPU"
        mend = "install NVIDIA's driver where there is such a GPU; where there is none, a CPU build of torch is smaller"
        yield Finding("package", "torch", "conflict", said, "a driver", here["torch"].extras, mend)


def _conflict(here: Mapping[str, Wanted], name: str, said: str, fits: str, mend: str) -> Finding:
    extras = here[name].extras if name in here else ("",)
    return Finding("package", name, "conflict", said, fits, extras, mend, breaks=True)


def _requirement(here: Mapping[str, Wanted], name: str) -> str:
    return here[name].requirement if name in here else name


def _cuda_of_torch() -> str | None:
    """The CUDA that the installed torch is built for, read without importing it; None: for none."""
    path = Path(str(metadata.distribution("torch").locate_file("torch/version.py")))
    found = (
        re.search(r"^cuda\b[^=]*= *['\"]([\d.]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if path.exists()
        else None
    )
    return found[1] if found else None


def _nvidia_smi() -> tuple[str, ...]:
    """Name, memory and driver of each NVIDIA GPU."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(filter(None, done.stdout.splitlines()))


def _environments(target: str | None) -> Iterator[Finding]:
    for each in ENVIRONMENTS.values():
        if target is None or each.name == target.split()[0]:
            there = each.installed
            found = f"{each.size_bytes / 1e9:.1f} GB in {each.directory}" if there else ""
            state: State = "ok" if there else "missing"
            yield Finding(
                "environment", each.name, state, found, each.purpose, mend="" if there else each.command
            )


def _tools(target: str | None) -> Iterator[Finding]:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    for name, (whose, purpose, mend) in _TOOLS.items():
        if target and whose not in ("", target.split()[0]):
            continue
        names = (name, "cc", "clang") if name == "gcc" else (name,)
        found = next(filter(None, (shutil.which(each, path=path) for each in names)), None)
        if found or (name == "xcrun" and platform.system() != "Darwin"):
            mend = ""
        yield Finding("tool", name, "ok" if found else "missing", found or "", purpose, mend=mend)


def _machine(nvidia: Sequence[str]) -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(
        "machine", "system", "ok", f"{platform.system()} {platform.machine()}, {cores} cores for this process"
    )
    yield Finding(
        "machine", "memory", "ok", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    )
    gpus = list(nvidia)
    gpus += ["an AMD GPU (/dev/kfd)"] if Path("/dev/kfd").exists() else []
    gpus += ["Apple's GPU"] if (platform.system(), platform.machine()) == ("Darwin", "arm64") else []
    said = "; ".join(gpus) or "none is seen: packages are proven on the CPU"
    yield Finding("machine", "GPU", "ok", said)
    yield _cache()


def _cache() -> Finding:
    place = cache_directory()
    there = next(each for each in (place, *place.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    size = sum(path.lstat().st_size for path in (place / "store").rglob("*") if path.is_file())
    found = f"stores of {size / 1e9:.1f} GB in {place}, {free / 1e9:.1f} GB free"
    if os.access(there, os.W_OK):
        return Finding("machine", "cache", "ok", found)
    mend = "export TAPEOUT_CACHE=DIRECTORY  # one that is writable"
    return Finding(
        "machine",
        "cache",
        "conflict",
        f"{place} is not writable by this user",
        "a directory to write to",
        ("",),
        mend,
        True,
    )
