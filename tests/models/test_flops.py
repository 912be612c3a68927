# SPDX-License-Identifier: Apache-2.0
"""Operations of models, against published numbers and the closed form."""

import jax
import jax.numpy as jnp
import pytest

from vit_jax.models.flops import count_flops, forward_flops, train_flops
from vit_jax.models.variants import SIZES, make_mixer, make_two_towers, make_vit

# Multiply-adds of a forward pass at 224 pixels, in billions, as timm publishes them; it counts
# biases and norms too, less than 0.3 %.
SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "mlp_dim": 64}
PUBLISHED = {"S/16": 4.61, "B/16": 17.58, "L/16": 61.60, "H/14": 167.4, "G/14": 483.95}


@pytest.mark.parametrize("variant", ["Ti/16", "S/16", "B/16", "L/16", "H/14", "g/14", "G/14"])
def test_forward_pass_is_as_published_and_the_closed_form(variant):
    size, _, patch = variant.partition("/")
    width, layers, mlp, _ = SIZES[size]
    patches = (224 // int(patch)) ** 2
    n = patches + 1
    block = n * (8 * width**2 + 4 * width * mlp) + 4 * n**2 * width
    expected = layers * block + 2 * patches * 3 * int(patch) ** 2 * width + 2 * width * 1000
    model = make_vit(variant=variant, num_classes=1000, scan=True)
    found = forward_flops(model, (224, 224))
    assert found == expected
    if variant in PUBLISHED:
        assert found / 2e9 == pytest.approx(PUBLISHED[variant], rel=3e-3)


def test_training_takes_three_forward_passes():
    model = make_vit(patch_size=8, num_classes=10, **SMALL)
    assert train_flops(model, (16, 16)) == 3 * forward_flops(model, (16, 16))


def test_scan_and_remat_do_not_change_the_model():
    def count(**options):
        model = make_vit(patch_size=8, num_classes=10, **SMALL, **options)
        return forward_flops(model, (32, 32))

    assert count() == count(scan=True) == count(scan=True, remat="full")


def test_dropped_patches_cost_nothing():
    full = make_vit(variant="Ti/16", num_classes=10, scan=True)
    half = full.clone(patch_dropout_rate=0.5)
    assert forward_flops(half, (224, 224)) < 0.55 * forward_flops(full, (224, 224))


def test_both_towers_are_counted():
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 32}
    image = {"patch_size": 4, "classifier": "map"} | sizes
    text = {"vocab_size": 9, "context_length": 5} | sizes
    images = forward_flops(make_vit(num_classes=0, **image), (8, 8))
    # Projections, MLP, scores and outputs of 2 layers, and the head of one vector.
    layer = 2 * 5 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 5 * 5 * 16
    texts = 2 * layer + 2 * 16 * 16
    assert forward_flops(make_two_towers(image=image, text=text), (8, 8)) == images + texts


def test_mixer_is_counted():
    sizes = {"hidden_size": 8, "num_layers": 2, "tokens_mlp_dim": 6, "channels_mlp_dim": 16}
    model = make_mixer(patch_size=4, num_classes=10, **sizes)
    tokens, width = 9, 8
    block = 2 * (width * 2 * tokens * 6 + tokens * 2 * width * 16)
    expected = 2 * tokens * 48 * width + 2 * block + 2 * width * 10
    assert forward_flops(model, (12, 12)) == expected


def test_full_remat_computes_each_block_a_second_time():
    def step_flops(remat):
        model = make_vit(patch_size=8, num_classes=10, **SMALL, scan=True, remat=remat)
        image, rngs = jnp.zeros((1, 32, 32, 3)), {"dropout": jax.random.key(0)}
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
        grad = jax.grad(lambda p: model.apply(p, image, train=True, rngs=rngs)[0].sum())
        return count_flops(jax.make_jaxpr(grad)(params))

    # All products of the blocks but the last of each: its result is not needed again.
    tokens, width, mlp, layers = 17, 32, 64, 2
    again = layers * (8 * tokens * width**2 + 2 * tokens * width * mlp + 4 * tokens**2 * width)
    assert step_flops("full") - step_flops("none") == again


def test_zeros_between_the_inputs_of_a_convolution_do_not_count():
    def conv(x, w, stride):
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME")

    x, w = jnp.zeros((1, 4, 8, 8)), jnp.zeros((6, 4, 3, 3))
    forward = count_flops(jax.make_jaxpr(lambda x: conv(x, w, 2))(x))
    assert forward == 2 * 6 * 4 * 4 * (4 * 9)
    both = count_flops(jax.make_jaxpr(jax.grad(lambda x: conv(x, w, 2).sum()))(x))
    assert both == 2 * forward


def test_of_branches_the_dearest_counts_and_a_scan_counts_each_round():
    x = jnp.zeros((4, 4))

    def f(x):
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x)
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0]

    assert count_flops(jax.make_jaxpr(f)(x)) == 6 * 2 * 4**3


def test_of_branches_for_platforms_the_cheapest_counts():
    def compute(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x @ x @ x, default=lambda x: x @ x)

    assert count_flops(jax.make_jaxpr(compute)(jnp.ones((4, 4)))) == 2 * 4**3
