# SPDX-License-Identifier: Apache-2.0
"""The head of DINO: that of the code of DINOv2, and the kinds of its last layer."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from vit_jax.models.prototypes import PrototypeHead

GOLDEN = Path(__file__).parents[1] / "testdata" / "dino"


def test_head_is_that_of_dinov2():
    spec = json.loads((GOLDEN / "dino_head.json").read_text())
    weights = load_file(GOLDEN / "dino_head.safetensors")
    layers = {
        f"Dense_{i}": {
            "kernel": weights[f"mlp.{2 * i}.weight"].T,
            "bias": weights[f"mlp.{2 * i}.bias"],
        }
        for i in range(spec["nlayers"])
    }
    last = {
        "kernel": weights["last_layer.weight_v"].T,
        "scale": weights["last_layer.weight_g"][:, 0],
    }
    head = PrototypeHead(
        prototypes=spec["out_dim"],
        hidden_size=spec["hidden_dim"],
        bottleneck_size=spec["bottleneck_dim"],
        num_layers=spec["nlayers"],
        last_layer="weight_norm",
    )
    params = {**layers, "prototypes": last}
    with np.load(GOLDEN / "dino_head_io.npz") as io:

        def total(x):
            scores = head.apply({"params": params}, x)
            return jnp.square(scores).sum(), scores

        (_, scores), grad = jax.value_and_grad(total, has_aux=True)(jnp.asarray(io["x"]))
        np.testing.assert_allclose(scores, io["y"], atol=1e-5)
        np.testing.assert_allclose(grad, io["grad_x_of_sum_squares"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["unit", "weight_norm", "linear"])
def test_last_layer_is_normalised_or_not(kind):
    head = PrototypeHead(
        prototypes=6, hidden_size=5, bottleneck_size=4, num_layers=1, last_layer=kind
    )
    x = np.random.default_rng(0).normal(size=(3, 2, 7)).astype(np.float32)
    params = head.init(jax.random.key(0), x)["params"]
    assert ("scale" in params["prototypes"]) == (kind == "weight_norm")
    dense, kernel = (np.asarray(params[k]["kernel"], np.float64) for k in ("Dense_0", "prototypes"))
    z = x @ dense
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    if kind != "linear":
        kernel = kernel / np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(head.apply({"params": params}, x), z @ kernel, atol=1e-5)
