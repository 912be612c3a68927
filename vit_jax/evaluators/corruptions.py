# SPDX-License-Identifier: Apache-2.0
"""Accuracy on corrupted images, which are made of a split as it is read.

Source: Hendrycks and Dietterich, arXiv:1903.12261, section 4.1.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vit_jax.data.ops.corruptions import KINDS, SEVERITIES
from vit_jax.data.pipeline import DatasetSpec
from vit_jax.evaluators.base import Columns, Evaluator, write_details
from vit_jax.evaluators.classification import Classification
from vit_jax.objectives.base import Batch, Params
from vit_jax.observe.console import log_lines
from vit_jax.utils.bounds import read_json
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.suggestions import suggest

# Errors of AlexNet on ImageNet-C in percent, the mean over severities, as published.
_ALEXNET = {
    "gaussian_noise": 88.6,
    "shot_noise": 89.4,
    "impulse_noise": 92.3,
    "defocus_blur": 82.0,
    "glass_blur": 82.6,
    "motion_blur": 78.6,
    "zoom_blur": 79.8,
    "snow": 86.7,
    "fog": 81.9,
    "brightness": 56.5,
    "contrast": 85.3,
    "elastic_transform": 64.6,
    "pixelate": 71.8,
    "jpeg_compression": 60.7,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corruptions(Evaluator):
    """Judges the logits on each kind of corruption at each severity, and logs one table.

    Images are corrupted after `preprocess`, at the size that the model takes.

    Attributes:
      kinds: of corruption; `()` for all that the package makes.
      severities: from 1 to 5.
      baseline: errors that those of the model are divided by, for `mce`: "alexnet" for the
        published ones of ImageNet-C, or a JSON file with a percentage for each kind; None for none.
    """

    kinds: tuple[str, ...] = ()
    severities: tuple[int, ...] = SEVERITIES
    baseline: str | None = None

    judges_head = True
    takes_patches = False

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = tuple(self.kinds) or KINDS
        object.__setattr__(self, "kinds", kinds)
        for kind in kinds:
            if kind not in KINDS:
                near = suggest(kind, KINDS) or f": expected some of {', '.join(KINDS)}"
                frost = ", which needs photographs that are not part of this package"
                raise UserError(
                    f"evals.{self.name}.kinds: unknown corruption {kind!r}"
                    f"{frost if kind == 'frost' else near}"
                )
        self.check(len(set(kinds)) == len(kinds), "kinds", "each kind once")
        severities = self.severities
        valid = bool(severities) and set(severities) <= set(SEVERITIES)
        self.check(
            valid and len(set(severities)) == len(severities), "severities", "some of 1 to 5"
        )
        if self.data.info.multi_label:
            raise UserError(
                f"evals.{self.name}: {self.data} has several labels an example; expected a "
                "dataset with one"
            )
        _ = self._judge, self._baseline

    @functools.cached_property
    def _judge(self) -> Classification:
        return Classification(
            name=self.name, data=self.data, objective=self.objective, mesh=self.mesh
        )

    @functools.cached_property
    def _baseline(self) -> Mapping[str, float] | None:
        if self.baseline is None or self.baseline == "alexnet":
            return _ALEXNET if self.baseline else None
        key = f"evals.{self.name}.baseline={self.baseline!r}"
        try:
            errors = read_json(Path(self.baseline).expanduser())
        except (OSError, ValueError) as e:
            raise UserError(
                f"{key} can't be read: {describe_error(e)}; expected 'alexnet' or a JSON file"
            ) from None
        for kind in self.kinds:
            value = errors.get(kind) if isinstance(errors, dict) else None
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 < value <= 100
            ):
                raise UserError(
                    f"{key}: {kind!r} has {value!r}: expected the error in percent, above 0 and up "
                    "to 100, of each kind"
                )
        return errors

    @property
    def metrics(self) -> tuple[str, ...]:
        mce = ("mce",) if self.baseline else ()
        return ("top1", "clean_top1", *mce, "ece", *(f"{kind}_top1" for kind in self.kinds))

    def judge_batch(self, params: Params, batch: Batch) -> tuple[Columns, Columns]:
        """Judges a batch; see `Classification.judge_batch`."""
        return self._judge.judge_batch(params, batch)

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Returns the mean of `top1` and `ece` over kinds and severities, and `top1` by kind.

        `clean_top1` is of the images as they are. `mce` is the mean over kinds of 100 times the
        sum of errors over severities, divided by that of the baseline (equation 1). Details are a
        JSON file with the accuracy at each severity.
        """
        clean, count = self._measure(params, self.data)
        top1 = np.zeros((len(self.kinds), len(self.severities)))
        ece = np.zeros_like(top1)
        for i, kind in enumerate(self.kinds):
            for j, severity in enumerate(self.severities):
                found, _ = self._measure(params, self._corrupted(kind, severity))
                top1[i, j], ece[i, j] = found["top1"], found["ece"]
        by_kind = dict(zip(self.kinds, top1.mean(axis=1).tolist(), strict=True))
        results = {"top1": float(top1.mean()), "clean_top1": clean["top1"]}
        if self._baseline:
            shares = [100 * (1 - by_kind[kind]) / (self._baseline[kind] / 100) for kind in by_kind]
            results["mce"] = float(np.mean(shares))
        results |= {"ece": float(ece.mean()), "clean_ece": clean["ece"]}
        results |= {f"{kind}_top1": value for kind, value in by_kind.items()}
        results["count"] = count
        log_lines(self._table(top1, clean["top1"]))
        severities = list(self.severities)
        rows = dict(zip(self.kinds, top1.tolist(), strict=True))
        write_details(details, {"results": results, "severities": severities, "top1": rows})
        return results

    def _corrupted(self, kind: str, severity: int) -> DatasetSpec:
        line = f"{self.data.preprocess}|corrupt({kind!r}, {severity})"
        return dataclasses.replace(self.data, preprocess=line)

    def _measure(self, params: Params, data: DatasetSpec) -> tuple[dict[str, float], int]:
        total: dict[str, np.ndarray] = {}
        for sums, _ in self.map_split(self._judge.sum_batch, params, data):
            for k, v in sums.items():
                total[k] = total.get(k, 0.0) + np.asarray(v, np.float64)
        if not total or not (count := int(total["count"])):
            raise self.nothing_to_read(data)
        gap = np.abs(total["bin_confidence"] - total["bin_hits"]).sum()
        return {"top1": float(total["top1"]) / count, "ece": float(gap) / count}, count

    def _table(self, top1: np.ndarray, clean: float) -> list[str]:
        head = "".join(f"{severity:>8}" for severity in self.severities)
        lines = [
            f"{self.name}: top1 on corrupted images by severity; {clean:.4f} on clean ones",
            f"{'corruption':<20}{head}{'mean':>9}",
        ]
        for kind, row in zip(self.kinds, top1, strict=True):
            values = "".join(f"{value:>8.4f}" for value in row)
            lines.append(f"{kind:<20}{values}{row.mean():>9.4f}")
        return lines
