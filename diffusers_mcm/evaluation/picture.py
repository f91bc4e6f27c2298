"""A picture of results: for each column of scores the methods against the number of sampling steps."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..files import atomic_file
from .metrics import Column
from .page import REFERENCE

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 300, 62, 16, 34, 44
LEGEND_LINE, PER_ROW = 18, 3
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
TRUTH_COLOUR = "#aaaaaa"

Values = Mapping[str, float | None]


def draw(
    path: Path, series: Mapping[str, Sequence[tuple[int, Values]]], truth: Values, columns: Sequence[Column]
) -> None:
    """Write a PNG with a chart for each column in which a method has a score; none where no method has.

    Args:
        path: of the picture.
        series: method -> its numbers of steps, each with the scores by column's key.
        truth: the reference's own scores, which are shown as grey lines.
        columns: of the charts, in their order.
    """
    points = {
        column: {
            name: sorted((steps, value) for steps, values in line if (value := values.get(column.key)) is not None)
            for name, line in series.items()
        }
        for column in columns
    }
    shown = [column for column in columns if any(points[column].values())]
    if not shown:
        return
    font = ImageFont.load_default(size=12)
    per_row = min(PER_ROW, len(shown))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(series)}
    known = [(name, colour, 3) for name, colour in colours.items()]
    if any(truth.get(column.key) is not None for column in shown):
        known.append((REFERENCE, TRUTH_COLOUR, 2))
    size = (per_row * WIDTH, -(-len(shown) // per_row) * HEIGHT + LEGEND_LINE * len(known) + 8)
    picture = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(picture)
    for number, column in enumerate(shown):
        corner = (number % per_row * WIDTH, number // per_row * HEIGHT)
        _chart(canvas, font, corner, column, points[column], colours, truth.get(column.key))
    for number, (name, colour, width) in enumerate(known):
        y = size[1] - LEGEND_LINE * (len(known) - number)
        canvas.line([(LEFT, y + 7), (LEFT + 24, y + 7)], fill=colour, width=width)
        canvas.text((LEFT + 32, y), name, fill="black", font=font)
    with atomic_file(path) as temporary:
        picture.save(temporary, format="PNG")


def _chart(
    canvas,
    font,
    corner: tuple[int, int],
    column: Column,
    points: Mapping[str, list],
    colours: Mapping[str, str],
    truth: float | None,
) -> None:
    """One chart: steps on a logarithmic axis, scores on a linear one."""
    x0, y0 = corner[0] + LEFT, corner[1] + TOP
    x1, y1 = corner[0] + WIDTH - RIGHT, corner[1] + HEIGHT - BOTTOM
    steps = sorted({step for line in points.values() for step, _ in line})
    values = [value for line in points.values() for _, value in line] + ([] if truth is None else [truth])
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin
    span = math.log(steps[-1] / steps[0]) or 1.0

    def place(step: int, value: float) -> tuple[float, float]:
        along = math.log(step / steps[0]) / span if len(steps) > 1 else 0.5
        return x0 + 12 + along * (x1 - x0 - 24), y1 - (value - low) / (high - low) * (y1 - y0)

    way = f" ({column.metric.better} is better)" if column.metric.better else ""
    canvas.text((x0, corner[1] + 10), column.title + way, fill="black", font=font)
    canvas.rectangle([x0, y0, x1, y1], outline="#888888")
    if truth is not None:
        y = place(steps[0], truth)[1]
        canvas.line([(x0, y), (x1, y)], fill=TRUTH_COLOUR, width=2)
    for step in steps:
        canvas.text((place(step, low)[0], y1 + 6), str(step), fill="black", font=font, anchor="ma")
    canvas.text(((x0 + x1) / 2, y1 + 22), "steps", fill="black", font=font, anchor="ma")
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        canvas.text((x0 - 6, place(steps[0], value)[1]), f"{value:.4g}", fill="black", font=font, anchor="rm")
    for name, line in points.items():
        dots = [place(*point) for point in line]
        if len(dots) > 1:
            canvas.line(dots, fill=colours[name], width=2)
        for x, y in dots:
            canvas.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colours[name])
