# SPDX-License-Identifier: Apache-2.0
"""Trains what a config describes.

python -m vit_jax.main --config=configs/digits.py --workdir=runs/digits --config.seed=1
"""

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict

from vit_jax import __version__
from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.manager import SaveError
from vit_jax.config.cpu_devices import count_cpu_devices
from vit_jax.config.load import load_config, parse_overrides
from vit_jax.config.schema import per_host_keys, read_section
from vit_jax.observe import console
from vit_jax.observe.divergence import DivergedError
from vit_jax.observe.trackers import check_trackers
from vit_jax.runtime import compile_cache, processes
from vit_jax.runtime.cpu_devices import set_cpu_devices
from vit_jax.runtime.preemption import RUN_AGAIN, Interrupted, Preempted
from vit_jax.training.run import train
from vit_jax.utils.command import print_error, report_errors, report_interrupt
from vit_jax.utils.errors import UserError
from vit_jax.utils.nested import flatten_config
from vit_jax.utils.registry import trust_parts
from vit_jax.utils.signals import INTERRUPTED, ending_at_second_interrupt
from vit_jax.utils.streams import print_line, settle_streams

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "Config file or name (`vit_jax configs` lists them), and its arguments after a colon: "
    "configs/vit.py:b16,cifar10. "
    "--config.KEY=VALUE overrides a key.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of checkpoints and metrics; made if absent."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "For a job of several processes: HOST:PORT of process 0, with --num_processes and "
    "--process_id; 'auto' on TPU pods, GKE, under Slurm and Open MPI; 'none' for a job of one.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0.")
_LOCAL_DEVICE_IDS = flags.DEFINE_list(
    "local_device_ids", None, "GPUs of the machine that this process takes, such as 0,1."
)
_START_TIMEOUT = flags.DEFINE_float(
    "start_timeout", processes.START_TIMEOUT, "Seconds to wait for the other processes."
)
_EXPECT_DEVICES = flags.DEFINE_integer(
    "expect_devices", None, "Devices that the job must have; else it does not start."
)
_PLATFORM = flags.DEFINE_enum(
    "platform", None, ["cpu", "gpu", "tpu"], "What the devices must be; else it does not start."
)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    None,
    "Devices that the CPU counts as; by default one a core, up to 8, where that is faster.",
)
_COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache",
    None,
    "Folder of compiled programs; a folder below ~/.cache by default, 'off' for none.",
)

_PARTS = flags.DEFINE_string(
    "parts", "", "Modules outside of vit_jax that weights may name, to import: my_models,my_ops."
)

_QUIET = flags.DEFINE_bool("quiet", False, "Show results, warnings and the end alone.")
_VERBOSE = flags.DEFINE_bool("verbose", False, "Show all metrics of each logged step, as lines.")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses absl flags; leaves overrides of the config, which are no flags, for `main`."""
    _, rest = parse_overrides(argv)
    try:
        unused = flags.FLAGS(rest)[1:]
    except flags.Error as e:
        raise UserError(str(e)) from None
    for name, flag in (("config", _CONFIG), ("workdir", _WORKDIR)):
        if not flag.value:
            raise UserError(f"--{name} is missing; see python -m vit_jax.main --help")
    if _QUIET.value and _VERBOSE.value:
        raise UserError("--quiet and --verbose: expected one of them")
    if unused:
        raise UserError(f"{unused[0]!r} is no flag; expected --name=value")
    return argv


def _join_job(config: Mapping[str, Any]) -> None:
    ids = _LOCAL_DEVICE_IDS.value
    if ids is not None and not all(i.isdigit() for i in ids):
        raise UserError(f"--local_device_ids={','.join(ids)}: expected numbers, such as 0,1")
    set_cpu_devices(_CPU_DEVICES.value)
    processes.initialize(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        local_device_ids=None if ids is None else tuple(map(int, ids)),
        timeout=_START_TIMEOUT.value,
        expect_devices=_EXPECT_DEVICES.value,
        platform=_PLATFORM.value,
        cpu_devices=count_cpu_devices(config) if _CPU_DEVICES.value is None else None,
    )


def _check_same(config: ConfigDict) -> None:
    """Raises `UserError` unless all processes were started with the same config and workdir."""
    values = {f"config.{k}": v for k, v in flatten_config(config.to_dict()).items()}
    values |= {"--workdir": _WORKDIR.value, "vit_jax": __version__, "jax": jax.__version__}
    for key in per_host_keys():
        values.pop(f"config.{key}", None)
    processes.check_same(values)


def _check_trackers(config: Mapping[str, Any]) -> None:
    """Refuses trackers that are not installed, before the process waits for others."""
    section = config.get("tracking") or {}
    try:
        given = {"trackers": section["trackers"]} if "trackers" in section else {}
        tracking, _ = read_section("tracking", given)
    except (UserError, TypeError):  # The config is refused later, by all processes together.
        return
    check_trackers(tracking)


def main(argv: list[str]) -> None:
    """Called by absl with the flags parsed."""
    trust_parts(_PARTS.value)
    overrides, _ = parse_overrides(argv[1:])
    config, error = ConfigDict(), None
    try:
        config = load_config(_CONFIG.value or "", overrides)
    except UserError as e:
        error = e
    _check_trackers(config.to_dict())
    compile_cache.set_up(_COMPILE_CACHE.value)
    _join_job(config.to_dict())
    verbosity = "quiet" if _QUIET.value else "verbose" if _VERBOSE.value else "normal"
    console.set_up(quiet=jax.process_index() > 0, verbosity=verbosity)
    # With an override of the length after it, this command continues the run.
    python = os.path.relpath(sys.executable) if sys.prefix.startswith(os.getcwd()) else "python"
    command = f"{python} -m vit_jax.main {shlex.join(argv[1:])}"
    # Raised only here, where no process waits for another one that has ended.
    with processes.fail_together():
        if error is not None:
            raise error
    _check_same(config)
    train(config, _WORKDIR.value or "", command=command)


def _main_to_the_end(argv: list[str]) -> None:
    main(argv)
    # The run is over and saved: being told to stop while Python ends must not make it a failed one.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _describe_checkpoint() -> str:
    """What the same command would do now."""
    steps = []
    # The flags may not be parsed yet, and the workdir may not be readable.
    with contextlib.suppress(flags.Error, UserError):
        steps = list_steps(Path(_WORKDIR.value or ""))
    if not steps:
        return "there is no checkpoint yet, so the same command starts from the beginning"
    return f"the same command resumes from the checkpoint of step {steps[-1]}"


def run() -> None:
    """The command: one line and exit code 2 for bad input, 1 for a run that went wrong.

    The code 75 asks the launcher to run the command again: the run was asked to stop. After Ctrl-C
    the code is 130.
    """
    try:
        with report_errors(), ending_at_second_interrupt():
            app.run(_main_to_the_end, flags_parser=parse_flags)
    except (DivergedError, SaveError) as e:
        print_error(e)
        sys.exit(1)
    except Preempted as e:
        print_line(f"{e}; the same command resumes from there", sys.stdout)
        sys.exit(INTERRUPTED if isinstance(e, Interrupted) else RUN_AGAIN)
    except KeyboardInterrupt:
        report_interrupt(f"interrupted; {_describe_checkpoint()}")
        sys.exit(INTERRUPTED)
    finally:
        settle_streams()


if __name__ == "__main__":
    run()
