"""What the pages of all comparisons are made of: a table of figures, a list of facts, one self-contained document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from draftdiff.compare.comparison import Comparison
from draftdiff.compare.table import Column, shown_columns


def html_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """The same table for a page, with the meanings of its columns below."""
    shown = shown_columns(rows, columns)
    head = "".join(f'<th title="{escape(meaning)}">{escape(title)}</th>' for title, meaning, _ in shown)
    lines = []
    for cells in zip(*(cells for *_, cells in shown)):
        # The spread goes into a second line.
        row = "".join(f"<td>{escape(cell).replace(' (', '<small>(') or '&ndash;'}</td>" for cell in cells)
        lines.append(f"<tr>{row}</tr>")
    meanings = "".join(f"<dt>{escape(title)}</dt><dd>{escape(meaning)}</dd>" for title, meaning, _ in shown)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        f"<details><summary>What the columns mean</summary><dl>{meanings}</dl></details>"
    )


def figure(media: str, name: str, facts: Sequence[str]) -> str:
    """A picture or video with its name and facts below."""
    caption = f"<b>{escape(name)}</b><span>{escape(' · '.join(facts))}</span>"
    return f"<figure>{media}<figcaption>{caption}</figcaption></figure>"


def facts_list(facts: Mapping[str, Any]) -> str:
    """Names and values; the value of "command" as code."""
    cells = []
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items() if entry is not None)
        kind = "code" if name == "command" else "span"
        cells.append(f"<dt>{escape(str(name))}</dt><dd><{kind}>{escape(str(value))}</{kind}></dd>")
    return f"<dl>{''.join(cells)}</dl>"


def document(
    comparison: Comparison, title: str, headline: str, sections: Sequence[str], facts: Mapping[str, Any]
) -> str:
    """The whole page of a comparison. headline, sections: as HTML.  facts: how it was run."""
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{headline}</p>',
        html_table(comparison.rows(), comparison.columns),
        *(f'<p class="note">{escape(note)}</p>' for note in comparison.notes()),
        *sections,
        "<h2>How it was run</h2>",
        facts_list(facts),
    ]
    return page(f"{comparison.made_by}: {title}", body)


def page(title: str, body: Sequence[str]) -> str:
    """A self-contained document. body: as HTML."""
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body))


_STYLE = """
:root { color-scheme: light dark; --text: #1d2127; --soft: #606975; --back: #fbfbfc; --card: #fff; --line: #dfe3e8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --soft: #9aa3ad; --back: #15181c; --card: #1d2127; --line: #343a42; }
}
body { margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 88rem; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .4rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; font-weight: 500; margin: 1.4rem 0 .6rem; } .lead { margin: 0 0 1.4rem; }
.note { color: var(--soft); font-size: .9rem; margin: .5rem 0; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .7rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); cursor: help; } tbody tr { border-top: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } td:first-child { font-weight: 600; }
td small { display: block; color: var(--soft); font-size: .8em; font-weight: 400; }
details { margin: .6rem 0; font-size: .9rem; } summary { cursor: pointer; color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; } code { font-size: .95em; }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; }
.pictures img { image-rendering: pixelated; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
video, img { display: block; width: 100%; background: #000; }
figcaption { padding: .5rem .8rem; display: flex; flex-direction: column; font-size: .92rem; }
figcaption span { color: var(--soft); font-size: .85rem; }
.charts { display: flex; flex-wrap: wrap; gap: 1.4rem; align-items: flex-start; }
svg { max-width: 100%; height: auto; display: block; font: 13px system-ui, sans-serif; }
svg text { fill: var(--text); } svg .small { font-size: 12px; fill: var(--soft); } svg .strong { font-weight: 600; }
svg .grid { stroke: var(--line); } svg .frame { fill: none; stroke: var(--line); }
svg .mark { stroke: var(--soft); stroke-width: 1.5; } svg .dashed { stroke-dasharray: 5 4; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>
// Start together, so that the same moment is seen in every video.
addEventListener("load", () => {{
  for (const video of document.querySelectorAll("video")) {{ video.currentTime = 0; video.play(); }}
}});
</script>
</body>
</html>
"""
