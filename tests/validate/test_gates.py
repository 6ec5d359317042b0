"""Every gate passes on a sound artifact and fails on each defect that it is there to find."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from tapeout import validate
from tapeout.errors import MissingToolchain, PackageError, RuntimeCrash, TapeoutError
from tapeout.exporters import Artifact
from tapeout.generated import write_model
from tapeout.models import Model, load
from tapeout.quantize import SCHEMES, Quantized, QuantTensor, quantize
from tapeout.targets.null import Null
from tapeout.validate import GateResult, Limits, Options, gates
from tapeout.validate.evidence import Evidence
from tapeout.validate.generate import Said
from tapeout.validate.session import KvCache, Logits, Lowering, SessionSpec

HERE = str(Path(__file__).parent)
PATH = {"PYTHONPATH": os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))}
LAYERS = 5
TEXT = "A gate compares two things that should be the same, prints the distance and the bound. " * 4
LOOSE = Limits(
    kl=1e3, top1=0.0, perplexity=1e3
)  # the network is random: what quantization costs says nothing


@dataclass(frozen=True)
class Device(Null):
    """The null target's files on the toy runtime, with one defect."""

    defect: str = ""

    name: ClassVar[str] = "toy"

    def session(self, artifact: Artifact) -> SessionSpec:
        arguments = {
            "directory": str(artifact.directory),
            "defect": self.defect,
            "arithmetic": self.arithmetic,
            "kv_cache": self.cache,
        }
        return SessionSpec("gate_sessions:device", arguments, environment=PATH)


@dataclass(frozen=True)
class Rounding(Device):
    """Rounds the inputs of matmuls; its twin for the weights does not."""

    arithmetic: ClassVar[Literal["float32", "ggml"]] = "ggml"

    def lowerings(self, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        exact = Device().session(artifact)
        return [
            Lowering("weights", exact, "max", "The same sums.", 1e-6),
            Lowering("runtime", self.session(artifact), "kl", "It rounds."),
        ]


class Blind(Device):
    """Shows nothing of what it computes."""

    def traced(self, artifact: Artifact, scratch: Path) -> SessionSpec | None:  # type: ignore[override]
        return None


class Deaf(Device):
    """Has nothing to show it with."""

    def traced(self, artifact: Artifact, scratch: Path) -> SessionSpec:
        raise PackageError("nothing here")


class ToyEvidence(Evidence):
    """Evidence whose reference is the toy network too: no worker has to import torch."""

    def reference(self, **arguments: Any) -> SessionSpec:
        spec = super().reference(**arguments)
        return replace(spec, factory="gate_sessions:reference", environment=PATH)


@dataclass(frozen=True)
class Sound:
    model: Model
    quant: Quantized
    artifact: Artifact


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    work = tmp_path_factory.mktemp("sound")
    model = load(write_model(work / "tiny", "llama", {"num_hidden_layers": LAYERS}, dtype="F32"))
    quant = quantize(model, "int4-g32-asym", out=work / "codes")
    (work / "artifact").mkdir()
    return Sound(model, quant, Null().export(quant, work / "artifact"))


Look = Callable[..., Evidence]


@pytest.fixture
def look(sound: Sound, tmp_path: Path) -> Iterator[Look]:
    """``look(device, artifact)`` gives the evidence of a sound artifact, or of the one that is given."""
    opened: list[Evidence] = []
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def gather(device: Device | None = None, artifact: Artifact | None = None, **fields: Any) -> Evidence:
        scratch = tmp_path / f"scratch-{len(opened)}"
        scratch.mkdir()
        given = {"model": sound.model, "quant": sound.quant, "text": text, "tokens": 300} | fields
        opened.append(
            ToyEvidence(
                artifact=artifact or sound.artifact, device=device or Device(), scratch=scratch, **given
            )
        )
        return opened[-1]

    yield gather
    for evidence in opened:
        evidence.close()


def test_the_reference_is_asked_once_about_the_same_codes(
    look: Look, sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    record = Evidence.record

    def recorded(self: Evidence, name: str, *rest: Any) -> list[npt.NDArray[np.float32]]:
        asked.append(name)
        return record(self, name, *rest)

    monkeypatch.setattr("tapeout.validate.evidence._references", {})
    monkeypatch.setattr(Evidence, "record", recorded)
    first, again = look().dequantized, look().dequantized
    assert asked == ["dequantized"]
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    half = look().narrowed(["lm_head.weight"])
    assert asked == ["dequantized", "narrowed"]
    other = look(quant=quantize(sound.model, "int8", out=tmp_path / "other")).dequantized
    assert asked == ["dequantized", "narrowed", "dequantized"]
    assert not np.array_equal(first[0], other[0])
    assert half[0].shape == first[0].shape


def test_error_by_layer_is_told_of_the_same_codes_once(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tapeout.validate.evidence._references", {})
    monkeypatch.setattr("tapeout.validate.evidence._originals", {})
    told = []
    for _ in range(2):
        evidence = look()
        gates.quality(evidence, LOOSE)
        evidence.compare_layers()
        told.append(evidence.findings["layers"])
    assert told[0] == told[1]  # what is kept of the first run says the same
    names = [row["layer"] for row in told[0]["layers"]]
    assert names == ["embedding", *(f"layers.{k}" for k in range(LAYERS)), "logits"]
    assert all(0 < row["error"] < 1 for row in told[0]["layers"])
    assert told[0]["tokens"] == 64
    bare = look()
    gates.codes(bare)
    bare.compare_layers()
    assert "layers" not in bare.findings  # nobody asked the references


@pytest.fixture
def copied(sound: Sound, tmp_path: Path) -> Artifact:
    """The artifact's files, to be damaged."""
    shutil.copytree(sound.artifact.directory, tmp_path / "damaged")
    return replace(sound.artifact, directory=tmp_path / "damaged")


def damage(
    artifact: Artifact, name: str, part: str, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
) -> None:
    """Change one part of one tensor's file."""
    path = artifact.directory / f"{name}.safetensors"
    parts = {key: array.copy() for key, array in load_file(path).items()}
    parts[part] = np.ascontiguousarray(change(parts[part]))
    save_file(parts, path)


def flip(index: tuple[int, ...], bit: int = 0) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
    """One bit of one element."""

    def change(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        array.view(f"u{array.itemsize}")[index] ^= 1 << bit
        return array

    return change


def only(results: list[GateResult]) -> GateResult:
    (result,) = results
    return result


def by_name(results: list[GateResult]) -> dict[str, GateResult]:
    found = {result.name: result for result in results}
    assert len(found) == len(results)
    return found


# All of them


def test_a_sound_artifact_passes_every_gate(
    sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / sound.model.name
    shutil.copytree(sound.model.directory, directory)
    tasks = [{"prompt": "1+1=", "answer": ""}]
    (directory / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(validate, "Evidence", ToyEvidence)
    monkeypatch.setattr("tapeout.validate.throughput._ARRAY_BYTES", 1 << 20)
    told: list[tuple[str, int, int]] = []
    options = Options(
        replace(LOOSE, task=1.0),
        tmp_path / "text.txt",
        tokens=300,
        progress=lambda *args: told.append(args),
    )
    report = validate.validate(sound.artifact, load(directory), sound.quant, Device(), options)
    found = by_name(list(report.gates))
    assert {gate.name: gate.reason for gate in report.gates if gate.status != "passed"} == {}
    assert list(found) == [
        "integrity", "codes", "lowering/weights", "lowering/runtime", "decode", "decode/batches-of-7",
        "decode/batches-of-32", "quality/kl", "quality/top1", "quality/perplexity", "tokenizer", "task",
    ]  # fmt: skip
    assert {name.split("/")[0] for name in found} == set(validate.GATES)
    # The toy takes the same road whatever the batch: nothing may part at all.
    assert [found[name].value for name in found if name.startswith(("lowering", "decode"))] == [0.0] * 5
    assert found["quality/kl"].value > 0
    assert report.passed
    assert (report.model, report.target, report.scheme) == ("tiny", "toy", "int4-g32-asym")
    assert report.throughput["runtime"] == "toy 1"
    assert {"original", "dequantized", "lowering-weights"} <= {stage for stage, _, _ in told}
    (ids, logits), *_ = report.golden
    assert len(ids) == 16
    assert logits.shape == (272,)
    assert bytes(ids) == TEXT.encode()[:16].translate(bytes.maketrans(b"", b"")) or len(set(ids)) > 1


def test_a_missing_runtime_is_skipped_and_a_required_skip_fails(
    sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(validate, "Evidence", ToyEvidence)
    options = Options(LOOSE, tmp_path / "text.txt", 300, frozenset({"lowering", "tokenizer"}))
    device = Device(defect="not installed")
    report = validate.validate(sound.artifact, sound.model, sound.quant, device, options)
    found = by_name(list(report.gates))
    skipped = {name for name, gate in found.items() if gate.status == "skipped"}
    failed = {name for name, gate in found.items() if gate.status == "failed"}
    assert skipped == {"decode", "task"}
    assert failed == {"lowering/weights", "lowering/runtime", "tokenizer"}
    assert found["decode"].reason == "the toy runtime is not installed: pip install toy"
    assert found["tokenizer"].reason.startswith("required, but skipped: the toy runtime is not installed")
    assert not report.passed
    assert report.throughput == {}
    assert len(report.golden) == 2  # of the reference, which is there
    relaxed = validate.validate(
        sound.artifact, sound.model, sound.quant, device, replace(options, require=frozenset())
    )
    assert {gate.name for gate in relaxed.gates if gate.status == "skipped"} == skipped | failed
    assert relaxed.passed


def test_a_file_that_the_gates_run_themselves_change_is_found(
    sound: Sound, copied: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Writing(ToyEvidence):
        def close(self) -> None:
            super().close()
            (self.artifact.directory / "config.json").write_text("{}")

    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(validate, "Evidence", Writing)
    monkeypatch.setattr("tapeout.validate.throughput._ARRAY_BYTES", 1 << 20)
    options = Options(LOOSE, tmp_path / "text.txt", 64)
    report = validate.validate(copied, sound.model, sound.quant, Device(), options)
    failed = [gate for gate in report.gates if gate.status == "failed"]
    assert [gate.name for gate in failed] == ["integrity"]
    assert "config.json differs" in failed[0].reason


def test_require() -> None:
    results = [
        GateResult("lowering/weights", "skipped", reason="no sdk"),
        GateResult("codes", "skipped", reason="no reader"),
        GateResult("lowering/runtime", "passed", "kl", 0.0, 1.0),
    ]
    found = validate.require(results, frozenset({"lowering"}))
    assert [gate.status for gate in found] == ["failed", "skipped", "passed"]
    assert found[0].reason == "required, but skipped: no sdk"
    assert found[1:] == results[1:]
    assert validate.require(results, frozenset()) == results


def test_a_required_gate_that_does_not_exist_stops_before_any_work(sound: Sound) -> None:
    validate.check_names(frozenset(validate.GATES))
    options = Options(require=frozenset({"lowerings"}))
    with pytest.raises(TapeoutError, match=r"'lowerings' is not a gate; did you mean 'lowering'\?"):
        validate.validate(sound.artifact, sound.model, sound.quant, Device(), options)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MissingToolchain("no sdk"), "skipped"),
        (RuntimeCrash("died"), "failed"),
        (PackageError("x"), "failed"),
    ],
)
def test_guarded(error: TapeoutError, status: str) -> None:
    def gate(evidence: Evidence) -> list[GateResult]:
        raise error

    found = gates.guarded("codes", gate, cast(Evidence, None))
    assert found == [GateResult("codes", cast(Any, status), reason=str(error))]
    passed = [GateResult("codes", "passed", "x", 0.0, 0.0)]
    assert gates.guarded("codes", lambda _: passed, cast(Evidence, None)) == passed


# integrity


def test_integrity(copied: Artifact) -> None:
    expected = gates.digests(copied)
    assert set(expected) == {path.name for path in copied.directory.iterdir()}
    result = only(gates.integrity(copied.directory, expected))
    assert (result.name, result.status, result.value, result.limit) == ("integrity", "passed", 0, 0)
    assert f"{len(expected)} of {len(expected)} files" in result.reason


def test_integrity_names_the_byte_changed_and_the_file_gone(copied: Artifact) -> None:
    expected = gates.digests(copied)
    data = bytearray((copied.directory / "lm_head.weight.safetensors").read_bytes())
    data[-1] ^= 1
    (copied.directory / "lm_head.weight.safetensors").write_bytes(data)
    result = only(gates.integrity(copied.directory, expected))
    assert (result.status, result.value) == ("failed", 1)
    assert result.reason == "lm_head.weight.safetensors differs from its digest"
    (copied.directory / "tokenizer.json").unlink()
    result = only(gates.integrity(copied.directory, expected))
    assert (result.status, result.value) == ("failed", 2)
    assert "tokenizer.json is missing" in result.reason


# codes

UP = "model.layers.3.mlp.up_proj.weight"  # int4, asymmetric: has all the parts
NORM = "model.layers.2.input_layernorm.weight"


def test_codes_of_a_sound_artifact(look: Look, sound: Sound) -> None:
    result = only(gates.codes(look()))
    assert (result.name, result.status, result.value, result.limit) == ("codes", "passed", 0, 0)
    assert f"{len(sound.quant)} tensors" in result.reason


@pytest.mark.parametrize(
    ("name", "part", "change", "told"),
    [
        (UP, "codes", flip((5, 9), bit=4), f"{UP}: 1 of 8192 codes differ, the first at [5, 19]"),
        (UP, "scale", flip((7, 1)), f"{UP}: 1 of 256 scale differ, the first at [7, 1]"),
        (UP, "scale", flip((7, 1), bit=15), f"{UP}: 1 of 256 scale differ, the first at [7, 1]"),
        (UP, "zero_point", flip((0, 0)), f"{UP}: 1 of 256 zero_point differ, the first at [0, 0]"),
        (NORM, "weight", flip((63,)), f"{NORM}: float values differ"),
        ("lm_head.weight", "codes", flip((271, 63)), "lm_head.weight: 1 of 17408 codes differ"),
        (UP, "codes", lambda codes: codes[:-1], f"{UP}: (127, 64) codes of 4 bits in groups of 32"),
        (UP, "codes", np.flipud, f"{UP}: "),
        pytest.param(
            UP, "codebook", flip((3,)), f"{UP}: 1 of 16 codebook differ, the first at [3]",
        ),
        pytest.param(
            UP, "scale", lambda scale: scale[:-1], f"{UP}: scale",
        ),
    ],
)  # fmt: skip
def test_codes_finds_one_bit(
    look: Look, copied: Artifact, name: str, part: str, change: Callable[..., Any], told: str
) -> None:
    damage(copied, name, part, change)
    result = only(gates.codes(look(artifact=copied)))
    assert (result.status, result.value) == ("failed", 1)
    assert result.reason.startswith(told)


def test_codes_without_their_zero_points(look: Look, copied: Artifact) -> None:
    path = copied.directory / f"{UP}.safetensors"
    parts = {key: array.copy() for key, array in load_file(path).items() if key != "zero_point"}
    save_file(parts, path)
    result = only(gates.codes(look(artifact=copied)))
    assert (result.status, result.reason) == ("failed", f"{UP}: zero_point is absent")


def test_codes_counts_every_tensor_and_names_three(look: Look, copied: Artifact) -> None:
    for layer in range(LAYERS):
        damage(copied, f"model.layers.{layer}.mlp.up_proj.weight", "codes", flip((0, 0)))
    result = only(gates.codes(look(artifact=copied)))
    assert result.value == LAYERS
    assert result.reason.count("up_proj") == 3
    assert result.reason.endswith("… and 2 more")


def test_codes_of_a_tensor_that_is_gone(look: Look, copied: Artifact) -> None:
    (copied.directory / f"{UP}.safetensors").unlink()
    result = only(gates.guarded("codes", gates.codes, look(artifact=copied)))
    assert result.status == "failed"
    assert f"{UP}.safetensors cannot be read" in result.reason

    class Forgetful(Device):
        def read_codes(self, artifact: Artifact, quant: Quantized) -> Iterator[tuple[str, Any]]:
            return (found for found in super().read_codes(artifact, quant) if found[0] != UP)

    result = only(gates.codes(look(Forgetful())))
    assert (result.status, result.value, result.reason) == ("failed", 1, f"{UP} is not in the artifact")


def test_codes_of_a_tensor_too_many(look: Look) -> None:
    class Generous(Device):
        def read_codes(self, artifact: Artifact, quant: Quantized) -> Iterator[tuple[str, Any]]:
            yield from super().read_codes(artifact, quant)
            yield "model.extra.weight", np.ones(3, np.float32)

    result = only(gates.codes(look(Generous())))
    assert result.status == "failed"
    assert "model.extra.weight" in result.reason


def compared(found: QuantTensor | Logits, expected: QuantTensor, container: str = "u4") -> GateResult:
    """The codes gate on one tensor."""

    class Store(dict[str, QuantTensor]):
        def float32(self, name: str) -> Logits:
            return self[name].dequantize()

    evidence = SimpleNamespace(
        quant=Store(w=expected),
        artifact=SimpleNamespace(containers={"w": container}),
        device=SimpleNamespace(read_codes=lambda artifact, quant: iter([("w", found)])),
    )
    return only(gates.codes(cast(Evidence, evidence)))


def tensor(*scales: int) -> QuantTensor:
    """A row of 4-bit codes with the given float16 bits as scales of groups of 8."""
    codes = np.arange(4 * len(scales), dtype=np.uint8)[None]
    codebook = np.arange(16, dtype=np.float32) - 8
    return QuantTensor(codes, 4, 8 * len(scales), np.array([scales], np.uint16).view(np.float16), 8, codebook)


# float16: 0x3c00 is 1, 0x8000 is -0, 0x7e00 and 0xfe01 are NaN.
@pytest.mark.parametrize(
    ("expected", "found", "status"),
    [
        (0x3C00, 0x3C00, "passed"),
        (0x0000, 0x0000, "passed"),
        (0x0000, 0x8000, "failed"),
        (0x7E00, 0x7E00, "passed"),
        (0x7E00, 0xFE01, "failed"),
        (0x7E00, 0x7C00, "failed"),
    ],
)
def test_codes_compares_scales_as_bits(expected: int, found: int, status: str) -> None:
    assert compared(tensor(0x3C00, found), tensor(0x3C00, expected)).status == status


def test_codes_of_a_tensor_that_the_format_holds_as_float() -> None:
    expected = tensor(0x3555, 0x2E66)  # 0.3333, 0.1: multiples of them are not all float16
    values = expected.dequantize()
    assert compared(values, expected).status == "passed"
    narrow = values.astype(np.float16).astype(np.float32)
    assert not np.array_equal(narrow, values)
    assert compared(narrow, expected, "F16").status == "passed"
    assert compared(narrow, expected).status == "failed"
    assert compared(values, expected, "F16").status == "failed"
    narrow[0, 3] = np.nan
    assert compared(narrow, expected, "F16").status == "failed"
    assert compared(values.T, expected).status == "failed"


# lowering


def test_lowering_of_a_sound_artifact(look: Look) -> None:
    found = by_name(gates.lowering(look()))
    assert {name: (gate.status, gate.value) for name, gate in found.items()} == {
        "lowering/weights": ("passed", 0.0),
        "lowering/runtime": ("passed", 0.0),
    }
    assert found["lowering/weights"].limit == 1e-4
    assert found["lowering/runtime"].limit == pytest.approx(5e-5)  # nothing is predicted: the floor alone


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.layers.3.mlp.down_proj.weight", "first primitive that parts is layers.3.mlp.out (linear)"),
        ("model.layers.0.mlp.up_proj.weight", "first primitive that parts is layers.0.mlp.up (linear)"),
        ("lm_head.weight", "first primitive that parts is logits (linear)"),
    ],
)
def test_lowering_names_the_primitive_whose_tensor_is_damaged(
    look: Look, copied: Artifact, name: str, told: str
) -> None:
    # Doubles the first row's scales. Far less would show: the limit is 1e-4 of the logits' spread.
    damage(copied, name, "scale", lambda scale: scale * np.where(np.arange(len(scale)) == 40, 2, 1)[:, None].astype(np.float16))  # fmt: skip
    weights = by_name(gates.lowering(look(artifact=copied)))["lowering/weights"]
    assert weights.status == "failed"
    assert weights.value > weights.limit
    assert told in weights.reason


def test_lowering_finds_the_smallest_step_of_one_code(look: Look, copied: Artifact) -> None:
    damage(copied, "model.layers.4.mlp.down_proj.weight", "codes", flip((0, 0)))
    weights = by_name(gates.lowering(look(artifact=copied)))["lowering/weights"]
    assert weights.status == "failed"
    assert "first primitive that parts is layers.4.mlp.out" in weights.reason


def test_lowering_of_a_defect_that_is_not_in_the_files(look: Look) -> None:
    weights = by_name(gates.lowering(look(Device(defect="its runtime"))))["lowering/weights"]
    assert weights.status == "failed"
    assert "No primitive parts" in weights.reason


def test_lowering_of_a_target_that_cannot_be_walked(look: Look) -> None:
    for device, told in (
        (Blind(defect="its runtime"), "Target toy does not show where it first parts."),
        (Deaf(defect="its runtime"), "Where it first parts could not be found: nothing here"),
    ):
        weights = by_name(gates.lowering(look(device)))["lowering/weights"]
        assert weights.status == "failed"
        assert told in weights.reason
        assert "The same operations" in weights.reason  # where the bound comes from is still said


def test_a_runtime_may_round_as_predicted_and_no_coarser(look: Look) -> None:
    evidence = look(Rounding(defect="another draw"))
    drawn = by_name(gates.lowering(evidence))
    predicted = evidence.predicted.kl
    # Else the floor would decide, and the prediction would not be tested.
    assert predicted > 5e-5
    runtime = drawn["lowering/runtime"]
    assert runtime.status == drawn["lowering/weights"].status == "passed"
    assert runtime.limit == pytest.approx(2 * predicted + 5e-5)
    # Another draw of the same errors over 300 tokens: near the prediction, neither nothing nor another order.
    assert predicted / 2 < runtime.value < 2 * predicted
    # KL goes with the square of the step: four times the step is sixteen times the KL.
    coarse = by_name(gates.lowering(look(Rounding(defect="coarse"))))
    assert coarse["lowering/weights"].status == "passed"
    assert coarse["lowering/runtime"].status == "failed"
    assert coarse["lowering/runtime"].value > 8 * predicted
    # A device that says it computes in float32 is held to that.
    liar = by_name(gates.lowering(look(Liar(defect="another draw"))))
    assert liar["lowering/runtime"].status == "failed"


class Liar(Rounding):
    """Rounds, and says that it does not."""

    arithmetic: ClassVar[Literal["float32", "ggml"]] = "float32"

    def session(self, artifact: Artifact) -> SessionSpec:
        spec = super().session(artifact)
        return replace(spec, arguments={**spec.arguments, "arithmetic": "ggml"})


@dataclass(frozen=True)
class Cached(Device):
    """Keeps its cache as codes of 4 bits."""

    cache: ClassVar[KvCache] = "kv-int4"

    def lowerings(self, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        return [
            Lowering("weights", Device().session(artifact), "max", "The same sums.", 1e-6),
            Lowering("runtime", self.session(artifact), "kl", "Its cache rounds."),
        ]


class Coarse(Device):
    """Keeps its cache as codes of 4 bits, and says that it keeps floats."""

    def session(self, artifact: Artifact) -> SessionSpec:
        return Cached().session(artifact)

    def lowerings(self, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        return Cached().lowerings(artifact, quant, scratch)


class Fine(Cached):
    """The other way round."""

    def session(self, artifact: Artifact) -> SessionSpec:
        return Device().session(artifact)


def test_a_cache_may_round_as_it_was_chosen_to(look: Look) -> None:
    evidence = look(Cached())
    found = by_name(gates.lowering(evidence))
    # The reference rounds its cache the same way, so that nothing is left.
    assert {name: (gate.status, gate.value) for name, gate in found.items()} == {
        "lowering/weights": ("passed", 0.0),
        "lowering/runtime": ("passed", 0.0),
    }
    assert {(gate.status, gate.value) for gate in gates.decode(evidence)} == {("passed", 0.0)}
    cache = only(gates.cache(evidence, Limits()))
    assert cache.limit == 0.1  # as for weights of 4 bits
    assert cache.value is not None
    assert cache.value > 1e-4
    assert f"the kv-int4 cache costs {cache.value:.2g} nats a token" in cache.reason
    assert only(gates.cache(evidence, Limits(kl=cache.value / 2))).status == "failed"


@pytest.mark.parametrize("liar", [Coarse, Fine])
def test_a_cache_other_than_the_chosen_one_is_told_apart(look: Look, liar: type[Device]) -> None:
    found = by_name(gates.lowering(look(liar())))
    assert {name: gate.status for name, gate in found.items()} == {
        "lowering/weights": "passed",
        "lowering/runtime": "failed",
    }


def test_a_cache_of_floats_has_no_cost_to_tell(look: Look) -> None:
    assert gates.cache(look(), Limits()) == []


@pytest.mark.parametrize(
    ("defect", "told"),
    [
        ("NaN", "gives NaN or infinite logits after token 5"),
        ("pads the vocabulary", "280] where the reference gives [256, 272]"),
        ("dies", "was killed by SIGSEGV in prefill"),
        pytest.param(
            "last token only", "gives logits [1, 272] where the reference gives [256, 272]",
        ),
    ],
)  # fmt: skip
def test_lowering_of_a_broken_runtime(look: Look, defect: str, told: str) -> None:
    evidence = look(Device(defect=defect))
    found = gates.lowering(evidence)
    for result in found:
        assert result.status == "failed"
        assert told in result.reason
    if defect == "NaN":  # where it is made is looked for
        assert all("rimitive" in result.reason for result in found)
        told_of = [{"gate": result.name, "finding": result.reason} for result in found]
        assert evidence.findings["not_finite"] == told_of
        assert evidence.findings["divergence"]["layers"]
    else:
        assert "not_finite" not in evidence.findings


class Narrow(Device):
    """Holds values as float16, which its twin for the weights counts."""

    def lowerings(self, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        return [Lowering("weights", self.session(artifact), "max", "The same sums.", 1e-6, peaks=True)]


@pytest.mark.parametrize(
    ("defect", "status", "share", "told"),
    [
        ("", "passed", None, r"^layers\.\d\.mlp \S+, layers\.\d\.mlp \S+, layers\.\d\.mlp \S+: the largest of 5 "),
        ("half", "passed", 0.5, r"^layers\.1\.mlp 3\.28e\+04, "),
        (
            "large",
            "failed",
            1e5 / 65504,
            r"^2 values have less room than one bit\. layers\.3\.mlp 1e\+05, layers\.1\.mlp 3\.28e\+04, layers\.\d\.mlp ",
        ),
        ("all large", "failed", 40029 / 65504, r"^30 values have .* value\.29 4e\+04, .* … and 14 more: the largest of 30"),
        ("tells nothing", "failed", None, "the largest of 0 float16 values"),
    ],
)  # fmt: skip
def test_room_in_float16(look: Look, defect: str, status: str, share: float | None, told: str) -> None:
    evidence = look(Narrow(defect=defect))
    weights, room = gates.lowering(evidence)
    assert (weights.name, weights.status, weights.value) == ("lowering/weights", "passed", 0.0)
    assert (room.name, room.status, room.limit) == ("lowering/range", status, 0.5)
    assert re.search(told, room.reason), room.reason
    assert f"on {sum(map(len, evidence.sequences))} rows" in room.reason
    if share:
        assert room.value == share
    elif not defect:
        assert room.value is not None
        assert 0 < room.value < 0.01


def test_lowering_without_a_runtime(look: Look) -> None:
    found = gates.lowering(look(Device(defect="not installed")))
    assert [gate.name for gate in found] == ["lowering/weights", "lowering/runtime"]
    assert {gate.status for gate in found} == {"skipped"}


def test_a_device_without_a_lowering_check_does_not_pass_unseen(look: Look) -> None:
    class Unchecked(Device):
        def lowerings(self, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
            return []

    found = gates.lowering(look(Unchecked()))
    assert [gate.status for gate in validate.require(found, frozenset({"lowering"}))] == ["failed"]


def test_lowering_on_transformers_names_the_primitive(tmp_path: Path) -> None:
    """The null target and the real reference: what the toy stands for above."""
    pytest.importorskip("transformers")
    model = load(write_model(tmp_path / "tiny", "llama", dtype="F32"))
    quant = quantize(model, "int4-g32", out=tmp_path / "codes")
    for folder in ("artifact", "scratch"):
        (tmp_path / folder).mkdir()
    artifact = Null().export(quant, tmp_path / "artifact")
    damage(artifact, "model.layers.1.self_attn.k_proj.weight", "scale", np.flipud)
    evidence = Evidence(artifact, model, quant, Null(), tmp_path / "scratch")
    vars(evidence)["sequences"] = [[(i * 37 + 11) % 256 for i in range(60)]]
    try:
        found = by_name(gates.lowering(evidence))
    finally:
        evidence.close()
    assert found["lowering/weights"].status == "failed"
    told = "first primitive that parts is layers.1.attention.k (linear)"
    assert told in found["lowering/weights"].reason
    assert found["lowering/runtime"].status == "failed"


# decode

ROADS = ["decode", "decode/batches-of-7", "decode/batches-of-32"]


def test_decode_of_a_sound_device(look: Look) -> None:
    found = by_name(gates.decode(look()))
    assert list(found) == ROADS
    assert {(gate.status, gate.value) for gate in found.values()} == {("passed", 0.0)}
    assert "one prefill of 256 tokens" in found["decode"].reason


@pytest.mark.parametrize(
    ("defect", "failing"),
    [
        ("forgets", ROADS[:1]),
        ("forgets between batches", ROADS[1:]),
        ("flips", ROADS[:1]),
        pytest.param(
            "flips one", ROADS[:1],
        ),
    ],
)  # fmt: skip
def test_decode_finds_the_road_that_is_broken(look: Look, defect: str, failing: list[str]) -> None:
    found = by_name(gates.decode(look(Device(defect=defect))))
    assert [name for name, gate in found.items() if gate.status == "failed"] == failing
    for name in failing:
        assert "another likeliest successor" in found[name].reason or found[name].value > found[name].limit


def test_a_likeliest_token_that_changes_against_a_clear_lead_is_counted() -> None:
    expected = np.array([[5.0, 1.0, 0.0]], np.float32)
    other = np.array([[1.0, 5.0, 0.0]], np.float32)
    assert gates._overturned(expected, other, 0.04) == 1


def test_ties_are_no_changes() -> None:
    expected = np.array([[1.0, 1.0, 0.0], [1.0, 1.0 - 1e-6, 0.0]], np.float32)
    other = np.array([[1.0, 1.0 + 1e-6, 0.0], [1.0 - 1e-6, 1.0, 0.0]], np.float32)
    assert gates._overturned(expected, other, 0.04) == 0


def test_decode_of_a_device_that_rounds(look: Look) -> None:
    evidence = look(Rounding())
    found = by_name(gates.decode(evidence))
    assert {gate.status for gate in found.values()} == {"passed"}
    # Two draws of the predicted error, and twice that.
    limit = 4 * evidence.predicted_probe.kl + 5e-5
    assert evidence.predicted_probe.kl > 5e-5
    assert {gate.limit for gate in found.values()} == {limit}
    forgets = by_name(gates.decode(look(Rounding(defect="forgets"))))
    assert forgets["decode"].status == "failed"


def test_decode_goes_past_the_window(look: Look, sound: Sound) -> None:
    windowed = replace(sound.model, config=replace(sound.model.config, sliding_window=24))
    evidence = look(model=windowed)
    found = by_name(gates.decode(evidence))
    assert len(evidence.probe) == 3 * 24 + 64
    assert "112 tokens past the window of 24" in found["decode"].reason


def test_decode_does_not_pass_what_it_did_not_reach(look: Look, sound: Sound) -> None:
    windowed = replace(sound.model, config=replace(sound.model.config, sliding_window=100))
    evidence = look(model=windowed, tokens=100)
    assert by_name(gates.decode(evidence))["decode"].status != "passed" or len(evidence.probe) > 100


def test_decode_without_a_runtime_and_with_a_dead_one(look: Look) -> None:
    absent = only(gates.guarded("decode", gates.decode, look(Device(defect="not installed"))))
    assert absent.status == "skipped"
    dead = only(gates.guarded("decode", gates.decode, look(Device(defect="dies"))))
    assert dead.status == "failed"
    assert "was killed by SIGSEGV" in dead.reason


# quality


def measured(original: Logits, quantized: Logits, ids: list[int], limits: Limits, scheme: str) -> Any:
    evidence = SimpleNamespace(
        model=SimpleNamespace(quantization=None),
        quant=SimpleNamespace(scheme=SCHEMES[scheme], schemes={"a": SCHEMES[scheme]}),
        compare=lambda *_: None,
        original=[original],
        quantized=[quantized],
        sequences=[ids],
        scored=list,
        tasks=[],
        text=None,
    )
    return by_name(gates.quality(cast(Evidence, evidence), limits))


# Four tokens of a vocabulary of two. By hand: log-odds 0 against log 3 is p = 1/2 against 3/4.
EVEN = np.zeros((4, 2), np.float32)
THREE = np.array([[np.log(3), 0]] * 4, np.float32)


def test_quality_by_hand() -> None:
    limits = Limits(kl=0.1439, top1=1.0, perplexity=1.3334)
    found = measured(EVEN, THREE, [0, 0, 0, 1], limits, "int4-g32")
    # KL(1/2, 1/2 ‖ 3/4, 1/4) = log(2 / √3); float32 logits carry log 3 to 1e-7.
    assert found["quality/kl"].value == pytest.approx(np.log(2 / np.sqrt(3)), abs=1e-6)
    assert found["quality/top1"].value == 1.0
    # Next tokens 0, 0, 1: (4/3 · 4/3 · 4)^(1/3) over 2.
    assert found["quality/perplexity"].value == pytest.approx((64 / 9) ** (1 / 3) / 2, abs=1e-6)
    assert {gate.status for gate in found.values()} == {"passed"}
    assert found["quality/kl"].reason == "original ‖ dequantized on 4 tokens of text."
    found = measured(EVEN, THREE, [0, 0, 0, 1], limits, "w8a8")
    assert "dequantized, with inputs rounded as w8a8 says, on 4 tokens" in found["quality/kl"].reason


@pytest.mark.parametrize(
    ("name", "limits", "dequantized"),
    [
        ("quality/kl", Limits(kl=0.1438, top1=0.0, perplexity=9.0), THREE),
        ("quality/top1", Limits(kl=9.0, top1=0.76, perplexity=9.0), [[1, 0], [1, 0], [1, 0], [0, 1]]),
        ("quality/perplexity", Limits(kl=9.0, top1=0.0, perplexity=0.96), THREE),
    ],
)
def test_each_limit_of_quality_fails_alone(name: str, limits: Limits, dequantized: Any) -> None:
    found = measured(
        np.array([[1, 0]] * 4, np.float32) if name == "quality/top1" else EVEN,
        np.array(dequantized, np.float32),
        [0, 0, 0, 1],
        limits,
        "int4-g32",
    )
    assert [gate.name for gate in found.values() if gate.status == "failed"] == [name]


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_the_same_logits_pass_every_scheme_and_others_do_not_pass_none(scheme: str) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (64, 50)).astype(np.float32)
    ids = random.integers(0, 50, 64).tolist()
    same = measured(logits, logits.copy(), ids, Limits(), scheme)
    assert {gate.status for gate in same.values()} == {"passed"}
    # Noise of σ costs about σ²/2 nats: 3.1e-2 for 0.25. Above the limits of float and of 5 bits and more, below that of 4.
    noisy = logits + random.normal(0, 0.25, logits.shape).astype(np.float32)
    kl = measured(logits, noisy, ids, Limits(), scheme)["quality/kl"]
    assert kl.status == ("passed" if 0 < SCHEMES[scheme].bits <= 4 else "failed")


def test_limits_for_scheme() -> None:
    four = Limits().for_scheme(SCHEMES["nf4"])
    eight = Limits().for_scheme(SCHEMES["int8"])
    none = Limits().for_scheme(SCHEMES["none"])
    assert (four.kl, eight.kl, none.kl) == (0.1, 2e-3, 1e-9)
    assert (four.perplexity, eight.perplexity, none.perplexity) == (1.08, 1.01, 1.0001)
    # Pinsker: 1 - √(KL / 2).
    assert four.top1 == pytest.approx(1 - np.sqrt(0.05))
    assert eight.top1 == pytest.approx(1 - np.sqrt(1e-3))
    given = Limits(kl=0.02, task=0.5).for_scheme(SCHEMES["int8"])
    assert given == Limits(0.02, pytest.approx(0.9), 1.01, 0.5)
    assert Limits(top1=0.0, perplexity=2.0).for_scheme(SCHEMES["int8"]) == Limits(2e-3, 0.0, 2.0, 0.02)


def test_quality_of_no_text() -> None:
    evidence = SimpleNamespace(
        model=SimpleNamespace(quantization=None),
        quant=SimpleNamespace(scheme=SCHEMES["int8"], schemes={}),
        compare=lambda *_: None,
        original=[],
        quantized=[],
        scored=list,
        sequences=[],
    )
    result = only(gates.guarded("quality", lambda e: gates.quality(e, Limits()), cast(Evidence, evidence)))
    assert result.status == "failed"
    assert "gives no token" in result.reason


# tokenizer


def test_tokenizer_of_a_sound_artifact(look: Look) -> None:
    evidence = look()
    result = only(gates.tokenizer(evidence))
    assert (result.status, result.value, result.limit) == ("passed", 0, 0)
    assert len(evidence.strings) >= 2000
    assert "<eos>" in evidence.strings
    assert str(len(evidence.strings)) in result.reason


def edited(artifact: Artifact, change: Callable[[dict[str, Any]], None]) -> Artifact:
    path = artifact.directory / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return artifact


def swap_two_ids(raw: dict[str, Any]) -> None:
    vocab = raw["model"]["vocab"]
    vocab["x"], vocab["~"] = vocab["~"], vocab["x"]


def forget_the_special_token(raw: dict[str, Any]) -> None:
    raw["added_tokens"][0]["content"] = "</s>"


def add_a_space(raw: dict[str, Any]) -> None:
    raw["pre_tokenizer"]["add_prefix_space"] = True


@pytest.mark.parametrize("change", [swap_two_ids, forget_the_special_token, add_a_space])
def test_tokenizer_that_gives_other_ids(
    look: Look, copied: Artifact, change: Callable[[dict[str, Any]], None]
) -> None:
    result = only(gates.tokenizer(look(artifact=edited(copied, change))))
    assert result.status == "failed"
    assert result.value >= 1
    assert "where the source gives" in result.reason


def test_strings_that_a_format_cuts_otherwise_are_counted_apart(look: Look, copied: Artifact) -> None:
    known = replace(copied, tokenizer_limits=("not-nfc", "hangul"))
    sound, apart = gates.tokenizer(look(artifact=known))
    assert (sound.status, sound.value, apart.name, apart.value) == ("passed", 0, "tokenizer/limits", 0)

    def change(raw: dict[str, Any]) -> None:
        raw["normalizer"] = {"type": "NFC"}

    found, apart = gates.tokenizer(look(artifact=edited(known, change)))
    assert found.status == "passed"
    assert 0 < apart.value < apart.limit
    assert " of " in apart.reason
    assert "NFC" in apart.reason
    without = only(gates.tokenizer(look(artifact=replace(edited(copied, change), tokenizer_limits=()))))
    assert (without.status, without.value) == ("failed", apart.value)


def test_tokenizer_whose_text_alone_differs(look: Look, copied: Artifact) -> None:
    evidence = look(artifact=edited(copied, lambda raw: raw.update(decoder=None)))
    result = only(gates.tokenizer(evidence))
    assert evidence.said.ids == evidence.expected.ids
    assert result.status == "failed"
    assert result.value > 1000
    assert result.reason.startswith("the ids of ")


def said(*pairs: tuple[list[int], str], answers: list[str] | None = None) -> Said:
    return Said([ids for ids, _ in pairs], [text for _, text in pairs], answers or [])


@pytest.mark.parametrize(
    ("found", "value", "told"),
    [
        (said(([1], "a"), ([2, 3], "b")), 0, "2 hostile strings"),
        (said(([1], "a"), ([2, 4], "b")), 1, "'b' gives [2, 4] where the source gives [2, 3]."),
        (said(([1], "a"), ([2], "b")), 1, "'b' gives [2] where the source gives [2, 3]."),
        (said(([1], " a"), ([2, 3], "b")), 1, "the ids of 'a' become ' a', not 'a'."),
        (said(([1], "x"), ([9], "y")), 2, "'b' gives [9] where"),
        (said(([9], "x"), ([2, 3], "b")), 1, "'a' gives [9] where"),  # counted once
    ],
)
def test_one_string_is_enough(found: Said, value: int, told: str) -> None:
    evidence = SimpleNamespace(
        expected=said(([1], "a"), ([2, 3], "b")),
        said=found,
        strings=["a", "b"],
        added_tokens=[],
        gives_text=True,
        artifact=SimpleNamespace(tokenizer_limits=()),
        findings={},
    )
    result = only(gates.tokenizer(cast(Evidence, evidence)))
    assert (result.status, result.value) == ("failed" if value else "passed", value)
    assert result.reason.startswith(told)


# task


def answered(before: list[str], after: list[str], wanted: list[str], limit: float) -> GateResult:
    evidence = SimpleNamespace(
        findings={},
        tasks=[("?", answer) for answer in wanted],
        expected=Said([], [], before),
        said=Said([], [], after),
    )
    return only(gates.task(cast(Evidence, evidence), Limits(task=limit)))


def test_task() -> None:
    right = ["1", "2", "3", "4"]
    assert answered(right, right, right, 0.0).status == "passed"
    assert answered(right, right, [" 1", "2\n", "3", "4"], 0.0).status == "passed"
    lost = answered(right, ["1", "2", "3", "5"], right, 0.02)
    assert (lost.status, lost.value, lost.limit) == ("failed", 0.75, pytest.approx(0.98))
    assert answered(right, ["1", "2", "3", "5"], right, 0.25).status == "passed"
    # What the original does not know, the device need not know.
    assert answered(["0", "0", "0", "4"], ["9", "9", "9", "4"], right, 0.0).status == "passed"
    assert answered(["0", "0", "3", "4"], ["9", "9", "9", "4"], right, 0.0).status == "failed"
    skipped = answered([], [], [], 0.0)
    assert skipped.status == "skipped"
    assert "tasks.jsonl" in skipped.reason


def test_task_of_a_damaged_artifact(look: Look, sound: Sound, copied: Artifact, tmp_path: Path) -> None:
    """The answers that the original gives are the right ones: the artifact with another head gives others."""
    directory = tmp_path / "answering"
    shutil.copytree(sound.model.directory, directory)
    prompts = [f"{i}+{i}=" for i in range(8)]
    path = directory / "tasks.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "answer": ""}) for p in prompts))
    answers = look(model=load(directory)).expected.answers
    assert len(set(answers)) > 1
    rows = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    exact = quantize(load(directory), "none", out=tmp_path / "exact")
    (tmp_path / "float").mkdir()
    artifact = Null().export(exact, tmp_path / "float")
    passed = only(gates.task(look(model=load(directory), quant=exact, artifact=artifact), Limits(task=0.0)))
    assert (passed.status, passed.value, passed.limit) == ("passed", 1.0, 1.0)
    damage(artifact, "lm_head.weight", "weight", lambda weight: np.roll(weight, 1, axis=0))
    failed = only(gates.task(look(model=load(directory), quant=exact, artifact=artifact), Limits(task=0.02)))
    assert failed.status == "failed"
    assert failed.value < 0.98


def test_a_value_that_is_no_number_fails() -> None:
    for value in (float("nan"), float("inf")):
        assert gates._verdict("x", "", value, 1.0, "").status == "failed"
    assert gates._verdict("x", "", float("nan"), 0.0, "", at_least=True).status == "failed"
    assert gates._verdict("x", "", 1.0, 1.0, "").status == "passed"
    assert gates._verdict("x", "", 1.0, 1.0, "", at_least=True).status == "passed"
