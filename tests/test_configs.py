# SPDX-License-Identifier: Apache-2.0
"""Every config builds, on eight devices and without its data."""

import re
from pathlib import Path

import pytest

from tests.images import write_folder
from vit_jax.checkpoint.pretrained.catalogue import find, is_name, needs_index
from vit_jax.config.load import load_config, override_config
from vit_jax.data.ops.policies import RandAug, RandAugment
from vit_jax.data.ops.transforms import InceptionCrop, ResizeSmall
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import count

CONFIGS = Path(__file__).parent.parent / "configs"

# Config with arguments, number of parameters, image size.
BUILDS = [
    ("digits.py", 119_242, 16),
    ("folder.py", 2_693_194, 32),
    ("digits_finetune.py", 119_242 - 48 * 49 + 48 * 48, 32),
    ("vit.py:b16,cifar10", 86_567_656 - 990 * 769 + (576 - 196) * 768, 384),
    ("vit.py:l32,imagenet2012", 306_535_400 + (144 - 49) * 1024, 384),
    ("vit.py:s16,cifar100", 22_050_664 - 900 * 385 + (576 - 196) * 384, 384),
    ("vit.py:ti16,imagenet2012,eval=central", 5_717_416 + (576 - 196) * 192, 384),
    ("vit.py:h14,cifar100", 632_045_800 - 900 * 1281 + (27**2 - 16**2) * 1280, 378),
    ("vit.py:r50_b16,cifar10", 98_659_112 - 990 * 769 + (576 - 196) * 768, 384),
    ("augreg.py:R_Ti_16", 6_337_704 - (1000 - 37) * 193 + (144 - 49) * 192, 384),
    ("augreg.py:R26_S_32", 36_431_912 - (1000 - 37) * 385 + (144 - 49) * 384, 384),
    ("mixer.py:b16,cifar10", 59_880_472 - 990 * 769, 224),
    ("mixer.py:b32,imagenet2012", 60_293_428, 224),
    ("augreg.py:Ti_16", 5_717_416 - (1000 - 37) * 193 + (576 - 196) * 192, 384),
    ("augreg.py:B_8", 86_576_872 - (1000 - 37) * 769 + (48**2 - 28**2) * 768, 384),
    ("augreg.py:S_32-i21k-300ep", 22_878_952 - (1000 - 37) * 385 + (144 - 49) * 384, 384),
    ("vit_i1k.py:variant=B/16", 86_567_656 + 769 * 768, 224),
    ("vit_i1k.py:variant=Ti/16", 5_717_416 + 193 * 192, 224),
    ("vit_i1k.py:variant=B/16,aug=strong2", 86_567_656 + 769 * 768, 224),
    ("digits_mae.py", 115_584 + 28_656, 16),
    ("digits_mae.py:runs/digits_mae", 115_584 + 490, 16),
    ("digits_probe.py", 115_584 + 5 * 490 + 2 * 48, 16),
    # The encoder, then the head of pre-training.
    ("digits_dino.py", 3 * 28_272 + 2 * 48 + 2_352 + 48 + 31_008, 16),
    ("digits_distill.py", 11_948, 16),
    ("digits_distill.py:none", 11_948 - 2 * 24 - 250, 16),
    ("mae.py", 111_655_680, 224),
    ("mae_finetune.py", 86_567_656 - 768, 224),
    ("dino.py", 22_050_664 - 385_000 + 22_286_592 + 65_536, 224),
    ("dino.py:ibot", 22_050_664 - 385_000 + 384 + 2 * (22_286_592 + 65_536), 224),
    # With factors of branches and of prototypes, the mask token, and centers of both losses.
    ("dinov2.py", 303_301_632 + 48 * 1024 + 1024 + 23_597_312 + 3 * 65_536, 224),
    ("dinov2.py:S", 22_050_664 - 385_000 + 25 * 384 + 22_286_592 + 3 * 65_536, 224),
    ("dino_continue.py", 21_628_800 + 384 + 2 * 9_720_064, 224),
    # The model and its Gram teacher, the mask token and two heads.
    ("dinov3_gram.py", 2 * 303_128_576 + 1024 + 2 * 23_597_312, 224),
    ("dinov3_gram.py:runs/dinov3", 2 * 303_128_576 + 1024 + 2 * 23_597_312, 224),
    ("distill.py", 22_436_432, 224),
    ("vit_i21k.py:variant=B/16", 86_567_656 + 20_843 * 769, 224),
    ("vit_i21k.py:variant=S/32,aug=medium2", 22_878_952 + 20_843 * 385, 224),
    ("vit_s16_i1k.py", 22_050_664 - 197 * 384 - 384 + 385 * 384, 224),
    ("deit.py:Ti", 5_717_416, 224),
    ("deit.py:S", 22_050_664, 224),
    ("deit.py:B", 86_567_656, 224),
    ("deit3.py:S", 22_050_664 + 24 * 384, 224),
    ("deit3.py:B", 86_567_656 + 24 * 768 - (196 - 144) * 768, 192),
    ("deit3.py:S,finetune=runs/deit3_s16", 22_050_664 + 24 * 384 + (576 - 196) * 384, 384),
    ("deit3.py:B,finetune=runs/deit3_b16", 86_567_656 + 24 * 768, 224),
    # Without biases of norms, queries, keys and values.
    ("vit5.py:S", 22_050_664 + (24 - 25 - 36 + 4) * 384 + 24 * 64, 224),
    ("vit5.py:B,finetune=runs/vit5_b16", 86_567_656 + (24 - 25 - 36 + 4) * 768 + 24 * 64, 224),
    # The table of positions is that of a class token and 7 x 7 patches.
    ("flexivit.py:S", 22_050_664 - (196 - 49) * 384, 240),
    ("flexivit.py:B", 86_567_656 - (196 - 49) * 768, 240),
    # Patches have one class token less, and 16 x 16 positions.
    ("naflex.py", 86_567_656 + (256 - 197 - 1) * 768, (257 * 16, 16)),
    # Two tables of 24 positions, norms of queries and keys in place of biases, and a learned query.
    (
        "navit.py",
        86_567_656 + (24 + 24 - 198 - 36) * 768 + 12 * 4 * 64 + 7_087_104,
        (1025 * 16, 16),
    ),
    ("cifar10.py", 810_890, 32),
    ("cifar10.py:small", 6_268_042, 32),
    # The encoder, then the decoder, or a head.
    ("cifar10_mae.py", 304_032 + 59_504, 32),
    ("cifar10_mae.py:none", 304_032 + 970, 32),
    ("cifar10_ssl.py", 304_128 + 172_608, 32),
    ("cifar10_ssl.py:dino_ibot", 304_128 + 96 + 2 * 172_608, 32),
    ("cifar10_ssl.py:mae", 304_128 + 59_504, 32),
    ("cifar10_ssl.py:random", 304_128 + 172_608, 32),
    ("digits_text.py", 156_754, 24),
    ("digits_segment.py", 126_027, 24),
    ("digits_depth.py", 126_027 + 53 * 17, 24),
    # The head of eleven classes; ADE20k has 150.
    ("segment.py", 86_579_712 + 4 * 768 + 11 * 769, 518),
    ("siglip.py", 203_155_970, 224),  # as published
    ("clip.py", 149_620_737, 224),  # as published
    ("lit.py", 196_033_537, 224),
    ("probe.py:runs/mae", 85_646_592 + 769_000 + 3 * 768, 224),
    ("probe.py:augreg:B/16", 86_567_656 + 2 * 768, 224),
]


# In place of data that is not available.
EPOCH = 1_281_167


@pytest.mark.parametrize(
    ("config", "parameters", "size"),
    # Slow together; the dump of each file, which is compared as well, has its parameters.
    [pytest.param(*b, marks=[pytest.mark.slow] * (b[0] != "digits.py"), id=b[0]) for b in BUILDS],
)
def test_config_builds(config, parameters, size, tmp_path):
    overrides = {"data.data_dir": str(tmp_path)}
    if config.startswith(("folder.py", "cifar10", "vit_i21k.py", "dino_continue.py")):
        counts = {f"{split}/class {n}": 60 for split in ("train", "test") for n in range(10)}
        overrides["data.name"] = f"folder:{write_folder(tmp_path, counts)}"
    if config.startswith("segment.py"):
        overrides["data.name"] = "digits_masks:64"
    if config.startswith(("siglip.py", "clip.py", "lit.py")):
        overrides["data.name"] = "digits_captions"
    config = load_config(str(CONFIGS / config), overrides)
    experiment = Experiment.from_config(config, epoch_examples=EPOCH)
    assert count(experiment.abstract_state.params) == parameters
    size = size if isinstance(size, tuple) else (size, size)
    assert experiment.abstract_batch["image"].shape[1:] == (*size, 3)
    assert experiment.evaluators


# Config with arguments, then model, steps, warmup, learning rate, dropout and images as published.
RECIPES = [
    ("vit.py:b16,cifar10", "B/16", "imagenet21k:B/16", 10_000, 500, 0.01, 0.0, "resize(384)"),
    ("vit.py:b16,cifar100", "B/16", "imagenet21k:B/16", 10_000, 500, 0.03, 0.0, "resize(384)"),
    ("vit.py:l16,imagenet2012", "L/16", "imagenet21k:L/16", 20_000, 500, 0.03, 0.1, "resize(384)"),
    ("vit.py:l32,cifar10", "L/32", "imagenet21k:L/32", 10_000, 500, 0.03, 0.0, "resize(384)"),
    ("vit.py:h14,cifar10", "H/14", "imagenet21k:H/14", 10_000, 500, 0.03, 0.1, "resize(378)"),
    (
        "vit.py:b32,cifar10,eval=central",
        *(
            "B/32",
            "imagenet21k:B/32",
            10_000,
            500,
            0.03,
            0.0,
            "resize_small(448, 'area')|central_crop(384)",
        ),
    ),
    (
        "vit.py:r50_b16,cifar10",
        *("R50+B/16", "imagenet21k:R50+B/16", 10_000, 500, 0.03, 0.1, "resize(384)"),
    ),
    (
        "vit.py:r_ti16,cifar100,eval=squash",
        *("R+Ti/16", "augreg:R_Ti_16", 10_000, 500, 0.03, 0.0, "resize(384)"),
    ),
    ("augreg.py:R_Ti_16", "R+Ti/16", "augreg:R_Ti_16", 500, 100, 0.03, 0.0, "resize(384)"),
    ("augreg.py:R50_L_32", "R50+L/32", "augreg:R50_L_32", 500, 100, 0.03, 0.0, "resize(384)"),
    (
        "augreg.py:R26_S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0",
        "R26+S/32",
        "augreg:R26_S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0",
        *(500, 100, 0.03, 0.0, "resize(384)"),
    ),
    ("augreg.py:in/L_16-x.npz", "L/16", "in/L_16-x.npz", 500, 100, 0.03, 0.0, "resize(384)"),
    (
        "mixer.py:b16,cifar10",
        "B/16",
        "mixer-imagenet21k:B/16",
        10_000,
        500,
        0.03,
        0.0,
        "resize(224)",
    ),
    ("mixer.py:b32,cifar10", "B/32", "mixer-sam:B/32", 10_000, 500, 0.03, 0.0, "resize(224)"),
    (
        "mixer.py:l16,cifar100",
        "L/16",
        "mixer-imagenet21k:L/16",
        10_000,
        500,
        0.03,
        0.0,
        "resize(224)",
    ),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=[r[0] for r in RECIPES])
def test_recipes_are_as_published(recipe):
    name, variant, init_from, steps, warmup, lr, dropout, images = recipe
    config = load_config(str(CONFIGS / name), {})
    assert config.model.variant == variant
    assert config.model.get("dropout_rate", 0.0) == dropout
    assert config.init_from == init_from
    if is_name(init_from) and not needs_index(init_from):
        assert find(init_from).variant == variant
    assert config.total_steps == steps
    assert config.data.batch_size == 512
    assert config.optimizer.to_dict() == {
        "name": "sgd",
        "lr": lr,
        "momentum": 0.9,
        "momentum_dtype": "bfloat16",
        "schedule": "cosine",
        "warmup_steps": warmup,
        "grad_clip_norm": 1.0,
        "accum_steps": 8,
    }
    assert {e.preprocess for e in config.evals.values()} == {f"decode|{images}"}
    size = images.rpartition("(")[2].rstrip(")")
    crop = f"inception_crop({size}, variant='tensorflow')"
    assert config.data.preprocess == f"decode|{crop}|flip_lr"


@pytest.mark.parametrize(
    ("spelling", "arguments"),
    [
        ("vit.py:ViT-B/16,cifar10", "vit.py:b16,cifar10"),
        ("vit.py:R50+B_16,cifar10", "vit.py:r50_b16,cifar10"),
        ("augreg.py:r+ti/16", "augreg.py:R_Ti_16"),
        ("augreg.py:vit-b16", "augreg.py:B_16"),
        ("mixer.py:B/16,cifar10", "mixer.py:b16,cifar10"),
        ("vit_i1k.py:variant=b16", "vit_i1k.py:variant=B/16"),
        ("vit_i21k.py:variant=ViT-B_16", "vit_i21k.py:variant=B/16"),
        ("deit.py:tiny", "deit.py:Ti"),
        ("deit3.py:S/16", "deit3.py:S"),
    ],
)
def test_a_model_may_be_spelled_in_another_way(spelling, arguments):
    assert load_config(f"{CONFIGS}/{spelling}", {}) == load_config(f"{CONFIGS}/{arguments}", {})


def test_every_config_is_built_here():
    assert {p.name for p in CONFIGS.glob("*.py")} == {b[0].partition(":")[0] for b in BUILDS}


@pytest.mark.parametrize(
    "config",
    [
        "vit.py:x16,cifar10",
        "vit.py:b16,cifar11",
        "vit.py:b16",
        "vit.py:b16,cifar10,eval=crop",
        "vit_i1k.py:B/16",
        "vit_i1k.py:variant=X/16",
        "vit_i1k.py:variant=B/16,aug=hard",
        "vit_i1k.py:variant=B/16,lr=1",
        "augreg.py:M_16",
        "mixer.py:b8,cifar10",
        "mixer.py:b16,cifar",
        "vit_i21k.py:B/16",
        "vit_i21k.py:variant=B/8",
        "vit_i21k.py:variant=B/16,aug=hard",
        "vit_i21k.py:variant=B/16,lr=1",
        "vit_s16_i1k.py:90",
        "deit.py:L",
        "deit3.py:L",
        "deit3.py:S,finetune=",
        "deit3.py:S,epochs=20",
        "vit5.py:H",
        "dino.py:dinov2",
        "dinov2.py:H",
        "cifar10_ssl.py:simclr",
        "cifar10.py:large",
    ],
)
def test_wrong_arguments_are_refused(config):
    with pytest.raises(UserError, match="--config: "):
        load_config(str(CONFIGS / config), {})


def augreg_line(magnitude):
    line = "decode|inception_crop(224, variant='tensorflow')|flip_lr"
    return line if magnitude is None else f"{line}|randaug(2, {magnitude}, variant='augreg')"


# The library whose crops a source took; None of it for the recipes of this project.
CROPS = {
    "augreg.py": "tensorflow",
    "deit.py": "torchvision",
    "cifar10_ssl.py": "uniform",
    "digits_dino.py": "uniform",
    "dino.py": "torchvision",
    "dino_continue.py": "torchvision",
    "dinov2.py": "torchvision",
    "dinov3_gram.py": "torchvision",
    "deit3.py:B": "torchvision",
    "deit3.py:B,finetune=runs/deit3_b16": "torchvision",
    "distill.py": "torchvision",
    "flexivit.py": "tensorflow",
    "mae.py": "torchvision",
    "mae_finetune.py": "torchvision",
    "mixer.py": "tensorflow",
    "vit5.py:B": "torchvision",
    "vit5.py:B,finetune=runs/vit5_b16": "torchvision",
    "probe.py": "byol",
    "vit.py": "tensorflow",
    "vit_i1k.py": "tensorflow",
    "vit_i21k.py": "tensorflow",
    "vit_s16_i1k.py": "tensorflow",
}
POLICIES = {"tensorflow": (RandAug, "augreg"), "torchvision": (RandAugment, "timm")}


def test_recipes_crop_and_distort_as_their_sources_did():
    found = set()
    for file in CONFIGS.glob("*.py"):
        for name in [c for c in CROPS if c.partition(":")[0] == file.name] or [file.name]:
            line = load_config(str(CONFIGS / name), {}).data.preprocess
            ops = parse_preprocess(line, key="data.preprocess")
            variant = next((op.variant for op in ops if isinstance(op, InceptionCrop)), None)
            assert variant == CROPS.get(name), name
            for op in ops:
                if isinstance(op, RandAug | RandAugment):
                    assert (type(op), op.variant) == POLICIES[variant], name
                    found.add(name)
    assert found >= {"vit_i1k.py", "vit_s16_i1k.py", "deit.py", "distill.py", "mae_finetune.py"}


def test_recipes_of_big_vision_evaluate_as_it_does():
    for name in ("vit_i1k.py", "vit_i21k.py", "vit_s16_i1k.py", "vit.py:b16,cifar10,eval=central"):
        for section in load_config(str(CONFIGS / name), {}).evals.values():
            ops = parse_preprocess(section.preprocess, key="evals")
            assert [op.method for op in ops if isinstance(op, ResizeSmall)] == ["area"]


def test_recipes_stay_short():
    for file in CONFIGS.glob("*.py"):
        assert len(file.read_text().splitlines()) <= 120, file.name


@pytest.mark.parametrize(
    ("arguments", "magnitude", "mixup"),
    [
        ("variant=Ti/16", 0, 0.0),
        ("variant=S/32", 15, 0.2),
        ("variant=S/16", 15, 0.5),
        ("variant=L/16", 15, 0.5),
        ("variant=Ti/16,aug=none", None, 0.0),
        ("aug=light2,variant=B/32", 10, 0.2),
        ("variant=B/16,aug=strong2", 20, 0.8),
    ],
)
def test_augmentation_goes_by_the_levels_of_augreg(arguments, magnitude, mixup):
    config = load_config(str(CONFIGS / f"vit_i1k.py:{arguments}"), {})
    assert config.data.preprocess == augreg_line(magnitude)
    assert config.objective.mixup == mixup


@pytest.mark.parametrize(
    ("variant", "magnitude", "weight_decay"),
    [
        ("Ti/16", None, 0.03),
        ("S/32", None, 0.1),
        ("S/16", 0, 0.03),
        ("B/32", 0, 0.1),
        ("B/16", 15, 0.1),
        ("L/16", 20, 0.1),
    ],
)
def test_pre_training_is_that_of_the_recommended_checkpoints(variant, magnitude, weight_decay):
    config = load_config(str(CONFIGS / f"vit_i21k.py:variant={variant}"), {})
    assert config.data.preprocess == augreg_line(magnitude)
    assert config.optimizer.weight_decay == weight_decay
    # The names of the files say both.
    name = find(f"augreg:{variant}").url_gs
    level = re.search(r"aug_(\w+)-wd_([\d.]+)", name)
    assert level
    assert float(level[2]) == weight_decay
    explicit = load_config(str(CONFIGS / f"vit_i21k.py:variant={variant},aug={level[1]}"), {})
    assert explicit == config


# Config with arguments, then steps, peak, first and last learning rate, and that of half the batch.
RATES = [
    ("vit_s16_i1k.py:epochs=90", 111_477, 1e-3, 0.0, 0.0, 1e-3),
    ("vit_s16_i1k.py:epochs=300", 371_589, 1e-3, 0.0, 0.0, 1e-3),
    ("deit.py:B", 375_342, 1e-3, 1e-6, 1e-5, 5e-4),
    ("dino.py", 250_228, 1e-3, 0.0, 1e-6, 5e-4),
    ("deit3.py:S", 500_456, 4e-3, 1e-6, 1e-5, 4e-3),
    ("deit3.py:B", 500_456, 3e-3, 1e-6, 1e-5, 3e-3),
    ("deit3.py:B,finetune=runs/deit3_b16", 50_046, 1e-5, 1e-6, 1e-5, 1e-5),
    ("vit5.py:L", 250_228, 3e-3, 1e-6, 1e-5, 3e-3),
    ("probe.py", 7038, 6.4, 0.0, 0.0, 3.2),
]


@pytest.mark.parametrize("rates", RATES, ids=[r[0] for r in RATES])
def test_rates_and_length_are_as_published(rates):
    name, steps, peak, first, last, halved = rates
    config = load_config(str(CONFIGS / name), {})
    experiment = Experiment.from_config(config, epoch_examples=EPOCH)
    schedule = experiment.optimizer.schedule
    assert experiment.total_steps == steps
    assert experiment.optimizer.peak_lr == pytest.approx(peak)
    assert float(schedule(0)) == pytest.approx(first, rel=1e-3)
    assert float(schedule(steps)) == pytest.approx(last, rel=1e-3, abs=1e-9)
    half = override_config(config.to_dict(), {"data.batch_size": config.data.batch_size // 2})
    experiment = Experiment.from_config(half, epoch_examples=EPOCH)
    assert experiment.total_steps == pytest.approx(2 * steps, abs=1)
    assert experiment.optimizer.peak_lr == pytest.approx(halved)
