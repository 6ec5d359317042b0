"""Mixed precision by budget: the scheme of each tensor, so that a model has a given size, or loses no more than a given KL.

Two things are assumed, and measured to hold (docs/recipes.md): the KL of a network with several rounded tensors is the sum of
what each costs alone, and what a tensor costs follows the squared error of its weights. So each tensor is measured once
(``validate.sensitivity``), and choosing is a multiple-choice knapsack, which ``allocate`` solves with a proof.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout import __version__
from tapeout.errors import MissingToolchain, RecipeError
from tapeout.exporters import Exact
from tapeout.files import cache_directory, canonical_json, lock, write_whole, writing
from tapeout.models import Model, Role
from tapeout.quantize import SCHEMES, Calibration, Scheme, assign
from tapeout.quantize.calibration import digest
from tapeout.recipe import Recipe
from tapeout.targets import Target
from tapeout.targets.held import held_bits
from tapeout.validate.sensitivity import Cost, SensitivitySession, offered

FORMAT_VERSION = 1

# Windows of calibration text that tensors are measured on, as long as those of the quality gate: a network that was trained
# on shorter ones loses more beyond.
_WINDOWS, _LENGTH = 4, 512
_STATES = 1 << 16  # partial mixes that are kept; what a cut there may cost is part of the gap
_STEP = 0.25  # bits between two points of the curve

Progress = Callable[[str, int, int], None]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """A scheme that a tensor can take: its bits a weight in the target's file, and the KL that it is predicted to cost."""

    scheme: str
    bits: float
    kl: float


@dataclass(frozen=True)
class Mix:
    """A scheme for every matrix.

    Attributes:
        schemes: by tensor name.
        bits: a weight, over all matrices, a tied embedding counted once.
        kl: predicted for rounding to nearest, mean over tokens, in nats.
        gap: how much better than this a mix may be at most, as a share of what was minimised; 0: this is the best.
    """

    schemes: Mapping[str, str]
    bits: float
    kl: float
    gap: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a budget comes to.

    Attributes:
        budget: in words (``4.5 bits a weight``).
        mix: the one chosen.
        curve: the best mix of each size, from small to large.
        recipe: ``mix`` as a recipe.
    """

    model: str
    target: str | None
    budget: str
    mix: Mix
    curve: tuple[Mix, ...]
    recipe: Recipe

    def toml(self) -> str:
        """The recipe as a file, with what it was made from above it."""
        return "\n".join(f"# {line}" for line in self.summary()) + "\n\n" + self.recipe.toml()

    def summary(self) -> list[str]:
        """Budget and prediction in a few sentences."""
        held = f"what {self.target} carries exactly" if self.target else "all schemes"
        near = f"at most {self.mix.gap:.2%} from the best mix" if self.mix.gap else "the best mix"
        return [
            f"{self.model}: {self.budget}, of {held}: {near}.",
            f"{self.mix.bits:.3f} bits a weight over all matrices; predicted KL {self.mix.kl:.3g} nats a token with rounding to "
            "nearest,",
            "which is an upper estimate for gptq, awq and hqq; the quality gate measures what it is.",
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "model": self.model,
            "target": self.target,
            "budget": self.budget,
            **asdict(self.mix),
            "curve": [{"bits": mix.bits, "kl": mix.kl} for mix in self.curve],
            "recipe": self.recipe.model_dump(mode="json", exclude_unset=True),
        }


def plan(
    model: Model,
    target: Target | None,
    recipe: Recipe | None = None,
    *,
    bits: float | None = None,
    max_kl: float | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Choose each tensor's scheme: the least KL within ``bits``, or the fewest bits within ``max_kl``.

    Args:
        model: what ``load`` gives.
        target: whose files hold the codes: what it carries exactly, at the bits that it takes; None: any scheme, as a store has it.
        recipe: rounding, calibration text and limits; a budget chooses the schemes.
        bits: bits a weight, over all matrices.
        max_kl: nats a token.

    Raises:
        RecipeError: not one of the two budgets, a recipe that chooses schemes itself, or a budget that no mix meets.
        MissingToolchain: torch or transformers is not installed.
    """
    recipe = recipe or Recipe()
    _check(model, recipe, bits, max_kl)
    costs = measure(model, recipe.calibration, progress)
    options = {name: choices(model, name, costs[name], target) for name in costs}
    weights = [math.prod(model.specs[name].shape) for name in options]
    share = np.array(weights) / sum(weights)
    size = [np.array([o.bits for o in each]) * s for each, s in zip(options.values(), share, strict=True)]
    loss = [np.array([o.kl for o in each]) for each in options.values()]

    def mix(chosen: Sequence[int], gap: float = 0.0) -> Mix:
        picked = {name: each[at] for (name, each), at in zip(options.items(), chosen, strict=True)}
        mean = sum(o.bits * w for o, w in zip(picked.values(), weights, strict=True)) / sum(weights)
        kl = math.fsum(o.kl for o in picked.values())
        return Mix({name: o.scheme for name, o in picked.items()}, mean, kl, gap)

    least, most = mix([int(s.argmin()) for s in size]), mix([int(k.argmin()) for k in loss])
    if bits is not None:
        budget = f"{bits:g} bits a weight"
        found = allocate(loss, size, bits)
        closest = f"the smallest takes {least.bits:.4g}, with a predicted KL of {least.kl:.3g} nats a token"
    else:
        assert max_kl is not None
        budget = f"a KL of {max_kl:g} nats a token"
        found = allocate(size, loss, max_kl)
        closest = f"the best loses {most.kl:.3g} at {most.bits:.4g} bits a weight"
    if found is None:
        who = f"the target {target.name} carries exactly" if target else "there is"
        raise RecipeError(f"No mix of what {who} keeps {model.name} within {budget}: {closest}.")
    chosen = mix(*found)
    curve = [least]
    for each in np.arange(math.ceil(least.bits / _STEP) * _STEP, min(most.bits, 9.0) + _STEP / 2, _STEP):
        at = allocate(loss, size, float(each))
        if at is not None and (next_one := mix(*at)).kl < curve[-1].kl:
            curve.append(next_one)
    return Plan(
        model=model.name,
        target=target.name if target else None,
        budget=budget,
        mix=chosen,
        curve=tuple(curve),
        recipe=as_recipe(model, chosen, recipe, max_kl),
    )


def _check(model: Model, recipe: Recipe, bits: float | None, max_kl: float | None) -> None:
    if model.quantization is not None:
        raise RecipeError(
            f"{model.name} is quantized already: its codes are carried as they are, and a budget has nothing to choose."
        )
    if (bits is None) == (max_kl is None):
        raise RecipeError("A budget is either --bits, bits a weight, or --max-kl, nats a token.")
    given = bits if bits is not None else max_kl
    if given is None or not math.isfinite(given) or given < 0:
        raise RecipeError(f"A budget of {given} is none: give a number such as --bits 4.5 or --max-kl 0.01.")
    if recipe.model_fields_set & {"scheme", "tensors"}:
        raise RecipeError(
            "A budget chooses the schemes: leave out --scheme, and in the recipe 'scheme' and [tensors]."
        )


def choices(model: Model, name: str, cost: Cost, target: Target | None) -> list[Option]:
    """The schemes worth considering for a tensor: none of them is both larger and worse than another. Ascending in bits.

    Raises:
        RecipeError: the target carries nothing that the tensor can take.
    """
    source = model.checkpoint[name]
    found = []
    for scheme in (SCHEMES["none"], *offered(source.shape)):
        floats = scheme.kind == "none"
        if not floats and scheme.name not in cost.error:
            continue
        # A lookup, and llama.cpp's network for sliding windows, leave out the factor of a whole tensor.
        if scheme.scales == "e4m3" and (
            model.specs[name].role is Role.EMBEDDING or model.config.sliding_window
        ):
            continue
        own = 8.0 * source.nbytes / math.prod(source.shape) if floats else None
        held = _held(scheme, source.shape[1], own, target)
        if held is not None:
            found.append(Option(scheme.name, held, 0.0 if floats else cost.predict(scheme.name)))
    kept: list[Option] = []
    for option in sorted(found, key=lambda o: (o.bits, o.kl)):
        if not kept or option.kl < kept[-1].kl:
            kept.append(option)
    if not kept:
        raise RecipeError(f"The target {target and target.name} carries no scheme exactly that fits {name}.")
    return kept


def _held(scheme: Scheme, in_features: int, own: float | None, target: Target | None) -> float | None:
    """Bits a weight of a scheme in the target's file; None where it would not hold the codes exactly."""
    if own is not None:
        return own if target is None or isinstance(target.carries(scheme), Exact) else None
    return scheme.bits_per_weight(in_features) if target is None else held_bits(target, scheme, in_features)


def measure(
    model: Model, calibration: Calibration | None = None, progress: Progress | None = None
) -> dict[str, Cost]:
    """What rounding each matrix costs, measured once for a model and a text: kept in the cache, tensor by tensor.

    Raises:
        RecipeError: the calibration text cannot be used. MissingToolchain: torch or transformers is not installed.
    """
    asked = calibration or Calibration()
    part = replace(asked, sequences=min(asked.sequences, _WINDOWS), length=min(asked.length, _LENGTH))
    tokens = part.tokens(model)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        source = model.checkpoint.sha256(pool)
    about = {
        "format_version": FORMAT_VERSION,
        "tapeout": __version__,  # another version may round better
        "source_sha256": source,
        "tokens_sha256": digest(tokens),
        "schemes": list(SCHEMES),
    }
    key = hashlib.sha256(canonical_json(about).encode()).hexdigest()
    path = cache_directory() / "sensitivity" / f"{key}.json"
    names = [name for name, spec in model.specs.items() if spec.role.is_matrix]
    with lock(path, wait=True), writing(path):
        found = _read(path, names)
        if len(found) < len(names):
            with closing(SensitivitySession(model, tokens)) as session:
                for name in names:
                    if name not in found:
                        found[name] = session.measure(name)
                        # At once, so that a run that was killed goes on here.
                        write_whole(
                            path,
                            canonical_json(
                                about | {"tensors": {n: asdict(cost) for n, cost in found.items()}}
                            ),
                        )
                    if progress:
                        progress("sensitivity", len(found), len(names))
    return {name: found[name] for name in names}


def _read(path: Path, names: Sequence[str]) -> dict[str, Cost]:
    try:
        tensors = json.loads(path.read_text(encoding="utf-8"))["tensors"]
        return {name: Cost(**tensors[name]) for name in names if name in tensors}
    except FileNotFoundError:
        return {}


def allocate(
    cost: Sequence[Floats], weight: Sequence[Floats], limit: float
) -> tuple[list[int], float] | None:
    """Choose one option of each item so that the costs are least and the weights stay within a limit; None: no choice does.

    The multiple-choice knapsack (Kellerer, Pferschy, Pisinger: Knapsack Problems, chapter 11). The multiplier λ of its linear
    relaxation bounds every choice from below by Σ (cost + λ weight) - λ limit. Partial choices are then extended item by item;
    those whose bound does not come below the best choice known, and those that another one dominates, are dropped. That is exact
    unless more than _STATES are left: then the lowest bound that was dropped is the proof of how good the result is.

    Args:
        cost: of each item's options, float64 [options], ≥ 0.
        weight: the same for weights.
        limit: of the sum of weights.

    Returns:
        The options by index, and the gap: (cost - lower bound) / cost.
    """
    limit += 1e-9 * abs(limit)  # sums of floats
    lightest = [_first(w, c) for c, w in zip(cost, weight, strict=True)]
    if _sum(weight, lightest) > limit:
        return None
    best = [_first(c, w) for c, w in zip(cost, weight, strict=True)]
    if _sum(weight, best) <= limit:
        return best, 0.0
    multiplier, best = _relaxation(cost, weight, lightest, limit)
    priced = [c + multiplier * w for c, w in zip(cost, weight, strict=True)]
    cheapest = [int(p.argmin()) for p in priced]
    bound = _sum(priced, cheapest) - multiplier * limit
    least, proven = _sum(cost, best), math.inf
    # What hardly narrows the search comes last.
    order = sorted(
        range(len(cost)),
        key=lambda i: -float(np.sort(priced[i])[min(1, len(priced[i]) - 1)] - priced[i].min()),
    )
    states = np.zeros((3, 1))  # cost, weight, and what the bound has risen by
    trail: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
    rest = sum(float(weight[i][lightest[i]]) for i in order)
    for i in order:
        rest -= float(weight[i][lightest[i]])
        added = np.stack([cost[i], weight[i], priced[i] - priced[i].min()])
        grown = (states[:, :, None] + added[:, None, :]).reshape(3, -1)
        keep = np.flatnonzero((grown[1] + rest <= limit) & (bound + grown[2] < least))
        keep = keep[np.lexsort((grown[0][keep], grown[1][keep]))]
        lower = np.minimum.accumulate(grown[0][keep])
        keep = keep[np.append(True, lower[1:] < lower[:-1])[: len(keep)]]
        if len(keep) > _STATES:
            by_bound = keep[np.argsort(grown[2][keep], kind="stable")]
            proven = min(proven, bound + float(grown[2][by_bound[_STATES]]))
            keep = np.sort(by_bound[:_STATES])
        trail.append((keep // len(cost[i]), keep % len(cost[i])))
        states = grown[:, keep]
    if states.shape[1]:
        at = int(states[0].argmin())
        least = float(states[0, at])
        for i, (parent, option) in zip(reversed(order), reversed(trail), strict=True):
            best[i], at = int(option[at]), int(parent[at])
    return best, max(0.0, (least - proven) / least) if least else 0.0


def _relaxation(
    cost: Sequence[Floats], weight: Sequence[Floats], start: Sequence[int], limit: float
) -> tuple[float, list[int]]:
    """The multiplier of the linear relaxation, and the choice that comes from taking its steps while they fit.

    The steps are the edges of each item's lower convex hull; the best saving for a weight first.
    """
    steps = []
    for i, (c, w) in enumerate(zip(cost, weight, strict=True)):
        at = start[i]
        while (better := np.flatnonzero(c < c[at])).size:
            saving = (c[at] - c[better]) / (w[better] - w[at])
            # Of equal ones the longest, so that savings fall strictly from edge to edge.
            to = int(better[np.lexsort((-w[better], -saving))[0]])
            steps.append((float(saving.max()), i, at, to))
            at = to
    chosen, left, multiplier, blocked = list(start), limit - _sum(weight, start), 0.0, set()
    for saving, i, at, to in sorted(steps, key=lambda step: -step[0]):
        taken = float(weight[i][to] - weight[i][at])
        if i not in blocked and taken <= left:
            chosen[i], left = to, left - taken
        else:
            blocked.add(i)
            multiplier = multiplier or saving  # of the first that does not fit
    return multiplier, chosen


def _first(key: Floats, then: Floats) -> int:
    """The option that is least in ``key``, among equals in ``then``."""
    return int(np.lexsort((then, key))[0])


def _sum(values: Sequence[Floats], chosen: Sequence[int]) -> float:
    return math.fsum(float(each[at]) for each, at in zip(values, chosen, strict=True))


def as_recipe(model: Model, mix: Mix, recipe: Recipe, max_kl: float | None = None) -> Recipe:
    """A mix as a recipe: the most frequent scheme, globs where all layers have the same, then what is left by name.

    Limits that ``recipe`` does not set: the KL is ``max_kl``, or one and a half times what is predicted where the most frequent
    scheme's own is less; log perplexity grows by no more than that, and three standard deviations over ``recipe.tokens`` (a log
    ratio of probabilities varies by about twice the KL). Nothing that was not asked for is stricter than for that scheme.
    """
    coded = Counter(scheme for scheme in mix.schemes.values() if scheme != "none")
    scheme = coded.most_common(1)[0][0] if coded else "none"
    tensors: dict[str, str] = {}
    alike: dict[str, Counter[str]] = {}
    for name, chosen in mix.schemes.items():
        alike.setdefault(_place(name), Counter())[chosen] += 1
    for place, counts in alike.items():
        common, count = counts.most_common(1)[0]
        if place.startswith("*") and count > 1 and common != scheme:
            tensors[place] = common
    given = assign(model, Scheme.parse(scheme), tensors)
    for name, chosen in mix.schemes.items():
        if given[name].name != chosen:
            tensors[name.removesuffix(".weight")] = chosen
    own, usual = recipe.limits, recipe.limits.for_scheme(Scheme.parse(scheme))
    assert usual.kl is not None
    assert usual.top1 is not None
    assert usual.perplexity is not None
    kl = own.kl if own.kl is not None else max_kl
    if kl is None:
        kl = _rounded_up(max(1.5 * mix.kl, usual.kl))
    spread = kl + 3 * math.sqrt(2 * kl / recipe.tokens)
    limits = replace(
        own,
        kl=kl,
        top1=own.top1 if own.top1 is not None else min(usual.top1, 1 - _rounded_up(math.sqrt(kl / 2))),
        perplexity=own.perplexity
        if own.perplexity is not None
        else max(usual.perplexity, _rounded_up(math.exp(spread))),
    )
    raw = {name: getattr(recipe, name) for name in recipe.model_fields_set}
    return Recipe(**(raw | {"scheme": scheme, "tensors": tensors, "limits": limits}))


def _place(name: str) -> str:
    """``*.mlp.down_proj`` of a layer's tensor; the name of any other."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(["*", *parts[numbers[-1] + 1 :]]) if numbers else ".".join(parts)


def _rounded_up(value: float) -> float:
    """To four digits."""
    step = 10.0 ** (math.floor(math.log10(value)) - 3) if value else 1.0
    return float(f"{math.ceil(value / step) * step:.4g}")


def plot(found: Plan, path: Path) -> None:
    """Draw the size–quality curve with the chosen mix on it; the suffix of ``path`` says the format.

    Raises:
        MissingToolchain: matplotlib is not installed. RecipeError: a format that it does not write.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingToolchain("a plot needs matplotlib: pip install 'tapeout[report]'.") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    drawn = [mix for mix in found.curve if mix.kl > 0]
    axes.plot([mix.bits for mix in drawn], [mix.kl for mix in drawn], ".-", label="best mix of each size")
    if found.mix.kl > 0:
        axes.plot([found.mix.bits], [found.mix.kl], "o", label=found.budget)
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("predicted KL, nats a token")
    axes.set_title(f"{found.model}{f' → {found.target}' if found.target else ''}")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise RecipeError(f"{path} is no plot that matplotlib writes; it writes {', '.join(sorted(known))}.")
    with writing(path):
        # Of a fixed seed and without a date: the same curve gives the same file.
        from matplotlib import rc_context

        with rc_context({"svg.hashsalt": "tapeout"}):
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
