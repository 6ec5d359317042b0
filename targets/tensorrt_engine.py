"""Engines of the graph for TensorRT: their profiles, who builds them, and the codes found again in what was built."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tapeout import environments
from tapeout.errors import MissingToolchain, PackageError, RuntimeCrash
from tapeout.files import canonical_json

__all__ = ["Builder", "Profile", "build", "builder", "check_plan", "places", "prepare", "profiles", "runs"]

SETTINGS, SCRIPT, PLAN, FOUND = "engine.json", "build_engine.py", "model.plan", "model.plan.json"
Wanted = Literal["none", "auto", "tensorrt", "tensorrt-rtx"]

_TIMEOUT_S = 4 * 3600  # of a large model at the highest level, with every kernel timed
_WORD = 8  # bytes of a row that are looked for before rows are compared
_JOINED = 64  # rows of a joined matrix are at most so many of one of its parts
_ROWS = 1024  # that are compared at once
_CHUNK = 1 << 22  # words that are looked at at once
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
        return "none was asked for (--engine)"
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
    found, matrices = places(directory)
    _logger.info("%s built %s: %s", who.name, PLAN, facts)
    record = {
        "format_version": 1,
        "builder": who.name,
        "bindings": facts["bindings"],
        "codes": {name: asdict(place) for name, place in found.items()},
    }
    (directory / FOUND).write_text(canonical_json(record), encoding="utf-8")
    return (
        f"{who.name} built {PLAN} ({facts['bytes'] / 1e6:.1f} MB): the codes of {len(found)} of {matrices} matrices stand in it "
        "byte for byte"
    )


def _failure(who: Builder, how: str, said: str) -> str:
    last = [line for line in said.strip().splitlines() if line.strip()][-5:] or ["it said nothing."]
    return (
        f"the engine was not built: {who.name} {how}: {' / '.join(last)} To see it again, export with --engine none --out DIR and run "
        f"{who.python} DIR/artifact/{SCRIPT}; the graph alone is a package too."
    )


@dataclass(frozen=True)
class _Codes:
    """The codes of a matrix [in, out] as the data file has them: ``data`` uint8 [in, out · bits / 8], two a byte where bits are 4."""

    data: npt.NDArray[np.uint8]
    bits: int

    def rows(self, begin: int, end: int, *, turned: bool) -> npt.NDArray[np.uint8]:
        """Some rows as bytes, of [in, out] or, turned, of [out, in]."""
        if not turned:
            return self.data[begin:end]
        if self.bits == 8:
            return self.data[:, begin:end].T
        nibbles = self.data[:, begin // 2 : -(-end // 2)].T
        both = np.stack([nibbles & 15, nibbles >> 4], axis=1).reshape(-1, nibbles.shape[1])
        kept = both[begin % 2 :][: end - begin]
        packed: npt.NDArray[np.uint8] = kept[:, 0::2] | kept[:, 1::2] << 4
        return packed

    def shape(self, *, turned: bool) -> tuple[int, int]:
        """Rows, and bytes of one."""
        into, width = self.data.shape
        return (width * 8 // self.bits, into * self.bits // 8) if turned else (into, width)


@dataclass(frozen=True)
class _Place:
    """Where the rows of a matrix stand in a plan: the first one's byte, the bytes from one to the next, and which rows they are.

    TensorRT joins matrices that multiply the same inputs, and turns those that kernels want the other way.
    """

    at: int
    stride: int
    turned: bool

    def holds(self, plan: npt.NDArray[np.uint8], codes: _Codes) -> bool:
        """Whether all rows of the codes stand there."""
        rows, width = codes.shape(turned=self.turned)
        if self.at < 0 or self.stride < width or self.at + (rows - 1) * self.stride + width > len(plan):
            return False
        there = np.lib.stride_tricks.as_strided(
            plan[self.at :], (rows, width), (self.stride, 1), writeable=False
        )
        return all(
            np.array_equal(there[at : at + _ROWS], codes.rows(at, min(at + _ROWS, rows), turned=self.turned))
            for at in range(0, rows, _ROWS)
        )


def _codes(directory: Path) -> dict[str, _Codes]:
    """Of each matrix of the data file, by the name of its initializer."""
    import onnx

    kinds = onnx.TensorProto
    bits = {kinds.INT4: 4, kinds.INT8: 8, kinds.FLOAT8E4M3FN: 8, kinds.FLOAT4E2M1: 4}
    data, found = np.memmap(directory / "model.onnx.data", np.uint8, "r"), {}
    for each in onnx.load(directory / "model.onnx", load_external_data=False).graph.initializer:
        if each.data_type in bits and each.name.endswith(".codes"):
            said = {entry.key: entry.value for entry in each.external_data}
            begin, length = int(said["offset"]), int(said["length"])
            rows = data[begin : begin + length].reshape(each.dims[0], -1)
            found[each.name] = _Codes(rows, bits[each.data_type])
    return found


def places(directory: Path) -> tuple[dict[str, _Place], int]:
    """Where in the plan the codes of matrices stand, and how many matrices there are."""
    codes, found = _codes(directory), {}
    plan: npt.NDArray[np.uint8] = np.memmap(directory / PLAN, np.uint8, "r")
    for shift in range(_WORD):  # the first is where compilers put weights
        probes: dict[int, list[tuple[str, bool]]] = {}
        for name, each in codes.items():
            for turned in (False, True) if name not in found else ():
                rows, width = each.shape(turned=turned)
                if width >= _WORD:
                    row = each.rows(rows // 2, rows // 2 + 1, turned=turned)
                    word = int(np.ascontiguousarray(row[0, :_WORD]).view(np.uint64)[0])
                    probes.setdefault(word, []).append((name, turned))
        for at, word in _hits(plan, shift, probes):
            for name, turned in probes[word]:
                if name not in found and (place := _place(plan, at, codes[name], turned)):
                    found[name] = place
        if len(found) == len(codes):
            break
    return found, len(codes)


def _hits(plan: npt.NDArray[np.uint8], shift: int, words: Collection[int]) -> Iterator[tuple[int, int]]:
    """Bytes of a plan at which one of the words stands, of those that are ``shift`` behind a multiple of 8; and which."""
    if not words:
        return
    wanted = np.array(sorted(words), np.uint64)
    known = np.zeros(1 << 16, bool)
    known[_hash(wanted)] = True
    whole = plan[shift : shift + (len(plan) - shift) // _WORD * _WORD].view(np.uint64)
    for begin in range(0, len(whole), _CHUNK):
        chunk = whole[begin : begin + _CHUNK]
        near = np.flatnonzero(known[_hash(chunk)])
        for index in near[np.isin(chunk[near], wanted)]:
            yield shift + _WORD * (begin + int(index)), int(chunk[index])


def _hash(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    hashed: npt.NDArray[np.uint64] = words * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(48)
    return hashed


def _place(plan: npt.NDArray[np.uint8], at: int, codes: _Codes, turned: bool) -> _Place | None:
    """The place of codes whose middle row may stand at that byte."""
    rows, width = codes.shape(turned=turned)
    middle, stride = rows // 2, width
    if middle + 1 < rows:
        following = codes.rows(middle + 1, middle + 2, turned=turned).tobytes()
        behind = plan[at + width : at + (_JOINED + 1) * width].tobytes().find(following)
        if behind < 0:
            return None
        stride += behind
    place = _Place(at - middle * stride, stride, turned)
    return place if place.holds(plan, codes) else None


def check_plan(directory: Path) -> None:
    """PackageError where codes do not stand in the plan as they did when it was built."""
    path = directory / FOUND
    try:
        said = json.loads(path.read_text(encoding="utf-8"))["codes"]
        places = {name: _Place(**place) for name, place in said.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackageError(f"{path} is not what tapeout writes beside an engine: {error!r}.") from error
    codes, plan = _codes(directory), np.memmap(directory / PLAN, np.uint8, "r")
    wrong = [
        name for name, place in places.items() if name not in codes or not place.holds(plan, codes[name])
    ]
    if wrong:
        raise PackageError(
            f"{directory / PLAN} does not hold the codes of {', '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}: it was built from another graph, or changed."
        )
