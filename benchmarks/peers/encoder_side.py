"""One side of the encoder benchmark, in whatever environment has its runtime: makes what it runs, then times it when asked.

    python encoder_side.py SIDE MODEL FOLDER THREADS

Each line of standard input is ``BATCH RUNS``; each answer is a line of JSON, the seconds of every run. The first line that
it writes says that it is ready: ``{}``, or why it cannot be.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TOKENS = 128
Run = Callable[[dict[str, Any]], object]


def batch(size: int) -> dict[str, Any]:
    """Ids below every vocabulary's end and a mask without padding, int64 [size, TOKENS]."""
    ids = np.random.default_rng(size).integers(5, 200, (size, TOKENS))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def onnxruntime_session(file: Path, threads: int) -> Run:
    """A file as its users open it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    wanted = [each.name for each in session.get_inputs()]

    def run(given: dict[str, Any]) -> object:
        types = {"token_type_ids": np.zeros_like(given["input_ids"])}
        return session.run(None, {name: (types | given)[name] for name in wanted})

    return run


def tapeout(model: Path, folder: Path, threads: int, scheme: str) -> Run:
    """What ``tapeout export cpu --format onnx`` writes."""
    from tapeout import load, quantize, target
    from tapeout.quantize import Calibration

    out = folder / scheme
    if not out.exists():
        shown = Calibration(None, 8, TOKENS) if scheme == "w8a8-static" else None
        out.mkdir(parents=True)
        target("cpu", format="onnx").export(quantize(load(str(model)), scheme, calibration=shown), out)
    return onnxruntime_session(out / "model.onnx", threads)


def optimum(model: Path, folder: Path, threads: int, kind: str) -> Run:
    """optimum-onnx's export, and its dynamic quantizer for VNNI (one scale a channel of weights)."""
    from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    exported, quantized = folder / "float32", folder / "int8"
    if not exported.exists():
        ORTModelForFeatureExtraction.from_pretrained(model, export=True).save_pretrained(exported)
    if kind == "float32":
        return onnxruntime_session(exported / "model.onnx", threads)
    if not quantized.exists():
        how = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        ORTQuantizer.from_pretrained(exported).quantize(save_dir=quantized, quantization_config=how)
    return onnxruntime_session(next(quantized.glob("*.onnx")), threads)


def openvino(model: Path, folder: Path, threads: int, kind: str) -> Run:
    """The same export on OpenVINO, in float32 or as it chooses by itself; or through NNCF's post-training quantization."""
    import openvino as ov

    core = ov.Core()
    network = core.read_model(folder.parent / "optimum" / "float32" / "model.onnx")
    if kind == "int8":
        import nncf

        feed = [batch(1) | {"token_type_ids": np.zeros((1, TOKENS), np.int64)} for _ in range(8)]
        network = nncf.quantize(network, nncf.Dataset(feed), model_type=nncf.ModelType.TRANSFORMER)
    hints: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if kind != "default":
        hints["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = core.compile_model(network, "CPU", hints)
    wanted = {name for each in compiled.inputs for name in each.names}

    def run(given: dict[str, Any]) -> object:
        types = {"token_type_ids": np.zeros_like(given["input_ids"])}
        return compiled({name: value for name, value in (types | given).items() if name in wanted})

    return run


def torch(model: Path, folder: Path, threads: int, kind: str) -> Run:
    """Transformers with SDPA, and torch's own dynamic quantization of every Linear."""
    import torch
    from transformers import AutoModel

    torch.set_num_threads(threads)
    network = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    if kind == "int8":
        network = torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear}, torch.qint8)

    def run(given: dict[str, Any]) -> object:
        with torch.inference_mode():
            return network(**{name: torch.from_numpy(value) for name, value in given.items()})

    return run


def main() -> None:
    side, model, folder, threads = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    name, _, kind = side.partition(" ")
    try:
        run = globals()[name](model, folder, threads, kind)
        run(batch(1))
    except Exception as error:  # whatever a library raises: it is the answer
        print(json.dumps({"failed": f"{type(error).__name__}: {str(error)[:300]}"}), file=answers, flush=True)
        return
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        size, runs = map(int, line.split())
        given, seconds = batch(size), []
        for _ in range(runs):
            begin = time.perf_counter()
            run(given)
            seconds.append(time.perf_counter() - begin)
        print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
