"""MIGraphX's graphs, as a provider of onnxruntime on AMD GPUs; where there is none, on the processor."""

from __future__ import annotations

from tapeout.targets.data.check.common import Runtime
from tapeout.targets.data.check.onnx import Onnx


class MiGraphX(Onnx):
    """See Runtime."""

    install = "pip install onnxruntime-migraphx numpy (on the GPU; onnxruntime runs the graph on a processor)"
    # Products of what onnxruntime fuses on a processor are taken with inputs as they are.
    settings = (("session.qdq_matmulnbits_accuracy_level", "1"),)
    gpu = ("MIGraphXExecutionProvider", "ROCMExecutionProvider")


RUNTIME: Runtime = MiGraphX()
