# SPDX-License-Identifier: Apache-2.0
"""All keys that a config can have, to find the one that is meant by an unknown key."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vit_jax.checkpoint.pretrained.adapt import adapt_params
from vit_jax.config.schema import Config, EvalData
from vit_jax.evaluators.kinds import EVALUATORS
from vit_jax.models.variants import MODELS, OF_BOTH_TOWERS, TOWER_MAKERS
from vit_jax.objectives.kinds import OBJECTIVES
from vit_jax.optim.base_optimizers import BASE_OPTIMIZERS
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.parallel.mesh import make_mesh
from vit_jax.parallel.sharding import Strategy
from vit_jax.utils.durations import duration_keys
from vit_jax.utils.errors import UnknownKeyError, UserError
from vit_jax.utils.registry import keywords
from vit_jax.utils.suggestions import suggest_key


@dataclasses.dataclass(frozen=True)
class _Section:
    """A section whose keys are the arguments of constructors.

    Attributes:
      shared: constructors that always take part.
      choices: constructors of which `name` chooses one.
      given: arguments that no config sets.
      more: keys that are read before the constructors are called.
    """

    shared: tuple[Callable, ...] = ()
    choices: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    given: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    def list_keys(self) -> dict[str, tuple[str, ...]]:
        """Returns the names of the parts that take a key by key; () where all do."""
        found: dict[str, list[str]] = {}
        for name, make in self.choices.items():
            for key in keywords(make):
                found.setdefault(key, []).append(name)
        owners = {k: () if len(v) == len(self.choices) else tuple(v) for k, v in found.items()}
        owners |= {key: () for make in self.shared for key in keywords(make)}
        owners = {key: names for key, names in owners.items() if key not in self.given}
        more = (*self.more, *(["name"] if self.choices else []))
        return owners | dict.fromkeys(more, ())


_SECTIONS = {
    "mesh": _Section((make_mesh, Strategy), given=("devices",), more=("rules",)),
    "model": _Section(choices=MODELS, given=("constrain", "float8", "lora")),
    "objective": _Section(
        choices=OBJECTIVES,
        given=(
            *("model", "mesh", "data", "num_classes", "image_shape", "view_shapes", "clock"),
            *("total_steps", "multi_label", "class_names"),
        ),
    ),
    "optimizer": _Section(
        (make_optimizer,), BASE_OPTIMIZERS, given=("base", "total_steps", "clock", "sharded")
    ),
    "adapt": _Section((adapt_params,), given=("target_grid", "num_class_tokens")),
    "evals": _Section((EvalData,), EVALUATORS, given=("name", "data", "objective", "mesh")),
}


def list_keys(evaluators: tuple[str, ...] = ("NAME",)) -> dict[str, tuple[str, ...]]:
    """Returns all keys of a config, dotted.

    Args:
      evaluators: the names of its evaluators.

    Returns:
      For each key the names of the parts that take it, where `name` of its section chooses the
      part and not all parts take it; else nothing.
    """
    keys: dict[str, tuple[str, ...]] = {}
    for field in dataclasses.fields(Config):
        if field.name in _SECTIONS:
            own = _SECTIONS[field.name].list_keys()
            names = evaluators if field.name == "evals" else ("",)
            sections = [f"{field.name}.{name}".rstrip(".") for name in names]
        elif dataclasses.is_dataclass(field.type):
            make: Any = field.type
            own, sections = dict.fromkeys(keywords(make), ()), [field.name]
        else:
            own, sections = {field.name: ()}, [""]
        for section in sections:
            keys |= {f"{section}.{key}".lstrip("."): names for key, names in own.items()}
    for section, make in TOWER_MAKERS.items():
        own = [key for key in keywords(make) if key not in OF_BOTH_TOWERS]
        keys |= {f"model.{section}.{key}": ("two_towers",) for key in own}
    # A period can have other units.
    periods = [key for key in keys if key.rpartition(".")[2] in ("every", "log_every")]
    for key in periods:
        keys |= dict.fromkeys(duration_keys(key), ())
    return keys


@contextlib.contextmanager
def suggesting_keys(config: Mapping[str, Any]) -> Iterator[None]:
    """Adds to an `UnknownKeyError` the key of the whole config that is meant.

    Raises:
      UserError: in place of that error.
    """
    try:
        yield
    except UnknownKeyError as e:
        evals = config.get("evals")
        names = tuple(evals) if isinstance(evals, Mapping) and evals else ("NAME",)
        hint = suggest_key(e.key, e.allowed, list_keys(names), below=e.below)
        raise UserError(f"{e.message}{hint}") from None
