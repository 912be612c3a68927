# SPDX-License-Identifier: Apache-2.0
"""Writes a model as an ONNX graph with jax2onnx, and checks it in ONNX Runtime."""

import contextlib
import importlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax.export.onnx_int8 import quantize_graph
from vit_jax.export.schemes import DYNAMIC
from vit_jax.export.signature import INPUT
from vit_jax.inference.model import LoadedModel
from vit_jax.utils.errors import UserError, first_line

# The first version with an operation for GELU; more runtimes accept older versions.
_OPSET = 20


def check_onnx() -> tuple[Any, Any]:
    """Returns jax2onnx and onnxruntime; raises `UserError` unless they are installed."""
    try:
        with _silenced():
            return importlib.import_module("jax2onnx"), importlib.import_module("onnxruntime")
    except ImportError as e:
        raise UserError(f"--to=onnx needs {e.name}: pip install 'vit_jax[onnx]'") from None


def write_onnx(
    path: Path,
    model: LoadedModel,
    layer: str,
    batches: Sequence[np.ndarray],
    *,
    quantize: str | None = None,
) -> list[np.ndarray]:
    """Writes a graph, reads it back and returns its outputs; see `PROGRAMS` of the command.

    Raises:
      UserError: the model does not compute in float32, or the libraries are missing or cannot
        write it.
    """
    jax2onnx, _ = check_onnx()
    dtype = np.dtype(getattr(model.module, "dtype", np.float32))
    if dtype != np.float32:
        raise UserError(
            f"--to=onnx: this model computes in {dtype}, for which runtimes lack operations: "
            "expected --config.model.dtype=float32 with it"
        )
    images: Any = jax.ShapeDtypeStruct(("batch", *model.image_shape), np.uint8)  # pyright: ignore
    if getattr(model.module, "resnet_layers", None) is not None:
        raise UserError(
            "--to=onnx: jax2onnx mistakes the standardized convolutions of a hybrid for plain "
            "ones; expected a model without model.resnet_layers, or --to=stablehlo"
        )
    try:
        with _silenced():
            graph = jax2onnx.to_onnx(
                model.as_function(layer),
                [images],
                model_name="vit_jax",
                opset=_OPSET,
                input_names=[INPUT],
                output_names=[layer],
            )
        _strip_locations(graph)
        if quantize is not None:
            quantize_graph(graph, dynamic=quantize == DYNAMIC)
        path.write_bytes(graph.SerializeToString())
        # At its default level the runtime may compute with rounded activations on its own.
        run = open_onnx(path, level="ORT_ENABLE_BASIC")
        return [run(batch) for batch in batches]
    except OSError:
        raise
    except Exception as e:  # Unsupported operations lead to exceptions of many types.
        raise UserError(f"--to=onnx: jax2onnx can't write this model: {first_line(e)}") from e


def open_onnx(path: Path, *, level: str = "ORT_ENABLE_ALL") -> Callable[[np.ndarray], np.ndarray]:
    """Opens a graph in ONNX Runtime, on the CPU.

    It is a function from uint8 `[n, *image_shape]` to float32 `[n, ...]`. `level` is the name of a
    `GraphOptimizationLevel`; the default is that of the runtime.
    """
    _, runtime = check_onnx()
    options = runtime.SessionOptions()
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, level)
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images})[0]


def _strip_locations(graph: Any) -> None:
    """Removes notes on the code that made each operation, which have paths of this machine."""
    functions = [node for function in graph.functions for node in function.node]
    for part in (graph, graph.graph, *graph.graph.node, *graph.functions, *functions):
        for field in ("doc_string", "metadata_props"):
            if field in part.DESCRIPTOR.fields_by_name:
                part.ClearField(field)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Silences libraries that log and print debugging output."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
