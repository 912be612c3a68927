# SPDX-License-Identifier: Apache-2.0
"""Runs as processes of their own, which are watched, signalled and killed."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.manifest import find_fault
from vit_jax.checkpoint.pretrained.load import load_params
from vit_jax.launch.local import make_commands
from vit_jax.observe.jsonl import read_metrics
from vit_jax.observe.ledger import read_ledger
from vit_jax.utils.tree import flatten

ROOT = Path(__file__).parent.parent.parent
CONFIG = Path(__file__).parent / "config.py"
DEVICES = 4
# Seconds after which a run that was not told otherwise counts as hung.
PATIENCE = 600.0

_STEP = re.compile(r"^(?:\[0\] )?step (\d+)/")


@dataclasses.dataclass(frozen=True)
class Lab:
    """Where runs are made, and with what."""

    folder: Path
    rng: np.random.Generator

    def command(self, workdir: Path, processes: int, arguments: Sequence[str]) -> list[str]:
        """That of a whole job: by the launcher, if it has several processes."""
        train = self.arguments(workdir, arguments)
        if processes == 1:
            return [sys.executable, "-m", "vit_jax.main", *train]
        launch = [sys.executable, "-m", "vit_jax.launch.local", "--max_runs=1"]
        return [*launch, f"--num_processes={processes}", "--", *train]

    def arguments(self, workdir: Path, arguments: Sequence[str] = ()) -> list[str]:
        """Those of `vit_jax.main`."""
        return [
            f"--config={CONFIG}:{self.folder / 'data'}",
            f"--workdir={workdir}",
            f"--compile_cache={self.folder / 'compiled'}",
            *arguments,
        ]

    @contextlib.contextmanager
    def start(
        self,
        workdir: Path,
        *,
        processes: int = 1,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        wrap: Sequence[str] = (),
        before: Callable[[], None] | None = None,
    ) -> Iterator["Job"]:
        """A job that is under way; what is left of it is killed at the end.

        Args:
          workdir: of the run.
          processes: that share four devices.
          arguments: more of them for `vit_jax.main`.
          env: more of the environment.
          wrap: a command that runs the command.
          before: called in the process before the command.
        """
        command = [*wrap, *self.command(workdir, processes, arguments)]
        job = Job(command, workdir, devices=DEVICES // processes, env=env or {}, before=before)
        try:
            yield job
        finally:
            job.kill()

    @contextlib.contextmanager
    def start_each(
        self, workdir: Path, *, processes: int, arguments: Sequence[str] = ()
    ) -> Iterator[list["Job"]]:
        """The processes of a job without a launcher, each with an exit code of its own."""
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        commands = make_commands(self.arguments(workdir, arguments), processes, port=port)
        jobs = []
        try:
            for command in commands:
                jobs.append(Job(command, workdir, devices=DEVICES // processes, env={}))
            yield jobs
        finally:
            for job in jobs:
                job.kill()

    def finish(self, workdir: Path, *, processes: int = 1, **options) -> "Job":
        """Runs a job to its end."""
        with self.start(workdir, processes=processes, **options) as job:
            job.wait()
        return job


class Job:
    """A command in a session of its own, with its output."""

    def __init__(
        self,
        command: Sequence[str],
        workdir: Path,
        *,
        devices: int,
        env: Mapping[str, str],
        before: Callable[[], None] | None = None,
    ):
        self.workdir, self.lines, self.begun = workdir, list[str](), time.monotonic()
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(os.environ)
            | {
                "JAX_PLATFORMS": "cpu",
                "PYTHONUNBUFFERED": "1",
                # Compiles in half the time.
                "XLA_FLAGS": "--xla_backend_optimization_level=0 "
                f"--xla_force_host_platform_device_count={devices}",
            }
            | dict(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=before,
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """The exit code; None if it does not end within the time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
            self._reader.join(5)
        return self.code

    @property
    def code(self) -> int | None:
        """The exit code, as far as it has ended."""
        return self._process.poll()

    @property
    def text(self) -> str:
        """All that it has printed."""
        return "\n".join(self.lines)

    @property
    def step(self) -> int:
        """The last one that it has printed; 0 before the first."""
        found = [int(m[1]) for line in list(self.lines) if (m := _STEP.match(line))]
        return found[-1] if found else 0

    def until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Waits for something; whether it came before the end of the job, and of the time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            if self.code is not None:
                return False
            time.sleep(0.001)
        return False

    def says(self, text: str) -> bool:
        """Whether it has printed a line with the text."""
        return any(text in line for line in list(self.lines))

    def workers(self) -> list[int]:
        """The processes that train: those below a launcher, or itself."""
        children = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, IndexError):
                if int(stat.read_text().rpartition(")")[2].split()[1]) == self.pid:
                    children.append(int(stat.parent.name))
        return sorted(children) or [self.pid]

    def signal(self, number: int) -> None:
        """Sends a signal to the command itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills all of it at once, as when the power goes."""
        for pid in {*self.workers(), self.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(5)


@dataclasses.dataclass(frozen=True)
class End:
    """What a run has come to: parameters by path, and losses by step."""

    params: Mapping[str, np.ndarray]
    losses: Mapping[int, float]

    @classmethod
    def read(cls, workdir: Path) -> "End":
        """That of a workdir."""
        params = {k: np.asarray(v) for k, v in flatten(load_params(workdir)[0]).items()}
        losses = {r["step"]: r["train/loss"] for r in read_metrics(workdir) if "train/loss" in r}
        return cls(params, losses)

    def equals(self, other: "End") -> bool:
        """Whether all bits of the parameters are the same, and all losses."""
        return (
            self.params.keys() == other.params.keys()
            and all(x.tobytes() == other.params[k].tobytes() for k, x in self.params.items())
            and self.losses == other.losses
        )

    def is_close(self, other: "End", *, rtol: float) -> bool:
        """Whether the losses of all steps are the same but for the order of float additions."""
        return list(self.losses) == list(other.losses) and np.allclose(
            list(self.losses.values()), list(other.losses.values()), rtol=rtol, atol=0
        )


def newest_whole(workdir: Path) -> int:
    """The last checkpoint of a workdir that is as it was written; 0 if there is none."""
    steps = reversed(list_steps(workdir))
    whole = (s for s in steps if find_fault(workdir / "checkpoints" / str(s)) is None)
    return next(whole, 0)


def steps_by_start(workdir: Path) -> list[tuple[int, int]]:
    """For each start of a run, the steps after which it began and up to which it came."""
    found: list[tuple[int, int]] = []
    for record in read_ledger(workdir):
        if record["event"] == "start":
            found.append((record["step"], record["step"]))
        elif found:
            found[-1] = (found[-1][0], record["step"])
    return found
