"""A report as one HTML page that needs nothing else: no network, no scripts."""

from base64 import b64encode
from html import escape

from faiss_knn.offline.report.content import Section, Strip, Table, Tile

_LONG = 24  # rows that a table shows without being asked
_SENTENCE = 4  # spaces from which on a cell is read as one
_LONG_NAME = 24  # letters: more than a narrow column has in two lines

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --paper: #ffffff; --line: #dde3ea; --tint: #f4f6f9;
  --accent: #1769aa; --warn: #8a4b00; --warn-tint: #fff4e2 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9f0; --soft: #9aa7b8; --paper: #12161c; --line: #2c3540;
  --tint: #1a2029; --accent: #6cb6f2; --warn: #ffc37a; --warn-tint: #2e2415 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere }
main { max-width: 76rem; margin: 0 auto; padding: 1.25rem 1rem 4rem }
h1 { font-size: clamp(1.5rem, 5vw, 2.2rem); line-height: 1.2; margin: .5rem 0 1rem }
h2 { font-size: 1.2rem; margin: 0 0 .5rem }
section + section { margin-top: 1.8rem; padding-top: 1.2rem; border-top: 1px solid var(--line) }
summary { cursor: pointer; color: var(--accent) }
p { margin: .4rem 0; max-width: 48rem }
ul { list-style: none; margin: .75rem 0; padding: 0; max-width: 48rem }
li { background: var(--warn-tint); color: var(--warn); border-left: 3px solid currentColor; padding: .5rem .75rem;
  margin: .4rem 0 }
.scroll { overflow-x: auto; margin: .9rem 0; border: 1px solid var(--line); border-radius: 8px; width: fit-content;
  max-width: 100% }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap }
th { color: var(--soft); font-weight: 600; background: var(--tint) }
tr + tr td { border-top: 1px solid var(--line) }
.word { text-align: left }
.prose { min-width: 14rem; max-width: 30rem; white-space: normal; overflow-wrap: anywhere }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--tint) }
@media (max-width: 40rem) { th, td { padding: .35rem .5rem }
  .word { min-width: 4.5rem; max-width: 32vw; white-space: normal; overflow-wrap: break-word }
  .prose { min-width: 11rem; max-width: 60vw; overflow-wrap: anywhere }
  th:first-child, td:first-child { min-width: 6.5rem; max-width: 40vw; white-space: normal; overflow-wrap: anywhere }
  td.prose:first-child { min-width: 10rem; max-width: 50vw } }
img { display: block; width: 100%; max-width: 30rem; height: auto; margin: .9rem 0 }
.strips { display: flex; flex-wrap: wrap; gap: .9rem 2rem; margin: .9rem 0 }
 .strip p { margin: 0 0 .3rem; color: var(--soft); font-size: .875rem }
.tiles { display: flex; flex-wrap: wrap; gap: .5rem }
figure { margin: 0; width: 6rem; padding: .25rem; border: 1px solid var(--line); border-radius: 6px; font-size: .75rem;
  line-height: 1.3 }
figure:not(:has(img)) { width: 14rem }
figure.first { border-color: var(--accent); background: var(--tint) }
figure img { width: 100%; height: 5.5rem; object-fit: contain; margin: 0 0 .2rem }
@media (max-width: 40rem) { figure { width: 4.6rem } figure img { height: 4.1rem } }
"""


def page(title: str, sections: list[Section], plots: dict[str, tuple[str, str]]) -> str:
    """Render the sections; `plots` are SVG texts by plot name, for light and for dark paper."""
    body = "\n".join(_section(section, plots) for section in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def html_table(table: Table) -> str:
    """Render one table, its text escaped."""
    rows = [_row("th", table.headings, table.words), *(_row("td", row, table.words) for row in table.rows)]
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _row(tag: str, cells: list[str], words: int) -> str:
    scope = ' scope="col"' if tag == "th" else ""
    marked = (f"<{tag}{scope}{_kind(cell) if i < words else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells))
    return f"<tr>{''.join(marked)}</tr>"


def _kind(cell: str) -> str:
    """Mark a cell of words; a sentence or a long name has room, and lines enough to leave some to the numbers."""
    is_long = cell.count(" ") >= _SENTENCE or len(cell) > _LONG_NAME
    return ' class="word prose"' if is_long else " class=word"


def _section(section: Section, plots: dict[str, tuple[str, str]]) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>", *(f"<p>{escape(text)}</p>" for text in section.text)]
    if section.warnings:
        parts.append("<ul>" + "".join(f"<li>{escape(warning)}</li>" for warning in section.warnings) + "</ul>")
    if section.plot in plots:
        parts.append(_picture(section.title, *plots[section.plot]))
    if section.strips:
        parts.append('<div class="strips">' + "\n".join(map(_strip, section.strips)) + "</div>")
    if section.table:
        parts.append(_folded(section.table, f'<div class="scroll" tabindex="0">{html_table(section.table)}</div>'))
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _strip(strip: Strip) -> str:
    tiles = "".join(map(_tile, strip.tiles))
    return f'<div class="strip"><p>{escape(strip.title)}</p><div class="tiles">{tiles}</div></div>'


def _tile(tile: Tile) -> str:
    picture = f'<img src="{escape(tile.picture)}" alt="" loading="lazy">' if tile.picture else ""
    mark = ' class="first"' if tile.is_first else ""
    return f"<figure{mark}>{picture}<figcaption>{escape(tile.caption)}</figcaption></figure>"


def _folded(table: Table, shown: str) -> str:
    if len(table.rows) <= _LONG:
        return shown
    return f"<details><summary>Show all {len(table.rows):,} rows</summary>{shown}</details>"


def _picture(title: str, light: str, dark: str) -> str:
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        f'<img src="{_data(light)}" alt="{escape(title)}"></picture>'
    )


def _data(svg: str) -> str:
    return "data:image/svg+xml;base64," + b64encode(svg.encode()).decode()
