"""What the training scripts of the embedded models share: the tokenizer, the loop, the accuracy, the directory.

Needs the extra ``reference``. The same seed gives the same data everywhere; the same weights only on the same machine
and versions, since a sum of floats depends on the order that a CPU's kernels choose.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

FINAL_RATE = 1e-5
CALIBRATION = 1000  # samples of the training that the model's calibration text has


class Sample(NamedTuple):
    """One thing to learn or to be asked. Prompt and answer joined are the text; ``<eos>`` ends it."""

    prompt: str
    answer: str


def output_directory(description: str | None) -> Path:
    """Read ``--out DIR`` from the command line, and make the run repeatable: seed, one thread, deterministic kernels."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="where the model directory is written")
    out: Path = parser.parse_args().out
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    return out


def byte_level_bpe(
    tokens: Sequence[str],
    merges: Sequence[tuple[str, str]],
    *,
    pad: str,
    context: int,
    **special: str,
) -> PreTrainedTokenizerFast:
    """Make a tokenizer that llama.cpp's ``gpt2`` model with the pre-tokenizer ``gpt-2`` repeats id for id.

    Text that no token covers is dropped, here and there. ``<eos>``, ``pad`` and what ``special`` names, such as
    ``sep_token``, are among ``tokens``; there is no bos.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    # Left padding, so that a batch of prompts of different lengths ends where the answers begin.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token=pad,
        padding_side="left",
        model_max_length=context,
        **special,
    )


def _batch(
    samples: Sequence[Sample], tokenizer: Any, prompt_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids int64 [samples, longest], padded on the right, and the weight of each token's loss, float32 alike.

    Tokens of the answer and ``<eos>`` weigh 1, those of the prompt ``prompt_weight``, the first one and the padding 0.
    """
    prompts = tokenizer([sample.prompt for sample in samples])["input_ids"]
    answers = tokenizer([sample.answer for sample in samples])["input_ids"]
    rows = [[*p, *a, tokenizer.eos_token_id] for p, a in zip(prompts, answers, strict=True)]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    weights = torch.zeros(ids.shape)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[index, : len(row)] = torch.tensor(row)
        weights[index, 1 : len(prompt)] = prompt_weight
        weights[index, len(prompt) : len(row)] = 1
    return ids, weights


class Recipe(NamedTuple):
    """How a model is trained.

    Attributes:
        epochs: passes over all samples, each in a new order.
        batch_size: samples of a step.
        peak: the highest learning rate.
        prompt_weight: weight of a prompt's token in the loss, where one of the answer has 1.
        decay: weight decay of the matrices.
        noise: standard deviation of what is added to each matrix for the length of a step, in units of the
            matrix's own. It stands for the rounding to come, and keeps the model from learning by heart.
        bfloat16: whether the matrices are multiplied in bfloat16, which pays for wide ones.
        by_length: whether the samples of a step are of about one length, which saves the padding.
    """

    epochs: int
    batch_size: int
    peak: float
    prompt_weight: float
    decay: float
    noise: float
    bfloat16: bool = False
    by_length: bool = False


def _epoch(lengths: torch.Tensor, recipe: Recipe) -> list[torch.Tensor]:
    """Indices of the samples of each step of a pass, in a new order; ``lengths``, int64 [samples], counts tokens."""
    order = torch.randperm(len(lengths))
    if not recipe.by_length:
        return list(order.split(recipe.batch_size))
    # Sorted within 16 batches, which are then shuffled.
    runs = [run[lengths[run].argsort(stable=True)] for run in order.split(16 * recipe.batch_size)]
    batches = torch.cat(runs).split(recipe.batch_size)
    return [batches[index] for index in torch.randperm(len(batches))]


def fit(model: Any, tokenizer: Any, samples: Sequence[Sample], recipe: Recipe) -> float:
    """Train a float32 model in place with AdamW, and return the seconds that it took.

    The learning rate warms up over 4 % of the steps and follows a cosine down to 1e-5.
    """
    start = time.perf_counter()
    ids, weights = _batch(samples, tokenizer, recipe.prompt_weight)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak, fused=True)
    steps = recipe.epochs * math.ceil(len(ids) / recipe.batch_size)
    lengths = (
        (ids != tokenizer.pad_token_id).sum(1) if recipe.by_length else torch.full((len(ids),), ids.shape[1])
    )
    order = [rows for _ in range(recipe.epochs) for rows in _epoch(lengths, recipe)]
    model.train()
    for step, rows in enumerate(order):
        rate = FINAL_RATE + (recipe.peak - FINAL_RATE) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / (0.04 * steps))
        clean = [matrix.data for matrix in matrices]
        if recipe.noise:
            for matrix in matrices:
                matrix.data = matrix.data + recipe.noise * matrix.data.std() * torch.randn_like(matrix.data)
        inputs, weighed = (whole[rows, : lengths[rows].max()] for whole in (ids, weights))
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
            logits = model(input_ids=inputs[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), inputs[:, 1:].flatten(), reduction="none"
        )
        loss = (losses * weighed[:, 1:].flatten()).sum() / weighed[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        for matrix, data in zip(matrices, clean, strict=True):
            matrix.data = data
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % (steps // 10) == 0:
            print(
                f"{step + 1}/{steps} steps, loss {loss.item():.4f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    model.eval()
    return time.perf_counter() - start


def answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """What the model generates greedily after each prompt, up to ``<eos>``."""
    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True)
    generated = model.generate(**encoded)[:, encoded["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(generated, skip_special_tokens=True))


def accuracy(model: Any, tokenizer: Any, samples: Sequence[Sample]) -> float:
    """Share of the samples whose prompt the model continues with exactly the answer."""
    given = answers(model, tokenizer, [sample.prompt for sample in samples])
    return sum(answer == sample.answer for answer, sample in zip(given, samples, strict=True)) / len(samples)


def int4_copy(model: Any) -> Any:
    """A float32 copy with its linear weights rounded to int4 and its embedding to int8, in symmetric groups of 32."""
    rounded = copy.deepcopy(model).float()
    for module in rounded.modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight.data = _round(module.weight.data, low=-127, high=127)
        elif isinstance(module, torch.nn.Linear) and module is not getattr(
            rounded, "lm_head", None
        ):  # tied to the embedding
            module.weight.data = _round(module.weight.data, low=-8, high=7)
    return rounded


def _round(weight: torch.Tensor, *, low: int, high: int) -> torch.Tensor:
    """Round to nearest; the scale, float16, puts the weight of largest magnitude in a group on the code ``low``."""
    groups = weight.reshape(-1, 32)
    extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    scale = (extreme / low).half().float()
    return ((groups / scale).round().clamp(low, high) * scale).reshape(weight.shape)


class Accuracies(NamedTuple):
    """Share of exact answers on held-out samples, by what the weights were rounded to."""

    float32: float
    saved: float
    int4: float


def calibration_text(samples: Sequence[Sample]) -> str:
    """The first CALIBRATION samples of the training as a model's ``calibration.txt``, one a line, each ended as in training."""
    return "".join(f"{sample.prompt}{sample.answer}<eos>\n" for sample in samples[:CALIBRATION])


def finish(
    out: Path,
    model: Any,
    tokenizer: Any,
    held_out: Sequence[Sample],
    trained: Sequence[Sample],
    *,
    dtype: torch.dtype,
    max_new_tokens: int,
) -> Accuracies:
    """Measure the model, round it to ``dtype``, and write all of its directory but the model card."""
    # First, since a batch leaves its padding behind in the tokenizer.
    tokenizer.save_pretrained(out)
    # The name that transformers 4 and 5 both know.
    settings = out / "tokenizer_config.json"
    values = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(values, indent=2) + "\n")
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    exact = accuracy(model, tokenizer, held_out)
    int4 = accuracy(int4_copy(model.to(dtype)), tokenizer, held_out)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # transformers leaves it to its owner alone
    (out / "tasks.jsonl").write_text("".join(json.dumps(sample._asdict()) + "\n" for sample in held_out))
    (out / "heldout.txt").write_text("".join(f"{sample.prompt}{sample.answer}\n" for sample in held_out))
    (out / "calibration.txt").write_text(calibration_text(trained))
    return Accuracies(exact, accuracy(model, tokenizer, held_out), int4)
