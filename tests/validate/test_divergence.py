"""When a value parts, on sessions that say what they are told to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tapeout.errors import TapeoutError
from tapeout.exporters import Artifact, gguf
from tapeout.quantize import SCHEMES
from tapeout.validate.divergence import added_rounding, against_graph, between
from tapeout.validate.session import Shown

Values = Mapping[str, npt.NDArray[np.float64]]
TOKENS = [1, 2, 3]
BASE = np.random.default_rng(0).standard_normal((3, 64))


def off(by: float) -> npt.NDArray[np.float64]:
    """The base, off by that much of its size."""
    other = np.random.default_rng(1).standard_normal(BASE.shape)
    return BASE + by * other * np.sqrt((BASE**2).sum() / (other**2).sum())


class Session:
    """Writes the values that it was made with; as a graph others when it is given a trace, or asked for float32."""

    def __init__(
        self,
        values: Values,
        forced: Values | None = None,
        single: Values | None = None,
        roundings: Mapping[str, float] | None = None,
        reads: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.values, self.forced, self.single = values, forced or values, single or forced or values
        self.roundings, self.reads, self.asked = roundings or {}, reads or {}, []  # type: ignore[var-annotated]

    def trace(
        self, ids: Sequence[int], out: str, given: str | None = None, double: bool = True
    ) -> dict[str, Shown]:
        self.asked.append((given is not None, double))
        values = self.values if given is None else self.forced if double else self.single
        for name, value in values.items():
            np.save(Path(out) / f"{name}.npy", value.astype(np.float32))
        return {name: Shown("op", self.roundings.get(name, 0.0), self.reads.get(name, ())) for name in values}


def walk(device: Any, graph: Any, tmp_path: Path, **more: Any) -> Any:
    return against_graph(device, graph, TOKENS, tmp_path, **more)


def test_a_primitive_is_judged_by_what_it_does_alone(tmp_path: Path) -> None:
    """The first is off; what follows from it is far from the graph's own run and right on the device's inputs."""
    graph = Session({"a": BASE, "b": BASE, "c": BASE}, forced={"a": BASE, "b": off(0.5), "c": off(0.2)})
    found = walk(Session({"a": off(1e-3), "b": off(0.5), "c": off(0.25)}), graph, tmp_path)
    assert found.first.name == "a"
    assert found.first.own == pytest.approx(1e-3, rel=1e-3)
    own = {value.name: (value.grown, value.own, value.parts) for value in found.values}
    assert own["b"] == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-7), False)
    assert own["c"][2]
    assert found.also == ("c",)


def test_the_limit_is_float32_and_the_angles_of_the_tokens(tmp_path: Path) -> None:
    limit = 1e-4 + 3 * 2**-24
    for by, parts in ((0.99 * limit, False), (1.01 * limit, True)):
        place = tmp_path / f"{parts}"
        found = walk(Session({"a": off(by)}), Session({"a": BASE}), place)
        assert (found.first is not None) == parts
    assert found.values[0].limit == pytest.approx(limit)


def test_what_amplifies_its_own_rounding_may_be_four_times_as_far_off(tmp_path: Path) -> None:
    for by, parts in ((3.9e-3, False), (4.1e-3, True)):
        graph = Session({"a": BASE}, single={"a": off(1e-3)})
        found = walk(Session({"a": off(by)}), graph, tmp_path / f"{parts}")
        assert (found.first is not None) == parts
        assert graph.asked == [(False, True), (True, True), (True, False)]


def test_a_type_that_the_runtime_or_the_format_rounds_to(tmp_path: Path) -> None:
    for name, more, roundings in (("runtime", {}, {"a": 1e-3}), ("format", {"added": 1e-3}, {})):
        for by, parts in ((3.9e-3, False), (4.1e-3, True)):
            device = Session({"a": off(by)}, roundings=roundings)
            found = walk(device, Session({"a": BASE}), tmp_path / f"{name}-{parts}", **more)
            assert (found.first is not None) == parts


def test_what_is_hidden_may_be_at_fault(tmp_path: Path) -> None:
    """Of what a value was made from: what is not shown, and what nothing that agrees was made from."""
    reads = {"context": ("q", "k", "v", "rope"), "rope": ("k",), "q": ("norm",), "k": ("norm",)}
    values = dict.fromkeys(("norm", "q", "k", "v", "rope", "context"), BASE)
    device = Session({"norm": BASE, "v": BASE, "rope": BASE, "context": off(0.1)})
    found = walk(device, Session(values, reads=reads), tmp_path)
    assert found.first.name == "context"
    assert found.hidden == ("q",)
    assert "It was made from q, not shown by the runtime: that may be at fault." in found.words()
    assert "rope before it agrees" in found.words()


def test_numbers_where_there_should_be_none(tmp_path: Path) -> None:
    masked = np.where(np.arange(64) < 32, BASE, np.nan)
    sound = walk(Session({"a": masked}), Session({"a": masked}), tmp_path / "sound")
    assert sound.first is None
    for name, one, other in (("more", BASE, masked), ("fewer", masked, BASE)):
        found = walk(Session({"a": one}), Session({"a": other}), tmp_path / name)
        assert found.first.name == "a"
        assert "has numbers where the other has none: another mask, or NaN" in found.words()
        document = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert document["values"][0] | {"limit": 0} == {
            "name": "a", "op": "op", "grown": None, "own": None, "limit": 0, "parts": True
        }  # fmt: skip


def test_what_transformers_says_of_the_graph(tmp_path: Path) -> None:
    found = walk(Session({"a": BASE}), Session({"a": BASE}), tmp_path, expected=off(2e-6).astype(np.float32))
    assert found.oracle == pytest.approx(2e-6, rel=0.1)
    assert found.words().endswith("(The graph itself is transformers' to 2e-06.)")


def test_two_devices_part_where_the_difference_jumps(tmp_path: Path) -> None:
    def two(*sizes: float) -> Any:
        one = Session({f"v{i}": BASE for i in range(len(sizes))})
        other = Session({f"v{i}": off(size) for i, size in enumerate(sizes)})
        return between(one, other, TOKENS, tmp_path / str(sizes))  # type: ignore[arg-type]

    assert two(1e-7, 9e-7, 8e-6, 7e-5).first is None  # below what float types explain
    assert two(1e-5, 9e-5, 8e-4, 7e-3, 6e-2).first is None  # a network that amplifies: never tenfold at once
    assert two(1e-6, 2e-6, 5e-2, 4e-1).first.name == "v2"
    assert two(0.3, 0.2).first.name == "v0"


def test_models_that_have_nothing_in_common(tmp_path: Path) -> None:
    for name, values, told in (
        ("names", {"b": BASE}, "have no value in common"),
        ("shapes", {"a": BASE[:, :32]}, r"a is \[3, 64\] in one and \[3, 32\] in the other: they are different models"),
        ("depths", {"a": BASE, "layers.0.out": BASE}, "one has 0 layers and the other 1"),
    ):  # fmt: skip
        with pytest.raises(TapeoutError, match=told):
            walk(Session(values), Session({"a": BASE}), tmp_path / name)


def test_what_a_format_adds() -> None:
    def added(scheme: str, container: str) -> float:
        artifact = Artifact("gguf", Path(), (), 1, 1, {"w": container})
        return added_rounding(artifact, {"w": SCHEMES[scheme]}, gguf.carries)

    assert added("int4-g32", "Q4_0") == 0
    assert added("none", "F16") == 0  # the checkpoint's own
    assert added("int4-g32", "F16") == 2**-11
    assert 4e-3 < added("nf4", "Q8_0") < 6e-3
