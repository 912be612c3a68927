# SPDX-License-Identifier: Apache-2.0
"""Trains SigLIP B/16 at 224 pixels on your pairs of images and texts (arXiv:2303.15343).

python -m vit_jax.main --config=configs/siglip.py --workdir=runs/siglip \
    --config.data.name=pairs:/data/pairs

The data are IMAGE.jpg beside IMAGE.txt, or another source of captions (docs/data.md); the published
pairs, WebLI, are not public. The tokenizer is the file of T5's vocabulary of 32,000
(cc_en.32000.model), and the names of the 1,000 classes a text file with one a line. The length is
that of the paper's studies of the batch size. The published model of this size reaches 76.0 %
zero-shot on ImageNet, and 47.8 % recall at 1 of images by COCO's captions, 65.7 % of captions
(github.com/mlfoundations/open_clip, docs/openclip_results.csv); its number of pairs is not known.
Other sizes: --config.model.image.variant=L/16 --config.model.text.variant=L.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.examples = 9e9
    config.precision = "bfloat16"
    config.model = {
        "name": "two_towers",
        "image": {"variant": "B/16", "classifier": "map"},
        "text": {"variant": "B", "vocab_size": 32_000, "context_length": 64, "pooling": "last"},
        "scale_init": 10.0,
        "bias_init": -10.0,
    }
    config.objective = {"name": "contrastive", "loss": "sigmoid", "form": "ring"}
    config.data = {
        "name": "pairs:data",
        "split": "train",
        "preprocess": "decode|resize(224)",
        "tokenizer": "sentencepiece('cc_en.32000.model', length=64, pad=1)",
        "batch_size": 32_768,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 1e-3,
        "b2": 0.95,
        "mu_dtype": "bfloat16",
        "schedule": "cosine",
        "warmup_percent": 3,
        "weight_decay": 1e-4,
        "weight_decay_times": "schedule",
        "grad_clip_norm": 1.0,
    }
    config.evals = {
        "imagenet": {
            "name": "zero_shot",
            "data_name": "imagenet2012",
            "split": "validation",
            "preprocess": "decode|resize(224)",
            "class_names": "imagenet_names.txt",
            "templates": "photos",
            "batch_size": 1024,
            "every_percent": 5,
        },
        "retrieval": {
            "name": "retrieval",
            "split": "test",
            "preprocess": "decode|resize(224)",
            "batch_size": 1024,
            "every_percent": 5,
        },
    }
    config.checkpoint = {"every_percent": 1}
    config.log_every = 50
    return config
