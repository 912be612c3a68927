# SPDX-License-Identifier: Apache-2.0
"""`vit_jax COMMAND`: one entry point for all commands."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vit_jax
from vit_jax import main as main_command
from vit_jax.__main__ import COMMANDS, LISTINGS, main
from vit_jax.checkpoint.pretrained.catalogue import load_catalogue
from vit_jax.checkpoint.pretrained.repositories import load_repositories
from vit_jax.utils.errors import UserError

PACKAGE = Path(vit_jax.__file__).parent


def find_module(name):
    """The module of a command, by its name after `vit_jax.`."""
    is_package = (PACKAGE / Path(*name.split("."))).is_dir()
    return importlib.import_module(f"vit_jax.{name}{'.__main__' * is_package}")


def test_every_module_that_is_a_command_has_a_name():
    modules = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__main__")
        for path in PACKAGE.rglob("*.py")
        if 'if __name__ == "__main__":\n    run' in path.read_text()
    }
    # `launch` starts a job on this machine; the launcher for GKE is for administrators of clusters.
    assert modules - {"__main__", "launch.gke"} == set(COMMANDS.values())


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command_and_what_it_does(argv, capsys):
    main(argv)
    shown = capsys.readouterr().out
    for name in (*COMMANDS, *LISTINGS):
        (line,) = [text for text in shown.splitlines() if text.startswith(f"  {name} ")]
        assert len(line.split()) > 4, line


def test_the_version_is_that_of_the_package(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"{vit_jax.__version__}\n"


def test_a_command_gets_its_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.delitem(sys.modules, "vit_jax.status", raising=False)
    with pytest.raises(SystemExit) as e:
        main(["status", "runs", "--wrong"])
    assert e.value.code == 2
    error = capsys.readouterr().err
    assert "--wrong" in error
    assert "see vit_jax status --help" in error


def test_help_of_a_command_may_be_asked_for_in_front_of_it(capsys):
    with pytest.raises(SystemExit) as e:
        main(["help", "models"])
    assert e.value.code == 0
    assert "usage: vit_jax models" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config=digits"], "`vit_jax train --config=digits`"),
        (["models", "resnet50.a1_in1k"], "timm:NAME"),
        (["models", "augreg:B16x"], "did you mean 'augreg:B/16'?"),
    ],
)
def test_what_is_no_command_and_no_model_is_one_line(argv, words):
    with pytest.raises(UserError) as e:
        main(argv)
    assert words in str(e.value)
    assert len(str(e.value)) < 250


def test_listings_name_configs_and_weights(capsys):
    main(["configs"])
    assert "\n  folder " in capsys.readouterr().out
    main(["configs", "folder"])
    assert "Trains a small ViT from scratch" in capsys.readouterr().out
    main(["models"])
    table, _, rest = capsys.readouterr().out.partition("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == list(load_catalogue())
    assert rest.startswith(f"{len(load_repositories())} more are on the Hugging Face hub")
    assert "DINOv3 (" in rest
    main(["models", "r26"])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    known = [*load_catalogue(), *load_repositories()]
    assert names == [name for name in known if "r26" in name.lower()]
    main(["models", "clip", "336", "apache"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  timm:vit_large_patch14_clip_336.openai ") for line in lines)


# Command lines that need no large library, and their exit codes.
LIGHT = [
    *(([*name.split(), "--help"], 0) for name in ("", *COMMANDS, *LISTINGS)),
    *(([name, "--flga=1"], 2) for name in COMMANDS),
    (["configs"], 0),
    (["models"], 0),
    (["tarin"], 2),
    (["train", "--config=digitz", "--workdir=new"], 2),
    (["evaluate", "none"], 2),
    (["evaluate", "--config=digitz", "--init_from=x"], 2),
    (["predict", "--workdir=none", "photo.png"], 2),
    (["explain", "--workdir=none", "--output=new", "photo.png"], 2),
    (["export", "none", "--to=npz", "--output=new"], 2),
    (["serve", "none"], 2),
    (["report", "none"], 2),
    (["convert", "--workdir=none"], 2),
    (["plan", "--config=digitz", "--topology=cpu:8"], 2),
    (["benchmark", "step", "--config=digitz"], 2),
    (["check", "folder:photos", "--config=digitz"], 2),
    (["status", "run", "--no_verify"], 0),
    (["compare", "run"], 0),
    (["report", "run", "--no_predict"], 0),
]


def test_help_typos_and_reports_on_files_import_no_large_library(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"model": {}, "data": {}, "optimizer": {}}')
    seconds = {"step": 1.0, "compile": 2.0, "data_wait": 0.1, "save": 0.1, "evaluation": 0.1}
    start = {"event": "start", "time": 1.0, "step": 0, "total": 8, "seconds": seconds}
    (run / "ledger.jsonl").write_text(json.dumps(start) + "\n")
    program = (
        "import contextlib, io, json, sys\n"
        "from absl import flags\n"
        "from vit_jax.__main__ import main\n"
        "from vit_jax.utils.command import report_errors\n"
        "large = {'jax', 'flax', 'orbax', 'tensorflow_datasets', 'cv2', 'PIL', 'grain'}\n"
        "for argv, code in json.loads(sys.argv[1]):\n"
        "    found = 0\n"
        "    own = flags.FLAGS.flags_by_module_dict().get('vit_jax train', [])\n"
        "    flags.FLAGS.remove_flag_values([flag.name for flag in own])\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(io.StringIO()), report_errors():\n"
        "            main(argv)\n"
        "    except SystemExit as e:\n"
        "        found = e.code or 0\n"
        "    assert found == code, (argv, found)\n"
        "    assert not large & set(sys.modules), (argv, large & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", program, json.dumps(LIGHT)]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def make_parsers():
    """The parser of each command, by its name; those of sub-commands too."""
    parsers = {"main": main_command.make_parser()}

    class Made(Exception):
        pass

    def keep(self, *_):
        raise Made(self)

    with pytest.MonkeyPatch.context() as patch:
        for method in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, method, keep)
        for name in [*COMMANDS.values(), "launch.gke"]:
            if name != "main":
                with pytest.raises(Made) as made:
                    find_module(name).main([])
                parsers[name] = made.value.args[0]
    parts = next(a for a in parsers["benchmark"]._actions if isinstance(a.choices, dict))
    return parsers | {f"benchmark {part}": sub for part, sub in parts.choices.items()}


PARSERS = make_parsers()


@pytest.mark.parametrize("name", PARSERS)
def test_help_is_in_whole_sentences(name):
    parser = PARSERS[name]
    assert parser.description.partition("\n")[0].endswith("."), "the summary"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        text = action.help or ""
        assert re.fullmatch(r"[A-Z].{8,}\.", text, re.DOTALL), f"{action.dest}: {text!r}"
        # A number that is used unless another is given is stated.
        if type(action.default) in (int, float):
            assert "default" in text, f"{action.dest}: {text!r}"


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("compare", [], ["--format=csv"]),
        ("evaluate", ["--checkpoint=4"], ["--json"]),
        ("export", ["--to=npz"], ["--output=new"]),
        ("explain", ["--output=new"], ["a.png", "b.png"]),
        ("predict", ["--checkpoint=best"], ["a.png", "b.png"]),
        ("report", ["--no_predict"], []),
        ("serve", ["--port=0"], []),
        ("status", ["--json"], []),
    ],
)
def test_a_workdir_is_given_as_it_is_or_by_the_option(name, before, after, tmp_path):
    (tmp_path / "config.json").write_text('{"model": {}, "data": {}, "optimizer": {}}')
    parse = find_module(name).parse_arguments
    workdir = str(tmp_path)
    given = [
        vars(parse([*before, workdir, *after])),
        vars(parse([*before, f"--workdir={workdir}", *after])),
        vars(parse([*before, *after, "--workdir", workdir])),
    ]
    for one in given:
        one.pop("first", None)
    assert given[0] == given[1] == given[2]
    assert given[0].get("workdir", tmp_path) == tmp_path
    assert given[0].get("workdirs", [tmp_path]) == [tmp_path]


def test_every_command_that_reads_a_workdir_takes_it_both_ways():
    by_option, positional = (
        {
            name
            for name, parser in PARSERS.items()
            for action in parser._actions
            if bool(action.option_strings) == is_option and "WORKDIR" in str(action.metavar)
        }
        for is_option in (True, False)
    )
    # `main` finds it without a parser. The workdir that is converted is one kind of SRC.
    assert by_option - {"main", "convert"} == positional
    assert positional >= {"compare", "evaluate", "export", "predict", "report", "serve", "status"}
