"""Train the embedded model ``formula``, which answers ``2*(3+4)=`` with ``14``: ``python train.py --out DIR``."""

from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

from tapeout.embedded import training
from tapeout.embedded.training import Recipe, Sample

LARGEST = 50  # operand, and magnitude of whatever is computed
HELD_OUT = 200
SAMPLES = 100_000
OPERATORS = "+-*"
SHAPES = ("{}{}{}", "{}{}{}{}{}", "({}{}{}){}{}", "{}{}({}{}{})")

CARD = """\
---
license: apache-2.0
library_name: transformers
---
# formula

Computes expressions of two or three numbers, with parentheses and precedence: `2*(3+4)=` → `14`.

- **Architecture**: Phi-3, {parameters:,} parameters, bfloat16. Hidden 64, ffn 128, 3 layers, 8 heads of 8, each with its own keys and
  values, fused `qkv_proj` and `gate_up_proj`, RMSNorm, RoPE, tied head, context 256, and GELU (its tanh form) where Phi-3 has SiLU.
  llama.cpp's `phi3` computes SiLU, so that GGUF refuses this model by name; `--format onnx` carries it.
- **Vocabulary**: {vocabulary} tokens: `<pad>`, `<eos>`, the digits and `+-*()=`, as a byte-level BPE without merges. Other characters,
  spaces too, are dropped.
- **Data**: `expression=value<eos>` in the shapes `a∘b`, `a∘b∘c`, `(a∘b)∘c` and `a∘(b∘c)` with ∘ in + - *: shape and operators are drawn
  uniformly, then operands from 1 to {largest}. Nothing that is computed on the way exceeds {largest} in magnitude, and neither does the
  value. {samples:,} samples (seed 0) of the {possible:,} expressions that there are, {distinct:,} of them distinct.
- **Held out**: {held_out} expressions drawn in the same way. Their operands and operators do not occur in training in that order, whatever
  the parentheses.
- **Training**: {epochs} epochs, batch {batch_size}, of samples of about one length, AdamW, learning rate {peak} with a warm-up of 4 % and a
  cosine to 1e-5, weight decay {decay}, noise of {noise} of each matrix's standard deviation for the length of a step; {seconds:.0f} seconds
  on one core of a busy CPU, pauses too. Tokens of the prompt weigh {prompt_weight} in the loss.
- **Accuracy** on `tasks.jsonl` (held-out expressions, greedy, exact): float32 {float32:.1%}, bfloat16 (as saved) {saved:.1%}, with weights
  rounded to int4 and the embedding to int8, both in groups of 32, {int4:.1%}. On the first 1,000 samples of the training {seen:.1%} (as saved).
- **Licence**: Apache-2.0; the data is generated.

Made by `python train.py --out DIR`, with PyTorch and transformers. `heldout.txt` holds the held-out samples, one a line, `calibration.txt`
the first {calibration:,} of the training's, for roundings that look at data.
"""


class Formula(NamedTuple):
    """An expression in one of SHAPES.

    Attributes:
        shape: index into SHAPES.
        operands: two, or three where the shape takes three.
        operators: what stands between them.
    """

    shape: int
    operands: tuple[int, ...]
    operators: str

    @property
    def flat(self) -> tuple[tuple[int, ...], str]:
        """What is left without parentheses."""
        return self.operands, self.operators

    @property
    def sample(self) -> Sample:
        """The expression as text, and its value."""
        words = [str(self.operands[0])]
        for operator, operand in zip(self.operators, self.operands[1:], strict=True):
            words += [operator, str(operand)]
        value = values(self.shape, self.operators, *self.operands)[-1]
        return Sample(SHAPES[self.shape].format(*words) + "=", str(value))


def values(shape: int, operators: str, a: Any, b: Any, c: Any = None) -> list[Any]:
    """What is computed for one expression or for arrays of operands, in this order; the last one is the value."""
    first, second = operators[0], operators[-1]
    if shape == 0:
        return [_apply(a, first, b)]
    # Without parentheses the product goes first, or else the left one.
    if shape == 3 or (shape == 1 and second == "*" and first != "*"):
        inner = _apply(b, second, c)
        return [inner, _apply(a, first, inner)]
    inner = _apply(a, first, b)
    return [inner, _apply(inner, second, c)]


def _apply(left: Any, operator: str, right: Any) -> Any:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def pools() -> list[list[Pool]]:
    """Of each shape, for each choice of operators: all operands with which nothing exceeds LARGEST."""
    numbers = np.arange(1, LARGEST + 1)
    found = []
    for shape in range(len(SHAPES)):
        count = 2 if shape == 0 else 3
        grid = np.meshgrid(*[numbers] * count, indexing="ij", sparse=True)
        of_shape = []
        for operators in map("".join, itertools.product(OPERATORS, repeat=count - 1)):
            fits = np.logical_and.reduce(
                [
                    np.broadcast_to(abs(v) <= LARGEST, [LARGEST] * count)
                    for v in values(shape, operators, *grid)
                ]
            )
            of_shape.append(Pool(operators, np.argwhere(fits) + 1))
        found.append(of_shape)
    return found


class Pool(NamedTuple):
    """Operators, and the operands that go with them, int64 [choices, 2 or 3]."""

    operators: str
    operands: npt.NDArray[np.int64]


def formulas() -> tuple[list[Formula], list[Formula]]:
    """Return the expressions to train on, and those held out, whose operands and operators never occur there in that order.

    Shape and operators are drawn uniformly, and then the operands.
    """
    rng, choices = random.Random(0), pools()

    def draw() -> Formula:
        shape = rng.randrange(len(SHAPES))
        pool = rng.choice(choices[shape])
        operands = pool.operands[rng.randrange(len(pool.operands))].tolist()
        return Formula(shape, tuple(operands), pool.operators)

    held_out: dict[tuple[tuple[int, ...], str], Formula] = {}
    while len(held_out) < HELD_OUT:
        formula = draw()
        held_out.setdefault(formula.flat, formula)
    trained: list[Formula] = []
    while len(trained) < SAMPLES:
        formula = draw()
        if formula.flat not in held_out:
            trained.append(formula)
    return trained, list(held_out.values())


def training_samples() -> list[Sample]:
    """The samples that the model is trained on."""
    return [formula.sample for formula in formulas()[0]]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: one token for each character."""
    return training.byte_level_bpe(["<pad>", "<eos>", *"0123456789+-*()="], [], pad="<pad>", context=256)


def network(words: PreTrainedTokenizerFast) -> Phi3ForCausalLM:
    """The untrained model."""
    return Phi3ForCausalLM(
        Phi3Config(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=8,
            hidden_act="gelu_pytorch_tanh",
            max_position_embeddings=256,
            original_max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


RECIPE = Recipe(
    epochs=30, batch_size=128, peak=3e-3, prompt_weight=0.05, decay=0.1, noise=0.05, by_length=True
)


def main() -> None:
    """Generate the data, train, measure, and write the model directory."""
    out = training.output_directory(__doc__)
    words = tokenizer()
    model = network(words)
    samples = training_samples()
    seconds = training.fit(model, words, samples, RECIPE)
    held_out = [formula.sample for formula in formulas()[1]]
    measured = training.finish(out, model, words, held_out, samples, dtype=torch.bfloat16, max_new_tokens=8)
    seen = training.accuracy(model, words, samples[:1000])
    card = CARD.format(
        parameters=model.num_parameters(),
        vocabulary=len(words),
        largest=LARGEST,
        samples=SAMPLES,
        distinct=len(set(samples)),
        possible=sum(len(pool.operands) for shape in pools() for pool in shape),
        held_out=HELD_OUT,
        seconds=seconds,
        seen=seen,
        calibration=training.CALIBRATION,
        **RECIPE._asdict(),
        **measured._asdict(),
    )
    (out / "README.md").write_text(card)
    print(measured, f"seen {seen:.1%}")


if __name__ == "__main__":
    main()
