"""What a machine tells of itself, read from files of a machine that is made up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from tapeout.validate import machine_state
from tapeout.validate.machine_state import Energy, State, energy_missing, memory_at_hand, noise

GB = 10**9
RAPL = "sys/class/powercap/intel-rapl:0"
CPU = "sys/devices/system/cpu/cpu0"


def write(root: Path, files: Mapping[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def stat(busy: int, idle: int, stolen: int) -> str:
    return f"cpu  {busy} 0 0 {idle} 0 0 0 {stolen} 0 0\ncpu0 1 2 3"


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    assert State.read(tmp_path) == State()
    assert noise(State(), State(), 1.0, 0.0) == []
    assert "has no intel-rapl: a virtual machine" in (energy_missing(tmp_path) or "")
    assert memory_at_hand(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_energy_is_what_the_packages_counted(tmp_path: Path) -> None:
    most = 1000
    zones = {f"{RAPL}/energy_uj": 900, f"{RAPL}/max_energy_range_uj": most, f"{RAPL}/name": "package-0"}
    # A part of the package, which is counted in it already.
    part = {
        "sys/class/powercap/intel-rapl:0:0/energy_uj": 7,
        "sys/class/powercap/intel-rapl:0:0/max_energy_range_uj": most,
    }
    second = {
        "sys/class/powercap/intel-rapl:1/energy_uj": 10,
        "sys/class/powercap/intel-rapl:1/max_energy_range_uj": most,
    }
    write(tmp_path, {**zones, **part, **second})
    assert energy_missing(tmp_path) is None
    energy = Energy(State.read(tmp_path))
    write(tmp_path, {f"{RAPL}/energy_uj": 100, "sys/class/powercap/intel-rapl:1/energy_uj": 60})
    energy.add(State.read(tmp_path))  # 200, over the counter's end, and 50
    write(tmp_path, {f"{RAPL}/energy_uj": 400})
    energy.add(State.read(tmp_path))
    assert energy.joules == pytest.approx((200 + 50 + 300) * 1e-6)


def test_energy_that_only_root_may_read(tmp_path: Path) -> None:
    (tmp_path / RAPL / "energy_uj").mkdir(parents=True)  # cannot be read, whoever asks
    assert "energy_uj cannot be read: Linux lets only root" in (energy_missing(tmp_path) or "")


def test_what_others_took_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_state, "_ticks_a_second", lambda: 100)
    before = State.read(write(tmp_path, {"proc/stat": stat(1000, 1000, 0)}))
    # Of 1000 ticks 300 were idle and 100 stolen; of the 600 busy ones 400 were our own 4 seconds.
    after = State.read(write(tmp_path, {"proc/stat": stat(1600, 1300, 100)}))
    told = noise(before, after, 4.0, 0.05)
    assert told == [
        "other virtual machines took 10.0% of the processor's time",
        "other processes took 20.0% of the processor's time",
    ]
    assert noise(before, after, 4.0, 0.15) == [told[1]]
    assert noise(before, after, 4.0, 0.25) == []  # nobody could see it in the figures


def test_heat_and_clock_are_told(tmp_path: Path) -> None:
    files = {f"{CPU}/cpufreq/scaling_cur_freq": 3_000_000, f"{CPU}/thermal_throttle/core_throttle_count": 5}
    files["sys/class/thermal/thermal_zone0/temp"] = 61_500
    before = State.read(write(tmp_path, files))
    assert before.mhz == (3000.0,)
    assert before.celsius == {"thermal_zone0": 61.5}
    files |= {f"{CPU}/cpufreq/scaling_cur_freq": 2_000_000, f"{CPU}/thermal_throttle/core_throttle_count": 8}
    after = State.read(write(tmp_path, files))
    assert noise(before, after, 0.0, 0.0) == [
        "the processor was slowed for heat 3 times",
        "the clock went from 3000 to 2000 MHz",
    ]
    assert noise(before, before, 0.0, 0.0) == []


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_allows_less_than_the_machine_has(tmp_path: Path, version: int) -> None:
    at = "sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory"
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit, used, cached = names
    line = "0::/jobs/mine" if version == 2 else "4:memory:/jobs/mine"
    write(
        tmp_path,
        {
            "proc/self/cgroup": f"9:name=systemd:/\n{line}",
            f"{at}/jobs/mine/{limit}": "max",
            f"{at}/jobs/mine/{used}": 123,
            f"{at}/jobs/mine/memory.stat": "anon 5",
            # The group around it: 100 MB of the 400 MB that it has taken are pages of files.
            f"{at}/jobs/{limit}": 500 * 10**6,
            f"{at}/jobs/{used}": 400 * 10**6,
            f"{at}/jobs/memory.stat": f"anon 300000000\n{cached} 100000000",
        },
    )
    assert memory_at_hand(tmp_path) == 200 * 10**6
    write(tmp_path, {f"{at}/jobs/{used}": 900 * 10**6})
    assert memory_at_hand(tmp_path) == 0
