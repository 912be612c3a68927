# SPDX-License-Identifier: Apache-2.0
"""Compiles the train step of an experiment for devices that are only described, with a cache."""

import dataclasses
import gzip
import hashlib
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import jax

from vit_jax.observe.provenance import find_version
from vit_jax.planning.gpus import GPU_PLUGINS
from vit_jax.planning.topologies import Topology, find_compiler
from vit_jax.runtime.compiler_options import compiler_options
from vit_jax.training.experiment import Experiment

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+[KMGT]?)"


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The compiler's report on a step, in bytes for each device.

    Attributes:
      argument_bytes: the train state and the batch.
      temp_bytes: buffers that exist only within the step.
      peak_bytes: arguments, results that do not replace an argument, temporaries and the program.
      seconds: time of the compilation.
      hlo: the compiled program; empty if it does not fit.
      error: the compiler's message if the step does not fit.
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

    The key of the cache is a hash of the program before compilation, the topology and the versions
    of the compilers, so an edit that does not change the program does not compile again.

    Returns:
      The report, also if the step does not fit, and whether it was in the cache.
    """
    for_gpus = find_compiler(list(experiment.mesh.devices.flat)) == "gpu"
    lowered = experiment.trace_step().lower()
    # Flags of XLA are not part of the program.
    flags = os.environ.get("XLA_FLAGS", ""), compiler_options(experiment.mesh.devices.flat[0])
    key = _key(lowered.as_text(), topology, for_gpus, flags if for_gpus else ())
    path = None if cache is None else cache / f"{key}.json.gz"
    if path is not None and path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return CompiledStep(**json.load(file)), True
    start = time.perf_counter()
    try:
        compiled = _compile_for_gpus(lowered) if for_gpus else lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        leaves = jax.tree.leaves((experiment.abstract_state, experiment.abstract_batch))
        arguments = sum(map(device_bytes, leaves))
        step = did_not_fit(arguments, str(e), time.perf_counter() - start)
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
        partial.replace(path)  # Complete, even if another process writes the same file.
    return step, False


def _compile_for_gpus(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        # Tiles of Triton's products are found by trying them on a GPU, and for some shapes the
        # tiles that XLA takes without a GPU do not exist. cuBLAS has all shapes.
        if "tile sizes" not in str(e):
            raise
    return lowered.compile({"xla_gpu_enable_triton_gemm": False})


def device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array, of any shape, dtype and sharding, on one device."""
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return leaf.dtype.itemsize * math.prod(shape)


def parse_size(text: str) -> int:
    """Converts a size such as `25.78G` to bytes."""
    unit = text.lstrip("0123456789.")
    return round(float(text.removesuffix(unit)) * _UNITS[unit])


def did_not_fit(arguments: int, message: str, seconds: float) -> CompiledStep:
    """The report on a step that needs more memory than there is, from the compiler's message."""
    peak = temp = 0
    if match := re.search(rf"temporaries \({_SIZE}\)", message):
        temp = parse_size(match[1])
        peak = arguments + temp
    elif match := re.search(rf"Used {_SIZE} of", message):
        peak = parse_size(match[1])
        temp = max(peak - arguments, 0)
    return CompiledStep(arguments, temp, peak, seconds, "", " ".join(message.split())[:1000])


def _key(program: str, topology: Topology, for_gpus: bool, flags: Any) -> str:
    compiler = GPU_PLUGINS if for_gpus else ("libtpu",)
    versions = {name: find_version(name) for name in ("jax", "jaxlib", *compiler)}
    text = json.dumps([topology.name, topology.num_slices, versions, program, *flags])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
