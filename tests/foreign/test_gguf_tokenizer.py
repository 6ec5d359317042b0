"""A SentencePiece vocabulary as a GGUF file has it (tokens, scores, types), against sentencepiece itself."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from tapeout.models import gguf_tokenizer
from tapeout.validate import corpus


@dataclass
class Field:
    """What ``gguf.GGUFReader`` gives for a key."""

    value: Any

    def contents(self) -> Any:
        return self.value


@pytest.fixture(scope="module")
def processor() -> sentencepiece.SentencePieceProcessor:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.hostile(count=700)), model_writer=written, model_type="bpe", vocab_size=1200,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        character_coverage=0.98, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def fields_of(processor: sentencepiece.SentencePieceProcessor, **more: Any) -> dict[str, Field]:
    """As llama.cpp's converter writes them."""
    ids = range(processor.get_piece_size())
    types = [
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
        for i in ids
    ]
    found = {
        "model": "llama",
        "pre": "default",
        "tokens": [processor.id_to_piece(i) for i in ids],
        "scores": [processor.get_score(i) for i in ids],
        "token_type": types,
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
    }
    return {f"tokenizer.ggml.{name}": Field(value) for name, value in (found | more).items()}


def test_ids_are_sentencepieces(processor: sentencepiece.SentencePieceProcessor) -> None:
    files = gguf_tokenizer.files(Path("some.gguf"), fields_of(processor))
    rebuilt = Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    special = ("<unk>", "<s>", "</s>")
    texts = [
        text for text in corpus.hostile(count=1500, seed=1) if not any(token in text for token in special)
    ]
    different = [
        text
        for text in texts
        if text and rebuilt.encode(text, add_special_tokens=False).ids != processor.encode(text)
    ]
    assert not different
    assert rebuilt.encode("ab").ids == [processor.bos_id(), *processor.encode("ab")]
    assert rebuilt.decode(rebuilt.encode("ab cd").ids) == "ab cd"


def test_what_is_put_around_a_text(processor: sentencepiece.SentencePieceProcessor) -> None:
    own = fields_of(processor, add_bos_token=False, add_eos_token=True, add_space_prefix=False)
    files = gguf_tokenizer.files(Path("some.gguf"), own)
    rebuilt = Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    assert rebuilt.encode("a b").tokens[-1] == "</s>"
    assert rebuilt.encode("a b").tokens[0] == "a"
    assert files["generation_config.json"] == {"eos_token_id": [processor.eos_id()]}
    assert files["tokenizer_config.json"]["bos_token"] == "<s>"
