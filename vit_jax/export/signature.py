# SPDX-License-Identifier: Apache-2.0
"""The input and output of a written model, as JSON, for users who have only its files."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import vit_jax
from vit_jax.inference.model import LoadedModel
from vit_jax.utils.text import printable

SIGNATURE = "signature.json"
INPUT = "images"


# A path that starts at the root, at a home or above the current folder: at the start of a text,
# after the kind of a dataset, or quoted in a line. URLs and names such as B/16 are none.
_PATH = re.compile(r"""(^|[\s"'=(,|:\[])((?:~[\w.-]*|\.{1,2})?/(?!/)[^\s"'|,)\]:]*)""")


def without_folders(text: str) -> str:
    """Returns a text in which paths of this machine are replaced by their last part."""
    return printable(_PATH.sub(lambda found: found[1] + Path(found[2]).name, text))


def name_source(model: LoadedModel) -> str:
    """Names the source of the parameters without folders of this machine."""
    if model.workdir is not None:
        path = Path(model.source)
        return printable("/".join((model.workdir.resolve().name, *path.parts[-2:])))
    path, colon, part = model.source.rpartition(":")
    if Path(model.source).exists():
        return printable(Path(model.source).name)
    if Path(path).exists():  # A part of a file.
        return printable(f"{Path(path).name}{colon}{part}")
    return without_folders(model.source)


def describe_signature(model: LoadedModel, layer: str, files: Mapping[str, str]) -> dict[str, Any]:
    """Describes the input, the output, the preparation of images and the class names.

    The programs return the output of `layer`; `files` are their names by format.
    """
    images = jax.ShapeDtypeStruct((1, *model.image_shape), np.uint8)
    output = jax.eval_shape(model.as_function(layer), images)
    classifies = layer == "logits" and model.texts is None
    named = classifies or layer == "pixel_logits"
    return {
        "files": dict(files),
        "input": {
            "name": INPUT,
            "dtype": "uint8",
            "shape": ["batch", *model.image_shape],
            "meaning": f"{'RGB' if model.image_shape[2] == 3 else 'luma'} from 0 to 255, the "
            "channel last",
        },
        "output": {"name": layer, "dtype": "float32", "shape": ["batch", *output.shape[1:]]},
        "preprocess": {
            "outside": without_folders(model.preparation.line),
            "inside": {"divide_by": 255, "mean": model.pixel_mean, "std": model.pixel_std},
        },
        "probabilities": model.loss if classifies else None,
        "temperature": model.temperature if classifies else None,
        "class_names": list(model.class_names or ()) or None if named else None,
        "made_from": name_source(model),
        "made_with": {"vit_jax": vit_jax.__version__, "jax": jax.__version__},
    }
