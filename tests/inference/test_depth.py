# SPDX-License-Identifier: Apache-2.0
"""Depths that a model predicts, and pixels in windows: from Python, and as files."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.trained import write_depth, write_images
from vit_jax import predict
from vit_jax.data.ops.decode import decode_image
from vit_jax.inference.images import make_preparation
from vit_jax.inference.masks import resize_depth, resizes_only
from vit_jax.inference.model import load_model
from vit_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def depth_run(tmp_path_factory, data_dir):
    return write_depth(tmp_path_factory.mktemp("runs") / "depth", data_dir)


@pytest.fixture(scope="module")
def model(depth_run):
    return load_model(depth_run, devices=jax.devices()[:1])


def test_a_depth_has_the_size_of_its_image(model, tmp_path):
    (path,) = write_images(tmp_path, 1, size=20)
    found = model(str(path))
    grid = np.asarray(model.start_pixels(model.preprocess(path)[None]))[0]
    # As in evaluation, first to the image that the model sees.
    expected = grid[..., 0]
    for size in ((16, 16), (20, 20)):
        expected = jax.image.resize(expected, size, "bilinear", antialias=False)
    np.testing.assert_allclose(found.depth, expected, rtol=1e-5)
    assert found.depth.dtype == np.float32
    assert found.depth.std() > 0
    assert f"{found.depth.min():.2f} to {found.depth.max():.2f} m" in repr(found)
    found.save(tmp_path / "depth.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "depth.npy"), np.asarray(found))
    found.save(tmp_path / "depth.png")
    with Image.open(tmp_path / "depth.png") as saved:
        np.testing.assert_allclose(np.asarray(saved) / 1000, found.depth, atol=5.1e-4)
    with pytest.raises(UserError, match=r"depth.jpg: expected a name that ends in .png or .npy"):
        found.save(tmp_path / "depth.jpg")
    colors = np.asarray(found.picture()).astype(int).sum(-1)
    assert colors[found.depth == found.depth.min()].min() == colors.max()
    np.testing.assert_allclose(
        model(model.preprocess(path)[None])[0], resize_depth(grid, (16, 16)), rtol=1e-6
    )


def test_the_command_writes_depths_that_are_data_again(depth_run, tmp_path, capsys):
    write_images(tmp_path / "images", 2, size=12)
    output, folder = tmp_path / "depths.jsonl", tmp_path / "depth"
    arguments = [f"--workdir={depth_run}", f"--output={output}", f"--depth={folder}"]
    assert predict.main([*arguments, str(tmp_path / "images")]) == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["00.png", "00_depth.jpg", "01.png", "01_depth.jpg", "depth_scale.txt"]
    assert "2 depth images, as PNG, and as many pictures" in "".join(capsys.readouterr())
    rows = [json.loads(line)["predictions"] for line in output.read_text().splitlines()]
    assert [one["class"] for one in rows[0]] == ["nearest", "mean", "farthest"]
    with Image.open(folder / "00.png") as saved:
        metres = np.asarray(saved) / float((folder / "depth_scale.txt").read_text())
    found = [one["metres"] for one in rows[0]]
    np.testing.assert_allclose(found, [metres.min(), metres.mean(), metres.max()], atol=6e-4)


def test_tables_are_in_metres_whatever_top_k(depth_run, tmp_path, capsys):
    write_images(tmp_path / "images", 1, size=12)
    given = [f"--workdir={depth_run}", "--top_k=1", str(tmp_path / "images")]
    assert predict.main([*given, f"--output={tmp_path / 'depths.csv'}"]) == 0
    header, row = (tmp_path / "depths.csv").read_text().splitlines()
    assert header.count("metres") == 3
    assert len(row.split(",")) == len(header.split(",")) == 10
    capsys.readouterr()
    assert predict.main(given) == 0
    nearest = float(row.split(",")[3])
    assert f"nearest {nearest:6.2f} m" in capsys.readouterr().out


def test_windows_of_the_size_of_the_image_change_nothing_but_the_grid(depth_run, model):
    options = {"devices": jax.devices()[:1], "preprocess": "decode|resize(16)"}
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    whole = load_model(depth_run, window=16, **options)
    np.testing.assert_allclose(whole(images), model(images), rtol=1e-5)
    larger = load_model(
        depth_run, window=16, stride=8, **(options | {"preprocess": "decode|resize(24)"})
    )
    image = np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), np.uint8)
    outputs = larger.pixel_outputs(image)
    assert outputs.shape == (1, 24, 24, 1)
    # The corner is in one window alone, whose model is that of images of its size.
    corner = model(image[:, :16, :16])[0]
    np.testing.assert_allclose(outputs[0, :8, :8, 0], corner[:8, :8], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0: expected the side of a window in pixels"),
        ({"stride": 4}, "window=None: expected the side of a window"),
        ({"window": 8, "stride": 9}, "stride=9: expected 1 to window=8 pixels"),
        (
            {"window": 10},
            r"window=10: expected a multiple of the \d+ pixels of a patch, up to .*, such as \d+",
        ),
    ],
)
def test_windows_that_do_not_fit_are_refused_in_one_line(depth_run, options, message):
    with pytest.raises(UserError, match=message):
        load_model(depth_run, **options)


def test_results_and_models_that_do_not_fit_are_refused_in_one_line(depth_run, segment_run, model):
    with pytest.raises(UserError, match="finds the depth of each pixel, and has no classes of"):
        model.check_classifies()
    for run, option in ((depth_run, "masks"), (segment_run, "depth")):
        with pytest.raises(UserError, match=f"--{option}=new: .* does not find the"):
            predict.main([f"--workdir={run}", f"--{option}=new", __file__])


def test_results_are_turned_as_the_model_turns_its_images(tmp_path):
    path = tmp_path / "turned.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(path, exif=exif)
    line = make_preparation("decode(orient=True)|resize(16)", None, given=None)
    assert resizes_only(line)
    assert decode_image(path.read_bytes(), orient=True).shape == (20, 10, 3)
