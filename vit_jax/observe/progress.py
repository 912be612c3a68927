# SPDX-License-Identifier: Apache-2.0
"""Progress of a run: speed, data wait and loss, on the screen and in the metric files."""

import datetime
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from vit_jax.observe.console import console, is_live, log, log_progress, settings
from vit_jax.observe.divergence import (
    MAX_SKIPPED_IN_A_ROW,
    DivergedError,
    Divergence,
    find_divergence,
)
from vit_jax.observe.panel import Panel, describe_memory
from vit_jax.observe.writer import MetricWriter
from vit_jax.runtime import compile_cache

# Metrics that are recorded as they are at the logged step, and not as means.
_OF_ONE_STEP = ("lr", "grad_norm", "param_norm")


class Monitor:
    """Follows the training loop. A context manager, for the panel.

    Metrics are fetched one step late, when the next step is already queued, so that the device
    never waits for the host. A terminal gets a panel; anything else one line for each logged step.
    What the objective measures, such as the loss, is recorded as its mean over the steps since the
    last record; the other metrics are those of the logged step.

    Args:
      step: step after which the run starts.
      unlogged: the attribute of that name when `step` was saved.
      warn: finds faults in the metrics of a record: a line for each, by a name; the first line of
        each name is logged.
      seconds: returns the seconds spent so far by phase; `compile`, `step` and `data_wait` count.
      on_divergence: one of `divergence.POLICIES`; with `skip`, such steps are counted.
      max_loss: a higher loss counts as diverged.
      dump: called with each divergence.
      peak: images a second at which the devices would do nothing but the model's products, for
        the model FLOPs utilisation (MFU); None where it is not known.

    Attributes:
      skipped: the steps that diverged and were left out, with `on_divergence="skip"`.
      unlogged: sum and count of each averaged metric since the last record, as JSON. They are saved
        with checkpoints, so that a run that resumes logs the same means.
    """

    def __init__(
        self,
        writer: MetricWriter,
        *,
        step: int,
        total_steps: int,
        batch_size: float,
        seconds: Callable[[], Mapping[str, float]],
        on_divergence: str = "stop",
        max_loss: float | None = None,
        dump: Callable[[Divergence], None] = lambda _: None,
        peak: float | None = None,
        unlogged: Mapping[str, Any] | None = None,
        warn: Callable[[Mapping[str, float]], Mapping[str, str]] = lambda _: {},
    ):
        self._writer, self._seconds, self._peak = writer, seconds, peak
        self._skips, self._max_loss, self._dump = on_divergence == "skip", max_loss, dump
        self._warn, self._warned = warn, set[str]()
        self.skipped: list[int] = []
        self._in_a_row = 0
        self._total, self._batch_size, self._first = total_steps, batch_size, True
        self._pending: tuple[int, Any, bool] | None = None
        self.unlogged: dict[str, tuple[float, int]] = {}
        for name, (total, count) in (unlogged or {}).items():
            self.unlogged[name] = (float(total), int(count))
        self._restart_clock(step)
        self._live = is_live(console)
        self._panel = Panel(console, step=step, total=total_steps, live=self._live, seconds=seconds)

    def __enter__(self) -> "Monitor":
        # After a rollback the step is compiled already.
        self._panel.compiling = not self._before.get("step")
        self._panel.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._panel.stop()

    def step(self, step: int, metrics: Any, *, log: bool) -> None:
        """Takes the metrics of a step that has been queued, and handles those of the one before.

        Raises:
          DivergedError: a metric of the step before is not finite.
        """
        self.flush()
        self._pending = (step, metrics, log)

    def flush(self) -> None:
        """Waits for the last step given to `step`, and handles its metrics."""
        if self._pending is None:
            return
        step, metrics, logged = self._pending
        self._pending = None
        metrics = dict(jax.device_get(metrics))
        norms = [float(x) for x in metrics.pop("grad_norms", ())]
        metrics = {k: float(v) for k, v in metrics.items()}
        diverged = find_divergence(step, metrics, self._max_loss, norms)
        if diverged is not None:
            self._dump(diverged)
            if not self._skips or self._in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise DivergedError(diverged.reason, step=step)
            self.skipped.append(step)
        self._in_a_row = self._in_a_row + 1 if diverged else 0
        self._add(metrics)
        self._panel.update(step=step)
        self._panel.compiling = False
        if self._first:
            # Mostly compilation: left out of the speeds.
            seconds, self._first = sum(self._spent().values()), False
            self._writer.write(step, {"perf/first_step_s": seconds})
            log_progress(f"first step after {seconds:.1f} s{compile_cache.summary()}")
            self._restart_clock(step)
        if logged:
            self._log(step, metrics)

    def results(self, step: int, results: Mapping[str, float]) -> None:
        """Takes the results of evaluators, such as `val/top1`."""
        if not results:
            return
        self._writer.write(step, results)
        self._panel.add_results(dict(results))
        shown = {k: v for k, v in results.items() if not k.endswith("count")}
        words = [f"{k} {v}" if isinstance(v, int) else f"{k} {v:.4f}" for k, v in shown.items()]
        log(f"step {step}/{self._total}  {'  '.join(words)}")

    def saved(self, step: int | None) -> None:
        """Shows which checkpoint is the newest."""
        self._panel.update(checkpoint=step)

    def _add(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            # A step that is skipped because it diverges has no part in the mean.
            if name not in _OF_ONE_STEP and "/" not in name and math.isfinite(value):
                total, count = self.unlogged.get(name, (0.0, 0))
                self.unlogged[name] = (total + value, count + 1)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        metrics = metrics | {name: total / n for name, (total, n) in self.unlogged.items()}
        self.unlogged = {}
        finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
        # The first record is of the initial parameters.
        for name, line in self._warn(finite).items() if step > 1 else ():
            if name not in self._warned:
                self._warned.add(name)
                log(f"step {step}: {line}")
        record = {k if "/" in k else f"train/{k}": v for k, v in finite.items()}
        if self._skips:
            record["train/skipped"] = float(len(self.skipped))
        text = f"loss {metrics['loss']:.4f}"
        if "top1" in metrics:
            text += f"  top1 {metrics['top1']:.4f}"
            self._panel.add_accuracy(metrics["top1"])
        if steps := step - self._step:
            spent = self._spent()
            whole = max(sum(spent.values()), 1e-9)
            seconds, wait = whole / steps, spent["data_wait"] / whole
            speed = self._batch_size / seconds
            record |= {
                "perf/images_per_sec": speed,
                "perf/step_ms": 1000 * seconds,
                "perf/data_wait": wait,
            }
            left = datetime.timedelta(seconds=round(seconds * (self._total - step)))
            text += f"  {speed:,.0f} images/s  data-wait {wait:.1%}"
            mfu = None
            if self._peak is not None:
                mfu = speed / self._peak
                record["perf/mfu"] = mfu
                text += f"  MFU {mfu:.1%}"
            if corrupt := int(metrics.get("data/corrupt", 0)):
                text += f"  corrupt {corrupt:,}"
            text += f"  ETA {left}"
            self._panel.update(
                images_per_sec=speed, data_wait=wait, mfu=mfu, left=left, corrupt=corrupt
            )
        self._writer.write(step, record)
        self._panel.add_loss(metrics["loss"])
        if self._live:
            self._panel.update(memory=describe_memory())
        elif settings.verbosity == "verbose":
            log(f"step {step}/{self._total}  {text}  {_list(record)}")
        elif settings.verbosity == "normal":
            log(f"step {step}/{self._total}  {text}")
        self._restart_clock(step)

    def _restart_clock(self, step: int) -> None:
        """Speeds are of the time since, and of the steps after this one."""
        self._step, self._before = step, self._seconds()

    def _spent(self) -> dict[str, float]:
        """Seconds of training since the clock was restarted."""
        now = self._seconds()
        return {k: now[k] - self._before[k] for k in ("compile", "step", "data_wait")}


def _list(record: Mapping[str, float]) -> str:
    """The metrics of training except the loss, which is shown anyway."""
    shown = [(k.removeprefix("train/"), v) for k, v in record.items() if k.startswith("train/")]
    return "  ".join(f"{name} {value:.4g}" for name, value in shown if name != "loss")
