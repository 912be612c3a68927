# SPDX-License-Identifier: Apache-2.0
"""Trees by path."""

from vit_jax.utils.tree import merge, partition

TREE = {"a": {"x": 1, "y": {"z": 2}}, "b": {"x": 3}}


def test_the_parts_keep_their_paths_and_no_empty_folders():
    first, second = partition(TREE, lambda path: path.startswith("a/"))
    assert first == {"a": {"x": 1, "y": {"z": 2}}}
    assert second == {"b": {"x": 3}}


def test_the_parts_make_the_whole_again():
    for chosen in (lambda path: path.endswith("x"), lambda _: True, lambda _: False):
        assert merge(*partition(TREE, chosen)) == TREE
