# SPDX-License-Identifier: Apache-2.0
"""Images without labels: how they are found, prepared and loaded."""

import numpy as np
import pytest
from PIL import Image

from tests.trained import write_images
from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.ops.decode import ImageError
from vit_jax.inference.images import find_images, load_images, make_preparation
from vit_jax.utils.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """`00.png` and `01.png`, `deep/00.png`, and what is no image."""
    write_images(tmp_path, 2)
    write_images(tmp_path / "deep", 1)
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / ".hidden.png").write_text("none")
    return tmp_path


def test_arguments_are_files_folders_patterns_and_a_list(folder):
    first, second, deep = (str(folder / name) for name in ("00.png", "01.png", "deep/00.png"))
    assert find_images([str(folder)]) == [first, second, deep]
    assert find_images([second, first]) == [second, first]
    assert find_images([f"{folder}/**/*.png"]) == [first, second, deep]
    assert find_images(["-", first], lines=["a b.png\n", "\n", "c.png"]) == [
        "a b.png",
        "c.png",
        first,
    ]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("{folder}/none.png", "there is no such file or folder"),
        ("{folder}/*.jpg", "no images found in"),
        ("{folder}/empty", "no images found in"),
        ("-", "no images found in stdin"),
    ],
)
def test_an_argument_without_images_is_refused(folder, argument, message):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_images([str(folder), argument.format(folder=folder)])


def test_urls_of_no_store_are_refused_before_any_image_is_read():
    for url in ("https://x.org/a.png", "file:///a.png", "ftp://x/a.png"):
        for arguments, lines in (([url], []), (["-"], ["gs://b/a.png\n", f"{url}\n"])):
            with pytest.raises(UserError, match=f"image '{url}': expected a path, or a URL of gs"):
                find_images(arguments, lines=lines)


def test_files_that_are_left_out_are_counted_by_kind(folder, caplog):
    caplog.set_level("INFO", "vit_jax")
    (folder / "deep" / "1.HEIC").write_text("not read")
    find_images([str(folder)])
    (record,) = caplog.records
    kinds = {"1 .txt", "1 hidden", "1 .heic"}
    assert record.message.startswith(
        f"{folder}: ignored files that are no images of a known format: "
    )
    assert set(record.message.rpartition(": ")[2].split(", ")) == kinds


def test_brackets_in_the_name_of_a_folder_are_no_pattern(tmp_path):
    (path,) = write_images(tmp_path / "photos [1]*?", 1)
    for argument in (path, path.parent, f"{path.parent}/*.png", f"{tmp_path}/*/0[0].png"):
        assert find_images([str(argument)]) == [str(path)]


def test_batches_have_one_shape_and_miss_what_cannot_be_read(tmp_path):
    paths = [str(path) for path in write_images(tmp_path, 5)]
    (tmp_path / "01.png").write_bytes(b"none")
    corrupt = CorruptCounter()
    preparation = make_preparation("decode|resize(4)", None)
    batches = list(load_images(paths, preparation, batch_size=3, corrupt=corrupt, num_threads=2))
    assert [batch.images.shape for batch in batches] == [(3, 4, 4, 3)] * 2
    assert [b.paths for b in batches] == [[paths[0], None, paths[2]], [*paths[3:], None]]
    np.testing.assert_array_equal(batches[1].images[0], preparation(paths[3]))
    assert not batches[0].images[1].any()
    assert (corrupt.counts.seen, corrupt.counts.corrupt) == (5, 1)


def test_an_image_that_an_operation_refuses_is_left_out(tmp_path):
    paths = [str(path) for path in write_images(tmp_path, 2)]
    Image.new("RGB", (30, 40), "red").save(paths[1])
    corrupt = CorruptCounter()
    preparation = make_preparation("decode|central_crop(25)", None)
    (batch,) = load_images(paths, preparation, batch_size=2, corrupt=corrupt, num_threads=0)
    assert batch.paths == [None, paths[1]]
    assert corrupt.counts.corrupt == 1


def test_only_a_few_batches_are_loaded_ahead(tmp_path):
    (path,) = write_images(tmp_path, 1)
    corrupt = CorruptCounter()
    batches = load_images(
        [str(path)] * 1000,
        make_preparation("decode", (8, 8)),
        batch_size=2,
        corrupt=corrupt,
        num_threads=1,
    )
    next(batches)
    assert corrupt.counts.seen < 20
    batches.close()


def test_random_operations_are_known_as_such():
    assert make_preparation("decode|inception_crop(8)", None).random
    assert not make_preparation("decode|resize(8)", None).random


def test_pillow_images_of_sixteen_bits_keep_the_upper_eight():
    prepare = make_preparation("decode", (4, 4))
    grey = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    found = prepare(Image.fromarray(grey))
    np.testing.assert_array_equal(found, (grey >> 8).astype(np.uint8)[..., None].repeat(3, 2))
    with pytest.raises(ImageError, match="floats"):
        prepare(Image.fromarray(grey.astype(np.float32)))
