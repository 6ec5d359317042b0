"""Checkpoint to what servers load: tapeout against the tool that usually writes it, wall time, peak memory, and the disk.

    python benchmarks/directory_export.py rocm|nvidia|trtllm [--shape 1b|8b] [--repeats 3] [--no-peer]

It took the place of ``nvidia_export.py`` and ``rocm_export.py``, which lines of results/*_8b.txt still name. Of ``rocm`` the
compressed-tensors directory and llm-compressor, of ``nvidia`` the unified directory and nvidia-modelopt, of ``trtllm`` the checkpoints of two ranks and nvidia-modelopt's own exporter of them. Both sides begin with the checkpoint in the page cache, round to
nearest INT4 in groups of 128 (embeddings and head stay as they are) and write to the same disk, in turn; the median of the repeats counts.
Beside each time stands the one with the ``sync`` after it, and beside all what a plain write of as many bytes takes. Shape 8b is Llama 3 8B,
all of whose layers read the bytes of the first one, since a disk of a small machine does not hold three times its weights; the peers need
all of them, and 16 GB of memory, so that they run 1b alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import common
from common import environment
from quality_peers import PEERS

_HERE = Path(__file__).resolve().parent / "peers"
_MODELOPT = (
    "torch==2.13.0", "nvidia-modelopt==0.47.0", "transformers==5.14.1", "accelerate", "requests", "setuptools",
)  # fmt: skip
_FLOATS = json.dumps({"model.embed_tokens": "none", "lm_head": "none"})


class Side(NamedTuple):
    """A format: the target and options that write it, and the peer with its packages and script's arguments."""

    target: str
    options: str
    peer: str
    packages: tuple[str, ...]
    script: tuple[str, ...]


SIDES = {
    "rocm": Side(
        "rocm", "{}", "llm_compressor", PEERS["llm_compressor"], ("llm_compressor_export.py",)
    ),
    "nvidia": Side("nvidia", "{}", "modelopt", _MODELOPT, ("modelopt_export.py",)),
    "trtllm": Side(
        "nvidia",
        '{"format": "trtllm", "tensor_parallel": 2}',
        "modelopt",
        _MODELOPT,
        ("modelopt_export.py", "2"),
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--shape", choices=("1b", "8b"), default="1b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    arguments = parser.parse_args()
    side = SIDES[arguments.side]
    if arguments.shape == "8b" and not arguments.no_peer:
        parser.error(f"{side.peer} needs all layers on the disk, and 16 GB of memory: --no-peer")
    make = common.folded if arguments.shape == "8b" else common.checkpoint
    model = make(arguments.shape, arguments.work)
    layers = str(common.SHAPES[arguments.shape]["num_hidden_layers"])
    scripts: dict[str, tuple[str | Path, ...]] = {
        "tapeout": (sys.executable, _HERE / "ours.py", side.target, "int4-g128", model)
    }
    if not arguments.no_peer:
        scripts[side.peer] = (environment(side.peer, side.packages), _HERE / side.script[0], model)
    ran: dict[str, list[common.Ran]] = {who: [] for who in scripts}
    synced: dict[str, list[float]] = {who: [] for who in scripts}
    sizes: dict[str, int] = {}
    plain: list[float] = []
    written = 0
    for _ in range(arguments.repeats):
        for who, words in scripts.items():
            with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
                out, store = Path(scratch) / "out", Path(scratch) / "store"
                common.read_into_page_cache(model)
                os.sync()
                last = (layers, _FLOATS, side.options) if who == "tapeout" else side.script[1:]
                done = common.run(*words, out, *last, environment={"TAPEOUT_CACHE": str(store)})
                ran[who].append(done)
                synced[who].append(common.synced(done).wall_s)
                sizes[who] = common.size(out)
                if who == "tapeout":
                    written = sizes[who] + common.size(store)
        plain.append(common.plain_write(arguments.work, written))
    whole = {who: round(statistics.median(each), 2) for who, each in synced.items()}
    share, speed = statistics.median(plain) / whole["tapeout"], written / statistics.median(plain) / 1e6
    print(
        f"codes and artifact are {written / 1e6:.0f} MB; the disk takes {speed:.0f} MB/s: {share:.0%} of our time with sync; with sync "
        + ", ".join(f"{who} {seconds:.2f} s" for who, seconds in whole.items())
    )
    facts = {
        "benchmark": f"{arguments.side}_export",
        "shape": arguments.shape,
        "repeats": arguments.repeats,
        "written_bytes": written,
        "disk_mb_s": round(speed, 1),
        "share_of_disk": round(share, 3),
        "synced_s": whole,
    }
    common.report_exports(facts, ran, sizes, width=14)


if __name__ == "__main__":
    main()
