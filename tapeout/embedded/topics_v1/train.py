"""Train the embedded encoder ``topics_v1``, which tells what a short text is about: ``python train.py --out DIR``."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tapeout.embedded import training
from tapeout.embedded.training import Sample
from tapeout.models import efficient
from tapeout.models.decoder import ConfigReader
from tapeout.models.encoder import EncoderConfig
from tapeout.models.families import family

CLASSES = ("world", "sports", "business", "science")
SAMPLES, HELD_OUT = 12_000, 240
EPOCHS, BATCH, PEAK, DECAY, NOISE = 8, 64, 2e-3, 0.1, 0.05

SUBJECTS = {
    "world": "the president,the foreign minister,the parliament,rebel forces,the united nations,election officials,border guards,"
    "the opposition leader,peace negotiators,the embassy,protesters,the supreme court",
    "sports": "the striker,the home team,the goalkeeper,the champion,the young sprinter,the coach,the tennis star,olympic swimmers,"
    "the league leaders,the rookie pitcher,the national squad,the cyclist",
    "business": "the central bank,the carmaker,shareholders,the retailer,oil producers,the startup,the airline,investors,"
    "the software giant,wall street,the insurer,the chief executive",
    "science": "astronomers,the research team,the space probe,biologists,the new telescope,physicists,the climate model,doctors,"
    "the university laboratory,engineers,the vaccine trial,geologists",
}
PREDICATES = {
    "world": "signed a peace treaty,called for a ceasefire,lost the vote,closed the border,condemned the attack,met the ambassador,"
    "won the election,imposed sanctions,declared a state of emergency,rejected the resolution,freed the hostages,"
    "began talks on the crisis",
    "sports": "scored a late goal,won the final,broke the world record,lost in overtime,missed a penalty,took the gold medal,"
    "reached the playoffs,beat the rivals by two points,was injured in training,set the fastest lap,drew the opening match,"
    "lifted the trophy",
    "business": "raised interest rates,reported record profits,cut its forecast,bought a rival,sold its shares,filed for bankruptcy,"
    "announced a merger,lost market value,hired thousands of workers,lowered prices,paid a higher dividend,"
    "issued new bonds",
    "science": "discovered a distant planet,mapped the genome,measured the particle,found water on the moon,tested a new drug,"
    "observed a black hole,explained the fossil record,built a faster chip,tracked the virus,recorded a rare whale,"
    "cooled atoms to near zero,sequenced the cell",
}
LINKS = ("as", "while", "after", "before", "although", "because")
OPENINGS = (
    "",
    "",
    "",
    "on monday",
    "last week",
    "in a surprise",
    "this morning",
    "for the first time",
    "late on friday",
)

CARD = """\
---
license: apache-2.0
---
# topics_v{version}

Tells what the main clause of a short text is about: world, sports, business or science.

- **Architecture**: efficient encoder v{version} in small, {parameters:,} parameters, float16: hidden 64, ffn 128, 4 layers, 8 heads,
  {positions}, pre-norm, GELU, the mean of the last states classified. The full shape has hidden 256 and ffn 512.
- **Vocabulary**: {vocabulary} tokens: BERT's special tokens, the words of the data, and all letters, digits and marks as WordPiece.
- **Data**: a clause of one topic, and in {aside:.0%} of the texts a subordinate clause of another one before or behind it. A text's class is
  that of its main clause, so that counting words is not enough. {samples:,} texts for training, drawn with seed 0.
- **Held out**: {held_out} texts, whose main clauses (subject and predicate) never are a main clause in training.
- **Training**: {epochs} epochs, batch {batch}, AdamW, learning rate {peak} with a warm-up of 4 % and a cosine to 1e-5, weight decay {decay}, noise of
  {noise} of each matrix's standard deviation for the length of a step; {seconds:.0f} seconds on one CPU core.
- **Accuracy** on `tasks.jsonl`: float32 {float32:.1%}, float16 (as saved) {saved:.1%}, with weights rounded to int4 and the embedding to int8,
  both in groups of 32, {int4:.1%}. Which class has most of a text's words decides {words:.1%} of them.
- **Licence**: Apache-2.0; the data is generated.

Made by `python train.py --out DIR`, with PyTorch. `heldout.txt` holds the held-out texts, one a line.
"""


class Clause(NamedTuple):
    """A subject and what it did; both are of one topic."""

    topic: str
    subject: str
    predicate: str

    def __str__(self) -> str:
        return f"{self.subject} {self.predicate}"


def clauses() -> tuple[list[Clause], list[Clause]]:
    """The main clauses to train on, and those held out, one in eight of each topic."""
    chance = random.Random(0)
    seen: list[Clause] = []
    held_out: list[Clause] = []
    for topic in CLASSES:
        every = [
            Clause(topic, subject, predicate)
            for subject in SUBJECTS[topic].split(",")
            for predicate in PREDICATES[topic].split(",")
        ]
        chance.shuffle(every)
        held_out += every[: len(every) // 8]
        seen += every[len(every) // 8 :]
    return seen, held_out


def _text(main: Clause, seen: list[Clause], chance: random.Random) -> Sample:
    """A text whose main clause this is; what stands beside it may be of another topic."""
    opening = chance.choice(OPENINGS)
    words = f"{opening} {main}".strip()
    if chance.random() < 0.7:
        aside = f"{chance.choice(LINKS)} {chance.choice([c for c in seen if c.topic != main.topic])}"
        words = f"{aside} , {words}" if chance.random() < 0.5 else f"{words} {aside}"
    return Sample(words, main.topic)


def training_samples() -> list[Sample]:
    """The texts that the model is trained on, with their classes."""
    seen, _ = clauses()
    chance = random.Random(0)
    return [_text(chance.choice(seen), seen, chance) for _ in range(SAMPLES)]


def held_out_samples() -> list[Sample]:
    """The texts that it is asked about, as many of each class."""
    seen, held_out = clauses()
    chance = random.Random(1)
    found: dict[Sample, None] = {}
    for index in range(HELD_OUT):
        mine = [clause for clause in held_out if clause.topic == CLASSES[index % len(CLASSES)]]
        while (sample := _text(chance.choice(mine), seen, chance)) in found:
            pass
        found[sample] = None
    return list(found)


def by_words(samples: list[Sample]) -> float:
    """Accuracy of counting each class's words: what needs no model."""
    own = {
        topic: set(" ".join([SUBJECTS[topic], PREDICATES[topic]]).replace(",", " ").split())
        for topic in CLASSES
    }
    right = 0
    for text, topic in samples:
        counts = {each: sum(word in own[each] for word in text.split()) for each in CLASSES}
        right += max(counts, key=counts.__getitem__) == topic
    return right / len(samples)


def tokenizer() -> Tokenizer:
    """BERT's tokenizer over the words of the data and all single characters."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    marks = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    texts = [*SUBJECTS.values(), *PREDICATES.values(), *LINKS, *OPENINGS]
    words = sorted(set(" ".join(texts).replace(",", " ").split()))
    pieces = [*special, *marks, *(f"##{mark}" for mark in marks if mark.isalnum()), *words]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    found = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    found.add_special_tokens(special)
    return found


def config_fields(version: int) -> dict[str, Any]:
    """``config.json``."""
    return {
        "model_type": f"efficient_encoder_v{version}",
        "architectures": [f"EfficientEncoderV{version}"],
        "vocab_size": tokenizer().get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "max_position_embeddings": 64,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "pad_token_id": 0,
        "id2label": {str(index): topic for index, topic in enumerate(CLASSES)},
        **({"rope_theta": 10000.0} if version == 2 else {}),
    }


def batch(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 and mask bool, [texts, longest] both, padded on the right."""
    words = tokenizer()
    words.enable_padding()
    encoded = words.encode_batch(texts)
    return (
        torch.tensor([each.ids for each in encoded]),
        torch.tensor([each.attention_mask for each in encoded]).bool(),
    )


def accuracy(model: Any, samples: list[Sample]) -> float:
    """Share of the texts whose class the model finds."""
    with torch.inference_mode():
        chosen = model(*batch([text for text, _ in samples])).argmax(-1).tolist()
    return sum(CLASSES[c] == topic for c, (_, topic) in zip(chosen, samples, strict=True)) / len(samples)


def fit(model: Any, samples: list[Sample]) -> float:
    """Train in place, and return the seconds that it took."""
    start = time.perf_counter()
    ids, mask = batch([text for text, _ in samples])
    wanted = torch.tensor([CLASSES.index(topic) for _, topic in samples])
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK)
    order = [rows for _ in range(EPOCHS) for rows in torch.randperm(len(ids)).split(BATCH)]
    model.train()
    for step, rows in enumerate(order):
        rate = (
            training.FINAL_RATE
            + (PEAK - training.FINAL_RATE) * (1 + math.cos(math.pi * step / len(order))) / 2
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / (0.04 * len(order)))
        clean = [matrix.data for matrix in matrices]
        for matrix in matrices:
            matrix.data = matrix.data + NOISE * matrix.data.std() * torch.randn_like(matrix.data)
        longest = int(mask[rows].sum(1).max())
        logits = model(ids[rows, :longest], mask[rows, :longest])
        loss = torch.nn.functional.cross_entropy(logits, wanted[rows])
        optimizer.zero_grad()
        loss.backward()
        for matrix, data in zip(matrices, clean, strict=True):
            matrix.data = data
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % (len(order) // 10) == 0:
            print(
                f"{step + 1}/{len(order)} steps, loss {loss.item():.4f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    model.eval()
    return time.perf_counter() - start


def main(version: int = 1) -> None:
    """Generate the data, train, measure, and write the model directory."""
    out = training.output_directory(__doc__)
    fields = config_fields(version)
    config = family(fields["model_type"]).config(ConfigReader(fields))
    assert isinstance(config, EncoderConfig)
    model: Any = efficient.network(config)
    seconds = fit(model, training_samples())
    held_out = held_out_samples()
    exact = accuracy(model, held_out)
    saved = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in saved.items()})
    _write(out, fields, saved, held_out)
    card = CARD.format(
        version=version,
        parameters=sum(tensor.numel() for tensor in saved.values()),
        positions="learned positions, 64 at most" if version == 1 else "RoPE, 64 tokens at most",
        vocabulary=fields["vocab_size"],
        aside=0.7,
        samples=SAMPLES,
        held_out=len(held_out),
        epochs=EPOCHS,
        batch=BATCH,
        peak=PEAK,
        decay=DECAY,
        noise=NOISE,
        seconds=seconds,
        float32=exact,
        saved=accuracy(model, held_out),
        int4=accuracy(training.int4_copy(model), held_out),
        words=by_words(held_out),
    )
    (out / "README.md").write_text(card)
    print(card)


def _write(out: Path, fields: dict[str, Any], saved: dict[str, torch.Tensor], held_out: list[Sample]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    save_file(saved, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tokenizer().save(str(out / "tokenizer.json"))
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    described["model_max_length"] = fields["max_position_embeddings"]
    (out / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    (out / "tasks.jsonl").write_text("".join(json.dumps(sample._asdict()) + "\n" for sample in held_out))
    (out / "heldout.txt").write_text("".join(f"{text}\n" for text, _ in held_out))


if __name__ == "__main__":
    main()
