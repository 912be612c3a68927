# SPDX-License-Identifier: Apache-2.0
"""Where a training step on a CPU spends its time, by kinds of operations, beside one of timm.

    python -m benchmarks.step_profile --torch_python=build/torch/bin/python \
        --json benchmarks/results/step_profile.json

The steps are those of benchmarks/step_peers.py. Each is recorded by the profiler of its framework
for --rounds windows of --steps steps, in turns; medians over the rounds are shown. Of vit_jax it is
the time on each device, of timm that of the thread that calls the operations, which use all cores.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

if __package__ is None:  # As the program of a peer, in another environment.
    sys.path.insert(0, str(Path(__file__).parent.parent))

KINDS = (
    "products of layers",
    "attention",
    "LayerNorm",
    "GELU, biases and sums in blocks",
    "copies and transposes",
    "optimizer and norms of gradients",
    "between devices",
    "other",
)
_PROJECTIONS = re.compile(r"/(query|key|value|out)/")
# Of operations of PyTorch, by their names; the first that matches counts.
_OF_TORCH = {
    "products of layers": r"aten::(addmm|mm|convolution|mkldnn|_convolution|convolution_backward)",
    "attention": r"aten::_?(scaled_dot_product|softmax|_softmax|bmm|baddbmm)",
    "LayerNorm": r"aten::native_layer_norm",
    "optimizer and norms of gradients": (
        r"aten::(_fused_adamw|_foreach|addcmul|addcdiv|lerp|sqrt|_local_scalar_dense|item)"
    ),
    "GELU, biases and sums in blocks": r"aten::(gelu|add_?$|sum$|mul$)",
    "copies and transposes": r"aten::(copy_|clone|cat|_reshape_copy|stack)",
}


def classify(opcodes: set[str], op_name: str) -> str:
    """The kind of an instruction of XLA, by what it computes and the operation it comes from."""
    if any(code.startswith(("all-", "reduce-scatter", "collective-")) for code in opcodes):
        return "between devices"
    if "MultiHeadDotProductAttention" in op_name and not _PROJECTIONS.search(op_name):
        return "attention"
    if opcodes & {"dot", "convolution"}:
        return "products of layers"
    if opcodes <= {"copy", "transpose", "bitcast", "reshape", "broadcast"}:
        return "copies and transposes"
    if "LayerNorm" in op_name or "encoder_norm" in op_name:
        return "LayerNorm"
    if "encoderblock" in op_name:
        return "GELU, biases and sums in blocks"
    if op_name and "jvp(" not in op_name:
        return "optimizer and norms of gradients"
    return "other"


def classify_torch(name: str) -> str:
    """The kind of an operation of PyTorch."""
    for kind, pattern in _OF_TORCH.items():
        if re.match(pattern, name):
            return kind
    return "other"


def vit_jax(variant: str, batch_size: int) -> Callable[[int], dict[str, float]]:
    """A function that records steps: milliseconds of one by kind."""
    import jax

    from benchmarks.step_peers import compile_vit_jax
    from vit_jax.observe.trace import read_operations
    from vit_jax.planning.hlo import Program

    _, state, batch, compiled = compile_vit_jax(variant, 224, batch_size, {})
    program = Program(compiled.as_text())
    kinds = {}
    for _, instruction in program.executed():
        inside = [
            one for name, _ in program.calls(instruction) for one in program.computation(name)
        ]
        opcodes = {one.opcode for one in inside} - {"parameter", "constant"}
        kinds[instruction.name] = classify(opcodes or {instruction.opcode}, instruction.op_name)

    def record(steps: int) -> dict[str, float]:
        nonlocal state
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(steps):
                    state, metrics = compiled(state, batch)
                    jax.block_until_ready(metrics)
            found: dict[str, float] = defaultdict(float)
            for one in read_operations(Path(folder), numbered=True):
                found[kinds.get(one.name, "other")] += one.seconds
        return {k: 1e3 * v / steps / jax.local_device_count() for k, v in found.items()}

    return record


def timm_eager(variant: str, batch_size: int) -> Callable[[int], dict[str, float]]:
    """A function that records steps: milliseconds of one by kind."""
    from torch.profiler import ProfilerActivity, profile

    from benchmarks import step_peers

    step, _, _ = step_peers.timm_eager(variant, 224, batch_size, {})

    def record(steps: int) -> dict[str, float]:
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            for _ in range(steps):
                step()
        found: dict[str, float] = defaultdict(float)
        for one in trace.key_averages():
            found[classify_torch(one.key)] += one.self_cpu_time_total
        return {kind: microseconds / 1e3 / steps for kind, microseconds in found.items()}

    return record


PEERS = {f.__name__: f for f in (vit_jax, timm_eager)}


def serve(name: str, variant: str, batch_size: int) -> None:
    """Is a program that takes turns: reads numbers of steps, and writes what it records."""
    record = PEERS[name](variant, batch_size)
    record(1)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(record(int(float(line)))), flush=True)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["Ti/16", "S/16"])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--torch_python", help="an interpreter that has PyTorch and timm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of each turn")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args(argv)

    from benchmarks.environment import describe_environment, versions_of, write_results
    from benchmarks.turns import start

    environment = describe_environment("jax", "flax", "optax")
    load_at_start = [round(load, 1) for load in os.getloadavg()]
    pythons = {"vit_jax": sys.executable}
    if args.torch_python:
        pythons["timm_eager"] = args.torch_python
        environment["versions"] |= versions_of(args.torch_python, "torch timm")  # pyright: ignore
    results: dict[str, dict[str, dict[str, float]]] = {}
    for variant in args.variants:
        commands = {
            peer: [python, __file__, "--serve", peer, variant, str(args.batch_size)]
            for peer, python in pythons.items()
        }
        runs: dict[str, list[dict[str, float]]] = {peer: [] for peer in commands}
        with start(commands) as peers:
            for _ in range(args.rounds):
                for name, peer in peers.items():
                    runs[name].append(peer.measure(args.steps))
        results[variant] = {
            name: {
                kind: round(statistics.median(run.get(kind, 0.0) for run in found), 1)
                for kind in KINDS
            }
            for name, found in runs.items()
        }
        print(f"\n{variant}, batches of {args.batch_size}: milliseconds of a step")
        print(f"{'':<35}" + "".join(f"{name:>12}" for name in pythons))
        for kind in KINDS:
            row = (results[variant][name][kind] for name in pythons)
            print(f"{kind:<35}" + "".join(f"{value:>12,.1f}" for value in row))
    if args.json:
        measured = {
            "batch_size": args.batch_size,
            "load_at_start": load_at_start,
            "load_at_end": [round(load, 1) for load in os.getloadavg()],
            "results": results,
        }
        write_results(args.json, environment | measured)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        from benchmarks.turns import run

        run(main)
