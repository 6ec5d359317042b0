"""A 1.1B Llama in INT4 on ONNX Runtime: ours against onnxruntime-genai's builder, optimum, and our own GGUF on llama.cpp.

    python benchmarks/onnx_decode.py [--launches 2] [--rounds 3] [--prefill 512] [--decode 128] [--no-float|--genai]

Each artifact is loaded in a process of its own, all at once, and they are timed in turn, round after round; of a launch its medians
count, and of launches the geometric mean. Where a process's memory lies makes a difference of 5 to 10 %: the one that is started first
gets what scattered pages are free. So one that is not timed is started before all, and all are started anew for each launch, in another
order: as many launches as sides give each every place. A few percent take more (``--genai``: what runs on onnxruntime-genai alone); the
ratios there have their standard errors beside them, with what the places do to them. Ours runs on onnxruntime as tapeout runs it,
and on onnxruntime-genai as the builder's does.

On onnxruntime-genai are compared the builder's INT4 (groups of 32, its head too), the same of ours, and int4-g128 as tapeout exports
it (head int8), which GPTQ rounds with less loss than the builder has at 32: ``quality.py`` measures that, and here speed alone, which
does not depend on the codes, counts. The builder's file in groups of 128 is as fast, at its own loss. Needs 25 GB of disk and 16 GB
of memory, and without optimum's float model (``--no-float``) half of that. Artifacts of the peers are made once and kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
from common import environment

ENVIRONMENTS = {
    "genai": (
        "torch==2.13.0",
        "transformers==5.23.0",
        "onnx==1.23.2",
        "onnx-ir",
        "onnxruntime==1.32.0",
        "onnxruntime-genai==0.18.0",
    ),
    "optimum": ("torch==2.13.0", "optimum-onnx==0.1.0", "onnx==1.23.2", "onnxruntime==1.32.0", "accelerate"),
}
OURS, OURS_128 = "tapeout int4-g32, onnxruntime-genai", "tapeout int4-g128, onnxruntime-genai"
BUILDERS, BUILDERS_128 = "genai's builder, onnxruntime-genai", "genai's builder g128, onnxruntime-genai"
_PEERS = Path(__file__).resolve().parent / "peers"


Made = dict[str, tuple[str, Path, Path]]
"""Who → kind, directory, Python that runs it."""


@dataclass
class Times:
    """Of one artifact on one runtime, a launch after the other: seconds of prompts, medians of seconds a token; and resident bytes."""

    first: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    resident: int = 0


def timed_together(
    order: list[str], made: Made, times: dict[str, Times], lengths: list[str], rounds: int
) -> None:
    """Start every side in this order, ask them in turn, and end them."""
    children: dict[str | None, subprocess.Popen[str]] = {}
    for who in [None, *order]:
        kind, path, python = made[who or order[0]]
        command = [str(python), "-P", str(_PEERS / "decoder.py"), kind, str(path), *lengths]
        children[who] = subprocess.Popen(
            [*command, "--threads", str(common.cores())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        said(children[who])
    for _ in range(rounds):
        for who in order:
            child = children[who]
            assert child.stdin
            child.stdin.write("time\n")
            child.stdin.flush()
            told = said(child)
            times[who].first.append(told["prefill_s"])
            times[who].tokens.append(statistics.median(told["decode_s"]))
            times[who].resident = max(times[who].resident, told["resident_bytes"])
    for child in children.values():
        child.communicate("")


def launches(seconds: list[float], rounds: int) -> list[float]:
    """The median of each launch."""
    return [statistics.median(seconds[at : at + rounds]) for at in range(0, len(seconds), rounds)]


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float | None]:
    """Speed of ours over theirs from seconds of as many launches, and its standard error, if there are more than two."""
    logs = [math.log(b / a) for a, b in zip(ours, theirs, strict=True)]
    mean = math.exp(statistics.fmean(logs))
    error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 2 else None
    return round(mean, 3), error and round(mean * error, 3)


def said(child: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of a side."""
    assert child.stdout
    if not (line := child.stdout.readline()):
        sys.exit(f"{child.args} ended with {child.wait()}")
    told: dict[str, Any] = json.loads(line)
    return told


def artifacts(work: Path, with_float: bool) -> Made:
    """What is not there yet is made."""
    model = common.checkpoint("1b", work)
    # The builder's head is INT4 too. It leaves the embedding in float32; ours is int8.
    alike = {"lm_head": "int4-g32"}
    ours = {
        name: by_us(model, work / f"onnx_decode-{name}", kind, scheme, ends)
        for name, kind, scheme, ends in (
            ("onnx", "onnx", "int4-g32", alike),
            ("onnx-g128", "onnx", "int4-g128", {}),
            ("gguf", "gguf", "int4-g32", alike),
        )
    }
    here, python = Path(sys.executable), environment("genai", ENVIRONMENTS["genai"])
    found = {
        "tapeout int4-g32, onnxruntime": ("tapeout-onnx", ours["onnx"], here),
        OURS: ("genai", ours["onnx"], python),
        OURS_128: ("genai", ours["onnx-g128"], python),
        BUILDERS: ("genai", by_peer("genai", model, work / "onnx_decode-genai"), python),
        BUILDERS_128: ("genai", by_peer("genai-g128", model, work / "onnx_decode-genai-g128"), python),
        "tapeout GGUF, llama.cpp": ("tapeout-gguf", ours["gguf"], here),
    }
    if with_float:
        whole = by_peer("optimum", model, work / "onnx_decode-optimum")
        found["optimum float32, onnxruntime"] = (
            "optimum",
            whole,
            environment("optimum", ENVIRONMENTS["optimum"]),
        )
        try:
            int8 = by_peer("optimum-int8", whole, work / "onnx_decode-optimum-int8")
        except SystemExit as error:  # it takes more than 17 GB
            print(f"optimum int8, onnxruntime: not made ({str(error).splitlines()[0]})")
        else:
            found["optimum int8, onnxruntime"] = ("optimum", int8, found["optimum float32, onnxruntime"][2])
    return found


def by_us(model: Path, out: Path, kind: str, scheme: str, overrides: dict[str, str]) -> Path:
    """Exported once."""
    if not (out / "whole").exists():
        common.export_by_us(
            model, out, scheme, out.parent / "onnx_decode-store", format=kind, overrides=overrides
        )
        (out / "whole").touch()
    return out


def by_peer(road: str, model: Path, out: Path) -> Path:
    """What ``peers/onnx_export.py`` makes of a model; made once."""
    if not (out / "whole").exists():
        name = road.partition("-")[0]
        common.run(
            environment(name, ENVIRONMENTS[name]), _PEERS / "onnx_export.py", road, model, out, environment={}
        )
        (out / "whole").touch()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launches", type=int, default=2, help="a multiple of the sides, at best")
    parser.add_argument("--rounds", type=int, default=3, help="of each launch")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--no-float", action="store_true", help="without optimum's artifacts")
    parser.add_argument("--genai", action="store_true", help="what runs on onnxruntime-genai alone")
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    arguments = parser.parse_args()
    lengths = ["--prefill", str(arguments.prefill), "--decode", str(arguments.decode)]
    made = artifacts(arguments.work, not (arguments.no_float or arguments.genai))
    if arguments.genai:
        made = {who: made[who] for who in (OURS, OURS_128, BUILDERS, BUILDERS_128)}
    times = {who: Times() for who in made}
    for launch in range(arguments.launches):
        turn = launch % len(made)
        order = [*list(made)[turn:], *list(made)[:turn]]
        if launch // len(made) % 2:
            order.reverse()
        timed_together(order, made, times, lengths, arguments.rounds)
    rows = {}
    for who, side in times.items():
        size = sum(p.stat().st_size for p in made[who][1].iterdir() if p.is_file())
        rows[who] = {
            "prefill_tokens_per_s": round(
                arguments.prefill / statistics.geometric_mean(launches(side.first, arguments.rounds)), 1
            ),
            "decode_tokens_per_s": round(
                1 / statistics.geometric_mean(launches(side.tokens, arguments.rounds)), 2
            ),
            "resident_gb": round(side.resident / 1e9, 2),
            "file_mb": round(size / 1e6, 1),
        }
        row = rows[who]
        print(
            f"{who:42} prefill {row['prefill_tokens_per_s']:7.1f}  decode {row['decode_tokens_per_s']:6.2f} tokens/s  "
            f"{row['resident_gb']:5.2f} GB resident, {row['file_mb']:7.1f} MB"
        )
    ratios = {}
    for ours, theirs in ((OURS, BUILDERS), (OURS_128, BUILDERS), (OURS_128, BUILDERS_128)):
        pair = f"{ours.partition(',')[0]} / {theirs.partition(',')[0]}"
        ratios[pair] = {
            what: ratio(
                launches(getattr(times[ours], kind), arguments.rounds),
                launches(getattr(times[theirs], kind), arguments.rounds),
            )
            for what, kind in (("prefill", "first"), ("decode", "tokens"))
        }
        words = ", ".join(
            f"{what} {value}" + (f" ± {error}" if error is not None else "")
            for what, (value, error) in ratios[pair].items()
        )
        print(f"{pair}: {words}")
    common.report(
        {
            "benchmark": "onnx_decode",
            "launches": arguments.launches,
            "rounds": arguments.rounds,
            "rows": rows,
            "same_runtime": {
                pair: {
                    what: {"ratio": value, "standard_error": error} for what, (value, error) in each.items()
                }
                for pair, each in ratios.items()
            },
        }
    )


if __name__ == "__main__":
    main()
