"""What the gates look at where a model keeps nothing between its answers: encoders, and plain modules."""

from __future__ import annotations

from functools import cached_property

from tapeout.validate.evidence import Evidence
from tapeout.validate.metrics import Distance
from tapeout.validate.session import Logits


class UncachedEvidence(Evidence):
    """Evidence whose rows are no logits of next tokens, or of classes only."""

    @property
    def metric(self) -> str:
        """What ``cost`` is."""
        return "squared error / variance"

    def cost(self, distance: Distance) -> float:
        """Relative squared error: it grows with a rounding of inputs as KL does, which means nothing of states and embeddings."""
        return distance.error

    @cached_property
    def dequantized(self) -> list[Logits]:
        """What the reference gives with the weights that the codes are."""
        return self.ask("dequantized", self.reference(), self.sequences)

    @property
    def cached(self) -> list[Logits]:
        """The same: there is no cache to round."""
        return self.dequantized

    @cached_property
    def predicted(self) -> Distance:
        """What the runtime's rounding of matmul inputs does to the reference when it rounds the same."""
        rounded = self.dequantized
        quantized = any(scheme.kind != "none" for scheme in self.quant.schemes.values())
        if quantized and self.device.arithmetic != "float32":
            spec = self.reference(arithmetic=self.device.arithmetic)
            rounded = self.ask("rounded", spec, self.sequences)
        return Distance.between(self.dequantized, rounded)
