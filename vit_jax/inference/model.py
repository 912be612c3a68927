# SPDX-License-Identifier: Apache-2.0
"""A trained model, ready to be called: `model = load_model("runs/digits"); model(images)`.

All that is needed comes with the checkpoint or the file: the model's arguments, how images are
prepared, class names. The data that it was trained on need not be there.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax.checkpoint.listing import find_checkpoint
from vit_jax.checkpoint.pretrained.adapt import describe_objective_params
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.rebuild import fill_model, rebuild_model
from vit_jax.checkpoint.pretrained.weights import POSEMB, Weights
from vit_jax.checkpoint.workdir import find_step, read_config, read_labels
from vit_jax.data.ops.decode import ImageError
from vit_jax.inference.images import Preparation, make_preparation
from vit_jax.models.attention import ATTENTION_WEIGHTS
from vit_jax.objectives.base import Params
from vit_jax.objectives.pixels import Pixels, check_pixels, normalize
from vit_jax.parallel.mesh import BATCH_AXES, batch_sharding, make_mesh, shard_batch
from vit_jax.parallel.sharding import infer_shardings
from vit_jax.utils.errors import UserError
from vit_jax.utils.layout import CHECKPOINTS, CONFIG
from vit_jax.utils.registry import check_type
from vit_jax.utils.tree import flatten

Loss = Literal["softmax", "sigmoid"]
Tta = Literal["flip"]

# What a Flax module gives under `intermediates` when its `__call__` is captured.
_CALL = "/__call__/0"
_ATTENTION = f"/{ATTENTION_WEIGHTS}/0"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model says of images.

    Attributes:
      logits: float32 `[n, classes]`.
      probabilities: float32 `[n, classes]`: those of each row sum to 1 if the model was trained
        with a softmax; each stands for itself if it was trained with a sigmoid.
    """

    logits: np.ndarray
    probabilities: np.ndarray

    def top(self, k: int) -> np.ndarray:
        """The `k` most probable labels of each image, the first one first, int `[n, k]`."""
        return np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with its parameters on all devices; made by `load_model`.

    Attributes:
      source: of the parameters: the checkpoint or file that was read.
      config: of a run its `config.json`; of other weights `model` and `preprocess`, as far as they
        are known.
      class_names: by label; None where they are not known.
      image_shape: height, width and channels that `preprocess` makes and a call takes.
      notes: lines on what was taken and what was done to make it fit.
      workdir: of the run; None for other weights.
      arguments: of `make_vit` or `make_mixer` (then with `name`) for this module, as far as they
        are known.
      module: the Flax module, called as `module.apply({"params": params}, x, train=False)`.
      params: nested dict of arrays; each device has all of them.
      preparation: what `preprocess` does.
      pixel_mean: of pixels in [0, 1], subtracted from them on the device.
      pixel_std: what they are divided by then.
      loss: that it was trained with, which says what probabilities are.
      mesh: of the devices; images are split over them.
    """

    source: str
    config: Mapping[str, Any] = dataclasses.field(repr=False)
    class_names: tuple[str, ...] | None = dataclasses.field(repr=False)
    image_shape: tuple[int, int, int]
    notes: tuple[str, ...] = dataclasses.field(repr=False)
    workdir: Path | None = dataclasses.field(repr=False)
    arguments: Mapping[str, Any] = dataclasses.field(repr=False)
    module: Any = dataclasses.field(repr=False)
    params: Params = dataclasses.field(repr=False, compare=False)
    preparation: Preparation
    pixel_mean: Pixels
    pixel_std: Pixels
    loss: Loss
    mesh: Mesh = dataclasses.field(repr=False)

    def preprocess(self, image: Any) -> np.ndarray:
        """Prepares an image as in the evaluation of the model.

        Args:
          image: a path, the bytes of a file, uint8 pixels `[height, width, 3]` (RGB), or an image
            of Pillow.

        Returns:
          uint8 `image_shape`.

        Raises:
          UserError: it can't be read.
        """
        try:
            return self.preparation(image)
        except ImageError as e:
            where = f"{image}: " if isinstance(image, str | os.PathLike) else ""
            raise UserError(f"{where}{e}") from None

    def __call__(self, images: Any, *, tta: Tta | None = None) -> Prediction:
        """Classifies images.

        Args:
          images: uint8 `[n, height, width, 3]`, or a list of what `preprocess` gives, or one.
          tta: "flip" to take the mean of the logits of an image and of its mirror image.

        Raises:
          UserError: images of another size or type, or a model without a (trained) head.
        """
        self.check_classifies()
        return self.predict(self.features(images, layer="logits", tta=tta))

    def predict(self, logits: np.ndarray) -> Prediction:
        """Logits `[n, classes]` with their probabilities."""
        if self.loss == "sigmoid":
            return Prediction(logits, 1 / (1 + np.exp(-logits.clip(-80, 80))))
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return Prediction(logits, powers / powers.sum(axis=-1, keepdims=True))

    def features(
        self, images: Any, layer: str = "pre_logits", *, tta: Tta | None = None
    ) -> np.ndarray:
        """What a layer gives for images, float32 `[n, ...]`.

        Args:
          images: see `__call__`.
          layer: one of `layers`: `pre_logits` is the input of the head, one vector an image;
            `encoded` are the tokens `[length, hidden]` after the last block; any other is a module
            by its path, such as `Transformer/encoderblock_3`.
          tta: see `__call__`.

        Raises:
          UserError: there is no such layer, or images of another size or type.
        """
        images = self._check_images(images)
        count = len(images)
        # Powers of two, so that calls with any number of images compile a few programs.
        rows = max(1 << (count - 1).bit_length(), 1)
        padded = np.zeros((self.round_up(rows), *self.image_shape), np.uint8)
        padded[:count] = images
        return np.asarray(self.start(padded, layer=layer, tta=tta))[:count]

    def start(self, images: np.ndarray, *, layer: str, tta: Tta | None = None) -> jax.Array:
        """Sends a batch to the devices, and does not wait for its result, float32 `[n, ...]`.

        Args:
          images: uint8 `[n, *image_shape]`; n must be a multiple of the devices (`round_up`). Each
            n compiles a program.
          layer: see `features`.
          tta: likewise.
        """
        self.check_layer(layer)
        if tta not in (None, "flip"):
            raise UserError(f"tta={tta!r}: expected 'flip', or None")
        batch = shard_batch({"image": images}, self.mesh)
        return self._compute(layer, tta)(self.params, batch["image"])

    def as_function(self, layer: str) -> Callable[[jax.Array], jax.Array]:
        """A function to be traced, with the parameters in it.

        Args:
          layer: see `features`.

        Returns:
          From uint8 `[n, *image_shape]` to float32 `[n, ...]`, for any number of images.
        """
        self.check_layer(layer)
        params = jax.tree.map(np.asarray, self.params)
        return functools.partial(_apply, params, layer=layer, tta=None, **self._pixels)

    def attention(self, images: Any) -> np.ndarray:
        """Attention weights of all blocks, float32 `[n, layers, heads, length, length]`.

        Row i of the last two dimensions is what token i takes from each token; it sums to 1.

        Raises:
          UserError: the model has no attention, or images of another size or type.
        """
        images = self._check_images(images)
        if not hasattr(self.module, "num_heads"):
            raise UserError("this model has no attention; expected a Vision Transformer")
        return np.asarray(self._attention(self.params, images))

    @functools.cached_property
    def layers(self) -> tuple[str, ...]:
        """Names that `features` takes."""
        image = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        apply: Callable[..., Any] = functools.partial(
            self.module.apply, train=False, capture_intermediates=True, mutable=["intermediates"]
        )
        (_, out), state = jax.eval_shape(apply, {"params": self.params}, image)
        found = flatten(state["intermediates"])
        # A module that gives several results has longer paths, and is left out.
        paths = [path.removesuffix(_CALL) for path in found if path.endswith(_CALL)]
        paths += [path.removesuffix("/0") for path in found if path.endswith(_ATTENTION)]
        # What does nothing but in training gives its input again.
        paths = [path for path in paths if not re.search(r"(Dropout|StochasticDepth)_\d+$", path)]
        return tuple(dict.fromkeys([*out, *paths]))

    def check_layer(self, layer: str) -> None:
        """Raises a `UserError` that lists the layers unless there is this one."""
        if layer not in self.layers:
            raise UserError(f"layer={layer!r} is none of {_summarize(self.layers)}")

    @functools.cached_property
    def classifies(self) -> bool:
        """Whether there is a head, and one that was trained."""
        return bool(self.module.num_classes) and bool(np.any(self.params["head"]["kernel"]))

    def check_classifies(self) -> None:
        """Raises `UserError` unless the model `classifies`."""
        if not self.classifies:
            state = "was published untrained, all zero" if self.module.num_classes else "is missing"
            raise UserError(
                f"{self.source}: its head {state}: expected a classifier; features can be had all "
                "the same (--embed, or model.features)"
            )

    def name_of(self, label: int) -> str:
        """The class name of a label, or the label as text."""
        return str(label) if self.class_names is None else self.class_names[label]

    def round_up(self, rows: int) -> int:
        """The smallest batch of at least so many rows that the devices can share."""
        shards = math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        return -(-rows // shards) * shards

    def _check_images(self, images: Any) -> np.ndarray:
        images = np.asarray(images)
        if images.ndim == 3:
            images = images[None]
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape or not len(images):
            raise UserError(
                f"images are {images.dtype} {list(images.shape)}: expected uint8 "
                f"{['n', *self.image_shape]}, as model.preprocess gives them"
            )
        return images

    @functools.cached_property
    def _computations(self) -> dict[tuple[str, Tta | None], Callable[..., jax.Array]]:
        return {}

    def _compute(self, layer: str, tta: Tta | None) -> Callable[..., jax.Array]:
        """A jitted function of parameters and images, made once."""
        if (layer, tta) not in self._computations:
            fn = functools.partial(_apply, layer=layer, tta=tta, **self._pixels)
            # Each row stays where it was computed: the host fetches it from there.
            self._computations[layer, tta] = jax.jit(fn, out_shardings=batch_sharding(self.mesh))
        return self._computations[layer, tta]

    @functools.cached_property
    def _attention(self) -> Callable[..., jax.Array]:
        return jax.jit(functools.partial(_attend, **self._pixels))

    @property
    def _pixels(self) -> dict[str, Any]:
        return {"module": self.module, "mean": self.pixel_mean, "std": self.pixel_std}


def _apply(
    params: Params,
    images: jax.Array,
    *,
    module: Any,
    mean: Pixels,
    std: Pixels,
    layer: str,
    tta: Tta | None,
) -> jax.Array:
    path = tuple(layer.split("/"))

    def run(images: jax.Array) -> jax.Array:
        (_, out), state = module.apply(
            {"params": params},
            normalize(images, mean, std),
            train=False,
            capture_intermediates=lambda m, method: m.path == path and method == "__call__",
            mutable=["intermediates"],
        )
        if layer in out:
            return out[layer].astype(jnp.float32)
        found = flatten(state["intermediates"])
        key = f"{layer}{_CALL}" if f"{layer}{_CALL}" in found else f"{layer}/0"
        return found[key].astype(jnp.float32)

    if tta is None:
        return run(images)
    return (run(images) + run(images[:, :, ::-1])) / 2


def _attend(
    params: Params, images: jax.Array, *, module: Any, mean: Pixels, std: Pixels
) -> jax.Array:
    """Of all blocks, `[n, layers, heads, length, length]`."""
    _, state = module.apply(
        {"params": params},
        normalize(images, mean, std),
        train=False,
        mutable=["intermediates"],
    )
    blocks = state["intermediates"]["Transformer"]
    weights = [
        flatten(blocks[f"encoderblock_{i}"])[
            f"MultiHeadDotProductAttention_0/{ATTENTION_WEIGHTS}/0"
        ]
        for i in range(module.num_layers)
    ]
    return jnp.stack(weights, axis=1)


def _summarize(names: Sequence[str]) -> str:
    """Names in one line; those that differ in numbers alone as one, such as `block_{0..11}`."""
    groups: dict[str, list[list[int]]] = {}
    for name in names:
        numbers = [int(number) for number in re.findall(r"\d+", name)]
        groups.setdefault(re.sub(r"\d+", "{}", name), []).append(numbers)
    shown = []
    for template, numbers in groups.items():
        slots = zip(*numbers, strict=True)
        ranges = [f"{min(s)}" if min(s) == max(s) else f"{{{min(s)}..{max(s)}}}" for s in slots]
        shown.append(template.format(*ranges))
    return ", ".join(shown)


def load_model(
    source: str | os.PathLike[str],
    *,
    checkpoint: int | str | None = None,
    params: Literal["raw", "ema"] = "raw",
    preprocess: str | None = None,
    class_names: Sequence[str] | None = None,
    loss: Loss | None = None,
    model: Mapping[str, Any] | None = None,
    pixel_mean: Pixels | None = None,
    pixel_std: Pixels | None = None,
    devices: Sequence[Any] | None = None,
) -> LoadedModel:
    """Loads a trained model for use.

    Args:
      source: the workdir of a run, one of its checkpoints, a `.npz` or `.safetensors` file, or any
        other source of `vit_jax.checkpoint.pretrained.load.load_pretrained`.
      checkpoint: of a workdir: a step, "last" (the default), or "best" by the metric of
        `config.checkpoint.keep_best`.
      params: of a run: the parameters as they are ("raw"), or their average ("ema").
      preprocess: a line such as "decode|resize(224)" in place of that of the run's evaluation, or
        of what the file says.
      class_names: by label, in place of those of the run.
      loss: "softmax" or "sigmoid", in place of that of the run; "softmax" for other weights.
      model: arguments of the model in place of what the weights say, such as
        `{"dtype": "bfloat16"}`.
      pixel_mean: of pixels in [0, 1], in place of what the weights expect.
      pixel_std: likewise.
      devices: to compute on; all by default.

    Raises:
      UserError: it can't be read, or what is asked for does not fit.
    """
    path, workdir = _locate(os.fspath(source), checkpoint, params)
    weights = load_pretrained(f"{path}:ema_params" if params == "ema" else path)
    config: dict[str, Any] = {"model": weights.model, "preprocess": weights.preprocess}
    if workdir is not None:
        config = read_config(workdir)
        class_names = read_labels(workdir) if class_names is None else class_names
    trained_with: Loss = loss or (config.get("objective") or {}).get("loss") or "softmax"
    check_type(trained_with, Loss, key="loss")
    module = rebuild_model(weights, **(model or {}))
    known = weights.preprocess
    size = known.get("image_size") or _guess_size(weights, module)
    preparation = make_preparation(known.get("eval"), size, given=preprocess)
    tree, notes = fill_model(module, weights, preparation.image_shape)
    mean, std = check_pixels(
        known.get("mean", 0.5) if pixel_mean is None else pixel_mean,
        known.get("std", 0.5) if pixel_std is None else pixel_std,
    )
    notes = [*weights.notes, *notes, *describe_objective_params(weights)]
    notes.append(f"images: {preparation.line}, mean {mean}, std {std}")
    if preparation.random:
        notes.append("images: the line has operations of training, which draw random numbers")
    mesh = make_mesh(devices=devices)
    return LoadedModel(
        source=path,
        config=config,
        class_names=_check_names(class_names, module.num_classes),
        image_shape=preparation.image_shape,
        notes=tuple(notes),
        workdir=workdir,
        arguments=weights.model | dict(model or {}),
        module=module,
        params=jax.device_put(tree, infer_shardings(tree, mesh)),
        preparation=preparation,
        pixel_mean=mean,
        pixel_std=std,
        loss=trained_with,
        mesh=mesh,
    )


def _locate(source: str, checkpoint: int | str | None, params: str) -> tuple[str, Path | None]:
    """What `load_pretrained` shall read, and the workdir that it belongs to, if any."""
    folder = Path(source)
    if params not in ("raw", "ema"):
        raise UserError(f"params={params!r}: expected 'raw' or 'ema'")
    if not folder.is_dir():
        for key, value, default in (("checkpoint", checkpoint, None), ("params", params, "raw")):
            if value != default:
                raise UserError(f"{key}={value!r}: {source} is no run; leave {key} out")
        return source, None
    if checkpoint is not None:
        found = find_step(folder, str(checkpoint))
        if found == str(checkpoint):
            raise UserError(f"checkpoint={checkpoint!r}: expected a step, 'last' or 'best'")
        folder = Path(found)
    path = find_checkpoint(folder)
    if not folder.is_absolute():
        path = Path(os.path.relpath(path))  # For the screen, as it was given.
    workdir = path.parent.parent if path.parent.name == CHECKPOINTS else None
    return str(path), workdir if workdir and (workdir / CONFIG).exists() else None


def _guess_size(weights: Weights, module: Any) -> tuple[int, int] | None:
    """Height and width of images for which a file has positions, if these make a square."""
    positions = weights.params.get(POSEMB)
    if positions is None or not hasattr(module, "stride"):
        return None
    patches = positions.shape[1] - module.num_class_tokens
    side = math.isqrt(max(patches, 0))
    return (side * module.stride[0], side * module.stride[1]) if side**2 == patches else None


def _check_names(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    if names is None or not num_classes:
        return None
    if len(names) > num_classes:
        raise UserError(
            f"{len(names)} class names, and the model has {num_classes} classes: expected one "
            "each, in --labels or in labels.txt of the run"
        )
    # A head may be wider than the data has classes.
    return (*names, *map(str, range(len(names), num_classes)))
