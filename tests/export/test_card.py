# SPDX-License-Identifier: Apache-2.0
"""The card of an exported model, and its way to the hub."""

import json
import sys
import types

import pytest

from tests.trained import NAMES, write_model, write_run
from vit_jax.export.__main__ import main
from vit_jax.export.card import _without_paths
from vit_jax.export.signature import without_folders
from vit_jax.utils.errors import UserError
from vit_jax.utils.text import describe_size


@pytest.fixture(scope="module")
def place(tmp_path_factory, data_dir):
    """A folder with a run in `digits`, and the weights of a model in `vit.npz`."""
    folder = tmp_path_factory.mktemp("card")
    write_model(folder / "vit.npz", classes=0)
    workdir, _, _ = write_run(folder / "digits", data_dir)
    with (workdir / "metrics.jsonl").open("a") as file:
        record = {"step": 8, "train/loss": 1.0, "val/loss": 0.25, "val_ema/top1": 0.625}
        file.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture
def hub(monkeypatch):
    """Stands for huggingface_hub; gives the calls that it saw."""
    calls = []

    class HfApi:
        def create_repo(self, repo, **options):
            calls.append((repo, options))

        def upload_folder(self, *, folder_path, repo_id, commit_message):
            if repo_id == "me/refused":
                raise ConnectionError("403 Forbidden\nrequest id 1")
            calls.append((repo_id, folder_path, commit_message))
            return types.SimpleNamespace(commit_url=f"https://hub.test/{repo_id}")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
    return calls


def export(place, output, *arguments):
    main([f"--workdir={place / 'digits'}", "--to=npz", f"--output={output}", *arguments])


def read_card(folder):
    """The fields of the front matter, and the text below."""
    start, fields, text = (folder / "README.md").read_text().split("---\n", 2)
    assert start == ""
    pairs = (line.split(": ", 1) for line in fields.splitlines())
    return {key: json.loads(value) for key, value in pairs}, text


def test_the_card_says_what_the_hub_asks_for_and_how_good_the_model_is(place, said, tmp_path):
    export(place, tmp_path / "out", "--license=mit", "--name=vit-digits")
    fields, text = read_card(tmp_path / "out")
    assert (fields["license"], fields["library_name"]) == ("mit", "vit_jax")
    assert fields["pipeline_tag"] == "image-classification"
    assert fields["datasets"] == ["digits"]
    (index,) = fields["model-index"]
    (result,) = index["results"]
    assert index["name"] == "vit-digits"
    assert result["dataset"] == {"name": "digits", "type": "digits", "split": "test[:50]"}
    assert result["metrics"] == [{"type": "accuracy", "name": "val top-1", "value": 0.5}]
    # Of this step alone, and of these parameters.
    assert "| val | digits, test[:50] | top1 | 0.5 |" in text
    assert "| val | digits, test[:50] | loss | 0.25 |" in text
    assert "0.75" not in text
    assert "0.625" not in text
    assert "- optimizer: adamw, learning rate 0.01" in text
    assert "- steps: 8 of 8" in text
    assert 'vit_jax.load_model("model.npz")' in text
    assert "`digits/checkpoints/8`" in text
    assert str(place) not in text
    assert '"hidden_size": 16' in text
    assert (tmp_path / "out" / "labels.txt").read_text().splitlines() == list(NAMES)


def test_of_the_average_its_own_results_are_shown(place, said, tmp_path):
    export(place, tmp_path / "out", "--params=ema")
    fields, text = read_card(tmp_path / "out")
    assert fields["license"] == "unknown"
    assert "| val | digits, test[:50] | top1 | 0.625 |" in text
    assert "the average of its parameters" in text
    assert "Not stated: ask" in text


def test_a_file_has_a_card_without_what_is_not_known(place, said, tmp_path):
    source = f"--checkpoint={place / 'vit.npz'}"
    main([source, "--to=npz", f"--output={tmp_path / 'out'}"])
    fields, text = read_card(tmp_path / "out")
    assert fields["pipeline_tag"] == "image-feature-extraction"
    assert "datasets" not in fields
    assert "model-index" not in fields
    assert "No evaluation of these parameters is known." in text
    assert "## Training" not in text


def test_without_yes_it_is_only_said_what_would_go_to_the_hub(place, said, hub, tmp_path):
    export(place, tmp_path / "out", "--push=me/vit-digits", "--private")
    assert not hub
    (head,) = [line for line in said if line.startswith("would upload to me/vit-digits")]
    assert "private if it is new: 4 files, " in head
    size = (tmp_path / "out" / "model.npz").stat().st_size
    assert f"  model.npz ({describe_size(size)})" in said
    assert said[-1] == "nothing is uploaded; add --yes to do it"
    assert read_card(tmp_path / "out")[1].startswith("\n# vit-digits\n")


def test_with_yes_the_folder_goes_to_the_hub(place, said, hub, tmp_path):
    output = tmp_path / "out"
    export(place, output, "--push=me/vit-digits", "--yes")
    assert hub == [
        ("me/vit-digits", {"private": False, "exist_ok": True}),
        ("me/vit-digits", str(output), "Export by vit_jax"),
    ]
    assert any(line.endswith(": https://hub.test/me/vit-digits") for line in said)


def test_what_the_hub_refuses_is_one_line_and_the_folder_stays(place, said, hub, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(UserError) as error:
        export(place, output, "--push=me/refused", "--yes")
    assert str(error.value).startswith("--push=me/refused: 403 Forbidden; ")
    assert str(error.value).endswith(f"hf upload me/refused {output}")
    assert (output / "model.npz").exists()


def test_bad_targets_are_refused_before_anything_is_written(place, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for arguments, message in (
        (["--push=digits"], "--push=digits: expected USER/NAME"),
        (["--yes"], "--yes and --private are of --push=USER/NAME, which is missing"),
        (["--push=me/digits", "--yes"], r"needs huggingface_hub: pip install 'vit_jax\[hub\]'"),
    ):
        with pytest.raises(UserError, match=message):
            export(place, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/birds", "birds"),
        ("~/birds", "birds"),
        ("~me/birds", "birds"),
        ("../me/birds", "birds"),
        ("./birds", "birds"),
        ("decode|my_op('/home/me/mean.npy', 3)|flip_lr", "decode|my_op('mean.npy', 3)|flip_lr"),
        ("siglip:/home/me/x.npz:img", "siglip:x.npz:img"),
        ("https://example.org/a/b.npz", "https://example.org/a/b.npz"),
        ("gs://bucket/a.npz", "gs://bucket/a.npz"),
        ("augreg:B/16", "augreg:B/16"),
        ("val/top1", "val/top1"),
        ("embedding/.*", "embedding/.*"),
        (".*/kernel", ".*/kernel"),
        ("imagenet2012:5.*.*", "imagenet2012:5.*.*"),
        ("a\nb", r"a\nb"),
    ],
)
def test_paths_of_the_machine_become_their_last_part(text, expected):
    assert without_folders(text) == expected


def test_a_config_is_shown_without_folders():
    config = {
        "data": {"name": "folder:/home/me/birds", "data_dir": "/data/me"},
        "mixture": [["manifest:work/me/rows.csv", "train", 1.0], ["parquet:~/p", "train", 1.0]],
        "evals": {"val": {"data_name": "packed:../me/pack", "real_json": "~/me/real.json"}},
        "objective": {"teacher": "runs/me/teacher", "class_weights": "/home/me/weights.txt"},
        "init_from": "runs/me/first",
        "model": {"variant": "B/16"},
    }
    shown = _without_paths(config)
    assert shown["data"] == {"name": "folder:birds", "data_dir": "me"}
    assert [source[0] for source in shown["mixture"]] == ["manifest:rows.csv", "parquet:p"]
    assert shown["evals"]["val"] == {"data_name": "packed:pack", "real_json": "real.json"}
    assert shown["objective"] == {"teacher": "teacher", "class_weights": "weights.txt"}
    assert shown["model"] == config["model"]
    assert "/me" not in json.dumps(shown)
