# SPDX-License-Identifier: Apache-2.0
"""Describes what a run would do, and writes nothing."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax.checkpoint.manager import choose_checkpoint
from vit_jax.checkpoint.pretrained.download import find_missing
from vit_jax.checkpoint.workdir import check_free, read_run
from vit_jax.config.build import build_parts, count_examples
from vit_jax.config.load import trust_config
from vit_jax.config.pins import find_pins, use_pins
from vit_jax.config.reduced import without_mesh
from vit_jax.data.fingerprint import fingerprint
from vit_jax.data.pipeline import DatasetSpec, plan_buffers
from vit_jax.data.sources.tfds import NotPreparedError, preparing_nothing
from vit_jax.observe.divergence import read_rollbacks, skip_past
from vit_jax.observe.provenance import describe_run
from vit_jax.observe.trackers import check_trackers
from vit_jax.parallel.mesh import process_shards
from vit_jax.runtime.processes import fail_together
from vit_jax.training.experiment import Experiment
from vit_jax.training.resume import check_data, open_workdir
from vit_jax.utils import layout, tree
from vit_jax.utils.errors import UserError, name_key
from vit_jax.utils.mirrors import find_folder
from vit_jax.utils.nested import flatten_config
from vit_jax.utils.text import describe_size

# The examples of an epoch, where their number is not known before the data is prepared.
_UNKNOWN = 10**6


def describe_dry_run(config: ConfigDict | Mapping[str, Any], workdir: str) -> list[str]:
    """Returns the resolved config and what `training.run.train` would do, as lines of text.

    No file is written or downloaded, and no dataset is prepared.

    Raises:
      UserError: the run would be refused.
    """
    trust_config(config)
    with preparing_nothing():
        with fail_together():
            workdir = os.fspath(find_folder(workdir))
            if pins := find_pins(config, Path(workdir)):
                config = use_pins(config, pins)
            known = True
            try:
                experiment = Experiment.from_config(config)
            except NotPreparedError:
                experiment, known = Experiment.from_config(config, epoch_examples=_UNKNOWN), False
            check_trackers(experiment.settings.tracking)
            experiment.check()
            folder = open_workdir(
                workdir,
                experiment.config,
                experiment.train_data.info.class_names,
                experiment.settings.resume,
                resolve=lambda config: build_parts(without_mesh(config)).config,
                total_steps=experiment.total_steps if known else None,
                dry_run=True,
            )
            check_free(folder)
        saved, _ = choose_checkpoint(folder.absolute() / layout.CHECKPOINTS)
        with fail_together():
            rows = {
                **_describe_devices(experiment),
                **_describe_model(experiment),
                **dict(_describe_data(experiment)),
                **_describe_weights(experiment, saved),
                **_describe_steps(experiment, folder, saved, known=known),
            }
            if saved is not None:
                _check_records(experiment, folder, saved)
    width = max(map(len, rows))
    keys = flatten_config(experiment.config)
    return [
        "the config, with all defaults:",
        *(f"  config.{key} = {value!r}" for key, value in sorted(keys.items())),
        "the run:",
        *(f"  {name:<{width}}  {text}" for name, text in rows.items()),
        *_list_files(experiment, folder),
        "dry run: nothing was written",
    ]


def _describe_devices(experiment: Experiment) -> dict[str, str]:
    mesh = experiment.mesh
    kinds = Counter(device.device_kind for device in mesh.devices.flat)
    devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    processes = jax.process_count()
    return {
        "devices": f"{devices} in {processes} process{'es' * (processes > 1)}",
        "mesh": ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
    }


def _describe_model(experiment: Experiment) -> dict[str, str]:
    params = experiment.abstract_state.params
    _, frozen = experiment.optimizer.rules.split(params)
    fixed = f", of which {tree.count(frozen):,} are frozen" if frozen else ""
    return {
        "model": f"{experiment.config['model']['name']}, {tree.count(params):,} parameters{fixed}"
    }


def _describe_data(experiment: Experiment) -> Iterator[tuple[str, str]]:
    shards, num_shards = process_shards(experiment.mesh)
    specs = {"train": (experiment.train_data, "")}
    for evaluator in experiment.evaluators:
        with contextlib.suppress(NotPreparedError):
            evaluator.open()
        when = f"every {evaluator.every:,} steps" if evaluator.every else "after the last step"
        specs[evaluator.name] = (evaluator.data, f", {when}")
    for name, (spec, when) in specs.items():
        memory = plan_buffers(spec, num_shards=num_shards, shards=len(shards)).nbytes
        shape = "x".join(map(str, spec.image_shape()))
        yield (
            f"{name} data",
            f"{_describe_split(spec, train=name == 'train')}, {_describe_content(spec)}, "
            f"batches of {spec.batch_size:,} of {shape}, {describe_size(memory)} of memory{when}",
        )


def _describe_content(spec: DatasetSpec) -> str:
    tokenizer = spec.find_tokenizer()
    found = [f"{spec.info.num_classes:,} classes"] * bool(spec.info.num_classes)
    found += [f"captions as {tokenizer.describe()}"] if tokenizer else []
    return " and ".join(found) or "no labels"


def _describe_split(spec: DatasetSpec, *, train: bool) -> str:
    what = str(spec) if spec.mixture else f"{spec.name} {spec.split}"
    try:
        count = count_examples(spec) if train else len(spec.open())
    except NotPreparedError as e:
        return f"{what}, whose size is not known: {e}, which the run does first"
    return f"{what}, {count:,} images"


def _describe_weights(experiment: Experiment, saved: int | None) -> dict[str, str]:
    """Checks the weights that a run begins with, and its teachers, as far as they are here."""
    settings, rows = experiment.settings, {}
    teacher = settings.objective.get("teacher")
    if isinstance(teacher, str) and (url := find_missing(teacher)):
        rows["teacher"] = f"{teacher}, to be downloaded from {url}"
    else:
        for number, note in enumerate(experiment.objective.notes()):
            rows[f"note {number + 1}"] = note
    if saved is not None:
        return rows
    gram = settings.objective.get("gram_teacher")
    if isinstance(gram, str):
        try:
            url = find_missing(gram)
        except UserError as e:
            raise name_key("objective.gram_teacher", gram, e) from e
        if url:
            rows["gram_teacher"] = f"{gram}, to be downloaded from {url}"
        else:
            experiment.objective.load_params()
    if settings.init_from is None:
        return rows
    try:
        url = find_missing(settings.init_from)
    except UserError as e:
        raise name_key("init_from", settings.init_from, e) from e
    if url:
        return rows | {"init_from": f"{settings.init_from}, to be downloaded from {url}"}
    if read := experiment.read_init_from():
        weights, notes = read
        rows["init_from"] = "; ".join([f"{settings.init_from} ({weights.layout})", *notes])
    return rows


def _describe_steps(
    experiment: Experiment, folder: Path, saved: int | None, *, known: bool
) -> dict[str, str]:
    options, total = experiment.settings.checkpoint, experiment.total_steps
    best = f" and the best by {options.keep_best}" if options.keep_best else ""
    rows = {"checkpoints": f"every {options.every:,} steps, the newest {options.keep}{best} kept"}
    if not known:
        steps = "not known before the data is prepared"
    elif (saved or 0) >= total:
        steps = f"none: the run is at step {saved:,} of {total:,}"
    else:
        start = skip_past(saved or 0, read_rollbacks(folder))
        steps = f"{start + 1:,} to {total:,}"
        try:
            images = (total - start) * experiment.train_data.batch_size
            epochs = images / experiment.train_data.repeats / count_examples(experiment.train_data)
            steps += f", {epochs:.3g} epochs"
        except NotPreparedError:
            pass
    where = "exists" if folder.exists() else "is made"
    resumes = f"{folder} {where}; the run starts from the beginning"
    if saved is not None:
        ended = known and saved >= total
        what = "its newest checkpoint is" if ended else "the run resumes from its checkpoint"
        resumes = f"{folder} exists; {what} of step {saved:,}"
    return {"steps": steps, **rows, "workdir": resumes}


def _check_records(experiment: Experiment, folder: Path, saved: int) -> None:
    """Raises `UserError` if the run can't resume with the records of its data."""
    train_data = experiment.train_data
    data = fingerprint(train_data.open(), train_data.find_tokenizer())
    before = read_run(folder / layout.CHECKPOINTS / str(saved))
    now = describe_run(experiment.config, data=data)
    check_data(str(folder), before, now, experiment.settings.resume)


def _list_files(experiment: Experiment, folder: Path) -> list[str]:
    """The files that a run writes."""
    names = [layout.CONFIG, layout.RUN, layout.METRICS, layout.LEDGER, layout.REPORT]
    if experiment.train_data.info.class_names is not None:
        names.append(layout.LABELS)
    names += [f"{layout.CHECKPOINTS}/STEP/", f"{layout.TENSORBOARD}/"]
    if experiment.evaluators:
        names.append(f"{layout.EVALS}/")
    return [f"  files in {folder}: {', '.join(names)}"]
