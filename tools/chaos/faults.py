# SPDX-License-Identifier: Apache-2.0
"""The faults, and what must come of each: functions of a lab that give an outcome per injection."""

import dataclasses
import functools
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from tools.bucket_server import BucketServer
from tools.chaos.config import EVALUATE_EVERY, SAVE_EVERY, TOTAL
from tools.chaos.job import End, Job, Lab, newest_whole, steps_by_start
from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.manifest import find_fault
from vit_jax.data.sources import open_source
from vit_jax.utils.mirrors import find_folder
from vit_jax.utils.signals import INTERRUPTED, RUN_AGAIN

# Losses of the same steps on other numbers of processes: float additions in another order.
RTOL = 1e-4
# Seconds within which processes must have noticed that another is gone.
NOTICE = 60.0
# Of a run that has to hold no more at its end: steps, seconds at most, and between two looks at it.
SOAK_STEPS, SOAK_S, SAMPLE_S = 20_000, 3600.0, 1.0
# What it may hold more: allocators keep pages, and a save that is under way has files and threads,
# and a checkpoint of about 35 files in the workdir.
MOST_MORE = {"memory": 16 << 20, "files": 8, "threads": 8, "written": 40}
# How a bucket refuses a request for a moment.
FAILURES = ((503, ""), (429, ""), (500, ""), "reset")
_QUIET = ("--config.evals=none",)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one injection.

    Attributes:
      fault: its name in the table.
      detail: what was done, in words.
      problem: what was not as promised; None if all was.
      lost: steps that were taken again; None where that has no meaning.
      equal: whether the end was that of a run without the fault; None if that is not compared.
    """

    fault: str
    detail: str
    problem: str | None = None
    lost: int | None = None
    equal: bool | None = None


Fault = Callable[[Lab], Iterator[Outcome]]


def first_problem(**checks: bool) -> str | None:
    """The name of the first check that does not hold, in words."""
    return next((name.replace("_", " ") for name, holds in checks.items() if not holds), None)


@functools.cache
def baseline(lab: Lab, processes: int = 1) -> End:
    """The end of a run without faults."""
    workdir = lab.folder / f"baseline-{processes}"
    job = lab.finish(workdir, processes=processes)
    if job.code != 0:
        raise RuntimeError(f"the run without faults ended with code {job.code}:\n{job.text}")
    return End.read(workdir)


def _fresh(lab: Lab, name: str) -> Path:
    workdir = lab.folder / name
    shutil.rmtree(workdir, ignore_errors=True)
    return workdir


# Phase of a run: when it has come, given the job, its folder and a step; and up to how many
# seconds later it is killed.
def _started(job: Job, step: int) -> bool:
    return True


def _compiles(job: Job, step: int) -> bool:
    return job.says("memory of this host for batches")


def _steps(job: Job, step: int) -> bool:
    return job.step >= step


def _saves(job: Job, step: int) -> bool:
    folder = job.workdir / "checkpoints"
    return folder.is_dir() and any("unverified" in p.name for p in folder.iterdir())


def _evaluates(job: Job, step: int) -> bool:
    due = (step // EVALUATE_EVERY + 1) * EVALUATE_EVERY
    return job.step >= due


def _shuts_down(job: Job, step: int) -> bool:
    return job.says(f"step {TOTAL}/{TOTAL}  test/")


PHASES: dict[str, tuple[Callable[[Job, int], bool], float]] = {
    "start-up": (_started, 6.0),
    "compile": (_compiles, 2.0),
    "step": (_steps, 0.1),
    "save": (_saves, 0.2),
    "evaluation": (_evaluates, 0.5),
    "shutdown": (_shuts_down, 2.0),
}


def kill(lab: Lab, processes: int, phases: tuple[str, ...] = tuple(PHASES)) -> Iterator[Outcome]:
    """SIGKILL in each phase, one after the other, and on to the end."""
    want, workdir = baseline(lab, processes), _fresh(lab, f"kill-{processes}")
    injected, problem, expected = [], None, 0
    for phase in phases:
        come, window = PHASES[phase]
        begun = newest_whole(workdir) if workdir.exists() else 0
        step = min(begun + int(lab.rng.integers(1, 2 * SAVE_EVERY)), TOTAL - 1)
        with lab.start(workdir, processes=processes) as job:
            if job.until(functools.partial(come, job, step)):
                time.sleep(lab.rng.uniform(0, window))
            alone = processes > 1 and lab.rng.random() < 0.5
            if (
                job.code is None and alone
            ):  # One of the processes, and the launcher ends the others.
                victim = int(lab.rng.choice(job.workers()))
                os.kill(victim, signal.SIGKILL)
                if job.wait(NOTICE) is None:
                    problem = problem or f"{phase}: the others went on for {NOTICE:.0f} s"
            elif job.code is not None:  # Nothing to kill: it was at its end.
                problem = problem or (f"{phase}: ended by itself, {job.code}" if job.code else None)
                expected = newest_whole(workdir)
                continue
            job.kill()
            reached = max(job.step, begun)
        whole = newest_whole(workdir) if (workdir / "checkpoints").exists() else 0
        if whole < expected:
            problem = problem or f"{phase}: the checkpoint {expected} is gone"
        injected.append((phase, "one" if alone else "all", reached - whole))
        expected = whole
    last = lab.finish(workdir, processes=processes)
    began = [start for start, _ in steps_by_start(workdir)]
    problem = problem or first_problem(
        the_last_start_failed=last.code == 0,
        a_start_was_not_from_the_newest_checkpoint=began == sorted(began)
        and (last.says(f"checkpoints/{expected}") or not expected),
        more_steps_were_lost_than_since_a_save=all(n <= 2 * SAVE_EVERY for *_, n in injected),
    )
    equal = last.code == 0 and End.read(workdir).equals(want)
    for phase, whom, lost in injected:
        detail = f"in {phase}, {whom} of {processes}"
        yield Outcome(f"SIGKILL, {processes} processes", detail, problem, max(lost, 0), equal)


def change_processes(lab: Lab) -> Iterator[Outcome]:
    """Killed, and continued on another number of processes: 4, 2, 1, 4."""
    want, workdir = baseline(lab, 1), _fresh(lab, "processes")
    numbers, lost = (4, 2, 1, 4), []
    for turn, processes in enumerate(numbers[:-1]):
        step = (turn + 1) * TOTAL // len(numbers) + int(lab.rng.integers(0, 5))
        with lab.start(workdir, processes=processes) as job:
            come = job.until(lambda job=job, step=step: job.step >= step)
        lost.append(max(job.step - newest_whole(workdir), 0))
        if not come:
            yield Outcome(
                "other processes", f"{processes}", f"step {step} did not come: {job.code}"
            )
            return
    last = lab.finish(workdir, processes=numbers[-1])
    end = End.read(workdir) if last.code == 0 else None
    problem = first_problem(
        the_last_start_failed=last.code == 0,
        the_losses_are_others=end is not None and end.is_close(want, rtol=RTOL),
    )
    for i, steps in enumerate(lost):
        yield Outcome("other processes", f"{numbers[i]} -> {numbers[i + 1]}", problem, steps)


def _truncate(path: Path, rng: np.random.Generator) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def _delete(path: Path, rng: np.random.Generator) -> None:
    path.unlink()


DAMAGES = {"truncated": _truncate, "flipped": _flip, "deleted": _delete}


def damage(lab: Lab) -> Iterator[Outcome]:
    """Each file of the newest checkpoint truncated, flipped and deleted in turn."""
    want = baseline(lab, 1)
    whole = lab.folder / "baseline-1"
    newest, before = TOTAL, TOTAL - SAVE_EVERY
    folder = Path("checkpoints") / str(newest)
    files = sorted(p.relative_to(whole) for p in (whole / folder).rglob("*") if p.is_file())
    tries = [(name, file) for name in DAMAGES for file in files if (whole / file).stat().st_size]
    restarted = set(lab.rng.choice(len(tries), 2, replace=False).tolist())
    for i, (name, file) in enumerate(tries):
        workdir = _fresh(lab, "damage")
        shutil.copytree(whole, workdir)
        DAMAGES[name](workdir / file, lab.rng)
        inner = file.relative_to(folder).as_posix()
        fault = find_fault(workdir / folder) or ""
        named = inner in fault or inner == "manifest.json"
        problem = first_problem(
            it_was_not_named=named and bool(fault),
            the_one_before_was_not_taken=newest_whole(workdir) == before,
        )
        lost = equal = None
        if i in restarted:
            job = lab.finish(workdir)
            lost, equal = SAVE_EVERY, job.code == 0 and End.read(workdir).equals(want)
            problem = problem or first_problem(
                a_start_failed=job.code == 0,
                a_start_did_not_name_it=job.says("which is damaged") and job.says(fault),
            )
        yield Outcome("damaged checkpoint", f"{inner} {name}", problem, lost, equal)


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fill_disk(lab: Lab) -> Iterator[Outcome]:
    """No file can become longer: neither the config can be written, or later no checkpoint."""
    for size, code, what in ((2000, 2, "config.json"), (8000, 1, "checkpoint")):
        workdir = _fresh(lab, "disk")
        limit = functools.partial(_limit_files, size)
        with lab.start(workdir, before=limit, arguments=("--compile_cache=off",)) as job:
            job.wait()
        said = [line for line in job.lines if line.startswith("vit_jax: error: ")]
        one_line = len(said) == 1 and f"{what} " in said[0] and "can't be written" in said[0]
        problem = first_problem(
            **{f"it ended with code {job.code}": job.code == code},
            it_was_not_said_in_one_line=one_line and "Traceback" not in job.text,
            half_a_checkpoint_was_left=not list_steps(workdir),
            the_next_start_failed=lab.finish(workdir).code == 0,
        )
        equal = problem is None and End.read(workdir).equals(baseline(lab, 1))
        yield Outcome("full disk", f"no file above {size} bytes", problem, job.step, equal)


def forbid_writing(lab: Lab) -> Iterator[Outcome]:
    """The folder of the checkpoints becomes read-only for a while."""
    wrap: tuple[str, ...] = ()
    if os.geteuid() == 0:  # Root may write all the same, unless it is forbidden.
        wrap = ("setpriv", "--bounding-set=-dac_override", "--")
        if not shutil.which("setpriv") or subprocess.run([*wrap, "true"], check=False).returncode:
            yield Outcome("read-only workdir", "not injected: root, without setpriv", None)
            return
    workdir = _fresh(lab, "read-only")
    with lab.start(workdir, wrap=wrap) as job:
        problem = None
        if not job.until(lambda: newest_whole(workdir) >= SAVE_EVERY):
            problem = f"it ended early: {job.code}"
        (workdir / "checkpoints").chmod(0o555)
        said = job.until(lambda: job.says("can't be written"))
        (workdir / "checkpoints").chmod(0o755)
        job.wait()
    again = lab.finish(workdir)
    problem = problem or first_problem(
        it_was_not_said=said,
        the_run_did_not_end_in_order=job.code in (0, 1),
        the_next_start_failed=again.code == 0,
    )
    equal = problem is None and End.read(workdir).equals(baseline(lab, 1))
    yield Outcome("read-only workdir", "for a while", problem, 0, equal)


def lose_a_process(lab: Lab) -> Iterator[Outcome]:
    """One process of two dies or stops: the other names it, and asks for another run."""
    for number, victim in ((signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGSTOP, 1)):
        workdir = _fresh(lab, f"lose-{number}-{victim}")
        limit = ("--config.watchdog.peer=5", "--config.total_steps=1000000")
        with lab.start_each(workdir, processes=2, arguments=limit) as jobs:
            come = jobs[0].until(lambda jobs=jobs: jobs[0].step >= SAVE_EVERY + 3)
            jobs[victim].signal(number)
            begun, other = time.monotonic(), jobs[1 - victim]
            code, seconds = other.wait(NOTICE), time.monotonic() - begun
        problem = first_problem(
            it_did_not_come_so_far=come,
            **{f"the other went on for {NOTICE:.0f} s": code is not None},
            **{f"the other ended with code {code}": code == RUN_AGAIN},
            the_other_did_not_name_it=other.says(f"process {victim} "),
        )
        lost = max(jobs[0].step - newest_whole(workdir), 0)
        shutil.rmtree(workdir, ignore_errors=True)
        name = signal.Signals(number).name
        detail = f"{name} to process {victim}, noticed after {seconds:.1f} s"
        yield Outcome("one process lost", detail, problem, lost)


def diverge(lab: Lab) -> Iterator[Outcome]:
    """Images that are no numbers at a step: the run stops, skips it, or goes back."""
    step = int(lab.rng.integers(SAVE_EVERY + 2, TOTAL - 5))
    env = {"CHAOS_NAN": str(step)}
    ends: dict[str, End] = {}
    for policy in ("skip", "rollback"):
        workdir = _fresh(lab, f"nan-{policy}")
        arguments = (f"--config.on_divergence={policy}",)
        job = lab.finish(workdir, arguments=arguments, env=env)
        problem = first_problem(
            it_did_not_go_on=job.code == 0,
            the_batch_is_not_there=(workdir / "divergence" / f"{step}.npz").exists(),
        )
        if problem is None:
            ends[policy] = End.read(workdir)
            finite = all(np.isfinite(x).all() for x in ends[policy].params.values())
            problem = first_problem(parameters_are_no_numbers=finite)
        lost = (step - 1) % SAVE_EVERY + 1 if policy == "rollback" else 1
        yield Outcome(f"NaN, {policy}", f"step {step}", problem, lost)
    workdir = _fresh(lab, "nan-stop")
    stopped = lab.finish(workdir, env=env)
    again = lab.finish(workdir, arguments=("--config.on_divergence=skip",), env=env)
    problem = first_problem(
        it_did_not_stop_with_code_1=stopped.code == 1,
        the_step_is_not_named=stopped.says(f"step {step} is nan"),
        it_saved_after_it=newest_whole(workdir) >= step and again.code == 0,
    )
    equal = problem is None and "skip" in ends and End.read(workdir).equals(ends["skip"])
    lost = (step - 1) % SAVE_EVERY
    yield Outcome("NaN, stop", f"step {step}, then on with skip", problem, lost, equal)


def _make_images(folder: Path, rng: np.random.Generator, number: int) -> tuple[str, ...]:
    """Images in two classes, and the arguments of a run on them."""
    for i in range(number):
        file = folder / "train" / ("ab"[i % 2]) / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), rng.integers(0, 256, (16, 16, 3), np.uint8))
    return (
        f"--config.data.name=folder:{folder}",
        "--config.data.split=train",
        "--config.data.preprocess=decode|resize(16)|random_shift(2)",
        *_QUIET,
    )


def corrupt_record(lab: Lab) -> Iterator[Outcome]:
    """Files that are no images: replaced and counted, and the same after a kill."""
    data = _fresh(lab, "images")
    arguments = (*_make_images(data, lab.rng, 100), "--config.data.max_corrupt=0.1")
    broken = sorted(data.rglob("*.png"))[int(lab.rng.integers(100))]
    broken.write_bytes(broken.read_bytes()[:40])
    ends = []
    for name in ("corrupt", "corrupt-killed"):
        workdir = _fresh(lab, name)
        if name == "corrupt-killed":
            with lab.start(workdir, arguments=arguments) as job:
                job.until(lambda job=job: job.step >= SAVE_EVERY + 5)
        job = lab.finish(workdir, arguments=arguments)
        ends.append((job, End.read(workdir) if job.code == 0 else None))
    (job, want), (_, got) = ends
    problem = first_problem(
        it_did_not_go_on=want is not None and got is not None,
        the_file_is_not_named=job.says(broken.name),
    )
    equal = want is not None and got is not None and got.equals(want)
    yield Outcome("corrupt record", f"{broken.name} cut, then a kill", problem, None, equal)


def lose_the_data(lab: Lab) -> Iterator[Outcome]:
    """The images go away under a run, or can't be read to their end; then they are back."""
    data, elsewhere = _fresh(lab, "images-lost"), _fresh(lab, "images-elsewhere")
    # More than a run sees: none is in memory because it was read before.
    arguments = (*_make_images(data, lab.rng, 40 * TOTAL), "--config.watchdog.step=10")
    marker = _fresh(lab, "data-stalls") / "now"
    marker.parent.mkdir()
    whole = lab.finish(_fresh(lab, "data-there"), arguments=arguments)
    want = End.read(whole.workdir) if whole.code == 0 else None
    for name, code in (("is gone", 2), ("stalls", RUN_AGAIN)):
        workdir = _fresh(lab, "data-lost")
        with lab.start(workdir, arguments=arguments, env={"CHAOS_STALL": str(marker)}) as job:
            job.until(lambda job=job: job.step >= SAVE_EVERY + 2)
            if name == "stalls":
                marker.touch()
            else:
                data.rename(elsewhere)
            job.wait()
        if name == "is gone":
            elsewhere.rename(data)
        lost = max(job.step - newest_whole(workdir), 0)
        again = lab.finish(workdir, arguments=arguments)
        said = [line for line in job.lines if line.startswith("vit_jax: error: ")]
        problem = first_problem(
            **{f"it ended with code {job.code}": job.code == code},
            it_was_not_said_in_one_line=code == RUN_AGAIN or len(said) == 1,
            the_next_start_failed=again.code == 0,
        )
        equal = problem is None and want is not None and End.read(workdir).equals(want)
        yield Outcome("lost data", f"the folder {name}", problem, lost, equal)


def start_twice(lab: Lab) -> Iterator[Outcome]:
    """A second run on the workdir is refused, and the first does not notice."""
    workdir = _fresh(lab, "twice")
    with lab.start(workdir, arguments=("--config.total_steps=1000000",)) as first:
        come = first.until(lambda: first.step >= 1)
        second = lab.finish(workdir, arguments=("--config.total_steps=1000000",))
        problem = first_problem(
            the_first_did_not_start=come,
            the_second_did_not_end_with_code_2=second.code == 2,
            the_first_is_not_named=second.says(f"in use by process {first.pid} "),
            the_first_has_ended=first.code is None,
        )
    yield Outcome("second run", "on one workdir", problem)


def terminate(lab: Lab) -> Iterator[Outcome]:
    """SIGTERM within the steps, and while the run ends."""
    want = baseline(lab, 1)
    for when in ("step", "shutdown"):
        workdir = _fresh(lab, f"sigterm-{when}")
        step = int(lab.rng.integers(3, TOTAL - 5))
        come, window = PHASES[when]
        with lab.start(workdir) as job:
            job.until(functools.partial(come, job, step))
            time.sleep(lab.rng.uniform(0, window))
            job.signal(signal.SIGTERM)
            job.wait()
        lost = max(job.step - newest_whole(workdir), 0)
        again = lab.finish(workdir)
        problem = first_problem(
            **{f"it ended with code {job.code}": job.code in (0, RUN_AGAIN)},
            steps_were_lost=lost == 0,
            the_next_start_failed=again.code == 0,
        )
        equal = problem is None and End.read(workdir).equals(want)
        yield Outcome("SIGTERM", f"in {when}", problem, lost, equal)


def interrupt(lab: Lab) -> Iterator[Outcome]:
    """Ctrl-C before the first step, within the steps, and twice."""
    want = baseline(lab, 1)
    for when in ("compile", "step", "step, twice"):
        workdir = _fresh(lab, "ctrl-c")
        step = int(lab.rng.integers(3, TOTAL - 5))
        come, _ = PHASES[when.partition(",")[0]]
        with lab.start(workdir) as job:
            job.until(functools.partial(come, job, step))
            for _ in range(2 if "twice" in when else 1):
                job.signal(signal.SIGINT)
            job.wait()
        whole = newest_whole(workdir)
        lost = max(job.step - whole, 0)
        again = lab.finish(workdir)
        named = f"stopped after step {whole} " if when == "step" else "there is no checkpoint yet"
        problem = first_problem(
            **{f"it ended with code {job.code}": job.code in (0, INTERRUPTED)},
            steps_were_lost=lost == 0 or when != "step",
            the_step_was_not_named=job.code == 0 or "twice" in when or job.says(named),
            it_was_not_said_in_lines="Traceback" not in job.text,
            the_next_start_failed=again.code == 0,
        )
        equal = problem is None and End.read(workdir).equals(want)
        yield Outcome("Ctrl-C", f"in {when}", problem, lost, equal)


def lose_the_screen(lab: Lab) -> Iterator[Outcome]:
    """Output that goes to a full disk, or to a reader that has seen enough, or nowhere."""
    want = baseline(lab, 1)
    screens = {
        "a full disk": '"$@" > /dev/full 2> /dev/full',
        "a closed pipe": '"$@" 2>&1 | head -1; exit "${PIPESTATUS[0]}"',
        "nowhere": '"$@" >&- 2>&-',
    }
    for name, shell in screens.items():
        workdir = _fresh(lab, "screen")
        job = lab.finish(workdir, wrap=("bash", "-c", shell, "bash"))
        problem = first_problem(**{f"it ended with code {job.code}": job.code == 0})
        equal = problem is None and End.read(workdir).equals(want)
        yield Outcome("failing screen", name, problem, None, equal)


def _half_run(lab: Lab, name: str) -> Path:
    """The workdir of a run that was killed after half of its steps."""
    half = lab.folder / "half"
    if not half.exists():
        with lab.start(half) as job:
            job.until(lambda: newest_whole(half) >= TOTAL // 2)
    workdir = _fresh(lab, name)
    shutil.copytree(half, workdir, symlinks=True)
    return workdir


def damage_metrics(lab: Lab) -> Iterator[Outcome]:
    """A bit of a line, zeros, a byte order mark, other line breaks: no other line is lost."""
    want = baseline(lab, 1)

    def change(name: str, line: bytes) -> bytes:
        at = int(lab.rng.integers(1, len(line) - 2))
        return {
            "a high bit": line[:at] + bytes([line[at] ^ 128]) + line[at + 1 :],
            "zeros": bytes(512) + line[at:],
            "half a line": line[:at] + b"\n",
            "no JSON": b"?" * at + b"\n",
            "a byte order mark": b"\xef\xbb\xbf" + line,
            "another line break": line.replace(b"\n", b"\r\n"),
        }[name]

    for name in ("a high bit", "zeros", "half a line", "no JSON", *_NO_DAMAGE):
        workdir = _half_run(lab, "metrics")
        path = workdir / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        lost = next(i for i, line in enumerate(lines) if line.startswith(b'{"step": 5, '))
        lines[lost] = change(name, lines[lost])
        path.write_bytes(b"".join(lines))
        job = lab.finish(workdir)
        end = End.read(workdir) if job.code == 0 else None
        left = {step for step in want.losses if step != 5 or name in _NO_DAMAGE}
        problem = first_problem(
            the_start_failed=end is not None,
            another_line_is_lost=end is not None and left == set(end.losses),
            it_was_not_named=name in _NO_DAMAGE or job.says(f"line {lost + 1} is damaged"),
        )
        same = {step: want.losses[step] for step in left}
        equal = end is not None and End(end.params, end.losses).equals(End(want.params, same))
        yield Outcome("damaged metrics", name, problem, 0, equal)


_NO_DAMAGE = ("a byte order mark", "another line break")


def _link(path: Path) -> None:
    place = path.with_name(f"{path.name} elsewhere")
    path.rename(place)
    path.symlink_to(place.resolve())


def _obstruct(workdir: Path) -> None:
    checkpoints = workdir / "checkpoints"
    (checkpoints / "70.orbax-checkpoint-tmp-x").touch()
    (checkpoints / "abc").touch()
    (checkpoints / "50").touch()
    (checkpoints / "60").symlink_to(workdir / "none")
    for name in ("evals", "broken"):
        shutil.rmtree(workdir / name, ignore_errors=True)
        (workdir / name).touch()
    (workdir / "report.html").unlink(missing_ok=True)
    (workdir / "report.html").mkdir()


def strange_files(lab: Lab) -> Iterator[Outcome]:
    """Links, and files that have names of a run and are not of it."""
    want = baseline(lab, 1)
    kinds: dict[str, Callable[[Path], object]] = {
        "checkpoints behind links": lambda w: [
            *map(_link, (w / "checkpoints").iterdir()),
            _link(w / "checkpoints"),
            _link(w / "metrics.jsonl"),
        ],
        "other files in the way": _obstruct,
        "config.json emptied": lambda w: os.truncate(w / "config.json", 0),
        "config.json gone": lambda w: (w / "config.json").unlink(),
    }
    for name, make in kinds.items():
        workdir = _half_run(lab, "strange")
        make(workdir)
        job = lab.finish(workdir)
        problem = first_problem(
            **{f"it ended with code {job.code}": job.code == 0},
            it_was_not_said_in_lines="Traceback" not in job.text,
        )
        equal = problem is None and End.read(workdir).equals(want)
        yield Outcome("strange files", name, problem, 0, equal)


def lose_what_was_saved(lab: Lab) -> Iterator[Outcome]:
    """What can't be resumed is refused in one line, and nothing is changed."""
    kinds: dict[str, Callable[[Path], object]] = {
        "all checkpoints": lambda w: shutil.rmtree(w / "checkpoints"),
        "the disk of the checkpoints": lambda w: [
            _link(w / "checkpoints"),
            shutil.rmtree(w / "checkpoints elsewhere"),
        ],
        "metrics.jsonl, a folder now": lambda w: [
            (w / "metrics.jsonl").unlink(),
            (w / "metrics.jsonl").mkdir(),
        ],
    }
    for name, lose in kinds.items():
        workdir = _half_run(lab, "lost")
        lose(workdir)
        before = {p: p.read_bytes() for p in sorted(workdir.rglob("*")) if p.is_file()}
        job = lab.finish(workdir)
        after = {p: p.read_bytes() for p in sorted(workdir.rglob("*")) if p.is_file()}
        said = [line for line in job.lines if line.startswith("vit_jax: error: ")]
        problem = first_problem(
            **{f"it ended with code {job.code}": job.code == 2},
            it_was_not_said_in_one_line=len(said) == 1 and "Traceback" not in job.text,
            a_file_was_changed=before == after,
        )
        yield Outcome("lost checkpoints", name, problem)


def reproduce(lab: Lab) -> Iterator[Outcome]:
    """The same run again, with nothing compiled before."""
    want, workdir = baseline(lab, 1), _fresh(lab, "again")
    job = lab.finish(workdir, arguments=("--compile_cache=off",))
    equal = job.code == 0 and End.read(workdir).equals(want)
    problem = first_problem(it_failed=job.code == 0, other_bits=equal)
    yield Outcome("none: run twice", "bits of parameters and losses", problem, 0, equal)


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a run holds at a step: bytes of memory, open files, threads, files of its workdir."""

    step: int
    memory: int
    files: int
    threads: int
    written: int

    @classmethod
    def take(cls, job: Job) -> "Sample | None":
        """That of a job of one process; None if it has ended meanwhile."""
        try:
            lines = Path(f"/proc/{job.pid}/status").read_text().splitlines()
            files = len(os.listdir(f"/proc/{job.pid}/fd"))
        except OSError:
            return None
        status = dict(line.split(":", 1) for line in lines)
        if "RssAnon" not in status:
            return None
        written = sum(len(names) for *_, names in os.walk(job.workdir))
        # Without files that are mapped: the kernel drops their pages, and those of the heap go to
        # swap, whenever it likes.
        memory = 1024 * sum(int(status[key].split()[0]) for key in ("RssAnon", "VmSwap"))
        return cls(job.step, memory, files, int(status["Threads"]), written)


def find_growth(samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
    """The most of each kind in the second and in the last quarter of the steps.

    Before the second, programs are compiled and the records of the data are kept.
    """
    last = max(s.step for s in samples)
    second = [s for s in samples if last / 4 <= s.step < last / 2]
    fourth = [s for s in samples if s.step >= 3 * last / 4]
    kinds = ("memory", "files", "threads", "written")
    return {
        kind: (max(getattr(s, kind) for s in second), max(getattr(s, kind) for s in fourth))
        for kind in kinds
    }


def soak(lab: Lab) -> Iterator[Outcome]:
    """No fault, but many steps with saves and evaluations: what a run holds does not grow."""
    workdir, samples = _fresh(lab, "soak"), list[Sample]()
    arguments = (
        f"--config.total_steps={SOAK_STEPS}",
        "--config.log_every=50",
        *("--config.checkpoint.every=200", "--config.evals.val.every=400"),
    )
    with lab.start(workdir, arguments=arguments) as job:
        deadline = time.monotonic() + SOAK_S
        while job.wait(SAMPLE_S) is None and time.monotonic() < deadline:
            sample = Sample.take(job)
            # After the last step other programs are compiled, for what is evaluated at the end.
            if sample is not None and 0 < sample.step < SOAK_STEPS:
                samples.append(sample)
        if job.code is None:
            job.signal(signal.SIGTERM)
            job.wait()
    growth = find_growth(samples)
    more = {kind: after - before for kind, (before, after) in growth.items()}
    problem = first_problem(
        **{f"it ended with code {job.code}": job.code in (0, RUN_AGAIN)},
        **{f"more {kind}: {growth[kind]}": more[kind] <= MOST_MORE[kind] for kind in more},
    )
    shown = {kind: f"{before} and {after}" for kind, (before, after) in growth.items()}
    shown["memory"] = " and ".join(f"{value / 2**20:.0f}" for value in growth["memory"])
    detail = (
        f"{newest_whole(workdir):,} of {SOAK_STEPS:,} steps, {len(samples)} samples; most in the "
        f"second and last quarter: memory {shown['memory']} MiB, open files {shown['files']}, "
        f"threads {shown['threads']}, files of the workdir {shown['written']}"
    )
    yield Outcome("none: many steps", detail, problem)


def kill_in_bucket(lab: Lab) -> Iterator[Outcome]:
    """SIGKILL between any two requests, to a bucket whose server refuses some of them."""
    want, server = baseline(lab), BucketServer("chaos")
    os.environ.update(server.variables())

    def fail(method: str, path: str) -> tuple[int, str] | str | None:
        return FAILURES[lab.rng.integers(len(FAILURES))] if lab.rng.random() < 0.03 else None

    for scheme in ("gs", "s3"):
        server.objects["chaos"].clear()
        server.fail, injected, problem = fail, [], None
        arguments = (f"--workdir={scheme}://chaos/run",)
        for _ in range(3):
            requests = len(server.requests) + int(lab.rng.integers(10, 150))
            with lab.start(lab.folder, arguments=arguments) as job:
                job.until(lambda requests=requests: len(server.requests) >= requests)
            injected.append(f"after {len(server.requests)} requests")
        job = lab.finish(lab.folder, arguments=arguments)
        if job.code != 0:
            problem = f"it ended with code {job.code}: {job.text[-400:]}"
        server.fail = lambda method, path: None
        equal = (
            None if problem else End.read(find_folder(arguments[0].partition("=")[2])).equals(want)
        )
        yield Outcome(
            "SIGKILL, bucket", f"{scheme}://, {', '.join(injected)}", problem, equal=equal
        )
    server.close()


def prepare(lab: Lab) -> None:
    """Makes the data, so that no run has to."""
    open_source("digits", "train", data_dir=str(lab.folder / "data"), key="split")


# By the name that `--only` takes, those that tell most in the shortest time first.
FAULTS: dict[str, Fault] = {
    "kill": functools.partial(kill, processes=1),
    "sigterm": terminate,
    "interrupt": interrupt,
    "screen": lose_the_screen,
    "metrics": damage_metrics,
    "strange": strange_files,
    "gone": lose_what_was_saved,
    "damage": damage,
    "lost": lose_a_process,
    "disk": fill_disk,
    "readonly": forbid_writing,
    "nan": diverge,
    "twice": start_twice,
    "corrupt": corrupt_record,
    "data": lose_the_data,
    "kill2": functools.partial(kill, processes=2),
    "processes": change_processes,
    "reproduce": reproduce,
    "bucket": kill_in_bucket,
    "soak": soak,
    "kill4": functools.partial(kill, processes=4, phases=("step", "save", "shutdown")),
}
