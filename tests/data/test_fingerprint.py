# SPDX-License-Identifier: Apache-2.0
"""Other records, labels or numbers of them are another dataset; the same ones are not."""

from tests.images import write_folder
from vit_jax.data.fingerprint import fingerprint
from vit_jax.data.sources import open_source


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
