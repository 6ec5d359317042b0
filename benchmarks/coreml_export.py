"""Checkpoint to Core ML: tapeout against coremltools' own road, wall time and peak memory.

    python benchmarks/coreml_export.py [--shape 1b|8b] [--repeats 3] [--peers coremltools]

Both begin with the checkpoint in the page cache and write to the same disk, in turn; the median of the repeats counts. Both write INT4 in
groups of 32; ours two functions with caches, the peer one without: a plain torch module, traced, ``coremltools.convert`` to iOS 18, and
``linear_quantize_weights``. The peer runs once, since it takes minutes. Shape 8b is Llama 3 8B, all of whose layers read the bytes of
the first one, since a disk of a small machine does not hold three times its weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import common
from common import environment

ENVIRONMENTS = {
    "coremltools": ("coremltools==9.0", "torch==2.13.0", "numpy==2.3.5", "safetensors", "scikit-learn"),
}
_PEERS = Path(__file__).resolve().parent / "peers"


def export_by_us(shape: str, model: Path, out: Path, store: Path) -> common.Ran:
    """Load → quantize → export in a fresh process with an empty store."""
    layers = str(common.SHAPES[shape]["num_hidden_layers"])
    head = json.dumps({"lm_head": "int4-g32"})
    words = (sys.executable, _PEERS / "ours.py", "apple", "int4-g32", model, out, layers, head)
    return common.run(*words, environment={"TAPEOUT_CACHE": str(store)})


def checkpoint(shape: str, work: Path) -> Path:
    """The shape's checkpoint, folded where it is too large to stand thrice on a small disk."""
    return common.folded(shape, work) if shape == "8b" else common.checkpoint(shape, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=("1b", "8b"), default="1b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default="coremltools", help="none: an empty string")
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    parser.add_argument("--store", type=Path, help="where the codes stand meanwhile; default: below --work")
    arguments = parser.parse_args()
    peers = {name: environment(name, ENVIRONMENTS[name]) for name in arguments.peers.split(",") if name}
    if peers and arguments.shape == "8b":
        parser.error("coremltools' road needs all layers, and more memory: --peers ''")
    model = checkpoint(arguments.shape, arguments.work)
    ran: dict[str, list[common.Ran]] = {"tapeout": [], **{name: [] for name in peers}}
    sizes: dict[str, int] = {}
    for repeat in range(arguments.repeats):
        for who in ran:
            if who != "tapeout" and repeat:
                continue
            with tempfile.TemporaryDirectory(dir=arguments.work) as name:
                scratch = Path(name)
                common.read_into_page_cache(model)
                os.sync()
                if who == "tapeout":
                    with tempfile.TemporaryDirectory(dir=arguments.store or scratch) as store:
                        ran[who].append(export_by_us(arguments.shape, model, scratch / "out", Path(store)))
                else:
                    script = _PEERS / "coreml_export.py"
                    ran[who].append(common.run(peers[who], script, model, scratch / "out"))
                sizes[who] = sum(
                    path.stat().st_size for path in (scratch / "out").rglob("*") if path.is_file()
                )
    facts = {"benchmark": "coreml_export", "shape": arguments.shape, "repeats": arguments.repeats}
    common.report_exports(facts, ran, sizes)


if __name__ == "__main__":
    main()
