# SPDX-License-Identifier: Apache-2.0
"""Parameter trees as flat dicts from a path (`a/b/kernel`) to a leaf."""

from typing import Any

import jax


def path_str(path: tuple[Any, ...]) -> str:
    """A jax key path as `a/b/kernel`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of any pytree by path."""
    return {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def count(tree: Any) -> int:
    """Number of values in all leaves (arrays or shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
