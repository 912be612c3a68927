# SPDX-License-Identifier: Apache-2.0
"""The configs of the package are found by name from any folder."""

from pathlib import Path

import pytest

from vit_jax.config.load import load_config
from vit_jax.config.shipped import find_config, list_configs
from vit_jax.utils.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_all_configs_are_listed_with_a_summary():
    listed = list_configs()
    assert set(listed) == {path.stem for path in CONFIGS.glob("*.py")}
    assert all(text.endswith(".") or ";" in text for text in listed.values())
    assert "handwritten digits" in listed["digits"]


def test_a_name_is_the_same_config_as_its_path():
    assert load_config("digits", {}) == load_config(str(CONFIGS / "digits.py"), {})
    named = load_config("vit:b16,cifar10", {"seed": 3})
    assert named == load_config(f"{CONFIGS / 'vit.py'}:b16,cifar10", {"seed": 3})


def test_a_file_of_the_user_comes_before_a_name(tmp_path):
    (tmp_path / "digits").write_text("")
    assert find_config("digits") == Path("digits")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("configs/digits.py", "did you mean 'digits'?"),
        ("digits.py", "did you mean 'digits'?"),
        ("foldr", "did you mean 'folder'?"),
        ("configs/digit.py", "did you mean 'digits'?"),
        ("config/digits.py", "did you mean 'digits'?"),
        ("configs/digits", "did you mean 'digits'?"),
        ("Digits", "did you mean 'digits'?"),
        ("vit-i1k", "did you mean 'vit_i1k'?"),
        ("zzz", "there is: augreg, cifar10"),
        ("", "there is: augreg"),
    ],
)
def test_another_name_is_refused_with_the_nearest(name, hint):
    with pytest.raises(UserError, match=r"there is no file") as e:
        find_config(name)
    assert hint in str(e.value)
    assert name in str(e.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mine/birds", "did you mean 'mine/birds.py'?"),
        ("mine/bird.py", "did you mean 'mine/birds.py'?"),
        ("mine/digits.py", "did you mean 'digits'?"),
        ("mine", "mine is a folder: give a file, such as mine/birds.py"),
        ("run", "run is a workdir: give the config that it was trained with"),
    ],
)
def test_a_file_of_the_user_may_be_meant_too(name, hint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "birds.py").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    with pytest.raises(UserError, match=r"there is no file") as e:
        find_config(name)
    assert hint in str(e.value)
