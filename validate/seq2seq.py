"""The reference of encoder-decoders, and what the gates gather of them: a sequence is a source and a target, half each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from tapeout.errors import TapeoutError
from tapeout.models import Model, Seq2SeqConfig
from tapeout.validate import by_layer, pretrained
from tapeout.validate.evidence import Evidence
from tapeout.validate.session import Facts, Logits, Shown

__all__ = ["Seq2SeqEvidence", "Seq2SeqReference", "network"]


class Seq2SeqReference:
    """A Session on transformers: the first tokens after ``reset`` are the source, what follows is the target."""

    facts: Facts

    def __init__(self, model: Model, module: Any, facts: Facts, tokenizer: Callable[[], Any]) -> None:
        assert isinstance(model.config, Seq2SeqConfig)
        self.facts = facts
        self._config, self._module, self._load_tokenizer = model.config, module, tokenizer
        self._source: Any = None
        self._cache: Any = None
        self._length = 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Take the source, and return what follows the target's begin, float32 [1, vocab]; or append tokens to the target."""
        import torch
        from transformers import DynamicCache, EncoderDecoderCache

        if self._source is not None:
            return self._step(ids)
        self._check(ids, 0)
        with torch.inference_mode():
            self._source = self._module.get_encoder()(input_ids=torch.tensor([list(ids)]))
        # Its own choice counts the encoder's layers.
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return self._step([self._config.decoder_start_token_id])

    def decode(self, token: int) -> Logits:
        """Append one token to the target; return float32 [vocab]."""
        return cast(Logits, self._step([token])[0])

    def trace(self, ids: Sequence[int], out: str) -> dict[str, Shown]:
        """Write what each layer gives of a source and a target, half each, and the logits, to ``out``/NAME.npy; see ``by_layer``."""
        self.reset()
        source, target = halves(ids)
        with by_layer.kept(self._module) as found:
            logits = np.concatenate([self.prefill(source), self.prefill(target)])
        self.reset()
        return by_layer.write(found, logits, "logits", out)

    def reset(self) -> None:
        """Begin anew: the next tokens are a source."""
        self._source = self._cache = None
        self._length = 0

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text`` as the model takes it, with the token that ends it."""
        return list(self._load_tokenizer().encode(text, add_special_tokens=True))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens kept."""
        return pretrained.text_of(self._load_tokenizer(), ids)

    def close(self) -> None:
        """Free the model."""
        self._module = self._source = self._cache = None

    def _step(self, ids: Sequence[int]) -> Logits:
        import torch

        self._check(ids, self._length)
        with torch.inference_mode():
            logits = self._module(
                encoder_outputs=self._source,
                decoder_input_ids=torch.tensor([list(ids)]),
                past_key_values=self._cache,
                use_cache=True,
            ).logits
        self._length += len(ids)
        return cast(Logits, logits[0].float().numpy())

    def _check(self, ids: Sequence[int], before: int) -> None:
        if not ids or before + len(ids) > self.facts.context:
            raise TapeoutError(
                f"{before + len(ids)} tokens do not fit the context of {self.facts.context}, or there are none."
            )


def network(source: Model, layers: int | None) -> Any:
    """The model as transformers loads it, float32; ModelError when a weight would be made up."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    config = source.config
    assert isinstance(config, Seq2SeqConfig)
    cut = AutoConfig.from_pretrained(source.directory, local_files_only=True)
    cut.num_layers = min(config.encoder_layers, layers or config.encoder_layers)
    cut.num_decoder_layers = min(config.decoder_layers, layers or config.decoder_layers)
    return pretrained.load(AutoModelForSeq2SeqLM, source.directory, cut)


class Seq2SeqEvidence(Evidence):
    """Evidence whose rows are what follows the target's begin and each of its tokens: one more than the target has."""

    @property
    def window(self) -> None:
        """There is none."""

    def begin(self, session: Any) -> None:
        """Give the probe's source."""
        session.reset()
        session.prefill(halves(self.probe)[0])

    @property
    def probed(self) -> list[int]:
        """The probe's target."""
        return halves(self.probe)[1]

    def scored(self, ids: Sequence[int]) -> list[int]:
        """The target with what it begins with, which the rows belong to."""
        config = self.model.config
        assert isinstance(config, Seq2SeqConfig)
        return [config.decoder_start_token_id, *halves(ids)[1]]

    def golden(self, ids: Sequence[int], rows: Logits) -> tuple[tuple[int, ...], Logits]:
        """The source, and what follows the target's begin."""
        return tuple(halves(ids)[0]), rows[0].copy()

    def _answers(self, session: Any, sequences: Sequence[Sequence[int]]) -> Iterator[Logits]:
        for ids in sequences:
            source, target = halves(ids)
            session.reset()
            yield np.concatenate([session.prefill(source), session.prefill(target)])


def halves(ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """The source and the target of a sequence."""
    middle = (len(ids) + 1) // 2
    return list(ids[:middle]), list(ids[middle:])
