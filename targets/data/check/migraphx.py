"""MIGraphX's graphs, as a provider of onnxruntime on AMD GPUs; where there is none, on the processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tapeout.targets.data.check.common import Runtime
from tapeout.targets.data.check.onnx import Onnx

AMD = ("MIGraphXExecutionProvider", "ROCMExecutionProvider")


class MiGraphX(Onnx):
    """See Runtime."""

    install = "pip install onnxruntime-migraphx numpy (on the GPU; onnxruntime runs the graph on a processor)"
    # Products of what onnxruntime fuses on a processor are taken with inputs as they are.
    settings = (("session.qdq_matmulnbits_accuracy_level", "1"),)

    def units(self, root: Path, manifest: dict[str, Any]) -> list[str]:
        """The GPU, where onnxruntime has one of AMD's providers."""
        import onnxruntime

        return ["gpu" if set(AMD) & set(onnxruntime.get_available_providers()) else "cpu"]

    def providers(self, unit: str) -> list[str]:
        """AMD's before the processor's, which takes what they leave."""
        import onnxruntime

        here = onnxruntime.get_available_providers()
        return [
            name
            for name in (*AMD, "CPUExecutionProvider")
            if name in here and (unit == "gpu" or name not in AMD)
        ]


RUNTIME: Runtime = MiGraphX()
