"""The embedded models: they know what they were made for, did not see what they are asked, and load as they ship."""

import functools
import hashlib
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tapeout import embedded
from tapeout.errors import ModelError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tapeout.embedded import training  # noqa: E402
from tapeout.embedded.arithmetic import train as arithmetic  # noqa: E402
from tapeout.embedded.count import train as count  # noqa: E402
from tapeout.embedded.formula import train as formula  # noqa: E402
from tapeout.embedded.text2sql import data as sql  # noqa: E402
from tapeout.embedded.text2sql import train as text2sql  # noqa: E402
from tapeout.embedded.topics_v1 import train as topics  # noqa: E402
from tapeout.models import EncoderConfig, efficient  # noqa: E402
from tapeout.models import load as load_ours  # noqa: E402

SCRIPTS: dict[str, Any] = {
    "arithmetic": arithmetic,
    "count": count,
    "formula": formula,
    "text2sql": text2sql,
}
TOPICS = {"topics_v1": 1, "topics_v2": 2}
DTYPES = {"arithmetic": "bfloat16", "count": "float16", "formula": "bfloat16", "text2sql": "bfloat16"}


EXACT = {"arithmetic": (0.99, 0.98), "count": (0.99, 0.98), "formula": (0.98, 0.96), "text2sql": (0.98, 0.98)}
"""The share of held-out tasks that the card promises, as saved and in int4."""


@functools.cache
def trained(name: str) -> list[training.Sample]:
    samples: list[training.Sample] = SCRIPTS[name].training_samples()
    return samples


def tasks(name: str) -> list[training.Sample]:
    lines = (embedded.path(name) / "tasks.jsonl").read_text().splitlines()
    return [training.Sample(**json.loads(line)) for line in lines]


def load(name: str) -> tuple[Any, Any]:
    folder = embedded.path(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_names_are_the_directories() -> None:
    folder = Path(embedded.__file__).parent
    assert sorted(path.parent.name for path in folder.glob("*/config.json")) == sorted(embedded.NAMES)


def test_unknown_name_lists_the_embedded_models() -> None:
    with pytest.raises(ModelError, match="'arithmetics' is not an embedded model; did you mean 'arithmetic'"):
        embedded.path("arithmetics")


@pytest.mark.parametrize("name", SCRIPTS)
def test_held_out_tasks_are_answered_in_the_saved_dtype(name: str) -> None:
    model, tokenizer = load(name)
    assert model.dtype == getattr(torch, DTYPES[name])
    assert training.accuracy(model, tokenizer, tasks(name)) >= EXACT[name][0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_held_out_tasks_survive_int4(name: str) -> None:
    model, tokenizer = load(name)
    assert training.accuracy(training.int4_copy(model), tokenizer, tasks(name)) >= EXACT[name][1]


def test_count_continues_to_49() -> None:
    assert training.answers(*load("count"), ["40 41 42"]) == [" 43 44 45 46 47 48 49"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_held_out_samples_are_not_trained_on(name: str) -> None:
    held_out = tasks(name)
    assert not set(held_out) & set(trained(name))
    assert not {sample.prompt for sample in held_out} & {sample.prompt for sample in trained(name)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_heldout_text_is_the_tasks(name: str) -> None:
    lines = (embedded.path(name) / "heldout.txt").read_text().splitlines()
    assert lines == [sample.prompt + sample.answer for sample in tasks(name)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_calibration_text_is_the_trainings(name: str) -> None:
    text = (embedded.path(name) / "calibration.txt").read_text()
    assert text == training.calibration_text(trained(name))
    lines = text.split("<eos>\n")
    assert len(lines) == 1001
    assert not set(lines) & {sample.prompt + sample.answer for sample in tasks(name)}
    # Nothing of it is lost but the ends of lines, and of text2sql not even those; each sample ends as the model learned it.
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.path(name))
    kept = text if name == "text2sql" else text.replace("\n", "")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == kept


def test_held_out_sums_and_products_have_their_twin_in_training() -> None:
    seen, held_out = arithmetic.problems()
    assert [problem.sample for problem in held_out] == tasks("arithmetic")
    assert len(seen) + len(held_out) == 1200
    assert all(problem.twin in seen for problem in held_out if problem.operator != "-")


def test_batches_of_one_length_take_every_sample_once() -> None:
    torch.manual_seed(0)
    lengths = torch.randint(5, 60, (1000,))
    recipe = training.Recipe(1, 32, peak=0, prompt_weight=0, decay=0, noise=0, by_length=True)
    batches = training._epoch(lengths, recipe)
    assert torch.cat(batches).sort().values.tolist() == list(range(1000))
    padding = sum(int((lengths[rows].max() - lengths[rows]).sum()) for rows in batches)
    anyhow = training._epoch(lengths, recipe._replace(by_length=False))
    # Sixteen batches share the range of lengths between them; without order each batch spans nearly all of it.
    assert padding < 0.25 * sum(int((lengths[rows].max() - lengths[rows]).sum()) for rows in anyhow)


def test_values_of_formulas_are_pythons_own() -> None:
    for sample in [*trained("formula"), *tasks("formula")]:
        assert eval(sample.prompt.removesuffix("=")) == int(sample.answer)


def test_held_out_formulas_are_unseen_with_other_parentheses() -> None:
    flat = [re.sub(r"[()]", "", sample.prompt) for sample in tasks("formula")]
    assert len(set(flat)) == len(flat)
    assert not set(flat) & {re.sub(r"[()]", "", sample.prompt) for sample in trained("formula")}


def shape(statement: str) -> str:
    return re.sub(r"'\w+'|\b\d+\b", "?", statement)


def in_order(statement: str) -> tuple[tuple[str, ...], ...]:
    """A statement's shape, with its columns and its conditions sorted."""
    columns, table, conditions = re.split(" FROM | WHERE ", shape(statement).removeprefix(" SELECT "))
    joined = re.findall(" AND | OR ", conditions)
    return tuple(
        tuple(sorted(part))
        for part in (columns.split(", "), [table], joined, re.split(" AND | OR ", conditions))
    )


def test_held_out_statements_are_of_unseen_shapes() -> None:
    assert shape(" SELECT * FROM cars WHERE seats > 4") == " SELECT * FROM cars WHERE seats > ?"
    seen = {shape(sample.answer) for sample in trained("text2sql")}
    assert not seen & {shape(sample.answer) for sample in tasks("text2sql")}
    # What the card says of other orders.
    known = {in_order(sample.answer) for sample in trained("text2sql")}
    assert sum(in_order(sample.answer) in known for sample in tasks("text2sql")) == 18


def test_statements_run_and_their_values_stand_in_the_question() -> None:
    database = sqlite3.connect(":memory:")
    for table, columns in sql.TABLES.items():
        database.execute(f"CREATE TABLE {table} ({', '.join(column.name for column in columns)})")
    for sample in [*trained("text2sql")[:2000], *tasks("text2sql")]:
        database.execute(sample.answer)
        for value in re.findall(r"'(\w+)'|\b(\d+)\b", sample.answer):
            assert re.search(rf"\b{''.join(value)}\b", sample.prompt), sample
    database.close()


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("arithmetic", "f87dc4df7395f6575d03f5892e713d2eb300656108eafbf6cc78b2b8d13f0000"),
        ("count", "0170dcbad36651704d677fe2b9df465140707612355e23ec7cc5c26880eb10e5"),
        ("formula", "3433adcefde9486473133475b385dcff56759a444f7d8c38971bbd6f1a2d6b2a"),
        ("text2sql", "35c2d1f91806ec48537cfdce817405a5f1dfe5f72f15e1dc45797e2cc1a35e2a"),
    ],
)
def test_data_is_the_same_everywhere(name: str, digest: str) -> None:
    text = "\n".join(sample.prompt + sample.answer for sample in trained(name))
    assert hashlib.sha256(text.encode()).hexdigest() == digest


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("arithmetic", "3-17=-14<eos>", [5, 13, 3, 9, 15, 13, 3, 6, 1]),
        ("count", "7 40 41<eos>", [8, 51, 41, 51, 42, 0]),
        ("formula", "2*(3+4)=14<eos>", [4, 14, 15, 5, 12, 6, 16, 17, 3, 6, 1]),
        ("text2sql", "seats <sep> WHERE seats > 40<eos>", [832, 223, 2, 283, 500, 415, 717, 1]),
    ],
)
def test_tokenizer_round_trip(name: str, text: str, ids: list[int]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.path(name))
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text


def test_characters_outside_the_vocabulary_are_dropped() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.path("arithmetic"))
    assert tokenizer.decode(tokenizer("7 × 8é=\n")["input_ids"]) == "78="


@pytest.mark.parametrize("name", SCRIPTS)
def test_tokenizer_is_the_one_that_the_script_makes(name: str) -> None:
    file = json.loads((embedded.path(name) / "tokenizer.json").read_text())
    assert json.loads(SCRIPTS[name].tokenizer().backend_tokenizer.to_str()) == file


def encoder(name: str) -> Any:
    model = load_ours(name)
    assert isinstance(model.config, EncoderConfig)
    network = efficient.network(model.config)
    weights = {name: torch.from_numpy(model.checkpoint[name].float32()) for name in model.specs}
    network.load_state_dict(weights)
    return network


@pytest.mark.parametrize("name", TOPICS)
def test_topics_of_held_out_texts_are_found_and_survive_int4(name: str) -> None:
    network = encoder(name)
    assert topics.accuracy(network, tasks(name)) >= 0.98
    assert topics.accuracy(training.int4_copy(network), tasks(name)) >= 0.97
    # Counting words is far from enough.
    assert topics.by_words(tasks(name)) < 0.8


@pytest.mark.parametrize("name", TOPICS)
def test_topics_are_what_the_script_makes(name: str) -> None:
    folder = embedded.path(name)
    assert json.loads((folder / "config.json").read_text()) == topics.config_fields(TOPICS[name])
    assert json.loads((folder / "tokenizer.json").read_text()) == json.loads(topics.tokenizer().to_str())
    assert tasks(name) == topics.held_out_samples()
    assert (folder / "heldout.txt").read_text().splitlines() == [text for text, _ in tasks(name)]


def test_held_out_clauses_are_main_clauses_nowhere_in_training() -> None:
    seen, held_out = topics.clauses()
    assert not set(seen) & set(held_out)
    assert not {text for text, _ in topics.held_out_samples()} & {
        text for text, _ in topics.training_samples()
    }
    # A main clause is the one that no link stands before; all of them are of ``seen``.
    mains = {str(clause) for clause in held_out}
    for text, _ in topics.training_samples():
        assert not any(text == main or text.endswith((f", {main}", f"surprise {main}")) for main in mains)
