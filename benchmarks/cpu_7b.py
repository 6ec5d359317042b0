"""A generated 7B-shape Llama in INT4 on this CPU: tokens/s, and the fraction of the machine's bandwidth that this is.

    python benchmarks/cpu_7b.py [--scheme int4-g32] [--repeats 3]

Needs 18 GB of disk for the checkpoint and the file, and 5 GB of memory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import common

from tapeout.validate.session import SessionSpec
from tapeout.validate.throughput import bandwidth
from tapeout.validate.worker import open_session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="int4-g32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    arguments = parser.parse_args()
    model = common.checkpoint("7b", arguments.work)
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        scratch = Path(name)
        export = common.export_by_us(model, scratch / "ours", arguments.scheme, scratch / "cache")
        file = next((scratch / "ours").glob("*.gguf"))
        spec = SessionSpec(
            "tapeout.targets.llama_cpp:open_session",
            {"model": str(file), "context": 512, "threads": common.cores()},
        )
        bytes_per_s = bandwidth()
        with open_session(spec) as session:
            timing = session.time(32, 32, arguments.repeats)
            facts = session.facts
        token_s = statistics.median(second for run in timing.decode_s for second in run)
        # A token reads every weight once, but for the embedding table: one row of it.
        embedding = 32000 * 4096 * 34 / 32
        read = file.stat().st_size - embedding
        result = {
            "benchmark": "cpu_7b",
            "scheme": arguments.scheme,
            "export_wall_s": round(export.wall_s, 1),
            "export_peak_rss_gb": round(export.peak_bytes / 1e9, 3),
            "file_bytes": file.stat().st_size,
            "resident_bytes": facts.resident_bytes,
            "decode_tokens_per_s": round(1 / token_s, 2),
            "prefill_tokens_per_s": round(32 / statistics.median(timing.prefill_s), 2),
            "bytes_per_token": int(read),
            "bandwidth_gb_per_s": round(bytes_per_s / 1e9, 1),
            "roofline_fraction": round(read / token_s / bytes_per_s, 3),
        }
        print(
            f"{arguments.scheme}: {1 / token_s:.2f} tokens/s, {read / token_s / 1e9:.1f} of {bytes_per_s / 1e9:.1f} GB/s "
            f"({result['roofline_fraction']:.0%} of the roofline)"
        )
    common.report(result)


if __name__ == "__main__":
    main()
