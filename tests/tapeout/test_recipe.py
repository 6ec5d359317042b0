"""Recipes: every key, every mistake by its name, and that what is asked for is what happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tapeout.build import export, target
from tapeout.commands.terminal import recipe_of
from tapeout.errors import RecipeError, SchemeError
from tapeout.models import load
from tapeout.quantize import Calibration, Quantized, quantize
from tapeout.recipe import Recipe
from tapeout.validate import GateResult, Limits, Options, Report

MakeModel = Callable[..., Path]

EVERY_KEY = """
scheme = "int4-g32"
rounding = "rtn"
text = "texts/own.txt"
tokens = 77

[tensors]
"*.down_proj" = "int8"
lm_head = "none"

[calibration]
text = "texts/calibration.txt"
sequences = 3
length = 17
seed = 5

[limits]
kl = 0.5
top1 = 0.25
perplexity = 3
task = 0.125
min_tokens_per_s = 5
max_ttft_ms = 250.5
max_memory = "2GB"
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], Recipe]:
    """``read(text)`` reads a recipe file of that text."""

    def read(text: str) -> Recipe:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return Recipe.read(path)

    return read


Read = Callable[[str], Recipe]


def schemes(quant: Quantized) -> dict[str, str]:
    return {name.removesuffix(".weight"): scheme.name for name, scheme in quant.schemes.items()}


def test_every_key(read: Read) -> None:
    found = read(EVERY_KEY)
    assert found == Recipe(
        scheme="int4-g32",
        rounding="rtn",
        tensors={"*.down_proj": "int8", "lm_head": "none"},
        calibration=Calibration(Path("texts/calibration.txt"), 3, 17, 5),
        limits=Limits(0.5, 0.25, 3.0, 0.125, min_tokens_per_s=5.0, max_ttft_ms=250.5, max_memory="2GB"),
        text=Path("texts/own.txt"),
        tokens=77,
    )
    # No key that this test forgot.
    assert found.model_fields_set == Recipe.model_fields.keys()
    assert None not in vars(found.limits).values()


def test_what_is_absent_is_the_default(read: Read) -> None:
    assert read("") == Recipe()
    assert (Recipe().scheme, Recipe().rounding, Recipe().tokens) == ("int8", "rtn", 4096)
    assert read("[limits]\nkl = 0.5").limits == Limits(kl=0.5)


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().scheme = "nf4"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shceme = 'int8'", "has an unknown key 'shceme'; did you mean 'scheme'"),
        ("limit = 1", "has an unknown key 'limit'; did you mean 'limits'"),
        (
            "zzz = 1",
            "has an unknown key 'zzz' \\(known: calibration, limits, rounding, scheme, tensors, text, tokens\\)",
        ),
        ("[limits]\ntop_1 = 1", "has an unknown key 'limits.top_1'; did you mean 'top1'"),
        (
            "[limits]\nscheme = 1",
            "has an unknown key 'limits.scheme' \\(known: kl, max_memory, max_ttft_ms, min_tokens_per_s, perplexity, task, top1\\)",
        ),
        ("[[tensors]]\na = 1", "tensors is "),
        ("scheme = 8", "scheme is 8: .*string"),
        ("rounding = ['rtn']", "rounding is \\['rtn'\\]: .*string"),
        ("tensors = 'int8'", "tensors is 'int8': .*dict"),
        ("[tensors]\nlm_head = 8", "tensors.lm_head is 8: .*string"),
        ("limits = 3", "limits is 3: "),
        ("[limits]\nkl = 'low'", "limits.kl is 'low': .*number"),
        ("text = 3", "text is 3: .*path"),
        ("tokens = 'many'", "tokens is 'many': .*integer"),
        ("tokens = 1.5", "tokens is 1.5: .*integer"),
        ("tokens = 0", "tokens is 0: .*greater than 0"),
        ("tokens = -4", "tokens is -4: .*greater than 0"),
    ],
)
def test_a_key_or_a_value_that_is_wrong(read: Read, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe.toml:? {message}") as raised:
        read(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", [b"scheme = ", b"scheme int8", b"scheme = 'a'\nscheme = 'b'", b"# \xff"])
def test_what_is_no_toml(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(data)
    with pytest.raises(RecipeError, match=r"recipe\.toml is not TOML"):
        Recipe.read(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"the recipe .*none\.toml cannot be read: No such file"):
        Recipe.read(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        Recipe.read(tmp_path)


def test_the_last_glob_that_matches_wins(make_model: MakeModel, read: Read) -> None:
    model = load(make_model())
    general = '"*.mlp.*" = "int4-g32"\n'
    special = '"model.layers.1.*.down_proj" = "nf4"\n'
    found = schemes(quantize(model, "int8", overrides=read(f"[tensors]\n{general}{special}").tensors))
    assert found["model.layers.1.mlp.down_proj"] == "nf4"
    assert found["model.layers.0.mlp.down_proj"] == "int4-g32"
    assert found["model.layers.1.self_attn.q_proj"] == "int8"
    turned = schemes(quantize(model, "int8", overrides=read(f"[tensors]\n{special}{general}").tensors))
    assert turned["model.layers.1.mlp.down_proj"] == "int4-g32"


def test_embeddings_and_head_can_be_named(make_model: MakeModel, read: Read) -> None:
    text = '[tensors]\nlm_head = "int4-g32"\n"model.embed_tokens" = "none"'
    found = schemes(quantize(load(make_model()), "nf4", overrides=read(text).tensors))
    assert (found["lm_head"], found["model.embed_tokens"]) == ("int4-g32", "none")
    assert found["model.layers.0.self_attn.q_proj"] == "nf4"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("'*.upp_proj' = 'int8'", RecipeError, "'\\*.upp_proj' matches no tensor of tiny"),
        ("lm_haed = 'int8'", RecipeError, "'lm_haed' matches no tensor of tiny; did you mean 'lm_head'"),
        ("'model.norm' = 'int8'", RecipeError, "gives int8 to model.norm.weight, a .*, which stays float"),
        ("lm_head = 'int7'", SchemeError, "int7"),
        ("lm_head = 'int4-g128'", SchemeError, "group 128 .* does not divide in_features 64 of lm_head"),
    ],
)
def test_a_glob_that_fits_nothing(
    make_model: MakeModel, read: Read, tmp_path: Path, text: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        export(target("null"), make_model(), tmp_path / "out", read(f"[tensors]\n{text}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.toml", "tiny"]


def test_what_it_says_reaches_the_gates(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "calibration.txt").write_text("Columns are weighted by what the layer is given here. " * 3)
    (tmp_path / "own.txt").write_text("An evaluation text.")
    text = EVERY_KEY.replace("texts/", f"{tmp_path}/")
    (tmp_path / "recipe.toml").write_text(text)
    asked: list[Options] = []

    def judged(artifact: Any, model: Any, quant: Quantized, device: Any, options: Options) -> Report:
        asked.append(options)
        assert schemes(quant)["lm_head"] == "none"
        assert quant.scheme.name == "nf4"
        return Report(model.name, device.name, quant.scheme.name, (GateResult("codes", "passed"),))

    monkeypatch.setattr("tapeout.build.validate", judged)
    recipe = recipe_of(tmp_path / "recipe.toml", None, scheme="nf4", rounding=None)
    export(target("null"), make_model(), tmp_path / "out", recipe, require=frozenset({"task"}))
    (options,) = asked
    assert options.limits == Limits(0.5, 0.25, 3.0, 0.125, 5.0, 250.5, "2GB")
    assert (options.text, options.tokens) == (tmp_path / "own.txt", 77)
    assert options.require == {"task"}
