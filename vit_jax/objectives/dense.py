# SPDX-License-Identifier: Apache-2.0
"""Objectives of pixels: what they share of a head on the patch tokens of a Vision Transformer.

Source of the linear head: arXiv:2304.07193, section 7.4: batch normalisation and one linear layer
on the tokens of the last block or blocks, whose outputs are resized bilinearly to the labels.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.blocks import BLOCK_OUTPUTS
from vit_jax.models.norms import make_norm
from vit_jax.models.resampling import OWN_METHOD
from vit_jax.models.vit import Dtype, VisionTransformer
from vit_jax.objectives.augment import Augmentation, distort, flip_lr
from vit_jax.objectives.base import Batch, Params, check_share
from vit_jax.objectives.pixels import ImageObjective, Pixels, check_pixels
from vit_jax.utils.errors import UserError

Head = Literal["linear", "conv", "upsample"]
Size = tuple[int, int]  # height and width

# The values of PyTorch's batch normalisation.
_EPSILON = 1e-5
_MOMENTUM = 0.9
_INIT_STDDEV = 0.01
# The running statistics among the parameters of the head.
_STATISTICS = ("mean", "var")


class PixelHead(nn.Module):
    """From a grid of features to logits of classes.

    Attributes:
      kind: one layer for each position (`linear`); two 3x3 convolutions before it (`conv`); or two
        transposed convolutions, each of which doubles the grid (`upsample`).
      num_classes: number of logits.
      width: channels of the first convolution; the second one has half of them in `upsample`.
      dtype: of the convolutions.

    Call: `[batch, rows, columns, channels]` to float32 `[batch, rows, columns, num_classes]`, of
    four times as many rows and columns with `upsample`.
    """

    kind: Head
    num_classes: int
    width: int
    dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        divisors = {"linear": (), "conv": (1, 1), "upsample": (1, 2)}
        for number, divisor in enumerate(divisors[self.kind]):
            width = self.width // divisor
            if self.kind == "conv":
                x = nn.Conv(width, (3, 3), dtype=self.dtype, name=f"conv_{number}")(x)
            else:
                # A transposed convolution of stride 2 and size 2, as one product of matrices.
                x = nn.Dense(4 * width, dtype=self.dtype, name=f"upsample_{number}")(x)
                x = _unfold(x)
            x = nn.LayerNorm(dtype=self.dtype, name=f"norm_{number}")(x)
            x = nn.gelu(x)
        init = nn.initializers.normal(_INIT_STDDEV)
        return nn.Dense(self.num_classes, kernel_init=init, name="classifier")(
            x.astype(jnp.float32)
        )


def _unfold(x: jax.Array) -> jax.Array:
    """From `[batch, rows, columns, 4 * width]` to `[batch, 2 * rows, 2 * columns, width]`."""
    batch, rows, columns, channels = x.shape
    x = x.reshape(batch, rows, columns, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * rows, 2 * columns, channels // 4)


@dataclasses.dataclass(frozen=True)
class DenseObjective(ImageObjective, abc.ABC):
    """A loss of each pixel of an image, on what a head makes of the tokens of its patches.

    The batch normalisation of the linear head has its scale, bias and running statistics among the
    parameters of the head.

    Attributes:
      model: a `VisionTransformer` without a head.
      head: from the tokens of patches to logits.
      grid: rows and columns of patches of a training image.
      layers: number of last blocks whose tokens are the features, each after the final norm; they
        are concatenated along the channels.
      freeze_backbone: whether the head alone is trained.
      dropout: rate at which a channel of the features is dropped for an image, in training.
      augmentation: of which flips and changes of colour are used.
      head_params: the name of the parameters of the head.
      output: the name of what `read_logits` returns, among the outputs of `predict`.
      inputs: the names of `step_inputs`.
    """

    model: Any
    head: PixelHead
    grid: Size
    layers: int = 1
    freeze_backbone: bool = False
    dropout: float = 0.0
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)

    head_params: ClassVar[str]
    output: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ()
    classifies = False
    needs_labels = False
    needs_label_maps = True

    @property
    def objective_params(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self.head_params,)

    def read_logits(self, logits: jax.Array) -> jax.Array:
        """What is resized to the pixels: the logits of the head, or what they stand for.

        Takes float32 `[batch, rows, columns, outputs of the head]`, and returns float32
        `[batch, rows, columns, channels]`.
        """
        return logits

    @abc.abstractmethod
    def finish(self, outputs: jax.Array) -> jax.Array:
        """The result for pixels, of resized outputs, float32 `[batch, h, w, channels]`."""

    @abc.abstractmethod
    def pixel_loss(
        self, params: Params, outputs: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and the metrics of a (micro-)batch.

        Args:
          params: see `Objective.loss`.
          outputs: of `read_logits`, resized to the label maps.
          labels: `[batch, h, w]`.
        """

    @property
    def frozen(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Statistics, which `update_statistics` changes, and what no gradient reaches."""
        statistics = (f"{self.head_params}/norm/({'|'.join(_STATISTICS)})",) * self._has_norm
        if self.freeze_backbone:
            return (f"(?!{self.head_params}/).*", *statistics)
        unused = {
            "MAPHead_0/.*": self.model.classifier == "map",
            "fc_norm/.*": self.model.norm_after_pooling,
            "pre_logits/.*": self.model.representation_size is not None,
        }
        return (*(pattern for pattern, there in unused.items() if there), *statistics)

    @property
    def _has_norm(self) -> bool:
        return self.head.kind == "linear"

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        model_rng, head_rng = jax.random.split(rng)
        images = self.normalize(batch["image"][:1])
        _, variables = self.model.init_with_output(
            model_rng, images, train=False, **self._positions(images)
        )
        params = dict(variables["params"])
        features, _ = self._encode(params, images, train=False)
        head = dict(self.head.init(head_rng, features)["params"])
        if self._has_norm:
            # An array each: a donated state must not alias buffers.
            names = {"mean": jnp.zeros, "var": jnp.ones, "scale": jnp.ones, "bias": jnp.zeros}
            head["norm"] = {name: make(features.shape[-1]) for name, make in names.items()}
        return {**params, self.head_params: head}

    def augment(self, batch: Batch, rng: jax.Array) -> Batch:
        label_map = batch["label_map"][..., None]
        label_map = flip_lr(rng, label_map, probability=self.augmentation.flip)[..., 0]
        images = self.normalize(distort(rng, batch["image"], self.augmentation))
        return {"image": images, "label_map": label_map}

    def loss(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model_rng, dropout_rng = jax.random.split(rng)
        train = not self.freeze_backbone
        features, _ = self._encode(params, batch["image"], train=train, rng=model_rng)
        if self.dropout:
            kept = 1 - self.dropout
            shape = (len(features), 1, 1, features.shape[-1])
            mask = jax.random.bernoulli(dropout_rng, kept, shape)
            features = jnp.where(mask, features / kept, 0)
        metrics = {}
        if self._has_norm:
            features = features.astype(jnp.float32)
            mean, var = features.mean(axis=(0, 1, 2)), features.var(axis=(0, 1, 2))
            count = features.size // features.shape[-1]
            # Running variances are unbiased ones, as in PyTorch.
            metrics = {"batch_mean": mean, "batch_var": var * (count / max(count - 1, 1))}
            features = _normalize_features(features, params[self.head_params]["norm"], mean, var)
        outputs = self.read_logits(self._apply_head(params, features))
        labels = batch["label_map"]
        outputs = resize_logits(outputs, (labels.shape[1], labels.shape[2]))
        loss, others = self.pixel_loss(params, outputs, labels)
        return loss, {"loss": loss, **others, **metrics}

    def predict(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Returns `pre_logits`, `encoded` and the `output`, float32 `[batch, h, w, channels]`.

        The output has the grid of the head. The images may be of another size than in training.
        """
        images = self.normalize(batch["image"])
        features, out = self._encode(params, images, train=False)
        if self._has_norm:
            norm = params[self.head_params]["norm"]
            features = features.astype(jnp.float32)
            features = _normalize_features(features, norm, norm["mean"], norm["var"])
        return {**out, self.output: self.read_logits(self._apply_head(params, features))}

    def find_pixels(
        self,
        params: Params,
        images: jax.Array,
        *,
        window: Size | None = None,
        stride: Size | None = None,
        flip: bool = False,
        resize: Callable[[jax.Array], jax.Array] = lambda outputs: outputs,
    ) -> jax.Array:
        """Computes what `finish` returns for each pixel, float32 `[batch, h, w, channels]`.

        Args:
          params: of the model and the head.
          images: uint8 `[batch, h, w, channels]`.
          window: size of the windows that are computed one by one, see `slide`; None for the whole
            image at once.
          stride: rows and columns from one window to the next.
          flip: whether to average with the mirrored image.
          resize: is applied to the outputs of the pixels of the images.
        """
        find = functools.partial(self.find_outputs, params, window=window, stride=stride)
        found = self.finish(resize(find(images)))
        if flip:
            mirrored = find(images[:, :, ::-1])[:, :, ::-1]
            found = (found + self.finish(resize(mirrored))) / 2
        return found

    def find_outputs(
        self,
        params: Params,
        images: jax.Array,
        *,
        window: Size | None = None,
        stride: Size | None = None,
    ) -> jax.Array:
        """Computes the `output` for each pixel, float32 `[batch, h, w, channels]`.

        The arguments are those of `find_pixels`.
        """

        def find(images: jax.Array) -> jax.Array:
            outputs = self.predict(params, {"image": images})[self.output]
            return resize_logits(outputs, (images.shape[1], images.shape[2]))

        return find(images) if window is None else slide(find, images, window, stride or window)

    def update_statistics(
        self, params: Params, metrics: dict[str, jax.Array]
    ) -> tuple[Params, dict[str, jax.Array]]:
        if not self._has_norm:
            return params, metrics
        metrics, norm = dict(metrics), dict(params[self.head_params]["norm"])
        for name in _STATISTICS:
            norm[name] = _MOMENTUM * norm[name] + (1 - _MOMENTUM) * metrics.pop(f"batch_{name}")
        return {**params, self.head_params: {**params[self.head_params], "norm": norm}}, metrics

    def check_size(self, size: Size) -> None:
        """Raises `UserError` unless the model takes images or windows of (height, width) pixels."""
        grid = self.model.grid(size)
        if self.model.relative_positions and grid != self.grid:
            rows, columns = self.grid
            height, width = self.model.stride
            raise UserError(
                f"model.position_embedding='relative' has biases for {rows}x{columns} patches, and "
                f"images or windows of {size[0]}x{size[1]} pixels have {grid[0]}x{grid[1]}: "
                f"expected {rows * height}x{columns * width} pixels, as in training"
            )

    def _positions(self, images: jax.Array) -> dict[str, Any]:
        """The arguments for images of another size than in training; none for the same size.

        Position embeddings are then resized as by `fill_model`, which readers of the run call.
        """
        same = self.model.grid(images.shape[1:3]) == self.grid
        return {} if same else {"position_grid": self.grid, "position_resize": OWN_METHOD}

    def _encode(
        self, params: Params, images: jax.Array, *, train: bool, rng: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The features of patches, `[batch, rows, columns, channels]`, and the model's outputs."""
        others = (self.head_params, *self.inputs)
        backbone = {name: x for name, x in params.items() if name not in others}
        (_, out), captured = self.model.apply(
            {"params": backbone},
            images,
            train=train,
            rngs=None if rng is None else {"dropout": rng},
            mutable=[BLOCK_OUTPUTS] if self.layers > 1 else [],
            **self._positions(images),
        )
        tokens = out["encoded"]
        if self.layers > 1:
            blocks = self._find_blocks(captured[BLOCK_OUTPUTS]["Transformer"])
            blocks = [self._norm(params, x[:, : tokens.shape[1]]) for x in blocks[:-1]]
            tokens = jnp.concatenate([*blocks, tokens], axis=-1)
        rows, columns = self.model.grid(images.shape[1:3])
        patches = tokens[:, self.model.num_prefix_tokens :]
        return patches.reshape(images.shape[0], rows, columns, patches.shape[-1]), out

    def _find_blocks(self, captured: Any) -> list[jax.Array]:
        if self.model.scan:
            return list(captured["encoderblock"]["output"][0])[-self.layers :]
        last = range(self.model.num_layers - self.layers, self.model.num_layers)
        return [captured[f"encoderblock_{i}"]["output"][0] for i in last]

    def _norm(self, params: Params, x: jax.Array) -> jax.Array:
        """The final norm of the encoder, which some models have after pooling alone."""
        if self.model.norm_after_pooling:
            return x
        norm = make_norm(self.model.block_config)
        applied: Any = norm.apply({"params": params["Transformer"]["encoder_norm"]}, x)
        return applied

    def _apply_head(self, params: Params, features: jax.Array) -> jax.Array:
        head = {name: x for name, x in params[self.head_params].items() if name != "norm"}
        logits: Any = self.head.apply({"params": head}, features)
        return logits


def _normalize_features(x: jax.Array, norm: Params, mean: jax.Array, var: jax.Array) -> jax.Array:
    return (x - mean) * jax.lax.rsqrt(var + _EPSILON) * norm["scale"] + norm["bias"]


def resize_logits(logits: jax.Array, size: Size) -> jax.Array:
    """Resizes `[batch, h, w, classes]` to `size` bilinearly, with half-pixel centres.

    There is no antialiasing, as in PyTorch's `interpolate` with `align_corners=False`.
    """
    if logits.shape[1:3] == size:
        return logits
    shape = (logits.shape[0], *size, logits.shape[3])
    return jax.image.resize(logits, shape, "bilinear", antialias=False)


def resize_to_masks(logits: jax.Array, extent: jax.Array, size: Size) -> jax.Array:
    """Resizes the logits of each image to the size of its mask, as `resize_logits` does.

    Args:
      logits: float32 `[batch, h, w, classes]`.
      extent: int32 `[batch, 6]`, see `data.pipeline.DatasetSpec.blank`.
      size: height and width of the result, of which each mask has the upper left part.

    Returns:
      float32 `[batch, *size, classes]`.
    """
    extent = extent.astype(jnp.float32)

    def interpolate(axis: int) -> jax.Array:
        """The weights of the old pixels in the new ones, `[batch, new, old]`."""
        start, old, new = (extent[:, axis + i, None] for i in (0, 2, 4))
        places = (jnp.arange(size[axis]) + 0.5) * old / jnp.maximum(new, 1) - 0.5
        places = start + jnp.clip(places, 0, jnp.maximum(old - 1, 0))
        pixels = jnp.arange(logits.shape[1 + axis])
        return jnp.maximum(1 - jnp.abs(places[..., None] - pixels), 0)

    exact = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("bik,bkwc->biwc", interpolate(0), logits, precision=exact)
    return jnp.einsum("bjl,bilc->bijc", interpolate(1), logits, precision=exact)


def slide(
    find_logits: Callable[[jax.Array], jax.Array], images: jax.Array, window: Size, stride: Size
) -> jax.Array:
    """Computes logits in overlapping windows; where they overlap, their mean counts.

    The windows start every `stride` pixels, and the last ones end where the image does. A side of a
    window is at most that of the image.

    Args:
      find_logits: from images `[batch, h, w, channels]` to `[batch, h, w, classes]`.
      images: `[batch, height, width, channels]`.
      window: height and width.
      stride: rows and columns from one window to the next.

    Returns:
      `[batch, height, width, classes]`.
    """
    height, width = images.shape[1:3]
    sides = min(window[0], height), min(window[1], width)
    starts = np.array(
        [
            (top, left)
            for top in _find_starts(height, sides[0], stride[0])
            for left in _find_starts(width, sides[1], stride[1])
        ],
        np.int32,
    )
    counts = np.zeros((height, width, 1), np.float32)
    for top, left in starts:
        counts[top : top + sides[0], left : left + sides[1]] += 1
    batch, channels = images.shape[0], images.shape[3]
    classes = jax.eval_shape(
        find_logits, jax.ShapeDtypeStruct((batch, *sides, channels), images.dtype)
    ).shape[-1]

    def add(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        place = (0, start[0], start[1], 0)
        logits = find_logits(jax.lax.dynamic_slice(images, place, (batch, *sides, channels)))
        before = jax.lax.dynamic_slice(total, place, (batch, *sides, classes))
        return jax.lax.dynamic_update_slice(total, before + logits, place), None

    total = jnp.zeros((batch, height, width, classes), jnp.float32)
    return jax.lax.scan(add, total, jnp.asarray(starts))[0] / counts


def _find_starts(side: int, window: int, stride: int) -> list[int]:
    count = -(-max(side - window, 0) // stride) + 1
    return [min(i * stride, side - window) for i in range(count)]


def check_options(
    name: str,
    model: nn.Module,
    *,
    outputs: int,
    image_shape: tuple[int, int, int],
    head: Head = "linear",
    head_width: int = 256,
    layers: int = 1,
    freeze_backbone: bool = False,
    dropout: float = 0.0,
    flip: float = 0.0,
    color_jitter: float | tuple[float, float, float] = 0.0,
    pixel_mean: Pixels = 0.5,
    pixel_std: Pixels = 0.5,
) -> dict[str, Any]:
    """Makes the attributes of a `DenseObjective` from config values.

    Args:
      name: of the objective.
      model: without a head.
      outputs: of the head.
      image_shape: height, width and channels.
      head, head_width: `kind` and `width` of `PixelHead`.
      flip, color_jitter: of `Augmentation`; the others are attributes.

    Raises:
      UserError: a value out of its range, or a model that is no `VisionTransformer`.
    """
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"objective.name={name!r} takes the patch tokens of a Vision Transformer: "
            "expected --config.model.name=vit"
        )
    if model.patch_dropout_rate:
        raise UserError(
            f"model.patch_dropout_rate={model.patch_dropout_rate}: expected 0 for "
            f"objective.name={name!r}, which needs all patches"
        )
    if not 1 <= layers <= model.num_layers:
        raise UserError(
            f"objective.layers={layers}: expected 1 to {model.num_layers}, the blocks of the model"
        )
    if head_width < 2:
        raise UserError(f"objective.head_width={head_width}: expected at least 2")
    if not 0 <= dropout < 1:
        raise UserError(f"objective.dropout={dropout}: expected 0 <= value < 1")
    check_share(flip=flip)
    mean, std = check_pixels(pixel_mean, pixel_std)
    return {
        "model": model,
        "head": PixelHead(head, outputs, head_width, model.dtype),
        "grid": model.grid(image_shape[:2]),
        "layers": layers,
        "freeze_backbone": freeze_backbone,
        "dropout": dropout,
        "augmentation": Augmentation(flip=flip, color_jitter=color_jitter),
        "pixel_mean": mean,
        "pixel_std": std,
    }
