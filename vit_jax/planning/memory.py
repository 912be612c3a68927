# SPDX-License-Identifier: Apache-2.0
"""An estimate of the memory that a step needs on each device, without compiling it.

State and batch are exact. Activations are what differentiation saves for the backward pass in the
traced program, each array once: the compiler computes again what operations on each element make
from arrays that are saved. It merges others, and pads some.
"""

import dataclasses
import math
from collections.abc import Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from vit_jax.parallel.mesh import count_batch_shards
from vit_jax.planning.compiled import device_bytes
from vit_jax.training.experiment import Experiment
from vit_jax.utils.tree import merge


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device: state and batch, gradients, and activations for the backward pass.

    `constants` are those of the objective, such as the parameters of a teacher.
    """

    params: int
    opt_state: int
    ema_params: int
    constants: int
    batch: int
    gradients: int
    activations: int

    @property
    def arguments(self) -> int:
        """State, constants and batch: the arguments of the step."""
        return self.params + self.opt_state + self.ema_params + self.constants + self.batch


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes saved for one image: the part that tensor parallelism splits, and the rest."""

    split: float
    whole: float


def estimate_memory(experiment: Experiment, activations: Activations | None = None) -> Memory:
    """Estimates the memory of a training step.

    Args:
      experiment: on its mesh.
      activations: of an experiment with the same model, if they are known; None counts them.
    """
    state = experiment.abstract_state
    trained, _ = experiment.optimizer.rules.split(state.params)
    accum_steps = experiment.optimizer.accum_steps
    saved = activations or count_activations(experiment)
    mesh = experiment.mesh.shape
    images = (
        experiment.train_data.rows_per_batch / accum_steps / count_batch_shards(experiment.mesh)
    )
    return Memory(
        params=_sum(state.params),
        opt_state=_sum(state.opt_state) + _sum(state.step),
        ema_params=_sum(state.ema_params),
        constants=_sum(experiment.abstract_constants),
        batch=_sum(experiment.abstract_batch),
        # The gradients of a micro-batch and, with several, their sum.
        gradients=_sum(trained) * (2 if accum_steps > 1 else 1),
        activations=round(images * (saved.whole + saved.split / mesh["tensor"])),
    )


def count_activations(experiment: Experiment) -> Activations:
    """Counts what the forward pass saves for the backward pass, for each image."""
    saved = _count_saved(experiment, experiment.objective)
    model: Any = experiment.model
    objective: Any = experiment.objective
    found = saved
    for part, tower in getattr(model, "towers", {"": model}).items():
        if getattr(tower, "remat", "none") == "none" or not hasattr(tower, "num_layers"):
            continue
        # The activations of one block at a time exist again while it is recomputed.
        kept = tower.clone(remat="none")
        kept = _count_saved(
            experiment,
            dataclasses.replace(objective, model=model.clone(**{part: kept}) if part else kept),
        )
        if part:  # What the other tower saves does not count.
            kept = Activations(kept.split - saved.split, kept.whole - saved.whole)
        layers = tower.num_layers
        found = Activations(found.split + kept.split / layers, found.whole + kept.whole / layers)
    return found


def _sum(tree: Any) -> int:
    return sum(device_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _count_saved(experiment: Experiment, objective: Any) -> Activations:
    rng = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.eval_shape(objective.augment, experiment.abstract_batch, rng)
    size = experiment.train_data.rows_per_batch // experiment.optimizer.accum_steps
    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), batch)
    state = experiment.abstract_state
    trained, frozen = experiment.optimizer.rules.split(state.params)

    def backward(trained: Any, frozen: Any, average: Any, given: Any, batch: Any, rng: Any) -> Any:
        given = {**given, **objective.step_inputs(jnp.zeros((), jnp.int32), average)}

        def loss(params: Any) -> jax.Array:
            return objective.loss({**merge(params, frozen), **given}, batch, rng)[0]

        return jax.vjp(loss, trained)[1]

    model = experiment.model
    keys = ("num_heads", "mlp_dim", "tokens_mlp_dim", "channels_mlp_dim", "num_classes")
    widths = {getattr(model, key, None) for key in keys}
    split = whole = 0.0
    given = (state.ema_params, experiment.abstract_constants)
    program = jax.make_jaxpr(backward)(trained, frozen, *given, micro, rng).jaxpr
    for shape, bytes_ in find_saved(program):
        # Arrays without a batch dimension are parameters, which are arguments of the step.
        if size in shape:
            if widths & set(shape):
                split += bytes_ / size
            else:
                whole += bytes_ / size
    return Activations(split, whole)


# Operations on each element, and changes of layout, which the compiler adds to those that use them.
_FUSED = {
    *("abs", "add", "add_any", "and", "broadcast_in_dim", "clamp", "convert_element_type", "copy"),
    *("div", "eq", "expand_dims", "ge", "gt", "integer_pow", "le", "lt", "max", "min", "mul"),
    *("name", "ne", "neg", "not", "or", "reshape", "rsqrt", "select_n", "sharding_constraint"),
    *("sign", "sqrt", "square", "squeeze", "stop_gradient", "sub", "transpose"),
}
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}


@dataclasses.dataclass(frozen=True, eq=False)
class _Array:
    """What an operation computes.

    `inputs` are arrays from which the compiler can make it where it is used; none if it is in
    memory.
    """

    shape: tuple[int, ...]
    bytes: int
    inputs: tuple["_Array", ...] = ()


def find_saved(program: Jaxpr) -> list[tuple[tuple[int, ...], int]]:
    """Shapes and bytes of the arrays in memory from which the results of a program can be made.

    Arguments do not count. A result is kept itself if it is smaller than what it is made from.
    """
    given = [_Array((), 0) for _ in (*program.constvars, *program.invars)]
    kept: dict[_Array, None] = {}
    for result in _trace(program, given):
        missing = _find_missing(result, kept)
        smaller = sum(array.bytes for array in missing) <= result.bytes
        kept |= dict.fromkeys(missing if smaller else [result])
    return [(array.shape, array.bytes) for array in kept if array.bytes]


def _find_missing(array: _Array, kept: Container[_Array]) -> list[_Array]:
    """The arrays in memory that are needed, beside those that are kept, to make an array."""
    seen, missing, stack = set(), [], [array]
    while stack:
        one = stack.pop()
        if one in seen or one in kept:
            continue
        seen.add(one)
        if one.inputs:
            stack += one.inputs
        else:
            missing.append(one)
    return missing


def _new(aval: Any) -> _Array:
    shape = tuple(getattr(aval, "shape", ()))
    # Keys of random numbers have no size.
    return _Array(shape, math.prod(shape) * getattr(getattr(aval, "dtype", None), "itemsize", 0))


def _trace(program: Jaxpr, given: Sequence[_Array]) -> list[_Array]:
    """The results of a program of these arguments."""
    arrays = dict(zip((*program.constvars, *program.invars), given, strict=True))

    def read(variable: Any) -> _Array:
        return _Array((), 0) if isinstance(variable, Literal) else arrays[variable]

    for eqn in program.eqns:
        name, arguments = eqn.primitive.name, [read(v) for v in eqn.invars]
        results = [_new(v.aval) for v in eqn.outvars]
        if name in _FUSED:
            results = [dataclasses.replace(x, inputs=tuple(arguments)) for x in results]
        elif name == "scan":
            results = _trace_scan(eqn, arguments, results)
        elif name in _CALLS:
            inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
            inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
            constants = [_Array((), 0) for _ in inner.constvars]
            results = _trace(inner, [*constants, *arguments])
        arrays |= zip(eqn.outvars, results, strict=True)
    return [read(v) for v in program.outvars]


def _trace_scan(eqn: Any, given: Sequence[_Array], results: Sequence[_Array]) -> list[_Array]:
    """The results of a loop, in which an array of its body that is returned twice is one."""
    body, fixed, carried = (eqn.params[key] for key in ("jaxpr", "num_consts", "num_carry"))
    constants = [_Array((), 0) for _ in body.jaxpr.constvars]
    inner = [_new(v.aval) for v in body.jaxpr.invars[fixed:]]
    found = _trace(body.jaxpr, [*constants, *given[:fixed], *inner])
    first: dict[_Array, _Array] = {}
    stacks = zip(found[carried:], results[carried:], strict=True)
    return [*results[:carried], *(first.setdefault(one, stack) for one, stack in stacks)]
