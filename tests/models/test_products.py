# SPDX-License-Identifier: Apache-2.0
"""Products of operands in float8, with parameters and gradients in their own dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.float8 import BACKWARD, FORWARD, quantize
from vit_jax.models.products import dot_tokens_float8
from vit_jax.models.variants import make_mixer, make_vit

TINY = {"num_classes": 3, "patch_size": 4, "hidden_size": 16, "num_layers": 2}
VIT = TINY | {"num_heads": 4, "mlp_dim": 32, "representation_size": 8}
MIXER = TINY | {"tokens_mlp_dim": 8, "channels_mlp_dim": 32}


def test_gradients_are_those_of_the_rounded_operands():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 3, 4, 5))
    kernel = jax.random.normal(keys[1], (4, 5, 6))
    grad = jax.random.normal(keys[2], (2, 3, 6))
    dimensions = (((2, 3), (0, 1)), ((), ()))
    out, vjp = jax.vjp(lambda x, kernel: dot_tokens_float8(x, kernel, dimensions), x, kernel)
    x, kernel, small = (
        quantize(*args).restore() for args in ((x, FORWARD), (kernel, FORWARD), (grad, BACKWARD))
    )
    np.testing.assert_allclose(out, np.tensordot(x, kernel, 2), rtol=1e-5, atol=1e-5)
    got = vjp(grad)
    np.testing.assert_allclose(
        got[0], np.einsum("bto,hdo->bthd", small, kernel), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(got[1], np.einsum("bthd,bto->hdo", x, small), rtol=1e-5, atol=1e-5)


def eights(jaxpr):
    """How many products a program has whose operands both were float8."""
    made_of, found = {}, 0
    for eqn in jaxpr.eqns:
        inner = [v for v in eqn.params.values() if hasattr(v, "jaxpr") or hasattr(v, "eqns")]
        found += sum(eights(getattr(v, "jaxpr", v)) for v in inner)
        operands = [v for v in eqn.invars if not hasattr(v, "val")]
        if eqn.primitive.name == "dot_general":
            found += all(made_of.get(v, False) for v in operands)
        eight = eqn.primitive.name == "convert_element_type" and "float8" in str(
            operands[0].aval.dtype
        )
        kept = eqn.primitive.name == "mul" and any(made_of.get(v, False) for v in operands)
        made_of |= dict.fromkeys(eqn.outvars, eight or kept)
    return found


@pytest.mark.parametrize(
    ("options", "products"), [(VIT, 12), (VIT | {"classifier": "map"}, 18), (MIXER, 8)]
)
def test_attention_projections_and_mlps_multiply_in_float8_and_nothing_else(options, products):
    make = make_mixer if "tokens_mlp_dim" in options else make_vit
    images = jnp.zeros((2, 8, 8, 3))

    def trace(model):
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
        run = lambda p: model.apply(p, images, train=False)[0]  # noqa: E731
        return params, jax.make_jaxpr(run)(params).jaxpr

    params, program = trace(make(float8=True, dtype="bfloat16", **options))
    plain_params, plain = trace(make(dtype="bfloat16", **options))
    assert params == plain_params
    assert eights(program) == products
    assert eights(plain) == 0
