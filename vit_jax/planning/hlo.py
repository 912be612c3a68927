# SPDX-License-Identifier: Apache-2.0
"""What a compiled program moves: read from the text of its HLO.

XLA's own numbers count the body of a loop once; here it counts as often as it runs.
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
# Transfers that the hosts make for their TPUs between slices.
_BY_HOSTS = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
# They move nothing: names for what is there, or work that is counted elsewhere.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "partition-id",
    "replica-id",
    "after-all",
    "opt-barrier",
    "iota",
    "copy-done",
    "slice-done",
    *(f"{kind}-done" for kind in _COLLECTIVES),
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `%name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, key: str) -> str | None:
        """The name of the computation that an attribute such as `body` gives."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @functools.cached_property
    def hbm_bytes(self) -> int:
        """Bytes of the result that lie in the main memory of the device."""
        return _type_bytes(self.type, hbm_only=True)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Transfers of one kind along some axes of the mesh, in one run of the program.

    Attributes:
      kind: such as `all-gather`.
      axes: of the mesh that the groups span; empty for a single device.
      count: how often.
      bytes: that each device sends to others of its slice.
      dcn_bytes: that each device sends to other slices.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    dcn_bytes: int


class Program:
    """A parsed HLO module."""

    def __init__(self, text: str):
        self.computations, self.entry = _parse(text)
        self._tables = {n: {i.name: i for i in c} for n, c in self.computations.items()}

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs, those inside fusions included."""
        counts: dict[str, int] = defaultdict(int)

        def visit(name: str, times: int) -> None:
            counts[name] += times
            for instruction in self.computations[name]:
                for sub, factor in self._calls(instruction):
                    visit(sub, times * factor)

        visit(self.entry, 1)
        return dict(counts)

    @functools.cached_property
    def _fused(self) -> set[str]:
        return {
            sub
            for instructions in self.computations.values()
            for i in instructions
            if i.opcode not in ("while", "call", "conditional") and not i.opcode.endswith("-start")
            for sub, _ in self._calls(i)
        }

    def _calls(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        for key in ("calls", "to_apply", "body"):
            sub = instruction.attribute(key)
            if sub in self.computations:
                yield sub, self._trips(instruction) if key == "body" else 1
        if branches := re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes):
            for sub in _NAME.findall(branches[1]):
                yield sub, 1

    def _trips(self, loop: Instruction) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        # As the loops of a scan are written: a counter from 0 below a constant.
        condition = self._tables.get(loop.attribute("condition") or "", {})
        for i in condition.values():
            if i.opcode == "compare" and "direction=LT" in i.attributes:
                for operand in i.operands:
                    constant = condition.get(operand)
                    if constant is not None and constant.opcode == "constant":
                        value = constant.attributes.split(")")[0]
                        if value.isdigit():
                            return int(value)
        return 1

    def collectives(
        self,
        mesh_shape: dict[str, int],
        slice_of: Sequence[int] | None = None,
        device_ids: Sequence[int] | None = None,
    ) -> list[Collective]:
        """All transfers between devices, summed by kind and axes.

        Args:
          mesh_shape: size of each axis, in the order of the mesh.
          slice_of: the slice of each device, in the order of the mesh; None for one slice.
          device_ids: of the devices in that order, by which transfers between slices of TPUs go;
            None where they are 0, 1, 2, ...
        """
        num_devices = math.prod(mesh_shape.values())
        position = {d: i for i, d in enumerate(device_ids or range(num_devices))}
        # A transfer that runs beside computations stands in each of them, under one number.
        found: dict[str, tuple[int, tuple[str, tuple[str, ...], int, int]]] = {}
        for name, times in self.runs.items():
            for i in self.computations[name]:
                kind = _kind(i)
                if kind is None:
                    continue
                channel = re.search(r"channel_id=(\d+)", i.attributes)
                key = channel[1] if channel else f"{name}/{i.name}"
                if key in found and found[key][0] >= times:
                    continue
                if name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                size = sum(self._size(name, operand) for operand in i.operands)
                groups = parse_groups(i.attributes, num_devices, position)
                found[key] = times, _describe(kind, size, groups, mesh_shape, slice_of)
        totals: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(lambda: [0, 0, 0])
        for times, (kind, axes, sent, dcn) in found.values():
            if axes:
                for k, value in enumerate((1, sent, dcn)):
                    totals[kind, axes][k] += times * value
        return [Collective(*key, *values) for key, values in sorted(totals.items())]

    def _size(self, computation: str, name: str) -> int:
        instruction = self._tables[computation].get(name)
        return 0 if instruction is None else _type_bytes(instruction.type)

    @functools.cached_property
    def hbm_bytes(self) -> int:
        """Bytes read from and written to the main memory of a device, each operand once."""
        total = 0
        for name, times in self.runs.items():
            if name not in self._fused:
                total += times * sum(self._moved(name, i) for i in self.computations[name])
        return total

    @functools.cached_property
    def cycles(self) -> int | None:
        """What the compiler expects a device to compute for; None where it does not say."""
        total = 0
        for name, times in self.runs.items():
            for i in self.computations[name] if name not in self._fused else ():
                if match := re.search(r'"estimated_cycles":"(\d+)"', i.attributes):
                    total += times * int(match[1])
        # Of some chips it gives numbers that can't be, near 2**63.
        return total if 0 < total < 2**53 else None

    def _moved(self, computation: str, i: Instruction) -> int:
        if i.opcode in _FREE:
            return 0
        table = self._tables[computation]
        operands = [table[o] for o in i.operands if o in table]
        if i.opcode == "fusion" and i.attribute("calls") in self.computations:
            return self._moved_by_fusion(i, operands)
        read = sum(o.hbm_bytes for o in operands)
        if i.opcode.removesuffix("-start") in _COLLECTIVES and i.opcode.endswith("-start"):
            return 2 * read  # its type names operands and results
        if i.opcode in ("dynamic-slice", "slice", "gather", "slice-start", "copy-start"):
            # Of the source only what is taken.
            taken = i.hbm_bytes if not i.opcode.endswith("-start") else 0
            source = operands[0].hbm_bytes if operands else 0
            size = _type_bytes(i.type) if not i.opcode.endswith("-start") else _slice_bytes(i.type)
            return (size if source else 0) + taken
        if i.opcode == "dynamic-update-slice":
            return 2 * operands[1].hbm_bytes if i.hbm_bytes and len(operands) > 1 else 0
        return i.hbm_bytes + read

    def _moved_by_fusion(self, fusion: Instruction, operands: list[Instruction]) -> int:
        """What a fusion reads and writes; of arrays it takes or changes a slice of, the slice."""
        total, updated = 0, 0
        for index, operand in enumerate(operands):
            read = 0
            for name, user, position in self._uses(fusion, index) if operand.hbm_bytes else ():
                if user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
                    read += _type_bytes(user.type)
                elif user.opcode == "dynamic-update-slice" and position == 0:
                    updated += operand.hbm_bytes
                    read += 2 * self._size(name, user.operands[1])
                else:
                    read = operand.hbm_bytes
                    break
            total += min(read, 2 * operand.hbm_bytes)
        return total + max(fusion.hbm_bytes - updated, 0)

    def _uses(self, fusion: Instruction, index: int) -> Iterator[tuple[str, Instruction, int]]:
        """Who uses an operand in a fusion, and in those within it: computation, user, position."""
        name = fusion.attribute("calls") or ""
        if name not in self.computations:
            yield name, fusion, index
            return
        users = self._users(name)
        values = [i.name for i in self.computations[name] if _parameter_index(i) == index]
        while values:
            value = values.pop()
            for user in users[value]:
                # Under another name, or in another layout at the same place.
                if user.opcode == "bitcast" or "output_to_operand_aliasing" in user.attributes:
                    values.append(user.name)
                elif user.opcode == "fusion":
                    yield from self._uses(user, user.operands.index(value))
                else:
                    yield name, user, user.operands.index(value)

    def _users(self, name: str) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = defaultdict(list)
        for i in self.computations[name]:
            for operand in dict.fromkeys(i.operands):
                users[operand].append(i)
        return users


def _parameter_index(i: Instruction) -> int | None:
    return int(i.attributes.split(")")[0]) if i.opcode == "parameter" else None


def _slice_bytes(type_: str) -> int:
    """Of an asynchronous copy's (destination, source, ...): the smaller one."""
    sizes = [_type_bytes(m.group(0)) for m in _ARRAY.finditer(type_)]
    return min(sizes[:2], default=0)


def _kind(i: Instruction) -> str | None:
    """Of a transfer between devices; None for all else."""
    # Between slices of TPUs the hosts send.
    if i.opcode == "send":
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
) -> tuple[str, tuple[str, ...], int, int]:
    """Kind, axes, bytes within the slice and between slices of one collective.

    A ring, or any other optimal algorithm, moves (n - 1)/n of the data; between slices it is taken
    to be hierarchical: each device exchanges its share of what the slice has.
    """
    sizes = tuple(mesh_shape.values())
    if kind == "collective-permute":
        groups = groups[groups[:, 0] != groups[:, 1]]
    if not groups.size or groups.shape[1] < 2:
        return kind, (), 0, 0
    coordinates = np.stack(np.unravel_index(groups, sizes))
    varies = (coordinates != coordinates[..., :1]).any(axis=(1, 2))
    axes = tuple(axis for axis, v in zip(mesh_shape, varies, strict=True) if v)
    slices = np.zeros(math.prod(sizes), int) if slice_of is None else np.asarray(slice_of)
    if kind == "collective-permute":
        crosses = (slices[groups[:, 0]] != slices[groups[:, 1]]).any()
        return (kind, axes, 0, size) if crosses else (kind, axes, size, 0)
    n = groups.shape[1]
    k = max(len(set(slices[group])) for group in groups)
    inside = n // k
    return (
        kind,
        axes,
        round(_sent(kind, size, inside)),
        round(_sent(kind, size, k) / _share(kind, inside)),
    )


def _sent(kind: str, size: int, n: int) -> float:
    """Bytes that each of n devices sends, for operands of this size."""
    factor = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1}.get(kind, (n - 1) / n)
    return factor * size


def _share(kind: str, inside: int) -> int:
    # Operands of an all-gather are shares already.
    return 1 if kind == "all-gather" else inside


def parse_groups(
    attributes: str, num_devices: int, position: Mapping[int, int] | None = None
) -> np.ndarray:
    """Groups of devices `[groups, size]` that a collective works in, in any of HLO's notations.

    Args:
      attributes: of the instruction.
      num_devices: of the program.
      position: in the program, of the ids by which hosts name devices of several slices.
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
    """`{{100000,200000},{100001,200001}}`, the same as `{1,2}x{0:1}`, or pairs with arrows.

    Ids are 100,000 times the slice, counted from 1, and the device in it.
    """
    product = re.fullmatch(r"\{([\d,]+)\}x\{(\d+):(\d+)\}", text)
    if product:
        first, last = int(product[2]), int(product[3])
        slices = _ints(product[1])
        return [[100_000 * s + i for s in slices] for i in range(first, last + 1)]
    return [_ints(group) for group in re.findall(r"\{([\d,>-]+)\}", text)]


def _mesh_groups(axes: str, device_ids: str | None, spanned: str) -> np.ndarray:
    """`mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`, or with a part of an axis `'a':(2)2`."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values())) if device_ids is None else _iota(device_ids)
    shape: list[int] = []
    chosen: list[int] = []
    wanted = dict(re.findall(r"'(\w+)'(:\(\d+\)\d+)?", spanned))
    for name, size in sizes.items():
        if wanted.get(name):
            before, part = _ints(wanted[name].replace(":(", "").replace(")", ","))
            chosen.append(len(shape) + 1)
            shape += [before, part, size // (before * part)]
        else:
            if name in wanted:
                chosen.append(len(shape))
            shape.append(size)
    grid = np.moveaxis(ids.reshape(shape), chosen, range(-len(chosen), 0))
    return grid.reshape(-1, math.prod(shape[d] for d in chosen))


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: device ids in this order; or the ids themselves."""
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
        # S(1) and above are other memories than the main one.
        if hbm_only and re.search(r"S\([1-9]\)", layout):
            continue
        bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or ["0"])[0])
        total += math.prod(_ints(dims)) * bits // 8
    return total


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        stripped = line.strip()
        if current is None or " = " not in stripped:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", stripped)
            if header and not stripped.startswith("HloModule"):
                current = computations[header[2]] = []
                entry = header[2] if header[1] else entry
            continue
        if instruction := _parse_instruction(stripped):
            current.append(instruction)
    return computations, entry


def _parse_instruction(line: str) -> Instruction | None:
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opcode, bracket, rest = rest.partition("(")
    if not bracket:
        return None
    close = _closing("(" + rest) - 1
    operands = tuple(_NAME.findall(rest[: close - 1]))
    keep = rest if opcode in ("constant", "parameter") else rest[close:]
    return Instruction(name.lstrip("%"), type_, opcode, operands, keep)


def _closing(text: str) -> int:
    """The position behind the bracket that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    return len(text)
