# SPDX-License-Identifier: Apache-2.0
"""Near duplicates and wrong labels that were planted among digits are found again."""

import csv
import dataclasses
import itertools
import re

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests.trained import write_model
from vit_jax.data import check
from vit_jax.data.sources import find_dataset
from vit_jax.data.sources.base import DatasetInfo
from vit_jax.inference import dataset_audit
from vit_jax.inference.dataset_audit import Audit, Images, write_tables
from vit_jax.inference.model import LoadedModel, load_model
from vit_jax.utils.errors import UserError

COUNT = 600
WRONG = list(range(7, COUNT, 40))  # 15 labels
COPIED = list(range(3, COUNT, 60))  # 10 images: files, then darker ones


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return (data.images[:COUNT] * 15).astype(np.uint8), data.target[:COUNT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits):
    """Digits as files, of which some have the next label and some are in both splits."""
    root = tmp_path_factory.mktemp("planted")
    for i, (image, label) in enumerate(zip(*digits, strict=True)):
        given = root / ("test" if i % 4 == 0 else "train") / str((label + (i in WRONG)) % 10)
        given.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(given / f"{i:03}.png"), image)
    for number, i in enumerate(COPIED):
        copy = digits[0][i] if number % 2 == 0 else np.round(digits[0][i] * 0.97)
        assert i % 4 == 3
        cv2.imwrite(str(root / "test" / str(digits[1][i]) / f"{i:03}_copy.png"), copy)
    return root


@pytest.fixture
def model(tmp_path, digits, monkeypatch):
    """A model whose features are pixels, and whose classes are the nearest mean of a digit.

    Its blocks have random weights.
    """
    images, labels = digits
    means = np.stack([images[labels == digit].mean(axis=0).ravel() for digit in range(10)])
    start = LoadedModel.start

    def start_on_pixels(self, batch, *, layer, tta=None):
        rows = batch[..., 0].reshape(len(batch), -1).astype(np.float32)
        if layer == "pre_logits":
            return jnp.asarray(rows)
        if layer == "logits":
            return jnp.asarray(-np.square(rows[:, None] - means).sum(axis=2) / 4e4)
        return start(self, batch, layer=layer, tta=tta)

    monkeypatch.setattr(LoadedModel, "start", start_on_pixels)
    return write_model(tmp_path / "model.npz", classes=10, num_layers=1, patch_size=(2, 2))


def read(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))

    def number(text):
        return int(re.search(r"(\d+)(_copy)?\.png$", text)[1])

    keys = [key for key in rows[0] if key.endswith("image")]
    return [row | {key: number(row[key]) for key in keys} for row in rows]


@pytest.mark.parametrize(
    ("judge", "precision", "recall"), [("neighbours", 0.9, 0.7), ("classifier", 0.8, 0.8)]
)
def test_what_was_planted_is_found(folder, digits, model, tmp_path, said, judge, precision, recall):
    out = tmp_path / "out"
    line = "--preprocess=decode|resize(8)"
    arguments = [f"folder:{folder}", f"--model={model}", f"--output={out}", line]
    assert check.main([*arguments, f"--judge={judge}"]) == 0
    pairs = read(out / "duplicates.csv")
    assert {row["first_image"] for row in pairs} == set(COPIED)
    assert all(row["first_image"] == row["second_image"] for row in pairs)
    assert sorted(row["kind"] for row in pairs) == ["file"] * 5 + ["near"] * 5
    assert {row["first_split"] for row in pairs} | {row["second_split"] for row in pairs} == {
        "train",
        "test",
    }
    assert "  in several splits, which makes results too good: 10" in said
    errors = read(out / "label_errors.csv")
    found = {row["image"] for row in errors}
    planted = found & set(WRONG)
    assert len(planted) >= recall * len(WRONG)
    assert len(planted) >= precision * len(found)
    true = sum(int(row["suggested"]) == digits[1][row["image"]] for row in errors)
    assert true >= len(planted) - 1
    assert {row["judge"] for row in errors} == {judge}
    scores = [float(row["score"]) for row in errors]
    assert scores == sorted(scores, reverse=True)
    for name in ("duplicates.png", "label_errors.png", "contact_sheet.png"):
        assert cv2.imread(str(out / name)) is not None


def test_images_that_a_run_was_trained_on_are_known(folder, tmp_path):
    model = load_model(write_model(tmp_path / "model.npz", num_layers=1), devices=jax.devices()[:1])
    name = f"folder:{folder}"
    dataset = find_dataset(name, data_dir=None)
    count = len(dataset.splits["train"])
    for data, expected in (
        ({"name": f"folder:{folder}/../{folder.name}", "split": "train[:100]"}, 100),
        ({"mixture": [{"name": name, "split": "train"}, {"name": "digits", "split": "t"}]}, count),
        ({"name": name, "split": "gone"}, 0),
        ({"name": "digits", "split": "train"}, 0),
        ({}, 0),
    ):
        run = dataclasses.replace(model, config={"data": data})
        trained = check.find_trained_rows(run, dataset, name, "test+train")
        assert (len(trained), trained.sum()) == (COUNT + len(COPIED), expected)
        assert not trained[: len(dataset.splits["test"])].any()


def test_equal_files_are_listed_whatever_the_mean_of_the_features_is(model, tmp_path, said):
    root = tmp_path / "copies"
    for name in ("a/0.png", "a/1.png", "b/2.png", "b/3.png"):
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / "train" / name), np.full((8, 8), 200, np.uint8))
    arguments = [f"folder:{root}", f"--model={model}", f"--output={tmp_path / 'out'}"]
    check.main([*arguments, "--judge=neighbours", "--min_cosine=1"])
    pairs = read(tmp_path / "out" / "duplicates.csv")
    assert [row["kind"] for row in pairs] == ["file"] * 6
    assert [row["cosine"] for row in pairs] == ["1.0000"] * 6
    found = {frozenset((row["first_image"], row["second_image"])) for row in pairs}
    assert found == set(map(frozenset, itertools.combinations(range(4), 2)))
    assert "  with different labels: 4" in said
    assert not any("--min_cosine" in line for line in said)


def test_what_a_model_cannot_judge_is_refused_before_images_are_read(
    folder, model, tmp_path, said, monkeypatch
):
    def read(*args, **options):
        raise AssertionError("images are read")

    monkeypatch.setattr(check, "inspect", read)
    other = write_model(tmp_path / "other.npz", classes=3, num_layers=1, patch_size=(2, 2))
    with pytest.raises(UserError, match="--model: "):
        check.main([f"folder:{folder}", f"--model={other}", "--judge=classifier"])
    with pytest.raises(AssertionError):
        check.main([f"folder:{folder}", f"--model={other}"])


def test_images_of_which_none_is_readable_are_refused_in_a_line(model, tmp_path, said):
    for number in range(3):
        path = tmp_path / "junk" / "train" / f"{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("no image")
    arguments = [f"folder:{tmp_path / 'junk'}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"none of the 3 images of folder:.* can be read"):
        check.main([*arguments, f"--model={model}"])
    assert check.main(arguments) == 1
    assert said[-1] == "no contact sheet: none of the 3 images can be read"
    assert not (tmp_path / "out").exists()


def test_images_that_a_model_cannot_take_are_refused_in_a_line(
    folder, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(dataset_audit, "prepare_image", lambda *args: None)
    with pytest.raises(UserError, match="none of the 40 readable images can be prepared"):
        check.main([f"folder:{folder}", "--split=test[:40]", f"--model={model}"])


def test_a_classifier_of_other_classes_is_refused_or_not_used(folder, model, tmp_path, said):
    other = write_model(tmp_path / "other.npz", classes=3, num_layers=1, patch_size=(2, 2))
    line = "--preprocess=decode|resize(8)"
    arguments = [f"folder:{folder}", f"--model={other}", f"--output={tmp_path / 'o'}", line]
    with pytest.raises(UserError, match=r"--model: .* has 10 classes .* has 3 classes"):
        check.main([*arguments, "--split=test[:80]", "--judge=classifier"])
    check.main([*arguments, "--split=test[:80]"])
    assert any(text.startswith("labels are judged by neighbours: --model: ") for text in said)


def test_data_without_labels_leaves_no_table_of_labels(tmp_path):
    source = find_dataset("digits", data_dir=None).open("test", key="split")
    none = np.zeros(0, np.int64)
    images = Images(source, DatasetInfo(0, (8, 8, 1)), none, [], None, [], none.astype(bool))
    (tmp_path / "label_errors.csv").write_text("image\nof other data\n")
    assert write_tables(tmp_path, Audit(images, [], [], [])) == [tmp_path / "duplicates.csv"]
    assert not (tmp_path / "label_errors.csv").exists()
