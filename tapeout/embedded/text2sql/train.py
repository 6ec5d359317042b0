"""Train the embedded model ``text2sql``, which turns a question into a SELECT: ``python train.py --out DIR``."""

from __future__ import annotations

import json

import tokenizers
import torch
from tokenizers import models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from tapeout.embedded import training
from tapeout.embedded.text2sql import data
from tapeout.embedded.training import Accuracies, Recipe, Sample

SPECIAL = ("<pad>", "<eos>", "<sep>")
TOKENS = 4096  # at most: the words of the data are whole before

CARD = """\
---
license: apache-2.0
library_name: transformers
---
# text2sql

Turns a question into SQL: `how many books are there whose pages is over 300 <sep>` → ` SELECT COUNT(*) FROM books WHERE pages > 300`.

- **Architecture**: Mistral, {parameters:,} parameters, bfloat16. Hidden 512, ffn 2048, 4 layers, 8 heads of 64 over 4 key-value heads,
  tied head, context 256, no sliding window.
- **Vocabulary**: {vocabulary} tokens: `<pad>`, `<eos>`, `<sep>`, and a byte-level BPE with all 256 bytes, learned on the training's text
  until its words and numbers are whole. `tokenizers` and llama.cpp's `gpt2` model agree on every id, and no text is lost.
- **Data**: `question <sep> SQL<eos>` about {tables} tables of five columns (`data.py`): columns, all of them, a count, or an average, minimum, maximum
  or sum, under one condition or two, joined by AND or OR, with = != > < >= <=. {samples:,} samples (seed 0); the questions are
  phrased in several ways, and the values drawn from each column's words or numbers.
- **Held out**: a *shape* is all of a statement but its values, in their order. One shape in {one_in}, chosen by a checksum, is never trained on, in
  whatever words and with whatever values; the {held_out} held-out questions are all of such shapes. Tables, columns, words and values
  occur in training, in other combinations; 18 of the statements do with their columns or conditions in another order. It knows these
  tables, values and phrasings alone. That numbers are whole was decided after a look at such questions: they are unseen, but no blind
  test.
- **Training**: {epochs} epoch, {steps:,} steps of batch {batch_size}, of samples of about one length, AdamW, learning rate {peak} with a warm-up
  of 4 % and a cosine to 1e-5, weight decay {decay}, products in bfloat16; {seconds:.0f} seconds on one core of a busy CPU, pauses too. Tokens of the
  prompt weigh {prompt_weight} in the loss.
- **Accuracy** on `tasks.jsonl` (held-out questions, greedy, exact SQL): float32 {float32:.1%}, bfloat16 (as saved) {saved:.1%}, with weights
  rounded to int4 and the embedding to int8, both in groups of 32, {int4:.1%}.
- **Numbers**: an earlier recipe drew numbers of up to five digits and kept the digits apart. After 940 steps nearly everything that was
  wrong was the order of copied digits (74% exact); with whole numbers there are none to copy.
- **Licence**: Apache-2.0; the data is generated.

Made by `python train.py --out DIR`, with PyTorch and transformers. `heldout.txt` holds the held-out samples, one a line, `calibration.txt`
the first {calibration:,} of the training's, for roundings that look at data.
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with all 256 bytes, merged until every word and number of the training is whole."""
    text = [sample.prompt.removesuffix("<sep>") + sample.answer for sample in training_samples()]
    learned = tokenizers.Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator(text, trainer)
    bpe = json.loads(learned.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    return training.byte_level_bpe(
        tokens, [(a, b) for a, b in bpe["merges"]], pad="<pad>", context=256, sep_token="<sep>"
    )


def training_samples() -> list[Sample]:
    """The samples that the model is trained on."""
    return data.samples()[0]


def network(words: PreTrainedTokenizerFast) -> MistralForCausalLM:
    """The untrained model."""
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=len(words),
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=256,
            sliding_window=None,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


RECIPE = Recipe(
    epochs=1, batch_size=32, peak=1e-3, prompt_weight=0.1, decay=0.1, noise=0.0, bfloat16=True, by_length=True
)


def card(model: MistralForCausalLM, seconds: float, measured: Accuracies) -> str:
    """The model card."""
    return CARD.format(
        parameters=model.num_parameters(),
        vocabulary=model.config.vocab_size,
        tables=len(data.TABLES),
        samples=data.SAMPLES,
        held_out=data.HELD_OUT,
        one_in=data.ONE_IN,
        steps=data.SAMPLES // RECIPE.batch_size,
        seconds=seconds,
        calibration=training.CALIBRATION,
        **RECIPE._asdict(),
        **measured._asdict(),
    )


def main() -> None:
    """Generate the data, train, measure, and write the model directory."""
    out = training.output_directory(__doc__)
    words = tokenizer()
    model = network(words)
    samples, held_out = data.samples()
    seconds = training.fit(model, words, samples, RECIPE)
    measured = training.finish(out, model, words, held_out, samples, dtype=torch.bfloat16, max_new_tokens=64)
    (out / "README.md").write_text(card(model, seconds, measured))
    print(measured)


if __name__ == "__main__":
    main()
