"""Checkpoint to GGUF: tapeout against convert_hf_to_gguf.py + llama-quantize, wall time and peak memory.

    python benchmarks/gguf_export.py [--shape 1b|7b] [--repeats 3] [--no-peer]

Both begin with the checkpoint in the page cache and write to the same disk, in turn; the median of the repeats counts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path

import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=common.SHAPES, default="1b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--no-peer", action="store_true", help="only ours (the peer's 7B takes minutes and 14 GB)"
    )
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    arguments = parser.parse_args()
    model = common.checkpoint(arguments.shape, arguments.work)
    if not arguments.no_peer:
        common.peer()
    result: dict[str, object] = {
        "benchmark": "gguf_export",
        "shape": arguments.shape,
        "repeats": arguments.repeats,
    }
    for scheme, kind in (("int4-g32", "Q4_0"), ("int8", "Q8_0")):
        ours, theirs = [], []
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory(dir=arguments.work) as name:
                scratch = Path(name)
                common.read_into_page_cache(model)
                os.sync()
                ours.append(common.export_by_us(model, scratch / "ours", scheme, scratch / "cache"))
                size = sum(path.stat().st_size for path in (scratch / "ours").iterdir())
                shutil.rmtree(scratch / "cache")
                if not arguments.no_peer:
                    os.sync()
                    converted = common.convert_by_peer(model, scratch / "f16.gguf")
                    quantized = common.quantize_by_peer(scratch / "f16.gguf", scratch / "peer.gguf", kind)
                    theirs.append((converted, quantized))
                    peer_size = (scratch / "peer.gguf").stat().st_size
        wall = statistics.median(ran.wall_s for ran in ours)
        entry = {
            "wall_s": round(wall, 2),
            "peak_rss_gb": round(max(ran.peak_bytes for ran in ours) / 1e9, 3),
            "file_bytes": size,
        }
        print(f"{kind}: tapeout {wall:.2f} s, {entry['peak_rss_gb']} GB peak, {size / 1e6:.1f} MB")
        if theirs:
            peer_wall = statistics.median(c.wall_s + q.wall_s for c, q in theirs)
            peak = max(max(c.peak_bytes, q.peak_bytes) for c, q in theirs)
            entry |= {
                "peer_wall_s": round(peer_wall, 2),
                "peer_convert_s": round(statistics.median(c.wall_s for c, _ in theirs), 2),
                "peer_quantize_s": round(statistics.median(q.wall_s for _, q in theirs), 2),
                "peer_peak_rss_gb": round(peak / 1e9, 3),
                "peer_file_bytes": peer_size,
                "speedup": round(peer_wall / wall, 2),
            }
            print(
                f"{kind}: llama.cpp {peer_wall:.2f} s, {peak / 1e9:.3f} GB peak, {peer_size / 1e6:.1f} MB: {peer_wall / wall:.2f}×"
            )
        result[kind] = entry
    common.report(result)


if __name__ == "__main__":
    main()
