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

from vit_jax.losses import make_targets, softmax_cross_entropy
from vit_jax.objectives.augment import FLIP_KEY, flip_lr
from vit_jax.objectives.base import Batch, Objective, Params
from vit_jax.objectives.pixels import Pixels, check_pixels, normalize
from vit_jax.utils.errors import UserError

# Of the published batch normalisation.
_EPSILON = 1e-6
_MOMENTUM = 0.9
_INIT_STDDEV = 0.01


@dataclasses.dataclass(frozen=True)
class LinearProbe(Objective):
    """One head for each learning rate; all see the same features of one forward pass.

    The heads lie under `probe` as `x0.1`, `x1`, ...: the factor on `optimizer.lr`. They are trained
    as if each were alone: with the sum of their losses, and no parameter in common.

    Attributes:
      model: without a head; called as `model(images, train=False)`, gives `(_, out)`, of which
        `pre_logits` are the features.
      num_classes: width of each head.
      lr_factors: one for each head.
      flip: the share of images that are mirrored left and right.
      pixel_mean: of pixels in [0, 1], subtracted from them.
      pixel_std: what they are divided by then.
    """

    model: nn.Module
    num_classes: int
    lr_factors: tuple[float, ...]
    flip: float
    pixel_mean: Pixels
    pixel_std: Pixels

    objective_params = ("probe",)
    classifies = False
    frozen = ("(?!probe/).*", "probe/(mean|var)")

    @property
    def head_names(self) -> tuple[str, ...]:
        """Of the heads, in the order of `lr_factors`."""
        return tuple(f"x{factor:g}" for factor in self.lr_factors)

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        backbone_rng, head_rng = jax.random.split(rng)
        images = self._to_float(batch["image"][:1])
        (_, out), variables = self.model.init_with_output(backbone_rng, images, train=False)
        width = out["pre_logits"].shape[-1]
        kernel = _INIT_STDDEV * jax.random.normal(head_rng, (width, self.num_classes))
        probe: dict[str, Any] = {
            # A copy each, since no buffer may stand twice in a state that is donated.
            name: {"kernel": jnp.copy(kernel), "bias": jnp.zeros(self.num_classes)}
            for name in self.head_names
        }
        probe |= {"mean": jnp.zeros(width), "var": jnp.ones(width)}
        return {**variables["params"], "probe": probe}

    def augment(self, batch: Batch, rng: jax.Array) -> Batch:
        images = batch["image"]
        if self.flip:
            images = flip_lr(jax.random.fold_in(rng, FLIP_KEY), images, probability=self.flip)
        targets = make_targets(batch["label"], self.num_classes)
        return {"image": self._to_float(images), "target": targets}

    def loss(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        features = jax.lax.stop_gradient(self._encode(params, batch["image"])["pre_logits"])
        features = features.astype(jnp.float32)
        mean, var = features.mean(axis=0), features.var(axis=0)
        logits = self._apply_heads(params["probe"], features, mean, var)
        losses = softmax_cross_entropy(logits, batch["target"][None]).mean(axis=1)
        # The mean is shown, the sum is differentiated: so no head depends on how many there are.
        named = {f"loss_{name}": losses[i] for i, name in enumerate(self.head_names)}
        # Running variances are unbiased ones, as published.
        var = var * (len(features) / max(len(features) - 1, 1))
        statistics = {"batch_mean": mean, "batch_var": var}
        return losses.sum(), {"loss": losses.mean(), **named, **statistics}

    def predict(self, params: Params, batch: Batch) -> dict[str, Any]:
        """`pre_logits, encoded`, and `head_logits` `[heads, batch, classes]`."""
        out = self._encode(params, self._to_float(batch["image"]))
        probe, features = params["probe"], out["pre_logits"].astype(jnp.float32)
        logits = self._apply_heads(probe, features, probe["mean"], probe["var"])
        return {**out, "head_logits": logits}

    def lr_multipliers(self) -> tuple[tuple[str, float], ...]:
        names = zip(self.head_names, self.lr_factors, strict=True)
        return tuple((f"probe/{name.replace('.', '[.]')}/.*", factor) for name, factor in names)

    def track(
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
        """Logits of all heads at once, `[heads, batch, classes]`."""
        features = (features - mean) * jax.lax.rsqrt(var + _EPSILON)
        kernels, biases = (
            jnp.stack([probe[name][part] for name in self.head_names])
            for part in ("kernel", "bias")
        )
        return jnp.einsum("bd,kdc->kbc", features, kernels) + biases[:, None]

    def _to_float(self, images: jax.Array) -> jax.Array:
        return normalize(images, self.pixel_mean, self.pixel_std)


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
    """A `LinearProbe` from config values.

    Args:
      model: without a head; `init_from` says where its parameters come from.
      num_classes: width of each head.
      multi_label: whether examples of the data have several labels.
      lr_factors: on `optimizer.lr`; a head is trained with each.
      flip: the share of images that are mirrored left and right.
      pixel_mean: of pixels in [0, 1], subtracted from them.
      pixel_std: what they are divided by then.

    Raises:
      UserError: factors that are no positive numbers or not different, or several labels.
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
    if not 0 <= flip <= 1:
        raise UserError(f"objective.flip={flip}: expected 0 to 1")
    mean, std = check_pixels(pixel_mean, pixel_std)
    return LinearProbe(model, num_classes, tuple(lr_factors), flip, mean, std)
