# SPDX-License-Identifier: Apache-2.0
"""Imports only go down the layers, and libraries stay where they belong."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vit_jax"

# The first prefix that fits a module decides. Lower layers know nothing of higher ones.
LAYERS = {
    "vit_jax.utils": 0,
    "vit_jax.models": 1,
    "vit_jax.losses": 1,
    "vit_jax.optim": 1,
    "vit_jax.parallel": 1,
    # Commands, which write to the screen.
    "vit_jax.data.check": 4,
    "vit_jax.data.pack": 4,
    "vit_jax.data.prepare": 4,
    "vit_jax.data": 1,
    "vit_jax.objectives": 2,
    "vit_jax.evaluators": 2,
    "vit_jax.checkpoint": 2,
    "vit_jax.observe": 2,
    "vit_jax.precision": 2,
    "vit_jax.state": 2,
    "vit_jax.workdir": 2,
    "vit_jax.experiment": 3,
    "vit_jax.planning": 3,
    "vit_jax.inference": 3,
    "vit_jax.train": 3,
    "vit_jax.benchmark": 4,
    "vit_jax.main": 4,
    "vit_jax.plan": 4,
    "vit_jax.convert": 4,
    "vit_jax.evaluate": 4,
    "vit_jax.predict": 4,
    "vit_jax.explain": 4,
    "vit_jax.export": 4,
    "vit_jax.launch": 4,
    "vit_jax.serve": 4,
    "vit_jax.status": 4,
    "vit_jax.report": 4,
    "vit_jax.compare": 4,
    "vit_jax.sweep": 4,
}
ALLOWED_IN = {
    "ml_collections": ("vit_jax.main", "vit_jax.experiment", "vit_jax.train"),
    "absl": ("vit_jax.main", "vit_jax.plan", "vit_jax.observe.console"),
    "orbax": ("vit_jax.checkpoint",),
    "tensorflow_datasets": ("vit_jax.data",),
    "grain": ("vit_jax.data",),
    "starlette": ("vit_jax.serve",),
    "uvicorn": ("vit_jax.serve",),
    "tensorflow": (),
    "torch": (),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def layer(module: str) -> int | None:
    return next((n for prefix, n in LAYERS.items() if within(module, prefix)), None)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_go_down(file):
    module = module_name(file)
    if module == "vit_jax":
        return
    assert layer(module) is not None, "a new module needs a place in LAYERS"
    for name in imports(file):
        if within(name, "vit_jax") and layer(name) is not None:
            assert layer(name) <= layer(module), f"{module} imports {name}"
        for library, places in ALLOWED_IN.items():
            if within(name, library):
                assert any(within(module, p) for p in places), f"{module} imports {name}"


@pytest.mark.parametrize("file", sorted((PACKAGE / "data").rglob("*.py")), ids=module_name)
def test_data_knows_no_jax(file):
    assert not {name for name in imports(file) if within(name, "jax")}


@pytest.mark.parametrize("file", sorted((PACKAGE / "models").rglob("*.py")), ids=module_name)
def test_models_know_only_jax_flax_and_utils(file):
    for name in imports(file):
        if within(name, "vit_jax"):
            assert within(name, "vit_jax.models") or within(name, "vit_jax.utils")
