# SPDX-License-Identifier: Apache-2.0
"""Trains a text tower for a frozen ViT-B/16 on your pairs of images and texts (arXiv:2111.07991).

python -m vit_jax.main --config=configs/lit.py --workdir=runs/lit \
    --config.data.name=pairs:/data/pairs

The argument is the image tower, a name, file or workdir of a ViT-B/16, by default augreg:B/16,
which is loaded and not trained: it has no gradient and no optimizer state. The data are IMAGE.jpg
beside IMAGE.txt, or another source of captions (docs/data.md). The tokenizer is the file of T5's
vocabulary of 32,000 (cc_en.32000.model), and the names of the 1,000 classes a text file with one a
line. The published LiT-B16B_2 reaches 73.9 % zero-shot on ImageNet after 60,000 such steps with
public pairs, and 31.8 % recall at 1 of images by COCO's captions, 51.5 % of captions
(github.com/google-research/vision_transformer); its text tower is a BERT-base that was trained
before, here it is a transformer of the same size from scratch, so expect another number.
"""

from ml_collections import ConfigDict


def get_config(init_from: str = "augreg:B/16") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 60_000
    config.precision = "bfloat16"
    config.init_from = init_from
    config.model = {
        "name": "two_towers",
        "image": {"variant": "B/16"},
        "text": {"variant": "B", "vocab_size": 32_000, "context_length": 16, "pooling": "last"},
        "scale_init": 10.0,
    }
    config.objective = {"name": "contrastive", "loss": "softmax"}
    config.data = {
        "name": "pairs:data",
        "split": "train",
        "preprocess": "decode|resize(224)",
        "tokenizer": "sentencepiece('cc_en.32000.model', length=16, pad=1)",
        "batch_size": 16_384,
    }
    config.optimizer = {
        "name": "adafactor",
        "lr": 1e-3,
        "b2_cap": 0.999,
        "freeze": ("img/.*",),
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
