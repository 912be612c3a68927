# SPDX-License-Identifier: Apache-2.0
"""Trees of arrays as flat dicts from a path (`a/b/kernel`) to a leaf."""

from collections.abc import Callable
from typing import Any

import jax
from flax import traverse_util


def path_str(path: tuple[Any, ...]) -> str:
    """Returns a key path of JAX as `a/b/kernel`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of any pytree by path, in the order of the tree."""
    return {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def partition(tree: dict[str, Any], chosen: Callable[[str], bool]) -> tuple[Any, Any]:
    """Splits a nested dict into the leaves whose paths are chosen, and the rest."""
    parts: tuple[dict, dict] = ({}, {})
    for path, leaf in traverse_util.flatten_dict(tree).items():
        parts[0 if chosen("/".join(path)) else 1][path] = leaf
    first, second = map(traverse_util.unflatten_dict, parts)
    return first, second


def merge(first: Any, second: dict[str, Any]) -> Any:
    """Joins the two parts of `partition`."""
    if not second:
        return first
    flat = traverse_util.flatten_dict(first) | traverse_util.flatten_dict(second)
    return traverse_util.unflatten_dict(flat)


def count(tree: Any) -> int:
    """Returns the number of values in all leaves, which are arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
