# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer, with its pre-training and fine-tuning heads.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929, section 3.1.
"""

import dataclasses
import functools
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import resnet
from vit_jax.models.block_config import (
    Activation,
    Attention,
    BlockConfig,
    Blocks,
    Constrain,
    Norm,
    QkvBias,
    unconstrained,
)
from vit_jax.models.blocks import DepthSchedule, Encoder, Remat
from vit_jax.models.heads import HeadInit, MAPHead, apply_head
from vit_jax.models.lora import Lora
from vit_jax.models.norms import make_norm
from vit_jax.models.patches import (
    Layout,
    PatchBatch,
    PatchEmbedding,
    Segments,
    grid_layout,
    mean_of_images,
)
from vit_jax.models.positions import (
    CoordinateNoise,
    Coordinates,
    RopeCoordinates,
    Rotation,
    fixed_positions,
    locate_tokens,
    patch_grid,
    relate_tokens,
    rotation_2d,
    rotation_of,
)
from vit_jax.models.resampling import Method
from vit_jax.utils.errors import UserError

Classifier = Literal["token", "gap", "map", "token_gap", "unpooled", "token_unpooled"]
_WITH_CLASS_TOKEN = ("token", "token_gap", "token_unpooled")
PositionEmbedding = Literal["learned", "factorized", "sincos2d", "sincos2d_mae", "relative", "none"]
RopeFrequencies = Literal["axial", "mixed"]
Dtype = Literal["float32", "bfloat16"]


class VisionTransformer(nn.Module, kw_only=True):
    """Images to logits.

    Attributes:
      num_classes: width of the `head`; 0 for no head: the model returns the representation.
      patch_size: (height, width) of a patch in pixels, or in cells of the ResNet's output.
      kernel_size: (height, width) of the kernel of the patch embedding that is trained, which each
        call resizes to `patch_size`; None for `patch_size`.
      patch_sizes: sizes of patches in pixels of which each step of training draws one, as in
        FlexiViT (arXiv:2212.08013); `()` for `patch_size` in all steps.
      hidden_size: width of the encoder.
      num_layers: number of encoder blocks.
      num_heads: number of attention heads; must divide `hidden_size`.
      mlp_dim: hidden width of the MLP blocks.
      classifier: what represents the image: the final state of the class `token`; the mean over
        patches (`gap`) or attention pooling (`map`), both without a class token; the class token
        and the mean over patches, one behind the other (`token_gap`); or every token
        (`unpooled`, `token_unpooled`).
      map_num_heads: attention heads of attention pooling; None for `num_heads`.
      map_mlp_dim: hidden width of the MLP of attention pooling; None for `mlp_dim`.
      representation_size: width of the tanh layer `pre_logits` of the pre-training head; None for
        the fine-tuning head, which is one linear layer.
      resnet_layers: number of units in each stage of a ResNet in front of the patches (a hybrid);
        `()` for its root only, None for no ResNet.
      resnet_width: factor on the ResNet's 64 channels.
      resnet_epsilon: added to the variances of the ResNet's kernels, as in timm, whose hybrids have
        1e-8; None to add 1e-5 to their standard deviations, as the published hybrids do.
      resnet_norm_epsilon: of the ResNet's group norms; timm has 1e-5.
      position_embedding: `learned`, the sum of one for the row and one for the column
        (`factorized`, as in NaViT), fixed 2D sines and cosines (`sincos2d`, or `sincos2d_mae` with
        the frequencies of arXiv:2111.06377), a learned bias of attention for each distance between
        patches (`relative`, as in BEiT, arXiv:2106.08254), or `none`.
      posemb_grid: (rows, columns) of the learned or factorized position embeddings, which each call
        resizes to the grid of its images; None for that of the images.
      posemb_resize: how learned ones are resized; see `resampling.axis_weights`.
      posemb_keep_aspect: whether they are resized to the square of the longer side, of which an
        image takes the upper left part (`pos_embed_ar_preserving` of timm).
      rope_theta: base of a 2D rotary embedding of queries and keys, such as 100.0; None for none.
      rope_frequencies: those of the rotary embedding: half of the channels for rows and half for
        columns (`axial`), or learned ones for both in each head of each block, which start from
        axes turned at random (`mixed`, arXiv:2403.13298).
      rope_reference_grid: (rows, columns) of patches whose positions any other grid spans, as in
        timm's models (16, 16); None for positions that are rows and columns of patches.
      rope_offset: added to the rows and columns of patches, before a reference grid scales them, as
        in the Perception Encoder (arXiv:2504.13181); class tokens and registers are not turned.
      rope_coordinates: positions of the rotary embedding: the `index` of rows and columns, or 2 pi
        times coordinates in (-1, 1) (`centered`), as in DINOv3 (arXiv:2508.10104).
      rope_shift, rope_jitter, rope_rescale: how centred coordinates vary in training, see
        `positions.CoordinateNoise`; None for no variation.
      rope_register_theta: base of a rotary embedding of the registers, as a square grid of their
        own, as in ViT-5 (arXiv:2602.08071); None for registers that are not turned.
      num_registers: number of learned tokens beside the patches (arXiv:2309.16588).
      distillation_token: whether a second class token with a head of its own (`head_dist`) follows
        the first (arXiv:2012.12877); the logits are the mean of both heads.
      activation: activation of the MLP blocks: GELU by its tanh approximation, as in the published
        weights, exact GELU, x * sigmoid(1.702 x) as in OpenAI's CLIP (`quick_gelu`), or SwiGLU.
      qk_norm: whether queries and keys are normalised.
      qkv_bias: whether the projections of queries, keys and values have biases (`all`), those of
        keys have none (`query_value`, as in DINOv3), or none of them has one (`none`).
      attention_norm: whether the output of the attention heads is normalised before its projection,
        as in EVA-02 (arXiv:2303.11331).
      mlp_norm: whether the hidden state of the MLP blocks is normalised, as in EVA-02.
      norm: the kind of all norms: `layer_norm`, or `rms_norm`, which subtracts no mean and has no
        bias.
      layer_scale_init: initial factor on residual branches (LayerScale); None for no factor.
      norm_epsilon: epsilon of all norms.
      pre_norm: whether a norm comes before the first block, as in CLIP.
      norm_after_pooling: whether the final norm (`fc_norm`) comes after pooling, not before.
      untied_norm: whether the final norm of class tokens and registers has parameters of its own,
        as an option of DINOv3.
      dropout_rate: dropout after the position embeddings, the attention and both MLP layers.
      attention_dropout_rate: dropout of attention weights.
      stochastic_depth_rate: rate at which the last block drops its branches for a sample.
      stochastic_depth_schedule: the rates of the other blocks: rising from 0 in the first
        (`linear`), or the same (`uniform`, as in arXiv:2204.07118).
      patch_dropout_rate: share of patches dropped in training.
      embedding_bias: whether the patch embedding has a bias; CLIP has none.
      drop_pixels: whether the pixels at the right and at the bottom that make no whole patch are
        left out, as in timm; otherwise such images are refused.
      head_bias: whether the head has a bias.
      head_bias_init: initial value of the head's bias.
      head_init: how the kernel of the head starts: at zero, or from N(0, 1 / width), truncated
        (`lecun_normal`).
      scan: whether one compiled block runs over stacked parameters: faster to compile, slower to
        run on a CPU.
      remat: what the backward pass recomputes to save memory: nothing (`none`), all but the dense
        layers (`dots`), everything (`full`), or all but named activations, such as
        `save:attn_out,mlp_hidden` (see `blocks.parse_remat`).
      attention: where attention weights are computed: in memory (`xla`), or within one kernel that
        never writes them (`fused`, which is `pallas` on TPUs); `auto` for the faster one on the
        devices of a run.
      blocks: how norms, projections and residual connections of blocks are computed: by the layers
        of Flax (`xla`), or in the form that has the fewest kernels on NVIDIA GPUs (`fused`); `auto`
        for the faster one on the devices of a run.
      dtype: dtype of the computation. Parameters and logits are float32.
      float8: whether the matrix products of attention projections and MLPs, and of their gradients,
        take float8 inputs (see `models.float8`). The parameters are the same.
      lora: which matrix products have adapters; None for none.
      any_size: whether uint8 images are columns of patches of images of any size, as the operation
        `patches` of `data.preprocess` makes them.
      constrain: shards activations over a mesh.

    Call: images `[batch, height, width, channels]` (float, [-1, 1] for published weights; height
    and width divisible by the patch) or a `PatchBatch` to `(logits, out)`: logits are float32
    `[batch, num_classes]` (`[batch, length, num_classes]` if unpooled); `out` holds `encoded`
    `[batch, length, hidden]` and `pre_logits` (the input of the head) in `dtype`, and `logits`;
    with a distillation token also the logits of each head, `class_logits` and
    `distillation_logits`. Of a `PatchBatch` whose rows hold several images, `batch` is the number
    of rows times that of images in `logits` and `pre_logits`, and the number of rows in `encoded`.
    `patches`, int32 `[batch, kept]`, are the indices of the only patches to encode, row by row;
    None for all.
    `masked`, bool `[batch, rows * columns]`, are the patches whose embeddings a learned
    `mask_token` replaces; None for none, and for no such token. `position_grid` is the grid of
    the learned position embeddings, which are resized to that of the images; None for the same.
    `position_resize` is the rule for these, None for `bicubic_no_antialias`.
    """

    num_classes: int
    patch_size: tuple[int, int]
    kernel_size: tuple[int, int] | None = None
    patch_sizes: tuple[int, ...] = ()
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    classifier: Classifier = "token"
    map_num_heads: int | None = None
    map_mlp_dim: int | None = None
    representation_size: int | None = None
    resnet_layers: tuple[int, ...] | None = None
    resnet_width: float = 1.0
    resnet_epsilon: float | None = None
    resnet_norm_epsilon: float = 1e-6
    position_embedding: PositionEmbedding = "learned"
    posemb_grid: tuple[int, int] | None = None
    posemb_resize: Method = "bilinear_antialias"
    posemb_keep_aspect: bool = False
    rope_theta: float | None = None
    rope_frequencies: RopeFrequencies = "axial"
    rope_reference_grid: tuple[int, int] | None = None
    rope_offset: float = 0.0
    rope_coordinates: RopeCoordinates = "index"
    rope_shift: float | None = None
    rope_jitter: float | None = None
    rope_rescale: float | None = None
    rope_register_theta: float | None = None
    num_registers: int = 0
    distillation_token: bool = False
    activation: Activation = "gelu_tanh"
    qk_norm: bool = False
    qkv_bias: QkvBias = "all"
    attention_norm: bool = False
    mlp_norm: bool = False
    norm: Norm = "layer_norm"
    layer_scale_init: float | None = None
    norm_epsilon: float = 1e-6
    pre_norm: bool = False
    norm_after_pooling: bool = False
    untied_norm: bool = False
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    stochastic_depth_schedule: DepthSchedule = "linear"
    patch_dropout_rate: float = 0.0
    embedding_bias: bool = True
    drop_pixels: bool = False
    head_bias: bool = True
    head_bias_init: float = 0.0
    head_init: HeadInit = "zeros"
    scan: bool = False
    remat: Remat = "none"
    attention: Attention = "auto"
    blocks: Blocks = "auto"
    dtype: Dtype = "float32"
    float8: bool = False
    lora: Lora | None = None
    any_size: bool = False
    constrain: Constrain = unconstrained

    @property
    def num_class_tokens(self) -> int:
        """The number of class and distillation tokens, which are first and have positions."""
        with_class = self.classifier in _WITH_CLASS_TOKEN
        return int(with_class) + int(self.distillation_token)

    @property
    def num_prefix_tokens(self) -> int:
        """The number of tokens in front of the patches: class tokens and registers."""
        return self.num_class_tokens + self.num_registers

    @property
    def stride(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels of the image."""
        shrink = 1 if self.resnet_layers is None else resnet.total_stride(self.resnet_layers)
        return self.patch_size[0] * shrink, self.patch_size[1] * shrink

    @property
    def relative_positions(self) -> bool:
        """Whether attention has a bias for each distance between patches."""
        return self.position_embedding == "relative"

    @property
    def block_config(self) -> BlockConfig:
        """The options that all layers share: the attributes with the names of its fields."""
        names = [field.name for field in dataclasses.fields(BlockConfig)]
        return BlockConfig(**{name: getattr(self, name) for name in names if hasattr(self, name)})

    def check_rows(self, *, packed: bool) -> None:
        """Raises `UserError` unless it takes a `PatchBatch`, whose rows may be `packed`."""
        needs = {
            "a model.posemb_grid such as (16, 16), or position_embedding='none'": (
                self.any_resolution
            ),
            "model.patch_dropout_rate=0": not self.patch_dropout_rate,
            "model.rope_register_theta=None": self.rope_register_theta is None,
            "model.rope_frequencies='axial'": self.rope_frequencies == "axial",
            "no model.rope_shift, rope_jitter and rope_rescale": not any(
                (self.rope_shift, self.rope_jitter, self.rope_rescale)
            ),
        }
        if packed:
            tokens = self.num_prefix_tokens == 0
            needs["model.classifier='gap' or 'map', without registers"] = tokens
        missing = [need for need, is_met in needs.items() if not is_met]
        if missing:
            rows = "several images in a row" if packed else "images of any size"
            raise UserError(f"{rows} need {' and '.join(missing)}")

    @property
    def any_resolution(self) -> bool:
        """Whether it takes a `PatchBatch`: positions do not depend on the size of the images."""
        resized = self.posemb_grid is not None
        return self.resnet_layers is None and (resized or self.position_embedding == "none")

    def grid(self, image_size: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of patches in an image of (height, width) pixels."""
        return patch_grid(image_size, self.stride, drop_pixels=self.drop_pixels)

    def at_patch_size(self, size: int) -> "VisionTransformer":
        """The same model for another patch, to which its kernel is resized."""
        return self.clone(patch_size=(size, size), kernel_size=self.kernel_size or self.patch_size)

    @nn.compact
    def __call__(
        self,
        images: jax.Array | PatchBatch,
        *,
        train: bool,
        patches: jax.Array | None = None,
        masked: jax.Array | None = None,
        position_grid: tuple[int, int] | None = None,
        position_resize: Method | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        if isinstance(images, PatchBatch):
            encoded, segments = self._encode_rows(images, train=train)
            x = self._pool_rows(encoded, segments, train=train)
        else:
            grid = self.grid(images.shape[1:3])
            embedded = self._embed(images)
            if masked is not None:
                embedded = self._mask(embedded, masked)
            position_grid = self.posemb_grid or position_grid or grid
            grids = position_grid, grid
            encoded = self._encode(embedded, grids, position_resize, patches, train=train)
            x = self._pool(encoded, train=train)
        if self.norm_after_pooling:
            x = make_norm(self.block_config, "fc_norm")(x)
        if self.representation_size is not None:
            x = nn.Dense(self.representation_size, dtype=self.dtype, name="pre_logits")(x)
            x = nn.tanh(x)
        out = {"encoded": encoded, "pre_logits": x}
        if not self.num_classes:
            return x, out
        head = functools.partial(
            apply_head,
            num_classes=self.num_classes,
            bias=self.head_bias,
            bias_init=self.head_bias_init,
            init=self.head_init,
            constrain=self.constrain,
        )
        logits = head(x)
        if self.distillation_token:
            second = head(encoded[:, 1], name="head_dist")
            out |= {"class_logits": logits, "distillation_logits": second}
            logits = (logits + second) / 2
        return logits, out | {"logits": logits}

    def _embed(self, images: jax.Array) -> jax.Array:
        """Embeds images into patches `[batch, rows, columns, hidden]`."""
        x = images
        if self.resnet_layers is not None:
            width = round(64 * self.resnet_width)
            layers = resnet.Layers(self.dtype, self.resnet_epsilon, self.resnet_norm_epsilon)
            x = resnet.apply_root(x, width, layers)
            x = resnet.apply_stages(x, self.resnet_layers, width, layers)
        if self.kernel_size is not None:
            return self._embed_patches(x)
        return nn.Conv(
            self.hidden_size,
            self.patch_size,
            strides=self.patch_size,
            padding="VALID",
            use_bias=self.embedding_bias,
            dtype=self.dtype,
            name="embedding",
        )(x)

    def _embed_patches(self, x: jax.Array) -> jax.Array:
        return PatchEmbedding(
            self.hidden_size,
            self.patch_size,
            self.kernel_size or self.patch_size,
            use_bias=self.embedding_bias,
            dtype=self.dtype,
            name="embedding",
        )(x)

    def _mask(self, embedded: jax.Array, masked: jax.Array) -> jax.Array:
        """Replaces the embeddings of masked patches, before positions are added."""
        token = self.param("mask_token", nn.initializers.zeros, (1, 1, self.hidden_size))
        where = masked.reshape(*embedded.shape[:3], 1)
        return jnp.where(where, token.astype(embedded.dtype), embedded)

    def _encode(
        self,
        embedded: jax.Array,
        grids: tuple[tuple[int, int], tuple[int, int]],
        position_resize: Method | None,
        patches: jax.Array | None,
        *,
        train: bool,
    ) -> jax.Array:
        n, h, w, c = embedded.shape
        grid = grids[1]
        x = embedded.reshape(n, h * w, c)
        positions = fixed_positions(self.position_embedding, grid, c)
        if positions is not None:
            x = x + jnp.asarray(positions, self.dtype)
        x = self._prepend_tokens(x)
        rotation = self._rotation(grid, train=train) if self.rope_theta is not None else None
        by_layout = self.position_embedding == "factorized" or self.posemb_keep_aspect
        layout = grid_layout(grid) if by_layout else None
        relative = relate_tokens(grid, self.num_prefix_tokens) if self.relative_positions else None
        same = grids[0] == grid and not by_layout
        encoder = self._encoder(None if same else grids, position_resize)
        return encoder(x, rotation, patches, layout, relative=relative, train=train)

    def _encode_rows(self, batch: PatchBatch, *, train: bool) -> tuple[jax.Array, Segments]:
        """Encodes rows of patches: `[batch, prefix + tokens, hidden]`, and whose tokens these are.

        The images of a row that holds several have no tokens but their patches.

        Raises:
          UserError: the model does not take images of any size.
        """
        self.check_rows(packed=batch.is_packed)
        x, layout = self._embed_patches(batch.pixels), Layout.of(batch)
        prefix = jnp.ones((x.shape[0], self.num_prefix_tokens), jnp.int32)
        ids = jnp.concatenate([prefix, batch.segments], axis=1)
        segments = Segments(ids, batch.grids.shape[1])
        rotation = None
        if self.rope_theta is not None:
            rotation = rotation_of(
                layout.coordinates,
                layout.sizes,
                self.hidden_size // self.num_heads,
                theta=self.rope_theta,
                num_prefix_tokens=self.num_prefix_tokens,
                reference_grid=self.rope_reference_grid,
                offset=self.rope_offset,
                centered=self.rope_coordinates == "centered",
            )
        grid = self.posemb_grid
        encoder = self._encoder(None if grid is None else (grid, grid))
        x = self._prepend_tokens(x)
        return encoder(x, rotation, None, layout, segments, train=train), segments

    def _prepend_tokens(self, x: jax.Array) -> jax.Array:
        """Puts the class and distillation tokens in front of patches `[batch, length, hidden]`."""
        tokens, shape = [], (1, 1, x.shape[-1])
        if self.classifier in _WITH_CLASS_TOKEN:
            tokens.append(self.param("cls", nn.initializers.zeros, shape))
        if self.distillation_token:
            tokens.append(self.param("dist", nn.initializers.normal(stddev=0.02), shape))
        if not tokens:
            return x
        first = jnp.concatenate(tokens, axis=1).astype(self.dtype)
        first = jnp.broadcast_to(first, (x.shape[0], *first.shape[1:]))
        return jnp.concatenate([first, x], axis=1)

    def _encoder(
        self,
        grids: tuple[tuple[int, int], tuple[int, int]] | None,
        position_resize: Method | None = None,
    ) -> Encoder:
        return Encoder(
            config=self.block_config,
            num_layers=self.num_layers,
            num_class_tokens=self.num_class_tokens,
            num_registers=self.num_registers,
            learned_positions=self.position_embedding in ("learned", "factorized"),
            grids=grids,
            posemb_resize=position_resize if self.posemb_grid is None else self.posemb_resize,
            posemb_keep_aspect=self.posemb_keep_aspect,
            factorized=self.position_embedding == "factorized",
            pre_norm=self.pre_norm,
            patch_dropout_rate=self.patch_dropout_rate,
            stochastic_depth_rate=self.stochastic_depth_rate,
            stochastic_depth_schedule=self.stochastic_depth_schedule,
            final_norm=not self.norm_after_pooling,
            untied_norm=self.untied_norm,
            scan=self.scan,
            remat=self.remat,
            name="Transformer",
        )

    def _rotation(self, grid: tuple[int, int], *, train: bool) -> Rotation | Coordinates:
        """Returns the rotation of class tokens, registers and patches, in this order.

        With frequencies of the blocks, it is where these tokens are.
        """
        assert self.rope_theta is not None
        if self.rope_frequencies == "mixed":
            return locate_tokens(grid, self.num_prefix_tokens)
        register_theta = self.rope_register_theta
        head_dim = self.hidden_size // self.num_heads
        noise = CoordinateNoise(self.rope_shift, self.rope_jitter, self.rope_rescale)
        patches = rotation_2d(
            grid,
            head_dim,
            theta=self.rope_theta,
            num_prefix_tokens=self.num_prefix_tokens if register_theta is None else 0,
            reference_grid=self.rope_reference_grid,
            offset=self.rope_offset,
            coordinates=self.rope_coordinates,
            noise=noise,
            rng=self.make_rng("dropout") if train and any(noise) else None,
        )
        if register_theta is None:
            return patches
        side = math.isqrt(self.num_registers)
        first = rotation_2d(
            (side, side),
            head_dim,
            theta=register_theta,
            num_prefix_tokens=self.num_class_tokens,
        )
        return Rotation(*(jnp.concatenate(tables) for tables in zip(first, patches, strict=True)))

    def _pool(self, encoded: jax.Array, *, train: bool) -> jax.Array:
        if self.classifier == "token":
            return encoded[:, 0]
        if self.classifier in ("gap", "token_gap"):
            mean = encoded[:, self.num_prefix_tokens :].mean(axis=1)
            if self.classifier == "gap":
                return mean
            return jnp.concatenate([encoded[:, 0], mean], axis=-1)
        if self.classifier == "map":
            return self._map_head()(encoded, train=train)
        return encoded

    def _map_head(self) -> MAPHead:
        return MAPHead(self.block_config, self.map_num_heads, self.map_mlp_dim, name="MAPHead_0")

    def _pool_rows(self, encoded: jax.Array, segments: Segments, *, train: bool) -> jax.Array:
        """Represents each image of each row: `[batch * images, hidden]`."""
        if self.classifier == "token":
            return encoded[:, 0]
        patches, prefix = encoded[:, self.num_prefix_tokens :], self.num_prefix_tokens
        if self.classifier in ("gap", "token_gap"):
            x = mean_of_images(patches, segments._replace(ids=segments.ids[:, prefix:]))
            if self.classifier == "token_gap":
                x = jnp.concatenate([encoded[:, :1], x], axis=-1)
        elif self.classifier == "map":
            x = self._map_head()(encoded, segments.members(), train=train)
        else:
            return encoded
        return x.reshape(-1, x.shape[-1])
