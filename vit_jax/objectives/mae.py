# SPDX-License-Identifier: Apache-2.0
"""Masked autoencoding: most patches are hidden, and their pixels are predicted from the others.

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv:2111.06377.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.models.block_config import BlockConfig
from vit_jax.models.decoder import MaskedDecoder
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives.augment import flip_lr
from vit_jax.objectives.base import Batch, Params, check_share, headless
from vit_jax.objectives.pixels import ImageObjective, Pixels, check_pixels, denormalize
from vit_jax.utils.errors import UserError

# Added to the variance of the pixels of a patch.
EPSILON = 1e-6
# Folded into a step's key for the masks.
_MASK_KEY = 100


@dataclasses.dataclass(frozen=True)
class MaskedAutoencoder(ImageObjective):
    """An encoder that sees a few patches, and a decoder that predicts the others.

    The encoder is a `VisionTransformer` without a head. The decoder's parameters are stored under
    `decoder`.

    Attributes:
      model: called as `model(images, train=..., patches=visible)`.
      decoder: predicts all pixels of a patch, whose size is `model.stride`.
      mask_ratio: share of patches that are hidden.
      norm_pix: whether the pixels of each patch are normalised before they are predicted.
      flip: share of images that are mirrored left and right.
    """

    model: Any
    decoder: MaskedDecoder
    mask_ratio: float
    norm_pix: bool
    flip: float

    objective_params = ("decoder",)
    classifies = False
    needs_labels = False

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        images = self.normalize(batch["image"][:1])
        encoder_rng, decoder_rng = jax.random.split(rng)
        visible = self.draw_visible(rng, images)
        (_, out), variables = self.model.init_with_output(
            encoder_rng, images, train=False, patches=visible
        )
        grid = self.model.grid(images.shape[1:3])
        decoder = self.decoder.init(decoder_rng, out["encoded"], visible, grid, train=False)
        return {**variables["params"], "decoder": decoder["params"]}

    def augment(self, batch: Batch, rng: jax.Array) -> Batch:
        images = self.normalize(flip_lr(rng, batch["image"], probability=self.flip))
        visible = self.draw_visible(jax.random.fold_in(rng, _MASK_KEY), images)
        return {"image": images, "visible": visible}

    def loss(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        predicted = self._apply(params, batch, rng=rng)
        loss = self._losses(predicted, batch).mean()
        return loss, {"loss": loss}

    def predict(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Returns `pre_logits` and `encoded` of whole images, without a mask."""
        images = self.normalize(batch["image"])
        return self.model.apply({"params": _encoder(params)}, images, train=False)[1]

    def draw_visible(self, rng: jax.Array, images: jax.Array) -> jax.Array:
        """Draws the positions of the patches that are not hidden, int32 `[batch, visible]`."""
        rows, columns = self.model.grid(images.shape[1:3])
        noise = jax.random.uniform(rng, (images.shape[0], rows * columns))
        kept = count_visible(rows * columns, self.mask_ratio)
        return jax.lax.top_k(noise, kept)[1]

    def reconstruct(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Hides patches of a batch from the data and predicts them, with the same masks each time.

        Returns `loss`, float32 `[batch]`, and images, float32 `[batch, height, width, channels]`
        from 0 to 255 (not clipped): `masked` is gray where patches are hidden, and `reconstructed`
        has the predictions there.
        """
        images = self.normalize(batch["image"])
        visible = self.draw_visible(jax.random.key(0), images)
        batch = {"image": images, "visible": visible}
        predicted = self._apply(params, batch, rng=None)
        patches = patchify(images, self.model.stride)
        pixels = predicted
        if self.norm_pix:
            _, mean, deviation = normalize_patches(patches)
            pixels = predicted * deviation + mean
        hidden = self._hidden(visible, patches.shape[1])[..., None]

        def replace_hidden(pixels: jax.Array | int) -> jax.Array:
            x = unpatchify(jnp.where(hidden, pixels, patches), images.shape, self.model.stride)
            return denormalize(x, self.pixel_mean, self.pixel_std)

        loss = self._losses(predicted, batch)
        return {"loss": loss, "masked": replace_hidden(0), "reconstructed": replace_hidden(pixels)}

    def _apply(self, params: Params, batch: Batch, *, rng: jax.Array | None) -> jax.Array:
        """Predicts all patches, `[batch, patches, values]`; dropout is off without a key."""
        train, rngs = rng is not None, {} if rng is None else {"dropout": rng}
        images, visible = batch["image"], batch["visible"]
        variables = {"params": _encoder(params)}
        _, out = self.model.apply(variables, images, train=train, patches=visible, rngs=rngs)
        grid, variables = self.model.grid(images.shape[1:3]), {"params": params["decoder"]}
        predicted: Any = self.decoder.apply(variables, out["encoded"], visible, grid, train=train)
        return predicted

    def _losses(self, predicted: jax.Array, batch: Batch) -> jax.Array:
        """Mean squared error of each image over its hidden patches, float32 `[batch]`."""
        target = patchify(batch["image"], self.model.stride)
        if self.norm_pix:
            target, _, _ = normalize_patches(target)
        hidden = self._hidden(batch["visible"], target.shape[1])
        errors = jnp.square(predicted - target).mean(axis=-1)
        return (errors * hidden).sum(axis=-1) / hidden.sum(axis=-1)

    def _hidden(self, visible: jax.Array, length: int) -> jax.Array:
        """True for patches that are hidden, bool `[batch, length]`."""
        return ~(visible[:, :, None] == jnp.arange(length)).any(axis=1)


@headless
def make_mae(
    *,
    model: Any,
    image_shape: tuple[int, int, int],
    mask_ratio: float = 0.75,
    norm_pix: bool = True,
    decoder_width: int = 512,
    decoder_depth: int = 8,
    decoder_heads: int = 16,
    flip: float = 0.0,
    pixel_mean: Pixels = 0.5,
    pixel_std: Pixels = 0.5,
) -> MaskedAutoencoder:
    """Makes a `MaskedAutoencoder` from config values, most of them attributes of that class.

    `image_shape` is height, width and channels. The MLPs of the decoder are four times
    `decoder_width` wide. Raises `UserError` if the model is no Vision Transformer, or if a value is
    out of its range.
    """
    if not 0 < mask_ratio < 1:
        raise UserError(f"objective.mask_ratio={mask_ratio}: expected above 0 and below 1")
    if not isinstance(model, VisionTransformer) or model.classifier == "map":
        raise UserError(
            "objective.name='mae' hides patches from a Vision Transformer: expected "
            "model.name='vit' with model.classifier='token' or 'gap'"
        )
    unused = ("patch_dropout_rate", "norm_after_pooling", "representation_size")
    for key in (*unused, "distillation_token"):
        if getattr(model, key):
            raise UserError(
                f"model.{key}={getattr(model, key)} with objective.name='mae': expected none, as "
                "the pixels would not depend on it; give it to the model that is fine-tuned"
            )
    rows, columns = model.grid(image_shape[:2])
    visible = count_visible(rows * columns, mask_ratio)
    if not 0 < visible < rows * columns:
        raise UserError(
            f"objective.mask_ratio={mask_ratio} leaves {visible} of {rows * columns} patches "
            "visible: expected some, and some hidden"
        )
    sizes = {"width": decoder_width, "depth": decoder_depth, "heads": decoder_heads}
    for key, value in sizes.items():
        if value < 1:
            raise UserError(f"objective.decoder_{key}={value}: expected at least 1")
    if decoder_width % decoder_heads or decoder_width % 4:
        raise UserError(
            f"objective.decoder_width={decoder_width}: expected a multiple of 4 and of "
            f"objective.decoder_heads={decoder_heads}"
        )
    check_share(flip=flip)
    height, width = model.stride
    config = BlockConfig(
        num_heads=decoder_heads,
        mlp_dim=4 * decoder_width,
        activation=model.activation,
        norm_epsilon=model.norm_epsilon,
        dtype=model.dtype,
        float8=model.float8,
        attention=model.attention,
        blocks=model.blocks,
        constrain=model.constrain,
    )
    decoder = MaskedDecoder(
        config=config,
        hidden_size=decoder_width,
        num_layers=decoder_depth,
        patch_values=height * width * image_shape[2],
    )
    mean, std = check_pixels(pixel_mean, pixel_std)
    return MaskedAutoencoder(
        model, decoder, mask_ratio, norm_pix, flip, pixel_mean=mean, pixel_std=std
    )


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """The number of patches that are not hidden, rounded down as published."""
    return int(num_patches * (1 - mask_ratio))


def patchify(images: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """Cuts `[batch, height, width, channels]` of any dtype into `[batch, patches, values]`."""
    batch, height, width, channels = images.shape
    rows, columns = height // patch[0], width // patch[1]
    x = images.reshape(batch, rows, patch[0], columns, patch[1], channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def unpatchify(patches: jax.Array, shape: tuple[int, ...], patch: tuple[int, int]) -> jax.Array:
    """The inverse of `patchify`, for images of `shape`."""
    batch, height, width, channels = shape
    rows, columns = height // patch[0], width // patch[1]
    x = patches.reshape(batch, rows, columns, patch[0], patch[1], channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(shape)


def normalize_patches(patches: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises float32 `[batch, patches, values]` to mean 0 and deviation 1 for each patch.

    Returns the mean and the deviation, `[batch, patches, 1]`, that they had too. The variance is
    the unbiased one, as in the code of the paper.
    """
    mean = patches.mean(axis=-1, keepdims=True)
    deviation = jnp.sqrt(patches.var(axis=-1, keepdims=True, ddof=1) + EPSILON)
    return (patches - mean) / deviation, mean, deviation


def _encoder(params: Params) -> Params:
    return {name: x for name, x in params.items() if name != "decoder"}
