# SPDX-License-Identifier: Apache-2.0
"""The command that shows what preprocessing does."""

import cv2
import numpy as np
import pytest

from tools import show_preprocess
from vit_jax.data.ops.transforms import apply
from vit_jax.data.preprocess import parse_preprocess


def read(path):
    return cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)


def contains(sheet, image):
    """Whether the sheet has these pixels somewhere."""
    windows = np.lib.stride_tricks.sliding_window_view(sheet, image.shape)[:, :, 0]
    return (windows == image).all((-3, -2, -1)).any()


@pytest.fixture
def images(tmp_path):
    """A folder with images of two sizes, one in a folder of its own; path and arrays."""
    rng = np.random.default_rng(0)
    arrays = {"a.png": rng.integers(256, size=(40, 30, 3), dtype=np.uint8)}
    arrays["class/b.PNG"] = rng.integers(256, size=(20, 50, 3), dtype=np.uint8)
    (tmp_path / "images" / "class").mkdir(parents=True)
    for name, array in arrays.items():
        encoded = cv2.imencode(".png", array[..., ::-1])[1].tobytes()
        (tmp_path / "images" / name).write_bytes(encoded)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images", arrays


def test_the_sheet_has_each_image_as_each_line_makes_it(images, tmp_path, capsys):
    folder, arrays = images
    lines = ["decode|resize(16)", "decode|resize_small(16)|central_crop(12)"]
    out = tmp_path / "out"
    arguments = ["--images", str(folder), "--out", str(out), "--preprocess", *lines]
    assert show_preprocess.main(arguments) == 0
    sheet = read(out / "sheet.png")
    for array in arrays.values():
        for line in ("resize_long(16, 'area')", *(x.partition("|")[2] for x in lines)):
            ops = parse_preprocess(line, key="line")
            assert contains(sheet, apply(ops, {"image": array}, np.random.default_rng(0))["image"])
    assert capsys.readouterr().out == f"wrote {out}/sheet.png\nwrote {out}/index.html\n"


def test_lines_that_draw_at_random_are_shown_several_times(images):
    folder, _ = images
    found = show_preprocess.list_images(folder, 1)
    column = show_preprocess.run_line("decode|inception_crop(8)", found, draws=3, seed=0)
    assert [len(row) for row in column.results] == [3]
    assert len({image.tobytes() for image in column.results[0]}) == 3
    again = show_preprocess.run_line("decode|inception_crop(8)", found, draws=3, seed=0)
    np.testing.assert_array_equal(column.results[0], again.results[0])


def test_the_page_names_images_and_lines(images, tmp_path):
    folder, _ = images
    line = "decode|resize(16, method='area')"
    arguments = ["--images", str(folder), "--out", str(tmp_path), "--preprocess", line]
    assert show_preprocess.main(arguments) == 0
    page = (tmp_path / "index.html").read_text()
    assert '<img src="sheet.png"' in page
    assert "<code>decode|resize(16, method=&#x27;area&#x27;)</code>, 1 of each image" in page
    assert "<td>class/b.PNG</td><td>20x50</td>" in page


def test_without_a_folder_images_are_drawn(tmp_path):
    assert show_preprocess.main(["--out", str(tmp_path), "--draws", "1"]) == 0
    assert (tmp_path / "sheet.png").stat().st_size < 100_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", "nowhere"], "--images=nowhere: expected a folder with .jpg"),
        (["--preprocess", "decode|resise(8)"], "--preprocess: unknown operation 'resise'"),
        (["--preprocess", "resize(8)"], "--preprocess: 'resize(8)': expected 'decode' first"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, words, tmp_path, capsys):
    assert show_preprocess.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith(words)
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unreadable_image_is_named(tmp_path, capsys):
    (tmp_path / "bad.jpg").write_text("no image")
    assert show_preprocess.main(["--images", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().out == "bad.jpg: 8 bytes that are not a readable image\n"
