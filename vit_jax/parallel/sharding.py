# SPDX-License-Identifier: Apache-2.0
"""Shards parameters and activations by rules outside the model.

A table of parameter paths defines tensor parallelism. The largest of the other dimensions that
divides is sharded over `fsdp`. Paths of optimizer state and EMA end in those of the parameters, so
one function shards the whole train state.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from vit_jax.parallel.mesh import BATCH_AXES
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten, path_str

# Path of a parameter, and the dimension that is split over `tensor`, counted from the last because
# blocks may be stacked along a leading one. The second number is the dimension to use if the first
# does not divide: a head of 21,843 classes is then stored by rows, and its logits are still split
# over classes; embeddings of a vocabulary of odd size are stored by columns.
_MLP = r"(MlpBlock_0|token_mixing|channel_mixing)"
TENSOR_RULES: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"MultiHeadDotProductAttention_0/(query|key|value)/(kernel|bias)$", (-2,)),
    (r"MultiHeadDotProductAttention_0/out/kernel$", (-3,)),
    (_MLP + r"/(Dense_0|gate)/(kernel|bias)$", (-1,)),
    (_MLP + r"/Dense_1/kernel$", (-2,)),
    (r"(^|/)pre_logits/kernel$", (-1, -2)),
    (r"(^|/)(head|head_dist)/kernel$", (-1, -2)),
    (r"(dino|ibot)_head/prototypes/kernel$", (-1, -2)),
    (r"(^|/)Embed_0/embedding$", (-2, -1)),
)
# Parameters of blocks that are stacked along their first dimension. It is not split, since each
# step of the scan over it takes one layer.
_STACKED = re.compile(r"(^|/)encoderblock/")

# Mesh axes of the logical names that models give to dimensions of activations. `Strategy` decides
# about `tokens`.
ACTIVATION_AXES = {
    "batch": BATCH_AXES,
    "heads": "tensor",
    "mlp": "tensor",
    "classes": "tensor",
    "vocabulary": "tensor",
}

# Bytes from which a copy on every device is reported, if the mesh has axes to avoid it.
LARGE_COPY = 4 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """What is sharded besides the parameters.

    Attributes:
      zero1: whether optimizer state is sharded over `data` too, though parameters are not
        (arXiv:1910.02054, stage 1): each device updates its part, and the parts are gathered.
      sequence_parallel: whether the tokens between the attention and MLP layers are split over
        `tensor` (arXiv:2205.05198, section 4.2.2), which saves memory if there are many.
    """

    zero1: bool = False
    sequence_parallel: bool = False


DEFAULT = Strategy()

# Parameters with fewer values are cheaper to copy than to gather.
MIN_FSDP_SIZE = 1024


def param_spec(
    path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, strategy: Strategy = DEFAULT
) -> PartitionSpec:
    """The `PartitionSpec` of one leaf of the train state.

    Args:
      path: within the state; that of optimizer state starts with `opt_state/`.
      shape: of the leaf.
      mesh: of the run.
      strategy: what is sharded besides the parameters.

    Raises:
      UserError: a dimension that tensor parallelism has to split is not divisible.
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
    if fsdp > 1 and math.prod(shape) >= MIN_FSDP_SIZE:
        first = 1 if _STACKED.search(path) else 0
        dims = range(first, len(shape))
        free = [d for d in dims if spec[d] is None and shape[d] % fsdp == 0]
        if free:
            spec[max(free, key=lambda d: shape[d])] = "fsdp"
    if strategy.zero1 and path.startswith("opt_state/") and math.prod(shape) >= MIN_FSDP_SIZE:
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
      mesh: of the run.
      strategy: what is sharded besides the parameters.
      params: parameters (arrays or shapes), if the tree has state of them. State with the path of
        a parameter but another shape, such as the rows and columns of Adafactor, is small, and
        copied to all devices.
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
    """Shards gradients like the optimizer state, so that each device updates its part alone."""
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
    """Bytes of the large leaves, by path, that are copied to every device of a mesh that shards.

    Args:
      tree: arrays or shapes with shardings, such as the train state.
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
    """Constrains the sharding of an activation.

    Args:
      x: array of any shape and dtype.
      names: logical name of each dimension (see `ACTIVATION_AXES`); None is not sharded.
      mesh: of the run.
      sequence_parallel: whether `tokens` are split over `tensor`.

    Returns:
      The array, of the same shape and dtype.

    Raises:
      KeyError: a name is unknown.
      ValueError: there is not one name for each dimension.
    """
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} names {names} for the {x.ndim} dimensions of {x.shape}")
    axes = ACTIVATION_AXES | {"tokens": "tensor" if sequence_parallel else None}
    spec = PartitionSpec(*(None if n is None else axes[n] for n in names))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


@dataclasses.dataclass(frozen=True)
class Placement:
    """`constrain` on a mesh, as models take it.

    Attributes:
      mesh: of the run.
      sequence_parallel: whether `tokens` are split over `tensor`.
    """

    mesh: Mesh
    sequence_parallel: bool = False

    def __call__(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        """Returns `x`, of any shape and dtype, sharded as the names of its dimensions say."""
        return constrain(x, names, mesh=self.mesh, sequence_parallel=self.sequence_parallel)

    def map_shards(
        self,
        function: Callable[..., jax.Array],
        arrays: Sequence[jax.Array],
        names: Sequence[tuple[str | None, ...]],
    ) -> jax.Array:
        """Runs a function on each device with its part of arrays; the parts of results are joined.

        A dimension that the mesh does not divide, such as a batch of one image from which a model
        is initialised, is whole on each device.

        Args:
          function: takes the arrays, and returns one of the shape of the first.
          arrays: of any shapes and dtypes.
          names: of the dimensions of each.
        """
        specs = tuple(
            PartitionSpec(*map(self._divide, array.shape, of_array))
            for array, of_array in zip(arrays, names, strict=True)
        )
        mapped = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=specs,
            out_specs=specs[0],
            check_vma=False,  # kernels do not say over which axes their results vary
        )
        return mapped(*arrays)

    def _divide(self, size: int, name: str | None) -> str | tuple[str, ...] | None:
        """The axes that split a dimension; None if they do not divide it."""
        axes = None if name is None else ACTIVATION_AXES[name]
        return None if size % math.prod(self.mesh.shape[a] for a in _as_tuple(axes)) else axes
