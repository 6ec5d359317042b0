"""The graph in MIL's operators. Weights are float16 or become it; sums of layers, norms, rotations and softmax are float32.

A batch is static, and of what follows from the lengths alone is made only once a function. A cache is a state that a layer reads
once, changes, writes once, and goes on with what it has written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tapeout.exporters.coreml.program import Graph, Var, mil_name
from tapeout.models.decoder import Attention, Mla, Moe
from tapeout.models.graph import inside
from tapeout.models.rope import Rope, cos_sin

HIDDEN, NEXT = "hiddenStates", "nextHiddenStates"
"""What a part of a model that is cut takes from the one before it, and gives to the one behind it."""

LOWEST = -1e9
"""What is added to the score of a token that is not looked at: finite, so that a row of padding that sees nothing is no NaN."""


def builder() -> Any:
    """The class of coremltools that writes operators."""
    from coremltools.converters.mil.mil import Builder

    return Builder


@dataclass
class Emitter:
    """What the graphs of decoders and encoders have in common.

    Attributes:
        graph: whose function is being written.
        batch: sequences of a call.
    """

    graph: Graph
    batch: int
    _casts: dict[tuple[str, str], Var] = field(default_factory=dict)

    def _named(self, op: str, name: str, **inputs: Any) -> Var:
        """An operator whose output has the name of a value of the graph."""
        return getattr(builder(), op)(name=mil_name(name), **inputs)

    def half(self, x: Var) -> Var:
        """A value as float16."""
        return self._cast(x, "fp16")

    def wide(self, x: Var) -> Var:
        """A value as float32."""
        return self._cast(x, "fp32")

    def _cast(self, x: Var, kind: str, name: str = "") -> Var:
        from coremltools.converters.mil.mil import types

        if types.builtin_to_string(x.dtype) == kind:
            return x
        if (x.name, kind) not in self._casts:
            self._casts[x.name, kind] = builder().cast(x=x, dtype=kind, name=name or f"{x.name}_{kind}")
        return self._casts[x.name, kind]

    def _f32(self, value: float) -> np.float32:
        return np.float32(value)

    def embedding(self, name: str, ids: Var, weight: str, scale: float) -> Var:
        """Gather of the table that a tied head multiplies with."""
        rows = self._named("gather", f"{name}.rows", x=self.graph.matrix([weight]), indices=ids, axis=0)
        if scale == 1.0:
            return self._cast(rows, "fp32", mil_name(name))
        return self._named("mul", name, x=self.wide(rows), y=self._f32(scale))

    def linear(self, name: str, x: Var, weight: str, bias: str | None) -> Var:
        """Linear in float16, of a router in float32; a bias is added in float32."""
        matrix = self.graph.matrix([weight])
        of = self.wide(x) if self.graph.containers[weight] == "F32" else self.half(x)
        y = self._named("linear", f"{name}.product" if bias else name, x=of, weight=matrix)
        return self._named("add", name, x=self.wide(y), y=self.graph.vector(bias)) if bias else y

    def split(self, name: str, x: Var, sizes: Sequence[int]) -> tuple[Var, ...]:
        """Split."""
        found: Sequence[Var] = self._named("split", name, x=x, split_sizes=list(sizes), axis=-1)
        return tuple(found)

    def add(self, name: str, x: Var, y: Var) -> Var:
        """Add in float32: what layers add up may be beyond float16."""
        return self._named("add", name, x=self.wide(x), y=self.wide(y))

    def _act(self, name: str, x: Var, act: str) -> Var:
        """An activation by its Hugging Face name."""
        if act.startswith("gelu"):
            mode = "EXACT" if act == "gelu" else "TANH_APPROXIMATION"
            return self._named("gelu", name, x=x, mode=mode)
        return self._named(act, name, x=x)

    def _heads(self, x: Var, heads: int) -> Var:
        """[batch, tokens, heads · width] as [batch, tokens, heads, width]."""
        return builder().reshape(x=x, shape=[self.batch, -1, heads, x.shape[-1] // heads])

    def _joined(self, name: str, x: Var) -> Var:
        """[batch, heads, tokens, width] as [batch, tokens, heads · width]."""
        _, heads, _, width = x.shape
        x = builder().transpose(x=x, perm=[0, 2, 1, 3])
        return self._named("reshape", name, x=x, shape=[self.batch, -1, heads * width])

    def _rotate(self, x: Var, rope: Rope, cos: Var, sin: Var) -> Var:
        """Turn the first ``rope.dim`` elements of [batch, tokens, heads, width], float32.

        Pairs of neighbours come out as halves: queries and keys alike, whose products are the same in any order.
        """
        mb, width = builder(), x.shape[-1]
        if rope.interleaved:
            step = [1, 1, 1, 2]
            a = _last(x, 0, rope.dim, stride=step)
            b = _last(x, 1, rope.dim, stride=step)
        else:
            a, b = _last(x, 0, rope.dim // 2), _last(x, rope.dim // 2, rope.dim)
        parts = [
            mb.sub(x=mb.mul(x=a, y=cos), y=mb.mul(x=b, y=sin)),
            mb.add(x=mb.mul(x=b, y=cos), y=mb.mul(x=a, y=sin)),
        ]
        if width > rope.dim:
            parts.append(_last(x, rope.dim, width))
        return mb.concat(values=parts, axis=-1)


@dataclass
class DecoderOps(Emitter):
    """``Ops`` that writes a function; see ``tapeout.models.graph``.

    Attributes:
        context: most tokens of a sequence; a window that is not shorter is none.
        states: the caches, by name.
        places: of each layer, its place in its cache.
        one: the function is of one token.
    """

    context: int = 0
    states: dict[str, Var] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)
    one: bool = False
    mask: Var = None
    _tokens: Var = None  # of this call, int32 []
    _total: Var = None  # after this call
    _past: Var = None  # before it
    _positions: Var = None  # of this call's tokens, int32 [tokens]
    _made: dict[Any, Any] = field(default_factory=dict)

    def begin(self, inputs: Any) -> Var:
        """Take a function's inputs; give the token ids, or what the part before has made of them."""
        mb = builder()
        self.mask = inputs["fullAttentionMask"]
        self.states = {name: var for name, var in inputs.items() if name.endswith(("Cache", "Window"))}
        lengths = mb.shape(x=self.mask, name="lengths")
        self._total = _item(lengths, 3, "total")
        self._tokens = np.int32(1) if self.one else _item(lengths, 2, "tokens")
        self._past = mb.sub(x=self._total, y=self._tokens, name="past")
        if self.one:
            self._positions = mb.expand_dims(x=self._past, axes=[0], name="positions")
        else:
            self._positions = mb.range_1d(
                start=self._past, end=self._total, step=np.int32(1), name="positions"
            )
        return inputs["inputIds" if "inputIds" in inputs else HIDDEN]

    def hidden(self, x: Var) -> Var:
        """What the function of a part gives that is not the last: float32, as sums of layers are."""
        return builder().identity(x=x, name=NEXT)

    def logits(self, x: Var) -> Var:
        """What the function gives."""
        if x.name == "logits":
            return x
        return self._cast(x, "fp16", "logits")

    def rms_norm(self, name: str, x: Var, weight: str, *, eps: float, offset: float, parts: int = 1) -> Var:
        """In float32, where no square is too large."""
        mb, y = builder(), self.wide(x)
        if parts > 1:
            y = self._heads(y, parts)
        gamma = self.graph.vector(weight)
        if offset:
            gamma = self._once(
                ("gamma", weight),
                lambda: mb.add(x=gamma, y=self._f32(offset), name=mil_name(f"{weight}.shifted")),
            )
        mean = mb.reduce_mean(x=mb.square(x=y), axes=[-1], keep_dims=True)
        y = mb.mul(x=y, y=mb.rsqrt(x=mean, epsilon=self._f32(eps)))
        if parts == 1:
            return self._named("mul", name, x=y, y=gamma)
        y = mb.mul(x=y, y=gamma)
        return self._named("reshape", name, x=y, shape=[self.batch, -1, x.shape[-1]])

    def attention(self, name: str, query: Var, key: Var, value: Var, spec: Attention) -> Var:
        """Matmuls in float16 and softmax in float32; query heads that share a key head are rows of one matrix."""
        mb = builder()
        q, k = (
            self._turn(self._heads(self.wide(x), heads), spec.rope)
            for x, heads in ((query, spec.heads), (key, spec.kv_heads))
        )
        q = self.half(mb.mul(x=q, y=self._f32(spec.scale)))
        k = self._cast(k, "fp16", mil_name(inside(name, "rope")))
        q, k, v = (
            mb.transpose(x=x, perm=[0, 2, 1, 3]) for x in (q, k, self._heads(self.half(value), spec.kv_heads))
        )
        window = self._window(spec)
        cache = "Window" if window else ""
        shared = spec.heads // spec.kv_heads
        mask = self._mask(window, shared)
        k, v = (
            self._kept(f"{part}Cache{cache}", spec.layer, new, window)
            for part, new in (("key", k), ("value", v))
        )
        return self._joined(name, self._attend(name, q, k, v, spec, mask))

    def latent_attention(
        self, name: str, query: Var, latent: Var, key_rope: Var, weight: str, spec: Attention, mla: Mla
    ) -> Var:
        """One key head of latents, with the queries' half of ``weight`` in the queries.

        q · (W latent) = (Wᵀ q) · latent, and values are made after they are summed: no key or value of a head ever exists.
        """
        mb, heads = builder(), spec.heads
        q = mb.mul(x=self._heads(self.wide(query), heads), y=self._f32(spec.scale))
        plain = self.half(_last(q, 0, mla.nope_dim))
        turned = self.half(self._turn(_last(q, mla.nope_dim, mla.nope_dim + mla.rope_dim), spec.rope))
        plain, turned = (mb.transpose(x=x, perm=[0, 2, 1, 3]) for x in (plain, turned))
        of_keys, of_values = self._halves(weight, heads, mla)
        q = mb.concat(values=[mb.matmul(x=plain, y=of_keys), turned], axis=-1)
        key = self.half(self._turn(self._heads(self.wide(key_rope), 1), spec.rope))
        latent = self._heads(self.half(latent), 1)
        k = mb.transpose(x=mb.concat(values=[latent, key], axis=-1), perm=[0, 2, 1, 3])
        mask = self._mask(None, heads)
        k = self._kept("latentCache", spec.layer, k, None)
        v = _last(k, 0, mla.kv_rank)
        y = self._attend(name, q, k, v, spec, mask)
        return self._joined(name, mb.matmul(x=y, y=of_values, transpose_y=True))

    def _halves(self, weight: str, heads: int, mla: Mla) -> tuple[Var, Var]:
        """The rows of keys [1, heads, nope_dim, kv_rank] and of values [1, heads, v_dim, kv_rank] of ``kv_b_proj``."""
        rows = np.arange(heads * (mla.nope_dim + mla.v_dim)).reshape(heads, -1)
        found = []
        for part, taken in (("keys", rows[:, : mla.nope_dim]), ("values", rows[:, mla.nope_dim :])):
            shape = (1, heads, taken.shape[1], mla.kv_rank)
            found.append(self.graph.matrix([weight], shape, taken.reshape(-1), f".{part}"))
        return found[0], found[1]

    def _attend(self, name: str, q: Var, k: Var, v: Var, spec: Attention, mask: Var) -> Var:
        """Queries [batch, heads, tokens, width] look at keys [batch, key heads, kept, width]: [batch, heads, tokens, v width]."""
        mb = builder()
        _, heads, _, width = q.shape
        key_heads = k.shape[1]
        q = mb.reshape(x=q, shape=[self.batch, key_heads, -1, width])
        scores = self.wide(mb.matmul(x=q, y=k, transpose_y=True))
        if spec.softcap is not None:
            scores = mb.tanh(x=mb.mul(x=scores, y=self._f32(1 / spec.softcap)))
            scores = mb.mul(x=scores, y=self._f32(spec.softcap))
        scores = self._named("add", inside(name, "scores"), x=scores, y=mask)
        y = mb.matmul(x=self.half(mb.softmax(x=scores, axis=-1)), y=v)
        return mb.reshape(x=y, shape=[self.batch, heads, -1, v.shape[-1]])

    def _window(self, spec: Attention) -> int | None:
        return spec.window if spec.window and spec.window < self.context else None

    def _kept(self, cache: str, layer: int, new: Var, window: int | None) -> Var:
        """Put new keys or values [batch, heads, tokens, width] into a layer's cache; give what these tokens may look at."""
        mb, state = builder(), self.states[cache]
        _, batch, heads, slots, width = (int(n) for n in state.sym_type.wrapped_type().get_shape())
        at = self.places[layer]
        old = mb.read_state(input=state, name=mil_name(f"{cache}.{layer}.read"))

        def ends(begin: Any, end: Any) -> tuple[Any, Any]:
            """Corners of a layer's part of the cache, by slots."""
            if isinstance(end, int):
                return [at, 0, 0, begin, 0], [at + 1, batch, heads, end, width]
            first = [np.int32(at), np.int32(0), np.int32(0), begin, np.int32(0)]
            last = [np.int32(n) for n in (at + 1, batch, heads)] + [end, np.int32(width)]
            return mb.concat(values=first, axis=0), mb.concat(values=last, axis=0)

        def taken(x: Var, end: Any) -> Var:
            _, end = ends(0 if isinstance(end, int) else np.int32(0), end)
            return mb.slice_by_index(
                x=x, begin=[at, 0, 0, 0, 0], end=end, end_mask=[False, True, True, False, True],
                squeeze_mask=[True] + [False] * 4,
            )  # fmt: skip

        def put(x: Var, begin: Any, end: Any) -> Var:
            begin, end = ends(begin, end)
            x = mb.expand_dims(x=x, axes=[0])
            written = mb.slice_update(
                x=old, update=x, begin=begin, end=end, name=mil_name(f"{cache}.{layer}")
            )
            mb.coreml_update_state(state=state, value=written)
            return written

        if window is None:
            return taken(put(new, self._past, self._total), self._total)
        ring = self._ring(window)
        if self.one:
            return taken(put(new, ring.slot, ring.behind), slots)
        both = mb.concat(values=[taken(old, slots), new], axis=2)
        put(mb.gather(x=both, indices=ring.sources, axis=2), 0, slots)
        return both

    def _ring(self, window: int) -> Ring:
        """Where the tokens of a window are: position p in slot p mod window."""

        def make() -> Ring:
            mb = builder()
            slots = self.graph.constant(np.arange(window, dtype=np.int32), f"slots_{window}")

            def latest(last: Var, name: str) -> Var:
                """The position in each slot when ``last`` is the last one; below zero where there is none yet."""
                # Never a negative number's remainder, on whose sign runtimes do not agree.
                back = mb.add(x=mb.sub(x=last, y=slots), y=np.int32(window))
                return mb.sub(x=last, y=mb.mod(x=back, y=np.int32(window)), name=name)

            newest = mb.sub(x=self._total, y=np.int32(1))
            after = latest(newest, f"window_{window}_after")
            if self.one:
                slot = mb.mod(x=self._past, y=np.int32(window))
                return Ring(after, None, slot, mb.add(x=slot, y=np.int32(1)))
            before = latest(mb.sub(x=self._past, y=np.int32(1)), f"window_{window}_before")
            # Behind the ring stand the new ones: each slot takes the new token that falls into it last, or keeps its own.
            new = mb.add(x=mb.sub(x=after, y=self._past), y=np.int32(window))
            is_new = mb.greater_equal(x=after, y=self._past)
            sources = mb.select(cond=is_new, a=new, b=slots, name=f"window_{window}_sources")
            positions = mb.concat(values=[before, self._positions], axis=0, name=f"window_{window}_positions")
            return Ring(positions, sources, None, None)

        found: Ring = self._once(("ring", window), make)
        return found

    def _mask(self, window: int | None, shared: int) -> Var:
        """What is added to scores, float32 [batch, 1, shared · tokens, kept]: the caller's mask, causality and the window."""

        def make() -> Var:
            mb = builder()
            name = f"mask_{window}" if window else "mask"
            given = self.mask
            if window is None:
                columns = None
                if not self.one:
                    columns = mb.range_1d(
                        start=np.int32(0), end=self._total, step=np.int32(1), name="columns"
                    )
            else:
                columns = self._ring(window).positions
                known = mb.maximum(x=columns, y=np.int32(0))
                given = mb.gather(x=given, indices=known, axis=3)
            mask = mb.maximum(x=self.wide(given), y=self._f32(LOWEST))
            hidden = []
            if window is not None:
                hidden.append(mb.less(x=columns, y=np.int32(0)))  # slots that no token has yet
            if not self.one:
                rows = mb.expand_dims(x=self._positions, axes=[1])
                columns = mb.expand_dims(x=columns, axes=[0])
                hidden.append(mb.greater(x=columns, y=rows))
                if window is not None:
                    first = mb.sub(x=rows, y=np.int32(window))
                    hidden.append(mb.less_equal(x=columns, y=first))
            for each in hidden:
                added = mb.mul(x=mb.cast(x=each, dtype="fp32"), y=self._f32(LOWEST))
                mask = mb.add(x=mask, y=added)
            if shared > 1:
                mask = mb.tile(x=mask, reps=[1, 1, shared, 1], name=f"{name}_of_{shared}")
            return mask

        return self._once(("mask", window, shared), make)

    def _turn(self, x: Var, rope: Rope) -> Var:
        cos, sin = self._angles(rope)
        return self._rotate(x, rope, cos, sin)

    def _angles(self, rope: Rope) -> tuple[Var, Var]:
        """Cosine and sine of this call's positions, float32 [tokens, 1, dim / 2], from tables of every position."""
        mb = builder()

        def make() -> tuple[Var, Var]:
            trained = int(rope.parameters.get("original_max_position_embeddings", self.context))
            two = rope.kind == "longrope" and trained < self.context
            positions = np.arange(self.context)
            tables = [cos_sin(rope, positions, 0)]
            if two:  # the factors of sequences beyond the trained length, behind the others
                tables.append(cos_sin(rope, positions, self.context))
            number = sum(key[0] == "rope" for key in self._made)
            at = self._positions
            if two:
                long = mb.cast(x=mb.greater(x=self._total, y=np.int32(trained)), dtype="int32")
                at = mb.add(x=at, y=mb.mul(x=long, y=np.int32(self.context)), name=f"rope_{number}_rows")
            found = []
            for part, each in zip(("cos", "sin"), zip(*tables, strict=True), strict=True):
                table = self.graph.constant(np.concatenate(each), f"rope_{number}_{part}")
                rows = mb.gather(x=table, indices=at, axis=0)
                found.append(mb.expand_dims(x=rows, axes=[1]))
            return found[0], found[1]

        found: tuple[Var, Var] = self._once(("rope", rope.theta, rope.kind, _frozen(rope)), make)
        return found

    def gated(self, name: str, gate: Var, up: Var, act: str) -> Var:
        """An activation and a Mul, in float16."""
        y = self._act(f"{name}.act", self.half(gate), act)
        return self._named("mul", name, x=y, y=self.half(up))

    def route(self, name: str, logits: Var, bias: str | None, moe: Moe) -> Var:
        """Each token's weight of each expert, float32 [batch, tokens, experts]: 0 of those that it does not take."""
        mb, x = builder(), self.wide(logits)
        scores = mb.softmax(x=x, axis=-1) if moe.scoring == "softmax" else mb.sigmoid(x=x)
        choice = mb.add(x=scores, y=self.graph.vector(bias)) if bias else scores
        if moe.groups > 1:
            each = moe.experts // moe.groups
            grouped = mb.reshape(x=choice, shape=[self.batch, -1, moe.groups, each])
            best = min(2 if moe.group_score == "top2" else 1, each)
            value = mb.reduce_sum(x=self._best(grouped, best)[0], axes=[-1])
            out = mb.sub(x=self._chosen(value, moe.top_groups, moe.groups), y=self._f32(1))
            out = mb.expand_dims(x=mb.mul(x=out, y=self._f32(-LOWEST)), axes=[-1])
            choice = mb.reshape(x=mb.add(x=grouped, y=out), shape=[self.batch, -1, moe.experts])
        weights = mb.mul(x=scores, y=self._chosen(choice, moe.top_k, moe.experts))
        if moe.renormalize:
            weights = mb.real_div(x=weights, y=mb.reduce_sum(x=weights, axes=[-1], keep_dims=True))
        return self._named("mul", name, x=weights, y=self._f32(moe.scale))

    def _best(self, x: Var, count: int) -> tuple[Var, Var]:
        values, indices = builder().topk(x=x, k=count, axis=-1, ascending=False)
        return values, indices

    def _chosen(self, x: Var, count: int, of: int) -> Var:
        """1 for the ``count`` largest of the last axis, 0 for the others."""
        ones = builder().one_hot(
            indices=self._best(x, count)[1], one_hot_vector_size=of, axis=-1,
            on_value=self._f32(1), off_value=self._f32(0),
        )  # fmt: skip
        return builder().reduce_sum(x=ones, axes=[-2])

    def experts(self, name: str, x: Var, routing: Var, layer: int, act: str, moe: Moe) -> Var:
        """All experts on all tokens, as one matmul each of gate, up and down; most weights are 0."""
        mb = builder()
        hidden = int(x.shape[-1])
        names = [moe.weights(layer, expert) for expert in range(moe.experts)]
        gate, up, down = (self.graph.matrix(part) for part in zip(*names, strict=True))
        rows = mb.reshape(x=self.half(x), shape=[1, -1, hidden])
        inner = self.gated(
            f"{name}.inner",
            mb.matmul(x=rows, y=gate, transpose_y=True),
            mb.matmul(x=rows, y=up, transpose_y=True),
            act,
        )
        out = self.wide(mb.matmul(x=inner, y=down, transpose_y=True))
        share = mb.transpose(x=mb.reshape(x=routing, shape=[-1, moe.experts, 1]), perm=[1, 0, 2])
        out = mb.reduce_sum(x=mb.mul(x=out, y=share), axes=[0])
        return self._named("reshape", name, x=out, shape=[self.batch, -1, hidden])

    def sigmoid_gate(self, name: str, x: Var, logit: Var) -> Var:
        """Sigmoid and Mul, in float32."""
        return self._named("mul", name, x=self.wide(x), y=builder().sigmoid(x=self.wide(logit)))

    def softcap(self, name: str, x: Var, cap: float) -> Var:
        """Mul, Tanh, Mul, in float32."""
        mb = builder()
        y = mb.tanh(x=mb.mul(x=self.wide(x), y=self._f32(1 / cap)))
        return self._named("mul", f"{name}.wide" if name == "logits" else name, x=y, y=self._f32(cap))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What a function needs once."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@dataclass(frozen=True)
class Ring:
    """Where the tokens of a window are.

    Attributes:
        positions: of what these tokens may look at, int32 [kept]: below zero where there is none.
        sources: for each slot, where in the ring and the new tokens behind it stands what it takes, int32 [window].
        slot, behind: of one token its slot, and the next one.
    """

    positions: Var
    sources: Var
    slot: Var
    behind: Var


def _last(x: Var, begin: int, end: int, stride: Sequence[int] | None = None) -> Var:
    """A slice of the last of four axes."""
    found: Var = builder().slice_by_index(
        x=x, begin=[0, 0, 0, begin], end=[0, 0, 0, end], stride=stride,
        begin_mask=[True, True, True, False], end_mask=[True, True, True, False],
    )  # fmt: skip
    return found


def _item(x: Var, index: int, name: str) -> Var:
    return builder().slice_by_index(x=x, begin=[index], end=[index + 1], squeeze_mask=[True], name=name)


def _frozen(rope: Rope) -> str:
    return f"{dict(rope.parameters)!r} {rope.dim} {rope.interleaved}"


def state_shapes(
    config: Any, context: int, batch: int, layers: Sequence[int]
) -> tuple[dict[str, tuple[int, ...]], dict[int, int]]:
    """The caches of a decoder by name, and each layer's place in its own.

    A window that is not shorter than the context is none.
    """
    places: dict[int, int] = {}
    counts = {"": 0, "Window": 0}
    window = config.sliding_window
    for layer in layers:
        each = config.window(layer)
        kind = "Window" if each and each < context else ""
        places[layer] = counts[kind]
        counts[kind] += 1
    if config.mla:
        width = config.mla.kv_rank + config.mla.rope_dim
        return {"latentCache": (len(places), batch, 1, context, width)}, places
    states: dict[str, tuple[int, ...]] = {}
    for kind, count in counts.items():
        for part in ("key", "value") if count else ():
            slots = window if kind else context
            states[f"{part}Cache{kind}"] = (count, batch, config.num_kv_heads, int(slots), config.head_dim)
    return states, places


def nbytes(states: dict[str, tuple[int, ...]]) -> int:
    """Bytes of caches, float16."""
    return sum(2 * math.prod(shape) for shape in states.values())
