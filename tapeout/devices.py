"""The devices that a plan is made for: ``data/devices.toml``, and a user's file over it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil

from tapeout.errors import RecipeError, nearest
from tapeout.targets import apple_chips
from tapeout.validate.throughput import bandwidth, cores

Span = tuple[float, float]


@dataclass(frozen=True)
class Device:
    """A row of the table, whose head says what each field means.

    Attributes:
        reaches: by format, and under ``""`` for every other: least and most of the bandwidth that decoding is assumed to reach.
        attends: by format: 10^9 products of attention a second and core; a format that is not there takes no time for them.
        layer_ms: by format: milliseconds that a layer takes besides, whatever its size.
    """

    name: str
    targets: tuple[str, ...]
    summary: str = ""
    memory_gb: float | None = None
    usable: float = 1.0
    gb_per_s: float | None = None
    chip: str | None = None
    cards: int = 1
    scaling: float = 1.0
    reaches: Mapping[str, Span] | None = None
    cores: int | None = None
    attends: Mapping[str, float] | None = None
    layer_ms: Mapping[str, float] | None = None
    source: str = ""

    @cached_property
    def room(self) -> int:
        """Bytes that a runtime may take of one card."""
        memory = psutil.virtual_memory().total if self.memory_gb is None else self.memory_gb * 1e9
        return int(self.usable * memory)

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second that all cards read together; of this machine as measured, once."""
        if self.chip:
            chip, tier = self.chip.split()
            each = apple_chips.CHIPS[chip][apple_chips.TIERS.index(tier)]
            assert each is not None
            return each * 1e9
        one = bandwidth() if self.gb_per_s is None else self.gb_per_s * 1e9
        return one * self.cards * self.scaling

    def besides_s(self, products: float, layers: int, form: str) -> float:
        """Seconds that a step takes besides reading: products of attention on all cores, and layers; 0 where nothing is known of them."""
        rate, each = (self.attends or {}).get(form), (self.layer_ms or {}).get(form, 0.0)
        return layers * each / 1e3 + (products / (rate * 1e9 * (self.cores or cores())) if rate else 0.0)

    def fraction(self, form: str) -> tuple[Span, str]:
        """The span of the bandwidth that decoding reaches with files of a format, and where that comes from."""
        if self.reaches is None:
            return (
                apple_chips.CORE_ML,
                apple_chips.TUNED,
            ), "published figures: tapeout/targets/apple_chips.py"
        return self.reaches.get(form, self.reaches[""]), self.source


def table(own: Path | None = None) -> dict[str, Device]:
    """Every device by name.

    Args:
        own: a user's file; its devices are added, and its fields of known ones take the place of ours.

    Raises:
        RecipeError: the file cannot be read, a key is unknown (the nearest is named) or a value is of the wrong kind.
    """
    ours = files("tapeout") / "data" / "devices.toml"
    rows: dict[str, dict[str, Any]] = tomllib.loads(ours.read_text(encoding="utf-8"))
    for name, row in (_read(own) if own else {}).items():
        rows[name] = rows.get(name, {}) | row
    return {name: _device(name, row, own or Path("devices.toml")) for name, row in rows.items()}


def chosen(devices: Mapping[str, Device], names: list[str] | None) -> list[Device]:
    """Those of ``names``; None: all; RecipeError names the nearest of an unknown one."""
    for name in names or ():
        if name not in devices:
            raise RecipeError(f"'{name}' is not a device{nearest(name, devices)}.")
    return [devices[name] for name in names or devices]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"the device table {path} cannot be read: {error}.") from error
    for name, row in rows.items():
        if not isinstance(row, dict):
            raise RecipeError(f"{path}: '{name}' stands outside of a device; write it below a [NAME].")
    return rows


def _device(name: str, row: Mapping[str, Any], path: Path) -> Device:
    known = [field.name for field in fields(Device) if field.name != "name"]
    for key in row:
        if key not in known:
            raise RecipeError(f"{path}: [{name}] has the key '{key}'{nearest(key, known)}.")
    if not row.get("targets"):
        raise RecipeError(f'{path}: [{name}] says no targets, such as ["cpu"].')
    given = dict(row, targets=tuple(row["targets"]))
    if "reaches" in row:
        said = row["reaches"]
        spans = said if isinstance(said, dict) else {"": said}
        given["reaches"] = {form: _span(name, value, path) for form, value in spans.items()}
        if "" not in given["reaches"]:
            given["reaches"][""] = next(iter(given["reaches"].values()))
    for key in ("attends", "layer_ms"):
        rates = row.get(key, {})
        if not isinstance(rates, dict) or any(
            not isinstance(x, int | float) or x <= 0 for x in rates.values()
        ):
            raise RecipeError(
                f"{path}: [{name}] has {key} = {rates!r}; what fits: a number above 0 by format, such as {{gguf = 1.1}}."
            )
    if chip := row.get("chip"):
        chips = [
            f"{c} {t}"
            for c, row_ in apple_chips.CHIPS.items()
            for t, b in zip(apple_chips.TIERS, row_, strict=True)
            if b
        ]
        if chip not in chips:
            raise RecipeError(f"{path}: [{name}] has the chip '{chip}'{nearest(str(chip), chips)}.")
    elif "reaches" not in row:
        raise RecipeError(
            f"{path}: [{name}] says no reaches, the fraction of its bandwidth that decoding reaches, such as 0.6."
        )
    for key in ("memory_gb", "usable", "gb_per_s", "scaling", "cards", "cores"):
        value = row.get(key, 1)
        if (
            isinstance(value, bool)
            or not isinstance(value, int if key in ("cards", "cores") else int | float)
            or value <= 0
        ):
            raise RecipeError(f"{path}: [{name}] has {key} = {value!r}; what fits: a number above 0.")
    return Device(name=name, **given)


def _span(name: str, value: Any, path: Path) -> Span:
    ends = value if isinstance(value, list) else [value, value]
    if len(ends) == 2 and all(isinstance(end, int | float) for end in ends) and 0 < ends[0] <= ends[1] <= 1:
        return float(ends[0]), float(ends[1])
    raise RecipeError(
        f"{path}: [{name}] reaches {value!r}; what fits: a fraction, or two from the least to the most."
    )
