# SPDX-License-Identifier: Apache-2.0
"""Names of tensors are found below the wrappers of training code."""

import pytest

from vit_jax.checkpoint.pretrained.names import describe_family, unwrap

TIMM = ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight")
HUGGINGFACE = (
    "vit.embeddings.patch_embeddings.projection.weight",
    "vit.encoder.layer.0.output.dense.bias",
    "classifier.weight",
)


def values(names):
    return {name: i for i, name in enumerate(names)}


@pytest.mark.parametrize("names", [TIMM, HUGGINGFACE], ids=["timm", "huggingface"])
@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "visual.trunk."),
        *("module._orig_mod.", "_orig_mod.module.", "model.backbone.", "module.model.encoder."),
    ],
)
def test_wrappers_in_front_are_removed_with_a_note(prefix, names):
    tensors, notes = unwrap(values(prefix + name for name in names))
    assert tensors == values(names)
    (note,) = notes
    assert "wrappers removed" in note
    assert prefix in note


def test_wrappers_inside_of_a_model_are_removed():
    names = ["_orig_mod.patch_embed.proj.weight", "blocks.0._orig_mod.attn.qkv.weight"]
    names += ["blocks._checkpoint_wrapped_module.1._fsdp_wrapped_module.norm1.bias"]
    tensors, notes = unwrap(values(names))
    assert list(tensors) == [
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.1.norm1.bias",
    ]
    assert len(notes) == 1


@pytest.mark.parametrize("names", [TIMM, HUGGINGFACE, ("x", "y")])
def test_names_without_wrappers_stay(names):
    assert unwrap(values(names)) == (values(names), [])


def test_a_head_beside_the_wrapped_model_keeps_its_name():
    tensors, _ = unwrap({"backbone.patch_embed.proj.weight": 0, "head.weight": 1, "loss.bias": 2})
    assert tensors == {"patch_embed.proj.weight": 0, "head.weight": 1, "loss.bias": 2}


def test_one_of_several_models_is_named():
    names = [f"{who}.backbone.{name}" for who in ("student", "teacher") for name in TIMM]
    with pytest.raises(ValueError, match=r"student.backbone and teacher.backbone") as caught:
        unwrap(values(names))
    assert "FILE:teacher.backbone" in str(caught.value)
    for part in ("teacher", "teacher.backbone"):
        tensors, _ = unwrap(values(names), part=part)
        assert tensors == {name: names.index(f"teacher.backbone.{name}") for name in TIMM}
    with pytest.raises(ValueError, match=r"no tensor starts with ema\."):
        unwrap(values(names), part="ema")


def test_two_tensors_never_become_one():
    with pytest.raises(ValueError, match=r"both head.weight and model.head.weight would be"):
        unwrap({"model.patch_embed.proj.weight": 0, "head.weight": 1, "model.head.weight": 2})


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("layers.0.blocks.1.attn.relative_position_bias_table", "Swin"),
        ("swin.encoder.layers.0.blocks.0.layernorm_before.bias", "Swin"),
        ("blocks.0.attn.rel_pos.mlp.fc1.weight", "relative positions"),
        ("blocks.0.attn.rel_pos.relative_position_bias_table", "relative positions"),
        ("shared_rel_pos.mlp.fc1.weight", "relative positions"),
        ("encoder.layer.0.attention.attention.relative_position_bias.table", "BEiT"),
        ("rel_pos_bias.relative_position_bias_table", "BEiT"),
        ("blocks_token_only.0.attn.q.weight", "CaiT"),
        ("blocks.3.attn.rel_pos_h", "SAM"),
        ("embeddings.detection_tokens", "YOLOS"),
        ("layer1.0.conv1.weight", "convolutional"),
    ],
)
def test_other_models_are_called_by_their_names(name, family):
    assert family in (describe_family(["patch_embed.proj.weight", name]) or "")


@pytest.mark.parametrize("names", [TIMM, HUGGINGFACE, ("patch_embed.backbone.stages.0.x",)])
def test_models_of_this_package_are_no_others(names):
    assert describe_family(names) is None
