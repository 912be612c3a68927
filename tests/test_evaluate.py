# SPDX-License-Identifier: Apache-2.0
"""The command that evaluates checkpoints, once or beside a run."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.command import call
from tests.images import encode
from tests.tiny import tiny_config
from vit_jax import evaluate
from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.npz import write_npz
from vit_jax.evaluate import main
from vit_jax.export.signature import describe_signature
from vit_jax.inference.model import load_model
from vit_jax.observe.jsonl import append_record, read_metrics, read_records
from vit_jax.observe.ledger import Ledger
from vit_jax.training.evaluation import Judge
from vit_jax.training.run import train
from vit_jax.utils.errors import UserError

ROOT = Path(__file__).parent.parent

# Evaluators of features, as a person adds them to the evaluators of a run.
FEATURES = [
    f"--config.evals.{name}.{key}={value}"
    for name, options in {
        "near": {"name": "knn", "k": "(1,5)"},
        "few": {"name": "fewshot", "shots": "(1,5)", "seeds": 1},
        "probe": {"name": "linear_probe", "steps": 20},
    }.items()
    for key, value in {
        **options,
        "split": "test[:50]",
        "train_split": "train[:100]",
        "preprocess": "decode",
    }.items()
]


def config(data_dir, **changes):
    return tiny_config(data_dir, ema_decay=0.5, checkpoint__keep=9, **changes)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A workdir with checkpoints of the steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(config(data_dir), str(workdir), command="train")
    return workdir


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to write to."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def config_file(data_dir, tmp_path):
    """The config of the run as a file."""
    file = tmp_path / "config.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({config(data_dir).to_dict()!r})\n"
    )
    return file


def test_the_newest_checkpoint_scores_what_the_run_said(run, said):
    main([f"--workdir={run}"])
    (record,) = read_records(run / "evals.jsonl")
    trained = read_metrics(run)[-1]
    scores = {k: v for k, v in trained.items() if k.startswith("val")}
    assert {"val/top1", "val_ema/top1", "val/ece", "val_ema/loss"} <= scores.keys()
    assert record == {"checkpoint": str(run / "checkpoints" / "8"), "step": 8} | scores
    lines = "\n".join(said)
    assert "parameters     average" in lines
    assert re.search(rf"val/top1 +{scores['val/top1']:.4f} +{scores['val_ema/top1']:.4f}\n", lines)
    assert not (run / "evals" / "near_8.json").exists()


def test_a_step_is_evaluated_by_all_evaluators_with_details(run):
    main([f"--workdir={run}", "--checkpoint=4", "--details", *FEATURES])
    (record,) = read_records(run / "evals.jsonl")
    trained = next(r for r in read_metrics(run) if r["step"] == 4 and "val/top1" in r)
    assert record["step"] == 4
    assert {k: record[k] for k in trained if k.startswith("val")} == {
        k: v for k, v in trained.items() if k.startswith("val")
    }
    for metric in ("near/1nn", "near_ema/5nn", "few/1shot", "few_ema/5shot", "probe/top1"):
        assert 0 <= record[metric] <= 1
    names = {path.name for path in (run / "evals").iterdir()}
    assert {"val_4.json", "val_ema_4_confusion.csv", "few_4.json", "probe_ema_4.json"} <= names


def test_json_is_all_that_stands_on_stdout(run, tmp_path, monkeypatch, capfd):
    arguments = [f"--workdir={run}", "--json", f"--output={tmp_path / 'out.jsonl'}"]
    assert call("evaluate", arguments, monkeypatch) == 0
    out, err = capfd.readouterr()
    assert [json.loads(out)] == read_records(tmp_path / "out.jsonl")
    assert "head: kept, 10 classes" in err
    assert not (run / "evals.jsonl").exists()


def test_weights_of_others_need_a_config_and_no_workdir(run, config_file, tmp_path, said):
    write_npz(tmp_path / "vit.npz", load_pretrained(str(run)))
    output = tmp_path / "out" / "npz.jsonl"
    main([f"--config={config_file}", f"--init_from={tmp_path / 'vit.npz'}", f"--output={output}"])
    (record,) = read_records(output)
    assert record["step"] is None
    trained = read_metrics(run)[-1]
    for metric in ("val/top1", "val/loss"):
        np.testing.assert_allclose(record[metric], trained[metric], rtol=1e-6)
    assert "val_ema/top1" not in record
    assert any("head: kept, 10 classes" in line for line in said)


def test_what_is_adapted_is_said(run, said):
    small = "decode|resize(6)"
    sizes = [f"--config.data.preprocess={small}", f"--config.evals.val.preprocess={small}"]
    main([f"--workdir={run}", *sizes])
    assert any("position embeddings: resized from 4x4 to 3x3" in line for line in said)


def test_what_a_run_started_anew_is_loaded_from_its_own_checkpoint(run):
    stored = json.loads((run / "config.json").read_text())
    stored["adapt"]["dont_load"] = ["head/.*"]
    stored["init_from"] = "augreg:B/16"
    (run / "config.json").write_text(json.dumps(stored))
    main([f"--workdir={run}"])
    (record,) = read_records(run / "evals.jsonl")
    assert record["val/top1"] == read_metrics(run)[-1]["val/top1"]


@pytest.fixture
def headless(run, tmp_path):
    """Files of the run's weights: with another head, and with one of zeros."""
    weights = load_pretrained(str(run))
    files = []
    for name, head in (("other", np.ones((16, 21))), ("zero", np.zeros((16, 10)))):
        weights.params.update({"head/kernel": head, "head/bias": np.zeros(head.shape[1])})
        weights.params.update({k: v.astype(np.float32) for k, v in weights.params.items()})
        files.append(tmp_path / f"{name}.npz")
        write_npz(files[-1], weights)
    return files


def test_a_head_that_was_not_trained_is_refused_where_it_is_judged(headless, config_file, tmp_path):
    for file, reason in zip(headless, ("does not fit", "published untrained"), strict=True):
        with pytest.raises(UserError, match=reason) as e:
            main([f"--config={config_file}", f"--init_from={file}"])
        assert "--config.evals.val=None" in str(e.value)
        features = [f"--output={tmp_path / file.stem}", "--config.evals.val=None", *FEATURES[:5]]
        main([f"--config={config_file}", f"--init_from={file}", *features])
        assert "near/1nn" in read_records(tmp_path / file.stem)[0]


def test_following_a_run_evaluates_each_checkpoint_once(run, tmp_path, monkeypatch, said):
    monkeypatch.setattr(evaluate, "_POLL", 0.05)
    store = tmp_path / "store"
    shutil.move(run / "checkpoints", store)
    settings = (run / "config.json").read_text()
    (run / "config.json").unlink()

    def write():
        """As a run does it: the config first, then checkpoints, each whole under its name."""
        time.sleep(0.2)
        (run / "config.tmp").write_text(settings)
        os.replace(run / "config.tmp", run / "config.json")
        (run / "checkpoints").mkdir()
        for step in ("4", "8"):
            time.sleep(0.3)
            os.replace(store / step, run / "checkpoints" / step)

    writer = threading.Thread(target=write)
    writer.start()
    main([f"--workdir={run}", "--follow", "--timeout=600"])
    writer.join()
    records = read_records(run / "evals.jsonl")
    assert [r["step"] for r in records] == [4, 8]
    said.clear()
    main([f"--workdir={run}", "--follow", "--timeout=600"])
    assert read_records(run / "evals.jsonl") == records
    assert not any("evaluating" in line for line in said)
    # With one more evaluator they are not done.
    main([f"--workdir={run}", "--follow", "--config.evals.val=None", *FEATURES[:5]])
    assert [r["step"] for r in read_records(run / "evals.jsonl")] == [4, 8, 4, 8]


def test_following_ends_when_no_checkpoint_comes(run, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "_POLL", 0.05)
    shutil.rmtree(run / "checkpoints" / "8")
    assert main([f"--workdir={run}", "--follow", "--timeout=0.1"]) == 1
    assert "newest is of step 4 of 8" in capsys.readouterr().err
    assert [r["step"] for r in read_records(run / "evals.jsonl")] == [4]


class AnyJudge:
    """Finds all checkpoints equally good."""

    changes, names = {}, {"val"}

    def load(self, source):
        return source

    def record(self, source, loaded):
        return {"step": int(Path(source).name), "val/top1": 1.0}


def test_following_ends_where_a_run_ended_early(run, monkeypatch):
    shutil.rmtree(run / "checkpoints" / "8")
    seconds = dict.fromkeys(("step", "compile", "data_wait", "save", "evaluation"), 1.0)
    ledger = Ledger(run, step=4, total_steps=8, seconds=lambda: seconds, active=True)
    ledger.end_early("val/loss was best at step 2")
    found = []
    last = evaluate.follow(
        AnyJudge(), run, run / "evals.jsonl", total=8, timeout=0, report=found.append
    )
    assert (last, [record["step"] for record in found]) == (4, [4])


def test_a_checkpoint_that_is_removed_meanwhile_is_left_out(run, monkeypatch, said):
    load = Judge.load

    def load_late(judge, source):
        if source.endswith("/4"):  # Half of it is gone, and the rest will be in a moment.
            shutil.rmtree(Path(source) / "params")
            threading.Timer(0.2, shutil.rmtree, [source]).start()
        return load(judge, source)

    monkeypatch.setattr(Judge, "load", load_late)
    main([f"--workdir={run}", "--follow"])
    assert [r["step"] for r in read_records(run / "evals.jsonl")] == [8]
    assert any("checkpoints/4 was removed before it was evaluated" in line for line in said)


def test_a_damaged_checkpoint_ends_following(run, monkeypatch):
    monkeypatch.setattr(evaluate, "_REMOVAL", 0.1)
    shutil.rmtree(run / "checkpoints" / "4" / "params")
    with pytest.raises(UserError, match=r"checkpoints/4"):
        main([f"--workdir={run}", "--follow"])


BAD = {
    "nothing": ([], ["--workdir and --config are missing"]),
    "only a config": (["--config=x.py"], ["--checkpoint and --init_from are missing"]),
    "unknown flag": (["--wrkdir=x"], ["--wrkdir=x"]),
    "no run": (["--workdir=/nowhere", "--checkpoint=1"], ["/nowhere", "expected the workdir"]),
    "no config": (
        ["--workdir=/nowhere", "--init_from=a.npz"],
        ["'/nowhere': there is no config.json", "it does not exist"],
    ),
    "no such step": (["--workdir=RUN", "--checkpoint=5"], ["--checkpoint=5", "has 4, 8"]),
    "two sources": (
        ["--workdir=RUN", "--checkpoint=4", "--init_from=x.npz"],
        ["--init_from=x.npz", "--checkpoint=4"],
    ),
    "following one": (["--workdir=RUN", "--follow", "--checkpoint=4"], ["--follow"]),
    "details nowhere": (["--config=x.py", "--init_from=x.npz", "--details"], ["--details"]),
    "no evaluators": (["--workdir=RUN", "--config.evals=None"], ["evals is empty"]),
    "unknown key": (
        ["--workdir=RUN", "--config.evals.val.shot=5"],
        ["evals.val.shot"],
    ),
    "unknown evaluator": (
        ["--workdir=RUN", "--config.evals.val.name=knnn"],
        ["evals.val.name='knnn'", "'knn'"],
    ),
    "unknown training split": (
        ["--workdir=RUN", *FEATURES[:5], "--config.evals.near.train_split=trian"],
        ["evals.near.train_split='trian'"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, finished):
    arguments, named = BAD[case]
    with pytest.raises(UserError) as e:
        main([a.replace("RUN", str(finished)) for a in arguments])
    for text in named:
        assert text in str(e.value)
    assert "\n" not in str(e.value)
    assert list_steps(finished) == [4, 8]


def test_bad_input_is_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "vit_jax.evaluate", "--workdir"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("vit_jax: error: argument --workdir")
    assert done.stderr.count("\n") == 1


def test_a_torn_record_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "evals.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "val')
    append_record(path, {"step": 3})
    assert read_records(path) == [{"step": 1}, {"step": 3}]


def test_the_best_checkpoint_by_a_metric_of_the_average_is_kept(data_dir, tmp_path):
    best = {"every": 2, "keep": 1, "keep_best": "val_ema/ece"}
    changes = {"evals__val__every": 2, "checkpoint": best, "optimizer__lr": 0.1}
    train(tiny_config(data_dir, ema_decay=0.5, **changes), str(tmp_path / "w"), command="train")
    errors = {r["step"]: r["val_ema/ece"] for r in read_metrics(tmp_path / "w") if "val/ece" in r}
    assert sorted(errors) == [2, 4, 6, 8]
    assert list_steps(tmp_path / "w") == sorted({min(errors, key=errors.__getitem__), 8})


# Classes by name


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """A run that knows which grey is which of its classes, and folders of the same greys."""
    place = tmp_path_factory.mktemp("animals")
    greys = {"1": 0, "10": 80, "2": 160, "cat": 240}

    def write(name, classes):
        for folder, grey in classes.items():
            path = place / name / "test" / folder
            path.mkdir(parents=True)
            for number in range(4):
                (path / f"{number}.png").write_bytes(encode(greys[grey]))
        return f"folder:{place / name}"

    own = write("own", {name: name for name in greys})
    line = "decode|resize(8)"
    changes = {
        "data__name": own,
        "data__split": "test",
        "data__preprocess": line,
        "evals__val": {"split": "test", "preprocess": line, "every": 0},
        "optimizer__lr": 0.03,
        "total_steps": 60,
        "checkpoint__every": 60,
        "log_every": 60,
    }
    train(tiny_config("", **changes), str(place / "run"), command="train")
    return place, write


def test_a_run_is_judged_by_the_names_of_its_classes(animals, said):
    place, write = animals
    run = place / "run"
    assert read_metrics(run)[-1]["val/top1"] == 1
    details = {path: path.read_bytes() for path in (run / "evals").iterdir()}
    few = write("few", {"2": "2", "cat": "cat"})
    for options in (["--config.data.name"], ["--config.evals.val.data_name"]):
        main([f"--workdir={run}", f"{options[0]}={few}", "--details"])
        record = read_records(run / "evals.jsonl")[-1]
        assert (record["val/top1"], record["val/count"]) == (1, 8)
        assert any("2 of 2 labels become those" in line for line in said)
        key = options[0].removeprefix("--config.")
        assert record["changes"] == {key: few}
        (file,) = (run / "evals").glob(f"val_{key}=*_60.json")
        classes = json.loads(file.read_text())["classes"]
        assert [c["name"] for c in classes] == ["1", "10", "2", "cat"]
        assert [c["count"] for c in classes] == [0, 0, 4, 4]
    # Those of the run itself are as they were, and evaluating it again writes the same.
    main([f"--workdir={run}", "--details"])
    assert details == {path: path.read_bytes() for path in details}
    assert "changes" not in read_records(run / "evals.jsonl")[-1]
    # Its checkpoint and a file made of it know the names too.
    write_npz(place / "run.npz", load_pretrained(str(run / "checkpoints" / "60")))
    options = [f"--init_from={place / 'run.npz'}", f"--config.data.name={few}"]
    main([f"--workdir={run}", *options, f"--output={place / 'npz.jsonl'}"])
    assert read_records(place / "npz.jsonl")[-1]["val/top1"] == 1


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({"2": "2", "kat": "cat"}, ["lacks 'kat'", "did you mean 'cat'"]),
        ({"0": "1", "2": "2"}, ["lacks '0'"]),
    ],
    ids=["renamed", "other numbers"],
)
def test_data_with_a_class_that_the_run_lacks_is_refused(classes, words, animals, request):
    place, write = animals
    other = write(request.node.callspec.id, classes)
    with pytest.raises(UserError) as e:
        main([f"--workdir={place / 'run'}", f"--config.data.name={other}", "--details"])
    for word in ("evals.val: ", other, *words):
        assert word in str(e.value)


def test_files_and_steps_of_another_run_are_not_those_of_this_one(animals, run):
    place, _ = animals
    before = {path: path.read_bytes() for path in (run / "evals").iterdir()}
    other = shutil.copytree(run, place / "other")
    main([f"--workdir={run}", f"--init_from={other / 'checkpoints' / '4'}", "--details"])
    assert read_records(run / "evals.jsonl")[-1]["step"] is None
    assert before == {path: path.read_bytes() for path in before}


def test_following_does_not_count_results_on_other_data(run):
    main([f"--workdir={run}", "--checkpoint=4", "--config.evals.val.split=test[:20]"])
    main([f"--workdir={run}", "--follow"])
    records = read_records(run / "evals.jsonl")
    assert [(r["step"], r["val/count"]) for r in records] == [(4, 20), (4, 50), (8, 50)]
    assert [r.get("changes") for r in records] == [{"evals.val.split": "test[:20]"}, None, None]


def test_a_fitted_temperature_scales_the_probabilities_of_its_checkpoint(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    fit = [f"--config.evals.fit.{key}={value}" for key, value in
           {"name": "trust", "split": "test[:50]", "preprocess": "decode"}.items()]  # fmt: skip
    assert (
        main([f"--workdir={workdir}", "--config.evals.val=None", "--keep_temperature", *fit]) == 0
    )
    (record,) = read_records(workdir / "evals.jsonl")
    kept = json.loads((workdir / "temperature.json").read_text())
    want = {"raw": record["fit/temperature"], "ema": record["fit_ema/temperature"]}
    assert (kept["step"], kept["temperature"]) == (8, want)

    model, plain = load_model(workdir), load_model(finished)
    logits = np.array([[0.3, 2.0, -1.0]], np.float32)
    powers = np.exp(logits / want["raw"])
    got = model.predict(logits)
    np.testing.assert_allclose(got.probabilities, powers / powers.sum(), rtol=1e-5)
    np.testing.assert_array_equal(got.logits, logits)
    assert any("divided by" in note for note in model.notes)
    assert plain.temperature == 1
    assert load_model(workdir, params="ema").temperature == want["ema"]
    earlier = load_model(workdir, checkpoint=4)
    assert earlier.temperature == 1
    assert any("is of step 8" in note for note in earlier.notes)
    signature = describe_signature(model, "logits", {})
    assert signature["temperature"] == want["raw"]

    (workdir / "temperature.json").write_text('{"step": 8, "temperature": {"raw": -1}}')
    with pytest.raises(UserError, match="holds no temperatures"):
        load_model(workdir)


def test_a_temperature_needs_one_evaluator_that_fits_it(finished):
    with pytest.raises(UserError, match="0 evaluators fit one"):
        main([f"--workdir={finished}", "--keep_temperature"])
    with pytest.raises(UserError, match="no --init_from or --follow"):
        main([f"--workdir={finished}", "--keep_temperature", "--follow"])


@pytest.mark.parametrize(("fitted", "warned"), [(100.0, True), (0.01, True), (1.7, False)])
def test_a_temperature_at_the_limit_of_the_search_is_warned_of(fitted, warned, tmp_path, said):
    record = {"step": 3, "checkpoint": "3", "fit/temperature": fitted}
    evaluate.keep_temperature(tmp_path, "fit", record, "test of digits")
    (file,) = tmp_path.iterdir()
    assert any(f"{file}: {fitted:g} is the limit" in line for line in said) == warned
