"""What a machine tells of itself while it is measured: memory at hand, energy, clock, heat, and time that others took.

Every reader takes ``root``, the directory that stands for ``/``: Linux tells these things in files. What is not told is None.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

__all__ = ["Energy", "State", "energy_missing", "memory_at_hand", "noise"]

_ROOT = Path("/")
_CPUS = "sys/devices/system/cpu"
_POWERCAP = "sys/class/powercap"
_PACKAGE = re.compile(
    r"intel-rapl:\d+"
)  # of a whole package; intel-rapl:0:0 is a part of one. AMD's are called so too


def memory_at_hand(root: Path = _ROOT) -> int:
    """Bytes that this process can still take: what is free or can be freed, and what its control groups allow."""
    room = [int(psutil.virtual_memory().available)]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2
                room += _allowed(
                    root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file"
                )
            elif "memory" in controllers.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                room += _allowed(root / "sys/fs/cgroup/memory", path, *names)
    return max(0, min(room))


def _allowed(mounted: Path, path: str, limit: str, used: str, cached: str) -> list[int]:
    """What each group from the process's own to the outermost leaves; pages of files that can be dropped are not used."""
    found, group = [], mounted / path.strip("/")
    for at in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            stat = dict(
                line.split() for line in (at / "memory.stat").read_text(encoding="utf-8").splitlines()
            )
            left = int((at / limit).read_text()) - int((at / used).read_text()) + int(stat.get(cached, 0))
            found.append(left)
        if at == mounted:
            break
    return found


@dataclass(frozen=True)
class State:
    """The counters of one moment.

    Attributes:
        ticks: of all cores together, since the start: total, idle, stolen by other virtual machines; empty: not told.
        mhz: clock of each core. celsius: of each thermal zone, by its name.
        throttled: how often cores were slowed for heat, together; None: not told.
        joules: counter of each package, in micro-joules, with the value at which it starts anew.
    """

    ticks: tuple[int, int, int] | None = None
    mhz: tuple[float, ...] = ()
    celsius: dict[str, float] = field(default_factory=dict)
    throttled: int | None = None
    joules: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path = _ROOT) -> State:
        """What can be read now."""
        ticks: tuple[int, int, int] | None = None
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = [int(each) for each in (root / "proc/stat").read_text().splitlines()[0].split()[1:9]]
            ticks = sum(fields), fields[3] + fields[4], fields[7]
        clocks = [_number(path) for path in sorted((root / _CPUS).glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))]
        counts = [
            _number(path) for path in (root / _CPUS).glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
        ]
        told = [count for count in counts if count is not None]
        zones = {path.parent.name: _number(path) for path in (root / "sys/class/thermal").glob("*/temp")}
        joules = {}
        for zone in _packages(root):
            now, most = _number(zone / "energy_uj"), _number(zone / "max_energy_range_uj")
            if now is not None and most is not None:
                joules[zone.name] = now, most
        return cls(
            ticks,
            tuple(clock / 1e3 for clock in clocks if clock is not None),
            {name: value / 1e3 for name, value in sorted(zones.items()) if value is not None},
            sum(told) if told else None,
            joules,
        )


class Energy:
    """Joules that the processor's packages took, summed over ``add``: counters of 32 bits start anew every few minutes or hours."""

    def __init__(self, first: State) -> None:
        self._last, self.joules = first, 0.0

    def add(self, now: State) -> None:
        """Count what was taken since the last state; more than one new start in between would be lost."""
        for name, (value, most) in now.joules.items():
            if name in self._last.joules:
                taken = value - self._last.joules[name][0]
                self.joules += (taken if taken >= 0 else taken + most) / 1e6
        self._last = now


def energy_missing(root: Path = _ROOT) -> str | None:
    """Why the machine does not tell its energy; None: it does."""
    zones = _packages(root)
    if not zones:
        return f"/{_POWERCAP} has no intel-rapl: a virtual machine, or a processor or kernel without energy counters"
    if not State.read(root).joules:
        return f"/{_POWERCAP}/{zones[0].name}/energy_uj cannot be read: Linux lets only root do it"
    return None


def noise(before: State, after: State, own_s: float, wide: float) -> list[str]:
    """What else happened between two states that makes figures worse, one sentence each.

    Args:
        before, after: around the measurement.
        own_s: processor seconds that the measured process took itself.
        wide: half the interval of the median over the median. What took a smaller share of the time could not be seen in the figures.
    """
    found = []
    if before.ticks and after.ticks and (total := after.ticks[0] - before.ticks[0]) > 0:
        stolen = (after.ticks[2] - before.ticks[2]) / total
        busy = total - (after.ticks[1] - before.ticks[1]) - (after.ticks[2] - before.ticks[2])
        others = busy / total - own_s * _ticks_a_second() / total
        if stolen > wide:
            found.append(f"other virtual machines took {stolen:.1%} of the processor's time")
        if others > wide:
            found.append(f"other processes took {others:.1%} of the processor's time")
    if before.throttled is not None and after.throttled is not None and after.throttled > before.throttled:
        found.append(f"the processor was slowed for heat {after.throttled - before.throttled} times")
    if before.mhz and after.mhz:
        first, last = (sum(each) / len(each) for each in (before.mhz, after.mhz))
        if abs(last / first - 1) > max(wide, 0.01):
            found.append(f"the clock went from {first:.0f} to {last:.0f} MHz")
    return found


def _ticks_a_second() -> int:
    import os

    return os.sysconf("SC_CLK_TCK")


def _packages(root: Path) -> Sequence[Path]:
    return sorted(path for path in (root / _POWERCAP).glob("intel-rapl:*") if _PACKAGE.fullmatch(path.name))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
