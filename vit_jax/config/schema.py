# SPDX-License-Identifier: Apache-2.0
"""The keys of a config: each with its type, its default, and what else is known of it.

The sections `mesh`, `model`, `objective`, `optimizer`, `adapt` and `evals` are the keyword
arguments of the constructors that they name: the signatures of those are the schema, and
`config/build.py` calls them. The other sections are the fields of the dataclass that is their type
here, so a new one takes a line in `Config` and its dataclass.
"""

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.checkpoint.manager import CheckpointOptions
from vit_jax.data.corrupt import MAX_CORRUPT
from vit_jax.models.lora import Lora
from vit_jax.observe.divergence import POLICIES
from vit_jax.observe.early_stopping import Stop
from vit_jax.observe.profiler import Profile
from vit_jax.observe.trackers import Tracking
from vit_jax.optim.averages import EmaWarmup
from vit_jax.runtime.watchdog import Limits
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import bind, check_type, lookup

# Not in a config: the records that the data holds, which `resume.allow` can name too.
CONTENT = "data.content"


def key(
    default: Any = dataclasses.MISSING,
    *,
    may_change: bool = False,
    per_host: bool = False,
    old: Sequence[str] | Mapping[str, str] = (),
) -> Any:
    """A key of a config, or a section.

    Args:
      default: a value; a class, to be called without arguments; or none for a required key.
      may_change: whether a run that resumes may have another value, because it does not decide
        what is trained; of a section, for all of its keys.
      per_host: whether the processes of a job may have different values.
      old: the key's names in configs of google-research/vision_transformer; of a section, such
        names of the keys in it.
    """
    metadata = {"may_change": may_change, "per_host": per_host, "old": old}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The section `data`: the training data, see `data.pipeline.DatasetSpec`."""

    batch_size: int = key(old=["batch"])
    preprocess: str = key(old=["pp"])
    name: str | None = key(None, old=["dataset"])
    split: str | None = None
    mixture: tuple[tuple[str, str, float], ...] = ()
    repeats: int = 1
    shuffle_window: int = 0
    views: tuple[tuple[str, int, str], ...] = ()
    same_draws: tuple[str, ...] = ()
    tokenizer: str | None = None
    budgets: tuple[tuple[int, int], ...] = ()
    images_per_row: int = 1
    size_spread: float = 1.0
    drop_patches: tuple[float, float] = (0.0, 0.0)
    data_dir: str | None = key(None, may_change=True, per_host=True, old=["tfds_data_dir"])
    num_threads: int | None = key(None, may_change=True, per_host=True)
    max_corrupt: float = key(MAX_CORRUPT, may_change=True)
    max_ram_gb: float | None = key(None, may_change=True, per_host=True)

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 0:
            raise UserError(f"data.num_threads={self.num_threads}: expected 0 or more, or None")
        if self.batch_size < 1:
            raise UserError(f"data.batch_size={self.batch_size}: expected 1 or more")
        if not 1 <= self.repeats <= self.batch_size:
            raise UserError(
                f"data.repeats={self.repeats}: expected 1 to data.batch_size={self.batch_size}"
            )
        if self.shuffle_window < 0:
            raise UserError(
                f"data.shuffle_window={self.shuffle_window}: expected a number of records, or 0 to "
                "shuffle all"
            )
        if not 0 <= self.max_corrupt <= 1:
            raise UserError(f"data.max_corrupt={self.max_corrupt}: expected a fraction, 0 to 1")
        if self.mixture and (self.name, self.split) != (None, None):
            raise UserError(
                f"data.mixture and data.name={self.name!r}, data.split={self.split!r}: expected "
                "either a mixture or a name and a split"
            )
        for name in () if self.mixture else ("name", "split"):
            if getattr(self, name) is None:
                raise UserError(f"data.{name} is missing, and has no default")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalData:
    """The keys of an evaluator's data; its folder is that of `data`, and its name by default."""

    split: str
    preprocess: str
    data_name: str | None = None
    batch_size: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume:
    """What may differ when a run resumes.

    Attributes:
      allow: keys or sections of the config that may differ from what the workdir was started with,
        although the result is then that of neither config; `data.content` for other records. A
        text may hold several, separated by commas.
    """

    allow: tuple[str, ...] | str = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys, one by one."""
        given = self.allow.split(",") if isinstance(self.allow, str) else self.allow
        return tuple(key.strip().removeprefix("config.") for key in given if key.strip())

    def allows(self, key: str) -> bool:
        """Whether a key, or a section that it is in, may differ."""
        return any(key == k or key.startswith(f"{k}.") for k in self.keys)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The top level of a config.

    Raises:
      UserError: a value is out of its range.
    """

    model: dict = key(old={"model_name": "variant"})
    data: Data = key()
    optimizer: dict = key(
        old={
            "accum_steps": "accum_steps",
            "base_lr": "lr",
            "decay_type": "schedule",
            "grad_norm_clip": "grad_clip_norm",
            "optim_dtype": "momentum_dtype",
            "warmup_steps": "warmup_steps",
        }
    )
    seed: int = 0
    precision: str | None = None
    total_steps: int | None = key(None, may_change=True, old=["steps"])
    epochs: float | None = key(None, may_change=True)
    examples: float | None = key(None, may_change=True)
    mesh: dict = key(dict, may_change=True)
    objective: dict = key(dict)
    ema_decay: float | None = None
    ema_warmup: EmaWarmup = "count"
    on_divergence: str = key("stop", may_change=True)
    max_loss: float | None = key(None, may_change=True)
    init_from: str | None = key(None, may_change=True, old=["model_or_filename", "pretrained_dir"])
    adapt: dict = key(dict, may_change=True)
    lora: Lora = key(Lora)
    checkpoint: CheckpointOptions = key(
        CheckpointOptions, may_change=True, old={"checkpoint_every": "every"}
    )
    evals: dict = key(
        dict, may_change=True, old={"batch_eval": "NAME.batch_size", "eval_every": "NAME.every"}
    )
    stop: Stop = key(Stop, may_change=True)
    log_every: int | None = key(None, may_change=True, old=["progress_every"])
    profile: Profile = key(Profile, may_change=True)
    resume: Resume = key(Resume, may_change=True)
    tracking: Tracking = key(Tracking, may_change=True)
    watchdog: Limits = key(Limits, may_change=True)

    def __post_init__(self) -> None:
        # JAX makes a key of 32 bits.
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}: expected 0 to {2**32 - 1}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay}: expected 0 <= value < 1, or None")
        lookup(dict.fromkeys(POLICIES), self.on_divergence, key="on_divergence")
        if self.max_loss is not None and self.max_loss <= 0:
            raise UserError(f"max_loss={self.max_loss}: expected more than 0, or None")
        if self.log_every is not None and self.log_every < 1:
            raise UserError(f"log_every={self.log_every}: expected at least 1")


# All keys that this module describes, by their dotted names, and those of them that are sections.
_FIELDS = {field.name: field for field in dataclasses.fields(Config)}
SECTIONS = [
    name for name, f in _FIELDS.items() if f.type is dict or dataclasses.is_dataclass(f.type)
]
_FIELDS |= {f"data.{field.name}": field for field in dataclasses.fields(Data)}


def _find_old_names() -> dict[str, str]:
    names = {}
    for name, field in _FIELDS.items():
        old = field.metadata.get("old", ())
        if isinstance(old, Mapping):
            names |= {theirs: f"{name}.{ours}" for theirs, ours in old.items()}
        else:
            names |= dict.fromkeys(old, name)
    return names


# Keys of google-research/vision_transformer configs, and where their values are here.
RENAMED = _find_old_names()


def may_change(key: str) -> bool:
    """Whether a run that resumes may have another value of a dotted key."""
    # Each unit of a duration is a key of its own, such as log_every_epochs.
    top = re.sub(r"_every_(epochs|examples|percent)$", "_every", key.partition(".")[0])
    fields = (_FIELDS.get(name) for name in (key, top))
    return any(field is not None and field.metadata.get("may_change") for field in fields)


def per_host_keys() -> list[str]:
    """The dotted keys whose values may differ between the processes of a job."""
    return [name for name, field in _FIELDS.items() if field.metadata.get("per_host")]


def top_level(**values: Any) -> None:
    """Has the signature of a config as it is written: a section is a dict, or None."""


def _write_signature() -> inspect.Signature:
    parameters = []
    for name in (field.name for field in dataclasses.fields(Config)):
        field = _FIELDS[name]
        required = field.default is field.default_factory is dataclasses.MISSING
        annotation, default = field.type, inspect.Parameter.empty if required else field.default
        if name in SECTIONS:
            annotation, default = (dict, default) if required else (dict | None, None)
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))
    return inspect.Signature(parameters)


_SIGNATURE = _write_signature()
top_level.__signature__ = _SIGNATURE


# Keys that are meant by a value that is given to their whole section.
_MEANT = {
    "model": "--config.model.variant or --config.model.name",
    "data": "--config.data.name",
    "optimizer": "--config.optimizer.name",
    "objective": "--config.objective.name or --config.objective.loss",
    "lora": "--config.lora.rank",
    "mesh": "--config.mesh.data, --config.mesh.fsdp or --config.mesh.tensor",
    "checkpoint": "--config.checkpoint.every or --config.checkpoint.keep",
    "tracking": "--config.tracking.trackers",
    "resume": "--config.init_from to start from other weights; a run resumes from its own "
    "--workdir",
}


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the top level with all defaults; a section is a dict of what was given.

    Raises:
      UserError: an unknown key, a missing one, or a value of the wrong type.
    """
    for name in config:
        if name in RENAMED:
            raise UserError(f"unknown config key {name}; did you mean '--config.{RENAMED[name]}'?")
        if name in SECTIONS:
            try:
                check_type(config[name], _SIGNATURE.parameters[name].annotation, key=name)
            except UserError as e:
                meant = _MEANT.get(name, f"--config.{name}.KEY=VALUE")
                raise UserError(f"{e}: set {meant}") from None
    (top,) = bind(config, top_level, key="")
    return {k: dict(v or {}) if k in SECTIONS else v for k, v in top.items()}


def read_section(name: str, section: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A section as the dataclass that `Config` has for it, and as a dict with all defaults.

    Raises:
      UserError: an unknown key, a missing one, or a value that does not fit.
    """
    make: Any = _FIELDS[name].type
    (args,) = bind(section, make, key=name)
    return make(**args), args
