# SPDX-License-Identifier: Apache-2.0
"""Trains what a config describes.

python -m vit_jax.main --config=configs/digits.py --workdir=runs/digits --config.seed=1
"""

import ast
import os
import runpy
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
from vit_jax.checkpoint.manager import SaveError
from vit_jax.observe import compile_cache, console
from vit_jax.observe.divergence import DivergedError
from vit_jax.observe.trackers import Tracking, check_trackers
from vit_jax.parallel import processes
from vit_jax.parallel.cpu_devices import count_cpu_devices, set_cpu_devices
from vit_jax.parallel.preemption import RUN_AGAIN, Preempted
from vit_jax.train import train
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "Config file, and its arguments after a colon: configs/vit.py:b16,cifar10. "
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

_QUIET = flags.DEFINE_bool("quiet", False, "Show results, warnings and the end alone.")
_VERBOSE = flags.DEFINE_bool("verbose", False, "Show all metrics of each logged step, as lines.")

_OVERRIDE = "--config."
_WORDS = {"true": True, "false": False, "none": None}


def load_config(value: str, overrides: dict[str, Any]) -> ConfigDict:
    """Runs `get_config` of a config file and puts overrides into its result.

    Args:
      value: path of the file, with its arguments after a colon.
      overrides: values by dotted key, as in `{"data.batch_size": 64}`.

    Raises:
      UserError: the file is missing or fails, or a key lies below a value.
    """
    path, colon, argument = value.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config={value}: there is no file {path}")
    try:
        get_config = runpy.run_path(path)["get_config"]
        config = get_config(argument) if colon else get_config()
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"--config={value}: {type(e).__name__}: {e}") from e
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={value}: get_config gives {config!r}; expected a ConfigDict")
    return override_config(config.to_dict(), overrides)


def override_config(config: dict[str, Any], overrides: dict[str, Any]) -> ConfigDict:
    """Puts values by dotted key into the sections of a config.

    Raises:
      UserError: a key lies below a value.
    """
    for key, override in overrides.items():
        *parents, leaf = key.split(".")
        section = config
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise UserError(
                    f"unknown config key {key}: {parent}={section!r} has nothing below it"
                )
        section[leaf] = override
    return ConfigDict(config)


def parse_overrides(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Takes `--config.KEY=VALUE` out of command-line arguments; returns them and the rest.

    Values are Python literals, `true`, `false` and `none`; all else is a string.
    """
    overrides, rest, todo = {}, [], iter(arguments)
    for argument in todo:
        if argument.startswith(_OVERRIDE):
            key, equals, text = argument.removeprefix(_OVERRIDE).partition("=")
            overrides[key] = parse_literal(text if equals else next(todo, ""))
        else:
            rest.append(argument)
    return overrides, rest


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


def parse_literal(text: str) -> Any:
    """The value of an override; see `parse_overrides`."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return text


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
        expected=processes.Expected(_EXPECT_DEVICES.value, _PLATFORM.value),
        cpu_devices=count_cpu_devices(config) if _CPU_DEVICES.value is None else None,
    )


def _check_same(config: ConfigDict) -> None:
    """Machines may keep the data elsewhere, with more cores and memory; all else is the same."""
    values = {f"config.{k}": v for k, v in flatten(config.to_dict()).items()}
    values |= {"--workdir": _WORKDIR.value, "vit_jax": __version__, "jax": jax.__version__}
    for key in ("data_dir", "num_threads", "max_ram_gb"):
        values.pop(f"config.data.{key}", None)
    processes.check_same(values)


def _peek(overrides: dict[str, Any]) -> dict[str, Any]:
    """The config, for what must be known before devices are looked for; empty if it is wrong.

    What is wrong is said later, when no process waits for another that has ended.
    """
    try:
        return load_config(_CONFIG.value or "", overrides).to_dict()
    except UserError:
        return {}


def _check_trackers(config: Mapping[str, Any]) -> None:
    """Refuses trackers that are not there before devices are waited for."""
    try:
        tracking = Tracking(trackers=(config.get("tracking") or {}).get("trackers", ()))
    except (UserError, AttributeError):
        return
    check_trackers(tracking)


def main(argv: list[str]) -> None:
    """Called by absl with the flags parsed."""
    overrides, _ = parse_overrides(argv[1:])
    peeked = _peek(overrides)
    _check_trackers(peeked)
    compile_cache.set_up(_COMPILE_CACHE.value)
    _join_job(peeked)
    verbosity = "quiet" if _QUIET.value else "verbose" if _VERBOSE.value else "normal"
    console.set_up(quiet=jax.process_index() > 0, verbosity=verbosity)
    # Given again with a longer run, it goes on; the last of two overrides counts.
    python = os.path.relpath(sys.executable) if sys.prefix.startswith(os.getcwd()) else "python"
    command = f"{python} -m vit_jax.main {shlex.join(argv[1:])}"
    with processes.all_agree():
        config = load_config(_CONFIG.value or "", overrides)
    _check_same(config)
    train(config, _WORKDIR.value or "", command=command)


def _main_to_the_end(argv: list[str]) -> None:
    main(argv)
    # The run is over and saved: being told to stop while Python ends must not make it a failed one.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def run() -> None:
    """The command: one line and exit code 2 for bad input, 1 for a run that went wrong.

    The code 75 asks the launcher to give the command again: the run was told to stop.
    """
    try:
        with console.report_errors():
            app.run(_main_to_the_end, flags_parser=parse_flags)
    except (DivergedError, SaveError) as e:
        console.print_error(e)
        sys.exit(1)
    except Preempted as e:
        print(f"vit_jax: {e}; the same command goes on from there")
        sys.exit(RUN_AGAIN)
    except KeyboardInterrupt:
        print("vit_jax: interrupted; the same command goes on from the last checkpoint")
        sys.exit(console.INTERRUPTED)


if __name__ == "__main__":
    run()
