"""Mixed precision by budget: the choice is the best there is, the prediction what the reference shows, the recipe an ordinary one."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tapeout import budget, targets
from tapeout.budget import Floats, allocate, plan
from tapeout.commands import make
from tapeout.commands.terminal import Codes
from tapeout.errors import MissingToolchain, RecipeError, RuntimeCrash
from tapeout.models import Model, load
from tapeout.quantize import SCHEMES, Calibration, assign, quantize
from tapeout.recipe import Recipe
from tapeout.validate import Limits, reference, sensitivity
from tapeout.validate.metrics import Distance
from tapeout.validate.sensitivity import Cost

MakeModel = Callable[..., Path]

TEXT = (
    "A budget is a number, and a mix is what it buys: each tensor takes the scheme that its share pays for. "
    * 12
)
# Of wide matrices, as 2**(-2 bits), and a little better for the bits of its scales.
ERROR = {name: 0.25 ** (s.bits + 0.01 * s.bits_per_weight(256)) for name, s in SCHEMES.items() if s.bits}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def model(make_model: MakeModel) -> Model:
    return load(make_model(hidden_size=256, intermediate_size=512, tie_word_embeddings=True))


@pytest.fixture
def costs(model: Model, monkeypatch: pytest.MonkeyPatch) -> dict[str, Cost]:
    """Costs that are given, not measured: every tensor another sensitivity, over four powers of ten."""
    random = np.random.default_rng(1)
    found = {}
    for name, spec in model.specs.items():
        if spec.role.is_matrix:
            kl = float(10 ** random.uniform(-3, 1))
            found[name] = Cost(
                {"int4-g32": kl * ERROR["int4-g32"], "int3-g64": kl * ERROR["int3-g64"]}, ERROR
            )
    monkeypatch.setattr(budget, "measure", lambda *_: found)
    return found


def brute_force(cost: Sequence[Floats], weight: Sequence[Floats], limit: float) -> float | None:
    every = itertools.product(*(range(len(c)) for c in cost))
    fits = [
        sum(c[i] for c, i in zip(cost, choice, strict=True))
        for choice in every
        if sum(w[i] for w, i in zip(weight, choice, strict=True)) <= limit
    ]
    return float(min(fits)) if fits else None


numbers = st.integers(0, 40).map(float) | st.floats(0, 40).map(lambda x: round(x, 3))
items = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5)
instances = st.lists(items, min_size=1, max_size=5)


def arrays(instance: list[list[tuple[float, float]]]) -> tuple[list[Floats], list[Floats]]:
    return [np.array([c for c, _ in item]) for item in instance], [
        np.array([w for _, w in item]) for item in instance
    ]


@settings(deadline=None, max_examples=300)
@given(instances, st.floats(0, 1))
def test_no_choice_is_better(instance: list[list[tuple[float, float]]], share: float) -> None:
    cost, weight = arrays(instance)
    # Up to a little above the largest; a limit that a sum meets by less than its rounding proves nothing.
    limit = share * 1.1 * sum(float(w.max()) for w in weight) + 1e-6
    best = brute_force(cost, weight, limit)
    assume(best == brute_force(cost, weight, limit * (1 + 1e-8)))
    found = allocate(cost, weight, limit)
    if best is None:
        assert found is None
        return
    assert found is not None
    chosen, gap = found
    assert gap == 0
    assert sum(w[i] for w, i in zip(weight, chosen, strict=True)) <= limit * (1 + 1e-8)
    assert sum(c[i] for c, i in zip(cost, chosen, strict=True)) == pytest.approx(best, rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=200)
@given(instances, st.floats(0, 1))
def test_what_was_cut_off_is_in_the_gap(instance: list[list[tuple[float, float]]], share: float) -> None:
    cost, weight = arrays(instance)
    limit = share * sum(float(w.max()) for w in weight) + 1e-6
    best = brute_force(cost, weight, limit * (1 + 1e-8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "_STATES", 1)
        found = allocate(cost, weight, limit)
    assume(found is not None and best is not None)
    assert found is not None
    assert best is not None
    chosen, gap = found
    reached = sum(float(c[i]) for c, i in zip(cost, chosen, strict=True))
    assert reached * (1 - gap) <= best + 1e-9


def test_a_model_of_many_tensors_is_solved_exactly() -> None:
    random = np.random.default_rng(0)
    bits = np.array([2.625, 3.4375, 4.5, 5.5, 6.5625, 8.5, 16])
    sizes = np.tile([16.0, 4, 4, 16, 56, 56, 56], 32) / 6656
    cost = [random.lognormal() * 4.0**-bits * random.lognormal(0, 0.2, 7) for _ in sizes]
    found = allocate(cost, [bits * size for size in sizes], 4.5)
    assert found is not None
    assert found[1] == 0


def test_a_cost_is_what_was_measured_and_grows_as_the_squared_error_below() -> None:
    cost = Cost(
        {"int4-g32": 0.01, "int3-g64": 0.06},
        {"int8": 1e-4, "int4-g32": 0.01, "int3-g64": 0.04, "int2-g64": 0.16},
    )
    assert cost.predict("int4-g32") == 0.01
    assert cost.predict("int3-g64") == pytest.approx(0.06)
    assert cost.predict("int8") == pytest.approx(1e-4)
    # Above by the power that the two show: six times for four times the error.
    assert cost.predict("int2-g64") == pytest.approx(0.36)
    assert Cost({"int8": 0.5}, {"int8": 0.1, "fp8": 0.2}).predict("fp8") == 1.0
    assert Cost({"int8": 0.0}, {"int8": 0.0, "fp8": 0.0}).predict("fp8") == 0.0


def test_a_target_chooses_among_what_it_holds_exactly_at_the_bits_of_its_file(
    model: Model, costs: dict[str, Cost]
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    held = {o.scheme: o.bits for o in budget.choices(model, name, costs[name], targets.get("cpu")())}
    # The checkpoint is bfloat16; Q8_0 keeps a scale for every 32 weights, whether the scheme has that many or not.
    assert held["none"] == 16
    assert held["int8-g32"] == 8.5
    assert "nf4" not in held
    # Held as Q4_0, at 4.5 bits, where int4-g32 loses less.
    assert not {"int3-g64", "int2-g64", "int4-g128", "int8"} & held.keys()
    own = budget.choices(model, name, costs[name], None)
    assert {o.scheme: o.bits for o in own}["int2-g64"] == 2.25
    for options in (own, budget.choices(model, name, costs[name], targets.get("cpu")())):
        assert [o.bits for o in options] == sorted({o.bits for o in options})
        assert [o.kl for o in options] == sorted({o.kl for o in options}, reverse=True)
        assert not any(SCHEMES[o.scheme].activations for o in options)


@pytest.mark.parametrize("bits", [2.7, 3.5, 4.5, 6.0, 11.0])
@pytest.mark.parametrize("target", ["cpu", "null"])
def test_the_recipe_is_an_ordinary_one(
    model: Model, costs: dict[str, Cost], tmp_path: Path, target: str, bits: float
) -> None:
    found = plan(model, targets.get(target)(), Recipe(rounding="gptq", tokens=77), bits=bits)
    assert found.mix.gap == 0
    assert bits - 0.5 < found.mix.bits <= bits + 1e-6
    path = tmp_path / "recipe.toml"
    path.write_text(found.toml(), encoding="utf-8")
    read = Recipe.read(path)
    assert read == found.recipe
    assert (read.rounding, read.tokens) == ("gptq", 77)
    assert read.scheme is not None
    given = assign(model, SCHEMES[read.scheme], read.tensors)
    assert {name: given[name].name for name in costs} == found.mix.schemes
    assert all(given[name].kind == "none" for name in given.keys() - costs.keys())
    assert path.read_text().startswith(f"# tiny: {bits:g} bits a weight")
    weights = {name: math.prod(model.specs[name].shape) for name in costs}
    held = {
        name: {o.scheme: o.bits for o in budget.choices(model, name, cost, targets.get(target)())}
        for name, cost in costs.items()
    }
    mean = sum(held[n][s] * weights[n] for n, s in found.mix.schemes.items()) / sum(weights.values())
    assert mean == pytest.approx(found.mix.bits)
    assert found.mix.kl == pytest.approx(
        sum(costs[n].predict(s) for n, s in found.mix.schemes.items() if s != "none")
    )


def test_layers_that_agree_are_one_line(model: Model) -> None:
    schemes = {name: "q4_k" for name, spec in model.specs.items() if spec.role.is_matrix}
    for layer in (0, 1):
        schemes[f"model.layers.{layer}.mlp.down_proj.weight"] = "q6_k"
    schemes["model.layers.1.self_attn.v_proj.weight"] = "q5_k"
    recipe = budget.as_recipe(model, budget.Mix(schemes, 4.6, 0.02), Recipe())
    assert recipe.scheme == "q4_k"
    assert recipe.tensors == {
        "*.mlp.down_proj": "q6_k",
        "model.embed_tokens": "q4_k",  # which would take int8
        "model.layers.1.self_attn.v_proj": "q5_k",
    }


def test_a_larger_budget_loses_less(model: Model, costs: dict[str, Cost]) -> None:
    found = plan(model, targets.get("cpu")(), bits=4.5)
    assert [m.bits for m in found.curve] == sorted({m.bits for m in found.curve})
    assert [m.kl for m in found.curve] == sorted({m.kl for m in found.curve}, reverse=True)
    # The other way round: as few bits as the KL of a mix takes no more than that mix.
    back = plan(model, targets.get("cpu")(), max_kl=found.mix.kl)
    assert back.mix.kl <= found.mix.kl * (1 + 1e-6)
    assert back.mix.bits <= found.mix.bits + 1e-6
    # Above the largest everything stays as it is.
    most = plan(model, targets.get("cpu")(), bits=99)
    assert set(most.mix.schemes.values()) == {"none"}
    assert (most.mix.bits, most.mix.kl, most.recipe.scheme) == (16, 0, "none")
    assert plan(model, targets.get("cpu")(), max_kl=0).mix == most.mix


@pytest.mark.usefixtures("costs")
def test_a_budget_that_no_mix_meets_is_told_the_closest(model: Model) -> None:
    smallest = plan(model, targets.get("cpu")(), bits=99).curve[0]
    with pytest.raises(RecipeError) as raised:
        plan(model, targets.get("cpu")(), bits=2)
    assert str(raised.value) == (
        "No mix of what the target cpu carries exactly keeps tiny within 2 bits a weight: "
        f"the smallest takes 2.625, with a predicted KL of {smallest.kl:.3g} nats a token."
    )
    assert plan(model, targets.get("cpu")(), bits=2.625).mix.bits == 2.625


@pytest.mark.usefixtures("costs")
@pytest.mark.parametrize(
    ("recipe", "asked", "message"),
    [
        ({}, {}, "either --bits"),
        ({}, {"bits": 4, "max_kl": 0.1}, "either --bits"),
        ({}, {"bits": -1.0}, "-1.0 is none"),
        ({}, {"bits": math.nan}, "nan is none"),
        ({}, {"max_kl": math.inf}, "inf is none"),
        ({"scheme": "int8"}, {"bits": 4}, "leave out --scheme"),
        ({"tensors": {"lm_head": "int8"}}, {"bits": 4}, r"\[tensors\]"),
    ],
)
def test_what_is_no_budget(
    model: Model, recipe: dict[str, Any], asked: dict[str, float], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(model, None, Recipe(**recipe), **asked)


@pytest.mark.usefixtures("costs")
def test_the_gates_hold_a_mix_to_its_budget(model: Model) -> None:
    found = plan(model, None, max_kl=0.03).recipe.limits
    assert found.kl == 0.03
    # exp(0.03 + 3 sqrt(2 0.03 / 4096)), or what the scheme may do anyway; and 1 - sqrt(0.03 / 2).
    assert found.perplexity is not None
    assert found.perplexity >= 1.0423
    assert found.top1 is not None
    assert found.top1 <= 0.8775
    own = Limits(kl=9.0, top1=0.5, perplexity=8.0, task=0.1)
    assert plan(model, None, Recipe(limits=own), bits=3).recipe.limits == own
    loose = plan(model, None, bits=3)
    assert loose.recipe.limits.kl is not None
    assert loose.recipe.limits.kl >= 1.5 * loose.mix.kl


class Measuring:
    """Takes the place of a session; dies at the third tensor when it shall."""

    asked: list[str] = []  # noqa: RUF012 - of all instances
    dies = False

    def __init__(self, *_: object) -> None:
        pass

    def measure(self, name: str) -> Cost:
        if self.dies and len(self.asked) == 2:
            raise RuntimeCrash("the worker was killed")
        self.asked.append(name)
        return Cost({"int8": 0.5}, {"int8": float(len(self.asked))})

    def close(self) -> None:
        pass


def test_each_tensor_is_measured_once(model: Model, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SensitivitySession", Measuring)
    monkeypatch.setattr(Measuring, "asked", asked := [])
    monkeypatch.setattr(Measuring, "dies", True)
    names = [name for name, spec in model.specs.items() if spec.role.is_matrix]
    with pytest.raises(RuntimeCrash):
        budget.measure(model, Calibration(text))
    monkeypatch.setattr(Measuring, "dies", False)
    told: list[tuple[str, int, int]] = []
    found = budget.measure(model, Calibration(text), lambda *progress: told.append(progress))
    # It went on where it had died, and what it knew is as it was.
    assert asked == names == list(found)
    assert told[-1] == ("sensitivity", len(names), len(names))
    assert [cost.error["int8"] for cost in found.values()] == [i + 1.0 for i in range(len(names))]
    assert budget.measure(model, Calibration(text)) == found
    assert len(asked) == len(names)
    (path,) = (budget.cache_directory() / "sensitivity").iterdir()
    assert json.loads(path.read_text())["format_version"] == budget.FORMAT_VERSION
    text.write_text(TEXT[::-1])
    budget.measure(model, Calibration(text))
    assert len(asked) == 2 * len(names)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_measured_is_what_the_reference_shows(make_model: MakeModel, tied: bool) -> None:
    pytest.importorskip("transformers")
    directory = make_model(tie_word_embeddings=tied, dtype="F32")
    windows = [list(range(40)), list(range(100, 60, -1))]
    session = sensitivity.open_session(str(directory), windows, threads=1)
    original = reference.open_session(str(directory), threads=1)
    for name in ("model.layers.1.mlp.down_proj", "model.embed_tokens"):
        cost = session.measure(f"{name}.weight")
        assert set(cost["kl"]) == {"int4-g32", "int3-g64"}
        assert cost["error"]["int8"] < cost["error"]["int4-g32"] < cost["error"]["int3-g64"] < 0.2
        # 64 and 128 wide: no super-blocks, but groups of 128 where they fit.
        assert "q4_k" not in cost["error"]
        assert ("int4-g128" in cost["error"]) == ("down_proj" in name)
        assert "w8a8" not in cost["error"]
        for scheme, kl in cost["kl"].items():
            quant = quantize(load(directory), "none", overrides={name: scheme})
            rounded = reference.open_session(str(directory), str(quant.directory), threads=1)
            distance = Distance()
            for ids in windows:
                original.reset()
                rounded.reset()
                distance.add(original.prefill(ids), rounded.prefill(ids))
            # Sums in another order.
            assert kl == pytest.approx(distance.kl, rel=1e-4)
            weight = load(directory).checkpoint[f"{name}.weight"].float32()
            lost = np.square(quant.float32(f"{name}.weight") - weight).sum() / np.square(weight).sum()
            assert cost["error"][scheme] == pytest.approx(lost, rel=1e-4)
    session.close()


@pytest.mark.slow
def test_a_budget_from_the_command_line(
    make_model: MakeModel, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    directory, out = make_model(num_hidden_layers=1), tmp_path / "made" / "recipe.toml"
    arguments: dict[str, Any] = {"calibration": text, "bits": 5.0}
    assert make.budget("null", str(directory), **arguments, rounding="gptq", out=out, json=True) == 0
    said = json.loads(capsys.readouterr().out)
    recipe = Recipe.read(out)
    assert (recipe.rounding, recipe.calibration) == ("gptq", Calibration(text))
    assert said["bits"] <= 5
    assert len(said["curve"]) > 10
    # The prediction holds: on the same windows, all tensors rounded together.
    model = load(directory)
    quant = quantize(model, recipe.scheme, overrides=recipe.tensors)
    assert {n: s.name for n, s in quant.schemes.items() if n in said["schemes"]} == said["schemes"]
    session = reference.open_session(str(directory), threads=1)
    rounded = reference.open_session(str(directory), str(quant.directory), threads=1)
    distance = Distance()
    for ids in Calibration(text, sequences=4).tokens(model).tolist():
        session.reset()
        rounded.reset()
        distance.add(session.prefill(ids), rounded.prefill(ids))
    # Errors of a few small random matrices partly cancel or add up: 2 is far from any mistake.
    assert said["kl"] / 2 < distance.kl < said["kl"] * 2
    # The same inline, and with what it must not be given.
    assert make.quantize(str(directory), codes=Codes(**arguments), out=tmp_path / "codes") == 0
    assert json.loads((tmp_path / "codes" / "quantization.json").read_text())["scheme"] != "int8"
    with pytest.raises(RecipeError, match="leave out --scheme"):
        make.quantize(str(directory), codes=Codes(**arguments, scheme="nf4"), out=tmp_path / "other")


@pytest.mark.usefixtures("costs")
def test_the_curve_is_drawn(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = plan(model, targets.get("cpu")(), bits=4.5)
    for name in ("one.svg", "two.svg", "curve.png"):
        budget.plot(found, tmp_path / name)
    drawn = (tmp_path / "one.svg").read_bytes()
    assert drawn == (tmp_path / "two.svg").read_bytes()
    assert drawn.startswith(b"<?xml")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RecipeError, match=r"curve\.doc is no plot .*svg"):
        budget.plot(found, tmp_path / "curve.doc")


@pytest.mark.usefixtures("costs")
def test_a_plot_says_what_it_needs(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(model, None, bits=4.5)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingToolchain, match=r"tapeout\[report\]"):
        budget.plot(found, tmp_path / "curve.svg")


def test_a_recipe_is_written_as_it_is_read(tmp_path: Path) -> None:
    recipe = Recipe(
        scheme="q4_k",
        tensors={"*.down_proj": "int8", 'odd "name"\\': "none", "lm_head": "q6_k"},
        calibration=Calibration(Path("über/own.txt"), 3, 17, 5),
        limits=Limits(kl=1e-05, top1=0.25),
        text=Path("a\x7fb.txt"),
        tokens=9,
    )
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.toml(), encoding="utf-8")
    assert Recipe.read(path) == recipe
    assert Recipe().toml() == "\n"
