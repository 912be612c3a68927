# SPDX-License-Identifier: Apache-2.0
"""A file with a model to distil."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vit_jax.checkpoint.pretrained.npz import write_npz
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.models.variants import make_vit

PIXELS = {"mean": 0.3, "std": 0.2}
SIZES = {"patch_size": 4, "hidden_size": 12, "num_layers": 1, "num_heads": 3, "mlp_dim": 16}


def write_teacher(folder: Path, *, classes: int = 3, size: int = 16, names=None) -> str:
    """A larger model with random parameters, for images of twice the size."""
    model = make_vit(num_classes=classes, **SIZES)
    images = jnp.zeros((1, size, size, 3))
    init = jax.eval_shape(lambda: model.init(jax.random.key(1), images, train=False)["params"])
    flat = traverse_util.flatten_dict(init, sep="/")
    rng = np.random.default_rng(1)
    flat = {path: rng.normal(size=x.shape).astype(np.float32) for path, x in flat.items()}
    stated = {"name": "vit", **SIZES, "patch_size": (4, 4), "classifier": "token"}
    preprocess = PIXELS | {"image_size": (size, size)}
    weights = Weights(
        params=flat, layout="test", model=stated, preprocess=preprocess, class_names=names
    )
    write_npz(folder / "teacher.npz", weights)
    return str(folder / "teacher.npz")
