"""Matrix files: which cells they mean, what cells are called, and every way to get one wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapeout import targets
from tapeout.errors import RecipeError, SchemeError, TapeoutError
from tapeout.matrix.cells import Cell
from tapeout.matrix.file import Matrix

SMALL = """
[matrix]
models = ["count", "arithmetic"]
schemes = ["int8", "nf4"]
targets = ["cpu", "null"]
"""


def written(directory: Path, text: str, name: str = "matrix.toml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def cells(directory: Path, text: str) -> list[str]:
    return [cell.name for cell in Matrix.read(written(directory, text)).cells()]


def test_cells_are_the_product_in_the_files_order(tmp_path: Path) -> None:
    assert cells(tmp_path, SMALL) == [
        "count.int8.rtn.cpu", "count.int8.rtn.null", "count.nf4.rtn.cpu", "count.nf4.rtn.null",
        "arithmetic.int8.rtn.cpu", "arithmetic.int8.rtn.null", "arithmetic.nf4.rtn.cpu", "arithmetic.nf4.rtn.null",
    ]  # fmt: skip


def test_excludes_go_first_and_includes_come_beside(tmp_path: Path) -> None:
    text = SMALL + (
        '[[exclude]]\nmodel = "arith*"\n[[exclude]]\nscheme = ["nf4", "q*"]\ntarget = "null"\n'
        '[[include]]\nmodel = "arithmetic"\nscheme = "int8"\nrounding = "hqq"\ntarget = "cp*"\n'
        '[[include]]\nmodel = "count"\nscheme = "int8"\ntarget = {target = "cpu", format = "onnx"}\n'
    )
    assert cells(tmp_path, text) == [
        "count.int8.rtn.cpu", "count.int8.rtn.null", "count.nf4.rtn.cpu", "arithmetic.int8.hqq.cpu", "count.int8.rtn.cpu-onnx",
    ]  # fmt: skip


def test_all_is_every_format_of_every_target(tmp_path: Path) -> None:
    found = Matrix.read(written(tmp_path, '[matrix]\nmodels = ["count"]\ntargets = ["all"]\n')).cells()
    ways = {way for name in targets.names() for way in targets.variants(name).values()}
    assert {cell.device() for cell in found} == ways
    assert len(found) == len(ways)
    assert {"count.default.rtn.cpu", "count.default.rtn.cpu-onnx", "count.default.rtn.rocm-iree"} < {
        c.name for c in found
    }


def test_options_are_in_the_name_and_reach_the_target(tmp_path: Path) -> None:
    said = '{target = "nvidia", format = "trtllm", tensor_parallel = 2}, {target = "cpu", context = 64, name = "short"}'
    one, other = Matrix.read(written(tmp_path, f'[matrix]\nmodels = ["count"]\ntargets = [{said}]\n')).cells()
    assert (one.name, other.name) == (
        "count.default.rtn.nvidia-trtllm-tensor-parallel-2",
        "count.default.rtn.short",
    )
    assert targets.options(one.device()) == {"format": "trtllm", "tensor_parallel": 2}
    assert targets.options(other.device()) == {"context": 64}


@pytest.mark.parametrize(
    ("model", "called"),
    [
        ("org/Qwen2.5-7B", "Qwen2_5-7B.int8.rtn.cpu"),
        ("models/a b/", "a_b.int8.rtn.cpu"),
        ("nets/plain.py:make", "plain.int8.rtn.cpu"),
        ("/m/tiny.Q4_0.gguf", "tiny_Q4_0.int8.rtn.cpu"),
        ("../..", "_.int8.rtn.cpu"),
        ("模型", "_.int8.rtn.cpu"),
    ],
)
def test_names_suit_any_file_system(model: str, called: str) -> None:
    assert Cell(model, "int8", "rtn", "cpu").name == called


def test_a_name_that_is_too_long_is_cut_and_stays_its_own() -> None:
    one, other = (Cell("x" * 300 + end, "int8", "rtn", "cpu").name for end in "ab")
    assert len(one) == len(other) == 160
    assert one != other


def test_a_file_extends_another_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    written(tmp_path / "base", SMALL + "[limits]\nkl = 0.5\ntop1 = 0.1\n[margins]\nsize = 0.5\n", "base.toml")
    matrix = Matrix.read(
        written(
            tmp_path,
            'extends = "base/base.toml"\ntokens = 64\n[matrix]\nschemes = ["int8"]\n[limits]\nkl = 0.1\n',
        )
    )
    assert len(matrix.cells()) == 4
    recipe = matrix.recipe(matrix.cells()[0])
    assert (recipe.limits.kl, recipe.limits.top1, recipe.tokens, recipe.scheme) == (0.1, 0.1, 64, "int8")
    assert (matrix.margins.size, matrix.margins.kl) == (0.5, 0.05)


def test_a_cycle_is_told_with_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, base in (("a", "b"), ("b", "c"), ("c", "b")):
        written(tmp_path, f'extends = "{base}.toml"\n', f"{name}.toml")
    with pytest.raises(
        RecipeError, match=r"^b.toml extends c.toml extends b.toml: a file cannot extend itself"
    ):
        Matrix.read(Path("a.toml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[matrix", "is not TOML"),
        ('[matrix]\ntargets = ["cpu"]', r"lacks 'matrix\.models'"),
        (
            '[matrix]\nmodels = "count"\ntargets = ["cpu"]',
            r"matrix\.models is 'count': Input should be a valid list",
        ),
        (SMALL + "scheems = []", r"unknown key 'matrix\.scheems'; did you mean 'schemes'\?"),
        (SMALL + "[limits]\nperplexty = 2", r"unknown key 'limits\.perplexty'; did you mean 'perplexity'\?"),
        (SMALL + "[margin]\nkl = 2", r"unknown key 'margin'; did you mean 'margins'\?"),
        (SMALL + "[margins]\ntokens = 2", r"unknown key 'margins\.tokens'; did you mean 'tokens_per_s'\?"),
        (SMALL + "[margins]\nsize = -1", r"margins\.size is -1: Input should be greater than or equal to 0"),
        (SMALL + '[[exclude]]\ntagret = "cpu"', r"unknown key 'exclude\.0\.tagret'; did you mean 'target'\?"),
        ("extends = 1", "extends is 1; expected the path of one file"),
        ('extends = "none.toml"', r"none\.toml, which .*matrix\.toml extends cannot be read: No such file"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Matrix.read(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[matrix]\nmodels = []\ntargets = ["cpu"]', "no cell: models is empty"),
        (
            SMALL + '[[exclude]]\nmodel = "*"',
            r"no cell: \[\[exclude\]\] number 1 \(model = '\*'\) takes the last of them",
        ),
        (SMALL + '[[exclude]]\nmodel = "cuont"', r"number 1 \(model = 'cuont'\) matches no cell"),
        (
            SMALL + '[[include]]\nmodel = "count"\nscheme = "int8"\ntarget = "cpu"',
            r"would write count\.int8\.rtn\.cpu: the same cell twice",
        ),
        (
            '[matrix]\nmodels = ["a/count", "b/Count"]\ntargets = ["cpu"]',
            "the models a/count and b/Count; give one of the directories",
        ),
        (
            '[matrix]\nmodels = ["c"]\ntargets = ["cpu", {target = "cpu", name = "CPU", context = 9}]',
            "two targets that are both called CPU",
        ),
        ('[matrix]\nmodels = ["c"]\ntargets = [{format = "onnx"}]', "it lacks target"),
        (
            '[matrix]\nmodels = ["c"]\ntargets = [{target = "cpu", fromat = "onnx"}]',
            "no option 'fromat'; did you mean 'format'",
        ),
    ],
)
def test_cells_that_cannot_be_are_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        cells(tmp_path, text)


def test_what_does_not_exist_is_told_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="'int44' is not a scheme; did you mean"):
        cells(tmp_path, SMALL.replace("nf4", "int44"))
    with pytest.raises(SchemeError, match="'gtpq' is not a rounding; did you mean 'gptq'"):
        cells(tmp_path, SMALL + 'roundings = ["gtpq"]')
    with pytest.raises(TapeoutError, match="'cup' is not an installed target; did you mean 'cpu'"):
        cells(tmp_path, SMALL.replace('"cpu"', '"cup"'))
    with pytest.raises(RecipeError, match=r"--only count\.\*\.gpu matches no cell"):
        Matrix.read(written(tmp_path, SMALL)).only(["count.*.gpu"])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('{target = "cpu", format = "onx"}', "target cpu: format is 'onx': Input should be 'gguf' or 'onnx'"),
        (
            '{target = "cpu", threads = "many"}',
            "target cpu: threads is 'many': Input should be a valid integer",
        ),
        (
            '{target = "nvidia", tensor_parallel = 2}',
            "--tensor-parallel is not of the format modelopt. It is of: trtllm",
        ),
    ],
)
def test_a_value_that_an_option_does_not_take_is_told(tmp_path: Path, said: str, message: str) -> None:
    (cell,) = Matrix.read(written(tmp_path, f'[matrix]\nmodels = ["count"]\ntargets = [{said}]\n')).cells()
    with pytest.raises(RecipeError, match=message):
        cell.device()


def test_only_takes_the_cells_that_a_glob_names(tmp_path: Path) -> None:
    chosen = Matrix.read(written(tmp_path, SMALL)).only(["*.nf4.*.cpu", "count.int8.rtn.null"])
    assert [cell.name for cell in chosen] == [
        "count.int8.rtn.null",
        "count.nf4.rtn.cpu",
        "arithmetic.nf4.rtn.cpu",
    ]
