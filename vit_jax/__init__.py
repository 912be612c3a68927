# SPDX-License-Identifier: Apache-2.0
"""Distributed training of Vision Transformers in JAX.

The names in `__all__` are the public API. Modules are imported when they are first used.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_jax.checkpoint.pretrained.catalogue import list_models
    from vit_jax.config.shipped import list_configs
    from vit_jax.inference.masks import ImageDepth, ImageMask
    from vit_jax.inference.model import LoadedModel, load_model
    from vit_jax.inference.prediction import (
        ImageFeatures,
        ImagePrediction,
        ImagePredictions,
        Prediction,
    )
    from vit_jax.training.result import RunResult
    from vit_jax.training.run import train
    from vit_jax.utils.errors import UserError

__version__ = "0.1.0"

__all__ = [
    "ImageDepth",
    "ImageFeatures",
    "ImageMask",
    "ImagePrediction",
    "ImagePredictions",
    "LoadedModel",
    "Prediction",
    "RunResult",
    "UserError",
    "__version__",
    "list_configs",
    "list_models",
    "load_model",
    "train",
]

_MODULES = {
    "ImageFeatures": "vit_jax.inference.prediction",
    "ImageDepth": "vit_jax.inference.masks",
    "ImageMask": "vit_jax.inference.masks",
    "ImagePrediction": "vit_jax.inference.prediction",
    "ImagePredictions": "vit_jax.inference.prediction",
    "LoadedModel": "vit_jax.inference.model",
    "Prediction": "vit_jax.inference.prediction",
    "RunResult": "vit_jax.training.result",
    "UserError": "vit_jax.utils.errors",
    "list_configs": "vit_jax.config.shipped",
    "list_models": "vit_jax.checkpoint.pretrained.catalogue",
    "load_model": "vit_jax.inference.model",
    "train": "vit_jax.training.run",
}


# As `python -m vit_jax.COMMAND`: importing the command takes seconds, in which Ctrl-C may come.
if sys.argv[:1] == ["-m"]:
    from vit_jax.utils.signals import end_at_interrupt

    end_at_interrupt()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_MODULES[name])
    return globals().setdefault(name, getattr(module, name))


def __dir__() -> list[str]:
    return sorted(__all__)
