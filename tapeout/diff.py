"""Where two models first part: packages, their files, and the model that one was made from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from math import log10
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from tapeout import targets
from tapeout.errors import OutputError, TapeoutError
from tapeout.exporters import Artifact, gguf
from tapeout.files import writing
from tapeout.models import EncoderConfig, Model, load
from tapeout.pack import MANIFEST, Package
from tapeout.quantize import Scheme
from tapeout.replay import codes_of
from tapeout.targets import Target
from tapeout.validate.divergence import HALF, Divergence, added_rounding, against_graph, between
from tapeout.validate.session import Logits, SessionSpec
from tapeout.validate.worker import WorkerSession, borrowed

Progress = Callable[[str, int, int], None]

_GRAPH = "tapeout.validate.primitives:open_session"
_REFERENCE = "tapeout.validate.reference:open_session"
_MOST = 512  # tokens of a walk, which keeps every value of every layer
_TEXT = "12*3="  # no model knows it, every tokenizer does


@dataclass(frozen=True)
class Found:
    """What ``diff`` gives.

    Attributes:
        one, other: the two, as they were given; ``other`` is what ``one`` is held against.
        notes: what else a user has to know.
    """

    one: str
    other: str
    divergence: Divergence
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """One document."""
        return {"one": self.one, "other": self.other, **self.divergence.to_json(), "notes": list(self.notes)}


@dataclass(frozen=True)
class _Side:
    """One of the two: a model, or an artifact with the package that it is of, if it is of one.

    Attributes:
        narrow: a file of no package holds weights as float16, which may have been wider.
    """

    given: str
    model: Model | None = None
    artifact: Artifact | None = None
    target: Target | None = None
    package: Package | None = None
    narrow: bool = False

    @property
    def encodes(self) -> bool | None:
        """Whether it is an encoder; None: the files do not say."""
        if self.model:
            return isinstance(self.model.config, EncoderConfig)
        return None if self.package is None else self.package.encoder_output is not None

    @property
    def added(self) -> float:
        """What its format adds to its weights."""
        if self.package is None or self.artifact is None or self.target is None:
            return HALF if self.narrow else 0.0
        named: dict[str, str] = self.package.manifest["schemes"]
        schemes = {f"{name}.weight": Scheme.parse(scheme) for name, scheme in named.items()}
        return added_rounding(self.artifact, schemes, self.target.carries)

    def spec(self, scratch: Path, store: Path | None) -> SessionSpec:
        """How it is opened to be walked."""
        if self.model:
            arguments = {"model": str(self.model.directory), "store": str(store) if store else None}
            return SessionSpec(_GRAPH, arguments)
        assert self.artifact is not None
        assert self.target is not None
        scratch.mkdir()
        found = self.target.traced(self.artifact, scratch)
        if found is None:
            raise TapeoutError(
                f"target {self.target.name} does not show what its runtime computes on the way."
            )
        return found


def diff(
    one: str,
    other: str,
    prompt: str | None = None,
    *,
    calibration: Path | None = None,
    progress: Progress | None = None,
) -> Found:
    """Run two models over the same ids, and walk to the first primitive that parts.

    A model beside a package stands for the graph with the package's codes; artifacts run their own numbers, without the rounding of
    matmul inputs that their runtime adds.

    Args:
        one, other: packages, .gguf or .onnx files, or what ``models.load`` takes.
        prompt: default: the longest of a package's golden prompts.
        calibration: the text that the package's rounding looked at, when that was one of the user's own.

    Raises:
        TapeoutError: they are different models, or the prompt does not fit both.
    """
    sides = [_side(given) for given in (one, other)]
    if sides[0].model and sides[1].artifact:
        sides.reverse()
    mine, theirs = sides
    if {mine.encodes, theirs.encodes} == {True, False}:
        kinds = [f"{each.given} is {'an encoder' if each.encodes else 'a decoder'}" for each in sides]
        raise TapeoutError(f"{' and '.join(kinds)}: they have nothing in common that can be compared.")
    notes: list[str] = []
    store: Path | None = None
    if theirs.model and mine.package:
        store = codes_of(mine.package, theirs.model, calibration, progress).directory
    elif theirs.model and mine.artifact:
        notes.append(
            f"{mine.given} is of no package: it is held against the weights of {theirs.given} as they are"
        )
    elif mine.package and theirs.package:
        codes = [each.package.manifest["codes_sha256"] for each in sides if each.package]
        if codes[0] != codes[1]:
            notes.append("the two hold other codes: what is quantized differs by what it was quantized to")
    graphs = mine.artifact is not None and theirs.model is not None
    with tempfile.TemporaryDirectory(prefix="tapeout-") as place:
        scratch = Path(place)
        with (
            borrowed(mine.spec(scratch / "a", None)) as first,
            borrowed(theirs.spec(scratch / "b", store)) as second,
        ):
            ids = _ids(mine, theirs, first, second, prompt, notes)
            if progress:
                progress("diff", 0, 1)
            if graphs:
                assert theirs.model is not None
                expected = _expected(theirs.model, store, ids)
                found = against_graph(first, second, ids, scratch, expected, mine.added)
            else:
                found = between(first, second, ids, scratch, max(mine.added, theirs.added))
    return Found(mine.given, theirs.given, found, tuple(notes))


def _side(given: str) -> _Side:
    path = Path(given)
    roots = [path]
    if path.suffix in (".gguf", ".onnx"):
        roots.append(path.absolute().parent.parent)
    elif path.name == "artifact":
        roots.append(path.parent)
    for root in roots:
        if (root / MANIFEST).exists():
            package = Package.open(root)
            return _Side(given, artifact=package.artifact, target=package.target(), package=package)
    if path.suffix == ".gguf" and path.exists():
        facts = gguf.describe(path)
        context = facts["metadata"].get(f"{facts['arch']}.context_length")
        shards = sorted(each.name for each in path.parent.glob(path.name.replace("-00001-of-", "-*-of-")))
        artifact = Artifact("gguf", path.parent, tuple(shards), int(context or _MOST), 0)
        return _Side(given, artifact=artifact, target=targets.get("cpu")(), narrow="F16" in facts["tensors"])
    if path.suffix == ".onnx":
        path = path.parent
    if (path / "model.onnx").exists() and not (path / "config.json").exists():
        artifact = Artifact("onnx", path, ("model.onnx",), _onnx_context(path), 0)
        return _Side(given, artifact=artifact, target=targets.variants("cpu")["cpu --format onnx"])
    return _Side(given, model=load(given))


def _onnx_context(directory: Path) -> int:
    """The context that ``genai_config.json`` states; an encoder has none such, and its graph says what does not fit."""
    path = directory / "genai_config.json"
    return (
        int(json.loads(path.read_text(encoding="utf-8"))["model"]["context_length"])
        if path.exists()
        else _MOST
    )


def _ids(
    mine: _Side,
    theirs: _Side,
    first: WorkerSession,
    second: WorkerSession,
    prompt: str | None,
    notes: list[str],
) -> list[int]:
    """The tokens to walk over, the same for both."""
    most = min(first.facts.context, second.facts.context, _MOST)
    golden = [each.package.directory / "golden.safetensors" for each in (mine, theirs) if each.package]
    if prompt is None and golden and golden[0].exists():
        arrays = load_file(golden[0])
        prompts: list[list[int]] = [v.tolist() for k, v in arrays.items() if k.startswith("tokens.")]
        return max(prompts, key=len)[:most]
    text = _TEXT if prompt is None else prompt
    ids = first.tokenize(text)
    if second.tokenize(text) != ids:
        notes.append(f"the tokenizers part: both are given the tokens of {mine.given}")
    if not ids:
        raise TapeoutError(f"the prompt {text!r} gives no token; give one that does.")
    if len(ids) > most:
        raise TapeoutError(
            f"the prompt has {len(ids)} tokens; what fits: {most}, which is "
            f"{'what a walk keeps' if most == _MOST else 'the context'}."
        )
    return ids


def _expected(model: Model, store: Path | None, ids: list[int]) -> Logits:
    """What transformers gives: the last word on our own graph."""
    arguments = {"model": str(model.directory), "store": str(store) if store else None}
    with borrowed(SessionSpec(_REFERENCE, arguments)) as session:
        if isinstance(model.config, EncoderConfig):
            out = session.encode([ids], [[1] * len(ids)])
            return out.reshape(-1, out.shape[-1])
        return session.prefill(ids)


_WIDTH, _HEIGHT, _LEFT, _TOP = 960, 320, 60, 40
_DECADES = (-8, 1)  # of the picture: float32's own rounding to beyond what a value is large


def check_picture(path: Path) -> None:
    """OutputError for what ``picture`` would not draw to."""
    if path.suffix != ".svg":
        raise OutputError(f"{path} cannot be drawn: --picture writes .svg.")


def picture(found: Found, path: Path) -> None:
    """Draw how the difference grows, value by value, on a logarithmic scale; OutputError for anything but .svg."""
    check_picture(path)
    values = found.divergence.values
    low, high = _DECADES

    def x(at: int) -> float:
        return _LEFT + (at + 0.5) * _WIDTH / len(values)

    def y(size: float) -> float:
        decade = min(max(log10(size) if size > 0 else low, low), high)
        return _TOP + _HEIGHT * (high - decade) / (high - low)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH + 80}" height="{_HEIGHT + 90}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="13">{escape(found.one)} against {escape(found.other)}: difference / size of each value</text>',
    ]
    for decade in range(low, high + 1):
        at = y(10.0**decade)
        lines.append(f'<path d="M{_LEFT} {at:.1f}h{_WIDTH}" stroke="#ddd"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{decade}</text>')
    for at, each in enumerate(values):
        if at == 0 or each.layer != values[at - 1].layer:
            left = x(at) - 0.5 * _WIDTH / len(values)
            lines.append(f'<path d="M{left:.1f} {_TOP}v{_HEIGHT}" stroke="#eee"/>')
            lines.append(
                f'<text transform="translate({left + 9:.1f} {_TOP + _HEIGHT + 6}) rotate(45)">{escape(each.layer)}</text>'
            )
    for points, colour in (
        ([(x(at), y(each.limit)) for at, each in enumerate(values)], "#c80"),
        ([(x(at), y(each.grown)) for at, each in enumerate(values)], "#06c"),
    ):
        lines.append(f'<polyline fill="none" stroke="{colour}" points="{_points(points)}"/>')
    for at, each in enumerate(values):
        size = each.grown if each.own is None else each.own
        colour = "#d00" if each.parts else "#06c"
        told = f"{escape(each.name)} ({escape(each.op)}): {size:.2g}"
        lines.append(
            f'<circle cx="{x(at):.1f}" cy="{y(size):.1f}" r="3" fill="{colour}"><title>{told}</title></circle>'
        )
        if each is found.divergence.first:
            lines.append(f'<text x="{x(at) + 6:.1f}" y="{_TOP - 6}" fill="#d00">{escape(each.name)}</text>')
            lines.append(f'<path d="M{x(at):.1f} {_TOP}v{_HEIGHT}" stroke="#d00" stroke-dasharray="3"/>')
    lines.append(
        f'<text x="{_LEFT}" y="{_TOP + _HEIGHT + 45}">blue line: as they run · dots: each primitive on the same inputs · orange: what float '
        "types explain</text>"
    )
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*lines, "</svg>", ""]), encoding="utf-8")


def _points(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
