"""What rounding one tensor costs: the KL of the original network to the same network with that tensor quantized.

Measured with transformers in float32 on windows of calibration text, in a worker process; and for every scheme that fits the
tensor the squared error of its weights, which the KL follows.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError, SchemeError
from tapeout.models import Model, SourceTensor, load
from tapeout.quantize import SCHEMES, Scheme, store
from tapeout.quantize.lattice import ScaleOverflow
from tapeout.validate import reference
from tapeout.validate.metrics import kl_divergence
from tapeout.validate.session import Logits, SessionSpec
from tapeout.validate.worker import WorkerSession

__all__ = ["Cost", "SensitivitySession", "offered", "open_session"]

# Bits a weight near which the KL is measured: where it still grows as the squared error does, and where no longer.
_MEASURED = (4.5, 3.25)
_ROWS = 128  # tokens whose logits are in work at a time


@dataclass(frozen=True)
class Cost:
    """What rounding a tensor to nearest costs.

    Attributes:
        kl: KL(original ‖ only this tensor quantized) by scheme, mean over tokens, in nats; of one scheme or two.
        error: squared error of the weights over their squares, by scheme; every scheme that the tensor can take.
    """

    kl: Mapping[str, float]
    error: Mapping[str, float]

    def predict(self, scheme: str) -> float:
        """The KL of a scheme: proportional to the squared error up to the finest scheme measured, then a power of it.

        The KL is zero and stationary at the original weights, so that it begins as a quadratic form of their error.
        """
        error = self.error[scheme]
        (first, kl), *rest = sorted((self.error[name], kl) for name, kl in self.kl.items())
        if not error or not first:
            return 0.0 if not error else kl
        power = 1.0
        if error > first and rest and kl > 0 < rest[0][1] and rest[0][0] > first:
            power = float(np.clip(np.log(rest[0][1] / kl) / np.log(rest[0][0] / first), 0.5, 2.0))
        return float(kl * (error / first) ** power)


class Sensitivity:
    """The worker's side; see ``SensitivitySession``."""

    def __init__(
        self, model: Model, network: reference.Reference, windows: Sequence[Sequence[int]], threads: int
    ) -> None:
        import torch

        self.facts = network.facts
        self._model, self._network, self._windows = model, network, windows
        # Windows side by side, with no more threads than cores: threads of one operation that wait for each other on cores that
        # others use take many times as long.
        each = max(1, threads // len(windows))
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(each,))
        self._sequences = [network.twin() for _ in windows]
        self._original = list(self._pool.map(self._prefill, range(len(windows))))

    def measure(self, tensor: str) -> dict[str, dict[str, float]]:
        """The fields of ``Cost`` of one tensor."""
        source = self._model.checkpoint[tensor]
        weight = source.float32()
        square = float(np.square(weight, dtype=np.float64).sum())
        error = {}
        for scheme in offered(source.shape):
            if (rounded := self._rounded(source, scheme)) is not None:
                lost = float(np.square(rounded - weight, dtype=np.float64).sum())
                error[scheme.name] = lost / square if square else 0.0
        kl: dict[str, float] = {}
        for bits in _MEASURED if error else ():
            nearest = min(error, key=lambda s: abs(SCHEMES[s].bits_per_weight(source.shape[1]) - bits))
            if nearest not in kl:
                rounded = self._rounded(source, SCHEMES[nearest])
                assert rounded is not None
                kl[nearest] = self._kl(tensor, rounded)
        return {"kl": kl, "error": error}

    def close(self) -> None:
        """Free the model."""
        self._pool.shutdown()
        for sequence in (self._network, *self._sequences):
            sequence.close()
        self._original.clear()

    def _rounded(self, source: SourceTensor, scheme: Scheme) -> npt.NDArray[np.float32] | None:
        """The weight that a store would hold; None where the tensor cannot take the scheme."""
        with tempfile.TemporaryDirectory(prefix="tapeout-") as directory:
            place = Path(directory)
            (place / "tensors").mkdir()
            try:
                store.write_tensor(place, source, scheme, self._pool)
            except ScaleOverflow:
                return None
            return store.read_tensor(place, source.name, scheme, source.shape[1]).dequantize()

    def _kl(self, name: str, weight: npt.NDArray[np.float32]) -> float:
        before = self._network.substitute(name, weight)
        try:
            kl = list(self._pool.map(self._divergence, range(len(self._windows))))
        finally:
            self._network.substitute(name, before)
        mean = float(np.concatenate(kl).mean())
        if not np.isfinite(mean):
            raise ModelError(f"{self._model.name} gives NaN or infinite logits with {name} rounded.")
        return mean

    def _divergence(self, window: int) -> npt.NDArray[np.float64]:
        original, rounded = self._original[window], self._prefill(window)
        pieces = [slice(at, at + _ROWS) for at in range(0, len(rounded), _ROWS)]
        return np.concatenate(
            [kl_divergence(original[r].astype(np.float64), rounded[r].astype(np.float64)) for r in pieces]
        )

    def _prefill(self, window: int) -> Logits:
        sequence = self._sequences[window]
        sequence.reset()
        logits = sequence.prefill(self._windows[window])
        sequence.reset()
        return logits


def open_session(model: str, windows: Sequence[Sequence[int]], threads: int | None = None) -> Sensitivity:
    """Load a model and take down what it says of the windows.

    Args:
        model: what ``tapeout.models.load`` takes.
        windows: token ids of calibration text.
        threads: None: as many as this process has cores.

    Raises:
        MissingToolchain: torch or transformers is not installed. ModelError: the model is an encoder.
    """
    threads = threads or len(os.sched_getaffinity(0))
    source = load(model)
    _ = source.decoder  # KL of next tokens is what is measured
    opened = cast(reference.Reference, reference.open_session(model, threads=threads))
    return Sensitivity(source, opened, windows, threads)


class SensitivitySession(WorkerSession):
    """Measures tensors of one model in a worker process. Close it, or use it in a ``with``."""

    def __init__(self, model: Model, windows: npt.NDArray[np.int32]) -> None:
        arguments = {"model": str(model.directory), "windows": windows.tolist()}
        super().__init__(SessionSpec("tapeout.validate.sensitivity:open_session", arguments))

    def measure(self, name: str) -> Cost:
        """What rounding tensor ``name`` costs."""
        return Cost(**cast(dict[str, dict[str, float]], self._call("measure", tensor=name)))


def offered(shape: tuple[int, ...]) -> list[Scheme]:
    """The schemes that have codes, leave the activations alone, and fit a matrix [out, in]."""
    found = []
    for scheme in SCHEMES.values():
        if scheme.kind == "none" or scheme.activations:
            continue
        try:
            scheme.check("the tensor", shape)
        except SchemeError:
            continue
        found.append(scheme)
    return found
