# SPDX-License-Identifier: Apache-2.0
"""A trained model, ready to be called: `model = load_model("runs/digits"); model(images)`.

It takes arrays, and also files, folders and Pillow images: `model("photo.jpg").top(5)`. Everything
it needs is in the checkpoint or the file: the model's arguments, the preparation of images, and
class names. The training data is not needed.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from PIL import Image

from vit_jax.checkpoint.listing import find_checkpoint
from vit_jax.checkpoint.pretrained.adapt import describe_objective_params
from vit_jax.checkpoint.pretrained.hub import find_weights
from vit_jax.checkpoint.pretrained.load import KINDS, load_pretrained
from vit_jax.checkpoint.pretrained.rebuild import fill_model, rebuild_model
from vit_jax.checkpoint.pretrained.towers import put_part, take_tower
from vit_jax.checkpoint.pretrained.weights import POSEMB, Loss, Weights
from vit_jax.checkpoint.workdir import find_step, read_config, read_temperature
from vit_jax.data.ops.decode import ImageError
from vit_jax.inference.given import (
    compute_given,
    compute_rows,
    is_one_image,
    list_given,
    prepare_given,
)
from vit_jax.inference.images import Preparation, make_preparation
from vit_jax.inference.labels import TextClasses, embed_labels
from vit_jax.inference.masks import (
    BATCH_SIZE,
    ImageDepth,
    ImageMask,
    find_classes,
    make_pixel_result,
    resize_depth,
)
from vit_jax.inference.prediction import (
    ImageFeatures,
    ImagePrediction,
    ImagePredictions,
    Prediction,
)
from vit_jax.inference.texts import TextTower, check_texts, find_tokenizer, to_unit
from vit_jax.models.attention import ATTENTION_WEIGHTS
from vit_jax.models.interface import Model, find_grid, takes_any_size
from vit_jax.models.resampling import Method
from vit_jax.models.two_towers import TwoTowers
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives.base import Params
from vit_jax.objectives.dense import DenseObjective, Size
from vit_jax.objectives.depth import make_depth
from vit_jax.objectives.pixels import Pixels, check_pixels, fit_to_line, prepare
from vit_jax.objectives.segmentation import Segmentation, make_segmentation
from vit_jax.parallel.mesh import BATCH_AXES, batch_sharding, make_mesh, shard_batch
from vit_jax.parallel.sharding import infer_shardings
from vit_jax.utils.errors import UserError
from vit_jax.utils.layout import CHECKPOINTS, CONFIG
from vit_jax.utils.mirrors import find_local
from vit_jax.utils.nested import as_tuples
from vit_jax.utils.registry import check_type, find_parts, trust_parts
from vit_jax.utils.text import describe_size, printable
from vit_jax.utils.tree import flatten

Tta = Literal["flip"]

# Images whose attention weights are computed at a time, and bytes of all that are returned.
_ATTENTION_BATCH, _MAX_ATTENTION = 8, 2**34

# The layer of a model with a text tower that its texts are compared with.
IMAGE_EMBED = "image_embed"

# Suffixes of paths in the `intermediates` that Flax captures.
_CALL = "/__call__/0"
_ATTENTION = f"/{ATTENTION_WEIGHTS}/0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with its parameters on all devices; made by `load_model`.

    Attributes:
      source: the checkpoint or file that was read.
      config: `config.json` of a run; for other weights `model` and `preprocess`, as far as they
        are known.
      class_names: class names by label; None if they are not known.
      image_shape: height, width and channels of the images that `preprocess` returns.
      notes: lines about the weights and how they were adapted.
      workdir: workdir of the run; None for other weights.
      arguments: `name` and the arguments of its constructor for this module, as far as they are
        known.
      module: Flax module, called as `module.apply({"params": params}, x, train=False)`.
      params: nested dict of arrays, copied to each device.
      preparation: implementation of `preprocess`.
      pixel_mean: per-channel mean, subtracted on the device from pixels in [0, 1].
      pixel_std: per-channel divisor, applied after the mean.
      loss: loss of the training, which decides how logits become probabilities.
      temperature: divides the logits before they become probabilities; 1 unless one was fitted.
      texts: the text tower, if the model compares images with texts. `module`, `params` and all
        features are then those of the image tower.
      mesh: device mesh over which images are sharded.
      dense: the objective of the run, if the model finds the class or the depth of each pixel.
      dense_head: the parameters of its head.
      windows: height and width of the windows in which pixels are computed, and rows and columns
        from one to the next; None for whole images.
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
    texts: TextTower | None = None
    dense: DenseObjective | None = dataclasses.field(default=None, repr=False)
    dense_head: Params = dataclasses.field(default=None, repr=False, compare=False)
    windows: tuple[Size, Size] | None = dataclasses.field(default=None, repr=False)
    temperature: float = 1.0

    def preprocess(self, image: Any) -> np.ndarray:
        """Prepares an image as in the evaluation of the model.

        Args:
          image: a path, the bytes of a file, uint8 RGB pixels `[height, width, 3]`, or a Pillow
            image.

        Returns:
          uint8 `image_shape`.

        Raises:
          UserError: the image cannot be read.
        """
        try:
            return self.preparation(image)
        except ImageError as e:
            where = (
                f"{os.fspath(image) or repr('')}: " if isinstance(image, str | os.PathLike) else ""
            )
            raise UserError(f"{where}{e}") from None

    @overload
    def __call__(
        self,
        images: np.ndarray,
        *,
        labels: Sequence[str] | TextClasses | None = None,
        templates: str | Sequence[str] | None = None,
        tta: Tta | None = None,
    ) -> Prediction: ...
    @overload
    def __call__(
        self,
        images: Image.Image | bytes,
        *,
        labels: Sequence[str] | TextClasses | None = None,
        templates: str | Sequence[str] | None = None,
        tta: Tta | None = None,
    ) -> ImagePrediction: ...
    @overload
    def __call__(
        self,
        images: Any,
        *,
        labels: Sequence[str] | TextClasses | None = None,
        templates: str | Sequence[str] | None = None,
        tta: Tta | None = None,
    ) -> Any: ...
    def __call__(
        self,
        images: Any,
        *,
        labels: Sequence[str] | TextClasses | None = None,
        templates: str | Sequence[str] | None = None,
        tta: Tta | None = None,
    ) -> (
        Prediction
        | ImagePrediction
        | ImagePredictions
        | ImageMask
        | ImageDepth
        | list[ImageMask]
        | list[ImageDepth]
        | np.ndarray
    ):
        """Classifies images.

        Args:
          images: an image to prepare: the path or URL of a file, the bytes of one, or a Pillow
            image; the path of a folder, for all images below it; a pattern such as `photos/*.jpg`;
            a list or an iterator of these. Or prepared images: uint8 `[n, *image_shape]`, a list of
            results of `preprocess`, or one result.
          labels: the text of each class, or what `embed_labels` returned; for a model with a text
            tower.
          templates: see `embed_labels`.
          tta: "flip" averages the logits of each image and of its mirror image; of pixels, the
            probabilities or depths.

        Returns:
          `ImagePrediction` for one image, `ImagePredictions` for a list, a folder or a pattern,
          `Prediction` for prepared images. Files in a folder that cannot be read are named in the
          log and left out. A model that finds the class of each pixel gives an `ImageMask` for one
          image, a list of them for several, and uint8 `[n, height, width]` for prepared images; one
          that finds depths gives `ImageDepth` and float32 in the same way.

        Raises:
          UserError: an image that was named cannot be read, none was found, prepared images have
            another shape or dtype, the model has no trained head, or see `embed_labels`.
        """
        if self.dense is not None and labels is None:
            return self._find_pixels(images, tta)
        classes = self._find_classes(labels, templates)
        layer = "logits" if classes is None else IMAGE_EMBED
        given = list_given(images)
        if given is None:
            return self.judge(self.features(images, layer=layer, tta=tta), classes)
        compute = functools.partial(self.start, layer=layer, tta=tta)
        paths, rows = compute_given(self, given, compute)
        predicted = self.judge(rows, classes)
        names = self.list_names() if classes is None else classes.names
        found = ImagePredictions(paths, predicted.logits, predicted.probabilities, names)
        return found[0] if is_one_image(images) else found

    def _find_classes(
        self,
        labels: Sequence[str] | TextClasses | None,
        templates: str | Sequence[str] | None,
    ) -> TextClasses | None:
        if labels is None:
            if templates is not None:
                raise UserError(f"templates={templates!r}: expected labels with them")
            self.check_classifies()
            return None
        if not isinstance(labels, TextClasses):
            return self.embed_labels(labels, templates=templates)
        if templates is not None:
            raise UserError("templates: the labels are embedded already: expected them without")
        return labels

    def embed_labels(
        self,
        labels: Sequence[str],
        *,
        templates: str | Sequence[str] | None = None,
        key: str = "labels",
    ) -> TextClasses:
        """Makes classes of texts, as the `labels` of a call.

        Args:
          labels: the text of each class, such as `["a cat", "a dog"]`.
          templates: a name of `vit_jax.evaluators.prompts.TEMPLATES`, one or several templates with
            `{}` for the label, such as "a photo of a {}.", or a text file with one a line; the
            vectors of several are averaged. None takes the labels as they are.
          key: what the user calls `labels`, for errors.

        Raises:
          UserError: the model has no text tower, a label is empty, has control characters or more
            tokens than the model reads, or two are the same.
        """
        tower = self._find_texts(key)
        return embed_labels(
            tower,
            labels,
            templates="name" if templates is None else templates,
            alone=self.loss == "sigmoid",
            pad_rows=self.pad_rows,
            key=key,
        )

    def judge(self, rows: np.ndarray, classes: TextClasses | None = None) -> Prediction:
        """Converts outputs to a prediction.

        Args:
          rows: of the layer `logits`, float32 `[n, num_classes]`; with `classes` those of the layer
            `image_embed`, float32 `[n, width]`.
          classes: as `embed_labels` returns them.
        """
        if classes is None:
            return self.predict(rows)
        return self.predict(self._find_texts("labels").compare(rows, classes.vectors))

    @property
    def segmentation(self) -> Segmentation | None:
        """The objective of the run, if the model finds the class of each pixel."""
        return self.dense if isinstance(self.dense, Segmentation) else None

    @property
    def pixel_batch_size(self) -> int:
        """The number of images whose pixels are computed at a time."""
        return BATCH_SIZE if self.windows is None else self.mesh.size

    def _find_pixels(self, images: Any, tta: Tta | None) -> Any:
        given = list_given(images)
        compute = functools.partial(self.start_pixels, tta=tta)
        if given is None:
            outputs, size = (
                self.pixel_outputs(self._check_images(images), tta=tta),
                self.image_shape,
            )
            resize = resize_depth if self.segmentation is None else find_classes
            return np.stack([resize(one, size[:2]) for one in outputs])
        if all(isinstance(image, str) for image in given):
            size = self.pixel_batch_size
            paths, outputs = compute_given(self, given, compute, batch_size=size)
            found: Sequence[Any] = paths
        else:
            paths, prepared = prepare_given(self, given)
            outputs = self.pixel_outputs(np.stack(prepared), tta=tta)
            in_memory = iter([image for image in given if not isinstance(image, str)])
            found = [next(in_memory) if path is None else path for path in paths]
        pairs = zip(found, outputs, strict=True)
        results = [make_pixel_result(self, image, one) for image, one in pairs]
        return results[0] if is_one_image(images) else results

    def pixel_outputs(self, images: np.ndarray, *, tta: Tta | None = None) -> np.ndarray:
        """Computes the outputs of which `make_pixel_result` makes masks or depths.

        Args:
          images: uint8 `[n, *image_shape]`.
          tta: see `__call__`.

        Returns:
          float32 `[n, rows, columns, channels]`, of the grid of the head, or with `windows` of the
          images: logits of classes, or metres. With `tta` they are `[n, 2, rows, columns,
          channels]`, of the images and of their mirror images, mirrored back.
        """
        compute = functools.partial(self.start_pixels, tta=tta)
        return compute_rows(self, images, compute, batch_size=self.pixel_batch_size)

    def start_pixels(self, images: np.ndarray, *, tta: Tta | None = None) -> jax.Array:
        """Dispatches the computation of `pixel_outputs`, see `start`."""
        assert self.dense is not None
        batch = shard_batch({"image": images}, self.mesh)
        params = {**self.params, self.dense.head_params: self.dense_head}
        return self._pixel_outputs(params, batch["image"], tta)

    @functools.cached_property
    def _pixel_outputs(self) -> Callable[..., jax.Array]:
        sharding = batch_sharding(self.mesh)
        return jax.jit(self._pixel_function, static_argnums=2, out_shardings=sharding)

    @property
    def _pixel_function(self) -> Callable[..., jax.Array]:
        dense, windows = self.dense, self.windows
        assert dense is not None

        def compute(params: Params, images: jax.Array, tta: Tta | None) -> jax.Array:
            def run(images: jax.Array) -> jax.Array:
                if windows is not None:
                    size, stride = windows
                    return dense.find_outputs(params, images, window=size, stride=stride)
                return dense.predict(params, {"image": images})[dense.output]

            if tta is None:
                return run(images)
            return jnp.stack([run(images), run(images[:, :, ::-1])[:, :, ::-1]], axis=1)

        return compute

    def predict(self, logits: np.ndarray) -> Prediction:
        """Converts logits, float32 `[n, num_classes]`, to a prediction.

        Raises:
          UserError: they are no array of this form.
        """
        if getattr(logits, "ndim", 0) != 2:
            shape = list(getattr(logits, "shape", []))
            raise UserError(
                f"logits are a {type(logits).__name__} {shape}: expected float32 [n, classes]"
            )
        scaled = logits if self.temperature == 1 else logits / np.float32(self.temperature)
        if self.loss == "sigmoid":
            return Prediction(logits, 1 / (1 + np.exp(-scaled.clip(-80, 80))))
        powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
        return Prediction(logits, powers / powers.sum(axis=-1, keepdims=True))

    @overload
    def features(
        self, images: np.ndarray, layer: str = "pre_logits", *, tta: Tta | None = None
    ) -> np.ndarray: ...
    @overload
    def features(
        self,
        images: str | os.PathLike[str] | Image.Image | bytes,
        layer: str = "pre_logits",
        *,
        tta: Tta | None = None,
    ) -> ImageFeatures: ...
    @overload
    def features(
        self, images: Any, layer: str = "pre_logits", *, tta: Tta | None = None
    ) -> Any: ...
    def features(
        self, images: Any, layer: str = "pre_logits", *, tta: Tta | None = None
    ) -> np.ndarray | ImageFeatures:
        """Computes the output of a layer.

        Args:
          images: see `__call__`.
          layer: one of `layers`: `image_embed` is the unit vector that texts are compared with;
            `pre_logits` is the input of the head, one vector per image;
            `encoded` is the tokens `[length, hidden_size]` after the last block; any other is the
            path of a module, such as `Transformer/encoderblock_3`. `pixel_logits` and
            `pixel_depth` are those of `pixel_outputs`.
          tta: see `__call__`.

        Returns:
          float32 `[n, ...]` for prepared images; `ImageFeatures` for others, also for a single one.

        Raises:
          UserError: the layer does not exist, an image that was named cannot be read, or prepared
            images have another shape or dtype.
        """
        given = list_given(images)
        self.check_layer(layer)
        compute = functools.partial(self.start, layer=layer, tta=tta)
        if given is not None:
            return ImageFeatures(*compute_given(self, given, compute))
        images = self._check_images(images)
        return compute_rows(self, images, compute, batch_size=len(images))

    def image_embed(self, images: Any) -> np.ndarray:
        """Returns unit vectors, float32 `[n, width]`, to compare with those of `text_embed`.

        Args:
          images: see `__call__`.

        Raises:
          UserError: the model has no text tower; see `features` for others.
        """
        self._find_texts()
        return to_unit(np.asarray(self.features(images, IMAGE_EMBED)))

    def text_embed(self, texts: Any) -> np.ndarray:
        """Returns unit vectors, float32 `[n, width]`.

        `image_embed(images) @ text_embed(texts).T` are the cosines of all pairs.

        Args:
          texts: a text, a list of texts, or tokens, int32 `[n, context_length]`.

        Raises:
          UserError: the model has no text tower, its tokenizer is not known, a text is none by
            `check_text`, or tokens are not those of the model.
        """
        tower = self._find_texts()
        return tower.embed(check_texts(texts, key="text"), pad_rows=self.pad_rows)

    def _find_texts(self, key: str = "") -> TextTower:
        if self.texts is None:
            raise UserError(
                f"{f'{key}: ' if key else ''}{self.source}: it has no text tower: expected a model "
                "that compares images with texts (model.name='two_towers')"
            )
        return self.texts

    def list_params(self) -> dict[str, np.ndarray]:
        """All parameters by path, those of the text tower too, with the paths of the weights."""
        own = {path: np.asarray(x) for path, x in flatten(self.params).items()}
        if self.texts is None:
            return own
        texts = {path: np.asarray(x) for path, x in flatten(self.texts.params).items()}
        pair = {"t": self.texts.t}
        if self.texts.b is not None:
            pair["b"] = self.texts.b
        return put_part(own, "img") | put_part(texts, "txt") | pair

    def start(self, images: np.ndarray, *, layer: str, tta: Tta | None = None) -> jax.Array:
        """Dispatches the computation of `features` without waiting for its result.

        Args:
          images: uint8 `[n, *image_shape]`; n must be a multiple of the number of devices, see
            `round_up`. Each n compiles a program.

        Returns:
          float32 `[n, ...]`, sharded over the mesh.
        """
        self.check_layer(layer)
        if tta not in (None, "flip"):
            raise UserError(f"tta={tta!r}: expected 'flip', or None")
        if self.dense is not None and layer == self.dense.output:
            outputs = self.start_pixels(images, tta=tta)
            return outputs if tta is None else outputs.mean(axis=1)
        if tta and takes_any_size(self.module):
            raise UserError(f"tta={tta!r}: expected None for patches of images of any size")
        batch = shard_batch({"image": images}, self.mesh)
        return self._compute(layer, tta)(self.params, batch["image"])

    def as_function(
        self, layer: str, *, make_params: Callable[[], Params] | None = None
    ) -> Callable[[jax.Array], jax.Array]:
        """Returns a function to be traced, with the parameters as constants.

        It takes uint8 `[n, *image_shape]` and returns float32 `[n, ...]`, for any n. `make_params`
        is called while it is traced, and makes other parameters.
        """
        self.check_layer(layer)
        make = make_params or (lambda: jax.tree.map(np.asarray, self.params))
        if self.dense is None or layer != self.dense.output:
            apply = functools.partial(_apply, layer=layer, tta=None, **self._pixels)
            return lambda images: apply(make(), images)
        name, compute = self.dense.head_params, self._pixel_function
        head = jax.tree.map(np.asarray, self.dense_head)
        return lambda images: compute({**make(), name: head}, images, tta=None)

    @overload
    def attention(self, images: np.ndarray) -> np.ndarray: ...
    @overload
    def attention(self, images: str | os.PathLike[str] | Image.Image | bytes) -> ImageFeatures: ...
    @overload
    def attention(self, images: Any) -> Any: ...
    def attention(self, images: Any) -> np.ndarray | ImageFeatures:
        """Computes the attention weights of all blocks for images as in `__call__`.

        Returns:
          float32 `[n, layers, heads, length, length]`: weights by query and key. Each row over
          keys sums to 1. `ImageFeatures` with these `values` for images that are not prepared.

        Raises:
          UserError: the model has no attention, an image cannot be read, prepared images have
            another shape or dtype, or the weights of so many images take too much memory.
        """
        if not isinstance(self.module, VisionTransformer):
            raise UserError("this model has no attention; expected a Vision Transformer")
        given = list_given(images)
        options: dict[str, Any] = {"batch_size": self.round_up(_ATTENTION_BATCH)}
        if given is not None:
            options["check_count"] = self._check_attention
            return ImageFeatures(*compute_given(self, given, self._start_attention, **options))
        images = self._check_images(images)
        self._check_attention(len(images))
        return compute_rows(self, images, self._start_attention, **options)

    def _start_attention(self, images: np.ndarray) -> jax.Array:
        batch = shard_batch({"image": images}, self.mesh)
        return self._attention(self.params, batch["image"])

    def _check_attention(self, count: int) -> None:
        """Raises `UserError` if the attention weights of so many images do not fit the host."""
        rows, columns = self.module.grid(self.image_shape[:2])
        length = rows * columns + self.module.num_prefix_tokens
        size = 4 * self.module.num_layers * self.module.num_heads * length**2
        if count * size > _MAX_ATTENTION:
            raise UserError(
                f"the attention weights of {count:,} images take {describe_size(count * size)} of "
                f"memory: expected at most {max(_MAX_ATTENTION // size, 1):,} images at a time"
            )

    @functools.cached_property
    def layers(self) -> tuple[str, ...]:
        """The layers whose output `features` can compute."""
        image = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        apply: Callable[..., Any] = functools.partial(
            self.module.apply, train=False, capture_intermediates=True, mutable=["intermediates"]
        )
        (_, out), state = jax.eval_shape(apply, {"params": self.params}, image)
        found = flatten(state["intermediates"])
        # A module with several results has longer paths and is left out.
        paths = [path.removesuffix(_CALL) for path in found if path.endswith(_CALL)]
        paths += [path.removesuffix("/0") for path in found if path.endswith(_ATTENTION)]
        # Dropout and stochastic depth are the identity here.
        paths = [path for path in paths if not re.search(r"(Dropout|StochasticDepth)_\d+$", path)]
        own = [] if self.texts is None else [IMAGE_EMBED]
        own += [] if self.dense is None else [self.dense.output]
        return tuple(dict.fromkeys([*own, *out, *paths]))

    def check_layer(self, layer: str) -> None:
        """Raises a `UserError` that lists the layers if this one does not exist."""
        if layer not in self.layers:
            raise UserError(f"layer={layer!r} is not one of {_summarize(self.layers)}")

    @functools.cached_property
    def classifies(self) -> bool:
        """Whether the model has a trained head."""
        if self.texts is not None:  # Its head projects to the width of the embeddings.
            return False
        # A model from outside of this package may have its head elsewhere.
        kernel = self.params.get("head", {}).get("kernel")
        return bool(self.module.num_classes) and (kernel is None or bool(np.any(kernel)))

    def check_classifies(self) -> None:
        """Raises `UserError` unless the model `classifies`."""
        if self.texts is not None:
            raise UserError(
                f"{self.source}: it compares images with texts, and has no classes of its own: "
                "expected labels, such as --labels='a cat,a dog', or model(images, labels=['a cat',"
                " 'a dog'])"
            )
        if self.dense is not None:
            what, option = ("depth", "depth") if self.segmentation is None else ("class", "masks")
            raise UserError(
                f"{self.source}: it finds the {what} of each pixel, and has no classes of images: "
                f"expected model(images), or vit_jax predict --{option}=FOLDER"
            )
        if not self.classifies:
            state = "was published untrained, all zero" if self.module.num_classes else "is missing"
            raise UserError(
                f"{self.source}: its head {state}: expected a classifier; features can be had all "
                "the same (--embed, or model.features)"
            )

    @property
    def num_classes(self) -> int:
        """The number of classes of images, or of pixels."""
        return len(self.segmentation.classes) if self.segmentation else self.module.num_classes

    def list_names(self) -> tuple[str, ...]:
        """The name of each class, see `name_of`."""
        return tuple(map(self.name_of, range(self.num_classes)))

    def name_of(self, label: int) -> str:
        """The class name of a label, or the label as text."""
        return str(label) if self.class_names is None else self.class_names[label]

    def pad_rows(self, count: int) -> int:
        """The batch size in which `count` images are computed: a power of two, see `round_up`.

        This limits the number of programs that are compiled.
        """
        return self.round_up(max(1 << (count - 1).bit_length(), 1))

    def round_up(self, rows: int) -> int:
        """Rounds a batch size up to a multiple of the devices that share a batch."""
        shards = math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        return -(-rows // shards) * shards

    def _check_images(self, images: Any) -> np.ndarray:
        shape = ", ".join(map(str, ("n", *self.image_shape)))
        expected = f"expected paths of images, or uint8 [{shape}], as model.preprocess gives them"
        if isinstance(images, Sequence) and not len(images):
            raise UserError(f"there are no images: {expected}")
        try:
            array = np.asarray(images)
        except ValueError:
            raise UserError(f"images are arrays of several shapes: {expected}") from None
        if array.dtype == object:
            raise UserError(f"images are a {type(images).__name__}: {expected}")
        if array.ndim == 3:
            array = array[None]
        if array.dtype != np.uint8 or array.shape[1:] != self.image_shape or not len(array):
            raise UserError(f"images are {array.dtype} {list(array.shape)}: {expected}")
        return array

    @functools.cached_property
    def _computations(self) -> dict[tuple[str, Tta | None], Callable[..., jax.Array]]:
        return {}

    def _compute(self, layer: str, tta: Tta | None) -> Callable[..., jax.Array]:
        """The jitted function from parameters and images to the output of a layer, cached."""
        if (layer, tta) not in self._computations:
            fn = functools.partial(_apply, layer=layer, tta=tta, **self._pixels)
            # The host fetches each row from the device that computed it.
            self._computations[layer, tta] = jax.jit(fn, out_shardings=batch_sharding(self.mesh))
        return self._computations[layer, tta]

    @functools.cached_property
    def _attention(self) -> Callable[..., jax.Array]:
        fn = functools.partial(_attend, **self._pixels)
        return jax.jit(fn, out_shardings=batch_sharding(self.mesh))

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
    projected = "logits" if module.num_classes else "pre_logits"

    def run(images: jax.Array) -> jax.Array:
        (_, out), state = module.apply(
            {"params": params},
            prepare(module, images, mean, std),
            train=False,
            capture_intermediates=lambda m, method: m.path == path and method == "__call__",
            mutable=["intermediates"],
        )
        if layer == IMAGE_EMBED:
            return to_unit(out[projected].astype(jnp.float32))
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
    """Attention weights of all blocks, float32 `[n, layers, heads, length, length]`."""
    pixels = prepare(module, images, mean, std)
    _, state = module.apply({"params": params}, pixels, train=False, mutable=["intermediates"])
    found = flatten(state["intermediates"]["Transformer"])
    path = f"MultiHeadDotProductAttention_0{_ATTENTION}"
    weights = [found[f"encoderblock_{i}/{path}"] for i in range(module.num_layers)]
    return jnp.stack(weights, axis=1)


def _summarize(names: Sequence[str]) -> str:
    """Joins names in one line; names that differ only in numbers become `block_{0..11}`."""
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
    tokenizer: str | None = None,
    posemb_resize: Method | None = None,
    window: int | None = None,
    stride: int | None = None,
    parts: Sequence[str] | str = (),
    devices: Sequence[Any] | None = None,
) -> LoadedModel:
    """Loads a trained model for use.

    Args:
      source: the workdir of a run, one of its checkpoints, a `.npz` or `.safetensors` file, a
        folder of the Hugging Face hub, or any other source of
        `vit_jax.checkpoint.pretrained.load.load_pretrained`.
      checkpoint: which checkpoint of a workdir: a step, "last" (the default), or "best" by the
        metric of `config.checkpoint.keep_best`.
      params: which parameters of a run: the trained ones ("raw") or their average ("ema").
      preprocess: replaces the preprocessing of the weights, such as "decode|resize(224)".
      class_names: replaces the class names of the run or the file.
      loss: replaces the loss of the run or the file, "softmax" or "sigmoid"; if it is not known,
        "softmax", or "sigmoid" for two towers with a bias.
      model: overrides arguments of the model, such as `{"dtype": "bfloat16"}`.
      pixel_mean: replaces the mean of pixels in [0, 1] that the weights expect.
      pixel_std: replaces the divisor that the weights expect.
      tokenizer: makes tokens of texts, as in `data.tokenizer`, where the weights do not state it.
      posemb_resize: how position embeddings are resized where the images have another size than the
        weights, such as "bicubic"; None for the rule of the weights' own project.
      window: side in pixels of the windows in which the pixels of an image are computed one by one,
        if the model finds their classes or depths; None for the whole image.
      stride: pixels from one window to the next; None for the side of a window.
      parts: modules outside of this package that the weights may name, such as `["my_models"]`. To
        import a module is to run its code, so only these are imported.
      devices: devices to compute on; all by default.

    Raises:
      UserError: the weights cannot be read, or an argument does not fit them.
    """
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise UserError(f"source={source!r}: expected {KINDS}")
    check_type(preprocess, str | None, key="preprocess")
    check_type(posemb_resize, Method | None, key="posemb_resize")
    for key, value, kind in (
        ("class_names", class_names, Sequence),
        ("model", model, Mapping),
        ("devices", devices, Sequence),
    ):
        if value is not None and (not isinstance(value, kind) or isinstance(value, str)):
            expected = "arguments by name" if kind is Mapping else "a list"
            raise UserError(f"{key}={value!r}: expected {expected}, or None")
    trust_parts(parts)
    trust_parts(find_parts(preprocess or ""))
    path, workdir = _locate(os.fspath(source), checkpoint, params)
    weights = load_pretrained(f"{path}:ema_params" if params == "ema" else path)
    config: dict[str, Any] = {"model": weights.model, "preprocess": weights.preprocess}
    if workdir is not None:
        config = read_config(workdir)
    stated = (config.get("objective") or {}).get("loss")
    module = rebuild_model(weights, **(model or {}))
    # Only the sigmoid loss needs a bias on the similarities of two towers.
    biased = isinstance(module, TwoTowers) and "b" in weights.params
    trained_with: Loss = loss or stated or weights.loss or ("sigmoid" if biased else "softmax")
    check_type(trained_with, Loss, key="loss")
    known = weights.preprocess
    towers = module if isinstance(module, TwoTowers) else None
    if towers is None and tokenizer is not None:
        raise UserError(f"tokenizer={tokenizer!r}: {path} has no text tower; leave it out")
    image_weights, image_module = (
        (weights, module) if towers is None else (take_tower(weights, "img"), towers.img)
    )
    size = known.get("image_size") or _guess_size(image_weights, image_module)
    preparation = make_preparation(known.get("eval"), size, given=preprocess)
    windows, seen = None, preparation.image_shape
    if window is not None or stride is not None:
        windows = _find_windows(window, stride, seen)
        seen = (*windows[0], seen[2])
        _check_window(image_module, windows[0], preparation.image_shape, given=window)
    tree, notes = fill_model(module, weights, seen, posemb_resize=posemb_resize)
    module = fit_to_line(module, preparation.line, key="preprocess")
    towers = module if isinstance(module, TwoTowers) else None
    mean, std = check_pixels(
        known.get("mean", 0.5) if pixel_mean is None else pixel_mean,
        known.get("std", 0.5) if pixel_std is None else pixel_std,
    )
    dense = _find_dense(config, weights, module, seen, (mean, std))
    notes = [*weights.notes, *notes]
    if dense is None:
        notes += describe_objective_params(weights)
        if windows is not None:
            raise UserError(
                f"window={window}: {path} finds neither the class nor the depth of each pixel: "
                "leave it out"
            )
    notes.append(f"images: {preparation.line}, mean {mean}, std {std}")
    if class_names is not None and len(class_names) < module.num_classes:
        notes.append(
            f"classes: {len(class_names)} names for {module.num_classes}: the last "
            f"{module.num_classes - len(class_names)} are named by their numbers"
        )
    if preparation.random:
        notes.append("images: the line has operations of training, which draw random numbers")
    temperature = 1.0
    if workdir is not None and trained_with == "softmax" and module.num_classes:
        temperature, note = read_temperature(workdir, int(Path(path).name), params)
        notes += [note] if note else []
    mesh = make_mesh(devices=devices)
    place = functools.partial(_place, mesh=mesh)
    texts = None
    if towers is not None:
        texts = TextTower(
            module=towers.txt,
            params=place(tree["txt"]),
            tokenizer=find_tokenizer(weights.tokenizer, tokenizer, module=towers.txt),
            t=tree["t"],
            b=tree.get("b"),
            mesh=mesh,
        )
        module, tree = towers.img, tree["img"]
    return LoadedModel(
        source=path,
        config=config,
        class_names=_check_names(
            weights.class_names if class_names is None else class_names,
            len(dense.classes)
            if isinstance(dense, Segmentation)
            else module.num_classes
            if texts is None
            else 0,
        ),
        image_shape=preparation.image_shape,
        notes=tuple(notes),
        workdir=workdir,
        arguments=weights.model | dict(model or {}),
        module=module,
        params=place(tree),
        preparation=preparation,
        pixel_mean=mean,
        pixel_std=std,
        loss=trained_with,
        mesh=mesh,
        texts=texts,
        dense=dense,
        dense_head=dense and place(_find_head(weights, dense.head_params)),
        windows=windows,
        temperature=temperature,
    )


def _check_window(
    module: Model, window: Size, image_shape: tuple[int, int, int], *, given: int | None
) -> None:
    """Raises `UserError` if a window can't be cut into patches."""
    try:
        find_grid(module, window)
    except UserError:
        step = math.lcm(*getattr(module, "stride", (1,)))
        below = min(window) // step * step
        near = [str(side) for side in (below, below + step) if 0 < side <= max(image_shape[:2])]
        raise UserError(
            f"window={given}: expected a multiple of the {step} pixels of a patch, up to the "
            f"{max(image_shape[:2])} of the image, such as {' or '.join(near or [str(step)])}"
        ) from None


def _find_windows(
    window: int | None, stride: int | None, image_shape: tuple[int, int, int]
) -> tuple[Size, Size]:
    """The `windows` of a model, for images of this shape."""
    for key, value in (("window", window), ("stride", stride)):
        check_type(value, int | None, key=key)
    if window is None or window < 1:
        raise UserError(f"window={window}: expected the side of a window in pixels")
    if stride is not None and not 1 <= stride <= window:
        raise UserError(f"stride={stride}: expected 1 to window={window} pixels")
    step = stride or window
    return (min(window, image_shape[0]), min(window, image_shape[1])), (step, step)


def _find_head(weights: Weights, name: str) -> Params:
    """The parameters of the head for pixels."""
    parts = {tuple(path.split("/")): x for path, x in weights.objective_params.items()}
    return traverse_util.unflatten_dict(parts)[name]


def _find_dense(
    config: Mapping[str, Any],
    weights: Weights,
    module: Any,
    image_shape: tuple[int, int, int],
    pixels: tuple[Pixels, Pixels],
) -> DenseObjective | None:
    """The objective of a run that finds something for each pixel; None for other weights."""
    section = dict(config.get("objective") or {})
    name = section.pop("name", None)
    section |= {"pixel_mean": pixels[0], "pixel_std": pixels[1]}
    given: dict[str, Any] = {"model": module, "image_shape": image_shape, **as_tuples(section)}
    if name == "depth":
        return make_depth(pixel_depth=True, **given)
    if name == "segmentation" and weights.class_names:
        return make_segmentation(pixel_classes=tuple(weights.class_names), **given)
    return None


def _place(params: Params, mesh: Mesh) -> Params:
    return jax.device_put(params, infer_shardings(params, mesh))


def _locate(source: str, checkpoint: int | str | None, params: str) -> tuple[str, Path | None]:
    """The source for `load_pretrained`, and the workdir that it belongs to, if any."""
    source = find_local(source, key="source")
    folder = Path(source)
    if params not in ("raw", "ema"):
        raise UserError(f"params={params!r}: expected 'raw' or 'ema'")
    if not folder.is_dir() or find_weights(folder) is not None:
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
        path = Path(os.path.relpath(path))  # Shown relative to the current folder, as it was given.
    workdir = path.parent.parent if path.parent.name == CHECKPOINTS else None
    return str(path), workdir if workdir and (workdir / CONFIG).exists() else None


def _guess_size(weights: Weights, module: Any) -> tuple[int, int] | None:
    """Height and width of the images that fit a file's position embeddings.

    They are assumed to be square where nothing states their grid.
    """
    positions = weights.params.get(POSEMB)
    if positions is None or not isinstance(module, VisionTransformer):
        return None
    patches = positions.shape[1] - module.num_class_tokens
    side = math.isqrt(max(patches, 0))
    grid = weights.posemb_grid or (side, side)
    fits = math.prod(grid) == patches
    return (grid[0] * module.stride[0], grid[1] * module.stride[1]) if fits else None


def _check_names(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    if names is None or not num_classes:
        return None
    if len(names) > num_classes:
        raise UserError(
            f"{len(names)} class names, and the model has {num_classes} classes: expected one "
            "each, in --labels or in labels.txt of the run"
        )
    # A head may have more classes than the data.
    return (*map(printable, names), *map(str, range(len(names), num_classes)))
