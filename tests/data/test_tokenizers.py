# SPDX-License-Identifier: Apache-2.0
"""Texts as token ids, against what the original code gave."""

import gzip
import hashlib
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vit_jax.data import tokenizers
from vit_jax.data.tokenizers import canonicalize, parse_tokenizer
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import trust_parts

TOKENS = Path(__file__).parent.parent / "testdata" / "tokens"
MODEL = str(TOKENS / "sentencepiece.model")
CLIP = json.loads((TOKENS / "clip.json").read_text())
PIECES = json.loads((TOKENS / "sentencepiece.json").read_text())
TEXT = "a photo of a cat"


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """The file of CLIP, with the merges that the texts use at their places, and others between."""
    control = [chr(code) for code in range(256, 286)]  # bytes 0 to 29, which no text has
    shorter = ["".join(pair) for pair in itertools.product(control, repeat=2)]
    longer = ["".join(pair) for pair in itertools.product(shorter, control)]
    others = itertools.chain(
        (f"{text[:-1]} {text[-1]}" for text in shorter),
        (f"{text[:-1]} {text[-1]}" for text in longer),
        (f"{text} {c}" for text in longer for c in control),
    )
    merges = [CLIP["merges"].get(str(place)) or next(others) for place in range(48_894)]
    file = tmp_path_factory.mktemp("clip") / "bpe_simple_vocab_16e6.txt.gz"
    file.write_bytes(gzip.compress("\n".join(["#version", *merges, "t h", ""]).encode(), mtime=0))
    return str(file)


@pytest.fixture(scope="module")
def fast_file(tmp_path_factory):
    """A `tokenizer.json` of words, which begins and ends each text."""
    library = pytest.importorskip("tokenizers")
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "a": 4, "photo": 5, "of": 6, "cat": 7}
    fast = library.Tokenizer(library.models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = library.pre_tokenizers.Whitespace()
    special = [(word, vocab[word]) for word in ("<s>", "</s>")]
    fast.post_processor = library.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=special
    )
    fast.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    fast.enable_truncation(3)
    file = tmp_path_factory.mktemp("fast") / "tokenizer.json"
    fast.save(str(file))
    return str(file)


def test_bytes_are_those_of_byt5():
    tokenizer = parse_tokenizer("bytes(length=8)")
    assert tokenizer.encode("hé").tolist() == [ord("h") + 3, 0xC3 + 3, 0xA9 + 3, 1, 0, 0, 0, 0]
    assert tokenizer.encode("").tolist() == [1] + [0] * 7
    assert tokenizer.encode("abcdefghij").tolist() == [*(ord(c) + 3 for c in "abcdefg"), 1]
    assert tokenizer.encode("\0").tolist()[:2] == [3, 1]
    assert (tokenizer.length, tokenizer.vocab_size, tokenizer.sha256) == (8, 259, None)
    assert tokenizer.encode("a").dtype == np.int32


def test_clip_gives_the_ids_of_open_clip(clip_file):
    tokenizer = parse_tokenizer(f"clip(vocab={clip_file!r})")
    for text, ids in zip(CLIP["text"], CLIP["ids"], strict=True):
        padded = ids + [0] * (77 - len(ids))
        assert tokenizer.encode(text).tolist() == padded, text
    assert tokenizer.vocab_size == 49_408
    assert tokenizer.sha256 == hashlib.sha256(Path(clip_file).read_bytes()).hexdigest()


def test_clip_cuts_a_long_text_and_pads_as_asked(clip_file):
    tokenizer = parse_tokenizer(f"clip(length=4, vocab={clip_file!r}, pad=49407)")
    assert tokenizer.encode(TEXT).tolist() == [49406, 320, 1125, 49407]
    assert tokenizer.encode("a").tolist() == [49406, 320, 49407, 49407]
    assert tokenizer.count(TEXT) == 7


def test_clip_finds_the_file_of_an_installed_package(clip_file, tmp_path, monkeypatch):
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it is not imported')\n")
    (package / Path(clip_file).name).write_bytes(Path(clip_file).read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path))
    assert parse_tokenizer("clip").encode("a").tolist()[:3] == [49406, 320, 49407]


@pytest.mark.parametrize(("pad", "key"), [(1, "siglip_pad1"), (0, "siglip2_pad0")])
def test_sentencepiece_gives_the_ids_of_siglip(pad, key):
    line = f"sentencepiece({MODEL!r}, length={PIECES['length']}, pad={pad})"
    tokenizer = parse_tokenizer(line)
    assert tokenizer.encode_all(PIECES["text"]).tolist() == PIECES[key]
    assert tokenizer.vocab_size == 41
    assert tokenizer.sha256 == hashlib.sha256(Path(MODEL).read_bytes()).hexdigest()
    assert parse_tokenizer(tokenizer.describe()) == tokenizer


def test_sentencepiece_cleans_a_text_first():
    ids = {
        clean: parse_tokenizer(f"sentencepiece({MODEL!r}, clean={clean!r})").encode("Large_Dog!")
        for clean in ("none", "lower", "canonicalize")
    }
    plain = parse_tokenizer(f"sentencepiece({MODEL!r})").encode("large dog")
    assert ids["canonicalize"].tolist() == plain.tolist()
    assert ids["lower"].tolist() != plain.tolist()
    assert ids["none"].tolist() != ids["lower"].tolist()


def test_a_tokenizer_of_hugging_face_keeps_its_ends_and_forgets_its_length(fast_file):
    tokenizer = parse_tokenizer(f"huggingface({fast_file!r}, length=9)")
    assert tokenizer.encode(TEXT).tolist() == [1, 4, 5, 6, 4, 7, 2, 0, 0]
    short = parse_tokenizer(
        f"huggingface({str(Path(fast_file).parent)!r}, length=4, clean='lower')"
    )
    assert short.encode("A PHOTO of a cat").tolist() == [1, 4, 5, 2]
    assert (short.vocab_size, short.count(TEXT)) == (8, 7)


def test_texts_are_canonicalized_as_in_big_vision():
    golden = json.loads((TOKENS / "canonicalize.json").read_text())
    assert [canonicalize(text) for text in golden["text"]] == golden["canonical"]
    for text, want in golden["keep_braces"]:
        assert canonicalize(text, keep="{}") == want
    for text, want in golden["keep_comma"]:
        assert canonicalize(text, keep=",") == want


@pytest.mark.parametrize(
    "text",
    ["a" * 2**20, "cat " * 2**18, "é" * 2**20, " " * 2**20, "\0" * 2**20, "&amp;" * 2**18],
    ids=["a word", "words", "accents", "spaces", "zeros", "entities"],
)
def test_a_megabyte_of_text_takes_no_longer_than_a_page(text, clip_file):
    for line in ("bytes", f"clip(vocab={clip_file!r})", f"sentencepiece({MODEL!r})"):
        tokenizer = parse_tokenizer(line)
        tokenizer.read()
        started = time.process_time()
        ids = tokenizer.encode(text)
        assert time.process_time() - started < 2
        assert ids.shape == (tokenizer.length,)


def test_half_of_a_surrogate_pair_is_a_question_mark(clip_file, fast_file):
    lines = (
        f"clip(vocab={clip_file!r})",
        f"sentencepiece({MODEL!r})",
        f"huggingface({fast_file!r})",
    )
    for line in ("bytes", *lines):
        tokenizer = parse_tokenizer(line)
        assert tokenizer.encode("a \ud800").tolist() == tokenizer.encode("a ?").tolist(), line


def test_a_line_is_read_without_its_file():
    tokenizer = parse_tokenizer("sentencepiece('missing.model', length=16, pad=1)")
    assert (tokenizer.length, tokenizer.describe()) == (
        16,
        "sentencepiece(model='missing.model', length=16, pad=1, clean='lower')",
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("byte(8)", ["data.tokenizer: unknown tokenizer 'byte'", "did you mean 'bytes'?"]),
        ("bytes(0)", ["length=0: expected more than 0"]),
        ("bytes(len=3)", ["wrong arguments in 'bytes(len=3)'", "length=64"]),
        ("bytes(length='8')", ["length='8' is a str"]),
        ("bytes|clip", ["can't read 'bytes|clip'"]),
        ("bytes(clean='lowr')", ["'lowr'", "did you mean 'lower'?"]),
        ("sentencepiece", ["expected the path of a model"]),
        ("huggingface", ["expected the path of a file"]),
        ("sentencepiece('nowhere.model')", ["'nowhere.model' can't be read: No such file"]),
        (f"sentencepiece({__file__!r})", ["is no model of sentencepiece"]),
        (f"huggingface({__file__!r})", ["is no tokenizer.json"]),
        (f"clip(vocab={__file__!r})", ["is no bpe_simple_vocab_16e6.txt.gz", "Not a gzipped file"]),
        (f"sentencepiece({MODEL!r}, pad=99)", ["pad=99: expected less than 41"]),
        (f"sentencepiece({MODEL!r}, pad=-1)", ["pad=-1: expected 0 or more"]),
        ("sentencepiece('a\\0b')", ["null byte"]),
    ],
)
def test_a_wrong_line_or_file_is_one_line(line, words):
    with pytest.raises(UserError) as error:
        parse_tokenizer(line).read()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_short_vocabulary_of_clip_is_refused(tmp_path):
    file = tmp_path / "short.txt.gz"
    file.write_bytes(gzip.compress(b"#version\nt h\n"))
    with pytest.raises(UserError, match="expected 48,894 merges"):
        parse_tokenizer(f"clip(vocab={str(file)!r})").read()


@pytest.mark.parametrize(
    ("line", "library"),
    [
        (f"sentencepiece({MODEL!r})", "sentencepiece"),
        (f"huggingface({MODEL!r})", "tokenizers"),
        ("clip", "ftfy"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(line, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs {library}: pip install 'vit_jax\[text\]'"):
        parse_tokenizer(line).read()


def test_clip_without_a_vocabulary_says_where_one_is(monkeypatch):
    monkeypatch.setattr(tokenizers, "_find_clip_vocab", lambda: None)
    with pytest.raises(UserError, match="give vocab='PATH/bpe_simple_vocab_16e6"):
        parse_tokenizer("clip").read()


def test_a_tokenizer_may_be_from_outside():
    trust_parts("tests.data.test_tokenizers")
    tokenizer = parse_tokenizer("tests.data.test_tokenizers:Lengths(length=2)")
    assert tokenizer.encode("four").tolist() == [4, 0]
    with pytest.raises(UserError, match="gives a str"):
        parse_tokenizer("tests.data.test_tokenizers:make_text")


class Lengths(tokenizers.Tokenizer):
    """The number of characters of a text."""

    def __init__(self, length: int):
        self.length = length

    def read(self) -> tokenizers.Vocabulary:
        return tokenizers.Vocabulary(size=100, pad=0, ids=lambda text: [len(text)])


def make_text() -> str:
    return "no tokenizer"
