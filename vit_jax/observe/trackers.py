# SPDX-License-Identifier: Apache-2.0
"""Experiment trackers beside the files of a run: Weights & Biases and MLflow.

Each runs in its own thread, so that one that is slow or fails never delays training. A failure is
logged once, and the tracker is dropped. Keys and addresses are read from the environment only.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import netrc
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from vit_jax.observe.console import log
from vit_jax.utils.bounds import read_json
from vit_jax.utils.errors import UserError, first_line
from vit_jax.utils.files import write_atomically
from vit_jax.utils.layout import TRACKERS_FILE
from vit_jax.utils.nested import flatten_config
from vit_jax.utils.registry import find_part, is_part
from vit_jax.utils.text import printable

# Calls that may wait for a tracker, and seconds that it may take at the end.
_MAX_WAITING = 2000
_END_S = 30.0
# Limits of MLflow: characters of a parameter, and entries of a request.
_VALUE, _ENTRIES = 500, 100
_OFFLINE = ("offline", "disabled", "dryrun")

Status = Literal["FINISHED", "FAILED", "KILLED"]
Histogram = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracking:
    """What is recorded of a run besides metrics, and the trackers that receive it.

    Attributes:
      trackers: names in `TRACKERS`; a text may hold several, separated by commas.
      project: the project of Weights & Biases, or experiment of MLflow.
      run: name of the run in trackers; by default that of the workdir.
      images: number of images of the first batch to record, after augmentation; 0 for none.
      histograms_every: steps between histograms of the parameters; 0 for none.
    """

    trackers: tuple[str, ...] | str = ()
    project: str = "vit_jax"
    run: str | None = None
    images: int = 16
    histograms_every: int = 0

    def __post_init__(self) -> None:
        for name in self.names:
            find_part(TRACKERS, name, key="tracking.trackers")
        for key in ("images", "histograms_every"):
            if getattr(self, key) < 0:
                raise UserError(f"tracking.{key}={getattr(self, key)}: expected at least 0")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the trackers, each once."""
        given = self.trackers.split(",") if isinstance(self.trackers, str) else self.trackers
        return tuple(dict.fromkeys(name.strip() for name in given if name.strip()))


class Tracker(Protocol):
    """Receives records, in the thread that created it. All methods may raise."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def write_images(self, step: int, name: str, picture: np.ndarray) -> None:
        """Records a picture, uint8 `[height, width, 3]`."""

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Records counts `[n]` and edges `[n + 1]` of bins by name, any numeric dtype."""

    def close(self, status: Status) -> None: ...


class WandbTracker:
    """Weights & Biases, configured by its variables such as WANDB_MODE."""

    def __init__(self, tracking: Tracking, workdir: Path, config: Mapping[str, Any]):
        wandb: Any = importlib.import_module("wandb")
        self._wandb = wandb
        run_id = _read_state(workdir).get("wandb") or uuid.uuid4().hex[:12]
        self._run: Any = wandb.init(
            project=tracking.project,
            name=_name_run(tracking, workdir),
            id=run_id,
            resume="allow",
            dir=str(workdir),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )
        # Its own counter refuses steps that a resumed run repeats.
        self._run.define_metric("*", step_metric="step")
        _write_state(workdir, "wandb", run_id)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def write_images(self, step: int, name: str, picture: np.ndarray) -> None:
        self._run.log({"step": step, name: self._wandb.Image(picture)})

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        values = {k: self._wandb.Histogram(np_histogram=v) for k, v in histograms.items()}
        self._run.log({"step": step, **values})

    def close(self, status: Status) -> None:
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)


class MlflowTracker:
    """MLflow at MLFLOW_TRACKING_URI, which has no histograms."""

    def __init__(self, tracking: Tracking, workdir: Path, config: Mapping[str, Any]):
        entities: Any = importlib.import_module("mlflow.entities")
        self._entities = entities
        self._client: Any = importlib.import_module("mlflow.tracking").MlflowClient()
        self._id: str = _read_state(workdir).get("mlflow") or ""
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(tracking.project)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(tracking.project)
        )
        run = self._client.create_run(experiment, run_name=_name_run(tracking, workdir))
        self._id = run.info.run_id
        _write_state(workdir, "mlflow", self._id)
        params = [entities.Param(k, str(v)[:_VALUE]) for k, v in config.items()]
        for start in range(0, len(params), _ENTRIES):
            self._client.log_batch(self._id, params=params[start : start + _ENTRIES])

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        values = [self._entities.Metric(k, v, now, step) for k, v in metrics.items()]
        self._client.log_batch(self._id, metrics=values)

    def write_images(self, step: int, name: str, picture: np.ndarray) -> None:
        self._client.log_image(self._id, picture, artifact_file=f"{name}_{step}.png")

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        pass

    def close(self, status: Status) -> None:
        self._client.set_terminated(self._id, status=status)


TRACKERS: dict[str, Callable[[Tracking, Path, Mapping[str, Any]], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}


def check_trackers(tracking: Tracking) -> None:
    """Checks, without a network, that trackers are installed and have a key.

    Raises:
      UserError: a tracker is not installed, or would ask for a key.
    """
    for name in (name for name in tracking.names if not is_part(name)):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"tracking.trackers: {name!r} is not installed: pip install 'vit_jax[{name}]'"
            )
    mode = os.environ.get("WANDB_MODE", "")
    if "wandb" in tracking.names and mode not in _OFFLINE and not _has_wandb_key():
        raise UserError(
            "tracking.trackers: 'wandb' has no key: expected WANDB_API_KEY, or `wandb login` "
            "before, or WANDB_MODE=offline"
        )


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rpartition("://")[2]
    try:
        file = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return host.partition("/")[0].partition(":")[0] in file.hosts


class Background:
    """Runs a tracker in a thread, in which `make` creates it."""

    def __init__(self, name: str, make: Callable[[], Tracker]):
        self._name, self._make, self._dropped = name, make, False
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[Tracker], None]) -> None:
        """Queues a call with the tracker, and returns at once."""
        if self._dropped:
            return
        try:
            self._calls.put_nowait(function)
        except queue.Full:
            self._drop(f"falls behind: {_MAX_WAITING} records wait")

    def close(self, status: Status) -> None:
        """Waits for the queued calls, for a limited time."""
        self.call(lambda tracker: tracker.close(status))
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(None)
        self._thread.join(_END_S)
        if self._thread.is_alive() and not self._dropped:
            self._drop(f"did not finish within {_END_S:.0f} s")

    def _work(self) -> None:
        try:
            tracker = self._make()
            while (function := self._calls.get()) is not None:
                if self._dropped:
                    return
                function(tracker)
        except BaseException as e:  # Some libraries exit instead of raising.
            self._drop(f"failed ({type(e).__name__}: {first_line(e)})")

    def _drop(self, why: str) -> None:
        if not self._dropped:
            self._dropped = True
            log(f"tracker {self._name} {why}: continues without it")


class Trackers:
    """All trackers of a run; none unless `active`, on one process.

    A context manager, which reports how the run ended.
    """

    def __init__(
        self, tracking: Tracking, workdir: Path, config: Mapping[str, Any], *, active: bool
    ):
        values = make_hyperparameters(config)
        self._all = [
            Background(name, functools.partial(make, tracking, workdir, values))
            for name in (tracking.names if active else ())
            for make in [find_part(TRACKERS, name, key="tracking.trackers")]
        ]

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        status: Status = "FINISHED" if kind is None else "FAILED"
        if kind is not None and kind.__name__ in ("Preempted", "Interrupted", "KeyboardInterrupt"):
            status = "KILLED"
        for tracker in self._all:
            tracker.close(status)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends a record to all trackers."""
        self._call_all(lambda t: t.write(step, metrics))

    def write_images(self, step: int, name: str, picture: np.ndarray) -> None:
        """Sends a picture, uint8 `[height, width, 3]`, to all trackers."""
        self._call_all(lambda t: t.write_images(step, name, picture))

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Sends histograms by name to all trackers; see `Tracker`."""
        self._call_all(lambda t: t.write_histograms(step, histograms))

    def _call_all(self, function: Callable[[Tracker], None]) -> None:
        for tracker in self._all:
            tracker.call(function)


def make_hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a config by dotted key: numbers, booleans and text, without None."""
    flat = {k: v for k, v in flatten_config(config).items() if v is not None and v != {}}
    return {k: v if isinstance(v, int | float) else printable(v) for k, v in flat.items()}


def tile(images: np.ndarray) -> np.ndarray:
    """Arranges images in a square grid, whose last cells may be black.

    Args:
      images: `[n, height, width, channels]`, any dtype.

    Returns:
      `[rows * height, columns * width, channels]`, of the same dtype.
    """
    count, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    picture = np.zeros((rows * columns, height, width, channels), images.dtype)
    picture[:count] = images
    picture = picture.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return picture.reshape(rows * height, columns * width, channels)


def _name_run(tracking: Tracking, workdir: Path) -> str:
    return tracking.run or Path(os.path.abspath(workdir)).name


def _read_state(workdir: Path) -> dict[str, str]:
    try:
        return dict(read_json(workdir / TRACKERS_FILE))
    except (OSError, ValueError):
        return {}


_lock = threading.Lock()


def _write_state(workdir: Path, name: str, run: str) -> None:
    with _lock:
        state = _read_state(workdir) | {name: run}
        write_atomically(workdir / TRACKERS_FILE, json.dumps(state) + "\n")
