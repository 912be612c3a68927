# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML pages: no other file, no script, no network.

They suit light and dark screens of any width. All text is escaped with `escape_html`.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from vit_jax.utils.text import escape_html

Layout = Literal["texts", "charts", "pairs", "pictures"]

# A cell that is aligned to the right: a number, perhaps with its unit, a star or a total.
_NUMBER = re.compile(r"([-+]?\d[\d,.]*(e[-+]?\d+)?( %)?( \*| of [\d,]+)?)?")

STYLE = """
:root { color-scheme: light dark; --back: #f6f6f4; --card: #fff; --text: #1d1d1f; --soft: #5f5f68;
  --line: #e3e3e0; --shade: #0003; --bar: #31688e; --s0: #2166ac; --s1: #c2510c; --s2: #1a7f4b;
  --s3: #8e44ad; --s4: #b3123a; --s5: #8a6d00; --s6: #00788a; --s7: #5c5c66; }
@media (prefers-color-scheme: dark) { :root { --back: #141416; --card: #1e1e21; --text: #ececf0;
  --soft: #a5a5ae; --line: #34343a; --shade: #000c; --bar: #6db7d6; --s0: #6db7f0; --s1: #f59a5b;
  --s2: #5fd39a; --s3: #c79be6; --s4: #ff7d9b; --s5: #e3c34f; --s6: #54ccdd; --s7: #b4b4be; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1.25rem; background: var(--back);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 0 0 0.6rem; }
p { margin: 0.25rem 0; }
.soft, figcaption { color: var(--soft); font-size: 0.875rem; }
.cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 16.5rem), 1fr)); }
.charts { grid-template-columns: repeat(6, minmax(0, 1fr)); }
.charts > * { grid-column: span 2; }
.pairs { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.pairs > :nth-child(odd):last-child { grid-column: 1 / -1; }
.pictures { grid-template-columns: repeat(6, minmax(0, 1fr)); }
@media (min-width: 64.01rem) {
  /* Where the cards do not fill rows of three, rows of two come last. */
  .charts > :nth-child(3n+1):nth-last-child(2), .charts > :nth-child(3n+1):nth-last-child(2) ~ *,
  .charts > :nth-child(3n+1):nth-last-child(4), .charts > :nth-child(3n+1):nth-last-child(4) ~ *
  { grid-column: span 3; } }
@media (max-width: 64rem) {
  .charts > * { grid-column: span 3; }
  .charts > :nth-child(odd):last-child { grid-column: 1 / -1; }
  .pictures { grid-template-columns: repeat(4, minmax(0, 1fr)); } }
@media (max-width: 40rem) {
  body { padding: 0.75rem; }
  .charts > *, .pairs > * { grid-column: 1 / -1; }
  .bars td:nth-child(2) { width: 30%; }
  .pictures { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.wide, .charts > .wide, .charts > :only-child { grid-column: 1 / -1; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem;
  padding: 1rem; margin: 0; min-width: 0; }
.card > svg { max-width: 44rem; }
.card img { display: block; max-width: 100%; height: auto; margin: 0 0 0.6rem; }
.pictures img { width: 100%; }
figcaption b { color: var(--text); font-weight: 600; }
.sharp { image-rendering: pixelated; }
.tiles { display: flex; flex-wrap: wrap; gap: 0.75rem 2.5rem; margin: 1.25rem 0 0; padding: 0;
  list-style: none; }
.tiles b { display: block; font-size: 1.9rem; line-height: 1.15; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem;
  font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: 0.2rem 1rem 0.2rem 0; vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.rows tr + tr { border-top: 1px solid var(--line); }
.number { text-align: right; white-space: nowrap; }
.bars td:nth-child(2) { width: 45%; padding: 0.2rem 0.5rem; vertical-align: middle; }
.bars td:last-child { text-align: right; padding-right: 0; white-space: nowrap; }
.bar { background: var(--bar); height: 0.6rem; border-radius: 0.2rem; min-width: 1px; }
/* A shadow at an edge beyond which there is more; phones show no scroll bars. */
.scroll { overflow-x: auto; scrollbar-width: thin;
  background: linear-gradient(to right, var(--card) 40%, transparent) left / 3rem 100% local,
    linear-gradient(to left, var(--card) 40%, transparent) right / 3rem 100% local,
    linear-gradient(to right, var(--shade), transparent) left / 1rem 100%,
    linear-gradient(to left, var(--shade), transparent) right / 1rem 100%;
  background-repeat: no-repeat; }
.scroll > svg { margin: 0 auto; }
.scroll th, .scroll td { white-space: nowrap; }
.scroll td.text:last-child { white-space: normal; min-width: 12rem; }
pre { margin: 0.25rem 0 0.75rem; padding: 0.6rem 0.75rem; font-size: 0.85rem;
  white-space: pre-wrap; border: 1px solid var(--line); border-radius: 0.4rem; }
pre span { display: inline-block; max-width: 100%; }
summary { cursor: pointer; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
/* A chart is scaled to its card, and its text is not: it is 11 to 13 pixels high on any screen. */
.charts > .card, .pairs > .card { container-type: inline-size; }
.chart { font-size: 13px; }
@container (min-width: 24rem) { .chart { font-size: 11px; } }
@container (min-width: 29rem) { .chart { font-size: 9px; } }
@container (min-width: 37rem) { .chart { font-size: 7.5px; } }
svg text { fill: var(--soft); }
svg .axis-name { font-style: italic; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .back { fill: var(--back); }
svg .grid, svg .axis, svg .curve { vector-effect: non-scaling-stroke; }
svg .curve { fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round; }
.keys { display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; margin: 0 0 0.4rem; padding: 0;
  list-style: none; font-size: 0.85rem; }
.keys li::before { content: ""; display: inline-block; width: 0.9rem; height: 0.25rem;
  margin-right: 0.4rem; vertical-align: middle; border-radius: 0.1rem; background: var(--key); }
.keys .dot::before { width: 0.5rem; height: 0.5rem; border-radius: 50%; }
"""


def make_page(title: str, notes: Sequence[str], body: Iterable[str]) -> str:
    """Makes a page of HTML sections, with lines of text below the heading."""
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape_html(title)}</title><style>{STYLE}</style></head><body>",
        f"<header><h1>{escape_html(title)}</h1>",
        *(f'<p class="soft">{escape_html(note)}</p>' for note in notes),
        "</header><main>",
        *body,
        "</main></body></html>",
    ]
    return "\n".join(lines) + "\n"


def make_section(title: str, cards: Iterable[str], *, layout: Layout = "texts") -> str:
    """Makes a section of cards, or an empty string; the layout decides how many fit in a row."""
    cards = list(cards)
    if not cards:
        return ""
    heading = f'<section><h2>{escape_html(title)}</h2><div class="cards {layout}">'
    return "\n".join([heading, *cards, "</div></section>"])


def make_card(title: str, content: str, *, caption: str = "", wide: bool = False) -> str:
    """Makes a card of HTML with a title above and a caption below."""
    below = f'<p class="soft">{escape_html(caption)}</p>' if caption else ""
    return f'<div class="card{" wide" if wide else ""}">{_head(title)}{content}{below}</div>'


def make_figure(
    picture: bytes,
    size: tuple[int, int],
    *,
    alt: str,
    title: str = "",
    name: str = "",
    caption: Sequence[str] = (),
    wide: bool = False,
    sharp: bool = False,
) -> str:
    """Makes a card of a picture.

    Args:
      picture: the bytes of a PNG or JPEG file.
      size: width and height in pixels of the page.
      alt: text for readers who cannot see the picture.
      title: text above the picture.
      name: text below the picture, which stands out; `caption` is below it.
      wide: whether the card takes a whole row.
      sharp: whether enlarged pixels stay squares.
    """
    lines = [f"<b>{escape_html(name)}</b>"] if name else []
    lines += map(escape_html, caption)
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
    return (
        f'<figure class="card{" wide" if wide else ""}">{_head(title)}'
        f'<img{" class=sharp" if sharp else ""} width="{size[0]}" height="{size[1]}" '
        f'alt="{escape_html(alt)}" src="{source}">'
        f"<figcaption>{'<br>'.join(lines)}</figcaption></figure>"
    )


def make_tiles(tiles: Iterable[tuple[str, str]]) -> str:
    """Makes a row of large texts, each with a line below it; an empty string if there are none."""
    items = "".join(
        f"<li><b>{escape_html(text)}</b>{escape_html(below)}</li>" for text, below in tiles
    )
    return f'<ul class="tiles">{items}</ul>' if items else ""


def make_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Makes a table of text that scrolls if it is too wide; numbers are aligned to the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def line(tag: str, cells: Sequence[str]) -> str:
        text = "".join(
            f"<{tag} class={'number' if to_right else 'text'}>{escape_html(cell)}</{tag}>"
            for cell, to_right in zip(cells, right, strict=True)
        )
        return f"<tr>{text}</tr>"

    body = "".join(line("td", row) for row in rows)
    head = f"<thead>{line('th', header)}</thead>" if any(header) else ""
    table = f'<table class="rows">{head}<tbody>{body}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{table}</div>'


def make_bars(rows: Iterable[tuple[str, float]]) -> str:
    """Makes a table of names with fractions, as bars and in percent."""
    body = "".join(
        f'<tr><td>{escape_html(name)}</td><td><div class="bar" style="width:{value:.1%}"></div>'
        f"</td><td>{100 * value:.1f} %</td></tr>"
        for name, value in rows
    )
    return f'<table class="bars">{body}</table>'


def make_details(title: str, content: str) -> str:
    """Makes HTML that is shown when its title is clicked."""
    return f"<details><summary>{escape_html(title)}</summary>{content}</details>"


def make_command(text: str) -> str:
    """Makes a box with a command to copy; its lines break between words, not at hyphens."""
    words = (f"<span>{escape_html(word)}</span>" for word in text.split(" "))
    return f"<pre>{' '.join(words)}</pre>"


def _head(title: str) -> str:
    return f"<h3>{escape_html(title)}</h3>" if title else ""


def _is_number(cell: str) -> bool:
    return _NUMBER.fullmatch(cell) is not None
