# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 learned from captions: zero-shot accuracy, and that of a linear probe of the images.

    python -m benchmarks.cifar10_text --images=/data/cifar10 --workdir=runs/cifar10_text \
        --json benchmarks/results/cifar10_text.json

The folder has train/CLASS/NAME.jpg and test/CLASS/NAME.jpg. Each image gets captions by rule, such
as "a photo of a frog". Zero-shot through the text tower should equal the linear probe of the image
tower, which has the labels, within 3 points. Takes two hours on two cores, --epochs=5 half an
hour. The same command resumes where it was stopped.
"""

import argparse
import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

import vit_jax
from benchmarks.environment import write_results
from vit_jax.utils.errors import UserError

# Captions of an image, of which one is drawn for each example; the first is the prompt of a class.
CAPTIONS = ("a photo of a {}", "a small picture of a {}", "{}, a photo", "here is a {}")
LENGTH = 40


def write_pairs(images: Path, file: Path) -> int:
    """Writes a manifest of the images with captions, and returns the number of its rows."""
    paths = sorted(path for split in ("train", "test") for path in images.glob(f"{split}/*/*.jpg"))
    if not paths:
        raise UserError(f"--images={images}: expected train/CLASS/NAME.jpg and test/CLASS/NAME.jpg")
    rows = [
        {
            "image": str(path.absolute()),
            "label": path.parent.name,
            "split": path.parent.parent.name,
            "caption": [caption.replace("{}", path.parent.name) for caption in CAPTIONS],
        }
        for path in paths
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def make_config(file: Path, *, epochs: float) -> ConfigDict:
    """The compact model of `configs/cifar10.py` as image tower, and a small text tower."""
    config = ConfigDict()
    config.seed = 0
    config.epochs = epochs
    config.model = {
        "name": "two_towers",
        "image": {
            **{"patch_size": 4, "hidden_size": 128, "num_layers": 6, "num_heads": 4},
            **{"mlp_dim": 256, "classifier": "gap"},
        },
        "text": {
            **{"context_length": LENGTH, "hidden_size": 64, "num_layers": 2, "num_heads": 4},
            **{"mlp_dim": 128, "pooling": "gap"},
        },
        "width": 128,
        "scale_init": 10.0,
        "bias_init": -2.0,
    }
    config.objective = {"name": "contrastive", "loss": "sigmoid"}
    preprocess = "decode|resize(32)"
    config.data = {
        "name": f"manifest:{file.absolute()}",
        "split": "train",
        "preprocess": f"{preprocess}|random_shift(4)|flip_lr",
        "tokenizer": f"bytes(length={LENGTH})",
        "batch_size": 128,
    }
    config.optimizer = {
        **{"name": "adamw", "lr": 1e-3, "b2": 0.95, "schedule": "cosine", "warmup_percent": 5},
        **{"lr_multipliers": (("t|b", 10.0),), "weight_decay": 0.05, "grad_clip_norm": 1.0},
    }
    common = {"split": "test", "preprocess": preprocess}
    zero_shot = common | {"name": "zero_shot", "templates": CAPTIONS[0]}
    config.evals = {
        "test": zero_shot | {"every_percent": 20},
        "probe": common | {"name": "linear_probe", "train_split": "train"},
    }
    config.checkpoint = {"every_percent": 5}
    return config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="such as /data/cifar10")
    parser.add_argument("--workdir", type=Path, required=True, help="of the run and its captions")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args()

    file = args.workdir / "pairs.jsonl"
    print(f"wrote {file}: {write_pairs(args.images, file):,} images with captions")
    config = make_config(file, epochs=args.epochs)
    metrics = vit_jax.train(config, args.workdir / "run").metrics
    zero_shot, probe = metrics["test/top1"], metrics["probe/top1"]
    print(f"zero-shot {zero_shot:.2%}, linear probe {probe:.2%}: {100 * (zero_shot - probe):+.2f}")
    if args.json:
        measured = {"device": jax.devices()[0].device_kind, "seed": 0, "epochs": args.epochs}
        results = {"zero_shot_top1": zero_shot, "linear_probe_top1": probe}
        write_results(args.json, measured | results, "jax", "flax", "optax")


if __name__ == "__main__":
    main()
