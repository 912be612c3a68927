# SPDX-License-Identifier: Apache-2.0
"""The page of a run: what is in its files is on it, and nothing of it is taken for HTML."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from tests.browser import Browser
from tests.html_pages import assert_stands_alone
from vit_jax.checkpoint.workdir import write_run
from vit_jax.evaluators.pixels import draw_examples
from vit_jax.pages import run_page
from vit_jax.pages.run_page import collect_points, find_best, make_report, refresh_report
from vit_jax.utils.layout import REPORT
from vit_jax.utils.palette import color_classes

EVIL = "<script>alert('a&b')</script>"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(8) + (64).to_bytes(4, "big") + (32).to_bytes(4, "big")


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def workdir(tmp_path):
    """A run with all files, and names that are HTML."""
    workdir = tmp_path / "<i>run"
    (workdir / "evals").mkdir(parents=True)
    write_lines(
        workdir / "metrics.jsonl",
        [
            {"step": 2, "train/loss": 2.0, "train/lr": 0.1, "perf/images_per_sec": 10.0},
            {"step": 2, "val/top1": 0.75, "val/loss": 1.0, "val/count": 4, "val/ece": 0.25},
            {"step": 4, "train/loss": float("nan"), "train/lr": 0.05},
            {"step": 4, "val/top1": 0.5, "val/loss": 0.25, "val/count": 4, "val/ece": 0.125},
        ],
    )
    spent = {"step": 6.0, "compile": 2.0, "data_wait": 0.0, "save": 1.0, "evaluation": 1.0}
    write_lines(
        workdir / "ledger.jsonl",
        [
            {
                "event": "start",
                "time": 0,
                "step": 0,
                "total": 4,
                "seconds": dict.fromkeys(spent, 0),
            },
            {"event": "end", "time": 10, "step": 4, "cause": "finished", "seconds": spent},
        ],
    )
    (workdir / "config.json").write_text(json.dumps({"seed": 0, "data": {"name": EVIL}}))
    params = [{"path": "head/kernel", "shape": [3, 2]}, {"path": EVIL, "shape": []}]
    write_run(
        workdir,
        {"versions": {"jax": "1.2"}, "command": f"train {EVIL}", "params": params, "groups": []},
    )
    classes = [{"label": 0, "name": EVIL}, {"label": 1, "name": None}]
    bins = [{"confidence": 0.8, "accuracy": 0.5, "count": 4}]
    details = {"results": {}, "classes": classes, "calibration": bins}
    for step in (4, 12):  # 12 is later, and comes before 4 by name
        (workdir / "evals" / f"val_{step}.json").write_text(json.dumps(details))
        text = f"label,predicted,count\n0,0,{step}\n0,1,1\n"
        (workdir / "evals" / f"val_{step}_confusion.csv").write_text(text)
    return workdir


def test_all_that_is_in_the_files_is_on_the_page_as_text(workdir):
    text = make_report(workdir)
    page = assert_stands_alone(text)
    assert "i" not in page.tags
    # Words of commands are elements of their own.
    shown = re.sub(" +", " ", page.text)
    for words in (
        str(workdir),
        "Step 4 of 4; ended: finished",
        "jax 1.2",
        "Calibration: val, step 12",
        f"{EVIL} taken for 1: 1 of 13",
        "start and compilation, 2\N{NO-BREAK SPACE}s",
        "60.0 %: the share of the time since the first start that went into training steps",
        "ece: expected calibration error: ",
        "7 values",
        "head/kernel",
        f"train {EVIL}",
        f"python -m vit_jax.predict --workdir='{workdir}' IMAGES",
        json.dumps(EVIL),
    ):
        assert words in shown
    assert "step 4 " not in shown.partition("Predictions")[2].partition("Time")[0]


def test_results_are_the_last_and_the_best(workdir):
    cells = [text.strip() for text in assert_stands_alone(make_report(workdir)).texts]
    assert cells[cells.index("val/top1") :][:4] == ["val/top1", "50.00 %", "75.00 %", "2"]
    table = cells.index("metric")
    assert cells[cells.index("val/loss", table) :][:4] == ["val/loss", "0.25", "0.25", "4"]
    assert cells[cells.index("val/ece", table) :][:4] == ["val/ece", "12.50 %", "12.50 %", "4"]
    # The accuracy is at the head of the page.
    assert cells.index("50.00 %") < cells.index("val accuracy, 4 images") < table


def test_classes_of_pixels_and_their_picture_are_on_the_page(workdir):
    rows = [
        {"label": 0, "name": EVIL, "pixels": 1234, "iou": 0.625, "accuracy": 0.75},
        {"label": 1, "name": "sky", "pixels": 0, "iou": None, "accuracy": None},
    ]
    images = [{"image": EVIL, "miou": 0.375}]
    details = {"results": {}, "pixel_classes": rows, "images": images, "confusion": []}
    (workdir / "evals" / "seg_4.json").write_text(json.dumps(details))
    picture = draw_examples(
        [(np.zeros((4, 4, 3), np.uint8), *np.ones((2, 4, 4), np.uint8))],
        lambda *maps: tuple(map(color_classes, maps)),
    )
    (workdir / "evals" / "seg_4.png").write_bytes(picture)
    text = make_report(workdir)
    page = assert_stands_alone(text)
    cells = [cell.strip() for cell in page.texts]
    assert cells[cells.index("62.5 %") :][:3] == ["62.5 %", "75.0 %", "1234"]
    assert "37.5 %" in cells
    assert "Classes of pixels: seg, step 4" in cells
    assert 'alt="picture of seg, step 4"' in text
    (workdir / "evals" / "seg_4.json").write_text(json.dumps(details | {"pixel_classes": [1]}))
    assert "Classes of pixels" not in make_report(workdir)


def test_the_images_with_the_largest_errors_of_depth_are_listed(workdir, said):
    path = workdir / "evals" / "far_4.json"
    images = [{"image": EVIL, "rmse": 1.25}, {"image": "b.png", "rmse": 0.5}]
    details = {"results": {}, "images": images, "pixel_depth": {"pixels": 1234, "images": 2}}
    path.write_text(json.dumps(details))
    text = make_report(workdir)
    cells = [cell.strip() for cell in assert_stands_alone(text).texts]
    assert cells[cells.index("1.250 m") :][:3] == ["1.250 m", "b.png", "0.500 m"]
    assert "Depth: far, step 4" in cells
    assert "1,234 pixels of 2 images have a depth" in text
    path.write_text(json.dumps(details | {"images": [{"image": "a"}]}))
    assert "Depth: far" not in make_report(workdir)
    assert any("far_4.json can't be read" in line for line in said)


def test_what_was_measured_once_is_no_curve(workdir):
    records = [
        {"step": 1, "train/loss": 2.0, "train/lr": 0.1, "train/top1": 0.5},
        {"step": 2, "train/loss": 1.0, "val/top1": 0.75, "val/ece": 0.1},
    ]
    write_lines(workdir / "metrics.jsonl", records)
    for path in (workdir / "evals").iterdir():
        path.unlink()
    page = assert_stands_alone(make_report(workdir))
    assert page.tags.count("svg") == 1  # train/loss
    texts = [text.strip() for text in page.texts]
    once = texts[texts.index("Measured once") :]
    assert [text for text in once if text][4:10] == [
        *("train/top1", "50.00 %", "1"),
        *("train/lr", "0.1", "1"),
    ]


def test_the_page_of_a_long_run_is_small(workdir):
    names = ["train/loss", "train/top1", "perf/images_per_sec", *(f"val/{i}shot" for i in range(9))]
    values = ((step * 7919 % 1000) / 1000 for step in range(10_000))
    records = ({"step": step} | dict.fromkeys(names, value) for step, value in enumerate(values))
    write_lines(workdir / "metrics.jsonl", records)
    text = make_report(workdir)
    assert_stands_alone(text)
    # No more than 402 points of 12 bytes for each curve.
    assert len(text) < 12 * 402 * len(names) + 30_000


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (800, True), (390, False)])
def test_the_page_fits_its_screen_and_its_charts_fill_their_rows(width, dark, workdir, tmp_path):
    program = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    if not os.path.exists(program):
        pytest.skip(f"{program} is missing: install Chromium, or set CHROMIUM to where it is")
    with Browser(program, tmp_path / "browser") as browser:
        for charts in range(1, 8):
            metrics = {f"train/m{i}": 0.5 for i in range(charts)}
            records = [{"step": step} | metrics for step in (1, 2)]
            write_lines(workdir / "metrics.jsonl", records)
            refresh_report(workdir)
            browser.open((workdir / REPORT).as_uri(), width=width, height=900, dark=dark)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            ends = browser.evaluate(
                "[...document.querySelectorAll('.charts')].map(grid => {"
                " const right = x => Math.round(x.getBoundingClientRect().right);"
                " const rows = {};"
                " for (const card of grid.children) rows[card.offsetTop] = right(card);"
                " return [right(grid), ...Object.values(rows)]; })"
            )
            assert [len({*row}) for row in ends] == [1], ends
            heights = browser.evaluate(
                "[...document.querySelectorAll('svg text')].map("
                "text => text.getBoundingClientRect().height)"
            )
            assert all(10 <= height <= 19 for height in heights), (charts, {*heights})


def test_points_are_finite_and_the_best_is_the_first_of_equals():
    records = [
        {"step": 1, "a": 0.5, "s": "x"},
        {"step": 2, "a": float("inf")},
        {"step": 3, "a": 0.5},
    ]
    assert collect_points(records) == {"a": [(1, 0.5), (3, 0.5)]}
    assert find_best("val/top1", [(1, 0.5), (3, 0.5)]) == (1, 0.5)
    assert find_best("val/loss", [(1, 0.5), (3, 0.25)]) == (3, 0.25)


def test_of_many_classes_the_pairs_are_listed(workdir):
    classes = [{"label": i, "name": f"class {i}"} for i in range(51)]
    (workdir / "evals" / "val_12.json").write_text(json.dumps({"classes": classes}))
    page = assert_stands_alone(make_report(workdir))
    assert "rect" not in page.tags
    texts = [text.strip() for text in page.texts]
    assert texts[texts.index("class 0") :][:3] == ["class 0", "class 1", "1"]


def test_a_workdir_with_nothing_in_it_has_a_page(tmp_path):
    page = assert_stands_alone(make_report(tmp_path))
    assert "svg" not in page.tags
    assert "vit_jax.predict" in page.text


def test_the_page_is_replaced_as_a_whole(workdir):
    (workdir / REPORT).write_text("before")
    refresh_report(workdir)
    assert (workdir / REPORT).read_text() == make_report(workdir)
    assert not list(workdir.glob("*.tmp"))


@pytest.mark.parametrize("fault", ["files", "disk"])
def test_what_goes_wrong_is_said_and_ends_nothing(fault, workdir, said, monkeypatch):
    if fault == "files":
        (workdir / "evals" / "val_12.json").write_text("{")
    else:

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(run_page, "write_atomically", fail)
    refresh_report(workdir)
    (line,) = said
    if fault == "files":  # The rest of the page is written.
        assert line.startswith(f"{workdir / 'evals' / 'val_12.json'} can't be read (JSON")
        assert (workdir / REPORT).exists()
    else:
        assert line.startswith(f"{workdir / REPORT} can't be written (")
        assert not (workdir / REPORT).exists()


def test_the_newest_pictures_of_evaluators_are_shown(workdir, said):
    for step in (2, 4, 10, 12, 14, 16):
        (workdir / f"evals/v<b>_{step}.png").write_bytes(PNG)
    (workdir / "evals/broken_4.png").write_bytes(b"no picture")
    (workdir / "evals/other.png").write_bytes(PNG)
    report = make_report(workdir)
    shown = re.findall(r'width="(\d+)" height="(\d+)" alt="picture of ([^"]*)"', report)
    assert shown == [("64", "32", f"v&lt;b&gt;, step {step}") for step in (16, 14, 12, 10)]
    assert any("broken_4.png can't be read (ValueError: it is no PNG): left out" in x for x in said)


def test_what_was_found_in_the_data_is_shown(tmp_path):
    folder = tmp_path / "check"
    folder.mkdir()
    header = "image,split,label,suggested,score,label_probability,suggested_probability,judge\n"
    rows = "".join(f"{i}.png,train,<cat>,dog,0.9,0.05,0.95,classifier\n" for i in range(25))
    (folder / "label_errors.csv").write_text(header + rows + "torn,row\n")
    (folder / "duplicates.csv").write_bytes(b"\xff\xfe")
    Image.new("RGB", (64, 32)).save(folder / "label_errors.png")
    page = make_report(tmp_path)
    assert "Likely label errors: 25" in page
    assert "all are in check/label_errors.csv, of which the first 20 are shown" in page
    assert page.count("&lt;cat&gt;") == 20
    assert 'alt="picture of Likely label errors"' in page
    assert "torn" not in page
