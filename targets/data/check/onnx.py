"""ONNX, through onnxruntime: decoders with their cache in place or handed back and forth, encoders, encoder-decoders, plain modules."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from tapeout.targets.data.check.common import (
    ARTIFACT,
    METRICS,
    RUNS,
    Array,
    Decoder,
    Encoder,
    Gate,
    Runtime,
    attempt,
    cores,
    decoder_speed,
    distances,
    failure,
    golden_arrays,
    quantiles,
    said_by,
    verdict,
)

TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


def onnx_session(path: Path, providers: list[str], settings: tuple[tuple[str, str], ...]) -> Any:
    """A graph on the first of these providers that takes it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = cores(), 4
    # Without VNNI x86 sums pairs of int8 products in 16 bits unless it is asked not to.
    if platform.machine() in ("x86_64", "AMD64") and "vnni" not in said_by("/proc/cpuinfo", "flags"):
        options.add_session_config_entry("session.x64quantprecision", "1")
    for name, value in settings:
        options.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(str(path), options, providers)


def empty_past(session: Any) -> dict[str, Array]:
    """Zeros for the past of every layer: of no tokens where a graph's cache grows, of its context where it does not."""
    return {
        each.name: np.zeros(
            (1, each.shape[1], each.shape[2] if isinstance(each.shape[2], int) else 0, each.shape[3]),
            TYPES[each.type],
        )
        for each in session.get_inputs()
        if each.name.startswith("past_")
    }


class OnnxShared(Decoder):
    """A graph whose past and present are the same memory."""

    def __init__(self, session: Any, context: int) -> None:
        self.session, self.binding, self.context = session, session.io_binding(), context
        self.vocab = int(session.get_outputs()[0].shape[2])
        self.mask, self.past = np.ones(context, np.int64), 0
        latents = "tapeout.latent_cache" in session.get_modelmeta().custom_metadata_map
        self.cache: list[Array] = []
        for each in session.get_inputs():
            if each.name.startswith("past_"):
                # Values that are the keys once more take no memory of their own.
                again = latents and each.name.endswith(".value")
                self.cache.append(self.bind(each, self.cache[-1] if again else None))

    def bind(self, value: Any, given: Array | None) -> Array:
        """Memory for a layer's keys or values [1, heads, tokens, width]: behind a window what is written before old rows are dropped."""
        _, heads, length, width = value.shape
        rows = self.context
        if isinstance(length, str) and length.startswith("window_"):
            window = int(length[len("window_") :])
            self.window, rows = window, min(rows, window + window // 8 + 1)
        cache = np.zeros((1, heads, rows, width), np.float32) if given is None else given
        present = value.name.replace("past_key_values", "present")
        for bind, name in ((self.binding.bind_input, value.name), (self.binding.bind_output, present)):
            bind(name, "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
        return cache

    def begin(self, function: str) -> None:
        """What is in the cache is not looked at."""
        self.past = 0

    def last(self, ids: list[int], wanted: int) -> Array:
        """Logits of the last tokens."""
        count, total = len(ids), self.past + len(ids)
        given, first = np.array(ids, np.int64), np.array([count - wanted], np.int64)
        logits = np.empty((wanted, self.vocab), np.float32)
        arrays = {
            "input_ids": (given, (1, count)),
            "attention_mask": (self.mask, (1, total)),
            "first_logits": (first, (1,)),
        }
        for name, (array, shape) in arrays.items():
            self.binding.bind_input(name, "cpu", 0, np.int64, shape, array.ctypes.data)
        self.binding.bind_output("logits", "cpu", 0, np.float32, (1, *logits.shape), logits.ctypes.data)
        self.session.run_with_iobinding(self.binding)
        self.past = total
        return logits


class OnnxGrown(Decoder):
    """A graph whose cache is handed back and forth."""

    def __init__(self, session: Any, context: int) -> None:
        self.session, self.context = session, context
        self.given = {each.name: each for each in session.get_inputs()}
        self.names = [each.name for each in session.get_outputs()]
        self.begin("prefill")

    def begin(self, function: str) -> None:
        """With an empty cache."""
        self.cache, self.past = empty_past(self.session), 0

    def last(self, ids: list[int], wanted: int) -> Array:
        """Logits of the last tokens."""
        count, total = len(ids), self.past + len(ids)
        places, room = np.arange(self.past, total), self.given["attention_mask"].shape[1]
        mask = np.zeros((1, room if isinstance(room, int) else total), np.int64)
        mask[:, :total] = 1
        known = {
            "input_ids": np.array([ids], np.int64),
            "position_ids": places[None],
            "attention_mask": mask,
            "cache_position": places,
            "logits_at": np.arange(count - wanted, count),
        }
        feed = {**{name: value for name, value in known.items() if name in self.given}, **self.cache}
        found = dict(zip(self.names, self.session.run(None, feed)))
        logits = np.asarray(found.pop("logits"), np.float32)[0, -wanted:]
        self.cache, self.past = (
            {name.replace("present", "past_key_values"): value for name, value in found.items()},
            total,
        )
        return logits


class OnnxEncoder(Encoder):
    """See Encoder."""

    def __init__(self, session: Any, context: int) -> None:
        self.session, self.context = session, context

    def encode(self, ids: list[int]) -> Array:
        """See Encoder."""
        given = np.array([ids], np.int64)
        (out,) = self.session.run(None, {"input_ids": given, "attention_mask": np.ones_like(given)})
        return np.asarray(out, np.float32).reshape(-1, out.shape[-1])[:1]


class OnnxSeq2Seq(Encoder):
    """An encoder-decoder: what ``encode`` gives is the logits [1, vocab] of the target's first token."""

    metric, shared, chunk = "kl", True, 1 << 30

    def __init__(self, encoder: Any, decoder: Any, context: int) -> None:
        self.encoder, self.decoder, self.context = encoder, decoder, context
        self.start = int(decoder.get_modelmeta().custom_metadata_map["tapeout.start"])
        self.names = [each.name for each in decoder.get_outputs()]
        self.vocab = int(decoder.get_outputs()[0].shape[2])

    def encode(self, ids: list[int]) -> Array:
        """Take the source, and give what follows the target's begin."""
        given = np.array([ids], np.int64)
        names, mask = [each.name for each in self.encoder.get_outputs()], np.ones_like(given)
        crossed = self.encoder.run(names, {"input_ids": given, "attention_mask": mask})
        self.source = {**dict(zip(names, crossed)), "encoder_attention_mask": mask}
        self.cache = empty_past(self.decoder)
        return self.step("decode", [self.start])

    def step(self, function: str, ids: list[int]) -> Array:
        """Append to the target."""
        feed = {"input_ids": np.array([ids], np.int64), **self.source, **self.cache}
        logits, *present = self.decoder.run(self.names, feed)
        names = [name.replace("present", "past_key_values") for name in self.names[1:]]
        self.cache = dict(zip(names, present))
        return np.asarray(logits, np.float32)[0]

    def begin(self, function: str) -> None:
        """The next prefill takes a source."""

    def prefill(self, ids: list[int], chunk: int) -> Array:
        """The source, whole."""
        return self.encode(ids)

    def speed(self, contexts: list[int]) -> dict[str, Any]:
        """A source, and tokens of its target."""
        return {"contexts": decoder_speed(self, contexts)}  # type: ignore[arg-type]


class OnnxModule:
    """A plain module: the inputs of golden.safetensors, and what must come out."""

    runtime, chip = "", ""

    def __init__(self, session: Any, root: Path) -> None:
        self.session, arrays = session, golden_arrays(root)
        samples: dict[str, dict[str, Array]] = {}
        for key, value in arrays.items():
            kind, sample, name = key.split(".", 2)
            if kind == "inputs":
                samples.setdefault(sample, {})[name] = value
        self.samples, self.wanted = (
            samples,
            {key: value for key, value in arrays.items() if key.startswith("outputs.")},
        )

    def run(self, sample: str) -> list[Array]:
        """Rows [rows, width] of each output."""
        found = self.session.run(None, self.samples[sample])
        return [
            np.asarray(each, np.float32).reshape(-1, each.shape[-1] if each.ndim else 1) for each in found
        ]

    def try_out(self, ids: list[int]) -> None:
        """The first call."""
        for sample in list(self.samples)[:1]:
            self.run(sample)

    def gates(self, root: Path, limit: float) -> list[Gate]:
        """The worst output, each in its own deviation; KL is half the variance of errors, so twice its limit."""

        def measured() -> Gate:
            if not self.wanted:
                return failure(
                    "golden", "the package has no golden.safetensors that can be used here.", "skipped"
                )
            outputs = {sample: self.run(sample) for sample in self.samples}
            worst = 0.0
            for key, expected in self.wanted.items():
                _, sample, output = key.split(".")
                worst = max(worst, distances(expected, outputs[sample][int(output)])["error"])
            seconds = []
            for _ in range(RUNS):
                begin = time.perf_counter()
                self.run(next(iter(self.samples)))
                seconds.append(time.perf_counter() - begin)
            told = f"{len(self.wanted)} outputs of {len(self.samples)} samples; a run takes {quantiles('run', seconds)['run_p50_s'] * 1e3:.2f} ms (median of {RUNS})."
            return verdict("golden", METRICS["error"], worst, 2 * limit, told)

        return [attempt("golden", measured)]

    def speed(self, contexts: list[int]) -> dict[str, Any]:
        """Stands in the gate's words: a module has no tokens."""
        return {}


class Onnx(Runtime):
    """See Runtime."""

    formats: tuple[str, ...] = ("onnx",)
    needs: tuple[str, ...] = ("onnxruntime", "numpy")
    install = "pip install onnxruntime numpy"
    settings: tuple[tuple[str, str], ...] = ()
    gpu: tuple[str, ...] = ()  # providers of its GPU, the best first

    def units(self, root: Path, manifest: dict[str, Any]) -> list[str]:
        """The GPU, where onnxruntime has a provider for it."""
        import onnxruntime

        return ["gpu" if set(self.gpu) & set(onnxruntime.get_available_providers()) else "cpu"]

    def providers(self, unit: str) -> list[str]:
        """The GPU's before the processor's, which takes what they leave."""
        import onnxruntime

        here = onnxruntime.get_available_providers()
        return [*(name for name in self.gpu if name in here and unit == "gpu"), "CPUExecutionProvider"]

    def opened(self, root: Path, manifest: dict[str, Any], unit: str) -> Any:
        """By what the graph says of itself."""
        import onnxruntime

        place, context = root / ARTIFACT, manifest["artifact"]["context"]
        loaded = onnx_session(place / "model.onnx", self.providers(unit), self.settings)
        said = loaded.get_modelmeta().custom_metadata_map
        model: Any
        if said.get("tapeout.graph") == "torch.export":
            model = OnnxModule(loaded, root)
        elif "tapeout.start" in said:
            encoder = onnx_session(place / "encoder.onnx", self.providers(unit), self.settings)
            model = OnnxSeq2Seq(encoder, loaded, context)
        elif "tapeout.output" in said:
            model = OnnxEncoder(loaded, context)
        elif said.get("tapeout.graph") == "optimum" or any(
            each.name == "logits_at" for each in loaded.get_inputs()
        ):
            model = OnnxGrown(loaded, context)
        else:
            model = OnnxShared(loaded, context)
        model.runtime = f"onnxruntime {onnxruntime.__version__} ({loaded.get_providers()[0]})"
        return model


RUNTIME: Runtime = Onnx()
