"""Engines of the graph for TensorRT: their profiles, who builds them, and the codes found again in what was built."""

from __future__ import annotations

import importlib.util
import json
import logging
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tapeout import environments
from tapeout.errors import MissingToolchain, PackageError, RuntimeCrash
from tapeout.files import canonical_json

__all__ = ["Builder", "Profile", "build", "builder", "check_plan", "prepare", "profiles", "runs"]

SETTINGS, SCRIPT, PLAN, FOUND = "engine.json", "build_engine.py", "model.plan", "model.plan.json"
Wanted = Literal["auto", "tensorrt", "tensorrt-rtx", "none"]

_TIMEOUT_S = 4 * 3600  # of a large model at the highest level, with every kernel timed
_PROBE = 64  # bytes of a tensor that are looked for before it is compared whole
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Profile:
    """One range of shapes that an engine is built for: of each input the least, the usual and the largest."""

    name: str
    shapes: Mapping[str, tuple[list[int], list[int], list[int]]]


@dataclass(frozen=True)
class Builder:
    """Who builds engines here.

    Attributes:
        name: for people.
        python: the interpreter that has TensorRT's bindings.
    """

    name: str
    python: str


def profiles(inputs: Sequence[Any], *, batch: int, chunk: int, context: int) -> list[Profile]:
    """A profile for prompts, of up to ``chunk`` tokens at once, and one for single tokens.

    Args:
        inputs: the graph's, as onnx has them: their axes have names.
        batch: most sequences.
        chunk, context: most new tokens, and most tokens of a sequence.
    """
    half = context // 2
    prompts = {"tokens": (1, chunk, chunk), "past": (0, 0, context - 1), "total": (1, chunk, context)}
    single = {"tokens": (1, 1, 1), "past": (0, half, context - 1), "total": (1, half + 1, context)}
    made = []
    for name, axes in (("prefill", prompts), ("decode", single)):
        axes |= {"batch": (1, 1, batch), "logits_tokens": (1, 1, axes["tokens"][2])}
        shapes = {}
        for each in inputs:
            dims = each.type.tensor_type.shape.dim
            least, usual, most = (
                [axes[dim.dim_param][at] if dim.dim_param else dim.dim_value for dim in dims]
                for at in range(3)
            )
            shapes[each.name] = (least, usual, most)
        made.append(Profile(name, shapes))
    return made


def prepare(
    directory: Path, made: Sequence[Profile], *, workspace_bytes: int | None, builder_level: int | None
) -> tuple[str, ...]:
    """Put the script that builds and what it shall build beside the graph; the names of both."""
    said = {
        "format_version": 1,
        "builder_level": builder_level,
        "workspace_bytes": workspace_bytes,
        "profiles": [{"name": each.name, "shapes": each.shapes} for each in made],
    }
    (directory / SETTINGS).write_text(canonical_json(said), encoding="utf-8")
    with (
        (files("tapeout.targets") / "data" / SCRIPT).open("rb") as source,
        (directory / SCRIPT).open("wb") as to,
    ):
        shutil.copyfileobj(source, to)
    return SETTINGS, SCRIPT


def builder(wanted: Wanted) -> Builder | str:
    """Who builds engines here, or why nobody does, with the command that changes it.

    Raises:
        MissingToolchain: the one that is asked for by name is not here.
    """
    if wanted == "none":
        return "no engine was asked for"
    gpu = _tensorrt()
    if wanted != "tensorrt-rtx" and gpu is None:
        return Builder("tensorrt", sys.executable)
    if wanted == "tensorrt":
        raise MissingToolchain(f"{gpu}. pip install tensorrt, on a machine with an NVIDIA GPU.")
    rtx = environments.get("tensorrt-rtx")
    if rtx.installed:
        return Builder("TensorRT-RTX 1.7.1", str(environments.python(rtx.name)))
    absent = (
        f"{gpu}, and the worker environment '{rtx.name}', which builds without a GPU, is not on this machine"
    )
    if wanted == "tensorrt-rtx":
        raise MissingToolchain(f"{absent}. What installs it: {rtx.command}")
    return f"{absent}: {rtx.command}, or python artifact/{SCRIPT} on the machine with the GPU"


def _tensorrt() -> str | None:
    """Why TensorRT does not build here; None: it does."""
    if importlib.util.find_spec("tensorrt") is None:
        return "tensorrt is not installed"
    import tensorrt

    if not hasattr(tensorrt, "Builder"):  # a placeholder of its index
        return "the package 'tensorrt' that is installed is empty"
    return None if Path("/dev/nvidiactl").exists() else "there is no NVIDIA GPU"


def runs(directory: Path) -> bool:
    """Whether the engine in a directory can be run here: it is TensorRT's, which is here with a GPU and PyTorch's memory on it."""
    if _tensorrt() is not None or importlib.util.find_spec("torch") is None:
        return False
    import torch

    record = json.loads((directory / FOUND).read_text(encoding="utf-8"))
    return record["builder"] == "tensorrt" and bool(torch.cuda.is_available())


def build(
    who: Builder, directory: Path, timing_cache: Path | None = None, timeout_s: float = _TIMEOUT_S
) -> str:
    """Build the engine of the graph in ``directory``, in a process of its own; what there is to say of it.

    Raises:
        RuntimeCrash: the builder refuses, dies, or takes longer than ``timeout_s``: its last lines, and the command to repeat.
    """
    command = [who.python, "-I", str(directory / SCRIPT), "--out", str(directory / PLAN)]
    if timing_cache:
        command += ["--timing-cache", str(timing_cache.absolute())]
    given = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=given,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr
        raise RuntimeCrash(_failure(who, f"did not end within {timeout_s:g} s", said or "")) from None
    finally:
        (directory / f"{PLAN}.partial").unlink(missing_ok=True)
    if done.returncode:
        how = f"died of signal {-done.returncode}" if done.returncode < 0 else "failed"
        raise RuntimeCrash(_failure(who, how, done.stderr))
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    places, matrices = _places(directory)
    _logger.info("%s built %s: %s", who.name, PLAN, facts)
    record = {"format_version": 1, "builder": who.name, "bindings": facts["bindings"], "codes": places}
    (directory / FOUND).write_text(canonical_json(record), encoding="utf-8")
    return (
        f"{who.name} built {PLAN} ({facts['bytes'] / 1e6:.1f} MB): the codes of {len(places)} of {matrices} matrices stand in it "
        "byte for byte"
    )


def _failure(who: Builder, how: str, said: str) -> str:
    last = [line for line in said.strip().splitlines() if line.strip()][-5:] or ["it said nothing."]
    return (
        f"the engine was not built: {who.name} {how}: {' / '.join(last)} To see it again, export with --engine none --out DIR and run "
        f"{who.python} DIR/artifact/{SCRIPT}; the graph alone is a package too."
    )


def _codes(directory: Path) -> dict[str, tuple[int, int]]:
    """Offset and length of the codes of each matrix in the data file, by the name of the initializer."""
    import onnx

    kinds = onnx.TensorProto
    narrow = {kinds.INT4, kinds.INT8, kinds.FLOAT8E4M3FN, kinds.FLOAT4E2M1}
    found = {}
    for each in onnx.load(directory / "model.onnx", load_external_data=False).graph.initializer:
        if each.data_type in narrow and each.name.endswith(".codes"):
            said = {entry.key: entry.value for entry in each.external_data}
            found[each.name] = int(said["offset"]), int(said["length"])
    return found


def _places(directory: Path) -> tuple[dict[str, int], int]:
    """Where in the plan the codes of matrices stand, by initializers, and how many matrices there are."""
    codes, found, at = _codes(directory), {}, 0
    if not codes:
        return {}, 0
    data = np.memmap(directory / "model.onnx.data", np.uint8, "r")
    with (directory / PLAN).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        for name, (offset, length) in codes.items():
            place = _find(plan, data[offset : offset + length], at)
            if place is None:
                place = _find(plan, data[offset : offset + length], 0)
            if place is not None:
                found[name], at = place, place + length  # the next is mostly behind it
    return found, len(codes)


def _find(plan: mmap.mmap, wanted: np.ndarray[Any, np.dtype[np.uint8]], begin: int) -> int | None:
    """Where all of ``wanted`` stands at or behind ``begin``."""
    middle = len(wanted) // 2  # where a tensor is less likely to be like another than at its begin
    probe = wanted[middle : middle + _PROBE].tobytes()
    at = plan.find(probe, begin + middle)
    while at >= 0:
        place = at - middle
        if place >= 0 and _same(plan, wanted, place):
            return place
        at = plan.find(probe, at + 1)
    return None


def _same(plan: mmap.mmap, wanted: np.ndarray[Any, np.dtype[np.uint8]], place: int) -> bool:
    if place + len(wanted) > len(plan):
        return False
    there = np.frombuffer(plan, np.uint8, len(wanted), place)
    same = np.array_equal(there, wanted)
    del there  # or the map could not be closed
    return bool(same)


def check_plan(directory: Path) -> None:
    """PackageError where codes do not stand in the plan as they did when it was built."""
    path = directory / FOUND
    try:
        places: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))["codes"]
    except (OSError, ValueError, KeyError) as error:
        raise PackageError(f"{path} is not what tapeout writes beside an engine: {error!r}.") from error
    codes = _codes(directory)
    data = np.memmap(directory / "model.onnx.data", np.uint8, "r")
    wrong = []
    with (directory / PLAN).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        for name, place in places.items():
            offset, length = codes.get(name, (0, 0))
            if not length or not _same(plan, data[offset : offset + length], place):
                wrong.append(name)
    if wrong:
        raise PackageError(
            f"{directory / PLAN} does not hold the codes of {', '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}: it was built from another graph, or changed."
        )
