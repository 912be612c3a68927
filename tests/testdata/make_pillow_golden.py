# SPDX-License-Identifier: Apache-2.0
"""Writes what Pillow makes of two small images, for tests/data/ops/test_colors.py.

python tests/testdata/make_pillow_golden.py    (with Pillow and numpy; made with Pillow 13.0)
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

FACTORS = (0.0, 0.1, 0.55, 1.0, 1.45, 1.9, 2.8)
ENHANCE = {
    "adjust_brightness": ImageEnhance.Brightness,
    "adjust_contrast": ImageEnhance.Contrast,
    "adjust_saturation": ImageEnhance.Color,
    "adjust_sharpness": ImageEnhance.Sharpness,
}
RESIZE = {
    "bilinear_antialias": Image.Resampling.BILINEAR,
    "bicubic_antialias": Image.Resampling.BICUBIC,
    "lanczos_antialias": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
# Height and width: smaller, larger, one of each, a little smaller, very small.
SIZES = ((10, 8), (35, 28), (13, 40), (24, 19), (1, 2))


def make_image(height: int, width: int) -> np.ndarray:
    """A ramp with noise that does not use all values, each channel in its own way."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    ramps = np.stack([30 + 6 * x, 200 - 5 * y, 60 + x + 3 * y], -1)
    return np.clip(ramps + rng.normal(0, 25, ramps.shape), 5, 245).astype(np.uint8)


def main() -> None:
    image = make_image(26, 20)
    pillow = Image.fromarray(image)
    golden = {
        "grayscale()": pillow.convert("L").convert("RGB"),
        "invert()": ImageOps.invert(pillow),
        "autocontrast()": ImageOps.autocontrast(pillow),
        "equalize()": ImageOps.equalize(pillow),
        "solarize(128)": ImageOps.solarize(pillow),
        "solarize(40)": ImageOps.solarize(pillow, 40),
        "posterize(1)": ImageOps.posterize(pillow, 1),
        "posterize(4)": ImageOps.posterize(pillow, 4),
        "posterize(8)": ImageOps.posterize(pillow, 8),
    }
    for name, enhance in ENHANCE.items():
        golden |= {f"{name}({f})": enhance(pillow).enhance(f) for f in FACTORS}
    for name, method in RESIZE.items():
        golden |= {
            f"resize_image({h}, {w}, '{name}')": pillow.resize((w, h), method) for h, w in SIZES
        }
    path = Path(__file__).parent / "pillow.npz"
    arrays = {name: np.asarray(x) for name, x in golden.items()}
    np.savez_compressed(path, image=image, **arrays)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
