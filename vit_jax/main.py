# SPDX-License-Identifier: Apache-2.0
r"""Trains what a config describes.

A run that was stopped resumes from its newest checkpoint if the same command is given again. A key
of the config is overridden by --config.KEY=VALUE, whose value is a Python literal, true, false,
none or text. The exit code is 2 for bad input, 1 for a run that failed, 75 for one that was told to
stop and resumes if it is started again, and 130 after Ctrl-C.

Examples:
  python -m vit_jax.main --config=digits --workdir=runs/digits
  python -m vit_jax.main --config=digits --workdir=runs/digits_seed1 --config.seed=1
  python -m vit_jax.main --config=folder --workdir=runs/birds --config.data.name=folder:/data/birds
  python -m vit_jax.main --config=configs/digits.py --workdir=runs/wide \
      --config.model.hidden_size=96 --dry_run
"""

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from absl import app, flags

from vit_jax import __version__
from vit_jax.checkpoint.listing import list_steps
from vit_jax.config.load import find_file, load_config, parse_overrides
from vit_jax.config.shipped import list_configs
from vit_jax.observe import console
from vit_jax.runtime.cluster import START_TIMEOUT, find_job
from vit_jax.utils.command import CommandParser, print_error, report_errors, report_interrupt
from vit_jax.utils.errors import UserError
from vit_jax.utils.mirrors import find_folder
from vit_jax.utils.nested import flatten_config
from vit_jax.utils.registry import trust_parts
from vit_jax.utils.signals import INTERRUPTED, RUN_AGAIN, ending_at_second_interrupt, importing
from vit_jax.utils.streams import print_line, print_result, settle_streams
from vit_jax.utils.suggestions import find_near, suggest_flag

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "Train this config: a file, or a name of the list below, with its arguments after a colon, "
    "such as configs/vit.py:b16,cifar10.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Write checkpoints and metrics to this folder, which is made if it does not exist, or to "
    "gs://BUCKET/PATH or s3://BUCKET/PATH. The name of the flag may be left out.",
)
_PARTS = flags.DEFINE_string(
    "parts",
    "",
    "Import these modules from outside of vit_jax, such as my_models,my_ops, which weights may "
    "name.",
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print the whole config and what a run would do, and write nothing."
)
_QUIET = flags.DEFINE_bool("quiet", False, "Show only results, warnings and the summary.")
_VERBOSE = flags.DEFINE_bool(
    "verbose", False, "Show all parameters, and all metrics of each logged step."
)
_PLATFORM = flags.DEFINE_enum(
    "platform", None, ["cpu", "gpu", "tpu"], "Refuse to start on devices of another platform."
)
_EXPECT_DEVICES = flags.DEFINE_integer(
    "expect_devices", None, "Refuse to start with another number of devices in the job."
)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    None,
    "Let the CPU count as this many devices. The default is one for each core, up to 8, where that "
    "is faster.",
)
_COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache",
    None,
    "Keep compiled programs in this folder, or nowhere with `off`. The default is a folder below "
    "~/.cache.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Connect to process 0 at this HOST:PORT, with --num_processes and --process_id; `auto` finds "
    "it on TPU pods, GKE, under Slurm and Open MPI; `none` runs a job of one process.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Expect this many processes in the job."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Be this process of the job, from 0.")
_LOCAL_DEVICE_IDS = flags.DEFINE_list(
    "local_device_ids", None, "Use only these GPUs of the machine, such as 0,1."
)
_START_TIMEOUT = flags.DEFINE_float(
    "start_timeout",
    START_TIMEOUT,
    f"Wait so many seconds for the other processes. The default is {START_TIMEOUT}.",
)

# The flags by the headings of the help. absl parses them; overrides of the config are no flags.
_GROUPS: Mapping[str, tuple[flags.FlagHolder, ...]] = {
    "the run": (_CONFIG, _WORKDIR, _PARTS, _DRY_RUN),
    "the screen": (_QUIET, _VERBOSE),
    "the devices": (_PLATFORM, _EXPECT_DEVICES, _CPU_DEVICES, _COMPILE_CACHE),
    "a job of several processes": (
        _COORDINATOR,
        _NUM_PROCESSES,
        _PROCESS_ID,
        _LOCAL_DEVICE_IDS,
        _START_TIMEOUT,
    ),
}
# How the help names values, where the name of the flag does not tell.
_METAVARS = {
    "parts": "MODULES",
    "expect_devices": "N",
    "cpu_devices": "N",
    "compile_cache": "FOLDER",
    "coordinator": "HOST:PORT",
    "num_processes": "N",
    "process_id": "N",
    "local_device_ids": "N,N,...",
    "start_timeout": "SECONDS",
}
_HELP = ("-h", "-help", "--help")


def make_parser() -> CommandParser:
    """Returns a parser that prints the help of the flags in the style of the other commands."""
    width = max(map(len, list_configs()))
    configs = [f"  {name:<{width}}  {summary}" for name, summary in list_configs().items()]
    parser = CommandParser(
        prog="python -m vit_jax.main",
        usage="%(prog)s --config=CONFIG --workdir=WORKDIR [--config.KEY=VALUE ...] [options]",
        description=__doc__,
        epilog="\n".join(["configs:", *configs]),
    )
    for title, holders in _GROUPS.items():
        group = parser.add_argument_group(title)
        for holder in holders:
            flag = flags.FLAGS[holder.name]
            text = (flag.help or "").removeprefix("<cpu|gpu|tpu>: ")
            values = getattr(flag.parser, "enum_values", None)
            options: dict[str, Any] = {"metavar": _METAVARS.get(flag.name, flag.name.upper())}
            if values:
                options = {"choices": values}
            elif flag.boolean:
                options = {"action": "store_true"}
            group.add_argument(f"--{flag.name}", help=text.replace("%", "%%"), **options)
            if holder is _CONFIG:
                group.add_argument("--config.KEY", metavar="VALUE", help="Override this key.")
    return parser


def parse_flags(argv: list[str]) -> list[str]:
    """Parses absl flags; leaves overrides of the config, which are no flags, for `main`."""
    _, rest = parse_overrides(argv)
    if any(argument in _HELP for argument in rest[1:]):
        print_result(make_parser().format_help(), end="")
        sys.exit(0)
    try:
        unused = flags.FLAGS(rest)[1:]
    except flags.UnrecognizedFlagError as e:
        near = find_near(e.flagname, flags.FLAGS, cutoff=0.75)
        hint = f"; did you mean '--{near}'?" if near else f"; see {make_parser().prog} --help"
        raise UserError(f"--{e.flagname} is no flag{suggest_flag(e.flagname) or hint}") from None
    except flags.Error as e:
        raise UserError(str(e)) from None
    if len(unused) == 1 and "=" not in unused[0]:
        name = unused[0].partition(":")[0]
        if not _CONFIG.value and (name in list_configs() or name.endswith(".py")):
            raise UserError(f"{unused[0]!r} is no flag; did you mean '--config={unused[0]}'?")
        if not _WORKDIR.value:
            flags.FLAGS[_WORKDIR.name].value = unused.pop()
    for name, flag in (("config", _CONFIG), ("workdir", _WORKDIR)):
        if not flag.value:
            raise UserError(f"--{name} is missing; see {make_parser().prog} --help")
    if _QUIET.value and _VERBOSE.value:
        raise UserError("--quiet and --verbose: expected one of them")
    if unused:
        hint = suggest_flag(unused[0])
        raise UserError(f"{unused[0]!r} is no flag{hint or '; expected --name=value'}")
    return argv


def _read_device_ids() -> tuple[int, ...] | None:
    ids = _LOCAL_DEVICE_IDS.value
    if ids is None:
        return None
    if not all(i.isdigit() for i in ids):
        raise UserError(f"--local_device_ids={','.join(ids)}: expected numbers, such as 0,1")
    return tuple(map(int, ids))


def _check_config_file() -> None:
    """Refuses a missing config before seconds of imports; a job refuses it with all processes."""
    given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if find_job(*given, _read_device_ids(), os.environ) is None:
        find_file(_CONFIG.value or "")


def _join_job(config: Mapping[str, Any]) -> None:
    from vit_jax.config.cpu_devices import count_cpu_devices
    from vit_jax.runtime import processes
    from vit_jax.runtime.cpu_devices import set_cpu_devices

    ids = _read_device_ids()
    set_cpu_devices(_CPU_DEVICES.value)
    processes.initialize(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        local_device_ids=ids,
        timeout=_START_TIMEOUT.value,
        expect_devices=_EXPECT_DEVICES.value,
        platform=_PLATFORM.value,
        cpu_devices=count_cpu_devices(config) if _CPU_DEVICES.value is None else None,
    )


def _check_same(config: "ConfigDict") -> None:
    """Raises `UserError` unless all processes were started with the same config and workdir."""
    import jax

    from vit_jax.config.schema import per_host_keys
    from vit_jax.runtime import processes

    values = {f"--config.{k}": v for k, v in flatten_config(config.to_dict()).items()}
    values |= {"--workdir": _WORKDIR.value, "vit_jax": __version__, "jax": jax.__version__}
    for key in per_host_keys():
        values.pop(f"--config.{key}", None)
    processes.check_same(values)


def _check_trackers(config: Mapping[str, Any]) -> None:
    """Refuses trackers that are not installed, before the process waits for others."""
    from vit_jax.config.schema import read_section
    from vit_jax.observe.trackers import check_trackers

    section = config.get("tracking") or {}
    try:
        given = {"trackers": section["trackers"]} if "trackers" in section else {}
        tracking, _ = read_section("tracking", given)
    except (UserError, TypeError):  # The config is refused later, by all processes together.
        return
    check_trackers(tracking)


def main(argv: list[str]) -> None:
    """Called by absl with the flags parsed."""
    with importing():
        import jax
        from ml_collections import ConfigDict

        from vit_jax.runtime import compile_cache, processes
        from vit_jax.training.dry_run import describe_dry_run
        from vit_jax.training.run import train
    trust_parts(_PARTS.value)
    overrides, _ = parse_overrides(argv[1:])
    config, error = ConfigDict(), None
    try:
        config = load_config(_CONFIG.value or "", overrides)
    except UserError as e:
        error = e
    _check_trackers(config.to_dict())
    if _DRY_RUN.value:
        compile_cache.check(_COMPILE_CACHE.value)
    else:
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
    if not _DRY_RUN.value:
        train(config, _WORKDIR.value or "", command=command)
        return
    lines = describe_dry_run(config, _WORKDIR.value or "")
    if jax.process_index() == 0:
        print_result("\n".join(lines))


def _main_to_the_end(argv: list[str]) -> None:
    _check_config_file()
    with importing():
        from vit_jax.checkpoint.manager import SaveError
        from vit_jax.observe.divergence import DivergedError
        from vit_jax.runtime.preemption import Interrupted, Preempted
    try:
        main(argv)
    except (DivergedError, SaveError) as e:
        print_error(e)
        sys.exit(1)
    except Preempted as e:
        print_line(f"{e}; the same command resumes from there", sys.stdout)
        sys.exit(INTERRUPTED if isinstance(e, Interrupted) else RUN_AGAIN)
    # The run is over and saved: being told to stop while Python ends must not make it a failed one.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _describe_checkpoint() -> str:
    """What the same command would do now."""
    steps = []
    # The flags may not be parsed yet, and the workdir may not be readable.
    with contextlib.suppress(flags.Error, UserError):
        steps = list_steps(find_folder(_WORKDIR.value or ""))
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
    except BrokenPipeError:  # Who reads the help or the dry run has seen enough.
        sys.exit(1)
    except KeyboardInterrupt:
        report_interrupt(f"interrupted; {_describe_checkpoint()}")
        sys.exit(INTERRUPTED)
    finally:
        settle_streams()


if __name__ == "__main__":
    run()
