# SPDX-License-Identifier: Apache-2.0
"""The safetensors format: the length of a header, the header in JSON, the numbers.

It is read here, and not by its own package, because that one gives numpy no bfloat16 and opens no
remote files. Every number of the header is checked, as files are untrusted.

Source: https://huggingface.co/docs/safetensors ("Format").
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"


def read_tensors(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads all tensors and the metadata of a file.

    Args:
      path: of the file, local or `gs://`.

    Returns:
      `(tensors, metadata)`; the arrays are read-only.

    Raises:
      OSError: the file can't be read.
      ValueError: it is no safetensors file, or a damaged one.
    """
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if content[8:9] != b"{" or length > len(content) - 8:
        raise ValueError(
            f"not a whole safetensors file: {len(content)} bytes, which start with {content[:16]!r}"
        )
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise ValueError("damaged: the header is no JSON") from error
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict):
        raise ValueError(f"damaged: {_METADATA} is no object")
    data = memoryview(content)[8 + length :]
    parsed = {name: _parse_entry(name, entry) for name, entry in header.items()}
    _check_offsets([span for _, _, span in parsed.values()], len(data))
    tensors = {
        name: np.frombuffer(data[slice(*span)], dtype).reshape(shape)
        for name, (dtype, shape, span) in parsed.items()
    }
    return tensors, metadata


def write_tensors(path: Path, tensors: dict[str, np.ndarray], *, metadata: dict[str, str]) -> None:
    """Writes a file, whole or not at all.

    Raises:
      OSError: the file can't be written.
      ValueError: an array is of a type that has no name in the format.
    """
    header: dict[str, Any] = {_METADATA: metadata}
    end = 0
    # As the reference implementation does: large types first, so that all arrays are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in names:
        array = tensors[name]
        dtype = array.dtype.newbyteorder("<")
        if dtype not in _NAMES:
            raise ValueError(f"{name} is of type {array.dtype}; expected one of {list(_NAMES)}")
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                array = tensors[name]
                file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _parse_entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"damaged: the header says {entry!r} of {name!r}") from None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name} is of type {dtype!r}; expected one of {', '.join(_DTYPES)}")
    numbers = [*shape, start, end] if isinstance(shape, list) else [None]
    if any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"damaged: the header says {entry!r} of {name!r}")
    if end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"damaged: {name} is {dtype} {shape}, in {end - start} bytes")
    return _DTYPES[dtype], tuple(shape), (start, end)


def _check_offsets(spans: list[tuple[int, int]], size: int) -> None:
    """Every byte must belong to one array: a gap or an overlap is a damaged file."""
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise ValueError(f"damaged: no array, or two, at byte {min(start, position)}")
        position = end
    if position != size:
        raise ValueError(f"damaged: {size} bytes of numbers, expected {position}")
