"""Numbers in, canonical codes out. Knows no file format of any target."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout import CalledByItsName, __version__
from tapeout.errors import PackageError, RecipeError, SchemeError, nearest
from tapeout.files import (
    cache_directory,
    canonical_json,
    file_sha256,
    lock,
    new_directory,
    write_whole,
    writing,
)
from tapeout.memory import keep_freed_memory
from tapeout.models import EncoderConfig, Model, Role, Seq2SeqConfig, SourceTensor, TracedConfig
from tapeout.models.checkpoint import read_header
from tapeout.models.decoder import joined
from tapeout.models.torch_ops import one_core_each
from tapeout.quantize import foreign, hqq, lattice, rtn, store
from tapeout.quantize.calibration import Calibration, digest, torch_device
from tapeout.quantize.lattice import ScaleOverflow
from tapeout.quantize.scheme import SCHEMES, Scheme
from tapeout.quantize.tensor import QuantTensor

__all__ = [
    "ROUNDINGS",
    "SCHEMES",
    "Calibration",
    "QuantTensor",
    "Quantized",
    "Scheme",
    "assign",
    "open_store",
    "quantize",
]

ROUNDINGS = ("rtn", "hqq", "gptq", "awq", "smoothquant")
FAR_TENSORS = 16
"""Tensors that are on their way to other processes, and back, at once: each is held in memory whole there and here."""
_WITH_DATA = ("gptq", "awq", "smoothquant")
NONE = SCHEMES["none"]
LOG = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how much of it is done, and how much there is (weights, tokens, bytes)."""


@dataclass(frozen=True)
class Quantized(Mapping[str, QuantTensor | SourceTensor]):
    """A model's canonical codes: every expected tensor by name, as QuantTensor, or as the checkpoint has it.

    Attributes:
        schemes: the scheme of each tensor; ``none`` for those that stay float.
        fallbacks: tensors that could not take the scheme they were given, with the reason.
        clamped: groups whose scale was raised to float16's smallest normal, per tensor.
        folded: float tensors that took up a scale of input channels (AWQ, SmoothQuant): the store has them, not the checkpoint.
        notes: what calibrated rounding has to tell.
        source_sha256: digest of the checkpoint's tensors.
        calibration_sha256: digest of the windows of text that the rounding looked at; None: it looked at none.
        device: where calibration ran: ``cpu``, or a GPU's name; None: there was none.
        digest: digest of ``quantization.json``, which holds every tensor's digest.
        hollow: shapes alone, as ``hollow.hollow`` makes them: an exporter gives its files their length and writes no tensor.
    """

    model: Model
    scheme: Scheme
    rounding: str
    directory: Path
    schemes: Mapping[str, Scheme]
    fallbacks: Mapping[str, str]
    clamped: Mapping[str, int]
    folded: frozenset[str]
    notes: tuple[str, ...]
    source_sha256: str
    calibration_sha256: str | None
    device: str | None
    digest: str
    hollow: bool = False

    def __getitem__(self, name: str) -> QuantTensor | SourceTensor:
        if name in self.folded:
            header, _ = read_header(store.tensor_path(self.directory, name))
            return replace(header["weight"], name=name)
        if self.schemes[name].kind == "none":
            return self.model.checkpoint[name]
        return store.read_tensor(self.directory, name, self.schemes[name], self.model.specs[name].shape[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.model.specs)

    def __len__(self) -> int:
        return len(self.model.specs)

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """The weight that tensor ``name`` is on every device, float32 [shape]."""
        tensor = self[name]
        return tensor.dequantize() if isinstance(tensor, QuantTensor) else tensor.float32()


class _Damaged(PackageError):
    """A store has lost something, or something in it was changed."""


def quantize(
    model: Model,
    scheme: Scheme | str | None = None,
    *,
    rounding: str = "rtn",
    overrides: Mapping[str, str] | None = None,
    calibration: Calibration | None = None,
    out: Path | None = None,
    force: bool = False,
    threads: int | None = None,
    device: str | None = None,
    far: Executor | None = None,
    checkpoints: store.Checkpoints | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Quantize a model into a store, or find the store that an earlier run made of the same weights and recipe.

    Streams: one tensor at a time, a few rows of it in memory. The bytes do not depend on ``threads``.

    Args:
        model: what ``load`` gives.
        scheme: for the linear layers (None: int8, or what a quantized checkpoint has); embeddings and head take int8 with any
            scheme but ``none``.
        rounding: how codes are chosen: ``rtn``, ``hqq``, or with calibration data ``gptq``, ``awq``, ``smoothquant``.
        overrides: scheme by glob over tensor names without ``.weight`` (``{"*.down_proj": "int8"}``); the last match wins.
        calibration: the text that ``gptq``, ``awq`` and ``smoothquant`` look at (None: the default one), and with which the others
            weight columns by their inputs (None: all alike).
        out: where to put the store; None: the cache, by content.
        force: replace the store at ``out``.
        threads: default: as many as this process has cores.
        device: of torch, for what calibration computes; None: a GPU where there is one, and codes of the cache as they stand,
            whichever device they were made with. It decides bits, and so the store's name.
        far: rounds tensors in other processes, on this machine or others that see the checkpoint; what it is given can be pickled. The
            bytes do not depend on it.
        checkpoints: keeps the layers that calibration has done where other machines find them; None: on this one alone.
        progress: told how many weights are done.

    Raises:
        SchemeError: a group does not divide, an unknown scheme. ModelError: a weight is NaN or infinite.
        RecipeError: an override that matches nothing. OutputError: the store cannot be written.

    A store of the cache that is damaged is made again, and a warning is logged.
    """
    plan = planned(model, scheme, rounding, overrides or {})
    keep_freed_memory()
    tokens, where, asked, schemes = None, None, device, plan.schemes
    if plan.foreign is None and (
        calibration or rounding in _WITH_DATA or any(s.calibrated for s in schemes.values())
    ):
        static = any(s.calibrated for s in schemes.values())
        if isinstance(model.config, Seq2SeqConfig | TracedConfig):
            raise SchemeError(
                f"{model.name} is {model.kind}, which calibration does not run. What fits: rounding rtn or hqq without a calibration "
                "text, and a scheme without static scales of inputs."
            )
        if isinstance(model.config, EncoderConfig) and (rounding in _WITH_DATA or not static):
            raise SchemeError(
                f"{model.name} is an encoder, of which calibration finds static scales of inputs and nothing else. What fits: "
                "rounding rtn or hqq, and a calibration text with static scales of inputs (w8a8-static) only."
            )
        tokens = (calibration or Calibration()).tokens(model)
        one_core_each()
        device, where = torch_device(device)
    prepare = one_core_each if tokens is not None else None
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)), initializer=prepare) as pool:
        pool.submit(lattice.warm)  # by one core, while the others digest the checkpoint
        source = model.checkpoint.sha256(pool)
        recipe = {
            "format_version": store.FORMAT_VERSION,
            "tapeout": __version__,  # another version may choose better codes
            "source_sha256": source,
            "scheme": plan.scheme.name,
            "rounding": plan.rounding,
            "schemes": {name: s.name for name, s in schemes.items()},
            "calibration": None if tokens is None else digest(tokens),
            "device": where,
        }
        if out is not None:
            with new_directory(out, force=force) as partial:
                _fill(partial, model, plan, recipe, tokens, pool, progress, device, far, checkpoints)
            return open_store(out, model)
        key = hashlib.sha256(canonical_json(recipe).encode()).hexdigest()
        directory = cache_directory() / "store" / f"{model.name}-{plan.scheme}-{key[:16]}"
        if tokens is not None and asked is None and (found := _elsewhere(directory, recipe, model, pool)):
            return found
        with lock(directory, wait=True), writing(directory):
            if (directory / "quantization.json").exists():
                try:
                    return open_store(directory, model, pool)
                except _Damaged as error:  # the cache's own: nobody else has put anything there
                    LOG.warning(
                        "%s It was taken away, and is made again.", str(error).partition(" Delete ")[0]
                    )
                    shutil.rmtree(directory)
            _fill(directory, model, plan, recipe, tokens, pool, progress, device, far, checkpoints)
        return open_store(directory, model)


def _elsewhere(
    directory: Path, recipe: Mapping[str, Any], model: Model, pool: ThreadPoolExecutor
) -> Quantized | None:
    """Codes of this recipe that another device chose, where this one has chosen none: what is shared among machines is chosen once."""
    if (directory / "quantization.json").exists():
        return None
    wanted = {key: value for key, value in recipe.items() if key != "device"}
    named = glob.escape(directory.name.rpartition("-")[0])
    for index in sorted(directory.parent.glob(f"{named}-*/quantization.json")):
        try:
            known = json.loads(index.read_text(encoding="utf-8"))
            if all(known[key] == value for key, value in wanted.items()):
                return open_store(index.parent, model, pool)
        except (OSError, ValueError, KeyError, TypeError, PackageError):  # it is not whole
            continue
    return None


@dataclass(frozen=True)
class Plan:
    """How a model's codes will be chosen.

    Attributes:
        scheme: of its linear layers. schemes: of every tensor.
        foreign: the reader of a checkpoint that is quantized already; None: the weights are floats.
    """

    scheme: Scheme
    schemes: Mapping[str, Scheme]
    rounding: str
    foreign: foreign.Foreign | None = None


def planned(model: Model, scheme: Scheme | str | None, rounding: str, overrides: Mapping[str, str]) -> Plan:
    """Give each tensor its scheme before any work is done; see ``quantize`` for the arguments and what it raises.

    A checkpoint that is quantized already keeps its own codes, and refuses to be given others.
    """
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    if model.quantization is None:
        if rounding not in ROUNDINGS:
            raise SchemeError(f"'{rounding}' is not a rounding{nearest(rounding, ROUNDINGS)}.")
        scheme = scheme or SCHEMES["int8"]
        return Plan(scheme, assign(model, scheme, overrides), rounding)
    found = foreign.read(model)
    other = {
        name
        for pattern, wanted in overrides.items()
        for name in _matched(found.schemes, pattern)
        if found.schemes[name].name != wanted
    }
    if other or rounding not in ("rtn", "imported") or scheme not in (None, found.scheme):
        raise SchemeError(
            f"{model.name} is quantized already, by {found.method} as {found.scheme}; its codes are carried as they are: leave out "
            "scheme, rounding and recipe, or give the original model."
        )
    return Plan(found.scheme, found.schemes, "imported", found)


def _matched(names: Iterable[str], pattern: str) -> list[str]:
    """The tensors that a recipe's glob means."""
    wanted = pattern.removesuffix(".weight")
    return [name for name in names if fnmatch.fnmatchcase(name.removesuffix(".weight"), wanted)]


def assign(model: Model, scheme: Scheme, overrides: Mapping[str, str]) -> dict[str, Scheme]:
    """Give each tensor its scheme, and check that it fits: RecipeError, SchemeError."""
    wide = NONE if scheme.kind == "none" else SCHEMES["int8"]
    by_role = {Role.LINEAR: scheme, Role.EMBEDDING: wide, Role.HEAD: wide}
    schemes = {name: by_role.get(spec.role, NONE) for name, spec in model.specs.items()}
    for pattern, wanted in overrides.items():
        matched = _matched(schemes, pattern)
        if not matched:
            names = [n.removesuffix(".weight") for n in schemes]
            tied = " The head is tied to model.embed_tokens." if model.config.tie_word_embeddings else ""
            raise RecipeError(
                f"'{pattern}' matches no tensor of {model.name}{nearest(pattern, names)[:300]}.{tied}"
            )
        for name in matched:
            chosen = Scheme.parse(wanted)
            if not model.specs[name].role.is_matrix and chosen.kind != "none":
                raise RecipeError(
                    f"'{pattern}' gives {chosen} to {name}, a {model.specs[name].role}, which stays float."
                )
            schemes[name] = chosen
    for name, chosen in schemes.items():
        if chosen.kind != "none":
            chosen.check(name, model.specs[name].shape)
    return schemes


def _fill(
    directory: Path,
    model: Model,
    plan: Plan,
    recipe: Mapping[str, Any],
    tokens: npt.NDArray[np.int32] | None,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
    device: str | None,
    far: Executor | None,
    checkpoints: store.Checkpoints | None,
) -> None:
    """Round every tensor that the store does not hold yet, and write its ``quantization.json`` last."""
    (directory / "tensors").mkdir(parents=True, exist_ok=True)
    simple = hqq.round_hqq if plan.rounding == "hqq" else rtn.round_to_nearest
    if plan.foreign is not None:
        found = plan.foreign.write(directory, pool, progress)
    elif tokens is None:
        found = _plain(directory, model, plan.schemes, simple, pool, progress, far=far)
    elif isinstance(model.config, EncoderConfig):
        from tapeout.quantize.ranges import input_scales

        static = {name: each for name, each in plan.schemes.items() if each.calibrated}
        scales = input_scales(model, tokens, static, pool, progress)
        found = _plain(directory, model, plan.schemes, simple, pool, progress, scales, far)
    else:
        from tapeout.quantize.calibrated import Calibrated

        found = Calibrated(
            model,
            plan.schemes,
            plan.rounding,
            tokens,
            directory,
            pool,
            simple,
            progress,
            device or "cpu",
            far,
            checkpoints,
        ).run()
    index = {
        **recipe,
        "tensors": {name: asdict(entry) for name, entry in found.tensors.items()},
        "fallbacks": found.fallbacks,
        "notes": found.notes,
    }
    write_whole(directory / "quantization.json", canonical_json(index))


def _plain(
    directory: Path,
    model: Model,
    schemes: Mapping[str, Scheme],
    simple: store.Round,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
    input_scales: Mapping[str, np.float32] = MappingProxyType({}),
    far: Executor | None = None,
) -> store.Findings:
    """Round tensor by tensor, without data."""
    total = sum(int(np.prod(spec.shape)) for spec in model.specs.values())
    done, found = 0, store.Findings()
    together = joined(name for name, scheme in schemes.items() if scheme.scales == "e4m3")

    @cache
    def largest(name: str) -> float:
        found = store.largest(model.checkpoint[name], pool)
        if not np.isfinite(found):
            raise store.not_finite(model.checkpoint[name])
        return found

    def tensor(name: str) -> store.Written | None:
        """Round a tensor, or find that it stays float; None for the latter."""
        source = model.checkpoint[name]
        if schemes[name].kind != "none":
            try:
                scale = input_scales.get(name)
                alike = [each for each in together.get(name, ()) if schemes[each] == schemes[name]]
                most = max(map(largest, alike)) if alike else None
                store.write_tensor(directory, source, schemes[name], pool, simple, scale, most, far)
                return store.written(directory, name)
            except ScaleOverflow:
                found.fallbacks[name] = (
                    f"a scale of {schemes[name]} does not fit float16; the tensor stays {source.dtype}"
                )
        store.check_finite(source, pool)
        return None

    # Two at a time, so that no core waits for the end of one: the work itself is done by the pool, or far away.
    with ThreadPoolExecutor(2 if far is None else FAR_TENSORS) as feeders:
        try:
            for name, entry in zip(schemes, feeders.map(tensor, schemes), strict=True):
                if entry is not None:
                    found.tensors[name] = entry
                done += int(np.prod(model.specs[name].shape))
                if progress:
                    progress("quantize", done, total)
        except BaseException:
            feeders.shutdown(wait=True, cancel_futures=True)
            raise
    return found


def open_store(directory: Path, model: Model, pool: ThreadPoolExecutor | None = None) -> Quantized:
    """Open a whole store of ``model``; with a pool, every tensor's digest is checked.

    Raises:
        PackageError: it is no store, of a newer format, or a tensor is not what its index says.
    """
    index = directory / "quantization.json"
    try:
        raw = json.loads(index.read_text(encoding="utf-8"))
        entries: dict[str, dict[str, Any]] = raw["tensors"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Damaged(
            f"{directory} is not a whole store: {index.name} cannot be read ({error!r})."
        ) from error
    if raw["format_version"] > store.FORMAT_VERSION:
        raise PackageError(
            f"{index} has format_version {raw['format_version']}; this tapeout reads up to {store.FORMAT_VERSION}: upgrade it."
        )

    def sound(name: str) -> bool:
        path = store.tensor_path(directory, name)
        return path.exists() and file_sha256(path) == entries[name]["sha256"]

    for name, whole in zip(entries, pool.map(sound, entries) if pool else (), strict=pool is not None):
        if not whole:
            path = store.tensor_path(directory, name)
            raise _Damaged(
                f"{path} is not what {index} says: it was changed or lost. Delete {directory} and run again."
            )
    return Quantized(
        model=model,
        scheme=foreign.scheme_of(raw["scheme"]),
        rounding=raw["rounding"],
        directory=directory,
        schemes={n: foreign.scheme_of(entries[n]["scheme"]) if n in entries else NONE for n in model.specs},
        folded=frozenset(n for n, e in entries.items() if e["scheme"] == "none"),
        notes=tuple(raw["notes"]),
        fallbacks=raw["fallbacks"],
        clamped={n: e["clamped_groups"] for n, e in entries.items() if e["clamped_groups"]},
        source_sha256=raw["source_sha256"],
        calibration_sha256=raw["calibration"],
        device=raw.get("device"),  # stores of older versions were made on CPUs
        digest=file_sha256(index),
    )


sys.modules[__name__].__class__ = CalledByItsName
