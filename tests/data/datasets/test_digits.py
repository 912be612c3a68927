# SPDX-License-Identifier: Apache-2.0
"""The digits data set: its table, its split, and what TFDS prepares from them."""

import gzip
import hashlib
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds

from vit_jax.data.datasets import Digits
from vit_jax.data.datasets.digits import table

_STORED_BYTES = {"image": tfds.decode.SkipDecoding()}


@pytest.fixture(scope="session")
def builder(tmp_path_factory):
    builder = tfds.builder("digits", data_dir=tmp_path_factory.mktemp("tfds"))
    builder.download_and_prepare()
    return builder


@pytest.fixture(scope="session")
def records(builder):
    """All records of both splits by `id`, images as stored bytes."""
    sources = [builder.as_data_source(split, decoders=_STORED_BYTES) for split in ("train", "test")]
    return {record["id"]: record for source in sources for record in source}


def _ids(source):
    return [record["id"] for record in source]


def test_embedded_table_is_the_published_one():
    content = gzip.decompress(Path(table.__file__).with_name("digits.csv.gz").read_bytes())
    assert (
        hashlib.sha256(content).hexdigest()
        == "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8"
    )


def test_embedded_table_does_not_tell_when_it_was_packed():
    header = Path(table.__file__).with_name("digits.csv.gz").read_bytes()[:10]
    assert header[4:8] == bytes(4), "the gzip header carries a time"
    assert header[3] == 0, "the gzip header carries a file name"


def test_load_digits_equals_sklearn():
    images, labels = table.load_digits()
    expected_pixels, expected_labels = sklearn.datasets.load_digits(return_X_y=True)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(images, expected_pixels.reshape(1797, 8, 8))
    np.testing.assert_array_equal(labels, expected_labels)


def test_to_uint8_range_is_linear_and_loses_nothing():
    values = np.arange(17, dtype=np.uint8)
    scaled = table.to_uint8_range(values)
    assert scaled.dtype == np.uint8
    assert scaled.tolist() == [round(v * 255 / 16) for v in range(17)]
    np.testing.assert_array_equal(np.rint(scaled * (16 / 255)), values)


def test_split_is_disjoint_covers_the_table_and_is_ascending():
    _, labels = table.load_digits()
    train, test = table.split_indices(labels)
    assert (len(train), len(test)) == (1437, 360)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))
    assert (np.diff(train) > 0).all()
    assert (np.diff(test) > 0).all()


def test_split_gives_every_class_its_share_of_test():
    _, labels = table.load_digits()
    _, test = table.split_indices(labels)
    share = np.bincount(labels) * (len(test) / len(labels))
    assert (np.abs(np.bincount(labels[test], minlength=10) - share) < 1).all()


def test_split_is_the_same_everywhere():
    _, test = table.split_indices(table.load_digits()[1])
    digest = hashlib.sha256(",".join(map(str, test.tolist())).encode()).hexdigest()
    assert digest == "265548fa31c69890406ee18fecba94ef88381dd5b88703c6072f456073131f25"


def test_importing_the_package_registers_the_name():
    assert tfds.builder_cls("digits") is Digits


def test_builder_has_the_sizes_and_shapes_it_says(builder):
    sizes = {name: split.num_examples for name, split in builder.info.splits.items()}
    assert sizes == {"train": 1437, "test": 360}
    assert builder.info.features["image"].shape == (8, 8, 1)
    assert builder.info.features["image"].np_dtype == np.uint8
    assert builder.info.features["label"].num_classes == 10


def test_builder_states_source_and_licence(builder):
    for text in (builder.info.description, builder.info.citation):
        assert "CC BY 4.0" in text
        assert "10.24432/C50P49" in text
        assert "Alpaydin" in text
        assert "Kaynak" in text


def test_builder_writes_array_record_unless_told_otherwise(builder):
    assert builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD
    assert list(builder.data_path.glob("*.array_record-*"))


def test_stored_images_are_png_that_decode_to_the_scaled_table(records):
    images, labels = table.load_digits()
    expected = table.to_uint8_range(images)
    assert sorted(records) == list(range(1797))
    for row, record in records.items():
        assert record["image"].startswith(b"\x89PNG\r\n\x1a\n")
        decoded = cv2.imdecode(np.frombuffer(record["image"], np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(decoded, expected[row])
        assert record["label"] == labels[row]


def test_decoded_images_keep_their_channel(builder):
    record = builder.as_data_source("test")[0]
    expected = table.to_uint8_range(table.load_digits()[0])[record["id"]]
    assert record["image"].dtype == np.uint8
    np.testing.assert_array_equal(record["image"], expected[..., None])


def test_prepared_splits_are_those_of_split_indices(builder):
    train, test = table.split_indices(table.load_digits()[1])
    assert sorted(_ids(builder.as_data_source("train"))) == train.tolist()
    assert sorted(_ids(builder.as_data_source("test"))) == test.tolist()


def test_records_come_in_the_same_order_on_every_machine(builder):
    # A slice such as train[:90%] is the same set of images only while this holds.
    assert _ids(builder.as_data_source("train[:8]")) == [1456, 499, 1647, 386, 1494, 266, 1636, 497]
    assert _ids(builder.as_data_source("test[:8]")) == [131, 1260, 592, 738, 1065, 522, 1381, 954]


def test_slices_divide_a_split(builder):
    whole = _ids(builder.as_data_source("train"))
    head = _ids(builder.as_data_source("train[:90%]"))
    tail = _ids(builder.as_data_source("train[90%:]"))
    assert len(head) == 1293
    assert head + tail == whole


def test_tfds_data_source_reads_what_was_prepared(builder):
    source = tfds.data_source(
        "digits", split="train[:90%]", data_dir=builder.data_dir_root, download=False
    )
    assert len(source) == 1293


def test_data_source_survives_pickling(builder):
    source = builder.as_data_source("train", decoders=_STORED_BYTES)
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == len(source)
    assert copy[7] == source[7]


def test_preparing_needs_no_tensorflow_and_no_network(tmp_path):
    script = """
        import sys

        def forbid_network(event, args):
            if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
                raise AssertionError(f"network: {event} {args}")

        sys.addaudithook(forbid_network)
        import tensorflow_datasets as tfds
        import vit_jax.data.datasets

        builder = tfds.builder("digits", data_dir=sys.argv[1])
        builder.download_and_prepare()
        assert len(builder.as_data_source("train")) == 1437
        assert not {"tensorflow", "torch"} & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
