"""The decoder as functions of an MLIR module: float32 activations, codes that become floats inside the loops that read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError
from tapeout.exporters.iree.blocks import FLOATS, Container, container
from tapeout.exporters.iree.mlir import Function, Module, Value, literal
from tapeout.models.decoder import Attention, Mla, Moe
from tapeout.models.rope import Rope, cos_sin
from tapeout.quantize import Quantized, QuantTensor

_HIDDEN = -1e30  # a score that is not looked at: its exponential is 0, and no infinity is computed with


@dataclass(frozen=True)
class Parameter:
    """A parameter of the archive.

    Attributes:
        shape, element: as the module declares it.
        sources: the tensors whose ``part`` it is, one after the other: of experts one each; none: ``values`` are the bytes.
        part: ``codes``, a name in blocks.PARTS, or ``weight`` of a tensor without codes.
        container: of codes.
    """

    shape: tuple[int, ...]
    element: str
    sources: tuple[str, ...]
    part: str
    container: Container | None = None
    values: npt.NDArray[Any] | None = None


@dataclass
class Weights:
    """The parameters that the functions of a module share; each is written once.

    Attributes:
        quant: where they come from.
        parameters: by the name that the archive has them under.
        context: most tokens of a sequence.
        chunk: most tokens of a call.
        ropes: those whose tables are in the archive, in turn.
    """

    quant: Quantized
    context: int
    chunk: int
    parameters: dict[str, Parameter] = field(default_factory=dict)
    ropes: list[Rope] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Of caches and tables: the last call of a sequence may be padded to a whole chunk."""
        return self.context + self.chunk

    def add(self, name: str, parameter: Parameter) -> None:
        """Declare a parameter, unless another function has."""
        self.parameters.setdefault(name, parameter)

    def table(self, rope: Rope) -> str:
        """The name of the tables of a RoPE."""
        if rope not in self.ropes:
            at = len(self.ropes)
            self.ropes.append(rope)
            for part, values in zip(("cos", "sin"), _tables(rope, self.rows, self.context), strict=True):
                self.parameters[f"rope.{at}.{part}"] = Parameter(values.shape, "f32", (), part, None, values)
        return f"rope.{self.ropes.index(rope)}"


def _tables(rope: Rope, rows: int, context: int) -> tuple[npt.NDArray[np.float32], ...]:
    """Cosine and sine for every element that turns, float32 [rows, dim] each, the sine with the sign of its element.

    ``longrope``: those of sequences beyond the trained length stand behind the others.
    """
    found = []
    trained = int(rope.parameters.get("original_max_position_embeddings", context))
    for length in (0, context) if rope.kind == "longrope" and trained < context else (0,):
        cos, sin = cos_sin(rope, np.arange(rows), length)
        if rope.interleaved:
            wide = np.repeat(cos, 2, 1), np.stack([-sin, sin], 2).reshape(rows, -1)
        else:
            wide = np.concatenate([cos, cos], 1), np.concatenate([-sin, sin], 1)
        found.append(wide)
    return tuple(np.concatenate(each) for each in zip(*found, strict=True))


@dataclass(frozen=True)
class Routing:
    """What ``route`` gives: weights [tokens, experts], zero for experts that a token does not take, and ranks, 0 for the best."""

    weights: Value
    ranks: Value


class IreeOps:
    """``Ops`` on values of one function, whose tokens are a number that is fixed.

    Args:
        weights: what all functions share.
        module: where the function goes.
        tokens: of a call.
        last: logits of the call's last token alone.
    """

    def __init__(self, weights: Weights, module: Module, tokens: int, *, last: bool) -> None:
        self.weights, self.tokens, self._last = weights, tokens, last
        self.f = Function(module)
        self._quant = weights.quant
        self._dense: dict[str, Value] = {}

    def begin(self) -> Value:
        """Ids [tokens], and what follows from the place of the first one and the number of those that are no padding."""
        f = self.f
        self.start = f.scalar("arith.index_cast %start : i32 to index")
        self.start_int = "%start"
        return Value("%ids", (self.tokens,), "i32")

    def finish(self, name: str, logits: Value) -> None:
        """Add the function to the module."""
        arguments = {"ids": f"tensor<{self.tokens}xi32>", "start": "i32", "count": "i32"}
        self.f.finish(name, arguments, logits)

    # What the graph calls.

    def embedding(self, name: str, ids: Value, weight: str, scale: float) -> Value:
        self.f.note(name)
        held = self._quant[weight]
        width = self._quant.model.specs[weight].shape[1]
        if not isinstance(held, QuantTensor):
            table = self._float(weight)
            body = f"""
                %r = arith.index_cast %a : i32 to index
                %k = linalg.index 1 : index
                %w = tensor.extract {table.name}[%r, %k] : {table.type}
                {_widened("%x", "%w", table.kind)}
                {_times("%y", "%x", scale)}
                yield %y"""
            return self.f.generic("t->tk", [ids], {"k": width}, body)
        codes, beside = self._codes((weight,))
        groups = width // held.group
        lines = [
            "%r = arith.index_cast %a : i32 to index",
            "%g = linalg.index 1 : index",
            "%k = linalg.index 2 : index",
            f"%c = tensor.extract {codes.name}[%r, %g, %k] : {codes.type}",
        ]
        arguments = {}
        for part, value in beside.items():
            lines.append(f"%p{part} = tensor.extract {value.name}[%r, %g] : {value.type}")
            arguments[part] = f"%p{part}"
        lines += self._number(weight, "%c", arguments, beside)
        lines += [_times("%y", "%w", scale), "yield %y"]
        y = self.f.generic("t->tgk", [ids], {"g": groups, "k": held.group}, "\n".join(lines))
        return self.f.shaped(y, (self.tokens, width))

    def linear(self, name: str, x: Value, weight: str, bias: str | None) -> Value:
        self.f.note(name)
        if self._last and name in ("logits", "head"):
            x = self._last_row(x)
        y = self._product(x, weight)
        if bias:
            y = self.f.generic(
                "tn,n->tn", [y, self._vector(bias)], {}, "%y = arith.addf %a, %b : f32\nyield %y"
            )
        return y

    def rms_norm(
        self, name: str, x: Value, weight: str, *, eps: float, offset: float, parts: int = 1
    ) -> Value:
        self.f.note(name)
        tokens, width = x.shape[0], x.shape[1] // parts
        whole = self.f.shaped(x, (tokens, parts, width))
        square = "%s = arith.mulf %a, %a : f32\n%y = arith.addf %out, %s : f32\nyield %y"
        total = self.f.generic("tpk->tp", [whole], {}, square, initial=0.0)
        body = f"""
            %n = arith.constant {literal(1 / width)} : f32
            %e = arith.constant {literal(eps)} : f32
            %o = arith.constant {literal(offset)} : f32
            %m = arith.mulf %b, %n : f32
            %v = arith.addf %m, %e : f32
            %r = math.sqrt %v : f32
            %d = arith.divf %a, %r : f32
            %g = arith.addf %c, %o : f32
            %y = arith.mulf %g, %d : f32
            yield %y"""
        y = self.f.generic("tpk,tp,k->tpk", [whole, total, self._vector(weight)], {}, body)
        return self.f.shaped(y, x.shape)

    def split(self, name: str, x: Value, sizes: Sequence[int]) -> tuple[Value, ...]:
        begins = np.cumsum([0, *sizes[:-1]]).tolist()
        return tuple(self.f.cut(x, 1, begin, size) for begin, size in zip(begins, sizes, strict=True))

    def attention(self, name: str, query: Value, key: Value, value: Value, spec: Attention) -> Value:
        self.f.note(name)
        f, t, kv, dim = self.f, self.tokens, spec.kv_heads, spec.head_dim
        shared = spec.heads // kv
        q = self._turned(f.shaped(query, (t, spec.heads, dim)), spec.rope)
        k = self._turned(f.shaped(key, (t, kv, dim)), spec.rope)
        v = f.shaped(value, (t, kv, dim))
        keys = f.cached(f"cache.{spec.layer}.key", self.weights.rows, k, self.start)
        values = f.cached(f"cache.{spec.layer}.value", self.weights.rows, v, self.start)
        q = f.shaped(q, (t, kv, shared, dim))
        scores = f.generic("thsd,rhd->hstr", [q, keys], {}, _SUM, initial=0.0)
        shares = self._shares(f.shaped(scores, (spec.heads, t, self.weights.rows)), spec)
        shares = f.shaped(shares, (kv, shared, t, self.weights.rows))
        y = f.generic("hstr,rhd->thsd", [shares, values], {}, _SUM, initial=0.0)
        return f.shaped(y, (t, spec.heads * dim))

    def latent_attention(
        self, name: str, query: Value, latent: Value, key_rope: Value, weight: str, spec: Attention, mla: Mla
    ) -> Value:
        """One key head of latents, with the keys' half of ``weight`` in the queries and values made after they are summed."""
        self.f.note(name)
        f, t, heads = self.f, self.tokens, spec.heads
        whole = f.shaped(self._whole(weight), (heads, mla.nope_dim + mla.v_dim, mla.kv_rank))
        of_keys = f.cut(whole, 1, 0, mla.nope_dim)
        of_values = f.cut(whole, 1, mla.nope_dim, mla.v_dim)
        q = f.shaped(query, (t, heads, mla.nope_dim + mla.rope_dim))
        plain = f.cut(q, 2, 0, mla.nope_dim)
        turned = self._turned(f.cut(q, 2, mla.nope_dim, mla.rope_dim), spec.rope)
        key = self._turned(f.shaped(key_rope, (t, 1, mla.rope_dim)), spec.rope)
        kept = f.joined([latent, f.shaped(key, (t, mla.rope_dim))])
        kept = f.cached(f"cache.{spec.layer}.latent", self.weights.rows, kept, self.start)
        plain = f.generic("thd,hdk->thk", [plain, of_keys], {}, _SUM, initial=0.0)
        # One product over both parts: of two that are added IREE makes a kernel with more shared memory than a chip has.
        q = f.joined([plain, turned])
        scores = f.generic("thk,rk->htr", [q, kept], {}, _SUM, initial=0.0)
        y = f.generic("htr,rk->thk", [self._shares(scores, spec), kept], {}, _SUM, initial=0.0)
        y = f.cut(y, 2, 0, mla.kv_rank)
        y = f.generic("thk,hdk->thd", [y, of_values], {}, _SUM, initial=0.0)
        return f.shaped(y, (t, heads * mla.v_dim))

    def gated(self, name: str, gate: Value, up: Value, act: str) -> Value:
        self.f.note(name)
        letters = "tjn"[-len(gate.shape) :]
        body = f"{_ACTIVATIONS[act]}\n%y = arith.mulf %h, %b : f32\nyield %y"
        return self.f.generic(f"{letters},{letters}->{letters}", [gate, up], {}, body)

    def route(self, name: str, logits: Value, bias: str | None, moe: Moe) -> Routing:
        """Ranks by counting, for each expert, those that are better or are as good and have a lower number."""
        self.f.note(name)
        f = self.f
        scores = (
            self._softmax(logits, "te", "t")
            if moe.scoring == "softmax"
            else f.generic("te->te", [logits], {}, f"{_sigmoid('%y', '%a')}\nyield %y")
        )
        choice = scores
        if bias:
            choice = f.generic(
                "te,e->te", [scores, self._vector(bias)], {}, "%y = arith.addf %a, %b : f32\nyield %y"
            )
        if moe.groups > 1:
            choice = self._grouped(choice, moe)
        ranks = f.generic("te,tf->te", [choice, choice], {}, _rank(1, 2), kind="i32", initial=0)
        taken = f"%k = arith.constant {moe.top_k} : i32\n%t = arith.cmpi slt, %b, %k : i32\n{_ZERO}\n"
        weights = f.generic(
            "te,te->te", [scores, ranks], {}, f"{taken}%y = arith.select %t, %a, %zero : f32\nyield %y"
        )
        if moe.renormalize:
            total = f.generic("te->t", [weights], {}, "%y = arith.addf %out, %a : f32\nyield %y", initial=0.0)
            weights = f.generic("te,t->te", [weights, total], {}, "%y = arith.divf %a, %b : f32\nyield %y")
        if moe.scale != 1.0:
            weights = f.generic("te->te", [weights], {}, f"{_times('%y', '%a', moe.scale)}\nyield %y")
        return Routing(weights, ranks)

    def experts(self, name: str, x: Value, routing: Routing, layer: int, act: str, moe: Moe) -> Value:
        """A token's own experts, one after another, whose codes are looked up where they are multiplied.

        Of a whole chunk every expert on every token, which the weights then take or leave: no code is read more than once.
        """
        self.f.note(name)
        f = self.f
        gate, up, down = zip(*(moe.weights(layer, expert) for expert in range(moe.experts)), strict=True)
        if self.tokens > 1:
            inner = self.gated(f"{name}.inner", self._stack(x, gate, "tgk"), self._stack(x, up, "tgk"), act)
            y = self._stack(inner, down, "tegk")
            body = "%p = arith.mulf %a, %b : f32\n%y = arith.addf %out, %p : f32\nyield %y"
            return f.generic("ten,te->tn", [y, routing.weights], {}, body, initial=0.0)
        chosen = f.generic("te->tj", [routing.ranks], {"j": moe.top_k}, _CHOSEN, kind="i32", initial=0)
        inner = self.gated(
            f"{name}.inner", self._taken(x, gate, chosen, "tgk"), self._taken(x, up, chosen, "tgk"), act
        )
        y = self._taken(inner, down, chosen, "tjgk")
        body = f"""
            %t = linalg.index 0 : index
            %e = arith.index_cast %b : i32 to index
            %w = tensor.extract {routing.weights.name}[%t, %e] : {routing.weights.type}
            %p = arith.mulf %a, %w : f32
            %y = arith.addf %out, %p : f32
            yield %y"""
        return f.generic("tjn,tj->tn", [y, chosen], {}, body, initial=0.0)

    def sigmoid_gate(self, name: str, x: Value, logit: Value) -> Value:
        self.f.note(name)
        logit = self.f.shaped(logit, (x.shape[0],))
        body = f"{_sigmoid('%s', '%b')}\n%y = arith.mulf %a, %s : f32\nyield %y"
        return self.f.generic("tk,t->tk", [x, logit], {}, body)

    def add(self, name: str, x: Value, y: Value) -> Value:
        self.f.note(name)
        return self.f.generic("tk,tk->tk", [x, y], {}, "%y = arith.addf %a, %b : f32\nyield %y")

    def softcap(self, name: str, x: Value, cap: float) -> Value:
        self.f.note(name)
        return self.f.generic("tk->tk", [x], {}, f"{_capped('%y', '%a', 1.0, cap)}\nyield %y")

    # Weights.

    def _float(self, name: str) -> Value:
        """A tensor that has no codes, in its own type."""
        tensor = self._quant[name]
        assert not isinstance(tensor, QuantTensor)
        kind = FLOATS.get(tensor.dtype, "f32")
        self.weights.add(name, Parameter(tensor.shape, kind, (name,), "weight"))
        return self.f.parameter(name, tensor.shape, kind)

    def _vector(self, name: str) -> Value:
        """A norm's or a bias's floats as float32."""
        return self._wide(self._float(name))

    def _codes(self, names: tuple[str, ...]) -> tuple[Value, dict[str, Value]]:
        """Codes [out, groups, group] and what stands beside them [out, groups]; of several tensors one more axis in front."""
        first = self._quant[names[0]]
        assert isinstance(first, QuantTensor)
        scheme = self._quant.schemes[names[0]]
        if other := next((name for name in names if self._quant.schemes[name] != scheme), None):
            raise ModelError(
                f"{names[0]} is {scheme} and {other} is {self._quant.schemes[other]}: the experts of a layer are one tensor in the "
                "module. What fits: one scheme for all of them."
            )
        held = container(scheme)
        out, into = first.shape
        groups = into // first.group
        front = () if len(names) == 1 else (len(names),)
        at = names[0] if len(names) == 1 else f"{names[0]}.and_{len(names) - 1}_more"

        def declared(part: str, shape: tuple[int, ...], element: str) -> Value:
            self.weights.add(f"{at}.{part}", Parameter(shape, element, names, part, held))
            return self.f.parameter(f"{at}.{part}", shape, element)

        beside = {"scale": declared("scale", (*front, out, groups), held.scale)}
        if held.kind == "asymmetric":
            beside["zero_point"] = declared("zero_point", (*front, out, groups), "i8")
        if held.kind == "codebook":
            table = f"levels.{scheme.levels}"
            self.weights.add(table, Parameter(first.codebook.shape, "f32", (), "table", None, first.codebook))
            self.f.parameter(table, first.codebook.shape, "f32")
        if front and held.element == "i4":
            # As bytes, since no GPU of IREE 3.13 looks up halves of them; whoever multiplies takes them apart again.
            return declared("codes", (*front, out, groups, first.group // 2), "i8"), beside
        return declared("codes", (*front, out, groups, first.group), held.element), beside

    def _number(
        self, name: str, code: str, given: Mapping[str, str], beside: Mapping[str, Value]
    ) -> list[str]:
        """Operations that make the weight ``%w`` of a code and what stands beside it."""
        scheme = self._quant.schemes[name]
        held = container(scheme)
        if held.kind == "codebook":
            levels = self._quant[name]
            assert isinstance(levels, QuantTensor)
            table = self.f.parameter(f"levels.{scheme.levels}", levels.codebook.shape, "f32")
            lines = [
                f"%ci = arith.extui {code} : {held.element} to i32",
                "%cx = arith.index_cast %ci : i32 to index",
                f"%q = tensor.extract {table.name}[%cx] : {table.type}",
            ]
        elif held.kind == "symmetric":
            lines = [
                f"%ci = arith.extsi {code} : {held.element} to i32",
                "%q = arith.sitofp %ci : i32 to f32",
            ]
        else:
            lines = [
                f"%ci = arith.extui {code} : {held.element} to i32",
                f"%zi = arith.extui {given['zero_point']} : i8 to i32",
                "%di = arith.subi %ci, %zi : i32",
                "%q = arith.sitofp %di : i32 to f32",
            ]
        scale = beside["scale"]
        return [
            *lines,
            _widened("%sf", given["scale"], scale.kind),
            "%w = arith.mulf %q, %sf : f32",
        ]

    def _whole(self, weight: str) -> Value:
        """A matrix as float32 [out, in]."""
        held = self._quant[weight]
        if not isinstance(held, QuantTensor):
            return self._wide(self._float(weight))
        return self.f.shaped(self._dequantized((weight,)), held.shape)

    def _dequantized(self, names: tuple[str, ...]) -> Value:
        """Float32 weights in the shape of the codes; IREE puts them into the loop that reads them."""
        at = names[0]
        if at not in self._dense:
            self._dense[at] = self._numbers(at, *self._codes(names))
        return self._dense[at]

    def _numbers(self, name: str, codes: Value, beside: Mapping[str, Value]) -> Value:
        """Float32 weights of codes [.., out, groups, group] and what stands beside them [.., out, groups]."""
        if (element := container(self._quant.schemes[name]).element) != codes.kind:
            codes = self.f.halves(codes, element)
        letters = "tengk"[-len(codes.shape) :]
        given = {part: f"%{chr(98 + index)}" for index, part in enumerate(beside)}
        lines = [*self._number(name, "%a", given, beside), "yield %w"]
        spec = f"{','.join([letters, *[letters[:-1]] * len(beside)])}->{letters}"
        return self.f.generic(spec, [codes, *beside.values()], {}, "\n".join(lines))

    def _wide(self, value: Value) -> Value:
        """Floats as float32."""
        if value.kind == "f32":
            return value
        letters = "abcdefg"[: len(value.shape)]
        return self.f.generic(
            f"{letters}->{letters}", [value], {}, f"{_widened('%y', '%a', value.kind)}\nyield %y"
        )

    def _product(self, x: Value, weight: str) -> Value:
        """``x @ weightᵀ``."""
        held = self._quant[weight]
        if not isinstance(held, QuantTensor):
            return self.f.generic("tk,nk->tn", [x, self._whole(weight)], {}, _SUM, initial=0.0)
        w = self._dequantized((weight,))
        x = self.f.shaped(x, (x.shape[0], *w.shape[1:]))
        return self.f.generic("tgk,ngk->tn", [x, w], {}, _SUM, initial=0.0)

    def _stack(self, x: Value, names: tuple[str, ...], letters: str) -> Value:
        """Every expert's product [tokens, experts, out] of rows that all share (``tgk``) or that are its own (``tegk``)."""
        w = self._stacked(names)
        x = self.f.shaped(x, (*x.shape[:-1], *w.shape[2:]))
        return self.f.generic(f"{letters},engk->ten", [x, w], {}, _SUM, initial=0.0)

    def _stacked(self, names: tuple[str, ...]) -> Value:
        """Experts' weights, float32 [experts, out, groups, group]."""
        if isinstance(self._quant[names[0]], QuantTensor):
            return self._dequantized(names)
        value = self._wide(self._floats(names))
        return self.f.shaped(value, (*value.shape[:2], 1, value.shape[2]))

    def _floats(self, names: tuple[str, ...]) -> Value:
        """Experts' floats as they are, [experts, out, in]."""
        first = self._quant[names[0]]
        assert not isinstance(first, QuantTensor)
        at = f"{names[0]}.and_{len(names) - 1}_more"
        shape, kind = (len(names), *first.shape), FLOATS.get(first.dtype, "f32")
        self.weights.add(at, Parameter(shape, kind, names, "weight"))
        return self.f.parameter(at, shape, kind)

    def _taken(self, x: Value, names: tuple[str, ...], chosen: Value, letters: str) -> Value:
        """The chosen experts' products [tokens, top_k, out], of codes that are copied by ``chosen`` [tokens, top_k] first."""
        f = self.f

        def copied(value: Value) -> Value:
            """[experts, …] to [tokens, top_k, …]; kept apart from the product, of which IREE makes no kernel for a GPU otherwise."""
            letters = "nmk"[: len(value.shape) - 1]
            where = ", ".join(f"%i{letter}" for letter in letters)
            lines = ["%e = arith.index_cast %a : i32 to index"]
            lines += [f"%i{letter} = linalg.index {2 + at} : index" for at, letter in enumerate(letters)]
            lines += [f"%y = tensor.extract {value.name}[%e, {where}] : {value.type}", "yield %y"]
            sizes = dict(zip(letters, value.shape[1:], strict=True))
            y = f.generic(f"tj->tj{letters}", [chosen], sizes, "\n".join(lines), kind=value.kind)
            return f.let(f"util.optimization_barrier {y.name} : {y.type}", y.shape, y.kind)

        if isinstance(self._quant[names[0]], QuantTensor):
            codes, beside = self._codes(names)
            w = self._numbers(names[0], copied(codes), {part: copied(each) for part, each in beside.items()})
        else:
            w = self._wide(copied(self._floats(names)))
            w = f.shaped(w, (*w.shape[:3], 1, w.shape[3]))
        x = f.shaped(x, (*x.shape[:-1], *w.shape[3:]))
        return f.generic(f"{letters},tjngk->tjn", [x, w], {}, _SUM, initial=0.0)

    # Parts of attention and of routing.

    def _turned(self, x: Value, rope: Rope) -> Value:
        """RoPE of x [tokens, heads, dim]: elements behind ``rope.dim`` stay."""
        f, dim = self.f, x.shape[2]
        at = self.weights.table(rope)
        shape = self.weights.parameters[f"{at}.cos"].shape
        place = self._place(rope, shape[0])
        cos, sin = (
            f.rows(f.parameter(f"{at}.{part}", shape, "f32"), place, self.tokens) for part in ("cos", "sin")
        )
        turned = f.cut(x, 2, 0, rope.dim) if rope.dim < dim else x
        if rope.interleaved:
            partner = "%one = arith.constant 1 : index\n%j = arith.xori %i, %one : index"
        else:
            partner = f"""%half = arith.constant {rope.dim // 2} : index
                %first = arith.cmpi ult, %i, %half : index
                %up = arith.addi %i, %half : index
                %down = arith.subi %i, %half : index
                %j = arith.select %first, %up, %down : index"""
        body = f"""
            %t = linalg.index 0 : index
            %h = linalg.index 1 : index
            %i = linalg.index 2 : index
            {partner}
            %o = tensor.extract {turned.name}[%t, %h, %j] : {turned.type}
            %p = arith.mulf %a, %b : f32
            %q = arith.mulf %o, %c : f32
            %y = arith.addf %p, %q : f32
            yield %y"""
        y = f.generic("thd,td,td->thd", [turned, cos, sin], {}, body)
        if rope.dim == dim:
            return y
        where = f"[0, 0, 0] {list(y.shape)} [1, 1, 1]"
        return f.let(f"tensor.insert_slice {y.name} into {x.name}{where} : {y.type} into {x.type}", x.shape)

    def _place(self, rope: Rope, rows: int) -> str:
        """The row of a table where the call's first token stands."""
        if rows == self.weights.rows:
            return self.start
        trained = int(rope.parameters["original_max_position_embeddings"])
        f = self.f
        limit = f.scalar(f"arith.constant {trained} : i32")
        none = f.scalar("arith.constant 0 : i32")
        behind = f.scalar(f"arith.constant {self.weights.rows} : i32")
        length = f.scalar("arith.addi %start, %count : i32")
        is_long = f.scalar(f"arith.cmpi sgt, {length}, {limit} : i32")
        offset = f.scalar(f"arith.select {is_long}, {behind}, {none} : i32")
        row = f.scalar(f"arith.addi %start, {offset} : i32")
        return f.scalar(f"arith.index_cast {row} : i32 to index")

    def _shares(self, scores: Value, spec: Attention) -> Value:
        """Softmax of scores [heads, tokens, rows], scaled, capped, and hidden where a token does not look."""
        scaled = (
            _times("%s", "%a", spec.scale)
            if spec.softcap is None
            else _capped("%s", "%a", spec.scale, spec.softcap)
        )
        window = ""
        if spec.window and spec.window < self.weights.context:
            window = f"""
                %window = arith.constant {spec.window} : index
                %end = arith.addi %r, %window : index
                %near = arith.cmpi ugt, %end, %me : index
                %seen = arith.andi %before, %near : i1"""
        body = f"""
            {scaled}
            %t = linalg.index 1 : index
            %r = linalg.index 2 : index
            %me = arith.addi %t, {self.start} : index
            %before = arith.cmpi ule, %r, %me : index
            {window}
            %no = arith.constant {literal(_HIDDEN)} : f32
            %y = arith.select {"%seen" if window else "%before"}, %s, %no : f32
            yield %y"""
        body = "\n".join(line for line in body.split("\n") if line.strip())
        return self._softmax(self.f.generic("htr->htr", [scores], {}, body), "htr", "ht")

    def _softmax(self, x: Value, letters: str, rest: str) -> Value:
        f = self.f
        most = f.generic(
            f"{letters}->{rest}", [x], {}, "%y = arith.maximumf %out, %a : f32\nyield %y", initial=-3e38
        )
        powers = f.generic(
            f"{letters},{rest}->{letters}",
            [x, most],
            {},
            "%d = arith.subf %a, %b : f32\n%y = math.exp %d : f32\nyield %y",
        )
        total = f.generic(
            f"{letters}->{rest}", [powers], {}, "%y = arith.addf %out, %a : f32\nyield %y", initial=0.0
        )
        return f.generic(
            f"{letters},{rest}->{letters}", [powers, total], {}, "%y = arith.divf %a, %b : f32\nyield %y"
        )

    def _grouped(self, choice: Value, moe: Moe) -> Value:
        """Scores of the experts of the best groups; the others' are below all."""
        f = self.f
        x = f.shaped(choice, (choice.shape[0], moe.groups, moe.experts // moe.groups))
        inside = f.generic("tge,tgf->tge", [x, x], {}, _rank(2, 3), kind="i32", initial=0)
        best = 2 if moe.group_score == "top2" else 1
        body = f"""
            %k = arith.constant {best} : i32
            %t = arith.cmpi slt, %b, %k : i32
            {_ZERO}
            %s = arith.select %t, %a, %zero : f32
            %y = arith.addf %out, %s : f32
            yield %y"""
        value = f.generic("tge,tge->tg", [x, inside], {}, body, initial=0.0)
        ranks = f.generic("tg,th->tg", [value, value], {}, _rank(1, 2), kind="i32", initial=0)
        body = f"""
            %k = arith.constant {moe.top_groups} : i32
            %t = arith.cmpi slt, %b, %k : i32
            %no = arith.constant {literal(_HIDDEN)} : f32
            %y = arith.select %t, %a, %no : f32
            yield %y"""
        return f.shaped(f.generic("tge,tg->tge", [x, ranks], {}, body), choice.shape)

    def _last_row(self, x: Value) -> Value:
        """The last token's row [1, width] of those that are no padding."""
        if self.tokens == 1:
            return x
        f = self.f
        one = f.scalar("arith.constant 1 : i32")
        row = f.scalar(f"arith.subi %count, {one} : i32")
        return f.rows(x, f.scalar(f"arith.index_cast {row} : i32 to index"), 1)


_ZERO = "%zero = arith.constant 0.0 : f32"
_SUM = "%p = arith.mulf %a, %b : f32\n%y = arith.addf %out, %p : f32\nyield %y"
# The expert whose rank is j, as a sum of one number and zeros.
_CHOSEN = """
    %j = linalg.index 1 : index
    %e = linalg.index 2 : index
    %ji = arith.index_cast %j : index to i32
    %ei = arith.index_cast %e : index to i32
    %is = arith.cmpi eq, %a, %ji : i32
    %no = arith.constant 0 : i32
    %s = arith.select %is, %ei, %no : i32
    %y = arith.addi %out, %s : i32
    yield %y"""


def _rank(mine: int, other: int) -> str:
    """Count the ``%b`` that come before ``%a``: better ones, and equal ones of a lower number; the numbers are loops."""
    return f"""
        %e = linalg.index {mine} : index
        %f = linalg.index {other} : index
        %more = arith.cmpf ogt, %b, %a : f32
        %same = arith.cmpf oeq, %b, %a : f32
        %lower = arith.cmpi ult, %f, %e : index
        %tie = arith.andi %same, %lower : i1
        %before = arith.ori %more, %tie : i1
        %n = arith.extui %before : i1 to i32
        %y = arith.addi %out, %n : i32
        yield %y"""


def _widened(result: str, value: str, kind: str) -> str:
    """A float as float32."""
    if kind == "f32":
        return _times(result, value, 1.0)
    return f"{result} = arith.extf {value} : {kind} to f32"


def _times(result: str, value: str, factor: float) -> str:
    return f"{result}_by = arith.constant {literal(factor)} : f32\n{result} = arith.mulf {value}, {result}_by : f32"


def _capped(result: str, value: str, scale: float, cap: float) -> str:
    return "\n".join(
        (
            _times(f"{result}_in", value, scale / cap),
            f"{result}_tanh = math.tanh {result}_in : f32",
            _times(result, f"{result}_tanh", cap),
        )
    )


def _sigmoid(result: str, value: str) -> str:
    return "\n".join(
        (
            f"{result}_one = arith.constant 1.0 : f32",
            f"{result}_neg = arith.negf {value} : f32",
            f"{result}_exp = math.exp {result}_neg : f32",
            f"{result}_sum = arith.addf {result}_one, {result}_exp : f32",
            f"{result} = arith.divf {result}_one, {result}_sum : f32",
        )
    )


# Of %a to %h.
_ACTIVATIONS = {
    "silu": f"{_sigmoid('%s', '%a')}\n%h = arith.mulf %a, %s : f32",
    "gelu": "\n".join(
        (
            _times("%x", "%a", math.sqrt(0.5)),
            "%e = math.erf %x : f32",
            "%one = arith.constant 1.0 : f32",
            "%f = arith.addf %e, %one : f32",
            "%g = arith.mulf %a, %f : f32",
            _times("%h", "%g", 0.5),
        )
    ),
    "gelu_pytorch_tanh": "\n".join(
        (
            "%a2 = arith.mulf %a, %a : f32",
            "%a3 = arith.mulf %a2, %a : f32",
            _times("%c", "%a3", 0.044715),
            "%d = arith.addf %a, %c : f32",
            _times("%x", "%d", math.sqrt(2 / math.pi)),
            "%e = math.tanh %x : f32",
            "%one = arith.constant 1.0 : f32",
            "%f = arith.addf %e, %one : f32",
            "%g = arith.mulf %a, %f : f32",
            _times("%h", "%g", 0.5),
        )
    ),
}
