"""What every dialect of the graph has in common: its interface, what is written late, and what is composed of standard operators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tapeout.exporters.onnx.blocks import NBits
from tapeout.exporters.onnx.graph import Graph, library
from tapeout.models.decoder import Attention, Mla, Moe, Role
from tapeout.models.rope import Rope, cos_sin

FIRST_LOGITS = "first_logits"


@dataclass
class Sum:
    """A sum that is written as an Add when something other than a norm asks for it first."""

    name: str
    x: str
    y: str
    written: bool = False


@dataclass
class Product:
    """A linear whose node is written when it is asked for alone: attention takes those of one input together.

    Attributes:
        name, x, weight, bias: see ``Ops.linear``.
        container: of the weight.
        write: writes the node.
    """

    name: str
    x: str
    weight: str
    bias: str | None
    container: NBits
    write: Callable[[], str]
    written: bool = False


@dataclass(frozen=True)
class Cut:
    """One piece of a value that is cut along its last axis; ``pieces`` is what all of them share."""

    pieces: Pieces
    index: int


@dataclass
class Pieces:
    """A value and the sizes that it is cut into; written when a piece is asked for alone."""

    name: str
    x: str
    sizes: tuple[int, ...]
    written: bool = False


@dataclass(frozen=True)
class Routing:
    """What ``route`` gives: both [tokens, experts], zero for the experts that a token does not take.

    Attributes:
        weights: what an expert's output is multiplied by.
        ranks: top_k for the best expert, and so on down to 1.
    """

    weights: str
    ranks: str


Value = str | Sum | Product | Cut | Routing

Run = Callable[[str, str, str], str]
"""Runs one expert: a name for what it gives, rows [tokens, hidden], the activation."""


@dataclass
class Emitter(ABC):
    """The part of ``Ops`` (see ``tapeout.models.graph``) that is the same whatever the operators are.

    Attributes:
        graph: where the nodes go.
        context: most tokens of a sequence; a window that is not shorter is none.
        exact: leave inputs of quantized matmuls as they are, for a runtime's arithmetic apart from the lowered numbers.
    """

    graph: Graph
    context: int
    exact: bool = False
    _ropes: list[Rope] = field(default_factory=list)

    def ids(self) -> str:
        """Declare what every step is given, and what follows from it."""
        onnx = library()
        info, kinds = onnx.helper.make_tensor_value_info, onnx.TensorProto
        g = self.graph
        g.inputs += [
            info("input_ids", kinds.INT64, ["batch", "tokens"]),
            info("attention_mask", kinds.INT64, ["batch", "total"]),
            # With an initializer of its name, so that it may be left out.
            info(FIRST_LOGITS, kinds.INT64, [1]),
        ]
        g.constant(FIRST_LOGITS, np.zeros(1, np.int64))
        g.constant("one", np.ones(1, np.int64))
        lengths = g.node("ReduceSum", ["attention_mask", "one"], "lengths", keepdims=0)
        lengths = g.node("Cast", [lengths], "lengths.int32", to=kinds.INT32)
        g.node("Sub", [lengths, g.constant("one.int32", np.ones((), np.int32))], "last_position")
        total = g.node("Shape", ["attention_mask"], "total", start=1, end=2)
        total = g.node("Cast", [total], "total.int32", to=kinds.INT32)
        g.node("Squeeze", [total], "total_length")
        return "input_ids"

    def logits(self, value: Value) -> None:
        """Declare what every step gives."""
        onnx = library()
        name, vocab = self._use(value), self.graph.quant.model.config.vocab_size
        self.graph.outputs.insert(
            0,
            onnx.helper.make_tensor_value_info(
                name, onnx.TensorProto.FLOAT, ["batch", "logits_tokens", vocab]
            ),
        )

    @abstractmethod
    def linear(self, name: str, x: Value, weight: str, bias: str | None) -> Value:
        """See ``Ops``."""

    @abstractmethod
    def gated(self, name: str, gate: Value, up: Value, act: str) -> str:
        """See ``Ops``."""

    @abstractmethod
    def _turn(self, name: str, x: str, heads: int, rope: Rope) -> str:
        """RoPE of x [batch, tokens, heads * width]."""

    @abstractmethod
    def _attend_latents(self, name: str, query: str, key: str, latent: str, spec: Attention, mla: Mla) -> str:
        """Attention of queries [.., heads * (kv_rank + rope_dim)] over one key head: sums of latents [.., heads * kv_rank]."""

    def latent_attention(
        self, name: str, query: Value, latent: Value, key_rope: Value, weight: str, spec: Attention, mla: Mla
    ) -> str:
        """One key head of latents, with the queries' half of ``weight`` in the queries.

        q · (W latent) = (Wᵀ q) · latent, and values are made after they are summed: no key or value of a head ever exists.
        """
        g, heads = self.graph, spec.heads

        def at(part: str) -> str:
            return f"{name}.{part}"

        # Float32, since no kernel multiplies parts of rows of codes by each head.
        if g.quant.schemes[weight].kind != "none":
            g.note("kv_b_proj is float32: its halves are multiplied apart")
        whole = self._shaped(
            self._of_latents(weight), (heads, mla.nope_dim + mla.v_dim, mla.kv_rank), at("kv_b")
        )
        of_keys, of_values = self._cut(
            whole, (mla.nope_dim, mla.v_dim), at("kv_b.keys"), at("kv_b.values"), 1
        )
        q = self._shaped(self._use(query), (0, 0, heads, mla.nope_dim + mla.rope_dim), at("q"))
        plain, turned = self._cut(q, (mla.nope_dim, mla.rope_dim), at("q.plain"), at("q.rope"), 3)
        turned = self._turn(
            at("q.turned"), self._shaped(turned, (0, 0, -1), at("q.rope.flat")), heads, spec.rope
        )
        plain = g.node("Transpose", [plain], at("q.heads"), perm=[0, 2, 1, 3])
        plain = g.node("MatMul", [plain, of_keys], at("q.latent.heads"))
        plain = g.node("Transpose", [plain], at("q.latent"), perm=[0, 2, 1, 3])
        turned = self._shaped(turned, (0, 0, heads, mla.rope_dim), at("q.turned.heads"))
        q = self._shaped(g.node("Concat", [plain, turned], at("q.whole"), axis=3), (0, 0, -1), at("q.flat"))
        latent, key = self._use(latent), self._turn(at("k.turned"), self._use(key_rope), 1, spec.rope)
        k = g.node("Concat", [latent, key], at("k"), axis=2)
        y = self._attend_latents(at("latents"), q, k, latent, spec, mla)
        y = self._shaped(y, (0, 0, heads, mla.kv_rank), at("latents.split"))
        y = g.node("Transpose", [y], at("latents.turned"), perm=[0, 2, 1, 3])
        of_values = g.node("Transpose", [of_values], at("kv_b.values.turned"), perm=[0, 2, 1])
        y = g.node(
            "Transpose", [g.node("MatMul", [y, of_values], at("heads"))], at("tokens"), perm=[0, 2, 1, 3]
        )
        return self._shaped(y, (0, 0, -1), name)

    def _of_latents(self, weight: str) -> str:
        return self.graph.vector(weight)

    def _cut(self, x: str, sizes: tuple[int, int], first: str, second: str, axis: int) -> tuple[str, str]:
        given = self.graph.constant(f"sizes.{sizes[0]}.{sizes[1]}", np.array(sizes))
        self.graph.node("Split", [x, given], f"{first}.split", [first, second], axis=axis)
        return first, second

    def _shaped(self, x: str, shape: Sequence[int], name: str) -> str:
        given = self.graph.constant(f"shape.{'.'.join(map(str, shape))}", np.array(shape))
        return self.graph.node("Reshape", [x, given], name)

    def split(self, name: str, x: Value, sizes: Sequence[int]) -> tuple[Value, ...]:
        """Nothing yet: attention takes the pieces together."""
        pieces = Pieces(name, self._use(x), tuple(sizes))
        return tuple(Cut(pieces, index) for index in range(len(sizes)))

    def route(self, name: str, logits: Value, bias: str | None, moe: Moe) -> Routing:
        """Both matrices of a Routing; on equal scores TopK takes the lower number."""
        g = self.graph

        def at(part: str) -> str:
            return f"{name}.{part}"

        flat = g.constant("rows.experts", np.array([-1, moe.experts]))
        x = g.node("Reshape", [self._use(logits), flat], at("logits"))
        scores = (
            g.node("Softmax", [x], at("scores"), axis=-1)
            if moe.scoring == "softmax"
            else g.node("Sigmoid", [x], at("scores"))
        )
        choice = g.node("Add", [scores, g.vector(bias)], at("choice")) if bias else scores
        zero = g.constant("zero", np.zeros(1, np.float32))
        none = g.node("Expand", [zero, g.node("Shape", [scores], at("shape"))], at("none"))
        if moe.groups > 1:
            choice = self._grouped(name, choice, moe)
        count = g.constant("top_k", np.array([moe.top_k]))
        _, chosen = at("best"), at("chosen")
        g.node("TopK", [choice, count], at("top"), [at("best"), chosen], axis=-1)
        weights = g.node("GatherElements", [scores, chosen], at("shares"), axis=1)
        if moe.renormalize:
            total = g.node(
                "ReduceSum", [weights, g.constant("last", np.array([-1]))], at("total"), keepdims=1
            )
            weights = g.node("Div", [weights, total], at("normed"))
        if moe.scale != 1.0:
            weights = self._times(at("scaled"), weights, moe.scale)
        order = g.constant("ranks", np.arange(moe.top_k, 0, -1, dtype=np.float32)[None])
        order = g.node("Expand", [order, g.node("Shape", [chosen], at("chosen.shape"))], at("order"))
        return Routing(
            g.node("ScatterElements", [none, chosen, weights], at("weights"), axis=1),
            g.node("ScatterElements", [none, chosen, order], at("ranks"), axis=1),
        )

    def _grouped(self, name: str, choice: str, moe: Moe) -> str:
        """Scores of the experts of the best groups; the others' become -inf."""
        g = self.graph

        def at(part: str) -> str:
            return f"{name}.groups.{part}"

        each = moe.experts // moe.groups
        shape = g.constant("rows.groups", np.array([-1, moe.groups, each]))
        x = g.node("Reshape", [choice, shape], at("scores"))
        best = g.constant("best_of_group", np.array([min(2 if moe.group_score == "top2" else 1, each)]))
        g.node("TopK", [x, best], at("top"), [at("best"), at("best.at")], axis=-1)
        value = g.node("ReduceSum", [at("best"), g.constant("last", np.array([-1]))], at("value"), keepdims=0)
        dropped = g.constant("dropped_groups", np.array([moe.groups - moe.top_groups]))
        # The worst, of equal ones the last: the best of the negated and reversed.
        backwards = g.constant("backwards", np.arange(moe.groups)[::-1].copy())
        reverse = g.node("Gather", [g.node("Neg", [value], at("negated")), backwards], at("reversed"), axis=1)
        g.node("TopK", [reverse, dropped], at("worst"), [at("worst.value"), at("worst.at")], axis=-1)
        worst = g.node("Gather", [backwards, at("worst.at")], at("dropped"))
        zero = g.constant("zero", np.zeros(1, np.float32))
        none = g.node("Expand", [zero, g.node("Shape", [value], at("shape"))], at("none"))
        low = g.constant("minus_infinity", np.full((1, 1), -np.inf, np.float32))
        low = g.node("Expand", [low, g.node("Shape", [worst], at("dropped.shape"))], at("low"))
        mask = g.node("ScatterElements", [none, worst, low], at("mask"), axis=1)
        mask = g.node("Unsqueeze", [mask, g.constant("last", np.array([-1]))], at("mask.wide"))
        x = g.node("Add", [x, mask], at("kept"))
        return g.node("Reshape", [x, g.constant("rows.experts", np.array([-1, moe.experts]))], at("choice"))

    def _apart(self, names: tuple[str, str, str]) -> Run:
        """Run one expert on rows, by its own tensors."""

        def run(at: str, rows: str, act: str) -> str:
            gate, up = (
                self.linear(f"{at}.{part}", rows, name, None)
                for part, name in zip(("gate", "up"), names[:2], strict=True)
            )
            inner = self.gated(f"{at}.inner", gate, up, act)
            return self._use(self.linear(f"{at}.down", inner, names[2], None))

        return run

    def _one_by_one(self, name: str, x: str, routing: Routing, runs: Sequence[Run], act: str) -> str:
        """Each expert on the tokens that take it; none takes no time."""
        g, hidden = self.graph, self.graph.quant.model.config.hidden_size
        rows = g.node("Reshape", [x, g.constant("rows.hidden", np.array([-1, hidden]))], f"{name}.rows")
        zero = g.constant("zero", np.zeros(1, np.float32))
        out = g.node("Expand", [zero, g.node("Shape", [rows], f"{name}.shape")], f"{name}.none")
        for expert, run in enumerate(runs):
            at = f"{name}.{expert}"
            share = g.node(
                "Gather",
                [routing.weights, g.constant(f"index.{expert}", np.array(expert))],
                f"{at}.shares",
                axis=1,
            )
            taken = g.node("NonZero", [share], f"{at}.nonzero")
            taken = g.node("Squeeze", [taken, g.constant("first", np.array([0]))], f"{at}.tokens")
            mine = run(at, g.node("Gather", [rows, taken], f"{at}.rows"), act)
            last = g.constant("last", np.array([-1]))
            weight = g.node(
                "Unsqueeze", [g.node("Gather", [share, taken], f"{at}.share"), last], f"{at}.weight"
            )
            mine = g.node("Mul", [mine, weight], f"{at}.weighted")
            where = g.node("Unsqueeze", [taken, last], f"{at}.at")
            out = g.node("ScatterND", [out, where, mine], f"{at}.sum", reduction="add")
        return g.node("Reshape", [out, g.node("Shape", [x], f"{name}.whole")], name)

    def sigmoid_gate(self, name: str, x: Value, logit: Value) -> str:
        """Sigmoid and Mul."""
        gate = self.graph.node("Sigmoid", [self._use(logit)], f"{name}.gate")
        return self.graph.node("Mul", [self._use(x), gate], name)

    def add(self, name: str, x: Value, y: Value) -> Sum:
        """Nothing yet: a norm takes the sum with it."""
        return Sum(name, self._use(x), self._use(y))

    def softcap(self, name: str, x: Value, cap: float) -> str:
        """Mul, Tanh, Mul."""
        y = self._times(f"{name}.small", self._use(x), 1 / cap)
        return self._times(name, self.graph.node("Tanh", [y], f"{name}.tanh"), cap)

    def _use(self, value: Value) -> str:
        """The name of a value, which is written now if it is not yet."""
        if isinstance(value, Sum):
            if not value.written:
                value.written = True
                self.graph.node("Add", [value.x, value.y], value.name)
            return value.name
        if isinstance(value, Product):
            if not value.written:
                value.written = True
                value.write()
            return value.name
        if isinstance(value, Cut):
            pieces = value.pieces
            names = [f"{pieces.name}.{index}" for index in range(len(pieces.sizes))]
            if not pieces.written:
                pieces.written = True
                sizes = self.graph.constant(
                    f"sizes.{'.'.join(map(str, pieces.sizes))}", np.array(pieces.sizes, np.int64)
                )
                self.graph.node("Split", [pieces.x, sizes], pieces.name, names, axis=-1)
            return names[value.index]
        assert isinstance(value, str)
        return value

    def _shape(self, weight: str) -> tuple[int, int]:
        out, into = self.graph.quant.model.specs[weight].shape
        return out, into

    def _float32(self, x: str, name: str) -> str:
        return self.graph.node("Cast", [x], name, to=library().TensorProto.FLOAT)

    def _once(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """A node that another use may have written already."""
        if name not in self.graph.names:
            self.graph.node(op, inputs, name, **attributes)
        return name

    def _times(self, name: str, x: str, factor: float) -> str:
        by = self.graph.constant(f"{name}.factor", np.array(factor, np.float32))
        return self.graph.node("Mul", [x, by], name)

    def _cache(self, layer: int, heads: int, widths: tuple[int, int], window: int | None) -> list[str]:
        """Declare a layer's cache: past key and value, present key and value."""
        onnx = library()
        length = f"window_{window}" if window else "past"
        names = []
        for way, prefix in ((self.graph.inputs, "past_key_values"), (self.graph.outputs, "present")):
            for part, width in zip(("key", "value"), widths, strict=True):
                kept = length if way is self.graph.inputs or window else "kept"
                shape = ["batch", heads, kept, width]
                names.append(f"{prefix}.{layer}.{part}")
                way.append(onnx.helper.make_tensor_value_info(names[-1], onnx.TensorProto.FLOAT, shape))
        return names

    def _rope(self, rope: Rope, *, always: bool) -> tuple[str, str, str | None]:
        """Tables of cosine and sine [positions, dim / 2], and positions [batch, tokens] where the kernel's own do not do."""
        trained = int(rope.parameters.get("original_max_position_embeddings", self.context))
        two = rope.kind == "longrope" and trained < self.context
        if rope not in self._ropes:
            positions = np.arange(self.context)
            tables = [cos_sin(rope, positions, 0)]
            if two:  # the factors of sequences beyond the trained length, behind the others
                tables.append(cos_sin(rope, positions, self.context))
            at = f"rope.{len(self._ropes)}"
            for part, each in zip(("cos", "sin"), zip(*tables, strict=True), strict=True):
                self.graph.table(f"{at}.{part}", np.concatenate(each))
            self._ropes.append(rope)
        at = f"rope.{self._ropes.index(rope)}"
        position = self._positions(at, trained if two else None) if two or always else None
        return f"{at}.cos", f"{at}.sin", position

    def _positions(self, at: str, trained: int | None) -> str:
        """Rows of the tables, int64 [batch, tokens]."""
        g = self.graph
        if not any(node.name == "positions" for node in g.nodes):
            count = g.node("Shape", ["input_ids"], "tokens", start=1, end=2)
            g.node("Squeeze", [count], "token_count")

            first = g.node("Sub", ["lengths", count], "first_position.signed")
            first = g.node("Max", [first, g.constant("zero.int64", np.zeros(1, np.int64))], "first_position")
            first = g.node("Unsqueeze", [first, "one"], "first_position.column")
            steps = g.node(
                "Range",
                [g.constant("from", np.array(0)), "token_count", g.constant("step", np.array(1))],
                "steps",
            )
            g.node("Add", [first, steps], "positions")
        if trained is None:
            return "positions"
        name = f"{at}.positions"
        if not any(node.name == name for node in g.nodes):
            long = g.node(
                "Greater", ["total", g.constant(f"{at}.trained", np.array([trained]))], f"{at}.is_long"
            )
            places = (
                g.constant(f"{at}.table", np.array([self.context])),
                g.constant("zero.int64", np.zeros(1, np.int64)),
            )
            g.node("Add", ["positions", g.node("Where", [long, *places], f"{at}.offset")], name)
        return name

    def _wanted(self, name: str, x: Value) -> str:
        """The input of the head: of the tokens alone whose logits are wanted. Any other matmul's as it is."""
        x = self._use(x)
        if name not in ("logits", "head"):
            return x
        self.graph.constant("to_the_end", np.array([np.iinfo(np.int64).max]))
        return self.graph.node("Slice", [x, FIRST_LOGITS, "to_the_end", "one"], "wanted")

    def _gamma(self, weight: str, offset: float) -> str:
        """The weight of a norm, as it is in the file, and what is added to it."""
        gamma = self.graph.vector(weight)
        if not offset:
            return gamma
        plus = self.graph.constant("norm_offset", np.array([offset], np.float32))
        return self.graph.node("Add", [gamma, plus], f"{weight}.shifted")

    def _rms(self, name: str, x: str, gamma: str, eps: float, parts: int) -> str:
        if parts == 1:
            return self.graph.node("RMSNormalization", [x, gamma], name, axis=-1, epsilon=eps)
        split = self.graph.constant(f"heads.{parts}", np.array([0, 0, parts, -1]))
        y = self.graph.node("Reshape", [x, split], f"{name}.split")
        y = self.graph.node("RMSNormalization", [y, gamma], f"{name}.heads", axis=-1, epsilon=eps)
        return self.graph.node(
            "Reshape", [y, self.graph.constant("heads.joined", np.array([0, 0, -1]))], name
        )

    def _matrix(self, weight: str) -> str:
        """A float matrix [out, in] as float32; what is made of constants is made when the model is loaded."""
        if self.graph.quant.model.specs[weight].role is Role.ROUTER:
            return self.graph.vector(weight)
        matrix = self.graph.floats(weight)
        if self.graph.is_float32(matrix):
            return matrix
        wide = f"{weight}.float32"
        written = any(node.name == wide for node in self.graph.nodes)
        return wide if written else self._float32(matrix, wide)
