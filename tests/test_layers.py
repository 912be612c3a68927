# SPDX-License-Identifier: Apache-2.0
"""Imports only go down the layers, and libraries stay where they belong."""

import ast
import sys
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
    "average",
    "find_lr",
    "launch.gke",
    "launch.local",
    "main",
    "plan",
    "predict",
    "report",
    "search",
    "serve",
    "status",
    "suggest",
    "sweep",
)
# The name of the package is for use from Python: it offers what lies anywhere in it.
NOWHERE = ("vit_jax", "vit_jax.launch")
ALLOWED_IN = {
    "ml_collections": ("vit_jax.config", "vit_jax.training", "vit_jax.main"),
    "absl": ("vit_jax.main", "vit_jax.plan", "vit_jax.utils.command"),
    "orbax": ("vit_jax.checkpoint",),
    "tensorstore": ("vit_jax.utils.buckets",),
    "tensorflow_datasets": ("vit_jax.data",),
    "grain": ("vit_jax.data",),
    "fastapi": ("vit_jax.serve",),
    "pydantic": ("vit_jax.serve",),
    "starlette": ("vit_jax.serve",),
    "uvicorn": ("vit_jax.serve",),
    "ftfy": ("vit_jax.data.tokenizers",),
    "sentencepiece": ("vit_jax.data.tokenizers",),
    "tokenizers": ("vit_jax.data.tokenizers",),
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


def imports_at_once(module: str) -> set[str]:
    """What importing a module imports: not what its functions do, nor what only types need."""
    found = set()
    todo: list[ast.AST] = [ast.parse(FILES[module].read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return found


def find_path(module: str, seen: dict[str, str]) -> dict[str, str]:
    """The libraries that importing a module imports, each with the module that does."""
    libraries = {}
    parts = module.split(".")
    own = {module, *(".".join(parts[:n]) for n in range(1, len(parts)))} & FILES.keys()
    for name in sorted(own - seen.keys()):
        seen[name] = module
        for found in imports_at_once(name):
            if within(found, "vit_jax"):
                libraries |= find_path(found, seen)
            elif found.partition(".")[0] not in sys.stdlib_module_names:
                libraries.setdefault(found.partition(".")[0], name)
    return libraries


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses_its_arguments_without_large_libraries(command):
    module = f"vit_jax.{command}"
    module = f"{module}.__main__" if f"{module}.__main__" in FILES else module
    libraries = find_path(module, {})
    # NumPy is imported in a tenth of a second, JAX, TFDS and OpenCV in some seconds.
    light = {"absl", "rich", "ml_collections", "numpy"}
    assert not {library: by for library, by in libraries.items() if library not in light}


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
