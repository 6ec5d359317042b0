"""Targets: a device, the exporter it takes, and how to open a session on its runtime.

A target is a frozen dataclass, found by its entry point in the group ``tapeout.targets``. Its fields are the flags that
``tapeout export NAME`` takes; nothing else lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Protocol, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from tapeout.errors import SchemeError, TapeoutError, nearest
from tapeout.exporters import Artifact, Refused
from tapeout.models import DecoderConfig, Model
from tapeout.quantize import Quantized, Scheme
from tapeout.validate.session import KV_BITS, Device, KvCache, SessionSpec

Progress = Callable[[str, int, int], None]

__all__ = [
    "KvCache",
    "Memory",
    "SessionSpec",
    "Target",
    "at",
    "check_cache",
    "check_carries",
    "check_counts",
    "default_scheme",
    "get",
    "loaded",
    "names",
    "read",
    "restored",
    "runtimes",
    "scratch_bytes",
    "target",
    "variants",
]


@dataclass(frozen=True)
class Memory:
    """What a runtime takes beside the weights, in bytes.

    Attributes:
        cache: keys and values of a full context, as the runtime lays them out.
        work: most that is alive at once while a chunk of a prompt is computed at the end of that context; an upper bound.
    """

    cache: int
    work: int


class Target(Device, Protocol):
    """What a target gives besides what validation asks of it (``Device``).

    Attributes:
        name: what the user types; the entry point's name.
        summary: one line for ``tapeout targets``.
        needs: what the device must have to run the package, for its manifest and card.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @property
    def needs(self) -> str:
        """See above."""

    def kv_caches(self, head_dim: int | None = None) -> tuple[KvCache, ...]:
        """What the runtime can keep keys and values in, for heads of that many elements; None: of some width."""

    def memory(self, config: DecoderConfig, context: int) -> Memory:
        """What a sequence of ``context`` tokens takes beside the weights."""

    def missing(self) -> str | None:
        """None when the runtime is installed here; otherwise one sentence with the command that installs it."""

    def export(self, quant: Quantized, out: Path, progress: Progress | None = None) -> Artifact:
        """Write the files that the runtime loads into the empty directory ``out``; no device is needed."""

    def card(self, artifact: Artifact) -> str:
        """How to run the package on the device: Markdown, a few copyable lines, for its README."""


def names() -> list[str]:
    """Names of the installed targets, sorted."""
    return sorted({entry.name for entry in entry_points(group="tapeout.targets")})


def get(name: str) -> type[Target]:
    """Return the target class of that name; TapeoutError names the installed ones."""
    for entry in entry_points(group="tapeout.targets"):
        if entry.name == name:
            found: type[Target] = entry.load()
            return found
    raise TapeoutError(f"'{name}' is not an installed target{nearest(name, names())}.")


def target(name: str, **options: Any) -> Target:
    """Return the target of that name with the given options; TapeoutError names the installed ones."""
    return get(name)(**options)


def restored(name: str, options: Mapping[str, Any]) -> Target:
    """The target of that name with options that a stranger wrote; TapeoutError for one that it does not have, or of another type."""
    kind = get(name)
    hints, known = get_type_hints(kind), {field.name for field in fields(kind)}  # type: ignore[arg-type]
    given = {}
    for option, value in options.items():
        if option not in known:
            raise TapeoutError(f"target {name} has no option {option[:60]!a}{nearest(option[:60], known)}.")
        try:
            given[option] = TypeAdapter(hints[option]).validate_python(value)
        except ValidationError as error:
            said = error.errors(include_url=False)[0]["msg"]
            raise TapeoutError(
                f"option '{option}' of target {name} is {ascii(value)[:60]}: {said}."
            ) from None
    return kind(**given)


def variants(name: str) -> dict[str, Target]:
    """The target of that name with its defaults, and for each other value of its ``format``, if it has one, that way of it."""
    kind = get(name)
    formats = get_args(get_type_hints(kind).get("format"))
    found = {name: kind()}
    return found | {f"{name} --format {each}": kind(format=each) for each in formats[1:]}  # type: ignore[call-arg]


def loaded(target: Target, quant: Quantized, size: int) -> tuple[int, int]:
    """Bytes of weights in memory once files of ``size`` bytes are open: what the runtime keeps, and pages of files that stay mapped beside it.

    The target's ``loaded``; without one the runtime keeps the files' bytes.
    """
    found = getattr(target, "loaded", None)
    return found(quant, size) if found else (size, 0)


def read(target: Target, quant: Quantized, count: float) -> float:
    """Bytes that kernels read of weights which are ``count`` bytes in the files: the target's ``read``; without one as many."""
    found = getattr(target, "read", None)
    return float(found(quant, count)) if found else count


def runtimes(target: Target) -> tuple[str, ...]:
    """Distributions on PyPI of which any one runs the package: the target's ``runtimes``; without it none."""
    found: tuple[str, ...] = getattr(target, "runtimes", ())
    return found


def scratch_bytes(target: Target, quant: Quantized) -> int:
    """Disk that the gates take beside the package while they run: the target's ``scratch_bytes``, or none."""
    found = getattr(target, "scratch_bytes", None)
    return int(found(quant)) if found else 0


def at(target: Target, context: int, batch: int = 1) -> Target:
    """The target for sequences of ``context`` tokens, so many at once, by whichever of its options say that; without a limit of memory."""
    known = getattr(target, "known_flags", None) or {field.name for field in fields(target)}  # type: ignore[arg-type]
    wanted = dict.fromkeys(("context", "sequence_length", "max_seq_len"), context)
    wanted |= dict.fromkeys(("batch_size", "max_batch", "max_batch_size"), batch)
    wanted["max_memory"] = "999999G"  # type: ignore[assignment]
    return replace(target, **{name: value for name, value in wanted.items() if name in known})  # type: ignore[type-var]


def default_scheme(target: Target | type[Target]) -> str:
    """What a model is quantized as where nobody says: the target's ``default_scheme``, or int8."""
    return getattr(target, "default_scheme", "int8")


def options(target: Target) -> dict[str, Any]:
    """The options of a target that differ from their defaults."""
    return {f.name: getattr(target, f.name) for f in fields(target) if getattr(target, f.name) != f.default}  # type: ignore[arg-type]


def check_counts(target: Target, *names: str) -> None:
    """TapeoutError for one of these options that counts something and is below 1; None: it is not given."""
    for name in names:
        value = getattr(target, name)
        if value is not None and value < 1:
            raise TapeoutError(f"--{name.replace('_', '-')} is {value}; what fits: 1 or more.")


def check_carries(target: Target, schemes: set[Scheme]) -> None:
    """Raise SchemeError when a target refuses one of the schemes, with the nearest that fits."""
    for scheme in sorted(schemes, key=str):
        carry = target.carries(scheme)
        if isinstance(carry, Refused):
            raise SchemeError(
                f"target {target.name} cannot carry {scheme}: {carry.reason} What fits: {carry.nearest}."
            )


def check_cache(target: Target, model: Model) -> None:
    """Raise TapeoutError when the target's runtime cannot keep the model's keys and values as its option says.

    An encoder and a module have none; the graph of a family that has no file here says itself what it keeps.
    """
    if not isinstance(model.config, DecoderConfig):
        return
    if model.config.mla and KV_BITS[target.cache] < 16:
        fitting = tuple(kind for kind in target.kv_caches() if KV_BITS[kind] >= 16)
        raise TapeoutError(
            f"target {target.name} cannot keep keys and values of {model.name} as {target.cache}: what that costs latent attention is "
            f"not predicted. What fits: {', '.join(fitting)}."
        )
    width = model.config.head_dim
    if target.cache not in (fitting := target.kv_caches(width)):
        raise TapeoutError(
            f"target {target.name} cannot keep keys and values of {model.name} as {target.cache}: its heads of {width} elements "
            f"are no whole blocks. What fits: {', '.join(fitting)}."
        )


def graph_width(config: DecoderConfig) -> int:
    """Floats of a token that are alive at once in a layer, at most: four states, and what the wider of attention and MLP makes."""
    c, mlp = config, 4 * config.intermediate_size  # gate, up, the activation, their product
    if c.moe:
        mlp = max(mlp, 4 * (c.moe.intermediate_size + c.moe.shared_size))
    heads = 2 * c.num_heads * (c.head_dim + c.value_dim)
    attention = heads + 2 * c.num_kv_heads * (c.head_dim + c.value_dim)
    if c.mla:  # queries and sums that are as wide as the latent
        attention = heads + 4 * c.num_heads * (c.mla.kv_rank + c.mla.rope_dim)
    return 4 * c.hidden_size + max(mlp, attention)
