"""Fill in the parts of README.md that are generated, each between ``<!-- name -->`` and ``<!-- /name -->``.

    .venv/bin/python scripts/readme.py [--demo]

``carry`` comes from what the targets say that they carry; ``demo`` from a run of the demo's command (with --demo); ``figures``
from the JSON lines under benchmarks/results/.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tapeout.describe import carry_table

ROOT = Path(__file__).resolve().parent.parent
_DEMO = ("tapeout", "export", "cpu", "arithmetic", "--scheme", "int4-g32", "--out", "build/demo", "--force")


def carry() -> str:
    """The table of targets and schemes."""
    table = carry_table()
    names = list(table["targets"])
    rows = [["scheme", *(f"`{name}`" for name in names)], ["---"] * (1 + len(names))]
    rows += [[f"`{scheme}`", *(cells[name] for name in names)] for scheme, cells in table["schemes"].items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def demo() -> str:
    """What the demo's command prints."""
    command = [Path(sys.executable).with_name(_DEMO[0]), *_DEMO[1:]]
    done = subprocess.run(
        command, stderr=subprocess.PIPE, check=True, cwd=ROOT, env=os.environ | {"COLUMNS": "110"}
    )
    printed = "\n".join(line.rstrip() for line in done.stderr.decode().splitlines())
    return f"```\n$ {' '.join(_DEMO)}\n{printed}\n```"


def figures() -> str:
    """One line for each figure that the benchmarks hold themselves to."""
    found = {path.stem: _result(path) for path in sorted((ROOT / "benchmarks" / "results").glob("*.txt"))}
    rows = ["| what | tapeout | llama.cpp's tools | ratio |", "|---|---|---|---|"]
    for name, title in (("gguf_export", "1.1B checkpoint to"), ("gguf_export_7b", "7B checkpoint to")):
        for kind in ("Q4_0", "Q8_0"):
            one = found.get(name, {}).get(kind)
            if one:
                ours = f"{one['wall_s']:.1f} s, {one['peak_rss_gb']:.2f} GB peak"
                theirs = (
                    f"{one['peer_wall_s']:.1f} s, {one['peer_peak_rss_gb']:.2f} GB"
                    if "peer_wall_s" in one
                    else ""
                )
                rows.append(f"| {title} {kind} | {ours} | {theirs} | {_times(one.get('speedup'))} |")
    for what in ("decode", "prefill"):
        if one := found.get("gguf_decode", {}).get(what):
            ours, theirs = (f"{one[f'{who}_tokens_per_s']:.1f} tokens/s" for who in ("tapeout", "peer"))
            rows.append(f"| {what} of the 1.1B Q4_0 file | {ours} | {theirs} | {_times(one['ratio'])} |")
    if one := found.get("cpu_7b"):
        fraction = f"{one['roofline_fraction']:.0%} of {one['bandwidth_gb_per_s']:.1f} GB/s"
        rows.append(f"| 7B in INT4, decode | {one['decode_tokens_per_s']:.1f} tokens/s, {fraction} | | |")
    return "\n".join(rows)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _result(path: Path) -> dict[str, Any]:
    """The JSON line at a result's end."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8").strip().splitlines()[-1])
    return found


def filled(text: str, name: str, content: str) -> str:
    """The text with ``content`` between the markers of ``name``."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        sys.exit(f"README.md has no part '{name}'.")
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def main() -> None:
    readme = ROOT / "README.md"
    text = filled(filled(readme.read_text(encoding="utf-8"), "carry", carry()), "figures", figures())
    if "--demo" in sys.argv[1:]:
        text = filled(text, "demo", demo())
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
