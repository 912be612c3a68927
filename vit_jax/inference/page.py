# SPDX-License-Identifier: Apache-2.0
"""One HTML page with its pictures in it: no other file, no script, no network."""

import base64
import dataclasses
import html
from collections.abc import Sequence

from vit_jax.inference.draw import encode_png
from vit_jax.inference.figures import Figure
from vit_jax.pages import html as html_lib

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
    return html_lib.make_page(title, notes, map(_show_section, sections))


def _show_section(section: Section) -> str:
    cards = []
    if section.classes:
        cards.append(html_lib.make_card("Classes", html_lib.make_bars(section.classes)))
    # Those that take a whole row come last, so that no row has holes.
    cards += map(_show_figure, sorted(section.figures, key=_is_wide))
    return html_lib.make_section(section.title, cards)


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
