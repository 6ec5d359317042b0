"""Checkpoint to ONNX: tapeout against onnxruntime-genai's model builder and optimum, wall time and peak memory.

    python benchmarks/onnx_export.py [--shape 1b|7b] [--repeats 3] [--peers genai,optimum]

All begin with the checkpoint in the page cache and write to the same disk, in turn; the median of the repeats counts. Ours and the
builder write INT4 in groups of 32; optimum writes float32 (its INT8 takes another pass), once, since it takes minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import common
from common import environment
from onnx_decode import ENVIRONMENTS

_EXPORT = Path(__file__).resolve().parent / "peers" / "onnx_export.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=common.SHAPES, default="1b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default="genai,optimum", help="none: an empty string")
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    arguments = parser.parse_args()
    model = common.checkpoint(arguments.shape, arguments.work)
    peers = {name: environment(name, ENVIRONMENTS[name]) for name in arguments.peers.split(",") if name}
    ran: dict[str, list[common.Ran]] = {"tapeout": [], **{name: [] for name in peers}}
    sizes: dict[str, int] = {}
    for repeat in range(arguments.repeats):
        for who in ran:
            if who == "optimum" and repeat:
                continue
            with tempfile.TemporaryDirectory(dir=arguments.work) as name:
                scratch = Path(name)
                common.read_into_page_cache(model)
                os.sync()
                if who == "tapeout":
                    head = {"lm_head": "int4-g32"}
                    store = scratch / "store"
                    ran[who].append(
                        common.export_by_us(
                            model, scratch / "out", "int4-g32", store, format="onnx", overrides=head
                        )
                    )
                    shutil.rmtree(store)
                else:
                    ran[who].append(common.run(peers[who], _EXPORT, who, model, scratch / "out"))
                sizes[who] = sum(path.stat().st_size for path in (scratch / "out").rglob("*"))
    facts = {"benchmark": "onnx_export", "shape": arguments.shape, "repeats": arguments.repeats}
    common.report_exports(facts, ran, sizes, width=8)


if __name__ == "__main__":
    main()
