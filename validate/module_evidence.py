"""What the gates look at where the model is a plain module: what it gives of its samples; there are no tokens and no text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np

from tapeout.models import TracedConfig
from tapeout.models.module import SAMPLES
from tapeout.validate.evidence import Evidence
from tapeout.validate.metrics import Distance
from tapeout.validate.modules import Samples
from tapeout.validate.session import Logits

_GOLDEN = 1  # samples whose outputs a package keeps


class ModuleEvidence(Evidence):
    """Evidence whose sequences are ``[sample, output]``; each output is measured in its own deviation, so that none is lost beside another."""

    @property
    def metric(self) -> str:
        """What ``cost`` is."""
        return "squared error / variance"

    @property
    def config(self) -> TracedConfig:
        """The model's."""
        return cast(TracedConfig, self.model.config)

    def cost(self, distance: Distance) -> float:
        """Relative squared error, as of encoders."""
        return distance.error

    @cached_property
    def samples(self) -> Samples:
        """The inputs that are run."""
        from safetensors.numpy import load_file

        return Samples(load_file(self.model.directory / SAMPLES))

    @cached_property
    def sequences(self) -> list[list[int]]:
        """Every output of every sample."""
        return [
            [sample, output]
            for sample in range(len(self.samples))
            for output in range(len(self.config.scales))
        ]

    @cached_property
    def original(self) -> list[Logits]:
        """What the module gives with its own weights."""
        return self.record("original", self.reference(quantized=False), self.sequences)

    @cached_property
    def dequantized(self) -> list[Logits]:
        """What it gives with the weights that the codes are."""
        return self.record("dequantized", self.reference(), self.sequences)

    @property
    def cached(self) -> list[Logits]:
        """The same: there is no cache to round."""
        return self.dequantized

    @cached_property
    def predicted(self) -> Distance:
        """What the runtime's rounding of matmul inputs does to the reference when it rounds the same."""
        rounded = self.dequantized
        if self.device.arithmetic != "float32" and any(
            scheme.kind != "none" for scheme in self.quant.schemes.values()
        ):
            rounded = self.record(
                "rounded", self.reference(arithmetic=self.device.arithmetic), self.sequences
            )
        return Distance.between(self.dequantized, rounded)

    def golden_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Inputs ``inputs.N.NAME`` and what must come out, ``outputs.N.K`` [rows, width], of the first samples."""
        found: dict[str, np.ndarray[Any, Any]] = {}
        for (sample, output), rows in zip(self.sequences, self.dequantized, strict=True):
            if sample < _GOLDEN:
                found |= {f"inputs.{sample}.{name}": value for name, value in self.samples[sample].items()}
                found[f"outputs.{sample}.{output}"] = rows * np.float32(self.config.scales[output])
        return found

    def _answers(self, session: Any, sequences: Sequence[Sequence[int]]) -> Iterator[Logits]:
        for sample, output in sequences:
            yield session.infer(sample, output) / np.float32(self.config.scales[output])
