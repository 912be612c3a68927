# SPDX-License-Identifier: Apache-2.0
"""What the pages for users of other projects say is what the code does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.docs.blocks import ROOT, knows
from vit_jax.checkpoint.pretrained.catalogue import find
from vit_jax.checkpoint.pretrained.timm_mixer import mixer_to_timm
from vit_jax.checkpoint.pretrained.timm_tensors import to_timm
from vit_jax.config.schema import RENAMED
from vit_jax.models.variants import make_mixer, make_vit
from vit_jax.utils.tree import flatten

CODE = re.compile(r"`([^`]+)`")


def rows(page: str) -> list[list[list[str]]]:
    """Of each row of a page's tables, what is code in each of its columns."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    cells = [line.replace("\\|", "¦").split("|")[1:-1] for line in lines if line.startswith("|")]
    return [[CODE.findall(cell) for cell in row] for row in cells]


def test_renamed_keys_stand_in_the_table():
    table = {
        name: row[1] for row in rows("from_vision_transformer.md") for name in row[0] if row[1]
    }
    for old, new in RENAMED.items():
        names = [n for n in table if n == old or n.startswith(f"{old}.")]
        # Of `inference_time.py` alone, whose number of steps is another thing than a run's.
        if old != "steps":
            assert any(new in table[name] for name in names), f"{old} is now {new}"


@pytest.mark.parametrize("page", ["big_vision", "timm", "vision_transformer"])
def test_each_key_has_at_most_one_row_of_the_same_names(page):
    table = [tuple(row[0]) for row in rows(f"from_{page}.md") if row[0]]
    assert len(table) == len(set(table))


def test_models_of_vision_transformer_exist_under_their_new_names():
    for theirs, ours, *_ in rows("from_vision_transformer.md"):
        if theirs and re.match(r"(R\d*\+)?ViT-", theirs[0]):
            assert len(theirs) == len(ours)
            for old, variant in zip(theirs, ours, strict=True):
                assert old.replace("ViT-", "").replace("_", "/") == variant
                make_vit(variant=variant, num_classes=0)
    make_mixer(variant="B/16", num_classes=10)


def test_checkpoints_of_big_vision_are_those_of_the_names():
    assert find("augreg:B/16").url_gs.endswith(
        "augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz"
    )
    assert find("augreg:B/32").url_gs.endswith(
        "augreg/B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0.npz"
    )
    assert find("big_vision:S/16-i1k-300ep").url_gs.endswith("vit_s16_i1k_300ep.npz")
    assert find("big_vision:deit3-B/16-i1k@384").url_gs.endswith("bv_deit_3_base_384_1k.npz")


def test_names_of_timm_are_those_of_what_is_written_for_it():
    model = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16, "patch_size": 4}
    params = init_params(make_vit(**model, num_classes=3, num_registers=1))
    tensors = to_timm(params, model={**model, "num_registers": 1}, grid=(2, 2))
    table = rows("from_timm.md")
    names = table[[row[0] for row in table].index(["patch_embed.proj"]) :]
    assert len(names) == 13
    check_names(names[:10], tensors, params)
    sizes = {"hidden_size": 8, "num_layers": 1, "tokens_mlp_dim": 4, "channels_mlp_dim": 16}
    params = init_params(make_mixer(**sizes, patch_size=4, num_classes=3))
    check_names(names[10:], mixer_to_timm(params), params)


def init_params(module):
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    )
    return {k: np.zeros(x.shape, np.float32) for k, x in flatten(shapes["params"]).items()}


def check_names(names, tensors, params):
    for theirs, ours in names:
        for name in theirs:
            assert any(t == name or t.startswith(f"{name}.") for t in tensors), name
        for path in (p for p in ours if not p.startswith("...")):
            assert any(p == path or p.startswith(f"{path}/") for p in params), path


def test_a_key_that_is_none_is_found():
    assert knows("optimizer.lr")
    assert not knows("optimizer.base_lr")
