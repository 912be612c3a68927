# SPDX-License-Identifier: Apache-2.0
"""The folder of a run, which belongs to the experiment of its `config.json`."""

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax.checkpoint.listing import is_step, list_steps
from vit_jax.observe.console import log
from vit_jax.observe.jsonl import read_metrics
from vit_jax.utils.bounds import MAX_JSON, open_regular, read_json
from vit_jax.utils.class_names import format_names, read_names
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import write_atomically
from vit_jax.utils.layout import (
    CHECKPOINTS,
    CONFIG,
    LABELS,
    LEDGER,
    LOCK,
    METRICS,
    RUN,
    TEMPERATURE,
)
from vit_jax.utils.metrics import find_best_step
from vit_jax.utils.mirrors import find_mirror
from vit_jax.utils.nested import as_tuples
from vit_jax.utils.suggestions import suggest_workdir

# Files of a run, and how it opens them: those that it continues, and those that it replaces.
_KEPT = {METRICS: "r+b", LEDGER: "r+b", CONFIG: "rb", LABELS: "rb", RUN: "rb"}
# Sections that every config has: without them, a file was emptied or cut.
_REQUIRED = {"model", "data", "optimizer"}
# Seconds to wait for a lock, which a process that only inspects it may hold.
_LOOK_S = 1.0


def read_config(workdir: Path) -> dict[str, Any]:
    """Returns the resolved config of a run, with tuples for the lists of JSON.

    Raises:
      UserError: the workdir has no config that can be read.
    """
    config = find_config(workdir)
    if config is None:
        raise UserError(
            f"--workdir={str(workdir)!r}: there is no {CONFIG} in it; expected the workdir of a "
            f"run{suggest_workdir(workdir)}"
        )
    return as_tuples(config)


def find_config(workdir: Path) -> dict[str, Any] | None:
    """Returns the resolved config of a run as JSON; None if there is none.

    Where `config.json` is missing, empty or damaged, it is the config that the newest checkpoint
    was written with, and this is logged.

    Raises:
      UserError: there is a file that can't be read or holds no config, and no such checkpoint.
    """
    file, config, fault = workdir / CONFIG, None, "is missing"
    try:
        config = read_json(file)
        if isinstance(config, dict) and config.keys() >= _REQUIRED:
            return config
        fault = "holds no whole config"
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        fault = f"can't be read ({type(e).__name__})"
    for step in reversed(list_steps(workdir)):
        record = workdir / CHECKPOINTS / str(step) / RUN
        found = _read_object(record).get("config")
        if isinstance(found, dict) and found.keys() >= _REQUIRED:
            log(f"{file} {fault}: taken from {record} in its place")
            return found
    if isinstance(config, dict) and (kind := _name_foreign(config)):
        raise UserError(
            f"--workdir={str(workdir)!r}: {file} is the config of {kind}, not that of a run: "
            "expected the workdir of a run. To start from the weights beside it, give "
            f"--config.init_from={workdir}; to use them, --checkpoint={workdir}"
        )
    if os.path.lexists(file) and not (isinstance(config, dict) and config):
        raise UserError(
            f"--workdir={str(workdir)!r}: {file} {fault}, and no checkpoint has the config; "
            "expected the workdir of a run, or --config"
        )
    return config


def _name_foreign(config: Mapping[str, Any]) -> str:
    """What the `config.json` of another program describes; empty if that is not known."""
    if config.keys() & _REQUIRED:
        return ""
    if "architecture" in config:
        return f"a timm model, {config['architecture']}"
    if config.keys() & {"architectures", "model_type", "transformers_version"}:
        return f"a Hugging Face model, {config.get('model_type', 'of unknown type')}"
    return ""


def is_workdir(folder: Path) -> bool:
    """Whether a folder looks like the workdir of a run: it has a config or checkpoints."""
    return (folder / CONFIG).exists() or (folder / CHECKPOINTS).is_dir()


def check_files(workdir: Path) -> None:
    """Checks that the files of a run can be used, as far as they exist.

    Raises:
      UserError: one is a folder, a broken link or of another kind, or can't be read and written.
    """
    for name, mode in _KEPT.items():
        path = workdir / name
        try:
            if path.is_symlink() and not path.exists():
                raise OSError(0, f"a link to {os.readlink(path)}, which does not exist")
            if path.exists():
                if not path.is_file():
                    raise OSError(0, "not a file")
                open(path, mode).close()
        except OSError as e:
            raise UserError(
                f"--workdir={str(workdir)!r}: {name} can't be used ({e.strerror}); expected a file "
                "that this user can read and write"
            ) from None


def read_run(workdir: Path) -> dict[str, Any]:
    """Returns the content of `run.json`; empty if it is missing or damaged."""
    return _read_object(workdir / RUN)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_labels(workdir: Path) -> tuple[str, ...] | None:
    """Returns the class names of a run by label; None if they are not known.

    Raises:
      UserError: the file can't be read.
    """
    file = workdir / LABELS
    return (read_names(file, key=str(file)) or None) if file.exists() else None


def write_temperature(workdir: Path, step: int, fitted: Mapping[str, float], data: str) -> None:
    """Writes `temperature.json`: the divisors of the logits of the checkpoint of a step.

    Args:
      workdir: of the run.
      step: of the checkpoint.
      fitted: the temperature of the parameters, `raw`, and of their average, `ema`, if there is.
      data: what they were fitted to, for readers.

    Raises:
      UserError: the file can't be written.
    """
    record = {"step": step, "temperature": dict(fitted), "data": data}
    _replace(workdir / TEMPERATURE, f"{json.dumps(record, indent=1)}\n")
    log(f"wrote {workdir / TEMPERATURE}")


def read_temperature(workdir: Path, step: int, params: str) -> tuple[float, str]:
    """Returns the divisor of the logits that was fitted to a checkpoint, and a note on it.

    It is 1 without a fitted one, or where that is of another checkpoint, which the note says.

    Args:
      workdir: of the run.
      step: of the checkpoint.
      params: "raw" or "ema".

    Raises:
      UserError: the file can't be read.
    """
    file = workdir / TEMPERATURE
    found: Any = None
    value: Any = None
    valid = False
    try:
        found = read_json(file)
        value = found["temperature"].get(params)
        valid = value is None or (not isinstance(value, bool) and 0 < value < math.inf)
        valid = valid and isinstance(found["step"], int)
    except FileNotFoundError:
        return 1.0, ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    if not valid:
        raise UserError(
            f"{file} holds no temperatures: expected what `vit_jax.evaluate --keep_temperature` "
            "writes; remove it to use probabilities as they are"
        )
    if value is None or found["step"] != step:
        what = f"step {found['step']}, {' and '.join(found['temperature'])} parameters"
        return 1.0, f"probabilities: {file} is of {what}, so it is not used"
    return value, f"probabilities: logits are divided by {value:.4g}, fitted to {found.get('data')}"


def find_step(workdir: Path | None, checkpoint: str) -> str:
    """Returns the checkpoint of a step of a run, as a source for `load_pretrained`.

    Args:
      workdir: of the run; None if there is none.
      checkpoint: a step, "last", or "best" by the metric of `checkpoint.keep_best`; anything else
        is returned as it is.

    Raises:
      UserError: there is no such checkpoint.
    """
    if not checkpoint.isdigit() and (workdir is None or checkpoint not in ("last", "best")):
        return checkpoint
    steps = list_steps(workdir) if workdir else []
    if workdir is not None and steps and checkpoint in ("last", "best"):
        step = steps[-1] if checkpoint == "last" else _find_best(workdir, steps)
    elif is_step(checkpoint) and int(checkpoint) in steps:
        step = int(checkpoint)
    else:
        raise UserError(
            f"--checkpoint={checkpoint}: --workdir={workdir} has "
            f"{', '.join(map(str, steps)) or 'no checkpoints'}"
        )
    return str((workdir or Path()) / CHECKPOINTS / str(step))


def _find_best(workdir: Path, steps: Sequence[int]) -> int:
    metric = (read_config(workdir).get("checkpoint") or {}).get("keep_best")
    if metric is None:
        raise UserError(
            f"--checkpoint=best: the run of --workdir={workdir} keeps no best checkpoint, as "
            f"checkpoint.keep_best is not set; expected one of {', '.join(map(str, steps))}"
        )
    values = {r["step"]: r[metric] for r in read_metrics(workdir) if metric in r}
    best = find_best_step({step: values[step] for step in steps if step in values}, metric)
    if best is None:
        raise UserError(
            f"--checkpoint=best: {workdir / METRICS} has no {metric} of the steps "
            f"{', '.join(map(str, steps))}; expected one of them"
        )
    return best


@contextlib.contextmanager
def remove_workdir_on_error(workdir: Path, *, active: bool = True) -> Iterator[None]:
    """Removes a new workdir if a `UserError` ends the block before the config is written.

    Only the ledger and empty folders are removed, by the one process that is `active`.
    """
    existed = os.path.isdir(workdir)
    try:
        used = existed and any(workdir.iterdir())
    except OSError:
        used = True
    try:
        yield
    except UserError:
        written = used or not os.path.isdir(workdir) or (workdir / CONFIG).exists()
        if active and not written and find_holder(workdir) is None:
            (workdir / LEDGER).unlink(missing_ok=True)
            for folder in (workdir / CHECKPOINTS, *([] if existed else [workdir])):
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise


@contextlib.contextmanager
def lock_workdir(workdir: Path, *, active: bool = True) -> Iterator[None]:
    """Locks an existing workdir for a run, in the one process that is `active`.

    The lock ends with the process that holds it, even if killed.

    Raises:
      UserError: another process holds the lock, or there can be none.
    """
    if not active:
        yield
        return
    if (mirror := find_mirror(workdir)) is not None:
        with mirror.lock():
            yield
        return
    path, until = workdir / LOCK, time.monotonic() + _LOOK_S
    while True:
        try:
            file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed below)
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                file.close()
                raise OSError(errno.EINVAL, "it is not a file")
        except OSError as e:
            raise UserError(
                f"--workdir={str(workdir)!r}: {LOCK} can't be opened ({e.strerror}); expected a "
                "file of this user: remove it if no run uses the folder"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file after it was opened here.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except BlockingIOError:
            if time.monotonic() > until:
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "another process"
                file.close()
                raise _make_busy_error(workdir, holder) from None
            time.sleep(_LOOK_S / 20)
        file.close()
    with file:
        with contextlib.suppress(OSError):  # The lock needs no room on the disk, its text does.
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def check_free(workdir: Path) -> None:
    """Raises `UserError` if a process trains in a workdir; takes no lock."""
    if (holder := find_holder(workdir)) is not None:
        raise _make_busy_error(workdir, holder)


def _make_busy_error(workdir: Path, holder: str) -> UserError:
    return UserError(
        f"--workdir={str(workdir)!r} is in use by {holder}; expected one run at a time: wait for "
        "its end, or choose another workdir"
    )


def find_holder(workdir: Path) -> str | None:
    """Returns the process that trains in a workdir, as `process PID on HOST`, or None."""
    if (mirror := find_mirror(workdir)) is not None:
        try:
            return mirror.find_holder()
        except OSError as e:
            raise UserError(f"--workdir={mirror.url}: {e.strerror}") from None
    try:
        with open(open_regular(workdir / LOCK, max_bytes=MAX_JSON), errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
    except OSError:
        pass
    return None


def write_config(workdir: Path, config: dict[str, Any]) -> None:
    """Writes `config.json`.

    Raises:
      UserError: the file can't be written.
    """
    _replace(workdir / CONFIG, json.dumps(config, indent=1, sort_keys=True) + "\n")
    log(f"wrote {workdir / CONFIG}")


def _replace(file: Path, text: str) -> None:
    try:
        write_atomically(file, text)
    except OSError as e:
        raise UserError(
            f"--workdir={str(file.parent)!r}: {file.name} can't be written ({e.strerror}); "
            "expected a folder to write to, with room"
        ) from None


def write_run(workdir: Path, run: Mapping[str, Any]) -> None:
    """Writes `run.json`: the result of `provenance.describe_run` at the newest start of a run.

    Raises:
      UserError: the file can't be written.
    """
    _replace(workdir / RUN, json.dumps(run, indent=1) + "\n")


def write_labels(workdir: Path, class_names: tuple[str, ...] | None) -> None:
    """Writes `labels.txt`, one class name a line, if names are known and it holds none.

    Raises:
      UserError: the file can't be written.
    """
    file = workdir / LABELS
    if class_names is not None and read_labels(workdir) is None:
        _replace(file, format_names(class_names))
        log(f"wrote {file}: {len(class_names)} class names")
