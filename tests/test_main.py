# SPDX-License-Identifier: Apache-2.0
"""The command: overrides, and one clear line for bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from tests.command import call
from vit_jax import main as main_module
from vit_jax.config.load import load_config, parse_overrides
from vit_jax.config.shipped import list_configs
from vit_jax.models.variants import make_vit
from vit_jax.observe import trackers
from vit_jax.runtime import processes
from vit_jax.runtime.preemption import Interrupted, Preempted
from vit_jax.training import run
from vit_jax.training.run import train
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
        timeout=600,
    )


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """Workdir of two steps of digits.py."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    overrides = {"total_steps": 2, "optimizer.warmup_steps": 0, "data.data_dir": data_dir}
    train(load_config(str(DIGITS), overrides), str(workdir), command="train")
    return workdir


# All others are tried within one process, here and in tests/test_wrong_inputs.py.
def test_bad_input_gets_one_line_and_exit_code_2(data_dir, tmp_path):
    workdir = tmp_path / "w"
    done = run_main(f"--config={DIGITS}", f"--workdir={workdir}", "--wrokdir=x")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("vit_jax: error: ")
    assert "wrokdir" in line
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.total_steps=many"], ["total_steps='many'", "int"]),
        (["--config.data.name=places365_small:9.9.9"], ["data.name='places365_small:9.9.9'"]),
    ],
    ids=["wrong type", "no such data"],
)
def test_bad_values_get_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "w"
    data = f"--config.data.data_dir={tmp_path / 'none'}"
    argv = [f"--config={DIGITS}", f"--workdir={workdir}", data, *arguments]
    assert call("main", argv, monkeypatch) == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if "vit_jax: error: " in x)
    for word in words:
        assert word in line
    assert not (workdir / "checkpoints").exists()


def test_processes_compare_what_was_typed_before_anything_is_written(tmp_path, monkeypatch, capsys):
    compared = []

    def refuse(values):
        compared.append(values)
        raise UserError("processes 0 and 1 were not started alike")

    monkeypatch.setattr(processes, "check_same", refuse)
    workdir = tmp_path / "w"
    argv = [f"--config={DIGITS}", f"--workdir={workdir}", "--config.total_steps=7"]
    assert call("main", argv, monkeypatch) == 2
    assert capsys.readouterr().err.endswith(
        "vit_jax: error: processes 0 and 1 were not started alike\n"
    )
    (values,) = compared
    assert values["--config.total_steps"] == 7
    assert values["--config.optimizer.lr"] == load_config(str(DIGITS), {}).optimizer.lr
    assert values["--workdir"] == str(workdir)
    assert not workdir.exists()


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("spoil", "arguments", "words"),
    [
        (None, ["--config.model.hidden_size=64"], ["model.hidden_size is", "48", "64"]),
        (None, ["--config.seed=1"], ["seed is", "another experiment"]),
        (
            lambda w: [(w / name).unlink() for name in ("config.json", "checkpoints/2/run.json")],
            [],
            ["config.json", "not a workdir"],
        ),
        (
            lambda w: [
                (w / name).write_text("{") for name in ("config.json", "checkpoints/2/run.json")
            ],
            [],
            ["--workdir=", "config.json can't be read (JSONDecodeError)"],
        ),
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
    spoil, arguments, words, trained, data_dir, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "w"
    shutil.copytree(trained, workdir)
    if spoil:
        spoil(workdir)
    before = snapshot(workdir)
    argv = [
        f"--config={DIGITS}",
        f"--workdir={workdir}",
        f"--config.data.data_dir={data_dir}",
        "--config.total_steps=2",
        "--config.optimizer.warmup_steps=0",
        *arguments,
    ]
    code = call("main", argv, monkeypatch)
    errors = capsys.readouterr().err
    assert code == 2, errors
    (line,) = errors.splitlines()
    for word in words:
        assert word in line
    assert snapshot(workdir) == before


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_has_groups_examples_and_the_configs_and_is_no_failure(flag, monkeypatch, capsys):
    assert call("main", ["--config=digits", flag], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m vit_jax.main --config=CONFIG --workdir=WORKDIR ")
    for heading in ("Examples", "the run", "the devices", "a job of several processes", "configs"):
        assert f"\n{heading}:\n" in shown
    own = {holder.name for holders in main_module._GROUPS.values() for holder in holders}
    assert own == {flag.name for flag in flags.FLAGS.get_key_flags_for_module("vit_jax.main")}
    for name in (*own, "config.KEY"):
        assert f"\n  --{name} " in shown or f"\n  --{name}\n" in shown
    for name, summary in list_configs().items():
        assert re.search(rf"\n  {name} +{re.escape(summary)}\n", shown), name


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


def dry_run(workdir, data_dir, monkeypatch, capsys, *arguments):
    """What a dry run of digits prints; nothing may change where it looks."""
    folders = (workdir.parent, Path(data_dir))
    before = [snapshot(folder) for folder in folders]
    argv = [f"--config={DIGITS}", f"--workdir={workdir}", f"--config.data.data_dir={data_dir}"]
    argv += ["--config.total_steps=4", "--config.optimizer.warmup_steps=0", "--dry_run"]
    assert call("main", [*argv, *arguments], monkeypatch) == 0
    assert [snapshot(folder) for folder in folders] == before
    return capsys.readouterr().out


def test_a_dry_run_tells_what_a_run_does_and_writes_nothing(
    data_dir, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "new"
    shown = dry_run(workdir, data_dir, monkeypatch, capsys, "--config.mesh.fsdp=2")
    for text in (
        "  config.model.hidden_size = 48\n",
        "  config.optimizer.b2 = 0.999\n",
        "  devices      8 x cpu in 1 process\n",
        "  mesh         data=4, fsdp=2, tensor=1\n",
        "  model        vit, 119,242 parameters\n",
        "  train data   digits train[:90%], 1,293 images, 10 classes, batches of 64 of 16x16x3, ",
        "  test data    digits test, 360 images, 10 classes, ",
        " of memory, every 500 steps\n",
        "  steps        1 to 4, 0.198 epochs\n",
        f"  workdir      {workdir} is made; the run starts from the beginning\n",
        f"  files in {workdir}: config.json, ",
    ):
        assert text in shown, text
    assert not workdir.exists()


def test_a_dry_run_tells_where_the_run_resumes(trained, data_dir, monkeypatch, capsys):
    shown = dry_run(trained, data_dir, monkeypatch, capsys)
    assert "  steps        3 to 4, " in shown
    assert f"{trained} exists; the run resumes from its checkpoint of step 2\n" in shown


def test_a_dry_run_prepares_no_data(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    data = tmp_path / "data"
    shown = dry_run(
        tmp_path / "w", data, monkeypatch, capsys, "--config.total_steps=none", "--config.epochs=2"
    )
    assert f"is not prepared in {data}/digits/" in shown
    assert "  steps        not known before the data is prepared\n" in shown


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


def test_the_config_file_is_executed_once(monkeypatch, tmp_path):
    file, runs, configs = tmp_path / "counts.py", tmp_path / "runs", []
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        f"    with open({str(runs)!r}, 'a') as file:\n"
        "        file.write('x')\n"
        "    return ConfigDict({'seed': 1})\n"
    )
    monkeypatch.setattr(main_module, "_join_job", lambda _: None)
    monkeypatch.setattr(run, "train", lambda config, *_, **__: configs.append(config))
    with flagsaver.flagsaver(config=str(file), workdir=str(tmp_path / "w"), compile_cache="off"):
        main_module.main(["main", "--config.seed=2"])
    assert runs.read_text() == "x"
    assert [config.to_dict() for config in configs] == [{"seed": 2}]


def test_less_and_more_at_once_is_refused():
    with flagsaver.flagsaver(), pytest.raises(UserError, match="expected one of them"):
        main_module.parse_flags(["main", "--config=c", "--workdir=w", "--quiet", "--verbose"])


def test_a_workdir_may_be_given_without_its_flag():
    with flagsaver.flagsaver():
        main_module.parse_flags(["main", "runs/x", "--config=digits", "--config.seed=1"])
        assert main_module._WORKDIR.value == "runs/x"


@pytest.mark.parametrize("config", ["digits", "configs/digits.py", "vit:b16,cifar10"])
def test_a_config_without_its_flag_is_no_workdir(config):
    with flagsaver.flagsaver(), pytest.raises(UserError, match=f"mean '--config={config}'"):
        main_module.parse_flags(["main", config])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted; there is no checkpoint yet, so the same command"),
        (Interrupted("stopped after step 3 of 6"), 130, "stopped after step 3 of 6; the same"),
        (Preempted("stopped after step 3 of 6"), 75, "stopped after step 3 of 6; the same"),
    ],
)
def test_an_interruption_is_one_line_that_says_what_the_same_command_does(
    error, code, line, tmp_path, monkeypatch, capsys
):
    def fail(argv):
        raise error

    monkeypatch.setattr(main_module.app, "run", lambda main, **_: main([]))
    monkeypatch.setattr(main_module, "_check_config_file", lambda: None)
    monkeypatch.setattr(main_module, "main", fail)
    before = signal.getsignal(signal.SIGINT)
    with flagsaver.flagsaver(workdir=str(tmp_path)):
        for _ in range(2):
            with pytest.raises(SystemExit) as end:
                main_module.run()
            signal.signal(signal.SIGINT, before)
            assert end.value.code == code
            (said,) = "".join(capsys.readouterr()).splitlines()
            assert said.startswith(f"vit_jax: {line}")
            (tmp_path / "checkpoints" / "40").mkdir(parents=True, exist_ok=True)
            if isinstance(error, KeyboardInterrupt):
                line = "interrupted; the same command resumes from the checkpoint of step 40"
