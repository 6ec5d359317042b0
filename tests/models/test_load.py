"""Models are read as Hugging Face writes them, and whatever is wrong with one is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tapeout.errors import ModelError
from tapeout.generated import FAMILIES
from tapeout.models import load
from tapeout.models.families import known

MakeModel = Callable[..., Path]


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the JSON header of a safetensors file, keeping its length."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    path.write_bytes(data[:8] + text + data[8 + length :])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shard_bytes", [None, 50_000])
def test_tensors_equal_what_transformers_loads(
    make_model: MakeModel, dtype: str, shard_bytes: int | None
) -> None:
    directory = make_model("mistral", dtype=dtype, shard_bytes=shard_bytes, sliding_window=None)
    model = load(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    assert set(model.specs) == set(theirs)
    for name, expected in theirs.items():
        np.testing.assert_array_equal(model.checkpoint[name].float32(), expected.numpy())


def test_digest_does_not_depend_on_sharding(make_model: MakeModel) -> None:
    one = load(make_model(name="one")).checkpoint
    many = load(make_model(name="many", shard_bytes=40_000)).checkpoint
    other = load(make_model(name="other", seed=1)).checkpoint
    with ThreadPoolExecutor(2) as pool:
        assert one.sha256(pool) == many.sha256(pool) != other.sha256(pool)
    assert len({tensor.file for tensor in many.values()}) > 3


def test_rope_of_both_generations_of_config(make_model: MakeModel) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = load(make_model(name="old", rope_theta=500000.0, rope_scaling=scaling)).config.rope
    new = load(
        make_model(name="new", rope_theta=None, rope_parameters=scaling | {"rope_theta": 500000.0})
    ).config.rope
    assert old == new
    assert (old.theta, old.kind, old.parameters["factor"]) == (500000.0, "llama3", 8.0)


def test_mistral_window_absent_null_and_given(make_model: MakeModel) -> None:
    assert (
        load(make_model("mistral", name="absent")).config.sliding_window == 4096
    )  # as transformers' MistralConfig
    assert load(make_model("mistral", name="null", sliding_window=None)).config.sliding_window is None
    assert load(make_model("mistral", name="given", sliding_window=24)).config.sliding_window == 24


def test_chat_template_generation_and_licence(make_model: MakeModel) -> None:
    directory = make_model()
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (directory / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": [256, 7]})
    )
    model = load(directory)
    assert model.chat_template == "{{ messages }}"
    assert model.licence == "apache-2.0"
    assert (model.generation.temperature, model.generation.top_k) == (0.7, 50)  # 50: transformers' default
    assert model.generation.stop_token_ids == (256, 7)


def test_a_family_file_is_its_registry_entry() -> None:
    assert {"llama", "mistral"} < set(known())
    assert set(known()) >= set(FAMILIES)  # the small shapes are of families that there are
    assert not any(name.startswith("_") for name in known())


def break_truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def break_empty(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def break_overlap(directory: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        begin, end = header["model.norm.weight"]["data_offsets"]
        header["model.norm.weight"]["data_offsets"] = [begin - 64, end - 64]

    edit_header(directory / "model.safetensors", overlap)


def break_range(directory: Path) -> None:
    def beyond(header: dict[str, Any]) -> None:
        begin, end = header["model.norm.weight"]["data_offsets"]
        header["model.norm.weight"]["data_offsets"] = [begin + 10**6, end + 10**6]

    path = directory / "model.safetensors"
    data = path.read_bytes()  # room in the header for longer numbers
    length = int.from_bytes(data[:8], "little")
    path.write_bytes(
        (length + 16).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 16 + data[8 + length :]
    )
    edit_header(path, beyond)


def edit_tensors(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        edit(tensors)
        save_file(tensors, directory / "model.safetensors")

    return apply


def break_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


BROKEN = [
    (break_truncate, r"model\.safetensors \(\d+ bytes\) is not a whole safetensors file"),
    (break_empty, r"\(0 bytes\) is not a whole safetensors file"),
    (break_overlap, r"is not a whole safetensors file.*"),
    (break_range, r"is not a whole safetensors file.*"),
    (lambda d: (d / "model.safetensors").unlink(), r"holds no weights: expected model\.safetensors"),
    (break_pickle, r"pickled weights \(pytorch_model\.bin\).*can run code.*save_pretrained"),
    (edit_tensors(lambda t: t.pop("model.norm.weight")), r"missing: model\.norm\.weight"),
    (edit_tensors(lambda t: t.update(extra=t["model.norm.weight"])), r"unexpected: extra"),
    (
        edit_tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1]})),
        r"model\.norm\.weight is \[63\] where config\.json says \[64\]",
    ),
    (
        edit_tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.int32)})),
        r"model\.norm\.weight in .* is I32; expected one of",
    ),
    (lambda d: (d / "config.json").unlink(), r"config\.json is absent"),
    (lambda d: (d / "config.json").write_text("{not json"), r"config\.json is not JSON"),
    (lambda d: (d / "config.json").write_text("[]"), r"holds list where an object is expected"),
    (lambda d: (d / "config.json").write_text("{}"), r"has no model_type"),
    (
        lambda d: edit_config(d, model_type="lama"),
        r"'lama' is not a family.*did you mean 'llama'.*llama, mistral, mixtral",
    ),
    (lambda d: edit_config(d, hidden_size=None), r"lacks hidden_size"),
    (lambda d: edit_config(d, num_hidden_layers="two"), r"num_hidden_layers = 'two' is not a positive"),
    (lambda d: edit_config(d, rms_norm_eps="small"), r"field of the wrong type"),
    (lambda d: edit_config(d, num_attention_heads=0), r"num_attention_heads = 0 is not a positive integer"),
    (
        lambda d: edit_config(d, num_key_value_heads=3),
        r"num_attention_heads = 8 is no multiple of num_key_value_heads = 3; fits: 1, 2, 4, 8",
    ),
    (
        lambda d: edit_config(d, num_attention_heads=12),
        r"hidden_size = 64 is no multiple of num_attention_heads = 12",
    ),
    (
        lambda d: edit_config(d, num_attention_heads=4),
        r"k_proj\.weight is \[32, 64\] where config\.json says \[64, 64\]",
    ),
    (lambda d: edit_config(d, head_dim=7), r"RoPE turns pairs: 7 elements of a head of 7"),
    (lambda d: edit_config(d, partial_rotary_factor=0.5), r"partial_rotary_factor = 0\.5 is not handled"),
    (
        lambda d: edit_config(d, final_logit_softcapping=30.0),
        r"has final_logit_softcapping = 30\.0.*does not handle",
    ),
    (
        lambda d: edit_config(d, hidden_act="relu2"),
        r"the activation 'relu2' is not handled.*gelu_pytorch_tanh, silu",
    ),
    (
        lambda d: edit_config(d, rope_scaling={"rope_type": "su", "factor": 2.0}),
        r"rope_type 'su' is not handled",
    ),
    (lambda d: edit_config(d, rope_scaling={"type": "llama3", "factor": 2.0}), r"lacks low_freq_factor"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_what_is_wrong_is_named(make_model: MakeModel, damage: Callable[[Path], Any], message: str) -> None:
    directory = make_model(dtype="F32")
    load(directory)
    damage(directory)
    with pytest.raises(ModelError, match=re.compile(message, re.DOTALL)) as raised:
        load(directory)
    assert "\n" not in str(raised.value)


def test_a_missing_shard_is_named(make_model: MakeModel) -> None:
    directory = make_model(shard_bytes=50_000)
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=rf"names the shard {shard.name} \(\d+ tensors\), which is missing"):
        load(directory)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (
            "qwen2",
            {"layer_types": ["full_attention", "chunked_attention"]},
            r"'chunked_attention' in layer_types",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, r"layer_types names 1 layers of 2"),
        ("gemma3_text", {"use_bidirectional_attention": True}, r"has use_bidirectional_attention = true"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"has attn_logit_softcapping = 50"),
        ("gemma", {"hidden_act": "silu", "hidden_activation": "gelu"}, r"contradict each other"),
        ("phi3", {"full_attn_mod": 2}, r"full_attn_mod = 2 of a phi3 model is not handled"),
        (
            "phi3",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            r"rope_type 'linear' is not handled of a phi3 model; known",
        ),
        ("mixtral", {"num_experts_per_tok": 5}, r"num_experts_per_tok = 5 of 4 experts"),
        (
            "deepseek_v2",
            {"topk_method": "best"},
            r"topk_method = 'best' is not handled.*group_limited_greedy",
        ),
        ("deepseek_v2", {"norm_topk_prob": True}, r"norm_topk_prob = true.*transformers leaves it out"),
        ("deepseek_v3", {"scoring_func": "softmax"}, r"scoring_func = 'softmax' is not handled.*sigmoid"),
        ("deepseek_v3", {"n_group": 3}, r"8 experts do not divide into n_group = 3 groups"),
        ("deepseek_v3", {"topk_group": 5}, r"topk_group = 5 of n_group = 4"),
        ("deepseek_v3", {"num_key_value_heads": 4}, r"latent attention has a key for each of its 8 heads"),
        ("deepseek_v3", {"moe_layer_freq": 2}, r"moe_layer_freq = 2"),
    ],
)
def test_a_variant_that_no_family_computes_is_named(
    make_model: MakeModel, family: str, fields: dict[str, Any], message: str
) -> None:
    directory = make_model(family, dtype="F32")
    edit_config(directory, **fields)
    with pytest.raises(ModelError, match=message):
        load(directory)


def test_an_index_that_promises_too_much_is_named(make_model: MakeModel) -> None:
    directory = make_model(shard_bytes=50_000)
    index = directory / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.ghost.weight"] = next(iter(raw["weight_map"].values()))
    index.write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"lacks model\.ghost\.weight"):
        load(directory)


def test_sources_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"is a file; a model is the directory"):
        load(tmp_path / "file")
    with pytest.raises(
        ModelError,
        match=r"neither a directory, nor an embedded model \(arithmetic, count, formula, text2sql, topics_v1, topics_v2\)",
    ):
        load("arithmetik")


def test_a_hub_id_without_a_network_is_one_paragraph() -> None:
    with pytest.raises(
        ModelError, match=r"'owner/name' is not a directory here and could not be fetched"
    ) as raised:
        load("owner/name")
    assert "\n" not in str(raised.value)
