# SPDX-License-Identifier: Apache-2.0
"""Columns of many rows in little memory: arrays in place of an object for each row."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class Texts(Sequence[str]):
    """Texts, as UTF-8 in one buffer, to which more can be appended."""

    def __init__(self, texts: Iterable[str] = ()):
        self._text, self._ends = bytearray(), bytearray(8)  # The first one starts at 0.
        self.append(texts)

    def append(self, texts: Iterable[str]) -> None:
        texts = list(texts)
        whole = "".join(texts)
        if whole.isascii():
            lengths = list(map(len, texts))
        else:
            lengths = [len(text.encode("utf-8", "surrogatepass")) for text in texts]
        ends = np.cumsum([len(self._text), *lengths], dtype=np.int64)[1:]
        self._text += whole.encode("utf-8", "surrogatepass")
        self._ends += ends.tobytes()

    def __len__(self) -> int:
        return len(self._ends) // 8 - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = np.frombuffer(self._ends, np.int64, 2, 8 * index)
        return self._text[start:stop].decode("utf-8", "surrogatepass")

    def may_have(self, part: str) -> bool:
        """Whether a text may have a part: True for all that do, and rarely for others."""
        return part.encode() in self._text


class Codes:
    """Values of which many are equal, as numbers from 0, to which more can be appended.

    Attributes:
      values: the different values.
      rows: the number of the row of each that was appended first.
    """

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.rows: list[int] = []
        self._code_of: dict[Any, int] = {}
        self._codes = bytearray()

    def append(self, values: Sequence[Any], rows: Sequence[int]) -> None:
        """Appends values of rows."""
        keys = values
        if set(map(type, values)) != {str}:  # 1 and True are equal, and lists have no hash.
            keys = [v if isinstance(v, str) else (type(v), repr(v)) for v in values]
        for key in dict.fromkeys(keys):
            if key not in self._code_of:
                self._code_of[key] = len(self.values)
                place = keys.index(key)
                self.values.append(values[place])
                self.rows.append(rows[place])
        codes = np.fromiter(map(self._code_of.__getitem__, keys), np.int32, len(keys))
        self._codes += codes.tobytes()

    @property
    def codes(self) -> np.ndarray:
        """The index in `values` of each value that was appended, int32."""
        return np.frombuffer(self._codes, np.int32)


class Ragged(Sequence[np.ndarray]):
    """Any number of values for each row, in one array.

    Args:
      values: of all rows, one row after the other.
      counts: of the values of each row, integers `[rows]`.
    """

    def __init__(self, values: np.ndarray, counts: np.ndarray):
        self._values = values
        self._ends = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=self._ends[1:])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: Any) -> Any:
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        return self._values[self._ends[row] : self._ends[row + 1]]

    def select(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The values of some rows, one row after the other, and their counts, int64 `[rows]`."""
        starts, counts = self._ends[rows], self._ends[rows + 1] - self._ends[rows]
        ends = np.cumsum(counts)
        places = np.arange(ends[-1] if len(ends) else 0)
        return self._values[places + np.repeat(starts - (ends - counts), counts)], counts


class TextLists(Sequence[list[str]]):
    """Any number of texts for each row, to which rows can be appended."""

    def __init__(self) -> None:
        self._texts, self._ends = Texts(), bytearray(8)

    def append(self, rows: Sequence[Sequence[str]]) -> None:
        ends = np.cumsum([len(self._texts), *map(len, rows)], dtype=np.int64)[1:]
        self._texts.append(itertools.chain.from_iterable(rows))
        self._ends += ends.tobytes()

    def __len__(self) -> int:
        return len(self._ends) // 8 - 1

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        start, stop = np.frombuffer(self._ends, np.int64, 2, 8 * row)
        return [self._texts[place] for place in range(start, stop)]
