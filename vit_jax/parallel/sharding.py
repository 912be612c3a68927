# SPDX-License-Identifier: Apache-2.0
"""Where parameters and activations lie, decided by rules outside the model.

Tensor parallelism goes by a table of parameter paths; what it leaves is sharded over `fsdp` along
the largest dimension that divides. Optimizer state and EMA carry the parameters' paths at the end
of theirs, so one function shards the whole train state.
"""

import dataclasses
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from vit_jax.parallel.mesh import BATCH_AXES
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten, path_str

# Path of a parameter, and the dimension split over `tensor`, counted from the last because blocks
# may be stacked along a leading one. A second number is the dimension to take where the first does
# not divide: a head of 21,843 classes is then stored by rows, and its logits are still computed by
# classes.
_MLP = r"(MlpBlock_0|token_mixing|channel_mixing)"
TENSOR_RULES: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"MultiHeadDotProductAttention_0/(query|key|value)/kernel$", (-2,)),
    (r"MultiHeadDotProductAttention_0/(query|key|value)/bias$", (-2,)),
    (r"MultiHeadDotProductAttention_0/out/kernel$", (-3,)),
    (_MLP + r"/(Dense_0|gate)/kernel$", (-1,)),
    (_MLP + r"/(Dense_0|gate)/bias$", (-1,)),
    (_MLP + r"/Dense_1/kernel$", (-2,)),
    (r"(^|/)pre_logits/kernel$", (-1, -2)),
    (r"(^|/)(head|head_dist)/kernel$", (-1, -2)),
)
# Parameters of blocks that are stacked along their first dimension, which stays whole: each step of
# the scan over it takes one layer.
_STACKED = re.compile(r"(^|/)encoderblock/")

# Logical names that models give to the dimensions of activations; `tokens` is the strategy's.
ACTIVATION_AXES = {
    "batch": BATCH_AXES,
    "heads": "tensor",
    "mlp": "tensor",
    "classes": "tensor",
}

# Bytes from which a copy on every device is worth a word, where the mesh is there to avoid it.
LARGE_COPY = 4 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """What is sharded beside the parameters.

    Attributes:
      zero1: whether optimizer state is sharded over `data` too, though parameters are not
        (arXiv:1910.02054, stage 1): each device updates its part, and the parts are gathered.
      sequence_parallel: whether the tokens between the attention and MLP layers are split over
        `tensor` (arXiv:2205.05198, section 4.2.2), which saves memory where there are many.
    """

    zero1: bool = False
    sequence_parallel: bool = False


DEFAULT = Strategy()

# Below this many values a parameter is cheaper to copy than to gather.
MIN_FSDP_SIZE = 1024


def param_spec(
    path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, strategy: Strategy = DEFAULT
) -> PartitionSpec:
    """The `PartitionSpec` of one leaf of the train state.

    Args:
      path: within the state; that of optimizer state starts with `opt_state/`.
      shape: of the leaf.
      mesh: of the run.
      strategy: what is sharded beside the parameters.

    Raises:
      UserError: a dimension that tensor parallelism must split is not divisible.
    """
    spec: list[str | tuple[str, ...] | None] = [None] * len(shape)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    if tensor > 1:
        for pattern, dims in TENSOR_RULES:
            if re.search(pattern, path):
                dim = next((d for d in dims if shape[d] % tensor == 0), None)
                if dim is None:
                    raise UserError(
                        f"mesh.tensor={tensor} does not divide {shape[dims[0]]}, dimension "
                        f"{len(shape) + dims[0]} of {path}: choose a divisor"
                    )
                spec[dim] = "tensor"
                break
    if fsdp > 1 and _size(shape) >= MIN_FSDP_SIZE:
        first = 1 if _STACKED.search(path) else 0
        dims = range(first, len(shape))
        free = [d for d in dims if spec[d] is None and shape[d] % fsdp == 0]
        if free:
            spec[max(free, key=lambda d: shape[d])] = "fsdp"
    if strategy.zero1 and path.startswith("opt_state/") and _size(shape) >= MIN_FSDP_SIZE:
        _split_over_data(spec, shape, mesh)
    return PartitionSpec(*spec)


def _split_over_data(
    spec: list[str | tuple[str, ...] | None], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> None:
    data = mesh.shape["data"]
    if data == 1:
        return
    for taken, parts in ((None, data), ("fsdp", mesh.shape["fsdp"] * data)):
        dims = [d for d in range(len(shape)) if spec[d] == taken and shape[d] % parts == 0]
        if dims:
            dim = max(dims, key=lambda d: shape[d])
            spec[dim] = "data" if taken is None else (taken, "data")
            return


def infer_shardings(
    tree: Any, mesh: Mesh, strategy: Strategy = DEFAULT, *, params: Any = None
) -> Any:
    """A `NamedSharding` for each leaf of a tree of arrays or shapes.

    Args:
      tree: a train state, or parameters.
      mesh: to lie on.
      strategy: what is sharded beside the parameters.
      params: parameters (arrays or shapes) that the tree holds state of. State with the path of one
        but not its shape, such as the rows and columns of Adafactor, is small, and copied.
    """
    shapes = {} if params is None else {p: leaf.shape for p, leaf in flatten(params).items()}

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = path_str(path)
        parts = name.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        shape = next((shapes[end] for end in ends if end in shapes), leaf.shape)
        if leaf.shape != shape:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh, strategy))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def scatter_gradients(grads: Any, *, mesh: Mesh, strategy: Strategy) -> Any:
    """Places gradients as the optimizer state lies, so that each device updates its part alone."""
    return jax.tree_util.tree_map_with_path(
        lambda path, grad: jax.lax.with_sharding_constraint(
            grad,
            NamedSharding(
                mesh, param_spec(f"opt_state/{path_str(path)}", grad.shape, mesh, strategy)
            ),
        ),
        grads,
    )


def find_large_copies(tree: Any) -> dict[str, int]:
    """Bytes of the leaves, by path, that every device holds whole although it need not.

    Args:
      tree: of arrays or shapes with their shardings, such as the train state.
    """
    found = {}
    for path, leaf in flatten(tree).items():
        size = leaf.size * leaf.dtype.itemsize
        sharded = any(leaf.sharding.mesh.shape[axis] > 1 for axis in ("fsdp", "tensor"))
        if sharded and size >= LARGE_COPY and leaf.sharding.is_fully_replicated:
            found[path] = size
    return found


def constrain(
    x: jax.Array, names: tuple[str | None, ...], *, mesh: Mesh, sequence_parallel: bool = False
) -> jax.Array:
    """Places an activation whose dimensions have these logical names (see `ACTIVATION_AXES`).

    An unknown name is a `KeyError`: a constraint is never left out in silence.
    """
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} names {names} for the {x.ndim} dimensions of {x.shape}")
    axes = ACTIVATION_AXES | {"tokens": "tensor" if sequence_parallel else None}
    spec = PartitionSpec(*(None if n is None else axes[n] for n in names))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for dim in shape:
        size *= dim
    return size
