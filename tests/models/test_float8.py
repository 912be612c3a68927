# SPDX-License-Identifier: Apache-2.0
"""Rounding to float8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.float8 import BACKWARD, FORWARD, quantize


def round_to(x, bits):
    """Numbers with so many bits behind the leading one."""
    fraction, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.round(fraction * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 3e30])
@pytest.mark.parametrize(("dtype", "bits"), [(FORWARD, 3), (BACKWARD, 2)])
@pytest.mark.parametrize("of", ["float32", "bfloat16"])
def test_a_tensor_of_any_size_is_rounded_to_the_bits_of_the_format(of, dtype, bits, scale):
    x = scale * jax.random.uniform(jax.random.key(0), (100,), minval=0.01).astype(of)
    small = jax.jit(quantize, static_argnums=1)(x, dtype)
    assert small.values.dtype == dtype
    assert small.restore().dtype == of
    np.testing.assert_array_equal(
        np.asarray(small.restore(), np.float64), round_to(x.astype(jnp.float32), bits)
    )


def test_zeros_stay_and_what_is_not_finite_is_not_hidden():
    np.testing.assert_array_equal(quantize(jnp.zeros(3), FORWARD).restore(), np.zeros(3))
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        for dtype in (FORWARD, BACKWARD):
            small = quantize(jnp.array([1.0, bad]), dtype)
            assert not jnp.isfinite(small.restore()[1])
