# SPDX-License-Identifier: Apache-2.0
"""Writes what each config trains and reaches into the documentation, from the configs themselves.

python -m tools.recipes

A config's docstring is its first line, the command and what to expect; it is taken as it is.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from vit_jax.config.load import load_config
from vit_jax.utils.durations import LENGTH

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
PAGE = ROOT / "docs" / "recipes.md"
START, END = "<!-- made by tools/recipes.py -->\n", "<!-- end -->\n"

_WORDS = {"total_steps": "steps", "epochs": "epochs", "examples": "examples"}
# What a sentence with a result has.
_RESULT = re.compile(r"\d\d(\.\d+)? %")
_SENTENCE = re.compile(r"\n\n|(?<=\.)\s(?=[A-Z])")
# What is code in a docstring, where nothing marks it: flags, files and keys.
_CODE = re.compile(
    r"(?<![\w`/.])(--config\.[^\s]*[^\s.,;:)]"
    r"|[\w/]+\.py(?::[\w/@+,=.]*[\w/])?"
    r"|(?:data|optimizer|model|objective|evals|checkpoint)\.[\w.]*\w(?:='[^']*')?)"
)
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")
_PAGE = re.compile(r"\(docs/(\w+\.md)\)")
_GITHUB = re.compile(r"(?<![\w/])github\.com/[\w/-]*[\w-]")


def renew(text: str) -> str:
    """Returns the page with the text between the two marks replaced."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{''.join(make_page())}{END}{after}"


def make_page() -> Iterator[str]:
    """A table of all configs, then a section for each."""
    files = sorted(CONFIGS.glob("*.py"))
    yield "| config | what it does | length | images a step | what to expect |\n"
    yield "| --- | --- | --- | ---: | --- |\n"
    for file in files:
        title, _, prose = read_docstring(file)
        length, batch_size = _describe_length(file)
        results = [s for s in _SENTENCE.split(prose) if _RESULT.search(s)]
        link = f"[`{file.name}`](#{file.name.replace('.', '')})"
        yield f"| {link} | {_mark_up(title.partition(';')[0].rstrip('.'))} | {length} | "
        yield f"{batch_size:,} | {_mark_up(' '.join(' '.join(results).split()))} |\n"
    for file in files:
        title, command, prose = read_docstring(file)
        mark = "<!-- needs: data, accelerator, time -->\n"
        if file.stem.startswith("digits"):
            mark = "<!-- test: --config.total_steps=10 --config.optimizer.warmup_steps=2 -->\n"
        if file.stem == "digits":  # Tests have it trained to its end for all pages.
            mark = ""
        yield f"\n## `{file.name}`\n\n{_mark_up(title)}\n\n{mark}"
        yield f"```bash\n{command}\n```\n\n{_mark_up(prose)}\n"


def read_docstring(file: Path) -> tuple[str, str, str]:
    """Its first paragraph, the commands, and the rest."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    title, command, *prose = text.split("\n\n")
    if not command.startswith("python -m vit_jax."):
        raise ValueError(f"{file}: expected a first line, a paragraph of commands, and the rest")
    # Python joins lines that end with a backslash.
    return title, re.sub(" {4,}", " \\\\\n    ", command), "\n\n".join(prose)


def _describe_length(file: Path) -> tuple[str, int]:
    config = load_config(str(file), {}).to_dict()
    key = next(key for key in LENGTH if config.get(key) is not None)
    return f"{config[key]:,} {_WORDS[key]}", config["data"]["batch_size"]


def _mark_up(text: str) -> str:
    """Markdown of plain text: code and links, outside of what is code already."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        part = _CODE.sub(r"`\1`", parts[i])
        part = _PAGE.sub(r"([\1](\1))", part)
        part = _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", part)
        parts[i] = _GITHUB.sub(r"[\g<0>](https://\g<0>)", part)
    return "`".join(parts)


if __name__ == "__main__":
    PAGE.write_text(renew(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
