# SPDX-License-Identifier: Apache-2.0
"""The same step on a GPU and on a CPU. `make test-gpu` runs it where JAX has both."""

import jax
import numpy as np
import pytest

from tests.tiny import tiny_config
from vit_jax.training.experiment import Experiment


def losses(data_dir, devices, **changes):
    experiment = Experiment.from_config(tiny_config(data_dir, **changes), devices=devices)
    state, found = experiment.init_state(), []
    batches = experiment.train_batches(0)
    for _ in range(8):
        state, metrics = experiment.train_step(state, next(batches))
        found.append(float(metrics["loss"]))
    return np.array(found)


@pytest.mark.gpu
def test_fused_attention_gives_the_losses_of_attention_in_memory(data_dir):
    changes = {
        "precision": "bfloat16",
        "model__hidden_size": 32,
        "model__num_heads": 2,
        "model__qk_norm": True,
    }
    gpu = jax.devices("gpu")[:1]
    want = losses(data_dir, gpu, model__attention="xla", **changes)
    got = losses(data_dir, gpu, model__attention="fused", **changes)
    np.testing.assert_allclose(got, want, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05), ("float8", 0.05)]
)
def test_losses_on_a_gpu_are_those_on_a_cpu(precision, tolerance, data_dir):
    with jax.default_matmul_precision("highest"):
        want = losses(data_dir, jax.devices("cpu")[:1])
        got = losses(data_dir, jax.devices("gpu")[:1], precision=precision)
    np.testing.assert_allclose(got, want, rtol=tolerance)
