# SPDX-License-Identifier: Apache-2.0
"""Rules for single parameters: what they match, and the factors that they give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.variants import make_vit
from vit_jax.optim.rules import ParamRules
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

BLOCK = "Transformer/encoderblock"


def shapes(**options):
    """Shapes of the parameters of a ViT of three blocks."""
    sizes = {"hidden_size": 8, "num_layers": 3, "num_heads": 2, "mlp_dim": 16, "patch_size": 2}
    model = make_vit(num_classes=5, **(sizes | options))
    image = jnp.zeros((1, 32, 32, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False)["params"])


@pytest.fixture(scope="module")
def params():
    return shapes(representation_size=4)


def test_expressions_are_for_whole_paths(params):
    rules = ParamRules(freeze=("embedding/.*", f"{BLOCK}_[01]/.*", "cls"))
    rules.check(params)
    trained, frozen = map(flatten, rules.split(params))
    assert {path.split("/")[0] for path in frozen} == {"embedding", "cls", "Transformer"}
    assert f"{BLOCK}_1/LayerNorm_0/scale" in frozen
    assert f"{BLOCK}_2/LayerNorm_0/scale" in trained
    assert trained.keys() | frozen.keys() == flatten(params).keys()
    assert not trained.keys() & frozen.keys()


def test_no_rules_change_nothing(params):
    assert ParamRules().split(params) == (params, {})
    assert ParamRules().lr_factors(params) == {}


def test_the_first_expression_that_matches_gives_the_factor(params):
    rules = ParamRules(lr_multipliers=(("head/bias", 3), (".*/bias", 2.0), ("head/.*", 10.0)))
    rules.check(params)
    factors = rules.lr_factors(params)
    assert factors["head/bias"] == 3
    assert factors["head/kernel"] == 10
    assert factors["embedding/bias"] == 2
    assert factors["embedding/kernel"] == 1
    assert factors.keys() == flatten(params).keys()


# The layer of a parameter counted from the last block on; 0 is what stands after it.
LAYERS_BACK = {
    "embedding/kernel": 4,
    "embedding/bias": 4,
    "cls": 4,
    "Transformer/posembed_input/pos_embedding": 4,
    f"{BLOCK}_0/MlpBlock_0/Dense_0/kernel": 3,
    f"{BLOCK}_1/LayerNorm_0/scale": 2,
    f"{BLOCK}_2/MultiHeadDotProductAttention_0/out/bias": 1,
    "Transformer/encoder_norm/scale": 0,
    "pre_logits/kernel": 0,
    "head/bias": 0,
}


@pytest.mark.parametrize("path", LAYERS_BACK)
def test_learning_rates_fall_with_each_layer_further_back(path, params):
    factors = ParamRules(layer_decay=0.75).lr_factors(params)
    assert factors[path] == pytest.approx(0.75 ** LAYERS_BACK[path])


def test_parts_that_only_some_models_have_are_placed_too():
    options = {"num_registers": 2, "classifier": "map", "norm_after_pooling": True}
    options |= {"qk_norm": True, "layer_scale_init": 0.1, "activation": "swiglu"}
    tree = shapes(resnet_layers=(1,), **options)
    factors = ParamRules(layer_decay=0.5).lr_factors(tree)
    for path, back in {
        "conv_root/kernel": 4,
        "gn_root/scale": 4,
        "block1/unit1/conv1/kernel": 4,
        "Transformer/registers": 4,
        "fc_norm/scale": 0,
        "MAPHead_0/probe": 0,
    }.items():
        assert factors[path] == 0.5**back, path
    assert factors.keys() == flatten(tree).keys()


def test_depth_does_not_depend_on_what_is_frozen(params):
    rules = ParamRules(freeze=(f"{BLOCK}_2/.*",), layer_decay=0.5)
    assert rules.lr_factors(params)["cls"] == 0.5**4


def test_scanned_blocks_have_a_factor_for_each_layer(params):
    stacked = shapes(representation_size=4, scan=True)
    rules = ParamRules(lr_multipliers=((".*/scale", 2.0),), layer_decay=0.75)
    loop, scan = rules.lr_factors(params), rules.lr_factors(stacked)
    assert scan["cls"] == loop["cls"]
    for name in ("LayerNorm_0/scale", "MultiHeadDotProductAttention_0/query/kernel"):
        factors = scan[f"{BLOCK}/{name}"]
        assert factors.shape == (3, *(1,) * (flatten(params)[f"{BLOCK}_0/{name}"].ndim))
        assert factors.dtype == np.float32
        want = [loop[f"{BLOCK}_{i}/{name}"] for i in range(3)]
        np.testing.assert_allclose(factors.ravel(), want, rtol=1e-6)


def test_layer_decay_multiplies_with_the_multipliers(params):
    rules = ParamRules(lr_multipliers=(("cls", 10.0), ("head/.*", 3.0)), layer_decay=0.5)
    factors = rules.lr_factors(params)
    assert factors["cls"] == 10 * 0.5**4
    assert factors["head/kernel"] == 3


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"freeze": ("hed/.*",)}, r"freeze: 'hed/\.\*' matches no parameter; .*head/bias"),
        ({"freeze": ("head",)}, "freeze: 'head' matches no parameter; .*head/bias, head/kernel"),
        ({"freeze": (".*",)}, r"freeze=\('\.\*',\) matches all \d+ parameters"),
        ({"lr_multipliers": (("bias", 2.0),)}, "lr_multipliers: 'bias' matches no parameter;"),
        (
            {"freeze": ("cls",), "lr_multipliers": (("cls", 2.0),)},
            "lr_multipliers: 'cls' matches no parameter that is trained",
        ),
    ],
)
def test_rules_that_do_not_fit_the_parameters_are_refused(rules, message, params):
    with pytest.raises(UserError, match=f"optimizer.{message}"):
        ParamRules(**rules).check(params)


def test_layer_decay_of_unknown_layers_is_refused():
    with pytest.raises(UserError, match=r"layer_decay=0\.5: the layer of neck/kernel is not known"):
        ParamRules(layer_decay=0.5).check({"neck": {"kernel": jnp.zeros(2)}})


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"freeze": ("head/(",)}, r"freeze: 'head/\(' is not a regular expression"),
        ({"lr_multipliers": (("[", 1.0),)}, r"lr_multipliers: '\[' is not a regular expression"),
        ({"lr_multipliers": (("cls", 0),)}, "lr_multipliers: 'cls' has factor 0; .*freeze"),
        ({"lr_multipliers": (("cls", -1.0),)}, r"lr_multipliers: 'cls' has factor -1\.0"),
        ({"lr_multipliers": (("cls", float("nan")),)}, "'cls' has factor nan"),
        ({"layer_decay": 0.0}, r"layer_decay=0\.0: expected 0 < value <= 1"),
        ({"layer_decay": 1.1}, r"layer_decay=1\.1: expected 0 < value <= 1"),
    ],
)
def test_values_out_of_range_are_refused(rules, message):
    with pytest.raises(UserError, match=message):
        ParamRules(**rules)
