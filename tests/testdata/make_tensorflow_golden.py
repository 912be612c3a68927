# SPDX-License-Identifier: Apache-2.0
"""Writes what TensorFlow draws and computes in AugReg's input pipeline, for tests/data/ops.

python tests/testdata/make_tensorflow_golden.py BIG_VISION

BIG_VISION is a checkout of github.com/google-research/big_vision (made at 0127fb6). The interpreter
has tensorflow-cpu 2.15.1, tensorflow-addons 0.23.0 and NumPy 1.23.5: RandAugment there needs the
addons, and later versions of NumPy refuse the threshold of 256 in a comparison with uint8.

`tensorflow/crops.npz` counts the heights, widths and places of crops for several sizes of images,
and has quantiles of their area. `tensorflow/randaug.npz` has the images that each action makes.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

# The convolution of TensorFlow itself, which the published models were trained with.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
import tensorflow as tf

FOLDER = Path(__file__).parent / "tensorflow"
DRAWS = 100_000
# Height, width, range of the area, range of the aspect (None for the default of TensorFlow).
CROPS = (
    (300, 400, (0.05, 1.0), None),
    (400, 300, (0.05, 1.0), None),
    (224, 224, (0.05, 1.0), None),
    (97, 131, (0.05, 1.0), None),
    (60, 400, (0.05, 1.0), None),
    (8, 11, (0.05, 1.0), None),
    (2, 3, (0.05, 1.0), None),
    (1, 1, (0.05, 1.0), None),
    (200, 150, (0.2, 0.6), (0.5, 2.0)),
)
LEVELS = (0, 2, 10, 15, 20, 25)
CENTRES = ((0, 0), (13, 10), (25, 19))
UNLEVELLED = ("AutoContrast", "Equalize", "Invert")
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def draw_crops(height: int, width: int, area: tuple, aspect: tuple | None) -> np.ndarray:
    """Top, left, height and width of `DRAWS` crops."""
    options = {} if aspect is None else {"aspect_ratio_range": aspect}

    def draw(number: tf.Tensor) -> tf.Tensor:
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            (height, width, 3),
            tf.zeros([0, 0, 4], tf.float32),
            seed=tf.stack([number, 7]),
            area_range=area,
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
            **options,
        )
        return tf.concat([begin[:2], size[:2]], 0)

    data = tf.data.Dataset.range(DRAWS).map(draw).batch(DRAWS)
    size = next(iter(data)).numpy()
    size[:, 2:] = np.where(size[:, 2:] < 0, (height, width) - size[:, :2], size[:, 2:])
    return size


def count_crops() -> dict[str, np.ndarray]:
    """For each case, `[4, longest side + 1]` counts of top, left, height and width; quantiles."""
    golden = {}
    for number, (height, width, area, aspect) in enumerate(CROPS):
        crops = draw_crops(height, width, area, aspect)
        length = max(height, width) + 1
        golden[f"counts_{number}"] = np.stack([np.bincount(x, minlength=length) for x in crops.T])
        share = np.sort(crops[:, 2] * crops[:, 3]) / (height * width)
        golden[f"area_{number}"] = share[:: DRAWS // 1000].astype(np.float32)
        print(f"{height} x {width}: mean area {share.mean():.4f}")
    return golden


def make_image(height: int, width: int) -> np.ndarray:
    """A ramp with noise that does not use all values, each channel in its own way."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    ramps = np.stack([30 + 6 * x, 200 - 5 * y, 60 + x + 3 * y], -1)
    return np.clip(ramps + rng.normal(0, 25, ramps.shape), 5, 245).astype(np.uint8)


def make_places(height: int, width: int) -> np.ndarray:
    """An image whose pixels hold their row and column, and 255."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 255)], -1).astype(np.uint8)


def act(module, name: str, level: float, image: np.ndarray, *, sign: int = 1) -> np.ndarray:
    """What an action makes of an image, in a graph as in an input pipeline."""
    module._randomly_negate_tensor = lambda x: sign * tf.convert_to_tensor(x, tf.float32)
    hparams = module.HParams(cutout_const=40, translate_const=100)

    @tf.function
    def run(x: tf.Tensor) -> tf.Tensor:
        function, _, arguments = module._parse_policy_info(
            name, 1.0, float(level), [128] * 3, hparams
        )
        return function(x, *arguments)

    return run(tf.constant(image)).numpy()


def run_actions(module) -> dict[str, np.ndarray]:
    image = make_image(26, 20)
    golden = {"image": image}
    actions = module.NAME_TO_FUNC.keys() - {*UNLEVELLED, *SIGNED, "Cutout"}
    golden |= {f"{name} 0": act(module, name, 0, image) for name in UNLEVELLED}
    for level in LEVELS:
        golden |= {f"{name} {level}": act(module, name, level, image) for name in sorted(actions)}
        for sign in (1, -1):
            golden |= {
                f"{name} {sign * level}": act(module, name, level, image, sign=sign)
                for name in SIGNED
            }
        for row, column in CENTRES:
            with mock.patch.object(module.tf, "random_uniform", side_effect=(row, column)):
                golden[f"Cutout {level} {row} {column}"] = act(module, "Cutout", level, image)
    # Contrast depends on the size of the image, rotation on rounding far from the centre.
    golden["large"] = make_image(300, 240)[::10, ::10]
    for level in (0, 2, 15):
        large = act(module, "Contrast", level, make_image(300, 240))
        golden[f"large Contrast {level}"] = large[::10, ::10]
    for name in SIGNED:
        for level in (7, -20):
            places = act(module, name, abs(level), make_places(224, 223), sign=np.sign(level))
            golden[f"places {name} {level}"] = places[::7, ::5]
    return golden


def load_autoaugment(folder: str):
    sys.path.insert(0, folder)
    from big_vision.pp.archive import autoaugment

    return autoaugment


def save(name: str, make: Callable[[], dict[str, np.ndarray]]) -> None:
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / name, **make())
    print(f"wrote {FOLDER / name}, {(FOLDER / name).stat().st_size} bytes")


if __name__ == "__main__":
    save("crops.npz", count_crops)
    save("randaug.npz", lambda: run_actions(load_autoaugment(sys.argv[1])))
