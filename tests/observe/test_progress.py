# SPDX-License-Identifier: Apache-2.0
"""The monitor: speeds by a clock of its own, metrics one step late, lines or a bar."""

import contextlib
import io
import json
import math
import os
import re
import types

import jax.numpy as jnp
import pytest
import rich.console

from vit_jax.observe import console, progress
from vit_jax.observe.divergence import DivergedError
from vit_jax.observe.panel import Panel, draw_sparkline
from vit_jax.observe.progress import Monitor
from vit_jax.training import phases
from vit_jax.training.phases import Phases


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


class Records(list):
    """Takes the place of the metric writer."""

    def write(self, step, metrics):
        self.append((step, dict(metrics)))

    def of(self, key):
        """The records that have this key."""
        return [(step, record) for step, record in self if key in record]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(phases, "time", types.SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def records():
    return Records()


@pytest.fixture
def screen(monkeypatch):
    """Makes a terminal, or a file, the screen; what it shows is to be read from the result."""
    monkeypatch.delenv("CI", raising=False)  # a log there, whatever the screen

    def make(*, terminal):
        file = io.StringIO()
        screen = rich.console.Console(
            file=file,
            force_terminal=terminal,
            width=200,
            color_system=None,
            highlight=False,
            _environ={"TERM": "xterm"},
        )
        for module in (console, progress):
            monkeypatch.setattr(module, "console", screen)
        return file

    return make


def monitor(records, *, step=0, **options):
    clock = Phases()
    m = Monitor(records, step=step, total_steps=20, batch_size=32, seconds=clock.seconds, **options)
    m.phases = clock
    return m


def paused(monitor):
    """Around an evaluation."""
    monitor.flush()
    return monitor.phases("evaluation")


def loss(value):
    return {"loss": jnp.float32(value)}


def take(monitor, clock, step, *, log, wait=1.0, work=3.0):
    """One turn of the training loop."""
    with monitor.phases("data_wait"):
        clock.pass_(wait)
    monitor.step(step, loss(0.5), log=log)
    clock.pass_(work)


def test_metrics_are_handled_when_the_next_step_is_queued(records, screen):
    screen(terminal=False)
    with monitor(records) as m:
        m.step(1, loss(3.0), log=True)
        assert records == []
        m.step(2, loss(2.0), log=False)
        assert [(s, r["train/loss"]) for s, r in records.of("train/loss")] == [(1, 3.0)]
        m.step(3, loss(1.0), log=True)
        assert len(records.of("train/loss")) == 1  # step 2 was not to be logged
        m.flush()
        assert [(s, r["train/loss"]) for s, r in records.of("train/loss")] == [(1, 3.0), (3, 1.5)]
        before = len(records)
        m.flush()
        assert len(records) == before


def test_all_metrics_of_a_step_are_written_as_numbers(records, screen):
    screen(terminal=False)
    with monitor(records) as m:
        m.step(1, loss(0.5), log=False)
        m.step(2, {"loss": jnp.float32(0.5), "lr": jnp.float32(0.25)}, log=True)
        m.flush()
    ((step, record),) = records.of("train/loss")
    assert step == 2
    assert record.keys() == {
        *("train/loss", "train/lr"),
        *("perf/images_per_sec", "perf/step_ms", "perf/data_wait"),
    }
    assert (record["train/loss"], record["train/lr"]) == (0.5, 0.25)
    assert {type(v) for v in record.values()} == {float}


def test_what_is_measured_is_a_mean_since_the_last_record_and_the_rest_is_of_the_step(
    records, screen
):
    file = screen(terminal=False)
    with monitor(records, on_divergence="skip") as m:
        for step, value in enumerate([1.0, 2.0, float("nan"), 6.0, 5.0, 7.0], 1):
            values = {"loss": value, "top1": value / 8, "lr": value, "grad_norm": value}
            m.step(step, {k: jnp.float32(v) for k, v in values.items()}, log=step in (4, 6))
        m.flush()
    logged = [(step, r) for step, r in records if "train/loss" in r]
    # Step 3, which is skipped, has no part in the mean.
    assert [(step, r["train/loss"], r["train/top1"]) for step, r in logged] == [
        (4, 3.0, 0.375),
        (6, 6.0, 0.75),
    ]
    assert [(r["train/lr"], r["train/grad_norm"]) for _, r in logged] == [(6.0, 6.0), (7.0, 7.0)]
    assert "step 4/20  loss 3.0000  top1 0.3750" in file.getvalue()


def test_a_mean_is_the_same_to_the_last_bit_when_a_run_resumes_within_it(records, screen):
    screen(terminal=False)
    values = [0.1, 1e8, 0.3, 0.7, 1e-8]
    with monitor(records) as m:
        for step, value in enumerate(values, 1):
            m.step(step, loss(value), log=step == 5)
        m.flush()
    for stop in range(1, 5):
        again = Records()
        with monitor(again) as m:
            for step, value in enumerate(values[:stop], 1):
                m.step(step, loss(value), log=False)
            m.flush()
            saved = json.loads(json.dumps(m.unlogged))
        with monitor(again, step=stop, unlogged=saved) as m:
            for step, value in enumerate(values[stop:], stop + 1):
                m.step(step, loss(value), log=step == 5)
            m.flush()
        ((_, want),), ((_, got),) = records.of("train/loss"), again.of("train/loss")
        assert got["train/loss"] == want["train/loss"]


def test_the_first_step_is_timed_apart_and_has_no_speed(records, clock, screen):
    file = screen(terminal=False)
    with monitor(records, step=10) as m:
        take(m, clock, 11, log=True, work=60.0)
        take(m, clock, 12, log=True)
        m.flush()
    first, logged, second = records
    # Known when step 12 is queued, after its wait.
    assert first == (11, {"perf/first_step_s": 62.0})
    assert logged == (11, {"train/loss": 0.5})
    assert second[1]["perf/step_ms"] == pytest.approx(3000)
    assert file.getvalue().splitlines()[:2] == [
        "first step after 62.0 s",
        "step 11/20  loss 0.5000",
    ]


def test_speed_and_data_wait_are_those_of_the_steps_since_the_last_record(records, clock, screen):
    screen(terminal=False)
    with monitor(records, step=10) as m:
        take(m, clock, 11, log=False)
        take(m, clock, 12, log=False)
        take(m, clock, 13, log=True)
        take(m, clock, 14, log=False, wait=2.0, work=0.0)
        take(m, clock, 15, log=True, wait=0.0, work=6.0)
        m.flush()
    (first, one), (second, two) = records.of("train/loss")
    assert (first, second) == (13, 15)
    # Steps 12 and 13, from when 12 was queued until 14 was: 3 + (1 + 3) + 2 seconds, 3 of waiting.
    assert one["perf/images_per_sec"] == pytest.approx(2 * 32 / 9)
    assert one["perf/step_ms"] == pytest.approx(4500)
    assert one["perf/data_wait"] == pytest.approx(3 / 9)
    assert two["perf/images_per_sec"] == pytest.approx(2 * 32 / 6)
    assert two["perf/step_ms"] == pytest.approx(3000)
    assert two["perf/data_wait"] == 0


def test_what_is_not_training_does_not_count_as_such(records, clock, screen):
    screen(terminal=False)
    with monitor(records) as m:
        take(m, clock, 1, log=False)
        take(m, clock, 2, log=False)
        with paused(m):  # before the record is due
            clock.pass_(50)
        take(m, clock, 3, log=True)
        with paused(m):  # this makes the record first
            assert [step for step, _ in records.of("train/loss")] == [3]
            clock.pass_(70)
        take(m, clock, 4, log=True)
        m.flush()
    (_, one), (_, two) = records.of("train/loss")
    # Steps 2 and 3 in 3 + (1 + 3) seconds, step 4 in 1 + 3.
    assert (one["perf/step_ms"], one["perf/data_wait"]) == pytest.approx((3500, 1 / 7))
    assert (two["perf/step_ms"], two["perf/data_wait"]) == pytest.approx((4000, 1 / 4))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("log", [True, False])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(value, log, records, screen):
    screen(terminal=False)
    with monitor(records) as m:
        m.step(6, loss(1.0), log=False)
        m.step(7, loss(float(value)), log=log)
        with pytest.raises(DivergedError, match=f"^the loss of step 7 is {value}$"):
            m.step(8, loss(1.0), log=True)
    assert records.of("train/loss") == []


def test_nothing_is_saved_or_evaluated_after_a_loss_that_is_no_number(records, screen):
    screen(terminal=False)
    with monitor(records) as m:
        m.step(7, loss(float("nan")), log=False)
        with pytest.raises(DivergedError, match="step 7"), paused(m):
            pytest.fail("the pause has begun")


def test_a_file_gets_one_line_for_each_logged_step(records, clock, screen):
    file = screen(terminal=False)
    with monitor(records, step=10) as m:
        for step in (11, 12, 13, 14):
            take(m, clock, step, log=step % 2 == 0)
        m.flush()
    # Step 12 in 3 + 1 seconds; steps 13 and 14 in 3 + (1 + 3).
    assert file.getvalue().splitlines() == [
        "first step after 5.0 s",
        "step 12/20  loss 0.5000  8 images/s  data-wait 25.0%  ETA 0:00:32",
        "step 14/20  loss 0.5000  9 images/s  data-wait 14.3%  ETA 0:00:21",
    ]


def test_a_terminal_gets_a_panel_and_no_lines(records, clock, screen):
    file = screen(terminal=True)
    with monitor(records, step=10) as m:
        m.saved(8)
        for step in (11, 12, 13):
            take(m, clock, step, log=step == 12)
        m.flush()
        m.results(13, {"val/top1": 0.5, "val/loss": 1.0})
    shown = file.getvalue()
    assert "step 13/20 ━" in shown
    assert "65%" in shown
    assert "ETA 0:00:32" in shown
    assert "loss 0.5000 ▁  val/top1 0.5000 ▁" in shown
    assert "8 images/s  data-wait 25.0%  memory " in shown
    assert "checkpoint 8" in shown
    assert "step 12/20  loss" not in shown


def test_the_panel_shows_accuracy_and_the_time_of_each_phase(records, clock, screen):
    file = screen(terminal=True)
    with monitor(records) as m:
        for step in (1, 2, 3):
            with m.phases("data_wait"):
                clock.pass_(1)
            m.step(step, loss(0.5) | {"top1": jnp.float32(step / 8)}, log=True)
            clock.pass_(3)
            m.phases.step_taken()
        with paused(m):
            clock.pass_(4)
    shown = file.getvalue()
    assert "loss 0.5000 ▁▁▁  top1 0.3750 ▁▅█" in shown
    # The first step is compilation, the two others are steps.
    phases = "step 37.5%  compile 18.8%  data_wait 18.8%  evaluation 25.0%"
    assert f"time 0:00:16  {phases}" in shown


def test_the_panel_counts_the_seconds_until_the_first_step_is_done(records, clock, screen):
    file = screen(terminal=True)
    with monitor(records) as m:
        clock.pass_(12)
        m._panel._live.refresh()
        assert "compiling ... 12 s" in file.getvalue()
        m.step(1, loss(0.5), log=True)
        m.flush()
        before = len(file.getvalue())
        m._panel._live.refresh()
        assert "compiling" not in file.getvalue()[before:]


@pytest.mark.parametrize("width", [60, 100, 200])
def test_the_curves_of_the_panel_fit_in_a_line(width):
    console = rich.console.Console(width=width, file=io.StringIO(), force_terminal=True)
    panel = Panel(console, step=0, total=10, live=False)
    for value in range(1, 100):
        panel.add_loss(value / 100)
        panel.add_accuracy(value / 100)
        panel.add_results({"val/top1": value / 100})
    console.print(panel._render())
    (line,) = (line for line in console.file.getvalue().splitlines() if "loss" in line)
    assert "val/top1 0.9900" in line
    assert line.count("█") >= 3
    assert len(line) <= width


@pytest.mark.parametrize(
    ("environment", "drawn", "colored"),
    [({}, True, True), ({"NO_COLOR": "1"}, True, False), ({"CI": "true"}, False, False)],
)
def test_a_panel_is_for_terminals_that_nobody_logs(
    environment, drawn, colored, records, clock, monkeypatch
):
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "120", **environment}.items():
        monkeypatch.setenv(name, value)
    ours, theirs = os.openpty()
    with open(theirs, "w") as file:
        terminal = rich.console.Console(file=file, highlight=False)
        for module in (console, progress):
            monkeypatch.setattr(module, "console", terminal)
        with monitor(records, step=10) as m:
            for step in (11, 12, 13):
                take(m, clock, step, log=step == 12)
            m.flush()
    shown = b""
    with contextlib.suppress(OSError):  # EIO: all that was written before it was closed is read.
        while some := os.read(ours, 1 << 20):
            shown += some
    os.close(ours)
    shown = shown.decode()
    # The cursor is hidden while the panel is there.
    assert ("\x1b[?25l" in shown) is ("\x1b[?25h" in shown) is drawn
    assert ("━" in shown) is drawn
    assert ("step 12/20  loss 0.5000  8 images/s" in shown) is not drawn
    assert bool(re.search(r"\x1b\[(\d+;)*(3[0-9]|9[0-7])[;m]", shown)) is colored


def test_less_and_more_can_be_asked_for(records, clock, screen):
    shown = {}
    for verbosity in ("quiet", "normal", "verbose"):
        file = screen(terminal=True)
        console.settings.verbosity = verbosity
        with monitor(records, step=10) as m:
            for step in (11, 12):
                m.step(step, loss(0.5) | {"lr": jnp.float32(0.25)}, log=True)
                clock.pass_(4)
            m.flush()
            m.results(12, {"val/top1": 0.5})
        shown[verbosity] = file.getvalue()
    assert all("step 12/20  val/top1 0.5000" in text for text in shown.values())
    assert shown["quiet"].count("step") == 1
    assert "━" not in shown["verbose"]
    assert "step 12/20  loss 0.5000  8 images/s" in shown["verbose"]
    assert "lr 0.25" in shown["verbose"]
    assert "lr 0.25" not in shown["normal"]


def test_utilisation_is_the_share_of_the_peak(records, clock, screen):
    file = screen(terminal=False)
    m = monitor(records, step=10, peak=16.0)
    with m:
        for step in (11, 12, 13):
            take(m, clock, step, log=step == 12)
        m.flush()
    ((_, record),) = records.of("perf/mfu")
    assert record["perf/mfu"] == pytest.approx(0.5)
    assert "data-wait 25.0%  MFU 50.0%  ETA" in file.getvalue()


@pytest.mark.parametrize(
    ("values", "line"),
    [([1.0], "▁"), ([2.0, 2.0], "▁▁"), ([0, 1, 7, 3.4], "▁▂█▄")],
)
def test_a_sparkline_goes_up_with_its_values(values, line):
    assert draw_sparkline(values) == line


def test_a_result_that_is_no_number_is_not_drawn():
    panel = Panel(None, step=0, total=10, live=False)
    for value in (math.nan, 0.5, math.inf):
        panel.add_results({"val/top1": value})
    assert panel._values == [0.5]


def test_a_long_curve_is_drawn_as_a_short_one():
    panel = Panel(None, step=0, total=10, live=False)
    for value in range(10_000):
        panel.add_loss(float(value))
    panel.add_loss(math.nan)
    assert len(panel.loss) <= 200
    assert panel.loss[-1] == 9999
    line = draw_sparkline(panel.loss)
    assert len(line) == 24
    assert list(line) == sorted(line)
    assert (line[0], line[-1]) == ("▁", "█")


@pytest.mark.parametrize("terminal", [True, False])
def test_results_are_written_and_shown_without_counts(terminal, records, screen):
    file = screen(terminal=terminal)
    results = {"val/top1": 0.98765, "val/loss": 0.1, "val/count": 50}
    with monitor(records, step=3) as m:
        m.results(4, results)
        m.results(5, {})
    assert records == [(4, results)]
    assert "step 4/20  val/top1 0.9877  val/loss 0.1000" in file.getvalue()
    assert "count" not in file.getvalue()
    assert "step 5/20" not in file.getvalue()


def test_a_quiet_process_shows_nothing(records, clock, screen):
    file = screen(terminal=False)
    progress.console.quiet = True
    with monitor(records) as m:
        for step in (1, 2):
            take(m, clock, step, log=True)
        m.results(2, {"val/top1": 0.5})
    assert file.getvalue() == ""


def test_a_fault_of_the_objective_is_logged_once_and_not_at_the_start(records, monkeypatch):
    lines = []
    monkeypatch.setattr(progress, "log", lines.append)

    def warn(metrics):
        return {"low": "too low"} if metrics["loss"] < 1 else {}

    m = monitor(records, warn=warn)
    for step, loss in ((1, 0.5), (2, 2.0), (3, 0.5), (4, 0.4)):
        m.step(step, {"loss": jnp.float32(loss)}, log=True)
    m.flush()
    assert [line for line in lines if "too low" in line] == ["step 3: too low"]
