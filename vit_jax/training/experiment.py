# SPDX-License-Identifier: Apache-2.0
"""The config becomes an experiment. Nothing else reads the config."""

import dataclasses
import functools
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vit_jax.checkpoint.manager import CheckpointOptions
from vit_jax.checkpoint.pretrained.adapt import adapt_params, check_arguments, fit_objective_params
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.checkpoint.state import TrainState
from vit_jax.checkpoint.workdir import Resume
from vit_jax.config.precision import apply_precision
from vit_jax.data.corrupt import MAX_CORRUPT, CorruptCounter
from vit_jax.data.mixture import check_same_classes
from vit_jax.data.pipeline import DatasetSpec, plan_buffers, read_step, train_batches
from vit_jax.evaluators.base import Evaluator
from vit_jax.evaluators.kinds import EVALUATORS, JUDGE_HEAD
from vit_jax.models.block_config import Constrain
from vit_jax.models.mixer import MlpMixer
from vit_jax.models.variants import MODELS
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives.base import Objective, Params
from vit_jax.objectives.kinds import HEADLESS, OBJECTIVES
from vit_jax.observe.console import log
from vit_jax.observe.divergence import POLICIES
from vit_jax.observe.profiler import Profile
from vit_jax.observe.trackers import Tracking
from vit_jax.optim.base_optimizers import BASE_OPTIMIZERS
from vit_jax.optim.optimizer import Optimizer, make_optimizer
from vit_jax.optim.schedules import drop_other_units
from vit_jax.parallel.mesh import (
    batch_sharding,
    check_batch_size,
    choose_layout,
    make_mesh,
    process_shards,
    shard_batch,
)
from vit_jax.parallel.sharding import Strategy, constrain, infer_shardings, scatter_gradients
from vit_jax.runtime.watchdog import Limits
from vit_jax.training import step as state_lib
from vit_jax.utils.durations import (
    LENGTH,
    Clock,
    every_steps,
    find_duration,
    split_every,
    to_steps,
)
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import bind, check_type, keywords, lookup
from vit_jax.utils.tree import flatten

# Keys of google-research/vision_transformer configs, and where their values go here.
RENAMED = {
    "accum_steps": "optimizer.accum_steps",
    "base_lr": "optimizer.lr",
    "batch": "data.batch_size",
    "batch_eval": "evals.NAME.batch_size",
    "checkpoint_every": "checkpoint.every",
    "dataset": "data.name",
    "decay_type": "optimizer.schedule",
    "eval_every": "evals.NAME.every",
    "grad_norm_clip": "optimizer.grad_clip_norm",
    "model_name": "model.variant",
    "model_or_filename": "init_from",
    "optim_dtype": "optimizer.momentum_dtype",
    "pp": "data.preprocess",
    "pretrained_dir": "init_from",
    "progress_every": "log_every",
    "steps": "total_steps",
    "tfds_data_dir": "data.data_dir",
    "warmup_steps": "optimizer.warmup_steps",
}


Model = VisionTransformer | MlpMixer

_SECTIONS = (
    "mesh",
    "model",
    "adapt",
    "objective",
    "data",
    "optimizer",
    "checkpoint",
    "evals",
    "profile",
    "resume",
    "tracking",
    "watchdog",
)


def _top_level(
    *,
    model: dict,
    data: dict,
    optimizer: dict,
    seed: int = 0,
    precision: str | None = None,
    total_steps: int | None = None,
    epochs: float | None = None,
    examples: float | None = None,
    mesh: dict | None = None,
    objective: dict | None = None,
    ema_decay: float | None = None,
    on_divergence: str = "stop",
    max_loss: float | None = None,
    init_from: str | None = None,
    adapt: dict | None = None,
    checkpoint: dict | None = None,
    evals: dict | None = None,
    log_every: int = 50,
    profile: dict | None = None,
    resume: dict | None = None,
    tracking: dict | None = None,
    watchdog: dict | None = None,
) -> None:
    """The keys of a config; only its signature is used."""


def _train_data(
    *,
    batch_size: int,
    preprocess: str,
    name: str | None = None,
    split: str | None = None,
    mixture: tuple[tuple[str, str, float], ...] = (),
    repeats: int = 1,
    data_dir: str | None = None,
    num_threads: int | None = None,
    max_corrupt: float = MAX_CORRUPT,
    max_ram_gb: float | None = None,
) -> None:
    """The keys of `data`; only its signature is used."""


def _eval_data(
    *, split: str, preprocess: str, data_name: str | None = None, batch_size: int | None = None
) -> None:
    """The keys of an evaluator's data; its folder is that of `data`, and its name by default."""


# Fields of a model that are Flax's, or say how it is run and not what it computes.
_NO_PART_OF_A_MODEL = ("parent", "name", "constrain", "scan", "remat", "float8")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All parts of a run, put together on a mesh."""

    model: Model
    objective: Objective
    optimizer: Optimizer
    mesh: Mesh
    strategy: Strategy
    train_data: DatasetSpec
    max_corrupt: float
    evaluators: tuple[Evaluator, ...]
    total_steps: int
    seed: int
    ema_decay: float | None
    on_divergence: str
    max_loss: float | None
    init_from: str | None
    adapt: dict[str, Any]
    checkpoint: CheckpointOptions
    log_every: int
    profile: Profile
    resume: Resume
    tracking: Tracking
    watchdog: Limits
    config: dict[str, Any]

    @classmethod
    def from_config(
        cls,
        config: ConfigDict | Mapping[str, Any],
        *,
        devices: Sequence[Any] | None = None,
        epoch_examples: int | None = None,
    ) -> "Experiment":
        """Builds the experiment that a config describes.

        Args:
          config: see `docs/architecture.md` for the keys.
          devices: of the mesh; all by default.
          epoch_examples: of the training data, where that is not at hand; it is opened to count
            them if a duration needs it.

        Raises:
          UserError: an unknown key or name, or values that don't go together.
        """
        config = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
        _check_renamed(config)
        config, log_every = split_every(config, "log_every")
        (top,) = bind(config, _top_level, key="config")
        _check_top_level(top)
        section = {k: dict(top[k] or {}) for k in _SECTIONS}
        precision, section["model"], section["optimizer"] = apply_precision(
            top["precision"], section["model"], section["optimizer"]
        )

        mesh, strategy, mesh_args = _make_mesh(section["mesh"], devices)
        data, data_args = _make_data(section["data"], mesh)
        place = functools.partial(
            constrain, mesh=mesh, sequence_parallel=strategy.sequence_parallel
        )
        headless = section["objective"].get("name") in HEADLESS
        model, model_args = _make_model(
            section["model"], data, mesh, place, headless=headless, float8=precision.float8
        )
        objective, objective_args = _make_objective(section["objective"], model, data)
        clock = _make_clock(data, epoch_examples)
        total_steps = _total_steps(top, clock)
        every = functools.partial(_resolve_every, clock=clock, total_steps=total_steps)
        optimizer, optimizer_args = _make_optimizer(
            section["optimizer"], total_steps, clock, mesh, objective
        )
        evaluators, eval_args = _make_evaluators(
            section["evals"], data, objective, mesh, every=every
        )
        checkpoint, checkpoint_args = _make_checkpoint(
            section["checkpoint"], evaluators, top["ema_decay"] is not None, every=every
        )
        if log_every:
            steps = every_steps(log_every, "log_every", clock=clock, total_steps=total_steps)
            top["log_every"] = max(steps, 1)
        given = ("target_grid", "num_class_tokens")
        (adapt_args,) = bind(section["adapt"], adapt_params, key="adapt", given=given)
        (profile_args,) = bind(section["profile"], Profile, key="profile")
        (resume_args,) = bind(section["resume"], Resume, key="resume")
        (tracking_args,) = bind(section["tracking"], Tracking, key="tracking")
        (watchdog_args,) = bind(section["watchdog"], Limits, key="watchdog")
        return cls(
            model=model,
            objective=objective,
            optimizer=optimizer,
            mesh=mesh,
            strategy=strategy,
            train_data=data,
            max_corrupt=data_args["max_corrupt"],
            evaluators=evaluators,
            total_steps=total_steps,
            seed=top["seed"],
            ema_decay=top["ema_decay"],
            on_divergence=top["on_divergence"],
            max_loss=top["max_loss"],
            init_from=top["init_from"],
            adapt=adapt_args,
            checkpoint=checkpoint,
            log_every=top["log_every"],
            profile=Profile(**profile_args),
            resume=Resume(**resume_args),
            tracking=Tracking(**tracking_args),
            watchdog=Limits(**watchdog_args),
            config={k: v for k, v in top.items() if not (log_every and k == "log_every")}
            | log_every
            | {
                "mesh": mesh_args,
                "data": data_args,
                "model": model_args,
                "adapt": adapt_args,
                "objective": objective_args,
                "optimizer": optimizer_args,
                "checkpoint": checkpoint_args,
                "evals": eval_args,
                "profile": profile_args,
                "resume": resume_args,
                "tracking": tracking_args,
                "watchdog": watchdog_args,
            },
        )

    @functools.cached_property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a global batch."""
        sharding, size = batch_sharding(self.mesh), self.train_data.batch_size
        return {
            k: jax.ShapeDtypeStruct((size, *v.shape), v.dtype, sharding=sharding)
            for k, v in self.train_data.blank().items()
        }

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the train state."""
        shapes = jax.eval_shape(self._make_state)
        shardings = infer_shardings(shapes, self.mesh, self.strategy, params=shapes.params)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )

    def _make_state(self, params: Any = None) -> TrainState:
        batch = {k: jnp.zeros((1, *v.shape[1:]), v.dtype) for k, v in self.abstract_batch.items()}
        return state_lib.init_state(
            state_lib.init_rng(self.seed),
            batch,
            objective=self.objective,
            tx=self.optimizer.tx,
            ema=self.ema_decay is not None,
            params=params,
        )

    def init_state(self) -> TrainState:
        """A fresh state, each array born on the devices that hold it.

        With `init_from`, the parameters come from there, adapted to this model; what was adapted
        is said on the screen.
        """
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        if self.init_from is None:
            return jax.jit(self._make_state, out_shardings=shardings)()
        try:
            weights = load_pretrained(self.init_from)
        except UserError as e:
            raise UserError(f"init_from={self.init_from!r}: {e}") from e
        params, notes = self.fit_params(weights, self.initial_params())
        log(f"parameters from {self.init_from} ({weights.layout})")
        for note in notes:
            log(f"  {note}")
        return jax.jit(self._make_state, out_shardings=shardings)(params)

    def initial_params(self) -> Params:
        """Parameters before any training, in the memory of the host."""
        return jax.device_get(jax.jit(lambda: self._make_state().params)())

    def fit_params(self, weights: Weights, initial: Params) -> tuple[Params, list[str]]:
        """Adapts the parameters of a checkpoint to this model.

        Args:
          weights: of the checkpoint.
          initial: what starts anew is taken from there.

        Returns:
          The parameters, and a line for each thing to know of them.

        Raises:
          UserError: they don't fit.
        """
        check_arguments(weights, self.model)
        own = {name: initial[name] for name in self.objective.objective_params}
        params, notes = adapt_params(
            weights,
            {name: x for name, x in initial.items() if name not in own},
            target_grid=self.model.grid(self.train_data.image_shape()[:2]),
            num_class_tokens=self.model.num_class_tokens,
            **self.adapt,
        )
        own, more = fit_objective_params(weights, own)
        notes = [*weights.notes, *notes, *more, *self._compare_preprocess(weights.preprocess)]
        return params | own, notes

    def place_params(self, params: Params) -> Params:
        """Puts parameters in the memory of the host on the devices that hold them."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state.params)
        return jax.jit(lambda x: x, out_shardings=shardings)(params)

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What one must know to use the parameters; goes into each checkpoint, as JSON."""
        model = {
            field.name: getattr(self.model, field.name)
            for field in dataclasses.fields(self.model)
            if field.name not in _NO_PART_OF_A_MODEL
        }
        evaluated = self.evaluators[0].data if self.evaluators else self.train_data
        return {
            "model": {"name": self.config["model"]["name"]} | model,
            "preprocess": {
                "mean": self.config["objective"].get("pixel_mean"),
                "std": self.config["objective"].get("pixel_std"),
                "image_size": self.train_data.image_shape()[:2],
                "eval": evaluated.preprocess,
            },
        }

    def _compare_preprocess(self, theirs: Mapping[str, Any]) -> list[str]:
        """A line for each way in which images are not prepared as the weights expect."""
        ours = self.description["preprocess"]
        keys = {"mean": "objective.pixel_mean", "std": "objective.pixel_std"}
        notes = [
            f"pixels: the weights expect {key.partition('.')[2]} {theirs[name]}, here it is "
            f"{ours[name]}: add --config.{key}={shlex.quote(str(theirs[name]))}"
            for name, key in keys.items()
            if name in theirs and not np.allclose(theirs[name], ours[name])
        ]
        if theirs.get("eval") not in (None, ours["eval"]):
            notes.append(f"evaluation images: {theirs['eval']} there, {ours['eval']} here")
        return notes

    @functools.cached_property
    def train_step(self) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """The jitted `state.train_step` of this experiment; donates the state."""
        step = functools.partial(
            state_lib.train_step,
            objective=self.objective,
            optimizer=self.optimizer,
            ema_decay=self.ema_decay,
            seed=self.seed,
            split=self._split,
            scatter=self._scatter,
            on_divergence=self.on_divergence,
            max_loss=self.max_loss,
        )
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        placed = (shardings, batch_sharding(self.mesh))
        options: dict[str, Any] = {"out_shardings": (shardings, replicated), "donate_argnums": 0}
        constants = self.objective.constants()
        if not constants:
            return jax.jit(step, in_shardings=placed, **options)
        where = infer_shardings(constants, self.mesh)
        constants = jax.jit(lambda x: x, out_shardings=where)(constants)
        jitted = jax.jit(step, in_shardings=(*placed, where), **options)
        return lambda state, batch: jitted(state, batch, constants)

    def _split(self, micro_batches: jax.Array) -> jax.Array:
        names = (None, "batch", *(None,) * (micro_batches.ndim - 2))
        return constrain(micro_batches, names, mesh=self.mesh)

    def _scatter(self, grads: Any) -> Any:
        if not self.strategy.zero1:
            return grads
        return scatter_gradients(grads, mesh=self.mesh, strategy=self.strategy)

    def train_batches(
        self, step: int, *, corrupt: CorruptCounter | None = None
    ) -> Iterator[dict[str, jax.Array]]:
        """Global batches on the mesh, from those of step `step + 1` on.

        Args:
          step: after which to begin.
          corrupt: counts this process's records that can't be read.
        """
        shards, num_shards = process_shards(self.mesh)
        batches = train_batches(
            self.train_data,
            seed=self.seed,
            step=step,
            shards=shards,
            num_shards=num_shards,
            corrupt=corrupt,
        )
        return (shard_batch(batch, self.mesh) for batch in batches)

    def measure_params(self, params: Params) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Histograms of all parameters, `params/PATH`: counts and edges of 30 bins."""
        return jax.device_get(self._histograms(params))

    @functools.cached_property
    def _histograms(self) -> Callable[[Params], dict[str, tuple[jax.Array, jax.Array]]]:
        def measure(params: Params) -> dict[str, tuple[jax.Array, jax.Array]]:
            found = {path: x.astype(jnp.float32) for path, x in flatten(params).items()}
            return {f"params/{path}": jnp.histogram(x, bins=30) for path, x in found.items()}

        return jax.jit(measure, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def describe_step(self, step: int) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
        """The batch of a step, where its examples come from, and the names of `grad_norms`."""
        batch, records = read_step(self.train_data, seed=self.seed, step=step - 1)
        trained, _ = self.optimizer.rules.split(self.abstract_state.params)
        return batch, records, state_lib.layer_names(trained)

    def augment_images(self, batch: Mapping[str, jax.Array], count: int) -> np.ndarray:
        """Some images of the first batch as the model sees them, mixed among themselves.

        Args:
          batch: from `train_batches`; of this process's part of it.
          count: images at most.

        Returns:
          uint8 `[n, height, width, 3]`.
        """
        return self._augment({k: _local_rows(x, count) for k, x in batch.items()})

    def _augment(self, batch: Mapping[str, Any]) -> np.ndarray:
        rng, _ = jax.random.split(state_lib.step_rng(self.seed, 0))
        images = self.objective.augment(dict(batch), rng)["image"]
        args = self.config["objective"]
        pixels = np.asarray(images) * args["pixel_std"] + args["pixel_mean"]
        return np.round(255 * pixels.clip(0, 1)).astype(np.uint8)

    def augmented_images(self) -> np.ndarray:
        """The images of the first step as the model sees them, uint8 `[b, height, width, 3]`."""
        return self._augment(next(self.train_batches(0)))

    def input_bytes(self) -> dict[str, int]:
        """Memory for batches of this process, by what they are for: at most `data.max_ram_gb` each.

        Raises:
          UserError: that is too little.
        """
        shards, num_shards = process_shards(self.mesh)
        data = {"train": self.train_data} | {e.name: e.data for e in self.evaluators}
        return {
            name: plan_buffers(spec, num_shards=num_shards, shards=len(shards)).nbytes
            for name, spec in data.items()
        }

    def override_for_twice_as_long(self) -> str:
        """What to add to the command for a run of double length."""
        key = next(key for key in LENGTH if self.config[key] is not None)
        return f"--config.{key}={2 * self.config[key]}"

    def open_data(self) -> None:
        """Opens every split that the run will need, so that a missing one is found at once.

        Raises:
          UserError: a split is missing or empty, or holds less than a batch to train on.
        """
        _count_examples(self.train_data)
        for evaluator in self.evaluators:
            evaluator.open()


def _local_rows(x: jax.Array, count: int) -> np.ndarray:
    """The first rows of a global array among those that this process has."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])[:count]


def _check_renamed(config: Mapping[str, Any]) -> None:
    for key in config:
        if key in RENAMED:
            raise UserError(f"config.{key} is now config.{RENAMED[key]}")


def _check_top_level(top: Mapping[str, Any]) -> None:
    # 32 bits are what jax makes a key of.
    if not 0 <= top["seed"] < 2**32:
        raise UserError(f"seed={top['seed']}: expected 0 to {2**32 - 1}")
    if top["ema_decay"] is not None and not 0 <= top["ema_decay"] < 1:
        raise UserError(f"ema_decay={top['ema_decay']}: expected 0 <= value < 1, or None")
    lookup(dict.fromkeys(POLICIES), top["on_divergence"], key="on_divergence")
    if top["max_loss"] is not None and top["max_loss"] <= 0:
        raise UserError(f"max_loss={top['max_loss']}: expected more than 0, or None")
    if top["log_every"] < 1:
        raise UserError(f"log_every={top['log_every']}: expected at least 1")


# Each of the functions below makes one part from its section of the config, and returns with it the
# section with all defaults filled in.
_Section = dict[str, Any]


def _by_name(
    section: _Section, table: Mapping[str, Any], default: str, *, key: str
) -> tuple[str, Any]:
    name = section.pop("name", default)
    return name, lookup(table, name, key=f"{key}.name")


def _make_mesh(section: _Section, devices: Sequence[Any] | None) -> tuple[Mesh, Strategy, _Section]:
    devices = jax.devices() if devices is None else devices
    rules = section.get("rules", ())
    section, chosen = choose_layout(section, devices)
    if chosen:
        log(chosen)
    args, strategy = bind(section, make_mesh, Strategy, key="mesh", given=("devices",))
    mesh = make_mesh(**args, devices=devices)
    return mesh, Strategy(**strategy), args | strategy | {"rules": rules}


def _make_data(section: _Section, mesh: Mesh) -> tuple[DatasetSpec, _Section]:
    (args,) = bind(section, _train_data, key="data")
    check_batch_size(args["batch_size"], mesh, key="data.batch_size")
    if args["num_threads"] is not None and args["num_threads"] < 0:
        raise UserError(f"data.num_threads={args['num_threads']}: expected 0 or more, or None")
    if not 1 <= args["repeats"] <= args["batch_size"]:
        raise UserError(
            f"data.repeats={args['repeats']}: expected 1 to data.batch_size={args['batch_size']}"
        )
    if not 0 <= args["max_corrupt"] <= 1:
        raise UserError(f"data.max_corrupt={args['max_corrupt']}: expected a fraction, 0 to 1")
    return _make_spec(args), args


def _make_spec(args: _Section) -> DatasetSpec:
    name, split, mixture = args["name"], args["split"], args["mixture"]
    if mixture and (name, split) != (None, None):
        raise UserError(
            f"data.mixture and data.name={name!r}, data.split={split!r}: expected either a mixture "
            "or a name and a split"
        )
    if not mixture:
        for key in ("name", "split"):
            if args[key] is None:
                raise UserError(f"data.{key} is missing, and has no default")
    spec = DatasetSpec(
        name=name or "",
        split=split or "",
        preprocess=args["preprocess"],
        batch_size=args["batch_size"],
        data_dir=args["data_dir"],
        key="data",
        num_threads=args["num_threads"],
        max_ram_gb=args["max_ram_gb"],
        # As tuples, whether they come from a config or from the command line.
        mixture=tuple(tuple(part) for part in mixture),
        repeats=args["repeats"],
    )
    if mixture:
        spec.schedule()
    return spec


def _make_model(
    section: _Section,
    data: DatasetSpec,
    mesh: Mesh,
    place: Constrain,
    *,
    headless: bool,
    float8: bool,
) -> tuple[Model, _Section]:
    name, make = _by_name(section, MODELS, "vit", key="model")
    section.setdefault("num_classes", 0 if headless else data.info.num_classes)
    (args,) = bind(section, make, key="model", given=("constrain", "float8"))
    if headless and args["num_classes"]:
        raise UserError(
            f"model.num_classes={args['num_classes']}: this objective trains a model without its "
            "head: expected 0, or leave it out"
        )
    if not headless and args["num_classes"] < data.info.num_classes:
        raise UserError(
            f"model.num_classes={args['num_classes']} is less than the {data.info.num_classes} "
            f"classes of {data}"
        )
    model = make(**args, constrain=place, float8=float8)
    model.grid(data.image_shape()[:2])
    for key in ("num_heads", "mlp_dim", "tokens_mlp_dim", "channels_mlp_dim"):
        size, parts = getattr(model, key, 0), mesh.shape["tensor"]
        if size % parts:
            raise UserError(f"mesh.tensor={parts} does not divide model.{key}={size}")
    # What the variant decides is written down as decided.
    return model, {"name": name} | args | {"classifier": model.classifier}


def _make_objective(
    section: _Section, model: Model, data: DatasetSpec
) -> tuple[Objective, _Section]:
    name, make = _by_name(section, OBJECTIVES, "supervised", key="objective")
    given = {
        "model": model,
        "num_classes": model.num_classes or data.info.num_classes,
        "image_shape": data.image_shape(),
        "multi_label": data.info.multi_label,
    }
    (args,) = bind(section, make, key="objective", given=tuple(given))
    if "unpooled" in model.classifier:
        raise UserError(
            f"model.classifier={model.classifier!r} classifies every token; expected 'token', "
            f"'gap' or 'map' for objective.name={name!r}"
        )
    if data.info.multi_label and args.get("loss") == "softmax":
        raise UserError(
            f"objective.loss='softmax' takes one label an example, and {data} has several: "
            "expected objective.loss='sigmoid'"
        )
    taken = {key: value for key, value in given.items() if key in keywords(make)}
    return make(**taken, **args), {"name": name} | args


def _make_optimizer(
    section: _Section, total_steps: int, clock: Clock, mesh: Mesh, objective: Objective
) -> tuple[Optimizer, _Section]:
    name, base = _by_name(section, BASE_OPTIMIZERS, "adamw", key="optimizer")
    given = ("base", "total_steps", "clock")
    args, base_args = bind(section, make_optimizer, base, key="optimizer", given=given)
    rules = {
        "freeze": (*args["freeze"], *objective.frozen),
        "lr_multipliers": (*args["lr_multipliers"], *objective.lr_multipliers()),
    }
    optimizer = make_optimizer(
        base=base(**base_args),
        total_steps=total_steps,
        clock=clock,
        **(args | rules),
    )
    if len(objective.lr_multipliers()) > 1 and args["grad_clip_norm"] is not None:
        raise UserError(
            f"optimizer.grad_clip_norm={args['grad_clip_norm']}: expected None, since the heads of "
            "objective.lr_factors are trained as if each were alone, and a norm would be of all"
        )
    if clock.batch_size % optimizer.accum_steps:
        raise UserError(
            f"optimizer.accum_steps={optimizer.accum_steps} does not divide "
            f"data.batch_size={clock.batch_size}"
        )
    micro_batch = clock.batch_size // optimizer.accum_steps
    check_batch_size(micro_batch, mesh, key="data.batch_size / optimizer.accum_steps")
    return optimizer, {"name": name} | drop_other_units(args) | base_args


def _count_examples(data: DatasetSpec) -> int:
    length = len(data.open())
    if length < data.batch_size:
        raise UserError(
            f"data.batch_size={data.batch_size} is more than the {length} examples to train on of "
            f"{data}: expected at most that many"
        )
    return length


def _make_clock(data: DatasetSpec, epoch_examples: int | None) -> Clock:
    def count() -> int:
        return _count_examples(data) if epoch_examples is None else epoch_examples

    return Clock(data.batch_size, count)


def _total_steps(top: Mapping[str, Any], clock: Clock) -> int:
    lengths = " and ".join(f"{key}={top[key]}" for key in LENGTH)
    found = find_duration(top, LENGTH)
    if found is None:
        raise UserError(f"{lengths}: expected exactly one of them")
    key, value = found
    steps = to_steps(value, LENGTH[key], clock=clock)
    if steps < 1:
        raise UserError(f"{key}={value}: expected at least 1 step")
    return steps


class _Every(Protocol):
    """Gives a section with `every` in steps, and the key that it has in its place, if any."""

    def __call__(self, section: _Section, *, key: str) -> tuple[_Section, _Section]: ...


def _resolve_every(
    section: _Section, *, key: str, clock: Clock, total_steps: int
) -> tuple[_Section, _Section]:
    rest, given = split_every(section, "every", prefix=f"{key}.")
    if given:
        rest["every"] = every_steps(given, "every", clock=clock, total_steps=total_steps)
    return rest, given


def _as_given(args: _Section, given: _Section) -> _Section:
    """Arguments for writing down, with a duration as the config has it."""
    return {k: v for k, v in args.items() if not (given and k == "every")} | given


def _make_evaluators(
    sections: Mapping[str, Any],
    train_data: DatasetSpec,
    objective: Objective,
    mesh: Mesh,
    *,
    every: _Every,
) -> tuple[tuple[Evaluator, ...], _Section]:
    image_shape = train_data.image_shape()
    evaluators, resolved = [], {}
    for name, section in sections.items():
        if section is None:  # --config.evals.NAME=None leaves one out
            continue
        key = f"evals.{name}"
        if name in ("train", "perf") or "/" in name or name.endswith("_ema"):
            raise UserError(f"{key}: {name!r} can't be a name of metrics; try 'val'")
        check_type(section, dict, key=key)
        section, every_given = every(dict(section), key=key)
        kind, make = _by_name(section, EVALUATORS, "classification", key=key)
        given = ("name", "data", "objective", "mesh")
        data_args, args = bind(section, _eval_data, make, key=key, given=given)
        data_args["batch_size"] = data_args["batch_size"] or train_data.batch_size
        check_batch_size(data_args["batch_size"], mesh, key=f"{key}.batch_size")
        same_classes = kind in JUDGE_HEAD
        data = _make_eval_spec(data_args, train_data, key=key, same_classes=same_classes)
        if data.image_shape() != image_shape:
            raise UserError(
                f"{key}.preprocess gives images of {data.image_shape()}, data.preprocess of "
                f"{image_shape}: expected the same"
            )
        evaluators.append(make(name=name, data=data, objective=objective, mesh=mesh, **args))
        resolved[name] = {"name": kind} | data_args | _as_given(args, every_given)
    return tuple(evaluators), resolved


def _make_eval_spec(
    args: _Section, train_data: DatasetSpec, *, key: str, same_classes: bool
) -> DatasetSpec:
    name = args["data_name"]
    if name is None and train_data.mixture:
        raise UserError(
            f"{key}.data_name is missing: data.mixture is for training, so expected the dataset to "
            "evaluate on"
        )
    data = dataclasses.replace(
        train_data,
        name=name or train_data.name,
        split=args["split"],
        preprocess=args["preprocess"],
        batch_size=args["batch_size"],
        mixture=(),
        key=key,
    )
    if name is not None and same_classes:
        check_same_classes(
            train_data.info, data.info, str(train_data), name, key=f"{key}.data_name"
        )
    return data


def _make_checkpoint(
    section: _Section, evaluators: tuple[Evaluator, ...], ema: bool, *, every: _Every
) -> tuple[CheckpointOptions, _Section]:
    section, every_given = every(section, key="checkpoint")
    (args,) = bind(section, CheckpointOptions, key="checkpoint")
    options = CheckpointOptions(**args)
    if options.keep_best is None:
        return options, _as_given(args, every_given)
    judges = {f"{e.name}/{metric}": e for e in evaluators for metric in e.metrics}
    if ema:
        judges |= {f"{e.name}_ema/{metric}": e for e in evaluators for metric in e.metrics}
    if options.keep_best not in judges:
        raise UserError(
            f"checkpoint.keep_best={options.keep_best!r}: expected a metric of one of the evals: "
            f"{', '.join(sorted(judges)) or 'none'}"
        )
    judge = judges[options.keep_best]
    if not judge.every or options.every % judge.every:
        raise UserError(
            f"checkpoint.every={options.every} with keep_best={options.keep_best!r}: expected a "
            f"multiple of evals.{judge.name}.every={judge.every}, to judge each checkpoint"
        )
    return options, _as_given(args, every_given)
