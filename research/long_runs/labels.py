"""Labels beside points that cover neither each other nor a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

_GAP = 7.0  # pixels between a point's middle and its label
_MARKER = 5.0  # pixels from a point's middle to its edge
_ROWS = 14  # heights of a label that it may be moved up or down


def label(
    axis: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], colours: Sequence[str]
) -> list[Bbox]:
    """Writes a label for every point, with a line to it where there is no place beside it.

    The limits of the axis must be final, and its figure laid out.

    Args:
        axis: Where to write.
        points: The points, in the axis' units.
        texts: Their labels.
        colours: Colours of the labels.

    Returns:
        Where the labels are, in pixels.
    """
    figure = axis.get_figure()
    assert figure is not None
    frame, scale = axis.get_window_extent(), 72 / figure.dpi
    middles = [tuple(axis.transData.transform(point)) for point in points]
    covered = [Bbox.from_extents(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in middles]
    labels = []
    # From the top down, so that lines to labels that were moved cross little.
    for place in sorted(range(len(points)), key=lambda place: (-middles[place][1], middles[place][0])):
        (x, y), colour = middles[place], colours[place]
        drawn = axis.annotate(
            texts[place], points[place], (0, 0), textcoords="offset points", fontsize=8, color=colour, va="bottom"
        )
        size = drawn.get_window_extent()
        boxes = [Bbox.from_bounds(x + dx, y + dy, size.width, size.height) for dx, dy in _offsets(size)]
        free = [box for box in boxes if _inside(box, frame) and not any(map(box.overlaps, covered))]
        box = free[0] if free else boxes[0]
        drawn.set_position(((box.x0 - x) * scale, (box.y0 - y) * scale))
        if abs((box.y0 + box.y1) / 2 - y) > size.height + _GAP:
            end = (box.x0 if box.x0 > x else box.x1, (box.y0 + box.y1) / 2)
            line = axis.transData.inverted().transform([(x, y), end])
            axis.plot(*line.T, color=colour, linewidth=0.5, alpha=0.6, zorder=0)
        covered.append(box)
        labels.append(box)
    return labels


def _offsets(size: Bbox) -> Iterator[tuple[float, float]]:
    """Where a label may begin beside its point, the nearest places first."""
    for row in range(_ROWS):
        away = _GAP / 2 + row * size.height
        for dy in (away, -away - size.height):
            yield _GAP, dy
            yield -_GAP - size.width, dy


def _inside(box: Bbox, frame: Bbox) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
