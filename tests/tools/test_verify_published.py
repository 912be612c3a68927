# SPDX-License-Identifier: Apache-2.0
"""The command that verifies published checkpoints, on a small one that a local server publishes."""

import csv
import dataclasses
import hashlib
import json
import types
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.file_server import serve
from tools import verify_published
from vit_jax.checkpoint.pretrained.catalogue import CATALOGUE, load_catalogue
from vit_jax.checkpoint.pretrained.npz import read_npz
from vit_jax.models.vit import VisionTransformer
from vit_jax.utils.errors import UserError

GOLDEN = Path(__file__).parents[1] / "testdata" / "golden"
DATA = (GOLDEN / "vit_token.npz").read_bytes()
SHA256 = hashlib.sha256(DATA).hexdigest()
NAME = "golden:Tiny/8@32"


def make_model(published):
    config = json.loads((GOLDEN / "vit_token.json").read_text())["config"]
    return VisionTransformer(
        num_classes=published.num_classes,
        patch_size=tuple(config["patches"]["size"]),
        hidden_size=config["hidden_size"],
        num_layers=config["transformer"]["num_layers"],
        num_heads=config["transformer"]["num_heads"],
        mlp_dim=config["transformer"]["mlp_dim"],
    )


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(verify_published, "make_model", make_model)
    with serve() as server:
        server.files["golden.npz"] = DATA
        yield server


@pytest.fixture
def write_catalogue(server, tmp_path):
    """Writes a catalogue of one row, with changes; returns its path."""

    def write(**changes):
        with CATALOGUE.open(newline="") as file:
            reader = csv.DictReader(file)
            row = dict.fromkeys(reader.fieldnames, "")
        row |= {"name": NAME, "model": "vit", "variant": "Tiny/8", "image_size": "32"}
        row |= {"num_classes": "10", "head": "valid", "mean": "0.5", "std": "0.5"}
        row |= {"eval": "decode|resize(32)", "top1": "78.2", "top1_image_size": "32"}
        row |= {"url_https": server.url("golden.npz")} | changes
        path = tmp_path / "catalogue.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerow(row)
        return path

    return write


@pytest.fixture
def images():
    """Seven uint8 images of other sizes than the model's."""
    rng = np.random.default_rng(0)
    return [rng.integers(256, size=(40 + i, 36, 3), dtype=np.uint8) for i in range(7)]


@pytest.fixture
def predictions(images):
    """What the model takes them for."""
    pixels = np.stack([cv2.resize(image, (32, 32)) for image in images]) / np.float32(127.5) - 1
    model = make_model(types.SimpleNamespace(num_classes=10))
    params = {
        "params": traverse_util.unflatten_dict(read_npz(GOLDEN / "vit_token.npz").params, sep="/")
    }
    logits, _ = jax.jit(lambda params, x: model.apply(params, x, train=False))(params, pixels)
    return np.argmax(logits, -1)


def write_images(folder, images, labels, names=str, suffix=".png"):
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / names(label) / f"{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())


def run(catalogue, tmp_path, *arguments):
    return verify_published.main(
        ["--catalogue", str(catalogue), "--names", NAME, "--cache-dir", str(tmp_path / "cache")]
        + [str(argument) for argument in arguments]
    )


def test_accuracy_stands_next_to_the_published_one(
    write_catalogue, images, predictions, tmp_path, capsys
):
    labels = np.where(np.arange(7) < 5, predictions, (predictions + 1) % 10)
    write_images(tmp_path / "images", images, labels)
    (tmp_path / "images" / str(labels[0]) / "notes.txt").write_text("no image")
    catalogue = write_catalogue(sha256=SHA256, size=str(len(DATA)))
    assert run(catalogue, tmp_path, "--images", tmp_path / "images", "--batch-size", 4) == 0
    shown = capsys.readouterr().out
    assert f"sha256 {SHA256}, as recorded" in shown
    assert "loaded: " in shown
    assert "top-1 71.43 ± 33.47 % (5 of 7 images, decode|resize(32))" in shown
    assert "published 78.20 % at 32 pixels" in shown
    assert "1 of 1 checkpoints verified" in shown


def test_folders_of_any_names_are_classes_in_their_order(images, predictions, tmp_path):
    for label in range(10):
        (tmp_path / f"n{label:08}").mkdir()
    write_images(tmp_path, images, predictions, names=lambda x: f"n{x:08}", suffix=".JPEG")
    found = verify_published.list_images(tmp_path, 10)
    assert sorted(label for _, label in found) == sorted(predictions)
    assert all(int(path.parent.name[1:]) == label for path, label in found)


def test_folders_named_by_index_may_be_few(images, tmp_path):
    write_images(tmp_path, images[:2], [2, 10])
    assert [label for _, label in verify_published.list_images(tmp_path, 11)] == [10, 2]


@pytest.mark.parametrize("folders", [[], ["cat", "dog"], ["0", "10"]])
def test_folders_that_are_no_classes_are_refused(folders, tmp_path):
    for folder in folders:
        (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match=f"{len(folders)} folders; expected folders named 0 to 9"):
        verify_published.list_images(tmp_path, 10)


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "0").mkdir()
    with pytest.raises(UserError, match=r"no \.jpg"):
        verify_published.list_images(tmp_path, 10)


def test_an_unreadable_image_is_named(write_catalogue, tmp_path, capsys):
    (tmp_path / "images" / "0").mkdir(parents=True)
    (tmp_path / "images" / "0" / "bad.jpg").write_text("no image")
    assert run(write_catalogue(), tmp_path, "--images", tmp_path / "images") == 1
    assert "bad.jpg: 8 bytes that are not a readable image" in capsys.readouterr().out


def test_hashes_are_recorded_only_when_asked(write_catalogue, tmp_path, capsys):
    catalogue = write_catalogue()
    before = catalogue.read_bytes()
    assert run(catalogue, tmp_path) == 0
    assert "none recorded" in capsys.readouterr().out
    assert catalogue.read_bytes() == before
    assert run(catalogue, tmp_path, "--record") == 0
    row = load_catalogue(catalogue)[NAME]
    assert (row.sha256, row.size) == (SHA256, len(DATA))
    assert run(catalogue, tmp_path, "--record") == 0


def test_recording_changes_nothing_else(tmp_path):
    path = tmp_path / "catalogue.csv"
    path.write_bytes(CATALOGUE.read_bytes())
    verify_published.record(path, "sam:B/16", size=12345, sha256="f" * 64)
    before, after = load_catalogue(), load_catalogue(path)
    expected = dataclasses.replace(before["sam:B/16"], size=12345, sha256="f" * 64)
    assert after == before | {"sam:B/16": expected}
    lines = CATALOGUE.read_bytes().splitlines(), path.read_bytes().splitlines()
    assert sum(a != b for a, b in zip(*lines, strict=True)) == 1


def test_a_wrong_hash_fails_and_the_others_go_on(write_catalogue, tmp_path, capsys):
    catalogue = write_catalogue(sha256="0" * 64)
    assert run(catalogue, tmp_path) == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown
    assert SHA256 in shown
    assert "0 of 1 checkpoints verified" in shown


def test_a_head_that_does_not_fit_fails(write_catalogue, tmp_path, capsys):
    assert run(write_catalogue(num_classes="11"), tmp_path) == 1
    assert "10 classes in the file, 11 here" in capsys.readouterr().out


def test_the_checkpoints_verified_by_default_are_in_the_catalogue():
    rows = load_catalogue()
    assert all(rows[name].recommended and rows[name].top1 for name in verify_published.SMALL)
