# SPDX-License-Identifier: Apache-2.0
"""The command that suggests ways to fine-tune."""

import dataclasses
import shlex

import cv2
import numpy as np
import pytest

from tests.images import encode
from vit_jax import suggest
from vit_jax.checkpoint.pretrained.catalogue import find
from vit_jax.config.load import load_config, parse_overrides
from vit_jax.config.shipped import find_config
from vit_jax.data.sources import find_dataset
from vit_jax.suggest import METHODS, describe_data, expect, main, make_overrides, quote
from vit_jax.utils.errors import UserError

TINY = {"name": "vit", "patch_size": 8, "hidden_size": 32, "num_layers": 1, "num_heads": 2}
TINY |= {"mlp_dim": 64}
SMALL = dataclasses.replace(find("augreg:Ti/16"), image_size=32)
VALIDATION = {"data.split": "train", "evals.val.split": "validation"}
NO_VALIDATION, NO_TEST = {"data.split": "train", "evals.val": None}, {"evals.test": None}


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("birds")
    for name, count in (("owl", 40), ("wren", 5)):
        (folder / name).mkdir()
        for i in range(count):
            image = np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)
            cv2.imwrite(f"{folder}/{name}/{i}.png", image)
    (folder / "owl" / "0.png").write_bytes(b"no image")
    return f"folder:{folder}"


def overrides(method, batch_size=8):
    made = make_overrides(
        method, "folder:x", "augreg:Ti/16", SMALL, batch_size=batch_size, bfloat16=False
    )
    return made | {"model": TINY}


def test_the_data_is_described(birds):
    lines, train = describe_data(find_dataset(birds, data_dir=None))
    text = "\n".join(lines)
    assert train == 35
    assert "cut by the package" in text
    assert "2; from 3 images for training, of 'wren', to 32, of 'owl'" in text
    assert "unbalanced" in text
    assert "30x20 pixels" in text


def test_data_that_tells_nothing_is_described(tmp_path):
    (tmp_path / "train" / "owl").mkdir(parents=True)
    image = tmp_path / "train" / "owl" / "0.png"
    cv2.imwrite(str(image), np.zeros((8, 8, 3), np.uint8))
    lines, _ = describe_data(find_dataset(f"folder:{tmp_path}", data_dir=None))
    assert "1; 1 images for training of each" in "\n".join(lines)
    assert "every prediction is right" in "\n".join(lines)
    image.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of 1 images that were tried can be read"):
        describe_data(find_dataset(f"folder:{tmp_path}", data_dir=None))


def test_a_probe_needs_less_than_adapters_and_these_less_than_all_parameters():
    memory, flops = zip(*(expect(overrides(m), 3, 32) for m in METHODS), strict=True)
    assert memory[0] < memory[1] < memory[2]
    # Forward alone, against forward and two products of as many operations backward, but for the
    # embedding, whose input has no gradient: 16 patches of 192 values, of 8 images.
    embedding = 2 * 8 * 16 * 192 * 32
    np.testing.assert_allclose(flops[2], 3 * flops[0] - embedding, rtol=0.01)
    assert flops[0] < flops[1]


def test_the_commands_can_be_pasted(birds, monkeypatch, capsys):
    monkeypatch.setattr(suggest, "expect", lambda given, *_: (given["data.batch_size"] * 1e9, 1e9))
    main([birds, "--memory_gb=20"])
    out = capsys.readouterr().out
    assert "expected by arithmetic" in out
    commands = [c for c in out.split("\n\n")[1:] if "vit_jax.main" in c]
    assert len(commands) == 3
    for method, command in zip(METHODS, commands, strict=True):
        words = shlex.split(command[command.index("python") :].replace("\\\n", " "))
        given, rest = parse_overrides(words[3:])
        assert rest == ["--config=folder", f"--workdir=runs/finetune_{method.name}"]
        assert given["data.name"] == birds
        assert given["data.batch_size"] == 16  # 32 would not fit 20 GB.
        assert given["model"] == {"name": "vit", "variant": "S/16"}
        for key, value in method.overrides.items():
            assert given[key] == value
        # The config keeps two percent of the 35 images.
        assert f" {round(method.epochs * 34 / 16):,} steps of 16" in command


def test_a_batch_is_no_larger_than_the_images_to_train_on(tmp_path, monkeypatch, capsys):
    for n in range(24):
        (tmp_path / "my birds" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        image = np.zeros((8, 8, 3), np.uint8)
        cv2.imwrite(f"{tmp_path}/my birds/{'ab'[n % 2]}/{n}.png", image)
    monkeypatch.setattr(suggest, "expect", lambda given, *_: (1e9, 1e9))
    main([f"folder:{tmp_path}/my birds", f"--workdir={tmp_path}/my runs/x"])
    out = capsys.readouterr().out
    commands = [c for c in out.split("\n\n") if "vit_jax.main" in c]
    for command in commands:
        words = shlex.split(command[command.index("python") :].replace("\\\n", " "))
        given, rest = parse_overrides(words[3:])
        assert given["data.batch_size"] == 16  # of 20
        assert rest[1].startswith(f"--workdir={tmp_path}/my runs/x_")
    assert len(commands) == 3


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([("train", 99), ("test", 2)], {}),
        ([("train", 99), ("validation", 2)], VALIDATION | NO_TEST),
        ([("train", 99), ("dev", 2), ("test", 2)], VALIDATION),
        ([("train", 9)], NO_VALIDATION | NO_TEST),
        ([("train", 99), ("secret", 2)], NO_TEST),
        ([("", 9)], {}),
        ([("", 2)], NO_VALIDATION),
        ([("", 1)], NO_VALIDATION | NO_TEST),
    ],
)
def test_the_commands_evaluate_on_splits_that_are_there(
    rows, chosen, tmp_path, monkeypatch, capsys
):
    has_splits = bool(rows[0][0])
    lines = ["image,label" + ",split" * has_splits]
    for split, count in rows:
        label, name = ("", "test") if split == "secret" else ("a", split)
        lines += [f"{split}{n}.png,{label}{',' * has_splits}{name}" for n in range(count)]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    for line in lines[1:]:
        (tmp_path / line.partition(",")[0]).write_bytes(encode(9))
    monkeypatch.setattr(suggest, "expect", lambda *_: (1e9, 1e9))
    monkeypatch.setattr(suggest, "measure_product", lambda: 1e9)
    main([f"manifest:{tmp_path}/a.csv"])
    for command in capsys.readouterr().out.split("\n\n")[1:]:
        words = shlex.split(command[command.index("python") :].replace("\\\n", " "))
        given, _ = parse_overrides(words[3:])
        for key in ("data.split", "evals.val.split", "evals.val", "evals.test"):
            assert given.get(key, "config") == chosen.get(key, "config")
        assert ("evals.test.preprocess" in given) == ("evals.test" not in chosen)
        load_config(str(find_config("folder")), given)


def test_values_are_quoted_for_a_shell():
    for text in ("a b", "('x',)", "plain", "it's $HOME", 'a "b"'):
        assert shlex.split(quote(text)) == [text]


def test_data_without_one_class_each_is_refused():
    with pytest.raises(UserError, match="expected a kind and a path"):
        main(["birds"])
