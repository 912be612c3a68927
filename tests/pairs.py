# SPDX-License-Identifier: Apache-2.0
"""A config of a small model of images and texts, on captioned digits."""

from typing import Any

from ml_collections import ConfigDict

from tests.tiny import tiny_config

LENGTH = 52
SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 4, "mlp_dim": 32}
IMAGE = SIZES | {"patch_size": 4, "classifier": "gap"}
TEXT = SIZES | {"vocab_size": 259, "context_length": LENGTH}


def pairs_config(data_dir: str, **changes: Any) -> ConfigDict:
    """As `tiny_config`, with two towers and the contrastive objective."""
    known: dict[str, Any] = {
        "model": {
            "name": "two_towers",
            "image": dict(IMAGE),
            "text": dict(TEXT),
            "width": 16,
            "bias_init": -3.0,
        },
        "objective": {"name": "contrastive"},
        "data__name": "digits_captions",
        "data__preprocess": "decode",
        "data__tokenizer": f"bytes(length={LENGTH})",
        "evals": {
            "val": {"name": "zero_shot", "split": "test[:50]", "preprocess": "decode", "every": 4}
        },
    }
    return tiny_config(data_dir, **known | changes)
