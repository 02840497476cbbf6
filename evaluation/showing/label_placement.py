"""Labels next to the points of a picture, none of which covers another."""

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
# For how much distance, in points, it counts to stand above or below the point, and to stand on a line.
ABOVE_OR_BELOW, ON_A_LINE = 3, 40


def label_points(
    axes: Axes,
    points: list[tuple[float, float]],
    labels: list[str],
    colors: list[str],
    corners: list[tuple[float, float]],
) -> list[Bbox] | None:
    """
    Writes a label to each point, as near as it can stand without covering another, a point or the edge; rather further
    away than on a line.

    Args:
        axes (`Axes`): Where to; its place in the figure and its limits are settled.
        points (`list[tuple[float, float]]`): In data coordinates.
        labels (`list[str]`): Label of each point.
        colors (`list[str]`): Colour of each label.
        corners (`list[tuple[float, float]]`): Corners of a line that goes along the axes, in data coordinates.

    Returns:
        `list[Bbox]`: The boxes of the labels, in pixels; `None` if there is no room for all of them.
    """
    pixels = axes.figure.dpi / 72
    centres = axes.transData.transform(points)
    texts = [_write(axes, point, label, color) for point, label, color in zip(points, labels, colors, strict=True)]
    radius = POINT_RADIUS * pixels
    taken = np.hstack([centres - radius, centres + radius])  # (boxes, 4): left, bottom, right, top
    lines = _line_boxes(axes.transData.transform(corners), pixels)
    placed = []
    for text, centre in zip(texts, centres, strict=True):
        boxes = _candidate_boxes(centre, text.get_window_extent().size, axes.get_window_extent(), pixels)
        boxes = boxes[~_overlap(boxes, taken, MARGIN * pixels)]
        if not len(boxes):
            return None
        box = _nearest(boxes, centre, lines, pixels)
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
        label,
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


def _line_boxes(corners: np.ndarray, pixels: float) -> np.ndarray:
    """The straight parts of a line as thin boxes, `(parts, 4)`."""
    ends = np.stack([corners[:-1], corners[1:]])
    return np.hstack([ends.min(axis=0) - pixels, ends.max(axis=0) + pixels])


def _candidate_boxes(centre: np.ndarray, size: np.ndarray, room: Bbox, pixels: float) -> np.ndarray:
    """Where a label may stand: next to its point, and all over the room; left, bottom, right and top, `(boxes, 4)`."""
    half = size / 2
    right, up = (DISTANCE + POINT_RADIUS) * pixels + half
    beside = centre + np.array([(right, 0), (-right, 0), (0, up), (0, -up)])
    places = [
        np.arange(low + part, high - part, step * pixels)
        for low, high, part, step in zip(room.min, room.max, half, STEPS, strict=True)
    ]
    middles = np.vstack([beside, np.stack(np.meshgrid(*places), axis=-1).reshape(-1, 2)])
    boxes = np.hstack([middles - half, middles + half])
    room = room.padded(-MARGIN * pixels)
    return boxes[(boxes[:, :2] >= room.min).all(axis=1) & (boxes[:, 2:] <= room.max).all(axis=1)]


def _overlap(boxes: np.ndarray, others: np.ndarray, margin: float) -> np.ndarray:
    """Which boxes, `(boxes, 4)`, come nearer than this to any of the others, `(others, 4)`."""
    apart = (boxes[:, None, :2] > others[:, 2:] + margin) | (boxes[:, None, 2:] < others[:, :2] - margin)
    return ~apart.any(axis=2).all(axis=1)


def _nearest(boxes: np.ndarray, centre: np.ndarray, lines: np.ndarray, pixels: float) -> np.ndarray:
    """The box that is nearest to a point, after what counts as distance too."""
    gaps = np.maximum(0, np.maximum(boxes[:, :2] - centre, centre - boxes[:, 2:]))
    distances = np.hypot(*gaps.T) + ABOVE_OR_BELOW * pixels * (gaps[:, 0] == 0)
    return boxes[np.argmin(distances + ON_A_LINE * pixels * _overlap(boxes, lines, 0))]
