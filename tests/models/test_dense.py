# SPDX-License-Identifier: Apache-2.0
"""Dense layers on tokens: parameters as Flax has them, and gradients of biases as products."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.dense import Dense, sum_by_product

BIAS = nn.initializers.normal(1.0)
XAVIER = nn.initializers.xavier_uniform()


@pytest.mark.parametrize(
    ("ours", "flax", "shape"),
    [
        (Dense((6,), bias_init=BIAS), nn.Dense(6, kernel_init=XAVIER, bias_init=BIAS), (2, 3, 4)),
        (
            Dense((2, 3), bias_init=BIAS),
            nn.DenseGeneral((2, 3), kernel_init=XAVIER, bias_init=BIAS),
            (2, 3, 4),
        ),
        (
            Dense((6,), num_inputs=2, bias_init=BIAS),
            nn.DenseGeneral(6, axis=(-2, -1), kernel_init=XAVIER, bias_init=BIAS),
            (2, 3, 4, 5),
        ),
        (
            Dense((6,), use_bias=False, dtype=jnp.bfloat16),
            nn.Dense(6, kernel_init=XAVIER, use_bias=False, dtype=jnp.bfloat16),
            (2, 4),
        ),
    ],
    ids=["vectors", "to heads", "from heads", "without bias"],
)
def test_parameters_and_results_are_those_of_flax(ours, flax, shape):
    x = jax.random.normal(jax.random.key(1), shape)
    (got, params), (expected, expected_params) = (
        layer.init_with_output(jax.random.key(0), x) for layer in (ours, flax)
    )
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(
        np.float32(got), np.float32(expected), rtol=1e-5 if ours.use_bias else 1e-2, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(5, 7), (3, 11, 4), (2, 3, 5, 8)])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_a_product_with_ones_sums_columns(shape, dtype, rtol):
    x = jax.random.uniform(jax.random.key(0), shape, dtype)
    got = jax.jit(sum_by_product)(x)
    assert got.dtype == dtype
    exact = np.asarray(x, np.float64).reshape(-1, shape[-1]).sum(0)
    np.testing.assert_allclose(np.float64(got), exact, rtol=rtol)


def count_products(platform):
    layer = Dense((6, 4))
    x = jnp.ones((2, 3, 8))
    params = layer.init(jax.random.key(0), x)
    grad = jax.jit(jax.grad(lambda params: jnp.sum(jnp.asarray(layer.apply(params, x)))))
    program = grad.trace(params).lower(lowering_platforms=(platform,)).as_text()
    return program.count("stablehlo.dot_general")


def test_only_tpus_sum_gradients_of_biases_by_a_product():
    # The gradients of the kernel and, on TPUs, of the bias; the sum needs no output.
    products = {platform: count_products(platform) for platform in ("cpu", "cuda", "tpu")}
    assert products["tpu"] == products["cpu"] + 1 == products["cuda"] + 1
