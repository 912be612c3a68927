# SPDX-License-Identifier: Apache-2.0
"""Writes what torchvision, timm and MAE draw and compute when they augment, for tests/data/ops.

python tests/testdata/make_timm_augment_golden.py MAE

MAE is a checkout of github.com/facebookresearch/mae (made at efb2a80). The interpreter has torch
2.14.1, torchvision 0.29.1, timm 1.0.31 and Pillow 13.0.

`torch/crops.npz` counts the heights, widths and places of crops for several sizes of images, and
has quantiles of their area: `tv` of torchvision, `timm` of timm, `byol` of MAE's linear probes.
`torch/policy.npz` has the images that each action of a policy of timm makes, with the bicubic
interpolation of DeiT; names end with the level.
"""

import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import torch
from make_pillow_golden import make_image
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms import functional

FOLDER = Path(__file__).parent / "torch"
DRAWS = 50_000
# Height, width, range of the area; aspects are 3/4 to 4/3.
CROPS = ((300, 400, (0.08, 1.0)), (224, 224, (0.2, 1.0)), (60, 400, (0.08, 1.0)), (9, 4, (0.08, 1)))
LEVELS = (0, 2, 9.3, 10, 12)
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def count(draw, height: int, width: int, area: tuple) -> tuple[np.ndarray, np.ndarray]:
    """`[4, longest side + 1]` counts of top, left, height and width; quantiles of the area."""
    image = torch.zeros(3, height, width)
    crops = np.array([draw(image, area, (3 / 4, 4 / 3)) for _ in range(DRAWS)])
    length = max(height, width) + 1
    counts = np.stack([np.bincount(x, minlength=length) for x in crops.T])
    share = np.sort(crops[:, 2] * crops[:, 3]) / (height * width)
    return counts, share[:: DRAWS // 1000].astype(np.float32)


def count_crops(mae: str) -> dict[str, np.ndarray]:
    functional._get_image_size = functional.get_image_size  # Its name when MAE was written.
    spec = importlib.util.spec_from_file_location("crop", Path(mae) / "util" / "crop.py")
    byol = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(byol)
    draws = {
        "tv": transforms.RandomResizedCrop.get_params,
        "timm": RandomResizedCropAndInterpolation.get_params,
        "byol": byol.RandomResizedCrop.get_params,
    }
    golden = {}
    for name, draw in draws.items():
        for number, case in enumerate(CROPS):
            counts, area = count(draw, *case)
            golden |= {f"{name} counts {number}": counts, f"{name} area {number}": area}
            print(f"{name} {case}: mean area {area.mean():.4f}")
    return golden


def run_policy() -> dict[str, np.ndarray]:
    image = make_image(26, 20)
    golden = {"image": image}
    hparams = {
        "img_mean": (124, 116, 104),
        "interpolation": Image.Resampling.BICUBIC,
        "magnitude_max": 20,
    }
    for sign in (1, -1):
        auto_augment._randomly_negate = lambda value, sign=sign: sign * value
        for level in LEVELS:
            for name in (*GEOMETRIC, "SolarizeAdd", "SolarizeIncreasing"):
                action = auto_augment.AugmentOp(name, prob=1, magnitude=level, hparams=hparams)
                golden[f"{name} {sign * level}"] = np.asarray(action(Image.fromarray(image)))
    return golden


if __name__ == "__main__":
    torch.manual_seed(0)
    random.seed(0)
    for name, arrays in (("crops", count_crops(sys.argv[1])), ("policy", run_policy())):
        path = FOLDER / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"wrote {path}, {path.stat().st_size} bytes")
