"""GPTQ and AWQ: wall time and peak memory, tapeout against llm-compressor on the same model, layers and tokens.

    python benchmarks/calibrate.py [--hidden 1024] [--depths 2 6] [--samples 32] [--length 512] [--no-peer]

A generated Llama at two depths: what calibration holds in memory should follow a layer's size and not the model's. Both sides
run in processes of their own, one after the other, from the checkpoint to a saved one. Ends with a JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
from quality_peers import PEERS

from tapeout.files import cache_directory

_HERE = Path(__file__).resolve().parent
OURS = (
    "import sys; from pathlib import Path; from tapeout.models import load; from tapeout.quantize import Calibration, quantize\n"
    "quantize(load(sys.argv[1]), 'int4-g128', rounding=sys.argv[2], out=Path(sys.argv[3]), overrides={'lm_head': 'none', "
    "'model.embed_tokens': 'none'}, calibration=Calibration(Path(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6])))"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--no-peer", action="store_true")
    arguments = parser.parse_args()
    text = _HERE.parent / "quantize" / "data" / "calibration.txt"
    samples, length = str(arguments.samples), str(arguments.length)
    result: dict[str, Any] = {"benchmark": "calibrate", **vars(arguments), "runs": []}
    (cache_directory() / "benchmarks").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_directory() / "benchmarks") as name:
        work = Path(name)
        for depth in arguments.depths:
            shape = {
                "hidden_size": arguments.hidden,
                "intermediate_size": arguments.hidden * 11 // 4,
                "num_hidden_layers": depth,
                "num_attention_heads": 16,
                "max_position_embeddings": 2048,
                "vocab_size": 512,
            }
            model = common.generated(work / f"model-{depth}", shape)
            for rounding in ("gptq", "awq"):
                common.read_into_page_cache(model)
                out = work / f"ours-{depth}-{rounding}"
                run = common.run(sys.executable, "-c", OURS, model, rounding, out, text, samples, length)
                row = {
                    "depth": depth,
                    "rounding": rounding,
                    "wall_s": round(run.wall_s, 2),
                    "peak_rss_gb": round(run.peak_bytes / 1e9, 3),
                }
                print(f"{depth} layers, {rounding}: tapeout {run.wall_s:.1f} s, {row['peak_rss_gb']} GB")
                if not arguments.no_peer:
                    variant = f"{rounding.upper()}-int4-g128"
                    there = work / f"peer-{depth}-{rounding}"
                    words = ["--model", model, "--calibration", text, "--out", there, "--samples", samples]
                    common.run(
                        common.environment("llm_compressor", PEERS["llm_compressor"]),
                        _HERE / "peers" / "llm_compressor.py",
                        *words,
                        "--length",
                        length,
                        "--variant",
                        variant,
                        environment={"PYTHONPATH": str(_HERE), "HF_HUB_OFFLINE": "1"},
                    )
                    (facts,) = (json.loads(path.read_text()) for path in there.glob("*.json"))
                    row |= {
                        "peer_wall_s": facts["wall_s"],
                        "peer_peak_rss_gb": round(facts["peak_rss_bytes"] / 1e9, 3),
                        "speedup": round(facts["wall_s"] / run.wall_s, 2),
                    }
                    print(
                        f"{depth} layers, {rounding}: llm-compressor {facts['wall_s']} s, {row['peer_peak_rss_gb']} GB: "
                        f"{row['speedup']}×"
                    )
                result["runs"].append(row)
    common.report(result)


if __name__ == "__main__":
    main()
