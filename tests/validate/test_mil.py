from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.errors import PackageError, TapeoutError
from tapeout.validate import mil

Save = Callable[..., Path]
CONTEXT, WIDTH, CHUNK = 8, 4, 3
RNG = np.random.default_rng(5)
WEIGHTS = [RNG.standard_normal((WIDTH, WIDTH)).astype(np.float16) for _ in range(3)]
TABLE = RNG.standard_normal((11, WIDTH)).astype(np.float16)


def _decoder(save: Save, tokens: int | None) -> Path:
    """One layer of attention over a state; ``tokens``: a fixed number, or None for 1 … CHUNK."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil import types

    size: Any = ct.RangeDim(1, CHUNK, default=CHUNK) if tokens is None else tokens
    ids_type = ct.TensorType("inputIds", (1, size), np.int32)
    mask_type = ct.TensorType("fullAttentionMask", (1, 1, size, ct.RangeDim(1, CONTEXT)), np.float16)

    def body(ids: Any, mask: Any, keys: Any, values: Any) -> Any:
        x = mb.gather(x=TABLE, indices=ids, axis=0, name="embedding")
        query, key, value = (mb.linear(x=x, weight=weight) for weight in WEIGHTS)
        lengths = mb.shape(x=mask)
        count, end = (mb.slice_by_index(x=lengths, begin=[at], end=[at + 1]) for at in (2, 3))
        past = mb.sub(x=end, y=count)
        begin = mb.concat(values=[np.int32([0]), past, np.int32([0])], axis=0)
        until = mb.concat(values=[np.int32([1]), end, np.int32([WIDTH])], axis=0)
        seen = []
        for state, new in ((keys, key), (values, value)):
            written = mb.slice_update(x=mb.read_state(input=state), update=new, begin=begin, end=until)
            held = mb.coreml_update_state(state=state, value=written)
            seen.append(mb.slice_by_index(x=held, begin=[0, 0, 0], end=until))
        scores = mb.matmul(x=query, y=seen[0], transpose_y=True, name="scores")
        chances = mb.softmax(x=mb.add(x=scores, y=mb.squeeze(x=mask, axes=[1])), axis=-1)
        return mb.matmul(x=chances, y=seen[1], name="logits")

    specs = {
        "inputIds": mb.TensorSpec(
            ids_type.shape.symbolic_shape if tokens is None else ids_type.shape.shape, types.int32
        ),
        "fullAttentionMask": mb.TensorSpec(mask_type.shape.symbolic_shape, types.fp16),
        "keyCache": mb.StateTensorSpec((1, CONTEXT, WIDTH), types.fp16),
        "valueCache": mb.StateTensorSpec((1, CONTEXT, WIDTH), types.fp16),
    }
    return save(body, specs, inputs=[ids_type, mask_type])


def _two_functions(save: Save, tmp_path: Path) -> Path:
    import coremltools as ct

    described = ct.utils.MultiFunctionDescriptor()
    described.add_function(str(_decoder(save, None)), "main", "prefill")
    described.add_function(str(_decoder(save, 1)), "main", "decode")
    described.default_function_name = "prefill"
    path = tmp_path / "both.mlpackage"
    ct.utils.save_multifunction(described, str(path))
    return path


def _mask(past: int, count: int) -> Any:
    return np.triu(np.full((1, 1, count, past + count), -1e4, np.float16), past + 1)


def _expected(ids: list[int]) -> Any:
    """The whole sequence at once, float64."""
    x = TABLE.astype(np.float64)[ids]
    query, key, value = (x @ weight.astype(np.float64).T for weight in WEIGHTS)
    scores = np.where(np.tri(len(ids)) > 0, query @ key.T, -np.inf)
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    return chances / chances.sum(-1, keepdims=True) @ value


def _walk(machine: mil.Machine, ids: list[int]) -> Any:
    """Chunks, then one token after another, over one state."""
    state, found = machine.new_state(), []
    cuts = [(0, 3), (3, 5), *((at, at + 1) for at in range(5, len(ids)))]
    for begin, end in cuts:
        inputs = {"inputIds": np.int32([ids[begin:end]]), "fullAttentionMask": _mask(begin, end - begin)}
        found.append(machine.run("decode" if end - begin == 1 else "prefill", inputs, state)["logits"][0])
    return np.concatenate(found)


@pytest.fixture(scope="module")
def both(save: Save, tmp_path_factory: pytest.TempPathFactory) -> mil.Program:
    return mil.load(_two_functions(save, tmp_path_factory.mktemp("both")))


IDS = [3, 1, 10, 4, 1, 5, 9, 2]


@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")  # coremltools' own folders
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestDecoder:
    def test_what_the_package_says_of_itself(self, both: mil.Program) -> None:
        assert (both.default, sorted(both.functions)) == ("prefill", ["decode", "prefill"])
        prefill, decode = both.functions["prefill"], both.functions["decode"]
        assert {name: str(each) for name, each in prefill.inputs.items()} == {
            "inputIds": "int32 [1, 1 … 3]",
            "fullAttentionMask": "fp16 [1, 1, 1 … 3, 1 … 8]",
        }
        assert str(decode.inputs["inputIds"]) == "int32 [1, 1]"
        assert {name: str(each) for name, each in decode.states.items()} == {
            "keyCache": "fp16 [1, 8, 4]",
            "valueCache": "fp16 [1, 8, 4]",
        }
        assert str(prefill.outputs["logits"]) == "fp16 [1, ?, ?]"

    def test_states_carry_over_between_functions(self, both: mil.Program) -> None:
        exact = _walk(mil.Machine(both, exact_states=True), IDS)
        np.testing.assert_allclose(exact, _expected(IDS), rtol=1e-12, atol=1e-12)

    def test_states_are_float16_unless_asked(self, both: mil.Program) -> None:
        found = _walk(mil.Machine(both), IDS)
        # Keys and values lose half a step each: 2**-11 of them, through scores of at most 20 and values of at most 10.
        np.testing.assert_allclose(found, _expected(IDS), atol=(20 + 1) * 2.0**-11 * 10)
        assert np.abs(found - _expected(IDS)).max() > 1e-6
        machine = mil.Machine(both)
        state = machine.new_state()
        machine.run("prefill", {"inputIds": np.int32([[7, 2]]), "fullAttentionMask": _mask(0, 2)}, state)
        assert state["keyCache"].dtype == np.float64
        np.testing.assert_array_equal(state["keyCache"], state["keyCache"].astype(np.float16))
        assert np.any(state["keyCache"][0, :2])
        assert not np.any(state["keyCache"][0, 2:])

    def test_float16_differs_and_is_near(self, both: mil.Program) -> None:
        found = _walk(mil.Machine(both, "float16"), IDS)
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, _expected(IDS), atol=(20 + 1) * 2.0**-9 * 10)
        assert np.any(found != _expected(IDS).astype(np.float16))

    def test_a_copy_of_a_state_is_not_touched(self, both: mil.Program) -> None:
        machine = mil.Machine(both)
        state = machine.new_state()
        machine.run("prefill", {"inputIds": np.int32([[7, 2]]), "fullAttentionMask": _mask(0, 2)}, state)
        copy = dict(state)
        step = {"inputIds": np.int32([[5]]), "fullAttentionMask": _mask(2, 1)}
        first = machine.run("decode", step, state)["logits"]
        np.testing.assert_array_equal(machine.run("decode", step, copy)["logits"], first)

    def test_one_weight_for_both_functions(self, both: mil.Program) -> None:
        machine = mil.Machine(both)
        _walk(machine, IDS)
        held = [each for (each, *_) in machine._weights.values() if not isinstance(each, str)]
        assert sorted(each.shape for each in held if each.ndim == 2) == [(WIDTH, WIDTH)] * 3 + [TABLE.shape]

    def test_intermediate_values_are_shown_and_their_peaks_kept(self, both: mil.Program) -> None:
        machine = mil.Machine(both)
        inputs = {"inputIds": np.int32([[3, 1]]), "fullAttentionMask": _mask(0, 2)}
        found = machine.run(None, inputs, machine.new_state(), show=["embedding", "scores", "inputIds"])
        assert list(found) == ["logits", "embedding", "scores", "inputIds"]
        np.testing.assert_array_equal(found["embedding"], TABLE[[[3, 1]]])
        assert "embedding" not in machine.peaks  # it was only looked up
        assert machine.peaks["scores"] == np.abs(found["scores"]).max()

    @pytest.mark.parametrize(
        ("function", "inputs", "says"),
        [
            ("prefil", {}, r"no function 'prefil'; did you mean 'prefill'\? \(known: decode, prefill\)"),
            ("prefill", {"inputId": np.int32([[1]])}, "takes no 'inputId'; did you mean 'inputIds'"),
            ("prefill", {"inputIds": np.int32([[1]])}, r"lacks its input 'fullAttentionMask', fp16 \[1, 1, 1 … 3, 1 … 8\]"),
            ("prefill", {"inputIds": np.int32([[1] * 4])}, r"is int32 \[1, 1 … 3\]; found int32 \[1, 4\]"),
            ("decode", {"inputIds": np.int32([[1] * 2])}, r"is int32 \[1, 1\]; found int32 \[1, 2\]"),
            ("decode", {"inputIds": np.int64([[1]])}, r"is int32 \[1, 1\]; found int64 \[1, 1\]"),
            ("decode", {"inputIds": np.int32([[1]]), "fullAttentionMask": np.zeros((1, 1, 1, 9), np.float16)}, r"found float16 \[1, 1, 1, 9\]"),
        ],
    )  # fmt: skip
    def test_inputs_that_do_not_fit(self, both: mil.Program, function: str, inputs: Any, says: str) -> None:
        machine = mil.Machine(both)
        with pytest.raises(TapeoutError, match=says):
            machine.run(function, inputs, machine.new_state())

    def test_float32_is_no_float16(self, both: mil.Program) -> None:
        inputs = {"inputIds": np.int32([[3]]), "fullAttentionMask": np.zeros((1, 1, 1, 1), np.float32)}
        machine = mil.Machine(both)
        assert "logits" in machine.run("decode", inputs, machine.new_state())  # in float64 any float serves
        machine = mil.Machine(both, "float16")
        with pytest.raises(
            TapeoutError, match=r"'fullAttentionMask' of function 'decode' is fp16 .* found float32"
        ):
            machine.run("decode", inputs, machine.new_state())

    def test_states_that_do_not_fit(self, both: mil.Program) -> None:
        machine, inputs = mil.Machine(both), {"inputIds": np.int32([[3]]), "fullAttentionMask": _mask(0, 1)}
        with pytest.raises(TapeoutError, match="needs a state: keyCache, valueCache"):
            machine.run("decode", inputs)
        with pytest.raises(TapeoutError, match=r"state 'valueCache' .* is fp16 \[1, 8, 4\]; found none"):
            machine.run("decode", inputs, {"keyCache": np.zeros((1, 8, 4))})
        with pytest.raises(TapeoutError, match=r"state 'keyCache' .*; found \[1, 4, 8\]"):
            machine.run("decode", inputs, {"keyCache": np.zeros((1, 4, 8))})

    def test_an_unknown_value_to_show(self, both: mil.Program) -> None:
        machine = mil.Machine(both)
        inputs = {"inputIds": np.int32([[3]]), "fullAttentionMask": _mask(0, 1)}
        with pytest.raises(TapeoutError, match="'decode' has no value 'score'; did you mean 'scores'"):
            machine.run("decode", inputs, machine.new_state(), show=["score"])

    def test_a_token_that_is_not_in_the_table(self, both: mil.Program) -> None:
        machine = mil.Machine(both)
        inputs = {"inputIds": np.int32([[11]]), "fullAttentionMask": _mask(0, 1)}
        with pytest.raises(
            PackageError, match=r"function 'decode', 'embedding' \(gather\): indices 11 … 11 of an axis of 11"
        ):
            machine.run("decode", inputs, machine.new_state())


def _plain(save: Save, scale: float = 1.0) -> Path:
    from coremltools.converters.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil import types

    def body(x: Any) -> Any:
        square = mb.square(x=mb.mul(x=x, y=np.float16(scale)), name="squared")
        mean = mb.reduce_mean(x=square, axes=[-1], keep_dims=True, name="mean")
        return mb.mul(x=x, y=mb.rsqrt(x=mean, epsilon=np.float16(2**-14)), name="y")

    return save(body, {"x": mb.TensorSpec((2, 16), types.fp16)})


def test_an_overflow_is_infinite_and_its_peak_says_how_far(save: Save) -> None:
    """The RMSNorm that float16 cannot hold: 300² is more than 65504."""
    program = mil.load(_plain(save, 100.0))
    x = np.full((2, 16), 3.0, np.float16)
    half = mil.Machine(program, "float16")
    found = half.run(None, {"x": x}, show=["squared"])
    assert np.all(np.isinf(found["squared"]))
    assert not np.any(found["y"])
    assert half.peaks["squared"] == 90000 > mil.LARGEST
    double = mil.Machine(program)
    np.testing.assert_allclose(double.run(None, {"x": x})["y"], 0.01, rtol=1e-8)
    assert double.overflows() == {"squared": 90000.0, "mean": 90000.0}
    assert half.overflows() == {"squared": 90000.0}  # the mean is of infinities, which are no magnitude
    assert not double.overflows(share=1.5)


def test_peaks_are_of_all_runs(save: Save) -> None:
    machine = mil.Machine(mil.load(_plain(save)))
    for size in (2.0, 5.0, 1.0):
        machine.run(None, {"x": np.full((2, 16), -size, np.float16)})
    assert machine.peaks["squared"] == 25


def test_a_rounding_that_nobody_does_would_show(save: Save) -> None:
    """x² is rounded before its mean is taken: the mean of float16 squares, not of exact ones."""
    x = (np.arange(32, dtype=np.float16) / 32 + 1).reshape(2, 16)
    found = mil.Machine(mil.load(_plain(save)), "float16").run(None, {"x": x}, show=["mean"])["mean"]
    squares = x.astype(np.float32) ** 2
    rounded = squares.astype(np.float16).astype(np.float32).mean(-1, keepdims=True).astype(np.float16)
    np.testing.assert_array_equal(found, rounded)


def _edited(path: Path, edit: Callable[[Any], None]) -> Path:
    """The package with its program changed."""
    from coremltools.proto import Model_pb2

    file = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    model = Model_pb2.Model.FromString(file.read_bytes())
    edit(model)
    file.write_bytes(model.SerializeToString())
    return path


def _block(model: Any) -> Any:
    return model.mlProgram.functions["main"].block_specializations["CoreML8"]


def _operation(model: Any, op: str) -> Any:
    return next(each for each in _block(model).operations if each.type == op)


def _rename(op: str, name: str) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        _operation(model, op).type = name

    return edit


def _extra(model: Any) -> None:
    _operation(model, "rsqrt").inputs["alpha"].CopyFrom(_operation(model, "rsqrt").inputs["epsilon"])


def _lost(model: Any) -> None:
    del _operation(model, "square").inputs["x"]


def _other_size(model: Any) -> None:
    _operation(model, "square").outputs[0].type.tensorType.dimensions[1].constant.size = 17


def _other_type(model: Any) -> None:
    from coremltools.proto import MIL_pb2

    _operation(model, "square").outputs[0].type.tensorType.dataType = MIL_pb2.BFLOAT16


def _integer(model: Any) -> None:
    from coremltools.proto import MIL_pb2

    _operation(model, "square").outputs[0].type.tensorType.dataType = MIL_pb2.INT32


def _six_axes(model: Any) -> None:
    shape = _operation(model, "square").outputs[0].type.tensorType.dimensions
    for _ in range(4):
        shape.add().constant.size = 1


def _dangling(model: Any) -> None:
    _operation(model, "square").inputs["x"].arguments[0].name = "nothing"


def _twice(model: Any) -> None:
    _operation(model, "square").outputs[0].name = "x"


def _old(model: Any) -> None:
    model.mlProgram.functions["main"].opset = "CoreML5"


def _undescribed(model: Any) -> None:
    model.description.input[0].name = "z"


def _misdescribed(model: Any) -> None:
    model.description.input[0].type.multiArrayType.shape[1] = 15


def _network(model: Any) -> None:
    model.neuralNetwork.SetInParent()


def _elsewhere(model: Any) -> None:
    value = _operation(model, "const").attributes["val"]
    value.ClearField("immediateValue")
    value.blobFileValue.fileName = "@model_path/../../secret.bin"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_rename("rsqrt", "rsqrd"), r"function 'main', '.*' \(rsqrd\): the interpreter does not know this op; did you mean 'rsqrt'"),
        (_rename("square", "coreml_update_state"), "is saved as write_state and read_state"),
        (_extra, r"\(rsqrt\): has a parameter 'alpha' that is not known \(known: x, epsilon\)"),
        (_lost, r"'squared' \(square\): lacks its parameter 'x'"),
        (_other_size, r"'squared' is declared fp16 \[2, 17\], found float64 \[2, 16\]"),
        (_integer, r"'squared' is declared int32 \[2, 16\], found float64 \[2, 16\]"),
        (_other_type, "'squared': is of bfloat16; known: bool, fp16"),
        (_six_axes, "'squared' has rank 6; Core ML knows at most 5"),
        (_dangling, r"'squared' \(square\): reads 'nothing', which nothing has made"),
        (_twice, "makes 'x' a second time"),
        (_old, "is of opset CoreML5; known: CoreML7, CoreML8, CoreML9"),
        (_undescribed, r"takes \['x'\], and \['z'\] are described"),
        (_misdescribed, r"input 'x': is described as fp16 \[2, 15\], the function takes fp16 \[2, 16\]"),
        (_network, "is a neuralNetwork, not an mlProgram"),
        (_elsewhere, "its value lies in '@model_path/../../secret.bin', which is not in the package"),
    ],
)  # fmt: skip
def test_a_program_that_is_wrong_stops_by_name(save: Save, edit: Callable[[Any], None], says: str) -> None:
    path = _edited(_plain(save), edit)
    with pytest.raises(PackageError, match=says):
        mil.Machine(mil.load(path)).run(None, {"x": np.ones((2, 16), np.float16)})


def test_files_that_are_missing_or_none(save: Save, tmp_path: Path) -> None:
    path = _plain(save)
    model = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    whole = model.read_bytes()
    model.write_bytes(b"\xff" * 40)
    with pytest.raises(PackageError, match="is not a Core ML model"):
        mil.load(path)
    model.unlink()
    with pytest.raises(PackageError, match=r"model.mlmodel is missing"):
        mil.load(path)
    model.write_bytes(whole)
    manifest = json.loads((path / "Manifest.json").read_text())
    del manifest["rootModelIdentifier"]
    (path / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match="names no model"):
        mil.load(path)
    with pytest.raises(PackageError, match="names no model"):
        mil.load(tmp_path / "none.mlpackage")


def test_a_weight_file_that_is_missing_or_cut(save: Save) -> None:
    path = _decoder(save, 1)
    weights = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    machine = mil.Machine(mil.load(path))
    inputs = {"inputIds": np.int32([[3]]), "fullAttentionMask": _mask(0, 1)}
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-20])
    with pytest.raises(
        PackageError, match=r"weight.bin, blob at byte \d+: its data .* it was cut or altered"
    ):
        machine.run(None, inputs, machine.new_state())
    weights.unlink()
    machine = mil.Machine(mil.load(path))
    with pytest.raises(PackageError, match=r"weight.bin cannot be read"):
        machine.run(None, inputs, machine.new_state())


def test_states_of_one_name_have_one_type(save: Save) -> None:
    def edit(model: Any) -> None:
        first = model.mlProgram.functions["main"]
        second = model.mlProgram.functions["other"]
        second.CopyFrom(first)
        for name in ("main", "other"):
            described = model.description.functions.add()
            described.name = name
            for kind in ("input", "output", "state"):
                getattr(described, kind).extend(getattr(model.description, kind))
        for kind in ("input", "output", "state"):
            model.description.ClearField(kind)
        state = next(each for each in second.inputs if each.name == "keyCache")
        state.type.stateType.wrappedType.tensorType.dimensions[1].constant.size = 9

    path = _edited(_decoder(save, 1), edit)
    with pytest.raises(
        PackageError, match=r"state 'keyCache' is fp16 \[1, 8, 4\] in 'main' and fp16 \[1, 9, 4\] in 'other'"
    ):
        mil.load(path)


def test_shapes_that_are_listed(save: Save) -> None:
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil import types

    listed = ct.TensorType("x", ct.EnumeratedShapes([(2, 16), (2, 32)]), np.float16)
    spec = mb.TensorSpec(listed.shape.symbolic_shape, types.fp16)
    program = mil.load(save(lambda x: mb.abs(x=x, name="y"), {"x": spec}, inputs=[listed]))
    assert str(program.functions["main"].inputs["x"]) == "fp16 [2, 16] or [2, 32]"
    machine = mil.Machine(program)
    assert machine.run(None, {"x": np.ones((2, 32), np.float16)})["y"].shape == (2, 32)
    with pytest.raises(TapeoutError, match=r"found float16 \[2, 24\]"):
        machine.run(None, {"x": np.ones((2, 24), np.float16)})


def test_what_its_maker_said(save: Save) -> None:
    def edit(model: Any) -> None:
        model.description.metadata.author = "Ada"
        model.description.metadata.license = "MIT"
        model.description.metadata.shortDescription = "a norm"
        model.description.metadata.userDefined["co.tapeout.scheme"] = "int4-g32"
        model.description.input[0].shortDescription = "what is normed"

    program = mil.load(_edited(_plain(save), edit))
    assert (program.author, program.licence, program.description) == ("Ada", "MIT", "a norm")
    assert program.metadata["co.tapeout.scheme"] == "int4-g32"
    assert program.features["x"] == "what is normed"


@pytest.mark.slow
def test_a_program_is_read_without_torch_and_all_of_coremltools_is_there_for_who_asks(save: Save) -> None:
    code = (
        "import sys; from tapeout.validate import mil; mil.load(sys.argv[1]); assert 'torch' not in sys.modules\n"
        "import coremltools; coremltools.utils.load_spec(sys.argv[1]); mil.load(sys.argv[1])"
    )
    command = [sys.executable, "-P", "-W", "ignore", "-c", code, str(_plain(save))]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
