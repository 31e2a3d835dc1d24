"""How the digits set is drawn. Apart, because nothing else here needs OpenCV or scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import pycocotools.mask as mask_util
from sklearn.datasets import load_digits

from pcka_distill.data.digits import IMAGE_SIZE

__all__ = ["render_split"]

Array: TypeAlias = "np.ndarray[Any, Any]"
_MIN_SIDE, _MAX_SIDE = 18, 44
_ALPHA_THRESHOLD = 0.25
_MAX_OVERLAP = 0.1
_MIN_CONTRAST = 70.0


def _background(rng: np.random.Generator) -> Array:
    """A cluttered background: (96, 96, 3) float32 in 0..255."""
    size = IMAGE_SIZE
    grid = rng.uniform(0, 255, (rng.integers(2, 5), rng.integers(2, 5), 3)).astype(np.float32)
    image = cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    image = np.ascontiguousarray(image)
    for _ in range(rng.integers(2, 7)):
        color = rng.uniform(0, 255, 3).tolist()
        thickness = int(rng.integers(1, 4))
        a, b = rng.integers(0, size, (2, 2)).tolist()
        kind = rng.integers(3)
        if kind == 0:
            cv2.line(image, a, b, color, thickness, cv2.LINE_AA)
        elif kind == 1:
            axes = rng.integers(5, size // 2, 2).tolist()
            start, sweep = rng.uniform(0, 360), rng.uniform(60, 270)
            cv2.ellipse(image, a, axes, 0, start, start + sweep, color, thickness, cv2.LINE_AA)
        else:
            cv2.rectangle(image, a, b, color, thickness)
    return image + rng.normal(0, rng.uniform(2, 8), image.shape).astype(np.float32)


def _color_off(background: Array, rng: np.random.Generator) -> Array:
    """A colour at least _MIN_CONTRAST grey levels off the mean of what it will cover."""
    grey = np.array([0.114, 0.587, 0.299], np.float32)
    mean = float(background.reshape(-1, 3).mean(0) @ grey)
    while True:
        color = rng.uniform(0, 255, 3).astype(np.float32)
        if abs(float(color @ grey) - mean) >= _MIN_CONTRAST:
            return color


def _overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Shared area of two (x0, y0, x1, y1) boxes, as a part of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return width * height / min(areas)


def _render(
    digits: Array, labels: Array, rng: np.random.Generator
) -> tuple[Array, list[tuple[int, Array]]]:
    """One image, (96, 96, 3) uint8 BGR, and its objects as (class, (96, 96) bool mask)."""
    size = IMAGE_SIZE
    image = _background(rng)
    boxes: list[tuple[int, ...]] = []
    objects: list[tuple[int, Array]] = []
    wanted = int(rng.integers(2, 6))
    for _ in range(20 * wanted):
        if len(objects) == wanted:
            break
        index = rng.integers(len(digits))
        side = round(float(np.exp(rng.uniform(np.log(_MIN_SIDE), np.log(_MAX_SIDE)))))
        alpha = cv2.resize(digits[index], (side, side), interpolation=cv2.INTER_CUBIC)
        alpha = alpha.clip(0, 1)
        rows, cols = np.nonzero(alpha > _ALPHA_THRESHOLD)
        left, top = rng.integers(0, size - side + 1, 2).tolist()
        box = (
            left + int(cols.min()),
            top + int(rows.min()),
            left + int(cols.max()) + 1,
            top + int(rows.max()) + 1,
        )
        if any(_overlap(box, other) > _MAX_OVERLAP for other in boxes):
            continue
        patch = image[top : top + side, left : left + side]
        color = _color_off(patch, rng)
        opacity = (alpha * rng.uniform(0.8, 1.0))[..., None]
        patch[:] = patch * (1 - opacity) + color * opacity
        mask = np.zeros((size, size), bool)
        mask[top : top + side, left : left + side] = alpha > _ALPHA_THRESHOLD
        for _, below in objects:
            below &= ~mask
        boxes.append(box)
        objects.append((int(labels[index]), mask))
    image = image + np.asarray(rng.normal(0, 3, image.shape), np.float32)
    return image.clip(0, 255).astype(np.uint8), objects


def render_split(
    folder: Path, split: str, count: int, seed: int, share: tuple[float, float], classes: list[str]
) -> None:
    """Render one split into ``folder/split/*.png`` and ``folder/split.json``.

    Args:
        folder: is there.
        split: its name.
        count: images.
        seed: of everything random.
        share: the part of the scanned digits to use, (start, stop) in [0, 1].
        classes: their names.
    """
    scans = load_digits()
    # One fixed permutation decides which digits belong to which split.
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(scans.target))
    chosen = order[round(share[0] * len(order)) : round(share[1] * len(order))]
    digits: Array = np.asarray(scans.images)[chosen].astype(np.float32) / 16
    labels = scans.target[chosen]
    rng = np.random.Generator(np.random.PCG64(seed))

    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        image, objects = _render(digits, labels, rng)
        name = f"{i:05d}.png"
        if not cv2.imwrite(str(folder / split / name), image):
            raise OSError(f"could not write {folder / split / name}")
        images.append({"id": i + 1, "file_name": name, "height": IMAGE_SIZE, "width": IMAGE_SIZE})
        for label, mask in objects:
            rle = mask_util.encode(np.asfortranarray(mask))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": label + 1,
                    "bbox": [float(v) for v in mask_util.toBbox(rle)],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    content = {
        "info": {"description": f"digits detection set, split {split}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(classes)],
    }
    (folder / f"{split}.json").write_text(json.dumps(content))
