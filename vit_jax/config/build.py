# SPDX-License-Identifier: Apache-2.0
"""A config becomes the parts of a run."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.checkpoint.manager import CheckpointOptions
from vit_jax.checkpoint.pretrained.adapt import adapt_params
from vit_jax.config.keys import suggesting_keys
from vit_jax.config.precision import apply_precision
from vit_jax.config.schema import Config, Data, EvalData, read_config, read_section
from vit_jax.config.splits import use_cut
from vit_jax.config.trace_parts import trace_parts
from vit_jax.data.classes import Classes
from vit_jax.data.mixture import check_same_kind
from vit_jax.data.ops.patches import find_patches
from vit_jax.data.pipeline import DatasetSpec
from vit_jax.data.rows import ALONE, Packing
from vit_jax.data.tokenizers import parse_tokenizer
from vit_jax.evaluators.base import Evaluator
from vit_jax.evaluators.kinds import EVALUATORS
from vit_jax.models.attention import choose_attention
from vit_jax.models.block_config import Constrain
from vit_jax.models.blocks import choose_blocks
from vit_jax.models.interface import Model, check_outputs, find_grid, takes_any_size
from vit_jax.models.lora import Lora
from vit_jax.models.names import guess_variant, normalize_variant
from vit_jax.models.two_towers import TOWERS, TwoTowers
from vit_jax.models.variants import MODELS, bind_towers, make_two_towers
from vit_jax.objectives.augment import Augmentation
from vit_jax.objectives.base import Objective
from vit_jax.objectives.contrastive import make_contrastive
from vit_jax.objectives.kinds import OBJECTIVES
from vit_jax.objectives.pixels import fit_to_line
from vit_jax.observe.console import log
from vit_jax.observe.early_stopping import Stop
from vit_jax.optim.base_optimizers import BASE_OPTIMIZERS, BaseOptimizer
from vit_jax.optim.optimizer import Optimizer, make_optimizer
from vit_jax.optim.schedules import drop_other_units
from vit_jax.parallel.mesh import check_batch_size, choose_layout, make_mesh
from vit_jax.parallel.sharding import Placement, Strategy
from vit_jax.utils.durations import (
    LENGTH,
    Clock,
    every_steps,
    find_duration,
    split_every,
    to_steps,
)
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import Part, bind, check_type, find_part, is_part, keywords

# What learns without labels, after `objective` in a command.
_UNLABELLED = ".name=contrastive, which learns from captions"

# Percent of a run from one record of training to the next, by default.
_LOG_PERCENT = 1


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run, on a mesh.

    Attributes:
      settings: the config with durations in steps. The sections that are dicts have all arguments
        of their constructors.
      config: the config with all defaults, and durations in the units that were given: what
        `config.json` holds. The same config builds the same parts.
    """

    model: Model
    objective: Objective
    optimizer: Optimizer
    mesh: Mesh
    strategy: Strategy
    train_data: DatasetSpec
    evaluators: tuple[Evaluator, ...]
    total_steps: int
    settings: Config
    config: dict[str, Any]

    @property
    def keeps_average(self) -> bool:
        """Whether the train state has an average of the parameters."""
        return self.settings.ema_decay is not None or self.objective.keeps_average

    @property
    def trains_whole_model(self) -> bool:
        """Whether each step goes forward and backward through all of the model, and no more."""
        supervised = self.settings.objective["name"] == "supervised"
        return supervised and not self.settings.optimizer["freeze"]


def build_parts(
    config: ConfigDict | Mapping[str, Any],
    *,
    devices: Sequence[Any] | None = None,
    epoch_examples: int | None = None,
    match_classes: bool = True,
) -> Parts:
    """Builds the parts that a config describes.

    Args:
      config: see `config/schema.py` for the keys.
      devices: of the mesh; all by default.
      epoch_examples: of the training data, if that is not available; it is opened to count them
        if a duration needs it.
      match_classes: whether evaluators that use the head take its classes to be those of the
        training data. Without it they have those of their own data, to be matched with weights.

    Raises:
      UserError: an unknown key or name, or values that don't go together.
    """
    config = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    with suggesting_keys(config):
        return _build_parts(
            config,
            devices=devices,
            epoch_examples=epoch_examples,
            match_classes=match_classes,
        )


def _build_parts(
    config: dict[str, Any],
    *,
    devices: Sequence[Any] | None,
    epoch_examples: int | None,
    match_classes: bool,
) -> Parts:
    config, log_every = split_every(config, "log_every")
    top = use_cut(read_config(config))
    typed = {
        name: read_section(name, top[name])
        for name in ("data", "lora", "profile", "resume", "stop", "tracking", "watchdog")
    }
    made = {name: section for name, (section, _) in typed.items()}
    values: dict[str, Any] = top | made | {"checkpoint": CheckpointOptions()}
    settings = Config(**values)
    precision, model_section, optimizer_section = apply_precision(
        settings.precision, settings.model, settings.optimizer
    )
    mesh, strategy, mesh_args = _make_mesh(settings.mesh, devices)
    data = _make_data(settings.data, mesh)
    place = Placement(mesh, strategy.sequence_parallel)
    _, make = _by_name(dict(settings.objective), OBJECTIVES, "supervised", key="objective")
    headless = getattr(make, "headless", False)
    if not headless:
        named = str(settings.objective.get("name", "supervised"))
        _check_labels(data, "objective", named, _UNLABELLED)
    model, model_args = _make_model(
        model_section,
        data,
        mesh,
        place,
        headless=headless,
        float8=precision.float8,
        lora=settings.lora if settings.lora.rank else None,
        sequence_parallel=strategy.sequence_parallel,
    )
    clock = _make_clock(data, epoch_examples)
    total_steps = _total_steps(top, clock)
    objective, objective_args = _make_objective(
        settings.objective, model, data, mesh, clock=clock, total_steps=total_steps
    )
    if objective.needs_labels:
        _check_labels(data, "objective", objective_args["name"], _UNLABELLED)
    if objective.needs_label_maps and "label_map" not in data.blank():
        raise UserError(f"data.preprocess={data.preprocess!r}: expected 'label_map' in keep(...)")
    if settings.ema_decay is not None and objective.keeps_average:
        raise UserError(
            f"ema_decay={settings.ema_decay} with objective.name={objective_args['name']!r}: "
            "expected None, since its teacher is the average; set objective.momentum"
        )
    averages = settings.ema_decay is not None or objective.keeps_average
    every = functools.partial(_resolve_every, clock=clock, total_steps=total_steps)
    optimizer, optimizer_args = _make_optimizer(
        optimizer_section, total_steps, clock, data, mesh, strategy, objective, settings.lora
    )
    evaluators, eval_args = _make_evaluators(
        settings.evals, data, model, objective, mesh, every=every, match_classes=match_classes
    )
    checkpoint, checkpoint_args = _make_checkpoint(
        top["checkpoint"], evaluators, averages, every=every
    )
    _check_stop(settings.stop, evaluators, averages)
    made_by = {"objective": objective_args, "model": model_args, "optimizer": optimizer_args}
    trace_parts(
        {k: args["name"] for k, args in made_by.items()},
        objective,
        optimizer,
        data,
        [(eval_args[e.name]["name"], e) for e in evaluators],
    )
    (adapt_args,) = bind(
        settings.adapt, adapt_params, key="adapt", given=("target_grid", "num_class_tokens")
    )
    changes: dict[str, Any] = {
        "mesh": mesh_args,
        "model": model_args,
        "objective": objective_args,
        "optimizer": optimizer_args,
        "evals": eval_args,
        "adapt": adapt_args,
    }
    resolved = top | {name: args for name, (_, args) in typed.items()} | changes
    resolved |= {"checkpoint": checkpoint_args}
    if log_every:
        del resolved["log_every"]
        resolved |= log_every
    if settings.log_every is None:
        period = log_every or {"log_every_percent": _LOG_PERCENT}
        steps = every_steps(period, "log_every", clock=clock, total_steps=total_steps)
        changes["log_every"] = max(steps, 1)
    return Parts(
        model=model,
        objective=objective,
        optimizer=optimizer,
        mesh=mesh,
        strategy=strategy,
        train_data=data,
        evaluators=evaluators,
        total_steps=total_steps,
        settings=dataclasses.replace(settings, checkpoint=checkpoint, **changes),
        config=resolved,
    )


def count_examples(data: DatasetSpec) -> int:
    """The number of examples to train on.

    Raises:
      UserError: the split is missing, or holds less than a batch.
    """
    length = len(data.open())
    if length < data.batch_size:
        raise UserError(
            f"data.batch_size={data.batch_size} is more than the {length} examples to train on of "
            f"{data}: expected at most that many, as --config.data.batch_size="
            f"{2 ** (length.bit_length() - 1)}"
        )
    return length


# Each function below makes one part from its section of the config, and also returns the section
# with all defaults.
_Section = dict[str, Any]


def _by_name(
    section: _Section, table: Mapping[str, Any], default: str, *gives: type, key: str
) -> tuple[str, Any]:
    name = section.pop("name", default)
    return name, find_part(table, name, key=f"{key}.name", gives=gives)


def _take(given: Mapping[str, Any], make: Any) -> dict[str, Any]:
    """Those of the arguments that a constructor has."""
    return {name: value for name, value in given.items() if name in keywords(make)}


def _make_mesh(section: _Section, devices: Sequence[Any] | None) -> tuple[Mesh, Strategy, _Section]:
    devices = jax.devices() if devices is None else devices
    rules = section.get("rules", ())
    section, chosen = choose_layout(section, devices)
    if chosen:
        log(chosen)
    args, strategy = bind(section, make_mesh, Strategy, key="mesh", given=("devices",))
    mesh = make_mesh(**args, devices=devices)
    return mesh, Strategy(**strategy), args | strategy | {"rules": rules}


def _make_data(section: Data, mesh: Mesh) -> DatasetSpec:
    # As tuples, whether they come from a config or from the command line.
    mixture: Any = tuple(map(tuple, section.mixture))
    views: Any = tuple(map(tuple, section.views))
    budgets: Any = tuple(map(tuple, section.budgets))
    dropped: Any = tuple(section.drop_patches)
    check_batch_size(section.batch_size, mesh, key="data.batch_size")
    spec = DatasetSpec(
        name=section.name or "",
        split=section.split or "",
        preprocess=section.preprocess,
        batch_size=section.batch_size,
        data_dir=section.data_dir,
        key="data",
        num_threads=section.num_threads,
        max_ram_gb=section.max_ram_gb,
        mixture=mixture,
        repeats=section.repeats,
        shuffle_window=section.shuffle_window,
        views=views,
        same_draws=tuple(section.same_draws),
        tokenizer=section.tokenizer,
        budgets=budgets,
        packing=Packing(
            images_per_row=section.images_per_row,
            size_spread=section.size_spread,
            drop_patches=dropped,
        ),
    )
    spec.view_shapes()
    spec.check_packing()
    spec.check_window()
    if spec.packing.images_per_row > 1:
        check_batch_size(spec.rows_per_batch, mesh, key="data.batch_size / data.images_per_row")
    for variant in spec.variants():
        check_batch_size(variant.batch_size, mesh, key="data.budgets")
    if spec.mixture:
        spec.schedule()
    if section.tokenizer is not None:
        parse_tokenizer(section.tokenizer)
        if not spec.info.captions:
            raise UserError(
                f"data.tokenizer={section.tokenizer!r}: {spec} has no captions to make tokens of: "
                "expected data with captions, or leave it out"
            )
    return spec


def _check_labels(data: DatasetSpec, key: str, name: str, advice: str) -> None:
    """Raises `UserError` if data without labels of images is to be learned or judged by labels."""
    if not data.info.num_classes:
        has = "masks" if data.info.pixel_classes else "captions"
        if data.info.pixel_classes and advice == _UNLABELLED:
            advice = ".name=segmentation, which learns the class of each pixel"
        if data.info.pixel_depth:
            has = "depth images"
            advice = ".name=depth, which learns them" if advice == _UNLABELLED else advice
        raise UserError(
            f"{key}.name={name!r} needs labels, and {data} has {has} alone: expected data with "
            f"labels, or --config.{key}{advice}"
        )


def _make_model(
    section: _Section,
    data: DatasetSpec,
    mesh: Mesh,
    place: Constrain,
    *,
    headless: bool,
    float8: bool,
    lora: Lora | None,
    sequence_parallel: bool,
) -> tuple[Model, _Section]:
    name = str(section.get("name", "vit"))
    if not is_part(name) and name not in MODELS and (variant := guess_variant(name)):
        raise UserError(
            f"model.name={name!r} is unknown; did you mean --config.model.name=vit with "
            f"--config.model.variant={variant}?"
        )
    name, make = _by_name(section, MODELS, "vit", nn.Module, key="model")
    if "num_classes" not in keywords(make):
        raise UserError(f"model.name={name!r} has no argument num_classes, the width of its head")
    section.setdefault("num_classes", 0 if headless else data.info.num_classes)
    if make is make_two_towers:
        section = _fit_to_tokenizer(section, data)
    (args,) = bind(section, make, key="model", given=("constrain", "float8", "lora", "any_size"))
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
    if float8 and "float8" not in keywords(make):
        raise UserError(f"precision='float8': model.name={name!r} has no argument float8")
    if lora is not None and "lora" not in keywords(make):
        raise UserError(f"lora.rank={lora.rank}: model.name={name!r} has no argument lora")
    if float8 and lora is not None and lora.base != "float32":
        raise UserError(
            f"lora.base={lora.base!r} with precision='float8', which rounds kernels itself; "
            "expected precision='bfloat16'"
        )
    model = make(**args, **_take({"constrain": place, "float8": float8, "lora": lora}, make))
    model = fit_to_line(model, data.preprocess, key="data.preprocess")
    if isinstance(make, Part):
        check_outputs(model, name, data.image_shape())
    find_grid(model, data.image_shape()[:2])
    model = _fit_to_mesh(
        model, data.image_shape()[:2], mesh, key="model", sequence_parallel=sequence_parallel
    )
    if isinstance(model, TwoTowers):
        args |= bind_towers(args)
        for part, tower in model.towers.items():
            args[TOWERS[part]] |= _decided(tower, args[TOWERS[part]])
    elif name in MODELS:
        args |= _decided(model, args)
    return model, {"name": name} | args


def _fit_to_tokenizer(section: _Section, data: DatasetSpec) -> _Section:
    """The length and the vocabulary of the text tower are those of the tokenizer by default."""
    text, tokenizer = section.get("text"), data.find_tokenizer()
    if tokenizer is None or not isinstance(text, Mapping):
        return section
    text = {"context_length": tokenizer.length, **text}
    if text.get("vocab_size") is None:
        text["vocab_size"] = tokenizer.vocab_size
    return section | {"text": text}


def _decided(model: Model, args: Mapping[str, Any]) -> _Section:
    """What the variant decides, to be written down as decided."""
    decided = {"classifier": model.classifier} if "classifier" in args else {}
    if args.get("variant") is not None:
        decided["variant"] = normalize_variant(args["variant"])
    return decided


def _fit_to_mesh(
    model: Model, image_size: tuple[int, ...], mesh: Mesh, *, key: str, sequence_parallel: bool
) -> Model:
    """Checks that a mesh divides a model, and chooses its kernels for the devices."""
    if hasattr(model, "towers"):
        fit = functools.partial(_fit_to_mesh, sequence_parallel=sequence_parallel)
        towers = {
            part: fit(tower, image_size, mesh, key=f"{key}.{TOWERS[part]}")
            for part, tower in model.towers.items()
        }
        return model.clone(**towers)
    for name in ("num_heads", "mlp_dim", "tokens_mlp_dim", "channels_mlp_dim"):
        size, parts = getattr(model, name, 0), mesh.shape["tensor"]
        if size % parts:
            raise UserError(f"mesh.tensor={parts} does not divide {key}.{name}={size}")
    if not hasattr(model, "attention"):
        return model
    tokens = getattr(model, "context_length", None)
    if tokens is None:
        tokens = math.prod(model.grid(image_size)) + model.num_prefix_tokens
    rows = getattr(model, "any_size", False)
    if rows:
        tokens -= 1  # The first patch of a column has the size of the image.
    config, device = model.block_config, mesh.devices.flat[0]
    chosen = choose_attention(
        config,
        device,
        model.hidden_size,
        tokens,
        head_shards=mesh.shape["tensor"],
        rows=rows,
        key=key,
    )
    blocks = choose_blocks(config, device, sequence_parallel=sequence_parallel)
    return model.clone(attention=chosen, blocks=blocks)


def _make_objective(
    section: _Section,
    model: Model,
    data: DatasetSpec,
    mesh: Mesh,
    *,
    clock: Clock,
    total_steps: int,
) -> tuple[Objective, _Section]:
    name, make = _by_name(section, OBJECTIVES, "supervised", Objective, key="objective")
    given = {
        "model": model,
        "mesh": mesh,
        "data": data,
        "num_classes": model.num_classes or data.info.num_classes,
        "image_shape": data.image_shape(),
        "view_shapes": data.view_shapes(),
        "same_draws": data.same_draws,
        "clock": clock,
        "total_steps": total_steps,
        "multi_label": data.info.multi_label,
        "class_names": data.info.class_names,
        "pixel_classes": data.info.pixel_classes,
        "pixel_depth": data.info.pixel_depth,
    }
    (args,) = bind(section, make, key="objective", given=tuple(given))
    if data.views and not is_part(name) and "view_shapes" not in keywords(make):
        raise UserError(
            f"data.views with objective.name={name!r}, which takes one image of each record: "
            "expected none, or objective.name='dino'"
        )
    if "unpooled" in getattr(model, "classifier", ""):
        raise UserError(
            f"model.classifier={model.classifier!r} classifies every token; expected 'token', "
            f"'gap' or 'map' for objective.name={name!r}"
        )
    of_labels = make is not make_contrastive
    if isinstance(model, TwoTowers) and of_labels and name in OBJECTIVES:
        raise UserError(
            f"objective.name={name!r} trains a model of images alone: expected 'contrastive' for "
            "model.name='two_towers'"
        )
    if of_labels and data.info.multi_label and args.get("loss") == "softmax":
        raise UserError(
            f"objective.loss='softmax' takes one label an example, and {data} has several: "
            "expected objective.loss='sigmoid'"
        )
    objective = make(**_take(given, make), **args)
    if takes_any_size(model):
        _check_any_size(objective, name, data)
    if (images := data.packing.images_per_row) > 1:
        _check_packing(objective, name, model, images)
    _check_patch_sizes(model, objective, name, data)
    _check_colors(objective, data.image_shape())
    return objective, {"name": name} | args


def _check_any_size(objective: Objective, name: str, data: DatasetSpec) -> None:
    """Raises `UserError` if an objective needs images, where it is given their patches."""
    line = f"data.preprocess={data.preprocess!r} makes patches of images of any size"
    if not objective.takes_any_size:
        raise UserError(
            f"{line}: expected objective.name='supervised' or 'contrastive', and not {name!r}, "
            "which needs images of one size"
        )
    augmentation: Any = getattr(objective, "augmentation", Augmentation())
    changed = [
        field.name
        for field in dataclasses.fields(Augmentation)
        if getattr(augmentation, field.name) != field.default
    ]
    if changed:
        raise UserError(
            f"objective.{changed[0]}={getattr(augmentation, changed[0])}: {line}, which nothing on "
            "the device changes or mixes: expected it left out, or operations of data.preprocess "
            "such as flip_lr and inception_patches"
        )


def _check_colors(objective: Objective, image_shape: tuple[int, ...]) -> None:
    """Raises `UserError` if colours are to change on the device, and images have no colours."""
    augmentation: Any = getattr(objective, "augmentation", None)
    if image_shape[2] == 3 or augmentation is None:
        return
    for key in ("color_jitter", "three_augment"):
        value = getattr(augmentation, key)
        if value and value != (0, 0, 0):
            raise UserError(
                f"objective.{key}={value} is for images of three channels, "
                f"and data.preprocess makes {image_shape[2]}: change colours there, or not at all"
            )


def _check_packing(objective: Objective, name: str, model: Model, images: int) -> None:
    """Raises `UserError` unless the images of an objective and its model may share rows."""
    where = f"data.images_per_row={images}"
    if not objective.takes_rows:
        raise UserError(
            f"{where} with objective.name={name!r}: expected 'supervised', whose loss is one of "
            "each image alone, or one image in a row"
        )
    try:
        model.check_rows(packed=True)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def _check_patch_sizes(model: Model, objective: Objective, name: str, data: DatasetSpec) -> None:
    """Raises `UserError` unless images can be cut into patches of each of `model.patch_sizes`."""
    image_shape = data.image_shape()
    sizes = getattr(model, "patch_sizes", ())
    if sizes and not objective.draws_patch_size:
        raise UserError(
            f"model.patch_sizes={sizes} with objective.name={name!r}: expected 'supervised' or "
            "'distillation', which train with patches of several sizes"
        )
    if sizes and takes_any_size(model):
        raise UserError(
            f"model.patch_sizes={sizes} with data.preprocess={data.preprocess!r}, which makes "
            "patches of one size: expected (), or a line that makes images of one size"
        )
    for size in sizes:
        if any(side % size for side in image_shape[:2]):
            raise UserError(
                f"model.patch_sizes={sizes}: {size} does not divide the images of "
                f"{image_shape[0]}x{image_shape[1]} pixels: expected divisors of both"
            )


def _make_optimizer(
    section: _Section,
    total_steps: int,
    clock: Clock,
    data: DatasetSpec,
    mesh: Mesh,
    strategy: Strategy,
    objective: Objective,
    lora: Lora,
) -> tuple[Optimizer, _Section]:
    gives = (BaseOptimizer, optax.GradientTransformation)
    name, base = _by_name(section, BASE_OPTIMIZERS, "adamw", *gives, key="optimizer")
    given = ("base", "total_steps", "clock", "sharded")
    args, base_args = bind(section, make_optimizer, base, key="optimizer", given=given)
    rules = {
        "freeze": (*args["freeze"], *objective.frozen, *lora.frozen),
        "lr_multipliers": (*args["lr_multipliers"], *objective.lr_multipliers()),
    }
    made = base(**base_args)
    optimizer = make_optimizer(
        base=made if isinstance(made, BaseOptimizer) else BaseOptimizer(made),
        total_steps=total_steps,
        clock=clock,
        sharded=strategy.zero1 or any(mesh.shape[axis] > 1 for axis in ("fsdp", "tensor")),
        **(args | rules),
    )
    if len(objective.lr_multipliers()) > 1 and args["grad_clip_norm"] is not None:
        raise UserError(
            f"optimizer.grad_clip_norm={args['grad_clip_norm']}: expected None, since the heads of "
            "objective.lr_factors are trained as if each were alone, and a norm would be of all"
        )
    for variant in data.variants():
        rows = "" if variant.packing.images_per_row == 1 else " / data.images_per_row"
        if variant.rows_per_batch % optimizer.accum_steps:
            raise UserError(
                f"optimizer.accum_steps={optimizer.accum_steps} does not divide "
                f"data.batch_size{rows}={variant.rows_per_batch}"
            )
        micro_batch = variant.rows_per_batch // optimizer.accum_steps
        check_batch_size(micro_batch, mesh, key="data.batch_size / optimizer.accum_steps")
        objective.check_batch(micro_batch)
    return optimizer, {"name": name} | drop_other_units(args) | base_args


def _make_clock(data: DatasetSpec, epoch_examples: int | None) -> Clock:
    def count() -> int:
        return count_examples(data) if epoch_examples is None else epoch_examples

    return Clock(data.images_per_step, count)


def _total_steps(top: Mapping[str, Any], clock: Clock) -> int:
    lengths = " and ".join(f"{key}={top[key]}" for key in LENGTH)
    found = find_duration(top, LENGTH)
    if found is None:
        raise UserError(f"{lengths}: expected exactly one of them, such as --config.epochs=10")
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
    model: Model,
    objective: Objective,
    mesh: Mesh,
    *,
    every: _Every,
    match_classes: bool,
) -> tuple[tuple[Evaluator, ...], _Section]:
    evaluators, resolved = [], {}
    for name, section in sections.items():
        if section is None:  # --config.evals.NAME=None leaves one out
            continue
        key = f"evals.{name}"
        if name in ("train", "perf") or "/" in name or name.endswith("_ema"):
            raise UserError(f"{key}: {name!r} can't be a name of metrics; try 'val'")
        check_type(section, dict, key=key)
        section, every_given = every(dict(section), key=key)
        kind, make = _by_name(section, EVALUATORS, "classification", Evaluator, key=key)
        given = ("name", "data", "objective", "mesh")
        data_args, args = bind(section, EvalData, make, key=key, given=given)
        data_args["batch_size"] = data_args["batch_size"] or train_data.batch_size
        check_batch_size(data_args["batch_size"], mesh, key=f"{key}.batch_size")
        data = _make_eval_spec(data_args, train_data, key=key)
        _check_eval_images(make, kind, model, data, train_data)
        supplied = {"name": name, "data": data, "objective": objective, "mesh": mesh}
        evaluator = make(**_take(supplied, make), **args)
        if evaluator.needs_labels:
            _check_labels(data, key, str(kind), "=none to leave it out")
        if evaluator.judges_head and match_classes and (other := data_args["data_name"]):
            info, owner, where = train_data.info, str(train_data), f"{key}.data_name"
            check_same_kind(info, data.info, owner, other, key=where)
            evaluator, note = evaluator.match(Classes.of(info, owner), key=where)
            if note:
                log(f"{name}: {note}")
        evaluators.append(evaluator)
        resolved[name] = {"name": kind} | data_args | _as_given(args, every_given)
    return tuple(evaluators), resolved


def _check_eval_images(
    make: Any, kind: Any, model: Model, data: DatasetSpec, train_data: DatasetSpec
) -> None:
    """Raises `UserError` unless an evaluator's line makes images for it and for the model.

    Args:
      make: of the evaluator.
      kind: its name in the config.
      model: as it takes the images of `train_data`.
      data: of the evaluator.
      train_data: what the model is trained on.
    """
    key = f"{data.key}.preprocess"
    if not takes_any_size(model) and not find_patches(data.ops()):
        shape, expected = data.image_shape(), train_data.image_shape()
        if shape != expected and not getattr(make, "takes_any_size", False):
            raise UserError(
                f"{key} gives images of {shape}, data.preprocess of {expected}: expected the same"
            )
        return
    made, expected = (
        "patches of images of any size" if find_patches(spec.ops()) else "images of one size"
        for spec in (data, train_data)
    )
    if made != expected:
        raise UserError(
            f"{key}={data.preprocess!r} makes {made}, and data.preprocess="
            f"{train_data.preprocess!r} {expected}: expected the same of both"
        )
    fit_to_line(model, data.preprocess, key=key)
    if not getattr(make, "takes_patches", True):
        raise UserError(
            f"{data.key}.name={kind!r} needs whole images, and {key}={data.preprocess!r} makes "
            f"patches of images of any size: expected --config.{data.key}=none"
        )


def _make_eval_spec(args: _Section, train_data: DatasetSpec, *, key: str) -> DatasetSpec:
    name = args["data_name"]
    if name is None and train_data.mixture:
        raise UserError(
            f"{key}.data_name is missing: data.mixture is for training, so expected the dataset to "
            "evaluate on"
        )
    return dataclasses.replace(
        train_data,
        name=name or train_data.name,
        split=args["split"],
        preprocess=args["preprocess"],
        batch_size=args["batch_size"],
        mixture=(),
        views=(),
        same_draws=(),
        budgets=(),
        packing=ALONE,
        key=key,
    )


def _find_judge(
    metric: str, evaluators: tuple[Evaluator, ...], ema: bool, *, key: str
) -> Evaluator:
    """The evaluator of a metric such as `val/top1`."""
    judges = {f"{e.name}/{metric}": e for e in evaluators for metric in e.metrics}
    if ema:
        of_average = (e for e in evaluators if e.reads_params)
        judges |= {f"{e.name}_ema/{metric}": e for e in of_average for metric in e.metrics}
    if metric not in judges:
        raise UserError(
            f"{key}={metric!r}: expected a metric of one of the evals: "
            f"{', '.join(sorted(judges)) or 'none'}"
        )
    return judges[metric]


def _check_stop(stop: Stop, evaluators: tuple[Evaluator, ...], ema: bool) -> None:
    if stop.metric is None:
        return
    judge = _find_judge(stop.metric, evaluators, ema, key="stop.metric")
    if not judge.every:
        raise UserError(
            f"stop.metric={stop.metric!r}: evals.{judge.name}.every=0 evaluates at the end only; "
            "expected more, or another metric"
        )


def _make_checkpoint(
    section: _Section, evaluators: tuple[Evaluator, ...], ema: bool, *, every: _Every
) -> tuple[CheckpointOptions, _Section]:
    section, every_given = every(section, key="checkpoint")
    options, args = read_section("checkpoint", section)
    if options.keep_best is None:
        return options, _as_given(args, every_given)
    judge = _find_judge(options.keep_best, evaluators, ema, key="checkpoint.keep_best")
    if not judge.every or options.every % judge.every:
        raise UserError(
            f"checkpoint.every={options.every} with keep_best={options.keep_best!r}: expected a "
            f"multiple of evals.{judge.name}.every={judge.every}, to evaluate each checkpoint"
        )
    return options, _as_given(args, every_given)
