"""Where a prompt of 512 tokens spends its time: a 1.1B Llama in int4-g32, our ONNX on onnxruntime and our GGUF on llama.cpp.

    python benchmarks/prefill_profile.py [--prefill 512] [--repeats 3]

Each side runs twice. Once as it is, under ``perf record`` (cpu-clock, which needs no hardware counters): the seconds of each
function, named by the multiplying instruction that it is made of, since both libraries are stripped. Once timed operator by operator:
onnxruntime's own profile, and llama.cpp's scheduler asked to stop after each (``cb_eval``). A sample stands behind the instruction that
was waited for, so that the one before it counts. Needs linux-perf, binutils, and what ``onnx_decode.py`` has made.
"""

from __future__ import annotations

import argparse
import bisect
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import common

SIDES = {"tapeout-onnx": "onnx_decode-onnx", "tapeout-gguf": "onnx_decode-gguf"}
FREQUENCY = 997  # Hz: no multiple of the timer's
_PEERS = Path(__file__).resolve().parent / "peers"
_KINDS = (
    ("AMX tiles", r"tdpb"),
    ("VNNI", r"vpdp"),
    ("waiting", r"pause"),
    ("float FMA", r"vf(n?)m(add|sub)\w*ps"),
)
"""A function is of the first kind that it has an instruction of."""
_STEPS = (
    ("tile loads", r"tileload"),
    ("tile products", r"tdpb"),
    ("tile stores", r"tilestore|tilezero"),
    ("integer products", r"vpdp|vpmadd"),
    ("float scales and sums", r"vcvt|vmul|vfn?m|vaddps|vbroadcastss"),
    ("codes and sums of integers", r"vp\w+|vmovdq\w+|vshuf\w+|vinsert\w+"),
)


class Library:
    """A shared library: which function an offset in its file belongs to, and what that is made of."""

    def __init__(self, path: str) -> None:
        self.path = path
        headers = _said("readelf", "-lW", path)
        found = re.findall(r"LOAD +0x(\w+) +0x(\w+) +0x\w+ +0x(\w+)", headers)
        self._segments = [tuple(int(each, 16) for each in row) for row in found]
        frames = re.findall(r"pc=(\w+)\.\.(\w+)", _said("readelf", "--debug-dump=frames", path))
        self._functions = sorted({(int(a, 16), int(b, 16)) for a, b in frames})
        self._asm: dict[tuple[int, int], list[tuple[int, str]]] = {}

    @cached_property
    def _symbols(self) -> dict[int, str]:
        lines = (
            line.split(maxsplit=2) for line in _said("nm", "-DC", "--defined-only", self.path).splitlines()
        )
        return {int(at, 16): name for at, kind, name in lines if kind in "TtWi"}

    def address(self, offset: int) -> int:
        """Of an offset in the file."""
        return next(offset - at + to for at, to, size in self._segments if at <= offset < at + size)

    def function(self, address: int) -> tuple[int, int]:
        """Begin and end of the function around an address; of what assembly has no frames for, the gap between others."""
        i = bisect.bisect_right(self._functions, (address, 1 << 62)) - 1
        begin, end = self._functions[i]
        if address < end:
            return begin, end
        after = self._functions[i + 1][0] if i + 1 < len(self._functions) else end
        return max(end, address & ~255), min(after, (address & ~255) + 256)

    def asm(self, function: tuple[int, int]) -> list[tuple[int, str]]:
        """Its instructions: address and mnemonic."""
        if function not in self._asm:
            span = (f"--start-address={function[0]}", f"--stop-address={function[1]}")
            text = _said("objdump", "-d", "--no-show-raw-insn", *span, self.path)
            self._asm[function] = [
                (int(at, 16), word) for at, word in re.findall(r"^ *(\w+):\t([\w.]+)", text, re.MULTILINE)
            ]
        return self._asm[function]

    def kind(self, function: tuple[int, int]) -> str:
        """What it multiplies with."""
        words = " ".join(word for _, word in self.asm(function))
        return next((kind for kind, pattern in _KINDS if re.search(pattern, words)), "other")

    def step(self, function: tuple[int, int], address: int) -> str:
        """What the instruction before an address does."""
        asm = self.asm(function)
        word = asm[max(0, bisect.bisect_left(asm, (address, "")) - 1)][1]
        return next((step for step, pattern in _STEPS if re.match(pattern, word)), "other")

    def name(self, function: tuple[int, int]) -> str:
        return self._symbols.get(function[0], f"{Path(self.path).name.split('.')[0]}+{function[0]:#x}")


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sampled(
    kind: str, directory: Path, arguments: argparse.Namespace
) -> tuple[float, Counter[tuple[str, int]]]:
    """Median seconds of a prompt, and samples by file and offset in it, of a side that runs as it is."""
    words = ["--prefill", str(arguments.prefill), "--decode", "0", "--threads", str(common.cores())]
    command = [sys.executable, "-P", str(_PEERS / "decoder.py"), kind, str(directory), *words]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryDirectory() as scratch, subprocess.Popen(command, **pipes) as child:
        assert child.stdin
        assert child.stdout
        child.stdout.readline()
        data = f"{scratch}/perf.data"
        record = ["perf", "record", "-q", "-N", "-e", "cpu-clock", "-F", str(FREQUENCY), "-p", str(child.pid)]
        with subprocess.Popen([*record, "-o", data]) as perf:
            time.sleep(1)
            seconds = []
            for _ in range(arguments.repeats):
                child.stdin.write("time\n")
                child.stdin.flush()
                seconds.append(json.loads(child.stdout.readline())["prefill_s"])
            perf.send_signal(signal.SIGINT)
        maps = re.findall(
            r"^(\w+)-(\w+) ..x. (\w+) \S+ \d+ +(/.*)$",
            Path(f"/proc/{child.pid}/maps").read_text(),
            re.MULTILINE,
        )
        child.stdin.close()
        addresses = Counter(int(each, 16) for each in _said("perf", "script", "-i", data, "-F", "ip").split())
    spans = [(int(begin, 16), int(end, 16), int(at, 16), path) for begin, end, at, path in maps]
    counts: Counter[tuple[str, int]] = Counter()
    for address, count in addresses.items():
        at = (
            (path, address - begin + offset) for begin, end, offset, path in spans if begin <= address < end
        )
        counts[next(at, ("the kernel", 0))] += count
    return statistics.median(seconds), counts


def kernels(prompt_s: float, counts: Counter[tuple[str, int]]) -> dict[str, Any]:
    """Share of the time by kind, the functions that take most, and the steps of the first."""
    libraries = {
        path: Library(path)
        for path in {path for path, _ in counts}
        if Path(path).name.startswith(("libggml", "libllama", "onnxruntime", "libonnxruntime"))
    }
    functions: Counter[tuple[str, tuple[int, int]]] = Counter()
    for (path, offset), count in counts.items():
        if path in libraries:
            functions[path, libraries[path].function(libraries[path].address(offset))] += count
    kinds = Counter({"other": counts.total()})
    for (path, function), count in functions.most_common(40):  # of the others each has less than 0.1 %
        kinds["other"] -= count
        kinds[libraries[path].kind(function)] += count
    total = counts.total()
    (path, first), most = functions.most_common(1)[0]
    steps: Counter[str] = Counter()
    for (of, offset), count in counts.items():
        if of == path and first[0] <= (address := libraries[path].address(offset)) < first[1]:
            steps[libraries[path].step(first, address)] += count
    return {
        "prompt_s": round(prompt_s, 2),
        "samples": total,
        "kinds_s": {kind: round(count / total * prompt_s, 3) for kind, count in kinds.most_common()},
        "functions": [
            {
                "name": libraries[path].name(function),
                "kind": libraries[path].kind(function),
                "s": round(count / total * prompt_s, 3),
            }
            for (path, function), count in functions.most_common(6)
        ],
        "steps_of_first_s": {step: round(count / total * prompt_s, 3) for step, count in steps.most_common()},
        "first_s": round(most / total * prompt_s, 3),
    }


def operators(kind: str, directory: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a prompt by operator, timed one by one; in a process of its own."""
    words = ["--prefill", str(arguments.prefill), "--operators", kind, str(directory)]
    told = _said(sys.executable, str(Path(__file__).resolve()), *words)
    found: dict[str, float] = json.loads(told.splitlines()[-1])
    return found


def onnxruntime_operators(directory: Path, ids: list[int]) -> dict[str, float]:
    """By onnxruntime's own profile, of the second run."""
    import onnxruntime

    from tapeout.targets import onnxruntime as ours

    with tempfile.TemporaryDirectory() as scratch:

        class Profiled(onnxruntime.SessionOptions):
            def __init__(self) -> None:
                super().__init__()
                self.enable_profiling, self.profile_file_prefix = True, f"{scratch}/ort"

        onnxruntime.SessionOptions = Profiled
        session: Any = ours.open_session(str(directory), len(ids) + 8, threads=common.cores())
        for _ in range(2):
            session.reset()
            session.append(ids)
        events = json.loads(Path(session._session.end_profiling()).read_text())
    last = [each for each in events if each["name"] == "model_run"][-1]
    found: Counter[str] = Counter()
    for each in events:
        if each["cat"] == "Node" and each["name"].endswith("_kernel_time") and each["ts"] >= last["ts"]:
            found[each["args"]["op_name"]] += each["dur"] / 1e6
    return dict(found)


def llama_cpp_operators(directory: Path, ids: list[int]) -> dict[str, float]:
    """By a callback after each operator, which therefore runs alone, of the second run; products of weights apart."""
    import ctypes

    import llama_cpp

    from tapeout.targets import llama_cpp as ours
    from tapeout.targets.llama_cpp_trace import _Tensor

    library, found, last = llama_cpp.llama_cpp._lib, Counter[str](), [0.0]
    library.ggml_op_desc.argtypes, library.ggml_op_desc.restype = [ctypes.c_void_p], ctypes.c_char_p

    class Clock:
        def __init__(self, _: bool) -> None:
            self.callback = llama_cpp.ggml_backend_sched_eval_callback(self.see)

        def see(self, at: int, ask: bool, _: object) -> bool:
            if not ask:
                now, op = time.perf_counter(), library.ggml_op_desc(at).decode()
                if op == "MUL_MAT":
                    source = ctypes.cast(at, ctypes.POINTER(_Tensor)).contents.src[0].contents
                    op += " of weights" if b".weight" in source.name else " of attention"
                found[op] += now - last[0]
            last[0] = time.perf_counter()
            return True

    ours.Tracer = Clock  # type: ignore[misc,assignment]
    path, length = str(next(directory.glob("*.gguf"))), len(ids) + 8
    session: Any = ours.open_session(path, context=length, threads=common.cores(), traced=True)
    for _ in range(2):
        found.clear()
        session.reset()
        session.append(ids)
    return dict(found)


def part(operator: str) -> str:
    """Of a model's work, by the operator's name in either runtime."""
    if operator in ("MatMulNBits", "MUL_MAT of weights"):
        return "products of weights"
    attention = (
        "GroupQueryAttention",
        "FLASH_ATTN_EXT",
        "MUL_MAT of attention",
        "SOFT_MAX",
        "ROPE",
        "SET_ROWS",
        "CONT",
    )
    return "attention, RoPE, cache" if operator in attention else "the rest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    parser.add_argument("--operators", nargs=2, metavar=("SIDE", "DIRECTORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.operators:
        side, directory = arguments.operators
        run = onnxruntime_operators if side == "tapeout-onnx" else llama_cpp_operators
        print(json.dumps(run(Path(directory), [3 + 7 * i % 97 for i in range(arguments.prefill)])))
        return
    if missing := [tool for tool in ("perf", "readelf", "objdump", "nm") if not shutil.which(tool)]:
        sys.exit(f"{', '.join(missing)}: apt-get install linux-perf binutils")
    fields = common.SHAPES["1b"]
    width, inner = fields["hidden_size"], fields["intermediate_size"]
    keys = width // fields["num_attention_heads"] * fields["num_key_value_heads"]
    weights = fields["num_hidden_layers"] * (2 * width * width + 2 * width * keys + 3 * width * inner)
    operations = 2 * weights * arguments.prefill  # the head is of the last token alone
    sides = {}
    for side, name in SIDES.items():
        if not (arguments.work / name / "whole").exists():
            sys.exit(f"{arguments.work / name} is absent: python benchmarks/onnx_decode.py --no-float")
        found = kernels(*sampled(side, arguments.work / name, arguments))
        by_operator = operators(side, arguments.work / name, arguments)
        parts: Counter[str] = Counter()
        for operator, seconds in by_operator.items():
            parts[part(operator)] += seconds
        most = sorted(by_operator.items(), key=lambda item: -item[1])[:8]
        found["operators_s"] = {operator: round(seconds, 3) for operator, seconds in most}
        found["parts_s"] = {each: round(seconds, 3) for each, seconds in parts.items()}
        found["gflops_of_products"] = round(operations / parts["products of weights"] / 1e9, 1)
        sides[side] = found
        print(
            f"{side}: {found['prompt_s']} s a prompt, {found['samples']} samples of {arguments.repeats} prompts"
        )
        for title in ("kinds_s", "steps_of_first_s", "operators_s"):
            print(f"  {title:18}", ", ".join(f"{key} {value:.2f}" for key, value in found[title].items()))
        for each in found["functions"]:
            print(f"  {each['s']:6.2f} s  {each['kind']:10} {each['name'][:90]}")
    onnx, gguf = sides.values()
    gap = sum(onnx["parts_s"].values()) - sum(gguf["parts_s"].values())
    print(f"{'s a prompt, operator by operator':34} {'onnxruntime':>11} {'llama.cpp':>10} {'of the gap':>11}")
    for each in sorted(onnx["parts_s"], key=onnx["parts_s"].get, reverse=True):
        a, b = onnx["parts_s"][each], gguf["parts_s"][each]
        print(f"{each:34} {a:11.2f} {b:10.2f} {(a - b) / gap:11.0%}")
    print(
        f"{'GFLOP/s of the products':34} {onnx['gflops_of_products']:11.0f} {gguf['gflops_of_products']:10.0f}"
    )
    common.report({"benchmark": "prefill_profile", "prefill": arguments.prefill, "sides": sides})


if __name__ == "__main__":
    main()
