"""What is wrong with a dataset, known before the first iteration."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any

from detectron2.structures import BoxMode

from pcka_distill.errors import UserError

__all__ = [
    "box_problem",
    "check_annotations",
    "check_records",
    "evaluation_problem",
    "is_number",
    "is_size",
]

# A child of Detectron2's logger, so that it is seen wherever that one is.
logger = logging.getLogger(f"detectron2.{__name__}")

Record = dict[str, Any]
# Of so many images, spread over the dataset, it is seen whether they are there.
_FILES = 16


def check_records(
    records: list[Record], name: str, classes: int | None = None, *, tell: bool = True
) -> list[Record]:
    """Leave out, count and log what cannot be trained on; refuse what cannot be mended so.

    Left out are images without a size, and boxes that are not four finite numbers, that have no
    area, or that lie outside of their image. Detectron2 would train on the first until a loss is
    NaN, and drop the others in silence.

    Args:
        records: as Detectron2's catalogues give them; not changed.
        name: of the dataset, for messages.
        classes: how many it has; None if that is not known.
        tell: log what is left out.

    Returns:
        the records that are left.

    Raises:
        UserError: no image is left, a file that is not there, a class out of range, or a record
            that is none.
    """
    what = f"dataset {name} cannot be used"
    dropped: dict[str, list[Any]] = {}
    kept = []
    for record in records:
        if not isinstance(record, dict) or not (record.get("file_name") or "image" in record):
            raise UserError(f"{what}: a record without a file_name: {str(record)[:80]}")
        image = record.get("image_id", record.get("file_name"))
        size: tuple[Any, Any] = record.get("width"), record.get("height")
        named = "width" in record or "height" in record
        if named and not is_size(size):
            dropped.setdefault("images without a size", []).append(image)
            continue
        annotations = record.get("annotations")
        if annotations is None:
            kept.append(record)
            continue
        left = []
        for annotation in annotations:
            number = annotation.get("category_id")
            if classes is not None and not (
                isinstance(number, Integral) and 0 <= int(number) < classes
            ):
                raise UserError(
                    f"{what}: image {image} has an object of class {number}, and classes are 0 to "
                    f"{classes - 1}"
                )
            problem = box_problem(annotation, size)
            if problem:
                dropped.setdefault(problem, []).append(image)
            else:
                left.append(annotation)
        changed = len(left) < len(annotations)
        kept.append({**record, "annotations": left} if changed else record)
    for problem, images in dropped.items() if tell else ():
        first = ", ".join(map(str, dict.fromkeys(images[:5])))
        logger.warning(
            f"Dataset {name}: {len(images)} {problem} are left out (first of image {first})"
        )
    if not kept:
        raise UserError(f"{what}: it has no images" + (", of a size" if records else ""))
    for path in _some_files(kept):
        if not os.path.isfile(path):
            raise UserError(f"{what}: image {path} does not exist")
    return kept


def check_annotations(file: str, name: str) -> None:
    """Refuse a COCO json that its evaluation would stumble over, after all of the training.

    It reads more of it than the training does, and leaves nothing out.

    Args:
        file: of a dataset that Detectron2 has already loaded.
        name: of the dataset, for the message.

    Raises:
        UserError: with the first annotation that is wrong.
    """
    with open(file) as f:
        content = json.load(f)
    # Of images without annotations, such as COCO's test set, detections are only written.
    for annotation in content.get("annotations", []):
        wrong = evaluation_problem(annotation)
        if wrong:
            raise UserError(
                f"dataset {name} cannot be used: the {wrong} of annotation {annotation.get('id')} "
                f"is {annotation.get(wrong)!r}, and COCO's evaluation reads it; mend it in {file}"
            )


def evaluation_problem(annotation: Record) -> str:
    """The key of a COCO annotation that its evaluation would stumble over, or ""."""
    number: Any = annotation.get("id")
    right = {
        "area": is_number(annotation.get("area")),
        "iscrowd": annotation.get("iscrowd") in (0, 1),
        "bbox": _are_numbers(annotation.get("bbox")),
        # The compiled evaluation keeps it without a sign.
        "id": is_number(number) and 0 <= number < 2**63,
    }
    return next((key for key, ok in right.items() if not ok), "")


def is_size(size: tuple[Any, Any]) -> bool:
    """Whether these are a width and a height."""
    return all(is_number(x) and x >= 1 for x in size)


def is_number(x: Any) -> bool:
    """Whether it is a finite number."""
    try:
        return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)
    except OverflowError:
        # A whole number beyond all floating-point ones.
        return False


def _are_numbers(box: Any) -> bool:
    """Of a box: a list, a tuple or an array."""
    try:
        return len(box) == 4 and all(is_number(x) for x in box)
    except TypeError:
        return False


def box_problem(annotation: Record, size: tuple[Any, Any]) -> str:
    """Why a box is left out, or "".

    Args:
        annotation: of a record.
        size: width and height of its image, in pixels; None if they are not known.
    """
    box: Any = annotation.get("bbox")
    mode = annotation.get("bbox_mode")
    if mode not in (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS):
        # Of rotated boxes and relative ones Detectron2's mapper knows more.
        return ""
    if not _are_numbers(box):
        return "boxes that are not four finite numbers"
    x1, y1, x2, y2 = box
    if mode == BoxMode.XYWH_ABS:
        x2, y2 = x1 + x2, y1 + y2
    if not (x2 > x1 and y2 > y1):
        return "boxes without an area"
    width, height = size
    if width is not None and not (x1 < width and y1 < height and x2 > 0 and y2 > 0):
        return "boxes outside of their image"
    return ""


def _some_files(records: list[Record]) -> Iterator[str]:
    for record in records[:: max(1, len(records) // _FILES)]:
        for key in ("file_name", "sem_seg_file_name"):
            path = record.get(key, "")
            if path and "://" not in path:
                yield path
