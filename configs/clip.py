# SPDX-License-Identifier: Apache-2.0
"""Trains CLIP B/16 at 224 pixels on your pairs of images and texts (arXiv:2103.00020).

python -m vit_jax.main --config=configs/clip.py --workdir=runs/clip \
    --config.data.name=pairs:/data/pairs

The data are IMAGE.jpg beside IMAGE.txt, or another source of captions (docs/data.md); the published
400 million pairs are not public, and the length is 32 epochs of them. The names of the 1,000
classes are a text file with one a line. The published model of this size reaches 68.3 % zero-shot
on ImageNet, and 33.1 % recall at 1 of images by COCO's captions, 52.4 % of captions; trained on
34 billion examples of LAION-2B, 70.2 %, 42.3 % and 59.4 % (github.com/mlfoundations/open_clip,
docs/openclip_results.csv).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    size = "resize_small(224, 'bicubic_antialias')"
    shared = {"activation": "quick_gelu", "norm_epsilon": 1e-5, "head_bias": False}

    config = ConfigDict()
    config.seed = 0
    config.examples = 32 * 400e6
    config.precision = "bfloat16"
    config.model = {
        "name": "two_towers",
        "image": shared | {"variant": "B/16", "pre_norm": True, "embedding_bias": False},
        "text": shared
        | {
            "vocab_size": 49_408,
            "context_length": 77,
            "hidden_size": 512,
            "num_layers": 12,
            "num_heads": 8,
            "mlp_dim": 2048,
            "causal": True,
            "pooling": "eot",
            "embedding_init_std": 0.02,
            "positions_init_std": 0.01,
        },
        "width": 512,
        "scale_init": 1 / 0.07,
    }
    config.objective = {
        "name": "contrastive",
        "loss": "softmax",
        "max_scale": 100.0,
        "pixel_mean": (0.48145466, 0.4578275, 0.40821073),
        "pixel_std": (0.26862954, 0.26130258, 0.27577711),
    }
    config.data = {
        "name": "pairs:data",
        "split": "train",
        "preprocess": f"decode|{size}|random_crop(224)",
        "tokenizer": "clip(length=77)",
        "batch_size": 32_768,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 5e-4,
        "b2": 0.98,
        "eps": 1e-6,
        "schedule": "cosine",
        "warmup_steps": 2000,
        "weight_decay": 0.2,
        # All but gains, biases and the scale.
        "weight_decay_params": (".*(kernel|embedding)",),
    }
    preprocess = f"decode|{size}|central_crop(224)"
    config.evals = {
        "imagenet": {
            "name": "zero_shot",
            "data_name": "imagenet2012",
            "split": "validation",
            "preprocess": preprocess,
            "class_names": "imagenet_names.txt",
            "templates": "photos",
            "batch_size": 1024,
            "every_percent": 5,
        },
        "retrieval": {
            "name": "retrieval",
            "split": "test",
            "preprocess": preprocess,
            "prefix": "a photo of ",
            "batch_size": 1024,
            "every_percent": 5,
        },
    }
    config.checkpoint = {"every_percent": 1}
    config.log_every = 50
    return config
