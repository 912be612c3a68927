# SPDX-License-Identifier: Apache-2.0
r"""Writes the page of a run: curves, predictions with pictures, time, parameters, commands.

A run writes this page too, as WORKDIR/report.html, at each evaluation and at its end, but without
pictures: for them this command runs the model on images of an evaluation. Without a checkpoint, or
where the data is missing, it writes the page without pictures. The exit code is 2 for bad input.

Examples:
  python -m vit_jax.report runs/digits
  python -m vit_jax.report --workdir=runs/digits --eval=test --max_images=5000 --output=digits.html
  python -m vit_jax.report --workdir=runs/digits --no_predict
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax.checkpoint.listing import is_step, list_steps
from vit_jax.checkpoint.workdir import read_config, read_labels
from vit_jax.config.reduced import reduce_for_evaluation, without_mesh
from vit_jax.observe.console import log, set_up
from vit_jax.pages.html import make_figure, make_section
from vit_jax.pages.run_page import Predictions, make_report, read_details
from vit_jax.utils.command import (
    CommandParser,
    add_workdir,
    check_positive,
    local_path,
    run_command,
)
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import write_atomically
from vit_jax.utils.layout import REPORT
from vit_jax.utils.mirrors import upload
from vit_jax.utils.registry import trust_parts
from vit_jax.utils.signals import importing
from vit_jax.utils.suggestions import suggest

if TYPE_CHECKING:
    import numpy as np

    from vit_jax.evaluators.base import Evaluator
    from vit_jax.objectives.base import Batch, Params

# Least and most pixels of the longer side of a picture.
_MIN_SIDE, _MAX_SIDE = 112, 224


@dataclasses.dataclass(frozen=True)
class Example:
    """An image with its prediction.

    Attributes:
      image: uint8 `[height, width, 3]`.
      predicted: the most probable class.
      confidence: probability of `predicted`.
      loss: negative log-likelihood of the label, in nats.
    """

    image: "np.ndarray"
    label: int
    predicted: int
    confidence: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Findings:
    """Predictions for the first images of a split.

    Attributes:
      rows: `label` and `predicted`, int32 `[n]`, `confidence` and `loss`, float32 `[n]`.
      worst: examples with the highest loss, the highest first.
      best: examples with the lowest loss, the lowest first.
    """

    rows: Mapping[str, "np.ndarray"]
    worst: Sequence[Example]
    best: Sequence[Example]


def predict_split(
    evaluator: "Evaluator", params: "Params", *, max_images: int, pictures: int
) -> Findings:
    """Runs a model over the first `max_images` images of an evaluator's split.

    `params` are on the mesh. `pictures` of the worst and of the best predictions are kept.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vit_jax.data.ops.patches import find_patches, to_images

    def judge(params: "Params", batch: "Batch") -> dict[str, jax.Array]:
        logits = evaluator.objective.predict(params, batch)["logits"].astype(jnp.float32)
        log_p = jax.nn.log_softmax(logits)
        return {
            "image": batch["image"],
            "mask": batch["mask"],
            "label": batch["label"],
            "predicted": jnp.argmax(logits, axis=-1),
            "confidence": jnp.exp(log_p.max(axis=-1)),
            "loss": -jnp.take_along_axis(log_p, batch["label"][:, None], axis=-1)[:, 0],
        }

    batches = evaluator.map_split(evaluator.jit(judge), params)
    columns = find_patches(evaluator.data.ops()) is not None
    collected, worst, best, seen = [], [], [], 0
    with contextlib.closing(batches):
        for batch in batches:
            images, mask = batch.pop("image"), batch.pop("mask").astype(bool)
            images = to_images(images) if columns else images
            kept = np.flatnonzero(mask)[: max_images - seen]
            seen += len(kept)
            rows = {k: v[kept] for k, v in batch.items()}
            collected.append(rows)
            order = np.argsort(-rows["loss"], kind="stable")
            # Few images of each batch are kept, so a split need not fit in memory.
            worst += [_example(images[kept[i]], rows, i) for i in order[:pictures]]
            best += [_example(images[kept[i]], rows, i) for i in order[::-1][:pictures]]
            worst = sorted(worst, key=lambda example: -example.loss)[:pictures]
            best = sorted(best, key=lambda example: example.loss)[:pictures]
            if seen >= max_images:
                break
    rows = {k: np.concatenate([r[k] for r in collected]) for k in collected[0]}
    return Findings(rows, worst, best)


def _example(image: "np.ndarray", rows: Mapping[str, "np.ndarray"], i: int) -> Example:
    label, predicted = int(rows["label"][i]), int(rows["predicted"][i])
    return Example(image, label, predicted, float(rows["confidence"][i]), float(rows["loss"][i]))


def summarize_findings(findings: Findings, title: str, names: Sequence[str]) -> Predictions:
    """Computes the calibration and the confusion matrix of predictions."""
    import numpy as np

    from vit_jax.evaluators.classification import NUM_BINS

    rows = findings.rows
    place = np.ceil(np.nan_to_num(rows["confidence"]) * NUM_BINS).astype(int).clip(1, NUM_BINS)
    hits = rows["label"] == rows["predicted"]
    bins = [
        (float(rows["confidence"][these].mean()), float(hits[these].mean()), int(these.sum()))
        for these in (place == number for number in range(1, NUM_BINS + 1))
        if these.any()
    ]
    pairs = np.stack([rows["label"], rows["predicted"]], axis=1)
    values, counts = np.unique(pairs, axis=0, return_counts=True)
    confusion = {(int(i), int(j)): int(n) for (i, j), n in zip(values, counts, strict=True)}
    return Predictions(title, names, bins, confusion)


def show_examples(findings: Findings, title: str, names: Sequence[str]) -> list[str]:
    """Makes sections with pictures of the worst and of the best predictions."""
    kinds = {"Worst predictions": findings.worst, "Best predictions": findings.best}
    return [
        make_section(
            f"{kind}: {title}", [show_example(e, names) for e in examples], layout="pictures"
        )
        for kind, examples in kinds.items()
    ]


def show_example(example: Example, names: Sequence[str]) -> str:
    """Makes a card of the picture of an example, with the names of its classes."""
    import numpy as np
    from PIL import Image

    from vit_jax.inference.draw import encode_jpeg, encode_png, scale_up
    from vit_jax.utils.pictures import to_rgb

    image = to_rgb(example.image)
    if max(image.shape[:2]) > _MAX_SIDE:
        small = Image.fromarray(image)
        small.thumbnail((_MAX_SIDE, _MAX_SIDE))
        image = np.asarray(small)
    enlarged = scale_up(image, _MIN_SIDE)
    sharp = enlarged.shape != image.shape
    picture = Image.fromarray(enlarged)
    # A photograph takes a tenth of the space as JPEG.
    encoded = encode_png(picture) if sharp else encode_jpeg(picture)
    label, predicted = (_name(names, i) for i in (example.label, example.predicted))
    right = example.label == example.predicted
    text = label if right else f"{label}, taken for {predicted}"
    facts = [f"{100 * example.confidence:.1f} % sure", f"loss {example.loss:.3g}"]
    return make_figure(encoded, picture.size, alt=text, name=text, caption=facts, sharp=sharp)


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else str(label)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's arguments; raises `UserError` if one is invalid."""
    parser = CommandParser(prog="python -m vit_jax.report", description=__doc__)
    add = parser.add_argument
    add_workdir(parser, "Write the page of the run of this workdir, which may be under way.")
    add("--output", type=local_path, help=f"Write this file. The default is WORKDIR/{REPORT}.")
    add(
        "--checkpoint",
        help="Run the checkpoint of this step, or the `last` or `best` one. The default is last.",
    )
    add(
        "--eval",
        metavar="NAME",
        help="Predict the images of this evaluator. The default is the first that classifies.",
    )
    add(
        "--max_images",
        type=int,
        default=2000,
        help="Predict at most this many images. The default is %(default)s.",
    )
    add(
        "--pictures",
        type=int,
        default=12,
        help="Show this many of the best and of the worst predictions. The default is %(default)s.",
    )
    add("--no_predict", action="store_true", help="Write the page without running the model.")
    parser.add_parts()
    args = parser.parse_args(argv)
    parser.require_workdir(args.workdir)
    check_positive(args, "max_images", "pictures", expected="at least 1")
    args.init_from = None
    read_config(args.workdir)
    return args


def choose_evaluator(evaluators: Sequence["Evaluator"], name: str | None) -> "Evaluator":
    """The evaluator of that name, or the first with one class per image; `UserError` if none."""
    able = {
        e.name: e
        for e in evaluators
        if e.judges_head and e.objective.classifies and not e.data.info.multi_label
    }
    if name is not None and name not in able:
        raise UserError(
            f"--eval={name}: expected an evaluator with one class an image{suggest(name, able)}"
        )
    if not able:
        raise UserError("no evaluator has one class for each image")
    return able[name] if name else next(iter(able.values()))


def predict(
    args: argparse.Namespace, config: dict[str, Any]
) -> tuple[list[Predictions], list[str]]:
    """Runs the model: returns statistics that the workdir does not have, and sections of pictures.

    Raises:
      UserError: there is no checkpoint, the data is missing, or no evaluator classifies.
    """
    with importing():
        from vit_jax.training.evaluation import Judge, find_source
        from vit_jax.training.experiment import Experiment

    source = find_source(args)
    config = reduce_for_evaluation(without_mesh(config))
    experiment = Experiment.from_config(config, match_classes=False)
    if experiment.objective.needs_label_maps and args.eval is None and args.checkpoint is None:
        return [], []  # Its evaluators write their pictures.
    choose_evaluator(experiment.evaluators, args.eval).open()
    judge = Judge(experiment)
    params, _ = judge.load(source)
    evaluator = choose_evaluator(judge.evaluators, args.eval)
    findings = predict_split(evaluator, params, max_images=args.max_images, pictures=args.pictures)
    names = read_labels(args.workdir) or evaluator.data.info.class_names or ()
    count, weights = len(findings.rows["label"]), Path(source).name
    title = f"{evaluator.name}, {f'step {int(weights):,}' if is_step(weights) else weights}"
    whole = count == len(evaluator.data.open())
    shown = title if whole else f"{title}, first {count:,} images"
    known = {one.title for one in read_details(args.workdir)}
    classes = [_name(names, i) for i in range(evaluator.data.info.num_classes)]
    add = whole or title not in known
    predictions = [summarize_findings(findings, shown, classes)] if add else []
    return predictions, show_examples(findings, shown, classes)


def main(argv: Sequence[str]) -> None:
    """Writes the page."""
    args = parse_arguments(argv)
    trust_parts(args.parts)
    set_up(quiet=False)
    config = read_config(args.workdir)
    predictions, sections = [], []
    asked = args.eval is not None or args.checkpoint is not None
    if not args.no_predict and (asked or list_steps(args.workdir)):
        try:
            predictions, sections = predict(args, config)
        except UserError as e:
            if asked:
                raise
            log(f"without pictures: {e}")
    output = args.output or args.workdir / REPORT
    page = make_report(args.workdir, predictions=predictions, sections=sections)
    try:
        write_atomically(output, page)
        upload(output)
    except OSError as e:
        raise UserError(f"--output={output} can't be written: {e.strerror or e}") from None
    log(f"wrote {output}")


if __name__ == "__main__":
    run_command(main)
