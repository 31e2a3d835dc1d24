"""Pictures of what models say of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
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
    "save_figure",
    "truth_of",
]

# Of the shorter side of a drawn picture: text does not get smaller with the image.
_PIXELS = 480
_MOST_PIXELS = 1600
_BEST = 3
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

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as a picture.

    Raises:
        UserError: it cannot be written there, or not in that format.
    """
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be written: {reason(e)}; change --out") from e


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
    found that object.

    Args:
        images: (H, W, 3), uint8, RGB.
        truth: for each picture its instances, with ``gt_boxes`` and ``gt_classes``.
        rows: from top to bottom.
        names: of the classes.
        caption: below the whole.

    Returns:
        a figure of matplotlib.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    shape = np.array([x.shape[:2] for x in images]).max(0)
    height = 2.2 * min(max(shape[0] / shape[1], 0.5), 1.5) + 0.15
    figure, grid = figure_of(len(images), len(rows), 2.2, height)
    figure.supxlabel(caption)
    for row, axes in zip(rows, grid):
        axes[0].set_ylabel(row.title)
        for i, (image, objects, axis) in enumerate(zip(images, truth, axes)):
            if row.found is None:
                boxes, kinds = objects.gt_boxes, objects.gt_classes.tolist()
                colors = ["white"] * len(kinds)
            else:
                found = row.found[i]
                boxes, kinds = found.pred_boxes, found.pred_classes.tolist()
                colors = ["lime" if x else "red" for x in _right(found, objects)]
            axis.imshow(image, interpolation="nearest")
            # The best last, on top of the others.
            for (x0, y0, x1, y1), kind, color in reversed(
                list(zip(boxes.tensor.tolist(), kinds, colors))
            ):
                axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=color, lw=2))
                axis.text(
                    x0 + 1, y0 + 1, names[kind], color=color, va="top", fontsize=9, weight="bold",
                    path_effects=[withStroke(linewidth=2, foreground="black")], clip_on=True,
                )  # fmt: skip
            axis.set_xticks([])
            axis.set_yticks([])
    return figure


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
