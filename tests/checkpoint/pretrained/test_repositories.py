# SPDX-License-Identifier: Apache-2.0
"""The list of models of the Hugging Face hub is complete, and names find their rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from tools.hub_catalogue import _ACTIVATIONS, choose_examples, find_family, make_rows
from vit_jax.checkpoint.pretrained.catalogue import count_repositories, list_models
from vit_jax.checkpoint.pretrained.hub import _open_hub
from vit_jax.checkpoint.pretrained.load import check_source
from vit_jax.checkpoint.pretrained.naflex import read_naflex
from vit_jax.checkpoint.pretrained.names import TIMM_MIXER_PATCHES, TIMM_NAFLEX_PATCHES
from vit_jax.checkpoint.pretrained.rebuild import rebuild_model
from vit_jax.checkpoint.pretrained.repositories import (
    REPOSITORIES,
    load_repositories,
    suggest_repositories,
    write_repositories,
)
from vit_jax.checkpoint.pretrained.timm import read_timm
from vit_jax.checkpoint.pretrained.timm_mixer import read_timm_mixer
from vit_jax.models.block_config import BlockConfig
from vit_jax.utils.errors import UserError

ROWS = load_repositories()
EXAMPLES = {
    model["name"]: model
    for model in map(json.loads, (Path(__file__).parents[2] / "testdata/hub_registry.jsonl").open())
}
# Families that only repositories of transformers have here.
NOT_IN_TIMM = {"I-JEPA"}


def test_every_row_is_complete():
    for row in ROWS.values():
        kind, _, rest = row.name.partition(":")
        assert (kind, rest.count("/")) in {("timm", 0), ("hf", 1)}, row
        assert kind == "hf" or "." in rest, row  # The tag of the weights.
        assert row.licence, row
        assert row.family == find_family(row.name), row
        assert all(64 <= side <= 1024 for side in row.image_size), row
        assert 0 < row.million_params < 8000, row
        assert 0 <= row.num_classes <= 22_000, row
        assert (row.top1 is None) == (row.top1_image_size is None), row
        assert row.top1 is None or (35 < row.top1 < 91 and row.num_classes == 1000), row
    assert sum(row.top1 is not None for row in ROWS.values()) > 150


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_model_of_each_family_is_read(name):
    example, row = EXAMPLES[name], ROWS[name]
    tensors = {n: np.ones(shape, np.uint8) for n, shape in example["shapes"].items()}
    if TIMM_MIXER_PATCHES in tensors:
        weights = read_timm_mixer(tensors, example["config"])
    else:
        read = read_naflex if TIMM_NAFLEX_PATCHES in tensors else read_timm
        weights = read(tensors, example["config"], None)
    model = rebuild_model(weights)
    assert getattr(model, "num_heads", None) == example["num_heads"]
    epsilon = getattr(model, "norm_epsilon", BlockConfig.norm_epsilon)
    assert epsilon == example["norm_epsilon"]
    assert _ACTIVATIONS[model.activation] == example["activation"]
    assert model.num_classes == row.num_classes
    assert model.num_layers == 2
    assert weights.preprocess.get("image_size", row.image_size) == row.image_size


def test_each_family_has_an_example():
    families = {ROWS[name].family for name in EXAMPLES} | NOT_IN_TIMM
    assert families == set(count_repositories())


def test_a_row_is_made_of_the_registry_and_the_results():
    name = min(EXAMPLES, key=lambda name: EXAMPLES[name]["num_params"])
    example = EXAMPLES[name]
    results = {name.removeprefix("timm:"): {"top1": "61.5", "img_size": "160"}}
    other = {k: v for k, v in example.items() if k not in ("shapes", "config")}
    other |= {"name": f"{name}_tuned", "repository": "someone/else"}
    wrong = example | {"name": f"{name}_wrong", "key": "wrong", "num_heads": 7}
    rows, refused = make_rows([example, other, wrong], results)
    (row,) = rows
    assert row.million_params == round(example["num_params"] / 1e6, 1)
    assert (row.top1, row.top1_image_size, row.licence) == (61.5, 160, example["licence"])
    assert "someone/else" in refused[f"{name}_tuned"]
    assert "num_heads is 7" in refused[f"{name}_wrong"]
    assert choose_examples([example, other], rows) == [example]


def test_a_written_list_is_read_back(tmp_path):
    rows = list(ROWS.values())[:5]
    write_repositories(rows, tmp_path / "x.csv")
    assert list(load_repositories(tmp_path / "x.csv").values()) == rows
    header, *lines = (tmp_path / "x.csv").read_text().splitlines()
    for content, words in [
        ("\n".join(["name", *lines]), "has the columns"),
        ("\n".join([header, lines[0], lines[0]]), "line 3: a second"),
        ("\n".join([header, lines[0].replace("224x224", "224")]), "line 2"),
    ]:
        path = tmp_path / f"{len(words)}.csv"
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            load_repositories(path)
    assert len(REPOSITORIES.read_bytes()) < 100_000


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("timm:vit_base_patch16_clip_224.opnai", "timm:vit_base_patch16_clip_224.openai"),
        ("vit_base_patch16_224.mae", "timm:vit_base_patch16_224.mae"),
        ("timm/vit_base_patch16_224.mae", "timm:vit_base_patch16_224.mae"),
        ("TIMM:ViT_base_patch16_224.mae", "timm:vit_base_patch16_224.mae"),
        ("timm:eva02_large_patch14_448", "timm:eva02_large_patch14_448.mim_m38m_ft_in22k_in1k"),
        ("facebook/dinov2-base", "hf:facebook/dinov2-base"),
        ("dinov2-base", "hf:facebook/dinov2-base"),
        ("hf:facebook/dinov2-bas", "hf:facebook/dinov2-base"),
    ],
)
def test_near_names_are_suggested(name, first):
    assert suggest_repositories(name)[0] == first


@pytest.mark.parametrize(
    "name", ["timm:vit_base_patch16_224.mae", "timm:resnet50.a1_in1k", "runs/digits", "x.npz"]
)
def test_nothing_is_suggested_for_a_known_or_a_foreign_name(name):
    assert suggest_repositories(name) == []


def test_errors_name_the_repository_that_is_meant():
    for source in ("vit_base_patch16_224.mae", "timm/vit_base_patch16_224.mae"):
        with pytest.raises(UserError, match=r"did you mean 'timm:vit_base_patch16_224\.mae'"):
            check_source(source)
    with pytest.raises(UserError, match="did you mean 'hf:facebook/dinov2-base'"):
        _open_hub("hf:dinov2-base")


def test_models_are_listed_by_words_of_name_family_and_licence():
    assert set(list_models("dinov2 registers base")) == {
        "hf:facebook/dinov2-with-registers-base",
    }
    found = list_models("clip 336 apache")
    assert "timm:vit_large_patch14_clip_336.openai" in found
    assert all("336 px" in line and "apache" in line for line in found.values())
    line = list_models("mim_m38m_ft_in22k_in1k large")
    assert list(line.values()) == ["448 px, EVA-02, 305.1 M, mit, ImageNet top-1 90.056 %"]
    assert set(list_models()) > {"augreg:B/16", "hf:facebook/dinov2-base"}
