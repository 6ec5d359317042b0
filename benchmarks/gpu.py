"""What only a GPU can show: codes chosen there, parity, prefill and decode of each scheme against float16, kernels against others'.

    python benchmarks/gpu.py [--parts kernels calibration 1b 8b] [--sweep] [--work DIR] [--out FILE]

Needs torch with CUDA or ROCm, triton and accelerate; bitsandbytes is timed beside ours where it imports. Checkpoints are generated, from
a seed; of 8b all layers read the bytes of the first. Ends with a JSON line, and writes it to FILE after each part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from tapeout import build
from tapeout.exporters.huggingface.reader import Tensors
from tapeout.models import load
from tapeout.quantize import SCHEMES, Calibration, QuantTensor, quantize
from tapeout.quantize.rtn import round_to_nearest
from tapeout.targets import gpu, gpu_kernels
from tapeout.validate import device_peaks, reference
from tapeout.validate.metrics import kl_divergence

FORMATS = (
    ("none", "rocm", "compressed-tensors"),
    ("int8", "rocm", "compressed-tensors"),
    ("int4-g32", "rocm", "compressed-tensors"),
    ("int4-g128", "rocm", "compressed-tensors"),
    ("nf4", "rocm", "bitsandbytes"),
    ("int8", "nvidia", "modelopt"),
    ("int4-g128", "nvidia", "modelopt"),
    ("fp8", "nvidia", "modelopt"),
    ("nvfp4", "nvidia", "modelopt"),
)
MATRICES = {
    "1b": [(2048, 2048), (5632, 2048), (2048, 5632)],
    "8b": [(4096, 4096), (14336, 4096), (4096, 14336)],
}


def seconds(work: Callable[[], Any], repeats: int = 30) -> float:
    """Median seconds of a call on the GPU, the cache of its last level emptied in between."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    return statistics.median(device_peaks.seconds(work, "cuda", repeats, flush.zero_))


def graphed(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same as one graph, so that the launch from Python is not in the figure."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def machine() -> dict[str, Any]:
    """The card, its copy bandwidth and what a large matmul in float16 reaches."""
    peaks = device_peaks.matmul_peaks("cuda", ("float16", "bfloat16", "float32"))
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_gb_per_s": round(device_peaks.copy_bandwidth("cuda") / 1e9),
        **{f"{each['type']}_tflops": round(each["operations_per_s"] / 1e12) for each in peaks},
    }


def codes(scheme: str, out: int, into: int) -> gpu_kernels.Codes:
    """A random weight of a scheme on the GPU."""
    kind = SCHEMES[scheme]
    group = kind.group or into
    packed = torch.randint(0, 256, (out, into * kind.bits // 8), dtype=torch.uint8, device="cuda")
    if scheme == "fp8":
        packed[(packed & 0x7F) == 0x7F] = 0  # not a number
    levels = torch.from_numpy(kind.codebook().astype(np.float32)).cuda()
    scale = torch.rand((out, into // group), device="cuda").half() / 100 + 0.01
    return gpu_kernels.Codes(packed, kind.bits, scale, levels)


def kernels(sweep: bool) -> Iterator[tuple[str, Any]]:
    """One row of inputs times matrices of Llama's shapes."""
    if sweep:
        rows = []
        for scheme in ("int4-g32", "int8", "nf4"):
            for out, into in MATRICES["8b"][1:]:
                layer, x = codes(scheme, out, into), torch.randn(1, into, device="cuda").half()
                settings = itertools.product((1, 2, 4, 8), (512,), (2, 4), (1, 4))
                for setting in settings:
                    gpu_kernels._ROWS, gpu_kernels._COLUMNS, gpu_kernels._WARPS, gpu_kernels._UNROLL = setting
                    took = seconds(graphed(lambda layer=layer, x=x: layer.times(x)), 9)
                    rows.append((scheme, out, into, *setting, round(took * 1e6, 1)))
                best = sorted(r for r in rows if r[:3] == (scheme, out, into))
                best.sort(key=lambda r: r[-1])
                print("sweep", scheme, out, into, best[:8], flush=True)
        yield "sweep", rows
        return
    found = []
    for out, into in (*MATRICES["1b"], *MATRICES["8b"]):
        x = torch.randn(1, into, device="cuda").half()
        row: dict[str, Any] = {"out": out, "in": into}
        wide = torch.randn(out, into, device="cuda").half()
        row["float16 cuBLAS"] = seconds(graphed(lambda x=x, w=wide: torch.nn.functional.linear(x, w)))
        for scheme in ("int8", "fp8", "int4-g32", "int4-g128", "nf4"):
            layer = codes(scheme, out, into)
            exact = x.float() @ layer.widen(torch.float32).T
            error = float((layer.times(x).float() - exact).abs().max() / exact.std())
            assert error < 2e-3, f"{scheme} {out}x{into}: {error}"  # its result is float16
            row[scheme] = seconds(graphed(lambda layer=layer, x=x: layer.times(x)))
        row |= peers(wide, x)
        found.append(
            {name: each if isinstance(each, int) else round(each * 1e6, 1) for name, each in row.items()}
        )
        print("kernels, microseconds:", found[-1], flush=True)
    yield "kernels_us", found


def peers(wide: torch.Tensor, x: torch.Tensor) -> dict[str, float]:
    """Others' kernels for the same product: torch's int4 (bfloat16, groups of 32), bitsandbytes' NF4."""
    found = {}
    out, into = wide.shape
    try:
        packed = torch.randint(0, 256, (out, into // 2), dtype=torch.uint8, device="cuda")
        tiled = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
        scales = torch.rand((into // 32, out, 2), device="cuda").bfloat16()
        given = x.bfloat16()
        found["torch int4-g32"] = seconds(
            graphed(lambda: torch.ops.aten._weight_int4pack_mm(given, tiled, 32, scales))
        )
    except Exception as error:  # what a build leaves out
        print("torch int4:", str(error)[:200])
    try:
        import bitsandbytes.functional as bnb

        quantized, state = bnb.quantize_4bit(wide, blocksize=64, quant_type="nf4")
        found["bitsandbytes nf4"] = seconds(graphed(lambda: bnb.gemv_4bit(x, quantized.t(), state=state)))
    except Exception as error:  # may be absent
        print("bitsandbytes:", str(error)[:200])
    return found


def calibration(work: Path, trained: str, text: Path | None) -> Iterator[tuple[str, Any]]:
    """Rounding with data, on the CPU and on the GPU: codes that differ, and seconds."""
    fields = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "max_position_embeddings": 2048,
        "vocab_size": 512,
    }
    models = {
        Path(trained).name: trained,
        "llama 1024 x 4": str(common.generated(work / "calibrated", fields)),
    }
    found = []
    for name, path in models.items():
        model = load(path)
        heldout = text if path == trained else None
        for rounding, scheme in (("gptq", "int4-g128"), ("awq", "int4-g128"), ("smoothquant", "w8a8")):
            took, stores = {}, {}
            for device in ("cpu", "cuda", "cuda"):  # the first on the GPU makes its workspaces
                begin = time.perf_counter()
                stores[device] = quantize(
                    model,
                    scheme,
                    rounding=rounding,
                    calibration=Calibration(sequences=32, length=512),
                    out=work / f"{device}-codes",
                    force=True,
                    device=device,
                )
                took[device] = time.perf_counter() - begin
            differ, total, tensors = 0, 0, 0
            for each in stores["cpu"]:
                ours, theirs = stores["cpu"][each], stores["cuda"][each]
                if isinstance(ours, QuantTensor) and isinstance(theirs, QuantTensor):
                    apart = int((ours.codes() != theirs.codes()).sum())
                    differ, total, tensors = differ + apart, total + ours.codes().size, tensors + (apart > 0)
            row = {
                "model": name,
                "rounding": rounding,
                "scheme": scheme,
                "codes": total,
                "codes_that_differ": differ,
                "tensors_that_differ": tensors,
                "cpu_s": round(took["cpu"], 2),
                "gpu_s": round(took["cuda"], 2),
            }
            if heldout:
                row |= {f"kl_{device}": round(kl, 5) for device, kl in losses(model, stores, heldout).items()}
            found.append(row)
            print("calibration:", row, flush=True)
    yield "calibration", found


def losses(model: Any, stores: dict[str, Any], text: Path) -> dict[str, float]:
    """Mean KL of each store's codes to the original, over 16 windows of 256 tokens."""
    original = reference.open_session(str(model.directory))
    ids = original.tokenize(text.read_text(encoding="utf-8")[:40000])[: 16 * 256]
    found = {}
    for device, quant in stores.items():
        other = reference.open_session(str(model.directory), str(quant.directory))
        each = []
        for at in range(0, len(ids), 256):
            pair = []
            for session in (original, other):
                session.reset()
                pair.append(session.prefill(ids[at : at + 256]).astype(np.float64))
            each.append(kl_divergence(*pair).mean())
        found[device] = float(np.mean(each))
    return found


def checkpoint(shape: str, work: Path) -> tuple[Path, int]:
    """The shape's checkpoint, and how many layers it has."""
    return common.folded(shape, work), common.SHAPES[shape]["num_hidden_layers"]


def chosen_on_gpu(model: Any, scheme: str) -> dict[str, int]:
    """Codes of the first layer chosen by torch on the GPU under the CPU's scales, against the CPU's: how many differ, and how many of
    those are no ties, where the two levels are as near.
    """
    differ = total = farther = 0
    kind = SCHEMES[scheme]
    for name, spec in model.specs.items():
        if ".layers.0." not in name or len(spec.shape) != 2:
            continue
        weight = model.checkpoint[name].float32()
        chosen = round_to_nearest(weight, kind)
        scale = torch.from_numpy(lattice_scale(chosen, weight.shape)).cuda()
        levels = torch.from_numpy(kind.codebook().astype(np.float32)).cuda()
        grouped = torch.from_numpy(weight).cuda().reshape(*scale.shape, -1) / scale[..., None]
        # The level on either side, and the nearer of them.
        order = torch.argsort(levels)
        ordered = levels[order]
        above = torch.searchsorted(ordered, grouped.contiguous()).clamp(1, len(ordered) - 1)
        nearer = (grouped - ordered[above - 1]) > (ordered[above] - grouped)
        found = order[torch.where(nearer, above, above - 1)].reshape(weight.shape)
        given = torch.from_numpy(chosen.codes).cuda().int()
        apart = found != given
        grouped = grouped.reshape(weight.shape)
        near, nearest = (grouped - levels[each.int()] for each in (given, found))
        differ, total = differ + int(apart.sum()), total + weight.size
        farther += int((near.abs() > nearest.abs()).sum())
    return {"codes": total, "codes_that_differ": differ, "no_ties": farther}


def lattice_scale(chosen: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 scales [out, groups] of a grid."""
    return np.asarray(chosen.grid.scale, np.float32).reshape(shape[0], -1)


def shape_of(shape: str, work: Path) -> Iterator[tuple[str, Any]]:
    """Every scheme of one shape: export, load, parity in float32, prefill, decode."""
    directory, layers = checkpoint(shape, work)
    rows = []
    for scheme, name, form in FORMATS:
        begin = time.perf_counter()
        model = load(str(directory))
        quant = quantize(model, scheme, out=work / "codes", force=True)
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        artifact = build.target(name, format=form).export(quant, out)
        row: dict[str, Any] = {
            "scheme": scheme,
            "format": form,
            "export_s": round(time.perf_counter() - begin, 1),
        }
        # All layers from the first: the same bytes, in places of their own on the GPU.
        config = json.loads((out / "config.json").read_text())
        config["num_hidden_layers"] = layers
        (out / "config.json").write_text(json.dumps(config))
        said = config.get("quantization_config") or {}
        row["equal_on_gpu"] = equal(quant) if scheme != "none" else None
        if scheme in ("int8", "int4-g32", "nf4") and name == "rocm":
            row["chosen_on_gpu"] = chosen_on_gpu(model, scheme)

        def every(
            stack: ExitStack, said: dict[str, Any] = said, out: Path = out
        ) -> Iterator[tuple[str, Any]]:
            for name, weight in gpu.weights(said, Tensors(out, stack)):
                if ".layers.0." not in name:
                    yield name, weight
                    continue
                for layer in range(layers):
                    yield name.replace(".layers.0.", f".layers.{layer}."), weight

        ids = [(i * i * 7 + i * 31) % 256 for i in range(96)]
        with ExitStack() as stack:
            wide = gpu.load(out, every(stack), dtype=torch.float32)
        exact = np.concatenate([wide.prefill(ids[:64]), *(wide.decode(token)[None] for token in ids[64:])])
        if shape == "1b" and scheme == "int4-g32":
            row["float32_gpu_from_cpu"] = from_cpu(wide, directory, work, ids[:32])
        wide.close()
        del wide
        torch.cuda.empty_cache()
        with ExitStack() as stack:
            session = gpu.load(out, every(stack))
        row |= {
            "load_s": round(session.facts.load_s, 1),
            "resident_gb": round(session.facts.resident_bytes / 1e9, 3),
        }
        found = np.concatenate(
            [session.prefill(ids[:64]), *(session.decode(token)[None] for token in ids[64:])]
        )
        row["kl_to_float32"] = float(kl_divergence(exact.astype(np.float64), found.astype(np.float64)).mean())
        row["same_top"] = float((exact.argmax(-1) == found.argmax(-1)).mean())
        row["graph"] = session.graphs
        row |= timed(session, artifact.bytes_per_token, quant, layers)
        session.close()
        del session
        torch.cuda.empty_cache()
        rows.append(row)
        print(shape, row, flush=True)
        yield shape, rows


def from_cpu(session: gpu.GpuSession, directory: Path, work: Path, ids: list[int]) -> dict[str, float]:
    """Float32 on the GPU against transformers in float32 on the CPU, of the first layer alone on both sides."""
    session.reset()
    layers = session._network.model.layers
    session._network.model.layers = layers[:1]
    session._network.config.num_hidden_layers = 1
    found = session.prefill(ids)
    session._network.model.layers = layers
    session._network.config.num_hidden_layers = len(layers)
    values = ["model.embed_tokens.weight", "lm_head.weight"]
    wanted = reference.open_session(str(directory), str(work / "codes"), values=values).prefill(ids)
    return {"largest_of_deviation": float(np.abs(found - wanted).max() / wanted.std())}


def equal(quant: Any) -> bool:
    """Whether every weight that the GPU makes of codes is the one that the CPU makes, to the bit."""
    for name in quant:
        tensor = quant[name]
        if isinstance(tensor, QuantTensor) and tensor.shape[0] < 20000:
            made = gpu._layer(gpu.of(tensor), "cuda").widen(torch.float32).cpu().numpy()
            if not np.array_equal(made, tensor.dequantize()):
                return False
    return True


def timed(session: gpu.GpuSession, bytes_per_token: int, quant: Any, layers: int) -> dict[str, Any]:
    """Prefill of 512 and 2048 tokens, decode after 128: medians."""
    row: dict[str, Any] = {}
    for tokens in (512, 2048):
        ids = [i % 256 for i in range(tokens)]
        times = []
        for _ in range(4):
            session.reset()
            begin = time.perf_counter()
            session.append(ids)
            times.append(time.perf_counter() - begin)
        row[f"prefill_{tokens}_tokens_per_s"] = round(tokens / statistics.median(times[1:]))
    session.reset()
    session.append([i % 256 for i in range(128)])
    times = []
    for token in range(160):
        begin = time.perf_counter()
        session.decode(token)
        times.append(time.perf_counter() - begin)
    token_s = statistics.median(times[32:])
    # The head and a row of the table are read once, the layer's bytes for each layer.
    head = quant.model.decoder.vocab_size * quant.model.decoder.hidden_size * 2
    read = head + (bytes_per_token - head) * layers
    row |= {
        "decode_tokens_per_s": round(1 / token_s, 1),
        "decode_p99_ms": round(float(np.quantile(times[32:], 0.99)) * 1e3, 3),
        "bytes_per_token_gb": round(read / 1e9, 3),
        "roofline": round(read / token_s / (session.facts.bandwidth or 1), 3),
    }
    graphs, session.graphs, session._graph = session.graphs, False, None
    times = []
    for token in range(24):
        begin = time.perf_counter()
        session.decode(token)
        times.append(time.perf_counter() - begin)
    session.graphs = graphs
    row["decode_without_graph_tokens_per_s"] = round(1 / statistics.median(times[4:]), 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["kernels", "calibration", "1b", "8b"])
    parser.add_argument(
        "--sweep", action="store_true", help="of the kernels: which of their settings is fastest"
    )
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    parser.add_argument(
        "--trained", default="text2sql", help="a model whose weights are no noise, for calibration"
    )
    parser.add_argument("--heldout", type=Path, help="a text of its kind that calibration does not see")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here.")
    torch.set_float32_matmul_precision("highest")
    result: dict[str, Any] = {"benchmark": "gpu", "gpu": machine()}
    print(result["gpu"], flush=True)
    for part in arguments.parts:
        begin = time.perf_counter()
        ways = {
            "kernels": lambda: kernels(arguments.sweep),
            "calibration": lambda: calibration(arguments.work, arguments.trained, arguments.heldout),
        }
        for name, found in ways.get(part, lambda part=part: shape_of(part, arguments.work))():
            result[name] = found
            if arguments.out:
                arguments.out.write_text(json.dumps(result))
        print(f"{part}: {time.perf_counter() - begin:.0f} s", flush=True)
    common.report(result)


if __name__ == "__main__":
    main()
