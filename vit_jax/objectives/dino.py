# SPDX-License-Identifier: Apache-2.0
"""Self-distillation: a student matches what its own average sees in other crops of an image.

Sources: DINO, arXiv:2104.14294; iBOT, arXiv:2111.07832, for masked patches; DINOv2,
arXiv:2304.07193, for Sinkhorn-Knopp, KoLeo and separate heads; DINOv3, arXiv:2508.10104, for Gram
anchoring.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoint.pretrained.adapt import adapt_params
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.models.positions import resize_patches
from vit_jax.models.prototypes import LastLayer, PrototypeHead
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives import collapse
from vit_jax.objectives.base import Batch, Params, check_share, headless
from vit_jax.objectives.block_masks import BlockMasks, gather_masked
from vit_jax.objectives.pixels import ImageObjective, Pixels, check_pixels
from vit_jax.objectives.ssl_losses import (
    centered_targets,
    crop_losses,
    gram_loss,
    koleo_loss,
    patch_loss,
    sinkhorn_targets,
)
from vit_jax.observe.console import log
from vit_jax.optim.schedules import cosine_between, linear_between
from vit_jax.utils.durations import (
    Clock,
    count_steps,
    duration_keys,
    find_duration,
    to_steps,
)
from vit_jax.utils.errors import UserError, name_key

Centering = Literal["centering", "sinkhorn"]

# Names of the views of `data.views`: the second global crop, the local ones, and both global crops
# as the Gram teacher sees them.
GLOBAL, LOCAL, GRAM = "global", "local", "gram"
# Names of the inputs of a step.
_TEACHER, _TEMPERATURE, _GRAM_WEIGHT = "teacher", "teacher_temp", "gram_weight"
# Parts of the parameters beside those of the model.
_DINO_HEAD, _IBOT_HEAD, _CENTERS, _MASK_TOKEN = "dino_head", "ibot_head", "centers", "mask_token"
_GRAM_TEACHER = "gram_teacher"
# Folded into a step's key.
_MASK_KEY, _GLOBAL_KEY, _LOCAL_KEY = range(3)
# Prototypes of one head beyond which no machine has the memory.
_MOST_PROTOTYPES = 2**20

# Limits beyond which a metric is a sign of a collapse.
_LEAST_ENTROPY, _MOST_ENTROPY = 0.02, 0.99  # of the entropy of all prototypes
_LEAST_RANK = 1.5
_MOST_COSINE = 0.99


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gram:
    """Gram anchoring: cosines among the student's patches stay those of an earlier teacher.

    Attributes:
      weight: of the loss.
      start: number of updates before the first with this loss.
      updates: numbers of updates after which the average becomes the Gram teacher.
      source: the first Gram teacher, see `load_pretrained`; None where an update makes the first.
      channels: of its images.
    """

    weight: float
    start: int
    updates: tuple[int, ...]
    source: str | None
    channels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dino(ImageObjective):
    """A student that predicts, for each crop, the prototypes of its teacher for other crops.

    The teacher is the average of the student, `TrainState.ema_params`, and sees the global crops
    alone. Batches have `image`, the first global crop, and the views `global`, the second one, and
    `local`, if there are local crops; `gram`, if given, are both global crops as the Gram teacher
    sees them. The heads are stored under `dino_head` and `ibot_head`, running means of the
    teacher's scores under `centers`, the embedding of masked patches as `mask_token`, and the
    parameters of the Gram teacher under `gram_teacher`.

    Attributes:
      model: a `VisionTransformer` without a head.
      head: of class features.
      patch_head: of patches; None for `head`.
      masks: hides patches of the student's global crops; None for no loss of masked patches.
      ibot_weight: weight of the loss of masked patches.
      koleo_weight: weight of the KoLeo loss of each of both global crops; 0 for none.
      gram: Gram anchoring; None for none.
      centering: how the teacher's scores become targets.
      center_momentum: of the running means.
      sinkhorn_iterations: for the centering "sinkhorn".
      student_temp: divides the student's scores.
      teacher_temp: the first and the last temperature of the teacher, and the number of steps from
        one to the other.
      momentum: of the average in the first and in the last step.
      total_steps: of the run.
      batch_size: of the run.
      local_crops: number of local crops of an image.
      grid: rows and columns of patches of a global crop.
    """

    model: Any
    head: PrototypeHead
    patch_head: PrototypeHead | None
    masks: BlockMasks | None
    ibot_weight: float
    koleo_weight: float
    gram: Gram | None
    centering: Centering
    center_momentum: float
    sinkhorn_iterations: int
    student_temp: float
    teacher_temp: tuple[float, float, int]
    momentum: tuple[float, float]
    total_steps: int
    batch_size: int
    local_crops: int
    grid: tuple[int, int]

    classifies = False
    keeps_average = True
    needs_labels = False

    @property
    def objective_params(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Depends on the parts that are on."""
        parts = {
            _DINO_HEAD: True,
            _IBOT_HEAD: self.masks is not None and self.patch_head is not None,
            _CENTERS: self.centering == "centering",
            _MASK_TOKEN: self.masks is not None,
            _GRAM_TEACHER: self.gram is not None,
        }
        return tuple(name for name, used in parts.items() if used)

    @property
    def frozen(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The centers, which `update_statistics` changes, and the Gram teacher."""
        centers = (f"{_CENTERS}/.*",) if self.centering == "centering" else ()
        return (*centers, f"{_GRAM_TEACHER}/.*") if self.gram is not None else centers

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        model_rng, head_rng, patch_rng = jax.random.split(rng, 3)
        images = self.normalize(batch["image"][:1])
        masked = None
        if self.masks is not None:
            masked = jnp.zeros((1, math.prod(self.masks.grid)), bool)
        (_, out), variables = self.model.init_with_output(
            model_rng, images, train=False, masked=masked
        )
        features = out["pre_logits"]
        params = {**variables["params"], _DINO_HEAD: self.head.init(head_rng, features)["params"]}
        if self.gram is not None:
            # Of zeros until a file or an update gives them.
            backbone = {k: x for k, x in variables["params"].items() if k != _MASK_TOKEN}
            params[_GRAM_TEACHER] = jax.tree.map(jnp.zeros_like, backbone)
        counts = {"dino": self.head.prototypes}
        if self.masks is not None:
            counts["ibot"] = (self.patch_head or self.head).prototypes
            if self.patch_head is not None:
                params[_IBOT_HEAD] = self.patch_head.init(patch_rng, features)["params"]
        if self.centering == "centering":
            params[_CENTERS] = {name: jnp.zeros(count) for name, count in counts.items()}
        return params

    def augment(self, batch: Batch, rng: jax.Array) -> Batch:
        names = [name for name in ("image", GLOBAL, LOCAL, GRAM) if name in batch]
        return {name: self.normalize(batch[name]) for name in names}

    def loss(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        teacher, temperature = params[_TEACHER], params[_TEMPERATURE]
        inputs = (_TEACHER, _TEMPERATURE, _GRAM_WEIGHT)
        student = {k: x for k, x in params.items() if k not in inputs}
        both = jnp.concatenate([batch["image"][:, None], batch[GLOBAL]], axis=1)
        count, images = both.shape[0], _merge_crops(both)
        masks = None
        if self.masks is not None:
            masks = self.masks.draw(jax.random.fold_in(rng, _MASK_KEY), len(images))
        taught = self._encode(teacher, images)
        seen = self._encode(student, images, rng=jax.random.fold_in(rng, _GLOBAL_KEY), masks=masks)

        scores: Any = self.head.apply({"params": teacher[_DINO_HEAD]}, _split(taught["pre_logits"]))
        targets, metrics = self._make_targets(student, "dino", scores, temperature)
        head = {"params": student[_DINO_HEAD]}
        globals_: Any = self.head.apply(head, _split(seen["pre_logits"]))
        locals_: Any = None
        if LOCAL in batch:
            rng_local = jax.random.fold_in(rng, _LOCAL_KEY)
            small = self._encode(student, _merge_crops(batch[LOCAL]), rng=rng_local)["pre_logits"]
            locals_ = self.head.apply(head, small.reshape(count, -1, small.shape[-1]))
        parts = crop_losses(targets, globals_, locals_, self.student_temp)
        dino_loss = parts[0] + parts[1]
        loss = dino_loss
        metrics |= {"dino_loss": dino_loss} | self._measure(taught, targets, dino_loss)
        if masks is not None:
            part, more = self._patch_loss(student, teacher, seen, taught, masks, temperature)
            loss, metrics = loss + self.ibot_weight * part, metrics | more | {"ibot_loss": part}
        if self.koleo_weight:
            crops = _split(seen["pre_logits"])
            part = koleo_loss(crops[:, 0]) + koleo_loss(crops[:, 1])
            loss, metrics = loss + self.koleo_weight * part, metrics | {"koleo_loss": part}
        if self.gram is not None:
            weight = params[_GRAM_WEIGHT]
            crops = _merge_crops(batch[GRAM]) if GRAM in batch else images
            part = self._gram_loss(student[_GRAM_TEACHER], seen, crops, weight > 0)
            loss, metrics = loss + weight * part, metrics | {"gram_loss": part}
        return loss, {"loss": loss} | metrics

    def predict(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Returns `pre_logits` and `encoded` of whole images, without a mask."""
        return self._encode(params, self.normalize(batch["image"]))

    def step_inputs(self, step: jax.Array, average: Params) -> dict[str, Any]:
        inputs = {_TEACHER: average, _TEMPERATURE: linear_between(*self.teacher_temp)(step)}
        if self.gram is not None:
            inputs[_GRAM_WEIGHT] = jnp.where(step >= self.gram.start, self.gram.weight, 0.0)
        return inputs

    def load_params(self) -> Params:
        """Returns the first Gram teacher, if it is from a file."""
        if self.gram is None or self.gram.source is None:
            return {}
        source, channels = self.gram.source, self.gram.channels
        params, notes = load_gram_teacher(source, self.model, self.grid, channels)
        log(f"Gram teacher from {source}")
        for note in notes:
            log(f"  {note}")
        return {_GRAM_TEACHER: params}

    def follow_average(
        self, params: Params, average: Params, before: jax.Array, step: jax.Array | int
    ) -> tuple[Params, Params]:
        """Makes the average the Gram teacher, at the steps at which that is due."""
        if self.gram is None or not self.gram.updates:
            return params, average
        updates, old = jnp.asarray(self.gram.updates), params[_GRAM_TEACHER]
        due = jnp.any((updates > before) & (updates <= step))
        if self.gram.source is None:
            # Fewer `total_steps` on resume may move the first update to before the step.
            unset = ~jnp.any(old["embedding"]["kernel"])
            due |= unset & jnp.any(updates <= step)
        gram = jax.tree.map(lambda x, a: jnp.where(due, a, x), old, {k: average[k] for k in old})
        return {**params, _GRAM_TEACHER: gram}, {**average, _GRAM_TEACHER: gram}

    def average_decay(self, step: jax.Array) -> jax.Array | float:
        """Rises to its end along half a cosine."""
        return jnp.asarray(cosine_between(*self.momentum, self.total_steps)(step))

    def update_statistics(
        self, params: Params, metrics: dict[str, jax.Array]
    ) -> tuple[Params, dict[str, jax.Array]]:
        if self.centering != "centering":
            return params, metrics
        metrics, centers = dict(metrics), dict(params[_CENTERS])
        for name, center in centers.items():
            mean = metrics.pop(f"sum_{name}") / metrics.pop(f"count_{name}")
            centers[name] = self.center_momentum * center + (1 - self.center_momentum) * mean
        return {**params, _CENTERS: centers}, metrics

    def check_batch(self, size: int) -> None:
        if self.koleo_weight and size < 2:
            raise UserError(
                f"objective.koleo_weight={self.koleo_weight} with (micro-)batches of {size}: the "
                "loss is the distance to the nearest other image; expected data.batch_size / "
                "optimizer.accum_steps of at least 2"
            )

    def notes(self) -> tuple[str, ...]:
        heads = {"prototypes": self.head.prototypes}
        rows = self.batch_size * (2 + 2 + self.local_crops)
        values = rows * self.head.prototypes
        if self.masks is not None:
            head = self.patch_head or self.head
            if self.patch_head is not None:
                heads["prototypes of patches"] = head.prototypes
            images = 2 * self.batch_size
            group = self.masks.group(images)
            values += 2 * self.masks.capacity(group) * (images // group) * head.prototypes
        listed = " and ".join(f"{count:,} {name}" for name, count in heads.items())
        return (
            f"dino: {listed}: the scores of a step take {4 * values / 1e9:,.3g} GB over all "
            "devices, and their gradients half as much or more",
        )

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        most, found = math.log(self.head.prototypes), {}
        share = metrics.get("target_entropy", most / 2) / most
        if share > _MOST_ENTROPY and metrics.get("dino_loss", 0) > _MOST_ENTROPY * most:
            found["uniform"] = (
                f"target_entropy {metrics['target_entropy']:.4g} of at most {most:.4g}: the "
                "teacher's targets are uniform; a smaller objective.teacher_temp sharpens them"
            )
        if share < _LEAST_ENTROPY:
            found["peaked"] = (
                f"target_entropy {metrics['target_entropy']:.4g} of at most {most:.4g}: the "
                "teacher gives all images few prototypes; a larger objective.teacher_temp or "
                "objective.centering='sinkhorn' spreads them"
            )
        if metrics.get("feature_rank", _LEAST_RANK) < _LEAST_RANK:
            found["rank"] = (
                f"feature_rank {metrics['feature_rank']:.3g}: the features of all images have "
                "nearly one direction; objective.koleo_weight=0.1 spreads them"
            )
        if metrics.get("patch_cosine", 0) > _MOST_COSINE:
            found["patches"] = (
                f"patch_cosine {metrics['patch_cosine']:.4g}: the patches of an image have nearly "
                "the same features; they are of no use for dense tasks"
            )
        return found

    def _encode(
        self,
        params: Params,
        images: jax.Array,
        *,
        rng: jax.Array | None = None,
        masks: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """The outputs of the model; without a key it is not in training."""
        outputs: Any = self.model.apply(
            {"params": params},
            images,
            train=rng is not None,
            masked=masks,
            position_grid=self.grid,
            rngs={} if rng is None else {"dropout": rng},
        )
        return outputs[1]

    def _patches(self, out: dict[str, jax.Array]) -> jax.Array:
        return out["encoded"][:, self.model.num_prefix_tokens :]

    def _make_targets(
        self,
        student: Params,
        name: str,
        scores: jax.Array,
        temperature: jax.Array,
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The teacher's targets, and the sums of which `update_statistics` makes a center."""
        if self.centering == "sinkhorn":
            iterations = self.sinkhorn_iterations
            return sinkhorn_targets(scores, temperature, iterations=iterations, valid=valid), {}
        targets = centered_targets(scores, student[_CENTERS][name], temperature)
        mask = jnp.ones(scores.shape[:-1]) if valid is None else valid.astype(jnp.float32)
        axes = tuple(range(scores.ndim - 1))
        sums = jnp.sum(scores * mask[..., None], axis=axes)
        return targets, {f"sum_{name}": sums, f"count_{name}": mask.sum()}

    def _patch_loss(
        self,
        student: Params,
        teacher: Params,
        seen: dict[str, jax.Array],
        taught: dict[str, jax.Array],
        masks: jax.Array,
        temperature: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        assert self.masks is not None
        name = _DINO_HEAD if self.patch_head is None else _IBOT_HEAD
        head = self.patch_head or self.head
        images, patches = masks.shape
        group = self.masks.group(images)
        groups = images // group
        places = gather_masked(masks.reshape(groups, group, patches), self.masks.capacity(group))
        indices, valid, weights = places

        def score(params: Params, out: dict[str, jax.Array]) -> jax.Array:
            x = self._patches(out)
            x = x.reshape(groups, group * patches, x.shape[-1])
            x = jnp.take_along_axis(x, indices[..., None], axis=1)
            return head.apply({"params": params[name]}, x)  # pyright: ignore[reportReturnType]

        scores = score(teacher, taught)
        targets, sums = self._make_targets(student, "ibot", scores, temperature, valid)
        loss = patch_loss(targets, score(student, seen), weights, self.student_temp, images=images)
        return loss, sums

    def _gram_loss(
        self, gram: Params, seen: dict[str, jax.Array], crops: jax.Array, active: jax.Array
    ) -> jax.Array:
        """The loss of Gram anchoring, or 0 and no computation unless `active`."""
        grid = self.model.grid(crops.shape[1:3])

        def compute(patches: jax.Array) -> jax.Array:
            wanted = self._patches(self._encode(gram, crops))
            if grid != self.grid:
                wanted = resize_patches(wanted, grid, self.grid)
            return gram_loss(patches, jax.lax.stop_gradient(wanted))

        return jax.lax.cond(active, compute, lambda _: jnp.zeros(()), self._patches(seen))

    def _measure(
        self, taught: dict[str, jax.Array], targets: jax.Array, dino_loss: jax.Array
    ) -> dict[str, jax.Array]:
        """Signs of a collapse, of the teacher's features and targets."""
        taught = jax.tree.map(jax.lax.stop_gradient, taught)
        patches = self._patches(taught).astype(jnp.float32)
        target_entropy = collapse.entropy(targets).mean()
        return {
            "target_entropy": target_entropy,
            "target_kl": dino_loss - target_entropy,
            "feature_rank": collapse.participation_ratio(taught["pre_logits"]),
            "patch_norm": jnp.linalg.norm(patches, axis=-1).mean(),
            "patch_cosine": collapse.mean_cosine(patches),
        }


@headless
def make_dino(
    *,
    model: Any,
    image_shape: tuple[int, int, int],
    view_shapes: Mapping[str, tuple[int, int, int, int]],
    clock: Clock,
    total_steps: int,
    prototypes: int = 65536,
    head_width: int = 2048,
    head_layers: int = 3,
    bottleneck: int = 256,
    last_layer: LastLayer = "unit",
    centering: Centering = "centering",
    center_momentum: float = 0.9,
    sinkhorn_iterations: int = 3,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    teacher_temp_start: float = 0.04,
    teacher_temp_warmup_steps: int | None = None,
    teacher_temp_warmup_epochs: float | None = None,
    teacher_temp_warmup_examples: float | None = None,
    teacher_temp_warmup_percent: float | None = None,
    momentum: float = 0.996,
    momentum_end: float = 1.0,
    ibot_weight: float = 0.0,
    ibot_head: Literal["shared", "separate"] = "shared",
    ibot_prototypes: int | None = None,
    mask_ratio: tuple[float, float] = (0.1, 0.5),
    mask_share: float = 0.5,
    koleo_weight: float = 0.0,
    gram_weight: float = 0.0,
    gram_teacher: str | None = None,
    gram_start: dict | None = None,
    gram_updates: tuple[dict, ...] = (),
    same_draws: tuple[str, ...] = (),
    pixel_mean: Pixels = 0.5,
    pixel_std: Pixels = 0.5,
) -> Dino:
    """Makes a `Dino` from config values.

    Args:
      model: of a Vision Transformer.
      image_shape: height, width and channels of the first global crop.
      view_shapes: number, height, width and channels of the views `global` and `local`.
      clock: batch size and length of an epoch.
      total_steps: of the run.
      prototypes: number of prototypes.
      head_width: width of the hidden layers of the heads.
      head_layers: number of layers of the MLP of the heads.
      bottleneck: width before the prototypes.
      last_layer: see `Prototypes.kind`.
      centering: "centering" subtracts the running mean of the scores; "sinkhorn" for
        `sinkhorn_targets` over the (micro-)batch.
      center_momentum: of the running mean.
      sinkhorn_iterations: of `sinkhorn_targets`.
      student_temp: divides the student's scores.
      teacher_temp: divides the teacher's scores, after a linear warm-up from `teacher_temp_start`.
      momentum: of the average that is the teacher; rises to `momentum_end` along half a cosine.
      ibot_weight: weight of the loss of masked patches; 0 for no masks.
      ibot_head: whether patches have a head of their own.
      ibot_prototypes: of that head; None for as many as `prototypes`.
      mask_ratio: least and greatest share of the patches of an image that are masked.
      mask_share: share of the global crops that have a mask.
      koleo_weight: weight of the KoLeo loss, which is over the (micro-)batch; 0 for none.
      gram_weight: weight of Gram anchoring; 0 for none.
      gram_teacher: its first teacher, see `load_pretrained`; None for the average of this run at
        `gram_start`, or at an earlier one of `gram_updates`.
      gram_start: a duration such as `{"epochs": 10}`, before which its weight is 0; None for 0.
      gram_updates: durations after which the average of this run becomes the Gram teacher.
      same_draws: names of views that repeat the random numbers of the global crops.
      pixel_mean: of pixels in [0, 1].
      pixel_std: of pixels in [0, 1].

    Raises:
      UserError: a value is out of its range, or values, crops and model do not go together.
    """
    _check_model(model)
    _check_crops(model, image_shape, view_shapes)
    gram = None
    if gram_weight or gram_teacher is not None or gram_start is not None or gram_updates:
        steps = _count_gram_steps(gram_start, gram_updates, clock, total_steps)
        gram = _make_gram(gram_weight, gram_teacher, *steps, image_shape[2])
    _check_gram_view(model, gram, image_shape, view_shapes, same_draws)
    positive = {
        "student_temp": student_temp,
        "teacher_temp": teacher_temp,
        "teacher_temp_start": teacher_temp_start,
    }
    for key, value in positive.items():
        if not 0 < value < math.inf:
            raise UserError(f"objective.{key}={value}: expected above 0, such as 0.1")
    for key, value in {"ibot_weight": ibot_weight, "koleo_weight": koleo_weight}.items():
        if not 0 <= value < math.inf:
            raise UserError(f"objective.{key}={value}: expected 0 (none) or more")
    sizes = {"head_width": head_width, "head_layers": head_layers, "bottleneck": bottleneck}
    for key, value in (sizes | {"sinkhorn_iterations": sinkhorn_iterations}).items():
        if value < 1:
            raise UserError(f"objective.{key}={value}: expected at least 1")
    check_share(
        center_momentum=center_momentum,
        momentum=momentum,
        momentum_end=momentum_end,
        mask_share=mask_share,
    )
    batch_size = int(clock.batch_size)  # Views are of one size, so it is the same in all steps.
    _check_prototypes("prototypes", prototypes, bottleneck, batch_size)
    separate = ibot_head == "separate"
    if ibot_prototypes is not None:
        _check_prototypes("ibot_prototypes", ibot_prototypes, bottleneck, batch_size)
        if not (ibot_weight and separate):
            raise UserError(
                f"objective.ibot_prototypes={ibot_prototypes}: expected objective.ibot_weight "
                "above 0 and objective.ibot_head='separate' with it"
            )
    if not ibot_weight:
        _check_unused(
            "expected objective.ibot_weight above 0 with it",
            ibot_head=ibot_head,
            mask_ratio=tuple(mask_ratio),
            mask_share=mask_share,
        )
    _check_unused(
        f"expected the default with objective.centering={centering!r}, which has no use for it",
        **(
            {"sinkhorn_iterations": sinkhorn_iterations}
            if centering == "centering"
            else {"center_momentum": center_momentum}
        ),
    )
    warmup = {
        "teacher_temp_warmup_steps": teacher_temp_warmup_steps,
        "teacher_temp_warmup_epochs": teacher_temp_warmup_epochs,
        "teacher_temp_warmup_examples": teacher_temp_warmup_examples,
        "teacher_temp_warmup_percent": teacher_temp_warmup_percent,
    }
    if all(value is None for value in warmup.values()) and teacher_temp_start != teacher_temp:
        _check_unused(
            "expected a warm-up with it, such as objective.teacher_temp_warmup_percent=30",
            teacher_temp_start=teacher_temp_start,
        )
    grid = model.grid(image_shape[:2])
    if model.relative_positions:
        _check_grids(model, grid, view_shapes)
    if gram is not None and math.prod(grid) < 2:
        raise UserError(
            f"objective.gram_weight={gram_weight} with one patch in images of "
            f"{_text(image_shape)}, which has no cosine with another: expected a smaller "
            "model.patch_size, or 0"
        )
    masks = None
    if ibot_weight:
        masks = _make_masks(grid, mask_ratio, mask_share)
    head = PrototypeHead(
        prototypes=prototypes,
        hidden_size=head_width,
        bottleneck_size=bottleneck,
        num_layers=head_layers,
        last_layer=last_layer,
        dtype=model.dtype,
        constrain=model.constrain,
    )
    mean, std = check_pixels(pixel_mean, pixel_std)
    return Dino(
        model=model,
        head=head,
        patch_head=head.clone(prototypes=ibot_prototypes or prototypes) if separate else None,
        masks=masks,
        ibot_weight=ibot_weight,
        koleo_weight=koleo_weight,
        gram=gram,
        centering=centering,
        center_momentum=center_momentum,
        sinkhorn_iterations=sinkhorn_iterations,
        student_temp=student_temp,
        teacher_temp=(
            teacher_temp_start,
            teacher_temp,
            _count_warmup(warmup, clock, total_steps),
        ),
        momentum=(momentum, momentum_end),
        total_steps=total_steps,
        batch_size=batch_size,
        local_crops=view_shapes[LOCAL][0] if LOCAL in view_shapes else 0,
        grid=grid,
        pixel_mean=mean,
        pixel_std=std,
    )


def _check_model(model: Any) -> None:
    if not isinstance(model, VisionTransformer) or model.classifier not in ("token", "gap"):
        raise UserError(
            "objective.name='dino' needs patches of a Vision Transformer: expected "
            "model.name='vit' with model.classifier='token' or 'gap'"
        )
    unused = ("norm_after_pooling", "representation_size", "distillation_token")
    for key in (*unused, "patch_dropout_rate"):
        if getattr(model, key):
            raise UserError(
                f"model.{key}={getattr(model, key)} with objective.name='dino': expected none; "
                "give it to the model that is fine-tuned"
            )


def _check_crops(
    model: VisionTransformer,
    image_shape: tuple[int, int, int],
    view_shapes: Mapping[str, tuple[int, int, int, int]],
) -> None:
    example = f"(({GLOBAL!r}, 1, LINE), ({LOCAL!r}, 8, LINE))"
    for name in view_shapes.keys() - {GLOBAL, LOCAL, GRAM}:
        raise UserError(
            f"data.views: objective.name='dino' has no use for {name!r}; expected {example}"
        )
    if GLOBAL not in view_shapes:
        raise UserError(
            f"data.views: objective.name='dino' needs a second global crop beside the image of "
            f"data.preprocess: expected {example}"
        )
    count, *shape = view_shapes[GLOBAL]
    if (count, *shape) != (1, *image_shape):
        raise UserError(
            f"data.views.{GLOBAL}: {count} of {_text(shape)}, with images of {_text(image_shape)} "
            "from data.preprocess: expected one of the same size"
        )
    if LOCAL in view_shapes:
        local = view_shapes[LOCAL][1:]
        if local[0] > image_shape[0] or local[1] > image_shape[1]:
            raise UserError(
                f"data.views.{LOCAL}: crops of {_text(local)} are larger than the global crops of "
                f"{_text(image_shape)}: expected smaller ones"
            )
        _check_patches(model, LOCAL, local)


def _check_patches(model: VisionTransformer, name: str, shape: Sequence[int]) -> None:
    """Raises `UserError` if crops of this height and width can't be cut into patches."""
    size, stride = (shape[0], shape[1]), model.stride
    try:
        model.grid(size)
    except UserError:
        fits = [max(1, x // side) * side for x, side in zip(size, stride, strict=True)]
        raise UserError(
            f"data.views.{name}: crops of {_text(size)} can't be cut into patches of "
            f"{_text(stride)}: expected another size in its line, such as {_text(fits)}"
        ) from None


def _check_grids(
    model: VisionTransformer,
    grid: tuple[int, int],
    view_shapes: Mapping[str, tuple[int, int, int, int]],
) -> None:
    """Raises `UserError` if views have another grid of patches than the images."""
    for name, (_, *shape) in view_shapes.items():
        if model.grid(tuple(shape[:2])) != grid:
            raise UserError(
                f"data.views.{name}: crops of {_text(shape)} have another number of patches than "
                "the images, and the biases of model.position_embedding='relative' are of one: "
                "expected another embedding, such as 'learned'"
            )


def _text(shape: Any) -> str:
    return f"{shape[0]}x{shape[1]}"


def _check_unused(expected: str, **given: Any) -> None:
    """Raises `UserError` unless these options of `make_dino`, which have no effect, are default."""
    signature = inspect.signature(make_dino)
    for key, value in given.items():
        if value != signature.parameters[key].default:
            raise UserError(f"objective.{key}={value!r}: {expected}")


def _check_prototypes(key: str, count: int, bottleneck: int, batch_size: int) -> None:
    if count < 2:
        raise UserError(f"objective.{key}={count}: expected at least 2, such as 65536")
    if count > _MOST_PROTOTYPES:
        # Parameters, their average, gradients and both moments of Adam.
        weights, scores = 5 * 4 * count * bottleneck / 1e9, 4 * 4 * count * batch_size / 1e9
        raise UserError(
            f"objective.{key}={count}: the last layer would take {weights:,.1f} GB with its state, "
            f"and the scores of the global crops of a step {scores:,.1f} GB: expected at most "
            f"{_MOST_PROTOTYPES}, such as 65536"
        )


def _make_masks(grid: tuple[int, int], ratio: tuple[float, float], share: float) -> BlockMasks:
    low, high = ratio
    if not 0 <= low <= high < 1:
        raise UserError(
            f"objective.mask_ratio={ratio}: expected 0 <= least <= greatest < 1, such as (0.1, 0.5)"
        )
    patches = math.prod(grid)
    if int(high * patches + 1e-6) < 1 or int(low * patches + 1e-6) < 1:
        raise UserError(
            f"objective.mask_ratio={ratio} masks {int(low * patches + 1e-6)} to "
            f"{int(high * patches + 1e-6)} of the {patches} patches of a global crop: expected at "
            "least 1, by a larger ratio or a smaller model.patch_size"
        )
    if not share:
        raise UserError(
            "objective.mask_share=0 with objective.ibot_weight above 0: expected above 0, such as "
            "0.5, or objective.ibot_weight=0"
        )
    return BlockMasks(grid, (low, high), share)


def _count_warmup(given: Mapping[str, Any], clock: Clock, total_steps: int) -> int:
    keys = duration_keys("teacher_temp_warmup")
    found = find_duration(given, keys, prefix="objective.")
    if found is None:
        return 0
    key, value = found
    steps = to_steps(value, keys[key], clock=clock, total_steps=total_steps)
    if steps > total_steps:
        raise UserError(
            f"objective.{key}={value} is longer than the {total_steps} steps of the run, whose "
            "teacher would never have objective.teacher_temp: expected at most the run"
        )
    return steps


def _count_gram_steps(
    start: Mapping[str, Any] | None, updates: tuple[dict, ...], clock: Clock, total_steps: int
) -> tuple[int, tuple[int, ...]]:
    """The steps of `gram_start` and of `gram_updates`."""

    def count(key: str, duration: Mapping[str, Any]) -> int:
        return count_steps(
            duration,
            key=f"objective.{key}",
            clock=clock,
            total_steps=total_steps,
            unless="it would never take effect; expected less, or a longer run",
        )

    first = 0 if start is None else count("gram_start", start)
    return first, tuple(count("gram_updates", duration) for duration in updates)


def _make_gram(
    weight: float,
    source: str | None,
    start: int,
    updates: tuple[int, ...],
    channels: int,
) -> Gram:
    if weight == 0:
        raise UserError(
            f"objective.gram_weight={weight} with other keys of Gram anchoring: expected above 0, "
            "such as 2.0, or none of them"
        )
    if not 0 < weight < math.inf:
        raise UserError(
            f"objective.gram_weight={weight}: expected above 0, such as 2.0, or 0 for no Gram "
            "anchoring"
        )
    if source is None:
        if not start:
            raise UserError(
                "objective.gram_weight without objective.gram_teacher: its teacher is the average "
                "at objective.gram_start, which is 0, before the first step: expected a file or a "
                "workdir, or a later start such as {'percent': 50}"
            )
        if min(updates, default=start) >= start:
            updates = (start, *updates)
    if 0 in updates:
        raise UserError(
            f"objective.gram_updates={updates} steps: expected none before the first step"
        )
    return Gram(weight=weight, start=start, updates=updates, source=source, channels=channels)


def _check_gram_view(
    model: VisionTransformer,
    gram: Gram | None,
    image_shape: tuple[int, int, int],
    view_shapes: Mapping[str, tuple[int, int, int, int]],
    same_draws: tuple[str, ...],
) -> None:
    if GRAM not in view_shapes:
        return
    count, *shape = view_shapes[GRAM]
    if gram is None:
        raise UserError(
            f"data.views.{GRAM} without objective.gram_weight: expected a weight such as 2.0, or "
            "no such view"
        )
    proportional = shape[0] * image_shape[1] == shape[1] * image_shape[0]
    if count != 2 or shape[0] < image_shape[0] or not proportional:
        raise UserError(
            f"data.views.{GRAM}: {count} of {_text(shape)}: expected 2, of the proportions of the "
            f"global crops of {_text(image_shape)}, and at least as large"
        )
    _check_patches(model, GRAM, shape)
    # The first view has to be the second global crop, whose draws come second.
    if GRAM not in same_draws or next(iter(view_shapes)) != GLOBAL:
        raise UserError(
            f"data.views.{GRAM}: the Gram teacher has to see the same crops as the student: "
            f"expected data.same_draws=({GRAM!r},), and {GLOBAL!r} as the first of data.views"
        )


def load_gram_teacher(
    source: str, model: VisionTransformer, grid: tuple[int, int], channels: int
) -> tuple[Params, list[str]]:
    """Loads the parameters of a Gram teacher, which has the architecture of `model`.

    Returns a nested dict of arrays on the host, with position embeddings for `grid`, and one line
    for each change that made them fit. Raises `UserError` where `source` can't be read or has
    another architecture.
    """
    rows, columns = (count * side for count, side in zip(grid, model.stride, strict=True))

    def init() -> Any:
        return model.init(jax.random.key(0), jnp.zeros((1, rows, columns, channels)), train=False)

    shapes = jax.eval_shape(init)["params"]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    try:
        weights = load_pretrained(source)
        kernel = weights.params.get("embedding/kernel")
        width = None if kernel is None else kernel.shape[-1]
        same = "expected the same architecture, since the teacher of this run may replace it"
        if kernel is None or width != model.hidden_size:
            raise UserError(
                f"it has a width of {width} and the model one of {model.hidden_size}: {same}"
            )
        ours = shapes["embedding"]["kernel"].shape
        if kernel.ndim == len(ours) == 4 and kernel.shape[:2] != ours[:2]:
            raise UserError(
                f"it has patches of {_text(kernel.shape)} and the model of {_text(ours)}: {same}"
            )
        params, notes = adapt_params(
            weights, zeros, target_grid=grid, num_class_tokens=model.num_class_tokens
        )
    except UserError as e:
        raise name_key("objective.gram_teacher", source, e) from e
    return params, [*weights.notes, *notes]


def _merge_crops(crops: jax.Array) -> jax.Array:
    """`[batch, crops, ...]` as `[batch * crops, ...]`."""
    return crops.reshape(-1, *crops.shape[2:])


def _split(features: jax.Array) -> jax.Array:
    """Features of both global crops, `[2 * batch, width]`, as `[batch, 2, width]`."""
    return features.reshape(-1, 2, features.shape[-1])
