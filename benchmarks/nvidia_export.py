"""Checkpoint to ModelOpt's unified format: tapeout against nvidia-modelopt, wall time, peak memory, and the disk.

    python benchmarks/nvidia_export.py [--shape 1b|8b] [--repeats 3] [--peers modelopt]

Both begin with the checkpoint in the page cache, round to nearest INT4 in groups of 128 (embeddings and head stay as they are) and write
to the same disk, in turn; the median of the repeats counts. Beside them stands how long the same disk takes to have as many bytes from a
plain write: a side's time with the ``sync`` after it is held against that. Shape 8b is Llama 3 8B, all of whose layers read the bytes of the first one, since a disk of a
small machine does not hold three times its weights; the peer needs all of them, and 16 GB of memory, so that it runs 1b alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import common
from common import environment

ENVIRONMENTS = {
    "modelopt": ("torch==2.13.0", "nvidia-modelopt==0.47.0", "transformers==5.14.1", "accelerate", "requests", "setuptools"),
}  # fmt: skip
_PEERS = Path(__file__).resolve().parent / "peers"
_FLOATS = json.dumps({"model.embed_tokens": "none", "lm_head": "none"})


def export_by_us(shape: str, model: Path, out: Path, store: Path) -> common.Ran:
    """Load → quantize → export in a fresh process with an empty store."""
    layers = str(common.SHAPES[shape]["num_hidden_layers"])
    words = (sys.executable, _PEERS / "ours.py", "nvidia", "int4-g128", model, out, layers, _FLOATS)
    return common.run(*words, environment={"TAPEOUT_CACHE": str(store)})


def synced() -> float:
    """Seconds until the disk has what was written."""
    begin = time.perf_counter()
    os.sync()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=("1b", "8b"), default="1b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default="modelopt", help="none: an empty string")
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    arguments = parser.parse_args()
    peers = {name: environment(name, ENVIRONMENTS[name]) for name in arguments.peers.split(",") if name}
    if peers and arguments.shape == "8b":
        parser.error("ModelOpt's road needs all layers on the disk, and 16 GB of memory: --peers ''")
    folded = arguments.shape == "8b"
    make = common.folded if folded else common.checkpoint
    model = make(arguments.shape, arguments.work)
    ran: dict[str, list[common.Ran]] = {"tapeout": [], **{name: [] for name in peers}}
    sizes: dict[str, int] = {}
    plain: list[float] = []
    whole: list[float] = []
    written = 0
    for _ in range(arguments.repeats):
        for who in ran:
            with tempfile.TemporaryDirectory(dir=arguments.work) as name:
                scratch = Path(name)
                common.read_into_page_cache(model)
                os.sync()
                if who == "tapeout":
                    done = export_by_us(arguments.shape, model, scratch / "out", scratch / "store")
                else:
                    script = _PEERS / "modelopt_export.py"
                    done = common.run(peers[who], script, model, scratch / "out")
                after = synced()
                ran[who].append(done)
                sizes[who] = common.size(scratch / "out")
                if who == "tapeout":
                    whole.append(done.wall_s + after)
                    written = sizes[who] + common.size(scratch / "store")
        plain.append(common.plain_write(arguments.work, written))
    share = statistics.median(plain) / statistics.median(whole)
    speed = written / statistics.median(plain) / 1e6
    print(
        f"codes and artifact are {written / 1e6:.0f} MB; the disk takes {speed:.0f} MB/s: {share:.0%} of our time with sync"
    )
    facts = {
        "benchmark": "nvidia_export",
        "shape": arguments.shape,
        "repeats": arguments.repeats,
        "written_bytes": written,
        "disk_mb_s": round(speed, 1),
        "share_of_disk": round(share, 3),
    }
    common.report_exports(facts, ran, sizes)


if __name__ == "__main__":
    main()
