# SPDX-License-Identifier: Apache-2.0
"""Loads pretrained weights from a name, a URL, a file or a run."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from vit_jax.checkpoint.listing import find_checkpoint
from vit_jax.checkpoint.manager import DESCRIPTION, quiet_reads
from vit_jax.checkpoint.manifest import find_fault, has_manifest
from vit_jax.checkpoint.pretrained.adapt import find_initialised
from vit_jax.checkpoint.pretrained.base import check_base, find_base
from vit_jax.checkpoint.pretrained.catalogue import is_name, load_catalogue
from vit_jax.checkpoint.pretrained.description import check_description
from vit_jax.checkpoint.pretrained.download import fetch, find_missing, resolve
from vit_jax.checkpoint.pretrained.hub import (
    INDEX,
    fetch_repository,
    find_weights,
    is_repository,
    refuse_format,
)
from vit_jax.checkpoint.pretrained.npz import read_npz
from vit_jax.checkpoint.pretrained.peft import CONFIG as ADAPTER_CONFIG
from vit_jax.checkpoint.pretrained.peft import WEIGHTS as ADAPTERS
from vit_jax.checkpoint.pretrained.peft import Adapters, read_adapters
from vit_jax.checkpoint.pretrained.rebuild import (
    MissingError,
    fill_model,
    init_shapes,
    rebuild_model,
)
from vit_jax.checkpoint.pretrained.repositories import suggest_repositories
from vit_jax.checkpoint.pretrained.safetensors import read_safetensors, read_tensors
from vit_jax.checkpoint.pretrained.towers import take_tower
from vit_jax.checkpoint.pretrained.weights import (
    OBJECTIVE_PARAMS,
    Loss,
    Weights,
    check_blocks,
    check_loss,
    check_tokenizer,
    infer_model,
    unstack_blocks,
)
from vit_jax.checkpoint.workdir import read_config, read_labels
from vit_jax.models.lora import KERNEL_SCALE, Lora, merge_adapters, round_base
from vit_jax.models.lora import NAME as LORA
from vit_jax.models.names import guess_variant
from vit_jax.models.two_towers import TOWERS
from vit_jax.utils.bounds import MAX_WEIGHTS, check_growth, check_tree, open_outside, read_json
from vit_jax.utils.class_names import check_names
from vit_jax.utils.errors import UserError, describe_error, first_line
from vit_jax.utils.layout import CHECKPOINTS, CONFIG
from vit_jax.utils.mirrors import find_local
from vit_jax.utils.nested import as_tuples
from vit_jax.utils.registry import bind, is_part
from vit_jax.utils.suggestions import find_near_path
from vit_jax.utils.tree import flatten

_SUBTREE = re.compile(r"(.+):(?!//)([^:]+)")
# What weights can be read from.
KINDS = (
    "a workdir or a checkpoint (runs/digits), a .npz or .safetensors file (weights.npz), a folder "
    "of the Hugging Face hub (vit-base-patch16-224), a URL (https://... or gs://...), or the name "
    "of published weights (augreg:B/16; `vit_jax models` lists them)"
)
# A note on which parameters were read, by the part that was asked for.
_WHICH = {
    "": "the parameters as they are, not their average",
    "ema_params": "the average of the parameters (ema_decay)",
}


# Runs with adapters whose base is a run with adapters, and so on.
_MAX_BASES = 8


def load_pretrained(source: str) -> Weights:
    """Reads pretrained weights; the content of a file decides which layout it has.

    Args:
      source: a workdir or an Orbax checkpoint, a `.npz` or `.safetensors` file, the index of shards
        of the latter, a folder of the Hugging Face hub, `hf:USER/NAME` or `timm:NAME` for a
        repository there, the URL of a file, or a name of the catalogue such as "augreg:B/16".
        `:PART` at the end of a path selects a part: the model in a file or a run of several
        (`siglip.npz:img`), or the average of the parameters of a run (`WORKDIR:ema_params`, and
        `WORKDIR:ema_params/img` of one tower).

    Returns:
      Weights with the shapes of the source; float32 from a `.npz`, else the dtypes of the source.

    Raises:
      UserError: the source is none of these, or is damaged; a parameter is NaN or infinite.
    """
    weights = _load(source, bases=0)
    check_parameters(weights, source)
    return weights


def check_source(source: str) -> None:
    """Checks that a source exists, as far as that is known without reading or downloading it.

    Args:
      source: see `load_pretrained`.

    Raises:
      UserError: no weights have that name, or no file has that path.
    """
    source = find_local(source)
    if find_missing(source) is None and not is_repository(source):
        _find_path(source)


def _find_path(source: str) -> tuple[str, str]:
    """Splits a source that is no repository into its path and the part of the file, or ""."""
    path, part = source, ""
    if (match := _SUBTREE.fullmatch(source)) and not Path(source).exists():
        path, part = match.groups()
    if not (is_name(source) or "://" in path or os.path.lexists(path)):
        raise UserError(f"{source}: there is no such file or folder{_suggest_source(source)}")
    return path, part


def _load(source: str, *, bases: int) -> Weights:
    source = find_local(source)
    if is_repository(source):
        folder = fetch_repository(source)
        if (weights := find_weights(folder)) is None:
            raise UserError(f"{source}: it has no .safetensors file, and no others are read")
        return _read_file(weights, "")
    if resolved := resolve(source):
        path, published = resolved
        weights = _read_file(path, "")
        preprocess = {
            "mean": published.mean,
            "std": published.std,
            "image_size": (published.image_size, published.image_size),
            "eval": published.eval,
        }
        notes = (*weights.notes, *filter(None, [published.note]))
        return dataclasses.replace(weights, preprocess=preprocess, notes=notes)
    if source.startswith(("https://", "http://")):
        return _read_file(fetch(source), "")
    path, part = _find_path(source)
    if not Path(path).is_dir():
        return _read_file(path, part)
    weights = find_weights(Path(path))
    if weights is not None:
        return _read_file(weights, part)
    return read_run(Path(path), part=part, bases=bases)


def _suggest_source(source: str) -> str:
    """Returns which weights are meant by a text that names none, and which kinds there are."""
    variant, near = guess_variant(source), find_near_path(Path(source))
    if near is not None:
        found = [str(near)]
    else:
        # Those of AugReg first, which are recommended for fine-tuning.
        known = sorted(load_catalogue().values(), key=lambda p: not p.name.startswith("augreg:"))
        found = [p.name for p in known if source in (p.name.partition(":")[0], p.model)]
        found = found or [p.name for p in known if p.variant == variant]
        found = suggest_repositories(source, cutoff=0.85) or found
    hint = f"did you mean {' or '.join(map(repr, found[:3]))}? Expected" if found else "expected"
    return f"; {hint} {KINDS}"


def check_parameters(weights: Weights, source: str) -> None:
    """Checks that parameters are numbers with which a model can compute.

    Raises:
      UserError: one is not finite in float32 or of an integer type, or there are no layers.
    """
    bad = []
    for path, x in (weights.params | weights.objective_params).items():
        if not jnp.issubdtype(x.dtype, np.floating):
            if "/" not in path:
                continue  # It is no parameter of a model here.
            raise UserError(f"{source}: {path} is of type {x.dtype}; expected a float type")
        with np.errstate(over="ignore"):
            if not np.isfinite(x.astype(np.float32, copy=False)).all():
                bad.append(path)
    if bad:
        raise UserError(
            f"{source}: {len(bad)} of {len(weights.params)} parameters hold NaN or infinity, "
            f"{bad[0]} among them: the run that wrote them has diverged, or the file is damaged; "
            "expected finite numbers, as in an earlier checkpoint"
        )
    if not weights.model.get("num_layers", 1):
        names = ", ".join(sorted(weights.params)[:4])
        raise UserError(
            f"{source}: there are no layers with names that are known here, but {names}, ...; "
            "expected a whole model"
        )


def _read_file(path: str | Path, part: str) -> Weights:
    file = epath.Path(path)
    if file.name == ADAPTERS and (file.parent / ADAPTER_CONFIG).exists():
        return _read_adapted(file, part)
    try:
        remote = "://" in os.fspath(path)
        with file.open("rb") if remote else open_outside(path, max_bytes=MAX_WEIGHTS) as f:
            start = f.read(16)
    except Exception:  # The reader reports the error; storage raises many types.
        start = None
    if file.name.endswith(INDEX) or (start and start[8:9] == b"{"):
        return read_safetensors(file, part=part)
    # The name decides if the first bytes are of neither kind or can't be read.
    if file.suffix not in (".npz", ".safetensors"):
        refuse_format(file)
        if start is not None and not start.startswith(b"PK"):
            raise UserError(f"{path}: {_describe_start(start)}, not weights; expected {KINDS}")
    if (start or b"").startswith(b"PK") or file.suffix != ".safetensors":
        return read_npz(file, subtree=part)
    return read_safetensors(file, part=part)


def _read_adapted(file: epath.Path, part: str) -> Weights:
    """Reads the base weights that a folder of PEFT names, and adds its adapters to them."""
    try:
        tensors, _ = read_tensors(file)
        config = read_json(file.parent / ADAPTER_CONFIG)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {first_line(error)}; expected adapters of PEFT") from None
    adapters = read_adapters(file, tensors, config if isinstance(config, dict) else {})
    path = _find_adapted(adapters)
    weights = read_safetensors(path, part=part, adapters=adapters)
    return dataclasses.replace(weights, notes=(f"adapters added to {path}", *weights.notes))


def _find_adapted(adapters: Adapters) -> Path:
    """Returns the file of the base weights: a local one, or one of the hub."""
    near = [Path(adapters.base), Path(adapters.file.parent) / adapters.base]
    found = next((path for path in near if path.exists()), None)
    if found is None:
        name = f"hf:{adapters.base}" + (f"@{adapters.revision}" if adapters.revision else "")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", adapters.base):
            raise UserError(
                f"{adapters.file}: its base, {adapters.base}, is not there; expected the folder or "
                f"the repository that base_model_name_or_path in {ADAPTER_CONFIG} names"
            )
        found = fetch_repository(name)
    path = find_weights(found) if found.is_dir() else found
    if path is None or not path.name.endswith((".safetensors", INDEX)):
        raise UserError(f"{adapters.file}: its base, {found}, has no .safetensors file")
    return path


def _describe_start(start: bytes) -> str:
    """What a file holds that is not one of weights, by its first bytes."""
    kinds = {
        b"\xff\xd8\xff": "an image (JPEG)",
        b"\x89PNG": "an image (PNG)",
        b"GIF8": "an image (GIF)",
        b"RIFF": "an image (WebP)",
        b"BM": "an image (BMP)",
        b"%PDF": "a PDF",
    }
    found = [kind for magic, kind in kinds.items() if start.startswith(magic)]
    if found or not start:
        return found[0] if found else "an empty file"
    text = start.decode("ascii", "replace").replace("\n", " ").replace("\t", " ")
    is_text = text.isprintable() and "\ufffd" not in text
    return "a text file" if is_text else f"a file that starts with {start!r}"


def read_run(folder: Path, *, part: str = "", bases: int = 0) -> Weights:
    """Reads the newest checkpoint of a workdir, or one checkpoint.

    Adapters are added to the weights that the run started from, which are read too.

    Args:
      folder: see `load_params`.
      part: "" for the parameters, "ema_params" for their average; or a tower of these, such as
        "img" or "ema_params/img".
      bases: the number of runs whose base this is.

    Returns:
      Weights with the dtypes of the checkpoint.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or it is of another kind of model.
    """
    part, _, tower = part.partition("/")
    if part in TOWERS:
        part, tower = "", part
    tree, described = load_params(folder, item=part or "params")
    flat: dict[str, Any] = flatten(tree)
    # Another program's train state has them below `params`.
    if not part and any(path.startswith("params/") for path in flat):
        flat = {p.removeprefix("params/"): x for p, x in flat.items() if p.startswith("params/")}
    flat = {path: np.asarray(x) for path, x in flat.items()}
    try:
        if "lora" in described:
            run = _find_base(flat, described, folder, bases=bases)
            flat = merge_adapters(round_base(run.params, run.lora) | run.trained, run.lora)
        weights = check_description(_describe(flat, described, folder, part))
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        raise UserError(f"{folder}: its description: {first_line(e)}") from None
    try:
        return take_tower(weights, tower) if tower else weights
    except UserError as e:
        raise UserError(f"{folder}: {e}") from None


@dataclasses.dataclass(frozen=True)
class AdaptedRun:
    """What a run with adapters has trained, and what it is added to.

    Attributes:
      base: the weights that the run started from.
      source: where these are.
      params: of the base, as the run takes them, by path, and those that the run initialised.
      trained: what the checkpoint holds, without stacked blocks: adapters and other trained
        parameters, and frozen ones that the run initialised.
      lora: what they were trained with.
    """

    base: Weights
    source: str
    params: dict[str, np.ndarray]
    trained: dict[str, np.ndarray]
    lora: Lora


def read_adapted_run(folder: Path) -> AdaptedRun:
    """Reads the newest checkpoint of a workdir, or one checkpoint, of a run with adapters.

    Raises:
      UserError: it has no adapters; see `read_run` for others.
    """
    tree, described = load_params(folder)
    if "lora" not in described:
        raise UserError(f"{folder} has no adapters; expected a run with lora.rank")
    trained = {path: np.asarray(x) for path, x in flatten(tree).items()}
    try:
        return _find_base(trained, described, folder, bases=0)
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        raise UserError(f"{folder}: its description: {first_line(e)}") from None


def _find_base(
    trained: dict[str, np.ndarray], described: dict[str, Any], folder: Path, *, bases: int
) -> AdaptedRun:
    if bases == _MAX_BASES:
        raise UserError(f"{folder}: expected at most {_MAX_BASES} runs whose adapters are added up")
    (args,) = bind(as_tuples(described["lora"]), Lora, key="lora")
    lora = Lora(**args)
    stated, known = as_tuples(described["base"]), as_tuples(described["model"])
    source = find_base(stated, folder)
    base = _load(source, bases=bases + 1)
    check_base(base, stated, where=source)
    for size in ("hidden_size", "num_layers", "num_heads", "mlp_dim"):
        if known.get(size) != base.model.get(size):
            raise ValueError(f"{size}={known.get(size)}; {source} has {base.model.get(size)}")
    model = rebuild_model(dataclasses.replace(base, model=known), num_classes=known["num_classes"])
    shape = (*as_tuples(described["preprocess"])["image_size"], stated["channels"])
    # Kernels that the run initialised may be stored in the dtype of its base.
    tree = lora.restore(traverse_util.unflatten_dict(trained, sep="/"))
    held = unstack_blocks(flatten(tree))
    try:
        filled, _ = fill_model(model, base, shape, held=held.keys(), **stated["adapt"])
    except MissingError as e:
        raise UserError(
            f"{folder}: the run has initialised parameters that neither its base {source} nor the "
            f"checkpoint holds: {e.names}; resume the run, which saves them from now on"
        ) from None
    params = flatten(filled)
    params |= {path: held[path] for path in find_initialised(filled)}
    if lora.base == "int8":
        params |= _find_scales(base, known, lora, shape)
    return AdaptedRun(base, source, params, held, lora)


def _find_scales(
    base: Weights, known: dict[str, Any], lora: Lora, image_shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Scales, of ones, of the kernels that a model with adapters stores as int8."""
    described = dataclasses.replace(base, model=known)
    model = rebuild_model(described, run={"lora": lora}, num_classes=known["num_classes"])
    shapes = flatten(init_shapes(model, image_shape)["params"])
    return {
        path: np.ones(x.shape, x.dtype)
        for path, x in shapes.items()
        if path.endswith(f"/{LORA}/{KERNEL_SCALE}")
    }


def _describe(
    flat: dict[str, np.ndarray], described: dict[str, Any], folder: Path, part: str
) -> Weights:
    names = described.get("objective_params", OBJECTIVE_PARAMS)
    own = {path: x for path, x in flat.items() if path.partition("/")[0] in names}
    params = unstack_blocks({path: x for path, x in flat.items() if path not in own})
    check_blocks(params)
    stated = as_tuples(described.get("model", {}))
    model = stated if is_part(stated.get("name")) else infer_model(params)
    if not model:
        names = ", ".join(sorted({path.partition("/")[0] for path in params})[:8])
        raise UserError(f"{folder}: expected a model of this package, but it holds {names}")
    folder = folder.absolute()
    workdir = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder
    return Weights(
        params=params,
        layout="vit_jax checkpoint" if described else "Orbax checkpoint",
        model=model | stated,
        preprocess=as_tuples(described.get("preprocess", {})),
        objective_params=own,
        class_names=_find_class_names(workdir, described),
        loss=_find_loss(workdir, described),
        tokenizer=check_tokenizer(described.get("tokenizer"), str(folder)),
        notes=(_WHICH[part],) if described and part in _WHICH else (),
    )


def _find_class_names(workdir: Path, described: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names in the run's `labels.txt`, or else those in the description of a checkpoint."""
    names = read_labels(workdir)
    return check_names(described.get("class_names"), str(workdir)) if names is None else names


def _find_loss(workdir: Path, described: Mapping[str, Any]) -> Loss | None:
    """The loss in the description of a checkpoint, or else in the config of its run."""
    if "loss" in described or not (workdir / CONFIG).exists():
        return check_loss(described.get("loss"), str(workdir))
    loss = (read_config(workdir).get("objective") or {}).get("loss")
    return loss if loss in get_args(Loss) else None


def load_params(folder: Path, *, item: str = "params") -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the parameters of a run, or of any Orbax checkpoint, onto one local device.

    Args:
      folder: a workdir (its newest checkpoint is read), one of its checkpoints, or a folder into
        which Orbax saved a tree of arrays.
      item: of a checkpoint: "params", or "ema_params" for their average.

    Returns:
      `(params, description)`: a nested dict of arrays with the shapes and dtypes of the checkpoint,
      and the `description` that `CheckpointManager` wrote; empty if another program wrote it.

    Raises:
      UserError: there is no complete checkpoint, or it can't be read.
    """
    items = (item, DESCRIPTION)
    checkpoint = find_checkpoint(folder, items=items)
    path = checkpoint if (checkpoint / "_METADATA").exists() else checkpoint / item
    if not path.is_dir():
        raise UserError(
            f"there is no {path}; expected a whole checkpoint with params, and with ema_params "
            "where ema_decay was set"
        )
    whole = path.parent
    if has_manifest(whole) and (fault := find_fault(whole, items)):
        raise UserError(f"the checkpoint {path} can't be read: {fault}")
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        size = check_tree(path)
        with ocp.StandardCheckpointer() as checkpointer, quiet_reads():
            stored = checkpointer.metadata(path).item_metadata.tree
            leaves = jax.tree.leaves(stored)
            claimed = sum(math.prod(m.shape) * np.dtype(m.dtype).itemsize for m in leaves)
            check_growth(size, claimed)
            abstract = jax.tree.map(
                lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), stored
            )
            params = checkpointer.restore(path, abstract)
        description = checkpoint / DESCRIPTION / "metadata"
        described = read_json(description) if description.exists() else {}
        if not isinstance(described, dict):
            raise ValueError(f"{DESCRIPTION} holds no keys and values")
    except Exception as e:
        raise UserError(
            f"the checkpoint {path} can't be read ({describe_error(e)}); expected a whole one"
        ) from e
    return params, described
