# SPDX-License-Identifier: Apache-2.0
"""The HTML page of figures, which contains its pictures."""

import dataclasses
from collections.abc import Sequence

from vit_jax.inference.draw import encode_png
from vit_jax.inference.figures import Figure
from vit_jax.pages import html

# Wider figures take a row of their own; in pixels of the page.
_WIDE = 640


@dataclasses.dataclass(frozen=True)
class Section:
    """Figures under one heading.

    Attributes:
      title: heading.
      figures: figures in order.
      classes: class names and probabilities, the most probable first; empty for no such card.
    """

    title: str
    figures: Sequence[Figure]
    classes: Sequence[tuple[str, float]] = ()


def make_page(title: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """Makes the page, for light and dark screens of any width."""
    return html.make_page(title, notes, map(_show_section, sections))


def _show_section(section: Section) -> str:
    cards = []
    if section.classes:
        cards.append(html.make_card("Classes", html.make_bars(section.classes)))
    # Figures that take a whole row come last, so no row has gaps.
    cards += map(_show_figure, sorted(section.figures, key=_is_wide))
    return html.make_section(section.title, cards)


def _is_wide(figure: Figure) -> bool:
    return figure.picture.width > _WIDE * figure.density


def _show_figure(figure: Figure) -> str:
    width, height = (side // figure.density for side in figure.picture.size)
    return html.make_figure(
        encode_png(figure.picture),
        (width, height),
        alt=figure.title,
        title=figure.title,
        caption=[figure.caption],
        wide=_is_wide(figure),
        sharp=figure.density == 1,
    )
