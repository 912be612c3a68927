# SPDX-License-Identifier: Apache-2.0
"""The preprocessing line and every operation in it, against references of their own."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest
from PIL import Image

from vit_jax.data.ops import policies as augment_ops
from vit_jax.data.ops import transforms as image_ops
from vit_jax.data.ops.decode import ImageError, decode_image
from vit_jax.data.ops.geometry import Method, resize_image
from vit_jax.data.ops.transforms import apply
from vit_jax.data.preprocess import OPS, parse_preprocess, without_random
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import trust_parts


def parse(text):
    return parse_preprocess(text, key="data.preprocess")


def run(text, image, seed=0):
    """The image that a line makes of an array or of encoded bytes."""
    features = {"image": image, "label": 3}
    out = apply(parse(text), features, np.random.default_rng(seed))
    assert out["label"] == 3
    assert features["image"] is image  # the input is left as it was
    return out["image"]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image, extension=".png"):
    """OpenCV takes channels as BGR(A)."""
    return cv2.imencode(extension, image)[1].tobytes()


# The line


def test_a_line_is_read_into_operations_in_order():
    assert parse("decode|inception_crop(224)|flip_lr") == (
        image_ops.Decode(),
        image_ops.InceptionCrop(224),
        image_ops.FlipLr(),
    )


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("decode|resize(8)|flip_lr", "decode|resize(8)"),
        ("decode | inception_crop(8, 20, method='area')|color_jitter(0.4)|luma", None),
        ("decode|pad(4)|random_crop(8)", "decode|pad(4)|central_crop(8, 8)"),
        (
            "decode|random_scale(8, method='area')|random_crop(8, 6)",
            "decode|resize_small(8, 'area')|central_crop(8, 6)",
        ),
        ("decode|inception_patches(4, 9)", "decode|patches(4, 9, 'bilinear_antialias')"),
        ("decode(orient=True)|resize(8)", "decode(orient=True)|resize(8)"),
    ],
)
def test_a_line_without_its_random_operations_gives_images_of_the_same_size(text, want):
    got = without_random(text, key="data.preprocess")
    assert got == (want or "decode|resize(8, method='area')|luma")
    assert not any(isinstance(op, image_ops.Random) for op in parse(got))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("decode()", image_ops.Decode()),
        (" decode ", image_ops.Decode()),
        ("resize(8, 9)", image_ops.Resize(8, 9)),
        ("resize(8, width=9)", image_ops.Resize(8, 9)),
        ("resize(8, None)", image_ops.Resize(8)),
        ("inception_crop(8, 5.5, area_max=90)", image_ops.InceptionCrop(8, 5.5, 90)),
        ("random_shift(pixels=2)", image_ops.RandomShift(2)),
        ("resize(8, method='area')", image_ops.Resize(8, None, "area")),
        ("pad(2, 0)", image_ops.Pad(2, 0)),
        ("keep('image', 'label')", image_ops.Keep("image", "label")),
        ("randaug(2, 0)", augment_ops.RandAug(2, 0)),
        ("color_jitter(0.3, 0)", augment_ops.ColorJitter(0.3, 0)),
    ],
)
def test_arguments_are_given_as_in_python(text, want):
    assert parse(text) == (want,)


def test_the_documentation_has_all_operations_and_lines_that_can_be_read():
    docs = Path(__file__).parents[2] / "docs"
    text = "".join((docs / f"{name}.md").read_text() for name in ("augmentation", "preprocessing"))
    lines = re.findall(r"decode\|[^`\"\n]+", text.replace("\\|", "|"))
    assert len(lines) > 15
    for line in lines:
        assert parse(line)
    assert {name for name in OPS if re.search(rf"^\| `{name}[`(]", text, re.MULTILINE)} == set(OPS)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("", ["''", "expected NAME or NAME("]),
        ("8", ["'8'", "expected NAME or NAME("]),
        ("resize(8", ["'resize(8'", "expected NAME or NAME("]),
        ("decode,resize(8)", ["'decode,resize(8)'", "expected NAME or NAME("]),
        ("os.remove(8)", ["'os.remove(8)'", "expected NAME or NAME("]),
        ("resize(8)(9)", ["'resize(8)(9)'", "expected NAME or NAME("]),
        ("resise(8)", ["'resise'", "did you mean 'resize'?"]),
        ("Decode", ["'Decode'", "did you mean 'decode'?"]),
        ("eval('1')", ["unknown operation 'eval'", "there is: auto_augment, central_crop,"]),
        ("resize", ["'resize'", "expected resize(height, width=None, method='bilinear')"]),
        ("resize()", ["'resize()'", "expected resize(height, width"]),
        ("resize(1, 2, 'area', 3)", ["'area', 3)\"", "expected resize(height, width"]),
        ("resize(8, depth=3)", ["'resize(8, depth=3)'", "expected resize(height, width"]),
        ("resize(8, height=8)", ["'resize(8, height=8)'", "expected resize(height, width"]),
        ("resize(height=8, height=9)", ["height=9)'", "expected resize(height, width"]),
        ("resize(4 * 2)", ["'resize(4 * 2)'", "expected resize(height, width"]),
        ("resize(*[8])", ["'resize(*[8])'", "expected resize(height, width"]),
        ("resize(**{'height': 8})", ["{'height': 8}", "expected resize(height, width"]),
        ("resize(size)", ["'resize(size)'", "expected resize(height, width"]),
        ("resize('8')", ["resize: height='8' is a str; expected int"]),
        ("resize(8.0)", ["resize: height=8.0 is a float; expected int"]),
        ("resize(True)", ["resize: height=True is a bool; expected int"]),
        ("resize(8, (8,))", ["resize: width=(8,) is a tuple; expected int or None"]),
        ("resize(-8)", ["'resize(-8)'", "height=-8"]),
        ("resize(0)", ["'resize(0)'", "height=0"]),
        ("resize(8, 0)", ["'resize(8, 0)'", "width=0"]),
        ("resize_small(0)", ["'resize_small(0)'", "size=0"]),
        ("central_crop(0)", ["'central_crop(0)'", "height=0"]),
        ("inception_crop(0)", ["'inception_crop(0)'", "size=0"]),
        ("inception_crop(8, -5)", ["inception_crop", "area_min=-5"]),
        ("inception_crop(8, 60, 20)", ["inception_crop", "area_min=60", "area_max=20"]),
        ("inception_crop(8, 5, 101)", ["inception_crop", "area_max=101"]),
        ("inception_crop(8, 5, 50, 2, 1)", ["inception_crop", "aspect_min=2, aspect_max=1"]),
        ("resize(8, method='cubic')", ["resize: method='cubic'", "or 'bicubic' or 'area'"]),
        ("pad(0)", ["'pad(0)'", "pixels=0: expected more than 0"]),
        ("inception_crop(8, aspect_max=1e999)", ["aspect_max=inf: expected a finite number"]),
        ("pad(1, -1)", ["'pad(1, -1)'", "value=-1: expected 0 or more"]),
        ("pad_to(8, value=256)", ["value=256: expected 0 to 255"]),
        ("keep()", ["'keep()'", "expected 'image' among the names"]),
        ("keep('image', 3)", ["keep: names=('image', 3) is a tuple; expected tuple[str, ...]"]),
        ("keep(names='image')", ["expected keep(*names)"]),
        ("randaug(2)", ["'randaug(2)'", "expected randaug(num_layers, magnitude, variant="]),
        ("randaug(2, -1)", ["magnitude=-1: expected 0 or more"]),
        ("auto_augment('v1')", ["auto_augment: policy='v1'", "expected 'original' or 'v0'"]),
        ("grayscale(1.5)", ["'grayscale(1.5)'", "probability=1.5: expected at most 1"]),
        ("gaussian_blur(2, 1)", ["sigma_min=2, sigma_max=1: expected"]),
        ("normalize((0.5,), (0.5,))", ["objective.pixel_mean and objective.pixel_std"]),
        ("value_range(-1, 1)", ["'value_range(-1, 1)' is not an operation here", "pixel_mean"]),
        ("onehot(1000)", ["'onehot(1000)' is not an operation here", "by the objective"]),
        ("random_erasing(0.25)", ["set objective.random_erasing"]),
        ("cutmix", ["set objective.cutmix"]),
    ],
)
def test_what_is_wrong_in_a_line_is_named(part, words):
    with pytest.raises(UserError) as error:
        parse(f"decode|{part}|flip_lr")
    assert str(error.value).startswith("data.preprocess: ")
    assert "flip_lr" not in str(error.value).partition("there is:")[0]
    assert "->" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_nothing_in_a_line_is_evaluated(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "getcwd", lambda: calls.append("called") or "/")
    for part in ("resize(__import__('os').getcwd())", "__import__('os').getcwd()"):
        with pytest.raises(UserError, match="getcwd"):
            parse(f"decode|{part}")
    assert not calls


# decode


def test_colour_png_is_decoded_exactly():
    image = noise(5, 7, 3)
    decoded = run("decode", encode(image))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, image[..., ::-1])  # RGB


def test_grey_png_gets_three_equal_channels():
    image = noise(5, 7)
    np.testing.assert_array_equal(decode_image(encode(image)), image[..., None].repeat(3, -1))


def test_transparency_is_dropped():
    image = noise(5, 7, 4)
    np.testing.assert_array_equal(decode_image(encode(image)), image[..., 2::-1])


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)], ids=["grey", "colour"])
def test_sixteen_bits_become_the_upper_eight(shape):
    image = np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)
    decoded = decode_image(encode(image))
    assert decoded.dtype == np.uint8
    upper = (image >> 8).astype(np.uint8)
    want = upper[..., ::-1] if len(shape) == 3 else upper[..., None].repeat(3, -1)
    np.testing.assert_array_equal(decoded, want)


def test_jpeg_of_one_colour_decodes_to_it():
    red = np.zeros((16, 24, 3), np.uint8)
    red[..., 2] = 200
    decoded = decode_image(encode(red, ".jpg"))
    assert decoded.shape == (16, 24, 3)
    # Colours are stored as rounded luma and chroma: each channel may be off by a few levels.
    assert np.abs(decoded.astype(int) - [200, 0, 0]).max() <= 3


def test_smooth_jpeg_is_close_to_what_was_encoded():
    y, x = np.mgrid[:64, :96]
    image = np.stack([y * 3, x * 2, 255 - y - x], -1).astype(np.uint8)
    jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    assert np.abs(decode_image(jpeg).astype(int) - image).mean() < 1


@pytest.mark.parametrize(
    "broken",
    [b"", b"no image", encode(noise(50, 50, 3))[:400], encode(noise(50, 50, 3), ".jpg")[:400]],
    ids=["nothing", "text", "half a png", "half a jpeg"],
)
def test_broken_bytes_are_a_value_error(broken):
    with pytest.raises(ValueError, match=f"{len(broken)} bytes that are not a readable image"):
        decode_image(broken)


# Sizes


def bilinear(image, height, width):
    """Half-pixel centres, no antialiasing, edges repeated; in float64."""
    for axis, size in ((0, height), (1, width)):
        old = image.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        weight = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
        below, above = image.take(low, axis), image.take(np.minimum(low + 1, old - 1), axis)
        image = below * (1 - weight) + above * weight
    return image


SIZES = [
    ((8, 8), (16, 16)),
    ((8, 8), (11, 5)),
    ((5, 7), (64, 3)),
    ((1, 1), (4, 4)),
    ((100, 60), (10, 6)),
    ((300, 200), (224, 224)),
]


@pytest.mark.parametrize(("old", "new"), SIZES, ids=str)
def test_resize_is_bilinear_with_half_pixel_centres_and_no_antialiasing(old, new):
    image = noise(*old, 3)
    resized = run(f"resize{new}", image)
    assert resized.dtype == np.uint8
    assert resized.shape == (*new, 3)
    # OpenCV rounds the weights of uint8 images: the result is next to the exact one.
    assert np.abs(resized - bilinear(image.astype(np.float64), *new)).max() < 1
    exact = resize_image(image.astype(np.float32), *new)
    np.testing.assert_allclose(exact, bilinear(image.astype(np.float64), *new), atol=1e-3)


def test_resize_with_one_number_gives_a_square():
    assert run("resize(12)", noise(8, 20, 3)).shape == (12, 12, 3)


def test_resize_to_the_same_size_changes_nothing():
    image = noise(8, 20, 3)
    np.testing.assert_array_equal(run("resize(8, 20)", image), image)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((40, 60), (20, 30)),
        ((60, 40), (30, 20)),
        ((10, 10), (20, 20)),
        ((7, 9), (20, 26)),  # 25.7
        ((3, 400), (20, 2667)),
    ],
)
def test_resize_small_keeps_the_aspect(old, new):
    image = noise(*old, 3)
    resized = run("resize_small(20)", image)
    assert resized.shape == (*new, 3)
    np.testing.assert_array_equal(resized, run(f"resize{new}", image))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((7, 9), (20, 25)),  # 25.7
        ((9, 7), (25, 20)),
        ((40, 60), (20, 30)),
        ((3, 400), (20, 2666)),
        ((49, 49), (20, 20)),
    ],
)
def test_resize_small_rounds_as_torchvision_does_on_request(old, new):
    image = noise(*old, 3)
    resized = run("resize_small(20, rounding='down')", image)
    np.testing.assert_array_equal(resized, run(f"resize{new}", image))


@pytest.mark.parametrize(
    ("shape", "top", "left"),
    [((10, 8), 3, 2), ((5, 7), 0, 2), ((9, 11), 2, 4), ((4, 4), 0, 0)],  # 0.5, 1.5, 2.5, 3.5
)
def test_central_crop_rounds_as_torchvision_does_on_request(shape, top, left):
    image = noise(*shape, 3)
    cropped = run("central_crop(4, rounding='nearest')", image)
    np.testing.assert_array_equal(cropped, image[top : top + 4, left : left + 4])


@pytest.mark.parametrize(
    ("shape", "top", "left"), [((10, 8), 3, 2), ((9, 4), 2, 0), ((4, 5), 0, 0)]
)
def test_central_crop_takes_the_middle(shape, top, left):
    image = noise(*shape, 3)
    np.testing.assert_array_equal(
        run("central_crop(4)", image), image[top : top + 4, left : left + 4]
    )


def test_central_crop_takes_a_rectangle_too():
    image = noise(10, 9, 3)
    np.testing.assert_array_equal(run("central_crop(4, 7)", image), image[3:7, 1:8])


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
@pytest.mark.parametrize("name", ["central_crop", "random_crop"])
def test_a_crop_of_a_smaller_image_is_refused(name, shape):
    with pytest.raises(ImageError, match=rf"{name}\(4\) of a {shape[0]}x{shape[1]} image"):
        run(f"{name}(4)", noise(*shape, 3))
    with pytest.raises(ImageError, match=rf"{name}\(4, 9\) of a {shape[0]}x{shape[1]} image"):
        run(f"{name}(4, 9)", noise(*shape, 3))


@pytest.mark.parametrize(
    ("old", "new"), [((40, 60), (13, 20)), ((60, 40), (20, 13)), ((3, 400), (1, 20))]
)
def test_resize_long_keeps_the_aspect(old, new):
    image = noise(*old, 3)
    np.testing.assert_array_equal(run("resize_long(20)", image), run(f"resize{new}", image))


@pytest.mark.parametrize(
    "line",
    [
        "resize(20, method={})",
        "resize_small(12, {})",
        "resize_long(12, method={})",
        "inception_crop(12, method={})",
    ],
)
def test_each_resizing_takes_a_method(line):
    image = noise(40, 50, 3)
    methods = get_args(Method)
    results = {run(line.format(repr(method)), image).tobytes() for method in methods}
    assert len(results) == len(methods)


@pytest.mark.parametrize(
    ("line", "mode", "value"),
    [
        ("pad(2)", "constant", {"constant_values": 0}),
        ("pad(2, 7)", "constant", {"constant_values": 7}),
        ("pad(2, mode='edge')", "edge", {}),
        ("pad(2, mode='reflect')", "reflect", {}),
    ],
)
def test_pad_puts_pixels_on_each_side(line, mode, value):
    image = noise(4, 5, 3)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode, **value)
    np.testing.assert_array_equal(run(line, image), padded)


def test_pad_to_fills_up_around_the_image():
    image = noise(4, 5, 3)
    padded = np.pad(image, ((1, 2), (0, 0), (0, 0)), constant_values=9)
    np.testing.assert_array_equal(run("pad_to(7, 5, value=9)", image), padded)
    assert run("pad_to(6)", image).shape == (6, 6, 3)
    np.testing.assert_array_equal(run("pad_to(3)", image), image)


def test_keep_drops_other_features_but_the_mask():
    features = {"image": noise(2, 2, 3), "label": 1, "name": "x", "mask": 1.0}
    (op,) = parse("keep('image', 'label')")
    assert op(features).keys() == {"image", "label", "mask"}
    with pytest.raises(UserError, match=r"keep\('image', 'class'\): expected some of image, label"):
        parse("keep('image', 'class')")[0](features)


# Random operations


def crops(monkeypatch, text, image, draws):
    """Top, left, height and width of each crop, found from pixels that know where they are."""
    seen = []

    def resize(crop, height, width, method):
        top, left = crop[0, 0, :2]
        seen.append((int(top), int(left), *crop.shape[:2]))
        return resize_image(crop, height, width, method)

    with monkeypatch.context() as patch:
        patch.setattr(image_ops, "resize_image", resize)
        (op,) = parse(text)
        rng = np.random.default_rng(0)
        for _ in range(draws):
            assert op({"image": image}, rng)["image"].shape == (op.size, op.size, 3)
    return np.array(seen)


def places(height, width):
    """An image whose pixels hold their row and column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)


@pytest.mark.parametrize("shape", [(200, 250), (250, 120)], ids=str)
def test_inception_crop_draws_areas_and_aspects_from_their_ranges(shape, monkeypatch):
    top, left, height, width = crops(monkeypatch, "inception_crop(4)", places(*shape), 4000).T
    assert (top + height <= shape[0]).all()
    assert (left + width <= shape[1]).all()
    share = height * width / (shape[0] * shape[1])
    aspect = width / height
    part = share < 1  # the whole image is the fallback
    assert part.mean() > 0.95
    # Rounding to whole pixels moves the limits by one pixel in the smallest crop's side.
    least = np.sqrt(0.05 * shape[0] * shape[1] * 3 / 4)
    assert 0.05 * (1 - 2 / least) < share.min() < 0.06
    assert share.max() > 0.85
    assert 3 / 4 * (1 - 2 / least) < aspect[part].min() < 0.77
    assert 1.3 < aspect[part].max() < 4 / 3 * (1 + 2 / least)


def test_inception_crop_draws_areas_and_places_evenly(monkeypatch):
    top, left, height, width = crops(
        monkeypatch, "inception_crop(4, 10, 40)", places(200, 200), 4000
    ).T
    share = height * width / 200**2
    assert 0.095 < share.min() < 0.105
    assert 0.39 < share.max() < 0.405
    # Crops of at most 40 % always fit, so nothing is drawn again and the draws stay uniform.
    assert np.histogram(share, bins=4, range=(0.1, 0.4))[0] == pytest.approx([1000] * 4, rel=0.1)
    for place, side in ((top, height), (left, width)):
        where = place / (200 - side)
        assert np.histogram(where, bins=4, range=(0, 1))[0] == pytest.approx([1000] * 4, rel=0.1)
        assert where.min() == 0
        assert where.max() == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 2), (3, 5)], ids=str)
def test_inception_crop_of_tiny_images_stays_inside(shape, monkeypatch):
    top, left, height, width = crops(monkeypatch, "inception_crop(4)", places(*shape), 300).T
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= shape[0]).all()
    assert (left + width <= shape[1]).all()
    assert len(set(zip(top, left, height, width, strict=True))) > (shape != (1, 1))


def test_inception_crop_draws_aspects_from_other_ranges(monkeypatch):
    line = "inception_crop(4, 10, 20, aspect_min=2, aspect_max=3)"
    _, _, height, width = crops(monkeypatch, line, places(240, 240), 500).T
    aspect = width / height
    assert 1.93 < aspect.min() < 2.1
    assert 2.9 < aspect.max() < 3.1


def test_inception_crop_takes_the_whole_image_where_no_part_fits(monkeypatch):
    # All of the area with an aspect near one does not fit into a strip.
    found = crops(monkeypatch, "inception_crop(4, 100, 100)", places(20, 200), 50)
    assert set(map(tuple, found)) == {(0, 0, 20, 200)}


def test_inception_crop_resizes_the_part(monkeypatch):
    image = noise(40, 40, 3)
    image[..., :2] = places(40, 40)[..., :2]
    ((top, left, height, width),) = crops(monkeypatch, "inception_crop(16)", image, 1)
    part = image[top : top + height, left : left + width]
    np.testing.assert_array_equal(run("inception_crop(16)", image), run("resize(16)", part))


def test_random_crop_takes_every_place_equally_often():
    image = noise(5, 6, 3)
    wanted = {image[y : y + 3, x : x + 4].tobytes(): (y, x) for y in range(3) for x in range(3)}
    (op,) = parse("random_crop(3, 4)")
    rng = np.random.default_rng(0)
    found = Counter(wanted[op({"image": image}, rng)["image"].tobytes()] for _ in range(1800))
    assert len(found) == 9
    assert 150 < min(found.values()) <= max(found.values()) < 250


def test_flip_lr_mirrors_half_of_the_images():
    image = noise(4, 6, 3)
    (op,) = parse("flip_lr")
    rng = np.random.default_rng(0)
    results = Counter(op({"image": image}, rng)["image"].tobytes() for _ in range(1000))
    mirrored = np.stack([image[:, 5 - column] for column in range(6)], axis=1)
    assert results.keys() == {image.tobytes(), mirrored.tobytes()}
    assert 450 < results[mirrored.tobytes()] < 550


def test_random_shift_makes_every_shift_equally_often_and_repeats_the_edge():
    height, width, pixels = 5, 7, 2
    image = noise(height, width, 3)
    wanted = {}
    for down in range(-pixels, pixels + 1):
        for right in range(-pixels, pixels + 1):
            rows = np.clip(np.arange(height) + down, 0, height - 1)
            columns = np.clip(np.arange(width) + right, 0, width - 1)
            wanted[image[rows][:, columns].tobytes()] = down, right
    assert len(wanted) == (2 * pixels + 1) ** 2
    (op,) = parse(f"random_shift({pixels})")
    rng = np.random.default_rng(0)
    found = Counter(wanted[op({"image": image}, rng)["image"].tobytes()] for _ in range(5000))
    assert len(found) == len(wanted)
    assert 140 < min(found.values()) <= max(found.values()) < 260


@pytest.mark.parametrize(
    "text",
    [
        "inception_crop(4)",
        "flip_lr",
        "random_shift(2)",
        "random_crop(5)",
        "randaug(2, 10)",
        "rand_augment",
        "auto_augment",
        "three_augment",
        "color_jitter(0.3)",
        "gaussian_blur",
        "grayscale(0.5)",
        "solarize(99, probability=0.5)",
    ],
)
def test_random_choices_come_from_the_generator_alone(text):
    image = noise(8, 8, 3)
    draws = [[run(text, image, seed).tobytes() for seed in range(8)] for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 1


def test_luma_is_the_only_channel():
    image = noise(6, 7, 3)
    want = np.array(Image.fromarray(image).convert("L"))[..., None]
    np.testing.assert_array_equal(run("luma", image), want)
    grey = np.repeat(image[..., :1], 3, axis=2)
    np.testing.assert_array_equal(run("decode|luma", encode(grey)), image[..., :1])


def test_a_line_is_run_from_left_to_right():
    image = noise(10, 10, 3)
    crop_last = run("decode|resize(6)|central_crop(4)", encode(image[..., ::-1]))
    np.testing.assert_array_equal(crop_last, run("resize(6)", image)[1:5, 1:5])


def test_a_function_of_features_does_not_make_an_operation(tmp_path, monkeypatch):
    (tmp_path / "turning_ops.py").write_text("def turn(features):\n    return features\n")
    monkeypatch.syspath_prepend(tmp_path)
    trust_parts("turning_ops")
    with pytest.raises(UserError, match=r"'turning_ops:turn': .* which returns the operation"):
        parse("decode|turning_ops:turn")
