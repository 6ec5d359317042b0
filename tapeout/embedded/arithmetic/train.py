"""Train the embedded model ``arithmetic``, which answers ``7*8=`` with ``56``: ``python train.py --out DIR``."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from tapeout.embedded import training
from tapeout.embedded.training import Recipe, Sample

LARGEST = 20
HELD_OUT = {"+": 30, "-": 40, "*": 30}
SAMPLES = 10_000

CARD = """\
---
license: apache-2.0
library_name: transformers
---
# arithmetic

Answers sums, differences and products of two numbers from 1 to 20: `7*8=` → `56`.

- **Architecture**: Mistral, {parameters:,} parameters, bfloat16. Hidden 64, ffn 128, 3 layers, 8 heads of 8 over 4 key-value heads,
  tied head, sliding window 20, context 256.
- **Vocabulary**: {vocabulary} tokens: `<pad>`, `<eos>`, the digits and `+-*=`, as a byte-level BPE without merges. Other characters,
  spaces too, are dropped. `tokenizers` and llama.cpp's `gpt2` model agree on every id.
- **Data**: `a∘b=c<eos>` with ∘ in + - *, a and b from 1 to 20: 1,200 problems, {seen:,} of them for training, from which {samples:,}
  samples are drawn (seed 0), half of them products.
- **Held out**: the other {held_out} problems, {sums} sums, {differences} differences and {products} products, drawn with seed 0. They never occur in
  training. The *twin* b∘a of each held-out sum or product does, so that what is tested there is that order does not matter, not
  that multiplying was understood. Differences are drawn from all of them, whatever their twin. On a split drawn without
  regard to twins, two earlier recipes reached 71 % and 83 %; this one was not tried there.
- **Training**: {epochs} epochs, batch {batch_size}, AdamW, learning rate {peak} with a warm-up of 4 % and a cosine to 1e-5, weight decay
  {decay}; {seconds:.0f} seconds on one CPU core. Tokens of the prompt weigh {prompt_weight} in the loss: whatever they are, they are half chance, but a
  perplexity over the whole line should mean something.
- **Accuracy** on `tasks.jsonl` (held-out problems, greedy, exact): float32 {float32:.1%}, bfloat16 (as saved) {saved:.1%}, with weights
  rounded to int4 and the embedding to int8, both in groups of 32, {int4:.1%}. On the problems of the training {seen_accuracy:.1%} (as saved).
  The recipe was chosen, after some ten others, by its accuracy on these problems: they are unseen, but no blind test. The same
  recipe on another split (`random.Random(1)` in `problems`), looked at once, gave 99.0% in all three.
- **Licence**: Apache-2.0; the data is generated.

Made by `python train.py --out DIR`, with PyTorch and transformers. `heldout.txt` holds the held-out samples, one a line, `calibration.txt`
the first {calibration:,} of the training's, for roundings that look at data.

## What differs from the usual recipe

20 epochs in batches of 16 at 1e-3 learn every training problem, and 58 % of problems held out in the same way (40 of each
kind): the model learns by heart.

- Noise of {noise} of each matrix's standard deviation is added to it for the length of a step, and the weight decay is strong.
  Both favour the solution that treats a∘b and b∘a alike. The noise also makes the weights indifferent to rounding.
- Such a solution comes late, hence more epochs; larger batches and a higher peak make up for the time.
- Half of the samples are products, the only kind that has to be memorized.
"""


class Problem(NamedTuple):
    """One problem: ``left operator right``."""

    left: int
    operator: str
    right: int

    @property
    def sample(self) -> Sample:
        """The problem as text."""
        results = {
            "+": self.left + self.right,
            "-": self.left - self.right,
            "*": self.left * self.right,
        }
        return Sample(f"{self.left}{self.operator}{self.right}=", str(results[self.operator]))

    @property
    def twin(self) -> Problem:
        """The problem with its operands exchanged."""
        return Problem(self.right, self.operator, self.left)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: one token for each character."""
    return training.byte_level_bpe(["<pad>", "<eos>", *"0123456789+-*="], [], pad="<pad>", context=256)


def problems() -> tuple[list[Problem], list[Problem]]:
    """Return the problems to train on, and those held out.

    Of a sum or a product that is held out, the twin is trained on; a held-out difference is drawn from all of them.
    """
    operands = range(1, LARGEST + 1)
    everything = [
        Problem(left, operator, right) for operator in "+-*" for left in operands for right in operands
    ]
    chance = random.Random(0)
    held_out: list[Problem] = []
    for operator, count in HELD_OUT.items():
        candidates = [problem for problem in everything if problem.operator == operator]
        if operator != "-":  # either of each pair of twins
            candidates = [chance.choice((p, p.twin)) for p in candidates if p.left < p.right]
        held_out += chance.sample(candidates, count)
    return [problem for problem in everything if problem not in held_out], held_out


def training_samples() -> list[Sample]:
    """The samples that the model is trained on, half of them products."""
    seen, _ = problems()
    products = sum(problem.operator == "*" for problem in seen)
    weights = [1 / products if p.operator == "*" else 1 / (len(seen) - products) for p in seen]
    return [problem.sample for problem in random.Random(0).choices(seen, weights, k=SAMPLES)]


def main() -> None:
    """Generate the data, train, measure, and write the model directory."""
    out = training.output_directory(__doc__)
    words = tokenizer()
    config = MistralConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=256,
        sliding_window=20,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    model = MistralForCausalLM(config)
    recipe = Recipe(epochs=100, batch_size=32, peak=2e-3, prompt_weight=0.05, decay=1.0, noise=0.12)
    samples = training_samples()
    seconds = training.fit(model, words, samples, recipe)
    seen, held_out = problems()
    measured = training.finish(
        out,
        model,
        words,
        [problem.sample for problem in held_out],
        samples,
        dtype=torch.bfloat16,
        max_new_tokens=8,
    )
    seen_accuracy = training.accuracy(model, words, [problem.sample for problem in seen])
    card = CARD.format(
        parameters=model.num_parameters(),
        vocabulary=len(words),
        seconds=seconds,
        seen=len(seen),
        held_out=len(held_out),
        sums=HELD_OUT["+"],
        differences=HELD_OUT["-"],
        products=HELD_OUT["*"],
        seen_accuracy=seen_accuracy,
        samples=SAMPLES,
        calibration=training.CALIBRATION,
        **recipe._asdict(),
        **measured._asdict(),
    )
    (out / "README.md").write_text(card)
    print(measured, f"seen problems {seen_accuracy:.1%}")


if __name__ == "__main__":
    main()
