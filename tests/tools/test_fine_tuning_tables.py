# SPDX-License-Identifier: Apache-2.0
"""The tables in the documentation are those of the results in the repository."""

import csv
import json

import pytest

from benchmarks.fine_tuning import choose_wise, make_tables, write_manifests
from tools.fine_tuning_tables import PAGE, make_text, renew


def row(method, test, corrupted, *, val=0.5, **more):
    scores = {"val/top1": val, "test/top1": test, "corrupted/top1": corrupted}
    return {"method": method, **more, **scores}


COSTS = {"trained": 1234, "checkpoint_bytes": 2_500_000, "core_seconds": 10.4}
ROWS = [
    row("probe", 0.8, 0.5, seed=0, **COSTS),
    row("probe", 0.9, 0.7, seed=1, **COSTS),
    row("wise", 0.8, 0.6, seed=0, alpha=0.0, val=0.7),
    row("wise", 0.9, 0.4, seed=0, alpha=1.0, val=0.8),
    row("wise", 0.8, 0.8, seed=1, alpha=0.0, val=0.7),
    row("wise", 0.7, 0.6, seed=1, alpha=1.0, val=0.7),
    row("uniform", 0.95, 0.75),
]


def test_the_documentation_has_the_newest_results():
    text = PAGE.read_text(encoding="utf-8")
    assert renew(text) == text


def test_tables_have_means_and_ranges():
    lines = make_tables({"rows": ROWS}).splitlines()
    assert (
        "| linear probe | 1,234 | 2.50 MB | 10 | 85.0 % (80.0 % to 90.0 %) "
        "| 60.0 % (50.0 % to 70.0 %) |" in lines
    )
    assert "| mean of the runs of all parameters | | | | 95.0 % | 75.0 % |" in lines
    assert "| share of the fine-tuned weights | 0 | 1 |" in lines
    assert "| test | 80.0 % | 80.0 % |" in lines
    assert "| corrupted | 70.0 % | 50.0 % |" in lines


def test_the_point_of_the_interpolation_is_the_best_on_val():
    assert [(r["seed"], r["alpha"]) for r in choose_wise(ROWS)] == [(0, 1.0), (1, 1.0)]


def test_text_is_of_the_tasks_that_have_results(tmp_path):
    assert make_text(tmp_path) == ""
    record = {"rows": ROWS, "machine": {"cores": 2, "cpu": "a CPU"}}
    (tmp_path / "fine_tuning_digits.json").write_text(json.dumps(record))
    text = make_text(tmp_path)
    assert "Digits, from 16 x 16 to 32 x 32 pixels" in text
    assert "2 seeds, 2 cores of a CPU" in text
    assert "CIFAR" not in text


def test_classes_of_pre_training_and_of_fine_tuning_are_disjoint(tmp_path):
    for split, label, name in [
        ("train", "ship", "1"),
        ("train", "cat", "2"),
        ("test", "cat", "1"),
        ("train", "dog", "1"),
    ]:
        file = tmp_path / "images" / split / label / f"{name}.jpg"
        file.parent.mkdir(parents=True)
        file.touch()
    files = write_manifests(tmp_path / "images", tmp_path)
    rows = {name: list(csv.DictReader(file.open())) for name, file in files.items()}
    assert [(r["label"], r["split"]) for r in rows["pretrain"]] == [("ship", "train")]
    found = [(r["label"], r["split"]) for r in rows["fine_tune"]]
    assert found == [("cat", "test"), ("dog", "train"), ("cat", "train")]
    with pytest.raises(SystemExit, match="has no train/CLASS/IMAGE"):
        write_manifests(tmp_path / "none", tmp_path)
