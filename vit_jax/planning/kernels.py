# SPDX-License-Identifier: Apache-2.0
"""The time that a compiled program should take on a chip: a sum over its kernels.

A kernel takes the longest of three: moving its bytes, computing its products, and being launched;
one that Pallas compiled for a TPU also of its exponentials. Where the compiler itself estimates
cycles, as for most TPUs, these count. No two kernels overlap, and none finds in a cache what
another one left, so this is an estimate, good for comparing programs. Transfers between GPUs
overlap with the kernels that the program has between their start and their end.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from vit_jax.planning.hlo import Collective, Instruction, Program, Transfer, parse_dims
from vit_jax.runtime.chips import Chip

# Parts of the name of an operation that are functions or transformations, not modules.
_NO_MODULE = re.compile(
    r"[(.<]|^(while|body|cond|closed_call|checkpoint|rematted_computation|branch_\d+_fun)$"
)
_GEMM = "__cublas$"
_ATTENTION = "__cudnn$fmha"
_CONVOLUTION = "__cudnn$conv"
_PALLAS = "tpu_custom_call"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operation that runs on its own, in a program for one device.

    Attributes:
      layer: path of the module, such as `encoderblock_0/MlpBlock_0/Dense_0`, and the operation.
      backward: whether it belongs to the backward pass.
      kind: the opcode, or what a custom call runs.
      count: how often it runs in a step.
      bytes: read from and written to the main memory, by one run.
      flops: of the matrix products and convolutions of one run.
      cycles: that the compiler estimates for one run; None where it does not.
      exponentials: of one run, of a kernel that Pallas compiled and that counts them.
    """

    layer: str
    backward: bool
    kind: str
    count: int
    bytes: int
    flops: int
    cycles: int | None = None
    exponentials: int = 0


@dataclasses.dataclass(frozen=True)
class TimedKernel:
    """A kernel with the seconds that all of its runs take, and what bounds them.

    `bound` is `memory`, `compute`, `vectors` or `launch`, or `cycles` where the compiler estimates
    those.
    """

    kernel: Kernel
    seconds: float
    bound: str


def list_kernels(program: Program) -> list[Kernel]:
    """Lists the kernels of a program, without transfers between devices."""
    return [
        _make_kernel(program, instruction, count)
        for count, instruction in program.executed()
        if _is_kernel(instruction)
    ]


def find_waits(
    program: Program, chip: Chip, transfers: Mapping[Instruction, Transfer]
) -> tuple[float, float]:
    """Seconds of all transfers of a program for GPUs, and those in which no kernel runs meanwhile.

    Kernels run one after the other in the order of the program, and so do transfers, beside them;
    where the program needs what a transfer brings, the kernels wait.

    Args:
      program: scheduled, for `chip`.
      chip: a GPU.
      transfers: by the instruction that starts them, as `Program.transfers` returns them.
    """

    def run(name: str) -> tuple[float, float, float]:
        now = links = sent = waited = 0.0
        ends: dict[Instruction, float] = {}
        for i in program.computation(name):
            if i in transfers:
                seconds = transfer_seconds(transfers[i], chip)
                sent += seconds
                links = max(now, links) + seconds
                ends[i] = links
            elif _is_kernel(i):
                now += _time(_make_kernel(program, i, 1), chip).seconds
            for callee, times in program.calls(i) if i.opcode in ("while", "call") else ():
                inner = run(callee)
                now, sent, waited = (
                    total + times * part
                    for total, part in zip((now, sent, waited), inner, strict=True)
                )
            needed = i if i in ends and not i.starts else i.waits_for
            if needed in ends and ends[needed] > now:
                waited += ends[needed] - now
                now = ends[needed]
        return now, sent, waited

    _, sent, waited = run(program.entry)
    return sent, waited


def transfer_seconds(transfer: Transfer | Collective, chip: Chip) -> float:
    """Seconds of transfers: first between the devices of a slice or host, then between these."""
    return transfer.bytes / (chip.link_share * chip.ici_bandwidth) + transfer.dcn_bytes / (
        chip.link_share * chip.dcn_bandwidth
    )


def _is_kernel(instruction: Instruction) -> bool:
    return not instruction.is_free and not instruction.is_collective


def _make_kernel(program: Program, instruction: Instruction, count: int) -> Kernel:
    return Kernel(
        *_name(program, instruction),
        kind=_kind(instruction),
        count=count,
        bytes=program.moved_bytes(instruction),
        flops=_flops(program, instruction),
        cycles=instruction.estimated_cycles,
        exponentials=instruction.counted_cost("transcendentals"),
    )


def time_kernels(kernels: Sequence[Kernel], chip: Chip) -> list[TimedKernel]:
    """Times kernels on a chip.

    Where the compiler estimates cycles, operations without an estimate are part of others, except
    for custom calls, such as those of Pallas.
    """
    has_cycles = chip.clock is not None and any(k.cycles is not None for k in kernels)
    if has_cycles:
        kernels = [k for k in kernels if k.cycles is not None or k.kind.startswith("call ")]
    return [_time(kernel, chip) for kernel in kernels]


def _time(kernel: Kernel, chip: Chip) -> TimedKernel:
    if chip.clock is not None and kernel.cycles is not None:
        return TimedKernel(kernel, kernel.count * kernel.cycles / chip.clock, "cycles")
    times = {
        "memory": kernel.bytes / (chip.memory_share * chip.hbm_bandwidth),
        "compute": kernel.flops / (chip.product_share * chip.flops),
        "vectors": kernel.exponentials / chip.exponentials if chip.exponentials else 0.0,
        "launch": chip.launch_seconds,
    }
    bound = max(times, key=lambda unit: times[unit])
    return TimedKernel(kernel, kernel.count * times[bound], bound)


def merge_alike(timed: Sequence[TimedKernel]) -> list[TimedKernel]:
    """Merges kernels that do the same in several blocks of a model; the longest come first."""
    merged: dict[Kernel, TimedKernel] = {}
    for one in timed:
        layer = re.sub(r"(block\w*?)_\d+", r"\1_*", one.kernel.layer)
        key = dataclasses.replace(one.kernel, layer=layer, count=0)
        before = merged.get(key, TimedKernel(key, 0.0, one.bound))
        kernel = dataclasses.replace(key, count=before.kernel.count + one.kernel.count)
        merged[key] = TimedKernel(kernel, before.seconds + one.seconds, one.bound)
    return sorted(merged.values(), key=lambda one: -one.seconds)


def _name(program: Program, instruction: Instruction) -> tuple[str, bool]:
    """The layer of an instruction, and whether it belongs to the backward pass."""
    path = instruction.op_name
    if not path:  # The compiler made it: it is named as what it computes last.
        body = program.computation(instruction.attribute("calls"))
        path = next((i.op_name for i in reversed(body) if i.op_name), instruction.opcode)
    parts = [part for part in path.split("/") if not _NO_MODULE.search(part)]
    return "/".join(parts) or path, "transpose(" in path


def _kind(instruction: Instruction) -> str:
    if instruction.opcode == "custom-call":
        return f"call {instruction.call_target.removeprefix('__')}"
    return instruction.opcode


def _flops(program: Program, instruction: Instruction) -> int:
    """Operations of the products in an instruction, and in what it calls."""
    if instruction.opcode in ("fusion", "call") or instruction.opcode.startswith("async"):
        key = "to_apply" if instruction.opcode == "call" else "calls"
        return sum(_flops(program, i) for i in program.computation(instruction.attribute(key)))
    target = instruction.call_target
    if instruction.opcode == "dot" or target.startswith(_GEMM):
        return _product_flops(instruction)
    if instruction.opcode == "convolution" or target.startswith(_CONVOLUTION):
        return _convolution_flops(instruction)
    if target.startswith(_ATTENTION):
        return _attention_flops(instruction)
    if target == _PALLAS:
        return instruction.counted_cost("flops")
    return 0


def _product_flops(product: Instruction) -> int:
    contracted = re.search(
        r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', product.attributes.replace("\\", "")
    )
    if contracted is None or not product.operands:
        return 0
    lhs = parse_dims(product.operands[0].type)
    depth = math.prod(lhs[int(d)] for d in re.findall(r"\d+", contracted[1]))
    return 2 * math.prod(parse_dims(product.type)) * depth


def _convolution_flops(convolution: Instruction) -> int:
    labels = re.search(r"dim_labels=\w+_(\w+)->", convolution.attributes)
    if labels is None or len(convolution.operands) < 2:
        return 0
    target = convolution.call_target
    lhs, rhs = (parse_dims(operand.type) for operand in convolution.operands[:2])
    result = parse_dims(convolution.type)
    # The gradients swap the roles: each time, every output is a sum over a window of inputs.
    outputs, kernel = result, rhs
    if "BackwardFilter" in target:
        outputs, kernel = rhs, result
    elif "BackwardInput" in target:
        outputs, kernel = lhs, rhs
    window = [size for size, label in zip(kernel, labels[1], strict=True) if label != "o"]
    return 2 * math.prod(outputs) * math.prod(window)


def _attention_flops(call: Instruction) -> int:
    scores = re.search(
        r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([\d,"\s]+)\]', call.attributes
    )
    if scores is None or not call.operands:
        return 0
    batch, heads, queries, keys = (int(n) for n in re.findall(r"\d+", scores[1]))
    width = math.prod(parse_dims(call.operands[0].type)) // (batch * heads * queries)
    # Scores and outputs; backward, the scores once more and the gradients of q, k, v and scores.
    products = 5 if "Backward" in call.call_target else 2
    return products * 2 * batch * heads * queries * keys * width
