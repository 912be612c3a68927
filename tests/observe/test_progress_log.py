# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar in a terminal, elsewhere a line every ten seconds."""

import io
import time
import types

import pytest
import rich.console

from vit_jax.observe import console, progress_log
from vit_jax.observe.panel import Panel
from vit_jax.observe.progress_log import ProgressLog


@pytest.fixture
def screen(monkeypatch):
    """Replaces the console; the result has the text of its screen."""
    monkeypatch.delenv("CI", raising=False)

    def make(*, terminal, quiet=False, stderr=False):
        screen = rich.console.Console(
            file=io.StringIO(),
            force_terminal=terminal,
            width=120,
            color_system=None,
            highlight=False,
            quiet=quiet,
            stderr=stderr,
            _environ={"TERM": "xterm"},
        )
        for module in (console, progress_log):
            monkeypatch.setattr(module, "console", screen)
        return screen

    return make


@pytest.fixture
def work(monkeypatch):
    """Does work of five parts that take some seconds each."""

    def run(*, seconds, **arguments):
        now = 100.0
        clock = types.SimpleNamespace(perf_counter=lambda: now)
        monkeypatch.setattr(progress_log, "time", clock)
        with ProgressLog("reading [1/2]", unit="images", **arguments) as progress:
            for _ in range(5):
                now += seconds
                progress.advance(800)

    return run


def test_a_log_gets_a_line_every_ten_seconds(screen, work):
    file = screen(terminal=False).file
    work(seconds=6, total=3900)
    assert file.getvalue().splitlines() == [
        "reading [1/2]  1,600/3,900 images  133 images/s  ETA 0:00:17",
        "reading [1/2]  3,200/3,900 images  133 images/s  ETA 0:00:05",
    ]


def test_short_work_leaves_no_line(screen, work):
    file = screen(terminal=False).file
    work(seconds=1, total=4000)
    assert file.getvalue() == ""


def test_without_a_total_there_is_no_time_left(screen, work):
    file = screen(terminal=False).file
    work(seconds=20, total=None, decimals=1)
    assert file.getvalue().splitlines()[0] == "reading [1/2]  800.0 images  40.0 images/s"


def test_what_was_done_before_does_not_count_for_the_speed(screen, work):
    file = screen(terminal=False).file
    work(seconds=20, total=8000, done=4000)
    line = file.getvalue().splitlines()[0]
    assert line == "reading [1/2]  4,800/8,000 images  40 images/s  ETA 0:01:20"


def test_a_terminal_gets_a_bar_that_disappears(screen, work):
    file = screen(terminal=True).file
    work(seconds=20, total=3900)
    *_, last = file.getvalue().split("reading [1/2] ━")
    assert "━ 3,900/3,900 images  39 images/s  ETA 0:00:00" in last
    assert last.endswith("\x1b[2K")  # erases the line


def test_a_bar_is_shown_below_the_panel_of_a_run(screen, work):
    terminal = screen(terminal=True)
    panel = Panel(terminal, step=3, total=10, live=True)
    panel.start()
    with ProgressLog("reading", total=10, unit="images") as progress:
        progress.advance(5)
        while "5/10 images" not in terminal.file.getvalue():
            time.sleep(0.01)  # The panel is redrawn by a thread of its own.
    panel.update(step=4)
    panel.stop()
    before, _, after = terminal.file.getvalue().partition("reading ━")
    assert "step 3/10 ━" in before
    assert "step 4/10 ━" in after


def test_results_in_a_terminal_are_not_mixed_with_a_bar(screen, work, monkeypatch):
    file = screen(terminal=True, stderr=True).file
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    work(seconds=20, total=4000)
    assert "━" not in file.getvalue()
    assert len(file.getvalue().splitlines()) == 5


def test_a_quiet_process_shows_nothing(screen, work):
    file = screen(terminal=True, quiet=True).file
    work(seconds=20, total=4000)
    assert file.getvalue() == ""
