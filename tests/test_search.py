# SPDX-License-Identifier: Apache-2.0
"""The command that searches images by a text or by an image."""

import numpy as np
import pytest

from tests.html_pages import assert_stands_alone
from tests.trained import write_images, write_model, write_towers
from vit_jax.inference.model import load_model
from vit_jax.observe import console
from vit_jax.search import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `towers.npz`, `vit.npz` and 12 images in `photos`, of which one is cut."""
    folder = tmp_path_factory.mktemp("search")
    write_towers(folder / "towers.npz")
    write_model(folder / "vit.npz")
    paths = write_images(folder / "photos", 12)
    paths[3].write_bytes(paths[3].read_bytes()[:40])
    return folder


@pytest.fixture
def call(place, monkeypatch, capfd):
    """Runs the command on the images with a model; gives the code, what it found and said."""
    monkeypatch.setattr(console.console, "stderr", False)

    def run(model, *arguments):
        code = main([f"--checkpoint={place / model}", *arguments])
        out, err = capfd.readouterr()
        rows = [line.split(maxsplit=2) for line in out.splitlines()]
        return code, [(int(rank), float(score), path) for rank, score, path in rows], err

    return run


def expected(vectors, query, paths, count):
    """The ranks, scores and paths of the nearest ones."""
    order = np.argsort(-(vectors @ query), kind="stable")[:count]
    return [(i + 1, round(float(vectors[j] @ query), 3), paths[j]) for i, j in enumerate(order)]


def test_images_are_ranked_by_a_text(call, place, tmp_path):
    page = tmp_path / "found.html"
    arguments = ("--top_k=5", "--batch_size=8", f"--output={page}", str(place / "photos"), "a dög")
    code, found, said = call("towers.npz", *arguments)
    model = load_model(place / "towers.npz")
    paths = [str(p) for p in sorted((place / "photos").iterdir()) if p.name != "03.png"]
    images = np.stack([model.preprocess(path) for path in paths])
    vectors, query = model.image_embed(images), model.text_embed("a dög")[0]
    want = expected(vectors, query, paths, 5)
    assert [(rank, path) for rank, _, path in found] == [(rank, path) for rank, _, path in want]
    np.testing.assert_allclose([s for _, s, _ in found], [s for _, s, _ in want], atol=2e-3)
    assert code == 1
    assert "11 images in" in said
    assert "1 can't be read and are left out" in said
    assert f"wrote {page}" in said
    shown = assert_stands_alone(page.read_text(encoding="utf-8"))
    assert shown.tags.count("img") == 5
    assert "a dög" in shown.text
    assert all(path in shown.text for _, _, path in found)


@pytest.mark.parametrize(("name", "layer"), [("towers.npz", "image_embed"), ("vit.npz", None)])
def test_an_image_finds_itself_and_others_by_any_model(name, layer, call, place, tmp_path):
    query = place / "photos" / "05.png"
    page = tmp_path / "found.html"
    image, photos = f"--image={query}", str(place / "photos")
    code, found, _ = call(name, image, "--top_k=100", f"--output={page}", photos)
    assert code == 1
    assert len(found) == 11
    assert found[0] == (1, 1.0, str(query))
    model = load_model(place / name)
    vectors = model.features(photos, layer or "pre_logits")
    units = np.asarray(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)
    want = expected(units, units[vectors.paths.index(str(query))], vectors.paths, 11)
    assert [path for _, _, path in found] == [path for _, _, path in want]
    assert assert_stands_alone(page.read_text()).tags.count("img") == 12
