"""The graph in onnxruntime's own operators, which its CPU kernels are fast in: one node a primitive wherever there is one.

The interface is the one that onnxruntime-genai knows: ``input_ids`` and ``attention_mask`` in, ``logits`` out, ``past_key_values.N.key``
and ``present.N.key`` (and ``value``) of every layer, which may be the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tapeout.errors import ModelError
from tapeout.exporters.onnx.blocks import Bnb4, Container, Float8, NBits, block_of
from tapeout.exporters.onnx.graph import DOMAIN, Graph, library
from tapeout.models.decoder import Attention, Mla, Moe, Role
from tapeout.models.rope import Rope, cos_sin

OPSET = 23
FIRST_LOGITS = "first_logits"


@dataclass
class Sum:
    """A sum that is written as an Add when something other than a norm asks for it first."""

    name: str
    x: str
    y: str
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


Value = str | Sum | Cut | Routing


@dataclass
class ContribOps:
    """``Ops`` that writes nodes; see ``tapeout.models.graph``.

    Attributes:
        graph: where they go.
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

    def embedding(self, name: str, ids: Value, weight: str, scale: float) -> str:
        """GatherBlockQuantized of the table that a tied head multiplies with; of NF4 and FP8, row by row."""
        out = name if scale == 1.0 else f"{name}.rows"
        container = self.graph.container(weight)
        if container is None:
            table = self.graph.floats(weight)
            if self.graph.is_float32(table):
                y = self.graph.node("Gather", [table, self._use(ids)], out)
            else:
                y = self.graph.node("Gather", [table, self._use(ids)], f"{out}.narrow")
                y = self._float32(y, out)
        elif isinstance(container, NBits):
            codes, *rest = self._parts(weight, container)
            rows = self.graph.view(
                f"{weight}.rows", codes, container.shapes(*self._shape(weight))["codes"][1]
            )
            y = self.graph.node(
                "GatherBlockQuantized", [rows, self._use(ids), *rest], out, domain=DOMAIN,
                bits=container.bits, block_size=container.block, gather_axis=0, quantize_axis=1,
            )  # fmt: skip
        else:
            raise ModelError(
                f"{weight} is an embedding; onnxruntime looks up no {container.kind}. What fits: int8."
            )
        return y if scale == 1.0 else self._times(name, y, scale)

    def linear(self, name: str, x: Value, weight: str, bias: str | None) -> str:
        """MatMulNBits, MatMulBnb4 or FusedMatMul."""
        x = self._use(x)
        if name in ("logits", "head"):
            self.graph.constant("to_the_end", np.array([np.iinfo(np.int64).max]))
            x = self.graph.node("Slice", [x, FIRST_LOGITS, "to_the_end", "one"], "wanted")
        container = self.graph.container(weight)
        if isinstance(container, NBits):
            return self._n_bits(name, x, weight, container, bias)
        out = f"{name}.product" if bias else name
        if isinstance(container, Bnb4):
            codes, scales = self._parts(weight, container)
            rows, into = self._shape(weight)
            y = self.graph.node(
                "MatMulBnb4", [x, codes, scales], out, domain=DOMAIN,
                N=rows, K=into, block_size=container.block, quant_type=1, transB=1,
            )  # fmt: skip
        else:
            y = self.graph.node(
                "FusedMatMul", [x, self._floats(weight, container)], out, domain=DOMAIN, transB=1
            )
        return self.graph.node("Add", [y, self.graph.vector(bias)], name) if bias else y

    def rms_norm(self, name: str, x: Value, weight: str, *, eps: float, offset: float, parts: int = 1) -> str:
        """RMSNormalization, or SkipSimplifiedLayerNormalization of a sum that nobody has asked for yet."""
        gamma = self.graph.vector(weight)
        if offset:
            gamma = f"{weight}.shifted"
            if gamma not in {node.name for node in self.graph.nodes[-1:]}:
                plus = self.graph.constant("norm_offset", np.array([offset], np.float32))
                self.graph.node("Add", [weight, plus], gamma)
        if isinstance(x, Sum) and not x.written and parts == 1:
            x.written = True
            outputs = [name, "", "", x.name]
            return self.graph.node(
                "SkipSimplifiedLayerNormalization",
                [x.x, x.y, gamma],
                name,
                outputs,
                domain=DOMAIN,
                epsilon=eps,
            )
        y = self._use(x)
        if parts == 1:
            return self.graph.node("RMSNormalization", [y, gamma], name, axis=-1, epsilon=eps)
        split = self.graph.constant(f"heads.{parts}", np.array([0, 0, parts, -1]))
        y = self.graph.node("Reshape", [y, split], f"{name}.split")
        y = self.graph.node("RMSNormalization", [y, gamma], f"{name}.heads", axis=-1, epsilon=eps)
        return self.graph.node(
            "Reshape", [y, self.graph.constant("heads.joined", np.array([0, 0, -1]))], name
        )

    def split(self, name: str, x: Value, sizes: Sequence[int]) -> tuple[Value, ...]:
        """Nothing yet: attention takes the pieces together."""
        pieces = Pieces(name, self._use(x), tuple(sizes))
        return tuple(Cut(pieces, index) for index in range(len(sizes)))

    def attention(self, name: str, query: Value, key: Value, value: Value, spec: Attention) -> str:
        """GroupQueryAttention, which turns, caches and masks; heads that it cannot turn are turned before."""
        if spec.head_dim % 8:
            raise ModelError(
                f"head_dim {spec.head_dim} is not expressible in ONNX Runtime's GroupQueryAttention: it takes multiples of 8."
            )
        inside = spec.head_dim % 16 == 0 and spec.rope.dim == spec.head_dim
        cos, sin, position = self._rope(spec.rope, always=not inside)
        taken = [query, key, value]
        if inside and all(isinstance(each, Cut) and not each.pieces.written for each in taken):
            whole = query.pieces.x  # type: ignore[union-attr]
            given = [whole, "", ""]
        else:
            given = [self._use(each) for each in taken]
        attributes: dict[str, Any] = {
            "num_heads": spec.heads,
            "kv_num_heads": spec.kv_heads,
            "scale": spec.scale,
        }
        if spec.softcap is not None:
            attributes["softcap"] = spec.softcap
        window = spec.window if spec.window and spec.window < self.context else None
        if window:
            attributes |= {"local_window_size": window, "sliding_window_cache": 1}
        cache = self._cache(spec.layer, spec.kv_heads, spec.head_dim, window)
        inputs = [*given, *cache[:2], "last_position", "total_length"]
        if inside:
            attributes |= {"do_rotary": 1, "rotary_interleaved": int(spec.rope.interleaved)}
            inputs += [cos, sin, *([position] if position else [])]
        else:
            assert position is not None
            for at, heads in ((0, spec.heads), (1, spec.kv_heads)):
                inputs[at] = self.graph.node(
                    "RotaryEmbedding", [inputs[at], position, cos, sin], f"{name}.{'qk'[at]}", domain=DOMAIN,
                    num_heads=heads, rotary_embedding_dim=spec.rope.dim, interleaved=int(spec.rope.interleaved),
                )  # fmt: skip
        return self.graph.node(
            "GroupQueryAttention", inputs, name, [name, *cache[2:]], domain=DOMAIN, **attributes
        )

    def latent_attention(
        self, name: str, query: Value, latent: Value, key_rope: Value, weight: str, spec: Attention, mla: Mla
    ) -> str:
        """One key head of latents for GroupQueryAttention, with the queries' half of ``weight`` in the queries.

        q · (W latent) = (Wᵀ q) · latent, and values are made after they are summed: no key or value of a head ever exists. The
        operator's values are as wide as its keys, so a cached token takes twice kv_rank + rope_dim numbers.
        """
        g, heads, wide = self.graph, spec.heads, mla.kv_rank + mla.rope_dim
        if wide % 8:
            raise ModelError(
                f"kv_lora_rank + qk_rope_head_dim = {wide} is not expressible in ONNX Runtime's GroupQueryAttention: it takes "
                "multiples of 8."
            )

        def at(part: str) -> str:
            return f"{name}.{part}"

        def cut(x: str, sizes: tuple[int, int], first: str, second: str, axis: int) -> tuple[str, str]:
            given = g.constant(f"sizes.{sizes[0]}.{sizes[1]}", np.array(sizes))
            g.node("Split", [x, given], at(f"{first}.{second}"), [at(first), at(second)], axis=axis)
            return at(first), at(second)

        def shaped(x: str, shape: Sequence[int], out: str) -> str:
            return g.node(
                "Reshape", [x, g.constant(f"shape.{'.'.join(map(str, shape))}", np.array(shape))], out
            )

        # Float32, since no kernel multiplies parts of rows of codes by each head.
        if g.quant.schemes[weight].kind != "none":
            g.note(f"{weight} and those like it are float32: their halves are multiplied apart")
        whole = shaped(g.vector(weight), (heads, mla.nope_dim + mla.v_dim, mla.kv_rank), at("kv_b"))
        of_keys, of_values = cut(whole, (mla.nope_dim, mla.v_dim), "kv_b.keys", "kv_b.values", 1)
        cos, sin, position = self._rope(spec.rope, always=True)
        assert position is not None

        def turn(x: str, count: int, out: str) -> str:
            return g.node(
                "RotaryEmbedding", [x, position, cos, sin], out, domain=DOMAIN,
                num_heads=count, interleaved=int(spec.rope.interleaved),
            )  # fmt: skip

        q = shaped(self._use(query), (0, 0, heads, mla.nope_dim + mla.rope_dim), at("q"))
        plain, turned = cut(q, (mla.nope_dim, mla.rope_dim), "q.plain", "q.rope", 3)
        turned = turn(shaped(turned, (0, 0, -1), at("q.rope.flat")), heads, at("q.turned"))
        plain = g.node("Transpose", [plain], at("q.heads"), perm=[0, 2, 1, 3])
        plain = g.node("MatMul", [plain, of_keys], at("q.latent.heads"))
        plain = g.node("Transpose", [plain], at("q.latent"), perm=[0, 2, 1, 3])
        turned = shaped(turned, (0, 0, heads, mla.rope_dim), at("q.turned.heads"))
        q = shaped(g.node("Concat", [plain, turned], at("q.whole"), axis=3), (0, 0, -1), at("q.flat"))
        key = turn(self._use(key_rope), 1, at("k.turned"))
        k = g.node("Concat", [self._use(latent), key], at("k"), axis=2)
        cache = self._cache(spec.layer, 1, wide, None)
        y = g.node(
            "GroupQueryAttention", [q, k, k, *cache[:2], "last_position", "total_length"], at("latents"),
            [at("latents"), *cache[2:]], domain=DOMAIN, num_heads=heads, kv_num_heads=1, scale=spec.scale,
        )  # fmt: skip
        y, _ = cut(
            shaped(y, (0, 0, heads, wide), at("latents.wide")),
            (mla.kv_rank, mla.rope_dim),
            "latents.kept",
            "unused",
            3,
        )
        y = g.node("Transpose", [y], at("latents.heads"), perm=[0, 2, 1, 3])
        of_values = g.node("Transpose", [of_values], at("kv_b.values.turned"), perm=[0, 2, 1])
        y = g.node(
            "Transpose", [g.node("MatMul", [y, of_values], at("heads"))], at("tokens"), perm=[0, 2, 1, 3]
        )
        return shaped(y, (0, 0, -1), name)

    def gated(self, name: str, gate: Value, up: Value, act: str) -> str:
        """QuickGelu with alpha 1 is SiLU, in one node."""
        gate, up = self._use(gate), self._use(up)
        if act == "silu":
            y = self.graph.node("QuickGelu", [gate], f"{name}.act", domain=DOMAIN, alpha=1.0)
        else:
            how = "tanh" if act == "gelu_pytorch_tanh" else "none"
            y = self.graph.node("Gelu", [gate], f"{name}.act", approximate=how)
        return self.graph.node("Mul", [y, up], name)

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

    def experts(self, name: str, x: Value, routing: Value, layer: int, act: str, moe: Moe) -> str:
        """QMoE where the CPU provider has a kernel for these codes, or the experts one by one, each on its tokens."""
        assert isinstance(routing, Routing)
        x = self._use(x)
        names = [moe.weights(layer, expert) for expert in range(moe.experts)]
        container = self._common(names)
        if container is None:
            return self._one_by_one(name, x, routing, [self._apart(each) for each in names], act)
        (inner, hidden), at = self._shape(names[0][0]), f"model.layers.{layer}.experts"
        stacked = {}
        for part in container.shapes(1, 256):
            for which, groups, rows, into in (
                ("gate_up", [(gate, up) for gate, up, _ in names], 2 * inner, hidden),
                ("down", [(down,) for _, _, down in names], hidden, inner),
            ):
                shape = (moe.experts, rows, container.shapes(1, into)[part][1][1])
                stacked[which, part] = self.graph.part(f"{at}.{which}.{part}", part, container, groups, shape)
        if self.exact or act != "silu":
            runs = [
                self._stacked(name, stacked, container, expert, inner, hidden)
                for expert in range(moe.experts)
            ]
            return self._one_by_one(name, x, routing, runs, act)
        inputs = [x, routing.ranks, stacked["gate_up", "codes"], stacked["gate_up", "scales"], ""]
        inputs += [stacked["down", "codes"], stacked["down", "scales"], "", "", "", ""]
        zero_points = [
            stacked[which, "zero_points"] if container.zero_point else "" for which in ("gate_up", "down")
        ]
        return self.graph.node(
            "QMoE", [*inputs, *zero_points, "", routing.weights], name, domain=DOMAIN,
            k=moe.top_k, activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
            expert_weight_bits=container.bits, block_size=container.block, normalize_routing_weights=0,
            weights_prepacked=0, accuracy_level=4,
        )  # fmt: skip

    def _common(self, names: Sequence[tuple[str, str, str]]) -> NBits | None:
        """The container of all experts' tensors, when they can be stacked."""
        found = {self.graph.container(tensor) for each in names for tensor in each}
        schemes = {self.graph.quant.schemes[tensor] for each in names for tensor in each}
        one = next(iter(found))
        if (
            len(schemes) > 1
            or any(not isinstance(each, NBits) for each in found)
            or not isinstance(one, NBits)
        ):
            return None
        inner, hidden = self._shape(names[0][0])
        block = block_of(next(iter(schemes)), math.gcd(inner, hidden))
        bits = {each.bits for each in found if isinstance(each, NBits)}
        return NBits(one.bits, block, one.zero_point) if block and len(bits) == 1 else None

    def _apart(self, names: tuple[str, str, str]) -> Any:
        """Run one expert on rows, by its own tensors."""

        def run(at: str, rows: str, act: str) -> str:
            gate, up = (
                self.linear(f"{at}.{part}", rows, name, None)
                for part, name in zip(("gate", "up"), names[:2], strict=True)
            )
            return self.linear(f"{at}.down", self.gated(f"{at}.inner", gate, up, act), names[2], None)

        return run

    def _stacked(
        self,
        name: str,
        stacked: dict[tuple[str, str], str],
        container: NBits,
        expert: int,
        inner: int,
        hidden: int,
    ) -> Any:
        """Run one expert on rows, by its place in the stacked tensors; rows of gate and up take turns."""

        def multiply(at: str, rows: str, which: str, out: int, into: int) -> str:
            parts = []
            for part, (_, shape) in container.shapes(out, into).items():
                if part == "codes":
                    shape = container.blocks(out, into)
                of = stacked[which, part]
                each = self.graph.initializers[of].nbytes // self.graph.initializers[of].shape[0]
                parts.append(self.graph.view(f"{of}.{expert}", of, shape, at=expert * each))
            return self._multiply(at, rows, parts, container, out, into, None)

        def run(at: str, rows: str, act: str) -> str:
            g = self.graph
            both = multiply(f"{at}.gate_up", rows, "gate_up", 2 * inner, hidden)
            both = g.node("Reshape", [both, g.constant("pairs", np.array([0, inner, 2]))], f"{at}.pairs")
            gate, up = (
                g.node("Gather", [both, g.constant(f"index.{i}", np.array(i))], f"{at}.{part}", axis=2)
                for i, part in enumerate(("gate", "up"))
            )
            return multiply(f"{at}.down", self.gated(f"{at}.inner", gate, up, act), "down", hidden, inner)

        return run

    def _one_by_one(self, name: str, x: str, routing: Routing, runs: Sequence[Any], act: str) -> str:
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

    def _parts(self, weight: str, container: Container, codes: tuple[int, ...] | None = None) -> list[str]:
        """The initializers of a tensor: codes (in this shape, if nobody has asked before), scales, zero points."""
        found = []
        for part, (_, shape) in container.shapes(*self._shape(weight)).items():
            shape = codes if codes and part == "codes" else shape
            found.append(self.graph.part(f"{weight}.{part}", part, container, [(weight,)], shape))
        return found

    def _n_bits(self, name: str, x: str, weight: str, container: NBits, bias: str | None) -> str:
        out, into = self._shape(weight)
        blocks = container.blocks(out, into)
        codes, *rest = self._parts(weight, container, blocks)
        codes = self.graph.view(f"{weight}.blocks", codes, blocks)
        return self._multiply(name, x, [codes, *rest], container, out, into, bias)

    def _multiply(
        self, name: str, x: str, parts: Sequence[str], container: NBits, out: int, into: int, bias: str | None
    ) -> str:
        inputs = [x, *parts]
        if bias:
            inputs = [*inputs, *[""] * (5 - len(inputs)), self.graph.vector(bias)]
        return self.graph.node(
            "MatMulNBits", inputs, name, domain=DOMAIN,
            N=out, K=into, bits=container.bits, block_size=container.block, accuracy_level=0 if self.exact else 4,
        )  # fmt: skip

    def _floats(self, weight: str, container: Container | None) -> str:
        """A matrix [out, in] as float32; what is made of constants is made when the model is loaded."""
        if isinstance(container, Float8):
            codes, scales = self._parts(weight, container)
            return self.graph.node(
                "Mul", [self._float32(codes, f"{weight}.levels"), scales], f"{weight}.float32"
            )
        if self.graph.quant.model.specs[weight].role is Role.ROUTER:
            return self.graph.vector(weight)
        matrix = self.graph.floats(weight)
        if self.graph.is_float32(matrix):
            return matrix
        wide = f"{weight}.float32"
        written = any(node.name == wide for node in self.graph.nodes)
        return wide if written else self._float32(matrix, wide)

    def _float32(self, x: str, name: str) -> str:
        return self.graph.node("Cast", [x], name, to=library().TensorProto.FLOAT)

    def _times(self, name: str, x: str, factor: float) -> str:
        by = self.graph.constant(f"{name}.factor", np.array(factor, np.float32))
        return self.graph.node("Mul", [x, by], name)

    def _cache(self, layer: int, heads: int, width: int, window: int | None) -> list[str]:
        """Declare a layer's cache: past key and value, present key and value."""
        onnx = library()
        length = f"window_{window}" if window else "past"
        names = []
        for way, prefix in ((self.graph.inputs, "past_key_values"), (self.graph.outputs, "present")):
            for part in ("key", "value"):
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
