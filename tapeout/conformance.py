"""What every target is held to, whoever wrote it. Import it into a test of your own:

import pytest
from tapeout.conformance import cases, check

@pytest.mark.parametrize("case", cases("mytarget"), ids=str)
def test_conformance(case, tmp_path):
    check(case, tmp_path)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tapeout import targets
from tapeout.build import export
from tapeout.exporters import Exact, Refused, Rounded
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.pack import pack
from tapeout.quantize import SCHEMES, Quantized, QuantTensor, quantize
from tapeout.recipe import Recipe
from tapeout.validate import Options, evidence_of, gates, validate

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"hidden_size": 256, "intermediate_size": 512}),
    "llama3-tied": (
        "llama",
        {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral-window": ("mistral", {"hidden_size": 256, "intermediate_size": 512, "sliding_window": 24}),
}
"""Small models by name: family, and fields of its config; every group size of the schemes divides their rows."""


@dataclass(frozen=True)
class Case:
    """A target (with a format of it, if it has several), a scheme that it carries, a small model, and a cache that is not its default."""

    target: str
    scheme: str
    model: str
    kv_cache: str | None = None

    def __str__(self) -> str:
        way = self.target.replace(" --format ", "-")
        return "-".join(filter(None, (way, self.scheme, self.model, self.kv_cache)))

    def make(self) -> targets.Target:
        """The target with its options."""
        target = targets.variants(self.target.split()[0])[self.target]
        options = targets.options(target) | ({"kv_cache": self.kv_cache} if self.kv_cache else {})
        return type(target)(**options)


def cases(target: str) -> Iterator[Case]:
    """Every scheme that the target carries on the first model, its first scheme on every model, and with every cache on two.

    Of its other formats, if it has any, one scheme for each container.
    """
    first = next(iter(MODELS))
    for way, kind in targets.variants(target).items():
        answers = {name: kind.carries(scheme) for name, scheme in SCHEMES.items()}
        held = {name: answer.container for name, answer in answers.items() if not isinstance(answer, Refused)}
        carried = list(held)
        if way != target:
            carried = list({container: name for name, container in reversed(held.items())}.values())[::-1]
        usual = "int4-g32" if "int4-g32" in carried else targets.default_scheme(kind)
        yield from (Case(way, scheme, first) for scheme in carried)
        yield from (Case(way, usual, model) for model in MODELS if model != first)
        yield from (
            Case(way, usual, model, cache)
            for cache in kind.kv_caches()
            if cache != kind.cache
            for model in (first, "mistral-window")
        )


def check(case: Case, work: Path) -> None:
    """Export a small model twice and hold the packages to the contract; AssertionError says what is broken."""
    target = case.make()
    check_declarations(target)
    family, fields = MODELS[case.model]
    model = write_model(work / case.model, family, fields, dtype="F32")
    # The model is random: what its quantization loses says nothing, so the quality gate only has to run.
    wanted: dict[str, Any] = {
        "scheme": case.scheme, "tokens": 256, "limits": {"kl": 1e3, "top1": 0.0, "perplexity": 1e3}
    }  # fmt: skip
    if SCHEMES[case.scheme].calibrated:
        wanted["calibration"] = {"sequences": 4, "length": 64}
    recipe = Recipe.of(wanted)
    quant = quantize(load(model), case.scheme, calibration=recipe.calibration, out=work / "codes")
    first = next(name for name, each in SCHEMES.items() if not isinstance(target.carries(each), Refused))
    if case.scheme == first:
        package, report = export(target, model, work / "one", recipe)
    else:  # the same without throughput
        options = Options(recipe.limits, tokens=recipe.tokens, throughput=False)
        artifact = target.export(quant, _room(work / "one"))
        report = validate(artifact, quant.model, quant, target, options)
        package = pack(artifact, report, quant, target, recipe.kept(quant))
    failed = [f"{gate.name}: {gate.reason}" for gate in report.gates if gate.status == "failed"]
    assert report.passed, f"{case}: {'; '.join(failed)}"
    ran = {gate.name.split("/")[0] for gate in report.gates if gate.status == "passed"}
    assert {"integrity", "codes", "lowering", "decode", "quality", "tokenizer"} <= ran, (
        f"{case}: only {sorted(ran)} ran"
    )
    again = target.export(quant, _room(work / "two"))
    repeated = pack(again, report, quant, target, recipe.kept(quant))
    assert package.target() == target, f"{case}: the package forgets its target's options"
    assert package.manifest["root_sha256"] == repeated.manifest["root_sha256"], f"{case}: two exports differ"
    assert package.damage() == [], f"{case}: {package.damage()}"
    _check_that_damage_shows(target, case, recipe, model, package.artifact)


_FIRST = 4 * 512  # tokens that hold the first four of any kind of sequences


def lowered(
    target: targets.Target, quant: Quantized, work: Path, sequences: list[list[int]] | None = None
) -> str:
    """Export codes, read them back, run them: what a cell of a table says.

    Args:
        quant: the codes. work: an empty directory.
        sequences: token ids that are run; None: the first four of what validation would take.

    Returns:
        The largest logit difference from the reference before the runtime rounds, and what its rounding costs as a share of its
        limit; or in bold what failed.

    Raises:
        TapeoutError: the target refuses the model.
    """
    for name in ("artifact", "scratch"):
        (work / name).mkdir()
    artifact = target.export(quant, work / "artifact")
    evidence = evidence_of(quant.model)(artifact, quant.model, quant, target, work / "scratch")
    evidence.probed_too, evidence.tokens = False, _FIRST
    evidence.sequences = evidence.sequences[:4] if sequences is None else sequences
    try:
        found = [*gates.codes(evidence), *gates.lowering(evidence)]
    finally:
        evidence.close()
    if bad := [gate for gate in found if gate.status != "passed"]:
        return "; ".join(f"**{gate.name} {gate.status}**: {gate.reason}" for gate in bad)
    named = {gate.name: gate for gate in found}
    weights, runtime = named["lowering/weights"], named["lowering/runtime"]
    assert weights.value is not None
    assert runtime.value is not None
    assert runtime.limit
    return f"{weights.value:.1e}, {runtime.value / runtime.limit:.0%}"


def _room(package: Path) -> Path:
    (package / "artifact").mkdir(parents=True)
    return package / "artifact"


def check_declarations(kind: targets.Target) -> None:
    """Every scheme is answered for, a refusal names what fits, and what is missing comes with a command."""
    for scheme in SCHEMES.values():
        carry = kind.carries(scheme)
        assert isinstance(carry, Exact | Rounded | Refused), f"{kind.name} does not answer for {scheme}"
        if isinstance(carry, Refused):
            assert carry.reason, f"{kind.name} refuses {scheme} without a reason"
            assert not isinstance(kind.carries(SCHEMES[carry.nearest]), Refused), (
                f"{kind.name}: {carry.nearest} fits no better"
            )
    assert kind.cache in kind.kv_caches(), f"{kind.name} does not name its own cache"
    missing = kind.missing()
    assert missing is None or "install" in missing, f"{kind.name}: '{missing}' does not say how to install it"
    assert kind.summary.endswith("."), f"{kind.name}: the summary is a sentence"
    assert kind.needs, f"{kind.name} does not say what its device must have"


def _check_that_damage_shows(
    target: targets.Target, case: Case, recipe: Recipe, model: Path, artifact: Any
) -> None:
    """A store of other weights must not be found in the artifact: ``read_codes`` reads the file, not the store."""
    other = write_model(
        model.with_name("other"), MODELS[case.model][0], MODELS[case.model][1], dtype="F32", seed=1
    )
    impostor = replace(quantize(load(other), case.scheme, calibration=recipe.calibration), model=load(model))
    equal = []
    for name, found in target.read_codes(artifact, impostor):
        expected = impostor[name]
        if isinstance(expected, QuantTensor) and isinstance(found, QuantTensor):
            equal.append(np.array_equal(found.packed, expected.packed))
    assert not any(equal), f"{case}: read_codes gives the store's codes, whatever the file holds"
