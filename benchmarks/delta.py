"""Bytes and seconds of a delta between two versions of a package, one layer of which was tuned: tapeout, xdelta3 and zstd --patch-from.

    python benchmarks/delta.py [--shape 1b|…|arithmetic] [--work DIR]

The model is generated, or the embedded one; version 2 has every matrix of one layer with noise of 2 % of its deviation. Both are packages of `cpu`, int4-g32.
The other tools get a tar of each package, and are told to look at all of the old one. Seconds are of processes of their own, with the
packages in the page cache: ours read and check both packages first, and so does `patch`. bsdiff takes 17 bytes of memory a byte, so it
is left out where the package has more than 100 MB.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import common

from tapeout import embedded
from tapeout.files import cache_directory

# Gates say nothing of what is measured here: a package without them has the same files but for its reports.
PACK = """
import sys; from pathlib import Path; import numpy as np
from tapeout import load, quantize, target; from tapeout.pack import pack; from tapeout.recipe import Recipe; from tapeout.validate import Report
model, out = load(sys.argv[1]), Path(sys.argv[2])
quant, cpu = quantize(model, "int4-g32"), target("cpu")
(out / "artifact").mkdir(parents=True)
artifact = cpu.export(quant, out / "artifact")
pack(artifact, Report(model=model.name, target="cpu", scheme="int4-g32", gates=()), quant, cpu, Recipe().kept(quant))
"""

TUNE = """
import sys; import torch; from pathlib import Path; from safetensors.torch import load_file, save_file
torch.manual_seed(0)
for path in Path(sys.argv[1]).glob("*.safetensors"):
    tensors = load_file(path)
    layer = [name for name, values in tensors.items() if ".layers.1." in name and values.ndim == 2]
    for name in layer:
        values = tensors[name].float()
        tensors[name] = (values + 0.02 * values.std() * torch.randn(values.shape)).to(tensors[name].dtype)
    if layer:
        save_file(tensors, path, {"format": "pt"})
"""


def packages(shape: str, work: Path) -> tuple[Path, Path]:
    """The two versions; made once."""
    model = embedded.path(shape) if shape in embedded.NAMES else common.checkpoint(shape, work)
    tuned = work / f"tuned-{shape}" / model.name
    old, new = work / f"package-{shape}-1", work / f"package-{shape}-2"
    if not (new / "tapeout.json").exists():
        for place in (tuned, old, new):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(model, tuned)
        common.run(sys.executable, "-c", TUNE, tuned)
        for source, out in ((model, old), (tuned, new)):
            common.run(
                sys.executable, "-c", PACK, source, out, environment={"TAPEOUT_CACHE": str(work / "cache")}
            )
            shutil.rmtree(work / "cache")
    return old, new


def tarred(package: Path) -> Path:
    """A package as one file, as the other tools take it."""
    out = package.with_suffix(".tar")
    with tarfile.open(out, "w") as archive:
        for path in sorted(package.rglob("*")):
            archive.add(path, path.relative_to(package), recursive=False)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1b", choices=[*common.SHAPES, "arithmetic"])
    parser.add_argument("--work", type=Path, default=cache_directory() / "benchmark-delta")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    old, new = packages(given.shape, given.work)
    before, after, delta, out = tarred(old), tarred(new), given.work / "delta", given.work / "out"
    window = f"-B{max(before.stat().st_size, 1 << 20)}"
    ways: dict[str, tuple[list[str | Path], list[str | Path]]] = {
        "tapeout": (
            [Path(sys.executable).with_name("tapeout"), "delta", old, new, "--out", delta, "--force"],
            [Path(sys.executable).with_name("tapeout"), "patch", old, delta, "--out", out, "--force"],
        ),
        "xdelta3 -3": (
            ["xdelta3", "-3", "-f", window, "-e", "-s", before, after, delta],
            ["xdelta3", "-f", window, "-d", "-s", before, delta, out],
        ),
        "zstd -3 --patch-from": (
            ["zstd", "-q", "-3", "--long=31", "-f", f"--patch-from={before}", after, "-o", delta],
            ["zstd", "-q", "-d", "--long=31", "-f", f"--patch-from={before}", delta, "-o", out],
        ),
    }
    if before.stat().st_size < 100 << 20:
        ways["bsdiff"] = (["bsdiff", before, after, delta], ["bspatch", before, out, delta])
    whole, rows = common.size(new), {}
    print(f"package: {whole / 1e6:.1f} MB")
    for who, (make, apply) in ways.items():
        if not shutil.which(str(make[0])):
            print(f"{who}: not installed")
            continue
        shutil.rmtree(out, ignore_errors=True) if out.is_dir() else out.unlink(missing_ok=True)
        made = common.run(*make)
        applied = common.run(*apply)
        carried = delta.stat().st_size
        row: dict[str, Any] = {"bytes": carried, "of_package": round(carried / whole, 4)}
        for what, ran in (("make", made), ("apply", applied)):
            row |= {f"{what}_s": round(ran.wall_s, 1), f"{what}_peak_gb": round(ran.peak_bytes / 1e9, 2)}
        rows[who] = row
        print(
            f"{who:22} {carried / 1e6:8.3f} MB, {carried / whole:6.2%} of the package; made in {made.wall_s:5.1f} s"
            f" ({made.peak_bytes / 1e9:.2f} GB peak), applied in {applied.wall_s:5.1f} s ({applied.peak_bytes / 1e9:.2f} GB)"
        )
    common.report({"benchmark": "delta", "shape": given.shape, "package_bytes": whole, "rows": rows})


if __name__ == "__main__":
    main()
