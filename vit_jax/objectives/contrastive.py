# SPDX-License-Identifier: Apache-2.0
"""Contrastive training of a model of images and one of texts, on pairs of both.

Sources: CLIP, arXiv:2103.00020; LiT, arXiv:2111.07991; SigLIP, arXiv:2303.15343.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vit_jax.data.ops.patches import find_patches
from vit_jax.data.ops.transforms import Random
from vit_jax.data.pipeline import DatasetSpec
from vit_jax.objectives.augment import ERASE_KEY, Augmentation, distort, erase
from vit_jax.objectives.base import (
    Batch,
    CachedFeatures,
    CoupledObjective,
    Params,
    headless,
)
from vit_jax.objectives.contrastive_losses import ring_sigmoid_loss, sigmoid_loss, softmax_loss
from vit_jax.objectives.pixels import ImageObjective, Pixels, check_pixels
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import takes_options_of

Loss = Literal["sigmoid", "softmax"]
Form = Literal["ring", "gathered"]


@dataclasses.dataclass(frozen=True)
class Contrastive(CoupledObjective, ImageObjective):
    """Two towers that learn which text is that of which image, among all pairs of a batch.

    Batches from the data have `tokens` too, int32 `[batch, context_length]`; labels are not used.

    Attributes:
      model: called as `model(images, tokens, train=...)`, it returns `(zimg, ztxt, out)`; see
        `models.two_towers.TwoTowers`.
      mesh: devices of the ring, and those that similarities are sharded over; None for one device.
      loss_name: `sigmoid` (a yes or no for each pair) or `softmax` (a choice for each image and
        each text).
      form: `ring` to hold the similarities of the pairs of one device and of another at a time, or
        `gathered` to hold those of the images of one device with all texts.
      max_scale: the factor on similarities is kept from 1 to this after each update; None for no
        bounds.
      augmentation: augmentation of training images, on the device.
      image_shape: height, width and channels of the images, where batches have none.
      feature_cache: folder of files of the embeddings of the images, `zimg`, which batches then
        have in place of `image`; None to compute them in each step.
    """

    model: Any
    mesh: Mesh | None
    loss_name: Loss = "sigmoid"
    form: Form = "ring"
    max_scale: float | None = None
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    image_shape: tuple[int, ...] = ()
    feature_cache: str | None = None

    classifies = False
    needs_labels = False
    takes_any_size = True

    @property
    def cached_features(self) -> CachedFeatures | None:
        if self.feature_cache is None:
            return None
        return CachedFeatures(self.feature_cache, "zimg", self.model.width, "img")

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        shape = batch["image"].shape[1:] if "image" in batch else self.image_shape
        images = self.normalize(jnp.zeros((1, *shape), jnp.uint8))
        tokens = batch["tokens"][:1]
        return dict(self.model.init(rng, images, tokens, train=False))["params"]

    def augment(self, batch: Batch, rng: jax.Array) -> Batch:
        if "zimg" in batch:
            return batch
        options = self.augmentation
        images = self.normalize(distort(rng, batch["image"], options))
        if options.random_erasing:
            erase_rng, mode = jax.random.fold_in(rng, ERASE_KEY), options.random_erasing_mode
            images = erase(erase_rng, images, probability=options.random_erasing, mode=mode)
        return {"image": images, "tokens": batch["tokens"]}

    def encode(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns unit vectors of the images and of the texts, float32 `[batch, width]`."""
        zimg, ztxt, _ = self.model.apply(
            {"params": params},
            batch.get("image"),
            batch["tokens"],
            train=True,
            rngs={"dropout": rng},
        )
        return (batch["zimg"] if zimg is None else zimg), ztxt

    def combine(
        self, params: Params, encoded: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        t = params["t"].reshape(())
        b = params["b"].reshape(()) if "b" in params else jnp.zeros((), jnp.float32)
        if self.loss_name == "softmax":
            loss, metrics = softmax_loss(*encoded, t, mesh=self.mesh)
        elif self.form == "ring" and self.mesh is not None:
            loss, metrics = ring_sigmoid_loss(*encoded, t, b, mesh=self.mesh)
        else:
            loss, metrics = sigmoid_loss(*encoded, t, b, mesh=self.mesh)
        metrics = {"loss": loss, **metrics, "scale": jnp.exp(t)}
        return loss, metrics | ({"bias": b} if "b" in params else {})

    def update_statistics(
        self, params: Params, metrics: dict[str, jax.Array]
    ) -> tuple[Params, dict[str, jax.Array]]:
        """Bounds the scale, as CLIP does after each update."""
        if self.max_scale is None:
            return params, metrics
        return {**params, "t": jnp.clip(params["t"], 0, math.log(self.max_scale))}, metrics

    def predict(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Returns what the image tower gives: `pre_logits` and `encoded`, and `zimg` beside them.

        `zimg` are unit vectors, float32 `[batch, width]`.
        """
        zimg, _, out = self.model.apply(
            {"params": params}, self.normalize(batch["image"]), train=False
        )
        return {k: v for k, v in out["img"].items() if k != "logits"} | {"zimg": zimg}

    def embed_texts(self, params: Params, tokens: jax.Array) -> jax.Array:
        """Returns unit vectors, float32 `[texts, width]`, of int32 `[texts, context_length]`."""
        return self.model.apply({"params": params}, tokens=tokens, train=False)[1]

    def scale_similarities(self, params: Params, similarities: jax.Array) -> jax.Array:
        """Returns the logits of products of unit vectors, float32 of any shape."""
        logits = jnp.exp(params["t"].reshape(())) * similarities
        return logits + params["b"].reshape(()) if "b" in params else logits


@headless
@takes_options_of(Augmentation)
def make_contrastive(
    *,
    model: Any,
    mesh: Mesh | None = None,
    data: DatasetSpec,
    loss: Loss = "sigmoid",
    form: Form | None = None,
    max_scale: float | None = None,
    feature_cache: str | None = None,
    pixel_mean: Pixels = 0.5,
    pixel_std: Pixels = 0.5,
    **augmentation: Any,
) -> Contrastive:
    """Makes a `Contrastive` from config values; `augmentation` are fields of `Augmentation`.

    `form` is `ring` by default for the sigmoid loss; softmax has only the gathered form. Raises
    `UserError` if the model has not two towers, if the data has no captions or texts of another
    length or vocabulary than the model, if a value is out of its range, or if images that have a
    `feature_cache` would differ from step to step.
    """
    _check_pairs(model, data)
    if loss == "softmax" and form == "ring":
        raise UserError(
            "objective.form='ring' with objective.loss='softmax', which compares each pair with "
            "all others at once: expected 'gathered', or loss='sigmoid'"
        )
    if max_scale is not None and not 1 < max_scale < math.inf:
        raise UserError(f"objective.max_scale={max_scale}: expected more than 1, such as 100.0")
    options = Augmentation(**augmentation)
    for key in ("mixup", "cutmix"):
        if getattr(options, key):
            raise UserError(
                f"objective.{key}={getattr(options, key)}: an image mixed of two has no caption: "
                "expected 0 for objective.name='contrastive'"
            )
    if feature_cache is not None:
        _check_cache(feature_cache, model, data, options)
    mean, std = check_pixels(pixel_mean, pixel_std)
    return Contrastive(
        model,
        mesh,
        loss,
        form or ("gathered" if loss == "softmax" else "ring"),
        max_scale,
        options,
        data.image_shape(),
        feature_cache,
        pixel_mean=mean,
        pixel_std=std,
    )


def _check_pairs(model: Any, data: DatasetSpec) -> None:
    name = "objective.name='contrastive'"
    if not hasattr(model, "towers"):
        raise UserError(
            f"{name} trains a model of images and one of texts: expected model.name='two_towers', "
            "or objective.name='supervised' for this model"
        )
    if not data.info.captions:
        raise UserError(
            f"{name} needs a text for each image, and {data} has no captions: expected data that "
            "has (docs/data.md)"
        )
    tokenizer = data.find_tokenizer()
    if tokenizer is None:
        raise UserError(
            f"data.tokenizer=None with {name}: expected one, such as "
            f"'bytes(length={model.context_length})'"
        )
    if tokenizer.length != model.context_length:
        raise UserError(
            f"data.tokenizer={data.tokenizer!r} makes {tokenizer.length} tokens, and "
            f"model.text.context_length={model.context_length}: expected the same"
        )
    try:
        vocab_size = tokenizer.vocab_size
    except UserError:
        vocab_size = 0  # Its file is missing, which stops a run, but not the plan of one.
    if vocab_size > model.txt.vocab_size:
        raise UserError(
            f"data.tokenizer={data.tokenizer!r} has a vocabulary of {vocab_size:,}, and "
            f"model.text.vocab_size={model.txt.vocab_size:,}: expected at least as many"
        )
    if data.batch_size < 2:
        raise UserError(
            f"data.batch_size={data.batch_size} with {name}, which compares the pairs of a batch: "
            "expected at least 2"
        )


def _check_cache(folder: str, model: Any, data: DatasetSpec, options: Augmentation) -> None:
    key = f"objective.feature_cache={folder!r}"
    if not folder:
        raise UserError(f"{key}: expected a folder, or None")
    why = "features are computed once for each image"
    changes = [
        f"objective.{field.name}={getattr(options, field.name)}"
        for field in dataclasses.fields(options)
        if field.name in ("flip", "color_jitter", "three_augment", "random_erasing")
        and getattr(options, field.name) not in (0, False, (0, 0, 0))
    ]
    rates = ("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate")
    changes += [
        f"model.image.{name}={getattr(model.img, name)}"
        for name in (*rates, "patch_dropout_rate")
        if getattr(model.img, name, 0)
    ]
    if changes:
        raise UserError(f"{key} with {changes[0]}: {why}: expected 0, or no feature_cache")
    ops = data.ops()
    drawn = [type(op).__name__ for op in ops if isinstance(op, Random)]
    # What an operation from outside does is not known.
    drawn += [type(op).__name__ for op in ops if not type(op).__module__.startswith("vit_jax.")]
    if drawn:
        raise UserError(
            f"{key} with {data.key}.preprocess={data.preprocess!r}: {why}, and {drawn[0]} is "
            "random: expected no random operation, such as 'decode|resize(224)', or no "
            "feature_cache"
        )
    if find_patches(ops) is not None:
        raise UserError(
            f"{key} with {data.key}.preprocess={data.preprocess!r}: expected images of one size, "
            "or no feature_cache"
        )
