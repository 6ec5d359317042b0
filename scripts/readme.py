"""Fill in the parts of README.md and docs/ that are generated, each between ``<!-- name -->`` and ``<!-- /name -->``.

    .venv/bin/python scripts/readme.py [--plot]

``carry`` and ``containers`` come from what the targets say that they carry; ``chips`` from published bandwidths; ``nodes`` from small models, written as ONNX;
``figures`` and ``curve`` from the JSON lines under benchmarks/results/, and with --plot (needs matplotlib) docs/curve.svg. What commands print is
scripts/record.py's.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tapeout.describe import alike, carry_table

ROOT = Path(__file__).resolve().parent.parent


def carry() -> str:
    """The table of targets and schemes."""
    table = carry_table()
    columns = alike(table)
    heads = [", ".join(f"`{name}`" for name in names) for names in columns]
    rows = [["scheme", *heads], ["---"] * (1 + len(columns))]
    rows += [
        [f"`{scheme}`", *(cells[names[0]] for names in columns)]
        for scheme, cells in {**table["schemes"], **table["kv_caches"]}.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def containers() -> str:
    """What of Core ML holds each scheme, by opset."""
    from tapeout.exporters import Carry, Refused, Rounded
    from tapeout.quantize import Scheme
    from tapeout.targets.apple import Apple

    def cell(carry: Carry) -> str:
        if isinstance(carry, Refused):
            return f"– (`{carry.nearest}` fits)"
        return carry.container + (", rounded to float16" if isinstance(carry, Rounded) else "")

    rows = ["| scheme | `--opset ios18` | `--opset ios26` |", "|---|---|---|"]
    for name in carry_table()["schemes"]:
        found = (cell(Apple(opset=opset).carries(Scheme.parse(name))) for opset in ("ios18", "ios26"))
        rows.append(f"| `{name}` | {' | '.join(found)} |")
    return "\n".join(rows)


def chips() -> str:
    """Tokens a second to be expected of Llama 3 8B in int4-g32 with a head in int8, on each chip."""
    from tapeout.generated import LLAMA_8B
    from tapeout.models.decoder import ConfigReader, Role
    from tapeout.models.families import family
    from tapeout.quantize import Scheme
    from tapeout.targets.apple_chips import table

    kind = family("llama")
    linear, head = Scheme.parse("int4-g32"), Scheme.parse("int8")
    total = 0.0
    for name, spec in kind.tensors(kind.config(ConfigReader(LLAMA_8B))).items():
        if len(spec.shape) == 2 and spec.role is not Role.EMBEDDING:
            scheme = head if name.startswith("lm_head") else linear
            total += scheme.bits_per_weight(spec.shape[1]) * spec.shape[0] * spec.shape[1] / 8
    return table(round(total))


def nodes() -> str:
    """How many nodes an ONNX graph has, by the road that it came."""
    rows = ["| model | graph | nodes a layer | with 32 layers |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as scratch, patch.dict(os.environ, TAPEOUT_CACHE=scratch):
        for model, road, two, each in _counted(Path(scratch)):
            rows.append(f"| {model} | {road} | {each:g} | {two + 30 * each:g} |")
    return "\n".join(rows)


def _counted(scratch: Path) -> Iterator[tuple[str, str, int, float]]:
    """Of each model its name, its road, the nodes of two layers, and those of one more."""
    import tapeout
    from tapeout.exporters.onnx.writer import build
    from tapeout.generated import ENCODERS, write_model
    from tapeout.models import Checkpoint, optimum

    def count(model: tapeout.Model, **settings: Any) -> int:
        return len(build(tapeout.quantize(model, "int4-g32"), **settings)[0].nodes)

    for family, fields in (
        ("llama", {"head_dim": 16}),
        ("gemma2", {}),
        ("mixtral", {"head_dim": 16}),
        ("deepseek_v2", {}),
        ("bert", {}),
    ):
        model = tapeout.load(write_model(scratch / family, family, {"num_hidden_layers": 4, **fields}))
        for dialect in ("onnxruntime",) if family in ENCODERS else ("onnxruntime", "standard"):
            two, four = (count(model, layers=layers, dialect=dialect) for layers in (2, 4))
            road = "built" if dialect == "onnxruntime" else "built, in standard operators"
            yield f"`{family}`", road, two, (four - two) / 2
    for example, kind in (("sliding_window", "SlidingWindow"), ("block_sparse", "BlockSparse")):
        code = runpy.run_path(str(ROOT / "examples" / f"{example}.py"))
        _, given, dynamic = code["make"]()
        one, two = (
            count(tapeout.load_module(code[kind](layers=layers).eval(), given, dynamic)) for layers in (1, 2)
        )
        yield f"`examples/{example}.py`", "`torch.export`", two, two - one
    kept = ROOT / "tests" / "exporters" / "data" / "optimum" / "gpt2"
    checkpoint = Checkpoint(kept / "model")
    place = optimum.place_of(kept / "model", checkpoint)
    optimum.read_export(kept / "export", place, "gpt2", "", checkpoint)
    found = build(tapeout.quantize(tapeout.load(kept / "model"), "int4-g32"))[0].nodes
    yield "`gpt2`", "`optimum`", len(found), sum("/h.1/" in node.name for node in found)


def figures() -> str:
    """One line for each figure that the benchmarks hold themselves to."""
    found = {path.stem: _result(path) for path in sorted((ROOT / "benchmarks" / "results").glob("*.txt"))}
    rows = ["| what | tapeout | peer | ratio |", "|---|---|---|---|"]
    for name, title in (("gguf_export", "1.1B checkpoint to"), ("gguf_export_7b", "7B checkpoint to")):
        for kind in ("Q4_0", "Q8_0"):
            one = found.get(name, {}).get(kind)
            if one:
                ours = f"{one['wall_s']:.1f} s, {one['peak_rss_gb']:.2f} GB peak"
                theirs = (
                    f"{one['peer_wall_s']:.1f} s, {one['peer_peak_rss_gb']:.2f} GB (llama.cpp)"
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
    if one := found.get("onnx_export", {}).get("rows"):
        ours, theirs = (
            f"{one[who]['wall_s']:.1f} s, {one[who]['peak_rss_gb']:.2f} GB" for who in ("tapeout", "genai")
        )
        speedup = _times(one["genai"]["wall_s"] / one["tapeout"]["wall_s"])
        rows.append(
            f"| 1.1B checkpoint to ONNX in INT4 | {ours} peak | {theirs} (onnxruntime-genai's builder) | {speedup} |"
        )
    for name, title in (("coreml_export", "1.1B"), ("coreml_export_1.7b", "1.8B")):
        if one := found.get(name, {}).get("rows"):
            ours, theirs = (
                f"{one[who]['wall_s']:.1f} s, {one[who]['peak_rss_gb']:.2f} GB"
                for who in ("tapeout", "coremltools")
            )
            speedup = _times(one["coremltools"]["wall_s"] / one["tapeout"]["wall_s"])
            rows.append(
                f"| {title} checkpoint to Core ML in INT4 | {ours} peak | {theirs} (coremltools: traced, converted, quantized) | {speedup} |"
            )
    if one := found.get("coreml_export_8b", {}).get("rows"):
        ours = f"{one['tapeout']['wall_s']:.1f} s, {one['tapeout']['peak_rss_gb']:.2f} GB"
        rows.append(f"| 8B shape to Core ML in INT4 | {ours} peak | | |")
    for name, what, peer, called in (
        ("rocm_export", "compressed-tensors", "llm_compressor", "llm-compressor"),
        ("nvidia_export", "ModelOpt's directory", "modelopt", "ModelOpt"),
        ("trtllm_export", "two ranks of TensorRT-LLM", "modelopt", "ModelOpt"),
    ):
        if one := found.get(name, {}).get("rows"):
            ours, theirs = (
                f"{one[who]['wall_s']:.1f} s, {one[who]['peak_rss_gb']:.2f} GB" for who in ("tapeout", peer)
            )
            speedup = _times(one[peer]["wall_s"] / one["tapeout"]["wall_s"])
            rows.append(
                f"| 1.1B checkpoint to {what} in INT4 | {ours} peak | {theirs} ({called}) | {speedup} |"
            )
        if one := found.get(f"{name}_8b", {}).get("rows"):
            ours = f"{one['tapeout']['wall_s']:.1f} s, {one['tapeout']['peak_rss_gb']:.2f} GB"
            rows.append(f"| 8B shape to {what} in INT4 | {ours} peak | | |")
    if one := found.get("onnx_decode", {}).get("rows"):
        theirs = one["genai's builder, onnxruntime-genai"]
        for what in ("decode", "prefill"):
            for scheme in ("int4-g32", "int4-g128"):
                a, b = (
                    row[f"{what}_tokens_per_s"]
                    for row in (one[f"tapeout {scheme}, onnxruntime-genai"], theirs)
                )
                rows.append(
                    f"| {what} of the 1.1B in {scheme} on onnxruntime-genai | {a:.1f} tokens/s | {b:.1f} tokens/s (its builder's INT4, "
                    f"groups of 32) | {_times(a / b)} |"
                )
    if one := found.get("encoder", {}).get("sides"):
        a, b = one["tapeout w8a8-static"]["batch_1"]["p50_ms"], one["optimum int8"]["batch_1"]["p50_ms"]
        rows.append(
            f"| BERT-base in INT8, 128 tokens | {a:.1f} ms | {b:.1f} ms (optimum) | {_times(b / a)} |"
        )
    for run in found.get("calibrate", {}).get("runs", []):
        ours = f"{run['wall_s']:.0f} s, {run['peak_rss_gb']:.2f} GB peak"
        theirs = (
            f"{run['peer_wall_s']:.0f} s, {run['peer_peak_rss_gb']:.2f} GB (llm-compressor)"
            if "speedup" in run
            else ""
        )
        what = f"{run['rounding'].upper()} of a {run['depth']}-layer Llama, hidden {found['calibrate']['hidden']}"
        rows.append(f"| {what} | {ours} | {theirs} | {_times(run.get('speedup'))} |")
    if "quality" in found:
        won = found["quality"]["comparisons"] - len(found["quality"]["lost"])
        rows.append(
            f"| mean KL at no more bits: [the curve](docs/quantization.md) | lower in {won} of {found['quality']['comparisons']} | "
            "llama-quantize, llm-compressor, HQQ, bitsandbytes, onnxruntime-genai's builder | |"
        )
    return "\n".join(rows)


def curve() -> str:
    """Quality at each size: ours with calibrated rounding, and every peer's variant at no fewer bits."""
    path = ROOT / "benchmarks" / "results" / "quality.txt"
    if not path.exists():
        return ""
    result = _result(path)
    rows = [
        "![mean KL against bits a weight](curve.svg)",
        "",
        f"Measured on `{result['model']}` by `benchmarks/quality.py`: mean KL of the original to the dequantized model in nats, on text "
        "that nothing was calibrated on; the bits are those of all weights, embedding included.",
        "",
        "| who | what | bits a weight | mean KL | same top-1 | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {row['peer']} | {row['variant']} | {row['bits_per_weight']:.3f} | {row['mean_kl']:.5f} | {row['top1']:.1%} | "
        f"{row['perplexity']:.2f} |"
        for row in result["variants"]
    ]
    won = result["comparisons"] - len(result["lost"])
    rows += [
        "",
        f"Against each peer's variant stands our best of no more bits, as a whole and for the linear layers alone: ours is lower in {won} "
        f"of {result['comparisons']} comparisons.",
    ]
    return "\n".join(rows)


def plot(path: Path) -> None:
    """The curve as a picture."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tapeout"  # the same bytes each time
    from matplotlib import pyplot

    result = _result(ROOT / "benchmarks" / "results" / "quality.txt")
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    peers = sorted({row["peer"] for row in result["variants"]}, key=lambda peer: peer != "tapeout")
    for peer, marker in zip(peers, "osD^vP", strict=False):
        rows = [row for row in result["variants"] if row["peer"] == peer]
        axes.scatter(
            [row["bits_per_weight"] for row in rows],
            [row["mean_kl"] for row in rows],
            label=peer,
            marker=marker,
            s=28,
            zorder=3 if peer == "tapeout" else 2,
        )
    best: list[dict[str, Any]] = []
    for row in result["variants"]:  # by bits, ascending
        if row["peer"] == "tapeout" and (not best or row["mean_kl"] < best[-1]["mean_kl"]):
            best.append(row)
    axes.plot([row["bits_per_weight"] for row in best], [row["mean_kl"] for row in best], linewidth=1)
    axes.set(yscale="log", xlabel="bits a weight, embedding included", ylabel="mean KL, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


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
        sys.exit(f"there is no part '{name}'.")
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8"), "figures", figures()), encoding="utf-8")
    page = ROOT / "docs" / "targets.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), "carry", carry()), encoding="utf-8")
    page = ROOT / "docs" / "onnx.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), "nodes", nodes()), encoding="utf-8")
    guide = ROOT / "docs" / "quantization.md"
    guide.write_text(filled(guide.read_text(encoding="utf-8"), "curve", curve()), encoding="utf-8")
    page = ROOT / "docs" / "apple.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(filled(filled(text, "containers", containers()), "chips", chips()), encoding="utf-8")
    if "--plot" in sys.argv[1:]:
        plot(ROOT / "docs" / "curve.svg")


if __name__ == "__main__":
    main()
