#!/usr/bin/env python3
"""Check a Core ML package on a Mac: its files, its logits on each compute unit, its speed.

    pip install coremltools numpy
    python artifact/mac_verify.py

Compares every file with tapeout.json, runs the prompts of golden.safetensors, times each compute unit, and writes
device_report.json beside tapeout.json: `tapeout validate DIR --device-report FILE` puts it into the package's report.

Exit status: 0 everything passed, 1 a gate failed, 2 the package is not whole, 3 no macOS or no coremltools.
Needs Python 3.9, macOS 15 for decoders, coremltools and numpy; tapeout is not needed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

with contextlib.suppress(ImportError):  # said when it is missed: files can be checked without it
    import numpy as np

FORMAT_VERSION = 1
MANIFEST, GOLDEN, REPORT = "tapeout.json", "golden.safetensors", "device_report.json"
ARTIFACT, MODEL = "artifact", "model.mlpackage"
NOT_COVERED = ("root_sha256", "beside", "passed")  # of the manifest, by the root digest
UNITS = {"all": "ALL", "cpu-and-gpu": "CPU_AND_GPU", "cpu-and-ne": "CPU_AND_NE", "cpu-only": "CPU_ONLY"}

GOLDEN_LIMIT = 2e-3  # nats, as `tapeout validate` has it; the report's own bound where that is larger
TAIL = 32  # tokens at the end of a long sequence that prefill and decode are compared on
LONGEST = 1024  # of that sequence: each of its tokens is one call of decode
CONTEXTS, NEW_TOKENS, REPEATS, RUNS = (16, 128, 512), 32, 3, 20

Array = Any
Gate = dict[str, Any]  # name, status, metric, value, limit, reason


class Stop(Exception):
    """Ends the script with one sentence and an exit status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


# Files


def read_manifest(root: Path) -> dict[str, Any]:
    """``tapeout.json``, if it is one of a Core ML package."""
    path = root / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, kind = int(manifest["format_version"]), manifest["artifact"]["format"]
        _ = manifest["root_sha256"], manifest["files"], manifest["beside"], manifest["model"]
    except FileNotFoundError:
        raise Stop(2, f"{root} is not a package: it has no {MANIFEST}.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Stop(2, f"{path} cannot be read as a manifest: {error!r}.") from None
    if version > FORMAT_VERSION:
        raise Stop(2, f"{path} has format_version {version}; this script reads up to {FORMAT_VERSION}.")
    if kind != "coreml":
        raise Stop(2, f"{root} holds an artifact of format {kind}; this script runs Core ML packages only.")
    return manifest


def damage(root: Path, manifest: dict[str, Any]) -> list[str]:
    """What is not as the manifest says, one phrase each."""
    found = []
    for name, entry in {**manifest["files"], **manifest["beside"]}.items():
        path = root / name
        if not path.is_file():
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
    kinds = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "I64": "<i8"}
    arrays = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            values = np.frombuffer(data[start + first : start + last], kinds[entry["dtype"]])
            arrays[name] = values.reshape(entry["shape"])
    return arrays


def golden_of(root: Path) -> list[tuple[list[int], Array]]:
    """Prompts [tokens], and the logits or the row [1, width] that must come out; empty where there are none."""
    if not (root / GOLDEN).exists():
        return []
    arrays = read_safetensors(root / GOLDEN)
    pairs = range(sum(name.startswith("tokens.") for name in arrays))
    return [(arrays[f"tokens.{at}"].tolist(), arrays[f"logits.{at}"].reshape(1, -1)) for at in pairs]


def limit_of(root: Path) -> float:
    """What the package's report allows its runtime, in nats; of encoders a mean of 1 - cosine."""
    path = root / "report.json"
    gates = json.loads(path.read_text(encoding="utf-8"))["gates"] if path.exists() else []
    return max([GOLDEN_LIMIT, *(gate["limit"] or 0 for gate in gates if gate["name"] == "lowering/runtime")])


# Distances


def distances(expected: Array, found: Array) -> dict[str, Any]:
    """Mean KL(expected | found) in nats, mean of 1 - cosine, share of equal top-1, and the largest difference, of rows [rows, width]."""
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
        "reason": reason,
    }


def failure(name: str, reason: str, status: str = "failed") -> Gate:
    """A gate that could not be measured."""
    return {"name": name, "status": status, "metric": "", "value": None, "limit": None, "reason": reason}


def attempt(name: str, run: Callable[[], Gate]) -> Gate:
    """What ``run`` finds; whatever Core ML raises is a finding."""
    try:
        return run()
    except Exception as error:  # Core ML's are of any class
        return failure(name, f"{type(error).__name__}: {error}")


# Running


def packages(root: Path) -> list[Path]:
    """``model.mlpackage``, or those that a model was cut into, in the order in which they are called."""
    artifact = root / ARTIFACT
    first = sorted(artifact.glob("model_1_of_*.mlpackage"))
    if not first:
        return [artifact / MODEL]
    count = int(first[0].stem.rpartition("_")[2])
    return [artifact / f"model_{part}_of_{count}.mlpackage" for part in range(1, count + 1)]


def load(package: Path, unit: str, function: str | None) -> Any:
    """A function of a package on a compute unit, compiled and ready."""
    import coremltools as ct

    with warnings.catch_warnings():
        # coremltools only warns when Core ML refuses a model, and fails at the first prediction in other words.
        warnings.filterwarnings("error", message="You will not be able to run predict")
        return ct.models.MLModel(
            str(package), function_name=function, compute_units=getattr(ct.ComputeUnit, UNITS[unit])
        )


def facts_of(model: Any) -> dict[str, int]:
    """What the package says of itself under ``co.tapeout.``: context, batch, chunk and window."""
    said = dict(model.user_defined_metadata)
    names = ("context", "batch", "chunk", "window")
    return {name: int(said[f"co.tapeout.{name}"]) for name in names if f"co.tapeout.{name}" in said}


class Decoder:
    """One sequence on the functions ``prefill`` and ``decode``, of each package in turn."""

    def __init__(self, models: dict[str, list[Any]]) -> None:
        self.models, self.facts = models, facts_of(models["prefill"][0])
        self.context, self.chunk = self.facts["context"], self.facts["chunk"]
        self.shared = True  # whether decode takes a state that prefill made, as far as we know

    def begin(self, function: str) -> None:
        """A new sequence, in states that the models of this function make."""
        self.states, self.past = [model.make_state() for model in self.models[function]], 0

    def step(self, function: str, ids: list[int]) -> Array:
        """Append tokens; float32 [tokens, vocab]. The mask is zeros: the program itself hides what comes later."""
        batch, total = self.facts["batch"], self.past + len(ids)
        mask = np.zeros((batch, 1, len(ids), total), np.float16)
        name, out = "inputIds", np.tile(np.array(ids, np.int32), (batch, 1))
        for model, state in zip(self.models[function], self.states):
            (out,) = model.predict({name: out, "fullAttentionMask": mask}, state).values()
            name = "hiddenStates"  # of the next package
        self.past = total
        return np.asarray(out, np.float32)[0]

    def prefill(self, ids: list[int], chunk: int) -> Array:
        """Append tokens, ``chunk`` in a call; the rows of the last call."""
        for at in range(0, len(ids), chunk):
            rows = self.step("prefill", ids[at : at + chunk])
        return rows

    def decode(self, ids: list[int]) -> list[Array]:
        """Append tokens one by one; a row [vocab] for each."""
        return [self.step("decode", [token])[0] for token in ids]


class Encoder:
    """The function ``main``."""

    def __init__(self, models: dict[str, list[Any]]) -> None:
        (self.model,) = models["main"]
        self.facts = facts_of(self.model)
        self.context = self.facts["context"]

    def encode(self, ids: list[int]) -> Array:
        """The first row [1, width] that comes out."""
        shape = (self.facts["batch"], 1)
        inputs = {
            "inputIds": np.tile(np.array(ids, np.int32), shape),
            "attentionMask": np.tile(np.ones(len(ids), np.int32), shape),
        }
        (out,) = self.model.predict(inputs).values()
        out = np.asarray(out, np.float32)
        return out.reshape(-1, out.shape[-1])[:1]


def compare(name: str, golden: list[tuple[list[int], Array]], limit: float, what: str, run: Any) -> Gate:
    """What ``run`` gives of each prompt against what must follow it."""
    if not golden:
        return failure(name, f"the package has no {GOLDEN} that can be used here.", "skipped")
    found = distances(
        np.concatenate([rows for _, rows in golden]), np.concatenate([run(ids) for ids, _ in golden])
    )
    measure, metric = ("cosine", "mean of 1 - cosine") if what == "encode" else ("kl", "mean KL, nats")
    told = f"{what}, {len(golden)} prompts of {GOLDEN}: top-1 equal on {found['top1']:.1%}, largest difference {found['worst']:.3g}."
    return verdict(name, metric, found[measure], limit, told)


def decoder_gates(model: Decoder, golden: list[tuple[list[int], Array]], limit: float) -> list[Gate]:
    """The golden logits by prefill, by decode and by one after the other; and prefill against decode on a longer sequence."""

    def by_prefill(ids: list[int]) -> Array:
        model.begin("prefill")
        return model.prefill(ids, min(model.chunk, -(-len(ids) // 2)))[-1:]  # two calls: one goes on

    def by_decode(ids: list[int]) -> Array:
        model.begin("decode")
        return model.decode(ids)[-1][None]

    # Apps with multifunction packages make one state and give it to the models of both functions. Nobody has proven on hardware
    # that Core ML takes it here: where it raises, decode alone is fed with the prompt, and this gate says so.
    def by_both(ids: list[int]) -> Array:
        model.begin("prefill")
        half = len(ids) // 2
        model.prefill(ids[:half], model.chunk)
        try:
            return model.decode(ids[half:])[-1][None]
        except Exception as error:  # Core ML's are of any class
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


def prefill_decode(model: Decoder, golden: list[tuple[list[int], Array]], limit: float) -> Gate:
    """Both roads over one sequence that is longer than a chunk, and than the window where that is not too long."""
    window = model.facts.get("window", 0)
    reach = max(model.chunk, window if window + TAIL <= LONGEST else 0)
    length = min(model.context, reach + TAIL, LONGEST)
    text = [token for ids, _ in golden for token in ids] or list(range(10))
    ids = (text * -(-length // len(text)))[:length]
    model.begin("prefill")
    tail = min(TAIL, length)
    cut = min(model.chunk, -(-length // 2))
    kept: list[Array] = []
    for at in range(0, length, cut):
        kept = [*kept, *model.step("prefill", ids[at : at + cut])][-tail:]
    model.begin("decode")
    for at in range(length - tail):
        model.step("decode", [ids[at]])
    found = distances(np.array(kept), np.array(model.decode(ids[length - tail :])))
    reason = (
        f"The last {tail} of {length} tokens, prefill in chunks of {cut} against decode"
        f"{f', past the window of {window}' if window and length > window else ''}: top-1 equal on {found['top1']:.1%}, largest "
        f"difference {found['worst']:.3g}. Each may be off by the golden limit, and the variances of two roundings add up: twice that."
    )
    return verdict("prefill-decode", "mean KL, nats", found["kl"], 2 * limit, reason)


def quantiles(name: str, seconds: list[float]) -> dict[str, float]:
    """p50, p90 and p99."""
    return {f"{name}_p{q}_s": float(np.quantile(seconds, q / 100)) for q in (50, 90, 99)}


def decoder_speed(model: Decoder, contexts: list[int], vocab: int) -> list[dict[str, Any]]:
    """Prompt and tokens after it at each context; one round more comes first and does not count."""
    room = model.context - 1
    usual = sorted({min(n, room - min(NEW_TOKENS, room // 2)) for n in CONTEXTS})
    rows = []
    for context in [n for n in contexts if 1 <= n <= room] or usual:
        new = min(NEW_TOKENS, model.context - context)
        ids = np.random.default_rng(0).integers(0, vocab, context + new).tolist()
        rounds = [once(model, ids[:context], ids[context:]) for _ in range(REPEATS + 1)][1:]
        prefill = statistics.median(first for first, _ in rounds)
        seconds = [second for _, each in rounds for second in each]
        found = quantiles("token", seconds)
        rows.append(
            {
                "context": context,
                "prefill_tokens_per_s": context / prefill,
                "decode_tokens_per_s": 1 / found["token_p50_s"],
                "first_token_s": prefill + found["token_p50_s"],
                "samples": len(seconds),
                **found,
            }
        )
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
    rows, batch = [], model.facts["batch"]
    usual = sorted({min(n, model.context) for n in CONTEXTS[:2]})
    for context in [n for n in contexts if 1 <= n <= model.context] or usual:
        ids, seconds = (list(range(10)) * context)[:context], []
        for _ in range(RUNS + 1):
            begin = time.perf_counter()
            model.encode(ids)
            seconds.append(time.perf_counter() - begin)
        found = quantiles("run", seconds[1:])
        median = found["run_p50_s"]
        rates = {"sequences_per_s": batch / median, "tokens_per_s": batch * context / median}
        rows.append({"batch": batch, "context": context, "samples": RUNS, **found, **rates})
    return rows


def peak_bytes() -> int | None:
    """Most memory that this process had resident; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if platform.system() == "Darwin" else most * 1024)


def run_unit(root: Path, unit: str, contexts: list[int], into: Path) -> None:
    """Everything on one compute unit, in a process of its own; what is known so far stands in ``into`` after each step."""
    import coremltools as ct

    found: dict[str, Any] = {"runtime": f"coremltools {ct.__version__}", "gates": [], "throughput": None}

    def tell(doing: str) -> None:
        found["doing"] = doing
        into.write_text(json.dumps(found), encoding="utf-8")

    tell("loading")
    golden, limit = golden_of(root), limit_of(root)
    is_encoder = "output" in read_manifest(root)["model"]
    functions = {"main": None} if is_encoder else {"prefill": "prefill", "decode": "decode"}
    ids = golden[0][0][:1] if golden else [0]
    model: Any = None
    try:
        begin = time.perf_counter()
        models = {
            name: [load(package, unit, function) for package in packages(root)]
            for name, function in functions.items()
        }
        load_s = time.perf_counter() - begin
        begin = time.perf_counter()
        if is_encoder:
            model = Encoder(models)
            model.encode(ids)
        else:
            model = Decoder(models)
            for function in functions:
                model.begin(function)
                vocab = model.step(function, ids).shape[-1]
        first_s = time.perf_counter() - begin
    except Exception as error:  # Core ML's are of any class: a unit that fails is a finding
        found["gates"].append(failure("load", f"Core ML does not run it: {type(error).__name__}: {error}"))
        tell("")
        return
    reason = f"loaded in {load_s:.2f} s, the first calls took {first_s:.2f} s."
    found["gates"].append(verdict("load", "functions that do not load", 0, 0, reason))
    found["throughput"] = {"load_s": load_s, "first_run_s": first_s, "peak_resident_bytes": peak_bytes()}
    tell("comparing logits")
    if is_encoder:
        found["gates"].append(
            attempt("golden", lambda: compare("golden", golden, limit, "encode", model.encode))
        )
    else:
        found["gates"] += decoder_gates(model, golden, limit)
    tell("measuring speed")
    try:
        if is_encoder:
            found["throughput"]["encodings"] = encoder_speed(model, contexts)
        else:
            found["throughput"]["contexts"] = decoder_speed(model, contexts, vocab)
    except Exception as error:  # Core ML's are of any class: the gates that ran are kept
        found["gates"].append(failure("speed", f"{type(error).__name__}: {error}"))
    found["throughput"]["peak_resident_bytes"] = peak_bytes()
    tell("")


# The Mac, and the report


def isolated(root: Path, unit: str, contexts: list[int]) -> dict[str, Any]:
    """``run_unit`` in another process: Core ML's compilers can end the one that they run in."""
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
        nothing: dict[str, Any] = {"runtime": "", "gates": [], "throughput": None, "doing": "starting"}
        found: dict[str, Any] = json.loads(into.read_text(encoding="utf-8")) if into.exists() else nothing
    doing = found.pop("doing")
    if ended or doing:
        how = signal.Signals(-ended).name if ended < 0 else f"exit status {ended}"
        found["gates"].append(failure("process", f"the process ended by {how} while {doing}."))
    return found


def asked_of_system(name: str) -> str:
    """What ``sysctl`` says; empty where it says nothing."""
    try:
        command = ["sysctl", "-n", name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def device() -> dict[str, Any]:
    """The machine, without its name."""
    memory = asked_of_system("hw.memsize")
    return {
        "machine": asked_of_system("hw.model") or platform.machine(),
        "system": f"macOS {platform.mac_ver()[0]}",
        "chip": asked_of_system("machdep.cpu.brand_string") or platform.machine(),
        "memory_bytes": int(memory) if memory.isdigit() else None,
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


def unit_name(text: str) -> str:
    """A compute unit in our words or in coremltools'."""
    name = text.lower().replace("_", "-")
    if name not in UNITS:
        raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(UNITS)}")
    return name


def check(root: Path, units: list[str], contexts: list[int], out: Path) -> int:
    """The whole check; returns the exit status."""
    manifest = read_manifest(root)
    if wrong := damage(root, manifest):
        raise Stop(2, f"{root} is not what its manifest says: {'; '.join(wrong[:5])}.")
    whole = f"{len(manifest['files']) + len(manifest['beside'])} files are as {MANIFEST} says, root digest {manifest['root_sha256']}"
    print(whole)
    if platform.system() != "Darwin":
        raise Stop(
            3,
            f"Core ML runs on macOS only, and this is {platform.system()}: its files were checked, nothing was run.",
        )
    if absent := [name for name in ("coremltools", "numpy") if importlib.util.find_spec(name) is None]:
        raise Stop(
            3, f"{' and '.join(absent)} cannot be imported by {sys.executable}: pip install coremltools numpy"
        )
    runs = {}
    for unit in units:
        print(f"{unit} …", flush=True)
        runs[unit] = isolated(root, unit, contexts)
    runtimes = [found.pop("runtime") for found in runs.values()]
    report = {
        "format_version": FORMAT_VERSION,
        "root_sha256": manifest["root_sha256"],
        "device": device(),
        "runtime": max(runtimes),
        "units": runs,
    }
    try:
        out.write_text(
            json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise Stop(2, f"{out} cannot be written ({error.strerror}): give another --out.") from None
    print(table(report))
    gates = [gate["status"] for found in runs.values() for gate in found["gates"]]
    passed = "failed" not in gates and "passed" in gates
    print(f"{'passed' if passed else 'FAILED'}: {out}")
    return 0 if passed else 1


def main() -> int:
    """Read the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "package", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent,
        help="the folder with tapeout.json; default: the one that this script came in",
    )  # fmt: skip
    parser.add_argument(
        "--units", nargs="+", type=unit_name, default=list(UNITS), help=f"of {', '.join(UNITS)}; default: all of these"
    )  # fmt: skip
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=[], help="lengths that speed is measured at, in tokens"
    )
    parser.add_argument("--out", type=Path, help=f"default: {REPORT} in the package")
    parser.add_argument("--unit", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        if given.into:
            run_unit(given.package, given.unit, given.contexts, given.into)
            return 0
        return check(
            given.package,
            list(dict.fromkeys(given.units)),
            given.contexts,
            given.out or given.package / REPORT,
        )
    except Stop as stop:
        print(f"mac_verify: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print("mac_verify: stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
