# SPDX-License-Identifier: Apache-2.0
"""Compiles an experiment's train step for devices that are not here, and keeps what comes out."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import jax

from vit_jax.planning.topologies import Topology
from vit_jax.training.experiment import Experiment

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of a step, in bytes for each device.

    Attributes:
      argument_bytes: the train state and the batch.
      temp_bytes: what lives only within the step.
      peak_bytes: arguments, results that do not take their place, temporaries and the program.
      seconds: that the compiler took.
      hlo: the compiled program; empty where it did not fit.
      error: what the compiler said where it did not fit.
    """

    argument_bytes: int
    temp_bytes: int
    peak_bytes: int
    seconds: float
    hlo: str
    error: str | None = None


def compile_step(
    experiment: Experiment, topology: Topology, *, cache: Path | None
) -> tuple[CompiledStep, bool]:
    """Compiles `experiment.train_step`, or takes it from the cache.

    What is kept goes by the hash of the program before compilation, the topology and the versions
    of the compilers: an edit that does not change the program costs nothing.

    Returns:
      What came out, and whether it was in the cache. That a step does not fit is an answer too.
    """
    train_step: Any = experiment.train_step
    lowered = train_step.lower(experiment.abstract_state, experiment.abstract_batch)
    path = None if cache is None else cache / f"{_key(lowered.as_text(), topology)}.json.gz"
    if path is not None and path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return CompiledStep(**json.load(file)), True
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        step = did_not_fit(argument_bytes(experiment), str(e), time.perf_counter() - start)
    else:
        memory = compiled.memory_analysis()
        out = memory.output_size_in_bytes - memory.alias_size_in_bytes
        code = memory.generated_code_size_in_bytes
        step = CompiledStep(
            argument_bytes=memory.argument_size_in_bytes,
            temp_bytes=memory.temp_size_in_bytes,
            peak_bytes=memory.argument_size_in_bytes + out + memory.temp_size_in_bytes + code,
            seconds=time.perf_counter() - start,
            hlo=compiled.as_text(),
        )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        with gzip.open(partial, "wt", encoding="utf-8", compresslevel=3) as file:
            json.dump(dataclasses.asdict(step), file)
        partial.replace(path)  # whole, whoever else writes it
    return step, False


def argument_bytes(experiment: Experiment) -> int:
    """Bytes of state and batch on each device: known without compiling."""
    leaves = jax.tree.leaves((experiment.abstract_state, experiment.abstract_batch))
    return sum(device_bytes(leaf) for leaf in leaves)


def device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes that one device holds of a sharded array."""
    shard = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    size = leaf.dtype.itemsize
    for dim in shard:
        size *= dim
    return size


def parse_size(text: str) -> int:
    """`25.78G` in bytes."""
    match = re.fullmatch(_SIZE, text)
    if not match:
        raise ValueError(text)
    return round(float(match[1]) * _UNITS[match[2]])


def did_not_fit(arguments: int, message: str, seconds: float) -> CompiledStep:
    """What a compiler says, of whose memory the step needs more than there is."""
    if match := re.search(rf"temporaries \({_SIZE}\)", message):
        temp = parse_size(match[1] + match[2])
        peak = arguments + temp
    elif match := re.search(rf"Used {_SIZE} of", message):
        peak = parse_size(match[1] + match[2])
        temp = max(peak - arguments, 0)
    else:
        peak = temp = 0
    return CompiledStep(arguments, temp, peak, seconds, "", " ".join(message.split())[:1000])


def _key(program: str, topology: Topology) -> str:
    versions = {name: _version(name) for name in ("jax", "jaxlib", "libtpu")}
    text = json.dumps([topology.name, topology.num_slices, versions, program])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
