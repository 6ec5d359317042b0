"""TensorRT's graphs: their engine on TensorRT where one was built, else by a provider of onnxruntime, on the GPU if it has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tapeout.targets.data.check.common import ARTIFACT, Array, Decoder, Runtime, installed, torch_gpu
from tapeout.targets.data.check.onnx import Onnx

PLAN, SETTINGS = "model.plan", "engine.json"


class TensorRtDecoder(Decoder):
    """An engine; keys and values stay on the GPU, present ones are the next step's past."""

    def __init__(self, root: Path, context: int) -> None:
        import tensorrt as trt
        import torch

        self.torch, self.context = torch, context
        self.runtime, self.chip = f"TensorRT {trt.__version__}", torch.cuda.get_device_name()
        path = root / ARTIFACT / PLAN
        said = json.loads((path.parent / SETTINGS).read_text(encoding="utf-8"))
        self.engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise RuntimeError(
                f"TensorRT {trt.__version__} does not load {PLAN}: it is another version's, or another GPU's"
            )
        self.stream, self.contexts = torch.cuda.Stream(), {}
        for index, profile in enumerate(said["profiles"]):
            made = self.contexts[profile["name"]] = self.engine.create_execution_context()
            made.set_optimization_profile_async(index, self.stream.cuda_stream)
        self.stream.synchronize()
        self.kinds = {
            trt.float32: torch.float32, trt.float16: torch.float16, trt.int64: torch.int64, trt.int32: torch.int32,
        }  # fmt: skip
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        inputs = {name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self.outputs = [name for name in names if name not in inputs]
        self.cached = {
            name: tuple(self.engine.get_tensor_shape(name)) for name in inputs if name.startswith("past_")
        }

    def kind(self, name: str) -> Any:
        """PyTorch's type of a tensor."""
        return self.kinds[self.engine.get_tensor_dtype(name)]

    def begin(self, function: str) -> None:
        """With an empty cache."""
        self.past = 0
        self.cache = {
            name: self.torch.empty((1, shape[1], 0, shape[3]), dtype=self.kind(name), device="cuda")
            for name, shape in self.cached.items()
        }

    def last(self, ids: list[int], wanted: int) -> Array:
        """Logits of the last tokens."""
        torch, count, total = self.torch, len(ids), self.past + len(ids)
        numbers = {
            "input_ids": [list(ids)],
            "position_ids": [list(range(self.past, total))],
            "attention_mask": [[1] * total],
            "logits_at": list(range(count - wanted, count)),
        }
        given = {
            **{name: torch.tensor(value, device="cuda") for name, value in numbers.items()},
            **self.cache,
        }
        context = self.contexts["decode" if count == 1 else "prefill"]
        for name, value in given.items():
            context.set_input_shape(name, tuple(value.shape))
            # No tokens take no memory, and TensorRT wants an address.
            context.set_tensor_address(name, value.data_ptr() or given["input_ids"].data_ptr())
        found = {}
        for name in self.outputs:
            shape = tuple(context.get_tensor_shape(name))
            found[name] = torch.empty(shape, dtype=self.kind(name), device="cuda")
            context.set_tensor_address(name, found[name].data_ptr())
        self.stream.wait_stream(torch.cuda.current_stream())
        if not context.execute_async_v3(self.stream.cuda_stream):
            raise RuntimeError(f"TensorRT cannot run {count} tokens at position {self.past}")
        self.stream.synchronize()
        logits = np.asarray(found.pop("logits")[0].float().cpu().numpy())[-wanted:]
        self.cache = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        self.past = total
        return logits


class OnnxTrt(Onnx):
    """See Runtime."""

    # Of onnxruntime; an engine needs tensorrt and PyTorch instead.
    install = "pip install onnxruntime-gpu numpy, or build the engine as README.md says and pip install tensorrt torch numpy"
    settings = (("session.qdq_matmulnbits_accuracy_level", "1"),)
    gpu = ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider", "CUDAExecutionProvider")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What is not here of the way that can be gone."""
        return ("numpy",) if installed("tensorrt") and torch_gpu() else ("onnxruntime", "numpy")

    def units(self, root: Path, manifest: dict[str, Any]) -> list[str]:
        """An engine that was built, and the GPU or the processor by onnxruntime."""
        found = (
            ["tensorrt"]
            if installed("tensorrt") and torch_gpu() and (root / ARTIFACT / PLAN).exists()
            else []
        )
        return found + (super().units(root, manifest) if installed("onnxruntime") else [])

    def unable(self, root: Path, manifest: dict[str, Any]) -> str | None:
        """TensorRT without an engine, and no onnxruntime."""
        if installed("tensorrt") and not (root / ARTIFACT / PLAN).exists() and not installed("onnxruntime"):
            return "There is no engine yet: python artifact/build_engine.py builds it."
        return None

    def opened(self, root: Path, manifest: dict[str, Any], unit: str) -> Any:
        """The engine, or the graph."""
        if unit == "tensorrt":
            return TensorRtDecoder(root, manifest["artifact"]["context"])
        return super().opened(root, manifest, unit)


RUNTIME: Runtime = OnnxTrt()
