"""Check this package on the device that it is for: its files, its logits, its speed.

    {install}
    python3 check.py

Compares every file with tapeout.json, runs the prompts of golden.safetensors, measures speed, and writes device_report.json
beside tapeout.json: `tapeout validate DIR --device-report FILE` puts it into the package's report.

Exit status: 0 everything passed, 1 a gate failed, 2 this is no package or bad usage, 3 the runtime or the device is not here.
Needs Python 3.9 and what is named above; tapeout is not needed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

with contextlib.suppress(ImportError):  # said when it is missed: files can be checked without it
    import numpy as np

FORMAT_VERSION = 1
MANIFEST, GOLDEN, REPORT, ARTIFACT = "tapeout.json", "golden.safetensors", "device_report.json", "artifact"
NOT_COVERED = ("root_sha256", "beside", "passed")  # of the manifest, by the root digest
FILES = "files"  # the unit that no runtime has

GOLDEN_LIMIT = 2e-3  # nats, as `tapeout validate` has it; the report's own bound where that is larger
TAIL = 32  # tokens at the end of a long sequence that prefill and decode are compared on
LONGEST = 1024  # of that sequence: each of its tokens is one call of decode
CONTEXTS, NEW_TOKENS, REPEATS, RUNS = (16, 128, 512), 32, 3, 20

Array = Any
Gate = dict[str, Any]  # name, status, metric, value, limit, reason
Prompts = Any  # list of (token ids, the row [1, width] that must come out)


class Stop(Exception):
    """Ends the script with one sentence and an exit status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


# Files


def read_manifest(root: Path) -> dict[str, Any]:
    """``tapeout.json``, if it is one of a package that this script runs."""
    path = root / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, kind = int(manifest["format_version"]), manifest["artifact"]["format"]
        entries = {**manifest["files"], **manifest["beside"]}.values()
        _ = (
            manifest["root_sha256"],
            manifest["model"],
            [(entry["size"], entry["sha256"]) for entry in entries],
        )
    except FileNotFoundError:
        raise Stop(2, f"{root} is not a package: it has no {MANIFEST}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Stop(2, f"{path} cannot be read as a manifest: {error!r}.") from None
    if version > FORMAT_VERSION:
        raise Stop(2, f"{path} has format_version {version}; this script reads up to {FORMAT_VERSION}.")
    if RUNTIME.formats and kind not in RUNTIME.formats:
        raise Stop(
            2, f"{root} holds an artifact of format {kind}; this script runs {', '.join(RUNTIME.formats)}."
        )
    return manifest


def damage(root: Path, manifest: dict[str, Any]) -> list[str]:
    """What is not as the manifest says, one phrase each."""
    found, inside = [], root.resolve()
    for name, entry in {**manifest["files"], **manifest["beside"]}.items():
        path = root / name
        if Path(name).is_absolute() or inside not in path.resolve().parents:
            found.append(f"{name!r} leads out of the package")
        elif not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {entry['size']}")
        elif sha256(path) != entry["sha256"]:
            found.append(f"{name} differs from its digest")
    covered = {key: value for key, value in manifest.items() if key not in NOT_COVERED}
    text = json.dumps(covered, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if hashlib.sha256(text.encode()).hexdigest() != manifest["root_sha256"]:
        found.append(f"{MANIFEST} differs from its root digest")
    return found


def sha256(path: Path) -> str:
    """Digest of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_safetensors(path: Path) -> dict[str, Array]:
    """Arrays by name: eight bytes of length, a JSON header, the data (https://github.com/huggingface/safetensors)."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1", "BOOL": "?"}  # fmt: skip
    arrays = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            values = np.frombuffer(data[start + first : start + last], kinds[entry["dtype"]])
            arrays[name] = values.reshape(entry["shape"])
    return arrays


def golden_arrays(root: Path) -> dict[str, Array]:
    """What the package must give; empty where it does not say."""
    return read_safetensors(root / GOLDEN) if (root / GOLDEN).exists() else {}


def golden_of(root: Path) -> Prompts:
    """Prompts [tokens], and the logits or the row [1, width] that must come out."""
    arrays = golden_arrays(root)
    pairs = range(sum(name.startswith("tokens.") for name in arrays))
    return [(arrays[f"tokens.{at}"].tolist(), arrays[f"logits.{at}"].reshape(1, -1)) for at in pairs]


def limit_of(root: Path) -> float:
    """What the package's report allows its runtime, in nats; of encoders a mean of 1 - cosine."""
    path = root / "report.json"
    gates = json.loads(path.read_text(encoding="utf-8"))["gates"] if path.exists() else []
    return max([GOLDEN_LIMIT, *(gate["limit"] or 0 for gate in gates if gate["name"] == "lowering/runtime")])


# Distances


def distances(expected: Array, found: Array) -> dict[str, Any]:
    """Mean KL(expected | found) in nats, mean of 1 - cosine, mean squared difference over variance, share of equal top-1, and the
    largest difference, of rows [rows, width].
    """
    expected, found = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    if expected.shape != found.shape:
        raise ValueError(f"the device gives {list(found.shape)} where {list(expected.shape)} is expected")
    for who, rows in (("the device gives", found), (f"{GOLDEN} holds", expected)):
        if not np.isfinite(rows).all():
            raise ValueError(f"{who} NaN or infinite values")
    p, q = log_softmax(expected), log_softmax(found)
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    chosen = found[np.arange(len(found)), expected.argmax(axis=1)]
    return {
        "kl": float(np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0).mean()),
        "cosine": float((1 - (expected * found).sum(axis=1) / np.maximum(lengths, 1e-30)).mean()),
        "error": float(((expected - found) ** 2).mean() / max(1e-30, float(expected.var()))),
        "top1": float((chosen == found.max(axis=1)).mean()),
        "worst": float(np.abs(expected - found).max()),
    }


def log_softmax(rows: Array) -> Array:
    """Log-probabilities of float64 rows [rows, width]."""
    rows = rows - rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def verdict(name: str, metric: str, value: float, limit: float, reason: str) -> Gate:
    """A gate that ran; written so that NaN fails."""
    status = "passed" if value <= limit else "failed"
    return {
        "name": name,
        "status": status,
        "metric": metric,
        "value": value,
        "limit": limit,
        "reason": printable(reason),
    }


def printable(text: str) -> str:
    """Words of a runtime as a report takes them: without a terminal's colours, and no book."""
    return "".join(each if each.isprintable() else " " for each in text)[:3000]


def failure(name: str, reason: str, status: str = "failed") -> Gate:
    """A gate that could not be measured."""
    told = printable(reason)
    return {"name": name, "status": status, "metric": "", "value": None, "limit": None, "reason": told}


def attempt(name: str, run: Callable[[], Gate]) -> Gate:
    """What ``run`` finds; whatever a runtime raises is a finding."""
    try:
        return run()
    except Exception as error:  # runtimes' are of any class
        return failure(name, f"{type(error).__name__}: {error}")


# Models on a runtime


class Decoder:
    """One sequence of a decoder on a runtime; a runtime's part has a subclass.

    Attributes:
        context, vocab: most tokens of a sequence, and how many there are.
        chunk: tokens of a prompt that one call takes.
        window: of a sliding window, in tokens; 0: there is none.
        shared: whether decode goes on with what prefill made, as far as is known.
        runtime, chip: name and version of what runs it, and of what it runs on where that is not the processor.
    """

    context, vocab, chunk, window, shared, runtime, chip = 0, 0, 64, 0, True, "", ""
    functions = ("prefill", "decode")

    def begin(self, function: str) -> None:
        """A new sequence, whose tokens go to ``function`` first."""
        raise NotImplementedError

    def last(self, ids: list[int], wanted: int) -> Array:
        """Append tokens; float32 [wanted, vocab], the logits after the last of them."""
        raise NotImplementedError

    def step(self, function: str, ids: list[int]) -> Array:
        """Append tokens; float32 [rows, vocab], the logits after the last tokens: after the last one at least."""
        return self.last(ids, 1)

    def rows(self, ids: list[int]) -> Array:
        """Append tokens by prefill; float32 [tokens, vocab]."""
        return self.last(ids, len(ids))

    def prefill(self, ids: list[int], chunk: int) -> Array:
        """Append tokens, ``chunk`` in a call; the rows of the last call."""
        for at in range(0, len(ids), chunk):
            rows = self.step("prefill", ids[at : at + chunk])
        return rows

    def decode(self, ids: list[int]) -> list[Array]:
        """Append tokens one by one; a row [vocab] for each."""
        return [self.step("decode", [token])[-1] for token in ids]

    def try_out(self, ids: list[int]) -> None:
        """The first call of each function."""
        for function in self.functions:
            self.begin(function)
            self.vocab = self.step(function, ids).shape[-1]

    def gates(self, root: Path, limit: float) -> list[Gate]:
        """The golden logits by prefill, by decode and by one after the other; and prefill against decode on a longer sequence."""
        return decoder_gates(self, golden_of(root), limit)

    def speed(self, contexts: list[int]) -> dict[str, Any]:
        """Prompt and tokens after it at each context."""
        return {"contexts": decoder_speed(self, contexts)}


class Encoder:
    """An encoder on a runtime: ``encode`` gives its first row [1, width]."""

    context, batch, runtime, chip, metric = 0, 1, "", "", "cosine"

    def encode(self, ids: list[int]) -> Array:
        """The first row [1, width] that comes out."""
        raise NotImplementedError

    def try_out(self, ids: list[int]) -> None:
        """The first call."""
        self.encode(ids)

    def gates(self, root: Path, limit: float) -> list[Gate]:
        """The golden rows."""
        pairs = golden_of(root)
        return [
            attempt("golden", lambda: compare("golden", pairs, limit, "encode", self.encode, self.metric))
        ]

    def speed(self, contexts: list[int]) -> dict[str, Any]:
        """A batch at each length."""
        return {"encodings": encoder_speed(self, contexts)}


METRICS = {"kl": "mean KL, nats", "cosine": "mean of 1 - cosine", "error": "squared error / variance"}


def compare(name: str, golden: Prompts, limit: float, what: str, run: Any, measure: str = "kl") -> Gate:
    """What ``run`` gives of each prompt against what must follow it."""
    if not golden:
        return failure(name, f"the package has no {GOLDEN} that can be used here.", "skipped")
    found = distances(
        np.concatenate([rows for _, rows in golden]), np.concatenate([run(ids) for ids, _ in golden])
    )
    told = f"{what}, {len(golden)} prompts of {GOLDEN}: top-1 equal on {found['top1']:.1%}, largest difference {found['worst']:.3g}."
    return verdict(name, METRICS[measure], found[measure], limit, told)


def decoder_gates(model: Decoder, golden: Prompts, limit: float) -> list[Gate]:
    """See ``Decoder.gates``."""

    def by_prefill(ids: list[int]) -> Array:
        model.begin("prefill")
        return model.prefill(ids, min(model.chunk, -(-len(ids) // 2)))[-1:]  # two calls: one goes on

    def by_decode(ids: list[int]) -> Array:
        model.begin("decode")
        return model.decode(ids)[-1][None]

    # Core ML's apps with multifunction packages make one state and give it to the models of both functions. Nobody has proven on
    # hardware that it takes it here: where it raises, decode alone is fed with the prompt, and this gate says so.
    def by_both(ids: list[int]) -> Array:
        model.begin("prefill")
        half = len(ids) // 2
        model.prefill(ids[:half], model.chunk)
        try:
            return model.decode(ids[half:])[-1][None]
        except Exception as error:  # runtimes' are of any class
            model.shared = False
            raise RuntimeError(
                f"decode does not go on with a state that prefill made: {error}. Its speed was measured with prompts "
                "that decode alone was fed with, token by token."
            ) from error

    roads = [("golden-prefill", "prefill in chunks", golden, by_prefill)]
    roads.append(("golden-decode", "decode, token by token", golden, by_decode))
    longer = [(ids, rows) for ids, rows in golden if len(ids) > 1]
    roads.append(("golden-handover", "prefill, then decode", longer, by_both))
    gates = [
        attempt(name, lambda n=name, w=what, g=pairs, r=run: compare(n, g, limit, w, r))  # type: ignore[misc]
        for name, what, pairs, run in roads
    ]
    return [*gates, attempt("prefill-decode", lambda: prefill_decode(model, golden, limit))]


def prefill_decode(model: Decoder, golden: Prompts, limit: float) -> Gate:
    """Both roads over one sequence that is longer than a chunk, and than the window where that is not too long."""
    window = model.window
    reach = max(model.chunk, window if window + TAIL <= LONGEST else 0)
    length = min(model.context, reach + TAIL, LONGEST)
    text = [token for ids, _ in golden for token in ids] or list(range(10))
    ids = (text * -(-length // len(text)))[:length]
    model.begin("prefill")
    tail = min(TAIL, length)
    cut = min(model.chunk, -(-length // 2))
    kept: list[Array] = []
    for at in range(0, length, cut):
        kept = [*kept, *model.rows(ids[at : at + cut])][-tail:]
    model.begin("decode")
    for at in range(length - tail):
        model.step("decode", [ids[at]])
    found = distances(np.array(kept), np.array(model.decode(ids[length - tail :])))
    reason = (
        f"The last {tail} of {length} tokens, prefill in chunks of {cut} against decode"
        f"{f', past the window of {window}' if window and length > window else ''}: top-1 equal on {found['top1']:.1%}, largest "
        f"difference {found['worst']:.3g}. Each may be off by the golden limit, and the variances of two roundings add up: twice that."
    )
    return verdict("prefill-decode", METRICS["kl"], found["kl"], 2 * limit, reason)


def quantiles(name: str, seconds: list[float]) -> dict[str, float]:
    """p50, p90 and p99."""
    return {f"{name}_p{q}_s": float(np.quantile(seconds, q / 100)) for q in (50, 90, 99)}


def decoder_speed(model: Decoder, contexts: list[int]) -> list[dict[str, Any]]:
    """Prompt and tokens after it at each context; one round more comes first and does not count."""
    room = model.context - 1
    usual = sorted({min(n, room - min(NEW_TOKENS, room // 2)) for n in CONTEXTS})
    rows = []
    for context in [n for n in contexts if 1 <= n <= room] or usual:
        new = min(NEW_TOKENS, model.context - context)
        ids = np.random.default_rng(0).integers(0, model.vocab, context + new).tolist()
        rounds = [once(model, ids[:context], ids[context:]) for _ in range(REPEATS + 1)][1:]
        prefill = statistics.median(first for first, _ in rounds)
        seconds = [second for _, each in rounds for second in each]
        found = quantiles("token", seconds)
        rates = {"prefill_tokens_per_s": context / prefill, "decode_tokens_per_s": 1 / found["token_p50_s"]}
        first = {"context": context, "first_token_s": prefill + found["token_p50_s"], "samples": len(seconds)}
        rows.append({**first, **rates, **found})
    return rows


def once(model: Decoder, prompt: list[int], new: list[int]) -> tuple[float, list[float]]:
    """Seconds of a prompt, and of each token after it."""
    model.begin("prefill")
    begin = time.perf_counter()
    model.prefill(prompt, model.chunk)
    prefill, seconds = time.perf_counter() - begin, []
    if not model.shared:
        model.begin("decode")
        model.decode(prompt)
    for token in new:
        begin = time.perf_counter()
        model.step("decode", [token])
        seconds.append(time.perf_counter() - begin)
    return prefill, seconds


def encoder_speed(model: Encoder, contexts: list[int]) -> list[dict[str, Any]]:
    """A batch at each length; one run more comes first and does not count."""
    rows = []
    usual = sorted({min(n, model.context) for n in CONTEXTS[:2]})
    for context in [n for n in contexts if 1 <= n <= model.context] or usual:
        ids, seconds = (list(range(10)) * context)[:context], []
        for _ in range(RUNS + 1):
            begin = time.perf_counter()
            model.encode(ids)
            seconds.append(time.perf_counter() - begin)
        found = quantiles("run", seconds[1:])
        median = found["run_p50_s"]
        rates = {"sequences_per_s": model.batch / median, "tokens_per_s": model.batch * context / median}
        rows.append({"batch": model.batch, "context": context, "samples": RUNS, **found, **rates})
    return rows


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes() -> int | None:
    """Most memory that this process had resident; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if platform.system() == "Darwin" else most * 1024)


class Runtime:
    """What a runtime's part says of itself.

    Attributes:
        formats: of artifacts that it runs; none: any.
        needs: modules that must be there.
        install: the command.
        named: parts of the device that may be asked for; none: there is no choice.
    """

    formats: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    install = ""
    named: tuple[str, ...] = ()

    def unable(self, root: Path, manifest: dict[str, Any]) -> str | None:
        """Why nothing can run here, whatever is installed; None: it can."""
        return None if self.formats else "No runtime but tapeout itself runs this format: tapeout validate."

    def units(self, root: Path, manifest: dict[str, Any]) -> list[str]:
        """Parts of the device that the package is run on."""
        return ["cpu"]

    def opened(self, root: Path, manifest: dict[str, Any], unit: str) -> Any:
        """The model on a unit: a Decoder, an Encoder, or what has their methods."""
        raise NotImplementedError


RUNTIME = Runtime()  # a format's part has its own


# Running


def run_unit(root: Path, unit: str, contexts: list[int], into: Path) -> None:
    """Everything on one unit, in a process of its own; what is known so far stands in ``into`` after each step."""
    found: dict[str, Any] = {"runtime": "", "chip": "", "gates": [], "throughput": None}

    def tell(doing: str) -> None:
        found["doing"] = doing
        into.write_text(json.dumps(found), encoding="utf-8")

    tell("loading")
    manifest, limit, golden = read_manifest(root), limit_of(root), golden_of(root)
    try:
        begin = time.perf_counter()
        model = RUNTIME.opened(root, manifest, unit)
        load_s = time.perf_counter() - begin
        found["runtime"], found["chip"] = printable(model.runtime), printable(model.chip)
        begin = time.perf_counter()
        model.try_out(golden[0][0][:1] if golden else [0])
        first_s = time.perf_counter() - begin
    except Exception as error:  # runtimes' are of any class: a unit that fails is a finding
        found["gates"].append(failure("load", f"it does not load and run: {type(error).__name__}: {error}"))
        tell("")
        return
    reason = f"loaded in {load_s:.2f} s, the first calls took {first_s:.2f} s."
    found["gates"].append(verdict("load", "functions that do not load", 0, 0, reason))
    found["throughput"] = {"load_s": load_s, "first_run_s": first_s, "peak_resident_bytes": peak_bytes()}
    tell("comparing logits")
    found["gates"] += model.gates(root, limit)
    tell("measuring speed")
    try:
        found["throughput"].update(model.speed(contexts))
    except Exception as error:  # runtimes' are of any class: the gates that ran are kept
        found["gates"].append(failure("speed", f"{type(error).__name__}: {error}"))
    found["throughput"]["peak_resident_bytes"] = peak_bytes()
    tell("")


def isolated(root: Path, unit: str, contexts: list[int]) -> dict[str, Any]:
    """``run_unit`` in another process: a runtime can end the one that it runs in."""
    with tempfile.TemporaryDirectory() as scratch:
        into = Path(scratch, "unit.json")
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            str(root),
            "--unit",
            unit,
            "--into",
            str(into),
        ]
        command += ["--contexts", *map(str, contexts)] if contexts else []
        ended = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
        nothing: dict[str, Any] = {
            "runtime": "",
            "chip": "",
            "gates": [],
            "throughput": None,
            "doing": "starting",
        }
        found: dict[str, Any] = json.loads(into.read_text(encoding="utf-8")) if into.exists() else nothing
    doing = found.pop("doing")
    if ended or doing:
        how = signal.Signals(-ended).name if ended < 0 else f"exit status {ended}"
        found["gates"].append(failure("process", f"the process ended by {how} while {doing}."))
    return found


# The device, and the report


def asked_of_system(name: str) -> str:
    """What ``sysctl`` says; empty where it says nothing."""
    try:
        command = ["sysctl", "-n", name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def said_by(path: str, key: str = "") -> str:
    """The value of the first line of a system's file that begins with ``key``; empty where there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace").replace("\0", "")
    except OSError:
        return ""
    lines = [line for line in text.splitlines() if line.startswith(key)]
    return printable(lines[0][len(key) :]).strip(' \t:="') if lines else ""


def device() -> dict[str, Any]:
    """The machine, without its name."""
    if platform.system() == "Darwin":
        memory = asked_of_system("hw.memsize")
        machine, chip = asked_of_system("hw.model"), asked_of_system("machdep.cpu.brand_string")
        system, size = f"macOS {platform.mac_ver()[0]}", int(memory) if memory.isdigit() else None
    else:
        machine = said_by("/proc/device-tree/model") or said_by("/sys/class/dmi/id/product_name")
        chip = (
            said_by("/proc/cpuinfo", "model name")
            or said_by("/proc/cpuinfo", "Hardware")
            or platform.processor()
        )
        system = said_by("/etc/os-release", "PRETTY_NAME=") or f"{platform.system()} {platform.release()}"
        kilobytes = said_by("/proc/meminfo", "MemTotal:").split(" ")[0]
        size = 1024 * int(kilobytes) if kilobytes.isdigit() else None
    named = platform.machine()
    return {
        "machine": machine or named,
        "system": system,
        "chip": chip or machine or named,
        "memory_bytes": size,
    }


def table(report: dict[str, Any]) -> str:
    """Gates and speed as lines of text."""
    lines = []
    for unit, found in report["units"].items():
        for gate in found["gates"]:
            value, limit = ("" if gate[key] is None else f"{gate[key]:.3g}" for key in ("value", "limit"))
            said = gate["metric"] if gate["status"] == "passed" else gate["reason"]
            lines.append(f"{unit:<12} {gate['name']:<16} {gate['status']:<8} {value:>9} {limit:>9}  {said}")
    speed = [(unit, found["throughput"]) for unit, found in report["units"].items() if found["throughput"]]
    for unit, rates in speed:
        for row in rates.get("contexts", []):
            times = " / ".join(f"{row[f'token_p{q}_s'] * 1e3:.2f}" for q in (50, 90, 99))
            lines.append(
                f"{unit:<12} context {row['context']:>6}: prefill {row['prefill_tokens_per_s']:.1f} tokens/s, "
                f"decode {row['decode_tokens_per_s']:.1f} tokens/s ({times} ms), load {rates['load_s']:.2f} s"
            )
        for row in rates.get("encodings", []):
            times = " / ".join(f"{row[f'run_p{q}_s'] * 1e3:.2f}" for q in (50, 90, 99))
            lines.append(
                f"{unit:<12} {row['batch']} × {row['context']} tokens: {times} ms, {row['tokens_per_s']:.0f} tokens/s, "
                f"load {rates['load_s']:.2f} s"
            )
    return "\n".join(lines)


def write_report(out: Path, report: dict[str, Any] | None) -> None:
    """All of it or nothing: written beside ``out``, and renamed. None: see whether it can be, before minutes are spent on what it says."""
    text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        if report:
            partial.replace(out)
        else:
            partial.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise Stop(2, f"{out} cannot be written ({error.strerror}): give another --out.") from None


def check(root: Path, units: list[str], contexts: list[int], out: Path) -> int:
    """The whole check; returns the exit status."""
    manifest = read_manifest(root)
    write_report(out, None)
    wrong, count = damage(root, manifest), len(manifest["files"]) + len(manifest["beside"])
    reason = f"{count} files are as {MANIFEST} says, root digest {manifest['root_sha256']}"
    if wrong:
        reason = f"{root.name} is not what its manifest says: {'; '.join(wrong[:5])}. Nothing was run."
    print(reason, flush=True)
    runs: dict[str, Any] = {FILES: {"gates": [verdict("integrity", "files that differ", len(wrong), 0, reason)], "throughput": None}}  # fmt: skip
    report = {
        "format_version": FORMAT_VERSION,
        "root_sha256": manifest["root_sha256"],
        "device": device(),
        "runtime": "none",
        "units": runs,
    }
    if not wrong:
        if why := RUNTIME.unable(root, manifest):
            raise Stop(3, f"{why} Its files were checked, nothing was run.")
        if absent := [name for name in RUNTIME.needs if not installed(name)]:
            raise Stop(3, f"{' and '.join(absent)} cannot be imported by {sys.executable}: {RUNTIME.install}")
        for unit in units or RUNTIME.units(root, manifest):
            print(f"{unit} …", flush=True)
            runs[unit] = isolated(root, unit, contexts)
        report["runtime"] = max(found.pop("runtime") for unit, found in runs.items() if unit != FILES)
        chips = [found.pop("chip") for unit, found in runs.items() if unit != FILES]
        report["device"]["chip"] = max(chips) or report["device"]["chip"]
    write_report(out, report)
    print(table(report))
    passed = "failed" not in [gate["status"] for found in runs.values() for gate in found["gates"]]
    print(f"{'passed' if passed else 'FAILED'}: {out}")
    return 0 if passed else 1


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def torch_gpu() -> bool:
    """Whether PyTorch sees a GPU; where Linux has no driver's file it is not asked, which takes seconds."""
    drivers = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvgpu", "/dev/nvhost-gpu")
    if not installed("torch") or (platform.system() == "Linux" and not any(map(os.path.exists, drivers))):
        return False
    import torch

    return bool(torch.cuda.is_available())


def unit_name(text: str) -> str:
    """A part of the device in our words or in its vendor's."""
    name = text.lower().replace("_", "-")
    if name not in RUNTIME.named:
        raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(RUNTIME.named)}")
    return name


def main() -> int:
    """Read the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "package", nargs="?", type=Path, default=Path(__file__).resolve().parent,
        help="the folder with tapeout.json; default: the one that this script came in",
    )  # fmt: skip
    if RUNTIME.named:
        parser.add_argument(
            "--units", nargs="+", type=unit_name, default=[], help=f"of {', '.join(RUNTIME.named)}; default: all of these"
        )  # fmt: skip
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=[], help="lengths that speed is measured at, in tokens"
    )
    parser.add_argument("--out", type=Path, help=f"default: {REPORT} in the package")
    parser.add_argument("--unit", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):  # a device's terminal may have no UTF-8
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        if given.into:
            run_unit(given.package, given.unit, given.contexts, given.into)
            return 0
        units = sorted(set(getattr(given, "units", [])), key=RUNTIME.named.index)
        return check(given.package, units, given.contexts, given.out or given.package / REPORT)
    except Stop as stop:
        print(f"check: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print("check: stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
