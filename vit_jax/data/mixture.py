# SPDX-License-Identifier: Apache-2.0
"""Several sources in fixed proportions.

The source of an example is a function of its position alone, without random choice or drift.
Grain's mixing rounds weights to a hundredth of the smallest, which adds up over a long run.
"""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from vit_jax.data.classes import Classes, match_labels
from vit_jax.data.sources.base import DatasetInfo, Source
from vit_jax.utils.errors import UserError

# Limit of the period of a schedule: the fewest positions in which all shares are exact.
MAX_PERIOD = 2**16


class Schedule:
    """The source of each position, and which of that source's examples it takes.

    For every n and source k, the number of examples of k in the first n positions differs by less
    than one from n times the share of k. Each turn of a source has a window of positions that keeps
    this bound. The schedule takes the turn whose window closes first, which always succeeds for
    unit jobs (Baruah et al., Proportionate progress, Algorithmica 15, 1996).
    """

    def __init__(self, parts: Sequence[int]):
        """`parts` are the integer shares of the sources; their sum is the period."""
        period = sum(parts)
        self._parts = np.array(parts)
        self._source = np.zeros(period, np.int32)
        self._turn = np.zeros(period, np.int32)  # earlier turns of the source in the period
        counts = [0] * len(parts)
        for position in range(period):
            ready = (
                (-(-(count + 1) * period // part), k)
                for k, (count, part) in enumerate(zip(counts, parts, strict=True))
                if count * period < (position + 1) * part
            )
            _, k = min(ready)
            self._source[position], self._turn[position] = k, counts[k]
            counts[k] += 1

    def __getitem__(self, position: int) -> tuple[int, int]:
        """The source, and the number of examples taken from it at earlier positions."""
        round_, within = divmod(position, len(self._source))
        k = int(self._source[within])
        return k, round_ * int(self._parts[k]) + int(self._turn[within])


@functools.cache
def make_schedule(weights: tuple[float, ...], *, key: str) -> Schedule:
    """The schedule of weights, which are read as exact decimal numbers.

    Raises `UserError` unless weights are above 0 and have a common denominator up to `MAX_PERIOD`.
    """
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise UserError(f"{key}: weight {weight}: expected more than 0")
    exact = [Fraction(str(weight)) for weight in weights]
    unit = Fraction(
        math.gcd(*(x.numerator for x in exact)), math.lcm(*(x.denominator for x in exact))
    )
    parts = [int(weight / unit) for weight in exact]
    if sum(parts) > MAX_PERIOD:
        shares = [float(weight / sum(exact)) for weight in exact]
        close = [max(1, round(1000 * share)) for share in shares]
        raise UserError(
            f"{key}: the weights {', '.join(map(str, weights))} need {sum(parts):,} parts to be "
            f"exact; expected at most {MAX_PERIOD:,}, such as {', '.join(map(str, close))}"
        )
    return Schedule(parts)


class Mixture(Source):
    """Concatenated sources; source k has the indices from `starts[k]` to `starts[k + 1]`."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        self.starts = (0, *itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self.starts[-1]

    def _find(self, index: int) -> tuple[Source, int, int]:
        k = bisect.bisect_right(self.starts, index) - 1
        return self.sources[k], index - self.starts[k], self.starts[k]

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, within, _ = self._find(index)
        return source[within]

    @property
    def reads_ahead(self) -> bool:
        return any(source.reads_ahead for source in self.sources)

    def ahead(self, indices: Sequence[int], *, captions: bool) -> None:
        for index in indices:
            source, within, _ = self._find(index)
            source.ahead([within], captions=captions)

    def captions(self, index: int) -> tuple[str, ...]:
        source, within, _ = self._find(index)
        return source.captions(within)

    def describe(self, index: int) -> str:
        source, within, _ = self._find(index)
        return source.describe(within)

    def successor(self, index: int) -> int:
        source, within, start = self._find(index)
        return start + source.successor(within)


def merge_infos(infos: Sequence[DatasetInfo], names: Sequence[str], *, key: str) -> DatasetInfo:
    """Classes and image shape of a mixture; a side that differs between sources is None.

    The classes are those of the source with the most, which has all of the others; see
    `match_labels`. Raises `UserError` if it has not. A mixture has labels if all sources have, and
    so for captions.
    """
    if len(infos) == 1:
        return infos[0]
    captions = all(info.captions for info in infos)
    for info, name in zip(infos, names, strict=True):
        if info.pixel_classes != infos[0].pixel_classes:
            raise UserError(
                f"{key}: {names[0]} and {name} have different classes of pixels: expected the same "
                "names in the same order, or none"
            )
        if info.pixel_depth != infos[0].pixel_depth:
            raise UserError(
                f"{key}: of {names[0]} and {name} only one has the depth of pixels: expected both"
            )
    if not all(info.num_classes for info in infos):
        infos = [
            dataclasses.replace(info, num_classes=0, class_names=None, multi_label=False)
            for info in infos
        ]
    pairs = list(zip(infos, names, strict=True))
    widest, owner = max(pairs, key=lambda pair: (pair[0].num_classes, bool(pair[0].class_names)))
    for info, name in pairs:
        check_same_kind(info, widest, name, owner, key=key)
        match_labels(Classes.of(info, name), Classes.of(widest, owner), key=key)
    shapes = zip(*(info.image_shape for info in infos), strict=True)
    height, width, _ = (sizes[0] if len(set(sizes)) == 1 else None for sizes in shapes)
    return dataclasses.replace(widest, image_shape=(height, width, 3), captions=captions)


def check_same_kind(a: DatasetInfo, b: DatasetInfo, a_name: str, b_name: str, *, key: str) -> None:
    """Raises `UserError` if examples have one label in one dataset and several in the other."""
    if a.multi_label != b.multi_label:
        one, several = (b_name, a_name) if a.multi_label else (a_name, b_name)
        raise UserError(
            f"{key}: {several} has several labels an example, {one} has one: expected the same"
        )
