"""NVIDIA GPUs: what TensorRT-LLM, vLLM, SGLang and TensorRT load."""

# Annotations are values here: the fields are the target's flags.
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from tapeout.errors import TapeoutError, nearest
from tapeout.targets import check_counts, tensorrt
from tapeout.targets.local import parse_size
from tapeout.targets.modelopt import ModelOpt
from tapeout.targets.roads import Road, Roads
from tapeout.targets.trtllm import Trtllm
from tapeout.validate.session import KvCache

_CACHES: tuple[KvCache, ...] = ("kv-f16", "kv-fp8")

_Plugin = Literal["auto", "float16", "bfloat16", "float32", "disable"]


@dataclass(frozen=True)
class Nvidia(Roads):
    """NVIDIA GPUs.

    Attributes:
        format: What is written: modelopt, the directory that TensorRT-LLM, vLLM and SGLang load; trtllm, rank checkpoints for
            trtllm-build; onnx-trt, a graph for TensorRT, with an engine of it.
        max_shard_size: Of modelopt: split the weights into files of at most this size (500M, 2G).
        kv_cache: Of modelopt: what servers keep keys and values in: half floats (the default), or float8.
        tensor_parallel: Of trtllm: GPUs that share each layer (1, 2, 4, 8).
        pipeline_parallel: Of trtllm: stages of layers, each on GPUs of its own.
        gpt_attention_plugin: Of trtllm: type of TensorRT-LLM's attention plugin; auto: the model's.
        gemm_plugin: Of trtllm: type of its plugin for float matmuls; auto: the model's.
        max_batch_size: Of trtllm: most sequences at once. Default: trtllm-build's own.
        max_input_len: Of trtllm: longest prompt, in tokens. Default: trtllm-build's own.
        max_seq_len: Of trtllm: longest prompt with its answer, in tokens. Default: the model's context.
        context: Of onnx-trt: longest context in tokens. Default: the model's own.
        max_batch: Of onnx-trt: most sequences at once.
        prefill_chunk: Of onnx-trt: most tokens of a prompt that are computed at once.
        engine: Of onnx-trt: who builds an engine beside the graph: tensorrt, which needs a GPU, tensorrt-rtx, which needs none, auto, the
            first of them that is here, or none: builders do not give the same bytes twice.
        workspace: Of onnx-trt: most memory that a kernel may take for its work (500M, 4G). Default: TensorRT's own.
        builder_level: Of onnx-trt: how long the builder looks for fast kernels, 0 … 5. Default: TensorRT's own.
        timing_cache: Of onnx-trt: a file that keeps the times of kernels from one build to the next; made when absent.
    """

    format: Literal["modelopt", "trtllm", "onnx-trt"] = "modelopt"
    max_shard_size: str = "5G"
    kv_cache: Literal["kv-f16", "kv-fp8"] | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    gpt_attention_plugin: _Plugin = "auto"
    gemm_plugin: _Plugin = "auto"
    max_batch_size: int | None = None
    max_input_len: int | None = None
    max_seq_len: int | None = None
    context: int | None = None
    max_batch: int = 1
    prefill_chunk: int = 512
    engine: Literal["none", "auto", "tensorrt", "tensorrt-rtx"] = "none"
    workspace: str | None = None
    builder_level: int | None = None
    timing_cache: str | None = None

    name: ClassVar[str] = "nvidia"
    summary: ClassVar[str] = "NVIDIA GPUs, through TensorRT-LLM, vLLM, SGLang or TensorRT."
    roads: ClassVar[Mapping[str, type[Road]]] = {
        "modelopt": ModelOpt,
        "trtllm": Trtllm,
        "onnx-trt": tensorrt.OnnxTrt,
    }

    def __post_init__(self) -> None:
        """TapeoutError for a flag of another format, and a size, a number or a cache that is none."""
        self.check_flags()
        parse_size(self.max_shard_size)
        check_counts(
            self,
            *("tensor_parallel", "pipeline_parallel", "max_batch_size", "max_input_len", "max_seq_len"),
            *("context", "max_batch", "prefill_chunk"),
        )
        tensorrt.check(self)
        if self.kv_cache is not None and self.kv_cache not in _CACHES:
            raise TapeoutError(
                f"'{self.kv_cache}' is not a cache of target {self.name}{nearest(self.kv_cache, _CACHES)}."
            )

    @property
    def cache(self) -> KvCache:
        """What was chosen, or the format's own."""
        return self.kv_cache or self._road.cache
