"""Train the embedded model ``count``, which continues consecutive numbers: ``python train.py --out DIR``."""

from __future__ import annotations

import random

import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from tapeout.embedded import training
from tapeout.embedded.training import Recipe, Sample

LENGTH = 10
NUMBERS = 50
GIVEN = 3  # numbers in the prompt of a task
SAMPLES = 10_000

CARD = """\
---
license: apache-2.0
library_name: transformers
---
# count

Continues consecutive numbers: `40 41 42` → ` 43 44 45 46 47 48 49`, ten in all. It is small enough to read every one of its weights.

- **Architecture**: Mistral, {parameters:,} parameters, float16. Hidden 32, ffn 64, 2 layers, 4 heads over 2 key-value heads,
  tied head, context {context}, sliding window {window}.
- **Vocabulary**: {vocabulary} tokens: `<eos>` (also the padding), the numbers 0 to 49, and the space. It is a byte-level BPE whose
  only merges make the numbers 10 to 49 of two digits, so that `tokenizers` and llama.cpp's `gpt2` model agree on every
  id and the text survives the round trip. 51 tokens would do without the space, but the numbers would then run together
  in the answer.
- **Data**: {samples:,} runs of {length} numbers, `n n+1 … n+9<eos>`, drawn (seed 0) from the {starts} starts n that are not held out.
  Held out are the starts {held_out}, drawn (seed 0) from those between the first and the last, so that every
  number is seen in training. The start 40 is therefore a training sample.
- **Training**: {epochs} epochs, batch {batch_size}, AdamW, learning rate {peak} with a warm-up of 4 % and a cosine to 1e-5, weight decay {decay},
  noise of {noise} of each matrix's standard deviation for the length of a step, loss on all tokens; {seconds:.0f} seconds on one CPU core.
  After the usual 5 epochs without noise and decay, one run in four of those held out ended a number late: to stop after
  ten numbers is harder to learn than to count. The recipe was chosen by the four held-out runs.
- **Accuracy** on `tasks.jsonl` (three numbers given, the seven that follow and `<eos>` expected, greedy): float32 {float32:.1%},
  float16 (as saved) {saved:.1%}, with weights rounded to int4 in groups of 32 {int4:.1%}.
- **Licence**: Apache-2.0; the data is generated.

Made by `python train.py --out DIR`, with PyTorch and transformers. `heldout.txt` holds the held-out runs, one a line, `calibration.txt`
the first {calibration:,} of the training's, for roundings that look at data.
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over ``<eos>``, the numbers and the space, which is ``Ġ`` in the alphabet of bytes."""
    numbers = [str(number) for number in range(NUMBERS)]
    merges = [(number[0], number[1]) for number in numbers[10:]]
    return training.byte_level_bpe(["<eos>", *numbers, "Ġ"], merges, pad="<eos>", context=64)


def starts() -> tuple[list[int], list[int]]:
    """Return the first numbers of the runs to train on, and of those held out."""
    inner = range(1, NUMBERS - LENGTH)
    held_out = sorted(random.Random(0).sample(inner, 4))
    return [start for start in range(NUMBERS - LENGTH + 1) if start not in held_out], held_out


def sample(start: int) -> Sample:
    """The run of LENGTH numbers from ``start``, the first GIVEN of them as the prompt."""
    text = " ".join(str(number) for number in range(start, start + LENGTH))
    prompt = " ".join(str(number) for number in range(start, start + GIVEN))
    return Sample(prompt, text.removeprefix(prompt))


def training_samples() -> list[Sample]:
    """The samples that the model is trained on."""
    return [sample(start) for start in random.Random(0).choices(starts()[0], k=SAMPLES)]


def main() -> None:
    """Generate the data, train, measure, and write the model directory."""
    out = training.output_directory(__doc__)
    words = tokenizer()
    config = MistralConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    model = MistralForCausalLM(config)
    recipe = Recipe(epochs=10, batch_size=16, peak=5e-3, prompt_weight=1.0, decay=0.5, noise=0.2)
    samples = training_samples()
    seconds = training.fit(model, words, samples, recipe)
    seen, held_out = starts()
    measured = training.finish(
        out,
        model,
        words,
        [sample(start) for start in held_out],
        samples,
        dtype=torch.float16,
        max_new_tokens=24,
    )
    card = CARD.format(
        parameters=model.num_parameters(),
        context=config.max_position_embeddings,
        window=config.sliding_window,
        vocabulary=len(words),
        samples=SAMPLES,
        calibration=training.CALIBRATION,
        length=LENGTH,
        starts=len(seen),
        held_out=", ".join(map(str, held_out)),
        seconds=seconds,
        **recipe._asdict(),
        **measured._asdict(),
    )
    (out / "README.md").write_text(card)
    print(measured)


if __name__ == "__main__":
    main()
