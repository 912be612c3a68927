# SPDX-License-Identifier: Apache-2.0
"""The command: overrides, and one clear line for bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver

from vit_jax import main as main_module
from vit_jax.main import load_config, parse_overrides
from vit_jax.models.variants import make_vit
from vit_jax.observe import trackers
from vit_jax.train import train
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import bind

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "configs" / "digits.py"


def run_main(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "vit_jax.main", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """Workdir of two steps of digits.py."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    overrides = {"total_steps": 2, "optimizer.warmup_steps": 0, "data.data_dir": data_dir}
    train(load_config(str(DIGITS), overrides), str(workdir), command="train")
    return workdir


# What is wrong, and what the line must name: the value, what was expected, the config key.
BAD_INPUT = {
    "unknown key": (["--config.model.hiden_size=64"], ["model.hiden_size", "'hidden_size'"]),
    "unknown section": (["--config.modle.hidden_size=64"], ["modle", "'model'"]),
    "unknown model": (["--config.model.name=vitt"], ["model.name='vitt'", "'vit'"]),
    "unknown dataset": (["--config.data.name=digitz"], ["data.name='digitz'", "'digits'"]),
    "unknown split": (["--config.data.split=trian"], ["data.split='trian'", "train, test"]),
    "unknown operation": (
        ["--config.data.preprocess=decode|resise(8)"],
        ["data.preprocess", "'resise'", "'resize'"],
    ),
    "wrong type": (["--config.total_steps=many"], ["total_steps='many'", "int"]),
    "batch and devices": (
        ["--config.data.batch_size=12"],
        ["data.batch_size=12", "divisible by 8"],
    ),
    "mesh and devices": (["--config.mesh.fsdp=3"], ["mesh", "fsdp=3", "8 device"]),
    "image and patch": (
        ["--config.model.patch_size=3"],
        ["image of 16x16", "patches of 3x3", "model.patch_size"],
    ),
    "heads and width": (
        ["--config.model.num_heads=5"],
        ["model.num_heads=5", "model.hidden_size=48"],
    ),
    "tokens and labels": (
        ["--config.model.classifier=unpooled"],
        ["model.classifier='unpooled'", "'token', 'gap' or 'map'"],
    ),
    "average": (["--config.ema_decay=1.5"], ["ema_decay=1.5", "value < 1"]),
    "micro-batches": (
        ["--config.optimizer.accum_steps=3"],
        ["optimizer.accum_steps=3", "data.batch_size=64"],
    ),
    "best of nothing": (
        ["--config.checkpoint.keep_best=best/top1"],
        ["checkpoint.keep_best='best/top1'", "test/ece", "val/top1"],
    ),
    "steps and epochs": (["--config.epochs=3"], ["total_steps=4", "epochs=3", "exactly one"]),
    "two cadences": (
        ["--config.evals.test.every=2", "--config.evals.test.every_epochs=1"],
        ["evals.test.every=2", "evals.test.every_epochs=1", "exactly one"],
    ),
    "two warmups": (
        ["--config.optimizer.warmup_percent=5"],
        ["optimizer.warmup_steps=200", "optimizer.warmup_percent=5", "exactly one"],
    ),
    "unknown schedule": (
        ["--config.optimizer.schedule=cosin"],
        ["optimizer.schedule='cosin'", "'cosine'", "'rsqrt'"],
    ),
    "unknown optimizer": (
        ["--config.optimizer.name=adamv"],
        ["optimizer.name='adamv'", "did you mean 'adam"],
    ),
    "decay that matches nothing": (
        ["--config.optimizer.weight_decay_params=('kernels',)"],
        ["optimizer.weight_decay_params", "'kernels'", "/kernel"],
    ),
    "old learning rate": (["--config.base_lr=0.1"], ["config.base_lr", "config.optimizer.lr"]),
    "old checkpoint": (
        ["--config.pretrained_dir=/tmp"],
        ["config.pretrained_dir", "config.init_from"],
    ),
    "rule that matches nothing": (
        ["--config.optimizer.freeze=('hed/.*',)"],
        ["optimizer.freeze", "'hed/.*'", "head/kernel"],
    ),
    "rule that is no pair": (
        ["--config.optimizer.lr_multipliers=('head/.*', 10.0)"],
        ["optimizer.lr_multipliers=", "tuple[tuple[str, float], ...]"],
    ),
    "negative seed": (["--config.seed=-1"], ["seed=-1", "expected 0"]),
    "name of a name": (["--config.model.name=[1]"], ["model.name=[1]"]),
    "share of everything": (["--config.model.dropout_rate=1.0"], ["model.dropout_rate=1.0"]),
    "taken name": (
        ["--config.evals.train.split=test", "--config.evals.train.preprocess=decode"],
        ["evals.train", "name of metrics"],
    ),
    "half a job": (["--num_processes=2"], ["--coordinator=None", "--num_processes=2"]),
    "fewer devices": (["--expect_devices=256"], ["--expect_devices=256", "found 8 cpu"]),
    "other devices": (["--platform=tpu"], ["--platform=tpu", "found 8 cpu"]),
    "no device numbers": (["--local_device_ids=a"], ["--local_device_ids=a", "0,1"]),
    "missing checkpoint": (["--config.init_from=no.npz"], ["no.npz", "init_from"]),
    "missing config": (["--config=configs/none.py"], ["configs/none.py"]),
    "foreign flag": (["--wrokdir=x"], ["wrokdir"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_line_and_exit_code_2(case, data_dir, tmp_path):
    arguments, words = BAD_INPUT[case]
    workdir = tmp_path / "w"
    done = run_main(
        f"--config={DIGITS}",
        f"--workdir={workdir}",
        f"--config.data.data_dir={data_dir}",
        *arguments,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("vit_jax: error: ")
    for word in words:
        assert word in line
    assert not (workdir / "checkpoints").exists() or not any((workdir / "checkpoints").iterdir())


def test_dataset_that_is_not_prepared_and_can_not_be_is_refused(tmp_path):
    done = run_main(
        f"--config={DIGITS}",
        f"--workdir={tmp_path / 'w'}",
        f"--config.data.data_dir={tmp_path / 'none'}",
        "--config.data.name=places365_small:9.9.9",
    )
    assert done.returncode == 2
    assert done.stderr.count("vit_jax: error: data.name='places365_small:9.9.9'") == 1


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("spoil", "arguments", "words"),
    [
        (None, ["--config.model.hidden_size=64"], ["config.model.hidden_size", "48", "64"]),
        (None, ["--config.seed=1"], ["config.seed", "another experiment"]),
        (lambda w: (w / "config.json").unlink(), [], ["config.json", "not a workdir"]),
        (lambda w: (w / "config.json").write_text("{"), [], ["--workdir=", "can't be used"]),
        (
            lambda w: [p.unlink() for p in (w / "checkpoints/2/params").rglob("*") if p.is_file()],
            ["--config.total_steps=3"],
            ["checkpoints/2", "can't be restored"],
        ),
        (
            lambda w: [
                os.truncate(p, p.stat().st_size // 2)
                for p in (w / "checkpoints/2/params/d").iterdir()
            ],
            ["--config.total_steps=3"],
            ["checkpoints/2", "can't be restored"],
        ),
    ],
    ids=["other model", "other seed", "no config", "torn config", "gutted", "truncated"],
)
def test_a_workdir_of_something_else_is_left_alone(
    spoil, arguments, words, trained, data_dir, tmp_path
):
    workdir = tmp_path / "w"
    shutil.copytree(trained, workdir)
    if spoil:
        spoil(workdir)
    before = snapshot(workdir)
    done = run_main(
        f"--config={DIGITS}",
        f"--workdir={workdir}",
        f"--config.data.data_dir={data_dir}",
        "--config.total_steps=2",
        "--config.optimizer.warmup_steps=0",
        *arguments,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    for word in words:
        assert word in line
    assert snapshot(workdir) == before


def test_unwritable_workdir_is_refused(data_dir):
    done = run_main(
        f"--config={DIGITS}", "--workdir=/proc/none", f"--config.data.data_dir={data_dir}"
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "--workdir='/proc/none'" in line


@pytest.mark.parametrize("missing", ["config", "workdir"])
def test_both_flags_are_needed(missing):
    flags = {"config": f"--config={DIGITS}", "workdir": "--workdir=w"}
    del flags[missing]
    done = run_main(*flags.values())
    assert done.returncode == 2
    assert f"--{missing} is missing" in done.stderr


def test_help_shows_the_flags():
    done = run_main("--help")
    assert "--config" in done.stdout
    assert "--workdir" in done.stdout


def test_overrides_reach_the_config():
    overrides, rest = parse_overrides(
        [
            "--config=x",
            "--workdir=w",
            "--config.model.patch_size=(2, 4)",
            "--config.mesh.fsdp",
            "4",
            "--config.evals.val=None",
            "--config.model.remat=none",
            "--config.optimizer.nesterov=true",
            "--config.data.split=train[:5%]",
            "--config.optimizer.lr_multipliers=(('head/.*', 10.0),)",
        ]
    )
    assert rest == ["--config=x", "--workdir=w"]
    config = load_config(str(DIGITS), overrides).to_dict()
    assert config["model"]["patch_size"] == (2, 4)
    assert config["mesh"] == {"fsdp": 4}
    assert config["evals"]["val"] is None
    section = config["model"] | {"num_classes": 10}
    section.pop("name")
    (model,) = bind(section, make_vit, key="model", given=("constrain",))
    assert model["remat"] == "none"
    assert config["optimizer"]["nesterov"] is True
    assert config["data"]["split"] == "train[:5%]"
    assert config["data"]["batch_size"] == 64
    assert config["optimizer"]["lr_multipliers"] == (("head/.*", 10.0),)


def test_a_key_below_a_value_is_refused():
    with pytest.raises(UserError, match=r"unknown config key seed\.x: seed=0"):
        load_config(str(DIGITS), {"seed.x": 1})


def test_a_config_that_fails_is_named(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(UserError, match=r"broken.py: ZeroDivisionError"):
        load_config(str(file), {})


def test_config_json_holds_the_resolved_config(trained):
    config = json.loads((trained / "config.json").read_text())
    assert config["total_steps"] == 2
    assert config["optimizer"]["b2"] == 0.999


def test_a_missing_tracker_is_refused_before_devices_are_looked_at(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(main_module, "_join_job", lambda _: pytest.fail("devices are looked at"))
    config = ["--config", str(ROOT / "configs/digits.py"), "--workdir", str(tmp_path / "run")]
    with flagsaver.flagsaver(config=config[1], workdir=config[3]), pytest.raises(UserError) as e:
        main_module.main(["main", *config, "--config.tracking.trackers=wandb,mlflow"])
    assert str(e.value) == (
        "tracking.trackers: 'wandb' is not installed: pip install 'vit_jax[wandb]'"
    )
    assert not (tmp_path / "run").exists()


def test_less_and_more_at_once_is_refused():
    with flagsaver.flagsaver(), pytest.raises(UserError, match="expected one of them"):
        main_module.parse_flags(["main", "--config=c", "--workdir=w", "--quiet", "--verbose"])
