# SPDX-License-Identifier: Apache-2.0
"""Linear classifiers on frozen features, with several learning rates in one run.

Source: arXiv:2111.06377, appendix A.1: batch normalisation without scale and bias comes before each
linear layer.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.losses import make_targets, softmax_cross_entropy, top1_hits
from vit_jax.objectives.augment import flip_lr
from vit_jax.objectives.base import Batch, Params, check_share, headless
from vit_jax.objectives.pixels import ImageObjective, Pixels, check_pixels
from vit_jax.utils.errors import UserError

# The values of the published batch normalisation.
_EPSILON = 1e-6
_MOMENTUM = 0.9
_INIT_STDDEV = 0.01


@dataclasses.dataclass(frozen=True)
class LinearProbe(ImageObjective):
    """One head for each learning rate; all see the same features of one forward pass.

    The heads are stored under `probe` as `x0.1`, `x1`, ..., named by the factor on `optimizer.lr`.
    They share no parameters and the sum of their losses is minimised, so that each trains as if it
    were alone.

    Attributes:
      model: has no head; called as `model(images, train=False)`, it returns `(_, out)`, and the
        features are `out["pre_logits"]`.
      num_classes: width of each head.
      lr_factors: one for each head.
      flip: share of images that are mirrored left and right.
    """

    model: nn.Module
    num_classes: int
    lr_factors: tuple[float, ...]
    flip: float

    objective_params = ("probe",)
    classifies = False
    frozen = ("(?!probe/).*", "probe/(mean|var)")

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the heads, in the order of `lr_factors`."""
        return tuple(f"x{factor:g}" for factor in self.lr_factors)

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        backbone_rng, head_rng = jax.random.split(rng)
        images = self.normalize(batch["image"][:1])
        (_, out), variables = self.model.init_with_output(backbone_rng, images, train=False)
        width = out["pre_logits"].shape[-1]
        kernel = _INIT_STDDEV * jax.random.normal(head_rng, (width, self.num_classes))
        probe: dict[str, Any] = {
            # A copy each: a donated state must not alias buffers.
            name: {"kernel": jnp.copy(kernel), "bias": jnp.zeros(self.num_classes)}
            for name in self.head_names
        }
        probe |= {"mean": jnp.zeros(width), "var": jnp.ones(width)}
        return {**variables["params"], "probe": probe}

    def augment(self, batch: Batch, rng: jax.Array) -> Batch:
        images = flip_lr(rng, batch["image"], probability=self.flip)
        targets = make_targets(batch["label"], self.num_classes)
        return {"image": self.normalize(images), "target": targets, "label": batch["label"]}

    def loss(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        features = jax.lax.stop_gradient(self._encode(params, batch["image"])["pre_logits"])
        features = features.astype(jnp.float32)
        mean, var = features.mean(axis=0), features.var(axis=0)
        logits = self._apply_heads(params["probe"], features, mean, var)
        losses = softmax_cross_entropy(logits, batch["target"][None]).mean(axis=1)
        # The mean is logged and the sum differentiated, so that no head depends on their number.
        named = {f"loss_{name}": losses[i] for i, name in enumerate(self.head_names)}
        top1 = top1_hits(logits, batch["label"]).mean(axis=1)
        named |= {f"top1_{name}": top1[i] for i, name in enumerate(self.head_names)}
        # Running variances are unbiased ones, as published.
        var = var * (len(features) / max(len(features) - 1, 1))
        statistics = {"batch_mean": mean, "batch_var": var}
        return losses.sum(), {"loss": losses.mean(), **named, **statistics}

    def predict(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Returns `pre_logits`, `encoded` and `head_logits`, float32 `[heads, batch, classes]`."""
        out = self._encode(params, self.normalize(batch["image"]))
        probe, features = params["probe"], out["pre_logits"].astype(jnp.float32)
        logits = self._apply_heads(probe, features, probe["mean"], probe["var"])
        return {**out, "head_logits": logits}

    def lr_multipliers(self) -> tuple[tuple[str, float], ...]:
        names = zip(self.head_names, self.lr_factors, strict=True)
        return tuple((f"probe/{name.replace('.', '[.]')}/.*", factor) for name, factor in names)

    def update_statistics(
        self, params: Params, metrics: dict[str, jax.Array]
    ) -> tuple[Params, dict[str, jax.Array]]:
        metrics, probe = dict(metrics), dict(params["probe"])
        for name in ("mean", "var"):
            batch = metrics.pop(f"batch_{name}")
            probe[name] = _MOMENTUM * probe[name] + (1 - _MOMENTUM) * batch
        return {**params, "probe": probe}, metrics

    def _encode(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        backbone = {name: x for name, x in params.items() if name != "probe"}
        outputs: Any = self.model.apply({"params": backbone}, images, train=False)
        return outputs[1]

    def _apply_heads(
        self, probe: Params, features: jax.Array, mean: jax.Array, var: jax.Array
    ) -> jax.Array:
        """Logits of all heads at once, float32 `[heads, batch, classes]`."""
        features = (features - mean) * jax.lax.rsqrt(var + _EPSILON)
        kernels, biases = (
            jnp.stack([probe[name][part] for name in self.head_names])
            for part in ("kernel", "bias")
        )
        return jnp.einsum("bd,kdc->kbc", features, kernels) + biases[:, None]


@headless
def make_linear_probe(
    *,
    model: nn.Module,
    num_classes: int,
    multi_label: bool = False,
    lr_factors: tuple[float, ...] = (1.0,),
    flip: float = 0.0,
    pixel_mean: Pixels = 0.5,
    pixel_std: Pixels = 0.5,
) -> LinearProbe:
    """Makes a `LinearProbe` from config values, which are the attributes of that class.

    Raises `UserError` if the factors are not positive or not different, or if the data are
    `multi_label`: examples have several labels.
    """
    names = {f"{factor:g}" for factor in lr_factors}
    if not names or len(names) < len(lr_factors) or min(lr_factors) <= 0:
        raise UserError(
            f"objective.lr_factors={lr_factors}: expected different factors above 0, such as "
            "(0.1, 1.0, 10.0)"
        )
    if multi_label:
        raise UserError(
            "objective.name='linear_probe' takes one label an example, and the data have several"
        )
    check_share(flip=flip)
    mean, std = check_pixels(pixel_mean, pixel_std)
    factors = tuple(lr_factors)
    return LinearProbe(model, num_classes, factors, flip, pixel_mean=mean, pixel_std=std)
