# SPDX-License-Identifier: Apache-2.0
"""The experiment: the parts of a run with its state, its jitted functions and its batches."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vit_jax.checkpoint.pretrained.adapt import (
    adapt_params,
    check_arguments,
    compare_models,
    compare_preprocess,
    find_initialised,
    fit_objective_params,
    make_blanks,
)
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.weights import Loss, Weights
from vit_jax.checkpoint.state import TrainState
from vit_jax.config.build import Parts, build_parts
from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.pipeline import DatasetSpec, find_shapes, train_batches
from vit_jax.data.preprocess import without_random
from vit_jax.models.interface import Model, find_position_grid
from vit_jax.models.lora import KERNEL_SCALE
from vit_jax.models.lora import NAME as LORA
from vit_jax.models.two_towers import TOWERS, TwoTowers
from vit_jax.objectives.base import Objective, Params
from vit_jax.observe.console import log
from vit_jax.parallel.mesh import batch_sharding, process_shards, shard_batch
from vit_jax.parallel.sharding import constrain, infer_shardings, scatter_gradients
from vit_jax.runtime.compiler_options import compiler_options
from vit_jax.training import step as step_lib
from vit_jax.training.feature_cache import FeatureCache
from vit_jax.utils.errors import UserError, name_key
from vit_jax.utils.registry import is_part
from vit_jax.utils.tree import flatten, merge, partition

# Fields of a model that are Flax's, or that do not change what it computes.
_NO_PART_OF_A_MODEL = (
    "parent",
    "name",
    "constrain",
    "scan",
    "remat",
    "attention",
    "blocks",
    "float8",
    "lora",
    "any_size",
)


def _list_arguments(model: Model) -> dict[str, Any]:
    """Returns what a model of this package computes, by the arguments of its constructor."""
    if isinstance(model, TwoTowers):
        towers = {TOWERS[part]: _list_arguments(tower) for part, tower in model.towers.items()}
        own = {"width": model.img.num_classes or None, "dtype": model.img.dtype}
        own |= {"scale_init": model.scale_init, "bias_init": model.bias_init, "num_classes": 0}
        for tower in towers.values():
            for name in ("num_classes", "dtype"):  # These are arguments of the whole.
                del tower[name]
        return own | towers
    return _without_run({f.name: getattr(model, f.name) for f in dataclasses.fields(model)})


def _without_run(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if k not in _NO_PART_OF_A_MODEL}


def _with_shardings(tree: Any, shardings: Any) -> Any:
    """The shapes and dtypes of arrays, with where they are placed."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


@dataclasses.dataclass(frozen=True)
class Experiment(Parts):
    """The parts of a run, and what they make together: state, step and batches."""

    @classmethod
    def from_config(
        cls,
        config: ConfigDict | Mapping[str, Any],
        *,
        devices: Sequence[Any] | None = None,
        epoch_examples: int | None = None,
        match_classes: bool = True,
    ) -> "Experiment":
        """Builds the experiment that a config describes; see `config.build.build_parts`."""
        parts = build_parts(
            config,
            devices=devices,
            epoch_examples=epoch_examples,
            match_classes=match_classes,
        )
        return cls(**vars(parts))

    @functools.cached_property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a global batch."""
        sharding, size = batch_sharding(self.mesh), self.train_data.rows_per_batch
        return {
            k: jax.ShapeDtypeStruct((size, *v.shape), v.dtype, sharding=sharding)
            for k, v in self._step_data.blank().items()
        }

    @functools.cached_property
    def feature_cache(self) -> FeatureCache | None:
        """The stored features that batches have in place of images; None for images."""
        cached = self.objective.cached_features
        if cached is None:
            return None
        computed = {k: self.description["preprocess"][k] for k in ("mean", "std", "image_size")}
        return FeatureCache(
            cached,
            self.objective,
            self.mesh,
            self.train_data,
            self.train_data.batch_size // self.optimizer.accum_steps,
            {"model": self.description["model"], "precision": self.settings.precision} | computed,
        )

    @property
    def _step_data(self) -> DatasetSpec:
        """What the batches of `train_batches` are made of."""
        return self.train_data if self.feature_cache is None else self.feature_cache.spec

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the train state."""
        shapes = jax.eval_shape(self._initialize)
        self.settings.lora.check(list(flatten(shapes.params)))
        shardings = infer_shardings(shapes, self.mesh, self.strategy, params=shapes.params)
        return _with_shardings(shapes, shardings)

    @functools.cached_property
    def abstract_constants(self) -> dict[str, Any]:
        """Shapes, dtypes and shardings of `objective.constants`."""
        constants = self.objective.constants()
        return _with_shardings(constants, infer_shardings(constants, self.mesh))

    def check(self) -> None:
        """Checks that the config can be trained.

        Raises:
          UserError: a rule for single parameters matches none of them, or adapters have no weights
            to be added to.
        """
        params = self.abstract_state.params
        if (cached := self.objective.cached_features) is not None:
            trained = [
                path
                for path in flatten(self.optimizer.rules.split(params)[0])
                if path.startswith(f"{cached.part}/")
            ]
            if trained:
                raise UserError(
                    f"objective.feature_cache={cached.folder!r}: {trained[0]} is trained, and the "
                    f"features would change: expected optimizer.freeze=('{cached.part}/.*',), or "
                    "no feature_cache"
                )
        if (rank := self.settings.lora.rank) and self.settings.init_from is None:
            raise UserError(
                f"lora.rank={rank} without init_from: all but the adapters and the head would "
                "stay as they are initialised; expected weights to start from, such as "
                "--config.init_from=augreg:B/16"
            )

    @functools.cached_property
    def _initialize(self) -> Any:
        """`_make_state`, which JAX traces once for shapes and values, as long as this exists."""
        return jax.jit(self._make_state)

    def _make_state(self, params: Any = None) -> TrainState:
        state = self._make_float_state(params)
        stored = self.settings.lora.store(state.params)
        average = self.settings.lora.store(state.ema_params)
        return dataclasses.replace(state, params=stored, ema_params=average)

    def _make_float_state(self, params: Any = None) -> TrainState:
        batch = {k: jnp.zeros((1, *v.shape[1:]), v.dtype) for k, v in self.abstract_batch.items()}
        return step_lib.init_state(
            step_lib.init_rng(self.settings.seed),
            batch,
            objective=self.objective,
            tx=self.optimizer.tx,
            ema=self.keeps_average,
            params=params,
        )

    def load_weights(self) -> Weights | None:
        """Reads the weights of `init_from`; None without it.

        Raises:
          UserError: they can't be read.
        """
        if self.settings.init_from is None:
            return None
        try:
            return load_pretrained(self.settings.init_from)
        except UserError as e:
            raise name_key("init_from", self.settings.init_from, e) from e

    def read_init_from(self) -> tuple[Weights, list[str]] | None:
        """Reads the weights of `init_from`, and adapts zeros to this model, which compiles nothing.

        Returns:
          The weights, and the notes of `fit_params`; None without `init_from`.

        Raises:
          UserError: they can't be read, or don't fit.
        """
        weights = self.load_weights()
        if weights is None:
            return None
        zeros = jax.tree.map(
            lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), self.abstract_state.params
        )
        return weights, self.fit_params(weights, zeros)[1]

    def init_state(
        self, weights: Weights | None = None, loaded: Params | None = None
    ) -> TrainState:
        """Returns the state before the first step, each array created on the devices that hold it.

        With `init_from` the parameters are adapted to this model; what was adapted is logged.

        Args:
          weights: those of `init_from`, if they have been read.
          loaded: those of `Objective.load_params`, if they have been read.
        """
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        initialize = jax.jit(self._initialize.__wrapped__, out_shardings=shardings)
        weights = weights or self.load_weights()
        parts: Params = self.objective.load_params() if loaded is None else loaded
        if weights is None and not parts:
            return initialize()
        params = self.initial_params()
        if weights is not None:
            params, notes = self.fit_params(weights, params)
            log(f"parameters from {self.settings.init_from} ({weights.layout})")
            for note in [*notes, *self._compare_classes(weights, notes)]:
                log(f"  {note}")
        # On the host, so that devices never hold the base as float32.
        return initialize(self.settings.lora.store(params, xp=np) | parts)

    def find_initialised(self, weights: Weights) -> list[str]:
        """Returns the paths of frozen parameters that the weights of `init_from` do not fill.

        With them are the scales of those that are stored as int8.
        """
        params = self.abstract_state.params
        found = set(find_initialised(self.fit_params(weights, make_blanks(params))[0]))
        # Adapters are in no weights; frozen ones add nothing.
        found = {path for path in found if f"/{LORA}/" not in path}
        scale = f"/{LORA}/{KERNEL_SCALE}"
        _, frozen = self.optimizer.rules.split(params)
        return [path for path in flatten(frozen) if path.replace(scale, "/kernel") in found]

    def keep(self, params: Params, initialised: Collection[str] = ()) -> Params:
        """Returns the part of a tree of parameters that checkpoints hold.

        With adapters these are the trained parameters and those of `find_initialised`; `complete`
        adds the others.
        """
        if not self.settings.lora.rank:
            return params
        trained, frozen = self.optimizer.rules.split(params)
        return merge(trained, partition(frozen, lambda path: path in initialised)[0])

    def complete(self, state: TrainState, weights: Weights) -> TrainState:
        """Adds the parameters that checkpoints do not hold to a state that was read from one.

        Args:
          state: with parameters as `keep` returns them. Those that the weights do not fill either
            are initialised from the seed.
          weights: those of `init_from`.
        """
        params, _ = self.fit_params(weights, self.initial_params())
        params = self.settings.lora.store(params, xp=np)
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state.params)
        held = flatten(state.params)
        frozen, where = (
            partition(tree, lambda path: path not in held)[0] for tree in (params, shardings)
        )

        # Two copies with an average, since buffers of a donated state must not alias.
        place = jax.jit(lambda x: x, out_shardings=where)
        ema = None if state.ema_params is None else merge(state.ema_params, place(frozen))
        return dataclasses.replace(state, params=merge(state.params, place(frozen)), ema_params=ema)

    def _compare_classes(self, weights: Weights, notes: Sequence[str]) -> list[str]:
        theirs, ours = weights.class_names, self.train_data.info.class_names
        if theirs is None or ours is None or not any(n.startswith("head: kept") for n in notes):
            return []
        pairs = enumerate(zip(theirs, ours, strict=False))
        return [
            f"head: class {label} was {a!r} and is {b!r}; adapt.dont_load=('head/.*',) starts a "
            "new head"
            for label, (a, b) in pairs
            if a != b
        ][:1]

    def initial_params(self) -> Params:
        """Randomly initialised parameters, float32, in the memory of the host.

        The device holds the kernels of a rounded base as they are stored, and so are their values.
        """
        lora = self.settings.lora
        return lora.restore(
            jax.device_get(jax.jit(lambda: lora.store(self._make_float_state().params))())
        )

    def fit_params(self, weights: Weights, initial: Params) -> tuple[Params, list[str]]:
        """Adapts the parameters of a checkpoint to this model.

        Args:
          weights: of the checkpoint.
          initial: provides the parameters that are re-initialised.

        Returns:
          The parameters, and a line for each adaptation and each difference in preprocessing
          and between models from outside of the package.

        Raises:
          UserError: they don't fit.
        """
        check_arguments(weights, self.model)
        own = {name: initial[name] for name in self.objective.objective_params}
        adapters, others = partition(initial, lambda path: f"/{LORA}/" in path)
        params, notes = adapt_params(
            weights,
            {name: x for name, x in others.items() if name not in own},
            target_grid=find_position_grid(self.model, self.train_data.image_shape()[:2]),
            num_class_tokens=getattr(self.model, "num_class_tokens", 0),
            **self.settings.adapt,
        )
        own, more = fit_objective_params(weights, own)
        notes = [*weights.notes, *notes, *more]
        notes += compare_models(weights.model, self.description["model"])
        notes += compare_preprocess(weights.preprocess, self.description["preprocess"])
        return merge(params | own, adapters), notes

    def place_params(self, params: Params) -> Params:
        """Moves parameters from the memory of the host to the devices that hold them."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state.params)
        return jax.jit(lambda x: x, out_shardings=shardings)(params)

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """The description that each checkpoint holds, as JSON: see the attributes of `Weights`."""
        settings, name = self.settings, self.settings.model["name"]
        # A constructor outside of this package may take other arguments than its module has.
        model = _without_run(settings.model) if is_part(name) else _list_arguments(self.model)
        outside = is_part(name) or is_part(settings.objective["name"])
        loss = settings.objective.get("loss")  # An objective from outside may have others.
        return {
            "model": {"name": name} | model,
            **({"objective_params": self.objective.objective_params} if outside else {}),
            "preprocess": {
                "mean": settings.objective.get("pixel_mean", 0.5),
                "std": settings.objective.get("pixel_std", 0.5),
                "image_size": self.train_data.image_shape()[:2],
                "eval": self._find_evaluation_line(),
            },
            "class_names": self.train_data.info.class_names,
            "loss": loss if loss in get_args(Loss) else None,
            **self._describe_tokenizer(),
            **({"lora": dataclasses.asdict(settings.lora)} if settings.lora.rank else {}),
        }

    def _find_evaluation_line(self) -> str | None:
        """The preprocessing line of images that are not trained on; None if no line is known."""
        if self.evaluators:
            return self.evaluators[0].data.preprocess
        data, key = self.train_data, f"{self.train_data.key}.preprocess"
        line = without_random(data.preprocess, key=key)
        shape, with_maps = data.info.image_shape, data.info.unlabelled is not None
        try:
            ours, theirs = (
                find_shapes(text, shape, key=key, with_maps=with_maps)
                for text in (line, data.preprocess)
            )
        except UserError:
            return None
        return line if ours == theirs else None

    def _describe_tokenizer(self) -> dict[str, Any]:
        tokenizer = self.train_data.find_tokenizer()
        if tokenizer is None:
            return {}
        return {"tokenizer": {"line": self.train_data.tokenizer, "sha256": tokenizer.sha256}}

    @functools.cached_property
    def train_step(self) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """The jitted `training.step.train_step` of this experiment; donates the state."""
        return self._make_step(self.objective)

    def train_step_at(self, step: int) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """The function that makes update number `step`, from 1: `train_step`, or a variant of it.

        Variants are those of `Objective.at_step`; each is compiled when it is first called.
        """
        objective = self.objective.at_step(seed=self.settings.seed, step=step)
        if objective is self.objective:
            return self.train_step
        if objective not in self._variants:
            self._variants[objective] = self._make_step(objective)
        return self._variants[objective]

    @functools.cached_property
    def _variants(self) -> dict[Objective, Callable[..., Any]]:
        return {}

    def _make_step(self, objective: Objective) -> Callable[..., Any]:
        """The jitted step of an objective, with its constants on the devices."""
        step = self._jit_step(objective)
        if not self.abstract_constants:
            return step
        constants = self._constants
        return lambda state, batch: step(state, batch, constants)

    @functools.cached_property
    def _constants(self) -> dict[str, Any]:
        """The constants of the objective, on the mesh."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_constants)
        return jax.jit(lambda x: x, out_shardings=shardings)(self.objective.constants())

    def trace_step(self) -> Any:
        """Traces `train_step`, as `jax.stages.Traced`; the devices need not exist."""
        constants = (self.abstract_constants,) if self.abstract_constants else ()
        step = self._jit_step(self.objective)
        return step.trace(self.abstract_state, self.abstract_batch, *constants)

    def _jit_step(self, objective: Objective) -> Any:
        step = functools.partial(
            step_lib.train_step,
            objective=objective,
            optimizer=self.optimizer,
            ema_decay=self.settings.ema_decay,
            ema_warmup=self.settings.ema_warmup,
            seed=self.settings.seed,
            split=self._split,
            scatter=self._scatter,
            on_divergence=self.settings.on_divergence,
            max_loss=self.settings.max_loss,
        )
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        placed = (shardings, batch_sharding(self.mesh))
        if self.abstract_constants:
            placed = (*placed, jax.tree.map(lambda x: x.sharding, self.abstract_constants))
        return jax.jit(
            step,
            in_shardings=placed,
            out_shardings=(shardings, replicated),
            donate_argnums=0,
            compiler_options=compiler_options(self.mesh.devices.flat[0]),
        )

    def _split(self, micro_batches: jax.Array) -> jax.Array:
        names = (None, "batch", *(None,) * (micro_batches.ndim - 2))
        return constrain(micro_batches, names, mesh=self.mesh)

    def _scatter(self, grads: Any) -> Any:
        if not self.strategy.zero1:
            return grads
        return scatter_gradients(grads, mesh=self.mesh, strategy=self.strategy)

    def image_batches(self, step: int) -> Iterator[dict[str, jax.Array]]:
        """As `train_batches`, with images also where these have stored features instead."""
        return self._load(self.train_data, step, None)

    def train_batches(
        self, step: int, *, corrupt: CorruptCounter | None = None
    ) -> Iterator[dict[str, jax.Array]]:
        """Global batches `[batch, ...]` on the mesh, the first one that of step `step + 1`.

        Args:
          step: number of updates made before.
          corrupt: counts this process's records that can't be read.
        """
        return self._load(self._step_data, step, corrupt)

    def _load(
        self, data: DatasetSpec, step: int, corrupt: CorruptCounter | None
    ) -> Iterator[dict[str, jax.Array]]:
        shards, num_shards = process_shards(self.mesh)
        batches = train_batches(
            data,
            seed=self.settings.seed,
            step=step,
            shards=shards,
            num_shards=num_shards,
            corrupt=corrupt,
        )
        return (shard_batch(batch, self.mesh) for batch in batches)
