"""Plain modules: what is made of one, and what is said of one of which nothing can be made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import tapeout
from tapeout.errors import ModelError, PackageError
from tapeout.models import load, load_module

pytest.importorskip("onnxscript")


class Scaled(nn.Module):
    """A linear layer that is told a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * factor


class Branch(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if x.sum() > 0:
            return self.linear(x)
        return x


class Otherwise(Scaled):
    """What is traced is another function than what runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.linear(x) * (3.0 if torch.compiler.is_exporting() else 1.0)


class Unweighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Chosen(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.linear(x).argmax(-1)


class Vanishing(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.log(self.linear(x) * 0 - 1)


def x(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows))


CASES: dict[str, tuple[Callable[[], Any], tuple[Any, ...], Any, str]] = {
    "branch": (Branch, (x(),), None, r"Branch cannot be exported: .*data-dependent.* At .*test_module\.py:\d+: if x\.sum\(\) > 0:"),
    "otherwise": (Otherwise, (x(),), None, r"torch\.export makes another function of Otherwise: output 0 differs on inputs \[4, 32\]"),
    "no-linear": (Unweighted, (x(),), None, r"Unweighted has no linear weight: none of its 1 float tensors"),
    "integers": (Chosen, (x(),), None, r"Chosen must give float tensors; found torch\.int64"),
    "nan": (Vanishing, (x(),), None, r"output 0 of Vanishing is NaN or infinite on inputs \[4, 32\]"),
    "half": (lambda: Scaled().half(), (x(), torch.ones(4, 1)), None, r"linear\.weight of Scaled is torch\.float16; .* call \.float\(\)"),
    "no-module": (lambda: Path("x"), (x(),), None, r"a torch\.nn\.Module is expected, found PosixPath"),
    "no-tensor": (Scaled, (x(), 3), None, r"the example inputs of Scaled must be tensors; found int"),
    "no-input": (Scaled, (), None, r"Scaled has no example inputs"),
    "shapes": (
        Scaled, (x(), torch.ones(4, 1)), {"x": {0: torch.export.Dim("rows", min=8)}, "factor": None}, r"Scaled cannot be exported: .*4"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_exported_is_said_in_one_paragraph(case: str) -> None:
    make, given, dynamic, message = CASES[case]
    module = make()
    if isinstance(module, nn.Module):
        module.eval()
    with pytest.raises(ModelError, match=message) as caught:
        load_module(module, given, dynamic)
    assert "\n" not in str(caught.value)


def test_training_mode_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Scaled is in training mode.*call \.eval\(\)"):
        load_module(Scaled(), (x(), torch.ones(4, 1)))


def test_a_module_becomes_a_directory() -> None:
    """Inputs by name in another order than the module's; samples of other lengths; the same module gives the same directory."""
    torch.manual_seed(0)
    module = Scaled().eval()
    given = {"factor": torch.rand(6, 1) + 1, "x": x(6)}
    rows = torch.export.Dim("rows")
    model = load_module(module, given, {"factor": {0: rows}, "x": {0: rows}}, name="scaled")
    assert model.name == "scaled"
    assert model.graph == "torch.export"
    assert model.config.family == "Scaled"
    assert np.array_equal(model.checkpoint["linear.weight"].float32(), module.linear.weight.detach().numpy())
    samples = load_file(model.directory / "samples.safetensors")
    assert np.array_equal(samples["0.x"], given["x"].numpy())
    shapes = [samples[f"{n}.x"].shape[0] for n in range(len(samples) // 2)]
    assert shapes == [6, 3, 9, 6, 6, 6, 6, 6]
    assert [samples[f"{n}.factor"].shape[0] for n in range(len(shapes))] == shapes
    assert set(samples["2.factor"].ravel()) <= set(
        samples["0.factor"].ravel()
    )  # no value that the user has not given
    again = load_module(module, given, {"factor": {0: rows}, "x": {0: rows}}, name="scaled")
    assert again.directory == model.directory == load(model.directory).directory
    with torch.no_grad():
        module.linear.bias += 1
    assert (
        load_module(module, given, {"factor": {0: rows}, "x": {0: rows}}, name="scaled").directory
        != model.directory
    )


def test_axes_that_hang_together() -> None:
    """Multiples of eight only: what is drawn keeps to that."""
    torch.manual_seed(0)
    eights = torch.export.Dim("eights", min=1, max=6)
    model = load_module(Scaled().eval(), (x(32), torch.ones(1, 1)), {"x": {0: 8 * eights}, "factor": None})
    samples = load_file(model.directory / "samples.safetensors")
    assert [samples[f"{n}.x"].shape[0] for n in range(4)] == [32, 16, 48, 32]


def test_a_damaged_directory_is_named() -> None:
    torch.manual_seed(0)
    model = load_module(Scaled().eval(), (x(), torch.ones(4, 1)))
    (model.directory / "graph.json").write_text("{}")
    with pytest.raises(PackageError, match=r"graph\.json cannot be read: KeyError.*Delete .* and run again"):
        load(model.directory)


FACTORIES = {
    "gives": ("import torch\n\ndef make():\n    return torch.nn.Linear(32, 32)\n", "make", r"gave Linear; expected \(module, example inputs\)"),
    "name": ("def make():\n    return 1\n", "mkae", r"has no function 'mkae'; did you mean 'make'\?"),
    "import": ("import no_such_package\n", "make", r"cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
}  # fmt: skip


@pytest.mark.parametrize("case", FACTORIES)
def test_a_factory_that_is_none(tmp_path: Path, case: str) -> None:
    code, name, message = FACTORIES[case]
    path = tmp_path / "own.py"
    path.write_text(code)
    with pytest.raises(ModelError, match=message):
        load(f"{path}:{name}")


def test_a_path_without_a_factory(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("")
    with pytest.raises(ModelError, match=r"own\.py is a file; .* or file\.py:factory for a torch module"):
        load(tmp_path / "own.py")
    with pytest.raises(ModelError, match=r"none\.py is not a file; a module is named as file\.py:factory"):
        load(f"{tmp_path}/none.py:make")


def test_a_factory_names_the_model(tmp_path: Path) -> None:
    code = "import torch\n\ndef make():\n    torch.manual_seed(0)\n    return torch.nn.Linear(32, 8).eval(), (torch.ones(2, 32),)\n"
    (tmp_path / "own.py").write_text(code)
    model = tapeout.load(f"{tmp_path}/own.py:make")
    assert (model.name, model.config.family) == ("own", "Linear")
    assert list(model.specs) == ["bias", "weight"]
