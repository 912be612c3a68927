# SPDX-License-Identifier: Apache-2.0
"""Imports only go down the layers, and libraries stay where they belong."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vit_jax"

# From the bottom up: a folder or file imports what is listed before it, and never what is listed
# after it. What stands in one line does not import each other either.
ORDER = (
    ("utils",),
    ("runtime",),
    ("models", "optim", "parallel", "data", "losses"),
    ("observe",),
    ("checkpoint",),
    ("objectives",),
    ("evaluators",),
    ("config",),
    ("pages",),
    ("training",),
    ("planning", "inference"),
)
# What is run as `python -m vit_jax.NAME`, with the folders that belong to one command alone.
COMMANDS = (
    "__main__",
    "benchmark",
    "compare",
    "convert",
    "data.check",
    "data.pack",
    "data.prepare",
    "evaluate",
    "explain",
    "export",
    "find_lr",
    "launch.gke",
    "launch.local",
    "main",
    "plan",
    "predict",
    "report",
    "serve",
    "status",
    "sweep",
)
# The name of the package is for use from Python: it offers what lies anywhere in it.
NOWHERE = ("vit_jax", "vit_jax.launch")
ALLOWED_IN = {
    "ml_collections": ("vit_jax.config", "vit_jax.training", "vit_jax.main"),
    "absl": ("vit_jax.main", "vit_jax.plan", "vit_jax.utils.command"),
    "orbax": ("vit_jax.checkpoint",),
    "tensorflow_datasets": ("vit_jax.data",),
    "grain": ("vit_jax.data",),
    "fastapi": ("vit_jax.serve",),
    "pydantic": ("vit_jax.serve",),
    "starlette": ("vit_jax.serve",),
    "uvicorn": ("vit_jax.serve",),
    "tensorflow": (),
    "torch": (),
}


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str) -> set[str]:
    """The modules of this package, and the full names from other libraries, that one imports."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & FILES.keys()
            found |= modules | ({node.module} if names - modules else set())
    return found


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def command_of(module: str) -> str | None:
    return next((c for c in COMMANDS if within(module, f"vit_jax.{c}")), None)


def level(module: str) -> int:
    if command_of(module):
        return len(ORDER)
    for number, names in enumerate(ORDER):
        if any(within(module, f"vit_jax.{name}") for name in names):
            return number
    raise AssertionError(f"{module} has no place in ORDER or COMMANDS")


def folder(module: str) -> str:
    return command_of(module) or module.split(".")[1]


@pytest.mark.parametrize("module", sorted(FILES.keys() - NOWHERE))
def test_imports_go_down(module):
    for name in imports(module) - {"vit_jax"}:
        if within(name, "vit_jax") and folder(name) != folder(module):
            assert level(name) < level(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", FILES)
def test_libraries_stay_where_they_belong(module):
    for name in imports(module):
        for library, places in ALLOWED_IN.items():
            if within(name, library):
                assert any(within(module, p) for p in places), f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in FILES if within(m, "vit_jax.data")])
def test_data_knows_no_jax(module):
    if not command_of(module):
        assert not {name for name in imports(module) if within(name, "jax")}


@pytest.mark.parametrize("module", [m for m in FILES if within(m, "vit_jax.models")])
def test_models_know_only_jax_flax_and_utils(module):
    for name in imports(module):
        if within(name, "vit_jax"):
            assert within(name, "vit_jax.models") or within(name, "vit_jax.utils")
