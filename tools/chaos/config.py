# SPDX-License-Identifier: Apache-2.0
"""Digits, so small that a run takes seconds: what faults are injected into.

The argument is the folder of the prepared data. `CHAOS_NAN=7,8` in the environment makes the images
of those steps no numbers. `CHAOS_STALL=FILE` makes opening an image wait for ever once that file
exists, as on a network that no longer answers.
"""

import os
import runpy
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_jax.objectives.supervised import Supervised
from vit_jax.training.step import step_rng

DIGITS = Path(__file__).parent.parent.parent / "configs" / "digits.py"
TOTAL, SAVE_EVERY, EVALUATE_EVERY = 60, 10, 20


def get_config(data_dir: str) -> ConfigDict:
    """The config of all runs."""
    config = runpy.run_path(str(DIGITS))["get_config"]()
    config.total_steps = TOTAL
    config.mesh = {"data": -1, "fsdp": 2}
    config.model.update(hidden_size=16, num_layers=1, num_heads=2, mlp_dim=32)
    config.data.update(batch_size=16, data_dir=data_dir)
    config.optimizer.warmup_steps = 5
    config.evals.val.update(split="train[90%:]", every=EVALUATE_EVERY, batch_size=16)
    config.evals.test.update(split="test[:50]")
    config.checkpoint = {"every": SAVE_EVERY, "keep": 2}
    config.log_every = 1
    steps = [int(step) for step in os.environ.get("CHAOS_NAN", "").split(",") if step]
    if steps:
        _poison(steps, seed=config.seed)
    if marker := os.environ.get("CHAOS_STALL"):
        _stall(marker)
    return config


def _stall(marker: str) -> None:
    original = os.open

    def open_or_wait(path, *args, **options):
        if os.fspath(path).endswith(".png") and os.path.exists(marker):
            threading.Event().wait()
        return original(path, *args, **options)

    os.open = open_or_wait


def _poison(steps: list[int], *, seed: int) -> None:
    original = Supervised.augment

    def augment(self, batch, rng):
        batch = original(self, batch, rng)
        keys = [jax.random.split(step_rng(seed, step - 1))[0] for step in steps]
        hit = sum(jnp.all(jax.random.key_data(rng) == jax.random.key_data(key)) for key in keys)
        return batch | {"image": jnp.where(hit > 0, jnp.nan, batch["image"])}

    Supervised.augment = augment
