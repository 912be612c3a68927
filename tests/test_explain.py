# SPDX-License-Identifier: Apache-2.0
"""The command that draws what a model sees."""

import numpy as np
import pytest
from PIL import Image

from tests.html_pages import assert_stands_alone
from tests.trained import MIXER, write_images, write_model
from vit_jax.explain import FIGURES, main
from vit_jax.inference import draw, figures
from vit_jax.inference.figures import draw_positions, find_impossible
from vit_jax.inference.model import load_model
from vit_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `vit.npz`, `gap.npz` and `mixer.npz`, and two images."""
    folder = tmp_path_factory.mktemp("explain")
    write_model(folder / "vit.npz", num_registers=1)
    write_model(folder / "gap.npz", classifier="gap", position_embedding="sincos2d")
    write_model(folder / "mixer.npz", MIXER, classes=0)
    write_images(folder / "images", 2)
    return folder


@pytest.fixture
def call(place, said):
    """Runs the command on the images with a model, and gives what it said."""

    def run(model, *arguments):
        main([f"--checkpoint={place / model}", *arguments, str(place / "images")])
        return said

    return run


def test_every_figure_is_a_file_and_on_the_page_and_named(call, tmp_path):
    output = tmp_path / "seen"
    said = call("vit.npz", f"--output={output}", "--verbose")
    of_image = ("attention", "rollout", "similarity", "pca")
    names = {f"0{i + 1}_0{i}_{name}.png" for i in (0, 1) for name in of_image}
    names |= {f"model_{name}.png" for name in ("filters", "positions", "distance")}
    assert {path.name for path in output.iterdir()} == names | {"index.html"}
    assert {f"wrote {output / name}" for name in names | {"index.html"}} <= set(said)
    assert [path.name for path in tmp_path.iterdir()] == ["seen"]
    text = (output / "index.html").read_text()
    page = assert_stands_alone(text)
    assert page.tags.count("figure") == page.tags.count("img") == len(names)
    with Image.open(output / "01_00_attention.png") as sheet:
        # Two layers and four heads, of tiles of 56 pixels with gaps of 2.
        assert sheet.size == (4 * 58 - 2, 2 * 58 - 2)


def test_a_summary_of_two_lines_replaces_the_list_of_files(call, tmp_path):
    said = call("vit.npz", f"--output={tmp_path / 'seen'}", "--figures=filters,rollout")
    assert said[-2:] == [
        f"wrote {tmp_path / 'seen'}: 3 pictures of 2 images (filters, rollout)",
        f"open {tmp_path / 'seen' / 'index.html'} in a browser to see them together",
    ]
    assert not any(".png" in line for line in said)


def test_a_model_without_a_class_token_shows_the_mean_of_its_patches(call, tmp_path):
    call("gap.npz", f"--output={tmp_path / 'seen'}", "--figures=attention,positions")
    text = (tmp_path / "seen" / "index.html").read_text()
    assert "what a patch, on average, takes from each patch" in text
    assert len(list((tmp_path / "seen").iterdir())) == 4


def test_what_a_mixer_has_not_is_said_and_the_rest_is_drawn(call, place, tmp_path):
    said = call("mixer.npz", f"--output={tmp_path / 'seen'}")
    assert "not drawn: attention, rollout, distance: the model has no attention, as a Mixer" in said
    assert any(line.startswith("not drawn: positions: ") for line in said)
    names = {path.name.partition("_")[2] for path in (tmp_path / "seen").glob("*.png")}
    assert names == {"filters.png", "00_similarity.png", "01_similarity.png"} | {
        "00_pca.png",
        "01_pca.png",
    }
    assert "Classes" not in (tmp_path / "seen" / "index.html").read_text()
    with pytest.raises(UserError, match="--figures: rollout can't be drawn: the model has no att"):
        call("mixer.npz", f"--output={tmp_path / 'other'}", "--figures=pca,rollout")
    with pytest.raises(UserError, match="this model has no attention"):
        load_model(place / "mixer.npz").attention(np.zeros((8, 8, 3), np.uint8))


def test_position_similarity_is_bright_at_the_patch_itself(place):
    model = load_model(place / "vit.npz")
    assert not find_impossible(model)
    picture = np.asarray(draw_positions(model).picture)
    # Four tiles of 2x2 cells: the cell of each tile's own patch has the brightest colour.
    for row, column in np.ndindex(2, 2):
        cell = picture[58 * row + 28 * row + 14, 58 * column + 28 * column + 14]
        assert cell.tolist() == [253, 231, 37, 255]


def test_colours_go_from_dark_to_bright():
    found = draw.colorize(np.array([-1.0, 0, 0.5, 1, 2]), 0, 1)
    assert found[0].tolist() == found[1].tolist() == [68, 1, 84]
    assert found[3].tolist() == found[4].tolist() == [253, 231, 37]
    assert (np.diff(found.sum(axis=1)[1:4].astype(int)) > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output is missing: expected a folder to make"),
        (["--output={tmp}/there"], "there exists; remove it, or choose another name"),
        (["--output={tmp}/seen", "--figures=rolout"], "'rolout' is unknown; did you mean"),
        (["--output={tmp}/seen", "-"], "- is for vit_jax.predict"),
        (["--output={tmp}/seen", "{tmp}/none"], "there is no such file or folder"),
        (["--output={tmp}/seen", "{tmp}/there/broken.png"], "broken.png: 4 bytes that are no"),
        (["--output={tmp}/there/broken.png/seen"], "can't be written: "),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(call, tmp_path, arguments, message):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "broken.png").write_bytes(b"none")
    with pytest.raises(UserError) as error:
        call("vit.npz", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "broken.png"]


def test_more_images_than_a_page_can_hold_are_refused(place, tmp_path):
    images = [str(place / "images" / "00.png")] * 65
    with pytest.raises(UserError, match="65 images: expected at most 64 for one page"):
        main([f"--checkpoint={place / 'vit.npz'}", f"--output={tmp_path / 'seen'}", *images])


def test_the_figures_that_help_names_are_those_that_can_be_drawn():
    assert (*figures.OF_MODEL, *figures.OF_VIEWS, *figures.OF_IMAGE) == FIGURES
