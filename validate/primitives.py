"""The graph in torch with every primitive's value in sight: what a device's own values are held against.

It is ours, so it is not the last word: its logits are compared with transformers' wherever it is used, and the tests hold it
to transformers family by family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import MissingToolchain, ModelError, TapeoutError
from tapeout.models import DecoderConfig, EncoderConfig, load
from tapeout.models.encoder import encoder
from tapeout.models.graph import decoder
from tapeout.models.torch_encoder import TorchEncoderOps
from tapeout.models.torch_ops import TorchOps
from tapeout.quantize import open_store
from tapeout.validate.pretrained import tokenizer
from tapeout.validate.session import Facts, Shown

if TYPE_CHECKING:
    import torch

__all__ = ["Primitives", "open_session", "open_weights", "save"]

_MOST = 1 << 24  # elements of a value that is kept: of scores, which grow with the square of the length


def save(out: str, name: str, value: npt.NDArray[Any]) -> bool:
    """Write a value for who compares; False when it is too large to be kept."""
    if value.size > _MOST:
        return False
    np.save(Path(out) / f"{name}.npy", np.atleast_2d(np.asarray(value, np.float32)))
    return True


class Primitives:
    """A TracedSession on our torch emitter; see ``open_session``."""

    facts: Facts

    def __init__(
        self,
        config: DecoderConfig | EncoderConfig,
        weights: Callable[[str], npt.NDArray[np.float32]],
        tokenize: Callable[[str], list[int]],
    ) -> None:
        try:
            import torch
        except ImportError as error:
            needs = f"the graph's primitives need torch ({error}): pip install 'tapeout[reference]'"
            raise MissingToolchain(needs) from error
        begin = perf_counter()
        self._config, self._weights, self.tokenize = config, weights, tokenize
        version, device = f"tapeout's graph, torch {torch.__version__}", "cpu"
        self.facts = Facts(version, device, perf_counter() - begin, 0, config.max_position_embeddings)

    def trace(
        self, ids: Sequence[int], out: str, given: str | None = None, *, double: bool = True
    ) -> dict[str, Shown]:
        """As TracedSession says.

        Args:
            ids: one sequence.
            out: where values go.
            given: another trace of the same ids: each primitive then reads that one's values, so that its own error is alone.
            double: compute in float64; otherwise in float32.

        Raises:
            TapeoutError: ids that the model does not have, or more than fit.
        """
        import torch

        c = self._config
        if not ids or not 0 <= min(ids) <= max(ids) < c.vocab_size or len(ids) > c.max_position_embeddings:
            raise TapeoutError(
                f"{len(ids)} token ids from {min(ids, default=0)} to {max(ids, default=0)}: the model takes 1 … "
                f"{c.max_position_embeddings} from a vocabulary of {c.vocab_size}."
            )
        kind = torch.float64 if double else torch.float32

        def weights(name: str) -> torch.Tensor:
            return torch.from_numpy(self._weights(name)).to(kind)

        batched = isinstance(c, EncoderConfig)
        watched = _Watched(TorchEncoderOps(weights) if batched else TorchOps(weights), out, given, batched)
        emitter: Any = watched
        with torch.inference_mode():
            if isinstance(c, EncoderConfig):
                watched.see(c.output, c.output, encoder(emitter, c, torch.tensor([list(ids)])))
            else:
                decoder(emitter, c, torch.tensor(list(ids)))
        return watched.shown

    def close(self) -> None:
        """Nothing is held."""


class _Watched:
    """An emitter that writes down what another one makes, and hands on what it was given in its place."""

    def __init__(self, ops: TorchOps, out: str, given: str | None, batched: bool) -> None:
        self.shown: dict[str, Shown] = {}
        self._ops, self._out, self._given, self._batched = ops, out, given, batched
        self._names: dict[int, str] = {}
        self._values: list[Any] = []  # kept, so that no other takes their ids
        self._inside: list[str] = []  # what the attention at work has shown
        ops.inside = self._see_inside

    def see(self, name: str, op: str, value: torch.Tensor, reads: Sequence[str] = ()) -> None:
        """Write down a value, the first of its name."""
        array = value.numpy()
        array = array[0] if self._batched and array.ndim == 3 else array
        if name not in self.shown and save(self._out, name, array):
            self.shown[name] = Shown(op, 0.0, tuple(reads))

    def _see_inside(self, name: str, op: str, value: torch.Tensor, made_of: torch.Tensor) -> None:
        self.see(name, op, value, [*self._named(made_of), *self._inside])
        self._inside.append(name)

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return partial(self._call, op)

    def _call(self, op: str, name: str, *args: Any, **keywords: Any) -> Any:
        self._inside.clear()
        value = getattr(self._ops, op)(name, *args, **keywords)
        reads = self._named(*args)
        if op == "split":
            for piece in value:
                self._know(piece, *reads)
        elif op == "route":
            self._know(value, name)
        else:
            self.see(name, op, value, [*reads, *self._inside])
            value = self._replaced(name, value)
            self._know(value, name)
        return value

    def _named(self, *values: Any) -> list[str]:
        return list(dict.fromkeys(self._names[id(each)] for each in values if id(each) in self._names))

    def _know(self, value: Any, name: str) -> None:
        self._names[id(value)] = name
        self._values.append(value)

    def _replaced(self, name: str, value: torch.Tensor) -> torch.Tensor:
        import torch

        path = Path(self._given or "") / f"{name}.npy"
        if self._given is None or not path.exists():
            return value
        found = np.load(path)
        return torch.from_numpy(found).to(value.dtype).view_as(value)


def open_session(model: str, store: str | None = None) -> Primitives:
    """The graph of a model, computed one tensor at a time.

    Args:
        model: what ``tapeout.models.load`` takes.
        store: directory of its canonical codes; None: the weights as the checkpoint has them.

    Raises:
        ModelError: there is no store, and the checkpoint has codes only.
    """
    source = load(model)
    if not isinstance(source.config, DecoderConfig | EncoderConfig):
        raise ModelError(f"{source.name} is {source.kind}; only decoders and encoders are walked.")
    quant = open_store(Path(store), source) if store is not None else None
    if source.quantization is not None and quant is None:
        raise ModelError(
            f"{source.name} has no floats of its own: compare it with a package that was made from it."
        )
    return open_weights(
        source.config,
        (lambda name: source.checkpoint[name].float32()) if quant is None else quant.float32,
        source.directory,
    )


def open_weights(
    config: DecoderConfig | EncoderConfig,
    weights: Callable[[str], npt.NDArray[np.float32]],
    directory: Path,
) -> Primitives:
    """The same of any weights by their Hugging Face names, with the tokenizer of a directory."""
    words = cache(partial(tokenizer, directory))
    specials = isinstance(config, EncoderConfig)
    return Primitives(config, weights, lambda text: list(words().encode(text, add_special_tokens=specials)))
