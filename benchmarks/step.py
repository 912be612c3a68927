# SPDX-License-Identifier: Apache-2.0
"""Images a second of the training step, beside those of a plain Flax ViT and of timm.

    python -m benchmarks.step --torch_python=build/torch/bin/python \
        --json benchmarks/results/step_cpu.json
    python -m benchmarks.step --variants B/16:128 L/16@384:16 --peers vit_jax timm_compile ...
    python -m vit_jax.benchmark step --config=...   (MFU and peak memory of any config)

The peers stay alive and take turns on the same device, some seconds each; medians over the rounds
are shown, and medians of the ratios of each round. See benchmarks/step_peers.py for what they do.
On a chip of vit_jax/runtime/chips.py, the time of a step is shown beside what the kernels of its
program should take, as `vit_jax.plan` predicts it.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import (
    describe_device,
    describe_environment,
    versions_of,
    write_results,
)
from benchmarks.turns import ROOT, compare, run, start

PEERS = ("vit_jax", "flax_plain", "timm_eager", "timm_compile", "timm_channels_last")
DEFAULT = PEERS[:4]
# vit_jax as it is not by default, to see what its parts come to: environment, and config.
VARIATIONS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "vit_jax_one_device": ({"JAX_NUM_CPU_DEVICES": "1"}, {}),
    "vit_jax_tcmalloc": ({"LD_PRELOAD": ""}, {}),
    "vit_jax_bfloat16": ({}, {"precision": "bfloat16"}),
    "vit_jax_bfloat16_moments": ({}, {"precision": "bfloat16_moments"}),
    "vit_jax_float8": ({}, {"precision": "float8"}),
    "vit_jax_xla_attention": ({}, {"model": {"attention": "xla"}}),
    "vit_jax_scan": ({}, {"model": {"scan": True}}),
    "vit_jax_remat": ({}, {"model": {"remat": "dots"}}),
    "vit_jax_no_triton": ({"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false"}, {}),
    "vit_jax_no_command_buffer": ({"XLA_FLAGS": "--xla_gpu_enable_command_buffer="}, {}),
    "vit_jax_no_autotuning": ({"XLA_FLAGS": "--xla_gpu_autotune_level=0"}, {}),
}
_VARIANT = re.compile(r"(\w+/16)(?:@(\d+))?(?::(\d+))?")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--variants", nargs="+", default=["Ti/16", "S/16"], metavar="NAME[@SIZE][:BATCH_SIZE]"
    )
    parser.add_argument("--torch_python", help="an interpreter that has PyTorch and timm")
    parser.add_argument("--peers", nargs="+", default=DEFAULT, choices=[*PEERS, *VARIATIONS])
    parser.add_argument(
        "--levers",
        nargs="+",
        default=[],
        choices=[*PEERS, *VARIATIONS],
        help="peers of the first variant only",
    )
    parser.add_argument(
        "--within",
        type=float,
        metavar="MINUTES",
        help="start no peer later than two minutes before these are over",
    )
    parser.add_argument("--tcmalloc", help="libtcmalloc_minimal.so.4, for vit_jax_tcmalloc")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="of each turn")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args(argv)
    deadline = float("inf")
    if args.within:
        deadline = time.monotonic() + 60 * (args.within - 2)
    peers = [p for p in args.peers if args.torch_python or not p.startswith("timm")]
    if peers != list(args.peers):
        print("timm is left out: no interpreter was given for it")

    if "vit_jax" not in peers:
        parser.error("--peers: expected vit_jax among them, which the others are compared with")
    if "vit_jax_tcmalloc" in peers and not args.tcmalloc:
        parser.error("--peers vit_jax_tcmalloc: expected --tcmalloc=PATH of the library")

    variants = {variant: parse_variant(variant) for variant in args.variants}
    load_at_start = [round(load, 1) for load in os.getloadavg()]
    environment = describe_environment("jax", "flax", "optax")
    if args.torch_python:
        environment["versions"] |= versions_of(args.torch_python, "torch timm")  # pyright: ignore
    results, left_out = {}, []
    for variant, (name, size, batch_size) in variants.items():
        wanted = [*peers, *(args.levers if variant == args.variants[0] else ())]
        commands = {
            peer: make_command(
                peer, name, size, batch_size, args.torch_python, tcmalloc=args.tcmalloc
            )
            for peer in wanted
        }
        with start(commands, deadline=deadline) as running:
            left_out += [f"{variant} {peer}" for peer in wanted if peer not in running]
            if "vit_jax" not in running:
                continue
            table = compare(
                running,
                ours="vit_jax",
                rounds=args.rounds,
                seconds=args.seconds,
                show="images_per_sec",
            )
        print(f"\n{name} at {size}, batches of {batch_size}")
        print(f"{'peer':<25}{'images/s':>10}{'ratio':>8}{'first step, s':>15}{'peak, GiB':>11}")
        for peer, row in table.items():
            ratio = row["images_per_sec_of_vit_jax"]
            mfu = describe_clock(row)
            print(
                f"{peer:<25}{row['images_per_sec']:>10,.1f}{ratio:>8.2f}"
                f"{row['first_step_s']:>15.1f}{row['peak_gib']:>11.1f}{mfu}"
            )
        if "predicted_ms" not in table["vit_jax"] and describe_device() != "cpu":
            print(f"nothing is predicted: {describe_device()} is not in vit_jax/runtime/chips.py")
        results[variant] = {"size": size, "batch_size": batch_size, "peers": table}
    if left_out:
        print(f"left out, because {args.within:g} minutes were over: {', '.join(left_out)}")
    if args.json:
        notes = {
            "device": describe_device(),
            "load_at_start": load_at_start,
            "load_at_end": [round(load, 1) for load in os.getloadavg()],
        }
        write_results(args.json, environment | notes | {"results": results})


def describe_clock(row: Mapping[str, Any]) -> str:
    """MFU, and the time of a step beside the prediction, of a peer that has them."""
    if "mfu_percent" not in row:
        return ""
    return (
        f"  MFU {row['mfu_percent']:.1f} %, {row['step_ms']:.1f} ms measured, "
        f"{row['predicted_ms']:.1f} predicted ({row['error_percent']:+.0f} %)"
    )


def parse_variant(text: str) -> tuple[str, int, int]:
    """Name, pixels of a side (224) and batch size (32) of `NAME[@SIZE][:BATCH_SIZE]`."""
    if not (match := _VARIANT.fullmatch(text)):
        raise SystemExit(f"--variants {text}: expected NAME[@SIZE][:BATCH_SIZE], as L/16@384:16")
    return match[1], int(match[2] or 224), int(match[3] or 32)


def make_command(
    peer: str,
    variant: str,
    size: int,
    batch_size: int,
    torch_python: str | None,
    *,
    tcmalloc: str | None = None,
) -> tuple[str, ...]:
    """What starts a peer, or a variation of vit_jax."""
    environment, overrides = VARIATIONS.get(peer, ({}, {}))
    if "LD_PRELOAD" in environment:
        environment = {"LD_PRELOAD": tcmalloc or ""}
    return (
        "env",
        *(f"{key}={value}" for key, value in environment.items()),
        (torch_python or "") if peer.startswith("timm") else sys.executable,
        str(ROOT / "benchmarks" / "step_peers.py"),
        "vit_jax" if peer in VARIATIONS else peer,
        variant,
        str(size),
        str(batch_size),
        json.dumps(overrides),
    )


if __name__ == "__main__":
    run(main)
