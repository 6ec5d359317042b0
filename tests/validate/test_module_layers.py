"""What the layers of a plain module give is what hooks on the module itself see, and error begins in the layer that was rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.models import load, module
from tapeout.quantize import quantize
from tapeout.validate import by_layer
from tapeout.validate.reference import open_session

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")


class Block(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x: Any) -> Any:
        return x + self.down(torch.tanh(self.up(x)))


class Net(torch.nn.Module):  # type: ignore[misc]
    """A list whose first element is called twice, parts beside it, a part without parameters, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = torch.nn.Linear(16, 32), torch.nn.ModuleList([Block(), Block()])
        self.act, self.output = torch.nn.GELU(), torch.nn.Linear(32, 8)
        self.mix = torch.nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x: Any) -> Any:
        x = self.act(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = self.blocks[0](x) @ self.mix.T
        return self.output(x), x.mean()


@pytest.fixture(scope="module")
def net() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return Net().eval(), torch.randn(2, 5, 16)


@pytest.fixture
def directory(net: tuple[Any, Any]) -> Path:
    return module.prepare(net[0], (net[1],), name="net")


def traced(session: Any, place: Path) -> dict[str, np.ndarray[Any, Any]]:
    place.mkdir()
    return by_layer.read(list(session.trace([0], str(place))), place)


NAMES = ["stem", "blocks.0", "blocks.1", "blocks.0 (call 2)", "mix", "output", "first output"]


def test_layers_give_what_hooks_see(net: tuple[Any, Any], directory: Path, tmp_path: Path) -> None:
    network, given = net
    seen: dict[str, list[Any]] = {}
    for name, part in network.named_modules():
        part.register_forward_hook(lambda _, __, value, name=name: seen.setdefault(name, []).append(value))
    with torch.inference_mode():
        output, _ = network(given)
        mixed = seen["blocks.0"][1] @ network.mix.T
    wanted = [
        seen["stem"][0],
        seen["blocks.0"][0],
        seen["blocks.1"][0],
        seen["blocks.0"][1],
        mixed,
        output,
        output,
    ]
    found = traced(open_session(str(directory), threads=1), tmp_path / "layers")
    assert list(found) == NAMES
    for name, value in zip(NAMES, wanted, strict=True):
        # Sums of 64 products in another order differ by up to sqrt(64) 2^-24 of their size, in each of a few layers.
        assert np.allclose(found[name], value.numpy(), atol=1e-5), name


def test_error_begins_in_the_part_that_was_rounded(directory: Path, tmp_path: Path) -> None:
    model = load(directory)
    quant = quantize(
        model,
        "none",
        overrides=dict.fromkeys(("blocks.1.up", "blocks.1.down"), "int4-g32"),
        out=tmp_path / "codes",
    )
    plain, rounded = (
        traced(open_session(str(directory), store, threads=1), tmp_path / name)
        for name, store in (("original", None), ("rounded", str(quant.directory)))
    )
    grown = by_layer.error_by_layer([plain], [rounded])
    assert list(grown) == NAMES
    assert grown["stem"] == grown["blocks.0"] == 0.0
    assert all((grown[name] or 0) > 1e-4 for name in NAMES[2:])
