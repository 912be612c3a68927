# SPDX-License-Identifier: Apache-2.0
"""Other records, labels or numbers of them are another dataset; the same ones are not."""

from pathlib import Path

from tests.images import write_folder
from vit_jax.data.fingerprint import fingerprint
from vit_jax.data.sources import files, open_source
from vit_jax.data.tokenizers import parse_tokenizer


def measure(folder, split="train"):
    return fingerprint(open_source(f"folder:{folder}", split, data_dir=None, key="split"))


def test_what_is_there_tells_datasets_apart(tmp_path):
    for name in ("a", "b", "c"):
        more = name == "b"
        write_folder(tmp_path / name, {"train/cat": 8 + more, "train/dog": 8, "test/cat": 1})
    assert measure(tmp_path / "a") == measure(tmp_path / "c")
    assert measure(tmp_path / "a") != measure(tmp_path / "b")
    path = sorted((tmp_path / "c").glob("train/cat/*"))[0]
    path.write_bytes(b"")
    assert measure(tmp_path / "c") != measure(tmp_path / "a")
    (tmp_path / "c/train/dog").rename(tmp_path / "c/train/fox")
    (tmp_path / "c/train/cat").rename(tmp_path / "c/train/wolf")
    assert measure(tmp_path / "c") != measure(tmp_path / "a")


def test_a_prepared_dataset_has_one(data_dir):
    first, again = (open_source("digits", "train", data_dir=data_dir, key="s") for _ in range(2))
    assert fingerprint(first) == fingerprint(again)
    other = open_source("digits", "test", data_dir=data_dir, key="s")
    assert fingerprint(other) != fingerprint(first)


def test_captions_and_vocabulary_count_where_captions_are_tokenized(tmp_path):
    def find(line="bytes"):
        files.folder_dataset.cache_clear()
        source = open_source(f"folder:{tmp_path / 'a'}", "train", data_dir=None, key="split")
        return fingerprint(source), fingerprint(source, parse_tokenizer(line))

    write_folder(tmp_path / "a", {"train/cat": 8, "train/dog": 8})
    path = sorted((tmp_path / "a").glob("train/cat/*"))[0].with_suffix(".txt")
    path.write_text("a caption")
    first = find()
    assert find() == first
    path.write_text("another caption")
    second = find()
    assert second[0] == first[0]
    assert second[1] != first[1]
    model = Path(__file__).parent.parent / "testdata" / "tokens" / "sentencepiece.model"
    assert find(f"sentencepiece({str(model)!r})")[1] != second[1]
