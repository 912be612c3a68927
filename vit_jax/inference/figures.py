# SPDX-License-Identifier: Apache-2.0
"""Figures of a model and of how it processes an image.

The figures of the model follow figures 7 and 11 of arXiv:2010.11929.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from vit_jax.inference import attention as attention_lib
from vit_jax.inference import draw
from vit_jax.inference.model import LoadedModel
from vit_jax.models.positions import FIXED_POSITIONS, fixed_positions
from vit_jax.models.vit import VisionTransformer
from vit_jax.utils.tree import flatten

# Least pixels of the longer side of a tile in a sheet, and of a single picture.
_TILE = 56
_LARGE = 224
_COMPONENTS = 28
_MAX_POSITIONS = 14  # tiles in a row
_QUERIES = 3  # query patches in a row of the similarity figure


# The first layer of a hybrid, of a Vision Transformer and of a Mixer.
_EMBEDDINGS = ("conv_root/kernel", "embedding/kernel", "stem/kernel")


@dataclasses.dataclass(frozen=True)
class Figure:
    """An RGBA picture with its texts.

    Attributes:
      name: name of its file, without a suffix.
      density: pixels of the picture for one pixel of the page.
    """

    name: str
    title: str
    caption: str
    picture: Image.Image
    density: int = 1


@dataclasses.dataclass(frozen=True)
class View:
    """An image with the model's tokens and attention weights.

    Attributes:
      image: uint8 `[height, width, 3]`, as the model sees it.
      patches: tokens of the patches after the last block, float32 `[rows, columns, hidden_size]`.
      attention: weights, float32 `[layers, heads, length, length]`; None without attention.
    """

    image: np.ndarray
    patches: np.ndarray
    attention: np.ndarray | None


def make_view(model: LoadedModel, image: np.ndarray) -> View:
    """Runs the model on an image from `LoadedModel.preprocess`, uint8 `[height, width, 3]`."""
    module = model.module
    encoded = model.features(image, "encoded")[0]
    rows, columns = module.grid(model.image_shape[:2])
    patches = encoded[module.num_prefix_tokens :].reshape(rows, columns, -1)
    attention = model.attention(image)[0] if has_attention(model) else None
    return View(image, patches, attention)


def has_attention(model: LoadedModel) -> bool:
    """Whether the model is a Vision Transformer."""
    return isinstance(model.module, VisionTransformer)


def draw_filters(model: LoadedModel) -> Figure:
    """The filters of the first layer, or their principal components."""
    flat = flatten(model.params)
    root = flat.get("conv_root/kernel")
    if root is not None:
        kernels = np.moveaxis(np.asarray(root), -1, 0)
        caption = "Each tile is a filter of the first convolution of the ResNet."
    else:
        kernel = np.asarray(next(flat[path] for path in _EMBEDDINGS if path in flat))
        filters = kernel.reshape(-1, kernel.shape[-1]).T
        components, _ = attention_lib.principal_components(filters, _COMPONENTS)
        kernels = components.reshape(-1, *kernel.shape[:-1])
        count = len(kernels)
        caption = f"The first {count} principal components of the filters of the patch embedding."
    kernels = kernels / np.maximum(np.abs(kernels).max(axis=(1, 2, 3), keepdims=True), 1e-12)
    images = np.round(127.5 + 127.5 * kernels).astype(np.uint8)
    tiles = [draw.scale_up(image, _TILE) for image in images]
    columns = 7 if root is None else 8
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    return Figure("filters", "First-layer filters", f"{caption} Grey is 0.", draw.sheet(rows))


def draw_positions(model: LoadedModel) -> Figure:
    """The cosine similarity of position embeddings."""
    module = model.module
    rows, columns = module.posemb_grid or module.grid(model.image_shape[:2])
    positions = fixed_positions(module.position_embedding, (rows, columns), module.hidden_size)
    if positions is None:
        learned = flatten(model.params)["Transformer/posembed_input/pos_embedding"]
        positions = np.asarray(learned)[:, module.num_class_tokens :]
    similar = attention_lib.cosine_similarity(positions[0]).reshape(rows, columns, rows, columns)
    every = -(-max(rows, columns) // _MAX_POSITIONS)
    chosen = similar[every // 2 :: every, every // 2 :: every]
    tiles = [[draw.scale_up(draw.colorize(t, -1, 1), _TILE) for t in row] for row in chosen]
    caption = (
        "Each tile has the place of its patch, and shows the cosine similarity of that patch's "
        "position embedding with those of all patches: dark is -1, bright is 1."
    )
    if every > 1:
        caption += f" One patch of {every} by {every} is shown."
    return Figure("positions", "Position embeddings", caption, draw.sheet(tiles))


def draw_distances(model: LoadedModel, views: list[View]) -> Figure:
    """The mean attention distance of each head."""
    module = model.module
    prefix, grid = module.num_prefix_tokens, module.grid(model.image_shape[:2])
    measure = functools.partial(
        attention_lib.mean_distances, prefix=prefix, grid=grid, stride=module.stride
    )
    weights = [view.attention for view in views if view.attention is not None]
    distances = np.mean([measure(w) for w in weights], axis=0)
    caption = (
        f"Each dot is a head: the distance from a patch to where it looks, weighted by attention, "
        f"mean over patches and {len(views)} image{'s' if len(views) > 1 else ''}."
    )
    picture = draw.plot_by_layer(distances, label="mean attention distance (pixels)")
    return Figure("distance", "Attention distance", caption, picture, density=2)


def draw_attention(model: LoadedModel, view: View) -> Figure:
    """The attention weights of each head of each layer."""
    assert view.attention is not None
    maps = _to_grid(model, view.attention)
    tiles = [[_tile(heat) for heat in heads] for heads in maps]
    caption = (
        f"Rows are layers, 1 to {len(maps)} from the top; columns are heads, 1 to {len(maps[0])}. "
        f"Shown is what {_subject(model)} takes from each patch; each tile is as bright as its "
        "largest weight."
    )
    return Figure("attention", "Attention by head", caption, draw.sheet(tiles))


def draw_rollout(model: LoadedModel, view: View) -> Figure:
    """The attention rollout of an image."""
    assert view.attention is not None
    heat = _to_grid(model, attention_lib.rollout(view.attention))
    large = draw.scale_up(view.image, _LARGE)
    colors = draw.colorize(heat, 0.0, float(heat.max()))
    caption = (
        "The image as the model sees it; attention rolled out over all layers, with residual "
        f"connections, to {_subject(model)}; and both together."
    )
    picture = draw.sheet([[large, _stretch(colors, large), draw.overlay(large, heat)]])
    return Figure("rollout", "Attention rollout", caption, picture)


def overlay_rollout(model: LoadedModel, image: np.ndarray, *, size: int = 448) -> Image.Image:
    """The attention rollout over an image, uint8 `[height, width, 3]`.

    `size` is the number of pixels of the longer side of the picture.
    """
    heat = _to_grid(model, attention_lib.rollout(model.attention(image)[0]))
    large = draw.scale_up(image, size, smooth=True)
    return Image.fromarray(draw.overlay(large, heat))


def draw_similarity(model: LoadedModel, view: View) -> Figure:
    """The cosine similarity of some patches to all others."""
    rows, columns, width = view.patches.shape
    similar = attention_lib.cosine_similarity(view.patches.reshape(-1, width))
    similar = similar.reshape(rows, columns, rows, columns)
    scale = max(-(-2 * _TILE // max(rows, columns)), 8)

    def frame(i: int, j: int) -> np.ndarray:
        colors = draw.colorize(similar[i, j], float(similar.min()), 1.0)
        tile = colors.repeat(scale, axis=0).repeat(scale, axis=1)
        return draw.outline(tile, (i * scale, j * scale, (i + 1) * scale, (j + 1) * scale))

    tiles = [[frame(i, j) for j in _spread(columns)] for i in _spread(rows)]
    caption = (
        "Cosine similarity of the framed patch with all others, after the last block: "
        f"dark is {similar.min():.2f}, bright is 1."
    )
    return Figure("similarity", "Patch similarity", caption, draw.sheet(tiles))


def draw_pca(model: LoadedModel, view: View) -> Figure:
    """The first principal components of patch tokens as colours."""
    rows, columns, width = view.patches.shape
    _, places = attention_lib.principal_components(view.patches.reshape(-1, width), 3)
    places = np.pad(places, ((0, 0), (0, 3 - places.shape[1])))
    low, high = places.min(axis=0), places.max(axis=0)
    shares = (places - low) / np.maximum(high - low, 1e-12)
    colors = np.round(255 * shares).astype(np.uint8).reshape(rows, columns, 3)
    large = draw.scale_up(view.image, _LARGE)
    caption = (
        "The first three principal components of this image's patches after the last block, as "
        "red, green and blue: patches of one colour are alike."
    )
    return Figure(
        "pca", "Tokens as colours", caption, draw.sheet([[large, _stretch(colors, large)]])
    )


OF_MODEL: dict[str, Callable[..., Figure]] = {"filters": draw_filters, "positions": draw_positions}
OF_VIEWS: dict[str, Callable[..., Figure]] = {"distance": draw_distances}
OF_IMAGE: dict[str, Callable[..., Figure]] = {
    "attention": draw_attention,
    "rollout": draw_rollout,
    "similarity": draw_similarity,
    "pca": draw_pca,
}


def find_impossible(model: LoadedModel) -> dict[str, str]:
    """The figures that cannot be drawn for this model, with the reasons."""
    reasons: dict[str, str] = {}
    if not has_attention(model):
        reasons |= dict.fromkeys(
            ("attention", "rollout", "distance"), "the model has no attention, as a Mixer"
        )
    if not hasattr(model.module, "num_prefix_tokens") or "encoded" not in model.layers:
        reasons |= dict.fromkeys(("similarity", "pca"), "the model gives no tokens of patches")
    if not any(path in flatten(model.params) for path in _EMBEDDINGS):
        reasons["filters"] = "the model embeds no patches by a convolution of a known name"
    kind: Any = getattr(model.module, "position_embedding", "none")
    if kind != "learned" and kind not in FIXED_POSITIONS:
        reasons["positions"] = (
            "the model has position embeddings of rows and of columns"
            if kind == "factorized"
            else "the model adds no position embeddings"
        )
    return reasons


def _to_grid(model: LoadedModel, weights: np.ndarray) -> np.ndarray:
    """Turns weights `[..., length, length]` into maps of the image, `[..., rows, columns]`."""
    module = model.module
    row = attention_lib.image_row(
        weights, num_class_tokens=module.num_class_tokens, prefix=module.num_prefix_tokens
    )
    return row.reshape(*row.shape[:-1], *module.grid(model.image_shape[:2]))


def _subject(model: LoadedModel) -> str:
    return "the class token" if model.module.num_class_tokens else "a patch, on average,"


def _tile(heat: np.ndarray) -> np.ndarray:
    return draw.scale_up(draw.colorize(heat, 0.0, float(heat.max())), _TILE)


def _stretch(colors: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Repeats pixels up to the size of an image."""
    size = image.shape[1::-1]
    return np.asarray(Image.fromarray(colors).resize(size, Image.Resampling.NEAREST))


def _spread(count: int) -> list[int]:
    """A few indices below `count`, evenly spaced."""
    number = min(count, _QUERIES)
    return [int((i + 0.5) * count / number) for i in range(number)]
