"""What can be done with a package: run its gates again, measure it, generate with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tapeout.device_report import DeviceReport
from tapeout.errors import MissingToolchain, ModelError, NewerFormat, PackageError, RecipeError, TapeoutError
from tapeout.models import Model, load
from tapeout.models.chat import render, special_tokens
from tapeout.pack import Package
from tapeout.quantize import Calibration, Quantized, quantize
from tapeout.recipe import Recipe
from tapeout.validate import (
    ENCODER_GATES,
    GATES,
    MODULE_GATES,
    GateResult,
    Limits,
    Options,
    Report,
    check_names,
    gates,
    require,
    validate,
)
from tapeout.validate.generate import generate as sample
from tapeout.validate.metrics import Distance
from tapeout.validate.speed_gates import emulated, speed_gates
from tapeout.validate.throughput import machine, measure_encoder, measure_module, measure_throughput
from tapeout.validate.worker import WorkerSession, borrowed

Progress = Callable[[str, int, int], None]

# The golden check has no reference to predict with, but what the package's report says was predicted. Q4_0 on llama.cpp costs about
# 3e-4 nats; a wrong layer costs whole nats.
_GOLDEN_KL = 2e-3


def revalidate(
    directory: Path,
    source: str | None = None,
    recipe: Recipe | None = None,
    *,
    calibration: Path | None = None,
    required: frozenset[str] = frozenset(),
    device_report: Path | DeviceReport | None = None,
    speed: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run a package's gates on this machine; without its model, those that need none.

    Args:
        directory: the package.
        source: the model that it was made from.
        recipe: limits and text; None: those that the package was made with. Schemes and calibration are the package's own.
        calibration: the text that a calibrated package looked at; None: the recipe's, or the default one.
        required: gates that must not be skipped.
        device_report: what a device found of it, which becomes part of the report.
        speed: limits of speed and memory over the recipe's, see ``Limits.speed``.

    Raises:
        ModelError: ``source`` is not the model that the package was made from.
        RecipeError: it was calibrated on a text that is not at hand. PackageError: ``device_report`` is not of this package.
        NewerFormat: its report is of a newer format.
        TapeoutError: one of its kinds.
    """
    package = Package.open(directory)
    told = DeviceReport.read(device_report, package) if isinstance(device_report, Path) else device_report
    if source is None:
        found = _without_model(package, demanded(package, recipe, speed), required)
    else:
        found = _with_model(package, source, recipe, calibration, required, speed or {}, progress)
    found = replace(found, provenance=package.provenance)
    return told.merged(found) if told else found


def _with_model(
    package: Package,
    source: str,
    recipe: Recipe | None,
    calibration: Path | None,
    required: frozenset[str],
    speed: Mapping[str, Any],
    progress: Progress | None,
) -> Report:
    """Every gate."""
    manifest, model = package.manifest, load(source)
    kept = manifest["recipe"]
    notes: list[str] = []
    if recipe is None:
        recipe = Recipe.of({"limits": kept["limits"], "tokens": kept["tokens"]})
        if kept["text"]:
            notes.append(
                f"it was made with an evaluation text with the SHA-256 {kept['text']}, which --recipe can name; this is another"
            )
    elif recipe.calibration:
        calibration = calibration or recipe.calibration.text
    quant = codes_of(package, model, calibration, progress)
    if quant.device and quant.device != kept["calibration"]["device"]:
        notes.append(
            f"its codes were chosen on {kept['calibration']['device']}, those of the store that they are compared with on {quant.device}: "
            "sums in another order can turn a tie, and what follows it; the codes gate counts what differs"
        )
    options = Options(
        recipe.demanding(**speed).limits,
        recipe.text,
        recipe.tokens,
        required,
        progress,
        files=package.files(),
        root=package.directory,
    )
    report = validate(package.artifact, model, quant, package.target(), options)
    return replace(report, notes=(*report.notes, *notes))


def codes_of(
    package: Package, model: Model, calibration: Path | None = None, progress: Progress | None = None
) -> Quantized:
    """The codes that a package was made of, from the store or made again.

    Raises:
        ModelError: ``model`` is not the one that the package was made from. RecipeError: as ``revalidate``.
    """
    manifest = package.manifest
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        digest, wanted = model.checkpoint.sha256(pool), manifest["model"]["source_sha256"]
    if digest != wanted:
        raise ModelError(
            f"{model.directory} is not the model that {package.directory} was made from: its tensors have the digest {digest[:16]}…, "
            f"the package's had {wanted[:16]}…."
        )
    quant = quantize(
        model,
        manifest["scheme"],
        rounding=manifest["rounding"],
        overrides=manifest["schemes"],
        calibration=_calibration(package, model, calibration),
        progress=progress,
    )
    if quant.calibration_sha256 != manifest["calibration_sha256"]:
        raise ModelError(
            f"{model.directory} makes other tokens of the calibration text than the model that {package.directory} was made from: its "
            "tokenizer is another, and the codes cannot be made again."
        )
    return quant


def _calibration(package: Package, model: Model, text: Path | None) -> Calibration | None:
    """How the package was calibrated, with the text that is here; None: it was not.

    Raises:
        RecipeError: it was calibrated on another text.
    """
    kept = package.manifest["recipe"]["calibration"]
    if kept is None:
        if text:
            raise RecipeError(f"{package.directory} was made without calibration text: leave out {text}.")
        return None
    settings = Calibration(text, kept["sequences"], kept["length"], kept["seed"])
    if (found := settings.text_sha256(model)) != kept["text"]:
        here = f"{text} is another one" if text else f"the default text for {model.name} here is another one"
        raise RecipeError(
            f"{package.directory} was calibrated on a text with the SHA-256 {kept['text']} (its codes looked at "
            f"{kept['sequences']} windows of {kept['length']} tokens at most, seed {kept['seed']}); {here}, with {found}. The codes must be "
            "made again to be compared: give that text with --calibration FILE, or leave out --model to run what needs no codes."
        )
    return settings


def demanded(
    package: Package, recipe: Recipe | None = None, speed: Mapping[str, Any] | None = None
) -> Limits:
    """The limits of a package: the recipe's, or those that it was made with, and ``speed`` over them."""
    return (
        (recipe or Recipe.of({"limits": package.manifest["recipe"]["limits"]}))
        .demanding(**speed or {})
        .limits
    )


def _without_model(package: Package, limits: Limits, required: frozenset[str]) -> Report:
    """Integrity, the golden logits, and throughput; the rest is skipped by name."""
    check_names(required)
    found = gates.integrity(package.directory, package.files())
    throughput: dict[str, Any] = {}
    why = ""
    try:
        with borrowed(package.target().session(package.artifact)) as session:
            found.append(_golden(package, session))
            why = emulated(session.facts.runtime)
            throughput = {} if session.facts.emulated else measured(package, session)
    except MissingToolchain as error:
        found.append(GateResult("golden", "skipped", reason=str(error)))
        why = str(error)
    except NewerFormat:
        raise
    except TapeoutError as error:
        found.append(GateResult("golden", "failed", reason=str(error)))
        why = str(error)
    found += speed_gates(throughput, **limits.speed, absent=why)
    every = MODULE_GATES if package.is_module else ENCODER_GATES if package.encoder_output else GATES
    found += [
        GateResult(name, "skipped", reason="needs the model: give --model.")
        for name in every
        if name != "integrity"
    ]
    manifest = package.manifest
    return Report(
        model=manifest["model"]["name"],
        target=manifest["target"]["name"],
        scheme=manifest["scheme"],
        gates=tuple(require(found, required)),
        throughput=throughput,
        machine=machine(),
        notes=package.artifact.notes,
        graph=package.graph,
    )


def _golden(package: Package, session: Any) -> GateResult:
    path = package.directory / "golden.safetensors"
    if not path.exists():
        return GateResult("golden", "skipped", reason=f"the package has no {path.name}.")
    arrays = package.arrays(path.name)
    if package.is_module:
        return _golden_arrays(arrays, session, path.name)
    distance = Distance()
    for index in range(len(arrays) // 2):
        ids = arrays[f"tokens.{index}"].tolist()
        if package.encoder_output:
            out = session.encode([ids], [[1] * len(ids)])
            logits = out.reshape(-1, out.shape[-1])[:1]
        else:
            session.reset()
            logits = session.prefill(ids)[-1:]
        distance.add(arrays[f"logits.{index}"][None], logits)
    told = package.report().gates if (package.directory / "report.json").exists() else ()
    predicted = [gate.limit or 0.0 for gate in told if gate.name == "lowering/runtime"]
    limit = max([_GOLDEN_KL, *predicted])
    metric, value = "mean KL, nats", distance.kl
    if package.encoder_output:
        # Half of the squared relative error, which the report predicts, as KL is half of the variance of the logits' errors.
        metric, value = "mean of 1 - cosine", distance.cosine
    reason = f"{distance.tokens} prompts of {path.name}: what this package must give."
    return GateResult("golden", "passed" if value <= limit else "failed", metric, value, limit, reason)


def _golden_arrays(arrays: Mapping[str, Any], session: Any, name: str) -> GateResult:
    """The same of a module: the worst of its outputs, each in its own deviation."""
    worst = 0.0
    for key, expected in arrays.items():
        if key.startswith("outputs."):
            _, sample, output = key.split(".")
            worst = max(worst, Distance.between([expected], [session.infer(int(sample), int(output))]).error)
    limit = 2 * _GOLDEN_KL  # KL is half the variance of errors
    reason = f"the outputs in {name}: what this package must give."
    return GateResult(
        "golden", "passed" if worst <= limit else "failed", "squared error / variance", worst, limit, reason
    )


def measured(package: Package, session: Any, contexts: Sequence[int] = ()) -> dict[str, Any]:
    """Throughput of a package in an open session, by its kind."""
    if package.is_module:
        return measure_module(session, package.artifact, package.samples)
    measure = measure_encoder if package.encoder_output else measure_throughput
    found = measure(session, package.artifact, contexts)
    if known := package.operations:
        found["operations_per_token"] = known
    return found


def session_of(package: Package) -> AbstractContextManager[WorkerSession]:
    """The artifact on its runtime; PackageError for files that are missing or cut short, whose digests nobody waits for here."""
    if wrong := package.cut_short():
        raise PackageError(
            f"{package.directory} is not what its manifest says: {'; '.join(wrong)}. tapeout verify compares every byte."
        )
    return borrowed(package.target().session(package.artifact))


def encode(package: Package, text: str) -> dict[str, Any]:
    """What an encoder's package gives of a text: ``label`` and ``logits``, ``sentence_embedding``, or ``last_hidden_state``.

    Raises:
        TapeoutError: the text has too many tokens, or one of its other kinds.
    """
    with session_of(package) as session:
        ids = session.tokenize(text)
        (row,) = session.encode([ids], [[1] * len(ids)])
    output, labels = package.encoder_output, package.manifest["model"].get("labels")
    found = {"label": labels[int(row.argmax())]} if labels else {}
    return {"text": text, **found, str(output): row.tolist(), "token_ids": ids}


def generate(
    package: Package, prompt: str, *, chat: bool = False, seed: int = 0, **settings: Any
) -> Iterator[tuple[int, str]]:
    """Generate on the target's runtime; yields each token's id and the text that it adds.

    Args:
        package: an open one.
        prompt: the text to go on from; with ``chat`` the user's turn in the package's chat template.
        seed: of the sampling.
        settings: fields of ``models.Generation`` over the package's own.

    Raises:
        ModelError: ``chat`` and no chat template. TapeoutError: one of its kinds.
    """
    if package.is_module:
        raise TapeoutError(
            f"{package.directory} holds a plain module, which takes arrays and no prompt: its README.md says how to run it."
        )
    if package.encoder_output:
        raise TapeoutError(
            f"{package.directory} holds an encoder, which generates nothing: see replay.encode."
        )
    if chat:
        if package.chat_template is None:
            raise ModelError(f"{package.directory} has no chat template; leave out --chat.")
        tokens = special_tokens(package.tokenizer_config)
        prompt = render(package.chat_template, [{"role": "user", "content": prompt}], tokens)
    generation = replace(package.generation, **settings)
    _check(generation, seed)
    with session_of(package) as session:
        ids = session.tokenize(prompt)
        new: list[int] = []
        said = text = ""
        held: list[int] = []
        for token in sample(session, ids, generation, np.random.default_rng(seed)):
            if token in generation.stop_token_ids:
                break
            new.append(token)
            held.append(token)
            text = session.detokenize(new)
            if not text.endswith("\ufffd"):  # that may be a character whose bytes are not all there yet
                yield from _told(held, text[len(said) :])
                said, held = text, []
        yield from _told(held, text[len(said) :])


def _told(tokens: list[int], piece: str) -> Iterator[tuple[int, str]]:
    """Tokens that make up one piece of text: it comes with the last of them."""
    for at, token in enumerate(tokens, 1):
        yield token, piece if at == len(tokens) else ""


def _check(generation: Any, seed: int) -> None:
    """TapeoutError for a setting that has no meaning."""
    if seed < 0:
        raise TapeoutError(f"seed cannot be {seed}.")
    ranges = {
        "temperature": generation.temperature >= 0,
        "top_p": 0 < generation.top_p <= 1,
        "top_k": generation.top_k >= 0,
        "repetition_penalty": generation.repetition_penalty > 0,
        "max_new_tokens": generation.max_new_tokens > 0,
    }
    for name, good in ranges.items():
        if not good:
            raise TapeoutError(f"{name} cannot be {getattr(generation, name)}.")
