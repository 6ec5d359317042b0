"""Rounding with calibration data: layer by layer, each one's inputs computed with the rounded layers before it.

One layer's weights and one batch of activations are in memory at a time; what flows between layers lies in mapped files in
the store's ``.calibration``, and a run that was killed goes on at the layer where it stopped. Linear layers that read the same
inputs are rounded together, in the order in which the layer computes them, so that each sees what its rounded predecessors
give ("true sequential" in GPTQ's code).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError, SchemeError
from tapeout.files import canonical_json
from tapeout.models import Model
from tapeout.models.torch_decoder import TorchDecoder, linear
from tapeout.quantize import awq, gptq, lattice, rtn, store
from tapeout.quantize.awq import Inputs
from tapeout.quantize.lattice import Floats, ScaleOverflow
from tapeout.quantize.scheme import SCHEMES, Scheme
from tapeout.quantize.store import Findings

if TYPE_CHECKING:
    import torch

_DONE = "done.json"
_BATCH = 8  # sequences whose activations are in memory together
_TILE = 256  # rows of a Hessian that one task adds to
_SAMPLE = 512  # inputs that AWQ measures its error on
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_FOLDING = ("awq", "smoothquant")
_STAGES = (_QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))

Progress = Callable[[str, int, int], None]


@dataclass
class Calibrated:
    """One run of calibrated rounding into a store.

    Attributes:
        tokens: int32 [sequences, length], see ``Calibration.tokens``.
        rounding: ``gptq``, ``awq``, ``smoothquant``, or one that takes importance only (``rtn``, ``hqq``).
        simple: how a weight is rounded when no Hessian is used.
        device: of torch: where the layers run and the Hessians are summed up. Codes are always chosen on the CPU.
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
    found: Findings = field(default_factory=Findings)

    def run(self) -> Findings:
        """Round every tensor; what the store holds already is kept.

        Raises:
            ModelError: an activation is NaN or infinite (the first module is named), or a weight.
        """
        config = self.model.config
        place = self.directory / ".calibration"
        place.mkdir(parents=True, exist_ok=True)
        (self.directory / "tensors").mkdir(exist_ok=True)
        decoder = TorchDecoder(config)
        steps = config.num_layers + 1
        for layer in range(self._resume(place), config.num_layers):
            self._layer(decoder, layer, place)
            self._tell(layer + 1, steps)
        self._outside(decoder, place / f"x{config.num_layers}.f32")
        self._tell(steps, steps)
        (place / _DONE).unlink()  # first: what it promises goes with the rest
        shutil.rmtree(place)
        return self.found

    def _layer(self, decoder: TorchDecoder, layer: int, place: Path) -> None:

        x = self._map(place / f"x{layer}.f32", "r")
        middle = self._map(place / "middle.f32", "w+")
        context = self._map(place / "context.f32", "w+", self._context_width())
        after = self._map(place / "after.f32", "w+")
        w = self._weights(layer)
        if self.rounding in _FOLDING:
            self._fold(decoder, layer, w, x)
        calls: tuple[Callable[[int], torch.Tensor], ...] = (
            lambda i: decoder.norm(self._tensor(x[i]), w["input_layernorm.weight"]),
            lambda i: _keep(
                context, i, decoder.attend(decoder.norm(self._tensor(x[i]), w["input_layernorm.weight"]), w)
            ),
            lambda i: decoder.norm(
                _keep(
                    middle, i, self._tensor(x[i]) + linear(self._tensor(context[i]), w, "self_attn.o_proj")
                ),
                w["post_attention_layernorm.weight"],
            ),
            lambda i: decoder.gate(
                decoder.norm(self._tensor(middle[i]), w["post_attention_layernorm.weight"]), w
            ),
        )
        for stage, inputs in zip(_STAGES, calls, strict=True):
            names = [f"model.layers.{layer}.{name}.weight" for name in stage]
            for name, rounded in self._round(
                names, inputs, {n: w[_short(n)].cpu().numpy() for n in names}
            ).items():
                w[_short(name)] = self._tensor(rounded)
        self._each(
            lambda i: _keep(
                after,
                i,
                self._tensor(middle[i])
                + linear(
                    decoder.gate(
                        decoder.norm(self._tensor(middle[i]), w["post_attention_layernorm.weight"]), w
                    ),
                    w,
                    "mlp.down_proj",
                ),
            ),
            f"model.layers.{layer}",
        )
        for name in self.model.specs:
            if name.startswith(f"model.layers.{layer}.") and name not in self.found.tensors:
                store.check_finite(self.model.checkpoint[name], self.pool)
        after.flush()
        (place / "after.f32").rename(place / f"x{layer + 1}.f32")
        self._commit(place, layer + 1)
        (place / f"x{layer}.f32").unlink()

    def _round(
        self, names: Sequence[str], inputs: Callable[[int], torch.Tensor], weights: Mapping[str, Floats]
    ) -> dict[str, Floats]:
        """Round tensors that read the same inputs; returns the weights that they have become."""
        wanted = [name for name in names if self.schemes[name].kind != "none"]
        if not wanted:
            self._each(inputs, names[0])  # what later stages read is kept by it
            return {}
        where = names[0].removesuffix(".weight")
        into = weights[names[0]].shape[1]
        factor = importance = static = None
        if self.rounding == "gptq":
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
        if self.rounding != "gptq" or any(self.schemes[name].activations == "int8-static" for name in wanted):
            seen = self._inputs(inputs, into, where)
            static = seen.largest.max() / np.float32(127)
            importance = importance if self.rounding == "gptq" else seen.square
        return {name: self._write(name, weights[name], factor, importance, static) for name in wanted}

    def _write(
        self,
        name: str,
        weight: Floats,
        factor: gptq.Factor | None,
        importance: Floats | None,
        input_scale: np.float32 | None = None,
    ) -> Floats:
        """Round one tensor into the store; the weight that it is from now on."""
        scheme = self.schemes[name]
        try:
            whole = lattice.tensor_scale(float(np.abs(weight).max()), scheme)
            if factor is None:
                rounded = self._simply(weight, scheme, importance, whole)
            else:
                grid = self._fit(weight, scheme, importance, whole)
                rounded = rtn.Rounded(gptq.round_gptq(weight, scheme, factor, grid, self.pool), grid)
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
        if scheme.activations == "int8-static":
            if input_scale is None:
                raise SchemeError(
                    f"{scheme} of {name} needs the range of its inputs, and an embedding has none: give it int8."
                )
            parts["input_scale"] = np.array([input_scale], np.float32)
        self.found.tensors[name] = store.write_parts(
            self.directory, name, parts, scheme, rounded.grid.clamped
        )
        return store.read_tensor(self.directory, name, scheme, weight.shape[1]).dequantize()

    def _fit(
        self, weight: Floats, scheme: Scheme, importance: Floats | None, whole: np.float32 | None
    ) -> lattice.Grid:
        grids = self.pool.map(
            lambda rows: lattice.fit(weight[rows], scheme, importance, tensor_scale=whole), _rows(weight)
        )
        return lattice.join(list(grids))

    def _simply(
        self, weight: Floats, scheme: Scheme, importance: Floats | None, whole: np.float32 | None
    ) -> rtn.Rounded:
        parts = list(
            self.pool.map(
                lambda rows: self.simple(weight[rows], scheme, importance, tensor_scale=whole), _rows(weight)
            )
        )
        return rtn.Rounded(
            np.concatenate([part.codes for part in parts]), lattice.join([part.grid for part in parts])
        )

    def _fold(
        self, decoder: TorchDecoder, layer: int, w: dict[str, torch.Tensor], x: npt.NDArray[np.float32]
    ) -> None:
        """Scale input channels up, and what they come from down: norms, and the rows of v_proj and up_proj."""
        at, config = f"model.layers.{layer}", self.model.config

        def normed(i: int) -> torch.Tensor:
            return decoder.norm(self._tensor(x[i]), w["input_layernorm.weight"])

        def middle(i: int) -> torch.Tensor:
            context = decoder.attend(normed(i), w)
            y = self._tensor(x[i]) + linear(context, w, "self_attn.o_proj")
            return decoder.norm(y, w["post_attention_layernorm.weight"])

        heads = (config.num_kv_heads, config.num_heads // config.num_kv_heads)
        turns: list[tuple[tuple[str, ...], Callable[[int], torch.Tensor], str, tuple[int, int] | None]] = [
            (_STAGES[0], normed, "input_layernorm", None),
            (_STAGES[2], middle, "post_attention_layernorm", None),
        ]
        if self.rounding == "awq":
            turns += [
                (_STAGES[1], lambda i: decoder.attend(normed(i), w), "self_attn.v_proj", heads),
                (_STAGES[3], lambda i: decoder.gate(middle(i), w), "mlp.up_proj", None),
            ]
        for stage, inputs, source, shared in turns:
            names = [f"{at}.{name}.weight" for name in stage]
            if all(self.schemes[name].kind == "none" for name in names):
                continue
            weights = [w[_short(name)].cpu().numpy() for name in names]
            seen = self._inputs(inputs, weights[0].shape[1], names[0].removesuffix(".weight"))
            if self.rounding == "awq":
                scale = awq.awq_scale(weights, [self.schemes[name] for name in names], seen, shared)
            else:
                scale = awq.smooth_scale(weights, seen)
            for name in names:
                w[_short(name)] = w[_short(name)] * self._tensor(scale)
                if self.schemes[name].kind == "none":
                    self._write_float(name, w[_short(name)].cpu().numpy())
            # Of heads that share a value head one row of v_proj speaks for all.
            rows = scale.reshape(*shared, -1)[:, 0].reshape(-1) if shared else scale
            for part in (f"{source}.weight", f"{source}.bias"):
                if part in w:
                    down = self._tensor(rows)
                    w[part] = w[part] / (down[:, None] if w[part].ndim == 2 else down)
                    if f"{at}.{part}" not in self.schemes or self.schemes[f"{at}.{part}"].kind == "none":
                        self._write_float(f"{at}.{part}", w[part].cpu().numpy())

    def _outside(self, decoder: TorchDecoder, path: Path) -> None:
        """Embedding, final norm and head: the head sees what the last layer gives, an embedding table no inputs at all."""
        specs, config = self.model.specs, self.model.config
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        x = self._map(path, "r")
        norm = self._tensor(self.model.checkpoint["model.norm.weight"].float32())
        for name in specs:
            if name.startswith("model.layers."):
                continue
            source = self.model.checkpoint[name]
            if name == head and self.schemes[name].kind != "none":
                self._round(
                    [name], lambda i: decoder.norm(self._tensor(x[i]), norm), {name: source.float32()}
                )
            elif self.schemes[name].kind != "none":
                self._write(name, source.float32(), None, None)
            if name not in self.found.tensors:
                store.check_finite(source, self.pool)

    def _embed(self, place: Path) -> None:
        """The embeddings of all sequences."""
        table = self.model.checkpoint["model.embed_tokens.weight"]
        x = self._map(place / "embedding.f32", "w+")
        for i, ids in enumerate(self.tokens):
            unique, at = np.unique(ids, return_inverse=True)
            rows = np.stack([table.float32(slice(int(t), int(t) + 1))[0] for t in unique])
            x[i] = rows[at]
        x.flush()
        (place / "embedding.f32").rename(place / "x0.f32")
        self._commit(place, 0)

    def _commit(self, place: Path, layers: int) -> None:
        """Say that so many layers are done, and what was found in them: there a run goes on after this one is killed."""
        partial = place / f"{_DONE}.partial"
        partial.write_text(canonical_json({"layers": layers, **asdict(self.found)}), encoding="utf-8")
        partial.rename(place / _DONE)

    def _resume(self, place: Path) -> int:
        """Take over what an earlier run has done; the layer to go on with."""
        if not (place / _DONE).exists():
            self._embed(place)
            return 0
        done = json.loads((place / _DONE).read_text(encoding="utf-8"))
        tensors = {name: store.Written(**entry) for name, entry in done["tensors"].items()}
        self.found = Findings(tensors, done["fallbacks"], done["notes"])
        return int(done["layers"])

    def _weights(self, layer: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{layer}."
        return {
            name.removeprefix(prefix): self._tensor(self.model.checkpoint[name].float32())
            for name in self.model.specs
            if name.startswith(prefix)
        }

    def _write_float(self, name: str, values: Floats) -> None:
        self.found.tensors[name] = store.write_parts(
            self.directory, name, {"weight": np.asarray(values, np.float32)}, SCHEMES["none"]
        )

    def _context_width(self) -> int:
        return self.model.config.num_heads * self.model.config.head_dim

    def _map(self, path: Path, mode: Any, width: int | None = None) -> np.memmap[Any, np.dtype[np.float32]]:
        shape = (*self.tokens.shape, width or self.model.config.hidden_size)
        return np.memmap(path, np.float32, mode, shape=shape)

    def _batches(self, inputs: Callable[[int], torch.Tensor], where: str) -> Iterator[torch.Tensor]:
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

    def _each(self, call: Callable[[int], torch.Tensor], where: str) -> None:
        for _ in self._batches(call, where):
            pass

    def _hessian(self, inputs: Callable[[int], torch.Tensor], into: int, where: str) -> torch.Tensor:
        """Σ x xᵀ over all inputs, float32 [in, in], the upper triangle."""
        import torch

        total = torch.zeros(into, into, device=self.device)
        for batch in self._batches(inputs, where):

            def add(first: int, batch: torch.Tensor = batch) -> None:
                last = min(first + _TILE, into)
                total[first:last, first:].addmm_(batch[:, first:last].T, batch[:, first:])

            list(self.pool.map(add, range(0, into, _TILE)))
        return total.cpu()

    def _inputs(self, inputs: Callable[[int], torch.Tensor], into: int, where: str) -> Inputs:
        """Moments of the inputs, and a sample of them."""
        square, mean = np.zeros(into), np.zeros(into)
        largest = np.zeros(into, np.float32)
        count = self.tokens.size
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
        import torch

        return torch.from_numpy(np.array(values, np.float32)).to(self.device)

    def _tell(self, done: int, total: int) -> None:
        if self.progress:
            self.progress("calibrate", done, total)


def _short(name: str) -> str:
    """The name without ``model.layers.N.``."""
    return name.split(".", 3)[3]


def _rows(weight: Floats) -> list[slice]:
    step = max(1, (1 << 18) // weight.shape[1])
    return [slice(at, min(at + step, len(weight))) for at in range(0, len(weight), step)]


def _keep(place: npt.NDArray[np.float32], index: int, values: torch.Tensor) -> torch.Tensor:
    place[index] = values.cpu().numpy()
    return values
