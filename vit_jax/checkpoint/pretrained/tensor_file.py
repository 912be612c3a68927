# SPDX-License-Identifier: Apache-2.0
"""Arrays in the safetensors format.

The numpy interface of the `safetensors` package reads no bfloat16 and opens no remote files, so its
parser, which checks every number of the untrusted header, is called directly.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save

from vit_jax.utils.files import atomic_file

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read_tensors(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads all tensors and the metadata of a file.

    Args:
      path: local or `gs://`.

    Returns:
      `(tensors, metadata)`; read-only arrays with the shapes and dtypes of the file, by name.

    Raises:
      OSError: the file can't be read.
      ValueError: the file is damaged, or not a safetensors file.
    """
    content = path.read_bytes()
    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"not a whole safetensors file: {len(content)} bytes, which start with "
            f"{content[:16]!r} ({error})"
        ) from error
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            expected = ", ".join(_DTYPES)
            raise ValueError(f"{name} is of type {entry['dtype']}; expected one of {expected}")
        array = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]])
        tensors[name] = array.reshape(entry["shape"])
    length = int.from_bytes(content[:8], "little")
    return tensors, json.loads(content[8 : 8 + length]).get("__metadata__", {})


def read_json(path: epath.Path) -> dict[str, Any]:
    """Returns the JSON object in a file beside the weights; empty if there is no such file.

    Raises:
      ValueError: the file is not JSON.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path.name} beside it is no JSON") from error
    return content if isinstance(content, dict) else {}


def write_tensors(path: Path, tensors: dict[str, np.ndarray], *, metadata: dict[str, str]) -> None:
    """Writes a file, which is flushed to the disk before it gets its name.

    Args:
      path: of the file, in a folder that exists.
      tensors: arrays of any shape and of a dtype of the format, by name.
      metadata: texts by key.

    Raises:
      OSError: the file can't be written.
      ValueError: an array is of a type that has no name in the format.
    """
    for name, array in tensors.items():
        if array.dtype.newbyteorder("<") not in _DTYPES.values():
            raise ValueError(f"{name} is of type {array.dtype}; expected one of {list(_DTYPES)}")
    content = save({k: np.ascontiguousarray(x) for k, x in tensors.items()}, metadata)
    with atomic_file(path, sync=True) as temporary:
        temporary.write_bytes(content)
