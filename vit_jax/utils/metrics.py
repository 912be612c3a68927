# SPDX-License-Identifier: Apache-2.0
"""Facts that follow from the names of metrics."""

import dataclasses
import math
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a metric measures.

    Attributes:
      label: for axes, such as "accuracy"; without the unit of a share.
      is_share: whether it is a fraction, which people read in percent.
      meaning: a sentence for readers who do not know the name; may be empty.
    """

    label: str
    is_share: bool = False
    meaning: str = ""


_LOWER_IS_BETTER = re.compile(r"(.+_)?loss|loss_.+|ece")
_ACCURACY = Metric("accuracy", is_share=True)
# The first pattern that fits the last part of a name decides.
_KNOWN = {
    r"(.+_)?loss|loss_.+": Metric("loss"),
    r"real_top1": Metric(
        "accuracy",
        is_share=True,
        meaning="the share of images whose prediction is one of their reassessed (ReaL) labels.",
    ),
    r"(.+_)?top1|top1_.+": _ACCURACY,
    r"(.+_)?top5": Metric(
        "accuracy",
        is_share=True,
        meaning="the share of images whose label is among the five most probable classes.",
    ),
    r"mean_per_class": Metric(
        "accuracy",
        is_share=True,
        meaning="the mean of the accuracies of the classes; each class has the same weight.",
    ),
    r"mAP": Metric(
        "average precision",
        is_share=True,
        meaning="the mean over the classes of the area below the curve of precision over recall.",
    ),
    r"ece": Metric(
        "calibration error",
        is_share=True,
        meaning="expected calibration error: how far the confidence of predictions is from their "
        "accuracy, on average; 0 % is perfect.",
    ),
    r"\d+shot": Metric(
        "accuracy",
        is_share=True,
        meaning="accuracy of a linear classifier on features, fitted to so many images a class.",
    ),
    r"\d+nn": Metric(
        "accuracy",
        is_share=True,
        meaning="accuracy of the vote of so many nearest neighbours among the training images.",
    ),
    r"image_to_text_recall\d+": Metric(
        "recall",
        is_share=True,
        meaning="the share of images with one of their captions among so many most similar ones.",
    ),
    r"text_to_image_recall\d+": Metric(
        "recall",
        is_share=True,
        meaning="the share of captions whose image is among so many most similar ones.",
    ),
    r"miou": Metric(
        "mIoU",
        is_share=True,
        meaning="mean intersection over union: for each class, the pixels that are of it in both "
        "labels and predictions as a share of those in either; then the mean over the classes.",
    ),
    r"pixel_accuracy": Metric(
        "accuracy", is_share=True, meaning="the share of labelled pixels with the right class."
    ),
    r"mean_class_accuracy": Metric(
        "accuracy",
        is_share=True,
        meaning="the mean over the classes of the share of their pixels that are predicted right.",
    ),
    r"lr": Metric("learning rate"),
    r"images_per_sec": Metric("images/s"),
    r"step_ms": Metric("milliseconds"),
    r"first_step_s": Metric("seconds"),
    r"data_wait": Metric(
        "time", is_share=True, meaning="the share of the time in which a step waits for its images."
    ),
    r"mfu": Metric(
        "peak",
        is_share=True,
        meaning="model FLOPs utilisation: the speed as a share of the peak of the devices.",
    ),
    r"corrupt": Metric("images", meaning="the number of images that can't be read."),
    r"skipped": Metric("steps", meaning="the number of steps that diverged and changed nothing."),
}


def describe_metric(name: str) -> Metric:
    """Returns what a metric, such as `val/top1`, measures; an unknown one has its own name."""
    last = name.rpartition("/")[2]
    for pattern, metric in _KNOWN.items():
        if re.fullmatch(pattern, last):
            return metric
    return Metric(last.replace("_", " "))


def format_value(name: str, value: float) -> str:
    """Formats a value of a metric: shares in percent, others with four digits."""
    return f"{100 * value:.2f} %" if describe_metric(name).is_share else f"{value:.4g}"


def lower_is_better(metric: str) -> bool:
    """Whether lower values of a metric, such as `val/loss`, are better."""
    return _LOWER_IS_BETTER.fullmatch(metric.rpartition("/")[2]) is not None


def find_best_step(values: Mapping[int, float], metric: str) -> int | None:
    """Returns the step with the best value of a metric, the newest of equal ones.

    Values that are not finite are ignored; None if there are no others.
    """
    sign = -1 if lower_is_better(metric) else 1
    judged = [(sign * value, step) for step, value in values.items() if math.isfinite(value)]
    return max(judged, default=(0.0, None))[1]
