"""Sessions on TensorRT: an engine on an NVIDIA GPU, its inputs and outputs in PyTorch's memory there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from tapeout.errors import MissingToolchain, PackageError, RuntimeCrash
from tapeout.targets.onnxruntime import OnnxRuntime, tokenizer_of
from tapeout.targets.tensorrt_engine import PLAN, SETTINGS
from tapeout.validate import device_peaks
from tapeout.validate.session import Facts, Logits

__all__ = ["TensorRt", "open_session"]


class TensorRt(OnnxRuntime):
    """A Session on TensorRT; see ``open_session``. Keys and values stay on the GPU, present ones are the next step's past."""

    def __init__(
        self, facts: Facts, engine: Any, profiles: Sequence[str], tokenizer: Any, chunk: int
    ) -> None:
        import tensorrt as trt
        import torch

        self.facts = facts
        self._tokenizer, self._chunk = tokenizer, chunk
        self._engine, self._stream = engine, torch.cuda.Stream()
        self._types = {
            trt.float32: torch.float32, trt.float16: torch.float16, trt.int64: torch.int64, trt.int32: torch.int32,
        }  # fmt: skip
        self._contexts = {}
        for index, name in enumerate(profiles):
            self._contexts[name] = engine.create_execution_context()
            self._contexts[name].set_optimization_profile_async(index, self._stream.cuda_stream)
        self._stream.synchronize()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self._outputs = [name for name in names if name not in inputs]
        self._vocab_size = int(engine.get_tensor_shape("logits")[2])
        self._cached = {
            name: tuple(engine.get_tensor_shape(name)) for name in inputs if name.startswith("past_")
        }
        self._past: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        """Begin a new sequence with an empty cache."""
        import torch

        self._length = 0
        self._past = {
            name: torch.empty((1, shape[1], 0, shape[3]), dtype=self._type(name), device="cuda")
            for name, shape in self._cached.items()
        }

    def roof(self) -> dict[str, Any]:
        """What the GPU multiplies in the types of keys and values, and in float32; see ``device_peaks.roof``."""
        types = {str(self._type(name)).removeprefix("torch.") for name in self._cached}
        return device_peaks.roof("cuda", (*sorted(types), "float32"), self._chunk)

    def close(self) -> None:
        """Free the engine; may be called twice."""
        self._contexts, self._engine, self._past = {}, None, {}

    def _type(self, name: str) -> Any:
        return self._types[self._engine.get_tensor_dtype(name)]

    def _run(self, ids: Sequence[int], logits: Logits) -> None:
        import torch

        count, total = len(ids), self._length + len(ids)
        numbers = {
            "input_ids": [list(ids)],
            "position_ids": [list(range(self._length, total))],
            "attention_mask": [[1] * total],
            # A profile has at least one row.
            "logits_at": list(range(min(count - len(logits), count - 1), count)),
        }
        given = {name: torch.tensor(value, device="cuda") for name, value in numbers.items()} | self._past
        context = self._contexts["decode" if count == 1 else "prefill"]
        for name, value in given.items():
            context.set_input_shape(name, tuple(value.shape))
            # No tokens take no memory, and TensorRT wants an address.
            context.set_tensor_address(name, value.data_ptr() or given["input_ids"].data_ptr())
        found = {}
        for name in self._outputs:
            shape = tuple(context.get_tensor_shape(name))
            found[name] = torch.empty(shape, dtype=self._type(name), device="cuda")
            context.set_tensor_address(name, found[name].data_ptr())
        self._stream.wait_stream(torch.cuda.current_stream())
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeCrash(f"TensorRT cannot run {count} tokens at position {self._length}.")
        self._stream.synchronize()
        rows = found.pop("logits")[0]
        if len(logits):
            logits[:] = rows[-len(logits) :].float().cpu().numpy()
        self._past = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        self._length = total


def open_session(directory: str, context: int, chunk: int = 512) -> TensorRt:
    """Load ``model.plan`` on the first GPU.

    Args:
        directory: where it stands, with ``engine.json`` and ``tokenizer.json``.
        context: most tokens of a sequence; no more than the engine was built for.
        chunk: most tokens of a prompt at once; no more than the engine was built for.

    Raises:
        MissingToolchain: TensorRT or PyTorch for CUDA is not installed. PackageError: no such file.
        RuntimeCrash: TensorRT refuses the engine: it is another version's, or another GPU's.
    """
    try:
        import tensorrt as trt
        import torch
    except ImportError as error:
        raise MissingToolchain(
            f"an engine runs on tensorrt and torch ({error}): pip install tensorrt torch"
        ) from error
    path = Path(directory) / PLAN
    if not path.is_file():
        raise PackageError(f"{path} is absent; TensorRT has nothing to load.")
    said = json.loads((path.parent / SETTINGS).read_text(encoding="utf-8"))
    begin, before = perf_counter(), torch.cuda.mem_get_info()[0]
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise RuntimeCrash(
            f"TensorRT {trt.__version__} does not load {path}: it was built by another version, or for another GPU."
        )
    facts = Facts(
        f"TensorRT {trt.__version__}", torch.cuda.get_device_name(), perf_counter() - begin, 0, context
    )
    names = [profile["name"] for profile in said["profiles"]]
    session = TensorRt(facts, engine, names, tokenizer_of(directory), chunk)
    session.decode(0)
    session.reset()
    resident = max(0, before - torch.cuda.mem_get_info()[0])
    session.facts = replace(facts, resident_bytes=resident, bandwidth=device_peaks.copy_bandwidth("cuda"))
    return session
