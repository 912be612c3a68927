# SPDX-License-Identifier: Apache-2.0
"""Several views of each image: the same on any hosts and threads, of one decoded image."""

import dataclasses
import itertools

import cv2
import numpy as np
import pytest

from vit_jax.data import pipeline
from vit_jax.data.ops import transforms
from vit_jax.data.pipeline import DatasetSpec, plan_buffers, train_batches
from vit_jax.utils.errors import UserError

LINE = "decode|inception_crop(16)|flip_lr"
VIEWS = (
    ("global", 1, f"{LINE}|color_jitter(0.4, hue=0.1)|solarize(128, 0.5)"),
    ("local", 3, "decode|random_crop(6)|gaussian_blur(probability=0.5)"),
)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("views"), np.random.default_rng(0)
    for name in "ab":
        (folder / "train" / name).mkdir(parents=True)
        for i in range(5):
            image = rng.integers(0, 256, (10 + i, 14, 3), np.uint8)
            cv2.imwrite(str(folder / "train" / name / f"{i}.jpg"), cv2.resize(image, (40, 32)))
    return DatasetSpec(f"folder:{folder}", "train", LINE, 8, None, "data", views=VIEWS)


def take(spec, count=3, **options):
    return list(itertools.islice(train_batches(spec, seed=1, **({"step": 0} | options)), count))


@pytest.fixture(scope="module")
def batches(spec):
    return take(dataclasses.replace(spec, num_threads=0))


def test_each_record_gives_all_views(batches):
    shapes = {k: (v.shape, v.dtype) for k, v in batches[0].items()}
    assert shapes == {
        "image": ((8, 16, 16, 3), np.uint8),
        "label": ((8,), np.int32),
        "global": ((8, 1, 16, 16, 3), np.uint8),
        "local": ((8, 3, 6, 6, 3), np.uint8),
    }
    first = batches[0]["local"]
    assert all(not np.array_equal(first[:, 0], first[:, i]) for i in (1, 2))


@pytest.fixture(scope="module")
def repeating(spec):
    views = (*VIEWS[:1], ("large", 2, LINE.replace("16", "32")), *VIEWS[1:])
    return dataclasses.replace(spec, views=views, same_draws=("large",), num_threads=0)


def test_views_repeat_the_draws_of_images_before(spec, repeating, batches):
    plain = (*VIEWS[:1], ("large", 2, LINE), *VIEWS[1:])
    same = take(dataclasses.replace(repeating, views=plain))
    for got, want in zip(same, batches, strict=True):
        for name, value in want.items():
            # Other views draw as if the repeating one were not there.
            np.testing.assert_array_equal(got[name], value, err_msg=name)
        np.testing.assert_array_equal(got["large"][:, 0], want["image"])
        assert not np.array_equal(got["large"][:, 1], want["image"])
    large = take(repeating, 1)[0]["large"]
    small = np.stack([[cv2.resize(x, (16, 16)) for x in row] for row in large])
    assert np.abs(small.astype(int) - same[0]["large"]).mean() < 12


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("large", "huge"), r"data\.same_draws=\('large', 'huge'\): 'huge' is none of data\.views"),
        (("local",), "3 images of data.views.local are to repeat the draws of the 2 before"),
    ],
)
def test_wrong_repetitions_are_refused(names, words, spec):
    views = VIEWS if names == ("local",) else (("large", 1, LINE),)
    with pytest.raises(UserError, match=words) as caught:
        dataclasses.replace(spec, views=views, same_draws=names).view_shapes()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "decode|inception_crop(32)",
        "decode|flip_lr|inception_crop(32)",
        "decode|inception_crop(32, 32)|flip_lr",
        "decode|inception_crop(32)|solarize(128, 0.5)|flip_lr",
    ],
)
def test_a_repetition_that_would_show_other_parts_is_refused(line, spec):
    views = (*VIEWS, ("large", 2, line))
    words = r"data.views.large='decode.* would show other parts of the image than data.preprocess="
    with pytest.raises(UserError, match=words):
        dataclasses.replace(spec, views=views, same_draws=("large",)).view_shapes()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_hosts_do_not_change_a_batch(threads, spec, batches):
    spec = dataclasses.replace(spec, num_threads=threads)
    parts = [take(spec, 2, step=1, shards=(i,), num_shards=4) for i in range(4)]
    for i, want in enumerate(batches[1:]):
        for name, value in want.items():
            got = np.concatenate([part[i][name] for part in parts])
            np.testing.assert_array_equal(got, value, err_msg=name)


def test_the_first_image_is_that_without_views(spec, batches):
    plain = take(dataclasses.replace(spec, views=(), num_threads=0))
    for got, want in zip(batches, plain, strict=True):
        for name in ("image", "label"):
            np.testing.assert_array_equal(got[name], want[name])


def test_a_record_is_decoded_once(spec, monkeypatch):
    calls = []

    def decode(image, *, orient=False):
        calls.append(isinstance(image, np.ndarray))
        return image if calls[-1] else cv2.imdecode(np.frombuffer(image, np.uint8), 1)

    monkeypatch.setattr(transforms, "decode_image", decode)
    monkeypatch.setattr(pipeline, "find_shapes", lambda line, *_, **__: {(16, 16, 3)})
    views = (("global", 2, LINE),)
    take(dataclasses.replace(spec, views=views, num_threads=0), 1)
    assert calls.count(False) == 8


def test_memory_of_views_counts(spec):
    few, many = (plan_buffers(dataclasses.replace(spec, views=v)) for v in ((), VIEWS))
    assert few.ahead == many.ahead
    pixels = 16 * 16 + 16 * 16 + 3 * 6 * 6
    assert many.nbytes * 16 * 16 == few.nbytes * pixels


@pytest.mark.parametrize(
    ("views", "words"),
    [
        ((("image", 1, LINE),), "a view is named 'image'"),
        ((("a b", 1, LINE),), "a view is named 'a b'"),
        ((("local", 1, LINE), ("local", 1, LINE)), "a view is named 'local'"),
        ((("tokens", 1, LINE),), r"data\.views: a view is named 'tokens'"),
        ((("local", 0, LINE),), r"data\.views\.local: 0 images of each record"),
        ((("local", 2, "decode|random_crop(700)"),), r"data\.views\.local: 'random_crop\(700\)'"),
        ((("local", 2, "decode"),), "in different sizes: add resize"),
        ((("local", 2, "resize(6)"),), "expected 'decode' first"),
        ((("local", 2, "decode(orient=True)|resize(6)"),), r"start as data\.preprocess does"),
        ((("local", 2, "decode|resise(6)"),), r"unknown operation 'resise'"),
    ],
)
def test_wrong_views_are_refused(views, words, spec):
    with pytest.raises(UserError, match=words) as caught:
        dataclasses.replace(spec, views=views).view_shapes()
    assert "\n" not in str(caught.value)


def test_views_and_tokens_of_a_record_do_not_change_each_other(captions_dir):
    lines = (("global", 1, "decode|random_shift(2)"), ("local", 2, "decode|random_crop(4)"))
    both = DatasetSpec(
        *("digits_captions", "train[:50]", "decode|random_shift(2)", 8, captions_dir, "data"),
        views=lines,
        tokenizer="bytes(length=64)",
    )
    batches = take(both)
    assert batches[0].keys() == {"image", "label", "global", "local", "tokens"}
    for change in ({"tokenizer": None}, {"views": ()}):
        for part, whole in zip(take(dataclasses.replace(both, **change)), batches, strict=True):
            for name, value in part.items():
                np.testing.assert_array_equal(value, whole[name], err_msg=name)
