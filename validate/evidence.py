"""What the gates look at: each model is opened once, says all that is asked of it, and is closed again.

Logits go to mapped files, so that no two models and no text's logits need be in memory together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from tapeout.errors import RuntimeCrash
from tapeout.exporters import Artifact
from tapeout.files import canonical_json, file_sha256
from tapeout.models import DecoderConfig, Model
from tapeout.quantize import Quantized
from tapeout.validate import by_layer, corpus
from tapeout.validate.divergence import Divergence, added_rounding, against_graph
from tapeout.validate.findings import comparison
from tapeout.validate.generate import Said
from tapeout.validate.metrics import Distance
from tapeout.validate.session import KV_BITS, Device, Logits, Session, SessionSpec
from tapeout.validate.watch import Watch
from tapeout.validate.worker import WorkerSession, borrow, borrowed, give_back

_REFERENCE = "tapeout.validate.reference:open_session"
_GRAPH = "tapeout.validate.primitives:open_session"
DECODED = 64  # tokens that the decode gate takes one by one
_GOLDEN_TOKENS = 16  # of a golden prompt at most
_WINDOW = 512  # tokens of a sequence of text
_AT_ONCE = 20  # tasks that a worker answers before it is heard of
_LAYERED = ("original", "dequantized", "quantized")  # references whose layers are held against one another
_LAYERED_SEQUENCES, _LAYERED_TOKENS = 3, 64  # of them, at most

Progress = Callable[[str, int, int], None]


@dataclass
class Evidence:
    """Everything that a validation gathers, each piece when a gate first asks for it.

    Attributes:
        probed_too: the decode gate will look, so that a reference runs its probe with the sequences: each is opened once.
    """

    artifact: Artifact
    model: Model
    quant: Quantized
    device: Device
    scratch: Path
    text: Path | None = None
    tokens: int = 4096
    progress: Progress | None = None
    probed_too: bool = True
    _deployed: WorkerSession | None = None
    _lowered: list[Logits] | None = None
    _walks: dict[int, Divergence | None] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)
    """What the report shows beside the verdicts; each gate adds its own (``report.schema.json`` says what)."""
    layers: dict[str, by_layer.Layers] = field(default_factory=dict)
    """What the layers of a reference gave, by the name that it was asked under."""
    watch: Watch = field(default_factory=Watch)

    @cached_property
    def sequences(self) -> list[list[int]]:
        """Token sequences that quality and lowering are measured on: the tasks with their answers, or windows of a text."""
        return self._original[0]

    @property
    def original(self) -> list[Logits]:
        """The reference's logits with the model's own weights, one [tokens, vocab] a sequence."""
        return self._original[1]

    @property
    def expected(self) -> Said:
        """What the reference's tokenizer and the original weights say."""
        return self._original[2]

    @property
    def evaluated(self) -> dict[str, Any]:
        """How much is evaluated, and the digest of all of it: losses on the same can be compared."""
        told = hashlib.sha256(canonical_json(self.sequences).encode()).hexdigest()
        return {
            "sequences": len(self.sequences),
            "tokens": sum(map(len, self.sequences)),
            "sha256": told,
        }

    @cached_property
    def dequantized(self) -> list[Logits]:
        """The reference's logits with the weights that the codes are."""
        return self._dequantized[: len(self.sequences)]

    def narrowed(self, names: Sequence[str], values: Sequence[str] = ()) -> list[Logits]:
        """The same with some tensors' floats rounded to float16, and of others the values."""
        if not names and not values:
            return self.dequantized
        return self.ask("narrowed", self.reference(halves=names, values=values), self.sequences)

    @property
    def _routes(self) -> bool:
        return isinstance(self.model.config, DecoderConfig) and self.model.config.moe is not None

    @property
    def metric(self) -> str:
        """What ``cost`` is."""
        return "median KL, nats" if self._routes else "mean KL, nats"

    def cost(self, distance: Distance) -> float:
        """What a rounding of inputs costs: on average, or, where a router chooses experts, the median token.

        Of two experts that are nearly tied any rounding may choose the other. That costs a token a thousand times the usual, on device
        and in prediction alike, but not the same tokens: a mean over some hundred of them is the luck of one or two.
        """
        return distance.typical_kl if self._routes else distance.kl

    @cached_property
    def quantized(self) -> list[Logits]:
        """The same, with the inputs rounded to int8 where a scheme says so: what the user chose, on no device yet."""
        if not self._rounds_inputs:
            return self.dequantized
        return self.ask("quantized", self.reference(arithmetic="scheme"), self.sequences)

    @cached_property
    def predicted(self) -> Distance:
        """What the runtime's rounding of matmul inputs does to the reference when it rounds the same; both with its cache."""
        return self._predict(slice(len(self.sequences)))

    @cached_property
    def predicted_probe(self) -> Distance:
        """The same on the probe of the decode gate."""
        return self._predict(slice(len(self.sequences), None))

    def _predict(self, which: slice) -> Distance:
        return Distance.between(self._cached[which], self._rounded[which])

    @cached_property
    def _dequantized(self) -> list[Logits]:
        return self.ask("dequantized", self.reference(), self._with_probe)

    @property
    def _with_probe(self) -> list[list[int]]:
        """The sequences, and the probe last, so that one session serves all."""
        return [*self.sequences, self.probe] if self.probed_too else self.sequences

    @cached_property
    def _rounded(self) -> list[Logits]:
        arithmetic = self.device.arithmetic
        float8 = arithmetic == "modelopt" and any(s.levels == "e4m3" for s in self.quant.schemes.values())
        if arithmetic == "float32" or (
            arithmetic in ("scheme", "modelopt") and not self._rounds_inputs and not float8
        ):
            return self._cached
        spec = self.reference(arithmetic=self.device.arithmetic, rounded_cache=self.rounds_cache)
        return self.ask("rounded", spec, self._with_probe)

    @property
    def _rounds_inputs(self) -> bool:
        """Whether a scheme says that inputs are rounded."""
        return any(scheme.activations for scheme in self.quant.schemes.values())

    @property
    def rounds_cache(self) -> bool:
        """Whether the deployed session keeps keys and values as integer codes.

        Float16 rounds too, by a three-hundredth of the variance that int8 costs: below what the bounds leave for float types.
        """
        return KV_BITS[self.device.cache] < 16

    @property
    def cached(self) -> list[Logits]:
        """The reference's logits with the weights that the codes are, and its cache rounded as the deployed one is."""
        return self._cached[: len(self.sequences)]

    @cached_property
    def _cached(self) -> list[Logits]:
        if not self.rounds_cache:
            return self._dequantized
        return self.ask("cache", self.reference(rounded_cache=True), self._with_probe)

    @cached_property
    def float_noise(self) -> float:
        """How far float32 itself takes the reference from float64: largest logit difference / std."""
        exact = self.ask("float64", self.reference(arithmetic="float64"), self.sequences)
        return Distance.between(exact, self.dequantized).max

    @property
    def window(self) -> int | None:
        """The sliding window in tokens, where the artifact's context goes past it."""
        window = self.model.config.sliding_window
        return window if window and window < self.artifact.context else None

    @cached_property
    def probe(self) -> list[int]:
        """One long sequence for the decode gate: several cache pages, or three windows and a bit.

        It stays within ``tokens``, but goes past the window whatever they are.
        """
        window = self.window or 0
        wanted = 3 * window + DECODED if window else 4 * DECODED
        length = min(self.artifact.context, max(min(wanted, self.tokens), window and window + DECODED))
        flat = [token for ids in self.sequences for token in ids]
        if not flat:
            raise RuntimeCrash(
                "the evaluation text gives no token with this tokenizer: give a text of the model's own kind."
            )
        return (flat * (length // len(flat) + 1))[:length]

    def begin(self, session: Any) -> None:
        """Make a session ready for the tokens of ``probed``."""
        session.reset()

    @property
    def probed(self) -> list[int]:
        """The tokens that the decode gate appends."""
        return self.probe

    def scored(self, ids: Sequence[int]) -> list[int]:
        """The tokens of a sequence that its rows of logits stand behind."""
        return list(ids)

    def golden(self, ids: Sequence[int], rows: Logits) -> tuple[tuple[int, ...], Logits]:
        """A prompt, and the row that must follow it."""
        length = min(_GOLDEN_TOKENS, len(ids))
        return tuple(ids[:length]), rows[length - 1].copy()

    @cached_property
    def said(self) -> Said:
        """What the artifact says of the corpus and the tasks, as it is deployed."""
        return self.say(self.deployed, "answers")

    @property
    def deployed(self) -> WorkerSession:
        """The artifact as it is deployed; stays open until ``close``, and is opened again after it died."""
        if self._deployed is None or self._deployed.ended:
            self._deployed = borrow(self.device.session(self.artifact))
        return self._deployed

    @cached_property
    def tasks(self) -> list[tuple[str, str]]:
        """The model's own (prompt, answer) pairs, if it has a ``tasks.jsonl``."""
        path = self.model.directory / "tasks.jsonl"
        if not path.exists():
            return []
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(row["prompt"], row["answer"]) for row in rows]

    @cached_property
    def _tokenizer(self) -> dict[str, Any]:
        path = self.model.directory / "tokenizer.json"
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return raw

    @cached_property
    def added_tokens(self) -> list[str]:
        """The texts of the tokens that the model's tokenizer looks for before anything else."""
        return [token["content"] for token in self._tokenizer.get("added_tokens", [])]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Keep how many seconds and how much memory a stage took. What several gates look at counts to the first that asks."""
        with self.watch.stage(name):
            yield

    def compare(
        self, gate: str, distance: Distance, reference: Sequence[Logits], other: Sequence[Logits], *names: str
    ) -> None:
        """Keep how KL is spread over the tokens that a gate compared, and the worst with both models' answers."""
        if not distance.tokens:
            return
        one, two = names
        found = comparison(
            distance.kls,
            reference,
            other,
            names=(one, two),
            before=lambda sequence, row: self.text_of(self.scored(self.sequences[sequence])[: row + 1]),
            called=lambda entry: self.text_of([entry]),
        )
        self.findings.setdefault("comparisons", {})[gate] = found

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of tokens by the model's ``tokenizer.json``, or without one their ids."""
        if self._decoder is None:
            return " ".join(f"#{each}" for each in ids)
        return str(self._decoder.decode(list(ids), skip_special_tokens=False))

    @cached_property
    def _decoder(self) -> Any:
        path = self.model.directory / "tokenizer.json"
        return tokenizers.Tokenizer.from_file(str(path)) if path.exists() else None

    @property
    def gives_text(self) -> bool:
        """Whether ids become text again: WordPiece, of encoders, has lost spaces and case."""
        return bool(self._tokenizer.get("model", {}).get("type") != "WordPiece")

    @cached_property
    def strings(self) -> list[str]:
        """The hostile corpus, with the model's own special tokens among it."""
        return list(corpus.hostile(tuple(self.added_tokens[:32])))

    def close(self) -> None:
        """Close what is still open."""
        if self._deployed:
            give_back(self._deployed)
            self._deployed = None

    def walk(self, index: int) -> Divergence | None:
        """Where the artifact first parts from the graph with the weights that the codes are, over one of the sequences.

        None: the target does not show it. What transformers gives stands beside the graph, which is ours.
        """
        if index not in self._walks:
            scratch = self.scratch / f"walk-{index}"
            scratch.mkdir(exist_ok=True)  # a walk that could not be taken left it
            spec = self.device.traced(self.artifact, scratch)
            self._walks[index] = self._walk(spec, index, scratch) if spec else None
        return self._walks[index]

    def _walk(self, spec: SessionSpec, index: int, scratch: Path) -> Divergence:
        arguments = {"model": str(self.model.directory), "store": str(self.quant.directory)}
        added = added_rounding(self.artifact, self.quant.schemes, self.device.carries)
        ids, expected = self.sequences[index], self.dequantized[index]
        with borrowed(spec) as device, borrowed(SessionSpec(_GRAPH, arguments)) as graph:
            most = device.facts.context  # of a device that is walked in one call, as much as it takes
            return against_graph(device, graph, ids[:most], scratch, expected[:most], added)

    def reference(
        self,
        *,
        quantized: bool = True,
        arithmetic: str = "float32",
        rounded_cache: bool = False,
        halves: Sequence[str] = (),
        values: Sequence[str] = (),
    ) -> SessionSpec:
        """The reference with the weights that the codes are, or with the original ones."""
        arguments: dict[str, Any] = {
            "model": str(self.model.directory),
            "store": str(self.quant.directory) if quantized or self.model.quantization else None,
            "arithmetic": arithmetic,
            "kv_cache": self.device.cache if rounded_cache else None,
        }
        narrowed = {"halves": list(halves), "values": list(values)}
        arguments |= {key: names for key, names in narrowed.items() if names}
        return SessionSpec(_REFERENCE, arguments)

    def lowered(self, name: str) -> list[Logits]:
        """What the artifact gives of the sequences as it is deployed; run once."""
        if self._lowered is None:
            self._lowered = self.run(name, self.deployed, self.sequences)
        return self._lowered

    def ask(self, name: str, spec: SessionSpec, sequences: Sequence[Sequence[int]]) -> list[Logits]:
        """``record`` of a reference, whose answers are the same whichever device is held against it: once for codes that many get."""
        codes = (self._bytes, self.quant.digest)
        if codes not in _references:
            _references.clear()
        answers = _references.setdefault(codes, {})
        # Where model and codes lie says nothing: their bytes do.
        arguments = {key: value for key, value in spec.arguments.items() if key not in ("model", "store")}
        how = replace(spec, arguments=arguments | {"codes": spec.arguments.get("store") is not None})
        asked = (canonical_json(how.to_json()), tuple(map(tuple, sequences)))
        if asked not in answers:
            answers[asked] = self.record(name, spec, sequences), self.layers.get(name, [])
        found, self.layers[name] = answers[asked]
        return found

    def record(self, name: str, spec: SessionSpec, sequences: Sequence[Sequence[int]]) -> list[Logits]:
        """Open a session, run the sequences through it, close it; logits in mapped files, float32 [tokens, vocab] each."""
        with borrowed(spec) as session:
            found = self.run(name, session, sequences)
            if name in _LAYERED:
                self.layers[name] = self.layers_of(name, session, sequences)
            return found

    def layers_of(
        self, name: str, session: WorkerSession, sequences: Sequence[Sequence[int]]
    ) -> by_layer.Layers:
        """What each layer of a reference gives of the first sequences; in mapped files."""
        found: by_layer.Layers = []
        left = _LAYERED_TOKENS
        for ids in sequences[:_LAYERED_SEQUENCES]:
            if found and len(ids) > left:
                break
            place = self.scratch / f"{name}-layers-{len(found)}"
            place.mkdir(exist_ok=True)
            found.append(by_layer.read(list(session.trace(ids[:left], str(place))), place))
            left -= len(ids)
        return found

    def compare_layers(self) -> None:
        """Keep what the difference from the original comes to after each layer, where the references told of theirs."""
        one = self.layers.get("original", [])
        other = self.layers.get("quantized") or self.layers.get("dequantized", [])
        # A model that came quantized has no other original than its codes.
        if one and len(one) == len(other) and not self.model.quantization:
            tokens = sum(len(next(iter(each.values()))) for each in one)
            grown = by_layer.error_by_layer(one, other)
            told = [{"layer": name, "error": error} for name, error in grown.items()]
            self.findings["layers"] = {"tokens": tokens, "layers": told}

    def record_peaks(
        self, name: str, spec: SessionSpec, sequences: Sequence[Sequence[int]]
    ) -> tuple[list[Logits], dict[str, float]]:
        """``record``, and the largest magnitudes of the session's float16 values on the way."""
        with borrowed(spec) as session:
            return self.run(name, session, sequences), session.peaks()

    def run(self, name: str, session: Any, sequences: Iterable[Sequence[int]]) -> list[Logits]:
        """Run sequences through an open session; logits in a mapped file, float32 [tokens, vocab] each."""
        path = self.scratch / f"{name}.f32"
        path.unlink(missing_ok=True)  # what is mapped of another one stays as it is
        wanted = list(sequences)
        shapes: list[tuple[int, ...]] = []
        with path.open("wb") as file:
            for logits in self._answers(session, wanted):
                shapes.append(logits.shape)
                np.ascontiguousarray(logits).tofile(file)
                self._tell(name, len(shapes), len(wanted))
        at = 0
        found: list[Logits] = []
        for shape in shapes:
            found.append(np.memmap(path, np.float32, "r", at, shape))
            at += shape[0] * shape[1] * 4
        return found

    def _answers(self, session: Any, sequences: Sequence[Sequence[int]]) -> Iterator[Logits]:
        """What a session gives of each sequence, in their order."""
        for ids in sequences:
            session.reset()
            yield session.prefill(ids)

    def say(self, session: WorkerSession, tasks: str) -> Said:
        """Ask a session for its tokens of the corpus, their text, and its answers to the tasks."""
        generation = replace(self.model.generation, temperature=0.0, repetition_penalty=1.0)
        said = session.say(self.strings, [], generation)
        prompts = [prompt for prompt, _ in self.tasks]
        for at in range(0, len(prompts), _AT_ONCE):
            said.answers.extend(session.say([], prompts[at : at + _AT_ONCE], generation).answers)
            self._tell(tasks, min(at + _AT_ONCE, len(prompts)), len(prompts))
        return said

    @cached_property
    def _original(self) -> tuple[list[list[int]], list[Logits], Said]:
        key = self._asked
        if key not in _originals:
            with borrowed(self.reference(quantized=False)) as session:
                sequences = self._sequences(session)
                found = sequences, self.run("original", session, sequences), self.say(session, "tasks")
                layers = self.layers_of("original", session, sequences)
            _originals.clear()
            _originals[key] = found, layers
        told, self.layers["original"] = _originals[key]
        return told

    @property
    def _asked(self) -> tuple[object, ...]:
        """All that the original's answers hang on: the model's bytes, and what it is asked."""
        text = None if self.text is None else file_sha256(self.text)
        return self._bytes, text, self.tokens, self.artifact.context

    @cached_property
    def _bytes(self) -> tuple[object, ...]:
        """The model's bytes, and how it is asked."""
        beside = [path for path in self.model.directory.iterdir() if path.is_file()]
        weighty = {tensor.file for tensor in self.model.checkpoint.values()}
        files = {
            path.name: file_sha256(path)
            for path in beside
            if path.suffix != ".safetensors" or path not in weighty
        }
        # A quantized checkpoint is run from the store of its codes.
        weights = self.quant.directory if self.model.quantization else self.quant.source_sha256
        return type(self), weights, tuple(sorted(files.items()))

    def _sequences(self, session: Session) -> list[list[int]]:
        most = min(_WINDOW, self.artifact.context, session.facts.context)
        if self.tasks and self.text is None:
            found = [session.tokenize(prompt + said)[:most] for prompt, said in self.tasks]
        else:
            ids = session.tokenize(self._text())
            found = [ids[at : at + most] for at in range(0, min(len(ids), self.tokens), most)]
        kept: list[list[int]] = []
        for ids in found:
            ids = ids[: self.tokens - sum(map(len, kept))]
            if len(ids) > 1:
                kept.append(ids)
        return kept

    def _text(self) -> str:
        own = self.model.directory / "heldout.txt"
        if self.text or own.exists():
            return (self.text or own).read_text(encoding="utf-8")
        return (files("tapeout.validate") / "data" / "evaluation.txt").read_text(encoding="utf-8")

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(stage, done, total)


_originals: dict[object, tuple[tuple[list[list[int]], list[Logits], Said], by_layer.Layers]] = {}
"""What the last model said with its own weights: its next scheme or target is held against the same."""
_references: dict[object, dict[object, tuple[list[Logits], by_layer.Layers]]] = {}
"""What the references of the last codes said: those codes on the next target are held against the same."""
