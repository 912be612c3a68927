# SPDX-License-Identifier: Apache-2.0
"""Counts the cycles of the attention kernels for TPUs in the schedules that libtpu makes.

XLA estimates no cycles of kernels of Pallas. libtpu can write down which instructions it starts in
each cycle; for these kernels, which branch only at the end of a loop over groups of heads, their
number is the time of one group. With many tokens there is a loop over queries too, and no number.
`vit_jax.runtime.chips` takes its `exponentials` from these numbers. No TPU is
needed.

python -m tools.tpu_schedule --topology=v5e:2x2 --tokens=197 --heads=12 --head_dim=64
"""

import argparse
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

KERNELS = ("attention_forward_heads", "attention_backward_heads")


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles the kernels, and prints their cycles."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head_dim", type=int, default=64)
    args = parser.parse_args(argv)
    from vit_jax.models.attention_tpu import divide_work

    sizes = args.tokens, args.heads, args.head_dim, 2
    division = divide_work(*sizes, rows=False, backward=True)
    if division is None or division.queries < args.tokens:
        parser.error(f"--tokens={args.tokens}: expected few enough that their scores fit into VMEM")
    with tempfile.TemporaryDirectory() as folder:
        # Read when libtpu is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            + os.environ.get("LIBTPU_INIT_ARGS", "")
        )
        compile_kernels(args.topology, args.tokens, args.heads, args.head_dim)
        for name in KERNELS:
            (path,) = Path(folder).glob(f"*{name}*schedule-analysis_final_bundles.txt")
            cycles = count_cycles(path.read_text())
            each = cycles / division.group
            print(
                f"{name}: {cycles:,} cycles for {division.group} heads of {args.head_dim} channels "
                f"and {args.tokens} tokens on {args.topology}, {each:,.0f} for one"
            )


def compile_kernels(topology: str, tokens: int, heads: int, head_dim: int) -> None:
    """Compiles attention and its gradient."""
    import jax
    import jax.numpy as jnp

    from vit_jax.models.attention_tpu import tpu_attention
    from vit_jax.planning.topologies import make_devices, parse_topology

    jax.config.update("jax_platforms", "cpu")
    device = make_devices(parse_topology(topology))[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2, tokens, heads, head_dim), jnp.bfloat16, sharding=sharding)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> object:
        out, backward = jax.vjp(tpu_attention, q, k, v)
        return out, backward(gradient)

    jax.jit(both).lower(x, x, x, x).compile()


def count_cycles(analysis: str) -> int:
    """The bundles of instructions in libtpu's analysis of a schedule: one starts in each cycle."""
    match = re.search(r"total scheduled bundles:\s+(\d+)", analysis)
    if match is None:
        raise SystemExit("libtpu's analysis of a schedule has no line 'total scheduled bundles'")
    return int(match[1])


if __name__ == "__main__":
    main()
