"""The reference of encoders, and what the gates gather of them: sequences in padded batches, and no cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from tapeout.errors import TapeoutError
from tapeout.models import EncoderConfig, Model, efficient
from tapeout.validate import by_layer, pretrained
from tapeout.validate.given import check_ids
from tapeout.validate.session import Facts, Logits, Shown

__all__ = ["EncoderReference", "check_batch", "network", "padded"]


def padded(
    sequences: Sequence[Sequence[int]], padding: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids and mask of sequences, padded on the right: int64 [batch, longest] both, the mask 0 at padding."""
    lengths = np.array([len(each) for each in sequences])
    mask = (np.arange(lengths.max(initial=0)) < lengths[:, None]).astype(np.int64)
    ids = np.full(mask.shape, padding or 0, np.int64)
    ids[mask == 1] = [token for each in sequences for token in each]
    return ids, mask


def check_batch(
    ids: Sequence[Sequence[int]], mask: Sequence[Sequence[int]], vocab_size: int, context: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids and mask as int64 [batch, tokens].

    Raises:
        TapeoutError: rows of several lengths, a mask of another shape or without a token, no token, too many, or an id that is
            not in the vocabulary.
    """
    if len({len(row) for row in [*ids, *mask]}) != 1 or len(ids) != len(mask):
        lengths = f"{[len(row) for row in ids]} ids and {[len(row) for row in mask]} of the mask"
        raise TapeoutError(f"a batch has rows of one length, and a mask like it; found {lengths}.")
    rows, seen = np.array(ids, np.int64), np.array(mask, np.int64)
    if not rows.size or not seen.any(axis=1).all():
        raise TapeoutError("an encoder needs a token that is no padding in every sequence.")
    if not np.isin(seen, (0, 1)).all():
        raise TapeoutError(f"a mask is 0 at padding and 1 elsewhere; found {seen.min()} … {seen.max()}.")
    if rows.shape[1] > context:
        raise TapeoutError(f"{rows.shape[1]} tokens do not fit the context of {context}.")
    check_ids((int(rows.min()), int(rows.max())), vocab_size)
    return rows, seen


class EncoderReference:
    """An EncoderSession on transformers, or on our module where the family is ours."""

    facts: Facts

    def __init__(self, model: Model, module: Any, facts: Facts, tokenizer: Callable[[], Any]) -> None:
        assert isinstance(model.config, EncoderConfig)
        self.facts = facts
        self._config, self._module, self._load_tokenizer = model.config, module, tokenizer

    def encode(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]) -> Logits:
        """What the model gives of a batch; see EncoderSession."""
        import torch

        rows, seen = check_batch(ids, mask, self._config.vocab_size, self.facts.context)
        with torch.inference_mode():
            given, real = torch.from_numpy(rows), torch.from_numpy(seen)
            out = self._forward(given, real)
        return cast(Logits, out.float().numpy())

    def trace(self, ids: Sequence[int], out: str) -> dict[str, Shown]:
        """Write what each layer gives of one sequence, and the output, to ``out``/NAME.npy; see ``by_layer``."""
        with by_layer.kept(self._module) as found:
            output = self.encode([ids], [[1] * len(ids)])
        return by_layer.write(found, output.reshape(-1, output.shape[-1]), "output", out)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text`` as the model takes it, the tokens around it too."""
        return list(self._load_tokenizer().encode(text, add_special_tokens=True))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens kept."""
        return pretrained.text_of(self._load_tokenizer(), ids)

    def close(self) -> None:
        """Free the model."""
        self._module = None

    def _forward(self, ids: Any, mask: Any) -> Any:
        import torch

        c = self._config
        if c.family.startswith("efficient_encoder"):
            return self._module(ids, mask.bool())
        out = self._module(input_ids=ids, attention_mask=mask)
        if c.output == "logits":
            return out.logits
        states = out.last_hidden_state
        if c.output == "last_hidden_state":
            return states
        # As sentence-transformers pools, which clamps its divisors likewise.
        if c.pooling == "cls":
            pooled = states[:, 0]
        else:
            real = mask[..., None].to(states.dtype)
            pooled = (states * real).sum(1) / real.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(pooled, p=2, dim=1) if c.normalize else pooled


def network(source: Model, layers: int | None) -> Any:
    """The model as transformers loads it, or our module, float32; ModelError when a weight would be made up."""
    import torch

    config = source.config
    assert isinstance(config, EncoderConfig)
    if config.family.startswith("efficient_encoder"):
        module = efficient.network(config)
        state = {name: torch.from_numpy(source.checkpoint[name].float32()) for name in source.specs}
        module.load_state_dict(state)
        if layers is not None:
            module.layers = module.layers[:layers]
        return module
    import transformers

    cut = transformers.AutoConfig.from_pretrained(source.directory, local_files_only=True)
    if layers is not None:
        cut.num_hidden_layers = layers
    kind = (
        transformers.AutoModelForSequenceClassification
        if config.output == "logits"
        else transformers.AutoModel
    )
    # A pooler that a headless checkpoint may lack is not looked at.
    return pretrained.load(kind, source.directory, cut, unseen=("pooler.",))
