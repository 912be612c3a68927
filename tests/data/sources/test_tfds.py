# SPDX-License-Identifier: Apache-2.0
"""TFDS datasets: what is known of them, their records, and how they are prepared."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from vit_jax.data.datasets import Digits
from vit_jax.data.sources import dataset_info, find_dataset, open_source
from vit_jax.data.sources import tfds as tfds_source
from vit_jax.utils import registry
from vit_jax.utils.errors import UserError

ROOT = Path(__file__).parents[3]


class Sentences(tfds.core.GeneratorBasedBuilder):
    """A dataset that is not for classification."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {}

    def _generate_examples(self):
        yield from ()


class Moments(tfds.core.GeneratorBasedBuilder):
    """Images with captions and without labels, in the form of `coco_captions`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "captions": tfds.features.Sequence({"id": np.int64, "text": np.str_}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"val": self._generate_examples()}

    def _generate_examples(self):
        png = cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()
        for i in range(3):
            texts = [{"id": k, "text": f" öl {i} {k}" if k else ""} for k in range(i + 1)]
            yield i, {"image": png, "captions": texts}


def test_captions_may_be_a_sequence_of_features(tmp_path):
    info = dataset_info("moments", data_dir=str(tmp_path))
    assert (info.num_classes, info.captions) == (0, True)
    source = open_source("moments", "val", data_dir=str(tmp_path), key="split")
    found = sorted(source.captions(index) for index in range(3))
    assert found == [(), ("öl 1 1",), ("öl 2 1", "öl 2 2")]
    assert source[0].keys() == {"image", "text"}


@pytest.mark.parametrize(
    ("feature", "found"),
    [
        (tfds.features.Text(), "caption"),
        (tfds.features.Sequence(tfds.features.Text()), "caption"),
        (tfds.features.Tensor(shape=(), dtype=np.str_), "caption"),
        (tfds.features.Scalar(np.int64), None),
        (tfds.features.Sequence(np.int64), None),
        (tfds.features.FeaturesDict({"words": tfds.features.Text()}), None),
    ],
    ids=repr,
)
def test_features_of_texts_are_captions(feature, found):
    assert tfds_source.find_captions({"caption": feature}) == found
    assert tfds_source.find_captions({"name": feature}) is None


def test_a_dataset_that_is_not_prepared_leaves_no_temporary_folder(tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert dataset_info("digits", data_dir=str(tmp_path / "data")).num_classes == 10
    assert not list(temporary.iterdir())


def test_dataset_info_tells_classes_and_shape(data_dir, tmp_path):
    info = dataset_info("digits", data_dir=data_dir)
    assert (info.num_classes, info.image_shape) == (10, (8, 8, 1))
    info = dataset_info("stripes", data_dir=str(tmp_path))
    assert (info.num_classes, info.image_shape) == (2, (None, None, 3))


@pytest.mark.parametrize(("label", "words"), [(-1, "no label"), (2, "label 2"), (-7, "label -7")])
def test_a_label_out_of_range_is_refused_with_its_record(label, words):
    records = [{"image": b"x", "label": np.int64(x)} for x in (0, 1, label)]
    source = tfds_source.TfdsSource(records, name="mine:test", num_classes=2, keep=True)
    assert [int(source[index]["label"]) for index in range(2)] == [0, 1]
    with pytest.raises(UserError) as error:
        source[2]
    assert str(error.value) == f"mine:test[2] has {words}; expected integers from 0 to 1"


def test_a_source_gives_encoded_images_by_position(stripes_dir):
    source = open_source("stripes", "validation", data_dir=stripes_dir, key="data.split")
    assert len(source) == 13
    assert {source[i].keys() == {"image", "label"} for i in range(13)} == {True}
    assert source[4]["image"].startswith(b"\xff\xd8")  # the JPEG itself
    assert source[4]["label"].dtype == np.int32
    heights = [
        cv2.imdecode(np.frombuffer(source[i]["image"], np.uint8), cv2.IMREAD_COLOR).shape[0]
        for i in range(13)
    ]
    assert sorted(heights) == list(range(40, 53))
    assert [source[i]["label"] for i in range(13)] == [h % 2 for h in heights]


def test_a_source_survives_pickling(data_dir):
    source = open_source("digits", "train", data_dir=data_dir, key="data.split")
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == 1437
    assert copy[7] == source[7]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digitz", ["data.name='digitz'", "no TFDS dataset", "did you mean 'digits'?"]),
        ("digits:9.9.9", ["data.name='digits:9.9.9'", "9.9.9"]),
        ("sentences", ["data.name='sentences'", "['text']", "'image', and a class 'label'"]),
    ],
)
def test_a_dataset_that_will_not_do_is_refused(name, words, tmp_path):
    with pytest.raises(UserError) as error:
        dataset_info(name, data_dir=str(tmp_path))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("trian", ["trian", "digits has train, test"]),
        ("train[:5%", ["digits has train, test"]),
        ("train[9:9]", ["digits holds no examples"]),
        ("train[9:5]", ["digits holds no examples"]),
        ("all[5:]", ["'all' does not support slice", "digits has train, test"]),
    ],
)
def test_a_split_that_will_not_do_is_refused(split, words, data_dir):
    with pytest.raises(UserError) as error:
        open_source("digits", split, data_dir=data_dir, key="evals.val.split")
    assert str(error.value).startswith(f"evals.val.split={split!r}")
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_dataset_in_another_format_is_refused_in_one_line(stripes_dir, tmp_path):
    shutil.copytree(stripes_dir, tmp_path, dirs_exist_ok=True)
    info = tmp_path / "stripes" / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    assert dataset_info("stripes", data_dir=str(tmp_path)).num_classes == 2
    with pytest.raises(UserError) as error:
        open_source("stripes", "train", data_dir=str(tmp_path), key="data.split")
    for word in ("data.name='stripes'", str(info.parent), "tfrecord", "expected array_record"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


# Preparing


def test_what_another_process_prepared_since_is_found(data_dir, tmp_path):
    folder = str(tmp_path)
    assert dataset_info("digits", data_dir=folder).num_classes == 10  # not prepared yet
    shutil.copytree(Path(data_dir) / "digits", tmp_path / "digits")
    assert len(open_source("digits", "train", data_dir=folder, key="data.split")) == 1437


def test_another_process_may_finish_preparing_first(data_dir, tmp_path, monkeypatch):
    def split_generators(self, dl_manager):
        shutil.copytree(Path(data_dir) / "digits", tmp_path / "digits", dirs_exist_ok=True)
        return original(self, dl_manager)

    original = Digits._split_generators
    monkeypatch.setattr(Digits, "_split_generators", split_generators)
    source = open_source("digits", "test", data_dir=str(tmp_path), key="data.split")
    assert len(source) == 360
    assert [p.name for p in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_preparing_that_fails_is_one_line_that_names_the_folder(tmp_path, monkeypatch):
    def split_generators(self, dl_manager):
        raise RuntimeError("no such\nluck")

    monkeypatch.setattr(Digits, "_split_generators", split_generators)
    with pytest.raises(UserError) as error:
        open_source("digits", "train", data_dir=str(tmp_path), key="data.split")
    for word in ("data.name='digits'", str(tmp_path), "RuntimeError: no such luck", "data_dir"):
        assert word in str(error.value)


def test_a_host_that_can_not_be_reached_is_named_at_once(tmp_path, monkeypatch):
    def no_network(*_):
        raise OSError

    monkeypatch.setattr(tfds_source.socket, "getaddrinfo", no_network)
    monkeypatch.setattr(tfds_source.urllib.request, "getproxies", dict)
    monkeypatch.setattr(
        Digits, "url_infos", {"https://example.org/digits.zip": None}, raising=False
    )
    with pytest.raises(UserError, match=r"'digits' .*example\.org can't be reached.*data_dir"):
        open_source("digits", "train", data_dir=str(tmp_path), key="data.split")


PREPARE = """
import sys, time
from pathlib import Path
from vit_jax.data.sources import dataset_info, open_source

folder, me = Path(sys.argv[1]), sys.argv[2]
dataset_info("digits", data_dir=str(folder / "tfds"))
(folder / me).touch()
while not all((folder / name).exists() for name in "ab"):
    time.sleep(0.001)
print(len(open_source("digits", "train", data_dir=str(folder / "tfds"), key="data.split")))
"""


def test_two_processes_may_prepare_a_dataset_at_once(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(tmp_path), me],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in "ab"
    ]
    try:
        for process in processes:
            output, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
            assert output == "1437\n"
    finally:
        for process in processes:
            process.kill()


def test_a_name_with_a_colon_is_of_a_community_if_there_is_no_such_module(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_trusted", {"some_people"})
    with pytest.raises(UserError) as error:
        find_dataset("some_people:mnist", data_dir=str(tmp_path))
    assert "there is no module some_people" in str(error.value)
    assert "some_people:mnist is no TFDS dataset in data.data_dir" in str(error.value)
    (tmp_path / "some_people").mkdir()
    found = find_dataset("some_people:mnist", data_dir=str(tmp_path))
    assert found == tfds_source.TfdsDataset("some_people:mnist", str(tmp_path))
