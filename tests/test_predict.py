# SPDX-License-Identifier: Apache-2.0
"""The command that classifies and embeds images."""

import csv
import io
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

import vit_jax
from tests.command import call as call_command
from tests.trained import write_images, write_model, write_towers
from vit_jax.observe import console
from vit_jax.predict import main
from vit_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `vit.npz`, `names.txt` and 20 images in `images`, of which `03.png` is cut."""
    folder = tmp_path_factory.mktemp("predict")
    write_model(folder / "vit.npz")
    (folder / "names.txt").write_text("ant\nbee\ncat, black\n")
    paths = write_images(folder / "images", 20)
    paths[3].write_bytes(paths[3].read_bytes()[:40])
    return folder


@pytest.fixture(scope="module")
def expected(place):
    """Readable images, the model, and what it says of them."""
    model = vit_jax.load_model(place / "vit.npz")
    paths = [p for p in sorted((place / "images").iterdir()) if p.name != "03.png"]
    images = [model.preprocess(path) for path in paths]
    return [str(path) for path in paths], model, images


@pytest.fixture
def call(place, monkeypatch):
    """Runs the command on the images, with the model and its names."""
    monkeypatch.setattr(console.console, "stderr", False)

    def run(*arguments, images=True):
        source = [f"--checkpoint={place / 'vit.npz'}", f"--labels={place / 'names.txt'}"]
        return main([*source, *arguments, *([str(place / "images")] if images else [])])

    return run


def test_csv_has_the_most_probable_classes_and_names_what_is_left_out(call, expected, capfd):
    assert call("--format=csv", "--top_k=2", "--batch_size=8") == 1
    out, err = capfd.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    paths, model, images = expected
    prediction = model(images)
    labels = prediction.top(2)
    assert [row["image"] for row in rows] == paths
    assert [int(row["label_1"]) for row in rows] == labels[:, 0].tolist()
    names = ["ant", "bee", "cat, black"]
    assert [row["class_2"] for row in rows] == [names[i] for i in labels[:, 1]]
    second = np.take_along_axis(prediction.probabilities, labels[:, 1:], axis=1)[:, 0]
    np.testing.assert_allclose([float(r["probability_2"]) for r in rows], second, atol=1e-5)
    assert "03.png: 40 bytes that are not a readable image" in err
    assert "19 images in " in err
    assert "1 can't be read and are left out" in err


def test_the_screen_shows_a_line_an_image(call, place, capfd):
    assert call(str(place / "images" / "00.png"), images=False) == 0
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith(str(place / "images" / "00.png")[:40])
    assert "cat, black" in line
    assert line.count("%") == 3


def test_a_file_appears_when_it_is_complete_and_is_named(call, expected, place, tmp_path, capfd):
    file = tmp_path / "deep" / "out.jsonl"
    assert call(f"--output={file}", "--tta=flip", "--top_k=1") == 1
    records = [json.loads(line) for line in file.read_text().splitlines()]
    paths, model, images = expected
    assert [r["image"] for r in records] == paths
    best = model(images, tta="flip").probabilities.max(axis=1)
    found = [r["predictions"][0]["probability"] for r in records]
    np.testing.assert_allclose(found, best, atol=1e-5)
    assert f"wrote {file}" in capfd.readouterr().out
    assert [path.name for path in file.parent.iterdir()] == ["out.jsonl"]


def test_parquet_has_lists(call, expected, tmp_path):
    call(f"--output={tmp_path / 'out.parquet'}", "--config.objective.loss=sigmoid")
    table = pq.read_table(tmp_path / "out.parquet")
    paths, model, images = expected
    assert table.column("image").to_pylist() == paths
    first = table.slice(0, 1).to_pylist()[0]
    assert set(first["class"]) == {"ant", "bee", "cat, black"}
    # Each class by itself.
    order = np.argsort(first["label"])
    found = np.array(first["probability"])[order]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-model(images[:1]).logits[0])), atol=1e-5)


def test_features_are_written_as_npz_and_parquet(call, expected, tmp_path):
    paths, model, images = expected
    call("--embed", f"--output={tmp_path / 'out.npz'}", "--batch_size=8")
    found = np.load(tmp_path / "out.npz")
    assert found["image"].tolist() == paths
    np.testing.assert_allclose(found["features"], model.features(images), atol=1e-5)
    layer = "Transformer/encoderblock_0"
    call("--embed", f"--layer={layer}", f"--output={tmp_path / 'out.parquet'}")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column("image").to_pylist() == paths
    shape = json.loads(table.schema.metadata[b"shape"])
    assert shape == [5, 16]
    features = np.array(table.column("features").to_pylist()).reshape(-1, *shape)
    np.testing.assert_allclose(features, model.features(images, layer), atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "out.parquet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output={tmp}/there.csv"], "there.csv exists; remove it, or choose another name"),
        (["--output={tmp}/out.xlsx"], "--format=xlsx (--output="),
        (["--format=parquet"], "--format=parquet expects a file"),
        (["--embed"], "--embed expects a file, such as features.npz"),
        (["--embed", "--output={tmp}/out.csv"], "expected npz, parquet with --embed"),
        (["--embed", "--layer=block", "--output={tmp}/out.npz"], "layer='block' is not one of enc"),
        (["--layer=encoded"], "expected --embed with it"),
        (["--top_k=0"], "--top_k=0: expected at least 1"),
        (["--tta=rotate"], "invalid choice: 'rotate'"),
        (
            ["--workdir={tmp}"],
            "expected one of --workdir (or WORKDIR), --checkpoint=FILE and --init_from",
        ),
        (["--labels={tmp}/none.txt"], "none.txt can't be read"),
        (["--config.data.name=digits"], "expected --config.model.KEY or one of --config.obj"),
        (["{tmp}/none.png"], "there is no such file or folder"),
    ],
)
def test_bad_input_is_one_line_and_loses_nothing(call, place, tmp_path, arguments, message):
    (tmp_path / "there.csv").write_text("mine")
    with pytest.raises(UserError) as error:
        call(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there.csv"]
    assert (tmp_path / "there.csv").read_text() == "mine"


def test_a_step_needs_a_run(place, tmp_path):
    image = str(place / "images" / "00.png")
    for arguments, message in (
        (["--checkpoint=8"], "--checkpoint=8 is of a run: expected --workdir"),
        ([f"--workdir={tmp_path / 'none'}"], "none is no folder; expected the workdir of a run"),
        ([f"--workdir={tmp_path}"], "has no checkpoint; expected the workdir of a run"),
        ([], "--workdir, --checkpoint and --init_from are missing"),
        ([str(tmp_path / "none")], "none' is not a workdir; it does not exist"),
    ):
        with pytest.raises(UserError) as error:
            main([*arguments, image])
        assert message in str(error.value)


def test_if_no_image_can_be_read_nothing_is_left(call, place, tmp_path):
    file = tmp_path / "out.npz"
    with pytest.raises(UserError, match="none of 1 images can be read"):
        call("--embed", f"--output={file}", str(place / "images" / "03.png"), images=False)
    assert not list(tmp_path.iterdir())


def test_the_command_reads_a_list_and_leaves_stdout_to_the_results(place, monkeypatch, capfd):
    listed = f"{place / 'images' / '00.png'}\n{place / 'images' / 'none.png'}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed.encode())))
    arguments = [f"--checkpoint={place / 'vit.npz'}", "--format=json", "-"]
    assert call_command("predict", arguments, monkeypatch) == 1
    out, err = capfd.readouterr()
    (record,) = map(json.loads, out.splitlines())
    assert [p["class"] for p in record["predictions"]] == [
        str(p["label"]) for p in record["predictions"]
    ]
    assert "none.png: it can't be read: FileNotFoundError" in err


@pytest.fixture(scope="module")
def towers(place):
    return write_towers(place / "towers.npz")


@pytest.fixture
def call_towers(place, towers, monkeypatch):
    """Runs the command with a model of images and texts."""
    monkeypatch.setattr(console.console, "stderr", False)
    return lambda *arguments: main([f"--checkpoint={towers}", *arguments])


def test_texts_are_classes_of_a_model_of_images_and_texts(call_towers, towers, place, capfd):
    image = str(place / "images" / "00.png")
    assert call_towers("--labels=a cat, a dog", "--format=json", "--templates=a {}", image) == 0
    out, err = capfd.readouterr()
    record = json.loads(out)
    found = vit_jax.load_model(towers)(image, labels=["a cat", "a dog"], templates="a {}")
    assert [(p["class"], p["label"]) for p in record["predictions"]] == [
        (name, ["a cat", "a dog"].index(name)) for name, _ in found.top()
    ]
    probabilities = [p["probability"] for p in record["predictions"]]
    np.testing.assert_allclose(probabilities, [p for _, p in found.top()], atol=1e-5)
    assert err.count("classes by text") == 1
    assert err.index("model: ") < err.index("classes by text: 2, prompts: a {}\n")


def test_several_templates_are_written_as_in_a_config(call_towers, towers, place, capfd):
    image = str(place / "images" / "00.png")
    line = "--templates=('a {}', 'one {}')"
    assert call_towers("--labels=cat,dog", "--format=json", line, image) == 0
    out, err = capfd.readouterr()
    found = vit_jax.load_model(towers)(image, labels=["cat", "dog"], templates=("a {}", "one {}"))
    given = [p["probability"] for p in json.loads(out)["predictions"]]
    np.testing.assert_allclose(given, [p for _, p in found.top()], atol=1e-5)
    assert "classes by text: 2, prompts: 'a {}', 'one {}'\n" in err


def test_a_file_of_labels_may_have_commas_in_them(call_towers, place, capfd):
    image = str(place / "images" / "00.png")
    assert call_towers(f"--labels={place / 'names.txt'}", image) == 0
    assert "cat, black" in capfd.readouterr().out


def test_names_that_differ_at_their_ends_are_shown_whole(place, tmp_path, capfd):
    names = [f"a photo of the digit number {i}" for i in (7, 6, 1)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    model, labels = f"--checkpoint={place / 'vit.npz'}", f"--labels={tmp_path / 'names.txt'}"
    assert main([model, labels, str(place / "images" / "00.png")]) == 0
    shown = capfd.readouterr().out
    assert all(name in shown for name in names)


def test_texts_are_embedded(call_towers, towers, place, tmp_path):
    (tmp_path / "texts.txt").write_text("a cat\na dog, asleep\n")
    options = ("--embed", "--text=one more", f"--texts={tmp_path / 'texts.txt'}")
    assert call_towers(*options, f"--output={tmp_path / 'texts.npz'}") == 0
    texts = ["one more", "a cat", "a dog, asleep"]
    found = np.load(tmp_path / "texts.npz")
    assert found["text"].tolist() == texts
    model = vit_jax.load_model(towers)
    np.testing.assert_allclose(found["features"], model.text_embed(texts), atol=1e-6)
    call_towers(*options, f"--output={tmp_path / 'texts.parquet'}")
    table = pq.read_table(tmp_path / "texts.parquet")
    assert table.column("text").to_pylist() == texts
    # Images are embedded in the same space.
    image = str(place / "images" / "00.png")
    call_towers("--embed", f"--output={tmp_path / 'images.npz'}", image)
    features = np.load(tmp_path / "images.npz")["features"]
    np.testing.assert_allclose(features, model.image_embed(image), atol=1e-6)


def test_texts_that_are_cut_are_reported(call_towers, tmp_path, capfd):
    call_towers("--embed", "--text=" + "x" * 30, "--text=b", f"--output={tmp_path / 'texts.npz'}")
    assert "1 of 2 texts have more than 24 tokens, and their ends are cut" in capfd.readouterr().out
