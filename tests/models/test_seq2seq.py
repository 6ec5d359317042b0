"""The encoder-decoder's graphs in torch are transformers', token by token and in padded batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.errors import ModelError
from tapeout.generated import write_model
from tapeout.models import Seq2SeqConfig, load
from tapeout.models.seq2seq import decode, encode
from tapeout.models.torch_seq2seq import TorchSeq2SeqOps

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "shallow-decoder": {
        "num_decoder_layers": 1,
        "feed_forward_proj": "gated-silu",
        "decoder_start_token_id": 7,
    },
    "unscaled": {"scale_decoder_outputs": False, "dense_act_fn": "gelu_new", "is_gated_act": False},
}
# Logits of size 1 come out of five layers of up to eight matmuls in a row, of up to 128 products of size 1: a sum of n of them
# is off by about sqrt(n) 2^-24, in either; scores are not scaled, so that an error in them is one of the weights of values.
TOLERANCE = 40 * 128**0.5 * 2**-24 * 8


def network(directory: Path) -> Any:
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    model = load(write_model(tmp_path / case, "t5", CASES[case], dtype="F32"))
    config = model.config
    assert isinstance(config, Seq2SeqConfig)
    wanted = network(model.directory)
    assert (wanted.lm_head.weight is wanted.shared.weight) == config.tie_word_embeddings
    weights = {name: torch.from_numpy(model.checkpoint[name].float32()) for name in model.specs}
    random = np.random.default_rng(0)
    for batch, source, target in ((1, 1, 1), (1, 150, 2), (3, 37, 24), (8, 20, 11)):
        ids = torch.from_numpy(random.integers(3, 250, (batch, source)))
        given = torch.from_numpy(random.integers(3, 250, (batch, target)))
        given[:, 0] = config.decoder_start_token_id
        mask = torch.arange(source)[None] < torch.from_numpy(random.integers(1, source + 1, (batch, 1)))
        ops = TorchSeq2SeqOps(weights.__getitem__, mask=mask, config=config, tokens=source)
        with torch.inference_mode():
            expected = wanted(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=given).logits
            encode(ops, config, ids)
            ops.tokens = target
            found = decode(ops, config, given)
            assert float((found - expected).abs().max()) < TOLERANCE
            ops.kept, ops.tokens, rows = {}, 1, []
            for ops.past in range(target):
                rows.append(decode(ops, config, given[:, ops.past : ops.past + 1]))
            assert float((torch.cat(rows, 1) - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize(
    ("buckets", "distance"), [(32, 128), (16, 40), (8, 20), (32, 64), (64, 256), (12, 100)]
)
def test_distances_fall_into_the_buckets_of_transformers(tmp_path: Path, buckets: int, distance: int) -> None:
    fields = {
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": distance,
        "n_positions": 2048,
    }
    config = load(write_model(tmp_path / "t5", "t5", fields, dtype="F32")).config
    assert isinstance(config, Seq2SeqConfig)
    of_transformers = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    distances = torch.arange(-2047, 2048)
    for stack in ("encoder", "decoder"):
        expected = of_transformers(distances, stack == "encoder", buckets, distance)
        np.testing.assert_array_equal(config.bucket(stack), expected.numpy())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feed_forward_proj": "gated-relu"}, r"with a gate and the activation 'relu' is not handled"),
        ({"feed_forward_proj": "tanh"}, r"the activation 'tanh' is not handled"),
        ({"architectures": ["T5EncoderModel"]}, r"the architecture T5EncoderModel is not handled"),
        ({"relative_attention_num_buckets": 30}, r"num_buckets = 30 .* is not handled: a multiple of 4"),
        ({"d_kv": 0}, r"d_kv = 0 is not a positive integer"),
        ({"layer_scale": 2}, r"layer_scale = 2, which the family 't5' does not handle"),
    ],
)
def test_what_is_not_handled_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    directory = write_model(tmp_path / "t5", "t5", dtype="F32")
    raw = json.loads((directory / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=message):
        load(directory)


def test_a_head_of_its_own_is_not_overlooked(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "t5", "t5", {"tie_word_embeddings": False}, dtype="F32")
    raw = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"unexpected: lm_head\.weight"):
        load(directory)
