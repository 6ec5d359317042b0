"""What the gates look at where the model is a plain module: what it gives of its samples; there are no tokens and no text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np

from tapeout.files import file_sha256
from tapeout.models import TracedConfig
from tapeout.models.module import SAMPLES
from tapeout.validate.by_layer import Layers, read
from tapeout.validate.findings import distances
from tapeout.validate.metrics import Distance
from tapeout.validate.modules import Samples
from tapeout.validate.session import Logits
from tapeout.validate.uncached_evidence import UncachedEvidence

_GOLDEN = 1  # samples whose outputs a package keeps
_LAYERED = 3  # samples whose values on the way are held against one another: other lengths are among them


class ModuleEvidence(UncachedEvidence):
    """Evidence whose sequences are ``[sample, output]``; each output is measured in its own deviation, so that none is lost beside another."""

    @property
    def config(self) -> TracedConfig:
        """The model's."""
        return cast(TracedConfig, self.model.config)

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

    @property
    def evaluated(self) -> dict[str, Any]:
        """The samples."""
        told = file_sha256(self.model.directory / SAMPLES)
        return {"sequences": len(self.samples), "tokens": 0, "sha256": told}

    @cached_property
    def original(self) -> list[Logits]:
        """What the module gives with its own weights."""
        return self.record("original", self.reference(quantized=False), self.sequences)

    def compare(
        self, gate: str, distance: Distance, reference: Sequence[Logits], other: Sequence[Logits], *names: str
    ) -> None:
        """By the squared error of each output of each sample, with the value that is off most."""
        one, two = names

        def farthest(at: int) -> tuple[str, str]:
            mine, theirs = reference[at], other[at]
            place = np.unravel_index(int(np.abs(mine - theirs).argmax()), mine.shape)
            where = f"row {place[0]}, column {place[1]}"
            return f"{mine[place]:.4g} at {where}", f"{theirs[place]:.4g}"

        self.findings.setdefault("distances", {})[gate] = distances(
            distance.errors,
            reference,
            names=(one, two),
            measure=self.metric,
            of="outputs of samples",
            called=lambda at: "sample {}, output {}".format(*self.sequences[at]),
            answers=farthest,
        )

    def layers_of(self, name: str, session: Any, sequences: Sequence[Sequence[int]]) -> Layers:
        """What each part of the module that has parameters gives of the first samples; in mapped files."""
        found: Layers = []
        for sample in sorted({sample for sample, _ in sequences})[:_LAYERED]:
            place = self.scratch / f"{name}-layers-{sample}"
            place.mkdir(exist_ok=True)
            found.append(read(list(session.trace([sample], str(place))), place))
        return found

    def compare_layers(self) -> None:
        """The same, of samples: there are no tokens."""
        super().compare_layers()
        if told := self.findings.get("layers"):
            self.findings["layers"] = {"samples": len(self.layers["original"]), "layers": told["layers"]}

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
