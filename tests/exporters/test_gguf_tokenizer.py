"""The tokenizer that llama.cpp reads gives the ids that Hugging Face's gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tapeout.errors import ModelError
from tapeout.exporters import gguf
from tapeout.exporters.gguf import pretokenizers, tokenizer
from tapeout.models import Model, load
from tapeout.models.text_limits import LIMITS
from tapeout.quantize import quantize

HOSTILE = [
    "",
    "a",
    "Hello world",
    "  two leading, two trailing  ",
    "tabs\t\tand\n\n\nnewlines \n \r\n mixed   runs     of      spaces",
    "1 12 123 1234 12345 3.14159 1,000,000",
    "don't DON'T we'll WE'LL I'm 'tis o'clock's",
    "日本語の文章と中文，混ざった text。",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🧑🏽‍🚀 é ñ Å ﬁ",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}\n\n\n#!?--==>>",
    "before <s> inside </s><user> after",
    "Привет мир שלום עולם مرحبا नमस्ते สวัสดี",
    "\x00\x07\u200b\ufeff\u00a0\u3000\U0010ffff",
    "(normal) ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not",
]

CORPUS = [
    "the cat sat on the mat, and then it ran to the other hat; don't you know that 12 cats ran 1234 miles?"
] * 20
CORPUS += HOSTILE * 3


@pytest.fixture
def exported(make_model: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """``exported(tokenizer)`` puts it into a model and gives llama.cpp's vocabulary of the file."""
    opened: list[llama_cpp.Llama] = []

    def export(made: Tokenizer, **config: Any) -> llama_cpp.Llama:
        artifact = gguf.write(quantize(model_with(make_model, made, **config), "int8"), tmp_path / "out")
        opened.append(
            llama_cpp.Llama(str(tmp_path / "out" / artifact.files[0]), vocab_only=True, verbose=False)
        )
        return opened[-1]

    yield export
    for runtime in opened:
        runtime.close()


def model_with(make_model: Callable[..., Path], made: Tokenizer, **config: Any) -> Model:
    # Some rows more than tokens, as many models have.
    directory = make_model(vocab_size=made.get_vocab_size() + 13)
    made.save(str(directory / "tokenizer.json"))
    described = {"bos_token": "<s>", "eos_token": "</s>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))
    return load(directory)


def check(made: Tokenizer, runtime: llama_cpp.Llama, texts: list[str] = HOSTILE) -> None:
    for text in texts:
        got = runtime.tokenize(text.encode(), add_bos=True, special=True)
        assert got == made.encode(text).ids, text


def byte_level(regexes: list[str], *, ignore_merges: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    cuts = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([AddedToken("<user>", normalized=False)])
    return made


@pytest.mark.parametrize(("regexes", "ignore_merges"), pretokenizers.NAMES, ids=pretokenizers.NAMES.values())
def test_byte_level_bpe_by_each_regex(exported, regexes: tuple[str, ...], ignore_merges: bool) -> None:
    made = byte_level(list(regexes), ignore_merges=ignore_merges)
    texts = [
        text
        for text in HOSTILE
        if not pretokenizers.notes_of(pretokenizers.NAMES[regexes, ignore_merges]) or "สวัส" not in text
    ]
    check(made, exported(made), texts)


@pytest.mark.parametrize("ignore_merges", [True, False])
def test_a_word_that_is_a_token_stays_whole_or_not(exported, ignore_merges: bool) -> None:
    raw = json.loads(byte_level([pretokenizers.LLAMA3], ignore_merges=ignore_merges).to_str())
    raw["model"]["vocab"]["Ġunmergeable"] = len(raw["model"]["vocab"])
    raw["added_tokens"] = []
    made = Tokenizer.from_str(json.dumps(raw))
    runtime = exported(made)
    check(made, runtime, ["an unmergeable word"])
    assert (raw["model"]["vocab"]["Ġunmergeable"] in made.encode("an unmergeable word").ids) is ignore_merges


def test_gpt2s_own_pre_tokenizer_and_a_template(exported) -> None:
    made = byte_level([pretokenizers.GPT2])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    runtime = exported(made)
    check(made, runtime)
    assert runtime.tokenize(b"a", add_bos=True)[0] == 0


def sentencepiece_bpe(tmp_path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges that transformers makes of a model that sentencepiece trained."""
    import sentencepiece
    from transformers.convert_slow_tokenizer import generate_merges

    (tmp_path / "corpus.txt").write_text("\n".join(text for line in CORPUS for text in line.splitlines()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    trained = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    pieces = [(trained.id_to_piece(i), trained.get_score(i)) for i in range(trained.vocab_size())]
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    return vocab, generate_merges(vocab, pieces, skip_tokens=["<unk>", "<s>", "</s>"])


def sentencepiece_like(
    vocab: dict[str, int], merges: list[tuple[str, str]], *, legacy: bool, prefix: str
) -> Tokenizer:
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        steps = [normalizers.Prepend("▁")] if prefix == "always" else []
        made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prefix, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")]
    )
    made.add_tokens([AddedToken("<user>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return made


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("prefix", ["always", "never"])
def test_sentencepiece_like_bpe(exported, tmp_path: Path, legacy: bool, prefix: str) -> None:
    made = sentencepiece_like(*sentencepiece_bpe(tmp_path), legacy=legacy, prefix=prefix)
    # Metaspace puts no space before a text that begins with one; that llama.cpp does is in the notes, below.
    met = [text for text in HOSTILE if text.startswith(" ") or "<s>" in text]
    texts = [text for text in HOSTILE if legacy or prefix == "never" or text not in met]
    check(made, exported(made, unk_token="<unk>"), texts)


def test_what_llama_cpp_does_otherwise_is_noted(make_model, tmp_path: Path) -> None:
    parts = sentencepiece_bpe(tmp_path)
    noted = [
        len(
            tokenizer.read(
                model_with(make_model, sentencepiece_like(*parts, legacy=legacy, prefix=prefix))
            ).notes
        )
        for legacy, prefix in ((True, "always"), (False, "never"), (False, "always"), (False, "first"))
    ]
    assert noted == [0, 0, 1, 1]
    made = byte_level([pretokenizers.QWEN2])
    made.normalizer = normalizers.NFC()
    assert any("NFC" in note for note in tokenizer.read(model_with(make_model, made)).notes)


def test_special_tokens_types_and_template(make_model) -> None:
    made = byte_level([pretokenizers.GPT2])
    model = model_with(make_model, made, pad_token={"content": "</s>"}, chat_template="{{ messages }}")
    generation = {"eos_token_id": [1, 300, 301]}
    (model.directory / "generation_config.json").write_text(json.dumps(generation))
    found = tokenizer.read(load(model.directory))
    assert found.special == {"bos": 0, "eos": 1, "padding": 1, "eot": 300, "eom": 301} | (
        {"eot": 256, "eom": 300} if model.config.eos_token_id == 256 else {}
    )
    assert found.chat_template == "{{ messages }}"
    assert (found.add_bos, found.add_eos) == (False, False)
    types = dict(zip(found.tokens, found.types, strict=True))
    assert types["<s>"] is tokenizer.Type.CONTROL
    assert types["<user>"] is tokenizer.Type.USER_DEFINED
    assert types["a"] is tokenizer.Type.NORMAL
    padding = f"[PAD{made.get_vocab_size()}]"
    assert types[padding] is tokenizer.Type.UNUSED
    assert len(found.tokens) == model.config.vocab_size


def test_an_explicit_add_bos_token_wins_over_the_post_processor(make_model) -> None:
    found = tokenizer.read(model_with(make_model, byte_level([pretokenizers.LLAMA3]), add_bos_token=True))
    assert (found.add_bos, found.add_eos) == (True, False)


def refuse(model: Model, change: Callable[[dict[str, Any]], object]) -> str:
    """What is said of the model's tokenizer.json after a change to it, which is then undone."""
    path = model.directory / "tokenizer.json"
    whole = path.read_text()
    raw = json.loads(whole)
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(ModelError) as caught:
        tokenizer.read(model)
    path.write_text(whole)
    return str(caught.value)


SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
EOS_FIRST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
}
ROBERTA = {
    "type": "RobertaProcessing",
    "sep": ["<s>", 0],
    "cls": ["</s>", 1],
    "trim_offsets": True,
    "add_prefix_space": True,
}
WORDPIECE = {
    "type": "WordPiece", "unk_token": "<s>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9, "vocab": {"<s>": 0}
}  # fmt: skip


@pytest.mark.parametrize(
    ("named", "change"),
    [
        (r"\\w+", lambda raw: raw.update(pre_tokenizer=SPLIT)),
        ("BertPreTokenizer", lambda raw: raw.update(pre_tokenizer={"type": "BertPreTokenizer"})),
        ("ignore_merges = True", lambda raw: raw["model"].update(ignore_merges=True)),
        ("Lowercase", lambda raw: raw.update(normalizer={"type": "Lowercase"})),
        ("WordPiece", lambda raw: raw.update(model=WORDPIECE)),
        ("dropout", lambda raw: raw["model"].update(dropout=0.5)),
        ("[1] before a text", lambda raw: raw.update(post_processor=ROBERTA)),
        ("before a text", lambda raw: raw.update(post_processor=EOS_FIRST)),
        ("lstrip", lambda raw: raw["added_tokens"][0].update(lstrip=True)),
        ("vocab_size", lambda raw: raw["model"]["vocab"].update(x9=9999)),
        ("gives the id", lambda raw: raw["model"]["vocab"].update(x9=501)),
        ("can read", lambda raw: raw.pop("model")),
    ],
)
def test_what_is_unknown_is_refused_by_name(make_model, named: str, change) -> None:
    model = model_with(make_model, byte_level([pretokenizers.GPT2]))
    assert named in refuse(model, change)


def test_merges_that_scores_cannot_say_are_refused(make_model, tmp_path: Path) -> None:
    vocab, merges = sentencepiece_bpe(tmp_path)
    model = model_with(make_model, sentencepiece_like(vocab, merges, legacy=True, prefix="always"))
    pairs = [list(pair) for pair in merges]
    several = next(pair for pair in pairs if sum("".join(other) == "".join(pair) for other in pairs) > 1)
    rest = [pair for pair in pairs if pair != several]
    assert "would join" in refuse(model, lambda raw: raw["model"].update(merges=rest))
    assert "apart in rank" in refuse(model, lambda raw: raw["model"].update(merges=[several, *rest]))
    renamed = {("ten" if token == "<0x0A>" else token): index for token, index in vocab.items()}
    assert "<0x0A>" in refuse(model, lambda raw: raw["model"].update(vocab=renamed))
    assert "Lowercase" in refuse(model, lambda raw: raw.update(normalizer={"type": "Lowercase"}))


def test_a_model_without_tokenizer_json_says_how_to_make_it(make_model) -> None:
    model = load(make_model())
    (model.directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="save_pretrained"):
        tokenizer.read(model)


def test_lost_bytes_matter_where_there_are_merges_across_them() -> None:
    """``arithmetic`` has characters alone; ``count`` has numbers, which Hugging Face merges across what the vocabulary lacks."""
    assert "lost-byte" not in tokenizer.read(load("arithmetic")).limits
    assert "lost-byte" in tokenizer.read(load("count")).limits
    holds = LIMITS["lost-byte"].holds
    assert holds("12³4", [], "124")
    assert not holds("124", [], "124")
