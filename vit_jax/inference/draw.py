# SPDX-License-Identifier: Apache-2.0
"""Pictures from arrays, with numpy and Pillow.

Gaps between tiles are transparent and lines are grey, so pictures suit light and dark pages.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GREY = (128, 128, 128, 255)
_FAINT = (128, 128, 128, 70)
_GAP = 2  # pixels between tiles

# From dark violet to yellow, perceptually uniform, also for colour-blind readers.
_HEX = "440154 482878 3e4a89 31688e 26828e 1f9e89 35b779 6dcd59 b4de2c fde725"
_COLORS = np.array([[*bytes.fromhex(color)] for color in _HEX.split()], np.float64)


def colorize(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Maps floats `[...]` to colours, uint8 `[..., 3]`: dark at `low`, bright at `high`."""
    place = (values - low) / max(high - low, 1e-12)
    place = place.clip(0, 1) * (len(_COLORS) - 1)
    below = np.minimum(place.astype(int), len(_COLORS) - 2)
    share = (place - below)[..., None]
    return np.round((1 - share) * _COLORS[below] + share * _COLORS[below + 1]).astype(np.uint8)


def scale_up(image: np.ndarray, size: int, *, smooth: bool = False) -> np.ndarray:
    """Enlarges an image until its longer side has `size` pixels or more.

    Args:
      image: uint8 `[height, width, 3]`; it is never made smaller.
      size: pixels of the longer side; reached exactly with `smooth`, else by repeating pixels.

    Returns:
      uint8 `[larger height, larger width, 3]`.
    """
    longer = max(image.shape[:2])
    if smooth:
        factor = max(size / longer, 1)
        height, width = (round(side * factor) for side in image.shape[:2])
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(resized)
    times = max(-(-size // longer), 1)
    return image.repeat(times, axis=0).repeat(times, axis=1)


def overlay(image: np.ndarray, heat: np.ndarray, *, opacity: float = 0.6) -> np.ndarray:
    """Blends the colours of a map with an image.

    Args:
      image: uint8 `[height, width, 3]`.
      heat: float `[rows, columns]`; it is interpolated to the size of the image.
      opacity: weight of the colours, 0 to 1.

    Returns:
      uint8 `[height, width, 3]`.
    """
    height, width = image.shape[:2]
    smooth = Image.fromarray(heat.astype(np.float32))
    smooth = smooth.resize((width, height), Image.Resampling.BILINEAR)
    colors = colorize(np.asarray(smooth), float(heat.min()), float(heat.max()))
    return np.round((1 - opacity) * image + opacity * colors).astype(np.uint8)


def outline(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Draws a white frame with black edges on an image, uint8 `[height, width, 3]`.

    The frame is inside `box`: top, left, bottom and right.
    """
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    top, left, bottom, right = box
    draw.rectangle((left, top, right - 1, bottom - 1), outline=(0, 0, 0), width=3)
    draw.rectangle((left + 1, top + 1, right - 2, bottom - 2), outline=(255, 255, 255))
    return np.asarray(picture)


def sheet(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Arranges tiles of one size, uint8 `[height, width, 3]`, in rows; rows may be shorter."""
    height, width = rows[0][0].shape[:2]
    height, width = height + _GAP, width + _GAP
    size = (max(map(len, rows)) * width - _GAP, len(rows) * height - _GAP)
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            picture.paste(Image.fromarray(tile), (j * width, i * height))
    return picture


def plot_by_layer(values: np.ndarray, *, label: str) -> Image.Image:
    """Plots a dot for each head above its layer, at twice the size, for high-density screens.

    `values` are float `[layers, heads]`, not negative; `label` is that of the vertical axis.
    """
    width, height, left, bottom, top = 680, 460, 70, 70, 56
    picture = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(22)
    layers = len(values)
    step = _round_step(float(values.max()) / 4)
    ticks = int(np.ceil(values.max() / step)) or 1

    def place(layer: float, value: float) -> tuple[float, float]:
        x = left + (width - left - 20) * (layer + 0.5) / layers
        return x, height - bottom - (height - bottom - top) * value / (ticks * step)

    for i in range(ticks + 1):
        y = place(0, i * step)[1]
        draw.line((left, y, width - 20, y), fill=_GREY if i == 0 else _FAINT, width=2)
        draw.text((left - 14, y), f"{i * step:g}", fill=_GREY, font=font, anchor="rm")
    for layer in range(0, layers, -(-layers // 12)):
        x = place(layer, 0)[0]
        draw.text((x, height - bottom + 12), str(layer + 1), fill=_GREY, font=font, anchor="mt")
    draw.text((0, 4), label, fill=_GREY, font=font, anchor="lt")
    draw.text((width - 20, height - 4), "layer", fill=_GREY, font=font, anchor="rb")
    hues = colorize(np.arange(values.shape[1], dtype=float), -1, values.shape[1])
    for layer, row in enumerate(values):
        for value, hue in zip(row, hues, strict=True):
            x, y = place(layer, float(value))
            color = (*map(int, hue), 255)
            draw.ellipse((x - 7, y - 7, x + 7, y + 7), fill=color, outline=_GREY)
    return picture


def _round_step(step: float) -> float:
    """Rounds up to one of ..., 1, 2, 5, 10, 20, ..."""
    power = 10 ** np.floor(np.log10(max(step, 1e-9)))
    return float(next(power * m for m in (1, 2, 5, 10) if power * m >= step))


def encode_jpeg(picture: Image.Image) -> bytes:
    """Encodes a picture without transparency as JPEG."""
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "JPEG", quality=90)
    return stream.getvalue()


def encode_png(picture: Image.Image) -> bytes:
    """Encodes a picture as a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()
