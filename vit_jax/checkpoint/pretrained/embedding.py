# SPDX-License-Identifier: Apache-2.0
"""Makes the first convolution of a model fit other patches and other input channels."""

import numpy as np

from vit_jax.utils.errors import UserError


def resize_patches(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes the kernel of a patch embedding so that its outputs change least.

    For a larger patch the embedding of an enlarged image equals that of the original exactly; for a
    smaller one it is the least-squares solution. Plain interpolation of the kernel would change the
    scale of the embeddings. Source: FlexiViT, arXiv:2212.08013, section 3.4 ("PI-resize").

    Args:
      kernel: `[height, width, channels, features]`.
      size: (height, width) wanted.

    Returns:
      `[*size, channels, features]`, of the same type.
    """
    rows, columns = (
        np.linalg.pinv(_half_pixel_matrix(old, new).T)
        for old, new in zip(kernel.shape, size, strict=False)
    )
    resized = np.einsum("ri,cj,ijxf->rcxf", rows, columns, kernel, optimize=True)
    return resized.astype(kernel.dtype)


def change_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Makes a convolution kernel accept another number of input channels.

    One channel takes the sum over all: a grey image gives what it gave as a colour image of three
    equal channels. More channels repeat those that are there, scaled so that equal channels keep
    their sum.

    Args:
      kernel: `[height, width, channels, features]`.
      channels: wanted.

    Raises:
      UserError: there are to be fewer channels, but more than one.
    """
    old = kernel.shape[2]
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    if channels < old:
        raise UserError(
            f"init_from: the file's model takes {old} channels, this one {channels}: expected 1, "
            f"or at least {old}"
        )
    repeated = kernel[:, :, np.arange(channels) % old]
    return (repeated * (old / channels)).astype(kernel.dtype)


def _half_pixel_matrix(old: int, new: int) -> np.ndarray:
    """Float64 `[new, old]`: bilinear interpolation between half-pixel centres, as of images."""
    centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    lower = np.minimum(np.floor(centres).astype(int), max(old - 2, 0))
    fraction = (centres - lower)[:, None]
    identity = np.eye(old)
    return (1 - fraction) * identity[lower] + fraction * identity[np.minimum(lower + 1, old - 1)]
