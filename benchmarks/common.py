"""What the benchmarks share: the machine, children with their peak memory, generated checkpoints, the peer's tools."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import venv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tapeout.files import cache_directory
from tapeout.generated import LLAMA_1B, LLAMA_7B, LLAMA_8B

# Of SmolLM2 1.7B, with a head of its own, and of OpenLLaMA 3B: 1.8 and 3.4 billion weights.
_SMOL_1_7B = {"vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32}  # fmt: skip
_OPEN_3B = {"vocab_size": 32000, "hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26, "num_attention_heads": 32, "num_key_value_heads": 32}  # fmt: skip
SHAPES = {
    "1b": LLAMA_1B,
    "1.7b": LLAMA_1B | _SMOL_1_7B,
    "3b": LLAMA_1B | _OPEN_3B,
    "7b": LLAMA_7B,
    "8b": LLAMA_8B,
}
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Ran:
    """A child process that succeeded: wall seconds, and peak resident bytes of it or of a child of its own."""

    wall_s: float
    peak_bytes: int


class TooLargeError(Exception):
    """A child took more memory than it may."""


def run(
    *command: str | Path, environment: dict[str, str] | None = None, most_bytes: int | None = None
) -> Ran:
    """Run a command to its end and measure it; its output is shown only when it fails.

    With ``most_bytes`` a child that has more resident bytes is killed: TooLargeError.
    """
    begin = time.perf_counter()
    child = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONSAFEPATH": "1"} | (environment or {}),
    )
    assert child.stdout
    grown: list[float] = []
    if most_bytes:
        threading.Thread(target=_watch, args=(child, most_bytes, grown), daemon=True).start()
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if grown:
        raise TooLargeError(f"more than {grown[0] / 1e9:.1f} GB resident after {wall:.0f} s")
    if child.returncode:
        sys.exit(f"{command[0]} failed with {child.returncode}:\n{output.decode(errors='replace')[-4000:]}")
    return Ran(wall, usage.ru_maxrss * 1024)


def _watch(child: subprocess.Popen[bytes], most_bytes: int, grown: list[float]) -> None:
    status = Path(f"/proc/{child.pid}/statm")
    with contextlib.suppress(OSError, IndexError):  # it has ended
        while (resident := int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")) <= most_bytes:
            time.sleep(0.05)
        grown.append(resident)
        child.kill()


def checkpoint(shape: str, work: Path) -> Path:
    """A generated Llama checkpoint of that shape, bf16, in shards; made once."""
    return generated(work / f"llama-{shape}", SHAPES[shape])


def generated(directory: Path, fields: dict[str, Any], family: str = "llama") -> Path:
    """A generated checkpoint with these fields, bf16, in shards; made once."""
    if not (directory / "whole").exists():
        # In a process of its own: a child's peak memory begins with that of the process that started it.
        code = (
            "import json, sys; from pathlib import Path; from tapeout.generated import write_model\n"
            "write_model(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), dtype='BF16', shard_bytes=1 << 30)"
        )
        run(sys.executable, "-c", code, directory, family, json.dumps(fields))
        if family != "llama":
            (directory / "whole").touch()
            return directory
        # llama.cpp refuses what its converter makes of a BPE without merges.
        path = directory / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        tokenizer["model"]["vocab"]["ĠĠ"] = 300
        tokenizer["model"]["merges"] = [["Ġ", "Ġ"]]
        path.write_text(json.dumps(tokenizer))
        (directory / "whole").touch()
    return directory


def folded(shape: str, work: Path) -> Path:
    """A checkpoint of that shape with the first layer alone, for children that read it as every layer's; made once."""
    return generated(work / f"llama-{shape}-folded", SHAPES[shape] | {"num_hidden_layers": 1})


def read_into_page_cache(directory: Path) -> None:
    """Both sides begin with the checkpoint in the page cache, as far as it fits."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def peer() -> Path:
    """llama.cpp's own sources as llama-cpp-python's sdist carries them, with llama-quantize built; made once."""
    pinned = re.search(
        r"^llama[-_]cpp[-_]python==(\S+)", (_HERE.parent / "constraints.txt").read_text(), re.MULTILINE
    )
    assert pinned
    place = cache_directory() / "peer" / pinned[1]
    source = place / f"llama_cpp_python-{pinned[1]}" / "vendor" / "llama.cpp"
    if not source.exists():
        place.mkdir(parents=True, exist_ok=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "-q",
            "download",
            "--no-deps",
            "--no-binary",
            ":all:",
            "-d",
            str(place),
        ]
        subprocess.run([*pip, f"llama-cpp-python=={pinned[1]}"], check=True)
        with tarfile.open(next(place.glob("*.tar.gz"))) as archive:
            archive.extractall(place, filter="data")
    build = place / "build"
    if not (build / "bin" / "llama-quantize").exists():
        off = [f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "SERVER", "APP")]
        configure = [
            "cmake",
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            "-DLLAMA_CURL=OFF",
            *off,
            str(source),
        ]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        command = ["cmake", "--build", str(build), "-j2", "--target", "llama-quantize"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return place


def convert_by_peer(model: Path, out: Path) -> Ran:
    """``convert_hf_to_gguf.py`` to f16. It knows no generated tokenizer by its hash, so it is told what the regex says."""
    source = next(peer().glob("llama_cpp_python-*/vendor/llama.cpp"))
    code = (
        "import sys, runpy; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/gguf-py']\n"
        "from conversion.base import TextModel; TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'\n"
        "sys.argv = ['convert_hf_to_gguf.py', sys.argv[2], '--outfile', sys.argv[3], '--outtype', 'f16']\n"
        "runpy.run_path(sys.path[0] + '/convert_hf_to_gguf.py', run_name='__main__')"
    )
    return run(sys.executable, "-c", code, source, model, out, environment={"NO_LOCAL_GGUF": ""})


def quantize_by_peer(source: Path, out: Path, kind: str) -> Ran:
    """``llama-quantize`` on all cores, with the types that ours gives embeddings and head."""
    same = ["--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
    return run(peer() / "build" / "bin" / "llama-quantize", *same, source, out, kind, str(cores()))


def export_by_us(
    model: Path,
    out: Path,
    scheme: str,
    cache: Path,
    format: str = "gguf",  # noqa: A002
    overrides: dict[str, str] | None = None,
) -> Ran:
    """Load → quantize → export in a fresh process with an empty store."""
    code = (
        "import json, sys; from pathlib import Path; from tapeout import load, quantize, target\n"
        "quant = quantize(load(sys.argv[1]), sys.argv[2], overrides=json.loads(sys.argv[5]))\n"
        "out = Path(sys.argv[3]); out.mkdir(parents=True)\n"
        "target('cpu', format=sys.argv[4]).export(quant, out)"
    )
    words = (model, scheme, out, format, json.dumps(overrides or {}))
    return run(sys.executable, "-c", code, *words, environment={"TAPEOUT_CACHE": str(cache)})


def environment(name: str, packages: tuple[str, ...]) -> Path:
    """The Python that holds these packages; made on first use."""
    if not packages:
        return Path(sys.executable)
    place = cache_directory() / "peer" / f"{name}-{hashlib.sha256(repr(packages).encode()).hexdigest()[:8]}"
    python = place / "bin" / "python"
    if not (place / "whole").exists():
        venv.create(place, with_pip=True, clear=True)
        # hqq's setup would build kernels for CUDA.
        run(python, "-m", "pip", "install", *packages, environment={"DISABLE_CUDA": "1"})
        (place / "whole").touch()
    return python


def synced(ran: Ran) -> Ran:
    """The same with the time until the disk has it."""
    begin = time.perf_counter()
    os.sync()
    return replace(ran, wall_s=ran.wall_s + time.perf_counter() - begin)


def plain_write(directory: Path, count: int) -> float:
    """Seconds that a file of ``count`` bytes takes to the disk, 8 MB at a time."""
    block = os.urandom(1 << 23)
    os.sync()
    begin = time.perf_counter()
    with tempfile.TemporaryFile(dir=directory) as file:
        for at in range(0, count, len(block)):
            file.write(block[: count - at])
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begin


def size(directory: Path) -> int:
    """Bytes of the files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def report(result: dict[str, Any]) -> None:
    """Print the JSON line that ends every benchmark."""
    from tapeout.validate.throughput import machine

    print(json.dumps(result | {"machine": machine()}))


def report_exports(
    facts: dict[str, Any], ran: dict[str, list[Ran]], sizes: dict[str, int], *, width: int = 12
) -> None:
    """Print a line for each side of an export benchmark, and the JSON line with ``facts`` in front: median time, most memory, bytes."""
    rows = {
        who: {
            "wall_s": round(statistics.median(each.wall_s for each in runs), 2),
            "peak_rss_gb": round(max(each.peak_bytes for each in runs) / 1e9, 3),
            "bytes": sizes[who],
        }
        for who, runs in ran.items()
    }
    for who, row in rows.items():
        ratio = row["wall_s"] / rows["tapeout"]["wall_s"]
        print(
            f"{who:{width}} {row['wall_s']:7.2f} s, {row['peak_rss_gb']:6.3f} GB peak, {row['bytes'] / 1e6:7.1f} MB, {ratio:.2f}× our time"
        )
    report({**facts, "rows": rows})
