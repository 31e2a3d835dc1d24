"""Pictures of what models say of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import Metadata
from detectron2.data.detection_utils import annotations_to_instances, read_image
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.colormap import colormap
from PIL.Image import DecompressionBombError

from pcka_distill.errors import UserError, reason

__all__ = [
    "Row",
    "detection_grid",
    "draw_output",
    "figure_of",
    "picture_of",
    "place_labels",
    "truth_of",
]

# Of the shorter side of a drawn picture: text does not get smaller with the image.
_PIXELS = 480
_MOST_PIXELS = 1600
_BEST = 3
# Of a figure.
_DPI = 110
# Width of a picture among others, in pixels of the figure: that of the image, within these.
_LEAST_ACROSS = 242
_MOST_ACROSS = 640
# Width of a figure that fits a page, and the height that viewers still open.
_PAGE = 1500
_LONGEST = 30000
# Of a picture's width for the longest name, in letters; and points.
_LABEL = 0.25
_LEAST_FONT = 6
_MOST_FONT = 9
_THIN = 8
_BOX_KEYS = ("bbox", "bbox_mode", "category_id")
_SAME = 0.5

Image = np.ndarray[Any, Any]


def draw_output(
    image: Image,
    output: dict[str, Any],
    classes: Sequence[str] | None,
    stuff: Sequence[str] | None = None,
) -> Image:
    """Boxes, masks, segments or best classes, drawn on a picture by Detectron2's visualizer.

    Args:
        image: (H, W, 3), uint8, RGB. Small ones are enlarged.
        output: of :class:`.Predictor`; what it holds is drawn, whatever its scores.
        classes: their names; None writes numbers.
        stuff: names of what is no thing, of a panoptic segmentation.

    Returns:
        (H', W', 3), uint8, RGB.
    """
    # It needs OpenCV, which training does not.
    from detectron2.utils.visualizer import Visualizer

    names = _Names(classes)
    height, width = image.shape[:2]
    scale = max(1.0, min(_PIXELS / min(height, width), _MOST_PIXELS / max(height, width)))
    metadata = Metadata(thing_classes=names, stuff_classes=_Names(stuff) if stuff else names)
    visualizer = Visualizer(image, metadata, scale=scale)
    if "panoptic_seg" in output:
        drawn = visualizer.draw_panoptic_seg_predictions(*output["panoptic_seg"])
    elif "instances" in output:
        found = output["instances"]
        colors = colormap(rgb=True, maximum=1)
        kinds = found.pred_classes.tolist()
        drawn = visualizer.overlay_instances(
            boxes=found.pred_boxes,
            masks=np.asarray(found.pred_masks) if found.has("pred_masks") else None,
            keypoints=found.pred_keypoints if found.has("pred_keypoints") else None,
            labels=[f"{names[k]} {s:.0%}" for k, s in zip(kinds, found.scores.tolist())],
            # One for each class, so that frames of a video do not flicker.
            assigned_colors=[colors[k % len(colors)] for k in kinds],
        )
    elif "sem_seg" in output:
        drawn = visualizer.draw_sem_seg(output["sem_seg"].argmax(0))
    else:
        scores, kinds = output["scores"].topk(min(_BEST, len(output["scores"])))
        lines = [f"{names[k]} {s:.0%}" for k, s in zip(kinds.tolist(), scores.tolist())]
        x, y = image.shape[1] / 2, image.shape[0] * 0.02
        drawn = visualizer.draw_text("\n".join(lines), (x, y))
    result: Image = drawn.get_image()
    return result


class _Names(list[str]):
    """Of classes, and the number itself where there is no name."""

    def __init__(self, names: Sequence[str] | None) -> None:
        super().__init__(names or [])

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index) if index < len(self) else str(index)


def figure_of(columns: int, rows: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure without a window, and its (rows, columns) axes.

    Args:
        columns: of pictures.
        rows: of pictures.
        width: of one, in inches.
        height: of one, in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (width * columns, height * rows)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def picture_of(record: Mapping[str, Any]) -> Image:
    """(H, W, 3), uint8, RGB, of a record of Detectron2's catalogues.

    Raises:
        UserError: its file cannot be read.
    """
    if "image" in record:
        image: Image = record["image"]
        return image
    try:
        return read_image(record["file_name"], format="RGB")
    except (OSError, ValueError, SyntaxError, DecompressionBombError) as e:
        raise UserError(f"the picture {record['file_name']} cannot be read: {reason(e)}") from e


class Row(NamedTuple):
    """What is drawn on each picture of a row of :func:`detection_grid`."""

    title: str
    #: for each picture the found instances, best first; None draws the truth
    found: Sequence[Any] | None


def truth_of(record: dict[str, Any]) -> Any:
    """The objects of a record of Detectron2's catalogues, without crowds, as instances."""
    boxes = [{k: a[k] for k in _BOX_KEYS} for a in record["annotations"] if not a.get("iscrowd")]
    return annotations_to_instances(boxes, (record["height"], record["width"]))


def detection_grid(
    images: Sequence[Image],
    truth: Sequence[Any],
    rows: Sequence[Row],
    names: Sequence[str],
    caption: str,
) -> Any:
    """A row of pictures for each detector: what it finds rightly in green, wrongly in red.

    A box is right where an object of its class has an IoU above 0.5 with it and no better box has
    found that object. Images that do not fit beside one another go on below, with rows of their
    own.

    Args:
        images: (H, W, 3), uint8, RGB.
        truth: for each picture its instances, with ``gt_boxes`` and ``gt_classes``.
        rows: from top to bottom.
        names: of the classes.
        caption: below the whole.

    Returns:
        a figure of matplotlib.
    """
    height, width = np.array([x.shape[:2] for x in images]).max(0)
    across = min(max(width, _LEAST_ACROSS), _MOST_ACROSS) / _DPI
    ratio = min(max(height / width, 0.5), 1.5)
    columns = max(min(int(_PAGE / _DPI / across), len(images)), 1)
    lines = [(start, row) for start in range(0, len(images), columns) for row in rows]
    across = min(across, _LONGEST / _DPI / (len(lines) * ratio))
    figure, grid = figure_of(columns, len(lines), across, across * ratio + 0.15)
    figure.supxlabel(caption)
    drawn: list[tuple[Any, Image, _Boxes]] = []
    for (start, row), axes in zip(lines, grid):
        axes[0].set_ylabel(row.title)
        for i, axis in enumerate(axes, start):
            if i >= len(images):
                axis.set_axis_off()
                continue
            axis.set_xticks([])
            axis.set_yticks([])
            # Enlarged, its pixels are seen; made smaller, lines must not break.
            smooth = "nearest" if images[i].shape[1] <= across * _DPI else "antialiased"
            axis.imshow(images[i], interpolation=smooth)
            drawn.append((axis, images[i], _boxes(row, i, truth[i], names)))
    longest = max((len(x) for *_, found in drawn for x in found.names), default=1)
    size = min(max(_LABEL * across * 72 / longest, _LEAST_FONT), _MOST_FONT)
    # How large a pixel of an image is, which labels depend on.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axis, image, found in drawn:
        _draw_boxes(axis, image, found, size)
    return figure


class _Boxes(NamedTuple):
    """Of one picture, best first."""

    #: (N, 4), x0, y0, x1, y1
    corners: list[list[float]]
    names: list[str]
    colors: list[str]


def _boxes(row: Row, index: int, truth: Any, names: Sequence[str]) -> _Boxes:
    if row.found is None:
        boxes, kinds = truth.gt_boxes, truth.gt_classes.tolist()
        colors = ["white"] * len(kinds)
    else:
        found = row.found[index]
        boxes, kinds = found.pred_boxes, found.pred_classes.tolist()
        colors = ["lime" if x else "red" for x in _right(found, truth)]
    return _Boxes(boxes.tensor.tolist(), [names[k] for k in kinds], colors)


def _draw_boxes(axis: Any, image: Image, found: _Boxes, size: float) -> None:
    """Boxes, and their names in points of a size."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Rectangle

    renderer, font = axis.figure.canvas.get_renderer(), FontProperties(size=size)
    # Image pixels for one of the drawing.
    scale = image.shape[1] / axis.get_window_extent().width
    width = 1.0 if size < _THIN else 2.0
    margin = size / 8 * _DPI / 72
    extents = {}
    for name in set(found.names):
        w, h, _ = renderer.get_text_width_height_descent(name, font, False)
        extents[name] = ((w + 2 * margin) * scale, (h + 2 * margin) * scale)
    spots = place_labels(found.corners, [extents[x] for x in found.names], image.shape[:2])
    # The best last, on top of the others.
    for (x0, y0, x1, y1), name, color, (x, y) in reversed(list(zip(*found, spots))):
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=color, lw=width))
        ground = {"boxstyle": "square,pad=0.125", "fc": color, "ec": "none", "alpha": 0.75}
        axis.text(
            x + margin * scale, y + margin * scale, name, va="top", fontproperties=font,
            color="white" if color == "red" else "black", bbox=ground, clip_on=True,
            in_layout=False,
        )  # fmt: skip


def place_labels(
    boxes: Sequence[Sequence[float]],
    sizes: Sequence[tuple[float, float]],
    shape: tuple[int, ...],
) -> list[tuple[float, float]]:
    """Where the names of boxes hide least of the boxes and of one another.

    Args:
        boxes: x0, y0, x1, y1 of each; the first have the first choice.
        sizes: width and height of each label.
        shape: height and width of the image, which no label leaves if it fits in at all.

    Returns:
        the upper left corner of each label.
    """
    height, width = shape[:2]
    taken = np.array(boxes, float).reshape(-1, 4)
    found = []
    for (x0, y0, x1, y1), (w, h) in zip(boxes, sizes):
        above, below, inside, right = y0 - h, y1, y0, x1 - w
        spots = np.array(
            [(x, y) for y in (above, below, inside, y1 - h) for x in (x0, right)]
            + [(x1, y0), (x0 - w, y0)]
        )
        spots = np.maximum(np.minimum(spots, [width - w, height - h]), 0)
        # (spots, taken): the share of each box and label that is hidden.
        ends = np.minimum(spots[:, None] + [w, h], taken[:, 2:])
        sides = np.maximum(ends - np.maximum(spots[:, None], taken[:, :2]), 0)
        areas = np.maximum((taken[:, 2:] - taken[:, :2]).prod(1), 1e-9)
        hidden = (sides.prod(2) / areas).sum(1)
        x, y = spots[hidden.round(3).argmin()].tolist()
        found.append((x, y))
        taken = np.vstack([taken, [x, y, x + w, y + h]])
    return found


def _right(found: Any, truth: Any) -> list[bool]:
    """Whether each of the found boxes, best first, is the first to find an object."""
    overlaps = pairwise_iou(Boxes(found.pred_boxes.tensor), truth.gt_boxes)
    overlaps[found.pred_classes[:, None] != truth.gt_classes] = 0
    free = [True] * len(truth)
    right = []
    for row in overlaps.tolist():
        best = max((x for x in range(len(truth)) if free[x]), key=row.__getitem__, default=None)
        right.append(best is not None and row[best] > _SAME)
        if best is not None and right[-1]:
            free[best] = False
    return right
