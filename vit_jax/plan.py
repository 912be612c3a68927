# SPDX-License-Identifier: Apache-2.0
"""Predicts whether a run fits and how fast it can be, without its devices and without its data.

Compiles the step of the run itself for a topology of TPUs or GPUs, which needs their compiler and
none of them: pip install 'vit_jax[tpu-plan]' or 'vit_jax[gpu-plan]'. --config.KEY=VALUE overrides a
key, as in a run.

Examples:
  python -m vit_jax.plan --config=configs/vit_i1k.py:variant=B/16 --topology=v5e:4x4
  python -m vit_jax.plan --config=... --topology=v5e:16x16 --num_slices=2 --json
  python -m vit_jax.plan --config=... --topology=v5p:4x4x4 --search
  python -m vit_jax.plan --config=... --topology=v5e:4x4 --scale 16,64,256,1024
  python -m vit_jax.plan --config=... --topology=h100:8 --num_slices=4 --kernels
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vit_jax.config.load import find_file, load_config, parse_overrides
from vit_jax.config.reduced import reduce_for_planning
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.utils.command import CommandParser, local_path, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import trust_parts
from vit_jax.utils.signals import importing
from vit_jax.utils.streams import print_result

if TYPE_CHECKING:
    from vit_jax.planning.plan import Plan
    from vit_jax.planning.topologies import Topology

# Arguments for the subprocesses that compile.
_PASSED_ON = ("config", "topology", "num_slices", "num_classes", "image_size", "cache", "parts")


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The arguments, and the overrides of the config.

    Raises:
      UserError: an argument does not exist, or excludes another.
    """
    overrides, rest = parse_overrides(list(argv))
    parser = CommandParser(prog="python -m vit_jax.plan", description=__doc__)
    add = parser.add_argument
    add(
        "--config",
        required=True,
        help="Plan a run of this config: a file or a name, and its arguments after a colon.",
    )
    add(
        "--topology",
        required=True,
        help="Plan for these devices: v4, v5e, v5p, v6e or tpu7x:XxY[xZ] for TPUs, h100:N for N "
        "GPUs of a host, cpu:N for CPU devices.",
    )
    add(
        "--num_slices",
        type=int,
        default=1,
        help="Plan for this many slices of TPUs, or hosts of GPUs. The default is %(default)s.",
    )
    add(
        "--num_classes",
        type=int,
        help="Plan for this many classes without reading the dataset.",
    )
    add(
        "--image_size",
        type=int,
        help="Plan for images of this size, with --num_classes. The default is that of "
        "data.preprocess.",
    )
    add("--kernels", action="store_true", help="List the kernels that take the longest.")
    add("--json", action="store_true", help="Print the plan as JSON.")
    add(
        "--search",
        action="store_true",
        help="Find the fastest mesh, remat and gradient accumulation.",
    )
    add(
        "--images_per_device",
        type=_ints,
        default=(),
        metavar="N,N,...",
        help="Try these batch sizes too, with --search.",
    )
    add(
        "--max_compiles",
        type=int,
        default=6,
        help="Compile at most this many programs, with --search. The default is %(default)s.",
    )
    add(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="Compile in this many processes. The default is one for each core.",
    )
    add(
        "--scale",
        type=_ints,
        metavar="N,N,...",
        help="Predict the speed on these numbers of chips, such as 16,64,256.",
    )
    add(
        "--cache",
        type=local_path,
        help="Keep compiled programs in this folder. The default is ~/.cache/vit_jax/plan.",
    )
    parser.add_parts()
    args = parser.parse_args(rest)
    if args.search and args.scale:
        raise UserError("--search and --scale: expected one of them")
    if min(args.max_compiles, args.jobs) < 1:
        raise UserError("--max_compiles and --jobs: expected at least 1")
    find_file(args.config)
    return args, overrides


def _ints(value: str) -> tuple[int, ...]:
    numbers = tuple(int(x) for x in value.split(","))
    if min(numbers) < 1:
        raise ValueError(value)
    return numbers


def main(argv: Sequence[str]) -> None:
    """Plans a run and prints the result."""
    args, overrides = parse_arguments(argv)
    with importing():
        import jax

        from vit_jax.planning.plan import make_plan
        from vit_jax.planning.search import default_cache
        from vit_jax.planning.topologies import parse_topology
    # Nothing runs here: accelerators are not initialized, since others may be using them.
    jax.config.update("jax_platforms", "cpu")
    args.cache = args.cache or default_cache()
    trust_parts(args.parts)
    topology = parse_topology(args.topology, num_slices=args.num_slices)
    config = load_config(args.config, overrides).to_dict()
    config = reduce_for_planning(config, num_classes=args.num_classes, image_size=args.image_size)
    if args.search:
        found, lines = _search(args, overrides, config, topology)
    elif args.scale:
        found, lines = _scale(args, overrides, topology)
    else:
        found = make_plan(config, topology, cache=args.cache)
        lines = _describe(found, config, topology, kernels=args.kernels)
    if args.json:
        print_result(json.dumps(found, indent=1))
    else:
        for line in lines:
            print_result(line)


def _describe(
    plan: "Plan", config: Mapping[str, Any], topology: "Topology", *, kernels: bool
) -> Iterator[str]:
    from vit_jax.planning import search, text

    yield from text.describe_plan(plan)
    if kernels:
        yield from text.describe_kernels(plan)
    if not plan["fits"]:
        candidates = search.make_candidates(config, topology)
        yield from text.describe_remedies(plan, candidates)


def _search(
    args: argparse.Namespace,
    overrides: Mapping[str, Any],
    config: Mapping[str, Any],
    topology: "Topology",
) -> tuple[Any, Iterator[str]]:
    """The plans of the best ways to run a config, as JSON and as lines."""
    from vit_jax.planning import search as search_lib
    from vit_jax.planning import text

    candidates = search_lib.make_candidates(
        config, topology, images_per_device=args.images_per_device
    )
    passed = pass_on(args, overrides)
    total = min(args.max_compiles, len(candidates))
    with ProgressLog("compiling", total=total, unit="candidates") as progress:
        results = search_lib.search(
            candidates,
            topology.chip.hbm_bytes if topology.chip else 0,
            lambda c: search_lib.plan_in_subprocess(passed, c.overrides),
            max_compiles=args.max_compiles,
            jobs=args.jobs,
            report=progress.advance,
        )
    rows = [{"overrides": c.overrides, "plan": plan} for c, plan in results]
    return rows, text.describe_search(results, len(candidates))


def _scale(
    args: argparse.Namespace, overrides: Mapping[str, Any], topology: "Topology"
) -> tuple[Any, Iterator[str]]:
    """The predicted speed for each number of chips, as JSON and as lines."""
    from vit_jax.planning import scale, search, text

    if topology.chip is None:
        raise UserError(f"--topology={topology.name!r}: expected a TPU or a GPU to scale")
    passed = pass_on(args, overrides)
    points = scale.compile_points(lambda more: search.plan_in_subprocess(passed, more))
    rows = scale.predict(points, topology, args.scale)
    return [dataclasses.asdict(row) for row in rows], text.describe_scale(rows, points, topology)


def pass_on(args: argparse.Namespace, overrides: Mapping[str, Any]) -> list[str]:
    """The arguments for a subprocess that compiles with further overrides."""
    given = {key: getattr(args, key) for key in _PASSED_ON}
    return [
        *(f"--{key}={value}" for key, value in given.items() if value not in (None, "")),
        *(f"--config.{key}={value!r}" for key, value in overrides.items()),
    ]


if __name__ == "__main__":
    run_command(main)
