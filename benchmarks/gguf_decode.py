"""Decode and prefill of our GGUF file and of llama.cpp's own, same types and size, same runtime, in turn.

python benchmarks/gguf_decode.py [--rounds 10]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import common

from tapeout.validate.session import SessionSpec
from tapeout.validate.worker import open_session

_PROMPT, _NEW = 128, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    arguments = parser.parse_args()
    model = common.checkpoint("1b", arguments.work)
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        scratch = Path(name)
        common.export_by_us(model, scratch / "ours", "int4-g32", scratch / "cache")
        common.convert_by_peer(model, scratch / "f16.gguf")
        common.quantize_by_peer(scratch / "f16.gguf", scratch / "peer.gguf", "Q4_0")
        files = {"tapeout": next((scratch / "ours").glob("*.gguf")), "llama.cpp": scratch / "peer.gguf"}
        factory = "tapeout.targets.llama_cpp:open_session"
        prefill: dict[str, list[float]] = {who: [] for who in files}
        decode: dict[str, list[float]] = {who: [] for who in files}
        for turn in range(arguments.rounds):
            # Loaded anew, and in turn first: where the memory of a model lies makes a few percent.
            for who in list(files)[:: 1 if turn % 2 else -1]:
                spec = {"model": str(files[who]), "context": 512, "threads": common.cores()}
                with open_session(SessionSpec(factory, spec)) as session:
                    timing = session.time(_PROMPT, _NEW, 1)
                prefill[who].append(_PROMPT / timing.prefill_s[0])
                decode[who].append(1 / statistics.median(timing.decode_s[0]))
        result: dict[str, object] = {"benchmark": "gguf_decode", "rounds": arguments.rounds}
        for what, speeds in (("prefill", prefill), ("decode", decode)):
            ours, theirs = (statistics.median(speeds[who]) for who in files)
            result[what] = {
                "tapeout_tokens_per_s": round(ours, 2),
                "peer_tokens_per_s": round(theirs, 2),
                "ratio": round(ours / theirs, 3),
            }
            print(f"{what}: tapeout {ours:.1f}, llama.cpp {theirs:.1f} tokens/s: {ours / theirs:.3f}")
        result["file_bytes"] = {who: file.stat().st_size for who, file in files.items()}
    common.report(result)


if __name__ == "__main__":
    main()
