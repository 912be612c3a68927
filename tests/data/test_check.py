# SPDX-License-Identifier: Apache-2.0
"""The commands that check and prepare datasets."""

import dataclasses
import io
import re

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.images import encode, write_folder
from tests.tiny import tiny_config
from vit_jax.data import check, prepare
from vit_jax.data.datasets import Digits
from vit_jax.data.pipeline import DatasetSpec, train_batches
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.data.sources import find_dataset, open_source
from vit_jax.data.sources.base import DatasetInfo
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the contact sheets go."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mixed_bag(tmp_path):
    """12 images with something of everything."""
    root = write_folder(tmp_path / "bag", {"train/cat": 6, "test/dog": 2})
    (root / "train/cat/broken.jpg").write_bytes(encode(1, ".jpg")[:-40])
    (root / "train/cat/wrong.jpg").write_bytes(encode(100))
    (root / "test/dog/again.png").write_bytes(encode(3))  # 003.png of cat
    file = io.BytesIO()
    Image.new("CMYK", (300, 9)).save(file, "JPEG")
    (root / "test/dog/print.jpg").write_bytes(file.getvalue())
    return f"folder:{root}"


def test_everything_wrong_or_odd_is_reported(mixed_bag, said):
    assert check.main([mixed_bag]) == 1
    text = "\n".join(said)
    assert said[0].endswith("1 of 2 classes have no images in train, and are never predicted: dog")
    assert said[1] == "splits: test 4, train 8"
    assert said[2] == "12 images, 2 classes"
    for words in (
        "corrupt: 1\n.*broken.jpg: .* not a readable image",
        "odd: PNG named .jpg: 1\n.*wrong.jpg",
        "odd: mode CMYK: 1\n.*print.jpg",
        "odd: more than 8 times as long as wide: 1\n.*print.jpg",
        "duplicates: 1\n.* = .* with different labels, in test, train\n"
        "  in several splits, which makes results too good: 1",
        "images of a class: 4 to 8, median 6",
        r"shorter side: 8 to 9, median 8\n  8 to 15 +11 #+",
    ):
        assert re.search(words, text), words


def test_images_that_an_operation_refuses_are_corrupt(tmp_path, said):
    # Each split is tried with the line that is for it.
    sizes = {"train": (60, 70), "test": (60, 70), "validation": (30, 30)}
    for split, (height, width) in sizes.items():
        (tmp_path / "bag" / split / "a").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "bag" / split / "a" / "x.png"), np.ones((height, width, 3)))
    name = f"folder:{tmp_path / 'bag'}"
    config = tmp_path / "config.py"
    config.write_text(
        "from tests.tiny import tiny_config\n"
        "def get_config():\n"
        "    line = 'decode|central_crop(%d)|resize(8)'\n"
        "    evals = {'val': {'split': 'test', 'preprocess': line % 62},\n"
        "             'other': {'split': 'validation', 'preprocess': line % 20},\n"
        "             'none': {'split': 'none', 'preprocess': line % 2}}\n"
        "    return tiny_config(None, data__preprocess=line % 60, evals=evals, mesh={'fsdp': 4})\n"
    )
    assert check.main([name, f"--config={config}"]) == 1
    assert said[0].endswith("there is a single class, 'a', so that every prediction is right")
    assert "evals.val.split='test': 1 images" in said
    refused = [line.split(": ")[1] for line in said if line.startswith("a run is refused: ")]
    assert refused[0].startswith("data.batch_size=16 is more than the 1 examples")
    assert refused[1] == "evals.none.split='none'"
    assert "corrupt: 1" in said
    refused = f"{tmp_path}/bag/test/a/x.png: evals.val.preprocess: central_crop(62) of a 60x70 im"
    assert any(line.strip().startswith(refused) for line in said)
    source = open_source(name, "validation", data_dir=None, key="split")
    line = check.Line("--preprocess", parse_preprocess("decode|central_crop(40)", key="k"), None)
    assert check.inspect_record(source, 0).corrupt is None
    found = check.inspect_record(source, 0, [line])
    assert found.size == (30, 30)
    assert found.corrupt == (
        "--preprocess: central_crop(40) of a 30x30 image: put resize_small or pad_to before it"
    )


def test_very_large_images_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_MANY", 100)
    name = f"folder:{write_folder(tmp_path / 'bag', {'train/a': 1})}"
    cv2.imwrite(str(tmp_path / "bag" / "train" / "a" / "large.png"), np.ones((9, 12, 3)))
    source = open_source(name, "all", data_dir=None, key="split")
    large, small = (check.inspect_record(source, index).odd for index in (1, 0))
    assert {large, small} == {("more than 100 pixels",), ()}


def test_a_split_without_faults_is_exit_code_0(mixed_bag, said):
    assert check.main([mixed_bag, "--split=test", "--num_threads=2"]) == 0
    assert "4 images, 2 classes" in said
    assert "corrupt: 0" in said


def test_splits_without_labels_are_left_out_with_a_line(tmp_path, said):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encode(number))
    lines = ["image,label,split", "0.png,a,train", "1.png,b,train", "2.png,,test", "3.png,,test"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    name = f"manifest:{tmp_path / 'list.csv'}"
    assert check.main([name]) == 0
    assert said[0].startswith("not checked: split='test' of manifest:")
    assert "3.png (row 4) has no label" in said[0] or "2.png (row 3) has no label" in said[0]
    assert "2 images, 2 classes" in said
    (tmp_path / "list.csv").write_text("\n".join([*lines[:2], "1.png,b,val", *lines[3:]]))
    said.clear()
    check.main([name])
    assert "2 images, 2 classes" in said
    with pytest.raises(UserError, match=r"--split='test' of .* has no label"):
        check.main([name, "--split=test"])


def test_the_contact_sheet_shows_what_the_model_sees(mixed_bag, said, tmp_path):
    preprocess = "--preprocess=decode|resize(20)"
    check.main([mixed_bag, "--split=train[:1]", preprocess, f"--output={tmp_path / 'out'}"])
    sheet = cv2.imread(str(tmp_path / "out" / "contact_sheet.png"))
    assert sheet.shape == (8 * 118, 8 * 102, 3)
    tile, caption = sheet[1:101, 1:101], sheet[101:118, :102]
    assert len(np.unique(tile)) == 1
    np.testing.assert_array_equal(sheet[119:219, 205:305], tile)
    assert caption.max() > 200
    np.testing.assert_array_equal(sheet[101 + 118 : 118 + 118, 204:306], caption)
    assert said[-1] == f"wrote {tmp_path / 'out' / 'contact_sheet.png'}"


def test_the_contact_sheet_shows_the_augmentation_of_a_config(said, tmp_path):
    name = f"folder:{write_folder(tmp_path / 'bag', {'train/a': 40, 'test/a': 40}, start=60)}"
    sheets = []
    for extra in ({}, {"random_erasing": 1.0}):
        config = tmp_path / "config.py"
        config.write_text(
            "from tests.tiny import tiny_config\n"
            "def get_config():\n"
            f"    return tiny_config(None, objective={extra}, mesh={{'fsdp': 4}},\n"
            "        data__preprocess='decode|resize(8)', evals={})\n"
        )
        assert check.main([name, f"--config={config}"]) == 0
        assert said[-1] == "wrote runs/check/contact_sheet.png"
        sheets.append(cv2.imread("runs/check/contact_sheet.png"))
    whole, erased = (
        s.reshape(8, 114, 8, 98, 3)[:, 1:97:12, :, 1:97:12].swapaxes(1, 2) for s in sheets
    )
    grey = whole[:, :, :1, :1]
    assert (whole == grey).all()
    assert set(grey.flatten()) == set(range(60, 100))
    changed = (erased != whole).any(axis=(2, 3, 4))
    assert changed.mean() > 0.9
    assert (erased == whole).mean() > 0.5


def test_captions_are_names_of_classes():
    info = DatasetInfo(3, (8, 8, 3), ("cat", "dog", "eel"))
    for label, words in (
        (np.int32(2), "eel"),
        (np.array([0.05, 0.05, 0.9]), "eel"),
        (np.array([0.65, 0.05, 0.3]), "cat + eel"),
        (np.array([1.0, 1.0, 0.0]), "cat + dog"),
        (np.zeros(3), ""),
    ):
        assert check.caption(label, info) == words
    assert check.caption(np.ones(1), DatasetInfo(1, (8, 8, 3), ("cat",))) == "cat"
    assert check.caption(np.int32(2), DatasetInfo(3, (8, 8, 3))) == "2"


def test_captions_that_are_too_long_or_have_other_characters_fit(tmp_path):
    names = ["a very long name of a class that does not end here", "\u732b", "", "cat"] * 16
    check.write_contact_sheet(tmp_path / "sheet.png", np.zeros((64, 32, 32, 3), np.uint8), names)
    sheet = cv2.imread(str(tmp_path / "sheet.png"))[:114].reshape(114, 8, 98, 3)
    assert [bool(sheet[:, column].any()) for column in range(4)] == [True, True, False, True]
    assert not sheet[:, :, [0, 97]].any()


def test_a_check_with_a_config_says_what_a_run_would_use(said, tmp_path):
    name = f"folder:{write_folder(tmp_path / 'bag', {'a': 40, 'b': 60})}"
    assert check.main([name, "--config=folder", "--config.data.batch_size=32"]) == 0
    assert [
        line for line in said if ".split=" in line and line.startswith(("data.", "evals."))
    ] == [
        "data.split='train': 80 images, 2 batches of 32",
        "evals.test.split='test': 10 images",
        "evals.val.split='validation': 10 images",
    ]
    assert "the model takes 32x32: 100 of 100 images are smaller" in said


def test_a_check_with_a_config_reports_what_a_run_would_refuse(said, tmp_path):
    name = f"folder:{write_folder(tmp_path / 'bag', {'train/a': 30, 'val/a': 3})}"
    assert check.main([name, "--config=folder"]) == 1
    refused = [line for line in said if line.startswith("a run is refused: ")]
    assert [line.split(": ")[1].partition(" ")[0] for line in refused] == [
        "data.batch_size=128",
        "evals.test.split='test'",
    ]
    assert refused[1].endswith(
        "folder has train (30), validation (3); add --config.evals.test.split=validation, or "
        "--config.evals.test=none to leave it out".replace("folder", name)
    )
    assert "33 images, 1 classes" in said
    assert said[-1] == "wrote runs/check/contact_sheet.png"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["folder:/nowhere"], "folder:/nowhere"),
        (["{bag}", "--split=dev"], "--split='dev'"),
        (["{bag}", "--num_threads=0"], "--num_threads=0"),
        (["{bag}", "--preprocess=decode|resise(8)"], "'resise'"),
        (["{bag}", "--config=none.py"], "--config=none.py: there is no file"),
        (["{bag}", "--config.seed=1"], "--config.seed: expected --config=FILE"),
        (["{bag}", "--config=folder", "--config.model.num_classes=1"], "model.num_classes=1"),
        (["{bag}", "--config=folder", "--config.data.bach_size=1"], "data.bach_size"),
    ],
)
def test_bad_arguments_are_refused(arguments, words, mixed_bag):
    with pytest.raises(UserError, match=re.escape(words)):
        check.main([a.format(bag=mixed_bag) for a in arguments])


def test_a_dataset_of_tfds_is_prepared_and_checked(tmp_path, said):
    for _ in range(2):  # the second time it is there
        prepare.main(["digits", f"--data_dir={tmp_path}"])
        assert f"digits is prepared in {tmp_path}/digits/1.0.0" in said
        assert "  train                  1,437 examples" in said
    assert check.main(["digits", "--split=test[:50]", f"--data_dir={tmp_path}"]) == 0
    assert "50 images, 10 classes" in said


def test_the_lines_of_a_config_are_for_their_splits_of_tfds_too(data_dir, said):
    dataset = find_dataset("digits", data_dir=data_dir)
    evals = {"val": {"split": "test[:50]", "preprocess": "decode"}}
    experiment = Experiment.from_config(tiny_config(data_dir, evals=evals), epoch_examples=64)
    lines = check.find_lines(experiment, dataset, "digits", "all")
    source = dataset.open("all", key="split")
    for line, split in zip(lines, ("train", "test[:50]"), strict=True):
        part, places = dataset.open(split, key="split"), np.flatnonzero(line.records)
        assert len(line.records) == len(source)
        assert len(places) == len(part)
        assert [source[int(i)]["image"] for i in places[:3]] == [part[i]["image"] for i in range(3)]


def test_a_builder_that_needs_tensorflow_says_how_to_prepare_it(tmp_path, monkeypatch):
    def split_generators(self, dl_manager):
        try:
            raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
        except ImportError as e:
            raise RuntimeError("failed to generate") from e

    monkeypatch.setattr(Digits, "_split_generators", split_generators)
    with pytest.raises(
        UserError, match=r"needs TensorFlow: .* tfds build digits --file_format=arr"
    ):
        prepare.main(["digits", f"--data_dir={tmp_path}"])


@pytest.fixture
def captioned(tmp_path):
    """Twelve images with texts beside them: one is empty, one has two lines and a bell."""
    root = write_folder(tmp_path / "pairs", {"train": 12})
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        text = {3: " ", 5: "first of two\nsecond\x07of two"}.get(number, f"picture {number}")
        path.with_suffix(".txt").write_text(text)
    return f"pairs:{root}"


def test_captions_are_reported(captioned, said):
    assert check.main([captioned, "--preprocess=decode|resize(40)"]) == 1
    text = "\n".join(said)
    for words in (
        "12 images, no labels",
        "corrupt: 1\n.*003.png: it has no caption",
        "odd: captions with control characters: 1\n.*005.png",
        "captions: 12, 1 to 2 an image, median 1",
        "characters of a caption: 9 to 13, median 9",
        "wrote runs/check/contact_sheet.png",
    ):
        assert re.search(words, text), words


def test_tokens_of_captions_are_counted_and_cut_ones_too(captioned, said):
    assert check.main([captioned, "--tokenizer=bytes(length=12)"]) == 1
    assert "tokens of a caption: 10 to 14, median 10" in said
    assert "bytes(length=12, clean='none') cuts 2 of 12 captions (16.7%)" in said
    for tokenizer, words in (("byte", "did you mean 'bytes'?"), ("clip(0)", "more than 0")):
        with pytest.raises(UserError) as error:
            check.main([captioned, f"--tokenizer={tokenizer}"])
        assert "--tokenizer" in str(error.value)
        assert words in str(error.value)


def test_images_of_classes_need_captions_only_for_a_tokenizer(tmp_path, said):
    root = write_folder(tmp_path / "some", {"cat": 6, "dog": 6})
    (root / "cat" / "000.txt").write_text("a cat")
    assert check.main([f"folder:{root}"]) == 0
    assert "odd: no captions: 11" in said
    assert check.main([f"folder:{root}", "--tokenizer=bytes"]) == 1
    assert "corrupt: 11" in said


def test_the_contact_sheet_shows_the_captions_that_are_learned(captions_dir):
    spec = DatasetSpec(
        "digits_captions", "train", "decode", 4, captions_dir, "check", tokenizer="bytes"
    )
    images, captions = check.prepare_images(spec)
    assert len(images) == len(captions) == 64
    batch = next(train_batches(dataclasses.replace(spec, batch_size=64), seed=0, step=0))
    np.testing.assert_array_equal(images, batch["image"])
    texts = [bytes(int(t) - 3 for t in row if t > 2).decode() for row in batch["tokens"]]
    assert captions == texts


def test_a_config_that_learns_from_labels_is_refused_for_captions_alone(captioned, tmp_path):
    base = tiny_config(None, data__name=captioned, data__preprocess="decode|resize(8)")
    with pytest.raises(UserError) as error:
        Experiment.from_config(base)
    assert str(error.value) == (
        f"objective.name='supervised' needs labels, and {captioned} has captions alone: expected "
        "data with labels, or --config.objective.name=contrastive, which learns from captions"
    )
    with pytest.raises(UserError, match=r"evals.val.name='knn' needs labels"):
        Experiment.from_config(
            tiny_config(
                None,
                data__name=captioned,
                data__preprocess="decode|resize(8)",
                objective={"name": "mae"},
                evals__val={
                    "name": "knn",
                    "split": "train",
                    "train_split": "train",
                    "preprocess": "decode|resize(8)",
                },
            )
        )


def test_the_contact_sheet_shows_images_that_are_cut_into_patches():
    spec = DatasetSpec("digits", "train", "decode|resize(8)|patches(4, 9)", 64, None, "check")
    images, _ = check.prepare_images(spec)
    np.testing.assert_array_equal(images.shape, (64, 12, 12, 3))


def test_a_model_of_images_of_any_size_has_no_size_to_compare_with():
    findings = [check.Finding("a", b"", 0, (5, 7))]
    dataset = find_dataset("digits", data_dir=None)
    assert not any("smaller" in line for line in check.report(findings, dataset, None))


def test_a_caption_of_an_image_that_is_too_narrow_for_dots_is_left_out(tmp_path):
    images = np.zeros((64, 96, 4, 3), np.uint8)
    check.write_contact_sheet(tmp_path / "sheet.png", images, ["a long caption"] * 64)
    assert (tmp_path / "sheet.png").exists()
