# SPDX-License-Identifier: Apache-2.0
"""Ranks of matches against values of big_vision and plain sorting."""

from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax.evaluators import ranks
from vit_jax.evaluators.ranks import rank_matches, recalls
from vit_jax.parallel.mesh import make_mesh

GOLDEN = np.load(Path(__file__).parent.parent / "testdata/contrastive/retrieval_io.npz")
ONE = make_mesh(devices=jax.devices()[:1])
ALL = make_mesh(data=2, fsdp=2, tensor=2)


def rank(*args, mesh=ONE):
    return rank_matches(*args, mesh=mesh, name="retrieval")


@pytest.mark.parametrize("mesh", [ONE, ALL], ids=["one", "all"])
def test_recalls_of_images_and_texts_are_those_of_big_vision(mesh, monkeypatch):
    monkeypatch.setattr(ranks, "_MAX_SIMILARITIES", 1000)  # So that there are several blocks.
    zimg, ztxt, ids = (GOLDEN[k] for k in ("zimg", "ztxt", "text_to_image_index"))
    images = np.arange(len(zimg), dtype=np.int32)
    found = {
        "img2txt": rank(zimg, ztxt, images, ids, mesh=mesh),
        "txt2img": rank(ztxt, zimg, ids, images, mesh=mesh),
    }
    for way, these in found.items():
        for k, value in recalls(these, (1, 5, 10)).items():
            assert value == pytest.approx(float(GOLDEN[f"{way}_Recall@{k}"]))


def test_ranks_are_positions_in_a_stable_sort():
    rng = np.random.default_rng(0)
    # Small integers, so that many products are equal.
    queries, gallery = (rng.integers(-1, 2, (n, 3)).astype(np.float32) for n in (11, 23))
    query_ids = np.arange(11, dtype=np.int32)
    gallery_ids = np.concatenate([query_ids, query_ids, query_ids[:1]]).astype(np.int32)
    got = rank(queries, gallery, query_ids, gallery_ids, mesh=ALL)
    order = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")
    for i, row in enumerate(order):
        assert got[i] == list(gallery_ids[row] == i).index(True)


def test_a_vector_that_is_no_number_is_never_the_best():
    queries = np.array([[1.0, 0.0], [np.nan, 0.0]], np.float32)
    ids = np.arange(2, dtype=np.int32)
    assert rank(queries, np.eye(2, dtype=np.float32), ids, ids).tolist() == [0, 1]
    assert rank(np.eye(2, dtype=np.float32), queries, ids, ids).tolist() == [1, 1]
