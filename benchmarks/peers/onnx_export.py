"""Exports a checkpoint to ONNX in a peer's own way: ``python onnx_export.py genai|genai-g128|optimum|optimum-int8 MODEL OUT``.

genai: onnxruntime-genai's model builder, INT4 in groups of 32 (its own choice) or 128, activations in int8. optimum: float32 with a cache.
optimum-int8: the graph that optimum left in MODEL, its matmuls rounded to int8 with dynamic activations.
"""

from __future__ import annotations

import runpy
import sys
import tempfile
from functools import partial
from pathlib import Path


def genai(model: Path, out: Path, group: int = 32, way: str = "default") -> None:
    with tempfile.TemporaryDirectory() as cache:
        settings = (
            "-p",
            "int4",
            "-e",
            "cpu",
            "--extra_options",
            f"block_size={group}",
            f"algo_config={way}",
            "accuracy_level=4",
        )
        sys.argv = ["builder", "-i", str(model), "-o", str(out), "-c", cache, *settings]
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def optimum(model: Path, out: Path) -> None:
    from optimum.exporters.onnx import main_export

    main_export(str(model), out, task="text-generation-with-past", do_validation=False)


def optimum_int8(model: Path, out: Path) -> None:
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    quantizer = ORTQuantizer.from_pretrained(model, file_name="model.onnx")
    settings = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    quantizer.quantize(settings, save_dir=out, file_suffix=None, use_external_data_format=True)


if __name__ == "__main__":
    road, source, target = sys.argv[1:]
    roads = {
        "genai": genai,
        "genai-g128": partial(genai, group=128),
        "optimum": optimum,
        "optimum-int8": optimum_int8,
    }
    roads[road](Path(source), Path(target))
