# SPDX-License-Identifier: Apache-2.0
"""How Sphinx makes a site of README.md and docs/: `make docs`.

The source is the whole checkout, so that links between its files are those that a reader of the
files follows, and are checked. Nothing is fetched from elsewhere, when it is built or read.
"""

from pathlib import Path

from sphinx.application import Sphinx

import vit_jax

project = "vit_jax"
version = release = vit_jax.__version__
copyright = "the authors of vit_jax, Apache License 2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "docs/*.md"]
# Folders that are large are not even listed.
exclude_patterns = [".*", "build", "runs", "tests", "benchmarks/results"]

html_theme = "furo"
html_title = "vit_jax"
html_copy_source = False
html_show_sphinx = False

# `#a-heading` in a link, as on other sites that show Markdown.
myst_heading_anchors = 4
# A fence without a language is output or layout, in no language.
highlight_language = "none"
maximum_signature_line_length = 80
# Flags have two dashes.
smartquotes = False
# In docstrings, `this` is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Output and layouts, which have no language, are not to be copied.
copybutton_selector = "div[class*='highlight-']:not(.highlight-none) pre"
copybutton_exclude = ".linenos, .gp, .go"

_START = (
    '<!doctype html><meta charset="utf-8"><title>vit_jax</title>'
    '<meta http-equiv="refresh" content="0; url=docs/index.html">'
    '<a href="docs/index.html">vit_jax</a>\n'
)


def _write_start(app: Sphinx, error: Exception | None) -> None:
    """The page that a server shows for the folder."""
    if error is None and app.builder.name == "html":
        Path(app.outdir, "index.html").write_text(_START, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("build-finished", _write_start)
