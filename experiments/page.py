"""The HTML parts of a report: plain text in, escaped elements out. Nothing on the page comes from a network."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

STYLE_SHEET = """
:root { color-scheme: light dark; --text: #23262b; --muted: #5c626c; --line: #d5d8dd; --page: #fff; --soft: #f4f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --muted: #a2a8b3; --line: #3b4048; --page: #191b1f; --soft: #22252a; }
}
@media print { :root { --text: #000; --muted: #333; --line: #bbb; --page: #fff; --soft: #fff; color-scheme: light; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 70rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p, ul { max-width: 46rem; margin: .5rem 0; }
.answer { font-size: 1.15rem; border-left: .25rem solid #0072b2; padding-left: .8rem; }
.note, figcaption, caption { color: var(--muted); font-size: .88rem; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; max-width: 46rem; }
table { border-collapse: collapse; width: 100%; margin: .75rem 0; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, td.reason { text-align: left; }
td.reason { color: var(--muted); }
td.settings { text-align: left; }
.wide { overflow-x: auto; }
.name { display: flex; align-items: baseline; gap: .45em; }
.swatch { flex: none; width: .7em; height: .7em; border-radius: 2px; print-color-adjust: exact; }
td small { display: block; color: var(--muted); font-size: .85em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; break-inside: avoid; min-width: 0; }
figure svg { display: block; width: 100%; max-width: 36rem; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
figcaption { margin-top: .25rem; max-width: 36rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: .15rem 1.5rem;
  font-size: .88rem; margin: .5rem 0; }
dl div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--line); }
dt { color: var(--muted); } dd { margin: 0; text-align: right; }
code { font-family: ui-monospace, monospace; font-size: .88em; background: var(--soft); padding: .1em .3em; }
h1, .answer, dd, dt, details td { overflow-wrap: anywhere; }
.narrow { max-width: 46rem; }
details { margin: .75rem 0; } summary { cursor: pointer; }
@media (max-width: 60rem) { table { font-size: .8rem; } th, td { padding: .3rem .2rem; } }
@media (max-width: 44rem) {
  table { font-size: .9rem; } td small { display: inline; }
  thead { display: none; }
  table, tbody, tr, td { display: block; width: 100%; }
  caption { display: block; }
  tr { padding: .5rem 0; border-bottom: 1px solid var(--line); }
  td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; }
  td { overflow-wrap: anywhere; }
  td::before { content: attr(data-label); color: var(--muted); text-align: left; }
  td:first-child { display: block; font-weight: 600; } td:first-child::before { content: none; }
}
"""


def html_page(title: str, body: Iterable[str]) -> str:
    """Return a whole document; `title` is plain text, `body` finished elements."""
    parts = "\n".join(part for part in body if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE_SHEET}</style>\n</head>\n<body>\n<main>\n{parts}\n</main>\n</body>\n</html>\n"
    )


def html_table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", colors: Mapping[str, str] | None = None
) -> str:
    """Return a table of plain texts; on narrow screens each row becomes a block that repeats the headers.

    A row that is shorter than the headers lets its last cell run to the end. `colors` gives first cells a swatch.
    """
    head = "".join(f'<th scope="col">{escape(header).replace(" %", "&nbsp;%")}</th>' for header in headers)
    body = "\n".join(_table_row(headers, row, colors or {}) for row in rows)
    text = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{text}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def _table_row(headers: Sequence[str], row: Sequence[str], colors: Mapping[str, str]) -> str:
    color = colors.get(row[0])
    swatch = f'<span class="swatch" style="background:{color}"></span>' if color else ""
    cells = [f'<td><span class="name">{swatch}<span>{escape(row[0])}</span></span></td>']
    for i, cell in enumerate(row[1:], start=1):
        is_short = i == len(row) - 1 and len(row) < len(headers)
        kind = f' colspan="{len(headers) - i}" class="reason"' if is_short else f' data-label="{escape(headers[i])}"'
        cells.append(f"<td{kind}>{escape(cell) if is_short else _figure_with_range(cell)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _figure_with_range(cell: str) -> str:
    figure, bracket, rest = cell.partition(" (")
    # One element around both keeps them together where a narrow screen makes the cell a flex row.
    return f"<span>{escape(figure)}{f' <small>({escape(rest)}</small>' if bracket else ''}</span>"


def html_list(items: Iterable[str]) -> str:
    """Return plain texts as a list, or nothing for none."""
    body = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{body}</ul>" if body else ""


def html_pairs(pairs: Mapping[str, object]) -> str:
    """Return names and values side by side."""
    body = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in pairs.items())
    return f"<dl>{body}</dl>"


def html_settings(settings: Mapping[str, str]) -> str:
    """Return names beside texts that are to be read as written."""
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="settings"><code>{escape(text)}</code></td></tr>'
        for name, text in settings.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def html_figure(svg: str, caption: str) -> str:
    """Return a finished `<svg>` with a caption in plain text."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def html_details(summary: str, content: str) -> str:
    """Return finished `content` folded away under a plain `summary`."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"
