"""The format ``iree`` of target ``rocm``: a module compiled ahead of time for an AMD GPU, codes in a parameter archive.

Where no such GPU is, the same module's text is compiled for the CPU, and that twin is run over the same archive.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
import psutil

from tapeout.errors import PackageError, RuntimeCrash, TapeoutError, nearest
from tapeout.exporters import Artifact, Carry, iree
from tapeout.files import writing
from tapeout.models import DecoderConfig
from tapeout.models.decoder import ConfigReader
from tapeout.models.families import family
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Memory, Progress, graph_width, iree_compiler
from tapeout.targets.iree_compiler import CHIPS, HOST
from tapeout.validate import primitives
from tapeout.validate.given import check_ids, encoded
from tapeout.validate.session import Arithmetic, Facts, KvCache, Logits, Lowering, SessionSpec

if TYPE_CHECKING:
    from tapeout.targets.rocm import Rocm

_OPEN = "tapeout.targets.iree:open_session"
_TRACED = "tapeout.targets.iree:open_traced"

_CHECKED = "checked by its twin for the CPU, which IREE's compiler makes of the same model.mlir; not run on AMD hardware"
_DERIVATION = (
    "The same operations in float32 on the same codes and floats; IREE sums in another order and approximates exponentials within a few "
    "units in the last place: sums of K products are off by about sqrt(K) 2^-24 of their size, below 1e-5 for K = 16384; ten times "
    "that for the layers they pass through."
)
_RUNTIME_DERIVATION = (
    "As deployed: float32 activations, keys and values in float32; inputs of matmuls are not rounded."
)

_CARD = """```
pip install iree-base-runtime numpy
python - <<END
import iree.runtime as rt
import numpy as np

config = rt.Config("hip")  # an AMD GPU ({cards}) with its driver
index = rt.ParameterIndex()
index.load("artifact/{archive}")
model = rt.load_vm_modules(
    rt.create_io_parameters_module(config.vm_instance, index.create_provider("model")),
    rt.create_hal_module(config.vm_instance, config.device),
    rt.VmModule.mmap(config.vm_instance, "artifact/{module}"),
    config=config,
)[-1]
ids = np.zeros({chunk}, np.int32)  # a prompt of up to {chunk} tokens, padded; longer ones in several calls
prompt = [1, 2, 3]  # artifact/tokenizer.json gives them
ids[: len(prompt)] = prompt
token = int(np.argmax(model.append(ids, 0, len(prompt)).to_host()))
for place in range(len(prompt), len(prompt) + 16):
    print(token)
    token = int(np.argmax(model.decode(np.array([token], np.int32), place, 1).to_host()))
END
```

`append` gives the scores of the last token, `prefill` of all {chunk}, `decode` of one; each takes token ids, the place of the first one, and how
many are no padding. The caches are in the module, laid out for {context} tokens; a new sequence begins at place 0. For another chip:
`iree-compile artifact/{mlir} -o model.vmfb {flags}`.

This package was {checked}."""


def check_chip(arch: str) -> None:
    """TapeoutError for a chip that nothing is compiled for, with the nearest."""
    if arch not in CHIPS:
        raise TapeoutError(f"'{arch}' is not a chip that modules are compiled for{nearest(arch, CHIPS)}.")


def module_of(arch: str) -> str:
    """The compiled module's file."""
    return f"model_{arch}.vmfb"


class Iree:
    """See ``roads.Road``."""

    default_scheme: ClassVar[str] = "int4-g32"
    arithmetic: ClassVar[Arithmetic] = "float32"
    cache: ClassVar[KvCache] = "kv-f32"
    needs: ClassVar[str] = "iree-base-runtime 3.13 and ROCm's HIP library"
    runtimes: ClassVar[tuple[str, ...]] = ("iree-base-runtime",)
    flags: ClassVar[tuple[str, ...]] = ("arch", "context", "prefill_chunk")
    checks: ClassVar[tuple[str, ...]] = ("iree.py",)

    @staticmethod
    def carries(scheme: Scheme) -> Carry:
        """As the module reads them."""
        return iree.carries(scheme)

    @staticmethod
    def memory(device: Rocm, config: DecoderConfig, context: int) -> Memory:
        """The caches, whole from the start; of work the scores of a chunk against all of them, twice, and a layer's float32 weights."""
        chunk = min(device.prefill_chunk, context)
        rows = context + chunk
        wide = config.hidden_size * max(config.intermediate_size, config.num_heads * config.head_dim)
        if config.moe:  # of a chunk all experts are computed, for every token
            wide = max(
                wide, config.moe.experts * config.moe.intermediate_size * (config.hidden_size + 3 * chunk)
            )
        work = chunk * (graph_width(config) + 2 * config.num_heads * rows + config.vocab_size) + 3 * wide
        return Memory(4 * config.cache_width * rows * config.num_layers, 4 * work)

    @staticmethod
    def missing() -> str | None:
        """Whether compiler and runtime are here."""
        if not _installed("iree.runtime"):
            return "iree-base-runtime is not installed: pip install 'tapeout[rocm]'."
        return iree_compiler.missing()

    @staticmethod
    def export(device: Rocm, quant: Quantized, out: Path, progress: Progress | None) -> Artifact:
        """Write module and archive, and compile the module for the chip; without the compiler its text alone."""
        options = iree.Options(device.context, device.prefill_chunk)
        artifact = iree.write(quant, out, options, progress=progress)
        if why := iree_compiler.missing():
            return replace(
                artifact, notes=(*artifact.notes, f"{iree.MLIR} was not compiled for {device.arch}: {why}")
            )
        made = iree_compiler.compiled(out / iree.MLIR, device.arch)
        with writing(out):
            shutil.copyfile(made, out / module_of(device.arch))
        return replace(
            artifact, files=(*artifact.files, module_of(device.arch)), notes=(*artifact.notes, _CHECKED)
        )

    @staticmethod
    def session(device: Rocm, artifact: Artifact) -> SessionSpec:
        """The compiled module on an AMD GPU, and elsewhere its twin."""
        return SessionSpec(_OPEN, {"directory": str(artifact.directory), "module": module_of(device.arch)})

    @staticmethod
    def read_codes(
        artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """Through IREE's own reader of archives; and the compiled module is what its compiler makes of the text."""
        yield from iree.read_codes(artifact, quant)
        for arch in CHIPS:
            path = artifact.directory / module_of(arch)
            if not path.exists() or iree_compiler.missing():
                continue
            made = iree_compiler.compiled(artifact.directory / iree.MLIR, arch)
            if made.read_bytes() != path.read_bytes():
                raise PackageError(
                    f"{path} is not what {iree_compiler.version_of()} makes of {iree.MLIR}: one of them was changed."
                )

    @staticmethod
    def lowerings(device: Rocm, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        """Nothing is rounded at run time: both look at the deployed session."""
        deployed = Iree.session(device, artifact)
        return [
            Lowering("weights", deployed, "max", _DERIVATION, 1e-4),
            Lowering("runtime", deployed, "kl", _RUNTIME_DERIVATION),
        ]

    @staticmethod
    def traced(device: Rocm, artifact: Artifact, scratch: Path) -> SessionSpec:
        """What the archive means, in our own graph."""
        return SessionSpec(_TRACED, {"directory": str(artifact.directory)})

    @staticmethod
    def card(device: Rocm, artifact: Artifact) -> str:
        """How to run it with IREE's runtime."""
        facts = iree.facts_of(artifact.directory)
        return _CARD.format(
            cards=CHIPS[device.arch],
            archive=iree.ARCHIVE,
            module=module_of(device.arch),
            mlir=iree.MLIR,
            chunk=facts["chunk"],
            context=facts["context"],
            flags=" ".join(iree_compiler.flags("CHIP")),
            checked=_CHECKED,
        )


class IreeDecoder:
    """A Session on IREE's runtime; see ``open_session``."""

    facts: Facts

    def __init__(self, facts: Facts, module: Any, tokenizer: Any, said: Mapping[str, int]) -> None:
        self.facts = facts
        self._module, self._tokenizer = module, tokenizer
        self._chunk, self._vocab_size = said["chunk"], said["vocab_size"]
        self._length = 0
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append tokens to the sequence, chunk by chunk; return float32 [tokens, vocab], the logits after each."""
        parts = [self._step("prefill", chunk)[: len(chunk)] for chunk in self._chunks(ids)]
        return np.concatenate(parts) if parts else np.empty((0, self._vocab_size), np.float32)

    def append(self, ids: Sequence[int]) -> Logits:
        """``prefill`` for those who want the last token's logits only, float32 [1, vocab]."""
        if not ids:
            raise TapeoutError("no token is appended, and so there is no last one; what fits: one or more.")
        for chunk in self._chunks(ids):
            last = self._step("append", chunk)
        return last

    def decode(self, token: int) -> Logits:
        """Append one token by the function for one; return float32 [vocab]."""
        next(self._chunks([token]))
        return cast(Logits, self._step("decode", [token])[0])

    def reset(self) -> None:
        """Begin a new sequence: what is in the caches is not looked at."""
        self._length = 0

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``; special tokens in it are recognised, none are added."""
        encoded(text)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens kept."""
        check_ids(ids, self._vocab_size)
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def close(self) -> None:
        """Free the model; may be called twice."""
        self._module = None

    def _chunks(self, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        check_ids(ids, self._vocab_size)
        length = self._length + len(ids)
        if length > self.facts.context:
            raise TapeoutError(f"{length} tokens do not fit the context of {self.facts.context}.")
        for at in range(0, len(ids), self._chunk):
            yield ids[at : at + self._chunk]

    def _step(self, function: str, ids: Sequence[int]) -> Logits:
        given = np.zeros(1 if function == "decode" else self._chunk, np.int32)
        given[: len(ids)] = ids
        try:
            out = getattr(self._module, function)(given, self._length, len(ids))
            logits = np.array(out.to_host())  # a copy: what is mapped goes with ``out``
        except Exception as error:  # the binding's own
            raise RuntimeCrash(
                f"IREE cannot run {function} of {len(ids)} tokens at position {self._length}: {error}"
            ) from error
        self._length += len(ids)
        return cast(Logits, logits)


def open_session(directory: str, module: str) -> IreeDecoder:
    """Load a module over its archive; called in a worker process.

    Args:
        directory: with the archive, the module's text and ``tokenizer.json``.
        module: the file that was compiled for a GPU, which is run where HIP finds one; elsewhere the text's twin for this CPU is.

    Raises:
        MissingToolchain: runtime or compiler is not installed. PackageError: a file is absent or damaged. RuntimeCrash: IREE refuses them.
    """
    from tokenizers import Tokenizer

    begin, before = perf_counter(), psutil.Process().memory_info().rss
    place = Path(directory)
    said = iree.facts_of(place)
    words = place / "tokenizer.json"
    if not words.is_file():
        raise PackageError(f"{words} is absent; there is nothing to tokenize with.")
    library = iree.runtime()
    gpu = _gpu(library)
    code = place / module if gpu else iree_compiler.compiled(place / iree.MLIR, HOST)
    if not code.is_file():
        raise PackageError(f"{code} is absent; there is nothing to load.")
    index = library.ParameterIndex()
    try:
        index.load(str(place / iree.ARCHIVE))
        config = library.Config(device=gpu) if gpu else library.Config("local-task")
        loaded = library.load_vm_modules(
            library.create_io_parameters_module(config.vm_instance, index.create_provider(iree.SCOPE)),
            library.create_hal_module(config.vm_instance, config.device),
            library.VmModule.mmap(config.vm_instance, str(code)),
            config=config,
        )[-1]
    except Exception as error:  # the binding's own
        raise RuntimeCrash(f"IREE refuses {code} over {place / iree.ARCHIVE}: {error}") from error
    facts = Facts(
        f"IREE {version('iree-base-runtime')}",
        "hip" if gpu else "cpu, the module's twin; not run on AMD hardware",
        perf_counter() - begin,
        max(0, psutil.Process().memory_info().rss - before),
        said["context"],
        emulated=not gpu,
    )
    return IreeDecoder(facts, loaded, Tokenizer.from_file(str(words)), said)


def _gpu(library: Any) -> Any:
    """The first GPU that HIP finds; None: there is none, or no HIP."""
    try:
        driver = library.get_driver("hip")
        return driver.create_default_device() if driver.query_available_devices() else None
    except Exception:  # the binding's own, where the library is absent
        return None


def open_traced(directory: str) -> primitives.Primitives:
    """What the archive means in our graph, each primitive's value in sight; called in a worker process."""
    place = Path(directory)
    raw = json.loads((place / iree.CONFIG).read_text(encoding="utf-8"))
    config = family(raw["model_type"]).config(ConfigReader(raw))
    weights = dict(iree.read_weights(place))
    return primitives.open_weights(config, lambda name: weights[name], place)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
