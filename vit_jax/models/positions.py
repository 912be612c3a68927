# SPDX-License-Identifier: Apache-2.0
"""The grid of patches, and positions on it: computed, or learned and then resized.

Sine-cosine and rotary embeddings are functions of the row and the column of a patch, so they fit a
grid of any size and shape. Learned embeddings are interpolated to fit another grid.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.resampling import Method, resize_matrix
from vit_jax.utils.errors import UserError

# What the positions of a rotary embedding are, see `rotation_2d`.
RopeCoordinates = Literal["index", "centered"]

# Values of `model.position_embedding` that are computed, and the `endpoint` of `sincos_2d`.
FIXED_POSITIONS = {"sincos2d": True, "sincos2d_mae": False}


class CoordinateNoise(NamedTuple):
    """How the coordinates of patches vary in training, each once for all images of a call.

    `shift` adds to each axis an offset from (-shift, shift). `jitter` multiplies each axis, and
    `rescale` both axes, by a factor whose logarithm is uniform, from (1 / jitter, jitter). None for
    no change. Source: arXiv:2508.10104, section 3.2, and `pos_embed_shift`, `pos_embed_jitter` and
    `pos_embed_rescale` of Hugging Face's DINOv3.
    """

    shift: float | None = None
    jitter: float | None = None
    rescale: float | None = None


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each pair of channels, each repeated for both channels.

    Both are float32 `[length, head_dim]`, or `[batch, length, head_dim]`.
    """

    cos: jax.Array
    sin: jax.Array


class Coordinates(NamedTuple):
    """Rows and columns of tokens, float32 `[length, 2]` or `[batch, length, 2]`; 0 for others."""

    positions: jax.Array


@dataclasses.dataclass(frozen=True)
class Relative:
    """Which bias the attention of each query to each key has.

    Attributes:
      index: int32 `[queries, keys]`, or `[batch, queries, keys]`.
      count: of biases.
    """

    index: jax.Array
    count: int

    def take(self, kept: jax.Array) -> "Relative":
        """Returns that of the tokens `kept`, int32 `[batch, kept]`."""
        index = self.index[kept[:, :, None], kept[:, None, :]]
        return dataclasses.replace(self, index=index)


def patch_grid(
    image_size: tuple[int, ...], stride: tuple[int, int], *, drop_pixels: bool = False
) -> tuple[int, int]:
    """Returns the rows and columns of patches in an image of (height, width) pixels.

    Raises `UserError` if `stride`, (height, width) of a patch in pixels, does not divide the image,
    or with `drop_pixels`, if no patch fits.
    """
    for size, step in zip(image_size, stride, strict=True):
        if size < step if drop_pixels else size % step:
            raise UserError(
                f"an image of {image_size[0]}x{image_size[1]} can't be cut into patches of "
                f"{stride[0]}x{stride[1]}: set model.patch_size to a divisor, or resize in "
                "data.preprocess"
            )
    return image_size[0] // stride[0], image_size[1] // stride[1]


def sincos_2d(
    grid: tuple[int, int], width: int, *, temperature: float = 10_000.0, endpoint: bool = True
) -> np.ndarray:
    """Returns fixed 2D position embeddings, float32 `[1, rows * columns, width]`.

    The four quarters of the channels hold sin(x w), cos(x w), sin(y w) and cos(y w). The
    frequencies w fall from 1 to 1 / temperature in equal ratios; 1 / temperature is included
    (arXiv:2205.01580), or excluded without `endpoint` (arXiv:2111.06377).
    """
    frequencies = temperature ** -np.linspace(0, 1, width // 4, endpoint=endpoint)
    rows, columns = np.indices(grid).reshape(2, -1, 1) * frequencies
    channels = [np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)]
    return np.concatenate(channels, axis=1)[None].astype(np.float32)


def fixed_positions(kind: str | None, grid: tuple[int, int], width: int) -> np.ndarray | None:
    """Returns what `sincos_2d` does for a fixed `model.position_embedding`, and None for others."""
    if kind not in FIXED_POSITIONS:
        return None
    return sincos_2d(grid, width, endpoint=FIXED_POSITIONS[kind])


def rotation_2d(
    grid: tuple[int, int],
    head_dim: int,
    *,
    theta: float,
    num_prefix_tokens: int,
    reference_grid: tuple[int, int] | None = None,
    offset: float = 0.0,
    coordinates: RopeCoordinates = "index",
    noise: CoordinateNoise | None = None,
    rng: jax.Array | None = None,
) -> Rotation:
    """Returns an axial 2D rotary embedding, `[num_prefix_tokens + rows * columns, head_dim]`.

    The first half of the channels turns with the row, the second with the column. The angle of
    pair j of an axis is position * theta^(-4 j / head_dim). Prefix tokens, which have no position,
    are not turned. `head_dim`, the number of channels of a head, must divide by 4.

    Positions are 0, 1, 2, ... plus `offset`, which matters to prefix tokens alone. With a
    `reference_grid` of (rows, columns), they are those multiplied by its size over that of `grid`,
    so that any grid spans the positions of the reference. If
    `centered`, they are 2 pi times the coordinates of the centres of patches in (-1, 1), whatever
    the grid; these vary by `noise`, drawn from `rng`, if there is one.

    Sources: arXiv:2104.09864; in 2D: arXiv:2403.13298, section 3.2 ("axial"); the reference grid:
    arXiv:2303.11331 (EVA-02), and `ref_feat_shape` of timm; `centered`: arXiv:2508.10104 (DINOv3).
    """
    frequencies = _rotation_frequencies(head_dim, theta)
    indices = np.indices(grid).reshape(2, -1, 1)
    np_or_jnp: Any = np
    if coordinates == "centered":
        positions = 2 * (indices + 0.5) / np.reshape(grid, (2, 1, 1)) - 1
        if noise is not None and rng is not None:
            positions, np_or_jnp = _move(positions, noise, rng), jnp
        positions = 2 * math.pi * positions
    else:
        positions = (indices + offset) * np.divide(reference_grid or grid, grid).reshape(2, 1, 1)
    angles = positions * frequencies
    angles = np_or_jnp.repeat(np_or_jnp.concatenate(list(angles), axis=1), 2, axis=1)
    angles = np_or_jnp.concatenate([np.zeros((num_prefix_tokens, head_dim)), angles])
    return Rotation(
        cos=jnp.asarray(np_or_jnp.cos(angles), jnp.float32),
        sin=jnp.asarray(np_or_jnp.sin(angles), jnp.float32),
    )


def _move(coordinates: np.ndarray, noise: CoordinateNoise, rng: jax.Array) -> jax.Array:
    """Moves coordinates `[2, patches, 1]` as `noise` says; the result is float32."""
    moved = jnp.asarray(coordinates, jnp.float32)
    keys = jax.random.split(rng, 3)
    if noise.shift:
        moved += jax.random.uniform(keys[0], (2, 1, 1), minval=-noise.shift, maxval=noise.shift)
    for key, shape, largest in ((keys[1], (2, 1, 1), noise.jitter), (keys[2], (), noise.rescale)):
        if largest:
            moved *= jnp.exp(math.log(largest) * jax.random.uniform(key, shape, minval=-1.0))
    return moved


def _rotation_frequencies(head_dim: int, theta: float) -> np.ndarray:
    return theta ** -(4 * np.arange(head_dim // 4) / head_dim)


def rotation_of(
    coordinates: jax.Array,
    sizes: jax.Array,
    head_dim: int,
    *,
    theta: float,
    num_prefix_tokens: int,
    reference_grid: tuple[int, int] | None = None,
    offset: float = 0.0,
    centered: bool = False,
) -> Rotation:
    """Returns `rotation_2d` for patches at given places, `[batch, prefix + tokens, head_dim]`.

    Takes the row and column of each patch, and the rows and columns of its image, both int32
    `[batch, tokens, 2]`.
    """
    places = coordinates.astype(jnp.float32)
    places = places + offset if offset else places
    if centered:
        places = 2 * math.pi * (2 * (places + 0.5) / sizes - 1)
    elif reference_grid is not None:
        places = places * (jnp.asarray(reference_grid, jnp.float32) / sizes)
    frequencies = jnp.asarray(_rotation_frequencies(head_dim, theta), jnp.float32)
    angles = places[..., None] * frequencies
    angles = jnp.repeat(angles.reshape(*angles.shape[:2], -1), 2, axis=-1)
    angles = jnp.pad(angles, ((0, 0), (num_prefix_tokens, 0), (0, 0)))
    return Rotation(cos=jnp.cos(angles), sin=jnp.sin(angles))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates each pair (2 j, 2 j + 1) of channels by the angles of each token.

    Takes `[batch, length, heads, head_dim]` of any floating dtype; shape and dtype are kept.
    """
    cos, sin = (table[..., None, :] for table in rotation)
    return _turn(x, cos, sin)


def _turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    even, odd = x[..., ::2], x[..., 1::2]
    turned = jnp.stack([-odd, even], axis=-1).reshape(x.shape)
    return (x * cos + turned * sin).astype(x.dtype)


def locate_tokens(grid: tuple[int, int], num_prefix_tokens: int) -> Coordinates:
    """Returns the rows and columns of prefix tokens, which have none, and of patches."""
    places = np.indices(grid).reshape(2, -1).T
    return Coordinates(jnp.asarray(np.pad(places, ((num_prefix_tokens, 0), (0, 0))), jnp.float32))


def rotate_by(x: jax.Array, coordinates: Coordinates, frequencies: jax.Array) -> jax.Array:
    """Rotates pairs of channels by angles with learned frequencies, in rows and in columns.

    Pair j of a head is turned by the row times one frequency plus the column times another. Takes
    `[batch, length, heads, head_dim]` of any floating dtype, whose shape and dtype are kept, and
    `[2, heads, head_dim / 2]`. Source: arXiv:2403.13298, section 3.2 ("mixed").
    """
    angles = jnp.einsum("...na,ahj->...nhj", coordinates.positions, frequencies)
    cos, sin = (jnp.repeat(table, 2, axis=-1) for table in (jnp.cos(angles), jnp.sin(angles)))
    return _turn(x, cos, sin)


def initial_frequencies(rng: jax.Array, shape: tuple[int, ...], theta: float) -> jax.Array:
    """Draws the frequencies of `rotate_by`: those of `rotation_2d` for axes turned at random.

    `shape` is `(2, heads, head_dim / 2)`; each head has an angle of its own. float32.
    """
    _, heads, pairs = shape
    size = jnp.asarray(_rotation_frequencies(2 * pairs, theta), jnp.float32)
    angle = 2 * math.pi * jax.random.uniform(rng, (heads, 1))
    turned = jnp.concatenate([angle, angle + math.pi / 2], axis=1)[..., None]
    rows, columns = size * jnp.sin(turned), size * jnp.cos(turned)
    return jnp.stack([rows.reshape(heads, pairs), columns.reshape(heads, pairs)])


def relate_tokens(grid: tuple[int, int], num_prefix_tokens: int) -> Relative:
    """Returns an index by the distance in rows and columns, `[length, length]`.

    The first biases are those of patches, row by row from the most negative distance, of the query
    minus the key. The last three are of prefix tokens to patches, of patches to prefix tokens, and
    among prefix tokens. Source: arXiv:2106.08254, and `gen_relative_position_index` of timm.
    """
    rows, columns = grid
    places = np.indices(grid).reshape(2, -1)
    down, right = places[:, :, None] - places[:, None, :] + np.reshape(grid, (2, 1, 1)) - 1
    distances = (2 * rows - 1) * (2 * columns - 1)
    index = np.pad(down * (2 * columns - 1) + right, ((num_prefix_tokens, 0),) * 2)
    index[:num_prefix_tokens] = distances
    index[:, :num_prefix_tokens] = distances + 1
    index[:num_prefix_tokens, :num_prefix_tokens] = distances + 2
    return Relative(jnp.asarray(index, jnp.int32), distances + 3)


def resize_posemb(
    posemb: np.ndarray,
    *,
    source_grid: tuple[int, int],
    target_grid: tuple[int, int],
    num_prefix_tokens: int,
    method: Method = "bilinear",
) -> np.ndarray:
    """Interpolates position embeddings from one grid of patches to another.

    "bilinear" aligns corners: the first and the last row (column) keep their values, and the others
    are evenly spaced between them; a single row takes the first. The published checkpoints were
    fine-tuned, and their accuracies measured, with this rule. The other rules have half-pixel
    centres, so they sample at other positions and give other logits:

    - "bicubic" has Keys' kernel with a = -0.5, widened if the grid becomes smaller, and cut off at
      the border: `resample_abs_pos_embed` of timm, and Hugging Face's DINOv2 with registers.
    - "bicubic_no_antialias" has the kernel with a = -0.75, never widened, and repeats the border:
      `interpolate_pos_encoding` of Hugging Face's ViT, DeiT, DINOv2 and I-JEPA.
    - "bilinear_half_pixel" is without antialiasing too: timm's rule for FlexiViT.
    - "bilinear_antialias" is widened if the grid becomes smaller: FlexiViT and the SigLIP 2 of
      any resolution (NaFlex), as they were trained.

    Source: Dosovitskiy et al., arXiv:2010.11929, section 3.2 ("2D interpolation"), done there by
    `scipy.ndimage.zoom(order=1)`. That call also zeroes the last row and column for some pairs
    of sizes (28 to 48), where a position is rounded past the last one; this function does not.

    Args:
      posemb: `[1, num_prefix_tokens + rows * columns, width]`, any float dtype.
      source_grid: (rows, columns) of `posemb`.
      target_grid: (rows, columns) of the result.
      num_prefix_tokens: tokens in front of the grid (such as the class token), which are copied.
      method: one of these five.

    Returns:
      `[1, num_prefix_tokens + target rows * target columns, width]`, in the dtype of `posemb`.
    """
    prefix, grid = np.split(np.asarray(posemb), [num_prefix_tokens], axis=1)
    width = grid.shape[-1]
    grid = grid.reshape(*source_grid, width)
    rows, columns = (
        resize_matrix(method, a, b) for a, b in zip(source_grid, target_grid, strict=True)
    )
    grid = np.einsum("ri,cj,ijw->rcw", rows, columns, grid, optimize=True)
    return np.concatenate([prefix, grid.reshape(1, -1, width).astype(prefix.dtype)], axis=1)


def resize_biases(
    biases: np.ndarray, *, source_grid: tuple[int, int], target_grid: tuple[int, int]
) -> np.ndarray:
    """Interpolates biases by distance from one grid of patches to another.

    Short distances keep their biases: the known ones are placed at 0, 1, 1 + q, 1 + q + q^2, ...
    patches, with q such that the largest of both grids coincide, and values between them are
    interpolated linearly. Biases of prefix tokens stay. Source: `resize_rel_pos_bias_table` of
    timm 1.0.31, which has it from BEiT, arXiv:2106.08254, without SciPy.

    Args:
      biases: `[(2 rows - 1) * (2 columns - 1) + 3, heads]`, any float dtype, see `relate_tokens`.
      source_grid: (rows, columns) of `biases`.
      target_grid: (rows, columns) of the result.

    Returns:
      Those of the target grid, in the dtype of `biases`.
    """
    if source_grid == target_grid:
        return biases
    table, prefix = np.split(np.asarray(biases), [-3])
    sides = [2 * side - 1 for side in source_grid]
    rows, columns = map(_bias_matrix, source_grid, target_grid)
    resized = np.einsum("ri,cj,ijh->rch", rows, columns, table.reshape(*sides, -1), optimize=True)
    return np.concatenate([resized.reshape(-1, table.shape[-1]).astype(table.dtype), prefix])


def _bias_matrix(source: int, target: int) -> np.ndarray:
    """Returns the interpolation of `resize_biases` along one side, float64 `[2 t - 1, 2 s - 1]`."""
    low, high, q = 1.01, 1.5, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (q ** (source - 1) - 1) / (q - 1) > target - 1 else (q, high)
    places = np.cumsum(q ** np.arange(source - 1))
    known = np.concatenate([-places[::-1], [0], places])
    wanted = np.arange(1 - target, target)
    return np.stack([np.interp(wanted, known, row) for row in np.eye(len(known))], axis=1)


def resize_patches(
    patches: jax.Array,
    source_grid: tuple[int, int],
    target_grid: tuple[int, int],
    method: Method = "bicubic_no_antialias",
) -> jax.Array:
    """Resizes features of patches to another grid by a rule of `resize_posemb`.

    Takes float `[batch, rows * columns, width]`; the result is float32, with the patches of
    `target_grid`, row by row.
    """
    rows, columns = (
        jnp.asarray(resize_matrix(method, a, b), jnp.float32)
        for a, b in zip(source_grid, target_grid, strict=True)
    )
    batch, _, width = patches.shape
    x = patches.astype(jnp.float32).reshape(batch, *source_grid, width)
    x = jnp.einsum("ri,cj,bijw->brcw", rows, columns, x, precision=jax.lax.Precision.HIGHEST)
    return x.reshape(batch, math.prod(target_grid), width)
