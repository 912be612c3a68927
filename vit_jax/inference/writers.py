# SPDX-License-Identifier: Apache-2.0
"""Writes predictions and features as they arrive, in constant memory."""

import abc
import csv
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from vit_jax.utils.errors import UserError
from vit_jax.utils.text import printable

_COPIED = 2**20  # bytes at a time


class Writer(abc.ABC):
    """Takes rows; a context manager that finishes the file."""

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc: object) -> None:  # noqa: B027 (streams have an owner)
        pass

    def write(self, paths: Sequence[str], *columns: np.ndarray) -> None:
        """Appends rows.

        Args:
          paths: paths of n images, which are written as `printable` has them.
          *columns: for predictions, labels int `[n, k]` and probabilities float32 `[n, k]`, the
            most probable first, or the shares of pixels of a mask in place of these; otherwise
            features float32 `[n, ...]`.
        """
        self._write([printable(path) for path in paths], *columns)

    @abc.abstractmethod
    def _write(self, paths: Sequence[str], *columns: np.ndarray) -> None:
        """Appends rows; see `write`."""


class TableWriter(Writer):
    """A line of text for each image: its most probable classes with their probabilities.

    Class names are cut after `name_width` characters; None keeps all of them.
    """

    def __init__(
        self,
        stream: IO[str],
        *,
        name_of: Callable[[int], str],
        path_width: int,
        name_width: int | None,
        value: str = "probability",
    ):
        self._stream, self._name_of, self._width = stream, name_of, path_width
        self._name_width = name_width
        self._format = "{:6.2f} m" if value == "metres" else "{:6.1%}"

    def _write(self, paths: Sequence[str], *columns: np.ndarray) -> None:
        labels, probabilities = columns
        names = [
            [self._name_of(label)[: self._name_width] for label in row] for row in labels.tolist()
        ]
        # Columns are aligned within a batch: later names are not known yet.
        widths = [max(map(len, column)) for column in zip(*names, strict=True)]
        for path, row, values in zip(paths, names, probabilities.tolist(), strict=True):
            # Of a mask, which may have fewer classes than are asked for.
            cells = [c for c in zip(row, widths, values, strict=True) if c[2] or c[0] == row[0]]
            shown = "   ".join(
                f"{name:<{width}} {self._format.format(value)}" for name, width, value in cells
            )
            print(f"{path:<{self._width}}  {shown}", file=self._stream, flush=True)


class CsvWriter(Writer):
    """CSV: `image`, then `label_1, class_1, probability_1, label_2, ...`, most probable first."""

    def __init__(
        self,
        stream: IO[str],
        *,
        name_of: Callable[[int], str],
        top_k: int,
        value: str = "probability",
    ):
        self._writer, self._name_of = csv.writer(stream, lineterminator="\n"), name_of
        kinds = ("label", "class", value)
        header = [f"{kind}_{rank}" for rank in range(1, top_k + 1) for kind in kinds]
        self._writer.writerow(["image", *header])

    def _write(self, paths: Sequence[str], *columns: np.ndarray) -> None:
        for path, labels, values in zip(paths, *(c.tolist() for c in columns), strict=True):
            row = [path]
            for label, value in zip(labels, values, strict=True):
                row += [label, self._name_of(label), f"{value:.6g}"]
            self._writer.writerow(row)


class JsonWriter(Writer):
    """JSON lines: `{"image": ..., "predictions": [{"label", "class", "probability"}]}`."""

    def __init__(
        self, stream: IO[str], *, name_of: Callable[[int], str], value: str = "probability"
    ):
        self._stream, self._name_of, self._value = stream, name_of, value

    def _write(self, paths: Sequence[str], *columns: np.ndarray) -> None:
        for path, labels, values in zip(paths, *(c.tolist() for c in columns), strict=True):
            predictions = [
                {"label": label, "class": self._name_of(label), self._value: round(value, 6)}
                for label, value in zip(labels, values, strict=True)
            ]
            line = json.dumps({"image": path, "predictions": predictions}, ensure_ascii=False)
            self._stream.write(line + "\n")


def import_pyarrow() -> Any:
    """Imports pyarrow with its Parquet module; raises `UserError` if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("--format=parquet needs pyarrow: pip install 'vit_jax[parquet]'") from None
    return pyarrow


class ParquetWriter(Writer):
    """Parquet, one row group per batch: `image`, and the lists `label`, `class`, `probability`."""

    def __init__(self, path: Path, *, name_of: Callable[[int], str], value: str = "probability"):
        self._pa, self._name_of = import_pyarrow(), name_of
        text, label, number = self._pa.string(), self._pa.int32(), self._pa.float32()
        columns = {"label": label, "class": text, value: number}
        lists = {name: self._pa.list_(kind) for name, kind in columns.items()}
        self._schema = self._pa.schema({"image": text} | lists)
        self._file = self._pa.parquet.ParquetWriter(path, self._schema)

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def _write(self, paths: Sequence[str], *columns: np.ndarray) -> None:
        labels, probabilities = (column.tolist() for column in columns)
        names = [[self._name_of(label) for label in row] for row in labels]
        arrays = [list(paths), labels, names, probabilities]
        self._file.write_table(self._pa.table(arrays, schema=self._schema))


class FeatureParquetWriter(Writer):
    """Parquet, one row group per batch: `image`, and `features` as a list of float32.

    Features of more than one dimension are flattened; the schema's metadata has their `shape`. The
    first column is called `what`.
    """

    def __init__(self, path: Path, *, what: str = "image"):
        self._pa, self._path, self._what = import_pyarrow(), path, what
        self._file: Any = None

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, paths: Sequence[str], *columns: np.ndarray) -> None:
        (features,) = columns
        pa = self._pa
        flat = features.reshape(len(features), -1)
        if self._file is None:
            kind = pa.list_(pa.float32(), flat.shape[1])
            shape = json.dumps(features.shape[1:])
            self._schema = pa.schema({self._what: pa.string(), "features": kind}.items())
            self._schema = self._schema.with_metadata({"shape": shape})
            self._file = pa.parquet.ParquetWriter(self._path, self._schema)
        lists = pa.FixedSizeListArray.from_arrays(flat.ravel(), flat.shape[1])
        self._file.write_table(pa.table([pa.array(paths), lists], schema=self._schema))


class FeatureNpzWriter(Writer):
    """A `.npz` file of `image` (text, `[n]`, called `what`) and `features` (float32, `[n, ...]`).

    The header of an array holds its length, so rows are kept in temporary files until the end.
    """

    def __init__(self, path: Path, *, path_width: int, what: str = "image"):
        self._path, self._what = path, what
        self._paths_dtype = np.dtype(f"<U{max(path_width, 1)}")
        # Temporary files are in the folder of the output, which needs the space anyway.
        self._files = {
            name: tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 (closed in __exit__)
            for name in (what, "features")
        }
        self._count, self._shape = 0, (0,)

    def __exit__(self, *exc: object) -> None:
        try:
            if exc[0] is None:
                self._join()
        finally:
            for file in self._files.values():
                file.close()

    def _write(self, paths: Sequence[str], *columns: np.ndarray) -> None:
        (features,) = columns
        self._files[self._what].write(np.array(paths, self._paths_dtype).tobytes())
        self._files["features"].write(np.ascontiguousarray(features, "<f4").tobytes())
        self._count, self._shape = self._count + len(paths), features.shape[1:]

    def _join(self) -> None:
        kinds = {self._what: (self._paths_dtype, ()), "features": (np.dtype("<f4"), self._shape)}
        with zipfile.ZipFile(self._path, "w") as archive:
            for name, (dtype, shape) in kinds.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    header = {
                        "descr": np.lib.format.dtype_to_descr(dtype),
                        "fortran_order": False,
                        "shape": (self._count, *shape),
                    }
                    np.lib.format.write_array_header_2_0(entry, header)
                    self._files[name].seek(0)
                    shutil.copyfileobj(self._files[name], entry, _COPIED)
