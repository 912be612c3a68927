# SPDX-License-Identifier: Apache-2.0
"""Sweeps: what is run, with which names, what is left out, and what the table says."""

import csv
import json
import os
import shlex
import signal
import threading
from pathlib import Path

import pytest

from tests.clock import wait_until
from tests.html_pages import assert_stands_alone
from tests.test_compare import write_run
from vit_jax import sweep as sweep_module
from vit_jax.config.load import parse_overrides
from vit_jax.launch import gke
from vit_jax.sweep import Trial, main, make_trials, read_sweep, run_sweep, run_trial
from vit_jax.utils.errors import UserError

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs/digits.py")
GRID = '{"optimizer.lr": [1e-3, 2e-3], "objective.loss": ["softmax", "sigmoid"]}'


@pytest.fixture
def file(tmp_path):
    """Writes a sweep file whose `get_sweep` gives an expression; returns its path."""

    def write(expression):
        path = tmp_path / "sweep.py"
        path.write_text(f"def get_sweep():\n    return {expression}\n")
        return str(path)

    return write


@pytest.fixture
def runs(file, tmp_path):
    """The runs of a sweep over three learning rates, of which the second is the best."""
    path = file('{"optimizer.lr": [0.1, 0.2, 0.3]}')
    return make_trials(DIGITS, [path], {"seed": 1}, tmp_path / "sweep")


class Runner:
    """Takes the place of training: writes a workdir, or fails with a code."""

    def __init__(self, codes=(), results=(0.25, 0.75, 0.5)):
        self.codes, self.results, self.names = dict(codes), list(results), []

    def __call__(self, trial: Trial):
        self.names.append(trial.name)
        if code := self.codes.get(trial.name):
            return code
        _, arguments = parse_overrides(list(trial.arguments))
        workdir = Path(arguments[1].removeprefix("--workdir="))
        score = self.results[len(self.names) - 1]
        write_run(workdir, lr=trial.overrides["optimizer.lr"], top1=(0.1, score), loss=(2.0, 1.0))
        return 0


def test_a_grid_is_all_combinations_with_readable_names(file):
    assert read_sweep([file(GRID)]) == [
        (f"lr={lr},loss={loss}", {"optimizer.lr": lr, "objective.loss": loss})
        for lr in (0.001, 0.002)
        for loss in ("softmax", "sigmoid")
    ]


def test_a_list_is_run_as_it_is_and_may_have_names(file):
    trials = '[{"data.name": "folder:/a b", "model.name": "vit"}, {"name": "plain", "seed": 3}]'
    assert read_sweep([file(trials)]) == [
        # Two keys end in the same word: they are written out.
        (
            "data.name=folder-a-b,model.name=vit",
            {"data.name": "folder:/a b", "model.name": "vit"},
        ),
        ("plain", {"seed": 3}),
    ]


@pytest.mark.parametrize(
    ("axes", "runs"),
    [
        (["optimizer.lr=1e-3,3e-3"], [{"optimizer.lr": 0.001}, {"optimizer.lr": 0.003}]),
        (["seed=3"], [{"seed": 3}]),
        # Values of each type, and separators within them.
        (["precision=none,bfloat16"], [{"precision": None}, {"precision": "bfloat16"}]),
        (["model.qk_norm=true,False"], [{"model.qk_norm": True}, {"model.qk_norm": False}]),
        (
            ["optimizer.freeze=('head/.*', 'cls'),()"],
            [{"optimizer.freeze": ("head/.*", "cls")}, {"optimizer.freeze": ()}],
        ),
        (
            ["data.preprocess=decode|pad(2, 0)|flip_lr,decode"],
            [{"data.preprocess": "decode|pad(2, 0)|flip_lr"}, {"data.preprocess": "decode"}],
        ),
        (["init_from='a,b;c'"], [{"init_from": "a,b;c"}]),
        # Several keys: in one, or one each, with keys as on the command line.
        *(
            (
                axes,
                [
                    {"optimizer.lr": lr, "model.variant": variant}
                    for lr in (0.1, 0.2)
                    for variant in ("S/16", "B/16")
                ],
            )
            for axes in (
                ["optimizer.lr=0.1,0.2;model.variant=S/16,B/16"],
                ["optimizer.lr=0.1, 0.2; model.variant = S/16, B/16;"],
                ["config.optimizer.lr=0.1,0.2", "--config.model.variant=S/16,B/16"],
            )
        ),
    ],
)
def test_axes_are_written_on_the_command_line(axes, runs):
    assert [overrides for _, overrides in read_sweep(axes)] == runs


def test_axes_are_combined_with_those_of_a_file(file):
    found = read_sweep([file('{"optimizer.lr": [0.1, 0.2]}'), "seed=0,1"])
    assert [name for name, _ in found] == [
        "lr=0.1,seed=0",
        "lr=0.1,seed=1",
        "lr=0.2,seed=0",
        "lr=0.2,seed=1",
    ]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["optimizer.lr="], "'optimizer.lr='; expected KEY=VALUE,VALUE"),
        (["optimizer.lr=1,,2"], "expected KEY=VALUE,VALUE"),
        (["=1,2"], "'=1,2'; expected KEY=VALUE,VALUE"),
        (["seed=1;2"], "'2'; expected KEY=VALUE,VALUE"),
        (["optimizer.lr"], "there is no such file; expected one with get_sweep, or KEY=VALUE"),
        (["lr=1,2,seed=1,2"], "'seed=1' is another key: expected ; before it"),
        (["seed=1;seed=2"], "seed is given twice"),
        (["seed=1", "seed=2"], "seed is given twice"),
        (["seed=(1,2"], "a bracket or a quote is left open"),
        (["seed=1,1"], "two runs are 'seed=1'"),
        (["seed=" + ",".join(map(str, range(101))) + f";optimizer.{k}={v}" for k, v in [("lr", 1)]]
         + ["data.batch_size=" + ",".join(map(str, range(100)))], "10,100 runs; expected 10,000"),
        (["{file}", "seed=1,2"], "get_sweep gives a list of runs; expected it alone"),
    ],
)  # fmt: skip
def test_axes_that_can_not_be_read_are_one_line(axes, message, file):
    path = file('[{"seed": 1}]')
    with pytest.raises(UserError) as error:
        read_sweep([axis.format(file=path) for axis in axes])
    assert message in str(error.value)


def test_long_names_are_cut_and_stay_different(file):
    text = "x" * 150
    names = [name for name, _ in read_sweep([file(f'{{"init_from": ["{text}a", "{text}b"]}}')])]
    assert len(set(names)) == 2
    assert all(len(name) == 100 for name in names)


def test_arguments_give_the_overrides_back(file, tmp_path):
    values = [1e-3, None, True, "none", "12", "cosine", ("a", "b"), {"k": [1]}]
    path = file(f'{{"optimizer.schedule": {values!r}}}')
    for trial, value in zip(make_trials(DIGITS, [path], {}, tmp_path), values, strict=True):
        overrides, rest = parse_overrides(list(trial.arguments))
        assert overrides == {"optimizer.schedule": value}
        assert rest == [f"--config={DIGITS}", f"--workdir={tmp_path / trial.name}"]


def test_what_is_for_all_runs_gives_way_to_what_is_for_one(file, tmp_path):
    (trial,) = make_trials(DIGITS, [file('[{"seed": 2}]')], {"seed": 1, "total_steps": 5}, tmp_path)
    assert trial.arguments[2:] == ("--config.seed=2", "--config.total_steps=5")


def test_the_results_are_sorted_by_the_metric(runs, tmp_path, said):
    assert run_sweep(runs, tmp_path / "sweep", metric="val/top1", run_trial=Runner()) == 0
    content = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert content["metric"] == "val/top1"
    assert [(r["run"], r["last"]["val/top1"]) for r in content["runs"]] == [
        ("lr=0.2", 0.75),
        ("lr=0.3", 0.5),
        ("lr=0.1", 0.25),
    ]
    first = content["runs"][0]
    assert first["overrides"] == {"optimizer.lr": 0.2}
    assert (first["state"]["status"], first["state"]["code"]) == ("finished", 0)
    with open(tmp_path / "sweep/sweep.csv") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["lr=0.2", "lr=0.3", "lr=0.1"]
    page = assert_stands_alone((tmp_path / "sweep/sweep.html").read_text())
    assert "lr=0.2" in page.text


def test_a_run_that_fails_is_noted_and_the_others_go_on(runs, tmp_path, said):
    runner = Runner({"lr=0.2": 1})
    assert run_sweep(runs, tmp_path / "sweep", metric=None, run_trial=runner) == 1
    assert runner.names == ["lr=0.1", "lr=0.2", "lr=0.3"]
    assert "lr=0.2 failed with code 1; the others continue" in said
    states = sweep_module.read_states(tmp_path / "sweep")
    assert {name: state["status"] for name, state in states.items()} == {
        "lr=0.1": "finished",
        "lr=0.2": "failed",
        "lr=0.3": "finished",
    }
    # It is tried again, and nothing else.
    again = Runner()
    assert run_sweep(runs, tmp_path / "sweep", metric=None, run_trial=again) == 0
    assert again.names == ["lr=0.2"]


@pytest.mark.parametrize("code", [75, 130])
def test_a_sweep_that_is_stopped_goes_on_where_it_was(code, runs, tmp_path, said):
    runner = Runner({"lr=0.2": code})
    assert run_sweep(runs, tmp_path / "sweep", metric=None, run_trial=runner) == code
    assert runner.names == ["lr=0.1", "lr=0.2"]
    again = Runner()
    assert run_sweep(runs, tmp_path / "sweep", metric=None, run_trial=again) == 0
    assert again.names == ["lr=0.2", "lr=0.3"]


def test_a_run_of_another_config_is_not_taken_for_finished(runs, file, tmp_path, said):
    run_sweep(runs, tmp_path / "sweep", metric=None, run_trial=Runner())
    longer = make_trials(
        DIGITS, [file('{"optimizer.lr": [0.1, 0.2, 0.3]}')], {"seed": 2}, tmp_path / "sweep"
    )
    runner = Runner(dict.fromkeys((trial.name for trial in longer), 2))
    run_sweep(longer, tmp_path / "sweep", metric=None, run_trial=runner)
    assert len(runner.names) == 3


def call(file, tmp_path, data_dir, *arguments, sweep=GRID):
    return main(
        [
            f"--config={DIGITS}",
            f"--sweep={file(sweep)}",
            f"--workdir={tmp_path / 'sweep'}",
            f"--config.data.data_dir={data_dir}",
            *arguments,
        ]
    )


def test_the_table_can_be_made_while_runs_are_under_way(file, tmp_path, data_dir, said):
    write_run(tmp_path / "sweep/lr=0.002,loss=softmax", lr=2e-3, top1=(0, 0.5), loss=(2, 1))
    assert call(file, tmp_path, data_dir, "--summarize", "--metric=val/loss") == 0
    assert [line.split()[:2] for line in said[:3]] == [
        ["run", "state"],
        ["lr=0.002,loss=softmax", "-"],
        ["lr=0.001,loss=softmax", "not"],
    ]
    assert "1.0000 at 8" in said[1]


@pytest.mark.parametrize("form", ["commands", "slurm", "gke"])
def test_commands_for_a_cluster_are_printed_and_nothing_runs(
    form, file, tmp_path, data_dir, capsys
):
    options = {
        "commands": "",
        "slurm": "--nodes=2",
        "gke": "--image=i --accelerator=tpu-v5-lite-podslice --topology=4x4",
    }[form]
    more = [f"--launch_args={options}"] if options else []
    assert call(file, tmp_path, data_dir, f"--emit={form}", *more) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4
    name = "lr=0.001,loss=sigmoid"
    train = [
        f"--config={DIGITS}",
        f"--workdir={tmp_path / 'sweep' / name}",
        f"--config.data.data_dir={data_dir}",
        "--config.optimizer.lr=0.001",
        "--config.objective.loss=sigmoid",
    ]
    before = lines[1][: -len(train)]
    assert lines[1][len(before) :] == train
    if form == "slurm":
        assert before == ["sbatch", f"--job-name={name}", "--nodes=2", "launch/slurm/train.sbatch"]
    elif form == "gke":
        assert before[:4] == ["python", "-m", "vit_jax.launch.gke", "s2-lr-0-001-loss-sigmoid"]
        # The command takes it.
        assert gke.main([*lines[1][3:4], "--dry_run", *lines[1][4:]]) == 0
    else:
        assert before == ["python", "-m", "vit_jax.main"]
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("{'optimizer.lr': 0.1}", "'optimizer.lr': 0.1; expected a list of values"),
        ("{'optimizer.lr': []}", "'optimizer.lr': []; expected a list of values"),
        ("{}", "get_sweep gives {}; expected a dict of lists"),
        ("[1]", "get_sweep gives [1]; expected a dict of lists"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("[{'name': '../up', 'seed': 1}]", "'../up' can't be the name of a folder"),
        ("[{'seed': 1}, {'seed': 1}]", "two runs are 'seed=1'"),
        ("{'optimizer.lrr': [1, 2]}", "lrr=1: unknown config key"),
        ("{'lr': [1, 2]}", "lr=1: unknown config key lr; did you mean '--config.optimizer.lr'?"),
        ("{'seed.x': [1]}", "seed=0 has nothing below it"),
        ("{'optimizer.lr': [0.1, 'high']}", "lr=high: optimizer.lr='high'"),
    ],
)
def test_a_bad_sweep_is_one_line_before_anything_runs(
    sweep, message, file, tmp_path, data_dir, monkeypatch
):
    monkeypatch.setattr(sweep_module, "run_sweep", lambda *_, **__: pytest.fail("it runs"))
    with pytest.raises(UserError) as error:
        call(file, tmp_path, data_dir, sweep=sweep)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--emit=slurm", "--summarize"], "expected one of them"),
        (["--launch_args=--nodes=2"], "expected --emit=slurm or gke"),
        (["--sweep=none.py"], "--sweep=none.py: there is no such file"),
        (["--config=none.py"], "there is no file none.py"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, file, tmp_path, data_dir):
    with pytest.raises(UserError) as error:
        call(file, tmp_path, data_dir, *arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)]
)
@pytest.mark.parametrize("own_code", [0, 75, 1])
def test_a_run_is_told_to_stop_once_when_the_sweep_is(number, code, own_code, tmp_path):
    there, heard = tmp_path / "there", tmp_path / "heard"

    def tell():
        wait_until(there.exists)
        os.kill(os.getpid(), number)

    arguments = (there, heard, own_code, int(number), int(signal.SIGINT))
    thread = threading.Thread(target=tell)
    thread.start()
    trial = Trial("a", {}, tuple(map(str, arguments)), {})
    assert run_trial(trial, command="tests.stoppable") == code
    thread.join()
    assert heard.read_text() == f"{int(number)} "
    # A terminal sends Ctrl-C to the group of the sweep.
    assert there.read_text() != str(os.getpgid(0))


@pytest.mark.slow
def test_a_sweep_trains_and_is_finished_the_second_time(file, tmp_path, data_dir, said):
    arguments = [
        "--config.total_steps=4",
        "--config.log_every=2",
        "--config.evals.test=None",
        "--config.evals.val.every=2",
    ]
    sweep = '{"optimizer.lr": [1e-3, 2e-3], "optimizer.warmup_steps": [1]}'
    assert call(file, tmp_path, data_dir, *arguments, sweep=sweep) == 0
    content = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert content["metric"] == "val/top1"
    assert [run["step"] for run in content["runs"]] == [4, 4]
    said.clear()
    assert call(file, tmp_path, data_dir, *arguments, sweep=sweep) == 0
    assert sum("is finished" in line for line in said) == 2


def test_the_example_is_a_sweep_of_its_config(data_dir, tmp_path, capsys):
    path = ROOT / "configs/sweeps/digits.py"
    arguments = [f"--config={DIGITS}", str(tmp_path), "--emit=commands"]
    assert main([*arguments, f"--sweep={path}", f"--config.data.data_dir={data_dir}"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
