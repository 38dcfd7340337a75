"""Charts as SVG text: grouped bars, and nothing that a browser would have to load.

Colours are plain CSS with a second set for dark pages (prefers-color-scheme), so a picture is legible in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, ROW, BAR, LABEL, VALUE = 860, 22, 15, 300, 150
_STYLE = """
svg { background: #ffffff; font: 13px sans-serif }
text { fill: #1f2328 } .small { fill: #59636e; font-size: 11px } .title { font-weight: bold; font-size: 15px }
.axis { stroke: #d1d9e0 } .s0 { fill: #0969da } .s1 { fill: #bc4c00 } .s2 { fill: #1a7f37 } .s3 { fill: #8250df }
@media (prefers-color-scheme: dark) {
svg { background: #0d1117 } text { fill: #f0f6fc } .small { fill: #9198a1 } .axis { stroke: #3d444d }
.s0 { fill: #4493f8 } .s1 { fill: #f0883e } .s2 { fill: #3fb950 } .s3 { fill: #ab7df8 }
}
"""


@dataclass(frozen=True)
class Bar:
    """One bar: its name to the left, its value as text to the right.

    Attributes:
        name: what it is.
        value: its length; at least 0.
        text: the value for a reader, with its unit.
        series: 0..3, its colour.
    """

    name: str
    value: float
    text: str
    series: int = 0


@dataclass(frozen=True)
class Chart:
    """Bars that share an axis.

    Attributes:
        title: heading.
        note: what the reader must know: machine, unit, what is extrapolated.
        legend: name of each series that occurs.
        bars: from top to bottom.
    """

    title: str
    note: str
    legend: tuple[str, ...]
    bars: tuple[Bar, ...]


def draw(charts: Sequence[Chart]) -> str:
    """Return an SVG document with the charts below each other."""
    parts, top = [], 10.0
    for chart in charts:
        drawn, height = _chart(chart, top)
        parts += drawn
        top += height
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top:.0f}" '
            f'viewBox="0 0 {WIDTH} {top:.0f}" role="img">',
            f"<style>{_STYLE}</style>",
            *parts,
            "</svg>\n",
        ]
    )


def _chart(chart: Chart, top: float) -> tuple[list[str], float]:
    """Return the elements of a chart that starts at ``top``, and its height."""
    parts = [_text(10, top + 16, chart.title, "title"), _text(10, top + 34, chart.note, "small")]
    left = 10.0
    for series, name in enumerate(chart.legend):
        parts.append(f'<rect class="s{series}" x="{left}" y="{top + 43}" width="11" height="11"/>')
        parts.append(_text(left + 16, top + 53, name, "small"))
        left += 30 + 6.5 * len(name)
    y = top + 66
    bottom = y + ROW * len(chart.bars)
    parts.append(f'<line class="axis" x1="{LABEL}" y1="{y:.0f}" x2="{LABEL}" y2="{bottom:.0f}"/>')
    for bar, length in zip(chart.bars, _lengths(chart), strict=True):
        parts.append(_text(LABEL - 8, y + 13, bar.name, anchor="end"))
        parts.append(
            f'<rect class="s{bar.series}" x="{LABEL}" y="{y + 2:.0f}" width="{length:.1f}" height="{BAR}"/>'
        )
        parts.append(_text(LABEL + length + 6, y + 13, bar.text, "small"))
        y += ROW
    return parts, bottom - top + 24


def _lengths(chart: Chart) -> list[float]:
    """Return the lengths of the bars, of which the longest fills the room."""
    room = WIDTH - LABEL - VALUE
    values = [bar.value for bar in chart.bars]
    largest = max(values, default=0.0)
    return [room * value / largest if largest > 0 else 0.0 for value in values]


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'
