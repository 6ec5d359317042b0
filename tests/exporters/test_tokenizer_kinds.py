"""Every kind of tokenizer through GGUF: real llama.cpp gives Hugging Face's ids on the hostile corpus, and text comes back."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import io
import json
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
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
from tapeout.exporters.gguf import pretokenizers, tokenizer
from tapeout.exporters.gguf.tokenizer import Type, Vocabulary
from tapeout.models import Model, gguf_header, gguf_tokenizer, load
from tapeout.models.text_limits import LIMITS
from tapeout.validate import corpus

SPACE = "▁"
# What is written, llama.cpp with it, the tokenizer that is rebuilt from the file, and the one that was written.
Passed = tuple[Vocabulary, "LlamaVocabulary", Tokenizer, Tokenizer]
MIXED = [
    "用 tapeout 把模型量化到 4-bit，然后 export 成 GGUF；再 run 一遍。",
    "請用 Python 3.11 執行 `pip install .`，然後看 README。",
    "在GPU上推理speed提升了3.5倍，显存usage从24GB降到8GB",
    "    four spaces",
    "a" + " " * 70 + "b",
    "▁already▁escaped▁",
    "[PAD7] [PAD12] <0x41> <0x0A>",
    "tab\tin\t\tthe\t\t\tmiddle",
]


class LlamaVocabulary:
    """llama.cpp's tokenizer of a GGUF file."""

    def __init__(self, path: Path) -> None:
        wanted = llama_cpp.llama_model_default_params()
        wanted.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), wanted)
        assert self._model, f"llama.cpp refuses {path}"
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def encode(self, text: str, special: bool = False) -> list[int]:
        data = text.encode()
        room = 8 * len(data) + 16  # a charsmap makes words of characters
        buffer = (ctypes.c_int32 * room)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, room, special, True)
        assert count >= 0
        return buffer[:count]

    def decode(self, ids: Sequence[int], strip: bool) -> str:
        pieces = []
        for at, token in enumerate(ids):
            buffer = ctypes.create_string_buffer(4096)
            lstrip = int(strip and at == 0)
            count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, 4096, lstrip, True)
            assert count >= 0
            pieces.append(buffer.raw[:count])
        return b"".join(pieces).decode("utf-8", "replace")

    def close(self) -> None:
        llama_cpp.llama_model_free(self._model)


def write_vocabulary(found: Vocabulary, path: Path, name: str = "some") -> Path:
    """A GGUF file that has a vocabulary and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(found.named(name))
    found.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose directory, and whose tokenizer, each test replaces."""
    from tapeout.generated import write_model

    return load(write_model(tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture
def through(base: Model, tmp_path: Path) -> Iterator[Callable[..., Passed]]:
    """``through(made)`` passes a tokenizer, or its JSON, through a file: see ``Passed``."""
    opened = []

    def pass_through(
        made: Tokenizer | dict[str, Any], *, more: int = 0, name: str = "some", **config: Any
    ) -> Passed:
        raw = made if isinstance(made, dict) else json.loads(made.to_str())
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        rows = max(made.get_vocab().values()) + 1 + more
        model = dataclasses.replace(
            base,
            directory=tmp_path,
            config=dataclasses.replace(
                base.config, vocab_size=rows, bos_token_id=None, eos_token_id=None, pad_token_id=None
            ),
        )
        found = tokenizer.read(model)
        path = write_vocabulary(found, tmp_path / "vocabulary.gguf", name)
        opened.append(LlamaVocabulary(path))
        files = gguf_tokenizer.files(path, gguf_header.read(path).fields)
        return found, opened[-1], Tokenizer.from_str(json.dumps(files["tokenizer.json"])), made

    yield pass_through
    for runtime in opened:
        runtime.close()


def strings_of(made: Tokenizer) -> list[str]:
    added = [token.content for token in made.get_added_tokens_decoder().values()]
    return [*corpus.hostile(tuple(added[:32])), *MIXED]


def check(
    passed: Passed,
    *,
    text_back: bool = True,
    texts: list[str] | None = None,
) -> dict[str, int]:
    """All three agree on every string outside of the declared classes; returns how many strings each class has."""
    found, runtime, rebuilt, made = passed
    added = [token.content for token in made.get_added_tokens_decoder().values()]
    strip = found.add_space_prefix
    texts = texts or strings_of(made)
    again = {
        text: made.decode(made.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        for text in texts
    }
    classes = {
        name: {text for text in texts if LIMITS[name].holds(text, added, again[text])}
        for name in found.limits
    }
    apart = set().union(*classes.values())
    assert len(apart) < len(texts) / 2
    for text in texts:
        if text in apart:
            continue
        expected = made.encode(text, add_special_tokens=False).ids
        got = runtime.encode(text)
        assert got == expected, repr(text)
        assert rebuilt.encode(text, add_special_tokens=False).ids == expected, repr(text)
        if text_back:
            assert runtime.decode(got, strip) == made.decode(expected, skip_special_tokens=False), repr(text)
    assert runtime.encode("a", special=True) == made.encode("a").ids == rebuilt.encode("a").ids
    return {name: len(members) for name, members in classes.items()}


# --- what they are trained on ---------------------------------------------------------------------------------------


@functools.cache
def prose() -> list[str]:
    """Python's own sources, and the corpus with every script in it."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = [(folder / name).read_text()[:40_000] for name in ("argparse.py", "typing.py", "ast.py")]
    return [line for source in sources for line in source.splitlines()] + list(
        corpus.hostile(count=1200, seed=5)
    )


@functools.cache
def trained(regexes: tuple[str, ...], size: int = 2000) -> str:
    made = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    made.train_from_iterator(prose(), trainer)
    made.decoder = decoders.ByteLevel()
    return made.to_str()


def byte_level(pre: str, size: int | None = None) -> Tokenizer:
    """A tokenizer of the kind that llama.cpp calls ``pre``, filled up with made-up merges to ``size`` tokens."""
    regexes, ignore_merges = next(key for key, name in pretokenizers.NAMES.items() if name == pre)
    raw = json.loads(trained(regexes))
    raw["model"]["ignore_merges"] = ignore_merges
    if size:
        vocab, merges = raw["model"]["vocab"], raw["model"]["merges"]
        pick, known = random.Random(0), list(vocab)
        while len(vocab) < size:
            pair = pick.choice(known), pick.choice(known)
            if "".join(pair) not in vocab:
                vocab["".join(pair)] = len(vocab)
                merges.append(list(pair))
    return Tokenizer.from_str(json.dumps(raw))


def special(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pre", "size", "tokens"),
    [
        ("llama-bpe", None, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>"]),
        ("qwen2", 151_643, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        ("deepseek-llm", None, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]),
        ("deepseek-v3", None, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>"]),
        ("gpt-2", None, ["<|endoftext|>"]),
    ],
)
def test_byte_level(through, pre: str, size: int | None, tokens: list[str]) -> None:
    made = byte_level(pre, size)
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    made.add_special_tokens(special(*tokens))
    made.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("ing", normalized=False)])
    passed = through(made, more=300, bos_token=tokens[0])
    assert passed[0].pre == pre
    assert passed[0].types[-1] is Type.UNUSED
    classes = check(passed)
    known = {"qwen2": {"not-nfc"}, "deepseek-llm": {"space-beyond-ascii"}}
    assert classes.keys() == known.get(pre, set())


# --- sentencepiece --------------------------------------------------------------------------------------------------


@functools.cache
def pieces_of(kind: str, size: int = 1500) -> tuple[tuple[str, float], ...]:
    """Pieces and scores that sentencepiece trains; with T5's ids of the special ones."""
    import sentencepiece

    written = io.BytesIO()
    options = (
        {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        if kind == "unigram"
        else {"byte_fallback": True}
    )
    # Of a period of text that were pieces, two ways to cut would be equally likely.
    lines = [line for text in prose() for line in text.splitlines() if len(line) < 300]
    rule = "nmt_nfkc" if kind == "unigram" else "identity"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, model_type=kind, vocab_size=size,
        normalization_rule_name=rule, remove_extra_whitespaces=kind == "unigram", character_coverage=0.98,
        allow_whitespace_only_pieces=kind == "bpe", split_digits=True, minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    made = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    return tuple((made.id_to_piece(i), made.get_score(i)) for i in range(made.get_piece_size()))


def charsmap() -> bytes:
    """sentencepiece's own nmt_nfkc: field 2 of its model's field 3, in protobuf's wire format."""
    import sentencepiece

    data = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc").serialized_model_proto()
    return protobuf(protobuf(data)[3])[2]


def protobuf(data: bytes) -> dict[int, bytes]:
    """The last value of each field that has a length."""
    fields, at = {}, 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = number()
        if key & 7 == 0:
            number()
        elif key & 7 == 2:
            length = number()
            fields[key >> 3] = data[at : at + length]
            at += length
        else:
            at += {1: 8, 5: 4}[key & 7]
    return fields


def joined(vocab: dict[str, int], order: Sequence[str], skip: set[str]) -> list[tuple[str, str]]:
    """Every merge that gives a piece, best piece first: what transformers makes of a sentencepiece model."""
    return [
        (piece[:cut], piece[cut:])
        for piece in order
        if piece not in skip
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab and not {piece[:cut], piece[cut:]} & skip
    ]


GEMMA = ("<start_of_turn>", "<end_of_turn>", "<table>", "</h1>")
SPM_SPECIAL = {"<unk>", "<s>", "</s>", *GEMMA}


def sentencepiece_bpe(size: int = 0, *, runs: int = 0) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, filled up to ``size``; with Gemma's runs of spaces, tabs and line ends."""
    pieces = [piece for piece, _ in pieces_of("bpe")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    order = [piece for piece, score in sorted(pieces_of("bpe"), key=lambda pair: -pair[1]) if len(piece) > 1]
    first = [unit * n for unit in ("\n", "\t", SPACE) for n in range(2, runs)]
    for piece in [*first, *GEMMA]:
        vocab.setdefault(piece, len(vocab))
    order = first + [piece for piece in order if piece not in first]
    pick, known = random.Random(0), [piece for piece in pieces if not piece.startswith("<")]
    while len(vocab) < size:
        piece = pick.choice(known) + pick.choice(known).replace(SPACE, "")
        if piece not in vocab and piece != "\t":
            vocab[piece] = len(vocab)
            order.append(piece)
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
    return vocab, joined(vocab, order, SPM_SPECIAL | bytes_)


def spm(
    parts: tuple[dict[str, int], list[tuple[str, str]]], prefix: bool, *, gemma: bool = False
) -> Tokenizer:
    made = Tokenizer(models.BPE(*parts, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    if gemma:
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    made.add_special_tokens(special("<unk>", "<s>", "</s>"))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", parts[0]["<s>"])]
    )
    return made


def test_llama_2_and_mistral(through) -> None:
    made = spm(sentencepiece_bpe(), prefix=True)
    made.add_tokens([AddedToken("[INST]", normalized=False), AddedToken("def", normalized=False)])
    passed = through(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert (passed[0].model, passed[0].add_space_prefix) == ("llama", True)
    assert check(passed) == {}


@pytest.mark.slow
def test_gemma(through) -> None:
    made = spm(sentencepiece_bpe(runs=32), prefix=False, gemma=True)
    made.add_special_tokens(special("<start_of_turn>", "<end_of_turn>"))
    runs = [unit * n for unit in ("\n", SPACE) for n in range(2, 32)]
    made.add_tokens([AddedToken(run, normalized=False) for run in [*runs, "<table>", "</h1>"]])
    # The tab and its byte have one id, and merges of tabs; the library itself writes one of the two texts.
    raw = json.loads(made.to_str())
    raw["model"]["vocab"], raw["model"]["merges"] = sentencepiece_bpe(256_000, runs=32)
    raw["model"]["vocab"]["\t"] = raw["model"]["vocab"]["<0x09>"]
    tabs = [("\t" * cut, "\t" * (n - cut)) for n in range(2, 32) for cut in range(1, n)]
    raw["model"]["merges"] = tabs + [pair for pair in raw["model"]["merges"] if "".join(pair).strip("\t")]
    passed = through(raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert (passed[0].model, passed[0].add_space_prefix) == ("llama", False)
    assert len(passed[0].tokens) >= 256_000
    assert check(passed).keys() == {"escaped-space"}


def test_merges_that_no_scores_stand_for(through) -> None:
    vocab, merges = sentencepiece_bpe(runs=20)
    # As transformers sorts merges of equal score: by length of the parts, so that those of one token are apart.
    merges = sorted(merges[:200], key=lambda pair: (len(pair[0]), len(pair[1]))) + merges[200:]
    made = spm((vocab, merges), prefix=False)
    passed = through(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert (passed[0].model, passed[0].pre) == ("gpt2", "sarvam-moe")
    assert any("apart in rank" in note or "would join" in note for note in passed[0].notes)
    assert check(passed) == {}


def test_phi_3(through) -> None:
    made = spm(sentencepiece_bpe(), prefix=True)
    made.add_special_tokens(special("<|endoftext|>"))
    after = [
        AddedToken(text, rstrip=True, normalized=False, special=True) for text in ("<|user|>", "<|end|>")
    ]
    made.add_special_tokens(after)
    raw = json.loads(made.to_str())
    for token in raw["added_tokens"]:
        if token["content"] == "</s>":
            token |= {"rstrip": True, "special": False}
    made = Tokenizer.from_str(json.dumps(raw))
    passed = through(made, bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>")
    assert passed[0].named("some") == "some (phi3)"
    assert check(passed).keys() == {"wide-space"}
    assert passed[1].encode("<|user|> \n\n hi") == passed[1].encode("<|user|>hi")


@pytest.mark.parametrize("cuts", ["words", "metaspace"])
def test_t5(through, cuts: str) -> None:
    pieces = pieces_of("unigram")
    made = Tokenizer(models.Unigram(list(pieces), unk_id=2, byte_fallback=False))
    meta = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=True)
    precompiled = normalizers.Precompiled(charsmap())
    if cuts == "words":
        made.normalizer = precompiled
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), meta])
    else:
        made.normalizer = normalizers.Sequence(
            [
                precompiled,
                normalizers.Strip(left=False, right=True),
                normalizers.Replace(Regex(" {2,}"), SPACE),
            ]
        )
        made.pre_tokenizer = meta
    made.decoder = decoders.Metaspace(SPACE, prepend_scheme="always", split=True)
    made.add_special_tokens(special("<pad>", "</s>", "<unk>"))
    extra = [AddedToken(f"<extra_id_{i}>", lstrip=True, rstrip=True, normalized=False) for i in range(100)]
    made.add_special_tokens(extra)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    passed = through(made, more=28, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    assert passed[0].model == "t5"
    assert check(passed).keys() == {"cluster", "next-line"}


# --- BERT -----------------------------------------------------------------------------------------------------------


@functools.cache
def word_pieces(lowercase: bool) -> str:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=2500, special_tokens=names, show_progress=False)
    made.train_from_iterator(prose(), trainer)
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 3), ("[SEP]", 4)],
    )
    return made.to_str()


BERT = {
    "unk_token": "[UNK]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
}


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("accents", [None, True, False])
def test_bert(through, lowercase: bool, accents: bool | None) -> None:
    made = Tokenizer.from_str(word_pieces(lowercase))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=accents)
    passed = through(made, more=3, **BERT)
    assert passed[0].model == "bert"
    stripped = {"hangul", "spacing-mark"} if (lowercase if accents is None else accents) else set()
    classes = check(passed, text_back=False)
    assert classes.keys() == {"long-word", "control-space", "new-character"} | stripped


@pytest.mark.parametrize("mask", [True, False])
def test_roberta(through, mask: bool) -> None:
    made = Tokenizer.from_str(trained((pretokenizers.GPT2,)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(special("<s>", "<pad>", "</s>", "<unk>"))
    made.add_special_tokens([AddedToken("<mask>", lstrip=mask, normalized=False)])
    ids = {token: made.token_to_id(token) for token in ("<s>", "</s>")}
    made.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), True, False
    )
    names = {
        "bos": "<s>",
        "eos": "</s>",
        "cls": "<s>",
        "sep": "</s>",
        "unk": "<unk>",
        "pad": "<pad>",
        "mask": "<mask>",
    }
    passed = through(made, **{f"{name}_token": text for name, text in names.items()})
    assert passed[0].pre == ("jina-v2-code" if mask else "roberta-bpe")
    assert (passed[0].add_bos, passed[0].add_eos) == (True, True)
    assert check(passed).keys() == ({"wide-space"} if mask else set())


def test_a_header_is_read_as_the_owners_library_reads_it(through, tmp_path: Path) -> None:
    through(spm(sentencepiece_bpe(), prefix=True), bos_token="<s>", unk_token="<unk>")
    path = tmp_path / "vocabulary.gguf"
    mine, theirs = gguf_header.read(path).fields, gguf.GGUFReader(path).fields
    assert mine.keys() == theirs.keys()
    for name, field in theirs.items():
        assert mine[name].contents() == field.contents()
        assert (mine[name].types, mine[name].data) == (field.types, field.data)
        assert [part.tobytes() for part in mine[name].parts] == [part.tobytes() for part in field.parts]


# --- what is refused, and what is not silent ------------------------------------------------------------------------


def refused(through, made: Tokenizer, change: Callable[[dict[str, Any]], object], **config: Any) -> str:
    raw = json.loads(made.to_str())
    change(raw)
    with pytest.raises(ModelError) as caught:
        through(raw, **config)
    return str(caught.value)


def test_wordpieces_that_llama_cpp_does_not_know(through) -> None:
    made = Tokenizer.from_str(word_pieces(True))
    of = functools.partial(refused, through, made)
    assert "handle_chinese_chars" in of(lambda raw: raw["normalizer"].update(handle_chinese_chars=False))
    assert "clean_text" in of(lambda raw: raw["normalizer"].update(clean_text=False))
    assert "NoneType" not in of(lambda raw: raw.update(normalizer=None))
    assert "Whitespace" in of(lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}))
    assert "'@@'" in of(lambda raw: raw["model"].update(continuing_subword_prefix="@@"))
    assert "max_input_chars_per_word = 50" in of(lambda raw: raw["model"].update(max_input_chars_per_word=50))
    assert "one each" in of(lambda raw: raw.update(post_processor=None))
    assert "##▁" in of(lambda raw: raw["model"]["vocab"].update({"##▁": 2500}))
    twice = of(lambda raw: raw["model"]["vocab"].update({"##▁the": 2500}))
    assert "two ids to '▁the'" in twice


def test_unigrams_that_llama_cpp_does_not_know(through) -> None:
    made = Tokenizer(
        models.Unigram([("<unk>", 0.0), (SPACE, -2.0), ("a", -3.0)], unk_id=0, byte_fallback=False)
    )
    made.normalizer = normalizers.Precompiled(charsmap())
    made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=True)
    of = functools.partial(refused, through, made)
    assert "runs of spaces" in of(lambda raw: None)
    assert "'a▁b'" in of(lambda raw: raw["model"]["vocab"].append(["a▁b", -4.0]))
    assert "Lowercase" in of(lambda raw: raw.update(normalizer={"type": "Lowercase"}))
    assert "first" in of(lambda raw: raw["pre_tokenizer"].update(prepend_scheme="first"))
    assert "byte_fallback" in of(lambda raw: raw["model"].update(byte_fallback=True))


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        ([AddedToken("<user>", rstrip=True)], "rstrip"),
        ([AddedToken("<user>", lstrip=True)], "lstrip"),
        ([AddedToken("<user>", single_word=True)], "single_word"),
        ([AddedToken("<mask>", lstrip=True), AddedToken("<user>", rstrip=True)], "lstrip"),
    ],
)
def test_tokens_that_take_spaces_llama_cpp_leaves(through, tokens: list[AddedToken], named: str) -> None:
    made = byte_level("gpt-2")
    made.add_tokens(tokens)
    assert named in refused(through, made, lambda raw: None)


def test_a_name_that_llama_cpp_reads_too_much_into(through) -> None:
    made = spm(sentencepiece_bpe(), prefix=True)
    passed = through(made, name="my-Phi-3-mini", bos_token="<s>", unk_token="<unk>")
    assert passed[0].named("my-Phi-3-mini") == "my-Phi 3-mini"
    assert passed[0].named("phi3") == "phi 3"
    assert passed[0].named("a-modern-bert") == "a-modern bert"
    assert check(passed, texts=["</s> \n x", "a  </s>  b"]) == {}


def test_digits_that_deepseek_v2_would_not_cut(through) -> None:
    made = byte_level("deepseek-llm")
    assert "'12'" in refused(through, made, lambda raw: raw["model"]["vocab"].update({"12": 2000}))


def test_long_tokens_and_tokens_that_are_words(through) -> None:
    raw = json.loads(byte_level("llama-bpe").to_str())
    vocab = raw["model"]["vocab"]
    vocab["x" * 600] = len(vocab)  # no merges lead to it, but a word that is a token stays whole
    vocab["[PAD2003]"] = len(vocab)
    made = Tokenizer.from_str(json.dumps(raw))
    made.add_tokens([AddedToken("y" * 700, normalized=False), AddedToken("print", normalized=False)])
    passed = through(made, more=2)
    assert (
        check(
            passed,
            texts=["x" * 600, "x" * 601, " " + "x" * 600, "a" + "y" * 700 + "z", "y" * 699, "printer print"],
        )
        == {}
    )


def test_what_llama_cpp_finds_otherwise_in_a_text_is_noted(through) -> None:
    raw = json.loads(byte_level("gpt-2").to_str())
    raw["model"]["vocab"]["<PAD>"] = 2000
    made = Tokenizer.from_str(json.dumps(raw))
    made.add_tokens([AddedToken("<ab", normalized=False), AddedToken("bcd>>", normalized=False)])
    passed = through(made)
    taken, overlap = passed[0].notes
    assert "<PAD>" in taken
    assert "'<ab' and 'bcd>>' overlap" in overlap
    # So it is: both notes tell what really differs.
    assert passed[1].encode("<abcd>>")[-1] == made.token_to_id("bcd>>")
    assert made.encode("<abcd>>").ids[0] == made.token_to_id("<ab")
    assert passed[1].encode("<PAD>") == [2000] != made.encode("<PAD>").ids
    assert through(byte_level("gpt-2"))[0].notes == ()
