"""Rounding with calibration data: layer by layer, each one's inputs computed with the rounded layers before it.

One layer's weights and one batch of activations are in memory at a time; what flows between layers lies in mapped files in
the store's ``.calibration``, and a run that was killed goes on at the layer where it stopped. Linear layers that read the same
inputs are rounded together, in the order in which the layer computes them, so that each sees what its rounded predecessors
give ("true sequential" in GPTQ's code).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError, SchemeError
from tapeout.files import canonical_json, write_whole
from tapeout.models import Model, graph, trace
from tapeout.models.checkpoint import Checkpoint
from tapeout.models.decoder import joined
from tapeout.models.torch_ops import TorchOps, one_core_each
from tapeout.models.trace import Step
from tapeout.quantize import awq, gptq, lattice, rtn, store
from tapeout.quantize.awq import Inputs
from tapeout.quantize.lattice import Floats, ScaleOverflow
from tapeout.quantize.scheme import SCHEMES, Scheme
from tapeout.quantize.store import Findings

if TYPE_CHECKING:
    import torch

_DONE = "done.json"
_FOLDING = ("awq", "smoothquant")
_BATCH = 8  # sequences whose activations are in memory together
_TILE = 256  # rows of a Hessian that one task adds to
_SAMPLE = 512  # inputs that AWQ measures its error on
_FEW = 1 / 8  # of an even share of the tokens: an expert that sees fewer is rounded without data

_FAR_EXPERTS = 32  # that are on their way to other processes, and back, at once

Progress = Callable[[str, int, int], None]
Each = Callable[[int], "torch.Tensor"]
"""Of a sequence by its number, float32 [rows, in]."""


@dataclass
class _Layer:
    """A layer while it is rounded.

    Attributes:
        at: prefix of its tensors' names. x: what it is given, float32 [sequences, length, hidden].
        stages: values that weights multiply, with the weights, in the order in which the layer computes them; a call of
            ``experts`` stands for itself.
        kept: values that are computed once and lie in mapped files; those in ``filled`` are there for every sequence.
        device: of torch: where its weights lie and values are computed.
    """

    at: str
    x: npt.NDArray[np.float32]
    input: Step
    steps: list[Step]
    w: dict[str, torch.Tensor]
    kept: dict[Step, npt.NDArray[np.float32]]
    device: str
    filled: set[Step] = field(default_factory=set)

    @property
    def stages(self) -> dict[Step, list[str]]:
        found: dict[Step, list[str]] = {}
        for step in self.steps:
            if step.op == "experts":
                found[step] = []
            elif reads := step.reads():
                found.setdefault(reads[0], []).extend(reads[1])
        return found

    def value(self, step: Step, i: int, *, keep: bool = True) -> Any:
        """A value of sequence ``i``, with the weights as they are now."""

        def recall(each: Step) -> Any:
            if each is self.input:
                return _tensor(self.x[i], self.device)
            return _tensor(self.kept[each][i], self.device) if each in self.filled else None

        def done(each: Step, value: Any) -> None:
            if keep and each in self.kept:
                self.kept[each][i] = value.cpu().numpy()

        return trace.compute(step, TorchOps(self.w.__getitem__), recall, done)


@dataclass(frozen=True)
class Expert:
    """An expert as it is rounded, here or in another process.

    Attributes:
        names: of its tensors: gate, up, down. act: what is applied to the gate.
        rows: of each sequence the tokens that are routed to it, float32 [tokens, hidden]. shares: of what it gives, float32 [tokens].
        tokens: their places in the sequence.
        few: whether these are too few to go by.
        every: all that might be routed to it, float32 [sequences, length, hidden], where their range is wanted and these are too few.
    """

    names: tuple[str, ...]
    act: str
    rows: list[Floats]
    shares: list[Floats]
    tokens: list[npt.NDArray[np.int64]]
    few: bool
    every: Floats | None

    @property
    def count(self) -> int:
        """How many tokens are routed to it."""
        return sum(map(len, self.tokens))


@dataclass
class Calibrated:
    """One run of calibrated rounding into a store.

    Attributes:
        tokens: int32 [sequences, length], see ``Calibration.tokens``.
        rounding: ``gptq``, ``awq``, ``smoothquant``, or one that takes importance only (``rtn``, ``hqq``).
        simple: how a weight is rounded when no Hessian is used.
        device: of torch: where the layers run and the Hessians are summed up. Codes are always chosen on the CPU.
        far: chooses the codes of tensors that read the same inputs in other processes, all at once, and rounds experts there; None: here,
            one after the other.
        checkpoints: keeps each layer where other machines find it.
    """

    model: Model
    schemes: Mapping[str, Scheme]
    rounding: str
    tokens: npt.NDArray[np.int32]
    directory: Path
    pool: Executor
    simple: store.Round
    progress: Progress | None = None
    device: str = "cpu"
    far: Executor | None = None
    checkpoints: store.Checkpoints | None = None
    found: Findings = field(default_factory=Findings)

    def run(self) -> Findings:
        """Round every tensor; what the store holds already is kept.

        Raises:
            ModelError: an activation is NaN or infinite (the first module is named), or a weight.
        """
        config = self.model.decoder
        place = self.directory / ".calibration"
        place.mkdir(parents=True, exist_ok=True)
        (self.directory / "tensors").mkdir(exist_ok=True)
        steps = config.num_layers + 1
        for layer in range(self._resume(place), config.num_layers):
            self._layer(layer, place)
            self._tell(layer + 1, steps)
        self._outside(place / f"x{config.num_layers}.f32")
        self._tell(steps, steps)
        (place / _DONE).unlink()  # first: what it promises goes with the rest
        shutil.rmtree(place)
        return self.found

    def _layer(self, layer: int, place: Path) -> None:
        this = self._begin(layer, place)
        if self.rounding in _FOLDING:
            self._fold(this)
        for source, names in this.stages.items():
            if source.op == "experts":
                self._experts(this, source)
                continue
            weights = {name: this.w[name].cpu().numpy() for name in names}
            for name, rounded in self._round(names, _of(this, source), weights).items():
                this.w[name] = self._tensor(rounded)
            this.filled |= this.kept.keys() & _made_from(source)
        after = this.steps[-1]
        self._each(lambda i: this.value(after, i), this.at.removesuffix("."))
        for name in self.model.specs:
            if name.startswith(this.at) and name not in self.found.tensors:
                store.check_finite(self.model.checkpoint[name], self.pool)
        cast("np.memmap[Any, Any]", this.kept[after]).flush()
        _path(place, after).rename(place / f"x{layer + 1}.f32")
        self._commit(place, layer + 1)
        (place / f"x{layer}.f32").unlink()
        if self.checkpoints:
            tensors = [store.tensor_path(self.directory, name) for name in self.found.tensors]
            self.checkpoints.keep_layers(
                self.directory, layer + 1, [*tensors, place / f"x{layer + 1}.f32", place / _DONE]
            )

    def _begin(self, layer: int, place: Path) -> _Layer:
        """A layer's graph, the weights that every token meets, and room for the values that are kept."""
        config, at = self.model.decoder, f"model.layers.{layer}."
        x, steps = trace.layer(config, layer)
        routed = config.routed(layer)
        of_experts = {n for e in range(routed.experts) for n in routed.weights(layer, e)} if routed else set()
        w = {
            name: self._tensor(self.model.checkpoint[name].float32())
            for name in self.model.specs
            if name.startswith(at) and name not in of_experts
        }
        # The attention's output and the sums are dear; what experts read is read once for each of them.
        dear = {"attention", "latent_attention", "experts", "add"}
        kept = [s for s in steps if s.op in dear] + [s.args[0] for s in steps if s.op == "experts"]
        widths = {s: config.num_heads * config.value_dim for s in kept if s.name.endswith(".context")}
        maps = {s: self._map(_path(place, s), "w+", widths.get(s)) for s in kept}
        return _Layer(at, self._map(place / f"x{layer}.f32", "r"), x, steps, w, dict(maps), self.device)

    def _experts(self, this: _Layer, step: Step) -> None:
        """Round the experts, each on the tokens that are routed to it, and add up what they give, one after the other."""
        normed, routing, layer, act, moe = step.args
        self._each(lambda i: this.value(normed, i), f"{this.at}{moe.router}")
        this.filled |= this.kept.keys() & ({normed} | _made_from(normed))
        routes = list(self.pool.map(lambda i: this.value(routing, i, keep=False), range(len(self.tokens))))
        given, out = this.kept[normed], this.kept[step]

        def expert(number: int) -> Expert:
            hits = [(chosen == number).nonzero(as_tuple=True) for chosen, _ in routes]
            count = sum(len(tokens) for tokens, _ in hits)
            enough = count >= max(1.0, _FEW * self.tokens.size * moe.top_k / moe.experts)
            names = moe.weights(layer, number)
            ranged = any(self.schemes[name].activations for name in names)
            return Expert(
                tuple(names),
                act,
                [given[i][tokens.cpu().numpy()] for i, (tokens, _) in enumerate(hits)],
                [share[hit].cpu().numpy() for hit, (_, share) in zip(hits, routes, strict=True)],
                [tokens.cpu().numpy() for tokens, _ in hits],
                not enough,
                given if ranged and not enough else None,
            )

        few: list[str] = []
        for number, (each, gives) in enumerate(self._each_expert(expert, moe.experts)):
            if each.few:
                few.append(f"{number} ({each.count})")
            for i, values in enumerate(gives):
                out[i][each.tokens[i]] += values  # each token once
        this.filled.add(step)
        if few:
            self.found.notes.append(
                f"{this.at}{moe.expert.format('*')}: rounded without data, since fewer than {_FEW:.1%} of an even share of the "
                f"calibration tokens reach them: {', '.join(few)} (tokens)"
            )

    def _each_expert(
        self, expert: Callable[[int], Expert], count: int
    ) -> Iterator[tuple[Expert, list[Floats]]]:
        """Round every expert, and give what it gives, in their order; far away several at once."""
        if self.far is None or self.device != "cpu":
            for number in range(count):
                each = expert(number)
                yield each, self._expert(each)
            return
        far = self.far

        def elsewhere(number: int) -> tuple[Expert, _Rounded]:
            each = expert(number)
            sources = {name: self.model.checkpoint[name] for name in each.names}
            model = replace(self.model, specs={}, checkpoint=Checkpoint(self.model.directory, sources))
            schemes = {name: self.schemes[name] for name in each.names}
            what = (model, schemes, self.rounding, self.tokens, self.simple, each)
            return each, far.submit(_expert_elsewhere, *what).result()

        with ThreadPoolExecutor(_FAR_EXPERTS) as feeders:
            begun = deque[Future[tuple[Expert, _Rounded]]]()
            for number in range(count + _FAR_EXPERTS):
                if number < count:
                    begun.append(feeders.submit(elsewhere, number))
                if begun and number >= _FAR_EXPERTS - 1:
                    each, done = begun.popleft().result()
                    for name, content in done.files.items():
                        store.tensor_path(self.directory, name).write_bytes(content)
                    self.found.add(done.found)
                    yield each, done.gives

    def _expert(self, expert: Expert) -> list[Floats]:
        """Round an expert; what it gives for the tokens of each sequence, float32 [tokens, hidden]."""
        names = expert.names
        w = {name: self._tensor(self.model.checkpoint[name].float32()) for name in names}
        ops = TorchOps(w.__getitem__)
        gives: list[Floats] = [np.empty(0, np.float32)] * len(expert.rows)

        def rows(i: int) -> torch.Tensor:
            return self._tensor(expert.rows[i] if expert.every is None else expert.every[i])

        def inner(i: int, rows: Each = rows) -> torch.Tensor:
            x = rows(i)
            gate, up = (ops.linear("", x, name, None) for name in names[:2])
            return ops.gated("", gate, up, expert.act)

        def give(i: int) -> torch.Tensor:
            x = inner(i, lambda i: self._tensor(expert.rows[i]))
            value = ops.linear("", x, names[2], None) * self._tensor(expert.shares[i])[:, None]
            gives[i] = value.cpu().numpy()
            return value

        count = 0 if expert.few else expert.count
        if count and self.rounding == "awq":
            self._fold_rows(w, [names[2]], inner, (names[1], None, slice(None)), None, count)
        for stage, inputs in ((names[:2], rows), (names[2:], inner)):
            weights = {name: w[name].cpu().numpy() for name in stage}
            for name, weight in self._round(stage, inputs, weights, count).items():
                w[name] = self._tensor(weight)
        self._each(give, names[2].removesuffix(".weight"))
        return gives

    def _round(
        self,
        names: Sequence[str],
        inputs: Each,
        weights: Mapping[str, Floats],
        rows: int | None = None,
    ) -> dict[str, Floats]:
        """Round tensors that read the same inputs; returns the weights that they have become.

        Args:
            names: of the tensors.
            inputs: of all.
            weights: of each.
            rows: how many inputs there are; None: one for each token; 0: too few to go by, so that ``inputs`` are those
                that might be.
        """
        wanted = [name for name in names if self.schemes[name].kind != "none"]
        if not wanted:
            self._each(inputs, names[0])  # what later stages read is kept by it
            return {}
        where = names[0].removesuffix(".weight")
        into = weights[names[0]].shape[1]
        factor = importance = largest = None
        weighted = self.rounding != "gptq" and rows != 0
        if self.rounding == "gptq" and rows != 0:
            hessian = self._hessian(inputs, into, where)
            importance = hessian.diagonal().clone().numpy()
            try:
                factor = gptq.factorize(hessian, self.pool)
            except gptq.NotPositiveDefinite as error:
                self.found.notes.append(
                    f"{where}: the Hessian is not positive definite, {error}; rounded to nearest instead"
                )
            else:
                importance = factor.importance
                if factor.damping > gptq.DAMPINGS[0]:
                    self.found.notes.append(f"{where}: damping raised to {factor.damping:.0%}")
                if factor.dead:
                    self.found.notes.append(
                        f"{where}: {factor.dead} of {into} input channels are zero on all calibration data"
                    )
        if weighted or any(self.schemes[name].calibrated for name in wanted):
            seen = self._inputs(inputs, into, where, rows or None)
            largest = seen.largest.max()
            importance = seen.square if weighted else importance
        together = joined(name for name in wanted if self.schemes[name].scales == "e4m3")

        def one(name: str) -> Floats:
            alike = [each for each in together.get(name, (name,)) if self.schemes[each] == self.schemes[name]]
            sizes = {each: float(np.abs(weights[each]).max()) for each in alike}
            if wild := [each for each, size in sizes.items() if not np.isfinite(size)]:
                raise store.not_finite(self.model.checkpoint[wild[0]])
            most = max(sizes.values())
            return self._write(name, weights[name], factor, importance, largest, most)

        if self.far is None:
            return {name: one(name) for name in wanted}
        with ThreadPoolExecutor(len(wanted)) as feeders:
            return dict(zip(wanted, feeders.map(one, wanted), strict=True))

    def _write(
        self,
        name: str,
        weight: Floats,
        factor: gptq.Factor | None,
        importance: Floats | None,
        largest: np.float32 | None = None,
        most: float | None = None,
    ) -> Floats:
        """Round one tensor into the store; the weight that it is from now on.

        ``largest``: the largest magnitude of its inputs; None: it has none. ``most``: the magnitude that a scale of the whole tensor is made for; None: its own largest.
        """
        scheme = self.schemes[name]
        try:
            most = float(np.abs(weight).max()) if most is None else most
            whole = lattice.tensor_scale(most, scheme)
            what = (weight, scheme, self.simple, factor, importance, whole)
            rounded = self.far.submit(_elsewhere, *what).result() if self.far else _choose(self.pool, *what)
        except ScaleOverflow:
            self.found.fallbacks[name] = f"a scale of {scheme} does not fit float16; the tensor stays float"
            if self.rounding in _FOLDING:  # it has taken up scales: it is not the checkpoint's
                self._write_float(name, weight)
            return weight
        except lattice.NotFinite:
            raise store.not_finite(self.model.checkpoint[name]) from None
        parts = lattice.packed_parts(rounded.codes, scheme, rounded.grid)
        if scheme.scales == "double":
            del parts["scale"]
            parts |= lattice.quantize_scales(rounded.grid.scale)
        if scheme.scales == "e4m3":
            parts["scale_block"] = np.array([whole], np.float32)
        if scheme.calibrated:
            if largest is None:
                raise SchemeError(
                    f"{scheme} of {name} needs the range of its inputs, and an embedding has none: give it int8."
                )
            parts["input_scale"] = np.array([scheme.input_scale(largest)], np.float32)
        self.found.tensors[name] = store.write_parts(
            self.directory, name, parts, scheme, rounded.grid.clamped
        )
        return store.read_tensor(self.directory, name, scheme, weight.shape[1]).dequantize()

    def _fold(self, this: _Layer) -> None:
        """Scale input channels up, and what they come from down: norms, and the rows of v_proj and up_proj."""
        readers: dict[Step, list[Step]] = {}
        for step in this.steps:
            for source in (each for each in step.args if isinstance(each, Step)):
                readers.setdefault(source, []).append(step)
        stages = {source: names for source, names in this.stages.items() if names}
        for source, names in stages.items():
            # Experts would all have to take the scale, and there is none that suits them all.
            if source.op == "rms_norm" and all(step.reads() for step in readers[source]):
                self._fold_norm(this, names, source)
        if self.rounding != "awq":
            return
        for source, names in stages.items():
            made = heads = None
            if source.op == "attention":
                spec, made = source.args[3], source.args[2].rows()
                heads = (spec.kv_heads, spec.heads // spec.kv_heads)
            elif source.op == "gated":
                made = source.args[1].rows()
            if made:
                self._fold_rows(this.w, names, _of(this, source, keep=False), made, heads)

    def _fold_norm(self, this: _Layer, names: Sequence[str], source: Step) -> None:
        scale = self._scale(this.w, names, _of(this, source, keep=False), None)
        if scale is not None:
            weight, offset, down = source.args[1], source.keywords["offset"], self._tensor(scale)
            folded = (this.w[weight] + offset) / down - offset
            self._folded(this.w, weight, folded if offset else this.w[weight] / down)

    def _fold_rows(
        self,
        w: dict[str, torch.Tensor],
        names: Sequence[str],
        inputs: Each,
        made: tuple[str, str | None, slice],
        heads: tuple[int, int] | None,
        rows: int | None = None,
    ) -> None:
        """Fold into the rows of the linear that makes the inputs; of heads that share a value head one speaks for all."""
        scale = self._scale(w, names, inputs, heads, rows)
        if scale is None:
            return
        if heads:
            scale = scale.reshape(*heads, -1)[:, 0].reshape(-1)
        down = self._tensor(scale)
        weight, bias, where = made
        for name in (weight, bias):
            if name is not None:
                folded = w[name].clone()
                folded[where] /= down[:, None] if folded.ndim == 2 else down
                self._folded(w, name, folded)

    def _scale(
        self,
        w: dict[str, torch.Tensor],
        names: Sequence[str],
        inputs: Each,
        heads: tuple[int, int] | None,
        rows: int | None = None,
    ) -> Floats | None:
        """Find the scale of the input channels of some tensors, and scale them up by it; None: they all stay float."""
        if all(self.schemes[name].kind == "none" for name in names):
            return None
        weights = [w[name].cpu().numpy() for name in names]
        seen = self._inputs(inputs, weights[0].shape[1], names[0].removesuffix(".weight"), rows)
        if self.rounding == "awq":
            scale = awq.awq_scale(weights, [self.schemes[name] for name in names], seen, heads)
        else:
            scale = awq.smooth_scale(weights, seen)
        for name in names:
            self._folded(w, name, w[name] * self._tensor(scale))
        return scale

    def _folded(self, w: dict[str, torch.Tensor], name: str, values: torch.Tensor) -> None:
        """Take a tensor that took up a scale; one that stays float goes into the store."""
        w[name] = values
        if self.schemes[name].kind == "none":
            self._write_float(name, values.cpu().numpy())

    def _outside(self, path: Path) -> None:
        """Embedding, final norm and head: the head sees what the last layer gives, an embedding table no inputs at all."""
        specs, config = self.model.specs, self.model.decoder
        head = graph.EMBEDDING if config.tie_word_embeddings else graph.HEAD
        x = self._map(path, "r")
        norm = {graph.NORM: self._tensor(self.model.checkpoint[graph.NORM].float32())}

        def normed(i: int) -> torch.Tensor:
            ops, eps, offset = TorchOps(norm.__getitem__), config.rms_norm_eps, config.norm_offset
            return ops.rms_norm("norm", self._tensor(x[i]), graph.NORM, eps=eps, offset=offset)

        for name in specs:
            if name.startswith("model.layers."):
                continue
            source = self.model.checkpoint[name]
            if name == head and self.schemes[name].kind != "none":
                self._round([name], normed, {name: source.float32()})
            elif self.schemes[name].kind != "none":
                self._write(name, source.float32(), None, None)
            if name not in self.found.tensors:
                store.check_finite(source, self.pool)

    def _embed(self, place: Path) -> None:
        """The embeddings of all sequences."""
        table, scale = self.model.checkpoint[graph.EMBEDDING], np.float32(self.model.decoder.embedding_scale)
        x = self._map(place / "embedding.f32", "w+")
        for i, ids in enumerate(self.tokens):
            unique, at = np.unique(ids, return_inverse=True)
            rows = np.stack([table.float32(slice(int(t), int(t) + 1))[0] for t in unique])
            x[i] = rows[at] * scale
        x.flush()
        (place / "embedding.f32").rename(place / "x0.f32")
        self._commit(place, 0)

    def _commit(self, place: Path, layers: int) -> None:
        """Say that so many layers are done, and what was found in them: there a run goes on after this one is killed."""
        write_whole(place / _DONE, canonical_json({"layers": layers, **asdict(self.found)}))

    def _resume(self, place: Path) -> int:
        """Take over what an earlier run has done; the layer to go on with."""
        done = _done(place)
        if self.checkpoints:
            self.checkpoints.fetch_layers(self.directory, done["layers"] if done else 0)
            done = _done(place)
        if done is None:
            self._embed(place)
            return 0
        tensors = {name: store.Written(**entry) for name, entry in done["tensors"].items()}
        self.found = Findings(tensors, done["fallbacks"], done["notes"])
        return int(done["layers"])

    def _write_float(self, name: str, values: Floats) -> None:
        self.found.tensors[name] = store.write_parts(
            self.directory, name, {"weight": np.asarray(values, np.float32)}, SCHEMES["none"]
        )

    def _map(self, path: Path, mode: Any, width: int | None = None) -> np.memmap[Any, np.dtype[np.float32]]:
        shape = (*self.tokens.shape, width or self.model.config.hidden_size)
        return np.memmap(path, np.float32, mode, shape=shape)

    def _batches(self, inputs: Each, where: str) -> Iterator[torch.Tensor]:
        """Inputs of some sequences together, float32 [sequences * length, in], in the order of the sequences."""
        import torch

        for first in range(0, len(self.tokens), _BATCH):
            found = list(self.pool.map(inputs, range(first, min(first + _BATCH, len(self.tokens)))))
            batch = torch.cat([each.reshape(-1, each.shape[-1]) for each in found])
            if not bool(torch.isfinite(batch.sum())) and not bool(torch.isfinite(batch).all()):
                raise ModelError(
                    f"the inputs of {where} are NaN or infinite on the calibration text: {self.model.name} diverges there."
                )
            yield batch

    def _each(self, call: Each, where: str) -> None:
        for _ in self._batches(call, where):
            pass

    def _hessian(self, inputs: Each, into: int, where: str) -> torch.Tensor:
        """Σ x xᵀ over all inputs, float32 [in, in], the upper triangle."""
        import torch

        total = torch.zeros(into, into, device=self.device)
        for batch in self._batches(inputs, where):

            def add(first: int, batch: torch.Tensor = batch) -> None:
                last = min(first + _TILE, into)
                total[first:last, first:].addmm_(batch[:, first:last].T, batch[:, first:])

            list(self.pool.map(add, range(0, into, _TILE)))
        return total.cpu()

    def _inputs(self, inputs: Each, into: int, where: str, rows: int | None = None) -> Inputs:
        """Moments of the inputs, of which there are ``rows`` (None: one for each token), and a sample of them."""
        square, mean = np.zeros(into), np.zeros(into)
        largest = np.zeros(into, np.float32)
        count = self.tokens.size if rows is None else rows
        every = max(1, count // _SAMPLE)
        sample, seen = [], 0
        for batch in self._batches(inputs, where):
            values = batch.cpu().numpy()
            size = np.abs(values)
            square += np.square(values, dtype=np.float64).sum(axis=0)
            mean += size.sum(axis=0, dtype=np.float64)
            largest = np.maximum(largest, size.max(axis=0))
            sample.append(values[(-seen) % every :: every].copy())
            seen += len(values)
        return Inputs(
            (square / count).astype(np.float32),
            (mean / count).astype(np.float32),
            largest,
            np.concatenate(sample)[:_SAMPLE],
        )

    def _tensor(self, values: npt.NDArray[np.float32]) -> torch.Tensor:
        return _tensor(values, self.device)

    def _tell(self, done: int, total: int) -> None:
        if self.progress:
            self.progress("calibrate", done, total)


def _done(place: Path) -> dict[str, Any] | None:
    """What an earlier run has done; None: nothing."""
    if not (place / _DONE).exists():
        return None
    done: dict[str, Any] = json.loads((place / _DONE).read_text(encoding="utf-8"))
    return done


def _choose(
    pool: Executor,
    weight: Floats,
    scheme: Scheme,
    simple: store.Round,
    factor: gptq.Factor | None,
    importance: Floats | None,
    whole: np.float32 | None,
) -> rtn.Rounded:
    """Codes of one tensor: by GPTQ where there is a factor, else by ``simple``."""
    pieces = _rows(weight)
    if factor is None:
        parts = list(
            pool.map(lambda rows: simple(weight[rows], scheme, importance, tensor_scale=whole), pieces)
        )
        codes = np.concatenate([part.codes for part in parts])
        return rtn.Rounded(codes, lattice.join([part.grid for part in parts]))
    fitted = pool.map(lambda rows: lattice.fit(weight[rows], scheme, importance, tensor_scale=whole), pieces)
    grid = lattice.join(list(fitted))
    return rtn.Rounded(gptq.round_gptq(weight, scheme, factor, grid, pool), grid)


def _elsewhere(weight: Floats, *what: Any) -> rtn.Rounded:
    """The same in a process that may be on another machine."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), initializer=one_core_each) as pool:
        return _choose(pool, weight, *what)


@dataclass(frozen=True)
class _Rounded:
    """An expert that was rounded elsewhere: its tensors' files, what was found, and what it gives for the tokens of each sequence."""

    files: Mapping[str, bytes]
    found: Findings
    gives: list[Floats]


def _expert_elsewhere(
    model: Model,
    schemes: Mapping[str, Scheme],
    rounding: str,
    tokens: npt.NDArray[np.int32],
    simple: store.Round,
    expert: Expert,
) -> _Rounded:
    """Round an expert in a process that may be on another machine."""
    store.check_seen(next(iter(model.checkpoint.values())))
    one_core_each()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(cores, initializer=one_core_each) as pool:
        (Path(place) / "tensors").mkdir()
        run = Calibrated(model, schemes, rounding, tokens, Path(place), pool, simple)
        gives = run._expert(expert)
        files = {name: store.tensor_path(Path(place), name).read_bytes() for name in run.found.tensors}
        return _Rounded(files, run.found, gives)


def _of(this: _Layer, source: Step, *, keep: bool = True) -> Each:
    """A value of each sequence."""
    return lambda i: cast("torch.Tensor", this.value(source, i, keep=keep))


def _path(place: Path, step: Step) -> Path:
    """The file of a value that is kept: the same in every layer."""
    return place / f"{step.name.split('.', 2)[2]}.f32"


def _made_from(step: Step) -> set[Step]:
    """A step and all that it is made from."""
    return {step}.union(*(_made_from(each) for each in step.args if isinstance(each, Step)))


def _rows(weight: Floats) -> list[slice]:
    step = max(1, (1 << 18) // weight.shape[1])
    return [slice(at, min(at + step, len(weight))) for at in range(0, len(weight), step)]


def _tensor(values: npt.NDArray[np.float32], device: str) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.array(values, np.float32)).to(device)
