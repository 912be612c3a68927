# SPDX-License-Identifier: Apache-2.0
"""One HTML page with its pictures in it: no other file, no script, no network."""

import base64
import dataclasses
import html
import io
from collections.abc import Sequence

from PIL import Image

from vit_jax.inference.figures import Figure

_STYLE = """
:root { color-scheme: light dark; --back: #fcfcfb; --card: #fff; --text: #1d1d1f; --soft: #62626a;
  --line: #e3e3e0; --bar: #31688e; }
@media (prefers-color-scheme: dark) { :root { --back: #141416; --card: #1e1e21; --text: #ececf0;
  --soft: #a5a5ae; --line: #34343a; --bar: #6db7d6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.25rem; background: var(--back);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 0 0 0.6rem; }
p { margin: 0.25rem 0; }
.soft, figcaption { color: var(--soft); font-size: 0.875rem; }
.cards { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 16.5rem), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem;
  padding: 1rem; margin: 0; min-width: 0; }
.wide { grid-column: 1 / -1; }
.card img { display: block; max-width: 100%; height: auto; margin: 0 0 0.6rem; }
.sharp { image-rendering: pixelated; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem;
  font-variant-numeric: tabular-nums; }
td { padding: 0.15rem 0.5rem 0.15rem 0; }
td:nth-child(2) { width: 50%; padding: 0 0.5rem; }
td:last-child { text-align: right; padding-right: 0; white-space: nowrap; }
.bar { background: var(--bar); height: 0.6rem; border-radius: 0.2rem; min-width: 1px; }
"""


# Pixels of a page: what is wider takes a row.
_WIDE = 640


@dataclasses.dataclass(frozen=True)
class Section:
    """Figures under one heading.

    Attributes:
      title: of the section.
      figures: in order.
      classes: names and probabilities, the most probable first; empty for no such card.
    """

    title: str
    figures: Sequence[Figure]
    classes: Sequence[tuple[str, float]] = ()


def make_page(title: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """The page as text, for light and dark screens of any width."""
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<header><h1>{html.escape(title)}</h1>",
        *(f'<p class="soft">{html.escape(note)}</p>' for note in notes),
        "</header><main>",
    ]
    for section in sections:
        lines.append(f'<section><h2>{html.escape(section.title)}</h2><div class="cards">')
        if section.classes:
            lines.append(_show_classes(section.classes))
        # Those that take a whole row come last, so that no row has holes.
        lines += map(_show_figure, sorted(section.figures, key=_is_wide))
        lines.append("</div></section>")
    lines.append("</main></body></html>")
    return "\n".join(lines) + "\n"


def encode_png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _is_wide(figure: Figure) -> bool:
    return figure.picture.width > _WIDE * figure.density


def _show_figure(figure: Figure) -> str:
    data = base64.b64encode(encode_png(figure.picture)).decode()
    width, height = (side // figure.density for side in figure.picture.size)
    return (
        f'<figure class="card{" wide" if _is_wide(figure) else ""}">'
        f"<h3>{html.escape(figure.title)}</h3>"
        f'<img{" class=sharp" if figure.density == 1 else ""} width="{width}" height="{height}" '
        f'alt="{html.escape(figure.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
    )


def _show_classes(classes: Sequence[tuple[str, float]]) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td><div class="bar" style="width:{value:.1%}"></div>'
        f"</td><td>{value:.1%}</td></tr>"
        for name, value in classes
    )
    return f'<div class="card"><h3>Classes</h3><table>{rows}</table></div>'
