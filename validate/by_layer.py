"""What each layer of a reference gives on the way: to see where the error of quantized weights builds up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tapeout.validate.session import Shown

if TYPE_CHECKING:
    import torch

__all__ = ["EMBEDDING", "Layers", "error_by_layer", "kept", "read", "write"]

EMBEDDING = "embedding"
Layers = list[dict[str, npt.NDArray[np.float32]]]
"""Of each sequence what its layers gave, by name in the order of their making: float32 [tokens, hidden]."""


@contextmanager
def kept(network: Any) -> Iterator[dict[str, list[torch.Tensor]]]:
    """While it is entered, keep what the first layer is given and what each layer gives, a tensor [tokens, hidden] a call.

    Layers are the elements of the outermost ModuleLists, whatever the architecture calls them. Of one sequence: a batch of one.
    """
    found: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        if getattr(value, "ndim", 0) == 3:
            found.setdefault(name, []).append(value[0].detach())

    def given(_: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        keep(EMBEDDING, args[0] if args else keywords.get("hidden_states"))

    def gives(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda _, __, value: keep(name, value)

    with ExitStack() as hooks:
        for at, (called, layers) in enumerate(_stacks(network).items()):
            for index, layer in enumerate(layers):
                if at == index == 0:
                    hook = layer.register_forward_pre_hook(given, with_kwargs=True)
                    hooks.callback(hook.remove)
                hooks.callback(layer.register_forward_hook(gives(f"{called}.{index}")).remove)
        yield found


def _stacks(network: Any) -> dict[str, Any]:
    """The outermost ModuleLists by name: ``layers`` if there is one, else what each is a part of (``encoder``, ``decoder``)."""
    import torch

    found: dict[str, Any] = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.ModuleList) and not any(name.startswith(f"{o}.") for o in found):
            found[name] = module
    parents = [name.rpartition(".")[0] for name in found]
    names = parents if all(parents) and len(set(parents)) == len(parents) else list(found)
    return dict(zip(["layers"] if len(found) == 1 else names, found.values(), strict=True))


def write(
    found: Mapping[str, Sequence[torch.Tensor]], output: npt.NDArray[np.float32], name: str, out: str
) -> dict[str, Shown]:
    """Write what was kept, and the network's own output under ``name``, to ``out``/NAME.npy; see TracedSession."""
    import torch

    for layer, parts in found.items():
        np.save(Path(out) / f"{layer}.npy", torch.cat(list(parts)).float().numpy())
    np.save(Path(out) / f"{name}.npy", output)
    return {each: Shown("layer") for each in [*found, name]}


def read(names: Sequence[str], place: Path) -> dict[str, npt.NDArray[np.float32]]:
    """What ``write`` wrote, mapped."""
    return {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in names}


def error_by_layer(reference: Layers, other: Layers) -> dict[str, float | None]:
    """After each layer the rms of the difference over the rms of the reference's value; None: a number where the other has none."""
    found: dict[str, float | None] = {}
    for name in reference[0] if reference else ():
        pairs = [
            (one[name].astype(np.float64), two[name].astype(np.float64))
            for one, two in zip(reference, other, strict=True)
        ]
        size = sum(float(np.square(one).sum()) for one, _ in pairs)
        error = sum(float(np.square(one - two).sum()) for one, two in pairs)
        grown = float(np.sqrt(error / max(size, np.finfo(np.float32).tiny)))
        found[name] = grown if np.isfinite(grown) else None
    return found
