# SPDX-License-Identifier: Apache-2.0
"""The command that compares runs."""

import csv
import io
import json

import pytest

from tests.html_pages import assert_stands_alone
from vit_jax.compare import main
from vit_jax.observe.ledger import KINDS
from vit_jax.utils.errors import UserError


def write_run(workdir, *, lr, top1, loss, speed=100.0):
    """A run of 8 steps, evaluated at 4 and 8."""
    workdir.mkdir(parents=True)
    records = [
        {"step": 2, "train/loss": 2.0, "perf/images_per_sec": speed},
        {"step": 4, "train/loss": 1.5, "perf/images_per_sec": 3 * speed},
        {"step": 4, "val/top1": top1[0], "val/loss": loss[0], "val/count": 50},
        {"step": 6, "train/loss": 1.0, "perf/images_per_sec": 3 * speed},
        {"step": 8, "val/top1": top1[1], "val/loss": loss[1], "val/count": 50},
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    config = {"seed": 0, "optimizer": {"name": "adamw", "lr": lr}, "evals": {}}
    (workdir / "config.json").write_text(json.dumps(config))
    nothing = dict.fromkeys(KINDS, 0.0)
    start = {"event": "start", "time": 0, "step": 0, "total": 8, "seconds": nothing}
    end = {"event": "end", "time": 9, "step": 8, "cause": "finished"}
    lines = [start, end | {"seconds": nothing | {"step": 4.0}}]
    (workdir / "ledger.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return workdir


@pytest.fixture
def runs(tmp_path):
    """Two runs, of which the first is the better in the end, by other weights the second."""
    first = write_run(tmp_path / "runs/<b>one", lr=0.1, top1=(0.5, 0.75), loss=(1.0, 0.5))
    second = write_run(tmp_path / "runs/two", lr=0.2, top1=(0.875, 0.625), loss=(0.25, 2.0))
    return [str(first), str(second)]


def test_the_table_has_a_column_for_each_run_and_a_star_at_the_best(runs, capsys):
    main(runs)
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = {cells[0]: [c.strip() for c in cells[1:] if c.strip()] for cells in lines}
    assert rows[""] == ["<b>one", "two"]
    assert rows["step"] == ["8 of 8", "8 of 8"]
    assert rows["val/top1"] == ["75.00 % *", "62.50 %"]
    assert rows["val/top1, best"] == ["75.00 %", "87.50 % *"]
    assert rows["val/loss"] == ["0.5 *", "2"]
    assert rows["val/loss, best"] == ["0.5", "0.25 *"]
    assert rows["images/s"] == ["300", "300"]
    assert rows["config.optimizer.lr"] == ["0.1", "0.2"]
    # What is the same in all says nothing.
    assert not {"config.seed", "config.optimizer.name", "val/count"} & rows.keys()


def test_files_beside_the_workdirs_are_left_out_with_a_note(runs, tmp_path, said):
    table = tmp_path / "runs" / "sweep.csv"
    table.write_text("")
    main([runs[0], str(table), runs[1]])
    assert said[0] == f"left out, since they are files: {table}"
    assert said[1].split() == ["<b>one", "two"]
    with pytest.raises(UserError, match="is a file"):
        main([str(table)])


def test_a_metric_whose_best_value_is_the_last_has_one_row(tmp_path, capsys):
    main([str(write_run(tmp_path / "run", lr=0.1, top1=(0.5, 0.75), loss=(0.5, 1.0)))])
    out = capsys.readouterr().out
    assert "val/top1, best" not in out
    assert "val/loss, best" in out


def test_json_and_csv_have_a_record_for_each_run(runs, capsys):
    main([*runs, "--format=json"])
    first, second = json.loads(capsys.readouterr().out)
    assert second == {
        "run": "two",
        "step": 8,
        "total_steps": 8,
        "images_per_sec": 300.0,
        "last": {"val/top1": 0.625, "val/loss": 2.0},
        "best": {
            "val/top1": {"value": 0.875, "step": 4},
            "val/loss": {"value": 0.25, "step": 4},
        },
        "config": {"optimizer.lr": 0.2},
    }
    main([*runs, "--format=csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["run"] for row in rows] == [first["run"], "two"]
    assert rows[1]["val/top1"] == "0.625"
    assert rows[1]["best val/top1"] == "0.875"
    assert rows[1]["config.optimizer.lr"] == "0.2"


def test_the_page_lays_curves_over_each_other(runs, tmp_path, said):
    main([*runs, f"--output={tmp_path / 'page.html'}"])
    page = assert_stands_alone((tmp_path / "page.html").read_text())
    # Losses, speed and two metrics, a line for each run.
    assert page.tags.count("svg") == 4
    assert page.tags.count("polyline") == 8
    assert "b" not in page.tags
    assert page.text.count("<b>one") > 4


def test_a_folder_has_all_of_it(runs, tmp_path, said, capsys):
    output = tmp_path / "seen"
    main([*runs, f"--output={output}"])
    assert sorted(path.name for path in output.iterdir()) == ["index.html", "runs.csv", "runs.json"]
    assert capsys.readouterr().out == ""
    assert len(json.loads((output / "runs.json").read_text())) == 2


def test_a_run_that_has_just_begun_has_empty_cells(runs, tmp_path, capsys):
    new = tmp_path / "runs" / "new"
    new.mkdir()
    (new / "config.json").write_text(json.dumps({"seed": 1}))
    main([*runs, str(new), "--format=csv"])
    row = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))[-1]
    assert (row["run"], row["step"], row["val/top1"]) == ("new", "", "")
    assert (row["config.seed"], row["config.optimizer.lr"]) == ("1", "null")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{one}", "{one}/."], "is given twice"),
        (["{one}", "{tmp}"], "expected the workdir of a run"),
        (["{one}", "--output={one}"], "exists; remove it"),
        (["{one}", "--format=xml"], "invalid choice: 'xml'"),
        (["--format=csv"], "WORKDIR (or --workdir=WORKDIR)"),
    ],
)
def test_bad_input_is_one_line(runs, tmp_path, arguments, message):
    with pytest.raises(UserError) as error:
        main([argument.format(one=runs[0], tmp=tmp_path) for argument in arguments])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
