# SPDX-License-Identifier: Apache-2.0
"""Memory traffic and transfers of a compiled program, parsed from the text of its HLO.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# Transfers between slices, which the hosts of TPUs perform.
_BY_HOSTS = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
# Prefixes of the calls of libraries for GPUs.
_LIBRARIES = ("__cublas$", "__cudnn$")
# Operations that move no bytes: other names for a value, or work that is counted elsewhere.
_FREE = {
    *("parameter", "constant", "iota", "partition-id", "replica-id"),
    *("tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"),
    *("while", "call", "conditional"),
    *(f"{kind}-done" for kind in ("copy", "slice", *_COLLECTIVES)),
}
_BETWEEN_HOSTS = ("send", "send-done", "recv", "recv-done")
_SLICING = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of HLO: `%name = type opcode(operands), attributes`.

    Operands that other computations define are left out. The value of a constant and the number of
    a parameter are at the start of `attributes`.
    """

    name: str
    type: str
    opcode: str
    operands: tuple["Instruction", ...]
    attributes: str

    def attribute(self, key: str) -> str:
        """The name of the computation in an attribute such as `body`; empty if there is none."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else ""

    @property
    def value(self) -> str:
        """The value of a constant, or the number of a parameter."""
        return self.attributes.split(")")[0]

    @property
    def bytes(self) -> int:
        """Size of the result, in any memory."""
        return _type_bytes(self.type)

    @property
    def is_free(self) -> bool:
        """Whether it moves no bytes and computes nothing by itself."""
        return self.opcode in _FREE

    @property
    def is_collective(self) -> bool:
        """Whether it transfers data between devices."""
        return _collective_kind(self) is not None or self.opcode in _BETWEEN_HOSTS

    @property
    def starts(self) -> bool:
        """Whether it begins what another instruction waits for."""
        return self.opcode.endswith("-start")

    @property
    def waits_for(self) -> "Instruction | None":
        """The instruction that started what this one waits for; None for other instructions."""
        return self.operands[0] if self.opcode.endswith("-done") and self.operands else None

    @property
    def call_target(self) -> str:
        """What a custom call runs; empty for other instructions."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def op_name(self) -> str:
        """The path of the operation in the traced program; empty if the compiler made it."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate; None without one, or with one that is impossible."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        # For some chips the estimates are near 2**63.
        return int(match[1]) if match and 0 < int(match[1]) < 2**53 else None

    def counted_cost(self, unit: str) -> int:
        """What a kernel of Pallas says that it costs, such as its `flops`; 0 for others."""
        match = re.search(rf'"cost_estimate":\{{[^}}]*"{unit}":"(\d+)"', self.attributes)
        return int(match[1]) if match else 0

    @functools.cached_property
    def hbm_bytes(self) -> int:
        """Size of the part of the result that is in the main memory of the device."""
        return _type_bytes(self.type, hbm_only=True)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Transfers of one kind along some axes of the mesh, in one run of the program.

    Attributes:
      kind: such as `all-gather`.
      axes: of the mesh, along which devices exchange data.
      count: number of transfers.
      bytes: that each device sends to others of its slice.
      dcn_bytes: that each device sends to other slices.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    dcn_bytes: int


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One run of an instruction that sends data along axes of the mesh, in bytes of each device.

    The attributes are those of `Collective`; without axes, nothing is sent.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    dcn_bytes: int


class Program:
    """A parsed HLO module, whose computation `entry` runs first.

    Args:
      text: the module, as `compiled.as_text()` returns it.
    """

    def __init__(self, text: str):
        self._computations, self.entry = _parse(text)

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs, including those within fusions."""
        counts: dict[str, int] = defaultdict(int)

        def visit(name: str, times: int) -> None:
            counts[name] += times
            for instruction in self._computations[name]:
                for callee, factor in self.calls(instruction):
                    visit(callee, times * factor)

        visit(self.entry, 1)
        return dict(counts)

    def calls(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """The computations that an instruction runs, and how often."""
        for key in ("calls", "to_apply", "body"):
            callee = instruction.attribute(key)
            if callee in self._computations:
                yield callee, self._trips(instruction) if key == "body" else 1
        if branches := re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes):
            for callee in _NAME.findall(branches[1]):
                yield callee, 1

    def _trips(self, loop: Instruction) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        # The loop of a scan compares a counter, which starts at 0, with a constant.
        for i in self._computations.get(loop.attribute("condition"), ()):
            if i.opcode == "compare" and "direction=LT" in i.attributes:
                for operand in i.operands:
                    if operand.opcode == "constant" and operand.value.isdigit():
                        return int(operand.value)
        return 1

    def transfers(
        self,
        mesh_shape: dict[str, int],
        slice_of: Sequence[int] | None = None,
        device_ids: Sequence[int] | None = None,
    ) -> dict[Instruction, Transfer]:
        """The transfers between devices, by the instruction that starts them.

        Args:
          mesh_shape: size of each axis, in the order of the mesh.
          slice_of: the slice of each device, in the order of the mesh; None for one slice.
          device_ids: ids of the devices in that order, which transfers between slices of TPUs
            refer to; None for 0, 1, 2, ...
        """
        num_devices = math.prod(mesh_shape.values())
        position = {d: i for i, d in enumerate(device_ids or range(num_devices))}
        found: dict[Instruction, Transfer] = {}
        for name in self.runs:
            for i in self._computations[name]:
                kind = _collective_kind(i)
                if kind is None:
                    continue
                if name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                size = sum(operand.bytes for operand in i.operands)
                groups = parse_groups(i.attributes, num_devices, position)
                found[i] = _describe(kind, size, groups, mesh_shape, slice_of)
        return found

    def collectives(self, transfers: Mapping[Instruction, Transfer]) -> list[Collective]:
        """Sums what `transfers` found over all runs, by kind and axes."""
        # A transfer that overlaps with computations is listed in each of them, with one channel.
        found: dict[str, tuple[int, Transfer]] = {}
        for name, times in self.runs.items():
            for i in self._computations[name]:
                if i not in transfers:
                    continue
                channel = re.search(r"channel_id=(\d+)", i.attributes)
                key = channel[1] if channel else f"{name}/{i.name}"
                if key not in found or found[key][0] < times:
                    found[key] = times, transfers[i]
        totals: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}
        for times, one in found.values():
            if one.axes:
                before = totals.get((one.kind, one.axes), np.zeros(3, int))
                totals[one.kind, one.axes] = before + times * np.array(
                    [1, one.bytes, one.dcn_bytes]
                )
        return [Collective(*key, *totals[key].tolist()) for key in sorted(totals)]

    @functools.cached_property
    def hbm_bytes(self) -> int:
        """Bytes that a device reads from and writes to its main memory, each operand once."""
        return sum(times * self.moved_bytes(i) for times, i in self.executed())

    def computation(self, name: str) -> Sequence[Instruction]:
        """The instructions of a computation; none if there is no such computation."""
        return self._computations.get(name, ())

    def executed(self) -> Iterator[tuple[int, Instruction]]:
        """Instructions outside fusions, with how often they run."""
        fused = {
            callee
            for instructions in self._computations.values()
            for i in instructions
            if i.opcode not in ("while", "call", "conditional") and not i.opcode.endswith("-start")
            for callee, _ in self.calls(i)
        }
        for name, times in self.runs.items():
            if name not in fused:
                yield from ((times, i) for i in self._computations[name])

    def moved_bytes(self, i: Instruction) -> int:
        """Bytes that one run of an instruction reads from and writes to the main memory."""
        if i.is_free:
            return 0
        if i.opcode == "fusion" and i.attribute("calls") in self._computations:
            return self._moved_by_fusion(i)
        read = sum(o.hbm_bytes for o in i.operands)
        kind, is_async = i.opcode.removesuffix("-start"), i.opcode.endswith("-start")
        if is_async and kind in _COLLECTIVES:
            return 2 * read  # The type has operands and results.
        if is_async and kind in ("slice", "copy"):
            # The type is (destination, source, ...); only the smaller one is read.
            sizes = [_type_bytes(match[0]) for match in _ARRAY.finditer(i.type)]
            return min(sizes[:2], default=0) if i.operands and i.operands[0].hbm_bytes else 0
        if i.opcode in _SLICING:
            return (i.bytes if i.operands and i.operands[0].hbm_bytes else 0) + i.hbm_bytes
        if i.opcode == "dynamic-update-slice":
            return 2 * i.operands[1].hbm_bytes if i.hbm_bytes and len(i.operands) > 1 else 0
        if i.call_target.startswith(_LIBRARIES):
            return i.hbm_bytes + read - _workspace_bytes(i.type)
        return i.hbm_bytes + read

    def _moved_by_fusion(self, fusion: Instruction) -> int:
        """Bytes that a fusion reads and writes; of an array that it slices, only the slice."""
        total, updated = 0, 0
        for index, operand in enumerate(fusion.operands):
            read = 0
            for user, position in self._uses(fusion, index) if operand.hbm_bytes else ():
                if user.opcode in _SLICING and position == 0:
                    read += user.bytes
                elif user.opcode == "dynamic-update-slice" and position == 0:
                    updated += operand.hbm_bytes
                    read += 2 * user.operands[1].bytes
                else:
                    read = operand.hbm_bytes
                    break
            total += min(read, 2 * operand.hbm_bytes)
        return total + max(fusion.hbm_bytes - updated, 0)

    def _uses(self, fusion: Instruction, index: int) -> Iterator[tuple[Instruction, int]]:
        """Users of an operand of a fusion, in it and in those within it, and at which position."""
        body = self._computations.get(fusion.attribute("calls"))
        if body is None:
            yield fusion, index
            return
        values = [i for i in body if i.opcode == "parameter" and int(i.value) == index]
        while values:
            value = values.pop()
            for user in (i for i in body if value in i.operands):
                # The same bytes, under another name or in another layout.
                if user.opcode == "bitcast" or "output_to_operand_aliasing" in user.attributes:
                    values.append(user)
                elif user.opcode == "fusion":
                    yield from self._uses(user, user.operands.index(value))
                else:
                    yield user, user.operands.index(value)


def _collective_kind(i: Instruction) -> str | None:
    """The kind of a transfer between devices; None for other instructions."""
    if i.opcode == "send":  # Hosts of TPUs send between slices.
        match = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
        return _BY_HOSTS.get(match[1]) if match else None
    kind = i.opcode.removesuffix("-start")
    return kind if kind in _COLLECTIVES else None


def _describe(
    kind: str,
    size: int,
    groups: np.ndarray,
    mesh_shape: dict[str, int],
    slice_of: Sequence[int] | None,
) -> Transfer:
    """The transfer of one collective.

    A ring, like any optimal algorithm, moves (n - 1)/n of the data. Between slices the algorithm is
    assumed to be hierarchical: each device exchanges its share of the data of its slice.
    """
    sizes = tuple(mesh_shape.values())
    if kind == "collective-permute":
        groups = groups[groups[:, 0] != groups[:, 1]]
    if not groups.size or groups.shape[1] < 2:
        return Transfer(kind, (), 0, 0)
    coordinates = np.stack(np.unravel_index(groups, sizes))
    varies = (coordinates != coordinates[..., :1]).any(axis=(1, 2))
    axes = tuple(axis for axis, v in zip(mesh_shape, varies, strict=True) if v)
    slices = np.zeros(math.prod(sizes), int) if slice_of is None else np.asarray(slice_of)
    if kind == "collective-permute":
        crosses = (slices[groups[:, 0]] != slices[groups[:, 1]]).any()
        return Transfer(kind, axes, *((0, size) if crosses else (size, 0)))
    k = max(len(set(slices[group])) for group in groups)
    inside = groups.shape[1] // k
    share = 1 if kind == "all-gather" else inside  # Operands of an all-gather are shares already.
    sent, dcn = _sent(kind, size, inside), _sent(kind, size, k) / share
    return Transfer(kind, axes, round(sent), round(dcn))


def _sent(kind: str, size: int, n: int) -> float:
    """Bytes that each of n devices sends, for operands of `size` bytes."""
    factor = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1}.get(kind, (n - 1) / n)
    return factor * size


def parse_groups(
    attributes: str, num_devices: int, position: Mapping[int, int] | None = None
) -> np.ndarray:
    """The groups of devices of a collective, int `[groups, size]`, from any of HLO's notations.

    Args:
      attributes: of the instruction.
      num_devices: of the program.
      position: in the program, by the ids that hosts use for devices of several slices.
    """
    if match := re.search(r'_xla_megascale_target="?(.*?)"?,_xla', attributes):
        known = position or {}
        return np.asarray([[known[d] for d in group] for group in _slice_groups(match[1])])
    if match := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return _rows(match[1])
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return _rows(match[1])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(match[2]).reshape(_ints(match[1]))
    pattern = (
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\]?(?:T\([\d,]+\))?)\))? \{(.*?)\}"
    )
    if match := re.search(pattern, attributes):
        return _mesh_groups(match[1], match[2], match[3])
    return np.arange(num_devices)[None]


def _slice_groups(text: str) -> list[list[int]]:
    """Parses `{{100000,200000},{100001,200001}}`, the same as `{1,2}x{0:1}`, or pairs with arrows.

    An id is 100,000 times the slice, counted from 1, plus the device within the slice.
    """
    product = re.fullmatch(r"\{([\d,]+)\}x\{(\d+):(\d+)\}", text)
    if product:
        first, last = int(product[2]), int(product[3])
        slices = _ints(product[1])
        return [[100_000 * s + i for s in slices] for i in range(first, last + 1)]
    return [_ints(group) for group in re.findall(r"\{([\d,>-]+)\}", text)]


def _mesh_groups(axes: str, device_ids: str | None, spanned: str) -> np.ndarray:
    """Parses `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`, or part of an axis `'a':(2)2`."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values())) if device_ids is None else _iota(device_ids)
    shape: list[int] = []
    chosen: list[int] = []
    wanted = dict(re.findall(r"'(\w+)'(:\(\d+\)\d+)?", spanned))
    for name, size in sizes.items():
        if wanted.get(name):
            before, part = _ints(wanted[name])
            chosen.append(len(shape) + 1)
            shape += [before, part, size // (before * part)]
        else:
            if name in wanted:
                chosen.append(len(shape))
            shape.append(size)
    grid = np.moveaxis(ids.reshape(shape), chosen, range(-len(chosen), 0))
    return grid.reshape(-1, math.prod(shape[d] for d in chosen))


def _iota(text: str) -> np.ndarray:
    """Parses `[4,2]T(1,0)`, device ids in this order, or the ids themselves."""
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        return np.asarray(_ints(text))
    dims = _ints(match[1])
    grid = np.arange(math.prod(dims)).reshape(dims)
    return (grid.transpose(_ints(match[2])) if match[2] else grid).reshape(-1)


def _rows(text: str) -> np.ndarray:
    return np.asarray([_ints(row) for row in re.findall(r"\{([\d,]*)\}", text)])


def _ints(text: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", text)]


def _type_bytes(type_: str, *, hbm_only: bool = False) -> int:
    total = 0
    for dtype, dims, layout in _ARRAY.findall(type_):
        # S(1) and above are memories other than the main one.
        if hbm_only and re.search(r"S\([1-9]\)", layout):
            continue
        bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or ["0"])[0])
        total += math.prod(_ints(dims)) * bits // 8
    return total


def _workspace_bytes(type_: str) -> int:
    """Size of the scratch memory that is the last result of a call of a library."""
    arrays = list(_ARRAY.finditer(type_))
    is_scratch = len(arrays) > 1 and arrays[-1][1] in ("s8", "u8")
    return _type_bytes(arrays[-1][0]) if is_scratch else 0


def parse_dims(type_: str) -> list[int]:
    """The shape of an array, or of the first one of a tuple."""
    match = _ARRAY.search(type_)
    return _ints(match[2]) if match else []


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the one at which a program starts."""
    computations: dict[str, list[Instruction]] = {}
    entry, current, table = "", None, {}
    for line in text.splitlines():
        stripped = line.strip()
        if current is None or " = " not in stripped:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", stripped)
            if header and not stripped.startswith("HloModule"):
                current, table = computations.setdefault(header[2], []), {}
                entry = header[2] if header[1] else entry
        elif instruction := _parse_instruction(stripped, table):
            table[instruction.name] = instruction
            current.append(instruction)
    return computations, entry


def _parse_instruction(line: str, table: Mapping[str, Instruction]) -> Instruction | None:
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opcode, bracket, rest = rest.partition("(")
    if not bracket:
        return None
    close = _closing("(" + rest) - 1
    # Operands are defined before they are used.
    operands = tuple(table[o] for o in _NAME.findall(rest[: close - 1]) if o in table)
    attributes = rest if opcode in ("constant", "parameter") else rest[close:]
    return Instruction(name.lstrip("%"), type_, opcode, operands, attributes)


def _closing(text: str) -> int:
    """The position after the bracket that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    return len(text)
