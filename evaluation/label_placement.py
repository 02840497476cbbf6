"""Labels beside the points of a picture, none of which covers another."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox


FONT_SIZE = 9
# All in points: how far a label stays from its own point, and from other labels and points.
DISTANCE, MARGIN, POINT_RADIUS = 4, 2.5, 5
# Steps between the places that are tried, to the right and upwards.
STEPS = (6, 3)
# A label further from its point than this has a line to it.
LONGEST_WITHOUT_LINE = 14
# What it counts, in points of distance, to stand to the left or right of the point and not across it.
ACROSS = 3


def label_points(
    axes: Axes, points: list[tuple[float, float]], labels: list[str], colors: list[str]
) -> list[Bbox] | None:
    """
    Writes a label to each point, as near as it can stand without covering another, a point or the edge.

    Args:
        axes (`Axes`): Where to; its place in the figure and its limits are settled.
        points (`list[tuple[float, float]]`): In data coordinates.
        labels (`list[str]`): Of each.
        colors (`list[str]`): Of each label.

    Returns:
        `list[Bbox]`: The boxes of the labels, in pixels; `None` if there is no room for all of them.
    """
    pixels = axes.figure.dpi / 72
    centres = axes.transData.transform(points)
    texts = [
        _write(axes, point, label, color) for point, label, color in zip(points, labels, colors, strict=True)
    ]
    radius = POINT_RADIUS * pixels
    taken = np.hstack([centres - radius, centres + radius])  # (boxes, 4): left, bottom, right, top
    placed = []
    for text, centre in zip(texts, centres, strict=True):
        box = _nearest_free_box(centre, text.get_window_extent().size, taken, axes.get_window_extent(), pixels)
        if box is None:
            return None
        taken = np.vstack([taken, box])
        placed.append(Bbox.from_extents(*box))
    for text, centre, box in zip(texts, centres, placed, strict=True):
        text.set_position(tuple(((box.min + box.max) / 2 - centre) / pixels))
        end = np.clip(centre, box.min, box.max)
        if np.hypot(*(end - centre)) > LONGEST_WITHOUT_LINE * pixels:
            ends = axes.transData.inverted().transform([centre, end])
            axes.plot(*ends.T, color=text.get_color(), lw=0.7, alpha=0.6, zorder=2.5)
    return placed


def _write(axes: Axes, point: tuple[float, float], label: str, color: str) -> Annotation:
    return axes.annotate(
        label.replace("$", r"\$"),
        point,
        xytext=(0, 0),
        textcoords="offset points",
        fontsize=FONT_SIZE,
        color=color,
        ha="center",
        va="center",
        zorder=4,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
    )


def _nearest_free_box(
    centre: np.ndarray, size: np.ndarray, taken: np.ndarray, room: Bbox, pixels: float
) -> np.ndarray | None:
    """The box of a label nearest to its point: left, bottom, right, top in pixels; `None` if there is none."""
    half = size / 2
    beside = DISTANCE * pixels + POINT_RADIUS * pixels + half
    offsets = [(side * beside[0], 0) for side in (1, -1)] + [(0, side * beside[1]) for side in (1, -1)]
    axes_of_grid = [
        np.arange(low + part, high - part, step * pixels)
        for low, high, part, step in zip(room.min, room.max, half, STEPS, strict=True)
    ]
    grid = np.stack(np.meshgrid(*axes_of_grid), axis=-1).reshape(-1, 2)
    middles = np.vstack([centre + np.array(offsets), grid])
    boxes = np.hstack([middles - half, middles + half])
    inside = (boxes[:, :2] >= room.min).all(axis=1) & (boxes[:, 2:] <= room.max).all(axis=1)
    margin = MARGIN * pixels
    apart = (boxes[:, None, :2] > taken[:, 2:] + margin) | (boxes[:, None, 2:] < taken[:, :2] - margin)
    free = boxes[inside & apart.any(axis=2).all(axis=1)]
    if not len(free):
        return None
    gaps = np.maximum(0, np.maximum(free[:, :2] - centre, centre - free[:, 2:]))
    is_across = gaps[:, 0] == 0
    return free[np.argmin(np.hypot(*gaps.T) + ACROSS * pixels * is_across)]
