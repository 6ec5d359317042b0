"""Apple Silicon: Macs, iPhones and iPads, through a Core ML package."""

# Annotations are values here: the fields are the target's flags.
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from tapeout.exporters import Artifact, Carry, Rounded, coreml
from tapeout.models import DecoderConfig
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Memory, Progress, apple_chips, check_counts, graph_width
from tapeout.targets.coreml import native
from tapeout.validate.session import Arithmetic, KvCache, Lowering, SessionSpec

_OPEN = "tapeout.targets.coreml:open_session"
_TRACED = "tapeout.targets.coreml:open_traced"

_EMULATED = (
    "checked by the interpreter; not run on Apple hardware (check.py on a Mac runs it there, and "
    "tapeout validate --device-report puts what it found beside the gates)"
)
_CODES_DERIVATION = (
    "The saved program in float64, caches too, against the same floats rounded to float16 where the file has them so: what is left is transformers' own float32, whose sums of K products are off by about "
    "sqrt(K) 2^-24 of their size, below 1e-5 for K = 16384; ten times that for the layers they pass through."
)
_RUNTIME_DERIVATION = (
    "The saved program with every float16 value rounded where it is made: a matmul's input by 2^-12 of itself, an eighth of bfloat16's, "
    "which the floor of 5e-5 nats is made for."
)


_SWIFT_UNITS = {
    "all": "all",
    "cpu-and-gpu": "cpuAndGPU",
    "cpu-and-ne": "cpuAndNeuralEngine",
    "cpu-only": "cpuOnly",
}
_CARD = """In an app, add `artifact/{package}` to the Xcode project, or compile it beforehand:

```
xcrun coremlcompiler compile artifact/{package} .
```

{how}"""
_DECODER_CARD = """`prefill` takes up to {chunk} tokens of a prompt at once, `decode` one; both go on with the same state, whose caches are laid out for
{context} tokens. swift-transformers' `AutoTokenizer.from(modelFolder:)` reads the tokenizer's files in `artifact/`. Not compiled here:

```swift
import CoreML

/// One sequence on `model.mlmodelc`.
final class LanguageModel {{
    private let prefill: MLModel, decode: MLModel
    private let state: MLState
    private var past = 0

    init(contentsOf url: URL) throws {{
        func load(_ function: String) throws -> MLModel {{
            let configuration = MLModelConfiguration()
            configuration.computeUnits = .{units}
            configuration.functionName = function
            return try MLModel(contentsOf: url, configuration: configuration)
        }}
        prefill = try load("prefill")
        decode = try load("decode")
        state = prefill.makeState()
    }}

    /// Appends at most {chunk} tokens; gives the scores of the token that follows the last of them.
    func append(_ tokens: [Int32]) throws -> MLShapedArraySlice<Float16> {{
        let count = tokens.count
        let ids = MLShapedArray(scalars: tokens, shape: [1, count])
        let mask = MLShapedArray<Float16>(repeating: 0, shape: [1, 1, count, past + count])
        let input = try MLDictionaryFeatureProvider(dictionary: [
            "inputIds": MLFeatureValue(shapedArray: ids),
            "fullAttentionMask": MLFeatureValue(shapedArray: mask),
        ])
        let model = count == 1 ? decode : prefill
        let output = try model.prediction(from: input, using: state)
        past += count
        let logits = MLShapedArray<Float16>(output.featureValue(for: "logits")!.multiArrayValue!)
        return logits[0][count - 1]
    }}
}}
```"""
_EXPECTED = """

### What to expect

An estimate, measured on no Mac: a token reads {size} of weights, and tokens a second are a fraction of the memory bandwidth that Apple
publishes over that. The lower number is the fraction that Apple reached with Core ML (Llama 3.1 8B, int4, 33 tokens/s on an M1 Max), the upper
one what well-tuned kernels for these GPUs reach; contexts are short. `check.py` measures it.

{table}"""
_CUT_CARD = """The model is cut into {parts} packages, `model_1_of_{parts}.mlpackage` and so on, which are called in turn: what one gives as `nextHiddenStates` the
next takes as `hiddenStates`, and each has a state of its own for its layers' caches, laid out for {context} tokens. `prefill` takes up to {chunk} tokens of a prompt
at once, `decode` one. Not compiled here:

```swift
import CoreML

/// One sequence on `model_1_of_{parts}.mlmodelc` and the others, in their order.
final class LanguageModel {{
    private var parts: [(prefill: MLModel, decode: MLModel, state: MLState)] = []
    private var past = 0

    init(contentsOf urls: [URL]) throws {{
        for url in urls {{
            func load(_ function: String) throws -> MLModel {{
                let configuration = MLModelConfiguration()
                configuration.computeUnits = .{units}
                configuration.functionName = function
                return try MLModel(contentsOf: url, configuration: configuration)
            }}
            let prefill = try load("prefill")
            parts.append((prefill, try load("decode"), prefill.makeState()))
        }}
    }}

    /// Appends at most {chunk} tokens; gives the scores of the token that follows the last of them.
    func append(_ tokens: [Int32]) throws -> MLShapedArraySlice<Float16> {{
        let count = tokens.count
        let mask = MLShapedArray<Float16>(repeating: 0, shape: [1, 1, count, past + count])
        var (name, value) = ("inputIds", MLFeatureValue(shapedArray: MLShapedArray(scalars: tokens, shape: [1, count])))
        for part in parts {{
            let input = try MLDictionaryFeatureProvider(dictionary: [
                name: value, "fullAttentionMask": MLFeatureValue(shapedArray: mask),
            ])
            let model = count == 1 ? part.decode : part.prefill
            let output = try model.prediction(from: input, using: part.state)
            value = output.featureValue(for: "nextHiddenStates") ?? output.featureValue(for: "logits")!
            name = "hiddenStates"
        }}
        past += count
        return MLShapedArray<Float16>(value.multiArrayValue!)[0][count - 1]
    }}
}}
```"""
_ENCODER_CARD = """`main` takes `inputIds` and `attentionMask` [batch, tokens], int32, up to {context} tokens, and gives `{output}`, float32. Not compiled here:

```swift
import CoreML

let configuration = MLModelConfiguration()
configuration.computeUnits = .{units}
let model = try MLModel(contentsOf: url, configuration: configuration)  // of model.mlmodelc
let shape = [1, tokens.count]
let input = try MLDictionaryFeatureProvider(dictionary: [
    "inputIds": MLFeatureValue(shapedArray: MLShapedArray(scalars: tokens, shape: shape)),
    "attentionMask": MLFeatureValue(shapedArray: MLShapedArray<Int32>(repeating: 1, shape: shape)),
])
let output = try model.prediction(from: input).featureValue(for: "{output}")!.multiArrayValue!
```"""


@dataclass(frozen=True)
class Apple:
    """Macs, iPhones and iPads with Core ML.

    Attributes:
        sequence_length: Most tokens of a sequence, for which the caches are laid out. Default: the model's own context.
        batch_size: Sequences of a call.
        prefill_chunk: Most tokens of a prompt that one call of prefill takes.
        compute_units: What Core ML may use. Low-bit weights are for the GPU: the Neural Engine mishandles them.
        chunks: Packages that the layers are cut into, as many in each, called in turn: for devices that load no file so large.
        opset: Of the program: ios18 (iOS 18, macOS 15), or ios26, which holds more schemes. Default: the older that holds the model's.
    """

    sequence_length: int | None = None
    batch_size: int = 1
    prefill_chunk: int = 256
    compute_units: Literal["all", "cpu-and-gpu", "cpu-and-ne", "cpu-only"] = "cpu-and-gpu"
    chunks: int = 1
    opset: Literal["ios18", "ios26"] | None = None

    name: ClassVar[str] = "apple"
    summary: ClassVar[str] = "Macs, iPhones and iPads, through a stateful Core ML package."
    default_scheme: ClassVar[str] = "int4-g32"
    arithmetic: ClassVar[Arithmetic] = "float32"
    cache: ClassVar[KvCache] = "kv-f16"
    checks: ClassVar[tuple[str, ...]] = ("coreml.py",)
    runtimes: ClassVar[tuple[str, ...]] = ("coremltools",)

    def __post_init__(self) -> None:
        """TapeoutError for a number that is none."""
        check_counts(self, "sequence_length", "batch_size", "prefill_chunk", "chunks")

    @property
    def needs(self) -> str:
        """The system that knows the program's opset."""
        return (
            "iOS 26 or macOS 26"
            if self.opset == "ios26"
            else "iOS 18 or macOS 15; for lookups (nf4, fp8 …) iOS 26 or macOS 26"
        )

    def carries(self, scheme: Scheme) -> Carry:
        """As the opset's containers carry it."""
        return coreml.carries(scheme, self.opset)

    def kv_caches(self, head_dim: int | None = None) -> tuple[KvCache, ...]:
        """States are float16."""
        return ("kv-f16",)

    def memory(self, config: DecoderConfig, context: int) -> Memory:
        """The caches, whole from the start; of work the float32 scores of a chunk against all tokens, twice, and a layer's values."""
        chunk = min(self.prefill_chunk, context)
        scores = 2 * config.num_heads * context
        work = 4 * self.batch_size * chunk * (graph_width(config) + scores + config.vocab_size)
        return Memory(coreml.cache_bytes(config, context, self.batch_size), work)

    def missing(self) -> str | None:
        """Whether the format's library is here."""
        if importlib.util.find_spec("coremltools"):
            return None
        return "coremltools is not installed: pip install 'tapeout[apple]', or tapeout env create apple."

    def export(self, quant: Quantized, out: Path, progress: Progress | None = None) -> Artifact:
        """Write ``model.mlpackage`` and the tokenizer's files."""
        options = coreml.Options(
            self.sequence_length, self.batch_size, self.prefill_chunk, self.opset, chunks=self.chunks
        )
        artifact = coreml.write(quant, out, options, progress=progress)
        return replace(artifact, notes=(*artifact.notes, _EMULATED))

    def session(self, artifact: Artifact) -> SessionSpec:
        """Core ML on a Mac, and elsewhere the interpreter in float16."""
        return self._open(artifact, units=self.compute_units if native() else None)

    def read_codes(
        self, artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """Through coremltools' protobuf and its reader of blob files."""
        return coreml.read_codes(artifact, quant)

    def lowerings(self, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        """What the saved files mean, in float64; and what a device computes of them."""
        exact = self._open(artifact, precision="float64")
        halves = tuple(
            name
            for name, scheme in quant.schemes.items()
            if artifact.containers[name] == "F16"
            or (isinstance(self.carries(scheme), Rounded) and scheme.kind != "none")
        )
        return [
            Lowering("weights", exact, "max", _CODES_DERIVATION, 1e-4, halves, peaks=True),
            Lowering("runtime", self.session(artifact), "kl", _RUNTIME_DERIVATION),
        ]

    def traced(self, artifact: Artifact, scratch: Path) -> SessionSpec:
        """The interpreter in float64, every named value in sight."""
        return SessionSpec(_TRACED, {"directory": str(artifact.directory)})

    def card(self, artifact: Artifact) -> str:
        """How to compile it, check it on a Mac, and run it in an app."""
        packages = coreml.packages_in(artifact.directory)
        facts = coreml.describe(packages[0])
        said = {"units": _SWIFT_UNITS[self.compute_units], "context": artifact.context}
        if "main" in facts["functions"]:
            how = _ENCODER_CARD.format(output=facts["outputs"]["main"][0], **said)
        else:
            said |= {"chunk": facts["metadata"]["co.tapeout.chunk"], "parts": len(packages)}
            how = (_DECODER_CARD if len(packages) == 1 else _CUT_CARD).format(**said)
            how += _expected(artifact.bytes_per_token)
        return _CARD.format(how=how, package=packages[0].name)

    def _open(self, artifact: Artifact, **settings: str | None) -> SessionSpec:
        return SessionSpec(_OPEN, {"directory": str(artifact.directory)} | settings)


def _expected(bytes_per_token: int) -> str:
    """The card's estimate of tokens a second; nothing for a model that is too small for one."""
    table = apple_chips.table(bytes_per_token)
    return table and _EXPECTED.format(size=f"{bytes_per_token / 1e9:.2f} GB", table=table)
