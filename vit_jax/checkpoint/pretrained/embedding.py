# SPDX-License-Identifier: Apache-2.0
"""Fits the first convolution of a model to another patch size or number of input channels."""

import numpy as np

from vit_jax.models.resampling import Method, kernel_matrix
from vit_jax.utils.errors import UserError


def resize_patches(
    kernel: np.ndarray, size: tuple[int, int], *, method: Method = "bilinear_half_pixel"
) -> np.ndarray:
    """Resizes the kernel of a patch embedding so that its outputs change least.

    With a larger patch, the embedding of an enlarged image equals that of the original; with a
    smaller one it is the least-squares solution. To interpolate the kernel would change the scale
    of the embeddings. Source: FlexiViT, arXiv:2212.08013, section 3.4 ("PI-resize").

    Args:
      kernel: `[height, width, channels, features]`, any float dtype.
      size: (height, width) of the result.
      method: how images are resized, a rule of `resampling.axis_weights`: "bilinear_half_pixel" as
        published; timm has "bicubic" for all models but FlexiViT.

    Returns:
      `[*size, channels, features]`, in the dtype of `kernel`.
    """
    rows, columns = (
        kernel_matrix(method, old, new) for old, new in zip(kernel.shape, size, strict=False)
    )
    resized = np.einsum("ri,cj,ijxf->rcxf", rows, columns, kernel, optimize=True)
    return resized.astype(kernel.dtype)


def change_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Changes the number of input channels of a convolution kernel.

    One channel is the sum over all, so a grey image gives the output of a colour image with equal
    channels. More channels repeat the existing ones, scaled so that their sum stays the same.

    Args:
      kernel: `[height, width, old channels, features]`, any float dtype.
      channels: of the result; 1, or at least as many as before.

    Returns:
      `[height, width, channels, features]`, in the dtype of `kernel`.

    Raises:
      UserError: there would be fewer channels than before, but more than one.
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
