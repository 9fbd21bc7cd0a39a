"""Two kinds of picture, written as SVG text: curves with bands, and bars with a mark for what was aimed at.

The same values give the same bytes. Colours follow the reader's scheme, light or dark, on a ground of their own, so
that a page of the other scheme does not make them unreadable; kinds are told apart by dashes and words too. Knows
nothing of where the values come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

# Distinguishable with the common kinds of colour blindness (after Okabe and Ito), for a light and for a dark ground.
COLOURS = (
    ("#0072b2", "#56b4e9"),
    ("#b34a00", "#e69f00"),
    ("#00735a", "#2fc79a"),
    ("#a8477f", "#e296c4"),
    ("#4d4d4d", "#bdbdbd"),
)
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2")
FONT = "font-family:system-ui,-apple-system,'Segoe UI',sans-serif;font-size:13px"


@dataclass(frozen=True, slots=True)
class Curve:
    name: str
    points: tuple[tuple[float, float, float], ...]  # x, y, half the width of the interval


@dataclass(frozen=True, slots=True)
class Bar:
    name: str
    value: float
    interval: float
    aim: float | None = None


def curves(title: str, found: Sequence[Curve], *, x: str, y: str) -> str:
    """Curves over a logarithmic x; the names stand at their ends."""
    width, height, left, right, top, bottom = 720, 400, 56, 130, 44, 50
    xs = sorted({point[0] for curve in found for point in curve.points})
    lows = [point[1] - point[2] for curve in found for point in curve.points]
    highs = [point[1] + point[2] for curve in found for point in curve.points]
    step = _step(max(highs) - min(lows))
    low, high = step * math.floor(min(lows) / step), min(100.0, step * math.ceil(max(highs) / step))

    def at_x(value: float) -> float:
        span = math.log(xs[-1] / xs[0]) or 1.0
        return left + (width - left - right) * math.log(value / xs[0]) / span

    def at_y(value: float) -> float:
        return height - bottom - (height - top - bottom) * (value - low) / (high - low)

    parts = [_text(left, 24, title, "title")]
    for k in range(round((high - low) / step) + 1):
        value = low + k * step
        parts.append(_line(left, at_y(value), width - right, at_y(value), "grid"))
        parts.append(_text(left - 8, at_y(value) + 4, f"{value:g}", "quiet end"))
    for value in xs:
        parts.append(_line(at_x(value), height - bottom, at_x(value), height - bottom + 5, "axis"))
        parts.append(_text(at_x(value), height - bottom + 20, f"{value:g}", "quiet middle"))
    parts.append(_line(left, height - bottom, width - right, height - bottom, "axis"))
    parts.append(_text((left + width - right) / 2, height - 10, x, "quiet middle"))
    parts.append(_text(width - right, 24, y, "quiet end"))
    ends: list[tuple[float, int, str]] = []
    for number, curve in enumerate(found):
        places = [(at_x(px), at_y(py), at_y(py - half), at_y(py + half)) for px, py, half in curve.points]
        band = [(px, upper) for px, _, _, upper in places] + [(px, lower) for px, _, lower, _ in reversed(places)]
        parts.append(f'<polygon class="c{number} band" points="{_points(band)}"/>')
        parts.append(
            f'<polyline class="c{number} line" stroke-dasharray="{DASHES[number % len(DASHES)]}" '
            f'points="{_points([(px, py) for px, py, _, _ in places])}"/>'
        )
        parts += [f'<circle class="c{number} dot" cx="{px:.1f}" cy="{py:.1f}" r="2.6"/>' for px, py, _, _ in places]
        ends.append((places[-1][1], number, curve.name))
    for place, number, name in _apart(sorted(ends), 16):
        parts.append(_line(width - right + 8, place, width - right + 32, place, f"c{number} line", number))
        parts.append(_text(width - right + 37, place + 4, name, f"c{number}"))
    return _svg(width, height, title, parts, len(found))


def bars(title: str, found: Sequence[Bar]) -> str:
    """Horizontal bars from 0 to 100 with their intervals, and a tick where the aim is."""
    width, left, right, top, row = 800, 350, 40, 50, 34
    height = top + row * len(found) + 46

    def at(value: float) -> float:
        return left + (width - left - right) * value / 100

    parts = [_text(16, 24, title, "title")]
    for value in range(0, 101, 20):
        parts.append(_line(at(value), top - 6, at(value), height - 40, "grid"))
        parts.append(_text(at(value), height - 22, f"{value}", "quiet middle"))
    for number, bar in enumerate(found):
        y = top + row * number
        parts.append(_text(left - 10, y + 16, bar.name, "end"))
        parts.append(f'<rect class="c0 bar" x="{left}" y="{y + 2}" width="{at(bar.value) - left:.1f}" height="18"/>')
        parts.append(_line(at(bar.value - bar.interval), y + 11, at(bar.value + bar.interval), y + 11, "axis"))
        parts.append(_text(left + 8, y + 16, f"{bar.value:.1f} ± {bar.interval:.1f}", "inside"))
        if bar.aim is not None:
            parts.append(_line(at(bar.aim), y - 2, at(bar.aim), y + 24, "c1 aim"))
    parts.append(_line(16, height - 26, 16, height - 12, "c1 aim"))
    parts.append(_text(24, height - 15, "what was aimed at", "quiet"))
    return _svg(width, height, title, parts, 2)


def _step(span: float) -> float:
    return next(step for step in (0.5, 1, 2, 5, 10, 20) if span / step <= 8 or step == 20)


def _apart(ends: list[tuple[float, int, str]], least: float) -> list[tuple[float, int, str]]:
    """Moves labels down until none covers another, and all up by half of what the last was moved."""
    placed: list[tuple[float, int, str]] = []
    for place, number, name in ends:
        placed.append((max(place, placed[-1][0] + least) if placed else place, number, name))
    back = (placed[-1][0] - ends[-1][0]) / 2
    return [(place - back, number, name) for place, number, name in placed]


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, dashed: int = 0) -> str:
    dash = f' stroke-dasharray="{DASHES[dashed % len(DASHES)]}"' if dashed else ""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{dash}/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(width: int, height: int, title: str, parts: Sequence[str], kinds: int) -> str:
    def scheme(shade: int, ground: str, ink: str, quiet: str, grid: str) -> str:
        rules = [
            f".ground{{fill:{ground}}}text{{fill:{ink}}}.quiet{{fill:{quiet}}}",
            f".grid{{stroke:{grid}}}.axis{{stroke:{quiet}}}",
        ]
        for number in range(kinds):
            colour = COLOURS[number % len(COLOURS)][shade]
            rules.append(f"text.c{number}{{fill:{colour}}}.c{number}.line,.c{number}.aim{{stroke:{colour}}}")
            rules.append(f".c{number}.band,.c{number}.dot,.c{number}.bar{{fill:{colour}}}")
        return "".join(rules)

    style = (
        f"text{{{FONT}}}.title{{font-size:15px;font-weight:600}}.end{{text-anchor:end}}.middle{{text-anchor:middle}}"
        ".line{fill:none;stroke-width:2}.band{opacity:.16}.bar{opacity:.45}.aim{stroke-width:3}"
        + scheme(0, "#ffffff", "#1f2328", "#59636e", "#d8dee4")
        + "@media (prefers-color-scheme:dark){"
        + scheme(1, "#0d1117", "#e6edf3", "#9198a1", "#2a313c")
        + "}"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">',
            f"<style>{style}</style>",
            f'<rect class="ground" width="{width}" height="{height}"/>',
            *parts,
            "</svg>\n",
        ]
    )
