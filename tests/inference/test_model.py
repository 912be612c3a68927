# SPDX-License-Identifier: Apache-2.0
"""Trained models in use from Python."""

import io
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import vit_jax
from tests.trained import MIXER, NAMES, write_images, write_model, write_run
from vit_jax.checkpoint.manifest import write_manifest
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.safetensors import write_safetensors
from vit_jax.inference import model as model_lib
from vit_jax.utils.errors import UserError

IMAGES = np.random.default_rng(2).integers(0, 256, (3, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """A workdir of a model whose layers are scanned, its experiment and its parameters."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return write_run(folder, data_dir, model__num_layers=2, model__scan=True, model__patch_size=4)


@pytest.fixture(scope="module")
def model(run):
    # On one device, which compiles sooner; the tests of the commands use all.
    return vit_jax.load_model(run[0], devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def expected(run):
    """What the experiment itself makes of the images: logits, outputs and intermediates."""
    _, experiment, params = run

    def apply(params, images):
        return experiment.model.apply(
            {"params": params}, images / 127.5 - 1, train=False, mutable=["intermediates"]
        )

    (logits, out), state = jax.jit(apply)(params, IMAGES.astype(np.float32))
    return logits, out, state["intermediates"]


def refuse(call, *words):
    with pytest.raises(UserError) as error:
        call()
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, vit_jax; assert {*vit_jax.__all__} <= {*dir(vit_jax)};"
        "heavy = {'jax', 'numpy', 'flax', 'ml_collections'} & {*sys.modules}; assert not heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_no_other():
    for name in vit_jax.__all__:
        assert getattr(vit_jax, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        vit_jax.no_such_name  # noqa: B018


def test_train_is_called_by_its_name_whatever_was_imported_before(tmp_path):
    from vit_jax.training.run import train

    assert callable(train)
    refuse(lambda: vit_jax.train({"modell": {}}, tmp_path / "w"), "unknown config key")


def test_a_run_predicts_what_its_model_computes(model, expected):
    prediction = model(IMAGES)
    logits, out, _ = expected
    np.testing.assert_allclose(prediction.logits, logits, atol=1e-5)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(
        prediction.probabilities, powers / powers.sum(axis=1, keepdims=True), atol=1e-5
    )
    assert (prediction.top(3)[:, 0] == logits.argmax(axis=1)).all()
    assert prediction.top(3).shape == (3, 3)
    np.testing.assert_allclose(model.features(IMAGES), out["pre_logits"], atol=1e-5)
    np.testing.assert_allclose(model.features(IMAGES, "encoded"), out["encoded"], atol=1e-5)


@pytest.fixture
def photos(tmp_path):
    """A folder of three images with one that is damaged, and another file."""
    paths = write_images(tmp_path / "photos", 3)
    (tmp_path / "photos" / "damaged.jpg").write_bytes(b"no image")
    (tmp_path / "photos" / "notes.txt").write_text("notes")
    return paths


def test_files_are_classified_by_name(model, photos):
    arrays = model([model.preprocess(path) for path in photos])
    one = model(str(photos[1]))
    labels = arrays.top(2)[1]
    assert one.top(2) == [(NAMES[i], pytest.approx(arrays.probabilities[1, i])) for i in labels]
    assert one.path == str(photos[1])
    assert len(one.top()) == 5
    assert len(one.top(99)) == 10
    np.testing.assert_allclose(one.logits, arrays.logits[1], atol=1e-5)
    name, probability = one.top(1)[0]
    assert repr(one).startswith(f"{photos[1]}: {name} {100 * probability:.1f} %, ")
    for k in (0, -1, 2.5, "3", None):
        for prediction in (one, arrays, model([photos[0]])):
            refuse(lambda k=k, it=prediction: it.top(k), f"top({k!r})", "at least 1")


@pytest.mark.parametrize(
    "give",
    [
        lambda paths: [str(path) for path in paths],
        lambda paths: tuple(paths),
        lambda paths: (path for path in paths),
        lambda paths: np.array([str(path) for path in paths]),
        lambda paths: f"{paths[0].parent}/*.png",
        lambda paths: paths[0].parent,
        lambda paths: [str(paths[0].parent)],
        lambda paths: [Image.open(paths[0]), paths[1].read_bytes(), paths[2]],
    ],
    ids=["list", "tuple", "iterator", "array", "pattern", "folder", "[folder]", "in memory"],
)
def test_several_images_are_classified_in_order(model, photos, give):
    expected = model([model.preprocess(path) for path in photos])
    found = model(give(photos))
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-6)
    assert [path for path in found.paths if path] == [
        str(path) for path, given in zip(photos, found.paths, strict=True) if given
    ]
    assert [image.top(1) for image in found] == found.top(1) == [t[:1] for t in found.top(5)]
    assert [name for ((name, _),) in found.top(1)] == [NAMES[i] for i in expected.top(1)[:, 0]]
    assert found[1:].top(1) == found.top(1)[1:]
    assert repr(found[2]) in repr(found)


def test_a_pillow_image_or_the_bytes_of_a_file_are_one_image(model, photos, monkeypatch):
    expected = model(photos[0]).top(3)
    for image in (Image.open(photos[0]), photos[0].read_bytes()):
        found = model(image)
        assert (found.path, [name for name, _ in found.top(3)]) == (None, [n for n, _ in expected])
    monkeypatch.setenv("HOME", str(photos[0].parent))
    assert [name for name, _ in model(f"~/{photos[0].name}").top(3)] == [n for n, _ in expected]


def test_an_image_that_was_named_and_can_not_be_read_is_one_line(model, photos, tmp_path):
    damaged = str(photos[0].parent / "damaged.jpg")
    refuse(lambda: model(damaged), f"{damaged}: ")
    refuse(lambda: model([photos[0], damaged]), f"{damaged}: ")
    refuse(lambda: model([Image.open(photos[0]), damaged]), f"{damaged}: ")
    refuse(lambda: model([Image.open(photos[0]), b"no"]), "image 1 of 2: ")
    refuse(lambda: model("none.jpg"), "'none.jpg': there is no such file or folder")
    refuse(lambda: model([photos[0], "none.jpg"]), "'none.jpg': there is no such file")
    refuse(lambda: model([photos[0], IMAGES[0]]), "a ndarray is among them")
    (tmp_path / "empty").mkdir()
    refuse(lambda: model(tmp_path / "empty"), "no images found in", "empty")
    (tmp_path / "empty" / "a.jpg").write_bytes(b"no image")
    refuse(lambda: model(tmp_path / "empty"), "none of 1 images can be read")
    refuse(lambda: model([]), "there are no images: expected paths of images")
    with open(photos[0], "rb") as file:
        refuse(lambda: model(file), "an open file, BufferedReader", "file.read()")
    torn = Image.open(io.BytesIO(photos[0].read_bytes()[:-30]))
    refuse(lambda: model(torn), "image 0 of 1: a Pillow image that can't be read: ")
    refuse(lambda: model.preprocess(IMAGES[0, :0]), "uint8 [0, 8, 3]: expected uint8")


@pytest.mark.parametrize("method", ["features", "attention"])
def test_features_and_attention_take_files_as_a_call_does(model, photos, method):
    compute = getattr(model, method)
    expected = compute([model.preprocess(path) for path in photos])
    for images in (photos, [Image.open(photos[0]), *photos[1:]], f"{photos[0].parent}/*.png"):
        np.testing.assert_allclose(compute(images), expected, atol=1e-5)
    found = compute(str(photos[0].parent))
    assert found.paths == tuple(map(str, photos))
    assert (len(found), found.shape) == (len(photos), expected.shape)
    np.testing.assert_array_equal(found[1], found.values[1])
    assert found[:2].paths == found.paths[:2]
    assert repr(found).startswith(f"{photos[0]}: float32 [")
    assert compute(str(photos[0])).shape == (1, *expected.shape[1:])
    assert compute(Image.open(photos[0])).paths == (None,)
    refuse(lambda: compute("none.jpg"), "'none.jpg': there is no such file or folder")


def test_attention_that_does_not_fit_into_memory_is_refused_before_it_is_computed(
    model, photos, monkeypatch
):
    monkeypatch.setattr(model_lib, "_MAX_ATTENTION", 2_000)
    for images in (str(photos[0].parent), [model.preprocess(path) for path in photos] * 9):
        refuse(
            lambda images=images: model.attention(images), "take ", " of memory: expected at most"
        )


@pytest.mark.parametrize("source", [3, None, "", b"run", ["run"]])
def test_a_source_that_is_no_text_is_refused(source):
    refuse(
        lambda: vit_jax.load_model(source), f"source={source!r}: expected a workdir or a checkpoint"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preprocess": 3}, "preprocess=3 is an int; expected str or None"),
        ({"class_names": "abc"}, "class_names='abc': expected a list, or None"),
        ({"model": 3}, "model=3: expected arguments by name, or None"),
        ({"devices": 3}, "devices=3: expected a list, or None"),
        ({"parts": 3}, "parts=3: expected the names of modules"),
        ({"pixel_mean": "a"}, "pixel_mean=a: expected a number, or one for each of RGB"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused(run, options, words):
    refuse(lambda: vit_jax.load_model(run[0], **options), words)


def test_logits_of_another_shape_are_refused(model):
    refuse(lambda: model.predict([1, 2]), "logits are a list []: expected float32 [n, classes]")
    refuse(lambda: model.predict(np.zeros(3)), "logits are a ndarray [3]: expected float32")


def test_a_run_says_what_was_taken_of_it(run, model):
    assert model.source == str(run[0] / "checkpoints" / "8")
    assert model.notes[0] == "the parameters as they are, not their average"
    assert model.class_names == NAMES
    assert model.config["data"]["name"] == "digits"
    assert model.image_shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("options", "scale", "source"),
    [
        ({"checkpoint": 4}, 0.5, "4"),
        ({"checkpoint": "best"}, 0.5, "4"),
        ({"checkpoint": "last", "params": "ema"}, 2.0, "8"),
    ],
)
def test_checkpoint_and_average_can_be_chosen(run, options, scale, source):
    model = vit_jax.load_model(run[0], **options)
    assert model.source == str(run[0] / "checkpoints" / source)
    kernel = model.params["embedding"]["kernel"]
    np.testing.assert_array_equal(kernel, run[2]["embedding"]["kernel"] * np.float32(scale))


def test_a_checkpoint_by_its_path_finds_its_workdir(run):
    model = vit_jax.load_model(run[0] / "checkpoints" / "4")
    assert model.class_names == NAMES


def test_a_checkpoint_that_was_moved_keeps_its_class_names(run, tmp_path):
    workdir, experiment, _ = run
    description = experiment.description | {"class_names": NAMES[::-1]}
    for place in (tmp_path / "checkpoints" / "8", tmp_path / "alone"):
        shutil.copytree(workdir / "checkpoints" / "8", place)
        (place / "description" / "metadata").write_text(json.dumps(description))
        (place / "manifest.json").unlink()
        write_manifest(place)
        assert vit_jax.load_model(place).class_names == NAMES[::-1]
    model = vit_jax.load_model(tmp_path / "alone", class_names=NAMES[:8])
    assert "classes: 8 names for 10: the last 2 are named by their numbers" in model.notes
    (tmp_path / "labels.txt").write_text("a\nb")
    model = vit_jax.load_model(tmp_path / "checkpoints" / "8")
    assert model.class_names == ("a", "b", *map(str, range(2, 10)))


def test_a_converted_file_is_the_same_model(run, model, tmp_path):
    write_safetensors(tmp_path / "vit.safetensors", load_pretrained(str(run[0])))
    other = vit_jax.load_model(tmp_path / "vit.safetensors")
    assert (other.class_names, other.image_shape) == (NAMES, (8, 8, 3))
    np.testing.assert_allclose(other(IMAGES).logits, model(IMAGES).logits, atol=1e-5)


def test_any_number_of_images_and_a_single_one_can_be_given(model):
    several = model(IMAGES).logits
    np.testing.assert_allclose(model(IMAGES[1]).logits, several[1:2], atol=1e-6)
    np.testing.assert_allclose(model([*IMAGES] * 3).logits, np.tile(several, (3, 1)), atol=1e-6)


def test_the_mirror_image_counts_half(model):
    both = (model(IMAGES).logits + model(IMAGES[:, :, ::-1]).logits) / 2
    np.testing.assert_allclose(model(IMAGES, tta="flip").logits, both, atol=1e-5)


def test_a_sigmoid_gives_probabilities_of_their_own(model):
    other = vit_jax.load_model(model.source, loss="sigmoid")
    logits = np.array([[0.0, 2.0, -300.0]], np.float32)
    expected = [[0.5, 1 / (1 + np.exp(-2)), 0]]
    np.testing.assert_allclose(other.predict(logits).probabilities, expected, atol=1e-7)


def test_a_run_trained_with_a_sigmoid_is_known_as_such(run, tmp_path):
    copy = shutil.copytree(run[0], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["objective"]["loss"] = "sigmoid"
    (copy / "config.json").write_text(json.dumps(config))
    assert vit_jax.load_model(copy).loss == "sigmoid"


def test_layers_have_names_and_an_unknown_one_lists_them(model):
    assert {"pre_logits", "encoded", "embedding", "Transformer/encoderblock_1"} <= {*model.layers}
    first = model.features(IMAGES, "Transformer/encoderblock_0")
    last = model.features(IMAGES, "Transformer/encoderblock_1")
    assert first.shape == last.shape == (3, 5, 16)
    # The norm of what the last block gives is what the encoder gives.
    centred = last - last.mean(axis=-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    norm = model.params["Transformer"]["encoder_norm"]
    np.testing.assert_allclose(
        unit * norm["scale"] + norm["bias"], model.features(IMAGES, "encoded"), atol=1e-4
    )
    refuse(
        lambda: model.features(IMAGES, "block7"),
        "layer='block7' is not one of encoded, logits, pre_logits",
        "Transformer/encoderblock_{0..1},",
    )


def by_hand(x, params, layer):
    """Attention weights softmax(Q K / sqrt(d)) of normed tokens `[n, length, hidden]`."""
    attention = params["Transformer"]["encoderblock"]["MultiHeadDotProductAttention_0"]
    query, key = (
        np.einsum("nlc,chd->nhld", x, attention[name]["kernel"][layer])
        + attention[name]["bias"][layer][None, :, None]
        for name in ("query", "key")
    )
    scores = np.einsum("nhqd,nhkd->nhqk", query, key) / np.sqrt(query.shape[-1])
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def test_attention_weights_are_those_of_queries_and_keys(run, model, expected):
    params = run[2]
    attention = model.attention(IMAGES)
    assert attention.shape == (3, 2, 4, 5, 5)
    # The first layer from the pixels on.
    pixels = IMAGES / 127.5 - 1
    patches = pixels.reshape(3, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(3, 4, 48)
    kernel = params["embedding"]["kernel"].reshape(48, 16)
    tokens = patches @ kernel + params["embedding"]["bias"]
    tokens = np.concatenate([np.broadcast_to(params["cls"], (3, 1, 16)), tokens], axis=1)
    tokens = tokens + params["Transformer"]["posembed_input"]["pos_embedding"]
    centred = tokens - tokens.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    norm = params["Transformer"]["encoderblock"]["LayerNorm_0"]
    normed = normed * norm["scale"][0] + norm["bias"][0]
    np.testing.assert_allclose(attention[:, 0], by_hand(normed, params, 0), atol=1e-5)
    normed = model.features(IMAGES, "Transformer/encoderblock_1/LayerNorm_0")
    np.testing.assert_allclose(attention[:, 1], by_hand(normed, params, 1), atol=1e-5)
    # The model of the run, whose layers are scanned, gives the same, stacked.
    block = expected[2]["Transformer"]["encoderblock"]
    (stacked,) = block["MultiHeadDotProductAttention_0"]["attention_weights"]
    np.testing.assert_allclose(attention, np.moveaxis(stacked, 0, 1), atol=1e-5)


def test_images_come_as_files_bytes_pixels_or_pictures(model, tmp_path):
    (path,) = write_images(tmp_path, 1)
    pixels = model.preprocess(path)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (8, 8, 3))
    for image in (str(path), path.read_bytes(), np.asarray(Image.open(path)), Image.open(path)):
        np.testing.assert_array_equal(model.preprocess(image), pixels)
    grey = model.preprocess(pixels[..., 0])
    np.testing.assert_array_equal(grey, np.repeat(pixels[..., :1], 3, axis=2))
    refuse(lambda: model.preprocess(tmp_path / "none.png"), "none.png", "can't be read")
    refuse(lambda: model.preprocess(pixels / 255), "expected uint8 [height, width, 3]")
    # The images of the run were of one size, so that its preprocessing does not resize.
    refuse(lambda: model.preprocess(pixels[:4]), "'decode' leaves an image of 4x8; expected 8x8")


def test_another_preprocessing_takes_images_of_any_size_and_resizes_positions(run):
    model = vit_jax.load_model(run[0], preprocess="decode|resize(12)", model={"dtype": "bfloat16"})
    assert model.preprocess(np.zeros((30, 20, 3), np.uint8)).shape == (12, 12, 3)
    assert "position embeddings: resized from 2x2 to 3x3, bilinear" in model.notes
    assert model.module.dtype == "bfloat16"


def test_a_file_that_says_nothing_of_images_is_taken_at_the_size_of_its_positions(tmp_path):
    file = write_model(tmp_path / "vit.npz", size=12)
    (tmp_path / "vit.json").unlink()
    model = vit_jax.load_model(file)
    assert model.preparation.line == "decode|resize(12, 12)"
    mixer = write_model(tmp_path / "mixer.npz", MIXER)
    (tmp_path / "mixer.json").unlink()
    refuse(lambda: vit_jax.load_model(mixer), "not known how images are prepared")
    assert vit_jax.load_model(mixer, preprocess="decode|resize(8)").image_shape == (8, 8, 3)


def test_a_model_without_a_head_gives_features_alone(tmp_path):
    model = vit_jax.load_model(write_model(tmp_path / "vit.npz", classes=0))
    refuse(lambda: model(IMAGES), "its head is missing: expected a classifier")
    assert model.features(IMAGES).shape == (3, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": 5}, "--checkpoint=5: --workdir="),
        ({"checkpoint": "worst"}, "checkpoint='worst': expected a step, 'last' or 'best'"),
        ({"params": "average"}, "params='average': expected 'raw' or 'ema'"),
        ({"preprocess": "decode"}, "leaves images in different sizes: add resize(SIZE)"),
        ({"preprocess": "resize(8)"}, "expected 'decode' first"),
        ({"class_names": tuple("abcdefghijk")}, "11 class names, and the model has 10 classes"),
        ({"loss": "hinge"}, "loss='hinge': expected 'softmax' or 'sigmoid'"),
        ({"model": {"num_head": 2}}, "unknown config key model.num_head; did you mean"),
        ({"pixel_std": 0.0}, "expected more than 0"),
    ],
)
def test_bad_arguments_are_one_line(run, options, message):
    refuse(lambda: vit_jax.load_model(run[0], **options), message)


def test_bad_sources_are_one_line(run, tmp_path):
    refuse(lambda: vit_jax.load_model(tmp_path / "none"), "no such file")
    refuse(lambda: vit_jax.load_model(tmp_path), "has no checkpoint; expected the workdir")
    file = write_model(tmp_path / "vit.npz")
    refuse(lambda: vit_jax.load_model(file, params="ema"), "is no run; leave params out")
    copy = shutil.copytree(run[0], tmp_path / "copy")
    (copy / "metrics.jsonl").unlink()
    refuse(lambda: vit_jax.load_model(copy, checkpoint="best"), "has no val/top1 of the steps 4, 8")


def test_images_of_another_kind_are_refused(model):
    for images, found in (
        (IMAGES / 255, "float64 [3, 8, 8, 3]"),
        (IMAGES[:, :4], "uint8 [3, 4, 8, 3]"),
        (IMAGES[:0], "uint8 [0, 8, 8, 3]"),
        ([IMAGES[0], IMAGES[0, :4]], "arrays of several shapes"),
        (None, "a NoneType"),
        ({"a.jpg"}, "a set"),
        (iter([]), "no images"),
    ):
        for call in (model, model.features, model.attention):
            given = list(images) if hasattr(images, "__next__") else images
            refuse(lambda call=call, given=given: call(given), found, "or uint8 [n, 8, 8, 3]")
    refuse(lambda: model(IMAGES, tta="rotate"), "tta='rotate': expected 'flip'")
