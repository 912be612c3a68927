# SPDX-License-Identifier: Apache-2.0
"""Rewrites an ONNX graph such that its kernels are int8.

Weights alone: each kernel is stored as int8 behind a `DequantizeLinear`, and products are in
float32. With dynamic activations, the products of dense layers are `MatMulInteger` of uint8: the
range of the input is measured at each call by `DynamicQuantizeLinear`, over the whole batch.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.export.quantize import Int8, quantize_kernel

# Of the rewritten products, unsigned: processors without VNNI saturate at products of uint8 and
# int8, and not at those of two uint8.
_ZERO_POINT = 128
# Largest difference of a kernel from its rounded values, relative to its largest one.
_ROUNDED = 1e-5


def quantize_graph(graph: Any, *, dynamic: bool) -> int:
    """Stores the kernels of a graph as int8, in place.

    Args:
      graph: `onnx.ModelProto` whose kernels are those of `round_weights`. Others, such as one that
        was resized after it was rounded, stay in float32.
      dynamic: whether activations become uint8 too.

    Returns:
      The number of kernels that became int8.
    """
    onnx: Any = importlib.import_module("onnx")
    main = graph.graph
    constants = {x.name: x for x in main.initializer}
    rewriter, nodes = _Rewriter(onnx), []
    for node in main.node:
        options = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
        product = _read_product(node, options)
        kernel = None
        if product is not None and node.input[1] in constants:
            array = onnx.numpy_helper.to_array(constants[node.input[1]])
            if array.dtype == np.float32 and array.ndim >= 2:
                kernel = _find_rounded(array, product)
        if kernel is None or product is None:
            nodes.append(node)
        elif dynamic and product.matrix:
            nodes += rewriter.multiply_integers(node, product, kernel)
        else:
            nodes += rewriter.dequantize(node.input[1], product, kernel)
            node.input[1] = f"{node.input[1]}_restored"
            nodes.append(node)
    del main.node[:]
    main.node.extend(nodes)
    used = {name for node in main.node for name in node.input} | {x.name for x in main.output}
    kept = [x for x in main.initializer if x.name in used]
    del main.initializer[:]
    main.initializer.extend([*kept, *rewriter.constants.values()])
    return rewriter.count


class _Product:
    """A product with a kernel as its second input.

    Attributes:
      inputs: axes of the kernel that are contracted.
      kept: number of leading axes of the first input that are not.
      matrix: whether the kernel is `[*inputs, *outputs]`, as in a product of matrices.
      bias: name of what is added to the product; empty for nothing.
    """

    def __init__(self, inputs: tuple[int, ...], *, kept: int, matrix: bool, bias: str = ""):
        self.inputs, self.kept, self.matrix, self.bias = inputs, kept, matrix, bias

    def to_matrix(self, x: np.ndarray) -> np.ndarray:
        """Reshapes `[*inputs, *outputs]` to two dimensions."""
        return x.reshape(int(np.prod([x.shape[axis] for axis in self.inputs])), -1)


def _read_product(node: Any, options: Mapping[str, Any]) -> _Product | None:
    """Returns how a node uses its second input as a kernel; None for any other node.

    `options` are its attributes by name.
    """
    if node.op_type == "Conv":
        return _Product((1, 2, 3), kept=0, matrix=False)
    if node.op_type == "Gemm":
        plain = all(options.get(key, 1) == 1 for key in ("alpha", "beta"))
        if options.get("transB", 0):
            return _Product((1,), kept=1, matrix=False)
        matrix = plain and not options.get("transA", 0)
        bias = node.input[2] if len(node.input) > 2 else ""
        return _Product((0,), kept=1, matrix=matrix, bias=bias)
    if node.op_type != "Einsum" or len(node.input) != 2:
        return None
    operands, _, out = options["equation"].decode().replace(" ", "").partition("->")
    x, kernel = operands.split(",")
    inputs = "".join(letter for letter in kernel if letter not in out)
    kept, outputs = x.removesuffix(inputs), kernel.removeprefix(inputs)
    if not inputs or x != kept + inputs or kernel != inputs + outputs or out != kept + outputs:
        return None
    return _Product(tuple(range(len(inputs))), kept=len(kept), matrix=True)


def _find_rounded(array: np.ndarray, product: _Product) -> Int8 | None:
    """Returns the int8 values of a kernel that was rounded before; None for any other array."""
    if max(product.inputs) >= array.ndim:
        return None
    kernel = quantize_kernel(array, product.inputs)
    difference = np.abs(kernel.restore() - array).max()
    return kernel if difference <= _ROUNDED * np.abs(array).max() else None


class _Rewriter:
    """Makes the nodes and constants of rewritten products."""

    def __init__(self, onnx: Any):
        self._onnx = onnx
        self.constants: dict[str, Any] = {}
        self.count = 0
        self._made: set[str] = set()

    def _add(self, name: str, value: np.ndarray) -> str:
        if name not in self.constants:
            array = np.ascontiguousarray(value)
            self.constants[name] = self._onnx.numpy_helper.from_array(array, name)
        return name

    def _once(self, name: str) -> bool:
        """Whether what has this name is still to be made, as several nodes may share it."""
        new = name not in self._made
        self._made.add(name)
        return new

    def dequantize(self, name: str, product: _Product, kernel: Int8) -> Iterator[Any]:
        """Yields nodes that make `NAME_restored`, float32, of an int8 constant."""
        make = self._onnx.helper.make_node
        if not self._once(f"{name}_restored"):
            return
        self.count += 1
        values, scale, axis = kernel.values, kernel.scale.ravel(), kernel.values.ndim - 1
        reshaped = product.matrix and values.ndim > 2
        if reshaped:  # The scale of DequantizeLinear has one axis.
            values, axis = product.to_matrix(values), 1
        elif not product.matrix:
            axis = 0
        restored = f"{name}_matrix" if reshaped else f"{name}_restored"
        inputs = [self._add(f"{name}_int8", values), self._add(f"{name}_scale", scale)]
        yield make("DequantizeLinear", inputs, [restored], axis=axis)
        if reshaped:
            shape = self._add(f"{name}_shape", np.array(kernel.values.shape, np.int64))
            yield make("Reshape", [restored, shape], [f"{name}_restored"])

    def multiply_integers(self, node: Any, product: _Product, kernel: Int8) -> Iterator[Any]:
        """Yields nodes that compute the product of a dense layer in integers."""
        make = self._onnx.helper.make_node
        x, name, out = node.input[0], node.input[1], node.output[0]
        self.count += self._once(f"{name}_uint8")
        # Once for all products of an input, such as queries, keys and values.
        if self._once(f"{x}_uint8"):
            outputs = [f"{x}_uint8", f"{x}_scale", f"{x}_zero"]
            yield make("DynamicQuantizeLinear", [x], outputs)
        rows = f"{x}_uint8"
        if len(product.inputs) > 1:
            rows = f"{out}_rows"
            shape = self._reshape(product.kept, [-1])
            yield make("Reshape", [f"{x}_uint8", shape], [rows])
        matrix = product.to_matrix(kernel.values).astype(np.int16) + _ZERO_POINT
        constant = self._add(f"{name}_uint8", matrix.astype(np.uint8))
        zero = self._add("kernel_zero_point", np.array(_ZERO_POINT, np.uint8))
        factor = self._add(f"{name}_scale", kernel.scale.ravel())
        yield make("MatMulInteger", [rows, constant, f"{x}_zero", zero], [f"{out}_int32"])
        yield make("Cast", [f"{out}_int32"], [f"{out}_float"], to=self._onnx.TensorProto.FLOAT)
        yield make("Mul", [f"{x}_scale", factor], [f"{out}_factor"])
        outputs = kernel.values.shape[len(product.inputs) :]
        last = out if not product.bias and len(outputs) == 1 else f"{out}_product"
        yield make("Mul", [f"{out}_float", f"{out}_factor"], [last])
        if product.bias:
            yield make("Add", [last, product.bias], [out])
        elif len(outputs) > 1:
            yield make("Reshape", [last, self._reshape(product.kept, outputs)], [out])

    def _reshape(self, kept: int, rest: Sequence[int]) -> str:
        """A constant shape that keeps the leading axes, whatever they are."""
        shape = [0] * kept + list(rest)
        return self._add("shape_" + "_".join(map(str, shape)), np.array(shape, np.int64))
