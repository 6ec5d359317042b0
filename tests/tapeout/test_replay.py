"""What can be done with a package: its gates again, and generation."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.bench import bench
from tapeout.build import export, target
from tapeout.errors import (
    MissingToolchain,
    ModelError,
    PackageError,
    RecipeError,
    RuntimeCrash,
    TapeoutError,
)
from tapeout.exporters import Artifact
from tapeout.files import file_sha256
from tapeout.generated import write_model
from tapeout.models import Model
from tapeout.pack import Package
from tapeout.quantize import Calibration, Quantized
from tapeout.recipe import Recipe
from tapeout.replay import generate, revalidate
from tapeout.validate import Limits, Options, Report
from tapeout.validate.session import Device, Facts, Logits, SessionSpec
from tapeout.validate.worker import open_session

pytest.importorskip("transformers")

TEMPLATE = "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
LOOSE = Recipe.of({"tokens": 40, "limits": {"kl": 1e3, "top1": 0.0, "perplexity": 1e3}})


@pytest.fixture(autouse=True)
def _no_workers(monkeypatch: pytest.MonkeyPatch, here: Any) -> None:
    monkeypatch.setattr("tapeout.validate.worker.borrow", here)
    monkeypatch.setattr("tapeout.validate.evidence.borrow", here)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, here: Any) -> Path:
    """``plain`` and ``chatty``: two small models; ``plain-package`` and ``chatty-package``: what became of them."""
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPEOUT_CACHE", str(work / "cache"))
        patch.setattr("tapeout.validate.worker.borrow", here)
        patch.setattr("tapeout.validate.evidence.borrow", here)
        for name, fields in (("plain", {"eos_token_id": None}), ("chatty", {})):
            model = write_model(work / name, "llama", fields, dtype="F32")
            if name == "chatty":
                path = model / "tokenizer_config.json"
                more = {"chat_template": TEMPLATE, "bos_token": {"__type": "AddedToken", "content": "<eos>"}}
                path.write_text(json.dumps(json.loads(path.read_text()) | more))
            _, report = export(target("null"), model, work / f"{name}-package", LOOSE)
            assert report.passed
    return work


@pytest.fixture
def plain(work: Path) -> Package:
    return Package.open(work / "plain-package")


@pytest.fixture
def chatty(work: Path) -> Package:
    return Package.open(work / "chatty-package")


@pytest.fixture
def copied(work: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(work / "plain-package", tmp_path / "copied"))


def statuses(report: Report) -> dict[str, str]:
    return {gate.name: gate.status for gate in report.gates}


def damage(package: Path, value: float) -> None:
    """Give a norm of the artifact another first value; every file stays readable."""
    path = package / "artifact" / "model.norm.weight.safetensors"
    data = bytearray(path.read_bytes())
    data[-64 * 4 : -63 * 4] = np.float32(value).tobytes()
    path.write_bytes(data)


@pytest.mark.slow
def test_with_its_model_every_gate_runs_again(work: Path) -> None:
    report = revalidate(work / "plain-package", str(work / "plain"), LOOSE)
    first = Report.read(work / "plain-package" / "report.json")
    assert statuses(report) == statuses(first)
    assert report.passed
    assert (report.model, report.target, report.scheme) == ("plain", "null", "int8")
    integrity = next(gate for gate in report.gates if gate.name == "integrity")
    assert re.search(
        rf"\b{len(Package.open(work / 'plain-package').files())}\b.* files", integrity.reason
    )  # of the package, not of the artifact alone
    assert report.throughput["contexts"]


@pytest.mark.slow
def test_its_own_schemes_are_taken_and_the_limits_of_the_recipe(work: Path, tmp_path: Path) -> None:
    recipe = LOOSE.model_copy(update={"scheme": "int4-g32", "tensors": {"*.down_proj": "int8"}})
    export(target("null"), work / "plain", tmp_path / "mixed", recipe)
    strict = Recipe.of({"scheme": "nf4", "tokens": 40, "limits": {"kl": 0.0, "top1": 0.0, "perplexity": 1e3}})
    report = revalidate(tmp_path / "mixed", str(work / "plain"), strict)
    assert report.scheme == "int4-g32"
    assert statuses(report)["codes"] == "passed"
    assert {name for name, status in statuses(report).items() if status == "failed"} == {"quality/kl"}


def calibrated(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Path:
    """A package whose codes looked at a text, on a machine that has no store of them any more."""
    given = {"scheme": "int4-g32", "rounding": "gptq", "calibration": Calibration(None, 5, 48, 3), **more}
    _, report = export(
        target("null"), work / "plain", tmp_path / "calibrated", LOOSE.model_copy(update=given)
    )
    assert report.passed
    monkeypatch.setenv("TAPEOUT_CACHE", str(tmp_path / "other-cache"))
    return tmp_path / "calibrated"


@pytest.mark.slow
def test_a_calibrated_package_needs_no_recipe(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = calibrated(work, tmp_path, monkeypatch)
    report = revalidate(package, str(work / "plain"))
    assert statuses(report)["codes"] == "passed"
    # The limits travel too: random weights would fail the default ones.
    assert report.passed


@pytest.mark.slow
def test_texts_are_asked_for_by_their_digests(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other, model = tmp_path / "own.txt", tmp_path / "other.txt", str(work / "plain")
    own.write_text("A text that ships with nobody. " * 40)
    other.write_text("Another text, as long as the first one was. " * 40)
    package = calibrated(work, tmp_path, monkeypatch, calibration=Calibration(own, 5, 48, 3), text=own)
    assert str(tmp_path) not in (package / "tapeout.json").read_text()
    digest = file_sha256(own)
    with pytest.raises(
        RecipeError, match=f"SHA-256 {digest} .*5 windows of 48 tokens.*default text for plain here"
    ):
        revalidate(package, model)
    with pytest.raises(RecipeError, match=f"{digest} .*other.txt is another one, with {file_sha256(other)}"):
        revalidate(package, model, calibration=other)
    with pytest.raises(RecipeError, match=r"made without calibration text: leave out .*own\.txt"):
        revalidate(work / "plain-package", model, calibration=own)

    made: list[tuple[str, Options]] = []

    def instead(
        artifact: Artifact, model: Model, quant: Quantized, device: Device, options: Options
    ) -> Report:
        made.append((quant.digest, options))
        return Report.read(package / "report.json")

    monkeypatch.setattr("tapeout.replay.validate", instead)
    told = revalidate(package, model, calibration=own).notes
    # The recipe names the texts; calibration's settings are the package's, whatever it says.
    recipe = LOOSE.model_copy(update={"calibration": Calibration(own), "text": own, "limits": Limits(kl=0.5)})
    silent = revalidate(package, model, recipe).notes
    assert [digest for digest, _ in made] == [Package.open(package).manifest["codes_sha256"]] * 2
    assert [options.limits.kl for _, options in made] == [1e3, 0.5]
    assert [options.tokens for _, options in made] == [40, 40]
    assert any(f"evaluation text with the SHA-256 {digest}" in note for note in told)
    assert not any("SHA-256" in note for note in silent)


def test_without_its_model_the_golden_logits_are_compared(work: Path) -> None:
    report = revalidate(work / "plain-package")
    assert statuses(report) == {
        "integrity": "passed",
        "golden": "passed",
        **dict.fromkeys(("codes", "lowering", "decode", "quality", "tokenizer", "task"), "skipped"),
    }
    assert report.passed
    golden = next(gate for gate in report.gates if gate.name == "golden")
    assert golden.value is not None
    assert 0 <= golden.value < 1e-9  # the same float32 operations, in batches of another size
    assert report.throughput["contexts"]
    assert all("--model" in gate.reason for gate in report.gates if gate.status == "skipped")


def test_what_is_required_and_skipped_has_failed(work: Path) -> None:
    report = revalidate(work / "plain-package", required=frozenset({"codes"}))
    assert statuses(report)["codes"] == "failed"
    assert statuses(report)["quality"] == "skipped"
    assert not report.passed


def test_a_gate_that_does_not_exist_is_an_error(work: Path) -> None:
    for source in (None, str(work / "plain")):
        with pytest.raises(TapeoutError, match="'qualty' is not a gate; did you mean 'quality'"):
            revalidate(work / "plain-package", source, required=frozenset({"qualty"}))


def test_another_models_weights_are_refused(work: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "plain", "llama", {"eos_token_id": None}, dtype="F32", seed=1)
    with pytest.raises(
        ModelError, match=r"is not the model that .* was made from: its tensors have the digest"
    ):
        revalidate(work / "plain-package", str(other))


def test_a_model_of_another_shape_is_refused_in_the_same_words(work: Path) -> None:
    with pytest.raises(ModelError, match="is not the model that"):
        revalidate(work / "plain-package", "count")


def test_a_damaged_artifact_fails_without_the_model(copied: Path) -> None:
    damage(copied, 50.0)
    report = revalidate(copied)
    assert statuses(report)["integrity"] == "failed"
    assert statuses(report)["golden"] == "failed"
    golden = next(gate for gate in report.gates if gate.name == "golden")
    assert golden.value is not None
    assert golden.limit is not None
    assert golden.value > golden.limit


def test_a_damage_that_no_number_shows_fails_integrity(copied: Path) -> None:
    (copied / "README.md").write_text("other")
    report = revalidate(copied)
    assert statuses(report)["integrity"] == "failed"
    assert statuses(report)["golden"] == "passed"
    assert not report.passed


@pytest.mark.slow
def test_a_damaged_artifact_fails_with_the_model(work: Path, copied: Path) -> None:
    damage(copied, 50.0)
    report = revalidate(copied, str(work / "plain"), LOOSE)
    failed = {name for name, status in statuses(report).items() if status == "failed"}
    assert failed == {"integrity", "codes", "lowering/weights", "lowering/runtime"}


def test_not_a_number_fails_the_golden_logits(copied: Path) -> None:
    damage(copied, float("nan"))
    assert statuses(revalidate(copied))["golden"] == "failed"


def test_a_file_that_cannot_be_read_fails_the_golden_logits(copied: Path) -> None:
    (copied / "artifact" / "model.norm.weight.safetensors").write_bytes(b"no header")
    report = revalidate(copied)
    golden = next(gate for gate in report.gates if gate.name == "golden")
    assert golden.status == "failed"
    assert "model.norm.weight.safetensors cannot be read" in golden.reason
    assert report.throughput == {}


def test_a_package_without_golden_logits_skips_them(copied: Path) -> None:
    (copied / "golden.safetensors").unlink()
    report = revalidate(copied)
    assert statuses(report)["golden"] == "skipped"
    assert statuses(report)["integrity"] == "failed"


@pytest.mark.parametrize(
    ("error", "status"),
    [(MissingToolchain("pip install it"), "skipped"), (RuntimeCrash("was killed by SIGSEGV"), "failed")],
)
def test_a_runtime_that_does_not_open(
    work: Path, monkeypatch: pytest.MonkeyPatch, error: TapeoutError, status: str
) -> None:
    def refuse(spec: SessionSpec) -> None:
        raise error

    monkeypatch.setattr("tapeout.validate.worker.borrow", refuse)
    report = revalidate(work / "plain-package")
    golden = next(gate for gate in report.gates if gate.name == "golden")
    assert (golden.status, golden.reason) == (status, str(error))
    assert statuses(report)["integrity"] == "passed"


def test_bench(work: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    figures = bench(work / "plain-package", (3, 255), lambda *stage: stages.append(stage)).figures
    assert [row["context"] for row in figures["contexts"]] == [3, 255]
    assert stages
    for context in (0, 256):
        with pytest.raises(
            TapeoutError,
            match=f"a context of {context} tokens cannot be measured; this package takes 1 … 255",
        ):
            bench(work / "plain-package", (context,))


def test_no_package(tmp_path: Path) -> None:
    for call in (revalidate, bench):
        with pytest.raises(PackageError, match=r"has no tapeout\.json"):
            call(tmp_path)


def said(package: Package, prompt: str, **settings: Any) -> tuple[list[int], str]:
    pairs = list(generate(package, prompt, **settings))
    return [token for token, _ in pairs], "".join(piece for _, piece in pairs)


@pytest.mark.slow
def test_a_worker_says_what_a_session_here_says(plain: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    here = said(plain, "a", max_new_tokens=3)
    monkeypatch.setattr("tapeout.validate.worker.borrow", open_session)
    assert said(plain, "a", max_new_tokens=3) == here
    assert len(here[0]) == 3


def test_greedy_does_not_depend_on_the_seed(plain: Package) -> None:
    ids, _ = said(plain, "ab")
    assert len(ids) == plain.generation.max_new_tokens == 16
    assert said(plain, "ab", seed=5)[0] == ids
    assert said(plain, "ab", temperature=1.0, top_k=1)[0] == ids
    assert said(plain, "ab", temperature=1.0, top_p=1e-9)[0] == ids
    assert said(plain, "ba")[0] != ids


def test_samples_follow_the_seed_and_the_settings(plain: Package) -> None:
    ids, _ = said(plain, "ab", temperature=1.0, seed=1)
    assert said(plain, "ab", temperature=1.0, seed=1)[0] == ids
    assert said(plain, "ab", temperature=1.0, seed=2)[0] != ids
    assert said(plain, "ab", temperature=0.3, seed=1)[0] != ids
    assert said(plain, "ab", temperature=1.0, top_k=2, seed=1)[0] != ids


def test_a_penalty_of_repetition_counts(plain: Package) -> None:
    # So large that no token comes a second time, where greedy does repeat itself.
    assert len(set(said(plain, "ab", max_new_tokens=100)[0])) < 100
    penalised, _ = said(plain, "ab", max_new_tokens=100, repetition_penalty=1e6)
    assert len(set(penalised)) == 100


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("max_new_tokens", 0),
    ],
)
def test_a_setting_without_a_meaning_is_an_error(
    plain: Package, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    monkeypatch.delattr("tapeout.validate.worker.borrow")  # it is found before anything is loaded
    with pytest.raises(TapeoutError, match=f"{name} cannot be {value}"):
        next(generate(plain, "a", **{name: value}))


def test_a_negative_seed_is_an_error(plain: Package) -> None:
    with pytest.raises(TapeoutError, match="seed"):
        next(generate(plain, "a", seed=-1))


def test_an_empty_and_a_long_prompt_are_errors(plain: Package) -> None:
    with pytest.raises(TapeoutError, match="the prompt has no token"):
        next(generate(plain, ""))
    with pytest.raises(TapeoutError, match="the prompt has 256 tokens; the context of 256 leaves no room"):
        next(generate(plain, "a" * 256))
    assert len(said(plain, "a" * 250)[0]) == 6


def test_the_chat_template_is_put_around_the_prompt(chatty: Package) -> None:
    assert said(chatty, "hi", chat=True) == said(chatty, "<eos>[user]hi[assistant]")
    assert said(chatty, "hi", chat=True) != said(chatty, "hi")


def test_a_package_without_a_chat_template_cannot_chat(plain: Package) -> None:
    with pytest.raises(ModelError, match="has no chat template; leave out --chat"):
        next(generate(plain, "hi", chat=True))


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_the_whole_text(plain: Package, seed: int, here: Any) -> None:
    """Random bytes: characters that are cut, and bytes that are no character at all."""
    pairs = list(generate(plain, "ab", temperature=1.5, seed=seed, max_new_tokens=60))
    session = here(plain.target().session(plain.artifact))
    whole = session.detokenize([token for token, _ in pairs])
    assert "\ufffd" in whole
    assert "".join(piece for _, piece in pairs) == whole


class Bytes:
    """Says the bytes of a text one token each, whatever it is asked; token 256 is the stop token."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.facts = Facts("bytes", "none", 0.0, 0, 100)
        self.tokens, self.at = list(tokens), 0

    def close(self) -> None:
        pass

    def reset(self) -> None:
        self.at = 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        return np.tile(self.decode(0), (len(ids), 1))

    def decode(self, token: int) -> Logits:
        logits = np.zeros(272, np.float32)
        logits[self.tokens[self.at]] = 9.0
        self.at += 1
        return logits

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def detokenize(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


Speak = Callable[[Sequence[int]], list[tuple[int, str]]]


@pytest.fixture
def speak(chatty: Package, monkeypatch: pytest.MonkeyPatch) -> Speak:
    """``speak(tokens)`` gives the pairs that ``generate`` makes of these tokens."""

    def speak(tokens: Sequence[int]) -> list[tuple[int, str]]:
        monkeypatch.setattr("tapeout.validate.worker.borrow", lambda spec: Bytes(tokens))
        return list(generate(chatty, "x", max_new_tokens=len(tokens)))

    return speak


def test_a_character_comes_with_its_last_byte(speak: Speak) -> None:
    pairs = speak([*"é€😀!".encode(), 256])
    assert [piece for _, piece in pairs] == ["", "é", "", "", "€", "", "", "", "😀", "!"]
    assert [token for token, _ in pairs] == list("é€😀!".encode())


def test_bytes_that_are_no_character_do_not_hold_up_what_follows(speak: Speak) -> None:
    assert [piece for _, piece in speak([0x61, 0xFF, 0x62, 256])] == ["a", "", "\ufffdb"]


@pytest.mark.parametrize("tokens", [[0x61, 0xE2, 0x82, 256], [0x61, 0xE2, 0x82]], ids=["stopped", "cut"])
def test_an_unfinished_character_at_the_end_is_not_lost(speak: Speak, tokens: list[int]) -> None:
    assert "".join(piece for _, piece in speak(tokens)) == "a\ufffd"


def test_the_stop_token_ends_and_is_not_said(speak: Speak) -> None:
    assert speak([0x61, 256, 0x62]) == [(0x61, "a")]
    assert speak([256, 0x62]) == []


def test_the_packages_own_settings_hold_where_none_are_given(
    chatty: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tapeout.validate.worker.borrow", lambda spec: Bytes([0x61] * 99))
    assert len(list(generate(chatty, "x"))) == 16
    shorter = dict(chatty.manifest) | {
        "generation": dict(chatty.manifest["generation"]) | {"max_new_tokens": 5}
    }
    assert len(list(generate(replace(chatty, manifest=shorter), "x"))) == 5
