# SPDX-License-Identifier: Apache-2.0
"""TFDS datasets with features that have the class or the depth of each pixel."""

import io
import logging
import pickle
from typing import Any, ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax.data.ops.decode import ImageError
from vit_jax.data.pipeline import DatasetSpec, eval_batches
from vit_jax.data.sources import dataset_info, find_dataset, open_source
from vit_jax.data.sources.masks import depth_dataset, masks_dataset
from vit_jax.data.sources.tfds_features import PixelLabels, find_image, find_usual_maps
from vit_jax.utils.errors import UserError

f = tfds.features
COUNT = 4
# As in `oxford_iiit_pet`, 0 is no class.
LINES = "ignored\npet\nbackground\nborder\n"
# Metres, of which 0 is not known.
DEPTHS = np.array([[0.5, 0, 2, 2.5], [3, 3.5, 4, 4.5], [5, 5.5, 6, 6.5]], np.float16)


def encode(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def image_of(number):
    return encode(np.full((3, 4, 3), 10 * number, np.uint8))


def mask_of(number):
    return encode(np.random.default_rng(number).integers(1, 4, (3, 4)).astype(np.uint8))


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images of 4 x 3 pixels in the split `train`, with the features `FEATURES`."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: ClassVar[dict[str, Any]] = {}

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(self.FEATURES))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(COUNT):
            yield number, {name: self.value_of(name, number) for name in self.FEATURES}

    def value_of(self, name, number):
        values = {
            "depth": DEPTHS + np.float16(number),
            "label": number % 2,
            "image_id": str(number),
        }
        if name in values:
            return values[name]
        return image_of(number) if name.startswith("image") else mask_of(number)


class TinyPets(Builder):
    """In the form of `oxford_iiit_pet`: labels beside masks."""

    FEATURES: ClassVar[dict[str, Any]] = {
        "image": f.Image(encoding_format="png"),
        "label": f.ClassLabel(names=["cat", "dog"]),
        "segmentation_mask": f.Image(shape=(None, None, 1), encoding_format="png"),
    }


class TinyScenes(Builder):
    """In the form of `scene_parse150`, whose masks claim to have three channels."""

    FEATURES: ClassVar[dict[str, Any]] = {
        "image": f.Image(),
        "annotation": f.Image(encoding_format="png"),
    }


class TinyStreets(Builder):
    """In the form of `cityscapes`: two images, none of which is called `image`."""

    FEATURES: ClassVar[dict[str, Any]] = {
        "image_id": f.Text(),
        "image_left": f.Image(shape=(3, 4, 3), encoding_format="png"),
        "image_right": f.Image(shape=(3, 4, 3), encoding_format="png"),
        "segmentation_label": f.Image(shape=(3, 4, 1), encoding_format="png"),
    }


class TinyRooms(Builder):
    """In the form of `nyu_depth_v2`."""

    FEATURES: ClassVar[dict[str, Any]] = {
        "image": f.Image(shape=(3, 4, 3)),
        "depth": f.Tensor(shape=(3, 4), dtype=np.float16),
    }


class TinyNamed(Builder):
    """A mask with names of classes."""

    FEATURES: ClassVar[dict[str, Any]] = {
        "image": f.Image(),
        "parts": f.LabeledImage(labels=["none", "Pet ", "ground", "edge"], shape=(None, None, 1)),
    }


class TinyBoth(Builder):
    """Masks and depths, of which neither is chosen."""

    FEATURES = TinyScenes.FEATURES | TinyRooms.FEATURES


class TinyFaces(Builder):
    """Images alone."""

    FEATURES: ClassVar[dict[str, Any]] = {"image": f.Image(), "image_id": f.Text()}


def write_text(folder, dataset, text=LINES, name="classes.txt"):
    (folder / dataset).mkdir(exist_ok=True)
    (folder / dataset / name).write_text(text)


def batch_of(name, split, folder=None):
    """The only batch of a dataset, in the order of the gray of its images."""
    spec = DatasetSpec(
        name=name,
        split=split,
        preprocess="decode|resize(6)",
        batch_size=COUNT,
        data_dir=folder and str(folder),
        key="data",
        num_threads=0,
    )
    batch = next(eval_batches(spec))
    order = np.argsort(batch["image"][:, 0, 0, 0])
    return {feature: values[order] for feature, values in batch.items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The batch of a folder of the same images and masks, and one of the same depths."""
    root = tmp_path_factory.mktemp("folder")
    for folder in ("images", "masks", "depth"):
        (root / folder).mkdir()
    for number in range(COUNT):
        (root / "images" / f"{number}.png").write_bytes(image_of(number))
        (root / "masks" / f"{number}.png").write_bytes(mask_of(number))
        np.save(root / "depth" / f"{number}.npy", DEPTHS + np.float16(number))
    (root / "classes.txt").write_text(LINES)
    assert masks_dataset(str(root)).info.pixel_classes == ("pet", "background", "border")
    assert depth_dataset(str(root)).info.pixel_depth
    everything = "train+validation+test"
    return {kind: batch_of(f"{kind}:{root}", everything) for kind in ("masks", "depth")}


@pytest.mark.parametrize(
    ("name", "image", "mask"),
    [
        ("tiny_pets#mask=segmentation_mask", "image", "segmentation_mask"),
        ("tiny_pets:1.0.0#mask=segmentation_mask", "image", "segmentation_mask"),
        ("tiny_scenes", "image", "annotation"),
        ("tiny_streets", "image_left", "segmentation_label"),
        ("tiny_streets#image=image_right", "image_right", "segmentation_label"),
        ("tiny_named", "image", "parts"),
    ],
)
def test_a_batch_with_masks_equals_that_of_a_folder(name, image, mask, expected, tmp_path, caplog):
    write_text(tmp_path, name.partition("#")[0].partition(":")[0])
    with caplog.at_level(logging.INFO):
        batch = batch_of(name, "train", tmp_path)
    assert batch.keys() == expected["masks"].keys()
    for feature, values in expected["masks"].items():
        np.testing.assert_array_equal(batch[feature], values)
    assert caplog.text.count(f"{name}: the image is {image}, and the mask {mask}") == 1
    info = dataset_info(name, data_dir=str(tmp_path))
    assert (info.num_classes, info.pixel_classes) == (0, ("pet", "background", "border"))


def test_a_batch_with_depths_equals_that_of_a_folder(expected, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        batch = batch_of("tiny_rooms", "train", tmp_path)
    for feature, values in expected["depth"].items():
        np.testing.assert_array_equal(batch[feature], values)
    assert batch["label_map"].dtype == np.float32
    assert "tiny_rooms: the image is image, and the depth depth" in caplog.text


def test_labels_are_read_unless_masks_are_chosen(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        source = open_source("tiny_pets", "train", data_dir=str(tmp_path), key="split")
    assert source[0].keys() == {"image", "label"}
    hint = "segmentation_mask is not read; it is the mask of tiny_pets#mask=segmentation_mask"
    assert caplog.text.count(f"tiny_pets: {hint}") == 1


def test_names_of_a_feature_are_those_of_the_classes_without_a_file(tmp_path):
    info = dataset_info("tiny_named", data_dir=str(tmp_path))
    assert info.pixel_classes == ("none", "Pet", "ground", "edge")


def test_a_source_with_masks_survives_pickling(tmp_path):
    source = open_source("tiny_named", "train", data_dir=str(tmp_path), key="split")
    copy = pickle.loads(pickle.dumps(source))
    for _ in range(2):  # The second time, the record is in memory.
        np.testing.assert_array_equal(copy[1]["label_map"], source[1]["label_map"])
        assert copy[1]["label_map"].max() <= 3


def test_a_builder_from_outside_has_features_to_choose(tmp_path, monkeypatch):
    from vit_jax.utils import registry

    monkeypatch.setattr(registry, "_trusted", {__name__.partition(".")[0], __name__})
    write_text(tmp_path, "tiny_pets")
    name = f"{__name__}:TinyPets#mask=segmentation_mask"
    found = find_dataset(name, data_dir=str(tmp_path))
    assert found.info.pixel_classes == ("pet", "background", "border")
    with pytest.raises(UserError, match=r"#mask=x': expected .*:encode alone, as only features"):
        find_dataset(f"{__name__}:encode#mask=x", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny_scenes", r"no file .*tiny_scenes/classes\.txt: expected one that names the class"),
        (
            "tiny_faces",
            r"the features \['image', 'image_id'\]; .* as in tiny_faces#image=FEATURE,m",
        ),
        ("tiny_faces#mask=seg", "has no feature seg; expected one of image, image_id for the mask"),
        ("tiny_faces#mask=image", "image is the image; expected another feature for the mask, of"),
        (
            "tiny_faces#mask=image_id",
            r"image_id is Text.*; expected an Image, .* \(height, width\)",
        ),
        ("tiny_pets#mask=label", "label is ClassLabel.*; expected an Image, not as JPEG, or"),
        ("tiny_pets#image=label", "label is ClassLabel.*; expected an Image for the image"),
        ("tiny_rooms#mask=depth", "depth is Tensor.*; expected an Image, .* Tensor of integers"),
        ("tiny_streets#depth=segmentation_label", r"has integers, .*tiny_streets/depth_scale\.txt"),
        ("tiny_both", "masks and depths: .* tiny_both#mask=annotation or tiny_both#depth=depth"),
        ("tiny_both#mask=annotation,depth=depth", "expected a mask or a depth, not both"),
        ("tiny_pets#masks=a", r"expected tiny_pets#mask=FEATURE, with image, mask or depth before"),
    ],
)
def test_features_that_will_not_do_are_refused_in_one_line(name, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        dataset_info(name, data_dir=str(tmp_path))
    assert str(error.value).startswith(f"data.name={name!r}")
    assert "\n" not in str(error.value)


def test_a_value_without_a_name_counts_as_an_image_that_cant_be_read(tmp_path, caplog):
    write_text(tmp_path, "tiny_scenes", "ignored\npet\n")
    source = open_source("tiny_scenes", "train", data_dir=str(tmp_path), key="split")
    with pytest.raises(ImageError, match=r"its mask has the value [23]: expected 0 to 1"):
        source[0]


def test_depths_of_integers_are_divided_by_the_scale(tmp_path):
    write_text(tmp_path, "tiny_streets", "2", "depth_scale.txt")
    name = "tiny_streets#depth=segmentation_label"
    depth = open_source(name, "train[:1]", data_dir=str(tmp_path), key="split")[0]["label_map"]
    assert set(np.unique(depth)) <= {0.5, 1, 1.5}


def test_images_of_floats_are_decoded_as_tfds_does():
    depth = np.array([[0.5, 1e-3], [np.nan, -1]], np.float32)
    encoded = encode(depth[..., None].view(np.uint8))
    feature = f.Image(shape=(None, None, 1), dtype=np.float32)
    np.testing.assert_array_equal(feature.decode_example_np(encoded)[..., 0], depth)
    labels = PixelLabels("depth", floats=True)
    np.testing.assert_array_equal(
        labels.decode(encoded), np.array([[0.5, 1e-3], [0, 0]], np.float32)
    )
    for damaged in (encoded[:40], encode(np.zeros((2, 2), np.uint8))):
        with pytest.raises(ImageError, match="depth can't be read"):
            labels.decode(damaged)


GRAY = f.Image(shape=(None, None, 1))


@pytest.mark.parametrize(
    ("feature", "found"),
    [
        (GRAY, {"mask": "x", "depth": "y"}),
        (f.Image(shape=(None, None, 1), dtype=np.uint16), {"mask": "x", "depth": "y"}),
        (f.Image(shape=(None, None, 1), dtype=np.float32), {"depth": "y"}),
        (f.Image(shape=(None, None, 1), encoding_format="jpeg"), {}),
        (f.Tensor(shape=(4, 4, 1), dtype=np.bool_), {"mask": "x"}),
        (f.Tensor(shape=(None, None), dtype=np.float32), {"depth": "y"}),
        (f.Tensor(shape=(4, 4, 3), dtype=np.uint8), {}),
        (f.Tensor(shape=(), dtype=np.int64), {}),
        (f.ClassLabel(num_classes=3), {}),
        (f.Sequence(GRAY), {}),
    ],
    ids=lambda x: " ".join(repr(x).split())[:40],
)
def test_features_are_masks_and_depths_by_name_and_type(feature, found):
    names = {"x": "segmentation_mask", "y": "depth_map"}
    features = {"image": GRAY, **dict.fromkeys(names.values(), feature)}
    expected = {kind: names[name] for kind, name in found.items()}
    assert find_usual_maps(features, image="image") == expected


def test_the_only_image_in_colours_is_the_image():
    photo, other = f.Image(shape=(None, None, 3)), {"mask": GRAY, "depth": GRAY}
    assert find_image(other | {"photo": photo}, {}, name="x") == "photo"
    assert find_image(other | {"a": photo, "b": photo}, {}, name="x") is None
    assert find_image(other | {"a": photo, "image": GRAY}, {}, name="x") == "image"
