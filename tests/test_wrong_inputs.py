# SPDX-License-Identifier: Apache-2.0
"""Wrong input to any command: code 2, one line that can be acted on, and nothing written."""

import json
import shlex
from pathlib import Path

import pytest

from tests.command import call
from tests.tiny import tiny_config
from tests.trained import write_images, write_model, write_towers

ROOT = Path(__file__).parent.parent
SECONDS = {"step": 1.0, "compile": 2.0, "data_wait": 0.1, "save": 0.1, "evaluation": 0.1}

FILES = {
    "empty.txt": "",
    "needs_argument.py": "def get_config(size):\n    return size\n",
    "four.txt": "a\nb\nc\nd\n",
    "fails.py": "def get_config():\n    return 1 / 0\n",
    "gives_a_number.py": "def get_config():\n    return 1\n",
    "syntax.py": "def get_config(:\n",
    "sweep.py": "def get_sweep():\n    return {'seed': [0, 1]}\n",
    "sweep_twice.py": "def get_sweep():\n    return {'seed': [0, 0]}\n",
    "sweep_number.py": "def get_sweep():\n    return 3\n",
    "sweep_scalar.py": "def get_sweep():\n    return {'seed': 1}\n",
    "sweep_name.py": "def get_sweep():\n    return [{'name': '../up', 'seed': 1}]\n",
    "sweep_key.py": "def get_sweep():\n    return {'sead': [1, 2]}\n",
    "rows.csv": "image,label\nphotos/00.png,a\n",
    "columns.csv": "picture,kind\nphotos/00.png,a\n",
    "noise.npz": "this is no archive",
    "noise.safetensors": "neither is this",
    "foreign/metrics.jsonl": "{}\n",
    "torn/config.json": '{"seed": ',
    "list/config.json": "[1, 2]",
    "nothing/here.txt": "no image",
    "huggingface/config.json": '{"architectures": ["ViTModel"], "model_type": "vit"}',
    "timm/config.json": '{"architecture": "vit_tiny_patch16_224", "num_classes": 3}',
    "phone/1.heic": "not read",
    "columns.html": "",
    "control.txt": "a cat\na\x1bb\n",
    "huge.txt": "x" * 2**20,
    "packed/pack.json": "{}",
}

TRAIN = "--config={root}/configs/digits.py --config.data.data_dir={data} --workdir=new "
SWEEP = "--config={root}/configs/digits.py --config.data.data_dir={data} --workdir=new "
PLAN = "--config={root}/configs/digits.py --num_classes=10 --image_size=16 "
MODEL = "--checkpoint=model.npz "
TOWERS = "--checkpoint=towers.npz "
GKE = "job --image=i --accelerator=tpu-v5-lite-podslice --topology=4x4 --dry_run "

# The command, its arguments, and what the line must name: the value, what was expected, the place.
CASES = {
    "__main__": [
        ("trian --config=digits", ["'trian'", "did you mean 'train'"]),
        ("runs/digits", ["'runs/digits'", "not a command", "evaluate"]),
        ("configs digit", ["digit", "did you mean 'digits'"]),
        ("configs --name=digits", ["--name=digits", "vit_jax configs --help"]),
        ("models vit_huge_of_mine", ["'vit_huge_of_mine'", "no published weights"]),
    ],
    "main": [
        ("--workdir=new", ["--config", "is missing", "--help"]),
        ("--config={root}/configs/digits.py", ["--workdir", "is missing", "--help"]),
        (TRAIN + "--wrokdir=x", ["wrokdir", "did you mean '--workdir'"]),
        ("--config=digits:small --workdir=new", ["takes no argument", "--config=digits"]),
        ("--config=needs_argument.py --workdir=new", ["needs an argument", "argument.py:ARGUMENT"]),
        (TRAIN + "--lr=0.1", ["--lr is no flag", "'--config.optimizer.lr'"]),
        (TRAIN + "--confg=digits", ["--confg is no flag", "did you mean '--config'?"]),
        (TRAIN + "--qwertz=1", ["--qwertz is no flag", "--help"]),
        (TRAIN + "--config.data.batch_size=0", ["data.batch_size=0: expected 1 or more"]),
        (
            TRAIN + "--config.weight_decay=0.1",
            ["weight_decay", "'--config.optimizer.weight_decay'"],
        ),
        (
            TRAIN + "--config.trainer.max_epochs=3",
            ["key trainer.max_epochs", "did you mean '--config.epochs'"],
        ),
        (TRAIN + "--config.max_epochs=3", ["max_epochs", "mean '--config.epochs'"]),
        (TRAIN + "--config.init_from=b16", ["'b16'", "augreg:B/16", "a .npz", "https://"]),
        (TRAIN + "lr=0.1", ["'lr=0.1' is no flag", "'--config.optimizer.lr'"]),
        (TRAIN + "stray", ["'stray'", "is no flag", "--name=value"]),
        (TRAIN + "--quiet --verbose", ["--quiet", "--verbose", "expected one"]),
        (TRAIN + "--num_processes=two", ["num_processes", "two"]),
        (TRAIN + "--config=none.py", ["--config=none.py", "there is no file"]),
        (TRAIN + "--dry_run --config.seed=-1", ["seed=-1", "expected 0"]),
        (
            TRAIN + "--dry_run --config.model.hiden_size=64",
            ["model.hiden_size", "'--config.model.hidden_size'"],
        ),
        (TRAIN + "--dry_run --config.evals.val.split=tset", ["evals.val.split='tset'", "train"]),
        (TRAIN + "--dry_run --workdir=empty.txt", ["--workdir='empty.txt'", "can't be used"]),
        (TRAIN + "--dry_run --workdir=empty.txt/new", ["--workdir='empty.txt/new'", "can't be"]),
        (TRAIN + "--dry_run --workdir=run", ["--workdir='run'", "another experiment"]),
        (TRAIN + "--dry_run --compile_cache=empty.txt", ["--compile_cache=empty.txt", "a folder"]),
        (TRAIN + "--dry_run --config.init_from=none.npz", ["init_from='none.npz'", "none.npz"]),
        (TRAIN + "--dry_run --config.init_from=model.npz", ["init_from does not fit the model"]),
        (
            "--config={root}/configs/digits_dino.py --workdir=new --dry_run "
            "--config.objective.gram_weight=1 --config.objective.gram_teacher=none.npz",
            ["objective.gram_teacher='none.npz'", "no such file"],
        ),
        (TRAIN + "--dry_run --config.data.name=digitz", ["data.name='digitz'", "'digits'"]),
        (TRAIN + "--config=fails.py", ["--config=fails.py", "ZeroDivisionError"]),
        (TRAIN + "--config=syntax.py", ["--config=syntax.py", "SyntaxError"]),
        (TRAIN + "--config=gives_a_number.py", ["--config=gives_a_number.py", "a ConfigDict"]),
        (TRAIN + "--num_processes=2", ["--num_processes=2", "expected all three"]),
        (
            TRAIN + "--coordinator=here --num_processes=2 --process_id=0",
            ["--coordinator=here", "HOST:PORT"],
        ),
        (
            TRAIN + "--coordinator=here:1 --num_processes=2 --process_id=2",
            ["--process_id=2", "--num_processes=2", "expected 0"],
        ),
        (TRAIN + "--local_device_ids=a", ["--local_device_ids=a", "0,1"]),
        (TRAIN + "--expect_devices=256", ["--expect_devices=256", "found 8 cpu"]),
        (TRAIN + "--platform=tpu", ["--platform=tpu", "found 8 cpu"]),
        (TRAIN + "--config.seed.x=1", ["seed.x", "seed=0", "has nothing below it"]),
        (TRAIN + "--config.seed=-1", ["seed=-1", "expected 0"]),
        (TRAIN + "--config.total_steps=many", ["total_steps='many'", "int"]),
        (TRAIN + "--config.total_steps=0", ["total_steps=0", "expected"]),
        (TRAIN + "--config.epochs=3", ["total_steps=4", "epochs=3", "exactly one"]),
        (TRAIN + "--config.ema_decay=1.5", ["ema_decay=1.5", "value < 1"]),
        (TRAIN + "--config.=3", ["--config.=3", "expected --config.KEY=VALUE"]),
        (TRAIN + "--config..lr=3", ["--config..lr=3", "expected --config.KEY=VALUE"]),
        (TRAIN + "--config.base_lr=0.1", ["unknown config key base_lr", "'--config.optimizer.lr'"]),
        (TRAIN + "--config.pretrained_dir=/x", ["pretrained_dir", "'--config.init_from'"]),
        (TRAIN + "--config.modle.hidden_size=64", ["modle", "'--config.model.hidden_size'"]),
        (
            TRAIN + "--config.model.hiden_size=64",
            ["model.hiden_size", "'--config.model.hidden_size'"],
        ),
        (TRAIN + "--config.model.name=vitt", ["model.name='vitt'", "'vit'"]),
        (TRAIN + "--config.model.name=[1]", ["model.name=[1]", "there is: mixer, two_towers, vit"]),
        (
            TRAIN + "--config.model.name=nowhere:make",
            ["model.name='nowhere:make'", "no module nowhere", "PYTHONPATH"],
        ),
        (TRAIN + "--config.model.name=json:lods", ["model.name='json:lods'", "'loads'"]),
        (TRAIN + "--config.objective.name=json:codecs", ["objective.name='json:codecs'", "module"]),
        (TRAIN + "--config.optimizer.name=json:dump", ["optimizer.obj (json:dump) is missing"]),
        (TRAIN + "--config.evals.val.name=nowhere:Judge", ["evals.val.name=", "no module nowhere"]),
        (TRAIN + "--config.data.name=nowhere:make:x", ["data.name='nowhere:make'", "no module"]),
        (TRAIN + "--config.data.name=huggingface:mnist", ["no module huggingface", "no TFDS"]),
        (
            TRAIN + "'--config.data.preprocess=decode|nowhere:blur(3)'",
            ["data.preprocess='nowhere:blur'", "no module nowhere"],
        ),
        (TRAIN + "--config.tracking.trackers=nowhere:T", ["tracking.trackers='nowhere:T'"]),
        (TRAIN + "--config.tracking.trackers=3", ["tracking.trackers=3 is an int; expected tuple"]),
        (TRAIN + "'--config.tracking.trackers=[3]'", ["tracking.trackers=", "expected tuple"]),
        (TRAIN + "--config.tracking=3", ["tracking=3 is an int; expected dict"]),
        (
            TRAIN + "--config.model.patch_size=3",
            ["image of 16x16", "patches of 3x3", "model.patch_size"],
        ),
        (TRAIN + "--config.model.num_heads=5", ["model.num_heads=5", "model.hidden_size=48"]),
        (
            TRAIN + "--config.model.classifier=unpooled",
            ["model.classifier='unpooled'", "'token', 'gap' or 'map'"],
        ),
        (TRAIN + "--config.model.dropout_rate=1.0", ["model.dropout_rate=1.0", "expected"]),
        (TRAIN + "--config.mesh.fsdp=3", ["mesh", "fsdp=3", "8 device"]),
        (TRAIN + "--config.mesh.pipeline=2", ["mesh.pipeline", "fsdp"]),
        (TRAIN + "--config.data.name=digitz", ["data.name='digitz'", "'digits'"]),
        (TRAIN + "--config.data.name=folder:", ["data.name='folder:'", "expected folder:PATH"]),
        (TRAIN + "--config.data.name=folder:none", ["data.name='folder:none'", "No such file"]),
        (TRAIN + "--config.data.name=folder:nothing", ["data.name='folder:nothing'", "image"]),
        (
            TRAIN + "--config.data.name=manifest:columns.csv",
            [
                "data.name='manifest:columns.csv'",
                "'picture'",
                "there is: caption, captions, depth, image",
            ],
        ),
        (TRAIN + "--config.data.name=packed:packed", ["data.name='packed:packed'", "pack.json"]),
        (TRAIN + "--config.data.split=trian", ["data.split='trian'", "train, test"]),
        (TRAIN + "--config.data.split=train[:0]", ["data.split='train[:0]'", "no examples"]),
        (TRAIN + "--config.data.batch_size=12", ["data.batch_size=12", "divisible by 8"]),
        (
            TRAIN + "'--config.data.preprocess=decode|resise(8)'",
            ["data.preprocess", "'resise'", "'resize'"],
        ),
        (TRAIN + "'--config.data.preprocess=decode|resize(-1)'", ["data.preprocess", "-1"]),
        (
            TRAIN + "'--config.data.preprocess=decode|resize(20000)'",
            ["data.preprocess: 'resize(20000)'", "20000x20000 pixels", "134,217,728"],
        ),
        (TRAIN + "--config.optimizer.name=adamv", ["optimizer.name='adamv'", "did you mean 'adam"]),
        (
            TRAIN + "--config.optimizer.schedule=cosin",
            ["optimizer.schedule='cosin'", "'cosine'", "'rsqrt'"],
        ),
        (
            TRAIN + "--config.optimizer.warmup_percent=5",
            ["optimizer.warmup_steps=200", "optimizer.warmup_percent=5", "exactly one"],
        ),
        (
            TRAIN + "--config.optimizer.accum_steps=3",
            ["optimizer.accum_steps=3", "data.batch_size=64"],
        ),
        (
            TRAIN + "\"--config.optimizer.weight_decay_params=('kernels',)\"",
            ["optimizer.weight_decay_params", "'kernels'", "/kernel"],
        ),
        (
            TRAIN + "\"--config.optimizer.freeze=('hed/.*',)\"",
            ["optimizer.freeze", "'hed/.*'", "head/kernel"],
        ),
        (
            TRAIN + "\"--config.optimizer.lr_multipliers=('head/.*', 10.0)\"",
            ["optimizer.lr_multipliers=", "tuple[tuple[str, float], ...]"],
        ),
        (
            TRAIN + "--config.checkpoint.keep_best=best/top1",
            ["checkpoint.keep_best='best/top1'", "test/ece", "val/top1"],
        ),
        (
            TRAIN + "--config.evals.test.every=2 --config.evals.test.every_epochs=1",
            ["evals.test.every=2", "evals.test.every_epochs=1", "exactly one"],
        ),
        (
            TRAIN + "--config.evals.train.split=test --config.evals.train.preprocess=decode",
            ["evals.train", "name of metrics"],
        ),
        (
            TRAIN + "--config.tracking.trackers=paper",
            ["tracking.trackers", "'paper'", "wandb"],
        ),
        (TRAIN + "--config.on_divergence=pray", ["on_divergence='pray'", "rollback"]),
        (TRAIN + "--config.watchdog.step=-1", ["watchdog.step=-1", "expected"]),
        (TRAIN + "--config.resume.allow=sead", ["resume.allow", "'sead'", "'seed'"]),
        (TRAIN + "--config.init_from=none.npz", ["init_from='none.npz': there is no such file"]),
        (TRAIN + "--config.init_from=augreg:C/16", ["init_from='augreg:C/16'", "not published"]),
        (TRAIN + "--config.init_from=noise.npz", ["init_from='noise.npz'", "zip archive"]),
        (TRAIN + "--config.init_from=model.npz", ["init_from does not fit the model"]),
        (
            TRAIN + "--config.objective.name=distillation --config.objective.teacher=none.npz",
            ["objective.teacher='none.npz': there is no such file"],
        ),
        (
            TRAIN + "--config.objective.name=distillation --config.objective.teacher=noise.npz",
            ["objective.teacher='noise.npz': ", "zip archive"],
        ),
        (TRAIN + "--workdir=gs://bucket", ["--workdir='gs://bucket'", "gs://BUCKET/PATH"]),
        (TRAIN + "--workdir=gs:/bucket/run", ["--workdir='gs:/bucket/run'", "gs://BUCKET/PATH"]),
        (TRAIN + "--dry_run --workdir=az://b/run", ["--workdir='az://b/run'", "s3://BUCKET/PATH"]),
        (TRAIN + "--workdir=empty.txt", ["--workdir='empty.txt'", "can't be used"]),
        (TRAIN + "--workdir=/proc/none", ["--workdir='/proc/none'", "can't be used"]),
        (TRAIN + "--workdir=torn", ["--workdir='torn'", "can't be read"]),
        (TRAIN + "--workdir=foreign", ["--workdir='foreign'", "config.json", "choose another"]),
        (TRAIN + "--workdir=run", ["--workdir='run'", "another experiment", "model."]),
    ],
    "predict": [
        (MODEL, ["PATHS are missing", "expected images"]),
        ("photos", ["--workdir, --checkpoint and --init_from", "expected one"]),
        (MODEL + "--workdir=run photos", ["--workdir=run", "--checkpoint=model.npz", "one of"]),
        (MODEL + "none", ["none", "no such file"]),
        (MODEL + "nothing", ["nothing", "image", "left out: 1 .txt"]),
        (MODEL + "phone", ["'phone'", "expected files as .jpg", "left out: 1 .heic"]),
        (MODEL + "photos https://x.org/1.png", ["'https://x.org/1.png'", "gs:// or s3://"]),
        (MODEL + "--top_k=0 photos", ["--top_k=0", "at least 1"]),
        (MODEL + "--batch-size=3 photos", ["--batch-size=3", "did you mean '--batch_size'"]),
        (MODEL + "--batch_size=-3 photos", ["--batch_size=-3", "at least 1"]),
        (MODEL + "--top_k=five photos", ["--top_k", "'five'", "int"]),
        (MODEL + "--layer=head photos", ["--layer=head", "--embed"]),
        (MODEL + "--format=xml photos", ["--format", "'xml'", "csv"]),
        (MODEL + "--output=out.xml photos", ["--output=out.xml", "csv"]),
        (MODEL + "--output=empty.txt photos", ["--output=empty.txt", "exists"]),
        (MODEL + "--output=gs://b/x.csv photos", ["--output", "'gs://b/x.csv'", "on this machine"]),
        (MODEL + "--embed photos", ["--output is missing", "features.npz"]),
        (MODEL + "--embed --layer=hed --output=f.npz photos", ["layer='hed'", "pre_logits"]),
        (MODEL + "--depth=new photos", ["--depth=new", "the depth of each pixel", "'depth'"]),
        (MODEL + "--window=4 photos", ["window=4", "neither the class nor the depth"]),
        (MODEL + "--window=0 photos", ["--window=0", "side of a window in pixels"]),
        (MODEL + "--window=8 --stride=0 photos", ["--stride=0", "1 to window=8"]),
        (MODEL + "--stride=4 photos", ["--stride=4", "--window"]),
        (MODEL + "--labels=none.txt photos", ["--labels=none.txt", "can't be read"]),
        (MODEL + "--labels=four.txt photos", ["4 class names", "has 3 classes", "--labels"]),
        (
            MODEL + "--labels=empty.txt photos",
            ["--labels=empty.txt", "is empty", "class name a line"],
        ),
        (MODEL + "--config.data.split=x photos", ["--config.data.split=x", "--config.model.KEY"]),
        (
            MODEL + "--config.model.hiden_size=3 photos",
            ["model.hiden_size", "'--config.model.hidden_size'"],
        ),
        ("--checkpoint=noise.npz photos", ["noise.npz"]),
        ("--checkpoint=noise.safetensors photos", ["noise.safetensors", "safetensors file"]),
        ("--checkpoint=4 photos", ["--checkpoint=4", "expected --workdir"]),
        (MODEL + "'--labels=a cat,a dog' photos", ["--labels=a cat", "no text tower", "a file"]),
        (MODEL + "--templates=photo photos", ["--templates=photo", "no text tower", "leave it"]),
        (MODEL + "--tokenizer=bytes() photos", ["tokenizer='bytes()'", "no text tower"]),
        (TOWERS + "photos", ["towers.npz", "no classes of its own", "--labels='a cat,a dog'"]),
        (TOWERS + "--labels= photos", ["--labels: text 1 is empty", "expected a text"]),
        (TOWERS + "--labels=a,,b photos", ["--labels: text 2 is empty", "expected a text"]),
        (TOWERS + "--labels=none.txt photos", ["--labels=none.txt can't be read"]),
        (TOWERS + "--labels=no/ne photos", ["--labels=no/ne can't be read"]),
        (TOWERS + "--labels=a,b.txt photos", ["--labels=a,b.txt can't be read"]),
        (TOWERS + "--labels=photos photos", ["--labels=photos", "is a folder"]),
        (TOWERS + "--labels=empty.txt photos", ["--labels=empty.txt is empty"]),
        (TOWERS + "--labels=control.txt photos", ["--labels: text 2, 'a\\x1bb'", "control"]),
        (TOWERS + "--labels=huge.txt photos", ["--labels=huge.txt: line 1", "1,000 characters"]),
        (TOWERS + "--text=a", ["--text: expected --embed"]),
        (TOWERS + "--embed --text=a", ["--output is missing"]),
        (TOWERS + "--embed --text=a --output=t.npz photos", ["--text and 'photos'", "of its own"]),
        (TOWERS + "--embed --text= --output=t.npz", ["--text is empty: expected a text"]),
        (TOWERS + "--embed --texts=none --output=t.npz", ["--texts=none can't be read"]),
        (TOWERS + "--embed --texts=empty.txt --output=t.npz", ["--texts=empty.txt is empty"]),
        (TOWERS + "--embed --texts=control.txt --output=t.npz", ["control.txt: line 2", "control"]),
        (TOWERS + "--embed --text=a --tta=flip --output=t.npz", ["--tta=flip is for images"]),
        (TOWERS + "--embed --labels=a,b --output=t.npz photos", ["--labels", "--texts"]),
        (MODEL + "--embed --text=a --output=t.npz", ["model.npz", "no text tower"]),
        ("--workdir=none photos", ["--workdir=none", "is no folder", "it does not exist"]),
        ("--workdir=run --checkpoint=5 photos", ["--checkpoint=5", "--workdir=run", "4"]),
        ("--init_from=augreg:B/17 photos", ["augreg:B/17", "B/16"]),
        (
            "none photos",
            ["--workdir, --checkpoint and --init_from", "(or WORKDIR)"],
        ),
        ("run", ["PATHS are missing", "after run"]),
        ("run photos --checkpoint=5", ["--checkpoint=5", "--workdir=run", "4"]),
        (MODEL + "none photos", ["none", "no such file"]),
    ],
    "average": [
        ("run --output=mean.npz", ["1 weights are given (run)", "expected two or more"]),
        ("run run", ["--output is missing"]),
        ("run run --output=mean.pth", ["--output=mean.pth", ".npz or .safetensors"]),
        ("run run --output=noise.npz", ["--output=noise.npz", "exists"]),
        ("run run --output=none/m.npz", ["--output=none/m.npz", "folder none does not exist"]),
        ("run run --output=mean.npz --method=gredy", ["--method=gredy", "'greedy'"]),
        (
            "run run run --output=mean.npz --method=interpolate",
            ["3 weights are given", "expected two"],
        ),
        ("run run --output=mean.npz --alphas=0.5", ["--alphas=0.5", "--method=interpolate"]),
        (
            "run run --output=mean.npz --method=interpolate --alphas=0,2",
            ["--alphas=0,2", "from 0 to 1"],
        ),
        ("model.npz none.npz --output=mean.npz", ["none.npz", "no such file"]),
        (
            "model.npz model.npz --output=mean.npz --method=greedy",
            ["--method=greedy", "expected --config"],
        ),
    ],
    "find_lr": [
        ("--output=seen", ["--config is missing"]),
        ("--config={root}/configs/digits.py", ["--output is missing: expected a new folder"]),
        ("--config=none.py --output=seen", ["--config=none.py", "there is no file"]),
        ("--config={root}/configs/digits.py --output=empty.txt", ["--output=empty.txt", "exists"]),
        (
            "--config={root}/configs/digits.py --config.data.data_dir={data} --output=seen "
            "--steps=1",
            ["steps=1", "at least 10"],
        ),
    ],
    "suggest": [
        ("", ["DATA", "required", "--help"]),
        ("photos", ["DATA='photos'", "folder:PATH"]),
        ("folder:none", ["folder:none", "can't be read"]),
        (
            "folder:photos --init_from=augreg:S/61",
            ["--init_from=augreg:S/61", "did you mean 'augreg:S/16'"],
        ),
        (
            "folder:photos --init_from=mixer-sam:B/16",
            ["mixer-sam:B/16 is a mixer", "Vision Transformer"],
        ),
        ("folder:photos --memory_gb=0", ["--memory_gb=0", "more than 0"]),
    ],
    "search": [
        (TOWERS, ["PATHS TEXT", "required", "--help"]),
        (TOWERS + "photos", ["the last argument, 'photos', is a file or folder", "--image=FILE"]),
        (TOWERS + "dogs", ["PATHS are missing", "expected images"]),
        (TOWERS + "none dogs", ["'none'", "no such file"]),
        ("photos dogs", ["--workdir, --checkpoint and --init_from", "expected one"]),
        (TOWERS + "photos ''", ["TEXT is empty", "expected a text"]),
        (TOWERS + "photos 'twenty-five dogs on a beach'", ["TEXT: 'twenty", "24 that the model"]),
        (TOWERS + "--top_k=0 photos dogs", ["--top_k=0", "at least 1"]),
        (TOWERS + "--output=columns.html photos dogs", ["--output=columns.html", "exists"]),
        (TOWERS + "--output=found.png photos dogs", ["--output=found.png", "found.html"]),
        (TOWERS + "--output=f.html --top_k=501 photos dogs", ["--top_k=501", "at most 500"]),
        (TOWERS + "--image=none.png photos", ["none.png", "No such file"]),
        (TOWERS + "--image=noise.npz photos", ["noise.npz", "not a readable image"]),
        (MODEL + "photos dogs", ["model.npz", "no text tower"]),
    ],
    "explain": [
        (MODEL + "photos", ["--output is missing", "a folder"]),
        (MODEL + "--output=s3://b/x photos", ["--output", "'s3://b/x'", "on this machine"]),
        (MODEL + "--output=empty.txt photos", ["--output=empty.txt", "exists"]),
        (MODEL + "--output=seen -", ["IMAGES", "vit_jax.predict"]),
        (TOWERS + "--output=seen --labels=a,b photos", ["--labels=a,b", "takes no texts"]),
        (MODEL + "--output=seen --figures=rolout photos", ["--figures", "'rolout'", "'rollout'"]),
        (MODEL + "--output=seen none", ["none", "no such file"]),
        (MODEL + "--output=seen many", ["65 images", "at most 64"]),
        (MODEL + "--output=empty.txt/seen photos", ["--output=empty.txt/seen", "can't be written"]),
    ],
    "evaluate": [
        ("", ["--workdir", "--config", "are missing"]),
        ("--config={root}/configs/digits.py", ["--checkpoint", "--init_from", "are missing"]),
        ("--workdir=run --init_from=a --checkpoint=b", ["--init_from=a", "--checkpoint=b", "one"]),
        ("--workdir=photos", ["'photos'", "expected the workdir of a run", "photos holds 00.png"]),
        ("--workdir=run --batch_size=3", ["--batch_size", "'--config.data.batch_size'"]),
        ("--workdir=run --follow --checkpoint=4", ["--follow", "no --checkpoint"]),
        ("--workdir=none", ["none", "--workdir"]),
        ("run --keep_temperature --follow", ["--keep_temperature", "no --init_from or --follow"]),
        ("run --keep_temperature", ["--keep_temperature: 0 evaluators", "name=trust"]),
        ("none", ["none", "--workdir"]),
        ("run --config=none.py", ["--config=none.py", "there is no file"]),
        ("--workdir=run --checkpoint=5", ["--checkpoint=5", "--workdir=run", "4"]),
        ("--workdir=run --checkpoint=best", ["--checkpoint=best", "keep_best"]),
        ("--workdir=run --timeout=soon", ["--timeout", "'soon'", "float"]),
        ("--workdir=run --init_from=x --config.evals=none", ["evals is empty"]),
        (
            "--workdir=run --init_from=x --config.evals.val.split=tset",
            ["evals.val.split='tset'", "train, test"],
        ),
    ],
    "convert": [
        ("", ["SRC", "required", "--help"]),
        ("--workdir=none", ["--workdir=none", "is no folder", "does not exist"]),
        ("run model.npz --workdir=run", ["SRC=run", "--workdir=run", "expected one"]),
        ("run gs://b/x.npz", ["DST", "'gs://b/x.npz'", "on this machine"]),
        ("--workdir=run gs://b/x.npz", ["DST", "'gs://b/x.npz'", "on this machine"]),
        ("none.npz", ["none.npz"]),
        ("noise.npz", ["noise.npz"]),
        ("--out=x", ["unrecognized arguments: --out=x"]),
        ("photos/00.png", ["photos/00.png: an image (PNG), not weights", "expected a workdir"]),
        ("four.txt", ["four.txt: a text file, not weights"]),
        ("empty.txt", ["empty.txt: an empty file, not weights"]),
        ("photos", ["'photos' has no checkpoint", "photos holds 00.png"]),
        ("runn", ["runn: there is no such file or folder", "did you mean 'run'"]),
        ("huggingface", ["'huggingface' has no checkpoint"]),
        ("model.npz model.pth", ["DST=model.pth", ".npz or .safetensors"]),
        ("model.npz model.npz", ["DST=model.npz", "exists"]),
        ("model.npz none/new.npz", ["DST=none/new.npz", "folder none does not exist"]),
        ("model.npz --params=ema", ["--params=ema", "model.npz is no run"]),
        ("model.npz --params=mean", ["--params", "'mean'", "ema"]),
    ],
    "export.__main__": [
        (
            MODEL + "--to=stablehlo --output=new --quantize=int4",
            ["--quantize=int4", "expected int8 or int8_dynamic"],
        ),
        (
            MODEL + "--to=npz --output=new --quantize=int8",
            ["--quantize=int8", "npz is written as float", "--to=stablehlo,onnx"],
        ),
        (
            MODEL + "--to=stablehlo --output=new --data=digits",
            ["--data=digits", "expected --quantize"],
        ),
        (
            MODEL + "--to=stablehlo --output=new --quantize=int8 --split=val",
            ["--split=val", "no run with data", "--data"],
        ),
        (
            MODEL + "--to=stablehlo --output=new --quantize=int8 --data=folder:none",
            ["folder:none'", "can't be read"],
        ),
        (MODEL + "--output=out", ["--to is missing", "--help"]),
        (MODEL + "--to=npz", ["--output is missing", "--help"]),
        (MODEL + "--to=npy --output=out", ["--to=npy", "'npz'"]),
        (MODEL + "--to=npz --output=out.npz", ["--output=out.npz", "a folder"]),
        (MODEL + "--to=npz --output=photos", ["--output=photos", "exists"]),
        (MODEL + "--to=npz --output=out --layer=head", ["--layer=head", "--to=npz"]),
        (MODEL + "--to=stablehlo --output=out --layer=hed", ["layer='hed'", "pre_logits"]),
        (MODEL + "--to=npz --output=out --push=name", ["--push=name", "USER/NAME"]),
        (MODEL + "--to=npz --output=out --yes", ["--yes", "--push=USER/NAME"]),
        (
            MODEL + "--to=savedmodel --output=out --tf_python=none",
            ["--tf_python=none", "TensorFlow"],
        ),
    ],
    "serve.__main__": [
        (MODEL + "--port=70000", ["--port=70000", "65535"]),
        (MODEL + "--port=http", ["--port", "'http'", "int"]),
        (MODEL + "--max_mib=0", ["--max_mib=0", "more than 0"]),
        (MODEL + "--port=0 --host=256.0.0.1", ["--host=256.0.0.1", "can't be used"]),
        ("--port=0", ["--workdir, --checkpoint and --init_from", "expected one"]),
        ("--port=0 --checkpoint=none.npz", ["none.npz"]),
        ("none", ["--workdir=none", "is no folder", "does not exist"]),
        ("run --workdir=none", ["run and none", "expected one"]),
    ],
    "plan": [
        (PLAN, ["--topology", "required", "--help"]),
        ("--topolgy=cpu:8", ["--topolgy=cpu:8", "did you mean '--topology'"]),
        (PLAN + "--topology=cpu:1000000", ["1,000,000 devices", "at most 1,024"]),
        (PLAN + "--topology=h100:100000", ["100,000 devices", "at most 65,536"]),
        (PLAN + "--topology=h200:2x2", ["'h200:2x2'", "devices of a host, as in h200:4"]),
        (PLAN + "--topology=h100:8 --num_slices=10000", ["--num_slices=10000", "80,000 devices"]),
        (PLAN + "--topology=v9:2x2", ["--topology='v9:2x2'", "v5e"]),
        (PLAN + "--topology=v5e:four", ["--topology='v5e:four'", "v5e:4x4"]),
        (PLAN + "--topology=cpu:8 --num_slices=0", ["--num_slices=0", "at least 1"]),
        (PLAN + "--topology=cpu:8 --search --scale=8", ["--search", "--scale", "one of them"]),
        (PLAN + "--topology=cpu:8 --scale=8", ["--topology='cpu:8'", "TPU or a GPU"]),
        (PLAN + "--topology=h100:8 --scale=8,x", ["--scale", "'8,x'"]),
        (PLAN + "--topology=cpu:8 --jobs=0", ["--jobs", "at least 1"]),
        (
            "--config={root}/configs/digits.py --image_size=16 --topology=cpu:8",
            ["--image_size=16", "--num_classes"],
        ),
        (PLAN + "--topology=cpu:8 --num_classes=0", ["--num_classes=0", "at least 1"]),
        (PLAN + "--topology=cpu:8 --config.mesh.fsdp=3", ["fsdp=3", "8 device"]),
        (PLAN + "--topology=cpu:512", ["--topology='cpu:512'", "8 CPU", "XLA_FLAGS"]),
    ],
    "status": [
        ("", ["--workdir", "required", "--help"]),
        ("run --workdir=photos", ["run and photos", "expected one"]),
        ("--workdir=none", ["'none'", "ledger.jsonl"]),
        ("none", ["'none'", "ledger.jsonl"]),
        ("gs:/bucket/run", ["'gs:/bucket/run'", "gs://BUCKET/PATH"]),
        ("photos", ["'photos'", "expected the workdir of a run"]),
        ("run/checkpoints", ["within a workdir", "did you mean 'run'"]),
        ("run --jsn", ["--jsn", "--help"]),
        ("--jsn", ["unrecognized arguments: --jsn", "did you mean '--json'"]),
    ],
    "report": [
        ("", ["--workdir", "required", "--help"]),
        ("--workdir=none", ["--workdir='none'", "config.json"]),
        ("--workdir=torn", ["--workdir='torn'", "can't be read"]),
        ("--workdir=list", ["--workdir='list'", "holds no whole config"]),
        (
            "--workdir=huggingface",
            ["is the config of a Hugging Face model, vit", "--config.init_from=huggingface"],
        ),
        ("--workdir=timm", ["is the config of a timm model, vit_tiny_patch16_224"]),
        ("--workdir=run --pictures=0", ["--pictures=0", "at least 1"]),
        ("--workdir=run --checkpoint=5", ["--checkpoint=5", "--workdir=run", "4"]),
        (
            "--workdir=run --no_predict --output=empty.txt/page.html",
            ["--output=empty.txt/page.html", "can't be written"],
        ),
    ],
    "compare": [
        ("", ["WORKDIR", "required", "--help"]),
        ("run --workdir=none", ["'none'", "config.json"]),
        ("run none", ["'none'", "config.json"]),
        (".", ["'.'", "holds the workdir of a run", "did you mean 'run'"]),
        ("run/config.json", ["within a workdir", "did you mean 'run'"]),
        ("run run", ["run is given twice", "each run once"]),
        ("run --format=xml", ["--format", "'xml'", "csv"]),
        ("run --output=empty.txt", ["--output=empty.txt", "exists"]),
        ("run --output=empty.txt/all", ["--output=empty.txt/all", "can't be written"]),
        ("run --output=empty.txt/all.csv", ["--output=empty.txt/all.csv", "can't be written"]),
    ],
    "sweep": [
        (SWEEP, ["--sweep", "required", "--help"]),
        (
            "--config={root}/configs/digits.py --sweep=seed=0,1 --workdir=gs://b/x",
            ["--workdir", "'gs://b/x'", "on this machine"],
        ),
        ("--config={root}/configs/digits.py --sweep=seed=0,1", ["WORKDIR", "required"]),
        (SWEEP + "other --sweep=seed=0,1", ["workdirs", "other", "new", "expected one"]),
        (SWEEP + "--sweep=none.py", ["--sweep=none.py", "no such file"]),
        (SWEEP + "--sweep=sweep_kee.py", ["no such file", "did you mean 'sweep_key.py'"]),
        (SWEEP + "--sweep=lr=1,2", ["lr=1: unknown config key", "'--config.optimizer.lr'"]),
        (SWEEP + "--sweep=seed=0,1,data.split=a", ["'data.split=a'", "expected ; before it"]),
        (SWEEP + "--sweep=fails.py", ["--sweep=fails.py", "get_sweep"]),
        (SWEEP + "--sweep=sweep_number.py", ["--sweep=sweep_number.py", "gives 3", "dict of"]),
        (SWEEP + "--sweep=sweep_scalar.py", ["sweep_scalar.py", "'seed': 1", "list of values"]),
        (SWEEP + "--sweep=sweep_twice.py", ["sweep_twice.py", "'seed=0'", "each once"]),
        (SWEEP + "--sweep=sweep_name.py", ["sweep_name.py", "'../up'", "letters, digits"]),
        (SWEEP + "--sweep=sweep_key.py", ["sead", "'--config.seed'"]),
        (SWEEP + "--sweep=sweep.py --emit=gke --summarize", ["--emit=gke", "--summarize"]),
        (SWEEP + "--sweep=sweep.py --launch_args=x", ["--launch_args=x", "--emit=slurm"]),
        (
            SWEEP.replace("--workdir=new", "--sweep=sweep.py --workdir=run"),
            ["--workdir=run", "of a run", "such as 'sweep'"],
        ),
        (SWEEP + "--sweep=init_from=none.npz", ["init_from=none.npz: init_from='none.npz': there"]),
        (SWEEP + "--sweep=sweep.py --emit=sge", ["--emit", "'sge'", "slurm"]),
        (
            SWEEP.replace("--workdir=new", "--sweep=sweep.py --workdir=empty.txt"),
            ["--workdir=empty.txt", "can't be"],
        ),
    ],
    "benchmark.__main__": [
        ("", ["PART", "required", "--help"]),
        ("speed", ["'speed'", "loop", "--help"]),
        ("input", ["--source", "required", "--help"]),
        ("input --source=folder:photos --seconds=0", ["--seconds=0", "more than 0"]),
        ("input --source=folder:none", ["data.name='folder:none'", "No such file"]),
        ("input --source=folder:photos --config.seed=1", ["--config.seed", "no config"]),
        ("step --config=none.py", ["--config=none.py", "there is no file"]),
        ("loop --config={root}/configs/digits.py --rounds=0", ["--rounds=0", "more than 0"]),
        ("startup --config={root}/configs/digits.py --rounds=0", ["--rounds=0", "at least 1"]),
        ("checkpoint --config={root}/configs/digits.py --saves=0", ["--saves=0", "at least"]),
        (
            "checkpoint --config={root}/configs/digits.py --folder=none",
            ["--folder=none", "a folder"],
        ),
    ],
    "data.prepare": [
        ("", ["NAME", "required", "--help"]),
        ("digitz --data_dir=new", ["'digitz'", "'digits'"]),
        ("folder:none", ["data.name='folder:none'", "No such file"]),
        ("hf:./none", ["data.name='hf:./none'", "there is no folder"]),
    ],
    "data.pack": [
        ("folder:photos", ["DST", "required", "--help"]),
        ("folder:photos new --quality=101", ["--quality=101", "1 to 100"]),
        ("folder:photos new --short_side=0", ["--short_side=0", "at least 1"]),
        ("folder:none new", ["data.name='folder:none'", "No such file"]),
        ("digitz new --data_dir=other", ["'digitz'", "'digits'"]),
        ("manifest:rows.csv packed", ["DST=", "pack.json"]),
        ("manifest:rows.csv empty.txt", ["DST=", "empty.txt", "can't be written"]),
        ("manifest:rows.csv new --part=64/64", ["--part=64/64", "0/64 to 63/64"]),
        ("manifest:rows.csv new --part=one", ["--part='one'", "NUMBER/COUNT"]),
        ("manifest:rows.csv new --part=0/2 --join", ["--join", "not allowed with"]),
        ("manifest:rows.csv new --join", ["DST=", "new", "does not exist"]),
        ("manifest:rows.csv s3://bucket", ["DST='s3://bucket'", "s3://BUCKET/PATH"]),
    ],
    "data.check": [
        ("", ["SRC", "required", "--help"]),
        ("folder:none", ["data.name='folder:none'", "No such file"]),
        ("manifest:rows.csv --num_threads=0", ["--num_threads=0", "at least 1"]),
        ("manifest:rows.csv --preprocess=decode|crop", ["--preprocess", "'crop'", "crop"]),
        ("manifest:rows.csv --split=tset", ["--split='tset'", "train (1)"]),
        ("manifest:rows.csv --output=empty.txt", ["--output=empty.txt"]),
        ("manifest:rows.csv --config=none.py", ["--config=none.py", "there is no file"]),
        ("manifest:rows.csv --judge=knn", ["--judge=knn", "expected --model"]),
        (
            "manifest:rows.csv --model=model.npz --judge=knn",
            ["--judge=knn", "expected classifier or neighbours"],
        ),
        (
            "manifest:rows.csv --model=model.npz --min_cosine=1.5",
            ["--min_cosine=1.5", "at most 1"],
        ),
        ("manifest:rows.csv --model=none.npz", ["none.npz"]),
    ],
    "launch.local": [
        ("-- --config=c", ["--num_processes", "required", "--help"]),
        ("-n 0 -- --config=c", ["-n 0", "at least 1"]),
        ("-n two -- --config=c", ["--num_processes", "'two'", "int"]),
        ("-n 2", ["train", "required", "--help"]),
        ("-n 2 --max_runs=0 -- --config=c", ["--max_runs=0", "at least 1"]),
    ],
    "launch.gke": [
        (GKE, ["train", "required", "--help"]),
        ("Job" + GKE[3:] + "-- --config=c", ["'Job'", "a-z, 0-9 and -"]),
        (GKE + "--topology=four -- --config=c", ["--topology=four", "4x4"]),
        (GKE + "--accelerator=nvidia-l4 -- --config=c", ["--topology=4x4", "--nodes"]),
        (GKE + "--num_slices=0 -- --config=c", ["--num_slices=0", "at least 1"]),
        (GKE + "--max_restarts=-1 -- --config=c", ["--max_restarts=-1", "at least 0"]),
    ],
}
TABLE = [(command, *case) for command, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def place(tmp_path_factory, data_dir):
    """A folder with a little of all: a run, weights, images, and files that are none of them."""
    folder = tmp_path_factory.mktemp("place")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    write_images(folder / "photos", 2)
    write_images(folder / "many", 65, size=1)
    write_model(folder / "model.npz")
    write_towers(folder / "towers.npz")
    (folder / "run" / "checkpoints" / "4" / "params").mkdir(parents=True)
    (folder / "run" / "config.json").write_text(tiny_config(data_dir).to_json())
    start = {"event": "start", "time": 1.0, "step": 0, "total": 8, "seconds": SECONDS}
    (folder / "run" / "ledger.jsonl").write_text(json.dumps(start) + "\n")
    return folder


def snapshot(folder):
    """All of it: files with their content and time, folders, links."""
    return {
        path.relative_to(folder): (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


def split(line, data_dir):
    """The arguments in a line, of which the two folders may have a space in their paths."""
    return [word.format(root=ROOT, data=data_dir) for word in shlex.split(line)]


@pytest.mark.parametrize(
    ("command", "line", "words"), TABLE, ids=[f"{command} {line}" for command, line, _ in TABLE]
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    command, line, words, place, data_dir, monkeypatch, capsys
):
    monkeypatch.chdir(place)
    before = snapshot(place)
    code = call(command, split(line, data_dir), monkeypatch)
    shown = capsys.readouterr()
    errors = shown.err.splitlines()
    assert code == 2, errors
    assert [text.startswith("vit_jax: error: ") for text in errors] == [True], shown
    for word in words:
        assert word in errors[0]
    assert "Traceback" not in shown.out
    # What can be refused before minutes of work is not refused after them.
    assert "compiling" not in shown.out
    assert snapshot(place) == before


def test_every_command_is_in_the_table():
    package = ROOT / "vit_jax"
    commands = {
        ".".join(path.relative_to(package).with_suffix("").parts)
        for path in package.rglob("*.py")
        if 'if __name__ == "__main__":\n    run' in path.read_text()
    }
    assert commands == set(CASES)
