"""The gates: each looks at the evidence and returns one or more verdicts. None of them knows a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tapeout.errors import MissingToolchain, NotFinite, RecipeError, RuntimeCrash, TapeoutError
from tapeout.exporters import Artifact
from tapeout.files import file_sha256
from tapeout.models import TracedConfig
from tapeout.models.text_limits import LIMITS
from tapeout.quantize import QuantTensor, Scheme
from tapeout.validate.encoder_evidence import EncoderEvidence
from tapeout.validate.evidence import DECODED, Evidence
from tapeout.validate.findings import differing_answers, differing_strings, error_by_layer
from tapeout.validate.metrics import Distance, negative_log_likelihood
from tapeout.validate.module_evidence import ModuleEvidence
from tapeout.validate.report import GateResult
from tapeout.validate.session import KV_BITS, Logits, Lowering
from tapeout.validate.speed_gates import parse_bytes

E = TypeVar("E", bound=Evidence)
Gate = Callable[[E], list[GateResult]]

# Rounding to the wider types that a runtime may use for what is not quantized: bfloat16 inputs are off by 2^-9 / sqrt(3) =
# 0.11 % a matmul, a twentieth of the variance of int8 inputs (0.5 %), which cost about 3e-4 nats; and three times that.
_FLOAT_FLOOR = 5e-5
# The deviation of a logit that costs as much: KL is half the variance of the logits' errors.
_FLOAT_DEVIATION = (2 * _FLOAT_FLOOR) ** 0.5
# A device's rounding errors are another draw of the same distribution as the emulated ones, and their cost is averaged over
# all tokens: it is near the predicted one, and never twice as large. (Of a model with routed experts the median token: ``Evidence.cost``.)
_TWICE = 2.0
# Device and reference are each as far from the exact numbers as float32 takes them; and as much again for what a runtime
# approximates (exponentials, reciprocal roots) within a few units in the last place.
_NOISES = 4.0
_HALF = float(np.finfo(np.float16).max)
# A text that was not evaluated may make a value twice as large as the evaluated ones did: one bit of headroom.
_RANGE = 0.5
_NAMED = 16  # values of those that have less


@dataclass(frozen=True)
class Limits:
    """What the quality, task and throughput gates demand.

    Of quality None means: by the width of the scheme's codes, see ``for_scheme``; of speed and memory: nothing is demanded.

    Attributes:
        kl: mean KL of the dequantized to the original model, in nats a token, at most.
        top1: share of tokens with the same likeliest next token, at least.
        perplexity: perplexity over the original's, at most.
        task: share of tasks that may be lost.
        min_tokens_per_s: of one stream, at least.
        max_ttft_ms: milliseconds to the first token, at most.
        max_memory: that loading and running may add to the process's memory (``2GB``).
    """

    kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    task: float = 0.02
    min_tokens_per_s: float | None = None
    max_ttft_ms: float | None = None
    max_memory: str | None = None

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic, no field

    def __post_init__(self) -> None:
        """RecipeError for a limit of speed or memory that is none."""
        for name in ("min_tokens_per_s", "max_ttft_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RecipeError(f"{name} is {value}; what fits: more than 0.")
        if self.max_memory is not None:
            parse_bytes(self.max_memory)

    @property
    def speed(self) -> dict[str, Any]:
        """What is demanded of speed and memory, by name: arguments of ``speed_gates``."""
        names = ("min_tokens_per_s", "max_ttft_ms", "max_memory")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def for_scheme(self, scheme: Scheme) -> Limits:
        """Fill in what is None.

        Anchors: llama.cpp publishes mean KL of 0.0014 for q8_0, 0.0055 for q6_K, 0.011 for q5_K_M, 0.072 for q4_0 and 0.102 for
        q3_K_M of Llama 3 8B (for q2_K 0.42 was measured on a small model), the AWQ paper a perplexity of 5.73 over 5.47 for
        round-to-nearest int4-g128; each limit is about one and a half times its anchor. The share of
        changed likeliest tokens is near sqrt(KL / 2), Pinsker's bound on the distance of the distributions.
        """
        kl, perplexity = _usual_loss(scheme.bits)
        kl = self.kl if self.kl is not None else kl
        top1 = self.top1 if self.top1 is not None else 1 - (kl / 2) ** 0.5
        perplexity = self.perplexity if self.perplexity is not None else perplexity
        return replace(self, kl=kl, top1=top1, perplexity=perplexity)


def _usual_loss(bits: int) -> tuple[float, float]:
    """Mean KL in nats and perplexity over the original's that codes of ``bits`` bits may cost; see ``Limits.for_scheme``."""
    return {
        0: (1e-9, 1.0001), 8: (2e-3, 1.01), 6: (9e-3, 1.02), 5: (2e-2, 1.04), 3: (0.16, 1.2), 2: (0.6, 2.0),
    }.get(bits, (0.1, 1.08))  # fmt: skip


def guarded(name: str, gate: Gate[E], evidence: E) -> list[GateResult]:
    """Run a gate: what a missing toolchain keeps from running is skipped, what crashes has failed."""
    try:
        return gate(evidence)
    except MissingToolchain as error:
        return [GateResult(name, "skipped", reason=str(error))]
    except TapeoutError as error:
        if isinstance(error, NotFinite):
            evidence.findings.setdefault("not_finite", []).append({"gate": name, "finding": str(error)})
        return [GateResult(name, "failed", reason=str(error))]


def digests(artifact: Artifact) -> dict[str, str]:
    """SHA-256 of each of the artifact's files, by name."""
    return {name: file_sha256(artifact.directory / name) for name in artifact.files}


def integrity(root: Path, expected: Mapping[str, str]) -> list[GateResult]:
    """Compare files below ``root`` with their digests."""
    wrong = []
    for name, digest in expected.items():
        if not (root / name).exists():
            wrong.append(f"{name} is missing")
        elif file_sha256(root / name) != digest:
            wrong.append(f"{name} differs from its digest")
    reason = (
        "; ".join(wrong)
        or f"{len(expected)} of {len(expected)} files are as their digests say, after everything else has run."
    )
    return [_verdict("integrity", "files that differ", len(wrong), 0, reason)]


def codes(evidence: Evidence) -> list[GateResult]:
    """Read every tensor back from the artifact and compare it with the store, bit for bit."""
    quant, wrong, seen = evidence.quant, [], set()
    for name, found in evidence.device.read_codes(evidence.artifact, quant):
        seen.add(name)
        if name not in quant:
            wrong.append(f"{name} is not in the store")
            continue
        expected = quant[name]
        if isinstance(found, QuantTensor) and isinstance(expected, QuantTensor):
            if difference := _difference(found, expected):
                wrong.append(f"{name}: {difference}")
        else:
            # A float: exactly the checkpoint's, or the codes' value in a narrower float type, which the artifact's notes tell.
            values = found.dequantize() if isinstance(found, QuantTensor) else found
            wanted = quant.float32(name)
            if evidence.artifact.containers.get(name) == "F16":
                wanted = wanted.astype(np.float16).astype(np.float32)
            if values.shape != wanted.shape or not np.array_equal(values, wanted):
                wrong.append(f"{name}: float values differ")
    wrong += [f"{name} is not in the artifact" for name in quant if name not in seen]
    more = f" … and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    reason = "; ".join(wrong[:3]) + more or f"{len(seen)} tensors read back with the format owner's library."
    return [_verdict("codes", "tensors that differ from the store", len(wrong), 0, reason)]


def _difference(found: QuantTensor, expected: QuantTensor) -> str:
    """What differs between two tensors of codes, or nothing."""
    if found.shape != expected.shape or found.bits != expected.bits or found.group != expected.group:
        return f"{found.shape} codes of {found.bits} bits in groups of {found.group}"
    for part, mine, theirs in _parts(found, expected):
        if (mine is None) != (theirs is None):
            return f"{part} is {'absent' if mine is None else 'unexpected'}"
        if mine is not None and mine.shape != theirs.shape:
            return f"{part} is {list(mine.shape)} where {list(theirs.shape)} is expected"
        if mine is not None and not np.array_equal(_bits(mine), _bits(theirs)):
            if part == "packed":
                part, mine, theirs = "codes", found.codes(), expected.codes()
            changed = np.argwhere(_bits(mine) != _bits(theirs))
            return f"{len(changed)} of {mine.size} {part} differ, the first at {changed[0].tolist()}"
    return ""


def _parts(found: QuantTensor, expected: QuantTensor) -> Iterator[tuple[str, Any, Any]]:
    """The arrays of both that must be equal.

    A scale's own codes need not be in the file, where the scale they mean is; nor a static scale of inputs, which not every
    runtime has a use for.
    """
    for part in ("packed", "zero_point", "codebook"):
        yield part, getattr(found, part), getattr(expected, part)
    # A file may hold float16 scales as float32, which says the same.
    yield "scale", found.scale.astype(np.float32), expected.scale.astype(np.float32)
    if found.input_scale is not None:
        yield "input_scale", found.input_scale, expected.input_scale
    for part in ("scale_codes", "minimum"):
        mine, theirs = getattr(found, part), getattr(expected, part)
        if mine is not None or (theirs is not None and part == "minimum"):
            for field in ("codes", "block"):
                yield f"{part} {field}", getattr(mine, field, None), getattr(theirs, field, None)


def _bits(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Floats as their bits, so that NaN and the sign of zero count."""
    array = np.asarray(array)
    return array.view(f"u{array.itemsize}") if array.dtype.kind == "f" else array


def lowering(evidence: Evidence) -> list[GateResult]:
    """Hold the device's logits against the reference that runs the dequantized weights."""
    results = []
    for check in evidence.device.lowerings(evidence.artifact, evidence.quant, evidence.scratch):
        name = f"lowering/{check.check}"
        results += guarded(name, lambda e, c=check, n=name: _lowering(e, c, n), evidence)  # type: ignore[misc]
    none = GateResult(
        "lowering", "skipped", reason=f"target {evidence.device.name} has no check of its lowering."
    )
    return results or [none]


def _lowering(evidence: Evidence, check: Lowering, name: str) -> list[GateResult]:
    reference = evidence.cached if check.check == "runtime" else evidence.narrowed(check.halves, check.values)
    peaks: dict[str, float] = {}
    if check.peaks:
        logits, peaks = evidence.record_peaks(f"lowering-{check.check}", check.session, evidence.sequences)
    elif check.session == evidence.device.session(evidence.artifact):
        logits = evidence.lowered(f"lowering-{check.check}")
    else:
        logits = evidence.record(f"lowering-{check.check}", check.session, evidence.sequences)
    try:
        distance = _distance(reference, logits)
    except NotFinite as error:
        bad = next(at for at, rows in enumerate(logits) if not np.isfinite(rows).all())
        raise NotFinite(f"{error} {_first_divergence(evidence, bad)}") from error
    limit, value = check.limit, distance.max if check.metric == "max" else evidence.cost(distance)
    metric = "largest logit difference / std" if check.metric == "max" else evidence.metric
    reason = check.derivation
    if check.check == "runtime":
        if check.metric != "max":
            evidence.compare(name, distance, reference, logits, "dequantized reference", "device")
        predicted = evidence.cost(evidence.predicted)
        limit = _TWICE * predicted + _FLOAT_FLOOR
        reason = f"{check.derivation} Predicted for this model and text: {predicted:.2g} ({evidence.metric})."
    if value > limit and check.check == "weights":
        noise = evidence.float_noise
        limit = max(limit, _NOISES * noise)
        reason += f" Float32 takes the reference {noise:.2g} from float64 on this text; {_NOISES:g} times that is allowed."
    if value > limit:
        farthest = [Distance.between([a], [b]).max for a, b in zip(reference, logits, strict=True)]
        reason = f"{_first_divergence(evidence, int(np.argmax(farthest)))} {reason}"
    result = _verdict(name, metric, value, limit, reason)
    return [result, _range(peaks, sum(map(len, logits)))] if check.peaks else [result]


def _range(peaks: Mapping[str, float], rows: int) -> GateResult:
    """How near the device's float16 values come to what float16 holds, before they are rounded."""
    ordered = sorted(peaks.items(), key=lambda each: -each[1])
    # A session that tells of nothing has not been looked at: NaN fails.
    share = ordered[0][1] / _HALF if ordered else np.nan
    above = sum(peak > _RANGE * _HALF for _, peak in ordered)
    named = ordered[: min(max(3, above + 1), _NAMED)]
    shown = ", ".join(f"{name} {peak:.3g}" for name, peak in named)
    if len(named) < above:
        shown += f" … and {above - len(named)} more"
    reason = (
        f"{shown}: the largest of {len(peaks)} float16 values on {rows} rows, of {_HALF:.0f} that float16 holds. What was not evaluated "
        "may be twice as large: one bit is left for it."
    )
    if above:
        reason = f"{above} values have less room than one bit. {reason}"
    return _verdict("lowering/range", "largest float16 value / 65504", share, _RANGE, reason)


def _first_divergence(evidence: Evidence, index: int) -> str:
    """Walk the artifact along the graph over one of the sequences."""
    if isinstance(evidence.model.config, TracedConfig):
        return f"A graph that {evidence.model.graph} made has no names in common with ours to find where it first parts."
    try:
        found = evidence.walk(index)
    except TapeoutError as error:
        return f"Where it first parts could not be found: {error}"
    if found:
        evidence.findings["divergence"] = error_by_layer(found)
    return found.words() if found else f"Target {evidence.device.name} does not show where it first parts."


def decode(evidence: Evidence) -> list[GateResult]:
    """Compare token-by-token decoding, and other batch sizes, with one prefill on the same device."""
    session, window, ids = evidence.deployed, evidence.window, evidence.probed
    length, predicted = len(ids), evidence.cost(evidence.predicted_probe)
    # Once two runs have parted, each has a rounding error of its own: their variances add up.
    limit = _TWICE * 2 * predicted + _FLOAT_FLOOR
    # A lead of one logit over another moves by four errors at most: of two logits, on two roads.
    lead = 4 * (evidence.predicted_probe.worst + _FLOAT_DEVIATION)
    sizes = [size for size in (7, 32) if size < length]
    head, tail = ids[: -min(DECODED, length - 1)], ids[-min(DECODED, length - 1) :]
    evidence.begin(session)
    whole = session.prefill(ids)
    roads: dict[str, Logits] = {}
    evidence.begin(session)
    session.prefill(head)
    roads["decode"] = np.array([session.decode(token) for token in tail])
    for size in sizes:
        evidence.begin(session)
        parts = [session.prefill(ids[at : at + size]) for at in range(0, length, size)]
        roads[f"batches of {size}"] = np.concatenate(parts)
    results = []
    past = f", {length - window} tokens past the window of {window}" if window else ""
    for road, logits in roads.items():
        expected = whole[-len(logits) :]
        distance = Distance.between([expected], [logits])
        overturned = _overturned(expected, logits, lead)
        reason = (
            f"{road} against one prefill of {length} tokens{past}; top-1 equal on {distance.top1:.1%}. Two runs of one "
            f"arithmetic in another order differ by two roundings of their inputs at most: twice {predicted:.2g} "
            f"({evidence.metric}), at most twice that, and {_FLOAT_FLOOR:.0e} for float types."
        )
        if overturned:
            reason = (
                f"{overturned} tokens have another likeliest successor, though theirs led by more than the {lead:.2g} nats that "
                f"rounding explains. {reason}"
            )
        name = "decode" if road == "decode" else f"decode/{road.replace(' ', '-')}"
        result = _verdict(name, evidence.metric, evidence.cost(distance), limit, reason)
        results.append(result if not overturned else replace(result, status="failed"))
    return results


def _overturned(expected: Logits, other: Logits, explained: float) -> int:
    """Tokens whose likeliest successor changes although it led the new one by more than ``explained``, in logits."""
    rows = np.arange(len(expected))
    lead = expected.max(axis=1) - expected[rows, other.argmax(axis=1)]
    return int((lead > explained).sum())


def quality(evidence: Evidence, limits: Limits) -> list[GateResult]:
    """Compare the reference with the original: what the choice of scheme costs, on any device that does what it says.

    Weights are the dequantized ones; inputs are rounded where the scheme says so.
    """
    if evidence.model.quantization:
        method = evidence.model.quantization["quant_method"]
        return [
            GateResult(
                "quality", "skipped", reason=f"the model came quantized by {method}: there is no original."
            )
        ]
    limits = limits.for_scheme(evidence.quant.scheme)
    assert limits.kl is not None
    assert limits.top1 is not None
    assert limits.perplexity is not None
    distance = _distance(evidence.original, evidence.quantized)
    evidence.compare(
        "quality/kl", distance, evidence.original, evidence.quantized, "original weights", "quantized weights"
    )
    scored = [evidence.scored(ids) for ids in evidence.sequences]
    tokens = max(1, sum(len(ids) - 1 for ids in scored))
    loss = [
        sum(negative_log_likelihood(logits, np.array(ids)) for logits, ids in zip(each, scored, strict=True))
        / tokens
        for each in (evidence.original, evidence.quantized)
    ]
    before, after = (float(np.exp(each)) for each in loss)
    rounded = {str(scheme) for scheme in evidence.quant.schemes.values() if scheme.activations}
    inputs = f", with inputs rounded as {' and '.join(sorted(rounded))} says," if rounded else ""
    what = f"{distance.tokens} tokens of {'the model’s tasks' if evidence.tasks and not evidence.text else 'text'}"
    return [
        _verdict(
            "quality/kl",
            "mean KL, nats",
            distance.kl,
            limits.kl,
            f"original ‖ dequantized{inputs} on {what}.",
        ),
        _verdict(
            "quality/top1",
            "share of equal likeliest tokens",
            distance.top1,
            limits.top1,
            f"on {what}.",
            at_least=True,
        ),
        _verdict(
            "quality/perplexity",
            "perplexity / original's",
            after / before,
            limits.perplexity,
            f"{after:.4g} against {before:.4g} on {what}.",
        ),
    ]


def cache(evidence: Evidence, limits: Limits) -> list[GateResult]:
    """What the choice of cache costs: the dequantized reference with its cache rounded, against itself with floats."""
    if not evidence.rounds_cache:
        return []
    kind = evidence.device.cache
    distance = _distance(evidence.dequantized, evidence.cached)
    limit = limits.kl if limits.kl is not None else _usual_loss(int(KV_BITS[kind]))[0]
    reason = (
        f"the {kind} cache costs {distance.kl:.2g} nats a token beside what the weights cost; it may cost what weights of as "
        "many bits may."
    )
    return [_verdict("quality/cache", "mean KL, nats", distance.kl, limit, reason)]


def tokenizer(evidence: Evidence) -> list[GateResult]:
    """Compare the artifact's tokenizer with the source's on the hostile corpus, and the text that its ids become again.

    Strings of the classes that the artifact's format is known to cut otherwise are counted apart.
    """
    strings, expected, found = evidence.strings, evidence.expected, evidence.said
    changed = [i for i, (a, b) in enumerate(zip(expected.ids, found.ids, strict=True)) if a != b]
    known = set(changed)
    back = [
        i
        for i, (a, b) in enumerate(zip(expected.texts, found.texts, strict=True))
        if a != b and i not in known and evidence.gives_text
    ]
    classes = {
        name: {
            i
            for i, (text, again) in enumerate(zip(strings, expected.texts, strict=True))
            if LIMITS[name].holds(text, evidence.added_tokens, again)
        }
        for name in evidence.artifact.tokenizer_limits
    }
    apart = set().union(*classes.values())
    wrong = [i for i in (*changed, *back) if i not in apart]
    evidence.findings["tokenizer"] = differing_strings(
        strings, expected.ids, found.ids, [*wrong, *sorted({*changed, *back} & apart)]
    )
    reason = f"{len(strings) - len(apart)} hostile strings give the same ids, and their ids the same text."
    if wrong and wrong[0] in known:
        i = wrong[0]
        reason = (
            f"{strings[i][:60]!r} gives {found.ids[i][:12]} where the source gives {expected.ids[i][:12]}."
        )
    elif wrong:
        i = wrong[0]
        reason = (
            f"the ids of {strings[i][:60]!r} become {found.texts[i][:60]!r}, not {expected.texts[i][:60]!r}."
        )
    results = [_verdict("tokenizer", "strings that differ", len(wrong), 0, reason)]
    if classes:
        differ = {*changed, *back}
        parts = [
            f"{len(differ & members)} of {len(members)} with {LIMITS[name].reason}"
            for name, members in classes.items()
        ]
        results.append(
            _verdict(
                "tokenizer/limits",
                "strings that differ",
                len(differ & apart),
                len(apart),
                "; ".join(parts) + ".",
            )
        )
    return results


def task(evidence: Evidence, limits: Limits) -> list[GateResult]:
    """Compare exact-match accuracy on the model's tasks: original weights on the reference, and the device."""
    if not evidence.tasks:
        return [
            GateResult("task", "skipped", reason="the model has no tasks.jsonl with prompts and answers.")
        ]

    def accuracy(answers: list[str]) -> float:
        right = sum(a == wanted.strip() for a, (_, wanted) in zip(answers, evidence.tasks, strict=True))
        return right / len(evidence.tasks)

    before, after = accuracy(evidence.expected.answers), accuracy(evidence.said.answers)
    evidence.findings["tasks"] = differing_answers(
        evidence.tasks, evidence.expected.answers, evidence.said.answers
    )
    reason = f"{len(evidence.tasks)} tasks; the original answers {before:.1%} exactly, at most {limits.task:.1%} may be lost."
    return [_verdict("task", "exact answers", after, before - limits.task, reason, at_least=True)]


def padding(evidence: EncoderEvidence) -> list[GateResult]:
    """Compare sequences of different lengths in one padded batch with each alone, on the device."""
    sequences = evidence.of_different_lengths
    session = evidence.deployed
    together = evidence.encode(session, sequences)
    alone = [evidence.encode(session, [ids])[0] for ids in sequences]
    distance = _distance(alone, together)
    predicted = evidence.cost(evidence.predicted)
    limit = _TWICE * 2 * predicted + _FLOAT_FLOOR
    reason = (
        f"{len(sequences)} sequences of {min(map(len, sequences))} to {max(map(len, sequences))} tokens, padded on the right, against "
        "each alone. Two runs of one arithmetic in another order differ by two roundings of their inputs at most: twice "
        f"{predicted:.2g} on average, at most twice that, and {_FLOAT_FLOOR:.0e} for float types."
    )
    return [_verdict("padding", evidence.metric, evidence.cost(distance), limit, reason)]


def encoder_quality(evidence: EncoderEvidence, limits: Limits) -> list[GateResult]:
    """Compare the reference with dequantized weights with the original, by what the encoder is asked for.

    Of class logits, KL and the likeliest class, as of a decoder's tokens. Of states and embeddings the angle: 1 - cos is half the
    squared relative error, as KL is half the variance of the logits' errors, and so it has KL's limit.
    """
    if evidence.model.quantization:
        method = evidence.model.quantization["quant_method"]
        reason = f"the model came quantized by {method}: there is no original."
        return [GateResult("quality", "skipped", reason=reason)]
    limits = limits.for_scheme(evidence.quant.scheme)
    assert limits.kl is not None
    assert limits.top1 is not None
    distance = _distance(evidence.original, evidence.quantized)
    what = f"original ‖ dequantized on {len(evidence.sequences)} texts."
    if evidence.config.output == "logits":
        evidence.compare(
            "quality/kl",
            distance,
            evidence.original,
            evidence.quantized,
            "original weights",
            "quantized weights",
        )
        return [
            _verdict("quality/kl", "mean KL, nats", distance.kl, limits.kl, what),
            _verdict(
                "quality/top1",
                "share of equal likeliest classes",
                distance.top1,
                limits.top1,
                what,
                at_least=True,
            ),
        ]
    evidence.compare(
        "quality/cosine",
        distance,
        evidence.original,
        evidence.quantized,
        "original weights",
        "quantized weights",
    )
    reason = f"the angle between {evidence.config.output} of {what}"
    return [_verdict("quality/cosine", "mean of 1 - cosine", distance.cosine, limits.kl, reason)]


def module_quality(evidence: ModuleEvidence, limits: Limits) -> list[GateResult]:
    """Compare a module with dequantized weights with the original: the squared error of its outputs.

    KL is half the variance of the logits' errors, so twice KL's limit is the limit here.
    """
    limits = limits.for_scheme(evidence.quant.scheme)
    assert limits.kl is not None
    distance = _distance(evidence.original, evidence.quantized)
    evidence.compare(
        "quality/error",
        distance,
        evidence.original,
        evidence.quantized,
        "original weights",
        "quantized weights",
    )
    reason = f"original ‖ dequantized on {len(evidence.samples)} samples; twice what KL may be, which is half the variance of errors."
    return [_verdict("quality/error", evidence.metric, distance.error, 2 * limits.kl, reason)]


def absent(reasons: Mapping[str, str]) -> list[GateResult]:
    """Gates that a model of this kind cannot run, each with the reason."""
    return [GateResult(name, "skipped", reason=reason) for name, reason in reasons.items()]


def _distance(reference: list[Logits], other: list[Logits]) -> Distance:
    distance = Distance.between(reference, other)
    if not distance.tokens:
        raise RuntimeCrash(
            "the evaluation text gives no token with this tokenizer: give a text of the model's own kind."
        )
    return distance


def _verdict(
    name: str, metric: str, value: float, limit: float, reason: str, *, at_least: bool = False
) -> GateResult:
    # Written so that NaN fails.
    good = value >= limit if at_least else value <= limit
    if not np.isfinite(value):
        reason = f"it comes to {value:g}, which is no figure. {reason}"
    return GateResult(name, "passed" if good else "failed", metric, float(value), float(limit), reason)
