# SPDX-License-Identifier: Apache-2.0
"""Texts as token ids: `data.tokenizer` names the tokenizer in a line such as `clip(length=77)`.

The ids are a function of the text, of these arguments and of the vocabulary file alone, and are
made on the host. Files are read when they are first needed, so that a run can be planned without
them.
"""

import abc
import dataclasses
import functools
import gzip
import hashlib
import html
import importlib
import importlib.util
import io
import os
import string
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from vit_jax.data.calls import parse_call
from vit_jax.utils.bounds import read_bytes
from vit_jax.utils.errors import UserError

# A text is cut to this many characters for each token before it is tokenized: more than any token
# of a published vocabulary has, and a bound on the time that a huge text takes.
_MOST_CHARACTERS = 128
_MAX_FILE = 2**28  # bytes of a vocabulary, compressed or not; Gemma's tokenizer.json has 34 MB

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize(text: str, *, keep: str = "") -> str:
    """Cleans a text as SigLIP does for zero-shot classification.

    Underscores become spaces, ASCII punctuation is deleted, letters become lower case, and runs of
    white space one space. The text `keep` is kept: `"{}"` in templates, `","` in class names.
    """
    parts = text.replace("_", " ").split(keep) if keep else [text.replace("_", " ")]
    return " ".join(keep.join(part.translate(_PUNCTUATION) for part in parts).lower().split())


_CLEAN = {"none": lambda text: text, "lower": str.lower, "canonicalize": canonicalize}
Clean = Literal["none", "lower", "canonicalize"]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer reads from its file.

    Attributes:
      size: ids are from 0 to `size` - 1.
      pad: the id after the end of a text.
      ids: all ids of a text, with those that begin and end it. Safe to call from many threads.
      ends: whether the last id ends a text, and is kept when the text is cut.
      sha256: hexadecimal digest of the file; None if there is none.
    """

    size: int
    pad: int
    ids: Callable[[str], list[int]]
    ends: bool = True
    sha256: str | None = None


class Tokenizer(abc.ABC):
    """Makes ids of a fixed number of tokens.

    A text that has more tokens keeps the first ones, and the last one that ends it ("sticky").
    Subclasses are frozen dataclasses, whose fields are the arguments of the line.

    Attributes:
      length: tokens of each text.
    """

    # Arguments that may be 0; other numbers must be positive.
    may_be_zero: ClassVar[tuple[str, ...]] = ("pad",)

    length: int

    @abc.abstractmethod
    def read(self) -> Vocabulary:
        """Reads the vocabulary; raises `UserError` if its file or library is missing or unfit."""

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """What `read` returned when it was first needed."""
        return self.read()

    @property
    def vocab_size(self) -> int:
        """Ids are from 0 to `vocab_size` - 1."""
        return self.vocabulary.size

    @property
    def sha256(self) -> str | None:
        """Hexadecimal digest of the vocabulary file; None if there is none."""
        return self.vocabulary.sha256

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32 `[length]`."""
        vocabulary, ids = self.vocabulary, self._ids(text)
        if len(ids) > self.length:
            ids = [*ids[: self.length - 1], ids[-1 if vocabulary.ends else self.length - 1]]
        tokens = np.full(self.length, vocabulary.pad, np.int32)
        tokens[: len(ids)] = ids
        return tokens

    def encode_all(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the ids of several texts, int32 `[texts, length]`."""
        return np.array([self.encode(text) for text in texts], np.int32).reshape(-1, self.length)

    def count(self, text: str) -> int:
        """The number of tokens of a text that is not cut, with those that begin and end it.

        Of a very long text, only the part that is looked at counts: it is more than `length`.
        """
        return len(self._ids(text))

    def describe(self) -> str:
        """The line that makes this tokenizer, with all arguments that are not None."""
        own: Any = self
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(own))
        args = ", ".join(f"{name}={value!r}" for name, value in fields if value is not None)
        kind = type(self)
        names = [name for name, make in TOKENIZERS.items() if make is kind]
        return f"{names[0] if names else f'{kind.__module__}:{kind.__qualname__}'}({args})"

    def _ids(self, text: str) -> list[int]:
        text = text[: _MOST_CHARACTERS * self.length]
        # Halves of surrogate pairs, which JSON can hold, are no characters.
        text = text if text.isascii() else text.encode("utf-8", "replace").decode()
        return self.vocabulary.ids(text)

    def _refuse(self, reason: str) -> UserError:
        return UserError(f"data.tokenizer: {self.describe()}: {reason}")

    def _find_library(self, *names: str) -> None:
        """Raises `UserError` if a library can't be imported."""
        for name in names:
            try:
                importlib.import_module(name)
            except ImportError:
                raise self._refuse(f"needs {name}: pip install 'vit_jax[text]'") from None

    def _read_file(self, path: str, read: Callable[[str, int, int], Any], *, kind: str) -> Any:
        """Calls `read` with the path, time of change and size of a file, by which it caches."""
        try:
            where = os.path.abspath(os.path.expanduser(path))
            status = os.stat(where)
            return read(where, status.st_mtime_ns, status.st_size)
        except OSError as e:
            reason = e.strerror or _one_line(e)
            raise self._refuse(f"{path!r} can't be read: {reason}") from None
        except Exception as e:  # The libraries raise errors of many types.
            raise self._refuse(f"{path!r} is no {kind}: {_one_line(e)}") from None

    def _check_pad(self, pad: int | None, size: int) -> int:
        if pad is None:
            raise self._refuse("its file has no token that pads a text: expected pad=ID")
        if pad >= size:
            raise self._refuse(f"pad={pad}: expected less than {size:,}")
        return pad


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@dataclasses.dataclass(frozen=True)
class Bytes(Tokenizer):
    """The bytes of a text in UTF-8, as in ByT5 (Xue et al., 2022, https://arxiv.org/abs/2105.13626).

    Byte b is b + 3; 0 pads, 1 ends a text, and 2 stands for what is unknown, which no byte is.
    """

    length: int = 64
    clean: Clean = "none"

    def read(self) -> Vocabulary:
        def ids(text: str) -> list[int]:
            return [byte + 3 for byte in _CLEAN[self.clean](text).encode()] + [1]

        return Vocabulary(size=259, pad=0, ids=ids)


@dataclasses.dataclass(frozen=True)
class Clip(Tokenizer):
    """The byte pairs of CLIP (Radford et al., 2021, https://arxiv.org/abs/2103.00020).

    Attributes:
      vocab: path of `bpe_simple_vocab_16e6.txt.gz`; None for the file of open_clip or clip, if one
        of these is installed.
      pad: id after the end of a text: 0 in CLIP and open_clip, 49407 in Hugging Face's.
    """

    length: int = 77
    vocab: str | None = None
    pad: int = 0

    def read(self) -> Vocabulary:
        self._find_library("ftfy", "tokenizers")
        import ftfy

        path = self.vocab or _find_clip_vocab()
        if path is None:
            raise self._refuse(
                f"no vocabulary: give vocab='PATH/{_CLIP_FILE}', or pip install "
                "--no-deps open_clip_torch, which has it"
            )
        model, size, digest = self._read_file(path, _load_clip, kind=_CLIP_FILE)

        def ids(text: str) -> list[int]:
            # What follows changes nothing in ordinary English captions, and takes its time.
            if not (text.isascii() and text.isprintable() and "&" not in text):
                text = html.unescape(html.unescape(ftfy.fix_text(text)))
            text = " ".join(text.split()).lower()
            return [size - 2, *model.encode(text, add_special_tokens=False).ids, size - 1]

        return Vocabulary(size, self._check_pad(self.pad, size), ids, sha256=digest)


_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
_CLIP_MERGES = 49152 - 256 - 2


def _find_clip_vocab() -> str | None:
    """The vocabulary file in an installed package, which is not imported."""
    for package in ("open_clip", "clip"):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            if (file := Path(folder, _CLIP_FILE)).is_file():
                return str(file)
    return None


@functools.lru_cache(maxsize=4)
def _load_clip(path: str, *_: int) -> tuple[Any, int, str]:
    """The model of a vocabulary file, the number of its ids, and the digest of the file."""
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    content = read_bytes(path, max_bytes=_MAX_FILE)
    try:
        with gzip.open(io.BytesIO(content)) as file:
            lines = file.read(_MAX_FILE).decode().split("\n")
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(_one_line(e)) from None
    pairs = [line.split() for line in lines[1 : 1 + _CLIP_MERGES]]
    if len(pairs) < _CLIP_MERGES or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"expected {_CLIP_MERGES:,} merges, a pair a line")
    merges = [(first, second) for first, second in pairs]
    # Bytes as characters that can be printed, in the order of their ids.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [*map(chr, printable), *map(chr, range(256, 512 - len(printable)))]
    pieces = characters + [f"{c}</w>" for c in characters] + ["".join(pair) for pair in merges]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    fast = Fast(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>"))
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return fast, len(pieces) + 2, hashlib.sha256(content).hexdigest()


@dataclasses.dataclass(frozen=True)
class SentencePiece(Tokenizer):
    """A sentencepiece model, as SigLIP, SigLIP 2, T5 and Gemma have.

    Attributes:
      model: path of the `.model` file.
      pad: id after the end of a text: 1, which also ends it, in SigLIP, and 0 in SigLIP 2; None for
        that of the model.
      clean: what is done to a text first; both were trained on lower case.
    """

    model: str = ""
    length: int = 64
    pad: int | None = None
    clean: Clean = "lower"

    def read(self) -> Vocabulary:
        if not self.model:
            raise self._refuse("expected the path of a model: sentencepiece('PATH.model')")
        self._find_library("sentencepiece")
        model, digest = self._read_file(
            self.model, _load_sentencepiece, kind="model of sentencepiece"
        )
        size, end, pad = model.vocab_size(), model.eos_id(), model.pad_id()
        if end < 0:
            raise self._refuse(f"{self.model!r} has no token that ends a text")
        pad = self.pad if self.pad is not None else (pad if pad >= 0 else None)

        def ids(text: str) -> list[int]:
            return [*model.encode(_CLEAN[self.clean](text)), end]

        return Vocabulary(size, self._check_pad(pad, size), ids, sha256=digest)


@functools.lru_cache(maxsize=4)
def _load_sentencepiece(path: str, *_: int) -> tuple[Any, str]:
    import sentencepiece

    content = read_bytes(path, max_bytes=_MAX_FILE)
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(content)
    return model, hashlib.sha256(content).hexdigest()


@dataclasses.dataclass(frozen=True)
class HuggingFace(Tokenizer):
    """A `tokenizer.json` of Hugging Face, with the tokens around a text that it asks for.

    Attributes:
      file: path of `tokenizer.json`, or of the folder that has it.
      pad: id after the end of a text; None for that of the file.
      clean: what is done to a text first: "lower" for SigLIP 2, whose file keeps case.
    """

    file: str = ""
    length: int = 64
    pad: int | None = None
    clean: Clean = "none"

    def read(self) -> Vocabulary:
        if not self.file:
            raise self._refuse("expected the path of a file: huggingface('PATH/tokenizer.json')")
        self._find_library("tokenizers")
        folder = os.path.isdir(os.path.expanduser(self.file))
        path = os.path.join(self.file, "tokenizer.json") if folder else self.file
        model, size, own, digest = self._read_file(path, _load_huggingface, kind="tokenizer.json")
        pad = self._check_pad(own if self.pad is None else self.pad, size)

        def ids(text: str) -> list[int]:
            return model.encode(_CLEAN[self.clean](text)).ids

        ends = model.encode("a").special_tokens_mask[-1:] == [1]
        return Vocabulary(size, pad, ids, ends, digest)


_PADS = ("<pad>", "[PAD]", "<|pad|>")


@functools.lru_cache(maxsize=4)
def _load_huggingface(path: str, *_: int) -> tuple[Any, int, int | None, str]:
    """The tokenizer of a file, the number of its ids, its padding, and the digest of the file."""
    from tokenizers import Tokenizer as Fast

    content = read_bytes(path, max_bytes=_MAX_FILE)
    fast = Fast.from_buffer(content)
    padding = fast.padding
    fast.no_padding()
    fast.no_truncation()
    pads = [padding["pad_id"]] if padding else map(fast.token_to_id, _PADS)
    pad = next((pad for pad in pads if pad is not None), None)
    size = max(fast.get_vocab(with_added_tokens=True).values(), default=0) + 1
    return fast, size, pad, hashlib.sha256(content).hexdigest()


TOKENIZERS: dict[str, Any] = {
    "bytes": Bytes,
    "clip": Clip,
    "huggingface": HuggingFace,
    "sentencepiece": SentencePiece,
}


def parse_tokenizer(line: str, *, key: str = "data.tokenizer") -> Tokenizer:
    """Makes the tokenizer of a line such as `sentencepiece('c4_en.model', length=64, pad=1)`.

    Arguments are literals, and nothing is evaluated. No file is read.

    Args:
      line: one of `TOKENIZERS` or a part from outside, with arguments.
      key: the config key of the line, for errors.

    Raises:
      UserError: an unknown tokenizer or argument.
    """
    return parse_call(line.strip(), TOKENIZERS, key=key, what="tokenizer", gives=(Tokenizer,))
