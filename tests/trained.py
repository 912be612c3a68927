# SPDX-License-Identifier: Apache-2.0
"""Models on disk as if they had been trained: files, and a workdir."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tests.tiny import tiny_config
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.checkpoint.pretrained.npz import write_npz
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.checkpoint.workdir import write_config, write_labels
from vit_jax.models.variants import MODELS
from vit_jax.training.experiment import Experiment

SIZES = {"patch_size": (4, 4), "hidden_size": 16, "num_layers": 2}
VIT = {"name": "vit", **SIZES, "num_heads": 4, "mlp_dim": 32}
MIXER = {"name": "mixer", **SIZES, "tokens_mlp_dim": 8, "channels_mlp_dim": 32}
NAMES = tuple(f"digit {i}" for i in range(10))


def write_model(
    file: Path, stated: dict[str, Any] = VIT, *, classes: int = 3, size: int = 8, **changes: Any
) -> Path:
    """A `.npz` of a model with random parameters, for square images of `size`."""
    args = stated | changes
    args = {"num_classes": classes} | {k: v for k, v in args.items() if k != "name"}
    model = MODELS[stated["name"]](**args)
    images = jnp.zeros((1, size, size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False)["params"])
    rng = np.random.default_rng(0)
    flat = traverse_util.flatten_dict(shapes, sep="/")
    params = {path: rng.normal(0, 0.3, x.shape).astype(np.float32) for path, x in flat.items()}
    preprocess = {"mean": 0.4, "std": 0.3, "image_size": (size, size)}
    stated = {"name": stated["name"]} | args
    write_npz(file, Weights(params=params, layout="test", model=stated, preprocess=preprocess))
    return file


def write_towers(file: Path, *, size: int = 8) -> Path:
    """A `.npz` of a model of images and texts with random parameters, whose tokens are bytes."""
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 4, "mlp_dim": 32}
    stated: dict[str, Any] = {
        "image": sizes | {"patch_size": 4, "classifier": "gap"},
        "text": sizes | {"vocab_size": 259, "context_length": 24},
        "width": 16,
    }
    model = MODELS["two_towers"](**stated)
    images, tokens = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 24), jnp.int32)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), images, tokens, train=False)["params"]
    )
    rng = np.random.default_rng(0)
    flat = traverse_util.flatten_dict(shapes, sep="/")
    params = {path: rng.normal(0, 0.3, x.shape).astype(np.float32) for path, x in flat.items()}
    params |= {"t": np.array([2.0], np.float32), "b": np.array([-1.0], np.float32)}
    weights = Weights(
        params=params,
        layout="test",
        model={"name": "two_towers"} | stated,
        preprocess={"mean": 0.4, "std": 0.3, "image_size": (size, size)},
        tokenizer={"line": "bytes(length=24)"},
    )
    write_npz(file, weights)
    return file


def write_run(workdir: Path, data_dir: str, **changes: Any) -> tuple[Path, Experiment, Any]:
    """A workdir with checkpoints of the steps 4 and 8, of which the first one is the better.

    Returns:
      The workdir, its experiment, and the parameters of step 8; their average is twice that.
    """
    options = {"ema_decay": 0.5, "checkpoint__keep_best": "val/top1", "checkpoint__keep": 2}
    experiment = Experiment.from_config(tiny_config(data_dir, **(options | changes)))
    state = experiment.init_state()
    workdir.mkdir()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), state.params)
    scores = {4: 0.75, 8: 0.5}
    with CheckpointManager(
        workdir, experiment.settings.checkpoint, experiment.description
    ) as manager:
        for step, score in scores.items():
            these = jax.tree.map(lambda x, step=step: jnp.asarray(x * step / 8), params)
            twice = jax.tree.map(lambda x: 2 * x, these)
            manager.save(
                step,
                dataclasses.replace(state, params=these, ema_params=twice),
                {"val/top1": score},
            )
    records = [{"step": step, "val/top1": score} for step, score in scores.items()]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_config(workdir, experiment.config)
    write_labels(workdir, NAMES)
    return workdir, experiment, params


def write_segmentation(workdir: Path, data_dir: str) -> Path:
    """Writes a run of images of 16x16, whose head gives classes that differ from pixel to pixel."""
    workdir.mkdir()
    config = tiny_config(
        data_dir,
        data__name="digits_masks:16",
        objective={"name": "segmentation", "head": "upsample", "head_width": 8},
        evals__val__name="segmentation",
        evals__val__preprocess="decode|resize(16)",
        model__patch_size=4,
    )
    experiment = Experiment.from_config(config, devices=jax.devices()[:1])
    state = experiment.init_state()
    kernel = state.params["segmenter"]["classifier"]["kernel"]
    state.params["segmenter"]["classifier"]["kernel"] = kernel * 100
    options, description = experiment.settings.checkpoint, experiment.description
    with CheckpointManager(workdir, options, description) as manager:
        manager.save(8, state, {})
    write_config(workdir, experiment.config)
    write_labels(workdir, experiment.train_data.info.pixel_classes)
    return workdir


def write_depth(workdir: Path, data_dir: str) -> Path:
    """Writes a run of images of 16x16 whose head gives depths that differ from pixel to pixel."""
    workdir.mkdir()
    config = tiny_config(
        data_dir,
        data__name="digits_depth:16",
        objective={"name": "depth", "head": "conv", "head_width": 8, "bins": 8},
        evals__val__name="depth",
        evals__val__preprocess="decode|resize(16)",
        model__patch_size=4,
    )
    experiment = Experiment.from_config(config, devices=jax.devices()[:1])
    state = experiment.init_state()
    kernel = state.params["depth_head"]["classifier"]["kernel"]
    state.params["depth_head"]["classifier"]["kernel"] = kernel * 100
    options, description = experiment.settings.checkpoint, experiment.description
    with CheckpointManager(workdir, options, description) as manager:
        manager.save(8, state, {})
    write_config(workdir, experiment.config)
    return workdir


def write_images(folder: Path, count: int, *, size: int = 8) -> list[Path]:
    """Images of noise, `00.png` and on."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    paths = [folder / f"{i:02}.png" for i in range(count)]
    for path in paths:
        cv2.imwrite(str(path), rng.integers(0, 256, (size, size, 3), np.uint8))
    return paths
