"""What NF4 costs on ONNX Runtime: one layer's product by MatMulBnb4, MatMulNBits and a float32 matmul.

    .venv/bin/python benchmarks/nf4_onnx.py [THREADS]

The best of 40 runs that take turns, since the machine may be shared: milliseconds of 8192 × 2048 weights and 1 or 128 tokens.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

OUT, INTO, BLOCK, ROUNDS = 8192, 2048, 32, 40
random = np.random.default_rng(0)


def session(op: str, arrays: list[Any], threads: int, **attributes: int) -> onnxruntime.InferenceSession:
    """One node over constants."""
    names = [f"w{index}" for index in range(len(arrays))]
    node = helper.make_node(op, ["x", *names], ["y"], domain="com.microsoft", **attributes)
    given = [numpy_helper.from_array(each, name) for name, each in zip(names, arrays, strict=True)]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width])
        for name, width in (("x", INTO), ("y", OUT))
    )
    graph = helper.make_graph([node], "layer", [x], [y], given)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])


def main() -> None:
    """Print one JSON document."""
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    codes = random.integers(0, 256, OUT * INTO // 2, dtype=np.uint8)
    scales = random.random(OUT * INTO // BLOCK, dtype=np.float32)
    shape = {"N": OUT, "K": INTO}
    four = [codes.reshape(OUT, INTO // BLOCK, BLOCK // 2), scales.reshape(OUT, -1)]
    ways = {
        "MatMulBnb4": session("MatMulBnb4", [codes, scales[: codes.size * 2 // 64]], threads, **shape, block_size=64, quant_type=1, transB=1),
        "MatMulNBits": session("MatMulNBits", four, threads, **shape, block_size=BLOCK, bits=4, accuracy_level=4),
        "float32": session("FusedMatMul", [random.random((OUT, INTO), dtype=np.float32)], threads, transB=1),
    }  # fmt: skip
    found: dict[str, Any] = {"runtime": f"onnxruntime {onnxruntime.__version__}", "threads": threads}
    for tokens in (1, 128):
        x = random.standard_normal((tokens, INTO), dtype=np.float32)
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(ROUNDS):
            for name, each in ways.items():
                begin = perf_counter()
                each.run(None, {"x": x})
                best[name] = min(best[name], 1e3 * (perf_counter() - begin))
        found[f"{tokens} tokens, ms"] = {name: round(value, 3) for name, value in best.items()}
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
