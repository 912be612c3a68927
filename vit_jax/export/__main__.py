# SPDX-License-Identifier: Apache-2.0
r"""Writes a trained model for other programs, into a folder of its own.

  npz          weights under the names of the files published with vision_transformer
  safetensors  weights under the names of timm, with a config.json from which timm and
               transformers make the model; without a classifier if it has a layer pre_logits;
               of two towers, under the names of CLIP or SigLIP in transformers
  transformers weights with the names and the config.json of ViT, I-JEPA, DINOv2 or DINOv3 there;
               of two towers, the same as safetensors
  stablehlo    a program for CPUs, GPUs and TPUs, which JAX alone can call
  onnx         a graph for ONNX Runtime and others; pip install 'vit_jax[onnx]'
  savedmodel   a folder for TensorFlow, written by an interpreter that has it (--tf_python)

A program takes uint8 images of the model's size, any number at a time: pixel values are normalized
inside of it, images are decoded and resized outside. Its parameters are in it. What is written is
read back and compared with the model. signature.json describes its inputs and outputs; README.md
is a card for people and for the Hugging Face hub, to which --push uploads the folder.

With --quantize the kernels of a stablehlo or onnx program are int8, a quarter of the size. The
change of accuracy is measured on the data of the run, or on --data, and logged.

Examples:
  python -m vit_jax.export runs/digits --to=stablehlo --output=digits_exported
  python -m vit_jax.export --workdir=runs/averaged --checkpoint=last --params=ema \
      --to=stablehlo,safetensors --output=digits_exported
  python -m vit_jax.export --checkpoint=vit.safetensors --to=npz --output=exported
  python -m vit_jax.export --workdir=runs/digits --to=onnx --output=digits_exported
  python -m vit_jax.export --workdir=runs/digits --to=stablehlo --quantize=int8 --output=digits_int8
  python -m vit_jax.export --workdir=runs/digits --to=safetensors,onnx --output=digits_exported \
      --license=apache-2.0 --push=USER/vit-digits --yes
  python -m vit_jax.export --init_from=augreg+imagenet2012:Ti/16@384 --layer=pre_logits \
      --to=stablehlo --output=exported
"""

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vit_jax.config.load import parse_overrides
from vit_jax.export.hub import check_push, push_folder
from vit_jax.export.schemes import DYNAMIC, SCHEMES
from vit_jax.inference.source import add_source, check_source, load_source
from vit_jax.observe.console import log, set_up
from vit_jax.utils.class_names import format_names
from vit_jax.utils.command import CommandParser, local_path, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import check_fresh, fresh_folder
from vit_jax.utils.layout import CONFIG, LABELS
from vit_jax.utils.signals import importing
from vit_jax.utils.suggestions import suggest
from vit_jax.utils.text import describe_size, encode_text, printable

if TYPE_CHECKING:
    from vit_jax.checkpoint.pretrained.weights import Weights
    from vit_jax.export.measure import Cost, Images
    from vit_jax.inference.model import LoadedModel

WEIGHTS = ("npz", "safetensors")
# Writers of programs by format, each the function `write_FORMAT` of a module. It takes the path
# `model.FORMAT`, the model, the layer whose output the program returns and batches of images, uint8
# `[n, *image_shape]`. It returns what the written program makes of them, float32 `[n, ...]` each.
PROGRAMS: Mapping[str, str] = {
    "stablehlo": "vit_jax.export.stablehlo",
    "onnx": "vit_jax.export.onnx",
    "savedmodel": "vit_jax.export.savedmodel",
}
# Programs that --quantize is for, each with a function `open_FORMAT` from the path of the file to a
# function from uint8 `[n, *image_shape]` to float32 `[n, ...]`.
QUANTIZED = ("stablehlo", "onnx")
TRANSFORMERS = "transformers"
FORMATS = (*WEIGHTS, TRANSFORMERS, *PROGRAMS)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's arguments, without overrides of the config; `to` becomes a list.

    Raises:
      UserError: an argument is invalid, or a library for it is missing.
    """
    parser = CommandParser(prog="python -m vit_jax.export", description=__doc__)
    add = parser.add_argument
    add_source(parser)
    add("--to", help=f"Write these formats, separated by commas: {', '.join(FORMATS)}.")
    add("--output", type=local_path, help="Make this folder, which must not exist.")
    add(
        "--layer",
        help="Let programs return the output of this layer. The default is logits, pixel_logits or "
        "pixel_depth of a model of pixels, image_embed of two towers, or else pre_logits; a wrong "
        "name prints all layers.",
    )
    add(
        "--tf_python",
        default=sys.executable,
        metavar="PYTHON",
        help="Write a savedmodel by this interpreter, which has TensorFlow. The default is the one "
        "that runs this command.",
    )
    add(
        "--quantize",
        metavar="KIND",
        help="Round the kernels of stablehlo and onnx programs to int8, one scale per output "
        "channel (int8); or also compute products of dense layers of onnx in integers, with ranges "
        "of activations measured at each call (int8_dynamic).",
    )
    add(
        "--data",
        metavar="SRC",
        help="Measure --quantize on this dataset, given as data.name in a config, such as "
        "folder:/data/birds. The default is the data of the evaluator val of the run, or of its "
        "first one.",
    )
    add(
        "--split",
        help="Measure --quantize on this split. The default is that of the evaluator, of which the "
        "first 5,000 images are read, or test with --data.",
    )
    add("--data_dir", help="Read TFDS datasets for --quantize from this folder.")
    add(
        "--name",
        help="Name the model so in its card. The default is the name in --push or --output.",
    )
    add(
        "--license",
        help="State this license of the weights in the card, such as apache-2.0 or mit.",
    )
    add(
        "--push",
        metavar="USER/NAME",
        help="Print what would be uploaded to this repository of the Hugging Face hub.",
    )
    add("--yes", action="store_true", help="Upload the folder, with --push.")
    add(
        "--private",
        action="store_true",
        help="Make the repository a private one if it is new, with --push.",
    )
    args = parser.parse_args(argv)
    for name in ("to", "output"):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing; see {parser.prog} --help")
    args.to = args.to.split(",")
    for name in args.to:
        if name not in FORMATS:
            raise UserError(f"--to={name}: {name!r} is unknown{suggest(name, FORMATS)}")
    if {"safetensors", TRANSFORMERS} <= set(args.to):
        raise UserError(
            f"--to={','.join(args.to)}: safetensors and {TRANSFORMERS} write the same file, "
            "model.safetensors; expected one of them"
        )
    _check_quantize(args)
    if args.output.suffix.removeprefix(".") in FORMATS:
        raise UserError(
            f"--output={args.output}: expected a folder; the file in it will be "
            f"model{args.output.suffix}"
        )
    if args.layer is not None and not set(args.to) & PROGRAMS.keys():
        raise UserError(
            f"--layer={args.layer}: --to={','.join(args.to)} has all layers; leave --layer out"
        )
    if args.push is not None:
        check_push(args.push, now=args.yes)
    elif args.yes or args.private:
        raise UserError("--yes and --private are of --push=USER/NAME, which is missing")
    check_source(args)
    if "onnx" in args.to:
        from vit_jax.export.onnx import check_onnx

        check_onnx()
    if "savedmodel" in args.to:
        from vit_jax.export.savedmodel import check_tensorflow

        check_tensorflow(args.tf_python)
    return args


def _check_quantize(args: argparse.Namespace) -> None:
    if args.quantize is None:
        for name in ("data", "split", "data_dir"):
            if getattr(args, name) is not None:
                raise UserError(
                    f"--{name}={getattr(args, name)}: expected --quantize with it, which is "
                    "measured on this data"
                )
        return
    if args.quantize not in SCHEMES:
        raise UserError(f"--quantize={args.quantize}: expected {' or '.join(SCHEMES)}")
    able = ("onnx",) if args.quantize == DYNAMIC else QUANTIZED
    for name in args.to:
        if name not in able:
            reason = "float" if name not in QUANTIZED else "a program in the dtype of the model"
            raise UserError(
                f"--quantize={args.quantize}: {name} is written as {reason}: expected "
                f"--to={','.join(able)} alone"
            )


def choose_layer(model: "LoadedModel", wanted: str | None, formats: Sequence[str]) -> str:
    """Chooses the layer whose output programs return.

    Where a format is a program, it is logged if these are features.

    Raises:
      UserError: the layer does not exist.
    """
    if wanted is not None:
        model.check_layer(wanted)
        return wanted
    from vit_jax.inference.model import IMAGE_EMBED

    has_programs = bool(PROGRAMS.keys() & set(formats))
    if model.texts is not None:
        if has_programs:
            log(
                f"{model.source}: programs return unit vectors of images (image_embed); the text "
                "tower is only in npz, safetensors and transformers"
            )
        return IMAGE_EMBED
    if model.classifies:
        return "logits"
    if model.dense is not None:
        return model.dense.output
    if has_programs:
        log(f"{model.source}: has no trained classifier; programs return features (pre_logits)")
    return "pre_logits"


def export(
    folder: Path,
    model: "LoadedModel",
    formats: Sequence[str],
    layer: str,
    *,
    tf_python: str,
    quantize: str | None = None,
    images: "Images | None" = None,
) -> tuple[list[str], dict[str, "Cost"]]:
    """Writes a model into an empty folder; returns lines to log, and costs of quantization.

    Args:
      folder: to write to.
      model: to write.
      formats: of `FORMATS`.
      layer: whose output programs return.
      tf_python: an interpreter with TensorFlow, which only a SavedModel needs.
      quantize: of `SCHEMES`; None for weights as they are.
      images: to measure its cost on.

    Raises:
      UserError: a format cannot hold the model, or a written program computes something else.
    """
    from vit_jax.checkpoint.pretrained.convert import convert
    from vit_jax.export.compare import check_size, compare_outputs, make_batches
    from vit_jax.export.signature import SIGNATURE, describe_signature

    lines, batches, costs = [], make_batches(model), {}
    rounded = model
    if quantize is not None:
        from vit_jax.export.quantize import round_weights

        rounded = round_weights(model)
    for name in formats:
        path = folder / f"model.{name}"
        if name == TRANSFORMERS and model.texts is None:
            lines += _write_transformers(folder, _make_weights(model))
            continue
        if name not in PROGRAMS:
            # Two towers have the names of `transformers` in either format.
            path = path.with_suffix(".npz" if name == "npz" else ".safetensors")
            weights = _make_weights(model)
            # The files are listed when their folder has its final name.
            notes = [text for text in convert(weights, path) if not text.startswith("wrote ")]
            lines += [f"{path.name}: {text}" for text in notes]
            if name != "npz" and model.texts is not None:
                lines += _write_huggingface_config(folder, weights)
            elif name != "npz":
                lines += _write_timm_config(folder / CONFIG, weights)
            continue
        check_size(model, what=name, quantized=quantize is not None)
        options = {"python": tf_python} if name == "savedmodel" else {}
        options |= {"quantize": quantize} if quantize is not None else {}
        module = importlib.import_module(PROGRAMS[name])
        outputs = getattr(module, f"write_{name}")(path, rounded, layer, batches, **options)
        lines.append(
            compare_outputs(rounded, layer, batches, outputs, what=path.name, quantize=quantize)
        )
        if quantize is not None and images is not None:
            from vit_jax.export.measure import measure

            run = getattr(module, f"open_{name}")(path)
            costs[name] = measure(model, run, layer, images, what=path.name)
            lines.append(f"{path.name}: {SCHEMES[quantize]}: {costs[name].describe()}")
    files = {name: f"model.{name}" for name in formats if name in PROGRAMS}
    if files:
        signature = describe_signature(model, layer, files)
        if quantize is not None:
            found = {name: cost.as_json() for name, cost in costs.items()}
            signature["quantization"] = {"scheme": quantize, "measured": found}
        text = json.dumps(signature, indent=1, ensure_ascii=False) + "\n"
        (folder / SIGNATURE).write_bytes(encode_text(text))
    if model.class_names is not None:
        (folder / LABELS).write_text(format_names(model.class_names), encoding="utf-8")
    return lines, costs


def describe_saving(model: "LoadedModel") -> str:
    """Describes how much smaller the parameters become with int8 kernels."""
    from vit_jax.export.quantize import count_bytes

    before, after = count_bytes(model.params)
    return (
        f"quantized parameters take {describe_size(after)} in place of {describe_size(before)} "
        f"({after / before:.0%})"
    )


def _write_timm_config(path: Path, weights: "Weights") -> list[str]:
    """Writes the `config.json` of timm beside weights, and returns notes."""
    from vit_jax.checkpoint.pretrained.timm_config import leave_out_pre_logits, make_timm_config

    weights, _ = leave_out_pre_logits(weights)
    try:
        config, notes = make_timm_config(weights)
    except ValueError as e:
        return [f"{path.name}: not written, so timm needs the arguments of the model: {e}"]
    path.write_bytes(encode_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n"))
    return notes


def _write_huggingface_config(folder: Path, weights: "Weights") -> list[str]:
    """Writes the JSON files of CLIP or SigLIP beside weights, and returns notes."""
    from vit_jax.checkpoint.pretrained.image_text_config import make_huggingface_config

    config, processor, notes = make_huggingface_config(weights)
    for name, content in ((CONFIG, config), ("preprocessor_config.json", processor)):
        if content is not None:
            (folder / name).write_bytes(encode_text(json.dumps(content, indent=1) + "\n"))
    return notes


def _write_transformers(folder: Path, weights: "Weights") -> list[str]:
    """Writes `model.safetensors` and its JSON files for `transformers`, and returns notes."""
    from vit_jax.checkpoint.pretrained.huggingface_export import write_huggingface

    return write_huggingface(folder, weights)


def _make_weights(model: "LoadedModel") -> "Weights":
    from vit_jax.checkpoint.pretrained.weights import Weights

    tokenizer = None if model.texts is None else model.texts.tokenizer
    return Weights(
        params=model.list_params(),
        layout="loaded model",
        model=dict(model.arguments),
        preprocess={
            "mean": model.pixel_mean,
            "std": model.pixel_std,
            "image_size": model.image_shape[:2],
            "eval": model.preparation.line,
        },
        class_names=model.class_names,
        loss=model.loss,
        tokenizer=None
        if tokenizer is None
        else {"line": tokenizer.describe(), "sha256": tokenizer.sha256},
    )


def main(argv: Sequence[str]) -> None:
    """Exports a model and logs the files that were written."""
    overrides, rest = parse_overrides(list(argv))
    args = parse_arguments(rest)
    set_up(quiet=False)
    check_fresh(args.output)
    with importing():
        from vit_jax.export.card import CARD, make_card
    model = load_source(args, overrides)
    layer = choose_layer(model, args.layer, args.to)
    images = None
    if args.quantize is not None:
        from vit_jax.export.measure import find_images

        options = {"data": args.data, "split": args.split, "data_dir": args.data_dir}
        images = find_images(model, layer, **options)
    with fresh_folder(args.output) as folder:
        lines, costs = export(
            folder,
            model,
            args.to,
            layer,
            tf_python=args.tf_python,
            quantize=args.quantize,
            images=images,
        )
        card = make_card(
            model,
            args.to,
            layer,
            name=printable(args.name or (args.push or args.output.name).rpartition("/")[2]),
            license_id=args.license,
            params=args.params,
            quantize=args.quantize,
            costs=costs,
        )
        (folder / CARD).write_bytes(encode_text(card))
    for line in lines:
        log(line)
    if args.quantize is not None:
        log(describe_saving(model))
    for path in sorted(p for p in args.output.rglob("*") if p.is_file()):
        log(f"wrote {path} ({describe_size(path.stat().st_size)})")
    if args.push is not None:
        for line in push_folder(args.output, args.push, private=args.private, now=args.yes):
            log(line)


if __name__ == "__main__":
    run_command(main)
