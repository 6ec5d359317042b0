"""Rank checkpoints of TensorRT-LLM, run on a CPU: each rank a process, with the collectives where the engine has them.

Written from the format (docs/nvidia-trtllm.md) and not from our exporter, of which nothing is used: names, shapes and layouts are read
again as ``trtllm-build`` takes them. Everything is float32, whatever the engine's type.

Rank 0 is the worker itself; the others are its children, told by a pipe what to run, and end with it: at the end of the pipe, or
when a peer is gone. Tensor-parallel ranks add up after the embedding, ``attention.dense`` and ``mlp.proj``, and gather what ``lm_head``
gives; a stage sends its hidden states to the next one, rank by rank.
"""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import psutil

from tapeout.errors import MissingToolchain, PackageError, TapeoutError
from tapeout.models.rope import Rope, cos_sin, scaling
from tapeout.validate import pretrained
from tapeout.validate.given import check_ids
from tapeout.validate.session import Facts, Logits

if TYPE_CHECKING:
    import torch

_CHUNK = 512  # tokens of one pass: bounds the scores
_WAIT = timedelta(minutes=10)  # for a peer, at most
_MAIN = "import sys; from tapeout.targets.trtllm_ranks import follow; follow(*sys.argv[1:])"
WORDS = "tokenizer"


def said_of(directory: Path) -> dict[str, Any]:
    """``config.json``, whose ranks are all there; PackageError."""
    try:
        said: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        world = int(said["mapping"]["world_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackageError(f"{directory / 'config.json'} is none of a rank checkpoint: {error!r}.") from error
    for rank in range(world):
        if not (directory / f"rank{rank}.safetensors").exists():
            raise PackageError(
                f"{directory} has no rank{rank}.safetensors, and its config.json says {world} ranks. Export the package again."
            )
    return said


def tensors_of(directory: Path, rank: int) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / f"rank{rank}.safetensors"
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise PackageError(f"{path} cannot be read: {error}.") from error


@dataclass
class _Linear:
    """A linear of one rank, or of its experts: weight float32 [(experts,) out, in].

    Attributes:
        factor: inputs are multiplied by it [in].
        rounds: whether they are rounded to int8 then, with ``step``, or each token with its own.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    rounds: bool = False
    step: float | None = None

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """What the matmul reads of ``x`` [..., in]."""
        import torch

        if self.factor is not None:
            x = x * self.factor
        if not self.rounds:
            return x
        step = x.abs().amax(-1, keepdim=True) / 127 if self.step is None else torch.tensor(self.step)
        codes = torch.where(step > 0, torch.round(x / step), 0.0).clamp(-128, 127)
        return codes * step

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.inputs(x) @ self.weight.T


def linear_of(tensors: dict[str, torch.Tensor], base: str, said: dict[str, Any], inputs: bool) -> _Linear:
    """What the tensors of a module mean."""
    import torch

    weight, bias = tensors[f"{base}.weight"], tensors.get(f"{base}.bias")
    bias = None if bias is None else bias.float()
    if weight.dtype != torch.int8:
        return _Linear(weight.float(), bias)
    quantization = said["quantization"]
    algorithm = quantization["quant_algo"]

    def part(suffix: str) -> torch.Tensor:
        try:
            return tensors[f"{base}.{suffix}"].float()
        except KeyError:
            raise PackageError(f"a rank has codes of {base}, and no {suffix} of {algorithm}.") from None

    if algorithm == "W8A16":
        return _Linear((weight.float() * part("per_channel_scale")).T.contiguous(), bias)
    if algorithm == "W4A16_AWQ":
        low, high = (weight << 4) >> 4, weight >> 4  # arithmetic shifts: nibbles have a sign
        rows = torch.stack([low, high], -2).flatten(-3, -2).float()
        group = int(quantization["group_size"])
        weight = rows * part("weights_scaling_factor").repeat_interleave(group, -1)
        if quantization["has_zero_point"]:
            weight = weight + part("zero").transpose(-1, -2).repeat_interleave(group, -1)
        factor = part("prequant_scaling_factor") if quantization["pre_quant_scale"] else None
        # The kernel has one for all experts: the builder takes the first's.
        factor = factor[0] if factor is not None and factor.dim() == 2 else factor
        return _Linear(weight, bias, factor)
    if algorithm == "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN":
        weight = weight.float() * part("per_channel_scale").reshape(-1, 1)
        factor = 1 / part("smoother")[0] if f"{base}.smoother" in tensors else None
        return _Linear(weight, bias, factor, inputs)
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        weight = weight.float() * part("weights_scaling_factor").reshape(-1, 1)
        step = float(part("activation_scaling_factor"))
        return _Linear(weight, bias, part("prequant_scaling_factor"), inputs, step)
    raise PackageError(f"config.json says quant_algo {algorithm}, which is not one that is written here.")


class _Group:
    """The ranks that share a layer, and the stages around them; alone nothing is sent."""

    def __init__(self, said: dict[str, Any], rank: int) -> None:
        import torch.distributed as dist

        self.size, self.stages = int(said["mapping"]["tp_size"]), int(said["mapping"]["pp_size"])
        self.stage, self.index = divmod(rank, self.size)
        self.rank = rank
        self._peers: Any = None
        if self.size > 1:
            for stage in range(self.stages):  # every rank makes all of them, in one order
                peers = dist.new_group([stage * self.size + i for i in range(self.size)])
                if stage == self.stage:
                    self._peers = peers

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of a layer."""
        import torch.distributed as dist

        if self.size > 1:
            x = x.contiguous()
            dist.all_reduce(x, group=self._peers)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """What all ranks of a layer have, along the last axis."""
        import torch
        import torch.distributed as dist

        if self.size == 1:
            return x
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x.contiguous(), group=self._peers)
        return torch.cat(found, -1)

    def send(self, x: torch.Tensor, to: int) -> None:
        import torch.distributed as dist

        dist.send(x.contiguous(), to)

    def receive(self, shape: tuple[int, int], source: int) -> torch.Tensor:
        import torch
        import torch.distributed as dist

        x = torch.empty(shape)
        dist.recv(x, source)
        return x


class _Rank:
    """One rank's share of the model, and of its cache."""

    def __init__(self, directory: Path, rank: int, inputs: bool) -> None:
        self.said = said = said_of(directory)
        self.group = _Group(said, rank)
        self._tensors, self._inputs = tensors_of(directory, rank), inputs
        self._linears: dict[str, _Linear] = {}
        self._gemma = said["architecture"].startswith("Gemma")
        self._sandwich = said["architecture"] in ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
        self._layers = said["num_hidden_layers"] // self.group.stages
        self._past: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        self.length = 0
        self.reset()
        for name in [name for name, tensor in self._tensors.items() if tensor.dtype.itemsize == 1]:
            self._linear(name.removesuffix(".weight"))  # codes become floats once
        self._tensors = {name: tensor.float() for name, tensor in self._tensors.items()}
        self._turns: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}

    def reset(self) -> None:
        """An empty cache."""
        self._past, self.length = [None] * self._layers, 0

    def forward(self, ids: Sequence[int], keep: int = 0) -> torch.Tensor | None:
        """Append tokens; rank 0 has their logits [tokens, vocab], of the last ``keep`` ones if that is not 0."""
        import torch

        c, group = self.said, self.group
        shape = (len(ids), int(c["hidden_size"]))
        self._turns.clear()
        with torch.inference_mode():
            x = (
                self._embedded(torch.tensor(ids))
                if group.first
                else group.receive(shape, group.rank - group.size)
            )
            for index in range(self._layers):
                x = self._layer(index, x)
            self.length += len(ids)
            x = x[-keep:]
            if not group.last:
                group.send(x, group.rank + group.size)
            else:
                x = self._head(x)
                if group.rank and group.index == 0 and group.stages > 1:
                    group.send(x, 0)
            if group.rank:
                return None
            if group.stages > 1:
                x = group.receive((len(x), int(c["vocab_size"])), (group.stages - 1) * group.size)
            return x

    def _float(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise PackageError(f"rank{self.group.rank}.safetensors has no {name}.") from None

    def _linear(self, base: str) -> _Linear:
        if base not in self._linears:
            if f"{base}.weight" not in self._tensors:
                raise PackageError(f"rank{self.group.rank}.safetensors has no {base}.weight.")
            self._linears[base] = linear_of(self._tensors, base, self.said, self._inputs)
            for name in [n for n in self._tensors if n.rpartition(".")[0] == base]:
                del self._tensors[name]
        return self._linears[base]

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        import torch

        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.said["norm_epsilon"])
        return x * self._float(f"{name}.weight")

    def _columns(self, base: str, x: torch.Tensor) -> torch.Tensor:
        linear = self._linear(base)
        y = linear(x)
        return y if linear.bias is None else y + linear.bias

    def _rows(self, base: str, x: torch.Tensor) -> torch.Tensor:
        """Summed over ranks before the bias."""
        linear = self._linear(base)
        y = self.group.sum(linear(x))
        return y if linear.bias is None else y + linear.bias

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        table = self._float("transformer.vocab_embedding.weight")
        if self.said["use_parallel_embedding"] and self.group.size > 1:
            own = ids - self.group.index * len(table)
            inside = (own >= 0) & (own < len(table))
            x = self.group.sum(table[own.clamp(0, len(table) - 1)] * inside[:, None])
        else:
            x = table[ids]
        return x * math.sqrt(self.said["hidden_size"]) if self._gemma else x

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        x = self.group.gather(self._norm("transformer.ln_f", x) @ self._float("lm_head.weight").T)
        cap = self.said.get("final_logit_softcapping")
        return cap * torch.tanh(x / cap) if cap else x

    def _layer(self, index: int, x: torch.Tensor) -> torch.Tensor:
        at = f"transformer.layers.{index}"
        y = self._attention(index, self._norm(f"{at}.input_layernorm", x))
        if self._sandwich:
            x = x + self._norm(f"{at}.post_layernorm", y)
            y = self._mlp(at, self._norm(f"{at}.pre_feedforward_layernorm", x))
            return x + self._norm(f"{at}.post_feedforward_layernorm", y)
        x = x + y
        return x + self._mlp(at, self._norm(f"{at}.post_layernorm", x))

    def _mlp(self, at: str, x: torch.Tensor) -> torch.Tensor:
        if "moe" in self.said:
            return self._experts(f"{at}.mlp", x)
        if self.said["hidden_act"] == "swiglu":
            return self._rows(f"{at}.mlp.proj", _swiglu(self._columns(f"{at}.mlp.fc", x)))
        inner = self._act(self._columns(f"{at}.mlp.fc", x)) * self._columns(f"{at}.mlp.gate", x)
        return self._rows(f"{at}.mlp.proj", inner)

    def _act(self, x: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        if self.said["hidden_act"] == "silu":
            return functional.silu(x)
        return functional.gelu(x, approximate="tanh")

    def _experts(self, at: str, x: torch.Tensor) -> torch.Tensor:
        import torch

        moe = self.said["moe"]
        scores = torch.softmax(x @ self._float(f"{at}.router.weight").T, -1)
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, : moe["top_k"]]
        weights = torch.gather(scores, 1, order)
        if moe["normalization_mode"] == 1:
            weights = weights / weights.sum(-1, keepdim=True)
        fc, proj = self._linear(f"{at}.fc"), self._linear(f"{at}.proj")
        y = torch.zeros_like(x)
        for expert in range(moe["num_experts"]):
            token, place = torch.nonzero(order == expert, as_tuple=True)
            if len(token):
                inner = _swiglu(fc.inputs(x[token]) @ fc.weight[expert].T)
                y[token] += (proj.inputs(inner) @ proj.weight[expert].T) * weights[token, place, None]
        if f"{at}.shared_expert_gate.weight" in self._tensors:
            shared = self._linear(f"{at}.shared_expert.proj")(
                _swiglu(self._columns(f"{at}.shared_expert.fc", x))
            )
            y = y + shared * torch.sigmoid(x @ self._float(f"{at}.shared_expert_gate.weight").T)
        return self.group.sum(y)

    @cached_property
    def _heads(self) -> tuple[int, int, int]:
        """Query heads and key heads of a rank, and elements of one."""
        c, size = self.said, self.group.size
        return (
            c["num_attention_heads"] // size,
            max(1, c["num_key_value_heads"] // size),
            int(c["head_size"]),
        )

    def _rope(self, local: bool) -> Rope:
        c, dim = self.said, round(self._heads[2] * self.said.get("rotary_pct", 1.0))
        if local:
            return Rope(float(c["rope_local_base_freq"]), dim=dim)
        context = int(c["max_position_embeddings"])
        if c["position_embedding_type"] == "long_rope":
            given = {
                "original_max_position_embeddings": c["original_max_position_embeddings"],
                "short_factor": c["longrope_scaling_short_factors"],
                "long_factor": c["longrope_scaling_long_factors"],
            }
            return Rope(
                c["rotary_base"], "longrope", scaling("longrope", given, context=context, dim=dim), dim
            )
        given = dict(c.get("rotary_scaling") or {})
        kind = given.pop("type", "default")
        given.pop("rope_type", None)
        return Rope(
            float(c.get("rotary_base", 10000.0)), kind, scaling(kind, given, context=context, dim=dim), dim
        )

    def _local(self, layer: int) -> bool:
        every = self.said.get("_sliding_window_pattern")
        return every is not None and (layer + 1) % every != 0

    def _attention(self, index: int, x: torch.Tensor) -> torch.Tensor:
        import torch

        c, at = self.said, f"transformer.layers.{index}.attention"
        layer = self.group.stage * self._layers + index
        heads, kv_heads, dim = self._heads
        both = self._columns(f"{at}.qkv", x).view(len(x), heads + 2 * kv_heads, dim)
        q, k, v = both.split([heads, kv_heads, kv_heads], 1)
        if c.get("qk_layernorm"):
            q, k = self._norm(f"{at}.q_layernorm", q), self._norm(f"{at}.k_layernorm", k)
        positions = np.arange(self.length, self.length + len(x))
        if (local := self._local(layer)) not in self._turns:
            turns = cos_sin(self._rope(local), positions, self.length + len(x))
            self._turns[local] = torch.from_numpy(turns[0]), torch.from_numpy(turns[1])
        cos, sin = self._turns[local]
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        if (past := self._past[index]) is not None:
            k, v = torch.cat([past[0], k]), torch.cat([past[1], v])
        window = self._window(layer)
        kept = len(k) if window is None else window - 1
        self._past[index] = (k[max(0, len(k) - kept) :], v[max(0, len(v) - kept) :])
        scale = c.get("query_pre_attn_scalar", dim) ** -0.5
        grouped = q.view(len(x), kv_heads, heads // kv_heads, dim)
        scores = torch.einsum("tkgd,skd->kgts", grouped, k) * scale
        if cap := c.get("attn_logit_softcapping"):
            scores = cap * torch.tanh(scores / cap)
        behind = (
            torch.from_numpy(positions)[:, None]
            - torch.arange(self.length + len(x) - len(k), self.length + len(x))[None]
        )
        hidden = (behind < 0) | (behind >= (window or sys.maxsize))
        scores = scores.masked_fill(hidden, -math.inf).softmax(-1)
        y = torch.einsum("kgts,skd->tkgd", scores, v).reshape(len(x), heads * dim)
        return self._rows(f"{at}.dense", y)

    def _window(self, layer: int) -> int | None:
        """Tokens that a layer attends to, as the executor takes it where nobody says: a list that is gone through again and again."""
        each = (self.said.get("runtime_defaults") or {}).get("max_attention_window")
        if not each:
            return None
        window = int(each[layer % len(each)])
        return window if window < self.said["max_position_embeddings"] else None


def _swiglu(both: torch.Tensor) -> torch.Tensor:
    """The first half, times the activated second one."""
    from torch.nn import functional

    up, gate = both.chunk(2, -1)
    return functional.silu(gate) * up


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Element i with i + n / 2 of the n first ones of each head [tokens, heads, dim]."""
    import torch

    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class Ranks(pretrained.Words):
    """A Session on all ranks of a checkpoint; see ``open_session``."""

    facts: Facts

    def __init__(self, directory: Path, inputs: bool) -> None:
        import torch

        before, begin = psutil.Process().memory_info().rss, perf_counter()
        said = said_of(directory)
        self._directory = directory
        self._world = int(said["mapping"]["world_size"])
        self._vocab = int(said["vocab_size"])
        self._children: list[subprocess.Popen[str]] = []
        self._meeting: tempfile.TemporaryDirectory[str] | None = None
        self.words = directory / WORDS
        if self._world > 1:
            self._start(inputs)
        try:
            self._rank = _Rank(directory, 0, inputs)
            self._meet()
        except BaseException:
            self.close()
            raise
        self.facts = Facts(
            runtime=f"tapeout's ranks of a TensorRT-LLM checkpoint, torch {torch.__version__}",
            device=f"cpu, {self._world} {'ranks over gloo' if self._world > 1 else 'rank'}",
            load_s=perf_counter() - begin,
            resident_bytes=max(0, psutil.Process().memory_info().rss - before),
            context=int(said["max_position_embeddings"]),
            emulated=True,
        )

    def _start(self, inputs: bool) -> None:
        import torch
        import torch.distributed as dist

        if not dist.is_available():
            raise MissingToolchain(
                "this torch has no torch.distributed, which ranks need: pip install 'tapeout[reference]'"
            )
        torch.set_num_threads(1)
        self._meeting = tempfile.TemporaryDirectory(prefix="tapeout-ranks-")
        store = str(Path(self._meeting.name) / "store")
        for rank in range(1, self._world):
            command = [
                sys.executable,
                "-P",
                "-c",
                _MAIN,
                str(self._directory),
                str(rank),
                store,
                str(int(inputs)),
            ]
            self._children.append(subprocess.Popen(command, stdin=subprocess.PIPE, text=True))
        _join(store, 0, self._world)

    def _meet(self) -> None:
        """Wait until all ranks have their weights."""
        if self._world > 1:
            import torch.distributed as dist

            dist.barrier()

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append tokens to the sequence at once; return float32 [tokens, vocab], the logits after each."""
        return np.concatenate(
            [np.empty((0, self._vocab), np.float32), *(self._run(chunk) for chunk in self._chunks(ids))]
        )

    def append(self, ids: Sequence[int]) -> Logits:
        """``prefill`` for those who want the last token's logits only, float32 [1, vocab]."""
        last = np.empty((0, self._vocab), np.float32)
        for chunk in self._chunks(ids):
            last = self._run(chunk, keep=1)
        return last

    def decode(self, token: int) -> Logits:
        """Append one token; return float32 [vocab]."""
        return cast(Logits, self.prefill([token])[0])

    def reset(self) -> None:
        """Begin a new sequence with an empty cache."""
        self._tell({"reset": True})
        self._rank.reset()

    def close(self) -> None:
        """End the other ranks, and free the model."""
        import torch.distributed as dist

        for child in self._children:
            if child.stdin:
                child.stdin.close()
        if self._children and dist.is_initialized():
            dist.destroy_process_group()
        for child in self._children:
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children = []
        if self._meeting:
            self._meeting.cleanup()
            self._meeting = None

    def _chunks(self, ids: Sequence[int]) -> Iterable[Sequence[int]]:
        length = self._rank.length + len(ids)
        if length > self.facts.context:
            raise TapeoutError(f"{length} tokens do not fit the context of {self.facts.context}.")
        check_ids(ids, self._vocab)
        for at in range(0, len(ids), _CHUNK):
            yield [int(token) for token in ids[at : at + _CHUNK]]

    def _run(self, ids: Sequence[int], keep: int = 0) -> Logits:
        self._tell({"ids": list(ids), "keep": keep})
        found = self._rank.forward(ids, keep)
        assert found is not None
        return cast(Logits, found.numpy())

    def _tell(self, what: dict[str, Any]) -> None:
        for child in self._children:
            assert child.stdin
            child.stdin.write(json.dumps(what) + "\n")
            child.stdin.flush()


def _join(store: str, rank: int, world: int) -> None:
    import torch.distributed as dist

    meeting = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world, timeout=_WAIT)


def open_session(directory: str, inputs: bool = True, threads: int | None = None) -> Ranks:
    """Run a checkpoint's ranks; called in a worker process.

    Args:
        directory: with config.json and the ranks.
        inputs: whether inputs are rounded where the algorithm says so.
        threads: of torch, where there is one rank; of several each has one.

    Raises:
        PackageError: a rank is missing or not whole. MissingToolchain: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingToolchain(
            f"running ranks needs torch ({error}): pip install 'tapeout[nvidia]'"
        ) from error
    if threads:
        torch.set_num_threads(threads)
    return Ranks(Path(directory), inputs)


def follow(directory: str, rank: str, store: str, inputs: str) -> None:
    """Be a rank other than the first: run what comes in on standard input until it ends."""
    import torch

    told: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            told.put(line)
        os._exit(0)  # the worker closed the pipe, or is gone: nobody reads what this rank makes

    threading.Thread(target=listen, daemon=True).start()
    torch.set_num_threads(1)
    world = int(said_of(Path(directory))["mapping"]["world_size"])
    _join(store, int(rank), world)
    import torch.distributed as dist

    own = _Rank(Path(directory), int(rank), bool(int(inputs)))
    dist.barrier()
    while True:
        what = json.loads(told.get())
        if "reset" in what:
            own.reset()
        else:
            own.forward(what["ids"], what["keep"])
