# SPDX-License-Identifier: Apache-2.0
"""Spellings of the names of models."""

import pytest

from vit_jax.models.names import SIZES, guess_variant, normalize_variant
from vit_jax.models.variants import HYBRIDS, make_mixer, make_vit


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        *((text, "B/16") for text in ("B/16", "B_16", "b16", "ViT-B/16", "B-16", "vit_b_16")),
        *((text, "B/16") for text in ("vit_base_patch16", "ViT-B-16", "vit-base-patch16")),
        *((text, "R50+B/16") for text in ("R50+B/16", "r50_b16", "R50_B_16")),
        *((text, "R+Ti/16") for text in ("R_Ti_16", "r_ti16")),
        *((text, "g/14") for text in ("g/14", "g14", "ViT-g/14", "vit_giant_patch14")),
        *((text, "G/14") for text in ("G/14", "G14", "ViT-G/14", "vit_gigantic_14")),
        *((text, "So400m/14") for text in ("so400m14", "SO400M/14")),
        ("tiny", "Ti"),
        ("S/32-gap-norep", "S/32-gap-norep"),
        ("B/7", "B/7"),
        ("resnet50", "resnet50"),
        ("", ""),
    ],
)
def test_spellings_of_a_variant(text, variant):
    assert normalize_variant(text) == variant


def test_every_variant_is_its_own_name():
    for name in [*SIZES, *(f"{size}/14" for size in SIZES), *HYBRIDS]:
        assert normalize_variant(name) == name


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        ("vit_base_patch16_224", "B/16"),
        ("google/vit-base-patch16-224-in21k", "B/16"),
        ("vit_small_r26_s32_224", "R26+S/32"),
        ("B_16@384", "B/16"),
        ("resnet50", None),
        ("runs/lab16", None),
    ],
)
def test_the_variant_in_a_longer_name(text, variant):
    assert guess_variant(text) == variant


def test_models_are_made_by_any_spelling():
    assert make_vit(variant="vit-ti_4", num_classes=2) == make_vit(variant="Ti/4", num_classes=2)
    assert make_mixer(variant="s8", num_classes=2) == make_mixer(variant="S/8", num_classes=2)
