"""Build a TensorRT engine from the graph beside this script, on the machine whose GPU shall run it.

    pip install tensorrt
    python build_engine.py [--out model.plan] [--workspace 4G] [--level 3] [--timing-cache FILE]

Takes engine.json, which says the profiles, and nothing of tapeout. The last line on stdout is JSON: versions, seconds, bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def tensorrt() -> Any:
    """TensorRT's Python bindings, whoever installed them."""
    try:
        import tensorrt as found
    except ImportError:
        try:
            import tensorrt_bindings as found
        except ImportError as error:
            sys.exit(f"TensorRT's bindings cannot be loaded ({error}): pip install tensorrt")
    if not hasattr(found, "Builder"):
        sys.exit(
            "the package 'tensorrt' that is installed here is empty: pip install tensorrt from NVIDIA's index"
        )
    return found


def size(text: str) -> int:
    """Bytes of 500M or 4G."""
    found = re.fullmatch(r"(\d+)([MG])", text.upper())
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; write 500M or 4G")
    return int(found[1]) * {"M": 10**6, "G": 10**9}[found[2]]


def build(model: Path, said: dict[str, Any], out: Path, timing_cache: Path | None) -> dict[str, Any]:
    """Parse the graph, build the engine, write it; what there is to say of it."""
    trt = tensorrt()
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # Strongly typed: the graph says every type itself. Since TensorRT 11 there is no other network.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    begin = time.perf_counter()
    if not parser.parse_from_file(str(model)):
        errors = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        sys.exit("the parser refuses {}: {}".format(model, " / ".join(errors)))
    parsed = time.perf_counter()
    config = builder.create_builder_config()
    if said.get("workspace_bytes"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, said["workspace_bytes"])
    if said.get("builder_level") is not None:
        config.builder_optimization_level = said["builder_level"]
    if timing_cache:
        known = timing_cache.read_bytes() if timing_cache.exists() else b""
        if not config.set_timing_cache(config.create_timing_cache(known), False):
            sys.exit(f"{timing_cache} is no timing cache of this TensorRT on this GPU: remove it")
    for profile in said["profiles"]:
        shapes = builder.create_optimization_profile()
        for name, (least, usual, most) in profile["shapes"].items():
            shapes.set_shape(name, tuple(least), tuple(usual), tuple(most))
        if config.add_optimization_profile(shapes) < 0:
            sys.exit("the profile {} is not one of {}".format(profile["name"], model))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        sys.exit("the engine could not be built; what TensorRT said of it stands above")
    built = time.perf_counter()
    partial = out.with_name(out.name + ".partial")
    with partial.open("wb") as file:
        file.write(memoryview(engine))
    partial.replace(out)
    if timing_cache:
        timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return {
        "bindings": trt.__version__,
        "parse_s": round(parsed - begin, 2),
        "build_s": round(built - parsed, 2),
        "bytes": out.stat().st_size,
    }


def main() -> None:
    """Read the flags, build, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=HERE / "model.onnx")
    parser.add_argument("--out", type=Path, default=HERE / "model.plan")
    parser.add_argument("--workspace", type=size, help="most memory that a kernel may take for its work")
    parser.add_argument(
        "--level", type=int, choices=range(6), help="how long the builder looks for fast kernels"
    )
    parser.add_argument("--timing-cache", type=Path, help="kept between builds; made when absent")
    given = parser.parse_args()
    said = json.loads(given.model.with_name("engine.json").read_text(encoding="utf-8"))
    if given.workspace:
        said["workspace_bytes"] = given.workspace
    if given.level is not None:
        said["builder_level"] = given.level
    print(json.dumps(build(given.model, said, given.out, given.timing_cache)), flush=True)


if __name__ == "__main__":
    main()
