# SPDX-License-Identifier: Apache-2.0
"""Images a second of the training step, beside those of a plain Flax ViT and of timm.

    python -m benchmarks.step --torch_python=build/torch/bin/python \
        --json benchmarks/results/step_cpu.json
    python -m vit_jax.benchmark step --config=...   (MFU and peak memory of any config)

The peers stay alive and take turns on the same device, some seconds each; medians over the rounds
are shown, and medians of the ratios of each round. See benchmarks/step_peers.py for what they do.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks.environment import describe_environment, versions_of
from benchmarks.turns import ROOT, compare, start

PEERS = ("vit_jax", "flax_plain", "timm_eager", "timm_compile")
# vit_jax as it is not by default, to see what its parts come to on a CPU.
VARIATIONS = ("vit_jax_one_device", "vit_jax_tcmalloc")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["Ti/16", "S/16"])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--torch_python", help="an interpreter that has PyTorch and timm")
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS + VARIATIONS)
    parser.add_argument("--tcmalloc", help="libtcmalloc_minimal.so.4, for vit_jax_tcmalloc")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="of each turn")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args()
    peers = [p for p in args.peers if args.torch_python or not p.startswith("timm")]
    if peers != list(args.peers):
        print("timm is left out: no interpreter was given for it")

    if "vit_jax_tcmalloc" in peers and not args.tcmalloc:
        parser.error("--peers vit_jax_tcmalloc: expected --tcmalloc=PATH of the library")

    load_at_start = [round(load, 1) for load in os.getloadavg()]
    environment = describe_environment("jax", "flax", "optax")
    if args.torch_python:
        environment["versions"] |= versions_of(args.torch_python, "torch timm")  # pyright: ignore
    results = {}
    for variant in args.variants:
        script = str(ROOT / "benchmarks" / "step_peers.py")
        commands = {
            name: (
                *_environment(name, args.tcmalloc),
                args.torch_python if name.startswith("timm") else sys.executable,
                script,
                "vit_jax" if name in VARIATIONS else name,
                variant,
                str(args.batch_size),
            )
            for name in peers
        }
        with start(commands) as running:
            table = compare(
                running,
                ours="vit_jax",
                rounds=args.rounds,
                seconds=args.seconds,
                show="images_per_sec",
            )
        print(f"\n{variant}, batches of {args.batch_size}")
        print(f"{'peer':<14}{'images/s':>10}{'ratio':>8}{'first step, s':>15}{'peak, GiB':>11}")
        for name, row in table.items():
            ratio = row["images_per_sec_of_vit_jax"]
            print(
                f"{name:<14}{row['images_per_sec']:>10,.1f}{ratio:>8.2f}"
                f"{row['first_step_s']:>15.1f}{row['peak_gib']:>11.1f}"
            )
        results[variant] = table
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        notes = {
            "batch_size": args.batch_size,
            "load_at_start": load_at_start,
            "load_at_end": [round(load, 1) for load in os.getloadavg()],
        }
        args.json.write_text(
            json.dumps(environment | notes | {"results": results}, indent=2) + "\n"
        )
        print(f"wrote {args.json}")


def _environment(peer: str, tcmalloc: str | None) -> tuple[str, ...]:
    """What stands before a peer's command."""
    if peer == "vit_jax_one_device":
        return ("env", "JAX_NUM_CPU_DEVICES=1")
    return ("env", f"LD_PRELOAD={tcmalloc}") if peer == "vit_jax_tcmalloc" else ()


if __name__ == "__main__":
    main()
