# SPDX-License-Identifier: Apache-2.0
"""Names that are not UTF-8, break lines or hold escape sequences: all work is done and written."""

import csv
import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.images import encode
from tests.tiny import tiny_config
from tests.trained import write_model
from vit_jax import compare, explain, predict, report, status
from vit_jax.checkpoint.workdir import read_labels
from vit_jax.config.load import override_config
from vit_jax.data.sources import dataset_info
from vit_jax.inference.model import load_model
from vit_jax.sweep import Trial, write_results
from vit_jax.training.run import train
from vit_jax.utils.command import print_error
from vit_jax.utils.errors import UserError

# By how they are written.
NAMES = {
    r"caf\xe9.png": b"caf\xe9.png",
    r"a\nvit_jax: error: fake.png": b"a\nvit_jax: error: fake.png",
    r"\x1b[31mred\x1b[0m.png": b"\x1b[31mred\x1b[0m.png",
    r"b\r\u202egnp.png": "b\r\u202egnp.png".encode(),
    "ü 日.png": "ü 日.png".encode(),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    (folder / "photos").mkdir()
    for grey, name in enumerate(NAMES.values()):
        with open(os.path.join(os.fsencode(folder / "photos"), name), "wb") as file:
            file.write(encode(grey))
    write_model(folder / "vit.npz")
    return folder


def is_clean(text):
    """Whether all characters are printable, or line breaks, or spaces and joiners of a page."""
    return all(c.isprintable() or c in "\n\u200d\xa0" for c in text)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "npz", "txt"])
def test_predictions_of_all_images_are_written(kind, place, tmp_path, said):
    output = tmp_path / f"out.{kind}"
    embed = ["--embed"] if kind == "npz" else []
    code = predict.main(
        [f"--checkpoint={place / 'vit.npz'}", f"--output={output}", *embed, str(place / "photos")]
    )
    assert code == 0
    if kind in ("csv", "jsonl", "txt"):
        lines = output.read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(NAMES) + (kind == "csv")
        assert all(map(is_clean, lines))
    if kind == "csv":
        found = [row["image"] for row in csv.DictReader(lines)]
    elif kind == "jsonl":
        found = [json.loads(line)["image"] for line in lines]
    elif kind == "parquet":
        found = pq.read_table(output)["image"].to_pylist()
    elif kind == "npz":
        with np.load(output) as arrays:
            found = arrays["image"].tolist()
    else:
        found = [line.partition("  ")[0] for line in lines]
    assert {os.path.basename(name).strip() for name in found} == NAMES.keys()
    assert all(map(is_clean, said))


def test_the_page_of_an_explanation_is_written(place, tmp_path, said):
    explain.main(
        [
            f"--checkpoint={place / 'vit.npz'}",
            f"--output={tmp_path / 'seen'}",
            "--figures=rollout",
            str(place / "photos"),
        ]
    )
    page = (tmp_path / "seen" / "index.html").read_text(encoding="utf-8")
    assert is_clean(page)
    assert r"caf\xe9.png" in page


def test_a_run_on_such_classes_in_such_a_folder_is_whole(data_dir, tmp_path, said):
    root = os.path.join(os.fsencode(tmp_path), b"data\xff\x1b[2J")
    for label, name in enumerate((b"caf\xe9", b"\x1b[31mred", "ü".encode())):
        os.makedirs(os.path.join(root, b"train", name))
        for number in range(4):
            with open(os.path.join(root, b"train", name, b"%d.png" % number), "wb") as file:
                file.write(encode(50 * label + number))
    with open(os.path.join(root, b"train", b"caf\xe9", b"broken\xff\n.png"), "wb") as file:
        file.write(b"no image")
    name = f"folder:{os.fsdecode(root)}"
    assert dataset_info(name, data_dir=None).class_names == (r"\x1b[31mred", r"caf\xe9", "ü")
    workdir = tmp_path / "run\n\x1b[31m"
    line = "decode|resize(8)"
    config = override_config(
        tiny_config(data_dir, evals__val__split="train", total_steps=4).to_dict(),
        {
            "data.name": name,
            "data.preprocess": line,
            "data.batch_size": 8,
            "data.max_corrupt": 0.5,
            "evals.val.preprocess": line,
        },
    )
    with pytest.raises(UserError, match="checkpoints can't be written there: expected UTF-8"):
        train(config, tmp_path / os.fsdecode(b"run\xfe"))
    train(config, workdir)
    assert read_labels(workdir) == (r"\x1b[31mred", r"caf\xe9", "ü")
    files = {path.name for path in workdir.iterdir()}
    assert {"config.json", "run.json", "labels.txt", "metrics.jsonl", "report.html"} <= files
    for file in ("labels.txt", "report.html", "config.json", "run.json", "metrics.jsonl"):
        assert is_clean((workdir / file).read_text(encoding="utf-8"))
    assert all(is_clean(text) for text in said)
    assert any(r"broken\xff\n.png" in text for text in said)
    model = load_model(workdir)
    assert model.class_names == (r"\x1b[31mred", r"caf\xe9", "ü")
    assert not any("can't be written" in text for text in said)


def test_an_error_is_one_line(capsys):
    print_error(UserError(os.fsdecode(b"a\xff\nvit_jax: error: fake\x1b[2J")))
    assert capsys.readouterr().err == "vit_jax: error: a\\xff vit_jax: error: fake\\x1b[2J\n"


EVIL = "x\x1b[31m\nvit_jax: error: made up"
SHOWN = r"x\x1b[31m\nvit_jax: error: made up"


def test_texts_in_files_of_a_run_print_no_lines_of_their_own(tmp_path, capsys):
    seconds = dict.fromkeys(("step", "compile", "data_wait", "save", "evaluation"), 0)
    start = {"event": "start", "time": 1.0, "step": 0, "total": 8, "seconds": seconds}
    ledger = [start, start | {"event": "end", "cause": EVIL}]
    config = {"model": {EVIL: 1}, "data": {"name": EVIL}, "optimizer": {}}
    for name in "ab":
        run = tmp_path / name
        (run / "divergence").mkdir(parents=True)
        (run / "ledger.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ledger))
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, f"val/{EVIL}": 1.0}) + "\n")
        (run / "config.json").write_text(json.dumps(config | {"seed": f"{name}{EVIL}"}))
        rollback = {"to": 1, "past": 2, "reason": EVIL}
        (run / "divergence" / "rollbacks.jsonl").write_text(json.dumps(rollback) + "\n")
    for main, arguments in (
        (status.main, [str(tmp_path / "a")]),
        (status.main, [str(tmp_path / "a"), "--json"]),
        (compare.main, [str(tmp_path / "a"), str(tmp_path / "b")]),
        (compare.main, [str(tmp_path / "a"), str(tmp_path / "b"), "--format=csv"]),
        (compare.main, [str(tmp_path / "a"), str(tmp_path / "b"), "--format=json"]),
    ):
        main(arguments)
        printed = "".join(capsys.readouterr())
        assert "made up" in printed
        assert "\x1b" not in printed
        if "--format=csv" not in arguments:  # Quoted cells of CSV may have several lines.
            assert not any(line.startswith("vit_jax: error") for line in printed.splitlines())
    report.main([f"--workdir={tmp_path / 'a'}", "--no_predict"])
    page = (tmp_path / "a" / "report.html").read_text()
    assert "\x1b" not in page
    assert SHOWN in page
    trials = [Trial("a", {}, (), config), Trial("b", {}, (), config)]
    lines = write_results(trials, {"a": {"status": EVIL}}, tmp_path, metric=None)
    assert SHOWN in "".join(lines)
    assert not any("\n" in line or "\x1b" in line for line in lines)
