# SPDX-License-Identifier: Apache-2.0
"""Commands in the documentation: where they stand, what they need, how to check and run them.

A comment before a block says why it can't be run in a test (`<!-- needs: network, data -->`), or
what is added to its training commands there (`<!-- test: --config.total_steps=10 -->`). All others
are run as they stand, page by page.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import inspect
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from absl import flags
from absl.testing import flagsaver

from vit_jax import main as main_command
from vit_jax.__main__ import COMMANDS, LISTINGS
from vit_jax.checkpoint.manager import CheckpointOptions
from vit_jax.checkpoint.pretrained.adapt import adapt_params
from vit_jax.config.load import load_config, override_config, parse_overrides
from vit_jax.config.schema import Data, EvalData, Resume, top_level
from vit_jax.evaluators.kinds import EVALUATORS
from vit_jax.models.variants import MODELS, TOWER_MAKERS
from vit_jax.objectives.kinds import OBJECTIVES
from vit_jax.observe.profiler import Profile
from vit_jax.observe.trackers import Tracking
from vit_jax.optim.base_optimizers import BASE_OPTIMIZERS
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.optim.sam import Sam
from vit_jax.parallel.mesh import make_mesh
from vit_jax.parallel.sharding import Strategy
from vit_jax.runtime.watchdog import Limits
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import keywords

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# What a block may need that a test has not.
NEEDS = {
    "network": "an address elsewhere",
    "install": "packages that are installed by it, or before",
    "data": "images of the reader's",
    "weights": "checkpoints of the reader's",
    "accelerator": "a GPU or TPUs",
    "gpu-plan": "the compiler for GPUs",
    "tpu": "the compiler for TPUs",
    "cluster": "machines that are rented",
    "time": "hours",
}
_FENCE = re.compile(r"^```(\w*)$")
_MARK = re.compile(r"^<!-- (needs|test): (.*) -->$")
_SHELL = ("bash", "console")
# A block of no language whose lines start so is one of commands too.
_COMMANDS = ("python", "make", "pip", "source", "find", "mkdir", "cp", "git", "docker", "sbatch")
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
_INLINE = re.compile(r"`(python -m (?:vit_jax|tools|benchmarks)[^`]*)`")
# In those tables, `section.key`; other names with a dot are modules and files.
_TABLE_KEY = re.compile(r"(?!vit_jax)[a-z]+\.(?!py$|txt$|jsonl?$|npz$)[\w.]+")
_OPERATORS = {"|", "||", "&&", ";", "&", "(", ")"}
# Folders and files of the reader's.
_ELSEWHERE = ("folder:", "hf:", "pairs:", "manifest:", "parquet:", "packed:", "raw:", "tar:")
_EPOCH = 50_000


@dataclasses.dataclass(frozen=True)
class Block:
    """Lines of a page that a reader may run."""

    page: Path
    line: int
    language: str
    text: str
    needs: tuple[str, ...] = ()
    test: str = ""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def is_shell(self) -> bool:
        first = [line.split(" ")[0] for line in self.text.splitlines() if line]
        return self.language in _SHELL or (not self.language and bool({*first} & {*_COMMANDS}))

    @property
    def module(self) -> str | None:
        """The name of the file that the block is, by its first line."""
        first = re.match(r"# (\w+\.py)\n", self.text)
        return first[1] if first and self.language == "python" else None

    @property
    def is_program(self) -> bool:
        return self.language == "python" and "import vit_jax" in self.text


def read_blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, with the marks before them."""
    blocks, marks, start, language = [], {}, None, ""
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if start is None and (mark := _MARK.match(line)):
            marks[mark[1]] = mark[2]
        elif start is None and fence:
            start, language = number, fence[1]
        elif start is not None and line == "```":
            needs = tuple(filter(None, marks.get("needs", "").split(", ")))
            text = "\n".join(lines[start : number - 1])
            blocks.append(Block(page, start, language, text, needs, marks.get("test", "")))
            marks, start = {}, None
        elif start is None and line:
            assert not marks, f"{page.name}:{number}: {marks} stands before no block"
    return blocks


def write_modules(page: Path, folder: Path) -> None:
    """Writes the modules that a page shows into a folder."""
    for block in read_blocks(page):
        if block.module:
            (folder / block.module).write_text(f"{block.text}\n")


def inline_commands(page: Path) -> list[str]:
    """Commands within sentences and tables."""
    prose, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        inside ^= line.startswith("```")
        prose.append("" if inside else line)
    return _INLINE.findall("\n".join(prose).replace("\\|", "|"))


def split_commands(text: str) -> list[list[str]]:
    """The words of each command: of pipelines each part, without comments and assignments.

    What is given to a command by `<<'END'` has to be Python, and is compiled.
    """
    lines, commands = iter(text.replace("\\\n", " ").splitlines()), []
    for line in lines:
        here = re.search(r" <<'(\w+)'$", line)
        if here:
            body = iter(lines.__next__, here[1])
            compile("\n".join(body), "<<", "exec")
            line = line[: here.start()]
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word not in _OPERATORS:
                command.append(word)
                continue
            while command and _ASSIGNMENT.fullmatch(command[0]):
                del command[0]
            if command:
                commands.append(command)
            command = []
    return commands


def check_command(
    words: Sequence[str], workdirs: Mapping[str, str], *, partial: bool = False
) -> None:
    """Fails unless the command, its flags, its config and the config's keys exist.

    Args:
      words: of the command.
      workdirs: config by workdir, for commands that know their config by that.
      partial: whether required arguments may be left out, as in a sentence.
    """
    program, *arguments = words
    if program == "vit_jax" and arguments[0] in COMMANDS:
        program, arguments = "python", ["-m", f"vit_jax.{COMMANDS[arguments[0]]}", *arguments[1:]]
    if program == "vit_jax":
        assert arguments[0] in LISTINGS, f"vit_jax has no command {arguments[0]}"
    elif program == "python" and arguments[:1] == ["-m"]:
        given = [a for a in arguments[2:] if a != "..."]
        try:
            _check_module(arguments[1], given, workdirs)
        except UserError as e:
            if not (partial and "are required" in str(e)):
                raise
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        named = [a for a in arguments if "=" not in a and not a.startswith("-")]
        assert {*named} <= {*targets}, f"make has no {named}"
    elif program in ("pip", "docker"):
        text = (ROOT / "setup.py").read_text()
        for extras in re.findall(r"\[([\w,-]+)\]'?$", " ".join(arguments)):
            for extra in extras.split(","):
                assert f'"{extra}": [' in text, f"there is no extra {extra}"
    elif program == "sbatch" or program.startswith("launch/"):
        (script,) = (w for w in words if w.startswith("launch/"))
        assert (ROOT / script).is_file(), f"there is no {script}"
        behind = arguments if program != "sbatch" else words[words.index(script) + 1 :]
        flagged = [a for a in behind if a.startswith("--") and a != "--spot"]
        if "=" in " ".join(flagged):
            _check_module("vit_jax.main", flagged, workdirs)
    else:
        known = (
            "source",
            "find",
            "mkdir",
            "cp",
            "cd",
            "git",
            "python",
            "xpk",
            "kubectl",
            "ls",
            "curl",
            "hf",
            "kill",
        )
        assert program in known, f"{program}: unknown here"


def find_workdirs(words: Sequence[str]) -> dict[str, str]:
    """The config of the workdir that a training command names."""
    if words[:3] != ["python", "-m", "vit_jax.main"]:
        return {}
    given = dict(w.split("=", 1) for w in words if w.startswith(("--config=", "--workdir=")))
    return {given["--workdir"]: given["--config"]} if len(given) == 2 else {}


class _Parsed(Exception):
    """Carries what a parser made of the arguments."""

    def __init__(self, namespace: argparse.Namespace):
        super().__init__()
        self.namespace = namespace


def _check_module(name: str, arguments: list[str], workdirs: Mapping[str, str]) -> None:
    assert importlib.util.find_spec(name), f"there is no module {name}"
    if name == "vit_jax.main":
        _check_training(arguments)
        return
    if importlib.util.find_spec(name).submodule_search_locations:
        name += ".__main__"
    module = importlib.import_module(name)
    overrides, _ = parse_overrides(arguments)
    args = _parse(module, arguments)
    if hasattr(args, "train") and isinstance(args.train, list):  # of a launcher
        _check_training([a for a in args.train if a != "..."])
    elif name in ("vit_jax.predict", "vit_jax.search", "vit_jax.explain"):
        for key in overrides:
            assert knows(key), f"--config.{key}: there is no such key"
    elif overrides:
        config = getattr(args, "config", None) or workdirs[str(args.workdir)]
        build(config, overrides)
    elif getattr(args, "config", None) not in (None, "..."):
        build(args.config, {})


def _parse(module: Any, arguments: list[str]) -> argparse.Namespace:
    """What the command's own parser says of its arguments, and nothing done."""
    if not hasattr(module, "main") or "Parser(" not in inspect.getsource(module):
        assert not arguments, f"{module.__name__} takes no arguments"
        return argparse.Namespace()
    with contextlib.ExitStack() as stack:
        for method in ("parse_args", "parse_intermixed_args"):
            original = getattr(argparse.ArgumentParser, method)

            def parse(self, args=None, namespace=None, original=original):
                raise _Parsed(original(self, args, namespace))

            stack.enter_context(mock.patch.object(argparse.ArgumentParser, method, parse))
        stack.enter_context(mock.patch.object(sys, "argv", [module.__name__, *arguments]))
        try:
            module.main(*[arguments] * bool(inspect.signature(module.main).parameters))
        except _Parsed as parsed:
            return parsed.namespace
    raise AssertionError(f"{module.__name__} parsed nothing")


def _check_training(arguments: list[str]) -> None:
    overrides, _ = parse_overrides(arguments)
    given = {a.partition("=")[0] for a in arguments}
    missing = {"--workdir": "runs/any", "--config": "configs/folder.py"}
    words = [*arguments, *(f"{k}={v}" for k, v in missing.items() if k not in given)]
    with flagsaver.flagsaver():
        main_command.parse_flags(["vit_jax.main", *words])
        config = flags.FLAGS.config
    if config != "...":
        build(config, overrides)


def build(config: str, overrides: Mapping[str, Any]) -> None:
    """Builds the experiment, with black images where the reader has images.

    Raises:
      UserError: it can't be built.
    """
    path = str(ROOT / config) if "/" in config else config
    made = override_config(load_config(path, {}).to_dict(), dict(overrides)).to_dict()
    data = made["data"]
    if str(data.get("name")).startswith(_ELSEWHERE):
        data["name"] = "blank:1000"
    if str(data.get("name")).startswith("masks:"):
        data["name"] = "digits_masks:64"
    if data.get("mixture"):
        data["mixture"] = tuple(("blank:1000", split, w) for _, split, w in data["mixture"])
    for section in filter(None, made.get("evals", {}).values()):
        if str(section.get("data_name")).startswith(_ELSEWHERE):
            section["data_name"] = "blank:1000"
    Experiment.from_config(made, epoch_examples=_EPOCH)


def knows(key: str) -> bool:
    """Whether there is a key of this name in some config; `evals.NAME.KEY` for any name."""
    section, _, rest = key.partition(".")
    if section == "evals" and "." in rest:
        return _fits(rest.partition(".")[2], EvalData, *EVALUATORS.values())
    if not rest:
        return section.startswith("log_every_") or _fits(section, top_level)
    if key.startswith("optimizer.sam."):
        return _fits(rest.partition(".")[2], Sam)
    part, _, inner = rest.partition(".")
    if section == "model" and part in TOWER_MAKERS and inner:
        return _fits(inner, TOWER_MAKERS[part])
    constructors = {
        "adapt": [adapt_params],
        "checkpoint": [CheckpointOptions],
        "data": [Data],
        "mesh": [make_mesh, Strategy],
        "model": MODELS.values(),
        "objective": OBJECTIVES.values(),
        "optimizer": [make_optimizer, *BASE_OPTIMIZERS.values()],
        "profile": [Profile],
        "resume": [Resume],
        "tracking": [Tracking],
        "watchdog": [Limits],
    }
    if section == "mesh" and rest in ("rules", "dcn.data", "dcn.fsdp", "dcn.tensor"):
        return True
    return section in constructors and _fits(rest, *constructors[section])


def _fits(key: str, *constructors: Any) -> bool:
    return key == "name" or any(
        key in keywords(fn)
        or re.sub(r"^every_(epochs|examples|percent)$", "every", key) in keywords(fn)
        for fn in constructors
    )


def named_keys(page: Path) -> Iterator[str]:
    """Keys that prose and tables name, as `--config.data.name=x` or `config.data.name`.

    In tables that begin with another project's names, only what stands in later columns.
    """
    inside = False
    for line in page.read_text(encoding="utf-8").splitlines():
        inside ^= line.startswith("```")
        if inside:
            continue
        if page.name.startswith("from_") and line.startswith("|"):
            line = "|".join(line.replace("\\|", "¦").split("|")[2:])
        for span in re.findall(r"`([^`]+)`", line):
            for key in re.findall(r"(?:^| )(?:--)?config\.([\w.]*\w)(?![\w.])", span):
                if key != "json" and not key.endswith("KEY"):
                    yield key
            if page.name.startswith("from_") and _TABLE_KEY.fullmatch(span):
                yield span


def add_overrides(block: Block) -> str:
    """The script of a block, with what its mark adds to training commands."""
    lines = block.text.replace("\\\n", " ").splitlines()
    for i, line in enumerate(lines):
        if block.test and re.search(r"^\S*\s?python -m vit_jax\.main", line):
            lines[i] = f"{re.sub(r' #.*$', '', line)} {block.test}"
    return "\n".join(lines)
