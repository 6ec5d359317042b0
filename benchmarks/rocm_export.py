"""Checkpoint to compressed-tensors: tapeout against llm-compressor, wall time, peak memory, and the disk.

    python benchmarks/rocm_export.py [--shape 1b|8b] [--repeats 3] [--peers llm_compressor]

Both begin with the checkpoint in the page cache, round to nearest INT4 in groups of 128 (embeddings and head stay as they are) and write
to the same disk, in turn; the median of the repeats counts, and a side's time ends when its bytes are on the disk (``sync``). Beside them
stands a plain write of as many bytes. Shape 8b is Llama 3 8B, all of whose layers read the bytes of the first one, since a disk of a
small machine does not hold three times its weights; the peer needs all of them, and 16 GB of memory, so that it runs 1b alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import common
from common import environment
from quality_peers import PEERS

ENVIRONMENTS = {"llm_compressor": PEERS["llm_compressor"]}
_PEERS = Path(__file__).resolve().parent / "peers"
_FLOATS = json.dumps({"model.embed_tokens": "none", "lm_head": "none"})


def export_by_us(shape: str, model: Path, out: Path, store: Path) -> common.Ran:
    """Load → quantize → export in a fresh process with an empty store."""
    layers = str(common.SHAPES[shape]["num_hidden_layers"])
    words = (sys.executable, _PEERS / "ours.py", "rocm", "int4-g128", model, out, layers, _FLOATS)
    return common.run(*words, environment={"TAPEOUT_CACHE": str(store)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=("1b", "8b"), default="1b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default="llm_compressor", help="none: an empty string")
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    arguments = parser.parse_args()
    peers = {name: environment(name, ENVIRONMENTS[name]) for name in arguments.peers.split(",") if name}
    if peers and arguments.shape == "8b":
        parser.error("llm-compressor's road needs all layers on the disk, and 16 GB of memory: --peers ''")
    make = common.folded if arguments.shape == "8b" else common.checkpoint
    model = make(arguments.shape, arguments.work)
    ran: dict[str, list[common.Ran]] = {"tapeout": [], **{name: [] for name in peers}}
    sizes: dict[str, int] = {}
    plain: list[float] = []
    files = 0
    for _ in range(arguments.repeats):
        for who in ran:
            with tempfile.TemporaryDirectory(dir=arguments.work) as name:
                scratch = Path(name)
                common.read_into_page_cache(model)
                os.sync()
                if who == "tapeout":
                    done = export_by_us(arguments.shape, model, scratch / "out", scratch / "store")
                else:
                    done = common.run(peers[who], _PEERS / "llm_compressor_export.py", model, scratch / "out")
                ran[who].append(common.synced(done))
                sizes[who] = common.size(scratch / "out")
                if who == "tapeout":
                    written = sizes[who] + common.size(scratch / "store")
                    files = len(list((scratch / "out").glob("*.safetensors")))
        plain.append(common.plain_write(arguments.work, written))
    share = statistics.median(plain) / statistics.median(each.wall_s for each in ran["tapeout"])
    speed = written / statistics.median(plain) / 1e6
    print(
        f"codes and {files} files are {written / 1e6:.0f} MB; the disk takes {speed:.0f} MB/s: {share:.0%} of our time"
    )
    facts = {
        "benchmark": "rocm_export",
        "shape": arguments.shape,
        "repeats": arguments.repeats,
        "written_bytes": written,
        "disk_mb_s": round(speed, 1),
        "share_of_disk": round(share, 3),
    }
    common.report_exports(facts, ran, sizes, width=14)


if __name__ == "__main__":
    main()
