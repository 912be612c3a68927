# SPDX-License-Identifier: Apache-2.0
"""A file fits a model up to the head and the resolution; all else is refused by name."""

import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from vit_jax.checkpoint.pretrained.adapt import adapt_params, check_arguments, compare_models
from vit_jax.checkpoint.pretrained.embedding import change_channels, resize_patches
from vit_jax.checkpoint.pretrained.weights import REGISTERS, Weights, stack_blocks
from vit_jax.models.positions import resize_posemb, sincos_2d
from vit_jax.models.variants import make_vit
from vit_jax.utils.errors import UserError

POSEMB = "Transformer/posembed_input/pos_embedding"
HEAD_AND_PRE_LOGITS = ("head/kernel", "head/bias", "pre_logits/kernel", "pre_logits/bias")


def make_params(seed, *, classes=10, tokens=17, width=6, pre_logits=None, layers=2, cls=True):
    """Random parameters with paths like a ViT's, flat."""
    shapes = {POSEMB: (1, tokens, width), "embedding/kernel": (2, 2, 3, width)}
    if cls:
        shapes["cls"] = (1, 1, width)
    for i in range(layers):
        shapes[f"Transformer/encoderblock_{i}/LayerNorm_0/scale"] = (width,)
        shapes[f"Transformer/encoderblock_{i}/LayerNorm_0/bias"] = (width,)
    if pre_logits:
        shapes |= {"pre_logits/kernel": (width, pre_logits), "pre_logits/bias": (pre_logits,)}
    if classes:
        shapes |= {"head/kernel": (pre_logits or width, classes), "head/bias": (classes,)}
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def adapt(source, target, *, grid=(4, 4), prefix=1, source_size=None, origin=None, **options):
    weights = Weights(
        params=source,
        layout="test",
        model={"patch_size": (2, 2)},
        preprocess={"image_size": source_size} if source_size else {},
        **(origin or {}),
    )
    params, notes = adapt_params(
        weights,
        traverse_util.unflatten_dict(target, sep="/"),
        target_grid=grid,
        num_class_tokens=prefix,
        **options,
    )
    params = traverse_util.flatten_dict(params, sep="/")
    assert {path: x.shape for path, x in params.items()} == {
        path: x.shape for path, x in target.items()
    }
    assert all(note and "\n" not in note for note in notes)
    return params, notes


def refusal(source, target, **kwargs):
    with pytest.raises(UserError) as caught:
        adapt(source, target, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert "init_from" in message
    return message


def assert_taken_from(origin, params, paths):
    for path in paths:
        np.testing.assert_array_equal(params[path], origin[path], err_msg=path)


def body(flat):
    """The paths that no rule but "same path and shape" speaks of."""
    return [path for path in flat if path not in (POSEMB, *HEAD_AND_PRE_LOGITS)]


def test_same_model_is_loaded_whole():
    source, target = make_params(0, pre_logits=8), make_params(1, pre_logits=8)
    params, notes = adapt(source, target)
    assert_taken_from(source, params, target)
    assert notes == ["pre_logits: kept, width 8", "head: kept, 10 classes"]


def test_result_has_the_type_of_the_model():
    source = make_params(0)
    target = {path: x.astype(ml_dtypes.bfloat16) for path, x in make_params(1).items()}
    params, _ = adapt(source, target)
    assert all(x.dtype == ml_dtypes.bfloat16 for x in params.values())
    np.testing.assert_array_equal(params["cls"], source["cls"].astype(ml_dtypes.bfloat16))


def test_head_of_other_classes_starts_anew():
    source, target = make_params(0, classes=10), make_params(1, classes=5)
    params, notes = adapt(source, target)
    assert_taken_from(target, params, ["head/kernel", "head/bias"])
    assert_taken_from(source, params, [POSEMB, *body(target)])
    assert notes == ["head: 10 classes in the file, 5 here: re-initialised"]


def test_head_of_another_width_starts_anew_with_its_bias():
    source, target = make_params(0, pre_logits=8), make_params(1)
    params, notes = adapt(source, target)
    assert_taken_from(target, params, ["head/kernel", "head/bias"])
    assert "head: kernel (8, 10) in the file, (6, 10) here: re-initialised" in notes


def test_file_without_a_head():
    source, target = make_params(0, classes=None), make_params(1)
    params, notes = adapt(source, target)
    assert_taken_from(target, params, ["head/kernel", "head/bias"])
    assert notes == ["head: none in the file: initialised"]


def test_model_without_a_head():
    source, target = make_params(0), make_params(1, classes=None)
    params, notes = adapt(source, target)
    assert "head/kernel" not in params
    assert notes == ["head: none here: dropped"]


def test_zero_head_is_kept_and_noted():
    source, target = make_params(0), make_params(1)
    source["head/kernel"] = np.zeros_like(source["head/kernel"])
    params, notes = adapt(source, target)
    assert_taken_from(source, params, ["head/kernel", "head/bias"])
    assert notes == ["head: the kernel in the file is all zero: it was published untrained"]


def test_pre_logits_of_the_file_are_dropped():
    source, target = make_params(0, pre_logits=8), make_params(1, classes=5)
    params, notes = adapt(source, target)
    assert "pre_logits/kernel" not in params
    assert_taken_from(source, params, [POSEMB, *body(target)])
    assert "pre_logits: none here: dropped" in notes


def test_pre_logits_of_the_model_start_anew():
    source, target = make_params(0), make_params(1, pre_logits=8)
    params, notes = adapt(source, target)
    assert_taken_from(target, params, ["pre_logits/kernel", "pre_logits/bias"])
    assert_taken_from(source, params, [POSEMB, *body(target)])
    assert "pre_logits: none in the file: initialised" in notes


def test_pre_logits_of_another_width_are_refused():
    message = refusal(make_params(0, pre_logits=8), make_params(1, pre_logits=9))
    assert "pre_logits/kernel is (6, 8) in the file, (6, 9) in the model" in message


def test_head_that_followed_pre_logits_starts_anew_without_them():
    source, target = make_params(0, pre_logits=6), make_params(1)
    params, notes = adapt(source, target)
    assert_taken_from(target, params, ["head/kernel", "head/bias"])
    note = "head: in the file it follows another pre_logits than here: re-initialised"
    assert note in notes


@pytest.mark.parametrize(("prefix", "cls"), [(1, True), (0, False)])
@pytest.mark.parametrize("grid", [(8, 8), (3, 3), (2, 5)])
def test_position_embeddings_are_resized(prefix, cls, grid):
    source = make_params(0, tokens=prefix + 16, cls=cls)
    target = make_params(1, tokens=prefix + grid[0] * grid[1], cls=cls)
    params, notes = adapt(source, target, grid=grid, prefix=prefix)
    expected = resize_posemb(
        source[POSEMB], source_grid=(4, 4), target_grid=grid, num_prefix_tokens=prefix
    )
    np.testing.assert_array_equal(params[POSEMB], expected)
    assert_taken_from(source, params, ["head/kernel", "head/bias", *body(target)])
    assert notes == [
        f"position embeddings: resized from 4x4 to {grid[0]}x{grid[1]}, bilinear",
        "head: kept, 10 classes",
    ]


@pytest.mark.parametrize("tokens", [1, 18])
def test_position_embeddings_of_no_square_grid_are_refused(tokens):
    message = refusal(make_params(0, tokens=tokens), make_params(1))
    assert f"{tokens} position embeddings in the file, less 1" in message
    assert "square" in message


def test_class_token_of_the_file_only_points_to_the_classifier():
    message = refusal(make_params(0), make_params(1, tokens=16, cls=False), prefix=0)
    assert "model.classifier" in message


def test_missing_parameters_are_listed():
    message = refusal(make_params(0, layers=1), make_params(1, layers=2))
    assert "Transformer/encoderblock_1/LayerNorm_0/scale (6,) is not in the file" in message
    assert "more" not in message


def test_extra_parameters_are_listed():
    message = refusal(make_params(0) | {"gn_root/scale": np.zeros(6)}, make_params(1))
    assert "gn_root/scale (6,) is not in the model" in message


def test_misshapen_parameters_are_listed_with_both_shapes():
    source, target = make_params(0), make_params(1)
    source["embedding/kernel"] = np.zeros((2, 2, 3, 7), np.float32)
    message = refusal(source, target)
    assert "embedding/kernel is (2, 2, 3, 7) in the file, (2, 2, 3, 6) in the model" in message


def test_position_embeddings_of_another_width_are_listed_not_resized():
    message = refusal(make_params(0, tokens=17, width=7), make_params(1, tokens=65), grid=(8, 8))
    assert f"{POSEMB} is (1, 17, 7) in the file, (1, 65, 6) in the model" in message


def test_a_long_list_is_cut_short():
    message = refusal(make_params(0, layers=1), make_params(1, layers=12))
    assert message.count("is not in the file") == 4
    assert "and 18 more" in message


def test_rectangular_position_embeddings_are_resized_where_their_grid_is_known():
    source = make_params(0, tokens=1 + 8)
    target = make_params(1, tokens=1 + 15)
    params, notes = adapt(source, target, grid=(3, 5), source_size=(4, 8))
    expected = resize_posemb(
        source[POSEMB], source_grid=(2, 4), target_grid=(3, 5), num_prefix_tokens=1
    )
    np.testing.assert_array_equal(params[POSEMB], expected)
    assert "position embeddings: resized from 2x4 to 3x5, bilinear" in notes


def test_as_many_positions_on_another_grid_are_resized_too():
    source, target = make_params(0), make_params(1)
    params, notes = adapt(source, target, grid=(2, 8))
    assert "position embeddings: resized from 4x4 to 2x8, bilinear" in notes
    assert np.abs(params[POSEMB] - source[POSEMB]).max() > 0.1


def test_positions_of_an_unknown_rectangle_are_kept_for_as_many():
    source, target = make_params(0, tokens=1 + 8), make_params(1, tokens=1 + 8)
    params, notes = adapt(source, target, grid=(2, 4))
    assert_taken_from(source, params, [POSEMB])
    assert "position embeddings: nothing states their grid; 2x4, as here, is assumed" in notes


def test_the_rule_of_the_file_is_taken_where_none_is_asked_for():
    source, target = make_params(0), make_params(1, tokens=1 + 64)
    origin = {"posemb_resize": "bicubic_no_antialias"}
    _, notes = adapt(source, target, grid=(8, 8), origin=origin)
    assert "position embeddings: resized from 4x4 to 8x8, bicubic_no_antialias" in notes
    _, notes = adapt(source, target, grid=(8, 8), origin=origin, posemb_resize="bilinear")
    assert "position embeddings: resized from 4x4 to 8x8, bilinear" in notes


def test_the_grid_of_the_file_is_taken_before_the_size_of_its_images():
    source, target = make_params(0, tokens=1 + 24), make_params(1, tokens=1 + 24)
    origin = {"posemb_grid": (4, 6)}
    _, notes = adapt(source, target, grid=(3, 8), source_size=(16, 6), origin=origin)
    assert "position embeddings: resized from 4x6 to 3x8, bilinear" in notes


def test_a_class_token_that_is_left_out_takes_its_position_along():
    # As many positions as the model has: a class token and 4x6 patches, against 5x5 patches.
    source, target = make_params(0, tokens=25), make_params(1, tokens=25, cls=False)
    options = {"dont_load": ("cls",), "origin": {"posemb_grid": (4, 6)}}
    params, notes = adapt(source, target, grid=(5, 5), prefix=0, **options)
    assert "cls: its position embedding is dropped too" in notes
    assert "position embeddings: resized from 4x6 to 5x5, bilinear" in notes
    np.testing.assert_array_equal(params[POSEMB][:, 0], source[POSEMB][:, 1])

    source, target = make_params(0, tokens=25, cls=False), make_params(1, tokens=25)
    params, notes = adapt(source, target, grid=(4, 6), dont_load=("cls",))
    assert "cls: its position embedding is initialised too" in notes
    np.testing.assert_array_equal(params[POSEMB][:, 0], target[POSEMB][:, 0])
    np.testing.assert_array_equal(params[POSEMB][:, 1], source[POSEMB][:, 0])


@pytest.mark.parametrize("cls", [True, False])
def test_as_many_positions_of_other_tokens_are_refused(cls):
    source, target = make_params(0, tokens=25, cls=cls), make_params(1, tokens=25, cls=not cls)
    message = refusal(source, target, grid=(5, 5) if cls else (4, 6), prefix=1 - cls)
    words = "a class token, and the model none" if cls else "no class token, and the model a class"
    assert words in message
    assert "set model.classifier as in the file" in message


def test_bicubic_on_request():
    source, target = make_params(0), make_params(1, tokens=1 + 64)
    params, notes = adapt(source, target, grid=(8, 8), posemb_resize="bicubic")
    expected = resize_posemb(
        source[POSEMB],
        source_grid=(4, 4),
        target_grid=(8, 8),
        num_prefix_tokens=1,
        method="bicubic",
    )
    np.testing.assert_array_equal(params[POSEMB], expected)
    assert "position embeddings: resized from 4x4 to 8x8, bicubic" in notes


def test_patches_of_another_size_are_resized():
    source, target = make_params(0), make_params(1)
    target["embedding/kernel"] = np.zeros((4, 3, 3, 6), np.float32)
    params, notes = adapt(source, target)
    expected = resize_patches(source["embedding/kernel"], (4, 3))
    np.testing.assert_array_equal(params["embedding/kernel"], expected)
    note = "embedding/kernel: patches resized from 2x2 to 4x3 pixels (pseudo-inverse)"
    assert note in notes


@pytest.mark.parametrize(("channels", "how"), [(1, "summed"), (5, "repeated and scaled")])
@pytest.mark.parametrize("path", ["embedding/kernel", "conv_root/kernel"])
def test_other_input_channels(path, channels, how):
    source, target = make_params(0), make_params(1)
    if path == "conv_root/kernel":
        source[path], target[path] = np.ones((7, 7, 3, 6)), np.zeros((7, 7, channels, 6))
    else:
        target[path] = np.zeros((2, 2, channels, 6), np.float32)
    params, notes = adapt(source, target)
    np.testing.assert_array_equal(params[path], change_channels(source[path], channels))
    assert f"{path}: 3 input channels in the file, {channels} here: {how}" in notes


def test_dont_load_leaves_parameters_as_initialised_and_drops_what_is_too_much():
    source = make_params(0) | {"extra/bias": np.ones(2)}
    target = make_params(1) | {"new/scale": np.ones(3, np.float32)}
    params, notes = adapt(source, target, dont_load=("cls", "extra/.*", "new/.*"))
    assert_taken_from(target, params, ["cls", "new/scale"])
    assert_taken_from(source, params, [POSEMB, "embedding/kernel"])
    assert notes[:3] == [
        "cls: not loaded: initialised",
        "extra/bias: not loaded: dropped",
        "new/scale: not loaded: initialised",
    ]


def test_head_can_be_left_out():
    source, target = make_params(0), make_params(1)
    params, notes = adapt(source, target, dont_load=("head/.*",))
    assert_taken_from(target, params, ["head/kernel", "head/bias"])
    assert notes == ["head/kernel: not loaded: initialised", "head/bias: not loaded: initialised"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("heed/.*", "'heed/.*' matches the whole path of no parameter"), ("(", "not a regular expre")],
)
def test_dont_load_that_names_nothing_is_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        adapt(make_params(0), make_params(1), dont_load=(pattern,))


def test_a_scanned_model_takes_the_blocks_of_a_loop():
    source, target = make_params(0), stack_blocks(make_params(1))
    params, _ = adapt(source, target)
    stacked = params["Transformer/encoderblock/LayerNorm_0/scale"]
    for i in range(2):
        expected = source[f"Transformer/encoderblock_{i}/LayerNorm_0/scale"]
        np.testing.assert_array_equal(stacked[i], expected)


def test_models_from_outside_are_compared_by_the_arguments_that_both_have():
    theirs = {"name": "my:Net", "sizes": [1, 2], "slope": 0.1, "num_classes": 3, "old": 1}
    ours = {"name": "my:Net", "sizes": (1, 2), "slope": 0.2, "num_classes": 5, "new": 1}
    slope = "model.slope: 0.1 in the file, 0.2 here"
    assert compare_models(theirs, ours) == [slope]
    name = "model.name: 'my:Net' in the file, 'vit' here"
    assert compare_models(theirs, ours | {"name": "vit"}) == [name, slope]
    assert compare_models(theirs | {"name": "vit"}, ours | {"name": "mixer"}) == []
    assert compare_models({}, ours) == []


def test_weights_of_a_model_that_computes_something_else_are_refused():
    model = make_vit(variant="Ti/16", num_classes=2)
    theirs = {"activation": "gelu_erf", "norm_epsilon": 1e-12, "num_heads": 3, "hidden_size": 5}
    with pytest.raises(UserError) as caught:
        check_arguments(Weights(params={}, layout="timm safetensors", model=theirs), model)
    message = str(caught.value)
    assert "activation='gelu_erf' (here 'gelu_tanh')" in message
    assert "--config.model.activation=gelu_erf --config.model.norm_epsilon=1e-12" in message
    assert "num_heads" not in message
    same = make_vit(variant="Ti/16", num_classes=2, activation="gelu_erf", norm_epsilon=1e-12)
    check_arguments(Weights(params={}, layout="timm safetensors", model=theirs), same)


def test_tokens_that_no_head_here_reads_become_registers():
    source = make_params(0) | make_registers(1, count=2)
    source |= {"dist": np.full((1, 1, 6), 3, np.float32)}
    source[POSEMB] = np.concatenate([source[POSEMB][:, :1], source[POSEMB]], axis=1)
    source |= {"head_dist/kernel": np.ones((6, 10)), "head_dist/bias": np.ones(10)}
    target = make_params(2) | make_registers(3, count=3)
    params, notes = adapt(source, target)
    np.testing.assert_array_equal(params["cls"], source["cls"])
    first = source["dist"] + source[POSEMB][:, 1:2]
    want = np.concatenate([first, source[REGISTERS]], axis=1)
    np.testing.assert_array_equal(params[REGISTERS], want)
    np.testing.assert_array_equal(params[POSEMB], np.delete(source[POSEMB], 1, axis=1))
    assert "dist: a register here, with its position embedding added" in notes

    del target["cls"]
    target[POSEMB], target[REGISTERS] = target[POSEMB][:, 1:], np.zeros((1, 4, 6), np.float32)
    params, _ = adapt(source, target, prefix=0)
    np.testing.assert_array_equal(params[REGISTERS][:, :1], source["cls"] + source[POSEMB][:, :1])
    np.testing.assert_array_equal(params[POSEMB], source[POSEMB][:, 2:])


def make_registers(seed, *, count):
    shape = (1, count, 6)
    return {REGISTERS: np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


def test_a_distillation_token_that_only_the_model_has_starts_anew():
    source, target = make_params(0), make_params(1)
    posemb = np.random.default_rng(2).normal(size=(1, 18, 6)).astype(np.float32)
    target |= {POSEMB: posemb, "dist": np.full((1, 1, 6), 3, np.float32)}
    target |= {"head_dist/kernel": np.ones((6, 10)), "head_dist/bias": np.ones(10)}
    params, notes = adapt(source, target, prefix=2)
    assert_taken_from(target, params, ["dist", "head_dist/kernel"])
    np.testing.assert_array_equal(params[POSEMB][:, 1], posemb[:, 1])
    np.testing.assert_array_equal(np.delete(params[POSEMB], 1, axis=1), source[POSEMB])
    assert "head_dist: none in the file: initialised" in notes


def test_learned_positions_start_from_fixed_ones():
    source, target = make_params(0, width=8), make_params(1, width=8)
    del source[POSEMB]
    weights = Weights(params=source, layout="test", model={"position_embedding": "sincos2d_mae"})
    params, notes = adapt_params(
        weights,
        traverse_util.unflatten_dict(target, sep="/"),
        target_grid=(4, 4),
        num_class_tokens=1,
    )
    posemb = params["Transformer"]["posembed_input"]["pos_embedding"]
    np.testing.assert_array_equal(posemb[:, :1], 0)
    np.testing.assert_array_equal(posemb[:, 1:], sincos_2d((4, 4), 8, endpoint=False))
    assert any("learned here, from sincos2d_mae on" in note for note in notes)
    check_arguments(weights, make_vit(num_classes=3, variant="Ti/16"))
    with pytest.raises(UserError, match="position_embedding"):
        check_arguments(
            weights, make_vit(num_classes=3, variant="Ti/16", position_embedding="none")
        )
