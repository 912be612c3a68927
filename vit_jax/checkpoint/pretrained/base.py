# SPDX-License-Identifier: Apache-2.0
"""The weights that a run with adapters started from, which its checkpoints name and do not hold."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.checkpoint.listing import find_checkpoint
from vit_jax.checkpoint.pretrained.download import cache_path
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.utils.errors import UserError


def describe_base(
    source: str,
    weights: Weights,
    *,
    channels: int,
    adapt: Mapping[str, Any],
    initialised: Sequence[str],
) -> dict[str, Any]:
    """Describes weights, as JSON, such that `find_base` finds them from another folder.

    Args:
      source: as `load.load_pretrained` takes it.
      weights: what it returned.
      channels: of the images of the run.
      adapt: further arguments of `adapt.adapt_params`.
      initialised: paths of frozen parameters that checkpoints hold since the weights lack them.
    """
    place, part = source, ""
    if not os.path.lexists(place) and os.path.lexists(source.rpartition(":")[0]):
        place, _, part = source.rpartition(":")
    if "://" in source:
        place = os.fspath(cache_path(source))
    elif Path(place).is_dir() and not list(Path(place).glob("*.safetensors*")):
        # A run may train on, so this is the checkpoint rather than the workdir.
        place = os.fspath(find_checkpoint(Path(place), items=(part or "params",)))
    if os.path.lexists(place):
        place = os.path.abspath(place)
    name = f"{place}:{part}" if part else place
    return {
        "init_from": source,
        "path": name,
        "sha256": compute_digest(weights.params),
        "channels": channels,
        "adapt": dict(adapt),
        "initialised": list(initialised),
    }


def compute_digest(params: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of parameters by path: their names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for path in sorted(params):
        x = np.ascontiguousarray(params[path])
        digest.update(f"{path} {x.dtype} {x.shape}\n".encode())
        digest.update(x.view(np.uint8).data)
    return digest.hexdigest()


def find_base(base: Mapping[str, Any], folder: Path) -> str:
    """Returns where the base weights of a run are, as `load.load_pretrained` takes it.

    Args:
      base: as `describe_base` made it.
      folder: the checkpoint or the workdir that names them.

    Raises:
      UserError: they are on no disk here, and have no name from which they can be fetched.
    """
    name, source = str(base.get("path", "")), str(base.get("init_from", ""))
    if not os.path.isabs(name) or any(map(os.path.lexists, (name, name.rpartition(":")[0]))):
        return name
    raise UserError(
        f"{folder} holds adapters of {source}, which is not at {name}; expected these weights "
        "there, for the adapters to be added to"
    )


def check_base(weights: Weights, base: Mapping[str, Any], *, where: str) -> None:
    """Checks that weights are those that adapters were trained on.

    Raises:
      UserError: they differ; the message starts with `where`.
    """
    if compute_digest(weights.params) != base.get("sha256"):
        raise UserError(
            f"{where}: these weights are not those that the adapters were trained on, "
            f"{base.get('init_from')} (their checksum differs); expected the same values"
        )
