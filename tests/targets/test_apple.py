"""The apple target's sessions, in this process where that shows it, and gates that find what is planted in its exporter."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import tapeout
from safetensors.numpy import load_file, save_file
from thinned import thinned

from tapeout.diff import diff
from tapeout.errors import MissingToolchain, PackageError, RuntimeCrash, TapeoutError
from tapeout.exporters import Artifact
from tapeout.exporters.coreml import blocks, emitter
from tapeout.exporters.coreml.emitter import DecoderOps
from tapeout.exporters.coreml.program import WEIGHTS, library
from tapeout.models import Model, load
from tapeout.pack import pack
from tapeout.quantize import Quantized, quantize
from tapeout.recipe import Recipe
from tapeout.targets.apple import Apple
from tapeout.targets.coreml import CoremlDecoder, CoremlEncoder, open_session, open_traced
from tapeout.validate import GateResult, Report, gates, primitives, reference
from tapeout.validate.encoder_evidence import EncoderEvidence
from tapeout.validate.encoders import EncoderReference
from tapeout.validate.evidence import Evidence

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
try:
    library()
except MissingToolchain:
    pytest.skip("coremltools is not installed", allow_module_level=True)

MakeModel = Callable[..., Path]
MAC = Path(__file__).parents[1] / "support" / "mac" / "coremltools" / "__init__.py"
CONTEXT, CHUNK = 64, 8
IDS = [(i * 37 + 11) % 256 for i in range(30)]
TEXT = "A package is right before it ever meets a Mac, or it says what is wrong with it. " * 3
# Both compute in float64; the file's cosines, sines and scales are float32, off by 2^-25 of themselves: some ten factors a layer, and
# the largest of thousands of such errors by four times that. Logits cross as float32.
TOLERANCE = 2 * 10 * 2**-25 * 4


@dataclass(frozen=True)
class Made:
    target: Apple
    model: Model
    quant: Quantized
    artifact: Artifact

    def open(self, **arguments: Any) -> Any:
        return open_session(str(self.artifact.directory), **({"precision": "float64"} | arguments))

    def reference(self) -> Any:
        """transformers in float64, with what the file has."""
        halves = self.target.lowerings(self.artifact, self.quant, Path())[0].halves
        return reference.open_session(
            str(self.model.directory), str(self.quant.directory), "float64", halves=halves
        )


Make = Callable[..., Made]


def export(directory: Path, out: Path, scheme: str = "int4-g32", **options: Any) -> Made:
    target = Apple(**({"prefill_chunk": CHUNK} | options))
    quant = quantize(load(directory), scheme, out=out.with_name(f"{out.name}-codes"))
    (out / "artifact").mkdir()
    return Made(target, quant.model, quant, target.export(quant, out / "artifact"))


@pytest.fixture
def make(make_model: MakeModel, tmp_path: Path) -> Make:
    """``make("mistral", "int8", {"sliding_window": 8}, chunks=2)``."""

    def made(
        family: str = "llama", scheme: str = "int4-g32", fields: Any = None, name: str = "one", **options: Any
    ) -> Made:
        if not family.startswith("efficient"):
            fields = {"max_position_embeddings": CONTEXT, "dtype": "F32"} | (fields or {})
        (tmp_path / name).mkdir()
        return export(
            make_model(family, name=f"{name}-model", **fields or {}), tmp_path / name, scheme, **options
        )

    return made


def far(found: Any, wanted: Any) -> float:
    """The largest difference, in deviations of what is wanted."""
    assert found.shape == wanted.shape
    return float(np.abs(np.float64(found) - wanted).max() / np.std(wanted))


# Sessions


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(
    ("family", "fields"),
    thinned([("gemma2", {"sliding_window": 8}), ("llama", {}), ("mistral", {"sliding_window": 8})]),
)
def test_a_session_gives_what_transformers_gives(make: Make, family: str, fields: Any, chunks: int) -> None:
    """Over several chunks, token by token past the window, appended, and again from the start."""
    made = make(family, fields=fields, chunks=chunks)
    assert len(list(made.artifact.directory.glob("*.mlpackage"))) == chunks
    session, expected = made.open(), made.reference()
    assert isinstance(session, CoremlDecoder)
    wanted = expected.prefill(IDS)
    assert far(session.prefill(IDS), wanted) < TOLERANCE  # four chunks
    session.reset()
    roads = [
        session.prefill(IDS[:3]),
        [session.decode(token) for token in IDS[3:20]],
        session.append(IDS[20:]),
    ]
    assert [len(rows) for rows in roads] == [3, 17, 1]
    assert far(np.concatenate(roads), wanted[[*range(20), 29]]) < TOLERANCE
    session.reset()
    assert far(session.append(IDS[:5]), wanted[4:5]) < TOLERANCE
    assert session.facts.emulated
    session.close()
    session.close()


def test_a_batch_of_two(make: Make) -> None:
    made = make(batch_size=2)
    assert far(made.open().prefill(IDS[:11]), made.reference().prefill(IDS[:11])) < TOLERANCE


def test_float16_is_another_one(make: Make) -> None:
    """Some sixty roundings of 2^-12 in a row, at random, and the largest of thousands; it is no float64 either."""
    made = make()
    off = far(made.open(precision="float16").prefill(IDS), made.open().prefill(IDS))
    assert 100 * TOLERANCE < off < 60**0.5 * 2**-12 * 8


def test_what_a_session_is_not_asked(make: Make) -> None:
    session = make().open()
    assert session.prefill([]).shape == (0, 272)
    with pytest.raises(TapeoutError, match=r"^65 tokens do not fit the context of 64\.$"):
        session.prefill([1] * 65)
    session.prefill([1] * 63)
    session.decode(2)
    for call in (lambda: session.decode(3), lambda: session.append([3])):
        with pytest.raises(TapeoutError, match="65 tokens do not fit the context of 64"):
            call()
    session.reset()
    for ids in ([4, 272], [-1]):
        with pytest.raises(
            TapeoutError, match=rf"token ids from {min(ids)} to {max(ids)} are not all in the voc"
        ):
            session.prefill(ids)
    with pytest.raises(TapeoutError, match="are not all in the vocabulary of 272"):
        session.detokenize([300])
    with pytest.raises(TapeoutError, match="since it is not Unicode"):
        session.tokenize("\ud800")
    with pytest.raises(TapeoutError, match="no token is appended"):
        session.append([])


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_batches_of_an_encoder_need_not_divide(make: Make, batch: int) -> None:
    made = make("bert", "int8", batch_size=batch)
    session, expected = made.open(), made.reference()
    assert isinstance(session, CoremlEncoder)
    assert isinstance(expected, EncoderReference)
    ids = [[5 + (i * 31 + 7 * row) % 240 for i in range(9)] for row in range(5)]
    mask = [[1] * (9 - row) + [0] * row for row in range(5)]
    real = np.array(mask) == 1
    assert far(session.encode(ids, mask)[real], expected.encode(ids, mask)[real]) < TOLERANCE
    with pytest.raises(TapeoutError, match="65 tokens do not fit the context of 64"):
        session.encode([[1] * 65], [[1] * 65])


# Files that are not as they should be


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def record(path: Path) -> None:
    flip(path, 64)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("model_2_of_2.mlpackage", shutil.rmtree, r"model_2_of_2\.mlpackage is absent; there is nothing to load"),
        ("tokenizer.json", Path.unlink, r"tokenizer\.json is absent; there is nothing to tokenize with"),
        (f"model_1_of_2.mlpackage/{WEIGHTS}", Path.unlink, r"weight\.bin"),
        (f"model_2_of_2.mlpackage/{WEIGHTS}", cut, r"weight\.bin, blob at byte \d+: .*; it was cut or altered"),
        (f"model_1_of_2.mlpackage/{WEIGHTS}", record, r"weight\.bin, blob at byte 64: no record is there"),
    ],
)  # fmt: skip
def test_a_package_that_is_not_whole(make: Make, name: str, damage: Callable[[Path], Any], told: str) -> None:
    made = make(chunks=2)
    damage(made.artifact.directory / name)
    with pytest.raises(PackageError, match=told):
        made.open().prefill(IDS)


def test_a_package_of_the_masks_old_name(make: Make) -> None:
    from coremltools.proto import Model_pb2
    from google.protobuf import text_format

    made = make()
    path = next(made.artifact.directory.rglob("model.mlmodel"))
    words = text_format.MessageToString(Model_pb2.Model.FromString(path.read_bytes()))
    assert words.count('"fullAttentionMask"') > 3
    old = text_format.Parse(words.replace('"fullAttentionMask"', '"causalMask"'), Model_pb2.Model())
    path.write_bytes(old.SerializeToString())
    for opened in (made.open, lambda: open_traced(str(made.artifact.directory))):
        with pytest.raises(
            PackageError, match=r"wants causalMask in .* causalMask was named fullAttentionMask"
        ):
            opened()


def test_an_altered_code_is_one_tensor(make: Make) -> None:
    """Numbers that could be right load; the codes gate has them all in sight."""
    made = make()
    weights = made.artifact.directory / "model.mlpackage" / WEIGHTS
    sound = weights.read_bytes()
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        begin = sound.index((made.quant[name].packed ^ np.uint8(0x88)).tobytes())  # signed codes there
        flip(weights, begin + 37)
        made.open().prefill(IDS[:3])
        (found,) = gates.codes(Evidence(made.artifact, made.model, made.quant, made.target, weights.parent))
        weights.write_bytes(sound)
        assert (found.status, found.value) == ("failed", 1)
        assert found.reason.startswith(f"{name}: 2 of ")


# Range


def loud(directory: Path, factor: float) -> Path:
    """A norm so large that what the MLP behind it makes is, too; the last norm takes it back."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.post_attention_layernorm.weight"] *= np.float32(factor)
    save_file(tensors, path, {"format": "pt"})
    return directory


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_value_beyond_float16_is_named(make_model: MakeModel, tmp_path: Path, chunks: int) -> None:
    (tmp_path / "one").mkdir()
    made = export(loud(make_model(dtype="F32"), 2000), tmp_path / "one", chunks=chunks)
    exact = made.open()
    assert far(exact.prefill(IDS), made.reference().prefill(IDS)) < TOLERANCE
    peaks = exact.peaks()
    assert peaks["layers.1.mlp.inner"] > 65504
    assert peaks["layers.0.mlp.inner"] < 1000
    told = r"^layers\.1\.mlp\.\w+ reaches \d+, which float16 \(up to 65504\) cannot hold: on a device it is infinite\.$"
    with pytest.raises(RuntimeCrash, match=told):
        made.open(precision="float16").prefill(IDS)


# Gates


def gathered(made: Made, work: Path, kind: type[Evidence] = Evidence) -> Evidence:
    text = work / "text.txt"
    text.write_text(TEXT)
    scratch = work / f"scratch-{len(list(work.iterdir()))}"
    scratch.mkdir()
    return kind(made.artifact, made.model, made.quant, made.target, scratch, text, 160)


@pytest.fixture
def judged(tmp_path: Path) -> Iterator[Callable[..., dict[str, GateResult]]]:
    """``judged(made)`` runs the gates that look at numbers, and gives them by name."""
    opened: list[Evidence] = []

    def judge(made: Made, kind: type[Evidence] = Evidence) -> dict[str, GateResult]:
        evidence = gathered(made, tmp_path, kind)
        opened.append(evidence)
        found = [
            *gates.guarded("codes", gates.codes, evidence),
            *gates.guarded("lowering", gates.lowering, evidence),
        ]
        if kind is Evidence:
            found += gates.guarded("decode", gates.decode, evidence)
        return {gate.name: gate for gate in found}

    yield judge
    for evidence in opened:
        evidence.close()


def failed(found: dict[str, GateResult]) -> set[str]:
    assert {gate.status for gate in found.values()} <= {"passed", "failed"}
    return {name for name, gate in found.items() if gate.status == "failed"}


def test_a_sound_package_passes(make: Make, judged: Any) -> None:
    found = judged(make())
    assert failed(found) == set(), [gate.reason for gate in found.values()]
    assert list(found)[:4] == ["codes", "lowering/weights", "lowering/range", "lowering/runtime"]
    room = found["lowering/range"]
    assert 0 < room.value < 0.01
    assert room.reason.count(", ") >= 3


def test_a_sound_encoder_passes(make: Make, judged: Any) -> None:
    found = judged(make("bert", "int8", batch_size=3), EncoderEvidence)
    assert failed(found) == set(), [gate.reason for gate in found.values()]
    assert 0 < found["lowering/range"].value < 0.5


@pytest.mark.slow
def test_what_has_less_room_than_a_bit_is_named(make_model: MakeModel, tmp_path: Path, judged: Any) -> None:
    """Gate and up of the MLP grow as the norm before them, and their product as its square."""
    peak, wanted, before = "layers.1.mlp.inner", 0.7 * 65504, 200.0
    (tmp_path / "first").mkdir()
    first = export(loud(make_model(name="first-model", dtype="F32"), before), tmp_path / "first")
    found = judged(first)
    factor = before * (wanted / (found["lowering/range"].value * 65504)) ** 0.5
    (tmp_path / "second").mkdir()
    made = export(loud(make_model(name="second-model", dtype="F32"), factor), tmp_path / "second")
    found = judged(made)
    assert failed(found) == {"lowering/range"}, [gate.reason for gate in found.values()]
    assert 0.5 < found["lowering/range"].value < 1
    assert f"values have less room than one bit. {peak} 4" in found["lowering/range"].reason


def other_pairs(self: DecoderOps, x: Any, rope: Any, cos: Any, sin: Any) -> Any:
    """Neighbours for halves."""
    return rotate(self, x, replace(rope, interleaved=not rope.interleaved), cos, sin)


def one_late(self: DecoderOps, window: int | None, shared: int) -> Any:
    """The mask lets each token see the next one."""
    positions = self._positions
    self._positions = emitter.builder().add(x=positions, y=np.int32(1))
    found = mask(self, window, shared)
    self._positions = positions
    return found


def read_twice(self: DecoderOps, cache: str, layer: int, new: Any, window: int | None) -> Any:
    """Attention looks at a second read of the state, made before it is written."""
    mb, state, at = emitter.builder(), self.states[cache], self.places[layer]
    _, batch, heads, _, width = (int(n) for n in state.sym_type.wrapped_type().get_shape())
    before = mb.read_state(input=state)
    kept(self, cache, layer, new, window)
    sizes = [np.int32(at + 1), np.int32(batch), np.int32(heads), self._total, np.int32(width)]
    return mb.slice_by_index(
        x=before, begin=[at, 0, 0, 0, 0], end=mb.concat(values=sizes, axis=0), end_mask=[False, True, True, False, True],
        squeeze_mask=[True] + [False] * 4,
    )  # fmt: skip


def turned(tensor: Any) -> Any:
    """Scales of rows in the order of columns."""
    found = scales(tensor)
    return np.ascontiguousarray(found.T).reshape(found.shape)


rotate, mask, kept, scales = DecoderOps._rotate, DecoderOps._mask, DecoderOps._kept, blocks.scales


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "method", "fault", "gates_", "told"),
    [
        (DecoderOps, "_rotate", other_pairs, {"lowering/weights", "lowering/runtime"}, "layers.0.attention.rope"),
        (DecoderOps, "_mask", one_late, {"lowering/weights", "lowering/runtime", "decode"}, "layers.0.attention.scores"),
        (DecoderOps, "_kept", read_twice, {"lowering/weights", "lowering/runtime", "decode"}, "layers.0.attention.scores"),
        (blocks, "scales", turned, {"codes", "lowering/weights", "lowering/runtime"}, "layers.0.attention.q "),
    ],
    ids=["rotation", "mask", "state", "scale"],
)  # fmt: skip
def test_what_is_planted_in_the_emitter_fails_gates(
    make: Make,
    judged: Any,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    method: str,
    fault: Any,
    gates_: set[str],
    told: str,
) -> None:
    monkeypatch.setattr(owner, method, fault)
    found = judged(make())
    assert gates_ <= failed(found), {name: (gate.status, gate.value) for name, gate in found.items()}
    assert f"The first primitive that parts is {told}" in found["lowering/weights"].reason


@pytest.mark.slow
def test_diff_names_what_is_planted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name in ("sound", "planted"):
        if name == "planted":
            monkeypatch.setattr(DecoderOps, "_rotate", other_pairs)
        made = make(name=name)
        report = Report("one", "apple", "int4-g32", ())
        package = pack(made.artifact, report, made.quant, made.target, Recipe().kept(made.quant)).directory
        found[name] = diff(str(package), str(made.model.directory), "Pairs.").divergence
    assert found["sound"].first is None
    assert found["planted"].first.name == "layers.0.attention.rope"
    assert "layers.0.attention.rope" in found["planted"].words()


# What is seen on the way


@pytest.mark.parametrize(("family", "chunks"), [("llama", 1), ("llama", 2), ("bert", 1)])
def test_a_traced_session_shows_the_graph(make: Make, tmp_path: Path, family: str, chunks: int) -> None:
    made = make(family, chunks=chunks)
    session = open_traced(str(made.artifact.directory))
    tokens = 7
    assert session.facts.context == (CONTEXT if family == "bert" else CHUNK)
    (tmp_path / "graph").mkdir()
    shown = session.trace(IDS[:tokens], str(tmp_path))
    values = {name: np.load(tmp_path / f"{name}.npy") for name in shown}
    graph = primitives.open_session(str(made.model.directory), str(made.quant.directory))
    wanted = graph.trace(IDS[:tokens], str(tmp_path / "graph"))
    # All of the graph's; an encoder's states are its last layer's, and have the function's own name.
    assert wanted.keys() - shown.keys() == ({"last_hidden_state"} if family == "bert" else set())
    for name in shown.keys() & wanted.keys():
        assert values[name].dtype == np.float32
        assert values[name].shape == np.load(tmp_path / "graph" / f"{name}.npy").shape, name
    if family == "llama":
        hidden = np.isnan(values["layers.0.attention.scores"])
        assert (hidden == ~np.tri(tokens, dtype=bool)).all()
        assert far(values["logits"], made.open().prefill(IDS[:tokens])) < 1e-6
    with pytest.raises(
        TapeoutError, match=f"{CONTEXT + 1} tokens do not fit the {session.facts.context} of one call"
    ):
        session.trace([1] * (CONTEXT + 1), str(tmp_path))
    session.close()


# On a Mac that is none


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """``mac()`` makes this a Mac with the Core ML of the stand-in; packages are written before it."""

    def become() -> None:
        spec = importlib.util.spec_from_file_location("coremltools", MAC)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, "coremltools", module)
        monkeypatch.setattr(platform, "system", lambda: "Darwin")
        monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))

    return become


@pytest.mark.parametrize("chunks", [1, 2])
def test_core_ml_shares_a_state(
    make: Make, mac: Callable[[], None], monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    """What prefill has seen decode goes on with; the stand-in computes as the interpreter in float16 does."""
    made = make(chunks=chunks)
    mac()
    assert made.target.session(made.artifact).arguments["units"] == "cpu-and-gpu"
    session, emulated = made.open(units="cpu-and-gpu"), made.open(precision="float16")
    assert (session.facts.runtime, session.facts.emulated) == ("Core ML, macOS 15.1", False)
    assert session.facts.device.endswith(", cpu-and-gpu")
    for _ in range(2):
        for call in (
            lambda s: s.prefill(IDS[:11]),
            lambda s: s.decode(IDS[11]),
            lambda s: s.append(IDS[12:14]),
        ):
            assert np.array_equal(call(session), call(emulated))
        session.reset()
        emulated.reset()
    monkeypatch.setenv("FAULT", "fresh CPU_AND_GPU")  # a decode that does not share it is another one
    apart = made.open(units="cpu-and-gpu")
    apart.prefill(IDS[:11])
    emulated.prefill(IDS[:11])
    assert not np.array_equal(apart.decode(IDS[11]), emulated.decode(IDS[11]))


def test_core_ml_runs_an_encoder(make: Make, mac: Callable[[], None]) -> None:
    made = make("bert", "int8", batch_size=2)
    mac()
    batch = [[5, 6, 7]] * 3, [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    native, emulated = made.open(units="all"), made.open(precision="float16")
    assert np.array_equal(native.encode(*batch), emulated.encode(*batch))


def test_what_core_ml_refuses(make: Make, mac: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    made = make()
    mac()
    monkeypatch.setenv("FAULT", "load ALL")
    with pytest.raises(
        RuntimeCrash, match=r"^Core ML refuses .*model\.mlpackage: You will not .* was: no plan$"
    ):
        made.open(units="all")
    monkeypatch.setenv("FAULT", "owner ALL")
    session = made.open(units="all")
    session.prefill(IDS[:3])
    with pytest.raises(RuntimeCrash, match=r"^Core ML cannot run decode: the state is of another model$"):
        session.decode(3)


def test_core_ml_is_on_macos_only(make: Make) -> None:
    made = make()
    assert made.target.session(made.artifact).arguments["units"] is None
    with pytest.raises(MissingToolchain, match=r"Core ML is on macOS only: run check\.py of the package"):
        made.open(units="all")


def test_speed_is_not_measured_where_there_is_no_device(make_model: MakeModel, tmp_path: Path) -> None:
    recipe = tmp_path / "loose.toml"
    recipe.write_text('scheme = "int8"\ntokens = 64\nlimits = {kl = 1e3, top1 = 0.0, perplexity = 1e3}\n')
    model = make_model(max_position_embeddings=CONTEXT, dtype="F32")
    options = ("--recipe", recipe, "--out", tmp_path / "out", "--prefill-chunk", "16")
    tapeout("export", "apple", model, *options, status=0)
    report = Report.read(tmp_path / "out" / "report.json")
    assert report.passed
    assert report.throughput == {}
    assert "lowering/range" in {gate.name for gate in report.gates}
    assert any("not run on Apple hardware" in note for note in report.notes)
    done = tapeout("bench", tmp_path / "out", status=3)
    assert "here it runs on an interpreter of MIL, float16, whose speed says nothing of a device" in " ".join(
        done.stderr.split()
    )
